"""Datasets, capabilities, tasks and worlds: added to a data directory, whole or not at all, and listed."""

from __future__ import annotations

import stat
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.jobs.test_jobs_library import ROW, WORLD, data, ref, resolve, sft, write
from tinker_jobs.errors import LibraryError
from tinker_jobs.library.datasets import read_prompts, read_rows
from tinker_jobs.library.library import Library

__all__ = ["data"]


def test_an_added_dataset_is_listed_resolved_and_read(tmp_path):
    train = write(tmp_path, {"a.txt": ROW * 3}) / "a.txt"
    test = tmp_path / "b.bin"
    pq.write_table(pa.table({"question": ["1+1?"], "answer": [2]}), test)
    library = Library(tmp_path / "data", "local")
    added = library.add_dataset("sums@1.0.0", {"train": train, "test": test})
    assert {split: found.num_rows for split, found in added.splits.items()} == {"train": 3, "test": 1}
    assert library.list_datasets() == [added]
    library.add_capability("helper@1.0.0", write(tmp_path, {"p.md": "Be brief."}) / "p.md")
    dataset = resolve(tmp_path / "data", sft(dataset_ref=ref())).dataset
    assert dataset is not None
    assert [row["prompt"] for _, row in read_rows(dataset)] == ["2+2?"] * 3
    ((_, prompt),) = read_prompts(dataset, "test")
    assert prompt is not None
    assert prompt.expected_output == "2"


def test_one_file_without_a_split_is_the_whole_dataset(tmp_path):
    library = Library(tmp_path / "data")
    source = write(tmp_path, {"x.jsonl": ROW}) / "x.jsonl"
    assert list(library.add_dataset("one@1", {None: source}).splits) == ["train"]
    assert library.freeze_dataset("one", "1").default_split == "train"
    with pytest.raises(LibraryError, match="needs a split for each"):
        library.add_dataset("one@2", {None: source, "test": source})
    with pytest.raises(LibraryError, match="at least one file"):
        library.add_dataset("one@2", {})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (ROW * 16 + "{oops}\n" + ROW, "row 17: not JSON"),
        (ROW + '{"wrong": 1, "keys": 2}\n', "row 2: it must have messages, steps, or one of prompt"),
        ('{"messages": "hello"}\n', "row 1: messages must be a list"),
        ('{"prompt": {"a": 1}, "answer": "b"}\n', "row 1: prompt must be text"),
        ("", "has no rows"),
        ("\n \n", "has no rows"),
        ("[1]\n", "row 1: must be a JSON object, got list"),
    ],
)
def test_a_dataset_with_a_row_of_no_use_is_not_added(tmp_path, text, says):
    library = Library(tmp_path / "data")
    source = write(tmp_path, {"bad.jsonl": text}) / "bad.jsonl"
    with pytest.raises(LibraryError, match=r"bad\.jsonl") as error:
        library.add_dataset("bad@1", {"train": source})
    assert says in str(error.value)
    assert library.list_datasets() == []
    assert list((tmp_path / "data/datasets").iterdir()) == []


def test_what_was_added_never_changes(tmp_path):
    library = Library(tmp_path / "data")
    source = write(tmp_path, {"x.jsonl": ROW, "w.yaml": "server_url: http://x", "t.yaml": "a: b", "c.md": "C."})
    library.add_dataset("one@1", {None: source / "x.jsonl"})
    library.add_capability("one@1", source / "c.md")
    library.add_task("one@1", source / "t.yaml")
    library.add_world("one", source / "w.yaml")
    again = [
        lambda: library.add_dataset("one@1", {None: source / "x.jsonl"}),
        lambda: library.add_capability("one@1", source / "c.md"),
        lambda: library.add_task("one@1", source / "t.yaml"),
        lambda: library.add_world("one", source / "w.yaml"),
    ]
    for add in again:
        with pytest.raises(LibraryError, match="exists already"):
            add()


def test_of_many_that_add_the_same_version_at_once_one_succeeds(tmp_path):
    sources = [write(tmp_path, {f"{n}.jsonl": f'{{"prompt": "{n}"}}\n'}) / f"{n}.jsonl" for n in range(8)]
    start, outcomes = threading.Barrier(8), list[object]()

    def add(source: Path) -> None:
        library = Library(tmp_path / "data")
        start.wait()
        try:
            library.add_dataset("race@1", {None: source})
            library.add_world(
                "race", write(source.parent, {f"{source.stem}/w": "server_url: http://x"}) / source.stem / "w"
            )
            outcomes.append(source.stem)
        except LibraryError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=add, args=(source,)) for source in sources]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = [one for one in outcomes if isinstance(one, str)]
    assert sum("exists already" in str(one) for one in outcomes) == 7
    dataset = Library(tmp_path / "data").freeze_dataset("race", "1")
    assert [row["prompt"] for _, row in read_rows(dataset)] == [winner]
    assert [path.name for path in (tmp_path / "data/datasets").iterdir()] == ["race"]


def test_capabilities_tasks_and_worlds_are_checked_before_they_are_there(tmp_path):
    library = Library(tmp_path / "data")
    source = write(
        tmp_path / "source",
        {"cap/capability.yaml": "entry_agent: x", "task/other.txt": "", "w.yaml": "goal: x", "empty/sub/.keep": ""},
    )
    (tmp_path / "nothing").mkdir()
    (source / "empty/link").symlink_to("/etc/passwd")
    refused = [
        (lambda: library.add_capability("c@1", source / "cap"), "has no agent 'x'"),
        (lambda: library.add_capability("c@1", source / "empty"), "is a link or no plain file"),
        (lambda: library.add_capability("c@1", tmp_path / "nothing"), "is empty"),
        (lambda: library.add_capability("c@1", source / "gone"), "does not exist, or is no file"),
        (lambda: library.add_task("t@1", source / "task"), "task.yaml is missing"),
        (lambda: library.add_world("w", source / "w.yaml"), "server_url is missing"),
        (lambda: library.add_dataset("d@1", {"train": source / "cap"}), "does not exist, or is no file"),
        (lambda: library.add_dataset("d@1", {"../x": source / "w.yaml"}), "a split must be 1 to 128"),
        (lambda: library.add_dataset("d", {None: source / "w.yaml"}), "a dataset is written name@version"),
        (lambda: library.add_dataset("../d@1", {None: source / "w.yaml"}), "a dataset's name must be"),
    ]
    for add, says in refused:
        with pytest.raises(LibraryError) as error:
            add()
        assert says in str(error.value)
    assert [path for path in (tmp_path / "data").rglob("*") if path.is_file()] == []
    assert library.list_capabilities() == library.list_tasks() == library.list_worlds() == []


def test_a_worlds_file_can_be_read_only_by_its_owner(tmp_path):
    library = Library(tmp_path / "data")
    source = write(tmp_path, {"w.yaml": WORLD, "prompt.md": "P."})
    added = library.add_world("castle", source / "w.yaml")
    assert (added.server_url, added.runtimes) == ("http://127.0.0.1:9000", ("red", "blue", "gone"))
    path = tmp_path / "data/worlds/castle.yaml"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert library.list_worlds() == [added]
    assert library.read_world("castle")[1].auth_token == "t0p"


def test_folders_are_added_whole_and_listed_with_what_matters(tmp_path):
    library = Library(tmp_path / "data")
    source = write(
        tmp_path / "source",
        {
            "cap/capability.yaml": "entry_agent: x",
            "cap/agents/x.md": "---\na: b\n---\nX.",
            "cap/tools/t.py": "pass",
            "task/task.yaml": "instruction: Go.\nverification: {hash: x}",
        },
    )
    capability = library.add_capability("c@1", source / "cap")
    assert (capability.prompt, capability.error) == ("X.", None)
    assert (tmp_path / "data/capabilities/c/1/tools/t.py").read_text() == "pass"
    task = library.add_task("t@1", source / "task")
    assert (task.instruction, task.verification) == ("Go.", "flag")
    assert (library.list_capabilities(), library.list_tasks()) == ([capability], [task])


def test_what_is_broken_is_listed_with_why(data):
    write(data, {"datasets/bad/1/x.csv": "", "capabilities/bad/1/capability.yaml": "{", "tasks/bad/1/x": ""})
    write(data, {"worlds/bad.yaml": "[]"})
    library = Library(data)
    listed = [library.list_datasets(), library.list_capabilities(), library.list_tasks(), library.list_worlds()]
    errors = [[record.error for record in records if record.error] for records in listed]
    assert [len(found) for found in errors] == [1, 1, 1, 1]
    assert [(one.name, one.version) for one in library.list_datasets()] == [
        ("bad", "1"),
        ("sums", "1.0.0"),
        ("sums", "2.0.0"),
    ]
