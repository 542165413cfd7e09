"""The executor against a reference in numpy, and its promises: chunks, batches and swaps."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from growing_sequence import GrowingSequence
from tiny_models import TinyModel

from headway.core.errors import ConfigError, InternalError, ModelError
from headway.core.sampling_params import SamplingParams
from headway.core.scheduler_output import SchedulerOutput, StepRow
from headway.executor.base import ModelRunnerOutput, TokenLogprobs
from headway.executor.native import NativeExecutor
from headway.executor.precision import PRECISIONS
from headway.kernels.loader import available_paths
from headway.models.registry import default_home

Moves = tuple[tuple[int, int], ...]

GREEDY = SamplingParams(temperature=0.0, max_tokens=64)
NUM_BLOCKS = 60

MODELS: dict[str, TinyModel] = {
    "llama": TinyModel("llama", head_dim=32),
    "llama, untied": TinyModel("llama", head_dim=32, tied=False, num_kv_heads=4),
    "llama 3 rope": TinyModel(
        "llama",
        head_dim=32,
        rope_factors=np.linspace(1.0, 8.0, 16).astype(np.float32),
        rope_theta=5e5,
    ),
    "llama, linear rope": TinyModel(
        "llama", head_dim=32, extra={"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    ),
    "qwen2": TinyModel("qwen2", head_dim=32, num_kv_heads=1),
    "qwen3": TinyModel("qwen3", head_dim=32, tied=False),
}


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., NativeExecutor]]:
    """Executors by model name, each built once a module."""
    home = tmp_path_factory.mktemp("home")
    executors: dict[str, NativeExecutor] = {}

    def build(name: str, **options: object) -> NativeExecutor:
        key = f"{name} {sorted(options.items())}"
        if key not in executors:
            path = home / f"{len(executors)}.gguf"
            MODELS[name].write(path)
            block_bytes = 32 * 2 * 4 * 8 * MODELS[name].num_layers * 16  # more than any precision's
            settings: dict[str, object] = {
                "kv_cache_bytes": NUM_BLOCKS * block_bytes,
                "swap_space_bytes": NUM_BLOCKS * block_bytes,
                "home": home_for(home),
                "num_threads": 2,
            }
            executors[key] = NativeExecutor(path, **(settings | options))  # type: ignore[arg-type]
        return executors[key]

    yield build
    for executor in executors.values():
        executor.close()


def home_for(directory: Path) -> Path:
    """A home of its own for models, with the kernels that have been compiled already."""
    kernels = default_home() / "kernels"
    kernels.mkdir(parents=True, exist_ok=True)
    if not (directory / "kernels").exists():
        (directory / "kernels").symlink_to(kernels, target_is_directory=True)
    return directory


class Pool:
    """Hands out blocks and runs steps, as the scheduler and the engine would."""

    def __init__(self, executor: NativeExecutor, seed: int = 0) -> None:
        self.executor = executor
        self.random = np.random.default_rng(seed)
        self.free = self.random.permutation(executor.num_blocks).tolist()
        #: All that the last step said.
        self.last = ModelRunnerOutput([])

    def sequence(
        self, length: int, params: SamplingParams = GREEDY, tokens: list[int] | None = None
    ) -> GrowingSequence:
        if tokens is None:
            tokens = self.random.integers(0, self.executor.vocab_size, length).tolist()
        return GrowingSequence(f"r{len(self.free)}-{length}", tokens, params)

    def row(
        self,
        sequence: GrowingSequence,
        count: int | None = None,
        drafts: tuple[int, ...] = (),
        seeds: tuple[int | None, ...] | None = None,
    ) -> StepRow:
        """The row, with blocks for all its tokens."""
        count = sequence.num_uncomputed_tokens if count is None else count
        end = sequence.num_computed_tokens + count + len(drafts)
        while len(sequence.block_table) * self.executor.block_size < end:
            sequence.block_table.append(self.free.pop())
        return sequence.row(count, drafts=drafts, seeds=seeds)

    def step(
        self,
        *work: tuple[GrowingSequence, int],
        swap_in: Moves = (),
        block_copies: Moves = (),
    ) -> list[int | None]:
        """Compute so many tokens of each; returns the token that follows, None where none does."""
        rows = tuple(self.row(sequence, count) for sequence, count in work)
        output = SchedulerOutput(rows=rows, swap_in=swap_in, block_copies=block_copies)
        self.last = self.executor.execute(output)
        for (sequence, _), row, tokens in zip(work, rows, self.last.tokens, strict=True):
            sequence.take(row, tokens)
        return [tokens[0] if tokens else None for tokens in self.last.tokens]

    def logits(self, *work: tuple[GrowingSequence, int]) -> np.ndarray:
        """The logits of a step's sampled rows, which must all need them; nothing is taken in."""
        rows = tuple(self.row(sequence, count) for sequence, count in work)
        execution = self.executor.begin(SchedulerOutput(rows=rows))
        assert execution.advance()
        return execution.result.logits


RANDOM = SamplingParams(temperature=1.0, seed=1, max_tokens=64)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_the_reference_s(
    make: Callable[..., NativeExecutor], name: str, precision: str
) -> None:
    """Prefill over several blocks, then decode; every position's logits against numpy."""
    executor = make(name, precision=precision)
    pool = Pool(executor)
    tokens = pool.random.integers(0, executor.vocab_size, 90).tolist()
    want = MODELS[name].logits(tokens)
    # Weights are rounded to 8 bits; activations are, too, or to bfloat16s.
    tolerance = 0.2 if precision == "int8" else 0.1
    request = pool.sequence(0, RANDOM, tokens[:80])
    for end in range(80, 91):
        got = pool.logits((request, request.num_uncomputed_tokens))
        np.testing.assert_allclose(got[0], want[end - 1], atol=tolerance * np.std(want) * 4)
        request.num_computed_tokens = end
        if end < 90:
            request.token_ids.append(tokens[end])


def test_greedy_is_the_reference_s_argmax(make: Callable[..., NativeExecutor]) -> None:
    executor = make("qwen3", precision="bf16")
    pool = Pool(executor)
    request = pool.sequence(40)
    for _ in range(8):
        want = MODELS["qwen3"].logits(request.token_ids)[-1]
        (token,) = pool.step((request, request.num_uncomputed_tokens))
        assert token is not None
        assert want[token] >= want.max() - 0.2 * want.std()


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_chunked_prefill_is_the_whole_prefill(
    make: Callable[..., NativeExecutor], name: str
) -> None:
    pool = Pool(make(name))
    whole = pool.sequence(100, RANDOM)
    want = pool.logits((whole, 100))
    for size in (1, 7, 32, 33, 50, 99):
        request = pool.sequence(0, RANDOM, whole.prompt)
        while request.num_computed_tokens < 100:
            count = min(size, 100 - request.num_computed_tokens)
            got = pool.logits((request, count))
            request.num_computed_tokens += count
        assert len(got) == 1
        np.testing.assert_array_equal(got, want)
        pool.free += request.block_table


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_prompt_s_logprobs_are_the_reference_s_however_it_is_cut(
    make: Callable[..., NativeExecutor], name: str
) -> None:
    executor = make(name)
    params = SamplingParams(temperature=0.0, prompt_logprobs=3)
    whole: list[TokenLogprobs] = []
    for size in (100, 1, 7, 32, 33, 99):
        pool = Pool(executor)
        request = pool.sequence(100, params)
        other = pool.sequence(3)
        rated: list[TokenLogprobs] = []
        while request.num_computed_tokens < 100:
            count = min(size, 100 - request.num_computed_tokens)
            pool.step((other, other.num_uncomputed_tokens), (request, count))
            if 1 in pool.last.prompt_logprobs:
                assert pool.last.prompt_logprobs[1].start == 1 + len(rated)
                rated += pool.last.prompt_logprobs[1].tokens
        whole = whole or rated
        assert rated == whole
    want = MODELS[name].logits(request.prompt)
    want -= np.log(np.exp(want).sum(1, keepdims=True))
    np.testing.assert_allclose(
        [token.logprob for token in whole],
        [want[at, request.token_ids[at + 1]] for at in range(99)],
        atol=0.15 * np.std(want) * 4,
    )


def test_who_asks_for_logprobs_gets_the_same_tokens(make: Callable[..., NativeExecutor]) -> None:
    pool = Pool(make("llama"))
    plain = pool.sequence(40)
    rated = pool.sequence(
        0, SamplingParams(temperature=0.0, logprobs=5, prompt_logprobs=0), plain.prompt
    )
    for count in (40, *[1] * 12):
        (first, second) = pool.step((plain, count), (rated, count))
        assert first == second
        assert pool.last.logprobs[1][0].token_id == pool.last.logprobs[1][0].top[0][0] == second


@pytest.mark.parametrize(
    "params", [GREEDY, RANDOM, SamplingParams(temperature=0.0, logprobs=1)], ids=str
)
def test_a_request_whose_numbers_are_none_ends_alone(
    make: Callable[..., NativeExecutor], params: SamplingParams
) -> None:
    executor = make("llama")
    pool = Pool(executor)
    victim, *others = (pool.sequence(40, kind) for kind in (params, GREEDY, RANDOM))
    pool.step((victim, 40), *((other, 40) for other in others))
    sound = pool.step(*((other, 1) for other in others))
    for other in others:
        other.token_ids.pop()
        other.num_computed_tokens -= 1
    # What attention reads of the victim's first tokens is no number any more.
    executor._store.pool[victim.block_table[0]] = 0xFF
    assert pool.step((victim, 1), *((other, 1) for other in others)) == [None, *sound]
    assert set(pool.last.errors) == {0}
    assert str(pool.last.errors[0]).endswith(" is nan")
    # Nor does it harm who gets its blocks.
    heir = pool.sequence(0, GREEDY, others[0].prompt)
    heir.block_table = victim.block_table
    assert pool.step((heir, 40)) == [others[0].output[0]]
    assert pool.step((heir, 1)) == sound[:1]


def test_a_step_mixes_prefill_decode_and_sampling(make: Callable[..., NativeExecutor]) -> None:
    executor = make("llama")
    pool = Pool(executor)
    prompts = [pool.sequence(length) for length in (5, 40, 33)]
    alone = []
    for request in prompts:
        twin = pool.sequence(0, GREEDY, request.prompt)
        tokens = [pool.step((twin, len(twin.token_ids)))[0]]
        tokens += [pool.step((twin, 1))[0] for _ in range(6)]
        alone.append(tokens)
        pool.free += twin.block_table
    first, second, third = prompts
    sampling = pool.sequence(12, SamplingParams(temperature=0.8, seed=5))
    got: list[list[int | None]] = [[], [], []]
    assert pool.step((first, 5), (second, 20)) == [first.token_ids[-1], None]
    got[0].append(first.token_ids[-1])
    tokens = pool.step((first, 1), (second, 20), (sampling, 12), (third, 30))
    assert tokens[3] is None
    assert tokens[2] is not None
    got[0].append(tokens[0])
    got[1].append(tokens[1])
    tokens = pool.step((third, 3), (first, 1), (sampling, 1), (second, 1))
    got[2].append(tokens[0])
    got[0].append(tokens[1])
    got[1].append(tokens[3])
    for _ in range(4):
        sampled = pool.step((first, 1), (second, 1), (third, 1))
        for output, token in zip(got, sampled, strict=True):
            output.append(token)
    for want, have in zip(alone, got, strict=True):
        assert have == want[: len(have)]


def test_sampled_tokens_do_not_depend_on_the_company(
    make: Callable[..., NativeExecutor],
) -> None:
    executor = make("qwen2")
    params = SamplingParams(temperature=1.2, top_k=40, top_p=0.95, seed=7, max_tokens=32)
    pool = Pool(executor)
    alone = pool.sequence(30, params)
    pool.step((alone, 30))
    for _ in range(10):
        pool.step((alone, 1))
    others = [pool.sequence(length) for length in (3, 20, 45)]
    beside = pool.sequence(0, params, alone.prompt)
    pool.step((others[0], 3), (beside, 30), (others[1], 20))
    for _ in range(9):
        pool.step((others[0], 1), (others[2], 4), (beside, 1))
    pool.step((beside, 1))
    assert beside.token_ids == alone.token_ids
    assert len(set(alone.output)) > 1


def test_swap_and_copies_move_whole_blocks(make: Callable[..., NativeExecutor]) -> None:
    executor = make("llama")
    pool = Pool(executor)
    undisturbed = pool.sequence(70)
    pool.step((undisturbed, 70))
    for _ in range(8):
        pool.step((undisturbed, 1))
    request = pool.sequence(0, GREEDY, undisturbed.prompt)
    pool.step((request, 70))
    for turn in range(8):
        # Out to the swap space, the blocks overwritten by another sequence, in to other blocks.
        slots = [5 + turn, 0, executor.num_swap_blocks - 1 - turn]
        swap_out = tuple(zip(request.block_table, slots, strict=True))
        executor.execute(SchedulerOutput(swap_out=swap_out))
        intruder = pool.sequence(90)
        intruder.block_table = list(request.block_table)
        pool.step((intruder, 90))
        fresh = [pool.free.pop() for _ in slots]
        pool.free += request.block_table
        request.block_table = fresh
        pool.step((request, 1), swap_in=tuple(zip(slots, fresh, strict=True)))
    assert request.token_ids == undisturbed.token_ids


def test_a_copied_block_is_the_same_context(make: Callable[..., NativeExecutor]) -> None:
    pool = Pool(make("llama"))
    parent = pool.sequence(50)
    pool.step((parent, 50))
    child = pool.sequence(0, GREEDY, parent.prompt)
    child.token_ids = list(parent.token_ids)
    child.num_computed_tokens = parent.num_computed_tokens
    copy = pool.free.pop()
    child.block_table = [parent.block_table[0], copy]
    copies = ((parent.block_table[1], copy),)
    tokens = pool.step((parent, 1), (child, 1), block_copies=copies)
    assert tokens[0] == tokens[1]


def test_a_step_without_rows_only_moves_blocks(make: Callable[..., NativeExecutor]) -> None:
    executor = make("llama")
    assert executor.execute(SchedulerOutput(block_copies=((0, 1),))).tokens == []


@pytest.mark.parametrize("params", [GREEDY, RANDOM], ids=["greedy", "sampling"])
def test_sequences_that_share_a_prompt_go_on_as_if_they_were_alone(
    make: Callable[..., NativeExecutor], params: SamplingParams
) -> None:
    executor = make("llama")
    pool = Pool(executor)
    parent = pool.sequence(40, params)
    seeds = (1, 2, 3)
    row = pool.row(parent, seeds=seeds)
    (first,) = executor.execute(SchedulerOutput(rows=(row,))).tokens
    choices = []
    for index, token_id in enumerate(first):
        choice = pool.sequence(0, replace(params, seed=seeds[index]), parent.prompt)
        choice.take(row, (token_id,))
        choice.block_table = list(parent.block_table[:1])
        choices.append(choice)
    copies = []
    for choice in choices:  # each writes into a copy of the last block
        choice.block_table.append(pool.free.pop())
        copies.append((parent.block_table[1], choice.block_table[1]))
    pool.step(*((choice, 1) for choice in choices), block_copies=tuple(copies))
    for _ in range(6):
        pool.step(*((choice, 1) for choice in choices))
    for choice in choices:
        alone = pool.sequence(0, choice.params, parent.prompt)
        pool.step((alone, 40))
        for _ in range(7):
            pool.step((alone, 1))
        assert choice.output == alone.output
    assert len({tuple(choice.output) for choice in choices}) == (1 if params is GREEDY else 3)


@pytest.mark.parametrize("params", [GREEDY, RANDOM], ids=["greedy", "sampling"])
@pytest.mark.parametrize("right", [0, 1, 2, 3])
def test_drafts_change_the_number_of_steps_and_not_the_tokens(
    make: Callable[..., NativeExecutor], params: SamplingParams, right: int
) -> None:
    """In every step so many right drafts, then a wrong one; over the edge of a block."""
    executor = make("llama", precision="bf16")
    pool = Pool(executor)
    plain = pool.sequence(25, params)
    pool.step((plain, 25))
    for _ in range(20):
        pool.step((plain, 1))
    drafting = pool.sequence(0, params, plain.prompt)
    other = pool.sequence(5)
    num_steps = 0
    while len(drafting.output) < 16:
        rest = plain.output[len(drafting.output) :]
        drafts = (*rest[:right], (rest[right] + 1) % executor.vocab_size)
        row = pool.row(drafting, drafts=drafts)
        output = executor.execute(SchedulerOutput(rows=(pool.row(other), row)))
        drafting.take(row, output.tokens[1])
        assert output.tokens[1] == tuple(rest[: right + 1])
        num_steps += 1
    assert drafting.output == plain.output[: len(drafting.output)]
    assert num_steps == -(-16 // (right + 1))


def test_the_logits_after_drafts_are_the_reference_s(make: Callable[..., NativeExecutor]) -> None:
    executor = make("llama", precision="bf16")
    pool = Pool(executor)
    drafting = pool.sequence(30, RANDOM)
    drafts = (5, 6, 7)
    want = MODELS["llama"].logits([*drafting.token_ids, *drafts])[29:]
    execution = executor.begin(SchedulerOutput(rows=(pool.row(drafting, drafts=drafts),)))
    assert execution.advance()
    np.testing.assert_allclose(execution.result.logits, want, atol=0.4 * np.std(want))


def test_a_step_that_was_pickled_gives_the_same(make: Callable[..., NativeExecutor]) -> None:
    executor = make("llama")
    pool = Pool(executor)
    params = SamplingParams(seed=3, logprobs=2, prompt_logprobs=1, logit_bias={5: 1.5})
    rows = [pool.row(pool.sequence(20 + 9 * index, params)) for index in range(3)]
    output = SchedulerOutput(7, tuple(rows))
    result = executor.execute(output)
    copy = pickle.loads(pickle.dumps(output))
    assert copy == output
    assert executor.execute(copy)._replace(swap_ms=0) == result._replace(swap_ms=0)
    assert pickle.loads(pickle.dumps(result)) == result


def test_it_says_what_runs(make: Callable[..., NativeExecutor]) -> None:
    executor = make("llama")
    facts = executor.describe()
    assert executor.kernels.path in available_paths()
    assert facts["kernels"] == f"{executor.kernels.path}, int8 activations"
    assert facts["threads"].startswith("2")
    assert f"{executor.num_blocks:,} blocks of 32 tokens" in facts["KV cache"]


def test_an_unknown_precision_and_unknown_kernels_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = MODELS["llama"].write(tmp_path / "m.gguf")
    with pytest.raises(ConfigError, match="precision is 'fp8', must be int8 or bf16"):
        NativeExecutor(path, home=home_for(tmp_path), precision="fp8")  # type: ignore[arg-type]
    monkeypatch.setenv("HEADWAY_KERNELS", "mmx")
    with pytest.raises(ConfigError, match="HEADWAY_KERNELS is 'mmx'"):
        NativeExecutor(path, home=home_for(tmp_path))


def test_long_context_up_to_the_last_position(make: Callable[..., NativeExecutor]) -> None:
    executor = make("qwen2", precision="bf16")
    pool = Pool(executor)
    length = executor.max_model_len
    request = pool.sequence(length, RANDOM)
    want = MODELS["qwen2"].logits(request.token_ids)[-1]
    while request.num_computed_tokens + 128 < length:
        pool.step((request, 128))
    got = pool.logits((request, length - request.num_computed_tokens))
    np.testing.assert_allclose(got[0], want, atol=0.4 * want.std())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kv_cache_bytes": 0}, "kv_cache_bytes is 0"),
        ({"kv_cache_bytes": 10}, "a single block of 32 tokens takes"),
        ({"swap_space_bytes": -1}, "swap_space_bytes is -1"),
        ({"max_model_len": 513}, "the model's context is 512"),
        ({"num_threads": 0}, "num_threads is 0"),
        ({"max_num_seqs": 0}, "max_num_seqs is 0"),
    ],
    ids=str,
)
def test_refuses_settings_out_of_range(tmp_path: Path, options: dict[str, int], words: str) -> None:
    path = MODELS["llama"].write(tmp_path / "m.gguf")
    with pytest.raises(ConfigError, match=words):
        NativeExecutor(path, home=home_for(tmp_path), **options)  # type: ignore[arg-type]


def test_refuses_files_that_are_no_models(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    for data in (b"", b"GGUF", b"not a model" * 100):
        path.write_bytes(data)
        with pytest.raises(ModelError, match=r"m\.gguf"):
            NativeExecutor(path, home=home_for(tmp_path))
    with pytest.raises(ModelError, match="nowhere"):
        NativeExecutor(tmp_path / "nowhere.gguf", home=home_for(tmp_path))


def test_default_pool_is_capped_by_what_the_sequences_can_fill(tmp_path: Path) -> None:
    path = MODELS["llama"].write(tmp_path / "m.gguf")
    executor = NativeExecutor(path, home=home_for(tmp_path), max_num_seqs=3, max_model_len=100)
    assert executor.num_blocks == 3 * 4
    assert executor.num_swap_blocks > 0
    executor.close()
    executor.close()
    with pytest.raises(InternalError, match="closed"):
        executor.execute(SchedulerOutput())
