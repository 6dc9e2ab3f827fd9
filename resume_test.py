"""
Check that a run which is stopped and resumed ends bit-identical to one that never stopped.

    python resume_test.py                       # from out/ckpt.pt: seven minutes or more for config/toy.py's
    python resume_test.py --out_dir=out/nano    # config/nano.py's: under a minute

train.py continues from the checkpoint several times, in a temporary folder; the checkpoint is not changed:

    straight    100 iterations
    resumed     50 iterations and a save; then 50 more from that save
    controls    the last 50 again, once without the optimizer's moments, once with the scheduler reset

The resumed run must have exactly the straight run's weights, moments, scheduler and log.csv (except its timings). The
controls must differ: they show that the test can fail. The losses of both runs are drawn to resume.png in the folder.
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
from lib.pictures import BLUE, GREY, ORANGE, new_picture, save_picture
from train import TrainConfig, saved_settings, train


@dataclass(frozen=True)
class ResumeTestConfig:
    """Stop and resume training from a checkpoint, and compare with a run that does not stop."""

    out_dir: str = "out"  # continue from the ckpt.pt in this folder, which is not changed
    iters: int = 50  # iterations before the stop, and again after it


def continue_run(out_dir, max_iters):
    """Run train.py from out_dir/ckpt.pt to max_iters. Return (checkpoint, [(iteration, loss, lr, gradient norm)])."""
    flags = ["--init_from=resume", f"--out_dir={out_dir}", f"--max_iters={max_iters}", "--log_interval=1"]
    flags += ["--eval_interval=1000000000", "--eval_iters=1", "--sample_interval=0", "--save_best=False"]
    with contextlib.redirect_stdout(io.StringIO()):
        train(configure(TrainConfig, flags, saved=saved_settings))
    with open(out_dir / "log.csv", newline="") as file:
        rows = [(int(r["iter"]), r["loss"], r["lr"], r["grad_norm"]) for r in csv.DictReader(file) if r["loss"]]
    return read_checkpoint(out_dir / "ckpt.pt", mmap=True), rows


def count_differing(a, b):
    """Count the fp32 numbers of two lists of tensors that differ in any bit. Return (differing, total)."""
    pairs = [(x.view(torch.int32), y.view(torch.int32)) for x, y in zip(a, b, strict=True)]
    return sum((x != y).sum().item() for x, y in pairs), sum(x.numel() for x, _ in pairs)


def list_tensors(checkpoint):
    """Return the weights, and the optimizer's moments without its step counters."""
    states = checkpoint["optimizer"]["state"].values()
    moments = [tensor for state in states for tensor in state.values() if tensor.dim()]
    return dict(moments=moments, weights=[*checkpoint["model"].values()])


def main(config):
    source = Path(config.out_dir) / "ckpt.pt"
    start = read_checkpoint(source, mmap=True)["iter_num"]
    stop = start + config.iters
    end = stop + config.iters
    checks = []

    def report(ok, title, differing, total):
        checks.append(ok)
        print(f"{'✓' if ok else '✗'}  {title:<40} {differing:,} of {total:,}", flush=True)

    with tempfile.TemporaryDirectory(dir=config.out_dir, prefix="resume_test.") as temporary:
        folders = {name: Path(temporary) / name for name in ("straight", "resumed", "moments", "scheduler")}
        for path in folders.values():
            path.mkdir()
        print(f"{source}: iteration {start:,}; straight to {end:,}, and with a stop at {stop:,}", flush=True)
        print(f"including two controls, {6 * config.iters:,} iterations to train", flush=True)
        print(f"\n{'':<43} values that differ", flush=True)
        shutil.copyfile(source, folders["straight"] / "ckpt.pt")
        shutil.copyfile(source, folders["resumed"] / "ckpt.pt")
        straight, straight_rows = continue_run(folders["straight"], end)
        continue_run(folders["resumed"], stop)
        saved = read_checkpoint(folders["resumed"] / "ckpt.pt")
        resumed, resumed_rows = continue_run(folders["resumed"], end)

        # The resumed run must be identical.
        resumed_tensors = list_tensors(resumed)
        for name, tensors in list_tensors(straight).items():
            differing, total = count_differing(tensors, resumed_tensors[name])
            report(differing == 0, f"{name} at {end:,}, straight and resumed", differing, total)
        verdict = f"after the resume, {differing:,} of {total:,} weights differ"
        differing = sum(straight[key] != resumed[key] for key in ("scheduler", "iter_num"))
        report(differing == 0 and saved["iter_num"] == stop, "scheduler and iteration number", differing, 2)
        differing = sum(a != b for a, b in zip(straight_rows, resumed_rows, strict=True))
        complete = [iteration for iteration, *_ in resumed_rows] == [*range(start + 1, end + 1)]
        report(differing == 0 and complete, "rows of log.csv", differing, len(straight_rows))

        # The controls must differ.
        print(f"\n{'controls, which must differ':<43} weights that differ", flush=True)
        scheduler = saved["scheduler"] | {"last_epoch": 0}
        write_checkpoint(folders["scheduler"] / "ckpt.pt", saved | {"scheduler": scheduler})
        for tensor in (tensor for state in saved["optimizer"]["state"].values() for tensor in state.values()):
            tensor.zero_()
        write_checkpoint(folders["moments"] / "ckpt.pt", saved)
        del saved
        for name, title in (("moments", "without moments"), ("scheduler", "with the scheduler reset")):
            control, control_rows = continue_run(folders[name], end)
            differing, total = count_differing(straight["model"].values(), control["model"].values())
            ok = differing > total / 2 and control_rows != straight_rows[config.iters :]
            report(ok, title, differing, total)

    # The straight run as a line, the resumed run as dots on it.
    figure, axes = new_picture()
    iterations, losses = zip(*((iteration, float(loss)) for iteration, loss, *_ in straight_rows), strict=True)
    axes.plot(iterations, losses, color=BLUE, label="without a stop")
    iterations, losses = zip(*((iteration, float(loss)) for iteration, loss, *_ in resumed_rows), strict=True)
    axes.plot(iterations, losses, "o", color=ORANGE, markersize=3, label="stopped and resumed")
    axes.axvline(stop, color=GREY, linestyle=":")
    axes.set(xlabel="iteration", ylabel="train loss, nats per token", title=verdict)
    axes.legend()
    save_picture(figure, Path(config.out_dir) / "resume.png")
    print(f"\nresume_test: {checks.count(True)} ✓, {checks.count(False)} ✗: {verdict}")
    sys.exit(0 if all(checks) else 1)


if __name__ == "__main__":
    main(configure(ResumeTestConfig))
