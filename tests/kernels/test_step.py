"""A step of a model: right, to the bit the same however it is cut and run, and safe if it is wrong.

Every test runs on each path of this machine, in both precisions.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import TinyModel
from tiny_runs import (
    MODELS,
    PATHS,
    Bench,
    Models,
    RawStep,
    Text,
    assert_same_bits,
    make_batch,
    native_model,
    pack,
    packed_model,
    random_tokens,
    whole_logits,
)

from headway.core.errors import ConfigError, InternalError
from headway.executor.batch import StepBatch
from headway.executor.execution import Execution
from headway.executor.native_model import NativeModel
from headway.executor.precision import Precision
from headway.models.packing import PackedMatrix

FloatArray = npt.NDArray[np.float32]
DoubleArray = npt.NDArray[np.float64]

NUM_THREADS = (1, 2, 3)
#: Prompts to test with, as long as this.
LENGTH = 100


@pytest.fixture(scope="module")
def models() -> Iterator[Models]:
    with closing(Models()) as models:
        yield models


#: ``whole(name, seed)``: the tokens of a prompt, and the logits after each, if the prompt is one
#: step alone on one thread.
Whole = Callable[..., tuple[list[int], FloatArray]]


@pytest.fixture(scope="module")
def whole(models: Models, path: str, precision: Precision) -> Whole:
    @functools.cache
    def compute(name: str, seed: int = 0) -> tuple[list[int], FloatArray]:
        model = models.get(path, name, precision, num_threads=1)
        tokens = random_tokens(model, LENGTH, seed)
        return tokens, whole_logits(model, tokens)

    return compute


# --- what is computed -----------------------------------------------------------------------------


def log_softmax(logits: npt.NDArray[np.floating]) -> DoubleArray:
    values = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return np.asarray(values - np.log(np.exp(values).sum(axis=1, keepdims=True)))


@functools.cache
def float_logits(name: str, kind: str) -> tuple[list[int], DoubleArray]:
    """Tokens, and the logits after each as a float32 model has them."""
    tiny = packed_model(name, kind).tiny
    tokens = np.random.default_rng(1).integers(0, tiny.vocab_size, LENGTH).tolist()
    return tokens, tiny.logits(tokens)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_nearly_those_of_float32(
    models: Models, path: str, precision: Precision, name: str, kind: str
) -> None:
    """The weights are the file's own, so what is left is the rounding of activations.

    To round to 8 bits moves a group's values by its largest / 254 at most; that is about 1 % of
    their size, and a logit is the end of some ten such products in a row. Keys and values in
    bfloat16 are rounded by 2⁻⁹ at most.
    """
    tokens, want = float_logits(name, kind)
    got = whole_logits(models.get(path, name, precision, kind=kind), tokens)
    distances = np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1)
    exact, rough = log_softmax(want), log_softmax(got)
    divergences = (np.exp(exact) * (exact - rough)).sum(axis=1)
    if precision == "int8":
        assert distances.mean() < 0.05
        assert divergences.mean() < 0.003
        assert divergences.max() < 0.03
    else:
        assert distances.mean() < 0.01
        assert divergences.mean() < 1e-4
        assert divergences.max() < 1e-3


@functools.cache
def rounded_logits(name: str, precision: Precision) -> tuple[list[int], DoubleArray]:
    """Tokens, and the logits after each, with every rounding that the kernels do on purpose."""
    tiny, packed = packed_model(name, "Q4_0")
    config, arrays = packed.config, packed.arrays
    tokens = np.random.default_rng(2).integers(0, tiny.vocab_size, LENGTH).tolist()

    def weights(matrix: str) -> reference.Weights:
        return reference.unpack(*packed.matrices[matrix])

    def product(matrix: str, x: DoubleArray) -> DoubleArray:
        values = x.astype(np.float32)
        if precision == "int8":
            return reference.matmul_int8(weights(matrix), values)
        return values.astype(np.float64) @ weights(matrix).values().astype(np.float64).T

    angles = np.outer(np.arange(LENGTH), arrays["rope_frequencies"])
    turn = (np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32))
    group = config.num_heads // config.num_kv_heads
    mask = np.where(np.tri(LENGTH, dtype=bool), 0.0, -np.inf)
    hidden = weights("embedding").values()[tokens].astype(np.float64)
    for layer in range(config.num_layers):

        def norm(part: str, x: DoubleArray, layer: int = layer) -> DoubleArray:
            weight = arrays[f"{layer}.{part}"]
            return reference.rms_norm(x.astype(np.float32), weight, config.rms_norm_eps)

        qkv = product(f"{layer}.qkv", norm("attn_norm", hidden))
        qkv = qkv + arrays.get(f"{layer}.qkv_bias", np.zeros(1))
        query, key, value = (
            part.reshape(LENGTH, -1, config.head_dim)
            for part in np.split(qkv, [config.q_size, config.q_size + config.kv_size], axis=1)
        )
        if f"{layer}.q_norm" in arrays:
            query, key = norm("q_norm", query), norm("k_norm", key)
        query, key = reference.rotate(query, *turn), reference.rotate(key, *turn)
        key, value = (
            reference.round_bf16(part.astype(np.float32)).astype(np.float64).repeat(group, axis=1)
            for part in (key, value)
        )
        scores = np.einsum("qhd,khd->hqk", query, key) / np.sqrt(config.head_dim) + mask
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        scores /= scores.sum(axis=-1, keepdims=True)
        attended = np.einsum("hqk,khd->qhd", scores, value).reshape(LENGTH, -1)
        hidden = hidden + product(f"{layer}.attn_output", attended)
        both = product(f"{layer}.gate_up", norm("ffn_norm", hidden)).reshape(LENGTH, -1, 2, 16)
        gated = reference.swiglu(both[:, :, 0], both[:, :, 1]).reshape(LENGTH, -1)
        hidden = hidden + product(f"{layer}.down", gated)
    last = reference.rms_norm(hidden.astype(np.float32), arrays["output_norm"], config.rms_norm_eps)
    logits = product("lm_head" if "lm_head" in packed.matrices else "embedding", last)
    return tokens, logits[:, : config.vocab_size]


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_same_roundings(
    models: Models, path: str, precision: Precision, name: str
) -> None:
    """Then only float32's own are left, and values that fall to the other side of a half.

    One of those in a key or in an 8-bit activation moves all that follows from it. Before the first
    of them, which is never at the very beginning, nothing but float32 is in the way.
    """
    tokens, want = rounded_logits(name, precision)
    got = whole_logits(models.get(path, name, precision, kind="Q4_0"), tokens)
    distances = np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1)
    if path == "avx512bf16":  # rounds queries and the weights of attention as well
        assert distances.mean() < (0.05 if precision == "int8" else 0.02)
    elif precision == "int8":
        assert np.quantile(distances, 0.02) < 3e-6
        assert distances.mean() < 0.02
    else:
        assert np.quantile(distances, 0.02) < 3e-5
        assert np.median(distances) < 1e-3
        assert distances.max() < 1e-2


@functools.cache
def last_logits() -> tuple[list[int], DoubleArray]:
    """A whole context, and the logits after its last tokens as a float32 model has them."""
    tiny = packed_model("qwen2").tiny
    tokens = np.random.default_rng(0).integers(0, tiny.vocab_size, tiny.context_length).tolist()
    return tokens, tiny.logits(tokens)[-8:]


def test_the_last_positions_of_the_context(path: str, precision: Precision) -> None:
    tokens, want = last_logits()
    with closing(native_model(path, packed_model("qwen2").packed, precision)) as model:
        text = Text(tokens)
        bench = Bench(model)
        while text.num_left:
            bench.run((text, min(128, text.num_left)))
    distances = np.linalg.norm(text.logits[-8:] - want, axis=1) / np.linalg.norm(want, axis=1)
    assert distances.max() < (0.15 if precision == "int8" else 0.03)


# --- the likeliest token --------------------------------------------------------------------------


@pytest.mark.parametrize("num_threads", NUM_THREADS)
def test_the_likeliest_token_is_the_first_of_the_largest_logits(
    models: Models, path: str, precision: Precision, num_threads: int
) -> None:
    for name in MODELS:
        model = models.get(path, name, precision, num_threads=num_threads)
        text = Text(random_tokens(model, 70))
        bench = Bench(model)
        work = [(text, 70)]
        execution = bench.begin(work)
        bench.finish(execution, work)
        result = execution.result
        np.testing.assert_array_equal(result.tokens, result.logits.argmax(axis=1))
        np.testing.assert_array_equal(result.maxima, result.logits.max(axis=1))


@pytest.mark.parametrize("num_kinds", [1, 7, 100])
def test_the_smallest_among_equals(path: str, precision: Precision, num_kinds: int) -> None:
    """A head of many panels, in which every output is there several times."""
    tiny = TinyModel(tied=False, vocab_size=410)
    output = tiny.tensors["output.weight"]
    output[:] = output[np.arange(410) % num_kinds]
    for num_threads in NUM_THREADS:
        with closing(native_model(path, pack(tiny).packed, precision, num_threads)) as model:
            raw = raw_step(model, random_tokens(model, 60))
            run(model, raw)
        assert (raw.tokens < num_kinds).all()
        np.testing.assert_array_equal(raw.tokens, raw.logits.argmax(axis=1))


def with_broken_outputs(matrix: PackedMatrix, outputs: Sequence[int]) -> PackedMatrix:
    """The matrix of INT8, with scales that are no numbers for some of its outputs."""
    data = matrix.data.copy()
    groups = data.reshape(matrix.outputs // 32, matrix.inputs // 32, -1)
    for output in outputs:
        panel, column = divmod(output, 32)
        groups[panel, :, 1024 + 2 * column : 1026 + 2 * column] = 0xFF
    return matrix._replace(data=data)


@pytest.mark.parametrize("num_threads", NUM_THREADS)
def test_a_logit_that_is_no_number_is_passed_over(
    path: str, precision: Precision, num_threads: int
) -> None:
    packed = pack(TinyModel(tied=False, vocab_size=410)).packed
    broken = [0, 31, 32, 200, *range(300, 409)]
    head = with_broken_outputs(packed.matrices["lm_head"], broken)
    packed = replace(packed, matrices={**packed.matrices, "lm_head": head})
    with closing(native_model(path, packed, precision, num_threads)) as model:
        raw = raw_step(model, random_tokens(model, 60))
        run(model, raw)
    assert np.isnan(raw.logits[:, broken]).all()
    np.testing.assert_array_equal(raw.tokens, np.nanargmax(raw.logits, axis=1))
    np.testing.assert_array_equal(raw.maxima, np.nanmax(raw.logits, axis=1))


@pytest.mark.parametrize("num_threads", NUM_THREADS)
def test_activations_that_are_no_numbers_spoil_their_own_sequence_alone(
    path: str, precision: Precision, num_threads: int
) -> None:
    packed = packed_model("llama, untied").packed
    embedding = with_broken_outputs(packed.matrices["embedding"], [3])
    packed = replace(packed, matrices={**packed.matrices, "embedding": embedding})
    with closing(native_model(path, packed, precision, num_threads)) as model:
        sound = [token + 4 * (token == 3) for token in random_tokens(model, 50)]
        (alone, victim), bench = (Text(sound), Text([*sound[:20], 3, *sound[20:]])), Bench(model)
        bench.run((alone, 50))
        beside = Text(sound)
        work = [(beside, 50), (victim, 51)]
        execution = bench.begin(work)
        bench.finish(execution, work)
    assert_same_bits(beside.logits, alone.logits)
    assert np.isnan(victim.logits[20:]).all()
    assert np.isnan(execution.result.maxima[70:]).all()
    assert np.isfinite(execution.result.maxima[:50]).all()


@pytest.mark.parametrize("part", ["keys", "values"])
def test_a_cache_that_is_no_number_spoils_who_attends_to_it(
    models: Models, path: str, precision: Precision, part: str
) -> None:
    model = models.get(path, "llama", precision)
    bench = Bench(model)
    texts = [Text(random_tokens(model, 41, seed)) for seed in range(3)]
    bench.run(*((text, 40) for text in texts))
    # The first token of the first layer's first KV head: keys lie in pairs, values as well.
    halves = bench.pool[texts[1].table[0]].view(np.uint16)
    place = 0 if part == "keys" else 32 * model.config.head_dim
    halves[place] = 0x7FC0
    execution = bench.begin([(text, 1) for text in texts])
    bench.finish(execution, [(text, 1) for text in texts])
    assert np.isnan(texts[1].logits[-1]).all()
    assert np.isnan(execution.result.maxima[1])
    for text in (texts[0], texts[2]):
        assert_same_bits(text.logits, whole_logits(model, text.token_ids))


# --- bits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_decoding_is_prefill(
    models: Models, path: str, precision: Precision, whole: Whole, name: str
) -> None:
    """The same positions in one step, and each in a step of its own."""
    tokens, want = whole(name)
    model = models.get(path, name, precision)
    text, bench = Text(tokens), Bench(model)
    while text.num_left:
        bench.run((text, 1))
    assert_same_bits(text.logits, want)


@pytest.mark.parametrize("size", [3, 7, 32, 33, 99])
def test_chunks_of_any_size(
    models: Models, path: str, precision: Precision, whole: Whole, size: int
) -> None:
    for name in ("llama, untied", "llama 3 rope", "qwen2"):
        tokens, want = whole(name)
        text, bench = Text(tokens), Bench(models.get(path, name, precision))
        while text.num_left:
            bench.run((text, min(size, text.num_left)))
        assert_same_bits(text.logits, want)


@pytest.mark.parametrize("num_threads", NUM_THREADS)
def test_any_company_on_any_number_of_threads(
    models: Models, path: str, precision: Precision, whole: Whole, num_threads: int
) -> None:
    """Prompts beside decoding, and 1 … 13 sequences that decode at a time."""
    for name in ("llama 3 rope", "qwen2"):
        bench = Bench(models.get(path, name, precision, num_threads=num_threads), 60)
        texts = [Text(whole(name, seed)[0]) for seed in range(13)]
        for number, text in enumerate(texts):
            bench.run(*((other, 1) for other in texts[:number]), (text, 20 + number))
        for number in range(1, 14):
            bench.run(*((text, 1) for text in texts[:number]))
        for seed, text in enumerate(texts):
            assert_same_bits(text.logits, whole(name, seed)[1][: text.num_computed])


@pytest.mark.parametrize("num_threads", NUM_THREADS)
def test_a_step_that_is_suspended_after_every_stage_goes_on_as_if_it_had_not_been(
    models: Models, path: str, precision: Precision, whole: Whole, num_threads: int
) -> None:
    """Between its stages, steps of other sequences are run, in blocks that others have left."""
    for name in ("llama", "qwen3"):
        model = models.get(path, name, precision, num_threads=num_threads)
        bench = Bench(model)
        decoding, prompt = Text(whole(name, 0)[0]), Text(whole(name, 1)[0])
        bench.run((decoding, 40))
        work = [(decoding, 1), (prompt, 70)]
        execution = bench.begin(work)
        for stage in range(model.num_stages):
            assert execution.stage == stage
            assert not execution.is_complete
            other = Text(whole(name, 2 + stage)[0])
            bench.run((other, 60))
            bench.run((other, 1))
            assert_same_bits(other.logits, whole(name, 2 + stage)[1][:61])
            bench.release(other)
            execution.advance(stage + 1)
        assert execution.is_complete
        bench.finish(execution, work)
        assert_same_bits(decoding.logits, whole(name, 0)[1][:41])
        assert_same_bits(prompt.logits, whole(name, 1)[1][:70])


def test_a_step_that_is_discarded_after_any_stage_is_computed_again(
    models: Models, path: str, precision: Precision, whole: Whole
) -> None:
    for name in ("llama, untied", "qwen2"):
        model = models.get(path, name, precision)
        for stage in range(model.num_stages + 1):
            bench = Bench(model)
            text = Text(whole(name)[0])
            bench.run((text, 37))
            bench.begin([(text, 50)]).advance(stage)
            bench.run((text, 6))  # fewer than before
            bench.run((text, text.num_left))
            assert_same_bits(text.logits, whole(name)[1])


#: What may become of a step.
FATES = ("run", "run", "run", "suspend", "discard")


@settings(deadline=None, max_examples=25)
@given(
    name=st.sampled_from(sorted(MODELS)),
    lengths=st.lists(st.integers(1, LENGTH), min_size=1, max_size=6),
    steps=st.lists(
        st.tuples(
            st.dictionaries(st.integers(0, 2), st.integers(1, 60), min_size=1),
            st.sampled_from(FATES),
            st.integers(0, 3),
            st.sampled_from(NUM_THREADS),
        ),
        max_size=16,
    ),
)
def test_whatever_happens_the_bits_are_the_same(
    models: Models,
    path: str,
    precision: Precision,
    whole: Whole,
    name: str,
    lengths: list[int],
    steps: list[tuple[dict[int, int], str, int, int]],
) -> None:
    """Three texts at a time, of which each gets the blocks of those before it.

    A step is chunks of some of them, what becomes of it, after which stage, and the threads. A
    suspended step keeps its texts until it is resumed, which is when nothing else can be done.
    """
    teams = {count: models.get(path, name, precision, num_threads=count) for count in NUM_THREADS}
    bench = Bench(teams[1], 12)
    waiting = [Text(whole(name, seed)[0][:length]) for seed, length in enumerate(lengths)]
    seeds = {id(text): seed for seed, text in enumerate(waiting)}
    places: list[Text | None] = [None, None, None]
    suspended: list[tuple[Execution, list[tuple[Text, int]]]] = []
    done = 0

    def settle() -> None:
        """Texts that are complete are compared, and make place for those that wait."""
        nonlocal done
        for place, text in enumerate(places):
            if text is not None and not text.num_left:
                seed = seeds[id(text)]
                assert_same_bits(text.logits, whole(name, seed)[1][: lengths[seed]])
                bench.release(text)
                places[place] = None
                done += 1
            if places[place] is None and waiting:
                places[place] = waiting.pop(0)

    def resume() -> None:
        execution, work = suspended.pop(0)
        bench.finish(execution, work)

    settle()
    for chunks, fate, stage, num_threads in steps:
        busy = {id(text) for _, work in suspended for text, _ in work}
        work = [
            (text, min(count, text.num_left))
            for place, count in chunks.items()
            if (text := places[place]) is not None and id(text) not in busy
        ]
        if not work:
            if suspended:
                resume()
        else:
            execution = bench.begin(work, teams[num_threads])
            if fate != "run":
                execution.advance(stage)
            if fate == "suspend":
                suspended.append((execution, work))
            elif fate == "run":
                bench.finish(execution, work)
        settle()
    while suspended:
        resume()
    while done < len(lengths):
        settle()
        most = teams[1].max_tokens // len(places)
        work = [(text, min(text.num_left, most)) for text in places if text is not None]
        if work:
            bench.run(*work)


def test_the_pool_is_written_at_a_sequence_s_own_tokens_alone(
    models: Models, path: str, precision: Precision
) -> None:
    """Blocks of others keep their bytes; so do positions of full pairs behind the last token."""
    for name in MODELS:
        model = models.get(path, name, precision)
        bench = Bench(model)
        first = Text(random_tokens(model, 40))
        bench.run((first, 40))
        before = bench.pool.copy()
        second = Text(random_tokens(model, 34, seed=1))
        bench.run((second, 34))
        untouched = [block for block in range(len(before)) if block not in second.table]
        assert_same_bits(bench.pool[untouched], before[untouched])
        config = model.config
        shape = (config.num_layers, config.num_kv_heads, 2, 32 * config.head_dim)
        keys, values = np.moveaxis(bench.pool[second.table[1]].view(np.uint16).reshape(shape), 2, 0)
        keys = keys.reshape(config.num_layers, config.num_kv_heads, -1, 32, 2)
        values = values.reshape(config.num_layers, config.num_kv_heads, 16, -1, 2)
        assert (keys[:, :, :, 2:] == 0xFFFF).all()
        assert (values[:, :, 1:] == 0xFFFF).all()
        assert not np.isnan((keys[:, :, :, :2].astype(np.uint32) << 16).view(np.float32)).any()


@pytest.mark.skipif(
    not {"avx2", "portable"} <= set(PATHS), reason="only one of the two can be run here"
)
@pytest.mark.parametrize("name", MODELS)
def test_avx2_and_portable_give_the_same_bits(
    models: Models, precision: Precision, name: str
) -> None:
    results = []
    for path in ("avx2", "portable"):
        model = models.get(path, name, precision, kind="Q4_1")
        bench, text = Bench(model), Text(random_tokens(model, LENGTH))
        bench.run((text, 61))
        while text.num_left:
            bench.run((text, min(13, text.num_left)))
        results.append((text.logits, bench.pool))
    for first, second in zip(*results, strict=True):
        assert_same_bits(first, second)


# --- what is wrong --------------------------------------------------------------------------------

INT32 = np.iinfo(np.int32)

#: Three sequences: the first has 40 tokens in the cache and goes on in its second block.
CHUNKS: list[tuple[list[int], int]] = [([5, 6, 7], 40), ([8], 31), (list(range(20)), 0)]
TABLES = [[3, 9], [4], [1]]
NUM_TOKENS = 24


def outside(least: int, end: int) -> st.SearchStrategy[int]:
    """Any number but those from ``least`` up to ``end``."""
    return st.one_of(st.integers(INT32.min, least - 1), st.integers(end, INT32.max))


def replaced(field: str, place: int, value: int) -> StepBatch:
    """The step, with another number in one of its arrays."""
    batch = make_batch(CHUNKS, TABLES)
    values = getattr(batch, field).copy()
    values[place] = value
    return batch._replace(**{field: values})


@st.composite
def wrong_steps(draw: st.DrawFn) -> tuple[StepBatch, str]:
    """A step in which something is wrong, and what is said of it."""
    batch = make_batch(CHUNKS, TABLES)
    token, sequence = draw(st.integers(0, NUM_TOKENS - 1)), draw(st.integers(0, 2))

    def any_but(value: int) -> int:
        return draw(outside(value, value + 1))

    def counts() -> StepBatch:
        nothing = np.empty(0, np.int32)
        return draw(
            st.sampled_from(
                [
                    batch._replace(token_ids=nothing),
                    batch._replace(block_indices=nothing),
                    batch._replace(past_lens=np.zeros(NUM_TOKENS + 1, np.int32)),
                    batch._replace(sample_rows=batch.sample_rows[:-1]),
                ]
            )
        )

    def size() -> StepBatch:
        if draw(st.booleans()):
            return make_batch([([1] * 257, 0)], [[*range(9)]])
        many = np.zeros(2 * 256 + 1, np.int32)
        return batch._replace(sample_rows=many, logit_rows=many[:0])

    def begins(field: str) -> StepBatch:
        values = getattr(batch, field)
        place = draw(st.integers(0, 3))
        if place in (0, 3):
            return replaced(field, place, any_but(int(values[place])))
        # A sequence without tokens, or without blocks.
        return replaced(field, place, draw(st.integers(INT32.min, int(values[place - 1]))))

    def logit_rows() -> StepBatch:
        if draw(st.booleans()):
            return replaced("logit_rows", token, draw(outside(0, NUM_TOKENS)))
        place = draw(st.integers(1, NUM_TOKENS - 1))
        return replaced("logit_rows", place, draw(st.integers(0, place - 1)))

    count = len(CHUNKS[sequence][0])
    kinds: dict[str, Callable[[], StepBatch]] = {
        "the numbers of tokens, sequences, blocks or samples do not fit together": counts,
        "the step has more tokens than there is scratch space for": size,
        "a token id is outside the vocabulary": lambda: replaced(
            "token_ids", token, draw(outside(0, 160))
        ),
        "a sequence is longer than the context": lambda: replaced(
            "past_lens", sequence, draw(outside(0, 512 - count + 1))
        ),
        "the sequences' tokens do not follow each other": lambda: begins("begins"),
        "a block is outside the pool": lambda: replaced(
            "block_indices", draw(st.integers(0, 3)), draw(outside(0, 12))
        ),
        "a block table is too short for its sequence": lambda: begins("block_begins"),
        "a sampled row is outside the step": lambda: replaced(
            "sample_rows", token, draw(outside(0, NUM_TOKENS))
        ),
        "the rows of logits are not sampled, or do not ascend": logit_rows,
    }
    words = draw(st.sampled_from(sorted(kinds)))
    return kinds[words](), words


def raw_step(model: NativeModel, tokens: Sequence[int]) -> RawStep:
    """A whole prompt, in the first blocks of a pool."""
    blocks = range(-(-len(tokens) // 32))
    return RawStep(make_batch([(tokens, 0)], [blocks]), model)


def run(model: NativeModel, raw: RawStep) -> None:
    bench = Bench(model)
    model.run(bench.cache, raw.step, 0, model.num_stages)


@settings(deadline=None, max_examples=120)
@given(wrong_steps())
def test_a_wrong_step_is_refused_in_words_and_writes_nothing(
    models: Models, path: str, precision: Precision, wrong: tuple[StepBatch, str]
) -> None:
    batch, words = wrong
    model = models.get(path, "llama", precision)
    bench = Bench(model, 12)
    raw = RawStep(batch, model)
    before = [values.copy() for values in (bench.pool, *raw.outputs)]
    with pytest.raises(InternalError) as caught:
        model.run(bench.cache, raw.step, 0, model.num_stages)
    assert f": {words} (" in str(caught.value)
    for values, old in zip((bench.pool, *raw.outputs), before, strict=True):
        assert_same_bits(values, old)


@pytest.mark.parametrize(
    ("first", "last"), [(-1, 2), (0, 0), (2, 1), (3, 3), (0, 4), (3, 4), (INT32.min, INT32.max)]
)
def test_stages_that_do_not_ascend(
    models: Models, path: str, precision: Precision, first: int, last: int
) -> None:
    model = models.get(path, "llama", precision)
    assert model.num_stages == 3
    bench, raw = Bench(model), raw_step(model, [1, 2, 3])
    with pytest.raises(InternalError, match="the stages do not ascend"):
        model.run(bench.cache, raw.step, first, last)
    assert (bench.pool == 0xFF).all()


@settings(deadline=None, max_examples=20)
@given(wrongs=st.lists(wrong_steps(), min_size=1, max_size=3))
def test_the_next_step_is_as_right_as_ever(
    models: Models,
    path: str,
    precision: Precision,
    whole: Whole,
    wrongs: list[tuple[StepBatch, str]],
) -> None:
    model = models.get(path, "llama", precision)
    text, bench = Text(whole("llama")[0]), Bench(model, 12)
    for batch, _ in wrongs:
        bench.run((text, 30))
        with pytest.raises(InternalError):
            model.run(bench.cache, RawStep(batch, model).step, 0, model.num_stages)
    assert_same_bits(text.logits, whole("llama")[1][: text.num_computed])


# --- threads --------------------------------------------------------------------------------------


def task_ids() -> set[int]:
    return {int(task.name) for task in Path("/proc/self/task").iterdir()}


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/task").exists(), reason="threads are looked at as Linux shows them"
)


@needs_proc
def test_threads_are_pinned_and_let_go_and_end(path: str, precision: Precision) -> None:
    before = task_ids()
    allowed = os.sched_getaffinity(0)
    model = native_model(path, packed_model("llama").packed, precision, num_threads=3)
    threads = task_ids() - before
    assert len(threads) == 2
    model.pin(True)
    assert all(len(os.sched_getaffinity(thread)) == 1 for thread in threads)
    assert os.sched_getaffinity(0) == allowed
    pinned = whole_logits(model, range(30))
    model.pin(False)
    assert all(os.sched_getaffinity(thread) == allowed for thread in threads)
    assert_same_bits(whole_logits(model, range(30)), pinned)
    model.close()
    model.close()
    assert task_ids() == before


def test_more_threads_than_there_can_be(path: str, precision: Precision) -> None:
    with pytest.raises(ConfigError, match="cannot begin with 1025 threads"):
        native_model(path, packed_model("llama").packed, precision, num_threads=1025)


def test_a_model_that_is_closed_computes_no_more(path: str, precision: Precision) -> None:
    model = native_model(path, packed_model("llama").packed, precision)
    raw, bench = raw_step(model, [1, 2, 3]), Bench(model)
    model.close()
    with pytest.raises(InternalError, match="closed"):
        model.run(bench.cache, raw.step, 0, 3)
