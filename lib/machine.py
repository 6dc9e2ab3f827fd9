"""
Choose device, dtype and matmul precision for this machine, by asking it and by measuring.

    device = pick_device("auto")                            # cuda, else mps, else cpu
    dtype, precision = pick_matmul("auto", "auto", device)  # the fastest way to multiply matrices here
    torch.set_float32_matmul_precision(precision)
    keep_memory()
    with autocast(device, dtype): ...
"""

import contextlib
import ctypes
import math
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


def pick_matmul(dtype, precision, device):
    """
    How to multiply matrices: `dtype`, "float32" or "bfloat16" (weights stay fp32), and `precision`, torch's
    float32_matmul_precision. On a CPU, "highest" and "medium" select two libraries, MKL and oneDNN.

    "auto" asks a GPU for what it supports and times a CPU (0.2 s): on one CPU bf16 is three times faster than fp32, on
    another eight times slower. "medium" is chosen only if its results are fp32's up to rounding.
    """
    gpu_bf16 = device.startswith("cuda") and torch.cuda.is_bf16_supported()
    if dtype == "bfloat16" and device.startswith("cuda") and not gpu_bf16:
        sys.exit(f"error: {device} does not do bfloat16: use --dtype=float32")
    if device != "cpu":
        dtype = dtype.replace("auto", "bfloat16" if gpu_bf16 else "float32")
        return dtype, precision.replace("auto", "highest")

    ways = [(name, of) for name, of in (("float32", "highest"), ("float32", "medium")) if precision in ("auto", of)]
    ways = [way for way in [*ways, ("bfloat16", "highest")] if dtype in ("auto", way[0])]
    if len(ways) == 1:
        return ways[0]
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(256, 576, generator=generator), torch.randn(576, 1_536, generator=generator)
    exact, before = a.double() @ b.double(), torch.get_float32_matmul_precision()
    seconds = dict.fromkeys(ways, math.inf)
    for way in ways * 8:  # in turn, and the best of each, so that a busy moment does not decide
        x, y = a.to(getattr(torch, way[0])), b.to(getattr(torch, way[0]))
        torch.set_float32_matmul_precision(way[1])
        start = time.perf_counter()
        product = x @ y
        elapsed = time.perf_counter() - start
        if way[1] == "highest" or (product - exact).abs().max() < 1e-3:  # on some CPUs "medium" computes in bf16
            seconds[way] = min(seconds[way], elapsed)
    torch.set_float32_matmul_precision(before)
    return min(seconds, key=seconds.get)


def autocast(device, dtype):
    """The context in which matrix products are computed in `dtype`."""
    if dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.split(":")[0], torch.bfloat16)


def keep_memory():
    """
    Make malloc keep freed memory for the next iteration. By default glibc returns large blocks to the system, which
    zeroes their pages before it hands them out again: a quarter of an iteration's time. No effect outside Linux with
    glibc.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: allocate no block as a mapping of its own,
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: and never shrink the heap


def peak_memory(device):
    """Peak memory of this process in GB: allocated on a GPU, resident otherwise. NaN on Windows."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 1e9
    if sys.platform == "win32":  # it has no such count without another package
        return math.nan
    import resource

    unit = 1 if sys.platform == "darwin" else 1_024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def try_compiling(model, use, say):
    """
    model.compile(), then `use()` to see whether it works. If not (no C++ compiler, for example), say so in one line and
    restore the eager model. Returns whether the model is compiled.
    """
    model.compile()
    try:
        use()
    except Exception as error:  # a compiler can fail in many ways
        say(f"compile     not possible here ({type(error).__name__}: {str(error).splitlines()[0]}): eager instead")
        for block in model.model.layers:
            block._compiled_call_impl = None
        del model.head  # the compiled one; the class's own method shows again
        model.compiled = False
        return False
    return True
