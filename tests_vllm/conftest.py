"""The model as vLLM reads it, and servers that serve it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Read when vLLM is imported, here or in a server: no look at the network, 1 GB for KV blocks, and
# what it keeps between starts stays in the virtual environment.
os.environ.update(
    {
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CACHE_ROOT": str(Path(sys.prefix) / "vllm-cache"),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
)

import pytest
from bare_model import write_model
from convert_model import convert

import vllm


def pytest_report_header() -> str:
    """Which vLLM is tested; fails if it is not the one that was to be."""
    expected = os.environ.get("HEADWAY_TEST_VLLM")
    if expected not in (None, vllm.__version__.partition("+")[0]):
        pytest.exit(f"vLLM is {vllm.__version__}, must be {expected}", returncode=1)
    return f"vLLM {vllm.__version__}: {Path(vllm.__file__).parent}"


@pytest.fixture(scope="session")
def model() -> Path:
    """The default model's directory."""
    return convert()


@pytest.fixture(scope="session")
def bare_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's directory without weights."""
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """What asynchronous tests run in."""
    return "asyncio"
