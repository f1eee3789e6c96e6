"""What a Hugging Face model's directory holds besides its weights: configuration and tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from tinker_core.errors import StorageError

CONFIG_FILE = "config.json"
MODEL_FILE_PATTERNS = ("*.json", "*.txt", "*.model", "*.jinja")
"""Files of a model that are not weights."""
_TEMPLATE_FILE, _TOKENIZER_CONFIG = "chat_template.jinja", "tokenizer_config.json"


def copy_model_files(source: Path, target: Path, dtype: torch.dtype, *, json_only: bool = False) -> None:
    """Copy what makes new weights a model that Transformers and vLLM load; raises `StorageError`.

    ``dtype`` is the type of the new weights, which may be another than the source's; ``config.json`` says it.
    With ``json_only``, as checkpoints are to be, a chat template goes into the tokenizer's configuration; a tokenizer
    that is not in ``tokenizer.json`` stays behind, and is the base model's.
    """
    try:
        for pattern in ("*.json",) if json_only else MODEL_FILE_PATTERNS:
            for path in source.glob(pattern):
                if path.name != CONFIG_FILE and not path.name.endswith(".index.json"):
                    shutil.copyfile(path, target / path.name)
        config = json.loads((source / CONFIG_FILE).read_text(encoding="utf-8"))
        # Transformers before 5 wrote the older name, and both read either.
        key = "torch_dtype" if "torch_dtype" in config else "dtype"
        config[key] = str(dtype).removeprefix("torch.")
        (target / CONFIG_FILE).write_text(json.dumps(config, indent=2), encoding="utf-8")
        if json_only:
            _take_in_template(source / _TEMPLATE_FILE, target / _TOKENIZER_CONFIG)
    except (OSError, ValueError) as error:
        raise StorageError(f"cannot copy the model's configuration from {source} to {target}: {error}") from error


def _take_in_template(template: Path, tokenizer_config: Path) -> None:
    if template.exists() and tokenizer_config.exists():
        config = json.loads(tokenizer_config.read_text(encoding="utf-8"))
        config["chat_template"] = template.read_text(encoding="utf-8")
        tokenizer_config.write_text(json.dumps(config, indent=2), encoding="utf-8")
