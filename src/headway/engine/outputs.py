"""What comes out of the engine: small deltas from the step, and the results users see."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from headway.core.errors import HeadwayError
from headway.core.request import Request, SamplingParams
from headway.executor.base import TokenLogprobs

__all__ = ["CompletionOutput", "EngineOutput", "RequestMetrics", "RequestOutput"]


class EngineOutput(NamedTuple):
    """What a step added to one request.

    Attributes:
        request: whose it is.
        token_ids: the new tokens.
        text: the new text, as far as it is settled (a character may be incomplete, and a stop
            text may have begun).
        finish_reason: ``stop``, ``length``, ``abort``, ``timeout`` or ``rejected`` if this is
            the last; else None.
        stop_reason: the stop text or stop token id that ended it, where the request named one.
        error: why it was refused or could not be finished.
        logprobs: parallel to ``token_ids``, if the request asks for them; else empty.
        prompt_logprobs: with the first token, if the request asks for them; see
            ``RequestOutput``.
    """

    request: Request
    token_ids: tuple[int, ...] = ()
    text: str = ""
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    error: HeadwayError | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: list[TokenLogprobs | None] | None = None


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """When things happened to a request (seconds on the engine's clock), and what it cost."""

    arrival_time: float
    first_scheduled_time: float | None
    first_token_time: float | None
    finish_time: float | None
    num_preemptions: int
    num_pauses: int
    num_cached_tokens: int
    num_recomputed_tokens: int

    @property
    def ttft(self) -> float | None:
        """Time to first token: from arrival to the end of the step that sampled it."""
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time

    @property
    def latency(self) -> float | None:
        """End-to-end: from arrival to the end."""
        return None if self.finish_time is None else self.finish_time - self.arrival_time


@dataclass(slots=True)
class CompletionOutput:
    """One generated text, as vLLM's class of this name.

    Attributes:
        index: of the completion; 0.
        text: so far.
        token_ids: so far; end and stop tokens are included, although not part of the text.
        finish_reason: ``stop``, ``length``, ``abort``, ``timeout``; None while it goes on.
        stop_reason: the stop text or token id that ended it, where the request named one.
        logprobs: parallel to ``token_ids``; None if they were not asked for.
    """

    index: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    logprobs: list[TokenLogprobs] | None = None


@dataclass(slots=True)
class RequestOutput:
    """A request and what was generated so far, as vLLM's class of this name.

    Attributes:
        request_id: as given or drawn.
        prompt: the text, or None if it came as tokens.
        prompt_token_ids: the prompt's tokens.
        outputs: one ``CompletionOutput``.
        finished: whether this is the last.
        priority: it was given.
        sampling_params: it was given, with the seed that was drawn.
        prompt_logprobs: of each prompt token, given those before it; None for the first. They
            come with the first generated token; None if they were not asked for.
        new_text: what was added since ``begin``.
        new_token_ids: the same of the tokens; text may be held back after its tokens, and tokens
            need not add text.
        new_logprobs: parallel to ``new_token_ids``, if they were asked for.
        metrics: once it is finished.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    priority: int
    sampling_params: SamplingParams
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    new_text: str = ""
    new_token_ids: list[int] = field(default_factory=list)
    new_logprobs: list[TokenLogprobs] = field(default_factory=list)
    metrics: RequestMetrics | None = None

    @classmethod
    def of(cls, request: Request) -> RequestOutput:
        """An empty output for a request that has just been submitted."""
        logprobs = request.sampling_params.logprobs
        return cls(
            request_id=request.request_id,
            prompt=request.prompt,
            prompt_token_ids=request.prompt_token_ids,
            outputs=[CompletionOutput(logprobs=None if logprobs is None else [])],
            finished=False,
            priority=request.priority,
            sampling_params=request.sampling_params,
        )

    def begin(self) -> None:
        """What was new has been read."""
        self.new_text = ""
        self.new_token_ids = []
        self.new_logprobs = []

    def extend(self, output: EngineOutput) -> None:
        """Take in what a step added."""
        completion = self.outputs[0]
        completion.text += output.text
        self.new_text += output.text
        completion.token_ids.extend(output.token_ids)
        self.new_token_ids.extend(output.token_ids)
        if completion.logprobs is not None:
            completion.logprobs.extend(output.logprobs)
            self.new_logprobs.extend(output.logprobs)
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = output.prompt_logprobs
        if output.finish_reason is not None:
            completion.finish_reason = output.finish_reason
            completion.stop_reason = output.stop_reason
            self.finished = True
            self.metrics = metrics_of(output.request)


def metrics_of(request: Request) -> RequestMetrics:
    """The metrics of a request as it stands. O(times its status changed)."""
    assert request.arrival_time is not None
    return RequestMetrics(
        arrival_time=request.arrival_time,
        first_scheduled_time=request.first_scheduled_time,
        first_token_time=request.first_token_time,
        finish_time=request.finish_time,
        num_preemptions=request.num_preemptions,
        num_pauses=sum(status.value == "paused" for _, status in request.transitions),
        num_cached_tokens=request.num_cached_tokens,
        num_recomputed_tokens=request.num_recomputed_tokens,
    )
