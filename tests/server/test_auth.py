"""Who may come in: keys, tokens, and the few paths that are open to all."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest
import tinker

from tests.server.conftest import open_api
from tests.server.tenants import ShiftedClock, Tenant, make_key, serve_tenants
from tinker_core.engine.keyring import STALE_SECONDS
from tinker_core.storage.secret import derive_key, load_secret
from tinker_core.types import Caller
from tinker_server.tokens import LIFETIME_SECONDS, Tokens


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def clock() -> ShiftedClock:
    return ShiftedClock()


@pytest.fixture(scope="module")
def tenants(data_dir: Path, clock: ShiftedClock) -> Iterator[dict[str, Tenant]]:
    owners = {"ann@example.org": None, "ben": None}
    with serve_tenants(data_dir, owners, jwt_auth=True, clock=clock) as tenants:
        yield tenants


@pytest.fixture
def ann(tenants: dict[str, Tenant]) -> Tenant:
    return tenants["ann@example.org"]


@pytest.fixture
def stranger(ann: Tenant) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=ann.url, timeout=60) as http:
        yield http


def claims_of(token: str) -> dict[str, Any]:
    payload = token.split(".")[1]
    claims: dict[str, Any] = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    return claims


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/api/v1/healthz", "/api/v1/readyz"])
def test_health_needs_no_key(stranger: httpx.Client, path: str) -> None:
    assert stranger.get(path).status_code in (200, 503)


@pytest.mark.parametrize(
    "path",
    [
        "/api/v1/get_server_capabilities",
        "/api/v1/nothing",
        "/plugins",
        "/metrics",
        "/agreement",
        "/no/such/page",
        "/",
        "//healthz",
    ],
)
@pytest.mark.parametrize(
    "headers",
    [{}, {"x-api-key": ""}, {"x-api-key": "tml-wrong"}, {"x-api-key": "eyJ.e.x"}, {"authorization": "Basic eA"}],
)
def test_everything_else_needs_a_valid_one(stranger: httpx.Client, path: str, headers: dict[str, str]) -> None:
    refused = stranger.get(path, headers=headers)
    assert refused.status_code == 401, refused.text
    assert set(refused.json()) == {"detail"}
    forged = headers.get("x-api-key", "").startswith("eyJ")
    assert refused.headers["www-authenticate"] == ('Bearer error="invalid_token"' if forged else "Bearer")
    assert int(refused.headers["content-length"]) > 0


def test_a_key_may_come_as_a_bearer_too(ann: Tenant, stranger: httpx.Client) -> None:
    for headers in ({"x-api-key": ann.key}, {"authorization": f"Bearer {ann.key}"}):
        assert stranger.get("/plugins", headers=headers).status_code == 200


def test_a_token_stands_for_its_key_and_says_whose_it_is(ann: Tenant, stranger: httpx.Client) -> None:
    token = ann.post("auth/token", {}).json()["jwt"]
    claims = claims_of(token)
    assert claims["exp"] == claims["iat"] + LIFETIME_SECONDS
    assert (claims["org_id"], claims["email"]) == ("ann@example.org", "ann@example.org")
    session = ann.session()
    found = stranger.get(f"/api/v1/sessions/{session}", headers={"x-api-key": token})
    assert found.status_code == 200
    renewed = stranger.post("/api/v1/auth/token", headers={"x-api-key": token}).json()["jwt"]
    assert claims_of(renewed)["exp"] == claims["exp"], "a token must not renew itself for ever"


def test_forged_damaged_and_expired_tokens_are_refused_as_such(
    ann: Tenant, data_dir: Path, stranger: httpx.Client
) -> None:
    now = datetime.now(UTC)
    caller = Caller(owner="ann@example.org", key_id=ann.key_id)
    key = derive_key(load_secret(data_dir), "jwt")
    valid = Tokens(lambda: key).issue(caller, now)
    claims = claims_of(valid)
    bad = {
        "expired": Tokens(lambda: key).issue(caller, now - timedelta(seconds=LIFETIME_SECONDS + 1)),
        "other key": Tokens(lambda: b"x" * 32).issue(caller, now),
        "no signature": jwt.encode(claims, None, algorithm="none"),
        "changed": valid.replace(valid.split(".")[1], "eyJleHAiOjk5OTk5OTk5OTl9"),
        "no such key": Tokens(lambda: key).issue(Caller(owner="ann@example.org", key_id="key-none"), now),
        "anonymous": Tokens(lambda: key).issue(Caller(owner="local"), now),
        "no expiry": jwt.encode({k: v for k, v in claims.items() if k != "exp"}, key, algorithm="HS256"),
        "odd expiry": jwt.encode({**claims, "exp": "soon"}, key, algorithm="HS256"),
    }
    for what, token in bad.items():
        refused = stranger.get("/plugins", headers={"x-api-key": token})
        assert refused.status_code == 401, what
        assert refused.headers["www-authenticate"] == 'Bearer error="invalid_token"', what
    assert stranger.get("/plugins", headers={"x-api-key": valid}).status_code == 200


def test_the_secret_is_for_its_owner_only(ann: Tenant, data_dir: Path) -> None:
    assert (data_dir / "secret").stat().st_mode & 0o777 == 0o600
    assert len(load_secret(data_dir)) == 32


def test_a_key_describes_and_revokes_itself(ann: Tenant, data_dir: Path, stranger: httpx.Client) -> None:
    key, key_id = make_key(data_dir, "cleo")
    headers = {"x-api-key": key}
    me = stranger.get("/api/v1/auth/apikey/me", headers=headers)
    assert me.status_code == 200, "a new key must work without a restart"
    assert me.json()["key_id"] == 3
    assert (me.json()["name"], me.json()["note"]) == ("of cleo", f"{key_id}, ends in {key[-4:]}")
    assert me.json()["details"] == {"org_details": {"name": "cleo"}, "user_details": {"email": "cleo"}}
    token = stranger.post("/api/v1/auth/token", headers=headers).json()["jwt"]
    refused = stranger.delete("/api/v1/auth/apikey/me", headers={"x-api-key": token})
    assert refused.status_code == 400
    assert stranger.delete("/api/v1/auth/apikey/me", headers=headers).status_code == 200
    for credential in (key, token):
        assert stranger.get("/plugins", headers={"x-api-key": credential}).status_code == 401
    assert ann.get("auth/apikey/me").status_code == 200


def test_the_sdk_exchanges_its_key_and_knows_who_it_is(ann: Tenant, tenants: dict[str, Tenant]) -> None:
    rest = tinker.RestClient(base_url=ann.url, api_key=ann.key)
    me = rest.whoami().result()
    assert (me.user_urn, me.org_urn) == (
        "tml:organization_user:ann@example.org",
        "tml:organization:ann@example.org",
    )
    assert me.email == "ann@example.org"
    assert rest.get_server_capabilities().result().supported_models is not None
    assert tinker.RestClient(base_url=ann.url, api_key=tenants["ben"].key).whoami().result().email is None
    with pytest.raises(tinker.AuthenticationError, match="not known"):
        tinker.RestClient(base_url=ann.url, api_key="tml-wrong").whoami().result()


def test_a_server_that_began_without_keys_demands_them_from_the_first_on(tmp_path: Path) -> None:
    clock = ShiftedClock()
    headers = {"x-api-key": "tml-any"}
    with open_api(tmp_path, clock=clock) as api, httpx.Client(base_url=api.url, headers=headers) as anybody:
        me = anybody.get("/api/v1/auth/apikey/me").json()
        assert (me["key_id"], me["name"]) == (0, "local")
        assert anybody.delete("/api/v1/auth/apikey/me").status_code == 400
        token = anybody.post("/api/v1/auth/token").json()["jwt"]
        assert claims_of(token)["email"] == ""
        key, _ = make_key(tmp_path, "ann")
        clock.shift += STALE_SECONDS
        assert anybody.get("/plugins").status_code == 401
        assert anybody.get("/plugins", headers={"x-api-key": token}).status_code == 401
        assert anybody.get("/plugins", headers={"x-api-key": key}).status_code == 200
