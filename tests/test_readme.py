"""README.md: its commands are commands, its files are files, and the configs are configs."""

import importlib
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from configurator import configure
from model import PRESETS, parameter_table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```\n(.*?)^```", README, re.M | re.S)
COMMANDS = sorted(
    {
        line.split("#")[0].strip()
        for block in BLOCKS
        for line in block.splitlines()
        if re.match(r"(python \w+\.py|torchrun )", line)
    }
    | set(re.findall(r"`(python \w+\.py[^`]*)`", README))
)


def settings_of(script):
    """The dataclass of a script's settings."""
    module = importlib.import_module(Path(script).stem)
    (cls,) = [
        value for name, value in vars(module).items() if name.endswith("Config") and value.__module__ == module.__name__
    ]
    return cls


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command.replace("=N", "=9"))
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    assert configure(settings_of(words[script]), words[script + 1 :])


def test_there_are_commands():
    assert len(COMMANDS) > 8


def test_files():
    ours = README.replace(README[README.index("## Beside others") : README.index("## Questions")], "")
    named = re.findall(r"`([\w./-]+(?:\.py|\.md|\.csv|\.png|\.txt|/))`", ours) + re.findall(r"\]\(([\w./-]+)\)", ours)
    assert len(named) > 25
    for name in named:
        if not name.startswith(("out/", "data/")):  # what the commands make
            assert (ROOT / name).exists(), name


def test_parameter_table_is_as_printed():
    assert parameter_table(PRESETS["135M"]) in README


SHOWN = re.findall(r"`((?:awk|cat|grep) [^`]*assets/[^`]*)`[^`]*\n```\n(.*?)```", README, re.S)


@pytest.mark.parametrize("command, output", SHOWN)
def test_the_two_runs_are_as_printed(command, output):
    """What README shows of assets/ is what its command prints."""
    printed = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert [line.rstrip() for line in output.splitlines()] == [line.rstrip() for line in printed.splitlines()]


def test_all_of_the_two_runs_is_shown():
    assert len(SHOWN) == 4


def test_every_config_file_is_one(monkeypatch):
    monkeypatch.chdir(ROOT)
    for path in sorted(Path("config").glob("*.py")):
        config = configure(settings_of("train.py"), [str(path)])
        assert config.max_iters > 0, path


def test_the_published_recipe():
    """config/smollm2_135m.py has the numbers of the published training YAML."""
    config = configure(settings_of("train.py"), [str(ROOT / "config/smollm2_135m.py")])
    assert config.batch_size * config.gradient_accumulation_steps * config.block_size == 1_048_576
    assert (config.max_iters, config.learning_rate, config.schedule) == (2_000_000, 3e-3, "wsd")
    assert (config.warmup_iters, config.wsd_decay_iters, config.min_lr) == (2_000, 400_000, 0.0)
