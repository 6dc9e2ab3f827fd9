"""Test configurator.py: the precedence of settings, and its error messages."""

import dataclasses
import importlib
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal
from configurator import OUR_NAMES, configure, differences, start

import pytest

import prepare_data
from bench import BenchConfig
from evaluate import EvaluateConfig
from export import ExportConfig
from lib.tasks import TASKS
from sample import SampleConfig
from train import TrainConfig
from verify import VerifyConfig

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Base:
    """Settings that Config inherits."""

    out_dir: str = "out"  # where everything goes
    max_iters: int = 5_000  # number of updates


@dataclass(frozen=True)
class Config(Base):
    """Do what the script does."""

    learning_rate: float = 3e-4  # at the peak
    compile: bool = False  # compile each block
    plot: bool = True  # draw
    top_k: int | None = None  # keep the k most likely
    prompt: str | None = None  # None is a string here
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # arithmetic

    def __post_init__(self):
        if self.max_iters == 13:
            raise ValueError("max_iters 13 contradicts all else")


@pytest.fixture
def config_file(tmp_path):
    """Return a function that writes a config file and returns its path."""
    path = tmp_path / "run.py"
    return lambda text: path.write_text(text) and str(path)


def changed(*argv, saved=None):
    """Return the settings that differ from their defaults."""
    return dict(asdict(configure(Config, list(argv), saved)).items() - asdict(Config()).items())


def assert_rejected(argv, words, capsys, cls=Config, saved=lambda config: pytest.fail("nothing may be touched")):
    """Assert that configure() exits with code 2 and one line with these words, before it reads the checkpoint."""
    with pytest.raises(SystemExit) as stop:
        configure(cls, argv, saved)
    printed = capsys.readouterr()
    assert stop.value.code == 2 and printed.out == ""
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1, printed
    for word in words:
        assert word in printed.err, (word, printed.err)


def test_precedence(config_file, monkeypatch):
    """defaults < checkpoint < config file < flags, in any order on the command line"""
    path = config_file("max_iters = 20\nlearning_rate = 0.2\n")
    first_readings = []

    def saved(config):
        first_readings.append(config)
        return {"max_iters": 10, "learning_rate": 0.1, "top_k": 10}

    assert changed(saved=saved) == {"max_iters": 10, "learning_rate": 0.1, "top_k": 10}
    assert changed(path) == {"max_iters": 20, "learning_rate": 0.2}
    assert changed(path, saved=saved) == {"max_iters": 20, "learning_rate": 0.2, "top_k": 10}
    expected = {"max_iters": 20, "learning_rate": 0.3, "top_k": 10}
    assert changed(path, "--learning_rate=0.3", saved=saved) == expected
    assert changed("--learning_rate=0.3", path, saved=saved) == expected
    first = first_readings[-1]
    assert (first.max_iters, first.learning_rate) == (20, 0.3)  # the checkpoint's reader sees file and flags
    assert changed("--top_k=None", saved=saved) == {"max_iters": 10, "learning_rate": 0.1}
    assert changed("--max_iters=1", "--max_iters=2") == {"max_iters": 2}
    monkeypatch.setattr(sys, "argv", ["train.py", "--max_iters=8"])
    assert configure(Config).max_iters == 8


@pytest.mark.parametrize("flag, setting", [
    ("--max-iters=5_050", {"max_iters": 5_050}), ("--top_k=-1", {"top_k": -1}), ("--top_k=None", {}),
    ("--learning_rate=1", {"learning_rate": 1.0}), ("--compile=True", {"compile": True}), ("--top_k=5", {"top_k": 5}),
    ("--dtype=bfloat16", {"dtype": "bfloat16"}), ("--out_dir=", {"out_dir": ""}),
    ("--prompt=None", {"prompt": "None"}),
    ("--out_dir=--help me=--c", {"out_dir": "--help me=--c"}), ("--out_dir=None", {"out_dir": "None"}),
    ("--out_dir=~/a", {"out_dir": os.path.expanduser("~/a")}),
])  # fmt: skip
def test_a_flag_is_read_as_its_type(flag, setting):
    assert changed(flag) == setting
    name, value = flag.split("=", 1)
    if value and not value.startswith("--"):
        assert changed(name, value) == setting  # `--name value` is the same
    for key in setting:
        assert type(getattr(configure(Config, [flag]), key)) is type(setting[key])


def test_a_switch_needs_no_value(config_file):
    path = config_file("top_k = 5\n")
    for argv in (["--compile"], ["--compile", "True"], ["--compile", "--plot"], ["--no-compile", "--compile"]):
        assert changed(*argv) == {"compile": True}
    assert changed("--compile", path) == {"compile": True, "top_k": 5}
    for argv in (["--no-plot"], ["--no_plot"], ["--plot=False"], ["--plot", "False"], ["--plot", "--no-plot"]):
        assert changed(*argv) == {"plot": False}
    assert changed("--no-plot", path) == {"plot": False, "top_k": 5}


def test_a_config_file_has_values_and_arithmetic(config_file):
    text = """
'''A docstring.'''
max_iters = 25
max_iters = max_iters * 2 * (3 + 1)   # arithmetic on names above
learning_rate = 1e-3 / -2 + 3 // 2
compile = True
top_k = None
out_dir = "out/a b"
dtype = 'float32'
"""
    assert changed(config_file("\ufeff" + text)) == {  # editors on Windows write a byte-order mark
        "max_iters": 200, "learning_rate": 0.9995, "compile": True, "out_dir": "out/a b", "dtype": "float32",
    }  # fmt: skip


@pytest.mark.parametrize("argv, words", [
    (["--maxiters=3"], ["command line", "maxiters", "did you mean max_iters?"]),
    (["--zzz=3"], ["zzz", "--help"]), (["--no-max_iters"], ["no setting is named no_max_iters"]),
    (["--max_iters=many"], ["command line", "max_iters=many", "int", "5000"]),
    (["--max_iters=1\n2"], ["max_iters", "int"]), (["--learning_rate=fast"], ["learning_rate=fast", "float", "0.0003"]),
    (["--compile=maybe"], ["compile=maybe", "bool", "False"]), (["--top_k=few"], ["top_k=few", "int | None"]),
    (["--dtype=float64"], ["dtype=float64", "'auto', 'float32', 'bfloat16'"]),
    (["--max_iters", "--compile=True"], ["--max_iters has no value", "--max_iters=VALUE"]),
    (["max_iters=3"], ["config file max_iters=3: No such file or directory"]),
])  # fmt: skip
def test_a_wrong_command(argv, words, capsys):
    assert_rejected(argv, words, capsys)


@pytest.mark.parametrize("argv, words", [
    (["--max_iters=13"], ["max_iters 13 contradicts all else"]),
    (["--learning_rate=nan"], ["learning_rate is nan: it must be a number from 0 to 100"]),
    (["--top_k=-2"], ["top_k is -2: it must be a whole number from -1 to 2,147,483,648"]),
])  # fmt: skip
def test_settings_that_do_not_fit(argv, words, capsys):
    """They are checked together with the saved ones: they may contradict a default that the checkpoint overrides."""
    assert_rejected(argv, words, capsys, saved=lambda config: {})


@pytest.mark.parametrize("text, words", [
    *((f"top_k = 1\n{line}\n", ["run.py, line 2"]) for line in (
        "import os", "open('exploded', 'w')", "max_iters = len('abc')", "max_iters = unknown", "max_iters = [1][0]",
        "max_iters += 1", "max_iters, top_k = 1, 2", "max_iters = 2 ** 9", "def f(): pass", "max_iters = f'{open}'",
    )),
    ("maxiters = 3\n", ["run.py", "maxiters", "did you mean max_iters?"]),
    ("max_iters = [1, 2]\n", ["run.py, line 1", "[1, 2]", "neither a value nor arithmetic"]),
    ("\nmax_iters = \n", ["run.py, line 2", "invalid syntax"]),
    ("max_iters = 1 / 0\n", ["run.py, line 1", "division by zero"]),
    ("max_iters = 'a' - 1\n", ["run.py, line 1", "unsupported operand"]), ("\0", ["run.py", "null bytes"]),
    ("max_iters = " + 10_000 * "(" + "1" + 10_000 * ")", ["run.py"]),
])  # fmt: skip
def test_a_wrong_config_file(text, words, config_file, capsys, tmp_path, monkeypatch):
    """It is rejected, and no code in it runs."""
    monkeypatch.chdir(tmp_path)
    assert_rejected([config_file(text)], words, capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["run.py"]


@pytest.mark.parametrize("script, flags, words", [
    (SampleConfig, ["--system=Hi"], "system has no effect without --chat: leave it out"),
    (SampleConfig, ["--chat", "--num_samples=2"], "num_samples has no effect in a conversation without --prompt"),
    (SampleConfig, ["--init_from=base", "--out_dir=a"], "out_dir has no effect without --init_from=resume"),
    (EvaluateConfig, ["--init_from=base", "--out_dir=a"], "out_dir has no effect without --init_from=resume"),
    (EvaluateConfig, ["--text=a", "--data_dir=b"], "data_dir has no effect without --dataset"),
    (EvaluateConfig, ["--items=a", "--stride=3"], "stride has no effect without --dataset or --text"),
    (ExportConfig, ["--init_from=base", "--to=a", "--out_dir=b"], "out_dir has no effect without --init_from=resume"),
    (VerifyConfig, ["--quick", "--tokens=512"], "tokens has no effect with --quick"),
    (BenchConfig, ["--quick", "--repeats=2"], "repeats has no effect with --quick"),
])  # fmt: skip
def test_a_setting_without_effect_is_named(script, flags, words, capsys):
    assert_rejected(flags, [words], capsys, script, saved=None)
    fields = {field.name: str(field.default) for field in dataclasses.fields(script)}
    name = words.split()[0]
    assert configure(script, [flag for flag in flags if name not in flag] + [f"--{name}={fields[name]}"])  # the default


def test_a_setting_with_an_effect_is_accepted():
    for flags in ("--chat --system=Hi", "--chat --prompt=Hi --num_samples=2", "--num_samples=2 --out_dir=a"):
        assert configure(SampleConfig, flags.split())


@pytest.mark.parametrize("flags, words", [
    (["--dataset=a.txt", "--split=test"], "split has no effect without a dataset of the Hub"),
    (["--subset=a"], "subset has no effect without a dataset of the Hub"),
    (["--dataset=a.txt", "--suffixes=.c"], "suffixes has no effect without a folder or a glob"),
    (["--dataset=a.txt", "--text_column=body"], "text_column has no effect without rows"),
    (["--dataset=a.txt", "--block_size=99"], "block_size has no effect without conversations"),
])  # fmt: skip
def test_a_setting_without_effect_on_this_text(flags, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("text")
    with pytest.raises(SystemExit, match="2"):
        prepare_data.main(configure(prepare_data.PrepareConfig, flags))
    assert capsys.readouterr().err == f"error: {words}: leave it out\n"
    assert not Path("data").exists()


def test_other_names_suggest_ours(capsys):
    for theirs, ours in OUR_NAMES.items():
        script = SampleConfig if ours == "prompt" else TrainConfig
        assert_rejected([f"--{theirs}=3"], [theirs, f"did you mean {ours}?"], capsys, script)


@pytest.mark.parametrize("name", ["bench", "discover", "evaluate", "export", "prepare_data", "resume_test", "sample",
                                  "train", "verify"])  # fmt: skip
def test_help_lists_every_setting_without_torch(name, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError")
    env = dict(os.environ, PYTHONPATH=str(tmp_path))
    argv = [sys.executable, f"{name}.py", "--max_iters=many", "-h" if name == "train" else "--help"]
    lines = subprocess.run(argv, env=env, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    script = importlib.import_module(name)
    (cls,) = (value for value in vars(script).values() if dataclasses.is_dataclass(value)
              and value.__module__ == name and value.__name__.endswith("Config"))  # fmt: skip
    assert lines[2] == cls.__doc__
    fields = dataclasses.fields(cls)
    for field, heading, comment in zip(fields, lines[4::2], lines[5::2], strict=True):
        setting, default = heading.split(", default ")
        assert setting.split()[0] == f"--{field.name}" and eval(default) == field.default and len(comment) > 8
    if name == "train":  # one inherited, one of its own
        assert lines[6:8] == ["  --hidden_size  int, default 576", "      width of the residual stream"]
        assert '  --dtype  Literal["auto", "float32", "bfloat16"], default "auto"' in lines
    if name == "evaluate":
        assert all(task in " ".join(lines) for task in TASKS)


@pytest.mark.parametrize("running, user, count", [
    ("1 1 1 1 1", None, None),
    ("3 2 1 2 2", None, None),  # for a moment
    ("3 2 2 2 2", None, "1000"),
    ("3 2 2 2 2", "7", "7"),
])  # fmt: skip
def test_threads_sleep_soon_next_to_a_busy_program(running, user, count, tmp_path, monkeypatch):
    """Count the running programs as /proc/loadavg does, this one included, on a machine of two cores."""
    counts = iter(running.split())
    monkeypatch.setattr(Path, "read_text", lambda path, **_: f"0.50 0.75 1.00 {next(counts)}/99 1234"
                        if str(path) == "/proc/loadavg" else "no settings")  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setenv("GOMP_SPINCOUNT", user or "")
    if not user:
        monkeypatch.delenv("GOMP_SPINCOUNT")
    start(tmp_path / "train.py")
    assert os.environ.get("GOMP_SPINCOUNT") == count


def test_output_that_is_not_utf8_is_no_error():
    """As on Windows, if it goes to a file."""
    script = "from train import TrainConfig, configure; configure(TrainConfig, []); print('✓', 'é')"
    env = dict(os.environ, PYTHONIOENCODING="latin-1")
    result = subprocess.run([sys.executable, "-c", script], env=env, cwd=ROOT, capture_output=True)
    assert (result.returncode, result.stdout.split()) == (0, [b"?", b"\xe9"]), result.stderr


def test_differences():
    old = asdict(Config())
    new = old | {"max_iters": 5_050, "top_k": 3, "new": 1}
    assert differences(old, old) == [] and differences(old, new) == ["max_iters: 5000 -> 5050", "top_k: None -> 3"]
