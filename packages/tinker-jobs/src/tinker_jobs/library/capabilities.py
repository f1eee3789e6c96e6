"""A capability's folder: of all that it may hold, training uses the system prompt of an agent."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from tinker_jobs.errors import LibraryError
from tinker_jobs.library.files import digest
from tinker_jobs.library.folders import read_text, read_yaml, text_of
from tinker_jobs.library.names import check_name
from tinker_jobs.refs import FrozenCapability

MANIFEST = "capability.yaml"
PROMPT = "prompt.md"
AGENTS = "agents"
_SUFFIXES = (".md", ".txt")
_FRONT_MATTER = re.compile(r"---[ \t]*\r?\n(?:.*?\r?\n)??---[ \t]*(?:\r?\n|\Z)", re.DOTALL)


def freeze_capability(folder: Path, name: str, version: str) -> FrozenCapability:
    """A capability as it is now. Raises `LibraryError`."""
    what = f"capability {name}@{version}"
    return FrozenCapability(
        name=name, version=version, prompt=read_entry_prompt(folder, what), runtime_digest=folder_digest(folder, what)
    )


def read_entry_prompt(folder: Path, what: str) -> str | None:
    """The prompt of the entry agent, else ``prompt.md``, else that of the only agent; None when there is no agent.

    Raises `LibraryError` that begins with ``what``.
    """
    manifest = folder / MANIFEST
    content = read_yaml(manifest, f"{what}: {MANIFEST}") if manifest.exists() else {}
    entry = text_of(content, "entry_agent", f"{what}: {MANIFEST}")
    if entry is not None:
        return read_agent_prompt(folder, entry, what)
    if (folder / PROMPT).exists():
        return _prompt(folder / PROMPT, f"{what}: {PROMPT}")
    agents = list_agents(folder)
    if len(agents) > 1:
        raise LibraryError(f"{what} has agents {', '.join(agents)}; name one as entry_agent in {MANIFEST}")
    return read_agent_prompt(folder, agents[0], what) if agents else None


def read_agent_prompt(folder: Path, agent: str, what: str) -> str | None:
    """The prompt of an agent, without front matter; None when it is empty. Raises `LibraryError`."""
    check_name(agent, f"{what}: an agent's name")
    for suffix in _SUFFIXES:
        path = folder / AGENTS / f"{agent}{suffix}"
        if path.exists():
            return _prompt(path, f"{what}: {AGENTS}/{path.name}")
    known = ", ".join(list_agents(folder)) or "none"
    raise LibraryError(f"{what} has no agent {agent!r}, which would be {AGENTS}/{agent}.md (known agents: {known})")


def list_agents(folder: Path) -> list[str]:
    """Names of a capability's agents."""
    agents = folder / AGENTS
    if not agents.is_dir():
        return []
    return sorted({path.stem for path in agents.iterdir() if path.suffix in _SUFFIXES and path.is_file()})


def _prompt(path: Path, name: str) -> str | None:
    text = read_text(path, name)
    found = _FRONT_MATTER.match(text)
    return (text[found.end() :] if found else text).strip() or None


def folder_digest(folder: Path, what: str) -> str:
    """``sha256:`` and a hash over the paths and contents of all files, in the order of their paths."""
    found = hashlib.sha256()
    try:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            with path.open("rb") as stream:
                size, sha256 = digest(stream)
            found.update(f"{path.relative_to(folder).as_posix()}\0{size}\0{sha256}\n".encode())
    except (OSError, UnicodeEncodeError) as error:
        raise LibraryError(f"{what} cannot be read: {error}") from error
    return f"sha256:{found.hexdigest()}"
