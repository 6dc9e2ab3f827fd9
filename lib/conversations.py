"""
Conversations: a row of people's files -> messages -> ids and a mask -> rows of one length.

    messages_of({"question": "1 + 1?", "answer": "2"}, config)      # [{"role": "user", "content": "1 + 1?"}, ...]

lib/chat.py has the template, lib/dataset.py says what is in the files, and prepare_data.py makes them.
A conversation is never split over two rows, and a row is what train.py reads as one block. As with plain text, a token
sees all that stands before it in its block, the conversations before its own included.
"""

import bisect
import collections
import hashlib
import itertools
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from lib.chat import chat_ids
from lib.tokenizer import VOCAB_SIZE, token_sizes

ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names: the template's
PAIRS = (("instruction", "output"), ("prompt", "completion"), ("question", "answer"))  # columns
OPEN_IDS = 2**22  # a split's rows that wait for a conversation that fits hold at most so many ids: 13 MB
WINDOW = 1_024  # conversations: so many at a time are packed longest first


# ---------------------------------------------------------------------------------------------
# Rows -> messages


def messages_of(row, config):
    """
    The conversation in a row, a dict: list of {"role": str, "content": str}. None if it holds none. Raises ValueError,
    which says why, if what it holds cannot be read. The columns that tell, in this order:

        config.prompt_column, config.answer_column    if they are set, no others count
        messages                                      role, content
        conversations                                 from, value: ShareGPT's
        instruction, output and perhaps input         Alpaca's; input follows after a blank line
        prompt, completion
        question, answer
    """
    pairs = PAIRS
    if config.prompt_column:
        pairs = [(config.prompt_column, config.answer_column)]
    else:
        for column in ("messages", "conversations"):
            if row.get(column) is not None:
                return messages_in(row[column], column)
    for prompt, answer in pairs:
        if row.get(prompt) is not None and row.get(answer) is not None:
            asked, answered = text_of(row[prompt], prompt), text_of(row[answer], answer)
            if prompt == "instruction" and (more := text_of(row.get("input"), "input")):
                asked = f"{asked}\n\n{more}"
            return [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return None


def messages_in(found, column):
    """The messages in a list of {role, content} or {from, value}. Any role is kept, and so is their order."""
    if not isinstance(found, list):
        raise ValueError(f"column {column} holds {found!r:.40}, not a list of messages")
    messages = []
    for number, message in enumerate(found, 1):
        where = f"column {column}, message {number}"
        if not isinstance(message, dict):
            raise ValueError(f"{where} is {message!r:.40}, not a role and a content")
        role, content = message.get("role"), message.get("content")
        if role is None:
            role, content = message.get("from"), message.get("value")
            role = ROLES.get(role, role) if isinstance(role, str) else role
        if not isinstance(role, str):
            raise ValueError(f"{where} has the role {role!r:.40}, not a name")
        messages.append({"role": role, "content": text_of(content, where)})
    return messages


def text_of(content, where):
    """A message's content as one text: a text, null (a call of a tool has no words), or a list of parts of text."""
    if content is None:
        return ""
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        if not all(isinstance(part, str) for part in parts):
            raise ValueError(f"{where} has a part that is not text: {content!r:.60}")
        return "".join(parts)
    if not isinstance(content, str):
        raise ValueError(f"{where} holds {content!r:.40}, not text")
    return content


# ---------------------------------------------------------------------------------------------
# Messages -> ids and masks


class Encoded(NamedTuple):
    sha256: bytes  # of its messages
    ids: np.ndarray  # (N,) uint16, at most as long as a row
    mask: np.ndarray  # (N,) uint8: 1 if the id is to be learnt
    cut: bool  # it was longer than a row, and its end is gone
    answered: bool  # there was something to learn before the cut


def encode_conversations(encoding, loss_on, length, documents):
    """Documents with messages -> list of Encoded. loss_on: assistant or all. length: ids in a row."""
    found = []
    for document in documents:
        ids, mask = chat_ids(encoding, document.messages)
        mask = np.ones(len(ids), np.uint8) if loss_on == "all" else np.array(mask, np.uint8)
        cut = len(ids) > length
        found.append(Encoded(document.sha256, np.array(ids[:length], "<u2"), mask[:length].copy(), cut, mask.any()))
    return found


def with_answers(conversations, sources):
    """Yield the Encoded that have something to learn, and count the others in the dict `sources`."""
    for conversation in conversations:
        if conversation.mask.any():
            yield conversation
        else:
            sources["cut_before_the_answer" if conversation.answered else "without_an_answer"] += 1


# ---------------------------------------------------------------------------------------------
# Conversations -> rows -> files


def free_space(row):
    return row[0]


def longest_first(stream):
    """The items of an iterator, each WINDOW of them sorted. Best fit then leaves about half as much padding."""
    while window := list(itertools.islice(stream, WINDOW)):
        yield from sorted(window, key=lambda item: -len(item[1].ids))


def packed(stream, length):
    """
    Pack (split, Encoded) into rows of `length` ids. Yields (split, list of Encoded), none of them longer together.

    Best fit: a conversation goes to the open row that it fills best, and a new row is opened if it fits in none. When a
    split's open rows hold OPEN_IDS, its fullest row is closed, so memory stays flat.
    """
    most = max(1, OPEN_IDS // length)
    open_rows = collections.defaultdict(list)  # split: [(free space, list of Encoded)], the fullest first
    for split, conversation in longest_first(stream):
        rows, need = open_rows[split], len(conversation.ids)
        at = bisect.bisect_left(rows, need, key=free_space)
        free, members = rows.pop(at) if at < len(rows) else (length, [])
        bisect.insort(rows, (free - need, [*members, conversation]), key=free_space)
        if len(rows) > most:
            yield split, rows.pop(0)[1]
    for split, rows in open_rows.items():
        for _, members in rows:
            yield split, members


def write_rows(files, rows, length, encoding):
    """
    Write the rows of `packed`, padded with zeros. files: {"train.bin": open file, "train_mask.bin": ..., ...}.
    Returns {split: its counts and sha256s}, as in meta.json.
    """
    sizes = token_sizes(encoding, VOCAB_SIZE)
    splits = ("train", "val")
    zeros = dict.fromkeys(("tokens", "bytes", "documents", "loss_tokens", "padding", "cut"), 0)
    counts, digests = {split: dict(zeros) for split in splits}, {name: hashlib.sha256() for name in files}
    with tqdm(unit="B", unit_scale=True, disable=None) as bar:  # shown on a terminal only
        for split, members in rows:
            ids, mask = np.zeros(length, "<u2"), np.zeros(length, np.uint8)
            used = sum(len(member.ids) for member in members)
            ids[:used] = np.concatenate([member.ids for member in members])
            mask[:used] = np.concatenate([member.mask for member in members])
            mask[0] = 0  # no id stands before it in its block, so it is never a target
            for name, content in ((f"{split}.bin", ids.tobytes()), (f"{split}_mask.bin", mask.tobytes())):
                files[name].write(content)
                digests[name].update(content)
            c, size = counts[split], int(sizes[ids[mask == 1]].sum())
            c["tokens"] += length
            c["bytes"] += size
            c["documents"] += len(members)
            c["loss_tokens"] += int(mask.sum())
            c["padding"] += length - used
            c["cut"] += sum(member.cut for member in members)
            bar.update(size)
    for split in splits:
        counts[split]["sha256"] = digests[f"{split}.bin"].hexdigest()
        counts[split]["mask_sha256"] = digests[f"{split}_mask.bin"].hexdigest()
    return counts


def conversation_table(counts):
    """Conversations, tokens and what they are for in each split, as lines of text."""
    lines = [f"{'':<8}{'conversations':>14}{'tokens':>14}{'loss tokens':>14}{'padding':>10}{'cut':>10}"]
    for name, c in counts.items():
        loss, padding = (c[key] / c["tokens"] for key in ("loss_tokens", "padding"))
        lines.append(f"{name:<8}{c['documents']:>14,}{c['tokens']:>14,}{loss:>14.1%}{padding:>10.1%}{c['cut']:>10,}")
    return "\n".join(lines)


def lost_conversations(sources):
    """How many conversations have nothing to learn, by the reason, as lines of text."""
    if count := sources.get("without_an_answer"):
        yield f"{count:,} conversations without an assistant's answer were left out"
    if count := sources.get("cut_before_the_answer"):
        yield f"{count:,} conversations whose first answer comes after the row's end were left out: raise --block_size"
