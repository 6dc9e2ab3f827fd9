"""
Run in one process, or in as many as torchrun started. They copy the weights (data parallel) or divide them (FSDP2: each
process keeps its part of every weight, gradient and moment).

    rank, world_size, device = start_processes("auto")
    config, machine = resolve_auto(config, device, checkpoint)  # all processes compute the same way
    model = shard(model, "bfloat16", device)                    # before the optimizer is built
    ddp_model = wrap(model, config)                             # averages gradients over all processes
    stop_signals = note_signals()                               # from here on, Ctrl-C fills this list
    state = unshard(model.state_dict())                        # unsharded; all ranks take part
    checkpoint = reshard(checkpoint, model, optimizer)         # and back: ckpt.pt is the same file for any run
"""

import gc
import math
import os
import signal
import sys
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist

from lib.machine import pick_device, pick_matmul


def get_rank():
    """Return (rank, world_size) as torchrun sets them, or (0, 1)."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def start_processes(device):
    """
    Return (rank, world_size, device of this process). With torchrun, each process takes a GPU and joins the group, in
    which tensors on GPUs travel over NCCL, tensors on the CPU and objects over gloo. Until note_signals() is called, a
    signal exits with one line: there is nothing to save yet.
    """

    def end(number, _):
        name = signal.Signals(number).name
        print(f"stopped by {name} before the first iteration: nothing was trained or saved", file=sys.stderr)
        sys.exit(128 + number)

    handle(end)
    rank, world_size = get_rank()
    if world_size > 1 and device.startswith("cuda:"):
        sys.exit(f"error: {device} is one GPU, and {world_size} processes need one each: use --device=cuda")
    device = pick_device(device, int(os.environ.get("LOCAL_RANK", 0)))
    if device.startswith("cuda"):
        torch.cuda.set_device(device)  # before the group starts, or NCCL would put every process on cuda:0
    if world_size > 1:
        backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=30))
    return rank, world_size, device


def end_processes(world_size):
    """
    Leave the group once every process is here, because none may leave while rank 0 still writes. The caller has deleted
    DistributedDataParallel. If it outlived the group, its destructor would end the group's thread and wait for it with
    Python's lock held, while that thread may wait for the lock: a run of two processes would hang forever.
    """
    if world_size > 1:
        dist.barrier()
        gc.collect()  # DistributedDataParallel is part of a cycle
        dist.destroy_process_group()


def resolve_auto(config, device, checkpoint, say):
    """
    Return (config, machine), both for the checkpoint: the settings with "auto" resolved for device and dtype, and all
    else that the last bits depend on. The fastest matmul is measured once, and rank 0 decides; a resume reads both from
    its checkpoint.
    """
    if config.device == "auto":
        config = replace(config, device=device.split(":")[0])
    saved = checkpoint["config"] if checkpoint else {}
    if checkpoint and (saved["dtype"], saved["device"]) == (config.dtype, config.device):
        dtype, precision = config.dtype, checkpoint["machine"]["float32_matmul_precision"]
    else:
        matmul = [pick_matmul(config.dtype, device, say)]
        if dist.is_initialized():
            dist.broadcast_object_list(matmul, device="cpu")  # two processes may measure different things
        dtype, precision = matmul[0]
    torch.set_float32_matmul_precision(precision)
    machine = dict(threads=torch.get_num_threads(), processes=get_rank()[1], float32_matmul_precision=precision)
    return replace(config, dtype=dtype), machine


def note_signals():
    """Return a list to which each signal adds its number. The loop looks at it, so no signal can interrupt a save."""
    signals = []
    handle(lambda number, _: signals.append(number))
    return signals


def handle(handler):
    """Install a handler for Ctrl-C, SIGTERM, SIGHUP (a closed terminal) and SIGUSR1 (Slurm's warning)."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
        number = getattr(signal, name, None)  # Windows lacks the last two
        if number and not (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):  # nohup ignores it
            signal.signal(number, handler)


def shard(model, dtype, device):
    """Return the model on `device`. With several processes, each keeps only its part of each tensor's rows."""
    if not dist.is_initialized():
        return model.to(device)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.split(":")[0], (dist.get_world_size(),))
    # Blocks are gathered in autocast's dtype, half the bytes. The embedding, and so the residual stream, stays fp32.
    half = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, mp_policy=half if dtype == "bfloat16" else MixedPrecisionPolicy())
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "generate")
    return model.to(device)


def wrap(model, config):
    """Return the model as DistributedDataParallel, which averages gradients, if there are several copies of it."""
    if not dist.is_initialized() or config.shard:
        return model
    # gradient_as_bucket_view: gradients live in its buckets, not next to them
    return torch.nn.parallel.DistributedDataParallel(model, forward_sync_buffers=False, gradient_as_bucket_view=True)


def sum_over_ranks(tensor):
    """Return the sum of a tensor over all processes. All ranks take part."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def sync_gradients(model, now):
    """Return the context of a backward in which processes exchange gradients if `now`; else each sums its own."""
    if hasattr(model, "set_requires_gradient_sync"):  # sharded
        model.set_requires_gradient_sync(now)
    return nullcontext() if now or not hasattr(model, "no_sync") else model.no_sync()


def clip_gradient(model, grad_clip):
    """Clip the gradient's norm to grad_clip, 0 for no clipping. Return the norm before that, a tensor ()."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def unshard(state):
    """Gather the sharded tensors in a dict (of dicts), one at a time, on rank 0's CPU; elsewhere they become None."""
    if isinstance(state, dict):
        return {key: unshard(value) for key, value in state.items()}
    if not hasattr(state, "full_tensor"):
        return state
    tensor = state.full_tensor()
    return tensor.cpu() if dist.get_rank() == 0 else None


def reshard(checkpoint, model, optimizer):
    """Return the checkpoint with this process's part of each weight and moment of a sharded model."""

    def part(tensor, p):
        if not hasattr(p, "placements") or tensor.shape != p.shape:  # not sharded; or a step, which is one number
            return tensor
        from torch.distributed.tensor import distribute_tensor  # two seconds, needed only for sharded tensors

        # a clone, because a slice would keep the full tensor in memory
        return distribute_tensor(tensor.to(p.device), p.device_mesh, p.placements, src_data_rank=None).clone()

    params = [p for group in optimizer.param_groups for p in group["params"]]
    weights = {name: part(checkpoint["model"][name], p) for name, p in model.state_dict().items()}
    saved = checkpoint["optimizer"]
    moments = {i: {name: part(v, params[i]) for name, v in state.items()} for i, state in saved["state"].items()}
    return checkpoint | dict(model=weights, optimizer=saved | dict(state=moments))
