"""A step on its way: stage by stage, stopped and resumed, and read when it is complete."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest
from tiny_models import TinyModel
from tiny_runs import (
    POISON,
    Bench,
    Models,
    Text,
    assert_same_bits,
    native_model,
    pack,
    packed_model,
    random_tokens,
    whole_logits,
)

from headway.core.errors import InternalError
from headway.executor.base import ModelRunnerOutput
from headway.executor.batch import StepResult
from headway.executor.execution import Execution
from headway.executor.native_model import NativeModel
from headway.kernels.loader import available_paths

PATH = available_paths()[0]


@pytest.fixture(scope="module")
def model() -> Iterator[NativeModel]:
    models = Models()
    yield models.get(PATH, "llama")
    models.close()


@pytest.fixture
def bench(model: NativeModel) -> Bench:
    return Bench(model)


@pytest.fixture
def text(model: NativeModel) -> Text:
    return Text(random_tokens(model, 70))


def test_it_goes_from_the_first_stage_to_the_last(bench: Bench, text: Text) -> None:
    execution = bench.begin([(text, 70)])
    assert execution.num_stages == bench.model.config.num_layers + 1
    for stage in range(execution.num_stages):
        assert execution.stage == stage
        assert not execution.is_complete
        assert execution.advance(stage + 1) is (stage + 1 == execution.num_stages)
    assert execution.is_complete
    assert_same_bits(execution.result.logits, whole_logits(bench.model, text.token_ids))


def test_it_goes_no_further_than_it_should(bench: Bench, text: Text) -> None:
    execution = bench.begin([(text, 70)])
    for until, stage in ((0, 0), (2, 2), (2, 2), (1, 2), (-5, 2), (1000, 3), (0, 3)):
        assert execution.advance(until) is (stage == 3)
        assert execution.stage == stage


def test_it_is_complete_at_once_without_rows(bench: Bench) -> None:
    results: list[StepResult] = []

    def read(result: StepResult) -> ModelRunnerOutput:
        results.append(result)
        return ModelRunnerOutput([], 1.5)

    execution = Execution(bench.model, bench.cache, None, read)
    assert execution.is_complete
    execution.stop()
    assert execution.advance()
    assert execution.output() == ModelRunnerOutput([], 1.5)
    assert [array.size for array in results[0]] == [0, 0, 0]
    assert (bench.pool == POISON).all()


def test_its_result_is_read_when_it_is_complete(bench: Bench, text: Text) -> None:
    read: list[StepResult] = []

    def take(result: StepResult) -> ModelRunnerOutput:
        read.append(result)
        return ModelRunnerOutput([(7,)])

    execution = Execution(bench.model, bench.cache, bench.batch([(text, 70)]), take)
    while not execution.advance(execution.stage + 1):
        with pytest.raises(AssertionError, match="of 3"):
            execution.output()
    assert not read
    assert execution.output().tokens == [(7,)]
    want = whole_logits(bench.model, text.token_ids)
    assert_same_bits(read[0].logits, want)
    np.testing.assert_array_equal(read[0].tokens, want.argmax(axis=1))


def test_when_it_is_complete_nothing_more_is_computed(bench: Bench, text: Text) -> None:
    execution = bench.begin([(text, 70)])
    assert execution.advance()
    before = (execution.hidden.copy(), execution.result.logits.copy())
    bench.pool[:] = POISON
    assert execution.advance()
    assert (bench.pool == POISON).all()
    assert_same_bits(execution.hidden, before[0])
    assert_same_bits(execution.result.logits, before[1])


def test_between_stages_other_steps_do_not_touch_it(bench: Bench, text: Text) -> None:
    execution = bench.begin([(text, 70)])
    execution.advance(1)
    before = execution.hidden.copy()
    bench.run((Text(random_tokens(bench.model, 100, seed=1)), 100))
    assert_same_bits(execution.hidden, before)


def test_a_stop_that_comes_first_lets_one_stage_pass(bench: Bench, text: Text) -> None:
    execution = bench.begin([(text, 70)])
    for stage in range(1, execution.num_stages + 1):
        execution.stop()
        assert execution.advance() is (stage == execution.num_stages)
        assert execution.stage == stage
    assert_same_bits(execution.result.logits, whole_logits(bench.model, text.token_ids))


def test_a_stop_holds_once(bench: Bench, text: Text) -> None:
    execution = bench.begin([(text, 70)])
    execution.stop()
    execution.stop()
    assert not execution.advance()
    assert execution.advance()


def test_a_stop_is_for_its_own_step_alone(bench: Bench, text: Text) -> None:
    stopped = bench.begin([(text, 70)])
    stopped.stop()
    other = bench.begin([(Text(random_tokens(bench.model, 50, seed=1)), 50)])
    assert other.advance()
    assert not stopped.advance()


@pytest.mark.parametrize("num_threads", [1, 2])
def test_another_thread_stops_a_step_while_it_runs(num_threads: int) -> None:
    """A prompt that would take the machine a second is stopped when its tokens are looked up."""
    deep = TinyModel(
        num_layers=100,
        hidden_size=32,
        intermediate_size=32,
        vocab_size=64,
        num_heads=1,
        num_kv_heads=1,
        context_length=2048,
    )
    with closing(
        native_model(
            PATH, pack(deep).packed, num_threads=num_threads, max_tokens=2048, max_model_len=2048
        )
    ) as model:
        bench = Bench(model, 64)
        execution = bench.begin([(Text(random_tokens(model, 2048)), 2048)])
        execution.hidden[:] = np.nan
        running = threading.Thread(target=execution.advance)
        running.start()
        while np.isnan(execution.hidden[0, 0]) and running.is_alive():
            pass
        execution.stop()
        running.join()
        assert 1 <= execution.stage < execution.num_stages
        assert not execution.is_complete


def test_a_step_that_does_not_fit_stays_where_it_is(bench: Bench) -> None:
    large = Text([1] * 257)
    execution = bench.begin([(large, 257)])
    for _ in range(2):
        with pytest.raises(InternalError, match=r"step of 257 tokens .* \(tokens at most 256, "):
            execution.advance()
        assert execution.stage == 0
    assert (bench.pool == POISON).all()


def test_a_step_does_not_outlive_its_model() -> None:
    model = native_model(PATH, packed_model("llama").packed)
    bench = Bench(model)
    execution = bench.begin([(Text([1, 2, 3]), 3)])
    execution.advance(1)
    model.close()
    with pytest.raises(InternalError, match="closed"):
        execution.advance()
    assert execution.stage == 1
