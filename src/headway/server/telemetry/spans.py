"""What a request's span says: OpenTelemetry's attributes for generative AI, vLLM's, and our own.

Neither texts nor tokens are part of it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from headway import __version__
from headway.core.errors import ConfigError
from headway.engine.outputs import EngineOutput, RequestMetrics
from headway.engine.request_board import own_id

__all__ = ["SpanWriter", "traces_url"]

_Attribute = str | int | float | Sequence[str]


class SpanWriter:
    """Makes spans of requests that have ended, and sends them in batches.

    Args:
        endpoint: of an OTLP collector (HTTP), or an exporter.
        model_name: that requests ask for.

    Raises:
        ConfigError: the endpoint is no HTTP URL.
    """

    def __init__(self, endpoint: str | SpanExporter, model_name: str) -> None:
        self._model_name = model_name
        exporter = OTLPSpanExporter(traces_url(endpoint)) if isinstance(endpoint, str) else endpoint
        service = os.environ.get("OTEL_SERVICE_NAME", "headway")
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": service, "service.version": __version__}),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("headway", __version__)
        self._propagator = TraceContextTextMapPropagator()

    def write(self, output: EngineOutput, parent: Mapping[str, str], origin: int) -> None:
        """Make the spans of a request that has ended.

        Args:
            output: its last, which has its metrics.
            parent: W3C's trace headers that its client sent; empty = the trace begins here.
            origin: what the engine's clock counts from, in nanoseconds since 1970.
        """

        def nanoseconds(seconds: float) -> int:
            return origin + round(seconds * 1e9)

        metrics = output.metrics
        assert metrics is not None
        span = self._tracer.start_span(
            "llm_request",
            self._propagator.extract(parent),
            SpanKind.SERVER,
            self._attributes(metrics, output),
            start_time=nanoseconds(metrics.arrival_time),
        )
        if output.error is not None:
            span.set_status(Status(StatusCode.ERROR, _text(str(output.error))))
        context = set_span_in_context(span)
        for phase, start, end in metrics.segments:
            child = self._tracer.start_span(phase.value, context, start_time=nanoseconds(start))
            child.end(nanoseconds(end))
        end = metrics.arrival_time if metrics.finish_time is None else metrics.finish_time
        span.end(nanoseconds(end))

    def close(self) -> None:
        """Send what has not been sent. Idempotent."""
        self._provider.shutdown()

    def _attributes(self, metrics: RequestMetrics, output: EngineOutput) -> dict[str, _Attribute]:
        params = metrics.sampling_params
        attributes: dict[str, _Attribute] = {
            "gen_ai.operation.name": "text_completion",
            "gen_ai.provider.name": "headway",
            "gen_ai.request.model": self._model_name,
            "gen_ai.response.model": self._model_name,
            "gen_ai.request.id": _text(own_id(metrics.request_id, metrics.tenant)),
            "gen_ai.request.max_tokens": params.max_tokens,
            "gen_ai.request.temperature": float(params.temperature),
            "gen_ai.request.top_p": float(params.top_p),
            "gen_ai.usage.input_tokens": metrics.num_prompt_tokens,
            "gen_ai.usage.output_tokens": metrics.num_output_tokens,
            "gen_ai.usage.cache_read.input_tokens": metrics.num_cached_tokens,
            "headway.priority": metrics.priority,
            "headway.num_states": metrics.num_changes,
            "headway.num_pauses": metrics.num_pauses,
            "headway.num_preemptions": metrics.num_preemptions,
            "headway.num_recomputed_tokens": metrics.num_recomputed_tokens,
        }
        if metrics.num_sequences > 1:
            attributes["gen_ai.request.choice.count"] = metrics.num_sequences
        if output.finish_reason is not None:
            attributes["gen_ai.response.finish_reasons"] = (output.finish_reason,)
        if output.error is not None:
            attributes["error.type"] = type(output.error).__name__
        events = (
            ("time_to_first_token", metrics.arrival_time, metrics.first_token_time),
            ("time_in_queue", metrics.arrival_time, metrics.first_scheduled_time),
            ("time_in_model_prefill", metrics.first_scheduled_time, metrics.first_token_time),
            ("time_in_model_decode", metrics.first_token_time, metrics.finish_time),
            ("time_in_model_inference", metrics.first_scheduled_time, metrics.finish_time),
            ("e2e", metrics.arrival_time, metrics.finish_time),
        )
        for name, start, end in events:
            if start is not None and end is not None:
                attributes[f"gen_ai.latency.{name}"] = end - start
        return attributes


def traces_url(endpoint: str) -> str:
    """Where a collector takes traces: the standard's path, unless the URL has one.

    Raises:
        ConfigError: it is no HTTP URL.
    """
    try:
        parts = urlsplit(endpoint)
        is_http = parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:  # brackets that hold no address
        is_http = False
    if not is_http:
        raise ConfigError(
            f"the endpoint for traces is {endpoint!r}, must be an HTTP URL as http://localhost:4318"
        )
    return endpoint if parts.path.strip("/") else parts._replace(path="/v1/traces").geturl()


def _text(text: str) -> str:
    """Text that UTF-8 can say: one that it cannot would take a whole batch of spans with it."""
    return text.encode(errors="replace").decode()
