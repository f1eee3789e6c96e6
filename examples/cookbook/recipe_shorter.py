"""recipes/preference/shorter/train.py as it stands: of two replies to "Who are you?" the shorter one is preferred."""

from __future__ import annotations

from hub import run_recipe
from running import RENDERER, Run, falls


def main() -> None:
    run = Run.start(__doc__)
    # The recipe's own bound of 64 tokens stays: replies must have room to end, or there is no shorter one to prefer.
    settings = {"batch_size": 2, "group_size": 8, "max_steps": 6, "eval_every": 0}
    run_recipe(run, "preference.shorter.train", **settings, renderer_name=RENDERER, learning_rate=1e-3)
    before, after = run.ends("env/all/ac_tokens_per_turn", 2)
    run.finish(
        falls("tokens per reply, first and last two steps", before, after, by=5),
        recipe="recipes/preference/shorter/train.py",
        runs="the recipe's own command: pairwise preferences within a group, importance_sampling, rank 32",
    )


if __name__ == "__main__":
    main()
