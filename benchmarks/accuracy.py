"""Root-mean-square error of each scheme on Jansen-Rit against float64 RK4; ``python -m benchmarks.accuracy``.

From rest at E_inp = 220 Hz for 2 s, compared every millisecond, all in float64, so that only the scheme errs.

Then how much sooner what this package does by default is within 0.05 mV than what brainmass does by default: 1,024
masses of float32, each at the largest step that is near enough, timed in turn.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from importlib.util import find_spec

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np

import brainmass_kernels as bk

from .cpu import parameters
from .timing import options, save, timed

STEPS_MS = (0.1, 0.5, 1.0)
ORDER = ("exp_euler", "euler", "symplectic_euler", "exact", "strang", "heun", "rk4")


def eeg(dt_ms: float, scheme: str) -> np.ndarray:
    """E - I at each millisecond."""
    every = round(1.0 / dt_ms)
    run = bk.simulate(
        bk.JansenRit(), 2000 * every, dt_ms * u.ms, inputs={"E_inp": 220.0 * u.Hz}, every=every, scheme=scheme
    )
    return np.asarray(run["eeg"] / u.mV)


def table() -> dict[str, dict]:
    """For each scheme, its operations a step and its error in mV at each dt."""
    reference = eeg(0.01, "rk4")
    rows = {}
    for scheme in ORDER:
        plan = bk.explain(bk.JansenRit(), 1000, 0.1 * u.ms, scheme=scheme)
        errors = {str(dt): float(np.sqrt(np.mean((eeg(dt, scheme) - reference) ** 2))) for dt in STEPS_MS}
        rows[scheme] = {"operations": plan.operations, "rms_mV": errors}
    return rows


# How soon an error is reached ----------------------------------------------------------------------------------------

WITHIN, GOAL = 0.05, 20.0
MASSES, FEW, LENGTH = 1024, 8, 2000
#: Steps that are tried, which divide a millisecond, the largest first.
OUR_STEPS = (1.0, 0.5, 0.25, 0.2, 0.1)
THEIR_STEPS = (0.1, 0.05, 0.02, 0.01, 0.005, 0.004, 0.0025, 0.002)


def ours(dt_ms: float, milliseconds: int, scheme: str | None = None) -> Callable:
    """``(Ae, be, C) -> (milliseconds, masses)``, the eeg in mV; the scheme is the model's own where none is given."""

    def run(Ae, be, C):
        every = round(1.0 / dt_ms)
        model = bk.JansenRit(Ae=Ae * u.mV, be=be * u.Hz, C=C)
        inputs = {"E_inp": 220.0 * u.Hz}
        return bk.simulate(
            model, milliseconds * every, dt_ms * u.ms, inputs=inputs, every=every, scheme=scheme, record="eeg"
        )["eeg"].mantissa

    return jax.jit(run)


def brainmass_by_default(dt_ms: float, milliseconds: int) -> Callable:
    """The same by brainmass: its default, exponential Euler, in a loop that stores the records alone, compiled once."""
    import brainmass
    import brainstate

    for_loop, drives = brainstate.transform.for_loop, (0.0 * u.mV, 220.0 * u.Hz, 0.0 * u.mV)

    def run(Ae, be, C):
        node = brainmass.JansenRitStep(Ae.shape[0], Ae=Ae * u.mV, be=be * u.Hz, C=C)

        def stride(_):
            for_loop(lambda _: node.update(*drives), jnp.arange(round(1.0 / dt_ms)))
            return node.eeg()

        with brainstate.environ.context(dt=dt_ms * u.ms):
            brainstate.nn.init_all_states(node)
            return u.get_magnitude(for_loop(stride, jnp.arange(milliseconds)))

    return jax.jit(run)


def exact(milliseconds: int) -> np.ndarray:
    """Of a few masses by RK4 of float64."""
    with jax.enable_x64(True):
        return np.asarray(ours(0.05, milliseconds, "rk4")(*(np.asarray(x, np.float64) for x in parameters(FEW))))


def largest_step(make: Callable, steps, milliseconds: int, within: float) -> tuple[float, float]:
    """The largest of these steps whose rms error over a few masses is within so many mV, and that error.

    Raises
    ------
    SystemExit : none is near enough
    """
    wanted = exact(milliseconds)
    for dt_ms in steps:
        got = np.asarray(make(dt_ms, milliseconds)(*parameters(FEW)), np.float64)
        error = float(np.sqrt(np.mean((got - wanted) ** 2)))
        if error <= within:
            return dt_ms, error
    raise SystemExit(f"no step is within {within:g} mV: the smallest, {steps[-1]:g} ms, is off by {error:.2g} mV")


def time_to_accuracy(masses: int, milliseconds: int, within: float, repeats: int) -> dict:
    """The step of each, its error and its seconds, and how many times as long brainmass's takes."""
    both = {"ours": (ours, OUR_STEPS), "brainmass": (brainmass_by_default, THEIR_STEPS)}
    steps = {name: largest_step(make, tried, milliseconds, within) for name, (make, tried) in both.items()}
    args = parameters(masses)
    runs = {name: functools.partial(make(steps[name][0], milliseconds), *args) for name, (make, _) in both.items()}
    seconds = timed(runs, repeats)
    ratio = seconds["brainmass"] / seconds["ours"]
    for name, (dt_ms, error) in steps.items():
        print(f"{name}: dt {dt_ms:g} ms is {error:.2g} mV from RK4 and takes {seconds[name]:.3g} s")
    print(f"within {within:g} mV rms {ratio:.0f} times as soon as brainmass's default (goal {GOAL:g})")
    return {
        "within_mV": within, "masses": masses, "milliseconds": milliseconds,
        "scheme": {"ours": bk.JansenRit().scheme, "brainmass": "exp_euler"},
        "dt_ms": {name: dt_ms for name, (dt_ms, _) in steps.items()},
        "rms_mV": {name: float(f"{error:.3g}") for name, (_, error) in steps.items()},
        "seconds": {name: float(f"{each:.4g}") for name, each in seconds.items()},
        "ratio": round(ratio, 1), "goal": GOAL,
    }  # fmt: skip


def main() -> None:
    asked = options(__doc__, "accuracy", "one looser error of a few masses", 5)
    if asked.quick:
        if find_spec("brainmass"):
            time_to_accuracy(16, 100, 0.5, 1)
        return
    with jax.enable_x64(True):
        rows = table()
    print("| scheme | " + " | ".join(f"dt {dt:g} ms" for dt in STEPS_MS) + " | operations |\n|---" + "|---" * 4 + "|")
    for scheme, row in rows.items():
        print(f"| {scheme} | " + " | ".join(f"{e:.2g}" for e in row["rms_mV"].values()) + f" | {row['operations']} |")
    sooner = {}
    if find_spec("brainmass"):
        sooner["time_to_accuracy"] = time_to_accuracy(MASSES, LENGTH, WITHIN, asked.repeats)
    else:
        print("brainmass is not installed: how much sooner an error is reached is left out")
    load = os.getloadavg()[0]
    save(asked.out, ("jax", "llvmlite", "brainmass", "brainstate"), load=round(load, 1), rows=rows, **sooner)


if __name__ == "__main__":
    main()
