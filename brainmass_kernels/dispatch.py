"""The choice of the implementation that runs a request, and the reason."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax

from . import _context
from .backends.base import Backend, Request
from .errors import Unsupported, check_implementation

# In order of preference; each is imported when first considered.
_BACKENDS = {
    "mosaic_tpu": ("mosaic_tpu", "MosaicTPU"),
    "mosaic_gpu": ("mosaic_gpu", "MosaicGPU"),
    "triton": ("triton", "Triton"),
    "numba": ("numba", "Numba"),
    "scan": ("scan", "Scan"),
}


class Row(NamedTuple):
    """The time of one size of run on one kind of device.

    Attributes
    ----------
    lanes, steps : of a forward run of Jansen-Rit
    seconds : of each implementation that was measured
    regions : lanes of a network; 0 for uncoupled lanes
    """

    lanes: int
    steps: int
    seconds: Mapping[str, float]
    regions: int = 0

    def __str__(self) -> str:
        lanes = f"{self.lanes // self.regions:,} networks of {self.regions:,} regions" if self.regions else ""
        return f"{lanes or f'{self.lanes:,} lanes'} x {self.steps:,} steps"


_INVERSE_STEPS = {
    "always": ", reversed by inverse steps",
    "asked": ", reversed by inverse steps where rates are slow enough",
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run will do; ``str()`` is a table.

    Attributes
    ----------
    implementation, reason : the implementation, and why it was chosen
    passed_over : for each other implementation, why it was not
    lanes, steps, records : masses, steps, and records of each
    checkpoint_every : steps between checkpoints of a gradient
    operations : arithmetic operations a step and lane, after hoisting
    coefficients : values that are computed once, before the loop
    bytes_recorded, bytes_gradient : of the records; of a gradient beyond them
    bytes_copied : of the kernel's records, if the returned ones are a copy
    lane_block : a multiple of so many lanes avoids that copy; 0 if no number of lanes does
    inverse_steps : whether a gradient takes inverse steps: "always", "asked" if the rates decide at run time, or "" if
        it reruns each segment
    block : records that statistics reduce at a time, 0 without statistics
    horizon : steps that a gradient goes back at most, or 0
    groups : of a network of groups, whose equations a region runs, or ``""``
    devices : how devices share the run, or ``""``; bytes are then those of each. Within `jax.jit`, where the axes of
        the mesh are automatic, XLA decides that later
    """

    implementation: str
    reason: str
    passed_over: dict[str, str]
    lanes: int
    steps: int
    records: int
    checkpoint_every: int
    operations: int
    coefficients: int
    bytes_recorded: int
    bytes_gradient: int
    inverse_steps: str = ""
    block: int = 0
    bytes_copied: int = 0
    lane_block: int = 0
    horizon: int = 0
    groups: str = ""
    devices: str = ""

    def __str__(self) -> str:
        rows = {
            "implementation": f"{self.implementation} ({self.reason})",
            "work": f"{self.lanes:,} lanes x {self.steps:,} steps, {self.operations} operations a step and lane",
            "hoisted": f"{self.coefficients} coefficients, computed once before the loop",
            "records": f"{self.records:,} a lane, {_size(self.bytes_recorded)}"
            + (f", reduced {min(self.block, self.records):,} at a time" if self.block else "")
            + self._copy(),
            "gradient": f"checkpoints every {self.checkpoint_every} steps, {_size(self.bytes_gradient)} more"
            + _INVERSE_STEPS.get(self.inverse_steps, "")
            + (f", over {self.horizon:,} steps at most" if self.horizon else ""),
        }
        rows |= {"groups": self.groups} if self.groups else {}
        rows |= {"devices": self.devices} if self.devices else {}
        rows |= {f"not {name}": why for name, why in self.passed_over.items()}
        width = max(map(len, rows))
        return "\n".join(f"{name:<{width}}  {text}" for name, text in rows.items())

    def _copy(self) -> str:
        """The copy of the records, and numbers of lanes that would avoid it."""
        if not self.bytes_copied:
            return ""
        text = f", and {_size(self.bytes_copied)} while they are copied"
        if not self.lane_block:
            return text
        below = self.lanes // self.lane_block * self.lane_block
        fitting = [f"{n:,}" for n in (below, below + self.lane_block) if n]
        return f"{text}: not with a multiple of {self.lane_block} lanes, such as {' or '.join(fitting)}"


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.4g} {unit}"
        count /= 1024
    raise AssertionError


def load(name: str) -> Backend:
    """The backend of that name."""
    module, cls = _BACKENDS[name]
    return getattr(importlib.import_module(f".backends.{module}", __package__), cls)()


def check_known(name: str | None, *more: str) -> None:
    """Raise unless ``name`` is an implementation, one of ``more``, or ``None``."""
    check_implementation(name, (*more, *_BACKENDS))


def choose(name: str | None, request: Request) -> tuple[str, str, dict[str, str]]:
    """The implementation to run, the reason, and why not each other one; raises Unsupported if none can."""
    check_known(name)
    if name is not None:
        backend = load(name)
        interpreted = request.loop.interpret and backend.interpretable
        reason = (not interpreted and backend.unavailable(request.platform)) or _unsupported(backend, request)
        if reason:
            raise Unsupported(f"implementation '{name}' cannot run this: {reason}")
        return name, "asked for by name", {}
    kind = _device_kind(request.platform)
    coupling = request.loop.coupling
    row = _nearest(kind, request.lanes, request.loop.schedule.steps, coupling.regions if coupling else 0)
    passed_over: dict[str, str] = {}
    for candidate in _order(row):
        backend = load(candidate)
        reason = _absent(candidate) or backend.unavailable(request.platform) or _unsupported(backend, request)
        if not reason:
            others = [n for n in _BACKENDS if n != candidate and n not in passed_over]
            slower = {n: _why_after(n, candidate, row, request.platform) for n in others}
            return candidate, _why(candidate, row, kind or f"this {request.platform}"), passed_over | slower
        passed_over[candidate] = reason
    raise Unsupported("; ".join(f"{n}: {why}" for n, why in passed_over.items()))


def _unsupported(backend: Backend, request: Request) -> str | None:
    if request.loop.coupling and not backend.networks:
        able = ", ".join(name for name in _BACKENDS if load(name).networks)
        return f"it runs no networks of coupled masses and no delays inside a mass; {able} do"
    return backend.unsupported(request)


def _absent(name: str) -> str | None:
    return "left out by testing.without" if name in _context.ABSENT.get() else None


# By measurement -----------------------------------------------------------------------------------------------------


@functools.lru_cache
def crossovers() -> dict[str, tuple[Row, ...]]:
    """Measured times by kind of device (``python -m benchmarks.crossovers``)."""
    kinds = json.loads(Path(__file__).with_name("crossovers.json").read_text())
    return {kind: tuple(Row(**row) for row in table["rows"]) for kind, table in kinds.items()}


def _device_kind(platform: str) -> str | None:
    """JAX's name of the device that a run is for, or ``None`` if this machine lacks it."""
    here = _context.target_platform() is None and platform == jax.default_backend()
    return jax.devices()[0].device_kind if here else None


def _nearest(kind: str | None, lanes: int, steps: int, regions: int = 0) -> Row | None:
    """The measured size nearest to a run, by the logarithms of lanes, steps and regions.

    Networks are compared with networks, if any were measured on this kind of device.
    """

    def distance(row: Row) -> float:
        wider = math.log(row.regions / regions) if row.regions and regions else 0.0
        return math.hypot(math.log(row.lanes / max(1, lanes)), math.log(row.steps / steps), wider)

    rows = crossovers().get(kind or "", ())
    alike = [row for row in rows if bool(row.regions) == bool(regions)]
    return min(alike or [row for row in rows if not row.regions], key=distance, default=None)


def _order(row: Row | None) -> Iterator[str]:
    """The order in which implementations are tried: by measured time, else by preference with scan last.

    Unmeasured ones come before scan if a measured one was faster than scan.
    """
    measured = sorted(row.seconds, key=row.seconds.__getitem__) if row else []
    ahead = measured[: measured.index("scan") or None] if "scan" in measured else measured
    unmeasured = [name for name in _BACKENDS if name not in measured and name != "scan"]
    return iter(dict.fromkeys([*ahead, *unmeasured, *measured, "scan"]))


def _why(name: str, row: Row | None, device: str) -> str:
    if row is None:
        return f"nothing was measured on {device}: the first that runs, in order of preference"
    if name not in row.seconds:
        return f"not measured on {device}: the first that runs, in order of preference"
    times = row.seconds.get("scan", 0.0) / row.seconds[name]
    what = f"{times:.3g}x as fast as scan" if times > 1 else "the fastest there that runs"
    return f"measured on {device}, {row}: {what}"


def _why_after(name: str, chosen: str, row: Row | None, platform: str) -> str:
    """Why an implementation comes after the chosen one."""
    reason = _absent(name) or load(name).unavailable(platform)
    if reason:
        return reason
    if row and name in row.seconds and chosen in row.seconds:
        return f"takes {row.seconds[name] / row.seconds[chosen]:.3g}x as long as {chosen}, at {row}"
    return f"{chosen} comes first"


def platform() -> str:
    """The platform that JAX computes on by default."""
    return _context.target_platform() or jax.default_backend()


def implementations() -> dict[str, str]:
    """For each implementation "runs here", or the reason why it cannot."""
    return {name: load(name).unavailable(platform()) or "runs here" for name in _BACKENDS}
