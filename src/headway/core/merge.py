"""Residents and waiting requests as one queue, from the top of the ranking."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Generic, TypeVar

from headway.core.ranking import Ranked, rank_of

__all__ = ["Merge"]

RankedT = TypeVar("RankedT", bound=Ranked)


class Merge(Generic[RankedT]):
    """A walk down the ranking of residents and waiting requests together.

    ``first`` is the next request; the caller places a resident and lets ``index`` go on, or admits
    the head, or stops admitting. Where the caller changes residents or the waiting queue on the
    way, it calls ``refresh``.

    Args:
        residents: in rank order. The caller may remove requests behind ``index``, and insert the
            head, once admitted, at ``index``.
        next_head: the first waiting request as things stand; None if there is none.
        place: how many residents go before the head: ``rank_of``, or ``first_displaceable`` where
            residents that it may not displace are served before it.
    """

    __slots__ = ("_next_head", "_place", "head", "head_index", "index", "residents")

    def __init__(
        self,
        residents: Sequence[RankedT],
        next_head: Callable[[], RankedT | None],
        place: Callable[[Ranked, Sequence[Ranked], int], int] = rank_of,
    ) -> None:
        self.residents = residents
        self._next_head: Callable[[], RankedT | None] | None = next_head
        self._place = place
        #: Residents before it have had their turn.
        self.index = 0
        #: The first waiting request; None if there is none, or none may be admitted any more.
        self.head: RankedT | None = None
        #: Residents that go before the head; all of them if there is no head.
        self.head_index = 0
        self.refresh()

    @property
    def first(self) -> RankedT | None:
        """The next request, a resident or the head; None at the end."""
        if self.index == self.head_index:
            return self.head
        return self.residents[self.index]

    def refresh(self) -> None:
        """Look again: residents or waiting requests are others. O(log residents)."""
        head = None if self._next_head is None else self._next_head()
        self.head = head
        self.head_index = (
            len(self.residents) if head is None else self._place(head, self.residents, self.index)
        )

    def stop_admitting(self) -> None:
        """A request could not get what it needs: none that ranks below it may be admitted."""
        self._next_head = None
        self.refresh()

    @property
    def run(self) -> Iterator[RankedT]:
        """The residents that come next, up to the head."""
        return islice(self.residents, self.index, self.head_index)

    @property
    def rest(self) -> Sequence[RankedT]:
        """The residents that have not had their turn."""
        return self.residents[self.index :]
