"""Supervised fine-tuning."""

from __future__ import annotations
