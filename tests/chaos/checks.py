"""What must hold after a disturbed run, given an undisturbed one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from enum import Enum
from typing import Any

from tests.chaos.run import Outcome

TOLERANCE = 1e-4
"""Between runs that are not deterministic, of losses and log-probabilities after some steps."""


class Likeness(Enum):
    """How much alike the numbers of two runs must be."""

    BITS = "bits"
    """Equal bits: deterministic servers."""
    CLOSE = "close"
    """Within `TOLERANCE`: supervised training on servers that are not."""
    SHAPE = "shape"
    """Not at all: once one token is drawn otherwise, two runs of reinforcement learning have nothing in common."""


def problems(calm: Outcome, disturbed: Outcome, likeness: Likeness) -> list[str]:
    """Everything that the deaths changed, in words."""
    if disturbed.code != 0:
        return [f"the client ended with {disturbed.code}: {disturbed.complaints[-3000:]}"]
    found = [*_futures(disturbed), *_records(calm.record, disturbed.record, likeness)]
    if likeness is Likeness.BITS and calm.left.files != disturbed.left.files:
        differing = sorted(name for name in calm.left.files if calm.left.files[name] != disturbed.left.files.get(name))
        found.append(f"the final files differ: {differing}")
    if calm.left.checkpoints != disturbed.left.checkpoints:
        missing = sorted(set(calm.left.checkpoints) - set(disturbed.left.checkpoints))
        extra = sorted(set(disturbed.left.checkpoints) - set(calm.left.checkpoints))
        found.append(f"checkpoints: missing {missing}, not expected {extra}, listed {len(disturbed.left.checkpoints)}")
    # What was counted in the last seconds before a death may be lost; what runs again must not be counted again.
    doubled = {kind: amount for kind, amount in disturbed.usage.items() if amount > calm.usage.get(kind, 0)}
    if doubled:
        found.append(f"usage is {doubled} and was {calm.usage} without disturbance")
    if disturbed.orphans:
        found.append(f"processes outlived their parents: {disturbed.orphans}")
    if disturbed.missed:
        found.append(f"these deaths did not happen: {disturbed.missed}")
    return found


def _futures(outcome: Outcome) -> Iterator[str]:
    ledger = outcome.ledger
    for identity, request_ids in ledger.receipts.items():
        if len(request_ids) > 1:
            names = {ledger.accepted[request_id] for request_id in request_ids}
            yield f"one request of {names} got {len(request_ids)} ids: {sorted(request_ids)} ({identity[:8]})"
    for (request_id, _), digests in ledger.delivered.items():
        if len(digests) > 1:
            name = ledger.accepted.get(request_id)
            yield f"{len(digests)} versions of the result of {name} {request_id} were delivered"
    for request_id, error in ledger.failed.items():
        yield f"{ledger.accepted.get(request_id)} {request_id} failed: {error}"
    for request_id, reason in outcome.left.refetched.items():
        yield f"fetching {request_id} again: {reason}"
    for (name, status), count in ledger.statuses.items():
        if status not in (200, 408, 503):  # 503: not yet, while workers start; the SDK asks again
            yield f"{name} answered {status} {count} times"


def _records(calm: list[dict[str, Any]], disturbed: list[dict[str, Any]], likeness: Likeness) -> Iterator[str]:
    if [line["what"] for line in calm] != [line["what"] for line in disturbed]:
        yield f"the client saw {len(disturbed)} results and not {len(calm)}"
        return
    for before, after in zip(calm[:-1], disturbed[:-1], strict=True):
        if before == after or likeness is Likeness.SHAPE or (likeness is Likeness.CLOSE and _close(before, after)):
            continue
        yield f"{before['what']}: {_short(before)} became {_short(after)}"
        return  # whatever follows depends on it


def _short(line: dict[str, Any]) -> str:
    return str({name: value for name, value in line.items() if name != "what"})[:300]


def _close(before: Any, after: Any) -> bool:
    if isinstance(before, dict):
        return all(_close(before[name], after[name]) for name in before if name != "exact")
    if isinstance(before, list):
        return len(before) == len(after) and all(map(_close, before, after))
    if isinstance(before, float):
        return math.isclose(before, after, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    return bool(before == after)
