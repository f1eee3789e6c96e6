"""One module per schema change, in order of their revision numbers."""

from __future__ import annotations
