"""What ``--additional-config '{"headway": {…}}'`` may say, checked once at the start."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final, Literal

from headway.core.errors import ConfigError
from headway.core.policy import (
    POLICIES,
    AgingPolicy,
    BuiltinPolicy,
    DeadlinePolicy,
    FCFSPolicy,
    PriorityPolicy,
)
from headway.core.slo import SLO, SLOTable

__all__ = ["HeadwayConfig"]

_VICTIMS: Final = ("cheapest", "last")
#: Which policies a setting is for; those that are not named are for all.
_ONLY_FOR: Final = {
    "tau_s": ("aging",),
    "margin_s": ("aging", "deadline"),
    "slos": ("deadline",),
    "default_target_s": ("deadline",),
}


@dataclass(frozen=True, slots=True)
class HeadwayConfig:
    """The plug-in's settings; every one has a default that suits.

    Attributes:
        policy: ``priority``, ``aging``, ``deadline`` or ``fcfs``.
        tau_s: (``aging``) seconds of waiting that are worth one level of priority.
        margin_s: (``aging``, ``deadline``) seconds by which a waiting request must be ahead of
            another before it displaces it; None = the policy's own.
        slos: (``deadline``) TTFT targets of classes of requests: ``"0:ttft=300ms"``.
        default_target_s: (``deadline``) seconds until the first token of a request is due that
            brings no deadline and has no class.
        victim: whose blocks are taken among equals: ``cheapest`` = whoever has the fewest tokens
            to recompute for each block gained; ``last`` = the last-ranked.
        max_preemptions: after so many evictions a request keeps its blocks until it ends (if
            a running request that outranks it cannot grow otherwise, it yields all the same).
        share: how much less urgent work rides along in a step with more urgent work: ``all``,
            ``none``, or as much as keeps the step within a time such as ``40ms``.
        prefill_share: while more urgent work is about (it is there, or was within the last
            minute), the part of a step's tokens that less urgent prompts may have, so that nobody
            waits for whole steps of them; in a step with a more urgent prompt, no more than that
            has. 1 = no bound.
        max_step_ms: no step is predicted to take longer, whoever is in it, so that whoever
            arrives need not wait long for the step in flight; None = no bound.

    Raises:
        ConfigError: a value is out of range.
    """

    policy: Literal["priority", "aging", "deadline", "fcfs"] = "priority"
    tau_s: float = 30.0
    margin_s: float | None = None
    slos: tuple[str, ...] = ()
    default_target_s: float = 60.0
    victim: Literal["cheapest", "last"] = "cheapest"
    max_preemptions: int = 3
    share: str = "all"
    prefill_share: float = 0.25
    max_step_ms: float | None = None

    def __post_init__(self) -> None:
        self.make_policy()
        if self.victim not in _VICTIMS:
            raise ConfigError(f"victim is {self.victim!r}, must be one of {', '.join(_VICTIMS)}")
        if not isinstance(self.max_preemptions, int) or isinstance(self.max_preemptions, bool):
            raise ConfigError(f"max_preemptions is {self.max_preemptions!r}, must be an integer")
        if self.max_preemptions < 1:
            raise ConfigError(f"max_preemptions is {self.max_preemptions}, must be at least 1")
        _ = self.share_ms
        if not _positive(self.prefill_share) or self.prefill_share > 1:
            raise ConfigError(
                f"prefill_share is {self.prefill_share!r}, must be a number above 0, at most 1"
            )
        if self.max_step_ms is not None and not _positive(self.max_step_ms):
            raise ConfigError(f"max_step_ms is {self.max_step_ms!r}, must be a number above 0")

    @classmethod
    def parse(cls, additional_config: object) -> HeadwayConfig:
        """The settings under ``headway`` in vLLM's ``additional_config``; the defaults if none.

        Raises:
            ConfigError: one line that names the key, the value and what it must be.
        """
        if not isinstance(additional_config, Mapping):
            return cls()
        settings = additional_config.get("headway", {})
        try:
            if not isinstance(settings, Mapping):
                raise ConfigError(f"it is {settings!r}, must be an object of settings")
            names = [field.name for field in fields(cls)]
            for name in settings:
                if name not in names:
                    raise ConfigError(f"unknown key {name!r}, must be one of {', '.join(names)}")
            config = cls(**{**settings, "slos": _texts(settings.get("slos", ()))})
            for name, policies in _ONLY_FOR.items():
                if name in settings and config.policy not in policies:
                    raise ConfigError(
                        f"{name} is for policy {' and '.join(policies)}, not {config.policy}"
                    )
        except ConfigError as error:
            raise ConfigError(f"headway in --additional-config: {error}") from None
        return config

    def make_policy(self) -> BuiltinPolicy:
        """The policy that these settings name."""
        if not isinstance(self.policy, str) or self.policy not in POLICIES:
            raise ConfigError(f"policy is {self.policy!r}, must be one of {', '.join(POLICIES)}")
        for name in ("tau_s", "default_target_s"):
            if not _is_number(getattr(self, name)):
                raise ConfigError(f"{name} is {getattr(self, name)!r}, must be a number of seconds")
        if self.margin_s is not None and not _is_number(self.margin_s):
            raise ConfigError(f"margin_s is {self.margin_s!r}, must be a number of seconds")
        if self.policy == "aging":
            return AgingPolicy(self.tau_s, self.margin_s)
        if self.policy == "deadline":
            slos = SLOTable(SLO.parse(text) for text in self.slos)
            for slo in slos.slos:
                if slo.ttft_ms is None or slo.tpot_ms is not None:
                    raise ConfigError(f"SLO {str(slo)!r} must have a ttft target and no other")
            margin = {} if self.margin_s is None else {"margin": self.margin_s}
            return DeadlinePolicy(slos, self.default_target_s, **margin)
        return FCFSPolicy() if self.policy == "fcfs" else PriorityPolicy()

    @property
    def share_ms(self) -> float:
        """What a step may take that less urgent work rides along in; 0 = none may."""
        if self.share == "all":
            return math.inf
        if self.share == "none":
            return 0.0
        match = re.fullmatch(r"(\d+(?:\.\d+)?)ms", str(self.share))
        if match is None or not _positive(float(match[1])):
            raise ConfigError(f"share is {self.share!r}, must be all, none, or a time such as 40ms")
        return float(match[1])

    @property
    def is_timed(self) -> bool:
        """Whether steps are bounded in time, which needs a prediction of what they take."""
        return self.max_step_ms is not None or 0 < self.share_ms < math.inf

    def __str__(self) -> str:
        changed = (
            f"{field.name}={getattr(self, field.name)}"
            for field in fields(self)
            if field.name in ("policy", "share") or getattr(self, field.name) != field.default
        )
        return ", ".join(changed)


def _texts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(one, str) for one in value):
        raise ConfigError(f'slos is {value!r}, must be a list such as ["0:ttft=300ms"]')
    return tuple(value)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf
