"""The ranks that hold one base model together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

from tinker_core.errors import ConfigurationError, StorageError, TinkerError
from tinker_core.interfaces import RankContext
from tinker_core.training.adapters import AdapterGradient

T = TypeVar("T")

_TEXT_BYTES = 4096


class World:
    """Collectives over the ranks; with one rank there is no process group and every collective is the identity."""

    def __init__(self, context: RankContext) -> None:
        self.rank = context.rank
        self.size = context.world_size
        self.device = choose_device(context)
        if self.size > 1:
            dist.init_process_group(
                "nccl" if self.device.type == "cuda" else "gloo",
                init_method=context.rendezvous,
                rank=self.rank,
                world_size=self.size,
            )

    @property
    def data_rank(self) -> int:
        """Which of each micro-pass's bins this rank computes."""
        return self.rank

    @property
    def num_data_ranks(self) -> int:
        """Bins of a micro-pass: ranks that compute different data at the same time."""
        return self.size

    def sum(self, tensor: torch.Tensor) -> None:
        """Replace a tensor by its sum over all ranks, bit-identical in all of them."""
        if self.size > 1:
            dist.all_reduce(tensor)

    def sum_gradient(self, gradient: AdapterGradient) -> None:
        """Replace a gradient, of which each rank has computed a part, by the whole."""
        self.sum(gradient.row)

    def all_true(self, flags: Sequence[bool]) -> list[bool]:
        """Which of some flags are true in all ranks. Here a rank's own: what ranks judge is the same in all of them."""
        return list(flags)

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        """Rank 0's value of a tensor of equal shape in all ranks."""
        if self.size > 1:
            tensor = tensor.contiguous()
            dist.broadcast(tensor, src=0)
        return tensor

    def first_text(self, text: str | None) -> str | None:
        """The text of the lowest rank that has one, in all ranks; cut at 4 KiB."""
        if self.size == 1:
            return text
        raw = (text or "").encode()[:_TEXT_BYTES]
        mine = torch.zeros(_TEXT_BYTES, dtype=torch.uint8)
        mine[: len(raw)] = torch.frombuffer(bytearray(raw or b"\0"), dtype=torch.uint8)[: len(raw)]
        all_texts = [torch.zeros_like(mine, device=self.device) for _ in range(self.size)]
        dist.all_gather(all_texts, mine.to(self.device))
        for gathered in all_texts:
            found = bytes(gathered.cpu().numpy()).rstrip(b"\0")
            if found:
                return found.decode(errors="ignore")
        return None

    def fail_together(self, error: TinkerError | None) -> None:
        """Raise in all ranks when any has an error: its own where it has one, else a `StorageError` that tells of it.

        For work that touches files: what one rank could read, another may not.
        """
        text = self.first_text(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        if text is not None:
            raise StorageError(f"another rank failed: {text}")

    def together(self, work: Callable[[], T]) -> T:
        """The result of work that touches files; raises in all ranks when it raises `TinkerError` in any."""
        try:
            result = work()
        except TinkerError as error:
            self.fail_together(error)
            raise
        self.fail_together(None)
        return result

    def close(self) -> None:
        """Leave the process group."""
        if self.size > 1:
            dist.destroy_process_group()


def choose_device(context: RankContext) -> torch.device:
    """The device of this rank; raises `ConfigurationError` for one that is not there."""
    if context.device == "cpu":
        return torch.device("cpu")
    if context.device != "cuda":
        raise ConfigurationError(f"device {context.device!r} is not known; use cpu or cuda")
    if not torch.cuda.is_available():
        raise ConfigurationError("device cuda was asked for, but torch finds no CUDA device; use --device cpu")
    count = torch.cuda.device_count()
    if context.world_size > count:
        raise ConfigurationError(f"{context.world_size} ranks need as many CUDA devices; this machine has {count}")
    device = torch.device("cuda", context.rank)
    torch.cuda.set_device(device)
    return device
