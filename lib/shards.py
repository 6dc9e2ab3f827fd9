"""
A corpus of any size: an array of token ids in several files, read as if it were one.

    ids = Shards(["train_00000.bin", "train_00001.bin"])
    block = ids[99_999_000:100_001_000]         # (2000,) uint16: the end of one file, the start of the next
"""

import bisect
import hashlib
import itertools
import os
import sys

import numpy as np

# ---------------------------------------------------------------------------------------------
# Reading


class Shards:
    """
    The ids in several .bin files, one after another, as an array that can be sliced: (N,) uint16. A file is open only
    while a slice is read. So ten thousand of them open at once, and no limit on open files is met.
    """

    def __init__(self, paths):
        self.paths, stats = paths, [os.stat(path) for path in paths]
        self.times = [stat.st_mtime_ns for stat in stats]
        self.ends = list(itertools.accumulate(stat.st_size // 2 for stat in stats))

    def __len__(self):
        return self.ends[-1]

    def __getitem__(self, span):
        start, stop, _ = span.indices(len(self))
        parts = [np.empty(0, "<u2")]
        for i in range(bisect.bisect_right(self.ends, start), len(self.paths)):
            begin = self.ends[i - 1] if i else 0  # of this shard, in the whole
            if begin >= stop:
                break
            first, last = max(start, begin), min(stop, self.ends[i])
            parts.append(self.read(i, first - begin, max(0, last - first)))
        return np.concatenate(parts)

    def read(self, i, offset, count):
        """`count` ids of shard i, from its number `offset` on: (count,) uint16."""
        path, problem = self.paths[i], "it has changed"
        try:
            with open(path, "rb") as file:
                if os.fstat(file.fileno()).st_mtime_ns == self.times[i]:
                    file.seek(2 * offset)
                    return np.frombuffer(file.read(2 * count), "<u2")
        except OSError as error:
            problem = error.strerror
        sys.exit(f"error: {path}: cannot be read any more, {problem}: put the dataset back as it was, then resume")


def shards_of(counts, split):
    """The files of a split as [{"file", "tokens", "sha256"}]. counts: what meta.json says of the split."""
    whole = {"file": f"{split}.bin", "tokens": counts["tokens"], "sha256": counts["sha256"]}
    return counts.get("shards", [whole])


def sha256_of_shards(shards):
    """The sha256 of a split: that of its shards' sha256s, in order and in hexadecimal."""
    return hashlib.sha256("".join(shard["sha256"] for shard in shards).encode()).hexdigest()
