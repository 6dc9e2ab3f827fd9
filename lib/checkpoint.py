"""
ckpt.pt: one dict, written atomically, read without running any code in it, with a CRC of every tensor.

    checkpoint = read_checkpoint("out/ckpt.pt")      # tensors and plain values, on the CPU
    write_checkpoint("out/ckpt.pt", checkpoint)

Its keys:
    model, optimizer, scheduler   state dicts
    iter_num                      updates done
    sequences_read                of train.bin: the next batch begins there, also if the batch size was changed
    losses                        of the iterations since the last log line, which shows their mean
    best_val_loss                 lowest validation loss so far
    config                        every setting, resolved, by name
    data                          sha256 of train.bin and val.bin
    chat                          whether the model was trained on conversations, so that a text ends with <|im_end|>
    machine                       matmul precision, number of threads and of processes: the last bits depend on them
    version                       of this layout
best.pt (train.py --save_best=True) has no optimizer and no scheduler: weights to use, not a run to resume.
"""

import os
import pickle
import shlex
import sys
import zipfile

import torch

from lib.errors import first_line, usable, write_hint
from lib.files import written_whole

VERSION = 3  # 1 had its own checksums, 2 no sequences_read
HINT = "take an earlier copy, or train again"
WEIGHTS = {"model", "iter_num", "config", "best_val_loss", "data", "chat", "machine"}  # in every checkpoint
RUN = WEIGHTS | {"optimizer", "scheduler", "sequences_read", "losses"}  # what a resume needs


def read_checkpoint(path, mmap=False, resume=True):
    """
    Return the dict in `path`, on the CPU, because a GPU may have no room for a second copy. mmap=True leaves the
    tensors on the disk, unread and unchecked, until they are used. resume=False asks for weights alone. End the program
    with one line if the file is missing, damaged, of another version, or lacks what was asked for.
    """
    if not os.path.isfile(path):
        sys.exit(f"error: there is no checkpoint {path}: train first, or give the --out_dir of a run that saved one")
    checkpoint = load_saved(path, mmap)
    with usable(path, HINT):
        if checkpoint["version"] != VERSION:
            raise ValueError(f"it has layout {checkpoint['version']}, and this code reads layout {VERSION}")
        missing = (RUN if resume else WEIGHTS) - checkpoint.keys()
        if missing and missing <= RUN - WEIGHTS:
            flag = f"--init_from={shlex.quote(str(path))}"
            sys.exit(f"error: {path} has no optimizer: begin a new run with its weights, {flag}")
        if missing:
            raise KeyError(", ".join(sorted(missing)))
    if not mmap:
        check_crc(path)
    return checkpoint


def load_saved(path, mmap=True):
    """Return what is in a torch.save file, on the CPU. No code that the file may hold is run."""
    with usable(path, HINT):
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        except pickle.UnpicklingError:  # torch's message advises to run the file
            raise ValueError("it is damaged, or holds more than tensors and plain values and could run code") from None


def check_crc(path):
    """End the program with one line if a tensor or a plain value in `path` is not as torch.save wrote it."""
    with usable(path, HINT), zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise ValueError(f"its record {damaged} is damaged, the CRC differs")


def write_checkpoint(path, checkpoint):
    """Write the dict to `path` atomically. End the program with one line if it cannot be written."""
    try:
        with written_whole(path) as file:
            torch.save(checkpoint | dict(version=VERSION), file)
    except (OSError, RuntimeError) as error:
        # torch turns a failed write into a RuntimeError of its own; the cause is in its context
        cause = error if isinstance(error, OSError) else error.__context__ or error.__cause__
        hint = write_hint(cause) if isinstance(cause, OSError) else "see whether the disk is full"
        reason = getattr(cause, "strerror", None) or first_line(error)
        sys.exit(f"error: {path} could not be written ({reason}), the one before it is untouched: {hint}")


def refuse_earlier_run(out_dir, overwrite):
    """End the program with one line if out_dir holds an earlier run that a new one may not replace."""
    if (out_dir / "ckpt.pt").exists() and not overwrite:
        quoted = shlex.quote(str(out_dir))
        sys.exit(
            f"error: {out_dir}/ckpt.pt holds an earlier run: to continue it, --init_from=resume --out_dir={quoted}; "
            "to start over and lose it, --overwrite=True; to keep it, another --out_dir"
        )


def remove_earlier_run(out_dir):
    """Remove the files of an earlier run, because a new one begins."""
    for name in ("ckpt.pt", "best.pt", "log.csv", "loss.png"):
        (out_dir / name).unlink(missing_ok=True)
