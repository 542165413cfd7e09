"""What ``--additional-config '{"headway": {…}}'`` may say, checked once at the start."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
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
from headway.core.sharing_rules import SharingRules
from headway.core.slo import SLO, SLOTable

__all__ = ["HeadwayConfig"]

#: The policies that a setting is for; a setting that is not named is for all.
_ONLY_FOR: Final = {
    "tau_s": ("aging",),
    "margin_s": ("aging", "deadline"),
    "default_target_s": ("deadline",),
}


@dataclass(frozen=True)
class HeadwayConfig:
    """The plug-in's settings; every one has a default that suits.

    Attributes:
        policy: ``priority``, ``aging``, ``deadline`` or ``fcfs``.
        tau_s: (``aging``) seconds of waiting that are worth one level of priority.
        margin_s: (``aging``, ``deadline``) seconds by which a waiting request must be ahead of
            another before it displaces it; None = the policy's own.
        slos: targets of classes of requests, which bound the steps they are in:
            ``"0:ttft=300ms,tpot=40ms"``. The deadline policy takes its deadlines from them, too.
        default_target_s: (``deadline``) seconds until the first token of a request is due that
            brings no deadline and has no class.
        victim: see ``SharingRules``.
        max_preemptions: see ``SharingRules``.
        share: see ``SharingRules``.
        prefill_share: see ``SharingRules``.
        max_step_ms: no step is predicted to take longer, whatever is in it; None = no bound.

    Raises:
        ConfigError: a value is out of range.
    """

    policy: Literal["priority", "aging", "deadline", "fcfs"] = "priority"
    tau_s: float = 30.0
    margin_s: float | None = None
    slos: tuple[str, ...] = ()
    default_target_s: float = 60.0
    victim: Literal["cheapest", "last"] = "cheapest"
    max_preemptions: int | None = 3
    share: str = "all"
    prefill_share: float = 0.25
    max_step_ms: float | None = None

    def __post_init__(self) -> None:
        if self.max_step_ms is not None and not _is_positive(self.max_step_ms):
            raise ConfigError(f"max_step_ms is {self.max_step_ms!r}, must be a number above 0")
        _ = self.sharing
        self.make_policy()

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
        slo_table = self.slo_table
        if self.policy == "aging":
            return AgingPolicy(self.tau_s, self.margin_s)
        if self.policy == "deadline":
            margin = {} if self.margin_s is None else {"margin": self.margin_s}
            return DeadlinePolicy(slo_table, self.default_target_s, **margin)
        return FCFSPolicy() if self.policy == "fcfs" else PriorityPolicy()

    @cached_property
    def sharing(self) -> SharingRules:
        """What less urgent work gets beside more urgent work, and which requests yield."""
        return SharingRules(self.share, self.prefill_share, self.victim, self.max_preemptions)

    @cached_property
    def slo_table(self) -> SLOTable:
        """The classes, and what their targets mean for the time of a step."""
        return SLOTable((SLO.parse(text) for text in self.slos), self.max_step_ms)

    @property
    def bounds_all_steps(self) -> bool:
        """Whether a step may be too long although nothing rides along in it."""
        return bool(self.slos) or self.max_step_ms is not None

    @property
    def is_timed(self) -> bool:
        """Whether steps are bounded in time, which needs a prediction of what they take."""
        return self.bounds_all_steps or self.sharing.is_timed

    def __str__(self) -> str:
        changed = (
            f"{field.name}={getattr(self, field.name)}"
            for field in fields(self)
            if field.name in ("policy", "share") or getattr(self, field.name) != field.default
        )
        return ", ".join(changed)


def _texts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(text, str) for text in value):
        raise ConfigError(f'slos is {value!r}, must be a list such as ["0:ttft=300ms,tpot=40ms"]')
    return tuple(value)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf
