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
from lib.tokenizer import NO_TOKEN

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
    messages: list | None = None  # of a conversation: {"role": str, "content": str} each, and "weight": 0 if masked


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


def jsonl_rows(path, sources):
    with open_text(path, sources) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"{path}, line {number}"
                with usable(where, "put one JSON object on each line"):
                    row = json.loads(line)
                yield where, row


def json_rows(path, sources):
    """Yield the items of an array, or the objects that follow one another."""
    text, number, at = read_text(path, sources).strip(), itertools.count(1), 0
    while at < len(text):
        with usable(path, "repair the JSON, or leave the file out"):
            value, end = json.JSONDecoder().raw_decode(text, at)
        at = re.compile(r"\s*").match(text, end).end()
        for row in value if isinstance(value, list) else [value]:
            yield f"{path}, item {next(number)}", row


def csv_rows(path, sources):
    """Yield the records of a .csv or .tsv, with quotes as spreadsheets write them: such a field may span lines."""
    csv.field_size_limit(2**31 - 1)
    with open_text(path, sources) as file:
        header = file.readline()
        # Where the comma is the decimal point, spreadsheets write semicolons.
        delimiter = "\t" if suffix_of(path) == ".tsv" else max(",;", key=header.count)
        lines = csv.reader(itertools.chain([header], file), delimiter=delimiter, strict=True)
        names, record = None, []
        while record is not None:
            number = lines.line_num + 1
            try:
                record = next(lines, None)
                names = names or record
                if record and len(record) != len(names):
                    raise ValueError(f"{len(record)} fields, but the header has {len(names)}")
                # Many .tsv files are written without quoting. There a field that begins with a quote takes the next
                # rows with it: each line of the record is then a whole row.
                tabs = {line.count("\t") for line in "\t".join(record or ()).split("\n")}
                if delimiter == "\t" and lines.line_num > number and tabs == {len(names) - 1} != {0}:
                    raise ValueError(f"a quote opens here and takes whole rows with it, until line {lines.line_num}")
            except (csv.Error, ValueError) as error:
                hint = f'write a field with {delimiter!r}, " or a line end in it in quotes, and each " in it as ""'
                sys.exit(f"error: {path}, line {number} cannot be used ({error}): {hint}")
            if record and record is not names:
                yield f"{path}, line {number}", dict(zip(names, record, strict=True))


def parquet_rows(path, sources):
    with usable(path, "pip install pyarrow"):
        import pyarrow.parquet
    with usable(path, HINT), pyarrow.parquet.ParquetFile(path) as file:
        batches = file.iter_batches(batch_size=64)
        for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), 1):
            yield f"{path}, row {number}", row


ROWS = {
    ".jsonl": jsonl_rows, ".ndjson": jsonl_rows, ".json": json_rows, ".csv": csv_rows, ".tsv": csv_rows,
    ".parquet": parquet_rows,
}  # fmt: skip


def read_rows(path, sources=None):
    """Yield (where, row) for each row of a file."""
    return ROWS[suffix_of(path)](path, collections.Counter() if sources is None else sources)


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

ROLES = {  # the template's: its names in datasets, in any case. "tool" is a call of a tool or its result.
    "system": "system, developer", "user": "user, human", "assistant": "assistant, gpt, model, bot",
    "tool": "tool, function, observation, ipython, function_call, function_response, tool_call, tool_response",
}  # fmt: skip
LISTS = ("messages", "conversations")  # columns that hold a list of messages; the second is ShareGPT's
PAIRS = (("instruction", "output"), ("prompt", "completion"), ("question", "answer"))  # columns; the first are Alpaca's
SYSTEMS = ("system", "system_prompt")  # columns; the messages' own system message goes before them
FIELDS = {"role", "content", "from", "value", "weight", "train", "tool_calls", "function_call", "type", "text"}


def messages_of(row, config):
    """
    Return (messages, columns): the conversation in a row, a dict, and the names of the columns that it was read from.
    A message is {"role": str, "content": str}, with "weight": 0 if it is not to be learned. Without a conversation
    return (None, ()). Raise ValueError if it cannot be read. With config.prompt_column no other pair or list counts.
    """
    known = [(config.prompt_column, config.answer_column)] if config.prompt_column else [*zip(LISTS), *PAIRS]
    columns = next((names for names in known if row.get(names[0]) is not None and names[-1] in row), ())
    if not columns:
        return None, columns
    messages = read_messages(row[columns[0]], "user" if columns[1:] else None, columns[0])
    for answer in columns[1:]:  # as in TRL, nothing is learned of a prompt that is a list of messages
        messages = [one | ({"weight": 0} if one["role"] == "assistant" else {}) for one in messages]
        messages += read_messages(row[answer], "assistant", answer)
    if columns[0] == "instruction":
        columns += ("input", "history")
        if more := text_of(row.get("input"), "input"):
            messages[0]["content"] += f"\n\n{more}"
        history = row.get("history") or []
        if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
            raise ValueError(f"column history holds {history!r:.40}, not a list of questions with their answers")
        turns = [text for turn in history for text in turn]
        roles = ("user", "assistant") * len(history)
        messages[:0] = [{"role": r, "content": text_of(t, "history")} for r, t in zip(roles, turns, strict=True)]
    for column in SYSTEMS:
        text = text_of(row.get(column), column)
        if text.strip() and messages and messages[0]["role"] != "system":
            messages, columns = [{"role": "system", "content": text}, *messages], (*columns, column)
    return messages, columns


def read_messages(values, role, column):
    """Return a column as messages: a list of them, or, if a role is given, also a text that this role says."""
    parts = [part for part in values if isinstance(part, dict)] if isinstance(values, list) else []
    if role and not any({"role", "from"} & {*part} for part in parts):
        return [{"role": role, "content": text_of(values, column)}]
    if not isinstance(values, list):
        raise ValueError(f"column {column} holds {values!r:.40}, not a list of messages")
    messages = []
    for number, value in enumerate(values, 1):
        where = f"column {column}, message {number}"
        pair = value if isinstance(value, dict) else {}
        name, content = map(pair.get, ("role", "content") if pair.get("role") is not None else ("from", "value"))
        if not isinstance(name, str):
            raise ValueError(f"{where} is {value!r:.60}, not a role and a content")
        role = next((role for role, names in ROLES.items() if name.strip().lower() in names.split(", ")), None)
        if role is None:
            raise ValueError(f"{where} has the role {name!r:.40}, none of {', '.join(ROLES.values())}")
        role = "tool" if pair.get("tool_calls") or pair.get("function_call") else role
        weights = [pair.get(field) for field in ("weight", "train")]
        if not all(weight in (None, 0, 1) for weight in weights):
            raise ValueError(f"{where} has a weight or train of {weights!r:.40}, neither 0 nor 1")
        masked = {"weight": 0} if 0 in weights and role == "assistant" else {}
        messages.append({"role": role, "content": "" if role == "tool" else text_of(content, where)} | masked)
    return messages


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
            sources["rows_left_out"] += 1
            sources.setdefault("first_row_left_out", f"{where}: {error}")
            if sources["rows_left_out"] == PATIENCE and kind is None and (files is None or len(files) == 1):
                break
            continue
        if sources["undecodable_bytes"]:
            sources.setdefault("first_undecodable", str(where))
        if any(message["role"] == "tool" for message in document.messages or ()):
            sources["with_tool_calls"] += 1
            continue
        if not document.chars:
            sources["empty_documents"] += 1
            continue
        this = "text" if document.messages is None else "a conversation"
        if kind not in (None, this):
            sys.exit(f"error: {where}: is {this}, but {kind} came before it: name a file or a glob of one kind")
        kind = this
        yield document
    if kind is None and sources["rows_left_out"]:
        hint = "repair the rows, or name other columns: --text_column, or --prompt_column and --answer_column"
        sys.exit(f"error: {sources['first_row_left_out']}: {hint}")


def files_and_rows(files, config, sources):
    """Yield (path, path) for a file of plain text, and (where, row) for each row of the others."""
    plain = added_suffixes(config.suffixes)
    if files is None:
        hint = "check its page on the Hub, --subset, --split, the connection"
        yield from read_hub_rows(config.dataset, config.subset, config.split, hint)
    for path in files or ():
        rows = suffix_of(path) in ROWS and suffix_of(path) not in plain
        yield from read_rows(path, sources) if rows else [(path, path)]


def text_document(path, sources):
    """Return the whole file as one Document. It is read twice: here to hash it, later to encode it."""
    digest, chars = hashlib.sha256(), 0
    with open_text(path, sources) as file:
        while block := file.read(CHUNK):
            digest.update(block.encode())
            chars += len(block)
    return Document(digest.digest(), chars, functools.partial(opened, path, encoding=file.encoding))


def row_document(row, config, sources):
    """Return a row as a Document: the columns that config names, else a conversation, else the column text."""
    column = config.text_column or "text"
    row = {column: row} if isinstance(row, str) else row
    if not isinstance(row, dict):
        raise ValueError(f"is {row!r:.40}, not an object with columns")
    named = config.text_column and not config.prompt_column
    messages, columns = (None, ()) if named else messages_of(row, config)
    if messages is None and (config.prompt_column or column not in row):
        wanted = " and ".join(filter(None, (config.prompt_column, config.answer_column))) or column
        raise ValueError(f"no column {wanted}, only {', '.join(map(str, row))}")
    counts = sources.setdefault("columns", {"read": collections.Counter(), "not_read": collections.Counter()})
    for name, value in row.items():
        read = name in (columns or [column])
        counts["read" if read else "not_read"].update([name] if value not in (None, "", []) else [])
        parts = [part for part in value if isinstance(part, dict)] if read and isinstance(value, list) else []
        fields = {field for part in parts for field in part if part[field] and field not in FIELDS}
        counts["not_read"].update(f"{name}.{field}" for field in fields)
    if messages is not None:
        return conversation(messages, sources)
    if not isinstance(row[column], str | None):
        raise ValueError(f"column {column} holds {row[column]!r:.40}, not text")
    text = without_halves(row[column] or "", sources)
    return Document(hashlib.sha256(text.encode()).digest(), len(text), lambda: io.StringIO(text, newline=""))


def conversation(messages, sources):
    """Return a list of messages, as from messages_of, as a Document. An empty answer is masked, and counted."""
    messages = [message | {"content": without_halves(message["content"], sources)} for message in messages]
    for message in messages:
        if message["role"] == "assistant" and not message["content"].strip():
            message["weight"] = 0
            sources["empty_answers"] += 1
        for name, count in odd_text(message["content"].encode()).items():
            sources[name] += count
    digest = hashlib.sha256(json.dumps(messages).encode()).digest()
    return Document(digest, sum(len(message["content"]) for message in messages), None, messages)


def without_halves(text, sources):
    """Replace halves of surrogate pairs, such as JSON's \\ud83d, which UTF-8 lacks, by U+FFFD, and count them."""
    text, halves = re.subn("[\ud800-\udfff]", "\ufffd", text)
    sources["undecodable_bytes"] += 6 * halves
    return text


def odd_text(content):
    """Return {kind: count} of the names of special tokens, ordinary text here, and of the bytes that have no token."""
    counts = {name: content.count(name.encode()) for name in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")}
    return counts | {"no_token": len(content) - len(content.translate(None, NO_TOKEN))}
