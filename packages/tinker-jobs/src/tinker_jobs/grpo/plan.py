"""Which prompts are asked when. Everything follows from the dataset and the settings, so that a job can go on."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from tinker_jobs.grpo.groups import Asked
from tinker_jobs.rl.prompt_rows import Prompt


class PromptPlan:
    """The prompts in a seeded order, shuffled anew for each epoch; each is trained on exactly once per epoch.

    Async modes train on prompts in the order in which their answers come, so that which ones are done is more than a
    number: `state` says it, and a plan with that state goes on with the others.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        *,
        num_prompts: int,
        epochs: int,
        seed: int = 0,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        """``num_prompts`` is that of a step."""
        self._prompts = prompts
        self._num_prompts = num_prompts
        self._seed = seed
        self._num_positions = len(prompts) * epochs
        self._orders: dict[int, list[int]] = {}
        self._trained: set[int] = set()
        if state is not None:
            self._trained = set(range(state["next_position"])) - set(state["left_behind"])
        done_before = frozenset(self._trained)
        self._ahead = (position for position in range(self._num_positions) if position not in done_before)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return math.ceil(self._num_positions / self._num_prompts)

    def size_of(self, step: int) -> int:
        """Prompts of a step, from 1; the last one may have fewer."""
        return min(self._num_prompts, self._num_positions - (step - 1) * self._num_prompts)

    def take(self, count: int | None = None) -> list[Asked]:
        """The next prompts; all that are left for None."""
        return [Asked(position=position, prompt=self._prompt_at(position)) for position in islice(self._ahead, count)]

    def finish(self, asked: Iterable[Asked]) -> None:
        """Note that prompts have been trained on."""
        self._trained.update(one.position for one in asked)

    @property
    def state(self) -> dict[str, Any]:
        """What has been trained on: all before a position, without those that were overtaken."""
        following = max(self._trained, default=-1) + 1
        return {
            "next_position": following,
            "left_behind": [position for position in range(following) if position not in self._trained],
        }

    def _prompt_at(self, position: int) -> Prompt:
        epoch, place = divmod(position, len(self._prompts))
        if epoch not in self._orders:
            order = list(range(len(self._prompts)))
            random.Random(f"{self._seed}/{epoch}").shuffle(order)
            self._orders[epoch] = order
        return self._prompts[self._orders[epoch][place]]
