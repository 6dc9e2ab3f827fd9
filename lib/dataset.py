"""
data/<dataset>/train.bin, val.bin and meta.json: prepare_data.py writes them, train.py reads them here.

    train_data, val_data, meta = open_data("python", vocab_size=49_152, block_size=256)

A .bin is a flat array of little-endian uint16 token ids. Each document ends with <|endoftext|>, id 0.
The keys of meta.json:
    name                 of the dataset
    dtype, vocab_size    "uint16", and every id is below vocab_size
    tokenizer            the --official= name that the tokenizer came from
    tokenizer_sha256     of its tokenizer.json
    sources              what the text is, a sha256 of all documents, counts of documents and of oddities
    train, val           of each .bin: tokens, bytes of text, documents, sha256
"""

import json
import sys
from pathlib import Path

import numpy as np

from lib.files import sha256_of


def open_data(dataset, vocab_size, block_size):
    """
    Open data/<dataset>/ as (train, val, meta): two memory-mapped arrays of uint16, and the dict in meta.json.
    Ends the program with one line if the files disagree, have less than one block, or need a larger vocab_size.
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
        if size < 2**30 and sha256_of(path) != meta[split]["sha256"]:  # takes about a second; larger files are trusted
            sys.exit(f"error: {path} does not have the sha256 that meta.json gives: {way_out}")
        if size < 2 * (block_size + 1):
            sys.exit(
                f"error: {path} holds {size // 2} tokens, fewer than one block of {block_size} + 1: "
                "lower block_size, or prepare more text"
            )
        arrays.append(np.memmap(path, dtype="<u2", mode="r"))
    return *arrays, meta
