"""Group-relative policy optimization with rollout workers on a Ray cluster."""

from __future__ import annotations
