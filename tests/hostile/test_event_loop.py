"""A large request is nobody else's delay: while it is decoded, others are answered."""

from __future__ import annotations

import json
import threading

import pytest
import zstandard

from tests.hostile.asgi import Call
from tests.hostile.conftest import Target
from tinker_server.wire.body import PROTOBUF, Body

JSON_TYPE = (b"content-type", b"application/json")


@pytest.mark.parametrize(
    ("body", "off_loop"),
    [
        (Body(data=bytes(1000)), False),
        (Body(data=bytes(100_000)), True),
        (Body(data=bytes(100), content_encoding="zstd"), True),
        (Body(data=bytes(20_000), content_type=PROTOBUF), True),
    ],
)
def test_what_takes_long_is_decoded_off_the_loop(body: Body, off_loop: bool) -> None:
    assert body.is_large is off_loop


def test_many_large_bodies_leave_the_loop_free(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many large bodies arrive at once, a few threads decode them, and others are answered meanwhile."""
    begun, go_on = threading.Semaphore(0), threading.Event()
    threads: set[int] = set()
    original = Body.json_object

    def slow(self: Body) -> dict[str, object]:
        if self.is_large:
            threads.add(threading.get_ident())
            begun.release()
            assert go_on.wait(120)
        return original(self)

    monkeypatch.setattr(Body, "json_object", slow)
    content = zstandard.ZstdCompressor().compress(json.dumps({"sampling_session_id": "s", "seq_id": 1}).encode())
    call = Call(
        method="POST",
        target="/api/v1/asample",
        headers=(JSON_TYPE, (b"content-encoding", b"zstd")),
        body=content,
    )
    waiting = [target.hosted.start(call) for _ in range(20)]
    for _ in range(2):
        assert begun.acquire(timeout=120)
    assert target.hosted.get("healthz").status == 200
    assert target.hosted.post("create_session", {}).status == 200
    assert not begun.acquire(blocking=False)
    go_on.set()
    assert {future.result(20).status for future in waiting} == {404}
    assert threading.get_ident() not in threads
