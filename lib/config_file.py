"""
Config files: `name = value` lines, each a literal or arithmetic on literals and on names above it.

    batch_size = 4
    max_iters = 1_000 * batch_size  # a comment

The file has Python's syntax, but it is only parsed, never run.
"""

import ast
import operator
from pathlib import Path

from lib.errors import reject

ARITHMETIC = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.USub: operator.neg,
}  # fmt: skip


def read_config_file(path):
    """The settings in a config file, a list of (path, name, value), with the values as they would stand in a flag."""
    where, names = f"config file {path}", {}

    def evaluate(node):
        match node:
            case ast.Constant(value=int() | float() | str() | None):
                return node.value
            case ast.Name(id=name) if name in names:
                return names[name]
            case ast.UnaryOp(op=op) if type(op) in ARITHMETIC:
                return ARITHMETIC[type(op)](evaluate(node.operand))
            case ast.BinOp(op=op) if type(op) in ARITHMETIC:
                return ARITHMETIC[type(op)](evaluate(node.left), evaluate(node.right))
        raise ValueError(f"{ast.unparse(node)!r:.60} is neither a value nor arithmetic on names above it")

    try:
        content = Path(path).expanduser().read_text(encoding="utf-8")
        for node in ast.parse(content).body:
            where = f"config file {path}, line {node.lineno}"
            match node:
                case ast.Assign(targets=[ast.Name(id=name)]):
                    names[name] = evaluate(node.value)
                case ast.Expr(value=ast.Constant(value=str())):
                    pass  # a docstring
                case _:
                    reject(f"{where}: {ast.unparse(node)!r:.60} is not `name = value`, and nothing else is read")
    except OSError as error:
        reject(f"{where}: {error.strerror}")
    except SyntaxError as error:
        reject(f"{where}, line {error.lineno}: {error.msg}")
    except (ValueError, TypeError, ArithmeticError, RecursionError, MemoryError) as error:
        reject(f"{where}: {error}")
    return [(path, name, str(value)) for name, value in names.items()]
