"""Sessions: how they begin, how they end, and what is released with them."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

import attrs

from tinker_core.engine.abandonment import Silence
from tinker_core.engine.admission import Admission
from tinker_core.engine.base_model import BaseModel
from tinker_core.engine.clock import Clock
from tinker_core.engine.config import EngineConfig, NewSession, SessionContents
from tinker_core.engine.futures import FutureTable
from tinker_core.engine.models import release_models
from tinker_core.engine.polls import Polls
from tinker_core.engine.registry import Registry
from tinker_core.engine.sampling import Sampling
from tinker_core.errors import UnseenClientError
from tinker_core.storage.journal import Journal
from tinker_core.types import SessionRecord


@attrs.frozen(kw_only=True, eq=False)
class Sessions:
    """Opens and ends sessions, also those of clients that are gone without a word."""

    _registry: Registry
    _futures: FutureTable
    _journal: Journal
    _admission: Admission
    _sampling: Sampling
    _polls: Polls
    _bases: Mapping[str, BaseModel]
    _clock: Clock
    _run_behind: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]

    async def create(self, session: NewSession) -> SessionRecord:
        """Open a session."""
        record = SessionRecord(
            session_id=f"s-{secrets.token_urlsafe(16)}",
            created_at=self._clock.now(),
            owner=session.owner,
            project_id=session.project_id,
            tags=session.tags,
            user_metadata=session.user_metadata,
            sdk_version=session.sdk_version,
            display_name=session.display_name,
        )
        await self._registry.add_session(record)
        self._registry.saw(record.session_id, self._clock.monotonic())
        return record

    async def heartbeat(self, session_id: str, owner: str) -> None:
        """Note that a client lives; raises `UnknownSessionError` or `SessionFinishedError`."""
        await self._registry.require_open(session_id, owner)
        self._registry.saw(session_id, self._clock.monotonic())

    async def finish(self, session_id: str, reason: str, detail: str | None, owner: str) -> None:
        """Close a session: its models and ephemeral weights are released once their accepted work is done."""
        record = await self._registry.session(session_id, owner)
        await self._registry.finish_session(record, self._clock.now(), reason, detail)
        release = self._run_behind(self._release(session_id))
        if not self._futures.pending(lambda entry: (entry.accepted.model_id or "").startswith(f"{session_id}:")):
            await release  # nothing to wait for: what comes next finds the room

    async def contents(self, session_id: str, owner: str) -> SessionContents:
        """The ids of what was made in a session."""
        await self._registry.session(session_id, owner)
        control = self._registry.control
        return SessionContents(
            training_run_ids=tuple(await control.list_run_ids(session_id)),
            sampler_ids=tuple(await control.list_sampler_ids(session_id)),
        )

    async def _release(self, session_id: str) -> None:
        await release_models(session_id, self._registry, self._bases, self._futures)
        self._admission.forget(session_id)
        await self._journal.forget_group(session_id)
        await self._sampling.release(session_id, self._bases)

    async def release_finished(self) -> None:
        """Release what belongs to sessions that finished in an earlier process while there still was work to do."""
        for session_id in {run.session_id for run in self._registry.live_models()}:
            session = await self._registry.control.get_session(session_id)
            if session is not None and session.finished_at is not None:
                self._registry.finished_sessions[session_id] = session.owner
                self._run_behind(self._release(session_id))
        self._run_behind(self._sampling.release_finished(self._bases))

    # --- clients of whom nothing is heard -----------------------------------------------------------------------------

    def silences(self, config: EngineConfig) -> list[Silence]:
        """What watches for them; each is to be run."""
        silences = [Silence(self._registry, self._clock, config.unseen_seconds, act=self._drop_unseen_samples)]
        if config.session_seconds is not None:
            silences.append(Silence(self._registry, self._clock, config.session_seconds, act=self._end_abandoned))
        return silences

    async def _drop_unseen_samples(self, session_id: str, detail: str) -> None:
        await self._sampling.drop_waiting(session_id, UnseenClientError(detail))

    async def _end_abandoned(self, session_id: str, detail: str) -> None:
        record = await self._registry.control.get_session(session_id)
        if record is None:
            return
        await self._polls.cancel_session(session_id)
        await self.finish(session_id, "interrupted", detail, record.owner)
