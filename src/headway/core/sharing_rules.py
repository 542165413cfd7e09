"""How requests of different urgency share steps and blocks: settings, checked once.

The same settings, with the same meanings, for Headway's own engine and inside vLLM.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Final

from headway.core.errors import ConfigError
from headway.core.reclaim import VictimOrder

__all__ = ["SharingRules"]

_TIME: Final = re.compile(r"(\d+(?:\.\d+)?)ms")


@dataclass(frozen=True)
class SharingRules:
    """What less urgent work gets beside more urgent work, and who yields blocks first.

    Attributes:
        share: how much less urgent work rides along in a step with more urgent work: ``all``,
            ``none``, or as much as keeps the step within a time such as ``40ms``.
        prefill_share: while more urgent work is about, the part of a step's tokens that less urgent
            prompts may have, so that an urgent request does not wait for whole steps of them; in
            a step with a more urgent prompt, no more than that prompt has. 1 = no bound.
        victim: whose blocks are taken among equals: ``cheapest`` = the request with the fewest
            tokens to recompute for each block gained; ``last`` = the last-ranked.
        max_preemptions: after it has lost blocks so often, a request keeps its blocks until it
            ends (if a running request that outranks it cannot grow otherwise, it yields all the
            same); None = no bound.

    Raises:
        ConfigError: a value is out of range.
    """

    share: str = "all"
    prefill_share: float = 1.0
    victim: VictimOrder | str = VictimOrder.LAST
    max_preemptions: int | None = None
    #: What ``victim`` means.
    victim_order: VictimOrder = field(init=False, repr=False)
    #: What a step may take that less urgent work rides along in (ms); infinite = no bound, 0 =
    #: none rides along.
    share_ms: float = field(init=False, repr=False)

    def __post_init__(self) -> None:
        try:
            victim = VictimOrder(self.victim)
        except ValueError:
            names = ", ".join(order.value for order in VictimOrder)
            raise ConfigError(f"victim is {self.victim!r}, must be one of {names}") from None
        object.__setattr__(self, "victim_order", victim)
        object.__setattr__(self, "share_ms", _share_ms(self.share))
        limit = self.max_preemptions
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int)):
            raise ConfigError(f"max_preemptions is {limit!r}, must be an integer")
        if limit is not None and limit < 1:
            raise ConfigError(f"max_preemptions is {limit}, must be at least 1")
        part = self.prefill_share
        if isinstance(part, bool) or not isinstance(part, (int, float)) or not 0 < part <= 1:
            raise ConfigError(f"prefill_share is {part!r}, must be a number above 0, at most 1")

    @property
    def is_timed(self) -> bool:
        """Whether a step's time has to be predicted to keep them."""
        return 0 < self.share_ms < math.inf


def _share_ms(share: object) -> float:
    if share == "all":
        return math.inf
    if share == "none":
        return 0.0
    match = _TIME.fullmatch(str(share))
    if match is None or not 0 < float(match[1]) < math.inf:
        raise ConfigError(f"share is {share!r}, must be all, none, or a time such as 40ms")
    return float(match[1])
