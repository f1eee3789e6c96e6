from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.core.conftest import Client, forward_backward
from tinker_core import Plugins, hookimpl
from tinker_core.engine import Engine, EngineConfig, NewSession
from tinker_core.errors import PluginError
from tinker_core.extensions import CommandPlugin, ServicePlugin
from tinker_core.interfaces import (
    ExecutorPlugin,
    LossPlugin,
    OptimizerPlugin,
    SamplerPlugin,
    TrainerPlugin,
)
from tinker_core.rewards import EnvironmentPlugin, Reward, RewardRecipePlugin
from tinker_core.testing.fakes import FAKE_PLUGIN
from tinker_core.types import BaseModelSpec, Placement, RequestError, RequestType


class Everything:
    """A plugin that implements every register hook that takes something by name."""

    @hookimpl
    def tinker_register_trainer(self, register: Callable[[TrainerPlugin], None]) -> None:
        register(TrainerPlugin(name="acme", build=lambda context, parts: None))  # type: ignore[arg-type, return-value]

    @hookimpl
    def tinker_register_sampler(self, register: Callable[[SamplerPlugin], None]) -> None:
        register(SamplerPlugin(name="acme", placement=Placement.OWN))

    @hookimpl
    def tinker_register_executor(self, register: Callable[[ExecutorPlugin], None]) -> None:
        register(ExecutorPlugin(name="acme", start=lambda spec: None))

    @hookimpl
    def tinker_register_loss(self, register: Callable[[LossPlugin], None]) -> None:
        register(LossPlugin(name="acme", compute=lambda logprobs, context: logprobs))

    @hookimpl
    def tinker_register_optimizer(self, register: Callable[[OptimizerPlugin], None]) -> None:
        register(OptimizerPlugin(name="acme", build=lambda settings: None))  # type: ignore[arg-type, return-value]

    @hookimpl
    def tinker_register_reward_recipe(self, register: Callable[[RewardRecipePlugin], None]) -> None:
        register(RewardRecipePlugin(name="acme", score=lambda judged: Reward(value=1.0)))

    @hookimpl
    def tinker_register_environment(self, register: Callable[[EnvironmentPlugin], None]) -> None:
        register(EnvironmentPlugin(name="acme", open=lambda task, inputs, seconds: None))  # type: ignore[arg-type, return-value]

    @hookimpl
    def tinker_register_service(self, register: Callable[[ServicePlugin], None]) -> None:
        register(ServicePlugin(name="acme", build=lambda context: None))  # type: ignore[arg-type, return-value]

    @hookimpl
    def tinker_register_command(self, register: Callable[[CommandPlugin], None]) -> None:
        run: Callable[[Any], int] = lambda arguments: 0  # noqa: E731
        register(CommandPlugin(name="acme", help="do it", run=run, make_parser=argparse.ArgumentParser))


COLLECTED: dict[str, Callable[[Plugins], dict[str, Any]]] = {
    "trainer": Plugins.trainers,
    "sampler": Plugins.samplers,
    "executor": Plugins.executors,
    "loss": Plugins.losses,
    "optimizer": Plugins.optimizers,
    "reward recipe": Plugins.reward_recipes,
    "environment provider": Plugins.environments,
    "service": Plugins.services,
    "command": Plugins.commands,
}


@pytest.mark.parametrize("noun", COLLECTED)
def test_what_a_plugin_registers_is_found_by_name(noun: str) -> None:
    plugins = Plugins()
    plugins.register(Everything(), "acme")
    assert COLLECTED[noun](plugins)["acme"].name == "acme"


@pytest.mark.parametrize("noun", COLLECTED)
def test_a_name_claimed_twice_is_an_error_that_names_both_distributions(noun: str) -> None:
    plugins = Plugins()
    plugins.register(Everything(), "one", distribution="acme-one")
    plugins.register(Everything(), "two", distribution="acme-two")
    with pytest.raises(PluginError, match=rf"{noun} 'acme' is registered by acme-one and acme-two"):
        COLLECTED[noun](plugins)


def test_a_hook_that_does_not_exist_is_an_error() -> None:
    class Misspelled:
        @hookimpl
        def tinker_register_trainers(self, register: object) -> None: ...

    with pytest.raises(PluginError, match="tinker_register_trainers"):
        Plugins().register(Misspelled(), "typo")


def test_a_plugin_that_is_not_installed_is_an_error_that_lists_those_that_are() -> None:
    with pytest.raises(PluginError, match=r"'absent' is not installed; installed plugins: .*core"):
        Plugins.load("absent")
    with pytest.raises(PluginError, match=r"no\.such\.module"):
        Plugins.load("no.such.module")


@pytest.fixture
def two_distributions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two installed distributions whose plugins have the same entry-point name."""
    for name in ("acme-one", "acme-two"):
        info = tmp_path / f"{name.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[tinker_core]\nacme = acme_plugin\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "acme_plugin", types.ModuleType("acme_plugin"))


@pytest.mark.usefixtures("two_distributions")
def test_an_entry_point_of_two_distributions_is_an_error_that_names_both() -> None:
    with pytest.raises(PluginError, match="'acme' is claimed by acme-one and acme-two"):
        Plugins.load("acme")


def test_loading_the_installed_plugins_imports_nothing_heavy() -> None:
    code = (
        "import sys; from tinker_core import Plugins; plugins = Plugins.load('*'); plugins.trainers();"
        "plugins.samplers(); plugins.executors(); print(sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_observers_see_every_finished_request(tmp_path: Path) -> None:
    seen: list[tuple[RequestType, str | None, str | None]] = []

    class Observer:
        @hookimpl
        def tinker_request_finished(
            self,
            request_id: str,
            request_type: RequestType,
            model_id: str | None,
            seconds: float,
            error: RequestError | None,
        ) -> None:
            assert request_id.startswith("req-")
            assert seconds >= 0
            seen.append((request_type, model_id, error.code if error else None))

    async def body() -> None:
        plugins = Plugins.load("core", FAKE_PLUGIN)
        plugins.register(Observer(), "observer")
        config = EngineConfig(
            base_models=(BaseModelSpec(name="tiny", path="tiny"),),
            data_dir=tmp_path,
            backend="fake",
            sampler="fake",
            plugins=(FAKE_PLUGIN,),
        )
        async with Engine(config, plugins) as engine:
            client = Client(engine, (await engine.create_session(NewSession())).session_id)
            model_id = await client.create()
            await client.run(forward_backward(model_id, 1))
            await client.run(forward_backward("nobody:train:0", 1))
            assert seen == [
                (RequestType.CREATE_MODEL, model_id, None),
                (RequestType.FORWARD_BACKWARD, model_id, None),
                (RequestType.FORWARD_BACKWARD, "nobody:train:0", "UnknownModelError"),
            ]

    asyncio.run(body())
