"""Online use: an engine in a thread of its own, and requests as asynchronous iterators.

The step thread never waits for a reader: it leaves each step's outputs with the event loop in
one call and goes on. A reader that is slow finds what has gathered meanwhile in one piece.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from typing import Any, TypeVar

from headway.core.errors import (
    DuplicateRequest,
    EngineStopped,
    HeadwayError,
    QueueFull,
    SlowReader,
)
from headway.core.request import Request, SamplingParams, check_priority
from headway.engine.engine import Engine
from headway.engine.llm import Prompt, tokenize_prompt
from headway.engine.outputs import EngineOutput, RequestOutput
from headway.engine.request_info import RequestInfo

__all__ = ["AsyncEngine"]

_T = TypeVar("_T")


class _Stream:
    """Outputs of one request that its reader has not taken yet; touched by the loop only."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.pending: list[EngineOutput] = []
        #: Tokens in ``pending``.
        self.num_pending_tokens = 0
        self.ready = asyncio.Event()
        #: Whether the engine has it; until then it waits for room here.
        self.is_submitted = False
        #: Whether it is to end instead of being submitted.
        self.is_aborted = False
        #: Whether its end is among ``pending``, or has been taken: nothing may come after it.
        self.is_ended = False

    def put(self, output: EngineOutput) -> None:
        if self.is_ended:
            return
        self.pending.append(output)
        self.num_pending_tokens += len(output.token_ids)
        self.is_ended = output.finish_reason is not None
        self.ready.set()

    def end(self, error: HeadwayError) -> None:
        self.put(EngineOutput(self.request, finish_reason="abort", error=error))

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
        max_buffered_tokens: a request ends with ``SlowReader`` when so many wait for its reader.
    """

    def __init__(self, engine: Engine, max_buffered_tokens: int = 1024) -> None:
        self.engine = engine
        self.max_buffered_tokens = max_buffered_tokens
        #: Unfinished requests' streams, by id; the loop's own.
        self._streams: dict[str, _Stream] = {}
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
        #: Questions on their way to the step thread.
        self._questions: set[asyncio.Future[Any]] = set()
        #: Why the step thread ended, if it did so by itself.
        self.failure: BaseException | None = None
        #: Once nothing is served any more: what every reader is told; the loop's own.
        self._stopped: EngineStopped | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="headway-step", daemon=True)
        engine.on_ingress = self._wake.set

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

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        deadline: float | None = None,
        wait_for_room: bool = True,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Complete a prompt; yields the output so far whenever there is more of it.

        Closing the iterator, or cancelling its task, aborts the request.

        Args:
            prompt: text or token ids.
            sampling_params: how to generate.
            request_id: drawn if None.
            priority: int64, smaller is served first.
            deadline: of the first token, in seconds on the engine's clock.
            wait_for_room: when the queue is full, wait until it is not; otherwise raise.

        Raises:
            InvalidRequest: it could never be served.
            QueueFull: there is no room now (``wait_for_room=False``), or there was some, and those
                who are more urgent have taken it.
            QueueTimeout: it has waited for its first step longer than any request may.
            SlowReader: too much output has gathered because the iterator was not read.
            EngineStopped: the engine was shut down, or its step loop died.
        """
        self.start()
        request = Request(
            f"req-{next(self._ids)}" if request_id is None else request_id,
            priority,
            prompt,
            prompt_token_ids=tokenize_prompt(self.engine.tokenizer, prompt),
            sampling_params=sampling_params,
            arrival_time=self.engine.clock(),
            deadline=deadline,
        )
        if request.request_id in self._streams:
            raise DuplicateRequest(f"request id {request.request_id!r} is in use")
        stream = self._streams[request.request_id] = _Stream(request)
        self._is_idle.clear()
        try:
            await self._submit(stream, wait_for_room)
            result = RequestOutput.of(request)
            while not result.finished:
                result.begin()
                error = None
                for output in await stream.take():
                    error = output.error
                    if error is None:
                        result.extend(output)
                if error is None or result.new_token_ids:
                    yield result  # what was generated before the error, too
                if error is not None:
                    raise error
        finally:
            del self._streams[request.request_id]
            if not self._streams:
                self._is_idle.set()
            if stream.is_submitted and not stream.is_ended:  # the reader has gone
                stream.is_ended = True
                await self._abort_soon(request.request_id)

    async def abort(self, request_id: str) -> None:
        """End a request; its iterator yields a last output with ``finish_reason="abort"``."""
        stream = self._streams.get(request_id)
        if stream is None or stream.is_submitted:
            await self._abort_soon(request_id)
        else:
            stream.is_aborted = True
            self._room.set()

    def set_priority(self, request_id: str, priority: int) -> None:
        """Change how urgent a request is, from the next step on.

        Raises:
            InvalidRequest: the priority is no int64.
            QueueFull: the ring is full; try again.
        """
        stream = self._streams.get(request_id)
        if stream is None or stream.is_submitted:
            self.engine.set_priority(request_id, priority)
        else:
            check_priority(request_id, priority)
            stream.request.priority = priority  # it is ranked when it is added

    @property
    def is_alive(self) -> bool:
        """Whether new requests are served."""
        return self._stopped is None and not self._is_stopping and not self._is_draining

    async def list_requests(self, limit: int | None = None) -> list[RequestInfo]:
        """The unfinished requests as they stand between two steps, most urgent first."""
        return await self._ask(lambda: self.engine.request_infos(limit))

    async def get_request(self, request_id: str) -> RequestInfo | None:
        """The same of one request; None if it is not unfinished."""
        infos = await self.list_requests()
        return next((info for info in infos if info.request_id == request_id), None)

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
                self._abort_later(stream.request.request_id)

    async def shutdown(self) -> None:
        """Stop after the step in flight; what is unfinished ends with ``EngineStopped``.

        Idempotent; one that was cancelled can be called again.
        """
        self._is_stopping = True
        self._wake.set()
        if self._thread.is_alive():
            await asyncio.get_running_loop().run_in_executor(None, self._thread.join)
        self.engine.close()

    # ------------------------------------------------------------------ the loop's side

    async def _submit(self, stream: _Stream, wait_for_room: bool) -> None:
        while True:
            if not self.is_alive:
                raise self._stopped or EngineStopped("the engine stops, and takes no more requests")
            if stream.is_aborted:
                stream.put(EngineOutput(stream.request, finish_reason="abort"))
                return
            self._room.clear()
            if self.engine.has_room or not wait_for_room:
                try:
                    self.engine.submit(stream.request)
                    stream.is_submitted = True
                    return
                except QueueFull:
                    if not wait_for_room:
                        raise
            await self._room.wait()

    async def _abort_soon(self, request_id: str) -> None:
        while self._stopped is None:
            self._room.clear()
            try:
                self.engine.abort(request_id)
                return
            except QueueFull:
                await self._room.wait()

    def _abort_later(self, request_id: str) -> None:
        task = asyncio.get_running_loop().create_task(self._abort_soon(request_id))
        self._aborts.add(task)
        task.add_done_callback(self._aborts.discard)

    async def _ask(self, function: Callable[[], _T]) -> _T:
        """What ``function`` returns when it is called between two steps.

        Raises:
            EngineStopped: there are no more steps.
        """
        self.start()
        answer: asyncio.Future[_T] = asyncio.get_running_loop().create_future()

        def set_result(result: _T) -> None:
            if not answer.done():
                answer.set_result(result)

        self._questions.add(answer)
        try:
            while self._stopped is None:
                self._room.clear()
                try:
                    self.engine.call(lambda: self._call_soon(set_result, function()))
                    return await answer
                except QueueFull:
                    await self._room.wait()
            raise self._stopped
        finally:
            self._questions.discard(answer)

    def _deliver(self, outputs: list[EngineOutput]) -> None:
        for output in outputs:
            stream = self._streams.get(output.request.request_id)
            # The id may have been another request's, whose reader has gone or never was.
            if stream is not None and stream.request is output.request:
                stream.put(output)
                if stream.num_pending_tokens > self.max_buffered_tokens and not stream.is_ended:
                    stream.end(
                        SlowReader(
                            f"{stream.num_pending_tokens} tokens wait to be read, at most "
                            f"{self.max_buffered_tokens} may"
                        )
                    )
                    self._abort_later(output.request.request_id)
        self._room.set()

    def _end(self, stopped: EngineStopped) -> None:
        """Nothing is served any more: tell those who read, and from now on those who come."""
        self._stopped = stopped
        for stream in self._streams.values():
            stream.end(stopped)
        for answer in self._questions:
            if not answer.done():
                answer.set_exception(stopped)
        self._room.set()

    # ------------------------------------------------------------------ the step thread's side

    def _run(self) -> None:
        try:
            while True:
                self._wake.clear()  # before looking: what is set from here on is not lost
                if self._is_stopping:
                    break
                if self.engine.has_work:
                    self._call_soon(self._deliver, self.engine.step())
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
        try:
            self.engine.abort_all(stopped)
        finally:
            # On the loop, where requests are submitted, so that none slips in unseen.
            self._call_soon(self._end, stopped)

    def _call_soon(self, callback: Callable[[_T], None], argument: _T) -> None:
        assert self._loop is not None
        with suppress(RuntimeError):  # the loop is closed: nobody reads any more
            self._loop.call_soon_threadsafe(callback, argument)
