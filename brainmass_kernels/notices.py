"""Warnings that point at the line of the user's that they are about."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

_HERE = str(Path(__file__).parent)


def warn(message: str, kind: type[Warning] = RuntimeWarning) -> None:
    """Warn at the innermost line outside this package, so that Python shows it once for each such line."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_HERE):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, kind, stacklevel=level)
