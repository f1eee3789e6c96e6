"""Schema of the tables of training jobs, step by step; `tinker_core.storage.schema.Schema` runs it at start."""

from __future__ import annotations
