"""A fake of vLLM's HTTP server that answers what it is told to, and connections to it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aiohttp import web

from tests.models import tiny_config
from tinker_core.types import BaseModelSpec
from tinker_sampler_vllm.links.link import HealthChecks
from tinker_sampler_vllm.links.plain import PlainLink
from tinker_sampler_vllm.links.plain_server import PlainServer

VOCAB_SIZE = 112
QUICK = HealthChecks(interval=0.01, silence=5.0)
Answer = Callable[[dict[str, Any]], Any]


class FakeVllm:
    """Generates token 7 for ever, with the logprobs of an almost even distribution over the first ones."""

    def __init__(self) -> None:
        self.url = ""
        self.health = 200
        self.max_logprobs = 20
        self.num_likely = 100
        self.models: list[dict[str, Any]] = [{"id": "tiny", "root": "/elsewhere", "parent": None, "max_model_len": 50}]
        self.status = 200
        """Of completions; others are answered with a message."""
        self.change: Callable[[dict[str, Any]], None] = lambda answer: None
        """Edits each answer before it is sent."""
        self.bodies: list[dict[str, Any]] = []
        """Requests after those that a connection begins with."""
        self.open = asyncio.Event()
        """Completions are answered while it is set."""
        self.open.set()
        self.begun = asyncio.Event()
        self.dropped = asyncio.Event()
        """Set when a client closes a request before its answer."""

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response(status=self.health)

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": self.models})

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.begun.set()
        try:
            await self.open.wait()
        except asyncio.CancelledError:
            self.dropped.set()
            raise
        refused = body["logprobs"] > self.max_logprobs
        if refused or self.status != 200:
            status = 400 if refused else self.status
            error = {"error": {"message": "not like this", "code": status}}
            return web.json_response(error, status=status, headers={"Location": "/health"})
        answer = self._answer(body)
        self.change(answer)
        return web.json_response(answer)

    def _answer(self, body: dict[str, Any]) -> dict[str, Any]:
        logprob, count = -math.log(self.num_likely), body["max_tokens"]
        top = {f"token_id:{token}": logprob - 1e-3 * token for token in range(max(body["logprobs"], 8))}
        choice = {
            "index": 0,
            "finish_reason": "length",
            "prompt_token_ids": body["prompt"],
            "token_ids": [7] * count,
            "logprobs": {"token_logprobs": [logprob] * count, "top_logprobs": [top] * count},
        }
        return {"choices": [choice], "usage": {"prompt_tokens_details": {"cached_tokens": 2}}}

    def app(self) -> web.Application:
        """Its pages."""
        app = web.Application()
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/completions", self._complete)
        return app


@asynccontextmanager
async def fake_vllm() -> AsyncIterator[FakeVllm]:
    """A running fake; when the block ends nobody listens any more."""
    fake = FakeVllm()
    runner = web.AppRunner(fake.app(), handler_cancellation=True, shutdown_timeout=0.0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    fake.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield fake
    finally:
        await runner.cleanup()


def plain_server(url: str, directory: Path, **fields: Any) -> PlainServer:
    """The address of a fake, for a base model ``tiny`` of which only the configuration is there."""
    config = tiny_config(
        "llama",
        tie=False,
        hidden_size=32,
        num_layers=1,
        vocab_size=fields.pop("vocab_size", VOCAB_SIZE),
        max_context=64,
    )
    config.save_pretrained(directory)
    return PlainServer(url, BaseModelSpec(name="tiny", path=str(directory)), **{"checks": QUICK, **fields})


@asynccontextmanager
async def plain_link(fake: FakeVllm, directory: Path, **fields: Any) -> AsyncIterator[PlainLink]:
    """A connection for the length of a block."""
    link = await plain_server(fake.url, directory, **fields).connect()
    fake.bodies.clear()
    fake.begun.clear()
    try:
        yield link
    finally:
        await link.close()
