"""Labels whose values clients choose, of which only so many get time series of their own.

A priority may be any int64 and there may be any number of tenants; each would make some hundreds of
series. The first ones get a label; all that come later share one.
"""

from __future__ import annotations

from typing import Final

__all__ = ["OTHER", "BoundedLabels"]

#: The label of all values that have none of their own.
OTHER: Final = "other"


class BoundedLabels:
    """Label values, first come, first served; any thread may ask.

    Args:
        limit: how many values get a label of their own.
    """

    def __init__(self, limit: int) -> None:
        self.limit: Final = limit
        self._labels: dict[int | str, str] = {}

    def of(self, value: int | str) -> str:
        """The label of a value. O(1)."""
        label = self._labels.get(value)
        if label is None:
            if len(self._labels) >= self.limit:
                return OTHER
            label = self._labels[value] = str(value)
        return label

    def add(self, value: int | str) -> None:
        """Give a value a label whatever else comes, beyond the limit if need be."""
        self._labels[value] = str(value)
