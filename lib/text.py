"""
Text in: a file, a folder, a glob or a Hub dataset -> documents, each a text or a conversation.

    folder, files, left_out = find_files(Path("linux"), suffixes=".c,.h")
    for document in documents(files, config, sources):
        with document.open() as file: text = file.read()

`sources` is a dict that counts what happened on the way: prepare_data.py prints it, and meta.json keeps it. To add a
format of plain text, add its suffix to PLAIN. To add a format with rows, add a function to ROWS. Memory stays flat,
because a reader holds a block of text or a few rows; only .json is read whole.
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
    the number of the others by suffix.

    suffixes: ".c,.h" are plain text, too; "all" takes every file of text. A glob's own suffix counts as well, and a
    file without a suffix is taken if it is text. Hidden files and OTHERS are left out, unless the glob names them.
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
        if other:
            left_out["hidden" if other == file.name else f"in {other}"] += 1
        elif suffix in wanted or (suffix == "" or ".all" in added) and encoding_of(file):
            files.append(file)
        else:
            left_out[suffix or "binary without a suffix"] += 1
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

MARKS = {  # the longer ones first: UTF-32's begins with UTF-16's
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def opened(path, mode="rt", encoding=None, errors="replace"):
    """Open a file, decompressed, in a with statement. Line ends stay as they are."""
    return fsspec.open(str(path), mode, COMPRESSED.get(path.suffix.lower()), encoding, errors, newline="")


def encoding_of(path):
    """Return a byte-order mark's encoding, or UTF-8, or charset-normalizer's best guess, or None for a binary."""
    with usable(path, HINT), opened(path, "rb") as file:
        head = file.read(SAMPLE)
        for mark, encoding in MARKS.items():
            if head.startswith(mark):
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
    """
    Open a text file in its own encoding. Bytes that are not in the encoding become U+FFFD, and `sources` counts them.
    A binary, or a file that cannot be read or parsed in the block, ends the program with one line.
    """
    if not (encoding := encoding_of(path)):
        sys.exit(f"error: {path}: a binary file, not text: convert it to text (pandoc, pdftotext), or leave it out")
    if encoding != "utf-8-sig":
        name = encoding if encoding in MARKS.values() else f"{encoding}, guessed"
        same = sources.setdefault("encodings", {}).setdefault(name, {"files": 0, "first": str(path)})
        same["files"] += 1

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
    text, rows, at = read_text(path, sources).strip(), [], 0
    while at < len(text):
        with usable(path, "repair the JSON, or leave the file out"):
            value, end = json.JSONDecoder().raw_decode(text, at)
        at = re.compile(r"\s*").match(text, end).end()
        rows += value if isinstance(value, list) else [value]
    for number, row in enumerate(rows, 1):
        yield f"{path}, item {number}", row


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
    number = itertools.count(1)
    with usable(path, HINT), pyarrow.parquet.ParquetFile(path) as file:
        columns = [column] if column in file.schema_arrow.names else None
        for batch in file.iter_batches(batch_size=64, columns=columns):
            for row in batch.to_pylist():
                yield f"{path}, row {next(number)}", row


ROWS = {
    ".jsonl": jsonl_rows, ".ndjson": jsonl_rows, ".json": json_rows, ".csv": csv_rows, ".tsv": csv_rows,
    ".parquet": parquet_rows,
}  # fmt: skip


def read_rows(path, column="", sources=None):
    """
    Yield (where, row) for each row of a file whose suffix is in ROWS. A row is a dict, or any JSON value in a .json or
    .jsonl. column: if a .parquet file has it, no other column is read. sources: as in `documents`.
    """
    return ROWS[suffix_of(path)](path, column, collections.Counter() if sources is None else sources)


def read_hub_rows(name, subset, split, hint, streaming=True):
    """
    Yield (where, row) for each row of a Hub dataset. streaming: rows are downloaded as they are read; else the whole
    split is, into the cache of the datasets library, which also works offline. hint: what to do if that fails.
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
# Row -> messages

ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names: the template's
PAIRS = (("instruction", "output"), ("prompt", "completion"), ("question", "answer"))  # columns


def messages_of(row, config):
    """
    Return the conversation in a row, a dict, as a list of {"role": str, "content": str}, or None if it holds none.
    Raise ValueError if it cannot be read. The columns that decide, in this order:

        config.prompt_column, config.answer_column    if they are set, no others count
        messages                                      role, content
        conversations                                 from, value: ShareGPT's
        instruction, output and perhaps input         Alpaca's; input follows after a blank line
        prompt, completion
        question, answer
    """
    pairs = [(config.prompt_column, config.answer_column)] if config.prompt_column else PAIRS
    for column in () if config.prompt_column else ("messages", "conversations"):
        if row.get(column) is not None:
            return messages_in(row[column], column)
    for prompt, answer in pairs:
        if row.get(prompt) is not None and row.get(answer) is not None:
            question, reply = text_of(row[prompt], prompt), text_of(row[answer], answer)
            if prompt == "instruction" and (more := text_of(row.get("input"), "input")):
                question = f"{question}\n\n{more}"
            return [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    return None


def messages_in(value, column):
    """Return the messages in a list of {role, content} or {from, value}. Any role and order is kept."""
    if not isinstance(value, list):
        raise ValueError(f"column {column} holds {value!r:.40}, not a list of messages")
    messages = []
    for number, message in enumerate(value, 1):
        where = f"column {column}, message {number}"
        pair = message if isinstance(message, dict) else {}
        role, content = pair.get("role"), pair.get("content")
        if role is None:
            role, content = pair.get("from"), pair.get("value")
        if not isinstance(role, str):
            raise ValueError(f"{where} is {message!r:.60}, not a role and a content")
        messages.append({"role": ROLES.get(role, role), "content": text_of(content, where)})
    return messages


def text_of(content, where):
    """Return a content as one text: a text, null (a call of a tool has no words), or a list of parts of text."""
    parts = content if isinstance(content, list) else [] if content is None else [content]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{where} holds {content!r:.60}, not text")
    return "".join(texts)


# ---------------------------------------------------------------------------------------------
# Documents


def documents(files, config, sources):
    """
    Yield the Documents of all files, in order. A file of plain text is one document, and so is each row of the others
    and of a Hub dataset. Documents without text, and rows without a document, are counted and left out. Either all
    documents are text or all are conversations: the first of the other kind ends the program with one line.

    files    list of Path; None to read the Hub dataset config.dataset
    config   has dataset, text_column, prompt_column, answer_column, suffixes, subset and split
    sources  dict; this function counts empty_documents and undecodable_bytes in it. Where there is something to note,
             it sets first_undecodable, encodings, rows_without_column and first_without_column.
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
        suffix = suffix_of(path)
        yield from read_rows(path, column, sources) if suffix in ROWS and suffix not in plain else [(path, path)]


def text_document(path, sources):
    """Return the whole file as one Document. It is read twice: here to hash it, later to encode it."""
    with open_text(path, sources) as file:
        return document_of(file, functools.partial(opened, path, encoding=file.encoding))


def row_document(row, config, sources):
    """Return a row as a Document: text if it has config.text_column, else a conversation. If neither, ValueError."""
    column = config.text_column
    row = {column: row} if isinstance(row, str) else row
    if not isinstance(row, dict):
        raise ValueError(f"is {row!r:.40}, not an object with columns")
    if column in row and not config.prompt_column:
        if not isinstance(row[column], str | None):
            raise ValueError(f"column {column} holds {row[column]!r:.40}, not text")
        open_row = functools.partial(io.StringIO, without_halves(row[column] or "", sources), newline="")
        return document_of(open_row(), open_row)
    if (messages := messages_of(row, config)) is None:
        wanted = f"columns {config.prompt_column} and {config.answer_column}"
        wanted = wanted if config.prompt_column else f"column {column}"
        raise ValueError(f"no {wanted}, only {', '.join(map(str, row))}")
    return conversation(messages, sources)


def document_of(file, open_again):
    """Return a text file as a Document. open_again: () -> the same file, for the second reading."""
    digest, chars = hashlib.sha256(), 0
    while block := file.read(CHUNK):
        digest.update(block.encode())
        chars += len(block)
    return Document(digest.digest(), chars, open_again)


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
