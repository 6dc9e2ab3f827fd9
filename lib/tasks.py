"""
Read multiple-choice questions, from a task on the Hub or from a file of rows.

    items = read_items(read_hub_rows(*TASKS["arc_easy"], hint, streaming=False))
    items = read_items(read_task_file("items.jsonl"), limit=100)

A row's keys determine its layout: `query`, `choices`, `gold`; or `context_options`, `continuation`, `gold`; or the
Hub's own layout of HellaSwag, ARC, PIQA, OpenBookQA or WinoGrande. Prompts are those of lm-evaluation-harness.
"""

import itertools
import re
import reprlib
from collections import namedtuple

from lib.errors import check, usable
from lib.text import ROWS, read_rows, suffix_of

TASKS = {  # name: (Hub dataset, subset, the split that lm-evaluation-harness scores)
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy", "test"),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge", "test"),
    "hellaswag": ("Rowan/hellaswag", None, "validation"),
    "openbook_qa": ("allenai/openbookqa", "main", "test"),
    "piqa": ("baber/piqa", None, "validation"),  # ybisk/piqa is a script, which datasets no longer runs
    "winogrande": ("allenai/winogrande", "winogrande_xl", "validation"),
}


# One question. Choice i is continuations[i], scored after contexts[i] and a space. gold: index of the right choice
Item = namedtuple("Item", "contexts continuations gold")


def parse_item(row):
    """Return the Item of a row. Raise ValueError, among others, if its layout is unknown or it cannot be scored."""
    match row:
        case {"query": str(context), "choices": [*choices], "gold": gold}:
            pass
        case {"context_options": [*context], "continuation": text, "gold": gold}:
            choices = [text] * len(context)
        case {"activity_label": activity, "ctx_a": a, "ctx_b": b, "endings": [*endings], "label": label}:
            context = remove_marks(f"{activity}: {a} {b.capitalize()}")
            choices = [remove_marks(ending) for ending in endings]
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
            before, after = sentence.split("_", 1)  # scored: the end, after each way to fill the gap
            context = [before + first, before + second]
            choices = [after.strip()] * 2
            gold = int(answer) - 1
        case _:
            keys = reprlib.repr(sorted(row) if isinstance(row, dict) else row)
            raise ValueError(f"{keys} is not a known layout: a question is a string, and its choices are a list")
    item = Item([context] * len(choices) if isinstance(context, str) else context, choices, gold)
    if not all(isinstance(text, str) for text in item.contexts + item.continuations):
        raise ValueError("a question or a choice is not a string")
    if not all(item.continuations) or len(item.contexts) < 2:
        raise ValueError("a choice is empty, or there are fewer than two")
    if type(gold) is not int or not 0 <= gold < len(item.contexts):
        raise ValueError(f"the right answer is {gold!r}, which is not one of {len(item.contexts)} choices")
    return item


def remove_marks(text):
    """Remove the marks, such as [title] and [step], in the half of HellaSwag that is from WikiHow."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def read_items(rows, limit=None):
    """Return the Items of the first `limit` rows, (position, dict) each. Exit if one cannot be scored."""
    items = []
    for position, row in itertools.islice(rows, limit):
        with usable(position, "use rows of query, choices, gold, or remove this one"):
            items.append(parse_item(row))
    return items


def read_task_file(path):
    """Yield (position, row) for each row of a local .jsonl, .json, .parquet, ... file."""
    supported = path.is_file() and suffix_of(path) in ROWS
    check(supported, f"{path} is not a file of rows: pass --items a task's rows, as .jsonl, .json or .parquet")
    return read_rows(path)
