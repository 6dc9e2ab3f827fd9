"""
Text or conversations go in; data/<name>/train.bin, val.bin and meta.json come out.

    python prepare_data.py                                                 # Python's own standard library
    python prepare_data.py --dataset=my/notes.txt                          # a file, folder or glob: data/notes/
    python prepare_data.py --dataset=~/linux --suffixes=.c,.h              # these suffixes are plain text, too
    python prepare_data.py --dataset=roneneldan/TinyStories --max_documents=100000      # streamed from the Hub
    python prepare_data.py --dataset=python_chat                           # questions and answers about Python
    python prepare_data.py --dataset=my/chats.jsonl --block_size=1024      # conversations, in rows for train.py
    python prepare_data.py --dataset=tokenized                             # datatrove's .ds files, as they are

lib/text.py reads the files, lib/conversations.py packs conversations, and lib/dataset.py describes the result. Text is
read, cut and encoded a few hundred kB at a time, so memory grows neither with a document nor with the corpus.
"""

import collections
import hashlib
import itertools
import json
import os
import platform
import re
import shutil
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from configurator import check_used, configure, reject

import numpy as np
from tqdm import tqdm

from lib.conversations import encode_conversations, packed, with_answers, write_rows
from lib.dataset import read_tokenized
from lib.errors import one_line_errors, usable
from lib.files import owned_folder, put_in_place, sha256_of, written_whole
from lib.python_chat import python_chat
from lib.text import CHUNK, PLAIN, ROWS, conversation, decompressed_name, documents, find_files, odd_text, suffix_of
from lib.tokenizer import END_OF_TEXT, VOCAB_SIZE, encode_array, load_tokenizer, tokenizer_json


@dataclass(frozen=True)
class PrepareConfig:
    """Text or conversations -> token ids. Without flags: this Python's standard library, 12 MB, no network needed."""

    dataset: str = "python"  # python, python_chat, shakespeare, a file, a folder, a glob, or a Hub dataset org/name
    name: str = ""  # the folder to write under data_dir; by default the dataset's own name, or the path's stem
    data_dir: str = "data"  # the folder that holds all datasets; train.py reads data/
    val_fraction: float = 0.1  # share of the documents held out for validation, between 0 and 1
    suffixes: str = ""  # further suffixes of plain text: .c,.h,.rs; all takes every text file of a folder
    text_column: str = ""  # rows: the column that holds the text; by default "text", if a row has no conversation
    prompt_column: str = ""  # conversations: the column of the user's words, if its name is not a usual one
    answer_column: str = ""  # conversations: the column of the assistant's; the two go before text_column
    block_size: int = 512  # conversations: they are packed into rows for this block_size; train.py must use the same
    subset: str = ""  # Hub: the dataset's configuration, if it has several
    split: str = "train"  # Hub: which split to read; train.bin and val.bin are both made from it
    max_documents: int | None = None  # stop after this many documents, for a corpus larger than the disk
    overwrite: bool = False  # replace a dataset of the same name that was made from another text

    def __post_init__(self):
        if bool(self.prompt_column) != bool(self.answer_column):
            raise ValueError("a conversation has two columns: give both --prompt_column and --answer_column")
        if self.name in (".", "..") or re.search(r'[/\\:*?"<>|\0]', self.name):
            raise ValueError(f"name={self.name!r}: cannot be a folder in {self.data_dir}: give one like --name=notes")


SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

LONGEST = 2**22  # characters: a text without a safe place to cut is cut after this many anyway
PEEK = 1_000  # documents: read at most this many ahead, to see whether both train and val get one

# ---------------------------------------------------------------------------------------------
# Which files


def find_source(config):
    """
    Return what --dataset= names: (the dataset's name, its files or None for the Hub, the first keys of meta.json's
    sources). Of these `identity` names the text: two with one name and another identity would overwrite each other.
    """
    dataset, path = config.dataset, Path(config.dataset)
    sources = {"what": dataset, "identity": os.path.realpath(path), "left_out": {}}
    if dataset in ("python", "python_chat"):
        about = "questions and answers from " if dataset == "python_chat" else ""
        about += f"the standard library of Python {platform.python_version()}"
        return dataset, standard_library(), sources | {"what": about, "identity": dataset}
    if dataset == "shakespeare":  # its one file is downloaded later
        return dataset, [], sources | {"what": f"tiny shakespeare, {SHAKESPEARE_URL}", "identity": dataset}
    if path.is_file():
        return decompressed_name(path).stem, [path], sources
    is_folder = dataset and path.is_dir()
    if is_folder and (tokenized := sorted(path.glob("*.ds"))):
        return path.resolve().name, tokenized, sources | {"what": f"datatrove's token ids in {path}"}
    if is_folder or re.search(r"[*?[]", dataset):
        folder, files, left_out = find_files(path, config.suffixes)
        if not files:
            about = ", ".join([" ".join((*PLAIN, *ROWS)), *notes({"left_out": left_out})])
            reject(f"{dataset}: no file to read in it ({about}): name another place, or more with --suffixes=")
        return folder.resolve().name, files, sources | {"identity": os.path.abspath(dataset), "left_out": left_out}
    if suffix_of(path) not in (*PLAIN, *ROWS) and re.fullmatch(r"\w[\w.-]*/[\w.-]+", dataset, re.ASCII):
        about = f"Hub dataset {dataset}, {f'{config.subset}, ' if config.subset else ''}split {config.split}"
        return path.name, None, sources | {"what": about, "identity": about}
    near = get_close_matches(dataset, ("python", "python_chat", "shakespeare"), n=1)
    names = "name python, python_chat, shakespeare, a file, folder or glob, or a Hub dataset org/name"
    reject(f"dataset={dataset}: no such dataset or path: {f'did you mean {near[0]}?' if near else names}")


def standard_library():
    """Return the .py files of the running Python's standard library, without tests and installed packages."""
    library = Path(os.__file__).parent
    others = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    files = (path for path in library.rglob("*.py") if others.isdisjoint(path.relative_to(library).parts))
    return sorted(files, key=Path.as_posix)


def fetch_shakespeare(path):
    """Download tiny shakespeare to `path`, unless it is there already. Either way its sha256 is checked."""
    if path.is_file() and sha256_of(path) == SHAKESPEARE_SHA256:
        return
    with usable(SHAKESPEARE_URL, f"save the right file as {path} yourself"):
        with urllib.request.urlopen(SHAKESPEARE_URL, timeout=10) as answer:
            content = answer.read()
        if hashlib.sha256(content).hexdigest() != SHAKESPEARE_SHA256:
            raise ValueError(f"its sha256 is not {SHAKESPEARE_SHA256}")
    with written_whole(path) as file:
        file.write(content)


# ---------------------------------------------------------------------------------------------
# Documents -> pieces of train and of val


def split_by_hash(stream, val_fraction):
    """
    Return (the documents again, val_fraction, alone). A document goes to val if its place(document) is below
    val_fraction, so a duplicate is never in both. If train or val would get none, another val_fraction is returned that
    gives it the nearest one. alone: they are all one and the same document.
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


def pieces(stream, val_fraction):
    """
    Cut documents into short texts to be encoded one by one. Yield (split, text) in order, and (split, None) at the end
    of each document. A single document is cut in two: its last tenth (val_fraction) goes to val.
    """
    stream, val_fraction, alone = split_by_hash(stream, val_fraction)
    if alone:
        tqdm.write("note: this is a single document: its end is held out for val")
    for document in stream:
        split = "val" if place(document) < val_fraction and not alone else "train"
        border = int(document.chars * (1 - val_fraction))  # of a single document, in characters from here
        with document.open() as file:
            for text in cut(file):
                if alone and split == "train" and border < len(text):
                    match = LAST_SAFE_CUT.match(text, 0, border + 1)
                    at = match.end() if match else border
                    yield from (("train", text[:at]), ("train", None))
                    split, text = "val", text[at:]
                border -= len(text)
                yield split, text
        yield split, None


def place(document):
    """Return a document's hash as a number in [0, 1). The document goes to val if this is below val_fraction."""
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


def bundles(stream):
    """Yield lists of pieces, about CHUNK characters each: enough work to be worth handing to a thread."""
    bundle, chars = [], 0
    for split, text in stream:
        bundle.append((split, text))
        chars += len(text or "")
        if chars >= CHUNK:
            yield bundle
            bundle, chars = [], 0
    if bundle:
        yield bundle


# ---------------------------------------------------------------------------------------------
# Pieces -> ids -> files


def encode_bundle(encoding, bundle):
    """Encode a list of pieces as {split: (bytes for the .bin, number of documents, bytes of text, odd_text)}."""
    encoded = {}
    for split in {split for split, _ in bundle}:
        texts = [text for s, text in bundle if s == split]
        ids = [[END_OF_TEXT] if text is None else encode_array(encoding, text) for text in texts]
        contents = [text.encode() for text in texts if text is not None]
        odd = odd_text(b"\n".join(contents))
        size = sum(map(len, contents)) - odd["no_token"]
        encoded[split] = np.concatenate(ids).astype("<u2").tobytes(), texts.count(None), size, odd
    return encoded


def on_all_cores(function, items):
    """Do map(function, items) on threads (tiktoken releases the GIL), a few items ahead, so that memory stays flat."""
    workers = os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        waiting = collections.deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) == 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def write_text(files, stream, config, encoding, sources):
    """Write documents of text to train.bin and val.bin, which are open in `files`. Return {split: counts}."""
    work = bundles(pieces(stream, config.val_fraction))
    counts = {split: dict(tokens=0, bytes=0, documents=0) for split in ("train", "val")}
    with tqdm(unit="B", unit_scale=True, disable=None) as bar:  # shown on a terminal only
        for encoded in on_all_cores(lambda bundle: encode_bundle(encoding, bundle), work):
            for split, (content, documents, size, odd) in encoded.items():
                for name, count in odd.items():
                    sources[name] += count
                files[f"{split}.bin"].write(content)
                counts[split]["tokens"] += len(content) // 2
                counts[split]["bytes"] += size
                counts[split]["documents"] += documents
                bar.update(size)
    return counts


def write_conversations(files, stream, config, encoding, sources):
    """Write conversations to `files` as rows of block_size + 1 ids, and their masks. Return {split: counts}."""
    length = config.block_size + 1
    work = iter(lambda: list(itertools.islice(stream, 64)), [])
    encoded = on_all_cores(lambda batch: encode_conversations(encoding, batch), work)
    learnable = with_answers(itertools.chain.from_iterable(encoded), length, sources)
    learnable, val_fraction, alone = split_by_hash(learnable, config.val_fraction)
    if alone:
        sys.exit(f"error: {config.dataset}: holds a single conversation, which is not cut in two: add one for val")
    in_splits = (("val" if place(one) < val_fraction else "train", one) for one in learnable)
    return write_rows(files, packed(in_splits, length), length, encoding)


def write_dataset(draft, config, files, encoding, meta):
    """Write the .bin files to the folder `draft`. meta: the first keys of meta.json. Return all of them."""
    sources = collections.defaultdict(int, meta["sources"], documents=0)
    digest = hashlib.sha256()  # of the documents' sha256s, in order

    def counted(stream):
        for document in itertools.islice(stream, config.max_documents):
            digest.update(document.sha256)
            sources["documents"] += 1
            yield document

    if config.dataset == "python_chat":
        stream = counted(conversation(messages, sources) for messages in python_chat(files))
    else:
        stream = counted(documents(files, config, sources))
    first = next(stream, None)
    if first is None:
        sys.exit(f"error: {config.dataset}: no text in it ({'; '.join(notes(sources))}): name another --dataset")
    stream = itertools.chain([first], stream)
    kinds = ("",) if first.messages is None else ("", "_mask")
    with ExitStack() as stack:
        names = [f"{split}{kind}.bin" for split in ("train", "val") for kind in kinds]
        bins = {name: stack.enter_context(open(draft / name, "wb")) for name in names}
        if first.messages is None:
            counts = write_text(bins, stream, config, encoding, sources)
        else:
            meta["block_size"] = config.block_size
            counts = write_conversations(bins, stream, config, encoding, sources)
    train, val = counts["train"], counts["val"]
    if train["bytes"] and train["tokens"] < val["tokens"] and config.val_fraction <= 0.5:
        tqdm.write("note: val got more text than train, in a few long documents: the two were exchanged")
        counts = {"train": val, "val": train}
        for kind in kinds:
            for name, other in (("train", "val_"), ("val", "train"), ("val_", "val")):
                os.replace(draft / f"{name}{kind}.bin", draft / f"{other}{kind}.bin")
    if not train["bytes"] + val["bytes"]:
        sys.exit(f"error: {config.dataset}: nothing to learn ({'; '.join(notes(sources))}): name another --dataset")
    for split, other in (("train", "lower"), ("val", "raise")):
        if not counts[split]["bytes"] or counts[split]["tokens"] == counts[split]["documents"]:
            reasons = "; ".join(["too short to split", *notes(sources)])
            sys.exit(f"error: {config.dataset}: {split} has nothing to learn ({reasons}): {other} --val_fraction")
        for kind in kinds:
            counts[split][f"{kind}_sha256".strip("_")] = sha256_of(draft / f"{split}{kind}.bin")
    return meta | {"sources": sources | {"sha256": digest.hexdigest()}} | counts


def replace_dataset(folder, draft, meta):
    """
    Replace the dataset in `folder` by the files in the folder `draft` and by meta.json. All are complete on the disk
    before the first is renamed. Until the last is renamed there is no meta.json, so no one reads a mix of two datasets.
    """
    (draft / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
    for path in draft.iterdir():
        with open(path, "r+b") as file:
            os.fsync(file.fileno())
    names = ("meta.json", "train.bin", "train_mask.bin", "val.bin", "val_mask.bin")
    for name in names:
        (folder / name).unlink(missing_ok=True)
    for name in names[::-1]:
        if (draft / name).exists():
            put_in_place(draft / name, folder / name)


def notes(sources):
    """Yield what happened to the text on its way, as lines of text."""
    for encoding, same in sources.get("encodings", {}).items():
        others = f" and {same['files'] - 1:,} more" if same["files"] > 1 else ""
        yield f"read as {encoding}: {same['first']}{others}"
    if left_out := sources.get("left_out"):
        yield "left out: " + ", ".join(f"{count:,} {kind}" for kind, count in left_out.items())
    if columns := sources.get("columns"):
        others = ", ".join(f"{name} ({count:,} rows)" for name, count in columns["not_read"].items())
        yield f"columns: {', '.join(columns['read'])}" + (f"; not read: {others}" if others else "")
    row, broken = sources.get("first_row_left_out"), sources.get("first_undecodable")
    texts = {
        "rows_left_out": f"rows were left out: {row}",
        "with_tool_calls": "conversations with tool calls were left out",
        "empty_answers": "empty answers are not learned",
        "without_an_answer": "conversations without an assistant's answer to learn were left out",
        "cut_before_the_answer": "conversations with no answer before the row's end were left out: raise --block_size",
        "empty_documents": "empty documents were left out",
        "undecodable_bytes": f"bytes that cannot be decoded became U+FFFD, the first in {broken}",
        "no_token": "bytes that have no token were left out: rare control characters, or not assigned in Unicode",
        "<|endoftext|>": "<|endoftext|> are ordinary text here: make each document a file or a row of .jsonl",
        "<|im_start|>": "<|im_start|> are ordinary text here: write a conversation as messages, in a row of .jsonl",
        "<|im_end|>": "<|im_end|> are ordinary text here",
    }
    yield from (f"note: {sources[name]:,} {text}" for name, text in texts.items() if sources.get(name))


def main(config):
    sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may be bytes that are not UTF-8
    name, files, sources = find_source(config)
    name = config.name or os.fsencode(name).decode(errors="replace") or "text"
    folder = Path(config.data_dir) / name
    tokenized = bool(files) and files[0].suffix == ".ds"
    if tokenized and config.max_documents:
        reject(f"{config.dataset}: holds token ids, which are taken as they are: leave --max_documents out")
    has_rows = files is None or any(suffix_of(file) in ROWS for file in files)
    listed = Path(config.dataset).is_dir() or re.search(r"[*?[]", config.dataset)
    check_used(config, files is None, "without a dataset of the Hub", "subset", "split")
    check_used(config, listed, "without a folder or a glob", "suffixes")
    check_used(config, has_rows, "without rows", "text_column", "prompt_column", "answer_column")
    check_used(config, has_rows or config.dataset == "python_chat", "without conversations", "block_size")
    print(f"text: {sources['what']}" + (f", {len(files):,} files" if files and len(files) > 1 else ""))
    content, origin = tokenizer_json()
    sha256 = hashlib.sha256(content).hexdigest()
    print(f"tokenizer: {origin}, sha256 {sha256}")
    encoding = load_tokenizer()
    meta = {"name": name, "dtype": "uint16", "vocab_size": VOCAB_SIZE, "tokenizer": "base", "tokenizer_sha256": sha256}
    meta |= {"sources": sources}
    started = time.perf_counter()
    draft = folder / "unfinished"
    try:
        owned = owned_folder(folder, "name or --data_dir")
        with one_line_errors("lower --block_size", folder), owned, ExitStack() as at_the_end:
            with suppress(OSError, ValueError, KeyError, TypeError):  # no dataset, or none that could be used
                earlier = json.loads((folder / "meta.json").read_bytes())["sources"]["identity"]
                if earlier != sources["identity"] and not config.overwrite:
                    reject(f"{folder} was made from another text, {earlier}: give another --name=, or --overwrite")
            if config.dataset == "shakespeare":
                files = [folder / "input.txt"]
                fetch_shakespeare(*files)
            shutil.rmtree(draft, ignore_errors=True)  # of a run that was killed
            draft.mkdir()
            at_the_end.callback(shutil.rmtree, draft, ignore_errors=True)
            if tokenized:
                meta |= read_tokenized(files, encoding, config.val_fraction)
            else:
                meta = write_dataset(draft, config, files, encoding, meta)
            replace_dataset(folder, draft, meta)
    except KeyboardInterrupt:
        print(f"interrupted before {folder} was complete: run the same command again", file=sys.stderr)
        sys.exit(130)
    seconds = time.perf_counter() - started

    train, val, rows = meta["train"], meta["val"], meta.get("block_size")
    both = {key: count + val[key] for key, count in train.items() if isinstance(count, int)}
    print(" " * 6 + "".join(f"{name:>16}" for name in both))
    for split, counts in (("train", train), ("val", val), ("both", both)):
        print(f"{split:<6}" + "".join(f"{counts[name]:>16,}" for name in both))
    print(f"val is {val['tokens'] / both['tokens']:.1%} of all tokens")
    for line in notes(meta["sources"]):
        print(line)
    speed = f"{both['tokens'] / seconds:,.0f} tokens/s, {both['bytes'] / both['tokens']:.3f} bytes/token"
    print(f"{folder}: {seconds:.1f} s, " + (f"train with --block_size={rows}" if rows else speed))


if __name__ == "__main__":
    main(configure(PrepareConfig))
