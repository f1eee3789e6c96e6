"""Everything a server is told: one setting, one flag, one key of its configuration file."""

from __future__ import annotations

import ipaddress
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from tinker_core.engine import EngineConfig
from tinker_core.errors import ConfigurationError
from tinker_core.interfaces import OptionValue
from tinker_core.logs import LOG_FORMAT_VARIABLE, LOG_FORMATS
from tinker_core.types import BaseModelSpec
from tinker_server.client_flags import ClientFlags
from tinker_server.limits import MIB, Limits
from tinker_server.prices import Prices

DTYPES = ("float32", "bfloat16")
DEVICES = ("auto", "cpu", "cuda")
NO_SAMPLER = "none"

_PUBLIC_URL = re.compile(r"https?://[A-Za-z0-9.:\[\]-]+(/[A-Za-z0-9._~/-]*)?")


def _setting(
    default: Any,  # noqa: ANN401
    help_text: str,
    choices: tuple[str, ...] = (),
    metavar: str = "",
    *,
    secret: bool = False,
) -> Any:  # noqa: ANN401
    metadata = {"help": help_text, "choices": choices, "metavar": metavar}
    return attrs.field(default=default, repr=not secret, metadata=metadata)


@attrs.frozen(kw_only=True)
class ServerConfig:
    """One field a flag; ``max_models`` is ``--max-models`` and the TOML key ``max-models``."""

    base_models: tuple[BaseModelSpec, ...]
    backend: str = _setting("fsdp", "trainer, by the name its plugin registers", metavar="NAME")
    sampler: str = _setting("colocated", "sampler, by the name its plugin registers, or 'none'", metavar="NAME")
    host: str = _setting("127.0.0.1", "address to listen on")
    port: int = _setting(8000, "port to listen on; 0 takes a free one and prints it")
    data_dir: str = _setting("~/.tinker-server", "directory of the control database and the checkpoints", metavar="DIR")
    dtype: str = _setting("float32", "type of base weights and activations; adapters are always float32", DTYPES)
    device: str = _setting("auto", "where models run; auto takes cuda where an NVIDIA device is present", DEVICES)
    num_ranks: int = _setting(1, "worker processes (with cuda: devices) per base model")
    micro_batch_tokens: int | None = _setting(
        None, "most tokens that a trainer packs into one micro-pass; without it 512 on a CPU, 4096 on a GPU"
    )
    max_models: int = _setting(1024, "most trainable models at a time, per base model, in memory or not")
    max_resident_models: int = _setting(
        64, "most trainable models in the workers' memory, per base model; others wait on disk for their next request"
    )
    park_after: int = _setting(
        3600, "seconds without a request after which a model leaves the workers' memory; 0 never"
    )
    max_lora_rank: int = _setting(128, "highest LoRA rank that clients may ask for")
    max_context_length: int | None = _setting(None, "bound on sequence lengths below the base models' own")
    max_decode_batch: int = _setting(64, "most sequences that are sampled together")
    max_queued_tokens: int = _setting(
        128 * 1024 * 1024, "most tokens of accepted training without a result; beyond it training waits to be accepted"
    )
    max_queued_tokens_per_owner: int = _setting(
        32 * 1024 * 1024, "most tokens of accepted training without a result of one owner of API keys"
    )
    max_queued_samples: int = _setting(
        32 * 1024, "most samples without a result, half of them of one owner; beyond it samples have to come back"
    )
    max_open_polls: int = _setting(
        12 * 1024, "most long polls that wait for results; more are answered after two seconds"
    )
    max_revisions: int = _setting(64, "most sampler revisions kept in memory, per base model; more are spilled to disk")
    handoff_dir: str = _setting(
        "/dev/shm",
        "directory in memory for the weights of samplers with processes of their own: up to --max-revisions adapters",
        metavar="DIR",
    )
    body_limit: int = _setting(256 * MIB, "most bytes of one request body, before and after decompression")
    control_body_limit: int = _setting(4 * MIB, "most bytes of a body that carries no data to train on or sample from")
    body_memory: int = _setting(1024 * MIB, "bytes of request bodies that may arrive and be decoded at a time")
    result_bytes: int = _setting(
        4096 * MIB,
        "most bytes of results that the journal keeps for clients that have not fetched them, or might again",
    )
    body_timeout: int = _setting(60, "seconds a request body may take, besides what its bytes earn at --body-min-rate")
    body_min_rate: int = _setting(16 * 1024, "bytes per second that a large request body must keep up with")
    request_parts: int = _setting(64 * 1024, "most data, chunks, tensors and spans of one request together")
    header_limit: int = _setting(64 * 1024, "most bytes of a request's first line and headers")
    header_timeout: int = _setting(30, "seconds that a request's first line and headers may take")
    max_connections: int = _setting(16 * 1024, "most open connections, and most requests in progress")
    public_url: str | None = _setting(
        None, "URL at which clients reach this server, for download links; else what their requests name", metavar="URL"
    )
    max_samples_in_flight: int = _setting(2000, "most samples that one sampling client has in progress")
    retrieve_futures: bool = _setting(False, "have clients wait for all their samples in one poll, without that bound")
    compress_uploads: bool = _setting(False, "have clients compress the data that they train on, for slow networks")
    patient_samples: bool = _setting(False, "have clients wait for samples beyond two hours without any progress")
    client_side_losses: bool = _setting(False, "have clients compute custom losses themselves, in two passes")
    session_timeout: int = _setting(
        7 * 24 * 3600, "seconds without a sign of life after which a session ends and its models are removed; 0 never"
    )
    heartbeat_timeout: int = _setting(
        900, "seconds without a sign of life of a client after which its samples that have not begun are dropped"
    )
    snapshot_steps: int = _setting(200, "optimizer steps of a model between two snapshots of its state, at most")
    snapshot_seconds: int = _setting(30, "seconds of work on a model between two snapshots of its state, at most")
    snapshot_bytes: int = _setting(256 * MIB, "bytes of a model's journalled requests between two snapshots, at most")
    journal_bytes: int = _setting(16 * 1024 * MIB, "most bytes of requests and results in the journal")
    deterministic: bool = _setting(
        False, "one request per pass, one sample at a time, one thread: a replay after a crash is bit-identical"
    )
    grace_seconds: int = _setting(
        30, "seconds that accepted work may go on after SIGTERM; the rest goes on after a start"
    )
    database_url: str | None = _setting(
        None,
        "control database, for example postgresql+psycopg://user@host/name; else SQLite in --data-dir",
        metavar="URL",
        secret=True,
    )
    checkpoint_store: str | None = _setting(
        None, "where checkpoints are kept, for example s3://bucket/prefix; else in --data-dir", metavar="URL"
    )
    checkpoint_cache_bytes: int = _setting(
        16 * 1024 * MIB, "bytes of checkpoints from --checkpoint-store that --data-dir keeps for the next reading"
    )
    keep_last: int | None = _setting(None, "newest training checkpoints that each run keeps; without it all of them")
    log_format: str = _setting("text", "how the log on standard error is written: lines, or JSON objects", LOG_FORMATS)
    access_log: bool = _setting(False, "log every HTTP request")
    jwt_auth: bool = _setting(False, "have clients exchange their API key for a short-lived token; whoami needs it")
    price_training: float | None = _setting(None, "US dollars per million tokens trained, for the billing endpoints")
    price_prefill: float | None = _setting(None, "US dollars per million prompt tokens")
    price_cached_prefill: float | None = _setting(None, "US dollars per million prompt tokens found in the cache")
    price_sampling: float | None = _setting(None, "US dollars per million generated tokens")
    price_storage: float | None = _setting(None, "US dollars per gigabyte of checkpoints and month of 720 hours")
    agreement_tolerance: float = _setting(
        1.0,
        "factor on how much trainer and sampler may differ about the same tokens; 0 does not compare them",
        metavar="FACTOR",
    )
    options: Mapping[str, OptionValue] = attrs.field(factory=dict)
    """Settings of the chosen plugins by name."""

    def __attrs_post_init__(self) -> None:
        for name, least in _MINIMA.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigurationError(f"{flag_of(name)} must be at least {least}, got {value}")
        if self.port > 65535:
            raise ConfigurationError(f"--port must be at most 65535, got {self.port}")
        for name, choices in (("dtype", DTYPES), ("device", DEVICES), ("log_format", LOG_FORMATS)):
            if getattr(self, name) not in choices:
                raise ConfigurationError(
                    f"{flag_of(name)} must be one of {', '.join(choices)}, got {getattr(self, name)!r}"
                )
        for name in (field.name for field in attrs.fields(Prices)):
            price = getattr(self, name)
            if price is not None and not 0 <= price < math.inf:
                raise ConfigurationError(f"{flag_of(name)} must be 0 or more dollars, got {price}")
        if math.isnan(self.agreement_tolerance):
            raise ConfigurationError("--agreement-tolerance must be a number")

    def prices(self) -> Prices:
        """What usage costs; each price is the setting of its name."""
        return Prices(**{field.name: getattr(self, field.name) for field in attrs.fields(Prices)})

    @public_url.validator
    def _check_public_url(self, _: object, url: str | None) -> None:
        if url is not None and not _PUBLIC_URL.fullmatch(url):
            raise ConfigurationError(
                f"--public-url must look like https://host, https://host:port or https://host/prefix, got {url!r}"
            )

    def flags(self) -> ClientFlags:
        """What clients are told; each flag is the setting of its name."""
        return ClientFlags(**{field.name: getattr(self, field.name) for field in attrs.fields(ClientFlags)})

    def limits(self) -> Limits:
        """What clients may send; each limit is the setting of its name."""
        return Limits(**{field.name: getattr(self, field.name) for field in attrs.fields(Limits)})

    def engine_config(self, *, plugins: tuple[str, ...], device: str) -> EngineConfig:
        """The engine's share; ``device`` is decided by now, and ``plugins`` is what worker processes load."""
        return EngineConfig(
            base_models=self.base_models,
            data_dir=Path(self.data_dir).expanduser().resolve(),
            backend=self.backend,
            sampler=None if self.sampler == NO_SAMPLER else self.sampler,
            plugins=plugins,
            num_ranks=self.num_ranks,
            device=device,
            dtype=self.dtype,
            micro_batch_tokens=self.micro_batch_tokens or _MICRO_BATCH_TOKENS.get(device, 512),
            max_models=self.max_models,
            max_resident_models=self.max_resident_models,
            park_seconds=float(self.park_after) or None,
            snapshot_steps=self.snapshot_steps,
            snapshot_seconds=float(self.snapshot_seconds),
            snapshot_bytes=self.snapshot_bytes,
            journal_bytes=self.journal_bytes,
            max_queued_tokens=self.max_queued_tokens,
            max_queued_tokens_per_owner=self.max_queued_tokens_per_owner,
            max_queued_samples=self.max_queued_samples,
            deterministic=self.deterministic,
            grace_seconds=float(self.grace_seconds),
            database_url=self.database_url,
            checkpoint_store=self.checkpoint_store,
            checkpoint_cache_bytes=self.checkpoint_cache_bytes,
            keep_last=self.keep_last,
            unseen_seconds=float(self.heartbeat_timeout),
            max_lora_rank=self.max_lora_rank,
            max_context_length=self.max_context_length,
            max_revisions=self.max_revisions,
            handoff_dir=Path(self.handoff_dir).expanduser().resolve(),
            max_decode_batch=self.max_decode_batch,
            session_seconds=float(self.session_timeout) or None,
            max_result_bytes=self.result_bytes,
            agreement_tolerance=self.agreement_tolerance,
            options=dict(self.options),
            worker_environment={LOG_FORMAT_VARIABLE: self.log_format},
        )


_MICRO_BATCH_TOKENS = {"cpu": 512, "cuda": 4096}
"""Enough to keep the device busy, and little enough that a sample beside it does not wait long for its next token."""

_MINIMA = {
    "port": 0,
    "num_ranks": 1,
    "micro_batch_tokens": 1,
    "max_models": 1,
    "max_lora_rank": 1,
    "max_context_length": 1,
    "max_decode_batch": 1,
    "max_revisions": 1,
    "max_queued_tokens": 1024,
    "max_queued_tokens_per_owner": 1024,
    "max_queued_samples": 2,
    "max_open_polls": 1,
    "body_limit": MIB,
    "control_body_limit": 64 * 1024,
    "body_memory": MIB,
    "body_timeout": 1,
    "result_bytes": MIB,
    "body_min_rate": 1,
    "request_parts": 1,
    "header_limit": 8 * 1024,
    "header_timeout": 1,
    "max_connections": 1,
    "max_samples_in_flight": 1,
    "session_timeout": 0,
    "heartbeat_timeout": 60,
    "max_resident_models": 1,
    "park_after": 0,
    "snapshot_steps": 1,
    "snapshot_seconds": 1,
    "snapshot_bytes": MIB,
    "journal_bytes": 16 * MIB,
    "grace_seconds": 0,
    "checkpoint_cache_bytes": 0,
    "keep_last": 1,
    "agreement_tolerance": 0,
}


def flag_of(field: str) -> str:
    """The flag of a field: ``max_models`` is ``--max-models``."""
    return "--" + field.replace("_", "-")


def settings() -> dict[str, attrs.Attribute[Any]]:
    """The plain settings by field name: those with a flag of their own shape, so neither models nor plugin options."""
    return {field.name: field for field in attrs.fields(ServerConfig) if field.metadata.get("help")}


def type_of(field: attrs.Attribute[Any]) -> type[str] | type[int] | type[float] | type[bool]:
    """What a setting holds."""
    return {"bool": bool, "int": int, "float": float}.get(str(field.type).partition(" ")[0], str)


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine only."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
