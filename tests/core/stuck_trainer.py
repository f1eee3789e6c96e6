"""A plugin with the trainer ``stuck``: its ranks begin to make a model and never come back."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from pathlib import Path

from tinker_core.hookspecs import hookimpl
from tinker_core.interfaces import RankContext, Trainer, TrainerParts, TrainerPlugin
from tinker_core.testing.fakes import FakeTrainer
from tinker_core.types import PreparedModel


class StuckTrainer(FakeTrainer):
    def create(self, model: PreparedModel) -> None:
        if self.context.rank == 0:
            threading.Event().wait()
        Path(str(self.context.options["pipe"])).write_text("stuck")
        ctypes.PyDLL(None).pause()  # holds the interpreter's lock, so that no other thread can end the process


def _build(context: RankContext, parts: TrainerParts) -> Trainer:
    del parts
    return StuckTrainer(context)


@hookimpl
def tinker_register_trainer(register: Callable[[TrainerPlugin], None]) -> None:
    register(TrainerPlugin(name="stuck", build=_build))
