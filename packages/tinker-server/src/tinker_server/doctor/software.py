"""Checks of what is installed: Python, packages against the ranges they declare, plugins."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator, Mapping

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from tinker_core.errors import PluginError
from tinker_core.hookspecs import PROJECT
from tinker_core.plugins import Plugins
from tinker_server.doctor.findings import Finding, fail, ok
from tinker_server.plugin_list import plugin_names

_OWN = ("tinker-core", "tinker-server")


def distributions() -> list[str]:
    """Names of the installed distributions that a server is made of: our own, and those of plugins."""
    plugins = {point.dist.name for point in importlib.metadata.entry_points(group=PROJECT) if point.dist is not None}
    return sorted({*_OWN, *plugins})


def check_python(names: list[str]) -> Iterator[Finding]:
    """The interpreter, against what the packages ask for."""
    version = platform.python_version()
    for name in names:
        wanted = str(importlib.metadata.metadata(name).json.get("requires_python", ""))
        if wanted and not SpecifierSet(wanted).contains(version, prereleases=True):
            yield fail("python", f"Python {version}, but {name} needs {wanted}", "install it into another Python")
            return
    yield ok("python", f"Python {version}")


def check_packages(names: list[str]) -> Iterator[Finding]:
    """The versions of everything that the packages need."""
    checked = 0
    for name in names:
        for text in importlib.metadata.requires(name) or []:
            requirement = Requirement(text)
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                continue
            checked += 1
            problem = _problem(requirement)
            if problem:
                yield fail("packages", f"{name}: {problem}", f"pip install '{requirement.name}{requirement.specifier}'")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    yield ok("packages", f"{versions}; {checked} requirements looked at")


def _problem(requirement: Requirement) -> str | None:
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return f"{requirement.name} is not installed"
    if not requirement.specifier.contains(version, prereleases=True):
        return f"{requirement.name} {version} is installed, but {requirement.specifier} is needed"
    return None


def check_plugins(environment: Mapping[str, str]) -> tuple[Plugins | None, Finding]:
    """That the plugins load and agree with each other."""
    try:
        plugins = Plugins.load(*plugin_names(environment))
        parts: dict[str, list[str]] = {
            "trainers": sorted(plugins.trainers()),
            "samplers": sorted(plugins.samplers()),
            "executors": sorted(plugins.executors()),
            "losses": sorted(plugins.losses()),
            "optimizers": sorted(plugins.optimizers()),
        }
        plugins.routes()
    except PluginError as error:
        return None, fail("plugins", str(error), "uninstall the plugin, or leave it out with TINKER_PLUGINS")
    listed = "; ".join(f"{kind}: {', '.join(found) or 'none'}" for kind, found in parts.items())
    return plugins, ok("plugins", listed)
