"""
Token ids that datatrove's DocumentTokenizer wrote -> the meta.json of a dataset. The ids stay where they are.

    files = sorted(Path("tokenized").glob("*.ds"))
    counts = read_tokenized(files, encoding, val_fraction=0.1)      # {"train": ..., "val": ...}

A .ds file is a .bin: flat little-endian uint16 ids, each document ended by <|endoftext|> if eos_token said so. Beside
it, .ds.index has the end of each document, in ids, as uint64, and .ds.metadata the tokenizer's name and the number of
ids. datatrove distributes documents by file, not by a hash of their content, so val is the last files of the folder.
"""

import hashlib
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lib.dataset import BLOCK
from lib.shards import sha256_of_shards
from lib.tokenizer import END_OF_TEXT, N_SPECIAL, VOCAB_SIZE, encode, token_sizes

ANOTHER = "tokenize again with DocumentTokenizer(tokenizer_name_or_path=SmolLM2's, eos_token='<|endoftext|>')"
KINDS = ("_unshuffled", "_doc_shuffled", "_chunk_shuffled")  # datatrove deletes the first after it wrote the others


def read_tokenized(files, encoding, val_fraction):
    """
    {split: its counts, shards and sha256}, as in meta.json. Reads each file once. Ends the program with one line if a
    file is not whole, or if its ids are not those of SmolLM2's tokenizer. files: list of Path, at least two.
    """
    if len(files) < 2:
        sys.exit(f"error: {files[0].parent} has one .ds file, and val needs another: tokenize with tasks=2 or more")
    kinds = {kind for kind in KINDS for file in files if file.stem.endswith(kind)}
    if len(kinds) > 1:
        both = " and ".join(sorted(f"*{kind}.ds" for kind in kinds))
        sys.exit(
            f"error: {files[0].parent} has {both}, perhaps of the same documents: keep one kind, and move the others"
        )
    held_out = min(len(files) - 1, max(1, round(val_fraction * len(files))))
    tqdm.write(f"val: the last {held_out:,} of {len(files):,} files; a document that is in two files may sit in both")
    if masks := [file for file in files if Path(f"{file}.loss").exists()]:
        tqdm.write(f"note: {len(masks):,} files with loss masks (.ds.loss): these are not read, every token is learnt")
    sizes, counts = token_sizes(encoding, VOCAB_SIZE), {}
    with tqdm(total=sum(file.stat().st_size for file in files), unit="B", unit_scale=True, disable=None) as bar:
        for split, part in (("train", files[:-held_out]), ("val", files[-held_out:])):
            c = counts[split] = dict(tokens=0, bytes=0, documents=0, sha256="", shards=[])
            for path in part:
                frequency, documents, sha256 = read_file(path, encoding)
                tokens = int(frequency.sum())
                if tokens:  # a task without documents writes an empty file
                    c["shards"].append({"file": str(path.resolve()), "tokens": tokens, "sha256": sha256})
                c["tokens"] += tokens
                c["bytes"] += int(frequency @ sizes)
                c["documents"] += documents
                bar.update(2 * tokens)
            if not c["tokens"]:
                sys.exit(
                    f"error: {part[0]}: no ids for {split} in the {len(part)} files from this one on: tokenize more"
                )
            c["sha256"] = sha256_of_shards(c["shards"])
    return counts


def read_file(path, encoding):
    """(how often each id occurs, (V,); number of documents; sha256) of a .ds file, checked."""
    size, tokens, ends = path.stat().st_size, path.stat().st_size // 2, None
    index, about = Path(f"{path}.index"), Path(f"{path}.metadata")
    if about.is_file():
        name, said = (about.read_text(errors="replace").splitlines() + ["", ""])[:2]
        if not name.endswith("|2"):
            sys.exit(f"error: {path}: its ids are not 2 bytes each ({name}, says .metadata): {ANOTHER}")
        if said != str(size / 2).removesuffix(".0"):
            sys.exit(
                f"error: {path} holds {size} bytes, not 2 for each of {said} ids, as .metadata says: run its task again"
            )
    if index.is_file():
        ends = np.fromfile(index, "<u8")
        if size != 2 * (ends[-1] if len(ends) else 0):
            sys.exit(f"error: {path} holds {size} bytes, not 2 for each id that .index counts: run its task again")
    elif not about.is_file():
        sys.exit(
            f"error: {path} has neither .index nor .metadata beside it, so it may be half written: run its task again"
        )
    frequency, digest, first = np.zeros(VOCAB_SIZE, np.int64), hashlib.sha256(), None
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            ids = np.frombuffer(block, "<u2")
            first = ids if first is None else first
            found = np.bincount(ids, minlength=VOCAB_SIZE)
            if len(found) > VOCAB_SIZE:
                sys.exit(f"error: {path} holds the id {len(found) - 1}, which is not SmolLM2's: {ANOTHER}")
            frequency += found
    if tokens and not frequency[END_OF_TEXT]:
        sys.exit(f"error: {path}: no document in it ends with <|endoftext|>: {ANOTHER}")
    if tokens and not canonical(first, encoding):
        sys.exit(f"error: {path}: its first texts, decoded and encoded again, have other ids: {ANOTHER}")
    documents = int(frequency[END_OF_TEXT]) if ends is None else len(ends)
    return frequency, documents, digest.hexdigest()


def canonical(ids, encoding):
    """
    Whether nearly all of the first documents, up to ten, are what our tokenizer makes of their text. Not all: a special
    token's name in a text, or a document that begins in another file, may have other ids.
    """
    ends = np.flatnonzero(ids == END_OF_TEXT)[:11]
    documents = [d.tolist() for d in np.split(ids, ends)[:-1]] if len(ends) else []
    documents = [[i for i in d if i != END_OF_TEXT] for d in documents]
    same = [encode(encoding, encoding.decode([i for i in d if i >= N_SPECIAL])) == d for d in documents]
    return same.count(False) <= max(1, len(same) // 5)
