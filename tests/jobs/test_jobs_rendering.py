"""Conversations as training examples, under templates that each make it hard in a way of their own."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerBase

from tests.jobs.chat_templates import LLAMA3, MARKED, MISTRAL, PHI3, PLAIN, QWEN3, R1, SMOLLM2, make_tokenizer
from tests.models import write_tokenizer
from tinker_jobs.errors import JobFailedError
from tinker_jobs.rendering import render_prompt, render_text
from tinker_jobs.rows import Conversation, read_conversation
from tinker_jobs.sft.examples import Example, ExampleMaker
from tinker_jobs.sft.passages import PassageReader


def say(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


USER, REPLY = say("user", "Hi"), say("assistant", "Hello there.")
QUESTION, ANSWER = say("user", "What is the capital of France?"), say("assistant", "Paris. 🙂")
TALK = (USER, REPLY, QUESTION, ANSWER)
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def talk(*messages: dict[str, Any], **row: Any) -> Conversation:
    found = read_conversation({"messages": list(messages), **row})
    assert found is not None
    return found


def make(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, system: str | None = None, max_length: int = 10_000
) -> list[Example]:
    return ExampleMaker(tokenizer, system=system, max_length=max_length).make(conversation)


def learned(tokenizer: PreTrainedTokenizerBase, example: Example) -> list[str]:
    """What an example teaches, piece by piece."""
    pairs = zip(example.tokens.tolist(), example.is_learned.tolist(), strict=True)
    runs: Iterator[Any] = groupby(pairs, key=lambda pair: pair[1])
    return [tokenizer.decode([token for token, _ in run]) for is_learned, run in runs if is_learned]


@pytest.mark.parametrize(
    ("template", "pieces"),
    [
        pytest.param(SMOLLM2, ["Hello there.<|im_end|>", "Paris. 🙂<|im_end|>"], id="smollm2"),
        pytest.param(LLAMA3, ["Hello there.<|eot_id|>", "Paris. 🙂<|eot_id|>"], id="llama3"),
        pytest.param(MARKED, ["Hello there.<|im_end|>\n", "Paris. 🙂<|im_end|>\n"], id="marked"),
        pytest.param(MISTRAL, [" Hello there.</s>", " Paris. 🙂</s>"], id="mistral"),
        pytest.param(R1, ["Hello there.<|im_end|>", "Paris. 🙂<|im_end|>"], id="r1"),
        pytest.param(PLAIN, [" Hello there.\n", " Paris. 🙂\n"], id="plain"),
    ],
)
def test_replies_and_the_ends_of_their_turns_are_learned_and_nothing_else(template: str, pieces: list[str]) -> None:
    tokenizer = make_tokenizer(template)
    (example,) = make(tokenizer, talk(*TALK))
    assert learned(tokenizer, example) == pieces
    assert example.tokens.tolist() == tokenizer.apply_chat_template(list(TALK), tokenize=True)["input_ids"]


@pytest.mark.parametrize(
    ("template", "last"),
    [
        pytest.param(QWEN3, "<think>\n\n</think>\n\nParis. 🙂<|im_end|>", id="qwen3"),
        pytest.param(PHI3, "Paris. 🙂<|im_end|><|endoftext|>", id="phi3"),
    ],
)
def test_a_template_that_rewrites_replies_later_gives_an_example_for_each(template: str, last: str) -> None:
    tokenizer = make_tokenizer(template)
    examples = make(tokenizer, talk(*TALK))
    assert [learned(tokenizer, example) for example in examples] == [
        [last.replace("Paris. 🙂", "Hello there.")],
        [last],
    ]
    for example, messages in zip(examples, (TALK[:2], TALK), strict=True):
        assert example.tokens.tolist() == tokenizer.apply_chat_template(list(messages), tokenize=True)["input_ids"]


def test_reasoning_is_learned_once_where_the_template_writes_it() -> None:
    tokenizer = make_tokenizer(QWEN3)
    thoughts = [
        say("assistant", "Hello there.", reasoning_content="A greeting."),
        say("assistant", "<think>\nEasy.\n</think>\n\nParis."),
    ]
    examples = make(tokenizer, talk(USER, thoughts[0], QUESTION, thoughts[1]))
    assert [learned(tokenizer, example) for example in examples] == [
        ["<think>\nA greeting.\n</think>\n\nHello there.<|im_end|>"],
        ["<think>\nEasy.\n</think>\n\nParis.<|im_end|>"],
    ]
    assert "A greeting." not in tokenizer.decode(examples[1].tokens)


def test_each_example_begins_with_the_prompt_that_the_model_will_be_given() -> None:
    for template in (SMOLLM2, LLAMA3, QWEN3, MISTRAL, PHI3):
        tokenizer = make_tokenizer(template)
        last = make(tokenizer, talk(*TALK))[-1]
        prompt = render_prompt(tokenizer, TALK[:-1])
        assert last.tokens[: len(prompt)].tolist() == prompt
        assert last.is_learned[len(prompt)]
        assert not last.is_learned[len(prompt) - 1]


def test_a_system_message_that_moves_gives_an_example_for_each_reply() -> None:
    tokenizer = make_tokenizer(MISTRAL)
    examples = make(tokenizer, talk(*TALK), system="Be kind.")
    assert [tokenizer.decode(example.tokens) for example in examples] == [
        "<s>[INST] Be kind.\n\nHi [/INST] Hello there.</s>",
        "<s>[INST] Hi [/INST] Hello there.</s>[INST] Be kind.\n\nWhat is the capital of France? [/INST] Paris. 🙂</s>",
    ]
    assert [learned(tokenizer, example) for example in examples] == [[" Hello there.</s>"], [" Paris. 🙂</s>"]]


def test_a_conversation_may_begin_with_the_assistant() -> None:
    tokenizer = make_tokenizer(SMOLLM2)
    (example,) = make(tokenizer, talk(REPLY, *TALK))
    assert learned(tokenizer, example) == ["Hello there.<|im_end|>", "Hello there.<|im_end|>", "Paris. 🙂<|im_end|>"]
    assert tokenizer.decode(example.tokens).startswith("<|im_start|>system\nYou are Smol.<|im_end|>")


def test_what_follows_the_last_reply_is_left_out() -> None:
    tokenizer = make_tokenizer(SMOLLM2)
    (example,) = make(tokenizer, talk(USER, REPLY, QUESTION))
    assert example.tokens.tolist() == make(tokenizer, talk(USER, REPLY))[0].tokens.tolist()


def test_the_prompt_of_the_capability_stands_before_the_system_message_of_the_row() -> None:
    tokenizer = make_tokenizer(SMOLLM2)
    alone, joined = (
        tokenizer.decode(make(tokenizer, talk(*messages), system="Be kind.")[0].tokens)
        for messages in (TALK, (say("system", "Be brief."), *TALK))
    )
    assert alone.startswith("<|im_start|>system\nBe kind.<|im_end|>")
    assert joined.startswith("<|im_start|>system\nBe kind.\n\nBe brief.<|im_end|>")


CALL = say("assistant", "", tool_calls=[{"id": "1", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}])
WITH_TOOLS = (
    say("user", "Is it warm in Rome?"),
    CALL,
    say("tool", "31 degrees", tool_call_id="1"),
    say("assistant", "Yes."),
)


@pytest.mark.parametrize(
    ("template", "call", "last"),
    [
        pytest.param(
            LLAMA3, '{"name": "weather", "parameters": {"city": "Rome"}}<|eot_id|>', "Yes.<|eot_id|>", id="llama3"
        ),
        pytest.param(
            QWEN3,
            "<think>\n\n</think>\n\n<tool_call>\n"
            '{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>',
            "<think>\n\n</think>\n\nYes.<|im_end|>",
            id="qwen3",
        ),
    ],
)
def test_calls_of_tools_are_learned_and_their_results_are_not(template: str, call: str, last: str) -> None:
    tokenizer = make_tokenizer(template)
    examples = make(tokenizer, talk(*WITH_TOOLS, tools=[WEATHER]))
    assert [piece for example in examples for piece in learned(tokenizer, example)] == [call, last]
    assert all("properties" in tokenizer.decode(example.tokens) for example in examples)


def test_a_template_that_cannot_write_a_call_is_refused() -> None:
    with pytest.raises(JobFailedError, match="does not write the tool call 'weather'; choose a model with tools"):
        make(make_tokenizer(SMOLLM2), talk(*WITH_TOOLS))


@pytest.mark.parametrize(("template", "ignores"), [(SMOLLM2, True), (LLAMA3, False)])
def test_a_template_that_leaves_tools_out_is_noticed(template: str, ignores: bool) -> None:
    maker = ExampleMaker(make_tokenizer(template), system=None, max_length=100)
    assert maker.ignores_tools(talk(*TALK, tools=[WEATHER])) is ignores
    assert not maker.ignores_tools(talk(*TALK))


@pytest.mark.parametrize(("template", "num_open"), [(SMOLLM2, 0), (PHI3, 0), (PLAIN, 1)])
def test_a_template_that_ends_no_turns_is_noticed(template: str, num_open: int) -> None:
    maker = ExampleMaker(make_tokenizer(template), system=None, max_length=100)
    maker.make(talk(USER, REPLY))
    assert maker.num_open == num_open


def test_a_template_that_joins_arguments_as_text_gets_them_as_text() -> None:
    joins = (
        "{% for message in messages %}{% for call in message.tool_calls or [] %}"
        "{{ call.function.name + call.function.arguments }}{% endfor %}{% endfor %}"
    )
    text = render_text(make_tokenizer(joins), talk(*WITH_TOOLS).messages, prompts_reply=False)
    assert text == 'weather{"city": "Rome"}'


def test_what_is_too_long_loses_its_end_and_is_dropped_when_nothing_is_left_to_learn() -> None:
    tokenizer = make_tokenizer(SMOLLM2)
    (whole,) = make(tokenizer, talk(*TALK))
    first_learned = int(whole.is_learned.argmax())
    maker = ExampleMaker(tokenizer, system=None, max_length=first_learned + 2)
    (cut,) = maker.make(talk(*TALK))
    assert cut.tokens.tolist() == whole.tokens[: first_learned + 2].tolist()
    assert (cut.num_learned, maker.num_truncated, maker.num_dropped) == (2, 1, 0)
    maker = ExampleMaker(tokenizer, system=None, max_length=first_learned)
    assert maker.make(talk(*TALK)) == []
    assert (maker.num_truncated, maker.num_dropped) == (1, 1)


def test_a_datum_predicts_each_next_token() -> None:
    (example,) = make(make_tokenizer(LLAMA3), talk(*TALK))
    datum = example.datum()
    assert datum.model_input.to_ints() == example.tokens[:-1].tolist()
    assert datum.loss_fn_inputs["target_tokens"].tolist() == example.tokens[1:].tolist()
    assert datum.loss_fn_inputs["weights"].tolist() == example.is_learned[1:].tolist()
    assert sum(datum.loss_fn_inputs["weights"].tolist()) == example.num_learned


def test_the_tiny_model_learns_its_replies(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    (example,) = make(tokenizer, talk(USER, REPLY, QUESTION, say("assistant", "Paris.")))
    assert learned(tokenizer, example) == ["Hello there.\n", "Paris.\n"]


def test_reading_a_text_in_passages_teaches_every_reply_once() -> None:
    replies = [say("assistant", f"Reply {number}.") for number in range(4)]
    messages = [message for reply in replies for message in (USER, reply)]
    for template in (SMOLLM2, LLAMA3, QWEN3, MISTRAL, R1, PHI3, MARKED, PLAIN):
        tokenizer = make_tokenizer(template)
        found = [
            passage.text[start:end]
            for passage in PassageReader(tokenizer).read(messages)
            for start, end in passage.spans
        ]
        assert len(found) == 4
        assert all(f"Reply {number}." in text for number, text in enumerate(found))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template; choose an instruction-tuned model"),
        ("{{ raise_exception('roles must alternate') }}", "refuses a conversation: roles must alternate"),
        ("{{ messages[7].content }}", "refuses a conversation: "),
    ],
)
def test_a_model_that_cannot_write_a_conversation_is_refused(template: str | None, message: str) -> None:
    with pytest.raises(JobFailedError, match=message):
        render_text(make_tokenizer(template), TALK, prompts_reply=False)


def test_a_tokenizer_that_does_not_tell_where_its_tokens_are_is_refused() -> None:
    with pytest.raises(JobFailedError, match=r"ByT5Tokenizer.*choose a model with a tokenizer\.json"):
        ExampleMaker(ByT5Tokenizer(), system=None, max_length=10)
