"""
Text goes in; data/<name>/train.bin, val.bin and meta.json come out.

    python prepare_data.py                                                 # Python's own standard library
    python prepare_data.py --dataset=my/notes.txt                          # a file, folder or glob: data/notes/
    python prepare_data.py --dataset=roneneldan/TinyStories --max_documents=100000      # the Hub's, streamed

A .bin is a flat array of little-endian uint16 token ids, each document followed by <|endoftext|>, id 0.
Text is read, cut and encoded a few hundred kB at a time: neither a long document nor a large corpus needs
more memory than a short one.
"""

import codecs
import collections
import functools
import glob
import hashlib
import io
import itertools
import json
import os
import platform
import re
import sys
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import numpy as np
from tqdm import tqdm

from configurator import configure, reject
from official import TOKENIZER_SHA256, first_line, hub_problem, tokenizer_json
from tokenizer import END_OF_TEXT, VOCAB_SIZE, encode_array, load_tokenizer


@dataclass(frozen=True)
class PrepareConfig:
    """Turn text into token ids. Without flags: the standard library of this Python, about 12 MB, no network."""

    dataset: str = "python"  # python, shakespeare, a .txt .md .py .jsonl .parquet file, folder, glob, or Hub org/name
    name: str = ""  # the folder under data_dir; by default the dataset's own name, or the path's stem
    data_dir: str = "data"  # where that folder is; train.py reads data/
    val_fraction: float = 0.1  # share of the documents held out, between 0 and 1
    official: str = "base"  # whose tokenizer; the whole family shares one
    text_column: str = "text"  # the column of .jsonl, .parquet and Hub datasets that holds the text
    subset: str = ""  # Hub: the dataset's configuration, where it has several
    split: str = "train"  # Hub: which split to read; val is cut off it here
    max_documents: int | None = None  # stop after so many, for a corpus larger than the disk


SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".parquet")
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

CHUNK = 2**18  # characters read, and encoded, at a time
LONGEST = 2**22  # characters without a safe place to cut before they are cut anyway
PEEK = 1_000  # documents looked at ahead for one that falls into val

# ---------------------------------------------------------------------------------------------
# Which files


def find_source(config):
    """(name, what it is in words, list of files); for a Hub dataset the list is None."""
    dataset = config.dataset
    if dataset == "python":
        return dataset, f"the standard library of Python {platform.python_version()}", standard_library()
    if dataset == "shakespeare":
        return dataset, f"tiny shakespeare, {SHAKESPEARE_URL}", []  # its one file is fetched later
    path = Path(dataset).expanduser()
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            reject(f"{dataset} is not a {' '.join(SUFFIXES)} file: rename it, or convert it to .txt")
        return path.stem, dataset, [path]
    if dataset and path.is_dir():
        # In a fixed order, whatever the file system's; hidden files and folders are not the user's text.
        files = (p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts))
        return path.resolve().name, dataset, text_files(files, dataset)
    if glob.has_magic(dataset):
        folder = os.path.dirname(dataset[: re.search(r"[*?[]", dataset).start()])
        return Path(folder).resolve().name, dataset, text_files(map(Path, glob.glob(dataset, recursive=True)), dataset)
    if path.suffix.lower() not in SUFFIXES and re.fullmatch(r"\w[\w.-]*/[\w.-]+", dataset, re.ASCII):
        of = f"{config.subset}, split {config.split}" if config.subset else f"split {config.split}"
        return dataset.split("/")[1], f"Hub dataset {dataset}, {of}", None
    near = get_close_matches(dataset, ("python", "shakespeare"), n=1)
    names = "name python, shakespeare, a file, folder or glob, or a Hub dataset org/name"
    reject(f"no dataset and no path is called {dataset}: {f'did you mean {near[0]}?' if near else names}")


def text_files(paths, dataset):
    files = sorted({p for p in paths if p.suffix.lower() in SUFFIXES and p.is_file()}, key=Path.as_posix)
    return files or reject(f"{dataset} holds no {' '.join(SUFFIXES)} file: name another place")


def standard_library():
    """The .py files of the running Python, without its tests and without what was installed beside it."""
    library = Path(os.__file__).parent
    others = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    files = (p for p in library.rglob("*.py") if others.isdisjoint(p.relative_to(library).parts))
    return text_files(files, f"the standard library ({library})")


def fetch_shakespeare(path, temporary):
    """tiny shakespeare at `path`, downloaded (to `temporary` first) unless it is there; its sha256 is checked."""

    def is_it(content):
        return hashlib.sha256(content).hexdigest() == SHAKESPEARE_SHA256

    if path.is_file() and is_it(path.read_bytes()):
        return path
    try:
        with urllib.request.urlopen(SHAKESPEARE_URL, timeout=10) as answer:
            content = answer.read()
    except OSError as error:  # urllib's own errors are OSErrors too
        sys.exit(f"error: cannot reach {SHAKESPEARE_URL} ({first_line(error)}): connect, or save that file as {path}")
    if not is_it(content):
        sys.exit(f"error: {SHAKESPEARE_URL} no longer has sha256 {SHAKESPEARE_SHA256}: save the right file as {path}")
    temporary.write_bytes(content)
    os.replace(temporary, path)
    return path


# ---------------------------------------------------------------------------------------------
# Documents


@dataclass(frozen=True)
class Document:
    sha256: bytes  # of its UTF-8 text
    chars: int
    open: Callable  # () -> its text, as a file to read from

    @property
    def place(self):
        """Where its hash falls in [0, 1): below val_fraction, the document is held out."""
        return int.from_bytes(self.sha256[:8], "big") / 2**64


def measure(file):
    """(sha256, characters) of a text file, read to its end."""
    digest, chars = hashlib.sha256(), 0
    with file:
        while block := file.read(CHUNK):
            digest.update(block.encode())
            chars += len(block)
    return digest.digest(), chars


def open_text(path, errors="replace", newline=""):
    """Line ends stay as they are; a byte-order mark goes."""
    return open(path, encoding="utf-8-sig", errors=errors, newline=newline)


def documents(files, config, sources):
    """
    Every Document of the files, or of the Hub dataset where files is None. A .txt, .md or .py file is one
    document, and so is a row of the others. Empty ones are left out; `sources` counts what was odd.
    """

    def replace(error):  # as errors="replace" does, and counts
        sources["undecodable_bytes"] += error.end - error.start
        return "\ufffd", error.end

    codecs.register_error("replace and count", replace)
    for path in [config.dataset] if files is None else files:
        undecodable = sources["undecodable_bytes"]
        if files is not None and path.suffix.lower() not in ROWS:
            found = [Document(*measure(open_text(path, "replace and count")), functools.partial(open_text, path))]
        else:
            rows = hub_rows(config) if files is None else ROWS[path.suffix.lower()](path, config.text_column)
            found = (row_document(where, row, config.text_column, sources) for where, row in rows)
        for document in found:
            if document.chars:
                yield document
            else:
                sources["empty_documents"] += 1
        if sources["undecodable_bytes"] > undecodable:
            sources.setdefault("first_undecodable", str(path))


def row_document(where, row, column, sources):
    """The Document in one column of a row, a dict."""
    if not isinstance(row, dict):
        sys.exit(f"error: {where} is JSON, but no object: put one object on each line")
    if column not in row:
        sys.exit(f"error: {where} has no column {column}, but {', '.join(row) or 'none'}: name it with --text_column")
    text = "" if row[column] is None else row[column]
    if not isinstance(text, str):
        sys.exit(f"error: {where}: column {column} holds {text!r:.40}, which is no text: name another --text_column")
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON's six bytes \ud83d are half a character, which UTF-8 cannot spell
        text, halves = re.subn("[\ud800-\udfff]", "\ufffd", text)
        sources["undecodable_bytes"] += 6 * halves
    open_row = functools.partial(io.StringIO, text, newline="")
    return Document(*measure(open_row()), open_row)


def jsonl_rows(path, column):
    """(where, row) of each line that is not blank."""
    with open_text(path, "replace and count", newline="\n") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    sys.exit(f"error: {path}, line {number} is not JSON ({first_line(error)}): put one object on it")
                yield f"{path}, line {number}", row


def parquet_rows(path, column):
    """(where, row) of each row, only the one column being read if it is there."""
    try:
        import pyarrow.parquet
    except ImportError:
        sys.exit(f"error: {path} needs pyarrow to be read: pip install pyarrow")
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = [column] if column in file.schema_arrow.names else None
            for batch in file.iter_batches(batch_size=64, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # ValueError: text that is not UTF-8
        sys.exit(f"error: {path} is not a whole parquet file: {first_line(error)}")


ROWS = {".jsonl": jsonl_rows, ".parquet": parquet_rows}


def hub_rows(config):
    """(where, row) of each row of a Hub dataset, downloaded as it is read."""
    try:
        import datasets
    except ImportError:
        sys.exit(f"error: {config.dataset} is not here, and the Hub's need the datasets library: pip install datasets")
    try:
        stream = datasets.load_dataset(config.dataset, config.subset or None, split=config.split, streaming=True)
        for number, row in enumerate(stream, 1):
            yield f"{config.dataset}, row {number}", row
    except Exception as error:  # the library's own, the network's, the file formats': all end the run alike
        sys.exit(f"error: Hub dataset {config.dataset}, split {config.split}: {first_line(error)}")


# ---------------------------------------------------------------------------------------------
# Documents -> pieces of train and of val


def pieces(stream, val_fraction, sources):
    """
    (split, text) for all documents in order, cut into pieces that are encoded one by one, and (split, None)
    after the last piece of each. A hash of its content sends a document to train or to val, so one that
    occurs twice never sits in both. A lone document is cut at its last tenth (val_fraction).
    """
    ahead, alone = [], False
    for document in stream:
        ahead.append(document)
        if (document.place < val_fraction) != (ahead[0].place < val_fraction) or len(ahead) == PEEK:
            break
    else:  # few documents, and their hashes put them all on one side
        places = sorted({document.place for document in ahead})
        alone = len(places) == 1
        if alone:
            tqdm.write("note: this is a single document: its end is held out for val")
        elif places:
            short = "val" if places[0] >= val_fraction else "train"
            tqdm.write(
                f"note: no hash of these {len(ahead)} documents fell into {short}: the nearest one was put there"
            )
            val_fraction = places[1] if short == "val" else places[-1]

    for document in itertools.chain(ahead, stream):
        sources["sha256"].update(document.sha256)
        sources["documents"] += 1
        held_out = document.place < val_fraction
        # Characters before `border` go to train, those after it to val.
        border = int(document.chars * (1 - val_fraction)) if alone else 0 if held_out else document.chars
        seen = 0
        with document.open() as file:
            for text in cut(file):
                at = border - seen
                seen += len(text)
                if 0 < at < len(text) and (match := LAST_SAFE_CUT.match(text, 0, at + 1)):
                    at = match.end()
                yield "train", text[: max(at, 0)]
                yield "val", text[max(at, 0) :]
        if alone or not held_out:
            yield "train", None
        if alone or held_out:
            yield "val", None


# A text may be cut before a space, tab, CR or LF that follows no white space, and its pieces have the ids of
# the whole: the tokenizer's own pattern always cuts there. (After a line's end it does not.)
LAST_SAFE_CUT = re.compile(r".*\S(?=[ \t\r\n])", re.DOTALL)


def cut(file):
    """The text of a file in pieces of about CHUNK characters, cut only where that changes no id."""
    rest = ""
    while block := file.read(CHUNK):
        text = rest + block
        match = LAST_SAFE_CUT.match(text, max(len(rest) - 1, 0))  # there is none before
        at = match.end() if match else len(text) if len(text) >= LONGEST else 0
        if at:
            yield text[:at]
        rest = text[at:]
    if rest:
        yield rest


def bundles(stream):
    """Pieces in lists of about CHUNK characters: enough work to be worth handing to a thread."""
    batch, chars = [], 0
    for split, text in stream:
        batch.append((split, text))
        chars += len(text or "")
        if chars >= CHUNK:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


# ---------------------------------------------------------------------------------------------
# Pieces -> ids -> files


def encode_batch(encoding, batch):
    """Pieces -> {split: (bytes of the .bin, documents, bytes of text)}."""
    encoded = {}
    for split in {split for split, _ in batch}:
        texts = [text for s, text in batch if s == split]
        ids = [[END_OF_TEXT] if text is None else encode_array(encoding, text) for text in texts]
        size = sum(len(text.encode()) for text in texts if text is not None)
        encoded[split] = np.concatenate(ids).astype("<u2").tobytes(), texts.count(None), size
    return encoded


def on_all_cores(function, items):
    """map(function, items), in order, by threads (tiktoken lets go of the GIL), with few items in flight."""
    workers = os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        waiting = collections.deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) == 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def write_bins(train_path, val_path, encoded, total):
    """
    Write what encode_batch returned; returns {split: counts} as meta.json has them.
    total: bytes of text to come, where that is known, for the bar.
    """
    counts = {split: dict(tokens=0, bytes=0, documents=0) for split in ("train", "val")}
    digests = {split: hashlib.sha256() for split in counts}
    with (
        open(train_path, "wb") as train,
        open(val_path, "wb") as val,
        tqdm(total=total, unit="B", unit_scale=True, disable=None) as bar,  # on a terminal only
    ):
        for result in encoded:
            for split, (content, documents, size) in result.items():
                {"train": train, "val": val}[split].write(content)
                digests[split].update(content)
                counts[split]["tokens"] += len(content) // 2
                counts[split]["bytes"] += size
                counts[split]["documents"] += documents
                bar.update(size)
            seconds = bar.format_dict["elapsed"] or 1e-9
            bar.set_postfix_str(f"{sum(c['tokens'] for c in counts.values()) / seconds:,.0f} tokens/s", refresh=False)
        for file in (train, val):
            file.flush()
            os.fsync(file.fileno())
    return {split: counts[split] | {"sha256": digests[split].hexdigest()} for split in counts}


def table(counts):
    """The closing table, as lines of text."""
    lines = [f"{'':<8}{'documents':>12}{'tokens':>16}{'bytes':>18}{'bytes/token':>14}"]
    both = {key: counts["train"][key] + counts["val"][key] for key in ("documents", "tokens", "bytes")}
    for name, c in (counts | {"both": both}).items():
        ratio = c["bytes"] / c["tokens"]
        lines.append(f"{name:<8}{c['documents']:>12,}{c['tokens']:>16,}{c['bytes']:>18,}{ratio:>14.3f}")
    return "\n".join(lines)


def main(config):
    if not 0 < config.val_fraction < 1:
        reject(f"val_fraction={config.val_fraction} is no share: give one between 0 and 1, for example 0.1")
    if config.max_documents is not None and config.max_documents < 1:
        reject(f"max_documents={config.max_documents} leaves nothing: give 1 or more")
    name, what, files = find_source(config)
    name = config.name or name
    if name in ("", ".", "..") or re.search(r'[/\\:*?"<>|\0]', name):
        reject(f"name={name!r} cannot be a folder in {config.data_dir}: give a plain one, for example --name=notes")
    if files is None and (problem := hub_problem()):
        sys.exit(f"error: there is no path {config.dataset} here, and the Hub is out of reach ({problem}): connect")
    print(f"text: {what}" + (f", {len(files):,} files" if files and len(files) > 1 else ""))

    content, place = tokenizer_json(config.official)
    tokenizer_sha256 = hashlib.sha256(content).hexdigest()
    pinned = "as pinned" if tokenizer_sha256 == TOKENIZER_SHA256 else "(not the pinned one)"
    print(f"tokenizer: {place}, sha256 {tokenizer_sha256} {pinned}")
    encoding = load_tokenizer(config.official)

    folder = Path(config.data_dir) / name
    temporary = {file: folder / f"{file}.tmp" for file in ("train.bin", "val.bin", "meta.json")}
    sources = {"what": what, "sha256": hashlib.sha256()}  # of the documents' sha256s, in order
    sources |= {"documents": 0, "empty_documents": 0, "undecodable_bytes": 0}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if config.dataset == "shakespeare":
            files = [fetch_shakespeare(folder / "input.txt", temporary["train.bin"])]
        plain = files and config.max_documents is None and not any(f.suffix.lower() in ROWS for f in files)
        total = sum(file.stat().st_size for file in files) if plain else None

        started = time.perf_counter()
        stream = itertools.islice(documents(files, config, sources), config.max_documents)
        work = bundles(pieces(stream, config.val_fraction, sources))
        encoded = on_all_cores(functools.partial(encode_batch, encoding), work)
        counts = write_bins(temporary["train.bin"], temporary["val.bin"], encoded, total)
        seconds = time.perf_counter() - started

        if not sources["documents"]:
            sys.exit(f"error: {config.dataset} holds no text: every document is empty")
        for split, other in (("train", "lower"), ("val", "raise")):
            if counts[split]["tokens"] == counts[split]["documents"]:
                sys.exit(f"error: {config.dataset} is too short to be split, {split} is empty: {other} val_fraction")

        sources["sha256"] = sources["sha256"].hexdigest()
        meta = {"name": name, "dtype": "uint16", "vocab_size": VOCAB_SIZE, "tokenizer_sha256": tokenizer_sha256}
        meta |= {"sources": sources} | counts
        temporary["meta.json"].write_text(json.dumps(meta, indent=2) + "\n")
        # Whenever meta.json exists, it tells the truth: the old one goes first and the new one comes last.
        (folder / "meta.json").unlink(missing_ok=True)
        for file, path in temporary.items():
            os.replace(path, folder / file)
    except KeyboardInterrupt:
        print(f"interrupted before {folder} was complete: run it again", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        if error.filename is None:  # a write: opening a file would have named it
            sys.exit(f"error: cannot write to {folder} ({error.strerror}): free some space, or set --data_dir")
        sys.exit(f"error: {error.filename}: {error.strerror}")
    finally:
        with suppress(OSError):
            for path in temporary.values():
                path.unlink(missing_ok=True)
            folder.rmdir()  # only if nothing is in it

    if sources["empty_documents"]:
        print(f"note: {sources['empty_documents']:,} empty documents were left out")
    if bad := sources["undecodable_bytes"]:
        print(f"note: {bad:,} bytes that are not UTF-8 became U+FFFD, the first in {sources['first_undecodable']}")
    print(table(counts))
    tokens, size = (counts["train"][key] + counts["val"][key] for key in ("tokens", "bytes"))
    print(f"{folder}: {seconds:.1f} s, {tokens / seconds:,.0f} tokens/s, {size / 1e6 / seconds:.1f} MB/s")


if __name__ == "__main__":
    main(configure(PrepareConfig))
