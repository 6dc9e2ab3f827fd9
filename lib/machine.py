"""
Choose device, dtype and matmul precision for this machine, by asking it and by measuring.

    device = pick_device("auto")                            # cuda, else mps, else cpu
    dtype, precision = pick_matmul("auto", device)          # the fastest matmuls here
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
    """Return `device` as torch takes it. Exit if it cannot be used here."""
    if device == "auto":
        usable = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
        device = next(name for name in usable if usable[name])
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
    Return the dtype of matmuls, "float32" or "bfloat16" (weights stay fp32), and torch's float32_matmul_precision. On a
    CPU, "highest" and "medium" select two libraries, MKL and oneDNN. On an NVIDIA GPU, "high" is TF32.

    dtype="auto" asks a GPU what it supports, and times a CPU (0.2 s): on one CPU bf16 is three times faster than fp32,
    on another eight times slower. "medium" is chosen only if its results are those of fp32, up to rounding.
    """
    if device.startswith("cuda"):
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)  # a T4 or V100 only emulates it, slowly
        if dtype == "bfloat16" and not bf16:
            sys.exit(f"error: {torch.cuda.get_device_name(device)} has no bfloat16 in hardware: use --dtype=float32")
        if dtype == "auto" and not bf16:
            say(f"note: {torch.cuda.get_device_name(device)} has no bfloat16 in hardware: matmuls use float32")
        return dtype.replace("auto", "bfloat16" if bf16 else "float32"), "high"
    if device != "cpu":
        return dtype.replace("auto", "float32"), "highest"

    candidates = [("float32", "highest"), ("float32", "medium"), ("bfloat16", "highest")]
    candidates = [candidate for candidate in candidates if dtype in ("auto", candidate[0])]
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(256, 576, generator=generator)
    b = torch.randn(576, 1_536, generator=generator)
    exact = a.double() @ b.double()
    precision_before = torch.get_float32_matmul_precision()
    seconds = dict.fromkeys(candidates, math.inf)
    for name, precision in candidates * 8:  # take turns and keep each one's best, so a busy moment does not decide
        x, y = a.to(getattr(torch, name)), b.to(getattr(torch, name))
        torch.set_float32_matmul_precision(precision)
        start = time.perf_counter()
        result = x @ y
        elapsed = time.perf_counter() - start
        if precision == "highest" or (result - exact).abs().max() < 1e-3:  # on some CPUs "medium" computes in bf16
            seconds[name, precision] = min(seconds[name, precision], elapsed)
    torch.set_float32_matmul_precision(precision_before)
    return min(seconds, key=seconds.get)


def autocast(device, dtype):
    """Return a context in which matmuls are computed in `dtype`."""
    if dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.split(":")[0], torch.bfloat16)


def keep_memory(keep=True):
    """
    Make malloc keep freed memory for the next iteration. By default glibc returns large blocks to the system, which
    must zero their pages again: a quarter of each iteration. keep=False returns all of them, because FSDP allocates and
    frees gathered weights all the time, which would fragment the heap to twice its size. Only glibc on Linux has this.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt") and keep:
        libc.mallopt(-4, 0)  # M_MMAP_MAX: allocate no block as a separate mapping,
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: and never shrink the heap
    elif hasattr(libc, "mallopt"):
        libc.mallopt(-3, 2**16)  # M_MMAP_THRESHOLD: every block above 64 kB is a separate mapping


BF16_TFLOPS = {  # dense, as NVIDIA publishes it, by the name that torch.cuda.get_device_name() gives
    "NVIDIA A100-SXM4-40GB": 312.0, "NVIDIA A100-SXM4-80GB": 312.0, "NVIDIA A100-PCIE-40GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0, "NVIDIA H100 80GB HBM3": 989.0, "NVIDIA H200": 989.0, "NVIDIA L40S": 362.0,
    "NVIDIA GeForce RTX 4090": 165.0,
}  # fmt: skip


def flops_per_token(config, N, T):
    """Return the FLOPs of forward and backward: (with N weights, in the causal half of attention over T tokens)."""
    return 6 * N, 12 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * T // 2


def mfu(model, T, tok_per_s, device):
    """Return the model FLOPs utilization: training's share of the card's bf16 peak. None for unlisted cards."""
    peak = BF16_TFLOPS.get(torch.cuda.get_device_name(device)) if device.startswith("cuda") else None
    N = sum(p.numel() for p in model.parameters())
    return peak and tok_per_s * sum(flops_per_token(model.config, N, T)) / (peak * 1e12)


def peak_memory(device):
    """Return the peak memory of this process in GB: allocated on a GPU, resident otherwise. NaN on Windows."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 1e9
    if sys.platform == "win32":  # it counts this only with one more package
        return math.nan
    import resource

    unit = 1 if sys.platform == "darwin" else 1_024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def try_compiling(model, use, say, by_block=True):
    """
    Compile the model, and call `use()` to see whether it works. If not (no C++ compiler, for example), print why and
    restore the eager model. Return whether the model is compiled.
    """
    model.compile(by_block)
    try:
        use()
    except Exception as error:  # a compiler can fail in many ways
        say(f"compile     torch.compile failed ({type(error).__name__}: {str(error).splitlines()[0]}), running eagerly")
        for module in (model, *model.model.layers):
            module._compiled_call_impl = None
        vars(model).pop("head", None)  # the compiled one, which hides the method of the class
        model.compiled = False
        return False
    return True


def try_step(model, config, device, resumed, say):
    """
    Compile the model if config.compile, and take a training step on zeros, which changes nothing: a model that does not
    compile runs eagerly, and one that does not fit in memory fails before an earlier run is replaced. Return whether it
    is compiled. A resumed run has its moments in memory already, and in eager mode it has nothing to try.
    """

    def step():
        moments = [] if resumed else [torch.empty_like(p) for p in model.parameters() for _ in range(2)]
        x = torch.zeros(config.batch_size, config.block_size, dtype=torch.int64, device=device)
        with autocast(device, config.dtype):
            if device == "cpu" and model.compiled:
                check_compiled(config)
            loss = model(x, x)
        loss.backward()
        model.zero_grad(set_to_none=True)
        del moments  # as large as the optimizer's, which come with the first update

    if config.compile:
        say("compiling the model and trying one step: up to a minute")
    by_block = "cuda" not in device or torch.distributed.is_initialized()
    compiled = config.compile and try_compiling(model, step, say, by_block)
    if not compiled and not resumed:
        step()
    return compiled


def check_compiled(config):
    """
    Compile the parts that training on a CPU compiles: one block, and the loss of one chunk of tokens. Raise
    ArithmeticError if the gradients differ from the eager ones by more than bf16's rounding: a wrong C++ compiler.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(config.batch_size, config.block_size, config.hidden_size, generator=generator).requires_grad_()
    head = torch.randn(config.vocab_size, config.hidden_size, generator=generator).mul_(0.02).requires_grad_()
    cos, sin = rope_tables(config, config.block_size)
    block = Block(config)
    block.compile()
    gradients = []
    for compiled in (True, False):
        with torch.compiler.set_stance("default" if compiled else "force_eager"):
            y = block(x, cos, sin)
        y = y.flatten(0, 1)[: ChunkedCrossEntropy.CHUNK["cpu"]]
        loss = cross_entropy(y, head, torch.arange(len(y)) % config.vocab_size, compiled)
        gradients.append(torch.autograd.grad(loss, (x, head, *block.parameters())))
    error = torch.stack([(a - b).norm() / b.norm() for a, b in zip(*gradients, strict=True)]).max()
    if not error < 0.05:  # written this way, it also refuses NaN
        raise ArithmeticError(f"the C++ compiler computes wrong gradients, by {error:.1%}")
