"""What a policy is asked, and how its answer is judged."""

from __future__ import annotations

import math
import re
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from tinker_core.rewards import Judged, Reward, RewardError, RewardRecipePlugin
from tinker_jobs.errors import JobFailedError
from tinker_jobs.refs import FrozenRefs
from tinker_jobs.rows import Message, PromptRow

_VARIABLE = re.compile(r"\{\{\s*(\w+)\s*\}\}")


def fill(text: str, context: Mapping[str, str | int | None]) -> str | None:
    """A text with its ``{{ variables }}``; None when one of them has no value."""
    filled = _VARIABLE.sub(
        lambda found: str(context[found[1]]) if context.get(found[1]) is not None else found[0], text
    )
    return None if "{{" in filled else filled


def messages_of(row: PromptRow, refs: FrozenRefs) -> list[Message]:
    """The capability's prompt and the task's instruction as one system message, then the row's own messages."""
    instruction = None if refs.task is None else refs.task.instruction
    parts = [refs.capability.prompt, None if instruction is None else fill(instruction, row.template_context)]
    system = "\n\n".join(part for part in parts if part)
    return with_system(row.messages, system)


def with_system(messages: Sequence[Message], system: str) -> list[Message]:
    """Messages under a system message; one that is there already follows it after an empty line."""
    if not system:
        return list(messages)
    if messages and messages[0]["role"] == "system":
        return [{"role": "system", "content": f"{system}\n\n{messages[0]['content']}"}, *messages[1:]]
    return [{"role": "system", "content": system}, *messages]


@attrs.frozen(kw_only=True)
class Judge:
    """A recipe with the parameters of a job."""

    recipe: RewardRecipePlugin
    params: Mapping[str, Any]
    verification: Mapping[str, Any] | None = None

    def __call__(self, completion: str, row: PromptRow, where: str) -> Reward:
        """How good a completion is. Raises `JobFailedError` that begins with ``where`` the row is from."""
        try:
            reward = self._score(completion, row)
        except RewardError as error:
            raise JobFailedError(f"{where}: {error}") from error
        except Exception as error:  # a plugin's recipe raises what it likes; its author needs the lines
            traceback.print_exc()
            raise JobFailedError(f"{where}: {self.recipe.name} failed: {type(error).__name__}: {error}") from error
        if not math.isfinite(reward.value):
            raise JobFailedError(f"{where}: {self.recipe.name} gave the reward {reward.value}")
        return reward

    def _score(self, completion: str, row: PromptRow) -> Reward:
        return self.recipe.score(
            Judged(
                completion=completion.strip(),
                row=row.content,
                expected_output=row.expected_output,
                reward=row.reward,
                verification=self.verification,
                params=self.params,
            )
        )
