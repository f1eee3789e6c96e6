"""Real questions and answers that come inside a package: chatterbot-corpus, English, each question once."""

from __future__ import annotations

import random
from pathlib import Path

import chatterbot_corpus
import chz
import datasets
import yaml
from running import RENDERER
from tinker_cookbook import renderers
from tinker_cookbook.supervised.data import SupervisedDatasetFromHFDataset, conversation_to_datum
from tinker_cookbook.supervised.types import SupervisedDatasetBuilder
from tinker_cookbook.tokenizer_utils import get_tokenizer

Pair = tuple[str, str]

BATCH_SIZE = 8
HELD_OUT = 24


def load_pairs(seed: int = 0) -> list[Pair]:
    """Shuffled question and answer pairs of at most 200 characters together."""
    answers: dict[str, Pair] = {}
    for file in sorted((Path(chatterbot_corpus.__file__).parent / "data" / "english").glob("*.yml")):
        for question, answer, *_ in yaml.safe_load(file.read_text())["conversations"]:
            answers.setdefault(str(question).strip().lower(), (str(question).strip(), str(answer).strip()))
    pairs = [pair for pair in answers.values() if sum(map(len, pair)) <= 200]
    random.Random(seed).shuffle(pairs)
    return pairs


def held_out_pairs() -> list[Pair]:
    return load_pairs()[:HELD_OUT]


def training_pairs() -> list[Pair]:
    return load_pairs()[HELD_OUT:]


def conversation(question: str, answer: str) -> list[renderers.Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def chat_dataset(model: str, pairs: list[Pair], batch_size: int = BATCH_SIZE) -> SupervisedDatasetFromHFDataset:
    """Conversations as the trainers take them; the loss is on the answers."""
    renderer = renderers.get_renderer(RENDERER, get_tokenizer(model))
    rows = datasets.Dataset.from_list([{"messages": conversation(*pair)} for pair in pairs])
    return SupervisedDatasetFromHFDataset(
        rows, batch_size, map_fn=lambda row: conversation_to_datum(row["messages"], renderer, max_length=128)
    )


@chz.chz
class Corpus(SupervisedDatasetBuilder):
    """Training pairs, and held-out ones for the trainers that evaluate."""

    model: str

    def __call__(self) -> tuple[SupervisedDatasetFromHFDataset, SupervisedDatasetFromHFDataset]:
        """Both sets."""
        return chat_dataset(self.model, training_pairs()), chat_dataset(self.model, held_out_pairs(), HELD_OUT)
