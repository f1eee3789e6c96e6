"""Every metric of our own: name, type, labels and meaning, and where its value comes from."""

from __future__ import annotations

from collections.abc import Callable

import attrs

from tinker_core.types import AgreementFigures, DurabilityMetrics, EngineMetrics
from tinker_server.life import ServerLife


@attrs.frozen
class Family:
    """A metric as the reference page shows it."""

    name: str
    kind: str
    labels: tuple[str, ...]
    text: str

    @property
    def shown_name(self) -> str:
        """The name as Prometheus reads it."""
        return f"{self.name}_total" if self.kind == "counter" else self.name


_BASE = ("base_model",)


def _base_gauge(name: str, text: str) -> Family:
    return Family(name, "gauge", _BASE, text)


def _agreement_gauge(name: str, text: str) -> Family:
    what = "compared is base or adapter (given tokens without and with an adapter), decode (sampled tokens), or a part"
    return Family(name, "gauge", ("base_model", "compared"), f"{text} In nats; {what} of an adapter that disagrees.")


BASE_MODEL_GAUGES: tuple[tuple[Family, Callable[[EngineMetrics], float]], ...] = (
    (
        _base_gauge("tinker_requests_queued", "Training requests that wait for their turn."),
        lambda item: item.queued_requests,
    ),
    (
        _base_gauge(
            "tinker_oldest_queued_seconds", "How long the training request has waited for its turn that waits longest."
        ),
        lambda item: item.oldest_queued_seconds,
    ),
    (
        _base_gauge("tinker_requests_running", "Training requests that run."),
        lambda item: item.running_requests,
    ),
    (
        _base_gauge("tinker_samples_in_progress", "Samples accepted and not finished."),
        lambda item: item.samples_in_progress,
    ),
    (
        _base_gauge("tinker_samples_waiting", "Those of them that the sampler has not begun."),
        lambda item: item.samples_waiting,
    ),
    (
        _base_gauge("tinker_models_resident", "Trainable models in the workers' memory."),
        lambda item: item.resident_models,
    ),
    (
        _base_gauge("tinker_models_parked", "Trainable models on disk, which come back with their next request."),
        lambda item: item.parked_models,
    ),
    (
        _base_gauge("tinker_revisions_resident", "Weights that the sampler holds."),
        lambda item: item.resident_revisions,
    ),
    (
        _base_gauge("tinker_revisions_stored", "Weights of unfinished sessions that the sampler can read from disk."),
        lambda item: item.stored_revisions,
    ),
    (
        _base_gauge("tinker_revisions_stored_bytes", "Bytes of these."),
        lambda item: item.stored_revision_bytes,
    ),
    (
        _base_gauge("tinker_worker_recovery_seconds", "From the last loss of the workers until they could work again."),
        lambda item: item.recovery_seconds,
    ),
)
"""One value for each base model, read when somebody asks."""

WORKER_LOSSES = Family("tinker_worker_losses", "counter", _BASE, "How often the workers died unasked.")
FINISHED = Family(
    "tinker_requests_finished",
    "counter",
    ("base_model", "outcome"),
    "Requests that have their result; outcome is completed or failed.",
)
TOKENS = Family(
    "tinker_tokens",
    "counter",
    ("base_model", "kind"),
    "Tokens of finished requests: trained (with or without gradient), prefilled (prompts) or sampled.",
)
AGREEMENT: tuple[tuple[Family, Callable[[AgreementFigures], float]], ...] = (
    (
        _agreement_gauge("tinker_agreement_max", "Greatest difference between the logprobs of trainer and sampler."),
        lambda item: item.max,
    ),
    (
        _agreement_gauge("tinker_agreement_mean", "Mean difference between them, without signs."),
        lambda item: item.mean,
    ),
    (
        _agreement_gauge("tinker_agreement_kl", "Mean of exp(d) - 1 - d of these differences: KL(sampler || trainer)."),
        lambda item: item.kl,
    ),
)
"""Of the last comparison of trainer and sampler, if there was one."""
WITHIN_TOLERANCE = Family(
    "tinker_agreement_within_tolerance",
    "gauge",
    _BASE,
    "1 if the last comparison of trainer and sampler found no more than --agreement-tolerance allows, else 0.",
)
WORK_SECONDS = Family(
    "tinker_work_seconds",
    "histogram",
    ("base_model", "kind"),
    "How long a piece of work took: pass (forward and backward), step (optimizer) or single (all else).",
)
PASS_FILL = Family(
    "tinker_pass_fill",
    "histogram",
    _BASE,
    "Share of the token budget that the data of a pass filled; more than 1 is one request that exceeds it.",
)
POLLS = Family("tinker_open_polls", "gauge", (), "Long polls in progress.")
HTTP = Family(
    "tinker_http_requests",
    "counter",
    ("method", "route", "status"),
    "HTTP requests by the template of their route; status 499 is a connection that ended without an answer.",
)
SECONDS = Family(
    "tinker_request_seconds",
    "histogram",
    ("request_type", "outcome"),
    "From acceptance to result, by type of request.",
)
UNKNOWN = Family(
    "tinker_unknown_fields",
    "counter",
    ("field",),
    "Fields that clients sent and this server does not know: the first 100 by name, the rest as other.",
)
LOOP_LAG = Family(
    "tinker_event_loop_lag_seconds",
    "gauge",
    (),
    "How late the server's event loop was when this was asked: what every request waits for besides its own work.",
)


def _gauge(name: str, text: str) -> Family:
    return Family(name, "gauge", (), text)


DURABILITY: tuple[tuple[Family, Callable[[DurabilityMetrics], float]], ...] = (
    (
        _gauge("tinker_journal_bytes", "Bytes of requests and results in the journal."),
        lambda item: item.journal_bytes,
    ),
    (
        _gauge("tinker_journal_max_bytes", "Bytes at which the journal takes no more requests (--journal-bytes)."),
        lambda item: item.journal_max_bytes,
    ),
    (
        _gauge("tinker_journal_full", "1 while no request is accepted, because the journal or its disk is full."),
        lambda item: item.journal_full,
    ),
    (
        _gauge("tinker_journal_requests", "Accepted requests without a result."),
        lambda item: item.journal_requests,
    ),
    (
        _gauge("tinker_journal_results", "Results that clients may still ask for."),
        lambda item: item.journal_results,
    ),
    (
        _gauge("tinker_journal_waiting", "Requests and results that wait to become durable."),
        lambda item: item.journal_waiting,
    ),
    (
        _gauge("tinker_journal_lag_seconds", "How long the oldest of these has waited."),
        lambda item: item.journal_waiting_seconds,
    ),
    (
        Family("tinker_journal_commits", "counter", (), "Transactions of the journal."),
        lambda item: item.journal_commits,
    ),
    (
        _gauge("tinker_snapshot_lag_seconds", "Age of the oldest change to a model that no snapshot covers."),
        lambda item: item.snapshot_lag_seconds,
    ),
    (
        _gauge("tinker_snapshot_lag_requests", "Requests that would run again after a crash, of all models."),
        lambda item: item.snapshot_lag_requests,
    ),
    (
        Family("tinker_snapshots_written", "counter", (), "Snapshots of models."),
        lambda item: item.snapshots_written,
    ),
    (
        Family("tinker_snapshots_failed", "counter", (), "Snapshots that could not be written."),
        lambda item: item.snapshots_failed,
    ),
)
"""Of the server as a whole."""

LIFE: tuple[tuple[Family, Callable[[ServerLife], float]], ...] = (
    (
        Family("tinker_server_restarts", "counter", (), "Server processes that ended before this one."),
        lambda life: life.restarts,
    ),
    (
        _gauge("tinker_accepting_seconds", "From the end of the last server process until requests were accepted."),
        lambda life: life.accepting_seconds,
    ),
    (
        _gauge("tinker_ready_seconds", "From the end of the last server process until all models were ready."),
        lambda life: life.ready_seconds,
    ),
)
"""Of this process."""

FAMILIES: tuple[Family, ...] = (
    *(family for family, _ in BASE_MODEL_GAUGES),
    WORKER_LOSSES,
    FINISHED,
    TOKENS,
    *(family for family, _ in AGREEMENT),
    WITHIN_TOLERANCE,
    WORK_SECONDS,
    PASS_FILL,
    *(family for family, _ in DURABILITY),
    *(family for family, _ in LIFE),
    POLLS,
    HTTP,
    SECONDS,
    UNKNOWN,
    LOOP_LAG,
)
"""Everything of our own that is served; the client library adds what it knows of the process."""
