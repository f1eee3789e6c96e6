"""Dataset rows as prompts: read, put under the system prompt, and made tokens of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import attrs

from tinker_jobs.errors import JobFailedError
from tinker_jobs.library.datasets import read_prompts
from tinker_jobs.refs import FrozenDataset
from tinker_jobs.rendering import render_prompt
from tinker_jobs.rl.prompts import messages_of
from tinker_jobs.rows import PromptRow
from tinker_jobs.worker.run import JobRun


@attrs.frozen(kw_only=True)
class FoundRow:
    """A row that can be asked, and where it is from."""

    where: str
    """Such as ``questions@1.0.0 row 17``."""
    row: PromptRow


@attrs.frozen(kw_only=True)
class Prompt:
    """A row as the policy is given it."""

    where: str
    row: PromptRow
    tokens: tuple[int, ...]


def find_prompts(dataset: FrozenDataset, split: str | None = None) -> Iterator[FoundRow | None]:
    """The rows of a prompt dataset; None for each that is no prompt. Raises `JobFailedError` that names the row."""
    for number, row in read_prompts(dataset, split):
        yield None if row is None else FoundRow(where=f"{dataset} row {number}", row=row)


class PromptReader:
    """Makes prompts of rows for one job."""

    def __init__(self, run: JobRun, max_new_tokens: int) -> None:
        self._run = run
        self._max_new_tokens = max_new_tokens
        self._context = run.context_length

    def read(self, rows: Iterator[FoundRow | None], limit: int | None, source: str) -> tuple[Prompt, ...]:
        """The first ``limit`` usable prompts; the others are counted in the job's log. ``source`` names the rows.

        A prompt is usable when it leaves room for ``max_new_tokens`` in the model's context. Raises `JobFailedError`
        when none is.
        """
        num_others = num_long = 0

        def usable() -> Iterator[Prompt]:
            nonlocal num_others, num_long
            for found in rows:
                if found is None:
                    num_others += 1
                    continue
                tokens = self._render(found)
                if self._context is not None and len(tokens) + self._max_new_tokens > self._context:
                    num_long += 1
                    continue
                yield Prompt(where=found.where, row=found.row, tokens=tuple(tokens))

        prompts = tuple(islice(usable(), limit))
        skipped = self._describe_skipped(num_others, num_long)
        if not prompts:
            reason = "; ".join(skipped) or "there are no rows"
            raise JobFailedError(f"No RL rollouts were generated for training: {source} has no usable prompt: {reason}")
        self._run.log(
            "; ".join((f"{len(prompts)} prompts of {source}", *skipped)),
            level="warning" if skipped else "info",
            num_prompts=len(prompts),
            num_without_prompt=num_others,
            num_too_long=num_long,
        )
        return prompts

    def _render(self, found: FoundRow) -> Sequence[int]:
        messages = messages_of(found.row, self._run.refs)
        try:
            return render_prompt(self._run.tokenizer, messages, found.row.tools)
        except JobFailedError as error:
            raise JobFailedError(f"{found.where}: {error}") from error

    def _describe_skipped(self, num_others: int, num_long: int) -> list[str]:
        skipped = []
        if num_others:
            skipped.append(f"{num_others} rows hold no prompt and were skipped")
        if num_long:
            skipped.append(
                f"{num_long} prompts were skipped, because with max_new_tokens={self._max_new_tokens} they do not fit "
                f"into the {self._context} tokens of the model's context"
            )
        return skipped
