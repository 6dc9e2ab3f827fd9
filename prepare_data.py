"""
Turn text or conversations into token ids: data/<name>/train.bin, val.bin and meta.json.

    python prepare_data.py                                                 # Python's own standard library
    python prepare_data.py --dataset=my/notes.txt                          # a file, folder or glob: data/notes/
    python prepare_data.py --dataset=~/linux --suffixes=.c,.h              # also read these suffixes as plain text
    python prepare_data.py --dataset=roneneldan/TinyStories --max_documents=100000      # streamed from the Hub
    python prepare_data.py --dataset=python_chat                           # questions and answers about Python
    python prepare_data.py --dataset=my/chats.jsonl --block_size=1024      # conversations, in rows for train.py
    python prepare_data.py --dataset=tokenized                             # datatrove's .ds files, used as they are

    files, or rows of files or of a Hub dataset
      | read      lib/text.py: detect the encoding, find the text or the messages in each row
    documents
      | split     by the hash of each document, so duplicates never land in both train and val
    train or val
      | encode    lib/tokenizer.py, on all cores, in pieces of a few hundred kB, so memory stays flat
    ids, and masks of conversations
      | write     lib/conversations.py packs conversations into rows; lib/dataset.py describes the files
    train.bin, val.bin, meta.json (and train_mask.bin, val_mask.bin)
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

from lib.chat import chat_ids
from lib.conversations import Encoded, keep_learnable, pack_rows, write_rows
from lib.dataset import read_tokenized
from lib.errors import check, one_line_errors, usable
from lib.files import lock_folder, put_in_place, sha256_of, write_atomically
from lib.python_chat import read_python_chat
from lib.text import ROWS, TEXT_SUFFIXES, count_odd_text, find_files, hash_messages, read_documents, strip_gz, suffix_of
from lib.tokenizer import END_OF_TEXT, TOKENIZER_SHA256, VOCAB_SIZE, encode_array, load_tokenizer, tokenizer_json


@dataclass(frozen=True)
class PrepareConfig:
    """Turn text or conversations into token ids. Without flags: this Python's standard library, 12 MB, no download."""

    dataset: str = "python"  # python, python_chat, shakespeare, a file, a folder, a glob, or a Hub dataset org/name
    name: str = ""  # folder to write, inside data_dir (default: the dataset's name, or the path's stem)
    data_dir: str = "data"  # folder with all datasets; train.py reads data/
    val_fraction: float = 0.1  # share of the documents held out for validation, between 0 and 1
    suffixes: str = ""  # more suffixes of plain text, such as .c,.h,.rs; all: every text file in a folder
    text_column: str = ""  # rows: the column with the text (default: "text", if a row has no conversation)
    prompt_column: str = ""  # conversations: the user's column, if its name is not a usual one
    answer_column: str = ""  # conversations: the assistant's column; the two take precedence over text_column
    block_size: int = 512  # conversations: they are packed into rows for this block_size; train with the same one
    subset: str = ""  # Hub: the dataset's configuration, if it has several
    split: str = "train"  # Hub: the split to read; both train.bin and val.bin are made from it
    max_documents: int | None = None  # stop after this many documents, for a corpus larger than the disk
    overwrite: bool = False  # replace a dataset of the same name that was made from different text

    def __post_init__(self):
        if bool(self.prompt_column) != bool(self.answer_column):
            raise ValueError("a conversation has two columns: pass both --prompt_column and --answer_column")
        if self.name in (".", "..") or re.search(r'[/\\:*?"<>|\0]', self.name):
            raise ValueError(f"name={self.name!r}: cannot be a folder in {self.data_dir}: use one like --name=notes")


SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

PIECE_CHARS = 2**18  # characters to read and encode at a time
MAX_PIECE_CHARS = 2**22  # cut a longer piece of text even if it has no safe place to cut
MAX_LOOKAHEAD = 1_000  # documents to read ahead, to see whether both train and val get one


def find_source(config):
    """Return (the dataset's name, its files or None for the Hub, the first keys of meta.json's sources)."""
    dataset, path = config.dataset, Path(config.dataset)
    sources = {"what": dataset, "identity": os.path.realpath(path), "left_out": {}}  # identity: see main
    if dataset in ("python", "python_chat"):
        description = "questions and answers from " if dataset == "python_chat" else ""
        description += f"the standard library of Python {platform.python_version()}"
        return dataset, list_standard_library(), sources | {"what": description, "identity": dataset}
    if dataset == "shakespeare":  # downloaded later
        return dataset, [], sources | {"what": f"tiny shakespeare, {SHAKESPEARE_URL}", "identity": dataset}
    if path.is_file():
        return strip_gz(path).stem, [path], sources
    is_folder = dataset and path.is_dir()
    if is_folder and (tokenized := sorted(path.glob("*.ds"))):
        return path.resolve().name, tokenized, sources | {"what": f"datatrove's token ids in {path}"}
    if is_folder or re.search(r"[*?[]", dataset):
        folder, files, left_out = find_files(path, config.suffixes)
        if not files:
            details = ", ".join([" ".join((*TEXT_SUFFIXES, *ROWS)), *describe_changes({"left_out": left_out})])
            reject(f"{dataset}: no file to read in it ({details}): choose a different path, or add --suffixes=")
        return folder.resolve().name, files, sources | {"identity": os.path.abspath(dataset), "left_out": left_out}
    if suffix_of(path) not in (*TEXT_SUFFIXES, *ROWS) and re.fullmatch(r"\w[\w.-]*/[\w.-]+", dataset, re.ASCII):
        description = "Hub dataset " + ", ".join(filter(None, (dataset, config.subset, f"split {config.split}")))
        return path.name, None, sources | {"what": description, "identity": description}
    near = get_close_matches(dataset, ("python", "python_chat", "shakespeare"), n=1)
    choices = "use python, python_chat, shakespeare, a file, folder or glob, or a Hub dataset org/name"
    reject(f"dataset={dataset}: no such dataset or path: {f'did you mean {near[0]}?' if near else choices}")


def list_standard_library():
    """Return the .py files of the running Python's standard library, without tests and installed packages."""
    library = Path(os.__file__).parent
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    files = (path for path in library.rglob("*.py") if skipped.isdisjoint(path.relative_to(library).parts))
    return sorted(files, key=Path.as_posix)


def download_shakespeare(path):
    """Download tiny shakespeare to `path`, unless it is already there, and check its sha256."""
    if path.is_file() and sha256_of(path) == SHAKESPEARE_SHA256:
        return
    with usable(SHAKESPEARE_URL, f"save the right file as {path} yourself"):
        with urllib.request.urlopen(SHAKESPEARE_URL, timeout=10) as response:
            content = response.read()
        if hashlib.sha256(content).hexdigest() != SHAKESPEARE_SHA256:
            raise ValueError(f"its sha256 is not {SHAKESPEARE_SHA256}")
    with write_atomically(path) as file:
        file.write(content)


def hash_to_unit(document):
    """Return a document's hash as a number in [0, 1). Below val_fraction, the document goes to val."""
    return int.from_bytes(document.sha256[:8], "big") / 2**64


def split_by_hash(stream, val_fraction):
    """Return (documents, val_fraction, whether all are identical). val_fraction changes if a split would be empty."""
    ahead, is_single = [], False
    for document in stream:
        ahead.append(document)
        in_val = hash_to_unit(document) < val_fraction
        if in_val != (hash_to_unit(ahead[0]) < val_fraction) or len(ahead) == MAX_LOOKAHEAD:
            break
    else:  # the stream ended, and all its documents would go to the same split
        hashes = sorted({hash_to_unit(document) for document in ahead})
        is_single = len(hashes) == 1
        if len(hashes) > 1:
            empty = "val" if hashes[0] >= val_fraction else "train"
            tqdm.write(f"note: none of these {len(ahead)} documents fell into {empty}: the nearest one was moved there")
            val_fraction = hashes[1] if empty == "val" else hashes[-1]
    return itertools.chain(ahead, stream), val_fraction, is_single


def cut_documents(stream, val_fraction):
    """Yield documents as pieces (split, text), each closed by (split, None). The end of a single one is val."""
    stream, val_fraction, is_single = split_by_hash(stream, val_fraction)
    if is_single:
        tqdm.write("note: this is a single document: its end is held out for val")
    for document in stream:
        split = "val" if hash_to_unit(document) < val_fraction and not is_single else "train"
        border = int(document.chars * (1 - val_fraction))  # in a single document, counted from the current piece
        with document.open() as file:
            for text in cut_text(file):
                if is_single and split == "train" and border < len(text):
                    match = LAST_SAFE_CUT.match(text, 0, border + 1)
                    end = match.end() if match else border
                    yield from (("train", text[:end]), ("train", None))
                    split, text = "val", text[end:]
                border -= len(text)
                yield split, text
        yield split, None


# A safe place to cut is between a character that is not white space and a space, tab, CR or LF. The tokenizer's own
# pattern always cuts there, so the ids stay the same. It does not always cut between two lines.
LAST_SAFE_CUT = re.compile(r".*\S(?=[ \t\r\n])", re.DOTALL)


def cut_text(file):
    """Yield the text of a file in pieces of about PIECE_CHARS characters or none, cut only where no id changes."""
    rest = ""
    while block := file.read(PIECE_CHARS):
        text = rest + block
        match = LAST_SAFE_CUT.match(text, max(len(rest) - 1, 0))  # `rest` has no safe place
        forced = len(text) if len(text) >= MAX_PIECE_CHARS else 0
        end = match.end() if match else forced
        yield text[:end]
        rest = text[end:]
    yield rest


def bundle_pieces(stream):
    """Yield lists of pieces with about PIECE_CHARS characters each: enough work to hand to a thread."""
    bundle, chars = [], 0
    for split, text in stream:
        bundle.append((split, text))
        chars += len(text or "")
        if chars >= PIECE_CHARS:
            yield bundle
            bundle, chars = [], 0
    yield bundle


def encode_bundle(encoding, bundle):
    """Encode a list of pieces as {split: (bytes for the .bin, their counts, counts of odd text)}."""
    encoded = {}
    for split in {split for split, _ in bundle}:
        pieces = [text for name, text in bundle if name == split]
        ids = np.concatenate([[END_OF_TEXT] if text is None else encode_array(encoding, text) for text in pieces])
        contents = [text.encode() for text in pieces if text is not None]
        odd = count_odd_text(b"\n".join(contents))
        size = sum(map(len, contents)) - odd["no_token"]
        counts = dict(tokens=len(ids), bytes=size, documents=pieces.count(None))
        encoded[split] = ids.astype("<u2").tobytes(), counts, odd
    return encoded


def map_on_all_cores(function, items):
    """Yield function(item) for each item, in order, from threads (tiktoken releases the GIL), a few items ahead."""
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
    bundles = bundle_pieces(cut_documents(stream, config.val_fraction))
    counts = {split: collections.Counter() for split in ("train", "val")}
    with tqdm(unit="B", unit_scale=True, disable=None) as bar:  # shown on a terminal only
        for encoded in map_on_all_cores(lambda bundle: encode_bundle(encoding, bundle), bundles):
            for split, (content, added, odd) in encoded.items():
                for name, count in odd.items():
                    sources[name] += count
                files[f"{split}.bin"].write(content)
                counts[split].update(added)
                bar.update(added["bytes"])
    return counts


def write_conversations(files, stream, config, encoding, sources):
    """Write conversations to `files` as rows of block_size + 1 ids, and their masks. Return {split: counts}."""
    length = config.block_size + 1
    encoded = map_on_all_cores(lambda one: Encoded(one.sha256, *chat_ids(encoding, one.messages)), stream)
    learnable = keep_learnable(encoded, length, sources)
    learnable, val_fraction, is_single = split_by_hash(learnable, config.val_fraction)
    check(not is_single, f"{config.dataset}: holds a single conversation, which is not cut in two: add one for val")
    in_splits = (("val" if hash_to_unit(one) < val_fraction else "train", one) for one in learnable)
    return write_rows(files, pack_rows(in_splits, length), length, encoding)


def write_dataset(draft, config, files, encoding, meta):
    """Write the .bin files to the folder `draft`. meta: the first keys of meta.json. Return all of them."""
    sources = collections.defaultdict(int, meta["sources"], documents=0)
    digest = hashlib.sha256()  # of the documents' sha256s, in order

    def count_documents(stream):
        for document in itertools.islice(stream, config.max_documents):
            digest.update(document.sha256)
            sources["documents"] += 1
            yield document

    if config.dataset == "python_chat":
        stream = (hash_messages(messages, sources) for messages in read_python_chat(files))
    else:
        stream = read_documents(files, config, sources)
    stream = count_documents(stream)
    first = next(stream, None)
    check(first, f"{config.dataset}: no text in it ({'; '.join(describe_changes(sources))}): use a different --dataset")
    stream = itertools.chain([first], stream)
    has_masks = first.messages is not None
    kinds = ("", "_mask") if has_masks else ("",)
    with ExitStack() as stack:
        names = [f"{split}{kind}.bin" for split in ("train", "val") for kind in kinds]
        bins = {name: stack.enter_context(open(draft / name, "wb")) for name in names}
        if has_masks:
            meta["block_size"] = config.block_size
        elif config.block_size != PrepareConfig.block_size:
            tqdm.write("note: block_size has no effect: these rows are plain text, not conversations")
        write = write_conversations if has_masks else write_text
        counts = write(bins, stream, config, encoding, sources)
    train, val = counts["train"], counts["val"]
    if train["bytes"] and train["tokens"] < val["tokens"] and config.val_fraction <= 0.5:
        tqdm.write("note: val got more text than train, in a few long documents: the two were exchanged")
        counts = {"train": val, "val": train}
        for kind in kinds:
            for name, other in (("train", "val_"), ("val", "train"), ("val_", "val")):
                os.replace(draft / f"{name}{kind}.bin", draft / f"{other}{kind}.bin")
    changes = "; ".join(describe_changes(sources))
    check(train["bytes"] + val["bytes"], f"{config.dataset}: nothing to learn ({changes}): use a different --dataset")
    for split, change in (("train", "lower"), ("val", "raise")):
        learnable = counts[split]["bytes"] and counts[split]["tokens"] > counts[split]["documents"]
        reasons = "; ".join(["too short to split", *describe_changes(sources)])
        check(learnable, f"{config.dataset}: {split} has nothing to learn ({reasons}): {change} --val_fraction")
        for kind in kinds:
            counts[split][f"{kind}_sha256".strip("_")] = sha256_of(draft / f"{split}{kind}.bin")
    return meta | {"sources": sources | {"sha256": digest.hexdigest()}} | counts


def replace_dataset(folder, draft, meta):
    """Replace the dataset in `folder` by the files in `draft` and by meta.json. Nobody reads a mix of the two."""
    (draft / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
    for path in draft.iterdir():  # all are complete on disk before the first is renamed
        with open(path, "r+b") as file:
            os.fsync(file.fileno())
    names = ("meta.json", "train.bin", "train_mask.bin", "val.bin", "val_mask.bin")
    for name in names:
        (folder / name).unlink(missing_ok=True)
    for name in names[::-1]:  # meta.json last
        if (draft / name).exists():
            put_in_place(draft / name, folder / name)


def describe_changes(sources):
    """Yield a line for each thing that was guessed, replaced or left out on the way."""
    for encoding, group in sources.get("encodings", {}).items():
        more = f" and {group['files'] - 1:,} more" if group["files"] > 1 else ""
        yield f"read as {encoding}: {group['first']}{more}"
    if left_out := sources.get("left_out"):
        yield "left out: " + ", ".join(f"{count:,} {kind}" for kind, count in left_out.items())
    if columns := sources.get("columns"):
        not_read = ", ".join(f"{name} ({count:,} rows)" for name, count in columns["not_read"].items())
        yield f"columns: {', '.join(columns['read'])}" + (f"; not read: {not_read}" if not_read else "")
    messages = {
        "rows_left_out": f"rows were left out: {sources.get('first_row_left_out')}",
        "with_tool_calls": "conversations with tool calls were left out",
        "empty_answers": "empty answers are not learned",
        "without_an_answer": "conversations without an assistant's answer to learn were left out",
        "cut_before_the_answer": "conversations with no answer before the row's end were left out: raise --block_size",
        "empty_documents": "empty documents were left out",
        "undecodable_bytes": f"undecodable bytes became U+FFFD, the first in {sources.get('first_undecodable')}",
        "no_token": "bytes without a token were left out: rare control characters, or not assigned in Unicode",
        "<|endoftext|>": "<|endoftext|> are ordinary text here: make each document a file or a row of .jsonl",
        "<|im_start|>": "<|im_start|> are ordinary text here: write a conversation as messages, in a row of .jsonl",
        "<|im_end|>": "<|im_end|> are ordinary text here",
    }
    yield from (f"note: {sources[name]:,} {message}" for name, message in messages.items() if sources.get(name))


def main(config):
    sys.stdout.reconfigure(errors="backslashreplace")  # a file name may contain bytes that are not UTF-8
    name, files, sources = find_source(config)
    name = config.name or os.fsencode(name).decode(errors="replace") or "text"
    folder = Path(config.data_dir) / name
    tokenized = bool(files) and files[0].suffix == ".ds"
    has_rows = files is None or any(suffix_of(file) in ROWS for file in files)
    is_folder_or_glob = Path(config.dataset).is_dir() or re.search(r"[*?[]", config.dataset)
    check_used(config, not tokenized, "on token ids, which are used as they are", "max_documents")
    check_used(config, files is None, "without a dataset of the Hub", "subset", "split")
    check_used(config, is_folder_or_glob, "without a folder or a glob", "suffixes")
    check_used(config, has_rows, "without rows", "text_column", "prompt_column", "answer_column")
    check_used(config, has_rows or config.dataset == "python_chat", "without conversations", "block_size")
    print(f"text: {sources['what']}" + (f", {len(files):,} files" if files and len(files) > 1 else ""))
    print(f"tokenizer: {tokenizer_json()[1]}, sha256 {TOKENIZER_SHA256}")
    encoding = load_tokenizer()
    meta = {"name": name, "dtype": "uint16", "vocab_size": VOCAB_SIZE, "tokenizer": "base"}
    meta |= {"tokenizer_sha256": TOKENIZER_SHA256, "sources": sources}
    started = time.perf_counter()
    draft = folder / "unfinished"
    try:
        owned = lock_folder(folder, "name or --data_dir")
        with one_line_errors("lower --block_size", folder), owned, ExitStack() as at_exit:
            with suppress(OSError, ValueError, KeyError, TypeError):  # no dataset, or an unusable one
                earlier = json.loads((folder / "meta.json").read_bytes())["sources"]["identity"]
                if earlier != sources["identity"] and not config.overwrite:
                    reject(f"{folder} was made from different text, {earlier}: use a different --name=, or --overwrite")
            if config.dataset == "shakespeare":
                files = [folder / "input.txt"]
                download_shakespeare(*files)
            shutil.rmtree(draft, ignore_errors=True)  # left by a run that was killed
            draft.mkdir()
            at_exit.callback(shutil.rmtree, draft, ignore_errors=True)
            if tokenized:
                meta |= read_tokenized(files, encoding, config.val_fraction)
            else:
                meta = write_dataset(draft, config, files, encoding, meta)
            replace_dataset(folder, draft, meta)
    except KeyboardInterrupt:
        print(f"interrupted before {folder} was complete: run the same command again", file=sys.stderr)
        sys.exit(130)
    seconds = time.perf_counter() - started

    train, val, block_size = meta["train"], meta["val"], meta.get("block_size")
    both = {key: count + val[key] for key, count in train.items() if isinstance(count, int)}
    print(" " * 6 + "".join(f"{name:>16}" for name in both))
    for split, counts in (("train", train), ("val", val), ("both", both)):
        print(f"{split:<6}" + "".join(f"{counts[name]:>16,}" for name in both))
    print(f"val is {val['tokens'] / both['tokens']:.1%} of all tokens")
    for line in describe_changes(meta["sources"]):
        print(line)
    speed = f"{both['tokens'] / seconds:,.0f} tokens/s, {both['bytes'] / both['tokens']:.3f} bytes/token"
    print(f"{folder}: {seconds:.1f} s, " + (f"train with --block_size={block_size}" if block_size else speed))


if __name__ == "__main__":
    main(configure(PrepareConfig))
