"""A live world over HTTP: what can be run there, and running it."""

from __future__ import annotations

import ssl
import uuid
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import attrs
import httpx

from tinker_jobs.errors import JobFailedError, LibraryError
from tinker_jobs.library.worlds import read_world
from tinker_jobs.refs import FrozenWorld

TIMEOUT_S = 120.0
"""How long a world may take to answer."""
CONNECT_RETRIES = 3
"""Times that a connection is tried again. A command that may have reached the world is never sent again."""
EPISODE_HEADER = "X-Episode-Id"
"""Names the episode that a command belongs to, for worlds that keep the state of each."""
_DETAIL_LENGTH = 500


class WorldError(Exception):
    """The world failed, with how; it ends the episode."""


class RefusedCommandError(Exception):
    """The world says that a request is none that it can carry out, with why; the policy may try another."""


@attrs.frozen(kw_only=True)
class WorldCommand:
    """Something that can be run in a world."""

    usage: str
    """How to write it, such as ``scan HOST``."""
    description: str = ""


@attrs.frozen(kw_only=True)
class CommandOutput:
    """What a world answered to a command."""

    stdout: str
    stderr: str
    exit_code: int
    goal_reached: bool | None
    """None from a world that does not tell."""
    stop: bool
    """Whether the world has ended the episode."""


@attrs.frozen(kw_only=True)
class World:
    """A world that has answered."""

    url: str
    auth_token: str | None = attrs.field(repr=False)
    commands: tuple[WorldCommand, ...]
    description: str = ""
    reports_goal: bool = False
    """Whether its answers tell if the goal is reached; the policy's own word counts for nothing then."""
    reply_is_command: bool = False
    """Whether a policy's whole reply is a command."""

    @classmethod
    def open(cls, frozen: FrozenWorld) -> World:
        """Ask a world what can be run there; raises `JobFailedError` for one that does not answer as it should."""
        url, token = frozen.server_url.rstrip("/"), read_token(frozen)
        try:
            transport = httpx.HTTPTransport(verify=_tls(), retries=CONNECT_RETRIES)
            with httpx.Client(headers=_headers(token), timeout=TIMEOUT_S, transport=transport) as client:
                response = client.get(f"{url}/commands")
        except httpx.HTTPError as error:
            raise JobFailedError(f"world {frozen.manifest_id} at {url} does not answer: {_words(error)}") from error
        where = f"world {frozen.manifest_id}: GET {url}/commands answered"
        if response.status_code in (401, 403):
            raise JobFailedError(f"{where} {response.status_code}; check auth_token in {frozen.path}")
        if not response.is_success:
            raise JobFailedError(f"{where} {response.status_code}: {_detail(response)}")
        try:
            return cls(url=url, auth_token=token, **_read_commands(response))
        except ValueError as error:
            raise JobFailedError(f"{where} {error}") from error

    def client(self, num_episodes: int) -> httpx.AsyncClient:
        """A client for so many episodes at once."""
        limits = httpx.Limits(max_connections=num_episodes, max_keepalive_connections=num_episodes)
        transport = httpx.AsyncHTTPTransport(verify=_tls(), retries=CONNECT_RETRIES, limits=limits)
        return httpx.AsyncClient(headers=_headers(self.auth_token), timeout=TIMEOUT_S, transport=transport)


def read_token(frozen: FrozenWorld) -> str | None:
    """The bearer token in a world's file.

    Raises `JobFailedError` when the file has gone, is broken, or is about another server now, whose token is not for
    the one that the job knows.
    """
    try:
        found = read_world(Path(frozen.path))
    except LibraryError as error:
        raise JobFailedError(f"the file of world {frozen.manifest_id} cannot be used any more: {error}") from error
    if found.server_url != frozen.server_url:
        raise JobFailedError(
            f"world {frozen.manifest_id} is at {found.server_url} now, and was at {frozen.server_url} when this job "
            "was submitted; submit it again"
        )
    return found.auth_token


class WorldSession:
    """One episode. What a command changes about the actor goes with every later one, so a world may be stateless."""

    def __init__(self, world: World, client: httpx.AsyncClient) -> None:
        self._url = f"{world.url}/run"
        self._client = client
        self._headers = {EPISODE_HEADER: uuid.uuid4().hex}
        self._actor: dict[str, str | None] = {"principal_id": None, "host_id": None, "domain": None}
        self._known_creds: list[str] = []
        self._compromised_hosts: list[str] = []

    async def run(self, command: str) -> CommandOutput:
        """Run a command. Raises `RefusedCommandError`, and `WorldError` when the world fails."""
        body = {
            "command": command,
            **self._actor,
            "known_creds": self._known_creds,
            "compromised_hosts": self._compromised_hosts,
        }
        try:
            response = await self._client.post(self._url, json=body, headers=self._headers)
        except httpx.HTTPError as error:
            raise WorldError(f"POST {self._url}: {_words(error)}") from error
        if response.status_code in (400, 404, 413, 422):
            raise RefusedCommandError(_detail(response))
        if not response.is_success:
            raise WorldError(f"POST {self._url} answered {response.status_code}: {_detail(response)}")
        try:
            answer = _object(response)
            self._update(answer.get("context_updates"))
            return _read_output(answer)
        except ValueError as error:
            raise WorldError(f"POST {self._url} answered {error}") from error

    def _update(self, changes: object) -> None:
        if changes is None:
            return
        if not isinstance(changes, Mapping):
            raise ValueError(f"context_updates that are no object: {changes!r:.100}")
        for name in self._actor:
            if isinstance(changes.get(name), str):
                self._actor[name] = changes[name]
        for name, known in (("acquired_cred", self._known_creds), ("compromised_host", self._compromised_hosts)):
            found = changes.get(name)
            if isinstance(found, str) and found not in known:
                known.append(found)


@cache
def _tls() -> ssl.SSLContext:
    # Reading all root certificates takes longer than a step of short episodes.
    return httpx.create_ssl_context()


def _headers(token: str | None) -> dict[str, str]:
    return {} if token is None else {"Authorization": f"Bearer {token}"}


def _read_commands(response: httpx.Response) -> dict[str, Any]:
    answer = _object(response)
    commands = answer.get("commands")
    if not isinstance(commands, list):
        raise ValueError("without a list of commands")
    return {
        "commands": tuple(_read_command(one) for one in commands),
        "description": str(answer.get("description") or ""),
        "reports_goal": _flag(answer, "reports_goal") or False,
        "reply_is_command": _flag(answer, "reply_is_command") or False,
    }


def _read_command(value: object) -> WorldCommand:
    if isinstance(value, str):
        return WorldCommand(usage=value)
    if not isinstance(value, Mapping) or not isinstance(value.get("usage", value.get("name")), str):
        raise ValueError(f"with a command that is neither text nor an object with a name: {value!r:.100}")
    return WorldCommand(usage=value.get("usage", value.get("name")), description=str(value.get("description") or ""))


def _read_output(answer: Mapping[str, Any]) -> CommandOutput:
    exit_code = answer.get("exit_code", 0)
    if isinstance(exit_code, bool) or not isinstance(exit_code, int):
        raise ValueError(f"with an exit_code that is no integer: {exit_code!r:.100}")
    return CommandOutput(
        stdout=_text(answer, "stdout"),
        stderr=_text(answer, "stderr"),
        exit_code=exit_code,
        goal_reached=_flag(answer, "goal_reached"),
        stop=_flag(answer, "stop") or False,
    )


def _object(response: httpx.Response) -> Mapping[str, Any]:
    try:
        answer = response.json()
    except ValueError as error:
        raise ValueError(f"something that is not JSON: {response.text[:100]!r}") from error
    if not isinstance(answer, dict):
        raise ValueError(f"something that is no JSON object: {answer!r:.100}")
    return answer


def _text(answer: Mapping[str, Any], name: str) -> str:
    value = answer.get(name)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"with {name} that is no text: {value!r:.100}")
    return value or ""


def _flag(answer: Mapping[str, Any], name: str) -> bool | None:
    value = answer.get(name)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"with {name} that is neither true nor false: {value!r:.100}")
    return value


def _words(error: httpx.HTTPError) -> str:
    # Some of httpx's errors, such as timeouts, have no text.
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _detail(response: httpx.Response) -> str:
    """What an error says of itself."""
    try:
        answer = response.json()
    except ValueError:
        answer = None
    detail = answer.get("detail") if isinstance(answer, dict) else None
    return str(response.text if detail is None else detail)[:_DETAIL_LENGTH]
