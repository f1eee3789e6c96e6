"""A policy whose replies a test writes, and a world whose answers it writes."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import numpy as np
import yaml
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from tinker import types
from transformers import PreTrainedTokenizerBase

from tests.jobs.workers import make_refs, make_spec
from tests.models import EOS_ID
from tests.serving import serve_in_thread
from tinker_jobs.protocol import JobEvent
from tinker_jobs.refs import FrozenWorld
from tinker_jobs.rl.rollouts import Policy
from tinker_jobs.worker.run import JobRun

Script = Callable[[str], str]
"""What a policy replies to a prompt."""
Answer = Callable[[dict[str, Any]], Mapping[str, Any] | Response]
"""What a world answers to the body of a command."""


def in_turn(*replies: str) -> Script:
    """These replies, one after the other; the last one again and again."""
    left = list(replies)
    return lambda _: left.pop(0) if len(left) > 1 else left[0]


class ScriptedSampler:
    """Replies as a script says, each followed by the end of sequence, with log-probabilities that tell tokens apart."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, script: Script) -> None:
        self._tokenizer = tokenizer
        self._script = script
        self.prompts: list[str] = []
        self.params: list[types.SamplingParams] = []
        self.replies: list[types.SampledSequence] = []

    async def sample(
        self, prompt: types.ModelInput, num_samples: int, sampling_params: types.SamplingParams
    ) -> types.SampleResponse:
        assert num_samples == 1
        text = self._tokenizer.decode(prompt.to_ints())
        self.prompts.append(text)
        self.params.append(sampling_params)
        tokens = [*self._tokenizer.encode(self._script(text), add_special_tokens=False), EOS_ID]
        reply = types.SampledSequence(
            stop_reason="stop",
            sequence_id=str(len(self.replies)),
            tokens_np=np.array(tokens, np.int32),
            logprobs_np=-np.arange(1, len(tokens) + 1, dtype=np.float32),
        )
        self.replies.append(reply)
        return types.SampleResponse(sequences=[reply])

    def policy(self) -> Policy:
        return Policy(sampler=self, version=0)  # type: ignore[arg-type]


class ScriptedRun(JobRun):
    """A run without a server: its events are kept, and the model's context is as long as a test says."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        directory: Path,
        config: Mapping[str, Any],
        *,
        max_context: int = 10_000,
        plugins: tuple[str, ...] = ("*",),
        **refs: Any,
    ) -> None:
        request = {"backend": "tinker", "trainer_type": "rl", "config": {"algorithm": "ppo", **config}}
        spec = make_spec("http://unused", "tiny", directory, request, refs=make_refs(**refs), plugins=plugins)
        self.events: list[JobEvent] = []
        super().__init__(spec, self.events.append, threading.Event())
        self.tokenizer = tokenizer
        known = SimpleNamespace(model_name="tiny", max_context_length=max_context)
        answer = SimpleNamespace(result=lambda: SimpleNamespace(supported_models=[known]))
        self.rest = SimpleNamespace(get_server_capabilities=lambda: answer)  # type: ignore[assignment]


@attrs.define
class TestWorld:
    """A world that keeps what it was asked."""

    __test__ = False

    url: str = ""
    answer: Answer = lambda _: {}
    about: Mapping[str, Any] = attrs.field(factory=dict)
    bodies: list[dict[str, Any]] = attrs.field(factory=list)
    headers: list[Mapping[str, str]] = attrs.field(factory=list)

    def begin(self, answer: Answer, **about: Any) -> None:
        """Be another world; ``about`` is what it says of itself."""
        self.answer, self.about = answer, about
        self.bodies.clear()
        self.headers.clear()

    async def commands(self, request: Request) -> Response:
        self.headers.append(request.headers)
        return JSONResponse({"commands": [], **self.about})

    async def run(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(request.headers)
        answered = self.answer(body)
        return answered if isinstance(answered, Response) else JSONResponse(dict(answered))


@contextlib.contextmanager
def serve_world() -> Iterator[TestWorld]:
    world = TestWorld()
    app = Starlette(routes=[Route("/commands", world.commands), Route("/run", world.run, methods=["POST"])])
    with serve_in_thread(app) as url:
        world.url = url
        yield world


def freeze_world(directory: Path, url: str, *, auth_token: str | None = None, **fields: Any) -> FrozenWorld:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "corp.yaml"
    path.write_text(yaml.safe_dump({"server_url": url, **({"auth_token": auth_token} if auth_token else {})}))
    return FrozenWorld(manifest_id="corp", path=str(path), server_url=url, **fields)


def commands_of(bodies: Sequence[Mapping[str, Any]]) -> list[str]:
    return [body["command"] for body in bodies]
