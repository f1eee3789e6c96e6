"""What usage costs, as far as the operator of a server says so."""

from __future__ import annotations

import attrs

from tinker_core.types import UsageKind

MILLION = 1_000_000
GIGABYTE = 1_000_000_000
"""Bytes of the unit that storage is priced in."""
MONTH_HOURS = 720
"""Hours of the month that storage is priced by."""


@attrs.frozen(kw_only=True)
class Prices:
    """US dollars per million tokens, or per gigabyte and month. None is no price: costs are then unknown, not zero.

    Each field is a setting of the server.
    """

    price_training: float | None = None
    price_prefill: float | None = None
    price_cached_prefill: float | None = None
    price_sampling: float | None = None
    price_storage: float | None = None

    def per_million_tokens(self, kind: UsageKind) -> float | None:
        """The price of tokens of one kind; None also for what is not counted in tokens."""
        return {
            UsageKind.TRAINING: self.price_training,
            UsageKind.PREFILL: self.price_prefill,
            UsageKind.CACHED_PREFILL: self.price_cached_prefill,
            UsageKind.SAMPLE: self.price_sampling,
        }.get(kind)


NO_PRICES = Prices()
"""What a server without price flags knows."""
