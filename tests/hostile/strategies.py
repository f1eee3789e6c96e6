"""Hypothesis strategies for hostile requests."""

from __future__ import annotations

import copy
import json
import math
from typing import Any
from urllib.parse import quote

from hypothesis import strategies as st

from tests.hostile.asgi import Call
from tests.hostile.examples import PARAMETERS, QUERY_KEYS, Endpoint, body_json, fill

NASTY_TEXTS = [
    "",
    " ",
    ".",
    "..",
    "../../../../etc/passwd",
    "..%2f..%2fetc/passwd",
    "%2e%2e/%2e%2e",
    "/etc/passwd",
    "//etc/passwd",
    "weights/../../x",
    "weights/..",
    "weights/%00",
    "a\x00b",
    "a\r\nSet-Cookie: x=1",
    "a\nb",
    "tinker://",
    "tinker://a/weights/../../../x",
    "tinker:///weights/x",
    "file:///etc/passwd",
    "http://[::1",
    "\uff3f\uff0f\uff0e\uff0e",
    "e\u0301",
    "é",
    "\u202egnp.exe",
    "\ufeff",
    "\U0001f4a9" * 50,
    "A" * 300,
    "A" * 100_000,
    "$(reboot)",
    "'; DROP TABLE sessions; --",
    "{{7*7}}",
    "%",
    "%zz",
    "\\..\\..",
    "con",
    "~root",
    "-rf",
    "s:train:0",
    ":::",
    "null",
]
NASTY_NUMBERS: list[int | float] = [
    0,
    -1,
    1,
    2**31 - 1,
    2**31,
    2**32,
    2**53 + 1,
    2**63 - 1,
    2**63,
    2**64 - 1,
    2**64,
    -(2**63),
    -(2**63) - 1,
    10**40,
    10**400,
    0.1,
    -0.0,
    1e-320,
    1e308,
    math.inf,
    -math.inf,
    math.nan,
]

texts = st.one_of(st.sampled_from(NASTY_TEXTS), st.text(max_size=20))
numbers = st.one_of(st.sampled_from(NASTY_NUMBERS), st.integers(), st.floats())
scalars = st.one_of(st.none(), st.booleans(), numbers, texts)
nested = st.integers(1, 150).map(lambda depth: _wrap(1, depth))
values = st.one_of(
    scalars,
    nested,
    st.recursive(
        scalars,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
        max_leaves=8,
    ),
    st.sampled_from([[], {}, [[]], [{}], [1, "x", None, [2]], ["a" * 1000, 1]]).map(copy.deepcopy),
)


def _wrap(value: object, depth: int) -> object:
    for _ in range(depth):
        value = [value]
    return value


def _places(value: object, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Paths to everything inside a JSON value."""
    inner: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        inner = list(value.items())
    elif isinstance(value, list):
        inner = list(enumerate(value))
    return [path, *(place for key, item in inner for place in _places(item, (*path, key)))]


@st.composite
def mutated(draw: st.DrawFn, original: Any) -> Any:
    """A JSON value with up to three places changed, removed or doubled."""
    holder = [copy.deepcopy(original)]
    for _ in range(draw(st.integers(0, 3))):
        place = (0, *draw(st.sampled_from(_places(holder[0]))))
        parent: Any = holder
        for key in place[:-1]:
            parent = parent[key]
        action = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if action == "replace" or len(place) == 1:
            parent[place[-1]] = draw(values)
        elif action == "remove":
            del parent[place[-1]]
        elif isinstance(parent, list):
            parent.append(draw(values))
        else:
            parent[draw(texts)] = draw(values)
        if not isinstance(holder[0], dict | list):
            break
    return holder[0]


raw_bodies = st.one_of(
    st.binary(max_size=60),
    st.sampled_from(
        [
            b"",
            b"{",
            b"[]",
            b"null",
            b"NaN",
            b"[" * 5000,
            b'{"a":' * 3000,
            b'{"a": NaN, "b": ' + b"[" * 100_000,
            b'{"a": NaN, "\\ud800": "\\udfff"}',
            b'{"a": NaN, "n": ' + b"9" * 5000 + b"}",
            b'{"n": ' + b"9" * 5000 + b"}",
            b'{"n": 1e999}',
            b'{"session_id": "a", "session_id": "b"}',
            b'{"seq_id": Infinity, "model_id": "m"}',
            b"\xff\xfe{}",
            b"\xef\xbb\xbf{}",
            b"\x28\xb5\x2f\xfd",
            b"\x1f\x8b\x08\x00",
            b"\x0a\xff\xff\xff\xff\x0f",
            b"\x1a\x00" * 1000,
        ]
    ),
)
header_values = st.one_of(
    st.sampled_from(
        [
            b"",
            b"application/json",
            b"application/x-protobuf",
            b"text/html; charset=\xff",
            b"zstd",
            b"gzip",
            b"br, gzip",
            b"identity",
            b"18446744073709551617",
            b"-1",
            b"\xb2",
            b"tml-x",
            b"eyJhbGciOiJub25lIn0.e30.",
            b"Bearer x",
            b"[::1",
            b"evil.test\\@host",
            b"a" * 9000,
            b"bytes=0-,0-,0-",
            b"Thu, 01 Jan 1970 00:00:00 GMT",
        ]
    ),
    st.binary(max_size=20).map(lambda value: value.replace(b"\r", b"").replace(b"\n", b"").replace(b"\0", b"")),
)
headers = st.lists(
    st.tuples(
        st.sampled_from(
            [
                b"content-type",
                b"content-encoding",
                b"content-length",
                b"accept",
                b"host",
                b"x-forwarded-host",
                b"x-forwarded-proto",
                b"range",
                b"if-none-match",
                b"x-idempotency-key",
                b"x-tinker-weights-access-token",
                b"x-tinker-request-type",
                b"x-tinker-request-iteration",
                b"x-sdk-version",
            ]
        ),
        header_values,
    ),
    max_size=3,
)


def encoded(text: str) -> str:
    """A text as part of a path, with slashes kept or hidden."""
    return quote(text.encode("utf-8", "surrogatepass"), safe="/:")


@st.composite
def targets(draw: st.DrawFn, endpoint: Endpoint, ids: dict[str, str]) -> str:
    """A route's path with good or nasty parameters, and perhaps a query."""
    path = endpoint.path
    for name in endpoint.parameters:
        good = st.sampled_from([fill(text, ids) for text in PARAMETERS[name]])
        bad = texts.filter(
            lambda text: len(text) < 10_000 and not any("\ud800" <= letter <= "\udfff" for letter in text)
        )
        value = draw(st.one_of(good, bad))
        shown = draw(st.sampled_from([encoded(value), quote(value, safe=""), encoded(value).replace("%", "%25")]))
        path = path.replace(f"{{{name}:path}}", shown).replace(f"{{{name}}}", shown)
    query = draw(st.lists(st.tuples(st.sampled_from(QUERY_KEYS), scalars), max_size=3))
    return path + ("?" + "&".join(f"{key}={encoded(str(value)[:300])}" for key, value in query) if query else "")


@st.composite
def calls(draw: st.DrawFn, endpoint: Endpoint, ids: dict[str, str]) -> Call:
    """A hostile request to one route."""
    body = b""
    if endpoint.takes_body:
        original = body_json(endpoint, draw(st.integers(0, 3)), ids)
        body = draw(st.one_of(mutated(original).map(to_bytes), mutated(original).map(to_bytes), raw_bodies))
    kind = [(b"content-type", b"application/json")] if draw(st.booleans()) else []
    return Call(
        method=draw(st.sampled_from(endpoint.methods)),
        target=draw(targets(endpoint, ids)),
        headers=(*draw(headers), *kind),
        body=body,
        piece=draw(st.sampled_from([7, 65536])) if len(body) < 10_000 else 65536,
    )


def to_bytes(value: object) -> bytes:
    """JSON as Python's own writer makes it: with NaN, huge integers and lone surrogates."""
    return json.dumps(value).encode()
