"""The command line: one flag a setting, and one for every option of an installed plugin."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import attrs

from tinker_core.errors import ConfigurationError, PluginError
from tinker_core.interfaces import Option
from tinker_core.plugins import Plugins
from tinker_server import __version__
from tinker_server.cli import FOREGROUND
from tinker_server.commands.parsing import Parser
from tinker_server.config import NO_SAMPLER, ServerConfig, settings, type_of
from tinker_server.config_file import build_config

_DESCRIPTION = "The Tinker API on your own hardware: serves base models for training and sampling with the tinker SDK."


def parse_arguments(arguments: Sequence[str], plugins: Plugins) -> ServerConfig:
    """The configuration that a command line describes; raises `ConfigurationError` that names the flag."""
    parser = make_parser(plugins)
    given = vars(parser.parse_args(list(arguments)))
    base_models = given.pop("base_model", None) or []
    given.pop("no_supervisor", None)  # decided before, without reading any settings
    options = {option.name: option for owned in plugin_options(plugins).values() for option in owned}
    config = build_config(given, base_models, tuple(options.values()))
    return _with_chosen_options(config, plugins)


def make_parser(plugins: Plugins) -> argparse.ArgumentParser:
    """A parser that returns only what was given, so that a file's settings show through."""
    parser = Parser(
        prog="tinker-server",
        description=_DESCRIPTION,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        epilog="'tinker-server plugins' lists the installed plugins as JSON. "
        "'tinker-server doctor' checks machine and settings before a start. "
        "'tinker-server keys' and 'tinker-server usage' are for servers that several people share.",
    )
    parser.add_argument("--version", action="version", version=f"tinker-server {__version__}")
    parser.add_argument(
        FOREGROUND, action="store_true", help="serve in this process, for debuggers; nothing restarts it"
    )
    parser.add_argument("--config", metavar="FILE", help="TOML file with these settings by name, and [[models]]")
    parser.add_argument(
        "--base-model",
        action="append",
        metavar="NAME=PATH|PATH|NAME",
        help="base model to serve: a directory or hub name, and the name clients ask for; repeatable",
    )
    for name, field in settings().items():
        _add_flag(parser, name, type_of(field), field.default, field.metadata)
    for owner, options in plugin_options(plugins).items():
        group = parser.add_argument_group(f"options of {owner}")
        for option in options:
            _add_option(group, option)
    return parser


def _add_flag(parser: argparse.ArgumentParser, name: str, kind: type, default: object, metadata: Any) -> None:  # noqa: ANN401
    text = metadata["help"] if default is None else f"{metadata['help']} (default: {default})"
    flag = "--" + name.replace("_", "-")
    if kind is bool:
        parser.add_argument(flag, action="store_true", help=metadata["help"])
    elif metadata["choices"]:
        parser.add_argument(flag, choices=metadata["choices"], help=text)
    else:
        metavar = metadata["metavar"] or {int: "N", float: "USD"}.get(kind, name.upper())
        parser.add_argument(flag, type=kind, metavar=metavar, help=text)


def _add_option(group: argparse._ArgumentGroup, option: Option) -> None:
    text = f"{option.help} (default: {option.default})" if option.default != "" else option.help
    flag = f"--{option.name}"
    try:
        if option.type is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        else:
            group.add_argument(flag, type=option.type, metavar=option.type.__name__.upper(), help=text)
    except argparse.ArgumentError as error:
        raise PluginError(f"a plugin's option {flag} clashes with a flag of tinker-server: {error}") from error


def plugin_options(plugins: Plugins) -> dict[str, tuple[Option, ...]]:
    """Options by "trainer NAME", "sampler NAME" or "service NAME"; one that several share word for word appears once.

    Raises `PluginError` when two mean different things by one name.
    """
    sources = {f"trainer {name}": trainer.options for name, trainer in sorted(plugins.trainers().items())}
    sources |= {f"sampler {name}": sampler.options for name, sampler in sorted(plugins.samplers().items())}
    sources |= {f"service {name}": service.options for name, service in sorted(plugins.services().items())}
    owners: dict[str, tuple[str, Option]] = {}
    found: dict[str, tuple[Option, ...]] = {}
    for owner, options in sources.items():
        fresh = []
        for option in options:
            first = owners.setdefault(option.name, (owner, option))
            if first[1] != option:
                raise PluginError(f"{first[0]} and {owner} both have an option --{option.name} and differ about it")
            if first[0] == owner:
                fresh.append(option)
        if fresh:
            found[owner] = tuple(fresh)
    return found


def _with_chosen_options(config: ServerConfig, plugins: Plugins) -> ServerConfig:
    """Check backend and sampler by name, refuse options of plugins that were not chosen, add defaults."""
    trainers, samplers = plugins.trainers(), plugins.samplers()
    if config.backend not in trainers:
        raise ConfigurationError(f"--backend {config.backend!r} is not installed; installed: {_names(trainers)}")
    options = list(trainers[config.backend].options)
    if config.sampler != NO_SAMPLER:
        if config.sampler not in samplers:
            raise ConfigurationError(
                f"--sampler {config.sampler!r} is not installed; installed: {_names(samplers)}, none"
            )
        options += samplers[config.sampler].options
    options += [option for service in plugins.services().values() for option in service.options]
    defaults = {option.name: option.default for option in options}
    foreign = sorted(config.options.keys() - defaults.keys())
    if foreign:
        raise ConfigurationError(
            f"--{foreign[0]} belongs neither to --backend {config.backend} nor to --sampler {config.sampler}; "
            "leave it out"
        )
    return attrs.evolve(config, options={**defaults, **config.options})


def _names(plugins: dict[str, Any]) -> str:
    return ", ".join(sorted(plugins)) or "none"
