"""
Questions about Python, and answers from its own documentation: the conversations of --dataset=python_chat.

    for messages in python_chat(files): ...     # [{"role": "user", "content": "What does `json.loads` do?"}, ...]

The answers are the first paragraphs of docstrings in the standard library's source, and of the topics of help(). A
second question asks for a function's signature, or for the next paragraph. The files are parsed, never imported.
"""

import ast
import os
from pathlib import Path


def python_chat(files):
    """
    Yield conversations, each a list of {"role": str, "content": str}, in the order of the files: paths of .py files of
    the standard library. A docstring that was used before is left out, so that train and val share none.
    """
    seen = set()
    for path in files:
        tree = ast.parse(path.read_bytes())
        for texts in topics(tree) if path.name == "topics.py" else documented(tree, path):
            answer = texts[1]
            if 20 <= len(answer) <= 1000 and not answer.startswith(">>>") and answer not in seen:
                seen.add(answer)
                roles = ("user", "assistant", "user", "assistant")
                yield [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


def documented(tree, path):
    """Yield (question, answer), or (question, answer, question, answer), for each docstring of a module."""
    parts = path.relative_to(Path(os.__file__).parent).with_suffix("").parts
    module = ".".join(part for part in parts if part != "__init__")  # "json" for .../python3.11/json/__init__.py
    yield paragraphs(ast.get_docstring(tree), f"What is Python's module `{module}` for?")
    for node in tree.body:
        yield from definition(node, module)
        for method in node.body if isinstance(node, ast.ClassDef) else ():
            yield from definition(method, f"{module}.{node.name}")


def definition(node, place):
    """Yield the same for one class or function, if the node is one and public."""
    name = f"{place}.{getattr(node, 'name', '_')}"
    if any(part.startswith("_") for part in name.split(".")):
        return
    if isinstance(node, ast.ClassDef):
        yield paragraphs(ast.get_docstring(node), f"What is the class `{name}`?")
    elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        question, answer, *_ = paragraphs(ast.get_docstring(node), f"What does `{name}` do?")
        yield question, answer, "What is its signature?", f"{node.name}({ast.unparse(node.args)})"


def paragraphs(text, question):
    """Return the question with a text's first paragraph. The next paragraph, if any, makes a second pair."""
    first, *rest = [part for part in (text or "").split("\n\n") if part.strip()] or [""]
    return [question, first, "Tell me more.", rest[0]] if rest else [question, first]


def topics(tree):
    """Yield the same for the dict in pydoc_data/topics.py: the texts of help("assert") and the like."""
    for text in ast.literal_eval(tree.body[-1].value).values():
        title, rest = text.strip().split("\n\n", 1)
        yield paragraphs(rest, f"Explain this topic of Python: {title.splitlines()[0]}.")
