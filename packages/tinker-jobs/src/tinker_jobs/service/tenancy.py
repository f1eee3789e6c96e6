"""The one organization and workspace of a server, its users and its projects, as clients of jobs ask for them."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from typing import Any

import attrs

from tinker_core.errors import ConfigurationError, UserError
from tinker_core.interfaces import OptionValue

_KEY = re.compile(r"[a-z0-9-]{1,64}")
"""What clients take for a key."""
_SINCE = "1970-01-01T00:00:00+00:00"
"""Clients demand dates. A name in the settings has none, and a constant makes nobody believe in one."""
_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "https://tinker-jobs.invalid/")
DEFAULT_PROJECT = "default"


class UnknownPlaceError(UserError, LookupError):
    """An organization, workspace or project that this server does not have."""


@attrs.frozen(kw_only=True)
class Tenancy:
    """What the settings name. Ids are hashes of names, so they stay the same over restarts and reinstallations."""

    organization: str
    workspace: str

    @classmethod
    def of(cls, options: Mapping[str, OptionValue]) -> Tenancy:
        """Read the service's options; raises `ConfigurationError` for names that clients would refuse."""
        names = {}
        for option in ("jobs-organization", "jobs-workspace"):
            names[option] = str(options[option])
            if not _KEY.fullmatch(names[option]):
                raise ConfigurationError(
                    f"--{option} must be at most 64 lowercase letters, digits and hyphens, got {names[option]!r}"
                )
        return cls(organization=names["jobs-organization"], workspace=names["jobs-workspace"])

    @property
    def organization_id(self) -> str:
        """The organization's UUID."""
        return _id("org", self.organization)

    @property
    def workspace_id(self) -> str:
        """The workspace's UUID."""
        return _id("org", self.organization, "ws", self.workspace)

    def user_id(self, owner: str) -> str:
        """An owner's UUID."""
        return _id("org", self.organization, "user", owner)

    def check(self, organization: str, workspace: str | None = None) -> None:
        """Raise `UnknownPlaceError` unless both are the ones that there are."""
        if organization != self.organization:
            raise UnknownPlaceError("Organization not found")
        if workspace not in (None, self.workspace):
            raise UnknownPlaceError("Workspace not found")

    def describe_user(self, owner: str) -> dict[str, Any]:
        """An owner as a user."""
        return {"id": self.user_id(owner), "email_address": self.email_of(owner), "username": owner}

    def identify(self, owner: str) -> dict[str, Any]:
        """An owner as the one who did something."""
        return {"id": self.user_id(owner), "email": self.email_of(owner), "username": owner, "full_name": None}

    def email_of(self, owner: str) -> str:
        """An address that clients accept; nothing is ever sent to it."""
        return owner if "@" in owner else f"{owner}@{self.organization}"

    def describe_organization(self) -> dict[str, Any]:
        """The organization; it has no sandboxes to run for any time."""
        names = ("effective_max", "effective_default", "platform_max", "platform_default")
        return {
            "id": self.organization_id,
            "name": self.organization,
            "key": self.organization,
            **{f"{name}_sandbox_runtime_seconds": 0 for name in names},
            "max_sandbox_runtime_source_level": "platform",
            "default_sandbox_runtime_source_level": "platform",
            "created_at": _SINCE,
            "updated_at": _SINCE,
        }

    def describe_workspace(self) -> dict[str, Any]:
        """The workspace."""
        return {
            "id": self.workspace_id,
            "name": self.workspace,
            "key": self.workspace,
            "org_id": self.organization_id,
            "is_default": True,
            "created_at": _SINCE,
            "updated_at": _SINCE,
        }

    def describe_project(self, key: str) -> dict[str, Any]:
        """A project. It is no more than a name that jobs carry, so there is one for every name.

        Raises `UnknownPlaceError` for what can be no key.
        """
        if not _KEY.fullmatch(key):
            raise UnknownPlaceError("Project not found")
        return {
            "id": _id("org", self.organization, "ws", self.workspace, "project", key),
            "key": key,
            "name": key,
            "workspace_id": self.workspace_id,
            "is_default": key == DEFAULT_PROJECT,
            "created_at": _SINCE,
            "updated_at": _SINCE,
        }


def _id(*parts: str) -> str:
    return str(uuid.uuid5(_NAMESPACE, "\0".join(parts)))
