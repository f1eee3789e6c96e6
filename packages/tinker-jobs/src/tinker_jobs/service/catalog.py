"""The models that jobs can train, as clients browse them."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from tinker_core.extensions import RunningServer
from tinker_core.types import BaseModelSpec
from tinker_jobs.service.checks import usable_models
from tinker_jobs.service.queries import CatalogQuery

_LOGGER = logging.getLogger(__name__)
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Where configurations of mixtures of experts say how many there are."""


@attrs.frozen(kw_only=True)
class Architecture:
    """What a model's files say about it."""

    family: str = "unknown"
    is_mixture: bool = False
    size_b: float = 0.0
    """Billions of parameters; 0 where no file tells."""
    context_length: int = 0
    """Tokens."""


async def browse(server: RunningServer, query: CatalogQuery) -> dict[str, Any]:
    """The models that fit a query, as ``TrainingCatalogResponse``; ``total`` counts those beyond the limit too."""
    for_sft, for_rl = (usable_models(server, for_rl=for_rl) for for_rl in (False, True))
    lengths = {model.model_name: model.max_context_length for model in server.ready_models()}
    found = []
    for spec in server.base_models:
        if spec.name in for_sft:
            entry = await asyncio.to_thread(
                describe_model, spec, is_sampleable=spec.name in for_rl, context_length=lengths.get(spec.name)
            )
            if _fits(entry, query):
                found.append(entry)
    return {"models": found[: query.limit], "total": len(found), "limit": query.limit}


def describe_model(spec: BaseModelSpec, *, is_sampleable: bool, context_length: int | None) -> dict[str, Any]:
    """A model as ``TrainingModel``; ``context_length`` is what the trainer takes, None before it is ready."""
    architecture = read_architecture(spec.path)
    return {
        "tinker_id": spec.name,
        "display_name": spec.name.rstrip("/").rpartition("/")[2],
        "family": architecture.family,
        "type": "moe" if architecture.is_mixture else "dense",
        "size_b": architecture.size_b,
        "context_length": context_length or architecture.context_length,
        "extended_context": False,
        "supported_algorithms": ["sft", *(["importance_sampling", "ppo"] if is_sampleable else [])],
        "pricing": None,
    }


def _fits(entry: Mapping[str, Any], query: CatalogQuery) -> bool:
    return (
        (query.query is None or query.query.lower() in entry["tinker_id"].lower())
        and (query.family is None or query.family.lower() == entry["family"].lower())
        and (query.algorithm is None or query.algorithm in entry["supported_algorithms"])
        and (query.min_size_b is None or entry["size_b"] >= query.min_size_b)
        and (query.max_size_b is None or entry["size_b"] <= query.max_size_b)
    )


def read_architecture(path: str) -> Architecture:
    """What the files of a model say: those in a directory, or those that the hub's cache has of a repository."""
    directory = _directory_of(path)
    config_file = None if directory is None else directory / "config.json"
    if directory is None or config_file is None or not config_file.is_file():
        return Architecture()
    try:
        config = json.loads(config_file.read_text())
        text = config.get("text_config", config)
        return Architecture(
            family=str(config.get("model_type", "unknown")),
            is_mixture=any(int(text.get(name) or 0) > 1 for name in _EXPERTS),
            size_b=round(_count_parameters(directory) / 1e9, 3),
            context_length=int(text.get("max_position_embeddings") or 0),
        )
    except (OSError, ValueError, TypeError, AttributeError) as error:
        # The catalog names a model that works, whatever else its files hold.
        _LOGGER.warning("the catalog cannot describe %s: %s", path, error)
        return Architecture()


def _directory_of(path: str) -> Path | None:
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(path, "config.json")
    except HFValidationError:
        return None
    return Path(config).parent if isinstance(config, str) else None


def _count_parameters(directory: Path) -> int:
    return sum(_count_in(file) for file in directory.glob("*.safetensors"))


@functools.lru_cache(maxsize=4096)  # of a file that is there: a model may come while the server runs
def _count_in(file: Path) -> int:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="numpy") as tensors:
            names = tensors.keys()
            return sum(math.prod(tensors.get_slice(name).get_shape()) for name in names)
    except SafetensorError as error:
        raise ValueError(f"{file.name}: {error}") from error
