"""The step loop: requests in, outputs out, and no request pays for another's mistake."""

from __future__ import annotations

import logging
import pickle
import threading
from collections.abc import Callable, Sequence
from copy import deepcopy
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from headway.core import invariants
from headway.core.config import SchedulerConfig
from headway.core.errors import (
    DuplicateRequest,
    EngineStopped,
    InvalidRequest,
    QueueFull,
    RequestTooLong,
)
from headway.core.request import Request, RequestStatus, SamplingParams
from headway.core.scheduler import PriorityScheduler
from headway.engine.client import EngineStatistics, StepReport
from headway.engine.engine import Engine
from headway.engine.llm import LLM
from headway.engine.outputs import EngineOutput, RequestOutput

MakeEngine = Callable[..., Engine]
Drain = Callable[[Engine], list[EngineOutput]]

YIELDED = {RequestStatus.PAUSED, RequestStatus.SWAPPED, RequestStatus.PREEMPTED}


def ask(
    request_id: str,
    prompt: str | Sequence[int],
    max_tokens: int = 8,
    priority: int = 0,
    **more: Any,
) -> Request:
    """A request for what follows the first bytes of the story."""
    tokens = list(prompt.encode()) if isinstance(prompt, str) else prompt
    params = SamplingParams(max_tokens=max_tokens, **more)
    return Request(request_id, priority, prompt_token_ids=tokens, sampling_params=params)


def texts(outputs: Sequence[EngineOutput]) -> dict[str, str]:
    """What each request got, in the order in which the first pieces came."""
    result: dict[str, str] = {}
    for output in outputs:
        request_id = output.request_id
        result[request_id] = result.get(request_id, "") + output.text
    return result


def ends(outputs: Sequence[EngineOutput]) -> dict[str, str]:
    """Why each request ended, in the order in which they did."""
    return {output.request_id: output.finish_reason for output in outputs if output.finish_reason}


# --- what comes out -------------------------------------------------------------------------------


def test_text_and_tokens_come_out_step_by_step(
    make_engine: MakeEngine, drain: Drain, story: str
) -> None:
    engine = make_engine()
    engine.submit(ask("a", story[:6], 5))
    outputs = drain(engine)
    assert [output.text for output in outputs] == list(story[6:11])
    assert [output.token_ids for output in outputs] == [(ord(c),) for c in story[6:11]]
    assert ends(outputs) == {"a": "length"}
    assert engine.step() == []


def test_without_a_tokenizer_only_tokens_come_out(
    make_engine: MakeEngine, drain: Drain, story: str
) -> None:
    engine = make_engine(tokenizer=None)
    engine.submit(ask("a", story[:6], 3))
    assert [(output.text, *output.token_ids) for output in drain(engine)] == [
        ("", ord(character)) for character in story[6:9]
    ]


def test_half_a_character_is_replaced_where_the_length_ends_it(
    make_engine: MakeEngine, drain: Drain, story: str
) -> None:
    engine = make_engine()
    engine.submit(ask("a", story[: story.index("—") - 1], 2))
    assert texts(drain(engine)) == {"a": " \ufffd"}


def test_a_stop_text_is_not_part_of_the_output(
    make_engine: MakeEngine, drain: Drain, story: str
) -> None:
    engine = make_engine()
    request = ask("a", story[:7], 40, stop=("night", "stormy"))
    engine.submit(request)
    outputs = drain(engine)
    assert texts(outputs) == {"a": "a dark and "}
    assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == ("stop", "stormy")
    assert request.status is RequestStatus.FINISHED_STOPPED


def test_a_stop_text_in_the_last_token_counts(
    make_engine: MakeEngine, drain: Drain, story: str
) -> None:
    engine = make_engine()
    engine.submit(ask("a", story[:7], 5, stop=("dar",)))
    outputs = drain(engine)
    assert (texts(outputs), outputs[-1].stop_reason) == ({"a": "a "}, "dar")


def test_the_beginning_of_a_stop_text_is_handed_out_at_the_end(
    make_engine: MakeEngine, drain: Drain, story: str
) -> None:
    engine = make_engine()
    engine.submit(ask("a", story[:7], 5, stop=("dart",)))
    assert texts(drain(engine)) == {"a": "a dar"}


def test_a_stop_token_ends_the_output_and_is_named(
    make_engine: MakeEngine, drain: Drain, story: str
) -> None:
    engine = make_engine()
    engine.submit(ask("a", story[:7], 40, stop_token_ids=frozenset({ord("k")})))
    outputs = drain(engine)
    assert texts(outputs) == {"a": "a dar"}
    assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == ("stop", ord("k"))
    assert outputs[-1].token_ids == (ord("k"),)


@pytest.mark.parametrize(
    ("ignore_eos", "text", "reason"), [(False, "a dar", "stop"), (True, "a dark an", "length")]
)
def test_the_end_token_ends_the_output_unless_told_otherwise(
    make_engine: MakeEngine, drain: Drain, story: str, ignore_eos: bool, text: str, reason: str
) -> None:
    engine = make_engine(eos_token_ids=frozenset({ord("k")}))
    engine.submit(ask("a", story[:7], 9, ignore_eos=ignore_eos))
    outputs = drain(engine)
    assert (texts(outputs), ends(outputs)) == ({"a": text}, {"a": reason})
    assert outputs[-1].stop_reason is None


# --- who goes next --------------------------------------------------------------------------------


def test_the_urgent_request_goes_next(make_engine: MakeEngine, drain: Drain, story: str) -> None:
    engine = make_engine(max_num_seqs=1)
    engine.submit(ask("batch", story[:6], 20, priority=5))
    begun = [output for _ in range(4) for output in engine.step()]
    engine.submit(ask("urgent", story[:10], 3, priority=0))
    outputs = drain(engine)
    assert [output.request_id for output in outputs[:4]] == ["urgent"] * 3 + ["batch"]
    assert texts(begun + outputs) == {"batch": story[6:26], "urgent": story[10:13]}


def test_set_priority_takes_effect_with_the_next_step(
    make_engine: MakeEngine, drain: Drain, story: str
) -> None:
    engine = make_engine(max_num_seqs=1)
    for request_id in ("a", "b", "c"):
        engine.submit(ask(request_id, story[:6], 3, priority=1))
    begun = engine.step()
    engine.set_priority("c", 0)
    engine.set_priority("unknown", 0)
    assert list(ends(begun + drain(engine))) == ["c", "a", "b"]
    with pytest.raises(InvalidRequest, match=r"priority of request 'a' is 1\.5, must be an int64"):
        engine.set_priority("a", 1.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["none", "pause", "tail", "swap", "recompute", "auto"])
def test_a_request_that_had_to_yield_gets_the_same_text(
    make_engine: MakeEngine, drain: Drain, story: str, mode: str
) -> None:
    engine = make_engine(
        preemption_mode=mode,
        max_num_seqs=3,
        max_num_batched_tokens=7,
        num_blocks=20,
        num_swap_blocks=30,
    )
    outputs: list[EngineOutput] = []
    for index in range(12):
        engine.submit(ask(f"{index}", story[: 5 + 3 * index], 20, priority=-(index % 5)))
        outputs += [output for _ in range(6) for output in engine.step()]
    outputs += drain(engine)
    assert texts(outputs) == {f"{n}": story[5 + 3 * n : 25 + 3 * n] for n in range(12)}
    assert set(ends(outputs).values()) == {"length"}
    assert sum(engine.statistics.preemptions.values()) > 0


def test_listeners_are_told_of_every_step_and_of_what_came_out(
    make_engine: MakeEngine, drain: Drain, story: str
) -> None:
    engine = make_engine()
    told: list[tuple[StepReport, list[EngineOutput]]] = []
    engine.listeners.append(lambda step, outputs: told.append((step, list(outputs))))
    engine.submit(ask("a", story[:6], 3))
    outputs = drain(engine)
    assert [output for _, of_step in told for output in of_step] == outputs
    assert len(told) == 3
    for step, _ in told:
        assert step.start <= step.execute_start < step.execute_end <= step.end
        assert step.result is not None
        assert [row.request_id for row in step.output] == ["a"]
    assert [change.status for step, _ in told for change in step.changes] == [
        RequestStatus.WAITING,
        RequestStatus.RUNNING,
        RequestStatus.FINISHED_LENGTH_CAPPED,
    ]


def test_a_report_does_not_change_after_its_step(
    make_engine: MakeEngine, drain: Drain, story: str
) -> None:
    """Whatever happens to the requests later: it can be kept, and sent elsewhere."""
    engine = make_engine(max_num_seqs=2, num_blocks=8, num_swap_blocks=8, preemption_mode="swap")
    kept: list[tuple[StepReport, list[EngineOutput]]] = []
    copies: list[bytes] = []

    def keep(step: StepReport, outputs: Sequence[EngineOutput]) -> None:
        kept.append((step, list(outputs)))
        copies.append(pickle.dumps(kept[-1]))

    engine.listeners.append(keep)
    for index in range(6):
        engine.submit(ask(f"{index}", story[: 5 + index], 9, priority=-index))
        engine.step()
    drain(engine)
    assert len(kept) > 20
    assert [pickle.loads(copy) for copy in copies] == kept


def test_statistics_are_a_value_published_after_every_step(
    make_engine: MakeEngine, drain: Drain, story: str
) -> None:
    engine = make_engine(
        max_num_seqs=1,
        num_blocks=16,
        preemption_mode="recompute",
        enable_prefix_caching=False,
    )
    before = engine.statistics
    assert before.num_running == before.num_waiting == before.num_finished == 0
    published: list[EngineStatistics] = []
    copies: list[EngineStatistics] = []

    def look(step: StepReport, outputs: Sequence[EngineOutput]) -> None:
        published.append(engine.statistics)
        copies.append(deepcopy(engine.statistics))

    engine.listeners.append(look)
    engine.submit(ask("victim", story[:20], 9, priority=1))
    engine.submit(ask("waiting", story[:5], 9, priority=2))
    engine.step()
    assert engine.statistics is published[0], "until the next step it is this one"
    assert (published[0].num_running, published[0].num_waiting) == (1, 1)
    assert published[0].num_queued_tokens == 5
    assert published[0].kv_cache_usage == 5 / 16
    engine.submit(ask("urgent", story[:50], 2, priority=0))
    drain(engine)
    assert published == copies, "none has changed since"
    last = published[-1]
    assert (last.num_finished, last.num_running, last.kv_cache_usage) == (3, 0, 0)
    assert sum(last.preemptions.values()) == 1
    assert last.recomputed_tokens[1] > 0
    with pytest.raises(AttributeError):
        last.num_running = 1  # type: ignore[misc]


# --- refusals -------------------------------------------------------------------------------------


def test_what_can_never_be_served_is_refused_at_once(
    make_engine: MakeEngine, drain: Drain, story: str
) -> None:
    engine = make_engine(max_model_len=40)
    engine.submit(ask("good", story[:6], 3))
    for prompt, message in (
        (story[:40], r"'bad' has 40 tokens, the context is 40 tokens"),
        ([5, 258], r"'bad' has token id 258, the vocabulary is 0 … 257"),
        ([5, 2**40], r"token id 1099511627776, the vocabulary is 0 … 257"),
    ):
        with pytest.raises(InvalidRequest, match=message) as caught:
            engine.submit(ask("bad", prompt))
        assert "\n" not in str(caught.value)
    assert texts(drain(engine)) == {"good": story[6:9]}


def test_what_the_pool_could_never_hold_is_refused(make_engine: MakeEngine, story: str) -> None:
    engine = make_engine(num_blocks=5)
    with pytest.raises(RequestTooLong, match="has 20 tokens, the whole KV pool holds 20 tokens"):
        engine.submit(ask("long", story[:20]))


def test_a_duplicate_id_costs_its_neighbour_nothing(
    make_engine: MakeEngine, drain: Drain, story: str
) -> None:
    engine = make_engine()
    engine.submit(ask("same", story[:6], 4))
    engine.submit(ask("same", story[:9], 4))
    outputs = drain(engine)
    (refusal,) = [output for output in outputs if output.error is not None]
    assert (refusal.finish_reason, refusal.is_last) == ("rejected", True)
    assert str(refusal.error) == "request id 'same' is in use"
    assert "".join(output.text for output in outputs) == story[6:10]


def test_a_request_cannot_be_submitted_twice(
    make_engine: MakeEngine, drain: Drain, story: str
) -> None:
    engine = make_engine()
    request = ask("a", story[:6], 4)
    engine.submit(request)
    drain(engine)
    engine.submit(request)
    (refusal,) = drain(engine)
    assert isinstance(refusal.error, InvalidRequest)
    assert str(refusal.error) == "request 'a' is finished_length_capped; add a fresh one"


def test_every_choice_of_a_refused_group_gets_a_reply(
    make_engine: MakeEngine, drain: Drain, story: str
) -> None:
    engine = make_engine()
    engine.submit(ask("same", story[:6], 4))
    engine.step()
    engine.submit(Request("same", prompt_token_ids=[65], n=3))
    refused = [output for output in engine.step() if output.finish_reason == "rejected"]
    assert [output.index for output in refused] == [0, 1, 2]
    assert [output.is_last for output in refused] == [False, False, True]
    assert isinstance(refused[-1].error, DuplicateRequest)
    drain(engine)


def test_a_full_ring_refuses_until_the_next_step(
    make_engine: MakeEngine, drain: Drain, story: str
) -> None:
    engine = make_engine(ingress_capacity=2)
    engine.submit(ask("a", story[:6], 3))
    engine.submit(ask("b", story[:7], 3))
    for attempt in (
        lambda: engine.submit(ask("c", story[:8], 3)),
        lambda: engine.abort("a"),
        lambda: engine.set_priority("a", 3),
    ):
        with pytest.raises(QueueFull, match=r"^2 requests have arrived since the last step"):
            attempt()
    outputs = engine.step()
    engine.submit(ask("c", story[:8], 3))
    assert texts(outputs + drain(engine)) == {
        "a": story[6:9],
        "b": story[7:10],
        "c": story[8:11],
    }


# --- listening ------------------------------------------------------------------------------------


def test_listeners_are_told_of_every_end_and_how_it_came(
    make_engine: MakeEngine, drain: Drain, story: str
) -> None:
    engine = make_engine(max_num_seqs=1, max_num_queued_reqs=2)
    told: list[tuple[str, str | None, str]] = []

    def listen(_: StepReport, outputs: Sequence[EngineOutput]) -> None:
        for output in outputs:
            if output.is_last:
                assert output.metrics is not None
                told.append((output.request_id, output.finish_reason, type(output.error).__name__))

    engine.listeners.append(listen)
    engine.submit(ask("good", story[:6], 3))
    engine.step()
    for request_id in ("aborted", "displaced", "displaced too"):
        engine.submit(ask(request_id, story[:6], 3, priority=len(request_id)))
    engine.submit(ask("good", story[:6], 3))
    engine.abort("aborted")
    engine.submit(ask("stopped", story[:6], 1, stop=(story[6],)))
    drain(engine)
    assert sorted(told) == sorted(
        [
            ("good", "rejected", "DuplicateRequest"),
            ("aborted", "abort", "NoneType"),
            ("displaced too", "rejected", "QueueFull"),
            ("good", "length", "NoneType"),
            ("stopped", "stop", "NoneType"),
            ("displaced", "length", "NoneType"),
        ]
    )


def test_a_listener_that_raises_is_taken_off_and_logged(
    make_engine: MakeEngine, drain: Drain, story: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_engine()
    failed: list[StepReport] = []
    told: list[StepReport] = []

    def fail(step: StepReport, _: Sequence[EngineOutput]) -> None:
        failed.append(step)
        raise RuntimeError("out of paper")

    def listen(step: StepReport, _: Sequence[EngineOutput]) -> None:
        told.append(step)

    engine.listeners += [fail, listen]
    engine.submit(ask("a", story[:6], 3))
    assert texts(drain(engine)) == {"a": story[6:9]}
    assert (len(failed), len(told)) == (1, 3)
    assert engine.listeners == [listen]
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert record.exc_info is not None and str(record.exc_info[1]) == "out of paper"


def test_a_listener_may_take_itself_off(
    make_engine: MakeEngine, drain: Drain, story: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_engine()
    told: list[str] = []

    def once(_: StepReport, outputs: Sequence[EngineOutput]) -> None:
        engine.listeners.remove(once)
        told.append("once")
        raise RuntimeError("and never again")

    engine.listeners += [once, lambda step, outputs: told.append("ever")]
    engine.submit(ask("a", story[:6], 2))
    assert texts(drain(engine)) == {"a": story[6:8]}
    assert told == ["once", "ever", "ever"]
    assert len(caplog.records) == 1


# --- ends -----------------------------------------------------------------------------------------


def test_abort_ends_a_request_wherever_it_is(
    make_engine: MakeEngine, drain: Drain, story: str
) -> None:
    engine = make_engine(max_num_seqs=1)
    for request_id in ("running", "waiting", "good"):
        engine.submit(ask(request_id, story[:6], 4))
    outputs = engine.step()
    for request_id in ("running", "waiting", "unknown"):
        engine.abort(request_id)
    engine.submit(ask("early", story[:6], 4))
    engine.abort("early")
    outputs += drain(engine)
    assert ends(outputs) == {
        "running": "abort",
        "waiting": "abort",
        "early": "abort",
        "good": "length",
    }
    assert texts(outputs)["running"] == story[6:7]
    assert texts(outputs)["good"] == story[6:10]


def test_an_aborted_request_gets_what_was_held_back(
    make_engine: MakeEngine, drain: Drain, story: str
) -> None:
    engine = make_engine()
    engine.submit(ask("a", story[:7], 9, stop=("a dark horse",)))
    outputs = [output for _ in range(6) for output in engine.step()]
    assert texts(outputs) == {"a": ""}
    engine.abort("a")
    assert texts(drain(engine)) == {"a": "a dark"}


def test_abort_all_reaches_every_request_and_leaves_an_engine(
    make_engine: MakeEngine, drain: Drain, story: str
) -> None:
    engine = make_engine(max_num_seqs=1)
    for request_id in ("running", "waiting"):
        engine.submit(ask(request_id, story[:6], 4))
    engine.step()
    engine.submit(ask("in the ring", story[:6], 4))
    error = EngineStopped("for a reason")
    outputs = engine.abort_all(error)
    assert ends(outputs) == dict.fromkeys(("running", "waiting", "in the ring"), "abort")
    assert all(output.error is error for output in outputs)
    engine.submit(ask("next", story[:6], 4))
    assert texts(drain(engine)) == {"next": story[6:10]}


def test_many_threads_may_submit(make_engine: MakeEngine, story: str) -> None:
    engine = make_engine(ingress_capacity=1000, max_num_seqs=16)
    begin = threading.Barrier(5)

    def submit(name: int) -> None:
        begin.wait()
        for index in range(20):
            engine.submit(ask(f"{name}-{index}", story[: 6 + name], 2))

    threads = [threading.Thread(target=submit, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    begin.wait()
    outputs: list[EngineOutput] = []
    while any(thread.is_alive() for thread in threads) or engine.has_work:
        outputs += engine.step()
    expected = {f"{n}-{index}": story[6 + n : 8 + n] for n in range(4) for index in range(20)}
    assert texts(outputs) == expected


# --- with a model ---------------------------------------------------------------------------------


UNDISTURBED = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def undisturbed(llm: LLM) -> list[RequestOutput]:
    """Eight prompts of very different lengths, each answered alone."""
    source = llm.tokenizer.encode(Path(__file__).read_text(encoding="utf-8")[:4000])
    prompts = [source[20 * index :][: 5 + 9 * index] for index in range(8)]
    return [llm.generate([prompt], UNDISTURBED)[0] for prompt in prompts]


@pytest.mark.model
@pytest.mark.parametrize("mode", ["pause", "tail", "swap", "recompute", "auto"])
def test_a_preempted_request_s_output_equals_its_undisturbed_one(
    llm: LLM, undisturbed: list[RequestOutput], mode: str
) -> None:
    """Eight requests whose ranks keep changing, in two slots or a pool that holds half of them."""
    executor = llm.engine.executor
    llm.engine.scheduler.block_manager.reset_prefix_cache()  # another writes into its pool
    config = SchedulerConfig(
        max_num_seqs=2 if mode == "pause" else 4,
        max_num_batched_tokens=37,
        num_blocks=executor.num_blocks if mode == "pause" else 7,
        block_size=executor.block_size,
        num_swap_blocks=executor.num_swap_blocks,
        preemption_mode=mode,
    )
    engine = Engine(executor, PriorityScheduler(config=config))
    disturbed: set[str] = set()
    engine.listeners.append(
        lambda step, _: disturbed.update(
            change.request_id for change in step.changes if change.status in YIELDED
        )
    )
    for index, alone in enumerate(undisturbed):
        engine.submit(Request(f"{index}", 10, alone.prompt_token_ids, sampling_params=UNDISTURBED))
    turn = 0
    outputs: list[EngineOutput] = []
    while engine.has_work:
        outputs += engine.step()
        invariants.check(engine.scheduler)
        turn += 1
        if turn % 3 == 0 and turn <= 36:  # for ever, and no request would get anywhere
            engine.set_priority(f"{turn // 3 * 5 % 8}", -turn)
    for index, alone in enumerate(undisturbed):
        tokens = [each.token_ids for each in outputs if each.request_id == f"{index}"]
        assert list(chain.from_iterable(tokens)) == alone.outputs[0].token_ids
    assert len(disturbed) >= 4
