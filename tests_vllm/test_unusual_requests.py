"""Requests that cannot start yet, or not beside each other: grammars, adapters, sessions."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from scheduler_harness import BLOCK_SIZE, Lenient
from story import BACKGROUND, Story
from vllm.distributed.aux_output_connector.connector import AuxOutputSchedulerConnector
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from headway.vllm import HeadwayScheduler, HeadwaySyncScheduler

in_both = pytest.mark.parametrize("cls", [HeadwayScheduler, HeadwaySyncScheduler])


# ---------------------------------------------------------------------- grammars and adapters


@in_both
def test_a_grammar_that_is_not_ready_neither_displaces_nor_delays_others(
    cls: type[Scheduler], bare_model: Path
) -> None:
    story = Story(bare_model, cls, max_num_seqs=2, num_blocks=4)
    story.background("a", "b")
    grammar: Future[Any] = Future()
    story.urgent("blocked", prompt=40, grammar=grammar)
    assert story.next() == ({"a": 1, "b": 1}, set())
    story.urgent()
    assert story.next() == ({"urgent": 10, "a": 1}, set())
    grammar.set_result(Lenient())
    assert story.next() == ({"urgent": 1, "blocked": 40}, {"a", "b"})
    story.end()


def test_a_grammar_that_cannot_be_compiled_fails_its_request_only(bare_model: Path) -> None:
    story = Story(bare_model, max_num_seqs=1)
    story.background("a")
    grammar: Future[Any] = Future()
    grammar.set_exception(ValueError("no grammar"))
    story.urgent("bad", grammar=grammar)
    assert story.next() == ({"a": 1}, set())
    story.end()
    assert story.answers["bad"].finish_reason == "error"


def test_adapters_of_more_urgent_requests_come_first(bare_model: Path) -> None:
    story = Story(bare_model, max_loras=1)
    story.background("a1", "b1", lora=1)
    story.background("plain")
    story.urgent(lora=2)
    assert story.next() == ({"urgent": 10, "plain": 1}, set())
    story.urgent("late", lora=3)
    story.urgent("same", lora=2)
    # There is no room for a third adapter, which keeps no other request.
    assert story.next() == ({"urgent": 1, "same": 10, "plain": 1}, set())
    story.end()


# ---------------------------------------------------------------------- auxiliary outputs


class OneBlock(AuxOutputSchedulerConnector):  # type: ignore[misc]
    """Has the auxiliary outputs of the first block of each prompt only."""

    def max_cache_hit(self, request: Request) -> int:
        return BLOCK_SIZE


@pytest.mark.skipif(
    not hasattr(AuxOutputSchedulerConnector, "max_cache_hit"),
    reason="this version of vLLM does not look at auxiliary outputs",
)
def test_what_the_cache_has_without_auxiliary_outputs_is_planned_to_be_computed(
    bare_model: Path,
) -> None:
    story = Story(bare_model)
    prompt = list(range(10, 10 + 4 * BLOCK_SIZE))
    story.add("before", prompt, max_tokens=1)
    story.run()
    story.background("a")
    story.scheduler.aux_output_connector = OneBlock(story.scheduler.kv_cache_manager)
    story.add("urgent", prompt)
    assert story.schedule().num_scheduled_tokens == {"urgent": 3 * BLOCK_SIZE, "a": 1}


# ---------------------------------------------------------------------- sessions


def idle_session(story: Story, **options: Any) -> None:
    """A session that has been answered, and says nothing."""
    story.add("session", 10, max_tokens=1, resumable=True, **options)
    while not story.scheduler.num_waiting_for_streaming_input:
        story.step()


@pytest.mark.parametrize("v2", [False, True])
def test_an_idle_session_does_not_keep_urgent_requests_from_displacing_others(
    bare_model: Path, v2: bool
) -> None:
    story = Story(bare_model, max_num_seqs=3, v2=v2)
    idle_session(story)
    story.background("a", "b")
    story.urgent()
    assert story.next() == ({"urgent": 10, "a": 1}, {"b"} if v2 else set())
    story.end_session("session")
    story.end()


def test_an_idle_session_lets_no_request_in_beside_the_plan(bare_model: Path) -> None:
    story = Story(bare_model, max_num_seqs=4, v2=True, headway={"share": "none"})
    idle_session(story)
    story.background("a")
    story.urgent()
    story.next()
    story.add("b", 10, priority=BACKGROUND)
    story.add("c", 10, priority=BACKGROUND)
    assert story.next() == ({"urgent": 1}, set())
    story.end_session("session")
    story.end()


def test_a_session_goes_on_before_others_are_admitted(bare_model: Path) -> None:
    story = Story(bare_model, max_num_seqs=2)
    idle_session(story, priority=BACKGROUND)
    story.urgent("a")
    story.next()
    story.add("session", 10, max_tokens=1, resumable=True)
    story.urgent("b")
    assert story.next()[0] == {"a": 1, "session": 11 - 1}
    story.end_session("session")
    story.end()


def test_a_session_that_is_evicted_as_its_answer_ends_is_not_lost(bare_model: Path) -> None:
    story = Story(bare_model, HeadwayScheduler, num_blocks=3)
    story.add("session", 20, priority=BACKGROUND, max_tokens=2, resumable=True)
    story.next()
    story.next()
    # Its last token is in flight.
    story.urgent(prompt=40)
    assert story.next()[1] == {"session"}
    story.end_session("session")
    story.end()
