"""Request ids that prove, without any memory of them, whom they were issued to.

An id whose result is no longer kept, or died with an earlier process, is told apart from one that was made up or that
belongs to somebody else: only its owner learns that it once existed.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets

_PREFIX = "req-"
_NONCE_BYTES = 16
_PROOF_BYTES = 11
_ENCODED_LENGTH = (_NONCE_BYTES + _PROOF_BYTES) * 4 // 3
"""27 bytes are 36 characters of base64 exactly, so there is no padding."""


class RequestIds:
    """Issues ids and recognises them, also those that another process with the same key issued."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def issue(self, owner: str) -> str:
        """An unguessable id for a request of ``owner``."""
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return _PREFIX + base64.urlsafe_b64encode(nonce + self._proof(nonce, owner)).decode()

    def was_issued_to(self, request_id: str, owner: str) -> bool:
        """Whether an id came from here, for this owner."""
        encoded = request_id.removeprefix(_PREFIX)
        if len(encoded) != _ENCODED_LENGTH or len(encoded) == len(request_id) or not encoded.isascii():
            return False
        try:
            raw = base64.b64decode(encoded, altchars=b"-_", validate=True)
        except binascii.Error:
            return False
        nonce, proof = raw[:_NONCE_BYTES], raw[_NONCE_BYTES:]
        return hmac.compare_digest(proof, self._proof(nonce, owner))

    def _proof(self, nonce: bytes, owner: str) -> bytes:
        return hmac.new(self._key, nonce + owner.encode(), hashlib.sha256).digest()[:_PROOF_BYTES]
