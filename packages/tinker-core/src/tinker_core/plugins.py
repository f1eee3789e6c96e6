"""The only place that talks to pluggy."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any, TypeVar

import attrs
import pluggy

from tinker_core import hookspecs
from tinker_core.errors import PluginError
from tinker_core.extensions import CommandPlugin, ServicePlugin
from tinker_core.interfaces import ExecutorPlugin, LossPlugin, OptimizerPlugin, SamplerPlugin, TrainerPlugin
from tinker_core.rewards import EnvironmentPlugin, RewardRecipePlugin
from tinker_core.types import CUSTOM_LOSS, RequestError, RequestType

ALL = "*"
"""Stands for every installed plugin in `Plugins.load`."""

_P = TypeVar(
    "_P",
    TrainerPlugin,
    SamplerPlugin,
    ExecutorPlugin,
    LossPlugin,
    OptimizerPlugin,
    RewardRecipePlugin,
    EnvironmentPlugin,
    ServicePlugin,
    CommandPlugin,
)


@attrs.frozen(kw_only=True)
class PluginInfo:
    """One loaded plugin, as ``tinker-server plugins`` lists it."""

    name: str
    distribution: str
    version: str
    hooks: tuple[str, ...]


class Plugins:
    """A set of plugins and what they registered. Each instance is independent; there is no global one."""

    def __init__(self) -> None:
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self._infos: dict[str, PluginInfo] = {}

    @classmethod
    def load(cls, *names: str) -> Plugins:
        """Load installed plugins by entry-point name; ``"*"`` loads all, nothing loads none.

        A name with a dot is a module to import, for plugins that are not installed (tests, notebooks).  Raises
        `PluginError` for a name that is not installed, claimed by two distributions, or fails to import.
        """
        plugins = cls()
        found = _entry_points()
        wanted = dict.fromkeys((*sorted(found), *names) if ALL in names else names)
        for name in wanted:
            if name == ALL:
                continue
            if "." in name:
                plugins.register(_import(name), name)
                continue
            if name not in found:
                known = ", ".join(sorted(found)) or "none"
                raise PluginError(f"plugin {name!r} is not installed; installed plugins: {known}")
            plugins._load_entry_point(found[name])
        return plugins

    def _load_entry_point(self, candidates: list[importlib.metadata.EntryPoint]) -> None:
        owners = sorted({_distribution_of(point) for point in candidates})
        name = candidates[0].name
        if len(owners) > 1:
            raise PluginError(f"plugin {name!r} is claimed by {' and '.join(owners)}; uninstall one of them")
        point = candidates[0]
        try:
            module = point.load()
        except ImportError as error:
            raise PluginError(f"plugin {name!r} of {owners[0]} cannot be imported: {error}") from error
        version = point.dist.version if point.dist else "unknown"
        self.register(module, name, distribution=owners[0], version=version)

    def register(self, plugin: object, name: str, *, distribution: str = "", version: str = "") -> None:
        """Add a plugin object or module; raises `PluginError` for a taken name or a hook that does not exist."""
        try:
            self._manager.register(plugin, name)
            self._manager.check_pending()
        except (ValueError, pluggy.PluginValidationError) as error:
            raise PluginError(f"plugin {name!r} cannot be registered: {error}") from error
        hooks = tuple(sorted(caller.name for caller in self._manager.get_hookcallers(plugin) or ()))
        self._infos[name] = PluginInfo(name=name, distribution=distribution or name, version=version, hooks=hooks)

    def installed(self) -> tuple[PluginInfo, ...]:
        """The loaded plugins by name."""
        return tuple(self._infos[name] for name in sorted(self._infos))

    def trainers(self) -> dict[str, TrainerPlugin]:
        """Registered trainers by name."""
        return self._collect("tinker_register_trainer", "trainer")

    def samplers(self) -> dict[str, SamplerPlugin]:
        """Registered samplers by name."""
        return self._collect("tinker_register_sampler", "sampler")

    def executors(self) -> dict[str, ExecutorPlugin]:
        """Registered executors by name."""
        return self._collect("tinker_register_executor", "executor")

    def losses(self) -> dict[str, LossPlugin]:
        """Registered losses by name."""
        found: dict[str, LossPlugin] = self._collect("tinker_register_loss", "loss")
        if CUSTOM_LOSS in found:
            raise PluginError(f"loss {CUSTOM_LOSS!r}: the name belongs to losses that clients define; choose another")
        return found

    def optimizers(self) -> dict[str, OptimizerPlugin]:
        """Registered optimizer families by name."""
        return self._collect("tinker_register_optimizer", "optimizer")

    def reward_recipes(self) -> dict[str, RewardRecipePlugin]:
        """Registered reward recipes by name."""
        return self._collect("tinker_register_reward_recipe", "reward recipe")

    def environments(self) -> dict[str, EnvironmentPlugin]:
        """Registered providers of environments by name."""
        return self._collect("tinker_register_environment", "environment provider")

    def services(self) -> dict[str, ServicePlugin]:
        """Registered services by name."""
        return self._collect("tinker_register_service", "service")

    def commands(self) -> dict[str, CommandPlugin]:
        """Registered commands by name."""
        return self._collect("tinker_register_command", "command")

    def routes(self) -> list[Any]:
        """Registered Starlette routes, in order of plugin name."""
        routes: list[Any] = []
        for _, call in self._implementations("tinker_register_routes"):
            call(register=routes.append)
        return routes

    def request_finished(
        self,
        *,
        request_id: str,
        request_type: RequestType,
        model_id: str | None,
        seconds: float,
        error: RequestError | None,
    ) -> None:
        """Tell all observers that a request finished."""
        self._manager.hook.tinker_request_finished(
            request_id=request_id, request_type=request_type, model_id=model_id, seconds=seconds, error=error
        )

    def _implementations(self, hook: str) -> list[tuple[PluginInfo, Callable[..., Any]]]:
        caller = getattr(self._manager.hook, hook)
        found = [(self._infos[impl.plugin_name], impl.function) for impl in caller.get_hookimpls()]
        return sorted(found, key=lambda pair: pair[0].name)

    def _collect(self, hook: str, noun: str) -> dict[str, _P]:
        found: dict[str, _P] = {}
        owners: dict[str, PluginInfo] = {}
        for info, call in self._implementations(hook):
            register = partial(_claim, found, owners, info, noun)
            call(register=register)
        return found


def _claim(found: dict[str, _P], owners: dict[str, PluginInfo], info: PluginInfo, noun: str, item: _P) -> None:
    if item.name in owners:
        both = " and ".join(sorted((owners[item.name].distribution, info.distribution)))
        raise PluginError(f"{noun} {item.name!r} is registered by {both}; uninstall one of them")
    owners[item.name] = info
    found[item.name] = item


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise PluginError(f"plugin module {name!r} cannot be imported: {error}") from error


def _entry_points() -> dict[str, list[importlib.metadata.EntryPoint]]:
    found: defaultdict[str, list[importlib.metadata.EntryPoint]] = defaultdict(list)
    for point in importlib.metadata.entry_points(group=hookspecs.PROJECT):
        found[point.name].append(point)
    return found


def _distribution_of(point: importlib.metadata.EntryPoint) -> str:
    return point.dist.name if point.dist else "an unknown distribution"
