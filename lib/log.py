"""
What a run prints and writes: the lines on stdout, out/log.csv, out/loss.png, and an experiment tracker if asked.

    log = RunLog(config, meta, model, iter_num, world_size)   # prints what is about to happen; a resume cuts later rows
    log.iteration(iter_num, loss, lr, grad_norm, seconds)     # a line and a row every log_interval iterations
    log.evaluation(iter_num, val_loss, val_stderr, best)      # a line, a row and the plot
    log.sync()                                                # all rows are on the disk, as safe as a checkpoint
    log.summary()

A new metric is a name in COLUMNS and a value in RunLog.iteration or RunLog.evaluation. On ranks other than 0, a RunLog
does nothing.
"""

import atexit
import contextlib
import csv
import importlib
import math
import os
import secrets
import shlex
import sys
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch

from lib.errors import first_line, silence_stdout
from lib.files import written_whole
from lib.machine import mfu, peak_memory
from lib.pictures import BLUE, GREY, ORANGE, new_picture, save_picture

COLUMNS = ["iter", "loss", "lr", "grad_norm", "val_loss", "val_stderr", "ms", "tok_per_s"]


def say(text):
    """Print on rank 0. Where stdout breaks (`| head`), say so once on stderr and be quiet: the run continues."""
    if os.environ.get("RANK", "0") != "0":
        return
    try:
        print(text, flush=True)
    except OSError as error:
        silence_stdout()
        with contextlib.suppress(OSError):
            print(f"note: no more output, stdout is gone ({error.strerror}); the run continues", file=sys.stderr)


class RunLog:
    def __init__(self, config, meta, model, iter_num, world_size):
        """Print what is about to happen, open the tracker, and cut log.csv back to the checkpoint at iter_num."""
        self.config, self.model, self.world_size = config, model, world_size
        self.resumed_at = iter_num or None
        self.bits = meta["val"]["loss_tokens"] / meta["val"]["bytes"] / math.log(2)  # per byte, for a nat per token
        self.tokens = config.batch_size * config.gradient_accumulation_steps * config.block_size  # per iteration
        self.seconds, self.last_logged = 0.0, iter_num
        self.path = Path(config.out_dir) / "log.csv"
        self.file = None
        if os.environ.get("RANK", "0") == "0":
            self.open_file(iter_num)
        if iter_num >= config.max_iters:
            return
        epochs = self.tokens * config.max_iters / meta["train"]["tokens"]
        next_save = min(config.max_iters, (iter_num // config.eval_interval + 1) * config.eval_interval)
        sharded = f", {'sharded' if world_size > 1 else 'nothing to shard'}" if config.shard else ""
        say(
            f"network     {sum(p.numel() for p in model.parameters()):,} parameters, {config.num_hidden_layers} blocks "
            f"of {config.hidden_size}\n"
            f"data        {config.dataset}: {meta['train']['tokens']:,} tokens to train on, "
            f"{meta['val']['tokens']:,} to evaluate\n"
            f"iteration   {self.tokens // config.block_size} sequences x {config.block_size} = {self.tokens:,} tokens; "
            f"{config.max_iters:,} iterations = {epochs:.2f} epochs\n"
            f"machine     {config.device} x {world_size}{sharded}, {torch.get_num_threads()} threads, {config.dtype} "
            f"(fp32 products: {torch.get_float32_matmul_precision()}), {'compiled' if config.compile else 'eager'}\n"
            f"checkpoint  {Path(config.out_dir) / 'ckpt.pt'} at iteration {next_save}, then every "
            f"{config.eval_interval}, at the last one, and on Ctrl-C"
        )
        decay = config.lr_decay_iters - (config.wsd_decay_iters if config.schedule == "wsd" else 0)
        if config.warmup_iters > min(decay, config.max_iters):
            end = f"the decay begins at {decay}" if decay < config.max_iters else f"the run ends at {config.max_iters}"
            say(f"note: the peak learning rate is never reached: warmup takes {config.warmup_iters} iterations, {end}")

    def open_file(self, iter_num):
        """
        Keep the rows of log.csv that the checkpoint at iter_num had seen. Rows of later iterations go, and so does the
        evaluation that followed the save, because a resume repeats it.
        """
        config, rows = self.config, read_log(self.path) if iter_num else []
        columns = list(dict.fromkeys([*COLUMNS, *(rows[0] if rows else ())]))  # those of another version are kept
        kept = [r for r in rows if int(r["iter"]) < iter_num or int(r["iter"]) == iter_num and not r.get("val_loss")]
        due = iter_num - iter_num % config.log_interval
        last = max((int(row["iter"]) for row in kept if row.get("loss")), default=0)
        if last < due:
            say(f"note: {self.path} has no rows from iteration {last + 1} to {due}: the curve has a gap there")
        with written_whole(self.path, "w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(kept)
        self.file = open(self.path, "a", newline="")
        self.writer = csv.DictWriter(self.file, columns)
        self.track = open_tracker(config.tracker, Path(config.out_dir), iter_num, asdict(config))

    def write(self, **row):
        if self.file:
            self.writer.writerow(row)
            self.file.flush()
            self.track(**row)

    def sync(self):
        """Flush all rows to the disk."""
        if self.file:
            os.fsync(self.file.fileno())

    def iteration(self, iter_num, loss, lr, grad_norm, seconds, last):
        """Note an update that took `seconds`; print a line every log_interval iterations and after the last."""
        self.seconds += seconds
        if iter_num % self.config.log_interval and not last:
            return
        ms = 1e3 * self.seconds / (iter_num - self.last_logged)
        tok_per_s = 1e3 * self.tokens / ms
        peak = mfu(self.model, self.config.block_size, tok_per_s / self.world_size, self.config.device)
        eta = timedelta(seconds=round((self.config.max_iters - iter_num) * ms / 1e3))
        say(
            f"iter {iter_num:6d} | loss {loss:7.4f} | lr {lr:.3e} | norm {grad_norm:7.4f} | {ms:7.1f} ms | "
            f"{tok_per_s:7,.0f} tok/s | {f'{peak:.1%} MFU | ' if peak else ''}eta {eta}"
        )
        if iter_num % self.config.log_interval == 0:
            speed = dict(ms=round(ms, 1), tok_per_s=round(tok_per_s))
            self.write(iter=iter_num, loss=loss, lr=lr, grad_norm=grad_norm, **speed)
        self.seconds, self.last_logged = 0.0, iter_num

    def evaluation(self, iter_num, val_loss, val_stderr, best):
        """Print the loss on val.bin, and draw the curve again. best: it is the lowest so far."""
        note = " (best so far)" if best else ""
        nats, bits = with_error(val_loss, val_stderr), val_loss * self.bits
        say(f"iter {iter_num:6d} | val loss {nats} nats/token = {bits:.4f} bits/byte{note}")
        self.write(iter=iter_num, val_loss=val_loss, val_stderr="" if math.isnan(val_stderr) else val_stderr)
        if self.file:
            plot_log(self.path, self.path.with_name("loss.png"), self.bits, self.resumed_at)

    def summary(self):
        """Print what happened: memory, the first and the last validation loss, where the files are."""
        if not self.file:
            return
        lines = [f"memory      {peak_memory(self.config.device):.2f} GB at most"]
        val = [row for row in read_log(self.path) if row.get("val_loss")]
        for row in (val[0], val[-1]) if val else ():
            error = with_error(float(row["val_loss"]), float(row.get("val_stderr") or "nan"))
            lines.append(f"val loss    {error} at iteration {row['iter']}")
        names = ("ckpt.pt", "log.csv", "loss.png")
        lines.append(f"files       {', '.join(str(self.path.with_name(name)) for name in names)}")
        say("\n".join(lines))


def with_error(value, error):
    """Return "4.6135 ± 0.1216", or the value alone if a single batch has no error."""
    return f"{value:.4f}" if math.isnan(error) else f"{value:.4f} ± {error:.4f}"


def resuming(ckpt_path, checkpoint, max_iters, differences, machine):
    """Return, as lines, where a resume continues and what differs: settings, and the values in `machine`."""
    iter_num = checkpoint["iter_num"]
    lines = [f"resuming at iteration {iter_num + 1}, from {ckpt_path}"]
    if iter_num >= max_iters:
        quoted = shlex.quote(str(ckpt_path.parent))
        more = f"python train.py --init_from=resume --out_dir={quoted} --max_iters={iter_num + 50}"
        lines = [
            f"{ckpt_path} is at iteration {iter_num} already: nothing to train, only the last evaluation to repeat",
            f"for more: {more}",
        ]
    lines += [f"    {line}" for line in differences]
    for name, count in checkpoint["machine"].items():
        if count != machine[name]:
            lines += [f"note: {machine[name]} {name}, {count} before: the run continues, but its bits may differ"]
    return "\n".join(lines)


def open_tracker(tracker, out_dir, iter_num, settings):
    """
    Return a function that sends a row of log.csv to trackio or wandb, and does nothing for "none". A resumed run
    continues under its name, which is in out_dir/tracker_id. log.csv stays the truth: a resume cuts the rows that its
    checkpoint has not seen, and a tracker keeps them.
    """
    if tracker == "none":
        return lambda **row: None
    module = import_tracker(tracker)
    name_path = out_dir / "tracker_id"
    if not (iter_num and name_path.is_file()):  # a new run; two may have the same out_dir, one after the other
        name_path.write_text(f"{out_dir.resolve().name}-{secrets.token_hex(4)}")
    name = name_path.read_text().strip()
    more = {"id": name} if tracker == "wandb" else {}
    module.init(project="nanosmollm", name=name, resume="allow", config=settings, **more)
    atexit.register(module.finish)
    failed = False

    def track(iter, **row):
        nonlocal failed
        try:
            if not failed:
                module.log(row, step=iter)
        except Exception as error:  # a network, a full disk, a bug of theirs: none may end a run
            failed = True
            say(f"note: {tracker} failed ({first_line(error)}): the run continues without it")

    return track


def import_tracker(tracker):
    """Import trackio or wandb. End the program with one line if the package is not installed."""
    try:
        return importlib.import_module(tracker)
    except ImportError as error:
        sys.exit(f"error: --tracker={tracker} cannot be used here ({first_line(error)}): pip install {tracker}")


def read_log(path):
    """Return the rows of log.csv as dicts of text, up to the first that is damaged; none if there is no file."""
    rows = []
    if path.exists():
        with open(path, newline="", encoding="utf-8", errors="replace") as file:
            with contextlib.suppress(ValueError, TypeError, KeyError, csv.Error):
                for row in csv.DictReader(file):
                    if int(row["iter"]) < 0 or None in row or None in row.values():
                        raise ValueError("a row with more or fewer cells than columns")
                    for name in COLUMNS[1:]:
                        float(row.get(name) or 0)
                    rows.append(row)
    return rows


def plot_log(log_path, path, bits, resumed_at):
    """
    Draw training and validation loss by iteration, from log.csv. A failure is noted and ends nothing.

    bits        bits per byte of val.bin for each nat per token, for the axis on the right
    resumed_at  iteration from which this run was resumed, for a dotted line, or None
    """
    rows = read_log(log_path)
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
