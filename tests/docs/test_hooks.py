"""What `Plugins` promises besides collecting (tests/core/test_plugins.py): order, listing, and telling errors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tinker_core import Plugins, hookimpl
from tinker_core.errors import PluginError


class Routes:
    """Registers two routes."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix

    @hookimpl
    def tinker_register_routes(self, register):
        register(f"{self._prefix} first")
        register(f"{self._prefix} second")


def test_routes_come_by_plugin_name_and_then_in_order_of_registration() -> None:
    plugins = Plugins()
    plugins.register(Routes("b"), "b")
    plugins.register(Routes("a"), "a")
    assert plugins.routes() == ["a first", "a second", "b first", "b second"]


def test_plugins_are_listed_by_name_with_their_hooks() -> None:
    plugins = Plugins()
    plugins.register(Routes("b"), "b", distribution="b-dist", version="1.2")
    plugins.register(object(), "a")
    first, second = plugins.installed()
    assert (first.name, first.hooks) == ("a", ())
    assert (second.distribution, second.version, second.hooks) == ("b-dist", "1.2", ("tinker_register_routes",))


def test_an_argument_that_a_hook_does_not_have_is_an_error() -> None:
    class Misspelled:
        @hookimpl
        def tinker_register_trainer(self, registry):
            del registry

    with pytest.raises(PluginError, match="registry"):
        Plugins().register(Misspelled(), "typo")


def test_one_plugin_is_not_registered_twice_under_one_name() -> None:
    plugins = Plugins()
    plugins.register(Routes("a"), "a")
    with pytest.raises(PluginError, match="'a'"):
        plugins.register(Routes("a"), "a")


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
