"""What files of full weights and adapters are refused for, before an engine changes anything."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.vllm_links.engines import run
from tinker_core.errors import CheckpointMismatchError, WorkerLostError
from tinker_sampler_vllm.engine.full_weights import ORIGINAL, FullWeights
from tinker_sampler_vllm.engine.weight_files import (
    HEAD,
    base_tensors,
    check_adapter,
    check_same_model,
    stored_tensors,
    weight_files,
)

EMBEDDING, QUERY, NORM = "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"


def tensors(seed: int = 0, *, head: bool = True) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    shapes = {EMBEDDING: (10, 4), QUERY: (8, 4), NORM: (4,)} | ({HEAD: (10, 4)} if head else {})
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def write(directory: Path, contents: dict[str, np.ndarray], file: str = "model.safetensors") -> Path:
    directory.mkdir(exist_ok=True)
    save_file(contents, directory / file)
    return directory


def read(directory: Path):
    return stored_tensors(weight_files(directory))


@pytest.fixture
def base(tmp_path):
    """An untied model."""
    return read(write(tmp_path / "base", tensors()))


@pytest.fixture
def tied(tmp_path):
    """A tied model, stored as transformers does: without a head."""
    return read(write(tmp_path / "tied", tensors(head=False)))


class TestFiles:
    def test_headers_say_what_safetensors_wrote(self, base):
        assert {name: (tensor.dtype, tensor.shape) for name, tensor in base.items()} == {
            EMBEDDING: ("F32", (10, 4)),
            HEAD: ("F32", (10, 4)),
            QUERY: ("F32", (8, 4)),
            NORM: ("F32", (4,)),
        }

    def test_an_index_names_the_files(self, tmp_path, base):
        contents = tensors()
        head = {HEAD: contents.pop(HEAD)}
        write(write(tmp_path / "sharded", contents, "one.safetensors"), head, "two.safetensors")
        write(tmp_path / "sharded", contents, "consolidated.safetensors")
        weight_map = dict.fromkeys(contents, "one.safetensors") | {HEAD: "two.safetensors"}
        index = tmp_path / "sharded" / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))
        assert read(tmp_path / "sharded").keys() == base.keys()
        index.unlink()
        with pytest.raises(CheckpointMismatchError, match="is both in"):
            read(tmp_path / "sharded")

    def test_an_index_that_leads_elsewhere_is_refused(self, tmp_path):
        write(tmp_path / "model", tensors())
        index = tmp_path / "model" / "model.safetensors.index.json"
        for names, message in (({"a": "../other.safetensors"}, "not a file beside it"), (["a"], "cannot be read")):
            index.write_text(json.dumps({"weight_map": names}))
            with pytest.raises(CheckpointMismatchError, match=message):
                read(tmp_path / "model")

    @pytest.mark.parametrize("keep", [0, 5, 40, -1])
    def test_a_truncated_file_is_refused(self, tmp_path, keep):
        file = write(tmp_path / "cut", tensors()) / "model.safetensors"
        file.write_bytes(file.read_bytes()[:keep])
        with pytest.raises(CheckpointMismatchError, match=r"model\.safetensors cannot be read"):
            read(tmp_path / "cut")

    @pytest.mark.parametrize("content", [b"\xff" * 64, b"\x02" + b"\0" * 7 + b"[]", b"\x02" + b"\0" * 7 + b"{]"])
    def test_a_file_of_something_else_is_refused(self, tmp_path, content):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(CheckpointMismatchError, match="cannot be read"):
            read(tmp_path)

    def test_a_directory_without_weights_is_refused(self, tmp_path):
        with pytest.raises(CheckpointMismatchError, match=r"holds no \*\.safetensors"):
            read(tmp_path)
        assert base_tensors(str(tmp_path)) == {}


class TestSameModel:
    def test_the_same_names_and_shapes_pass_in_another_precision(self, tmp_path, base):
        halves = {name: values.astype(np.float16) for name, values in tensors(1).items()}
        check_same_model(read(write(tmp_path / "half", halves)), base, ties=False)

    @pytest.mark.parametrize("name", [EMBEDDING, QUERY, NORM, HEAD])
    def test_every_tensor_must_be_there(self, tmp_path, base, name):
        contents = tensors()
        del contents[name]
        with pytest.raises(CheckpointMismatchError, match=f"lack {name}"):
            check_same_model(read(write(tmp_path / "less", contents)), base, ties=False)

    def test_nothing_else_may_be_there(self, tmp_path, base):
        contents = tensors() | {"model.layers.1.self_attn.q_proj.weight": np.zeros((8, 4), np.float32)}
        with pytest.raises(CheckpointMismatchError, match=r"have model\.layers\.1.* besides"):
            check_same_model(read(write(tmp_path / "more", contents)), base, ties=False)

    def test_frequencies_in_files_of_old_are_passed_over(self, tmp_path, base):
        contents = tensors() | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(2, np.float32)}
        check_same_model(read(write(tmp_path / "old", contents)), base, ties=False)

    @pytest.mark.parametrize("name", [QUERY, HEAD])
    def test_every_shape_must_be_the_same(self, tmp_path, base, name):
        contents = tensors() | {name: np.zeros((10, 8), np.float32)}
        with pytest.raises(CheckpointMismatchError, match=rf"{name} has shape \[10, 8\]"):
            check_same_model(read(write(tmp_path / "wide", contents)), base, ties=False)

    def test_integers_are_no_weights(self, tmp_path, base):
        contents = tensors() | {QUERY: np.zeros((8, 4), np.int8)}
        with pytest.raises(CheckpointMismatchError, match=f"{QUERY} is I8"):
            check_same_model(read(write(tmp_path / "packed", contents)), base, ties=False)

    def test_a_tied_head_may_be_stored_or_not_on_either_side(self, tmp_path, tied):
        contents = tensors(1, head=False)
        bare = read(write(tmp_path / "bare", contents))
        full = read(write(tmp_path / "full", contents | {HEAD: contents[EMBEDDING]}))
        for given in (bare, full):
            for against in (bare, full, tied):
                check_same_model(given, against, ties=True)

    def test_a_head_of_its_own_is_refused_where_the_model_ties(self, tmp_path, tied):
        with pytest.raises(CheckpointMismatchError, match="is not the embedding"):
            check_same_model(read(write(tmp_path / "apart", tensors(1))), tied, ties=True)
        contents = tensors(1, head=False)
        halved = contents | {HEAD: contents[EMBEDDING].astype(np.float16)}
        with pytest.raises(CheckpointMismatchError, match="is not the embedding"):
            check_same_model(read(write(tmp_path / "halved", halved)), tied, ties=True)

    def test_a_tied_model_needs_an_embedding_that_is_known_by_its_name(self, tmp_path):
        contents = {"transformer.wte.weight": np.zeros((10, 4), np.float32)}
        given = read(write(tmp_path / "other", contents))
        with pytest.raises(CheckpointMismatchError, match="0 of its tensors are called"):
            check_same_model(given, given, ties=True)


class TestAdapters:
    def adapter(self, tmp_path: Path, module: str = QUERY, a=(2, 4), b=(8, 2), *, both: bool = True):
        prefix = "base_model.model." + module.removesuffix(".weight")
        contents = {f"{prefix}.lora_A.weight": np.zeros(a, np.float32)}
        if both:
            contents[f"{prefix}.lora_B.weight"] = np.zeros(b, np.float32)
        return read(write(tmp_path / "adapter", contents, "adapter_model.safetensors"))

    def test_one_that_fits_passes(self, tmp_path, base):
        check_adapter(self.adapter(tmp_path), base, max_rank=2)

    def test_one_on_the_head_of_a_tied_model_is_compared_with_the_embedding(self, tmp_path, tied):
        check_adapter(self.adapter(tmp_path, HEAD, b=(10, 2)), tied, max_rank=2)
        with pytest.raises(CheckpointMismatchError, match="for another model"):
            check_adapter(self.adapter(tmp_path, HEAD), tied, max_rank=2)

    @pytest.mark.parametrize(("a", "b"), [((2, 3), (8, 2)), ((2, 4), (7, 2)), ((2, 5), (8, 2))])
    def test_one_of_another_model_is_refused_even_if_smaller(self, tmp_path, base, a, b):
        with pytest.raises(CheckpointMismatchError, match="for another model"):
            check_adapter(self.adapter(tmp_path, a=a, b=b), base, max_rank=8)

    def test_a_rank_is_what_the_matrices_say(self, tmp_path, base):
        with pytest.raises(CheckpointMismatchError, match="rank 4"):
            check_adapter(self.adapter(tmp_path, a=(4, 4), b=(8, 4)), base, max_rank=2)

    @pytest.mark.parametrize("fields", [{"both": False}, {"b": (8, 3)}, {"b": (8, 2, 1)}])
    def test_half_an_adapter_is_refused(self, tmp_path, base, fields):
        with pytest.raises(CheckpointMismatchError, match="do not fit together"):
            check_adapter(self.adapter(tmp_path, **fields), base, max_rank=8)


class FakeLlm:
    """Notes what it is asked to do."""

    def __init__(self) -> None:
        self.calls: list[object] = []
        self.refusal = ""
        self.cache_is_reset = True

    async def collective_rpc(self, method: str, args: tuple[object, ...]) -> list[str]:
        self.calls.append((method, args[0]))
        return [self.refusal if method == "tinker_open_weights" else ""]

    async def pause_generation(self, *, mode: str, clear_cache: bool) -> None:
        self.calls.append(f"pause {mode}")

    async def reset_prefix_cache(self) -> bool:
        self.calls.append("reset")
        return self.cache_is_reset

    async def resume_generation(self) -> None:
        self.calls.append("resume")


class TestFullWeights:
    def test_a_change_pauses_loads_forgets_the_cache_and_resumes(self, tmp_path, base):
        async def scenario() -> None:
            llm = FakeLlm()
            weights = FullWeights(llm, base, ties=False)
            await weights.load(7, str(write(tmp_path / "new", tensors(1))))
            async with weights.using(ORIGINAL):
                pass
            assert llm.calls == [("tinker_open_weights", ORIGINAL), ("tinker_open_weights", 7)]
            llm.calls.clear()
            for _ in range(2):
                async with weights.using(7):
                    pass
            assert llm.calls == ["pause wait", ("tinker_use_weights", 7), "reset", "resume"]

        run(scenario())

    def test_what_cannot_be_served_reaches_no_worker(self, tmp_path, base):
        async def scenario() -> None:
            llm = FakeLlm()
            with pytest.raises(CheckpointMismatchError):
                await FullWeights(llm, base, ties=False).load(7, str(write(tmp_path / "new", tensors(head=False))))
            with pytest.raises(CheckpointMismatchError, match="need a base model in safetensors"):
                await FullWeights(llm, {}, ties=False).load(7, str(write(tmp_path / "new", tensors())))
            assert llm.calls == []

        run(scenario())

    def test_what_a_worker_cannot_open_is_dropped_in_all(self, tmp_path, base):
        async def scenario() -> None:
            llm = FakeLlm()
            weights = FullWeights(llm, base, ties=False)
            await weights.load(6, str(write(tmp_path / "new", tensors(1))))
            llm.refusal = "out of file descriptors"
            with pytest.raises(CheckpointMismatchError, match="out of file descriptors"):
                await weights.load(7, str(tmp_path / "new"))
            assert llm.calls[-1] == ("tinker_close_weights", 7)

        run(scenario())

    def test_a_cache_that_keeps_old_entries_ends_the_engine(self, tmp_path, base):
        async def scenario() -> None:
            llm = FakeLlm()
            llm.cache_is_reset = False
            weights = FullWeights(llm, base, ties=False)
            await weights.load(7, str(write(tmp_path / "new", tensors(1))))
            with pytest.raises(WorkerLostError, match="prefix cache"):
                async with weights.using(7):
                    pass
            assert "resume" not in llm.calls
            assert weights.failure is not None

        run(scenario())
