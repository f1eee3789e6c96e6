"""What an engine is told, and the small records it answers with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import attrs

from tinker_core.interfaces import OptionValue
from tinker_core.types import LOCAL_OWNER, BaseModelSpec, JsonObject


@attrs.frozen(kw_only=True)
class EngineConfig:
    """Settings of one engine; each has a flag of ``tinker-server``."""

    base_models: tuple[BaseModelSpec, ...]
    data_dir: Path
    """Control database, checkpoints and spilled sampler weights."""
    backend: str
    sampler: str | None
    executor: str = "local"
    plugins: tuple[str, ...] = ("*",)
    """What worker processes load."""
    num_ranks: int = 1
    device: str = "cpu"
    dtype: str = "float32"
    micro_batch_tokens: int = 2048
    max_models: int = 64
    max_lora_rank: int = 128
    max_context_length: int | None = None
    max_revisions: int = 64
    max_decode_batch: int = 64
    session_seconds: float | None = None
    """A session of whose client nothing was heard for so long is finished; None keeps all."""
    max_result_bytes: int = 4 * 1024**3
    """About how much memory the results may take that clients have not fetched, or might fetch again."""
    options: Mapping[str, OptionValue] = attrs.field(factory=dict)
    worker_environment: Mapping[str, str] = attrs.field(factory=dict)

    @property
    def pass_tokens(self) -> int:
        """Most tokens of a pass that packs several models: a few micro-passes, so that nobody waits long for a turn."""
        return 4 * self.micro_batch_tokens


@attrs.frozen(kw_only=True)
class Readiness:
    """Whether every base model can really train and sample."""

    ready: bool
    models: dict[str, str]
    """``"ready"``, ``"starting"`` or ``"failed: why"`` by base model."""


@attrs.frozen(kw_only=True)
class NewSession:
    """What a client says of itself when it opens a session."""

    owner: str = LOCAL_OWNER
    tags: tuple[str, ...] = ()
    user_metadata: JsonObject | None = None
    sdk_version: str = ""
    project_id: str | None = None
    display_name: str | None = None


@attrs.frozen(kw_only=True)
class SessionContents:
    """What was made in a session."""

    training_run_ids: tuple[str, ...]
    sampler_ids: tuple[str, ...]
