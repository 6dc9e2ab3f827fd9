"""
data/<dataset>/train.bin, val.bin and meta.json: prepare_data.py writes them, train.py reads them here.

    train_data, val_data, meta = open_data("python", vocab_size=49_152, block_size=256)

A .bin is a flat array of little-endian uint16 token ids. Each document ends with <|endoftext|>, id 0. A dataset of
conversations is rows of block_size + 1 ids. Beside each of its .bin files a mask, train_mask.bin or val_mask.bin, has
a byte for each id: 1 if the id is to be learnt (the assistant's words), 0 if it is only read. A large train.bin is
several files instead, shards, which are read as if they were one.

The keys of meta.json:
    name                 of the dataset
    dtype, vocab_size    "uint16", and every id is below vocab_size
    tokenizer            the --official= name that the tokenizer came from
    tokenizer_sha256     of its tokenizer.json
    sources              what the text is, a sha256 of all documents, counts of documents and of oddities
    train, val           of each .bin: tokens, bytes of text, documents, sha256
    train, val           only if it is not one file of that name: shards, a list of its files, with tokens and sha256
                         of each. The split's own sha256 is then that of theirs.
    block_size           conversations only: a row is one id longer
    train, val           conversations only: loss_tokens (ones in the mask; `bytes` are those of their text), padding,
                         cut (conversations that were longer than a row), mask_sha256
"""

import hashlib
import reprlib
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lib.files import read_json, sha256_of
from lib.shards import Shards, sha256_of_shards, shards_of

TRUSTED = 2**30  # bytes: a larger .bin is sampled, because reading it all would take longer than a second
SAMPLES, BLOCK = 64, 2**20  # that many blocks of that many bytes


class Split(NamedTuple):
    """One half of a dataset, memory-mapped."""

    ids: np.ndarray  # (N,) uint16
    mask: np.ndarray | None  # (N,) uint8: 1 for an id to be learnt; None if all are


def open_data(dataset, vocab_size, block_size, data_dir="data"):
    """
    Open data/<dataset>/ as (train, val, meta): two Splits, and the dict in meta.json with loss_tokens in every split.
    Ends the program with one line if the files disagree, have less than one block, need a larger vocab_size, or were
    prepared for another block_size. block_size=None: the one they were prepared for, or any length.
    """
    folder = Path(data_dir) / dataset
    built_in = dataset in ("python", "python_chat", "shakespeare")
    way_out = f"run python prepare_data.py --dataset={dataset if built_in else f'TEXT --name={dataset}'}"
    meta = read_json(folder / "meta.json", way_out)
    what = meta["sources"].get("what") if isinstance(meta.get("sources"), dict) else None
    if isinstance(what, str) and not built_in:
        way_out = f"prepare it again with --name={dataset}, from {what.splitlines()[0] if what else 'its text'}"
    check_meta(meta, folder / "meta.json", vocab_size, way_out)
    block_size = meta.get("block_size", 1) if block_size is None else block_size
    rows = meta.get("block_size", block_size)
    if rows != block_size:
        sys.exit(
            f"error: {folder} holds conversations in rows for block_size {rows}, not {block_size}: "
            f"give --block_size={rows}, or prepare them again with --block_size={block_size}"
        )
    splits = []
    for split in ("train", "val"):
        tokens, shards = meta[split]["tokens"], shards_of(meta[split], split)
        paths = [folder / shard["file"] for shard in shards]
        for path, shard in zip(paths, shards, strict=True):
            if not path.is_file():  # a pipe would wait for a writer, for ever
                sys.exit(f"error: {path} {'is not a file' if path.exists() else 'does not exist'}: {way_out}")
            size = path.stat().st_size
            if size != 2 * shard["tokens"]:
                sys.exit(f"error: {path} holds {size} bytes, not 2 for each of {shard['tokens']} tokens: {way_out}")
        ids = np.memmap(paths[0], dtype="<u2", mode="r") if len(paths) == 1 else Shards(paths)
        small = 2 * tokens < TRUSTED
        for path, shard in zip(paths, shards, strict=True) if small else ():
            sha256, largest = read_through(path)
            if sha256 != shard["sha256"]:
                sys.exit(f"error: {path} does not have the sha256 that meta.json gives: {way_out}")
            check_largest(largest, path, meta, way_out)
        if not small:
            check_largest(sampled_largest(ids), paths[0] if len(paths) == 1 else f"{folder}, {split}", meta, way_out)
        if tokens < block_size + 1:
            sys.exit(
                f"error: {folder}, {split} holds {tokens} tokens, fewer than one block of {block_size} + 1: "
                "lower block_size, or prepare more text"
            )
        mask = open_mask(folder / f"{split}_mask.bin", meta[split], way_out) if "block_size" in meta else None
        meta[split].setdefault("loss_tokens", tokens)
        splits.append(Split(ids, mask))
    return *splits, meta


def check_largest(largest, path, meta, way_out):
    """End the program with one line if the largest id found in a .bin is not below vocab_size."""
    if largest >= meta["vocab_size"]:
        sys.exit(f"error: {path} holds the id {largest}, but meta.json has vocab_size {meta['vocab_size']}: {way_out}")


def open_mask(path, counts, way_out):
    """The mask in `path`, (N,) uint8. counts: what meta.json says of its split."""
    if not path.is_file() or path.stat().st_size != counts["tokens"]:
        sys.exit(f"error: {path} is not a file with a byte for each of {counts['tokens']} tokens: {way_out}")
    if path.stat().st_size < TRUSTED and sha256_of(path) != counts["mask_sha256"]:
        sys.exit(f"error: {path} does not have the sha256 that meta.json gives: {way_out}")
    return np.memmap(path, dtype=np.uint8, mode="r")


def check_meta(meta, path, vocab_size, way_out):
    """End the program with one line if meta.json lacks a key that train.py needs, or has a wrong value there."""

    def wrong(name, value, wanted):
        sys.exit(f"error: {path} has {name} {reprlib.repr(value)}, not {wanted}: {way_out}")

    def whole(value):
        return type(value) is int and 0 < value < 2**62

    dtype, ids = meta.get("dtype"), meta.get("vocab_size")
    if dtype != "uint16" or not whole(ids) or ids > vocab_size:
        said = dtype if dtype in ("uint16", "uint32") else reprlib.repr(dtype)
        wrong(f"dtype {said} and vocab_size", ids, f"uint16 and at most {vocab_size}")
    conversations = "block_size" in meta
    if conversations and not whole(meta["block_size"]):
        wrong("block_size", meta["block_size"], "a number above 0")
    for name in ("tokenizer", "tokenizer_sha256"):
        if not isinstance(meta.get(name, ""), str):
            wrong(name, meta[name], "a name")
    for split in ("train", "val"):
        counts = meta.get(split)
        if not isinstance(counts, dict):
            wrong(split, counts, "counts of its tokens and bytes")
        for name in ("tokens", "bytes", *(("loss_tokens",) if conversations else ())):
            if not whole(counts.get(name)):
                wrong(f"{split} {name}", counts.get(name), "a number above 0")
        for name in ("sha256", *(("mask_sha256",) if conversations else ())):
            if not isinstance(counts.get(name), str):
                wrong(f"{split} {name}", counts.get(name), "a checksum")
        if "shards" in counts:
            check_shards(split, counts, wrong)
        if conversations and "shards" in counts:
            wrong(f"{split} shards", "several", "none: conversations are one file")
        if conversations and counts["tokens"] % (meta["block_size"] + 1):
            wrong(f"{split} tokens", counts["tokens"], f"whole rows of {meta['block_size'] + 1}")


def check_shards(split, counts, wrong):
    """Call wrong(name, value, wanted), which ends the program, if the shards in meta.json do not fit their split."""
    kinds, shards = {"file": str, "tokens": int, "sha256": str}, counts["shards"]
    if not isinstance(shards, list) or not shards:
        wrong(f"{split} shards", shards, "a list of files")
    for shard in shards:
        if not isinstance(shard, dict) or any(type(shard.get(name)) is not kind for name, kind in kinds.items()):
            wrong(f"{split} shard", shard, "a file, its tokens and its sha256")
        if shard["tokens"] < 1:
            wrong(f"{split} shard of tokens", shard["tokens"], "a number above 0")
    if (tokens := sum(shard["tokens"] for shard in shards)) != counts["tokens"]:
        wrong(f"{split} tokens", counts["tokens"], f"{tokens}, which its shards add up to")
    if (sha256 := sha256_of_shards(shards)) != counts["sha256"]:
        wrong(f"{split} sha256", counts["sha256"], f"{sha256}, that of its shards")


def read_through(path):
    """(sha256, largest id) of a .bin."""
    digest, largest = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            largest = max(largest, int(np.frombuffer(block, "<u2").max()))
    return digest.hexdigest(), largest


def sampled_largest(ids):
    """The largest of the ids, (N,), in blocks spread evenly over them, from the first to the last."""
    n = BLOCK // 2
    return max(int(ids[start : start + n].max()) for start in np.linspace(0, len(ids) - n, SAMPLES, dtype=int).tolist())
