"""rl/train.py, streaming: training on minibatches starts while the rest of the step is still being sampled."""

from __future__ import annotations

from equations import GROUPS
from reinforcement import run_trainer
from running import Run
from tinker_cookbook.rl.train import StreamMinibatchConfig


def main() -> None:
    run_trainer(
        Run.start(__doc__),
        steps=6,
        runs="streaming minibatches; importance_sampling, two passes to an optimizer step",
        save_every=0,
        rolling_save_every=3,
        stream_minibatch_config=StreamMinibatchConfig(groups_per_batch=GROUPS, num_minibatches=2),
    )


if __name__ == "__main__":
    main()
