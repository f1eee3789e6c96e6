"""Saving and loading weights: what clients send."""

from __future__ import annotations

from tinker_core.engine import CopyWeightsInput
from tinker_core.errors import InvalidRequestError, TinkerError
from tinker_core.types import (
    LoadWeightsInput,
    RequestType,
    SamplerSaveKind,
    SaveWeightsExternalInput,
    SaveWeightsForSamplerInput,
    SaveWeightsInput,
    UnloadModelInput,
)
from tinker_server.wire.body import Body
from tinker_server.wire.fields import Fields
from tinker_server.wire.models import (
    CREATION,
    new_model_id,
    place_in_session,
    read_adapter_settings,
    read_optimizer_config,
)
from tinker_server.wire.rejected import RejectedRequest, reject
from tinker_server.wire.training import place_in_model


def read_save_weights(body: Body) -> SaveWeightsInput | RejectedRequest:
    """A training checkpoint to save."""
    fields = Fields(body.json_object(), "")
    model_id, seq_id = place_in_model(fields)
    try:
        request = SaveWeightsInput(
            model_id=model_id,
            seq_id=seq_id,
            path=fields.text("path"),
            ttl_seconds=fields.integer("ttl_seconds", None),
            overwrite=fields.boolean("overwrite", False),
            user_metadata=fields.metadata("user_metadata"),
        )
        fields.log_unknown()
    except TinkerError as error:
        return reject(model_id, seq_id, RequestType.SAVE_WEIGHTS, error)
    return request


def read_save_weights_for_sampler(body: Body) -> SaveWeightsForSamplerInput | RejectedRequest:
    """Weights to save for sampling: ``path`` for named ones, ``sampling_session_seq_id`` for ephemeral ones."""
    fields = Fields(body.json_object(), "")
    model_id, seq_id = place_in_model(fields)
    try:
        path = fields.text("path", None)
        number = fields.integer("sampling_session_seq_id", None)
        if (path is None) == (number is None):
            raise InvalidRequestError("send exactly one of path (a named save) and sampling_session_seq_id")
        request = SaveWeightsForSamplerInput(
            model_id=model_id,
            seq_id=seq_id,
            path=path,
            sampling_session_seq_id=number,
            kind=_save_kind(fields.text("kind", SamplerSaveKind.SNAPSHOT.value)),
            ttl_seconds=fields.integer("ttl_seconds", None),
            user_metadata=fields.metadata("user_metadata"),
        )
        fields.log_unknown()
    except TinkerError as error:
        return reject(model_id, seq_id, RequestType.SAVE_WEIGHTS_FOR_SAMPLER, error)
    return request


def read_save_weights_external(body: Body) -> SaveWeightsExternalInput | RejectedRequest:
    """An adapter to export for use outside."""
    fields = Fields(body.json_object(), "")
    model_id, seq_id = place_in_model(fields)
    try:
        request = SaveWeightsExternalInput(
            model_id=model_id,
            seq_id=seq_id,
            path=fields.text("path"),
            ttl_seconds=fields.integer("ttl_seconds", None),
            age_encryption_recipients=fields.texts("age_encryption_recipients"),
        )
        fields.log_unknown()
    except TinkerError as error:
        return reject(model_id, seq_id, RequestType.SAVE_WEIGHTS_EXTERNAL, error)
    return request


def read_unload_model(body: Body) -> UnloadModelInput:
    """A model to release."""
    fields = Fields(body.json_object(), "")
    request = UnloadModelInput(model_id=fields.text("model_id"))
    fields.log_unknown()
    return request


def read_copy_weights(body: Body, token: str | None, idempotency_key: str | None) -> CopyWeightsInput:
    """A checkpoint to copy. The access token comes in a header, from some clients in the body."""
    fields = Fields(body.json_object(), "")
    request = CopyWeightsInput(
        source_path=fields.text("source_path"),
        session_id=fields.text("session_id", None),
        model_seq_id=fields.integer("model_seq_id", None),
        destination_project_id=fields.text("destination_project_id", None),
        ttl_seconds=fields.integer("ttl_seconds", None),
        weights_access_token=token or fields.text("weights_access_token", None),
        idempotency_key=idempotency_key,
    )
    fields.log_unknown()
    return request


def _save_kind(text: str) -> SamplerSaveKind:
    try:
        return SamplerSaveKind(text)
    except ValueError:
        raise InvalidRequestError(f"kind must be one of {', '.join(SamplerSaveKind)}, got {text!r}") from None


def read_load_weights(body: Body) -> LoadWeightsInput | RejectedRequest:
    """A checkpoint to load: into a model (``model_id``, ``seq_id``) or into a new one (``session_id``,
    ``model_seq_id``)."""
    fields = Fields(body.json_object(), "")
    existing = place_in_model(fields) if fields.has("model_id") else None
    new = place_in_session(fields) if existing is None else None
    try:
        metadata = fields.metadata("user_metadata")
        read_adapter_settings(metadata)
        request = LoadWeightsInput(
            path=fields.text("path"),
            # Clients before 0.6 send no flag; every later "load_state" means weights only.
            optimizer=fields.boolean("optimizer", False),
            model_id=existing[0] if existing else None,
            seq_id=existing[1] if existing else None,
            session_id=new[0] if new else None,
            model_seq_id=new[1] if new else None,
            base_model=fields.text("base_model", None),
            optimizer_config=read_optimizer_config(fields),
            user_metadata=metadata,
            weights_access_token=fields.text("weights_access_token", None),
        )
        fields.log_unknown()
    except TinkerError as error:
        return _rejected(existing, new, error)
    return request


def reject_load(load: LoadWeightsInput, error: TinkerError) -> RejectedRequest:
    """A well-formed load that must fail in its future all the same."""
    existing = None if load.model_id is None or load.seq_id is None else (load.model_id, load.seq_id)
    new = None if load.session_id is None or load.model_seq_id is None else (load.session_id, load.model_seq_id)
    return _rejected(existing, new, error)


def _rejected(existing: tuple[str, int] | None, new: tuple[str, int] | None, error: TinkerError) -> RejectedRequest:
    model_id, seq_id = existing or (new_model_id(*new) if new else "", CREATION)
    return reject(model_id, seq_id, RequestType.LOAD_WEIGHTS, error)
