"""distillation/sdft.py: a model teaches itself; as the teacher it has the answer before its eyes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial

from corpus import BATCH_SIZE, chat_dataset, training_pairs
from running import RENDERER, Run, falls
from tinker_cookbook import renderers
from tinker_cookbook.distillation import sdft
from tinker_cookbook.distillation.datasets import PromptOnlyEnv
from tinker_cookbook.rl.problem_env import ProblemGroupBuilder
from tinker_cookbook.rl.types import EnvGroupBuilder
from tinker_cookbook.supervised.nll_evaluator import SamplerNLLEvaluator
from tinker_cookbook.tokenizer_utils import get_tokenizer

STEPS = 6
DEMONSTRATION = "{question}\n\nThe right answer is: {golden_answer}\n\nRepeat the right answer, word for word."


class Demonstrations:
    """Questions for the student, with the answers that the teacher is shown. The same batch at every step."""

    def __init__(self, renderer: renderers.Renderer) -> None:
        self.renderer = renderer

    def get_batch(self, index: int) -> tuple[Sequence[EnvGroupBuilder], list[str], list[str]]:
        """Environments, questions and golden answers."""
        questions, answers = zip(*training_pairs()[:BATCH_SIZE], strict=True)
        builders = [ProblemGroupBuilder(partial(PromptOnlyEnv, question, self.renderer), 1) for question in questions]
        return builders, list(questions), list(answers)

    def __len__(self) -> int:
        return STEPS + 1


def train_on(run: Run, name: str, **settings: object) -> tuple[float, float]:
    """Loss per token of the demonstrated answers, which the student never sees, before and after."""
    demonstrated = chat_dataset(run.model, training_pairs()[:BATCH_SIZE])
    config = sdft.Config(
        model_name=run.model,
        recipe_name="sdft",
        renderer_name=RENDERER,
        lora_rank=16,
        learning_rate=2e-3,
        max_tokens=16,
        topk=20,
        demo_template=DEMONSTRATION,
        save_every=0,
        # Evaluations precede the step that they are logged with, so the last one sees the weights after STEPS steps.
        eval_every=STEPS,
        max_steps=STEPS + 1,
        log_path=run.log_path(name),
        evaluator_builders=[lambda: SamplerNLLEvaluator.from_dataset(demonstrated, name="demonstrated")],
        **settings,
    )
    student = Demonstrations(renderers.get_renderer(RENDERER, get_tokenizer(run.model)))
    asyncio.run(sdft.main(config, student))
    before, after = run.series("test/demonstrated/nll", name)
    return before, after


def main() -> None:
    run = Run.start(__doc__)
    forward = train_on(run, "forward")
    reverse = train_on(run, "reverse", reverse=True)
    run.finish(
        falls("forward KL: loss per token of the demonstrated answers", *forward, by=0.5),
        falls("reverse KL: the same", *reverse, by=0.5),
        recipe="distillation/sdft.py",
        runs="forward KL: cross_entropy on [T, 20] targets; reverse KL: forward_backward_custom on [T, 20]",
    )


if __name__ == "__main__":
    main()
