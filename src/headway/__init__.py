"""Headway: an LLM inference engine in which the urgent request goes next.

The public names are below; they are imported on first use, so that ``import headway`` and
``headway --help`` do not wait for the libraries behind them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headway.core.block_manager import BlockManager
    from headway.core.circular_queue import CircularQueue
    from headway.core.config import PreemptionMode, SchedulerConfig
    from headway.core.errors import HeadwayError
    from headway.core.priority_queue import PriorityQueue
    from headway.core.request import PriorityRequest, Request, RequestStatus, SamplingParams
    from headway.core.scheduler import PriorityScheduler
    from headway.core.scheduler_output import SchedulerOutput
    from headway.engine.async_engine import AsyncEngine
    from headway.engine.config import EngineConfig
    from headway.engine.engine import Engine
    from headway.engine.llm import LLM
    from headway.engine.outputs import CompletionOutput, RequestOutput

__version__ = "0.1.0"

_HOME = {
    "AsyncEngine": "headway.engine.async_engine",
    "BlockManager": "headway.core.block_manager",
    "CircularQueue": "headway.core.circular_queue",
    "CompletionOutput": "headway.engine.outputs",
    "Engine": "headway.engine.engine",
    "EngineConfig": "headway.engine.config",
    "HeadwayError": "headway.core.errors",
    "LLM": "headway.engine.llm",
    "PreemptionMode": "headway.core.config",
    "PriorityQueue": "headway.core.priority_queue",
    "PriorityRequest": "headway.core.request",
    "PriorityScheduler": "headway.core.scheduler",
    "Request": "headway.core.request",
    "RequestOutput": "headway.engine.outputs",
    "RequestStatus": "headway.core.request",
    "SamplingParams": "headway.core.request",
    "SchedulerConfig": "headway.core.config",
    "SchedulerOutput": "headway.core.scheduler_output",
}

__all__ = [
    "LLM",
    "AsyncEngine",
    "BlockManager",
    "CircularQueue",
    "CompletionOutput",
    "Engine",
    "EngineConfig",
    "HeadwayError",
    "PreemptionMode",
    "PriorityQueue",
    "PriorityRequest",
    "PriorityScheduler",
    "Request",
    "RequestOutput",
    "RequestStatus",
    "SamplingParams",
    "SchedulerConfig",
    "SchedulerOutput",
    "__version__",
]


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
