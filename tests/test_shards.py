"""
A corpus larger than one machine: shards are read as one array, a killed run goes on to the same bytes, parts and
datatrove's files make the same dataset.
"""

import hashlib
import json
import os
import re
import signal
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.tokens import DocumentTokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import refusal, tokenizer_built_once, write_dataset

import lib.official
import prepare_data
from configurator import configure
from lib import dataset
from lib.batches import get_blocks
from lib.dataset import open_data
from lib.shards import Shards, sha256_of_shards
from lib.tokenizer import tokenizer_json
from prepare_data import PrepareConfig, main

STORIES = [f"Story {i}: {'the cat sat on the mat, ' * (i % 9)}it was {i * i}.\n" for i in range(240)]


@pytest.fixture
def place(tmp_path, monkeypatch, encoding):
    """A folder to run in. The tokenizer is built once for all tests, and bundles are so short that there are many."""
    monkeypatch.chdir(tmp_path)
    tokenizer_built_once(monkeypatch, prepare_data, encoding)
    monkeypatch.setattr(prepare_data, "CHUNK", 500)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # no power is cut here, and hundreds of them take seconds
    Path("in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in STORIES))
    Path("in").mkdir()
    for i, text in enumerate(STORIES):
        Path(f"in/{i:03}.txt").write_text(text)
    return tmp_path


def prepare(*flags):
    main(configure(PrepareConfig, list(flags)))
    return json.loads(next(Path("data").glob(f"{name_of(flags)}/meta.json")).read_text())


def name_of(flags):
    return next((flag[7:] for flag in flags if flag.startswith("--name=")), "in")


def content(folder):
    """{name: bytes} of the files that train.py reads, and all else that is there: there must be nothing."""
    return {
        path.name: path.is_file() and path.read_bytes() for path in Path(folder).iterdir() if path.name != "meta.json"
    }


def failure(capsys, *flags):
    """The one line that a failed run prints."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        prepare(*flags)
    said = exit.value.code if isinstance(exit.value.code, str) else capsys.readouterr().err.strip()
    assert said.startswith("error: ") and len(said.splitlines()) == 1, said
    return said


# ---- reading


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(0, 5), min_size=1, max_size=6).filter(any),
    ends=st.tuples(st.integers(0, 30) | st.none(), st.integers(0, 30) | st.none()),
)
def test_shards_are_sliced_like_one_array(sizes, ends, tmp_path_factory):
    folder, whole, at = tmp_path_factory.mktemp("shards"), np.arange(sum(sizes), dtype="<u2"), 0
    for i, size in enumerate(sizes):
        whole[at : at + size].tofile(folder / str(i))
        at += size
    ids = Shards([folder / str(i) for i in range(len(sizes))])
    found = ids[slice(*ends)]
    assert len(ids) == len(whole) and found.dtype == np.uint16 and found.tolist() == whole[slice(*ends)].tolist()


@pytest.mark.parametrize("shard_tokens", [1_000, 37])
def test_one_file_and_shards_give_the_same_batches(place, shard_tokens):
    one = prepare("--dataset=in.jsonl", "--name=one")
    several = prepare("--dataset=in.jsonl", "--name=several", f"--shard_tokens={shard_tokens}")
    shards = several["train"]["shards"]
    assert [s["file"] for s in shards] == [f"train_{i:05}.bin" for i in range(len(shards))] and len(shards) > 3
    assert {s["tokens"] for s in shards[:-1]} == {shard_tokens} and 0 < shards[-1]["tokens"] <= shard_tokens
    files = content("data/several")
    assert b"".join(files[s["file"]] for s in shards) == content("data/one")["train.bin"]
    assert [hashlib.sha256(files[s["file"]]).hexdigest() for s in shards] == [s["sha256"] for s in shards]
    assert several["train"] == one["train"] | {"sha256": sha256_of_shards(shards), "shards": shards}
    assert several["val"] == one["val"] and several["sources"] == one["sources"]
    assert set(content("data/one")) == {"train.bin", "val.bin"} and len(files) == len(shards) + 1

    (a, *_), (b, *_) = (open_data(name, 49_152, 64) for name in ("one", "several"))
    epoch = len(a.ids) // 64
    for first in range(0, 3 * epoch, 64):
        for x, y in zip(get_blocks(a.ids, first, 64, 64, 7), get_blocks(b.ids, first, 64, 64, 7), strict=True):
            assert torch.equal(x, y)


def test_a_corpus_that_fits_stays_one_file(place):
    tokens = prepare("--dataset=in.jsonl")["train"]["tokens"]
    assert "shards" not in prepare("--dataset=in.jsonl", f"--shard_tokens={tokens}")["train"]
    assert len(prepare("--dataset=in.jsonl", f"--shard_tokens={tokens - 1}")["train"]["shards"]) == 2
    prepare("--dataset=in.jsonl")
    assert set(content("data/in")) == {"train.bin", "val.bin"}  # the shards of the earlier one are gone


def write_shards(folder, sizes, last=49):
    """A dataset of shards, with their sums: (folder, meta)."""
    meta, shards = write_dataset(folder), []
    for i, size in enumerate(sizes):
        ids = np.full(size, last if i == len(sizes) - 1 else 7, "<u2")
        ids.tofile(folder / f"train_{i:05}.bin")
        sha256 = hashlib.sha256(ids.tobytes()).hexdigest()
        shards.append({"file": f"train_{i:05}.bin", "tokens": size, "sha256": sha256})
    (folder / "train.bin").unlink()
    meta["train"] |= {"tokens": sum(sizes), "shards": shards, "sha256": sha256_of_shards(shards)}
    (folder / "meta.json").write_text(json.dumps(meta))
    return meta


@pytest.mark.parametrize("trusted", [2**30, 30])
def test_damaged_shards_get_one_line(tmp_path, monkeypatch, trusted):
    monkeypatch.setattr(dataset, "TRUSTED", trusted)  # of the sum: with 30, these are large, and only sampled
    monkeypatch.setattr(dataset, "BLOCK", 8)
    folder = tmp_path / "notes"
    meta = write_shards(folder, [20, 20, 3])
    assert open_data("notes", 50, 8, tmp_path)[0].ids[:].tolist() == [7] * 40 + [49] * 3
    opening = (open_data, "notes", 50, 8, tmp_path)
    second = folder / "train_00001.bin"
    whole = second.read_bytes()
    second.write_bytes(whole[:-2])
    assert "train_00001.bin holds 38 bytes" in refusal(*opening)
    second.write_bytes(whole)
    ids = open_data("notes", 50, 8, tmp_path)[0].ids
    second.write_bytes(whole)  # prepared anew while a run reads it
    os.utime(second, (1, 1))
    assert "train_00001.bin: cannot be read any more, it has changed" in refusal(lambda: ids[30:45])
    second.unlink()
    assert "train_00001.bin does not exist" in refusal(*opening)
    assert "train_00001.bin: cannot be read any more, No such file" in refusal(lambda: ids[19:21])
    assert ids[:20].tolist() == [7] * 20  # a slice needs only its own shards
    second.write_bytes(b"\1" + whole[1:])
    if trusted > 30:
        assert "train_00001.bin does not have the sha256" in refusal(*opening)
    write_shards(folder, [20, 20, 3], last=50)
    assert "holds the id 50" in refusal(*opening)
    first = meta["train"]["shards"][0]
    for wrong, word in (
        ([], "train shards []"),
        ([first], "train tokens 43, not 20"),
        ([first | {"sha256": "0"}, *meta["train"]["shards"][1:]], "that of its shards"),
        ([first | {"tokens": "20"}], "not a file, its tokens"),
        ([first | {"tokens": 0}], "train shard of tokens 0"),
        ("train.bin", "train shards 'train.bin'"),
    ):
        (folder / "meta.json").write_text(json.dumps(meta | {"train": meta["train"] | {"shards": wrong}}))
        assert word in refusal(*opening)


# ---- an interrupted run goes on


def stopping(monkeypatch, after, stop):
    """From now on, runs call stop() before they encode bundle `after` of their own. Returns the list of those done."""
    real, done = prepare_data.encode_bundle, []

    def encode_bundle(*args):
        if len(done) == after:
            stop()
        done.append(1)
        return real(*args)

    monkeypatch.setattr(prepare_data, "encode_bundle", encode_bundle)
    return done


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("source, more", [("in.jsonl", []), ("in", []), ("lone.txt", ["--val_fraction=0.05"])])
def test_killed_again_and_again_it_ends_with_the_same_bytes(place, monkeypatch, capfd, source, more):
    """Each run is killed after a few bundles, so all depends on what the earlier ones left."""
    Path("lone.txt").write_text("".join(STORIES))
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    flags = [f"--dataset={source}", "--shard_tokens=300", *more]
    prepare(*flags, "--name=straight")
    stopping(monkeypatch, 6, lambda: os.kill(os.getpid(), signal.SIGKILL))
    kills = 0
    while True:
        if not (child := os.fork()):
            try:
                prepare(*flags, "--name=killed")
            except BaseException:
                os._exit(1)
            os._exit(0)
        if os.WIFEXITED(status := os.waitpid(child, 0)[1]):
            break
        kills += 1
        assert set(content("data/killed")) - {".lock", "unfinished"} == set()
        assert "meta.json" in refusal(open_data, "killed", 49_152, 16) and kills < 50
    assert status == 0 and kills > 3
    assert content("data/killed") == content("data/straight")
    killed, straight = (json.loads(Path("data", n, "meta.json").read_text()) for n in ("killed", "straight"))
    assert killed == straight | {"name": "killed"}
    assert len(set(re.findall(r"going on after (\d+) whole shards", capfd.readouterr().out))) > 3


def test_a_run_goes_on_only_with_the_same_text_and_settings(place, monkeypatch, capsys):
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    flags = ["--dataset=in.jsonl", "--shard_tokens=300"]
    prepare(*flags, "--name=straight")

    def interrupt():
        raise KeyboardInterrupt

    def cut_short(*changes):
        with pytest.raises(SystemExit), monkeypatch.context() as patch:
            stopping(patch, 30, interrupt)
            prepare(*flags, *changes)
        assert "interrupted before" in capsys.readouterr().err
        return json.loads(Path("data/in/unfinished/state.json").read_text())

    state = cut_short()
    with monkeypatch.context() as patch:
        done = stopping(patch, -1, None)
        prepare(*flags)
    said = capsys.readouterr().out
    assert "going on after" in said and content("data/in") == content("data/straight")
    with monkeypatch.context() as patch:
        every = stopping(patch, -1, None)
        prepare(*flags)
    assert len(done) == len(every) - state["bundles"] < len(every) - 15  # what was done is not encoded again
    assert "going on" not in capsys.readouterr().out

    cut_short()
    prepare(*flags, "--val_fraction=0.3")
    assert "made with another val_fraction: starting over" in capsys.readouterr().out
    prepare(*flags, "--val_fraction=0.3", "--name=other")
    assert content("data/in") == content("data/other")

    cut_short()
    (place / "data/in/unfinished/train_00001.bin").write_bytes(b"x")
    prepare(*flags)
    assert "it is not whole: starting over" in capsys.readouterr().out
    assert content("data/in") == content("data/straight")

    cut_short()
    text = Path("in.jsonl").read_text()
    Path("in.jsonl").write_text(text.replace("cat", "dog"))  # as long as it was
    assert "the text is not what the interrupted run read" in failure(capsys, *flags)
    prepare(*flags)
    assert content("data/in")["train_00000.bin"] != content("data/straight")["train_00000.bin"]


# ---- parts


def documents_of(folder):
    """{split: sorted list of the ids of each document} of a dataset."""
    train, val, meta = open_data(folder, 49_152, 16)
    found = {}
    for split, data in (("train", train), ("val", val)):
        ids = data.ids[:]
        found[split] = sorted(part.tolist() for part in np.split(ids, np.flatnonzero(ids == 0) + 1)[:-1])
        assert len(found[split]) == meta[split]["documents"] and len(ids) == meta[split]["tokens"]
    return found, meta


def run_part(*flags):
    main(configure(PrepareConfig, list(flags)))


@pytest.mark.parametrize("source, parts", [("in", 24), ("org/in", 3), ("org/in", 2)])
def test_parts_make_the_whole(place, monkeypatch, source, parts):
    """24 parts are so small that some have nothing for val. Of four files of the Hub, two parts get two each."""
    rows = datasets.Dataset.from_list([{"text": text} for text in STORIES]).to_iterable_dataset(num_shards=4)
    monkeypatch.setattr(lib.official, "hub_problem", lambda: None)
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: rows)
    prepare(f"--dataset={source}", "--name=whole")
    for part in (2, 1, *range(3, parts + 1)):
        run_part(f"--dataset={source}", f"--part={part}/{parts}", "--shard_tokens=300")
    assert "meta.json" in refusal(open_data, "in", 49_152, 16)
    assert "meta.json" in refusal(open_data, f"in/part_00001_of_{parts:05}", 49_152, 16)
    if source == "in":  # as it is on a machine that only merges: nothing but the parts
        Path("in").rename("elsewhere")
        run_part("--name=in", "--merge")
    else:
        run_part(f"--dataset={source}", "--merge=True")
    (whole, one), (merged, meta) = documents_of("whole"), documents_of("in")
    assert merged == whole
    for split in ("train", "val"):
        assert {key: meta[split][key] for key in ("tokens", "bytes", "documents", "loss_tokens")} == {
            key: one[split][key] for key in ("tokens", "bytes", "documents", "loss_tokens")
        }
    assert len(meta["train"]["shards"]) > parts and meta["sources"]["documents"] == len(STORIES)
    folders = {f"part_{part:05}_of_{parts:05}" for part in range(1, parts + 1)}
    assert {path.name for path in Path("data/in").iterdir()} == {"meta.json"} | folders
    prepare("--dataset=elsewhere" if source == "in" else "--dataset=org/in", "--name=in", "--overwrite=True")
    assert documents_of("in")[0] == whole  # the dataset is prepared anew beside its parts


def test_parts_that_do_not_fit_are_not_merged(place, capsys):
    for part in (1, 2, 4):
        run_part("--dataset=in", f"--part={part}/4")
    assert "these are missing: 3: run --part=3/4, or" in failure(capsys, "--name=in", "--merge")
    run_part("--dataset=in", "--part=3/4", "--val_fraction=0.3")
    said = failure(capsys, "--name=in", "--merge")
    assert "part_00003_of_00004 was made with val_fraction 0.3, but part_00001_of_00004 with 0.1" in said
    Path("in/extra.txt").write_text("one more")
    run_part("--dataset=in", "--part=3/4", "--overwrite=True")
    assert "part_00003_of_00004 was made with text " in failure(capsys, "--name=in", "--merge")
    run_part("--dataset=in", "--part=1/3")
    assert "data/in has parts of 3 and of 4" in failure(capsys, "--name=in", "--merge")
    assert "has no part" in failure(capsys, "--name=other", "--merge")
    assert not Path("data/other").exists() and not Path("data/in/meta.json").exists()
    for part in ("0/3", "4/3", "3", "a/b", "1/3/5"):
        assert f"part={part}: not one of" in failure(capsys, "--dataset=in", f"--part={part}")
    assert "give --merge alone" in failure(capsys, "--dataset=in", "--part=1/3", "--merge")
    assert "shard_tokens=0" in failure(capsys, "--dataset=in", "--shard_tokens=0")
    assert "in.jsonl is 1 files" in failure(capsys, "--dataset=in.jsonl", "--part=1/2")
    for i in range(3):
        Path(f"in/{i}.jsonl").write_text('{"question": "x", "answer": "y"}\n')
    assert "not prepared in parts" in failure(capsys, "--dataset=in/*.jsonl", "--part=1/2", "--name=chat")


# ---- datatrove's files


@pytest.fixture(scope="module")
def tokenized(tmp_path_factory):
    """A folder that datatrove's own DocumentTokenizer wrote, in three tasks."""
    folder = tmp_path_factory.mktemp("datatrove")
    (folder / "tokenizer.json").write_bytes(tokenizer_json()[0])

    def read(data, rank, world_size):
        yield from (Document(text=text, id=str(i)) for i, text in enumerate(STORIES[80 * rank : 80 * rank + 80]))

    step = DocumentTokenizer(
        str(folder / "corpus"), str(folder / "tokenizer.json"), eos_token="<|endoftext|>", shuffle_documents=False
    )
    LocalPipelineExecutor([read, step], tasks=3, workers=1, logging_dir=str(folder / "logs")).run()
    return folder / "corpus"


def test_datatrove_s_files_are_a_dataset(place, tokenized, capsys):
    """With the ids of prepare_data.py, so a run on either sees the same batches."""
    meta = prepare(f"--dataset={tokenized}", "--name=theirs")
    assert set(content("data/theirs")) == set()  # only meta.json
    assert "val: the last 1 of 3 files" in capsys.readouterr().out
    train, val, _ = open_data("theirs", 49_152, 16)
    prepare("--dataset=in.jsonl", "--val_fraction=0.000000001")  # all but one of the documents in train, in order
    ours, held_out, one = open_data("in", 49_152, 16)
    documents = [part.tolist() for part in np.split(ours.ids, np.flatnonzero(ours.ids == 0) + 1)[:-1]]
    nearest = min(STORIES, key=lambda text: hashlib.sha256(text.encode()).digest())
    documents.insert(STORIES.index(nearest), held_out.ids.tolist())
    ids = [np.array([i for d in part for i in d], "<u2") for part in (documents[:160], documents[160:])]
    assert train.ids[:].tolist() == ids[0].tolist() and val.ids.tolist() == ids[1].tolist()
    for first in range(0, 400, 50):
        for x, y in zip(get_blocks(train.ids, first, 50, 16, 7), get_blocks(ids[0], first, 50, 16, 7), strict=True):
            assert torch.equal(x, y)
    assert (meta["train"]["documents"], meta["val"]["documents"]) == (160, 80)
    assert [meta[split]["bytes"] for split in ("train", "val")] == [
        sum(len(text.encode()) for text in part) for part in (STORIES[:160], STORIES[160:])
    ]
    assert prepare(f"--dataset={tokenized}", "--name=theirs", "--val_fraction=0.6")["val"]["documents"] == 160


def test_foreign_or_half_written_files_get_one_line(place, tokenized, capsys):
    def copy(change):
        for path in tokenized.iterdir():
            Path("ds", path.name).parent.mkdir(exist_ok=True)
            Path("ds", path.name).write_bytes(path.read_bytes())
        change(Path("ds/00001_unshuffled.ds"))
        return failure(capsys, "--dataset=ds")

    def without_notes(path):
        Path(f"{path}.index").unlink()
        Path(f"{path}.metadata").unlink()

    def with_ids(change):
        def spoil(path):
            change(np.fromfile(path, "<u2")).astype("<u2").tofile(path)

        return spoil

    whole = (tokenized / "00001_unshuffled.ds").read_bytes()
    assert "not 2 for each of" in copy(lambda path: path.write_bytes(whole[:-1]))
    assert "not 2 for each of" in copy(lambda path: path.write_bytes(whole[:-2]))
    assert "may be half written" in copy(without_notes)
    assert "are not 2 bytes each (gpt|4" in copy(lambda path: Path(f"{path}.metadata").write_text("gpt|4\n9\n9 T"))
    assert "holds the id 50000" in copy(with_ids(lambda ids: np.where(ids == ids.max(), 50_000, ids)))
    assert "no document in it ends with" in copy(with_ids(lambda ids: np.where(ids == 0, 300, ids)))
    assert "decoded and encoded again" in copy(with_ids(lambda ids: np.where(ids == 0, 0, (ids + 300) % 49_152)))
    shuffled = Path("ds/00001_doc_shuffled.ds")
    assert "perhaps of the same documents" in copy(lambda path: shuffled.write_bytes(whole))
    shuffled.unlink()
    for path in tokenized.glob("00001*"):
        Path("ds", path.name).unlink()
    Path("ds/00002_unshuffled.ds").unlink()
    assert "one .ds file" in failure(capsys, "--dataset=ds")
    assert "leave --part" in failure(capsys, f"--dataset={tokenized}", "--part=1/3")
    assert not Path("data").exists() or not list(Path("data").iterdir())
