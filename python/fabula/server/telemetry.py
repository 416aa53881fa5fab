"""OpenTelemetry traces: a span per request, and within it a span per answer.

Attributes follow OpenTelemetry's semantic conventions for HTTP servers and for generative AI, and hold no text of
users. A caller's trace (W3C `traceparent`) is continued.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quart import g, has_request_context, request

from fabula.errors import InvalidArgument
from fabula.server.metrics import METHODS, generation_of
from fabula.server.observer import Observer

if TYPE_CHECKING:
    from fabula.server.runs import Run, Source


class Traces(Observer):
    """Records a span per request and per answer.

    Args:
        provider: of the tracer; None for `exporting_provider`.

    Raises:
        InvalidArgument: OpenTelemetry is not installed.
    """

    def __init__(self, provider: Any = None) -> None:
        try:
            from opentelemetry import propagate, trace
        except ImportError:
            raise InvalidArgument(
                "traces need OpenTelemetry: pip install opentelemetry-sdk opentelemetry-exporter-otlp-proto-http"
            ) from None
        self._trace, self._propagate = trace, propagate
        self._provider = provider or exporting_provider()
        self._tracer = self._provider.get_tracer("fabula.server")
        self._spans: dict[int, Any] = {}  # of answers, by the id() of their source

    def request_started(self) -> None:
        parent = self._propagate.extract(dict(request.headers))
        g.span = self._tracer.start_span("request", context=parent, kind=self._trace.SpanKind.SERVER)

    def request_ended(self, *, method: str, route: str, status: int, seconds: float, request_id: str) -> None:
        del seconds
        span = g.pop("span", None)
        if span is None:
            return
        span.update_name(f"{method if method in METHODS else 'HTTP'} {route}".strip())
        span.set_attributes(
            {
                "http.request.method": method if method in METHODS else "_OTHER",
                "http.route": route,
                "http.response.status_code": status,
                "fabula.request.id": request_id,
            }
        )
        if status >= 500:
            span.set_status(self._trace.StatusCode.ERROR)
        span.end()

    def answer_started(self, run: Run, source: Source) -> None:
        outer = g.get("span") if has_request_context() else None
        context = self._trace.set_span_in_context(outer) if outer is not None else None
        span = self._tracer.start_span(f"chat {run.model}", context=context)
        span.set_attributes({"gen_ai.operation.name": "chat", "gen_ai.request.model": run.model})
        self._spans[id(source)] = span

    def answer_ended(self, run: Run, source: Source, kind: str) -> None:
        span = self._spans.pop(id(source), None)
        if span is None:
            return
        generation = generation_of(source)
        timings = generation.timings
        span.set_attributes(
            {
                "gen_ai.response.model": run.model,
                "gen_ai.response.finish_reasons": [generation.finish_reason or kind],
                "gen_ai.usage.input_tokens": timings.prompt_tokens,
                "gen_ai.usage.output_tokens": timings.generated_tokens,
                "fabula.usage.reused_tokens": timings.reused_tokens,
                "fabula.first_token_ms": timings.first_token_ms,
            }
        )
        if kind == "error":
            span.set_status(self._trace.StatusCode.ERROR)
        span.end()


def exporting_provider() -> Any:
    """A provider that exports over OTLP as the OTEL_ environment variables configure it.

    Raises:
        InvalidArgument: the SDK or its exporter is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise InvalidArgument(
            "traces need OpenTelemetry: pip install opentelemetry-sdk opentelemetry-exporter-otlp-proto-http"
        ) from None
    provider = TracerProvider(resource=Resource.create({"service.name": "fabula"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider
