"""checkpoint.py: files of other versions of this project, and those that hold weights alone."""

import math

import pytest
import torch
from networks import refusal

from lib.checkpoint import VERSION, keep_earlier_run, read_checkpoint, write_checkpoint

WHOLE = dict(model={}, optimizer={}, scheduler={}, iter_num=7, config={"dataset": "text"}, data={})


def test_an_older_file_is_read(tmp_path):
    """Keys that came later have defaults, settings that were renamed have their new names."""
    torch.save(WHOLE | {"config": {"checkpoint_blocks": True}}, tmp_path / "ckpt.pt")
    checkpoint = read_checkpoint(tmp_path / "ckpt.pt")
    assert checkpoint["best_val_loss"] == math.inf and checkpoint["version"] == 1
    assert checkpoint["tokenizer"] == {"official": "base", "sha256": None}
    assert checkpoint["config"] == {"activation_checkpointing": True}


def test_a_newer_file_is_told(tmp_path):
    torch.save(WHOLE | {"version": VERSION + 1, "unknown": 3}, tmp_path / "ckpt.pt")
    message = refusal(read_checkpoint, tmp_path / "ckpt.pt")
    assert f"has layout version {VERSION + 1}" in message and "update this repository" in message


def test_an_unknown_key_is_no_error(tmp_path):
    write_checkpoint(tmp_path / "ckpt.pt", WHOLE | {"note": "mine"})
    assert read_checkpoint(tmp_path / "ckpt.pt")["note"] == "mine"


def test_weights_alone(tmp_path):
    path = tmp_path / "best.pt"
    write_checkpoint(path, {key: WHOLE[key] for key in ("model", "iter_num", "config")})
    assert read_checkpoint(path, resume=False)["iter_num"] == 7
    message = refusal(read_checkpoint, path)
    assert "lacks data, optimizer, scheduler" in message and f"--init_from={path} begins a new run" in message
    torch.save({"step": 3}, path)
    assert "it is not a checkpoint of train.py" in refusal(read_checkpoint, path)


def test_nothing_to_keep(tmp_path):
    keep_earlier_run(tmp_path, pytest.fail)


@pytest.mark.parametrize("content", [b"", b"PK", b"<!DOCTYPE html>"])
def test_what_is_no_checkpoint_at_all(tmp_path, content):
    (tmp_path / "ckpt.pt").write_bytes(content)
    assert "is not a whole checkpoint" in refusal(read_checkpoint, tmp_path / "ckpt.pt")
