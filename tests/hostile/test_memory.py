"""A real server process under bombs: what it holds stays bounded, and it works afterwards."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.hostile import bombs
from tests.hostile.bombs import MIB
from tests.processes import children_of
from tests.server.test_command import FAKE, running
from tinker_server.wire.body import PROTOBUF

BODY_LIMIT = 32 * MIB
GROWTH = 256
"""MiB that a server with this body limit may grow at its worst; measured are about 170."""

JSON = {"content-type": "application/json"}
PROTO = {"content-type": PROTOBUF}
ZSTD = {"content-encoding": "zstd"}

ATTACKS: dict[str, tuple[str, dict[str, str], bytes]] = {
    "zstd bomb": ("forward_backward", PROTO | ZSTD, bombs.zstd(bytes(128 * MIB))),
    "zstd bomb of unknown size": ("forward_backward", PROTO | ZSTD, bombs.zstd(bytes(128 * MIB), sized=False)),
    "gzip bomb": ("asample", JSON | {"content-encoding": "gzip"}, bombs.gzip_bomb(64 * MIB)),
    "empty data": ("forward_backward", PROTO | ZSTD, bombs.zstd(bombs.empty_data(14 * MIB))),
    "empty chunks": ("forward_backward", PROTO | ZSTD, bombs.zstd(bombs.empty_chunks(14 * MIB))),
    "restless chunk": ("forward_backward", PROTO | ZSTD, bombs.zstd(bombs.restless_chunk(7 * MIB))),
    "empty lists": ("forward_backward", JSON | ZSTD, bombs.zstd(bombs.empty_lists(10 * MIB))),
    "long shape": ("forward_backward", PROTO | ZSTD, bombs.zstd(bombs.long_shape(3 * MIB))),
    "mixed list": ("forward_backward", JSON, bombs.mixed_list(100_000, 4 * MIB)),
    "samples": ("asample", JSON, json.dumps({"sampling_session_id": "s", "seq_id": 1, "num_samples": 2**60}).encode()),
    "deep": ("telemetry", JSON, b'{"a": ' + b"[" * MIB),
    "large telemetry": ("telemetry", JSON, bytes(20 * MIB)),
}


def peak_mib(pid: int) -> float:
    """The most memory that a process has ever had."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, httpx.Client]]:
    data = str(tmp_path_factory.mktemp("memory"))
    flags = ["--data-dir", data, "--port", "0", "--body-limit", str(BODY_LIMIT)]
    with running(*FAKE, *flags) as (started, url), httpx.Client(base_url=f"{url}/api/v1", timeout=120) as http:
        [server] = children_of(started.pid)
        yield server, http


def test_memory_stays_bounded(process: tuple[int, httpx.Client]) -> None:
    pid, http = process
    before = peak_mib(pid)
    peaks = {}

    for name, (path, headers, content) in ATTACKS.items():
        answer = http.post(path, headers=headers, content=content)
        assert answer.status_code in (200, 400, 404, 413), (name, answer.status_code, answer.text[:200])
        peaks[name] = round(peak_mib(pid) - before)
    assert peaks["large telemetry"] < GROWTH, peaks
    session = http.post("create_session", json={}).json()["session_id"]
    assert http.get(f"sessions/{session}").status_code == 200
