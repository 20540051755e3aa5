"""Root-mean-square error of each scheme on Jansen-Rit against float64 RK4; ``python -m benchmarks.accuracy``.

From rest at E_inp = 220 Hz for 2 s, compared every millisecond, all in float64, so that only the scheme errs.

Then how much sooner what this package does by default is within 0.05 mV than what brainmass does by default: 1,024
masses, each at the largest step that is near enough, timed in turn. Both are of float32 where that can be so near: many
short steps of exponential Euler round too much, so brainmass goes on to float64.
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


def parameters(masses: int) -> tuple[np.ndarray, ...]:
    """The model's own Ae in mV, be in Hz and C, as in the table of schemes, for each mass."""
    return tuple(np.full(masses, value, np.float32) for value in (3.25, 100.0, 135.0))


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


def brainmass_by_default(dt_ms: float, milliseconds: int, bits: int = 32) -> Callable:
    """The same by brainmass: its default, exponential Euler, in a loop that stores the records alone, compiled once."""
    import brainmass
    import brainstate

    for_loop, drives = brainstate.transform.for_loop, (0.0 * u.mV, 220.0 * u.Hz, 0.0 * u.mV)

    def run(Ae, be, C):
        node = brainmass.JansenRitStep(Ae.shape[0], Ae=Ae * u.mV, be=be * u.Hz, C=C)

        def stride(_):
            for_loop(lambda _: node.update(*drives), jnp.arange(round(1.0 / dt_ms)))
            return node.eeg()

        with brainstate.environ.context(dt=dt_ms * u.ms, precision=bits):
            brainstate.nn.init_all_states(node)
            return u.get_magnitude(for_loop(stride, jnp.arange(milliseconds)))

    compiled, dtype = jax.jit(run), np.dtype(f"float{bits}")

    def call(*args):
        with jax.enable_x64(bits == 64):
            return compiled(*(np.asarray(x, dtype) for x in args))

    return call


def exact(milliseconds: int) -> np.ndarray:
    """Of a few masses by RK4 of float64."""
    with jax.enable_x64(True):
        return np.asarray(ours(0.05, milliseconds, "rk4")(*(np.asarray(x, np.float64) for x in parameters(FEW))))


def largest_step(make: Callable, steps, milliseconds: int, within: float) -> tuple[float, float] | None:
    """The largest of these steps whose rms error over a few masses is within so many mV, and that error.

    ``None`` where no step is near enough.
    """
    wanted = exact(milliseconds)
    for dt_ms in steps:
        got = np.asarray(make(dt_ms, milliseconds)(*parameters(FEW)), np.float64)
        error = float(np.sqrt(np.mean((got - wanted) ** 2)))
        if error <= within:
            return dt_ms, error
    return None


def first_within(ways: dict[int, Callable], steps, milliseconds: int, within: float) -> tuple[int, float, float]:
    """Bits, step and error of the first of some ways, by bits, that is near enough at one of the steps.

    Raises
    ------
    SystemExit : none is
    """
    for bits, make in ways.items():
        found = largest_step(make, steps, milliseconds, within)
        if found:
            return bits, *found
    raise SystemExit(f"no step from {steps[0]:g} to {steps[-1]:g} ms is within {within:g} mV")


def time_to_accuracy(masses: int, milliseconds: int, within: float, repeats: int) -> dict:
    """The precision and step of each, its error and its seconds, and how many times as long brainmass's takes."""
    wide = functools.partial(brainmass_by_default, bits=64)
    both = {"ours": ({32: ours}, OUR_STEPS), "brainmass": ({32: brainmass_by_default, 64: wide}, THEIR_STEPS)}
    found = {name: first_within(ways, tried, milliseconds, within) for name, (ways, tried) in both.items()}
    args, runs = parameters(masses), {}
    for name, (bits, dt_ms, error) in found.items():
        runs[name] = functools.partial(both[name][0][bits](dt_ms, milliseconds), *args)
        print(f"{name}: float{bits}, dt {dt_ms:g} ms is {error:.2g} mV from RK4", flush=True)
    seconds = timed(runs, repeats)
    ratio = seconds["brainmass"] / seconds["ours"]
    print(f"{seconds['ours']:.3g} s and {seconds['brainmass']:.3g} s")
    print(f"within {within:g} mV rms {ratio:.0f} times as soon as brainmass's default (goal {GOAL:g})")
    return {
        "within_mV": within, "masses": masses, "milliseconds": milliseconds,
        "scheme": {"ours": bk.JansenRit().scheme, "brainmass": "exp_euler"},
        "bits": {name: bits for name, (bits, _, _) in found.items()},
        "dt_ms": {name: dt_ms for name, (_, dt_ms, _) in found.items()},
        "rms_mV": {name: float(f"{error:.3g}") for name, (_, _, error) in found.items()},
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
