"""Episodes in live worlds over HTTP, and how they are rewarded."""

from __future__ import annotations
