"""``tinker-sampler-vllm``: engines for servers on other machines."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tinker_core.errors import ConfigurationError, StorageError, TinkerError
from tinker_core.logs import LOG_FORMAT_VARIABLE, LOG_FORMATS, configure_logging
from tinker_core.types import BaseModelSpec
from tinker_sampler_vllm.addresses import check_address
from tinker_sampler_vllm.installation import check_installation, describe_installation, installed_device, try_import
from tinker_sampler_vllm.protocol import EngineSettings
from tinker_sampler_vllm.security import create_secret, read_secret
from tinker_sampler_vllm.serving_command import ServedEngine, serve_until_signal

_MIB = 1024**2
_DTYPES = ("float32", "bfloat16", "float16")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status: 2 for settings that cannot work, 1 for other failures."""
    given = vars(make_parser().parse_args(arguments))
    run: Callable[[dict[str, Any]], None] = given.pop("run")
    try:
        run(given)
    except TinkerError as error:
        sys.stderr.write(f"tinker-sampler-vllm: {error}\n")
        return 2 if isinstance(error, ConfigurationError | StorageError) else 1
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command and all its actions."""
    parser = argparse.ArgumentParser(
        prog="tinker-sampler-vllm",
        description="vLLM engines for 'tinker-server --sampler vllm' on other machines.",
        allow_abbrev=False,
    )
    actions = parser.add_subparsers(required=True, metavar="serve|check|secret")
    serve = actions.add_parser(
        "serve",
        help="keep an engine running for a server on another machine",
        description="Starts an engine, and starts it again when it dies. A server uses it by --vllm-workers and "
        "--vllm-secret-file. Base model name, --dtype and --deterministic must be those of the server.",
        allow_abbrev=False,
    )
    _add_serve_flags(serve)
    serve.set_defaults(run=_serve)
    check = actions.add_parser("check", help="say whether vLLM is installed and can be loaded", allow_abbrev=False)
    _add_device_flag(check)
    check.set_defaults(run=_check)
    secret = actions.add_parser(
        "secret", help="make a secret for engines and servers, in a file that only you may read", allow_abbrev=False
    )
    secret.add_argument("file", type=Path, metavar="FILE", help="a file that does not exist yet")
    secret.set_defaults(run=lambda given: create_secret(given["file"]))
    return parser


def _add_serve_flags(parser: argparse.ArgumentParser) -> None:
    need = parser.add_argument_group("needed")
    need.add_argument(
        "--base-model",
        required=True,
        metavar="NAME=PATH",
        help="the server's name of the model, and its directory here",
    )
    need.add_argument("--listen", required=True, metavar="tcp://HOST:PORT", help="where to listen")
    need.add_argument(
        "--secret-file", required=True, type=Path, metavar="FILE", help="a secret that the server has too; see 'secret'"
    )
    same = parser.add_argument_group("as of the server")
    same.add_argument("--dtype", choices=_DTYPES, default="float32", help="default: %(default)s")
    same.add_argument("--deterministic", action="store_true", help="one sample at a time: equal requests, equal bits")
    same.add_argument("--max-revisions", type=_at_least(1), default=64, help="weights held at once (%(default)s)")
    same.add_argument("--max-lora-rank", type=_at_least(1), default=128, help="greatest rank (%(default)s)")
    same.add_argument("--max-context-length", type=_at_least(1), help="default: that of the model")
    same.add_argument("--max-decode-batch", type=_at_least(1), default=64, help="sequences at once (%(default)s)")
    engine = parser.add_argument_group("engine")
    _add_device_flag(engine)
    engine.add_argument("--tensor-parallel", type=_at_least(1), default=1, help="GPUs (%(default)s)")
    engine.add_argument("--memory-share", type=_share, help="share of a GPU's memory; default: vLLM's own")
    engine.add_argument(
        "--kv-cache-mib", type=_at_least(1), help="KV cache; default: what the memory share leaves, 1024 on CPUs"
    )
    engine.add_argument("--lora-slots", type=_at_least(1), default=8, help="adapters in one batch (%(default)s)")
    engine.add_argument("--eager", action="store_true", help="neither compile nor capture graphs; always so on CPUs")
    engine.add_argument("--log-format", choices=LOG_FORMATS, default="text", help="default: %(default)s")


def _add_device_flag(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: that of the installed vLLM")


def _serve(given: dict[str, Any]) -> None:
    os.environ[LOG_FORMAT_VARIABLE] = given["log_format"]
    configure_logging(given["log_format"], process="vllm-serve")
    served = read_served_engine(given)
    check_installation(served.settings.device)
    asyncio.run(serve_until_signal(served))


def read_served_engine(given: dict[str, Any]) -> ServedEngine:
    """What the flags of ``serve`` say; raises `ConfigurationError`."""
    return ServedEngine(
        address=check_address(given["listen"]),
        secret=read_secret(given["secret_file"]),
        settings=EngineSettings(
            base_model=_base_model(given["base_model"]),
            device=given["device"] or installed_device(),
            dtype=given["dtype"],
            max_revisions=given["max_revisions"],
            max_lora_rank=given["max_lora_rank"],
            lora_slots=given["lora_slots"],
            max_context_length=given["max_context_length"],
            max_decode_batch=given["max_decode_batch"],
            deterministic=given["deterministic"],
            tensor_parallel=given["tensor_parallel"],
            memory_share=given["memory_share"],
            kv_cache_bytes=given["kv_cache_mib"] and given["kv_cache_mib"] * _MIB,
            eager=given["eager"] or None,
        ),
    )


def _base_model(text: str) -> BaseModelSpec:
    name, _, path = text.partition("=")
    if not name or not path:
        raise ConfigurationError(f"--base-model {text!r} must be NAME=PATH, with the server's name of the model")
    directory = Path(path).expanduser()
    if directory.is_dir():
        return BaseModelSpec(name=name, path=str(directory.resolve()))
    if path.startswith(("/", ".", "~")):
        raise ConfigurationError(f"--base-model {text!r}: {directory} is no directory")
    return BaseModelSpec(name=name, path=path)  # a hub name, of a model in the cache


def _check(given: dict[str, Any]) -> None:
    device = given["device"] or installed_device()
    check_installation(device)
    try_import(device)
    sys.stdout.write(f"{describe_installation()} works for device {device}\n")


def _at_least(least: int) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {text}")
        return value

    return whole_number


def _share(text: str) -> float:
    value = float(text)
    if not 0.0 < value <= 1.0:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, got {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
