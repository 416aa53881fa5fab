"""What the server counts, for Prometheus. Names follow its conventions: base units, `_total` for what only grows.

What is read when somebody asks (pages, queue, sessions) is gathered then; what happens is counted when it happens, by
counters that are looked up once a run, as a token costs them a microsecond or two.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fabula.engine.generation import Generation
from fabula.server.observer import Observer
from fabula.sessions.reply import Reply

if TYPE_CHECKING:
    from fabula.server.runs import Run, Source
    from fabula.server.state import Server

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
FIRST_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 30.0, 60.0)
BETWEEN_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 5.0)
REQUEST_S = (0.001, 0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 60.0)


class Metrics(Observer):
    """Counts what happens in a server.

    Args:
        server: whose queue, pages and sessions are told when somebody asks.
    """

    def __init__(self, server: Server) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        registry.register(_Now(server))
        self._requests = Counter(
            "fabula_requests", "Requests answered.", ("method", "route", "status"), registry=registry
        )
        self._request_s = Histogram(
            "fabula_request_seconds", "Time until a response begins.", ("route",), buckets=REQUEST_S, registry=registry
        )
        self._answers = Counter("fabula_answers", "Answers that ended.", ("model", "kind"), registry=registry)
        self._first = Histogram(
            "fabula_first_token_seconds", "From an answer's begin to its first token.", ("model",), buckets=FIRST_S,
            registry=registry,
        )  # fmt: skip
        self._between = Histogram(
            "fabula_between_tokens_seconds", "Between two tokens of an answer.", ("model",), buckets=BETWEEN_S,
            registry=registry,
        )  # fmt: skip
        self._queued = Histogram(
            "fabula_queue_seconds", "Time an answer waited for its place.", ("model",), buckets=FIRST_S,
            registry=registry,
        )  # fmt: skip
        self._tokens = Counter(
            "fabula_tokens", "Tokens: of prompts, of those the reused ones, and generated.", ("model", "kind"),
            registry=registry,
        )  # fmt: skip
        self._failures = Counter("fabula_failures", "Errors that are the server's fault.", ("kind",), registry=registry)
        self._begun: weakref.WeakSet[Source] = weakref.WeakSet()  # answers that have a token
        self._children: dict[str, tuple[Histogram, Histogram]] = {}

    def text(self) -> bytes:
        """Everything, as Prometheus reads it."""
        return generate_latest(self._registry)

    def request_ended(self, *, method: str, route: str, status: int, seconds: float, request_id: str) -> None:
        del request_id
        known = method if method in METHODS else "other"  # a client may call them what he likes
        self._requests.labels(known, route or "none", str(status)).inc()
        self._request_s.labels(route or "none").observe(seconds)

    def token(self, run: Run, source: Source, seconds: float) -> None:
        if run.model not in self._children:  # models are those that are served: few
            self._children[run.model] = self._first.labels(run.model), self._between.labels(run.model)
        first, between = self._children[run.model]
        if source in self._begun:
            between.observe(seconds)
        else:
            self._begun.add(source)
            first.observe(seconds)

    def answer_ended(self, run: Run, source: Source, kind: str) -> None:
        self._answers.labels(run.model, kind).inc()
        timings = generation_of(source).timings
        self._queued.labels(run.model).observe(timings.queued_ms / 1e3)
        self._tokens.labels(run.model, "prompt").inc(timings.prompt_tokens)
        self._tokens.labels(run.model, "reused").inc(timings.reused_tokens)
        self._tokens.labels(run.model, "generated").inc(timings.generated_tokens)

    def failed(self, run: Run | None, error: BaseException) -> None:
        del run
        self._failures.labels(type(error).__name__).inc()


def generation_of(source: Source) -> Generation:
    """What makes an answer."""
    return source.generation if isinstance(source, Reply) else source


class _Now(Collector):
    """What is so at the moment somebody asks."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def collect(self) -> Iterator[Metric]:
        server = self._server
        load = server.load()
        yield GaugeMetricFamily("fabula_answers_running", "Answers that share the engine's steps.", load["running"])
        yield GaugeMetricFamily("fabula_answers_waiting", "Answers that wait for a place.", load["waiting"])
        yield GaugeMetricFamily("fabula_sessions", "Sessions kept.", server.workspace.n_sessions())
        ready = GaugeMetricFamily("fabula_model_ready", "Whether a model is loaded.", labels=["model"])
        pages = GaugeMetricFamily("fabula_kv_pages", "Pages of the KV cache.", labels=["model", "kind"])
        size = GaugeMetricFamily("fabula_kv_page_bytes", "Bytes of a page.", labels=["model"])
        evicted = CounterMetricFamily(
            "fabula_kv_evicted_pages", "Pages that were given up for others.", labels=["model"]
        )
        for serving in server.models.values():
            ready.add_metric([serving.name], float(serving.state == "ready"))
            if serving.model is None:
                continue
            usage = serving.model.kv_usage
            for kind in ("n_pages", "n_used", "n_shared", "n_cached", "n_spilled"):
                name = {"n_pages": "all", "n_spilled": "on_disk"}.get(kind, kind[2:])
                pages.add_metric([serving.name, name], getattr(usage, kind))
            size.add_metric([serving.name], usage.page_bytes)
            evicted.add_metric([serving.name], usage.n_evicted)
        yield from (ready, pages, size, evicted)

    def describe(self) -> Iterator[Metric]:  # or it would be collected to know its names
        return iter(())
