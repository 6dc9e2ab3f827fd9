"""dataset.py: what prepare_data.py wrote is opened; what a damaged or foreign folder gets."""

import json
import os

import numpy as np
import pytest
from networks import refusal, write_dataset

from lib import dataset
from lib.dataset import open_data


def opened(tmp_path, name="notes"):
    return open_data(name, 50, 8, tmp_path)


def test_a_dataset_is_opened(tmp_path):
    meta = write_dataset(tmp_path / "notes")
    train, val, found = opened(tmp_path)
    for split in ("train", "val"):
        meta[split]["loss_tokens"] = meta[split]["tokens"]
    assert (train.ids.tolist(), val.ids.tolist(), found) == (list(range(40)), list(range(20)), meta)
    assert train.ids.dtype == np.uint16 and train.mask is None


def test_conversations_are_opened_with_their_masks(tmp_path):
    folder = tmp_path / "chat"
    write_dataset(folder, train=range(45), val=range(18), mask=[0, 1, 1], block_size=8)
    train, val, meta = opened(tmp_path, "chat")
    assert train.mask.tolist() == [0, 1, 1] * 15 and meta["train"]["loss_tokens"] == 30
    assert "--block_size=8" in refusal(open_data, "chat", 50, 16, tmp_path)
    for spoil, word in ((lambda old: old[:-1], "a byte for each"), (lambda old: b"\1" + old[1:], "sha256")):
        whole = (folder / "val_mask.bin").read_bytes()
        (folder / "val_mask.bin").write_bytes(spoil(whole))
        assert word in refusal(opened, tmp_path, "chat")
        (folder / "val_mask.bin").write_bytes(whole)
    (folder / "val_mask.bin").unlink()
    assert "val_mask.bin" in refusal(opened, tmp_path, "chat")
    write_dataset(folder, train=range(44), val=range(18), mask=[0, 1], block_size=8)
    assert "whole rows of 9" in refusal(opened, tmp_path, "chat")


TRAIN = dict(tokens=40, bytes=120, sha256="")
META = {
    "a list": ("[1]", "not an object"),
    "nested": ("[" * 100_000, "nested too deep"),
    "cut": ('{"dtype": ', "not JSON"),
    "binary": (b"\xff\xfe\x00", "not JSON"),
    "empty object": ({}, "dtype None and vocab_size None"),
    "a list for a dtype": ({"dtype": []}, "dtype []"),
    "no vocabulary": ({"vocab_size": None}, "vocab_size None"),
    "true for a vocabulary": ({"vocab_size": True}, "vocab_size True"),
    "a vocabulary in words": ({"vocab_size": "50"}, "vocab_size '50'"),
    "a larger vocabulary": ({"vocab_size": 51}, "vocab_size 51"),
    "no train": ({"train": None}, "train None"),
    "a list for train": ({"train": [40]}, "train [40]"),
    "tokens in words": ({"train": TRAIN | {"tokens": "40"}}, "train tokens '40'"),
    "no tokens": ({"train": TRAIN | {"tokens": 0}}, "train tokens 0"),
    "half tokens": ({"train": TRAIN | {"tokens": 40.5}}, "train tokens 40.5"),
    "no bytes": ({"train": TRAIN | {"bytes": 0}}, "train bytes 0"),
    "negative bytes": ({"train": TRAIN | {"bytes": -3}}, "train bytes -3"),
    "no sum": ({"train": TRAIN | {"sha256": None}}, "train sha256 None"),
    "another sum": ({"train": TRAIN}, "sha256 that meta.json gives"),
    "a number for a tokenizer": ({"tokenizer": 3}, "tokenizer 3"),
}


@pytest.mark.parametrize("how", META)
def test_a_foreign_meta_json_gets_one_line(how, tmp_path):
    content, word = META[how]
    meta = write_dataset(tmp_path / "notes")
    if isinstance(content, dict):
        content = json.dumps(meta | content if content else {})
    (tmp_path / "notes/meta.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert word in refusal(opened, tmp_path)


def test_ids_beyond_the_vocabulary_get_one_line(tmp_path, monkeypatch):
    write_dataset(tmp_path / "notes", val=[*range(19), 50])
    assert "val.bin holds the id 50" in refusal(opened, tmp_path)
    monkeypatch.setattr(dataset, "TRUSTED", 30)  # now both files are large, and only blocks of them are read
    monkeypatch.setattr(dataset, "BLOCK", 8)
    assert "val.bin holds the id 50" in refusal(opened, tmp_path)
    write_dataset(tmp_path / "notes", train=[49] * 40)
    assert opened(tmp_path)[0].ids.tolist() == [49] * 40
    write_dataset(tmp_path / "notes", train=[0] * 20 + [999] * 10 + [0] * 10)
    assert "train.bin holds the id 999" in refusal(opened, tmp_path)


@pytest.mark.parametrize("name", ["meta.json", "train.bin", "val.bin"])
def test_a_pipe_or_a_folder_for_a_file_gets_one_line(name, tmp_path):
    for make in (os.mkfifo, os.mkdir):
        folder = tmp_path / make.__name__
        write_dataset(folder)
        (folder / name).unlink()
        assert f"{name} does not exist" in refusal(open_data, folder.name, 50, 8, tmp_path)
        make(folder / name)
        assert f"{name} is not a file" in refusal(open_data, folder.name, 50, 8, tmp_path)


def test_the_way_out_is_right_for_each_kind_of_dataset(tmp_path):
    for name in ("python", "shakespeare"):
        assert refusal(opened, tmp_path, name).endswith(f": run python prepare_data.py --dataset={name}")
    assert refusal(opened, tmp_path, "notes").endswith("--dataset=TEXT --name=notes")  # no trace of its source
    write_dataset(tmp_path / "notes")
    (tmp_path / "notes/train.bin").unlink()
    assert refusal(opened, tmp_path).endswith(": prepare it again with --name=notes, from my/notes.txt")
