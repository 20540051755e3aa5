"""How the lanes of a run lie on the CPU: in blocks that threads take, whose values lie in rows of a scratch."""

from __future__ import annotations

import os
from typing import NamedTuple

import numpy as np

from ..._context import SHARES
from ..base import Loop
from .optable import TYPES

# Lanes of a block: a few vectors, so that the loop over them hides the latency of each. Of the widths that share the
# lanes among threads equally well, the widest: what a loop costs beside its lanes is paid once.
WIDTHS = (256, 128, 64)
# And at least, in forward and adjoint runs. LLVM unrolls shorter loops of few operations before it looks for SIMD.
NARROWEST = {"forward": 8, "adjoint": 16}
# A slow function has a loop to itself in blocks of this many lanes or more, for the same reason.
STAGED = 32
# Lanes that groups of models take together: whole vectors, as a shorter rest of a loop has no SIMD.
TOGETHER = 16
# Operations of a step, at least, of one network that threads share: to meet costs them less than a microsecond.
SHARED = 20_000
# Regions of a part, at least.
PART = 64
# What the one attribute of a call holds.
PLAN = (
    "lanes", "steps", "lead", "every", "count", "segment", "blocks", "threads", "scratch",
    "depth", "edges", "stride", "ct_stride", "shared", "common",
)  # fmt: skip


def _second_cache() -> int:
    """Bytes of a processor's second cache, or what all have had for long."""
    name, least = "SC_LEVEL2_CACHE_SIZE", 256 * 1024
    return max(least, os.sysconf(name)) if name in getattr(os, "sysconf_names", {}) else least


# Bytes of replayed states that a thread plans to hold: they should stay in its second cache, beside what else is there.
REPLAY = max(256 * 1024, _second_cache() // 2)


class Layout(NamedTuple):
    """How the lanes of a run lie in blocks.

    Attributes
    ----------
    lanes : lanes of the run
    span : lanes of the run that a block has: a network, or as many as a row
    block : lanes of a row; those beyond the span repeat its last
    dtype : "f32" or "f64"
    parts : blocks of the one network that there is, which threads share; 0 where a block needs no other
    """

    lanes: int
    span: int
    block: int
    dtype: str
    parts: int = 0

    @classmethod
    def of(cls, loop: Loop, lanes: int, dtype, segment: int | None = None, sharable: bool = True) -> Layout:
        """Of a forward run, or of an adjoint one by segments of so many steps."""
        narrowest = NARROWEST["adjoint" if segment else "forward"]
        name = TYPES[np.dtype(dtype).name]
        if loop.coupling:
            regions = loop.coupling.regions
            parts = min(threads(), regions // PART)
            if sharable and lanes == regions and parts > 1 and operations(loop) >= SHARED:
                # The lanes of a part do not depend on how many there are: the bits are those of one.
                span = -(-regions // parts // 16) * 16
                return cls(lanes, span, span, name, -(-regions // span))
            return cls(lanes, regions, -(-regions // narrowest) * narrowest, name)
        step_bytes = (loop.n_state + 3) * np.dtype(dtype).itemsize
        return cls.of_lanes(lanes, dtype, narrowest, REPLAY // (segment * step_bytes) if segment else lanes)

    @classmethod
    def of_lanes(cls, lanes: int, dtype, narrowest: int = NARROWEST["forward"], most: int | None = None) -> Layout:
        """Of independent lanes, of which a block holds ``most`` at most."""
        name = TYPES[np.dtype(dtype).name]
        if lanes == 1:
            return cls(1, 1, 1, name)
        # Every thread should have a block.
        share, block = -(-lanes // threads()) if lanes > STAGED else lanes, narrowest
        while block < min(WIDTHS[-1], share):
            block *= 2
        if block == WIDTHS[-1]:
            block = min(WIDTHS, key=lambda width: width * -(-lanes // (width * threads())))
        while most is not None and narrowest < block > most:
            block //= 2
        return cls(lanes, block, block, name)

    @property
    def alone(self) -> bool:
        """Whether the run is of one lane, whose values are then numbers, not rows."""
        return self.block == 1

    @property
    def blocks(self) -> int:
        return -(-self.lanes // self.span)

    @property
    def itemsize(self) -> int:
        return int(self.dtype[1:]) // 8

    @property
    def group(self) -> int:
        """Lanes that a cotangent of a uniform input is summed over; whatever the block, as threads decide its size."""
        return NARROWEST["adjoint"] if self.span == self.block else self.block

    @property
    def groups(self) -> int:
        """How many such sums there are."""
        return -(-self.lanes // self.group) if self.span == self.block else self.blocks


def operations(loop: Loop) -> int:
    """About how many operations a step is, of a lane or of a network."""
    each = len(loop.advance.jaxpr.jaxpr.eqns)
    return each if loop.coupling is None else each * loop.coupling.regions + loop.coupling.count


class Rows:
    """Names of the rows of an array in the scratch, each of one block of lanes."""

    def __init__(self, array: str, block: int):
        self.array, self.block, self.names = array, block, []

    def __len__(self) -> int:
        return len(self.names)

    def add(self, *names: str) -> list[str]:
        self.names += names
        return list(names)

    def offset(self, name: str) -> int:
        return self.names.index(name) * self.block

    def at(self, name: str) -> str:
        """Lane ``i`` of a row."""
        return f"{self.array}[{self.offset(name)}{' + i' * (self.block > 1)}]"


def threads() -> int:
    """How many threads a run may take: ``$NUMBA_NUM_THREADS``, or those of this process's processors.

    Devices that share a run share them.
    """
    asked = os.environ.get("NUMBA_NUM_THREADS")
    if asked and asked.isdigit() and int(asked):
        count = int(asked)
    else:
        count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, count // SHARES.get())


def wide_vectors() -> bool:
    """Whether LLVM's vectors are of 64 bytes here.

    There are 32 registers of them then, which hold the constants of several functions at once, and each operation takes
    so long that the next ones need not be interleaved.
    """
    from .machine import machine

    return machine().vector_bytes == 64
