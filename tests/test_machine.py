"""Test lib/machine.py: its matmuls compared with float64, devices, memory, MFU, compiled gradients."""

import subprocess
import sys
from functools import partialmethod
from pathlib import Path

import pytest
import torch

import model as model_py
from lib import processes
from lib.machine import autocast, check_compiled, mfu, pick_device, pick_matmul
from model import ModelConfig, SmolLM2
from train import TrainConfig


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_the_dtype_that_is_asked_for_is_used(dtype):
    torch.set_float32_matmul_precision("high")
    picked, precision = pick_matmul(dtype, "cpu")
    assert picked == dtype or dtype == "auto" and picked in ("float32", "bfloat16")
    assert precision == "highest" or picked == "float32" and precision == "medium"
    assert torch.get_float32_matmul_precision() == "high"  # measuring changes nothing


def test_picked_fp32_is_fp32_to_rounding():
    """Every matmul of the model, by the fp32 path that is picked here, against float64."""
    torch.set_float32_matmul_precision(pick_matmul("float32", "cpu")[1])
    torch.manual_seed(0)
    for n, k in ((576, 576), (192, 576), (1_536, 576), (576, 1_536), (49_152, 576)):
        x, w = torch.randn(64, k), torch.randn(n, k)
        exact = x.double() @ w.double().T
        error = (torch.nn.functional.linear(x, w) - exact).norm() / exact.norm()
        assert error < 2e-6, (n, k, error)  # fp32's are below 1e-6, bf16's above 1e-3


def test_a_medium_that_computes_in_bfloat16_is_not_used(monkeypatch):
    """As on CPUs whose oneDNN rounds fp32 operands to bf16: faster, and not fp32."""
    matmul = torch.Tensor.__matmul__
    slow = torch.randn(900, 900)

    def product(x, y):
        if x.dtype == torch.float32 and torch.get_float32_matmul_precision() == "medium":
            return matmul(x.bfloat16(), y.bfloat16()).float()
        if x.dtype == torch.float32:
            matmul(slow, slow)  # more than three times the work
        return matmul(x, y)

    monkeypatch.setattr(torch.Tensor, "__matmul__", product)
    assert pick_matmul("float32", "cpu") == ("float32", "highest")


def test_a_missing_device():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(SystemExit, match=r"^error: device cuda:0 cannot be used \(.*\): try --device=auto$"):
        pick_device("cuda")


@pytest.mark.parametrize("dtype, hardware, picked", [
    ("auto", True, "bfloat16"), ("auto", False, "float32"), ("float32", True, "float32"), ("bfloat16", False, None),
])  # fmt: skip
def test_a_gpu_uses_only_dtypes_that_its_hardware_has(dtype, hardware, picked, monkeypatch):
    """A T4 emulates bf16, and reports that it supports it, unless asked for its hardware."""
    supported = lambda including_emulation=True: including_emulation or hardware  # noqa: E731
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    notes = []
    if picked is None:
        with pytest.raises(SystemExit, match=r"^error: Tesla T4 has no bfloat16 in hardware: use --dtype=float32$"):
            pick_matmul(dtype, "cuda:0", notes.append)
    else:
        assert pick_matmul(dtype, "cuda:0", notes.append) == (picked, "high")
    expected = ["note: Tesla T4 has no bfloat16 in hardware: matmuls use float32"]
    assert notes == (expected if (dtype, hardware) == ("auto", False) else [])


def test_every_process_selects_its_gpu_before_the_group_starts(monkeypatch):
    """Gradients use NCCL, objects gloo. Several processes cannot use one GPU."""
    done = []
    monkeypatch.setattr(processes, "pick_device", lambda device, local_rank: f"cuda:{local_rank}")
    monkeypatch.setattr(torch.cuda, "set_device", done.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, timeout: done.append(backend))
    for name, value in dict(RANK="9", LOCAL_RANK="1", WORLD_SIZE="16").items():
        monkeypatch.setenv(name, value)
    assert processes.start_processes("auto") == (9, 16, "cuda:1")
    assert done == ["cuda:1", "cpu:gloo,cuda:nccl"]
    with pytest.raises(SystemExit, match="^error: cuda:1 is one GPU, and 16 processes need one each: use"):
        processes.start_processes("cuda:1")


def test_mfu(monkeypatch):
    """A token costs 1.02 GFLOP at T = 2,048 (docs/scale.md): 40 % of an H100 is 388,061 tokens per second."""
    with torch.device("meta"):
        model = SmolLM2(ModelConfig())
    for name, share in (("NVIDIA H100 80GB HBM3", 0.4), ("NVIDIA A100 80GB PCIe", 0.4 * 989 / 312)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert mfu(model, 2_048, 388_061, "cuda:0") == pytest.approx(share, rel=1e-5)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 PCIe")  # not in the table
    assert mfu(model, 2_048, 388_061, "cuda:0") is None and mfu(model, 2_048, 388_061, "cpu") is None


def test_activation_checkpointing_changes_only_memory():
    torch.manual_seed(0)
    model = SmolLM2(ModelConfig(hidden_size=72, intermediate_size=96, num_hidden_layers=3, head_dim=8, vocab_size=256))
    idx = torch.randint(256, (2, 40))
    grads = []
    for activation_checkpointing in (False, True):
        model.activation_checkpointing = activation_checkpointing
        model.zero_grad()
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.append(x) or x, lambda x: x):
            loss = model(idx, idx)
        loss.backward()
        grads.append([loss.detach()] + [p.grad for p in model.parameters()] + [len(saved)])
    assert all(map(torch.equal, grads[0][:-1], grads[1][:-1]))
    assert grads[1][-1] < grads[0][-1] / 3


PAGE_FAULTS = """
import resource, torch, lib.machine
lib.machine.keep_memory()
for megabytes in (400, 300):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(250_000 * megabytes)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc has mallopt")
def test_memory_is_kept():
    """Allocating 300 MB after freeing 400 MB causes almost no page faults, instead of 73,000."""
    result = subprocess.run([sys.executable, "-c", PAGE_FAULTS], capture_output=True, cwd=Path(__file__).parent.parent)
    first, second = map(int, result.stdout.split())
    assert second < 100 < first


def test_compiled_gradients_are_checked(monkeypatch):
    """The compiler here is right at the shape where GCC 12 was wrong. An attention compiled wrongly is noticed."""
    config = TrainConfig(batch_size=4, block_size=128, vocab_size=1_024)
    torch.compiler.reset()  # forget the shapes of other tests: these are compiled once on a machine, then cached
    with autocast("cpu", "bfloat16"):
        check_compiled(config)
    attend = model_py.attend

    def wrong(q, k, v):
        return attend(q, k * torch.nan if torch.compiler.is_compiling() else k, v)

    monkeypatch.setattr(model_py, "attend", wrong)
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="eager"))
    monkeypatch.setattr(model_py, "compile_softmax_loss", lambda: model_py.softmax_loss)
    with pytest.raises(ArithmeticError, match="wrong gradients, by nan"):
        check_compiled(config)
    torch.compiler.reset()
