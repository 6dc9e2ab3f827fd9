"""
Train the network: data/<dataset>/{train,val}.bin go in; out/ckpt.pt, out/log.csv and out/loss.png come out.

    python train.py config/toy.py                           # from scratch; Ctrl-C saves and stops
    python train.py --init_from=resume --max_iters=5050     # continue from out/ckpt.pt, to the bit
    torchrun --standalone --nproc_per_node=2 train.py       # the same batches, shared by 2 processes

Settings: the defaults below < checkpoint (on resume) < config file < --flags.
"""

import math
import os
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import ClassVar, Literal

import torch
import torch.distributed as dist
from tqdm import tqdm

from configurator import configure, differences
from lib.batches import get_blocks, mix
from lib.checkpoint import check_state, read_checkpoint, refuse_earlier_run, remove_earlier_run, write_checkpoint
from lib.dataset import open_data
from lib.errors import one_line_errors
from lib.estimates import ratio
from lib.files import owned_folder
from lib.log import closing, open_log, opening, plot_log, printer, resuming
from lib.machine import autocast, check_compiled, keep_memory, mfu, pick_matmul, to_device, try_compiling
from lib.optimizer import build_optimizer, load_optimizer
from lib.parallel import clip_gradient, data_parallel, exchange_gradients, shard, to_parts, to_whole
from lib.processes import end_on_signals, end_processes, note_signals, start_processes
from lib.tokenizer import END_OF_TEXT, encode, known_ids, load_tokenizer
from lib.trackers import open_tracker
from lib.weights import check_shapes, checkpoint_config, find_weights, load_network
from model import ModelConfig, SmolLM2


@dataclass(frozen=True)
class TrainConfig(ModelConfig):
    """Train SmolLM2. Give a config file, flags, or both: python train.py config/nano.py --max_iters=100"""

    # input and output; the network's own settings are ModelConfig's
    out_dir: str = "out"  # ckpt.pt, log.csv and loss.png go here
    dataset: str = "python"  # reads <data_dir>/<dataset>/, as prepare_data.py wrote it
    data_dir: str = "data"  # where prepared datasets are
    init_from: str = "scratch"  # scratch, resume, or weights alone: a release's name, a folder, a .gguf, a ckpt.pt
    overwrite: bool = False  # start over in an out_dir that holds an earlier run, which is then lost
    # batch: batch_size * gradient_accumulation_steps sequences of block_size tokens per iteration
    batch_size: int = 4  # sequences at once in one process: as many as fit in memory
    block_size: int = 256  # tokens per sequence
    gradient_accumulation_steps: int = 1  # micro-batches summed into one update
    # optimizer
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: on the blocks' matrices, AdamW on the embedding and the norms
    muon_learning_rate: float | None = None  # the highest, of those matrices; by default learning_rate
    max_iters: int = 5_000  # updates in all, including those before a resume
    learning_rate: float = 3e-4  # the highest, after warmup
    weight_decay: float = 0.1  # on matrices only
    beta1: float = 0.9  # decay of the first moment
    beta2: float = 0.95  # decay of the second moment
    grad_clip: float = 1.0  # clip the gradient's norm to this; 0 for no clipping
    # learning-rate schedule
    schedule: Literal["cosine", "wsd"] = "cosine"  # wsd: warmup, stable, then linear decay
    warmup_iters: int = 200  # linear warmup from 0 to learning_rate
    lr_decay_iters: int = 5_000  # min_lr from here on; a setting of its own, so max_iters does not bend the curve
    min_lr: float | None = None  # the lowest, at the end; by default a tenth of learning_rate
    wsd_decay_iters: int = 500  # wsd only: length of the decay, which ends at lr_decay_iters
    # logging, evaluation, sampling
    log_interval: int = 10  # iterations between log lines
    tracker: Literal["none", "trackio", "wandb", "tensorboard"] = "none"  # sends the rows of log.csv there as well
    eval_interval: int = 500  # iterations between checkpoints, each followed by an evaluation
    eval_iters: int = 40  # batches of val.bin per evaluation, always the same ones
    save_best: bool = False  # keep the weights with the lowest val loss in best.pt, for runs that overfit
    sample_interval: int = 500  # iterations between samples of text; 0 for none
    sample_prompt: str = "The"  # how they begin
    sample_tokens: int = 64  # how long they are
    # the machine
    seed: int = 1337  # of the initial weights, the order of the data, the samples
    device: str = "auto"  # auto (cuda, then mps, then cpu), cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of matrix products; weights stay fp32; auto measures
    float32_matmul_precision: Literal["auto", "highest", "high", "medium"] = "auto"  # torch's; CPU: MKL, -, oneDNN
    compile: bool = False  # torch.compile each block: slower to start, faster to run
    activation_checkpointing: bool = False  # store only each block's input, recompute the rest in backward
    shard: bool = False  # with torchrun: divide weights, gradients and moments among the processes (FSDP2)

    LIMITS: ClassVar = ModelConfig.LIMITS | {
        "batch_size": (1, 2**24), "block_size": (1, 2**24), "gradient_accumulation_steps": (1, 2**24),
        "max_iters": (1, 10**12), "learning_rate": (0.0, 100.0), "weight_decay": (0.0, 100.0), "beta1": (0.0, 0.999999),
        "beta2": (0.0, 0.999999), "grad_clip": (0.0, 1e9), "warmup_iters": (0, 10**12), "lr_decay_iters": (0, 10**12),
        "wsd_decay_iters": (0, 10**12), "log_interval": (1, 10**12), "eval_interval": (1, 10**12),
        "eval_iters": (1, 10**9), "sample_interval": (0, 10**12), "sample_tokens": (1, 10**6), "seed": (0, 2**63),
    }  # fmt: skip

    def __post_init__(self):
        super().__post_init__()
        lowest = self.learning_rate / 10 if self.min_lr is None else self.min_lr
        if not 0 <= lowest <= self.learning_rate:
            raise ValueError(
                f"min_lr is {lowest:g}: it must lie between 0 and learning_rate ({self.learning_rate:g}), "
                f"for example --min_lr={self.learning_rate / 10:g}"
            )
        if self.muon_learning_rate is not None and not (0 <= self.muon_learning_rate <= 100 and self.learning_rate):
            raise ValueError(
                f"muon_learning_rate is {self.muon_learning_rate!r}: it must be a number from 0 to 100, "
                "beside a learning_rate above 0"
            )
        if self.block_size > self.max_position_embeddings:
            raise ValueError(
                f"block_size {self.block_size} is longer than the context: "
                f"raise max_position_embeddings ({self.max_position_embeddings}), or lower block_size"
            )


def saved_settings(config):
    """For configure(): a resume takes all settings from its checkpoint, other weights bring their network's."""
    if config.init_from == "scratch":
        return {}
    if config.init_from != "resume":
        return asdict(find_weights(config.init_from).config)
    known = {field.name for field in fields(TrainConfig)}
    saved = read_checkpoint(Path(config.out_dir) / "ckpt.pt", mmap=True)["config"]
    return {name: value for name, value in saved.items() if name in known} | {"out_dir": config.out_dir}


def resolve(config, device, world_size, say):
    """The settings with "auto" resolved by measuring, once, so that a resume computes the same way."""
    sequences = config.batch_size * config.gradient_accumulation_steps
    if sequences % world_size:
        sys.exit(
            f"error: batch_size x gradient_accumulation_steps is {sequences}, not divisible by {world_size} processes"
        )
    matmul = [pick_matmul(config.dtype, config.float32_matmul_precision, device, say)]
    if world_size > 1:
        dist.broadcast_object_list(matmul, device="cpu")  # two processes may measure different things
    device = device.split(":")[0] if config.device == "auto" else config.device
    return replace(config, device=device, dtype=matmul[0][0], float32_matmul_precision=matmul[0][1])


def build_model(config, device, source):
    """The network with random weights or those of a Source."""
    torch.manual_seed(config.seed)
    model = load_network(source, config) if source else SmolLM2(config)
    model.activation_checkpointing = config.activation_checkpointing
    return shard(model, config.dtype, device) if config.shard and dist.is_initialized() else model.to(device)


def train(config):
    # ---- Processes: one, or as many as torchrun started. Rank 0 prints and writes.
    end_on_signals()
    rank, world_size, device = start_processes(config.device)
    bar = tqdm(total=config.max_iters, disable=True if rank else None, unit="it", dynamic_ncols=True)
    say = printer(bar) if rank == 0 else lambda text: None

    # ---- Settings and data
    config = resolve(config, device, world_size, say)
    torch.set_float32_matmul_precision(config.float32_matmul_precision)
    keep_memory(not config.shard)
    train_data, val_data, meta = open_data(config.dataset, config.vocab_size, config.block_size, config.data_dir)
    data_sha256 = {split: meta[split]["sha256"] + meta[split].get("mask_sha256", "") for split in ("train", "val")}
    tokenizer = dict(official=meta.get("tokenizer", "base"), sha256=meta.get("tokenizer_sha256"))
    machine = dict(threads=torch.get_num_threads(), processes=world_size)
    out_dir = Path(config.out_dir)
    ckpt_path, log_path = out_dir / "ckpt.pt", out_dir / "log.csv"

    # ---- State: model, optimizer, scheduler, iter_num, best_val_loss. This is all that a run is.
    iter_num, best_val_loss, resumed_at = 0, math.inf, None
    if config.init_from == "resume":
        checkpoint = read_checkpoint(ckpt_path)
        saved, iter_num, best_val_loss = (checkpoint[key] for key in ("config", "iter_num", "best_val_loss"))
        check_shapes(config, checkpoint_config(ckpt_path, checkpoint), ckpt_path)
        if checkpoint["data"] != data_sha256:
            sys.exit(
                f"error: data/{config.dataset} is not what {ckpt_path} was trained on: "
                f"prepare {saved['dataset']} again, or start a new run with --init_from={ckpt_path}"
            )
        config = replace(config, init_from=saved["init_from"])  # keep on record how the run began
        model = build_model(config, device, source=None)
        optimizer, scheduler = build_optimizer(model, config)
        check_state(ckpt_path, checkpoint, model, optimizer)
        checkpoint = to_parts(checkpoint, model, optimizer)
        model.load_state_dict(checkpoint["model"])
        load_optimizer(optimizer, scheduler, checkpoint, config)
        tokenizer["chat"] = checkpoint["tokenizer"].get("chat", False)
        resumed_at = iter_num
        say(resuming(ckpt_path, checkpoint, config.max_iters, differences(saved, asdict(config)), machine))
        del checkpoint  # a second set of weights and moments need not stay in memory
    else:
        refuse_earlier_run(out_dir, config.overwrite)
        source = None if config.init_from == "scratch" else find_weights(config.init_from)
        say(source.about if source else f"a new network, from seed {config.seed}")
        tokenizer["chat"] = "block_size" in meta or bool(source and source.chat_template)  # how exports end a text
        model = build_model(config, device, source)
        optimizer, scheduler = build_optimizer(model, config)

    # ---- Computation: autocast for the matrix products, compiled blocks, one copy of the network per process
    def try_step():
        x = torch.zeros(config.batch_size, config.block_size, dtype=torch.int64, device=device)
        with autocast(device, config.dtype):
            if device == "cpu" and config.compile:
                check_compiled(config)
            loss = model(x, x)
        loss.backward()
        model.zero_grad(set_to_none=True)

    if config.compile:
        whole = "cuda" in device and world_size == 1
        config = replace(config, compile=try_compiling(model, try_step, say, whole))
    elif resumed_at is None:
        try_step()  # a step that does not fit in memory fails here, before an earlier run is removed
    network = model if world_size == 1 or config.shard else data_parallel(model)

    def get_batch(data, split_number, first, count):
        x, y = get_blocks(data.ids, first, count, config.block_size, mix(config.seed, split_number), data.mask)
        return to_device(x, device), to_device(y, device)

    def train_batch(i):
        """This process's slice of batch i: a pure function of i, so nothing is skipped or read twice."""
        count = sequences // world_size
        return get_batch(train_data, 0, i * sequences + rank * count, count)

    def count_tokens(y):
        """How many of the targets carry a loss: a float, on the device."""
        return (y >= 0).sum().float()

    @torch.no_grad()
    def evaluate():
        """Loss per token over eval_iters batches of val.bin, the same ones every time, and its standard error."""
        sums = torch.zeros(2, config.eval_iters + world_size, device=device)  # of each batch: its nats, its tokens
        for i in range(rank, config.eval_iters + rank, world_size):  # as often in every process: sharded, all take part
            x, y = get_batch(val_data, 1, i * config.batch_size, config.batch_size)
            with autocast(device, config.dtype):
                n = count_tokens(y)
                sums[:, i] = torch.stack((model(x, y) * n, n))
        if world_size > 1:
            dist.all_reduce(sums)
        return ratio(*sums[:, : config.eval_iters].cpu().double().numpy())

    def sample():
        """A text that begins with sample_prompt, from a generator of its own, so that sampling changes nothing."""
        ids = encode(encoding, config.sample_prompt) or [END_OF_TEXT]
        generator = torch.Generator(device).manual_seed(mix(config.seed, iter_num) >> 1)
        known = torch.tensor(known_ids(encoding, config.vocab_size), device=device)
        with autocast(device, config.dtype), torch.compiler.set_stance("force_eager"):
            idx = torch.tensor([ids], device=device)
            new = model.generate(idx, config.sample_tokens, 0.8, top_k=50, known=known, generator=generator)
            return encoding.decode(ids + [i.item() for i in new])

    def save(name, **state):
        checkpoint = dict(model=model.state_dict(), iter_num=iter_num, best_val_loss=best_val_loss)
        checkpoint |= dict(config=asdict(config), data=data_sha256, tokenizer=tokenizer, machine=machine)
        checkpoint = to_whole(checkpoint | state)  # in all processes together
        if rank == 0:
            sync_log()
            write_checkpoint(out_dir / name, checkpoint)

    # ---- The log, and before its first line what is about to happen
    sequences = config.batch_size * config.gradient_accumulation_steps  # per iteration, in all processes together
    encoding = load_tokenizer(tokenizer["official"], tokenizer["sha256"]) if config.sample_interval else None
    if encoding and len(encode(encoding, config.sample_prompt)) > config.max_position_embeddings:
        sys.exit(f"error: sample_prompt is longer than the context ({config.max_position_embeddings}): shorten it")
    if rank == 0:
        track = open_tracker(config.tracker, out_dir, iter_num, asdict(config), say)
        if resumed_at is None:  # everything that can be refused has been checked, and the weights are in memory
            remove_earlier_run(out_dir)
        log, sync_log = open_log(log_path, iter_num, config.log_interval, say, track)
    say(opening(config, meta, model, iter_num, world_size))

    # ---- The loop
    stop_signals = note_signals()  # from here on, Ctrl-C and SIGTERM stop the run after the iteration, with a save
    bits = meta["val"]["loss_tokens"] / meta["val"]["bytes"] / math.log(2)  # per byte, for each nat per token
    bar.n = iter_num
    seconds, last_logged, batch = 0.0, iter_num, train_batch(iter_num)
    while True:
        # evaluate on val.bin, and keep the best weights if asked to
        done = iter_num >= config.max_iters
        if iter_num % config.eval_interval == 0 or done:
            val_loss, val_stderr = evaluate()
            best, best_val_loss = val_loss < best_val_loss, min(val_loss, best_val_loss)
            nats, note = f"{val_loss:.4f} ± {val_stderr:.4f} nats/token", " (best so far)" if best else ""
            say(f"iter {iter_num:6d} | val loss {nats} = {val_loss * bits:.4f} bits/byte{note}")
            if rank == 0:
                log(iter=iter_num, val_loss=val_loss, val_stderr=val_stderr)
                plot_log(log_path, out_dir / "loss.png", bits, resumed_at, say)
            if best and config.save_best:
                save("best.pt")
        if config.sample_interval and (iter_num % config.sample_interval == 0 or done):
            say(f"iter {iter_num:6d} | sample: {sample()}")
        if done:
            break

        start = time.perf_counter()
        x, y = batch
        tokens = count_tokens(y)
        if world_size > 1:
            dist.all_reduce(tokens)
        # forward and backward, one micro-batch at a time, as many as add up to the batch
        loss = torch.zeros((), device=device)
        for i in range(0, len(x), config.batch_size):
            # its part of the mean over all tokens; times world_size, because processes average their gradients
            share = count_tokens(y[i : i + config.batch_size]) * world_size / tokens
            last = i + config.batch_size >= len(x)
            # processes exchange gradients only once per iteration, during the last backward
            with exchange_gradients(network, last):
                with autocast(device, config.dtype):
                    part = network(x[i : i + config.batch_size], y[i : i + config.batch_size]) * share
                part.backward()
            loss += part.detach()
        # clip the gradient
        grad_norm = clip_gradient(model, config.grad_clip)
        batch = train_batch(iter_num + 1)  # while a GPU still computes
        # all processes must agree on the loss, and on whether this iteration is the last
        told = torch.stack((loss / world_size, torch.full_like(loss, len(stop_signals))))
        if world_size > 1:
            dist.all_reduce(told)
        loss, stopping, grad_norm = torch.cat((told, grad_norm[None])).tolist()  # the only wait for a GPU
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            kept = f"{ckpt_path} is untouched" if ckpt_path.exists() else "nothing was saved yet"
            sys.exit(
                f"error: loss {loss} and gradient norm {grad_norm:.4g} at iteration {iter_num + 1}: {kept}; "
                "lower learning_rate, or raise warmup_iters"
            )
        # update the weights, then the learning rate for the next update
        lr = optimizer.param_groups[0]["lr"]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        scheduler.step()
        iter_num += 1
        seconds += time.perf_counter() - start

        # log
        bar.update()
        if iter_num % config.log_interval == 0 or iter_num == config.max_iters or stopping:
            ms = 1e3 * seconds / (iter_num - last_logged)
            tok_per_s = 1e3 * sequences * config.block_size / ms
            of_peak = mfu(model, config.block_size, tok_per_s / world_size, device)  # None where that is not known
            eta = timedelta(seconds=round((config.max_iters - iter_num) * ms / 1e3))
            say(
                f"iter {iter_num:6d} | loss {loss:7.4f} | lr {lr:.3e} | norm {grad_norm:7.4f} | {ms:7.1f} ms | "
                f"{tok_per_s:7,.0f} tok/s | {f'{of_peak:.1%} MFU | ' if of_peak else ''}eta {eta}"
            )
            if rank == 0 and iter_num % config.log_interval == 0:
                row = dict(loss=loss, lr=lr, grad_norm=grad_norm, ms=round(ms, 1), tok_per_s=round(tok_per_s))
                log(iter=iter_num, **row)
            seconds, last_logged = 0.0, iter_num

        # save before evaluating, because an evaluation may run out of memory
        if iter_num % config.eval_interval == 0 or iter_num == config.max_iters or stopping:
            save("ckpt.pt", optimizer=optimizer.state_dict(), scheduler=scheduler.state_dict())
        if stopping:
            break

    # ---- The end
    bar.close()
    if rank == 0:
        say(closing(out_dir, model, device, resumed_at))
    network = None  # see end_processes
    end_processes(world_size)
    if done:
        return 0
    number = stop_signals[0] if stop_signals else signal.SIGTERM  # another process may have received it
    say(f"stopped by {signal.Signals(number).name}: iteration {iter_num} is in {ckpt_path}")
    say(f"to continue: python train.py --init_from=resume --out_dir={config.out_dir}")
    return 128 + number


def main(config):
    for_memory = (
        f"lower batch_size ({config.batch_size}) and raise gradient_accumulation_steps "
        f"({config.gradient_accumulation_steps}) as much, or lower block_size ({config.block_size})"
    )
    owned = owned_folder(config.out_dir, "out_dir") if os.environ.get("RANK", "0") == "0" else nullcontext()
    with one_line_errors(for_memory, config.out_dir), owned:
        sys.exit(train(config))


if __name__ == "__main__":
    main(configure(TrainConfig, saved=saved_settings))
