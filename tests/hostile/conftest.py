from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest
from hypothesis import HealthCheck, settings

from tests.hostile.asgi import Answer, Hosted, host
from tests.hostile.examples import LORA, TEXT, prepare
from tinker_core.engine import Engine, EngineConfig
from tinker_core.plugins import Plugins
from tinker_core.testing.fakes import FAKE_PLUGIN
from tinker_core.types import BaseModelSpec
from tinker_server.app import create_app
from tinker_server.limits import Limits

settings.register_profile(
    "hostile", derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)
settings.load_profile("hostile")

SECRET = "the canary sings"


@attrs.frozen(kw_only=True)
class Target:
    """A server under attack."""

    hosted: Hosted
    ids: dict[str, str]
    """One of everything, by the names of `tests.hostile.examples`."""
    root: Path
    """A directory that holds the data directory and, beside it, the canary file."""

    @property
    def data(self) -> Path:
        return self.root / "data"

    def probe(self) -> None:
        """Prove that the engine works and computes what it always does."""
        session = self.hosted.post("create_session", {}).json()["session_id"]
        new = {"session_id": session, "model_seq_id": 0, "base_model": "tiny", "lora_config": {**LORA, "rank": 4}}
        model = self.hosted.result("create_model", new)["model_id"]
        datum = {"model_input": TEXT, "loss_fn_inputs": {"target_tokens": {"data": [4, 5, 6], "dtype": "int64"}}}
        wrapped = {"loss_fn": "cross_entropy", "data": [datum]}
        body = {"model_id": model, "seq_id": 1, "forward_backward_input": wrapped}
        assert self.hosted.result("forward_backward", body)["metrics"]["loss:sum"] == pytest.approx(PROBE_LOSS)
        assert self.hosted.post(f"sessions/{session}/finish", {}).status == 200

    def follow(self, answer: Answer) -> None:
        """Of a submission that was accepted, look at what came of it: whatever was sent, the server is not to blame."""
        if answer.status != 200 or not answer.body.startswith(b'{"request_id"'):
            return
        polled = self.hosted.post("retrieve_future", {"request_id": answer.json()["request_id"]})
        if polled.status == 200 and "error" in polled.json():
            assert polled.json()["category"] == "user", polled.body

    def files_outside(self) -> set[str]:
        """What lies beside the data directory."""
        return {str(path.relative_to(self.root)) for path in self.root.iterdir()}


PROBE_LOSS = 29.986290


@pytest.fixture(scope="package")  # its workers are children of this process, which other tests count
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Hosted, Path]]:
    """The app of all tests here, and the directory that holds its data directory and the canary."""
    root = tmp_path_factory.mktemp("hostile")
    (root / "canary.txt").write_text(SECRET)
    plugins = Plugins.load("core", FAKE_PLUGIN)
    config = EngineConfig(
        base_models=(BaseModelSpec(name="tiny", path="tiny"),),
        data_dir=root / "data",
        backend="fake",
        sampler="fake",
        plugins=(FAKE_PLUGIN,),
        max_models=10_000,
    )
    app = create_app(
        Engine(config, plugins),
        plugins=plugins,
        poll_seconds=0.05,
        limits=Limits(body_limit=8 * 1024 * 1024, control_body_limit=1024 * 1024, body_timeout=0.5),
    )
    with host(app) as hosted:
        yield hosted, root


@pytest.fixture
def target(server: tuple[Hosted, Path]) -> Target:
    """The app with things of the test's own: attacks finish sessions and remove checkpoints."""
    hosted, root = server
    return Target(hosted=hosted, ids=prepare(hosted), root=root)
