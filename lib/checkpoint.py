"""
Read and write ckpt.pt: one dict, written atomically, loaded without running any code, with a CRC of every tensor.

    checkpoint = read_checkpoint("out/ckpt.pt")      # tensors and plain values, on the CPU
    write_checkpoint("out/ckpt.pt", checkpoint)

Its keys:
    model, optimizer, scheduler   state dicts
    iter_num                      updates done
    sequences_read                of train.bin: the next batch begins there, even if the batch size changes
    losses                        of the iterations since the last log line, which shows their mean
    best_val_loss                 lowest validation loss so far
    config                        every setting, resolved, by name
    data                          sha256 of train.bin and val.bin
    chat                          whether the model was trained on conversations, which end with <|im_end|>
    machine                       matmul precision, number of threads and of processes: the last bits depend on them
    version                       of this layout
best.pt (train.py --save_best=True) has no optimizer and no scheduler: it has weights to use, not a run to resume.
"""

import os
import pickle
import shlex
import sys
import zipfile

import torch

from lib.errors import check, first_line, suggest_fix, usable
from lib.files import write_atomically

VERSION = 3  # 1 had its own checksums, 2 no sequences_read
HINT = "use an earlier copy, or train again"
WEIGHT_KEYS = {"model", "iter_num", "config", "best_val_loss", "data", "chat", "machine"}  # in every checkpoint
RESUME_KEYS = WEIGHT_KEYS | {"optimizer", "scheduler", "sequences_read", "losses"}


def read_checkpoint(path, mmap=False, resume=True):
    """
    Return the dict in `path`, on the CPU, because a GPU may not have space for a second copy. Exit if it is missing,
    damaged or incomplete (resume=False: weights will do). mmap=True leaves tensors on disk, unchecked, until used.
    """
    hint = "train first, or pass the --out_dir of a run that saved one"
    check(os.path.isfile(path), f"there is no checkpoint {path}: {hint}")
    checkpoint = load_saved(path, mmap)
    with usable(path, HINT):
        if checkpoint["version"] != VERSION:
            raise ValueError(f"it has layout {checkpoint['version']}, and this code reads layout {VERSION}")
        if missing := WEIGHT_KEYS - checkpoint.keys():
            raise KeyError(", ".join(sorted(missing)))
    complete = not resume or checkpoint.keys() >= RESUME_KEYS
    flag = f"--init_from={shlex.quote(str(path))}"
    check(complete, f"{path} has no optimizer: begin a new run with its weights, {flag}")
    if not mmap:
        check_crc(path)
    return checkpoint


def load_saved(path, mmap=True):
    """Return the contents of a torch.save file, on the CPU, without running any code in it."""
    with usable(path, HINT):
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        except pickle.UnpicklingError:  # torch's own message suggests running the file
            raise ValueError("it is damaged, or holds more than tensors and plain values and could run code") from None


def check_crc(path):
    """Exit if a tensor or a plain value in `path` has changed since torch.save wrote it."""
    with usable(path, HINT), zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise ValueError(f"its record {damaged} is damaged, the CRC differs")


def write_checkpoint(path, checkpoint):
    """Write the dict to `path` atomically. Exit if that fails."""
    try:
        with write_atomically(path) as file:
            torch.save(checkpoint | dict(version=VERSION), file)
    except (OSError, RuntimeError) as error:
        # torch turns a failed write into a RuntimeError, with the cause in its context
        cause = error if isinstance(error, OSError) else error.__context__ or error.__cause__
        hint = suggest_fix(cause) if isinstance(cause, OSError) else "check whether disk space ran out"
        reason = getattr(cause, "strerror", None) or first_line(error)
        sys.exit(f"error: {path} could not be written ({reason}), the earlier one is untouched: {hint}")


def refuse_earlier_run(out_dir, overwrite):
    """Exit if out_dir holds an earlier run and `overwrite` is False."""
    choices = f"to continue it, --init_from=resume --out_dir={shlex.quote(str(out_dir))}; "
    choices += "to start over and lose it, --overwrite=True; to keep it, a different --out_dir"
    free = overwrite or not (out_dir / "ckpt.pt").exists()
    check(free, f"{out_dir}/ckpt.pt holds an earlier run: {choices}")


def remove_earlier_run(out_dir):
    """Remove the files of an earlier run, because a new one begins."""
    for name in ("ckpt.pt", "best.pt", "log.csv", "loss.png", "resume.png"):
        (out_dir / name).unlink(missing_ok=True)
