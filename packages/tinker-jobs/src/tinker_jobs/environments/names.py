"""Recipes whose rewards come from environments. Free of torch and the SDK: the server knows jobs by them."""

from __future__ import annotations

VERIFIER = "task_env_verifier_v1"
"""One reply, after which the environment is verified."""
AGENT = "task_env_agent_v1"
"""As many replies as it takes, after which the environment is verified."""
ENVIRONMENT_RECIPES = (VERIFIER, AGENT)
