"""Warnings that point at a line of user code."""

from __future__ import annotations

import os
import sys
import warnings

import jax

# JAX calls back into this package where it traces, as in a fit; emitted sources have no file.
_NOT_USER_CODE = (*(os.path.dirname(file) + os.sep for file in (__file__, jax.__file__)), "<brainmass_kernels")


def warn(message: str, kind: type[Warning] = RuntimeWarning) -> None:
    """Warn at the innermost line outside this package and JAX, so that Python shows it once for each such line."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_USER_CODE):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, kind, stacklevel=level)
