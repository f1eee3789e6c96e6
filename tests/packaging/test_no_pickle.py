"""No package can pickle or unpickle: neither files nor what passes between processes."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted(path for path in ROOT.glob("packages/*/src/*/**/*.py") if not path.name.endswith("_pb2.py"))

LIBRARIES = (
    *("pickle", "_pickle", "copyreg", "cloudpickle", "dill", "joblib", "shelve", "marshal"),
    *("multiprocessing", "concurrent.futures.process", "concurrent.futures.ProcessPoolExecutor"),
    *("torch.multiprocessing", "torch.package", "torch.distributed.rpc", "torch.distributed.checkpoint"),
)
"""Modules that pickle, or whose queues, pipes, pools and stores do."""
FUNCTIONS = frozenset({"torch.load", "torch.save", "torch.serialization", "np.fromfile", "numpy.fromfile"})
HARMLESS = frozenset({"multiprocessing.current_process", "multiprocessing.parent_process"})
"""Of these libraries, and send nothing."""
METHODS = frozenset({"read_pickle", "send_pyobj", "recv_pyobj", "send_object", "recv_object"})
"""Last parts of names, of whatever they are called on."""


def is_pickling(name: str) -> bool:
    """Whether a dotted name pickles; ``broadcast_object_list``, ``all_gather_object`` and their like do."""
    last = name.rpartition(".")[2]
    library = any(name == one or name.startswith(f"{one}.") for one in LIBRARIES)
    return (
        (library and name not in HARMLESS)
        or name in FUNCTIONS
        or last in METHODS
        or last.endswith(("_object_list", "gather_object"))
    )


def pickles(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Lines that import, name or ask for something that pickles."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names if is_pickling(alias.name)]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found = [name for name in names if is_pickling(name)]
        elif isinstance(node, ast.Attribute) and is_pickling(ast.unparse(node)):
            found = [ast.unparse(node)]
        elif isinstance(node, ast.Call):
            found = [option for option in map(_option, node.keywords) if option is not None]
        else:
            continue
        yield from ((node.lineno, name) for name in found)


def _option(keyword: ast.keyword) -> str | None:
    """An argument that allows pickles."""
    off = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
    allows = (keyword.arg == "allow_pickle" and not off) or (keyword.arg in {"weights_only", "use_safetensors"} and off)
    return keyword.arg if allows else None


@pytest.mark.parametrize("package", sorted({path.relative_to(ROOT).parts[1] for path in MODULES}))
def test_no_package_pickles(package: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in MODULES
        if path.relative_to(ROOT).parts[1] == package
        for line, name in pickles(ast.parse(path.read_text()))
    ]
    assert found == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "import torch.multiprocessing as mp",
        "from concurrent.futures import ProcessPoolExecutor",
        "from multiprocessing.connection import Client",
        "import torch\ntorch.load(path, weights_only=True)",
        "from torch import save\nsave(state, path)",
        "np.load(path, allow_pickle=True)",
        "np.savez(path, allow_pickle=flag)",
        "dist.broadcast_object_list(objects, src=0)",
        "from torch.distributed import all_gather_object",
        "socket.send_pyobj(record)",
    ],
)
def test_what_pickles_is_found(code: str) -> None:
    assert list(pickles(ast.parse(code))) != []


def test_what_does_not_pickle_is_left_alone() -> None:
    code = "np.load(path, allow_pickle=False)\njson.loads(text)\nself.load(rows)\nsocket.send_multipart(parts)"
    assert list(pickles(ast.parse(code))) == []
    assert list(pickles(ast.parse("from multiprocessing import parent_process"))) == []
