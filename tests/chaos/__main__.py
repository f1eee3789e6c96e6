"""``python -m tests.chaos``: many deaths at seeded points of both loops; a line for each run and one for all."""

from __future__ import annotations

import argparse
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.chaos.checks import Likeness, problems
from tests.chaos.client import LOOPS
from tests.chaos.plan import draw
from tests.chaos.run import Setup, fake_setup, real_setup, run_loop

SEED, KILLS = 20261121, 50
STEPS = {"supervised": 40, "reinforced": 24}
SNAPSHOTS = ("--snapshot-steps", "3", "--snapshot-seconds", "2")
"""Often, so that deaths hit them."""
LOOSELY = {"supervised": Likeness.CLOSE, "reinforced": Likeness.SHAPE}
SECONDS_PER_KILL = 45.0


def main() -> int:
    """Run what the flags ask for; 1 if anything was lost, doubled or changed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--kills", type=int, default=KILLS, help=f"deaths in each loop (default: {KILLS})")
    parser.add_argument("--loop", action="append", choices=sorted(LOOPS), help="only this loop; repeatable")
    parser.add_argument("--backend", choices=["fsdp", "fake"], default="fsdp")
    parser.add_argument("--steps", type=int, help="steps of each loop")
    parser.add_argument("--loose", action="store_true", help="without --deterministic: compare numbers loosely")
    parser.add_argument("--flags", default="", help="more flags of tinker-server, such as '--num-ranks 2'")
    parser.add_argument("--keep", type=Path, help="leave data and logs in this directory")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that servers are stopped
    root = arguments.keep or Path(tempfile.mkdtemp(prefix="tinker-chaos-"))
    root.mkdir(parents=True, exist_ok=True)
    setup = _setup(arguments.backend, root, shlex.split(arguments.flags), exact=not arguments.loose)
    failed, deaths, started = 0, 0, time.monotonic()
    for loop in arguments.loop or sorted(LOOPS):
        steps = arguments.steps or STEPS[loop]
        calm = run_loop(loop, setup, steps, root / f"{loop}-calm", timeout=600)
        points = draw(arguments.seed, arguments.kills, calm.moments)
        timeout = 600 + SECONDS_PER_KILL * arguments.kills
        disturbed = run_loop(loop, setup, steps, root / f"{loop}-disturbed", points, timeout=timeout)
        found = problems(calm, disturbed, LOOSELY[loop] if arguments.loose else Likeness.BITS)
        failed += bool(found)
        deaths += len(disturbed.deaths)
        for death in disturbed.deaths:
            _say(f"  {death}")
        for problem in found:
            _say(f"  PROBLEM {problem}")
        _say(
            f"{loop}: {len(disturbed.deaths)} deaths in {steps} steps and {calm.moments} moments, "
            f"{disturbed.starts} starts of the command, {len(disturbed.ledger.accepted)} requests: "
            f"{'equal' if not found else f'{len(found)} problems'}"
        )
    _say(
        f"chaos: backend {arguments.backend}, seed {arguments.seed}, {deaths} deaths, {failed} loops failed, "
        f"{time.monotonic() - started:.0f} s" + (f"; see {root}" if failed or arguments.keep else "")
    )
    if not failed and not arguments.keep:
        shutil.rmtree(root)
    return int(failed > 0)


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _setup(backend: str, root: Path, more: Sequence[str], *, exact: bool) -> Setup:
    flags = (*SNAPSHOTS, *(["--deterministic"] if exact else []), *more)
    if backend == "fake":
        return fake_setup(*flags)
    from tests.models import write_tiny_model

    return real_setup(write_tiny_model(root / "model"), *flags)


if __name__ == "__main__":
    sys.exit(main())
