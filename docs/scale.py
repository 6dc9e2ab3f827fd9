"""
The networks' shapes and a few numbers about hardware go in; the tables of docs/scale.md come out. Plain arithmetic.

    python docs/scale.py                           # the tables as docs/scale.md has them
    python docs/scale.py --h100_price=2.0          # another price per GPU hour
    python docs/scale.py --mfu=0.3 --network=100   # a slower program, two network cards per node

Letters are those of model.py, and N parameters, L layers, I MLP width, R processes (one per GPU).
"""

import sys
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from configurator import configure, read_config_file  # noqa: E402
from lib.machine import BF16_TFLOPS, flops_per_token  # noqa: E402
from model import PRESETS, SmolLM2  # noqa: E402

T = 2_048  # tokens per sequence in the published recipes
CARDS = [(80, False), (80, True), (40, False), (40, True), (24, False), (24, True)]  # GB, activation checkpointing
WAYS = [("not sharded", 1, False), ("sharded by 8", 8, True), ("sharded by 64", 64, True)]
NODES = "--nnodes=8 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=node0:29500"
LAUNCH = {1: "python", 8: "torchrun --standalone --nproc_per_node=8", 64: f"torchrun {NODES}"}  # by number of GPUs


@dataclass(frozen=True)
class ScaleConfig:
    """What to start on 1, 8 and 64 GPUs: memory, speed, time and money, by arithmetic."""

    mfu: float = 0.40  # share of the peak that training reaches: an assumption until it is measured
    h100_tflops: float = BF16_TFLOPS["NVIDIA H100 80GB HBM3"]  # dense bf16 peak of an H100 SXM
    a100_tflops: float = BF16_TFLOPS["NVIDIA A100-SXM4-80GB"]  # dense bf16 peak of an A100
    h100_price: float = 2.50  # dollars per GPU hour: an assumption
    a100_price: float = 1.30  # dollars per GPU hour: an assumption
    nvlink: float = 450.0  # GB/s in each direction per GPU, between the 8 GPUs of a node
    network: float = 50.0  # GB/s in each direction per node: one InfiniBand card of 400 Gb/s
    tokens: float = 2e12  # to train on: SmolLM2-135M's
    batch_tokens: int = 2**20  # per iteration, in the table of the all-reduce
    chunk: int = 4_096  # tokens whose logits exist at once, in the cross-entropy

    def __post_init__(self):
        if not all(0 < value < 1e18 for value in vars(self).values()):
            raise ValueError("every setting must be above 0 and finite")


@cache
def parameters(net):
    """(N, parameters of the embedding, of one block), counted from the network's own tensors."""
    with torch.device("meta"):  # shapes without memory
        parts = SmolLM2(replace(net, num_hidden_layers=1)).model.values()
    embedding, block, norm = (sum(p.numel() for p in part.parameters()) for part in parts)
    return embedding + net.num_hidden_layers * block + norm, embedding, block


def saved_per_token(net):
    """Bytes per token that one compiled block saves for backward; 2 per number in bf16, 4 in fp32."""
    C, H, D, I = net.hidden_size, net.num_attention_heads, net.head_dim, net.intermediate_size  # noqa: E741
    residual = 4 * C + 2 * 3 * C + 8  # its input; both normalised inputs and o_proj's output; two rms
    attention = 2 * 3 * H * D + 2 * 2 * net.num_key_value_heads * D + 4 * H  # q, output twice; k, v; log-sum-exp
    return residual + attention + 2 * 3 * I  # gate, up and the product


def memory(s, net, B, R, shard, checkpointing=False, passes=1):
    """{part: bytes} in one process when backward begins and memory is highest."""
    (N, embedding, block), parts, saved = parameters(net), R if shard else 1, saved_per_token(net)
    C, L = net.hidden_size, net.num_hidden_layers
    return {
        "weights": 4 * N / parts,
        "gradients": 4 * N if passes > 1 else 4 * N / parts,  # sharding keeps a sum over several passes whole
        "AdamW": 8 * N / parts,
        # sharded: the embedding in fp32, two blocks and their gradients in bf16; else all weights in bf16
        "copies": 4 * (embedding + 2 * block) if shard else 2 * N,
        # checkpointing: every block's input, and one block recomputed; 12 C around the last norm, in fp32
        "activations": B * T * ((4 * C * L + saved if checkpointing else saved * L) + 12 * C),
        "logits": 6 * min(s.chunk, B * T) * net.vocab_size + 4 * embedding,  # bf16 and fp32; the head's gradient
    }


def recipe(name):
    """(config file, sequences per iteration, iterations) of a network's published recipe."""
    path = f"config/smollm2_{name.lower()}.py"
    settings = {key: value for _, key, value in read_config_file(ROOT / path)}
    return path, int(settings["batch_size"]) * int(settings["gradient_accumulation_steps"]), int(settings["max_iters"])


def table(header, rows):
    """Lines of text, the first column to the left and the others to the right."""
    rows = [[f"{cell:,.1f}" if isinstance(cell, float) else str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)


def tables(s):
    """All tables as text, in the order of docs/scale.md."""
    counted, parts, largest, commands, money, ms = [], [], [], [], [], []
    for name, net in PRESETS.items():
        N, (weights, attention) = parameters(net)[0], flops_per_token(net, parameters(net)[0], T)
        h100, a100 = (s.mfu * peak * 1e12 / (weights + attention) for peak in (s.h100_tflops, s.a100_tflops))
        flops = [f"{x / 1e9:.2f}" for x in (weights, attention, weights + attention)]
        counted.append([name, f"{N:,}", *flops, f"{h100:,.0f}", f"{a100:,.0f}"])

        def gb(*args, net=net, **kwargs):
            return sum(memory(s, net, *args, **kwargs).values()) / 1e9

        for way, R, shard in WAYS:
            row = [x / 1e9 for x in memory(s, net, 8, R, shard).values()]
            parts.append([f"{name}, {way}", *row, sum(row), gb(8, R, shard, True)])
            fits = [[B for B in range(1, 999) if gb(B, R, shard, c) <= 0.9 * card] for card, c in CARDS]
            largest.append([f"{name}, {way}", *(max(Bs, default="-") for Bs in fits)])
        path, sequences, iterations = recipe(name)
        for R, launch in LAUNCH.items():
            shard, each = name == "1.7B" and R > 1, sequences // R
            B = max(b for b in range(1, 33) if each % b == 0 and gb(b, R, shard, passes=each // b) <= 0.9 * 80)
            commands.append(f"# {name} on {R}: {gb(B, R, shard, passes=each // B):.0f} GB per GPU")
            flags = f"--batch_size={B} --gradient_accumulation_steps={sequences // B}{' --shard=True' * shard}"
            commands[-1] += f"\n{launch} train.py {path} \\\n    {flags}"
        own = sequences * T * iterations  # tokens of the published run
        for card, speed, price in (("H100", h100, s.h100_price), ("A100", a100, s.a100_price)):
            hours = s.tokens / speed / 3_600
            row = [f"{name}, {card}", f"{hours:,.0f}", f"${hours * price:,.0f}", *(hours / R / 24 for R in LAUNCH)]
            money.append([*row, f"{own / 1e12:.1f} T", f"${own / speed / 3_600 * price:,.0f}"])
        ring = 2 * 4 * N / 1e6  # MB in and out of each process, times (R - 1) / R; a MB at 1 GB/s takes a ms
        for batch in sorted({s.batch_tokens, sequences * T}):
            backward = 2 / 3 * 1e3 * batch / h100  # ms on one GPU: two thirds of the iteration
            row = [ring * 7 / 8 / s.nvlink, backward / 8, *(ring * 63 / 64 / s.network / n for n in (1, 8))]
            most = [min(batch // T, int(1 + backward * n * s.network / ring)) for n in (1, 8)]
            ms.append([f"{name}, {batch / 1e6:.2f} M tokens", *row, backward / 64, *most])
    yield "\n\n".join(commands)
    yield table(["GB, at 8 x 2,048", *memory(s, net, 8, 1, False), "sum", "checkpointing"], parts)
    yield table(["largest batch_size", *(f"{card} GB{', ckpt' if c else ''}" for card, c in CARDS)], largest)
    yield table(["", "parameters", "GFLOP/token: 6 N", "attention", "sum", "H100 tok/s", "A100 tok/s"], counted)
    header = [f"{s.tokens / 1e12:g} T tokens", "GPU hours", "dollars", *(f"days on {R}" for R in LAUNCH)]
    yield table([*header, "published run", "dollars"], money)
    yield table(["ms", "8: all-reduce", "backward", "64: all-reduce", "8 cards", "backward", "most R", "8 cards"], ms)


if __name__ == "__main__":
    print("\n\n".join(tables(configure(ScaleConfig))))
