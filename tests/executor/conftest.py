"""Makes the tiny random models importable: ``from tiny_models import TinyModel``."""

from __future__ import annotations

import sys
from pathlib import Path

HELPERS = str(Path(__file__).parents[1] / "models")
if HELPERS not in sys.path:
    sys.path.insert(0, HELPERS)
