"""From a step's numbers to tokens: each row gets what it asks for, and its own faults only.

The model is replaced by a table: the logits after a token depend on nothing but the token and its
position.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from growing_sequence import GrowingSequence
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.core.errors import InternalError
from headway.core.sampling_params import SamplingParams
from headway.core.scheduler_output import StepRow
from headway.executor.base import ModelRunnerOutput, TokenLogprobs
from headway.executor.batch import StepResult, build_batch
from headway.executor.logprobs import LogprobReader
from headway.executor.readout import Readout

VOCAB = 50
BLOCK = 4
READOUT = Readout(VOCAB)
GREEDY = SamplingParams(temperature=0)

#: One of each kind of row: what the kernels chose, what is drawn, adjusted, reported and rated.
KINDS = (
    GREEDY,
    SamplingParams(temperature=0.8, seed=3),
    SamplingParams(temperature=0, presence_penalty=1.5, logit_bias={7: 2.0}),
    SamplingParams(temperature=0, logprobs=2),
    SamplingParams(temperature=1.5, seed=4, logprobs=0, prompt_logprobs=3),
)


def logits_after(token_id: int, position: int) -> np.ndarray:
    random = np.random.default_rng((token_id, position))
    return random.normal(scale=3, size=VOCAB).astype(np.float32)


def sequence(
    name: str, params: SamplingParams, tokens: Sequence[int], num_prompt: int, computed: int
) -> GrowingSequence:
    return GrowingSequence(
        name,
        tokens[:num_prompt],
        params,
        output=tokens[num_prompt:],
        num_computed_tokens=computed,
        block_table=range(len(tokens) // BLOCK + 2),
    )


def step(
    rows: Sequence[StepRow],
    broken: Mapping[str, float] | None = None,
    broken_after: int = 0,
) -> ModelRunnerOutput:
    """Compute the rows; all logits after the last token of the broken ones are so.

    ``broken``: request id → the value; ``broken_after``: how many of the row's drafts come before.
    """
    batch = build_batch(rows, BLOCK)
    counts = np.diff(batch.begins)
    positions = np.arange(len(batch.token_ids)) + np.repeat(
        batch.past_lens - batch.begins[:-1], counts
    )
    table = np.array([logits_after(*pair) for pair in zip(batch.token_ids, positions, strict=True)])
    for index, row in enumerate(rows):
        if broken and row.request_id in broken:
            last = batch.begins[index + 1] - 1 - len(row.drafts)
            table[last + broken_after] = broken[row.request_id]
    lines = table[batch.sample_rows].reshape(-1, VOCAB)
    result = StepResult(
        lines.argmax(1).astype(np.int32), lines.max(1), lines[batch.logit_rows].reshape(-1, VOCAB)
    )
    return READOUT.read(rows, batch, result, 1.5)


def one_of_each_kind() -> list[StepRow]:
    random = np.random.default_rng(0)
    return [
        sequence(
            f"r{index}", params, random.integers(0, VOCAB, 9 + index).tolist(), 6, 6 + index
        ).row()
        for index, params in enumerate(KINDS)
    ]


def outcome(output: ModelRunnerOutput, index: int) -> tuple[object, ...]:
    """All that a step says of a row."""
    return (
        output.tokens[index],
        output.logprobs.get(index),
        output.prompt_logprobs.get(index),
        output.errors.get(index),
    )


@settings(deadline=None)
@given(st.lists(st.integers(0, len(KINDS) - 1), min_size=1, max_size=8))
def test_a_row_does_not_notice_the_others(chosen: list[int]) -> None:
    rows = one_of_each_kind()
    alone = [step([row]) for row in rows]
    together = step([rows[index] for index in chosen])
    assert together.swap_ms == 1.5
    for at, index in enumerate(chosen):
        assert outcome(together, at) == outcome(alone[index], 0)


def test_each_gets_what_it_asked_for() -> None:
    output = step(one_of_each_kind())
    assert all(len(tokens) == 1 for tokens in output.tokens)
    assert set(output.logprobs) == {3, 4}
    assert [len(output.logprobs[index][0].top) for index in (3, 4)] == [2, 0]
    for index in (3, 4):
        assert (output.logprobs[index][0].token_id,) == output.tokens[index]
    assert output.logprobs[3][0].top[0] == output.logprobs[3][0][:2]
    assert not output.errors
    assert not output.prompt_logprobs  # those prompts have been computed before


def test_a_penalised_choice_is_reported_as_the_model_saw_it() -> None:
    tokens = list(range(8))
    plain = sequence("a", SamplingParams(temperature=0, logprobs=3), tokens, 8, 4).row()
    ((token_id,),) = step([plain]).tokens
    unwanted = SamplingParams(temperature=0, logprobs=3, logit_bias={token_id: -100})
    ((other,),) = step([sequence("a", unwanted, tokens, 8, 4).row()]).logprobs.values()
    (rating,) = step([plain]).logprobs[0]
    (first, _), second, _ = rating.top
    assert first == token_id
    assert other == TokenLogprobs(*second, rating.top)


@settings(deadline=None)
@given(
    num_prompt=st.integers(1, 14),
    num_output=st.integers(0, 3),
    cuts=st.lists(st.integers(1, 13), max_size=4),
    num_top=st.integers(0, 5),
)
def test_a_prompt_is_rated_whatever_its_chunks(
    num_prompt: int, num_output: int, cuts: list[int], num_top: int
) -> None:
    tokens = np.random.default_rng(1).integers(0, VOCAB, num_prompt + num_output).tolist()
    params = SamplingParams(temperature=0, prompt_logprobs=num_top)
    asking = sequence("a", params, tokens, num_prompt, 0)
    other = sequence("b", SamplingParams(seed=1), [3, 4, 5], 3, 0).row()
    rated: list[TokenLogprobs] = []
    while left := len(tokens) - asking.num_computed_tokens:
        row = asking.row(min(left, cuts.pop()) if cuts else left)
        output = step([other, row])
        if 1 in output.prompt_logprobs:
            assert output.prompt_logprobs[1].start == len(rated) + 1
            rated += output.prompt_logprobs[1].tokens
        asking.take(row, ())
    reader = LogprobReader(VOCAB)
    assert rated == [
        reader.read(logits_after(tokens[at - 1], at - 1), tokens[at], num_top)
        for at in range(1, num_prompt)
    ]


def test_only_the_tokens_that_are_asked_for_are_rated() -> None:
    asking = sequence("a", SamplingParams(prompt_logprobs=0, seed=1), range(10), 10, 4)
    asking.peak_computed_tokens = 6
    assert step([asking.row(1)]).prompt_logprobs == {}
    rated = step([asking.row(4)]).prompt_logprobs[0]
    assert (rated.start, [token.token_id for token in rated.tokens]) == (7, [7, 8])


class TestSeveralSeeds:
    """The last row of a prompt that several sequences share."""

    @pytest.mark.parametrize(
        "params",
        [
            SamplingParams(temperature=1.0),
            SamplingParams(temperature=0.8, top_k=20, repetition_penalty=1.5),
        ],
        ids=str,
    )
    def test_each_draw_is_the_one_of_its_own_seed(self, params: SamplingParams) -> None:
        prompt = sequence("a", params, range(8), 8, 5)
        seeds = tuple(range(30, 50))
        alone = [step([prompt.row(seeds=(seed,))]).tokens[0][0] for seed in seeds]
        other = sequence("b", KINDS[1], range(5), 5, 0).row()
        together = step([prompt.row(seeds=seeds), other])
        assert together.tokens == [tuple(alone), *step([other]).tokens]
        assert len(set(alone)) > 1

    @pytest.mark.parametrize(
        "params", [GREEDY, SamplingParams(temperature=0, presence_penalty=1.0)], ids=str
    )
    def test_greedy_draws_are_all_the_same(self, params: SamplingParams) -> None:
        prompt = sequence("a", params, range(8), 8, 5)
        ((token_id,),) = step([prompt.row(seeds=(None,))]).tokens
        assert step([prompt.row(seeds=(None,) * 3)]).tokens == [(token_id,) * 3]

    def test_each_is_reported(self) -> None:
        prompt = sequence("a", SamplingParams(temperature=1.5, logprobs=2), range(8), 8, 5)
        output = step([prompt.row(seeds=(1, 2, 3, 4))])
        row = logits_after(7, 7)
        reader = LogprobReader(VOCAB)
        assert output.logprobs[0] == tuple(
            reader.read(row, token_id, 2) for token_id in output.tokens[0]
        )
        assert len(set(output.tokens[0])) > 1

    @pytest.mark.parametrize("params", [GREEDY, KINDS[1]], ids=str)
    def test_a_fault_is_that_of_all_of_them(self, params: SamplingParams) -> None:
        prompt = sequence("a", params, range(8), 8, 5).row(seeds=(1, 2))
        other = sequence("b", GREEDY, range(5), 5, 0).row()
        output = step([prompt, other], broken={"a": np.nan})
        assert output.tokens == [(), *step([other]).tokens]
        assert set(output.errors) == {0}


class TestDrafts:
    """Whatever is proposed, a sequence is what it would be without."""

    def without_drafts(self, params: SamplingParams, count: int) -> ModelRunnerOutput:
        """The next ``count`` tokens, one a step; as one answer."""
        plain = self.start(params)
        tokens: list[int] = []
        logprobs: list[TokenLogprobs] = []
        for _ in range(count):
            row = plain.row(banned=self.banned)
            output = step([row])
            plain.take(row, output.tokens[0])
            tokens += output.tokens[0]
            logprobs += output.logprobs.get(0, ())
        return ModelRunnerOutput([tuple(tokens)], logprobs={0: tuple(logprobs)})

    @staticmethod
    def start(params: SamplingParams) -> GrowingSequence:
        started = sequence("a", params, range(9), 7, 8)
        started.block_table = list(range(20))
        return started

    #: Half of the vocabulary, while a request must not end.
    banned = frozenset(range(0, VOCAB, 2))

    @settings(deadline=None)
    @given(
        kind=st.sampled_from(
            [
                *KINDS,
                SamplingParams(temperature=0, min_tokens=5),
                SamplingParams(temperature=1, seed=9, min_tokens=4, repetition_penalty=2.0),
                # Each of these tokens is chosen once, so an accepted draft changes what follows it.
                SamplingParams(
                    temperature=0, repetition_penalty=100, logit_bias=dict.fromkeys(range(40), 90)
                ),
            ]
        ),
        num_right=st.lists(st.integers(0, 4), min_size=4, max_size=4),
        num_wrong=st.lists(st.integers(0, 2), min_size=4, max_size=4),
    )
    def test_right_ones_are_accepted_and_what_follows_a_wrong_one_is_dropped(
        self, kind: SamplingParams, num_right: list[int], num_wrong: list[int]
    ) -> None:
        length = 4 * 5
        want = self.without_drafts(kind, length)
        drafting = self.start(kind)
        other = sequence("b", KINDS[4], range(5), 5, 0).row()
        tokens: list[int] = []
        logprobs: list[TokenLogprobs] = []
        for right, wrong in zip(num_right, num_wrong, strict=True):
            drafts = want.tokens[0][len(tokens) : len(tokens) + right]
            expected = want.tokens[0][len(tokens) : len(tokens) + right + 1]
            drafts += ((expected[-1] + 1) % VOCAB,) * wrong
            row = drafting.row(drafts=drafts, banned=self.banned)
            output = step([other, row])
            assert output.tokens == [*step([other]).tokens, expected]
            drafting.take(row, output.tokens[1])
            tokens += output.tokens[1]
            logprobs += output.logprobs.get(1, ())
        assert tuple(tokens) == want.tokens[0][: len(tokens)]
        assert tuple(logprobs) == want.logprobs[0][: len(logprobs)]
        assert len(logprobs) == (0 if kind.logprobs is None else len(tokens))

    @pytest.mark.parametrize("params", [GREEDY, *KINDS[1:4]], ids=str)
    def test_a_fault_behind_a_wrong_draft_is_none(self, params: SamplingParams) -> None:
        first, second = self.without_drafts(params, 2).tokens[0]
        wrong = ((first + 1) % VOCAB, 0)
        row = self.start(params).row(drafts=wrong)
        for after in (1, 2):
            output = step([row], broken={"a": np.nan}, broken_after=after)
            assert (output.tokens, output.errors) == ([(first,)], {})
        row = self.start(params).row(drafts=(first, second))
        for after in (0, 1, 2):
            output = step([row], broken={"a": np.nan}, broken_after=after)
            assert output.tokens == [()]
            assert set(output.errors) == {0}
            assert not output.logprobs


def test_a_banned_token_is_not_sampled_until_there_are_enough() -> None:
    params = SamplingParams(temperature=0, min_tokens=3)
    ((best,),) = step([sequence("a", GREEDY, range(9), 7, 8).row()]).tokens
    banned = frozenset({best})
    early = sequence("a", params, range(9), 7, 8)  # the third token of its output is due
    late = sequence("a", params, range(9), 6, 8)  # the fourth
    row = logits_after(8, 8)
    row[best] = -np.inf
    tokens = step([early.row(banned=banned), late.row(banned=banned)]).tokens
    assert tokens == [(int(row.argmax()),), (best,)]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("victim", range(len(KINDS)))
def test_broken_logits_end_only_their_own_request(victim: int, value: float) -> None:
    rows = one_of_each_kind()
    sound = step(rows)
    output = step(rows, broken={f"r{victim}": value})
    assert set(output.errors) == {victim}
    assert isinstance(output.errors[victim], InternalError)
    assert str(output.errors[victim]).startswith(f"request 'r{victim}' cannot go on: ")
    assert str(output.errors[victim]).endswith(f" is {value}")
    assert output.tokens[victim] == ()
    assert victim not in output.logprobs
    for index in {*range(len(KINDS))} - {victim}:
        assert outcome(output, index) == outcome(sound, index)


def test_broken_logits_in_a_prompt_that_is_rated() -> None:
    params = SamplingParams(temperature=0, prompt_logprobs=1)
    rated = sequence("a", params, range(9), 9, 0).row(5)
    other = sequence("b", GREEDY, range(5), 5, 0).row()
    output = step([rated, other], broken={"a": np.nan})
    assert output.tokens == [(), *step([other]).tokens]
    assert set(output.errors) == {0}
    assert output.prompt_logprobs == {}


def test_any_other_fault_of_a_choice_is_its_own_request_s_too() -> None:
    # Without a tokenizer, nothing but the model knows the vocabulary.
    outside = SamplingParams(temperature=0, logit_bias={VOCAB: 1.0})
    rows = [
        sequence("a", outside, range(5), 5, 0).row(),
        sequence("b", KINDS[1], range(5), 5, 0).row(),
    ]
    output = step(rows)
    assert set(output.errors) == {0}
    assert "request 'a' cannot go on" in str(output.errors[0])
    assert output.tokens == [(), *step(rows[1:]).tokens]


def test_a_sampling_row_without_a_seed_is_an_error() -> None:
    output = step([sequence("a", KINDS[1], range(5), 5, 0).row(seeds=(None,))])
    assert output.tokens == [()]
    assert "no seed" in str(output.errors[0])


def test_an_answer_can_be_pickled() -> None:
    rows = one_of_each_kind()
    output = step(rows, broken={"r1": np.nan})
    copy = pickle.loads(pickle.dumps(output))
    assert copy.tokens == output.tokens
    assert copy.logprobs == output.logprobs
    assert str(copy.errors[1]) == str(output.errors[1])
    plain = ModelRunnerOutput([(1,)])
    assert pickle.loads(pickle.dumps(plain)) == plain
