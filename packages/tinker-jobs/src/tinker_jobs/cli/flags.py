"""A flag for every field of a job's request, made from the request's own models so that none can be missing."""

from __future__ import annotations

import argparse
import copy
import math
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import attrs
import orjson
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from tinker_jobs.cli.parsing import JobsCommandError
from tinker_jobs.requests import REQUEST_KINDS, CapabilityRef, DatasetRef, RewardRecipe, WorldRewardPolicy

KINDS: dict[str, tuple[str, str]] = {"sft": ("tinker", "sft"), "rl": ("tinker", "rl"), "grpo": ("ray", "rl")}
"""What a kind of job is called here -> backend and trainer type."""
_FIXED = ("backend", "trainer_type", "config")
_REFS = (CapabilityRef, DatasetRef)
_NAMED = (RewardRecipe, WorldRewardPolicy)


@attrs.frozen(kw_only=True)
class RequestFlag:
    """One flag and the field that it sets."""

    flag: str
    path: tuple[str, ...]
    """Of the field in the request; one of ``params`` ends in that."""
    parse: Callable[[str], Any]
    metavar: str | None
    help: str
    choices: tuple[str, ...] | None = None
    is_list: bool = False
    kinds: tuple[str, ...] = ()
    """The kinds of job that have the field; empty for all."""

    @property
    def dest(self) -> str:
        """Its name among parsed arguments."""
        return ".".join(self.path)


def request_flags() -> tuple[RequestFlag, ...]:
    """All flags of all kinds of job, in the order of the models."""
    found: dict[tuple[str, ...], RequestFlag] = {}
    for kind, key in KINDS.items():
        for flag in _flags_of(kind, REQUEST_KINDS[key]):
            earlier = found.get(flag.path)
            found[flag.path] = flag if earlier is None else _joined(earlier, flag)
    return tuple(found.values())


def add_request_flags(parser: argparse.ArgumentParser) -> None:
    """Add them all; those that are not given leave no trace among the parsed arguments."""
    for flag in request_flags():
        options: dict[str, Any] = {"choices": flag.choices} if flag.choices else {"metavar": flag.metavar}
        parser.add_argument(
            flag.flag,
            dest=flag.dest,
            type=flag.parse,
            action="append" if flag.is_list else "store",
            default=argparse.SUPPRESS,
            help=flag.help + ("" if len(flag.kinds) in (0, len(KINDS)) else f"; {', '.join(flag.kinds)} only"),
            **options,
        )


def apply_flags(request: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """A request with the fields that flags set in place of its own.

    Raises `JobsCommandError` for parameters of a recipe that neither names.
    """
    merged = copy.deepcopy(dict(request))
    for flag in request_flags():
        if flag.dest not in given:
            continue
        *parents, name = flag.path
        holder: Any = merged
        for parent in parents:
            holder = holder.get(parent)
            if not isinstance(holder, dict):
                raise JobsCommandError(f"{flag.flag} sets a part of {parent}, which is not given or is no object")
        holder[name] = given[flag.dest]
    return merged


def parse_ref(text: str) -> dict[str, str]:
    """``name@version`` as the API writes it."""
    name, found, version = text.rpartition("@")
    if not (found and name and version):
        raise argparse.ArgumentTypeError(f"must be NAME@VERSION, got {text!r}")
    return {"name": name, "version": version}


def _flags_of(kind: str, model: type[BaseModel]) -> Iterator[RequestFlag]:
    for name, field in model.model_fields.items():
        if name not in _FIXED:
            yield from _field_flags((name,), field, ())
    config = model.model_fields["config"].annotation
    assert isinstance(config, type)
    assert issubclass(config, BaseModel)
    for name, field in config.model_fields.items():
        yield from _field_flags(("config", name), field, (kind,))


def _field_flags(path: tuple[str, ...], field: FieldInfo, kinds: tuple[str, ...]) -> Iterator[RequestFlag]:
    """The flag of a field, and that of its parameters where it has some."""
    annotation, limits = _bare(field.annotation)
    is_list = get_origin(annotation) is list
    if is_list:
        annotation, limits = _bare(get_args(annotation)[0])
    name, about = path[-1], ".".join(path)
    in_config = path[0] == "config"
    if annotation in _REFS or (in_config and name.endswith("_ref")):
        name = name.removesuffix("s").removesuffix("_ref")
    elif is_list:
        name = name.removesuffix("s") if name == "tags" else name
    fields: dict[str, Any] = {"flag": _flag(name), "path": path, "kinds": kinds, "is_list": is_list}
    help_text = about + (", may be repeated" if is_list else "")
    if annotation in _REFS:
        yield RequestFlag(parse=parse_ref, metavar="NAME@VERSION", help=help_text, **fields)
    elif annotation in _NAMED:
        yield RequestFlag(parse=_as_named, metavar="NAME", help=f"{about}.name", **fields)
        yield RequestFlag(
            flag=_flag(name.removesuffix("_recipe") + "_params"),
            path=(*path, "params"),
            kinds=kinds,
            parse=_as_object,
            metavar="JSON",
            help=f"{about}.params, an object",
        )
    elif get_origin(annotation) is Literal:
        yield RequestFlag(parse=str, metavar=None, help=help_text, choices=get_args(annotation), **fields)
    else:
        parse, metavar = _SCALARS[annotation]
        yield RequestFlag(parse=parse, metavar=metavar, help=help_text + _said(limits), **fields)


def _bare(annotation: Any) -> tuple[Any, tuple[Any, ...]]:  # noqa: ANN401 - any annotation
    """A type without ``None`` and limits, and the limits."""
    if get_origin(annotation) in (Union, types.UnionType):
        (annotation,) = (one for one in get_args(annotation) if one is not type(None))
    if get_origin(annotation) is Annotated:
        bare, *limits = get_args(annotation)
        return bare, tuple(limits)
    return annotation, ()


def _said(limits: tuple[Any, ...]) -> str:
    """Limits in words."""
    flat = [one for limit in limits for one in (limit.metadata if isinstance(limit, FieldInfo) else (limit,))]
    words = {"ge": "at least", "gt": "above"}
    return "".join(f", {words[name]} {getattr(one, name)}" for one in flat for name in words if hasattr(one, name))


def _joined(one: RequestFlag, other: RequestFlag) -> RequestFlag:
    """The flag of a field that several kinds have."""
    choices = None if one.choices is None else tuple(dict.fromkeys((*one.choices, *(other.choices or ()))))
    return attrs.evolve(one, choices=choices, kinds=(*one.kinds, *other.kinds))


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from error


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from error
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, got {text!r}")
    return value


def _as_named(text: str) -> dict[str, Any]:
    return {"name": text}


def _as_object(text: str) -> dict[str, Any]:
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text!r}: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text!r}")
    return value


_SCALARS: dict[type, tuple[Callable[[str], Any], str]] = {
    int: (_whole, "N"),
    float: (_number, "X"),
    str: (str, "TEXT"),
}
