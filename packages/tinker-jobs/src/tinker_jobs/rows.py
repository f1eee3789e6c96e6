"""Dataset rows as training sees them: conversations to imitate, and prompts to answer."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from tinker_jobs.messages import (
    ASSISTANT,
    BadRowError,
    Message,
    as_list,
    as_message,
    as_text,
    is_atif,
    steps_as_messages,
)

__all__ = [
    "BadRowError",
    "Conversation",
    "Message",
    "PromptRow",
    "read_conversation",
    "read_prompt",
]

PROMPT_KEYS = ("prompt", "input", "question", "task_prompt")
EXPECTED_KEYS = ("expected_output", "target", "answer", "output")
CONVERSATION_FORMS = f"messages, steps, or one of {'|'.join(PROMPT_KEYS)} with one of {'|'.join(EXPECTED_KEYS)}"
PROMPT_FORMS = f"messages or one of {'|'.join(PROMPT_KEYS)}"
_OWN_KEYS = frozenset({*PROMPT_KEYS, *EXPECTED_KEYS, "messages", "tools", "template_context", "reward"})

Tools = tuple[Mapping[str, Any], ...]
"""Definitions of functions, as OpenAI writes them."""


@attrs.frozen(kw_only=True)
class Conversation:
    """Messages of which the assistant's are to be imitated."""

    messages: tuple[Message, ...]
    tools: Tools = ()
    reward: float | None = None
    """How well it went, where that was recorded."""


@attrs.frozen(kw_only=True)
class PromptRow:
    """A prompt and what is known of good answers to it."""

    messages: tuple[Message, ...]
    expected_output: str | None = None
    template_context: Mapping[str, str | int | None] = attrs.field(factory=dict)
    reward: float | None = None
    metadata: Mapping[str, Any] = attrs.field(factory=dict)
    content: Mapping[str, Any] = attrs.field(factory=dict, repr=False)
    """The row as it is."""
    tools: Tools = ()


def read_conversation(row: Mapping[str, Any]) -> Conversation | None:
    """The first form that fits: messages, ATIF steps, prompt and completion; None when none does.

    Raises `BadRowError` for a row of a known form with values of the wrong type.
    """
    messages = _messages(row)
    if not messages and is_atif(row.get("steps")):
        messages = tuple(steps_as_messages(as_list(row, "steps")))
    if not messages:
        prompt, completion = _first(row, PROMPT_KEYS), _first(row, EXPECTED_KEYS)
        if prompt is not None and completion is not None:
            messages = ({"role": "user", "content": prompt}, {"role": ASSISTANT, "content": completion})
    if not any(message["role"] == ASSISTANT for message in messages):
        return None
    return Conversation(messages=messages, tools=_tools(row), reward=_recorded_reward(row))


def read_prompt(row: Mapping[str, Any]) -> PromptRow | None:
    """A row to sample from; None when it has neither a prompt nor messages. Raises `BadRowError`."""
    messages = _messages(row)
    if not messages:
        prompt = _first(row, PROMPT_KEYS)
        if prompt is None:
            return None
        messages = ({"role": "user", "content": prompt},)
    if messages[-1]["role"] == ASSISTANT:
        raise BadRowError("messages end with the assistant's reply, which is what the policy is to write; remove it")
    return PromptRow(
        messages=messages,
        expected_output=_first(row, EXPECTED_KEYS),
        template_context=_template_context(row),
        reward=_number(row.get("reward"), "reward"),
        metadata={name: value for name, value in row.items() if name not in _OWN_KEYS},
        content=row,
        tools=_tools(row),
    )


def _messages(row: Mapping[str, Any]) -> tuple[Message, ...]:
    found = (as_message(message) for message in as_list(row, "messages"))
    return tuple(message for message in found if message is not None)


def _tools(row: Mapping[str, Any]) -> Tools:
    """Those of the row, else those of a trajectory's agent; datasets hold them as JSON text too."""
    agent = row.get("agent")
    found = row.get("tools") or (agent.get("tool_definitions") if isinstance(agent, Mapping) else None) or ()
    if isinstance(found, str):
        try:
            found = json.loads(found)
        except (ValueError, RecursionError) as error:
            raise BadRowError(f"tools must be a list of objects, got text that is no JSON: {error}") from error
    if not isinstance(found, list | tuple) or not all(isinstance(tool, Mapping) for tool in found):
        raise BadRowError(f"tools must be a list of objects, got {found!r:.60}")
    return tuple(found)


def _first(row: Mapping[str, Any], names: Sequence[str]) -> str | None:
    for name in names:
        text = as_text(row.get(name), name)
        if text is not None and text.strip():
            return text
    return None


def _template_context(row: Mapping[str, Any]) -> dict[str, str | int | None]:
    context = row.get("template_context")
    if context is not None:
        if not isinstance(context, Mapping):
            raise BadRowError(f"template_context must be an object, got {context!r:.60}")
        return {str(name): _variable(value, str(name)) for name, value in context.items()}
    other = row.get("context")  # a common word: what has not this form is the row's own business
    if not isinstance(other, Mapping):
        return {}
    return {str(name): value for name, value in other.items() if value is None or isinstance(value, str | int)}


def _variable(value: object, name: str) -> str | int | None:
    return value if isinstance(value, int) else as_text(value, f"template_context.{name}")


def _number(value: object, what: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRowError(f"{what} must be a number, got {value!r:.60}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise BadRowError(f"{what} must be a finite number, got {value!r:.60}")
    return number


def _recorded_reward(row: Mapping[str, Any]) -> float | None:
    """What a trajectory's outcome says: a reward, else whether it was a success, of the row or of its metadata."""
    places = [row, *(row[name] for name in ("metadata", "worlds_summary") if isinstance(row.get(name), Mapping))]
    for place in places:
        reward = _number(place.get("reward"), "reward")
        if reward is not None:
            return reward
    successes = (place.get("success") for place in places)
    return next((float(success) for success in successes if isinstance(success, bool)), None)
