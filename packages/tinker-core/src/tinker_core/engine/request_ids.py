"""Request ids that prove, without any memory of them, whom they were issued to, and say where the journal has them.

An id whose result is no longer kept is told apart from one that was made up or that belongs to somebody else: only its
owner learns that it once existed.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets

_PREFIX = "req-"
_SALT_BYTES = 8
_NUMBER_BYTES = 8
_PROOF_BYTES = 11
_NONCE_BYTES = _SALT_BYTES + _NUMBER_BYTES
_ENCODED_LENGTH = (_NONCE_BYTES + _PROOF_BYTES) * 4 // 3
"""27 bytes are 36 characters of base64 exactly, so there is no padding."""


class RequestIds:
    """Issues ids and recognises them, also those that another process with the same key issued."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def issue(self, owner: str, number: int) -> str:
        """An unguessable id for the request that has a number in the journal. It tells nobody the number."""
        salt = secrets.token_bytes(_SALT_BYTES)
        nonce = salt + self._masked(salt, number.to_bytes(_NUMBER_BYTES, "big"))
        return _PREFIX + base64.urlsafe_b64encode(nonce + self._proof(nonce, owner)).decode()

    def number_of(self, request_id: str, owner: str) -> int | None:
        """The number of a request that was issued to this owner; None for any other id."""
        encoded = request_id.removeprefix(_PREFIX)
        if len(encoded) != _ENCODED_LENGTH or len(encoded) == len(request_id) or not encoded.isascii():
            return None
        try:
            raw = base64.b64decode(encoded, altchars=b"-_", validate=True)
        except binascii.Error:
            return None
        nonce, proof = raw[:_NONCE_BYTES], raw[_NONCE_BYTES:]
        if not hmac.compare_digest(proof, self._proof(nonce, owner)):
            return None
        return int.from_bytes(self._masked(nonce[:_SALT_BYTES], nonce[_SALT_BYTES:]), "big")

    def _masked(self, salt: bytes, number: bytes) -> bytes:
        """The number under a mask that only this key's holder knows; the same function takes the mask off."""
        mask = hmac.new(self._key, b"number" + salt, hashlib.sha256).digest()
        return bytes(a ^ b for a, b in zip(number, mask, strict=False))

    def _proof(self, nonce: bytes, owner: str) -> bytes:
        return hmac.new(self._key, nonce + owner.encode(), hashlib.sha256).digest()[:_PROOF_BYTES]
