"""Live sessions, models and sampling sessions, in memory in front of the control database."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime

import attrs

from tinker_core.errors import (
    ForeignSessionError,
    SessionFinishedError,
    UnknownModelError,
    UnknownSamplerError,
    UnknownSessionError,
)
from tinker_core.storage.control import ControlStore
from tinker_core.types import SamplerRecord, SessionRecord, TrainingRunRecord

SILENT_SECONDS = 120.0
"""Clients beat every ten seconds, and complain after this long without an answer."""


class Registry:
    """What exists. Reads of live things never reach the database."""

    def __init__(self, control: ControlStore) -> None:
        self.control = control
        self.inflight: dict[str, str] = {}
        """The revision behind each model's inflight target."""
        self.finished_sessions: dict[str, str] = {}
        """Owners of the sessions that this process has seen finish."""
        self._sessions: dict[str, SessionRecord] = {}
        self._models: dict[str, TrainingRunRecord] = {}
        self._samplers: dict[str, SamplerRecord] = {}
        self._seen: dict[str, float] = {}
        """When the client of each unfinished session was last heard of, in monotonic seconds; longest ago first."""

    # --- sessions -----------------------------------------------------------------------------------------------------

    async def add_session(self, record: SessionRecord) -> None:
        """Open a session."""
        await self.control.add_session(record)
        self._sessions[record.session_id] = record

    async def session(self, session_id: str, owner: str) -> SessionRecord:
        """A session, open or finished; raises `UnknownSessionError`, also for another owner's."""
        record = self._sessions.get(session_id) or await self.control.get_session(session_id)
        if record is None or record.owner != owner:
            raise UnknownSessionError(session_id)
        self._sessions[session_id] = record
        return record

    async def require_open(self, session_id: str, owner: str) -> SessionRecord:
        """A session that takes new work; raises `SessionFinishedError` or `ForeignSessionError` otherwise."""
        record = await self.session(session_id, owner)
        if record.finished_at is not None:
            raise SessionFinishedError(session_id)
        if record.server_id not in (None, self.control.server_id):
            raise ForeignSessionError(session_id, record.server_id)
        return record

    async def finish_session(self, record: SessionRecord, at: datetime, reason: str, detail: str | None) -> None:
        """Close a session; the first reason stays."""
        if record.finished_at is not None:
            return
        self._seen.pop(record.session_id, None)
        finished = attrs.evolve(record, finished_at=at, finish_reason=reason, finish_detail=detail)
        self._sessions[record.session_id] = finished
        self.finished_sessions[record.session_id] = record.owner
        await self.control.finish_session(record.session_id, at, reason, detail)

    def saw(self, session_id: str, now: float) -> None:
        """Note that the client of a session lives."""
        if session_id not in self.finished_sessions:
            self._seen.pop(session_id, None)
            self._seen[session_id] = now

    def silences(self) -> Iterator[tuple[str, float]]:
        """The unfinished sessions and when their clients were last heard of, longest ago first."""
        return iter(self._seen.items())

    def active_sessions(self, now: float) -> frozenset[str]:
        """Ids of the unfinished sessions whose clients were heard of lately."""
        return frozenset(session_id for session_id, seen in self._seen.items() if now - seen <= SILENT_SECONDS)

    def set_project(self, session_id: str, project_id: str) -> None:
        """What is in memory of a session moves into a project with it."""
        if session_id in self._sessions:
            self._sessions[session_id] = attrs.evolve(self._sessions[session_id], project_id=project_id)
        for run in self.models_of(session_id):
            self._models[run.model_id] = attrs.evolve(run, project_id=project_id)
        for sampler in [sampler for sampler in self._samplers.values() if sampler.session_id == session_id]:
            self._samplers[sampler.sampling_session_id] = attrs.evolve(sampler, project_id=project_id)

    # --- models -------------------------------------------------------------------------------------------------------

    def add_model(self, run: TrainingRunRecord) -> None:
        """Make a model live."""
        self._models[run.model_id] = run

    def model(self, model_id: str, owner: str | None = None) -> TrainingRunRecord:
        """A live model; raises `UnknownModelError`, also for another owner's if one is given."""
        run = self._models.get(model_id)
        if run is None or owner not in (None, run.owner):
            raise UnknownModelError(model_id)
        return run

    def is_live(self, model_id: str) -> bool:
        """Whether a model exists that can be worked with."""
        return model_id in self._models

    def touch(self, model_id: str, at: datetime) -> None:
        """Note a model's latest request."""
        run = self._models.get(model_id)
        if run is not None:
            self._models[model_id] = attrs.evolve(run, last_request_at=at)

    def models_of(self, session_id: str) -> list[TrainingRunRecord]:
        """The live models of a session."""
        return [run for run in self._models.values() if run.session_id == session_id]

    def live_models(self) -> list[TrainingRunRecord]:
        """All live models."""
        return list(self._models.values())

    async def remove_model(self, model_id: str) -> None:
        """A model is no longer live; its record remains."""
        run = self._models.pop(model_id, None)
        if run is not None:
            await self.control.touch_run(model_id, run.last_request_at)

    async def run(self, model_id: str, owner: str) -> TrainingRunRecord:
        """A training run, live or past; raises `UnknownModelError`, also for another owner's."""
        record = self._models.get(model_id) or await self.control.get_run(model_id)
        if record is None or record.owner != owner:
            raise UnknownModelError(model_id)
        return record

    def freshen(self, run: TrainingRunRecord) -> TrainingRunRecord:
        """A run out of the database, with what only memory knows."""
        return self._models.get(run.model_id, run)

    # --- sampling sessions --------------------------------------------------------------------------------------------

    async def add_sampler(
        self,
        sampling_session_id: str,
        run: TrainingRunRecord,
        *,
        revision: str,
        now: datetime,
    ) -> SamplerRecord:
        """Open a sampling session on weights of a live model."""
        record = SamplerRecord(
            sampling_session_id=sampling_session_id,
            session_id=run.session_id,
            base_model=run.base_model,
            created_at=now,
            revision=revision,
            owner=run.owner,
            project_id=run.project_id,
        )
        await self.put_sampler(record)
        return record

    async def put_sampler(self, record: SamplerRecord) -> None:
        """Open a sampling session."""
        await self.control.add_sampler(record)
        self._samplers[record.sampling_session_id] = record

    async def sampler(self, sampling_session_id: str, owner: str) -> SamplerRecord:
        """A sampling session; raises `UnknownSamplerError`, also for another owner's."""
        record = self._samplers.get(sampling_session_id) or await self.control.get_sampler(sampling_session_id)
        if record is None or record.owner != owner:
            raise UnknownSamplerError(sampling_session_id)
        self._samplers[sampling_session_id] = record
        return record

    async def find_sampler(self, sampling_session_id: str) -> SamplerRecord | None:
        """A sampling session, or None."""
        return self._samplers.get(sampling_session_id) or await self.control.get_sampler(sampling_session_id)

    def forget_inflight_of(self, session_id: str) -> None:
        """Forget the inflight targets of a finished session's models."""
        for model_id in [name for name in self.inflight if name.startswith(f"{session_id}:train:")]:
            del self.inflight[model_id]

    def forget_samplers_of(self, session_id: str) -> list[SamplerRecord]:
        """Take the sampling sessions of a finished session out of memory; their records remain."""
        gone = [record for record in self._samplers.values() if record.session_id == session_id]
        for record in gone:
            del self._samplers[record.sampling_session_id]
        return gone
