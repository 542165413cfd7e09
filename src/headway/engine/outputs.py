"""What comes out of the engine: small deltas from the step, and the results users see."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from headway.core.errors import HeadwayError
from headway.core.life import Phase
from headway.core.request import Request, SamplingParams
from headway.core.slo import SLO
from headway.engine.timeline import Segment, timeline
from headway.executor.base import TokenLogprobs

__all__ = [
    "CompletionOutput",
    "EngineOutput",
    "RequestMetrics",
    "RequestOutput",
    "TokenLogprobs",
]


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """When things happened to a request (seconds on the engine's clock), and what it cost.

    Attributes:
        request_id: the engine's.
        priority, tenant, slo: its own; the SLO is its class's.
        sampling_params: with the seed that was drawn.
        status: where it stands.
        arrival_time: when it arrived.
        first_scheduled_time: when it was in a step for the first time.
        first_token_time, last_token_time: when steps ended that sampled tokens of it.
        finish_time: when it ended.
        num_sequences: choices.
        num_prompt_tokens: of the prompt, which counts once.
        num_output_tokens: of all choices.
        num_cached_tokens: of the prompt, what the prefix cache had.
        num_recomputed_tokens: computed again because its blocks were taken.
        num_preemptions: how often it lost blocks.
        num_pauses: how often it sat a step out while its blocks stayed.
        phase_seconds: time spent in each phase, up to now.
        segments: the latest stretches of its life.
        num_changes: how often its status changed.
    """

    request_id: str
    priority: int
    tenant: str
    slo: SLO | None
    sampling_params: SamplingParams
    status: str
    arrival_time: float
    first_scheduled_time: float | None
    first_token_time: float | None
    last_token_time: float | None
    finish_time: float | None
    num_sequences: int
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int
    num_recomputed_tokens: int
    num_preemptions: int
    num_pauses: int
    phase_seconds: Mapping[Phase, float]
    segments: tuple[Segment, ...]
    num_changes: int

    @classmethod
    def of(cls, request: Request, last_token_time: float | None = None) -> RequestMetrics:
        """Of a request as it stands. O(the changes of status that it remembers)."""
        life = request.life
        return cls(
            request_id=request.request_id,
            priority=request.priority,
            tenant=request.tenant,
            slo=request.slo,
            sampling_params=request.sampling_params,
            status=life.status.value,
            arrival_time=0.0 if request.arrival_time is None else request.arrival_time,
            first_scheduled_time=life.first_scheduled_time,
            first_token_time=life.first_token_time,
            last_token_time=last_token_time,
            finish_time=life.finish_time,
            num_sequences=request.n,
            num_prompt_tokens=request.num_prompt_tokens,
            num_output_tokens=request.num_output_tokens,
            num_cached_tokens=request.num_cached_tokens,
            num_recomputed_tokens=request.num_recomputed_tokens,
            num_preemptions=request.num_preemptions,
            num_pauses=life.num_pauses,
            phase_seconds=dict(life.phase_seconds),
            segments=tuple(timeline(request)),
            num_changes=life.num_changes,
        )

    @property
    def max_tokens(self) -> int:
        """The most tokens that each choice may have."""
        return self.sampling_params.max_tokens

    @property
    def ttft(self) -> float | None:
        """Time to first token: from arrival to the end of the step that sampled it."""
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time

    @property
    def latency(self) -> float | None:
        """End-to-end: from arrival to the end."""
        return None if self.finish_time is None else self.finish_time - self.arrival_time


class EngineOutput(NamedTuple):
    """What a step added to one choice of a request; a value.

    Attributes:
        request_id: the engine's id of the request.
        index: of the choice.
        token_ids: the new tokens.
        text: the new text, as far as it is settled (a character may be incomplete, and a stop
            text may have begun).
        finish_reason: ``stop``, ``length``, ``abort``, ``timeout`` or ``rejected`` if this is
            the choice's last; else None.
        stop_reason: the stop text or stop token id that ended it, where the request named one.
        error: why the request was refused or could not be finished.
        logprobs: parallel to ``token_ids``, if the request asks for them; else empty.
        prompt_logprobs: with the first token, if the request asks for them; see
            ``RequestOutput``.
        metrics: of the request, with its first token and with its last output.
        is_last: all choices of the request have ended.
    """

    request_id: str
    index: int = 0  # type: ignore[assignment]  # hides tuple.index, which nothing calls
    token_ids: tuple[int, ...] = ()
    text: str = ""
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    error: HeadwayError | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    metrics: RequestMetrics | None = None
    is_last: bool = False


@dataclass(slots=True)
class CompletionOutput:
    """One generated text, as vLLM's class of this name.

    Attributes:
        index: of the choice.
        text: so far.
        token_ids: so far; end and stop tokens are included, although not part of the text.
        finish_reason: ``stop``, ``length``, ``abort``, ``timeout``, ``rejected``; None while it
            goes on.
        stop_reason: the stop text or token id that ended it, where the request named one.
        logprobs: parallel to ``token_ids``; None if they were not asked for.
        new_text: what was added since ``RequestOutput.begin``.
        new_token_ids: the same of the tokens; text may be held back after its tokens, and tokens
            need not add text.
        new_logprobs: parallel to ``new_token_ids``, if they were asked for.
    """

    index: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    logprobs: list[TokenLogprobs] | None = None
    new_text: str = ""
    new_token_ids: list[int] = field(default_factory=list)
    new_logprobs: list[TokenLogprobs] = field(default_factory=list)

    def _begin(self) -> None:
        self.new_text = ""
        self.new_token_ids = []
        self.new_logprobs = []

    def _extend(self, output: EngineOutput) -> None:
        self.text += output.text
        self.new_text += output.text
        self.token_ids.extend(output.token_ids)
        self.new_token_ids.extend(output.token_ids)
        if self.logprobs is not None:
            self.logprobs.extend(output.logprobs)
            self.new_logprobs.extend(output.logprobs)
        if output.finish_reason is not None and self.finish_reason is None:
            self.finish_reason = output.finish_reason
            self.stop_reason = output.stop_reason


@dataclass(slots=True)
class RequestOutput:
    """A request and what was generated so far, as vLLM's class of this name.

    Attributes:
        request_id: as given or drawn.
        prompt: the text, or None if it came as tokens.
        prompt_token_ids: the prompt's tokens.
        outputs: a ``CompletionOutput`` for each choice.
        finished: whether this is the last.
        priority: it was given.
        sampling_params: it was given; with the seed that was drawn, once there is a token.
        prompt_logprobs: of each prompt token, given those before it; None for the first. They
            come with the first generated token; None if they were not asked for.
        changed: indices of the choices that have something new since ``begin``.
        metrics: with the first token, and once it is finished.
        error: why it was refused or could not be finished; what was generated before is there.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    priority: int
    sampling_params: SamplingParams
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    changed: list[int] = field(default_factory=list)
    metrics: RequestMetrics | None = None
    error: HeadwayError | None = None

    @classmethod
    def of(cls, request: Request, request_id: str | None = None) -> RequestOutput:
        """An empty output for a request that has just been submitted."""
        with_logprobs = request.sampling_params.logprobs is not None
        return cls(
            request_id=request.request_id if request_id is None else request_id,
            prompt=request.prompt,
            prompt_token_ids=request.prompt_token_ids,
            outputs=[
                CompletionOutput(index, logprobs=[] if with_logprobs else None)
                for index in range(request.n)
            ],
            finished=False,
            priority=request.priority,
            sampling_params=request.sampling_params,
        )

    @property
    def new_text(self) -> str:
        """The first choice's new text."""
        return self.outputs[0].new_text

    @property
    def new_token_ids(self) -> list[int]:
        """The first choice's new tokens."""
        return self.outputs[0].new_token_ids

    @property
    def new_logprobs(self) -> list[TokenLogprobs]:
        """Parallel to ``new_token_ids``, if they were asked for."""
        return self.outputs[0].new_logprobs

    @property
    def num_cached_tokens(self) -> int:
        """Of the prompt, what the prefix cache had; known with the first token."""
        return 0 if self.metrics is None else self.metrics.num_cached_tokens

    def begin(self) -> None:
        """What was new has been read."""
        for index in self.changed:
            self.outputs[index]._begin()
        self.changed = []

    def extend(self, output: EngineOutput) -> None:
        """Take in what a step added."""
        if output.index not in self.changed:
            self.changed.append(output.index)
        self.outputs[output.index]._extend(output)
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = output.prompt_logprobs
        if output.metrics is not None:
            self.metrics = output.metrics
            self.sampling_params = output.metrics.sampling_params
        if output.error is not None:
            self.error = output.error
        self.finished = output.is_last
