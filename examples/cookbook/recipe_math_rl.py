"""recipes/math_rl/train.py as it stands, with its built-in sums: a small model learns to answer briefly."""

from __future__ import annotations

from hub import run_recipe
from running import RENDERER, Run, rises

STEPS = 4


def main() -> None:
    run = Run.start(__doc__)
    settings = {"renderer_name": RENDERER, "env": "arithmetic", "max_steps": STEPS, "eval_every": 0}
    run_recipe(run, "math_rl.train", **settings, groups_per_batch=4, group_size=6, learning_rate=5e-4, lora_rank=16)
    before, after = run.ends("env/all/format", 1)
    run.finish(
        rises("share of replies that end within five tokens, first and last step", before, after, below=0.6, above=0.8),
        recipe="recipes/math_rl/train.py",
        runs="the recipe's own command, environment and default loss, stable_reinforce",
    )


if __name__ == "__main__":
    main()
