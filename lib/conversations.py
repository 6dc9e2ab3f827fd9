"""
Conversations -> ids and masks -> rows of one length, which train.py reads as blocks.

lib/text.py reads the messages, lib/chat.py has the template, lib/dataset.py describes the files, and prepare_data.py
makes them. A conversation is never split over two rows. As with plain text, a token sees all that stands before it in
its block, the conversations before its own included.
"""

from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from lib.chat import chat_ids
from lib.tokenizer import VOCAB_SIZE, token_sizes

OPEN_ROWS = 64  # more leave less padding: 8 rows leave 4.4 % in python_chat, 64 leave 3.1 %, 256 as much


class Encoded(NamedTuple):
    sha256: bytes  # of its messages
    ids: np.ndarray  # (N,) uint16
    mask: np.ndarray  # (N,) uint8: 1 if the id is to be learned


def encode_conversations(encoding, documents):
    """Return documents with messages as a list of Encoded."""
    encoded = [(document.sha256, *chat_ids(encoding, document.messages)) for document in documents]
    return [Encoded(sha256, np.array(ids, "<u2"), np.array(mask, np.uint8)) for sha256, ids, mask in encoded]


def with_answers(conversations, length, sources):
    """Yield the Encoded that have something to learn in their first `length` ids, and count the others in `sources`."""
    sources |= {"without_an_answer": 0, "cut_before_the_answer": 0}
    for conversation in conversations:
        if conversation.mask[:length].any():
            yield conversation
        else:
            sources["cut_before_the_answer" if conversation.mask.any() else "without_an_answer"] += 1


def packed(conversations, length):
    """
    Pack (split, Encoded) into rows of `length` ids. Yield (split, list of Encoded), none of them longer together.

    First fit: a conversation goes to the oldest of the open rows that has room, or opens a new row. Beyond OPEN_ROWS
    the oldest row is closed.
    """
    open_rows = {"train": [], "val": []}  # split: [free, list of Encoded] each, the oldest first
    for split, conversation in conversations:
        rows, need = open_rows[split], min(len(conversation.ids), length)
        row = next((row for row in rows if need <= row[0]), None)
        if row is None:
            row = [length, []]
            rows.append(row)
        row[0] -= need
        row[1].append(conversation)
        if len(rows) > OPEN_ROWS:
            yield split, rows.pop(0)[1]
    for split, rows in open_rows.items():
        yield from ((split, members) for _, members in rows)


def write_rows(files, rows, length, encoding):
    """
    Write the rows of `packed`, padded with zeros. files: {"train.bin": open file, "train_mask.bin": ..., ...}.
    Return {split: counts}, as in meta.json.
    """
    sizes, names = token_sizes(encoding, VOCAB_SIZE), ("tokens", "bytes", "documents", "loss_tokens", "padding", "cut")
    counts = {split: dict.fromkeys(names, 0) for split in ("train", "val")}
    for split, conversations in tqdm(rows, unit=" rows", disable=None):  # shown on a terminal only
        ids, mask = np.zeros(length, "<u2"), np.zeros(length, np.uint8)
        conversations.sort(key=lambda conversation: conversation.sha256)  # first fit puts long ones first
        joined = np.concatenate([conversation.ids for conversation in conversations])[:length]
        ids[: len(joined)] = joined
        mask[: len(joined)] = np.concatenate([conversation.mask for conversation in conversations])[:length]
        mask[0] = 0  # no id stands before it in its block, so it is never a target
        files[f"{split}.bin"].write(ids.tobytes())
        files[f"{split}_mask.bin"].write(mask.tobytes())
        c = counts[split]
        c["tokens"] += length
        c["bytes"] += int(sizes[ids[mask == 1]].sum())
        c["documents"] += len(conversations)
        c["loss_tokens"] += int(mask.sum())
        c["padding"] += length - len(joined)
        c["cut"] += sum(len(conversation.ids) > length for conversation in conversations)
    return counts
