"""Seeded requests on CPUs whose prompts do not fit into one step.

A step that computes only a part of a prompt draws a token all the same, throws it away and winds the request's
generator back. vLLM 0.32 does that in a way that generators on CPUs do not know, and dies. Here the state from before
the draw is put back, so that what a seed draws does not depend on how a prompt was cut.
"""

from __future__ import annotations

from typing import Any

import torch


def install(runner: Any) -> None:  # noqa: ANN401 - vLLM's model runner is not typed
    """Mend one model runner."""
    sample, keep_books = runner._sample, runner._bookkeeping_sync

    def sample_and_wind_back(*args: Any, **fields: Any) -> Any:  # noqa: ANN401
        states = [(generator, generator.get_state()) for generator in _split(runner)[0].values()]
        output = sample(*args, **fields)
        for generator, state in states:
            generator.set_state(state)
        return output

    def keep_books_of_the_rest(*args: Any, **fields: Any) -> Any:  # noqa: ANN401
        batch = runner.input_batch
        generators = batch.generators
        batch.generators = _split(runner)[1]
        try:
            return keep_books(*args, **fields)
        finally:
            batch.generators = generators

    runner._sample, runner._bookkeeping_sync = sample_and_wind_back, keep_books_of_the_rest


def _split(runner: Any) -> tuple[dict[int, torch.Generator], dict[int, torch.Generator]]:  # noqa: ANN401
    """The generators by row of those whose prompts are not complete, and of the others."""
    batch = runner.input_batch
    incomplete = runner.discard_request_mask.np[: batch.num_reqs]
    parts: tuple[dict[int, torch.Generator], dict[int, torch.Generator]] = {}, {}
    for row, generator in batch.generators.items():
        parts[0 if row < batch.num_reqs and incomplete[row] else 1][row] = generator
    return parts
