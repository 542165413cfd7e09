"""Moving blocks: every operation against the same thing done block by block."""

from __future__ import annotations

import numpy as np
import pytest

from headway.core.errors import ConfigError
from headway.executor.swap import BlockStore

BLOCK_BYTES = 192


@pytest.fixture
def store() -> BlockStore:
    store = BlockStore(BLOCK_BYTES, num_blocks=10, num_swap_blocks=4)
    for block, values in enumerate(store.pool):
        values[:] = contents_of(block)
    return store


def contents_of(block: int) -> np.ndarray:
    """Bytes that no two blocks have in common."""
    return (np.arange(BLOCK_BYTES) + 20 * block).astype(np.uint8)


def contents(store: BlockStore) -> list[int]:
    """The pool's blocks by what is in them; checks that each is whole."""
    found = [int(values[0]) // 20 for values in store.pool]
    for block, values in zip(found, store.pool, strict=True):
        np.testing.assert_array_equal(values, contents_of(block))
    return found


def test_a_new_store_is_zero() -> None:
    store = BlockStore(BLOCK_BYTES, 3, 0)
    assert store.pool.shape == (3, BLOCK_BYTES)
    assert not store.pool.any()


def test_blocks_follow_each_other_where_the_kernels_expect_them() -> None:
    store = BlockStore(BLOCK_BYTES, 5, 2)
    assert store.pool.flags.c_contiguous
    # Vectors are read from it: a cache line must begin with it.
    assert store.pool.ctypes.data % 64 == 0


def test_the_pool_stays_where_it_is(store: BlockStore) -> None:
    address = store.pool.ctypes.data
    store.swap_out([(3, 2)])
    store.copy([(0, 3)])
    store.swap_in([(2, 1)])
    assert store.pool.ctypes.data == address


def test_out_and_in_again_elsewhere(store: BlockStore) -> None:
    store.swap_out([(3, 2), (7, 0)])
    store.copy([(0, 3), (0, 7)])
    assert contents(store) == [0, 1, 2, 0, 4, 5, 6, 0, 8, 9]
    store.swap_in([(0, 1), (2, 9)])
    assert contents(store) == [0, 7, 2, 0, 4, 5, 6, 0, 8, 3]


def test_copies_are_done_one_after_the_other(store: BlockStore) -> None:
    store.copy([(1, 2), (2, 3), (5, 6), (7, 6)])
    assert contents(store) == [0, 1, 1, 1, 4, 5, 7, 7, 8, 9]


def test_a_source_may_be_overwritten_by_a_later_copy(store: BlockStore) -> None:
    store.copy([(1, 2), (3, 1)])
    assert contents(store) == [0, 3, 1, 3, 4, 5, 6, 7, 8, 9]


def test_nothing_to_do(store: BlockStore) -> None:
    store.swap_out([])
    store.swap_in([])
    store.copy([])
    assert contents(store) == list(range(10))


def test_memory_that_is_not_to_be_had() -> None:
    with pytest.raises(ConfigError, match="are not to be had"):
        BlockStore(1 << 40, 1 << 20, 0)


def test_what_is_closed_is_empty(store: BlockStore) -> None:
    view = store.pool[3]
    store.close()
    store.close()
    assert store.pool.size == 0
    np.testing.assert_array_equal(view, contents_of(3))  # until the last view of it is gone
