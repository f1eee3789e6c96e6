"""What a session's requests did when: kept in memory within bounds, exported as Chrome trace events.

https://ui.perfetto.dev and chrome://tracing open the exported file. Every model and every sampling session of the
session is a track; a request is one span from its acceptance to its result, with a span for the time it waited and one
for the time it ran inside it.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections import OrderedDict, deque
from collections.abc import Iterator
from pathlib import Path

import attrs

from tinker_core.engine.futures import PendingResult
from tinker_core.errors import StorageError
from tinker_core.storage.checkpoints import safe_directory_name
from tinker_core.types import JsonObject, RequestError

MAX_SPANS_OF_SESSION = 20_000
"""Requests of one session that are remembered, the latest ones."""
MAX_SPANS = 200_000
"""Requests of all sessions together; beyond it the session that was active longest ago is forgotten."""

_MICROSECONDS = 1e6


@attrs.frozen(kw_only=True)
class RequestSpan:
    """One finished request; times are seconds of the engine's monotonic clock."""

    request_id: str
    request_type: str
    track: str
    """The model or sampling session that it was for."""
    accepted_at: float
    started_at: float | None
    """When it began to run; None when it failed before."""
    finished_at: float
    error: str | None
    """Name of the error's class."""


@attrs.define(eq=False)
class _SessionTrace:
    spans: deque[RequestSpan] = attrs.field(factory=lambda: deque(maxlen=MAX_SPANS_OF_SESSION))
    dropped: int = 0
    exported: int = -1
    """How many spans had been seen when the file was written; -1 before the first export."""
    lock: asyncio.Lock = attrs.field(factory=asyncio.Lock)

    @property
    def seen(self) -> int:
        return self.dropped + len(self.spans)


class Traces:
    """The traces of recent sessions. Nothing of them survives the process."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._sessions: OrderedDict[str, _SessionTrace] = OrderedDict()
        """Least recently active first."""
        self._num_spans = 0

    def clear_files(self) -> None:
        """Remove what an earlier process exported. Blocking."""
        if self._directory.exists():
            shutil.rmtree(self._directory)

    def note(self, entry: PendingResult, finished_at: float, error: RequestError | None) -> None:
        """Remember a request that got its result, if it was for a model or a sampling session of its caller's."""
        track = entry.target.sampling_session_id if entry.target is not None else entry.accepted.model_id
        if not track or not entry.base_model:  # a base model is found only after the owner was checked
            return
        span = RequestSpan(
            request_id=entry.accepted.request_id,
            request_type=entry.accepted.request_type.value,
            track=track,
            accepted_at=entry.accepted_at,
            started_at=entry.started_at,
            finished_at=finished_at,
            error=None if error is None else error.code,
        )
        session_id, _, _ = track.rpartition(":sample:" if entry.target is not None else ":train:")
        self._add(session_id, span)

    def _add(self, session_id: str, span: RequestSpan) -> None:
        trace = self._sessions.get(session_id)
        if trace is None:
            trace = self._sessions[session_id] = _SessionTrace()
        self._sessions.move_to_end(session_id)
        if len(trace.spans) == MAX_SPANS_OF_SESSION:
            trace.dropped += 1
        else:
            self._num_spans += 1
        trace.spans.append(span)
        while self._num_spans > MAX_SPANS:
            forgotten, oldest = self._sessions.popitem(last=False)
            self._num_spans -= len(oldest.spans)
            self.file_of(forgotten).unlink(missing_ok=True)

    async def export(self, session_id: str) -> Path:
        """Write a session's trace, unless the last one is still up to date; returns the file.

        Raises `StorageError`.
        """
        trace = self._sessions.get(session_id, _SessionTrace())
        path = self.file_of(session_id)
        async with trace.lock:
            if trace.exported == trace.seen and path.exists():
                return path
            seen, spans, dropped = trace.seen, list(trace.spans), trace.dropped
            try:
                await asyncio.to_thread(_write, path, session_id, spans, dropped)
            except OSError as error:
                raise StorageError(f"cannot write the trace of session {session_id!r}: {error.strerror}") from error
            trace.exported = seen
        return path

    def file_of(self, session_id: str) -> Path:
        """Where a session's exported trace lies, if it was exported."""
        return self._directory / f"{safe_directory_name(session_id)}.json"


def _write(path: Path, session_id: str, spans: list[RequestSpan], dropped: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        header: JsonObject = {"session_id": session_id, "requests": len(spans), "older_requests_dropped": dropped}
        file.write('{"displayTimeUnit":"ms","otherData":' + json.dumps(header) + ',"traceEvents":[')
        for index, event in enumerate(trace_events(session_id, spans)):
            file.write((",\n" if index else "\n") + json.dumps(event, separators=(",", ":")))
        file.write("\n]}\n")
    partial.replace(path)


def trace_events(session_id: str, spans: list[RequestSpan]) -> Iterator[JsonObject]:
    """Chrome trace events, with times in microseconds since the first request was accepted.

    Requests of one track overlap (several wait while one runs), so that each is a span of its own id.
    """
    yield {"ph": "M", "pid": 1, "tid": 0, "name": "process_name", "args": {"name": f"session {session_id}"}}
    start = min((span.accepted_at for span in spans), default=0.0)
    tracks: dict[str, int] = {}
    for span in spans:
        if span.track not in tracks:
            tracks[span.track] = len(tracks) + 1
            yield {
                "ph": "M",
                "pid": 1,
                "tid": tracks[span.track],
                "name": "thread_name",
                "args": {"name": span.track},
            }
        yield from _request_events(span, tracks[span.track], start)


def _request_events(span: RequestSpan, tid: int, start: float) -> Iterator[JsonObject]:
    common: JsonObject = {"pid": 1, "tid": tid, "cat": span.request_type, "id": span.request_id}
    began = span.finished_at if span.started_at is None else span.started_at
    arguments: JsonObject = {"request_id": span.request_id, "error": span.error}
    pieces = [(span.request_type, span.accepted_at, span.finished_at), ("queued", span.accepted_at, began)]
    if span.started_at is not None:
        pieces.append(("running", began, span.finished_at))
    for name, first, last in pieces:
        for phase, moment in (("b", first), ("e", last)):
            yield {
                **common,
                "ph": phase,
                "name": name,
                "ts": round((moment - start) * _MICROSECONDS),
                "args": arguments,
            }
