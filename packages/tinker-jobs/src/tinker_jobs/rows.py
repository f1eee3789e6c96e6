"""Dataset rows as training sees them: conversations to imitate, and prompts to answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs

PROMPT_KEYS = ("prompt", "input", "question", "task_prompt")
EXPECTED_KEYS = ("expected_output", "target", "answer", "output")
_OWN_KEYS = frozenset({*PROMPT_KEYS, *EXPECTED_KEYS, "messages", "template_context", "context", "reward"})

Message = dict[str, Any]
"""``role`` and ``content``, and in tool-aware conversations ``tool_calls`` or ``tool_call_id``."""


class BadRowError(Exception):
    """A row that cannot be used, with why."""


@attrs.frozen(kw_only=True)
class Conversation:
    """Messages of which the assistant's are to be imitated."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
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


def read_conversation(row: Mapping[str, Any]) -> Conversation | None:
    """The first form that fits: messages, ATIF steps, prompt and completion; None when none does.

    Raises `BadRowError` for a row of a known form with values of the wrong type.
    """
    tools = tuple(row.get("tools") or ())
    reward = _recorded_reward(row)
    if row.get("messages"):
        messages = tuple(_message(one) for one in _list(row, "messages"))
        return _conversation(messages, tools, reward)
    if row.get("steps"):
        messages = tuple(_message(_of_step(one)) for one in _list(row, "steps"))
        return _conversation(messages, tools, reward)
    prompt, completion = _first(row, PROMPT_KEYS), _first(row, EXPECTED_KEYS)
    if prompt is None or completion is None:
        return None
    return Conversation(
        messages=({"role": "user", "content": prompt}, {"role": "assistant", "content": completion}), reward=reward
    )


def read_prompt(row: Mapping[str, Any]) -> PromptRow | None:
    """A row to sample from; None when it has neither a prompt nor messages. Raises `BadRowError`."""
    prompt = _first(row, PROMPT_KEYS)
    if row.get("messages"):
        found = (_message(one) for one in _list(row, "messages"))
        messages = tuple(one for one in found if one is not None)
    elif prompt is not None:
        messages = ({"role": "user", "content": prompt},)
    else:
        return None
    reward = row.get("reward")
    if reward is not None and (isinstance(reward, bool) or not isinstance(reward, int | float)):
        raise BadRowError(f"reward must be a number, got {reward!r}")
    context = row.get("template_context") or row.get("context") or {}
    if not isinstance(context, Mapping):
        context = {}  # a text named "context" is the row's own business
    return PromptRow(
        messages=messages,
        expected_output=_first(row, EXPECTED_KEYS),
        template_context={str(name): value for name, value in context.items()},
        reward=None if reward is None else float(reward),
        metadata={name: value for name, value in row.items() if name not in _OWN_KEYS},
        content=row,
    )


def _conversation(
    messages: Sequence[Message | None], tools: tuple[Mapping[str, Any], ...], reward: float | None
) -> Conversation | None:
    kept = tuple(one for one in messages if one is not None)
    if not any(one["role"] == "assistant" for one in kept):
        return None
    return Conversation(messages=kept, tools=tools, reward=reward)


def _message(value: object) -> Message | None:
    if not isinstance(value, Mapping):
        raise BadRowError(f"a message must be an object with role and content, got {value!r:.60}")
    content, calls = value.get("content"), value.get("tool_calls")
    if content is None and not calls:
        return None
    if content is not None and not isinstance(content, str | list):
        raise BadRowError(f"the content of a message must be text, got {content!r:.60}")
    message: Message = {"role": str(value.get("role", "user")), "content": content or ""}
    for name in ("tool_calls", "tool_call_id", "name"):
        if value.get(name):
            message[name] = value[name]
    return message


def _of_step(step: object) -> object:
    """An ATIF step as a message."""
    if not isinstance(step, Mapping):
        return step
    roles = {"agent": "assistant"}
    source = str(step.get("source", "user"))
    return {**step, "role": roles.get(source, source), "content": step.get("message")}


def _list(row: Mapping[str, Any], name: str) -> Sequence[object]:
    value = row[name]
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise BadRowError(f"{name} must be a list, got {value!r:.60}")
    return value


def _first(row: Mapping[str, Any], names: Sequence[str]) -> str | None:
    for name in names:
        value = row.get(name)
        if value is not None and value != "":
            return value if isinstance(value, str) else str(value)
    return None


def _recorded_reward(row: Mapping[str, Any]) -> float | None:
    """What a trajectory's outcome says."""
    metadata = row.get("metadata")
    found = row.get("reward")
    if found is None and isinstance(metadata, Mapping):
        found = metadata.get("reward")
        if found is None and isinstance(metadata.get("success"), bool):
            found = 1.0 if metadata["success"] else 0.0
    return float(found) if isinstance(found, int | float) and not isinstance(found, bool) else None
