"""The arrays of a step, by hand."""

from __future__ import annotations

import numpy as np
import pytest
from growing_sequence import GrowingSequence

from headway.core.sampling_params import SamplingParams
from headway.core.scheduler_output import StepRow
from headway.executor.batch import StepBatch, build_batch

SCRATCH = range(100, 110)
GREEDY = SamplingParams(temperature=0.0)
SAMPLING = SamplingParams(temperature=1.0, seed=0)
RATED = SamplingParams(temperature=0.0, prompt_logprobs=1)


def row(
    prompt: int,
    output: int,
    computed: int,
    count: int,
    table: list[int],
    params: SamplingParams = GREEDY,
    drafts: tuple[int, ...] = (),
    seeds: tuple[int | None, ...] | None = None,
) -> StepRow:
    """``count`` tokens of a sequence whose tokens are 0, 1, 2, …"""
    sequence = GrowingSequence(
        "r",
        range(prompt),
        params,
        output=range(prompt, prompt + output),
        num_computed_tokens=computed,
        block_table=table,
    )
    return sequence.row(count, drafts=drafts, seeds=seeds)


def arrays(batch: StepBatch) -> dict[str, object]:
    assert all(values.dtype == np.int32 for values in batch.inputs.values())
    return {name: values.tolist() for name, values in batch.inputs.items()}


def test_prefill_decode_and_partial_chunk_side_by_side() -> None:
    batch = build_batch(
        [
            row(5, 0, 0, 5, [7, 8, 9]),  # a whole prompt; the table has more than it needs
            row(3, 2, 4, 1, [4, 5], SAMPLING),  # decodes its fifth token
            row(10, 0, 4, 4, [1, 2]),  # a chunk from the middle: nothing is sampled
        ],
        block_size=4,
        scratch_blocks=SCRATCH,
    )
    assert arrays(batch) == {
        "input_ids": [0, 1, 2, 3, 4, 4, 4, 5, 6, 7],
        "position_ids": [0, 1, 2, 3, 4, 4, 4, 5, 6, 7],
        "past_lens": [0, 4, 4],
        "subsequence_begins": [0, 5, 6, 10],
        "block_indices": [7, 8, 4, 5, 1, 2],
        "block_indices_begins": [0, 2, 4, 6],
        "max_context_len": 8,
        "sample_rows": [4, 5],
        "logit_rows": [1],
    }
    assert batch.sampled == [0, 1]
    assert batch.with_logits == [1]
    assert batch.copies == []


def test_a_single_row_is_padded_in_tokens_and_in_samples() -> None:
    batch = build_batch([row(3, 2, 4, 1, [4, 5])], 4, SCRATCH, min_rows=2)
    assert arrays(batch) == {
        "input_ids": [4, 0],
        "position_ids": [4, 0],
        "past_lens": [4, 0],
        "subsequence_begins": [0, 1, 2],
        "block_indices": [4, 5, 100],
        "block_indices_begins": [0, 2, 3],
        "max_context_len": 5,
        "sample_rows": [0, 0],
        "logit_rows": [],
    }
    assert batch.sampled == [0]


def test_several_rows_of_which_one_is_sampled() -> None:
    batch = build_batch([row(3, 0, 0, 3, [4])], 4, SCRATCH, min_rows=2)
    assert arrays(batch)["sample_rows"] == [2, 2]
    assert arrays(batch)["input_ids"] == [0, 1, 2]


def test_nothing_sampled_is_not_padded() -> None:
    batch = build_batch([row(8, 0, 0, 4, [4, 5])], 4, SCRATCH, min_rows=2)
    assert arrays(batch)["sample_rows"] == []
    assert batch.sampled == []


def test_a_lone_prompt_token_is_paired_with_the_one_before_it() -> None:
    batch = build_batch([row(7, 0, 6, 1, [4, 5])], 4, SCRATCH, min_rows=2, pairs_lone_tokens=True)
    assert arrays(batch)["input_ids"] == [5, 6]
    assert arrays(batch)["past_lens"] == [5]
    assert arrays(batch)["block_indices"] == [4, 5]
    assert arrays(batch)["sample_rows"] == [1, 1]
    assert batch.copies == []


def test_a_shared_block_is_not_written_again() -> None:
    rows = [row(9, 0, 8, 1, [1, 2, 3]), row(5, 0, 4, 1, [4, 5])]
    batch = build_batch(rows, 4, SCRATCH, min_rows=2, pairs_lone_tokens=True)
    assert batch.copies == [(2, 101), (4, 102)]
    assert arrays(batch)["block_indices"] == [1, 101, 3, 102, 5]
    assert arrays(batch)["past_lens"] == [7, 3]


def test_the_rows_of_rated_prompts_follow_those_that_are_sampled() -> None:
    batch = build_batch(
        [
            row(4, 0, 0, 4, [1], RATED),  # all of it: its last token tells of no prompt token
            row(5, 0, 0, 5, [2, 3], SAMPLING),
            row(10, 0, 4, 4, [4, 5, 6], RATED),  # a chunk from the middle: every token does
            row(3, 2, 4, 1, [7, 8], RATED),  # decodes
        ],
        block_size=4,
        scratch_blocks=SCRATCH,
    )
    assert batch.sampled == [0, 1, 3]
    assert batch.with_logits == [1]
    assert batch.rated == [0, 2]
    assert arrays(batch)["sample_rows"] == [3, 8, 13, 0, 1, 2, 9, 10, 11, 12]
    assert arrays(batch)["logit_rows"] == [1, 3, 4, 5, 6, 7, 8, 9]


def test_rated_rows_alone_are_padded_and_lone_tokens_rated_once() -> None:
    last = row(9, 0, 8, 1, [1, 2, 3], RATED)
    batch = build_batch([last], 4, SCRATCH, min_rows=2, pairs_lone_tokens=True)
    assert batch.rated == []
    before = row(9, 0, 7, 1, [1, 2], RATED)
    batch = build_batch([before], 4, SCRATCH, min_rows=2, pairs_lone_tokens=True)
    assert arrays(batch)["input_ids"] == [6, 7]
    assert batch.rated == [0]
    assert arrays(batch)["sample_rows"] == [1, 1]
    assert arrays(batch)["logit_rows"] == [0]


@pytest.mark.parametrize("computed", [4, 5])
def test_decoding_is_never_paired(computed: int) -> None:
    decode = row(4, computed - 3, computed, 1, [1, 2])
    batch = build_batch([decode], 4, SCRATCH, pairs_lone_tokens=True)
    assert arrays(batch)["input_ids"] == [computed]
    assert batch.copies == []
    batch = build_batch([row(1, 0, 0, 1, [1])], 4, SCRATCH, pairs_lone_tokens=True)
    assert arrays(batch)["input_ids"] == [0]


def test_drafts_are_computed_behind_the_tokens_and_each_is_asked_what_follows() -> None:
    batch = build_batch(
        [
            row(3, 1, 3, 1, [4, 5, 6], drafts=(40, 41)),  # its drafts reach into the next block
            row(5, 0, 0, 5, [7, 8], SAMPLING, drafts=(50,)),  # behind a prompt
            row(3, 2, 4, 1, [9, 10]),
        ],
        block_size=4,
        scratch_blocks=SCRATCH,
    )
    assert arrays(batch)["input_ids"] == [3, 40, 41, 0, 1, 2, 3, 4, 50, 4]
    assert arrays(batch)["position_ids"] == [3, 4, 5, 0, 1, 2, 3, 4, 5, 4]
    assert arrays(batch)["block_indices"] == [4, 5, 7, 8, 9, 10]
    assert arrays(batch)["max_context_len"] == 6
    assert arrays(batch)["sample_rows"] == [0, 1, 2, 7, 8, 9]
    assert arrays(batch)["logit_rows"] == [3, 4]
    assert batch.sampled == [0, 1, 2]
    assert batch.with_logits == [3, 4]


def test_a_prompt_that_several_sequences_share_is_asked_once() -> None:
    batch = build_batch(
        [row(3, 0, 0, 3, [4], SAMPLING, seeds=(1, 2, 3)), row(3, 2, 4, 1, [5, 6])], 4, SCRATCH
    )
    assert batch.sampled == [0, 1]
    assert arrays(batch)["sample_rows"] == [2, 3]
    assert arrays(batch)["logit_rows"] == [0]


def test_a_greedy_row_needs_logits_only_until_it_has_its_least_number_of_tokens() -> None:
    params = SamplingParams(temperature=0.0, min_tokens=3)
    early = row(3, 1, 3, 1, [4, 5, 6], params, drafts=(40, 41, 42))
    late = row(3, 3, 5, 1, [4, 5], params)
    batch = build_batch([early, late], 4, SCRATCH)
    assert arrays(batch)["sample_rows"] == [0, 1, 2, 3, 4]
    # The second and the third token of the output are chosen there; the fourth is free.
    assert batch.with_logits == [0, 1]


@pytest.mark.parametrize(
    ("count", "rows"), [(1, 2), (5, 5), (9, 12), (17, 24), (25, 32), (33, 64), (64, 64), (65, 96)]
)
def test_rows_are_rounded_so_that_shapes_repeat(count: int, rows: int) -> None:
    """By padding that nothing is sampled from, and that writes to the scratch block alone."""
    step = [row(3, 1, 3, 1, [4 + index]) for index in range(count)]
    batch = build_batch(step, 4, SCRATCH, min_rows=2, rounds_rows=True)
    assert batch.inputs["input_ids"].size == rows
    assert batch.inputs["sample_rows"].size == rows
    assert batch.inputs["sample_rows"][:count].tolist() == list(range(count))
    assert batch.inputs["block_indices"].tolist() == [
        *(4 + index for index in range(count)),
        *[SCRATCH[0]] * (rows - count),
    ]
    assert batch.sampled == list(range(count))
