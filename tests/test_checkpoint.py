"""checkpoint.py: files of other versions of this project, and those that hold weights alone."""

import copy
import math
import os
import random
from dataclasses import asdict
from fractions import Fraction

import pytest
import torch
from networks import refusal

from lib.checkpoint import VERSION, check_state, checksum, read_checkpoint, write_checkpoint
from lib.weights import find_weights
from model import ModelConfig, SmolLM2

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


@pytest.mark.parametrize("content", [b"", b"PK", b"<!DOCTYPE html>"])
def test_what_is_no_checkpoint_at_all(tmp_path, content):
    (tmp_path / "ckpt.pt").write_bytes(content)
    assert "is not a whole checkpoint" in refusal(read_checkpoint, tmp_path / "ckpt.pt")


def test_a_fifo_is_no_checkpoint(tmp_path):
    os.mkfifo(tmp_path / "ckpt.pt")
    assert "there is no checkpoint" in refusal(read_checkpoint, tmp_path / "ckpt.pt")


def test_torchs_advice_to_run_the_file_is_not_passed_on(tmp_path):
    torch.save(WHOLE | {"model": {"a": Fraction(1, 2)}}, tmp_path / "ckpt.pt")
    message = refusal(read_checkpoint, tmp_path / "ckpt.pt")
    assert "it holds more than tensors and plain values" in message and "False" not in message


@pytest.mark.parametrize("key, value", [
    ("iter_num", "7"), ("iter_num", 7.0), ("iter_num", -1), ("iter_num", True), ("scheduler", []), ("config", None),
    ("model", [1]), ("optimizer", 3), ("data", ""), ("version", "1"), ("best_val_loss", "low"), ("machine", 2),
    ("scheduler", {"last_epoch": "x"}),
])  # fmt: skip
def test_entries_of_the_wrong_type(tmp_path, key, value):
    torch.save(WHOLE | {key: value}, tmp_path / "ckpt.pt")
    assert f"{tmp_path}/ckpt.pt" in refusal(read_checkpoint, tmp_path / "ckpt.pt")


# ---- A network's checkpoint, damaged


@pytest.fixture(scope="module")
def state():
    """(model, optimizer, checkpoint) after one update of a small network."""
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=1, head_dim=16)  # fmt: skip
    model = SmolLM2(config)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    idx = torch.arange(40)[None]
    model(idx, idx).backward()
    optimizer.step()
    checkpoint = WHOLE | dict(model=model.state_dict(), optimizer=optimizer.state_dict(), config=asdict(config))
    return model, optimizer, checkpoint


def test_a_flipped_bit_is_found_and_named(state, tmp_path):
    path, damaged = tmp_path / "ckpt.pt", tmp_path / "damaged.pt"
    write_checkpoint(path, state[2])
    content = path.read_bytes()
    generator = random.Random(0)
    for name, tensor in [*state[2]["model"].items(), ("exp_avg", state[2]["optimizer"]["state"][3]["exp_avg"])]:
        values = tensor.numpy().tobytes()
        start = content.index(values)
        spoilt = bytearray(content)
        spoilt[start + generator.randrange(len(values))] ^= 1 << generator.randrange(8)
        damaged.write_bytes(spoilt)
        assert f"{name} is damaged, its checksum differs" in refusal(read_checkpoint, damaged)
    assert "is damaged" not in str(find_weights(str(path)).read().keys())


def test_a_changed_setting_is_found(state, tmp_path):
    """A flipped bit in the plain values, which are pickled apart from the tensors."""
    write_checkpoint(tmp_path / "ckpt.pt", state[2])
    checkpoint = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    checkpoint["config"]["rope_theta"] = 100_000.00000000001
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    for mmap in (False, True):
        assert "its settings or numbers are damaged" in refusal(read_checkpoint, tmp_path / "ckpt.pt", mmap)


def test_a_zeroed_range_is_found(state, tmp_path):
    write_checkpoint(tmp_path / "ckpt.pt", state[2])
    spoilt = bytearray((tmp_path / "ckpt.pt").read_bytes())
    start = spoilt.index(state[2]["model"]["model.embed_tokens.weight"].numpy().tobytes())
    spoilt[start + 4_096 : start + 8_192] = bytes(4_096)
    (tmp_path / "ckpt.pt").write_bytes(spoilt)
    assert "embed_tokens.weight is damaged" in refusal(read_checkpoint, tmp_path / "ckpt.pt")
    assert "embed_tokens.weight is damaged" in refusal(find_weights(str(tmp_path / "ckpt.pt")).read)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_a_checksum_sees_order_too(dtype):
    tensor = torch.arange(100_003).to(dtype)
    assert checksum(tensor) == checksum(tensor.clone())
    assert checksum(tensor) != checksum(tensor.roll(50_000)) != checksum(tensor.flip(0))
    assert checksum(torch.zeros(())) != checksum(torch.ones(()))


@pytest.mark.parametrize("change", [
    lambda c: c["optimizer"]["state"][2].update(exp_avg=torch.zeros(1)),  # corrupted the heap in fused AdamW
    lambda c: c["optimizer"]["state"][2].update(exp_avg_sq=c["optimizer"]["state"][2]["exp_avg_sq"].double()),
    lambda c: c["optimizer"]["state"].pop(2),
    lambda c: c["optimizer"]["state"].update({99: c["optimizer"]["state"][2]}),
    lambda c: c["optimizer"]["state"][2].update(step=torch.zeros(3)),
    lambda c: c["optimizer"].pop("param_groups"),
    lambda c: c["optimizer"]["param_groups"][0]["params"].pop(),
    lambda c: c["model"].update({"model.norm.weight": torch.ones(63)}),
    lambda c: c["model"].pop("model.norm.weight"),
    lambda c: c["model"].update({"renamed": c["model"].pop("model.norm.weight")}),
])  # fmt: skip
def test_a_state_of_another_shape_is_refused_before_use(state, change):
    model, optimizer, checkpoint = state
    check_state("ckpt.pt", checkpoint, model, optimizer)
    checkpoint = copy.deepcopy(checkpoint)
    change(checkpoint)
    assert "ckpt.pt: " in refusal(check_state, "ckpt.pt", checkpoint, model, optimizer)
