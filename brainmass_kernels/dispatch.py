"""Which implementation runs, and why."""

from __future__ import annotations

import dataclasses
import importlib

import jax

from . import testing
from .backends.base import Backend, Request, Unsupported

# In order of preference; each is imported when first considered.
_BACKENDS = {
    "mosaic_tpu": ("mosaic_tpu", "MosaicTPU"),
    "mosaic_gpu": ("mosaic_gpu", "MosaicGPU"),
    "triton": ("triton", "Triton"),
    "numba": ("numba", "Numba"),
    "scan": ("scan", "Scan"),
}
# Runs of fewer mass-steps are not worth an implementation's own compiling and calling: the next one is as fast
# (docs/design.md, "CPU kernel").
_LEAST_WORK = {"numba": 4_000}


_WALKED = {
    "always": ", walked back by inverse steps",
    "asked": ", walked back by inverse steps where rates are slow enough",
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run will do; ``str()`` is a table.

    Attributes
    ----------
    implementation : what was chosen
    reason : why
    passed_over : for each implementation not chosen, why not
    lanes, steps, records : masses, steps, and records taken of each
    checkpoint_every : steps between checkpoints of a gradient
    operations : arithmetic operations a step and lane, after hoisting
    bytes_recorded, bytes_gradient : held for the records; held beyond them by a gradient
    retreat : whether a gradient walks back by inverse steps: "always", "asked" where the rates decide at run time,
        or "" where it reruns each segment
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
    retreat: str = ""

    def __str__(self) -> str:
        rows = {
            "implementation": f"{self.implementation} ({self.reason})",
            "work": f"{self.lanes:,} lanes x {self.steps:,} steps, {self.operations} operations a step and lane",
            "hoisted": f"{self.coefficients} coefficients, computed once before the loop",
            "records": f"{self.records:,} a lane, {_size(self.bytes_recorded)}",
            "gradient": f"checkpoints every {self.checkpoint_every} steps, {_size(self.bytes_gradient)} more"
            + _WALKED.get(self.retreat, ""),
        }
        rows |= {f"not {name}": why for name, why in self.passed_over.items()}
        width = max(map(len, rows))
        return "\n".join(f"{name:<{width}}  {text}" for name, text in rows.items())


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


def check_known(name: str | None) -> None:
    """Raise unless ``name`` is an implementation, or ``None``."""
    if name is not None and name not in _BACKENDS:
        raise ValueError(f"implementation got '{name}', but takes None or one of {', '.join(_BACKENDS)}")


def choose(name: str | None, request: Request) -> tuple[str, str, dict[str, str]]:
    """The implementation to run, the reason, and why not each other one."""
    check_known(name)
    if name is not None:
        backend = load(name)
        interpreted = request.loop.interpret and backend.interpretable
        reason = (not interpreted and backend.unavailable(request.platform)) or backend.unsupported(request)
        if reason:
            raise Unsupported(f"implementation '{name}' cannot run this: {reason}")
        return name, "asked for by name", {}
    passed_over: dict[str, str] = {}
    for candidate in _BACKENDS:
        backend = load(candidate)
        reason = _left_out(candidate, request) or backend.unavailable(request.platform) or backend.unsupported(request)
        if not reason:
            others = {n: "the chosen one comes first" for n in _BACKENDS if n != candidate and n not in passed_over}
            why = f"the fastest that runs on this {request.platform}"
            return candidate, why, passed_over | others
        passed_over[candidate] = reason
    raise Unsupported("; ".join(f"{n}: {why}" for n, why in passed_over.items()))


def _left_out(name: str, request: Request) -> str | None:
    """Why an implementation that could run is not the one to choose, or ``None``."""
    if name in testing.absent():
        return "left out by testing.without"
    work, least = request.lanes * request.loop.schedule.steps, _LEAST_WORK.get(name, 0)
    if work < least:
        return f"{work:,} mass-steps are fewer than the {least:,} from which it is faster"
    return None


def platform() -> str:
    """The platform that JAX computes on by default."""
    return testing.target_platform() or jax.default_backend()


def implementations() -> dict[str, str]:
    """What can run here: for each implementation "runs here", or the reason why it cannot."""
    return {name: load(name).unavailable(platform()) or "runs here" for name in _BACKENDS}
