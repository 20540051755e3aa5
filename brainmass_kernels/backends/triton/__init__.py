"""The whole run as one Triton kernel, for GPUs that Mosaic GPU does not reach: the state never leaves the registers.

The step is emitted as Triton source and called through `jax_triton`. Lanes are cut into blocks, one a program; programs
do not meet. The adjoint walks the checkpointed segments backwards: it runs each once more, keeping in device memory
the state before every few steps; those few are then written out with their pullbacks, all their states in registers.
"""

from __future__ import annotations

import importlib.util

import numpy as np

from ... import _context, _jax
from ..base import (
    SPARSE,
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
    no_records,
    not_here,
    programs_of,
)
from . import call, versions
from .layout import REGIONS, Layout
from .masses import Uncoupled
from .networks import ForwardCoupling, ReverseCoupling
from .optable import TRITON
from .source import AdjointKernel, ForwardKernel, unrolled, unrolled_back

__all__ = ["REGIONS", "Layout", "Triton", "unrolled", "unrolled_back"]


class Triton:
    """The backend through `jax_triton`: see `base.Backend` for the protocol."""

    name = "triton"
    interpretable = True
    inverse_steps = False
    networks = True
    by_group = False
    masses_together = 1

    def base_two(self, precision: str) -> bool:
        """Powers of two and reciprocals are what the hardware has, besides a rough tanh."""
        return precision == "exact" and not _jax.is_amd()

    def unavailable(self, platform: str) -> str | None:
        """Why nothing can run on this platform, or ``None``."""
        if reason := not_here(platform, "gpu", "Triton"):
            return reason
        if _context.TRITON_KERNELS.get() is not None:
            return None
        capability = _jax.compute_capability()
        if reason := versions.unfit(capability):
            return reason
        if capability is not None and 0 < capability < 8.0:
            return f"it needs an NVIDIA GPU of compute capability 8.0 (Ampere) or newer, and this one has {capability}"
        return None

    def unsupported(self, request: Request) -> str | None:
        """Why the request cannot run, or ``None`` if it can."""
        if np.dtype(request.dtype).name not in ("float32", "float64"):
            return f"it takes float32 and float64, not {np.dtype(request.dtype)}"
        if request.loop.interpret and not all(map(importlib.util.find_spec, ("triton", "torch"))):
            return "Triton's interpreter needs triton and torch: pip install triton torch"
        coupling = request.loop.coupling
        if coupling and any(term.edges is not None for term in coupling.terms):
            return SPARSE
        if coupling and coupling.regions > REGIONS:
            return (
                f"a network is one block of threads, of up to {REGIONS:,} regions, and this one has "
                f"{coupling.regions:,}; implementation 'scan' runs it"
            )
        if coupling and 2 * coupling.regions * (coupling.depth + 2) >= 2**31:
            return (
                f"what {coupling.regions:,} regions sent in {coupling.depth:,} steps, the longest delay, is more than "
                f"32-bit integers count; implementation 'scan' runs it, or a longer dt"
            )
        return lacking(TRITON.lacks, *programs_of(request.loop))

    def copied(self, request: Request) -> Copied:
        """Nothing: it writes straight to what is returned."""
        return Copied()

    def pointwise(self, program) -> None:
        return None

    def forward(self, loop: Loop, operands: Operands, initial: Carry, checkpoint_every: int | None = None) -> Forward:
        """Run the loop; with ``checkpoint_every``, also keep the state before each segment."""
        coupling = ForwardCoupling if loop.coupling else Uncoupled
        kernel = ForwardKernel(coupling, loop, operands, initial, checkpoint_every)
        out = call.run(kernel)
        records = out["record"] if loop.schedule.count else no_records(loop, kernel.layout.lanes, kernel.dtype)
        saved = (out["saved"], *kernel.coupling.saved(out)) if checkpoint_every else None
        return Forward(records, Carry(out["final"], kernel.coupling.history(out)), saved)

    def adjoint(
        self, loop: Loop, pullbacks: Pullbacks, wanted: Wanted, operands: Operands, saved, cotangents: Cotangents,
        checkpoint_every: int,
    ) -> Adjoint:  # fmt: skip
        """Walk back over a forward run that kept checkpoints."""
        coupling = ReverseCoupling if loop.coupling else Uncoupled
        kernel = AdjointKernel(coupling, loop, pullbacks, wanted, operands, saved, cotangents, checkpoint_every)
        out, coupled = call.run(kernel), kernel.coupling
        inputs = out["out_input"][: sum(wanted.inputs)]
        return Adjoint(out["out_coef"], Carry(out["out_state"], coupled.history(out)), inputs, coupled.weights(out))
