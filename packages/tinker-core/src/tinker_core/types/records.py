"""Control records: what the control database keeps of sessions, runs, checkpoints and samplers; no request body."""

from __future__ import annotations

from datetime import datetime

import attrs

from tinker_core.types.params import LoraConfig, OptimizerConfig
from tinker_core.types.paths import TinkerPath
from tinker_core.types.requests import JsonObject

LOCAL_OWNER = "local"
"""Owner of everything on a server without API keys."""


@attrs.frozen(kw_only=True)
class SessionRecord:
    """A client's session. All datetimes are aware and in UTC."""

    session_id: str
    created_at: datetime
    owner: str = LOCAL_OWNER
    project_id: str | None = None
    tags: tuple[str, ...] = ()
    user_metadata: JsonObject | None = None
    sdk_version: str = ""
    display_name: str | None = None
    finished_at: datetime | None = None
    finish_reason: str | None = None
    finish_detail: str | None = None
    server_id: str | None = None
    """The server that it was opened at, which alone can work for it; None is whichever asks."""


@attrs.frozen(kw_only=True)
class TrainingRunRecord:
    """A model that was created; its id is the training run's id."""

    model_id: str
    session_id: str
    base_model: str
    lora_config: LoraConfig
    optimizer_config: OptimizerConfig
    created_at: datetime
    last_request_at: datetime
    owner: str = LOCAL_OWNER
    project_id: str | None = None
    user_metadata: JsonObject | None = None


@attrs.frozen(kw_only=True)
class CheckpointRecord:
    """A saved checkpoint. It exists because of this record, which is written when all of its files are in place."""

    path: TinkerPath
    base_model: str
    lora_config: LoraConfig
    optimizer_config: OptimizerConfig
    created_at: datetime
    size_bytes: int
    request_id: str
    """The save request that wrote it."""
    owner: str = LOCAL_OWNER
    project_id: str | None = None
    user_metadata: JsonObject | None = None
    expires_at: datetime | None = None
    public: bool = False
    version: str | None = None
    """Names the files of this save among all that were ever saved under the path; None for those of older releases."""
    server_id: str | None = None
    """The server that saved it and removes its files; None is whichever asks."""


@attrs.frozen(kw_only=True)
class FinishedSave:
    """A request that saved a checkpoint: kept also when the checkpoint is replaced or removed."""

    request_id: str
    path: str
    created_at: datetime
    owner: str = LOCAL_OWNER
    project_id: str | None = None


@attrs.frozen(kw_only=True)
class LooseFiles:
    """Files in the checkpoint store that no checkpoint consists of: those of a save in progress, or to be removed."""

    location: str
    writer: str | None
    """Which server is writing them; None for those that may be removed."""
    created_at: datetime
    owner: str = LOCAL_OWNER
    project_id: str | None = None
    server_id: str | None = None
    """The server whose files they are; None is whichever asks."""


@attrs.frozen(kw_only=True)
class ServerRecord:
    """A server, which is a data directory, that keeps its records in this database."""

    server_id: str
    created_at: datetime
    store: str | None = None
    """The remote store of its checkpoints, without credentials; None are files of its own."""
    owner: str = LOCAL_OWNER
    project_id: str | None = None


@attrs.frozen(kw_only=True)
class AccessTokenRecord:
    """A token that opens one checkpoint, or all checkpoints of one run, for reading by whoever holds it."""

    token_id: str
    """Names the token where it is listed and revoked; says nothing about its secret."""
    token_hash: str
    """SHA-256 of the token, in hex; the token itself is not kept."""
    path: str
    """``tinker://<run>/<kind>/<name>``, or ``tinker://<run>`` for a whole run."""
    created_at: datetime
    owner: str = LOCAL_OWNER
    """Whose weights it opens."""
    project_id: str | None = None
    expires_at: datetime | None = None
    revoked_at: datetime | None = None


@attrs.frozen(kw_only=True)
class SamplerRecord:
    """A sampling session and the weights it serves."""

    sampling_session_id: str
    session_id: str
    base_model: str
    created_at: datetime
    model_path: str | None = None
    """The tinker path that the client named, if it named one."""
    revision: str | None = None
    """The immutable weights it serves; None is the bare base model."""
    owner: str = LOCAL_OWNER
    project_id: str | None = None
