"""docs/scale.md: its commands train the published sizes, its table is its formula, torch counts the same FLOPs."""

import functools
import re
import shlex
from dataclasses import replace
from pathlib import Path
from configurator import configure

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lib.machine import flops_per_token
from model import PRESETS, SmolLM2
from train import TrainConfig

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/scale.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^(?:python|torchrun).* train\.py .*$", PAGE.replace("\\\n", " "), re.M)
COUNTS = {"135M": 134_515_008, "360M": 361_821_120, "1.7B": 1_711_376_384}
RECIPES = {  # text/pretraining/smollm2/config_smollm2_*.yaml in huggingface/smollm
    "135M": dict(tokens=1_048_576, max_iters=2_000_000, learning_rate=3e-3, wsd_decay_iters=400_000),
    "360M": dict(tokens=1_572_864, max_iters=2_600_000, learning_rate=3e-3, wsd_decay_iters=520_000),
    "1.7B": dict(tokens=2_097_152, max_iters=5_240_000, learning_rate=5e-4, wsd_decay_iters=524_000),
}


@functools.cache
def build(config):
    """The network of a config, without memory for its weights, and their number."""
    with torch.device("meta"):
        model = SmolLM2(config)
    return model, sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name, command", [*zip(["135M"] * 3 + ["360M", "1.7B"], COMMANDS, strict=True)])
def test_the_commands_are_the_published_recipes(name, command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    config = configure(TrainConfig, words[words.index("train.py") + 1 :])
    assert build(config)[1] == build(PRESETS[name])[1] == COUNTS[name]
    sequences = config.batch_size * config.gradient_accumulation_steps
    numbers = vars(config) | {"tokens": sequences * config.block_size}
    assert {key: numbers[key] for key in RECIPES[name]} == RECIPES[name]
    assert (config.schedule, config.warmup_iters, config.min_lr) == ("wsd", 2_000, 0.0)
    assert (config.lr_decay_iters, config.rope_theta, config.block_size) == (config.max_iters, 10_000.0, 2_048)
    nodes, each = (int(*re.findall(rf"--{flag}=(\d+)", command) or [1]) for flag in ("nnodes", "nproc_per_node"))
    assert sequences % (nodes * each * config.batch_size) == 0, "every pass has batch_size sequences"
    assert memory(config, config.batch_size, nodes * each if config.shard else 1) < 0.9 * 80e9


def memory(net, batch_size, R, checkpointing=False):
    """The formula of the page: bytes in one of R processes that share the weights."""
    C, H, D, K = net.hidden_size, net.num_attention_heads, net.head_dim, net.num_key_value_heads
    I, L, V, n = net.intermediate_size, net.num_hidden_layers, net.vocab_size, 2_048 * batch_size  # noqa: E741
    N = build(net)[1]
    s = 10 * C + 6 * H * D + 4 * K * D + 4 * H + 6 * I + 8
    state = 18 * N if R == 1 else 16 * N / R + 4 * V * C + 8 * (N - V * C) / L
    blocks = 4 * C * L + s if checkpointing else L * s
    return state + n * (blocks + 12 * C) + 6 * V * min(n, 4_096) + 4 * V * C


def test_the_table_is_the_formula():
    rows = re.findall(r"^(\S+?)(, sharded by 8)? {2,}([\d.]+) +([\d.]+) +(\S+) +(\S+) +(\S+) +(\S+)$", PAGE, re.M)
    assert len(rows) == 6
    for name, shard, *cells in rows:
        R = 8 if shard else 1
        assert cells[:2] == [f"{memory(PRESETS[name], 8, R, c) / 1e9:.1f}" for c in (False, True)]
        cards = ((80e9, False), (80e9, True), (24e9, False), (24e9, True))
        for cell, (card, checkpointing) in zip(cells[2:], cards, strict=True):
            largest = 0 if cell == "-" else int(cell)
            fits = [memory(PRESETS[name], largest + more, R, checkpointing) <= 0.9 * card for more in (0, 1)]
            assert fits == [largest > 0, False], (name, shard, cell)


@pytest.mark.parametrize("name", PRESETS)
def test_flops_are_those_that_torch_counts(name):
    net, T = replace(PRESETS[name], num_hidden_layers=2), 2_048
    model, N = build(net)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, T, dtype=torch.int64, device="meta")).sum().backward()
    counted = {str(op): flops / T for op, flops in counter.get_flop_counts()["Global"].items()}
    norms = sum(p.numel() for p in model.parameters() if p.dim() == 1)  # 6 N counts them too: no product, and few
    weights, attention = flops_per_token(net, N, T)
    assert counted == {"aten.mm": weights - 6 * norms, "aten.bmm": 2 * attention}  # bmm has the masked half as well
