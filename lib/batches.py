"""
Batches: an array of token ids goes in, blocks of it come out, in an order that is computed, not stored.

    x, y = get_blocks(data, first=0, count=4, block_size=256, seed=1337)    # (4, 256) each

A batch is a pure function of (seed, split, iteration). So a resume needs no saved state to see the next batch,
no two resumes see the same one, and any number of processes can share one global batch.
"""

import math

import numpy as np
import torch


def get_blocks(data, first, count, block_size, seed, mask=None):
    """
    Blocks first .. first + count - 1 of an endless stream of blocks: (x, y), int64, (count, block_size) each,
    where y is x one token later. Each epoch reads every block of `data` once, in its own shuffled order, with
    all blocks shifted by its own random offset.

    mask  one byte per id, for conversations. Then `data` is rows of block_size + 1 ids, each row is a block, and y is
          -1 (no loss) where the mask is 0.
    """
    n = max(1, (len(data) - block_size) // block_size)  # blocks in an epoch, whatever its offset
    stride, offsets = block_size, len(data) - n * block_size  # the first block may start anywhere, so every id is read
    if mask is not None:
        n, stride, offsets = len(data) // (block_size + 1), block_size + 1, 1
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


def permute(i, n, key):
    """
    Element i of a random permutation of range(n), computed rather than stored: a trillion blocks open as fast
    as ten. A Feistel network permutes range(4^k), the smallest that holds n; results >= n are permuted again
    (cycle walking).
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
    sum(numerators) / sum(denominators) over independent units, two arrays, and its standard error, to first order. With
    denominators of one: the mean and its usual standard error. NaN for the error of a single unit.
    """
    n, total = len(numerators), denominators.sum()
    if not total:
        return math.nan, math.nan
    value = numerators.sum() / total
    residuals = numerators - value * denominators
    return float(value), math.sqrt(n / (n - 1) * (residuals**2).sum()) / float(total) if n > 1 else math.nan
