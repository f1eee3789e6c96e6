"""Every hook, implemented once and used through `Plugins`; and what happens when plugins disagree."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tinker_core import Plugins, hookimpl
from tinker_core.errors import PluginError
from tinker_core.interfaces import (
    ExecutorPlugin,
    LossPlugin,
    OptimizerPlugin,
    RewardRecipePlugin,
    SamplerPlugin,
    TrainerPlugin,
)
from tinker_core.types import Placement, RequestError, RequestType


def unused(*_: object) -> object:
    raise AssertionError("registering must not build anything")


TRAINER = TrainerPlugin(name="acme", build=unused)
SAMPLER = SamplerPlugin(name="acme", placement=Placement.OWN, build=unused)
EXECUTOR = ExecutorPlugin(name="acme", start=unused)
LOSS = LossPlugin(name="acme", compute=unused)
OPTIMIZER = OptimizerPlugin(name="acme", build=unused)
RECIPE = RewardRecipePlugin(name="acme", score=unused)
ROUTES = ("first route", "second route")


class Acme:
    """Implements every hook."""

    def __init__(self) -> None:
        self.seen = []

    @hookimpl
    def tinker_register_trainer(self, register):
        register(TRAINER)

    @hookimpl
    def tinker_register_sampler(self, register):
        register(SAMPLER)

    @hookimpl
    def tinker_register_executor(self, register):
        register(EXECUTOR)

    @hookimpl
    def tinker_register_loss(self, register):
        register(LOSS)

    @hookimpl
    def tinker_register_optimizer(self, register):
        register(OPTIMIZER)

    @hookimpl
    def tinker_register_reward_recipe(self, register):
        register(RECIPE)

    @hookimpl
    def tinker_register_routes(self, register):
        for route in ROUTES:
            register(route)

    @hookimpl
    def tinker_request_finished(self, request_id, request_type, model_id, seconds, error):
        self.seen.append((request_id, request_type, model_id, seconds, error))


REGISTRIES = {
    "trainers": TRAINER,
    "samplers": SAMPLER,
    "executors": EXECUTOR,
    "losses": LOSS,
    "optimizers": OPTIMIZER,
    "reward_recipes": RECIPE,
}


@pytest.fixture
def plugins() -> Plugins:
    made = Plugins()
    made.register(Acme(), "acme", distribution="acme-dist", version="1.2")
    return made


@pytest.mark.parametrize("registry", REGISTRIES)
def test_what_a_plugin_registers_is_found_by_name(plugins: Plugins, registry: str) -> None:
    assert getattr(plugins, registry)() == {"acme": REGISTRIES[registry]}


def test_routes_come_in_the_order_of_registration(plugins: Plugins) -> None:
    assert plugins.routes() == list(ROUTES)


def test_all_observers_hear_of_a_finished_request() -> None:
    plugins, observers = Plugins(), [Acme(), Acme()]
    for number, observer in enumerate(observers):
        plugins.register(observer, f"observer-{number}")
    error = RequestError(category="user", code="InvalidRequestError", message="no")
    finished = {
        "request_id": "r1",
        "request_type": RequestType.FORWARD,
        "model_id": None,
        "seconds": 0.5,
        "error": error,
    }
    plugins.request_finished(**finished)
    assert [observer.seen for observer in observers] == [[tuple(finished.values())]] * 2


def test_plugins_are_listed_with_their_hooks(plugins: Plugins) -> None:
    (info,) = plugins.installed()
    assert (info.name, info.distribution, info.version) == ("acme", "acme-dist", "1.2")
    assert len(info.hooks) == 8


@pytest.mark.parametrize("registry", REGISTRIES)
def test_a_name_registered_twice_is_an_error_that_names_both_packages(plugins: Plugins, registry: str) -> None:
    plugins.register(Acme(), "other", distribution="other-dist")
    with pytest.raises(PluginError, match=r"'acme' is registered by acme-dist and other-dist; uninstall one"):
        getattr(plugins, registry)()


def test_a_hook_that_does_not_exist_is_an_error() -> None:
    @hookimpl
    def tinker_register_trainers(register):
        del register

    module = SimpleNamespace(tinker_register_trainers=tinker_register_trainers)
    with pytest.raises(PluginError, match="tinker_register_trainers"):
        Plugins().register(module, "typo")


def test_an_argument_that_a_hook_does_not_have_is_an_error() -> None:
    @hookimpl
    def tinker_register_trainer(registry):
        del registry

    with pytest.raises(PluginError, match="registry"):
        Plugins().register(SimpleNamespace(tinker_register_trainer=tinker_register_trainer), "typo")


def test_one_plugin_is_not_registered_twice_under_one_name(plugins: Plugins) -> None:
    with pytest.raises(PluginError, match="acme"):
        plugins.register(Acme(), "acme")


def test_a_plugin_that_is_not_installed_is_an_error_that_lists_those_that_are() -> None:
    with pytest.raises(PluginError, match=r"'nosuch' is not installed; installed plugins: .*core.*fsdp"):
        Plugins.load("nosuch")


def install(directory: Path, distribution: str, module: str, source: str) -> None:
    """What pip leaves behind for a distribution with an entry point named ``acme``."""
    (directory / f"{module}.py").write_text(source)
    metadata = directory / f"{distribution.replace('-', '_')}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[tinker_core]\nacme = {module}\n")


def load_acme(directory: Path) -> str:
    """The message of the `PluginError` that loading raises in a fresh interpreter that sees a directory."""
    code = "from tinker_core import Plugins\nPlugins.load('acme')"
    environment = {"PYTHONPATH": str(directory)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    return done.stderr.splitlines()[-1]


def test_two_packages_with_one_plugin_name_are_refused_before_either_is_imported(tmp_path: Path) -> None:
    install(tmp_path, "acme-one", "acme_one", "raise SystemExit('imported')")
    install(tmp_path, "acme-two", "acme_two", "raise SystemExit('imported')")
    assert load_acme(tmp_path).endswith("plugin 'acme' is claimed by acme-one and acme-two; uninstall one of them")


def test_a_plugin_that_cannot_be_imported_is_an_error_that_names_its_package(tmp_path: Path) -> None:
    install(tmp_path, "acme-one", "acme_one", "import no_such_module")
    message = load_acme(tmp_path)
    assert "plugin 'acme' of acme-one cannot be imported" in message
    assert "no_such_module" in message
