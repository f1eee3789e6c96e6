"""Recorded trajectories as prompts: the policy is asked for each step that an assistant took."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from tinker_jobs.errors import JobFailedError
from tinker_jobs.library.datasets import read_conversations
from tinker_jobs.refs import FrozenDataset
from tinker_jobs.rendering import render_text
from tinker_jobs.rl.prompt_rows import FoundRow
from tinker_jobs.rows import Conversation, PromptRow

OFFLINE_RECIPE = "trajectory_imitation_v1"
"""The reward of jobs that have trajectories only, and name no recipe."""


def find_actions(datasets: Sequence[FrozenDataset], tokenizer: PreTrainedTokenizerBase) -> Iterator[FoundRow | None]:
    """One row per recorded step of an assistant; None for each record without any.

    A row has the messages before the step, the step's text as its expected output, and the reward that was recorded
    for the trajectory. A step that calls tools is expected as the chat template writes it. Raises `JobFailedError`
    that names the record.
    """
    for dataset in datasets:
        for number, conversation in read_conversations(dataset):
            where = f"{dataset} row {number}"
            try:
                found = list(_actions(conversation, where, tokenizer)) if conversation else []
            except JobFailedError as error:
                raise JobFailedError(f"{where}: {error}") from error
            if found:
                yield from found
            else:
                yield None


def _actions(conversation: Conversation, where: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[FoundRow]:
    for index, message in enumerate(conversation.messages):
        before = conversation.messages[:index]
        if message["role"] != "assistant" or not before:
            continue
        expected = _text_of(conversation, index, tokenizer)
        if expected:
            content = {"messages": list(before), "expected_output": expected, "reward": conversation.reward}
            row = PromptRow(
                messages=before,
                expected_output=expected,
                reward=conversation.reward,
                content=content,
                tools=conversation.tools,
            )
            yield FoundRow(where=f"{where}, message {index + 1}", row=row)


def _text_of(conversation: Conversation, index: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """What the policy would have to say for this step."""
    message, before = conversation.messages[index], conversation.messages[:index]
    if not message.get("tool_calls"):
        return str(message["content"]).strip()
    prompt = render_text(tokenizer, before, tools=conversation.tools, prompts_reply=True)
    whole = render_text(tokenizer, (*before, message), tools=conversation.tools, prompts_reply=False)
    if not whole.startswith(prompt):
        raise JobFailedError("the model's chat template does not write a recorded step after what comes before it")
    tokens = tokenizer.encode(whole.removeprefix(prompt), add_special_tokens=False)
    return str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()
