"""
Make conversations from Python's own documentation, for --dataset=python_chat.

    for messages in read_python_chat(files): ...     # [{"role": "user", "content": "What does `json.loads` do?"}, ...]

The answers are the first paragraphs of docstrings in the standard library and of help() topics. A second question asks
for a function's signature, or for the next paragraph. The files are parsed, never imported.
"""

import ast
import os
from pathlib import Path


def read_python_chat(files):
    """Yield the conversations from the standard library's .py files. No answer is used twice, in train and in val."""
    seen = set()
    for path in files:
        tree = ast.parse(path.read_bytes())
        for turns in ask_about_module(tree, path):
            answer = turns[1]
            if 20 <= len(answer) <= 1000 and not answer.startswith(">>>") and answer not in seen:
                seen.add(answer)
                roles = ("user", "assistant", "user", "assistant")
                yield [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]


def ask_about_module(tree, path):
    """Yield (question, answer), or (question, answer, question, answer), for each docstring in a module."""
    if path.name == "topics.py":  # help("assert") and so on, in a dict
        for text in ast.literal_eval(tree.body[-1].value).values():
            title, rest = text.strip().split("\n\n", 1)
            yield add_paragraphs(f"Explain this topic of Python: {title.splitlines()[0]}.", rest)
        return
    parts = path.relative_to(Path(os.__file__).parent).with_suffix("").parts
    module = ".".join(part for part in parts if part != "__init__")  # "json" for .../python3.11/json/__init__.py
    yield add_paragraphs(f"What is Python's module `{module}` for?", ast.get_docstring(tree))
    for node in tree.body:
        yield from ask_about_definition(node, module)
        for method in node.body if isinstance(node, ast.ClassDef) else ():
            yield from ask_about_definition(method, f"{module}.{node.name}")


def ask_about_definition(node, parent):
    """Yield the same for a node that is a public class or function."""
    name = f"{parent}.{getattr(node, 'name', '_')}"
    if any(part.startswith("_") for part in name.split(".")):
        return
    if isinstance(node, ast.ClassDef):
        yield add_paragraphs(f"What is the class `{name}`?", ast.get_docstring(node))
    elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        question, answer, *_ = add_paragraphs(f"What does `{name}` do?", ast.get_docstring(node))
        yield question, answer, "What is its signature?", f"{node.name}({ast.unparse(node.args)})"


def add_paragraphs(question, text):
    """Return the question and the first paragraph of a text. The next paragraph, if any, answers "Tell me more."."""
    first, *rest = [part for part in (text or "").split("\n\n") if part.strip()] or [""]
    return [question, first, "Tell me more.", rest[0]] if rest else [question, first]
