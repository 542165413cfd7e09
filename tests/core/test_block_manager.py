"""The blocks: one place each, LRU reuse, found again by contents, copied before shared writes."""

from __future__ import annotations

from collections import Counter

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from headway.core.block_manager import BlockManager, hash_block
from headway.core.errors import ConfigError, DuplicateRequest, InternalError, UnknownRequest


def chain(tokens: list[int], block_size: int) -> list[bytes]:
    """Hashes of the full blocks of ``tokens``."""
    hashes: list[bytes] = []
    for end in range(block_size, len(tokens) + 1, block_size):
        hashes.append(hash_block(hashes[-1] if hashes else b"", tokens[end - block_size : end]))
    return hashes


def fill(manager: BlockManager, request_id: str, tokens: list[int]) -> list[bytes]:
    """A table for ``tokens`` whose full blocks are findable."""
    hashes = chain(tokens, manager.block_size)
    table = manager.allocate(request_id, manager.num_blocks_for(len(tokens)))
    for block, block_hash in zip(table, hashes, strict=False):
        manager.commit(block, block_hash)
    return hashes


# ---------------------------------------------------------------------- hashes


def test_a_hash_covers_the_whole_prefix() -> None:
    first = hash_block(b"", [1, 2])
    assert hash_block(b"", [1, 2]) == first
    assert len(first) == 16
    others = [
        hash_block(b"", [2, 1]),
        hash_block(b"", [1, 3]),
        hash_block(first, [1, 2]),
        hash_block(hash_block(b"", [9, 2]), [1, 2]),
    ]
    assert len({first, *others}) == 5


# ---------------------------------------------------------------------- tables


@pytest.mark.parametrize("name", ["num_blocks", "block_size"])
def test_counts_below_one_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is 0, must be at least 1"):
        BlockManager(**({"num_blocks": 4, "block_size": 4} | {name: 0}))


def test_allocate_append_trim_free() -> None:
    manager = BlockManager(8, 4)
    table = manager.allocate("a", 2)
    assert manager.append("a", 3) is table
    assert len(set(table)) == 5
    assert manager.statistics() == (8, 3, 5, 0)
    assert manager.statistics().usage == 5 / 8
    cut = table[3:]
    assert manager.trim("a", 3) == cut
    assert len(table) == 3
    manager.free("a")
    assert manager.statistics() == (8, 8, 0, 0)
    assert "a" not in manager.tables
    manager.check()


def test_num_blocks_for_rounds_up() -> None:
    manager = BlockManager(8, 4)
    assert [manager.num_blocks_for(n) for n in (0, 1, 4, 5, 8)] == [0, 1, 1, 2, 2]


def test_the_block_freed_last_is_used_first() -> None:
    manager = BlockManager(4, 4)
    (first,) = manager.allocate("a", 1)
    manager.allocate("b", 1)
    manager.free("a")
    assert manager.allocate("c", 1) == [first]


def test_unknown_and_duplicate_tables() -> None:
    manager = BlockManager(4, 4)
    manager.allocate("a", 1)
    with pytest.raises(DuplicateRequest, match="'a' has a block table already"):
        manager.allocate("a", 1)
    for operation in (manager.append, manager.free, lambda name: manager.trim(name, 0)):
        with pytest.raises(UnknownRequest, match="'b' has no block table"):
            operation("b")
    with pytest.raises(UnknownRequest, match="'b' has no block table"):
        manager.fork("b", "c")
    with pytest.raises(DuplicateRequest):
        manager.fork("a", "a")
    assert manager.statistics() == (4, 3, 1, 0)
    assert manager.tables.keys() == {"a"}


def test_exhaustion_raises_and_changes_nothing() -> None:
    manager = BlockManager(4, 2)
    hashes = fill(manager, "gone", [1, 2, 3, 4])
    manager.free("gone")
    manager.allocate("a", 1)
    before = (manager.statistics(), list(manager.ref_counts), dict(manager.tables))
    with pytest.raises(InternalError, match="4 blocks asked for, 3 of 4 are available"):
        manager.append("a", 4)
    with pytest.raises(InternalError, match="5 blocks asked for"):
        manager.allocate("b", 5)
    assert (manager.statistics(), list(manager.ref_counts), dict(manager.tables)) == before
    assert len(manager.find(hashes)) == 2
    assert len(manager.append("a", 3)) == 4  # the cached ones as well
    manager.check()


# ---------------------------------------------------------------------- the prefix cache


def test_a_freed_request_is_findable() -> None:
    manager = BlockManager(8, 2)
    tokens = [1, 2, 3, 4, 5]
    hashes = fill(manager, "a", tokens)
    table = list(manager.tables["a"])
    manager.free("a")
    assert manager.statistics() == (8, 6, 0, 2)  # the partial block is free
    assert manager.find(hashes) == table[:2]
    assert manager.find(chain([1, 2, 3, 4, 6, 7], 2)) == table[:2]
    assert manager.find(chain([1, 2, 9, 4], 2)) == table[:1]
    assert manager.find(chain([9, 2, 3, 4], 2)) == []
    assert manager.statistics() == (8, 6, 0, 2)  # finding changes nothing


def test_a_found_prefix_is_shared_and_counted() -> None:
    manager = BlockManager(8, 2)
    hashes = fill(manager, "a", [1, 2, 3, 4])
    found = manager.find(hashes)
    manager.allocate("b")
    manager.touch(found)
    manager.share("b", found)
    assert manager.tables["b"] == manager.tables["a"]
    assert [manager.ref_counts[block] for block in found] == [2, 2]
    manager.free("a")
    assert manager.statistics() == (8, 6, 2, 0)
    manager.free("b")
    assert manager.statistics() == (8, 6, 0, 2)
    manager.check()


def test_touched_blocks_cannot_be_reused() -> None:
    manager = BlockManager(3, 2)
    hashes = fill(manager, "a", [1, 2, 3, 4])
    manager.free("a")
    found = manager.find(hashes)
    manager.touch(found)
    with pytest.raises(InternalError):
        manager.allocate("b", 2)
    manager.release(reversed(found))
    manager.allocate("b", 2)
    assert len(manager.find(hashes)) == 1
    manager.check()


def test_the_least_recently_used_is_reused_first_and_a_prefix_last() -> None:
    manager = BlockManager(5, 2)
    old = fill(manager, "old", [1, 2, 3, 4])
    new = fill(manager, "new", [5, 6, 7, 8])
    old_table, new_table = list(manager.tables["old"]), list(manager.tables["new"])
    manager.free("old")
    manager.free("new")
    assert manager.evict() == old_table[1]  # the end before the beginning
    assert manager.find(old) == old_table[:1]
    manager.touch(old_table[:1])  # used again: now the most recent
    manager.release(old_table[:1])
    assert manager.evict() == new_table[1]
    assert manager.evict() == new_table[0]
    assert manager.find(new) == []
    assert manager.evict() == old_table[0]
    with pytest.raises(InternalError, match="no cached block"):
        manager.evict()
    assert manager.statistics() == (5, 5, 0, 0)
    manager.check()


def test_the_first_block_with_a_hash_keeps_it() -> None:
    manager = BlockManager(4, 2)
    (first,) = manager.allocate("a", 1)
    (second,) = manager.allocate("b", 1)
    (one,) = chain([1, 2], 2)
    manager.commit(first, one)
    manager.commit(second, one)
    assert manager.find([one]) == [first]
    manager.free("b")
    assert manager.statistics().cached == 0  # the copy is worth nothing
    manager.free("a")
    assert manager.find([one]) == [first]
    assert manager.find([one])


def test_a_block_committed_anew_loses_its_old_hash() -> None:
    manager = BlockManager(2, 2)
    (block,) = manager.allocate("a", 1)
    manager.commit(block, b"old")
    manager.commit(block, b"new")
    assert manager.find([b"old"]) == []
    assert manager.find([b"new"]) == [block]
    manager.check()


def test_reset_forgets_the_cached_and_keeps_the_held() -> None:
    manager = BlockManager(8, 2)
    gone = fill(manager, "gone", [1, 2, 3, 4])
    manager.free("gone")
    held = fill(manager, "held", [5, 6])
    assert manager.reset_prefix_cache() == 2
    assert manager.find(gone) == []
    assert len(manager.find(held)) == 1
    assert manager.statistics() == (8, 7, 1, 0)
    manager.check()


def test_without_prefix_caching_nothing_is_findable() -> None:
    manager = BlockManager(4, 2, enable_prefix_caching=False)
    hashes = fill(manager, "a", [1, 2, 3, 4])
    assert manager.find(hashes) == []
    manager.free("a")
    assert manager.statistics() == (4, 4, 0, 0)


# ---------------------------------------------------------------------- copy-on-write


def test_fork_shares_every_block_and_copies_before_a_write() -> None:
    manager = BlockManager(8, 4)
    parent = manager.allocate("parent", 2)
    child = manager.fork("parent", "child")
    assert child == parent
    assert child is not parent
    assert manager.statistics().held == 2
    source = parent[1]
    copied = manager.copy_on_write("child", 1)
    assert copied == (source, child[1])
    assert child[1] != source
    assert parent[1] == source
    assert child[0] == parent[0]
    assert manager.copy_on_write("child", 1) is None
    assert manager.copy_on_write("parent", 1) is None
    manager.free("parent")
    assert manager.statistics().held == 2
    manager.free("child")
    assert manager.statistics().free == 8
    manager.check()


def test_copy_on_write_without_room_changes_nothing() -> None:
    manager = BlockManager(2, 4)
    parent = manager.allocate("parent", 2)
    child = manager.fork("parent", "child")
    with pytest.raises(InternalError):
        manager.copy_on_write("child", 1)
    assert child == parent
    assert [manager.ref_counts[block] for block in parent] == [2, 2]
    manager.check()


# ---------------------------------------------------------------------- all together

TOKENS = st.lists(st.integers(0, 1), min_size=0, max_size=9)


class BlockManagerMachine(RuleBasedStateMachine):
    """Against a model of who holds what; contents are a model of the memory behind the blocks."""

    @initialize(num_blocks=st.integers(1, 10), block_size=st.sampled_from([1, 2, 3]))
    def configure(self, num_blocks: int, block_size: int) -> None:
        self.manager = BlockManager(num_blocks, block_size)
        self.model: dict[str, list[int]] = {}
        #: block → the hash of what was written into it last.
        self.contents: dict[int, bytes] = {}
        self.count = 0

    def new_id(self) -> str:
        self.count += 1
        return f"r{self.count}"

    def pick(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from(sorted(self.model)))

    @rule(tokens=TOKENS)
    def start(self, tokens: list[int]) -> None:
        """What the scheduler does: find, touch, allocate the rest, compute, commit."""
        manager, request_id = self.manager, self.new_id()
        hashes = chain(tokens, manager.block_size)
        found = manager.find(hashes)
        for block, block_hash in zip(found, hashes, strict=False):
            assert self.contents[block] == block_hash, "foreign contents"
        num_fresh = manager.num_blocks_for(len(tokens)) - len(found)
        manager.touch(found)
        if num_fresh > manager.num_available:
            manager.release(reversed(found))
            with pytest.raises(InternalError):
                manager.allocate(request_id, manager.num_available + 1)
            return
        manager.allocate(request_id)
        manager.share(request_id, found)
        table = manager.append(request_id, num_fresh)
        for block in table[len(found) :]:
            self.contents[block] = b"partial"
        for block, block_hash in list(zip(table, hashes, strict=False))[len(found) :]:
            self.contents[block] = block_hash
            manager.commit(block, block_hash)
        self.model[request_id] = list(table)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), num_kept=st.integers(0, 9))
    def trim(self, data: st.DataObject, num_kept: int) -> None:
        request_id = self.pick(data)
        expected = self.model[request_id][num_kept:]
        del self.model[request_id][num_kept:]
        assert self.manager.trim(request_id, num_kept) == expected

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        request_id = self.pick(data)
        self.manager.free(request_id)
        del self.model[request_id]

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        parent, child = self.pick(data), self.new_id()
        self.manager.fork(parent, child)
        self.model[child] = list(self.model[parent])

    @precondition(lambda self: any(self.model.values()) and self.manager.num_available)
    @rule(data=st.data())
    def copy_on_write(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(k for k, v in self.model.items() if v)))
        index = data.draw(st.integers(0, len(self.model[request_id]) - 1))
        source = self.model[request_id][index]
        others = sum(source in table for table in self.model.values()) - 1
        copied = self.manager.copy_on_write(request_id, index)
        if not others:
            assert copied is None
            return
        assert copied is not None
        assert copied[0] == source
        assert not any(copied[1] in table for table in self.model.values())
        self.contents[copied[1]] = b"copy"
        self.model[request_id][index] = copied[1]

    @precondition(lambda self: self.manager.statistics().cached)
    @rule()
    def evict(self) -> None:
        block = self.manager.evict()
        assert not any(block in table for table in self.model.values())

    @invariant()
    def equals_the_model(self) -> None:
        if not hasattr(self, "manager"):
            return
        self.manager.check()
        assert self.manager.tables == self.model
        counts = Counter(block for table in self.model.values() for block in table)
        assert self.manager.ref_counts == [counts[i] for i in range(self.manager.num_blocks)]
        statistics = self.manager.statistics()
        assert statistics.held == len(counts)
        assert statistics.free + statistics.held + statistics.cached == statistics.num_blocks


BlockManagerMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestBlockManagerMachine = BlockManagerMachine.TestCase


@given(st.lists(TOKENS, min_size=1, max_size=6), st.sampled_from([1, 2, 3]))
def test_find_gives_the_longest_common_prefix(histories: list[list[int]], size: int) -> None:
    manager = BlockManager(100, size)
    for i, tokens in enumerate(histories[:-1]):
        fill(manager, f"r{i}", tokens)
        manager.free(f"r{i}")
    wanted = histories[-1]
    longest = 0
    for tokens in histories[:-1]:
        common = 0
        while (
            common < min(len(tokens), len(wanted)) // size
            and tokens[: (common + 1) * size] == wanted[: (common + 1) * size]
        ):
            common += 1
        longest = max(longest, common)
    assert len(manager.find(chain(wanted, size))) == longest
