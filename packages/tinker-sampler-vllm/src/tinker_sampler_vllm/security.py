"""Encrypted and authenticated sockets between a sampler and engines on other machines: ZeroMQ's CURVE.

Both sides derive both key pairs from one shared secret. So whoever has it may use the engine, and nobody else can read
or change what passes between the two: weights, prompts and samples.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import zmq
import zmq.utils.z85

from tinker_core.errors import ConfigurationError

MIN_SECRET = 16
"""Fewest characters of a secret."""


@attrs.frozen
class KeyPair:
    """One side's keys in Z85."""

    public: bytes
    secret: bytes = attrs.field(repr=False)


def key_pair(secret: str, side: str) -> KeyPair:
    """The keys of ``"engine"`` or ``"sampler"`` for a shared secret."""
    raw = hmac.new(secret.encode(), f"tinker-sampler-vllm {side}".encode(), hashlib.sha256).digest()
    private = zmq.utils.z85.encode(raw)
    return KeyPair(public=zmq.curve_public(private), secret=private)


def read_secret(path: Path) -> str:
    """The secret in a file; raises `ConfigurationError` for one that is missing or short."""
    try:
        secret = path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigurationError(f"cannot read the secret of the engines in {path}: {error.strerror}") from error
    if len(secret) < MIN_SECRET:
        raise ConfigurationError(f"the secret in {path} must have at least {MIN_SECRET} characters")
    return secret


def create_secret(path: Path) -> None:
    """Write a new secret into a file that only its owner may read; raises `ConfigurationError` if it exists."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise ConfigurationError(f"cannot make {path}: {error.strerror}") from error
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(secrets.token_urlsafe(32) + "\n")


def secure_client(socket: Any, secret: str | None) -> None:  # noqa: ANN401 - a zmq socket of either kind
    """Set a sampler's keys before it connects; None leaves the socket open, for sockets in private directories."""
    if secret is None:
        return
    own, engine = key_pair(secret, "sampler"), key_pair(secret, "engine")
    socket.curve_publickey, socket.curve_secretkey = own.public, own.secret
    socket.curve_serverkey = engine.public


class _OnlySampler:
    """Answers ZeroMQ's question whether a key may connect."""

    def __init__(self, public: bytes) -> None:
        self._public = public

    def callback(self, domain: str, key: bytes) -> bool:
        """Whether a key, in Z85, is the sampler's."""
        del domain
        return hmac.compare_digest(key, self._public)


@contextmanager
def secure_server(context: Any, socket: Any, secret: str | None) -> Iterator[None]:  # noqa: ANN401
    """Let only samplers with the secret in, for the length of a block; to be called before the socket binds."""
    if secret is None:
        yield
        return
    from zmq.auth.asyncio import AsyncioAuthenticator

    authenticator = AsyncioAuthenticator(context)
    authenticator.start()
    try:
        authenticator.configure_curve_callback(
            "*", credentials_provider=_OnlySampler(key_pair(secret, "sampler").public)
        )
        own = key_pair(secret, "engine")
        socket.curve_publickey, socket.curve_secretkey = own.public, own.secret
        socket.curve_server = True
        yield
    finally:
        authenticator.stop()
