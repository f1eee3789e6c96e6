"""A mixture of experts beside Hugging Face in float32: the same logprobs, and the same gradients of all adapters.

Megatron-Core runs expert and sequence parallelism on CPUs only with the shim of `cpu_shim`; what is computed is the
same as on devices, but no test here says anything about NCCL.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from peft import PeftModel
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from tests.megatron.groups import megatron_spec
from tests.models import write_tiny_model
from tinker_backend_megatron.architecture import plan_topology
from tinker_core.errors import ConfigurationError
from tinker_core.interfaces import OptionValue, RankContext
from tinker_core.testing import start_group
from tinker_core.testing.trainer_lab import (
    Arrays,
    TrainerLab,
    assert_identical,
    logprobs_of,
    output_of,
    read_safetensors,
)
from tinker_core.types import BaseModelSpec, Datum, ForwardBackwardOutput

TOLERANCE = 1e-5
ALPHA = 12.0
RANKS = (4, 8)
"""Of the two tenants."""


@attrs.frozen(kw_only=True)
class Case:
    num_ranks: int = 1
    options: Mapping[str, OptionValue] = attrs.field(factory=dict)
    settings: Mapping[str, Any] = attrs.field(factory=dict)
    """Of the worker group."""
    model: Mapping[str, Any] = attrs.field(factory=dict)
    """Fields of the Hugging Face configuration."""
    stacks_experts: bool = False
    """Whether the model on disk has one tensor for all experts, as some have, instead of one each."""


CASES = {
    "expert parallel": Case(num_ranks=2, options={"expert-parallel": 2}),
}
SLOW_CASES = {
    "one rank": Case(stacks_experts=True),
    "tensor and expert parallel, weights as they are": Case(
        num_ranks=2,
        options={"tensor-parallel": 2, "expert-parallel": 2},
        model={"norm_topk_prob": False, "num_experts_per_tok": 3},
    ),
    "all experts in each of two data ranks": Case(num_ranks=2, model={"num_experts_per_tok": 1}),
    "all experts in each of two tensor-parallel ranks": Case(num_ranks=2, options={"tensor-parallel": 2}),
    "an expert in each of four ranks": Case(num_ranks=4, options={"tensor-parallel": 2, "expert-parallel": 4}),
    "two ranks with the same experts": Case(num_ranks=4, options={"expert-parallel": 2}),
    "expert parallel in two stages": Case(num_ranks=4, options={"pipeline-parallel": 2, "expert-parallel": 2}),
}
GPU_CASES = {
    "allgather": Case(num_ranks=2, options={"expert-parallel": 2}, settings={"device": "cuda"}),
    "alltoall": Case(
        num_ranks=2, options={"expert-parallel": 2, "expert-dispatcher": "alltoall"}, settings={"device": "cuda"}
    ),
}


@attrs.frozen(kw_only=True)
class Setup:
    lab: TrainerLab
    path: Path
    tenants: tuple[str, ...]
    """Two trained models of different LoRA rank."""


@pytest.fixture(
    scope="module",
    params=[
        *(pytest.param(case, id=name) for name, case in CASES.items()),
        *(pytest.param(case, id=name, marks=pytest.mark.slow) for name, case in SLOW_CASES.items()),
        *(pytest.param(case, id=name, marks=pytest.mark.gpu) for name, case in GPU_CASES.items()),
    ],
)
def setup(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    case: Case = request.param
    directory = tmp_path_factory.mktemp("experts")
    path = write_tiny_model(directory / "model", "qwen3_moe", **case.model)
    if case.stacks_experts:
        AutoModelForCausalLM.from_pretrained(path).save_pretrained(path, save_original_format=False)
        assert "model.layers.0.mlp.experts.gate_up_proj" in read_safetensors(path / "model.safetensors")
    with start_group(megatron_spec(path, case.num_ranks, case.options, **case.settings)) as group:
        lab = TrainerLab(group, directory)
        tenants = tuple(lab.create(rank=rank, alpha=ALPHA, seed=rank) for rank in RANKS)
        for seed, tenant in enumerate(tenants):
            lab.train(tenant, seed, seed + 2, learning_rate=0.02)
        yield Setup(lab=lab, path=path, tenants=tenants)


def adapted(base: torch.nn.Module, adapter: Mapping[str, torch.Tensor], rank: int) -> dict[str, torch.Tensor]:
    """The parameters of a Hugging Face model with an update added to every matrix, each expert's three among them."""

    def update(linear: str) -> torch.Tensor:
        return ALPHA / rank * adapter[f"{linear}.lora_B.weight"] @ adapter[f"{linear}.lora_A.weight"]

    found = {}
    for name, parameter in base.named_parameters():
        prefix, _, last = name.rpartition(".")
        if prefix.endswith(".experts"):
            updates = [
                torch.cat([update(f"{prefix}.{expert}.{linear}") for linear in ("gate_proj", "up_proj")])
                if last == "gate_up_proj"
                else update(f"{prefix}.{expert}.down_proj")
                for expert in range(parameter.shape[0])
            ]
            found[name] = parameter.detach() + torch.stack(updates)
        elif name.endswith(("_proj.weight", "lm_head.weight")):
            found[name] = parameter.detach() + update(prefix)
    return found


def logprobs(logits: torch.Tensor, datum: Datum) -> torch.Tensor:
    targets = torch.from_numpy(np.array(datum.loss_fn_inputs["target_tokens"].to_numpy()))
    return torch.log_softmax(logits[0], -1).gather(1, targets[:, None])[:, 0]


def tokens_of(datum: Datum) -> torch.Tensor:
    return torch.from_numpy(datum.model_input.text_tokens().astype(np.int64))[None]


def cross_entropy(p: torch.Tensor, datum: Datum) -> torch.Tensor:
    return -(torch.from_numpy(np.array(datum.loss_fn_inputs["weights"].to_numpy())) * p).sum()


def base_model(path: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )


def reference(setup: Setup, tenant: int, data: tuple[Datum, ...]) -> tuple[list[np.ndarray], Arrays]:
    """Logprobs of each datum, and the gradient of a tenant's adapter by autograd."""
    exported = setup.lab.export(setup.tenants[tenant]) / "adapter_model.safetensors"
    adapter = {
        name: torch.from_numpy(array).requires_grad_()
        for name, array in read_safetensors(exported, "base_model.model.").items()
    }
    base = base_model(setup.path)
    found = []
    for datum in data:
        changed = adapted(base, adapter, RANKS[tenant])
        p = logprobs(functional_call(base, changed, kwargs={"input_ids": tokens_of(datum)}).logits, datum)
        cross_entropy(p, datum).backward()
        found.append(p.detach().numpy())
    return found, {name: one.grad.numpy() for name, one in adapter.items() if one.grad is not None}


def assert_near(found: np.ndarray, wanted: np.ndarray, what: str) -> None:
    assert np.abs(found - wanted).max() <= TOLERANCE * np.abs(wanted).max(), what


def check_logprobs(output: ForwardBackwardOutput, expected: list[np.ndarray]) -> None:
    for found, wanted in zip(logprobs_of(output), expected, strict=True):
        assert_near(found, wanted, "logprobs")


def test_tenants_of_one_pass_equal_hugging_face_with_a_delta_on_each_experts_matrices(setup: Setup) -> None:
    lab = setup.lab
    data = [lab.data(5), lab.data(6, (11, 3, 21)), lab.data(7, (4, 13))]
    asked = [lab.request(tenant, part) for tenant, part in zip(setup.tenants, data, strict=False)]
    # Data that only want logprobs share experts, and a micro-batch, with data that train.
    asked.append(lab.request(setup.tenants[1], data[2], forward_only=True))
    outputs = [output_of(result) for result in lab.run(*asked)]
    for index, tenant in enumerate(setup.tenants):
        expected, gradient = reference(setup, index, data[index])
        check_logprobs(outputs[index], expected)
        found = read_safetensors(lab.snapshot(tenant, gradient=True) / "gradient.safetensors")
        assert found.keys() == gradient.keys()
        assert any(".experts." in name for name in gradient)
        for name, wanted in gradient.items():
            assert_near(found[name], wanted, name)
        norm = np.sqrt(sum(np.square(array, dtype=np.float64).sum() for array in gradient.values()))
        assert lab.step(tenant, learning_rate=0.0)["grad_norm"] == pytest.approx(norm, rel=1e-5)
    check_logprobs(outputs[2], reference(setup, 1, data[2])[0])


def test_plain_peft_loads_what_is_exported(setup: Setup) -> None:
    """PEFT puts an adapter on the stacked ``gate_up_proj`` of all experts (``target_parameters``) and converts ours.

    Its rank is twice as large there: A is gate's over up's, B has the two on its diagonal.  The function is the same,
    and so are the gradients of what ours has, those of A and of the diagonal; off the diagonal PEFT would train numbers
    that separate adapters of gate and up do not have, so that only ``down_proj`` and attention mean the same to train.
    """
    lab, tenant = setup.lab, setup.tenants[0]
    data = lab.data(8)
    with warnings.catch_warnings():
        # PEFT looks for the rank of stacked parameters among modules, and warns; it is used all the same.
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not match")
        peft = PeftModel.from_pretrained(base_model(setup.path), lab.export(tenant), is_trainable=True)
    expected = []
    for datum in data:
        p = logprobs(peft(input_ids=tokens_of(datum)).logits, datum)
        cross_entropy(p, datum).backward()
        expected.append(p.detach().numpy())
    theirs = {
        name.removeprefix("base_model.model.").replace(".default", ""): parameter.grad.numpy()
        for name, parameter in peft.named_parameters()
        if parameter.grad is not None
    }
    check_logprobs(lab.run_one(lab.request(tenant, data)), expected)
    ours = read_safetensors(lab.snapshot(tenant, gradient=True) / "gradient.safetensors")
    lab.step(tenant, learning_rate=0.0)
    expected_gradient = dict(chain.from_iterable(as_ours(name, array) for name, array in theirs.items()))
    assert ours.keys() == expected_gradient.keys()
    for name, wanted in expected_gradient.items():
        assert_near(ours[name], wanted, name)


def as_ours(name: str, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Of a gradient in PEFT, what belongs to each of our matrices."""
    prefix, of_experts, rest = name.partition(".mlp.experts.")
    if not of_experts:
        yield name, array
        return
    is_a = rest.endswith("lora_A.weight")
    fused = rest.startswith("base_layer.")
    experts = 4
    by_expert = (
        array.reshape(experts, -1, array.shape[1])
        if is_a
        else array.reshape(array.shape[0], -1, experts).transpose(2, 0, 1)
    )
    for expert, whole in enumerate(by_expert):
        for place, linear in enumerate(("gate_proj", "up_proj") if fused else ("down_proj",)):
            part = whole
            if fused:
                part = np.split(whole, 2, axis=0)[place]
                part = part if is_a else np.split(part, 2, axis=1)[place]
            yield f"{prefix}.mlp.experts.{expert}.{linear}.{'lora_A' if is_a else 'lora_B'}.weight", part


@pytest.fixture(scope="module")
def checkpoints() -> list[Path]:
    """What the other cases have saved so far."""
    return []


def test_a_checkpoint_is_the_same_in_every_world(setup: Setup, checkpoints: list[Path]) -> None:
    lab, tenant = setup.lab, setup.tenants[0]
    lab.run_one(lab.request(tenant, lab.data(9)))
    checkpoints.append(lab.snapshot(tenant, gradient=True))
    lab.step(tenant, learning_rate=0.0)
    for saved in checkpoints:
        model = lab.create(rank=RANKS[0], alpha=ALPHA, seed=77)
        lab.restore(model, saved, gradient=True)
        again = lab.snapshot(model, gradient=True)
        lab.unload(model)
        names = sorted(path.name for path in saved.glob("*.safetensors"))
        assert names == ["adapter_model.safetensors", "gradient.safetensors", "optimizer.safetensors"]
        for name in names:
            assert_identical(read_safetensors(again / name), read_safetensors(saved / name))


def rank_context(path: Path, **settings: Any) -> RankContext:
    base = BaseModelSpec(name="tiny", path=str(path))
    return RankContext(
        **{"base_model": base, "rank": 0, "rendezvous": "", "device": "cpu", "dtype": "float32"} | settings
    )


def test_tensor_parallel_ranks_of_experts_share_their_tokens(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "experts", "qwen3_moe")
    assert plan_topology(rank_context(path, world_size=2, options={"tensor-parallel": 2})).sequence_parallel
    dense = write_tiny_model(tmp_path / "dense", "qwen3")
    assert not plan_topology(rank_context(dense, world_size=2, options={"tensor-parallel": 2})).sequence_parallel


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expert-parallel": 3}, "--expert-parallel 3 does not divide this model's 4 experts; legal values: 1, 2, 4"),
        ({"expert-parallel": 2, "expert-dispatcher": "alltoall"}, "alltoall needs --device cuda.*allgather"),
        ({"expert-dispatcher": "smoke signals"}, "--expert-dispatcher must be allgather or alltoall"),
    ],
)
def test_what_experts_cannot_do_is_refused_with_what_they_can(
    options: dict[str, OptionValue], message: str, tmp_path: Path
) -> None:
    path = write_tiny_model(tmp_path, "qwen3_moe")
    with pytest.raises(ConfigurationError, match=message):
        plan_topology(rank_context(path, world_size=6, options=options))
