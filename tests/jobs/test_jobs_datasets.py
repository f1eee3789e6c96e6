"""Rows of datasets as a job reads them, and what it says about those that it cannot read."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tracemalloc
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinker_jobs.errors import JobFailedError
from tinker_jobs.library.datasets import NO_CONVERSATIONS, read_conversations, read_prompts, read_rows
from tinker_jobs.library.jsonl import MAX_LINE_BYTES
from tinker_jobs.refs import FrozenDataset, FrozenFile

ROW = b'{"prompt": "2+2?", "answer": "4"}\n'


def freeze(path: Path) -> FrozenDataset:
    with path.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    file = FrozenFile(path=str(path), size_bytes=path.stat().st_size, sha256=sha256)
    return FrozenDataset(name="sums", version="1.0.0", splits={"train": file}, default_split="train")


def jsonl(folder: Path, content: bytes) -> FrozenDataset:
    path = folder / "train.jsonl"
    path.write_bytes(content)
    return freeze(path)


def parquet(folder: Path, table: pa.Table, **options: Any) -> FrozenDataset:
    path = folder / "train.parquet"
    pq.write_table(table, path, **options)
    return freeze(path)


def failure(dataset: FrozenDataset) -> str:
    with pytest.raises(JobFailedError) as error:
        list(read_rows(dataset))
    return str(error.value)


# --- JSONL ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "numbers"),
    [
        (ROW + ROW, [1, 2]),
        (ROW + ROW.rstrip(), [1, 2]),
        (b"\xef\xbb\xbf" + ROW, [1]),
        (b"\n  \n" + ROW + b"\r\n\t" + ROW.replace(b"\n", b"\r\n") + b"\n\n", [3, 5]),
    ],
)
def test_rows_of_jsonl_are_numbered_by_line_and_empty_lines_are_passed_over(tmp_path, content, numbers):
    rows = list(read_rows(jsonl(tmp_path, content)))
    assert [number for number, _ in rows] == numbers
    assert {json.dumps(row) for _, row in rows} == {ROW.decode().strip()}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"prompt": ', "row 17: not JSON: "),
        (b"nonsense", "row 17: not JSON: "),
        (b'{"a": 1} {"b": 2}', "row 17: not JSON: "),
        (b"[1, 2]", "row 17: must be a JSON object, got list: b'[1, 2]"),
        (b'"text"', "row 17: must be a JSON object, got str"),
        (b"null", "row 17: must be a JSON object, got NoneType"),
        (b'{"a": "caf\xe9"}', "row 17: not UTF-8: invalid continuation byte at byte 10"),
        ('{"a": 1}'.encode("utf-16"), "row 17: not UTF-8: "),
        (b'{"reward": NaN}', "row 17: not JSON: "),
        (b'{"reward": -Infinity}', "row 17: not JSON: "),
        (b'{"reward": 1e999}', "row 17: not JSON: "),
        (rb'{"prompt": "\ud800"}', "row 17: not JSON: "),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "row 17: not JSON: "),
        (b'{"a": ' + b"9" * 10_000 + b"}", "row 17: not JSON: "),
        (b"\0" * 100, "row 17: not JSON: "),
    ],
)
def test_a_row_that_cannot_be_read_ends_the_job_with_its_number(tmp_path, line, says):
    found = failure(jsonl(tmp_path, ROW * 16 + line + b"\n" + ROW))
    assert found.startswith(f"dataset sums@1.0.0, train.jsonl: {says}")
    assert len(found) < 400


def test_rows_before_a_bad_one_are_read(tmp_path):
    rows = read_rows(jsonl(tmp_path, ROW * 2 + b"{"))
    assert [next(rows)[0], next(rows)[0]] == [1, 2]
    with pytest.raises(JobFailedError, match="row 3"):
        next(rows)


def test_integers_of_any_length_keep_all_their_digits(tmp_path):
    ((_, row),) = read_rows(jsonl(tmp_path, b'{"answer": 123456789012345678901234567890, "half": 0.5}\n'))
    assert row == {"answer": 123456789012345678901234567890, "half": 0.5}


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf", None])
def test_a_dataset_without_rows_ends_the_job(tmp_path, content):
    empty = parquet(tmp_path, pa.table({"x": []})) if content is None else jsonl(tmp_path, content)
    with pytest.raises(JobFailedError) as error:
        list(read_conversations(empty))
    name = Path(empty.splits["train"].path).name
    assert str(error.value) == f"{NO_CONVERSATIONS} dataset sums@1.0.0, {name}: it has no rows"


def test_a_line_without_end_is_refused_before_it_fills_the_memory(tmp_path):
    check_long_line(tmp_path, 48 * 1024 * 1024)


@pytest.mark.slow
def test_a_line_of_a_gigabyte_is_refused_before_it_fills_the_memory(tmp_path):
    check_long_line(tmp_path, 1024 * 1024 * 1024)


def check_long_line(folder: Path, size_bytes: int) -> None:
    path = folder / "train.jsonl"
    with path.open("wb") as stream:
        stream.write(ROW * 16 + b'{"prompt": "')
        stream.truncate(stream.tell() + size_bytes)
    dataset = freeze(path)
    tracemalloc.start()
    try:
        said = failure(dataset)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert said == (
        f"dataset sums@1.0.0, train.jsonl: row 17: longer than {MAX_LINE_BYTES} bytes; is a line break missing?"
    )
    assert peak < 2.5 * MAX_LINE_BYTES


@settings(max_examples=40)
@given(
    content=st.binary(max_size=200)
    | st.lists(st.sampled_from([ROW, b"{", b'"', b"\xef\xbb\xbf", b"\n", b"PAR1"])).map(b"".join)
)
def test_any_bytes_are_rows_or_a_failure_that_names_the_file(tmp_path_factory, content):
    dataset = jsonl(tmp_path_factory.getbasetemp(), content)
    try:
        for number, row in read_rows(dataset):
            assert number >= 1
            json.dumps(row, allow_nan=False).encode()
    except JobFailedError as error:
        assert str(error).startswith("dataset sums@1.0.0, train.jsonl: ")  # noqa: PT017 - either is right


# --- Parquet ----------------------------------------------------------------------------------------------------------


def test_rows_of_parquet_have_the_values_of_json(tmp_path):
    day = datetime(2026, 1, 2, tzinfo=UTC)
    table = pa.table(
        {
            "messages": [
                [{"role": "user", "content": "hi", "name": None}],
                [{"role": "user", "content": "x", "name": "bo"}],
            ],
            "reward": [1, None],
            "day": [day, day],
            "price": [Decimal("1.50"), None],
            "map": pa.array([[("a", 1)], []], pa.map_(pa.string(), pa.int64())),
            "kind": pa.array(["a", "b"]).dictionary_encode(),
        }
    )
    rows = [row for _, row in read_rows(parquet(tmp_path, table))]
    assert rows[0] == {
        "messages": [{"role": "user", "content": "hi"}],
        "reward": 1,
        "day": "2026-01-02T00:00:00+00:00",
        "price": "1.50",
        "map": {"a": 1},
        "kind": "a",
    }
    assert rows[1]["messages"] == [{"role": "user", "content": "x", "name": "bo"}]
    assert (rows[1]["reward"], rows[1]["kind"]) == (None, "b")


def test_rows_of_parquet_are_numbered_over_all_row_groups(tmp_path):
    dataset = parquet(tmp_path, pa.table({"n": list(range(1000))}), row_group_size=77)
    assert [(number, row["n"]) for number, row in read_rows(dataset)] == [(n + 1, n) for n in range(1000)]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ([0.5] * 16 + [float("nan")], "row 17: nan has no form in JSON; leave its column out"),
        ([0.5] * 16 + [float("inf")], "row 17: inf has no form in JSON; leave its column out"),
        ([b"raw"], "row 1: b'raw' has no form in JSON; leave its column out"),
        ([[{"x": b"raw"}]], "row 1: b'raw' has no form in JSON; leave its column out"),
    ],
)
def test_a_parquet_row_without_a_form_in_json_ends_the_job_with_its_number(tmp_path, values, says):
    assert failure(parquet(tmp_path, pa.table({"x": values}))) == f"dataset sums@1.0.0, train.parquet: {says}"


def test_parquet_text_that_is_not_utf8_ends_the_job_with_its_row(tmp_path):
    text = pa.array([b"ok"] * 99 + [b"caf\xe9"] + [b"ok"], pa.binary())
    table = pa.table({"prompt": pa.StringArray.from_buffers(len(text), *text.buffers()[1:])})
    assert failure(parquet(tmp_path, table)).startswith("dataset sums@1.0.0, train.parquet: row 100: not UTF-8: ")


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.99])
def test_a_parquet_file_that_is_cut_short_ends_the_job(tmp_path, kept):
    dataset = parquet(tmp_path, pa.table({"prompt": [f"question {n}" for n in range(2000)]}))
    path = Path(dataset.splits["train"].path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    assert failure(freeze(path)).startswith("dataset sums@1.0.0, train.parquet: not a whole Parquet file: ")


def test_a_damaged_page_of_a_parquet_file_ends_the_job(tmp_path):
    dataset = parquet(tmp_path, pa.table({"prompt": [f"question {n}" for n in range(2000)]}), compression="zstd")
    path = Path(dataset.splits["train"].path)
    content = bytearray(path.read_bytes())
    content[40:400] = b"\xff" * 360
    path.write_bytes(content)
    assert failure(freeze(path)).startswith("dataset sums@1.0.0, train.parquet: not a whole Parquet file: ")


@pytest.mark.parametrize(("name", "content"), [("a.parquet", ROW), ("b.jsonl", None)])
def test_what_a_file_is_shows_in_its_bytes_not_in_its_name(tmp_path, name, content):
    if content is None:
        pq.write_table(pa.table({"prompt": ["2+2?"], "answer": ["4"]}), tmp_path / name)
    else:
        (tmp_path / name).write_bytes(content)
    assert [row for _, row in read_rows(freeze(tmp_path / name))] == [{"prompt": "2+2?", "answer": "4"}]


READ = """
import resource, sys
from pathlib import Path
from tinker_jobs.errors import JobFailedError
from tinker_jobs.library.library import Library

dataset = Library(Path(sys.argv[1])).freeze_dataset("long", "1")
from tinker_jobs.library.datasets import read_rows
import pyarrow.parquet
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    rows = sum(1 for _ in read_rows(dataset))
    print("rows", rows)
except JobFailedError as error:
    print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def read_elsewhere(data: Path) -> tuple[str, int]:
    """What reading says in a process of its own, and the MiB that it took at most."""
    run = subprocess.run(
        [sys.executable, "-c", READ, str(data)], capture_output=True, text=True, timeout=110, check=True
    )
    said, took = run.stdout.splitlines()
    return said, int(took)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_dataset(tmp_path):
    folder = tmp_path / "datasets/long/1"
    folder.mkdir(parents=True)
    took = {}
    for suffix in ("jsonl", "parquet"):
        for num_rows in (2_000, 100_000):
            path = folder / f"train.{suffix}"
            rows = ({"prompt": f"{n} " * 400, "answer": "4"} for n in range(num_rows))
            if suffix == "jsonl":
                path.write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
            else:
                pq.write_table(pa.Table.from_pylist(list(rows)), path)  # one row group
            said, took[suffix, num_rows] = read_elsewhere(tmp_path)
            assert said == f"rows {num_rows}"
            path.unlink()
    for suffix in ("jsonl", "parquet"):
        assert took[suffix, 100_000] < took[suffix, 2_000] + 32


# --- the same data as at submission -----------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [b"", ROW * 2, ROW.replace(b"4", b"5")])
def test_a_file_that_changed_since_the_job_was_submitted_is_not_read(tmp_path, change):
    dataset = jsonl(tmp_path, ROW)
    (tmp_path / "train.jsonl").write_bytes(change)
    assert failure(dataset) == (
        "dataset sums@1.0.0, train.jsonl: changed since the job was submitted; submit the job again to train on it"
    )


def test_a_file_that_is_gone_is_named(tmp_path):
    dataset = jsonl(tmp_path, ROW)
    (tmp_path / "train.jsonl").unlink()
    assert failure(dataset).startswith("dataset sums@1.0.0, train.jsonl: gone since the job was submitted: ")


def test_a_split_that_is_not_there_is_named(tmp_path):
    with pytest.raises(JobFailedError, match=r"sums@1.0.0 has no split 'test' \(known splits: train\)"):
        list(read_rows(jsonl(tmp_path, ROW), "test"))


# --- what trainers read -----------------------------------------------------------------------------------------------


def test_a_row_in_no_known_form_is_none(tmp_path):
    dataset = jsonl(tmp_path, ROW + b'{"text": "x"}\n\n' + ROW + b'{"prompt": "only"}\n')
    conversations = [(number, found is not None) for number, found in read_conversations(dataset)]
    assert conversations == [(1, True), (2, False), (4, True), (5, False)]
    answers = [(number, found.expected_output) for number, found in read_prompts(dataset) if found is not None]
    assert answers == [(1, "4"), (4, "4"), (5, None)]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (
            b'{"text": "x", "label": 1}\n{"label": 2, "id": 3}\n',
            (
                "rows must have messages, steps, or one of prompt|input|question|task_prompt with one of "
                "expected_output|target|answer|output; these have text, label, id"
            ),
        ),
        (b"{}\n", "these have no keys"),
        (b"\n", "it has no rows"),
    ],
)
def test_a_dataset_without_a_conversation_says_which_keys_it_has_and_should_have(tmp_path, content, why):
    with pytest.raises(JobFailedError) as error:
        list(read_conversations(jsonl(tmp_path, content)))
    said = str(error.value)
    assert said.startswith(
        "Training inputs did not produce any usable conversations. dataset sums@1.0.0, train.jsonl: "
    )
    assert said.endswith(why)


def test_a_dataset_without_a_prompt_says_which_keys_it_has_and_should_have(tmp_path):
    with pytest.raises(JobFailedError) as error:
        list(read_prompts(jsonl(tmp_path, b'{"text": "x"}\n')))
    assert str(error.value) == (
        "No RL rollouts were generated for training: dataset sums@1.0.0, train.jsonl: "
        "rows must have messages or one of prompt|input|question|task_prompt; these have text"
    )


def test_a_row_with_a_value_of_the_wrong_type_ends_the_job_with_its_number(tmp_path):
    dataset = jsonl(tmp_path, ROW * 16 + b'{"prompt": "x", "answer": "y", "reward": "high"}\n')
    for read in (read_conversations, read_prompts):
        with pytest.raises(JobFailedError) as error:
            list(read(dataset))
        assert str(error.value) == "dataset sums@1.0.0, train.jsonl: row 17: reward must be a number, got 'high'"
