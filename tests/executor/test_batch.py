"""The arrays of a step, by hand."""

from __future__ import annotations

import numpy as np
from growing_sequence import GrowingSequence

from headway.core.sampling_params import SamplingParams
from headway.core.scheduler_output import StepRow
from headway.executor.batch import StepBatch, build_batch

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


def arrays(batch: StepBatch) -> dict[str, list[int]]:
    """The arrays by name, all of which the kernels read as 32-bit integers side by side."""
    found = {}
    for name, values in batch._asdict().items():
        if isinstance(values, np.ndarray):
            assert values.dtype == np.int32
            assert values.flags.c_contiguous
            found[name] = values.tolist()
    return found


def test_prefill_decode_and_partial_chunk_side_by_side() -> None:
    batch = build_batch(
        [
            row(5, 0, 0, 5, [7, 8, 9]),  # a whole prompt; the table has more than it needs
            row(3, 2, 4, 1, [4, 5], SAMPLING),  # decodes its fifth token
            row(10, 0, 4, 4, [1, 2]),  # a chunk from the middle: nothing is sampled
        ],
        block_size=4,
    )
    assert arrays(batch) == {
        "token_ids": [0, 1, 2, 3, 4, 4, 4, 5, 6, 7],
        "past_lens": [0, 4, 4],
        "begins": [0, 5, 6, 10],
        "block_indices": [7, 8, 4, 5, 1, 2],
        "block_begins": [0, 2, 4, 6],
        "sample_rows": [4, 5],
        "logit_rows": [1],
    }
    assert batch.sampled == [0, 1]
    assert batch.with_logits == [1]
    assert batch.rated == []


def test_a_single_row_is_nothing_but_itself() -> None:
    batch = build_batch([row(3, 2, 4, 1, [4, 5])], 4)
    assert arrays(batch) == {
        "token_ids": [4],
        "past_lens": [4],
        "begins": [0, 1],
        "block_indices": [4, 5],
        "block_begins": [0, 2],
        "sample_rows": [0],
        "logit_rows": [],
    }
    assert batch.sampled == [0]


def test_nothing_sampled() -> None:
    batch = build_batch([row(8, 0, 0, 4, [4, 5])], 4)
    assert arrays(batch)["sample_rows"] == []
    assert arrays(batch)["logit_rows"] == []
    assert batch.sampled == []


def test_a_table_is_cut_where_the_last_token_is() -> None:
    """A token that fills a block needs no block behind it; the next one does."""
    rows = [row(9, 0, 0, count, [1, 2, 3]) for count in (1, 4, 5, 8, 9)]
    assert arrays(build_batch(rows, 4))["block_begins"] == [0, 1, 2, 4, 6, 9]


def test_the_rows_of_rated_prompts_follow_those_that_are_sampled() -> None:
    batch = build_batch(
        [
            row(4, 0, 0, 4, [1], RATED),  # all of it: its last token tells of no prompt token
            row(5, 0, 0, 5, [2, 3], SAMPLING),
            row(10, 0, 4, 4, [4, 5, 6], RATED),  # a chunk from the middle: every token does
            row(3, 2, 4, 1, [7, 8], RATED),  # decodes
        ],
        block_size=4,
    )
    assert batch.sampled == [0, 1, 3]
    assert batch.with_logits == [1]
    assert batch.rated == [0, 2]
    assert arrays(batch)["sample_rows"] == [3, 8, 13, 0, 1, 2, 9, 10, 11, 12]
    assert arrays(batch)["logit_rows"] == [1, 3, 4, 5, 6, 7, 8, 9]


def test_a_lone_prompt_token_is_rated_if_another_follows() -> None:
    last = build_batch([row(9, 0, 8, 1, [1, 2, 3], RATED)], 4)
    assert last.rated == []
    assert arrays(last)["logit_rows"] == []
    before = build_batch([row(9, 0, 7, 1, [1, 2], RATED)], 4)
    assert before.rated == [0]
    assert arrays(before)["sample_rows"] == [0]
    assert arrays(before)["logit_rows"] == [0]


def test_drafts_are_computed_behind_the_tokens_and_each_is_asked_what_follows() -> None:
    batch = build_batch(
        [
            row(3, 1, 3, 1, [4, 5, 6], drafts=(40, 41)),  # its drafts reach into the next block
            row(5, 0, 0, 5, [7, 8], SAMPLING, drafts=(50,)),  # behind a prompt
            row(3, 2, 4, 1, [9, 10]),
        ],
        block_size=4,
    )
    assert arrays(batch)["token_ids"] == [3, 40, 41, 0, 1, 2, 3, 4, 50, 4]
    assert arrays(batch)["past_lens"] == [3, 0, 4]
    assert arrays(batch)["begins"] == [0, 3, 9, 10]
    assert arrays(batch)["block_indices"] == [4, 5, 7, 8, 9, 10]
    assert arrays(batch)["sample_rows"] == [0, 1, 2, 7, 8, 9]
    assert arrays(batch)["logit_rows"] == [3, 4]
    assert batch.sampled == [0, 1, 2]
    assert batch.with_logits == [3, 4]


def test_a_prompt_that_several_sequences_share_is_asked_once() -> None:
    batch = build_batch(
        [row(3, 0, 0, 3, [4], SAMPLING, seeds=(1, 2, 3)), row(3, 2, 4, 1, [5, 6])], 4
    )
    assert batch.sampled == [0, 1]
    assert arrays(batch)["sample_rows"] == [2, 3]
    assert arrays(batch)["logit_rows"] == [0]


def test_a_greedy_row_needs_logits_only_until_it_has_its_least_number_of_tokens() -> None:
    params = SamplingParams(temperature=0.0, min_tokens=3)
    early = row(3, 1, 3, 1, [4, 5, 6], params, drafts=(40, 41, 42))
    late = row(3, 3, 5, 1, [4, 5], params)
    batch = build_batch([early, late], 4)
    assert arrays(batch)["sample_rows"] == [0, 1, 2, 3, 4]
    # The second and the third token of the output are chosen there; the fourth is free.
    assert batch.with_logits == [0, 1]
