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
from typing import TypeVar

from headway.core.errors import DuplicateRequest, EngineStopped, QueueFull
from headway.core.request import Request, SamplingParams, check_priority
from headway.engine.engine import Engine
from headway.engine.llm import Prompt, tokenize_prompt
from headway.engine.outputs import EngineOutput, RequestOutput

__all__ = ["AsyncEngine"]

_T = TypeVar("_T")


class _Stream:
    """Outputs of one request that its reader has not taken yet; touched by the loop only."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.pending: list[EngineOutput] = []
        self.ready = asyncio.Event()
        #: Whether the engine has it; until then it waits for room here.
        self.is_submitted = False
        #: Whether it is to end instead of being submitted.
        self.is_aborted = False

    def put(self, output: EngineOutput) -> None:
        self.pending.append(output)
        self.ready.set()

    async def take(self) -> list[EngineOutput]:
        await self.ready.wait()
        self.ready.clear()
        taken, self.pending = self.pending, []
        return taken


class AsyncEngine:
    """Serves many requests at once on an ``Engine`` that it owns.

    Use it from one event loop, as an asynchronous context manager or with ``shutdown``::

        async with AsyncEngine(EngineConfig().build()) as engine:
            async for output in engine.generate("Hello", SamplingParams(max_tokens=32), priority=0):
                print(output.new_text, end="")
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        #: Unfinished requests' streams, by id; the loop's own.
        self._streams: dict[str, _Stream] = {}
        #: Set when the ring may have room again; the loop's own.
        self._room = asyncio.Event()
        self._ids = itertools.count()
        #: Wakes the step thread.
        self._wake = threading.Event()
        self._is_stopping = False
        #: Why the step thread ended, if it did so by itself.
        self._failure: BaseException | None = None
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
            QueueFull: there is no room now (``wait_for_room=False``).
            EngineStopped: the engine was shut down, or its step loop died.
        """
        self.start()
        request = Request(
            f"req-{next(self._ids)}" if request_id is None else request_id,
            priority,
            prompt,
            prompt_token_ids=tokenize_prompt(self.engine.tokenizer, prompt),
            sampling_params=sampling_params,
            deadline=deadline,
        )
        if request.request_id in self._streams:
            raise DuplicateRequest(f"request id {request.request_id!r} is in use")
        stream = self._streams[request.request_id] = _Stream(request)
        is_served = False
        try:
            await self._submit(stream, wait_for_room)
            is_served = True
            result = RequestOutput.of(request)
            while is_served:
                new_text = ""
                for output in await stream.take():
                    is_served = output.finish_reason is None
                    if output.error is not None:
                        raise output.error
                    result.extend(output)
                    new_text += output.text
                    if not is_served:
                        break  # what a shutdown may have said after it is not for this reader
                result.new_text = new_text
                yield result
        finally:
            del self._streams[request.request_id]
            if is_served:  # the reader has gone
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
            if self._is_stopping or self._stopped is not None:
                raise self._stopped or EngineStopped("the engine has been stopped")
            if stream.is_aborted:
                stream.put(EngineOutput(stream.request, finish_reason="abort"))
                return
            self._room.clear()
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

    def _deliver(self, outputs: list[EngineOutput]) -> None:
        for output in outputs:
            stream = self._streams.get(output.request.request_id)
            # The id may have been another request's, whose reader has gone or never was.
            if stream is not None and stream.request is output.request:
                stream.put(output)
        self._room.set()

    def _end(self, stopped: EngineStopped) -> None:
        """Nothing is served any more: tell those who read, and from now on those who come."""
        self._stopped = stopped
        for stream in self._streams.values():
            stream.put(EngineOutput(stream.request, finish_reason="abort", error=stopped))
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
            self._failure = error
        stopped = EngineStopped(
            "the engine has been stopped"
            if self._failure is None
            else f"the step loop died of {type(self._failure).__name__}: {self._failure}"
        )
        stopped.__cause__ = self._failure
        try:
            self.engine.abort_all(stopped)
        finally:
            # On the loop, where requests are submitted, so that none slips in unseen.
            self._call_soon(self._end, stopped)

    def _call_soon(self, callback: Callable[[_T], None], argument: _T) -> None:
        assert self._loop is not None
        with suppress(RuntimeError):  # the loop is closed: nobody reads any more
            self._loop.call_soon_threadsafe(callback, argument)
