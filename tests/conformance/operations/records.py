"""What the server knows about runs, sessions and usage; and the end of a session."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import httpx
import tinker
from operations.bridge import BASE_MODEL, RANK, Client, done, needs, needs_class, operation


@operation("get_training_run")
def get_training_run(client: Client) -> None:
    run = done(client.rest.get_training_run(client.model_id))
    assert (run.training_run_id, run.base_model, run.is_lora, run.lora_rank) == (
        client.model_id,
        BASE_MODEL,
        True,
        RANK,
    )
    assert run.user_metadata == {"colour": "blue"}
    assert run.last_checkpoint.checkpoint_id.startswith("weights/")
    assert run.last_sampler_checkpoint.checkpoint_id.startswith("sampler_weights/")
    assert done(client.rest.get_training_run_by_tinker_path(client.state_path)).training_run_id == client.model_id


@operation("list_training_runs")
def list_training_runs(client: Client) -> None:
    found = done(client.rest.list_training_runs(limit=100))
    assert client.model_id in [run.training_run_id for run in found.training_runs]
    assert found.cursor.total_count >= len(found.training_runs)


@operation("get_session")
def get_session(client: Client) -> None:
    session = done(needs(client.rest, "get_session")(client.session_id))
    assert client.model_id in session.training_run_ids
    assert len(session.sampler_ids) > 0
    client.sampler_id = session.sampler_ids[0]


@operation("list_sessions")
def list_sessions(client: Client) -> None:
    assert client.session_id in done(needs(client.rest, "list_sessions")(limit=100)).sessions


@operation("get_sampler")
def get_sampler(client: Client) -> None:
    sampler = done(needs(client.rest, "get_sampler")(client.sampler_id))
    assert (sampler.sampler_id, sampler.base_model) == (client.sampler_id, BASE_MODEL)


@operation("assign_session_project")
def assign_session_project(client: Client) -> None:
    done(needs(client.rest, "assign_session_project")(client.session_id, "project-of-the-test"))


@operation("search_sessions")
def search_sessions(client: Client) -> None:
    search = needs(client.rest, "search_sessions")
    request = needs_class("SessionSearchRequest")(session_id=client.session_id)
    (found,) = done(search(request)).sessions
    assert found.session_id == client.session_id
    assert found.user_metadata == {"purpose": "conformance"}


@operation("export_session_trace")
def export_session_trace(client: Client) -> None:
    url = done(needs(client.rest, "export_session_trace")(client.session_id))
    answer = httpx.get(url)
    answer.raise_for_status()
    assert answer.content


@operation("get_audit_log")
def get_audit_log(client: Client) -> None:
    owner = tinker.AdminClient() if hasattr(tinker, "AdminClient") else client.rest
    assert done(needs(owner, "get_audit_log")()).entries is not None


@operation("get_billing_usage")
def get_billing_usage(client: Client) -> None:
    owner = tinker.AdminClient() if hasattr(tinker, "AdminClient") else client.rest
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    usage = done(needs(owner, "get_billing_usage")(hour - timedelta(hours=1), hour + timedelta(hours=2)))
    assert any(event.event_info.type == "training" for event in usage.data)


@operation("get_current_checkpoint_storage_usage")
def storage_usage(client: Client) -> None:
    owner = tinker.AdminClient() if hasattr(tinker, "AdminClient") else client.rest
    assert done(needs(owner, "get_current_checkpoint_storage_usage")()).data is not None


@operation("with ServiceClient")
def context_manager(client: Client) -> None:
    if not hasattr(tinker.ServiceClient, "__enter__"):
        needs(client.service, "__enter__")
    with tinker.ServiceClient() as service:
        assert done(service.get_server_capabilities()).supported_models


@operation("ServiceClient.close")
def close(client: Client) -> None:
    needs(client.service, "close")("success")
