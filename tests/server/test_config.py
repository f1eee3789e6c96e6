"""Flags, the TOML file, and plugin options."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tinker_core.errors import ConfigurationError, PluginError
from tinker_core.hookspecs import hookimpl
from tinker_core.interfaces import Option, TrainerPlugin
from tinker_core.plugins import Plugins
from tinker_core.testing.fakes import FAKE_PLUGIN
from tinker_server.arguments import parse_arguments
from tinker_server.config import ServerConfig, is_loopback
from tinker_server.devices import choose_device
from tinker_server.plugin_list import plugin_names
from tinker_server.prices import Prices

FAKE = ["--backend", "fake", "--sampler", "fake"]


class Trainers:
    """Registers trainers that are never built."""

    def __init__(self, **options: tuple[Option, ...]) -> None:
        self._options = options

    @hookimpl
    def tinker_register_trainer(self, register: Callable[[TrainerPlugin], None]) -> None:
        build: Any = None
        for name, options in self._options.items():
            register(TrainerPlugin(name=name, build=build, options=options))


def parse(*arguments: str, **options: tuple[Option, ...]) -> ServerConfig:
    plugins = Plugins.load(FAKE_PLUGIN)
    plugins.register(Trainers(**options), "acme")
    return parse_arguments([*FAKE, *arguments], plugins)


def refusal(*arguments: str, **options: tuple[Option, ...]) -> str:
    with pytest.raises(ConfigurationError) as refused:
        parse(*arguments, **options)
    return str(refused.value)


def test_defaults() -> None:
    config = parse("--base-model", "tiny")
    assert (config.host, config.port, config.dtype, config.num_ranks) == ("127.0.0.1", 8000, "float32", 1)
    engine = config.engine_config(plugins=("*",), device="cpu")
    assert (engine.backend, engine.sampler, engine.device) == ("fake", "fake", "cpu")
    assert engine.data_dir.is_absolute()


def test_flags_reach_the_engine() -> None:
    flags = ["--num-ranks", "2", "--dtype", "bfloat16", "--max-lora-rank", "8", "--max-context-length", "99"]
    flags += ["--agreement-tolerance", "2.5"]
    config = parse("--base-model", "a/b=c", "--base-model", "d", "--sampler", "none", *flags)
    engine = config.engine_config(plugins=("core",), device="cuda")
    assert [model.name for model in engine.base_models] == ["a/b", "d"]
    assert (engine.sampler, engine.num_ranks, engine.dtype) == (None, 2, "bfloat16")
    assert (engine.max_lora_rank, engine.max_context_length, engine.plugins) == (8, 99, ("core",))
    assert engine.agreement_tolerance == 2.5


def write(tmp_path: Path, text: str) -> str:
    file = tmp_path / "server.toml"
    file.write_text(text)
    return str(file)


MODELS = '[[models]]\nname = "a/b"\npath = "c"\nsampleable = false\n[[models]]\npath = "d"\n'


def test_a_file_says_the_same(tmp_path: Path) -> None:
    file = write(tmp_path, f"port = 9000\nmax-models = 3\naccess_log = true\n{MODELS}")
    config = parse("--config", file, "--port", "9001")
    assert (config.port, config.max_models, config.access_log) == (9001, 3, True)
    assert [(model.name, model.path, model.sampleable) for model in config.base_models] == [
        ("a/b", "c", False),
        ("d", "d", True),
    ]


def test_models_of_the_command_line_replace_those_of_the_file(tmp_path: Path) -> None:
    config = parse("--config", write(tmp_path, MODELS), "--base-model", "e")
    assert [model.name for model in config.base_models] == ["e"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("prot = 1", "unknown key 'prot'"),
        ('port = "1"', "port must be of type int"),
        ("port = true", "port must be of type int"),
        ("port = ", "is not TOML"),
        ('models = "x"', "written [[models]]"),
        ("[[models]]\nnam = 'x'", "models[0]: unknown key 'nam'"),
        ("[[models]]\ntrainable = true", "needs a name or a path"),
        ("[[models]]\nname = 'a'\ntrainable = 1", "models[0].trainable must be of type bool"),
        ("[[models]]\nname = 'a'\ntrainable = false\nsampleable = false", "neither trainable nor sampleable"),
        ("[[models]]\nname = 'a/b/c'", "exactly two slashes"),
        ("[[models]]\nname = 'a'\n[[models]]\nname = 'a'", "given twice"),
        ("device = 'tpu'\n[[models]]\nname = 'a'", "--device must be one of auto, cpu, cuda"),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path: Path, text: str, reason: str) -> None:
    assert reason in refusal("--config", write(tmp_path, text))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "no base model is given"),
        (["--base-model", "a", "--config", "/no/such/file"], "No such file"),
        (["--base-model", "a", "--backend", "magic"], "--backend 'magic' is not installed; installed: fake"),
        (["--base-model", "a", "--sampler", "magic"], "--sampler 'magic' is not installed; installed: fake, none"),
        (["--base-model", "a", "--port", "70000"], "--port must be at most 65535"),
        (["--base-model", "a", "--num-ranks", "0"], "--num-ranks must be at least 1"),
        (["--base-model", "a", "--agreement-tolerance", "-1"], "--agreement-tolerance must be at least 0"),
        (["--base-model", "a", "--agreement-tolerance", "nan"], "--agreement-tolerance must be a number"),
        (["--base-model", "a", "--port", "http"], "--port"),
        (["--base-model", "a", "--max-model", "3"], "unrecognized arguments: --max-model"),
        (["--base-model", "a", "--price-training", "-1"], "--price-training"),
        (["--base-model", "a", "--price-storage", "inf"], "--price-storage"),
        (["--base-model", "a", "--price-sampling", "much"], "--price-sampling"),
        (["--base-model", "a", "--dtype", "float16"], "float16"),
    ],
)
def test_a_wrong_command_line_is_refused_by_name(arguments: list[str], reason: str) -> None:
    assert reason in refusal(*arguments)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("localhost", True), ("127.0.0.2", True), ("::1", True), ("0.0.0.0", False), ("::", False), ("a.org", False)],
)
def test_loopback_addresses(host: str, loopback: bool) -> None:
    assert parse("--base-model", "a", "--host", host).host == host
    assert is_loopback(host) == loopback


def test_prices_are_unknown_until_they_are_set() -> None:
    assert parse("--base-model", "a").prices() == Prices()
    priced = parse("--base-model", "a", "--price-training", "3", "--price-storage", "0").prices()
    assert priced == Prices(price_training=3.0, price_storage=0.0)


# --- plugin options ---------------------------------------------------------------------------------------------------

PARALLEL = Option(name="tensor-parallel", type=int, default=1, help="ranks per layer")
FAST = Option(name="go-fast", type=bool, default=True, help="be fast")


def test_options_of_the_chosen_plugins() -> None:
    config = parse("--base-model", "a", "--backend", "big", "--tensor-parallel", "2", big=(PARALLEL, FAST))
    assert config.options == {"tensor-parallel": 2, "go-fast": True}
    off = parse("--base-model", "a", "--backend", "big", "--no-go-fast", big=(PARALLEL, FAST))
    assert off.options == {"tensor-parallel": 1, "go-fast": False}


def test_options_in_a_file(tmp_path: Path) -> None:
    file = write(tmp_path, 'backend = "big"\ntensor-parallel = 4\n[[models]]\nname = "a"')
    plugins = Plugins.load(FAKE_PLUGIN)
    plugins.register(Trainers(big=(PARALLEL,)), "acme")
    config = parse_arguments(["--config", file, "--sampler", "fake"], plugins)
    assert config.options == {"tensor-parallel": 4}


def test_options_of_others_are_refused() -> None:
    message = refusal("--base-model", "a", "--tensor-parallel", "2", big=(PARALLEL,))
    assert "--tensor-parallel belongs neither to --backend fake nor to --sampler fake" in message


def test_options_may_be_shared_but_not_disputed() -> None:
    shared = parse("--base-model", "a", "--backend", "two", "--tensor-parallel", "2", one=(PARALLEL,), two=(PARALLEL,))
    assert shared.options == {"tensor-parallel": 2}
    other = Option(name="tensor-parallel", type=str, default="", help="else")
    with pytest.raises(PluginError, match="trainer one and trainer two both have an option --tensor-parallel"):
        parse("--base-model", "a", one=(PARALLEL,), two=(other,))


def test_an_option_cannot_take_a_flag_of_the_server() -> None:
    with pytest.raises(PluginError, match="--port clashes"):
        parse("--base-model", "a", one=(Option(name="port", type=int, default=1, help=""),))


# --- environment ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "names"),
    [
        ({}, ("*",)),
        ({"TINKER_PLUGINS": ""}, ("core",)),
        ({"TINKER_PLUGINS": "fsdp, acme"}, ("core", "fsdp", "acme")),
        ({"TINKER_PLUGINS": "core,fsdp"}, ("core", "fsdp")),
    ],
)
def test_which_plugins_are_loaded(environment: dict[str, str], names: tuple[str, ...]) -> None:
    assert plugin_names(environment) == names


def test_auto_takes_the_device_that_is_there(tmp_path: Path) -> None:
    assert choose_device("auto", {}, tmp_path) == "cpu"
    (tmp_path / "nvidia0").touch()
    assert choose_device("auto", {}, tmp_path) == "cuda"
    assert choose_device("auto", {"CUDA_VISIBLE_DEVICES": ""}, tmp_path) == "cpu"
    assert choose_device("cpu", {}, tmp_path) == "cpu"
