"""Checks of the chosen sampler: what it says of its own needs, and the place in memory where its weights lie."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from tinker_core.engine import EngineConfig
from tinker_core.engine.workers import check_plugins, sampler_plugin
from tinker_core.errors import ConfigurationError
from tinker_core.plugins import Plugins
from tinker_core.types import Placement
from tinker_server.doctor.findings import Finding, fail, ok, warn
from tinker_server.doctor.storage import file_system_of

_GIB = 1024**3
_LITTLE_ROOM = _GIB
"""Bytes. Docker's default for /dev/shm is 64 MiB, and one adapter may need that alone."""
_IN_MEMORY = ("tmpfs", "ramfs")


def check_chosen_sampler(config: EngineConfig, plugins: Plugins) -> Iterator[Finding]:
    """Whether the sampler could start; nothing when there is none."""
    try:
        check_plugins(config, plugins)
    except ConfigurationError as error:
        yield fail("sampler", str(error), "mend what it names, or choose another --sampler")
        return
    chosen = {spec.name: sampler_plugin(spec, config, plugins) for spec in config.base_models}
    if not any(chosen.values()):
        yield ok("sampler", "none")
        return
    yield ok("sampler", f"{config.sampler} has what it needs")
    if any(plugin is not None and plugin.placement is Placement.OWN for plugin in chosen.values()):
        yield from check_handoff(config.handoff_dir, config.max_revisions)


def check_handoff(directory: Path, max_revisions: int, mounts: Path = Path("/proc/mounts")) -> Iterator[Finding]:
    """That the weights of samplers with processes of their own have room in memory."""
    if not directory.is_dir():
        yield fail("hand-off", f"{directory} is not there", "choose another --handoff-dir, best in memory")
        return
    if not os.access(directory, os.W_OK | os.X_OK):
        yield fail("hand-off", f"{directory} may not be written to", "let the server's user write there")
        return
    free = shutil.disk_usage(directory).free
    kind = file_system_of(directory, mounts)
    text = f"{directory} ({kind}) has {free / _GIB:.2f} GiB of room for up to {max_revisions} adapters of a base model"
    if free < _LITTLE_ROOM:
        yield warn(
            "hand-off", text, "enlarge it (docker run --shm-size=8g), lower --max-revisions, or move --handoff-dir"
        )
    elif kind not in _IN_MEMORY:
        yield warn("hand-off", text, "choose a --handoff-dir in memory: on a disk every save waits for it")
    else:
        yield ok("hand-off", text)
