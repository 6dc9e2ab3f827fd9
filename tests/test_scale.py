"""docs/scale.md: its tables are what docs/scale.py prints, its commands are commands, torch counts the same FLOPs."""

import importlib.util
import re
import shlex
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from configurator import configure
from export import ExportConfig
from lib.machine import flops_per_token
from model import PRESETS, ModelConfig, SmolLM2
from prepare_data import PrepareConfig
from train import TrainConfig

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("scale", ROOT / "docs/scale.py")
scale = importlib.util.module_from_spec(spec)
spec.loader.exec_module(scale)
BLOCKS = re.findall(r"^```\n(.*?)\n```$", (ROOT / "docs/scale.md").read_text(encoding="utf-8"), re.M | re.S)


def test_the_tables_are_as_printed():
    printed = list(scale.tables(scale.ScaleConfig()))
    assert [block for block in BLOCKS if block in printed] == printed


def test_parameters_are_the_design_s():
    counts = {name: scale.parameters(net)[0] for name, net in PRESETS.items()}
    assert counts == {"135M": 134_515_008, "360M": 361_821_120, "1.7B": 1_711_376_384}


@pytest.mark.parametrize("name", PRESETS)
def test_flops_are_those_that_torch_counts(name):
    net = replace(PRESETS[name], num_hidden_layers=2)
    with torch.device("meta"):  # shapes without memory
        model, idx = SmolLM2(net), torch.zeros(1, scale.T, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(idx).sum().backward()
    counted = {str(op): flops / scale.T for op, flops in counter.get_flop_counts()["Global"].items()}
    norms = sum(p.numel() for p in model.parameters() if p.dim() == 1)  # 6 N counts them too: no product, and few
    weights, attention = flops_per_token(net, scale.parameters(net)[0], scale.T)
    assert counted == {"aten.mm": weights - 6 * norms, "aten.bmm": 2 * attention}  # bmm has the masked half as well


SCRIPTS = {"train.py": TrainConfig, "export.py": ExportConfig, "prepare_data.py": PrepareConfig}
COMMANDS = [
    line
    for block in BLOCKS
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith(("python", "torchrun")) and SCRIPTS.keys() & set(line.split())
]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command, comments=True)
    script = next(word for word in words if word in SCRIPTS)
    config = configure(SCRIPTS[script], words[words.index(script) + 1 :])
    if "config/" in command:  # the recipe's own batch, which the processes can share
        nodes, each = (int(*re.findall(rf"--{flag}=(\d+)", command) or [1]) for flag in ("nnodes", "nproc_per_node"))
        (path,) = [word for word in words if word.startswith("config/")]
        published = configure(TrainConfig, [path])
        sequences = config.batch_size * config.gradient_accumulation_steps
        assert sequences == published.batch_size * published.gradient_accumulation_steps
        assert sequences % (nodes * each * config.batch_size) == 0, "every pass has batch_size sequences"


def test_there_is_a_command_for_each():
    assert len([command for command in COMMANDS if "config/" in command]) == 9


@pytest.mark.parametrize(
    "name, tokens, iterations, learning_rate, decay",
    [
        ("135M", 1_048_576, 2_000_000, 3e-3, 400_000),
        ("360M", 1_572_864, 2_600_000, 3e-3, 520_000),
        ("1.7B", 2_097_152, 5_240_000, 5e-4, 524_000),
    ],
)
def test_the_published_recipes(name, tokens, iterations, learning_rate, decay):
    """The numbers of text/pretraining/smollm2/config_smollm2_*.yaml in huggingface/smollm, and the preset's shape."""
    config = configure(TrainConfig, [str(ROOT / scale.recipe(name)[0])])
    assert config.batch_size * config.gradient_accumulation_steps * config.block_size == tokens
    assert (config.max_iters, config.lr_decay_iters, config.wsd_decay_iters) == (iterations, iterations, decay)
    assert (config.learning_rate, config.warmup_iters, config.min_lr) == (learning_rate, 2_000, 0.0)
    stage = {"rope_theta", "max_position_embeddings", "initializer_range"}  # of the first stage, not of the release
    for field in {field.name for field in fields(ModelConfig)} - stage:
        assert getattr(config, field) == getattr(PRESETS[name], field), field
    assert (config.rope_theta, config.max_position_embeddings) == (10_000.0, 2_048)
