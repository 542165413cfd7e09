"""A snapshot of what a scheduler does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from headway.core.block_manager import BlockStatistics
from headway.core.kv_cache_manager import KVCacheManager
from headway.core.life import RequestStatus
from headway.core.request_table import RequestTable

__all__ = ["SchedulerStatistics"]


class SchedulerStatistics(NamedTuple):
    """A snapshot for metrics and live views; counts are of requests unless named otherwise."""

    num_waiting: int
    num_running: int
    num_paused: int
    num_swapped: int
    num_preempted: int
    num_finished: int
    #: Prompt tokens of the waiting requests.
    num_queued_tokens: int
    #: Times a request yielded, by ``PreemptionMode.value``.
    preemptions: Mapping[str, int]
    #: Tokens computed again after their blocks had been taken, by priority.
    recomputed_tokens: Mapping[int, int]
    blocks: BlockStatistics
    num_swap_blocks_used: int

    @classmethod
    def of(
        cls,
        table: RequestTable,
        kv_cache: KVCacheManager,
        preemptions: Mapping[str, int],
        recomputed_tokens: Mapping[int, int],
    ) -> SchedulerStatistics:
        """The snapshot of these collections and counts. O(1)."""
        counts = table.num_by_status
        used = kv_cache.config.num_swap_blocks - kv_cache.num_free_swap_slots
        return cls(
            num_waiting=counts[RequestStatus.WAITING],
            num_running=counts[RequestStatus.RUNNING],
            num_paused=counts[RequestStatus.PAUSED],
            num_swapped=counts[RequestStatus.SWAPPED],
            num_preempted=counts[RequestStatus.PREEMPTED],
            num_finished=table.num_finished,
            num_queued_tokens=table.num_queued_tokens,
            preemptions=preemptions,
            recomputed_tokens=recomputed_tokens,
            blocks=kv_cache.block_manager.statistics(),
            num_swap_blocks_used=used,
        )
