"""What cannot work is refused before anything is started, with the alternative named."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig

from tinker_backend_megatron.architecture import check_division, read_architecture
from tinker_backend_megatron.topology import Topology
from tinker_core import Plugins, hookimpl
from tinker_core.engine import EngineConfig
from tinker_core.engine.workers import check_plugins, choose_ranks
from tinker_core.errors import ConfigurationError
from tinker_core.interfaces import OptionValue, SamplerPlugin
from tinker_core.types import BaseModelSpec, Placement

COMMAND = str(Path(sys.executable).parent / "tinker-server")


def found_wrong(check: str, *flags: str) -> str:
    """What the doctor finds wrong in one of its checks."""
    looked = subprocess.run([COMMAND, "doctor", "--json", *flags], capture_output=True, text=True, check=False)
    [finding] = [each for each in json.loads(looked.stdout) if each["check"] == check]
    assert finding["level"] == "fail"
    text: str = finding["text"]
    return text


class OwnSampler:
    """A sampler with processes of its own."""

    @hookimpl
    def tinker_register_sampler(self, register):
        register(SamplerPlugin(name="own", placement=Placement.OWN, build=lambda context: None))


def check(sampler: str | None, *, num_ranks: int = 1, sampleable: bool = True, **options: OptionValue) -> int:
    """Ask as the server does at its start; the number of ranks that it would start."""
    plugins = Plugins.load("core", "megatron")
    plugins.register(OwnSampler(), "own")
    config = EngineConfig(
        base_models=(BaseModelSpec(name="tiny", path="tiny", sampleable=sampleable),),
        data_dir=Path("unused"),
        backend="megatron",
        sampler=sampler,
        num_ranks=num_ranks,
        options={name.replace("_", "-"): value for name, value in options.items()},
    )
    check_plugins(config, plugins)
    return choose_ranks(config, plugins)


def test_the_colocated_sampler_is_refused_with_pipeline_parallelism_and_others_are_not() -> None:
    with pytest.raises(ConfigurationError, match=r"--pipeline-parallel 2 .*--sampler vllm.*--sampler none"):
        check("colocated", pipeline_parallel=2)
    assert check("own", pipeline_parallel=2) == 2
    assert check(None, pipeline_parallel=2) == 2
    assert check("colocated", pipeline_parallel=2, sampleable=False) == 2
    assert check("colocated", tensor_parallel=2, context_parallel=2) == 4


def test_ranks_that_do_not_make_up_the_world_are_refused_with_what_would() -> None:
    assert check("colocated", num_ranks=4, tensor_parallel=2) == 4
    with pytest.raises(ConfigurationError, match=r"3 ranks cannot be divided.*--tensor-parallel 2.*set --num-ranks"):
        check("colocated", num_ranks=3, tensor_parallel=2)


def test_server_and_doctor_say_so_before_a_model_is_looked_for(tmp_path: Path) -> None:
    flags = ["--backend", "megatron", "--pipeline-parallel", "2", "--base-model", "tiny=nowhere"]
    flags += ["--data-dir", str(tmp_path / "data")]
    started = subprocess.run([COMMAND, *flags, "--port", "0"], capture_output=True, text=True, check=False)
    assert started.returncode == 2
    assert "--sampler vllm" in started.stderr
    assert "--sampler vllm" in found_wrong("sampler", *flags)
    assert "set --num-ranks" in found_wrong("workers", *flags, "--num-ranks", "3")


def test_sizes_that_do_not_divide_a_model_are_refused_with_those_that_do(tmp_path: Path) -> None:
    # The heads of SmolLM2-135M.
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    LlamaConfig(**shape, num_hidden_layers=30).save_pretrained(tmp_path)
    architecture = read_architecture(str(tmp_path))
    with pytest.raises(ConfigurationError, match=r"--tensor-parallel 2 .*9 attention heads.*legal values: 1, 3$"):
        check_division(architecture, Topology(world_size=2, tensor=2))
    check_division(architecture, Topology(world_size=3, tensor=3))
