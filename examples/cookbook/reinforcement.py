"""What the three drivers of rl/train.py share: the configuration, and the reward that must rise."""

from __future__ import annotations

import asyncio

from equations import EquationDatasetBuilder
from running import RENDERER, Run, rises
from tinker_cookbook.rl import train


def run_trainer(run: Run, *, steps: int, runs: str, num_batches: int | None = None, **settings: object) -> None:
    """Train on equations; the mean reward of the first two steps must be low and that of the last two high."""
    config = train.Config(
        log_path=run.log_path(),
        model_name=run.model,
        recipe_name="equations",
        renderer_name=RENDERER,
        dataset_builder=EquationDatasetBuilder(model=run.model, num_batches=num_batches or steps),
        learning_rate=5e-4,
        lora_rank=16,
        max_tokens=8,
        eval_every=0,
        max_steps=steps,
        **settings,
    )
    asyncio.run(train.main(config))
    before, after = run.ends("env/all/reward/total", 2)
    check = rises("mean reward, first and last two steps", before, after, below=0.5, above=0.7)
    run.finish(check, recipe="rl/train.py", runs=runs)
