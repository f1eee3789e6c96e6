"""Files of weights: bounded in size, whole or absent, read range by range."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tinker_core.errors import StorageError
from tinker_core.training.weight_files import WeightFiles, WeightFilesWriter, save_tensors

TENSORS = {f"layer.{number}": torch.arange(number * 100.0, number * 100 + 100).view(10, 10) for number in range(5)}
"""400 bytes each."""


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_what_fits_into_one_file_has_no_index(tmp_path: Path) -> None:
    save_tensors(TENSORS.items(), tmp_path)
    assert names(tmp_path) == ["model.safetensors"]
    assert all(torch.equal(load_file(tmp_path / "model.safetensors")[name], one) for name, one in TENSORS.items())


def test_files_hold_no_more_than_they_may_but_for_a_tensor_that_is_larger(tmp_path: Path) -> None:
    large = torch.ones(1000)
    save_tensors([("large", large), *TENSORS.items()], tmp_path, stem="moments", shard_bytes=900)
    files = [f"moments-{number:05d}-of-00004.safetensors" for number in range(1, 5)]
    assert names(tmp_path) == [*files, "moments.safetensors.index.json"]
    assert [sorted(load_file(tmp_path / file)) for file in files] == [
        ["large"],
        ["layer.0", "layer.1"],
        ["layer.2", "layer.3"],
        ["layer.4"],
    ]
    assert json.loads((tmp_path / "moments.safetensors.index.json").read_text())["metadata"]["total_size"] == 6000
    with WeightFiles(tmp_path, stem="moments") as reader:
        assert reader.names == {"large", *TENSORS}
        assert torch.equal(reader.read("layer.3", (10, 10)), TENSORS["layer.3"])


def test_no_tensors_make_an_empty_file(tmp_path: Path) -> None:
    save_tensors([], tmp_path, stem="moments")
    with WeightFiles(tmp_path, stem="moments") as reader:
        assert reader.names == frozenset()


@pytest.mark.parametrize(("axis", "start", "stop"), [(0, 2, 5), (1, 3, 4), (0, 0, 10)])
def test_a_range_of_either_axis_is_read(tmp_path: Path, axis: int, start: int, stop: int) -> None:
    save_tensors(TENSORS.items(), tmp_path)
    with WeightFiles(tmp_path) as reader:
        found = reader.read("layer.1", (10, 10), axis, start, stop)
    assert torch.equal(found, TENSORS["layer.1"].narrow(axis, start, stop - start))


def test_what_is_not_finished_is_not_read(tmp_path: Path) -> None:
    writer = WeightFilesWriter(tmp_path, shard_bytes=400)
    for name, tensor in TENSORS.items():
        writer.add(name, tensor)
    assert names(tmp_path) != []
    with pytest.raises(StorageError, match=r"neither model\.safetensors nor"):
        WeightFiles(tmp_path)


def test_when_writing_fails_the_rest_is_still_taken_because_other_ranks_are_sending_it(tmp_path: Path) -> None:
    taken: list[str] = []

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in TENSORS.items():
            taken.append(name)
            yield name, tensor

    with pytest.raises(StorageError, match=r"missing.*check free space and permissions"):
        save_tensors(tensors(), tmp_path / "missing", shard_bytes=400)
    assert taken == list(TENSORS)


def test_ranks_that_only_send_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_tensors([], None)
    assert names(tmp_path) == []


@pytest.mark.gpu
def test_a_range_goes_to_the_device_without_the_rest_of_its_tensor(tmp_path: Path) -> None:
    whole = torch.rand(4096, 1024)
    save_tensors([("weight", whole)], tmp_path)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with WeightFiles(tmp_path, device=torch.device("cuda", 0)) as reader:
        found = reader.read("weight", (4096, 1024), 0, 1024, 1536)
        assert found.device == torch.device("cuda", 0)
        assert torch.equal(found.cpu(), whole[1024:1536])
    assert torch.cuda.max_memory_allocated() - before <= 2 * found.nbytes
