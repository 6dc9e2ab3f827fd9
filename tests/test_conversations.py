"""lib/conversations.py and lib/python_chat.py: first fit, nothing is split or lost, the answers are Python's own."""

import inspect
import os
import pydoc
import pydoc_data.topics
import random
from pathlib import Path

import lib.conversations
from lib.conversations import Encoded, pack_rows
from lib.python_chat import read_python_chat


def conversation(length):
    return Encoded(b"", length * [7], length * [1])


def test_packing_is_first_fit(monkeypatch):
    """By hand, for rows of 10: 7 and 6 open a row each, 3 goes to the oldest with space, 2 to the second."""
    rows = pack_rows((("train", conversation(n)) for n in (7, 6, 3, 2, 11)), 10)
    assert [[len(one.ids) for one in members] for _, members in rows] == [[7, 3], [6, 2], [11]]
    monkeypatch.setattr(lib.conversations, "MAX_OPEN_ROWS", 1)  # the second row closes the first
    rows = pack_rows((("train", conversation(n)) for n in (7, 6, 3)), 10)
    assert [[len(one.ids) for one in members] for _, members in rows] == [[7], [6, 3]]


def test_rows_have_little_padding():
    draw = random.Random(7)
    rows = list(pack_rows((("train", conversation(draw.randint(30, 150))) for _ in range(3000)), 513))
    assert 0.96 < sum(len(one.ids) for _, members in rows for one in members) / (513 * len(rows)) <= 1


def test_python_chat_says_what_python_says():
    library = Path(os.__file__).parent
    names = ("argparse.py", "json/__init__.py", "pydoc_data/__init__.py", "pydoc_data/topics.py", "random.py")
    chats = list(read_python_chat([library / name for name in names]))
    answers = {messages[0]["content"]: messages for messages in chats}
    assert len(answers) == len(chats) > 100 and len({messages[1]["content"] for messages in chats}) == len(chats)
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
