"""What tests of accelerator kernels need on a machine without the accelerator."""

from __future__ import annotations

import contextlib
import contextvars

_INTERPRETED = contextvars.ContextVar("brainmass_kernels_interpreted", default=False)


@contextlib.contextmanager
def interpret():
    """Within this context accelerator implementations run in their interpreters, on the CPU, slowly."""
    token = _INTERPRETED.set(True)
    try:
        yield
    finally:
        _INTERPRETED.reset(token)


def interpreting() -> bool:
    return _INTERPRETED.get()
