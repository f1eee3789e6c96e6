"""The rank sampler: which requests run, and what one step does.

A step is one packed forward of at most ``micro_batch_tokens`` tokens through the root module: the newest token of every
running sequence plus chunks of waiting prompts; then one draw over the whole batch.  Ranks run the same steps and take
rank 0's tokens, so they never diverge.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch

from tinker_core.errors import InvalidRequestError, NonFiniteError, TinkerError
from tinker_core.interfaces import ModelHandle, RankContext, StateWriter
from tinker_core.sampling.colocated.cache import SequenceCache
from tinker_core.sampling.colocated.packing import DecodeToken, Packed, Part, PromptChunk, pack
from tinker_core.sampling.colocated.progress import Job, RunningSequence, step_numbers
from tinker_core.sampling.colocated.revisions import Revisions
from tinker_core.sampling.colocated.root import Root, Unembed
from tinker_core.sampling.drawing import Drawn, draw
from tinker_core.sampling.stopping import StopRules
from tinker_core.training.adapters import AdapterWeights, Segment
from tinker_core.types import (
    PreparedSample,
    RequestError,
    SamplerCapabilities,
    SampleResult,
    Transport,
    WeightsRef,
)

MAX_TOPK = 64
LOGIT_CELLS = 2**24
"""Most cells of prompt logits that exist at once; bounds rows times vocabulary."""


class ColocatedSampler:
    """Decodes through a trainer's live base weights (`tinker_core.interfaces.RankSampler`)."""

    def __init__(self, context: RankContext, handle: ModelHandle) -> None:
        self._handle = handle
        self._budget = context.micro_batch_tokens
        self._max_running = context.max_decode_batch
        self._one_by_one = context.deterministic
        self._swaps_weights = handle.capabilities.full_parameter
        """Whether a revision is all parameters, so that what is computed together must be of one revision."""
        # On CUDA cumulative sums have no reproducible kernel.
        self._draws_on = torch.device("cpu") if context.deterministic else handle.device
        trainer = handle.capabilities
        self._capabilities = SamplerCapabilities(
            max_context_length=trainer.max_context_length,
            vocab_size=trainer.vocab_size,
            transports=(Transport.IN_PROCESS, Transport.FILE),
            max_revisions=context.max_revisions,
            max_topk=MAX_TOPK,
        )
        path = context.base_model.path
        self._stop_rules = StopRules(path, handle.eos_tokens, trainer.vocab_size)
        self._rows_at_once = max(1, LOGIT_CELLS // trainer.vocab_size)
        self._revisions = Revisions(handle, context.max_revisions)
        self._jobs: dict[str, Job] = {}
        self._waiting: deque[Job] = deque()
        """Their prompts are not, or only partly, computed."""
        self._starting: deque[Job] = deque()
        """Their prompts are computed; some sequences wait for a place."""
        self._running: SequenceCache[RunningSequence] = SequenceCache(trainer.max_context_length)
        self._results: list[SampleResult] = []

    def capabilities(self) -> SamplerCapabilities:
        """What this sampler offers."""
        return self._capabilities

    def publish(self, revision: str, ref: WeightsRef) -> None:
        """Copy weights under a new immutable name; raises `CapacityError` and what ``copy_adapter`` raises."""
        self._revisions.publish(revision, ref)

    def capture_revision(self, revision: str) -> StateWriter:
        """Something that writes a revision at any later time; raises `UnknownCheckpointError`."""
        return self._revisions.capture(revision)

    def retire(self, revision: str) -> None:
        """Drop a revision; raises `UnknownCheckpointError`."""
        self._revisions.retire(revision)

    def submit(self, sample: PreparedSample) -> None:
        """Queue a sample; one that cannot be served fails in the next step."""
        if sample.request_id in self._jobs:
            raise InvalidRequestError(f"request_id: a sample {sample.request_id!r} is already in progress")
        try:
            weights = self._revisions.weights(sample.revision)
            job = Job(sample, weights, self._capabilities, self._stop_rules)
        except TinkerError as error:
            self._fail(sample.request_id, error)
            return
        self._jobs[job.request_id] = job
        self._waiting.append(job)

    def cancel(self, request_id: str) -> None:
        """Drop a sample that has not finished."""
        job = self._jobs.get(request_id)
        if job is not None:
            self._drop(job, wipe=False)

    def is_waiting(self, request_id: str) -> bool:
        """Whether a sample waits for the batch to have a place: with its prompt, or for its first sequence."""
        job = self._jobs.get(request_id)
        return job is not None and job.waits

    @property
    def has_work(self) -> bool:
        """Whether a `step` would do anything."""
        return bool(self._jobs or self._results)

    @torch.no_grad()
    def step(self) -> tuple[SampleResult, ...]:
        """Compute one token for every running sequence and start what fits; returns the requests that ended."""
        chunks = self._admit()
        self._running.make_room()
        parts: list[Part[RunningSequence]] = [*self._decode_tokens(), *(chunk for _, chunk in chunks)]
        sequences: list[RunningSequence] = []
        logits: list[torch.Tensor] = []
        if parts:
            sequences, rows = self._forward(parts, {id(chunk): job for job, chunk in chunks})
            logits.append(rows)
        continued = len(sequences)
        self._start(sequences, logits)
        if sequences:
            whole = logits[0] if len(logits) == 1 else torch.cat(logits)
            self._take(sequences, continued, whole)
        results, self._results = tuple(self._results), []
        return results

    # --- admission ----------------------------------------------------------------------------------------------------

    def _admit(self) -> list[tuple[Job, PromptChunk]]:
        """Prompt chunks for this step: what the token budget and the free places allow.

        In deterministic mode a request has the batch to itself: rounding depends on what is computed together.
        """
        if self._one_by_one and (self._starting or len(self._running)):
            return []
        running = len(self._running)
        budget = max(1, self._budget - running)
        wanted = running + sum(job.num_waiting for job in self._starting)
        chunks: list[tuple[Job, PromptChunk]] = []
        for job in self._waiting:
            if budget == 0 or wanted >= self._max_running or not self._may_join(job, chunks):
                break
            chunk = job.next_chunk(budget)
            chunks.append((job, chunk))
            budget -= len(chunk.tokens)
            wanted += job.num_waiting
            if self._one_by_one:
                break
        for job, _ in chunks:
            if job.is_computed:
                self._waiting.remove(job)
                self._starting.append(job)
        return chunks

    def _may_join(self, job: Job, chunks: Sequence[tuple[Job, PromptChunk]]) -> bool:
        """Whether a job can be computed together with all that is in progress, and with the chunks of this step."""
        if not self._swaps_weights:
            return True
        running = (sequence.job for pool in self._running.pools for sequence in pool.owners)
        return all(other.weights is job.weights for other in (*running, *self._starting, *(one for one, _ in chunks)))

    def _start(self, sequences: list[RunningSequence], logits: list[torch.Tensor]) -> None:
        """Add first tokens to the batch: as many new sequences as there are places."""
        free = self._max_running - len(self._running)
        while self._starting and free:
            job = self._starting[0]
            assert job.first_logits is not None
            count = min(free, job.num_waiting)
            sequences.extend(job.start(count))
            logits.append(job.first_logits.expand(count, -1))
            free -= count
            if not job.num_waiting:
                self._starting.popleft()

    # --- the forward --------------------------------------------------------------------------------------------------

    def _decode_tokens(self) -> list[DecodeToken[RunningSequence]]:
        return [
            DecodeToken(
                weights=sequence.job.weights,
                token=sequence.tokens[-1],
                position=sequence.position,
                pool=pool,
                slot=slot,
            )
            for pool in self._running.pools
            for slot, sequence in enumerate(pool.owners)
        ]

    def _forward(
        self, parts: Sequence[Part[RunningSequence]], jobs: dict[int, Job]
    ) -> tuple[list[RunningSequence], torch.Tensor]:
        """Run one forward; returns the running sequences and their logits, float32 ``[n, V]``.

        The logits after a prompt that is now complete are left in its job.
        """
        packed = pack(parts, self._handle.device)

        def head(hidden: torch.Tensor, unembed: Unembed) -> torch.Tensor:
            for part, start in zip(packed.parts, packed.starts, strict=True):
                if isinstance(part, PromptChunk):
                    rows = hidden[start : start + len(part.tokens)]
                    score_chunk(jobs[id(part)], part, rows, unembed, self._rows_at_once, self._draws_on)
            rows = hidden if packed.rows is None else hidden[packed.rows]
            return unembed.logits(rows, packed.row_segments).float()

        root: Root = self._handle.model
        logits = root(packed.input_ids, packed.position_ids, packed.plan, packed.segments, head)
        packed.plan.commit()
        return self._sort_rows(packed, jobs, logits)

    def _sort_rows(
        self, packed: Packed[RunningSequence], jobs: dict[int, Job], logits: torch.Tensor
    ) -> tuple[list[RunningSequence], torch.Tensor]:
        sequences, kept = [], []
        for row, part in enumerate(packed.parts):
            if isinstance(part, PromptChunk):
                job = jobs[id(part)]
                if job.is_computed:
                    # Broken prompt scores fail the job where its first token is drawn, by rank 0's verdict.
                    first = logits[row : row + 1].clone()
                    job.first_logits = first if job.scores.finite else first.fill_(float("nan"))
            else:
                sequences.append(part.pool.owners[part.slot])
                kept.append(row)
        if len(kept) == len(packed.parts):
            return sequences, logits
        return sequences, logits[torch.tensor(kept, dtype=torch.int64, device=logits.device)]

    # --- results ------------------------------------------------------------------------------------------------------

    def _take(self, sequences: Sequence[RunningSequence], continued: int, logits: torch.Tensor) -> None:
        """Draw a token for every sequence; the first ``continued`` hold a cache slot, the others begin."""
        logits = logits.to(self._draws_on)
        drawn = draw(logits, [sequence.job.params for sequence in sequences], step_numbers(sequences))
        tokens = self._handle.broadcast(drawn.tokens.to(self._handle.device)).tolist()
        logprobs = drawn.logprobs.tolist()
        topk = _likeliest(sequences, logits, drawn)
        broken: dict[str, Job] = {}
        for row, (sequence, token) in enumerate(zip(sequences, tokens, strict=True)):
            job = sequence.job
            if token < 0:
                broken[job.request_id] = job
                continue
            reason = sequence.add(token, logprobs[row], topk[row])
            if reason is None:
                if row >= continued:
                    self._running.add(sequence, job.cache)
                continue
            if row < continued:
                self._running.remove(sequence)
            job.end(sequence, reason)
            if job.is_done:
                del self._jobs[job.request_id]
                self._results.append(SampleResult(request_id=job.request_id, output=job.output()))
        for job in broken.values():
            self._drop(job, wipe=True)
            self._fail(job.request_id, NonFiniteError("the model's logits are not finite; its weights have diverged"))

    def _drop(self, job: Job, *, wipe: bool) -> None:
        del self._jobs[job.request_id]
        for queue in (self._waiting, self._starting):
            if job in queue:
                queue.remove(job)
        for pool in self._running.pools:
            for sequence in list(pool.owners):
                if sequence.job is job:
                    self._running.remove(sequence, wipe=wipe)

    def _fail(self, request_id: str, error: TinkerError) -> None:
        record = RequestError(category=error.category, code=type(error).__name__, message=str(error))
        self._results.append(SampleResult(request_id=request_id, error=record))


def score_chunk(
    job: Job, chunk: PromptChunk, hidden: torch.Tensor, unembed: Unembed, rows: int, device: torch.device
) -> None:
    """Hand the logits that a job asks about its prompt to its scores, on ``device``, some rows at a time."""
    first = max(job.scores.first_row, chunk.offset)
    last = min(chunk.end, len(job.prompt) - 1)
    for start in range(first, last, rows):
        part = hidden[start - chunk.offset : min(last, start + rows) - chunk.offset]
        job.scores.add(start, unembed.logits(part, whole_segment(job.weights, part.shape[0])).float().to(device))


def whole_segment(weights: AdapterWeights | None, size: int) -> tuple[Segment, ...]:
    """Segments of rows that all belong to one adapter."""
    return () if weights is None else (Segment(start=0, end=size, weights=weights),)


def _likeliest(
    sequences: Sequence[RunningSequence], logits: torch.Tensor, drawn: Drawn
) -> list[tuple[torch.Tensor, torch.Tensor] | None]:
    """Per row, the likeliest tokens ``[k]`` and their logprobs where the request asks for them."""
    wanted = [sequence.job.request.topk_sample_logprobs for sequence in sequences]
    found: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * len(wanted)
    rows = [row for row, k in enumerate(wanted) if k]
    if not rows:
        return found
    chosen = torch.tensor(rows, device=logits.device)
    values, tokens = logits[chosen].topk(min(max(wanted), logits.shape[1]), dim=-1)
    logprobs = (values - drawn.log_totals[chosen][:, None]).cpu()
    tokens = tokens.cpu()
    for place, row in enumerate(rows):
        found[row] = (tokens[place, : wanted[row]], logprobs[place, : wanted[row]])
    return found
