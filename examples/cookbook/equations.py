"""A task for reinforcement learning that a small model learns in a few steps.

Asked for a sum and told to reply with only the number, it is to write out the equation: 1 for a reply with "=", else 0.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial

import chz
from running import RENDERER
from tinker_cookbook import renderers
from tinker_cookbook.rl.problem_env import ProblemEnv, ProblemGroupBuilder
from tinker_cookbook.rl.types import EnvGroupBuilder, RLDataset, RLDatasetBuilder
from tinker_cookbook.tokenizer_utils import get_tokenizer

GROUPS = 4
GROUP_SIZE = 6
SYSTEM: renderers.Message = {"role": "system", "content": "Reply with only the number."}


class EquationEnv(ProblemEnv):
    """One question."""

    def __init__(self, question: str, renderer: renderers.Renderer) -> None:
        super().__init__(renderer, [SYSTEM], format_coef=0.0)
        self.question = question

    def get_question(self) -> str:
        """The sum."""
        return self.question

    def check_answer(self, sample_str: str) -> bool:
        """Whether the reply is rewarded."""
        return "=" in sample_str

    def check_format(self, sample_str: str) -> bool:
        """Any format will do."""
        return True

    def get_reference_answer(self) -> str:
        """Shown in the trainer's log."""
        return "anything with ="


class EquationDataset(RLDataset):
    """Batches of ``GROUPS`` questions, each asked ``GROUP_SIZE`` times; the same ones in every run."""

    def __init__(self, renderer: renderers.Renderer, num_batches: int) -> None:
        self.renderer = renderer
        self.num_batches = num_batches

    def get_batch(self, index: int) -> Sequence[EnvGroupBuilder]:
        """The questions of one step."""
        rng = random.Random(index)
        questions = [f"What is {rng.randint(10, 99)} + {rng.randint(10, 99)}?" for _ in range(GROUPS)]
        return [
            ProblemGroupBuilder(partial(EquationEnv, question, self.renderer), GROUP_SIZE, dataset_name="equations")
            for question in questions
        ]

    def __len__(self) -> int:
        return self.num_batches


@chz.chz
class EquationDatasetBuilder(RLDatasetBuilder):
    """Builds the dataset with the model's own tokenizer."""

    model: str
    num_batches: int

    async def __call__(self) -> tuple[RLDataset, None]:
        """The training set, and no test set."""
        renderer = renderers.get_renderer(RENDERER, get_tokenizer(self.model))
        return EquationDataset(renderer, self.num_batches), None
