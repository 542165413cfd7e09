"""Many readers at once: streams, ends, faults, and a full queue."""

from __future__ import annotations

import asyncio
import threading
import traceback
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
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
from headway.engine.client import StepReport
from headway.engine.engine import Engine
from headway.engine.outputs import EngineOutput, RequestOutput
from headway.executor.base import ModelRunnerOutput

MakeEngine = Callable[..., Engine]

#: Longer than any of these tests should take, so that one that hangs fails.
TIMEOUT = 60.0


@pytest.fixture
def make_engine(make_engine: MakeEngine) -> Iterator[MakeEngine]:
    """The same, for engines whose step thread has ended: commands may have come too late for it."""
    engines: list[Engine] = []

    def make(**settings: Any) -> Engine:
        engines.append(make_engine(**settings))
        return engines[-1]

    yield make
    for engine in engines:
        assert not engine.scheduler.has_unfinished_requests
        engine.abort_all()


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


async def last_of(stream: AsyncIterator[RequestOutput]) -> RequestOutput:
    """The last output of a stream."""
    return [output async for output in stream][-1]


async def text_of_rest(stream: AsyncIterator[RequestOutput]) -> str:
    """The whole text of a stream that has been read in part."""
    return (await last_of(stream)).outputs[0].text


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
        return ModelRunnerOutput([(ord("a"),) * len(row.seeds) for row in output])

    def close(self) -> None:
        self.is_closed = True

    def let_one_pass(self) -> None:
        """The step that waits may go on; the next one waits."""
        passing, self.may_pass = self.may_pass, threading.Event()
        self.is_inside.clear()
        passing.set()

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
            stream = engine.generate(list(story[:6].encode()), tokens(3))
            outputs = [output async for output in stream]
            assert outputs[-1].outputs[0].token_ids == list(story[6:9].encode())
            with pytest.raises(InvalidRequest, match="no tokenizer"):
                await text_of(engine.generate("text"))

    run(test())


def test_a_slow_reader_slows_no_other(make_engine: MakeEngine, story: str) -> None:
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
            await engine.set_priority("c", -5)
            await engine.set_priority("unknown", -5)
            gate.may_pass.set()
            await asyncio.gather(held, *readers)
            assert ended == ["c", "a", "b"]

    run(test())


# --- readers that go ------------------------------------------------------------------------------


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
            await engine.abort("unknown")
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


def test_an_id_can_be_used_again_while_the_end_of_the_last_is_unread(
    make_engine: MakeEngine, story: str
) -> None:
    async def test() -> None:
        async with AsyncEngine(make_engine()) as engine:
            old = engine.generate(story[:6], tokens(9), "same")
            begun = (await anext(old)).new_text
            while engine.get_request("same") is not None:
                await asyncio.sleep(0)
            assert await text_of(engine.generate(story[:8], tokens(3), "same")) == story[8:11]
            assert begun + "".join([output.new_text async for output in old]) == story[6:15]
            assert await text_of(engine.generate(story[:7], tokens(3), "same")) == story[7:10]
            await engine.drain()

    run(test())


def test_an_abort_that_comes_too_late_does_not_end_the_next_request_of_the_id(
    make_engine: MakeEngine,
) -> None:
    """The slow reader's request has ended by itself before its abort is on its way."""

    async def test() -> None:
        gate = Gate(num_free=1)
        has_ended = threading.Event()

        def listen(_: StepReport, outputs: Sequence[EngineOutput]) -> None:
            if any(output.is_last for output in outputs):
                has_ended.set()

        async with AsyncEngine(make_engine(executor=gate), max_buffered_tokens=10) as engine:
            engine.add_listener(listen)
            slow = engine.generate("x", tokens(60), "same")
            await anext(slow)
            gate.may_pass.set()
            assert has_ended.wait(TIMEOUT)  # the loop stands still, and all is delivered at once
            await asyncio.sleep(0)
            assert len(await text_of(engine.generate("x", tokens(5), "same"))) == 5
            with pytest.raises(SlowReader):
                await text_of_rest(slow)

    run(test())


def test_an_id_is_handed_from_reader_to_reader(make_engine: MakeEngine) -> None:
    """Each leaves before anything has come; the last one stays."""

    async def test() -> None:
        gate = Gate()
        async with AsyncEngine(make_engine(executor=gate)) as engine:
            held = await gate.hold(engine)
            for _ in range(5):
                leaving = asyncio.create_task(text_of(engine.generate("x", tokens(9), "same")))
                await asyncio.sleep(0)
                leaving.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await leaving
            last = asyncio.create_task(text_of(engine.generate("x", tokens(3), "same")))
            await asyncio.sleep(0)
            gate.may_pass.set()
            assert await asyncio.gather(held, last) == ["a", "aaa"]
            await engine.drain(timeout=TIMEOUT)
            assert engine.list_requests() == []

    run(test())


# --- refusals -------------------------------------------------------------------------------------


def test_a_duplicate_id_costs_its_neighbour_nothing(make_engine: MakeEngine, story: str) -> None:
    async def test() -> None:
        gate = Gate(num_free=3)
        async with AsyncEngine(make_engine(executor=gate)) as engine:
            stream = engine.generate(story[:6], tokens(20), "same")
            await anext(stream)
            with pytest.raises(DuplicateRequest, match="request id 'same' is in use"):
                await text_of(engine.generate(story[:9], tokens(20), "same"))
            gate.may_pass.set()
            assert await text_of_rest(stream) == "a" * 20

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


def test_a_full_ring_is_waited_for(make_engine: MakeEngine) -> None:
    async def test() -> None:
        gate = Gate()
        inner = make_engine(executor=gate, ingress_capacity=2)
        async with AsyncEngine(inner) as engine:
            held = await gate.hold(engine)
            readers = [
                asyncio.create_task(text_of(engine.generate("x", tokens(2)))) for _ in range(6)
            ]
            await asyncio.sleep(0)
            assert inner.num_ingress_refusals == 4
            gate.may_pass.set()
            assert await asyncio.gather(held, *readers) == ["a"] + ["aa"] * 6

    run(test())


def test_a_full_queue_lets_the_urgent_in_and_turns_the_least_urgent_away(
    make_engine: MakeEngine,
) -> None:
    async def test() -> None:
        gate = Gate()
        inner = make_engine(executor=gate, max_num_seqs=2, max_num_queued_reqs=2)
        async with AsyncEngine(inner) as engine:
            held = await gate.hold(engine)
            ended: list[str] = []

            async def read(name: str, priority: int) -> str:
                count = 3 if priority == 0 else 9
                text = await text_of(engine.generate("x", tokens(count), name, priority=priority))
                ended.append(name)
                return text

            batch = [asyncio.create_task(read(f"batch{i}", 5)) for i in range(4)]
            await asyncio.sleep(0)
            urgent = asyncio.create_task(read("urgent", 0))
            await asyncio.sleep(0)
            gate.may_pass.set()
            assert await urgent == "aaa"
            with pytest.raises(QueueFull, match="2 requests at least as urgent") as caught:
                await batch.pop()
            assert caught.value.retry_after > 0
            assert await asyncio.gather(held, *batch) == ["a"] + ["a" * 9] * 3
            assert ended[0] == "urgent", "it went first, although it came last"

    run(test())


def test_the_more_urgent_takes_the_place_of_one_that_waits(make_engine: MakeEngine) -> None:
    async def test() -> None:
        gate = Gate()
        inner = make_engine(executor=gate, max_num_seqs=1, max_num_queued_reqs=1)
        async with AsyncEngine(inner) as engine:
            held = await gate.hold(engine)
            waiting = asyncio.create_task(text_of(engine.generate("x", tokens(2), priority=5)))
            await asyncio.sleep(0)
            urgent = [
                asyncio.create_task(text_of(engine.generate("x", tokens(2), priority=4)))
                for _ in range(2)
            ]
            await asyncio.sleep(0)
            gate.may_pass.set()
            with pytest.raises(QueueFull) as caught:
                await waiting
            assert caught.value.retry_after > 0
            assert await asyncio.gather(held, *urgent) == ["a", "aa", "aa"]

    run(test())


# --- asking ---------------------------------------------------------------------------------------


def test_requests_can_be_listed_while_a_step_is_stuck(make_engine: MakeEngine) -> None:
    """The answers come from what was published: the step thread has no part in them."""

    async def test() -> None:
        gate = Gate()
        async with AsyncEngine(make_engine(executor=gate, max_num_seqs=1)) as engine:
            assert engine.list_requests() == []
            held = await gate.hold(engine)
            readers = [
                asyncio.create_task(text_of(engine.generate("x", tokens(2), name, priority=rank)))
                for name, rank in (("first", 3), ("second", 0), ("third", 7))
            ]
            await asyncio.sleep(0)
            assert not gate.may_pass.is_set()
            infos = engine.list_requests()
            assert [info.request_id for info in infos] == ["held", "first", "second", "third"]
            assert {info.status for info in infos} == {"waiting"}, "nothing has been published"
            assert engine.list_requests(limit=2) == infos[:2]
            gate.num_free = 1
            gate.is_inside.clear()
            gate.may_pass.set()
            assert await held == "a"
            await asyncio.gather(*readers)
            assert engine.list_requests() == []
            assert engine.get_request("held") is None

    run(test())


def test_an_answer_is_as_of_the_latest_step(make_engine: MakeEngine) -> None:
    async def test() -> None:
        gate = Gate(num_free=3)
        inner = make_engine(executor=gate, max_num_seqs=1, max_num_batched_tokens=4)
        async with AsyncEngine(inner) as engine:
            stream = engine.generate("x" * 7, tokens(50), "mine", priority=3, tenant="t")
            begun = await anext(stream)
            while len(begun.outputs[0].token_ids) < 2:
                begun = await anext(stream)
            waiting = [
                asyncio.create_task(text_of(engine.generate("x", tokens(2), name, priority=rank)))
                for name, rank in (("c", 9), ("a", 4), ("b", 4))
            ]
            await asyncio.to_thread(gate.is_inside.wait, TIMEOUT)
            gate.let_one_pass()  # with the next step, the others enter the queue
            await asyncio.to_thread(gate.is_inside.wait, TIMEOUT)
            gate.let_one_pass()
            await asyncio.to_thread(gate.is_inside.wait, TIMEOUT)
            while (found := engine.get_request("c")) is None or found.rank != 3:
                await asyncio.sleep(0)
            mine, *others = engine.list_requests()
            assert (mine.request_id, mine.tenant) == ("mine", "t")
            assert (mine.status, mine.priority, mine.rank) == ("running", 3, 0)
            assert (mine.num_prompt_tokens, mine.max_tokens, mine.num_sequences) == (7, 50, 1)
            assert mine.num_output_tokens >= 2
            assert mine.num_computed_tokens == 7 + mine.num_output_tokens - 1
            assert mine.predicted_wait == 0
            assert [info.request_id for info in others] == ["a", "b", "c"]
            assert [info.rank for info in others] == [1, 2, 3]
            assert {info.status for info in others} == {"waiting"}
            waits = [info.predicted_wait for info in others]
            assert 0 < waits[0] < waits[1] < waits[2]
            for info in others:
                again = engine.get_request(info.request_id)
                assert again is not None
                assert again._replace(age=info.age) == info
            assert engine.get_request("mine") is None, "it is another tenant's"
            of_tenant = engine.list_requests(tenant="t")
            assert [(info.request_id, info.rank) for info in of_tenant] == [("mine", 0)]
            assert [info.request_id for info in engine.list_requests(tenant="", limit=2)] == [
                "a",
                "b",
            ]
            gate.may_pass.set()
            assert len(await text_of_rest(stream)) == 50
            await asyncio.gather(*waiting)

    run(test())


def test_a_forecast_is_about_what_it_takes(make_engine: MakeEngine) -> None:
    """Twelve requests on two slots; the simulated clock tells when each was in a step."""

    async def test() -> None:
        inner = make_engine(max_num_seqs=2)
        async with AsyncEngine(inner) as engine:
            predicted: dict[str, float] = {}
            num_steps = 0
            are_submitted, is_seen, may_go_on = (threading.Event() for _ in range(3))

            def look(report: StepReport, _: object) -> None:
                nonlocal num_steps
                num_steps += report.result is not None
                assert are_submitted.wait(TIMEOUT)
                if num_steps == 25:  # the cost model has seen some steps
                    is_seen.set()
                    assert may_go_on.wait(TIMEOUT)

            engine.add_listener(look)
            firsts: dict[str, float] = {}

            async def read(name: str) -> None:
                async for output in engine.generate("It was", tokens(20), name):
                    if output.metrics is not None:
                        firsts[name] = output.metrics.first_scheduled_time or 0.0

            names = [f"r{index:02}" for index in range(12)]
            readers = [asyncio.create_task(read(name)) for name in names]
            await asyncio.sleep(0)
            are_submitted.set()
            await asyncio.to_thread(is_seen.wait, TIMEOUT)
            await asyncio.sleep(0)
            at = engine.now()
            for info in engine.list_requests():
                if info.status == "waiting":
                    predicted[info.request_id] = info.predicted_wait
            may_go_on.set()
            await asyncio.gather(*readers)
            assert len(predicted) == 8
            for name, wait in predicted.items():
                assert wait == pytest.approx(firsts[name] - at, rel=0.3, abs=0.1)

    run(test())


def test_what_is_said_of_a_request_does_not_depend_on_who_is_faster(
    make_engine: MakeEngine,
) -> None:
    """The engine may have done a step for a request before the loop notes that it was let in."""

    async def test() -> None:
        gate = Gate(num_free=1)
        inner = make_engine(executor=gate)
        async with AsyncEngine(inner) as engine:
            wake, is_done = inner.on_ingress, threading.Event()
            inner.listeners.append(lambda step, outputs: is_done.set())

            def wake_and_wait() -> None:
                wake()
                assert is_done.wait(TIMEOUT)

            inner.on_ingress = wake_and_wait
            stream = engine.generate("xyz", tokens(2), "a")
            output = await anext(stream)
            assert output.new_token_ids == [ord("a")]
            info = engine.get_request("a")
            gate.may_pass.set()
            assert await text_of_rest(stream) == "aa"
            assert info is not None
            assert (info.num_output_tokens, info.num_prompt_tokens) == (1, 3)

    run(test())


def test_what_is_asked_when_the_step_loop_has_died(make_engine: MakeEngine) -> None:
    async def test() -> None:
        gate = Gate()
        async with AsyncEngine(make_engine(executor=gate)) as engine:
            held = await gate.hold(engine)
            assert engine.get_request("held") is not None
            gate.fault = RuntimeError("boom")
            gate.may_pass.set()
            with pytest.raises(EngineStopped):
                await held
            assert engine.list_requests() == []
            assert engine.get_request("held") is None
            assert engine.statistics.num_finished == 1
            while engine.is_alive:  # the reader hears of it a moment before
                await asyncio.sleep(0)
            assert engine.failure is gate.fault

    run(test())


# --- tenants --------------------------------------------------------------------------------------


def test_ids_are_a_tenant_s_own(make_engine: MakeEngine) -> None:
    async def test() -> None:
        gate = Gate()
        async with AsyncEngine(make_engine(executor=gate)) as engine:
            held = await gate.hold(engine)
            streams = {
                tenant: engine.generate("x", tokens(2), "same", tenant=tenant, priority=rank)
                for rank, tenant in enumerate(("", "a", "b"))
            }
            last = {tenant: asyncio.create_task(last_of(of)) for tenant, of in streams.items()}
            await asyncio.sleep(0)
            with pytest.raises(DuplicateRequest, match="request id 'same' is in use"):
                await text_of(engine.generate("x", tenant="a", request_id="same"))
            infos = engine.list_requests()
            assert [(info.tenant, info.request_id) for info in infos[1:]] == [
                ("", "same"),
                ("a", "same"),
                ("b", "same"),
            ]
            await engine.set_priority("same", 7, "a")
            await engine.abort("same", "b")
            gate.may_pass.set()
            outputs = {tenant: await task for tenant, task in last.items()}
            assert {output.request_id for output in outputs.values()} == {"same"}
            assert outputs["b"].outputs[0].finish_reason == "abort"
            assert outputs["a"].outputs[0].text == outputs[""].outputs[0].text == "aa"
            assert await held == "a"

    run(test())


def test_a_tenant_s_name_holds_no_slash(make_engine: MakeEngine) -> None:
    """Or it could name another tenant's request."""

    async def test() -> None:
        async with AsyncEngine(make_engine()) as engine:
            with pytest.raises(InvalidRequest, match=r"^tenant is 'a/b', must not hold a slash$"):
                await text_of(engine.generate("x", tenant="a/b"))
            # Ids may: this is not the request "c" of tenant "b/", nor any other of tenant "a".
            await text_of(engine.generate("x", tokens(1), "b/c", tenant="a"))

    run(test())


@pytest.mark.parametrize(
    ("first", "second", "is_shared"),
    [
        ({}, {}, True),
        ({"tenant": "a"}, {"tenant": "a"}, True),
        ({"tenant": "a"}, {"tenant": "b"}, False),
        ({"tenant": "a"}, {}, False),
        ({"tenant": "a", "cache_group": "g"}, {"tenant": "b", "cache_group": "g"}, True),
        ({"tenant": "a", "cache_group": "g"}, {"tenant": "g"}, False),
        ({"tenant": "a", "cache_salt": "s"}, {"tenant": "a"}, False),
        ({"cache_salt": "s"}, {"cache_salt": "s"}, True),
        ({"cache_salt": "s"}, {"cache_salt": "t"}, False),
        (
            {"tenant": "a", "cache_group": "g", "cache_salt": "s"},
            {"tenant": "b", "cache_group": "g", "cache_salt": "s"},
            True,
        ),
    ],
)
def test_who_finds_whose_prompt_in_the_prefix_cache(
    make_engine: MakeEngine,
    story: str,
    first: dict[str, str],
    second: dict[str, str],
    is_shared: bool,
) -> None:
    async def test() -> None:
        async with AsyncEngine(make_engine()) as engine:
            await text_of(engine.generate(story[:18], tokens(1), **first))
            stream = engine.generate(story[:18], tokens(2), **second)
            outputs = [output async for output in stream]
            assert outputs[0].num_cached_tokens == (16 if is_shared else 0)
            assert outputs[-1].outputs[0].text == story[18:20]

    run(test())


# --- draining, slow readers -----------------------------------------------------------------------


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


def test_draining_ends_requests_that_take_too_long(make_engine: MakeEngine) -> None:
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
            while engine.get_request("slow") is not None:
                await asyncio.sleep(0)
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
            ranking = asyncio.create_task(engine.set_priority("ranked", -5))
            with pytest.raises(InvalidRequest, match="must be an int64"):
                await engine.set_priority("ranked", 2**63)
            assert (await last).outputs[0].finish_reason == "abort"
            gate.may_pass.set()
            assert await asyncio.gather(held, in_ring) == ["a", "a"]
            assert (await output).outputs[0].text == "a"
            await ranking

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
            assert [(type(reply), str(reply)) for reply in replies] == [
                (EngineStopped, message)
            ] * 7
            assert isinstance(replies[0], EngineStopped) and replies[0].__cause__ is fault
            # And by every reader who comes later, also where the ring is full.
            for _ in range(5):
                with pytest.raises(EngineStopped, match=str(fault)):
                    await text_of(engine.generate("x"))
                await engine.abort("held")
        assert gate.is_closed

    run(test())


def test_an_error_that_many_readers_share_does_not_grow_with_them(make_engine: MakeEngine) -> None:
    async def test() -> None:
        gate = Gate()
        inner = make_engine(executor=gate)
        async with AsyncEngine(inner) as engine:
            held = await gate.hold(engine)
            readers = [
                asyncio.create_task(text_of(engine.generate("x", tokens(5)))) for _ in range(50)
            ]
            await asyncio.sleep(0)
            gate.fault = RuntimeError("boom")
            gate.may_pass.set()
            replies = await asyncio.gather(held, *readers, return_exceptions=True)
            for _ in range(50):
                with pytest.raises(EngineStopped) as caught:
                    await text_of(engine.generate("x"))
            for error in (*replies, caught.value):
                assert isinstance(error, EngineStopped)
                assert len(traceback.extract_tb(error.__traceback__)) < 10

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


@pytest.mark.parametrize("way", ["drain", "shutdown", "death"])
def test_requests_whose_readers_have_gone_do_not_hold_up_the_end(
    make_engine: MakeEngine, way: str
) -> None:
    """Aborts of theirs are on their way, some outside a full ring, while a step is stuck."""

    async def test() -> None:
        gate = Gate()
        inner = make_engine(executor=gate, max_num_seqs=1, ingress_capacity=2)
        async with AsyncEngine(inner) as engine:
            held = await gate.hold(engine)
            readers = [
                asyncio.create_task(text_of(engine.generate("x", tokens(5), f"{index}")))
                for index in range(4)
            ]
            await asyncio.sleep(0)
            for reader in readers:  # two in the ring, two that wait for room
                reader.cancel()
            await asyncio.gather(*readers, return_exceptions=True)
            again = asyncio.create_task(text_of(engine.generate("x", tokens(2), "0")))
            await asyncio.sleep(0)
            if way == "death":
                gate.fault = RuntimeError("boom")
            if way == "shutdown":
                ending = asyncio.create_task(engine.shutdown())
            else:
                ending = asyncio.create_task(engine.drain())
            await asyncio.sleep(0)
            gate.may_pass.set()
            await ending
            replies = await asyncio.gather(held, again, return_exceptions=True)
            assert isinstance(replies[1], EngineStopped)
            if way == "death":
                assert isinstance(replies[0], EngineStopped)
            else:
                assert replies[0] == "a"
            assert engine.list_requests() == []

    run(test())


def test_draining_ends_a_group_that_takes_too_long(make_engine: MakeEngine) -> None:
    async def test() -> None:
        gate = Gate(num_free=2)
        inner = make_engine(executor=gate)
        async with AsyncEngine(inner) as engine:
            stream = engine.generate("x", tokens(100), n=3)
            await anext(stream)
            await engine.drain(timeout=0)
            with pytest.raises(EngineStopped, match="0 s were not enough"):
                async for _ in stream:
                    pass
            gate.may_pass.set()

    run(test())


def test_a_reader_of_a_group_that_does_not_read_costs_a_bounded_buffer(
    make_engine: MakeEngine,
) -> None:
    async def test() -> None:
        async with AsyncEngine(make_engine(), max_buffered_tokens=10) as engine:
            slow = engine.generate("x", tokens(100), "slow", n=4)
            await anext(slow)
            while engine.get_request("slow") is not None:
                await asyncio.sleep(0)
            with pytest.raises(SlowReader, match=r"4\d tokens wait to be read, at most 40 may"):
                async for _ in slow:
                    pass

    run(test())
