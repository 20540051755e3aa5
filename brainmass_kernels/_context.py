"""Settings of a context: interpreted kernels, the target of compilation, excluded backends.

`testing` sets these; everything else reads them here.
"""

from __future__ import annotations

import contextlib
from contextvars import ContextVar
from typing import Any, NamedTuple


class Target(NamedTuple):
    """An absent device for which kernels are compiled.

    Attributes
    ----------
    platform : "gpu" or "tpu"
    cores : multiprocessors of a GPU, TensorCores of a TPU that share a device; ``None`` if nothing depends on them
    capability : of an NVIDIA GPU
    """

    platform: str
    cores: int | None = None
    capability: float | None = None


#: How accelerator kernels are interpreted: "plain", "races", or "" if they are compiled.
INTERPRETED: ContextVar[str] = ContextVar("brainmass_kernels_interpreted", default="")
#: The device for which kernels are compiled, if not for one of this machine.
TARGET: ContextVar[Target | None] = ContextVar("brainmass_kernels_target", default=None)
#: Names of implementations that are not to be chosen.
ABSENT: ContextVar[frozenset[str]] = ContextVar("brainmass_kernels_absent", default=frozenset())
#: A list to which the Triton backend appends kernels that are compiled but not run.
TRITON_KERNELS: ContextVar[list[Any] | None] = ContextVar("brainmass_kernels_triton_kernels", default=None)

#: How many devices of this process share a run of which one share is traced.
SHARES: ContextVar[int] = ContextVar("brainmass_kernels_shares", default=1)


@contextlib.contextmanager
def setting(variable: ContextVar, value):
    """A context in which a variable has this value."""
    token = variable.set(value)
    try:
        yield value
    finally:
        variable.reset(token)


def target_platform() -> str | None:
    """The platform of `TARGET`, or ``None`` if kernels are to run here."""
    target = TARGET.get()
    return target and target.platform
