"""The flags of the sampler and what they say."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Self

import attrs

from tinker_core.errors import ConfigurationError
from tinker_core.interfaces import Option, OptionValue
from tinker_sampler_vllm.addresses import check_address

_MIB = 1024**2
_DEVICES = ("cpu", "cuda")

OPTIONS = (
    Option(
        name="vllm-engines",
        type=int,
        default=1,
        help="vLLM engines to start on this machine for each base model; 0 with --vllm-workers or --vllm-urls",
    ),
    Option(
        name="vllm-workers",
        type=str,
        default="",
        help="engines on other machines, as tcp://HOST:PORT of `tinker-sampler-vllm serve`, separated by commas; "
        "NAME=tcp://HOST:PORT is used for the base model of that name only",
    ),
    Option(
        name="vllm-secret-file",
        type=str,
        default="",
        help="file with the secret that the engines of --vllm-workers were started with",
    ),
    Option(
        name="vllm-urls",
        type=str,
        default="",
        help="plain vLLM servers, as http://HOST:PORT or NAME=http://HOST:PORT, separated by commas; they sample from "
        "bare base models only. Their key, if they ask for one, is taken from the environment variable VLLM_API_KEY",
    ),
    Option(name="vllm-device", type=str, default="", help="device of the engines; that of --device by default"),
    Option(
        name="vllm-visible-devices",
        type=str,
        default="",
        help="GPUs that the engines may use, as in CUDA_VISIBLE_DEVICES; all that the server sees by default",
    ),
    Option(name="vllm-tensor-parallel", type=int, default=1, help="GPUs of one engine"),
    Option(
        name="vllm-memory-share",
        type=float,
        default=0.0,
        help="share of a GPU's memory that an engine may use, 0.0 for vLLM's own default; lower it where the trainer "
        "uses the same GPU",
    ),
    Option(
        name="vllm-kv-cache-mib",
        type=int,
        default=0,
        help="size of the KV cache; 0 takes what the memory share leaves, and 1024 on CPUs",
    ),
    Option(
        name="vllm-lora-slots",
        type=int,
        default=8,
        help="different adapters in one batch; each takes device memory for an adapter of rank --max-lora-rank",
    ),
    Option(
        name="vllm-eager",
        type=bool,
        default=False,
        help="neither compile nor capture graphs: a faster start and slower samples; always so on CPUs",
    ),
)


@attrs.frozen(kw_only=True)
class VllmOptions:
    """The values of `OPTIONS` for one base model, checked."""

    num_engines: int
    workers: tuple[str, ...]
    secret: str | None = attrs.field(repr=False)
    urls: tuple[str, ...]
    device: str
    visible_devices: str | None
    tensor_parallel: int
    memory_share: float | None
    kv_cache_bytes: int | None
    lora_slots: int
    eager: bool | None

    @classmethod
    def read(cls, values: Mapping[str, OptionValue], base_model: str, device: str) -> Self:
        """Check what an operator chose; raises `ConfigurationError`."""
        given = {option.name: values.get(option.name, option.default) for option in OPTIONS}
        workers = _addresses(str(given["vllm-workers"]), base_model, ("tcp://",), "--vllm-workers")
        urls = _addresses(str(given["vllm-urls"]), base_model, ("http://", "https://"), "--vllm-urls")
        for address in workers:
            check_address(address)
        num_engines = int(given["vllm-engines"])
        if num_engines < 0 or (num_engines == 0 and not workers and not urls):
            raise ConfigurationError(f"--vllm-engines {num_engines} leaves base model {base_model!r} without an engine")
        secret_file = str(given["vllm-secret-file"])
        if workers and not secret_file:
            raise ConfigurationError("--vllm-workers needs --vllm-secret-file, with the secret of these engines")
        if secret_file and not given["vllm-workers"]:
            raise ConfigurationError("--vllm-secret-file is for the engines of --vllm-workers, and none are given")
        share = float(given["vllm-memory-share"])
        if not 0.0 <= share <= 1.0:
            raise ConfigurationError(f"--vllm-memory-share must lie in 0..1, got {share}")
        if given["vllm-device"] not in ("", *_DEVICES):
            raise ConfigurationError(f"--vllm-device must be {' or '.join(_DEVICES)}, got {given['vllm-device']!r}")
        if int(given["vllm-kv-cache-mib"]) < 0:
            raise ConfigurationError(f"--vllm-kv-cache-mib must be 0 or more, got {given['vllm-kv-cache-mib']}")
        for name in ("vllm-tensor-parallel", "vllm-lora-slots"):
            if int(given[name]) < 1:
                raise ConfigurationError(f"--{name} must be at least 1, got {given[name]}")
        from tinker_sampler_vllm.security import read_secret  # whoever only lists flags needs no sockets

        return cls(
            num_engines=num_engines,
            workers=workers,
            secret=read_secret(Path(secret_file)) if workers else None,
            urls=urls,
            device=str(given["vllm-device"]) or device,
            visible_devices=str(given["vllm-visible-devices"]) or None,
            tensor_parallel=int(given["vllm-tensor-parallel"]),
            memory_share=share or None,
            kv_cache_bytes=int(given["vllm-kv-cache-mib"]) * _MIB or None,
            lora_slots=int(given["vllm-lora-slots"]),
            eager=True if given["vllm-eager"] else None,
        )


def _addresses(text: str, base_model: str, schemes: tuple[str, ...], flag: str) -> tuple[str, ...]:
    """The addresses of a flag that are for a base model."""
    found = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, equals, address = item.rpartition("=")
        if not address.startswith(schemes):
            raise ConfigurationError(f"{flag}: {item!r} is no address; it must begin with {' or '.join(schemes)}")
        if not equals or name == base_model:
            if address in found:
                raise ConfigurationError(f"{flag}: {address} is given twice for base model {base_model!r}")
            found.append(address)
    return tuple(found)
