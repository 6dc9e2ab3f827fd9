"""prepare_data.py: the ids are those of Hugging Face tokenizers, no run harms a dataset, memory stays flat, errors."""

import errno
import hashlib
import io
import itertools
import json
import os
import re
import signal
import tracemalloc
from pathlib import Path
from configurator import configure

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import load_tokenizer_once, say, write
from tokenizers import Tokenizer

import lib.official
import lib.text
import prepare_data
from lib.chat import chat_ids
from lib.dataset import open_data
from lib.files import lock_folder, sha256_of
from lib.text import Document
from lib.tokenizer import encode, token_sizes, tokenizer_json
from prepare_data import PrepareConfig, cut_text, main

ROOT = Path(__file__).parent.parent


@pytest.fixture
def place(tmp_path, monkeypatch, encoding):
    """Run in a temporary folder. The tokenizer is built once for all tests."""
    monkeypatch.chdir(tmp_path)
    load_tokenizer_once(monkeypatch, prepare_data, encoding)
    return tmp_path


@pytest.fixture(scope="session")
def oracle():
    """Return text -> ids, by Hugging Face tokenizers, with the names of special tokens as ordinary text."""
    tokenizer = Tokenizer.from_str(tokenizer_json()[0].decode())
    tokenizer.encode_special_tokens = True
    return lambda text: tokenizer.encode(text).ids


def prepare(*flags):
    main(configure(PrepareConfig, list(flags)))


def failure(capsys, *flags):
    """Return (exit code, the error line) of a run that fails."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        prepare(*flags)
    code, line = exit.value.code, capsys.readouterr().err
    code, line = (1, line + code) if isinstance(code, str) else (code, line)
    assert line.count("\n") <= 1, line
    return code, line


def load(folder):
    """Return (meta, {split: [ids of each document]}) of a dataset. Check that its files and meta.json agree."""
    meta = json.loads(Path(folder, "meta.json").read_text())
    assert meta["dtype"] == "uint16" and meta["vocab_size"] == 49_152
    splits = {}
    for split in ("train", "val"):
        ids = np.fromfile(Path(folder, f"{split}.bin"), "<u2")
        assert meta[split]["sha256"] == hashlib.sha256(ids.tobytes()).hexdigest()
        assert meta[split]["tokens"] == len(ids) and ids[-1] == 0 and ids.max() < 49_152
        splits[split] = [part.tolist() for part in np.split(ids, np.flatnonzero(ids == 0) + 1)[:-1]]
        assert meta[split]["documents"] == len(splits[split])
    names = {path.name for path in Path(folder).iterdir()} - {"input.txt", ".lock"}
    assert names == {"meta.json", "train.bin", "val.bin"}
    return meta, splits


def in_val(text, val_fraction=0.1):
    """Return whether the document goes to val, computed differently: from the first 16 hex digits of its sha256."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) < val_fraction * 16**16


def expected(texts, oracle, val_fraction=0.1):
    """Return {split: [ids of each document]}, as load() must."""
    splits = {"train": [], "val": []}
    for text in texts:
        splits["val" if in_val(text, val_fraction) else "train"].append([*oracle(text), 0])
    return splits


def snapshot(folder):
    """Return {path: content} of every file under a folder."""
    paths = [path for path in sorted(Path(folder).rglob("*")) if path.is_file() and path.name != ".lock"]
    return {str(path): path.read_bytes() for path in paths}


STORIES = [f"Story {i}: the cat sat on mat {i * i}.\r\n\tIt said\u00a0“{'é' * (i % 5)}”  again.\n\n" for i in range(60)]
STORIES[7] += "<|endoftext|> is text."


def test_the_default_dataset_is_the_standard_library_id_for_id(place, encoding, oracle, capsys):
    prepare()
    meta, splits = load("data/python")
    library = Path(os.__file__).parent
    paths = [Path(path) for path in sorted(p.as_posix() for p in library.rglob("*.py"))]
    skipped = re.compile(r"/(tests?|idle_test|(site|dist)-packages)/")
    paths = [path for path in paths if not skipped.search(f"/{path.relative_to(library).as_posix()}")]
    assert library / "pydoc_data/topics.py" in paths
    texts = [text for path in paths if (text := path.read_bytes().decode("utf-8-sig"))]
    assert sum(map(len, texts)) > 8e6
    for split in ("train", "val"):
        mine = [text for text in texts if in_val(text) == (split == "val")]
        assert [encoding.decode(ids[:-1]) for ids in splits[split]] == mine
        assert all(ids == [*oracle(text), 0] for ids, text in list(zip(splits[split], mine, strict=True))[::4])  # slow
        assert meta[split]["bytes"] == sum(len(text.encode()) for text in mine)
    digests = b"".join(hashlib.sha256(text.encode()).digest() for text in texts)
    assert meta["sources"]["sha256"] == hashlib.sha256(digests).hexdigest()
    assert meta["tokenizer_sha256"] == hashlib.sha256(tokenizer_json()[0]).hexdigest() and meta["tokenizer"] == "base"

    output = capsys.readouterr().out
    assert tokenizer_json()[1] in output and meta["tokenizer_sha256"] in output and "tokens/s" in output
    rows = [line.replace(",", "").split() for line in output.splitlines()]
    for split in ("train", "val"):
        assert [split, *(str(meta[split][key]) for key in ("tokens", "bytes", "documents"))] in rows


# All characters except those with a byte that has no token: some ASCII controls, and unassigned ones (Cn).
CHARACTERS = st.characters(exclude_categories=["Cs", "Cn"], exclude_characters="\x04\x06\x13\x14\x16\x1d")
SPACES_AND_DIGITS = st.sampled_from("ab1 2'  \t\r\n\n\x0b\x1c\x85\u00a0\u3000.,é字٣½😀<|>")
WORDS = st.sampled_from(["word", " word", "  ", "\r\n", "\n\n", " 1", "'s", "\t", "<|endoftext|>"])
ODD_TEXT = st.text(SPACES_AND_DIGITS | CHARACTERS, max_size=60) | st.lists(WORDS).map("".join)


@settings(max_examples=300, deadline=None)
@given(text=ODD_TEXT, size=st.integers(1, 20))
def test_pieces_have_the_ids_of_the_full_text(text, size, encoding, oracle):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_data, "PIECE_CHARS", size)
        pieces = list(cut_text(io.StringIO(text, newline="")))
    assert "".join(pieces) == text
    assert [id for piece in pieces for id in encode(encoding, piece)] == oracle(text)


def test_pieces_are_short(monkeypatch):
    monkeypatch.setattr(prepare_data, "PIECE_CHARS", 100)
    monkeypatch.setattr(prepare_data, "MAX_PIECE_CHARS", 1000)
    words = list(cut_text(io.StringIO("seven77 " * 1000)))
    assert "".join(words) == "seven77 " * 1000 and max(map(len, words)) <= 100 + len("seven77 ")
    endless = list(cut_text(io.StringIO("x" * 10_000)))  # no safe place to cut, but memory must stay bounded
    assert "".join(endless) == "x" * 10_000 and max(map(len, endless)) == 1000


# ---- files, folders, globs and Hub datasets give the same bins


def write_txt(texts):
    for i, text in enumerate(texts):
        write(f"in/{'deep' if i < 20 else 'flat.d'}/{i:03}{('.txt', '.md', '.py', '.TXT')[i % 4]}", text)
    return "in"


def write_jsonl(texts, path="in.jsonl", column="text"):
    Path(path).write_text("".join(json.dumps({"id": 1, column: text}) + "\n" for text in texts))
    return path


def write_parquet(texts):
    pyarrow.parquet.write_table(pyarrow.table({"id": range(len(texts)), "text": texts}), "in.parquet", row_group_size=7)
    return "in.parquet"


def write_glob(texts):
    return write_txt(texts) + "/**/[0-9]*"


@pytest.mark.parametrize("write_texts", [write_txt, write_glob, write_jsonl, write_parquet])
def test_every_kind_of_source_gives_the_same_bins(place, oracle, write_texts, monkeypatch):
    monkeypatch.setattr(prepare_data, "PIECE_CHARS", 50)
    texts = ["".join(STORIES), *STORIES, *STORIES[:9]]  # a long one, and some documents twice
    prepare(f"--dataset={write_texts(texts)}")
    meta, splits = load("data/in")
    assert splits == expected(texts, oracle)
    assert meta["name"] == "in" and meta["sources"]["documents"] == len(texts)


def test_a_hub_dataset(place, oracle, monkeypatch):
    calls = []
    monkeypatch.setattr(lib.official, "probe_hub", lambda: None)
    rows = [{"text": text} for text in STORIES]
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: calls.append((args, kwargs)) or rows)
    prepare("--dataset=some.one/stories-1", "--subset=short", "--split=all", "--max_documents=40")
    assert calls == [(("some.one/stories-1", "short"), {"split": "all", "streaming": True})]
    meta, splits = load("data/stories-1")
    assert splits == expected(STORIES[:40], oracle)
    assert meta["sources"]["what"] == "Hub dataset some.one/stories-1, short, split all"


def test_settings_and_splits_in_any_order(place, oracle):
    splits = {}
    for name, texts in (("one", STORIES), ("two", STORIES[::-1] + STORIES[:20])):
        flags = ("--text_column=body", f"--name={name}", "--data_dir=a/b", "--val_fraction=0.3")
        prepare(f"--dataset={write_jsonl(texts, column='body')}", *flags)
        splits[name] = load(f"a/b/{name}")[1]
    assert splits["one"] == expected(STORIES, oracle, 0.3)
    for split in ("train", "val"):
        assert {*map(tuple, splits["one"][split])} == {*map(tuple, splits["two"][split])}


@pytest.mark.parametrize("chat", [False, True])
def test_the_number_of_workers_does_not_change_a_byte(place, monkeypatch, chat):
    monkeypatch.setattr(prepare_data, "PIECE_CHARS", 100)
    path = write_chats([a_conversation(i) for i in range(300)]) if chat else write_jsonl(STORIES)
    snapshots = []
    for workers in (1, 2, 7):
        monkeypatch.setattr(os, "cpu_count", lambda workers=workers: workers)
        prepare(f"--dataset={path}")
        snapshots.append(snapshot("data"))
    assert snapshots == [snapshots[0]] * 3 and len(snapshots[0]) == (5 if chat else 3)


@pytest.mark.parametrize("chunk", [1, 5, 8, 24, 25, 50])
def test_a_single_document_is_cut_once_for_any_size_of_pieces(monkeypatch, chunk):
    """Also if the border between train and val is a border between two pieces."""
    monkeypatch.setattr(prepare_data, "PIECE_CHARS", chunk)
    text = "one two three four five six seven eight nine ten"
    document = Document(b"12345678", len(text), lambda: io.StringIO(text))
    stream = prepare_data.cut_documents(iter([document]), 0.5)
    pieces = [(split, "|" if text is None else text) for split, text in stream]
    train, val = ("".join(text for name, text in pieces if name == split) for split in ("train", "val"))
    assert train[:-1] + val[:-1] == text and train[-1] == val[-1] == "|" and abs(len(train) - len(text) / 2) <= 6


def test_copies_of_one_document_count_as_a_single_document(place, oracle, capsys):
    write_jsonl(["to be or not to be"] * 3)
    prepare("--dataset=in.jsonl", "--val_fraction=0.5")
    assert load("data/in")[1] == {"train": [[*oracle("to be or"), 0]] * 3, "val": [[*oracle(" not to be"), 0]] * 3}
    assert "single document" in capsys.readouterr().out


@pytest.mark.parametrize("val_fraction", [1e-9, 0.999999])
def test_few_documents_that_all_fall_into_one_split(place, val_fraction, capsys):
    prepare(f"--dataset={write_jsonl(STORIES[:5] + STORIES[:5])}", f"--val_fraction={val_fraction}")
    splits = load("data/in")[1]
    empty, full = ("val", "train") if val_fraction < 0.5 else ("train", "val")
    assert len(splits[empty]) == 2 and splits[empty][0] == splits[empty][1] and len(splits[full]) == 8
    assert f"fell into {empty}: the nearest one was moved there" in capsys.readouterr().out


def test_train_gets_the_larger_part(place, capsys):
    """A long document may fall into val; together with its copies it goes to train."""
    exchanged = 0
    for number in range(12):
        long = f"{number} words of a long document " * 200
        write_jsonl([long, "one", "two", "three", long])
        prepare("--dataset=in.jsonl", f"--val_fraction={(number + 1) / 25}")
        meta, splits = load("data/in")
        train, val = meta["train"]["tokens"], meta["val"]["tokens"]
        assert train > val > 0 and not {*map(tuple, splits["train"])} & {*map(tuple, splits["val"])}
        output = capsys.readouterr().out
        exchanged += "the two were exchanged" in output
        assert f"val is {val / (train + val):.1%} of all" in output
    assert exchanged > 0
    for number in range(6):  # the masks are exchanged, too
        write_chats([say(("user", f"{number} {i}?"), ("assistant", "yes")) for i in range(5)])
        prepare("--dataset=in.jsonl", "--name=chat", "--block_size=50", "--val_fraction=0.5")
        meta, _ = load_chats("data/chat", 50)
        assert meta["train"]["tokens"] > meta["val"]["tokens"]
    assert "the two were exchanged" in capsys.readouterr().out


def test_shakespeare(place, monkeypatch, oracle, capsys):
    text = "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n\n" * 5
    url = Path(write("server/input.txt", text)).absolute().as_uri()
    monkeypatch.setattr(prepare_data, "SHAKESPEARE_URL", url)
    _, line = failure(capsys, "--dataset=shakespeare")  # this is not the real text
    assert "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed" in line and not snapshot("data")
    monkeypatch.setattr(prepare_data, "SHAKESPEARE_SHA256", hashlib.sha256(text.encode()).hexdigest())
    prepare("--dataset=shakespeare")
    splits = load("data/shakespeare")[1]
    assert [id for split in ("train", "val") for id in splits[split][0][:-1]] == oracle(text)
    Path("server/input.txt").unlink()
    prepare("--dataset=shakespeare")  # the server is gone, but input.txt is still here
    assert load("data/shakespeare")[1] == splits
    code, line = failure(capsys, "--dataset=shakespeare", "--name=again")
    assert code == 1 and url in line and str(Path("data/again/input.txt")) in line


# ---- an earlier dataset survives failures and kills, and there is one writer at a time


def at_call(nth, act, monkeypatch):
    """Act before the nth flush or rename. Text has 3 flushes, conversations 5; renames and flushes follow."""
    calls = itertools.count(1)
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, real=real: act() if next(calls) == nth else real(*args))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("nth", range(1, 10))
def test_sigkill_leaves_a_complete_dataset_or_none(place, monkeypatch, nth):
    """Before the renames the earlier dataset is untouched. Between them meta.json is missing, so no one reads a mix."""
    path = write_jsonl(STORIES)
    prepare(f"--dataset={path}", "--max_documents=30")
    before = snapshot("data")
    if not (child := os.fork()):
        at_call(nth, lambda: os.kill(os.getpid(), signal.SIGKILL), monkeypatch)
        prepare(f"--dataset={path}")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    if nth < 4:
        assert before.items() <= snapshot("data").items()
    elif nth < 9:
        assert not Path("data/in/meta.json").exists()
    else:
        assert open_data("in", 49_152, 8)[2]["sources"]["documents"] == len(STORIES)
    prepare(f"--dataset={path}")  # clears up what the kill left
    assert load("data/in")[0]["sources"]["documents"] == len(STORIES)


def test_a_second_run_into_the_same_name_is_refused(place, capsys):
    with lock_folder("data/in", "name"):
        code, line = failure(capsys, f"--dataset={write_jsonl(STORIES)}")
    assert code == 1 and re.fullmatch(r"error: data.in is in use by another process: .* --name or --data_dir", line)


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # some file systems report it only when a file is flushed


@pytest.mark.parametrize("chat, nth, error, code, line", [  # nth flush or rename
    (False, 1, FULL, 1, r"error: data.in: No space left on device: the disk is full: free some space, .*"),
    (True, 5, FULL, 1, r"error: data.in: No space left on device: the disk is full: free some space, .*"),
    (False, 3, KeyboardInterrupt(), 130, r"interrupted before data.in was complete: run the same command again"),
])  # fmt: skip
def test_a_failed_run_leaves_the_earlier_dataset_untouched(place, monkeypatch, capsys, chat, nth, error, code, line):
    def fail():
        raise error

    path = write_chats() if chat else write_jsonl(STORIES)
    prepare(f"--dataset={path}", "--max_documents=40")
    before = snapshot("data")
    at_call(nth, fail, monkeypatch)
    result, output = failure(capsys, f"--dataset={path}")
    assert result == code and re.fullmatch(line, output.strip()) and snapshot("data") == before


def a_conversation(i):
    """
    Return one of 30 to 150 tokens. Every fifth has two turns, and of every tenth the first answer is not learned. Every
    eleventh is longer than a row of 201 ids.
    """
    turns = [("user", f"What is {i} + {i}?  Say it in é."), ("assistant", f"It is {2 * i}." + " Really." * (i % 7))]
    turns += [("user", "Sure?"), ("assistant", "é" * (i % 3) + "\nYes 😀")] if i % 5 == 0 else []
    turns += [("user", "Go on."), ("assistant", "on and on " * 60)] if i % 11 == 0 else []
    messages = say(*turns)
    if i % 10 == 0:
        messages[1]["weight"] = 0
    return messages


CHATS = [a_conversation(i) for i in range(80)]


def write_chats(chats=CHATS, path="in.jsonl", key="messages"):
    Path(path).write_text("".join(json.dumps({key: chat}) + "\n" for chat in chats))
    return path


def load_chats(folder, block_size):
    """Return (meta, {split: sorted [(ids, mask) of each conversation]}). Check that the five files agree."""
    *splits, meta = open_data(Path(folder).name, 49_152, block_size, Path(folder).parent)
    chats = {"train": [], "val": []}
    for split, data in zip(chats, splits, strict=True):
        rows = zip(data.ids.reshape(-1, block_size + 1), data.mask.reshape(-1, block_size + 1), strict=True)
        for ids, mask in rows:
            *borders, used = borders_of(ids)
            assert ids[:used].all() and not mask[used:].any()
            for start, end in itertools.pairwise([*borders, used]):
                chats[split].append((ids[start:end].tolist(), mask[start:end].tolist()))
        counts = meta[split]
        assert counts["documents"] == len(chats[split]) and counts["padding"] == (data.ids == 0).sum()
        assert counts["tokens"] == len(data.ids) and counts["loss_tokens"] == data.mask.sum()
        for kind in ("", "mask_"):
            assert counts[f"{kind}sha256"] == sha256_of(Path(folder, f"{split}_{kind}".strip("_") + ".bin"))
        chats[split].sort()
    return meta, chats


def borders_of(row):
    """Return the index of each conversation's first id in a row, and the length of the row without its padding."""
    return [*(i for i in np.flatnonzero(row == 1) if row[i + 1] == 9690), np.flatnonzero(row)[-1] + 1]  # "system"


def test_conversations(place, encoding, capsys):
    chats = CHATS + CHATS[:9]  # some occur twice
    left_out = [say(("user", "Anyone?")), say(("user", "word " * 300), ("assistant", "too late")), say(("user", ""))]
    left_out += [say(("user", "Hm?"), ("assistant", " ")), say(("user", "Hm?"), ("tool", "call"))]
    prepare(f"--dataset={write_chats(chats + left_out)}", "--block_size=200", "--val_fraction=0.2")
    meta, splits = load_chats("data/in", 200)
    assert meta["block_size"] == 200 and meta["sources"]["documents"] == len(chats) + 3
    output = capsys.readouterr().out
    for split in ("train", "val"):
        mine = [chat_ids(encoding, chat) for chat in chats if in_val(json.dumps(chat), 0.2) == (split == "val")]
        assert splits[split] == sorted((list(ids[:201]), list(mask[:201])) for ids, mask in mine)
        counts = meta[split]
        assert counts["cut"] == sum(len(ids) > 201 for ids, _ in mine) >= (split == "train")
        learned = [id for ids, mask in splits[split] for id, one in zip(ids, mask, strict=True) if one and id > 16]
        assert counts["bytes"] == sum(map(len, encoding.decode_tokens_bytes(learned)))
        assert counts["padding"] / counts["tokens"] < 0.2
        row = [f"{counts[key]:,}" for key in ("tokens", "bytes", "documents", "loss_tokens", "padding", "cut")]
        assert [split, *row] in [line.split() for line in output.splitlines()]
    for note in (
        "2 conversations without an assistant's answer to learn were left out", "1 empty answers are not learned",
        "1 conversations with tool calls were left out", "1 empty documents were left out",
        "1 conversations with no answer before the row's end were left out: raise --block_size",
    ):  # fmt: skip
        assert f"note: {note}\n" in output
    assert "train with --block_size=200\n" in output


def test_a_row_begins_with_any_of_its_conversations(place, encoding):
    """They are in the order of their hashes. First fit puts the longest first."""
    chats = [a_conversation(i) for i in range(300)]
    prepare(f"--dataset={write_chats(chats)}")
    hashes = {tuple(chat_ids(encoding, chat)[0]): hashlib.sha256(json.dumps(chat).encode()).digest() for chat in chats}
    long_rows = 0
    for row in np.fromfile("data/in/train.bin", "<u2").reshape(-1, 513):
        order = [hashes.get(tuple(row[a:b].tolist()), b"") for a, b in itertools.pairwise(borders_of(row))]
        assert order == sorted(order)
        long_rows += len(order) > 2
    assert long_rows > 20


def test_conversations_after_text_and_text_after_conversations(place, oracle):
    write_chats(path="chat.jsonl")
    write_jsonl(STORIES, "text.jsonl")
    for name in ("text", "chat", "text"):
        prepare(f"--dataset={name}.jsonl", "--name=in", "--overwrite=True")
        if name == "chat":
            assert len(load_chats("data/in", 512)[1]["train"]) > 60
    assert load("data/in")[1] == expected(STORIES, oracle)  # no masks are left


def test_questions_about_python(place, monkeypatch):
    names = ("argparse.py", "pydoc_data/topics.py", "random.py")
    monkeypatch.setattr(prepare_data, "list_standard_library", lambda: [Path(os.__file__).parent / n for n in names])
    prepare("--dataset=python_chat")
    meta, splits = load_chats("data/python_chat", 512)
    assert meta["sources"]["identity"] == "python_chat"
    assert sum(map(len, splits.values())) == meta["sources"]["documents"] > 80


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_memory_grows_with_neither_document_nor_corpus(place, monkeypatch, suffix):
    for module, name in ((prepare_data, "PIECE_CHARS"), (lib.text, "CHUNK_CHARS"), (lib.text, "SAMPLE_BYTES")):
        monkeypatch.setattr(module, name, 2**13)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    peaks = []
    sentences = "The quick brown fox, aged 42, jumps over it.\n" * 20
    for repeats in (100, 1000):
        rows = (json.dumps({"text": f"{i} {sentences}"}) for i in range(repeats))
        write(f"in{suffix}", sentences * repeats if suffix == ".txt" else "\n".join(rows))
        tracemalloc.start()
        prepare(f"--dataset=in{suffix}", f"--name=n{repeats}")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 200_000  # of 900,000 more


# ---- errors: one line with the object, the cause and what to do next; nothing on disk changes

ERRORS = {  # name: (function that writes files, flags, exit code, phrases in the error line)
    "typo": (None, ["--dataset=shakespear"], 2, ["shakespear:", "did you mean shakespeare?"]),
    "unknown": (None, ["--dataset=xyzzy"], 2, ["xyzzy", "python, python_chat, shakespeare", "org/name"]),
    "glob of nothing": (None, ["--dataset=my/*.txt"], 2, ["my/*.txt", ".jsonl"]),
    "folder without text": (lambda: write("f/a.png", "x"), ["--dataset=f"], 2, ["f: no ", ".txt"]),
    "empty text": (lambda: write("a.txt", ""), ["--dataset=a.txt"], 1, ["a.txt: no text"]),
    "one letter": (lambda: write("a.txt", "a"), ["--dataset=a.txt"], 1, ["a.txt: train has nothing", "--val_fraction"]),
    "val_fraction 0": (None, ["--val_fraction=0"], 2, ["val_fraction is 0.0: it must be a number from"]),
    "name outside": (None, ["--name=../x"], 2, ["../x", "--name"]),
    "folder is a file": (lambda: write("data/a", ""), ["--name=a"], 1, [str(Path("data/a")), "--name or --data_dir"]),
    "one conversation": (lambda: write_chats(CHATS[:1] * 3), ["--dataset=in.jsonl"], 1, ["a single conversation"]),
    "no answers": (lambda: write_chats([say(("user", "x"))] * 3), ["--dataset=in.jsonl"], 1, ["3 conversations with"]),
    "empty answers": (
        lambda: write("a.csv", "question,answer\n" + "why?,\n" * 9),
        ["--dataset=a.csv"], 1, ["a.csv: nothing to learn (", "9 empty answers", "9 conversations without an as"],
    ),
    "tool calls": (
        lambda: write_chats([say(("user", "x"), ("function_call", "y"))] * 3),
        ["--dataset=in.jsonl"], 1, ["no text in it (", "3 conversations with tool calls were left out"],
    ),
    "one column": (None, ["--prompt_column=body"], 2, ["--prompt_column and --answer_column"]),
    "hub offline": (None, ["--dataset=org/name"], 1, ["org/name: no such path", "HF_HUB_OFFLINE"]),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors(place, capsys, case):
    write_files, flags, code, phrases = ERRORS[case]
    if write_files:
        write_files()
    before = snapshot(place)
    result, line = failure(capsys, *flags)
    assert result == code and line.startswith("error: ") and len(line.strip().splitlines()) == 1, line
    assert all(phrase in line for phrase in phrases), line
    assert snapshot(place) == before and not list(place.glob("data/*/"))


def test_brackets_and_a_tilde_in_paths(place, oracle, monkeypatch):
    monkeypatch.setenv("HOME", str(place / "home"))
    for i, text in enumerate(STORIES):
        write(f"home/data[v2]/sub/{i:02}.txt", text)
        write(f"home/datav/sub/{i:02}.txt", "not this")
    for number, dataset in enumerate(["~/data[v2]/*/*.txt", "~/data[v2]", str(place / "home/data[v2]/**/*.txt")]):
        prepare(f"--dataset={dataset}", "--data_dir=~/out", f"--name=n{number}")
        assert load(f"home/out/n{number}")[1] == expected(STORIES, oracle)


def test_notes(place, encoding, capsys):
    french = "Longtemps, je me suis couché de bonne heure. Parfois, à peine ma bougie éteinte, je m’endormais.\n"
    contents = {
        "a.txt": french.encode("cp1252") * 9, "b.txt": french.encode("cp1252") * 8, "empty.py": b"", "main.c": b"x",
        "broken.txt": french.encode() * 9 + b"caf\xe9 \xf0\x9f\x98 \xff\xfe end",
        "d.jsonl": '{"text": "row", "id": 1}\n{"body": "x"}\n',
        "odd.txt": "a<|endoftext|>\n<|im_start|>user\nHi<|endoftext|>\x04\x06 \U00050000 \U0001d800",
    }  # fmt: skip
    for name, content in contents.items():
        write(f"f/{name}", content)
    prepare("--dataset=f", "--val_fraction=0.4", "--block_size=9")
    output = capsys.readouterr().out
    for line in (
        f"read as cp1252, guessed: {Path('f/a.txt')} and 1 more",
        "left out: 1 .c",
        "columns: text; not read: id (1 rows)",
        "note: 2 <|endoftext|> are ordinary text here: make each document a file or a row of .jsonl",
        "note: 1 <|im_start|> are ordinary text here: write a conversation as messages, in a row of .jsonl",
        "note: 3 bytes without a token were left out: rare control characters, or not assigned in Unicode",
        f"note: 1 rows were left out: {Path('f/d.jsonl')}, line 2: no column text, only body",
        "note: 1 empty documents were left out",
        "note: block_size has no effect: these rows are plain text, not conversations",
        f"note: 6 undecodable bytes became U+FFFD, the first in {Path('f/broken.txt')}",
    ):
        assert f"{line}\n" in output
    meta, splits = load("data/f")
    for split, documents in splits.items():
        assert meta[split]["bytes"] == token_sizes(encoding, 49_152)[sum(documents, [])].sum()


def test_a_file_name_that_is_not_utf8(place, capsys):
    name = os.fsdecode(b"caf\xe9.txt")
    write(f"a/{name}", "".join(STORIES).encode() + b"\xff")
    prepare(f"--dataset=a/{name}")
    prepare(f"--dataset=a/{name}")
    output = capsys.readouterr().out
    assert "text: a/caf\\udce9.txt\n" in output and "became U+FFFD, the first in a/caf\\udce9.txt\n" in output
    meta = json.loads(Path("data/caf\ufffd/meta.json").read_text(encoding="ascii"))
    assert meta["sources"]["what"] == f"a/{name}" and meta["train"]["tokens"] > 1000


def test_different_text_of_the_same_name_is_refused(place, capsys):
    write("a/input.txt", "".join(STORIES))
    write("b/input.txt", "".join(STORIES[::-1] * 2))
    prepare("--dataset=a/input.txt")
    prepare("--dataset=./a/../a/input.txt", "--val_fraction=0.2")  # the same text again
    before = snapshot("data")
    code, line = failure(capsys, "--dataset=b/input.txt")
    assert code == 2 and line.startswith(f"error: {Path('data/input')} was made from different text, ")
    assert "a/input.txt" in line and "--name=" in line and "--overwrite" in line and snapshot("data") == before
    prepare("--dataset=b/input.txt", "--name=b_input")
    prepare("--dataset=b/input.txt", "--overwrite=True")
    assert load("data/input")[1] == load("data/b_input")[1]
