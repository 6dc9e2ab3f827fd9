"""
Settings: dataclass defaults < checkpoint (on resume) < config file < --flags.

    python train.py config/toy.py                    a config file: `name = value` lines
    python train.py config/toy.py --max_iters=100    flags override it
    python train.py --help                           every setting with its type and default

A script lists its settings once, in a frozen dataclass at its top, and reads them with `configure(XConfig)`.
An unknown name or a value of the wrong type ends the program with one line and exit code 2, before anything
is touched.
"""

import contextlib
import dataclasses
import difflib
import io
import os
import sys

import tyro

from lib.config_file import read_config_file
from lib.errors import reject

# Flags as in nanoGPT: --compile=True rather than --compile, underscores in names.
TYRO = dict(config=(tyro.conf.FlagConversionOff,), use_underscores=True)

PATHS = {  # ~ is expanded
    "out_dir", "data_dir", "dataset", "init_from", "official", "weights", "ckpt", "to", "json", "text", "items",
    "against",
}  # fmt: skip
OTHER_NAMES = {  # what nanoGPT, or an earlier version of this project, calls a setting
    "n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_embd": "hidden_size", "start": "prompt",
    "always_save_checkpoint": "save_best", "eval_only": "init_from", "official": "init_from", "ckpt": "init_from",
    "checkpoint_blocks": "activation_checkpointing",
}  # fmt: skip


def configure(cls, argv=None, saved=None):
    """
    Fill the dataclass `cls` from the command line.

    argv   list of str, sys.argv[1:] by default: config files and --name=value flags, in any order.
    saved  function that takes the settings as first read and returns a dict of settings to put above the
           defaults, but below config file and flags. train.py reads its checkpoint this way.
    Returns an instance of `cls`. Exits with code 2 if a setting does not exist or has an impossible value.
    """
    if hasattr(sys.stdout, "reconfigure"):  # lines appear at once in a pipe; a ✓ ends no run where output is not UTF-8
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
    argv = list(sys.argv[1:] if argv is None else argv)
    if "-h" in argv or "--help" in argv:
        tyro.cli(cls, args=["--help"], **TYRO)  # prints, then exits with code 0

    # Collect everything that was said as (where, name, value), weakest first.
    settings, flags = [], []
    switches = {field.name for field in dataclasses.fields(cls) if field.type is bool}
    while argv:
        word = argv.pop(0)
        if not word.startswith("-"):
            settings += read_config_file(word)
            continue
        name, equals, value = word.lstrip("-").partition("=")
        name = name.replace("-", "_")
        if not equals and name in switches and argv[:1] not in (["True"], ["False"]):
            value = "True"  # `--quick` means `--quick=True`
        elif not equals:
            if not argv or argv[0].startswith("--"):
                reject(f"command line: {word} has no value: write {word}=VALUE")
            value = argv.pop(0)  # and `--name value` means `--name=value`
        flags.append(("command line", name, value))
    said = settings + flags

    config = apply(cls, said)
    if saved:
        below = [("the saved settings", name, str(value)) for name, value in saved(config).items()]
        config = apply(cls, below + said)
    return config


def apply(cls, said):
    """An instance of `cls`: its defaults, then each (where, name, value) that was said."""
    known = {field.name: field for field in dataclasses.fields(cls)}
    values = {}
    for where, name, value in said:
        if name not in known:
            near = difflib.get_close_matches(OTHER_NAMES.get(name, name), known, n=1)
            reject(f"{where}: no setting is named {name}: {f'did you mean {near[0]}?' if near else '--help lists all'}")
        field = known[name]
        one = dataclasses.make_dataclass("One", [(name, field.type, dataclasses.field(default=field.default))])
        try:  # one flag at a time, so that the error can name it; tyro's own message fills a page
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                values[name] = getattr(tyro.cli(one, args=[f"--{name}={value}"], **TYRO), name)
        except SystemExit:
            kind = field.type.__name__ if isinstance(field.type, type) else str(field.type).removeprefix("typing.")
            reject(f"{where}: {name}={value} does not fit: {name} is {kind}, for example {field.default!r}")
        if name in PATHS:
            values[name] = os.path.expanduser(values[name])
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:  # two settings that contradict each other
        reject(str(error))


def differences(old, new):
    """The settings whose values differ, as lines like `max_iters: 5000 -> 5050`."""
    return [f"{name}: {old[name]} -> {new[name]}" for name in new if name in old and old[name] != new[name]]
