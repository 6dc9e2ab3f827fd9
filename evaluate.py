"""
Measure weights: a text or multiple-choice questions go in, a table of numbers with their standard errors comes out.

    python evaluate.py --out_dir=out/nano                                    # out/nano/ckpt.pt on data/python/val.bin
    python evaluate.py --text=notes.txt --init_from=base --against=instruct  # which weights predict it better?
    python evaluate.py --task=arc_easy --init_from=base                      # multiple choice: accuracy

Text is read through a window that slides by `stride` tokens. Every token is scored once, with at least window - stride
tokens before it where there are as many. The first token follows an <|endoftext|>, as a document's first does in
training. Choices are scored as lm-evaluation-harness does it, by the log-likelihood of a choice after its question.
"""

import json
import math
import os
import shlex
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple
from configurator import check_used, configure

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from lib.batches import ratio
from lib.dataset import open_data
from lib.errors import one_line_errors
from lib.files import written_whole
from lib.machine import autocast, pick_device, pick_matmul
from lib.tasks import TASKS, file_rows, hub_task_rows, read_items
from lib.text import ROWS, read_text, suffix_of
from lib.tokenizer import END_OF_TEXT, encode, encode_array, load_tokenizer, token_sizes
from lib.weights import find_weights, load_network

WINDOW = 2_048  # tokens: the default window, where the context allows it
ENOUGH = 20  # documents: with fewer, standard errors are taken over blocks


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluate weights on one of --dataset, --text, --task and --items."""

    init_from: str = "resume"  # out_dir's ckpt.pt; or a release's name (base, instruct, ...), a folder, .gguf, .pt
    out_dir: str = "out"  # where that ckpt.pt is
    base: str = ""  # LoRA adapters: the weights they were trained on; by default those their config names
    tokenizer: Literal["", "base"] = ""  # base: SmolLM2's own, in place of the one beside the weights
    against: str = ""  # other weights, named in the same way: also the difference, paired, with its standard error
    # text
    dataset: str = ""  # <data_dir>/<dataset>/val.bin, the whole of it; python if nothing else is named
    data_dir: str = "data"  # where prepared datasets are
    text: str = ""  # a text file
    window: int | None = None  # tokens read at once; by default the context, but at most 2,048
    stride: int | None = None  # tokens scored in each window; by default half of it
    # multiple choice
    task: Literal["", *TASKS] = ""  # from the Hub
    items: str = ""  # a local file of such a task's rows, or of rows `query`, `choices`, `gold`
    # both
    limit: int | None = None  # only the first so many questions, rows of conversations, or tokens of text
    batch_size: int = 8  # sequences at once
    json: str = ""  # also write the numbers to this file
    device: str = "auto"  # auto (cuda, then mps, then cpu), cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of matrix products; auto measures

    def __post_init__(self):
        named = [name for name in ("dataset", "text", "task", "items") if getattr(self, name)]
        if len(named) > 1:
            raise ValueError(f"--{named[0]} and --{named[1]} are both given: evaluate one at a time")
        choices = self.task or self.items
        check_used(self, not choices, "without --dataset or --text", "stride")
        check_used(self, not choices and not self.text, "without --dataset", "data_dir")
        check_used(self, "resume" in (self.init_from, self.against), "without --init_from=resume", "out_dir")


# ---------------------------------------------------------------------------------------------
# Rows: what the network reads, as (ids (T + 1,), scored (T,)): scored[t] says whether id t + 1 is scored


@torch.no_grad()
def score(network, rows, batch_size, device, dtype):
    """The losses, -log p in nats, of the scored ids of each row: a list of fp32 arrays, in the order of the rows."""
    losses = [None] * len(rows)
    # The longest come first: rows of a batch are of nearly one length, and memory runs out at once or not at all.
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
    bar = tqdm(total=len(rows), unit="row", dynamic_ncols=True, disable=None)
    with bar, autocast(device, dtype):  # around all batches, so that the weights become bf16 once
        for start in range(0, len(rows), batch_size):
            batch = order[start : start + batch_size]
            T = len(rows[batch[0]][0]) - 1
            x = torch.full((len(batch), T), END_OF_TEXT)  # a shorter row is padded on its right, which nothing sees
            y = torch.full((len(batch), T), -1)
            for i, (ids, scored) in enumerate(rows[j] for j in batch):
                ids = torch.from_numpy(ids.astype(np.int64))
                x[i, : len(scored)] = ids[:-1]
                y[i, : len(scored)] = ids[1:].where(torch.from_numpy(scored), -1)
            counts = (y >= 0).sum(1).tolist()
            x, y = x.to(device), y.to(device)
            h = network.hidden(x)[y >= 0]  # (N, C): only what is scored needs logits
            parts = zip(h.split(512), y[y >= 0].split(512), strict=True)
            nll = torch.cat([F.cross_entropy(network.head(h).float(), y, reduction="none") for h, y in parts])
            for j, row in zip(batch, nll.cpu().split(counts), strict=True):
                losses[j] = row.numpy()
            bar.update(len(batch))
    return losses


def windows(stream, window, stride):
    """Rows that score every id of `stream` but the first, once. They overlap by at least window - stride ids."""
    total = len(stream) - 1
    length = min(window, total)
    scored = np.repeat([False, True], length)  # any `length` of these in a row: the last ones are to be scored
    rows, end = [], 0
    while end < total:
        new = min(stride if end else length, total - end)
        end += new
        rows.append((stream[end - length : end + 1], scored[new : new + length]))
    return rows


def choice_rows(items, encoding, window):
    """
    (rows, number of them that were cut from the left to fit the window), a row for each choice of each item. Context
    and continuation are encoded as one text. The continuation is what follows the ids of the context alone; white
    space at the context's end goes to the continuation first.
    """
    rows, cut = [], 0
    for item in items:
        for context, continuation in zip(item.contexts, item.continuations, strict=True):
            start = context.rstrip()
            ids = encode(encoding, f"{context} {continuation}")
            before = len(encode(encoding, start))
            if not start:
                ids, before = [END_OF_TEXT, *ids], 1
            count = len(ids) - before
            if not 1 <= count <= window:
                large = f"error: the choice {continuation[:60]!r} has {count} tokens, which a window of {window} cannot"
                sys.exit(f"{large} score: take its question out, or raise --window up to the context")
            cut += len(ids) > window + 1
            ids = np.array(ids[-(window + 1) :])
            rows.append((ids, np.arange(1, len(ids)) >= len(ids) - count))
    return rows, cut


class Text(NamedTuple):
    """A text as rows, with what is known of each of its N scored tokens."""

    about: str
    rows: list
    targets: np.ndarray  # (N,) the scored ids
    unit: np.ndarray  # (N,) which document, row or block a token is in: what standard errors are taken over
    units: str  # what those are called


def load_text(config, vocab_size, window, encoding):
    """The Text that --text or --dataset names. vocab_size: the smallest among the weights."""
    mask = None
    if config.text:
        path, sources = Path(config.text), Counter()
        if suffix_of(path) in ROWS:
            sys.exit(f"error: {path} holds rows: first python prepare_data.py --dataset={shlex.quote(config.text)}")
        ids = encode_array(encoding, read_text(path, sources))
        about = ", ".join([str(path), *sources.get("encodings", ())])
        if bad := sources["undecodable_bytes"]:
            about += f", {bad:,} bytes that cannot be decoded became U+FFFD"
        if not len(ids):
            sys.exit(f"error: {path} holds no text: name another file")
    else:
        dataset = config.dataset or "python"
        _, (ids, mask), meta = open_data(dataset, vocab_size, None, config.data_dir)
        about = str(Path(config.data_dir, dataset, "val.bin"))

    if mask is not None:  # conversations: each row is a window of its own
        T = meta["block_size"]
        check_used(config, False, f"on {about}, conversations in rows of {T}", "window", "stride")
        pairs = zip(ids.reshape(-1, T + 1)[: config.limit], mask.reshape(-1, T + 1)[:, 1:] == 1, strict=False)
        rows = [(row, learned) for row, learned in pairs if learned.any()]
        if not rows:
            sys.exit(f"error: {about} has no token to score in its rows: raise --limit, or prepare it again")
        about += f": {len(rows):,} rows of conversations, only the tokens to be learned are scored"
        unit = np.repeat(np.arange(len(rows)), [scored.sum() for _, scored in rows])
        return Text(about, rows, np.concatenate([row[1:][scored] for row, scored in rows]), unit, "rows")

    stride = config.stride or (window + 1) // 2
    if stride > window:
        sys.exit(f"error: stride {stride} is longer than window {window}: tokens would be left out, lower --stride")
    stream = np.concatenate(([END_OF_TEXT], ids[: config.limit])).astype(np.int32)  # the first follows one, too
    documents = (stream[:-1] == END_OF_TEXT).cumsum() - 1  # the <|endoftext|> that ends a document belongs to it
    count = int(documents[-1]) + 1
    about += f": {count:,} document{'s' if count > 1 else ''}; window {window:,} tokens, stride {stride:,}"
    unit, units = documents, "documents"
    if count < ENOUGH:
        unit, units = np.arange(len(documents)) // stride, "blocks"
    return Text(about, windows(stream, window, stride), stream[1:], unit, units)


# ---------------------------------------------------------------------------------------------
# Results: {name of a number: (value, standard error)}


MEASURES = {  # by what a choice's log-likelihood is divided
    "acc": lambda choice: 1,
    "acc_norm": len,
    "acc_bytes": lambda choice: len(choice.encode(errors="replace")),
}


def answers(items, losses):
    """(n, 3) for each item and measure, 1.0 if the most likely choice is the right one. losses: an array per row."""
    right = np.zeros((len(items), len(MEASURES)))
    rows = iter(losses)
    for i, item in enumerate(items):
        log_likelihoods = np.array([-next(rows).sum(dtype=np.float64) for _ in item.continuations])
        for j, length in enumerate(MEASURES.values()):
            best = np.argmax(log_likelihoods / [length(choice) for choice in item.continuations])
            right[i, j] = best == item.gold
    return right


def table(columns):
    """{name of a column: results} as lines of text."""

    def cell(result, difference):
        value, error = result
        far = f" ({abs(value) / error:.1f} s.e.)" if difference and error else ""
        return f"{value:.4f} ± {error:.4f}{far}" if error == error else f"{value:.4f}"  # one unit has no error

    lines = [" " * 24 + "".join(f"{name:<22}" for name in columns)] if len(columns) > 1 else []
    for name in next(iter(columns.values())):
        cells = [cell(results[name], "-" in column) if name in results else "" for column, results in columns.items()]
        lines.append(f"{name:<24}" + "".join(f"{cell:<22}" for cell in cells))
    return "\n".join(line.rstrip() for line in lines)


@one_line_errors("lower --batch_size, or --window")
def main(config):
    if config.json:  # checked now, not after the whole evaluation
        os.makedirs(folder := Path(config.json).parent, exist_ok=True)
        if os.path.isdir(config.json) or not os.access(folder, os.W_OK):
            sys.exit(f"error: {config.json} cannot be written to: name another file with --json=")
    device = pick_device(config.device)
    dtype, precision = pick_matmul(config.dtype, device)
    torch.set_float32_matmul_precision(precision)
    weights = [find_weights(config.init_from, config.out_dir, config.base, config.tokenizer)]
    if config.against:
        weights.append(find_weights(config.against, config.out_dir, tokenizer=config.tokenizer))
    for letter, source in zip("AB", weights, strict=False):
        print(f"{letter}  {source.about}" if config.against else source.about)
    context = min(source.config.max_position_embeddings for source in weights)
    vocab_size = min(source.config.vocab_size for source in weights)
    window = config.window or min(context, WINDOW)
    if window > context:
        sys.exit(f"error: window {window} is longer than the context, {context}: lower --window")
    encoding, *_ = [load_tokenizer(**source.tokenizer) for source in weights]  # B's is checked, A's is used

    # What to read
    choices = bool(config.task or config.items)
    if choices:
        items = read_items(hub_task_rows(config.task) if config.task else file_rows(config.items), config.limit)
        if not items:
            sys.exit(f"error: {config.items or config.task} holds no question: name another file or task")
        rows, cut = choice_rows(items, encoding, window)
        print(f"{config.task or config.items}: {len(items):,} questions, {len(rows):,} choices")
        if cut:
            print(f"note: {cut:,} of them are longer than the window, {window:,} tokens: their beginnings are cut off")
    else:
        text = load_text(config, vocab_size, window, encoding)
        rows = text.rows
        print(text.about)
    longest, largest = max(len(scored) for _, scored in rows), max(int(ids.max()) for ids, _ in rows)
    if longest > context:
        sys.exit(f"error: rows of {longest} tokens do not fit the context of {context}: name other weights")
    if largest >= vocab_size:
        sys.exit(f"error: the text has the id {largest:,}, but the weights only {vocab_size:,} ids: name other weights")

    # What the weights make of it
    losses = [score(load_network(source).to(device), rows, config.batch_size, device, dtype) for source in weights]
    for source, of_rows in zip(weights, losses, strict=True):
        if not all(np.isfinite(row).all() for row in of_rows):
            sys.exit(f"error: {source.path} computes a loss that is no number: its weights diverged, name others")

    # The numbers
    if choices:
        scores = [answers(items, of_rows) for of_rows in losses]  # (questions, measures) each
        units = f"{len(items):,} questions"

        def results(right):
            ones = np.ones(len(right))
            return {name: ratio(column, ones) for name, column in zip(MEASURES, right.T, strict=True)}
    else:
        scores = [np.concatenate(of_rows) for of_rows in losses]  # (tokens,) each, in nats
        sizes = token_sizes(encoding, vocab_size)[text.targets]  # in bytes
        units = f"{len(text.targets):,} tokens, {sizes.sum():,} bytes, in {text.unit.max() + 1:,} {text.units}"

        def results(nats):
            nats = np.bincount(text.unit, nats)
            loss, error = ratio(nats, np.bincount(text.unit))
            return {
                "nats per token": (loss, error),
                "perplexity": (np.exp(loss), np.exp(loss) * error),
                "bits per byte": ratio(nats / math.log(2), np.bincount(text.unit, sizes)),
            }

    columns = {name: results(of) for name, of in zip("AB", scores, strict=False)}
    if config.against:
        columns["A - B"] = results(scores[0] - scores[1])  # paired: on each question or document the same for both
        columns["A - B"].pop("perplexity", None)
    print(f"{table(columns)}\n± standard error over {units}, {dtype} on {device}")
    if config.json:
        with written_whole(config.json, "w") as file:
            known = {a: {b: [v, e if e == e else None] for b, (v, e) in c.items()} for a, c in columns.items()}
            json.dump(dict(settings=asdict(config), over=units, results=known), file, indent=2)


if __name__ == "__main__":
    main(configure(EvaluateConfig))
