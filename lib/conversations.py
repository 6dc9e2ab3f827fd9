"""
Pack encoded conversations into rows of one length, which train.py reads as blocks.

A conversation is never split over two rows. As in plain text, a token sees everything before it in its block.
"""

from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from lib.tokenizer import VOCAB_SIZE, token_sizes

MAX_OPEN_ROWS = 64  # more rows, less padding: 8 leave 4.4% in python_chat, 64 leave 3.1%, 256 the same


class Encoded(NamedTuple):
    sha256: bytes  # hash of its messages
    ids: list  # of int
    mask: list  # of int: 1 if the id is to be learned


def keep_learnable(conversations, length, sources):
    """Yield the Encoded with something to learn in their first `length` ids, and count the others in `sources`."""
    sources |= {"without_an_answer": 0, "cut_before_the_answer": 0}
    for conversation in conversations:
        if any(conversation.mask[:length]):
            yield conversation
        else:
            sources["cut_before_the_answer" if any(conversation.mask) else "without_an_answer"] += 1


def pack_rows(conversations, length):
    """Pack (split, Encoded), first fit, into rows of at most `length` ids. Yield each as (split, list of Encoded)."""
    open_rows = {"train": [], "val": []}  # split: [free ids, list of Encoded] each, the oldest first
    for split, conversation in conversations:
        rows = open_rows[split]
        size = min(len(conversation.ids), length)
        row = next((row for row in rows if size <= row[0]), None)
        if row is None:
            row = [length, []]
            rows.append(row)
        row[0] -= size
        row[1].append(conversation)
        if len(rows) > MAX_OPEN_ROWS:
            yield split, rows.pop(0)[1]
    for split, rows in open_rows.items():
        yield from ((split, members) for _, members in rows)


def write_rows(files, rows, length, encoding):
    """Write rows to the open `files` {"train.bin": file, ...}, padded with zeros. Return {split: counts}."""
    sizes = token_sizes(encoding, VOCAB_SIZE)
    names = ("tokens", "bytes", "documents", "loss_tokens", "padding", "cut")
    counts = {split: dict.fromkeys(names, 0) for split in ("train", "val")}
    for split, conversations in tqdm(rows, unit=" rows", disable=None):  # shown on a terminal only
        conversations.sort(key=lambda conversation: conversation.sha256)  # first fit puts long ones first
        ids = np.concatenate([conversation.ids for conversation in conversations])[:length].astype("<u2")
        mask = np.concatenate([conversation.mask for conversation in conversations])[:length].astype(np.uint8)
        mask[0] = 0  # the first id of a block is never a target
        padding = length - len(ids)
        files[f"{split}.bin"].write(ids.tobytes() + bytes(2 * padding))
        files[f"{split}_mask.bin"].write(mask.tobytes() + bytes(padding))
        row = (length, sizes[ids[mask == 1]].sum(), len(conversations), mask.sum(), padding,
               sum(len(conversation.ids) > length for conversation in conversations))  # fmt: skip
        for name, count in zip(names, row, strict=True):
            counts[split][name] += int(count)
    return counts
