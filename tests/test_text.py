"""lib/text.py: every format gives the same documents, odd bytes are counted, errors are one line."""

import bz2
import codecs
import csv
import gzip
import hashlib
import json
import lzma
import pickle
import random
import sys
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from networks import refusal

import lib.official
import lib.text
from lib.text import PLAIN, ROWS, documents, find_files, messages_of, read_rows, read_text
from prepare_data import PrepareConfig

STORIES = [f"Story {i}: the cat sat on mat {i * i}.\r\n\tIt said\u00a0“{'é' * i}”  again.\n\n" for i in range(20)]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A folder to run in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(*paths, **settings):
    """(texts or messages, sources) of files, or of the Hub dataset some/stories if no path is given."""
    sources, items = {"empty_documents": 0, "undecodable_bytes": 0}, []
    config = PrepareConfig(dataset="some/stories", **settings)
    for document in documents([Path(path) for path in paths] or None, config, sources):
        if document.messages is None:
            for _ in range(2):  # a document can be opened again
                with document.open() as file:
                    text = file.read()
                assert document.chars == len(text) and document.sha256 == hashlib.sha256(text.encode()).digest()
        else:
            assert document.sha256 == hashlib.sha256(json.dumps(document.messages).encode()).digest()
        items.append(document.messages or text)
    return items, sources


def write(path, content):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_rows(rows, path):
    """A list of dicts in the format that the suffix says."""
    suffix = Path(path).suffix.lower()
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=7)
    elif suffix in (".csv", ".tsv"):
        with open(path, "w", encoding="utf-8", newline="") as file:
            lines = csv.writer(file, delimiter="\t" if suffix == ".tsv" else ",")
            lines.writerows([rows[0], *(row.values() for row in rows)])
    else:
        write(path, json.dumps(rows, indent=1) if suffix == ".json" else "".join(json.dumps(r) + "\n" for r in rows))
    return path


def stories(column="text"):
    return [{"id": i, column: text} for i, text in enumerate(STORIES)]


# ---- formats


@pytest.mark.parametrize("suffix", [*PLAIN, *ROWS, "", ".TXT", ".JSONL", ".TSV"])
def test_every_format_gives_the_same_documents(suffix):
    if suffix.lower() in ROWS:
        paths = [write_rows(stories(), f"in{suffix}")]
    else:
        paths = [write(f"{i}{suffix}", text) for i, text in enumerate(STORIES)]
    assert read(*paths) == (STORIES, {"empty_documents": 0, "undecodable_bytes": 0})


@pytest.mark.parametrize("compression", [gzip, bz2, lzma], ids=["gz", "bz2", "xz"])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".csv"])
def test_compressed_files(compression, suffix):
    end = {"gzip": ".gz", "bz2": ".bz2", "lzma": ".xz"}[compression.__name__]
    text = "".join(STORIES) * 20
    path = write("in.txt", text) if suffix == ".txt" else write_rows(stories(), f"in{suffix}")
    content, texts = Path(path).read_bytes(), [text] if suffix == ".txt" else STORIES
    half = len(content) // 2  # two members, as `cat a.gz b.gz` makes
    whole = compression.compress(content[:half]) + compression.compress(content[half:])
    assert read(write(f"in{suffix}{end}", whole))[0] == texts
    write(f"cut{suffix}{end}", whole[:-9])
    assert f"cut{suffix}{end} cannot be used (" in refusal(read, f"cut{suffix}{end}")


def test_json_in_many_forms():
    objects = [{"id": {"a": [1, "]"]}, "text": text} for text in STORIES]
    forms = {
        "strings": json.dumps(STORIES), "lines": "\n".join(map(json.dumps, objects)), "empty": " [ ] ",
        "pretty": "\n".join(json.dumps(row, indent=4) for row in objects), "one": json.dumps(objects[7]),
        "odd": " [\r\n" + " ,\t".join(map(json.dumps, objects)) + " ]\n",
    }  # fmt: skip
    for name, content in forms.items():
        texts = {"empty": [], "one": [STORIES[7]]}.get(name, STORIES)
        assert read(write(f"{name}.json", content))[0] == texts, name


def test_csv_as_spreadsheets_write_it():
    rows = 'id;text;n\r\n1;"a ""b""; c\r\nd";2,5\r\n\r\n2;e;3\r\n3\r\n'
    write("a.csv", b"\xef\xbb\xbf" + rows.encode())
    texts, sources = read("a.csv")
    assert texts == ['a "b"; c\r\nd', "e"] and sources["rows_without_column"] == 1
    long = "x" * 300_000  # more than the csv module's own limit
    assert read(write("long.csv", f"text\n{long}\n"))[0] == [long]


def test_rows_and_text_for_other_scripts():
    assert [row for _, row in read_rows(Path(write_rows(stories(), "in.parquet")))] == stories()
    assert next(read_rows(Path(write("in.jsonl", "\n[1]\n")))) == ("in.jsonl, line 2", [1])
    assert read_text(Path(write("a.md.gz", gzip.compress(b"a\r\nb"))), {}) == "a\r\nb"


# ---- encodings: Python's own codecs are the oracle


GERMAN = "Der Überfluß an schönen Wörtern – “ja”, sagt er für 5 €.\r\n"
FRENCH = "Longtemps, je me suis couché de bonne heure. Parfois, à peine ma bougie éteinte, mes yeux se fermaient.\n"
RUSSIAN = "Привет, мир. Это русский текст, который нужно прочитать.\n"
JAPANESE = "こんにちは世界。これは日本語のテキストです。\n"


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
@pytest.mark.parametrize(
    "text, encoding, mark, name",
    [
        (GERMAN, "utf-8", b"", None),
        (GERMAN, "utf-8", codecs.BOM_UTF8, None),
        (GERMAN, "utf-16-le", codecs.BOM_UTF16_LE, "utf-16"),
        (JAPANESE, "utf-16-be", codecs.BOM_UTF16_BE, "utf-16"),
        (GERMAN, "utf-32-le", codecs.BOM_UTF32_LE, "utf-32"),
        (GERMAN, "utf-32-be", codecs.BOM_UTF32_BE, "utf-32"),
        (FRENCH, "cp1252", b"", "cp1252, guessed"),
        (RUSSIAN, "cp1251", b"", "cp1251, guessed"),
        (RUSSIAN, "koi8_r", b"", "koi8_r, guessed"),
        (JAPANESE, "cp932", b"", "cp932, guessed"),
    ],
)
def test_encodings(text, encoding, mark, name, suffix):
    rows = "".join(json.dumps({"text": text, "n": i}, ensure_ascii=False) + "\n" for i in range(50))
    content = text * 50 if suffix == ".txt" else rows
    path = write(f"in{suffix}", mark + content.encode(encoding))
    texts, sources = read(path)
    assert texts == ([text * 50] if suffix == ".txt" else [text] * 50)
    assert sources.pop("encodings", None) == (name and {name: {"files": 1, "first": path}})
    assert sources == {"empty_documents": 0, "undecodable_bytes": 0}


def test_the_first_byte_beyond_ascii_may_come_late():
    """Further in than the first sample, so the first sample tells nothing."""
    text = "plain words, line after line\n" * 80_000 + FRENCH * 3
    assert read(write("late.txt", text.encode("cp1252")))[0] == [text]
    assert read(write("late.txt", text.encode()))[0] == [text]
    good = GERMAN.encode() * (2**21 // len(GERMAN.encode()))
    texts, sources = read(write("late.txt", good + b"\xff" * 100))
    assert texts == [good.decode() + "\ufffd" * 100] and sources["undecodable_bytes"] == 100


@pytest.mark.parametrize(
    "content",
    [gzip.compress(b"text"), pickle.dumps([1, 2, 3.5, "word"]) * 9, b"PAR1\0\0", random.Random(0).randbytes(5_000),
     random.Random(0).randbytes(5_000).replace(b"\0", b""), b"".join(i.to_bytes(2, "little") for i in range(2_000))],
    ids=["gzip", "pickle", "parquet", "random", "without NUL", "numbers"],
)  # fmt: skip
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ""])
def test_binaries_under_a_text_suffix(content, suffix):
    assert f"a{suffix}: a binary file, not text: convert it" in refusal(read, write(f"a{suffix}", content))


# ---- odd bytes


def test_odd_bytes_in_text_files():
    contents = {
        "bom.txt": b"\xef\xbb\xbfmark",
        "crlf.md": b"a\r\nb\rc\n",
        "empty.py": b"",
        "broken.txt": "é“”ü€".encode() * 60 + b"caf\xe9 \xf0\x9f\x98 \xff\xfe end",
        "broken2.txt": "é“”ü€".encode() * 60 + b"\xe9t\xe9",
        "only_bom.txt": b"\xef\xbb\xbf",
        "white.txt": b" \n ",
        "replacement.txt": "a true \ufffd".encode(),
    }
    texts, sources = read(*(write(path, content) for path, content in contents.items()))
    # The texts are what errors="replace" gives, without the byte-order mark and with the line ends kept.
    assert texts == [text for b in contents.values() if (text := b.decode("utf-8-sig", errors="replace"))]
    assert sources == {"empty_documents": 2, "undecodable_bytes": 8, "first_undecodable": "broken.txt"}


def test_odd_rows_in_jsonl_files():
    lines = [r'{"text": "half \ud83d of it"}', r'{"text": "whole \ud83d\ude00"}', r'{"text": "\u0000"}']
    lines += ['{"text": null}', '{"text": ""}', "  ", "\r", '{"text": "line\u2028separator"}']
    write("odd.jsonl", b"\xef\xbb\xbf" + "\n".join(lines).encode() + b'\n{"text": "caf\xe9"}')
    texts, sources = read("odd.jsonl")
    assert texts == ["half \ufffd of it", "whole 😀", "\0", "line\u2028separator", "caf\ufffd"]
    assert sources == {"empty_documents": 2, "undecodable_bytes": 6 + 1, "first_undecodable": "odd.jsonl, line 1"}


# ---- rows without the column


def test_rows_without_the_column_are_counted(monkeypatch):
    monkeypatch.setattr(lib.text, "PATIENCE", 3)
    rows = [{"body": "x"}, {"body": "x"}, {"text": "a"}, {"text": 3}, {}, [1], {"text": None}]
    write("a.jsonl", "\n".join(map(json.dumps, rows)))
    texts, sources = read("a.jsonl")
    assert texts == ["a"] and sources["empty_documents"] == 1 and sources["rows_without_column"] == 5
    assert sources["first_without_column"] == "a.jsonl, line 1: no column text, only body"
    write("package.json", '{"name": "x", "files": []}')
    texts, sources = read("package.json", write("a.txt", "a"), write_rows(stories(), "rows.json"))
    assert texts == ["a", *STORIES] and sources["rows_without_column"] == 1
    write("b.jsonl", '{"body": "x"}\n' * 3 + "not JSON, but this is not reached")
    assert "b.jsonl, line 1: no column text, only body: name the text's column with --text_col" in refusal(
        read, "b.jsonl"
    )


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_text_column(suffix):
    path = write_rows([row | {"text": 0} for row in stories("body")], f"in{suffix}")
    assert read(path, text_column="body")[0] == STORIES


# ---- errors: one line that names the file, the row, the cause and the way out


ERRORS = {  # name: (path, content, words in the error line)
    "missing file": ("gone.txt", None, "gone.txt cannot be used (No such file"),
    "missing rows": ("gone.jsonl", None, "gone.jsonl cannot be used (No such file"),
    "missing parquet": ("gone.parquet", None, "No such file"),
    "no column": ("d/b.jsonl", '\n\n{"body": "b", "id": 1}\n{"id": 2}', "line 3: no column text, only body, id: name"),
    "no column at all": ("a.jsonl", "{}", "a.jsonl, line 1: no column text"),
    "not text": ("a.jsonl", '{"text": 3}', "a.jsonl, line 1: column text holds 3, not text: name the text's column"),
    "not an object": ("a.jsonl", "[1]", "a.jsonl, line 1: is [1], not an object"),
    "not JSON": ("a.jsonl", '{"text": "a"}\n{"text', "a.jsonl, line 2 cannot be used (Unterminated string"),
    "deep JSON": ("a.jsonl", "[" * 10**5, "a.jsonl, line 1 cannot be used ("),
    "deep .json": ("a.json", "[" * 10**5, "a.json cannot be used ("),
    "array cut off": ("a.json", '[{"text": "a"}, ', "a.json cannot be used (Expecting value: line 1 column 1"),
    "no comma": ("a.json", '["a" "b"]', "a.json cannot be used (Expecting ',' delimiter"),
    "comments": ("a.json", '{ // c\n "text": "a"}', "a.json cannot be used ("),
    "open quote": ("a.csv", 'text\n"a\nb\nc\n', "a.csv cannot be used (unexpected end of data)"),
    "no csv column": ("a.csv", "body\nb\n", "a.csv, line 2: no column text, only body"),
    "not parquet": ("a.parquet", "PAR1 no", "a.parquet cannot be used ("),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    path, content, words = ERRORS[case]
    if content is not None:
        write(path, content)
    assert words in refusal(read, path)


def test_missing_libraries(hub, monkeypatch):
    path = write_rows(stories(), "in.parquet")
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert "pip install datasets" in refusal(read) and "pip install pyarrow" in refusal(read, path)


# ---- the Hub


@pytest.fixture
def hub(place, monkeypatch):
    """A folder stands in for the Hub's repository; the datasets library reads it. Returns the calls it got."""
    calls, real = [], datasets.load_dataset

    def load_dataset(name, *args, **kwargs):
        calls.append((name, args, kwargs))
        return real(str(place / "repository"), *args, **kwargs)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(lib.official, "hub_problem", lambda: None)
    Path("repository").mkdir()
    return calls


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_hub_datasets_are_streamed_by_the_datasets_library(hub, suffix):
    write_rows(stories(), f"repository/train{suffix}")
    assert read()[0] == STORIES
    assert hub == [("some/stories", (None,), {"split": "train", "streaming": True})]


def test_hub_errors(hub, monkeypatch):
    write_rows(stories(), "repository/train.jsonl")
    assert "Hub dataset some/stories, split no_such cannot be used" in refusal(lambda: read(split="no_such"))
    assert "--subset" in refusal(lambda: read(subset="no_such"))
    line = refusal(lambda: read(text_column="body"))
    assert "some/stories, row 1: no column body, only id, text: name the text's column with --text_column" in line
    monkeypatch.setattr(lib.official, "hub_problem", lambda: "no answer in 3 s")
    assert "some/stories: no such path, and the Hub cannot be reached (no answer in 3 s)" in refusal(read)


# ---- conversations


def say(*turns):
    return [{"role": role, "content": content} for role, content in turns]


ONE = say(("user", "1 + 1?"), ("assistant", "2"))
PARTS = [{"type": "text", "text": "1 +"}, {"type": "text", "text": " 1?", "image": None}]
CHATS = {  # name: (row, messages)
    "messages": ({"messages": ONE, "prompt": "other", "completion": "other"}, ONE),
    "sharegpt": ({"conversations": [{"from": "human", "value": "1 + 1?"}, {"from": "gpt", "value": "2"}]}, ONE),
    "its other names": (
        {"conversations": [{"from": "user", "value": "1 + 1?"}, {"from": "assistant", "value": "2"}]},
        ONE,
    ),
    "roles under conversations": ({"conversations": ONE}, ONE),
    "alpaca": ({"instruction": "1 + 1?", "input": "", "output": "2"}, ONE),
    "alpaca's input": (
        {"instruction": "Add.", "input": "1, 1", "output": "2"},
        say(("user", "Add.\n\n1, 1"), ("assistant", "2")),
    ),
    "no input": ({"instruction": "1 + 1?", "output": "2"}, ONE),
    "prompt": ({"prompt": "1 + 1?", "completion": "2", "id": 7}, ONE),
    "question": ({"question": "1 + 1?", "answer": "2"}, ONE),
    "columns of several kinds": (
        {"messages": None, "prompt": None, "completion": None, "question": "1 + 1?", "answer": "2"},
        ONE,
    ),
    "parts": ({"messages": say(("user", PARTS), ("assistant", ["2"]))}, ONE),
    "null": ({"messages": [{"role": "assistant", "content": None, "tool_calls": []}]}, say(("assistant", ""))),
    "any role, any order": (
        {"messages": say(("assistant", "a"), ("tool", "b"), ("system", "c"))},
        say(("assistant", "a"), ("tool", "b"), ("system", "c")),
    ),
    "sharegpt's system and tools": (
        {"conversations": [{"from": "system", "value": "s"}, {"from": "function_call", "value": "f()"}]},
        say(("system", "s"), ("function_call", "f()")),
    ),
    "none": ({"body": "x", "prompt": "without a completion"}, None),
    "no messages": ({"messages": []}, []),
}  # fmt: skip


@pytest.mark.parametrize("name", CHATS)
def test_columns_decide(name):
    row, messages = CHATS[name]
    assert messages_of(row, PrepareConfig()) == messages


def test_two_named_columns():
    config = PrepareConfig(prompt_column="in", answer_column="out")
    assert messages_of({"in": "1 + 1?", "out": "2", "messages": say(("user", "other"))}, config) == ONE
    assert messages_of({"question": "1 + 1?", "answer": "2"}, config) is None


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"messages": "text"}, "column messages holds 'text', not a list"),
        ({"messages": {"hello": "bonjour"}}, "not a list of messages"),
        ({"messages": [*ONE, "text"]}, "column messages, message 3 is 'text', not a role and a content"),
        ({"messages": [{"content": "x"}]}, "column messages, message 1 is {'content': 'x'}, not a role and a content"),
        ({"conversations": [{"from": 1, "value": "x"}]}, "column conversations, message 1 is "),
        ({"messages": [{"role": "user", "content": 7}]}, "column messages, message 1 holds 7, not text"),
        ({"messages": say(("user", [{"type": "image_url"}]))}, "message 1 holds [{'type': 'image_url'}], not text"),
        ({"question": "which?", "answer": 2}, "answer holds 2, not text"),
    ],
)
def test_rows_that_cannot_be_read_say_why(row, why):
    with pytest.raises(ValueError, match=r".*") as error:
        messages_of(row, PrepareConfig())
    assert why in str(error.value)


@pytest.mark.parametrize("name", ["messages", "sharegpt", "alpaca", "question"])
def test_conversations_of_every_format(name, monkeypatch):
    rows = [CHATS[name][0]] * 9
    monkeypatch.setattr(lib.official, "hub_problem", lambda: None)
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: iter(rows))
    for path in ("in.jsonl", "in.json", "in.parquet", None):
        paths = [write_rows(rows, path)] if path else []
        assert read(*paths) == ([ONE] * 9, {"empty_documents": 0, "undecodable_bytes": 0}), path


def test_text_comes_before_a_conversation_and_named_columns_before_both():
    rows = [{"text": "t", "question": "1 + 1?", "answer": "2"}] * 9
    for path in ("in.jsonl", "in.parquet"):
        write_rows(rows, path)
        assert read(path)[0] == ["t"] * 9
        assert read(path, text_column="")[0] == [ONE] * 9
        assert read(path, prompt_column="question", answer_column="answer")[0] == [ONE] * 9
    line = refusal(lambda: read("in.jsonl", prompt_column="q", answer_column="a"))
    assert "in.jsonl, line 1: no columns q and a, only text, question, answer" in line


def test_rows_that_are_no_conversation_are_counted():
    bad = [{"messages": [{"role": "user", "content": 7}]}, {"body": "x"}, {"messages": [{"content": "\ud83d"}]}]
    half = {"messages": [{"role": "user", "content": "\ud83d"}]}
    messages, sources = read(write_rows([{"messages": ONE}, *bad, half], "in.jsonl"))
    assert messages == [ONE, [{"role": "user", "content": "\ufffd"}]]
    assert sources["rows_without_column"] == 3 and sources["undecodable_bytes"] == 6
    assert sources["first_without_column"] == "in.jsonl, line 2: column messages, message 1 holds 7, not text"


def test_one_kind_in_a_folder():
    chat, text = write_rows([{"messages": ONE}], "chat.jsonl"), write("notes.txt", "words")
    assert "chat.jsonl, line 1: is a conversation, but text came before it" in refusal(read, text, chat)
    assert "notes.txt: is text, but a conversation came before it" in refusal(read, chat, text)


# ---- which files of a folder or a glob


TREE = {  # path: taken?
    "LICENSE": True, "a.txt": True, "b.md": True, "deep/c.rst": True, "deep/old.txt.gz": True, "page.html": True,
    "main.c": False, "deep/x.C": False, "x.h": False, "p.png": False, "program": False, "paper.pdf": False,
    ".hidden.txt": False, ".git/notes.txt": False, "node_modules/m/readme.md": False, "node_modules/b.js": False,
}  # fmt: skip


@pytest.fixture
def tree(place):
    for path in TREE:
        content = b"\x89PNG\0\0" if path in ("p.png", "program", "paper.pdf") else path.encode()
        write(f"f/{path}", gzip.compress(content) if path.endswith(".gz") else content)
    Path("f/link").symlink_to("deep")
    Path("f/gone.txt").symlink_to("nowhere.txt")


def names(pattern, suffixes=""):
    _, files, left_out = find_files(Path(pattern), suffixes)
    return [file.relative_to("f").as_posix() for file in files], left_out


TAKEN = [path for path, taken in TREE.items() if taken]


@pytest.mark.parametrize("pattern", ["f", "f/**/*"])
def test_a_folder_and_what_it_leaves_out(tree, pattern):
    counts = {".c": 2, "in node_modules": 2, "hidden": 1, "in .git": 1, ".h": 1, ".png": 1, ".pdf": 1}
    assert names(pattern) == (TAKEN, counts | {"binary without a suffix": 1})


@pytest.mark.parametrize(
    "pattern, suffixes, taken",
    [
        ("f", ".c, h,.json", [*TAKEN, "main.c", "deep/x.C", "x.h"]),
        ("f", "all", [*TAKEN, "main.c", "deep/x.C", "x.h"]),
        ("f/*.c", "", ["main.c"]),  # the suffix in a glob counts, too
        ("f/node_modules/*/*.md", "", ["node_modules/m/readme.md"]),
    ],
)
def test_suffixes(tree, pattern, suffixes, taken):
    assert names(pattern, suffixes)[0] == sorted(taken)
