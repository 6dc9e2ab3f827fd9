"""
Text in: a file, a folder, a glob or a Hub dataset -> documents, each a text or a conversation.

    folder, files, left_out = find_files(Path("linux"), suffixes=".c,.h")
    for document in documents(files, config, sources):
        with document.open() as file: text = file.read()

`sources` is a dict that counts what happened on the way; meta.json keeps it. A format of plain text is a suffix in
PLAIN, a format with rows a function in ROWS. A reader holds a block of text or a few rows; only .json is read whole.
"""

import codecs
import collections
import contextlib
import csv
import functools
import hashlib
import io
import itertools
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import charset_normalizer
import fsspec

from lib.errors import usable

CHUNK = 2**18  # characters read at a time
SAMPLE = 2**20  # bytes that decide the encoding of a file
PATIENCE = 1_000  # if so many rows at the start of the only source have no text, the others are not read
HINT = "get the file again, or leave it out"

PLAIN = (".txt", ".md", ".py", ".html", ".htm", ".rst", ".tex", ".xml", ".log", ".srt")
COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}  # fsspec's names
OTHERS = {"node_modules", "site-packages", "dist-packages", "__pycache__", "venv", "vendor", "third_party"}  # folders


class Document(NamedTuple):
    sha256: bytes  # of its text in UTF-8, or of its messages
    chars: int
    open: Callable | None  # () -> its text, as a file to read from; None for a conversation
    messages: list | None = None  # of a conversation: {"role": str, "content": str} each


# ---------------------------------------------------------------------------------------------
# Which files


def find_files(path, suffixes=""):
    """
    Return (folder, files, left_out) of a folder or a glob: where its files are, those that can be read, sorted, and
    the number of the others by suffix. A file without a suffix, or with "all" among the suffixes any file, is taken if
    it is text. Hidden files and OTHERS are left out, unless the glob names them.
    """
    folder = path if path.is_dir() else next(parent for parent in path.parents if parent.exists())
    pattern = Path("**/*") if path.is_dir() else path.relative_to(folder)
    added = added_suffixes(suffixes)
    wanted = {*PLAIN, *ROWS, *added, suffix_of(pattern)} - {""}
    files, left_out = [], collections.Counter()
    for file in filter(Path.is_file, sorted(folder.glob(str(pattern)), key=Path.as_posix)):
        parts = [part for part in file.relative_to(folder).parts if part not in pattern.parts]
        other = next((part for part in parts if part.startswith(".") or part in OTHERS), None)
        suffix = suffix_of(file)
        if not other and (suffix in wanted or (suffix == "" or ".all" in added) and encoding_of(file)):
            files.append(file)
        else:
            left_out[other or suffix or "binary without a suffix"] += 1
    return folder, files, dict(left_out.most_common())


def added_suffixes(suffixes):
    """Return {".c", ".h"} for the setting "c, .h". With "all", .json is plain text too: programs have no rows."""
    added = {f".{name.strip().lower().lstrip('.')}" for name in suffixes.split(",") if name.strip()}
    return added | {".json"} if ".all" in added else added


def decompressed_name(path):
    """Return notes.txt for notes.txt.gz, and for notes.txt."""
    return path.with_suffix("") if path.suffix.lower() in COMPRESSED else path


def suffix_of(path):
    """Return the suffix that decides how a file is read: ".jsonl" for a.JSONL.gz."""
    return decompressed_name(path).suffix.lower()


# ---------------------------------------------------------------------------------------------
# Bytes -> text

MARKS = {  # UTF-32 first, because one of its marks begins with one of UTF-16's
    "utf-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
    "utf-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}


def opened(path, mode="rt", encoding=None, errors="replace"):
    """Open a file, decompressed, in a with statement. Line ends stay as they are."""
    return fsspec.open(str(path), mode, COMPRESSED.get(path.suffix.lower()), encoding, errors, newline="")


def encoding_of(path):
    """Return a byte-order mark's encoding, or UTF-8, or charset-normalizer's best guess, or None for a binary."""
    with usable(path, HINT), opened(path, "rb") as file:
        head = file.read(SAMPLE)
        for encoding, marks in MARKS.items():
            if head.startswith(marks):
                return encoding
        if b"\0" in head:
            return None
        while head.isascii() and (more := file.read(SAMPLE)):  # ASCII is the same in every encoding
            head = more
    text = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode(head, final=len(head) < SAMPLE)
    wrong, beyond_ascii = len(re.findall("[\udc80-\udcff]", text)), len(re.findall("[^\0-\x7f]", text))
    if 2 * wrong <= beyond_ascii:  # UTF-8, perhaps with a few broken characters
        return "utf-8-sig"
    lines = re.findall(rb"[^\n]*[\x80-\xff][^\n]*", head)
    best = charset_normalizer.from_bytes(b"\n".join(lines[:1000])).best()
    return best and best.encoding


@contextlib.contextmanager
def open_text(path, sources):
    """Open a text file in its own encoding. Bytes that are not in it become U+FFFD, and `sources` counts them."""
    if not (encoding := encoding_of(path)):
        sys.exit(f"error: {path}: a binary file, not text: convert it to text (pandoc, pdftotext), or leave it out")
    if encoding != "utf-8-sig":
        name = encoding if encoding in MARKS else f"{encoding}, guessed"
        sources.setdefault("encodings", {}).setdefault(name, {"files": 0, "first": str(path)})["files"] += 1

    def replace(error):  # like errors="replace", and counts
        sources["undecodable_bytes"] += error.end - error.start
        return "\ufffd", error.end

    codecs.register_error("replace and count", replace)
    with usable(path, HINT), opened(path, encoding=encoding, errors="replace and count") as file:
        yield file


def read_text(path, sources):
    """Return the whole text of a file. sources: a Counter, or a dict as in `documents`."""
    with open_text(path, sources) as file:
        return file.read()


# ---------------------------------------------------------------------------------------------
# Text -> rows: each function yields (where, row)


def jsonl_rows(path, column, sources):
    with open_text(path, sources) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"{path}, line {number}"
                with usable(where, "put one JSON object on each line"):
                    row = json.loads(line)
                yield where, row


def json_rows(path, column, sources):
    """Yield the items of an array, or the objects that follow one another."""
    text, number, at = read_text(path, sources).strip(), itertools.count(1), 0
    while at < len(text):
        with usable(path, "repair the JSON, or leave the file out"):
            value, end = json.JSONDecoder().raw_decode(text, at)
        at = re.compile(r"\s*").match(text, end).end()
        for row in value if isinstance(value, list) else [value]:
            yield f"{path}, item {next(number)}", row


def csv_rows(path, column, sources):
    csv.field_size_limit(2**31 - 1)
    with open_text(path, sources) as file:
        header = file.readline()
        # Where the comma is the decimal point, spreadsheets write semicolons.
        delimiter = "\t" if suffix_of(path) == ".tsv" else max(",;", key=header.count)
        lines = csv.reader(itertools.chain([header], file), delimiter=delimiter, strict=True)
        names = next(lines, [])
        for record in filter(None, lines):
            yield f"{path}, line {lines.line_num}", dict(zip(names, record, strict=False))


def parquet_rows(path, column, sources):
    with usable(path, "pip install pyarrow"):
        import pyarrow.parquet
    with usable(path, HINT), pyarrow.parquet.ParquetFile(path) as file:
        columns = [column] if column in file.schema_arrow.names else None
        batches = file.iter_batches(batch_size=64, columns=columns)
        for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), 1):
            yield f"{path}, row {number}", row


ROWS = {
    ".jsonl": jsonl_rows, ".ndjson": jsonl_rows, ".json": json_rows, ".csv": csv_rows, ".tsv": csv_rows,
    ".parquet": parquet_rows,
}  # fmt: skip


def read_rows(path, column="", sources=None):
    """Yield (where, row) for each row of a file. column: if a .parquet file has it, no other column is read."""
    return ROWS[suffix_of(path)](path, column, collections.Counter() if sources is None else sources)


def read_hub_rows(name, subset, split, hint, streaming=True):
    """
    Yield (where, row) for each row of a Hub dataset, downloaded as they are read. Without streaming the whole split is
    downloaded first, into the cache of the datasets library, which works offline. hint: what to do if that fails.
    """
    from lib.official import constants, hub_problem  # here, so that `import lib.text` loads no Hub client

    where = f"Hub dataset {name}, split {split}"
    if (problem := hub_problem()) and (streaming or not constants.HF_HUB_OFFLINE):
        sys.exit(f"error: {name}: no such path, and the Hub cannot be reached ({problem}): {hint}")
    with usable(where, "pip install datasets"):
        import datasets
    with usable(where, hint):
        for number, row in enumerate(datasets.load_dataset(name, subset or None, split=split, streaming=streaming), 1):
            yield f"{name}, row {number}", row


# ---------------------------------------------------------------------------------------------
# Files and rows -> documents

ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names: the template's
LISTS = ("messages", "conversations")  # columns that hold a list of messages; the second is ShareGPT's
PAIRS = (("instruction", "output"), ("prompt", "completion"), ("question", "answer"))  # columns; the first are Alpaca's


def messages_of(row, config):
    """
    Return the conversation in a row, a dict, as a list of {"role": str, "content": str}, or None if it holds none.
    Raise ValueError if it cannot be read. If config.prompt_column is set, only it and config.answer_column count.
    """
    for column in () if config.prompt_column else LISTS:
        if row.get(column) is None:
            continue
        if not isinstance(row[column], list):
            raise ValueError(f"column {column} holds {row[column]!r:.40}, not a list of messages")
        messages = []
        for number, message in enumerate(row[column], 1):
            where = f"column {column}, message {number}"
            pair = message if isinstance(message, dict) else {}
            names = ("role", "content") if pair.get("role") is not None else ("from", "value")
            role, content = map(pair.get, names)
            if not isinstance(role, str):
                raise ValueError(f"{where} is {message!r:.60}, not a role and a content")
            messages.append({"role": ROLES.get(role, role), "content": text_of(content, where)})
        return messages
    for prompt, answer in [(config.prompt_column, config.answer_column)] if config.prompt_column else PAIRS:
        if row.get(prompt) is not None and row.get(answer) is not None:
            question, reply = text_of(row[prompt], prompt), text_of(row[answer], answer)
            if prompt == "instruction" and (more := text_of(row.get("input"), "input")):
                question = f"{question}\n\n{more}"
            return [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]


def text_of(content, where):
    """Return a content as one text: a text, null (a call of a tool has no words), or a list of parts of text."""
    parts = content if isinstance(content, list) else [] if content is None else [content]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{where} holds {content!r:.60}, not text")
    return "".join(texts)


def documents(files, config, sources):
    """
    Yield the Documents of all files, in order; files=None reads the Hub dataset config.dataset. A file of plain text is
    one document, and so is each row of the others. Documents without text, and rows without a document, are counted in
    `sources` and left out. All documents are text or all are conversations: else the program ends with one line.
    """
    kind = None
    for where, item in files_and_rows(files, config, sources):
        try:
            document = text_document(item, sources) if isinstance(item, Path) else row_document(item, config, sources)
        except ValueError as error:
            lost = sources["rows_without_column"] = sources.get("rows_without_column", 0) + 1
            sources.setdefault("first_without_column", f"{where}: {error}")
            if lost == PATIENCE and kind is None and (files is None or len(files) == 1):
                break
            continue
        if sources["undecodable_bytes"]:
            sources.setdefault("first_undecodable", str(where))
        if not document.chars:
            sources["empty_documents"] += 1
            continue
        this = "text" if document.messages is None else "a conversation"
        if kind not in (None, this):
            sys.exit(f"error: {where}: is {this}, but {kind} came before it: name a file or a glob of one kind")
        kind = this
        yield document
    if kind is None and sources.get("rows_without_column"):
        hint = "name the text's column with --text_column, or a conversation's with --prompt_column, --answer_column"
        sys.exit(f"error: {sources['first_without_column']}: {hint}")


def files_and_rows(files, config, sources):
    """Yield (path, path) for a file of plain text, and (where, row) for each row of the others."""
    plain, column = added_suffixes(config.suffixes), "" if config.prompt_column else config.text_column
    if files is None:
        hint = "check its page on the Hub, --subset, --split, the connection"
        yield from read_hub_rows(config.dataset, config.subset, config.split, hint)
    for path in files or ():
        rows = suffix_of(path) in ROWS and suffix_of(path) not in plain
        yield from read_rows(path, column, sources) if rows else [(path, path)]


def text_document(path, sources):
    """Return the whole file as one Document. It is read twice: here to hash it, later to encode it."""
    digest, chars = hashlib.sha256(), 0
    with open_text(path, sources) as file:
        while block := file.read(CHUNK):
            digest.update(block.encode())
            chars += len(block)
    return Document(digest.digest(), chars, functools.partial(opened, path, encoding=file.encoding))


def row_document(row, config, sources):
    """Return a row as a Document: text if it has config.text_column, else a conversation. If neither, ValueError."""
    column = config.text_column
    row = {column: row} if isinstance(row, str) else row
    if not isinstance(row, dict):
        raise ValueError(f"is {row!r:.40}, not an object with columns")
    if column in row and not config.prompt_column:
        if not isinstance(row[column], str | None):
            raise ValueError(f"column {column} holds {row[column]!r:.40}, not text")
        text = without_halves(row[column] or "", sources)
        return Document(hashlib.sha256(text.encode()).digest(), len(text), lambda: io.StringIO(text, newline=""))
    if (messages := messages_of(row, config)) is None:
        wanted = " and ".join(filter(None, (config.prompt_column, config.answer_column))) or column
        raise ValueError(f"no column {wanted}, only {', '.join(map(str, row))}")
    return conversation(messages, sources)


def conversation(messages, sources):
    """Return a list of {"role": str, "content": str} as a Document."""
    messages = [{name: without_halves(message[name], sources) for name in ("role", "content")} for message in messages]
    digest = hashlib.sha256(json.dumps(messages).encode()).digest()
    return Document(digest, sum(len(message["content"]) for message in messages), None, messages)


def without_halves(text, sources):
    """Replace halves of surrogate pairs, such as JSON's \\ud83d, which UTF-8 lacks, by U+FFFD, and count them."""
    text, halves = re.subn("[\ud800-\udfff]", "\ufffd", text)
    sources["undecodable_bytes"] += 6 * halves
    return text
