"""Files and functions stay small enough to be read at one sitting."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
CODE = [
    path
    for folder in ("packages", "scripts", "examples", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if not path.name.endswith("_pb2.py")
]
LONGEST_FILE = 600
LONGEST_FUNCTION = 50


def test_no_file_is_too_long() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in CODE}
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST_FILE} == {}


def length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from ``def`` to the end, without the docstring."""
    assert node.end_lineno is not None
    documentation = len(ast.get_docstring(node, clean=False).splitlines()) if ast.get_docstring(node) else 0
    return node.end_lineno - node.lineno + 1 - documentation


def test_no_function_is_too_long() -> None:
    lengths = {
        f"{path.relative_to(ROOT)}:{node.name}": length(node)
        for path in CODE
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST_FUNCTION} == {}


def test_no_work_is_left_as_a_note() -> None:
    markers = ("TO" + "DO", "FIX" + "ME", "XX" + "X")
    found = [str(path.relative_to(ROOT)) for path in CODE if any(marker in path.read_text() for marker in markers)]
    assert found == []
