"""The API of training jobs, as the command line uses it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import attrs
import httpx
import orjson

from tinker_jobs.cli.parsing import JobsCommandError
from tinker_jobs.records import JobStatus

_PAUSES = (0.2, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, *(30.0,) * 20)
"""Seconds before each new attempt to take up a broken stream."""
_TIMEOUT = httpx.Timeout(30.0, read=60.0)


@attrs.frozen(kw_only=True)
class ServerEvent:
    """One event of a server's stream."""

    event: str
    data: str
    event_id: str | None
    """What to name in ``Last-Event-ID`` to go on after it."""


class _UnavailableError(Exception):
    """A server that cannot answer now, such as one that is about to start or stop."""


class JobsClient:
    """One server, one organization and workspace. Every method raises `JobsCommandError` with what to do about it."""

    def __init__(self, *, url: str, api_key: str | None, organization: str, workspace: str) -> None:
        self._url = url.rstrip("/")
        self._scope = f"/api/v1/org/{quote(organization, safe='')}/ws/{quote(workspace, safe='')}/training/jobs"
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise JobsCommandError("the API key has characters that no key has; look at --api-key or TINKER_API_KEY")
        headers = {} if api_key is None else {"X-API-Key": api_key}
        try:
            address = httpx.URL(self._url)
        except (httpx.InvalidURL, ValueError) as error:
            raise JobsCommandError(f"{url!r} is no address of a server: {error}") from error
        if address.scheme not in ("http", "https") or not address.host:
            raise JobsCommandError(f"{url!r} is no address of a server; it begins with http:// or https://")
        self._http = httpx.Client(base_url=address, headers=headers, timeout=_TIMEOUT)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def submit(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Create a job."""
        return self._call("POST", "", request=request)

    def list_jobs(self, filters: Mapping[str, Any]) -> dict[str, Any]:
        """A page of jobs: ``items``, ``total``, ``page``, ``page_size``."""
        return self._call("GET", "", params={name: value for name, value in filters.items() if value is not None})

    def get(self, job_id: str) -> dict[str, Any]:
        """A job."""
        return self._call("GET", self._path(job_id))

    def logs(self, job_id: str) -> list[dict[str, Any]]:
        """Everything in its log, oldest first."""
        entries: list[dict[str, Any]] = self._call("GET", self._path(job_id, "logs"))["items"]
        return entries

    def artifacts(self, job_id: str) -> dict[str, Any]:
        """What it has made."""
        artifacts: dict[str, Any] = self._call("GET", self._path(job_id, "artifacts"))["artifacts"]
        return artifacts

    def file(self, job_id: str, name: str) -> bytes:
        """One of the files among its artifacts."""
        return self._answer("GET", self._path(job_id, f"files/{quote(name, safe='')}")).content

    def cancel(self, job_id: str) -> dict[str, Any]:
        """Have it stop after the step that it is doing."""
        return self._call("POST", self._path(job_id, "cancel"))

    def retry(self, job_id: str) -> dict[str, Any]:
        """Queue it again, from the beginning."""
        return self._call("POST", self._path(job_id, "retry"))

    def follow(self, job_id: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Its log, line by line as it comes (``log``), and the job at every change (``status``), to its final one.

        A lost connection is reported (``lost``) and taken up after the last line that was seen, for ten minutes.
        """
        last: str | None = None
        attempt = 0
        while True:
            try:
                for event in self._stream(self._path(job_id, "logs/stream"), last):
                    attempt = 0
                    last = event.event_id or last
                    content = orjson.loads(event.data)
                    yield event.event, content
                    if event.event == "status" and JobStatus(content["status"]).is_final:
                        return
                problem = "the stream ended before the job"
            except (httpx.TransportError, _UnavailableError) as error:
                problem = _said(error)
            if attempt == len(_PAUSES):
                raise JobsCommandError(f"lost the server at {self._url}: {problem}; look for the job when it is back")
            if attempt == 0:
                yield "lost", {"message": problem}
            time.sleep(_PAUSES[attempt])
            attempt += 1

    def _stream(self, path: str, last: str | None) -> Iterator[ServerEvent]:
        headers = {"Accept": "text/event-stream"} | ({} if last is None else {"Last-Event-ID": last})
        with self._http.stream("GET", self._scope + path, headers=headers) as answer:
            if answer.is_error:
                answer.read()
                if answer.is_server_error:
                    raise _UnavailableError(_detail(answer))
                raise self._refusal(answer)
            yield from read_events(answer.iter_lines())

    def _path(self, job_id: str, action: str | None = None) -> str:
        path = f"/{quote(job_id, safe='')}"
        return path if action is None else f"{path}/{action}"

    def _call(
        self,
        method: str,
        path: str,
        *,
        request: Mapping[str, Any] | None = None,
        params: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        answer = self._answer(method, path, request=request, params=params)
        try:
            value: dict[str, Any] = orjson.loads(answer.content)
        except orjson.JSONDecodeError as error:
            raise JobsCommandError(f"{self._url} answers something else than JSON; is it a tinker-server?") from error
        return value

    def _answer(
        self,
        method: str,
        path: str,
        *,
        request: Mapping[str, Any] | None = None,
        params: Mapping[str, Any] | None = None,
    ) -> httpx.Response:
        content = None if request is None else orjson.dumps(request)
        headers = None if request is None else {"Content-Type": "application/json"}
        try:
            answer = self._http.request(method, self._scope + path, content=content, params=params, headers=headers)
        except httpx.ConnectError as error:
            raise JobsCommandError(
                f"no server answers at {self._url} ({error}); start tinker-server, or give its address with --url"
            ) from error
        except httpx.TransportError as error:
            raise JobsCommandError(f"no answer from {self._url}: {_said(error)}") from error
        if not answer.is_success:
            raise self._refusal(answer)
        return answer

    def _refusal(self, answer: httpx.Response) -> JobsCommandError:
        detail = _detail(answer)
        if answer.status_code == httpx.codes.UNAUTHORIZED:
            return JobsCommandError(f"{detail}; give a key with --api-key or TINKER_API_KEY")
        return JobsCommandError(detail)


def read_events(lines: Iterable[str]) -> Iterator[ServerEvent]:
    """The events of a ``text/event-stream``; one that the end of the stream cuts off is none."""
    name, data, event_id = "message", [], None  # type: str, list[str], str | None
    for line in lines:
        if not line:
            if data:
                yield ServerEvent(event=name, data="\n".join(data), event_id=event_id)
            name, data = "message", []
            continue
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "event":
            name = value
        elif field == "data":
            data.append(value)
        elif field == "id":
            event_id = value


def _detail(answer: httpx.Response) -> str:
    """Why the server refuses: its own words, and for a request each mistake on a line with its path."""
    try:
        detail = orjson.loads(answer.content)["detail"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return f"the server answered {answer.status_code} {answer.reason_phrase}: {answer.text[:200]}"
    if not isinstance(detail, list):
        return str(detail)
    mistakes = [f"  {'.'.join(str(part) for part in one['loc'][1:]) or 'request'}: {one['msg']}" for one in detail]
    return "\n".join(["the server refuses the request:", *mistakes])


def _said(error: Exception) -> str:
    # Some of them carry no text, such as timeouts.
    return str(error) or type(error).__name__
