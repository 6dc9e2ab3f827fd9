"""
Multiple choice: a task's name or a file of rows goes in, items come out: texts to score, and which of them is right.

    items = read_items(hub_task_rows("arc_easy"), limit=None)
    items = read_items(file_rows("items.jsonl"), limit=100)

A row's keys tell its layout: `query`, `choices`, `gold`; or `context_options`, `continuation`, `gold`; or the Hub's
own layout of HellaSwag, ARC, PIQA, OpenBookQA or WinoGrande, which becomes lm-evaluation-harness's prompts.
"""

import itertools
import re
import reprlib
import sys
from pathlib import Path
from typing import NamedTuple

from lib.errors import usable
from lib.text import ROWS, read_hub_rows, read_rows, suffix_of

TASKS = {  # name: (Hub dataset, subset, split), the split that lm-evaluation-harness scores
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy", "test"),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge", "test"),
    "hellaswag": ("Rowan/hellaswag", None, "validation"),
    "openbook_qa": ("allenai/openbookqa", "main", "test"),
    "piqa": ("baber/piqa", None, "validation"),  # the Hub's own ybisk/piqa is a program, which datasets no longer runs
    "winogrande": ("allenai/winogrande", "winogrande_xl", "validation"),
}


class Item(NamedTuple):
    """One question. Choice i is continuations[i], scored after contexts[i] and a space."""

    contexts: list  # of str, one for each choice; mostly the same one
    continuations: list  # of str, without the space that comes before them
    gold: int  # index of the right choice


def item_of(row):
    """The Item of a row. Raises ValueError and others if it has no known layout, or cannot be scored."""
    match row:
        case {"query": str(context), "choices": [*choices], "gold": gold}:
            pass
        case {"context_options": [*context], "continuation": text, "gold": gold}:
            choices = [text] * len(context)
        case {"activity_label": activity, "ctx_a": a, "ctx_b": b, "endings": [*endings], "label": label}:
            context = without_brackets(f"{activity}: {a} {b.capitalize()}")
            choices = [without_brackets(ending) for ending in endings]
            gold = int(label)
        case {"question": str(question), "choices": {"text": [*choices], "label": [*labels]}, "answerKey": key}:
            context = f"Question: {question}\nAnswer:"
            gold = labels.index(key)
        case {"question_stem": str(context), "choices": {"text": [*choices], "label": [*labels]}, "answerKey": key}:
            gold = labels.index(key.strip())
        case {"goal": str(goal), "sol1": first, "sol2": second, "label": gold}:
            context = f"Question: {goal}\nAnswer:"
            choices = [first, second]
        case {"sentence": sentence, "option1": first, "option2": second, "answer": answer}:
            before, after = sentence.split("_", 1)  # the end is scored after each filled-in beginning
            context = [before + first, before + second]
            choices = [after.strip()] * 2
            gold = int(answer) - 1
        case _:
            keys = reprlib.repr(sorted(row) if isinstance(row, dict) else row)
            raise ValueError(f"{keys} is no layout of an item, with a text for a question and a list of choices")
    item = Item([context] * len(choices) if isinstance(context, str) else context, choices, gold)
    if not all(isinstance(text, str) for text in item.contexts + item.continuations):
        raise ValueError("a question or a choice is not text")
    if not all(item.continuations) or len(item.contexts) < 2:
        raise ValueError("a choice is empty, or there are fewer than two")
    if type(gold) is not int or not 0 <= gold < len(item.contexts):
        raise ValueError(f"the right answer is {gold!r}, which is none of its {len(item.contexts)} choices")
    return item


def without_brackets(text):
    """HellaSwag's WikiHow half has marks such as [title] and [step] in it."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def read_items(rows, limit=None):
    """The Items of rows, (where, dict) each: all, or the first `limit`. A row that is no item ends the program."""
    items = []
    for where, row in itertools.islice(rows, limit):
        with usable(where, "give rows of query, choices, gold, or take this one out"):
            items.append(item_of(row))
    return items


def file_rows(path):
    """Yield (where, row) for each row of a local .jsonl, .json, .parquet, ... file."""
    path = Path(path)
    if not path.is_file() or suffix_of(path) not in ROWS:
        sys.exit(f"error: {path} is not a file of rows: give --items the rows of a task, as .jsonl, .json or .parquet")
    return read_rows(path)


def hub_task_rows(name):
    """Yield (where, row) for each row of a task's dataset on the Hub, kept in the cache of the datasets library."""
    return read_hub_rows(*TASKS[name], "connect, or give --items=FILE, a local copy of its rows", streaming=False)
