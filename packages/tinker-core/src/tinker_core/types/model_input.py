"""What goes into a model: chunks of text or images, and training data around them."""

from __future__ import annotations

import attrs
import numpy as np
import numpy.typing as npt

from tinker_core.errors import UnsupportedFeatureError
from tinker_core.types.tensors import TensorData


@attrs.frozen(kw_only=True, eq=False)
class EncodedTextChunk:
    """Token ids."""

    tokens: npt.NDArray[np.int32]
    """int32 ``[n]``."""


@attrs.frozen(kw_only=True)
class ImageChunk:
    """An image file."""

    data: bytes
    """The file's bytes."""
    format: str
    """``"png"`` or ``"jpeg"``."""
    expected_tokens: int | None = None
    """What the client thinks the image counts; advisory."""


@attrs.frozen(kw_only=True)
class ImageAssetPointerChunk:
    """An image by reference."""

    format: str
    location: str
    expected_tokens: int | None = None


@attrs.frozen(kw_only=True)
class DmelChunk:
    """Audio features as the SDK serialises them."""

    dmel: bytes


ModelInputChunk = EncodedTextChunk | ImageChunk | ImageAssetPointerChunk | DmelChunk


@attrs.frozen(kw_only=True)
class ModelInput:
    """A sequence of chunks (SDK ``types.ModelInput``)."""

    chunks: tuple[ModelInputChunk, ...]

    @classmethod
    def from_ints(cls, tokens: npt.ArrayLike) -> ModelInput:
        """One text chunk of the given token ids."""
        return cls(chunks=(EncodedTextChunk(tokens=np.asarray(tokens, dtype=np.int32)),))

    def text_tokens(self) -> npt.NDArray[np.int32]:
        """All token ids, int32 ``[T]``; raises `UnsupportedFeatureError` when a chunk is not text."""
        parts: list[npt.NDArray[np.int32]] = []
        for index, chunk in enumerate(self.chunks):
            if not isinstance(chunk, EncodedTextChunk):
                raise UnsupportedFeatureError(f"chunks[{index}] is {type(chunk).__name__}; this model takes text only")
            parts.append(chunk.tokens)
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)


LossFnInputs = dict[str, TensorData]
"""Tensors of one datum by name, for example ``target_tokens`` int64 ``[T]`` or ``[T, K]``, ``weights`` float32."""


@attrs.frozen(kw_only=True)
class ProvenanceSpan:
    """Where a run of tokens came from; accepted and kept, read by losses that know it."""

    kind: str
    """``"prompt_tokens"`` or ``"sampled_tokens"``."""
    sequence_id: str
    offset: int
    length: int


@attrs.frozen(kw_only=True)
class Datum:
    """One training example (SDK ``types.Datum``): position i of the input predicts element i of the targets."""

    model_input: ModelInput
    loss_fn_inputs: LossFnInputs
    model_input_spans: tuple[ProvenanceSpan, ...] = ()
    loss_fn_input_spans: tuple[ProvenanceSpan, ...] = ()
