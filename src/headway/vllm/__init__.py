"""Headway's scheduling inside vLLM.

::

    vllm serve … --scheduling-policy priority --scheduler-cls headway.vllm.HeadwayScheduler

vLLM keeps its engine, its executors and its KV cache; this package decides in each step which
requests compute, wait and yield, with the policies and rules of ``headway.core``. It imports
nothing else of Headway, so ``pip install --no-deps headway-llm`` beside vLLM is enough.

``HeadwayScheduler`` becomes a ``HeadwaySyncScheduler`` where vLLM has no asynchronous scheduling.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from headway.vllm.compatibility import SUPPORTED_VLLM, check_vllm

if TYPE_CHECKING:
    from headway.vllm.scheduler import HeadwayScheduler, HeadwaySyncScheduler

__all__ = ["SUPPORTED_VLLM", "HeadwayScheduler", "HeadwaySyncScheduler"]


def __getattr__(name: str) -> object:
    # vLLM asks for the class by name. The version is looked at before anything else is imported
    # from vLLM: what another version lacks would only raise an ImportError.
    if name in ("HeadwayScheduler", "HeadwaySyncScheduler"):
        check_vllm()
        from headway.vllm import scheduler  # noqa: PLC0415

        for class_name in ("HeadwayScheduler", "HeadwaySyncScheduler"):
            globals()[class_name] = getattr(scheduler, class_name)  # the check is made once
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
