"""Published weights by name. A revision never changes; a sample keeps the weights it began with."""

from __future__ import annotations

from tinker_core.errors import CapacityError, UnknownCheckpointError
from tinker_core.interfaces import ModelHandle, StateWriter
from tinker_core.training.adapters import AdapterWeights
from tinker_core.types import WeightsRef


class Revisions:
    """The adapters that samples may ask for, as copies that no training touches."""

    def __init__(self, handle: ModelHandle, max_revisions: int) -> None:
        self._handle = handle
        self._max_revisions = max_revisions
        self._adapters: dict[str, object] = {}

    def publish(self, revision: str, ref: WeightsRef) -> None:
        """Copy weights under a new name; a name that is resident is left as it is."""
        if revision in self._adapters:
            return
        if len(self._adapters) >= self._max_revisions:
            raise CapacityError(
                f"{self._max_revisions} sampler revisions are resident already; retire one, or raise max_revisions"
            )
        self._adapters[revision] = self._handle.copy_adapter(ref)

    def capture(self, revision: str) -> StateWriter:
        """Something that writes a revision, which never changes, at any later time."""
        return self._handle.capture_adapter(self._find(revision))

    def retire(self, revision: str) -> None:
        """Drop a revision."""
        self._find(revision)
        del self._adapters[revision]

    def weights(self, revision: str | None) -> AdapterWeights | None:
        """The weights to decode with; None is the bare base model."""
        if revision is None:
            return None
        weights = self._find(revision)
        assert isinstance(weights, AdapterWeights)
        return weights

    def _find(self, revision: str) -> object:
        if revision not in self._adapters:
            raise UnknownCheckpointError(revision)
        return self._adapters[revision]
