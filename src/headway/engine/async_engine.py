"""Online use: an engine in a thread of its own, and requests as asynchronous iterators.

``AsyncEngine`` is the ``EngineClient`` of an engine in the same process. The step thread never
waits for a reader: it leaves what each step has to say with the event loop in one call and goes on.
A reader that is slow finds what has gathered meanwhile in one piece.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from headway.core.errors import (
    DuplicateRequest,
    EngineStopped,
    HeadwayError,
    InvalidRequest,
    QueueFull,
    SlowReader,
)
from headway.core.priority import check_priority
from headway.core.request import Request, SamplingParams
from headway.engine.client import (
    EngineDescription,
    EngineListener,
    EngineStatistics,
    Prompt,
    StepReport,
)
from headway.engine.engine import Engine
from headway.engine.llm import tokenize_prompt
from headway.engine.output_processor import OutputProcessor
from headway.engine.outputs import EngineOutput, RequestOutput
from headway.engine.request_board import BoardEntry, RequestBoard, engine_id
from headway.engine.request_info import RequestInfo
from headway.engine.tokenizer import Tokenizer

__all__ = ["AsyncEngine"]


class _Stream:
    """Outputs of one request that its reader has not taken yet; touched by the loop only."""

    def __init__(self, request_id: str, num_choices: int) -> None:
        self.request_id = request_id
        self.num_choices = num_choices
        self.pending: list[EngineOutput] = []
        #: Tokens in ``pending``.
        self.num_pending_tokens = 0
        self.ready = asyncio.Event()
        #: Whether the engine has it; until then it waits here for room in the ring.
        self.is_submitted = False
        #: Whether it is to end instead of being submitted.
        self.is_aborted = False
        #: Whether its end is among ``pending``, or has been taken: nothing may come after it.
        self.is_ended = False
        #: Set when the engine has nothing more to say of it.
        self.has_left_engine = asyncio.Event()

    def put(self, output: EngineOutput) -> None:
        if self.is_ended:
            return
        self.pending.append(output)
        self.num_pending_tokens += len(output.token_ids)
        self.is_ended = output.is_last
        self.ready.set()

    def end(self, error: HeadwayError) -> None:
        self.put(EngineOutput(self.request_id, finish_reason="abort", error=error, is_last=True))

    def end_unbegun(self) -> None:
        """The request was aborted before the engine had it: all its choices end."""
        last = self.num_choices - 1
        for index in range(self.num_choices):
            is_last = index == last
            self.put(EngineOutput(self.request_id, index, finish_reason="abort", is_last=is_last))

    async def take(self) -> list[EngineOutput]:
        await self.ready.wait()
        self.ready.clear()
        taken, self.pending = self.pending, []
        self.num_pending_tokens = 0
        return taken


class AsyncEngine:
    """Serves many requests at once on an ``Engine`` that it owns.

    Use it from one event loop, as an asynchronous context manager or with ``shutdown``::

        async with AsyncEngine(EngineConfig().build()) as engine:
            async for output in engine.generate("Hello", SamplingParams(max_tokens=32), priority=0):
                print(output.new_text, end="")

    Args:
        engine: steps in a thread of its own from ``start`` on.
        max_buffered_tokens: a request ends with ``SlowReader`` when so many of each of its choices
            wait for its reader.
    """

    def __init__(self, engine: Engine, max_buffered_tokens: int = 1024) -> None:
        self.engine = engine
        self.max_buffered_tokens = max_buffered_tokens
        #: What does not change about the engine.
        self.description: EngineDescription = engine.description
        #: The streams of requests that the engine may have something to say of, by the engine's
        #: ids; the loop's own.
        self._streams: dict[str, _Stream] = {}
        #: What can be asked about them; the loop's own.
        self._board = RequestBoard()
        #: Set while there are none; the loop's own.
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        #: Set when the ring may have room again; the loop's own.
        self._room = asyncio.Event()
        self._ids = itertools.count()
        #: Wakes the step thread.
        self._wake = threading.Event()
        self._is_stopping = False
        #: Whether new requests are refused while the others are finished.
        self._is_draining = False
        #: Aborts on their way, of requests whose readers need not wait for them.
        self._aborts: set[asyncio.Task[None]] = set()
        #: Why the step thread ended, if it did so by itself.
        self.failure: BaseException | None = None
        #: Once nothing is served any more: what every reader is told; the loop's own.
        self._stopped: EngineStopped | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="headway-step", daemon=True)
        engine.on_ingress = self._wake.set
        engine.listeners.append(self._hand_over)

    async def __aenter__(self) -> AsyncEngine:
        self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.shutdown()

    def start(self) -> None:
        """Start the step thread; must be called in the event loop. Idempotent."""
        if self._loop is None and not self._is_stopping:
            self._loop = asyncio.get_running_loop()
            self._thread.start()

    # ------------------------------------------------------------------ requests

    async def generate(
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
        """Complete a prompt; yields the output so far whenever there is more of it.

        Closing the iterator, or cancelling its task, aborts the request.

        A request never waits for room in the queue: when that is full, the least urgent request by
        rank is turned away, be it this one or another. It waits, at most for a step or two, while
        the ring between the event loop and the step thread is full.

        Args:
            prompt: text or token ids.
            sampling_params: how to generate.
            request_id: unique among the tenant's unfinished requests; drawn if None.
            n: choices; the prompt is computed once, and each has draws of its own.
            priority: int64, smaller is served first.
            deadline: of the first token, in seconds on the engine's clock.
            tenant: whose request it is.
            cache_salt: requests with different salts find nothing of each other's in the prefix
                cache; at most 256 characters.
            cache_group: tenants of one group share the prefix cache; None = a group of the tenant's
                own.
            outputs: of a request that has begun in another engine and goes on here: the tokens of
                each unfinished choice so far, by index (see ``Request.resume``). The text of these
                tokens is part of the output, and is not new.

        Raises:
            InvalidRequest: it could never be served.
            QueueFull: the queue is full of requests at least as urgent.
            QueueTimeout: it has waited for its first step longer than any request may.
            SlowReader: too much output has gathered because the iterator was not read.
            EngineStopped: the engine was shut down, or its step loop died.
        """
        self.start()
        if "/" in tenant:
            raise InvalidRequest(f"tenant is {tenant!r}, must not hold a slash")
        own_id = f"req-{next(self._ids)}" if request_id is None else request_id
        arguments: dict[str, Any] = {
            "prompt_token_ids": tokenize_prompt(self.engine.tokenizer, prompt),
            "sampling_params": sampling_params or SamplingParams(),
            "n": n,
            "arrival_time": self.engine.clock(),
            "deadline": deadline,
            "tenant": tenant,
            "cache_salt": cache_salt,
            "cache_group": cache_group,
        }
        whole_id = engine_id(own_id, tenant) if own_id else own_id
        if outputs is None:
            request = Request(whole_id, priority, prompt, **arguments)
        else:
            request = Request.resume(whole_id, priority, prompt, outputs=outputs, **arguments)
        stream = await self._open_stream(request.request_id, own_id, n)
        try:
            await self._submit(stream, request)
            result = RequestOutput.of(request, own_id)
            for index, token_ids in (outputs or {}).items():
                _, settled = OutputProcessor.resumed(
                    request.sampling_params, self.engine.tokenizer, token_ids
                )
                result.outputs[index].text = settled.text
                result.outputs[index].token_ids = list(token_ids)
            del request  # the engine's from here on
            while not result.finished:
                result.begin()
                error = None
                for output in await stream.take():
                    error = output.error
                    result.extend(output)
                if error is None or any(
                    result.outputs[index].new_token_ids for index in result.changed
                ):
                    yield result  # what was generated before the error, too
                if error is not None:
                    # Many readers may share it, and each of them would add to its traceback.
                    raise error.with_traceback(None)
        finally:
            self._close_stream(stream)

    async def abort(self, request_id: str, tenant: str = "") -> None:
        """End a request; its iterator yields a last output with ``finish_reason="abort"``."""
        stream = self._streams.get(engine_id(request_id, tenant))
        if stream is None:
            return
        if stream.is_submitted:
            await self._abort_soon(stream)
        else:
            stream.is_aborted = True
            self._room.set()

    async def set_priority(self, request_id: str, priority: int, tenant: str = "") -> None:
        """Change how urgent a request is, from the next step on.

        Raises:
            InvalidRequest: the priority is no int64.
        """
        check_priority(request_id, priority)
        await self._enter(lambda: self.engine.set_priority(engine_id(request_id, tenant), priority))

    # ------------------------------------------------------------------ reading

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer."""
        return self.engine.tokenizer

    @property
    def statistics(self) -> EngineStatistics:
        """The latest value that was published; to read it costs the engine nothing."""
        return self.engine.statistics

    @property
    def is_alive(self) -> bool:
        """Whether new requests are served."""
        return self._stopped is None and not self._is_stopping and not self._is_draining

    def now(self) -> float:
        """Seconds on the engine's clock."""
        return self.engine.clock()

    def list_requests(
        self, limit: int | None = None, tenant: str | None = None
    ) -> list[RequestInfo]:
        """Unfinished requests as of the latest step, most urgent first; None = of all tenants.

        It costs the engine nothing. O(n log n) on the caller's side.
        """
        return self._board.all(self.statistics.forecast, self.now(), limit, tenant)

    def get_request(self, request_id: str, tenant: str = "") -> RequestInfo | None:
        """The same of one request; None if it is not unfinished. O(n)."""
        forecast = self.statistics.forecast
        return self._board.get(engine_id(request_id, tenant), forecast, self.now())

    def add_listener(self, listener: EngineListener) -> None:
        """Have ``listener`` called after every step, from the step thread."""
        self.engine.listeners.append(listener)

    # ------------------------------------------------------------------ its end

    async def drain(self, timeout: float | None = None) -> None:
        """Refuse new requests, and wait until the others have ended.

        Args:
            timeout: seconds after which those that are left end with ``EngineStopped``;
                None = however long it takes.
        """
        self._is_draining = True
        self._room.set()
        try:
            await asyncio.wait_for(self._is_idle.wait(), timeout)
        except asyncio.TimeoutError:
            stopped = EngineStopped(
                f"the engine stops, and {timeout:g} s were not enough to finish"
            )
            for stream in self._streams.values():
                stream.end(stopped)
                self._abort_later(stream)

    async def shutdown(self) -> None:
        """Stop after the step in flight; what is unfinished ends with ``EngineStopped``.

        Idempotent; one that was cancelled can be called again.
        """
        self._is_stopping = True
        self._wake.set()
        if self._thread.is_alive():
            await asyncio.get_running_loop().run_in_executor(None, self._thread.join)
        # What has entered the ring since the step thread looked last.
        self.engine.abort_all(EngineStopped("the engine has been stopped"))
        self.engine.close()

    # ------------------------------------------------------------------ the loop's side

    async def _open_stream(self, whole_id: str, own_id: str, num_choices: int) -> _Stream:
        """A stream of this id.

        Raises:
            DuplicateRequest: another one is read.
        """
        while (other := self._streams.get(whole_id)) is not None:
            if not other.is_ended:
                raise DuplicateRequest(f"request id {own_id!r} is in use")
            if other.has_left_engine.is_set():
                break  # its reader has not read the end yet, which it can do without the id
            # Its reader has gone; the engine ends it within a step.
            await other.has_left_engine.wait()
        stream = self._streams[whole_id] = _Stream(whole_id, num_choices)
        self._is_idle.clear()
        return stream

    def _close_stream(self, stream: _Stream) -> None:
        """The reader has gone, or has read everything."""
        if stream.is_submitted and not stream.is_ended:
            stream.is_ended = True
            self._abort_later(stream)
        elif not stream.is_submitted or stream.has_left_engine.is_set():
            self._forget(stream)

    def _forget(self, stream: _Stream) -> None:
        stream.has_left_engine.set()
        if self._streams.get(stream.request_id) is stream:
            del self._streams[stream.request_id]
        if not self._streams:
            self._is_idle.set()

    async def _submit(self, stream: _Stream, request: Request) -> None:
        """Put the request into the ring, as soon as that has room."""
        self.engine.prepare(request)
        entry = BoardEntry(request)
        while True:
            if not self.is_alive:
                stopped = self._stopped or EngineStopped(
                    "the engine stops, and takes no more requests"
                )
                raise stopped.with_traceback(None)
            if stream.is_aborted:
                stream.end_unbegun()
                return
            self._room.clear()
            try:
                self.engine.enqueue(request)
            except QueueFull:
                await self._room.wait()
            else:
                stream.is_submitted = True
                self._board.add(entry)
                return

    async def _enter(self, command: Callable[[], None]) -> None:
        """Have a command enter the ring, as soon as that has room."""
        while self._stopped is None:
            self._room.clear()
            try:
                command()
                return
            except QueueFull:
                await self._room.wait()

    async def _abort_soon(self, stream: _Stream) -> None:
        """End the stream's request, and none that has its id later."""

        def abort() -> None:
            if not stream.has_left_engine.is_set():
                self.engine.abort(stream.request_id)

        await self._enter(abort)

    def _abort_later(self, stream: _Stream) -> None:
        task = asyncio.get_running_loop().create_task(self._abort_soon(stream))
        self._aborts.add(task)
        task.add_done_callback(self._aborts.discard)

    def _deliver(self, report: StepReport, outputs: Sequence[EngineOutput]) -> None:
        self._board.apply(report.output, report.changes, outputs)
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is None:
                continue
            was_ended = stream.is_ended
            stream.put(output)
            most = self.max_buffered_tokens * stream.num_choices
            if stream.num_pending_tokens > most and not stream.is_ended:
                stream.end(
                    SlowReader(
                        f"{stream.num_pending_tokens} tokens wait to be read, at most {most} may"
                    )
                )
                self._abort_later(stream)
            if output.is_last:
                stream.has_left_engine.set()
                if was_ended:  # by its reader, who waits for nothing
                    self._forget(stream)
        self._room.set()

    def _end(self, stopped: EngineStopped) -> None:
        """Nothing is served any more: tell all readers, present and future."""
        self._stopped = stopped
        self._board.clear()
        for stream in list(self._streams.values()):
            was_ended = stream.is_ended
            stream.end(stopped)
            stream.has_left_engine.set()
            if was_ended:
                self._forget(stream)
        self._room.set()

    # ------------------------------------------------------------------ the step thread's side

    def _run(self) -> None:
        try:
            while True:
                self._wake.clear()  # before looking: what is set from here on is not lost
                if self._is_stopping:
                    break
                if self.engine.has_work:
                    self.engine.step()
                else:
                    self._wake.wait()
        except BaseException as error:  # whatever it is, every reader must hear of it
            self.failure = error
        stopped = EngineStopped(
            "the engine has been stopped"
            if self.failure is None
            else f"the step loop died of {type(self.failure).__name__}: {self.failure}"
        )
        stopped.__cause__ = self.failure
        # Readers hear of it from ``_end``: before that, none may take an empty ring for room.
        with suppress(ValueError):
            self.engine.listeners.remove(self._hand_over)
        try:
            self.engine.abort_all(stopped)
        finally:
            # On the loop, where requests are submitted, so that none slips in unseen.
            self._call_soon(self._end, stopped)

    def _hand_over(self, report: StepReport, outputs: Sequence[EngineOutput]) -> None:
        """The listener that lets readers have what a step has to say."""
        self._call_soon(self._deliver, report, outputs)

    def _call_soon(self, callback: Callable[..., None], *arguments: object) -> None:
        assert self._loop is not None
        with suppress(RuntimeError):  # the loop is closed: nothing reads any more
            self._loop.call_soon_threadsafe(callback, *arguments)
