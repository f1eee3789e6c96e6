"""One pass over data of several models: packed micro-passes, then an all-or-nothing commit per request."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Protocol

import attrs
import torch

from tinker_core.errors import NonFiniteError
from tinker_core.executors.rank_loop import describe_error
from tinker_core.training.adapters import AdapterGradient
from tinker_core.training.logprobs import HeadResult
from tinker_core.training.micro_batch import PackItem, PassLayout, PassRequest
from tinker_core.training.world import World
from tinker_core.types import ForwardBackwardOutput, ModelPassResult, RequestError, TensorData


class PassFailedError(Exception):
    """A pass broke; every row is as it was. Carries why, as told to clients."""

    def __init__(self, error: RequestError) -> None:
        super().__init__(error.message)
        self.error = error


class PassTally:
    """What a pass has added up so far in this rank."""

    def __init__(self, layout: PassLayout, device: torch.device) -> None:
        requests = layout.requests
        self.losses = torch.zeros(len(requests), dtype=torch.float64, device=device)
        self.logprobs = torch.zeros(layout.num_reported, dtype=torch.float32, device=device)
        self.metrics = [
            torch.zeros(len(request.loss.metrics), dtype=torch.float64, device=device) for request in requests
        ]
        """What each request's loss reported, in the order of its names."""
        self._places = [{name: place for place, name in enumerate(request.loss.metrics)} for request in requests]
        self.gradients: list[AdapterGradient | None] = [
            None if request.request.forward_only else request.state.new_gradient() for request in requests
        ]
        self.failure: Exception | None = None

    def add(self, items: Sequence[PackItem], result: HeadResult) -> None:
        """Take over the outcome of one micro-pass. Ranks that find the same: one of them only, but see `fail`."""
        self.losses += result.losses
        for owner, reports in result.reports:
            for name, value in reports.items():
                self.metrics[owner][self._places[owner][name]] += value
        for item, found in zip(items, result.logprobs, strict=True):
            if item.cells.reported is not None:
                found = found[torch.from_numpy(item.cells.reported).to(found.device)]
            self.logprobs[item.offset : item.offset + item.num_reported] = found

    def fail(self, failure: Exception | None) -> None:
        """Remember the first exception of loss code."""
        self.failure = self.failure or failure

    def reduce(self, world: World) -> None:
        """Add up over ranks; afterwards all of them hold the same numbers, and each its part of the gradients."""
        world.sum(self.losses)
        world.sum(self.logprobs)
        for metrics in self.metrics:
            if metrics.numel():
                world.sum(metrics)
        for gradient in self.gradients:
            if gradient is not None:
                world.sum_gradient(gradient)


class PackedModel(Protocol):
    """A base model, as passes run it."""

    def run(self, layout: PassLayout, tally: PassTally) -> Generator[None, None, None]:
        """Compute all micro-batches of a pass into a tally; yields where other work may take its turn.

        May end early when the tally has a failure and no other rank waits.
        """


@attrs.frozen(kw_only=True, eq=False)
class PassRunner:
    """Runs passes on a base model."""

    model: PackedModel
    world: World
    budget: int
    """Tokens of one micro-batch."""
    one_by_one: bool = False
    """Never pack several requests, so that the bits of a result depend on its own request only."""

    def run(self, requests: Sequence[PassRequest]) -> Generator[None, None, list[ModelPassResult]]:
        """One result per request, in order; yields between micro-passes.

        A pass of several requests that breaks is repeated one request at a time, so that only the guilty ones fail.
        """
        if not requests:
            return []
        if len(requests) == 1 or not self.one_by_one:
            try:
                return (yield from self._attempt(requests))
            except PassFailedError as failed:
                if len(requests) == 1:
                    return [ModelPassResult(request_id=requests[0].request.request_id, error=failed.error)]
        results: list[ModelPassResult] = []
        for request in requests:
            results += yield from self.run([request])
        return results

    def _attempt(self, requests: Sequence[PassRequest]) -> Generator[None, None, list[ModelPassResult]]:
        """Raises `PassFailedError`, in all ranks together, before anything is committed."""
        layout = PassLayout(requests, budget=self.budget, num_ranks=self.world.num_data_ranks)
        tally = PassTally(layout, self.world.device)
        try:
            yield from self.model.run(layout, tally)
        except Exception as error:
            if self.world.size > 1:
                raise  # outside loss code ranks can no longer be in step
            raise PassFailedError(describe_error(error)) from error
        self._agree(None if tally.failure is None else describe_error(tally.failure))
        tally.reduce(self.world)
        outputs = _outputs(layout, tally)
        broken = self._broken(tally)
        return [_commit(*found) for found in zip(layout.requests, tally.gradients, broken, outputs, strict=True)]

    def _agree(self, failure: RequestError | None) -> None:
        """Raise in all ranks if loss code failed in any."""
        text = None if failure is None else "\n".join((failure.category, failure.code, failure.message))
        text = self.world.first_text(text)
        if text is None:
            return
        category, code, message = text.split("\n", 2)
        raise PassFailedError(
            RequestError(category="user" if category == "user" else "server", code=code, message=message)
        )

    def _broken(self, tally: PassTally) -> list[str | None]:
        """What of each request is not finite, the same in all ranks."""
        losses = torch.isfinite(tally.losses).tolist()
        gradients = self.world.all_true([one is None or bool(torch.isfinite(one.row).all()) for one in tally.gradients])
        return [
            None if loss and gradient else "gradient" if loss else "loss"
            for loss, gradient in zip(losses, gradients, strict=True)
        ]


def _commit(
    request: PassRequest, gradient: AdapterGradient | None, broken: str | None, output: ForwardBackwardOutput
) -> ModelPassResult:
    request_id = request.request.request_id
    if broken is not None:
        error = NonFiniteError(
            f"the {broken} of this request is not finite; nothing was added to the model's gradient. "
            "Look for extreme advantages, weights or sampler logprobs, or a learning rate that is too high"
        )
        return ModelPassResult(request_id=request_id, error=describe_error(error))
    if gradient is not None:
        request.state.accumulate(gradient.row)
    return ModelPassResult(request_id=request_id, output=output)


def _outputs(layout: PassLayout, tally: PassTally) -> list[ForwardBackwardOutput]:
    logprobs = tally.logprobs.cpu().numpy()
    losses = tally.losses.tolist()
    records: list[list[dict[str, TensorData]]] = [[] for _ in layout.requests]
    for item in layout.items:
        values = logprobs[item.offset : item.offset + item.num_reported]
        records[item.owner].append({"logprobs": item.target.with_data(values)})
    return [
        ForwardBackwardOutput(
            loss_fn_outputs=tuple(records[i]), metrics={"loss:sum": losses[i], **_metrics(request, tally.metrics[i])}
        )
        for i, request in enumerate(layout.requests)
    ]


def _metrics(request: PassRequest, sums: torch.Tensor) -> dict[str, float]:
    """What the request's loss reported; a mean is over its data."""
    num_data = len(request.request.data)
    found = zip(request.loss.metrics, sums.tolist(), strict=True)
    return {name: value / num_data if name.endswith(":mean") else value for name, value in found}
