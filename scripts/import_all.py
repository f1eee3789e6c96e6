"""Imports all of a package: ``import_all.py PACKAGE [MODULE_TO_SKIP...]``; prints every module that is then loaded.

``-NEED`` among the modules to skip stands for all that are imported only where NEED is installed, such as ``-torch``.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys

OPTIONAL = {
    "tinker_core.training": "torch",
    "tinker_core.testing": "pytest",
    "tinker_core.sampling.colocated": "torch",
    "tinker_core.sampling.drawing": "torch",
    "tinker_core.sampling.scoring": "torch",
    "tinker_sampler_vllm.engine.cpu_lora": "torch",
    "tinker_sampler_vllm.engine.cpu_seeds": "torch",
    "tinker_sampler_vllm.engine.cpu_slots": "torch",
    "tinker_sampler_vllm.engine.extension": "torch",
    "tinker_sampler_vllm.engine.requests": "torch",
    "tinker_sampler_vllm.engine.scores": "torch",
    "tinker_sampler_vllm.engine.vllm_engine": "torch",
}
"""Parts that need an extra; they are imported where the extra is installed."""

NEVER = {"tinker_core.storage.migrations.env", "tinker_jobs.service.migrations.env"}
"""Run inside alembic only."""


def missing_extra(module: str, skipped: set[str]) -> bool:
    """Whether a module belongs to a part whose extra is not installed, or is to be skipped."""
    return any(
        (module == part or module.startswith(part + "."))
        and (f"-{need}" in skipped or importlib.util.find_spec(need) is None)
        for part, need in OPTIONAL.items()
    )


def main() -> None:
    """Import, or fail with the error of the first module that cannot be imported."""
    package = importlib.import_module(sys.argv[1])
    skipped = set(sys.argv[2:]) | NEVER
    pending = [package]
    while pending:
        parent = pending.pop()
        for info in pkgutil.iter_modules(parent.__path__, parent.__name__ + "."):
            if info.name in skipped or info.name.endswith("__main__") or missing_extra(info.name, skipped):
                continue
            module = importlib.import_module(info.name)
            if info.ispkg:
                pending.append(module)
    print("\n".join(sorted(sys.modules)))


if __name__ == "__main__":
    main()
