"""How activations are held where they are multiplied with the weights.

``int8``
    in groups of 32 with a scale of their own; the fastest.
``bf16``
    as bfloat16 (or float32, where a processor multiplies no bfloat16s): several times nearer to
    float32, and slower where many tokens are computed at once.
"""

from __future__ import annotations

from typing import Final, Literal, get_args

from headway.core.errors import ConfigError

__all__ = ["PRECISIONS", "Precision", "check_precision"]

Precision = Literal["int8", "bf16"]
#: In the order of the kernels' numbers for them.
PRECISIONS: Final[tuple[Precision, ...]] = get_args(Precision)


def check_precision(precision: str) -> None:
    """Refuse what is no precision.

    Raises:
        ConfigError: it is none of ``PRECISIONS``.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"precision is {precision!r}, must be {' or '.join(PRECISIONS)}")
