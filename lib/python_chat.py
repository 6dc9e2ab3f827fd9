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
        for question, answer, *more in topics(tree) if path.name == "topics.py" else documented(tree, module(path)):
            if 20 <= len(answer) <= 1000 and not answer.startswith(">>>") and answer not in seen:
                seen.add(answer)
                roles = ("user", "assistant", "user", "assistant")
                turns = zip(roles, (question, answer, *more), strict=False)
                yield [{"role": role, "content": content} for role, content in turns]


def module(path):
    """The name under which a file of the standard library is imported: "json" for .../python3.11/json/__init__.py."""
    parts = path.relative_to(Path(os.__file__).parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def documented(tree, name):
    """Yield (question, answer), or with a second pair (question, answer, question, answer), for each docstring."""
    yield from about(tree, f"What is Python's module `{name}` for?")
    for node in tree.body:
        yield from about_definition(node, name)
        for method in node.body if isinstance(node, ast.ClassDef) else ():
            yield from about_definition(method, f"{name}.{node.name}")


def about_definition(node, place):
    """The same for one public class or function, if the node is one."""
    name = f"{place}.{getattr(node, 'name', '_')}"
    if any(part.startswith("_") for part in name.split(".")):
        return
    if isinstance(node, ast.ClassDef):
        yield from about(node, f"What is the class `{name}`?")
    elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        yield from about(
            node, f"What does `{name}` do?", "What is its signature?", f"{node.name}({ast.unparse(node.args)})"
        )


def about(node, question, *more):
    """The question with the docstring's first paragraph. If there is no second pair, the next paragraph makes one."""
    first, *rest = (ast.get_docstring(node) or "").split("\n\n")
    if rest and not more:
        more = ("Tell me more.", rest[0])
    yield question, first, *more


def topics(tree):
    """The same for the dict in pydoc_data/topics.py: the texts of help("assert") and the like."""
    for text in ast.literal_eval(tree.body[-1].value).values():
        title, first, *rest = text.strip().split("\n\n")
        more = ("Tell me more.", rest[0]) if rest else ()
        yield f"Explain this topic of Python: {title.splitlines()[0]}.", first, *more
