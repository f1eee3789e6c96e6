"""``tinker-server doctor``: looks at machine, installation and data before, or while, a server runs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import attrs
import orjson

from tinker_core.engine import EngineConfig
from tinker_core.engine.lock import is_locked
from tinker_core.engine.workers import choose_ranks
from tinker_core.errors import ConfigurationError
from tinker_core.plugins import Plugins
from tinker_server.arguments import parse_arguments
from tinker_server.commands.parsing import Parser
from tinker_server.config import ServerConfig
from tinker_server.devices import choose_device
from tinker_server.doctor import machine, software, storage
from tinker_server.doctor.checkpoint_probe import check_checkpoints
from tinker_server.doctor.findings import Finding, fail, ok, warn
from tinker_server.doctor.sampler import check_chosen_sampler
from tinker_server.doctor.unit import systemd_unit
from tinker_server.plugin_list import plugin_names

_NO_MODEL = ("--base-model", "none")
"""Stands in where no model is given: everything else can be looked at all the same."""


def make_doctor_parser() -> argparse.ArgumentParser:
    """The parser of ``tinker-server doctor``; it leaves the server's flags for the server's parser."""
    parser = Parser(
        prog="tinker-server doctor",
        description="Looks at machine, installation and data, with the flags that the server gets, and says what to "
        "do. Changes nothing, and may run beside a server.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument("--systemd", action="store_true", help="print a systemd unit for these flags instead")
    return parser


def run_doctor(arguments: Sequence[str]) -> int:
    """Run the command; 0 when a server could start, 1 when not."""
    given, flags = make_doctor_parser().parse_known_args(list(arguments))
    if given.systemd:
        config = parse_arguments(flags, Plugins.load(*plugin_names(os.environ)))
        sys.stdout.write(systemd_unit(config, flags, os.environ))
        return 0
    findings = list(findings_for(flags))
    sys.stdout.write(_as_json(findings) if given.json else _as_text(findings))
    return 1 if any(finding.level == "fail" for finding in findings) else 0


def findings_for(flags: Sequence[str]) -> Iterator[Finding]:
    """What all checks find, one after the other."""
    names = software.distributions()
    yield from software.check_python(names)
    yield from software.check_packages(names)
    plugins, found = software.check_plugins(os.environ)
    yield found
    config: ServerConfig | None = None
    if plugins is not None:
        config, found = _settings(flags, plugins)
        yield found
    if config is not None and plugins is not None:
        yield from _look_at(config, plugins)


def _settings(flags: Sequence[str], plugins: Plugins) -> tuple[ServerConfig | None, Finding]:
    complete = any(flag.partition("=")[0] in ("--base-model", "--config") for flag in flags)
    try:
        config = parse_arguments(flags if complete else [*flags, *_NO_MODEL], plugins)
    except ConfigurationError as error:
        return None, fail("settings", str(error), "give the doctor the flags that the server gets")
    if not complete:
        return config, warn("settings", "no base model is given", "give the doctor the flags that the server gets")
    models = ", ".join(f"{model.name} from {model.path}" for model in config.base_models)
    return config, ok("settings", f"--backend {config.backend} --sampler {config.sampler}, serving {models}")


def _look_at(config: ServerConfig, plugins: Plugins) -> Iterator[Finding]:
    data_dir = Path(config.data_dir).expanduser().resolve()
    device = choose_device(config.device, os.environ)
    engine_config = config.engine_config(plugins=plugin_names(os.environ), device=device)
    yield from _check_workers(engine_config, plugins)
    yield from machine.check_memory()
    yield from machine.check_files(config.max_connections)
    yield from storage.check_data_dir(data_dir)
    usable = data_dir.is_dir() and os.access(data_dir, os.R_OK | os.W_OK | os.X_OK)
    if usable:
        yield from machine.check_clock(data_dir)
        yield from storage.check_lock(data_dir)
        yield from storage.check_database(config, data_dir)
        yield from storage.check_journal(data_dir)
    yield from check_checkpoints(config.checkpoint_store, data_dir)
    yield from machine.check_port(config, usable and is_locked(data_dir))


def _check_workers(config: EngineConfig, plugins: Plugins) -> Iterator[Finding]:
    try:
        num_ranks = choose_ranks(config, plugins)
    except ConfigurationError as error:
        yield fail("workers", str(error), "mend what it names")
        return
    yield from machine.check_device(config.device, num_ranks)
    yield from check_chosen_sampler(config, plugins)


def _as_json(findings: Sequence[Finding]) -> str:
    return orjson.dumps([attrs.asdict(finding) for finding in findings], option=orjson.OPT_INDENT_2).decode() + "\n"


def _as_text(findings: Sequence[Finding]) -> str:
    width = max(len(finding.check) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.level:4}  {finding.check:{width}}  {finding.text}")
        if finding.fix:
            lines.append(f"{'':4}  {'':{width}}  -> {finding.fix}")
    return "\n".join(lines) + "\n"
