"""
Train the network: data/<dataset>/{train,val}.bin go in; out/ckpt.pt, out/log.csv and out/loss.png come out.

    python train.py config/toy.py                           # from scratch; Ctrl-C saves and stops
    python train.py --init_from=resume --max_iters=5050     # continue from out/ckpt.pt, to the bit
    torchrun --standalone --nproc_per_node=2 train.py       # the same batches, shared by 2 processes

Settings: the defaults below < checkpoint (on resume) < config file < --flags.
"""

import math
import os
import shlex
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import ClassVar, Literal

import torch
import torch.distributed as dist

from configurator import configure, differences
from lib.batches import get_blocks, mix, ratio
from lib.checkpoint import read_checkpoint, refuse_earlier_run, remove_earlier_run, write_checkpoint
from lib.dataset import open_data
from lib.errors import one_line_errors, usable
from lib.files import owned_folder
from lib.log import RunLog, import_tracker, resuming, say
from lib.machine import autocast, check_compiled, keep_memory, pick_matmul, to_device, try_compiling
from lib.processes import (
    clip_gradient,
    end_on_signals,
    end_processes,
    note_signals,
    shard,
    start_processes,
    sync_gradients,
    to_parts,
    to_whole,
)
from lib.tokenizer import END_OF_TEXT, encode, known_ids, load_tokenizer
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
    base: str = ""  # LoRA adapters: the weights they were trained on; by default those their config names
    tokenizer: Literal["", "base"] = ""  # base: SmolLM2's own, in place of the one beside the weights
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
    tracker: Literal["none", "trackio", "wandb"] = "none"  # sends the rows of log.csv there as well
    eval_interval: int = 500  # iterations between checkpoints, each followed by an evaluation
    eval_iters: int = 40  # batches of val.bin per evaluation, always the same ones
    save_best: bool = False  # keep the weights with the lowest val loss in best.pt, for runs that overfit
    sample_interval: int = 500  # iterations between samples of text; 0 for none
    sample_prompt: str = "The"  # how they begin
    # the machine
    seed: int = 1337  # of the initial weights, the order of the data, the samples
    device: str = "auto"  # auto (cuda, then mps, then cpu), cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of matrix products; weights stay fp32; auto measures
    compile: bool = False  # torch.compile each block: slower to start, faster to run
    activation_checkpointing: bool = False  # store only each block's input, recompute the rest in backward
    shard: bool = False  # with torchrun: divide weights, gradients and moments among the processes (FSDP2)

    LIMITS: ClassVar = ModelConfig.LIMITS | {
        "batch_size": (1, 2**24), "block_size": (1, 2**24), "gradient_accumulation_steps": (1, 2**24),
        "max_iters": (1, 10**12), "learning_rate": (0.0, 100.0), "weight_decay": (0.0, 100.0), "beta1": (0.0, 0.999999),
        "beta2": (0.0, 0.999999), "grad_clip": (0.0, 1e9), "warmup_iters": (0, 10**12), "lr_decay_iters": (0, 10**12),
        "wsd_decay_iters": (0, 10**12), "log_interval": (1, 10**12), "eval_interval": (1, 10**12),
        "eval_iters": (1, 10**9), "sample_interval": (0, 10**12), "seed": (0, 2**63),
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
        if self.muon_learning_rate is not None and self.optimizer != "muon":
            raise ValueError("muon_learning_rate has no effect without --optimizer=muon")
        if self.block_size > self.max_position_embeddings:
            raise ValueError(
                f"block_size {self.block_size} is longer than the context: "
                f"raise max_position_embeddings ({self.max_position_embeddings}), or lower block_size"
            )


def saved_settings(config):
    """For configure(): a resume takes all settings from its checkpoint, other weights bring their model's."""
    if config.init_from == "scratch":
        return {}
    if config.init_from != "resume":
        return asdict(find_weights(config.init_from, base=config.base).config)
    known = {field.name for field in fields(TrainConfig)}
    saved = read_checkpoint(Path(config.out_dir) / "ckpt.pt", mmap=True)["config"]
    return {name: value for name, value in saved.items() if name in known} | {"out_dir": config.out_dir}


def get_lr(config, iter_num):
    """Return the learning rate of the update that follows iter_num updates: a pure function of the iteration."""
    if iter_num < config.warmup_iters:
        return config.learning_rate * (iter_num + 1) / config.warmup_iters
    if config.schedule == "cosine":
        length = config.lr_decay_iters - config.warmup_iters
        progress = (iter_num - config.warmup_iters) / max(1, length)
        factor = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    else:
        left = (config.lr_decay_iters - iter_num) / max(1, config.wsd_decay_iters)
        factor = min(1.0, max(0.0, left))
    min_lr = config.learning_rate / 10 if config.min_lr is None else config.min_lr
    return min_lr + factor * (config.learning_rate - min_lr)


class AdamWAndMuon(torch.optim.Optimizer):
    """Two optimizers as one, with one state dict, because each has parameters of its own."""

    def __init__(self, adamw, muon):
        super().__init__(adamw.param_groups + muon.param_groups, defaults={})
        self.parts = (adamw, muon)
        self.share_state()

    def share_state(self):
        """Let the parts hold the same groups and the same state, not copies."""
        adamw, muon = self.parts
        n = len(adamw.param_groups)
        adamw.param_groups, muon.param_groups = self.param_groups[:n], self.param_groups[n:]
        adamw.state = muon.state = self.state

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self.share_state()

    def step(self, closure=None):
        for part in self.parts:
            part.step()


def build_optimizer(model, config):
    """Return (optimizer, scheduler) at iteration 0. Weight decay pulls on matrices, not on the norms' weights."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    norms = [p for p in model.parameters() if p.dim() != 2]
    hidden = matrices[1:] if config.optimizer == "muon" else []  # the first is the embedding
    groups = [dict(params=matrices[: len(matrices) - len(hidden)]), dict(params=norms, weight_decay=0.0)]
    # lr=1.0 here, because the scheduler multiplies it by get_lr
    betas, decay = (config.beta1, config.beta2), config.weight_decay
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=betas, eps=1e-8, weight_decay=decay, fused=True)
    if hidden:
        factor = 1.0 if config.muon_learning_rate is None else config.muon_learning_rate / config.learning_rate
        muon = torch.optim.Muon(hidden, factor, decay, momentum=0.95, adjust_lr_fn="match_rms_adamw")
        optimizer = AdamWAndMuon(optimizer, muon)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda iter_num: get_lr(config, iter_num))


def load_optimizer(optimizer, scheduler, checkpoint, config):
    """Put a checkpoint's moments and iteration into optimizer and scheduler, which keep today's settings."""
    settings = [{name: v for name, v in group.items() if name != "params"} for group in optimizer.param_groups]
    base_lrs = scheduler.base_lrs  # a factor of get_lr for each group
    optimizer.load_state_dict(checkpoint["optimizer"])
    scheduler.load_state_dict(checkpoint["scheduler"] | dict(base_lrs=base_lrs))
    for group, values, base_lr in zip(optimizer.param_groups, settings, base_lrs, strict=True):
        group |= values | dict(lr=base_lr * get_lr(config, checkpoint["iter_num"]))
    # torch does not check this, and the fused AdamW would write beyond a tensor that is too small
    if len(optimizer.state) != sum(len(group["params"]) for group in optimizer.param_groups):
        raise ValueError("its optimizer lacks the moments of some tensors")
    for p, state in optimizer.state.items():
        for name, value in state.items():
            if value.shape != (() if name == "step" else p.shape):
                raise ValueError(f"its optimizer has {name} of shape {list(value.shape)} for one of {list(p.shape)}")


def build_model(config, device, source):
    """Return the model with random weights or those of a Source."""
    torch.manual_seed(config.seed)
    model = load_network(source, config) if source else SmolLM2(config)
    model.activation_checkpointing = config.activation_checkpointing
    return shard(model, config.dtype, device) if config.shard and dist.is_initialized() else model.to(device)


def resolve_matmul(config, device, saved, world_size):
    """
    Return (dtype, precision of fp32 matmuls): "auto" is measured once, so that a resume computes the same way.
    saved: the checkpoint of a resume, or None.
    """
    if saved and (saved["config"]["dtype"], saved["config"]["device"]) == (config.dtype, config.device):
        return config.dtype, saved["machine"]["float32_matmul_precision"]
    matmul = [pick_matmul(config.dtype, device, say)]
    if world_size > 1:
        dist.broadcast_object_list(matmul, device="cpu")  # two processes may measure different things
    return matmul[0]


def count_targets(y):
    """Return how many of the targets carry a loss: a float, on the device."""
    return (y >= 0).sum().float()


def train(config):
    # ---- Processes: one, or as many as torchrun started. Rank 0 prints and writes.
    end_on_signals()
    rank, world_size, device = start_processes(config.device)
    sequences = config.batch_size * config.gradient_accumulation_steps  # per iteration, in all processes together
    if sequences % world_size:
        sys.exit(
            f"error: batch_size x gradient_accumulation_steps is {sequences}, not divisible by {world_size} processes"
        )

    # ---- Settings and data
    out_dir = Path(config.out_dir)
    ckpt_path = out_dir / "ckpt.pt"
    checkpoint = read_checkpoint(ckpt_path) if config.init_from == "resume" else None
    if config.device == "auto":
        config = replace(config, device=device.split(":")[0])
    dtype, precision = resolve_matmul(config, device, checkpoint, world_size)
    config = replace(config, dtype=dtype)
    torch.set_float32_matmul_precision(precision)
    machine = dict(threads=torch.get_num_threads(), processes=world_size, float32_matmul_precision=precision)
    keep_memory(not config.shard)
    train_data, val_data, meta = open_data(config.dataset, config.vocab_size, config.block_size, config.data_dir)
    data_sha256 = {split: meta[split]["sha256"] + meta[split].get("mask_sha256", "") for split in ("train", "val")}

    # ---- State: model, optimizer, scheduler, iter_num, best_val_loss. This is all that a run is.
    iter_num, best_val_loss = 0, math.inf
    if checkpoint:
        saved = checkpoint["config"]
        iter_num, best_val_loss = checkpoint["iter_num"], checkpoint["best_val_loss"]
        check_shapes(config, checkpoint_config(ckpt_path, checkpoint), ckpt_path)
        if config.optimizer != saved["optimizer"]:
            sys.exit(
                f"error: {ckpt_path} holds the state of {saved['optimizer']}, not {config.optimizer}: "
                f"leave out --optimizer, or begin a new run with --init_from={ckpt_path}"
            )
        if checkpoint["data"] != data_sha256:
            sys.exit(
                f"error: {config.data_dir}/{config.dataset} is not what {ckpt_path} was trained on: "
                f"prepare {saved['dataset']} again, or begin a new run with its weights: "
                f"--init_from={shlex.quote(str(ckpt_path))} --block_size={config.block_size} and another --out_dir"
            )
        config = replace(config, init_from=saved["init_from"])  # keep on record how the run began
        model = build_model(config, device, source=None)
        optimizer, scheduler = build_optimizer(model, config)
        with usable(ckpt_path, "take an earlier copy, or train again"):
            parts = to_parts(checkpoint, model, optimizer)
            model.load_state_dict(parts["model"])
            load_optimizer(optimizer, scheduler, parts, config)
        chat = checkpoint["chat"]
        say(resuming(ckpt_path, checkpoint, config.max_iters, differences(saved, asdict(config)), machine))
        del parts  # a second set of weights and moments need not stay in memory
    else:
        refuse_earlier_run(out_dir, config.overwrite)
        source = None
        if config.init_from != "scratch":
            source = find_weights(config.init_from, base=config.base, tokenizer=config.tokenizer)
        say(source.about if source else f"a new network, from seed {config.seed}")
        if source and source.tokenizer:  # else it is SmolLM2's own, as the dataset's is
            load_tokenizer(**source.tokenizer)
        for line in differences(asdict(source.config), asdict(config)) if source else ():
            say(f"    {line}")
        chat = "block_size" in meta or bool(source and source.chat_template)  # how an exported model ends a text
        model = build_model(config, device, source)
        optimizer, scheduler = build_optimizer(model, config)
    resumed, checkpoint = checkpoint is not None, None

    # ---- Computation: autocast for the matmuls, compiled blocks, one copy of the model per process
    def try_step():
        """Take a step on zeros that changes nothing. One that does not fit in memory fails here."""
        moments = [] if resumed else [torch.empty_like(p) for p in model.parameters() for _ in range(2)]
        x = torch.zeros(config.batch_size, config.block_size, dtype=torch.int64, device=device)
        with autocast(device, config.dtype):
            if device == "cpu" and config.compile:
                check_compiled(config)
            loss = model(x, x)
        loss.backward()
        model.zero_grad(set_to_none=True)
        del moments  # as large as the optimizer's, which are still to come

    if config.compile:
        whole = "cuda" in device and world_size == 1
        config = replace(config, compile=try_compiling(model, try_step, say, whole))
    if not config.compile and not resumed:
        try_step()
    network = model  # the same weights, with gradients averaged over all processes
    if world_size > 1 and not config.shard:  # gradients live in its buckets, not next to them
        network = torch.nn.parallel.DistributedDataParallel(
            model, forward_sync_buffers=False, gradient_as_bucket_view=True
        )

    # ---- What else the loop needs
    def get_batch(data, split_number, first, count):
        x, y = get_blocks(data.ids, first, count, config.block_size, mix(config.seed, split_number), data.mask)
        return to_device(x, device), to_device(y, device)

    def train_batch(i):
        """Return this process's slice of batch i: a pure function of i, so nothing is skipped or read twice."""
        count = sequences // world_size
        return get_batch(train_data, 0, i * sequences + rank * count, count)

    @torch.no_grad()
    def evaluate():
        """Return the loss per token over eval_iters batches of val.bin, always the same, and its standard error."""
        sums = torch.zeros(2, config.eval_iters + world_size, device=device)  # of each batch: its nats, its tokens
        for i in range(rank, config.eval_iters + rank, world_size):  # as often in every process: sharded, all take part
            x, y = get_batch(val_data, 1, i * config.batch_size, config.batch_size)
            with autocast(device, config.dtype):
                n = count_targets(y)
                sums[:, i] = torch.stack((model(x, y) * n, n))
        if world_size > 1:
            dist.all_reduce(sums)
        return ratio(*sums[:, : config.eval_iters].cpu().double().numpy())

    encoding = load_tokenizer() if config.sample_interval else None
    known = torch.tensor(known_ids(encoding, config.vocab_size), device=device) if encoding else None
    prompt = encode(encoding, config.sample_prompt) or [END_OF_TEXT] if encoding else []
    if len(prompt) > config.max_position_embeddings:
        sys.exit(f"error: sample_prompt is longer than the context ({config.max_position_embeddings}): shorten it")

    def sample():
        """Return a text that begins with sample_prompt. Its generator is its own, so sampling changes nothing."""
        generator = torch.Generator(device).manual_seed(mix(config.seed, iter_num) >> 1)
        with autocast(device, config.dtype), torch.compiler.set_stance("force_eager"):
            idx = torch.tensor([prompt], device=device)
            new = model.generate(idx, 64, 0.8, top_k=50, known=known, generator=generator)
            return encoding.decode(prompt + [i.item() for i in new])

    def save(name, **state):
        state = dict(model=model.state_dict(), iter_num=iter_num, best_val_loss=best_val_loss) | state
        state |= dict(config=asdict(config), data=data_sha256, chat=chat, machine=machine)
        state = to_whole(state)  # in all processes together
        if rank == 0:
            log.sync()
            write_checkpoint(out_dir / name, state)

    if config.tracker != "none":
        import_tracker(config.tracker)
    if not resumed and rank == 0:
        remove_earlier_run(out_dir)  # nothing can be refused any more, and the weights are in memory
    log = RunLog(config, meta, model, iter_num, world_size)

    # ---- The loop
    stop_signals = note_signals()  # from here on, Ctrl-C and SIGTERM stop the run after the iteration, with a save
    batch = train_batch(iter_num)
    while True:
        # evaluate on val.bin, and keep the best weights if asked to
        last = iter_num >= config.max_iters
        if iter_num % config.eval_interval == 0 or last:
            val_loss, val_stderr = evaluate()
            best = val_loss < best_val_loss
            best_val_loss = min(val_loss, best_val_loss)
            log.evaluation(iter_num, val_loss, val_stderr, best)
            if best and config.save_best:
                save("best.pt")
        if config.sample_interval and (iter_num % config.sample_interval == 0 or last):
            say(f"iter {iter_num:6d} | sample: {sample()}")
        if last:
            break

        # forward and backward, one micro-batch at a time, as many as add up to the batch
        start = time.perf_counter()
        x, y = batch
        tokens = count_targets(y)
        if world_size > 1:
            dist.all_reduce(tokens)
        loss = torch.zeros((), device=device)
        for i in range(0, len(x), config.batch_size):
            micro_x, micro_y = x[i : i + config.batch_size], y[i : i + config.batch_size]
            # each micro-batch counts by its tokens; times world_size, because processes average their gradients
            weight = count_targets(micro_y) * world_size / tokens
            # processes exchange gradients only once per iteration, during the last backward
            with sync_gradients(network, now=i + config.batch_size >= len(x)):
                with autocast(device, config.dtype):
                    micro_loss = network(micro_x, micro_y) * weight
                micro_loss.backward()
            loss += micro_loss.detach()
        batch = train_batch(iter_num + 1)  # while a GPU still computes

        # clip the gradient; all processes must agree on the loss, and on whether this iteration is the last
        grad_norm = clip_gradient(model, config.grad_clip)
        shared = torch.stack((loss / world_size, torch.full_like(loss, len(stop_signals))))
        if world_size > 1:
            dist.all_reduce(shared)
        loss, stop, grad_norm = torch.cat((shared, grad_norm[None])).tolist()  # the only wait for a GPU
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

        # log, and save before evaluating, because an evaluation may run out of memory
        done = stop or iter_num == config.max_iters
        log.iteration(iter_num, loss, lr, grad_norm, time.perf_counter() - start, done)
        if iter_num % config.eval_interval == 0 or done:
            save("ckpt.pt", optimizer=optimizer.state_dict(), scheduler=scheduler.state_dict())
        if stop:
            break

    # ---- The end
    log.summary()
    network = None  # see end_processes
    end_processes(world_size)
    if last:
        return 0
    number = stop_signals[0] if stop_signals else signal.SIGTERM  # another process may have received it
    say(f"stopped by {signal.Signals(number).name}: iteration {iter_num} is in {ckpt_path}")
    say(f"to continue: python train.py --init_from=resume --out_dir={shlex.quote(config.out_dir)}")
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
