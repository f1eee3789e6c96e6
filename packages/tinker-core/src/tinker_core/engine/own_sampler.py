"""A sampler with processes of its own: it comes before the workers of its base model, and outlives them."""

from __future__ import annotations

import shutil
import tempfile

from tinker_core.engine.config import EngineConfig
from tinker_core.engine.handoff import Handoff
from tinker_core.engine.identity import read_server_id
from tinker_core.engine.interruption import to_its_end
from tinker_core.errors import ConfigurationError
from tinker_core.interfaces import Sampler, SamplerContext, SamplerPlugin
from tinker_core.types import BaseModelSpec


class OwnSampler:
    """Starts and stops it."""

    def __init__(self, plugin: SamplerPlugin, spec: BaseModelSpec, config: EngineConfig) -> None:
        self._plugin = plugin
        self._spec = spec
        self._config = config
        self._directory: str | None = None
        self.handoff = Handoff(config, spec.name)
        self.sampler: Sampler | None = None
        """Set while it runs."""

    async def start(self) -> Sampler:
        """Start it, unless it runs; raises the reason why it does not start, and then nothing runs."""
        if self.sampler is not None:
            return self.sampler
        if self._plugin.build is None:
            raise ConfigurationError(f"sampler {self._plugin.name!r} registers no builder for placement own")
        self.handoff.clear()
        self._directory = tempfile.mkdtemp(prefix="tinker-")  # paths of sockets must be short
        try:
            sampler = self._plugin.build(self._context(self._directory))
            try:
                await sampler.start()
            except BaseException:
                await to_its_end(sampler.close())
                raise
        except BaseException:
            self._remove_directories()
            raise
        self.sampler = sampler
        return sampler

    def _context(self, directory: str) -> SamplerContext:
        config = self._config
        return SamplerContext(
            base_model=self._spec,
            device=config.device,
            dtype=config.dtype,
            directory=directory,
            memory_directory=str(self.handoff.held),
            server_id=read_server_id(config.data_dir) or "",
            max_revisions=config.max_revisions,
            max_lora_rank=config.max_lora_rank,
            max_context_length=config.max_context_length,
            max_decode_batch=config.max_decode_batch,
            deterministic=config.deterministic,
            options=config.options,
        )

    async def close(self) -> None:
        """Stop it."""
        sampler, self.sampler = self.sampler, None
        if sampler is not None:
            await sampler.close()
        self._remove_directories()

    def _remove_directories(self) -> None:
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self.handoff.remove()
