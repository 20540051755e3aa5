"""What holds for all calls within a context: kernels interpreted, a device that is compiled for, backends left out.

`testing` sets these; everything else reads them here.
"""

from __future__ import annotations

import contextlib
from contextvars import ContextVar
from typing import Any, NamedTuple


class Target(NamedTuple):
    """A device that is compiled for though it is not there.

    Attributes
    ----------
    platform : "gpu" or "tpu"
    cores : multiprocessors of a GPU, TensorCores of a TPU that share a device; ``None`` where nothing depends on them
    capability : of an NVIDIA GPU
    """

    platform: str
    cores: int | None = None
    capability: float | None = None


#: How accelerator kernels are interpreted: "plain", "races", or "" where they are not.
INTERPRETED: ContextVar[str] = ContextVar("brainmass_kernels_interpreted", default="")
#: The device that is compiled for.
TARGET: ContextVar[Target | None] = ContextVar("brainmass_kernels_target", default=None)
#: Names of implementations that are not chosen.
ABSENT: ContextVar[frozenset[str]] = ContextVar("brainmass_kernels_absent", default=frozenset())
#: Where the backend for Triton leaves kernels that are to be compiled and not to run.
TRITON_KERNELS: ContextVar[list[Any] | None] = ContextVar("brainmass_kernels_triton_kernels", default=None)


@contextlib.contextmanager
def setting(variable: ContextVar, value):
    """Within this context a variable has this value."""
    token = variable.set(value)
    try:
        yield value
    finally:
        variable.reset(token)


def target_platform() -> str | None:
    """The platform that is compiled for, or ``None`` where kernels are to run."""
    target = TARGET.get()
    return target and target.platform
