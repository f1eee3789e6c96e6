"""Reinforcement learning on prompts and recorded trajectories."""

from __future__ import annotations
