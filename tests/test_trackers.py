"""trackers.py: the rows arrive at trackio and tensorboard, read back from their files; no failure there ends a run."""

import json
import sqlite3
import sys

import pytest
from networks import refusal

from lib import trackers
from lib.trackers import open_tracker


def log_and_resume(tracker, folder, monkeypatch):
    """Rows 10 to 30, then, as a resume at 20 does, rows 30 and 40."""
    finish = []
    monkeypatch.setattr(trackers.atexit, "register", finish.append)
    for iter_num, iters in ((0, (10, 20, 30)), (20, (30, 40))):
        track = open_tracker(tracker, folder, iter_num, {"seed": 7}, pytest.fail)
        for i in iters:
            track(iter=i, loss=iter_num + i / 100, lr=1e-3)
        finish.pop()()
    return (folder / "tracker_id").read_text()


def test_tensorboard(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    name = log_and_resume("tensorboard", tmp_path, monkeypatch)
    events = EventAccumulator(str(tmp_path / "tensorboard" / name)).Reload()
    found = [(event.step, round(event.value, 3)) for event in events.Scalars("loss")]
    assert found == [(10, 0.1), (20, 0.2), (30, 20.3), (40, 20.4)]


def test_trackio(tmp_path, monkeypatch):
    for module in ("utils", "sqlite_storage"):  # both read their folder from the environment, when first imported
        monkeypatch.setattr(f"trackio.{module}.TRACKIO_DIR", tmp_path / "trackio")
    name = log_and_resume("trackio", tmp_path, monkeypatch)
    with sqlite3.connect(tmp_path / "trackio/nanosmollm.db") as db:
        found = [(step, json.loads(row)["loss"]) for step, row in db.execute("select step, metrics from metrics")]
        assert {run for (run,) in db.execute("select run_name from metrics")} == {name}
        assert [json.loads(row)["seed"] for (row,) in db.execute("select config from configs")] == [7]
    assert found == [(10, 0.1), (20, 0.2), (30, 0.3), (30, 20.3), (40, 20.4)]


def test_a_tracker_that_fails_is_told_once(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", lambda *args: 1 / 0)
    monkeypatch.setattr(trackers.atexit, "register", lambda finish: None)
    track = open_tracker("tensorboard", tmp_path, 0, {}, said.append)
    track(iter=1, loss=1.0)
    track(iter=2, loss=1.0)
    assert said == ["note: tensorboard failed (division by zero): the run continues, without it"]


def test_a_tracker_that_is_not_installed_gets_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert refusal(open_tracker, "wandb", tmp_path, 0, {}, print).endswith(": pip install wandb")
