"""preference/train_dpo.py: prefer a question's own answer to the answer of another question.

No set of human preferences comes inside a package, so the pairs are synthetic: the rejected answer is another row's.
"""

from __future__ import annotations

import itertools

import chz
import datasets
from corpus import training_pairs
from running import RENDERER, Run, falls, rises
from tinker_cookbook.preference import train_dpo
from tinker_cookbook.preference.dpo_datasets import DPODatasetBuilderFromComparisons
from tinker_cookbook.preference.preference_datasets import ComparisonDatasetBuilder
from tinker_cookbook.preference.types import Comparison, LabeledComparison
from tinker_cookbook.supervised.types import ChatDatasetBuilderCommonConfig

STEPS = 12


@chz.chz
class MismatchedAnswers(ComparisonDatasetBuilder):
    """Questions with their own answer and the next question's."""

    def get_train_and_test_datasets(self) -> tuple[datasets.Dataset, None]:
        """Every pair once, so that the accuracy of each step is measured on pairs not seen before."""
        pairs = training_pairs()
        rows = [
            {"question": question, "chosen": chosen, "rejected": rejected}
            for (question, chosen), (_, rejected) in itertools.pairwise(pairs)
        ]
        return datasets.Dataset.from_list(rows), None

    def example_to_labeled_comparison(self, example: dict[str, str]) -> LabeledComparison:
        """Completion A is the better one."""
        comparison = Comparison(
            prompt_conversation=[{"role": "user", "content": example["question"]}],
            completion_A=[{"role": "assistant", "content": example["chosen"]}],
            completion_B=[{"role": "assistant", "content": example["rejected"]}],
        )
        return LabeledComparison(comparison=comparison, label="A")


def main() -> None:
    run = Run.start(__doc__)
    common = ChatDatasetBuilderCommonConfig(
        model_name_for_tokenizer=run.model, renderer_name=RENDERER, max_length=128, batch_size=8
    )
    config = train_dpo.Config(
        log_path=run.log_path(),
        model_name=run.model,
        recipe_name="dpo",
        renderer_name=RENDERER,
        dataset_builder=DPODatasetBuilderFromComparisons(common_config=common, comparison_builder=MismatchedAnswers()),
        learning_rate=5e-4,
        lr_schedule="constant",
        lora_rank=16,
        dpo_beta=0.1,
        save_every=5,
        rolling_save_every=3,
        eval_every=0,
        infrequent_eval_every=0,
        max_steps=STEPS,
    )
    train_dpo.main(config)
    first_loss, _ = run.ends("dpo_loss", 1)
    _, last_loss = run.ends("dpo_loss", 4)
    first_margin, _ = run.ends("margin", 1)
    _, last_margin = run.ends("margin", 4)
    run.finish(
        falls("DPO loss on unseen pairs, first step and last four", first_loss, last_loss, by=0.1),
        rises("reward margin on unseen pairs, the same steps", first_margin, last_margin, below=0.05, above=0.3),
        recipe="preference/train_dpo.py",
        runs="forward_backward_custom with the cookbook's own DPO loss; reference by compute_logprobs; pairs synthetic",
    )


if __name__ == "__main__":
    main()
