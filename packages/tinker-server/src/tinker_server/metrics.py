"""Counters and gauges for Prometheus. They know base models, kinds of requests and routes, and nothing of any user."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from tinker_core.engine import Engine
from tinker_core.scheduler import WorkKind
from tinker_core.types import DurabilityMetrics, EngineMetrics, RequestError, RequestType
from tinker_server import metric_families as families
from tinker_server.life import ServerLife
from tinker_server.metric_families import Family
from tinker_server.services import PollGate
from tinker_server.status_watch import StatusWatch
from tinker_server.wire.unknown import recording

PATH = "/metrics"
_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)
_FILL_BUCKETS = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_OTHER = "other"


def _single(family: Family, value: float) -> Metric:
    if family.kind == "counter":
        return CounterMetricFamily(family.name, family.text, value=value)
    return GaugeMetricFamily(family.name, family.text, value=value)


def _of_agreement(bases: list[EngineMetrics]) -> Iterable[Metric]:
    reports = [base.agreement for base in bases if base.agreement is not None]
    for family, value in families.AGREEMENT:
        gauge = GaugeMetricFamily(family.name, family.text, labels=family.labels)
        for report in reports:
            for compared, figures in report.figures.items():
                gauge.add_metric([report.base_model, compared], value(figures))
        yield gauge
    verdict = families.WITHIN_TOLERANCE
    gauge = GaugeMetricFamily(verdict.name, verdict.text, labels=verdict.labels)
    for report in reports:
        gauge.add_metric([report.base_model], report.agrees)
    yield gauge


class EngineCollector(Collector):
    """Reads engine and server when somebody asks."""

    def __init__(self, engine: Engine, gate: PollGate, life: ServerLife) -> None:
        self._engine = engine
        self._gate = gate
        self._life = life
        self.loop_lag = 0.0
        """Seconds, as measured for the answer that is being made."""

    def collect(self) -> Iterable[Metric]:
        """All families with their values."""
        return self._families(list(self._engine.metrics()), self._engine.durability())

    def describe(self) -> Iterable[Metric]:
        """All families; asks nobody."""
        return self._families([], DurabilityMetrics())

    def _families(self, bases: list[EngineMetrics], durability: DurabilityMetrics) -> Iterable[Metric]:
        yield from self._of_base_models(bases)
        yield from _of_agreement(bases)
        for family, read in families.DURABILITY:
            yield _single(family, read(durability))
        for family, read_life in families.LIFE:
            yield _single(family, read_life(self._life))
        yield _single(families.POLLS, self._gate.num_open)
        yield _single(families.LOOP_LAG, self.loop_lag)

    def _of_base_models(self, bases: list[EngineMetrics]) -> Iterable[Metric]:
        for family, value in families.BASE_MODEL_GAUGES:
            gauge = GaugeMetricFamily(family.name, family.text, labels=family.labels)
            for base in bases:
                gauge.add_metric([base.base_model], value(base))
            yield gauge
        losses, finished, tokens = (
            CounterMetricFamily(family.name, family.text, labels=family.labels)
            for family in (families.WORKER_LOSSES, families.FINISHED, families.TOKENS)
        )
        for base in bases:
            losses.add_metric([base.base_model], base.worker_losses)
            finished.add_metric([base.base_model, "completed"], base.completed_requests)
            finished.add_metric([base.base_model, "failed"], base.failed_requests)
            tokens.add_metric([base.base_model, "trained"], base.trained_tokens)
            tokens.add_metric([base.base_model, "prefilled"], base.prefilled_tokens)
            tokens.add_metric([base.base_model, "sampled"], base.sampled_tokens)
        yield from (losses, finished, tokens)


class Metrics:
    """All metrics of one app, in a registry of its own."""

    def __init__(self, engine: Engine, gate: PollGate, life: ServerLife) -> None:
        self.registry = CollectorRegistry()
        self._engine = engine
        self._collector = EngineCollector(engine, gate, life)
        self.registry.register(self._collector)
        ProcessCollector(registry=self.registry)
        self._http = self._counter(families.HTTP)
        self._unknown = self._counter(families.UNKNOWN)
        self._seconds = self._histogram(families.SECONDS, _BUCKETS)
        self._work_seconds = self._histogram(families.WORK_SECONDS, _BUCKETS)
        self._fill = self._histogram(families.PASS_FILL, _FILL_BUCKETS)

    def _counter(self, family: Family) -> Counter:
        return Counter(family.name, family.text, family.labels, registry=self.registry)

    def _histogram(self, family: Family, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(family.name, family.text, family.labels, buckets=buckets, registry=self.registry)

    @contextlib.asynccontextmanager
    async def observing(self) -> AsyncIterator[None]:
        """Watch what the engine does for the length of a block."""
        counters = self._engine.counters
        counters.observers.append(self.observe)
        counters.work_observers.append(self.observe_work)
        try:
            yield
        finally:
            counters.observers.remove(self.observe)
            counters.work_observers.remove(self.observe_work)

    def observe(self, request_type: RequestType, seconds: float, error: RequestError | None) -> None:
        """A request has its result."""
        self._seconds.labels(request_type.value, "completed" if error is None else "failed").observe(seconds)

    def observe_work(self, base_model: str, kind: WorkKind, seconds: float, fill: float) -> None:
        """A piece of work is done."""
        self._work_seconds.labels(base_model, kind.value).observe(seconds)
        if kind is WorkKind.PASS:
            self._fill.labels(base_model).observe(fill)

    def count_http(self, method: str, route: str, status: int) -> None:
        """A request was answered."""
        self._http.labels(method if method in _METHODS else _OTHER, route, str(status)).inc()

    def count_unknown(self, field: str) -> None:
        """A client sent an unknown field."""
        self._unknown.labels(field).inc()

    def route(self) -> BaseRoute:
        """Where Prometheus reads all of it, as text."""

        async def read(_: Request) -> Response:
            self._collector.loop_lag = await loop_lag()
            return Response(generate_latest(self.registry), media_type=CONTENT_TYPE_LATEST)

        return Route(PATH, read, methods=["GET"])


async def loop_lag() -> float:
    """Seconds until the event loop gets round to what is due now."""
    loop = asyncio.get_running_loop()
    reached: asyncio.Future[float] = loop.create_future()
    started = time.monotonic()
    loop.call_soon(lambda: reached.set_result(time.monotonic() - started))
    return await reached


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
        watch = StatusWatch(send)
        try:
            with recording(self._metrics.count_unknown):
                await self._app(scope, receive, watch)
        finally:
            route = self._templates.get(scope.get("endpoint"), _OTHER)
            self._metrics.count_http(scope["method"], route, watch.status)


def templates_of(routes: Iterable[BaseRoute]) -> dict[object, str]:
    """Path template by endpoint; the first of several."""
    found: dict[object, str] = {}
    for route in routes:
        if isinstance(route, Route):
            found.setdefault(route.endpoint, route.path)
    return found
