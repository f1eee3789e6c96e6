"""Who may know whom: read from the source, and seen in fresh interpreters."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = {path.name: path for path in sorted(ROOT.glob("packages/*/src/*")) if (path / "__init__.py").exists()}
TORCH = {"torch", "transformers", "peft", "safetensors", "accelerate", "vllm", "megatron"}
HTTP = {"starlette", "uvicorn", "httpx", "google"}
SDK = {"tinker"}
BACKENDS = {"tinker_backend_fsdp", "tinker_backend_megatron"}
CORE_WITH_TORCH = (
    "tinker_core.training",
    "tinker_core.testing",
    "tinker_core.sampling.colocated",
    "tinker_core.sampling.drawing",
    "tinker_core.sampling.scoring",
)
"""Parts of tinker-core that need an extra."""


def forbidden_in(package: str) -> set[str]:
    """Top-level names that no line of a package may import."""
    others = set(SOURCES) - {package, "tinker_core"}
    if package == "tinker_core":
        return others | HTTP | SDK
    if package == "tinker_server":
        return others | TORCH | SDK
    if package == "tinker_jobs":
        # An HTTP service that looks into models' files, and a client of the SDK that needs tokenizers.
        return others | (TORCH - {"transformers", "safetensors"})
    return others | HTTP | SDK


def imports_of(tree: ast.AST) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module, node.lineno


def runs_at_import(tree: ast.Module) -> Iterator[ast.stmt]:
    """Statements that run when a module is imported, without ``if TYPE_CHECKING`` blocks."""
    pending: list[ast.stmt] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending.extend(node.orelse)
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        pending.extend(child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt))


def modules(package: str) -> list[Path]:
    return sorted(SOURCES[package].rglob("*.py"))


def test_all_packages_are_looked_at() -> None:
    assert {
        "tinker_core",
        "tinker_server",
        "tinker_backend_fsdp",
        "tinker_backend_megatron",
        "tinker_jobs",
        "tinker_sampler_vllm",
    } <= set(SOURCES)


@pytest.mark.parametrize("package", SOURCES)
def test_no_package_imports_what_it_must_not_know(package: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in modules(package)
        for name, line in imports_of(ast.parse(path.read_text()))
        if name.split(".")[0] in forbidden_in(package)
    ]
    assert wrong == []


def test_tinker_core_needs_torch_only_in_parts_with_an_extra() -> None:
    optional = {module.split(".", 1)[1].replace(".", "/") for module in CORE_WITH_TORCH}
    root = SOURCES["tinker_core"]
    light = [
        path for path in modules("tinker_core") if not _in_parts(str(path.relative_to(root).with_suffix("")), optional)
    ]
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in light
        for statement in runs_at_import(ast.parse(path.read_text()))
        for name, line in imports_of(statement)
        if name.split(".")[0] in TORCH or name.startswith("tinker_core.training")
    ]
    assert wrong == []


def _in_parts(path: str, parts: set[str]) -> bool:
    return any(path == part or path.startswith(f"{part}/") for part in parts)


def test_only_the_plugin_manager_calls_hooks() -> None:
    wrong = [
        str(path.relative_to(ROOT))
        for package in SOURCES
        for path in modules(package)
        if ".hook." in path.read_text() and path != SOURCES["tinker_core"] / "plugins.py"
    ]
    assert wrong == []


def loaded_after(*arguments: str) -> set[str]:
    """Names of all modules that a fresh interpreter has loaded after running something that prints them."""
    done = subprocess.run([sys.executable, "-P", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def importing_all_of(package: str, *skip: str) -> set[str]:
    return loaded_after(str(ROOT / "scripts" / "import_all.py"), package, *skip)


def top_levels(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


PRINT_LOADED = "; import sys; print(*sorted(sys.modules))"


def test_tinker_core_loads_without_torch_http_or_plugins() -> None:
    loaded = importing_all_of("tinker_core", "-torch", "-pytest")
    assert "tinker_core.engine" in loaded
    assert loaded & (TORCH | HTTP | SDK | {"tinker_server", *BACKENDS, "pytest"}) == set()


def test_tinker_server_loads_without_torch_or_plugins() -> None:
    loaded = importing_all_of("tinker_server")
    assert "tinker_server.cli" in loaded
    assert loaded & (TORCH | SDK | BACKENDS) == set()


def test_the_servers_side_of_the_vllm_sampler_loads_without_torch_or_vllm() -> None:
    loaded = importing_all_of("tinker_sampler_vllm", "-torch")
    assert {"tinker_sampler_vllm.sampler", "tinker_sampler_vllm.links.local"} <= loaded
    assert loaded & (TORCH | SDK | {"tinker_server", *BACKENDS}) == set()


@pytest.mark.parametrize("package", sorted(set(SOURCES) - {"tinker_server"}))
def test_hooks_import_nothing_heavy(package: str) -> None:
    loaded = loaded_after("-c", f"import {package}.hooks" + PRINT_LOADED)
    assert loaded & TORCH == set()
    light = loaded_after("-c", "import tinker_core.hooks, tinker_core.interfaces" + PRINT_LOADED)
    assert top_levels(loaded) - top_levels(light) <= {package} | sys.stdlib_module_names


def test_loading_all_plugins_and_listing_trainers_imports_nothing_heavy() -> None:
    code = "from tinker_core import Plugins; p = Plugins.load('*'); p.trainers(); p.samplers(); p.executors()"
    loaded = loaded_after("-c", code + PRINT_LOADED)
    assert {"tinker_backend_fsdp.hooks", "tinker_backend_megatron.hooks", "tinker_sampler_vllm.hooks"} <= loaded
    assert loaded & TORCH == set()
