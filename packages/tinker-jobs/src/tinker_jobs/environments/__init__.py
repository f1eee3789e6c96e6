"""Tasks done in environments that plugins provide, such as containers."""

from __future__ import annotations
