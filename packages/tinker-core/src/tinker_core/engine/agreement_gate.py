"""When trainer and sampler of a base model are compared, and what follows from it."""

from __future__ import annotations

import asyncio
import logging

from tinker_core.engine.agreement import Findings, Sides, message_of, summary_of
from tinker_core.engine.agreement_probe import LEAST_CONTEXT, LOSS, OPTIMIZER, Pair, compare
from tinker_core.engine.config import EngineConfig
from tinker_core.errors import AgreementError, UnsupportedFeatureError, WorkerLostError
from tinker_core.interfaces import SamplerPlugin
from tinker_core.types import AgreementReport, BaseModelSpec

log = logging.getLogger(__name__)


class AgreementGate:
    """Lets a base model become ready only if its trainer and its sampler compute the same; looks again on demand."""

    def __init__(self, spec: BaseModelSpec, config: EngineConfig, sampler: SamplerPlugin | None) -> None:
        options = sampler.options if sampler is not None else ()
        changed = (option for option in options if config.options.get(option.name, option.default) != option.default)
        self._sides = Sides(
            base_model=spec.name,
            path=spec.path,
            dtype=config.dtype,
            trainer=config.backend,
            sampler=config.sampler or "",
            flags=tuple(f"--{option.name}" for option in changed),
        )
        self._spec = spec
        self._factor = config.agreement_tolerance
        self._running: asyncio.Task[AgreementReport] | None = None
        self.report: AgreementReport | None = None
        """What the last comparison found."""

    @property
    def doubt(self) -> str | None:
        """Why the base model is not to be relied on; None if the last comparison found no disagreement."""
        return None if self.report is None or self.report.agrees else message_of(self.report)

    async def pass_at_start(self, pair: Pair) -> None:
        """Compare for the first time; raises `AgreementError`. Where nothing can be compared, the log says why."""
        reason = self._why_not(pair)
        if reason is not None:
            log.info("base model %r: %s", self._spec.name, reason)
            return
        report = await self._compare(pair)
        if not report.agrees:
            raise AgreementError(message_of(report))

    async def look_again(self, pair: Pair) -> AgreementReport:
        """Compare while the base model works for its clients; those who ask meanwhile get the same report.

        Raises `UnsupportedFeatureError` where nothing can be compared, and `WorkerLostError` when the workers die.
        """
        reason = self._why_not(pair)
        if reason is None and pair.trainer.full_parameter:
            reason = (
                "trainer and sampler are compared at start only: this server trains all parameters, and the model that "
                "would be compared is where the client's is"
            )
        if reason is not None:
            raise UnsupportedFeatureError(f"base model {self._spec.name!r}: {reason}")
        if self._running is None:
            self._running = asyncio.create_task(self._compare_unless_lost(pair))
            self._running.add_done_callback(self._end)
        running = self._running
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            if running.cancelled():
                raise WorkerLostError(f"base model {self._spec.name!r} has ended, and is not compared") from None
            raise

    def _end(self, task: asyncio.Task[AgreementReport]) -> None:
        self._running = None
        if not task.cancelled():
            task.exception()  # whoever asked may be gone

    async def _compare_unless_lost(self, pair: Pair) -> AgreementReport:
        """What was published in workers that died does not come back, so nothing may wait for it."""
        comparing = asyncio.create_task(self._compare(pair))
        lost = asyncio.create_task(pair.group.wait_lost())
        try:
            await asyncio.wait([comparing, lost], return_when=asyncio.FIRST_COMPLETED)
            if not comparing.done():
                raise WorkerLostError(f"{lost.result()}; the comparison of trainer and sampler is given up, ask again")
            return comparing.result()
        finally:
            comparing.cancel()
            lost.cancel()
            await asyncio.gather(comparing, lost, return_exceptions=True)

    async def _compare(self, pair: Pair) -> AgreementReport:
        findings = Findings(sides=self._sides, factor=self._factor)
        await compare(pair, findings)
        report = self.report = findings.report()
        name, figures = self._spec.name, summary_of(report)
        for note in report.notes:
            log.warning("base model %r: %s", name, note)
        if report.agrees:
            log.info("base model %r: trainer and sampler agree (max / mean / KL): %s", name, figures)
        else:
            log.error("base model %r: trainer and sampler disagree (max / mean / KL): %s", name, figures)
        return report

    def _why_not(self, pair: Pair) -> str | None:
        """Why trainer and sampler cannot be compared."""
        if self._factor == 0:
            return "trainer and sampler are not compared: --agreement-tolerance is 0"
        if not self._spec.trainable:
            return "trainer and sampler are not compared: it is served for sampling only"
        if LOSS not in pair.trainer.losses or OPTIMIZER not in pair.trainer.optimizers:
            return f"trainer and sampler are not compared: the trainer does not offer {LOSS} and {OPTIMIZER}"
        if pair.context_length < LEAST_CONTEXT:
            return f"trainer and sampler are not compared: {pair.context_length} tokens of context are too few"
        return None

    async def close(self) -> None:
        """Give up a comparison that runs."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait([self._running])
