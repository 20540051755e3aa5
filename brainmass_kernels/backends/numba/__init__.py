"""The whole run as one compiled loop for CPUs, by LLVM, from source that is emitted for the step at hand.

Lanes are cut into blocks, whose states lie in rows of a scratch that stays in the first cache; each step is a loop or
two over the lanes of a block, which LLVM turns into SIMD. A network is a block. Threads take blocks until none is left.
XLA calls the compiled code itself, through its FFI. What a source compiled to is kept on disk (`codegen.kernel_cache`).
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable

import numpy as np

from ...pointwise import Program
from ..base import (
    Adjoint,
    Carry,
    Copied,
    Cotangents,
    Forward,
    Loop,
    Operands,
    Pullbacks,
    Request,
    Wanted,
    lacking,
    programs_of,
)
from . import call, pointwise
from .masses import Uncoupled
from .networks import ForwardCoupling, ReverseCoupling
from .optable import NUMBA
from .source import AdjointKernel, ForwardKernel


class Numba:
    """Compiled source on the CPU."""

    name = "numba"
    interpretable = False
    inverse_steps = False
    networks = True
    by_group = True
    masses_together = 32

    def base_two(self, precision: str) -> bool:
        """A power of two, and a quotient, take less than a tanh."""
        return True

    def unavailable(self, platform: str) -> str | None:
        if platform != "cpu":
            return f"it compiles for CPUs, and JAX computes on {platform} here"
        if os.name != "posix":
            return "it starts POSIX threads, which this system lacks"
        if not installed():
            return "LLVM is not there, as llvmlite is not installed: pip install 'brainmass-kernels[cpu]'"
        return None

    def unsupported(self, request: Request) -> str | None:
        if np.dtype(request.dtype).name not in ("float32", "float64"):
            return f"it takes float32 and float64, not {np.dtype(request.dtype)}"
        return lacking(NUMBA.lacks, *programs_of(request.loop))

    def copied(self, request: Request) -> Copied:
        """Nothing: it writes straight to what is returned."""
        return Copied()

    def pointwise(self, program: Program) -> Callable | None:
        if pointwise.lacks(program):
            return None
        return functools.partial(pointwise.evaluate, program)

    def forward(self, loop: Loop, operands: Operands, initial: Carry, checkpoint_every: int | None = None) -> Forward:
        kernel = ForwardKernel(
            ForwardCoupling if loop.coupling else Uncoupled, loop, operands, initial, checkpoint_every
        )
        out = call.run(kernel)
        saved = (out["saved"], kernel.coupling.saved(out)) if checkpoint_every else None
        return Forward(out["record"], Carry(out["final"], kernel.coupling.history(out)), saved)

    def adjoint(
        self, loop: Loop, pullbacks: Pullbacks, wanted: Wanted, operands: Operands, saved, cotangents: Cotangents,
        checkpoint_every: int,
    ) -> Adjoint:  # fmt: skip
        kernel = AdjointKernel(
            ReverseCoupling if loop.coupling else Uncoupled, loop, pullbacks, wanted, operands, saved, cotangents,
            checkpoint_every,
        )  # fmt: skip
        out, coupling = call.run(kernel), kernel.coupling
        return Adjoint(out["coefs"], Carry(out["state"], coupling.history(out)), out["ct_input"], coupling.weights(out))


@functools.lru_cache
def installed() -> bool:
    """Whether LLVM can be imported; it is not imported to find out."""
    return importlib.util.find_spec("llvmlite") is not None
