"""
Batches: data/<dataset>/ goes in, blocks of token ids come out, in an order that nobody has to remember.

    train_data, val_data, meta = open_data("python", vocab_size=49_152, block_size=256)
    x, y = get_blocks(train_data, first=0, count=4, block_size=256, seed=1337)    # (4, 256) each

A batch is a pure function of (seed, split, iteration). So a resume needs no state to see the next batch, no
two resumes see the same one, and any number of processes share one global batch.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

from official import checked


def open_data(dataset, vocab_size, block_size):
    """
    data/<dataset>/ as (train, val, meta): two memory-mapped arrays of uint16 and the dict in meta.json.
    Ends the program with one line if they disagree, or hold less than one block, or ids beyond vocab_size.
    """
    folder = Path("data") / dataset
    way_out = f"run python prepare_data.py --dataset={dataset}"
    try:
        meta = json.loads((folder / "meta.json").read_text())
        sizes = {split: (folder / f"{split}.bin").stat().st_size for split in ("train", "val")}
    except FileNotFoundError as error:
        sys.exit(f"error: {error.filename} does not exist: {way_out}")
    except (ValueError, NotADirectoryError) as error:
        sys.exit(f"error: {folder / 'meta.json'} cannot be read ({error}): {way_out}")
    if meta.get("dtype") != "uint16" or meta.get("vocab_size", 0) > vocab_size:
        said = f"dtype {meta.get('dtype')} and vocab_size {meta.get('vocab_size')}"
        sys.exit(f"error: {folder}/meta.json has {said}, not uint16 and at most {vocab_size}: {way_out}")
    arrays = []
    for split, size in sizes.items():
        path = folder / f"{split}.bin"
        if size != 2 * meta[split]["tokens"]:
            sys.exit(f"error: {path} holds {size} bytes, not 2 for each of {meta[split]['tokens']} tokens: {way_out}")
        if size < 2**30 and checked(path)[0] != meta[split]["sha256"]:  # a second or so; larger files are trusted
            sys.exit(f"error: {path} does not have the sha256 that meta.json gives: {way_out}")
        if size < 2 * (block_size + 1):
            sys.exit(
                f"error: {path} holds {size // 2} tokens, fewer than one block of {block_size} + 1: "
                "lower block_size, or prepare more text"
            )
        arrays.append(np.memmap(path, dtype="<u2", mode="r"))
    return *arrays, meta


def mix(*numbers):
    """Integers -> a well stirred 64-bit integer (splitmix64)."""
    h, all_ones = 0, 2**64 - 1
    for number in numbers:
        h = h + number + 0x9E3779B97F4A7C15 & all_ones
        h = (h ^ h >> 30) * 0xBF58476D1CE4E5B9 & all_ones
        h = (h ^ h >> 27) * 0x94D049BB133111EB & all_ones
        h ^= h >> 31
    return h


def permute(i, n, key):
    """
    The i-th of range(n) in a shuffled order, computed rather than stored: a trillion blocks cost no more
    than ten. A Feistel network shuffles the next power of four; what lands beyond n goes in again.
    """
    bits = max(1, ((n - 1).bit_length() + 1) // 2)
    while True:
        left, right = i >> bits, i & (1 << bits) - 1
        for turn in range(6):
            left, right = right, left ^ mix(key, turn, right) & (1 << bits) - 1
        i = left << bits | right
        if i < n:
            return i


def get_blocks(data, first, count, block_size, seed):
    """
    Blocks first .. first + count - 1 of an endless stream of blocks: (x, y), int64, (count, block_size)
    each, y one token ahead of x. An epoch reads each block of `data` once, in an order of its own, all of
    them shifted by an offset of its own.
    """
    n = max(1, (len(data) - block_size) // block_size)  # blocks in an epoch, whatever its offset
    offsets = len(data) - n * block_size  # where the first of them may start: every token is reached
    rows = []
    for index in range(first, first + count):
        epoch, i = divmod(index, n)
        key = mix(seed, epoch)
        start = key % offsets + permute(i, n, key) * block_size
        rows.append(data[start : start + block_size + 1])
    rows = torch.from_numpy(np.stack(rows).astype(np.int64))  # (count, T + 1)
    return rows[:, :-1], rows[:, 1:]
