"""Test lib/log.py: log.csv on a resume, with other columns, or damaged; loss.png; trackers."""

import csv
import json
import sqlite3
from types import SimpleNamespace

import pytest

from lib import log
from lib.log import COLUMNS, RunLog, open_tracker, plot_log, read_log, say
from train import TrainConfig

GOOD = [["10", "9.5", "0.1", "1", "", "", "5", "6"], ["20", "8.5", "0.1", "1", "", "", "5", "6"]]
META = dict(train=dict(tokens=1000), val=dict(tokens=1000, loss_tokens=1000, bytes=3000))
MODEL = SimpleNamespace(parameters=lambda: [])


@pytest.fixture
def open_log(tmp_path):
    """Return a function: iter_num -> the RunLog of a run in tmp_path."""
    config = TrainConfig(out_dir=str(tmp_path), device="cpu", dtype="float32")
    return lambda iter_num: RunLog(config, META, MODEL, iter_num, 4 * iter_num, [])


def write(path, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(rows)


def read(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))


def test_rows_of_later_iterations_are_cut_off(tmp_path, open_log):
    first, val = (["0", "", "", "", "11", "", "", ""], ["10", "", "", "", "9.4", "0.1", "", ""])
    write(tmp_path / "log.csv", [COLUMNS, first, GOOD[0], val, GOOD[1], ["half"]])
    open_log(10).write(iter=20, loss=8.5)
    assert read(tmp_path / "log.csv") == [COLUMNS, first, GOOD[0], ["20", "8.5", "", "", "", "", "", ""]]


def test_a_new_run_begins_a_new_log(tmp_path, open_log):
    write(tmp_path / "log.csv", [COLUMNS, GOOD[0]])
    open_log(0)
    assert read(tmp_path / "log.csv") == [COLUMNS]


@pytest.mark.parametrize("columns", [  # one more than now; fewer, in a different order
    ["iter", "loss", "my_metric", "lr", "grad_norm", "val_loss", "ms", "tok_per_s"], ["val_loss", "loss", "iter"],
])  # fmt: skip
def test_rows_with_different_columns_are_kept(tmp_path, open_log, columns):
    path = tmp_path / "log.csv"
    values = {name: f"{i}.5" for i, name in enumerate(columns)} | {"iter": "10", "val_loss": ""}
    write(path, [columns, [values[name] for name in columns]])
    open_log(10).write(iter=20, loss=8.5)
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert {name: value for name, value in rows[0].items() if value} == {n: v for n, v in values.items() if v}
    assert rows[1]["loss"] == "8.5" and (rows[1].get("my_metric") or "") == ""
    plot_log(path, tmp_path / "loss.png", "a run", 0.4, 10)
    assert (tmp_path / "loss.png").stat().st_size > 5_000


@pytest.mark.parametrize("bad", [
    b"\xff\xfe\x00junk", b"15,letters,0.1,1,,,5,6", b"x" * 200_000, b"-3,1,1,1,,,5,6", b"15,1", b"1e3,1,1,1,,,5,6",
    b"15,1,1,1,,,5,6,7", b'15,"1', b"\x00\x00\x00",
])  # fmt: skip
def test_a_damaged_row_ends_the_log_and_is_noted(tmp_path, open_log, capfd, bad):
    path = tmp_path / "log.csv"
    write(path, [COLUMNS, *GOOD])
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], bad + b"\r\n", *lines[2:]]))
    open_log(20).write(iter=30, loss=7.5)
    assert [row[:2] for row in read(path)] == [["iter", "loss"], ["10", "9.5"], ["30", "7.5"]]
    assert "log.csv has no rows from iteration 11 to 20: the curve has a gap there" in capfd.readouterr().out


def test_missing_rows_are_noted(open_log, capfd):
    """As after a power cut that saved the checkpoint, but not the rows."""
    open_log(25)
    assert "log.csv has no rows from iteration 1 to 20: the curve has a gap there" in capfd.readouterr().out


def test_a_plot_that_cannot_be_written_is_noted(tmp_path, capfd):
    write(tmp_path / "log.csv", [COLUMNS, *GOOD])
    (tmp_path / "loss.png").mkdir()
    plot_log(tmp_path / "log.csv", tmp_path / "loss.png", "a run", 0.4, None)
    assert "loss.png could not be written (Is a directory)" in capfd.readouterr().out
    assert read_log(tmp_path / "none.csv") == []


def test_a_broken_stdout_is_noted(capfd, monkeypatch):
    def fail(*_, file=None, **__):
        if file is None:
            raise BrokenPipeError(32, "Broken pipe")
        file.write("noted")

    monkeypatch.setattr(log, "silence_stdout", lambda: None)
    monkeypatch.setattr("builtins.print", fail)
    say("one")
    assert capfd.readouterr().err == "noted"


def log_and_resume(tracker, folder, monkeypatch):
    """Log rows 10 to 30 and then, like a resume at 20, rows 30 and 40."""
    finish = []
    monkeypatch.setattr(log.atexit, "register", finish.append)
    for iter_num, iters in ((0, (10, 20, 30)), (20, (30, 40))):
        track = open_tracker(tracker, folder, iter_num, {"seed": 7})
        for i in iters:
            track(iter=i, loss=iter_num + i / 100, lr=1e-3)
        finish.pop()()
    return (folder / "tracker_id").read_text()


def test_trackio(tmp_path, monkeypatch, capfd):
    for module in ("utils", "sqlite_storage"):  # both read their folder from the environment, when first imported
        monkeypatch.setattr(f"trackio.{module}.TRACKIO_DIR", tmp_path / "trackio")
    name = log_and_resume("trackio", tmp_path, monkeypatch)
    with sqlite3.connect(tmp_path / "trackio/nanosmollm.db") as db:
        rows = [(step, json.loads(row)["loss"]) for step, row in db.execute("select step, metrics from metrics")]
        assert {run for (run,) in db.execute("select run_name from metrics")} == {name}
        assert [json.loads(row)["seed"] for (row,) in db.execute("select config from configs")] == [7]
    assert rows == [(10, 0.1), (20, 0.2), (30, 0.3), (30, 20.3), (40, 20.4)]

    monkeypatch.setattr("trackio.log", lambda *args, **_: 1 / 0)
    track = open_tracker("trackio", tmp_path, 0, {})
    capfd.readouterr()
    track(iter=1, loss=1.0)
    track(iter=2, loss=1.0)
    assert capfd.readouterr().out == "note: trackio failed (division by zero): the run continues without it\n"
