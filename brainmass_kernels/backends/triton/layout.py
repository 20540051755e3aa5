"""How the lanes of a run lie on the GPU: in blocks, one a program."""

from __future__ import annotations

from typing import NamedTuple

from ... import _jax
from ..base import Connections, Loop

WARP = 32
# Warps of one mass a thread that a multiprocessor should have before threads take more than one.
_FILLED = 16
# Regions of a network, at most: threads of a program.
REGIONS = 1024


class Layout(NamedTuple):
    """How the lanes of a run lie on the GPU.

    Attributes
    ----------
    lanes : lanes of the run
    warps : of a program
    vec : masses a thread
    regions : lanes of a network, which has a program; 0 where lanes are apart
    together : networks that share a program
    """

    lanes: int
    warps: int
    vec: int
    regions: int = 0
    together: int = 1

    @property
    def width(self) -> int:
        """Lanes of one program."""
        return WARP * self.warps * self.vec

    @property
    def blocks(self) -> int:
        return -(-self.lanes // (self.regions * self.together or self.width))

    @classmethod
    def of(cls, loop: Loop, lanes: int, most: int, connections: tuple[Connections, ...]) -> Layout:
        """Of a run of so many lanes; of masses, at most ``most`` a thread."""
        if loop.coupling:
            alike = all(term.weights.ndim == 2 and not term.own_delays for term in connections)
            return cls.of_networks(lanes, loop.coupling.regions, loop.coupling.depth, alike)
        return cls.choose(lanes, most, bool(loop.interpret))

    @classmethod
    def choose(cls, lanes: int, most: int, interpreted: bool = False) -> Layout:
        """All multiprocessors get lanes first, then enough warps, and only then a thread more masses than one.

        An interpreter takes as long for many lanes as for one.
        """
        if interpreted:
            return cls(lanes, 1, min(1024, 1 << max(5, (lanes - 1).bit_length())) // WARP)
        several = _jax.multiprocessors() * _FILLED * WARP
        wide = [v for v in (4, 2) if v <= most and lanes >= several * v]
        return cls(lanes, 4 if lanes >= several else 1, wide[0] if wide else 1)

    @classmethod
    def of_networks(cls, lanes: int, regions: int, depth: int = 0, alike: bool = True) -> Layout:
        """A region a thread, and two beyond half the threads that a program may have, which leaves them registers.

        Networks of the same weights share a program where they are many, for what they read then lies together: eight
        numbers fill what the memory hands out at once.
        """
        most = max(1, 4 * lanes // regions // (3 * _jax.multiprocessors()))
        counted = 2 * regions * (depth + 2)
        together = [n for n in (8, 4, 2) if n <= most and n * regions <= REGIONS and n * counted < 2**31]
        many = together[0] if alike and together else 1
        width = 1 << max(5, (many * regions - 1).bit_length())
        warps = min(width // WARP, 16)
        return cls(lanes, warps, width // (WARP * warps), regions, many)
