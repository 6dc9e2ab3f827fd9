"""lib/dataset.py: prepared data and datatrove's files are opened as they were written; damaged ones are refused."""

import hashlib
import json
from pathlib import Path
from configurator import configure

import numpy as np
import pytest
import torch
from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.tokens import DocumentTokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import refusal, write, write_dataset

from lib import dataset
from lib.batches import get_blocks
from lib.dataset import Shards, open_data, read_tokenized
from lib.tokenizer import encode, tokenizer_json
from prepare_data import PrepareConfig, main


def open_small(tmp_path, name="notes"):
    return open_data(name, 50, 8, tmp_path)


def write_files(folder, train):
    """Write a dataset whose train split is several files."""
    meta, shards = write_dataset(folder, sum(train, [])), []
    for i, ids in enumerate(train):
        content = np.array(ids, "<u2").tobytes()
        (folder / f"{i}.ds").write_bytes(content)
        shards.append({"file": f"{i}.ds", "tokens": len(ids), "sha256": hashlib.sha256(content).hexdigest()})
    (folder / "train.bin").unlink()
    meta["train"]["shards"] = shards
    (folder / "meta.json").write_text(json.dumps(meta))


def test_a_dataset_is_open_small(tmp_path):
    meta = write_dataset(tmp_path / "notes")
    train, val, opened_meta = open_small(tmp_path)
    for split in ("train", "val"):
        meta[split]["loss_tokens"] = meta[split]["tokens"]
    meta["sha256"] = {split: meta[split]["sha256"] for split in ("train", "val")}
    assert (train.ids.tolist(), val.ids.tolist(), opened_meta) == ([*range(40)], [*range(20)], meta)
    assert train.ids.dtype == np.uint16 and train.mask is None


def test_conversations_are_opened_with_their_masks(tmp_path):
    folder = tmp_path / "chat"
    write_dataset(folder, train=range(45), val=range(18), mask=[0, 1, 1], block_size=8)
    train, val, meta = open_small(tmp_path, "chat")
    assert train.mask.tolist() == [0, 1, 1] * 15 and meta["train"]["loss_tokens"] == 30
    assert open_data("chat", 50, None, tmp_path)[2] == meta
    assert "--block_size=8" in refusal(open_data, "chat", 50, 16, tmp_path)
    mask = (folder / "val_mask.bin").read_bytes()
    for content, word in ((mask[:-1], "holds 17 numbers, not the 18"), (b"\1" + mask[1:], "sha256"), (b"", "empty")):
        (folder / "val_mask.bin").write_bytes(content)
        assert word in refusal(open_small, tmp_path, "chat")
    (folder / "val_mask.bin").unlink()
    assert "val_mask.bin cannot be used (No such file" in refusal(open_small, tmp_path, "chat")


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(0, 5), min_size=1, max_size=6).filter(any),
    ends=st.tuples(st.integers(0, 30) | st.none(), st.integers(0, 30) | st.none()),
)
def test_several_files_are_sliced_like_one_array(sizes, ends, tmp_path_factory):
    folder, array = tmp_path_factory.mktemp("files"), np.arange(sum(sizes), dtype="<u2")
    for i, part in enumerate(np.split(array, np.cumsum(sizes)[:-1])):
        part.tofile(folder / str(i))
    ids = Shards([folder / str(i) for i in range(len(sizes))])
    part = ids[slice(*ends)]
    assert len(ids) == len(array) and part.dtype == np.uint16 and part.tolist() == array[slice(*ends)].tolist()


def test_a_file_that_is_lost_while_training_gets_one_line(tmp_path):
    write_files(tmp_path / "notes", [[7] * 20, [8] * 20])
    ids = open_small(tmp_path)[0].ids
    second = tmp_path / "notes/1.ds"
    second.write_bytes(second.read_bytes()[:-2])
    assert "1.ds cannot be used (it has become shorter): put the dataset back" in refusal(lambda: ids[30:40])
    second.unlink()
    assert "1.ds cannot be used (No such file" in refusal(lambda: ids[19:21])
    assert ids[:20].tolist() == [7] * 20  # a slice needs only its own files


TRAIN = dict(tokens=40, bytes=120, sha256="")
META = {
    "a list": ("[1]", "list indices"),
    "nested": ("[" * 100_000, "maximum recursion depth"),
    "cut": ('{"dtype": ', "Expecting value"),
    "binary": (b"\xff\xfe\x00", "decode"),
    "empty object": ({}, "it has no dtype"),
    "different dtype": ({"dtype": "uint32"}, "uint32 ids below 50, not uint16"),
    "a vocabulary in words": ({"vocab_size": "50"}, "'str' and 'int'"),
    "a larger vocabulary": ({"vocab_size": 51}, "ids below 51, not uint16 below 50"),
    "no train": ({"train": None}, "NoneType"),
    "tokens in words": ({"train": TRAIN | {"tokens": "40"}}, "'int' and 'str'"),
    "no tokens": ({"train": TRAIN | {"tokens": 0}}, "train is empty"),
    "other tokens": ({"train": TRAIN | {"tokens": 41}}, "train.bin cannot be used (it holds 40 numbers, not the 41"),
    "no bytes": ({"train": TRAIN | {"bytes": 0}}, "train is empty"),
    "different sum": ({"train": TRAIN}, "train.bin cannot be used (its sha256 is not"),
}


@pytest.mark.parametrize("how", META)
def test_a_foreign_meta_json_gets_one_line(how, tmp_path):
    content, word = META[how]
    meta = write_dataset(tmp_path / "notes")
    if isinstance(content, dict):
        content = json.dumps(meta | content if content else {})
    write(tmp_path / "notes/meta.json", content)
    assert word in refusal(open_small, tmp_path)


def test_missing_and_damaged_files_get_one_line(tmp_path, monkeypatch):
    hint = "python/meta.json does not exist: run python prepare_data.py --dataset=python"
    assert refusal(open_small, tmp_path, "python").endswith(hint)
    assert refusal(open_small, tmp_path).endswith(": run python prepare_data.py --dataset=TEXT --name=notes")
    folder = tmp_path / "notes"
    write_dataset(folder, val=[*range(19), 50])
    assert "val.bin cannot be used (it holds the number 50" in refusal(open_small, tmp_path)
    write_dataset(folder, val=range(8))
    assert "val holds 8 tokens, fewer than one block of 8 + 1" in refusal(open_small, tmp_path)
    write_files(folder, [[7] * 20, [49] * 20])
    assert open_small(tmp_path)[0].ids[:].tolist() == [7] * 20 + [49] * 20
    ids = (folder / "1.ds").read_bytes()
    for content, word in ((ids[:-2], "19 numbers"), (ids[:-1], "multiple"), (b"\1" + ids[1:], "sha256")):
        (folder / "1.ds").write_bytes(content)
        assert "1.ds cannot be used (" in refusal(open_small, tmp_path) and word in refusal(open_small, tmp_path)
    monkeypatch.setattr(dataset, "MAX_FULL_CHECK", 30)  # now train is large, and only its size is checked
    assert len(open_small(tmp_path)[0].ids) == 40
    (folder / "1.ds").unlink()
    assert "1.ds cannot be used (No such file" in refusal(open_small, tmp_path)


# ---- datatrove's files

STORIES = [f"Story {i}: {'the cat sat on the mat, ' * (i % 9)}it was {i * i}.\n" for i in range(240)]


@pytest.fixture(scope="module")
def tokenized(tmp_path_factory):
    """Return a folder written by datatrove's own DocumentTokenizer, in four tasks; the last has no document."""
    folder = tmp_path_factory.mktemp("datatrove")
    write(folder / "tokenizer.json", tokenizer_json()[0])

    def read(data, rank, world_size):
        yield from (Document(text=text, id=str(i)) for i, text in enumerate(STORIES[80 * rank : 80 * rank + 80]))

    options = dict(eos_token="<|endoftext|>", shuffle_documents=False)
    step = DocumentTokenizer(str(folder / "corpus"), str(folder / "tokenizer.json"), **options)
    LocalPipelineExecutor([read, step], tasks=4, workers=1, logging_dir=str(folder / "logs")).run()
    return folder / "corpus"


def test_datatrove_s_files_are_a_dataset(tokenized, encoding, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(configure(PrepareConfig, [f"--dataset={tokenized}", "--name=theirs"]))
    assert "val: the last 1 of 3 files" in capsys.readouterr().out
    assert not list(Path("data/theirs").glob("*.bin"))  # the ids stay where they are
    train, val, meta = open_data("theirs", 49_152, 16)
    assert torch.equal(*(get_blocks(ids, 3, 99, 16, 7)[0] for ids in (train.ids, train.ids[:])))
    for split, data, part in (("train", train, STORIES[:160]), ("val", val, STORIES[160:])):
        assert data.ids[:].tolist() == [i for text in part for i in [*encode(encoding, text), 0]]
        assert meta[split]["documents"] == len(part) and meta[split]["tokens"] == len(data.ids)
        assert meta[split]["bytes"] == sum(len(text.encode()) for text in part)
    assert read_tokenized(sorted(tokenized.glob("*.ds")), encoding, 0.6)["val"]["documents"] == 160


def with_ids(change):
    return lambda path: change(np.fromfile(path, "<u2")).astype("<u2").tofile(path)


DAMAGED = {
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-2]), "1_unshuffled.ds cannot be used (it has"),
    "half written": (lambda path: Path(f"{path}.metadata").unlink(), "metadata cannot be used (No such file"),
    "four bytes": (lambda path: Path(f"{path}.metadata").write_text("gpt|4\n9\n9 T"), "9 ids of gpt|4"),
    "an id": (with_ids(lambda ids: np.where(ids == ids.max(), 50_000, ids)), "ids of 49152 and above"),
    "no end": (with_ids(lambda ids: np.where(ids == 0, 300, ids)), "decoded and encoded again"),
    "other ids": (with_ids(lambda ids: np.where(ids == 0, 0, (ids + 300) % 49_152)), "decoded and encoded again"),
    "two kinds": (lambda path: Path(path.parent, "1_doc_shuffled.ds").write_bytes(b"xx"), "perhaps of the same"),
    "one file": (lambda path: [p.unlink() for p in path.parent.glob("*[02]_*.ds")], "needs two .ds files"),
}


@pytest.mark.parametrize("how", DAMAGED)
def test_foreign_or_half_written_files_get_one_line(how, tokenized, encoding, tmp_path):
    change, word = DAMAGED[how]
    for path in tokenized.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    change(tmp_path / "00001_unshuffled.ds")
    assert word in refusal(read_tokenized, sorted(tmp_path.glob("*.ds")), encoding, 0.1)
