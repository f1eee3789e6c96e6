"""Forged, stretched and misdirected signed links."""

from __future__ import annotations

import time
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

import pytest

from tests.hostile.asgi import Answer, Call
from tests.hostile.conftest import SECRET, Target
from tinker_server.signing import LINK_SECONDS

Query = dict[str, str]


def archive_link(target: Target, name: str = "weights/w0") -> tuple[str, Query]:
    """Path and query of a good link."""
    answer = target.hosted.get(f"training_runs/{target.ids['MODEL']}/checkpoints/{name}/archive")
    assert answer.status == 200, answer.body
    parts = urlsplit(answer.json()["url"])
    return parts.path, dict(parse_qsl(parts.query, keep_blank_values=True))


def follow(target: Target, path: str, query: Query | str) -> Answer:
    encoded = query if isinstance(query, str) else urlencode(query)
    return target.hosted.send(Call(method="GET", target=f"{path}?{encoded}"))


def test_a_good_link_needs_no_key(target: Target) -> None:
    path, query = archive_link(target)
    answer = follow(target, path, query)
    assert answer.status == 200
    assert b"tinker.json" in answer.body
    assert abs(int(query["expires"]) - time.time()) <= LINK_SECONDS + 5


CHANGES: dict[str, Query] = {
    "no signature": {"signature": ""},
    "a guessed signature": {"signature": "0" * 64},
    "a signature that is no text": {"signature": "\udcff\u2028"},
    "a long signature": {"signature": "a" * 50_000},
    "a later end": {"expires": str(int(time.time()) + 10**6)},
    "an endless end": {"expires": "9" * 12},
    "an end that is no number": {"expires": "1e99"},
    "an end in other digits": {"expires": "\u0661" * 10},
    "a negative end": {"expires": "-1"},
    "no end": {"expires": ""},
    "a huge end": {"expires": "9" * 5000},
    "another version": {"version": "req-x"},
    "no version": {"version": ""},
    "a version with a seam": {"version": "x\0y"},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_a_changed_link_opens_nothing(target: Target, change: Query) -> None:
    path, query = archive_link(target)
    changed = {key: quote(value.encode("utf-8", "surrogatepass")) for key, value in (query | change).items()}
    encoded = "&".join(f"{key}={value}" for key, value in changed.items())
    answer = follow(target, path, encoded)
    assert answer.status in (400, 401, 403, 404)
    assert b"tinker.json" not in answer.body


def test_a_link_opens_what_it_was_made_for_and_nothing_else(target: Target) -> None:
    path, query = archive_link(target)
    run = target.ids["MODEL"]
    assert path == f"/download/archives/{quote(run, safe=':')}/weights/w0"
    for other in (
        f"/download/archives/{run}/sampler_weights/s0",
        f"/download/archives/{target.ids['SPARE_MODEL']}/weights/w0",
        f"/download/files/{run}/weights/w0/tinker.json",
        f"/download/files/{run}/weights/w0/../../../../canary.txt",
        f"/download/traces/{target.ids['SESSION']}",
        f"/download/archives/{run}/weights/w0%00",
        f"/download/archives/{run}/weights/w0%0d%0aSet-Cookie:x",
        f"/download/archives/{run}/weights//w0",
        f"/download/archives/{run}/weights/../weights/w0",
    ):
        answer = follow(target, other, query)
        assert answer.status in (400, 401, 403, 404), other
        assert SECRET.encode() not in answer.body


def test_of_two_values_for_one_key_only_a_signed_one_counts(target: Target) -> None:
    path, query = archive_link(target)
    later = f"expires={int(query['expires']) + 1000}"
    for encoded in (f"{later}&{urlencode(query)}", f"{urlencode(query)}&{later}"):
        answer = follow(target, path, encoded)
        if answer.status == 200:  # the last value is the signed one, and the other is ignored
            assert encoded.startswith(later)


def test_a_link_does_not_open_what_was_saved_under_the_name_later(target: Target) -> None:
    new = {"session_id": target.ids["SESSION"], "model_seq_id": 300, "base_model": "tiny", "lora_config": {"rank": 2}}
    model = target.hosted.result("create_model", new)["model_id"]
    save = {"model_id": model, "path": "again", "overwrite": True}
    target.hosted.result("save_weights", {**save, "seq_id": 1})
    link = target.hosted.get(f"training_runs/{model}/checkpoints/weights/again/archive").json()["url"]
    parts = urlsplit(link)
    assert follow(target, parts.path, parts.query).status == 200
    target.hosted.result("save_weights", {**save, "seq_id": 2})
    assert follow(target, parts.path, parts.query).status in (400, 403, 404)


RANGES = ["bytes=0-3", "bytes=-5", "bytes=5-2", f"bytes=0-{10**30}", "bytes=" + "0-1," * 2000 + "0-1", "x", ""]


def test_ranges_of_a_file_stay_within_the_file(target: Target) -> None:
    new = {"session_id": target.ids["SESSION"], "model_seq_id": 301, "base_model": "tiny", "lora_config": {"rank": 2}}
    model = target.hosted.result("create_model", new)["model_id"]
    target.hosted.result("save_weights_external", {"model_id": model, "path": "out", "seq_id": 1})
    answer = target.hosted.get(f"training_runs/{model}/checkpoints/external/out/external_weights_urls")
    if answer.status != 200:
        answer = target.hosted.get(f"training_runs/{model}/checkpoints/external_weights/out/external_weights_urls")
    link = next(iter(answer.json()["urls"].values()))
    parts = urlsplit(link)
    whole = follow(target, parts.path, parts.query)
    assert whole.status == 200
    for wanted in (
        "bytes=0-3",
        "bytes=-5",
        "bytes=5-2",
        f"bytes=0-{10**30}",
        "bytes=" + "0-1," * 2000 + "0-1",
        "x",
        "",
    ):
        call = Call(method="GET", target=f"{parts.path}?{parts.query}", headers=((b"range", wanted.encode()),))
        answer = target.hosted.send(call)
        assert answer.status in (200, 206, 400, 416), wanted
        assert len(answer.body) <= len(whole.body) + 1000, wanted
