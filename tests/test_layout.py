"""The layout: who may import whom, and what training and sampling may not need."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = {
    "train", "sample", "prepare_data", "verify", "discover", "resume_test", "bench", "export", "evaluate",
}  # fmt: skip
MODULES = {path.stem for path in (ROOT / "lib").glob("*.py")} - {"__init__"}
CORE = ("model.py", "train.py", "sample.py", "configurator.py", "lib/batches.py")


def imported(path):
    """The modules that a file imports anywhere in it: ("train", "lib.batches", ...)."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield node.module
            if node.module == "lib":
                yield from (f"lib.{alias.name}" for alias in node.names)


FILES = sorted([*ROOT.glob("*.py"), *(ROOT / "lib").glob("*.py")])


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports(path):
    modules = set(imported(path))
    tops = {module.split(".")[0] for module in modules}
    others = SCRIPTS - {path.stem} - ({"train"} if path.stem == "resume_test" else set())
    assert not tops & others, "a script, or lib, imports a script"
    assert not tops & MODULES - {"gguf", "tokenizer"}, (
        "modules of lib are imported as lib.name"
    )  # gguf is a package as well
    if path.name == "model.py":
        assert tops - sys.stdlib_module_names == {"torch"}
    if path.name == "configurator.py":
        assert modules - sys.stdlib_module_names == {"lib.errors", "lib.limits"}


def test_every_script_is_known_here():
    assert {path.stem for path in ROOT.glob("*.py")} - {"model", "configurator"} <= SCRIPTS


def test_training_and_sampling_import_little():
    """Preparing, training and sampling a checkpoint import no Hub, no GGUF, no plotting before they need it."""
    heavy = {"huggingface_hub", "gguf", "safetensors", "matplotlib", "transformers", "datasets", "pyarrow"}
    code = f"import sys, prepare_data, train, sample; print(sorted({heavy!r} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
    code = "import sys, prepare_data; print('torch' in sys.modules)"  # preparing text takes no two seconds to start
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_ctrl_c_during_the_imports_is_one_line(script, tmp_path):
    for name in ("torch", "numpy"):  # whichever a script imports first
        (tmp_path / f"{name}.py").write_text("raise KeyboardInterrupt")
    env = dict(os.environ, PYTHONPATH=str(tmp_path))
    process = subprocess.run([sys.executable, f"{script}.py"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert (process.returncode, process.stdout, process.stderr) == (130, "", "interrupted\n")


def test_the_core_is_read_in_one_sitting():
    """model.py counts down to "The same, faster": below that line nothing changes what the network computes."""
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in CORE}
    network, faster = texts["model.py"].split("# The same, faster.")
    lines = {name: text.count("\n") for name, text in (texts | {"model.py": network}).items()}
    assert sum(lines.values()) < 1_300, lines
    assert faster.count("\n") < 250


@pytest.mark.parametrize("path", [p for p in FILES if p.parent == ROOT], ids=lambda path: path.name)
def test_every_script_opens_with_how_to_use_it(path):
    text = path.read_text(encoding="utf-8")
    if path.stem in SCRIPTS:
        assert ast.get_docstring(ast.parse(text)).count(f"python {path.name}") >= 2, "commands to copy"
        assert text.rstrip().splitlines()[-2] == 'if __name__ == "__main__":'
