"""One pass over data of several models: packed micro-passes, then an all-or-nothing commit per request."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import attrs
import torch

from tinker_backend_fsdp.micro_batch import MicroBatch, PackItem, PassLayout, PassRequest
from tinker_backend_fsdp.root import CausalRoot
from tinker_backend_fsdp.world import World
from tinker_core.errors import NonFiniteError
from tinker_core.executors.rank_loop import describe_error
from tinker_core.training.adapters import AdapterGradient
from tinker_core.training.logprobs import HeadResult, LossHead
from tinker_core.types import ForwardBackwardOutput, ModelPassResult, RequestError, TensorData


class PassFailedError(Exception):
    """A pass broke; every row is as it was. Carries why, as told to clients."""

    def __init__(self, error: RequestError) -> None:
        super().__init__(error.message)
        self.error = error


class _Tally:
    """What a pass has added up so far in this rank."""

    def __init__(self, layout: PassLayout, device: torch.device) -> None:
        requests = layout.requests
        self.losses = torch.zeros(len(requests), dtype=torch.float64, device=device)
        self.logprobs = torch.zeros(layout.num_reported, dtype=torch.float32, device=device)
        self.gradients: list[AdapterGradient | None] = []
        self.metrics = [
            torch.zeros(len(request.loss.metrics), dtype=torch.float64, device=device) for request in requests
        ]
        """What each request's loss reported, in the order of its names."""
        self._places = [{name: place for place, name in enumerate(request.loss.metrics)} for request in requests]
        for request in requests:
            state = request.state
            row = None if request.request.forward_only else torch.zeros_like(state.row)
            self.gradients.append(None if row is None else AdapterGradient(state.layout, row))
        self.failure: Exception | None = None

    def add(self, items: Sequence[PackItem], result: HeadResult) -> None:
        """Take over the outcome of one micro-pass."""
        self.failure = self.failure or result.failure
        self.losses += result.losses
        for owner, reports in result.reports:
            for name, value in reports.items():
                self.metrics[owner][self._places[owner][name]] += value
        for item, found in zip(items, result.logprobs, strict=True):
            if item.cells.reported is not None:
                found = found[torch.from_numpy(item.cells.reported).to(found.device)]
            self.logprobs[item.offset : item.offset + item.num_reported] = found

    def reduce(self, world: World) -> None:
        """Add up over ranks; afterwards all of them hold the same numbers."""
        world.sum(self.losses)
        world.sum(self.logprobs)
        for metrics in self.metrics:
            if metrics.numel():
                world.sum(metrics)
        for gradient in self.gradients:
            if gradient is not None:
                world.sum(gradient.row)


@attrs.frozen(kw_only=True, eq=False)
class PassRunner:
    """Runs passes on a base model."""

    root: CausalRoot
    world: World
    budget: int
    """Tokens of one micro-batch."""
    one_by_one: bool = False
    """Never pack several requests, so that the bits of a result depend on its own request only."""

    def run(self, requests: Sequence[PassRequest]) -> Generator[None, None, list[ModelPassResult]]:
        """One result per request, in order; yields after each micro-pass.

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
        layout = PassLayout(requests, budget=self.budget, num_ranks=self.world.size)
        tally = _Tally(layout, self.world.device)
        for bins in layout.passes:
            self._guarded_micro_pass(layout, bins, tally)
            yield
        failure = None if tally.failure is None else describe_error(tally.failure)
        self._agree(failure)
        tally.reduce(self.world)
        outputs = _outputs(layout, tally)
        return [self._commit(layout.requests[i], tally, i, outputs[i]) for i in range(len(requests))]

    def _guarded_micro_pass(self, layout: PassLayout, bins: list[list[int]], tally: _Tally) -> None:
        try:
            self._micro_pass(layout, bins, tally)
        except Exception as error:
            if self.world.size > 1:
                raise  # outside loss code ranks can no longer be in step
            raise PassFailedError(describe_error(error)) from error
        if tally.failure is not None and self.world.size == 1:
            raise PassFailedError(describe_error(tally.failure)) from tally.failure

    def _micro_pass(self, layout: PassLayout, bins: list[list[int]], tally: _Tally) -> None:
        batch = layout.micro_batch(bins[self.world.rank], tally.gradients, self.world.device)
        head = LossHead(batch.head_data, batch.segments, num_owners=len(layout.requests))
        with_gradient = layout.needs_gradient(bins)
        with torch.set_grad_enabled(with_gradient):
            hidden, result = self._forward(batch, head)
        if with_gradient:
            grad_hidden = torch.zeros_like(hidden) if result.grad_hidden is None else result.grad_hidden
            torch.autograd.backward(hidden, grad_hidden)
        tally.add(batch.items, result)

    def _forward(self, batch: MicroBatch, head: LossHead) -> tuple[torch.Tensor, HeadResult]:
        outcome: tuple[torch.Tensor, HeadResult] = self.root(
            batch.input_ids, batch.position_ids, batch.plan, batch.segments, head
        )
        return outcome

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

    def _commit(
        self, request: PassRequest, tally: _Tally, index: int, output: ForwardBackwardOutput
    ) -> ModelPassResult:
        request_id = request.request.request_id
        gradient = tally.gradients[index]
        broken = None
        if not bool(torch.isfinite(tally.losses[index])):
            broken = "loss"
        elif gradient is not None and not bool(torch.isfinite(gradient.row).all()):
            broken = "gradient"
        if broken is not None:
            error = NonFiniteError(
                f"the {broken} of this request is not finite; nothing was added to the model's gradient. "
                "Look for extreme advantages, weights or sampler logprobs, or a learning rate that is too high"
            )
            return ModelPassResult(request_id=request_id, error=describe_error(error))
        if gradient is not None:
            request.state.accumulate(gradient.row)
        return ModelPassResult(request_id=request_id, output=output)


def _outputs(layout: PassLayout, tally: _Tally) -> list[ForwardBackwardOutput]:
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
