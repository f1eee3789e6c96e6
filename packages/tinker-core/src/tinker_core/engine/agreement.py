"""Do trainer and sampler compute the same model? Figures, how much they may be, and what to suspect beyond that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt

from tinker_core.lora_targets import ATTENTION_TARGETS, MLP_TARGETS, UNEMBED_TARGETS
from tinker_core.types import AgreementFigures, AgreementReport

Logprobs = npt.NDArray[np.floating[Any]]

BASE, ADAPTER, DECODE = "base", "adapter", "decode"
PARTS = {"attention": ATTENTION_TARGETS, "mlp": MLP_TARGETS, "unembed": UNEMBED_TARGETS}
"""The parts of an adapter, and what each changes."""

TOLERANCES = {
    # Both sides round each operation to 24 bits, in different orders: measured up to 1e-5 of a tiny model and up to
    # 1.4e-3 of one of 135M parameters under an adapter that changes it a lot, where single unlikely tokens stand out.
    "float32": AgreementFigures(max=1e-2, mean=1e-3, kl=1e-5),
    # Logits of 16 to 32 lie 0.125 apart in 8 bits, so that single unlikely tokens are far off by rounding alone;
    # measured of a model of 135M parameters: up to 0.4, 0.1 on average, KL 0.008. Means tell it from other weights.
    "bfloat16": AgreementFigures(max=2.0, mean=0.25, kl=0.05),
}
"""The most that trainer and sampler may differ, by the type of base weights and activations."""
_TELLING = {"float32": 0.1, "bfloat16": 1.0}
"""Nats that an adapter has to change logprobs by on average, for its loss to be far beyond the tolerance."""


def figures_of(trainer: Sequence[Logprobs], sampler: Sequence[Logprobs]) -> AgreementFigures:
    """Compare logprobs of the same tokens, each a list of ``[T]`` of which at least one is not empty."""
    ours, theirs = (np.concatenate(side).astype(np.float64) for side in (trainer, sampler))
    if not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        return AgreementFigures(max=np.inf, mean=np.inf, kl=np.inf)
    difference = ours - theirs
    with np.errstate(over="ignore"):  # to infinity, which is beyond any tolerance
        kl = float(np.mean(np.expm1(difference) - difference))
    size = np.abs(difference)
    return AgreementFigures(max=float(size.max()), mean=float(size.mean()), kl=kl)


def mean_change(before: Sequence[Logprobs], after: Sequence[Logprobs]) -> float:
    """By how much logprobs of the same tokens have changed on average, in nats."""
    return float(np.abs(np.concatenate(after) - np.concatenate(before)).mean())


@attrs.frozen(kw_only=True)
class Sides:
    """The two sides in words, for messages."""

    base_model: str
    path: str
    dtype: str
    trainer: str
    sampler: str
    flags: tuple[str, ...] = ()
    """Of the sampler, where they are not the defaults."""


@attrs.define(kw_only=True, eq=False)
class Findings:
    """What was measured so far, and what it is allowed to be."""

    sides: Sides
    factor: float
    figures: dict[str, AgreementFigures] = attrs.field(factory=dict)
    notes: list[str] = attrs.field(factory=list)

    @property
    def tolerance(self) -> AgreementFigures:
        """The most that each figure may be."""
        table = TOLERANCES[self.sides.dtype]
        return AgreementFigures(max=table.max * self.factor, mean=table.mean * self.factor, kl=table.kl * self.factor)

    @property
    def telling_change(self) -> float:
        """Nats that an adapter has to change logprobs by on average, so that it would be missed."""
        return _TELLING[self.sides.dtype]

    def note(self, compared: str, trainer: Sequence[Logprobs], sampler: Sequence[Logprobs]) -> bool:
        """Keep the figures of a comparison; whether they are within the tolerance."""
        self.figures[compared] = figures_of(trainer, sampler)
        return self.agrees(compared)

    def agrees(self, compared: str) -> bool:
        """Whether a comparison that was made is within the tolerance."""
        figures, tolerance = attrs.astuple(self.figures[compared]), attrs.astuple(self.tolerance)
        return all(figure <= bound for figure, bound in zip(figures, tolerance, strict=True))

    def report(self) -> AgreementReport:
        """The outcome."""
        return AgreementReport(
            base_model=self.sides.base_model,
            dtype=self.sides.dtype,
            figures=self.figures,
            tolerance=self.tolerance,
            suspect=self._suspect(),
            notes=tuple(self.notes),
        )

    def _suspect(self) -> str:
        wrong = next((name for name in (BASE, ADAPTER, DECODE) if name in self.figures and not self.agrees(name)), None)
        if wrong is None:
            return ""
        cause = {BASE: self._base, ADAPTER: self._adapter, DECODE: self._decode}[wrong]()
        return f"{_WHAT[wrong]} differ by {self._numbers(wrong)}. Suspect {cause}"

    def _numbers(self, compared: str) -> str:
        figures, bounds = self.figures[compared], self.tolerance
        return (
            f"up to {figures.max:.2g} nats (tolerance {bounds.max:.2g}), {figures.mean:.2g} on average "
            f"({bounds.mean:.2g}), KL {figures.kl:.2g} ({bounds.kl:.2g}) in {self.sides.dtype}"
        )

    def _base(self) -> str:
        sides = self.sides
        flags = f", unless {', '.join(sides.flags)} says otherwise" if sides.flags else ""
        return (
            f"the base model: its files, their dtype, or how it is implemented. The trainer {sides.trainer!r} reads "
            f"{sides.path} as {sides.dtype}, and so should the sampler {sides.sampler!r}{flags}: see that both have "
            "the same files and dtype"
        )

    def _adapter(self) -> str:
        tried = [part for part in PARTS if part in self.figures]
        wrong = [part for part in tried if not self.agrees(part)]
        way = f"the way of adapters from the trainer {self.sides.trainer!r} to the sampler {self.sides.sampler!r}"
        base = "the bare base model agrees" if BASE in self.figures else "the bare base model was not compared"
        if wrong and wrong == tried:
            return f"{way}, in all their parts ({', '.join(wrong)}), such as their scale alpha / rank: {base}"
        if wrong:
            return f"{way}, in their part {' and '.join(wrong)}: {base}, and so do the other parts alone"
        return f"{way}: {base}, and so does each part of an adapter alone, but not all together"

    def _decode(self) -> str:
        what = "decoding: the KV cache, batching, or sampling from other weights than those that were asked for"
        if BASE in self.figures:
            return f"{what}; given tokens agree"
        return (
            f"{what}; or the base model's files, dtype or adapters: this sampler gives no logprobs of given tokens, "
            "which would tell them apart"
        )


_WHAT = {
    BASE: "logprobs of given tokens under the bare base model",
    ADAPTER: "logprobs of given tokens under a trained adapter",
    DECODE: "logprobs of sampled tokens",
}


def message_of(report: AgreementReport) -> str:
    """Why a server does not become ready, and what its operator can do."""
    return (
        f"trainer and sampler of base model {report.base_model!r} disagree: {report.suspect}. "
        "--agreement-tolerance FACTOR allows more, and 0 does not compare"
    )


def summary_of(report: AgreementReport) -> str:
    """The figures in one line, for the log."""
    each = (f"{name} {item.max:.2g} / {item.mean:.2g} / {item.kl:.2g}" for name, item in report.figures.items())
    return ", ".join(each)
