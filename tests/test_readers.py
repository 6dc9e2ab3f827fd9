"""lib/readers.py: every format gives the same documents, odd bytes are counted, errors are one line."""

import bz2
import codecs
import contextlib
import csv
import gzip
import hashlib
import json
import lzma
import os
import pickle
import random
import sqlite3
import sys
import zipfile
from pathlib import Path

import datasets
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

import lib.official
import lib.readers
from lib.readers import ROWS, SUFFIXES, documents
from prepare_data import PrepareConfig

STORIES = [f"Story {i}: the cat sat on mat {i * i}.\r\n\tIt said\u00a0“{'é' * i}”  again.\n\n" for i in range(20)]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A folder to run in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(*paths, **settings):
    """(texts, sources) of files, or of the Hub dataset some/stories if no path is given."""
    sources = {"empty_documents": 0, "undecodable_bytes": 0}
    texts = []
    config = PrepareConfig(dataset="some/stories", **settings)
    for document in documents([Path(path) for path in paths] or None, config, sources):
        for _ in range(2):  # a document can be opened again
            with document.open() as file:
                text = file.read()
            assert document.chars == len(text) and document.sha256 == hashlib.sha256(text.encode()).digest()
        texts.append(text)
    return texts, sources


def write(path, content):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_jsonl(texts, path="in.jsonl"):
    return write(path, "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)))


def write_parquet(texts, path="in.parquet", column="text"):
    pyarrow.parquet.write_table(pyarrow.table({"id": range(len(texts)), column: texts}), path, row_group_size=7)
    return path


# ---- formats


def write_json(texts, path):
    return write(path, json.dumps([{"id": i, "text": text} for i, text in enumerate(texts)], indent=1))


def write_csv(texts, path):
    with open(path, "w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, delimiter="\t" if path.lower().endswith(".tsv") else ",")
        rows.writerows([("id", "text"), *enumerate(texts)])
    return path


def write_arrow(texts, path):
    table = pyarrow.table({"id": range(len(texts)), "text": texts})
    with pyarrow.ipc.new_stream(path, table.schema) as file:  # as the datasets library writes
        file.write_table(table)
    return path


WRITERS = {
    ".jsonl": write_jsonl, ".ndjson": write_jsonl, ".json": write_json, ".csv": write_csv, ".tsv": write_csv,
    ".parquet": write_parquet, ".arrow": write_arrow,
}  # fmt: skip


@pytest.mark.parametrize("suffix", [*SUFFIXES, "", ".TXT", ".JSONL", ".TSV"])
def test_every_format_gives_the_same_documents(suffix):
    if suffix == ".ipynb":
        paths = [write_notebook([text], f"{i}.ipynb") for i, text in enumerate(STORIES)]
    elif suffix.lower() in ROWS:
        paths = [WRITERS[suffix.lower()](STORIES, f"in{suffix}")]
    else:
        paths = [write(f"{i}{suffix}", text) for i, text in enumerate(STORIES)]
    assert read(*paths) == (STORIES, {"empty_documents": 0, "undecodable_bytes": 0})


@pytest.mark.parametrize("compression", [gzip, bz2, lzma, "zstandard"], ids=["gz", "bz2", "xz", "zst"])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".csv"])
def test_compressed_files(compression, suffix):
    if compression == "zstandard":
        compression = pytest.importorskip("zstandard")
    end = {"gzip": ".gz", "bz2": ".bz2", "lzma": ".xz", "zstandard": ".zst"}[compression.__name__]
    text = "".join(STORIES) * 20
    path = write("in.txt", text) if suffix == ".txt" else WRITERS[suffix](STORIES, f"in{suffix}")
    content, texts = Path(path).read_bytes(), [text] if suffix == ".txt" else STORIES
    half = len(content) // 2  # two members, as `cat a.gz b.gz` makes
    whole = compression.compress(content[:half]) + compression.compress(content[half:])
    assert read(write(f"in{suffix}{end}", whole))[0] == texts
    write(f"cut{suffix}{end}", whole[:-9])
    assert_one_line([f"cut{suffix}{end}: not a whole {end} file", "fetch it again"], f"cut{suffix}{end}")


def test_zst_without_its_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    assert_one_line(["in.txt.zst", "pip install zstandard"], write("in.txt.zst", "x"))


def test_json_in_disguise(monkeypatch):
    objects = [{"id": {"a": [1, "]"]}, "text": text} for text in STORIES]
    forms = {
        "strings": json.dumps(STORIES), "lines": "\n".join(map(json.dumps, objects)), "empty": " [ ] ",
        "pretty": "\n".join(json.dumps(row, indent=4) for row in objects), "one": json.dumps(objects[7]),
        "odd": " [\r\n" + " ,\t".join(map(json.dumps, objects)) + " ]\n",
    }  # fmt: skip
    for chunk in (1, 7, 100, 2**18):  # an item that is cut off is read on
        monkeypatch.setattr(lib.readers, "CHUNK", chunk)
        for name, content in forms.items():
            texts = {"empty": [], "one": [STORIES[7]]}.get(name, STORIES)
            assert read(write(f"{name}.json", content))[0] == texts, (name, chunk)


def write_notebook(cells, path):
    cells = [{"cell_type": "code", "source": cell, "outputs": [{"text": "not this"}]} for cell in cells]
    return write(path, json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))


def test_notebooks():
    write_notebook(["# Title\n", ["import os\n", "os.sep"], "", "é"], "new.ipynb")
    cells = [{"cell_type": "markdown", "source": ["Old"]}, {"cell_type": "code", "input": ["x = 1\n", "x"]}]
    write("old.ipynb", json.dumps({"worksheets": [{"cells": cells}], "nbformat": 3}))
    assert read("new.ipynb", "old.ipynb")[0] == ["# Title\n\n\nimport os\nos.sep\n\né", "Old\n\nx = 1\nx"]


def test_csv_as_spreadsheets_write_it():
    rows = 'id;text;n\r\n1;"a ""b""; c\r\nd";2,5\r\n\r\n2;e;3\r\n3\r\n'
    write("a.csv", b"\xef\xbb\xbf" + rows.encode())
    texts, sources = read("a.csv")
    assert texts == ['a "b"; c\r\nd', "e"] and sources["rows_without_column"] == 1
    long = "x" * 300_000  # more than the csv module's own limit
    assert read(write("long.csv", f"text\n{long}\n"))[0] == [long]


def test_folders_that_datasets_saved():
    one = datasets.Dataset.from_dict({"id": range(len(STORIES)), "text": STORIES})
    one.save_to_disk("one")
    datasets.DatasetDict(train=one, test=one.select([3, 5])).save_to_disk("splits")
    assert read("one")[0] == STORIES == read("splits")[0]
    assert read("splits", split="test")[0] == [STORIES[3], STORIES[5]]
    assert_one_line(["splits: no split val, only train, test", "--split"], "splits", split="val")
    assert_one_line(["one, row 1: no column body", "--text_column"], "one", text_column="body")
    assert read(*Path("one").glob("*.arrow"))[0] == STORIES


# ---- encodings: Python's own codecs are the oracle


GERMAN = "Der Überfluß an schönen Wörtern – “ja”, sagt er für 5 €.\r\n"
RUSSIAN = "Привет, мир. Это русский текст, который нужно прочитать.\n"
JAPANESE = "こんにちは世界。これは日本語のテキストです。\n"


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
@pytest.mark.parametrize(
    "text, encoding, mark, how",
    [
        (GERMAN, "utf-8", codecs.BOM_UTF8, None),
        (GERMAN, "utf-16-le", codecs.BOM_UTF16_LE, "utf-16, by its byte-order mark"),
        (JAPANESE, "utf-16-be", codecs.BOM_UTF16_BE, "utf-16, by its byte-order mark"),
        (GERMAN, "utf-32-le", codecs.BOM_UTF32_LE, "utf-32, by its byte-order mark"),
        (GERMAN, "utf-32-be", codecs.BOM_UTF32_BE, "utf-32, by its byte-order mark"),
        (GERMAN, "utf-16-le", b"", "utf-16-le, guessed"),
        (RUSSIAN, "utf-16-be", b"", "utf-16-be, guessed"),
        (JAPANESE, "utf-32-le", b"", "utf-32-le, guessed"),
        (GERMAN, "utf-32-be", b"", "utf-32-be, guessed"),
        (GERMAN, "cp1252", b"", "cp1252, guessed"),
        (RUSSIAN, "cp1251", b"", "cp1251, guessed"),
        (RUSSIAN, "koi8_r", b"", "koi8_r, guessed"),
        (JAPANESE, "cp932", b"", "cp932, guessed"),
        (JAPANESE, "gb18030", b"", None),
    ],
)
def test_encodings(text, encoding, mark, how, suffix):
    if encoding == "gb18030":
        text, how = "你好,世界。这是一个中文文本文件,用来测试编码。\n", "gb18030, guessed"
    rows = "".join(json.dumps({"text": text, "n": i}, ensure_ascii=False) + "\n" for i in range(50))
    content = text * 50 if suffix == ".txt" else rows
    path = write(f"in{suffix}", mark + content.encode(encoding))
    texts, sources = read(path)
    assert texts == ([text * 50] if suffix == ".txt" else [text] * 50)
    assert sources.pop("encodings", None) == (how and {how: {"files": 1, "first": path}})
    assert sources == {"empty_documents": 0, "undecodable_bytes": 0}


@pytest.mark.parametrize(
    "encoding, text",
    [
        *(("cp1252", text) for text in ("été", "“Yes” – 5 €", "naïve", "naïve café, déjà vu", "Perché no? È già lì.")),
        ("cp1252", "Señor, mañana será otro día. ¿Qué tal?"),
        ("cp1252", "As condições são boas, então não há razões."),
        ("cp1252", "Från början till slut är det så här på svenska."),
        ("cp1250", "Zażółć gęślą jaźń, proszę państwa, to jest tekst po polsku."),
        ("cp1250", "Příliš žluťoučký kůň úpěl ďábelské ódy."),
        ("cp1250", "Árvíztűrő tükörfúrógép, erről szól ez a szép magyar szöveg, hű és jó, őrült nő."),
        ("cp1253", "Καλημέρα κόσμε. Αυτό είναι ένα κείμενο."),
        ("cp1254", "Türkçe bir metin, çok güzel şeyler yazılmış, değil mi?"),
    ],
)
def test_short_texts_in_code_pages(encoding, text):
    for times in (1, 40):
        assert read(write("short.txt", (text + "\n").encode(encoding) * times))[0] == [(text + "\n") * times]


def test_the_first_byte_beyond_ascii_may_come_late():
    """Further in than the first sample, so the first sample tells nothing."""
    text = "plain words, line after line\n" * 80_000 + GERMAN * 3
    assert read(write("late.txt", text.encode("cp1252")))[0] == [text]
    assert read(write("late.txt", text.encode()))[0] == [text]


def test_utf8_that_breaks_after_the_sample():
    good = GERMAN.encode() * (2**21 // len(GERMAN.encode()))
    texts, sources = read(write("late.txt", good + b"\xff" * 100))
    assert texts == [good.decode() + "\ufffd" * 100] and sources["undecodable_bytes"] == 100
    assert_one_line(["late.txt: ", "are not utf-8: convert it"], write("late.txt", good + b"\xff" * (len(good) // 90)))
    rows = b'{"text": "\xc3\xa9"}\n' * 100
    assert read(write("a.jsonl", rows + b'{"text": "\xff"}\n'))[0] == ["é"] * 100 + ["\ufffd"]
    bad = b'{"text": "' + b"\xc3\xa9\xff" * 20 + b'"}\n'
    assert_one_line(["a.jsonl: ", "are not utf-8: convert it"], write("a.jsonl", rows + bad * 10))


def zipped():
    with zipfile.ZipFile("a.zip", "w") as file:
        file.writestr("word/document.xml", "x")
    return Path("a.zip").read_bytes()


def database():
    with contextlib.closing(sqlite3.connect("a.db")) as file:
        file.execute("create table t (a)")
        file.commit()
    return Path("a.db").read_bytes()


BINARIES = {
    "pandoc": zipped,
    "rename it to end in .gz": lambda: gzip.compress(b"text"),
    "pdftotext a.txt a.txt": lambda: b"%PDF-1.7\n%\xe2\xe3\n",
    "git lfs pull": lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    "SQLite": database,
    ".parquet": lambda: Path(write_parquet(STORIES)).read_bytes(),
    "rename it to end in .arrow": lambda: Path(write_arrow(STORIES, "a.arrow")).read_bytes(),
    "rename it to end in .bz2": lambda: bz2.compress(b"text"),
    "rename it to end in .xz": lambda: lzma.compress(b"text"),
    "binary file": lambda: pickle.dumps([1, 2, 3.5, "word"]) * 9,
    "a binary file, not": lambda: random.Random(0).randbytes(5_000),
    "not text: convert": lambda: random.Random(0).randbytes(5_000).replace(b"\0", b""),
    "a binary": lambda: b"".join((i % 30).to_bytes(2, "little") for i in range(2_000)),  # valid UTF-8
    "binary": lambda: b"".join(i.to_bytes(2, "little") for i in range(2_000)),
}


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ""])
@pytest.mark.parametrize("phrase", BINARIES)
def test_binaries_under_a_text_suffix(phrase, suffix):
    assert_one_line([f"a{suffix}: ", phrase if suffix == ".txt" else ""], write(f"a{suffix}", BINARIES[phrase]()))


def test_a_text_with_a_nul_is_a_text():
    text = "a log that a power cut tore\n" * 20 + "\0\0\n"
    assert read(write("a.log", text))[0] == [text]


def test_a_file_that_shrinks_while_it_is_read(monkeypatch):
    text = "one line after another\n" * 100_000
    for name in ("a.txt", "a.jsonl"):
        write(name, text if name == "a.txt" else json.dumps({"text": "x" * 50}) + "\n")
        if name == "a.jsonl":
            Path(name).write_text(Path(name).read_text() * 40_000)

        def open_text(path, *rest, real=lib.readers.open_text):
            file = real(path, *rest)
            os.truncate(path, 100)
            return file

        with monkeypatch.context() as patch:
            patch.setattr(lib.readers, "open_text", open_text)
            assert_one_line([f"{name}: truncated while it was read, 100 bytes of 2,"], name)


# ---- rows without the column


def test_rows_without_the_column_are_counted(monkeypatch):
    monkeypatch.setattr(lib.readers, "PATIENCE", 3)
    rows = [{"body": "x"}, {"body": "x"}, {"text": "a"}, {"body": "x"}, {}, {"text": None}]
    write("a.jsonl", "\n".join(map(json.dumps, rows)))
    texts, sources = read("a.jsonl")
    assert texts == ["a"] and sources["empty_documents"] == 1 and sources["rows_without_column"] == 4
    assert sources["first_without_column"] == "a.jsonl, line 1: no column text, only body"
    write("b.jsonl", '{"body": "x"}\n' * 3 + "not JSON, but this is not reached")
    assert_one_line(["b.jsonl, line 1: no column text, only body", "--text_column"], "b.jsonl")


def test_json_files_that_are_not_data_do_not_end_a_run():
    write("package.json", '{"name": "x", "files": []}')
    write("numbers.json", "[1, 2, 3]")
    texts, sources = read("package.json", "numbers.json", write("a.txt", "a"), write_json(["b"], "rows.json"))
    assert texts == ["a", "b"] and sources["left_out"] == {".json without a text column": 2}
    assert_one_line(["package.json, item 1: no column text, only name, files"], "package.json")


def test_text_column():
    write("in.jsonl", "".join(json.dumps({"body": text, "text": 0}) + "\n" for text in STORIES))
    assert read("in.jsonl", text_column="body")[0] == STORIES
    assert read(write_parquet(STORIES, column="body"), text_column="body")[0] == STORIES


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
    assert sources == {"empty_documents": 2, "undecodable_bytes": 6 + 1, "first_undecodable": "odd.jsonl"}


# ---- errors: one line that names the file, the row, the cause and the way out


ERRORS = {  # name: (function that writes a file, phrases in the error line)
    "missing file": (lambda: "gone.txt", ["gone.txt: No such file", "leave it out"]),
    "missing rows": (lambda: "gone.jsonl", ["gone.jsonl: No such file", "leave it out"]),
    "no column": (
        lambda: write("d/b.jsonl", '\n\n{"body": "b", "id": 1}\n{"id": 2}\n'),
        [f"{Path('d/b.jsonl')}, line 3: no column text, only body, id", "--text_column"],
    ),
    "no column at all": (lambda: write("a.jsonl", "{}"), ["a.jsonl, line 1: no column text", "--text_column"]),
    "not text": (lambda: write("a.jsonl", '{"text": 3}'), ["a.jsonl, line 1: column text holds 3", "--text_column"]),
    "not an object": (lambda: write("a.jsonl", "[1]"), ["a.jsonl, line 1: ", "object on each line"]),
    "not JSON": (lambda: write("a.jsonl", '{"text": "a"}\n{"text'), ["a.jsonl, line 2: not JSON"]),
    "deep .json": (lambda: write("a.json", "[" * 10**5), ["a.json, item 1: not JSON"]),
    "deep object": (lambda: write("a.json", '{"text":' * 10**5), ["a.json, item 1: not JSON"]),
    "deep notebook": (lambda: write("a.ipynb", "[" * 10**5), ["a.ipynb: not a notebook"]),
    "no notebook": (lambda: write("a.ipynb", '{"cells": [3]}'), ["a.ipynb: not a notebook"]),
    "array cut off": (lambda: write("a.json", '[{"text": "a"}, '), ["a.json, item 2: not JSON"]),
    "array not closed": (lambda: write("a.json", '[{"text": "a"}'), ["a.json, item 1: not JSON", "does not end"]),
    "no comma": (lambda: write("a.json", '["a" "b"]'), ["a.json, item 1: not JSON", "comma"]),
    "comments": (lambda: write("a.json", '{ // c\n "text": "a"}'), ["a.json, item 1: not JSON"]),
    "open quote": (lambda: write("a.csv", 'text\n"a\nb\nc\n'), ["a.csv, line 4: not CSV"]),
    "no csv column": (lambda: write("a.csv", "body\nb\n"), ["a.csv, line 2: no column text, only body"]),
    "not arrow": (lambda: write("a.arrow", "x" * 99), ["a.arrow: cannot be read by datasets"]),
    "compressed parquet": (lambda: write("a.parquet.gz", "x"), ["a.parquet.gz: a compressed .parquet file"]),
    "deep JSON": (lambda: write("a.jsonl", "[" * 10**5), ["a.jsonl, line 1: not JSON"]),
    "parquet column": (
        lambda: write_parquet(["b"], "a.parquet", column="body"),
        ["a.parquet, row 1: no column text, only id, body", "--text_column"],
    ),
    "parquet numbers": (lambda: write_parquet([1], "a.parquet"), ["a.parquet, row 1: column text holds 1"]),
    "not parquet": (lambda: write("a.parquet", "PAR1 no"), ["a.parquet: cannot be read as a parquet file"]),
    "missing parquet": (lambda: "gone.parquet", ["gone.parquet: cannot be read", "No such file"]),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    write_file, phrases = ERRORS[case]
    path = write_file()
    assert_one_line(phrases, path)


def assert_one_line(phrases, *paths, **settings):
    with pytest.raises(SystemExit) as stop:
        read(*paths, **settings)
    said = stop.value.code
    assert said.startswith("error: ") and "\n" not in said
    assert all(phrase in said for phrase in phrases), said


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


@pytest.mark.parametrize("write_rows", [write_jsonl, write_parquet])
def test_hub_datasets_are_streamed_by_the_datasets_library(hub, write_rows):
    path = Path(write_rows(STORIES))
    path.rename(f"repository/train{path.suffix}")
    assert read()[0] == STORIES
    assert hub == [("some/stories", (None,), {"split": "train", "streaming": True})]


@pytest.mark.parametrize(
    "settings, phrases",
    [
        (dict(split="no_such"), ["some/stories, split no_such", "--split"]),
        (dict(subset="no_such"), ["some/stories", "no_such", "--subset"]),
        (dict(text_column="body"), ["some/stories, row 1: no column body, only id, text", "--text_column"]),
    ],
)
def test_hub_errors(hub, settings, phrases):
    write_jsonl(STORIES, "repository/train.jsonl")
    assert_one_line(phrases, **settings)


def test_hub_out_of_reach(monkeypatch):
    monkeypatch.setattr(lib.official, "hub_problem", lambda: "no answer in 3 s")
    assert_one_line(["some/stories: no such path", "cannot be reached (no answer in 3 s)"])


def test_missing_libraries(hub, monkeypatch):
    path = write_parquet(STORIES)
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert_one_line(["in.arrow", "pip install datasets"], write_arrow(STORIES, "in.arrow"))
    assert_one_line(["some/stories", "pip install datasets"])
    assert_one_line(["in.parquet", "pip install pyarrow"], path)


# ---- conversations


CHATS = [
    [{"role": "user", "content": f"{i}? é\r\n"}, {"role": "assistant", "content": f" {i * i}.\n"}] for i in range(9)
]
COLUMNS = {
    "messages": lambda one, two: {"messages": [one, two]},
    "conversations": lambda one, two: {
        "conversations": [{"from": "human", "value": one["content"]}, {"from": "gpt", "value": two["content"]}]
    },
    "alpaca": lambda one, two: {"instruction": one["content"], "input": "", "output": two["content"]},
    "question": lambda one, two: {"question": one["content"], "answer": two["content"]},
}


def chats_of(*paths, **settings):
    sources = {"empty_documents": 0, "undecodable_bytes": 0}
    config = PrepareConfig(dataset="some/chats", **settings)
    found = list(documents([Path(path) for path in paths] or None, config, sources))
    for one in found:
        assert one.sha256 == hashlib.sha256(json.dumps(one.messages).encode()).digest()
    return [one.messages for one in found], sources


@pytest.mark.parametrize("columns", COLUMNS)
def test_conversations_of_every_format(columns, monkeypatch):
    rows = [COLUMNS[columns](*chat) for chat in CHATS]
    paths = [write("in.jsonl", "".join(json.dumps(row) + "\n" for row in rows)), write("in.json", json.dumps(rows))]
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, "in.parquet")
    with pyarrow.ipc.new_stream("in.arrow", table.schema) as file:
        file.write_table(table)
    monkeypatch.setattr(lib.official, "hub_problem", lambda: None)
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: iter(rows))
    for path in (*paths, "in.parquet", "in.arrow", None):
        assert chats_of(*[path] if path else []) == (CHATS, {"empty_documents": 0, "undecodable_bytes": 0}), path


def test_text_comes_before_a_conversation_and_named_columns_before_both():
    rows = [{"text": "t", "question": one["content"], "answer": two["content"]} for one, two in CHATS]
    write("in.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), "in.parquet")
    for path in ("in.jsonl", "in.parquet"):
        assert read(path)[0] == ["t"] * 9
        assert chats_of(path, text_column="")[0] == CHATS
        assert chats_of(path, prompt_column="question", answer_column="answer")[0] == CHATS
    assert_one_line(
        ["in.jsonl, line 1: no columns q and a, only text, question, answer"],
        "in.jsonl", prompt_column="q", answer_column="a",
    )  # fmt: skip


def test_rows_that_are_no_conversation_are_counted():
    bad = [{"messages": [{"role": "user", "content": 7}]}, {"body": "x"}, {"messages": [{"content": "\ud83d"}]}]
    half = {"messages": [{"role": "user", "content": "\ud83d"}]}
    write("in.jsonl", "".join(json.dumps(row) + "\n" for row in [{"messages": CHATS[0]}, *bad, half]))
    found, sources = chats_of("in.jsonl")
    assert found == [CHATS[0], [{"role": "user", "content": "\ufffd"}]]
    assert sources["rows_without_column"] == 3 and sources["undecodable_bytes"] == 6
    assert sources["first_without_column"] == "in.jsonl, line 2: column messages, message 1 holds 7, not text"
    write("in.jsonl", json.dumps(bad[0]))
    assert_one_line(["in.jsonl, line 1: column messages, message 1 holds 7, not text", "--prompt_column"], "in.jsonl")


def test_one_kind_in_a_folder():
    chat, text = write("a/chat.jsonl", json.dumps({"messages": CHATS[0]})), write("a/notes.txt", "words")
    assert_one_line(["chat.jsonl, line 1: is a conversation, but text came before it"], text, chat)
    with pytest.raises(SystemExit, match="notes.txt: is text, but a conversation came before it"):
        chats_of(chat, text)
    program = write("a/locale.json", json.dumps({"messages": {"hello": "bonjour"}, "question": "q", "answer": "a"}))
    pair = write("a/pair.json", json.dumps({"question": "q", "answer": "a"}))
    texts, sources = read(text, program, pair)  # a program's own files, as before
    assert texts == ["words"] and sources["left_out"] == {".json without a text column": 2}
