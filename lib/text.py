"""
Read documents, each a string of text or a conversation, from a file, a folder, a glob or a Hub dataset.

    folder, files, left_out = find_files(Path("linux"), suffixes=".c,.h")
    for document in read_documents(files, config, sources):
        with document.open() as file: text = file.read()

`sources` is a dict that counts what was replaced or left out; meta.json keeps it. To add a format of plain text, add
its suffix to TEXT_SUFFIXES; to add one with rows, add its reader to ROWS. Files are read in blocks; only .json is not.
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

from lib.errors import check, usable
from lib.tokenizer import NO_TOKEN

CHUNK_CHARS = 2**18  # characters to read at a time
SAMPLE_BYTES = 2**20  # the encoding of a file is detected from its first non-ASCII block of this size
MAX_ROWS_WITHOUT_TEXT = 1_000  # give up if the first 1,000 rows of a single source have no text
FILE_HINT = "get the file again, or leave it out"

TEXT_SUFFIXES = (".txt", ".md", ".py", ".html", ".htm", ".rst", ".tex", ".xml", ".log", ".srt")
COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}  # fsspec's names
SKIPPED_FOLDERS = {"node_modules", "site-packages", "dist-packages", "__pycache__", "venv", "vendor", "third_party"}


class Document(NamedTuple):
    sha256: bytes  # hash of its text in UTF-8, or of its messages
    chars: int
    open: Callable | None  # () -> its text as an open file; None for a conversation
    messages: list | None = None  # a conversation: {"role": str, "content": str} each, and "weight": 0 if masked


def find_files(path, suffixes=""):
    """Return (folder, sorted files to read, {suffix: number of files left out}) for a folder or a glob."""
    folder = path if path.is_dir() else next(parent for parent in path.parents if parent.exists())
    pattern = Path("**/*") if path.is_dir() else path.relative_to(folder)
    added = parse_suffixes(suffixes)
    wanted = {*TEXT_SUFFIXES, *ROWS, *added, suffix_of(pattern)} - {""}
    files, left_out = [], collections.Counter()
    # Hidden files and SKIPPED_FOLDERS are skipped unless the glob names them; files without a suffix must be text.
    for file in filter(Path.is_file, sorted(folder.glob(str(pattern)), key=Path.as_posix)):
        parts = [part for part in file.relative_to(folder).parts if part not in pattern.parts]
        skipped = next((part for part in parts if part.startswith(".") or part in SKIPPED_FOLDERS), None)
        suffix = suffix_of(file)
        if not skipped and (suffix in wanted or (suffix == "" or ".all" in added) and detect_encoding(file)):
            files.append(file)
        else:
            left_out[skipped or suffix or "binary without a suffix"] += 1
    return folder, files, dict(left_out.most_common())


def parse_suffixes(suffixes):
    """Return {".c", ".h"} for the setting "c, .h". "all" also makes .json plain text: programs have no rows."""
    added = {f".{name.strip().lower().lstrip('.')}" for name in suffixes.split(",") if name.strip()}
    return added | {".json"} if ".all" in added else added


def strip_gz(path):
    """Return notes.txt for notes.txt.gz, .bz2, .xz or .zst, and for notes.txt."""
    return path.with_suffix("") if path.suffix.lower() in COMPRESSED else path


def suffix_of(path):
    """Return the suffix that decides how to read a file: ".jsonl" for a.JSONL.gz."""
    return strip_gz(path).suffix.lower()


BYTE_ORDER_MARKS = {  # UTF-32 first, because one of its marks begins with one of UTF-16's
    "utf-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
    "utf-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}


def open_file(path, mode="rt", encoding=None, errors="replace"):
    """Open a file, decompressed, for a with statement. Line ends stay as they are."""
    return fsspec.open(str(path), mode, COMPRESSED.get(path.suffix.lower()), encoding, errors, newline="")


def detect_encoding(path):
    """Return a byte-order mark's encoding, or UTF-8, or charset-normalizer's best guess, or None for a binary."""
    with usable(path, FILE_HINT), open_file(path, "rb") as file:
        head = file.read(SAMPLE_BYTES)
        marked = next((encoding for encoding, marks in BYTE_ORDER_MARKS.items() if head.startswith(marks)), None)
        if marked or b"\0" in head:
            return marked
        while head.isascii() and (block := file.read(SAMPLE_BYTES)):  # ASCII is the same in every encoding
            head = block
    text = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode(head, final=len(head) < SAMPLE_BYTES)
    if 2 * len(re.findall("[\udc80-\udcff]", text)) <= len(re.findall("[^\0-\x7f]", text)):
        return "utf-8-sig"  # at most half of the non-ASCII characters are broken
    lines = re.findall(rb"[^\n]*[\x80-\xff][^\n]*", head)
    best = charset_normalizer.from_bytes(b"\n".join(lines[:1000])).best()
    return best and best.encoding


@contextlib.contextmanager
def open_text(path, sources):
    """Open a text file in its own encoding. Bytes that cannot be decoded become U+FFFD; `sources` counts them."""
    encoding = detect_encoding(path)
    check(encoding, f"{path}: a binary file, not text: convert it to text (pandoc, pdftotext), or leave it out")
    if encoding != "utf-8-sig":
        name = encoding if encoding in BYTE_ORDER_MARKS else f"{encoding}, guessed"
        sources.setdefault("encodings", {}).setdefault(name, {"files": 0, "first": str(path)})["files"] += 1

    def replace(error):  # like errors="replace", and counts
        sources["undecodable_bytes"] += error.end - error.start
        return "\ufffd", error.end

    codecs.register_error("replace and count", replace)
    with usable(path, FILE_HINT), open_file(path, encoding=encoding, errors="replace and count") as file:
        yield file


def read_text(path, sources):
    """Return the full text of a file. sources: a Counter, or a dict as in read_documents."""
    with open_text(path, sources) as file:
        return file.read()


def read_jsonl(path, sources):
    """Yield (location for error messages, row) for each line, as all readers in ROWS do."""
    with open_text(path, sources) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                location = f"{path}, line {number}"
                with usable(location, "put one JSON object on each line"):
                    row = json.loads(line)
                yield location, row


def read_json(path, sources):
    """Yield the items of an array, or objects that follow one another."""
    text = read_text(path, sources).strip()
    numbers, position = itertools.count(1), 0
    while position < len(text):
        with usable(path, "repair the JSON, or leave the file out"):
            value, end = json.JSONDecoder().raw_decode(text, position)
        position = re.compile(r"\s*").match(text, end).end()
        for row in value if isinstance(value, list) else [value]:
            yield f"{path}, item {next(numbers)}", row


def read_csv(path, sources):
    """Yield the records of a .csv or .tsv, quoted as spreadsheets do it: a quoted field may span lines."""
    csv.field_size_limit(2**31 - 1)
    with open_text(path, sources) as file:
        header = file.readline()
        # Spreadsheets write semicolons in locales with a decimal comma.
        delimiter = "\t" if suffix_of(path) == ".tsv" else max(",;", key=header.count)
        lines = csv.reader(itertools.chain([header], file), delimiter=delimiter, strict=True)
        names, number = None, 1
        try:
            for record in lines:
                names = names or record
                if record and len(record) != len(names):
                    raise ValueError(f"{len(record)} fields, but the header has {len(names)}")
                # In a .tsv without quoting, a field that begins with a quote swallows the next rows.
                tabs = {line.count("\t") for line in "\t".join(record).split("\n")}
                if delimiter == "\t" and lines.line_num > number and tabs == {len(names) - 1} != {0}:
                    raise ValueError(f"a quote opens here and swallows rows until line {lines.line_num}")
                if record and record is not names:
                    yield f"{path}, line {number}", dict(zip(names, record, strict=True))
                number = lines.line_num + 1
        except (csv.Error, ValueError) as error:
            hint = f'quote each field that contains {delimiter!r}, " or a line end, and write each " in it as ""'
            sys.exit(f"error: {path}, line {number} cannot be used ({error}): {hint}")


def read_parquet(path, sources):
    with usable(path, "pip install pyarrow"):
        import pyarrow.parquet
    with usable(path, FILE_HINT), pyarrow.parquet.ParquetFile(path) as file:
        batches = file.iter_batches(batch_size=64)
        for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), 1):
            yield f"{path}, row {number}", row


ROWS = {
    ".jsonl": read_jsonl, ".ndjson": read_jsonl, ".json": read_json, ".csv": read_csv, ".tsv": read_csv,
    ".parquet": read_parquet,
}  # fmt: skip


def read_rows(path, sources=None):
    """Yield (location, row) for each row of a file."""
    return ROWS[suffix_of(path)](path, collections.Counter() if sources is None else sources)


def read_hub_rows(name, subset, split, hint, streaming=True):
    """Yield (location, row) for the rows of a Hub dataset. Without streaming, cache the full split (works offline)."""
    from lib.official import constants, probe_hub  # here, to import no Hub client with lib.text

    dataset = f"Hub dataset {name}, split {split}"
    problem = probe_hub() if streaming or not constants.HF_HUB_OFFLINE else None
    check(not problem, f"{name}: no such path, and the Hub cannot be reached ({problem}): {hint}")
    with usable(dataset, "pip install datasets"):
        import datasets
    with usable(dataset, hint):
        for number, row in enumerate(datasets.load_dataset(name, subset or None, split=split, streaming=streaming), 1):
            yield f"{name}, row {number}", row


ROLES = {  # role in the chat template: its names in datasets, in any case. "tool" is a tool call or its result.
    "system": "system, developer", "user": "user, human", "assistant": "assistant, gpt, model, bot",
    "tool": "tool, function, observation, ipython, function_call, function_response, tool_call, tool_response",
}  # fmt: skip
LIST_COLUMNS = (("messages",), ("conversations",))  # a list of messages; the second is ShareGPT's
PAIR_COLUMNS = (("instruction", "output"), ("prompt", "completion"), ("question", "answer"))  # the first is Alpaca's
MESSAGE_FIELDS = {"role", "content", "from", "value", "weight", "train", "tool_calls", "function_call", "type", "text"}


def read_conversation(row, config):
    """Return (messages, columns): the conversation in a row, a dict, and the columns with it, or (None, ())."""
    known = () if config.text_column else LIST_COLUMNS + PAIR_COLUMNS
    known = [(config.prompt_column, config.answer_column)] if config.prompt_column else known
    columns = next((names for names in known if row.get(names[0]) is not None and names[-1] in row), ())
    if not columns:
        return None, columns
    messages = read_messages(row[columns[0]], "user" if columns[1:] else None, columns[0])
    for answer in columns[1:]:  # as in TRL, nothing is learned from a prompt that is a list of messages
        messages = [one | {"weight": 0} if one["role"] == "assistant" else one for one in messages]
        messages += read_messages(row[answer], "assistant", answer)
    if columns[0] == "instruction":
        columns += ("input", "history")
        if context := read_content(row.get("input"), "input"):
            messages[0]["content"] += f"\n\n{context}"
        history = row.get("history") or []
        if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
            raise ValueError(f"column history holds {history!r:.40}, not a list of questions with their answers")
        pairs = [pair for turn in history for pair in zip(("user", "assistant"), turn, strict=True)]
        messages[:0] = [{"role": role, "content": read_content(content, "history")} for role, content in pairs]
    for column in ("system", "system_prompt"):  # used if the messages have no system message
        text = read_content(row.get(column), column)
        if text.strip() and messages and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": text})
            columns += (column,)
    return messages, columns


def read_messages(values, role, column):
    """Return a column as messages. With a role, the column may also be text: one message with this role."""
    parts = [part for part in values if isinstance(part, dict)] if isinstance(values, list) else []
    if role and not any({"role", "from"} & {*part} for part in parts):
        return [{"role": role, "content": read_content(values, column)}]
    if not isinstance(values, list):
        raise ValueError(f"column {column} holds {values!r:.40}, not a list of messages")
    messages = []
    for number, value in enumerate(values, 1):
        location = f"column {column}, message {number}"
        fields = value if isinstance(value, dict) else {}
        name, content = map(fields.get, ("role", "content") if fields.get("role") is not None else ("from", "value"))
        if not isinstance(name, str):
            raise ValueError(f"{location} is {value!r:.60}, not a role and a content")
        role = next((role for role, names in ROLES.items() if name.strip().lower() in names.split(", ")), None)
        if role is None:
            raise ValueError(f"{location} has the role {name!r:.40}, none of {', '.join(ROLES.values())}")
        role = "tool" if fields.get("tool_calls") or fields.get("function_call") else role
        weights = [fields.get(field) for field in ("weight", "train")]
        if not all(weight in (None, 0, 1) for weight in weights):
            raise ValueError(f"{location} has a weight or train of {weights!r:.40}, neither 0 nor 1")
        weight = {"weight": 0} if 0 in weights and role == "assistant" else {}
        messages.append({"role": role, "content": "" if role == "tool" else read_content(content, location)} | weight)
    return messages


def read_content(content, location):
    """Return a content as a string. It may be a string, null (a tool call without words), or a list of text parts."""
    if content is None:
        return ""
    parts = content if isinstance(content, list) else [content]
    strings = [part.get("text") if isinstance(part, dict) else part for part in parts]
    if not all(isinstance(string, str) for string in strings):
        raise ValueError(f"{location} holds {content!r:.60}, not text")
    return "".join(strings)


def read_documents(files, config, sources):
    """Yield the Documents in all files, in order, or in the Hub dataset config.dataset. Exits if the kinds differ."""
    with_rows = ROWS.keys() - parse_suffixes(config.suffixes)
    parts = [read_rows(path, sources) if suffix_of(path) in with_rows else [(path, path)] for path in files or ()]
    if files is None:
        hint = "check its page on the Hub, --subset, --split, the connection"
        parts = [read_hub_rows(config.dataset, config.subset, config.split, hint)]
    kind = None
    for location, item in itertools.chain.from_iterable(parts):
        try:
            document = hash_file(item, sources) if isinstance(item, Path) else hash_row(item, config, sources)
        except ValueError as error:
            sources["rows_left_out"] += 1
            sources.setdefault("first_row_left_out", f"{location}: {error}")
            if sources["rows_left_out"] == MAX_ROWS_WITHOUT_TEXT and kind is None and len(files or [None]) == 1:
                break
            continue
        if sources["undecodable_bytes"]:
            sources.setdefault("first_undecodable", str(location))
        if any(message["role"] == "tool" for message in document.messages or ()):
            sources["with_tool_calls"] += 1
        elif not document.chars:
            sources["empty_documents"] += 1
        else:
            this = "text" if document.messages is None else "a conversation"
            check(kind in (None, this), f"{location}: is {this}, but {kind} came before it: use files of one kind")
            kind = this
            yield document
    hint = "repair the rows, or choose different columns: --text_column, or --prompt_column and --answer_column"
    check(kind or not sources["rows_left_out"], f"{sources.get('first_row_left_out')}: {hint}")


def hash_file(path, sources):
    """Return a text file as one Document. It is read twice: here to hash it, later to encode it."""
    digest, chars = hashlib.sha256(), 0
    with open_text(path, sources) as file:
        while block := file.read(CHUNK_CHARS):
            digest.update(block.encode())
            chars += len(block)
    return Document(digest.digest(), chars, functools.partial(open_file, path, encoding=file.encoding))


def hash_row(row, config, sources):
    """Return a row as a Document: the columns that config names, else a conversation, else the column text."""
    column = config.text_column or "text"
    row = {column: row} if isinstance(row, str) else row
    if not isinstance(row, dict):
        raise ValueError(f"is {row!r:.40}, not an object with columns")
    messages, columns = read_conversation(row, config)
    if messages is None and (config.prompt_column or column not in row):
        wanted = " and ".join(filter(None, (config.prompt_column, config.answer_column))) or column
        raise ValueError(f"no column {wanted}, only {', '.join(map(str, row))}")
    counts = sources.setdefault("columns", {"read": collections.Counter(), "not_read": collections.Counter()})
    for name, value in row.items():
        is_read = name in (columns or [column])
        if value not in (None, "", []):
            counts["read" if is_read else "not_read"][name] += 1
        parts = [part for part in value if isinstance(part, dict)] if is_read and isinstance(value, list) else []
        fields = {field for part in parts for field in part if part[field] and field not in MESSAGE_FIELDS}
        counts["not_read"].update(f"{name}.{field}" for field in fields)
    if messages is not None:
        return hash_messages(messages, sources)
    if not isinstance(row[column], str | None):
        raise ValueError(f"column {column} holds {row[column]!r:.40}, not text")
    text = replace_surrogates(row[column] or "", sources)
    return Document(hashlib.sha256(text.encode()).digest(), len(text), lambda: io.StringIO(text, newline=""))


def hash_messages(messages, sources):
    """Return messages, as from read_conversation, as a Document. Empty answers are masked and counted."""
    messages = [message | {"content": replace_surrogates(message["content"], sources)} for message in messages]
    for message in messages:
        if message["role"] == "assistant" and not message["content"].strip():
            message["weight"] = 0
            sources["empty_answers"] += 1
        for name, count in count_odd_text(message["content"].encode()).items():
            sources[name] += count
    digest = hashlib.sha256(json.dumps(messages).encode()).digest()
    return Document(digest, sum(len(message["content"]) for message in messages), None, messages)


def replace_surrogates(text, sources):
    """Replace lone surrogates, such as JSON's \\ud83d, which UTF-8 cannot encode, by U+FFFD, and count them."""
    text, count = re.subn("[\ud800-\udfff]", "\ufffd", text)
    sources["undecodable_bytes"] += 6 * count
    return text


def count_odd_text(content):
    """Return {kind: count} of the names of special tokens, ordinary text here, and of bytes without a token."""
    counts = {name: content.count(name.encode()) for name in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")}
    return counts | {"no_token": len(content) - len(content.translate(None, NO_TOKEN))}
