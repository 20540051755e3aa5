"""How fast a device may be expected to run a case: the ledger's counts, brought to its multiprocessors and clock."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from brainmass_kernels.bench import Case

from .ledger import CARDS, ISSUE, read_rows


class Chip(NamedTuple):
    """A device, and where the ledger has it.

    Attributes
    ----------
    mosaic, triton : the ledger's chip for `mosaic_gpu` and for `triton`
    multiprocessors, clock_ghz : at the boost clock
    """

    mosaic: str | None
    triton: str | None
    multiprocessors: int
    clock_ghz: float

    def counted(self, implementation: str) -> str | None:
        """The ledger's chip for an implementation."""
        return {"mosaic_gpu": self.mosaic, "triton": self.triton}.get(implementation)

    def speed(self, chip: str) -> float:
        """Multiprocessors times clock, relative to the card that the ledger counts for."""
        card = CARDS[chip]
        return self.multiprocessors * self.clock_ghz / (card.multiprocessors * card.clock_ghz)


# By JAX's name of the device. An H100 is an H200 with other memory: on the SXM board at the same clock.
CHIPS = {
    "NVIDIA H100 80GB HBM3": Chip("h200", "sm_90", 132, 1.98),
    "NVIDIA H100 NVL": Chip("h200", "sm_90", 132, 1.785),
    "NVIDIA H100 PCIe": Chip("h200", "sm_90", 114, 1.755),
    "NVIDIA H200": Chip("h200", "sm_90", 132, 1.98),
    "NVIDIA B200": Chip("b200", None, 148, 1.965),
    "NVIDIA A100-SXM4-40GB": Chip(None, "sm_80", 108, 1.41),
    "NVIDIA A100-SXM4-80GB": Chip(None, "sm_80", 108, 1.41),
    "NVIDIA L40S": Chip(None, "sm_89", 142, 2.52),
}

# A model of Hopper that no measurement has calibrated yet. Cycles a step of one warp that has a scheduler to itself,
# by the chain of its dependent instructions; and how much longer many warps take than their instructions are issued in.
CHAIN = {"fast": 58, "exact": 108, "fast noise": 138, "fast back": 87}
STALLS = 1.15
# Seconds that a launch takes: of the forward kernel, and of the way back with what is around it.
LAUNCH = 25e-6, 40e-6


@functools.lru_cache
def counted() -> tuple[dict, ...]:
    """The ledger's rows of kernels whose rate is bounded by their instructions."""
    return tuple(row for row in read_rows() if "ceiling" in row)


def bound(case: Case, implementation: str, device: str, kernels: tuple[str, ...]) -> float | None:
    """The most mass-steps a second of one of these kernels, of the widths that the ledger has."""
    known = CHIPS.get(device)
    chip = known and known.counted(implementation)
    if known is None or chip is None:
        return None
    wanted = {
        "chip": chip, "scheme": case.scheme, "precision": case.precision,
        "arguments": "noise" if case.noisy else "plain",
    }  # fmt: skip
    rates = [row["ceiling"] for row in counted() if wanted.items() <= row.items() and row["kernel"] in kernels]
    return known.speed(chip) * max(rates) if rates else None


def ceiling(case: Case, implementation: str, device: str) -> float | None:
    """Mass-steps a second that the ledger's instruction counts allow, where it has them."""
    forward = bound(case, implementation, device, ("forward",))
    if not case.gradient or forward is None:
        return forward
    back = bound(case, implementation, device, ("gradient", "inverse steps"))
    return back and 1 / (1 / forward + 1 / back)


def expected(case: Case, implementation: str, device: str) -> float | None:
    """Mass-steps a second by the ledger's counts, the latency of few warps, and the launches.

    Only of Hopper, whose latencies are in `CHAIN`; ``None`` where a number is missing.
    """
    known = CHIPS.get(device)
    if known is None or known.triton != "sm_90":
        return None
    parts = [("forward",)] + [("gradient", "inverse steps")] * case.gradient
    seconds = 0.0
    for kernels, launch in zip(parts, LAUNCH):
        kind = case.precision + " noise" * case.noisy + " back" * (kernels != ("forward",))
        rate = bound(case, implementation, device, kernels)
        if rate is None or kind not in CHAIN:
            return None
        issued = known.multiprocessors * ISSUE * known.clock_ghz * 1e9 / rate
        warps = math.ceil(case.lanes / (known.multiprocessors * ISSUE))
        cycles = max(CHAIN[kind], STALLS * warps * issued)
        seconds += case.steps * cycles / (known.clock_ghz * 1e9) + launch
    return case.mass_steps / seconds
