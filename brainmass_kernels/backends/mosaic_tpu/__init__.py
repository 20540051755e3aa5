"""The whole run as one Pallas kernel for TPUs.

Lanes are cut into blocks of ``(rows, 128)``, time into chunks (`layout`). The grid walks the chunks of a block in order
(backwards in the adjoint) and the blocks in any order; the state passes from one chunk to the next in VMEM. A chunk is
also what lies between two checkpoints. Passes of masses are in `masses`, those of coupled masses in `networks`.
"""

from __future__ import annotations

from ..base import (
    LIVE,
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
    not_here,
)
from ..pallas import unsupported
from .layout import BUDGET, COLUMNS, least_bytes, round_up
from .masses import ForwardPass, ReversePass
from .networks import NetworkForwardPass, NetworkReversePass, too_large
from .optable import lacks


class MosaicTPU:
    """The TPU backend: see `base.Backend` for the protocol."""

    name = "mosaic_tpu"
    interpretable = True
    inverse_steps = False
    networks = True
    by_group = False
    masses_together = 1

    def base_two(self, precision: str) -> bool:
        """The hardware has its own tanh."""
        return False

    def unavailable(self, platform: str) -> str | None:
        """Why nothing can run on this platform, or ``None``."""
        return not_here(platform, "tpu")

    def unsupported(self, request: Request) -> str | None:
        """Why the request cannot run, or ``None`` if it can."""
        if reason := unsupported(request, lacks):
            return reason
        if coupling := request.loop.coupling:
            if any(term.live for term in coupling.terms):
                return LIVE
            if any(term.edges is not None for term in coupling.terms):
                return SPARSE
            return too_large(request.loop, coupling)
        if (need := least_bytes(request.loop)) > BUDGET:
            return f"a block of 1,024 lanes needs {need:,} bytes of VMEM, and it plans for {BUDGET:,}"
        return None

    def copied(self, request: Request) -> Copied:
        """Blocks of (rows, 128) lanes, whose layout is another than that of a row of lanes."""
        coupling = request.loop.coupling
        if coupling:
            networks = request.lanes // coupling.regions
            return Copied(round_up(networks, COLUMNS) * round_up(coupling.regions, 8))
        return Copied(round_up(request.lanes, 8 * COLUMNS))

    def pointwise(self, program) -> None:
        return None

    def forward(self, loop: Loop, operands: Operands, initial: Carry, checkpoint_every: int | None = None) -> Forward:
        """Run the loop; with ``checkpoint_every``, also keep the state before each chunk."""
        kind = NetworkForwardPass if loop.coupling else ForwardPass
        return kind.of(loop, operands, initial.state[0].shape[0], checkpoint_every).run(operands, initial)

    def adjoint(
        self, loop: Loop, pullbacks: Pullbacks, wanted: Wanted, operands: Operands, saved, cotangents: Cotangents,
        checkpoint_every: int,
    ) -> Adjoint:  # fmt: skip
        """Walk back over a forward run that kept checkpoints."""
        kind, lanes = NetworkReversePass if loop.coupling else ReversePass, cotangents.final.state[0].shape[0]
        reverse = kind.of(loop, pullbacks, wanted, operands.coefs, operands.inputs, lanes, checkpoint_every)
        return reverse.run(operands, saved, cotangents)
