"""
The checkpoint test: is a run that was stopped and resumed, to the bit, the run that never stopped?

    python resume_test.py                       # from out/ckpt.pt: seven minutes or more for config/toy.py's
    python resume_test.py --out_dir=out/nano    # config/nano.py's: under a minute
    python resume_test.py --iters=10            # shorter

train.py continues from the checkpoint several times, in a folder of its own; the checkpoint is not changed:

    straight    100 iterations
    resumed     50 iterations and a save; then 50 more from that save
    controls    the last 50 again, once without the optimizer's moments, once with the scheduler reset

Weights, moments, scheduler and log.csv (except its timings) of the resumed run must be the straight run's to the bit.
The controls must differ, because a test that cannot fail proves nothing.
"""

import contextlib
import csv
import io
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from configurator import configure

import torch

from lib.checkpoint import read_checkpoint, write_checkpoint
from train import TrainConfig, saved_settings, train


@dataclass(frozen=True)
class ResumeTestConfig:
    """Stop and resume training from a checkpoint, and compare with not having stopped."""

    out_dir: str = "out"  # continue from this folder's ckpt.pt, which is not changed
    iters: int = 50  # iterations before the stop, and again after it


def continue_run(out_dir, max_iters):
    """Run train.py from out_dir/ckpt.pt to max_iters. Returns (checkpoint, [(iteration, loss, lr, gradient norm)])."""
    flags = ["--init_from=resume", f"--out_dir={out_dir}", f"--max_iters={max_iters}", "--log_interval=1"]
    flags += ["--eval_interval=1000000000", "--eval_iters=1", "--sample_interval=0", "--save_best=False"]
    with contextlib.redirect_stdout(io.StringIO()):
        train(configure(TrainConfig, flags, saved=saved_settings))
    with open(out_dir / "log.csv", newline="") as file:
        rows = [(int(r["iter"]), r["loss"], r["lr"], r["grad_norm"]) for r in csv.DictReader(file) if r["loss"]]
    return read_checkpoint(out_dir / "ckpt.pt", mmap=True), rows


def tensors(value):
    """All tensors in nested dicts and lists, except single numbers."""
    if isinstance(value, torch.Tensor):
        return [value] if value.dim() else []
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [tensor for one in values for tensor in tensors(one)]


def count_differing(a, b):
    """How many of the fp32 numbers of two lists of tensors differ in a bit, and how many there are."""
    pairs = [(x.view(torch.int32), y.view(torch.int32)) for x, y in zip(a, b, strict=True)]
    return sum((x != y).sum().item() for x, y in pairs), sum(x.numel() for x, _ in pairs)


def main(config):
    source = Path(config.out_dir) / "ckpt.pt"
    start = read_checkpoint(source, mmap=True)["iter_num"]
    stop, end = start + config.iters, start + 2 * config.iters
    results = []

    def row(ok, name, differing, total):
        results.append(ok)
        print(f"{'✓' if ok else '✗'}  {name:<40} {differing:,} of {total:,}", flush=True)

    with tempfile.TemporaryDirectory(dir=config.out_dir, prefix="resume_test.") as folder:
        folders = {name: Path(folder) / name for name in ("straight", "resumed", "moments", "scheduler")}
        for path in folders.values():
            path.mkdir()
        print(f"{source}: iteration {start:,}; straight to {end:,}, and with a stop at {stop:,}\n", flush=True)
        print(f"{'':<43} values that differ", flush=True)
        shutil.copyfile(source, folders["straight"] / "ckpt.pt")
        shutil.copyfile(source, folders["resumed"] / "ckpt.pt")
        straight, straight_rows = continue_run(folders["straight"], end)
        continue_run(folders["resumed"], stop)
        saved = read_checkpoint(folders["resumed"] / "ckpt.pt")
        resumed, resumed_rows = continue_run(folders["resumed"], end)

        for key, title in (("model", "weights"), ("optimizer", "moments")):
            differing, total = count_differing(tensors(straight[key]), tensors(resumed[key]))
            row(differing == 0, f"{title} at {end:,}, straight and resumed", differing, total)
        differing = sum(straight[key] != resumed[key] for key in ("scheduler", "iter_num"))
        row(differing == 0 and saved["iter_num"] == stop, "scheduler and iteration number", differing, 2)
        differing = sum(a != b for a, b in zip(straight_rows, resumed_rows, strict=True))
        iterations = [iteration for iteration, *_ in resumed_rows]
        ok = differing == 0 and iterations == [*range(start + 1, end + 1)]
        row(ok, "rows of log.csv", differing, len(straight_rows))

        print(f"\n{'controls, which must differ':<43} weights that differ", flush=True)
        reset = saved["scheduler"] | {"last_epoch": 0}
        write_checkpoint(folders["scheduler"] / "ckpt.pt", saved | {"scheduler": reset})
        for state in saved["optimizer"]["state"].values():
            for tensor in state.values():
                tensor.zero_()
        write_checkpoint(folders["moments"] / "ckpt.pt", saved)
        del saved
        for name, title in (("moments", "without moments"), ("scheduler", "with the scheduler reset")):
            control, rows = continue_run(folders[name], end)
            differing, total = count_differing(tensors(straight["model"]), tensors(control["model"]))
            row(differing > total / 2 and rows != straight_rows[config.iters :], title, differing, total)

    print(f"\nresume_test: {sum(results)} ✓, {len(results) - sum(results)} ✗")
    sys.exit(0 if all(results) else 1)


if __name__ == "__main__":
    main(configure(ResumeTestConfig))
