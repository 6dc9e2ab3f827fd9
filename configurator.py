"""
Settings: dataclass defaults < checkpoint (on resume) < config file < --flags.

    python train.py config/toy.py                    a config file: `name = value` lines
    python train.py config/toy.py --max_iters=100    flags override it; also --max_iters 100, --compile, --no-compile
    python train.py --help                           every setting with its type and default

A script lists its settings once, in a frozen dataclass at its top, and reads them with `configure(XConfig)`.
An unknown name or a value of the wrong type ends the program with one line and exit code 2, before anything
is touched.
"""

import ast
import dataclasses
import difflib
import inspect
import operator
import os
import re
import sys
import types
import typing
from pathlib import Path

from lib.errors import reject
from lib.limits import check_limits

PATHS = {"out_dir", "data_dir", "dataset", "init_from", "against", "base", "to", "json", "text", "items"}  # ~ works
ARITHMETIC = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
              ast.FloorDiv: operator.floordiv}  # fmt: skip
OTHER_NAMES = {  # names in nanoGPT, and former names: ours
    "n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_embd": "hidden_size", "start": "prompt",
    "always_save_checkpoint": "save_best", "checkpoint_blocks": "activation_checkpointing",
    "official": "init_from", "weights": "init_from", "ckpt": "init_from",
}  # fmt: skip


def configure(cls, argv=None, saved=None):
    """
    Fill the dataclass `cls` from the command line.

    argv   list of str, sys.argv[1:] by default: config files and flags, in any order.
    saved  function that takes the settings as first read and returns a dict of settings to put above the
           defaults, but below config file and flags. train.py reads its checkpoint this way.
    Returns an instance of `cls`. Exits with code 2 if a setting does not exist or has an impossible value.
    """
    if hasattr(sys.stdout, "reconfigure"):  # lines appear at once in a pipe; a ✓ ends no run where output is not UTF-8
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
    argv = list(sys.argv[1:] if argv is None else argv)
    if "-h" in argv or "--help" in argv:
        print_help(cls)
        sys.exit()
    kinds = {field.name: field.type for field in dataclasses.fields(cls)}
    in_files, in_flags = [], []  # (where, name, value) each, weakest first
    while argv:
        word = argv.pop(0)
        if not word.startswith("-"):
            in_files += read_config_file(word)
            continue
        name, equals, value = word.lstrip("-").partition("=")
        name = name.replace("-", "_")
        if not equals:
            if kinds.get(name) is bool and argv[:1] not in (["True"], ["False"]):
                value = "True"
            elif name not in kinds and kinds.get(name.removeprefix("no_")) is bool:
                name, value = name.removeprefix("no_"), "False"
            elif argv and not argv[0].startswith("--"):
                value = argv.pop(0)
            elif name in kinds:
                reject(f"command line: {word} has no value: write {word}=VALUE")
        in_flags.append(("command line", name, value))

    values = read_values(cls, in_files + in_flags)
    if saved:  # the first reading is not checked, because settings that must fit each other may be among the saved ones
        defaults = {field.name: field.default for field in dataclasses.fields(cls)}
        values = saved(types.SimpleNamespace(**defaults | values)) | values
    try:
        check_limits(values)
        return cls(**values)
    except (TypeError, ValueError) as error:  # a number beyond its limits, or two settings that contradict each other
        reject(str(error))


def read_values(cls, settings):
    """Return {name: value} of a list of (where, name, value as text), weakest first."""
    known = {field.name: field for field in dataclasses.fields(cls)}
    values = {}
    for where, name, value in settings:
        if name not in known:
            near = difflib.get_close_matches(OTHER_NAMES.get(name, name), known, n=1)
            reject(f"{where}: no setting is named {name}: {f'did you mean {near[0]}?' if near else '--help lists all'}")
        try:
            values[name] = convert(value, known[name].type)
        except ValueError:
            kind = inspect.formatannotation(known[name].type)
            reject(f"{where}: {name}={value} does not fit: {name} is {kind}, for example {known[name].default!r}")
        if name in PATHS:
            values[name] = os.path.expanduser(values[name])
    return values


def convert(text, kind):
    """The text as bool, int, float, str, Literal or X | None. Raises ValueError if it is none."""
    choices = typing.get_args(kind)
    if type(None) in choices:
        return None if text == "None" and choices[0] is not str else convert(text, choices[0])
    if choices:
        return choices[choices.index(text)]
    return bool(["False", "True"].index(text)) if kind is bool else kind(text)


def check_used(config, condition, reason, *names):
    """Exit with code 2 if a setting differs from its default, but has no effect because `condition` does not hold."""
    for field in dataclasses.fields(config):
        if not condition and field.name in names and getattr(config, field.name) != field.default:
            reject(f"{field.name} has no effect {reason}: leave it out")


def differences(old, new):
    """The settings whose values differ, as lines like `max_iters: 5000 -> 5050`."""
    return [f"{name}: {old[name]} -> {new[name]}" for name in new if name in old and old[name] != new[name]]


def print_help(cls):
    """Print every setting with its type, its default and the comment that follows it in the source."""
    print(f"usage: python {Path(sys.argv[0]).name} [CONFIG_FILE] [--name=value ...]\n\n{inspect.getdoc(cls)}\n")
    sources = "\n".join(inspect.getsource(base) for base in cls.__mro__ if dataclasses.is_dataclass(base))
    comments = dict(re.findall(r"^    (\w+): .*?  # (.+)$", sources, re.M))
    for field in dataclasses.fields(cls):
        print(f"  --{field.name}  {inspect.formatannotation(field.type)}, default {field.default!r}")
        print(f"      {comments.get(field.name, '')}")


def read_config_file(path):
    """
    The settings in a config file, a list of (path, name, value), with the values as they would stand in a flag. Its
    lines have Python's syntax, `name = value`, each a literal or arithmetic on literals and on names above it. They are
    only parsed, never run.
    """
    where, names = f"config file {path}", {}

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
            where = f"config file {path}, line {node.lineno}"
            match node:
                case ast.Assign(targets=[ast.Name(id=name)]):
                    names[name] = evaluate(node.value)
                case ast.Expr(value=ast.Constant(value=str())):
                    pass  # a docstring
                case _:
                    raise ValueError(f"{ast.unparse(node)!r:.60} is not `name = value`, and nothing else is read")
    except (OSError, SyntaxError, ValueError, TypeError, ArithmeticError, RecursionError, MemoryError) as error:
        reject(f"{where}: {getattr(error, 'strerror', None) or error}")
    return [(path, name, str(value)) for name, value in names.items()]
