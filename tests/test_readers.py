"""lib/readers.py: every format gives the same documents, odd bytes are counted, errors are one line."""

import hashlib
import json
import sys
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

import lib.official
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


@pytest.mark.parametrize("suffix", [*SUFFIXES, ".TXT", ".JSONL"])
def test_every_format_gives_the_same_documents(suffix):
    if suffix.lower() not in ROWS:
        paths = [write(f"{i}{suffix}", text) for i, text in enumerate(STORIES)]
    else:
        paths = [{".jsonl": write_jsonl, ".parquet": write_parquet}[suffix.lower()](STORIES, f"in{suffix}")]
    assert read(*paths) == (STORIES, {"empty_documents": 0, "undecodable_bytes": 0})


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
        "latin.txt": b"caf\xe9 \xf0\x9f\x98 \xff\xfe end",
        "latin2.txt": b"\xe9t\xe9",
        "only_bom.txt": b"\xef\xbb\xbf",
        "white.txt": b" \n ",
        "replacement.txt": "a true \ufffd".encode(),
    }
    texts, sources = read(*(write(path, content) for path, content in contents.items()))
    # The texts are what errors="replace" gives, without the byte-order mark and with the line ends kept.
    assert texts == [text for b in contents.values() if (text := b.decode("utf-8-sig", errors="replace"))]
    assert sources == {"empty_documents": 2, "undecodable_bytes": 8, "first_undecodable": "latin.txt"}


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
        lambda: write("d/b.jsonl", '{"text": "a"}\n\n{"body": "b", "id": 1}\n'),
        [f"{Path('d/b.jsonl')}, line 3: no column text, only body, id", "--text_column"],
    ),
    "no column at all": (lambda: write("a.jsonl", "{}"), ["a.jsonl, line 1: no column text", "--text_column"]),
    "not text": (lambda: write("a.jsonl", '{"text": 3}'), ["a.jsonl, line 1: column text holds 3", "--text_column"]),
    "not an object": (lambda: write("a.jsonl", "[1]"), ["a.jsonl, line 1: ", "object on each line"]),
    "not JSON": (lambda: write("a.jsonl", '{"text": "a"}\n{"text'), ["a.jsonl, line 2: not JSON"]),
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
    assert_one_line(["some/stories", "pip install datasets"])
    assert_one_line(["in.parquet", "pip install pyarrow"], path)
