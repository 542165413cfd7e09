"""What the kernels are tested with: every path that runs here, in every precision."""

from __future__ import annotations

import pytest
from tiny_runs import PATHS

from headway.executor.precision import PRECISIONS, Precision


@pytest.fixture(scope="module", params=PATHS)
def path(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=PRECISIONS)
def precision(request: pytest.FixtureRequest) -> Precision:
    precision: Precision = request.param
    return precision
