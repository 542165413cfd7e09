"""An unfinished request on the engine's side: the text of its choices, and what was told of it."""

from __future__ import annotations

from collections.abc import Iterator

from headway.core.errors import HeadwayError
from headway.core.life import RequestStatus
from headway.core.request import Request
from headway.core.scheduler import PriorityScheduler
from headway.engine.output_processor import OutputProcessor
from headway.engine.outputs import EngineOutput, RequestMetrics
from headway.engine.tokenizer import Tokenizer
from headway.executor.base import PromptLogprobs, TokenLogprobs

__all__ = ["RequestState", "reject"]


class RequestState:
    """Turns what the scheduler knows of a request into what its reader is told.

    Args:
        request: has just been added to the scheduler.
        tokenizer: None makes no text of tokens.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer | None) -> None:
        self.request = request
        params = request.sampling_params
        #: For each choice, how its text goes on.
        self._processors = [OutputProcessor(params, tokenizer) for _ in range(request.n)]
        #: For each choice, how many of its tokens have been told.
        self._num_told = [0] * request.n
        #: Choices whose end has been told.
        self._ended: set[int] = set()
        #: Choices that came with a whole stop text, and that text.
        self._complete: dict[int, str] = {}
        self._last_token_time: float | None = None
        #: Whether the prompt's log-probabilities are this engine's to tell: of a request that has
        #: begun elsewhere, they were told with the first token, and each of its choices computes
        #: the prompt again.
        self._rates_prompt = request.awaits_first_token
        for sequence in request.sequences:
            if sequence.is_finished:
                self._ended.add(sequence.index)
            elif sequence.num_output_tokens:
                index = sequence.index
                self._processors[index], settled = OutputProcessor.resumed(
                    params, tokenizer, sequence.output_token_ids
                )
                self._num_told[index] = sequence.num_output_tokens
                if settled.stop is not None:
                    self._complete[index] = settled.stop

    def end_complete(self, scheduler: PriorityScheduler, now: float) -> Iterator[EngineOutput]:
        """End the choices of a resumed request that came with a whole stop text."""
        for index, stop in self._complete.items():
            scheduler.stop_sequence(self.request.request_id, index, now)
            self._ended.add(index)
            is_last = len(self._ended) == self.request.n
            yield EngineOutput(
                self.request.request_id,
                index,
                finish_reason="stop",
                stop_reason=stop,
                metrics=self.metrics() if is_last else None,
                is_last=is_last,
            )

    def rate_prompt(self, rated: PromptLogprobs) -> None:
        """Add the ratings of a stretch of the prompt, which follows the stretch before."""
        if self._rates_prompt:
            self._processors[0].rate_prompt(rated)

    def advance(
        self,
        index: int,
        logprobs: tuple[TokenLogprobs, ...],
        scheduler: PriorityScheduler,
        now: float,
    ) -> EngineOutput:
        """What a step has added to a choice; a stop text in it ends the choice.

        Args:
            index: of the choice, which has got at least one token.
            logprobs: of the tokens that it got, or none.
            scheduler: where it ends then.
            now: when the step ended (seconds).
        """
        request, processor = self.request, self._processors[index]
        sequence = request.sequences[index]
        is_first = self._last_token_time is None
        self._last_token_time = now
        first_new = request.num_prompt_tokens + self._num_told[index]
        token_ids = tuple(sequence.token_ids[first_new:])
        status = sequence.finish_status
        text, stop_reason = self._settle(index, token_ids, status)
        if isinstance(stop_reason, str) and status is None:
            scheduler.stop_sequence(request.request_id, index, now)
        finish_reason = None if status is None else status.finish_reason
        if stop_reason is not None:
            finish_reason = "stop"
        self._num_told[index] += len(token_ids)
        if finish_reason is not None:
            self._ended.add(index)
        is_last = len(self._ended) == request.n
        return EngineOutput(
            request.request_id,
            index,
            token_ids,
            text,
            finish_reason,
            stop_reason,
            logprobs=logprobs[: len(token_ids)],
            # The first choice has them, whose first token comes before those of the others.
            prompt_logprobs=processor.take_prompt_logprobs() if index == 0 else None,
            metrics=self.metrics() if is_first or is_last else None,
            is_last=is_last,
        )

    def end(self, reason: str | None, error: HeadwayError | None = None) -> Iterator[EngineOutput]:
        """The request has been ended, from outside or by an error: what is said of each choice."""
        left = [index for index in range(self.request.n) if index not in self._ended]
        for index in left:
            is_last = index == left[-1]
            yield EngineOutput(
                self.request.request_id,
                index,
                text=self._processors[index].flush().text,
                finish_reason=reason,
                error=error if is_last else None,
                metrics=self.metrics() if is_last else None,
                is_last=is_last,
            )

    def metrics(self) -> RequestMetrics:
        """Of the request as it stands."""
        return RequestMetrics.of(self.request, self._last_token_time)

    def _settle(
        self, index: int, token_ids: tuple[int, ...], status: RequestStatus | None
    ) -> tuple[str, str | int | None]:
        """The new tokens' text; and the stop text or stop token that ended it, if one did."""
        processor, params = self._processors[index], self.request.sampling_params
        pieces = []
        is_stopped = status is RequestStatus.FINISHED_STOPPED
        for token_id in token_ids[:-1] if is_stopped else token_ids:
            text, stop = processor.append(token_id)
            pieces.append(text)
            if stop is not None:
                return "".join(pieces), stop
        stop_reason: str | int | None = None
        if is_stopped:  # the end token is not part of the text
            pieces.append(processor.flush().text)
            if token_ids[-1] in params.stop_token_ids:
                stop_reason = token_ids[-1]
        elif status is not None:
            text, stop_reason = processor.flush()
            pieces.append(text)
        return "".join(pieces), stop_reason


def reject(request: Request, error: HeadwayError) -> Iterator[EngineOutput]:
    """What is said of a request that the scheduler does not take."""
    for index in range(request.n):
        is_last = index == request.n - 1
        yield EngineOutput(
            request.request_id,
            index,
            finish_reason="rejected",
            error=error if is_last else None,
            metrics=RequestMetrics.of(request) if is_last else None,
            is_last=is_last,
        )
