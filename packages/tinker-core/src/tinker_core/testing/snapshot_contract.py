"""Snapshots: what every trainer's captured state must be, however late it is written. A part of `TrainerContract`."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from tinker_core.errors import StorageError, TinkerError, WorkerLostError
from tinker_core.executors.protocol import StateCall
from tinker_core.testing.trainer_lab import Arrays, TrainerLab, assert_identical, optimizer_steps, read_safetensors

_NOT_READ = frozenset({"adapter_config.json"})
"""Files for others than the trainer."""


class SnapshotContract:
    """Run as a part of `TrainerContract`."""

    def read_state(self, directory: Path) -> Arrays:
        """All arrays in a snapshot, by names that tell their file."""
        return {
            f"{path.name}: {name}": array
            for path in directory.glob("*.safetensors")
            for name, array in read_safetensors(path).items()
        }

    def _state(self, directory: Path) -> Arrays:
        return {**self.read_state(directory), "steps": np.array(optimizer_steps(directory))}

    def _everything(self, lab: TrainerLab, model_id: str) -> Arrays:
        return self._state(lab.snapshot(model_id, gradient=True))

    def test_a_snapshot_holds_the_state_of_its_moment_however_late_it_is_written(self, lab: TrainerLab) -> None:
        original, twin, copy = lab.create(seed=1), lab.create(seed=1), lab.create(seed=2)
        for model_id in (original, twin):
            lab.train(model_id, 0, 1)
            lab.run_one(lab.request(model_id, lab.data(2)))
        expected = self._everything(lab, twin)
        assert expected["steps"] == 2

        def go_on(model_id: str) -> None:
            lab.run_one(lab.request(model_id, lab.data(3)))
            lab.step(model_id, learning_rate=0.01)
            lab.train(model_id, 4)
            lab.run_one(lab.request(model_id, lab.data(5)))

        with lab.held_writes(original):
            directory, written = lab.begin_snapshot(original)
            go_on(original)
        written.result(timeout=120)
        assert_identical(self._state(directory), expected)
        lab.restore(copy, directory, gradient=True)
        assert_identical(self._everything(lab, copy), expected)
        go_on(copy)
        assert_identical(self._everything(lab, copy), self._everything(lab, original))

    def test_a_model_may_be_unloaded_before_its_snapshot_is_written(self, lab: TrainerLab) -> None:
        gone, other = lab.create(seed=1), lab.create(seed=2)
        lab.train(gone, 0)
        lab.run_one(lab.request(gone, lab.data(1)))
        expected = self._everything(lab, gone)
        with lab.held_writes(other):
            directory, written = lab.begin_snapshot(gone)
            lab.unload(gone)
        written.result(timeout=120)
        assert_identical(self._state(directory), expected)

    def test_a_snapshot_of_an_untouched_model_can_be_restored(self, lab: TrainerLab) -> None:
        fresh, used = lab.create(seed=1), lab.create(seed=2)
        expected = self._everything(lab, fresh)
        lab.train(used, 0)
        lab.run_one(lab.request(used, lab.data(1)))
        lab.restore(used, lab.snapshot(fresh, gradient=True), gradient=True)
        assert_identical(self._everything(lab, used), expected)

    @pytest.mark.parametrize("background", [False, True])
    @pytest.mark.parametrize("method", ["snapshot", "export"])
    def test_a_write_that_fails_is_the_error_of_its_command_and_training_goes_on(
        self, lab: TrainerLab, method: str, background: bool
    ) -> None:
        model_id = lab.create()
        lab.train(model_id, 0)
        before = self._everything(lab, model_id)
        missing = str(lab.new_directory() / "missing")
        with pytest.raises(StorageError, match="missing"):
            lab.group.call(method, StateCall(model_id=model_id, directory=missing, background=background))
        assert_identical(self._everything(lab, model_id), before)
        lab.train(model_id, 1)

    def test_a_snapshot_that_is_damaged_or_of_another_shape_is_refused_and_changes_nothing(
        self, lab: TrainerLab
    ) -> None:
        saved, other, target = lab.create(rank=4, seed=1), lab.create(rank=2, seed=2), lab.create(rank=4, seed=3)
        for seed, model_id in enumerate((saved, other, target)):
            lab.train(model_id, seed)
            lab.run_one(lab.request(model_id, lab.data(seed)))
        good, odd = lab.snapshot(saved, gradient=True), lab.snapshot(other, gradient=True)
        before = self._everything(lab, target)
        names = sorted(path.name for path in good.iterdir() if path.name not in _NOT_READ)
        assert len(names) >= 4
        for name in names:
            whole = (good / name).read_bytes()
            for damaged in (None, b"", whole[: len(whole) // 2], (odd / name).read_bytes()):
                spoilt = lab.new_directory()
                shutil.copytree(good, spoilt, dirs_exist_ok=True)
                (spoilt / name).unlink()
                if damaged is not None:
                    (spoilt / name).write_bytes(damaged)
                with pytest.raises(TinkerError) as caught:
                    lab.restore(target, spoilt, gradient=True)
                assert not isinstance(caught.value, WorkerLostError), name
        assert_identical(self._everything(lab, target), before)
        lab.restore(target, good, gradient=True)
        assert_identical(self._everything(lab, target), self._everything(lab, saved))
