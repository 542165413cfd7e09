"""Traces: what became of each request, for OpenTelemetry; needs the extra ``otel``.

A request becomes a span when it ends, from the record of its states that its last output carries;
nothing is done while it runs. Making spans takes longer than a step should wait, so a thread of its
own does it.
"""

from __future__ import annotations

import importlib
import logging
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Final, NamedTuple

from headway.core.errors import ConfigError
from headway.engine.client import EngineClient, StepReport
from headway.engine.outputs import EngineOutput

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

__all__ = ["Tracer", "check_endpoint"]

_LOGGER: Final = logging.getLogger(__name__)

#: W3C's headers of a trace's context (https://www.w3.org/TR/trace-context/).
_HEADERS: Final = ("traceparent", "tracestate")
#: What a header may at most be; the standard asks for no more.
_MAX_HEADER: Final = 512
#: Requests whose parents are remembered. Those that never reach the engine do not end there: they
#: are forgotten when as many others have come.
_MAX_PARENTS: Final = 16_384


class _Ended(NamedTuple):
    #: The last of its request.
    output: EngineOutput
    parent: Mapping[str, str]
    #: What the engine's clock counts from, in nanoseconds since 1970.
    origin: int


class Tracer:
    """Sends a span for every request that ends, with a child for each of its states.

    Args:
        engine: to listen to, from now on.
        endpoint: of an OTLP collector (HTTP), as ``http://localhost:4318``; or an exporter.
        model_name: that requests ask for.

    Raises:
        ConfigError: the extra is not installed, or the endpoint is no HTTP URL.
    """

    def __init__(self, engine: EngineClient, endpoint: str | SpanExporter, model_name: str) -> None:
        self._now = engine.now
        self._writer = _spans().SpanWriter(endpoint, model_name)
        #: Trace headers of requests that have not ended, by id, oldest first.
        self._parents: dict[str, Mapping[str, str]] = {}
        #: Requests begin and end in different threads.
        self._lock = threading.Lock()
        #: None ends the thread.
        self._ended: queue.SimpleQueue[_Ended | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="headway-tracing", daemon=True)
        self._thread.start()
        engine.add_listener(self._on_step)

    def begin(self, request_id: str, headers: Mapping[str, str]) -> None:
        """Remember which trace a request belongs to; call it before the engine has the request.

        Args:
            request_id: the engine's.
            headers: of the HTTP request, by lower-case name; W3C's are looked at.
        """
        parent = {name: headers[name] for name in _HEADERS if name in headers}
        if "traceparent" not in parent or max(map(len, parent.values())) > _MAX_HEADER:
            return
        with self._lock:
            self._parents[request_id] = parent
            if len(self._parents) > _MAX_PARENTS:
                del self._parents[next(iter(self._parents))]

    def close(self) -> None:
        """Send what there is, and stop; after the engine. Idempotent.

        Waits for the collector, half a minute at most if it does not answer.
        """
        self._ended.put(None)
        self._thread.join()
        self._writer.close()

    def _on_step(self, _: StepReport, outputs: Sequence[EngineOutput]) -> None:
        ended = [output for output in outputs if output.is_last]
        if not ended:
            return
        origin = time.time_ns() - round(self._now() * 1e9)
        for output in ended:
            with self._lock:
                parent = self._parents.pop(output.request_id, {})
            self._ended.put(_Ended(output, parent, origin))

    def _run(self) -> None:
        while (ended := self._ended.get()) is not None:
            try:
                self._writer.write(*ended)
            except Exception:  # a span less is better than none from here on
                _LOGGER.exception("request %r has no span", ended.output.request_id)


def check_endpoint(endpoint: str) -> None:
    """Refuse what a ``Tracer`` would refuse, before there is an engine.

    Raises:
        ConfigError: the extra is not installed, or the endpoint is no HTTP URL.
    """
    _spans().traces_url(endpoint)


def _spans() -> ModuleType:
    try:
        return importlib.import_module("headway.server.telemetry.spans")
    except ModuleNotFoundError as error:
        raise ConfigError(f"tracing needs {error.name}: pip install 'headway-llm[otel]'") from error
