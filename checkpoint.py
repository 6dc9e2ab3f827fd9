"""
ckpt.pt: one dict, written whole or not at all, read without running anything in it.

    checkpoint = read_checkpoint("out/ckpt.pt")      # tensors and plain values, on the CPU
    model = checkpoint_model(checkpoint)             # the network in it
    write_checkpoint("out/ckpt.pt", checkpoint)

Its keys: model, optimizer, scheduler (state dicts), iter_num (updates done), best_val_loss, config (every
setting, resolved, by name) and data (the sha256 of train.bin and val.bin).
"""

import os
import sys
from dataclasses import fields
from pathlib import Path

import torch

from model import ModelConfig, SmolLM2

KEYS = {"model", "optimizer", "scheduler", "iter_num", "best_val_loss", "config", "data"}


def read_checkpoint(path, mmap=False):
    """
    The dict in `path`, on the CPU (a GPU may have no room for a second copy). mmap=True leaves the tensors
    on the disk until they are used. Ends the program with one line if it is missing, damaged, or another's.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        sys.exit(f"error: there is no checkpoint {path}: train from scratch first, or give the --out_dir of a run")
    except Exception as error:  # torch.load has many ways to say that a file is truncated, corrupt or hostile
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        sys.exit(f"error: {path} is not a whole checkpoint ({reason}): take an earlier one, or train from scratch")
    missing = KEYS - set(checkpoint if isinstance(checkpoint, dict) else ())
    if missing:
        sys.exit(f"error: {path} is not a checkpoint of train.py: it lacks {', '.join(sorted(missing))}")
    return checkpoint


def checkpoint_model(checkpoint):
    """SmolLM2, on the CPU, with the shape and the weights that the checkpoint holds."""
    shape = {field.name: checkpoint["config"][field.name] for field in fields(ModelConfig)}
    model = SmolLM2(ModelConfig(**shape))
    model.load_state_dict(checkpoint["model"])
    return model


def write_checkpoint(path, checkpoint):
    """Write beside `path`, flush to the disk, rename over it: at every moment a whole checkpoint is there."""
    path = Path(path)
    unfinished = path.with_name(path.name + ".tmp")
    torch.serialization.set_crc32_options(False)  # sums that torch.load does not check: as long again as the writing
    try:
        with open(unfinished, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except (OSError, RuntimeError) as error:  # a full disk comes as either
        unfinished.unlink(missing_ok=True)
        reason = str(error).splitlines()[0]
        sys.exit(f"error: {path} could not be written ({reason}): the one before it is untouched; free some disk")
