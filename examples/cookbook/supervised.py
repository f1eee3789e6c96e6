"""supervised/train.py: a chat model learns the answers of a small corpus, is saved, and goes on from the checkpoint."""

from __future__ import annotations

import asyncio

from corpus import Corpus
from running import RENDERER, Run, falls
from tinker_cookbook.supervised import train

STEPS = 16


def train_on(run: Run, name: str, **settings: object) -> None:
    config = train.Config(
        log_path=run.log_path(name),
        model_name=run.model,
        recipe_name="supervised",
        renderer_name=RENDERER,
        dataset_builder=Corpus(model=run.model),
        learning_rate=1e-3,
        lora_rank=16,
        # Evaluations precede the step that they are logged with, so the last one sees the weights after STEPS steps.
        eval_every=STEPS,
        **settings,
    )
    asyncio.run(train.main(config))


def main() -> None:
    run = Run.start(__doc__)
    train_on(run, "first", max_steps=STEPS + 1, save_every=10, rolling_save_every=4)
    before, after = run.series("test/nll", "first")
    train_on(run, "second", max_steps=1, load_checkpoint_path=run.checkpoint("state_path", "first"))
    (loaded,) = run.series("test/nll", "second")
    run.finish(
        falls("held-out loss per token", before, after, by=0.4),
        falls("the same, after loading the checkpoint into a new run", before, loaded, by=0.4),
        recipe="supervised/train.py",
        runs="cross_entropy; periodic, rolling and final checkpoints; a second run from the saved state",
        sampler_path=run.checkpoint("sampler_path", "first"),
    )


if __name__ == "__main__":
    main()
