"""
Multiple choice: a task's name or a file of rows goes in, items come out: texts to score, and which of them is right.

    items = read_items(hub_task_rows("arc_easy"), limit=None)
    items = read_items(file_rows("items.jsonl"), limit=100)

A row's keys tell its layout: `query`, `choices`, `gold`; or `context_options`, `continuation`, `gold`; or the raw one
in which the Hub has HellaSwag, ARC, PIQA, OpenBookQA or WinoGrande. Raw rows become lm-evaluation-harness's prompts.
"""

import itertools
import re
import reprlib
import sys
from pathlib import Path
from typing import NamedTuple

from lib.errors import first_line
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


# ---------------------------------------------------------------------------------------------
# Rows -> items


def after_one_context(context, choices, gold):
    return Item([context] * len(choices), list(choices), gold)


def with_query(row):
    return after_one_context(row["query"], row["choices"], row["gold"])


def with_context_options(row):
    return Item(list(row["context_options"]), [row["continuation"]] * len(row["context_options"]), row["gold"])


def hellaswag(row):
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    endings = [without_brackets(ending) for ending in row["endings"]]
    return after_one_context(without_brackets(context), endings, int(row["label"]))


def without_brackets(text):
    """HellaSwag's WikiHow half has marks such as [title] and [step] in it."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def arc(row):
    gold = row["choices"]["label"].index(row["answerKey"])
    return after_one_context(f"Question: {row['question']}\nAnswer:", row["choices"]["text"], gold)


def openbook_qa(row):
    gold = row["choices"]["label"].index(row["answerKey"].strip())
    return after_one_context(row["question_stem"], row["choices"]["text"], gold)


def piqa(row):
    return after_one_context(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], row["label"])


def winogrande(row):
    """The end of the sentence is scored after each filled-in beginning, so both choices are the same text."""
    before, after = row["sentence"].split("_", 1)
    return Item([before + row["option1"], before + row["option2"]], [after.strip()] * 2, int(row["answer"]) - 1)


LAYOUTS = [  # (the keys that tell it, row -> Item)
    ({"query", "choices", "gold"}, with_query),
    ({"context_options", "continuation", "gold"}, with_context_options),
    ({"activity_label", "ctx_a", "ctx_b", "endings", "label"}, hellaswag),
    ({"question", "choices", "answerKey"}, arc),
    ({"question_stem", "choices", "answerKey"}, openbook_qa),
    ({"goal", "sol1", "sol2", "label"}, piqa),
    ({"sentence", "option1", "option2", "answer"}, winogrande),
]


def read_items(rows, limit=None):
    """
    The Items of rows, which are (where, dict): all, or the first `limit`. A row of no known layout, or without a right
    answer among its choices, ends the program with one line.
    """
    items = []
    for where, row in itertools.islice(rows, limit):
        keys = set(row) if isinstance(row, dict) else set()
        layout = next((layout for needed, layout in LAYOUTS if needed <= keys), None)
        if layout is None:
            found = reprlib.repr(sorted(map(str, keys))) if keys else reprlib.repr(row)
            sys.exit(f"error: {where}: {found} is no layout of multiple choice: give rows of query, choices, gold")
        try:
            item = layout(row)
            check_item(item)
        except (ValueError, TypeError, AttributeError, LookupError) as error:
            sys.exit(f"error: {where}: not an item ({first_line(error)[:200]}): repair the row, or take it out")
        items.append(item)
    return items


def check_item(item):
    """Raise ValueError if an Item cannot be scored."""
    if not all(isinstance(text, str) for text in item.contexts + item.continuations):
        raise ValueError("a question or a choice is not text")
    if not all(item.continuations) or len(item.contexts) < 2:
        raise ValueError("a choice is empty, or there are fewer than two")
    if type(item.gold) is not int or not 0 <= item.gold < len(item.contexts):
        raise ValueError(f"the right answer is {item.gold!r}, which is none of its {len(item.contexts)} choices")


# ---------------------------------------------------------------------------------------------
# Where rows come from


def file_rows(path):
    """Yield (where, row) for each row of a local .jsonl, .json, .parquet, ... file."""
    path = Path(path)
    if not path.is_file() or suffix_of(path) not in ROWS:
        sys.exit(f"error: {path} is not a file of rows: give --items the rows of a task, as .jsonl, .json or .parquet")
    return read_rows(path)


def hub_task_rows(name):
    """Yield (where, row) for each row of a task's dataset on the Hub, kept in the cache of the datasets library."""
    hint = "connect, or give --items=FILE, a local copy of its rows"
    return read_hub_rows(*TASKS[name], hint, streaming=False)
