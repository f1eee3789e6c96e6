"""rl/train.py, asynchronous: sampling runs up to two steps ahead of training, on older weights."""

from __future__ import annotations

from equations import GROUPS
from reinforcement import run_trainer
from running import Run
from tinker_cookbook.rl.train import AsyncConfig


def main() -> None:
    run_trainer(
        Run.start(__doc__),
        steps=10,
        runs="asynchronous, at most two steps off policy; the trainer's default loss stable_reinforce",
        save_every=0,
        async_config=AsyncConfig(max_steps_off_policy=2, groups_per_batch=GROUPS),
    )


if __name__ == "__main__":
    main()
