"""lib/text.py: every format gives the same documents, odd bytes are counted, errors are one line."""

import bz2
import collections
import csv
import gzip
import hashlib
import io
import json
import lzma
import sys
from pathlib import Path

import datasets
import pandas
import pyarrow
import pyarrow.parquet
import pytest
from networks import refusal, say, write

import lib.official
import lib.text
from lib.text import ROWS, TEXT_SUFFIXES, find_files, read_conversation, read_documents
from prepare_data import PrepareConfig

STORIES = [f"Story {i}: the cat sat on mat {i * i}.\r\n\tIt said\u00a0“{'é' * i}”  again.\n\n" for i in range(20)]
STORY_ROWS = [{"id": i, "text": text} for i, text in enumerate(STORIES)]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """Run in a temporary folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(*paths, **settings):
    """Return (strings or messages, sources) of files, or of the Hub dataset some/stories without a path."""
    sources, items = collections.defaultdict(int), []
    config = PrepareConfig(dataset="some/stories", **settings)
    for document in read_documents([Path(path) for path in paths] or None, config, sources):
        if document.messages is None:
            for _ in range(2):  # a document can be opened again
                with document.open() as file:
                    text = file.read()
                assert document.chars == len(text) and document.sha256 == hashlib.sha256(text.encode()).digest()
        else:
            assert document.sha256 == hashlib.sha256(json.dumps(document.messages).encode()).digest()
        items.append(document.messages or text)
    return items, {name: count for name, count in sources.items() if count}


def write_rows(rows, path):
    """Write a list of dicts in the format of the suffix."""
    suffix = Path(path).suffix.lower()
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=7)
        return path
    if suffix in (".csv", ".tsv"):
        file = io.StringIO()
        lines = csv.writer(file, delimiter="\t" if suffix == ".tsv" else ",")
        lines.writerows([rows[0], *(row.values() for row in rows)])
        return write(path, file.getvalue())
    return write(path, json.dumps(rows, indent=1) if suffix == ".json" else "\n".join(map(json.dumps, rows)))


@pytest.mark.parametrize("suffix", [*TEXT_SUFFIXES, *ROWS, "", ".TXT", ".JSONL", ".TSV"])
def test_every_format_gives_the_same_documents(suffix):
    if suffix.lower() in ROWS:
        paths = [write_rows(STORY_ROWS, f"in{suffix}")]
    else:
        paths = [write(f"{i}{suffix}", text) for i, text in enumerate(STORIES)]
    columns = {"read": {"text": 20}, "not_read": {"id": 20}}
    assert read(*paths) == (STORIES, {"columns": columns} if suffix.lower() in ROWS else {})


COMPRESSED = {".txt.gz": gzip, ".txt.bz2": bz2, ".txt.xz": lzma, ".jsonl.gz": gzip, ".json.gz": gzip, ".csv.gz": gzip}


@pytest.mark.parametrize("suffix", COMPRESSED)
def test_compressed_files(suffix):
    plain, compress = f"in{Path(suffix).stem}", COMPRESSED[suffix].compress
    path = write(plain, "".join(STORIES)) if plain == "in.txt" else write_rows(STORY_ROWS, plain)
    content = Path(path).read_bytes()
    complete = compress(content[:99]) + compress(content[99:])  # two members, as `cat a.gz b.gz` makes
    assert read(write(f"in{suffix}", complete))[0] == (["".join(STORIES)] if plain == "in.txt" else STORIES)
    assert f"cut{suffix} cannot be used (" in refusal(read, write(f"cut{suffix}", complete[:-9]))


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
    rows = 'id;text;n\r\n1;"a ""b""; c\r\nd";2,5\r\n\r\n2;e;3\r\n'
    write("a.csv", b"\xef\xbb\xbf" + rows.encode())
    texts = read("a.csv")[0]
    assert texts == list(pandas.read_csv("a.csv", sep=";").text) == ['a "b"; c\r\nd', "e"]
    assert read(write("a.tsv", rows.replace(";", "\t")))[0] == list(pandas.read_csv("a.tsv", sep="\t").text)
    long = "x" * 300_000  # more than the csv module's own limit
    assert read(write("long.csv", f"text\n{long}\n"))[0] == [long]


FRENCH = "Longtemps, je me suis couché de bonne heure. Parfois, à peine ma bougie éteinte, mes yeux se fermaient.\r\n"
JAPANESE = "こんにちは世界。これは日本語のテキストです。\n"
ENCODINGS = {  # name: name in the note
    "utf-8": None, "utf-16-le": "utf-16", "utf-16-be": "utf-16", "utf-32-le": "utf-32", "utf-32-be": "utf-32",
    "cp1252": "cp1252, guessed", "cp932": "cp932, guessed",
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_encodings(encoding, suffix):
    text = JAPANESE if encoding == "cp932" else FRENCH
    rows = "".join(json.dumps({"text": text, "n": i}, ensure_ascii=False) + "\n" for i in range(50))
    mark = "\ufeff" if encoding.startswith("utf") else ""
    path = write(f"in{suffix}", (mark + (text * 50 if suffix == ".txt" else rows)).encode(encoding))
    texts, sources = read(path)
    assert texts == ([text * 50] if suffix == ".txt" else [text] * 50)
    name = ENCODINGS[encoding]
    assert sources.pop("encodings", None) == (name and {name: {"files": 1, "first": path}})
    assert not {*sources} - {"columns"}


def test_the_first_byte_beyond_ascii_may_come_late():
    """The first sample of the file is ASCII, and fits every encoding."""
    text = "plain words, line after line\n" * 80_000 + FRENCH * 3
    assert read(write("late.txt", text.encode("cp1252")))[0] == [text]
    good = FRENCH.encode() * (2**21 // len(FRENCH.encode()))
    texts, sources = read(write("late.txt", good + b"\xff" * 100))
    assert texts == [good.decode() + "\ufffd" * 100] and sources["undecodable_bytes"] == 100


def test_odd_bytes_in_text_files():
    contents = {
        "bom.txt": b"\xef\xbb\xbfmark", "crlf.md": b"a\r\nb\rc\n", "empty.py": b"", "only_bom.txt": b"\xef\xbb\xbf",
        "broken.txt": "é“”ü€".encode() * 60 + b"caf\xe9 \xf0\x9f\x98 \xff\xfe end", "white.txt": b" \n ",
    }  # fmt: skip
    texts, sources = read(*(write(path, content) for path, content in contents.items()))
    # As with errors="replace", without the byte-order mark and with the line ends kept.
    assert texts == [text for b in contents.values() if (text := b.decode("utf-8-sig", errors="replace"))]
    assert sources == {"empty_documents": 2, "undecodable_bytes": 6, "first_undecodable": "broken.txt"}


def test_odd_rows_in_jsonl_files():
    lines = [r'{"text": "half \ud83d of it"}', r'{"text": "whole \ud83d\ude00"}', r'{"text": "\u0000"}']
    lines += ['{"text": null}', '{"text": ""}', "  ", "\r", '{"text": "line\u2028separator"}']
    write("odd.jsonl", b"\xef\xbb\xbf" + "\n".join(lines).encode() + b'\n{"text": "caf\xe9"}')
    texts, sources = read("odd.jsonl")
    assert texts == ["half \ufffd of it", "whole 😀", "\0", "line\u2028separator", "caf\ufffd"]
    columns = {"read": {"text": 5}, "not_read": {}}
    first = {"first_undecodable": "odd.jsonl, line 1", "columns": columns}
    assert sources == {"empty_documents": 2, "undecodable_bytes": 6 + 1} | first
    messages, sources = read(write("chat.jsonl", r'{"messages": [{"role": "user", "content": "\ud83d"}]}'))
    assert messages == [say(("user", "\ufffd"))] and sources["undecodable_bytes"] == 6


def test_rows_without_the_column_are_counted(monkeypatch):
    monkeypatch.setattr(lib.text, "MAX_ROWS_WITHOUT_TEXT", 3)
    rows = [{"body": "x"}, {"body": "x"}, {"text": "a"}, {"text": 3}, {}, [1], {"text": None}]
    write("a.jsonl", "\n".join(map(json.dumps, rows)))
    texts, sources = read("a.jsonl")
    assert texts == ["a"] and sources["empty_documents"] == 1 and sources["rows_left_out"] == 5
    assert sources["first_row_left_out"] == "a.jsonl, line 1: no column text, only body"
    write("b.jsonl", '{"body": "x"}\n' * 3 + "not JSON, but this is not reached")
    assert "line 1: no column text, only body: repair the rows, or choose" in refusal(read, "b.jsonl")
    texts, sources = read(write("package.json", "{}"), write("a.txt", "a"))
    assert texts == ["a"] and sources["rows_left_out"] == 1


# ---- errors: one line with the file, the row, the cause and what to do next


ERRORS = {  # name: (path, content, words in the error line)
    "missing file": ("gone.txt", None, "gone.txt cannot be used (No such file"),
    "binary": ("a.txt", gzip.compress(b"text"), "a.txt: a binary file, not text: convert it"),
    "rows with NUL": ("a.jsonl", b"PAR1\0\0", "a.jsonl: a binary file, not text: convert it"),
    "no suffix": ("a", b"PAR1\0\0", "a: a binary file, not text: convert it"),
    "no column": ("d/b.jsonl", '\n\n{"body": "b", "id": 1}\n{"id": 2}', "line 3: no column text, only body, id: rep"),
    "not text": ("a.jsonl", '{"text": 3}', "a.jsonl, line 1: column text holds 3, not text: repair the rows"),
    "not an object": ("a.jsonl", "[1]", "a.jsonl, line 1: is [1], not an object"),
    "not JSON": ("a.jsonl", '{"text": "a"}\n{"text', "a.jsonl, line 2 cannot be used (Unterminated string"),
    "deep JSON": ("a.jsonl", "[" * 10**5, "a.jsonl, line 1 cannot be used ("),
    "array cut off": ("a.json", '[{"text": "a"}, ', "a.json cannot be used (Expecting value: line 1 column 1"),
    "open quote": ("a.csv", 'text\n"a\nb\nc\n', "a.csv, line 2 cannot be used (unexpected end of data)"),
    "commas": ("a.csv", 'text,n\n"a\nb",1\nc, d,2\n', "a.csv, line 4 cannot be used (3 fields, but the header has 2)"),
    "few fields": ("a.csv", "n,text\n1\n", "a.csv, line 2 cannot be used (1 fields, but the header has 2): quote e"),
    "quote": ("a.tsv", 'n\tt\n1\tb\n2\t"c\n3\td\n4\te"\n', "a.tsv, line 3 cannot be used (a quote opens here and s"),
    "role": ("a.jsonl", '{"messages": [{"role": "he", "content": ""}]}', "message 1 has the role 'he', none of sys"),
    "weight": ("a.jsonl", '{"messages": [{"role": "user", "weight": 2}]}', "message 1 has a weight or train of [2"),
    "history": ("a.jsonl", '{"instruction": "a", "output": "b", "history": ["c"]}', "column history holds ['c'], n"),
    "no csv column": ("a.csv", "body\nb\n", "a.csv, line 2: no column text, only body"),
    "no list": ("a.jsonl", '{"messages": "text"}', "line 1: column messages holds 'text', not a list"),
    "no role": ("a.jsonl", '{"messages": ["text"]}', "column messages, message 1 is 'text', not a role and a content"),
    "no content": ("a.jsonl", '{"messages": [{"role": "user", "content": 7}]}', "message 1 holds 7, not text"),
    "no words": ("a.jsonl", '{"messages": [{"role": "user", "content": [{"a": 1}]}]}', "holds [{'a': 1}], not text"),
    "no answer": ("a.jsonl", '{"question": "which?", "answer": 2}', "answer holds 2, not text"),
    "not parquet": ("a.parquet", "PAR1 no", "a.parquet cannot be used ("),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    path, content, words = ERRORS[case]
    if content is not None:
        write(path, content)
    assert words in refusal(read, path)


def test_hub_datasets_are_streamed_by_the_datasets_library(place, monkeypatch):
    """A folder stands in for the Hub's repository."""
    calls, load = [], datasets.load_dataset

    def load_dataset(name, *args, **kwargs):
        calls.append((name, args, kwargs))
        return load(str(place / "repository"), *args, **kwargs)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(lib.official, "probe_hub", lambda: None)
    write("repository/train.jsonl", "\n".join(map(json.dumps, STORY_ROWS)))
    assert read()[0] == STORIES
    assert calls == [("some/stories", (None,), {"split": "train", "streaming": True})]
    assert "Hub dataset some/stories, split no_such cannot be used" in refusal(lambda: read(split="no_such"))
    assert "--subset" in refusal(lambda: read(subset="no_such"))
    words = "some/stories, row 1: no column body, only id, text: repair the rows, or choose different columns: --text"
    assert words in refusal(lambda: read(text_column="body"))
    write_rows(STORY_ROWS, "in.parquet")
    for library, paths in (("datasets", []), ("pyarrow.parquet", ["in.parquet"])):
        monkeypatch.setitem(sys.modules, library, None)
        assert f"pip install {library.split('.')[0]}" in refusal(read, *paths)
    monkeypatch.setattr(lib.official, "probe_hub", lambda: "no answer in 3 s")
    assert "some/stories: no such path, and the Hub cannot be reached (no answer in 3 s)" in refusal(read)


ONE = say(("user", "1 + 1?"), ("assistant", "2"))
SHAREGPT = [{"from": "human", "value": "1 + 1?"}, {"from": "gpt", "value": "2"}]
PARTS = [{"type": "text", "text": "1 +"}, {"type": "text", "text": " 1?", "image": None}]
CALL = say(("user", "1 + 1?")) + [{"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}]
SYSTEM = say(("system", "Be brief."))
FIRST = [ONE[0], ONE[1] | {"weight": 0}, *say(("user", "2 + 2?"), ("assistant", "4"))]
ALPACA = {"instruction": "2 + 2?", "output": "4"}
CHATS = {  # name: (row, messages)
    "messages": ({"messages": ONE, "prompt": "other", "completion": "other"}, ONE),
    "sharegpt": ({"conversations": SHAREGPT}, ONE),
    "roles under conversations": ({"conversations": ONE}, ONE),
    "other roles": ({"messages": say(("User", "1 + 1?"), ("Model", "2"))}, ONE),
    "developer": ({"messages": say(("developer", "Be brief."), ("HUMAN", "1 + 1?"), ("bot", "2"))}, SYSTEM + ONE),
    "alpaca": ({"instruction": "1 + 1?", "input": "", "output": "2"}, ONE),
    "alpaca's input": ({"instruction": "1", "input": "+ 1?", "output": "2"}, [say(("user", "1\n\n+ 1?"))[0], ONE[1]]),
    "alpaca's history": (ALPACA | {"history": [["1 + 1?", "2"]]}, [*ONE, *FIRST[2:]]),
    "alpaca and its text": ({"instruction": "1 + 1?", "input": None, "output": "2", "text": "Below is 1 + 1?"}, ONE),
    "prompt": ({"prompt": "1 + 1?", "completion": "2", "id": 7}, ONE),
    "prompt of messages": ({"prompt": ONE[:1], "completion": ONE[1:]}, ONE),
    "prompt with an answer": ({"prompt": [*ONE, FIRST[2]], "completion": FIRST[3:]}, FIRST),
    "question": ({"messages": None, "prompt": None, "completion": None, "question": "1 + 1?", "answer": "2"}, ONE),
    "parts": ({"messages": say(("user", PARTS), ("assistant", ["2"]))}, ONE),
    "system": ({"messages": ONE, "system": "Be brief."}, SYSTEM + ONE),
    "system_prompt": ({"conversations": SHAREGPT, "system_prompt": "Be brief."}, SYSTEM + ONE),
    "alpaca's system": ({"instruction": "1 + 1?", "output": "2", "system": "Be brief."}, SYSTEM + ONE),
    "no system": ({"messages": ONE, "system": "", "system_prompt": None}, ONE),
    "two systems": ({"messages": SYSTEM + ONE, "system": "Be long."}, SYSTEM + ONE),
    "weight 0": ({"messages": [ONE[0], ONE[1] | {"weight": 0}, FIRST[2], FIRST[3] | {"weight": 1}]}, FIRST),
    "not trained": ({"conversations": [SHAREGPT[0], SHAREGPT[1] | {"train": False}, *FIRST[2:]]}, FIRST),
    "a call": ({"messages": CALL}, say(("user", "1 + 1?"), ("tool", ""))),
    "sharegpt's call": ({"conversations": [{"from": "function_call", "value": {"a": 1}}]}, say(("tool", ""))),
    "a result": ({"messages": [{"role": "Observation", "content": "2"}]}, say(("tool", ""))),
    "null": ({"messages": [{"role": "assistant", "content": None}]}, say(("assistant", ""))),
    "none": ({"body": "x", "prompt": "without a completion"}, None),
    "no messages": ({"messages": []}, []),
}  # fmt: skip


@pytest.mark.parametrize("name", CHATS)
def test_columns_decide(name):
    assert read_conversation(CHATS[name][0], PrepareConfig())[0] == CHATS[name][1]


def test_columns_and_fields_that_are_not_read_are_counted():
    asked = {"role": "user", "content": "1 + 1?", "name": "Ann"}
    rows = [{"messages": [asked, ONE[1]], "system": "a", "id": 1}, {"messages": SYSTEM + ONE, "system": "b", "id": []}]
    columns = {"read": {"messages": 2, "system": 1}, "not_read": {"id": 1, "system": 1, "messages.name": 1}}
    assert read(write_rows(rows, "in.jsonl"))[1] == {"columns": columns}
    rows = [{"messages": CALL}] * 2 + [{"question": "1 + 1?", "answer": "2"}, {"question": "1?", "answer": None}]
    chats, sources = read(write_rows(rows, "in.jsonl"))
    assert chats == [ONE, [say(("user", "1?"))[0], {"role": "assistant", "content": "", "weight": 0}]]
    assert sources["with_tool_calls"] == 2 and sources["empty_answers"] == 1


def test_a_conversation_comes_before_text_and_named_columns_before_both():
    rows = [{"text": "t", "question": "1 + 1?", "answer": "2", "prompt": "a", "completion": "b"}] * 9
    for path in ("in.json", "in.jsonl", "in.parquet"):
        for name in ("messages", "sharegpt", "alpaca", "question"):
            assert read(write_rows([CHATS[name][0]] * 9, path))[0] == [ONE] * 9
        write_rows(rows, path)
        assert read(path, text_column="text")[0] == ["t"] * 9
        assert read(path)[0] == [say(("user", "a"), ("assistant", "b"))] * 9
        assert read(path, prompt_column="question", answer_column="answer")[0] == [ONE] * 9
    line = refusal(lambda: read("in.jsonl", prompt_column="q", answer_column="a"))
    assert "in.jsonl, line 1: no column q and a, only text, question, answer, prompt, completion" in line


def test_one_kind_in_a_folder():
    chat, text = write_rows([{"messages": ONE}], "chat.jsonl"), write("notes.txt", "words")
    assert "chat.jsonl, line 1: is a conversation, but text came before it" in refusal(read, text, chat)
    assert "notes.txt: is text, but a conversation came before it" in refusal(read, chat, text)


TREE = {  # path: is it read?
    "LICENSE": True, "a.txt": True, "b.md": True, "deep/c.rst": True, "deep/old.txt.gz": True, "page.html": True,
    "main.c": False, "deep/x.C": False, "x.h": False, "p.png": False, "program": False, "paper.pdf": False,
    ".hidden.txt": False, ".git/notes.txt": False, "node_modules/m/readme.md": False, "node_modules/b.js": False,
}  # fmt: skip
READ = [path for path, is_read in TREE.items() if is_read]


PATTERNS = {  # pattern, suffixes: the files to read
    ("f", ""): READ, ("f/**/*", ""): READ,
    ("f", ".c, h,.json"): [*READ, "main.c", "deep/x.C", "x.h"], ("f", "all"): [*READ, "main.c", "deep/x.C", "x.h"],
    ("f/*.c", ""): ["main.c"], ("f/node_modules/*/*.md", ""): ["node_modules/m/readme.md"],
}  # fmt: skip


@pytest.mark.parametrize("pattern, suffixes", PATTERNS)
def test_files_of_a_folder_and_which_it_leaves_out(pattern, suffixes):
    for path in TREE:
        content = b"\x89PNG\0\0" if path in ("p.png", "program", "paper.pdf") else path.encode()
        write(f"f/{path}", gzip.compress(content) if path.endswith(".gz") else content)
    Path("f/link").symlink_to("deep")
    Path("f/gone.txt").symlink_to("nowhere.txt")
    _, files, left_out = find_files(Path(pattern), suffixes)
    assert [file.relative_to("f").as_posix() for file in files] == sorted(PATTERNS[pattern, suffixes])
    if PATTERNS[pattern, suffixes] == READ:
        counts = {".c": 2, "node_modules": 2, ".hidden.txt": 1, ".git": 1, ".h": 1, ".png": 1, ".pdf": 1}
        assert left_out == counts | {"binary without a suffix": 1}
