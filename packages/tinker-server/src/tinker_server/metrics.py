"""Counters and gauges for Prometheus. They know base models, kinds of requests and routes, and nothing of any user."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import attrs
from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tinker_core.types import EngineMetrics, RequestError, RequestType
from tinker_server.wire.unknown import recording

PATH = "/metrics"
_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_OTHER = "other"


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
_GAUGES: tuple[tuple[Family, Callable[[EngineMetrics], int]], ...] = (
    (
        Family("tinker_requests_queued", "gauge", _BASE, "Training requests that wait for their turn."),
        lambda item: item.queued_requests,
    ),
    (
        Family("tinker_requests_running", "gauge", _BASE, "Training requests that run."),
        lambda item: item.running_requests,
    ),
    (
        Family("tinker_samples_in_progress", "gauge", _BASE, "Samples accepted and not finished."),
        lambda item: item.samples_in_progress,
    ),
    (
        Family("tinker_models_resident", "gauge", _BASE, "Trainable models in memory."),
        lambda item: item.resident_models,
    ),
    (
        Family("tinker_revisions_resident", "gauge", _BASE, "Weights that the sampler holds."),
        lambda item: item.resident_revisions,
    ),
)
_FINISHED = Family(
    "tinker_requests_finished",
    "counter",
    ("base_model", "outcome"),
    "Requests that have their result; outcome is completed or failed.",
)
_TOKENS = Family(
    "tinker_tokens",
    "counter",
    ("base_model", "kind"),
    "Tokens of finished requests: trained (with or without gradient), prefilled (prompts) or sampled.",
)
_POLLS = Family("tinker_open_polls", "gauge", (), "Long polls in progress.")
_HTTP = Family(
    "tinker_http_requests",
    "counter",
    ("method", "route", "status"),
    "HTTP requests by the template of their route; status 499 is a connection that ended without an answer.",
)
_SECONDS = Family(
    "tinker_request_seconds",
    "histogram",
    ("request_type", "outcome"),
    "From acceptance to result, by type of request.",
)
_UNKNOWN = Family(
    "tinker_unknown_fields",
    "counter",
    ("field",),
    "Fields that clients sent and this server does not know: the first 100 by name, the rest as other.",
)

FAMILIES: tuple[Family, ...] = (
    *(family for family, _ in _GAUGES),
    _FINISHED,
    _TOKENS,
    _POLLS,
    _HTTP,
    _SECONDS,
    _UNKNOWN,
)
"""Everything of our own that is served; the client library adds what it knows of the process."""


class EngineCollector(Collector):
    """Reads the engine when somebody asks."""

    def __init__(self, read: Callable[[], Iterable[EngineMetrics]], open_polls: Callable[[], int]) -> None:
        self._read = read
        self._open_polls = open_polls

    def collect(self) -> Iterable[Metric]:
        """All families with their values."""
        return self._families(list(self._read()), self._open_polls())

    def describe(self) -> Iterable[Metric]:
        """All families; asks nobody."""
        return self._families([], 0)

    def _families(self, bases: list[EngineMetrics], open_polls: int) -> Iterable[Metric]:
        for family, value in _GAUGES:
            gauge = GaugeMetricFamily(family.name, family.text, labels=family.labels)
            for base in bases:
                gauge.add_metric([base.base_model], value(base))
            yield gauge
        finished = CounterMetricFamily(_FINISHED.name, _FINISHED.text, labels=_FINISHED.labels)
        tokens = CounterMetricFamily(_TOKENS.name, _TOKENS.text, labels=_TOKENS.labels)
        for base in bases:
            finished.add_metric([base.base_model, "completed"], base.completed_requests)
            finished.add_metric([base.base_model, "failed"], base.failed_requests)
            tokens.add_metric([base.base_model, "trained"], base.trained_tokens)
            tokens.add_metric([base.base_model, "prefilled"], base.prefilled_tokens)
            tokens.add_metric([base.base_model, "sampled"], base.sampled_tokens)
        yield finished
        yield tokens
        yield GaugeMetricFamily(_POLLS.name, _POLLS.text, value=open_polls)


class Metrics:
    """All metrics of one app, in a registry of its own."""

    def __init__(self, read: Callable[[], Iterable[EngineMetrics]], open_polls: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(read, open_polls))
        ProcessCollector(registry=self.registry)
        self._http = Counter(_HTTP.name, _HTTP.text, _HTTP.labels, registry=self.registry)
        self._unknown = Counter(_UNKNOWN.name, _UNKNOWN.text, _UNKNOWN.labels, registry=self.registry)
        self._seconds = Histogram(
            _SECONDS.name, _SECONDS.text, _SECONDS.labels, buckets=_BUCKETS, registry=self.registry
        )

    def observe(self, request_type: RequestType, seconds: float, error: RequestError | None) -> None:
        """A request has its result."""
        self._seconds.labels(request_type.value, "completed" if error is None else "failed").observe(seconds)

    def count_http(self, method: str, route: str, status: int) -> None:
        """A request was answered."""
        self._http.labels(method if method in _METHODS else _OTHER, route, str(status)).inc()

    def count_unknown(self, field: str) -> None:
        """A client sent an unknown field."""
        self._unknown.labels(field).inc()

    def route(self) -> BaseRoute:
        """Where Prometheus reads all of it, as text."""

        async def read(_: Request) -> Response:
            return Response(generate_latest(self.registry), media_type=CONTENT_TYPE_LATEST)

        return Route(PATH, read, methods=["GET"])


class MetricsMiddleware:
    """Counts every HTTP request by its route, and the unknown fields in it. Outermost, so that refusals count too."""

    def __init__(self, app: ASGIApp, metrics: Metrics, templates: Mapping[object, str]) -> None:
        self._app = app
        self._metrics = metrics
        self._templates = templates

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on; a connection that ends without an answer counts as status 499."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 499

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            with recording(self._metrics.count_unknown):
                await self._app(scope, receive, watch)
        finally:
            route = self._templates.get(scope.get("endpoint"), _OTHER)
            self._metrics.count_http(scope["method"], route, status)


def templates_of(routes: Iterable[BaseRoute]) -> dict[object, str]:
    """Path template by endpoint; the first of several."""
    found: dict[object, str] = {}
    for route in routes:
        if isinstance(route, Route):
            found.setdefault(route.endpoint, route.path)
    return found
