"""Steps at random, sound and corrupted, for a library of kernels that checks every access.

``test_fuzz.py`` runs this in a process of its own, which has the sanitizer's library loaded::

    fuzz_steps.py LIBRARY random     runs steps, and prints as JSON what became of them
    fuzz_steps.py LIBRARY cut        prints as JSON how a step ends for which an array is too short

Every array is an allocation of its own, of exactly its size, so that the sanitizer reports the
first byte before it and the first behind it. A report ends the process. Besides, a step must be
refused if ``headway.h`` does not allow it, and no other; one that is refused writes nothing, and
one that runs writes to no block of the pool but its own tokens'.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from headway.kernels.library import Cache, Layer, Matrix, Shape, Step, Weights, open_library
from headway.models.packing import INT4, INT8, pack_int4, pack_int8

AnyArray = npt.NDArray[Any]
IntArray = npt.NDArray[np.int32]
Address = int | None

BLOCK: Final = 32
INT32: Final = np.iinfo(np.int32)

#: Limits of every model, none of which ends a tile or a block. So many tokens are more than the 64
#: rows that are normalised one by one.
MAX_TOKENS: Final = 71
MAX_MODEL_LEN: Final = 75
NUM_BLOCKS: Final = 25
#: Things that are done with each model.
NUM_ACTIONS: Final = 150
#: A count of this size or less is believed, and the array made as long as it says.
MOST: Final = 1000

NUM_THREADS: Final = (1, 2, 3)
PRECISIONS: Final = (0, 1)


class Sizes(NamedTuple):
    """Of a model."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int


#: Between them: 1, 2, 3, 4 and 7 heads of queries for one of keys, all head sizes, a vocabulary of
#: less than a panel, some that fill no panel, and one that does.
MODELS: Final = (
    Sizes(1, 2, 2, 32, 32, 64, 33),
    Sizes(2, 4, 2, 32, 64, 96, 64),
    Sizes(2, 3, 1, 64, 96, 32, 97),
    Sizes(2, 4, 1, 64, 64, 64, 150),
    Sizes(3, 7, 1, 32, 64, 64, 31),
    Sizes(1, 2, 1, 128, 64, 32, 130),
)

_libc = ctypes.CDLL(None)
_libc.malloc.restype = ctypes.c_void_p
_libc.malloc.argtypes = [ctypes.c_size_t]
_libc.free.argtypes = [ctypes.c_void_p]


class Memory:
    """Arrays as the kernels are given them, each in an allocation of exactly its size.

    The allocations are libc's, whose place the sanitizer's have taken: numpy keeps small arrays
    that are freed, and the sanitizer would not know of it.

    Args:
        cut: the array of this name gets one element less than it has.
        skewed: the array of this name begins at an odd address.
    """

    def __init__(self, cut: str = "", skewed: str = "") -> None:
        self._cut, self._skewed = cut, skewed
        self._allocations: list[int] = []
        self._places: dict[str, tuple[int, int]] = {}

    def put(self, name: str, values: AnyArray) -> Address:
        """The address of a copy, or None if there are no values."""
        if not values.size:
            return None
        size = values.nbytes - values.itemsize * (name == self._cut)
        skew = int(name == self._skewed)
        allocation = _libc.malloc(size + skew)
        assert allocation
        self._allocations.append(allocation)
        ctypes.memmove(allocation + skew, np.ascontiguousarray(values).ctypes.data, size)
        self._places[name] = (allocation + skew, size)
        return int(allocation + skew)

    @property
    def names(self) -> list[str]:
        """Of the arrays that have values."""
        return list(self._places)

    def contents(self, name: str) -> bytes:
        """Of an array that was put here; nothing if it has no values."""
        return ctypes.string_at(*self._places[name]) if name in self._places else b""

    def free(self) -> None:
        for allocation in self._allocations:
            _libc.free(allocation)
        self._allocations.clear()


class Model:
    """A model with random weights, and its pool.

    Args:
        library: of the kernels.
        sizes: of the model.
        precision: ``hw_precision``.
        num_threads: that compute.
        rng: chooses the weights, their formats, and which it has of those that not all models have.
            None: it has all of them, and its weights are always the same.
        memory: where weights and pool are put.
        max_model_len: positions to have cosines and sines for.
        num_blocks: of the pool.
    """

    def __init__(
        self,
        library: Any,
        sizes: Sizes,
        precision: int,
        num_threads: int,
        rng: np.random.Generator | None,
        memory: Memory,
        max_model_len: int = MAX_MODEL_LEN,
        num_blocks: int = NUM_BLOCKS,
    ) -> None:
        self.library, self.sizes, self.memory = library, sizes, memory
        self.max_model_len, self.num_blocks = max_model_len, num_blocks
        self.num_stages = sizes.num_layers + 1
        self.rng = rng or np.random.default_rng(0)
        is_complete = rng is None
        has_bias, has_norms, is_untied = self.rng.random(3) < (2 if is_complete else 0.5)
        hidden_size, head_dim = sizes.hidden_size, sizes.head_dim
        q_size, kv_size = sizes.num_heads * head_dim, sizes.num_kv_heads * head_dim
        shape = Shape(
            sizes.num_layers,
            hidden_size,
            sizes.intermediate_size,
            sizes.vocab_size,
            sizes.num_heads,
            sizes.num_kv_heads,
            head_dim,
            max_model_len,
            1e-5,
            precision,
            num_threads,
            MAX_TOKENS,
        )
        #: What products are tried on alone.
        self.matrices: list[Matrix] = []
        layers = (Layer * sizes.num_layers)(
            *(
                Layer(
                    self._vector(f"{index}.attn_norm", hidden_size),
                    self._vector(f"{index}.ffn_norm", hidden_size),
                    self._vector(f"{index}.qkv_bias", q_size + 2 * kv_size) if has_bias else None,
                    self._vector(f"{index}.q_norm", head_dim) if has_norms else None,
                    self._vector(f"{index}.k_norm", head_dim) if has_norms else None,
                    self._matrix(f"{index}.qkv", q_size + 2 * kv_size, hidden_size),
                    self._matrix(f"{index}.attn_output", hidden_size, q_size),
                    self._matrix(f"{index}.gate_up", 2 * sizes.intermediate_size, hidden_size),
                    self._matrix(f"{index}.down", hidden_size, sizes.intermediate_size),
                )
                for index in range(sizes.num_layers)
            )
        )
        structures = memory.put("layers", np.frombuffer(bytes(layers), np.uint8))
        embedding = self._matrix("embedding", sizes.vocab_size, hidden_size)
        angles = np.outer(np.arange(max_model_len), self.rng.random(head_dim // 2))
        weights = Weights(
            ctypes.cast(structures or 0, ctypes.POINTER(Layer)),
            embedding,
            self._matrix("lm_head", sizes.vocab_size, hidden_size) if is_untied else embedding,
            self._vector("output_norm", hidden_size),
            memory.put("cosines", np.cos(angles).astype(np.float32)),
            memory.put("sines", np.sin(angles).astype(np.float32)),
        )
        self._block_size = library.hw_block_bytes(ctypes.byref(shape))
        halves = num_blocks * self._block_size // 2
        numbers = self.rng.standard_normal(halves).astype(np.float32).view(np.uint32) >> 16
        self.pool = memory.put("pool", numbers.astype(np.uint16))
        self.handle = library.hw_model_new(ctypes.byref(shape), ctypes.byref(weights))
        assert self.handle

    def _vector(self, name: str, size: int) -> Address:
        return self.memory.put(name, self.rng.standard_normal(size).astype(np.float32))

    def _matrix(self, name: str, outputs: int, inputs: int) -> Matrix:
        weight_format = int(self.rng.choice([INT4, INT8]))
        scales = (self.rng.random((outputs, inputs // 32)) + 0.1).astype(np.float16)
        if weight_format == INT4:
            numbers = self.rng.integers(0, 16, (outputs, inputs)).astype(np.uint8)
            d = scales / np.float16(4 * inputs**0.5)
            data = pack_int4(numbers, d, d * np.float16(-8))
        else:
            signed = self.rng.integers(-128, 128, (outputs, inputs)).astype(np.int8)
            data = pack_int8(signed, scales / np.float16(64 * inputs**0.5))
        matrix = Matrix(self.memory.put(name, data), -(-outputs // 32) * 32, inputs, weight_format)
        self.matrices.append(matrix)
        return matrix

    def blocks(self) -> AnyArray:
        """``[num_blocks, bytes]``: a copy of the pool."""
        return np.frombuffer(self.memory.contents("pool"), np.uint8).reshape(self.num_blocks, -1)

    def close(self) -> None:
        self.library.hw_model_free(self.handle)
        self.memory.free()


@dataclass(frozen=True)
class Draft:
    """A step that is in no memory yet.

    Attributes:
        counts: the step's numbers of things, ``num_tokens`` … ``num_logits``.
        first_stage, last_stage: of the step.
        num_blocks: that the pool is said to have.
        arrays: those that the step reads, ``token_ids`` … ``logit_rows``, of which each is as long
            as the counts say, if it can be.
        stop: what is found where the kernels look whether to stop; None: there is no such place.
    """

    counts: dict[str, int]
    first_stage: int
    last_stage: int
    num_blocks: int
    arrays: dict[str, IntArray]
    stop: int | None

    @staticmethod
    def of(model: Model, arrays: dict[str, AnyArray], stop: int | None = None) -> Draft:
        """A whole step of these arrays."""
        names = ("token_ids", "past_lens", "block_indices", "sample_rows", "logit_rows")
        counts = dict(zip(_COUNTS, (len(arrays[name]) for name in names), strict=True))
        ints = {name: np.asarray(arrays[name], np.int32) for name in _BOUNDS}
        return Draft(counts, 0, model.num_stages, model.num_blocks, ints, stop)

    def own_blocks(self) -> IntArray:
        """The blocks that hold the step's tokens."""
        begins, tables = self.arrays["begins"], self.arrays["block_begins"]
        found = [np.empty(0, np.int32)]
        for index, past in enumerate(self.arrays["past_lens"]):
            last = past + begins[index + 1] - begins[index] - 1
            table = self.arrays["block_indices"][tables[index] :]
            found.append(table[past // BLOCK : last // BLOCK + 1])
        return np.concatenate(found)


#: The counts of a step, in its order, and the arrays that are as long, or longer by that much.
_COUNTS: Final[dict[str, dict[str, int]]] = {
    "num_tokens": {"token_ids": 0},
    "num_seqs": {"past_lens": 0, "begins": 1, "block_begins": 1},
    "num_blocks": {"block_indices": 0},
    "num_sampled": {"sample_rows": 0},
    "num_logits": {"logit_rows": 0},
}
#: The arrays of a step, in its order, and what their entries are to stay below.
_BOUNDS: Final[dict[str, Callable[[Model, Draft], int]]] = {
    "token_ids": lambda model, draft: model.sizes.vocab_size,
    "past_lens": lambda model, draft: model.max_model_len,
    "begins": lambda model, draft: draft.counts["num_tokens"],
    "block_indices": lambda model, draft: draft.num_blocks,
    "block_begins": lambda model, draft: draft.counts["num_blocks"],
    "sample_rows": lambda model, draft: draft.counts["num_tokens"],
    "logit_rows": lambda model, draft: draft.counts["num_sampled"],
}
_OUTPUTS: Final = ("hidden", "tokens", "maxima", "logits")


def is_sound(draft: Draft, model: Model) -> bool:
    """Whether the step is one that ``headway.h`` allows."""
    num_tokens, num_seqs, num_blocks, num_sampled, num_logits = draft.counts.values()
    if not (
        1 <= num_seqs <= num_tokens <= MAX_TOKENS
        and num_blocks >= 1
        and 0 <= num_logits <= num_sampled <= 2 * MAX_TOKENS
        and 0 <= draft.first_stage < draft.last_stage <= model.num_stages
    ):
        return False
    arrays = {name: values.astype(np.int64) for name, values in draft.arrays.items()}
    begins, block_begins = arrays["begins"], arrays["block_begins"]
    ends = arrays["past_lens"] + np.diff(begins)
    rules = [
        begins[[0, -1]] == (0, num_tokens),
        np.diff(begins) >= 1,
        block_begins[[0, -1]] == (0, num_blocks),
        np.diff(block_begins) * BLOCK >= ends,
        ends <= model.max_model_len,
        np.diff(arrays["logit_rows"]) >= 1,
    ]
    for name in ("token_ids", "past_lens", "block_indices", "sample_rows", "logit_rows"):
        rules += [arrays[name] >= 0, arrays[name] < _BOUNDS[name](model, draft)]
    return all(rule.all() for rule in rules)


def sound_step(model: Model, rng: np.random.Generator, num_tokens: int = 0) -> Draft:
    """One to five sequences, with any past, in scattered blocks, sampled anywhere.

    They have any number of tokens in all unless one is given.
    """
    if not num_tokens:
        few, many = rng.integers(1, (13, 41))
        num_tokens = int(rng.choice([few, many, MAX_TOKENS], p=[0.75, 0.2, 0.05]))
    num_seqs = int(rng.integers(1, min(5, num_tokens) + 1))
    ends = np.sort(rng.permutation(num_tokens - 1)[: num_seqs - 1] + 1)
    begins = np.concatenate([[0], ends, [num_tokens]])
    lengths = np.diff(begins)
    most = model.max_model_len - lengths
    past_lens = rng.choice([rng.integers(0, most + 1), most, 0 * most])
    block_counts = -(-(past_lens + lengths) // BLOCK) + rng.integers(0, 2, num_seqs)
    some = int(rng.integers(2 * num_tokens))
    num_sampled = rng.choice([0, some, 2 * num_tokens], p=[0.1, 0.8, 0.1])
    sample_rows = rng.integers(0, num_tokens, num_sampled)
    is_wanted = rng.random(len(sample_rows)) < rng.choice([0, 0.5, 1])
    arrays = {
        "token_ids": rng.integers(0, model.sizes.vocab_size, num_tokens),
        "past_lens": past_lens,
        "begins": begins,
        "block_indices": rng.permutation(model.num_blocks)[: block_counts.sum()],
        "block_begins": np.concatenate([[0], np.cumsum(block_counts)]),
        "sample_rows": sample_rows,
        "logit_rows": np.flatnonzero(is_wanted),
    }
    return Draft.of(model, arrays, stop=(None, 0, 0, 1, -1)[rng.integers(5)])


def corrupted(draft: Draft, model: Model, rng: np.random.Generator) -> Draft:
    """The step with one to three changes, of which none need be wrong."""
    changes = (
        _with_too_many_tokens,
        _with_another_count,
        _with_other_stages,
        _with_a_smaller_pool,
        _with_other_entries,
    )
    indices = rng.choice(len(changes), rng.choice([1, 1, 2, 3]), p=[0.02, 0.25, 0.1, 0.05, 0.58])
    for index in np.sort(indices):
        draft = changes[index](draft, model, rng)
    return draft


def _with_too_many_tokens(draft: Draft, model: Model, rng: np.random.Generator) -> Draft:
    return sound_step(model, rng, MAX_TOKENS + int(rng.integers(1, 3)))


def _with_another_count(draft: Draft, model: Model, rng: np.random.Generator) -> Draft:
    name = str(rng.choice(list(_COUNTS)))
    old = draft.counts[name]
    values = [INT32.min, -1, 0, 1, old - 1, old + 1, 2 * old, MAX_TOKENS + 1, 2 * MAX_TOKENS + 1]
    # Tables are of any length: only the sequences' own lengths say that a number is too large.
    values.append(MOST if name == "num_blocks" else INT32.max)
    count = int(rng.choice(values))
    arrays = dict(draft.arrays)
    if 0 <= count <= MOST:
        for array, more in _COUNTS[name].items():
            arrays[array] = np.resize(arrays[array], count + more)
    return replace(draft, counts={**draft.counts, name: count}, arrays=arrays)


def _with_other_stages(draft: Draft, model: Model, rng: np.random.Generator) -> Draft:
    values = [INT32.min, INT32.max, *range(-1, model.num_stages + 2)]
    first, last = rng.choice(values, 2)
    if rng.random() < 0.5:
        first = 0
    return replace(draft, first_stage=int(first), last_stage=int(last))


def _with_a_smaller_pool(draft: Draft, model: Model, rng: np.random.Generator) -> Draft:
    values = [INT32.min, -1, 0, *range(1, model.num_blocks)]
    return replace(draft, num_blocks=int(rng.choice(values)))


def _with_other_entries(draft: Draft, model: Model, rng: np.random.Generator) -> Draft:
    """One entry has another value, or all from one on are more or less."""
    name = str(rng.choice([name for name, values in draft.arrays.items() if values.size]))
    values = draft.arrays[name].astype(np.int64)
    place = int(rng.integers(len(values)))
    old, bound = int(values[place]), _BOUNDS[name](model, draft)
    if rng.random() < 0.2:
        values[place:] += rng.choice([-BLOCK, -1, 1, BLOCK, INT32.max])
    else:
        values[place] = rng.choice(
            [
                *(INT32.min, -1, 0, 1, INT32.max),
                *(old - BLOCK, old - 1, old + 1, old + BLOCK),
                *(bound - 1, bound, bound + 1),
                *(values[place - 1], values[rng.integers(len(values))]),
                rng.integers(INT32.min, INT32.max),
            ]
        )
    return replace(draft, arrays={**draft.arrays, name: values.astype(np.int32)})


class PlacedStep:
    """A step in memory; between two stages, its hidden state is what the first has made of it."""

    def __init__(self, model: Model, draft: Draft, memory: Memory) -> None:
        self.draft = draft
        self._model, self._memory = model, memory
        rng, sizes = model.rng, model.sizes
        num_rows = len(draft.arrays["sample_rows"])
        num_logits = len(draft.arrays["logit_rows"])
        hidden = rng.standard_normal((len(draft.arrays["token_ids"]), sizes.hidden_size))
        if hidden.size and rng.random() < 0.1:
            hidden.flat[rng.integers(hidden.size)] = rng.choice([np.nan, np.inf, 1e38, 1e-42])
        stop = [] if draft.stop is None else [draft.stop]
        self._step = Step(
            *draft.counts.values(),
            0,
            0,
            *(memory.put(name, draft.arrays[name]) for name in _BOUNDS),
            memory.put("hidden", hidden.astype(np.float32)),
            memory.put("tokens", np.full(num_rows, -1, np.int32)),
            memory.put("maxima", np.full(num_rows, -1, np.float32)),
            memory.put("logits", np.full((num_logits, sizes.vocab_size), -1, np.float32)),
            memory.put("stop", np.array(stop, np.int32)),
        )

    def run(self, first: int, last: int) -> int:
        """What the kernels answer; checks what they have written."""
        model, draft = self._model, self.draft
        self._step.first_stage, self._step.last_stage = first, last
        cache = Cache(model.pool, draft.num_blocks)
        pool, outputs = model.blocks(), self._outputs()
        answer = int(
            model.library.hw_run(model.handle, ctypes.byref(cache), ctypes.byref(self._step))
        )
        is_changed = (model.blocks() != pool).any(axis=1)
        assert (answer >= 0) == is_sound(replace(draft, first_stage=first, last_stage=last), model)
        if answer < 0:
            assert not is_changed.any()
            assert self._outputs() == outputs
            return answer
        assert first < answer <= last
        assert answer == last or draft.stop
        assert np.isin(np.flatnonzero(is_changed), draft.own_blocks()).all()
        tokens = np.frombuffer(self._memory.contents("tokens"), np.int32)
        if answer == model.num_stages:
            assert (tokens >= 0).all()
            assert (tokens < model.sizes.vocab_size).all()
        else:
            assert self._outputs()[1:] == outputs[1:]
        return answer

    def _outputs(self) -> list[bytes]:
        return [self._memory.contents(name) for name in _OUTPUTS]

    def free(self) -> None:
        self._memory.free()


def run_product(model: Model, memory: Memory, rows: int) -> None:
    """A product alone, with one of the model's matrices."""
    matrix = model.matrices[model.rng.integers(len(model.matrices))]
    x = model.rng.standard_normal((rows, matrix.inputs)).astype(np.float32)
    y = np.full((rows, matrix.outputs), np.nan, np.float32)
    addresses = memory.put("x", x), memory.put("y", y)
    model.library.hw_matmul(model.handle, ctypes.byref(matrix), rows, *addresses)
    assert np.isfinite(np.frombuffer(memory.contents("y"), np.float32)).all()


def run_steps(model: Model, outcomes: Counter[str]) -> None:
    """Run steps at random, some of which wait between two stages while others run."""
    rng = model.rng
    suspended: list[tuple[PlacedStep, int]] = []

    def go_on(step: PlacedStep, stage: int, last: int) -> None:
        while stage < last:
            stage = step.run(stage, last)
            assert stage > 0, model.library.hw_error(stage)
        if stage < model.num_stages:
            suspended.append((step, stage))
            outcomes["suspended"] += 1
        else:
            step.free()
            outcomes["sound"] += 1

    for _ in range(NUM_ACTIONS):
        draft = sound_step(model, rng)
        kind = rng.random()
        if kind < 0.05:
            memory = Memory()
            run_product(model, memory, int(rng.integers(1, 14)))
            memory.free()
            outcomes["products"] += 1
        elif kind < 0.2:
            is_short = len(suspended) < 3 and rng.random() < 0.7
            last = int(rng.integers(1, model.num_stages)) if is_short else model.num_stages
            go_on(PlacedStep(model, draft, Memory()), 0, last)
        elif kind < 0.28 and suspended:
            step, stage = suspended.pop(rng.integers(len(suspended)))
            go_on(step, stage, int(rng.integers(stage, model.num_stages)) + 1)
        else:
            step = PlacedStep(model, corrupted(draft, model, rng), Memory())
            answer = step.run(step.draft.first_stage, step.draft.last_stage)
            words = model.library.hw_error(answer).decode() if answer < 0 else "computed"
            outcomes[words] += 1
            step.free()
    for step, stage in list(suspended):
        go_on(step, stage, model.num_stages)


def run_random(library: Any) -> dict[str, int]:
    """What became of all steps: how many were sound, or refused in which words."""
    outcomes: Counter[str] = Counter()
    for index, sizes in enumerate(MODELS):
        for precision in PRECISIONS:
            rng = np.random.default_rng([index, precision])
            num_threads = NUM_THREADS[(index + precision) % len(NUM_THREADS)]
            model = Model(library, sizes, precision, num_threads, rng, Memory())
            run_steps(model, outcomes)
            model.close()
    return outcomes


def run_whole(library: Any, memory: Memory) -> None:
    """A step that reads or writes the last element of every array."""
    sizes = Sizes(1, 2, 1, 32, 32, 32, 64)
    model = Model(library, sizes, 0, 1, None, memory, max_model_len=64, num_blocks=2)
    arrays = {
        "token_ids": np.array([0, 63]),
        "past_lens": np.array([62]),
        "begins": np.array([0, 2]),
        "block_indices": np.array([0, 1]),
        "block_begins": np.array([0, 2]),
        "sample_rows": np.array([1, 0]),
        "logit_rows": np.array([0, 1]),
    }
    step = PlacedStep(model, Draft.of(model, arrays, stop=0), memory)
    assert step.run(0, model.num_stages) == model.num_stages
    run_product(model, memory, 3)


def end_of(task: Callable[[], None]) -> int:
    """How a process ends that does this: its exit status."""
    sys.stdout.flush()
    process = os.fork()
    if process == 0:
        try:
            task()
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def run_cut(library: Any) -> dict[str, int]:
    """How the whole step ends: as it is, with each array cut in turn, and with one at an odd place.

    An array that is cut has one element less than the step says.
    """
    memory = Memory()
    run_whole(library, memory)
    ends = {"whole": end_of(partial(run_whole, library, Memory()))}
    for name in memory.names:
        ends[name] = end_of(partial(run_whole, library, Memory(cut=name)))
    ends["skewed"] = end_of(partial(run_whole, library, Memory(skewed="token_ids")))
    return ends


def main() -> None:
    file, mode = sys.argv[1:]
    run = {"random": run_random, "cut": run_cut}[mode]
    print(json.dumps(run(open_library(Path(file)))))


if __name__ == "__main__":
    main()
