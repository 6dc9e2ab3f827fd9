"""
Train SmolLM2 on data/<dataset>/ from prepare_data.py. Writes out/ckpt.pt, out/log.csv and out/loss.png.

    python train.py config/toy.py                           # from scratch; Ctrl-C saves and stops
    python train.py --init_from=resume --max_iters=5050     # continue from out/ckpt.pt, bit for bit
    torchrun --standalone --nproc_per_node=2 train.py       # one batch shared by two processes

Settings, lowest precedence first: the defaults below, the checkpoint (on resume), the config file, the flags.
"""

import math
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal
from configurator import configure

import torch

from lib.batches import count_targets, get_batch
from lib.checkpoint import read_checkpoint, refuse_earlier_run, remove_earlier_run, write_checkpoint
from lib.dataset import open_data
from lib.errors import check, one_line_errors
from lib.evaluation import Sampler, evaluate_loss
from lib.files import lock_folder
from lib.log import RunLog, import_tracker, print_resume, print_start, say
from lib.machine import autocast, keep_memory, try_step
from lib.optimizer import build_optimizer, load_run
from lib.processes import (
    clip_gradient,
    end_processes,
    get_rank,
    note_signals,
    resolve_auto,
    shard,
    start_processes,
    sum_over_ranks,
    sync_gradients,
    unshard,
    wrap,
)
from lib.tokenizer import load_tokenizer
from lib.weights import check_resume, find_weights, load_model
from model import ModelConfig, SmolLM2


@dataclass(frozen=True)
class TrainConfig(ModelConfig):
    """Train SmolLM2. Give a config file, flags, or both: python train.py config/nano.py --max_iters=100"""

    # input and output; the settings of the model itself are ModelConfig's
    out_dir: str = "out"  # folder for ckpt.pt, log.csv and loss.png
    dataset: str = "python"  # name of the prepared dataset: reads <data_dir>/<dataset>/
    data_dir: str = "data"  # folder that holds the prepared datasets
    init_from: str = "scratch"  # scratch, resume, or weights to fine-tune: a release name, a folder, a .gguf, a ckpt.pt
    base: str = ""  # weights that a LoRA adapter was trained on (default: the ones its config names)
    tokenizer: Literal["", "base"] = ""  # base: use SmolLM2's own tokenizer instead of the one next to the weights
    overwrite: bool = False  # delete the earlier run in out_dir and start over
    # batch: an update reads batch_size * gradient_accumulation_steps sequences of block_size tokens
    batch_size: int = 4  # sequences at once in one process; lower it if you run out of memory
    block_size: int = 256  # tokens per sequence
    gradient_accumulation_steps: int = 1  # micro-batches per update
    # optimizer
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: Muon for the blocks' matrices, AdamW for everything else
    muon_learning_rate: float | None = None  # peak learning rate of the Muon matrices (default: learning_rate)
    max_iters: int = 5_000  # total number of updates, including those before a resume
    learning_rate: float = 3e-4  # peak learning rate
    weight_decay: float = 0.1  # weight decay of the matrices; the norms have none
    beta1: float = 0.9  # decay rate of AdamW's first moment
    beta2: float = 0.95  # decay rate of AdamW's second moment
    grad_clip: float = 1.0  # clip the gradient norm to this value, 0 to disable
    # learning-rate schedule
    schedule: Literal["cosine", "wsd"] = "cosine"  # cosine decay, or warmup-stable-decay with a linear decay
    warmup_iters: int = 200  # linear warmup from 0 to learning_rate
    lr_decay_iters: int = 5_000  # where the decay ends; separate from max_iters, so a longer run has the same schedule
    min_lr: float | None = None  # final learning rate (default: learning_rate / 10)
    wsd_decay_iters: int = 500  # wsd only: length of the decay, which ends at lr_decay_iters
    # logging, evaluation, samples
    log_interval: int = 10  # iterations between log lines; each has the mean loss since the last one
    tracker: Literal["none", "trackio", "wandb"] = "none"  # also log to this experiment tracker
    eval_interval: int = 500  # iterations between checkpoints, each followed by an evaluation
    eval_iters: int = 40  # batches of val.bin per evaluation, always the same ones
    save_best: bool = False  # keep the weights with the lowest val loss in best.pt, for runs that overfit
    sample_interval: int = 500  # iterations between samples of text, 0 for none
    sample_prompt: str = "The"  # text that the samples begin with
    # machine
    seed: int = 1337  # seeds the initial weights, the data order and the samples
    device: str = "auto"  # auto (cuda, then mps, then cpu), cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # dtype of the matmuls (auto: the fastest); weights are fp32
    compile: bool = False  # torch.compile each block: slower to start, faster to run
    activation_checkpointing: bool = False  # keep only each block's input, recompute the rest in backward
    shard: bool = False  # with torchrun: divide weights, gradients and moments among the processes (FSDP2)

    def __post_init__(self):
        super().__post_init__()
        lowest = self.learning_rate / 10 if self.min_lr is None else self.min_lr
        if not 0 <= lowest <= self.learning_rate:
            raise ValueError(
                f"min_lr is {lowest:g}: it must be between 0 and learning_rate ({self.learning_rate:g}), "
                f"for example --min_lr={self.learning_rate / 10:g}"
            )
        if self.muon_learning_rate is not None and self.optimizer != "muon":
            raise ValueError("muon_learning_rate has no effect without --optimizer=muon")
        if self.muon_learning_rate is not None and not self.learning_rate:
            raise ValueError("muon_learning_rate needs a learning_rate above 0: it follows the same schedule")
        if self.block_size > self.max_position_embeddings:
            raise ValueError(
                f"block_size {self.block_size} is longer than the context: "
                f"raise max_position_embeddings ({self.max_position_embeddings}), or lower block_size"
            )


def saved_settings(config):
    """For configure(): a resume continues with its own settings, a fine-tune with its weights' model."""
    if config.init_from == "scratch":
        return {}
    if config.init_from != "resume":
        return asdict(find_weights(config.init_from, base=config.base).config)
    known = {field.name for field in fields(TrainConfig)}
    saved = read_checkpoint(Path(config.out_dir) / "ckpt.pt", mmap=True)["config"]
    return {name: value for name, value in saved.items() if name in known} | {"out_dir": config.out_dir}


def build_model(config, device, source=None):
    """Build the model on the device, with random weights or those of a Source (lib/weights.py)."""
    torch.manual_seed(config.seed)
    model = load_model(source, config) if source else SmolLM2(config)
    model.activation_checkpointing = config.activation_checkpointing
    return shard(model, config.dtype, device) if config.shard else model.to(device)


def train(config):
    # processes: one, or as many as torchrun started; rank 0 prints and writes
    rank, world_size, device = start_processes(config.device)
    sequences = config.batch_size * config.gradient_accumulation_steps  # per iteration, over all processes
    message = f"batch_size x gradient_accumulation_steps is {sequences}, not divisible by {world_size} processes"
    check(sequences % world_size == 0, message)
    count = sequences // world_size  # per iteration, in this process

    # settings and data
    out_dir = Path(config.out_dir)
    resume = config.init_from == "resume"
    checkpoint = read_checkpoint(out_dir / "ckpt.pt") if resume else None
    config, machine = resolve_auto(config, device, checkpoint, say)
    keep_memory(not config.shard)
    train_data, val_data, meta = open_data(config.dataset, config.vocab_size, config.block_size, config.data_dir)

    # model and optimizer, from a checkpoint, from random weights or from released ones
    iter_num, sequences_read, best_val_loss, losses = 0, 0, math.inf, []
    if resume:
        check_resume(config, checkpoint, meta)
        config = replace(config, init_from=checkpoint["config"]["init_from"])  # how the run began
        model = build_model(config, device)
        optimizer, scheduler = build_optimizer(model, config)
        load_run(checkpoint, model, optimizer, scheduler, config)
        iter_num, sequences_read = checkpoint["iter_num"], checkpoint["sequences_read"]
        best_val_loss, losses, chat = checkpoint["best_val_loss"], checkpoint["losses"], checkpoint["chat"]
        print_resume(checkpoint, config, machine)
        del checkpoint  # frees the second copy of weights and moments
    else:
        refuse_earlier_run(out_dir, config.overwrite)
        source = None
        if config.init_from != "scratch":
            source = find_weights(config.init_from, base=config.base, tokenizer=config.tokenizer)
            load_tokenizer(**source.tokenizer)  # exits if it is not SmolLM2's, which prepared the dataset
        print_start(source, config)
        model = build_model(config, device, source)
        optimizer, scheduler = build_optimizer(model, config)
        chat = "block_size" in meta or bool(source and source.chat_template)  # decides how an export ends its texts

    # everything that can fail is tried before an earlier run is removed
    config = replace(config, compile=try_step(model, config, device, resume, say))
    ddp_model = wrap(model, config)
    sampler = Sampler(config, device) if config.sample_interval else None
    import_tracker(config.tracker)
    if not resume and rank == 0:
        remove_earlier_run(out_dir)
    log = RunLog(config, meta, model, iter_num, sequences_read, losses)

    def save(name, **state):
        state |= dict(model=model.state_dict(), iter_num=iter_num, best_val_loss=best_val_loss)
        state |= dict(sequences_read=sequences_read, losses=log.losses, chat=chat)
        state |= dict(config=asdict(config), data=meta["sha256"], machine=machine)
        state = unshard(state)  # all ranks take part
        if rank == 0:
            log.sync()
            write_checkpoint(out_dir / name, state)

    stop_signals = note_signals()  # from here on, Ctrl-C and SIGTERM stop the run after the iteration, with a save
    batch = get_batch(train_data, sequences_read + rank * count, count, config, device)
    while True:
        # once in a while: evaluate on val.bin and write a sample (all ranks take part)
        last = iter_num >= config.max_iters
        if iter_num % config.eval_interval == 0 or last:
            val_loss, val_stderr = evaluate_loss(model, val_data, config, device)
            best = val_loss < best_val_loss
            best_val_loss = min(val_loss, best_val_loss)
            log.evaluation(iter_num, val_loss, val_stderr, best_val_loss)
            if best and config.save_best:
                save("best.pt")
        if sampler and (iter_num % config.sample_interval == 0 or last):
            log.sample(iter_num, sampler.write(model, iter_num))
        if last:
            break

        # forward and backward, with gradient accumulation over micro-batches
        start = time.perf_counter()
        x, y = batch
        tokens = sum_over_ranks(count_targets(y))
        loss = torch.zeros((), device=device)
        micro_batches = list(zip(x.split(config.batch_size), y.split(config.batch_size), strict=True))
        for micro_step, (micro_x, micro_y) in enumerate(micro_batches, 1):
            # a micro-batch counts by its tokens; times world_size, because DDP averages the gradients
            weight = count_targets(micro_y) * world_size / tokens
            # ranks exchange gradients only once per iteration, during the last backward
            with sync_gradients(ddp_model, now=micro_step == len(micro_batches)):
                with autocast(device, config.dtype):
                    micro_loss = ddp_model(micro_x, micro_y) * weight
                micro_loss.backward()
            loss += micro_loss.detach()
        # prefetch the next batch while a GPU is busy
        batch = get_batch(train_data, sequences_read + sequences + rank * count, count, config, device)

        # clip the gradient, and stop before the update if anything is not finite
        grad_norm = clip_gradient(model, config.grad_clip)
        sums = sum_over_ranks(torch.stack((loss / world_size, torch.full_like(loss, len(stop_signals)))))
        loss, stop, grad_norm = torch.cat((sums, grad_norm[None])).tolist()  # the only CPU-GPU sync of the iteration
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            fault = f"loss {loss} and gradient norm {grad_norm:.4g} at iteration {iter_num + 1}, which was not saved"
            sys.exit(f"error: {fault}: lower learning_rate, or raise warmup_iters")

        # update the weights, then the learning rate
        lr = optimizer.param_groups[0]["lr"]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        scheduler.step()
        iter_num += 1
        sequences_read += sequences

        # log and save, before the next evaluation, which may run out of memory
        done = stop or iter_num == config.max_iters
        log.iteration(iter_num, loss, lr, grad_norm, time.perf_counter() - start, done)
        if iter_num % config.eval_interval == 0 or done:
            save("ckpt.pt", optimizer=optimizer.state_dict(), scheduler=scheduler.state_dict())
        if stop:
            break

    log.summary()
    del ddp_model  # it must be gone before its process group
    end_processes(world_size)
    if last:
        return 0
    number = stop_signals[0] if stop_signals else signal.SIGTERM  # the signal may have reached only a different rank
    log.stopped(number, iter_num)
    return 128 + number


def main(config):
    memory_hint = (
        f"lower batch_size ({config.batch_size}) and raise gradient_accumulation_steps "
        f"({config.gradient_accumulation_steps}) by the same factor, or lower block_size ({config.block_size})"
    )
    owned = nullcontext() if get_rank()[0] else lock_folder(config.out_dir, "out_dir")
    with one_line_errors(memory_hint, config.out_dir), owned:
        sys.exit(train(config))


if __name__ == "__main__":
    main(configure(TrainConfig, saved=saved_settings))
