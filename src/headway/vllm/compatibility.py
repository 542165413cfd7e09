"""Which versions of vLLM the plug-in knows.

vLLM's scheduler is no public interface: the plug-in leans on the order of its two phases, on when
it preempts, and on the names of its fields. So it runs with versions it was tested with only.
"""

from __future__ import annotations

from typing import Final

from headway.core.errors import ConfigError

__all__ = ["SUPPORTED_VLLM", "check_vllm"]

#: The minor versions that the tests run with.
SUPPORTED_VLLM: Final = ("0.32",)


def check_vllm(version: str | None = None) -> None:
    """Refuse a version of vLLM that the plug-in was not tested with.

    Args:
        version: None = that of the vLLM installed here.

    Raises:
        ConfigError: naming the version and those that are supported.
    """
    if version is None:
        import vllm  # noqa: PLC0415 (only where it is about to be used)

        version = vllm.__version__
    if ".".join(version.split(".")[:2]) not in SUPPORTED_VLLM:
        supported = ", ".join(f"{one}.*" for one in SUPPORTED_VLLM)
        raise ConfigError(f"headway.vllm: vLLM is {version}, must be one of {supported}")
