"""A step as a value: it can be sent away, and nothing in it changes afterwards."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING

import pytest

from headway.core.request import SamplingParams
from headway.core.scheduler_output import SchedulerOutput, StepRow

if TYPE_CHECKING:
    from tests.core.conftest import Lab


def busy_step(lab: type[Lab]) -> tuple[Lab, SchedulerOutput]:
    """A step with decoding rows, a chunk, a group, drafts, a preemption and a swap."""
    busy = lab(num_blocks=16, num_swap_blocks=8, preemption_mode="swap", max_num_seqs=8)
    busy.add("swapped", 9, num_prompt=14, max_tokens=9)
    busy.add("quiet", 0, max_tokens=9)
    busy.add("group", 1, num_prompt=6, max_tokens=9, n=2)
    params = SamplingParams(max_tokens=9, presence_penalty=1.0, seed=3)
    busy.add("penalised", 1, max_tokens=None, sampling_params=params)
    busy.steps(2)
    busy.scheduler.propose("quiet", 0, (5, 6))
    busy.add("urgent", -1, num_prompt=26, max_tokens=2)
    return busy, busy.scheduler.schedule()


def test_a_step_survives_being_sent(lab: type[Lab]) -> None:
    busy, output = busy_step(lab)
    assert output.swap_out and output.preemptions and output.block_copies is not None
    sent = pickle.loads(pickle.dumps(output))
    assert sent == output
    assert sent.rows == output.rows
    assert [type(row) for row in sent] == [StepRow] * len(output)
    assert (sent.step, sent.predicted_ms) == (output.step, output.predicted_ms)
    busy.scheduler.update_from_output(sent, [busy.sample(row) for row in sent])
    busy.drain()


def test_a_step_stays_as_it_was_when_its_requests_go_on(lab: type[Lab]) -> None:
    busy, output = busy_step(lab)
    before = pickle.dumps(output)
    busy.scheduler.update_from_output(output, [busy.sample(row) for row in output])
    busy.scheduler.abort("group")
    busy.drain()
    assert pickle.loads(before) == output


def test_rows_of_one_request_are_neighbours_most_urgent_first(lab: type[Lab]) -> None:
    _, output = busy_step(lab)
    assert [(row.request_id, row.index) for row in output] == [
        ("urgent", 0),
        ("quiet", 0),
        ("group", 0),
        ("group", 1),
        ("penalised", 0),
    ]
    assert output.num_batched_tokens == 26 + 3 + 1 + 1 + 1
    penalised = output[4]
    assert len(penalised.context) == penalised.start  # a penalty looks at every token before
    assert all(len(row.context) <= 1 for row in output[:4])


@pytest.mark.parametrize("field", ["rows", "step"])
def test_steps_that_differ_are_not_equal(lab: type[Lab], field: str) -> None:
    _, output = busy_step(lab)
    other = SchedulerOutput(
        output.step + (field == "step"),
        output.rows[: len(output) - (field == "rows")],
        output.swap_out,
        output.block_copies,
        output.swap_in,
        output.preemptions,
        output.features,
        output.predicted_ms,
    )
    assert (other == output) is False
    assert output != "a step"


def test_an_output_without_rows_is_false_but_not_empty_if_it_moves_blocks() -> None:
    assert not SchedulerOutput()
    assert SchedulerOutput().is_empty
    moving = SchedulerOutput(3, swap_in=((0, 4), (1, 5)), swap_out=((2, 2),))
    assert not moving
    assert not moving.is_empty
    assert moving.num_swapped_blocks == 3


def test_its_text_names_rows_and_preemptions(lab: type[Lab]) -> None:
    pair = lab()
    pair.add("a", n=2)
    pair.step()
    output = pair.scheduler.schedule()
    assert repr(output) == "SchedulerOutput(2, [a:1, a#1:1], preemptions=())"
