"""Typed records to bytes and back, for process borders. MessagePack with numpy arrays as raw bytes; no pickle."""

from __future__ import annotations

import operator
import types
from functools import partial
from typing import Any, Union, get_args, get_origin

import attrs
import cattrs
import msgpack
import numpy as np
from cattrs.strategies import configure_tagged_union

from tinker_core.types import ModelInputChunk, TinkerPath, enums


def _structure_array(value: Any, _: object) -> np.ndarray[Any, Any]:  # noqa: ANN401 - whatever the bytes held
    dtype, shape, raw = value
    return np.frombuffer(raw, dtype=np.dtype(dtype)).reshape(shape)


def _unstructure_array(array: np.ndarray[Any, Any]) -> tuple[str, tuple[int, ...], bytes]:
    return array.dtype.str, array.shape, np.ascontiguousarray(array).tobytes()


def _is_array(cls: Any) -> bool:  # noqa: ANN401 - any annotation
    return (get_origin(cls) or cls) is np.ndarray


def _exact(cls: type) -> Any:  # noqa: ANN401 - a structure hook
    def structure(value: object, _: object) -> object:
        if type(value) is not cls and not (cls is float and type(value) is int):
            raise TypeError(f"expected {cls.__name__}, got {type(value).__name__}")
        return float(value) if cls is float else value  # type: ignore[arg-type]

    return structure


def _exact_tuple(cls: type) -> Any:  # noqa: ANN401 - a structure hook
    """One hook for a whole list of numbers: token lists and shapes are long or frequent."""

    def structure(value: list[Any], _: object) -> tuple[Any, ...]:
        if not all(type(item) is cls for item in value):
            raise TypeError(f"expected only {cls.__name__} elements")
        return tuple(value)

    return structure


def _is_scalar_union(cls: Any) -> bool:  # noqa: ANN401 - any annotation
    if get_origin(cls) not in (Union, types.UnionType):
        return False
    return set(get_args(cls)) <= {str, int, float, bool, type(None)}


def make_converter() -> cattrs.Converter:
    """A converter for every record in `tinker_core.types`; values are never coerced from one type to another."""
    converter = cattrs.Converter(forbid_extra_keys=True, detailed_validation=False)
    for scalar in (bool, int, float, str):
        converter.register_structure_hook(scalar, _exact(scalar))
    for name in enums.__all__:
        # By class, because the hook of str would win over one by predicate.
        converter.register_structure_hook(getattr(enums, name), lambda value, cls: cls(value))
    converter.register_structure_hook_func(lambda cls: cls is object, lambda value, _: value)
    converter.register_structure_hook_func(_is_scalar_union, lambda value, _: value)
    for number in (int, float):
        converter.register_structure_hook_func(partial(operator.eq, tuple[number, ...]), _exact_tuple(number))  # type: ignore[valid-type]
    converter.register_structure_hook(bytes, lambda value, _: bytes(value))
    converter.register_structure_hook_func(_is_array, _structure_array)
    converter.register_unstructure_hook_func(_is_array, _unstructure_array)
    converter.register_unstructure_hook(TinkerPath, str)
    converter.register_structure_hook(TinkerPath, lambda value, _: TinkerPath.parse(value))
    configure_tagged_union(ModelInputChunk, converter, tag_name="type")
    return converter


class Encoder:
    """Encodes values of known types; one instance per process, it caches generated code."""

    def __init__(self) -> None:
        self._converter = make_converter()

    def encode(self, value: object, cls: Any) -> bytes:  # noqa: ANN401 - any annotation
        """Bytes of a value of type ``cls``."""
        packed = msgpack.packb(self._converter.unstructure(value, unstructure_as=cls), use_bin_type=True)
        return bytes(packed)

    def decode(self, data: bytes, cls: Any) -> Any:  # noqa: ANN401 - an instance of cls
        """The value that `encode` got; arrays are read-only views of ``data``."""
        raw = msgpack.unpackb(data, raw=False, strict_map_key=False)
        return self._converter.structure(raw, cls)


@attrs.frozen(kw_only=True)
class Nothing:
    """The payload of a command or answer that carries none."""
