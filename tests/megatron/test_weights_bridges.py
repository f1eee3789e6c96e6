"""Bridges of others that fill this backend's modules. What mbridge does is shown where it is installed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.megatron.test_megatron_weights import run_ranks, tensors_of
from tests.models import Kind, write_tiny_model
from tinker_backend_megatron.bridges import choose_bridge
from tinker_core.errors import ConfigurationError


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mcore-bridge", "fills only models that it has built itself; use none or mbridge"),
        ("megatron-bridge", "fills only models that it has built itself; use none or mbridge"),
        ("my-bridge", "'my-bridge' is not known; use none or mbridge"),
        ("mbridge", r"pip install 'tinker-backend-megatron\[mbridge\]'"),
    ],
)
def test_a_bridge_that_cannot_be_used_is_refused_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=message):
        choose_bridge(name)


TRIPS: dict[str, tuple[Kind, bool, dict[str, int]]] = {
    "tensor-llama": ("llama", False, {"tensor-parallel": 2}),
    "tensor-llama-tied": ("llama", True, {"tensor-parallel": 2}),
    "tensor-qwen2-tied": ("qwen2", True, {"tensor-parallel": 2}),
    "pipeline-qwen3": ("qwen3", False, {"pipeline-parallel": 2}),
    "pipeline-qwen2-tied": ("qwen2", True, {"pipeline-parallel": 2}),
    "data-qwen3": ("qwen3", True, {}),
}


@pytest.mark.slow
def test_mbridge_reads_what_this_package_reads_and_refuses_experts(tmp_path: Path) -> None:
    pytest.importorskip("mbridge")
    cases: list[dict[str, Any]] = [
        {
            "name": name,
            "model": str(write_tiny_model(tmp_path / name, kind, tie=tie, vocab_size=113)),
            "dtype": "float32",
            "options": options,
            "bridge": "mbridge",
        }
        for name, (kind, tie, options) in TRIPS.items()
    ]
    experts = write_tiny_model(tmp_path / "experts", "qwen3_moe")
    cases.append({**cases[0], "name": "experts", "model": str(experts), "options": {"expert-parallel": 2}})
    run_ranks(tmp_path, cases, 2)
    for case in cases[:-1]:
        expected, found = tensors_of(Path(case["model"])), tensors_of(tmp_path / "out" / case["name"])
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items()), case["name"]
        # None of it was read by this package.
        assert json.loads((tmp_path / "out" / f"{case['name']}.0.json").read_text())["reads"] == []
    for rank in range(2):
        assert "leave it at none" in json.loads((tmp_path / "out" / f"experts.{rank}.json").read_text())["error"]
