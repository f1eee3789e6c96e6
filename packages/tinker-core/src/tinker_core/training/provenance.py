"""Which targets of a datum were sampled, as its provenance says."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tinker_core.types import ProvenanceSpan, TensorData

SAMPLED = "sampled"
"""The loss input made of a datum's provenance."""
_KINDS = ("prompt_tokens", "sampled_tokens")


def check_tiling(spans: Sequence[ProvenanceSpan], num_targets: int) -> None:
    """Raise `ValueError` unless the spans are of known kinds and cover the targets exactly."""
    for span in spans:
        if span.kind not in _KINDS:
            raise ValueError(f"loss_fn_input_spans has kind {span.kind[:80]!r}; kinds are {', '.join(_KINDS)}")
        if span.length < 0:
            raise ValueError(f"loss_fn_input_spans has length {span.length}; lengths are not negative")
    total = sum(span.length for span in spans)
    if total != num_targets:
        raise ValueError(f"loss_fn_input_spans cover {total} targets of {num_targets}; they must tile them exactly")


def sampled_mask(spans: Sequence[ProvenanceSpan]) -> TensorData:
    """Float32, one element per target of checked spans: 1 where it was sampled, 0 elsewhere."""
    kinds = np.array([span.kind == _KINDS[1] for span in spans], dtype=np.float32)
    return TensorData.from_numpy(np.repeat(kinds, [span.length for span in spans]))
