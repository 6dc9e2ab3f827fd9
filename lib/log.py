"""
Write what a run prints, out/log.csv, out/loss.png, and an experiment tracker if asked.

    print_start(source, config)                                          # where the weights come from
    log = RunLog(config, meta, model, iter_num, sequences_read, losses)  # prints the settings; a resume cuts later rows
    log.iteration(iter_num, loss, lr, grad_norm, dt, last)               # a line and a row per log_interval
    log.evaluation(iter_num, val_loss, val_stderr, best_val_loss)        # a line, a row and the plot
    log.sample(iter_num, text)
    log.sync()                                                           # flushes the rows, before a checkpoint
    log.summary()

`loss` is the mean since the last row. A new metric is a name in COLUMNS and a value in RunLog.iteration or
RunLog.evaluation. On ranks other than 0, a RunLog prints and writes nothing.
"""

import atexit
import contextlib
import csv
import importlib
import math
import os
import secrets
import shlex
import signal
import sys
import textwrap
import time
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from configurator import differences

import numpy as np
import torch

from lib.errors import first_line, silence_stdout
from lib.files import write_atomically
from lib.machine import mfu, peak_memory
from lib.pictures import BLUE, GREY, ORANGE, new_picture, save_picture
from lib.processes import get_rank

COLUMNS = ["iter", "loss", "lr", "grad_norm", "val_loss", "val_stderr", "ms", "tok_per_s"]


def say(text):
    """Print on rank 0. If stdout breaks (`| head`), say so once on stderr and be quiet: the run continues."""
    if get_rank()[0]:
        return
    try:
        print(text, flush=True)
    except OSError as error:
        silence_stdout()
        with contextlib.suppress(OSError):
            print(f"note: no more output, stdout is gone ({error.strerror}); the run continues", file=sys.stderr)


def print_start(source, config):
    """Print which weights a new run starts from, and which settings of their model it changes."""
    say(source.about if source else f"a new model with random weights, seed {config.seed}")
    for line in differences(asdict(source.config), asdict(config)) if source else ():
        say(f"    {line}")


def print_resume(checkpoint, config, machine):
    """Print where a resume continues, and its differences: settings, data order, and the values in `machine`."""
    path, iter_num, saved = Path(config.out_dir) / "ckpt.pt", checkpoint["iter_num"], checkpoint["config"]
    if iter_num >= config.max_iters:
        more = f"--init_from=resume --out_dir={shlex.quote(config.out_dir)} --max_iters={iter_num + 50}"
        say(f"{path} is at iteration {iter_num:,} already: nothing to train, only the last evaluation to repeat")
        say(f"to train longer: python train.py {more}")
    else:
        say(f"resuming at iteration {iter_num + 1:,}, from {path}: every tensor matches its checksum")
    for line in differences(saved, asdict(config)):
        say(f"    {line}")
    now, before = (c["batch_size"] * c["gradient_accumulation_steps"] for c in (asdict(config), saved))
    if now != before:
        say(f"note: an iteration reads {now} sequences, {before} before: no sequence is skipped or repeated")
    for name, count in checkpoint["machine"].items():
        if count != machine[name]:
            say(f"note: {machine[name]} {name}, {count} before: the run continues, but its bits may differ")


class RunLog:
    def __init__(self, config, meta, model, iter_num, sequences_read, losses):
        """Print the settings, open the tracker, and cut log.csv back to the checkpoint at iter_num."""
        self.config, self.model = config, model
        self.size = sum(p.numel() for p in model.parameters())
        self.bits_per_nat = meta["val"]["loss_tokens"] / meta["val"]["bytes"] / math.log(2)  # bits/byte, nats/token
        self.tokens = config.batch_size * config.gradient_accumulation_steps * config.block_size  # per iteration
        self.losses = losses  # since the last row
        self.seconds, self.last_logged, self.started = 0.0, iter_num, time.perf_counter()
        self.saved = False  # whether a checkpoint was written since the last evaluation
        self.val_losses = {}  # iteration: (val_loss, val_stderr)
        self.resumed_at = iter_num or None
        self.val_loss_before = None  # of the checkpoint that a resume starts from, by the run that wrote it
        self.path = Path(config.out_dir) / "log.csv"
        self.file = None
        rank, self.world_size = get_rank()
        if rank == 0:
            self.open_file(iter_num)
        if iter_num >= config.max_iters:
            return
        left = self.tokens * (config.max_iters - iter_num)
        epochs = (sequences_read * config.block_size + left) / meta["train"]["tokens"]
        next_save = min(config.max_iters, (iter_num // config.eval_interval + 1) * config.eval_interval)
        then = f", then every {config.eval_interval:,}" if next_save < config.max_iters else ""
        read = config.eval_iters * config.batch_size * config.block_size
        first = "now and " if iter_num % config.eval_interval == 0 else ""
        threads = torch.get_num_threads()
        processes = "1 process" if self.world_size == 1 else f"{self.world_size} processes"
        if config.shard:
            processes += ", sharded" if self.world_size > 1 else ", nothing to shard"
        matmuls = f"fp32 matmuls ({torch.get_float32_matmul_precision()})"
        if config.dtype == "bfloat16":
            matmuls = f"bf16 matmuls, fp32 weights ({torch.get_float32_matmul_precision()})"
        say(
            f"model       {self.size:,} parameters, {config.num_hidden_layers} blocks "
            f"of width {config.hidden_size}\n"
            f"data        {config.dataset}: {meta['train']['tokens']:,} training tokens, "
            f"{meta['val']['tokens']:,} validation tokens\n"
            f"iteration   {self.tokens // config.block_size} sequences x {config.block_size} = {self.tokens:,} tokens; "
            f"{config.max_iters:,} iterations = {epochs:.2f} epochs\n"
            f"machine     {config.device}, {processes}, {threads} thread{'s' if threads > 1 else ''}; {matmuls}; "
            f"{'compiled' if config.compile else 'eager'}\n"
            f"checkpoint  {Path(config.out_dir) / 'ckpt.pt'} at iteration {next_save:,}{then}, and on Ctrl-C\n"
            f"evaluation  on {read:,} tokens of val.bin, {first}after each checkpoint"
        )
        decay = config.lr_decay_iters - (config.wsd_decay_iters if config.schedule == "wsd" else 0)
        if config.warmup_iters > min(decay, config.max_iters):
            what, end = ("the decay begins", decay) if decay < config.max_iters else ("the run ends", config.max_iters)
            warmup = f"warmup takes {config.warmup_iters:,} iterations, {what} at {end:,}"
            say(f"note: the peak learning rate is never reached: {warmup}")

    def open_file(self, iter_num):
        """
        Keep the rows of log.csv that the checkpoint at iter_num had seen. Rows of later iterations go, and so does the
        evaluation that followed the save: a resume repeats it, and compares.
        """
        config, rows = self.config, read_log(self.path) if iter_num else []
        columns = list(dict.fromkeys([*COLUMNS, *(rows[0] if rows else ())]))  # an older version's columns are kept
        kept = []
        for row in rows:
            if int(row["iter"]) == iter_num and row.get("val_loss"):
                self.val_loss_before = float(row["val_loss"])
            elif int(row["iter"]) <= iter_num:
                kept.append(row)
        due = iter_num - iter_num % config.log_interval
        last = max((int(row["iter"]) for row in kept if row.get("loss")), default=0)
        if last < due:
            say(f"note: {self.path} has no rows from iteration {last + 1:,} to {due:,}: the curve has a gap there")
        with write_atomically(self.path, "w", newline="") as file:
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
        """Flush all rows to disk, because a checkpoint is being saved."""
        self.saved = True
        os.fsync(self.file.fileno())

    def iteration(self, iter_num, loss, lr, grad_norm, dt, last):
        """Note an update that took dt seconds. Print a line every log_interval iterations and after the last one."""
        self.seconds += dt
        self.losses.append(loss)
        due = iter_num % self.config.log_interval == 0
        if not (due or last):
            return
        loss = sum(self.losses) / len(self.losses)
        ms = 1e3 * self.seconds / (iter_num - self.last_logged)
        tok_per_s = 1e3 * self.tokens / ms
        peak = mfu(self.model, self.config.block_size, tok_per_s / self.world_size, self.config.device)
        eta = timedelta(seconds=round((self.config.max_iters - iter_num) * ms / 1e3))
        say(
            f"iter {iter_num:6d} | loss {loss:7.4f} | lr {lr:.3e} | grad norm {grad_norm:7.4f} | {ms:7.1f} ms | "
            f"{tok_per_s:7,.0f} tok/s | {f'{peak:.1%} MFU | ' if peak else ''}eta {eta}"
        )
        self.seconds, self.last_logged = 0.0, iter_num
        if due:
            speed = dict(ms=round(ms, 1), tok_per_s=round(tok_per_s))
            self.write(iter=iter_num, loss=loss, lr=lr, grad_norm=grad_norm, **speed)
            self.losses = []

    def evaluation(self, iter_num, val_loss, val_stderr, best_val_loss):
        """Print the loss on val.bin, and draw the curve again."""
        line = f"iter {iter_num:6d} | val loss {with_error(val_loss, val_stderr)} nats/token"
        line += f" = {val_loss * self.bits_per_nat:.4f} bits/byte"
        if iter_num == 0:
            line += f" | chance {math.log(self.config.vocab_size):.2f}"
        if val_loss > best_val_loss:
            line += f" | best so far {best_val_loss:.4f}"
        if self.saved:
            line += " | saved"
        say(line)
        self.saved = False
        self.val_losses[iter_num] = val_loss, val_stderr
        self.write(iter=iter_num, val_loss=val_loss, val_stderr="" if math.isnan(val_stderr) else val_stderr)
        if self.file:
            title = f"{self.size / 1e6:.1f}M parameters, {self.config.dataset}, on {self.config.device}"
            plot_log(self.path, self.path.with_name("loss.png"), title, self.bits_per_nat, self.resumed_at)

    def sample(self, iter_num, text):
        """Print a sample of text, indented, to show where it ends."""
        say(f"iter {iter_num:6d} | sample:\n{textwrap.indent(text, '            | ', lambda line: True)}")

    def summary(self):
        """Print the time, the memory, the first and the last validation loss, and the files."""
        if not self.file:
            return
        seconds = round(time.perf_counter() - self.started)
        say(f"time        {timedelta(seconds=seconds)}, peak memory {peak_memory(self.config.device):.2f} GB")
        for iter_num in dict.fromkeys([*list(self.val_losses)[:1], *list(self.val_losses)[-1:]]):
            say(f"val loss    {with_error(*self.val_losses[iter_num])} at iteration {iter_num:,}")
        if self.val_loss_before is not None and self.resumed_at in self.val_losses:
            before, now = self.val_loss_before, self.val_losses[self.resumed_at][0]
            same = "identical" if now == before else f"they differ by {abs(now - before):.1e}"
            say(f"resume      val loss at {self.resumed_at:,}: {before:.4f} before the stop, {now:.4f} now: {same}")
        say(f"files       {', '.join(str(self.path.with_name(name)) for name in ('ckpt.pt', 'log.csv', 'loss.png'))}")

    def stopped(self, number, iter_num):
        """Print which signal stopped the run, and how to continue."""
        out_dir = self.config.out_dir
        say(f"stopped by {signal.Signals(number).name}: iteration {iter_num:,} is in {Path(out_dir) / 'ckpt.pt'}")
        say(f"to continue: python train.py --init_from=resume --out_dir={shlex.quote(out_dir)}")


def with_error(value, error):
    """Return "4.6135 ± 0.1216", or only the value if there is a single batch, which has no error."""
    return f"{value:.4f}" if math.isnan(error) else f"{value:.4f} ± {error:.4f}"


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
    """Import trackio or wandb, or nothing for "none". Exit if the package is not installed."""
    try:
        return None if tracker == "none" else importlib.import_module(tracker)
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


def plot_log(log_path, path, title, bits_per_nat, resumed_at):
    """
    Draw training and validation loss by iteration, from log.csv. A failure is printed and does not end the run.

    bits_per_nat  bits per byte of val.bin for each nat per token, for the axis on the right
    resumed_at    iteration from which this run was resumed, for a dotted line, or None
    """
    rows = read_log(log_path)
    figure, axes = new_picture()
    train = np.array([(int(row["iter"]), float(row["loss"])) for row in rows if row.get("loss")]).reshape(-1, 2)
    val = [(int(row["iter"]), *(float(row.get(name) or "nan") for name in ("val_loss", "val_stderr"))) for row in rows]
    val = np.array(val).reshape(-1, 3)
    val = val[~np.isnan(val[:, 1])]
    ms = [float(row.get("ms") or 0) for row in rows if row.get("loss")]
    minutes = np.diff(train[:, 0], prepend=0) @ np.array(ms) / 60_000  # each ms is a mean since the row before
    axes.plot(*train.T, color=BLUE, linewidth=1.5, label="train, mean since the last log line")
    axes.errorbar(*val.T, color=ORANGE, fmt="o-", markersize=4, capsize=3, linewidth=1.5, label="val, ± standard error")
    # The first iterations fall from ln(vocab_size) and would press the rest flat: they may leave through the top.
    points = np.concatenate((train, val[:, :2]))
    later = points[points[:, 0] > points[:, 0].max(initial=0) / 20, 1]
    if len(later) > 10 and np.isfinite(later).all():
        axes.set_ylim(later.min() - 0.2, later.max() + 0.2)
    if resumed_at is not None:
        axes.axvline(resumed_at, color=GREY, linestyle=":", label="stopped and resumed")
    axes.set(xlabel="iteration", ylabel="nats per token", title=f"{title}: {minutes:.0f} minutes")
    right = axes.secondary_yaxis("right", functions=(lambda nats: nats * bits_per_nat, lambda bpb: bpb / bits_per_nat))
    right.set_ylabel("bits per byte")
    axes.legend()
    try:
        save_picture(figure, path)
    except OSError as error:
        say(f"note: {path} could not be written ({error.strerror})")
