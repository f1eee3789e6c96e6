"""A plain vLLM server, which somebody else runs: bare base models over its OpenAI-compatible HTTP API."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import aiohttp

from tinker_core.errors import (
    ConfigurationError,
    InvalidRequestError,
    TinkerError,
    UnsupportedFeatureError,
    WorkerLostError,
)
from tinker_core.types import GeneratedSequence, PreparedSample, SampleOutput
from tinker_sampler_vllm.links.completions import (
    PlainSample,
    PromptLogprobs,
    SequenceReader,
    completion_body,
    decode_events,
    understood,
)
from tinker_sampler_vllm.links.link import HealthChecks
from tinker_sampler_vllm.protocol import EngineDescription, LoadCall

_LARGE = 64 * 1024
"""Bytes of JSON that are encoded or decoded off the event loop."""
_REQUEST_ERRORS = (400, 413, 422)
_KEY_ERRORS = (401, 403)
API_KEY_VARIABLE = "VLLM_API_KEY"
"""Environment variable with the key of plain servers: vLLM itself takes the key to ask for from it."""
ONLY_BASE_MODELS = "plain vLLM servers serve bare base models only; use an engine of --vllm-engines or --vllm-workers"

Prepare = Callable[[PreparedSample], Awaitable[PlainSample]]
"""Checks a sample; raises `InvalidRequestError` or `UnsupportedFeatureError`."""
T = TypeVar("T")


class PlainLink:
    """A connection to a plain vLLM server."""

    def __init__(self, name: str, api_key: str | None, checks: HealthChecks | None = None) -> None:
        """``name`` is the server's address without a path."""
        self._name = name
        self._checks = checks or HealthChecks()
        headers = {"Content-Type": "application/json"}
        if api_key is not None:
            headers["Authorization"] = f"Bearer {api_key}"
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),  # the server queues what it cannot run
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._checks.silence),
            headers=headers,
        )
        self._lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._watching: asyncio.Task[None] | None = None
        self._model: str
        self._description: EngineDescription | None = None
        self._prepare: Prepare

    def open(self, model: str, description: EngineDescription, prepare: Prepare) -> None:
        """Begin to serve samples, and to watch the server's health."""
        self._model, self._description, self._prepare = model, description, prepare
        self._watching = asyncio.create_task(self._watch_health())

    @property
    def description(self) -> EngineDescription:
        """What is known of the server."""
        assert self._description is not None
        return self._description

    # --- samples ------------------------------------------------------------------------------------------------------

    async def load(self, call: LoadCall) -> None:
        """Raises `UnsupportedFeatureError`: nothing but the base model is there."""
        raise UnsupportedFeatureError(f"{self._name} cannot be given {call.revision}: {ONLY_BASE_MODELS}")

    async def retire(self, revision: str) -> None:
        """Nothing is there to forget."""

    async def is_waiting(self, request_id: str) -> bool:
        """Whether a sample has not begun: the server does not say, so none is given up for waiting."""
        return False

    async def sample(self, sample: PreparedSample) -> SampleOutput:
        """Generate; a cancelled caller closes its requests, and the server then ends them."""
        checked = await self._prepare(sample)
        return await self._while_up(self._generate(checked))

    async def _generate(self, sample: PlainSample) -> SampleOutput:
        streams = bool(sample.stop.texts)
        asks_apart = streams and sample.asks_about_prompt  # a stream has no answers about the prompt
        try:
            async with asyncio.TaskGroup() as group:
                apart = group.create_task(self._ask(sample)) if asks_apart else None
                tasks = [
                    group.create_task(
                        self._stream(sample, index)
                        if streams
                        else self._complete(sample, index, asks=index == 0 and sample.asks_about_prompt)
                    )
                    for index in range(sample.request.num_samples)
                ]
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None  # they all have the same cause
        sequences, answers, cached = zip(*(task.result() for task in tasks), strict=True)
        answer = answers[0] if apart is None else apart.result()
        return SampleOutput(
            sequences=sequences,
            prompt_logprobs=answer.own,
            topk_prompt_logprobs=answer.topk,
            prompt_cache_hit_tokens=cached[0],
        )

    async def _ask(self, sample: PlainSample) -> PromptLogprobs:
        """The answers about the prompt, without a sequence of the sample."""
        answer = await self.post(completion_body(self._model, sample, 0, asks=True, generates=False))
        with understood(self._name):
            (choice,) = answer["choices"]
            return PromptLogprobs.read(sample, choice)

    async def _complete(
        self, sample: PlainSample, index: int, *, asks: bool
    ) -> tuple[GeneratedSequence, PromptLogprobs, int]:
        """One sequence in one answer, and how many tokens of its prompt were cached, where the server tells."""
        answer = await self.post(completion_body(self._model, sample, index, asks=asks))
        reader = SequenceReader(self._name, sample)
        with understood(self._name):
            (choice,) = answer["choices"]
            reader.add(choice)
            details = answer["usage"].get("prompt_tokens_details") or {}
            answers = PromptLogprobs.read(sample, choice) if asks else PromptLogprobs()
            return reader.finish(), answers, int(details.get("cached_tokens") or 0)

    async def _stream(self, sample: PlainSample, index: int) -> tuple[GeneratedSequence, PromptLogprobs, int]:
        """One sequence token by token, up to a stop text."""
        body = completion_body(self._model, sample, index, streams=True)
        reader = SequenceReader(self._name, sample)
        try:
            async with self._open("POST", "/v1/completions", await _encode(body)) as response:
                await self._require_success(response)
                await self._read_stream(response, reader)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise await self._broken(error) from error
        return reader.finish(), PromptLogprobs(), 0

    async def _read_stream(self, response: aiohttp.ClientResponse, reader: SequenceReader) -> None:
        rest = b""
        async for part in response.content.iter_any():
            with understood(self._name):
                events, rest = decode_events(rest + part)
                for event in events:
                    if event is None:
                        return
                    if "error" in event:
                        raise self._refusal(int(event["error"]["code"]), event["error"]["message"])
                    for choice in event["choices"]:
                        reader.add(choice)
            if reader.stopped:
                return  # the server ends what nobody reads any more

    # --- requests -----------------------------------------------------------------------------------------------------

    def _open(self, method: str, path: str, body: bytes | None = None) -> Any:  # noqa: ANN401 - aiohttp's own context
        # A redirection would take our key elsewhere.
        return self._session.request(method, self._name + path, data=body, allow_redirects=False)

    async def post(self, body: dict[str, Any]) -> Any:  # noqa: ANN401 - JSON
        """The answer to a completions request."""
        try:
            async with self._open("POST", "/v1/completions", await _encode(body)) as response:
                await self._require_success(response)
                return await self._decode(await response.read())
        except (aiohttp.ClientError, TimeoutError) as error:
            raise await self._broken(error) from error

    async def get(self, path: str) -> Any:  # noqa: ANN401 - JSON
        """A small answer; raises `WorkerLostError` when nobody answers, and says what to look at."""
        try:
            async with asyncio.timeout(self._checks.silence), self._open("GET", path) as response:
                await self._require_success(response)
                return await self._decode(await response.read())
        except (aiohttp.ClientError, TimeoutError) as error:
            raise WorkerLostError(f"{self._name} does not answer: {_reason(error)}; is it running?") from error

    async def _decode(self, raw: bytes) -> Any:  # noqa: ANN401 - JSON
        with understood(self._name):
            return await asyncio.to_thread(json.loads, raw) if len(raw) > _LARGE else json.loads(raw)

    async def _require_success(self, response: aiohttp.ClientResponse) -> None:
        if response.status == 200:
            return
        text = await response.text(errors="replace")
        try:
            message = str(json.loads(text)["error"]["message"])
        except (KeyError, TypeError, ValueError):  # a proxy says it in words of its own
            message = text.strip()[:500] or str(response.reason)
        error = self._refusal(response.status, message)
        if isinstance(error, WorkerLostError):
            await self._check_health()
        raise error

    def _refusal(self, status: int, message: str) -> TinkerError:
        """The error that stands for a bad answer."""
        if status in _REQUEST_ERRORS:
            return InvalidRequestError(f"{self._name} refuses this sample: {message}")
        if status in _KEY_ERRORS:
            return ConfigurationError(
                f"{self._name} refuses our key ({status}); set {API_KEY_VARIABLE} to the one that it was started with"
            )
        if status == 404 and self._description is None:
            return ConfigurationError(f"{self._name} is no vLLM server: it answered 404: {message}")
        if status == 404:
            self._lose(f"{self._name} does not serve {self._model!r} any more")
        return WorkerLostError(f"{self._name} answered {status}: {message}")

    async def _broken(self, error: Exception) -> WorkerLostError:
        """What a broken connection means: for one request only, if the server is well."""
        await self._check_health()
        return WorkerLostError(f"{self._name}: {_reason(error)}")

    # --- life ---------------------------------------------------------------------------------------------------------

    async def _while_up(self, work: Coroutine[Any, Any, T]) -> T:
        """A result, or `WorkerLostError` as soon as the server is lost."""
        task = asyncio.create_task(work)
        try:
            await asyncio.wait((task, self._lost), return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise WorkerLostError(self._lost.result())
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _watch_health(self) -> None:
        while not self.is_lost:
            await asyncio.sleep(self._checks.interval)
            await self._check_health()

    async def _check_health(self) -> None:
        try:
            async with asyncio.timeout(self._checks.silence), self._open("GET", "/health") as response:
                if response.status != 200:
                    self._lose(f"{self._name} is not well: /health answered {response.status}")
        except (aiohttp.ClientError, TimeoutError) as error:
            self._lose(f"{self._name} does not answer: {_reason(error)}")

    def _lose(self, reason: str) -> None:
        if not self._lost.done():
            self._lost.set_result(reason)

    @property
    def is_lost(self) -> bool:
        """Whether it cannot be used any more."""
        return self._lost.done()

    async def wait_lost(self) -> str:
        """The reason, as soon as it is lost."""
        return await asyncio.shield(self._lost)

    async def close(self) -> None:
        """Let go of the server."""
        self._lose(f"{self._name} is not used any more")
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        await self._session.close()


async def _encode(body: dict[str, Any]) -> bytes:
    if len(body["prompt"]) * 8 > _LARGE:
        return (await asyncio.to_thread(json.dumps, body)).encode()
    return json.dumps(body).encode()


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
