"""Target logprobs and losses over packed hidden states, a chunk of positions at a time.

Logits of all tokens never exist at once.  A per-token loss turns each chunk's logits into the gradient of its hidden
states while they are there (two matrix products per token); any other loss sees all logprobs of its datum first, and
the logits of its tokens are computed a second time.  Positions whose gradient is exactly zero cost no backward product.

Gradients of a LoRA on the base projection go to each segment's own row, those of the projection itself, unless it is
frozen, to its own.  Ranks that share the vocabulary compute a part of the logits each and run the same loss code on the
same logprobs; the gradient of the hidden states is then a part too, to be added up over them.

Shapes: T packed tokens, N target cells, n rows of a chunk, v vocabulary (of this rank), H hidden size.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from typing import Protocol

import attrs
import torch

from tinker_core.interfaces import LossPlugin
from tinker_core.training.adapters import Segment
from tinker_core.training.cells import TARGETS
from tinker_core.training.lora import add_lora_gradient
from tinker_core.training.vocabulary import Vocabulary

_CHUNK_BYTES = {"cpu": 2**25, "cuda": 2**29}
"""Size of one chunk of float32 logits: small enough for caches and laptops, large enough to keep a GPU busy."""


class Projection(Protocol):
    """The output projection of a model, or this rank's rows of it; valid while its root's forward runs."""

    @property
    def weight(self) -> torch.Tensor:
        """``[v, H]``."""

    @property
    def weight_gradient(self) -> torch.Tensor | None:
        """Where the gradient of the weight itself is added, float32 ``[v, H]``; None while it is frozen."""

    @property
    def name(self) -> str:
        """Key of its LoRA views."""

    @property
    def vocabulary(self) -> Vocabulary:
        """The tokens of its rows."""

    def partial_logits(self, hidden_NH: torch.Tensor, segments_N: tuple[Segment, ...]) -> torch.Tensor:
        """``[n, v]`` in compute type, LoRA included, without autograd."""


class CellContext:
    """Implements `tinker_core.interfaces.LossContext` over tensors of a datum or of a part of it."""

    def __init__(
        self,
        config: Mapping[str, float | str],
        inputs: Mapping[str, torch.Tensor],
        reports: dict[str, float | torch.Tensor] | None = None,
    ) -> None:
        self.config = config
        self.reports: dict[str, float | torch.Tensor] = {} if reports is None else reports
        """What the loss has reported about the datum so far; it may add to the metrics that are in here."""
        self._inputs = inputs

    def input(self, name: str) -> torch.Tensor:
        """A loss input ``[N]``."""
        return self._inputs[name]

    def has_input(self, name: str) -> bool:
        """Whether the datum carries it."""
        return name in self._inputs

    def report(self, name: str, value: float | torch.Tensor) -> None:
        """Add to a metric of the loss."""
        if name not in self.reports:
            raise ValueError(f"the loss reports {name!r}, which is not one of its metrics")
        self.reports[name] += value.detach().double() if isinstance(value, torch.Tensor) else value

    def part(self, start: int, end: int) -> CellContext:
        """The context of cells ``start..end``."""
        inputs = {name: tensor[start:end] for name, tensor in self._inputs.items()}
        return CellContext(self.config, inputs, self.reports)


@attrs.frozen(kw_only=True, eq=False)
class HeadDatum:
    """One datum of a pack, as the head needs it."""

    owner: int
    """Index of its request; losses are summed by it."""
    positions: torch.Tensor
    """Row of each cell in the pack, int64 ``[N]``, rising."""
    inputs: Mapping[str, torch.Tensor]
    """Loss inputs ``[N]``; a loss that is not per token may have others of any shape beside them."""
    loss: LossPlugin
    config: Mapping[str, float | str]
    needs_gradient: bool


@attrs.define(kw_only=True, eq=False)
class HeadResult:
    """What the head found."""

    logprobs: list[torch.Tensor]
    """Float32 ``[N]`` per datum."""
    losses: torch.Tensor
    """Float64, one sum per owner."""
    grad_hidden: torch.Tensor | None
    """``[T, H]`` in compute type: the gradient of all losses; None when no datum needs one."""
    reports: list[tuple[int, Mapping[str, float | torch.Tensor]]] = attrs.field(factory=list)
    """(owner, metrics of its loss), an entry per datum whose loss has any."""
    failure: Exception | None = None
    """The first exception of loss code. The gradient is then incomplete and of no use."""


class LossHead:
    """Computes logprobs, losses and the gradient of packed hidden states; runs once, inside the root's forward."""

    def __init__(
        self,
        data: Sequence[HeadDatum],
        segments: tuple[Segment, ...],
        *,
        num_owners: int,
        chunk_rows: int | None = None,
    ) -> None:
        self._data = data
        self._segments = segments
        self._num_owners = num_owners
        self._chunk_rows = chunk_rows
        self._counts = [int(datum.positions.numel()) for datum in data]
        self._starts = [0]
        for count in self._counts:
            self._starts.append(self._starts[-1] + count)

    @torch.no_grad()
    def __call__(self, hidden_TH: torch.Tensor, projection: Projection) -> tuple[torch.Tensor, HeadResult]:
        """Hidden states as they came, and the result."""
        device = hidden_TH.device
        wants_gradient = any(datum.needs_gradient for datum in self._data)
        result = HeadResult(
            logprobs=[],
            losses=torch.zeros(self._num_owners, dtype=torch.float64, device=device),
            grad_hidden=torch.zeros_like(hidden_TH) if wants_gradient else None,
        )
        if self._starts[-1] > 0:
            run = _Run(self, hidden_TH.detach(), projection, result)
            run.all_chunks()
            run.whole_datum_losses()
            result.reports = [
                (datum.owner, context.reports)
                for datum, context in zip(self._data, run.contexts, strict=True)
                if context.reports
            ]
            result.logprobs = list(torch.split(run.logprobs, self._counts))
        else:
            result.logprobs = [torch.zeros(0, device=device) for _ in self._data]
        return hidden_TH, result


class _Run:
    """One call of a `LossHead`."""

    def __init__(self, head: LossHead, hidden: torch.Tensor, projection: Projection, result: HeadResult) -> None:
        self.data, self.starts, self.segments = head._data, head._starts, head._segments
        self.hidden, self.projection, self.result = hidden, projection, result
        self.rows = torch.cat([datum.positions for datum in self.data])
        self.targets = torch.cat([datum.inputs[TARGETS] for datum in self.data])
        self.logprobs = torch.empty(self.rows.numel(), dtype=torch.float32, device=hidden.device)
        self.normalizers = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        self.contexts = [
            CellContext(datum.config, datum.inputs, dict.fromkeys(datum.loss.metrics, 0.0)) for datum in self.data
        ]
        self.done = [False] * len(self.data)
        """Which losses of whole data were computed together with the logits."""
        limit = _CHUNK_BYTES.get(hidden.device.type, _CHUNK_BYTES["cpu"])
        self.vocabulary = projection.vocabulary
        self.chunk = head._chunk_rows or max(1, limit // (4 * self.vocabulary.width))

    def all_chunks(self) -> None:
        """Logprobs of all cells, and the gradient of per-token losses."""
        bounds = [*range(0, self.hidden.shape[0], self.chunk), self.hidden.shape[0]]
        cell_bounds = torch.searchsorted(self.rows, torch.tensor(bounds, device=self.rows.device)).tolist()
        for index in range(len(bounds) - 1):
            (start, end), (low, high) = bounds[index : index + 2], cell_bounds[index : index + 2]
            if low == high:
                continue
            logits = self._logits(start, end)
            rows, targets = self.rows[low:high], self.targets[low:high]
            self.normalizers[start:end], found = self.vocabulary.normalize(logits, rows - start, targets)
            self.logprobs[low:high] = found - self.normalizers[rows]
            slopes = self._slopes_of_chunk(low, high)
            if slopes is not None:
                self._backward(logits, start, rows, targets, slopes)

    def _logits(self, start: int, end: int) -> torch.Tensor:
        logits = self.projection.partial_logits(self.hidden[start:end], clip_segments(self.segments, start, end))
        return logits.float()

    def _slopes_of_chunk(self, low: int, high: int) -> torch.Tensor | None:
        """dLoss/dlogprob of the cells ``low..high`` as far as they alone tell it; None when nothing of it is wanted."""
        slopes: torch.Tensor | None = None
        index = bisect.bisect_right(self.starts, low) - 1
        while index < len(self.data) and self.starts[index] < high:
            datum, first, last = self.data[index], self.starts[index], self.starts[index + 1]
            start, end = max(low, first), min(high, last)
            whole = datum.loss.reuses_logits and low <= first and last <= high
            if (datum.loss.per_token or whole) and start < end:
                part = self.contexts[index] if whole else self.contexts[index].part(start - first, end - first)
                slope = self._loss(datum, self.logprobs[start:end], part)
                self.done[index] = whole
                if slope is not None:
                    if slopes is None:
                        slopes = torch.zeros(high - low, dtype=torch.float32, device=self.rows.device)
                    slopes[start - low : end - low] = slope
            index += 1
        return slopes

    def _loss(self, datum: HeadDatum, logprobs: torch.Tensor, context: CellContext) -> torch.Tensor | None:
        """Add one loss value to its owner's sum; returns its slope, or None when no gradient is wanted."""
        if self.result.failure is not None:
            return None
        try:
            value, slope = evaluate_loss(datum.loss, logprobs, context, needs_gradient=datum.needs_gradient)
        except (
            Exception
        ) as error:  # becomes the request's error; in a larger world the other ranks must not be left waiting
            self.result.failure = error
            return None
        self.result.losses[datum.owner] += value
        return slope

    def whole_datum_losses(self) -> None:
        """Losses that look at a datum as a whole, once all logprobs are known."""
        for index, datum in enumerate(self.data):
            low, high = self.starts[index], self.starts[index + 1]
            if datum.loss.per_token or self.done[index] or low == high:
                continue
            slope = self._loss(datum, self.logprobs[low:high], self.contexts[index])
            if slope is not None:
                self._backward_again(low, high, slope)

    def _backward_again(self, low: int, high: int, slope: torch.Tensor) -> None:
        rows, targets = self.rows[low:high], self.targets[low:high]
        first, last = int(rows[0]), int(rows[-1]) + 1
        bounds = [*range(first, last, self.chunk), last]
        cells = torch.searchsorted(rows, torch.tensor(bounds, device=rows.device)).tolist()
        for index in range(len(bounds) - 1):
            a, b = cells[index : index + 2]
            if a < b:
                logits = self._logits(bounds[index], bounds[index + 1])
                self._backward(logits, bounds[index], rows[a:b], targets[a:b], slope[a:b])

    def _backward(
        self, logits: torch.Tensor, start: int, rows: torch.Tensor, targets: torch.Tensor, slopes: torch.Tensor
    ) -> None:
        """Add the gradient of a chunk that begins at row ``start``; overwrites ``logits``."""
        grad_hidden = self.result.grad_hidden
        assert grad_hidden is not None
        active = torch.unique(rows[slopes != 0])
        if active.numel() == 0:
            return
        end = start + logits.shape[0]
        everything = active.numel() == logits.shape[0]
        if everything:
            segments, hidden = clip_segments(self.segments, start, end), self.hidden[start:end]
        else:
            logits = logits[active - start]
            kept = slopes != 0
            rows, targets, slopes = rows[kept], targets[kept], slopes[kept]
            segments, hidden = select_segments(self.segments, active), self.hidden[active]
        places = torch.searchsorted(active, rows)
        totals = torch.zeros(logits.shape[0], device=logits.device).index_add_(0, places, slopes)
        grad_logits = logits.sub_(self.normalizers[active][:, None]).exp_().mul_(-totals[:, None])
        self.vocabulary.add_targets(grad_logits, places, targets, slopes)
        grad_logits = grad_logits.to(hidden.dtype)
        if self.projection.weight_gradient is not None:
            self.projection.weight_gradient.add_(grad_logits.t() @ hidden)
        grad = grad_logits @ self.projection.weight
        downs = [_down(segment, self.projection.name, hidden) for segment in segments]
        add_lora_gradient(grad_logits, hidden, grad, self.projection.name, segments, downs)
        if everything:
            grad_hidden[start:end] += grad
        else:
            grad_hidden.index_add_(0, active, grad)


def evaluate_loss(
    loss: LossPlugin, logprobs: torch.Tensor, context: CellContext, *, needs_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A loss and, if wanted, its slope ``[N]``; raises whatever the loss code raises, forward or backward."""
    if not needs_gradient:
        return loss.compute(logprobs, context).double(), None
    if loss.evaluate is not None:
        value, slope = loss.evaluate(logprobs, context)
        return value.double(), slope
    with torch.enable_grad():
        leaf = logprobs.detach().requires_grad_()
        value = loss.compute(leaf, context)
    if not value.requires_grad:
        return value.double(), torch.zeros_like(logprobs)
    (slope,) = torch.autograd.grad(value, leaf)
    return value.detach().double(), slope


def clip_segments(segments: tuple[Segment, ...], start: int, end: int) -> tuple[Segment, ...]:
    """The parts of segments inside rows ``start..end``, counted from ``start``."""
    return tuple(
        attrs.evolve(segment, start=max(segment.start, start) - start, end=min(segment.end, end) - start)
        for segment in segments
        if segment.start < end and segment.end > start
    )


def select_segments(segments: tuple[Segment, ...], rows: torch.Tensor) -> tuple[Segment, ...]:
    """Segments over a selection of rows, given in rising order."""
    edges = torch.tensor([edge for segment in segments for edge in (segment.start, segment.end)], device=rows.device)
    places = torch.searchsorted(rows, edges).tolist()
    return tuple(
        attrs.evolve(segment, start=start, end=end)
        for segment, start, end in zip(segments, places[::2], places[1::2], strict=True)
        if start < end
    )


def _down(segment: Segment, name: str, hidden: torch.Tensor) -> torch.Tensor | None:
    if segment.weights is None or name not in segment.weights.views:
        return None
    return hidden[segment.start : segment.end] @ segment.weights.views[name][0].t()
