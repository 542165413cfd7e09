"""What servers, batch workers and command lines know of an engine: a protocol, and values.

The engine may run in the same process, in another one, or on another machine; its clients see no
scheduler and no live request. ``AsyncEngine`` is the engine in the same process.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from headway.core.cost_model import Coefficients
from headway.core.forecast import Forecast
from headway.core.request_table import StatusChange
from headway.core.sampling_params import SamplingParams
from headway.core.scheduler_output import SchedulerOutput
from headway.core.slo import SLO
from headway.engine.outputs import EngineOutput, RequestOutput
from headway.engine.request_info import RequestInfo
from headway.engine.tokenizer import Tokenizer
from headway.executor.base import ModelRunnerOutput

__all__ = [
    "EngineClient",
    "EngineDescription",
    "EngineListener",
    "EngineStatistics",
    "Prompt",
    "StepReport",
]

#: A text, or its tokens.
Prompt = str | Sequence[int]


@dataclass(frozen=True, slots=True)
class EngineDescription:
    """What does not change about an engine.

    Attributes:
        max_request_tokens: the longest that a request may get, in tokens.
        max_num_seqs: sequences in a step, at most.
        max_num_batched_tokens: tokens in a step, at most.
        max_num_choices: choices of a request, at most.
        scheduling_policy: its name.
        preemption_mode: how victims yield.
        slos: what classes of requests have been promised, most urgent first.
        step_limit_ms: what no step may be predicted to take; infinite = no bound.
        max_step_ms: the same without the promises; infinite = no bound.
        num_blocks: KV blocks in the pool.
        block_size: tokens in a block.
        num_swap_blocks: blocks that the swap space can hold.
        enable_prefix_caching: whether equal prefixes share blocks.
        facts: what runs, for people: label → value.
    """

    max_request_tokens: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_num_choices: int
    scheduling_policy: str
    preemption_mode: str
    slos: tuple[SLO, ...]
    step_limit_ms: float
    max_step_ms: float
    num_blocks: int
    block_size: int
    num_swap_blocks: int
    enable_prefix_caching: bool
    facts: Mapping[str, str]


class EngineStatistics(NamedTuple):
    """How an engine is doing; counts are of requests unless named otherwise.

    Attributes:
        num_running: in the latest step.
        num_waiting: that have never been in a step.
        num_paused: that sit out, with blocks in the pool.
        num_swapped: that sit out, their contents in the swap space.
        num_preempted: that sit out, their contents to be recomputed.
        num_finished: that have ended.
        num_queued_tokens: prompt tokens of those that wait.
        kv_cache_usage: share of the pool's blocks that requests hold, 0 … 1.
        swap_space_usage: share of the swap space that requests hold, 0 … 1.
        ingress_usage: share of the ring that is taken by what came since the step began, 0 … 1.
        num_ingress_refusals: commands that the ring had no room for.
        preemptions: times a request yielded, by ``PreemptionMode.value``.
        recomputed_tokens: tokens computed again, by priority.
        swap_ms_per_block: what copying a block one way takes (ms).
        forecast: what is expected of the engine's speed.
    """

    num_running: int
    num_waiting: int
    num_paused: int
    num_swapped: int
    num_preempted: int
    num_finished: int
    num_queued_tokens: int
    kv_cache_usage: float
    swap_space_usage: float
    ingress_usage: float
    num_ingress_refusals: int
    preemptions: Mapping[str, int]
    recomputed_tokens: Mapping[int, int]
    swap_ms_per_block: float
    forecast: Forecast

    @property
    def coefficients(self) -> Coefficients:
        """What the cost model has learnt (ms)."""
        return self.forecast.coefficients


class StepReport(NamedTuple):
    """A step that was done, or in which there was nothing to execute; a value.

    Attributes:
        output: what was scheduled.
        result: what the executor returned; None if there was nothing to execute.
        start: when scheduling began.
        execute_start: when the executor began.
        execute_end: when it was done.
        end: when the outputs were ready; seconds, all four.
        changes: requests that have moved since the step before, oldest change first.
        num_recomputed_tokens: of the step's tokens, those computed again.
    """

    output: SchedulerOutput
    result: ModelRunnerOutput | None
    start: float
    execute_start: float
    execute_end: float
    end: float
    changes: tuple[StatusChange, ...]
    num_recomputed_tokens: int


#: Called after every step, from the engine's thread; it must return soon. A listener that raises
#: is taken off and logged, and the engine goes on.
EngineListener = Callable[[StepReport, Sequence[EngineOutput]], None]


class EngineClient(Protocol):
    """An engine, as its clients see it; used from one event loop."""

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer; None if there is no text."""
        ...

    @property
    def description(self) -> EngineDescription:
        """What does not change."""
        ...

    @property
    def statistics(self) -> EngineStatistics:
        """The latest value that was published; to read it costs the engine nothing."""
        ...

    @property
    def is_alive(self) -> bool:
        """Whether new requests are served."""
        ...

    @property
    def failure(self) -> BaseException | None:
        """Why the engine ended, if it did so by itself."""
        ...

    def start(self) -> None:
        """Let it serve; in the event loop. Idempotent."""
        ...

    def now(self) -> float:
        """Seconds on the engine's clock."""
        ...

    def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        n: int = 1,
        priority: int = 0,
        deadline: float | None = None,
        tenant: str = "",
        cache_salt: str = "",
        cache_group: str | None = None,
        outputs: Mapping[int, Sequence[int]] | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Complete a prompt; see ``AsyncEngine.generate``."""
        ...

    async def abort(self, request_id: str, tenant: str = "") -> None:
        """End a request; its iterator yields a last output with ``finish_reason="abort"``."""
        ...

    async def set_priority(self, request_id: str, priority: int, tenant: str = "") -> None:
        """Change how urgent a request is, from the next step on.

        Raises:
            InvalidRequest: the priority is no int64.
        """
        ...

    def list_requests(
        self, limit: int | None = None, tenant: str | None = None
    ) -> list[RequestInfo]:
        """Unfinished requests, most urgent first; None = of all tenants."""
        ...

    def get_request(self, request_id: str, tenant: str = "") -> RequestInfo | None:
        """The same of one request; None if it is not unfinished."""
        ...

    def add_listener(self, listener: EngineListener) -> None:
        """Have ``listener`` called after every step."""
        ...

    async def drain(self, timeout: float | None = None) -> None:
        """Refuse new requests, and wait until the others have ended.

        Args:
            timeout: seconds after which those that are left end with ``EngineStopped``;
                None = however long it takes.
        """
        ...

    async def shutdown(self) -> None:
        """Stop; what is unfinished ends with ``EngineStopped``. Idempotent."""
        ...
