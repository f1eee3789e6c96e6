from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tinker_core.errors import InvalidRequestError, StorageError, UnknownCheckpointError
from tinker_core.storage import CheckpointStore
from tinker_core.storage.checkpoints import safe_directory_name
from tinker_core.types import CheckpointType, TinkerPath

PATH = TinkerPath.parse("tinker://s1:train:0/weights/step-1")


def save(store: CheckpointStore, path: TinkerPath, text: str) -> int:
    temporary = store.begin(path)
    (temporary / "inner").mkdir()
    (temporary / "inner" / "weights.txt").write_text(text)
    (temporary / "tinker.json").write_text("{}")
    return store.commit(path, temporary)


def text_of(store: CheckpointStore, path: TinkerPath) -> str:
    return (store.directory(path) / "inner" / "weights.txt").read_text()


def files_below(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_file()]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


@pytest.fixture
def store(root: Path) -> CheckpointStore:
    return CheckpointStore(root)


def test_a_committed_checkpoint_has_its_files_and_size(store: CheckpointStore) -> None:
    assert save(store, PATH, "hello") == 7
    assert text_of(store, PATH) == "hello"


def test_nothing_is_visible_before_commit_nor_after_abort(store: CheckpointStore, root: Path) -> None:
    temporary = store.begin(PATH)
    (temporary / "half").write_text("x")
    with pytest.raises(UnknownCheckpointError):
        store.directory(PATH)
    store.abort(temporary)
    assert files_below(root) == []


def test_a_second_commit_replaces_the_first(store: CheckpointStore, root: Path) -> None:
    save(store, PATH, "old")
    save(store, PATH, "new")
    assert text_of(store, PATH) == "new"
    assert len(files_below(root)) == 2


def test_two_saves_of_one_name_may_overlap(store: CheckpointStore) -> None:
    first, second = store.begin(PATH), store.begin(PATH)
    assert first != second
    (first / "a").write_text("1")
    (second / "b").write_text("2")
    store.commit(PATH, second)
    store.commit(PATH, first)
    assert [file.name for file in store.directory(PATH).iterdir()] == ["a"]


def test_a_failed_replacement_keeps_the_old_checkpoint(
    store: CheckpointStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(store, PATH, "old")
    temporary = store.begin(PATH)
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self == temporary:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(StorageError, match="Input/output error"):
        store.commit(PATH, temporary)
    assert text_of(store, PATH) == "old"


def test_sweep_takes_back_a_replacement_that_a_crash_interrupted(
    store: CheckpointStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(store, PATH, "old")
    temporary = store.begin(PATH)
    real = Path.rename

    def crash(self: Path, target: Path) -> Path:
        if self == temporary:
            raise SystemExit
        return real(self, target)

    monkeypatch.setattr(Path, "rename", crash)
    with pytest.raises(SystemExit):
        store.commit(PATH, temporary)
    monkeypatch.undo()
    reopened = CheckpointStore(root)
    reopened.sweep()
    assert text_of(reopened, PATH) == "old"
    assert len(files_below(root)) == 2


def test_sweep_removes_unfinished_saves_and_nothing_else(store: CheckpointStore, root: Path) -> None:
    save(store, PATH, "kept")
    (store.begin(PATH) / "half").write_text("x")
    store.sweep()
    assert text_of(store, PATH) == "kept"
    assert len(files_below(root)) == 2


def test_sweep_of_a_store_that_was_never_used_does_nothing(store: CheckpointStore) -> None:
    store.sweep()


def test_deleted_checkpoints_are_unknown(store: CheckpointStore, root: Path) -> None:
    save(store, PATH, "x")
    store.delete(PATH)
    assert files_below(root) == []
    with pytest.raises(UnknownCheckpointError):
        store.directory(PATH)
    with pytest.raises(UnknownCheckpointError):
        store.delete(PATH)


def test_kinds_and_runs_do_not_share_checkpoints(store: CheckpointStore) -> None:
    others = (
        TinkerPath(run_id=PATH.run_id, kind=CheckpointType.SAMPLER, name=PATH.name),
        TinkerPath(run_id="s1_train_0", kind=PATH.kind, name=PATH.name),
    )
    save(store, PATH, "one")
    for other in others:
        with pytest.raises(UnknownCheckpointError):
            store.directory(other)


NASTY = [
    "a:b",
    "a%3Ab",
    "a_b",
    "a/b",
    "..",
    ".",
    "",
    "a\0b",
    "é",
    "a b",
    "x" * 300,
    "x" * 301,
    ".incoming",
    "../../etc",
]


def test_directory_names_are_injective_and_safe() -> None:
    names = [safe_directory_name(model_id) for model_id in NASTY]
    assert len(set(names)) == len(NASTY)
    assert all(name and not name.startswith(".") and "/" not in name and len(name) <= 255 for name in names)


@pytest.mark.parametrize("run_id", NASTY)
def test_no_model_id_leads_out_of_the_root(store: CheckpointStore, root: Path, run_id: str) -> None:
    path = TinkerPath(run_id=run_id, kind=CheckpointType.TRAINING, name="n")
    save(store, path, "x")
    assert store.directory(path).is_relative_to(root)
    assert text_of(store, path) == "x"


@pytest.mark.parametrize("name", ["..", "a/b", "/etc", ".hidden", "", "a\0"])
def test_names_that_are_no_path_segment_are_refused(store: CheckpointStore, name: str) -> None:
    path = TinkerPath(run_id="run", kind=CheckpointType.TRAINING, name=name)
    for call in (store.begin, store.directory, store.delete):
        with pytest.raises(InvalidRequestError):
            call(path)


def test_only_directories_made_by_begin_are_committed_or_removed(store: CheckpointStore, tmp_path: Path) -> None:
    for call in (store.abort, lambda directory: store.commit(PATH, directory)):
        with pytest.raises(ValueError, match="begin"):
            call(tmp_path)


def test_what_the_file_system_refuses_is_a_storage_error_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    store = CheckpointStore(tmp_path / "file")
    with pytest.raises(StorageError, match="Not a directory") as caught:
        store.begin(PATH)
    assert isinstance(caught.value.__cause__, OSError)
