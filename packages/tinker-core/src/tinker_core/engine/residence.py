"""Which models of one base model are in its workers' memory, and how the others come back.

A model is resident, or *parked*: its snapshot is on disk, and what it did since is in the journal.  Before work runs,
its models are brought back from their snapshots.  What a snapshot does not cover is put into the model's queue again
and runs like anything else; its results are known already and stay as they are.  So a model that was parked, one whose
workers died and one whose server died all come back in the same way.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable

import attrs

from tinker_core.engine.clock import Clock
from tinker_core.engine.config import EngineConfig
from tinker_core.engine.figures import SnapshotLag
from tinker_core.engine.model_state import Done, ModelState, model_row, snapshot_of
from tinker_core.engine.payloads import Payloads
from tinker_core.engine.registry import Registry
from tinker_core.engine.revisions import Revisions
from tinker_core.engine.snapshots import SnapshotFiles
from tinker_core.errors import JournalError, ModelLostError, StorageError, TinkerError, WorkerLostError
from tinker_core.executors.protocol import ModelName, StateCall
from tinker_core.executors.rank_loop import describe_error
from tinker_core.interfaces import WorkerGroup
from tinker_core.scheduler import QueuedRequest, Scheduler, Work
from tinker_core.storage.journal import Fate, Journal, ModelRow
from tinker_core.types import EngineOutput, PreparedModel, SnapshotParts

log = logging.getLogger(__name__)

MAX_DEATHS = 3
"""How often workers may die under one model's work before it is given up."""
_FULL_SECONDS = 5.0
"""How long to wait before a model is written again that could not be, when room in memory depends on it."""
_NEVER = float("inf")
WHOLE = SnapshotParts(optimizer=True, gradient=True)


class Residence:
    """The models of one base model: where each is, and what has to be done again."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        scheduler: Scheduler,
        journal: Journal,
        files: SnapshotFiles,
        payloads: Payloads,
        registry: Registry,
        revisions: Revisions,
        clock: Clock,
        wake: Callable[[], None],
        resolve: Callable[[str, EngineOutput], None],
    ) -> None:
        self._config = config
        self._scheduler = scheduler
        self._journal = journal
        self._files = files
        self._payloads = payloads
        self._registry = registry
        self._revisions = revisions
        self._clock = clock
        self._wake = wake
        self._resolve = resolve
        self._models: dict[str, ModelState] = {}
        self._resident: set[str] = set()
        self._reverting: set[str] = set()
        self._group: WorkerGroup | None = None
        self._flushing = False
        self._crowded = False
        """Whether the journal has no room to let models wait for their turn to be written."""
        self._written = asyncio.Event()
        self._ended = asyncio.Event()
        self._num_written = 0
        self._num_failed = 0

    # --- what there is ------------------------------------------------------------------------------------------------

    def add(self, model_id: str, row: ModelRow | None = None) -> None:
        """A new model, or one that an earlier process left behind."""
        model = ModelState(model_id=model_id, used_at=self._clock.monotonic())
        if row is not None:
            model.covered = row.next_seq_id
            model.snapshot = snapshot_of(row)
        self._models[model_id] = model

    async def remove(self, model_id: str, *, keep_weights: bool = False) -> None:
        """Forget a model for good, with all that would bring it back.

        With ``keep_weights``, what it published stays for those who sample from it.
        """
        model = self._models.pop(model_id, None)
        if model is None:
            return
        if model.writing is not None:
            await asyncio.wait([model.writing])
        if keep_weights:
            await self._revisions.persist(model_id)
        self._revisions.give_up(model_id, ModelLostError(model_id, "it was unloaded"))
        if model_id in self._resident and self._group is not None:
            self._resident.discard(model_id)
            with contextlib.suppress(WorkerLostError):  # it went with its process
                await self._group.call("unload", ModelName(model_id=model_id))
        await self._journal.forget_model(model_id)
        await asyncio.to_thread(self._files.remove, model_id)

    def knows(self, model_id: str) -> bool:
        """Whether a model is here, resident or not."""
        return model_id in self._models

    @property
    def num_resident(self) -> int:
        """Models in the workers' memory."""
        return len(self._resident)

    @property
    def num_parked(self) -> int:
        """Models that are not."""
        return len(self._models) - self.num_resident

    def lag(self) -> SnapshotLag:
        """What snapshots do not cover."""
        changed = [model for model in self._models.values() if model.changed_at is not None]
        oldest = min((model.changed_at for model in changed if model.changed_at is not None), default=None)
        return SnapshotLag(
            seconds=0.0 if oldest is None else max(0.0, self._clock.monotonic() - oldest),
            requests=sum(len(model.done) for model in changed),
            written=self._num_written,
            failed=self._num_failed,
        )

    def require(self, model_id: str) -> None:
        """Raise `ModelLostError` for a model that could not be brought back."""
        model = self._models.get(model_id)
        if model is not None and model.lost is not None:
            raise model.lost

    async def close(self) -> None:
        """End the snapshots that are being written."""
        tasks = [model.writing for model in self._models.values() if model.writing is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- what was done ------------------------------------------------------------------------------------------------

    def note_done(self, model_id: str, done: Done) -> None:
        """Note that a request has its result."""
        model = self._models.get(model_id)
        if model is not None:
            model.note_done(done, self._clock.monotonic())

    def note_repeated(self, model_id: str) -> None:
        """Note that a request has run once more: a model that gets on with what it has to repeat kills no workers."""
        model = self._models.get(model_id)
        if model is not None:
            model.deaths = 0

    def cover(self, row: ModelRow) -> bool:
        """A snapshot counts from now on: what it covers needs not be done again. To be called right before the journal
        is told, which then forgets those requests.

        False for a snapshot that a later one has overtaken, or of a model that is gone: the journal must not be told.
        """
        model = self._models.get(row.model_id)
        if model is None or row.next_seq_id < model.covered:
            return False
        model.cover(row, self._clock.monotonic())
        return True

    async def drop_replaced(self, model_id: str) -> None:
        """Remove the snapshots that no longer count, now that the journal says so durably."""
        model = self._models.get(model_id)
        if model is not None:
            replaced, model.replaced = model.replaced, []
            for name in replaced:
                await asyncio.to_thread(self._files.remove, model_id, name)

    def arrived(self, model_id: str) -> None:
        """Note that the workers have made a new model."""
        self._resident.add(model_id)

    # --- workers come and go ------------------------------------------------------------------------------------------

    def attach(self, group: WorkerGroup) -> None:
        """Fresh workers, without any model."""
        self._group = group

    def detach(self, unfinished: Iterable[QueuedRequest] = ()) -> None:
        """The workers are gone, and with them what was in their memory: everything uncovered has to run again."""
        self._group = None
        self._resident.clear()
        self._reverting.clear()
        running: dict[str, QueuedRequest] = {request.model_id: request for request in unfinished}
        for model in list(self._models.values()):
            again = running.get(model.model_id)
            if again is not None:
                model.deaths += 1
                self._blame(model, again)
            if model.lost is None:
                self.rewind(model.model_id, again)

    def _blame(self, model: ModelState, request: QueuedRequest) -> None:
        """Let a request under which workers die again and again fail, or its model if it has its result already."""
        if model.deaths < MAX_DEATHS:
            return
        reason = f"it ended the workers {model.deaths} times in a row"
        if request.seq_id in model.done:
            self.lose(model.model_id, WorkerLostError(f"request {request.seq_id} has to be repeated, and {reason}"))
        else:
            self._resolve(request.request_id, describe_error(WorkerLostError(f"the request is given up: {reason}")))

    def rewind(self, model_id: str, unfinished: QueuedRequest | None = None) -> None:
        """Put what a model's snapshot does not cover into its queue again."""
        model = self._models[model_id]
        requests = []
        for seq_id, done in sorted(model.done.items()):
            if done.fate is Fate.KEEP:
                self._payloads.recall(done.request.request_id, done.number, replay=True)
                if done.publishes:
                    self._revisions.expect(f"{model_id}@{done.request.request_id}")
            requests.append(attrs.evolve(done.request, proves=True, alone=False))
            assert seq_id == done.request.seq_id
        if unfinished is not None and unfinished.seq_id not in model.done:
            requests.append(attrs.evolve(unfinished, alone=True))
        self._scheduler.rewind(model_id, model.covered, requests, self._clock.monotonic())

    async def prepare(self, work: Work) -> Work:
        """Have all models of some work in memory; returns the part of the work whose models are.

        Raises `WorkerLostError`. What cannot be brought back is given up, and its requests fail.
        """
        wanted = {request.model_id for request in work.requests}
        runnable = []
        for request in work.requests:
            model = self._models.get(request.model_id)
            if model is None:
                continue  # it was removed after its last request was chosen
            if request.request_id not in self._payloads:
                continue  # only its place in the order is left
            model.used_at = self._clock.monotonic()
            try:
                if model.model_id not in self._resident:
                    await self._make_room(wanted)
                    if request.seq_id != 0:
                        await self._bring_back(model)
                runnable.append(request)
            except WorkerLostError:
                raise
            except TinkerError as error:
                self.lose(model.model_id, error, running=request)
        return Work(kind=work.kind, requests=tuple(runnable))

    async def _bring_back(self, model: ModelState) -> None:
        run = self._registry.model(model.model_id)
        assert self._group is not None
        if model.snapshot is None:
            raise ModelLostError(model.model_id, "it has no snapshot")
        directory = await asyncio.to_thread(self._files.verified, model.model_id, model.snapshot)
        prepared = PreparedModel(
            model_id=run.model_id, lora_config=run.lora_config, optimizer_config=run.optimizer_config
        )
        await self._group.call("create", prepared)
        self._resident.add(model.model_id)
        call = StateCall(model_id=run.model_id, directory=str(directory), parts=WHOLE)
        try:
            await self._group.call("restore", call)
        except TinkerError:
            await self._unload(model)
            raise

    def revert(self, model_id: str) -> None:
        """Have a model brought back before it works again, because a failed request has changed it."""
        self._reverting.add(model_id)

    async def finish_reverting(self, work: Work) -> None:
        """Bring those models of some work out of memory that are to be reverted; they do again what they did."""
        for model_id in [request.model_id for request in work.requests if request.model_id in self._reverting]:
            self._reverting.discard(model_id)
            model = self._models.get(model_id)
            if model is None or model.lost is not None:
                continue
            if model.writing is not None:
                await asyncio.wait([model.writing])
            if model_id in self._resident:
                await self._unload(model)
            self.rewind(model_id)

    def lose(self, model_id: str, error: TinkerError, *, running: QueuedRequest | None = None) -> None:
        """Give up a model that cannot be brought back: its requests fail, and say why."""
        model = self._models.get(model_id)
        if model is None:
            return
        reason = ModelLostError(model_id, str(error))
        log.error("%s", reason)
        model.lost = reason
        self._revisions.give_up(model_id, reason)
        waiting = [*([running] if running is not None else []), *self._scheduler.remove_model(model_id)]
        for request in waiting:
            self._resolve(request.request_id, describe_error(reason))

    # --- room ---------------------------------------------------------------------------------------------------------

    async def _make_room(self, wanted: set[str]) -> None:
        while self.num_resident >= self._config.max_resident:
            idle = [model for model in self._residents() if self._may_leave(model, wanted)]
            if not idle:
                self._ended.clear()
                await self._ended.wait()
                continue
            now = self._clock.monotonic()
            victim = min(idle, key=lambda model: (model.retry_at > now and model.changed, *self._staleness(model)))
            try:
                await self._park(victim)
            except StorageError as error:
                # Without room on disk nothing can leave memory; what waits is not lost, so it waits on.
                self._note_failure(victim, error)
                await self._clock.wait(asyncio.Event(), now + _FULL_SECONDS)

    def _may_leave(self, model: ModelState, wanted: set[str]) -> bool:
        return model.model_id not in wanted and not self._scheduler.is_running(model.model_id)

    def note_end(self) -> None:
        """Some work has ended beside the rest: its models may leave memory."""
        self._ended.set()

    def _staleness(self, model: ModelState) -> tuple[bool, float]:
        return not self._scheduler.is_idle(model.model_id), model.used_at

    def _note_failure(self, model: ModelState, error: TinkerError) -> None:
        self._num_failed += 1
        model.retry_at = self._clock.monotonic() + self._config.snapshot_seconds
        log.error("model %s: %s; it will be tried again", model.model_id, error)

    async def _park(self, model: ModelState) -> None:
        if model.writing is not None:
            await asyncio.wait([model.writing])
        if model.model_id in self._resident and model.changed:
            await self._write(model)
        if model.model_id in self._resident:
            await self._unload(model)
            # What it still has in its queue finds it again; what changed nothing needs no second run.
            log.info("model %s leaves the workers' memory", model.model_id)

    async def _unload(self, model: ModelState) -> None:
        assert self._group is not None
        self._resident.discard(model.model_id)
        await self._group.call("unload", ModelName(model_id=model.model_id))

    # --- snapshots ----------------------------------------------------------------------------------------------------

    async def tend(self) -> None:
        """Between two pieces of work: begin the snapshot that is due, and park models that nobody used for long."""
        now = self._clock.monotonic()
        residents = self._residents()
        stats = self._journal.stats()
        self._crowded = stats.body_bytes + stats.result_bytes > self._config.journal_bytes // 2
        if not any(model.writing is not None for model in residents):
            due = [model for model in residents if self._is_due(model, now)]
            if due:
                self._begin_snapshot(min(due, key=lambda model: model.changed_at or now))
                await asyncio.sleep(0)  # its first command goes out before those of the next piece of work
        for model in residents:
            if self._parks_at(model) <= now:
                await self._park(model)

    def deadline(self) -> float | None:
        """When `tend` has something to do, unless something happens before."""
        residents = self._residents()
        due = [at for model in residents if (at := self._parks_at(model)) != _NEVER]
        if not any(model.writing is not None for model in residents):
            due += [
                self._due_at(model)
                for model in residents
                if model.changed and model.lost is None and not self._scheduler.is_running(model.model_id)
            ]
        return min(due, default=None)

    def _residents(self) -> list[ModelState]:
        return [self._models[model_id] for model_id in self._resident if model_id in self._models]

    def _is_due(self, model: ModelState, now: float) -> bool:
        """Whether it is time for a snapshot, and the model's state is that between two pieces of its work."""
        if not model.changed or model.lost is not None or self._scheduler.is_running(model.model_id):
            return False
        return self._due_at(model) <= now

    def _due_at(self, model: ModelState) -> float:
        assert model.changed_at is not None
        config = self._config
        if self._flushing or (self._crowded and model.num_bytes > 0) or model.num_steps >= config.snapshot_steps:
            return model.retry_at
        if model.num_bytes >= config.snapshot_bytes:
            return model.retry_at
        return max(model.retry_at, model.changed_at + config.snapshot_seconds)

    def _parks_at(self, model: ModelState) -> float:
        seconds = self._config.park_seconds
        idle = not model.changed and model.writing is None
        if seconds is None or not idle or not self._scheduler.is_idle(model.model_id):
            return _NEVER
        return model.used_at + seconds

    def _begin_snapshot(self, model: ModelState) -> None:
        async def write() -> None:
            try:
                await self._write(model)
            except WorkerLostError:
                log.info("the snapshot of model %s ended with its workers", model.model_id)
            except JournalError:
                raise
            except TinkerError as error:
                self._note_failure(model, error)

        def end(task: asyncio.Task[None]) -> None:
            model.writing = None
            self._written.set()
            self._wake()
            if not task.cancelled() and task.exception() is not None:
                log.error("the snapshot of model %s failed", model.model_id, exc_info=task.exception())

        model.writing = asyncio.create_task(write())
        model.writing.add_done_callback(end)

    async def _write(self, model: ModelState) -> None:
        group = self._group
        row = await self.snapshot(model.model_id, self._scheduler.next_seq_id(model.model_id))
        # Workers that are gone by now have left behind what the model has to do again, from an earlier snapshot.
        if self._group is group and self._models.get(model.model_id) is model and self.cover(row):
            await self._journal.put_models([row])
            self._num_written += 1
            await self.drop_replaced(model.model_id)
        else:  # likewise when the model was removed meanwhile, or loaded into, which came with a snapshot of its own
            await asyncio.to_thread(self._files.remove, model.model_id, snapshot_of(row))

    async def snapshot(self, model_id: str, next_seq_id: int) -> ModelRow:
        """Write a model's present state, which covers everything below a number; it counts once the journal says so."""
        assert self._group is not None
        group, inflight = self._group, self._registry.inflight.get(model_id)
        # No suspension before this call: the state to be written is that between two pieces of the model's work.
        directory = self._files.begin(model_id)
        try:
            call = StateCall(model_id=model_id, directory=str(directory), parts=WHOLE, background=True)
            await group.call("snapshot", call)
            await self._revisions.persist(model_id)
            name = await asyncio.to_thread(self._files.commit, model_id, directory)
        except BaseException:
            await asyncio.to_thread(self._files.abort, directory)
            raise
        return model_row(model_id, next_seq_id, snapshot=name, inflight=inflight)

    async def flush(self, deadline: float) -> None:
        """Write all that is not covered yet, as far as there is time: a start after this has nothing to do again."""
        self._flushing = True
        self._wake()
        while self._is_unwritten() and self._clock.monotonic() < deadline:
            self._written.clear()
            await self._clock.wait(self._written, deadline)

    def _is_unwritten(self) -> bool:
        now = self._clock.monotonic()
        return any(model.writing is not None or self._is_due(model, now) for model in self._residents())
