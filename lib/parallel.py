"""
Several processes, one network: data parallel, where each holds a copy, or sharded (FSDP2), where each keeps its part of
every weight, gradient and moment, and a block's weights are gathered only while it computes.

    model = shard(model, "bfloat16", "cuda:0")              # before the optimizer is built
    network = model if sharded else data_parallel(model)
    with exchange_gradients(network, last): loss.backward()
    norm = clip_gradient(model, 1.0)
    state = to_whole(model.state_dict())                    # as if nothing were sharded; all processes call it together
    checkpoint = to_parts(checkpoint, model, optimizer)     # and back

So ckpt.pt is the same file, whoever writes or reads it.
"""

import math
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


def data_parallel(model):
    """A network that averages its gradients over all processes. They live in its buckets, not beside them."""
    return DistributedDataParallel(model, forward_sync_buffers=False, gradient_as_bucket_view=True)


def shard(model, dtype, device):
    """The model on `device`, of each tensor only this process's share of the rows."""
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


def exchange_gradients(network, now):
    """The context of a backward: processes exchange gradients in it if `now`, else each adds its own up until then."""
    if hasattr(network, "set_requires_gradient_sync"):  # sharded
        network.set_requires_gradient_sync(now)
    return nullcontext() if now or not hasattr(network, "no_sync") else network.no_sync()


def clip_gradient(model, grad_clip):
    """Clip the gradient's norm to grad_clip, 0 for no clipping. Returns the norm before that, a tensor ()."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def to_whole(state):
    """A dict, or a dict of dicts, with its sharded tensors gathered, one at a time, on rank 0's CPU; None elsewhere."""
    if isinstance(state, dict):
        return {key: to_whole(value) for key, value in state.items()}
    if not hasattr(state, "full_tensor"):
        return state
    whole = state.full_tensor()
    return whole.cpu() if dist.get_rank() == 0 else None


def to_parts(checkpoint, model, optimizer):
    """A checkpoint in which the weights and moments of a sharded model are this process's parts of them."""

    def part(tensor, p):
        if not hasattr(p, "placements") or tensor.shape != p.shape:  # not sharded; or a step, which is one number
            return tensor
        from torch.distributed.tensor import distribute_tensor  # two seconds, spared where nothing is sharded

        # a clone, because a slice would keep the whole tensor in memory
        return distribute_tensor(tensor.to(p.device), p.device_mesh, p.placements, src_data_rank=None).clone()

    params = [p for group in optimizer.param_groups for p in group["params"]]
    weights = {name: part(checkpoint["model"][name], p) for name, p in model.state_dict().items()}
    saved = checkpoint["optimizer"]
    moments = {i: {name: part(v, params[i]) for name, v in state.items()} for i, state in saved["state"].items()}
    return checkpoint | dict(model=weights, optimizer=saved | dict(state=moments))
