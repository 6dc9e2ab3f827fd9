"""
Choose device, dtype and matmul precision for this machine, by asking it and by measuring.

    device = pick_device("auto")                            # cuda, else mps, else cpu
    dtype, precision = pick_matmul("auto", device)  # the fastest way to multiply matrices here
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

from model import Block, ChunkedCrossEntropy, cross_entropy, rope_tables


def pick_device(device, local_rank=0):
    """`device` as torch takes it. Ends the program with one line if it cannot be used here."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{local_rank}"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        hint = f"start {torch.cuda.device_count()} processes on this machine" if local_rank else "try --device=auto"
        sys.exit(f"error: device {device} cannot be used ({str(error).splitlines()[0]}): {hint}")
    return device


def pick_matmul(dtype, device, say=print):
    """
    Return how to multiply matrices: the dtype, "float32" or "bfloat16" (weights stay fp32), and torch's
    float32_matmul_precision. On a CPU, "highest" and "medium" select two libraries, MKL and oneDNN. On an NVIDIA GPU,
    "high" is TF32.

    dtype="auto" asks a GPU for what it supports and times a CPU (0.2 s): on one CPU bf16 is three times faster than
    fp32, on another eight times slower. "medium" is chosen only if its results are fp32's up to rounding.
    """
    if device.startswith("cuda"):
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)  # a T4 or V100 only emulates it, slowly
        if dtype == "bfloat16" and not bf16:
            sys.exit(f"error: {torch.cuda.get_device_name(device)} has no bfloat16 in hardware: use --dtype=float32")
        if dtype == "auto" and not bf16:
            say(f"note: {torch.cuda.get_device_name(device)} has no bfloat16 in hardware: float32 is used")
        return dtype.replace("auto", "bfloat16" if bf16 else "float32"), "high"
    if device != "cpu":
        return dtype.replace("auto", "float32"), "highest"

    ways = [("float32", "highest"), ("float32", "medium"), ("bfloat16", "highest")]
    ways = [way for way in ways if dtype in ("auto", way[0])]
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


def keep_memory(keep=True):
    """
    Make malloc keep freed memory for the next iteration. By default glibc returns large blocks to the system, which
    zeroes their pages before it hands them out again: a quarter of an iteration's time. keep=False returns them all,
    because gathered weights come and go, and the holes they leave in a heap double its size. No effect outside Linux
    with glibc.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt") and keep:
        libc.mallopt(-4, 0)  # M_MMAP_MAX: allocate no block as a mapping of its own,
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: and never shrink the heap
    elif hasattr(libc, "mallopt"):
        libc.mallopt(-3, 2**16)  # M_MMAP_THRESHOLD: every block above 64 kB is a mapping of its own


def to_device(tensor, device):
    """The tensor on `device`. From pinned memory, the copy to a GPU runs while the CPU goes on."""
    if device.startswith("cuda"):
        tensor = tensor.contiguous().pin_memory()
    return tensor.to(device, non_blocking=True)


BF16_TFLOPS = {  # dense, as NVIDIA publishes it, by the name that torch.cuda.get_device_name() gives
    "NVIDIA A100-SXM4-40GB": 312.0, "NVIDIA A100-SXM4-80GB": 312.0, "NVIDIA A100-PCIE-40GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0, "NVIDIA H100 80GB HBM3": 989.0, "NVIDIA H200": 989.0, "NVIDIA L40S": 362.0,
    "NVIDIA GeForce RTX 4090": 165.0,
}  # fmt: skip


def flops_per_token(config, N, T):
    """FLOPs of forward and backward: (products with N weights, the causal half of attention's in sequences of T)."""
    return 6 * N, 12 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * T // 2


def mfu(model, T, tok_per_s, device):
    """Model FLOPs utilisation: the share of the card's bf16 peak that training reaches. None for cards not listed."""
    peak = BF16_TFLOPS.get(torch.cuda.get_device_name(device)) if device.startswith("cuda") else None
    N = sum(p.numel() for p in model.parameters())
    return peak and tok_per_s * sum(flops_per_token(model.config, N, T)) / (peak * 1e12)


def peak_memory(device):
    """Peak memory of this process in GB: allocated on a GPU, resident otherwise. NaN on Windows."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 1e9
    if sys.platform == "win32":  # it has no such count without another package
        return math.nan
    import resource

    unit = 1 if sys.platform == "darwin" else 1_024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def try_compiling(model, use, say, whole=False):
    """
    model.compile(whole), then `use()` to see whether it works. If not (no C++ compiler, for example), say so in one
    line and restore the eager model. Returns whether the model is compiled.
    """
    model.compile(whole)
    try:
        use()
    except Exception as error:  # a compiler can fail in many ways
        say(f"compile     not possible here ({type(error).__name__}: {str(error).splitlines()[0]}): eager instead")
        for module in (model, *model.model.layers):
            module._compiled_call_impl = None
        vars(model).pop("head", None)  # the compiled one; the class's own method shows again
        model.compiled = False
        return False
    return True


def check_compiled(config):
    """
    Compile what training on a CPU compiles, for its shapes: one block, and the loss of one chunk of tokens. Raises
    ArithmeticError where the gradients are not those of the eager ones, up to the rounding of bf16: then the C++
    compiler is wrong. config is a TrainConfig.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(config.batch_size, config.block_size, config.hidden_size, generator=generator).requires_grad_()
    head = torch.randn(config.vocab_size, config.hidden_size, generator=generator).mul_(0.02).requires_grad_()
    cos, sin = rope_tables(config, config.block_size)
    block, gradients = Block(config), []
    block.compile()
    for compiled in (True, False):
        with torch.compiler.set_stance("default" if compiled else "force_eager"):
            y = block(x, cos, sin)
        few = y.flatten(0, 1)[: ChunkedCrossEntropy.CHUNK["cpu"]]
        loss = cross_entropy(few, head, torch.arange(len(few)) % config.vocab_size, compiled)
        gradients.append(torch.autograd.grad(loss, (x, head, *block.parameters())))
    error = torch.stack([(ours - eager).norm() / eager.norm() for ours, eager in zip(*gradients, strict=True)]).max()
    if not error < 0.05:  # written so that NaN is refused as well
        raise ArithmeticError(f"the C++ compiler computes wrong gradients, by {error:.1%}")
