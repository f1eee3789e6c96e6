"""Documentation says what the code says."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("packages/*/README.md")])
EXAMPLES = sorted(ROOT.glob("examples/*.py"))
HOOKSPECS = ast.parse((ROOT / "packages/tinker-core/src/tinker_core/hookspecs.py").read_text())
HOOKS = {
    node.name: node for node in HOOKSPECS.body if isinstance(node, ast.FunctionDef) and node.name.startswith("tinker_")
}


def test_reference_pages_are_what_the_code_says() -> None:
    script = str(ROOT / "scripts" / "generate_reference.py")
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_is_documented_with_its_exact_signature(hook: str) -> None:
    signature = f"def {hook}({ast.unparse(HOOKS[hook].args)}) -> None"
    page = (ROOT / "docs/reference/hooks.md").read_text()
    assert "".join(signature.split()) in "".join(page.split())


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_has_a_test_that_implements_it(hook: str) -> None:
    others = (path for path in (ROOT / "tests").rglob("*.py") if path != Path(__file__))
    assert any(f"def {hook}(" in path.read_text() for path in others)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert missing == []


def code_blocks(page: Path) -> dict[str, str]:
    """The fenced blocks of a page that are introduced by a line with nothing but a file name."""
    return dict(re.findall(r"^`([^`\n]+)`:\n\n```\w+\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL))


def test_the_plugin_of_the_how_to_works(tmp_path: Path) -> None:
    blocks = code_blocks(ROOT / "docs/how-to/write-a-plugin.md")
    project = blocks.pop("pyproject.toml")
    metadata = tmp_path / "acme_losses-1.0.dist-info"
    for name, text in blocks.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "acme_losses" / "__init__.py").write_text("")
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-losses\nVersion: 1.0\n")
    entry_point = project.split("[project.entry-points.tinker_core]")[1].replace('"', "")
    (metadata / "entry_points.txt").write_text(f"[tinker_core]{entry_point}")
    code = """
import sys
from tinker_core import Plugins
plugins = Plugins.load("acme")
assert "acme_losses.losses" not in sys.modules
(info,) = plugins.installed()
assert (info.distribution, info.version, info.hooks) == ("acme-losses", "1.0", ("tinker_register_loss",))
loss = plugins.losses()["acme_squared_error"]
import torch
class Context:
    config = {}
    def input(self, name):
        return torch.tensor([1.0, 2.0])
assert loss.compute(torch.tensor([3.0, 2.0]), Context()).item() == 4.0
from acme_losses.optimizers import SIGN_DESCENT
class Step:
    optimizer_params = {"type": "acme_sign", "learning_rate": 0.5}
weights, optimizer = torch.tensor([1.0, 1.0]), SIGN_DESCENT.build({"decay": 0.5})
assert optimizer.step(weights, torch.tensor([3.0, -4.0]), Step()) == {"grad_norm": 5.0}
assert weights.tolist() == [0.0, 1.0]
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False, env={"PYTHONPATH": "."}
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_examples_use_nothing_of_ours(example: Path) -> None:
    tree = ast.parse(example.read_text())
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert "tinker" in imported
    assert not any(name.startswith("tinker_") for name in imported)


def test_the_tutorial_quotes_the_example() -> None:
    tutorial = (ROOT / "docs/tutorial/first-fine-tune.md").read_text()
    example = (ROOT / "examples/supervised.py").read_text()
    (quoted,) = re.findall(r"```python\n(.*?)```", tutorial, re.DOTALL)
    lines = [line.strip() for line in example.splitlines()]
    assert all(line in lines for line in quoted.splitlines())


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", ROOT / "docs/tutorial/first-fine-tune.md"], ids=lambda path: path.name
)
def test_commands_name_files_that_exist(page: Path) -> None:
    named = re.findall(r"\b((?:scripts|examples|requirements|packages)/[\w./-]+)", page.read_text())
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []


def resolves(name: str) -> bool:
    """Whether a dotted name is a module, or an attribute of one."""
    found = pkgutil.resolve_name(name.split(".", maxsplit=1)[0])
    for part in name.split(".")[1:]:
        if not hasattr(found, part):
            try:
                importlib.import_module(f"{found.__name__}.{part}")
            except (ImportError, AttributeError):
                return False
        found = getattr(found, part)
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_names_of_code_exist(page: Path) -> None:
    names = set(re.findall(r"`@?(tinker_(?:core|server|backend_fsdp|backend_megatron)\.[\w.]+)`", page.read_text()))
    names -= {"tinker_server.lora_alpha", "tinker_server.target_modules"}  # keys of user_metadata
    assert [name for name in sorted(names) if not resolves(name)] == []
