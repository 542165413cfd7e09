"""Offline use, in vLLM's shape: ``LLM(model=…).generate(prompts, …)``."""

from __future__ import annotations

import itertools
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from headway.core.errors import InvalidRequest, QueueFull, UnsupportedModel
from headway.core.request import Request, SamplingParams
from headway.engine.chat_template import ChatTemplate
from headway.engine.client import Prompt
from headway.engine.config import EngineConfig
from headway.engine.config import Progress as StartProgress
from headway.engine.engine import Engine
from headway.engine.outputs import RequestOutput
from headway.engine.tokenizer import Tokenizer

__all__ = ["LLM", "Prompt", "tokenize_prompt"]


class LLM:
    """A model and its engine, for batch use from one thread.

    Args:
        model: a known name or the path of a ``.gguf`` file.
        progress: told of the stages of starting up.
        settings: of ``EngineConfig``.

    Raises:
        ModelError, ConfigError: as ``EngineConfig.build``.

    ::

        llm = LLM(scheduling_policy="priority")
        outputs = llm.generate(["Hello", "Urgent!"], SamplingParams(max_tokens=32), priority=[1, 0])
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        progress: StartProgress | None = None,
        **settings: Any,
    ) -> None:
        if model is not None:
            settings["model"] = model
        #: The engine; step it yourself only while ``generate`` does not run.
        self.engine: Engine = EngineConfig(**settings).build(progress)
        #: The model's chat template, once a conversation has needed it.
        self._chat_template: ChatTemplate | None = None
        self._ids = itertools.count()

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        assert self.engine.tokenizer is not None
        return self.engine.tokenizer

    def generate(
        self,
        prompts: str | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        n: int = 1,
        priority: int | Sequence[int] = 0,
        use_tqdm: bool | None = None,
    ) -> list[RequestOutput]:
        """Complete the prompts; results in the order of the prompts.

        Args:
            prompts: one text, or a sequence of texts and token lists.
            sampling_params: for all, or one for each prompt.
            n: choices for each prompt, which is computed once.
            priority: for all, or one for each prompt; smaller is served first.
            use_tqdm: a progress bar on standard error; None = if that is a terminal. (vLLM's
                name; the bar is rich's.)

        A request that fails or is turned away does not cost the others their results: its own has
        the ``error``, and what was generated before.

        Raises:
            InvalidRequest: a prompt or parameter is out of range; nothing was generated.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        params = _spread("sampling_params", sampling_params or SamplingParams(), len(prompts))
        priorities = _spread("priority", priority, len(prompts))
        requests = [
            Request(
                f"llm-{next(self._ids)}",
                own_priority,
                prompt,
                prompt_token_ids=tokenize_prompt(self.tokenizer, prompt),
                sampling_params=own_params,
                n=n,
            )
            for prompt, own_params, own_priority in zip(prompts, params, priorities, strict=True)
        ]
        for request in requests:
            self.engine.check(request)
        return self._run(requests, use_tqdm)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        n: int = 1,
        priority: int | Sequence[int] = 0,
        use_tqdm: bool | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several, through the model's chat template.

        Raises:
            UnsupportedModel: the model has no chat template.
            InvalidRequest: as ``generate``, or the template refuses the messages.
        """
        conversations: list[Any] = list(messages)
        if conversations and isinstance(conversations[0], Mapping):
            conversations = [conversations]
        prompts = [self.render_chat(conversation) for conversation in conversations]
        return self.generate(prompts, sampling_params, n=n, priority=priority, use_tqdm=use_tqdm)

    def render_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The tokens of a conversation, ready for the assistant's turn.

        Raises:
            UnsupportedModel: the model has no chat template.
            InvalidRequest: the template refuses the messages.
        """
        tokenizer = self.tokenizer
        if self._chat_template is None:
            if tokenizer.chat_template is None:
                raise UnsupportedModel("the model's file has no chat template; use generate")
            self._chat_template = ChatTemplate(
                tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token
            )
        text = self._chat_template.render(messages)
        return tokenizer.encode(text, add_special_tokens=False)

    def close(self) -> None:
        """Release the model."""
        self.engine.close()

    def _run(self, requests: list[Request], use_bar: bool | None) -> list[RequestOutput]:
        results: dict[str, RequestOutput] = {}
        console = Console(stderr=True)
        bar = Progress(
            TextColumn("generating"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:.0f} tokens/s"),
            TimeElapsedColumn(),
            console=console,
            disable=not (console.is_terminal if use_bar is None else use_bar),
            transient=True,
        )
        feed = _Feed(self.engine, requests)
        num_left, num_tokens, begin = len(requests), 0, self.engine.clock()
        with bar, _interrupts_between_steps() as check_interrupt:
            task = bar.add_task("", total=len(requests), rate=0.0)
            try:
                while num_left:
                    check_interrupt()
                    for request in feed.submit():
                        results[request.request_id] = RequestOutput.of(request)
                    for output in self.engine.step():
                        result = results.get(output.request_id)
                        if result is None:
                            continue  # of a request that was submitted to the engine itself
                        feed.has_left(output.request_id)
                        result.extend(output)
                        num_tokens += len(output.token_ids)
                        num_left -= output.is_last
                    elapsed = max(self.engine.clock() - begin, 1e-9)
                    bar.update(task, completed=len(requests) - num_left, rate=num_tokens / elapsed)
            except BaseException:
                self.engine.abort_all()  # Ctrl-C, too, must leave an engine that can be used
                raise
        return list(results.values())


class _Feed:
    """Submits requests in their order, no faster than the engine's queue takes them.

    A request counts as queued until something comes out of it. Of one that is too large for the
    queue, the engine decides.
    """

    def __init__(self, engine: Engine, requests: Sequence[Request]) -> None:
        self._engine = engine
        self._upcoming = deque(requests)
        #: Prompt tokens of the requests that are in the queue, as far as is known here, by id.
        self._queued: dict[str, int] = {}
        #: Their sum.
        self._num_queued_tokens = 0

    def submit(self) -> Iterator[Request]:
        """Submit as many as there is room for."""
        while self._upcoming and self._has_room(self._upcoming[0]):
            request = self._upcoming[0]
            try:
                self._engine.submit(request)
            except QueueFull:
                return  # the ring is full until the next step
            self._upcoming.popleft()
            self._queued[request.request_id] = request.num_prompt_tokens
            self._num_queued_tokens += request.num_prompt_tokens
            yield request

    def has_left(self, request_id: str) -> None:
        """Something has come out of a request."""
        self._num_queued_tokens -= self._queued.pop(request_id, 0)

    def _has_room(self, request: Request) -> bool:
        if not self._queued:
            return True
        limits = self._engine.queue_limits
        if len(self._queued) >= limits.max_num_reqs:
            return False
        num_tokens = self._num_queued_tokens + request.num_prompt_tokens
        return limits.max_tokens is None or num_tokens <= limits.max_tokens


def tokenize_prompt(tokenizer: Tokenizer | None, prompt: Prompt) -> list[int]:
    """The tokens of a prompt.

    Raises:
        InvalidRequest: it is neither a text nor a list of token ids, or it is empty; or a text,
            and there is no tokenizer.
    """
    if isinstance(prompt, str):
        if not prompt:
            raise InvalidRequest("the prompt is empty, needs at least 1 character")
        if tokenizer is None:
            raise InvalidRequest("the engine has no tokenizer, the prompt must be token ids")
        return tokenizer.encode(prompt)
    if not isinstance(prompt, Sequence):
        kind = type(prompt).__name__
        raise InvalidRequest(f"the prompt is of type {kind}, must be a text or a list of token ids")
    token_ids: list[Any] = list(prompt)
    for token_id in token_ids:
        if not isinstance(token_id, int) or isinstance(token_id, bool):
            raise InvalidRequest(f"the prompt holds {token_id!r}, must be a text or token ids")
    if not token_ids:
        raise InvalidRequest("the prompt is empty, needs at least 1 token")
    return token_ids


def _spread(name: str, value: Any, count: int) -> list[Any]:
    if isinstance(value, (SamplingParams, int)) or not isinstance(value, Sequence):
        return [value] * count
    if len(value) != count:
        raise InvalidRequest(f"{name} has {len(value)} values for {count} prompts")
    return list(value)


@contextmanager
def _interrupts_between_steps() -> Iterator[Callable[[], None]]:
    """Hold Ctrl-C back until a step is over: half a step would leave no usable engine.

    Nothing is lost by it, since the inference in a step cannot be interrupted anyway. Where
    another handler has the signal, or in another thread than the main one, it is left alone.
    """
    is_pressed = False

    def note(*_: object) -> None:
        nonlocal is_pressed
        is_pressed = True

    def check() -> None:
        if is_pressed:
            raise KeyboardInterrupt

    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield check
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    check()
