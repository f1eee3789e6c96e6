"""recipes/sl_loop.py as it stands: its data set no_robots is stood in for by local conversations of the same form."""

from __future__ import annotations

from corpus import conversation, load_pairs
from hub import link_model, run_recipe, write_rows
from running import Run, falls

STEPS = 14


def main() -> None:
    run = Run.start(__doc__)
    link_model(run)
    write_rows(run, "HuggingFaceH4/no_robots", ({"messages": conversation(*pair)} for pair in load_pairs()))
    run_recipe(run, "sl_loop", batch_size=8, learning_rate=1e-3, lora_rank=16, max_length=128, max_steps=STEPS)
    before, after = run.ends("train_mean_nll", 3)
    run.finish(
        falls("loss per token of batches not seen before, first and last three steps", before, after, by=0.4),
        recipe="recipes/sl_loop.py",
        runs="the recipe's own command; cross_entropy",
    )


if __name__ == "__main__":
    main()
