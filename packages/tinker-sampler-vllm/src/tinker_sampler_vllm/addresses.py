"""Where engines are on the network."""

from __future__ import annotations

from tinker_core.errors import ConfigurationError

_SCHEME = "tcp://"


def check_address(address: str) -> str:
    """A ``tcp://HOST:PORT``, unchanged; raises `ConfigurationError` for anything else."""
    host, _, port = address.removeprefix(_SCHEME).rpartition(":")
    if not address.startswith(_SCHEME) or not host or "/" in host:
        raise ConfigurationError(f"{address!r} is no address of an engine; use tcp://HOST:PORT")
    if not (port.isdecimal() and 0 < int(port) < 2**16):
        raise ConfigurationError(f"{address!r} has no port from 1 to 65535")
    return address
