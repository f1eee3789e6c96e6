"""Names and versions: what may be one, how a reference is written, which version is the highest."""

from __future__ import annotations

import re

from packaging.version import InvalidVersion, Version

from tinker_jobs.errors import LibraryError

# Each is one folder or file of the data directory, so nothing that could lead out of it, or be hidden in it, is one.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,127}")


def is_name(text: str) -> bool:
    """Whether it could be a name or a version."""
    return _NAME.fullmatch(text) is not None


def check_name(text: str, what: str) -> str:
    """A name or version as it is; ``what`` it names is for the error. Raises `LibraryError`."""
    if not is_name(text):
        raise LibraryError(
            f"{what} must be 1 to 128 letters, digits, '.', '_', '+' or '-', beginning with a letter or digit, "
            f"got {text[:200]!r}"
        )
    return text


def split_ref(ref: str, what: str) -> tuple[str, str]:
    """``name@version`` as both. Raises `LibraryError`."""
    name, _, version = ref.rpartition("@")
    if not name:
        raise LibraryError(f"a {what} is written name@version, got {ref[:200]!r}")
    return name, version


def strip_organization(name: str, organization: str | None, what: str) -> str:
    """The name within this server's own organization. Raises `LibraryError` for one of another."""
    owner, slash, rest = name.rpartition("/")
    if not slash:
        return name
    if owner != organization:
        own = "it belongs to no organization" if organization is None else f"its organization is {organization!r}"
        raise LibraryError(f"{what} {name[:200]!r} is of another organization than this server's: {own}")
    return rest


def version_order(version: str) -> tuple[bool, Version, str]:
    """Sorts versions by number, after those that are no numbers, which are in the order of their letters."""
    try:
        return True, Version(version), version
    except InvalidVersion:
        return False, Version("0"), version
