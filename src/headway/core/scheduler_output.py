"""What ``PriorityScheduler.schedule`` decided: the one message from scheduler to executor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, overload

from headway.core.config import PreemptionMode
from headway.core.cost_model import StepFeatures
from headway.core.request import Request

__all__ = ["Preemption", "SchedulerOutput"]


class Preemption(NamedTuple):
    """One request that had to yield.

    Attributes:
        request_id: who yields.
        mode: PAUSE, TAIL (keeps a prefix, recomputes the rest), SWAP (in whole or its tail) or
            RECOMPUTE.
        beneficiary_id: for whom; None if no single request is the cause (a pause), or the
            caller asked for it.
        num_blocks: blocks that left its table.
        num_tokens: computed tokens that left the pool.
    """

    request_id: str
    mode: PreemptionMode
    beneficiary_id: str | None = None
    num_blocks: int = 0
    num_tokens: int = 0


class SchedulerOutput(Sequence[Request]):
    """The requests of one step, most urgent first, and what else the step has to do.

    The executor reads the requests themselves for tokens and block tables, so it must run before
    any of them is aborted or preempted. No output may be dropped: block operations are told once.
    It is falsy when no request is scheduled; ``is_empty`` asks for block operations, too. The block
    operations come before the forward pass, in this order: ``swap_out``, ``block_copies``,
    ``swap_in``; a block that one of them reads may be written by a later one or by the pass.
    """

    __slots__ = (
        "block_copies",
        "features",
        "num_batched_tokens",
        "num_scheduled_tokens",
        "predicted_ms",
        "preemptions",
        "requests",
        "swap_in",
        "swap_out",
    )

    def __init__(self) -> None:
        self.requests: list[Request] = []
        #: Parallel to ``requests``: how many tokens of it, from ``num_computed_tokens`` on.
        self.num_scheduled_tokens: list[int] = []
        #: Their sum.
        self.num_batched_tokens = 0
        #: (pool block, swap slot) to copy out.
        self.swap_out: list[tuple[int, int]] = []
        #: (source, destination) pool blocks to copy.
        self.block_copies: list[tuple[int, int]] = []
        #: (swap slot, pool block) to copy in.
        self.swap_in: list[tuple[int, int]] = []
        #: Who yielded in this step, in order of the decisions.
        self.preemptions: list[Preemption] = []
        #: What the step's time is predicted from.
        self.features = StepFeatures(0, 0, 0)
        #: What the cost model expects it to take.
        self.predicted_ms = 0.0

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing for the executor to do."""
        return not (self.requests or self.swap_out or self.block_copies or self.swap_in)

    @property
    def num_swapped_blocks(self) -> int:
        """Blocks copied between pool and swap space."""
        return len(self.swap_out) + len(self.swap_in)

    @overload
    def __getitem__(self, index: int) -> Request: ...
    @overload
    def __getitem__(self, index: slice) -> list[Request]: ...
    def __getitem__(self, index: int | slice) -> Request | list[Request]:
        return self.requests[index]

    def __len__(self) -> int:
        return len(self.requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self.requests)

    def __repr__(self) -> str:
        scheduled = ", ".join(
            f"{request.request_id}:{count}"
            for request, count in zip(self.requests, self.num_scheduled_tokens, strict=True)
        )
        return f"SchedulerOutput([{scheduled}], preemptions={self.preemptions})"
