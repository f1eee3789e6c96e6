"""Group-relative policy optimization with rollout workers on Ray, which is an extra: no module needs it on import."""

from __future__ import annotations
