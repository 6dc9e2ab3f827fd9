"""
Inject faults into train.py and count the iterations it loses, the numbers it gets wrong, and the tracebacks.

    python tests/torture.py                  # every fault many times: about an hour; make torture
    python tests/torture.py --trials=3       # a short form, as make test runs it

Every trial trains a tiny model in a child forked from this process, which has imported train.py once. The child is
killed, disturbed, or resumes with a damaged file; then the run is resumed until it ends. Its weights, moments and
scheduler must be bit-identical to those of an undisturbed run, and so must the rows of log.csv. The table's columns:

    trials       number of trials
    lost         largest number of finished iterations that were not saved; a SIGKILL loses those since the last save
    differing    numbers in ckpt.pt, or rows of log.csv, that differ from the undisturbed run
    tracebacks   trials that printed one
    silent       trials that used a damaged file, or ended without the line that says why

log.csv and meta.json are text without checksums: a changed number in them looks like an intended one.
"""

import contextlib
import csv
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a fork keeps one thread only
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

torch.optim.AdamW([torch.zeros(1, requires_grad=True)], fused=True)  # imports modules that each child would import

import lib.log  # noqa: E402
import lib.processes  # noqa: E402
import train  # noqa: E402

lib.log.plot_log = lambda *_: None  # a picture takes longer than the iterations between two of them
save = torch.save
torch.save = lambda checkpoint, file: (save(checkpoint, file), file.flush(), time.sleep(0.02))  # time to be killed

from configurator import configure  # noqa: E402

from exact_train import list_differing, pick_matmul  # noqa: E402
from networks import write_dataset  # noqa: E402
from spoil import spoil  # noqa: E402

lib.processes.pick_matmul = pick_matmul

ITERS, SAVES = 40, 10  # iterations in a run, and between saves
EXPECTED = {}  # number of processes: read_state() of the undisturbed run
FLAGS = [
    "--vocab_size=300", "--hidden_size=32", "--intermediate_size=64", "--num_hidden_layers=2", "--head_dim=16",
    "--num_attention_heads=2", "--num_key_value_heads=1", "--max_position_embeddings=32", "--batch_size=2",
    "--block_size=32", f"--max_iters={ITERS}", f"--eval_interval={SAVES}", "--eval_iters=1", "--log_interval=1",
    "--sample_interval=0", "--dtype=float32", "--device=cpu", "--dataset=text",
]  # fmt: skip


@dataclass(frozen=True)
class TortureConfig:
    """Inject every fault into train.py and count its losses and errors."""

    trials: int = 50  # trials of each fault
    seed: int = 0  # seeds the times, places and bits of the faults


def prepare(folder):
    """Write data/text in `folder`: 4,000 ids to train on, 500 to evaluate."""
    train, val = (np.random.default_rng(n).integers(0, 300, n).tolist() for n in (4_000, 500))
    write_dataset(folder / "data/text", train, val, vocab_size=300)


def start(folder, flags, **environment):
    """Start a child of this process that runs train.py in `folder`, its output in folder/output."""

    def work():
        os.environ.update(environment)
        os.chdir(folder)
        with open("output", "ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        train.main(configure(train.TrainConfig, flags, saved=train.saved_settings))

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def start_processes(folder, flags, processes):
    """Start one run, shared by that many children as torchrun would start them."""
    if processes == 1:
        return [start(folder, flags)]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    shared = dict(WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    return [start(folder, flags, RANK=str(i), LOCAL_RANK=str(i), **shared) for i in range(processes)]


def wait(process):
    """Wait until a child ends. Return its exit code, or the negative number of the signal that killed it."""
    process.join(120)
    process.kill()  # if it hangs
    process.join()
    return process.exitcode


def read_output(folder):
    path = folder / "output"
    return path.read_text(errors="replace") if path.exists() else ""


def list_errors(folder):
    return [line for line in read_output(folder).splitlines() if line.startswith("error: ")]


def wait_for(folder, iteration, process):
    """Wait until the child has printed the loss of an iteration, or has ended."""
    while f"iter {iteration:6d} | loss" not in read_output(folder) and process.is_alive():
        time.sleep(0.002)


def resume(folder, processes=1):
    """Resume until the run is finished, or start again if it never saved. Return True if it finished."""
    for _ in range(5):
        flags = ["--init_from=resume"] if (folder / "out/ckpt.pt").exists() else [*FLAGS, "--overwrite=True"]
        if not any([wait(process) for process in start_processes(folder, flags, processes)]):
            return True
    return False


def read_state(folder):
    """Return {name: value} of everything in out/ckpt.pt that must be equal, and the rows of log.csv without timings."""
    checkpoint = torch.load(folder / "out/ckpt.pt", weights_only=True)
    keys = ("model", "optimizer", "scheduler", "iter_num", "best_val_loss")
    with open(folder / "out/log.csv", newline="") as file:
        rows = {f"row {i}": ",".join(row[:6]) for i, row in enumerate(csv.reader(file))}
    return {key: checkpoint[key] for key in keys} | rows


def count_lost(folder):
    """Count the iterations whose loss the child printed and that are not in its checkpoint."""
    lines = read_output(folder).splitlines()
    done = [int(line.split()[1]) for line in lines if line.startswith("iter") and "| loss" in line]
    path = folder / "out/ckpt.pt"
    saved = torch.load(path, weights_only=True)["iter_num"] if path.exists() else 0
    return max(0, max(done, default=0) - saved)


# ---- The faults. Each disturbs one run in `folder` and returns (iterations lost, True if it failed silently).


def send_signals(*numbers, iterations=range(1, ITERS - 5)):
    """Send these signals during one of the iterations, or during the save after it."""

    def fault(folder, dice):
        process = start(folder, FLAGS)
        wait_for(folder, dice.choice(iterations), process)
        time.sleep(dice.random() * 0.02)
        for i, number in enumerate(numbers):
            time.sleep(0.05 * (i > 0))
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)
        code = wait(process)
        ended_early = (0, -numbers[-1])  # before the first signal arrived, or just before the second
        return count_lost(folder), code not in (128 + numbers[0], *ended_early)

    return fault


def kill_rank(folder, dice):
    """Kill one of two processes. The other must end with a line that names the command to continue."""
    processes = start_processes(folder, FLAGS, 2)
    wait_for(folder, dice.randrange(1, ITERS - 5), processes[0])
    time.sleep(dice.random() * 0.02)
    dice.shuffle(processes)
    processes[0].kill()
    wait(processes[0])
    ended_early = wait(processes[1]) == 0  # before the signal arrived
    named = ["--init_from=resume" in line for line in list_errors(folder)]
    return count_lost(folder), not ended_early and named != [True]


def fill_disk(folder, dice):
    """Limit the size of files, which simulates a full disk without a separate file system."""
    size = dice.choice([200, 5_000, 60_000, 150_000])
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))  # noqa: E731
    command = [sys.executable, str(ROOT / "train.py"), *FLAGS]
    done = subprocess.run(command, cwd=folder, preexec_fn=limit, capture_output=True, text=True)
    (folder / "output").write_text(done.stdout + done.stderr)
    shutil.rmtree(folder / "out", ignore_errors=True)  # this process picked its matmul by measuring
    return 0, done.returncode == 0 or done.stderr.count("\n") != 1 or not list_errors(folder)


def start_two_writers(folder, dice):
    first = start(folder, FLAGS)
    wait_for(folder, 1, first)
    code = wait(start(folder, [*FLAGS, "--overwrite=True"]))
    return 0, wait(first) != 0 or code == 0 or not list_errors(folder)


def leave_files(folder, dice):
    """Start next to files that a killed process may have left."""
    out = folder / "out"
    out.mkdir()
    for name in ("ckpt.pt.tmp", "ckpt.pt.123.tmp", "log.csv.4.tmp", ".lock", "loss.png"):
        (out / name).write_bytes(dice.randbytes(99))
    return 0, wait(start(folder, FLAGS)) != 0


def damage(name, change, checksums=True):
    """Damage a file of a run that is half finished: the resume must refuse it, or repair it and say so."""

    def fault(folder, dice):
        wait(start(folder, [*FLAGS, f"--max_iters={ITERS // 2}"]))
        content = bytearray((folder / name).read_bytes())
        change(content, dice)
        (folder / name).write_bytes(content)
        code = wait(start(folder, ["--init_from=resume", f"--max_iters={ITERS}"]))
        silent = code not in (1, 2) or len(list_errors(folder)) != 1
        if code == 0:
            unnoticed = checksums and "note: " not in read_output(folder)
            silent = unnoticed and list_differing(EXPECTED[1], read_state(folder))
        shutil.rmtree(folder / "out")
        shutil.rmtree(folder / "data")
        prepare(folder)
        return 0, silent

    return fault


def flip(content, dice):
    content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)


def zero(content, dice):
    start = dice.randrange(len(content))
    content[start : start + 4_096] = bytes(len(content[start : start + 4_096]))


def cut(content, dice):
    del content[dice.randrange(len(content)) :]


def replace(content, dice):
    content[:] = dice.choice([b"", b"PK", b"{}", b"[]", b"<html>", dice.randbytes(300), b"[" * 100_000, b"\0" * 500])


def scramble(content, dice):
    """Change bytes near the beginning, which holds the headers, or a token of the text."""
    content[:] = spoil(content, dice)


FAULTS = {
    "SIGKILL, anywhere": send_signals(signal.SIGKILL),
    "SIGKILL, inside a save": send_signals(signal.SIGKILL, iterations=range(SAVES, ITERS + 1, SAVES)),
    "SIGKILL, one of two ranks": kill_rank,
    "SIGTERM": send_signals(signal.SIGTERM),
    "SIGTERM twice in 50 ms": send_signals(signal.SIGTERM, signal.SIGTERM),
    "Ctrl-C": send_signals(signal.SIGINT),
    "SIGHUP": send_signals(signal.SIGHUP),
    "SIGUSR1": send_signals(signal.SIGUSR1),
    "disk full": fill_disk,
    "two writers": start_two_writers,
    "leftovers": leave_files,
    "ckpt.pt, a bit flipped": damage("out/ckpt.pt", flip),
    "ckpt.pt, 4 kB zeroed": damage("out/ckpt.pt", zero),
    "ckpt.pt, truncated": damage("out/ckpt.pt", cut),
    "ckpt.pt, replaced": damage("out/ckpt.pt", replace),
    "ckpt.pt, scrambled": damage("out/ckpt.pt", scramble),
    "log.csv, replaced": damage("out/log.csv", replace),
    "log.csv, scrambled": damage("out/log.csv", scramble, checksums=False),
    "train.bin, a bit flipped": damage("data/text/train.bin", flip),
    "train.bin, truncated": damage("data/text/train.bin", cut),
    "meta.json, replaced": damage("data/text/meta.json", replace),
    "meta.json, scrambled": damage("data/text/meta.json", scramble, checksums=False),
}


def format_row(name, row):
    return f"{name:<28}{row[0]:>8}{row[1]:>8}{row[2]:>11}{row[3]:>12}{row[4]:>8}"


def torture(config):
    """Try every fault config.trials times. Return {fault: [trials, lost, differing, tracebacks, silent]}."""
    dice = random.Random(config.seed)
    table = {}
    print(format_row("fault", ("trials", "lost", "differing", "tracebacks", "silent")))
    with tempfile.TemporaryDirectory(prefix="torture.") as temporary:
        for processes in (1, 2):
            folder = Path(temporary) / f"reference{processes}"
            prepare(folder)
            assert resume(folder, processes), read_output(folder)
            EXPECTED[processes] = read_state(folder)
        for name, fault in FAULTS.items():
            row = table[name] = [0] * 5
            processes = 2 if fault is kill_rank else 1
            for trial in range(config.trials):
                folder = Path(temporary) / f"trial{trial}"
                prepare(folder)
                iterations, silent = fault(folder, dice)
                finished = resume(folder, processes)
                row[0] += 1
                row[1] = max(row[1], iterations)
                row[2] += len(list_differing(EXPECTED[processes], read_state(folder))) if finished else 1
                row[3] += "Traceback" in read_output(folder)
                row[4] += bool(silent)
                shutil.rmtree(folder)
            print(format_row(name, row))
    return table


if __name__ == "__main__":
    table = torture(configure(TortureConfig))
    sys.exit(any(any(row[2:]) for row in table.values()))
