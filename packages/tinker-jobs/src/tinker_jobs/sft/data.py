"""A job's datasets as training examples."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tinker_jobs.errors import JobFailedError
from tinker_jobs.library.datasets import NO_CONVERSATIONS, read_conversations
from tinker_jobs.refs import FrozenDataset
from tinker_jobs.sft.examples import Example, ExampleMaker
from tinker_jobs.worker.run import JobRun


def read_training_examples(run: JobRun, max_length: int) -> list[Example]:
    """Trajectory datasets first, then the dataset. Raises `JobFailedError` when there is nothing to learn."""
    datasets = [*run.refs.trajectory_datasets, *([] if run.refs.dataset is None else [run.refs.dataset])]
    examples = [example for dataset in datasets for example in _read(run, dataset, max_length, NO_CONVERSATIONS)]
    if not examples:
        raise JobFailedError(
            f"{NO_CONVERSATIONS} Rows need a reply of the assistant within the first {max_length} tokens."
        )
    return examples


def read_evaluation_examples(run: JobRun, max_length: int) -> list[Example]:
    """Of the evaluation dataset; none without one. Raises `JobFailedError` when it has nothing to measure."""
    if run.refs.eval_dataset is None:
        return []
    nothing = f"Evaluation dataset {run.refs.eval_dataset} did not produce any usable conversations."
    examples = _read(run, run.refs.eval_dataset, max_length, nothing)
    if not examples:
        raise JobFailedError(f"{nothing} Rows need a reply of the assistant within the first {max_length} tokens.")
    return examples


def _read(run: JobRun, dataset: FrozenDataset, max_length: int, nothing: str) -> list[Example]:
    maker = ExampleMaker(run.tokenizer, system=run.refs.capability.prompt, max_length=max_length)
    examples: list[Example] = []
    num_rows = num_skipped = 0
    knows_tools = True
    for number, conversation in read_conversations(dataset, nothing=nothing):
        run.check_cancelled()
        num_rows += 1
        if conversation is None:
            num_skipped += 1
            continue
        try:
            if knows_tools and conversation.tools:
                knows_tools = not maker.ignores_tools(conversation)
            examples += maker.make(conversation)
        except JobFailedError as error:
            file = Path(dataset.splits[dataset.default_split].path).name
            raise JobFailedError(f"dataset {dataset}, {file}: row {number}: {error}") from error
    _report(run, dataset, num_rows, num_skipped, len(examples), maker)
    if not knows_tools:
        run.log(f"the model's chat template leaves out the definitions of tools in {dataset}", level="warning")
    if maker.num_open:
        run.log(
            "the model's chat template ends replies without a special token: when to stop is not learned", "warning"
        )
    return examples


def _report(
    run: JobRun, dataset: FrozenDataset, num_rows: int, num_skipped: int, num_examples: int, maker: ExampleMaker
) -> None:
    losses: Iterable[tuple[int, str]] = (
        (num_skipped, "rows skipped: no conversation with a reply in them"),
        (maker.num_truncated, "examples cut off at the end: too long"),
        (maker.num_dropped, "examples dropped: nothing to learn in what was left"),
    )
    parts = [f"{dataset}: {num_examples} examples from {num_rows} rows", *(f"{n} {what}" for n, what in losses if n)]
    run.log(
        "; ".join(parts),
        level="warning" if len(parts) > 1 else "info",
        dataset=str(dataset),
        split=dataset.default_split,
        num_rows=num_rows,
        num_skipped=num_skipped,
        num_examples=num_examples,
        num_truncated=maker.num_truncated,
        num_dropped=maker.num_dropped,
    )
