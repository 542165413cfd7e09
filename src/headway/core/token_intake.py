"""What a computed step changes: progress, new tokens, forks of a group, and ends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Seq

from headway.core.errors import InternalError
from headway.core.kv_cache_manager import KVCacheManager
from headway.core.life import RequestStatus
from headway.core.request import Request
from headway.core.request_table import RequestTable
from headway.core.sequence import Sequence
from headway.core.step_rows import StepRows

__all__ = ["TokenIntake"]


class TokenIntake:
    """Takes in what the executor computed.

    Args:
        kv_cache: makes full blocks findable, and has the blocks of sequences that end.
        table: requests that end leave it.
        serve: told how many tokens were computed for a request, for policies that want to know.
    """

    def __init__(
        self,
        kv_cache: KVCacheManager,
        table: RequestTable,
        serve: Callable[[Request, int], None] | None = None,
    ) -> None:
        self._serve = serve
        self._kv_cache = kv_cache
        self._table = table
        #: Tokens computed again after their blocks had been taken, by priority.
        self.recomputed_tokens: Counter[int] = Counter()
        #: Their sum.
        self.num_recomputed_tokens = 0

    def take_step(self, rows: StepRows, tokens: Seq[tuple[int, ...]], now: float) -> list[Request]:
        """Take in a whole step; returns the requests that this finished.

        Args:
            rows: of the step. Those of requests that no longer run are passed over.
            tokens: parallel to them, as in ``ModelRunnerOutput``.
            now: seconds.
        """
        finished = []
        served = Counter[Request]()
        if self._serve is not None:
            for sequence in rows.sequences:
                served[sequence.request] += sequence.num_scheduled_tokens
        for sequence, sampled in zip(rows.sequences, tokens, strict=True):
            quiet_until = sequence.quiet_until
            if quiet_until and len(sampled) == 1:
                (token_id,) = sequence.last_token_ids = sampled
                computed = sequence.num_computed_tokens = sequence.num_computed_tokens + 1
                sequence.token_ids.append(token_id)
                if computed < quiet_until and token_id not in sequence.stop_token_ids:
                    continue
                if computed >= sequence.commit_at:
                    self._kv_cache.commit(sequence)
                sequence.stay_quiet()
                self._end_if_due(sequence, now)
            elif sequence.is_running:
                self.take(sequence, sequence.num_scheduled_tokens, sampled, now)
            else:  # it was stopped, aborted or preempted while the step ran
                continue
            if not sequence.request.live:
                finished.append(sequence.request)
        for request, num_tokens in served.items():
            assert self._serve is not None
            self._serve(request, num_tokens)
        return finished

    def take(self, sequence: Sequence, count: int, sampled: tuple[int, ...], now: float) -> None:
        """A sequence has computed ``count`` tokens, and ``sampled`` follow its last one.

        Args:
            sequence: unfinished, of a running request.
            count: tokens of its row, drafts included.
            sampled: as in ``ModelRunnerOutput.tokens``.
            now: seconds.

        Raises:
            InternalError: the executor says of drafts what they are not, or gives a group another
                number of first tokens than it has choices.
        """
        computed = sequence.num_computed_tokens
        if computed < sequence.peak_computed_tokens:
            self._count_recomputed(sequence, count)
        token_ids = sequence.token_ids
        computed = sequence.num_computed_tokens = min(computed + count, len(token_ids))
        if computed >= sequence.commit_at:
            self._kv_cache.commit(sequence)
        if not sampled:
            assert computed < len(token_ids), "a token is due, and none was sampled"
            return
        assert computed == len(token_ids), "a token was sampled before its time"
        request = sequence.request
        if request.life.first_token_time is None:
            request.life.first_token_time = now
        if len(request.sequences) < request.n:
            self._fork(sequence, sampled, now)
        elif len(sampled) == 1 and not sequence.drafts_in_flight:
            token_ids.append(sampled[0])
            sequence.draft_token_ids = ()  # proposed, if at all, before this token was known
            sequence.settle()
            self._end_if_due(sequence, now)
        else:
            self._take_drafts(sequence, sampled, now)

    def end(self, sequence: Sequence, status: RequestStatus, now: float) -> None:
        """End a sequence, and with the last one its request; what it held is free at once."""
        request = sequence.request
        sequence.finish_status = status
        sequence.quiet_until = 0
        self._kv_cache.free(sequence)
        if len(request.live) == 1:
            self._table.move(request, status, now)
        request.drop(sequence)
        if request.live and not request.holds_blocks:
            outside = request.status_outside
            if request.status not in (outside, RequestStatus.WAITING):
                self._table.move(request, outside, now)

    def _fork(self, leader: Sequence, sampled: tuple[int, ...], now: float) -> None:
        """The prompt of a group has been computed: each choice goes on with its first token."""
        request = leader.request
        if len(sampled) != request.n:
            raise InternalError(
                f"request {request.request_id!r} was given the first tokens {sampled}, must be one "
                f"for each of {request.n} choices"
            )
        leader.token_ids.append(sampled[0])
        forks = [leader]
        for token_id in sampled[1:]:
            child = request.fork(token_id)
            self._kv_cache.fork(leader, child)
            forks.append(child)
        for sequence in forks:
            self._end_if_due(sequence, now)

    def _take_drafts(self, sequence: Sequence, sampled: tuple[int, ...], now: float) -> None:
        """Accept the drafts that were sampled, and the token after the last of them."""
        drafts, sequence.drafts_in_flight = sequence.drafts_in_flight, ()
        num_accepted = len(sampled) - 1
        if sampled[:-1] != drafts[:num_accepted]:
            raise InternalError(
                f"request {sequence.request.request_id!r} was given the tokens {sampled} for the "
                f"drafts {drafts}, all but the last must be drafts"
            )
        sequence.draft_token_ids = ()  # proposed before these tokens were known
        for place, token_id in enumerate(sampled):
            sequence.token_ids.append(token_id)
            # The keys and values of accepted drafts are in the pool; other drafts left garbage.
            sequence.num_computed_tokens += place < num_accepted
            self._end_if_due(sequence, now)
            if sequence.finish_status is not None:
                return
        if sequence.num_computed_tokens >= sequence.commit_at:
            self._kv_cache.commit(sequence)

    def _end_if_due(self, sequence: Sequence, now: float) -> None:
        """End a sequence whose last token is an end token, or that is as long as it may get."""
        request, token_ids = sequence.request, sequence.token_ids
        if (
            token_ids[-1] in request.stop_token_ids
            and sequence.num_output_tokens >= request.sampling_params.min_tokens
        ):
            self.end(sequence, RequestStatus.FINISHED_STOPPED, now)
        elif len(token_ids) >= request.token_limit:
            self.end(sequence, RequestStatus.FINISHED_LENGTH_CAPPED, now)

    def _count_recomputed(self, sequence: Sequence, count: int) -> None:
        again = min(count, sequence.peak_computed_tokens - sequence.num_computed_tokens)
        sequence.request.num_recomputed_tokens += again
        self.num_recomputed_tokens += again
        self.recomputed_tokens[sequence.request.priority] += again
