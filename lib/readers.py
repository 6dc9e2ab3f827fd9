"""
People's files -> documents: .txt, .md, .py, .jsonl and .parquet files, and Hub datasets.

    for document in documents([Path("notes.txt")], config, sources):
        with document.open() as file: text = file.read()

To add a format of plain text, add its suffix to SUFFIXES. To add a format with rows, write a function like
jsonl_rows and add it to ROWS. A reader holds one block of text or a few rows in memory, never a whole file.
"""

import codecs
import functools
import hashlib
import io
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass

from lib.errors import first_line

CHUNK = 2**18  # characters read at a time


@dataclass(frozen=True)
class Document:
    sha256: bytes  # of its text in UTF-8
    chars: int
    open: Callable  # () -> its text, as a file to read from


def documents(files, config, sources):
    """
    Yield the documents of all files, in order. A .txt, .md or .py file is one document, and so is each row of a
    .jsonl or .parquet file or of a Hub dataset. Documents without text are skipped.

    files    list of Path; None to read the Hub dataset config.dataset
    config   has dataset, text_column, subset and split
    sources  dict; this function adds to its counts empty_documents and undecodable_bytes, and sets first_undecodable
    """

    def replace(error):  # like errors="replace", and counts
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


def measure(file):
    """(sha256, characters) of a text file. Reads it to its end and closes it."""
    digest, chars = hashlib.sha256(), 0
    with file:
        while block := file.read(CHUNK):
            digest.update(block.encode())
            chars += len(block)
    return digest.digest(), chars


def open_text(path, errors="replace", newline=""):
    """Open a UTF-8 file. Its text keeps its line ends and loses a byte-order mark."""
    try:
        return open(path, encoding="utf-8-sig", errors=errors, newline=newline)
    except OSError as error:
        sys.exit(f"error: {path}: {error.strerror}: make the file readable, or leave it out")


# ---------------------------------------------------------------------------------------------
# Rows


def row_document(where, row, column, sources):
    """The Document in one column of a row. where: file and line or row, for error messages."""
    if not isinstance(row, dict):
        sys.exit(f"error: {where}: the JSON value is not an object: put one object on each line")
    if column not in row:
        has = f"only {', '.join(row)}" if row else "and no other"
        sys.exit(f"error: {where}: no column {column}, {has}: name the text's column with --text_column")
    text = "" if row[column] is None else row[column]
    if not isinstance(text, str):
        sys.exit(f"error: {where}: column {column} holds {text!r:.40}, not text: name another with --text_column")
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON's \ud83d alone is half of a surrogate pair, which UTF-8 cannot represent
        text, halves = re.subn("[\ud800-\udfff]", "\ufffd", text)
        sources["undecodable_bytes"] += 6 * halves
    open_row = functools.partial(io.StringIO, text, newline="")
    return Document(*measure(open_row()), open_row)


def jsonl_rows(path, column):
    """Yield (where, row) for each line that is not blank."""
    with open_text(path, "replace and count", newline="\n") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            if line.strip():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    sys.exit(f"error: {where}: not JSON ({first_line(error)}): put one object on each line")
                yield where, row


def parquet_rows(path, column):
    """Yield (where, row) for each row. If the file has the column, no other column is read."""
    try:
        import pyarrow.parquet
    except ImportError:
        sys.exit(f"error: {path}: reading parquet files needs pyarrow: pip install pyarrow")
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = [column] if column in file.schema_arrow.names else None
            for batch in file.iter_batches(batch_size=64, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # ValueError: text that is not UTF-8
        sys.exit(f"error: {path}: cannot be read as a parquet file ({first_line(error)}): replace it, or leave it out")


ROWS = {".jsonl": jsonl_rows, ".parquet": parquet_rows}
SUFFIXES = (".txt", ".md", ".py", *ROWS)


def hub_rows(config):
    """Yield (where, row) for each row of a Hub dataset. Rows are downloaded as they are read."""
    from lib.official import hub_problem  # here, so that `import lib.readers` loads no Hub client

    name = config.dataset
    try:
        import datasets
    except ImportError:
        sys.exit(f"error: {name}: no such path, and Hub datasets need the datasets library: pip install datasets")
    if problem := hub_problem():
        sys.exit(f"error: {name}: no such path, and the Hub cannot be reached ({problem}): connect, or give a path")
    try:
        stream = datasets.load_dataset(name, config.subset or None, split=config.split, streaming=True)
        for number, row in enumerate(stream, 1):
            yield f"{name}, row {number}", row
    except Exception as error:  # the library's own errors, the network's, the file formats'
        where = f"Hub dataset {name}, split {config.split}"
        sys.exit(f"error: {where}: {first_line(error)}: check its page on the Hub, --subset, --split, the connection")
