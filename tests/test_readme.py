"""README.md: its commands are commands, its files are files, and the configs are configs."""

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path
from configurator import configure

import pytest

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
    named = re.findall(r"`([\w./-]+(?:\.py|\.md|\.csv|\.png|\.txt|/))`", README)
    named += re.findall(r"\]\(([\w./-]+)\)", README)
    assert len(named) > 25
    for name in named:
        if not name.startswith(("out/", "data/")):  # what the commands make
            assert (ROOT / name).exists(), name


def test_it_is_short():
    assert len(README.splitlines()) <= 200


def test_parameter_table_is_as_printed():
    printed = subprocess.run([sys.executable, "model.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert printed == parameter_table(PRESETS["135M"]) + "\n" and f"```\n{printed}```" in README


# A paragraph that links to whole outputs in assets/, and the lines of them that README quotes below it.
QUOTED = [
    (re.findall(r"\]\((assets/[\w.-]+\.txt)\)", paragraph), block.splitlines())
    for paragraph, block in re.findall(r"((?:^[^`\n][^\n]*\n|^`[^`\n][^\n]*\n)+)\n```\n(.*?)^```", README, re.M | re.S)
    if "(assets/" in paragraph
]


@pytest.mark.parametrize("files, lines", QUOTED, ids=[" ".join(files) for files, _ in QUOTED])
def test_what_it_quotes_was_printed(files, lines):
    """Every quoted line stands in one of the files, and in the same order."""
    printed = [line.rstrip() for file in files for line in (ROOT / file).read_text(encoding="utf-8").splitlines()]
    for line in lines:
        assert line in printed, line
        printed = printed[printed.index(line) + 1 :]


def test_the_quotes_are_found():
    names = ("verify", "first-run-stdout", "second-run-stdout", "resume_test", "finetune")
    assert {file for files, _ in QUOTED for file in files} == {f"assets/{name}.txt" for name in names}


def test_the_line_count():
    (files,) = re.findall(r"in this order, about [\d,]+ lines: (.*)\.$", README, re.M)
    lines = sum((ROOT / name).read_text(encoding="utf-8").count("\n") for name in re.findall(r"`(.*?)`", files))
    assert f"in this order, about {round(lines, -2):,} lines: " in README


def test_every_asset_is_accounted_for():
    """assets/README.md names the command that printed each file; samples.txt is what its command prints."""
    text = (ROOT / "assets/README.md").read_text(encoding="utf-8")
    for path in (ROOT / "assets").iterdir():
        assert path.name == "README.md" or path.name in text, path
    (command,) = re.findall(r"^    (awk .*\n.*)$", text, re.M)
    printed = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    samples = (ROOT / "assets/samples.txt").read_text(encoding="utf-8")
    assert [line.rstrip() for line in printed.splitlines()] == samples.splitlines()


def test_every_config_file_is_one(monkeypatch):
    monkeypatch.chdir(ROOT)
    for path in sorted(Path("config").glob("*.py")):
        config = configure(settings_of("train.py"), [str(path)])
        assert config.max_iters > 0, path
