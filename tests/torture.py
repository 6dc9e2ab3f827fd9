"""
Faults go in, a table comes out: what does train.py lose, get wrong, or answer with a traceback?

    python tests/torture.py                  # every fault many times: about an hour; make torture
    python tests/torture.py --trials=3       # a short form, as make test runs it

Every trial trains a tiny network in a child forked from this process, which has imported train.py once. The child
dies or is disturbed; then the run is resumed until it ends. It must end where the undisturbed run ends: the same bits
in weights, moments and scheduler, the same rows in log.csv. The columns of the table:

    trials       how many
    lost         most iterations that were done but not saved; a SIGKILL may lose those since the last save
    differing    numbers in ckpt.pt, or rows of log.csv, that differ from the undisturbed run
    tracebacks   children that printed one
    silent       a damaged file that was used, or a death without the line that says why
"""

import contextlib
import csv
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a fork keeps one thread only
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

torch.optim.AdamW([torch.zeros(1, requires_grad=True)], fused=True)  # imports what every child would import again

import train  # noqa: E402

train.plot_log = lambda *_: None  # a picture takes longer than the iterations between two

from configurator import configure  # noqa: E402

ITERS, SAVES = 40, 10  # iterations in a run, and between saves
EXPECTED = {}  # the state() of the undisturbed run
FLAGS = [
    "--vocab_size=300", "--hidden_size=32", "--intermediate_size=64", "--num_hidden_layers=2", "--head_dim=16",
    "--num_attention_heads=2", "--num_key_value_heads=1", "--max_position_embeddings=32", "--batch_size=2",
    "--block_size=32", f"--max_iters={ITERS}", f"--eval_interval={SAVES}", "--eval_iters=1", "--log_interval=1",
    "--sample_interval=0", "--dtype=float32", "--float32_matmul_precision=highest", "--device=cpu", "--dataset=text",
]  # fmt: skip


@dataclass(frozen=True)
class TortureConfig:
    """Disturb train.py in every way, and count what it loses."""

    trials: int = 50  # of each fault
    seed: int = 0  # of the moments, places and bits


def prepare(folder):
    """data/text in `folder`: 4,000 ids to train on, 500 to evaluate."""
    (folder / "data/text").mkdir(parents=True)
    meta = {"dtype": "uint16", "vocab_size": 300}
    for split, n in (("train", 4_000), ("val", 500)):
        content = np.random.default_rng(n).integers(0, 300, n).astype("<u2").tobytes()
        (folder / f"data/text/{split}.bin").write_bytes(content)
        meta[split] = dict(tokens=n, bytes=4 * n, documents=1, sha256=hashlib.sha256(content).hexdigest())
    (folder / "data/text/meta.json").write_text(json.dumps(meta))


def start(folder, flags, slow_save=None):
    """
    Fork a child that runs train.py in `folder`, its output in folder/said; returns its process id. slow_save: a pipe's
    end to which the child writes a byte when a save begins; the save then takes 20 ms more, to be killed in.
    """
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.chdir(folder)
        said = os.open("said", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(said, 1)
        os.dup2(said, 2)
        if slow_save is not None:
            save = torch.save

            def slow(checkpoint, file):
                os.write(slow_save, b"s")
                save(checkpoint, file)
                file.flush()
                time.sleep(0.02)

            torch.save = slow
        train.main(configure(train.TrainConfig, flags, saved=train.saved_settings))
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else 1
        if isinstance(exit.code, str):
            os.write(2, f"{exit.code}\n".encode())
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os._exit(code)


def wait(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def until(folder, line, pid):
    """Wait until the child has said `line`. Returns False if it ended first."""
    while True:
        if line in said(folder):
            return True
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return line in said(folder)
        time.sleep(0.002)


def said(folder):
    path = folder / "said"
    return path.read_text(errors="replace") if path.exists() else ""


def resume(folder):
    """Resume until the run is at its end; from the beginning if it never saved."""
    for _ in range(5):
        flags = ["--init_from=resume"] if (folder / "out/ckpt.pt").exists() else [*FLAGS, "--overwrite=True"]
        if (code := wait(start(folder, flags))) == 0:
            return code
    return code


def state(folder):
    """{name: value} of everything in out/ckpt.pt that must be equal, and the rows of log.csv without timings."""
    checkpoint = torch.load(folder / "out/ckpt.pt", weights_only=True)
    found = {}

    def walk(path, value):
        if isinstance(value, dict):
            for key, item in value.items():
                walk(f"{path}/{key}", item)
        elif isinstance(value, (list, tuple)):
            walk(path, dict(enumerate(value)))
        else:
            found[path] = value

    for key in ("model", "optimizer", "scheduler", "iter_num", "best_val_loss"):
        walk(key, checkpoint[key])
    with open(folder / "out/log.csv", newline="") as file:
        found |= {f"row {i}": tuple(row[:5]) for i, row in enumerate(csv.reader(file))}
    return found


def differing(a, b):
    same = [k for k in a.keys() & b.keys() if (torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k])]
    return len(a.keys() | b.keys()) - len(same)


def lost(folder):
    """Iterations that the child said it did, and that are not in its checkpoint."""
    done = [int(line.split()[1]) for line in said(folder).splitlines() if line.startswith("iter") and "| loss" in line]
    path = folder / "out/ckpt.pt"
    saved = torch.load(path, weights_only=True)["iter_num"] if path.exists() else 0
    return max(0, max(done, default=0) - saved)


# ---- The faults. Each disturbs one run in `folder` and returns (iterations lost, silently wrong).


def killed_anywhere(folder, dice):
    pid = start(folder, FLAGS)
    until(folder, f"iter {dice.randrange(1, ITERS):6d} | loss", pid)
    time.sleep(dice.random() * 0.02)
    os.kill(pid, signal.SIGKILL)
    wait(pid)
    return lost(folder), 0


def killed_in_a_save(folder, dice):
    read, write = os.pipe()
    pid = start(folder, FLAGS, slow_save=write)
    os.close(write)
    for _ in range(dice.randrange(1, ITERS // SAVES + 1)):
        os.read(read, 1)
    time.sleep(dice.random() * 0.03)
    os.kill(pid, signal.SIGKILL)
    wait(pid)
    os.close(read)
    return lost(folder), 0


def signalled(*numbers):
    def fault(folder, dice):
        pid = start(folder, FLAGS)
        until(folder, f"iter {dice.randrange(1, ITERS - 5):6d} | loss", pid)
        for i, number in enumerate(numbers):
            time.sleep(0.05 * (i > 0))
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        code = wait(pid)
        ended = (0, -numbers[-1])  # before the first signal came, or just before the second
        return lost(folder), code not in (128 + numbers[0], *ended)

    return fault


def disk_full(folder, dice):
    """A limit on the size of files is a full disk that needs no file system of its own."""
    limit = dice.choice([200, 5_000, 60_000, 150_000])

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [sys.executable, str(ROOT / "train.py"), *FLAGS]
    done = subprocess.run(command, cwd=folder, preexec_fn=limited, capture_output=True, text=True)
    (folder / "said").write_text(done.stdout + done.stderr)
    (folder / "out").mkdir(exist_ok=True)
    return 0, done.returncode == 0 or "File too large" not in done.stderr or done.stderr.count("\n") != 1


def two_writers(folder, dice):
    first = start(folder, FLAGS)
    until(folder, "iter      1 | loss", first)
    second = start(folder, [*FLAGS, "--overwrite=True"])
    code = wait(second)
    wait(first)
    return 0, code == 0 and "in use by process" not in said(folder)


def leftovers(folder, dice):
    """What an earlier version, or a dead process, may have left."""
    out = folder / "out"
    out.mkdir()
    for name in ("ckpt.pt.tmp", "ckpt.pt.123.tmp", "log.csv.4.tmp", ".lock", "loss.png"):
        (out / name).write_bytes(dice.randbytes(99))
    return 0, wait(start(folder, FLAGS)) != 0


def power_cut(folder, dice):
    """
    The run writes to a file system of its own. A copy of the block device beneath it, taken in the middle, is what a
    power cut leaves; it is mounted, which replays the file system's journal, and the run goes on from there.
    """
    disk, out, left = folder / "disk.img", folder / "out", folder / "left"
    with mounted(disk, out, new=True):
        pid = start(folder, FLAGS)
        until(folder, f"iter {dice.randrange(1, ITERS):6d} | loss", pid)
        time.sleep(dice.random() * 0.05)
        os.kill(pid, signal.SIGSTOP)  # the copy takes a moment, and an image must be of one moment
        shutil.copyfile(disk, folder / "cut.img")
        gone = lost(folder)
        os.kill(pid, signal.SIGKILL)
        wait(pid)
    with mounted(folder / "cut.img", out):
        shutil.copytree(out, left, ignore=shutil.ignore_patterns("lost+found"))
    out.rmdir()
    left.rename(out)
    rows = {row["iter"] for row in csv.DictReader(open(out / "log.csv"))} if (out / "log.csv").exists() else set()
    saved = torch.load(out / "ckpt.pt", weights_only=True)["iter_num"] if (out / "ckpt.pt").exists() else 0
    # every row up to the checkpoint must be there, and no more than one save may be missing
    return max(gone, lost(folder)), not {str(i) for i in range(saved + 1)} <= rows | {"0"} or lost(folder) > 2 * SAVES


@contextlib.contextmanager
def mounted(image, folder, new=False):
    """A file system in a file, mounted at `folder`."""
    if new:
        with open(image, "wb") as file:
            file.truncate(2**26)
        subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-o", "loop", image, folder], check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def why_no_power_cut(place):
    """Why this machine cannot take such images, or None."""
    try:
        with mounted(place / "try.img", place / "try", new=True):
            return None
    except (OSError, subprocess.CalledProcessError) as error:
        return f"needs root, mkfs.ext4 and loop devices ({type(error).__name__})"


def damaged(name, change):
    """A file of a finished half run is damaged: the resume must refuse it, or repair it, in words."""

    def fault(folder, dice):
        wait(start(folder, [*FLAGS, f"--max_iters={ITERS // 2}"]))
        path = folder / name
        content = bytearray(path.read_bytes())
        change(content, dice)
        path.write_bytes(content)
        code = wait(start(folder, ["--init_from=resume", f"--max_iters={ITERS}"]))
        silent = code == 0 and "note: " not in said(folder) and differing(EXPECTED, state(folder))
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


FAULTS = {
    "SIGKILL, anywhere": killed_anywhere,
    "SIGKILL, inside a save": killed_in_a_save,
    "SIGTERM": signalled(signal.SIGTERM),
    "SIGTERM twice in 50 ms": signalled(signal.SIGTERM, signal.SIGTERM),
    "Ctrl-C": signalled(signal.SIGINT),
    "SIGHUP": signalled(signal.SIGHUP),
    "SIGUSR1": signalled(signal.SIGUSR1),
    "power cut": power_cut,
    "disk full": disk_full,
    "two writers": two_writers,
    "leftovers": leftovers,
    "ckpt.pt, a bit flipped": damaged("out/ckpt.pt", flip),
    "ckpt.pt, 4 kB zeroed": damaged("out/ckpt.pt", zero),
    "ckpt.pt, truncated": damaged("out/ckpt.pt", cut),
    "ckpt.pt, replaced": damaged("out/ckpt.pt", replace),
    "log.csv, replaced": damaged("out/log.csv", replace),
    "train.bin, a bit flipped": damaged("data/text/train.bin", flip),
    "train.bin, truncated": damaged("data/text/train.bin", cut),
    "meta.json, replaced": damaged("data/text/meta.json", replace),
}


def torture(config, say=print):
    """Try every fault config.trials times; returns {fault: [trials, lost, differing, tracebacks, silent]}."""
    dice, table = random.Random(config.seed), {}
    say(f"{'fault':<28}{'trials':>8}{'lost':>8}{'differing':>11}{'tracebacks':>12}{'silent':>8}")
    with tempfile.TemporaryDirectory(prefix="torture.") as place:
        reference = Path(place) / "reference"
        prepare(reference)
        assert wait(start(reference, FLAGS)) == 0, said(reference)
        EXPECTED.update(state(reference))
        for name, fault in FAULTS.items():
            if fault is power_cut:  # slow and not for every machine, so the short form leaves it out
                why = "only with more than one trial" if config.trials == 1 else why_no_power_cut(Path(place))
                if why:
                    say(f"{name:<28} skipped: {why}")
                    continue
            row = table[name] = [0] * 5
            for trial in range(config.trials):
                folder = Path(place) / f"trial{trial}"
                prepare(folder)
                gone, silent = fault(folder, dice)
                code = resume(folder)
                row[0] += 1
                row[1] = max(row[1], gone)
                row[2] += differing(EXPECTED, state(folder)) if code == 0 else 1
                row[3] += "Traceback" in said(folder)
                row[4] += bool(silent)
                shutil.rmtree(folder)
            say(f"{name:<28}{row[0]:>8}{row[1]:>8}{row[2]:>11}{row[3]:>12}{row[4]:>8}")
    return table


if __name__ == "__main__":
    found = torture(configure(TortureConfig))
    sys.exit(any(any(row[2:]) for row in found.values()))
