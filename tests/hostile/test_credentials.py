"""Credentials that are no credentials: refused as such, before anything else is looked at."""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime, timedelta

import jwt
import pytest

from tinker_core.errors import AuthenticationError
from tinker_core.types import Caller
from tinker_server.auth import credential_of
from tinker_server.tokens import Tokens, looks_like_token

NOW = datetime(2026, 1, 1, tzinfo=UTC)
KEY = b"k" * 32
TOKENS = Tokens(lambda: KEY)
GOOD = TOKENS.issue(Caller(owner="me", key_id="key-1"), NOW)
CLAIMS = {"iss": "tinker-server", "iat": 0, "exp": NOW.timestamp() + 60, "key_id": "key-1"}


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def token(header: bytes, claims: bytes, signature: str = "") -> str:
    return f"{b64(header)}.{b64(claims)}.{signature}"


def signed(**changes: object) -> str:
    return jwt.encode({**CLAIMS, **changes}, KEY, algorithm="HS256")


HEADER = b'{"alg": "HS256", "typ": "JWT"}'
DEEP = b'{"a":' * 3000
FORGED = {
    "nothing": "eyJ",
    "dots": "eyJ.....",
    "no base64": "eyJ\xff.\xfe.\x00",
    "not ASCII": "eyJ\xe9.\xa0.\xb2",
    "no algorithm": token(b'{"alg": "none"}', json.dumps(CLAIMS).encode()),
    "no algorithm, in other letters": token(b'{"alg": "NoNe"}', json.dumps(CLAIMS).encode()),
    "another algorithm": token(b'{"alg": "RS256"}', json.dumps(CLAIMS).encode(), "AAAA"),
    "an algorithm that is no text": token(b'{"alg": ["HS256"]}', json.dumps(CLAIMS).encode(), "AAAA"),
    "a critical extension": token(b'{"alg": "HS256", "crit": ["b64"], "b64": false}', b"{}", "AAAA"),
    "an empty signature": token(HEADER, json.dumps(CLAIMS).encode()),
    "another's signature": jwt.encode(CLAIMS, b"x" * 32, algorithm="HS256"),
    "changed claims": ".".join([GOOD.split(".")[0], b64(json.dumps(CLAIMS).encode()), GOOD.split(".")[2]]),
    "a deep header": token(DEEP, b"{}", "AAAA"),
    "deep claims": token(HEADER, DEEP, "AAAA"),
    "a long header": token(b'{"alg": "' + b"x" * 50_000 + b'"}', b"{}", "AAAA"),
    "a huge number": token(b'{"alg": ' + b"9" * 5000 + b"}", b"{}", "AAAA"),
    "a list as header": token(b"[]", b"{}", "AAAA"),
    "half a letter": token(b'{"alg": "\xff"}', b"{}", "AAAA"),
    "another issuer": signed(iss="me"),
    "an end that is over": signed(exp=NOW.timestamp() - 1),
    "an end that is no number": signed(exp=[]),
    "no key": signed(key_id=None),
    "a key that is no text": signed(key_id={"a": 1}),
}


def test_a_good_token_is_read() -> None:
    assert TOKENS.read(GOOD, NOW).key_id == "key-1"
    with pytest.raises(AuthenticationError):
        TOKENS.read(GOOD, NOW + timedelta(days=1))


@pytest.mark.parametrize("credential", FORGED.values(), ids=list(FORGED))
def test_a_forged_token_is_refused(credential: str) -> None:
    with pytest.raises(AuthenticationError):
        TOKENS.read(credential, NOW)


@pytest.mark.parametrize(
    ("headers", "credential"),
    [
        ({}, None),
        ({"x-api-key": "  "}, None),
        ({"authorization": "Basic dG1sLTE6"}, None),
        ({"authorization": "Bearer"}, None),
        ({"authorization": "bearer  tml-1 "}, "tml-1"),
        ({"x-api-key": "tml-1", "authorization": "Bearer tml-2"}, "tml-1"),
    ],
)
def test_where_a_credential_is_looked_for(headers: dict[str, str], credential: str | None) -> None:
    assert credential_of(headers) == credential
    assert not looks_like_token(credential or "")
