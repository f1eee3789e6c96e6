"""Hugging Face weights into ranks of Megatron-Core and out again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.megatron.weight_ranks import SHARD_BYTES
from tests.models import Kind, write_tiny_model

ROOT = Path(__file__).parents[2]
TENSOR, PIPELINE, EXPERT = {"tensor-parallel": 2}, {"pipeline-parallel": 2}, {"expert-parallel": 2}
SEQUENCE = {"sequence-parallel": True}


@attrs.frozen(kw_only=True)
class Case:
    """A model, how it is written, and the world that takes it through."""

    kind: Kind = "llama"
    tie: bool = False
    options: Mapping[str, int | bool] = {}
    vocab_size: int = 112
    saved: torch.dtype = torch.float32
    served: torch.dtype = torch.float32
    stacked: bool = False
    """Whether all experts of a layer are one tensor in the files."""


LOST = "lost-parameter"
CASES = {
    1: {
        "one-rank-llama": Case(),
        "one-rank-qwen2-tied": Case(kind="qwen2", tie=True),
        "one-rank-qwen3": Case(kind="qwen3"),
        "saved-bf16-served-float32": Case(saved=torch.bfloat16),
        "saved-float32-served-bf16": Case(served=torch.bfloat16),
        "one-rank-experts": Case(kind="qwen3_moe"),
    },
    2: {
        "tensor-llama-padded-vocabulary": Case(options=TENSOR, vocab_size=113),
        "tensor-llama-tied-padded-vocabulary": Case(options=TENSOR, tie=True, vocab_size=113),
        "tensor-qwen2": Case(kind="qwen2", options=TENSOR),
        "tensor-qwen3-bf16": Case(kind="qwen3", options=TENSOR, saved=torch.bfloat16, served=torch.bfloat16),
        "data-qwen3-tied": Case(kind="qwen3", tie=True),
        "pipeline-llama": Case(options=PIPELINE),
        "pipeline-qwen2-tied": Case(kind="qwen2", tie=True, options=PIPELINE),
        "pipeline-qwen3": Case(kind="qwen3", options=PIPELINE),
        "expert-parallel": Case(kind="qwen3_moe", options=EXPERT),
        "expert-parallel-stacked": Case(kind="qwen3_moe", options=EXPERT, stacked=True),
        "tensor-and-expert-parallel": Case(kind="qwen3_moe", options=TENSOR | EXPERT | SEQUENCE, vocab_size=113),
    },
    4: {
        "tensor-and-pipeline-qwen2-tied": Case(kind="qwen2", tie=True, options=TENSOR | PIPELINE, vocab_size=113),
        "expert-parallel-pipeline": Case(kind="qwen3_moe", options=EXPERT | PIPELINE),
    },
}
"""By ranks."""


def write_model(directory: Path, case: Case) -> Path:
    path = write_tiny_model(directory, case.kind, tie=case.tie, vocab_size=case.vocab_size)
    if case.saved is not torch.float32:
        file = path / "model.safetensors"
        save_file({name: tensor.to(case.saved) for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    return path


def stack_experts(source: Path, target: Path) -> Path:
    """A copy of a model whose files have all experts of a layer in one tensor."""
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    experts: dict[str, dict[int, dict[str, torch.Tensor]]] = {}
    for name in [name for name in tensors if ".experts." in name]:
        layer, rest = name.split(".experts.")
        expert, kind, _ = rest.split(".")
        experts.setdefault(layer, {}).setdefault(int(expert), {})[kind] = tensors.pop(name)
    assert experts
    for layer, found in experts.items():
        ordered = [found[expert] for expert in sorted(found)]
        gate_up = [torch.cat([one["gate_proj"], one["up_proj"]]) for one in ordered]
        tensors[f"{layer}.experts.gate_up_proj"] = torch.stack(gate_up)
        tensors[f"{layer}.experts.down_proj"] = torch.stack([one["down_proj"] for one in ordered])
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def run_ranks(directory: Path, cases: Sequence[dict[str, Any]], num_ranks: int) -> None:
    """Run cases in a world, which writes into ``directory / "out"``."""
    out = directory / "out"
    out.mkdir()
    plan = directory / "plan.json"
    rendezvous = str(directory / "rendezvous")
    plan.write_text(json.dumps({"world_size": num_ranks, "rendezvous": rendezvous, "cases": cases, "out": str(out)}))
    command = [sys.executable, "-m", "tests.megatron.weight_ranks"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([*command, str(rank), str(plan)], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(num_ranks)
    ]
    try:
        for rank in ranks:
            _, errors = rank.communicate(timeout=240)
            assert rank.returncode == 0, errors
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


@attrs.frozen(kw_only=True)
class Trip:
    """A case that was run."""

    case: Case
    model: Path
    out: Path
    ranks: tuple[dict[str, Any], ...]


WORLDS = [pytest.param(ranks, marks=pytest.mark.slow) for ranks in (1, 2, 4)]


@pytest.fixture(scope="module")
def run_world(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Runs all cases of a world, once; two ranks are given the directories that cannot be read too."""

    @cache
    def run(num_ranks: int) -> Path:
        directory = tmp_path_factory.mktemp("world")
        cases = []
        for name, case in CASES[num_ranks].items():
            dtype = str(case.served).removeprefix("torch.")
            path = write_model(directory / "models" / name, case)
            if case.stacked:
                path = stack_experts(path, directory / "models" / f"{name}-stacked")
            cases.append({"name": name, "model": str(path), "dtype": dtype, "options": dict(case.options)})
        for what in SPOILT if num_ranks == 2 else ():
            path = write_tiny_model(directory / "models" / what, "llama")
            spoil(path, what)
            cases.append({"name": what, "model": str(path), "dtype": "float32", "options": {}})
        if num_ranks == 2:
            path = write_tiny_model(directory / "models" / LOST, "llama")
            lost = "decoder.layers.1.mlp.linear_fc2.weight"
            cases.append({"name": LOST, "model": str(path), "dtype": "float32", "options": TENSOR, "lost": lost})
        run_ranks(directory, cases, num_ranks)
        return directory

    return run


@pytest.fixture(scope="module", params=WORLDS, ids=lambda ranks: f"{ranks} ranks")
def trips(request: pytest.FixtureRequest, run_world: Callable[[int], Path]) -> dict[str, Trip]:
    directory = run_world(request.param)
    return {
        name: Trip(
            case=case,
            model=directory / "models" / name,
            out=directory / "out" / name,
            ranks=tuple(read_report(directory, name, rank) for rank in range(request.param)),
        )
        for name, case in CASES[request.param].items()
    }


def read_report(directory: Path, name: str, rank: int) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((directory / "out" / f"{name}.{rank}.json").read_text())
    return report


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    files = sorted(directory.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def test_weights_come_out_as_they_went_in(trips: dict[str, Trip]) -> None:
    for name, trip in trips.items():
        assert trip.ranks[0]["error"] is None, name
        expected, found = tensors_of(trip.model), tensors_of(trip.out)
        assert found.keys() == expected.keys(), name
        for key, tensor in expected.items():
            assert found[key].dtype == trip.case.served
            assert torch.equal(found[key], tensor.to(trip.case.served)), f"{name}: {key}"


def test_transformers_loads_what_was_written(trips: dict[str, Trip]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for trip in trips.values():
        model = AutoModelForCausalLM.from_pretrained(trip.out)
        assert model.dtype == trip.case.served
        expected = AutoModelForCausalLM.from_pretrained(trip.model, dtype=trip.case.served).state_dict()
        found = model.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
        assert AutoTokenizer.from_pretrained(trip.out).decode([5, 6]) == "bc"


def test_files_are_bounded_and_the_index_finds_their_tensors(trips: dict[str, Trip]) -> None:
    for trip in trips.values():
        index = json.loads((trip.out / "model.safetensors.index.json").read_text())
        files = sorted(path.name for path in trip.out.glob("*.safetensors"))
        count = len(files)
        assert files == [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
        by_file = {file: load_file(trip.out / file) for file in files}
        assert index["weight_map"] == {name: file for file, tensors in by_file.items() for name in tensors}
        sizes = [sum(tensor.nbytes for tensor in tensors.values()) for tensors in by_file.values()]
        assert max(sizes) <= SHARD_BYTES
        assert index["metadata"]["total_size"] == sum(sizes)
        assert not list(trip.out.glob("*.part"))


def test_a_rank_reads_its_own_part_and_nothing_else(trips: dict[str, Trip]) -> None:
    for name, trip in trips.items():
        tensors = tensors_of(trip.model)
        whole = sum(tensor.nbytes for tensor in tensors.values())
        shared = whole // 2 if trip.case.options else whole
        embedding = tensors["model.embed_tokens.weight"].nbytes
        for rank in trip.ranks:
            scale = trip.case.served.itemsize / trip.case.saved.itemsize
            # Padding rows of the vocabulary are held and not read; they are a row of embedding and head at most.
            assert rank["held"] - sum(rank["reads"]) * scale <= 2 * 4 * 32, name
            if trip.case.kind == "qwen3_moe":
                continue  # a range of stacked experts is counted as if all of it were read
            if trip.case.options:
                # Each rank has the norms, or the tied embedding on the last stage too, besides its share.
                assert sum(rank["reads"]) <= shared + embedding + whole // 50, name
                assert sum(rank["reads"]) < whole, name


def spoil(directory: Path, what: str) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    if what == "missing tensor":
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, file)
    elif what == "wrong shape":
        tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()
        save_file(tensors, file)
    elif what == "cut file":
        file.write_bytes(file.read_bytes()[:-1000])
    elif what == "empty file":
        file.write_bytes(b"")
    elif what == "pickles":
        file.rename(directory / "pytorch_model.bin")
    elif what == "no weights":
        file.unlink()
    elif what == "broken index":
        (directory / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    elif what == "missing file":
        index = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        index = {"weight_map": dict.fromkeys(tensors, "../model.safetensors")}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))


SPOILT = {
    "missing tensor": ("lack 'model.layers.1.mlp.up_proj.weight'", "download it again"),
    "wrong shape": ("'model.norm.weight' in", "has shape [31], not [32]"),
    "cut file": ("model.safetensors cannot be read, or is damaged", "download it again"),
    "empty file": ("model.safetensors cannot be read, or is damaged", "download it again"),
    "pickles": ("neither model.safetensors nor", "save_pretrained"),
    "no weights": ("neither model.safetensors nor", "download it again"),
    "broken index": ("model.safetensors.index.json is not an index", "download it again"),
    "missing file": ("model-00001-of-00001.safetensors", "download it again"),
    "file elsewhere": ("'../model.safetensors', which is not a file beside it", "download it again"),
}


@pytest.mark.slow
def test_an_export_of_what_ranks_do_not_hold_together_fails_in_all_of_them(run_world: Callable[[int], Path]) -> None:
    for rank in range(2):
        error = read_report(run_world(2), LOST, rank)["error"]
        assert "'model.layers.1.mlp.down_proj.weight' [32, 64], not all of it" in error


@pytest.mark.slow
@pytest.mark.parametrize("what", SPOILT)
def test_weights_that_cannot_be_read_are_refused_with_what_is_wrong_and_what_to_do(
    run_world: Callable[[int], Path], what: str
) -> None:
    error = read_report(run_world(2), what, 1)["error"]
    for part in SPOILT[what]:
        assert part in error
