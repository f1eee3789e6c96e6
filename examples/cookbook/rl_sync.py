"""rl/train.py, synchronous: with a KL penalty to the base model, and the KL after each update."""

from __future__ import annotations

from reinforcement import run_trainer
from running import Run
from tinker_cookbook.rl.train import KLReferenceConfig


def main() -> None:
    run = Run.start(__doc__)
    run_trainer(
        run,
        steps=6,
        runs="synchronous; importance_sampling, KL penalty to the base model, KL after each update, checkpoints",
        save_every=4,
        compute_post_kl=True,
        kl_penalty_coef=0.01,
        kl_reference_config=KLReferenceConfig(base_model=run.model),
    )


if __name__ == "__main__":
    main()
