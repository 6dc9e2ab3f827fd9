"""lib/conversations.py and lib/python_chat.py: columns -> messages, packing, the answers are Python's own."""

import inspect
import os
import pydoc
import pydoc_data.topics
import random
from pathlib import Path

import numpy as np
import pytest

import lib.conversations
from lib.conversations import Encoded, messages_of, packed
from lib.python_chat import python_chat
from prepare_data import PrepareConfig


def say(*turns):
    return [{"role": role, "content": content} for role, content in turns]


ONE = say(("user", "1 + 1?"), ("assistant", "2"))
PARTS = [{"type": "text", "text": "1 +"}, {"type": "text", "text": " 1?", "image": None}]
ROWS = {  # name: (row, messages)
    "messages": ({"messages": ONE, "prompt": "other", "completion": "other"}, ONE),
    "sharegpt": ({"conversations": [{"from": "human", "value": "1 + 1?"}, {"from": "gpt", "value": "2"}]}, ONE),
    "its other names": (
        {"conversations": [{"from": "user", "value": "1 + 1?"}, {"from": "assistant", "value": "2"}]},
        ONE,
    ),
    "roles under conversations": ({"conversations": ONE}, ONE),
    "alpaca": ({"instruction": "1 + 1?", "input": "", "output": "2"}, ONE),
    "alpaca's input": (
        {"instruction": "Add.", "input": "1, 1", "output": "2"},
        say(("user", "Add.\n\n1, 1"), ("assistant", "2")),
    ),
    "no input": ({"instruction": "1 + 1?", "output": "2"}, ONE),
    "prompt": ({"prompt": "1 + 1?", "completion": "2", "id": 7}, ONE),
    "question": ({"question": "1 + 1?", "answer": "2"}, ONE),
    "columns of several kinds": (
        {"messages": None, "prompt": None, "completion": None, "question": "1 + 1?", "answer": "2"},
        ONE,
    ),
    "parts": ({"messages": say(("user", PARTS), ("assistant", ["2"]))}, ONE),
    "null": ({"messages": [{"role": "assistant", "content": None, "tool_calls": []}]}, say(("assistant", ""))),
    "any role, any order": (
        {"messages": say(("assistant", "a"), ("tool", "b"), ("system", "c"))},
        say(("assistant", "a"), ("tool", "b"), ("system", "c")),
    ),
    "sharegpt's system and tools": (
        {"conversations": [{"from": "system", "value": "s"}, {"from": "function_call", "value": "f()"}]},
        say(("system", "s"), ("function_call", "f()")),
    ),
    "none": ({"body": "x", "prompt": "without a completion"}, None),
    "no messages": ({"messages": []}, []),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_columns_tell(name):
    row, messages = ROWS[name]
    assert messages_of(row, PrepareConfig()) == messages


def test_two_named_columns():
    config = PrepareConfig(prompt_column="in", answer_column="out")
    assert messages_of({"in": "1 + 1?", "out": "2", "messages": say(("user", "other"))}, config) == ONE
    assert messages_of({"question": "1 + 1?", "answer": "2"}, config) is None


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"messages": "text"}, "column messages holds 'text', not a list"),
        ({"messages": {"hello": "bonjour"}}, "not a list of messages"),
        ({"messages": [*ONE, "text"]}, "column messages, message 3 is 'text', not a role and a content"),
        ({"messages": [{"content": "x"}]}, "column messages, message 1 has the role None"),
        ({"conversations": [{"from": 1, "value": "x"}]}, "column conversations, message 1 has the role 1"),
        ({"messages": [{"role": "user", "content": 7}]}, "column messages, message 1 holds 7, not text"),
        ({"messages": say(("user", [{"type": "image_url"}]))}, "message 1 has a part that is not text"),
        ({"question": "which?", "answer": 2}, "answer holds 2, not text"),
    ],
)
def test_what_cannot_be_read_says_why(row, why):
    with pytest.raises(ValueError, match=r".*") as error:
        messages_of(row, PrepareConfig())
    assert why in str(error.value)


def conversation(length, number=0):
    return Encoded(bytes([number % 256]), np.full(length, 7, "<u2"), np.ones(length, np.uint8), False, True)


def test_packing_is_best_fit():
    """By hand, for rows of 10: 7 and 6 open a row each, 3 goes where it leaves nothing free, 2 to the other."""
    rows = packed((("train", conversation(n)) for n in (2, 3, 6, 7)), 10)
    assert sorted([len(one.ids) for one in members] for _, members in rows) == [[6, 2], [7, 3]]


def test_packing_keeps_everything_whole_and_little_in_memory(monkeypatch):
    monkeypatch.setattr(lib.conversations, "OPEN_IDS", 64 * 100)  # 64 rows
    monkeypatch.setattr(lib.conversations, "WINDOW", 50)
    draw = random.Random(7)
    stream = [(draw.choice(["train", "val"]), conversation(draw.randint(1, 100), i)) for i in range(3000)]
    taken, given, most = 0, [], 0

    def counting():
        nonlocal taken, most
        for item in stream:
            taken += len(item[1].ids)
            most = max(most, taken - sum(used for used, *_ in given))
            yield item

    for split, members in packed(counting(), 100):
        given.append((sum(len(one.ids) for one in members), split, members))
    assert most <= (2 * 65 + 50) * 100  # train's open rows and val's, and a window
    assert all(used <= 100 for used, *_ in given)
    assert {id(one): split for _, split, members in given for one in members} == {
        id(one): split for split, one in stream
    }
    assert sum(used for used, *_ in given) / (100 * len(given)) > 0.96


def test_python_chat_says_what_python_says():
    library = Path(os.__file__).parent
    names = ("argparse.py", "json/__init__.py", "pydoc_data/__init__.py", "pydoc_data/topics.py", "random.py")
    found = list(python_chat([library / name for name in names]))
    answers = {messages[0]["content"]: messages for messages in found}
    assert len(answers) == len(found) > 100 and len({messages[1]["content"] for messages in found}) == len(found)
    functions = 0
    for question, messages in answers.items():
        assert [message["role"] for message in messages] == ["user", "assistant"] * (len(messages) // 2)
        if question.startswith("Explain"):
            continue
        name = question.split("`")[1]
        thing = pydoc.locate(name)
        assert messages[1]["content"] == inspect.getdoc(thing).split("\n\n")[0]
        if question.startswith("What does"):
            functions += 1
            assert messages[2]["content"] == "What is its signature?"
            signature, parameters = messages[3]["content"], list(inspect.signature(thing).parameters)
            assert signature.startswith(name.split(".")[-1] + "(") and all(p in signature for p in parameters)
    assert functions > 20 and "What is Python's module `json` for?" in answers
    topic = answers['Explain this topic of Python: The "assert" statement.']
    assert "\n\n".join(m["content"] for m in topic[1::2]) in pydoc_data.topics.topics["assert"]
