"""distillation/train_on_policy.py: the base model's own replies are scored by a teacher, a fine-tuned copy of it."""

from __future__ import annotations

import asyncio

import chz
from corpus import training_pairs
from running import RENDERER, Run, falls
from tinker_cookbook import renderers
from tinker_cookbook.distillation import train_on_policy
from tinker_cookbook.distillation.datasets import DistillationDatasetConfig, PromptOnlyDataset, TeacherConfig
from tinker_cookbook.rl.types import RLDataset, RLDatasetBuilder
from tinker_cookbook.tokenizer_utils import get_tokenizer

STEPS = 8
GROUPS = 8


@chz.chz
class Questions(RLDatasetBuilder):
    """The corpus' questions, without their answers."""

    model: str

    async def __call__(self) -> tuple[RLDataset, None]:
        """The training set, and no test set."""
        tokenizer = get_tokenizer(self.model)
        dataset = PromptOnlyDataset(
            prompts=[question for question, _ in training_pairs()],
            batch_size=GROUPS,
            group_size=2,
            renderer=renderers.get_renderer(RENDERER, tokenizer),
            tokenizer=tokenizer,
            dataset_name="questions",
        )
        return dataset, None


def main() -> None:
    run = Run.start(__doc__)
    teacher = TeacherConfig(base_model=run.model, load_checkpoint_path=run.teacher)
    config = train_on_policy.Config(
        learning_rate=1e-3,
        dataset_configs=[
            DistillationDatasetConfig(
                dataset_builder=Questions(model=run.model), teacher_config=teacher, groups_per_batch=GROUPS
            )
        ],
        model_name=run.model,
        recipe_name="on_policy_distillation",
        renderer_name=RENDERER,
        max_tokens=16,
        lora_rank=16,
        log_path=run.log_path(),
        eval_every=0,
        save_every=5,
        max_steps=STEPS,
    )
    asyncio.run(train_on_policy.main(config))
    before, after = run.ends("teacher_kl", 2)
    run.finish(
        falls("reverse KL to the teacher per token, first and last two steps", before, after, by=0.2),
        recipe="distillation/train_on_policy.py",
        runs="importance_sampling on the reverse KL; the teacher is the checkpoint of supervised/train.py",
    )


if __name__ == "__main__":
    main()
