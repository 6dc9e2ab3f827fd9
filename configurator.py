"""
Settings: dataclass defaults < checkpoint (on resume) < config file < --flags.

    python train.py config/toy.py                    a config file: plain `name = value` Python
    python train.py config/toy.py --max_iters=100    and flags on top of it
    python train.py --help                           every setting, its type, its default

A script lists its settings once, in a frozen dataclass at its top, and reads them with
`configure(XConfig)`. An unknown name or a value of the wrong type ends the run with one line
and exit code 2, before anything is touched.
"""

import contextlib
import dataclasses
import difflib
import io
import runpy
import sys
import types

import tyro


def configure(cls, argv=None, saved=None):
    """
    Fill the dataclass `cls` from the command line.

    argv   list of str, sys.argv[1:] by default: config files and --name=value flags, any order.
    saved  function of the settings as first read, returning a dict of settings (or an empty one) to
           lay above the defaults, beneath config file and flags: train.py reads its checkpoint so.
    Returns an instance of `cls`. Exits with code 2 on a setting that does not exist or fit.
    """
    if hasattr(sys.stdout, "reconfigure"):  # where output is not UTF-8, a ✓ or a sampled character must not end a run
        sys.stdout.reconfigure(errors="replace")
    argv = list(sys.argv[1:] if argv is None else argv)
    if "-h" in argv or "--help" in argv:
        tyro.cli(cls, args=["--help"], **TYRO)  # prints, then exits with code 0

    # Everything said becomes (where it was said, "--name=value"), weakest first.
    settings, flags = [], []
    switches = {field.name for field in dataclasses.fields(cls) if field.type is bool}
    while argv:
        word = argv.pop(0)
        if not word.startswith("-"):
            settings += read_config_file(word)
            continue
        if word.lstrip("-").replace("-", "_") in switches and argv[:1] not in (["True"], ["False"]):
            word += "=True"  # `--quick` is read like `--quick=True`,
        elif "=" not in word:
            if not argv or argv[0].startswith("--"):
                reject(f"command line: {word} has no value: write {word}=VALUE")
            word += "=" + argv.pop(0)  # and `--name value` like `--name=value`
        flags.append(("command line", word))
    said = settings + flags

    config = apply(cls(), said)
    if saved is not None:
        config = apply(dataclasses.replace(cls(), **saved(config)), said)
    return config


def read_config_file(path):
    """The public values of a Python file, as a list of (path, "--name=value"). The file is run."""
    try:
        names = runpy.run_path(path)
    except OSError as error:
        reject(f"config file {path}: {error.strerror or error}")
    except Exception as error:
        reject(f"config file {path}: {type(error).__name__}: {error}")
    return [
        (path, f"--{name}={value}")
        for name, value in names.items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType) and not callable(value)  # its tools
    ]


def apply(config, said):
    """`config` with each (where, "--name=value") laid over it in turn."""
    fields = {field.name: field for field in dataclasses.fields(config)}
    for where, flag in said:
        name, value = flag.lstrip("-").split("=", 1)
        name = name.replace("-", "_")
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            hint = f"did you mean {near[0]}?" if near else "--help lists them all"
            reject(f"{where}: no setting is named {name}: {hint}")
        try:  # one flag at a time, so that an error can name it; tyro's own message fills a page
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                config = tyro.cli(type(config), args=[f"--{name}={value}"], default=config, **TYRO)
        except SystemExit:
            kind = fields[name].type.__name__ if isinstance(fields[name].type, type) else str(fields[name].type)
            kind = kind.removeprefix("typing.")
            reject(f"{where}: {name}={value} does not fit: {name} is {kind}, for example {fields[name].default!r}")
    return config


def differences(old, new):
    """The settings whose values differ, as lines like `max_iters: 5000 -> 5050`."""
    return [f"{name}: {old[name]} -> {new[name]}" for name in new if name in old and old[name] != new[name]]


def reject(message):
    """Print one line and exit with code 2: the command was wrong, nothing was done."""
    print("error:", *message.splitlines(), file=sys.stderr)
    sys.exit(2)


# Flags as nanoGPT has them: --compile=True rather than --compile, underscores in names.
TYRO = dict(config=(tyro.conf.FlagConversionOff,), use_underscores=True)
