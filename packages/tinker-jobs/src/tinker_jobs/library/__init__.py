"""Datasets, capabilities, tasks and worlds: versioned folders of the data directory."""

from __future__ import annotations
