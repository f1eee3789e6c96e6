"""The systemd unit for a server with given flags."""

from __future__ import annotations

import getpass
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tinker_server.config import ServerConfig
from tinker_server.plugin_list import PLUGINS_VARIABLE
from tinker_server.serving import WANTED_FILES
from tinker_server.supervisor import SPARE_SECONDS

_MARGIN_SECONDS = 15
_PASSED_ON = (PLUGINS_VARIABLE, "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "HF_HOME", "HF_HUB_OFFLINE")
"""Variables of the present environment that the service gets too; none holds a secret."""


def systemd_unit(config: ServerConfig, arguments: Sequence[str], environment: Mapping[str, str]) -> str:
    """A unit file; paths in ``arguments`` should be absolute, as the unit has a working directory of its own."""
    data_dir = Path(config.data_dir).expanduser().resolve()
    command = shutil.which("tinker-server", path=str(Path(sys.executable).parent))
    program = [command] if command else [sys.executable, "-P", "-m", "tinker_server"]
    passed_on = [f"{name}={environment[name]}" for name in _PASSED_ON if name in environment]
    lines = [
        "[Unit]",
        "Description=The Tinker API on this machine",
        "After=network-online.target",
        "Wants=network-online.target",
        "",
        "[Service]",
        f"ExecStart={' '.join(_quoted(word) for word in [*program, *arguments])}",
        "ExecReload=/bin/kill -HUP $MAINPID",
        *(f"Environment={_quoted(variable)}" for variable in passed_on),
        f"User={getpass.getuser()}",
        f"WorkingDirectory={_quoted(str(data_dir))}",
        "# It restarts its server process by itself; this is for when it gives up.",
        "Restart=on-failure",
        "RestartSec=10",
        "# Settings that cannot work would not work the next time either.",
        "RestartPreventExitStatus=2",
        "# Only the supervisor gets the signal; it sees to its children.",
        "KillMode=mixed",
        f"TimeoutStopSec={round(config.grace_seconds + SPARE_SECONDS + _MARGIN_SECONDS)}",
        f"LimitNOFILE={WANTED_FILES}",
        "# Rather a worker than the process that brings it back.",
        "OOMPolicy=continue",
        "",
        "NoNewPrivileges=true",
        "PrivateTmp=true",
        "ProtectSystem=strict",
        f"ReadWritePaths={' '.join(_quoted(str(path)) for path in _writable(config, data_dir))}",
        "ProtectKernelTunables=true",
        "ProtectKernelModules=true",
        "ProtectControlGroups=true",
        "RestrictSUIDSGID=true",
        "LockPersonality=true",
        "RestrictRealtime=true",
        "UMask=0077",
        "",
        "[Install]",
        "WantedBy=multi-user.target",
        "",
    ]
    return "\n".join(lines)


def _writable(config: ServerConfig, data_dir: Path) -> list[Path]:
    """What is written to, besides what every service may write to: /dev, and a /tmp of its own."""
    handoff_dir = Path(config.handoff_dir).expanduser().resolve()
    return [data_dir] if handoff_dir.is_relative_to("/dev") else [data_dir, handoff_dir]


def _quoted(word: str) -> str:
    """A word as systemd reads it: percent and dollar signs mean something there."""
    escaped = word.replace("\\", "\\\\").replace("%", "%%").replace("$", "$$")
    return escaped if escaped == shlex.quote(escaped) else '"' + escaped.replace('"', '\\"') + '"'
