"""Two owners on one server: to each, the other's things do not exist.

Every route is tried with the ids of the other owner's real things, and again with made-up ids of the same shape. Both
answers, and the results of both where the answer is a receipt, must be the same but for the ids themselves.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import httpx
import pytest
from starlette.routing import BaseRoute, Route

from tests.server.tenants import Tenant, make_key, serve_tenants
from tests.server.test_routes import DATUM, pass_body
from tinker_core.engine import Engine, EngineConfig
from tinker_core.plugins import Plugins
from tinker_core.testing.fakes import FAKE_PLUGIN
from tinker_server.app import create_app
from tinker_server.auth import OPEN_PATHS

PROMPT = {"chunks": [{"type": "encoded_text", "tokens": [3, 4, 5]}]}
GRAPH = {"name": "n", "graph": {"nodes": []}, "inputs": []}


@attrs.frozen(kw_only=True)
class Things:
    """The ids of one owner's things, or made-up ones."""

    session: str
    finished: str
    model: str
    past_model: str
    sampler: str
    request: str
    training_request: str
    training: str = "weights/w"
    sampling: str = "sampler_weights/s"
    external: str = "external_weights/e"

    def path(self, checkpoint: str) -> str:
        return f"tinker://{self.model}/{checkpoint}"

    def hidden(self, text: str) -> str:
        """A text in which no id is left."""
        for value in sorted(attrs.astuple(self), key=len, reverse=True):
            if "/" not in value:
                text = text.replace(value, "…")
        return text


def made_up(like: Things) -> Things:
    session, finished = (f"s-{secrets.token_urlsafe(16)}" for _ in range(2))
    return Things(
        session=session,
        finished=finished,
        model=f"{session}:train:0",
        past_model=f"{finished}:train:0",
        sampler=f"{session}:sample:0",
        request="req-" + secrets.token_urlsafe((len(like.request) - 4) * 3 // 4),
        training_request="req-" + secrets.token_urlsafe((len(like.request) - 4) * 3 // 4),
    )


@attrs.frozen(kw_only=True)
class Probe:
    """One request that names somebody's things."""

    method: str
    route: str
    path: Callable[[Things], str] = lambda _: ""
    body: Callable[[Things], Any] | None = None
    status: int = 404
    """200 is a receipt, and the result must be an error."""


def post(route: str, body: Callable[[Things], Any], status: int = 404) -> Probe:
    return Probe(method="POST", route=f"/api/v1/{route}", path=lambda _: f"/api/v1/{route}", body=body, status=status)


def of(method: str, route: str, path: Callable[[Things], str], body: Any = None, status: int = 404) -> Probe:
    return Probe(
        method=method,
        route=f"/api/v1/{route}",
        path=lambda things: f"/api/v1/{path(things)}",
        body=None if body is None else lambda _: body,
        status=status,
    )


def sample(things: Things) -> dict[str, Any]:
    params = {"max_tokens": 2}
    return {"sampling_session_id": things.sampler, "seq_id": 0, "prompt": PROMPT, "sampling_params": params}


def _checkpoint(
    method: str, suffix: str = "", *, kind: str = "training", body: Any = None, template: str = ""
) -> Probe:
    route = f"training_runs/{{run_id}}/checkpoints/{template or '{checkpoint_id:path}'}{suffix}"
    return of(method, route, lambda t: f"training_runs/{t.model}/checkpoints/{getattr(t, kind)}{suffix}", body)


_NAMED = "{kind}/{name}"
_CREATE = {"base_model": "tiny", "lora_config": {"rank": 4}}

PROBES = [
    # sessions
    post("session_heartbeat", lambda t: {"session_id": t.session}),
    post("session_heartbeat", lambda t: {"session_id": t.finished}),
    of("POST", "sessions/{session_id}/finish", lambda t: f"sessions/{t.session}/finish", {"detail": "mine"}),
    of("GET", "sessions/{session_id}", lambda t: f"sessions/{t.session}"),
    of("GET", "sessions/{session_id}", lambda t: f"sessions/{t.session}?access_scope=accessible"),
    of("GET", "sessions/{session_id}", lambda t: f"sessions/{t.finished}"),
    of("PUT", "sessions/{session_id}/project", lambda t: f"sessions/{t.session}/project", {"project_id": "mine"}),
    of("GET", "sessions/{session_id}/trace_export", lambda t: f"sessions/{t.session}/trace_export"),
    post("sessions/search", lambda t: {"session_id": t.session}, 200),
    # models
    post("create_model", lambda t: {"session_id": t.session, "model_seq_id": 0, **_CREATE}),
    post("create_model", lambda t: {"session_id": t.session, "model_seq_id": 9, **_CREATE}),
    post("create_model", lambda t: {"session_id": t.finished, "model_seq_id": 0, **_CREATE}),
    post("create_custom_loss", lambda t: {"session_id": t.session, "custom_loss_seq_id": 0, **GRAPH}),
    post("get_info", lambda t: {"model_id": t.model}),
    post("get_info", lambda t: {"model_id": t.past_model}),
    post("unload_model", lambda t: {"model_id": t.model}, 200),
    post("unload_model", lambda t: {"model_id": t.past_model}, 200),
    # training; seq_ids that their owner has used already, and others
    *(post("forward_backward", lambda t, n=n: pass_body(t.model, n), 200) for n in (1, 77)),
    post("forward_backward", lambda t: pass_body(t.past_model, 1), 200),
    post("forward_backward", lambda t: {"model_id": t.model, "seq_id": 76, "forward_backward_input": 3}, 200),
    *(post("forward", lambda t, n=n: {"model_id": t.model, "seq_id": n, "forward_input": {
        "data": [DATUM], "loss_fn": "cross_entropy"}}, 200) for n in (1, 78)),
    *(post("optim_step", lambda t, n=n: {"model_id": t.model, "seq_id": n, "adam_params": {}}, 200) for n in (2, 79)),
    # saving and loading
    *(post("save_weights", lambda t, n=n: {"model_id": t.model, "seq_id": n, "path": "w"}, 200) for n in (3, 80)),
    post("save_weights_for_sampler", lambda t: {"model_id": t.model, "seq_id": 81, "path": "s"}, 200),
    post("save_weights_for_sampler", lambda t: {"model_id": t.model, "seq_id": 82, "sampling_session_seq_id": 0}, 200),
    post("save_weights_external", lambda t: {"model_id": t.model, "seq_id": 83, "path": "e"}, 200),
    post("load_weights", lambda t: {"model_id": t.model, "seq_id": 84, "path": t.path(t.training)}, 200),
    post("load_weights", lambda t: {"session_id": t.session, "model_seq_id": 7, "path": t.path(t.training)}),
    post("copy_weights", lambda t: {"source_path": t.path(t.training), "destination_project_id": "mine"}),
    post("copy_weights", lambda t: {"source_path": t.path(t.sampling), "destination_project_id": "mine",
                                    "weights_access_token": "wat-guess"}),
    post("weights_info", lambda t: {"tinker_path": t.path(t.training)}),
    post("weights_info", lambda t: {"tinker_path": t.path(t.sampling)}),
    # checkpoints
    of("GET", "training_runs/{run_id}", lambda t: f"training_runs/{t.model}"),
    of("GET", "training_runs/{run_id}", lambda t: f"training_runs/{t.model}?access_scope=accessible"),
    of("GET", "training_runs/{run_id}", lambda t: f"training_runs/{t.past_model}"),
    of("GET", "training_runs/{run_id}/checkpoints", lambda t: f"training_runs/{t.model}/checkpoints"),
    of("GET", "models/{run_id}/checkpoints", lambda t: f"models/{t.model}/checkpoints"),
    _checkpoint("POST", "/publish"),
    _checkpoint("DELETE", "/publish"),
    _checkpoint("PUT", "/ttl", body={"ttl_seconds": 3600}),
    _checkpoint("PUT", "/ttl", body={"ttl_seconds": None}, kind="sampling"),
    _checkpoint("DELETE"),
    _checkpoint("DELETE", kind="external"),
    _checkpoint("GET", "/external_weights_urls", kind="external", template=_NAMED),
    _checkpoint("GET", "/archive", kind="sampling", template=_NAMED),
    # downloads: the link's signature is what counts
    Probe(
        method="GET",
        route="/download/files/{run_id}/{kind}/{name}/{file:path}",
        path=lambda t: f"/download/files/{t.model}/{t.external}/adapter_config.json?version=1&expires=2&signature=3",
        status=403,
    ),
    Probe(
        method="GET",
        route="/download/archives/{run_id}/{kind}/{name}",
        path=lambda t: f"/download/archives/{t.model}/{t.sampling}",
        status=403,
    ),
    Probe(
        method="GET", route="/download/traces/{session_id}", path=lambda t: f"/download/traces/{t.session}", status=403
    ),
    # sampling
    post("create_sampling_session", lambda t: {
        "session_id": t.session, "sampling_session_seq_id": 0, "base_model": "tiny"}),
    post("create_sampling_session", lambda t: {
        "session_id": t.session, "sampling_session_seq_id": 5, "model_path": t.path(t.sampling)}),
    post("join_sampling_session", lambda t: {"sampling_session_id": t.sampler, "session_id": t.session}),
    of("GET", "samplers/{sampling_session_id}", lambda t: f"samplers/{t.sampler}"),
    post("asample", sample),
    post("asample", lambda t: {**sample(t), "seq_id": 99}),
    post("asample", lambda t: {**sample(t), "prompt": 3}),
    # futures
    post("retrieve_future", lambda t: {"request_id": t.request}),
    post("retrieve_future", lambda t: {"request_id": t.training_request}),
    post("cancel_future", lambda t: {"request_id": t.request}),
    post("cancel_future", lambda t: {"request_id": t.training_request}),
    post("retrieve_futures", lambda t: {
        "target": {"type": "sampling_session", "sampling_session_id": t.sampler, "cloned_sampler_id": 0},
        "prev_cursor": 0, "timeout": 0.01, "retrieved_request_ids": [t.request]}),
]  # fmt: skip

LISTINGS = (
    "training_runs",
    "training_runs?access_scope=accessible",
    "checkpoints",
    "sessions",
    "sessions?access_scope=accessible",
    "audit",
    "billing/usage/events?starting_on=2026-01-01T00:00:00Z&ending_before=2026-01-02T00:00:00Z",
    "billing/usage/checkpoints/current",
    "get_server_capabilities",
    "auth/apikey/me",
)
"""What lists the caller's own things, and must never show another's."""

NAMES_NOTHING = {
    ("POST", "/api/v1/client/config"),
    ("POST", "/api/v1/client/dynamic_config"),
    ("POST", "/api/v1/create_session"),
    ("POST", "/api/v1/telemetry"),
    ("POST", "/api/v1/auth/token"),
    ("DELETE", "/api/v1/auth/apikey/me"),
    ("GET", "/plugins"),
    ("GET", "/metrics"),
    ("POST", "/agreement"),  # a base model is everybody's
    *(("GET", path) for path in OPEN_PATHS),
}
"""Requests that can name nobody's things."""

CATCH_ALL = "/api/v1/{path:path}"


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def tenants(data_dir: Path) -> Iterator[dict[str, Tenant]]:
    with serve_tenants(data_dir, {"ann": None, "ben": None}) as tenants:
        yield tenants


@pytest.fixture(scope="module")
def ann(tenants: dict[str, Tenant]) -> Tenant:
    return tenants["ann"]


@pytest.fixture(scope="module")
def ben(tenants: dict[str, Tenant]) -> Tenant:
    return tenants["ben"]


def fill(tenant: Tenant) -> Things:
    """One of everything."""
    finished = tenant.session()
    past_model = tenant.model(finished)
    tenant.post(f"sessions/{finished}/finish", {"reason": {"type": "success"}})
    session = tenant.session()
    model = tenant.model(session)
    trained = tenant.post("forward_backward", pass_body(model, 1)).json()["request_id"]
    tenant.retrieve(trained)
    tenant.run("optim_step", {"model_id": model, "seq_id": 2, "adam_params": {}})
    for seq_id, (save, name) in enumerate(
        [("save_weights", "w"), ("save_weights_for_sampler", "s"), ("save_weights_external", "e")], 3
    ):
        assert "path" in tenant.run(save, {"model_id": model, "seq_id": seq_id, "path": name})
    sampler = tenant.post(
        "create_sampling_session", {"session_id": session, "sampling_session_seq_id": 0, "base_model": "tiny"}
    ).json()["sampling_session_id"]
    things = Things(
        session=session,
        finished=finished,
        model=model,
        past_model=past_model,
        sampler=sampler,
        request="",
        training_request=trained,
    )
    request = tenant.post("asample", sample(things)).json()["request_id"]
    return attrs.evolve(things, request=request)


@pytest.fixture(scope="module")
def things(ann: Tenant) -> Things:
    """Ann's."""
    return fill(ann)


def send(tenant: Tenant, probe: Probe, things: Things) -> httpx.Response:
    return tenant.http.request(probe.method, probe.path(things), json=probe.body(things) if probe.body else None)


def outcome(tenant: Tenant, probe: Probe, things: Things) -> tuple[Any, ...]:
    """What an answer says, and for a receipt what its result says, without any id."""
    response = send(tenant, probe, things)
    told = [response.status_code, response.headers["content-type"], things.hidden(response.text)]
    if response.status_code == 200 and "request_id" in response.json():
        request_id = response.json()["request_id"]
        assert request_id not in (things.request, things.training_request)
        result = tenant.retrieve(request_id)
        told[2] = things.hidden(told[2].replace(request_id, "…"))
        told += [result.status_code, result.headers["content-type"], things.hidden(result.text)]
        assert "error" in result.json()
    return tuple(told)


@pytest.mark.parametrize("probe", PROBES, ids=lambda probe: f"{probe.method} {probe.route}")
def test_anothers_things_are_as_good_as_made_up(ben: Tenant, things: Things, probe: Probe) -> None:
    fantasy = made_up(things)
    nothing = outcome(ben, probe, fantasy)
    assert nothing[0] == probe.status, nothing
    assert outcome(ben, probe, things) == nothing
    for text in map(str, nothing):
        assert "ann" not in text


def test_all_routes_are_tried() -> None:
    """A new route needs a probe here, or a place in one of the two lists with nothing to probe."""
    plugins = Plugins.load("core", FAKE_PLUGIN)
    config = EngineConfig(base_models=(), data_dir=Path("unused"), backend="fake", sampler="fake", plugins=())
    known = {(probe.method, probe.route) for probe in PROBES} | NAMES_NOTHING
    known |= {("GET", f"/api/v1/{path.partition('?')[0]}") for path in LISTINGS}
    found = set()

    def walk(routes: list[BaseRoute]) -> None:
        for route in routes:
            assert isinstance(route, Route), f"{route} is not looked into"
            if route.path != CATCH_ALL:
                found.update((method, route.path) for method in (route.methods or ()) if method != "HEAD")

    walk(create_app(Engine(config, plugins), plugins=plugins).routes)
    assert found - known == set(), "routes without a probe"
    assert known - found == set(), "probes without a route"


@pytest.mark.parametrize("path", LISTINGS)
def test_listings_show_nothing_of_others(ben: Tenant, things: Things, path: str) -> None:
    listed = ben.get(path)
    assert listed.status_code == 200, listed.text
    assert things.hidden(listed.text) == listed.text
    assert "ann" not in listed.text


def test_a_search_that_names_others_finds_nothing(ben: Tenant, things: Things) -> None:
    for owner in ({"type": "user", "owner_urns": ["ann"]}, {"type": "accessible"}, {"type": "own"}):
        found = ben.post("sessions/search", {"owner": owner})
        assert found.status_code == 200, found.text
        assert things.hidden(found.text) == found.text


def test_nothing_was_harmed(ann: Tenant, ben: Tenant, things: Things) -> None:
    """After all probes: Ann's things are as she left them, and her next requests are in order."""
    for probe in PROBES:
        send(ben, probe, things)
    assert ann.post("session_heartbeat", {"session_id": things.session}).status_code == 200
    listed = ann.get(f"training_runs/{things.model}/checkpoints").json()["checkpoints"]
    assert {item["checkpoint_id"] for item in listed} == {things.training, things.sampling, things.external}
    assert all(item["expires_at"] is None and not item["public"] for item in listed)
    passed = ann.run("forward_backward", pass_body(things.model, 6))
    assert "error" not in passed
    assert ann.retrieve(things.request, "application/x-protobuf").status_code == 200
    assert ann.get(f"samplers/{things.sampler}").status_code == 200
    sessions = ann.post("sessions/search", {"session_id": things.session}).json()["sessions"]
    assert [item["project_id"] for item in sessions] == [""]


def test_the_same_identity_of_two_owners_is_two_requests(ann: Tenant, ben: Tenant, things: Things) -> None:
    body = pass_body(things.model, 1)
    mine, again = (ann.post("forward_backward", body).json()["request_id"] for _ in range(2))
    assert mine == again == things.training_request
    others = ben.post("forward_backward", body).json()["request_id"]
    assert others != mine
    assert ben.post("forward_backward", body).json()["request_id"] == others
    assert "unknown model" in ben.retrieve(others).json()["error"]


def test_a_public_checkpoint_may_be_read_and_nothing_else(ann: Tenant, ben: Tenant, things: Things) -> None:
    own = fill(ben)
    below = f"training_runs/{things.model}/checkpoints"
    assert ann.post(f"{below}/{things.training}/publish").status_code == 200
    path = things.path(things.training)
    try:
        assert ben.post("weights_info", {"tinker_path": path}).json()["lora_rank"] == 4
        loaded = ben.run("load_weights", {"session_id": own.session, "model_seq_id": 5, "path": path})
        assert loaded["model_id"] == f"{own.session}:train:5"
        listed = ben.get(below).json()["checkpoints"]
        assert [item["checkpoint_id"] for item in listed] == [things.training]
        for method, suffix in (("DELETE", ""), ("PUT", "/ttl"), ("POST", "/publish"), ("DELETE", "/publish")):
            body = {"ttl_seconds": 3600} if suffix == "/ttl" else None
            refused = ben.http.request(method, f"/api/v1/{below}/{things.training}{suffix}", json=body)
            assert refused.status_code == 404, (method, suffix)
        assert ben.post("weights_info", {"tinker_path": things.path(things.sampling)}).status_code == 404
        assert ben.post("get_info", {"model_id": things.model}).status_code == 404
        assert ben.get(f"sessions/{things.session}").status_code == 404
    finally:
        assert ann.http.delete(f"/api/v1/{below}/{things.training}/publish").status_code == 200
    assert ben.post("weights_info", {"tinker_path": path}).status_code == 404


def test_two_keys_of_one_owner_share_everything(ann: Tenant, things: Things, data_dir: Path) -> None:
    key, _ = make_key(data_dir, "ann")
    with httpx.Client(base_url=ann.url, headers={"x-api-key": key}, timeout=60) as http:
        assert http.get(f"/api/v1/sessions/{things.session}").status_code == 200
        for path in LISTINGS[:4]:
            assert http.get(f"/api/v1/{path}").json() == ann.get(path).json()
