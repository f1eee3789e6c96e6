from __future__ import annotations

from typing import Any

import attrs
import numpy as np
import pytest

from tinker_core.encoding import Encoder
from tinker_core.errors import InvalidRequestError, InvalidTinkerPathError, UnsupportedFeatureError
from tinker_core.types import (
    CheckpointType,
    Datum,
    EncodedTextChunk,
    ImageChunk,
    LoraConfig,
    ModelInput,
    PreparedModelPass,
    PreparedModelPassBatch,
    SamplingParams,
    StopCondition,
    StopReason,
    TensorData,
    TensorDType,
    TinkerPath,
    check_checkpoint_name,
)


def csr(**changes: Any) -> TensorData:
    fields: dict[str, Any] = {
        "dtype": TensorDType.FLOAT32,
        "shape": (3, 4),
        "data": np.array([1, 2, 3], np.float32),
        "crow_indices": np.array([0, 2, 2, 3]),
        "col_indices": np.array([0, 3, 1]),
    }
    return TensorData(**{**fields, **changes})


def test_sparse_tensors_become_dense() -> None:
    expected = np.array([[1, 0, 0, 2], [0, 0, 0, 0], [0, 3, 0, 0]], np.float32)
    np.testing.assert_array_equal(csr().to_numpy(), expected)
    np.testing.assert_array_equal(csr().row_indices(), [0, 0, 2])
    other = csr().with_data(np.array([7, 8, 9], np.int64))
    assert other.dtype is TensorDType.INT64
    assert other.is_sparse


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"crow_indices": None}, "both"),
        ({"shape": (12,)}, "2-D"),
        ({"crow_indices": np.array([0, 2, 1, 3])}, "rise"),
        ({"crow_indices": np.array([0, 3])}, "rise"),
        ({"col_indices": np.array([0, 4, 1])}, "0..3"),
        ({"col_indices": np.array([0, -1, 1])}, "0..3"),
        ({"data": np.array([1, 2], np.float32)}, "values"),
        ({"data": np.array([1, 2, 3], np.int64)}, "float32"),
        ({"shape": (-3, 4)}, "negative"),
        ({"crow_indices": None, "col_indices": None}, "12 elements"),
    ],
)
def test_a_tensor_whose_parts_contradict_each_other_cannot_be_made(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        csr(**changes)


def test_text_tokens_join_chunks_and_refuse_images() -> None:
    chunk = EncodedTextChunk(tokens=np.array([1, 2], np.int32))
    np.testing.assert_array_equal(ModelInput(chunks=(chunk, chunk)).text_tokens(), [1, 2, 1, 2])
    assert ModelInput(chunks=()).text_tokens().size == 0
    with pytest.raises(UnsupportedFeatureError, match=r"chunks\[1\] is ImageChunk"):
        ModelInput(chunks=(chunk, ImageChunk(data=b"", format="png"))).text_tokens()


def test_tinker_paths_round_trip() -> None:
    text = "tinker://s-1:train:0/sampler_weights/step-5"
    path = TinkerPath.parse(text)
    assert (path.run_id, path.kind, path.name) == ("s-1:train:0", CheckpointType.SAMPLER, "step-5")
    assert str(path) == text
    assert path.checkpoint_id == "sampler_weights/step-5"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "s/weights/x",
        "tinker://s/weights",
        "tinker://s//x",
        "tinker://s/models/x",
        "tinker://s/weights/..",
        "tinker://a/b/c/d",
    ],
)
def test_malformed_paths_are_refused(text: str) -> None:
    with pytest.raises(InvalidTinkerPathError):
        TinkerPath.parse(text)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\\b", "a b", "a\n", ".hidden", "x..y", "é", "a" * 256])
def test_names_that_could_escape_a_directory_are_refused(name: str) -> None:
    with pytest.raises(InvalidRequestError):
        check_checkpoint_name(name)


def test_records_cross_process_borders_unchanged() -> None:
    datum = Datum(
        model_input=ModelInput(
            chunks=(
                EncodedTextChunk(tokens=np.array([1, 2, 3], np.int32)),
                ImageChunk(data=b"\x00\xff", format="png", expected_tokens=4),
            )
        ),
        loss_fn_inputs={"weights": csr(), "target_tokens": TensorData.from_numpy(np.array([[1, 2], [3, 4]]))},
    )
    request = PreparedModelPass(
        request_id="r", model_id="m", data=(datum,), loss_fn="ppo", loss_fn_config={"clip": 0.5, "kind": "text"}
    )
    encoder = Encoder()
    batch = PreparedModelPassBatch(requests=(request,))
    decoded = encoder.decode(encoder.encode(batch, PreparedModelPassBatch), PreparedModelPassBatch)
    assert attrs.evolve(decoded.requests[0], data=()) == attrs.evolve(request, data=())
    copy = decoded.requests[0].data[0]
    np.testing.assert_array_equal(copy.model_input.chunks[0].tokens, [1, 2, 3])
    assert copy.model_input.chunks[1] == datum.model_input.chunks[1]
    np.testing.assert_array_equal(copy.loss_fn_inputs["weights"].to_numpy(), csr().to_numpy())
    assert copy.loss_fn_inputs["target_tokens"].dtype is TensorDType.INT64


@pytest.mark.parametrize(
    "value",
    [
        LoraConfig(rank=4, seed=2**61, target_modules=("q_proj",)),
        SamplingParams(max_tokens=3, seed=-5, stop=StopCondition(at_eos=False, texts=("a", "b"), tokens=(1,))),
        (StopReason.STOP, StopReason.LENGTH),
    ],
)
def test_small_records_are_equal_after_the_journey(value: Any) -> None:
    cls = tuple[StopReason, ...] if isinstance(value, tuple) else type(value)
    encoder = Encoder()
    assert encoder.decode(encoder.encode(value, cls), cls) == value


def test_values_are_never_coerced() -> None:
    encoder = Encoder()
    wrong = encoder.encode({"rank": "4"}, dict[str, str])
    with pytest.raises(TypeError, match="expected int, got str"):
        encoder.decode(wrong, LoraConfig)
