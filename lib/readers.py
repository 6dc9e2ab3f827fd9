"""
People's files -> documents: text, rows of .jsonl, .json, .csv, .parquet and .arrow files, notebooks, Hub datasets.
A row holds text or a conversation.

    for document in documents([Path("notes.txt")], config, sources):
        with document.open() as file: text = file.read()

lib/decoding.py turns bytes into text. To add a format of plain text, add its suffix to PLAIN. To add a format with
rows, write a function like jsonl_rows and add it to ROWS. A reader holds one block of text or a few rows in memory,
never a whole file; notebooks alone are read whole.
"""

import codecs
import collections
import contextlib
import csv
import functools
import hashlib
import io
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lib.conversations import messages_of
from lib.decoding import COMPRESSED, decompressed_name, encoding_of, open_text
from lib.errors import first_line
from lib.parts import share

CHUNK = 2**18  # characters read at a time
PATIENCE = 1_000  # rows: if the first so many of the only source lack the column, do not read the others


@dataclass(frozen=True)
class Document:
    sha256: bytes  # of its text in UTF-8
    chars: int
    open: Callable | None  # () -> its text, as a file to read from; None for a conversation
    path: Path | None = None  # the file that `open` reads once more; None if the text is in memory
    messages: list | None = None  # of a conversation: {"role": str, "content": str} each


def documents(files, config, sources):
    """
    Yield the documents of all files, in order. A file of plain text is one document, a notebook is one, and so is each
    row of the other formats and of a Hub dataset. Documents without text are skipped. Either all documents are text or
    all are conversations: the first that is of the other kind ends the program with one line.

    files    list of Path; None to read the Hub dataset config.dataset
    config   has dataset, text_column, prompt_column, answer_column, suffixes, subset, split and part
    sources  dict; this function adds to its counts empty_documents and undecodable_bytes. Where there is something to
             tell, it sets first_undecodable, encodings, rows_without_column, first_without_column and left_out.
    """
    rows = collections.Counter()  # with and without text or a conversation; and how many of each kind
    alone = files is None or len(files) == 1
    part, parts = share(config.part)
    for path in [config.dataset] if files is None else files[part - 1 :: parts]:
        kind = "" if files is None else format_of(path, config.suffixes)
        if files is None:
            found = row_documents(hub_rows(config), config, sources, rows, alone)
        elif kind in (".parquet", ".arrow") and path.suffix.lower() in COMPRESSED:
            sys.exit(f"error: {path}: a compressed {kind} file cannot be read in place: decompress it first")
        elif kind in ROWS:
            before = rows["with"]
            found = row_documents(ROWS[kind](path, config, sources), config, sources, rows, alone or kind != ".json")
        else:
            of_one_kind("text", rows, path)
            found = [text_document(path, sources)]
        for document in found:
            if sources["undecodable_bytes"]:
                sources.setdefault("first_undecodable", str(path))
            if document.chars:
                yield document
            else:
                sources["empty_documents"] += 1
        if kind == ".json" and not alone and rows["with"] == before:  # a program's own file, such as package.json
            left_out = sources.setdefault("left_out", {})
            left_out[".json without a text column"] = left_out.get(".json without a text column", 0) + 1
    if rows["without"] and not rows["with"]:
        way_out = "name the text's column with --text_column, or a conversation's with --prompt_column, --answer_column"
        sys.exit(f"error: {sources['first_without_column']}: {way_out}")


def format_of(path, suffixes=""):
    """
    The suffix that says how a file is read, such as ".jsonl" for a.JSONL.gz. "text" if `suffixes`, the setting, makes
    it plain text.
    """
    if path.is_dir():  # what the datasets library's save_to_disk wrote
        return ".arrow"
    suffix = decompressed_name(path).suffix.lower()
    return "text" if suffix in added_suffixes(suffixes) else suffix


@functools.cache
def added_suffixes(suffixes):
    """The setting "c, .h" -> {".c", ".h"}; "all" -> {".json"}, because in a folder of programs these are no rows."""
    names = [name.strip().lower().lstrip(".") for name in suffixes.split(",")]
    return {".json" if name == "all" else f".{name}" for name in names if name}


# ---------------------------------------------------------------------------------------------
# Plain text


@contextlib.contextmanager
def decoded(path, sources):
    """
    Open a text file as (file, encoding). Bytes that are not in the encoding become U+FFFD and are counted. A binary,
    and a text with more than 1 % of such bytes, end the program with one line.
    """
    encoding, how = encoding_of(path)
    if not encoding:
        sys.exit(f"error: {path}: {how}")
    if how:
        same = sources.setdefault("encodings", {}).setdefault(f"{encoding}, {how}", {"files": 0, "first": str(path)})
        same["files"] += 1
    replaced = 0

    def replace(error):  # like errors="replace", and counts
        nonlocal replaced
        replaced += error.end - error.start
        sources["undecodable_bytes"] += error.end - error.start
        return "\ufffd", error.end

    codecs.register_error("replace and count", replace)
    with open_text(path, encoding, "replace and count") as file:
        yield file, encoding
        size = file.buffer.raw.size
    if replaced * 100 > size:
        said = f"{replaced:,} of its {size:,} bytes are not {encoding.removesuffix('-sig')}"
        sys.exit(f"error: {path}: {said}: convert it to UTF-8 (iconv -f CP1252 -t UTF-8), or leave it out")


def text_document(path, sources):
    """The whole file as one Document. It is read twice: here to measure it, later to encode it."""
    with decoded(path, sources) as (file, encoding):
        sha256, chars = measure(file)
    return Document(sha256, chars, functools.partial(open_text, path, encoding), path)


def measure(file):
    """(sha256, characters) of the rest of a text file."""
    digest, chars = hashlib.sha256(), 0
    while block := file.read(CHUNK):
        digest.update(block.encode())
        chars += len(block)
    return digest.digest(), chars


# ---------------------------------------------------------------------------------------------
# Rows


def row_documents(rows, config, sources, counts, strict):
    """
    The Documents in the rows, which are (file and line or row, dict). A row is text if it has config.text_column and
    config.prompt_column is not set. Otherwise it may be a conversation: lib/conversations.py says which columns tell.
    Rows that are neither are counted and left out. strict: they are told, and a row that is no object is an error.
    """
    column, first = config.text_column, counts["with"] + counts["without"] == 0
    for where, row in rows:
        if not isinstance(row, dict) and strict:
            sys.exit(f"error: {where}: the JSON value is not an object: put one object on each line")
        document, wrong = None, ""
        if isinstance(row, dict):
            if column in row and not config.prompt_column:
                document = row_text(row[column], column, where, sources)
            else:
                try:
                    document = conversation(messages_of(row, config), sources)
                except ValueError as error:
                    wrong = str(error)
        if document is None or document.messages is not None and counts["text"] and not strict:
            if strict:
                counts["without"] += 1
                has = f"only {', '.join(map(str, row))}" if row else "and no other"
                wanted = f"columns {config.prompt_column} and {config.answer_column}"
                wanted = wanted if config.prompt_column else f"column {column}"
                sources.setdefault("first_without_column", f"{where}: {wrong or f'no {wanted}, {has}'}")
                sources["rows_without_column"] = counts["without"]
            if strict and first and counts["without"] == PATIENCE and not counts["with"]:
                return
            continue
        counts["with"] += 1
        of_one_kind("text" if document.messages is None else "a conversation", counts, where)
        yield document


def of_one_kind(kind, counts, where):
    """End the program with one line if what came before is not of this kind: "text" or "a conversation"."""
    counts[kind] += 1
    other = "a conversation" if kind == "text" else "text"
    if counts[other]:
        sys.exit(f"error: {where}: is {kind}, but {other} came before it: name a file or a glob of one kind")


def row_text(text, column, where, sources):
    """The text in a row's column, as a Document."""
    text = "" if text is None else text
    if not isinstance(text, str):
        sys.exit(f"error: {where}: column {column} holds {text!r:.40}, not text: name another with --text_column")
    text = without_halves(text, sources)
    open_row = functools.partial(io.StringIO, text, newline="")
    return Document(*measure(open_row()), open_row)


def conversation(messages, sources):
    """A list of {"role": str, "content": str} as a Document, whatever the format it was read from. None -> None."""
    if messages is None:
        return None
    messages = [{name: without_halves(message[name], sources) for name in ("role", "content")} for message in messages]
    digest = hashlib.sha256(json.dumps(messages).encode()).digest()
    return Document(digest, sum(len(message["content"]) for message in messages), None, messages=messages)


def without_halves(text, sources):
    """JSON's \\ud83d alone is half of a surrogate pair. UTF-8 has no such thing: it becomes U+FFFD and is counted."""
    try:
        text.encode()
    except UnicodeEncodeError:
        text, halves = re.subn("[\ud800-\udfff]", "\ufffd", text)
        sources["undecodable_bytes"] += 6 * halves
    return text


def jsonl_rows(path, config, sources):
    """Yield (where, row) for each line that is not blank."""
    with decoded(path, sources) as (file, _):
        file.reconfigure(newline="\n")
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            if line.strip():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    sys.exit(f"error: {where}: not JSON ({first_line(error)}): put one object on each line")
                yield where, row


def json_rows(path, config, sources):
    """Yield (where, row) for each item of an array, or for each object if the file holds one or several in a row."""
    decode, blank = json.JSONDecoder().raw_decode, re.compile(r"[ \t\r\n]*")
    with decoded(path, sources) as (file, _):
        text, at, number = file.read(CHUNK), 0, 0

        def next_character():
            nonlocal text, at
            while (at := blank.match(text, at).end()) == len(text) and (more := file.read(CHUNK)):
                text, at = more, 0
            return text[at : at + 1]

        array = next_character() == "["
        at += array
        while (character := next_character()) and not (array and character == "]"):
            if array and number:
                if character != ",":
                    sys.exit(f"error: {path}, item {number}: not JSON: put a comma between the items of an array")
                at += 1
                next_character()
            while True:
                try:
                    row, at = decode(text, at)
                    break
                except (ValueError, RecursionError) as error:
                    # The item may go on beyond what was read. Twice as much each time keeps the work linear.
                    cut_off = str(error).startswith("Unterminated") or getattr(error, "pos", 0) > len(text) - 16
                    if cut_off and (more := file.read(max(CHUNK, len(text) - at))):
                        text, at = text[at:] + more, 0
                        continue
                    where = f"{path}, item {number + 1}"
                    sys.exit(f"error: {where}: not JSON ({first_line(error)}): repair the file, or leave it out")
            number += 1
            yield f"{path}, item {number}", {config.text_column: row} if isinstance(row, str) else row
        if array and not character:
            sys.exit(f"error: {path}, item {number}: not JSON: the array does not end here, get the whole file")


def csv_rows(path, config, sources):
    """Yield (where, row) for each record after the first, which names the columns."""
    csv.field_size_limit(2**31 - 1)
    with decoded(path, sources) as (file, _):
        names = file.readline()
        # Where the comma is the decimal point, spreadsheets write semicolons.
        comma = "\t" if format_of(path) == ".tsv" else ";" if names.count(";") > names.count(",") else ","
        lines = csv.reader((line for part in ([names], file) for line in part), delimiter=comma, strict=True)
        try:
            names = next(lines, [])
            for record in lines:
                if record:
                    yield f"{path}, line {lines.line_num}", dict(zip(names, record, strict=False))
        except csv.Error as error:
            where = f"{path}, line {lines.line_num}"
            sys.exit(
                f'error: {where}: not CSV ({first_line(error)}): double each " inside a field, and quote the field'
            )


def notebook_rows(path, config, sources):
    """Yield (where, row) once: the sources of a Jupyter notebook's cells, with a blank line between two."""
    with decoded(path, sources) as (file, _):
        try:
            notebook = json.load(file)
            sheets = notebook["worksheets"] if "worksheets" in notebook else [notebook]  # the first: before 2015
            cells = [cell.get("source", cell.get("input", "")) for sheet in sheets for cell in sheet["cells"]]
            text = "\n\n".join("".join(source) for source in cells if source)
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
            sys.exit(f"error: {path}: not a notebook ({first_line(error)}): repair it, or leave it out")
    yield str(path), {config.text_column: text}


def parquet_rows(path, config, sources):
    """Yield (where, row) for each row. If the file has the text's column, no other column is read."""
    try:
        import pyarrow.parquet
    except ImportError:
        sys.exit(f"error: {path}: reading parquet files needs pyarrow: pip install pyarrow")
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            is_text = config.text_column in file.schema_arrow.names and not config.prompt_column
            columns = [config.text_column] if is_text else None
            for batch in file.iter_batches(batch_size=64, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # ValueError: text that is not UTF-8
        sys.exit(f"error: {path}: cannot be read as a parquet file ({first_line(error)}): replace it, or leave it out")


def arrow_rows(path, config, sources):
    """Yield (where, row) for each row of a .arrow file of the datasets library, or of a folder that it saved."""
    try:
        import datasets
    except ImportError:
        sys.exit(f"error: {path}: reading it needs the datasets library: pip install datasets")
    try:
        table = datasets.load_from_disk(str(path)) if path.is_dir() else datasets.Dataset.from_file(str(path))
        if isinstance(table, dict):
            if config.split not in table:
                sys.exit(f"error: {path}: no split {config.split}, only {', '.join(table)}: name one with --split")
            table = table[config.split]
        if config.text_column in table.column_names and not config.prompt_column:
            table = table.select_columns([config.text_column])
        for number, row in enumerate(table, 1):
            yield f"{path}, row {number}", row
    except Exception as error:  # the library's own errors, and those of the file formats
        sys.exit(f"error: {path}: cannot be read by datasets ({first_line(error)}): save it again, or leave it out")


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
        if config.part:
            from datasets.distributed import split_dataset_by_node

            part, parts = share(config.part)
            stream = split_dataset_by_node(stream, part - 1, parts)
        for number, row in enumerate(stream, 1):
            yield f"{name}, row {number}", row
    except Exception as error:  # the library's own errors, the network's, the file formats'
        where = f"Hub dataset {name}, split {config.split}"
        sys.exit(f"error: {where}: {first_line(error)}: check its page on the Hub, --subset, --split, the connection")


ROWS = {
    ".jsonl": jsonl_rows, ".ndjson": jsonl_rows, ".json": json_rows, ".csv": csv_rows, ".tsv": csv_rows,
    ".ipynb": notebook_rows, ".parquet": parquet_rows, ".arrow": arrow_rows,
}  # fmt: skip
PLAIN = (".txt", ".md", ".py", ".html", ".htm", ".rst", ".tex", ".xml", ".log", ".srt")
SUFFIXES = (*PLAIN, *ROWS)
