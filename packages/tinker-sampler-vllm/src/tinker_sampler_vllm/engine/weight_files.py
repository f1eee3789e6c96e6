"""What the safetensors files of a model hold, known from their headers: no tensor is read."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import attrs

from tinker_core.errors import CheckpointMismatchError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
HEAD = "lm_head.weight"
EMBEDDING = "embed_tokens.weight"

_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
"""What is converted to whatever the engine computes in."""
_DERIVED = (".rotary_emb.inv_freq", ".rotary_emb.cos_cached", ".rotary_emb.sin_cached")
"""Tensors in files of old that follow from the configuration; vLLM passes over them."""
_PEFT_PREFIX = "base_model.model."
_LORA_A, _LORA_B = ".lora_A.weight", ".lora_B.weight"
_MAX_HEADER_BYTES = 100 * 1024**2
"""The bound of the format itself."""
_COMPARED_BYTES = 16 * 1024**2


@attrs.frozen(kw_only=True)
class StoredTensor:
    """Where and how a tensor lies."""

    file: Path
    dtype: str
    """The name of the format: ``"F32"``, ``"BF16"``…"""
    shape: tuple[int, ...]
    start: int
    """Byte in the file."""
    num_bytes: int


def base_tensors(base_model: str) -> dict[str, StoredTensor]:
    """The tensors of a base model by name, none where it is stored in another format.

    ``base_model`` is a directory, or the name of a hub model that is in the cache.
    """
    directory = Path(base_model)
    if not directory.is_dir():
        from huggingface_hub import snapshot_download

        directory = Path(snapshot_download(base_model, local_files_only=True))
    return stored_tensors(weight_files(directory)) if next(directory.glob("*.safetensors"), None) else {}


def weight_files(directory: Path) -> list[Path]:
    """The files of a model in reading order; raises `CheckpointMismatchError` where there are none."""
    index = directory / INDEX_FILE
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise CheckpointMismatchError(f"{INDEX_FILE} cannot be read: {type(error).__name__}: {error}") from error
        outside = sorted(name for name in names if Path(name).name != name)
        if outside:
            raise CheckpointMismatchError(f"{INDEX_FILE} names {outside[0]!r}, which is not a file beside it")
        return [directory / name for name in sorted(names)]
    if (directory / SINGLE_FILE).is_file():
        return [directory / SINGLE_FILE]
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise CheckpointMismatchError(f"{directory} holds no *.safetensors file")
    return files


def stored_tensors(files: list[Path]) -> dict[str, StoredTensor]:
    """The tensors of some files by name; raises `CheckpointMismatchError` for broken files and doubled names."""
    found: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in _header(file).items():
            if name in found:
                raise CheckpointMismatchError(f"{name} is both in {found[name].file.name} and in {file.name}")
            if not name.endswith(_DERIVED):
                found[name] = tensor
    return found


def _header(file: Path) -> dict[str, StoredTensor]:
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(size, _MAX_HEADER_BYTES):
                raise ValueError("its header is longer than the file")
            entries = json.loads(stream.read(length))
        entries.pop("__metadata__", None)
        begin = 8 + length
        tensors = {}
        for name, entry in entries.items():
            start, end = entry["data_offsets"]
            if begin + end > size:
                raise ValueError(f"it ends before {name}")
            tensors[name] = StoredTensor(
                file=file, dtype=entry["dtype"], shape=tuple(entry["shape"]), start=begin + start, num_bytes=end - start
            )
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointMismatchError(f"{file.name} cannot be read: {type(error).__name__}: {error}") from error
    return tensors


def check_same_model(given: Mapping[str, StoredTensor], base: Mapping[str, StoredTensor], *, ties: bool) -> None:
    """Raise `CheckpointMismatchError` unless the given weights are all those of the base model, and no others.

    ``ties``: the model's ``lm_head`` is its embedding, so that files may hold it twice or once.
    """
    optional = {HEAD} if ties else set()
    missing = sorted(set(base) - set(given) - optional)
    unexpected = sorted(set(given) - set(base) - optional)
    if missing or unexpected:
        parts = [f"lack {_some(missing)}"] * bool(missing) + [f"have {_some(unexpected)} besides"] * bool(unexpected)
        raise CheckpointMismatchError(f"the weights are not those of the base model: they {' and '.join(parts)}")
    for name, tensor in given.items():
        expected = base.get(name) or base[embedding_of(base)]
        if tensor.shape != expected.shape:
            raise CheckpointMismatchError(
                f"{name} has shape {list(tensor.shape)}, that of the base model {list(expected.shape)}"
            )
        if tensor.dtype != expected.dtype and not {tensor.dtype, expected.dtype} <= _FLOATS:
            raise CheckpointMismatchError(f"{name} is {tensor.dtype}, that of the base model {expected.dtype}")
    if ties:
        embedding = given[embedding_of(given)]
        if HEAD in given and not _same_values(given[HEAD], embedding):
            raise CheckpointMismatchError(
                f"{HEAD} is not the embedding, although the base model ties them; it cannot be served with this model"
            )


def check_adapter(adapter: Mapping[str, StoredTensor], base: Mapping[str, StoredTensor], *, max_rank: int) -> None:
    """Raise `CheckpointMismatchError` unless the matrices of a PEFT adapter fit the base model's.

    vLLM puts smaller ones into a corner of its own and finds greater ones too late. Modules that the base model does
    not have are left to vLLM to refuse.
    """
    for name, a in adapter.items():
        if not name.endswith(_LORA_A):
            continue
        module = name.removeprefix(_PEFT_PREFIX).removesuffix(_LORA_A)
        b = adapter.get(name.removesuffix(_LORA_A) + _LORA_B)
        if b is None or len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
            found = "is missing" if b is None else f"has shape {list(b.shape)}"
            raise CheckpointMismatchError(
                f"the adapter's matrices for {module} do not fit together: A has shape {list(a.shape)}, and B {found}"
            )
        if a.shape[0] > max_rank:
            raise CheckpointMismatchError(
                f"the adapter has rank {a.shape[0]} for {module}, at most {max_rank} is served"
            )
        weight = f"{module}.weight"
        own = base.get(weight) or (base[embedding_of(base)] if weight == HEAD else None)
        if own is not None and own.shape != (b.shape[0], a.shape[1]):
            raise CheckpointMismatchError(
                f"the adapter is for another model: it changes {module} of shape {[b.shape[0], a.shape[1]]}, "
                f"that of the base model is {list(own.shape)}"
            )


def embedding_of(tensors: Mapping[str, StoredTensor]) -> str:
    """The name of the embedding that a tied ``lm_head`` equals; raises `CheckpointMismatchError`."""
    names = [name for name in tensors if f".{name}".endswith(f".{EMBEDDING}")]
    if len(names) != 1:
        raise CheckpointMismatchError(
            f"the model ties its lm_head to its embedding, but {len(names)} of its tensors are called {EMBEDDING}; "
            "full weights of such a model cannot be served"
        )
    return names[0]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _same_values(first: StoredTensor, second: StoredTensor) -> bool:
    if (first.dtype, first.num_bytes) != (second.dtype, second.num_bytes):
        return False
    with first.file.open("rb") as one, second.file.open("rb") as other:
        one.seek(first.start)
        other.seek(second.start)
        left = first.num_bytes
        while left > 0:
            size = min(left, _COMPARED_BYTES)
            if one.read(size) != other.read(size):
                return False
            left -= size
    return True
