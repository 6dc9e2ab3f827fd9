"""lib/checkpoint.py: any damage is found before a resume, and no code in a file is run."""

import copy
import os
import random
from dataclasses import asdict
from fractions import Fraction

import pytest
import torch
from networks import refusal

from lib.checkpoint import RESUME_KEYS, WEIGHT_KEYS, read_checkpoint, write_checkpoint
from lib.optimizer import build_optimizer, load_run
from lib.weights import find_weights
from model import SmolLM2
from train import TrainConfig

COMPLETE = dict(model={}, optimizer={}, scheduler={}, iter_num=7, sequences_read=28, losses=[], best_val_loss=1.5,
             config={"dataset": "text"}, data={}, chat=False, machine={})  # fmt: skip


def test_unknown_keys_are_allowed_and_best_pt_has_weights_only(tmp_path):
    path = tmp_path / "best.pt"
    write_checkpoint(path, COMPLETE | {"note": "mine"})
    assert read_checkpoint(path)["note"] == "mine" and COMPLETE.keys() == RESUME_KEYS
    write_checkpoint(path, {key: COMPLETE[key] for key in WEIGHT_KEYS})
    assert read_checkpoint(path, resume=False)["iter_num"] == 7
    assert f"has no optimizer: begin a new run with its weights, --init_from={path}" in refusal(read_checkpoint, path)


@pytest.mark.parametrize("spoil, words", [
    (lambda path: path.write_bytes(b""), "cannot be used"), (lambda path: path.write_bytes(b"PK"), "cannot be used"),
    (lambda path: path.write_bytes(b"<!DOCTYPE html>"), "cannot be used"),
    (os.mkfifo, "there is no checkpoint"), (os.mkdir, "there is no checkpoint"),
    (lambda path: torch.save({"step": 3}, path), "it has no version"),
    (lambda path: torch.save([3], path), "cannot be used"),
    (lambda path: torch.save({"version": 3}, path), "it has no best_val_loss, chat, config, data"),
    (lambda path: torch.save(COMPLETE | {"version": 99}, path), "it has layout 99, and this code reads layout"),
    (lambda path: torch.save(COMPLETE | {"model": Fraction(1, 2)}, path), "plain values and could run code"),
])  # fmt: skip
def test_other_files_get_one_line(tmp_path, spoil, words):
    spoil(tmp_path / "ckpt.pt")
    message = refusal(read_checkpoint, tmp_path / "ckpt.pt")
    assert words in message and "weights_only" not in message


@pytest.fixture(scope="module")
def state():
    """Return (config, checkpoint) after one update of a small model."""
    torch.manual_seed(0)
    config = TrainConfig(vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=1, head_dim=16)  # fmt: skip
    model = SmolLM2(config)
    optimizer, scheduler = build_optimizer(model, config)
    idx = torch.arange(40)[None]
    model(idx, idx).backward()
    optimizer.step()
    states = dict(model=model, optimizer=optimizer, scheduler=scheduler)
    states = {name: part.state_dict() for name, part in states.items()}
    return config, COMPLETE | states | dict(config=asdict(config), iter_num=1)


def test_a_flipped_bit_is_found(state, tmp_path):
    """In the plain values, in any tensor, anywhere: the file is refused, or its contents are unchanged."""
    path, damaged = tmp_path / "ckpt.pt", tmp_path / "damaged.pt"
    write_checkpoint(path, state[1])
    content = path.read_bytes()
    assert "damaged" not in str(find_weights(str(path)).read().keys())
    generator = random.Random(0)
    bits = [generator.randrange(8 * len(content)) for _ in range(40)]
    for tensor in [*state[1]["model"].values(), state[1]["optimizer"]["state"][3]["exp_avg"]]:
        values = tensor.numpy().tobytes()
        bits.append(8 * content.index(values) + generator.randrange(8 * len(values)))
    for bit in bits:
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        damaged.write_bytes(flipped)
        try:
            assert str(read_checkpoint(damaged)) == str(state[1] | dict(version=3)), bit
        except SystemExit as stop:
            message = str(stop.code)
            assert f"{damaged} cannot be used" in message
    assert "the CRC differs" in message and "the CRC differs" in refusal(find_weights(str(damaged)).read)


@pytest.mark.parametrize("change", [
    lambda c: c["optimizer"]["state"][2].update(exp_avg=torch.zeros(1)),  # corrupted the heap in fused AdamW
    lambda c: c["optimizer"]["state"][2].update(exp_avg=torch.zeros(())),
    lambda c: c["optimizer"]["state"].pop(2),
    lambda c: c["optimizer"]["state"][2].update(step=torch.zeros(3)),
    lambda c: c["optimizer"].pop("param_groups"),
    lambda c: c["optimizer"]["param_groups"][0]["params"].pop(),
])  # fmt: skip
def test_moments_with_wrong_shapes_are_refused_before_use(state, change):
    config, checkpoint = state
    load(checkpoint, config)
    checkpoint = copy.deepcopy(checkpoint)
    change(checkpoint)
    assert "/ckpt.pt cannot be used (" in refusal(load, checkpoint, config)


def load(checkpoint, config):
    model = SmolLM2(config)
    load_run(checkpoint, model, *build_optimizer(model, config), config)
