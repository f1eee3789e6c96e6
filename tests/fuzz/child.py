"""One libFuzzer process: `python -m tests.fuzz.child TARGET CORPUS [libFuzzer flags]`; see `tests.fuzz.run`."""

from __future__ import annotations

import importlib
import logging
import sys

import atheris

_INSTRUMENTED = ["tinker_server", "tinker_core"]


def main() -> None:
    """Fuzz until libFuzzer has enough."""
    logging.disable(logging.CRITICAL)  # refusals are logged, and there are a great many
    name, *arguments = sys.argv[1:]
    with atheris.instrument_imports(include=_INSTRUMENTED, enable_loader_override=False):
        module = importlib.import_module("tests.fuzz.routes" if name == "routes" else "tests.fuzz.targets")
    target = module.make_routes() if name == "routes" else module.TARGETS[name]
    atheris.Setup([sys.argv[0], *arguments], target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
