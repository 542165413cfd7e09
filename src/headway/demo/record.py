"""What is known of one request of a run, from what the engine has told of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from headway.core.life import RequestStatus
from headway.demo.load import Arrival
from headway.engine.outputs import EngineOutput, RequestMetrics

__all__ = ["RequestRecord"]


@dataclass(slots=True, eq=False)
class RequestRecord:
    """A request of the load and its progress.

    Attributes:
        arrival: what was asked.
        arrival_time: when the request arrived, in seconds on the engine's clock.
        status: where the request stands.
        token_ids: generated so far.
        text: generated so far.
        finish_reason: why the output ended; None while it goes on.
        metrics: as of the first token, then as of the end; None before.
    """

    arrival: Arrival
    arrival_time: float
    status: RequestStatus = RequestStatus.WAITING
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    metrics: RequestMetrics | None = None

    @property
    def request_id(self) -> str:
        """The request's id."""
        return self.arrival.request_id

    @property
    def priority(self) -> int:
        """Smaller is more urgent."""
        return self.arrival.priority

    @property
    def is_served(self) -> bool:
        """Whether the request got all that it asked for."""
        return self.finish_reason in ("stop", "length")

    @property
    def first_token_time(self) -> float | None:
        """When the step ended that sampled the first token."""
        return None if self.metrics is None else self.metrics.first_token_time

    @property
    def finish_time(self) -> float | None:
        """When the request ended."""
        return None if self.metrics is None else self.metrics.finish_time

    def extend(self, output: EngineOutput) -> None:
        """Take in what a step has added."""
        self.token_ids += output.token_ids
        self.text += output.text
        self.metrics = output.metrics or self.metrics
        if output.is_last:
            self.finish_reason = output.finish_reason
