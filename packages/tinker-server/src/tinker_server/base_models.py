"""The base models a server is told to serve: how they are named, and which names clients could not work with."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tinker_core.errors import ConfigurationError
from tinker_core.types import BaseModelSpec


def parse_base_model(text: str, *, trainable: bool = True, sampleable: bool = True) -> BaseModelSpec:
    """``NAME=PATH``, ``PATH`` or ``NAME``; a path or name alone is what clients ask for and what is loaded."""
    name, separator, path = text.partition("=")
    if not separator or Path(text).expanduser().is_dir():
        name = path = text
    return make_base_model(name, path, trainable=trainable, sampleable=sampleable)


def make_base_model(name: str, path: str, *, trainable: bool = True, sampleable: bool = True) -> BaseModelSpec:
    """A checked base model; an existing directory becomes an absolute path, anything else is a hub name.

    Raises `ConfigurationError` for a name that clients would mangle and for a path that does not exist.
    """
    if not name or not path:
        raise ConfigurationError("a base model needs a name and a path; use NAME=PATH, PATH or NAME")
    if not trainable and not sampleable:
        raise ConfigurationError(f"base model {name!r} is neither trainable nor sampleable; allow one of the two")
    name = name if name == "/" else name.rstrip("/")
    check_client_name(name, path)
    return BaseModelSpec(name=name, path=_resolve(name, path), trainable=trainable, sampleable=sampleable)


def _resolve(name: str, path: str) -> str:
    directory = Path(path).expanduser()
    if directory.is_dir():
        return str(directory.resolve())
    if path.startswith(("/", ".", "~")) or directory.exists():
        raise ConfigurationError(
            f"base model {name!r}: {path!r} is not a directory; give a model directory or a hub name"
        )
    return path


def check_client_name(name: str, path: str) -> None:
    """Raise `ConfigurationError` for a name that the SDK's ``get_tokenizer`` would cut or refuse.

    The SDK loads the tokenizer by the base model's name. It drops everything from the first ":" on, and of a name with
    exactly two slashes it keeps two segments.
    """
    if name.startswith("~"):
        raise ConfigurationError(
            f"base model name {name!r} begins with '~', which clients do not expand; "
            f"use the full path, or --base-model ORG/NAME={path}"
        )
    if ":" in name:
        raise ConfigurationError(
            f"base model name {name!r} contains ':', and the tinker SDK cuts names there when it loads the tokenizer; "
            f"give the model a name of its own, --base-model ORG/NAME={path}"
        )
    if name.count("/") == 2:
        kept = "/".join(name.split("/")[:2])
        raise ConfigurationError(
            f"base model name {name!r} has exactly two slashes, "
            f"and the tinker SDK would load the tokenizer of {kept!r}; "
            f"write the path with one slash more, --base-model {_one_slash_more(name)}, "
            f"or give the model a name of its own, --base-model ORG/NAME={path}"
        )


def _one_slash_more(name: str) -> str:
    head, _, tail = name.rpartition("/")
    return f"{head}/./{tail}"


def check_distinct(models: Iterable[BaseModelSpec]) -> tuple[BaseModelSpec, ...]:
    """All models, or `ConfigurationError` when there is none or a name is given twice."""
    seen: dict[str, BaseModelSpec] = {}
    for model in models:
        if model.name in seen:
            raise ConfigurationError(
                f"base model {model.name!r} is given twice, as {seen[model.name].path!r} and {model.path!r}; "
                "give each a name of its own with NAME=PATH"
            )
        seen[model.name] = model
    if not seen:
        raise ConfigurationError("no base model is given; pass --base-model NAME=PATH, PATH or NAME at least once")
    return tuple(seen.values())
