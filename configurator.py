"""
Read a script's settings: dataclass defaults < checkpoint (on resume) < config file < --flags.

    python train.py config/toy.py                    a config file: `name = value` lines
    python train.py config/toy.py --max_iters=100    flags override it; also --max_iters 100, --compile, --no-compile
    python train.py --help                           every setting with its type and default

A script lists its settings once, in a frozen dataclass at its top, and reads them with `configure(XConfig)`.
It imports this file before torch, because importing torch takes seconds: start(), at the end, answers --help first.
An unknown name or a value of the wrong type is a one-line error with exit code 2, before anything is touched.
"""

import ast
import contextlib
import dataclasses
import difflib
import inspect
import operator
import os
import re
import sys
import time
import types
import typing
from pathlib import Path

from lib.errors import reject
from lib.limits import check_limits

PATHS = {"out_dir", "data_dir", "dataset", "init_from", "against", "base", "to", "json", "text", "items"}  # ~ works
ARITHMETIC = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
              ast.FloorDiv: operator.floordiv}  # fmt: skip
OUR_NAMES = {  # nanoGPT's names, and former names of settings
    "n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_embd": "hidden_size", "start": "prompt",
    "always_save_checkpoint": "save_best", "checkpoint_blocks": "activation_checkpointing",
    "official": "init_from", "weights": "init_from", "ckpt": "init_from",
}  # fmt: skip


def configure(cls, argv=None, saved=None):
    """
    Return an instance of the dataclass `cls`, filled from argv (default: sys.argv[1:]), config files and flags in any
    order. Exit with code 2 if a setting is unknown or has an impossible value. saved: a function that train.py reads
    its checkpoint with: the settings as first read -> settings that override only the defaults, a dict.
    """
    if hasattr(sys.stdout, "reconfigure"):  # print lines at once, even into a pipe; a ✓ must not fail without UTF-8
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
    argv = list(sys.argv[1:] if argv is None else argv)
    kinds = {field.name: field.type for field in dataclasses.fields(cls)}
    defaults = {field.name: field.default for field in dataclasses.fields(cls)}
    in_files, in_flags = [], []  # (origin, name, value) each, lowest precedence first
    while argv:
        argument = argv.pop(0)
        if not argument.startswith("-"):
            in_files += read_config_file(argument)
            continue
        name, equals, value = argument.lstrip("-").partition("=")
        name = name.replace("-", "_")
        if not equals:
            if kinds.get(name) is bool and argv[:1] not in (["True"], ["False"]):
                value = "True"
            elif name not in kinds and kinds.get(name.removeprefix("no_")) is bool:
                name, value = name.removeprefix("no_"), "False"
            elif argv and not argv[0].startswith("--"):
                value = argv.pop(0)
            elif name in kinds:
                reject(f"command line: {argument} has no value: write {argument}=VALUE")
        in_flags.append(("command line", name, value))

    values = {}
    for origin, name, value in in_files + in_flags:
        if name not in kinds:
            near = difflib.get_close_matches(OUR_NAMES.get(name, name), kinds, n=1)
            hint = f"did you mean {near[0]}?" if near else "--help lists all settings"
            reject(f"{origin}: no setting is named {name}: {hint}")
        try:
            values[name] = convert(value, kinds[name])
        except ValueError:
            kind = inspect.formatannotation(kinds[name])
            reject(f"{origin}: {name}={value} does not fit: {name} is {kind}, for example {defaults[name]!r}")
        if name in PATHS:
            values[name] = os.path.expanduser(values[name])
    if saved:  # limits are checked only now, because a setting may fit only together with the saved ones
        values = saved(types.SimpleNamespace(**defaults | values)) | values
    try:
        check_limits(values)
        return cls(**values)
    except (TypeError, ValueError) as error:
        reject(str(error))


def convert(text, kind):
    """Return a string converted to bool, int, float, str, Literal or X | None. Raise ValueError if it does not fit."""
    choices = typing.get_args(kind)
    if type(None) in choices:
        return None if text == "None" and choices[0] is not str else convert(text, choices[0])
    if choices:
        return choices[choices.index(text)]
    return bool(["False", "True"].index(text)) if kind is bool else kind(text)


def check_used(config, condition, reason, *names):
    """Exit with code 2 if `condition` is false, so these settings have no effect, but one is not at its default."""
    for field in dataclasses.fields(config):
        if not condition and field.name in names and getattr(config, field.name) != field.default:
            reject(f"{field.name} has no effect {reason}: leave it out")


def differences(old, new):
    """Return the settings whose values differ, as lines like `max_iters: 5000 -> 5050`."""
    return [f"{name}: {old[name]} -> {new[name]}" for name in new if name in old and old[name] != new[name]]


def print_help(script):
    """Print every setting of a script with its type, its default and the comment after it, read from its source."""
    settings = r'^class \w+Config(?:\((\w+)\))?:\n    """(.+?)"""\n(.+?)\n\n\n'
    base, doc, body = re.search(settings, script.read_text(encoding="utf-8"), re.M | re.S).groups()
    if base == "ModelConfig":
        body = re.search(settings, script.with_name("model.py").read_text(encoding="utf-8"), re.M | re.S)[3] + body
    print(f"usage: python {script.name} [CONFIG_FILE] [--name=value ...]\n\n{doc}\n")
    for name, kind, default, comment in re.findall(r"^    (\w+): (.+?) = (.+?)  # (.+)$", body, re.M):
        print(f"  --{name}  {kind}, default {default}\n      {comment}")


def read_config_file(path):
    """
    Return the settings in a config file, a list of (path, name, value as a string). Its lines are Python's `name =
    value`; a value is a literal, or arithmetic on literals and on names above it. They are parsed, but never run.
    """
    origin = f"config file {path}"
    names = {}

    def evaluate(node):
        match node:
            case ast.Constant(value=int() | float() | str() | None):
                return node.value
            case ast.Name(id=name) if name in names:
                return names[name]
            case ast.UnaryOp(op=ast.USub()):
                return -evaluate(node.operand)
            case ast.BinOp(op=op) if type(op) in ARITHMETIC:
                return ARITHMETIC[type(op)](evaluate(node.left), evaluate(node.right))
        raise ValueError(f"{ast.unparse(node)!r:.60} is neither a value nor arithmetic on names above it")

    try:
        content = Path(path).expanduser().read_text(encoding="utf-8-sig")
        for node in ast.parse(content, path).body:
            origin = f"config file {path}, line {node.lineno}"
            match node:
                case ast.Assign(targets=[ast.Name(id=name)]):
                    names[name] = evaluate(node.value)
                case ast.Expr(value=ast.Constant(value=str())):
                    pass  # a docstring
                case _:
                    raise ValueError(f"{ast.unparse(node)!r:.60} is not a `name = value` line")
    except (OSError, SyntaxError, ValueError, TypeError, ArithmeticError, RecursionError, MemoryError) as error:
        reject(f"{origin}: {getattr(error, 'strerror', None) or error}")
    return [(path, name, str(value)) for name, value in names.items()]


def start(script):
    """Do what must come before the import of torch: answer --help, print a first line, adapt to a busy machine."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print_help(script)
        sys.exit()
    if "\nimport torch" in script.read_text(encoding="utf-8") and os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):
            print("loading torch", flush=True)
    # OpenMP's threads spin while they wait for each other. Next to a busy program, that keeps the thread they wait for
    # off its core: an iteration of nano takes 326 ms instead of 125. If they spin only briefly, then sleep, it is 249.
    with contextlib.suppress(OSError, AttributeError):  # only Linux has these
        running = []
        for _ in range(5):  # the lowest of five counts is of programs that keep running
            time.sleep(0.01)
            running.append(int(Path("/proc/loadavg").read_text().split()[3].split("/")[0]) - 1)  # without this one
        if min(running) + len(os.sched_getaffinity(0)) > os.cpu_count():
            os.environ.setdefault("GOMP_SPINCOUNT", "1000")


started = Path(getattr(sys.modules["__main__"], "__file__", None) or "")
if started.resolve().parent == Path(__file__).resolve().parent:  # a script of this project, not a test or a notebook
    start(started)
