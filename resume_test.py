"""
The checkpoint test: is a run that was stopped and resumed, to the bit, the run that never stopped?

    python resume_test.py                       # from out/ckpt.pt: seven minutes or more for config/toy.py's
    python resume_test.py --out_dir=out/nano    # config/nano.py's: under a minute
    python resume_test.py --iters=10            # shorter

train.py continues from the checkpoint several times, in a folder of its own; the checkpoint is not changed:

    straight    100 iterations
    resumed     50 iterations and a save; then 50 more from that save
    controls    the last 50 again, once without AdamW's moments, once with the scheduler reset

Three things must be equal to the bit: the saved file and the state of the optimizer just before its first resumed
update; the losses of both ways; the weights and moments at the end. The controls must differ, because a test that
cannot fail proves nothing.
"""

import contextlib
import csv
import io
import shutil
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from configurator import configure
from lib.checkpoint import read_checkpoint, write_checkpoint
from train import TrainConfig, get_lr, saved_settings, train


@dataclass(frozen=True)
class ResumeTestConfig:
    """Stop and resume training from a checkpoint, and compare with not having stopped."""

    out_dir: str = "out"  # continue from this folder's ckpt.pt, which is not changed
    iters: int = 50  # iterations before the stop, and again after it


def checksum(tensors):
    """The sum of all 32-bit words of the tensors, in hexadecimal: any changed bit changes it."""
    total = sum(
        tensor.detach().cpu().contiguous().view(torch.int32).sum(dtype=torch.int64).item() for tensor in tensors
    )
    return f"{total % 2**64:016x}"


def count_differing(a, b):
    """In how many places two lists of fp32 tensors differ, and how many places there are."""
    pairs = [(x.view(torch.int32), y.view(torch.int32)) for x, y in zip(a, b, strict=True)]
    return sum((x != y).sum().item() for x, y in pairs), sum(x.numel() for x, _ in pairs)


def weights(checkpoint):
    return list(checkpoint["model"].values())


def moments(checkpoint):
    state = checkpoint["optimizer"]["state"]
    return [state[i][name] for name in ("exp_avg", "exp_avg_sq") for i in state]


@dataclass
class Run:
    """One run of train.py: its checkpoint, its log by iteration, the optimizer's state before the first update."""

    checkpoint: dict
    rows: dict
    found: dict

    def losses(self, first, last):
        return [float(self.rows[i]["loss"]) for i in range(first, last + 1)]


def continue_run(out_dir, max_iters):
    """Run train.py from out_dir/ckpt.pt to max_iters, and record the optimizer's state before its first update."""
    flags = ["--init_from=resume", f"--out_dir={out_dir}", f"--max_iters={max_iters}", "--log_interval=1"]
    flags += ["--eval_interval=1000000000", "--eval_iters=1", "--sample_interval=0", "--save_best=False"]
    config = configure(TrainConfig, flags, saved=saved_settings)
    found = {}

    def look(optimizer, *_):
        if not found:
            state = [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]]
            found["weights"] = checksum(p for group in optimizer.param_groups for p in group["params"])
            for name in ("exp_avg", "exp_avg_sq"):
                found[name] = checksum(s[name] for s in state if name in s)
            found["step"] = {int(s["step"]) for s in state if "step" in s}
            found["lr"] = optimizer.param_groups[0]["lr"]

    hook = register_optimizer_step_pre_hook(look)
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            train(config)
    finally:
        hook.remove()
    with open(out_dir / "log.csv", newline="") as file:
        rows = {int(row["iter"]): row for row in csv.DictReader(file) if row["loss"]}
    return Run(read_checkpoint(out_dir / "ckpt.pt"), rows, found)


def mean_and_error(values):
    return f"{statistics.mean(values):.4f} +- {statistics.stdev(values) / len(values) ** 0.5:.4f}"


def main(config):
    source = Path(config.out_dir) / "ckpt.pt"
    start = read_checkpoint(source, mmap=True)["iter_num"]
    stop, end = start + config.iters, start + 2 * config.iters
    passed = failed = 0

    def row(ok, name, *measured):
        nonlocal passed, failed
        passed, failed = passed + ok, failed + (not ok)
        print(f"{'✓' if ok else '✗'}  {name:<40}" + "".join(f" {m:<26}" for m in measured).rstrip(), flush=True)

    with tempfile.TemporaryDirectory(dir=config.out_dir, prefix="resume_test.") as folder:

        def folder_with(name, checkpoint_path):
            out_dir = Path(folder) / name
            out_dir.mkdir()
            shutil.copyfile(checkpoint_path, out_dir / "ckpt.pt")
            return out_dir

        print(f"{source}: iteration {start:,}; straight to {end:,}, and with a stop at {stop:,}\n", flush=True)
        straight = continue_run(folder_with("straight", source), end)
        first = continue_run(folder_with("resumed", source), stop)
        save = Path(folder) / "save.pt"
        shutil.copyfile(Path(folder) / "resumed" / "ckpt.pt", save)
        resumed = continue_run(Path(folder) / "resumed", end)

        settings = TrainConfig(**resumed.checkpoint["config"])
        state = first.checkpoint["optimizer"]["state"]
        print(f"{'':<43} {'in the file':<26} at the first update")
        in_file = dict(weights=checksum(weights(first.checkpoint)))
        for name in ("exp_avg", "exp_avg_sq"):
            in_file[name] = checksum(s[name] for s in state.values())
        for name, title in (
            ("weights", "weights, checksum"),
            ("exp_avg", "AdamW's first moments, checksum"),
            ("exp_avg_sq", "AdamW's second moments, checksum"),
        ):
            row(in_file[name] == resumed.found[name], title, in_file[name], resumed.found[name])
        steps = {int(s["step"]) for s in state.values()}
        row(steps == resumed.found["step"], "AdamW's step counter", *(str(*s) for s in (steps, resumed.found["step"])))

        print(f"\n{'':<43} {f'iteration {stop:,}':<26} iteration {stop + 1:,}")
        counted = first.checkpoint["iter_num"] == stop and min(i for i in resumed.rows if i > stop) == stop + 1
        row(counted, "step counter", "saved", "the next one done")
        lrs = [float(resumed.rows[i]["lr"]) for i in (stop, stop + 1)]
        expected = [get_lr(settings, i) for i in (stop - 1, stop)]
        row(lrs == expected, "learning rate, as get_lr has it", *(f"{lr:.6e}" for lr in lrs))

        print(f"\n{'':<43} {f'the {config.iters} before':<26} the {config.iters} after")
        before, after = resumed.losses(start + 1, stop), resumed.losses(stop + 1, end)
        error = sum(statistics.variance(x) / len(x) for x in (before, after)) ** 0.5
        jump = statistics.mean(after) - statistics.mean(before)
        row(jump < 3 * error, "train loss, mean: no jump up", mean_and_error(before), mean_and_error(after))
        same = straight.losses(stop + 1, end) == after
        row(same, "the same losses without a stop", "", f"{'all' if same else 'not all'} {config.iters}")

        print(f"\n{'':<43} numbers that differ")
        for name, part in (("weights", weights), ("moments", moments)):
            differing, places = count_differing(part(straight.checkpoint), part(resumed.checkpoint))
            row(differing == 0, f"{name} at {end:,}, straight and resumed", f"{differing:,} of {places:,}")

        def without_moments(checkpoint):
            for s in checkpoint["optimizer"]["state"].values():
                for name in ("step", "exp_avg", "exp_avg_sq"):
                    s[name].zero_()

        def with_the_scheduler_reset(checkpoint):
            checkpoint["scheduler"]["last_epoch"] = 0

        print(f"\n{'controls, which must differ':<43} {'weights that differ':<26} {'loss above the straight run'}")
        for control in (without_moments, with_the_scheduler_reset):
            checkpoint = read_checkpoint(save)
            control(checkpoint)
            out_dir = Path(folder) / control.__name__
            out_dir.mkdir()
            write_checkpoint(out_dir / "ckpt.pt", checkpoint)
            run = continue_run(out_dir, end)
            differing, places = count_differing(weights(straight.checkpoint), weights(run.checkpoint))
            gaps = [x - y for x, y in zip(run.losses(stop + 1, end), after, strict=True)]
            name = control.__name__.replace("_", " ")
            row(differing > places / 2 and any(gaps), name, f"{100 * differing / places:.0f}%", mean_and_error(gaps))
            shutil.rmtree(out_dir)

    print(f"\nresume_test: {passed} ✓, {failed} ✗")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main(configure(ResumeTestConfig))
