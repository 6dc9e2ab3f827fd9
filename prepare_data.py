"""
Text or conversations go in; data/<name>/train.bin, val.bin and meta.json come out.

    python prepare_data.py                                                 # Python's own standard library
    python prepare_data.py --dataset=my/notes.txt                          # a file, folder or glob: data/notes/
    python prepare_data.py --dataset=~/linux --suffixes=.c,.h              # these suffixes are plain text, too
    python prepare_data.py --dataset=roneneldan/TinyStories --max_documents=100000      # streamed from the Hub
    python prepare_data.py --dataset=python_chat                           # questions and answers about Python
    python prepare_data.py --dataset=my/chats.jsonl --block_size=1024      # conversations, in rows for train.py
    python prepare_data.py --dataset=corpus --part=3/64                    # the share of the third of 64 machines
    python prepare_data.py --dataset=tokenized                             # datatrove's .ds files, as they are

lib/folders.py finds the files, lib/readers.py reads them, lib/conversations.py knows a conversation by its columns, and
lib/dataset.py says what is in the files that come out. Text is read, cut and encoded a few hundred kB at a time, so
memory does not grow with the length of a document or the size of the corpus. An interrupted run goes on after its last
whole shard (lib/shards.py). lib/parts.py merges the shares of many machines, lib/dataset.py reads datatrove's files.
"""

import collections
import contextlib
import functools
import glob
import hashlib
import itertools
import json
import os
import platform
import re
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from tqdm import tqdm

from configurator import configure, reject
from lib.conversations import (
    conversation_table,
    encode_conversations,
    lost_conversations,
    packed,
    with_answers,
    write_rows,
)
from lib.dataset import read_tokenized
from lib.decoding import COMPRESSED, CONVERT, decompressed_name
from lib.errors import first_line
from lib.files import owned_folder, written_whole
from lib.folders import left_out_line, literal_part, matches, text_files, walk
from lib.parts import listing, merge, part_folder, share
from lib.python_chat import python_chat
from lib.readers import CHUNK, ROWS, SUFFIXES, conversation, documents, format_of
from lib.shards import after, flushed, put_dataset_in_place, unfinished, write_bins
from lib.tokenizer import END_OF_TEXT, TOKENIZER_SHA256, VOCAB_SIZE, encode_array, load_tokenizer, tokenizer_json


@dataclass(frozen=True)
class PrepareConfig:
    """Text or conversations -> token ids. Without flags: this Python's standard library, 12 MB, no network needed."""

    dataset: str = "python"  # python, python_chat, shakespeare, a file, a folder, a glob, or a Hub dataset org/name
    name: str = ""  # the folder to write under data_dir; by default the dataset's own name, or the path's stem
    data_dir: str = "data"  # the folder that holds all datasets; train.py reads data/
    val_fraction: float = 0.1  # share of the documents held out for validation, between 0 and 1
    official: str = "base"  # the release whose tokenizer is used; all SmolLM2 releases share one
    suffixes: str = ""  # further suffixes of plain text: .c,.h,.rs; all takes every text file of a folder
    text_column: str = "text"  # rows: the column that holds the text; a row without it may be a conversation
    prompt_column: str = ""  # conversations: the column of the user's words, where its name does not tell
    answer_column: str = ""  # conversations: the column of the assistant's; the two go before text_column
    block_size: int = 512  # conversations: they are packed into rows for this block_size; train.py must use the same
    loss_on: Literal["assistant", "all"] = "assistant"  # conversations: whose tokens are learnt
    subset: str = ""  # Hub: the dataset's configuration, if it has several
    split: str = "train"  # Hub: which split to read; train.bin and val.bin are both made from it
    max_documents: int | None = None  # stop after this many documents, for a corpus larger than the disk
    shard_tokens: int = 100_000_000  # text: a train.bin with more ids than this becomes shards of so many ids each
    part: str = ""  # text: 3/64 prepares the third of 64 shares of the files, on a machine of its own
    merge: bool = False  # make one dataset of the parts that other runs, with --part, have prepared
    overwrite: bool = False  # replace a dataset of the same name that was made from another text


SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

LONGEST = 2**22  # characters: a text without a safe place to cut is cut after this many anyway
PEEK = 1_000  # documents: read at most this many ahead, to see whether both train and val get one

# ---------------------------------------------------------------------------------------------
# Which files


class Source(NamedTuple):
    name: str  # of the dataset, if --name= says nothing else
    what: str  # it is, for people
    identity: str  # which text it is: two with the same name and another identity would overwrite each other
    files: list | None  # of Path; None for a Hub dataset
    left_out: dict  # what is in the folder, or matches the glob, and is not read: {kind: count}


def find_source(config):
    """The Source that --dataset= names."""
    dataset = config.dataset
    if dataset in ("python", "python_chat"):
        what = f"the standard library of Python {platform.python_version()}"
        what = f"questions and answers from {what}" if dataset == "python_chat" else what
        return Source(dataset, what, dataset, standard_library(), {})
    if dataset == "shakespeare":  # its one file is downloaded later
        return Source(dataset, f"tiny shakespeare, {SHAKESPEARE_URL}", dataset, [], {})
    path = Path(dataset)
    kind = format_of(path, config.suffixes)
    if path.is_file():
        if kind in CONVERT:
            command = CONVERT[kind].format(file=path, name=path.stem)
            reject(f"{dataset}: a {kind} file is not plain text: convert it with {command}")
        return Source(decompressed_name(path).stem, dataset, str(path.resolve()), [path], {})
    if dataset and path.is_dir():
        if tokenized := sorted(path.glob("*.ds")):
            return Source(path.resolve().name, f"datatrove's token ids in {path}", str(path.resolve()), tokenized, {})
        name, identity, left_out = path.resolve().name, str(path.resolve()), collections.Counter()
        if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            return Source(name, f"{dataset}, split {config.split}", f"{identity}, split {config.split}", [path], {})
        files = text_files(walk(path, left_out), dataset, config.suffixes, left_out)
        return Source(name, dataset, identity, files, left_out)
    if glob.has_magic(dataset):
        folder, left_out = literal_part(path), collections.Counter()
        named = "" if path.suffix.lower() in SUFFIXES else f",{path.suffix}"  # src/*.c says that .c is text
        files = text_files(matches(path, folder, left_out), dataset, config.suffixes + named, left_out)
        return Source(folder.resolve().name, dataset, os.path.abspath(dataset), files, left_out)
    if kind not in SUFFIXES and re.fullmatch(r"\w[\w.-]*/[\w.-]+", dataset, re.ASCII):
        of = f"{config.subset}, split {config.split}" if config.subset else f"split {config.split}"
        what = f"Hub dataset {dataset}, {of}"
        return Source(dataset.split("/")[1], what, what, None, {})
    near = get_close_matches(dataset, ("python", "python_chat", "shakespeare"), n=1)
    names = "name python, python_chat, shakespeare, a file, folder or glob, or a Hub dataset org/name"
    reject(f"dataset={dataset}: no such dataset or path: {f'did you mean {near[0]}?' if near else names}")


def standard_library():
    """The .py files of the running Python's standard library, without its tests and without installed packages."""
    library = Path(os.__file__).parent
    others = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    files = (p for p in library.rglob("*.py") if others.isdisjoint(p.relative_to(library).parts))
    return text_files(files, f"the standard library ({library})", "", {})


def fetch_shakespeare(path):
    """Download tiny shakespeare to `path`, unless it is there already. Either way its sha256 is checked."""

    def is_genuine(content):
        return hashlib.sha256(content).hexdigest() == SHAKESPEARE_SHA256

    if path.is_file() and is_genuine(path.read_bytes()):
        return
    try:
        with urllib.request.urlopen(SHAKESPEARE_URL, timeout=10) as answer:
            content = answer.read()
    except OSError as error:  # urllib's own errors are OSErrors too
        sys.exit(f"error: {SHAKESPEARE_URL}: cannot be reached ({first_line(error)}): save the file as {path} yourself")
    if not is_genuine(content):
        sys.exit(f"error: {SHAKESPEARE_URL}: its sha256 is not {SHAKESPEARE_SHA256}: save the right file as {path}")
    with written_whole(path) as file:
        file.write(content)


# ---------------------------------------------------------------------------------------------
# Documents -> pieces of train and of val


def split_by_hash(stream, val_fraction):
    """
    (the documents again, val_fraction, alone): a document goes to val if its place(document) is below val_fraction. So
    a duplicate never sits in both. If train or val would get none, another val_fraction is returned that gives it the
    nearest one. alone: they are all one and the same document.
    """
    ahead, alone = [], False
    for document in stream:
        ahead.append(document)
        if (place(document) < val_fraction) != (place(ahead[0]) < val_fraction) or len(ahead) == PEEK:
            break
    else:  # the stream ended, and all its documents would go to the same split
        places = sorted({place(document) for document in ahead})
        alone = len(places) == 1
        if len(places) > 1:
            empty = "val" if places[0] >= val_fraction else "train"
            tqdm.write(f"note: none of these {len(ahead)} documents fell into {empty}: the nearest one was put there")
            val_fraction = places[1] if empty == "val" else places[-1]
    return itertools.chain(ahead, stream), val_fraction, alone


def pieces(stream, val_fraction, sources, whole=True):
    """
    Cut documents into short texts to be encoded one by one. Yields (split, text) in order, and (split, None) at the
    end of each document. A document goes to train or to val by a hash of its content. A single document is cut in two
    instead: its last tenth (val_fraction) goes to val. whole: this is all of the corpus. A part cannot see whether
    train or val would be empty in the whole, so it goes by the hash alone.
    """
    alone = False
    if whole:
        stream, val_fraction, alone = split_by_hash(stream, val_fraction)
    if alone:
        tqdm.write("note: this is a single document: its end is held out for val")
    for document in counted(stream, sources):
        held_out = place(document) < val_fraction
        # Characters before `border` go to train, the others to val.
        border = int(document.chars * (1 - val_fraction)) if alone else 0 if held_out else document.chars
        seen, digest = 0, hashlib.sha256()
        with document.open() as file:
            for text in cut(file):
                if document.path:
                    digest.update(text.encode())
                at = border - seen
                seen += len(text)
                if 0 < at < len(text) and (match := LAST_SAFE_CUT.match(text, 0, at + 1)):
                    at = match.end()
                yield "train", text[: max(at, 0)]
                yield "val", text[max(at, 0) :]
        if document.path and digest.digest() != document.sha256:
            said = f"it had {document.chars:,} characters when first read, then {seen:,}"
            sys.exit(f"error: {document.path}: changed while it was read, {said}: run again when nobody writes to it")
        if alone or not held_out:
            yield "train", None
        if alone or held_out:
            yield "val", None


def counted(stream, sources):
    """The documents again, each counted."""
    for document in stream:
        sources["sha256"].update(document.sha256)
        sources["documents"] += 1
        yield document


def place(document):
    """A document's hash as a number in [0, 1). The document goes to val if this is below val_fraction."""
    return int.from_bytes(document.sha256[:8], "big") / 2**64


# A safe place to cut is between a character that is not white space and a space, tab, CR or LF. The tokenizer's own
# pattern always cuts there, so the ids stay the same. It does not always cut between two lines.
LAST_SAFE_CUT = re.compile(r".*\S(?=[ \t\r\n])", re.DOTALL)


def cut(file):
    """Yield the text of a file in pieces of about CHUNK characters, cut only where no id changes."""
    rest = ""
    while block := file.read(CHUNK):
        text = rest + block
        match = LAST_SAFE_CUT.match(text, max(len(rest) - 1, 0))  # `rest` alone has no safe place
        at = match.end() if match else len(text) if len(text) >= LONGEST else 0
        if at:
            yield text[:at]
        rest = text[at:]
    if rest:
        yield rest


def bundles(stream, sources):
    """
    Yield (digest, list of pieces), about CHUNK characters each: enough work to be worth handing to a thread. The digest
    is that of the documents so far. The bundles depend on the text alone, so an interrupted run can count them.
    """
    bundle, chars = [], 0
    for split, text in stream:
        bundle.append((split, text))
        chars += len(text or "")
        if chars >= CHUNK:
            yield sources["sha256"].hexdigest(), bundle
            bundle, chars = [], 0
    if bundle:
        yield sources["sha256"].hexdigest(), bundle


# ---------------------------------------------------------------------------------------------
# Pieces -> ids -> files


def encode_bundle(encoding, numbered):
    """(digest, pieces) -> (digest, {split: (bytes for the .bin, number of documents, bytes of text)})."""
    (digest, bundle), encoded = numbered, {}
    for split in {split for split, _ in bundle}:
        texts = [text for s, text in bundle if s == split]
        ids = [[END_OF_TEXT] if text is None else encode_array(encoding, text) for text in texts]
        size = sum(len(text.encode()) for text in texts if text is not None)
        encoded[split] = np.concatenate(ids).astype("<u2").tobytes(), texts.count(None), size
    return digest, encoded


def on_all_cores(function, items):
    """
    map(function, items) on threads. They run in parallel because tiktoken releases the GIL. The results keep the order
    of the items. Only a few items are taken ahead of the results, so memory stays flat.
    """
    workers = os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        waiting = collections.deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) == 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def write_text(draft, state, stream, config, encoding, sources, total):
    """
    Documents of text -> train.bin, or its shards, and val.bin in the folder `draft`. Goes on where `state` says. total:
    as in write_bins. Returns {split: its counts and sha256}.
    """
    work = bundles(pieces(stream, config.val_fraction, sources, not config.part), sources)
    encoded = on_all_cores(functools.partial(encode_bundle, encoding), after(work, state, draft))
    counts = write_bins(draft, encoded, config.shard_tokens, state, total)
    for split, other in (("train", "lower"), ("val", "raise")):
        if counts[split]["tokens"] == counts[split]["documents"] and not config.part:
            sys.exit(f"error: {config.dataset}: too short to split, {split} is empty: {other} --val_fraction")
    return counts


def write_conversations(draft, stream, config, encoding, sources):
    """Conversations -> rows of block_size + 1 ids, and masks, in `draft`. Returns {split: its counts and sha256s}."""
    length = config.block_size + 1
    sources |= {"loss_on": config.loss_on, "without_an_answer": 0, "cut_before_the_answer": 0}
    stream = counted(stream, sources)
    work = iter(lambda: list(itertools.islice(stream, 64)), [])
    encoded = on_all_cores(functools.partial(encode_conversations, encoding, config.loss_on, length), work)
    learnable = with_answers(itertools.chain.from_iterable(encoded), sources)
    learnable, val_fraction, alone = split_by_hash(learnable, config.val_fraction)
    if alone:
        sys.exit(f"error: {config.dataset}: holds a single conversation, which is not cut in two: add one for val")
    in_splits = (("val" if place(one) < val_fraction else "train", one) for one in learnable)
    with contextlib.ExitStack() as stack:
        names = [f"{split}{kind}.bin" for split in ("train", "val") for kind in ("", "_mask")]
        files = {name: stack.enter_context(open(draft / name, "wb")) for name in names}
        counts = write_rows(files, packed(in_splits, length), length, encoding)
        for file in files.values():
            flushed(file)
    lost = "; ".join(lost_conversations(sources))
    if not any(counts[split]["documents"] for split in counts):
        sys.exit(f"error: {config.dataset}: nothing to learn in it, {lost}")
    for split, other in (("train", "lower"), ("val", "raise")):
        if not counts[split]["bytes"]:
            sys.exit(f"error: {config.dataset}: too short to split, {split} has no answer: {other} --val_fraction")
    return counts


def write_dataset(folder, config, files, encoding, meta):
    """
    Write train.bin or its shards, val.bin, for conversations their masks, and meta.json to `folder`. meta: the first
    keys of meta.json. Returns all of them, and the tokens and bytes that an interrupted run had done before.
    """
    run = run_settings(config, files, meta)
    rows = {*ROWS, *COMPRESSED}
    plain = files and config.max_documents is None and not any(file.suffix.lower() in rows for file in files)
    part, parts = share(config.part)
    total = sum(file.stat().st_size for file in files[part - 1 :: parts]) if plain else None
    sources = meta["sources"] | {"sha256": hashlib.sha256()}  # of the documents' sha256s, in order
    sources |= {"documents": 0, "empty_documents": 0, "undecodable_bytes": 0}
    if config.dataset == "python_chat":
        stream = (conversation(messages, sources) for messages in python_chat(files))
    else:
        stream = documents(files, config, sources)
    stream = itertools.islice(stream, config.max_documents)
    first = next(stream, None)
    if first is None and not config.part:
        sys.exit(f"error: {config.dataset}: no text in it, every document is empty: name another --dataset")
    stream = stream if first is None else itertools.chain([first], stream)
    with unfinished(folder, run) as (draft, state):
        done = {key: sum(c[key] for c in (state["counts"] or {}).values()) for key in ("tokens", "bytes")}
        if first is None or first.messages is None:
            counts = write_text(draft, state, stream, config, encoding, sources, total)
        elif config.part:
            sys.exit(f"error: {config.dataset}: holds conversations, which are not prepared in parts: leave --part out")
        else:
            meta = meta | {"block_size": config.block_size}
            counts = write_conversations(draft, stream, config, encoding, sources)
        meta = meta | {"sources": sources | {"sha256": sources["sha256"].hexdigest()}} | counts
        put_dataset_in_place(folder, META[bool(config.part)], meta | ({"run": run} if config.part else {}), draft)
    return meta, done


META = ("meta.json", "part.json")  # of a whole dataset, of a part


def run_settings(config, files, meta):
    """All that decides which ids are written: a run goes on, and parts are merged, only where these are equal."""
    others = ("dataset", "name", "data_dir", "official", "merge", "overwrite")
    run = {name: value for name, value in asdict(config).items() if name not in others}
    text = meta["sources"]["identity"] if files is None else listing(files)
    return run | {"text": text, "tokenizer": meta["tokenizer_sha256"], "pieces": [CHUNK, LONGEST]}


def table(counts):
    """Documents, tokens and bytes of each split, as lines of text."""
    lines = [f"{'':<8}{'documents':>12}{'tokens':>16}{'bytes':>18}{'bytes/token':>14}"]
    for name, c in counts.items():
        ratio = c["bytes"] / max(1, c["tokens"])  # a part may have nothing for val
        lines.append(f"{name:<8}{c['documents']:>12,}{c['tokens']:>16,}{c['bytes']:>18,}{ratio:>14.3f}")
    return "\n".join(lines)


def notes(sources, column):
    """What happened to the text on its way, as lines of text. column: the text's, or what was looked for instead."""
    for encoding, found in sources.get("encodings", {}).items():
        others = f" and {found['files'] - 1:,} more" if found["files"] > 1 else ""
        yield f"read as {encoding}: {found['first']}{others}"
    if sources["left_out"]:
        yield left_out_line(sources["left_out"])
    if lacking := sources.get("rows_without_column"):
        yield f"note: {lacking:,} rows without a {column} were left out: {sources['first_without_column']}"
    yield from (f"note: {line}" for line in lost_conversations(sources))
    if sources.get("empty_documents"):
        yield f"note: {sources['empty_documents']:,} empty documents were left out"
    if bad := sources.get("undecodable_bytes"):
        yield f"note: {bad:,} bytes that cannot be decoded became U+FFFD, the first in {sources['first_undecodable']}"


def refuse_other_text(folder, meta, file="meta.json"):
    """End the program with one line if the dataset in `folder` was made from another text than this one."""
    try:
        earlier = json.loads((folder / file).read_bytes())["sources"]
        same = earlier.get("identity") == meta["sources"]["identity"]
        if same or "identity" not in earlier and earlier["what"] == meta["sources"]["what"]:  # made before identities
            return
        what = earlier.get("identity", earlier["what"])
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return  # there is no dataset, or none that could be used
    name = re.sub(r"[^\w.-]+", "_", f"{Path(meta['sources']['identity']).parent.name}_{meta['name']}").strip("_")
    reject(f"{folder} was made from another text, {what}: give --name={name}, or replace it with --overwrite=True")


def main(config):
    if not 0 < config.val_fraction < 1:
        reject(f"val_fraction={config.val_fraction}: not between 0 and 1: give a share, for example 0.1")
    if config.max_documents is not None and config.max_documents < 1:
        reject(f"max_documents={config.max_documents}: no document would be left: give 1 or more")
    if config.block_size < 1:
        reject(f"block_size={config.block_size}: no conversation fits: give the one you train with, for example 512")
    if config.shard_tokens < 1:
        reject(f"shard_tokens={config.shard_tokens}: a shard would hold no id: give 1 or more, for example 100000000")
    if bool(config.prompt_column) != bool(config.answer_column):
        reject("a conversation has two columns: give both --prompt_column and --answer_column")
    if config.merge and config.part:
        reject("--part prepares one part, --merge joins them all: give --merge alone, after the last part")
    part, parts = share(config.part)
    if config.merge and config.name:  # the parts suffice, their text may be on other machines
        found = Source(config.name, f"the parts in {Path(config.data_dir, config.name)}", "", None, {})
    else:
        found = find_source(config)
    name, what, identity, files, left_out = found
    name = config.name or name
    if name in ("", ".", "..") or re.search(r'[/\\:*?"<>|\0]', name):
        reject(f"name={name!r}: cannot be a folder in {config.data_dir}: give a plain one, for example --name=notes")
    tokenized = bool(files) and files[0].suffix == ".ds"
    if tokenized and (config.part or config.max_documents):
        reject(f"{config.dataset}: holds token ids, which are taken as they are: leave --part and --max_documents out")
    if files is not None and len(files) < parts > 1:
        reject(f"part={config.part}: {config.dataset} is {max(1, len(files))} files: give at most as many parts")
    print(f"text: {what}" + (f", {len(files):,} files" if files and len(files) > 1 else ""))

    folder = Path(config.data_dir) / name
    meta = {"name": name, "dtype": "uint16", "vocab_size": VOCAB_SIZE}
    if not config.merge:
        content, origin = tokenizer_json(config.official)
        sha256 = hashlib.sha256(content).hexdigest()
        pinned = "as pinned" if sha256 == TOKENIZER_SHA256 else "(not the pinned one)"
        print(f"tokenizer: {origin}, sha256 {sha256} {pinned}")
        encoding = load_tokenizer(config.official)
        meta |= {"tokenizer": config.official, "tokenizer_sha256": sha256}
        meta["sources"] = {"what": what, "identity": identity, "left_out": left_out}
    folder = folder / part_folder(part, parts) if config.part else folder
    started, encoded = time.perf_counter(), not config.merge and not tokenized
    try:
        with owned_folder(folder, "name"):
            meta = merge(folder) if config.merge else meta
            if not config.overwrite:
                refuse_other_text(folder, meta, META[bool(config.part)])
            if config.dataset == "shakespeare" and encoded:
                files = [folder / "input.txt"]
                fetch_shakespeare(*files)
            if encoded:
                meta, done = write_dataset(folder, config, files, encoding, meta)
            else:
                meta |= read_tokenized(files, encoding, config.val_fraction) if tokenized else {}
                put_dataset_in_place(folder, "meta.json", meta)
    except KeyboardInterrupt:
        print(f"interrupted before {folder} was complete: run the same command again", file=sys.stderr)
        sys.exit(130)
    except OSError as error:  # a write: lib/readers.py reports the files that cannot be read
        sys.exit(
            f"error: {error.filename or folder}: {error.strerror}: free some disk, or give another --name or --data_dir"
        )
    seconds = time.perf_counter() - started

    train, val, chat = meta["train"], meta["val"], "block_size" in meta
    both = {key: count + val[key] for key, count in train.items() if isinstance(count, int)}
    print((conversation_table if chat else table)({"train": train, "val": val, "both": both}))
    for line in notes(meta["sources"], "conversation" if chat else f"column {config.text_column}"):
        print(line)
    if chat:
        print(f"{folder}: {seconds:.1f} s, train with --block_size={config.block_size}")
    elif encoded:
        tokens, size = both["tokens"] - done["tokens"], both["bytes"] - done["bytes"]
        print(f"{folder}: {seconds:.1f} s, {tokens / seconds:,.0f} tokens/s, {size / 1e6 / seconds:.1f} MB/s")
    else:
        print(f"{folder / 'meta.json'}: {seconds:.1f} s, the ids stay where they are")


if __name__ == "__main__":
    main(configure(PrepareConfig))
