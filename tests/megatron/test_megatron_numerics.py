"""Megatron-Core beside Hugging Face + PEFT and beside fsdp, in float32: the same logprobs, gradients and steps."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from tests.megatron.plays import LOSSES, STEPS, TENANTS, Scene, act, all_logprobs_datum, tenant_requests
from tests.megatron.worlds import WORLDS, perform
from tests.models import write_tiny_model
from tests.peft_reference import formula, gradients_of, load_peft, parameters_of, reference_logprobs
from tinker_core.testing.trainer_lab import Arrays, assert_close
from tinker_core.types import CUSTOM_LOSS, PreparedModelPass

TOLERANCE = 1e-5
HEADS = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2}
LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"kind": "llama"},
    "llama-tied": {"kind": "llama", "tie": True},
    "qwen2": {"kind": "qwen2"},
    "qwen2-tied": {"kind": "qwen2", "tie": True},
    "qwen3": {"kind": "qwen3"},
    "qwen3-tied": {"kind": "qwen3", "tie": True},
    "llama3-rope": {"kind": "llama", "rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, **LLAMA3}},
    "linear-rope": {"kind": "llama", "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}},
    "yarn-rope": {
        "kind": "qwen3",
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "odd-vocabulary": {"kind": "llama", "vocab_size": 113},
    "odd-vocabulary-tied": {"kind": "qwen3", "tie": True, "vocab_size": 113},
}
EVERY_DAY = ("tensor",)
world_names = [
    name if name in EVERY_DAY else pytest.param(name, marks=[pytest.mark.slow, pytest.mark.timeout(400)])
    for name in WORLDS
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("models")
    return {name: write_tiny_model(directory / name, **{**HEADS, **settings}) for name, settings in MODELS.items()}


def scenes(models: dict[str, Path]) -> list[Scene]:
    """All models; besides, one in other micro-batches and in another type, and all losses."""
    found = [Scene(name=name, play="tenants", path=str(path)) for name, path in models.items()]
    path = str(models["qwen3"])
    found += [
        Scene(name=f"budget-{budget}", play="tenants", path=path, settings={"micro_batch_tokens": budget})
        for budget in (8, 4096)
    ]
    found.append(Scene(name="bfloat16", play="tenants", path=path, settings={"dtype": "bfloat16"}))
    found.append(Scene(name="losses", play="losses", path=path))
    return found


@pytest.fixture(scope="module", params=world_names)
def played(
    request: pytest.FixtureRequest, models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """Where each scene has a directory, played in one world."""
    directory = tmp_path_factory.mktemp(request.param)
    world = WORLDS[request.param]
    if world.num_ranks > 1:
        yield perform(world, scenes(models), directory)
        return
    for scene in scenes(models):
        act(scene, 1, world.options, 0, f"file://{directory / scene.name}-rendezvous", directory)
    yield directory


@pytest.fixture(scope="module")
def fsdp(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, played by fsdp."""
    directory = tmp_path_factory.mktemp("fsdp")
    for scene in scenes(models):
        settings = {**scene.settings, "trainer": "fsdp", "plugins": ("core", "fsdp")}
        act(Scene(**{**vars_of(scene), "settings": settings}), 1, {}, 0, "", directory)
    return directory


def vars_of(scene: Scene) -> dict[str, Any]:
    return {"name": scene.name, "play": scene.play, "path": scene.path}


@pytest.fixture(scope="module")
def reference(models: dict[str, Path], fsdp: Path) -> Any:
    """What PEFT and torch's AdamW find from the weights that fsdp begins with, by model."""

    @cache
    def find(name: str) -> dict[str, Arrays]:
        vocab_size = MODELS[name].get("vocab_size", 112)
        return follow(models[name], fsdp / name / "weights-0", vocab_size)

    return find


def follow(path: Path, start: Path, vocab_size: int) -> dict[str, Arrays]:
    """The play `tenants`, by its definition."""
    model = load_peft(path, {name: start / name for name in TENANTS})
    found: dict[str, Arrays] = {}
    optimizers: dict[str, torch.optim.AdamW] = {}
    for number, params in STEPS.items():
        seen = found[f"pass-{number}"] = {}
        for request in tenant_requests(number, vocab_size):
            name = request.model_id
            seen |= answer(model, request)
            if request.forward_only:
                continue
            found[f"gradient-{number}/{name}"] = gradients_of(model, name)
            mine = list(parameters_of(model, name).values())
            optimizer = optimizers.setdefault(name, torch.optim.AdamW(mine, foreach=False))
            (group,) = optimizer.param_groups
            group.update(lr=params["learning_rate"], betas=(params["beta1"], params["beta2"]))
            group.update(eps=params["eps"], weight_decay=params["weight_decay"])
            seen[f"{name}.norm"] = torch.nn.utils.get_total_norm([one.grad for one in mine]).numpy()
            if params["grad_clip_norm"] > 0:
                torch.nn.utils.clip_grad_norm_(mine, params["grad_clip_norm"])
            optimizer.step()
            weights = {key: one.detach().numpy().copy() for key, one in parameters_of(model, name).items()}
            found[f"weights-{number}/{name}"] = weights
    model.set_adapter("one")
    with torch.no_grad():
        found["all"] = {"one.logprobs": reference_logprobs(model, all_logprobs_datum(vocab_size)).numpy().ravel()}
    return found


def answer(model: Any, request: PreparedModelPass) -> Arrays:
    """Logprobs and loss of a request; leaves its gradient in the adapter's parameters."""
    model.set_adapter(request.model_id)
    model.zero_grad()
    total, logprobs = 0.0, []
    for datum in request.data:
        p = reference_logprobs(model, datum)
        loss = formula(request.loss_fn, p, datum, request.loss_fn_config)
        loss.backward()
        total += loss.item()
        logprobs.append(p.detach().numpy())
    name = request.model_id
    return {f"{name}.logprobs": np.concatenate(logprobs), f"{name}.loss:sum": np.array(total)}


def read_tensors(path: Path) -> Arrays:
    return {name.removeprefix("base_model.model."): array for name, array in load_file(path).items()}


def weights_of(scene: Path, number: int, model_id: str) -> Arrays:
    return read_tensors(scene / f"weights-{number}" / model_id / "adapter_model.safetensors")


def gradient_of(scene: Path, number: int, model_id: str) -> Arrays:
    return read_tensors(scene / f"gradient-{number}" / model_id / "gradient.safetensors")


def answers_of(scene: Path, name: str) -> Arrays:
    return dict(np.load(scene / f"{name}.npz"))


def assert_near(found: Arrays, expected: Arrays, tolerance: float) -> None:
    """Equal names; differences within a share of an array's largest element, or of 10 for sums, whose terms cancel."""
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        scale = max(float(np.abs(wanted).max()), 1e-30 if wanted.ndim else 10.0)
        assert float(np.abs(found[name] - wanted).max()) <= tolerance * scale, name


@pytest.mark.parametrize("name", MODELS)
def test_a_packed_pass_of_several_models_equals_peft(played: Path, reference: Any, name: str) -> None:
    expected, scene = reference(name), played / name
    for number in STEPS:
        assert_near(answers_of(scene, f"pass-{number}"), expected[f"pass-{number}"], TOLERANCE)
    for model_id in ("one", "two"):
        wanted = expected[f"gradient-2/{model_id}"]
        modules = {key.split(".")[-3] for key in wanted}
        assert modules == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"}
        assert all(np.abs(array).max() > 0 for array in wanted.values())
        assert_near(gradient_of(scene, 2, model_id), wanted, TOLERANCE)
    # A fresh B is zero, and so is the gradient of A.
    assert_near(gradient_of(scene, 1, "three"), expected["gradient-1/three"], TOLERANCE)


@pytest.mark.parametrize("name", MODELS)
def test_all_logits_equal_peft(played: Path, reference: Any, name: str) -> None:
    found = answers_of(played / name, "all")["one.logprobs"]
    assert_near({"all": found}, {"all": reference(name)["all"]["one.logprobs"]}, TOLERANCE)


@pytest.mark.parametrize("name", MODELS)
def test_steps_equal_those_of_torch_on_peft(played: Path, reference: Any, name: str) -> None:
    stepped = {key for key in reference(name) if key.startswith("weights-")}
    assert stepped == {"weights-1/one", "weights-1/two", "weights-1/three", "weights-2/one", "weights-2/two"}
    for key in stepped:
        number, model_id = int(key[8]), key[10:]
        assert_close(weights_of(played / name, number, model_id), reference(name)[key], TOLERANCE)


@pytest.mark.parametrize("name", ["llama", "qwen2-tied", "odd-vocabulary-tied"])
def test_plain_peft_loads_what_was_exported(played: Path, models: dict[str, Path], name: str) -> None:
    model = load_peft(models[name], {model_id: played / name / "weights-2" / model_id for model_id in ("two", "one")})
    model.set_adapter("one")
    with torch.no_grad():
        expected = reference_logprobs(model, all_logprobs_datum(MODELS[name].get("vocab_size", 112)))
    found = answers_of(played / name, "all")["one.logprobs"]
    assert_near({"all": found}, {"all": expected.numpy().ravel()}, TOLERANCE)


@pytest.mark.parametrize("name", MODELS)
def test_a_new_model_has_the_bits_that_fsdp_gives_it(played: Path, fsdp: Path, name: str) -> None:
    for model_id in TENANTS:
        found, expected = (weights_of(scene / name, 0, model_id) for scene in (played, fsdp))
        assert found.keys() == expected.keys()
        for key, wanted in expected.items():
            np.testing.assert_array_equal(found[key], wanted, err_msg=key)


@pytest.mark.parametrize("name", [*LOSSES, CUSTOM_LOSS])
def test_every_loss_gives_what_it_gives_on_fsdp(played: Path, fsdp: Path, name: str) -> None:
    found, expected = (answers_of(scene / "losses", name) for scene in (played, fsdp))
    assert_near(found, expected, TOLERANCE)
    found, expected = (
        read_tensors(scene / "losses" / "gradient" / name / "gradient.safetensors") for scene in (played, fsdp)
    )
    assert all(np.abs(array).max() > 0 for array in expected.values())
    assert_near(found, expected, TOLERANCE)


@pytest.mark.parametrize("budget", [8, 4096])
def test_micro_batches_are_invisible(played: Path, budget: int) -> None:
    scene, other = played / "qwen3", played / f"budget-{budget}"
    assert_near(answers_of(other, "pass-2"), answers_of(scene, "pass-2"), TOLERANCE)
    for model_id in ("one", "two"):
        assert_near(gradient_of(other, 2, model_id), gradient_of(scene, 2, model_id), TOLERANCE)
        assert_close(weights_of(other, 2, model_id), weights_of(scene, 2, model_id), TOLERANCE)


def test_bfloat16_is_close_to_bfloat16_of_fsdp(played: Path, fsdp: Path) -> None:
    """Ranks round partial sums: logprobs differ as bfloat16 does from float32, by parts in a hundred."""
    found, expected = (answers_of(scene / "bfloat16", "pass-1") for scene in (played, fsdp))
    for model_id in TENANTS:
        difference = np.abs(found[f"{model_id}.logprobs"] - expected[f"{model_id}.logprobs"])
        assert difference.max() < 0.15
        assert difference.mean() < 0.03
    exact = answers_of(fsdp / "qwen3", "pass-1")
    assert all(np.abs(found[key] - exact[key]).max() > 0 for key in exact if key.endswith("logprobs"))
