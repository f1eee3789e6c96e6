"""Hosted SFT, RL and GRPO training jobs for tinker-server."""

from __future__ import annotations
