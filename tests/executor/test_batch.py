"""The arrays of a step, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from headway.core.request import Request, SamplingParams
from headway.executor.batch import StepBatch, build_batch

SCRATCH = range(100, 110)


def request(
    prompt: int, output: int, computed: int, table: list[int], temperature: float = 0.0
) -> Request:
    """A request whose tokens are 0, 1, 2, …"""
    params = SamplingParams(temperature=temperature, seed=0)
    one = Request("r", prompt=list(range(prompt)), sampling_params=params)
    one.token_ids += range(prompt, prompt + output)
    one.num_computed_tokens = computed
    one.block_table = table
    return one


def arrays(batch: StepBatch) -> dict[str, object]:
    assert all(values.dtype == np.int32 for values in batch.inputs.values())
    return {name: values.tolist() for name, values in batch.inputs.items()}


def test_prefill_decode_and_partial_chunk_side_by_side() -> None:
    batch = build_batch(
        [
            request(5, 0, 0, [7, 8, 9]),  # a whole prompt; the table has more than it needs
            request(3, 2, 4, [4, 5], temperature=1.0),  # decodes its fifth token
            request(10, 0, 4, [1, 2]),  # a chunk from the middle: nothing is sampled
        ],
        [5, 1, 4],
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
    batch = build_batch([request(3, 2, 4, [4, 5])], [1], 4, SCRATCH, min_rows=2)
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
    batch = build_batch([request(3, 0, 0, [4])], [3], 4, SCRATCH, min_rows=2)
    assert arrays(batch)["sample_rows"] == [2, 2]
    assert arrays(batch)["input_ids"] == [0, 1, 2]


def test_nothing_sampled_is_not_padded() -> None:
    batch = build_batch([request(8, 0, 0, [4, 5])], [4], 4, SCRATCH, min_rows=2)
    assert arrays(batch)["sample_rows"] == []
    assert batch.sampled == []


def test_a_short_prompt_chunk_is_extended_backwards_inside_its_block() -> None:
    batch = build_batch([request(7, 0, 6, [4, 5])], [1], 4, SCRATCH, min_rows=2, min_chunk=2)
    assert arrays(batch)["input_ids"] == [5, 6]
    assert arrays(batch)["past_lens"] == [5]
    assert arrays(batch)["block_indices"] == [4, 5]
    assert arrays(batch)["sample_rows"] == [1, 1]
    assert batch.copies == []


def test_a_shared_block_is_not_written_again() -> None:
    first, second = request(9, 0, 8, [1, 2, 3]), request(5, 0, 4, [4, 5])
    batch = build_batch([first, second], [1, 1], 4, SCRATCH, min_rows=2, min_chunk=2)
    assert batch.copies == [(2, 101), (4, 102)]
    assert arrays(batch)["block_indices"] == [1, 101, 3, 102, 5]
    assert arrays(batch)["past_lens"] == [7, 3]
    assert first.block_table == [1, 2, 3]


def rated(prompt: int, output: int, computed: int, table: list[int]) -> Request:
    one = request(prompt, output, computed, table)
    one.sampling_params = SamplingParams(temperature=0.0, prompt_logprobs=1)
    return one


def test_the_rows_of_rated_prompts_follow_those_that_are_sampled() -> None:
    batch = build_batch(
        [
            rated(4, 0, 0, [1]),  # all of it: its last row tells of no prompt token
            request(5, 0, 0, [2, 3], temperature=1.0),
            rated(10, 0, 4, [4, 5, 6]),  # a chunk from the middle: every row does
            rated(3, 2, 4, [7, 8]),  # decodes
        ],
        [4, 5, 4, 1],
        block_size=4,
        scratch_blocks=SCRATCH,
    )
    assert batch.sampled == [0, 1, 3]
    assert batch.with_logits == [1]
    assert batch.rated == [(0, range(1, 4)), (2, range(5, 9))]
    assert arrays(batch)["sample_rows"] == [3, 8, 13, 0, 1, 2, 9, 10, 11, 12]
    assert arrays(batch)["logit_rows"] == [1, 3, 4, 5, 6, 7, 8, 9]


def test_rated_rows_alone_are_padded_and_short_chunks_rated_once() -> None:
    batch = build_batch([rated(9, 0, 8, [1, 2, 3])], [1], 4, SCRATCH, min_rows=2, min_chunk=2)
    assert batch.rated == []
    batch = build_batch([rated(9, 0, 7, [1, 2])], [1], 4, SCRATCH, min_rows=2, min_chunk=2)
    assert arrays(batch)["input_ids"] == [6, 7]
    assert batch.rated == [(0, range(8, 9))]
    assert arrays(batch)["sample_rows"] == [1, 1]
    assert arrays(batch)["logit_rows"] == [0]


@pytest.mark.parametrize("computed", [4, 5])
def test_decoding_is_never_extended(computed: int) -> None:
    batch = build_batch([request(4, computed - 3, computed, [1, 2])], [1], 4, SCRATCH, min_chunk=2)
    assert arrays(batch)["input_ids"] == [computed]
    assert batch.copies == []
    batch = build_batch([request(1, 0, 0, [1])], [1], 4, SCRATCH, min_chunk=2)
    assert arrays(batch)["input_ids"] == [0]


@pytest.mark.parametrize(
    ("count", "rows"), [(1, 2), (5, 5), (9, 12), (17, 24), (25, 32), (33, 64), (64, 64), (65, 96)]
)
def test_rows_are_rounded_so_that_shapes_repeat(count: int, rows: int) -> None:
    """By padding that nobody is sampled from, and that writes to the scratch block alone."""
    tables = [[4 + index] for index in range(count)]
    requests = [request(3, 1, 3, table) for table in tables]
    batch = build_batch(requests, [1] * count, 4, SCRATCH, min_rows=2, rounds_rows=True)
    assert batch.inputs["input_ids"].size == rows
    assert batch.inputs["sample_rows"].size == rows
    assert batch.inputs["sample_rows"][:count].tolist() == list(range(count))
    assert batch.inputs["block_indices"].tolist() == [
        *(4 + index for index in range(count)),
        *[SCRATCH[0]] * (rows - count),
    ]
    assert batch.sampled == list(range(count))
