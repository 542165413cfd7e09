"""A sequence: one line of tokens with a block table. A request has as many as it has choices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from headway.core.block_manager import TableId
from headway.core.scheduler_output import RowFacts

if TYPE_CHECKING:
    from headway.core.request import Request, RequestStatus

__all__ = ["Sequence"]

_NONE: Final[tuple[int, ...]] = ()


class Sequence:
    """The tokens of one choice of a request, and where their keys and values are.

    Its computed tokens are the first ``num_computed_tokens``, in the pool; and, if it has a swap
    table, those that follow, up to ``num_swapped_tokens``, in the swap space. The scheduler owns
    every attribute; others read.

    Args:
        request: whose choice it is.
        index: of the choice, from 0.
        token_ids: the prompt's tokens, then the generated ones; the sequence keeps the list.
    """

    __slots__ = (
        "block_hashes",
        "block_table",
        "capacity",
        "commit_at",
        "draft_token_ids",
        "drafts_in_flight",
        "facts",
        "finish_status",
        "index",
        "last_token_ids",
        "num_computed_tokens",
        "num_logit_rows",
        "num_prompt_tokens",
        "num_scheduled_tokens",
        "num_swapped_tokens",
        "peak_computed_tokens",
        "quiet_until",
        "request",
        "sequence_id",
        "stop_token_ids",
        "swap_table",
        "token_ids",
    )

    def __init__(self, request: Request, index: int, token_ids: list[int]) -> None:
        self.request = request
        self.index = index
        #: What its block table goes by.
        self.sequence_id: TableId = (request.request_id, index) if index else request.request_id
        #: The prompt's tokens, then the generated ones.
        self.token_ids = token_ids
        #: The last of ``token_ids`` alone, once it is a generated one.
        self.last_token_ids = _NONE
        #: Of ``token_ids``, the prompt's.
        self.num_prompt_tokens: int = request.num_prompt_tokens
        #: What all rows of it have in common, and the tokens that end it; settled when the request
        #: is added to a scheduler.
        self.facts: RowFacts
        self.stop_token_ids: frozenset[int] = request.sampling_params.stop_token_ids
        #: Rows of logits that are read for each token of it.
        self.num_logit_rows = 0
        #: Proposed tokens after the last known one, to be checked in the next step.
        self.draft_token_ids = _NONE
        #: The drafts of its row in the step that was scheduled last.
        self.drafts_in_flight = _NONE
        #: How it has ended; None while it goes on.
        self.finish_status: RequestStatus | None = None

        #: Tokens whose keys and values are in the pool: 0 ≤ it < num_tokens.
        self.num_computed_tokens = 0
        #: Tokens of its row in the step that was scheduled last, drafts included.
        self.num_scheduled_tokens = 0
        #: The most that ``num_computed_tokens`` ever was; computing below it is recomputing.
        self.peak_computed_tokens = 0
        #: Pool blocks in order of position; replaced, never changed, so that a step may keep it.
        self.block_table = _NONE
        #: Tokens that may be written into ``block_table`` without asking for a block.
        self.capacity = 0
        #: Chained hashes of the full blocks of ``token_ids``, as far as computed.
        self.block_hashes: list[bytes] = []
        #: ``num_computed_tokens`` from which on another full block is to be made findable.
        self.commit_at = 0
        #: Up to so many computed tokens, a step is one token like any other: the request runs, the
        #: sequence decodes a plain next token into a block that it has, and no block is full and
        #: no limit reached after it. The sequence is quiet then; 0 = look at everything.
        self.quiet_until = 0
        #: Swap slots of the blocks that follow ``block_table``, in order of position.
        self.swap_table = _NONE
        #: ``num_computed_tokens`` once ``swap_table`` is back in the pool.
        self.num_swapped_tokens = 0

    @property
    def num_tokens(self) -> int:
        """Prompt and generated tokens so far."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Generated tokens so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        """The generated tokens, a copy."""
        return self.token_ids[self.num_prompt_tokens :]

    def settle(self) -> None:
        """Set ``quiet_until`` from everything else, once a token has been taken in."""
        request, computed = self.request, self.num_computed_tokens
        num_tokens = len(self.token_ids)
        is_quiet = (
            request.is_plain
            and computed + 1 == num_tokens > self.num_prompt_tokens
            and computed >= self.peak_computed_tokens
            and not self.draft_token_ids
        )
        self.last_token_ids = (self.token_ids[-1],)
        self.num_scheduled_tokens = 1
        if is_quiet:
            self.stay_quiet()
        else:
            self.quiet_until = 0

    def stay_quiet(self) -> None:
        """Set ``quiet_until`` of a quiet sequence that has filled a block or got another."""
        self.quiet_until = min(self.commit_at, self.capacity, self.request.token_limit - 1)

    @property
    def lacks_blocks(self) -> bool:
        """Whether a known token or a draft has no block that it may be written into."""
        return len(self.token_ids) + len(self.draft_token_ids) > self.capacity

    @property
    def is_running(self) -> bool:
        """Whether it is unfinished, and its request in the step that was scheduled last."""
        return self.finish_status is None and self.request.is_running

    @property
    def is_finished(self) -> bool:
        """Whether the choice is complete."""
        return self.finish_status is not None

    def __repr__(self) -> str:
        return (
            f"Sequence({self.request.request_id!r}, {self.index}, "
            f"tokens={self.num_prompt_tokens}+{self.num_output_tokens}, "
            f"computed={self.num_computed_tokens})"
        )
