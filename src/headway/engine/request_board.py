"""What can be asked about unfinished requests, kept from what the engine publishes.

It belongs to the clients' side: it is built from values, so that a question costs the engine
nothing, however many requests there are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import islice
from operator import attrgetter
from typing import Any

from headway.core.forecast import Forecast, Work
from headway.core.life import RequestStatus
from headway.core.request import Request
from headway.core.request_table import StatusChange
from headway.core.scheduler_output import SchedulerOutput
from headway.engine.outputs import EngineOutput
from headway.engine.request_info import RequestInfo

__all__ = ["BoardEntry", "RequestBoard", "engine_id", "own_id"]

_KEY = attrgetter("key")


class BoardEntry:
    """What is known of one unfinished request.

    Args:
        request: read here and not kept; it must not have been submitted yet, because from then on
            it is the step thread's.
    """

    __slots__ = (
        "arrival_time",
        "key",
        "max_tokens",
        "num_computed_tokens",
        "num_output_tokens",
        "num_preemptions",
        "num_prompt_tokens",
        "num_sequences",
        "priority",
        "request_id",
        "status",
        "tenant",
    )

    def __init__(self, request: Request) -> None:
        self.request_id = request.request_id
        self.tenant = request.tenant
        self.priority = request.priority
        #: Its rank; before the engine has ranked it, behind all that have one.
        self.key: tuple[Any, ...] = (math.inf,)
        self.status = RequestStatus.WAITING
        self.arrival_time = request.arrival
        self.num_sequences = request.n
        self.num_prompt_tokens = request.num_prompt_tokens
        self.num_computed_tokens = 0
        self.num_output_tokens = request.num_output_tokens
        self.max_tokens = request.max_tokens
        self.num_preemptions = 0

    @property
    def work(self) -> Work:
        """What is left to do for it."""
        each = self.num_output_tokens // self.num_sequences
        return Work(
            max(0, self.num_prompt_tokens - self.num_computed_tokens),
            self.max_tokens - each,
            self.num_prompt_tokens + each,
            self.num_sequences,
        )


class RequestBoard:
    """The unfinished requests of one engine, as of its latest step."""

    def __init__(self) -> None:
        self._entries: dict[str, BoardEntry] = {}
        #: The latest step: what its rows compute has been computed by now. What a request that is
        #: not in it has computed came with its latest change.
        self._step: SchedulerOutput | None = None

    def add(self, entry: BoardEntry) -> None:
        """A request is on its way to the engine, and nothing has been heard of it yet."""
        self._entries[entry.request_id] = entry

    def apply(
        self,
        step: SchedulerOutput,
        changes: Iterable[StatusChange],
        outputs: Iterable[EngineOutput],
    ) -> None:
        """Take in a step. O(changes + outputs)."""
        entries = self._entries
        if step:
            self._step = step
        for change in changes:
            entry = entries.get(change.request_id)
            if entry is not None and not change.status.is_finished:
                entry.status, entry.key = change.status, change.key
                entry.priority = change.priority
                entry.num_computed_tokens = change.num_computed_tokens
                entry.num_preemptions = change.num_preemptions
        for output in outputs:
            entry = entries.get(output.request_id)
            if entry is not None:
                entry.num_output_tokens += len(output.token_ids)
                if output.is_last:
                    del entries[output.request_id]

    def clear(self) -> None:
        """The engine has stopped."""
        self._entries.clear()

    def get(self, request_id: str, forecast: Forecast, now: float) -> RequestInfo | None:
        """What is known of one request. O(requests)."""
        entry = self._entries.get(request_id)
        if entry is None:
            return None
        self._note_computed()
        ahead = [other.work for other in self._entries.values() if other.key < entry.key]
        return _info(entry, len(ahead), forecast.wait_ms(ahead), now)

    def all(
        self,
        forecast: Forecast,
        now: float,
        limit: int | None = None,
        tenant: str | None = None,
    ) -> list[RequestInfo]:
        """The requests of a tenant, or of all, most urgent first, at most ``limit``. O(n log n)."""
        self._note_computed()
        ranked = sorted(self._entries.values(), key=_KEY)
        waits_ms = forecast.waits_ms([entry.work for entry in ranked])
        infos = (
            _info(entry, rank, wait_ms, now)
            for rank, (entry, wait_ms) in enumerate(zip(ranked, waits_ms, strict=True))
            if tenant is None or entry.tenant == tenant
        )
        return list(islice(infos, limit))

    def __len__(self) -> int:
        return len(self._entries)

    def _note_computed(self) -> None:
        """Take in what the rows of the latest step have computed, when it is asked for."""
        step, self._step = self._step, None
        for row in () if step is None else step.rows:
            entry = self._entries.get(row.request_id)
            if entry is not None and row.index == 0:
                computed = row.start + len(row.token_ids)
                entry.num_computed_tokens = max(entry.num_computed_tokens, computed)


def _info(entry: BoardEntry, rank: int, wait_ms: float, now: float) -> RequestInfo:
    is_running = entry.status is RequestStatus.RUNNING
    return RequestInfo(
        own_id(entry.request_id, entry.tenant),
        entry.tenant,
        entry.status.value,
        entry.priority,
        rank,
        now - entry.arrival_time,
        entry.num_sequences,
        entry.num_prompt_tokens,
        entry.num_computed_tokens,
        entry.num_output_tokens,
        entry.max_tokens,
        entry.num_preemptions,
        0.0 if is_running else wait_ms / 1e3,
    )


def engine_id(request_id: str, tenant: str) -> str:
    """The id that a tenant's request has in the engine, where ids of all tenants must differ."""
    if tenant:
        return f"{tenant}/{request_id}"
    return f"/{request_id}" if "/" in request_id else request_id


def own_id(request_id: str, tenant: str) -> str:
    """The id that the tenant knows, from the engine's."""
    return request_id[len(tenant) + 1 :] if tenant or request_id[0] == "/" else request_id
