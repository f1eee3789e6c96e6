"""A supervised job on a real model and real data: what it learns carries over to what it has not seen."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import tinker
import yaml
from transformers import AutoTokenizer

from tests.e2e.conftest import API_KEY, run_server
from tests.jobs.conftest import JobServer
from tests.jobs.smollm2 import find_smollm2
from tests.jobs.supervised import Row, sft_spec, write_dataset
from tests.jobs.workers import run_worker
from tinker_jobs.protocol import EventType
from tinker_jobs.rows import read_conversation
from tinker_jobs.sft.examples import ExampleMaker

HELD_OUT = 40


def chatterbot_rows() -> list[Row]:
    """Questions and answers, shuffled. Questions occur several times in the corpus; each is kept once."""
    corpus = pytest.importorskip("chatterbot_corpus")
    answers: dict[str, Row] = {}
    for file in sorted((Path(corpus.__file__).parent / "data" / "english").glob("*.yml")):
        for question, answer, *_ in yaml.safe_load(file.read_text())["conversations"]:
            row = {"question": str(question).strip(), "answer": str(answer).strip()}
            answers.setdefault(row["question"].lower(), row)
    rows = [row for row in answers.values() if len(row["question"]) + len(row["answer"]) < 300]
    random.Random(0).shuffle(rows)
    return rows


def loss_before(server: JobServer, rows: list[Row]) -> float:
    """Nats per learned token of a model that has learned nothing yet."""
    maker = ExampleMaker(AutoTokenizer.from_pretrained(server.model), system=None, max_length=2048)
    conversations = [read_conversation(row) for row in rows]
    examples = [example for one in conversations if one is not None for example in maker.make(one)]
    with tinker.ServiceClient(base_url=server.url, api_key=API_KEY) as service:
        client = service.create_lora_training_client(base_model=server.model, rank=16, seed=0).result()
        output = client.forward([example.datum() for example in examples], "cross_entropy").result()
    return output.metrics["loss:sum"] / sum(example.num_learned for example in examples)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_held_out_loss_falls_by_half_a_nat_in_twenty_steps(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    model, rows = find_smollm2(), chatterbot_rows()
    refs = {
        "dataset": write_dataset(tmp_path, "chatterbot", rows[HELD_OUT:]),
        "eval_dataset": write_dataset(tmp_path, "held-out", rows[:HELD_OUT]),
    }
    config = {"steps": 20, "batch_size": 8, "learning_rate": 1e-3, "lora_rank": 16}
    with run_server("--base-model", model, "--data-dir", str(tmp_path / "data"), "--dtype", "bfloat16") as url:
        server = JobServer(url, model, tmp_path / "data")
        before = loss_before(server, rows[:HELD_OUT])
        end = run_worker(sft_spec(server, tmp_path / "job", config, refs))[-1]
    assert end.event_type is EventType.TRAINING_END, end
    record_property("held-out loss", f"{before:.3f} before, {end.metrics['eval/loss']:.3f} after")
    assert end.metrics["eval/loss"] < before - 0.5
