"""Test the layout: which modules may import which, and which imports training and sampling do without."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = {path.stem for path in ROOT.glob("*.py")} - {"model", "configurator"}
MODULES = {path.stem for path in (ROOT / "lib").glob("*.py")} - {"__init__"}
CORE = ("model.py", "train.py", "sample.py", "configurator.py", "lib/batches.py")


def list_imports(path):
    """Yield the modules that a file imports anywhere in it: "train", "lib.batches", ..."""
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
    modules = set(list_imports(path))
    tops = {module.split(".")[0] for module in modules}
    allowed = {path.stem, "train"} if path.stem == "resume_test" else {path.stem}
    assert not tops & SCRIPTS - allowed, "a script, or lib, imports a script"
    assert not tops & MODULES - {"gguf"}, "import modules of lib as lib.name"  # gguf is also a package
    if path.name == "model.py":
        assert tops - sys.stdlib_module_names == {"torch"}
    if path.name == "configurator.py":
        assert modules - sys.stdlib_module_names == {"lib.errors", "lib.limits"}


@pytest.mark.parametrize("scripts, heavy", [
    ("prepare_data, train, sample", "huggingface_hub gguf safetensors matplotlib transformers datasets pyarrow"),
    ("train, sample, evaluate, verify", "torch._dynamo torch._inductor"),
    ("prepare_data", "torch"),
])  # fmt: skip
def test_heavy_packages_are_imported_only_when_needed(scripts, heavy):
    code = f"import sys, {scripts}; print(set({heavy.split()}) & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_ctrl_c_during_the_imports_is_one_line(script, tmp_path):
    for name in ("torch", "numpy"):  # whichever a script imports first
        (tmp_path / f"{name}.py").write_text("raise KeyboardInterrupt")
    env = dict(os.environ, PYTHONPATH=str(tmp_path))
    first_line = "" if script == "prepare_data" else "loading torch\n"  # it needs no torch
    process = subprocess.run([sys.executable, f"{script}.py"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert (process.returncode, process.stdout, process.stderr) == (130, first_line, "interrupted\n")


def test_importing_the_model_changes_no_setting_of_torch():
    code = "import torch, torch._inductor.config as c; a = c.cpp.march; import model; print(a == c.cpp.march)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "True\n"


def test_the_core_is_read_in_one_sitting():
    """model.py counts down to "The same, faster": the lines below do not change what the model computes."""
    sources = {name: (ROOT / name).read_text(encoding="utf-8") for name in CORE}
    model, faster = sources["model.py"].split("# The same, faster.")
    lines = {name: source.count("\n") for name, source in (sources | {"model.py": model}).items()}
    assert sum(lines.values()) < 1_300, lines
    assert faster.count("\n") < 250


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_every_script_begins_with_example_commands(script):
    source = (ROOT / f"{script}.py").read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(source)).count(f"python {script}.py") >= 2, "commands to copy"
    assert source.rstrip().splitlines()[-2] == 'if __name__ == "__main__":'
