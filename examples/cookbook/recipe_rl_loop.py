"""recipes/rl_loop.py as it stands: its data set GSM8K is stood in for by questions that contain their answer."""

from __future__ import annotations

import random

from hub import GSM8K, link_model, run_recipe, write_rows
from running import Run, rises

STEPS = 6
BATCH_SIZE = 4


def main() -> None:
    run = Run.start(__doc__)
    link_model(run)
    rng = random.Random(0)
    answers = [rng.randint(2, 9) for _ in range(STEPS * BATCH_SIZE)]
    rows = (
        {"question": f"The answer is \\boxed{{{answer}}}. What is the answer?", "answer": f"#### {answer}"}
        for answer in answers
    )
    write_rows(run, "openai/gsm8k", rows, GSM8K)
    settings = {"batch_size": BATCH_SIZE, "group_size": 8, "max_tokens": 16, "max_steps": STEPS}
    run_recipe(run, "rl_loop", **settings, learning_rate=1e-3, lora_rank=16)
    before, after = run.ends("reward/total", 2)
    run.finish(
        rises("mean reward, first and last two steps", before, after, below=0.3, above=0.5),
        recipe="recipes/rl_loop.py",
        runs="the recipe's own command and default loss, stable_reinforce, with provenance spans",
    )


if __name__ == "__main__":
    main()
