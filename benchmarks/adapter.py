"""`fuse` against `brainmass.Simulator`, both on the same model; ``python -m benchmarks.adapter``.

"as called" is a run as a user writes it: both trace the model anew at each call, and brainmass also compiles.
"compiled once" is the same run inside of `brainstate.transform.jit`. Results must agree before any speed is printed.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import sys

import brainmass
import brainstate
import brainunit as u
import jax
import jax.numpy as jnp

import brainmass_kernels as bk

from .cpu import RESULTS, close, timed

DT, STEPS = 0.1 * u.ms, 10_000
VERSIONS = ("jax", "numba", "brainmass", "brainstate")


def model_of(lanes: int):
    gain = jnp.linspace(3.0, 3.5, lanes, dtype=jnp.float32) * u.mV
    return brainmass.JansenRitStep(lanes, Ae=brainstate.nn.Param(gain))


def eeg(run, steps: int):
    def inputs(i, t):
        return 0.0 * u.mV, 220.0 * u.Hz, 0.0 * u.mV

    return run.run(steps * DT, inputs=inputs, sample_every=10)["output"] / u.mV


def runs(lanes: int) -> dict:
    model = model_of(lanes)
    return {"brainmass": brainmass.Simulator(model, DT), "fused": bk.fuse(model, DT)}


def gradient(run, steps: int):
    weights = run.model.states(brainstate.ParamState)
    (found,) = brainstate.transform.grad(lambda: jnp.mean(eeg(run, steps) ** 2), weights)().values()
    return u.get_magnitude(found)


def compared(what: str, of, lanes: int, repeats: int, compiled: bool) -> dict:
    both = runs(lanes)
    close(of(both["fused"], 1000), of(both["brainmass"], 1000), 1e-3)
    calls = {name: lambda run=run: of(run, STEPS) for name, run in both.items()}
    calls = {name: brainstate.transform.jit(f) for name, f in calls.items()} if compiled else calls
    seconds = timed(calls, repeats)
    ratio = seconds["brainmass"] / seconds["fused"]
    how = "compiled once" if compiled else "as called"
    print(f"{what}, {lanes:>5,} masses x {STEPS:,} steps, {how:<13}: {ratio:6.1f}x as fast", flush=True)
    return {"what": what, "how": how, "lanes": lanes, "steps": STEPS, "seconds": seconds, "ratio": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", default=str(RESULTS / "adapter.json"))
    given = parser.parse_args()
    results = [
        compared(what, of, lanes, given.repeats, compiled)
        for what, of, sizes in (("forward", eeg, (1, 1024)), ("gradient in Ae", gradient, (1, 64)))
        for lanes in sizes
        for compiled in (False, True)
    ]
    document = {
        "command": "python -m benchmarks.adapter",
        "date": datetime.date.today().isoformat(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": sys.version.split()[0],
        **{name: importlib.metadata.version(name) for name in VERSIONS},
        "backend": jax.default_backend(),
        "results": results,
    }
    with open(given.out, "w") as file:
        json.dump(document, file, indent=1)
        file.write("\n")


if __name__ == "__main__":
    main()
