"""create_model, and the server's own settings that travel in ``user_metadata``."""

from __future__ import annotations

import math

import attrs

from tinker_core.errors import InvalidLoraConfigError, InvalidRequestError, TinkerError
from tinker_core.types import (
    DEFAULT_LORA_ALPHA,
    CreateModelInput,
    JsonObject,
    LoraConfig,
    OptimizerConfig,
    RequestType,
)
from tinker_server.wire.body import Body
from tinker_server.wire.fields import Fields, show
from tinker_server.wire.rejected import RejectedRequest, reject
from tinker_server.wire.settings import check_plain

PREFIX = "tinker_server."
"""Keys of ``user_metadata`` that speak to this server begin with it."""

ALPHA_KEY = f"{PREFIX}lora_alpha"
TARGETS_KEY = f"{PREFIX}target_modules"

CREATION = 0
"""The place of a model's creation in its own order; clients count from 1."""


def new_model_id(session_id: str, model_seq_id: int) -> str:
    """The id that clients derive for a model of their session."""
    return f"{session_id}:train:{model_seq_id}"


def place_in_session(fields: Fields) -> tuple[str, int]:
    """Session and number of a model to create; without them the request belongs nowhere and is refused at once."""
    session_id, model_seq_id = fields.text("session_id"), fields.integer("model_seq_id")
    if model_seq_id < 0:
        raise InvalidRequestError(f"model_seq_id must not be negative, got {model_seq_id}")
    return session_id, model_seq_id


def read_create_model(body: Body) -> CreateModelInput | RejectedRequest:
    """A new adapter. Its alpha and target modules come from ``user_metadata``."""
    fields = Fields(body.json_object(), "")
    session_id, model_seq_id = place_in_session(fields)
    try:
        metadata = fields.metadata("user_metadata")
        request = CreateModelInput(
            session_id=session_id,
            model_seq_id=model_seq_id,
            base_model=fields.text("base_model"),
            lora_config=_lora_config(fields, metadata),
            optimizer_config=read_optimizer_config(fields) or OptimizerConfig(),
            user_metadata=metadata,
        )
        fields.log_unknown()
    except TinkerError as error:
        return reject(new_model_id(session_id, model_seq_id), CREATION, RequestType.CREATE_MODEL, error)
    return request


def _lora_config(fields: Fields, metadata: JsonObject | None) -> LoraConfig:
    if not fields.has("lora_config"):
        raise InvalidLoraConfigError("lora_config is required; rank 0 asks for training of all parameters")
    lora = fields.nested("lora_config")
    own = read_adapter_settings(metadata)
    config = LoraConfig(
        rank=lora.integer("rank"),
        seed=lora.integer("seed", None),
        train_attn=lora.boolean("train_attn", True),
        train_mlp=lora.boolean("train_mlp", True),
        train_unembed=lora.boolean("train_unembed", True),
        alpha=DEFAULT_LORA_ALPHA if own.alpha is None else own.alpha,
        target_modules=own.target_modules,
    )
    lora.refuse_unknown()
    return config


def read_optimizer_config(fields: Fields) -> OptimizerConfig | None:
    """The optimizer family, None when the client names none. Whether it exists is for the engine to say."""
    values = fields.mapping("optimizer_config", None)
    if values is None:
        return None
    config = Fields(values, "optimizer_config")
    settings = {key: value for key, value in values.items() if key != "type" and value is not None}
    return OptimizerConfig(type=config.text("type", "adamw"), settings=check_plain(settings, "optimizer_config"))


@attrs.frozen(kw_only=True)
class AdapterSettings:
    """What ``user_metadata`` says about an adapter; None where it says nothing."""

    alpha: float | None = None
    target_modules: tuple[str, ...] | None = None


def read_adapter_settings(metadata: JsonObject | None) -> AdapterSettings:
    """The ``tinker_server.*`` keys. Values may be texts, for the SDK's metadata holds nothing else."""
    own = {key: value for key, value in (metadata or {}).items() if key.startswith(PREFIX)}
    unknown = sorted(own.keys() - {ALPHA_KEY, TARGETS_KEY})
    if unknown:
        names = ", ".join(repr(name) for name in unknown)
        raise InvalidLoraConfigError(
            f"user_metadata has unknown keys {names}; known are {ALPHA_KEY!r}, {TARGETS_KEY!r}"
        )
    return AdapterSettings(alpha=_alpha(own.get(ALPHA_KEY)), target_modules=_target_modules(own.get(TARGETS_KEY)))


def _alpha(value: object) -> float | None:
    if value is None:
        return None
    try:
        alpha = math.nan if isinstance(value, bool) or not isinstance(value, int | float | str) else float(value)
    except ValueError:
        alpha = math.nan
    if not math.isfinite(alpha) or alpha <= 0:
        raise InvalidLoraConfigError(f"user_metadata[{ALPHA_KEY!r}] must be a number above 0, got {show(value)}")
    return alpha


def _target_modules(value: object) -> tuple[str, ...] | None:
    if value is None:
        return None
    items = value.split(",") if isinstance(value, str) else value
    names = [item.strip() for item in items if isinstance(item, str)] if isinstance(items, list) else []
    if not isinstance(items, list) or len(names) != len(items) or not names or not all(names):
        raise InvalidLoraConfigError(
            f"user_metadata[{TARGETS_KEY!r}] must be names of linears, as 'q_proj,v_proj' or a list, got {show(value)}"
        )
    return tuple(dict.fromkeys(names))
