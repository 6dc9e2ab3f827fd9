"""
Evaluate weights on text or on multiple-choice questions, with a standard error for every number.

    python evaluate.py --out_dir=out/nano                                    # out/nano/ckpt.pt on data/python/val.bin
    python evaluate.py --text=notes.txt --init_from=base --against=instruct  # which weights predict it better?
    python evaluate.py --task=arc_easy --init_from=base                      # multiple choice: accuracy

Text is read through a window that slides by `stride` tokens. Every token is scored once, with at least window - stride
tokens of context, if the text has that many. The first token follows an <|endoftext|>, like the first of a document in
training. Choices are scored as in lm-evaluation-harness, by the log-likelihood of a choice after its question.
"""

import json
import math
import os
import shlex
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal
from configurator import check_used, configure

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from lib.batches import ratio
from lib.dataset import open_data
from lib.errors import check, one_line_errors
from lib.files import write_atomically
from lib.machine import autocast, pick_device, pick_matmul
from lib.tasks import TASKS, read_items, read_task_file
from lib.text import ROWS, read_hub_rows, read_text, suffix_of
from lib.tokenizer import END_OF_TEXT, encode, encode_array, load_tokenizer, token_sizes
from lib.weights import find_weights, load_model


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluate weights on one of --dataset, --text, --task and --items."""

    init_from: str = "resume"  # out_dir/ckpt.pt; or a release (base, instruct, ...), a folder, a .gguf, a .pt
    out_dir: str = "out"  # folder with ckpt.pt
    base: str = ""  # weights that a LoRA adapter was trained on (default: the ones named in its config)
    tokenizer: Literal["", "base"] = ""  # base: use SmolLM2's own tokenizer instead of the one next to the weights
    against: str = ""  # weights to compare with, named like init_from: also print the paired difference
    # text
    dataset: str = ""  # evaluate all of <data_dir>/<dataset>/val.bin (default: python)
    data_dir: str = "data"  # folder of prepared datasets
    text: str = ""  # evaluate a text file
    window: int | None = None  # tokens that are read at once (default: the context, but at most 2,048)
    stride: int | None = None  # tokens that are scored in each window (default: half of it)
    # multiple choice
    task: Literal["", *TASKS] = ""  # from the Hub: arc_easy, arc_challenge, hellaswag, openbook_qa, piqa, winogrande
    items: str = ""  # evaluate a local file with the rows of such a task, or with rows of `query`, `choices`, `gold`
    # both
    limit: int | None = None  # maximum number of questions, rows of conversations, or tokens of text (default: all)
    batch_size: int = 8  # sequences per forward pass
    json: str = ""  # also write the numbers to this file
    device: str = "auto"  # auto (cuda, then mps, then cpu), cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # dtype of matmuls; auto picks the fastest

    def __post_init__(self):
        subjects = [name for name in ("dataset", "text", "task", "items") if getattr(self, name)]
        if len(subjects) > 1:
            raise ValueError(f"--{subjects[0]} and --{subjects[1]} are both given: evaluate one at a time")
        choices = self.task or self.items
        check_used(self, not choices, "without --dataset or --text", "stride")
        check_used(self, not choices and not self.text, "without --dataset", "data_dir")
        check_used(self, "resume" in (self.init_from, self.against), "without --init_from=resume", "out_dir")


@torch.no_grad()
def score(model, rows, batch_size, device, dtype):
    """
    Return the losses, -log p in nats, of the scored ids of each row, as a list of fp32 arrays. A row is (ids (T + 1,),
    scored (T,)): scored[t] is True if id t + 1 is scored.
    """
    losses = [None] * len(rows)
    # Longest first: the rows of a batch have similar lengths, and if memory runs out, it does so in the first batch.
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
    bar = tqdm(total=len(rows), unit="row", dynamic_ncols=True, disable=None)
    with bar, autocast(device, dtype):  # around all batches, so the weights are converted to bf16 only once
        for start in range(0, len(rows), batch_size):
            batch = order[start : start + batch_size]
            ids = [torch.from_numpy(rows[i][0].astype(np.int64)) for i in batch]
            targets = [row[1:].where(torch.from_numpy(rows[i][1]), -1) for row, i in zip(ids, batch, strict=True)]
            x = pad_sequence([row[:-1] for row in ids], True, END_OF_TEXT).to(device)  # on the right: causal, so unseen
            y = pad_sequence(targets, True, -1).to(device)
            counts = (y >= 0).sum(1).tolist()
            h = model.hidden(x)[y >= 0]  # (N, C): logits are only computed for scored ids
            chunks = zip(h.split(512), y[y >= 0].split(512), strict=True)
            nll = torch.cat([F.cross_entropy(model.head(h).float(), y, reduction="none") for h, y in chunks])
            for i, row in zip(batch, nll.cpu().split(counts), strict=True):
                losses[i] = row.numpy()
            bar.update(len(batch))
    return losses


def cut_windows(stream, window, stride):
    """Return rows that score every id of `stream` except the first, once. They overlap by at least window - stride."""
    total = len(stream) - 1
    length = min(window, total)
    mask = np.repeat([False, True], length)  # mask[new : new + length] is True only at the last `new` positions
    rows, end = [], 0
    while end < total:
        new = min(stride if end else length, total - end)
        end += new
        rows.append((stream[end - length : end + 1], mask[new : new + length]))
    return rows


def encode_choices(items, encoding, window):
    """
    Return (a row for each choice of each item, the number of rows that were cut on the left to fit the window). The ids
    after those of the question are scored; white space at its end belongs to the choice.
    """
    rows, num_cut = [], 0
    for item in items:
        for context, continuation in zip(item.contexts, item.continuations, strict=True):
            question = context.rstrip()
            ids = encode(encoding, f"{context} {continuation}")
            before = len(encode(encoding, question))
            if not question:
                ids, before = [END_OF_TEXT, *ids], 1
            count = len(ids) - before
            problem = f"the choice {continuation[:60]!r} has {count} tokens, which a window of {window} cannot score"
            check(1 <= count <= window, f"{problem}: remove its question, or raise --window up to the context")
            num_cut += len(ids) > window + 1
            ids = np.array(ids[-(window + 1) :])
            rows.append((ids, np.arange(1, len(ids)) >= len(ids) - count))
    return rows, num_cut


def load_text(config, vocab_size, window, encoding):
    """
    Return (description, rows, unit (N,), name) of --text or --dataset, with N scored tokens. unit: the number of each
    one's document, row or block, which standard errors are over. name: "documents", "rows" or "blocks".
    """
    mask = None
    if config.text:
        path, sources = Path(config.text), Counter()
        prepare = f"python prepare_data.py --dataset={shlex.quote(config.text)}"
        check(suffix_of(path) not in ROWS, f"{path} holds rows: run {prepare} first, then pass --dataset")
        ids = encode_array(encoding, read_text(path, sources))
        check(len(ids), f"{path} holds no text: choose a different file")
        about = ", ".join([str(path), *sources.get("encodings", ())])
        if undecodable := sources["undecodable_bytes"]:
            about += f", {undecodable:,} bytes that cannot be decoded became U+FFFD"
    else:
        dataset = config.dataset or "python"
        _, (ids, mask, _), meta = open_data(dataset, vocab_size, None, config.data_dir)
        about = str(Path(config.data_dir, dataset, "val.bin"))

    if mask is not None:  # conversations, each row a separate window
        T = meta["block_size"]
        check_used(config, False, f"on {about}, conversations in rows of {T}", "window", "stride")
        pairs = zip(ids.reshape(-1, T + 1)[: config.limit], mask.reshape(-1, T + 1)[:, 1:] == 1, strict=False)
        rows = [(row, learned) for row, learned in pairs if learned.any()]
        check(rows, f"{about} has no token to score in its rows: raise --limit, or prepare it again")
        about += f": {len(rows):,} rows of conversations, scored only where the model learns"
        unit = np.repeat(np.arange(len(rows)), [scored.sum() for _, scored in rows])
        return about, rows, unit, "rows"

    stride = config.stride or (window + 1) // 2
    check(stride <= window, f"stride {stride} is longer than window {window} and would skip tokens: lower --stride")
    stream = np.concatenate(([END_OF_TEXT], ids[: config.limit])).astype(np.int32)
    unit = (stream[:-1] == END_OF_TEXT).cumsum() - 1  # a document includes the <|endoftext|> that ends it
    count = int(unit[-1]) + 1
    about += f": {count:,} document{'s' if count > 1 else ''}; window {window:,} tokens, stride {stride:,}"
    if count < 20:  # too few for a standard error over documents
        unit = np.arange(len(unit)) // stride
    return about, cut_windows(stream, window, stride), unit, "blocks" if count < 20 else "documents"


MEASURES = ("acc", "acc_norm", "acc_bytes")  # choose by log-likelihood; per character; per byte


def grade(items, losses):
    """Return (n, 3), 1.0 if the best choice by a measure is the right one. losses: one array per choice."""
    grades = np.zeros((len(items), len(MEASURES)))
    rows = iter(losses)
    for i, item in enumerate(items):
        log_likelihoods = np.array([-next(rows).sum(dtype=np.float64) for _ in item.continuations])
        sizes = np.array([(1, len(text), len(text.encode(errors="replace"))) for text in item.continuations])
        grades[i] = np.argmax(log_likelihoods[:, None] / sizes, axis=0) == item.gold
    return grades


def format_table(columns):
    """Return the table of {column: {name of a number: (value, standard error)}} as a string."""
    lines = [" " * 24 + "".join(f"{name:<22}" for name in columns)] if len(columns) > 1 else []
    for name in columns["A"]:
        line = f"{name:<24}"
        for column, results in columns.items():
            if name in results:
                value, error = results[name]
                cell = f"{value:.4f}"
                cell += f" ± {error:.4f}" if error == error else ""  # NaN for a single unit
                cell += f" ({abs(value) / error:.1f} s.e.)" if column == "A - B" and error > 0 else ""
                line += f"{cell:<22}"
        lines.append(line)
    return "\n".join(line.rstrip() for line in lines)


@one_line_errors("lower --batch_size, or --window")
def main(config):
    if config.json:  # fail now rather than after the evaluation
        folder = Path(config.json).parent
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK) and not os.path.isdir(config.json)
        check(writable, f"{config.json} cannot be written to: choose a different file with --json=")
    device = pick_device(config.device)
    dtype, precision = pick_matmul(config.dtype, device)
    torch.set_float32_matmul_precision(precision)

    # The weights
    sources = [find_weights(config.init_from, config.out_dir, config.base, config.tokenizer)]
    if config.against:
        sources.append(find_weights(config.against, config.out_dir, tokenizer=config.tokenizer))
    for letter, source in zip("AB", sources, strict=False):
        print(f"{letter}  {source.about}" if config.against else source.about)
    context = min(source.config.max_position_embeddings for source in sources)
    vocab_size = min(source.config.vocab_size for source in sources)
    encoding, *_ = [load_tokenizer(**source.tokenizer) for source in sources]  # B's is checked, but not used

    # The rows to read
    window = config.window or min(context, 2_048)
    check(window <= context, f"window {window} is longer than the context, {context}: lower --window")
    task = config.task or config.items
    if task:
        hint = "connect, or pass --items=FILE, a local copy of its rows"
        raw = read_hub_rows(*TASKS[task], hint, streaming=False) if config.task else read_task_file(Path(task))
        items = read_items(raw, config.limit)
        check(items, f"{task} holds no question: choose a different file or task")
        rows, num_cut = encode_choices(items, encoding, window)
        print(f"{task}: {len(items):,} questions, {len(rows):,} choices")
        if num_cut:
            print(f"note: {num_cut:,} choices do not fit the window of {window:,} tokens: their beginnings are cut off")
    else:
        about, rows, unit, unit_name = load_text(config, vocab_size, window, encoding)
        print(about)
    longest = max(len(scored) for _, scored in rows)
    largest = max(int(ids.max()) for ids, _ in rows)
    check(longest <= context, f"rows of {longest} tokens do not fit the context of {context}: use different weights")
    problem = f"the text has the id {largest:,}, but the weights have only {vocab_size:,} ids"
    check(largest < vocab_size, f"{problem}: use different weights")

    # The losses
    losses = [score(load_model(source).to(device), rows, config.batch_size, device, dtype) for source in sources]
    for source, nll in zip(sources, losses, strict=True):
        finite = all(np.isfinite(row).all() for row in nll)
        check(finite, f"{source.path} gives a loss of NaN or infinity: its training diverged, use different weights")

    # The numbers
    if task:
        scores = [grade(items, nll) for nll in losses]  # (questions, measures) each
        units = f"{len(items):,} questions"

        def summarize(grades):
            return {name: ratio(column, np.ones(len(column))) for name, column in zip(MEASURES, grades.T, strict=True)}
    else:
        scores = [np.concatenate(nll) for nll in losses]  # (tokens,) each
        targets = np.concatenate([ids[1:][scored] for ids, scored in rows])
        sizes = token_sizes(encoding, vocab_size)[targets]  # in bytes
        units = f"{len(targets):,} tokens, {sizes.sum():,} bytes, in {unit.max() + 1:,} {unit_name}"

        def summarize(nll):
            nll = np.bincount(unit, nll)
            loss, error = ratio(nll, np.bincount(unit))
            return {
                "nats per token": (loss, error),
                "perplexity": (np.exp(loss), np.exp(loss) * error),
                "bits per byte": ratio(nll / math.log(2), np.bincount(unit, sizes)),
            }

    columns = {letter: summarize(numbers) for letter, numbers in zip("AB", scores, strict=False)}
    if config.against:
        columns["A - B"] = summarize(scores[0] - scores[1])  # paired: each question or document is in both
        columns["A - B"].pop("perplexity", None)
    print(f"{format_table(columns)}\n± standard error over {units}, {dtype} on {device}")
    if config.json:
        with write_atomically(config.json, "w") as file:
            results = {c: {name: [v, e if e == e else None] for name, (v, e) in r.items()} for c, r in columns.items()}
            json.dump(dict(settings=asdict(config), over=units, results=results), file, indent=2)


if __name__ == "__main__":
    main(configure(EvaluateConfig))
