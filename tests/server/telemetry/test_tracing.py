"""Spans of requests, as a collector gets them."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from headway.core.errors import ConfigError
from headway.core.life import HISTORY
from headway.core.request import Request, SamplingParams
from headway.engine.client import EngineClient, StepReport
from headway.engine.engine import Engine
from headway.engine.outputs import EngineOutput, RequestMetrics
from headway.engine.timeline import timeline
from headway.server.telemetry import tracing
from headway.server.telemetry.tracing import Tracer

MakeEngine = Callable[..., Engine]
Drain = Callable[[Engine], list[EngineOutput]]
Collect = Callable[[Engine], "Collected"]

TRACE_ID, SPAN_ID = 0x4BF92F3577B34DA6A3CE929D0E0E4736, 0x00F067AA0BA902B7
TRACEPARENT = f"00-{TRACE_ID:032x}-{SPAN_ID:016x}-01"


def ask(
    request_id: str, priority: int = 0, num_prompt: int = 10, max_tokens: int = 5, **more: Any
) -> Request:
    params = SamplingParams(max_tokens=max_tokens, temperature=0.5, top_p=0.9)
    return Request(request_id, priority, [97] * num_prompt, sampling_params=params, **more)


class Collected:
    """An engine's spans, once the block is left."""

    def __init__(self, engine: Engine, client: EngineClient) -> None:
        self._exporter = InMemorySpanExporter()
        self.tracer = Tracer(client, self._exporter, "story-teller")
        #: Of requests that have ended, by the engine's ids.
        self.metrics: dict[str, RequestMetrics] = {}
        engine.listeners.append(self._on_step)

    def _on_step(self, _: StepReport, outputs: Sequence[EngineOutput]) -> None:
        for output in outputs:
            if output.is_last and output.metrics is not None:
                self.metrics[output.request_id] = output.metrics

    def __enter__(self) -> Collected:
        return self

    def __exit__(self, *_: object) -> None:
        self.tracer.close()
        self.spans = self._exporter.get_finished_spans()

    def span(self, request_id: str) -> ReadableSpan:
        """The request's own."""
        (span,) = (
            one
            for one in self.spans
            if (one.attributes or {}).get("gen_ai.request.id") == request_id
        )
        return span

    def children(self, request_id: str) -> list[ReadableSpan]:
        """Of that one, in order of time."""
        context = self.span(request_id).context
        found = [one for one in self.spans if one.parent is not None]
        found = [one for one in found if one.parent.span_id == context.span_id]
        return sorted(found, key=lambda one: one.start_time or 0)


@pytest.fixture
def collect(client_of: Callable[[Engine], EngineClient]) -> Collect:
    """``collect(engine)``: the spans of an engine that the test steps itself."""
    return lambda engine: Collected(engine, client_of(engine))


def seconds(span: ReadableSpan) -> float:
    assert span.start_time is not None and span.end_time is not None
    return (span.end_time - span.start_time) / 1e9


def test_a_request_becomes_a_span(
    make_engine: MakeEngine,
    drain: Drain,
    collect: Collect,
) -> None:
    engine = make_engine()
    request = ask("r", priority=-3)
    before = time.time_ns()
    with collect(engine) as collected:
        engine.submit(request)
        drain(engine)
    after = time.time_ns()
    span, metrics = collected.span("r"), collected.metrics["r"]
    assert (span.name, span.kind, span.parent) == ("llm_request", SpanKind.SERVER, None)
    assert span.status.status_code is StatusCode.UNSET
    assert span.attributes == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "headway",
        "gen_ai.request.model": "story-teller",
        "gen_ai.response.model": "story-teller",
        "gen_ai.request.id": "r",
        "gen_ai.request.max_tokens": 5,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.usage.input_tokens": 10,
        "gen_ai.usage.output_tokens": 5,
        "gen_ai.usage.cache_read.input_tokens": 0,
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.latency.time_to_first_token": metrics.ttft,
        "gen_ai.latency.time_in_queue": 0,
        "gen_ai.latency.time_in_model_prefill": metrics.ttft,
        "gen_ai.latency.time_in_model_decode": metrics.finish_time - metrics.first_token_time,
        "gen_ai.latency.time_in_model_inference": metrics.latency,
        "gen_ai.latency.e2e": metrics.latency,
        "headway.priority": -3,
        "headway.num_states": 3,  # waiting, running, finished
        "headway.num_pauses": 0,
        "headway.num_preemptions": 0,
        "headway.num_recomputed_tokens": 0,
    }
    assert span.resource.attributes["service.name"] == "headway"
    assert seconds(span) == pytest.approx(metrics.latency)
    # The engine's clock began at 0, and its hour is the one on the wall.
    assert span.end_time is not None and before <= span.end_time <= after


def test_the_choices_of_a_prompt_share_a_span(
    make_engine: MakeEngine,
    drain: Drain,
    collect: Collect,
) -> None:
    engine = make_engine()
    with collect(engine) as collected:
        engine.submit(ask("web/r", n=3, tenant="web"))
        drain(engine)
    span = collected.span("r")  # as its client calls it
    assert span.attributes is not None
    assert span.attributes["gen_ai.request.choice.count"] == 3
    assert span.attributes["gen_ai.usage.output_tokens"] == 15


def test_its_states_are_its_children(
    make_engine: MakeEngine,
    drain: Drain,
    collect: Collect,
) -> None:
    engine = make_engine(
        preemption_mode="swap",
        num_blocks=12,
        num_swap_blocks=12,
        max_num_seqs=2,
        enable_prefix_caching=False,
    )
    victim = ask("victim", 1, 12, 20)
    with collect(engine) as collected:
        engine.submit(victim)
        for _ in range(5):
            engine.step()
        engine.submit(ask("other", 0, 4, 3))
        engine.submit(ask("third", 0, 4, 3))
        engine.step()
        engine.submit(ask("urgent", 0, 36, 4))
        drain(engine)
    segments = timeline(victim)
    assert collected.metrics["victim"].num_changes < HISTORY
    assert {phase.value for phase, _, _ in segments} == {"prefill", "decode", "paused", "swapped"}
    span, children = collected.span("victim"), collected.children("victim")
    assert [one.name for one in children] == [phase.value for phase, _, _ in segments]
    assert [seconds(one) for one in children] == pytest.approx(
        [end - start for _, start, end in segments]
    )
    assert (children[0].start_time, children[-1].end_time) == (span.start_time, span.end_time)
    for before, after in pairwise(children):
        assert before.end_time == after.start_time
    assert {one.context.trace_id for one in children} == {span.context.trace_id}
    assert span.attributes is not None
    assert span.attributes["headway.num_preemptions"] == 1
    assert span.attributes["headway.num_pauses"] == 1


def test_a_request_belongs_to_the_trace_of_its_client(
    make_engine: MakeEngine,
    drain: Drain,
    collect: Collect,
) -> None:
    engine = make_engine()
    with collect(engine) as collected:
        headers = {"traceparent": TRACEPARENT, "tracestate": "vendor=1", "accept": "*/*"}
        collected.tracer.begin("asked", headers)
        for name in ("asked", "unasked"):
            engine.submit(ask(name))
        drain(engine)
        engine.submit(ask("asked"))  # of another client
        drain(engine)
    traced = [one for one in collected.spans if one.name == "llm_request" and one.parent]
    (span,) = traced
    assert span.attributes is not None and span.attributes["gen_ai.request.id"] == "asked"
    assert span.parent is not None and span.context is not None
    assert (span.context.trace_id, span.parent.span_id) == (TRACE_ID, SPAN_ID)
    assert span.context.trace_state.get("vendor") == "1"
    assert len({one.context.trace_id for one in collected.spans}) == 3


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"tracestate": "vendor=1"},
        {"traceparent": "nonsense"},
        {"traceparent": f"00-{0:032x}-{SPAN_ID:016x}-01"},
        {"traceparent": TRACEPARENT + "-" + "x" * 1000},
        {"traceparent": TRACEPARENT, "tracestate": "x" * 100_000},
    ],
)
def test_what_is_no_trace_context_is_passed_over(
    make_engine: MakeEngine,
    drain: Drain,
    headers: dict[str, str],
    collect: Collect,
) -> None:
    engine = make_engine()
    with collect(engine) as collected:
        collected.tracer.begin("r", headers)
        engine.submit(ask("r"))
        drain(engine)
    assert collected.span("r").parent is None


def test_a_caller_may_ask_for_no_trace(
    make_engine: MakeEngine,
    drain: Drain,
    collect: Collect,
) -> None:
    engine = make_engine()
    with collect(engine) as collected:
        collected.tracer.begin("r", {"traceparent": TRACEPARENT[:-1] + "0"})
        engine.submit(ask("r"))
        drain(engine)
    assert collected.spans == ()


def test_those_who_never_reach_the_engine_are_forgotten_in_time(
    make_engine: MakeEngine,
    drain: Drain,
    monkeypatch: pytest.MonkeyPatch,
    collect: Collect,
) -> None:
    monkeypatch.setattr(tracing, "_MAX_PARENTS", 3)
    engine = make_engine()
    with collect(engine) as collected:
        for index in range(5):
            collected.tracer.begin(f"r{index}", {"traceparent": TRACEPARENT})
        for index in range(5):
            engine.submit(ask(f"r{index}"))
        drain(engine)
    has_parent = [collected.span(f"r{index}").parent is not None for index in range(5)]
    assert has_parent == [False, False, True, True, True]


def test_requests_that_are_not_served(
    make_engine: MakeEngine,
    drain: Drain,
    collect: Collect,
) -> None:
    engine = make_engine(max_num_seqs=1, max_num_queued_reqs=1)
    with collect(engine) as collected:
        engine.submit(ask("served", 0))
        engine.step()
        engine.submit(ask("ab\ud800ort", 1))
        engine.submit(ask("refused", 2))
        engine.submit(ask("served", 0))
        engine.step()
        engine.abort("ab\ud800ort")
        drain(engine)
    refused = collected.span("refused")
    assert refused.attributes is not None
    assert refused.attributes["gen_ai.response.finish_reasons"] == ("rejected",)
    assert refused.attributes["error.type"] == "QueueFull"
    assert refused.status.status_code is StatusCode.ERROR
    assert "waiting" in (refused.status.description or "")
    assert "gen_ai.latency.time_to_first_token" not in refused.attributes
    aborted = collected.span("ab?ort")
    assert aborted.attributes is not None
    assert aborted.attributes["gen_ai.response.finish_reasons"] == ("abort",)
    assert aborted.status.status_code is StatusCode.UNSET
    (duplicate,) = (
        one
        for one in collected.spans
        if (one.attributes or {}).get("error.type") == "DuplicateRequest"
    )
    assert seconds(duplicate) == 0


def test_a_request_of_very_many_states_has_a_bounded_number_of_spans(
    make_engine: MakeEngine,
    drain: Drain,
    collect: Collect,
) -> None:
    engine = make_engine(max_num_seqs=1)
    with collect(engine) as collected:
        for name in ("one", "two"):
            engine.submit(ask(name, 1, 4, 100))
        for step in range(190):
            engine.set_priority("one", step % 2 * 2)
            engine.step()
        drain(engine)
    (span, children) = collected.span("two"), collected.children("two")
    assert span.attributes is not None
    num_states = span.attributes["headway.num_states"]
    assert isinstance(num_states, int) and num_states > HISTORY
    assert HISTORY // 2 < len(children) <= HISTORY
    assert children[-1].end_time == span.end_time, "the latest are there"


class Collector(HTTPServer):
    """An OTLP collector."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.received: list[tuple[str, ExportTraceServiceRequest]] = []


class Handler(BaseHTTPRequestHandler):
    """Answers like one."""

    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.received.append((self.path, ExportTraceServiceRequest.FromString(body)))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nobody reads it."""


@contextmanager
def collector() -> Iterator[Collector]:
    """A collector that runs in a thread."""
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(("path", "expected"), [("", "/v1/traces"), ("/mine/", "/mine/")])
def test_a_collector_gets_the_spans(
    make_engine: MakeEngine,
    drain: Drain,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    expected: str,
    client_of: Callable[[Engine], EngineClient],
) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "my-service")
    engine = make_engine()
    with collector() as server:
        tracer = Tracer(
            client_of(engine), f"http://127.0.0.1:{server.server_port}{path}", "story-teller"
        )
        engine.submit(ask("r"))
        drain(engine)
        tracer.close()
        tracer.close()
    ((where, message),) = server.received
    assert where == expected
    (resource,) = message.resource_spans
    attributes = {one.key: one.value.string_value for one in resource.resource.attributes}
    assert attributes["service.name"] == "my-service"
    names = [span.name for scope in resource.scope_spans for span in scope.spans]
    assert sorted(names) == ["decode", "llm_request", "prefill"]


@pytest.mark.parametrize("endpoint", ["", "localhost:4318", "grpc://localhost:4317", "http://[x"])
def test_an_endpoint_that_is_none(
    make_engine: MakeEngine,
    endpoint: str,
    client_of: Callable[[Engine], EngineClient],
) -> None:
    with pytest.raises(ConfigError, match="must be an HTTP URL"):
        Tracer(client_of(make_engine()), endpoint, "story-teller")


def test_without_the_extra(
    make_engine: MakeEngine,
    monkeypatch: pytest.MonkeyPatch,
    client_of: Callable[[Engine], EngineClient],
) -> None:
    monkeypatch.delitem(sys.modules, "headway.server.telemetry.spans")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"pip install 'headway-llm\[otel\]'"):
        Tracer(client_of(make_engine()), "http://localhost:4318", "story-teller")
