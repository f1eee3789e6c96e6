"""Folders of versions in the data directory: ``<kind>s/<name>/<version>/``."""

from __future__ import annotations

from pathlib import Path

import attrs
import orjson
import yaml

from tinker_jobs.errors import LibraryError
from tinker_jobs.library.names import check_name, is_name, version_order

_MAX_TEXT_BYTES = 1024 * 1024
_MAX_YAML_BYTES = 256 * 1024
_MAX_LISTED = 20


class _Loader(yaml.SafeLoader):
    """Without aliases: a few lines of them stand for more values than fit into memory."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(
                problem="aliases are not supported, write the value again", problem_mark=mark
            )
        return super().compose_node(parent, index)


@attrs.frozen
class VersionFolders:
    """All versions of one kind of thing."""

    root: Path
    kind: str
    """Its word: ``dataset``, ``capability`` or ``task``."""

    def names(self) -> list[str]:
        """In the order of letters."""
        return _folders(self.root)

    def versions(self, name: str) -> list[str]:
        """Those of one name, the lowest first."""
        return sorted(_folders(self.root / check_name(name, f"a {self.kind}'s name")), key=version_order)

    def find(self, name: str, version: str) -> Path:
        """The folder of a version. Raises `LibraryError` when there is none."""
        known = self.versions(name)
        if check_name(version, f"a {self.kind}'s version") in known:
            return self.root / name / version
        raise LibraryError(f"{self.kind} not found: {name}@{version} ({self._what_is_known(known)})")

    def latest(self, name: str) -> str:
        """The highest version. Raises `LibraryError` when there is none."""
        known = self.versions(name)
        if not known:
            raise LibraryError(f"{self.kind} not found: {name} ({self._what_is_known(known)})")
        return known[-1]

    def _what_is_known(self, versions: list[str]) -> str:
        if versions:
            return f"known versions: {_shortened(versions)}"
        names = self.names()
        if names:
            return f"it has no version here; known names: {_shortened(names)}"
        return f"there is none here yet; add it with: tinker-server jobs add-{self.kind}"


def _folders(root: Path) -> list[str]:
    if not root.is_dir():
        return []
    return sorted(path.name for path in root.iterdir() if path.is_dir() and is_name(path.name))


def _shortened(names: list[str]) -> str:
    shown = ", ".join(names[-_MAX_LISTED:])
    return shown if len(names) <= _MAX_LISTED else f"…, {shown}"


def read_text(path: Path, name: str, max_bytes: int = _MAX_TEXT_BYTES) -> str:
    """A small text file, without a byte order mark; ``name`` is its own in errors. Raises `LibraryError`."""
    try:
        if not path.is_file():
            raise LibraryError(f"{name} is missing or no file")
        if path.stat().st_size > max_bytes:
            raise LibraryError(f"{name} is larger than {max_bytes} bytes")
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise LibraryError(f"{name} is not UTF-8: {error}") from error
    except OSError as error:
        raise LibraryError(f"{name} cannot be read: {error.strerror}") from error


def read_yaml(path: Path, name: str) -> dict[str, object]:
    """A YAML file that holds a mapping, with JSON's types only. Raises `LibraryError` that names the file."""
    text = read_text(path, name, _MAX_YAML_BYTES)
    try:
        # Through JSON, which is what a job's record is kept as: dates become text, what has no such form is refused.
        content = orjson.loads(orjson.dumps(yaml.load(text, _Loader)))
    except yaml.YAMLError as error:
        raise LibraryError(f"{name} is not YAML: {' '.join(str(error).split())}") from error
    except (TypeError, RecursionError, ValueError) as error:
        raise LibraryError(f"{name} holds a value that JSON has no form for: {error}") from error
    if not isinstance(content, dict):
        raise LibraryError(f"{name} must be a mapping, such as 'key: value' lines, got {type(content).__name__}")
    return content


def text_of(content: dict[str, object], key: str, name: str) -> str | None:
    """A text value of a YAML file, None when it is not there. Raises `LibraryError`."""
    value = content.get(key)
    if value is not None and not isinstance(value, str):
        raise LibraryError(f"{name}: {key} must be text, got {value!r:.60}")
    return value
