"""Many readers at once: streams, ends, faults, and a full house."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from typing import Any

import pytest

from headway.core.errors import (
    DuplicateRequest,
    EngineStopped,
    InvalidRequest,
    QueueFull,
    SlowReader,
)
from headway.core.request import SamplingParams
from headway.core.scheduler_output import SchedulerOutput
from headway.engine.async_engine import AsyncEngine
from headway.engine.engine import Engine
from headway.engine.outputs import RequestOutput
from headway.executor.base import ModelRunnerOutput

MakeEngine = Callable[..., Engine]

#: Longer than any of these tests should take, so that one that hangs fails.
TIMEOUT = 60.0


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, TIMEOUT))


def tokens(count: int, **more: Any) -> SamplingParams:
    return SamplingParams(max_tokens=count, **more)


async def text_of(stream: AsyncIterator[RequestOutput]) -> str:
    """All that a stream has to say; its pieces must add up."""
    text, new_text = "", ""
    async for output in stream:
        new_text += output.new_text
        text = output.outputs[0].text
    assert text == new_text
    return text


class Gate:
    """An executor whose steps wait to be let through, or fail."""

    num_blocks = 200
    block_size = 4
    num_swap_blocks = 0
    max_model_len = 800

    def __init__(self, num_free: int | None = None) -> None:
        self.may_pass = threading.Event()
        #: Steps that need not be let through; the gate is open if the number is not given.
        self.num_free = num_free or 0
        if num_free is None:
            self.may_pass.set()
        self.is_inside = threading.Event()
        self.fault: BaseException | None = None
        self.is_closed = False

    def execute(self, output: SchedulerOutput) -> ModelRunnerOutput:
        if self.num_free:
            self.num_free -= 1
        else:
            self.is_inside.set()
            assert self.may_pass.wait(TIMEOUT)
        if self.fault is not None:
            raise self.fault
        return ModelRunnerOutput(
            [
                ord("a") if one.num_computed_tokens + count == one.num_tokens else None
                for one, count in zip(output, output.num_scheduled_tokens, strict=True)
            ]
        )

    def close(self) -> None:
        self.is_closed = True

    async def hold(self, engine: AsyncEngine) -> asyncio.Task[str]:
        """Let one request in, whose first step waits; it gets one token."""
        self.is_inside.clear()
        self.may_pass.clear()
        task = asyncio.create_task(text_of(engine.generate("held", tokens(1), "held")))
        await asyncio.to_thread(self.is_inside.wait, TIMEOUT)
        return task


# --- streams --------------------------------------------------------------------------------------


def test_concurrent_streams_each_get_their_own(make_engine: MakeEngine, story: str) -> None:
    async def test() -> None:
        async with AsyncEngine(make_engine()) as engine:
            streams = [
                text_of(engine.generate(story[: 5 + n], tokens(9), priority=n % 3))
                for n in range(20)
            ]
            assert await asyncio.gather(*streams) == [story[5 + n : 14 + n] for n in range(20)]

    run(test())


def test_the_last_output_says_how_it_ended(make_engine: MakeEngine, story: str) -> None:
    async def test() -> None:
        async with AsyncEngine(make_engine()) as engine:
            stream = engine.generate(story[:7], tokens(20, stop=("dark",)), "mine", priority=3)
            outputs = [output async for output in stream]
        last = outputs[-1]
        assert (last.request_id, last.priority, last.finished) == ("mine", 3, True)
        assert last.outputs[0].text == "a "
        assert (last.outputs[0].finish_reason, last.outputs[0].stop_reason) == ("stop", "dark")
        assert last.metrics is not None and last.metrics.latency is not None

    run(test())


def test_token_ids_will_do_without_a_tokenizer(make_engine: MakeEngine, story: str) -> None:
    async def test() -> None:
        async with AsyncEngine(make_engine(tokenizer=None)) as engine:
            outputs = [one async for one in engine.generate(list(story[:6].encode()), tokens(3))]
            assert outputs[-1].outputs[0].token_ids == list(story[6:9].encode())
            with pytest.raises(InvalidRequest, match="no tokenizer"):
                await text_of(engine.generate("text"))

    run(test())


def test_a_slow_reader_slows_nobody(make_engine: MakeEngine, story: str) -> None:
    async def test() -> None:
        async with AsyncEngine(make_engine()) as engine:
            slow = engine.generate(story[:6], tokens(30), priority=0)
            first = await anext(slow)
            begun = first.outputs[0].text
            assert await text_of(engine.generate(story[:6], tokens(40), priority=1)) == story[6:46]
            rest = [output.new_text async for output in slow]
            assert begun + "".join(rest) == story[6:36]
            assert len(rest) <= 1  # what gathered meanwhile comes in one piece

    run(test())


def test_set_priority_lets_a_request_overtake(make_engine: MakeEngine) -> None:
    async def test() -> None:
        gate = Gate()
        async with AsyncEngine(make_engine(executor=gate, max_num_seqs=1)) as engine:
            held = await gate.hold(engine)
            ended: list[str] = []

            async def read(request_id: str) -> None:
                await text_of(engine.generate("x", tokens(3), request_id, priority=5))
                ended.append(request_id)

            readers = [asyncio.create_task(read(name)) for name in ("a", "b", "c")]
            await asyncio.sleep(0)
            engine.set_priority("c", -5)
            gate.may_pass.set()
            await asyncio.gather(held, *readers)
            assert ended == ["c", "a", "b"]

    run(test())


# --- readers who go -------------------------------------------------------------------------------


def test_a_cancelled_reader_s_request_is_aborted(make_engine: MakeEngine) -> None:
    """The fixture checks that the pool is idle afterwards."""

    async def test() -> None:
        gate = Gate(num_free=3)
        inner = make_engine(executor=gate, max_num_seqs=1)
        async with AsyncEngine(inner) as engine:
            running = engine.generate("x", tokens(700), "running")
            await anext(running)
            waiting = asyncio.create_task(text_of(engine.generate("x", tokens(700))))
            await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            await running.aclose()
            gate.may_pass.set()
            assert await text_of(engine.generate("x", tokens(4))) == "aaaa"
            assert inner.scheduler.block_manager.statistics().held == 0

    run(test())


def test_abort_ends_the_stream(make_engine: MakeEngine) -> None:
    async def test() -> None:
        gate = Gate(num_free=3)
        async with AsyncEngine(make_engine(executor=gate)) as engine:
            stream = engine.generate("x", tokens(700), "mine")
            await anext(stream)
            await engine.abort("mine")
            await engine.abort("nobody")
            gate.may_pass.set()
            last = [output async for output in stream][-1]
            assert (last.finished, last.outputs[0].finish_reason) == (True, "abort")
            assert last.outputs[0].text in {"a", "aa", "aaa", "aaaa"}

    run(test())


def test_an_id_can_be_used_again_at_once(make_engine: MakeEngine) -> None:
    """Nothing that was meant for the reader before reaches the new one."""

    async def test() -> None:
        gate = Gate(num_free=3)
        async with AsyncEngine(make_engine(executor=gate)) as engine:
            old = engine.generate("old", tokens(700), "same")
            await anext(old)
            await asyncio.to_thread(gate.is_inside.wait, TIMEOUT)
            await old.aclose()
            new = asyncio.create_task(text_of(engine.generate("new", tokens(3), "same")))
            await asyncio.sleep(0)
            gate.may_pass.set()
            assert await new == "aaa"

    run(test())


# --- refusals -------------------------------------------------------------------------------------


def test_a_duplicate_id_costs_its_neighbour_nothing(make_engine: MakeEngine, story: str) -> None:
    async def test() -> None:
        async with AsyncEngine(make_engine()) as engine:
            stream = engine.generate(story[:6], tokens(20), "same")
            begun = (await anext(stream)).new_text
            with pytest.raises(DuplicateRequest, match="request id 'same' is in use"):
                await text_of(engine.generate(story[:9], tokens(20), "same"))
            assert begun + "".join([one.new_text async for one in stream]) == story[6:26]

    run(test())


@pytest.mark.parametrize(
    ("prompt", "priority", "message"),
    [
        ("", 0, "the prompt is empty, needs at least 1 character"),
        ([], 0, "the prompt is empty, needs at least 1 token"),
        ([1, "b"], 0, "the prompt holds 'b', must be a text or token ids"),
        (7, 0, "the prompt is of type int, must be a text or a list of token ids"),
        ([1, 999], 0, "has token id 999, the vocabulary is 0 … 257"),
        ("x" * 800, 0, "has 800 tokens, the whole KV pool holds 800 tokens"),
        ("x", 2**63, "is 9223372036854775808, must be an int64"),
    ],
)
def test_a_refused_request_gets_a_reply(
    make_engine: MakeEngine, story: str, prompt: Any, priority: int, message: str
) -> None:
    async def test() -> None:
        async with AsyncEngine(make_engine()) as engine:
            good = asyncio.create_task(text_of(engine.generate(story[:6], tokens(20))))
            with pytest.raises(InvalidRequest, match=message) as caught:
                await text_of(engine.generate(prompt, priority=priority))
            assert "\n" not in str(caught.value)
            assert await good == story[6:26]

    run(test())


def test_a_full_ring_is_said_or_waited_for(make_engine: MakeEngine) -> None:
    async def test() -> None:
        gate = Gate()
        async with AsyncEngine(make_engine(executor=gate, ingress_capacity=2)) as engine:
            held = await gate.hold(engine)
            readers = [
                asyncio.create_task(text_of(engine.generate("x", tokens(2)))) for _ in range(6)
            ]
            await asyncio.sleep(0)
            # The step still waits at the gate, so this cannot have waited for room.
            with pytest.raises(QueueFull, match="2 requests have arrived since the last step"):
                await text_of(engine.generate("x", wait_for_room=False))
            gate.may_pass.set()
            assert await asyncio.gather(*readers) == ["aa"] * 6
            assert await held == "a"

    run(test())


def test_a_full_queue_is_said_or_waited_for(make_engine: MakeEngine) -> None:
    async def test() -> None:
        gate = Gate()
        inner = make_engine(executor=gate, max_num_seqs=1, max_num_queued_reqs=2)
        async with AsyncEngine(inner) as engine:
            held = await gate.hold(engine)
            readers = [
                asyncio.create_task(text_of(engine.generate("x", tokens(2)))) for _ in range(6)
            ]
            await asyncio.sleep(0)
            # Of the three that come in by force, one has a place when somebody starts.
            forced = [
                asyncio.create_task(text_of(engine.generate("x", tokens(2), wait_for_room=False)))
                for _ in range(3)
            ]
            await asyncio.sleep(0)
            gate.may_pass.set()
            results = await asyncio.gather(*forced, return_exceptions=True)
            assert results[0] == "aa"
            for refusal in results[1:]:
                assert isinstance(refusal, QueueFull)
                assert "2 requests at least as urgent are waiting" in str(refusal)
            assert await asyncio.gather(held, *readers) == ["a"] + ["aa"] * 6

    run(test())


def test_the_more_urgent_takes_the_place_of_one_that_waits(make_engine: MakeEngine) -> None:
    async def test() -> None:
        gate = Gate()
        inner = make_engine(executor=gate, max_num_seqs=1, max_num_queued_reqs=1)
        async with AsyncEngine(inner) as engine:
            held = await gate.hold(engine)
            waiting = asyncio.create_task(
                text_of(engine.generate("x", tokens(2), priority=5, wait_for_room=False))
            )
            await asyncio.sleep(0)
            urgent = [
                asyncio.create_task(
                    text_of(engine.generate("x", tokens(2), priority=4, wait_for_room=False))
                )
                for _ in range(2)
            ]
            await asyncio.sleep(0)
            gate.may_pass.set()
            with pytest.raises(QueueFull) as caught:
                await waiting
            assert caught.value.retry_after > 0
            assert await asyncio.gather(held, *urgent) == ["a", "aa", "aa"]

    run(test())


# --- asking, draining, slow readers ---------------------------------------------------------------


def test_requests_can_be_listed_while_they_are_served(make_engine: MakeEngine) -> None:
    async def test() -> None:
        gate = Gate()
        async with AsyncEngine(make_engine(executor=gate, max_num_seqs=1)) as engine:
            assert await engine.list_requests() == []
            held = await gate.hold(engine)
            readers = [
                asyncio.create_task(text_of(engine.generate("x", tokens(2), name, priority=rank)))
                for name, rank in (("first", 3), ("second", 0), ("third", 7))
            ]
            await asyncio.sleep(0)
            questions = [
                asyncio.create_task(engine.list_requests()),
                asyncio.create_task(engine.list_requests(limit=1)),
                asyncio.create_task(engine.get_request("third")),
                asyncio.create_task(engine.get_request("nobody")),
            ]
            await asyncio.sleep(0)
            gate.may_pass.set()
            infos, first, third, nobody = await asyncio.gather(*questions)
            assert [(one.request_id, one.priority, one.status) for one in infos] == [
                ("second", 0, "waiting"),
                ("first", 3, "waiting"),
                ("third", 7, "waiting"),
            ]
            assert [one.request_id for one in first] == ["second"]
            assert third.rank == 2
            assert third.predicted_wait > infos[1].predicted_wait > 0
            assert nobody is None
            assert await asyncio.gather(held, *readers) == ["a", "aa", "aa", "aa"]
        with pytest.raises(EngineStopped):
            await engine.list_requests()

    run(test())


def test_a_question_is_answered_or_refused_when_the_step_loop_dies(
    make_engine: MakeEngine,
) -> None:
    async def test() -> None:
        gate = Gate()
        async with AsyncEngine(make_engine(executor=gate)) as engine:
            held = await gate.hold(engine)
            question = asyncio.create_task(engine.list_requests())
            await asyncio.sleep(0)
            gate.fault = RuntimeError("boom")
            gate.may_pass.set()
            with pytest.raises(EngineStopped):
                await held
            with suppress(EngineStopped):
                assert len(await question) <= 1
            assert not engine.is_alive

    run(test())


def test_draining_finishes_what_has_begun_and_takes_nothing_new(make_engine: MakeEngine) -> None:
    async def test() -> None:
        gate = Gate()
        async with AsyncEngine(make_engine(executor=gate)) as engine:
            held = await gate.hold(engine)
            assert engine.is_alive
            draining = asyncio.create_task(engine.drain())
            await asyncio.sleep(0)
            assert not engine.is_alive
            with pytest.raises(EngineStopped, match="takes no more requests"):
                await text_of(engine.generate("x"))
            assert not draining.done()
            gate.may_pass.set()
            assert await held == "a"
            await draining

    run(test())


def test_draining_ends_those_who_take_too_long(make_engine: MakeEngine) -> None:
    async def test() -> None:
        gate = Gate()
        async with AsyncEngine(make_engine(executor=gate)) as engine:
            held = await gate.hold(engine)
            await engine.drain(timeout=0)
            with pytest.raises(EngineStopped, match="0 s were not enough"):
                await held
            gate.may_pass.set()

    run(test())


def test_a_reader_who_does_not_read_costs_a_bounded_buffer(make_engine: MakeEngine) -> None:
    async def test() -> None:
        async with AsyncEngine(make_engine(), max_buffered_tokens=10) as engine:
            slow = engine.generate("x", tokens(500), "slow")
            received = list((await anext(slow)).new_token_ids)
            while await engine.get_request("slow") is not None:
                pass
            with pytest.raises(SlowReader, match=r"1\d tokens wait to be read, at most 10 may"):
                async for output in slow:
                    received += output.new_token_ids
            assert 10 < len(received) < 500
            assert len(await text_of(engine.generate("x", tokens(5), "slow"))) == 5

    run(test())


def test_a_reader_who_gives_up_waiting_for_room_leaves_nothing(make_engine: MakeEngine) -> None:
    async def test() -> None:
        gate = Gate()
        async with AsyncEngine(make_engine(executor=gate, ingress_capacity=1)) as engine:
            held = await gate.hold(engine)
            first = asyncio.create_task(text_of(engine.generate("x", tokens(1))))
            second = asyncio.create_task(text_of(engine.generate("x", tokens(1), "second")))
            await asyncio.sleep(0)
            second.cancel()
            with pytest.raises(asyncio.CancelledError):
                await second
            gate.may_pass.set()
            assert await asyncio.gather(held, first) == ["a", "a"]
            assert await text_of(engine.generate("x", tokens(2), "second")) == "aa"

    run(test())


def test_a_request_that_waits_for_room_can_be_aborted_and_ranked(make_engine: MakeEngine) -> None:
    async def test() -> None:
        gate = Gate()
        async with AsyncEngine(make_engine(executor=gate, ingress_capacity=1)) as engine:
            held = await gate.hold(engine)
            in_ring = asyncio.create_task(text_of(engine.generate("x", tokens(1))))
            doomed = engine.generate("x", tokens(3), "doomed")
            last = asyncio.create_task(anext(doomed))
            ranked = engine.generate("x", tokens(1), "ranked", priority=5)
            output = asyncio.create_task(anext(ranked))
            await asyncio.sleep(0)
            await engine.abort("doomed")
            engine.set_priority("ranked", -5)
            with pytest.raises(InvalidRequest, match="must be an int64"):
                engine.set_priority("ranked", 2**63)
            assert (await last).outputs[0].finish_reason == "abort"
            gate.may_pass.set()
            assert await asyncio.gather(held, in_ring) == ["a", "a"]
            assert (await output).outputs[0].text == "a"

    run(test())


def test_a_shutdown_that_was_cancelled_can_be_called_again(make_engine: MakeEngine) -> None:
    async def test() -> None:
        gate = Gate()
        engine = AsyncEngine(make_engine(executor=gate))
        held = await gate.hold(engine)
        stopping = asyncio.create_task(engine.shutdown())
        await asyncio.sleep(0)
        stopping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stopping
        assert not gate.is_closed
        gate.may_pass.set()
        await engine.shutdown()
        assert gate.is_closed
        assert await held == "a"

    run(test())


# --- faults and ends ------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [RuntimeError("out of smoke"), MemoryError("out of paper")])
def test_a_step_that_fails_is_heard_of_by_every_reader(
    make_engine: MakeEngine, fault: Exception
) -> None:
    async def test() -> None:
        gate = Gate()
        inner = make_engine(executor=gate, max_num_seqs=2, ingress_capacity=3)
        async with AsyncEngine(inner) as engine:
            held = await gate.hold(engine)
            # In the ring, and outside waiting for room.
            readers = [
                asyncio.create_task(text_of(engine.generate("x", tokens(5)))) for _ in range(6)
            ]
            await asyncio.sleep(0)
            gate.fault = fault
            gate.may_pass.set()
            replies = await asyncio.gather(held, *readers, return_exceptions=True)
            message = f"the step loop died of {type(fault).__name__}: {fault}"
            assert [(type(one), str(one)) for one in replies] == [(EngineStopped, message)] * 7
            assert isinstance(replies[0], EngineStopped) and replies[0].__cause__ is fault
            # And by everybody who comes later, also where the ring is full.
            for _ in range(5):
                with pytest.raises(EngineStopped, match=str(fault)):
                    await text_of(engine.generate("x"))
                await engine.abort("held")
        assert gate.is_closed

    run(test())


def test_shutdown_ends_what_is_unfinished(make_engine: MakeEngine) -> None:
    async def test() -> None:
        gate = Gate(num_free=3)
        engine = AsyncEngine(make_engine(executor=gate, max_num_seqs=1, ingress_capacity=2))
        streams = [engine.generate("x", tokens(700)) for _ in range(5)]
        begun = await anext(streams[0])
        assert begun.outputs[0].text.startswith("a")
        readers = [asyncio.create_task(text_of(stream)) for stream in streams[1:]]
        await asyncio.sleep(0)
        stopping = asyncio.create_task(engine.shutdown())
        await asyncio.sleep(0)
        gate.may_pass.set()
        await stopping
        await engine.shutdown()
        replies = await asyncio.gather(*readers, return_exceptions=True)
        assert [type(reply) for reply in replies] == [EngineStopped] * 4
        with pytest.raises(EngineStopped, match=r"^the engine has been stopped$"):
            async for _ in streams[0]:
                pass
        with pytest.raises(EngineStopped):
            await text_of(engine.generate("late"))
        assert gate.is_closed

    run(test())


def test_shutdown_of_an_idle_engine_returns(make_engine: MakeEngine) -> None:
    """Many times, because a wake-up lost between two threads is lost rarely."""

    async def test() -> None:
        for _ in range(200):
            engine = AsyncEngine(make_engine())
            engine.start()
            await engine.shutdown()

    run(test())


def test_an_engine_that_was_never_started_can_be_shut_down(make_engine: MakeEngine) -> None:
    async def test() -> None:
        engine = AsyncEngine(make_engine())
        await engine.shutdown()
        with pytest.raises(EngineStopped):
            await text_of(engine.generate("x"))

    run(test())
