"""
Cut an array of token ids into blocks, in a shuffled order that is computed, not stored.

    x, y = get_blocks(data, first=0, count=4, block_size=256, seed=1337)    # (4, 256) each

- A block is a pure function of (seed, its number), so a resume repeats no block and skips none.
- Each epoch reads every block once, in a new order. The block boundaries shift by a random offset per epoch:
  epoch 0 may read blocks 3, 0, 2, 1, and epoch 1 blocks 1, 3, 0, 2, each 17 tokens further on.
- Any number of processes can share one batch: each reads its own block numbers.
"""

import math

import numpy as np
import torch


def get_blocks(data, first, count, block_size, seed, mask=None):
    """
    Return blocks first .. first + count - 1 of an endless stream of blocks as (x, y), int64, (count, block_size) each,
    where y is x one token later.

    mask  one byte per id, for conversations. Then `data` is rows of block_size + 1 ids, each row is a block, and y is
          -1 (no loss) if the mask is 0.
    """
    if mask is None:
        n = max(1, (len(data) - block_size) // block_size)  # blocks per epoch, whatever the offset
        stride = block_size
        offsets = len(data) - n * block_size  # possible starts of the first block: so the last ids are read as well
    else:
        n = len(data) // (block_size + 1)
        stride = block_size + 1
        offsets = 1
    starts = []
    for index in range(first, first + count):
        epoch, i = divmod(index, n)
        key = mix(seed, epoch)
        starts.append(key % offsets + permute(i, n, key) * stride)

    def rows(array):
        return torch.from_numpy(np.stack([array[start : start + block_size + 1] for start in starts]).astype(np.int64))

    ids = rows(data)  # (count, T + 1)
    x, y = ids[:, :-1], ids[:, 1:]
    return x, y if mask is None else y.masked_fill(rows(mask)[:, 1:] == 0, -1)


def get_batch(split, first, count, config, device):
    """Return blocks first .. first + count - 1 of a Split (lib/dataset.py), as get_blocks(), on the device."""
    x, y = get_blocks(split.ids, first, count, config.block_size, mix(config.seed, split.number), split.mask)
    if device.startswith("cuda"):  # from pinned memory, the copy runs while the CPU continues
        x, y = x.contiguous().pin_memory(), y.contiguous().pin_memory()
    return x.to(device, non_blocking=True), y.to(device, non_blocking=True)


def count_targets(y):
    """Return how many of the targets count in the loss: a float tensor (), on their device."""
    return (y >= 0).sum().float()


def permute(i, n, key):
    """
    Return element i of a random permutation of range(n). A Feistel cipher permutes range(4^k), the smallest that holds
    n; results >= n are permuted again (cycle walking).
    """
    bits = max(1, ((n - 1).bit_length() + 1) // 2)
    while True:
        left, right = i >> bits, i & (1 << bits) - 1
        for turn in range(6):
            left, right = right, left ^ mix(key, turn, right) & (1 << bits) - 1
        i = left << bits | right
        if i < n:
            return i


def mix(*numbers):
    """Hash integers to one 64-bit integer (splitmix64)."""
    h, all_ones = 0, 2**64 - 1
    for number in numbers:
        h = h + number + 0x9E3779B97F4A7C15 & all_ones
        h = (h ^ h >> 30) * 0xBF58476D1CE4E5B9 & all_ones
        h = (h ^ h >> 27) * 0x94D049BB133111EB & all_ones
        h ^= h >> 31
    return h


def ratio(numerators, denominators):
    """
    Return sum(numerators) / sum(denominators) over independent units, two arrays, and its standard error, to first
    order. With denominators of one: the mean and its usual standard error. The error of a single unit is NaN.
    """
    n, total = len(numerators), denominators.sum()
    if not total:
        return math.nan, math.nan
    value = numerators.sum() / total
    residuals = numerators - value * denominators
    return float(value), math.sqrt(n / (n - 1) * (residuals**2).sum()) / float(total) if n > 1 else math.nan
