"""A loose promise to batch work does not loosen a tight one to urgent requests."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def two_classes() -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS))  # for the module that names the machine
    try:
        spec = importlib.util.spec_from_file_location("two_classes", BENCHMARKS / "two_classes.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.mark.parametrize("budget", [256, 2048])
def test_batch_work_s_own_promise_costs_the_urgent_nothing(
    two_classes: ModuleType, budget: int
) -> None:
    urgent, batch = two_classes.URGENT_SLO, two_classes.BATCH_SLO
    alone = two_classes.simulate([urgent], budget, seconds=40)
    beside = two_classes.simulate([urgent, batch], budget, seconds=40)
    assert alone.num_urgent > 50
    assert beside.urgent_ttft_p50 <= two_classes.MAX_RATIO * alone.urgent_ttft_p50
    assert beside.urgent_ttft_max <= two_classes.MAX_RATIO * alone.urgent_ttft_max
    assert beside.urgent_ttft_max < 100, "what was promised"
    assert beside.batch_tokens_per_s >= 0.9 * alone.batch_tokens_per_s
