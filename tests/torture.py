"""
Faults go in, a table comes out: what does train.py lose, get wrong, or answer with a traceback?

    python tests/torture.py                  # every fault many times: about an hour; make torture
    python tests/torture.py --trials=3       # a short form, as make test runs it

Every trial trains a tiny network in a child forked from this process, which has imported train.py once. The child
dies or is disturbed; then the run is resumed until it ends. It must end where the undisturbed run ends: the same bits
in weights, moments and scheduler, the same rows in log.csv. Then files are spoilt at random, and each is read in a
child. It must give what the sound file gives, or be refused in one line. The columns of the table:

    trials       how many; of spoilt files, eight times as many
    lost         most iterations that were done but not saved; a SIGKILL may lose those since the last save
    differing    numbers in ckpt.pt, or rows of log.csv, that differ from the undisturbed run
    tracebacks   children that printed one, crashed, took a minute or needed 4 GB
    silent       a damaged file that was used, or a death without the line that says why

A format without checksums cannot tell a changed value from a meant one. How often that came up, its row says in words.
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
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a fork keeps one thread only
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

torch.optim.AdamW([torch.zeros(1, requires_grad=True)], fused=True)  # imports what every child would import again

import train  # noqa: E402

train.plot_log = lambda *_: None  # a picture takes longer than the iterations between two

from networks import write_gguf  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from spoil import SMALL_TOKENIZER, spoil  # noqa: E402

from configurator import configure  # noqa: E402
from lib import tokenizer  # noqa: E402
from lib.checkpoint import leaves, read_checkpoint  # noqa: E402
from lib.dataset import open_data  # noqa: E402
from lib.log import open_log, read_log  # noqa: E402
from lib.weights import config_to_json, find_weights, load_network  # noqa: E402
from model import ModelConfig, SmolLM2  # noqa: E402

ITERS, SAVES = 40, 10  # iterations in a run, and between saves
EXPECTED = {}  # number of processes: the state() of the undisturbed run
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


def fork(folder, work):
    """Fork a child that calls work() in `folder`, its output in folder/said; returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.chdir(folder)
        said = os.open("said", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(said, 1)
        os.dup2(said, 2)
        work()
        code = 0
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


def start(folder, flags, slow_save=None, environment=()):
    """
    Start a child that runs train.py in `folder`. slow_save: a pipe's end to which the child writes a byte when a save
    begins; the save then takes 20 ms more, to be killed in. environment: variables to set.
    """

    def work():
        os.environ.update(environment)
        if slow_save is not None:
            save = torch.save

            def slow(checkpoint, file):
                os.write(slow_save, b"s")
                save(checkpoint, file)
                file.flush()
                time.sleep(0.02)

            torch.save = slow
        train.main(configure(train.TrainConfig, flags, saved=train.saved_settings))

    return fork(folder, work)


def start_processes(folder, flags, processes):
    """Start one run, shared by that many children as torchrun would start them; returns their process ids."""
    if processes == 1:
        return [start(folder, flags)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = dict(WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    ranks = [dict(RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(processes)]
    return [start(folder, flags, environment=shared | rank) for rank in ranks]


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


def resume(folder, processes=1):
    """Resume until the run is at its end; from the beginning if it never saved. Returns whether it got there."""
    for _ in range(5):
        flags = ["--init_from=resume"] if (folder / "out/ckpt.pt").exists() else [*FLAGS, "--overwrite=True"]
        if not any([wait(pid) for pid in start_processes(folder, flags, processes)]):
            return True
    return False


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
        found |= {f"row {i}": tuple(row[:6]) for i, row in enumerate(csv.reader(file))}
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


def killed_rank(folder, dice):
    """Kill one of two processes. The other must end with the line that tells how to go on."""
    pids = start_processes(folder, FLAGS, 2)
    until(folder, f"iter {dice.randrange(1, ITERS - 5):6d} | loss", pids[0])
    time.sleep(dice.random() * 0.02)
    dice.shuffle(pids)
    os.kill(pids[0], signal.SIGKILL)
    wait(pids[0])
    ended = wait(pids[1]) == 0  # before the signal came
    errors = [line for line in said(folder).splitlines() if line.startswith("error: ")]
    return lost(folder), not ended and (len(errors) != 1 or "--init_from=resume --out_dir=out" not in errors[0])


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
        silent = code == 0 and "note: " not in said(folder) and differing(EXPECTED[1], state(folder))
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
    "SIGKILL, one of two ranks": killed_rank,
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


# ---- Spoilt files. Each reader returns {name: value} of what a script takes from the sound file.


def sound_files(folder):
    """A file of each kind in `folder`. The checkpoint, the log and the data are those of the undisturbed run there."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=16)
    network = SmolLM2(ModelConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64))
    write_gguf(folder / "net.gguf", network)
    (folder / "net").mkdir()
    (folder / "net/config.json").write_text(json.dumps(config_to_json(network.config, attention_dropout=0.0)))
    (folder / "net/tokenizer.json").write_text(json.dumps(SMALL_TOKENIZER))
    save_file(network.state_dict(), folder / "net/model.safetensors")
    shutil.copyfile(ROOT / "config/nano.py", folder / "nano.py")


def read_network(path):
    network = load_network(find_weights(str(path)))
    return network.state_dict() | asdict(network.config)


def read_tokenizer(path):
    tokenizer.PARTS = tokenizer.deciding_parts(SMALL_TOKENIZER)  # the release's takes a hundred times longer to read
    encoding = tokenizer.load_tokenizer(str(path.parent))
    return encoding._mergeable_ranks | encoding._special_tokens


def read_dataset(path):
    train, val, meta = open_data("text", 300, 32, path.parent.parent)
    figures = {(split, name): meta[split][name] for split in ("train", "val") for name in ("tokens", "bytes", "sha256")}
    return figures | dict(train=train.ids.tobytes(), val=val.ids.tobytes())


def read_rows(path):
    open_log(path, ITERS, 1, print)
    return dict(enumerate(tuple(row.items()) for row in read_log(path)))


TEXT = "text has no checksums"
SPOILT = {  # file: (its reader, why another value in it may go unnoticed)
    "out/ckpt.pt": (lambda path: leaves(read_checkpoint(path)), None),
    "out/log.csv": (read_rows, TEXT),
    "data/text/train.bin": (read_dataset, None),
    "data/text/meta.json": (read_dataset, TEXT),
    "net/config.json": (lambda path: read_network(path.parent), TEXT),
    "net/model.safetensors": (lambda path: read_network(path.parent), "safetensors has no checksums"),
    "net/tokenizer.json": (read_tokenizer, None),
    "net.gguf": (read_network, "GGUF has no checksums"),
    "nano.py": (lambda path: asdict(configure(train.TrainConfig, [str(path)])), TEXT),
}
OTHER = 3  # the exit code of a child that read something else than the sound file holds, and was not told


def spoilt(content, dice):
    """The content, changed: half the time near its beginning or in a token of its text, else anywhere."""
    if dice.randrange(2):
        return spoil(content, dice)
    content = bytearray(content)
    dice.choice([flip, zero, cut])(content, dice)
    return bytes(content)


def read_spoilt(folder, name, read, expected, content):
    """Read a file of that content in a child: "same" (or told in a note), "refused", "other" or "traceback"."""
    (folder / "said").unlink(missing_ok=True)
    (folder / name).write_bytes(content)

    def work():
        signal.alarm(60)
        resource.setrlimit(resource.RLIMIT_DATA, (2**32, 2**32))
        sys.exit(OTHER if differing(expected, read(Path(name))) else 0)

    code = wait(fork(folder, work))
    lines = said(folder).splitlines()
    if code == 0 or code == OTHER and any(line.startswith("note: ") for line in lines):
        return "same"
    if code == OTHER:
        return "other"
    return "refused" if code in (1, 2) and len(lines) == 1 and lines[0].startswith("error: ") else "traceback"


def spoil_files(sound, trials, dice, say):
    """Read 8 * trials spoilt files of each kind. Returns rows as torture() does."""
    table = {}
    sound_files(sound)
    for name, (read, why_not) in SPOILT.items():
        content, expected = (sound / name).read_bytes(), read(sound / name)
        found = Counter(read_spoilt(sound, name, read, expected, spoilt(content, dice)) for _ in range(8 * trials))
        (sound / name).write_bytes(content)
        row = [found.total(), 0, 0, found["traceback"], 0 if why_not else found["other"]]
        note = f"   {found['other']} read with another value: {why_not}" if why_not and found["other"] else ""
        table[f"{Path(name).name}, spoilt"] = row
        say(table_row(f"{Path(name).name}, spoilt", row) + note)
    return table


def table_row(name, row):
    return f"{name:<28}{row[0]:>8}{row[1]:>8}{row[2]:>11}{row[3]:>12}{row[4]:>8}"


def torture(config, say=print):
    """Try every fault config.trials times; returns {fault: [trials, lost, differing, tracebacks, silent]}."""
    dice, table = random.Random(config.seed), {}
    say(table_row("fault", ("trials", "lost", "differing", "tracebacks", "silent")))
    with tempfile.TemporaryDirectory(prefix="torture.") as place:
        for processes in (1, 2):
            folder = Path(place) / f"reference{processes}"
            prepare(folder)
            assert resume(folder, processes), said(folder)
            EXPECTED[processes] = state(folder)
        for name, fault in FAULTS.items():
            if fault is power_cut:  # slow and not for every machine, so the short form leaves it out
                why = "only with more than one trial" if config.trials == 1 else why_no_power_cut(Path(place))
                if why:
                    say(f"{name:<28} skipped: {why}")
                    continue
            row, processes = [0] * 5, 2 if fault is killed_rank else 1
            table[name] = row
            for trial in range(config.trials):
                folder = Path(place) / f"trial{trial}"
                prepare(folder)
                gone, silent = fault(folder, dice)
                at_end = resume(folder, processes)
                row[0] += 1
                row[1] = max(row[1], gone)
                row[2] += differing(EXPECTED[processes], state(folder)) if at_end else 1
                row[3] += "Traceback" in said(folder)
                row[4] += bool(silent)
                shutil.rmtree(folder)
            say(table_row(name, row))
        return table | spoil_files(Path(place) / "reference1", config.trials, dice, say)


if __name__ == "__main__":
    found = torture(configure(TortureConfig))
    sys.exit(any(any(row[2:]) for row in found.values()))
