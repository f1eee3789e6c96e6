"""A world's file: where it is served, and which agents act in it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import attrs

from tinker_jobs.errors import LibraryError
from tinker_jobs.library.folders import read_yaml, text_of
from tinker_jobs.library.names import check_name, split_ref

_KEYS = ("server_url", "auth_token", "goal", "runtimes")
_RUNTIME_KEYS = ("capability", "agents")


@attrs.frozen(kw_only=True)
class Runtime:
    """What acts in a world."""

    capability: str
    """``name@version``, whose agents they are."""
    agents: tuple[str, ...] | None
    """Those that may act; None allows all of the capability's."""


@attrs.frozen(kw_only=True)
class World:
    """What a world's file says."""

    server_url: str
    auth_token: str | None = attrs.field(repr=False)
    goal: str | None
    runtimes: Mapping[str, Runtime]


def world_path(root: Path, world_id: str) -> Path:
    """Where a world's file is. Raises `LibraryError` when it is not there."""
    path = root / f"{check_name(world_id, 'a world')}.yaml"
    if not list_worlds(root):
        raise LibraryError(
            f"worlds are not configured on this server; put {world_id}.yaml with the world's server_url into "
            "the folder 'worlds' of the data directory, or use: tinker-server jobs add-world"
        )
    if not path.exists():
        raise LibraryError(f"world not found: {world_id} (known worlds: {', '.join(list_worlds(root))})")
    return path


def list_worlds(root: Path) -> list[str]:
    """Ids of all worlds."""
    return sorted(path.stem for path in root.glob("*.yaml") if not path.name.startswith(".")) if root.is_dir() else []


def read_world(path: Path, source: str | None = None) -> World:
    """What a world's file says; ``source`` is its name in errors, else its own. Raises `LibraryError`."""
    name = f"worlds/{path.name}" if source is None else source
    content = read_yaml(path, name)
    _refuse_unknown(content, _KEYS, name)
    url = text_of(content, "server_url", name)
    if url is None:
        raise LibraryError(
            f"{name}: server_url is missing; it is where the world answers, such as http://127.0.0.1:9000"
        )
    if not _is_http(url):
        raise LibraryError(f"{name}: server_url must be an http or https URL, got {url!r:.200}")
    runtimes = content.get("runtimes") or {}
    if not isinstance(runtimes, Mapping):
        raise LibraryError(f"{name}: runtimes must map ids to capabilities, got {runtimes!r:.60}")
    return World(
        server_url=url,
        auth_token=text_of(content, "auth_token", name),
        goal=text_of(content, "goal", name),
        runtimes={runtime: _runtime(value, f"{name}: runtime {runtime!r}") for runtime, value in runtimes.items()},
    )


def _runtime(value: Any, what: str) -> Runtime:  # noqa: ANN401 - from a file
    if not isinstance(value, dict):
        raise LibraryError(f"{what} must be a mapping with a capability, got {value!r:.60}")
    _refuse_unknown(value, _RUNTIME_KEYS, what)
    capability, agents = text_of(value, "capability", what), value.get("agents")
    if capability is None:
        raise LibraryError(f"{what}: capability is missing; it is name@version of what acts in the world")
    split_ref(capability, "capability")
    if agents is not None and not (isinstance(agents, list) and all(isinstance(agent, str) for agent in agents)):
        raise LibraryError(f"{what}: agents must be a list of names, got {agents!r:.60}")
    return Runtime(capability=capability, agents=None if agents is None else tuple(agents))


def _refuse_unknown(content: Mapping[str, object], known: tuple[str, ...], what: str) -> None:
    unknown = sorted(set(content) - set(known))
    if unknown:
        raise LibraryError(f"{what}: unknown keys {', '.join(unknown)} (known: {', '.join(known)})")


def _is_http(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        return False
