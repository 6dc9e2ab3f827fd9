"""
ckpt.pt: one dict, written whole or not at all, read without running any code in it, with a checksum of every tensor.

    checkpoint = read_checkpoint("out/ckpt.pt")      # tensors and plain values, on the CPU
    write_checkpoint("out/ckpt.pt", checkpoint)

Its keys:
    model, optimizer, scheduler   state dicts
    iter_num                      updates done
    best_val_loss                 lowest validation loss so far
    config                        every setting, resolved, by name
    data                          sha256 of train.bin and val.bin
    tokenizer                     which tokenizer made them: its --official= source and its sha256; chat: whether the
                                  network was taught conversations, so that a text ends with <|im_end|>
    machine                       number of threads and of processes, on which the last bits depend
    checksums                     of every tensor in model and optimizer, and of all plain values together
    version                       of this layout
best.pt (train.py --save_best=True) has no optimizer and no scheduler: weights to use, not a run to resume.
"""

import math
import os
import sys
import zlib

import torch

from lib.errors import first_line, way_out
from lib.files import written_whole
from lib.formats import first_bytes, is_torch, stand_in

VERSION = 1  # raise it when a reader of today would misunderstand the file
WEIGHTS = {"model": dict, "iter_num": int, "config": dict}  # what every checkpoint must hold
RUN = WEIGHTS | {"optimizer": dict, "scheduler": dict, "data": dict}  # what a resume needs besides
DEFAULTS = {  # keys that came later, and what their absence in an older file means
    "version": 1,
    "best_val_loss": math.inf,
    "tokenizer": {"official": "base", "sha256": None},
    "machine": {},
    "checksums": {},
}
RENAMED = {"checkpoint_blocks": "activation_checkpointing"}  # settings: old name, new name


def read_checkpoint(path, mmap=False, resume=True):
    """
    The dict in `path`, on the CPU, because a GPU may have no room for a second copy. mmap=True leaves the tensors
    on the disk, unread and unchecked, until they are used. resume=False asks for weights alone. Ends the program with
    one line if the file is missing, damaged, from a newer version, or lacks what was asked for.
    """
    if not os.path.isfile(path):
        sys.exit(f"error: there is no checkpoint {path}{neighbours(path)}")
    earlier = "take an earlier copy, or train from scratch"
    checkpoint = load_saved(path, mmap, "checkpoint", earlier)
    wanted, found = RUN if resume else WEIGHTS, checkpoint if isinstance(checkpoint, dict) else {}
    missing = wanted.keys() - found.keys()
    if "model_args" in found:
        sys.exit(
            f"error: {path} is a checkpoint of nanoGPT's, a GPT-2 network, not a Llama: sample from it with nanoGPT"
        )
    if missing:
        lacks = f"error: {path} lacks {', '.join(sorted(missing))}"
        if missing.isdisjoint(WEIGHTS):
            sys.exit(f"{lacks}: it cannot be resumed, but --init_from={path} begins a new run with its weights")
        if state_dict_in(found) is not None:
            sys.exit(f"{lacks}: it holds the tensors of a network alone: put the config.json of that network beside it")
        sys.exit(f"{lacks}: it is not a checkpoint of train.py")
    check_values(path, checkpoint)
    if not mmap:
        check_tensors(path, checkpoint)
    checkpoint = DEFAULTS | checkpoint
    kinds = RUN | {key: type(value) for key, value in DEFAULTS.items()}
    for key in checkpoint.keys() & kinds.keys():
        if not isinstance(checkpoint[key], kinds[key]) or isinstance(checkpoint[key], bool):
            sys.exit(f"error: {path}: {key} is {type(checkpoint[key]).__name__}, not {kinds[key].__name__}: {earlier}")
    if checkpoint["version"] > VERSION:
        known = f"this code reads up to {VERSION}"
        sys.exit(f"error: {path} has layout version {checkpoint['version']}, {known}: update this repository")
    for number in (checkpoint["iter_num"], checkpoint.get("scheduler", {}).get("last_epoch", 0)):
        if type(number) is not int or number < 0:
            sys.exit(f"error: {path}: its iteration is {number!r}, not a number from 0 on: {earlier}")
    checkpoint["config"] = {RENAMED.get(name, name): value for name, value in checkpoint["config"].items()}
    return checkpoint


def load_saved(path, mmap, what, way_out):
    """
    What torch.save wrote to `path`, on the CPU. No code in it is run. mmap as in read_checkpoint. Ends the program with
    one line if the file is not a whole `what`.
    """
    try:
        mmap = mmap and first_bytes(path, 2) == b"PK"  # torch.save's older format cannot be mapped
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except MemoryError:
        raise
    except Exception as error:  # torch.load has many ways to say that a file is truncated, corrupt or hostile
        reason = first_line(error)
        if found := stand_in(path):
            sys.exit(f"error: {path} is not a whole {what}, but {found}")
        if "weights only" in str(error).lower() or "weights_only" in str(error):
            reason = "it holds more than tensors and plain values, and such a file could run code"
            if is_torch(path) and b"pytorch-lightning_version" in first_bytes(path, 4_096):
                reason = f"PyTorch Lightning wrote it: {reason}"
        sys.exit(f"error: {path} is not a whole {what} ({reason}): {way_out}")


def state_dict_in(saved):
    """The {name: tensor} that `saved` is, or that it holds as "state_dict", as Lightning's does; None if neither."""
    found = saved.get("state_dict", saved) if isinstance(saved, dict) else None
    whole = isinstance(found, dict) and all(isinstance(k, str) and torch.is_tensor(v) for k, v in found.items())
    return found if whole and found else None


def neighbours(path):
    """What lies where a checkpoint should be, and what to do."""
    folder = os.path.dirname(path) or "."
    found = sorted(name for name in os.listdir(folder) if not name.startswith(".")) if os.path.isdir(folder) else []
    there = f" ({folder} holds {', '.join(found[:5])})" if found else ""
    return f"{there}: train from scratch first, or give the --out_dir of a run that saved one"


def check_state(path, checkpoint, model, optimizer):
    """
    End the program with one line if the tensors of a checkpoint are not those of this model and optimizer. torch does
    not check the moments itself: the fused AdamW would write beyond a tensor that is too small.
    """
    ours = "muon" if any("momentum" in group for group in optimizer.param_groups) else "adamw"
    if ours != (saved := checkpoint["config"].get("optimizer", "adamw")):
        sys.exit(f"error: {path} holds the state of {saved}, not {ours}: leave out --optimizer, or --init_from={path}")
    expected = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    params = [(p, "momentum" in group) for group in optimizer.param_groups for p in group["params"]]
    for i, (p, of_muon) in enumerate(params):
        names = ("momentum_buffer",) if of_muon else ("exp_avg", "exp_avg_sq")
        expected |= {f"optimizer/state/{i}/{name}": p for name in names}
        expected |= {} if of_muon else {f"optimizer/state/{i}/step": torch.zeros(())}
    here = {name: t for name, t in tensors(checkpoint).items() if name.startswith(("model/", "optimizer/"))}
    for name in sorted(expected.keys() | here.keys()):
        a, b = here.get(name), expected.get(name)
        if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
            found, wanted = ("missing" if t is None else f"{list(t.shape)} {t.dtype}" for t in (a, b))
            sys.exit(f"error: {path}: {name} is {found}, where this network has {wanted}: take an earlier copy")
    groups = checkpoint["optimizer"].get("param_groups")
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    if not isinstance(groups, list) or [len(g.get("params", ())) for g in groups if isinstance(g, dict)] != sizes:
        sys.exit(f"error: {path}: the optimizer's param_groups are not those of this network: take an earlier copy")


def write_checkpoint(path, checkpoint):
    """Write the dict to `path`, whole or not at all. Ends the program with one line if it cannot be written."""
    checkpoint = checkpoint | dict(version=VERSION)
    checksums = {name: checksum(tensor) for name, tensor in tensors(checkpoint).items()}
    checksums["values"] = values_checksum(checkpoint)
    torch.serialization.set_crc32_options(False)  # torch.load never checks them, and they double the writing time
    try:
        with written_whole(path) as file:
            torch.save(checkpoint | dict(checksums=checksums), file)
    except (OSError, RuntimeError) as error:
        # torch turns a failed write into a RuntimeError of its own; the cause is in its context
        cause = error if isinstance(error, OSError) else error.__context__ or error.__cause__
        if isinstance(cause, OSError):
            reason, advice = cause.strerror or first_line(cause), way_out(cause)
        else:
            reason, advice = first_line(error), "see whether the disk is full"
        sys.exit(f"error: {path} could not be written ({reason}), the one before it is untouched: {advice}")


def leaves(value, path=""):
    """{path: value} of everything in a checkpoint that is no dict or list: "model/model.norm.weight", "config/seed"."""
    if isinstance(value, (list, tuple)):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {path: value}
    return {k: v for key, item in value.items() for k, v in leaves(item, f"{path}/{key}" if path else str(key)).items()}


def tensors(checkpoint):
    return {path: value for path, value in leaves(checkpoint).items() if torch.is_tensor(value)}


def values_checksum(checkpoint):
    """A crc32 of all plain values with their paths, the checksums apart."""
    plain = {path: value for path, value in leaves(checkpoint).items() if not torch.is_tensor(value)}
    lines = (f"{path} = {value!r}\n" for path, value in plain.items() if not path.startswith("checksums/"))
    return zlib.crc32("".join(sorted(lines)).encode(errors="replace"))


def checksum(tensor):
    """
    Sums of 64-bit words over rows of 64 kB, and a crc32 of those sums: as fast as memory is read, five times a crc32 of
    the whole. Any changed bit changes it, and so does any range set to zero.
    """
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    whole = len(content) // 2**16 * 2**16
    sums = content[:whole].view("u8").reshape(-1, 2**13).sum(1)
    return zlib.crc32(content[whole:], zlib.crc32(sums))


def check_values(path, checkpoint):
    """End the program with one line if a plain value is not as it was saved. Older files have no checksums."""
    sums = checkpoint.get("checksums", {})
    if not isinstance(sums, dict) or sums and sums.get("values") != values_checksum(checkpoint):
        sys.exit(f"error: {path}: its settings or numbers are damaged, their checksum differs: take an earlier copy")


def check_tensors(path, checkpoint):
    """End the program with one line that names the tensor if one is not as it was saved."""
    sums = checkpoint.get("checksums", {})
    for name, tensor in tensors(checkpoint).items() if sums else ():
        if sums.get(name) != checksum(tensor):
            sys.exit(f"error: {path}: {name} is damaged, its checksum differs: take an earlier copy, or train again")


def refuse_earlier_run(out_dir, overwrite):
    """End the program with one line if out_dir holds an earlier run that a new one may not replace."""
    if (out_dir / "ckpt.pt").exists() and not overwrite:
        sys.exit(
            f"error: {out_dir}/ckpt.pt holds an earlier run: to continue it, --init_from=resume --out_dir={out_dir}; "
            "to start over and lose it, --overwrite=True; to keep it, another --out_dir"
        )


def remove_earlier_run(out_dir):
    """Remove the files of an earlier run, because a new one begins."""
    for name in ("ckpt.pt", "best.pt", "log.csv", "loss.png"):
        (out_dir / name).unlink(missing_ok=True)
