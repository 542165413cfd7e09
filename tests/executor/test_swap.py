"""Moving blocks: every operation against the same thing done block by block."""

from __future__ import annotations

import numpy as np
import pytest

from headway.core.errors import ConfigError
from headway.executor.swap import BlockStore

ROW_BYTES = (48, 64, 48, 64)


@pytest.fixture
def store() -> BlockStore:
    store = BlockStore(ROW_BYTES, num_blocks=10, num_swap_blocks=4)
    for index, rows in enumerate(store.pool):
        rows[:] = (np.arange(10) * 10 + index)[:, None]
    return store


def contents(store: BlockStore) -> list[int]:
    """The pool's blocks by what is in them; checks that each is whole in every tensor."""
    values = store.pool[0][:, 0] // 10
    for index, rows in enumerate(store.pool):
        assert (rows == (values * 10 + index)[:, None]).all()
    return [int(value) for value in values]


def test_a_new_store_is_zero() -> None:
    store = BlockStore(ROW_BYTES, 3, 0)
    assert not any(rows.any() for rows in store.pool)


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
        BlockStore([1 << 40], 1 << 20, 0)
