"""Settings out of a TOML file, under those of the command line."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

from tinker_core.errors import ConfigurationError
from tinker_core.interfaces import Option
from tinker_core.types import BaseModelSpec
from tinker_server.base_models import check_distinct, make_base_model, parse_base_model
from tinker_server.config import ServerConfig, settings, type_of


def build_config(given: Mapping[str, object], base_models: Sequence[str], options: Sequence[Option]) -> ServerConfig:
    """A configuration from what flags gave, on top of the TOML file that ``given["config"]`` may name.

    ``given`` holds settings and plugin options by field name; ``base_models`` are the raw ``--base-model`` texts, and
    replace the file's models when there are any. Raises `ConfigurationError` that names the setting.
    """
    values = dict(given)
    path = values.pop("config", None)
    file_values, file_models = read_config_file(Path(str(path)), options) if path is not None else ({}, ())
    merged = {**file_values, **values}
    names = settings()
    models = check_distinct([parse_base_model(text) for text in base_models] or file_models)
    own = {key: value for key, value in merged.items() if key in names}
    chosen = {key.replace("_", "-"): value for key, value in merged.items() if key not in names}
    return ServerConfig(base_models=models, options=chosen, **own)  # type: ignore[arg-type]


def read_config_file(path: Path, options: Sequence[Option]) -> tuple[dict[str, object], tuple[BaseModelSpec, ...]]:
    """Settings by field name and the ``[[models]]`` of a TOML file."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"--config {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"--config {path} is not TOML: {error}") from error
    models = content.pop("models", [])
    kinds: dict[str, type] = {name: type_of(field) for name, field in settings().items()}
    kinds |= {option.name.replace("-", "_"): option.type for option in options}
    values: dict[str, object] = {}
    for key, value in content.items():
        field = key.replace("-", "_")
        if field not in kinds:
            known = ", ".join(sorted([*(name.replace("_", "-") for name in kinds), "models"]))
            raise ConfigurationError(f"{path}: unknown key {key!r}; known keys: {known}")
        values[field] = _checked(f"{path}: {key}", value, kinds[field])
    return values, _models_of(path, models)


def _checked(where: str, value: object, kind: type) -> object:
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ConfigurationError(f"{where} must be of type {kind.__name__}, got {value!r}")
    return value


_MODEL_KEYS: dict[str, type] = {"name": str, "path": str, "trainable": bool, "sampleable": bool}


def _models_of(path: Path, tables: object) -> tuple[BaseModelSpec, ...]:
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise ConfigurationError(f"{path}: models must be tables, written [[models]]")
    models = []
    for number, table in enumerate(tables):
        where = f"{path}: models[{number}]"
        unknown = sorted(table.keys() - _MODEL_KEYS.keys())
        if unknown:
            raise ConfigurationError(f"{where}: unknown key {unknown[0]!r}; known keys: {', '.join(_MODEL_KEYS)}")
        values = {key: _checked(f"{where}.{key}", value, _MODEL_KEYS[key]) for key, value in table.items()}
        name, source = values.pop("name", None), values.pop("path", None)
        if name is None and source is None:
            raise ConfigurationError(f"{where} needs a name or a path")
        models.append(make_base_model(str(name or source), str(source or name), **values))  # type: ignore[arg-type]
    return tuple(models)
