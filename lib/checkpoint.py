"""
ckpt.pt: one dict, written whole or not at all, read without running any code in it.

    checkpoint = read_checkpoint("out/ckpt.pt")      # tensors and plain values, on the CPU
    write_checkpoint("out/ckpt.pt", checkpoint)

Its keys:
    model, optimizer, scheduler   state dicts
    iter_num                      updates done
    best_val_loss                 lowest validation loss so far
    config                        every setting, resolved, by name
    data                          sha256 of train.bin and val.bin
    tokenizer                     which tokenizer made them: its --official= source and its sha256
    version                       of this layout
best.pt (train.py --save_best=True) has no optimizer and no scheduler: weights to use, not a run to resume.
"""

import math
import os
import sys

import torch

from lib.errors import first_line
from lib.files import written_whole

VERSION = 1  # raise it when a reader of today would misunderstand the file
WEIGHTS = {"model", "iter_num", "config"}  # what every checkpoint must hold
RUN = WEIGHTS | {"optimizer", "scheduler", "data"}  # what a resume needs besides
DEFAULTS = {  # keys that came later, and what their absence in an older file means
    "version": 1,
    "best_val_loss": math.inf,
    "tokenizer": {"official": "base", "sha256": None},
}
RENAMED = {"checkpoint_blocks": "activation_checkpointing"}  # settings: old name, new name


def read_checkpoint(path, mmap=False, resume=True):
    """
    The dict in `path`, on the CPU, because a GPU may have no room for a second copy. mmap=True leaves the tensors
    on the disk until they are used. resume=False asks for weights alone. Ends the program with one line if the
    file is missing, damaged, from a newer version, or lacks what was asked for.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        sys.exit(f"error: there is no checkpoint {path}: train from scratch first, or give the --out_dir of a run")
    except Exception as error:  # torch.load has many ways to say that a file is truncated, corrupt or hostile
        sys.exit(
            f"error: {path} is not a whole checkpoint ({first_line(error)}): take an earlier one, or train from scratch"
        )
    missing = (RUN if resume else WEIGHTS) - set(checkpoint if isinstance(checkpoint, dict) else ())
    if missing:
        lacks = f"error: {path} lacks {', '.join(sorted(missing))}"
        if missing.isdisjoint(WEIGHTS):
            sys.exit(f"{lacks}: it cannot be resumed, but --init_from={path} begins a new run with its weights")
        sys.exit(f"{lacks}: it is not a checkpoint of train.py")
    checkpoint = DEFAULTS | checkpoint
    if checkpoint["version"] > VERSION:
        known = f"this code reads up to {VERSION}"
        sys.exit(f"error: {path} has layout version {checkpoint['version']}, {known}: update this repository")
    if isinstance(checkpoint["config"], dict):
        checkpoint["config"] = {RENAMED.get(name, name): value for name, value in checkpoint["config"].items()}
    return checkpoint


def write_checkpoint(path, checkpoint):
    """Write the dict to `path`, whole or not at all. Ends the program with one line if it cannot be written."""
    torch.serialization.set_crc32_options(False)  # torch.load never checks them, and they double the writing time
    try:
        with written_whole(path) as file:
            torch.save(checkpoint | dict(version=VERSION), file)
    except (OSError, RuntimeError) as error:  # a full disk comes as either
        sys.exit(
            f"error: {path} could not be written ({first_line(error)}): the one before it is untouched; free some disk"
        )


def keep_earlier_run(out_dir, say):
    """Rename the checkpoint and log of an earlier run, so that a repeated command does not lose it."""
    if not (out_dir / "ckpt.pt").exists():
        return
    for path in (out_dir / "ckpt.pt", out_dir / "log.csv"):
        if path.exists():
            os.replace(path, path.with_stem(path.stem + ".previous"))
    say(f"{out_dir}/ckpt.pt of an earlier run is kept as {out_dir}/ckpt.previous.pt")
