"""Which results are given up when there are too many to keep until their clients come back."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from itertools import chain

import attrs

from tinker_core.types import EngineOutput, ForwardBackwardOutput, RequestError, SampleOutput, TensorData

_BASE_BYTES = 2048
"""What a request and its result take besides their numbers."""
_BYTES_PER_TOKEN = 80
"""A sampled token and its log-probability, as Python objects in tuples."""


def size_of(output: EngineOutput) -> int:
    """About how many bytes a result takes in memory."""
    if isinstance(output, ForwardBackwardOutput):
        return _BASE_BYTES + sum(_tensor(tensor) for fields in output.loss_fn_outputs for tensor in fields.values())
    if isinstance(output, SampleOutput):
        tokens = sum(len(sequence.tokens) for sequence in output.sequences)
        tops = [output.topk_prompt_logprobs, *(sequence.topk_logprobs for sequence in output.sequences)]
        tensors = [tensor for top in tops if top is not None for tensor in (top.token_ids, top.logprobs)]
        if output.prompt_alt_tokens is not None:
            tensors += [output.prompt_alt_tokens.tokens, output.prompt_alt_tokens.logprobs]
        tensors += [item for item in (output.prompt_logprobs, output.target_prompt_logprobs) if item is not None]
        return _BASE_BYTES + _BYTES_PER_TOKEN * tokens + sum(map(_tensor, tensors))
    return _BASE_BYTES + (len(output.message) if isinstance(output, RequestError) else 0)


def _tensor(tensor: TensorData) -> int:
    indices = 0 if tensor.col_indices is None else tensor.col_indices.nbytes
    return 512 + tensor.data.nbytes + indices


@attrs.define(eq=False)
class _Shelf:
    """One owner's results, oldest first: those that were fetched, and those that were not."""

    fetched: OrderedDict[str, int] = attrs.field(factory=OrderedDict)
    waiting: OrderedDict[str, int] = attrs.field(factory=OrderedDict)
    size: int = 0


class Retention:
    """Counts the bytes of kept results. Whoever keeps most loses results first, fetched ones before others."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._shelves: dict[str, _Shelf] = {}
        self._owners: dict[str, str] = {}
        self.size = 0
        """About how many bytes all results take."""

    def add(self, request_id: str, owner: str, output: EngineOutput) -> None:
        """A request has its result."""
        size = size_of(output)
        shelf = self._shelves.setdefault(owner, _Shelf())
        shelf.waiting[request_id] = size
        shelf.size += size
        self.size += size
        self._owners[request_id] = owner

    def mark_fetched(self, request_id: str) -> None:
        """Its client has had the result once."""
        shelf = self._shelves[self._owners[request_id]]
        shelf.fetched[request_id] = shelf.waiting.pop(request_id)

    def remove(self, request_id: str) -> None:
        """The result is no longer kept, for whatever reason."""
        owner = self._owners.pop(request_id, None)
        if owner is None:
            return  # it never had one
        shelf = self._shelves[owner]
        size = shelf.fetched.pop(request_id, None)
        size = shelf.waiting.pop(request_id) if size is None else size
        shelf.size -= size
        self.size -= size
        if shelf.size == 0:
            del self._shelves[owner]

    def excess(self, newest: str) -> Iterator[str]:
        """What to give up, one after the other, until the rest is within bounds; the caller removes each.

        The newest result is never given up: its client would ask for it again, and again in vain.
        """
        while self.size > self._max_bytes:
            shelves = sorted(self._shelves.values(), key=lambda shelf: -shelf.size)
            ids = (request_id for shelf in shelves for request_id in chain(shelf.fetched, shelf.waiting))
            oldest = next((request_id for request_id in ids if request_id != newest), None)
            if oldest is None:
                return
            yield oldest
