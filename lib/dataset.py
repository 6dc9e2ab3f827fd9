"""
Open data/<dataset>/, as written by prepare_data.py.

    train_data, val_data, meta = open_data("python", vocab_size=49_152, block_size=256)
    counts = read_tokenized(files, encoding, val_fraction=0.1)      # datatrove's .ds files, as parts of meta.json

train.bin and val.bin are flat arrays of little-endian uint16 token ids. Each document ends with <|endoftext|>, id 0.
Conversations are rows of block_size + 1 ids, and train_mask.bin and val_mask.bin have a byte for each id: 1 if it is to
be learned (the assistant's words), 0 if it is only read. A split may also be several files, read as one array.

The keys of meta.json:
    name                 of the dataset
    dtype, vocab_size    "uint16", and every id is below vocab_size
    tokenizer_sha256     of tokenizer.json
    sources              the origin of the text, a sha256 of all documents, counts of documents
    train, val           tokens, bytes of text, documents, sha256
                         for several files: shards, a list of their path ("file"), tokens and sha256. The split's own
                         sha256 is that of their hexadecimal sha256s, joined.
                         for conversations: loss_tokens (ones in the mask; `bytes` counts only these), mask_sha256
    block_size           conversations only: a row is one id longer
"""

import hashlib
import json
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from lib.errors import check, usable
from lib.files import sha256_of
from lib.tokenizer import END_OF_TEXT, VOCAB_SIZE, encode, token_sizes

MAX_FULL_CHECK = 2**30  # bytes: of a larger split only the file sizes are checked, because hashing takes seconds


class Split(NamedTuple):
    """One split of a dataset: a memory-mapped file, or several files as Shards, which can only be sliced."""

    ids: np.ndarray  # (N,) uint16
    mask: np.ndarray | None  # (N,) uint8: 1 for an id to be learned; None if all are
    number: int  # 0 for train, 1 for val: each has its own order of blocks


class Shards:
    """Several files of ids as one array, (N,) uint16. They are opened only to be read: there may be thousands."""

    def __init__(self, paths):
        self.paths = paths
        self.starts = np.cumsum([0, *(path.stat().st_size // 2 for path in paths)])

    def __len__(self):
        return int(self.starts[-1])

    def __getitem__(self, span):
        start, stop, _ = span.indices(len(self))
        parts = [np.empty(0, "<u2")]
        while start < stop:
            i = int(np.searchsorted(self.starts, start, side="right")) - 1
            count = min(stop, int(self.starts[i + 1])) - start
            with usable(self.paths[i], "put the dataset back as it was, then resume"):
                part = np.fromfile(self.paths[i], "<u2", count, offset=2 * (start - int(self.starts[i])))
                if len(part) < count:
                    raise ValueError("it has become shorter")
            parts.append(part)
            start += count
        return np.concatenate(parts)


def open_data(dataset, vocab_size, block_size, data_dir="data"):
    """Open data/<dataset>/ as (train, val, meta). Exits if it is damaged or does not fit; block_size=None fits all."""
    folder = Path(data_dir) / dataset
    built_in = dataset in ("python", "python_chat", "shakespeare")
    hint = f"run python prepare_data.py --dataset={dataset if built_in else f'TEXT --name={shlex.quote(dataset)}'}"
    check((folder / "meta.json").is_file(), f"{folder}/meta.json does not exist: {hint}")
    with usable(folder / "meta.json", hint):
        meta = json.loads((folder / "meta.json").read_bytes())
        if meta["dtype"] != "uint16" or meta["vocab_size"] > vocab_size:
            raise ValueError(f"{meta['dtype']} ids below {meta['vocab_size']}, not uint16 below {vocab_size}")
        rows = meta.get("block_size", block_size)
        advice = f"pass --block_size={rows}, or prepare it again with --block_size={block_size}"
        check(block_size in (None, rows), f"{folder} has rows for block_size {rows}, not {block_size}: {advice}")
        splits = [open_split(folder, split, meta, hint) for split in ("train", "val")]
    for split, data in zip(("train", "val"), splits, strict=True):
        short = f"{folder}, {split} holds {len(data.ids)} tokens, fewer than one block of {rows or 1} + 1"
        check(len(data.ids) > (rows or 1), f"{short}: lower block_size, or prepare more text")
    meta["sha256"] = {name: meta[name]["sha256"] + meta[name].get("mask_sha256", "") for name in ("train", "val")}
    return *splits, meta


def open_split(folder, split, meta, hint):
    """Open the files of "train" or "val" as a Split, each checked against meta.json."""
    counts = meta[split]
    if min(counts["tokens"], counts["bytes"]) < 1:
        raise ValueError(f"{split} is empty")
    files = counts.get("shards", [{"file": f"{split}.bin", "tokens": counts["tokens"], "sha256": counts["sha256"]}])
    is_small = 2 * counts["tokens"] < MAX_FULL_CHECK
    for file in files:
        sha256 = file["sha256"] if is_small else None
        ids = open_array(folder / file["file"], "<u2", file["tokens"], sha256, meta["vocab_size"], hint)
    if len(files) > 1:
        ids = Shards([folder / file["file"] for file in files])
    mask = None
    if "block_size" in meta:
        sha256 = counts["mask_sha256"] if is_small else None
        mask = open_array(folder / f"{split}_mask.bin", np.uint8, counts["tokens"], sha256, 2, hint)
    counts.setdefault("loss_tokens", counts["tokens"])
    return Split(ids, mask, ("train", "val").index(split))


def open_array(path, dtype, count, sha256, limit, hint):
    """Memory-map `count` numbers below `limit`. Without a sha256 only the size of the file is checked."""
    with usable(path, hint):
        array = np.memmap(path, dtype, mode="r")
        if len(array) != count:
            raise ValueError(f"it holds {len(array)} numbers, not the {count} of meta.json")
        if sha256 is not None and sha256_of(path) != sha256:
            raise ValueError("its sha256 is not the one in meta.json")
        if sha256 is not None and array.max() >= limit:
            raise ValueError(f"it holds the number {array.max()}, not only numbers below {limit}")
        return array


TOKENIZE_HINT = "tokenize again with DocumentTokenizer(tokenizer_name_or_path=SmolLM2's, eos_token='<|endoftext|>')"


def read_tokenized(files, encoding, val_fraction):
    """Check datatrove's .ds files, a list of Path, and return {split: its part of meta.json}. Nothing is copied."""
    folder = files[0].parent
    files = [file for file in files if file.stat().st_size]  # a task without documents writes an empty file
    check(len(files) > 1, f"{folder} needs two .ds files with ids, for train and val: tokenize with tasks=2 or more")
    kinds = {re.search("(unshuffled|doc_shuffled|chunk_shuffled|)$", file.stem)[0] for file in files}
    both = " and ".join(sorted(kinds))  # datatrove deletes *_unshuffled.ds after shuffling
    check(len(kinds) == 1, f"{folder} has {both} files, perhaps of the same documents: keep one kind")
    # datatrove distributes documents over files regardless of their content, so val is the last files.
    held_out = min(len(files) - 1, max(1, round(val_fraction * len(files))))
    tqdm.write(f"val: the last {held_out:,} of {len(files):,} files; duplicates in two files may land in both splits")
    if any(Path(f"{file}.loss").exists() for file in files):
        tqdm.write("note: loss masks (.ds.loss) are not read: every token is learned")
    counts, sizes = {}, token_sizes(encoding, VOCAB_SIZE)
    for split, paths in (("train", files[:-held_out]), ("val", files[-held_out:])):
        frequency, shards = np.zeros(VOCAB_SIZE, np.int64), []
        for path in tqdm(paths, desc=split, disable=None):
            frequency += count_ids(path, encoding)
            shards.append({"file": str(path.resolve()), "tokens": path.stat().st_size // 2, "sha256": sha256_of(path)})
        sha256 = hashlib.sha256("".join(shard["sha256"] for shard in shards).encode()).hexdigest()
        counts[split] = {
            "tokens": int(frequency.sum()), "bytes": int(frequency @ sizes), "documents": int(frequency[END_OF_TEXT]),
            "sha256": sha256, "shards": shards,
        }  # fmt: skip
    return counts


def count_ids(path, encoding):
    """Count each id in a .ds file, (V,). Exits if the file is truncated, or was not made by SmolLM2's tokenizer."""
    metadata = Path(f"{path}.metadata")  # written last: "tokenizer|bytes per id", number of ids
    with usable(metadata, "run its task again"):
        tokenizer, tokens = metadata.read_text().splitlines()[:2]
    with usable(path, TOKENIZE_HINT):
        if not tokenizer.endswith("|2") or path.stat().st_size != 2 * int(tokens):
            raise ValueError(f"it has {path.stat().st_size} bytes, .metadata has {tokens} ids of {tokenizer}")
        ids, block = np.memmap(path, "<u2", mode="r"), 2**20
        frequency = sum(np.bincount(ids[i : i + block], minlength=2**16) for i in range(0, len(ids), block))
        if frequency[VOCAB_SIZE:].any():
            raise ValueError(f"it holds ids of {VOCAB_SIZE} and above")
        # Not all documents must agree: a document that names a special token was encoded differently.
        ends = np.flatnonzero(ids[:block] == END_OF_TEXT)[:10]
        documents = [part[part != END_OF_TEXT].tolist() for part in np.split(ids[:block], ends)[:-1]]
        same = [encode(encoding, encoding.decode(document)) == document for document in documents]
        if not same or 2 * sum(same) < len(same):
            raise ValueError("its first documents, decoded and encoded again, have different ids")
        return frequency[:VOCAB_SIZE]
