"""
Train the network: data/<dataset>/{train,val}.bin go in; out/ckpt.pt, out/log.csv and out/loss.png come out.

    python train.py config/toy.py                           # from scratch; Ctrl-C saves and stops
    python train.py --init_from=resume --max_iters=5050     # go on from out/ckpt.pt, to the bit
    torchrun --standalone --nproc_per_node=2 train.py       # the same batch, shared by 2 processes

Settings: the defaults below < checkpoint (on resume) < config file < --flags.
"""

import csv
import math
import os
import signal
import statistics
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from batches import get_blocks, mix, open_data
from checkpoint import checkpoint_model, read_checkpoint, write_checkpoint
from configurator import configure, differences
from machine import autocast, keep_memory, peak_memory, pick_device, pick_matmul, try_compiling
from model import ModelConfig, SmolLM2
from official import describe, find_release, load_model
from tokenizer import encode, load_tokenizer


@dataclass(frozen=True)
class TrainConfig:
    """Train SmolLM2. Give a config file, flags, or both: python train.py config/nano.py --max_iters=100"""

    # where from, where to
    out_dir: str = "out"  # ckpt.pt, log.csv and loss.png go here
    dataset: str = "python"  # reads data/<dataset>/, as prepare_data.py wrote it
    init_from: str = "scratch"  # scratch, resume, or weights alone: a release's name, a folder, .gguf or ckpt.pt
    # the network: SmolLM2-135M, under the release's names
    vocab_size: int = 49_152  # tokens
    hidden_size: int = 576  # width of the residual stream
    intermediate_size: int = 1_536  # width of the MLP
    num_hidden_layers: int = 30  # blocks
    num_attention_heads: int = 9  # query heads
    num_key_value_heads: int = 3  # key/value heads, each read by as many query heads
    head_dim: int = 64  # width of a head
    max_position_embeddings: int = 8_192  # the context: longest sequence the network will ever read
    rope_theta: float = 100_000.0  # base of the rotary frequencies
    rms_norm_eps: float = 1e-5  # added under the root of RMSNorm
    initializer_range: float = 1 / 24  # standard deviation of the initial weights
    # the batch: batch_size * gradient_accumulation_steps sequences of block_size tokens an iteration
    batch_size: int = 4  # sequences at once in a process: as many as memory holds
    block_size: int = 256  # tokens in a sequence
    gradient_accumulation_steps: int = 1  # such batches summed into one update
    # AdamW
    max_iters: int = 5_000  # updates in all, those before a resume included
    learning_rate: float = 3e-4  # at its highest
    weight_decay: float = 0.1  # on matrices only
    beta1: float = 0.9  # decay of the first moment
    beta2: float = 0.95  # decay of the second moment
    grad_clip: float = 1.0  # largest norm of the gradient; 0 leaves it alone
    # the learning rate's way: up, and down again
    schedule: Literal["cosine", "wsd"] = "cosine"  # wsd: warmup, stable, then linear decay
    warmup_iters: int = 200  # linear from 0 up to learning_rate
    lr_decay_iters: int = 5_000  # min_lr from here on; its own setting, so more max_iters do not bend the curve
    min_lr: float = 3e-5  # a tenth of learning_rate is usual
    wsd_decay_iters: int = 500  # wsd alone: length of the decay, which ends at lr_decay_iters
    # what is looked at, and how often
    log_interval: int = 10  # iterations between lines of the log
    eval_interval: int = 500  # iterations between checkpoints, each followed by an evaluation
    eval_iters: int = 40  # batches of val.bin in an evaluation, always the same ones
    sample_interval: int = 500  # iterations between samples of text; 0 for none
    sample_prompt: str = "The"  # what they begin with
    sample_tokens: int = 64  # how long they are
    # the machine
    seed: int = 1337  # of the initial weights, the order of the data, the samples
    device: str = "auto"  # auto (cuda, then mps, then cpu), cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the matrix products; weights stay fp32; auto measures
    float32_matmul_precision: Literal["auto", "highest", "medium"] = "auto"  # torch's; on a CPU: MKL or oneDNN
    compile: bool = False  # torch.compile each block: slower to start, faster to run
    checkpoint_blocks: bool = False  # keep a block's input alone for backward, and run it again: memory for time


# ---------------------------------------------------------------------------------------------
# The learning rate, the settings saved, the log, the plot


def get_lr(config, iter_num):
    """Learning rate of the update that follows iter_num updates; nothing but the settings goes in."""
    if iter_num < config.warmup_iters:
        return config.learning_rate * (iter_num + 1) / config.warmup_iters
    if config.schedule == "cosine":
        length = config.lr_decay_iters - config.warmup_iters
        done = (iter_num - config.warmup_iters) / max(1, length)
        share = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    else:
        left = (config.lr_decay_iters - iter_num) / max(1, config.wsd_decay_iters)
        share = min(1.0, max(0.0, left))
    return config.min_lr + share * (config.learning_rate - config.min_lr)


def saved_settings(config):
    """For configure(): on resume, the settings in out_dir's checkpoint."""
    if config.init_from != "resume":
        return {}
    known = {field.name for field in fields(TrainConfig)}
    saved = read_checkpoint(Path(config.out_dir) / "ckpt.pt", mmap=True)["config"]
    return {name: value for name, value in saved.items() if name in known} | {"out_dir": config.out_dir}


COLUMNS = ["iter", "loss", "lr", "grad_norm", "val_loss", "ms", "tok_per_s"]


def open_log(path, iter_num):
    """
    log.csv, open for more rows. Of what is there, only what the checkpoint at iter_num had seen stays:
    not the rows of later iterations, nor the evaluation that follows the save. Those come again.
    """
    kept = [COLUMNS]
    if iter_num > 0 and path.exists():
        for row in csv.reader(path.read_text().splitlines()[1:]):
            whole = len(row) == len(COLUMNS) and row[0].isdigit()
            if whole and int(row[0]) <= iter_num and not (int(row[0]) == iter_num and row[4]):
                kept.append(row)
    unfinished = path.with_name(path.name + ".tmp")
    with open(unfinished, "w", newline="") as file:
        csv.writer(file).writerows(kept)
    os.replace(unfinished, path)
    return open(path, "a", newline="")


def plot_log(log_path, path):
    """loss.png: training and validation loss by iteration, from log.csv."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with open(log_path, newline="") as file:
        rows = list(csv.DictReader(file))
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for column, label, style in (("loss", "train (one batch)", "-"), ("val_loss", "val", "o-")):
        points = [(int(row["iter"]), float(row[column])) for row in rows if row[column]]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1, markersize=4)
    axes.set(xlabel="iteration", ylabel="loss, nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    unfinished = path.with_name("unfinished." + path.name)
    figure.savefig(unfinished, dpi=120)
    plt.close(figure)
    os.replace(unfinished, path)


def summary(log_path, resumed_at):
    """What log.csv tells of a run, as lines: where the loss went, and whether it jumped at the resume."""
    with open(log_path, newline="") as file:
        rows = list(csv.DictReader(file))
    val = [(row["iter"], float(row["val_loss"])) for row in rows if row["val_loss"]]
    lines = [f"val loss    {loss:.4f} at iteration {iter_num}" for iter_num, loss in (val[0], val[-1])] if val else []
    if resumed_at is not None:
        losses = [(int(row["iter"]), float(row["loss"])) for row in rows if row["loss"]]
        before = [loss for iter_num, loss in losses if iter_num <= resumed_at][-5:]
        after = [loss for iter_num, loss in losses if iter_num > resumed_at][:5]
        for when, some in (("before", before), ("after", after)):
            if len(some) > 1:
                mean, error = statistics.mean(some), statistics.stdev(some) / len(some) ** 0.5
                numbers = " ".join(f"{loss:.4f}" for loss in some)
                lines.append(
                    f"resume      train loss {when}: {numbers}, mean {mean:.2f} +- {error:.2f} (standard error)"
                )
    return [*lines, f"files       {', '.join(str(log_path.with_name(n)) for n in ('ckpt.pt', 'log.csv', 'loss.png'))}"]


def settle(config, device, world_size):
    """`config` with what depends on the machine resolved; ends the program if a setting cannot be."""
    for name in (
        "batch_size",
        "block_size",
        "gradient_accumulation_steps",
        "log_interval",
        "eval_interval",
        "eval_iters",
    ):
        if getattr(config, name) < 1:
            sys.exit(f"error: {name} is {getattr(config, name)}: it must be at least 1")
    sequences = config.batch_size * config.gradient_accumulation_steps
    if sequences % world_size:
        sys.exit(f"error: batch_size x gradient_accumulation_steps is {sequences}, not to be shared by {world_size}")
    matmul = [pick_matmul(config.dtype, config.float32_matmul_precision, device)]
    if world_size > 1:
        dist.broadcast_object_list(matmul)  # two processes may measure two things
    device = device.split(":")[0] if config.device == "auto" else config.device
    return replace(config, device=device, dtype=matmul[0][0], float32_matmul_precision=matmul[0][1])


def load_weights(init_from, say):
    """SmolLM2 from a ckpt.pt or from any --official= source: its weights alone, for a new run."""
    if init_from.endswith(".pt"):
        return checkpoint_model(read_checkpoint(init_from))
    release = find_release(init_from)
    say(describe(release))
    return load_model(release)


# ---------------------------------------------------------------------------------------------


def train(config):
    # ---- Processes: one, or as many as torchrun started. Rank 0 speaks and writes.
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(config.device, int(os.environ.get("LOCAL_RANK", 0)))
    if world_size > 1:
        dist.init_process_group("nccl" if "cuda" in device else "gloo", timeout=timedelta(minutes=30))
    bar = tqdm(total=config.max_iters, disable=True if rank else None, unit="it", dynamic_ncols=True)

    def say(*lines):
        if rank == 0:
            for line in lines:
                bar.write(str(line))
            sys.stdout.flush()

    # ---- Settings: those that depend on the machine are settled here, once, and stored as found.
    out_dir = Path(config.out_dir)
    ckpt_path, log_path = out_dir / "ckpt.pt", out_dir / "log.csv"
    resume = read_checkpoint(ckpt_path) if config.init_from == "resume" else None
    if resume:
        if resume["iter_num"] >= config.max_iters:
            say(
                f"{ckpt_path} is at iteration {resume['iter_num']}, and max_iters is {config.max_iters}: nothing to do."
            )
            say(f"For more: --init_from=resume --max_iters={resume['iter_num'] + 50}")
            return 0
        config = replace(config, init_from=resume["config"]["init_from"])  # how the run began stays on record
    config = settle(config, device, world_size)
    torch.set_float32_matmul_precision(config.float32_matmul_precision)
    keep_memory()
    sequences = config.batch_size * config.gradient_accumulation_steps  # an iteration, in all processes together
    tokens = sequences * config.block_size
    train_data, val_data, meta = open_data(config.dataset, config.vocab_size, config.block_size)
    data_sha256 = {split: meta[split]["sha256"] for split in ("train", "val")}

    # ---- The state: model, optimizer, scheduler, iter_num, best_val_loss. All that a run is, is in here.
    torch.manual_seed(config.seed)
    shape = {field.name: getattr(config, field.name) for field in fields(ModelConfig)}
    if config.init_from == "scratch" or resume:
        try:
            model = SmolLM2(ModelConfig(**shape))
        except ValueError as error:
            sys.exit(f"error: {error}")
    else:
        model = load_weights(config.init_from, say)
        config = replace(config, **asdict(model.config))
    if config.block_size > config.max_position_embeddings:
        sys.exit(
            f"error: block_size {config.block_size} is longer than the context: "
            f"raise max_position_embeddings ({config.max_position_embeddings}), or lower block_size"
        )
    model.to(device)
    model.checkpoint_blocks = config.checkpoint_blocks
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() != 2]
    groups = [dict(params=matrices, weight_decay=config.weight_decay), dict(params=vectors, weight_decay=0.0)]
    # The rate itself comes from the scheduler: its factor of 1.0 is the learning rate.
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(config.beta1, config.beta2), eps=1e-8, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda iter_num: get_lr(config, iter_num))
    iter_num, best_val_loss, resumed_at = 0, math.inf, None

    if resume:
        for name in shape:
            if resume["config"][name] != shape[name] and name not in ("max_position_embeddings", "initializer_range"):
                sys.exit(f"error: {name} is {shape[name]}, but {ckpt_path} was trained with {resume['config'][name]}")
        if resume["data"] != data_sha256:
            sys.exit(
                f"error: data/{config.dataset} is not what {ckpt_path} was trained on: "
                f"prepare {resume['config']['dataset']} again, or begin anew with --init_from={ckpt_path}"
            )
        model.load_state_dict(resume["model"])
        optimizer.load_state_dict(resume["optimizer"])
        scheduler.load_state_dict(resume["scheduler"])
        iter_num, best_val_loss = resume["iter_num"], resume["best_val_loss"]
        resumed_at = iter_num
        # A setting changed by flag or file holds from here on, rather than the one that was saved.
        for group, decay in zip(optimizer.param_groups, (config.weight_decay, 0.0), strict=True):
            group.update(weight_decay=decay, betas=(config.beta1, config.beta2), lr=get_lr(config, iter_num))
        changed = differences(resume["config"], asdict(config))
        say(f"resuming at iteration {iter_num + 1}, from {ckpt_path}", *(f"    {line}" for line in changed))
        del resume

    # ---- What computes: autocast for the matrix products, compiled blocks, one copy a process.
    def try_step():
        x = torch.zeros(config.batch_size, config.block_size, dtype=torch.int64, device=device)
        with autocast(device, config.dtype):
            loss = model(x, x)
        loss.backward()
        model.zero_grad(set_to_none=True)

    if config.compile:
        config = replace(config, compile=try_compiling(model, try_step, say))
    network = model
    if world_size > 1:
        network = DistributedDataParallel(model, forward_sync_buffers=False)

    def get_batch(data, split_number, first, count):
        x, y = get_blocks(data, first, count, config.block_size, mix(config.seed, split_number))
        if "cuda" in device:
            return x.pin_memory().to(device, non_blocking=True), y.pin_memory().to(device, non_blocking=True)
        return x.to(device), y.to(device)

    @torch.no_grad()
    def evaluate():
        """Mean loss over eval_iters batches of val.bin, the same ones every time."""
        total = torch.zeros((), device=device)
        for i in range(rank, config.eval_iters, world_size):
            x, y = get_batch(val_data, 1, i * config.batch_size, config.batch_size)
            with autocast(device, config.dtype):
                total += model(x, y)
        if world_size > 1:
            dist.all_reduce(total)
        return total.item() / config.eval_iters

    def sample():
        """A text that begins with sample_prompt, drawn with a generator of its own."""
        ids = encode(tokenizer, config.sample_prompt)
        idx = torch.tensor([ids], device=device)
        generator = torch.Generator(device).manual_seed(mix(config.seed, iter_num) >> 1)
        with autocast(device, config.dtype), torch.compiler.set_stance("force_eager"):
            new = model.generate(idx, config.sample_tokens, temperature=0.8, top_k=50, generator=generator)
            return tokenizer.decode(ids + [i.item() for i in new])

    def save():
        if rank == 0:
            checkpoint = dict(model=model.state_dict(), optimizer=optimizer.state_dict())
            checkpoint |= dict(scheduler=scheduler.state_dict(), iter_num=iter_num, best_val_loss=best_val_loss)
            write_checkpoint(ckpt_path, checkpoint | dict(config=asdict(config), data=data_sha256))

    def log_row(**values):
        if rank == 0:
            csv.DictWriter(log, COLUMNS).writerow(dict(iter=iter_num) | values)
            log.flush()

    # ---- Ctrl-C and SIGTERM are noted, and heeded when the iteration is whole. A second one kills.
    stop_signal = 0

    def note_signal(number, _):
        nonlocal stop_signal
        stop_signal = number
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note_signal)

    # ---- Before the first line of the log: what is about to happen.
    tokenizer = load_tokenizer() if config.sample_interval and rank == 0 else None
    if rank == 0:
        out_dir.mkdir(parents=True, exist_ok=True)
        if iter_num == 0 and ckpt_path.exists():  # a finished run is not lost to a repeated command
            for path in (ckpt_path, log_path):
                if path.exists():
                    os.replace(path, path.with_stem(path.stem + ".previous"))
            say(f"{ckpt_path} of an earlier run is kept as {out_dir / 'ckpt.previous.pt'}")
        log = open_log(log_path, iter_num)
    parameters = sum(p.numel() for p in model.parameters())
    epochs = tokens * config.max_iters / meta["train"]["tokens"]
    next_save = min(config.max_iters, (iter_num // config.eval_interval + 1) * config.eval_interval)
    say(
        f"network     {parameters:,} parameters, {config.num_hidden_layers} blocks of {config.hidden_size}",
        f"data        {config.dataset}: {meta['train']['tokens']:,} tokens to train on, {meta['val']['tokens']:,} to "
        "evaluate",
        f"iteration   {sequences} sequences x {config.block_size} = {tokens:,} tokens; {config.max_iters:,} iterations "
        f"= {epochs:.2f} epochs",
        f"machine     {config.device} x {world_size}, {torch.get_num_threads()} threads, {config.dtype} "
        f"(fp32 products: {config.float32_matmul_precision}), {'compiled' if config.compile else 'eager'}",
        f"checkpoint  {ckpt_path} at iteration {next_save}, then every {config.eval_interval}, at the last one, and "
        "on Ctrl-C",
    )

    # ---- The loop
    bar.n = iter_num
    seconds, last_logged = 0.0, iter_num
    while True:
        done = iter_num >= config.max_iters
        if iter_num % config.eval_interval == 0 or done:
            val_loss = evaluate()
            best = " (best so far)" if val_loss < best_val_loss else ""
            best_val_loss = min(val_loss, best_val_loss)
            bits = val_loss / math.log(2) * meta["val"]["tokens"] / meta["val"]["bytes"]
            say(f"iter {iter_num:6d} | val loss {val_loss:.4f} nats/token = {bits:.4f} bits/byte{best}")
            log_row(val_loss=val_loss)
            if rank == 0:
                plot_log(log_path, out_dir / "loss.png")
        if rank == 0 and config.sample_interval and (iter_num % config.sample_interval == 0 or done):
            say(f"iter {iter_num:6d} | sample: {sample()}")
        if done:
            break

        start = time.perf_counter()
        count = sequences // world_size  # this process's share of the batch
        x, y = get_batch(train_data, 0, iter_num * sequences + rank * count, count)
        loss = torch.zeros((), device=device)
        for i in range(0, count, config.batch_size):
            share = min(config.batch_size, count - i) / count
            last = i + config.batch_size >= count
            # gradients travel between processes once an iteration, with the last backward
            with nullcontext() if world_size == 1 or last else network.no_sync():
                with autocast(device, config.dtype):
                    part = network(x[i : i + config.batch_size], y[i : i + config.batch_size]) * share
                part.backward()
            loss += part.detach()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
        told = torch.stack((loss, loss.new_tensor(float(stop_signal > 0))))
        if world_size > 1:  # all processes must agree on the loss, and on whether this iteration is the last
            dist.all_reduce(told)
        loss, stopping = told[0].item() / world_size, told[1].item() > 0
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            kept = f"{ckpt_path} is untouched" if ckpt_path.exists() else "nothing was saved yet"
            sys.exit(
                f"error: loss {loss} and gradient norm {grad_norm:.4g} at iteration {iter_num + 1}: {kept}; "
                "lower learning_rate, or raise warmup_iters"
            )
        lr = optimizer.param_groups[0]["lr"]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        scheduler.step()
        iter_num += 1
        seconds += time.perf_counter() - start

        bar.update()
        if iter_num % config.log_interval == 0 or iter_num == config.max_iters or stopping:
            ms, tok_per_s = 1e3 * seconds / (iter_num - last_logged), tokens * (iter_num - last_logged) / seconds
            eta = timedelta(seconds=round((config.max_iters - iter_num) * ms / 1e3))
            say(
                f"iter {iter_num:6d} | loss {loss:7.4f} | lr {lr:.3e} | norm {grad_norm:7.4f} | {ms:7.1f} ms | "
                f"{tok_per_s:7,.0f} tok/s | eta {eta}"
            )
            if iter_num % config.log_interval == 0:
                log_row(loss=loss, lr=lr, grad_norm=grad_norm.item(), ms=round(ms, 1), tok_per_s=round(tok_per_s))
            seconds, last_logged = 0.0, iter_num
        if iter_num % config.eval_interval == 0 or iter_num == config.max_iters or stopping:
            save()  # before the evaluation, which may fail for want of memory
        if stopping:
            break
    bar.close()
    if rank == 0:
        say(f"parameters  {parameters:,}", f"memory      {peak_memory(device):.2f} GB at most")
        say(*summary(log_path, resumed_at))
    if world_size > 1:
        dist.barrier()  # none leaves while another still writes
        dist.destroy_process_group()
    if done:
        return 0
    say(
        f"stopped by {signal.Signals(stop_signal or signal.SIGTERM).name}: iteration {iter_num} is in {ckpt_path}; "
        f"to go on: python train.py --init_from=resume --out_dir={config.out_dir}"
    )
    return 128 + (stop_signal or signal.SIGTERM)


def main(config):
    try:
        sys.exit(train(config))
    except OSError as error:  # of the log, the plot or their folder; a checkpoint tells its own
        where = error.filename or config.out_dir
        sys.exit(f"error: {where}: {error.strerror or error}: free some disk, or give another --out_dir")
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        sys.exit(
            f"error: out of memory: lower batch_size ({config.batch_size}) and raise gradient_accumulation_steps "
            f"({config.gradient_accumulation_steps}) as much, or lower block_size ({config.block_size})"
        )


if __name__ == "__main__":
    main(configure(TrainConfig, saved=saved_settings))
