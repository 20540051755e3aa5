"""Speed of this machine: the fused simulation against a plain `lax.scan` of the same equations.

Results are compared before they are timed; a wrong one has no speed. The candidates run in turn in one process, with
rotated inputs, so that ratios hold on a busy machine too; the speeds hold on a quiet one.
"""

from __future__ import annotations

import datetime
import functools
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import noise
from ._version import __version__
from .models import JansenRit
from .schemes import SCHEMES
from .simulation import explain, simulate

DT = 1e-4
EVERY = 10
DRIVE = 220.0
INTENSITY = 2.0
# The largest relative error of the EEG over the first 1,000 steps for which a speed is reported.
AGREES = {"exact": 1e-4, "fast": 2e-2}
_CHECKED = 1000
_ROTATED = 3


class Case(NamedTuple):
    """A simulation to time: Jansen-Rit with three parameters of each mass, recorded every tenth step of 0.1 ms.

    Attributes
    ----------
    gradient : of mean eeg^2 with respect to the three parameters, instead of the simulation
    noisy : white noise on the drive
    """

    lanes: int
    steps: int
    gradient: bool = False
    noisy: bool = False
    scheme: str = "strang"
    precision: str = "exact"

    def __str__(self) -> str:
        what = "gradient" if self.gradient else "forward"
        more = [self.scheme, *(["noise"] if self.noisy else []), *(["fast"] if self.precision == "fast" else [])]
        return f"{what} {self.lanes:,} x {self.steps:,} {' '.join(more)}"

    @property
    def mass_steps(self) -> int:
        return self.lanes * self.steps


class Measured(NamedTuple):
    """The measurement of a case.

    Attributes
    ----------
    implementation : the one that ran
    seconds, reference_seconds : a call; NaN for a reference that was not run
    error : relative to the reference, over the first 1,000 steps
    bytes : of the compiled program, its arguments and results included
    """

    case: Case
    implementation: str
    seconds: float
    reference_seconds: float
    error: float
    bytes: int

    @property
    def rate(self) -> float:
        """Mass-steps a second."""
        return self.case.mass_steps / self.seconds

    @property
    def ratio(self) -> float:
        return self.reference_seconds / self.seconds


# The candidates -----------------------------------------------------------------------------------------------------


def arguments(lanes: int, variant: int = 0) -> tuple:
    """Ae in mV, be in Hz and C of each mass; they differ between variants."""
    spread = jnp.linspace(0.0, 1.0, lanes, dtype=jnp.float32) + 0.01 * variant
    return 3.0 + 0.5 * spread, 95.0 + 10.0 * spread, 130.0 + 10.0 * spread


def fused(case: Case, implementation: str | None) -> Callable:
    """``(Ae, be, C) -> eeg (K, L)``, through `simulate`."""

    def eeg(Ae, be, C):
        return simulate(**_request(case, implementation, Ae, be, C))["eeg"].mantissa

    return differentiated(eeg) if case.gradient else eeg


def _request(case: Case, implementation: str | None, Ae, be, C) -> dict[str, Any]:
    noisy = {"noise": {"E_inp": INTENSITY * u.Hz * u.second**0.5}, "key": jax.random.key(0)} if case.noisy else {}
    return {
        "model": JansenRit(Ae=Ae * u.mV, be=be * u.Hz, C=C),
        "duration": case.steps,
        "dt": DT * u.second,
        "inputs": {"E_inp": DRIVE * u.Hz},
        "every": EVERY,
        "scheme": case.scheme,
        "precision": case.precision,
        "implementation": implementation,
        **noisy,
    }


def reference(case: Case) -> Callable:
    """The same by `lax.scan` of the model's equations, in segments under `jax.checkpoint`."""
    model, scheme = JansenRit, SCHEMES[case.scheme]
    rest = JansenRit().magnitudes()
    inputs = {name: value.mantissa if hasattr(value, "mantissa") else value for name, value in model.inputs.items()}
    strides = case.steps // EVERY
    each = max(d for d in range(1, max(1, math.isqrt(case.steps) // EVERY) + 1) if strides % d == 0)

    def eeg(Ae, be, C):
        p = SimpleNamespace(**{**rest, "Ae": Ae, "be": be, "C": C})
        seeds = noise.lane_seeds(jax.random.key(0), Ae.shape) if case.noisy else None

        def step(state, n):
            drive = jnp.float32(DRIVE)
            if case.noisy:
                drive = drive + jnp.float32(INTENSITY / math.sqrt(DT)) * noise.normals(seeds, n, 1)[0]
            return scheme.step(model, state, p, SimpleNamespace(**{**inputs, "E_inp": drive}), DT), None

        def stride(state, first):
            state, _ = lax.scan(step, state, first + jnp.arange(EVERY))
            potentials = scheme.exit(model, state, p, DT)
            return state, potentials["E"] - potentials["I"]

        def segment(state, first):
            return lax.scan(stride, state, first + EVERY * jnp.arange(each))

        state = scheme.enter(model, {name: jnp.zeros_like(Ae) for name in model.states}, p, DT)
        firsts = EVERY * each * jnp.arange(strides // each)
        _, records = lax.scan(jax.checkpoint(segment) if case.gradient else segment, state, firsts)
        return records.reshape(-1, *Ae.shape)

    return differentiated(eeg) if case.gradient else eeg


def differentiated(eeg: Callable) -> Callable:
    """The gradient of mean eeg^2 with respect to the three parameters of each mass."""
    return jax.grad(lambda *args: jnp.mean(eeg(*args) ** 2), argnums=(0, 1, 2))


def simulated_by_brainmass(steps: int, jit: bool = False) -> Callable:
    """The same by `brainmass.Simulator`, exp_euler; with ``jit``, its default, it compiles at each call."""
    import brainmass

    def eeg(Ae, be, C):
        simulator = brainmass.Simulator(_node(Ae, be, C), dt=DT * u.second)
        # This transient makes it record the last of each ten steps, not the first.
        out = simulator.run(
            steps * DT * u.second, inputs=lambda *_: _DRIVES, monitors=lambda node: node.eeg(), transient=EVERY - 1,
            sample_every=EVERY, jit=jit,
        )  # fmt: skip
        return u.get_magnitude(out["output"])

    return eeg


def looped_by_brainstate(steps: int) -> Callable:
    """The same by a hand-written loop over brainmass's step, which stores the records alone."""
    import brainstate

    for_loop = brainstate.transform.for_loop

    def eeg(Ae, be, C):
        node = _node(Ae, be, C)

        def stride(_):
            for_loop(lambda _: node.update(*_DRIVES), jnp.arange(EVERY))
            return node.eeg()

        with brainstate.environ.context(dt=DT * u.second):
            brainstate.nn.init_all_states(node)
            return u.get_magnitude(for_loop(stride, jnp.arange(steps // EVERY)))

    return eeg


# Arguments of brainmass's update: M_inp, E_inp, I_inp.
_DRIVES = (0.0 * u.mV, DRIVE * u.Hz, 0.0 * u.mV)


def _node(Ae, be, C):
    import brainmass

    return brainmass.JansenRitStep(Ae.shape[0], Ae=Ae * u.mV, be=be * u.Hz, C=C, method="exp_euler")


# Measuring ----------------------------------------------------------------------------------------------------------


def error(case: Case, implementation: str | None, ours: Callable, theirs: Callable) -> float:
    """Distance of the fused result from the reference, relative to its norm, over the first 1,000 steps.

    A gradient depends on all steps, so gradients of a short run of a few masses are compared, once for each kind.
    """
    if case.gradient:
        return _error_of_gradient(case._replace(steps=_CHECKED, lanes=min(case.lanes, 256)), implementation)
    args = arguments(case.lanes)
    expected = theirs(*args)[: _CHECKED // EVERY]
    return _distance(ours(*args)[: len(expected)], expected)


@functools.lru_cache
def _error_of_gradient(case: Case, implementation: str | None) -> float:
    args = arguments(case.lanes)
    both = (jax.jit(f)(*args) for f in (fused(case, implementation), reference(case)))
    return max(_distance(a, b) for a, b in zip(*both, strict=True))


def _distance(result, expected) -> float:
    return float(jnp.linalg.norm(result - expected) / jnp.linalg.norm(expected))


def compiled(function: Callable, lanes: int):
    shape = jax.ShapeDtypeStruct((lanes,), jnp.float32)
    return jax.jit(function).lower(shape, shape, shape).compile()


def timed(functions: dict[str, Callable], lanes: int, seconds: float = 0.5) -> dict[str, float]:
    """The median seconds a call of each; calls are queued, so that launches overlap with the device's work."""
    rotated = [arguments(lanes, variant) for variant in range(_ROTATED)]
    queued, taken = {}, {name: [] for name in functions}
    for name, f in functions.items():
        jax.block_until_ready(f(*rotated[0]))
        began = time.perf_counter()
        jax.block_until_ready(f(*rotated[1]))
        queued[name] = max(1, min(50, int(seconds / 5 / max(time.perf_counter() - began, 1e-6))))
    for _ in range(5):
        for name, f in functions.items():
            began = time.perf_counter()
            out = None
            for i in range(queued[name]):  # one result is stored at a time, as that of a large run has gigabytes
                out = f(*rotated[i % _ROTATED])
            jax.block_until_ready(out)
            taken[name].append((time.perf_counter() - began) / queued[name])
            del out
    return {name: statistics.median(times) for name, times in taken.items()}


def measure(
    case: Case, implementation: str | None = None, seconds: float = 0.5, ours=None, theirs=None,
    reference_steps: int | None = None,
) -> Measured:  # fmt: skip
    """Compare, then time.

    Parameters
    ----------
    ours, theirs : the compiled functions, if they have been compiled before
    reference_steps : of the reference, instead of the case's; its time is scaled to the case

    Raises
    ------
    FloatingPointError : the results disagree, so there is no speed to report
    """
    ours = ours or compiled(fused(case, implementation), case.lanes)
    part = case._replace(steps=reference_steps or case.steps)
    theirs = theirs or compiled(reference(part), case.lanes)
    distance = error(case, implementation, ours, theirs)
    if not distance <= AGREES[case.precision]:
        raise FloatingPointError(f"{case}: off by {distance:.2g} of the reference, so it has no speed")
    runs = explain(**_request(case, implementation, *arguments(case.lanes))).implementation
    took = timed({"ours": ours, "theirs": theirs}, case.lanes, seconds)
    memory: Any = ours.memory_analysis()
    size = memory.temp_size_in_bytes + memory.output_size_in_bytes + memory.argument_size_in_bytes
    scan = took["theirs"] * case.steps / part.steps
    return Measured(case, runs, took["ours"], scan, distance, size)


class Rival(NamedTuple):
    """brainmass's Jansen-Rit beside ours, both with exp_euler.

    Attributes
    ----------
    name : how brainmass was run
    seconds, ours : a call of it, and of ours
    implementation : of ours
    error : of ours relative to it, over the first 1,000 steps
    """

    case: Case
    name: str
    seconds: float
    ours: float
    implementation: str
    error: float

    @property
    def rate(self) -> float:
        """Mass-steps a second of brainmass."""
        return self.case.mass_steps / self.seconds

    @property
    def ratio(self) -> float:
        return self.seconds / self.ours


def against_brainmass(case: Case, implementation: str | None = None, seconds: float = 0.5) -> list[Rival]:
    """Compare a forward run of exp_euler with brainmass's, then time both.

    Raises
    ------
    FloatingPointError : the results disagree, so there is no speed to report
    ImportError : brainmass is not installed
    """
    rivals = {
        "Simulator.run (compiles)": simulated_by_brainmass(case.steps, jit=True),
        "Simulator.run in jax.jit": compiled(simulated_by_brainmass(case.steps), case.lanes),
        "for_loop in jax.jit": compiled(looped_by_brainstate(case.steps), case.lanes),
    }
    ours, args = compiled(fused(case, implementation), case.lanes), arguments(case.lanes)
    mine, *others = (f(*args)[: _CHECKED // EVERY] for f in (ours, *rivals.values()))
    errors = {name: _distance(mine, other) for name, other in zip(rivals, others, strict=True)}
    for name, distance in errors.items():
        if not distance <= AGREES[case.precision]:
            raise FloatingPointError(f"{case}: off by {distance:.2g} of brainmass's {name}, so it has no speed")
    runs = explain(**_request(case, implementation, *args)).implementation
    took = timed({"ours": ours, **rivals}, case.lanes, seconds)
    return [Rival(case, name, took[name], took["ours"], runs, errors[name]) for name in rivals]


class Point(NamedTuple):
    """The cost and the error of a scheme at one step.

    Attributes
    ----------
    rms : of the EEG over one second, in mV, against RK4 in float64
    seconds : of simulating one second of each of the masses
    """

    scheme: str
    dt_ms: float
    rms: float
    seconds: float


def work_precision(schemes, steps_ms=(0.1, 0.25, 0.5, 1.0), lanes: int = 1024, seconds: float = 0.2) -> list[Point]:
    """Error against time of each scheme at each step; exp_euler at 0.1 ms is brainmass's default."""
    exact, points = _one_second("rk4", 0.02, 8, x64=True)(*arguments(8)), []
    for scheme in schemes:
        for dt_ms in steps_ms:
            rms = jnp.sqrt(jnp.mean((_one_second(scheme, dt_ms, 8)(*arguments(8)) - exact) ** 2))
            run = compiled(functools.partial(_eeg_of_a_second, scheme, dt_ms), lanes)
            took = timed({"run": run}, lanes, seconds)["run"]
            points.append(Point(scheme, dt_ms, float(rms), took))
    return points


def _eeg_of_a_second(scheme: str, dt_ms: float, Ae, be, C):
    model = JansenRit(Ae=Ae * u.mV, be=be * u.Hz, C=C)
    steps = round(1000 / dt_ms)
    res = simulate(model, steps, dt_ms * u.ms, inputs={"E_inp": DRIVE * u.Hz}, every=round(1 / dt_ms), scheme=scheme)
    return res["eeg"].mantissa


def _one_second(scheme: str, dt_ms: float, lanes: int, x64: bool = False) -> Callable:
    def run(*args):
        with jax.enable_x64(x64):
            wide = [np.asarray(x, np.float64 if x64 else np.float32) for x in args]
            return np.asarray(jax.jit(functools.partial(_eeg_of_a_second, scheme, dt_ms))(*wide), np.float64)

    return run


# Tables -------------------------------------------------------------------------------------------------------------

HEADER = f"{'case':<44} {'mass-steps/s':>12} {'x scan':>7} {'error':>8} {'memory':>10}  implementation"


def line(result: Measured) -> str:
    """One row of the table, under `HEADER`."""
    return (
        f"{result.case!s:<44} {result.rate:>12.3g} {result.ratio:>7.2f} {result.error:>8.1g} "
        f"{result.bytes / 2**20:>6.1f} MiB  {result.implementation}"
    )


RIVALS = f"{'against brainmass':<20} {'run as':<26} {'mass-steps/s':>12} {'ours x':>8} {'error':>8}  implementation"


def rival_line(result: Rival) -> str:
    """One row of the table, under `RIVALS`."""
    size = f"{result.case.lanes:,} x {result.case.steps:,}"
    ours = f"{result.ratio:.3g}"
    return f"{size:<20} {result.name:<26} {result.rate:>12.3g} {ours:>8} {result.error:>8.1g}  {result.implementation}"


def record(result: Measured | Rival) -> dict[str, Any]:
    """Ready for JSON."""
    return {**result.case._asdict(), **result._asdict(), "case": str(result.case), "mass_steps_per_s": result.rate}


def machine() -> dict[str, Any]:
    """Versions and the device, on which a result depends."""
    device = jax.devices()[0]
    optional = [name for name in ("llvmlite", "jax-triton", "brainmass") if find_spec(name.replace("-", "_"))]
    versions = {
        "brainmass-kernels": __version__,
        **{name: metadata.version(name) for name in ("jax", "jaxlib", "numpy", *optional)},
    }
    return {
        "date": datetime.date.today().isoformat(),
        "device": device.device_kind,
        "platform": device.platform,
        "cores": os.cpu_count(),
        "python": sys.version.split()[0],
        "versions": versions,
    }


def peak_memory() -> int:
    """Peak resident bytes of this process."""
    # On Linux ru_maxrss includes the parent's memory at the fork.
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
