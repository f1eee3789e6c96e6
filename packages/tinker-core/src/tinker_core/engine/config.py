"""What an engine is told, and the small records it answers with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import attrs

from tinker_core.engine.backlog import LoadBounds
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
    unseen_seconds: float = 900.0
    """Samples that have not begun are dropped when nothing was heard of their client for so long."""
    max_result_bytes: int = 4 * 1024**3
    """Most bytes of results that the journal keeps for clients that have not fetched them, or might again."""
    max_resident_models: int = 64
    """Most models in the memory of a base model's workers; the others wait on disk for their next request."""
    park_seconds: float | None = 3600.0
    """A model without requests for so long leaves memory even if there is room; None leaves it."""
    snapshot_steps: int = 200
    """Optimizer steps of a model after which its state is written in the background."""
    snapshot_seconds: float = 30.0
    """Seconds after which a changed model's state is written in the background."""
    snapshot_bytes: int = 256 * 1024**2
    """Bytes of a model's journalled requests after which its state is written in the background."""
    journal_bytes: int = 16 * 1024**3
    """Most bytes of requests and results in the journal; beyond it no request is accepted."""
    max_queued_tokens: int = 128 * 1024**2
    """Most tokens of accepted training without a result; a request counts 1024 at least. Beyond it training waits
    before it is accepted, but not of owners with less than an even share of it."""
    max_queued_tokens_per_owner: int = 32 * 1024**2
    """Most of these tokens of one owner."""
    max_queued_samples: int = 32 * 1024
    """Most samples without a result; one owner may have half of them. Beyond it samples are told to come back."""
    deterministic: bool = False
    """One request per pass, one sample at a time, fixed threads: a replay is bit-identical."""
    grace_seconds: float = 30.0
    """How long accepted work may go on after the signal to stop."""
    database_url: str | None = attrs.field(default=None, repr=False)
    """The control database as an SQLAlchemy URL, which may hold a password; None keeps it in the data directory."""
    checkpoint_store: str | None = None
    """Where checkpoints are kept, as a URL such as ``s3://bucket/prefix``; None keeps them in the data directory."""
    checkpoint_cache_bytes: int = 16 * 1024**3
    """Most bytes of checkpoints from such a URL that the data directory keeps while nobody reads them."""
    keep_last: int | None = None
    """Newest training checkpoints that each run keeps; older ones are removed after a save. None keeps all."""
    handoff_dir: Path = Path("/dev/shm")
    """Where weights lie on their way to a sampler with processes of its own, and while it serves them."""
    agreement_tolerance: float = 1.0
    """Multiplies how much trainer and sampler may differ about the same tokens; 0 does not compare them."""
    options: Mapping[str, OptionValue] = attrs.field(factory=dict)
    worker_environment: Mapping[str, str] = attrs.field(factory=dict)

    @property
    def max_resident(self) -> int:
        """Most models that the workers of a base model hold."""
        return min(self.max_models, self.max_resident_models)

    @property
    def load_bounds(self) -> LoadBounds:
        """How much may be queued."""
        return LoadBounds(**{field.name: getattr(self, field.name) for field in attrs.fields(LoadBounds)})

    @property
    def pass_tokens(self) -> int:
        """Most tokens of a pass that packs several models: a few micro-passes, so that nobody waits long for a turn."""
        return 4 * self.micro_batch_tokens


@attrs.frozen(kw_only=True)
class Readiness:
    """Whether every base model can really train and sample."""

    ready: bool
    models: dict[str, str]
    """``"ready"``, ``"starting"``, ``"failed: why"`` or ``"doubtful: why"`` by base model."""


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
