"""Writes docs/reference/ from the code; with ``--check``, fails if a page differs from what it would write."""

from __future__ import annotations

import argparse
import ast
import inspect
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import compatibility
import custom_losses_reference
import jobs_reference
import metrics_reference

from tinker_core import Plugins, errors, extensions, hookspecs, interfaces, rewards
from tinker_core.training import losses
from tinker_jobs.cli.command import make_jobs_parser
from tinker_sampler_vllm.cli import make_parser as make_vllm_parser
from tinker_server import plugin_list
from tinker_server.arguments import make_parser
from tinker_server.commands.database import make_database_parser
from tinker_server.commands.doctor import make_doctor_parser
from tinker_server.commands.keys import make_keys_parser
from tinker_server.commands.tokens import make_tokens_parser
from tinker_server.commands.usage import make_usage_parser
from tinker_server.plugin_list import PLUGINS_VARIABLE

REFERENCE = Path(__file__).parents[1] / "docs" / "reference"
NOTICE = "<!-- Written by scripts/generate_reference.py from the code; do not edit. -->\n\n"


def plain(docstring: str | None) -> str:
    """A docstring as Markdown: double backticks become single, references become code."""
    return inspect.cleandoc(docstring or "").replace("``", "`")


def hook_names() -> list[str]:
    """All hooks, in the order of the source."""
    return [name for name in vars(hookspecs) if name.startswith("tinker_")]


def signature(hook: str) -> str:
    """The exact signature of a hook, laid out as in the source."""
    source = inspect.getsource(getattr(hookspecs, hook))
    return source[source.index("def ") : source.index(" -> None:")] + " -> None"


def field_docs(module: ModuleType, cls: str) -> list[tuple[str, str, str]]:
    """Name, annotation with default, and documentation of every field of a record."""
    tree = ast.parse(inspect.getsource(getattr(module, cls)))
    definition = tree.body[0]
    assert isinstance(definition, ast.ClassDef)
    found: list[tuple[str, str, str]] = []
    for statement, following in zip(definition.body, [*definition.body[1:], None], strict=True):
        if not isinstance(statement, ast.AnnAssign):
            continue
        kind = ast.unparse(statement.annotation)
        if statement.value is not None:
            kind += f" = {ast.unparse(statement.value)}"
        described = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
        text = str(following.value.value) if described else ""  # type: ignore[union-attr]
        found.append((ast.unparse(statement.target), kind, plain(text)))
    return found


def hooks_page() -> str:
    """Every hook with its exact signature, and the record that it registers."""
    lines = [
        "# Hooks",
        "",
        "A plugin is a module named by an entry point of the group `tinker_core`. It implements any of these,",
        "marked with `@tinker_core.hookimpl`. See [how to write a plugin](../how-to/write-a-plugin.md).",
        "",
    ]
    for hook in hook_names():
        lines += [f"## {hook}", "", "```python", "@hookimpl", signature(hook) + ": ...", "```", ""]
        lines += [plain(getattr(hookspecs, hook).__doc__), ""]
        record = signature(hook).split("Callable[[")[-1].split("]")[0] if "Callable[[" in signature(hook) else ""
        module = next((one for one in (interfaces, extensions, rewards) if hasattr(one, record)), None)
        if module is None:
            continue
        lines += [f"`{record}`: {plain(getattr(module, record).__doc__)}", ""]
        lines += [f"- `{name}: {kind}` {text}".rstrip() for name, kind, text in field_docs(module, record)]
        lines += [""]
    return "\n".join(lines)


def error_classes() -> list[type[errors.TinkerError]]:
    """All error classes, in the order of the source."""
    return [
        value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, errors.TinkerError)
    ]


def errors_page() -> str:
    """Every error with its category."""
    lines = [
        "# Errors",
        "",
        "Every error says what to do about it. Category `user` means that changing the request helps,",
    ]
    lines += [
        "`server` that it does not. A failed operation is reported by its own future; `code` is the class name.",
        "",
    ]
    lines += ["| error | category | kind of | meaning |", "| --- | --- | --- | --- |"]
    for cls in error_classes():
        text = " ".join(plain(cls.__doc__).split())
        bases = ", ".join(f"`{base.__name__}`" for base in cls.__bases__)
        lines.append(f"| `{cls.__name__}` | {cls.category} | {bases} | {text} |")
    return "\n".join(lines) + "\n"


def loss_formulas() -> dict[str, str]:
    """The documentation under each loss constant, by the name of the loss."""
    body = ast.parse(inspect.getsource(losses)).body
    found: dict[str, str] = {}
    for statement, following in itertools.pairwise(body):
        if not (isinstance(statement, ast.Assign) and isinstance(following, ast.Expr)):
            continue
        target, text = statement.targets[0], following.value
        value = getattr(losses, target.id, None) if isinstance(target, ast.Name) else None
        if isinstance(value, interfaces.LossPlugin) and isinstance(text, ast.Constant):
            found[value.name] = plain(str(text.value))
    return found


def losses_page() -> str:
    """Every built-in loss with formula, inputs and configuration."""
    formulas = loss_formulas()
    lines = ["# Losses", "", " ".join(plain(losses.__doc__).split()), ""]
    lines += ["What an output carries, and which inputs are refused, is in [numerics](../explanation/numerics.md).", ""]
    for loss in losses.BUILT_IN_LOSSES:
        config = [f"`{key}` (required)" for key in loss.required_config]
        config += [f"`{key}` (default {value})" for key, value in loss.default_config.items()]
        lines += [f"## {loss.name}", "", formulas[loss.name], ""]
        lines += [f"- inputs: {', '.join(f'`{name}`' for name in loss.required_inputs)}"]
        lines += [f"- optional inputs: {', '.join(f'`{name}`' for name in loss.optional_inputs) or 'none'}"]
        lines += [f"- configuration: {', '.join(config) or 'none'}"]
        lines += [f"- soft `[T, K]` targets: {'yes' if loss.soft_targets else 'no'}", ""]
    return "\n".join(lines)


def flag_table(actions: list[argparse.Action]) -> list[str]:
    """Rows of flags with their values and help."""
    lines = ["| flag | value | meaning |", "| --- | --- | --- |"]
    for action in actions:
        values = ", ".join(f"`{choice}`" for choice in action.choices) if action.choices else ""
        value = values or (f"`{action.metavar or action.dest.upper()}`" if action.nargs != 0 else "")
        flags = ", ".join(f"`{flag}`" for flag in action.option_strings)
        meaning = str(action.help).replace("%(default)s", str(action.default))
        lines.append(f"| {flags} | {value} | {meaning} |".replace("NAME=PATH|PATH|NAME", "NAME=PATH, PATH or NAME"))
    return lines if actions else []


def cli_page() -> str:
    """All flags, those of the plugins in this repository too."""
    parser = make_parser(Plugins.load("core", "fsdp", "megatron", "vllm", "jobs"))
    lines = ["# tinker-server", "", str(parser.description), "", "```bash"]
    lines += [
        "tinker-server --backend fsdp --base-model NAME=PATH [--base-model ...] [flags]",
        "tinker-server plugins",
        "tinker-server doctor [--json] [--systemd] [flags]",
        "```",
    ]
    lines += ["", f"{parser.epilog} `{PLUGINS_VARIABLE}` in the environment: {plain(cli_variable_doc())}", ""]
    groups = [group for group in parser._action_groups if group._group_actions]
    for group in groups:
        title = str(group.title) if str(group.title).startswith("options of") else "flags"
        lines += [f"## {title.capitalize()}", "", *flag_table(group._group_actions), ""]
    lines += [
        "## Configuration file",
        "",
        "`--config FILE` reads the same settings from TOML, by the flags' names; flags win.",
        "",
    ]
    lines += ["```toml", 'backend = "fsdp"', 'dtype = "bfloat16"', "", "[[models]]", 'name = "Qwen/Qwen3-8B"']
    lines += [
        'path = "/models/Qwen/Qwen3-8B"',
        "",
        "[[models]]",
        'path = "/models/Qwen/Qwen3-0.6B"',
        "trainable = false",
        "```",
        "",
    ]
    lines += [
        *command_section(make_keys_parser()),
        *command_section(make_tokens_parser()),
        *command_section(make_usage_parser()),
        *command_section(make_database_parser()),
        *command_section(make_doctor_parser()),
        *command_section(make_jobs_parser()),
        *command_section(make_vllm_parser()),
        "## Exit status",
        "",
        "0 after a signal to stop; 1 when a model did not start, or server processes kept failing; 2 for settings that",
        "cannot work.",
        "",
    ]
    return "\n".join(lines)


def command_section(parser: argparse.ArgumentParser) -> list[str]:
    """A command besides serving, with its actions and their flags."""
    lines = [f"## {parser.prog}", "", str(parser.description), ""]
    subparsers = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    for actions in subparsers:
        for choice in actions._choices_actions:
            action = actions.choices[choice.dest]
            named = [str(item.metavar) for item in action._actions if not item.option_strings]
            flags = [item for item in action._actions if item.option_strings and item.dest != "help"]
            lines += [f"`{' '.join([parser.prog, choice.dest, *named])}`: {choice.help}.", "", *flag_table(flags), ""]
    if not subparsers:
        lines += [*flag_table([item for item in parser._actions if item.option_strings and item.dest != "help"]), ""]
    return lines


def cli_variable_doc() -> str:
    """What the source says under the name of the environment variable for plugins."""
    body = ast.parse(inspect.getsource(plugin_list)).body
    for statement, following in itertools.pairwise(body):
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "PLUGINS_VARIABLE":
            assert isinstance(following, ast.Expr)
            return str(ast.literal_eval(following.value))
    raise LookupError("PLUGINS_VARIABLE has no documentation")


PAGES: dict[str, Callable[[], str]] = {
    "cli.md": cli_page,
    "hooks.md": hooks_page,
    "errors.md": errors_page,
    "losses.md": losses_page,
    "custom-losses.md": custom_losses_reference.page,
    "compatibility.md": compatibility.page,
    "metrics.md": metrics_reference.page,
    "jobs.md": jobs_reference.page,
}


def main() -> int:
    """Write or check all pages; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing, fail on differences")
    check = parser.parse_args().check
    stale = []
    for name, make in PAGES.items():
        path, text = REFERENCE / name, NOTICE + make().rstrip() + "\n"
        if path.exists() and path.read_text() == text:
            continue
        stale.append(name)
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    if check and stale:
        print(f"out of date: {', '.join(stale)}; run: python scripts/generate_reference.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
