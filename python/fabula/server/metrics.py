"""Prometheus metrics of the server. Names follow Prometheus' conventions: base units, `_total` for counters.

Gauges (pages, queue, sessions) are read at each scrape. Events are counted as they happen. Labeled histograms are
looked up once per model, since a lookup costs a microsecond or two and there is one observation per token.
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
    """Counts the events of a server.

    Args:
        server: its queue, pages and sessions are read at each scrape.
    """

    def __init__(self, server: Server) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        registry.register(_Gauges(server))
        self._requests = Counter(
            "fabula_requests", "Requests answered.", ("method", "route", "status"), registry=registry
        )
        self._request_s = Histogram(
            "fabula_request_seconds", "Time until a response starts.", ("route",), buckets=REQUEST_S, registry=registry
        )
        self._answers = Counter("fabula_answers", "Answers that ended.", ("model", "kind"), registry=registry)
        self._first = Histogram(
            "fabula_first_token_seconds", "From an answer's start to its first token.", ("model",), buckets=FIRST_S,
            registry=registry,
        )  # fmt: skip
        self._between = Histogram(
            "fabula_between_tokens_seconds", "Between two tokens of an answer.", ("model",), buckets=BETWEEN_S,
            registry=registry,
        )  # fmt: skip
        self._queued = Histogram(
            "fabula_queue_seconds", "Time an answer waited before its prefill.", ("model",), buckets=FIRST_S,
            registry=registry,
        )  # fmt: skip
        self._tokens = Counter(
            "fabula_tokens", "Tokens: of prompts, reused ones among them, and generated.", ("model", "kind"),
            registry=registry,
        )  # fmt: skip
        self._drafts = Counter(
            "fabula_draft_tokens", "Tokens guessed by speculation, and those of them that were right.",
            ("model", "kind"), registry=registry,
        )  # fmt: skip
        self._failures = Counter("fabula_failures", "Errors of the server itself.", ("kind",), registry=registry)
        self._started: weakref.WeakSet[Source] = weakref.WeakSet()  # answers with a first token
        self._children: dict[str, tuple[Histogram, Histogram]] = {}

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def request_ended(self, *, method: str, route: str, status: int, seconds: float, request_id: str) -> None:
        del request_id
        known = method if method in METHODS else "other"  # a client may send any method name
        self._requests.labels(known, route or "none", str(status)).inc()
        self._request_s.labels(route or "none").observe(seconds)

    def token(self, run: Run, source: Source, seconds: float) -> None:
        if run.model not in self._children:  # bounded: only served models get here
            self._children[run.model] = self._first.labels(run.model), self._between.labels(run.model)
        first, between = self._children[run.model]
        if source in self._started:
            between.observe(seconds)
        else:
            self._started.add(source)
            first.observe(seconds)

    def answer_ended(self, run: Run, source: Source, kind: str) -> None:
        self._answers.labels(run.model, kind).inc()
        timings = generation_of(source).timings
        self._queued.labels(run.model).observe(timings.queued_ms / 1e3)
        self._tokens.labels(run.model, "prompt").inc(timings.prompt_tokens)
        self._tokens.labels(run.model, "reused").inc(timings.reused_tokens)
        self._tokens.labels(run.model, "generated").inc(timings.generated_tokens)
        self._drafts.labels(run.model, "drafted").inc(timings.drafted)
        self._drafts.labels(run.model, "accepted").inc(timings.accepted)

    def failed(self, run: Run | None, error: BaseException) -> None:
        del run
        self._failures.labels(type(error).__name__).inc()


def generation_of(source: Source) -> Generation:
    """The generation of an answer."""
    return source.generation if isinstance(source, Reply) else source


class _Gauges(Collector):
    """Values that are read at each scrape."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def collect(self) -> Iterator[Metric]:
        server = self._server
        load = server.load()
        yield GaugeMetricFamily("fabula_answers_running", "Answers that share the engine's steps.", load["running"])
        yield GaugeMetricFamily("fabula_answers_waiting", "Answers that wait to run.", load["waiting"])
        yield GaugeMetricFamily("fabula_sessions", "Stored sessions.", server.workspace.n_sessions())
        ready = GaugeMetricFamily("fabula_model_ready", "Whether a model is loaded.", labels=["model"])
        pages = GaugeMetricFamily("fabula_kv_pages", "Pages of the KV cache.", labels=["model", "kind"])
        size = GaugeMetricFamily("fabula_kv_page_bytes", "Bytes of a page.", labels=["model"])
        evicted = CounterMetricFamily("fabula_kv_evicted_pages", "Pages evicted to make room.", labels=["model"])
        states = GaugeMetricFamily("fabula_states", "Recurrent states of hybrid models.", labels=["model", "kind"])
        slot = GaugeMetricFamily("fabula_state_bytes", "Bytes of a recurrent state.", labels=["model"])
        lost = CounterMetricFamily("fabula_evicted_states", "Recurrent states evicted to make room.", labels=["model"])
        for serving in server.models.values():
            ready.add_metric([serving.name], float(serving.state == "ready"))
            if serving.model is None:
                continue
            usage = serving.model.kv_usage
            for kind in ("n_pages", "n_used", "n_shared", "n_cached", "n_spilled", "n_dropped"):
                name = {"n_pages": "all", "n_spilled": "on_disk"}.get(kind, kind[2:])
                pages.add_metric([serving.name, name], getattr(usage, kind))
            size.add_metric([serving.name], usage.page_bytes)
            evicted.add_metric([serving.name], usage.n_evicted)
            if usage.n_slots:
                counts = {"all": usage.n_slots, "used": usage.n_slots_used, "on_disk": usage.n_states_spilled}
                for kind, n in counts.items():
                    states.add_metric([serving.name, kind], n)
                slot.add_metric([serving.name], usage.slot_bytes)
                lost.add_metric([serving.name], usage.n_states_evicted)
        yield from (ready, pages, size, evicted, states, slot, lost)

    def describe(self) -> Iterator[Metric]:  # without it, registering would call collect()
        return iter(())
