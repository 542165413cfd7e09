"""Which versions of vLLM the plug-in knows, and all that it does differently from one to another.

vLLM's scheduler is no public interface: the plug-in leans on the order of its two phases, on when
it preempts, and on the names of its fields. So it runs with versions it was tested with only.
``docs/vllm.md`` says how another version is tried and added.
"""

from __future__ import annotations

import logging
import os
from typing import Any, Final

from headway.core.errors import ConfigError

__all__ = [
    "SUPPORTED_VLLM",
    "TESTED_VLLM",
    "TRY_VLLM",
    "check_vllm",
    "is_between_prefills",
    "max_cache_hit_length",
    "minor_version",
]

# Under vLLM's name, whose handlers it has: other loggers of this process show warnings only.
logger = logging.getLogger(f"vllm.{__name__}")

#: The versions that `make test-vllm` tests the plug-in with.
TESTED_VLLM: Final = ("0.32.0", "0.33.0")
#: Their minor versions. vLLM's patch releases do not change its scheduler.
SUPPORTED_VLLM: Final = tuple(version.rpartition(".")[0] for version in TESTED_VLLM)
#: The environment variable that names a minor version to accept although it was never tested.
TRY_VLLM: Final = "HEADWAY_TRY_VLLM"


def minor_version(version: str) -> str:
    """``0.32`` of ``0.32.1+cpu``."""
    return ".".join(version.split(".")[:2])


def check_vllm(version: str | None = None) -> None:
    """Refuse a version of vLLM that the plug-in was not tested with, unless it is to be tried.

    Args:
        version: None = that of the vLLM installed here.

    Raises:
        ConfigError: naming the version and the supported ones.
    """
    if version is None:
        import vllm  # noqa: PLC0415 (only where it is about to be used)

        version = vllm.__version__
    minor = minor_version(version)
    if minor in SUPPORTED_VLLM:
        return
    supported = ", ".join(f"{known}.*" for known in SUPPORTED_VLLM)
    if os.environ.get(TRY_VLLM) == minor:
        logger.warning(
            "Headway was never tested with vLLM %s, only with %s; it is tried, as %s says.",
            version,
            supported,
            TRY_VLLM,
        )
        return
    raise ConfigError(
        f"headway.vllm: vLLM is {version}, must be one of {supported} "
        f"({TRY_VLLM}={minor} tries it all the same)"
    )


def is_between_prefills(scheduler: Any) -> bool:
    """Whether vLLM, by its ``prefill_schedule_interval``, would let this step decode only.

    Until 0.32 the interval was for data-parallel engines, which say so to ``schedule``. Since 0.33
    the scheduler of any other engine counts the steps itself.
    """
    interval = getattr(scheduler, "local_prefill_interval", 1)
    if interval <= 1:
        return False
    return bool(scheduler.num_executed_steps + 1 - scheduler.last_prefill_step < interval)


def max_cache_hit_length(scheduler: Any, request: Any) -> int:
    """How many tokens of a waiting request vLLM would take from its prefix cache at most.

    The last token is always computed. Since 0.33 auxiliary outputs (routed experts) have to be
    there, too, for tokens that are not computed again.
    """
    max_cache_hit = getattr(scheduler.aux_output_connector, "max_cache_hit", None)
    return int(request.num_tokens - 1 if max_cache_hit is None else max_cache_hit(request))
