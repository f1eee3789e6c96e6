"""The flags about engines elsewhere, and where the sockets of those on this machine are."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from tests.vllm_links.engines import SECRET, run
from tests.vllm_links.places import Place
from tinker_core.engine.config import EngineConfig
from tinker_core.engine.own_sampler import OwnSampler
from tinker_core.errors import ConfigurationError, StorageError
from tinker_core.interfaces import SamplerPlugin
from tinker_core.types import BaseModelSpec, Placement
from tinker_sampler_vllm.options import VllmOptions
from tinker_sampler_vllm.sampler import VllmSampler


def options_of(tmp_path, base_model="tiny", **values):
    (tmp_path / "secret").write_text(SECRET)
    given = {"vllm-secret-file": str(tmp_path / "secret"), **values}
    return VllmOptions.read(given, base_model, "cpu")


def test_engines_elsewhere_are_for_all_base_models_or_for_one(tmp_path):
    workers = {"vllm-workers": "tcp://all:1, tiny=tcp://one:2,other=tcp://two:3"}
    assert options_of(tmp_path, **workers).workers == ("tcp://all:1", "tcp://one:2")
    assert options_of(tmp_path, "other", **workers).workers == ("tcp://all:1", "tcp://two:3")
    assert options_of(tmp_path, **workers).secret == SECRET
    assert SECRET not in repr(options_of(tmp_path, **workers))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vllm-workers": "http://here:1"}, "must begin with tcp://"),
        ({"vllm-workers": "tcp://here"}, "use tcp://HOST:PORT"),
        ({"vllm-workers": "tcp://here:x"}, "no port from 1 to 65535"),
        ({"vllm-workers": "tcp://here:1,tiny=tcp://here:1"}, "tcp://here:1 is given twice for base model 'tiny'"),
        ({"vllm-workers": "tcp://here:1", "vllm-secret-file": ""}, "needs --vllm-secret-file"),
        ({"vllm-workers": "tcp://here:1", "vllm-secret-file": "/no/such"}, "cannot read the secret"),
        ({"vllm-workers": ""}, "none are given"),
        ({"vllm-workers": "other=tcp://here:1", "vllm-engines": 0}, "leaves base model 'tiny' without an engine"),
    ],
)
def test_flags_that_cannot_be_meant_so_are_refused(tmp_path, values, message):
    with pytest.raises(ConfigurationError, match=message):
        options_of(tmp_path, **values)


def test_the_sockets_of_local_engines_lie_in_a_directory_that_only_their_owner_may_enter(tmp_path):
    modes = []

    def build(context):
        modes.append(stat.S_IMODE(Path(context.directory).stat().st_mode))
        raise ConfigurationError("that is all")

    plugin = SamplerPlugin(name="looking", placement=Placement.OWN, build=build)
    spec = BaseModelSpec(name="tiny", path="/nowhere")
    own = OwnSampler(plugin, spec, EngineConfig(base_models=(spec,), data_dir=tmp_path, backend="fake", sampler=None))
    with pytest.raises(ConfigurationError, match="that is all"):
        run(own.start())
    assert modes == [0o700]


def test_a_sampler_that_cannot_keep_weights_says_so_and_can_be_closed(tmp_path):
    (tmp_path / "file").touch()

    async def scenario():
        sampler = VllmSampler([Place("place").keeper], tmp_path / "file" / "held")
        with pytest.raises(StorageError, match="choose another --handoff-dir"):
            await sampler.start()
        await sampler.close()

    run(scenario())
