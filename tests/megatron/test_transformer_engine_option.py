"""``--transformer-engine`` is refused where it cannot run, and the refusal says what to change."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from tinker_backend_megatron.te_option import uses_transformer_engine
from tinker_core.errors import ConfigurationError
from tinker_core.interfaces import RankContext
from tinker_core.types import BaseModelSpec

ASKED = {"transformer-engine": True}
REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "on a CPU": ({"device": "cpu", "options": ASKED}, "needs --device cuda"),
    "in float32": ({"dtype": "float32", "options": ASKED}, "needs --dtype bfloat16"),
    "with context parallelism": ({"options": {**ASKED, "context-parallel": 2}}, "with --context-parallel"),
}


def make_context(**settings: Any) -> RankContext:
    return RankContext(
        base_model=BaseModelSpec(name="tiny", path="/nowhere"),
        **{"rank": 0, "world_size": 1, "rendezvous": "", "device": "cuda", "dtype": "bfloat16", **settings},
    )


@pytest.mark.parametrize("case", REFUSALS)
def test_it_is_refused_where_it_cannot_run(case: str) -> None:
    settings, message = REFUSALS[case]
    with pytest.raises(ConfigurationError, match=f"--transformer-engine .*{message}"):
        uses_transformer_engine(make_context(**settings))


@pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is not None, reason="Transformer Engine is here")
def test_where_it_is_not_installed_the_refusal_says_what_to_install() -> None:
    with pytest.raises(ConfigurationError, match=r"pip install .*transformer-engine"):
        uses_transformer_engine(make_context(options=ASKED))


def test_without_the_option_nothing_is_asked_of_the_machine() -> None:
    assert not uses_transformer_engine(make_context(device="cpu"))
