"""Datasets, capabilities, tasks and worlds of a data directory: found and frozen."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinker_jobs.errors import JobRequestError, LibraryError
from tinker_jobs.library.datasets import read_rows
from tinker_jobs.library.library import Library
from tinker_jobs.protocol import CONVERTER
from tinker_jobs.refs import FrozenRefs
from tinker_jobs.requests import parse

ROW = '{"prompt": "2+2?", "answer": "4"}\n'


def write(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    return root


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(
        tmp_path / "data",
        {
            "datasets/sums/1.0.0/data.jsonl": ROW,
            "datasets/sums/2.0.0/train.jsonl": ROW * 2,
            "datasets/sums/2.0.0/test.jsonl": ROW,
            "capabilities/helper/1.0.0/prompt.md": "Be brief.\n",
            "tasks/flag/1.0.0/task.yaml": "instruction: Find it.\n",
        },
    )


def rl(**config: Any) -> dict[str, Any]:
    return {"backend": "tinker", "trainer_type": "rl", "config": {"algorithm": "ppo", **config}}


def sft(**config: Any) -> dict[str, Any]:
    return {"backend": "tinker", "trainer_type": "sft", "config": config}


def ref(name: str = "sums", version: str = "1.0.0") -> dict[str, str]:
    return {"name": name, "version": version}


def resolve(data: Path, request: Mapping[str, Any], capability: Mapping[str, str] | None = None) -> FrozenRefs:
    named = ref("helper") if capability is None else capability
    return Library(data, "local").resolve(parse({"model": "m", "capability_ref": named, **request}))


def mistakes(data: Path, request: Mapping[str, Any], capability: Mapping[str, str] | None = None) -> dict[str, str]:
    with pytest.raises(JobRequestError) as error:
        resolve(data, request, capability)
    return {".".join(map(str, one.loc)): one.msg for one in error.value.mistakes}


# --- resolving --------------------------------------------------------------------------------------------------------


def test_all_references_of_a_request_are_frozen_and_survive_the_way_through_json(data):
    refs = resolve(
        data,
        rl(prompt_dataset_ref=ref(), eval_dataset_ref=ref(), trajectory_dataset_refs=[ref(), ref()], task_ref="flag"),
    )
    assert (str(refs.capability), refs.capability.prompt) == ("helper@1.0.0", "Be brief.")
    assert refs.capability.runtime_digest.startswith("sha256:")
    assert str(refs.task) == "flag@1.0.0"
    assert refs.task is not None
    assert refs.task.instruction == "Find it."
    assert [str(one) for one in refs.trajectory_datasets] == ["sums@1.0.0", "sums@1.0.0"]
    assert CONVERTER.structure(CONVERTER.unstructure(refs), FrozenRefs) == refs


def test_all_wrong_references_are_reported_at_once_each_at_its_place(data):
    request = rl(
        prompt_dataset_ref=ref("sums", "2.0.0"),
        prompt_split="validation",
        trajectory_dataset_refs=[ref(), ref("sums", "3"), ref("diffs")],
        eval_dataset_ref=ref("sums", "4"),
        task_ref="flag@9",
        world_manifest_id="castle",
    )
    assert mistakes(data, request, ref("helper", "2")) == {
        "body.capability_ref": "capability not found: helper@2 (known versions: 1.0.0)",
        "body.config.prompt_split": "sums@2.0.0 has no split 'validation' (known splits: test, train)",
        "body.config.trajectory_dataset_refs.1": "dataset not found: sums@3 (known versions: 1.0.0, 2.0.0)",
        "body.config.trajectory_dataset_refs.2": (
            "dataset not found: diffs@1.0.0 (it has no version here; known names: sums)"
        ),
        "body.config.eval_dataset_ref": "dataset not found: sums@4 (known versions: 1.0.0, 2.0.0)",
        "body.config.task_ref": "task not found: flag@9 (known versions: 1.0.0)",
        "body.config.world_manifest_id": (
            "worlds are not configured on this server; put castle.yaml with the world's server_url into the folder "
            "'worlds' of the data directory, or use: tinker-server jobs add-world"
        ),
    }


def test_the_references_of_a_grpo_job_are_frozen_too(data):
    config = {"prompt_dataset_ref": ref(), "task_ref": "flag"}
    refs = resolve(data, {"backend": "ray", "trainer_type": "rl", "config": config})
    assert (str(refs.prompt_dataset), str(refs.task)) == ("sums@1.0.0", "flag@1.0.0")
    wrong = {"prompt_dataset_ref": ref("sums", "9"), "task_ref": "goal"}
    found = mistakes(data, {"backend": "ray", "trainer_type": "rl", "config": wrong})
    assert list(found) == ["body.config.prompt_dataset_ref", "body.config.task_ref"]


def test_an_empty_data_directory_says_how_to_fill_it(tmp_path):
    found = mistakes(tmp_path, sft(dataset_ref=ref()))
    assert "tinker-server jobs add-capability" in found["body.capability_ref"]
    assert "tinker-server jobs add-dataset" in found["body.config.dataset_ref"]


@pytest.mark.parametrize(
    ("config", "split"),
    [
        (sft(dataset_ref=ref()), "train"),
        (sft(dataset_ref=ref("sums", "2.0.0")), "train"),
        (rl(prompt_dataset_ref=ref("sums", "2.0.0")), "train"),
        (rl(prompt_dataset_ref=ref("sums", "2.0.0"), prompt_split="test"), "test"),
    ],
)
def test_a_dataset_is_read_in_the_split_that_was_asked_for_else_in_train(data, config, split):
    refs = resolve(data, config)
    dataset = refs.dataset or refs.prompt_dataset
    assert dataset is not None
    assert dataset.default_split == split
    assert len(list(read_rows(dataset))) == (2 if split == "train" and dataset.version == "2.0.0" else 1)


def test_evaluation_reads_what_is_held_out(data):
    refs = resolve(data, sft(dataset_ref=ref("sums", "2.0.0"), eval_dataset_ref=ref("sums", "2.0.0")))
    assert refs.dataset is not None
    assert refs.eval_dataset is not None
    assert (refs.dataset.default_split, refs.eval_dataset.default_split) == ("train", "test")
    single = resolve(data, sft(dataset_ref=ref(), eval_dataset_ref=ref()))
    assert single.eval_dataset == single.dataset


def test_a_dataset_with_splits_of_which_none_is_train_is_only_read_by_the_split(data):
    write(data, {"datasets/parts/1.0.0/one.jsonl": ROW, "datasets/parts/1.0.0/two.jsonl": ROW})
    assert mistakes(data, sft(dataset_ref=ref("parts"), eval_dataset_ref=ref("parts"))) == {
        "body.config.dataset_ref": "parts@1.0.0 has no split 'train' (known splits: one, two)",
        "body.config.eval_dataset_ref": "parts@1.0.0 has no split to evaluate on (known splits: one, two)",
    }
    assert resolve(data, rl(prompt_dataset_ref=ref("parts"), prompt_split="two")).prompt_dataset is not None


def test_a_split_without_a_prompt_dataset_is_refused(data):
    request = rl(trajectory_dataset_refs=[ref()], prompt_split="train")
    assert mistakes(data, request) == {"body.config.prompt_split": "prompt_split requires prompt_dataset_ref"}


def test_a_manifest_names_the_files_of_splits(data):
    folder = {
        "datasets/m/1.0.0/parts/a.jsonl": ROW,
        "datasets/m/1.0.0/dataset.yaml": "splits: {train: ./parts/a.jsonl}",
    }
    write(data, folder)
    dataset = resolve(data, sft(dataset_ref=ref("m"))).dataset
    assert dataset is not None
    assert list(dataset.splits) == ["train"]


@pytest.mark.parametrize(
    ("manifest", "says"),
    [
        ("splits: {train: ../../sums/1.0.0/data.jsonl}", "must name a file in the dataset's folder"),
        ("splits: {train: /etc/passwd}", "must name a file in the dataset's folder"),
        ("splits: {train: 3}", "must name a file in the dataset's folder"),
        ("splits: {train: gone.jsonl}", "gone.jsonl is missing or no file"),
        ("splits: [train]", "splits must map names to files"),
        ("splits: {}", "splits must map names to files"),
        ("- a list", "dataset.yaml must be a mapping"),
        ("splits: {a: b", "dataset.yaml is not YAML"),
        ("splits: !!binary aGk=", "holds a value that JSON has no form for"),
        ("a: &a [x]\nb: [*a, *a]", "dataset.yaml is not YAML: aliases are not supported"),
        ("[" * 400, "holds a value that JSON has no form for"),
        ("# " + "x" * 300_000, "dataset.yaml is larger than 262144 bytes"),
        ("x: !!python/object:os.system {}", "dataset.yaml is not YAML"),
    ],
)
def test_a_bad_dataset_manifest_is_a_mistake_that_names_the_file(data, manifest, says):
    write(data, {"datasets/m/1.0.0/train.jsonl": ROW, "datasets/m/1.0.0/dataset.yaml": manifest})
    message = mistakes(data, sft(dataset_ref=ref("m")))["body.config.dataset_ref"]
    assert message.startswith("dataset m@1.0.0: ")
    assert says in message


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"notes.csv": "a,b"}, "holds no .jsonl or .parquet file"),
        ({"data.jsonl": ROW, "train.jsonl": ROW}, "both data.jsonl and train.jsonl are split 'train'"),
        ({"a.jsonl": ROW, "a.parquet": ROW}, "both a.jsonl and a.parquet are split 'a'"),
        ({"a.jsonl/b": ROW}, "a.jsonl is missing or no file"),
    ],
)
def test_a_dataset_folder_that_says_nothing_clear_is_refused(data, files, says):
    write(data / "datasets/odd/1", files)
    assert says in mistakes(data, sft(dataset_ref=ref("odd", "1")))["body.config.dataset_ref"]


EVIL = ("../sums", "..", ".", "", "/etc", "a/b", "a\0b", "a\nb", "sums\\1", ".hidden", "ä", "x" * 129, "a b")


@pytest.mark.parametrize("name", EVIL)
def test_no_name_or_version_leads_out_of_its_folder(data, name):
    write(data, {"secret.jsonl": ROW})
    requests = [
        (sft(dataset_ref=ref(name)), "body.config.dataset_ref"),
        (sft(dataset_ref=ref("sums", name)), "body.config.dataset_ref"),
        (rl(prompt_dataset_ref=ref(), task_ref=f"{name}@1.0.0"), "body.config.task_ref"),
        (rl(world_manifest_id=name), "body.config.world_manifest_id"),
    ]
    for request, place in requests:
        found = mistakes(data, request)
        assert list(found) == [place]
        assert re.search("must be 1 to 128 letters|of another organization|is written name@version", found[place])


@settings(max_examples=40)
@given(text=st.text(max_size=12))
def test_any_text_as_a_name_is_found_or_refused_with_words(text):
    library = Library(Path("/nonexistent"), "local")
    for find in (library.freeze_dataset, library.freeze_capability):
        with pytest.raises(LibraryError, match=r"."):
            find(text, text)
    with pytest.raises(LibraryError, match=r"."):
        library.freeze_task(text)
    with pytest.raises(LibraryError, match=r"."):
        library.read_world(text)


def test_the_own_organization_is_left_out_of_names_and_another_is_refused(data):
    refs = resolve(data, sft(dataset_ref=ref("local/sums")), ref("local/helper"))
    assert (str(refs.dataset), str(refs.capability)) == ("sums@1.0.0", "helper@1.0.0")
    found = mistakes(data, rl(prompt_dataset_ref=ref("acme/sums"), task_ref="local/flag@1.0.0"))
    assert found == {
        "body.config.prompt_dataset_ref": (
            "dataset 'acme/sums' is of another organization than this server's: its organization is 'local'"
        )
    }


# --- capabilities -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "prompt"),
    [
        ({"prompt.md": "Hi."}, "Hi."),
        ({"prompt.md": "\ufeff---\r\nname: x\r\n---\r\n\r\nHi.\r\n"}, "Hi."),
        ({"prompt.md": "---\n---\nHi."}, "Hi."),
        ({"prompt.md": "---\na: b\n---"}, None),
        ({"prompt.md": "--- a rule\n\nHi. ---"}, "--- a rule\n\nHi. ---"),
        ({"prompt.md": "---\nno end"}, "---\nno end"),
        ({"prompt.md": "  \n"}, None),
        ({"agents/one.md": "One."}, "One."),
        ({"agents/one.md": "One.", "agents/two.md": "Two.", "capability.yaml": "entry_agent: two"}, "Two."),
        ({"agents/one.md": "One.", "prompt.md": "P.", "capability.yaml": "entry_agent: one\nversion: 3"}, "One."),
        ({"agents/one.md": "One.", "prompt.md": "P."}, "P."),
        ({"tools/x.py": "pass"}, None),
    ],
)
def test_the_prompt_of_a_capability_is_that_of_its_entry_agent(data, files, prompt):
    write(data / "capabilities/c/1", files)
    assert resolve(data, sft(dataset_ref=ref()), ref("c", "1")).capability.prompt == prompt


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"agents/a.md": "", "agents/b.md": ""}, "has agents a, b; name one as entry_agent in capability.yaml"),
        ({"agents/a.md": "", "capability.yaml": "entry_agent: b"}, "has no agent 'b', which would be agents/b.md"),
        ({"capability.yaml": "entry_agent: ../../helper/1.0.0/prompt"}, "an agent's name must be 1 to 128"),
        ({"capability.yaml": "entry_agent: [a]"}, "capability.yaml: entry_agent must be text"),
        ({"capability.yaml": "{"}, "capability.yaml is not YAML"),
        ({"prompt.md/x": ""}, "prompt.md is missing or no file"),
        ({"prompt.md": "x" * (1024 * 1024 + 1)}, "prompt.md is larger than 1048576 bytes"),
    ],
)
def test_a_bad_capability_is_a_mistake_that_names_the_file(data, files, says):
    write(data / "capabilities/c/1", files)
    message = mistakes(data, sft(dataset_ref=ref()), ref("c", "1"))["body.capability_ref"]
    assert message.startswith("capability c@1")
    assert says in message


def test_a_prompt_that_is_not_utf8_is_a_mistake(data):
    write(data, {"capabilities/c/1/prompt.md": ""})
    (data / "capabilities/c/1/prompt.md").write_bytes(b"caf\xe9")
    assert "prompt.md is not UTF-8" in mistakes(data, sft(dataset_ref=ref()), ref("c", "1"))["body.capability_ref"]


def test_the_digest_of_a_capability_changes_with_any_name_or_byte_of_its_files(data):
    def digest(files: Mapping[str, str], name: str) -> str:
        write(data / f"capabilities/{name}/1", files)
        return resolve(data, sft(dataset_ref=ref()), ref(name, "1")).capability.runtime_digest

    first = digest({"prompt.md": "a", "tools/x": "b"}, "one")
    assert digest({"tools/x": "b", "prompt.md": "a"}, "same") == first
    others = [
        digest({"prompt.md": "a", "tools/x": "c"}, "byte"),
        digest({"prompt.md": "a", "tools/y": "b"}, "name"),
        digest({"prompt.md": "ab", "tools/x": ""}, "border"),
        digest({"prompt.md": "a"}, "fewer"),
    ]
    assert len({first, *others}) == 5


# --- tasks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("versions", "latest"),
    [
        (("1.9.0", "1.10.0", "1.2.0"), "1.10.0"),
        (("1.0.0", "1.0.0-rc1"), "1.0.0"),
        (("2024-x", "beta", "0.1"), "0.1"),
        (("alpha", "beta"), "beta"),
    ],
)
def test_a_task_without_a_version_is_the_highest_and_the_job_keeps_it(data, versions, latest):
    write(data, {f"tasks/t/{version}/task.yaml": f"instruction: '{version}'" for version in versions})
    task = resolve(data, rl(prompt_dataset_ref=ref(), task_ref="t")).task
    assert task is not None
    assert (str(task), task.instruction) == (f"t@{latest}", latest)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"readme": ""}, "task t@1: task.yaml is missing or no file"),
        ({"task.yaml": ""}, "task t@1: task.yaml must be a mapping"),
        ({"task.yaml": "a: [b"}, "task t@1: task.yaml is not YAML"),
        ({"task.yaml": "instruction: {a: 1}"}, "instruction must be text"),
        ({"task.yaml": "verification: flag"}, "verification must be a mapping with a method"),
        ({"task.yaml": "1: a"}, "holds a value that JSON has no form for"),
    ],
)
def test_a_bad_task_is_a_mistake_that_names_the_file(data, files, says):
    write(data / "tasks/t/1", files)
    assert says in mistakes(data, rl(prompt_dataset_ref=ref(), task_ref="t@1"))["body.config.task_ref"]


def test_a_task_keeps_all_of_its_file(data):
    write(data, {"tasks/t/1/task.yaml": "verification: {method: flag, hash: 'sha256:00'}\nimage: x\nday: 2026-01-02\n"})
    task = resolve(data, rl(prompt_dataset_ref=ref(), task_ref="t@1")).task
    assert task is not None
    assert task.verification == {"method": "flag", "hash": "sha256:00"}
    assert (task.content["image"], task.content["day"]) == ("x", "2026-01-02")


# --- worlds -----------------------------------------------------------------------------------------------------------

WORLD = """\
server_url: http://127.0.0.1:9000
auth_token: t0p
goal: Open the door
runtimes:
  red: {capability: helper@1.0.0, agents: [scout]}
  blue: {capability: local/helper@1.0.0}
  gone: {capability: helper@7}
"""


@pytest.fixture
def world(data: Path) -> Path:
    return write(data, {"worlds/castle.yaml": WORLD, "capabilities/helper/1.0.0/agents/scout.md": "Look around."})


def test_a_world_has_its_goal_and_the_prompt_of_its_runtimes_agent_but_no_token(world):
    found = resolve(world, rl(world_manifest_id="castle", world_runtime_id="red", world_agent_name="scout")).world
    assert found is not None
    assert (found.server_url, found.goal) == ("http://127.0.0.1:9000", "Open the door")
    assert (found.runtime_id, found.agent_name, found.agent_prompt) == ("red", "scout", "Look around.")
    assert "t0p" not in str(CONVERTER.unstructure(found))
    entry = resolve(world, rl(world_manifest_id="castle", world_runtime_id="blue", world_goal="Hide")).world
    assert entry is not None
    assert (entry.agent_prompt, entry.goal) == ("Be brief.", "Hide")
    alone = resolve(world, rl(world_manifest_id="castle")).world
    assert alone is not None
    assert (alone.runtime_id, alone.agent_prompt) == (None, None)


@pytest.mark.parametrize(
    ("config", "place", "says"),
    [
        ({"world_manifest_id": "tower"}, "world_manifest_id", "world not found: tower (known worlds: castle)"),
        (
            {"world_manifest_id": "castle", "world_runtime_id": "green"},
            "world_runtime_id",
            "world castle has no runtime 'green' (known runtimes: red, blue, gone)",
        ),
        (
            {"world_manifest_id": "castle", "world_runtime_id": "gone"},
            "world_runtime_id",
            "capability not found: helper@7 (known versions: 1.0.0)",
        ),
        (
            {"world_manifest_id": "castle", "world_runtime_id": "red", "world_agent_name": "knight"},
            "world_agent_name",
            "runtime red has no agent 'knight' (known agents: scout)",
        ),
        (
            {"world_manifest_id": "castle", "world_runtime_id": "blue", "world_agent_name": "knight"},
            "world_agent_name",
            "capability helper@1.0.0 has no agent 'knight', which would be agents/knight.md (known agents: scout)",
        ),
    ],
)
def test_a_wrong_part_of_a_world_is_named(world, config, place, says):
    found = mistakes(world, rl(**config))
    assert found == {f"body.config.{place}": says}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("goal: x", "worlds/w.yaml: server_url is missing"),
        ("server_url: ftp://x", "server_url must be an http or https URL"),
        ("server_url: 'http://x:port'", "server_url must be an http or https URL"),
        ("server_url: http://x\nauth_tokn: y", "unknown keys auth_tokn"),
        ("server_url: http://x\nauth_token: 7", "auth_token must be text"),
        ("server_url: http://x\nruntimes: [a]", "runtimes must map ids to capabilities"),
        ("server_url: http://x\nruntimes: {a: b}", "runtime 'a' must be a mapping"),
        ("server_url: http://x\nruntimes: {a: {}}", "runtime 'a': capability is missing"),
        ("server_url: http://x\nruntimes: {a: {capability: x}}", "a capability is written name@version"),
        ("server_url: http://x\nruntimes: {a: {capability: x@1, agents: b}}", "agents must be a list of names"),
        ("server_url: http://x\nruntimes: {a: {capability: x@1, agent: b}}", "runtime 'a': unknown keys agent"),
        ("server_url: [", "worlds/w.yaml is not YAML"),
    ],
)
def test_a_bad_world_is_a_mistake_that_names_the_file(data, text, says):
    write(data, {"worlds/w.yaml": text})
    assert says in mistakes(data, rl(world_manifest_id="w"))["body.config.world_manifest_id"]
