"""prepare_data.py: the ids are those of Hugging Face tokenizers, no run harms a dataset, memory stays flat, errors."""

import errno
import hashlib
import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import tokenizer_built_once

import lib.official
import prepare_data
from configurator import configure
from lib.chat import chat_ids
from lib.dataset import open_data
from lib.files import sha256_of
from lib.text import Document
from lib.tokenizer import encode, tokenizer_json
from prepare_data import PrepareConfig, cut, main

ROOT = Path(__file__).parent.parent


@pytest.fixture
def place(tmp_path, monkeypatch, encoding):
    """A folder to run in. The tokenizer is built once for all tests."""
    monkeypatch.chdir(tmp_path)
    tokenizer_built_once(monkeypatch, prepare_data, encoding)
    return tmp_path


@pytest.fixture(scope="session")
def oracle(hf_tokenizer):
    """text -> ids from Hugging Face tokenizers, where the names of special tokens are ordinary text."""

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
    """(exit code, what it said on stderr) of a run that fails."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        prepare(*flags)
    code, said = exit.value.code, capsys.readouterr().err
    return (1, said + code) if isinstance(code, str) else (code, said)


def load(folder):
    """(meta, {split: [ids of each document]}) of a dataset. Checks that its files and meta.json agree."""
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
    assert {path.name for path in Path(folder).iterdir()} - {"input.txt", ".lock"} == {
        "meta.json",
        "train.bin",
        "val.bin",
    }
    return meta, found


def in_val(text, val_fraction=0.1):
    """Whether the document goes to val, computed in another way: from the first 16 hex digits of its sha256."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) < val_fraction * 16**16


def expected(texts, oracle, val_fraction=0.1):
    """What load() must find: {split: [ids of each document]}."""
    return {
        split: [[*oracle(text), 0] for text in texts if in_val(text, val_fraction) == (split == "val")]
        for split in ("train", "val")
    }


def snapshot(folder):
    """{path: content} of every file under a folder."""
    paths = [path for path in sorted(Path(folder).rglob("*")) if path.is_file() and path.name != ".lock"]
    return {str(path): path.read_bytes() for path in paths}


STORIES = [f"Story {i}: the cat sat on mat {i * i}.\r\n\tIt said\u00a0“{'é' * (i % 5)}”  again.\n\n" for i in range(60)]


# ---- the ids are the tokenizer's


def test_the_default_dataset_is_the_standard_library_id_for_id(place, encoding, oracle, capsys):
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
        assert i % 4 or ids == oracle(text)  # only every fourth, because the oracle is slow
    for split in ("train", "val"):
        assert next(rest[split], None) is None
        assert meta[split]["bytes"] == sum(len(t.encode()) for t in texts if in_val(t) == (split == "val"))
    digests = b"".join(hashlib.sha256(text.encode()).digest() for text in texts)
    assert meta["sources"]["sha256"] == hashlib.sha256(digests).hexdigest()
    assert meta["tokenizer_sha256"] == hashlib.sha256(tokenizer_json()[0]).hexdigest() and meta["tokenizer"] == "base"

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

    train, val, opened = open_data("python", 49_152, 1024)  # as train.py opens it
    assert (len(train.ids), len(val.ids)) == (meta["train"]["tokens"], meta["val"]["tokens"])
    assert opened["sources"] == meta["sources"]


# All characters except those with a byte that has no token: some ASCII controls, and unassigned ones (Cn).
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
    """The test above can fail: it would if the text were cut between its lines."""
    text = "if a:\n\n    b = 1\n"
    assert [id for line in text.splitlines(keepends=True) for id in encode(encoding, line)] != oracle(text)


def test_pieces_are_short(monkeypatch):
    monkeypatch.setattr(prepare_data, "CHUNK", 100)
    monkeypatch.setattr(prepare_data, "LONGEST", 1000)
    words = list(cut(io.StringIO("seven77 " * 1000)))
    assert "".join(words) == "seven77 " * 1000 and max(map(len, words)) <= 100 + len("seven77 ")
    endless = list(cut(io.StringIO("x" * 10_000)))  # no safe place to cut, but memory must stay bounded
    assert "".join(endless) == "x" * 10_000 and max(map(len, endless)) == 1000


def test_a_long_document_among_others(place, oracle, monkeypatch):
    monkeypatch.setattr(prepare_data, "CHUNK", 50)
    texts = ["".join(STORIES), *STORIES]
    Path("in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare("--dataset=in.jsonl")
    assert load("data/in")[1] == expected(texts, oracle)


# ---- files, folders, globs and Hub datasets give the same bins


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


def write_jsonl(texts, path="in.jsonl"):
    lines = [json.dumps({"id": 1, "text": text}, ensure_ascii=i % 2 == 0) + "\n" for i, text in enumerate(texts)]
    Path(path).write_bytes("\r\n".join(lines).encode())  # a blank line after each row
    return path


def write_parquet(texts):
    pyarrow.parquet.write_table(pyarrow.table({"id": range(len(texts)), "text": texts}), "in.parquet", row_group_size=7)
    return "in.parquet"


@pytest.mark.parametrize("write", [write_txt, write_glob, write_jsonl, write_parquet])
def test_every_kind_of_source_gives_the_same_bins(place, oracle, write):
    texts = STORIES + STORIES[:9]  # some documents occur twice
    prepare(f"--dataset={write(texts)}")
    meta, found = load("data/in")
    assert found == expected(texts, oracle)
    assert meta["name"] == "in" and meta["sources"]["documents"] == len(texts)


def test_a_hub_dataset(place, oracle, monkeypatch):
    rows = [{"text": text} for text in STORIES]
    asked = []
    monkeypatch.setattr(lib.official, "hub_problem", lambda: None)
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: asked.append((args, kwargs)) or rows)
    prepare("--dataset=some.one/stories-1", "--subset=short", "--split=all", "--max_documents=40")
    assert asked == [(("some.one/stories-1", "short"), {"split": "all", "streaming": True})]
    meta, found = load("data/stories-1")
    assert found == expected(STORIES[:40], oracle)
    assert meta["sources"]["what"] == "Hub dataset some.one/stories-1, short, split all"


def test_settings_choose_column_name_folder_and_share(place, oracle):
    Path("in.jsonl").write_text("".join(json.dumps({"body": text, "text": 0}) + "\n" for text in STORIES))
    prepare("--dataset=in.jsonl", "--text_column=body", "--name=out", "--data_dir=a/b", "--val_fraction=0.5")
    assert load("a/b/out")[1] == expected(STORIES, oracle, 0.5)


# ---- train and val


def test_a_document_goes_to_the_same_split_in_any_order(place):
    for name, texts in (("one", STORIES), ("two", STORIES[::-1] + STORIES[:20])):
        Path(f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        prepare(f"--dataset={name}.jsonl", "--val_fraction=0.3")
    one, two = load("data/one")[1], load("data/two")[1]
    for split, other in (("train", "val"), ("val", "train")):
        assert {*map(tuple, one[split])} == {*map(tuple, two[split])}
        assert not {*map(tuple, one[split])} & {*map(tuple, two[other])}
    assert 0.1 < len(one["val"]) / len(STORIES) < 0.5


@pytest.mark.parametrize("workers", [1, 7])
@pytest.mark.parametrize("chat", [False, True])
def test_the_number_of_workers_does_not_change_a_byte(place, monkeypatch, workers, chat):
    monkeypatch.setattr(prepare_data, "CHUNK", 100)
    path = write_chats([a_conversation(i) for i in range(300)]) if chat else write_jsonl(STORIES)
    prepare(f"--dataset={path}", "--name=as_it_is")
    monkeypatch.setattr(os, "cpu_count", lambda: workers)
    prepare(f"--dataset={path}", "--name=other")
    first, second = snapshot("data/as_it_is"), snapshot("data/other")
    assert len(first) == (5 if chat else 3)
    for name, content in first.items():
        assert second[name.replace("as_it_is", "other")] == content.replace(b'"as_it_is"', b'"other"')


def test_threads_take_only_a_few_items_ahead(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    taken = []
    results = prepare_data.on_all_cores(lambda x: x * x, (taken.append(i) or i for i in range(100)))
    for i, result in enumerate(results):
        assert result == i * i and len(taken) <= i + 6


@pytest.mark.parametrize("val_fraction", [0.1, 0.34])
def test_a_single_document_is_cut_near_its_end(place, encoding, capsys, val_fraction):
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
def test_a_single_document_is_cut_once_for_any_size_of_pieces(monkeypatch, chunk):
    """Also where the border between train and val is a border between two pieces."""
    monkeypatch.setattr(prepare_data, "CHUNK", chunk)
    text = "one two three four five six seven eight nine ten"
    document = Document(b"12345678", len(text), lambda: io.StringIO(text))
    found = list(prepare_data.pieces(iter([document]), 0.5, {"documents": 0, "sha256": hashlib.sha256()}))
    halves = {split: "".join("|" if t is None else t for s, t in found if s == split) for split in ("train", "val")}
    assert [half.index("|") for half in halves.values()] == [len(half) - 1 for half in halves.values()]
    assert halves["train"][:-1] + halves["val"][:-1] == text and abs(len(halves["train"]) - len(text) / 2) <= 6


def test_copies_of_one_document_count_as_a_single_document(place, oracle):
    Path("same.jsonl").write_text('{"text": "to be or not to be"}\n' * 3)
    prepare("--dataset=same.jsonl", "--val_fraction=0.5")
    assert load("data/same")[1] == {"train": [[*oracle("to be or"), 0]] * 3, "val": [[*oracle(" not to be"), 0]] * 3}


@pytest.mark.parametrize("val_fraction", [1e-9, 0.999999])
def test_few_documents_that_all_fall_into_one_split(place, val_fraction, capsys):
    path = write_jsonl(STORIES[:5] + STORIES[:5])
    prepare(f"--dataset={path}", f"--val_fraction={val_fraction}")
    found = load("data/in")[1]
    empty, other = ("val", "train") if val_fraction < 0.5 else ("train", "val")
    assert len(found[empty]) == 2 and found[empty][0] == found[empty][1] and len(found[other]) == 8
    assert f"fell into {empty}: the nearest one was put there" in capsys.readouterr().out


# ---- tiny shakespeare, downloaded


def test_shakespeare(place, monkeypatch, oracle, capsys):
    text = "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n\n" * 5
    write("server/input.txt", text)
    url = (place / "server/input.txt").as_uri()
    sha256 = prepare_data.SHAKESPEARE_SHA256
    assert sha256 == "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
    monkeypatch.setattr(prepare_data, "SHAKESPEARE_URL", url)
    code, said = failure(capsys, "--dataset=shakespeare")  # this is not the real text
    assert code == 1 and sha256 in said and url in said and not snapshot("data")
    monkeypatch.setattr(prepare_data, "SHAKESPEARE_SHA256", hashlib.sha256(text.encode()).hexdigest())
    prepare("--dataset=shakespeare")
    _, found = load("data/shakespeare")
    assert [id for split in ("train", "val") for id in found[split][0][:-1]] == oracle(text)

    before = snapshot("data")
    Path("server/input.txt").unlink()
    prepare("--dataset=shakespeare")  # the server is gone, but input.txt is here
    assert snapshot("data") == before
    code, said = failure(capsys, "--dataset=shakespeare", "--name=again")
    assert code == 1 and url in said and str(Path("data/again/input.txt")) in said and said.count("\n") == 0


# ---- an earlier dataset survives failures and kills, and there is one writer at a time


def in_a_process(script, *args):
    prologue = "import os, signal, sys; from prepare_data import PrepareConfig, main; import prepare_data\n"
    command = [sys.executable, "-c", prologue + script, *map(str, args)]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert result.returncode == 0, result.stderr
    return result.stdout


KILLED = """
moment = "start"
def write_text(*args, real=prepare_data.write_text):
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
prepare_data.write_text, prepare_data.cut, os.replace = write_text, cut, replace
encoding = prepare_data.load_tokenizer()  # once for all children
prepare_data.load_tokenizer = lambda: encoding
for moment in sys.argv[1:]:
    if not (child := os.fork()):
        main(PrepareConfig(dataset="new.jsonl", name=moment, overwrite=True))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_sigkill_leaves_a_whole_dataset_or_none(place):
    """Before the renames the earlier dataset is untouched. Between them meta.json is missing, so no one reads a mix."""
    write_jsonl(STORIES[:30], "old.jsonl")
    write_jsonl(STORIES, "new.jsonl")
    moments = ["reading", "written"]
    moments += [f"{when} {file}" for file in ("train.bin", "val.bin", "meta.json") for when in ("before", "after")]
    for moment in moments:
        prepare("--dataset=old.jsonl", f"--name={moment}")
    old = {moment: snapshot(f"data/{moment}") for moment in moments}

    in_a_process(KILLED, *moments)
    for moment in moments:
        if moment in ("reading", "written"):
            assert old[moment].items() <= snapshot(f"data/{moment}").items()
        elif moment == "after meta.json":
            meta = json.loads(Path("data", moment, "meta.json").read_text())
            assert meta["sources"]["documents"] == len(STORIES)
            assert all(sha256_of(f"data/{moment}/{split}.bin") == meta[split]["sha256"] for split in ("train", "val"))
        else:
            assert not Path("data", moment, "meta.json").exists()
        prepare("--dataset=new.jsonl", f"--name={moment}", "--overwrite=True")  # clears up what the kill left
        assert load(f"data/{moment}")[0]["sources"]["documents"] == len(STORIES)


def test_a_second_run_into_the_same_name_is_refused(place, monkeypatch, oracle):
    """A second process starts while the first run is reading. The first run's dataset is whole."""
    path = write_jsonl(STORIES)
    command = [sys.executable, str(ROOT / "prepare_data.py"), f"--dataset={path}"]
    second = []

    def cut_meanwhile(file):
        if not second:
            second.append(subprocess.run([*command, "--max_documents=30"], capture_output=True, text=True))
        yield from cut(file)

    monkeypatch.setattr(prepare_data, "cut", cut_meanwhile)
    prepare(f"--dataset={path}")
    assert second[0].returncode == 1
    assert re.fullmatch(r"error: data.in is in use by another process: .* --name\n", second[0].stderr)
    assert load("data/in")[1] == expected(STORIES, oracle)


def test_a_failed_run_leaves_the_earlier_dataset_untouched(place, capsys):
    prepare(f"--dataset={write_jsonl(STORIES)}")
    before = snapshot("data")
    Path("in.jsonl").write_text(Path("in.jsonl").read_text() + "not JSON")
    code, said = failure(capsys, "--dataset=in.jsonl")
    assert code == 1 and said.startswith("error: in.jsonl, line ") and snapshot("data") == before


@pytest.mark.parametrize("there_before", [False, True])
def test_ctrl_c(place, monkeypatch, capsys, there_before):
    path = write_jsonl(STORIES)
    if there_before:
        prepare(f"--dataset={path}", "--max_documents=30")
    before = snapshot("data")
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore SIGINT

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
    assert code == 1 and re.search(
        r"^error: data.in: File too large: the disk is full: free some space, or use another folder$", said
    )
    assert snapshot("data") == before


@pytest.mark.parametrize(("chat", "nth"), [(False, 1), (False, 2), (False, 3), (True, 1), (True, 5)])
def test_disk_full_at_the_last_flush(place, capsys, monkeypatch, chat, nth):
    """Some file systems report a full disk only when a file is flushed: here at the nth flush."""
    path = write_chats() if chat else write_jsonl(STORIES)
    prepare(f"--dataset={path}", "--max_documents=40")
    before, calls, real = snapshot("data"), [], os.fsync

    def fsync(descriptor):
        calls.append(descriptor)
        if len(calls) == nth:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    code, said = failure(capsys, f"--dataset={path}")
    assert code == 1 and re.search(r"^error: data.in: No space left on device: the disk is full: .*$", said)
    assert snapshot("data") == before


# ---- conversations


def say(*turns):
    return [{"role": role, "content": content} for role, content in turns]


def a_conversation(i):
    """Of 30 to 150 tokens; every fifth has two turns and every eleventh is longer than a row of 201 ids."""
    turns = [("user", f"What is {i} + {i}?  Say it in é."), ("assistant", f"It is {2 * i}." + " Really." * (i % 7))]
    turns += [("user", "Sure?"), ("assistant", "é" * (i % 3) + "\nYes 😀")] if i % 5 == 0 else []
    turns += [("user", "Go on."), ("assistant", "on and on " * 60)] if i % 11 == 0 else []
    return say(*turns)


CHATS = [a_conversation(i) for i in range(80)]


def write_chats(chats=CHATS, path="in.jsonl", key="messages"):
    Path(path).write_text("".join(json.dumps({key: chat}) + "\n" for chat in chats))
    return path


def load_chats(folder, block_size):
    """(meta, {split: [(ids, mask) of each conversation]}). Checks that the five files and meta.json agree."""
    assert {path.name for path in Path(folder).iterdir()} - {".lock"} == {
        "meta.json", "train.bin", "val.bin", "train_mask.bin", "val_mask.bin",
    }  # fmt: skip
    train, val, meta = open_data(Path(folder).name, 49_152, block_size, Path(folder).parent)
    found = {}
    for split, data in (("train", train), ("val", val)):
        counts, found[split], padding = meta[split], [], 0
        for ids, mask in zip(data.ids.reshape(-1, block_size + 1), data.mask.reshape(-1, block_size + 1), strict=True):
            used = np.flatnonzero(ids)[-1] + 1
            padding += len(ids) - used
            assert ids[0] == 1 and ids[:used].all() and not mask[used:].any() and mask[0] == 0
            starts = [at for at in np.flatnonzero(ids == 1) if ids[at + 1] == 9690]  # "system"
            for at, end in zip(starts, [*starts[1:], used], strict=True):
                found[split].append((tuple(ids[at:end].tolist()), tuple(mask[at:end].tolist())))
        assert (counts["documents"], counts["padding"]) == (len(found[split]), padding)
        assert counts["tokens"] == len(data.ids) and counts["loss_tokens"] == data.mask.sum()
        assert counts["sha256"] == sha256_of(Path(folder, f"{split}.bin"))
        assert counts["mask_sha256"] == sha256_of(Path(folder, f"{split}_mask.bin"))
    return meta, found


def expected_chats(chats, encoding, length, val_fraction=0.1):
    found = {"train": [], "val": []}
    for chat in chats:
        ids, mask = chat_ids(encoding, chat)
        split = "val" if in_val(json.dumps(chat), val_fraction) else "train"
        found[split].append((tuple(ids[:length]), tuple(mask[:length])))
    return {split: sorted(pairs) for split, pairs in found.items()}


def test_conversations(place, encoding, capsys):
    chats = CHATS + CHATS[:9]  # some occur twice
    left_out = [say(("user", "Anyone?")), say(("user", "word " * 300), ("assistant", "too late")), say(("user", ""))]
    prepare(f"--dataset={write_chats(chats + left_out)}", "--block_size=200", "--val_fraction=0.2")
    meta, found = load_chats("data/in", 200)
    expected = expected_chats(chats, encoding, 201, 0.2)
    assert {split: sorted(pairs) for split, pairs in found.items()} == expected
    assert meta["block_size"] == 200 and meta["sources"]["documents"] == len(chats) + 2
    said = capsys.readouterr().out
    for split in ("train", "val"):
        c, pairs = meta[split], expected[split]
        assert c["cut"] == sum(len(ids) == 201 for ids, _ in pairs) >= (split == "train")
        learnt = [id for ids, mask in pairs for id, one in zip(ids, mask, strict=True) if one and id > 16]
        assert c["bytes"] == sum(map(len, encoding.decode_tokens_bytes(learnt)))
        assert c["padding"] / c["tokens"] < 0.2
        row = [f"{c['documents']:,}", f"{c['tokens']:,}", f"{c['loss_tokens'] / c['tokens']:.1%}"]
        row += [f"{c['padding'] / c['tokens']:.1%}", f"{c['cut']:,}"]
        assert [split, *row] in [line.split() for line in said.splitlines()]
    assert "note: 1 conversations without an assistant's answer were left out\n" in said
    assert "note: 1 conversations with no answer before the row's end were left out: raise --block_size" in said
    assert "note: 1 empty documents were left out" in said and "--block_size=200" in said


def test_text_after_conversations_leaves_no_masks(place, oracle):
    """And conversations after text have theirs."""
    write_chats(path="chat.jsonl")
    write_jsonl(STORIES, "text.jsonl")
    for _ in range(2):
        prepare("--dataset=chat.jsonl", "--name=in", "--overwrite=True")
        assert len(load_chats("data/in", 512)[1]["train"]) > 60
        prepare("--dataset=text.jsonl", "--name=in", "--overwrite=True")
        assert load("data/in")[1] == expected(STORIES, oracle)


def test_questions_about_python(place, monkeypatch, capsys):
    library = Path(os.__file__).parent
    files = [library / name for name in ("argparse.py", "pydoc_data/topics.py", "random.py")]
    monkeypatch.setattr(prepare_data, "standard_library", lambda: files)
    prepare("--dataset=python_chat")
    meta, found = load_chats("data/python_chat", 512)
    assert meta["sources"]["identity"] == "python_chat" and meta["sources"]["documents"] > 80
    assert sum(map(len, found.values())) == meta["sources"]["documents"]


# ---- memory


PEAKS = """
encoding = prepare_data.load_tokenizer()
prepare_data.load_tokenizer = lambda: encoding
for path in sys.argv[1:]:
    if not (child := os.fork()):
        prepare_data.os.cpu_count = lambda: 2
        sys.stdout = open(os.devnull, "w")
        main(PrepareConfig(dataset=path, overwrite=True))
        os._exit(0)
    _, status, usage = os.wait4(child, 0)
    assert status == 0
    print(usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_memory_grows_with_neither_document_nor_corpus(place):
    """Compare peak RSS in MB on 2 MB and on 16 MB of text. Each run is a child forked after all is loaded."""
    sentence = "The quick brown fox, aged 42, jumps over it.\n"
    paths = []
    for size in (2, 16):
        lines = size * 10**6 // len(sentence)
        Path(f"{size}.txt").write_text(sentence * lines)
        row = json.dumps({"text": sentence * 100})
        Path(f"{size}.jsonl").write_text("".join(f"{row[:-2]}{i}{row[-2:]}\n" for i in range(lines // 100)))
        paths += [f"{size}.txt", f"{size}.jsonl"]
    small_txt, small_jsonl, large_txt, large_jsonl = map(float, in_a_process(PEAKS, *paths).split())
    assert large_txt - small_txt < 7
    assert large_jsonl - small_jsonl < 7


# ---- errors: one line that names the thing, the cause and the way out; nothing on disk changes


def write(path, content):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())


def table_file(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


ERRORS = {  # name: (function that writes files, flags, exit code, phrases in the error line)
    "typo": (None, ["--dataset=shakespear"], 2, ["shakespear:", "did you mean shakespeare?"]),
    "unknown": (None, ["--dataset=xyzzy"], 2, ["xyzzy", "python, python_chat, shakespeare", "org/name"]),
    "missing file": (None, ["--dataset=my/notes.txt"], 2, ["my/notes.txt"]),
    "glob of nothing": (None, ["--dataset=my/*.txt"], 2, ["my/*.txt", ".jsonl"]),
    "folder without text": (lambda: write("f/a.png", "x"), ["--dataset=f"], 2, ["f: no ", ".txt"]),
    "pdf": (lambda: write("b.pdf", b"%PDF\0"), ["--dataset=b.pdf"], 1, ["b.pdf: a binary file", "pdftotext"]),
    "empty text": (lambda: write("a.txt", ""), ["--dataset=a.txt"], 1, ["a.txt: no text"]),
    "only empty rows": (lambda: write("a.jsonl", '{"text": ""}\n\n'), ["--dataset=a.jsonl"], 1, ["a.jsonl: no text"]),
    "one letter": (lambda: write("a.txt", "a"), ["--dataset=a.txt"], 1, ["a.txt: train has nothing", "--val_fraction"]),
    "no tokens": (lambda: write("a.txt", "\x04\x06" * 9), ["--dataset=a.txt"], 1, ["a.txt: train has nothing to l"]),
    "val_fraction 0": (None, ["--val_fraction=0"], 2, ["val_fraction is 0.0: it must be a number from"]),
    "val_fraction nan": (None, ["--val_fraction=nan"], 2, ["val_fraction is nan"]),
    "max_documents": (None, ["--max_documents=0"], 2, ["max_documents is 0"]),
    "name outside": (None, ["--name=../x"], 2, ["../x", "--name"]),
    "name above": (None, ["--name=.."], 2, ["'..'", "--name"]),
    "name absolute": (None, ["--name=/tmp/x"], 2, ["/tmp/x", "--name"]),
    "no name": (None, ["--dataset=/*.txt", "--name=a/b"], 2, []),
    "folder is a file": (lambda: write("data/a", ""), ["--name=a"], 1, [str(Path("data/a")), "use another folder"]),
    "data_dir is a file": (lambda: write("data", ""), [], 1, ["data", "use another folder"]),
    "one conversation": (lambda: write_chats(CHATS[:1] * 3), ["--dataset=in.jsonl"], 1, ["a single conversation"]),
    "no answers": (lambda: write_chats([say(("user", "x"))] * 3), ["--dataset=in.jsonl"], 1, ["3 conversations with"]),
    "short rows": (write_chats, ["--dataset=in.jsonl", "--block_size=9"], 1, ["80 convers", "raise --block_size"]),
    "empty answers": (
        lambda: write_chats([say(("user", str(i)), ("assistant", "")) for i in range(9)]),
        ["--dataset=in.jsonl"],
        1,
        ["train has nothing to learn"],
    ),
    "one column": (None, ["--prompt_column=body"], 2, ["--prompt_column and --answer_column"]),
    "block_size": (None, ["--block_size=0"], 2, ["block_size is 0"]),
    "hub offline": (None, ["--dataset=org/name"], 1, ["org/name: no such path", "HF_HUB_OFFLINE"]),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors(place, capsys, case):
    write_files, flags, code, phrases = ERRORS[case]
    if write_files:
        write_files()
    before = snapshot(place)
    got, said = failure(capsys, *flags)
    assert got == code and said.startswith("error: ") and len(said.strip().splitlines()) == 1, said
    for phrase in phrases:
        assert phrase in said
    assert snapshot(place) == before and not list(place.glob("data/*/"))


def test_as_a_command(place):
    """In a process of its own, as prepare_data.py's docstring says. A failure prints one line and no traceback."""
    write("my/notes.txt", "".join(STORIES))
    command = [sys.executable, str(ROOT / "prepare_data.py")]
    done = subprocess.run([*command, "--dataset=my/notes.txt"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    meta, _ = load("data/notes")
    assert f"{meta['train']['tokens']:,}" in done.stdout
    done = subprocess.run([*command, "--dataset=my/notes.doc"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


# ---- paths, the closing table, and one name for two texts


def test_brackets_and_a_tilde_in_paths(place, oracle, monkeypatch):
    monkeypatch.setenv("HOME", str(place / "home"))
    for i, text in enumerate(STORIES):
        write(f"home/data[v2]/sub/{i:02}.txt", text)
        write(f"home/datav/sub/{i:02}.txt", "not this")
    for number, dataset in enumerate(["~/data[v2]/*/*.txt", "~/data[v2]", str(place / "home/data[v2]/**/*.txt")]):
        prepare(f"--dataset={dataset}", "--data_dir=~/out", f"--name=n{number}")
        assert load(f"home/out/n{number}")[1] == expected(STORIES, oracle)


def test_the_closing_table_says_what_happened_to_the_text(place, encoding, capsys):
    french = "Longtemps, je me suis couché de bonne heure. Parfois, à peine ma bougie éteinte, je m’endormais.\n"
    contents = {
        "a.txt": french.encode("cp1252") * 9,
        "b.txt": french.encode("cp1252") * 8,
        "broken.txt": "é“”ü€".encode() * 60 + b"caf\xe9 \xf0\x9f\x98 \xff\xfe end",
        "c.txt": "Über\n".encode("utf-16"),
        "d.jsonl": "".join(json.dumps({"text": text}) + "\n" for text in STORIES) + '{"body": "x"}\n',
        "empty.py": b"",
        "main.c": b"x",
        "special.txt": b"<|endoftext|> is text",
    }
    for name, content in contents.items():
        write(f"f/{name}", content)
    prepare("--dataset=f", "--val_fraction=0.4")
    meta, found = load("data/f")
    texts = {encoding.decode(ids[:-1]) for split in found.values() for ids in split}
    assert {"<|endoftext|> is text", "Über\n", french * 9, contents["broken.txt"].decode(errors="replace")} < texts
    said = capsys.readouterr().out
    for line in (
        f"read as cp1252, guessed: {Path('f/a.txt')} and 1 more",
        f"read as utf-16: {Path('f/c.txt')}",
        "left out: 1 .c",
        f"note: 1 rows without a text were left out: {Path('f/d.jsonl')}, line 61: no column text, only body",
        "note: 1 empty documents were left out",
        f"note: 6 bytes that cannot be decoded became U+FFFD, the first in {Path('f/broken.txt')}",
    ):
        assert f"{line}\n" in said
    assert meta["sources"]["undecodable_bytes"] == 6 and meta["sources"]["empty_documents"] == 1


def test_another_text_of_the_same_name_is_refused(place, oracle, capsys):
    for folder, texts in (("a", STORIES), ("b", STORIES[::-1] * 2), ("c/b", STORIES)):
        write(f"{folder}/input.txt", "".join(texts))
    prepare("--dataset=a/input.txt")
    prepare("--dataset=./a/../a/input.txt", "--val_fraction=0.2")  # the same text again
    before = snapshot("data")
    code, said = failure(capsys, "--dataset=b/input.txt")
    assert code == 2 and said.startswith(f"error: {Path('data/input')} was made from another text, ")
    assert "a/input.txt" in said and "--name=b_input" in said and "--overwrite" in said and said.count("\n") == 1
    assert snapshot("data") == before
    prepare("--dataset=b/input.txt", "--name=b_input")
    prepare("--dataset=b/input.txt", "--overwrite=True")
    assert load("data/input")[1] == load("data/b_input")[1]
