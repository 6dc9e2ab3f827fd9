"""
What this machine is best asked to do: the settings `device` and `dtype`, resolved by looking and measuring.

    device = pick_device("auto")          # cuda, else mps, else cpu
    dtype = pick_dtype("auto", device)    # float32 or bfloat16, whichever multiplies matrices faster
    with autocast(device, dtype): ...
"""

import contextlib
import sys
import time

import torch


def pick_device(device, local_rank=0):
    """`device` as torch takes it. Ends the program with one line if it cannot be used here."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{local_rank}"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        sys.exit(f"error: device {device} cannot be used ({str(error).splitlines()[0]}): try --device=auto")
    return device


def pick_dtype(dtype, device):
    """
    "float32" or "bfloat16", for matrix products; weights stay fp32. "auto" asks a GPU, and times a CPU
    (50 ms), for one CPU's bf16 is three times faster than its fp32 and another's eight times slower.
    """
    gpu_bf16 = device.startswith("cuda") and torch.cuda.is_bf16_supported()
    if dtype == "bfloat16" and device.startswith("cuda") and not gpu_bf16:
        sys.exit(f"error: {device} does not do bfloat16: use --dtype=float32")
    if dtype != "auto":
        return dtype
    if device != "cpu":
        return "bfloat16" if gpu_bf16 else "float32"

    matrices = {
        name: (torch.ones(256, 576, dtype=dtype), torch.ones(576, 1536, dtype=dtype))
        for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
    }
    seconds = dict.fromkeys(matrices, float("inf"))
    for name in [*matrices] * 8:  # in turn, the best of each: a busy moment then harms neither
        start = time.perf_counter()
        torch.mm(*matrices[name])
        seconds[name] = min(seconds[name], time.perf_counter() - start)
    return min(seconds, key=seconds.get)


def autocast(device, dtype):
    """The context in which matrix products are taken in `dtype`."""
    if dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.split(":")[0], torch.bfloat16)
