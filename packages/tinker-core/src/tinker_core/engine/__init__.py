"""Drives trainers and samplers: sessions, futures, order per model, revisions, checkpoints."""

from __future__ import annotations

from tinker_core.engine.clock import Clock, SystemClock
from tinker_core.engine.config import EngineConfig, NewSession, Readiness, SessionContents
from tinker_core.engine.copies import CopyWeightsInput
from tinker_core.engine.engine import Engine
from tinker_core.engine.library import CheckpointFiles

__all__ = [
    "CheckpointFiles",
    "Clock",
    "CopyWeightsInput",
    "Engine",
    "EngineConfig",
    "NewSession",
    "Readiness",
    "SessionContents",
    "SystemClock",
]
