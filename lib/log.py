"""
What a run tells: the lines it opens and closes with, out/log.csv, and the curve drawn from it.

    log, sync_log = open_log("out/log.csv", iter_num, log_interval=10, say=print)    # a resume first cuts later rows
    log(iter=10, loss=9.8, lr=3e-4)                       # one row; a metric not given stays empty
    sync_log()                                            # all rows are on the disk, as safe as a checkpoint
    plot_log("out/log.csv", "out/loss.png", bits, resumed_at, print)

A new metric is a name in COLUMNS and a value in train.py's call of log().
"""

import contextlib
import csv
import os
import re
import shutil
import statistics
import sys
from pathlib import Path

import numpy as np
import torch

from lib.errors import silence_stdout
from lib.files import written_whole
from lib.machine import peak_memory
from lib.pictures import BLUE, GREY, ORANGE, new_picture, save_picture

COLUMNS = ["iter", "loss", "lr", "grad_norm", "val_loss", "val_stderr", "ms", "tok_per_s"]


def opening(config, meta, model, iter_num, world_size):
    """What is about to happen, in a few lines."""
    parameters = sum(p.numel() for p in model.parameters())
    sequences = config.batch_size * config.gradient_accumulation_steps
    tokens = sequences * config.block_size
    epochs = tokens * config.max_iters / meta["train"]["tokens"]
    next_save = min(config.max_iters, (iter_num // config.eval_interval + 1) * config.eval_interval)
    sharded = f", {'sharded' if world_size > 1 else 'nothing to shard'}" if config.shard else ""
    lines = [
        f"network     {parameters:,} parameters, {config.num_hidden_layers} blocks of {config.hidden_size}",
        f"data        {config.dataset}: {meta['train']['tokens']:,} tokens to train on, {meta['val']['tokens']:,} to "
        "evaluate",
        f"iteration   {sequences} sequences x {config.block_size} = {tokens:,} tokens; {config.max_iters:,} iterations "
        f"= {epochs:.2f} epochs",
        f"machine     {config.device} x {world_size}{sharded}, {torch.get_num_threads()} threads, {config.dtype} "
        f"(fp32 products: {config.float32_matmul_precision}), {'compiled' if config.compile else 'eager'}",
        f"checkpoint  {Path(config.out_dir) / 'ckpt.pt'} at iteration {next_save}, then every {config.eval_interval}, "
        "at the last one, and on Ctrl-C",
    ]
    return "\n".join(lines)


def resuming(ckpt_path, checkpoint, max_iters, differences, machine):
    """What a resume continues from, and what differs from before: settings, as lines, and the counts in `machine`."""
    iter_num = checkpoint["iter_num"]
    lines = [f"resuming at iteration {iter_num + 1}, from {ckpt_path}"]
    if iter_num >= max_iters:
        more = f"python train.py --init_from=resume --out_dir={ckpt_path.parent} --max_iters={iter_num + 50}"
        lines = [
            f"{ckpt_path} is at iteration {iter_num} already: nothing to train, only the last evaluation to repeat"
        ]
        lines += [f"for more: {more}"]
    lines += [f"    {line}" for line in differences]
    for name, count in checkpoint["machine"].items():
        if count != machine.get(name):
            lines += [f"note: {machine.get(name)} {name}, {count} before: the run continues, but its bits may differ"]
    return "\n".join(lines)


def printer(bar):
    """A function that prints text above the progress bar. Where stdout breaks (`| head`), it says so and is quiet."""

    def say(text):
        try:
            bar.write(text)
            sys.stdout.flush()
        except OSError as error:
            silence_stdout()
            with contextlib.suppress(OSError):
                print(f"note: no more output, stdout is gone ({error.strerror}); the run continues", file=sys.stderr)

    return say


def open_log(path, iter_num, log_interval, say, track=lambda **row: None):
    """
    Two functions: log(**values) appends a row to log.csv and gives it to track(), and sync_log() flushes all rows to
    the disk. First, the file is cut back to what the checkpoint at iter_num had seen: rows of later iterations go, and
    so does the evaluation that followed the save, because a resume repeats it. Columns this version does not know are
    kept. Rows that are missing or cannot be read are told with say().
    """
    columns, kept = COLUMNS, []
    if iter_num > 0:
        found, rows, unreadable = read_log(path)
        columns = COLUMNS + [name for name in found if name not in COLUMNS]
        for row in rows:
            if int(row["iter"]) < iter_num or int(row["iter"]) == iter_num and not row.get("val_loss"):
                kept.append(row)
        if unreadable:
            copy = path.with_name("log.unreadable.csv")
            shutil.copyfile(path, copy)
            say(f"note: {unreadable} rows of {path} cannot be read and are left out; the whole file is kept as {copy}")
        due = iter_num - iter_num % log_interval
        last = max((int(row["iter"]) for row in kept if row.get("loss")), default=0)
        if last < due:
            say(f"note: {path} has no rows from iteration {last + 1} to {due}: the curve has a gap there")
    with written_whole(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(kept)
    file = open(path, "a", newline="")

    def log(**values):
        csv.DictWriter(file, columns).writerow(values)
        file.flush()
        track(**values)

    return log, lambda: os.fsync(file.fileno())


def read_log(path):
    """(columns, rows as dicts of text, number of rows that cannot be read) of log.csv; nothing if there is none."""
    rows, unreadable, columns = [], 0, []
    if not path.exists():
        return columns, rows, unreadable
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        lines = file.read().replace("\0", "\ufffd").splitlines()
    for number, line in enumerate(lines):
        cells = next(csv.reader([line[:10_000]], strict=False), [])
        if number == 0:
            columns = cells
            continue
        row = dict(zip(columns, cells, strict=False))
        numbers = [row.get(name) or "0" for name in COLUMNS[1:]]
        whole = len(cells) == len(columns) and re.fullmatch(r"[0-9]{1,18}", row.get("iter", ""))
        if whole and all(map(is_float, numbers)):
            rows.append(row)
        elif number < len(lines) - 1:  # a death may leave the last row half written, and a resume repeats it
            unreadable += 1
    return columns, rows, unreadable


def is_float(text):
    """Whether a cell of log.csv holds a number. float() alone would also take the digits of other scripts."""
    try:
        float(text)
    except ValueError:
        return False
    return text.isascii()


def plot_log(log_path, path, bits, resumed_at, say):
    """
    Draw training and validation loss by iteration, from log.csv. A failure is told with say() and ends nothing.

    bits        bits per byte of val.bin for each nat per token, for the axis on the right
    resumed_at  iteration from which this run was resumed, for a dotted line, or None
    """
    _, rows, _ = read_log(log_path)
    figure, axes = new_picture()
    train = np.array([(int(row["iter"]), float(row["loss"])) for row in rows if row.get("loss")]).reshape(-1, 2)
    val = [(int(row["iter"]), *(float(row.get(name) or "nan") for name in ("val_loss", "val_stderr"))) for row in rows]
    val = np.array(val).reshape(-1, 3)
    val = val[~np.isnan(val[:, 1])]
    axes.plot(*train.T, color=BLUE, alpha=0.25, linewidth=1, label="train, one batch")
    window = len(train) // 25
    if window > 1:
        iters, loss = (np.convolve(column, np.ones(window) / window, "valid") for column in train.T)
        width = round(window * (train[-1, 0] - train[0, 0]) / (len(train) - 1))
        axes.plot(iters, loss, color=BLUE, linewidth=2, label=f"train, mean of {width:,} iterations")
    axes.errorbar(*val.T, color=ORANGE, fmt="o-", markersize=4, capsize=3, linewidth=1.5, label="val, ± standard error")
    # The first iterations fall from ln(vocab_size) and would press the rest flat: they may leave through the top.
    points = np.concatenate((train, val[:, :2]))
    later = points[points[:, 0] > points[:, 0].max(initial=0) / 20, 1]
    if len(later) > 10 and np.isfinite(later).all():
        axes.set_ylim(later.min() - 0.2, later.max() + 0.2)
    if resumed_at is not None:
        axes.axvline(resumed_at, color=GREY, linestyle=":", label="resumed")
    axes.set(xlabel="iteration", ylabel="nats per token")
    right = axes.secondary_yaxis("right", functions=(lambda nats: nats * bits, lambda bpb: bpb / bits))
    right.set_ylabel("bits per byte")
    axes.legend()
    try:
        save_picture(figure, path)
    except OSError as error:
        say(f"note: {path} could not be written ({error.strerror})")


def closing(out_dir, model, device, resumed_at):
    """What happened, in a few lines: memory, first and last validation loss, train loss before and after a resume."""
    _, rows, _ = read_log(out_dir / "log.csv")
    lines = [f"parameters  {sum(p.numel() for p in model.parameters()):,}"]
    lines.append(f"memory      {peak_memory(device):.2f} GB at most")
    val = [row for row in rows if row.get("val_loss")]
    for row in (val[0], val[-1]) if val else ():
        error = float(row.get("val_stderr") or "nan")
        lines.append(f"val loss    {float(row['val_loss']):.4f} ± {error:.4f} at iteration {row['iter']}")
    if resumed_at is not None:
        losses = [(int(row["iter"]), float(row["loss"])) for row in rows if row.get("loss")]
        before = [loss for iter_num, loss in losses if iter_num <= resumed_at][-5:]
        after = [loss for iter_num, loss in losses if iter_num > resumed_at][:5]
        for when, some in (("before", before), ("after", after)):
            if len(some) > 1:
                mean, error = statistics.mean(some), statistics.stdev(some) / len(some) ** 0.5
                numbers = " ".join(f"{loss:.4f}" for loss in some)
                lines.append(
                    f"resume      train loss {when}: {numbers}, mean {mean:.2f} ± {error:.2f} (standard error)"
                )
    lines.append(f"files       {', '.join(str(out_dir / name) for name in ('ckpt.pt', 'log.csv', 'loss.png'))}")
    return "\n".join(lines)
