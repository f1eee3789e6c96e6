"""distillation/train_off_policy.py: soft targets, the twenty likeliest tokens of a teacher at every position."""

from __future__ import annotations

import asyncio

from corpus import BATCH_SIZE, HELD_OUT, Corpus, chat_dataset, held_out_pairs
from running import RENDERER, Run, falls
from tinker_cookbook.distillation import train_off_policy
from tinker_cookbook.distillation.datasets import TeacherConfig
from tinker_cookbook.supervised.nll_evaluator import SamplerNLLEvaluator

STEPS = 12


def main() -> None:
    run = Run.start(__doc__)
    held_out = chat_dataset(run.model, held_out_pairs(), HELD_OUT)
    teacher = TeacherConfig(base_model=run.model, load_checkpoint_path=run.teacher)
    config = train_off_policy.Config(
        learning_rate=1e-3,
        dataset_configs=[
            train_off_policy.DatasetWithTeacher(dataset_builder=Corpus(model=run.model), teacher_config=teacher)
        ],
        model_name=run.model,
        recipe_name="off_policy_distillation",
        renderer_name=RENDERER,
        lora_rank=16,
        n_teacher_targets=20,
        batch_size=BATCH_SIZE,
        save_every=5,
        # Evaluations precede the step that they are logged with, so the last one sees the weights after STEPS steps.
        eval_every=STEPS,
        max_steps=STEPS + 1,
        log_path=run.log_path(),
        evaluator_builders=[lambda: SamplerNLLEvaluator.from_dataset(held_out, name="held_out")],
    )
    asyncio.run(train_off_policy.main(config))
    before, after = run.series("test/held_out/nll")
    run.finish(
        falls("held-out loss per token", before, after, by=0.4),
        recipe="distillation/train_off_policy.py",
        runs="topk_prompt_logprobs of the teacher, cross_entropy on [T, 20] targets; the same teacher",
    )


if __name__ == "__main__":
    main()
