"""`fuse` against `brainmass.Simulator`, both on the same model; ``python -m benchmarks.adapter``.

"as called" is a run as a user writes it: both trace the model anew at each call, and brainmass also compiles.
"compiled once" is the same run inside of `brainstate.transform.jit`. Results must agree before any speed is printed.
"""

from __future__ import annotations

import argparse
import functools

import brainmass
import brainstate
import braintools
import brainunit as u
import jax.numpy as jnp
import numpy as np

import brainmass_kernels as bk

from .timing import RESULTS, close, save, timed

DT, STEPS = 0.1 * u.ms, 10_000
VERSIONS = ("jax", "llvmlite", "brainmass", "brainstate")


def model_of(lanes: int):
    gain = jnp.linspace(3.0, 3.5, lanes, dtype=jnp.float32) * u.mV
    return brainmass.JansenRitStep(lanes, Ae=brainstate.nn.Param(gain))


def eeg(run, steps: int):
    def inputs(i, t):
        return 0.0 * u.mV, 220.0 * u.Hz, 0.0 * u.mV

    return run.run(steps * DT, inputs=inputs, sample_every=10)["output"] / u.mV


def network_of(coupling: str, regions: int):
    """Delays to 20 ms; a trainable strength."""
    rng = np.random.default_rng(0)
    with brainstate.environ.context(dt=DT):
        return brainmass.Network(
            brainmass.HopfStep(regions, a=0.1),
            conn=rng.uniform(0.0, 1.0 / regions, (regions, regions)).astype(np.float32),
            distance=rng.uniform(10.0, 100.0, (regions, regions)),
            speed=5.0,
            coupling=coupling,
            coupled_var="x",
            k=brainstate.nn.Param(jnp.asarray(0.2)),
            delay_init=braintools.init.Constant(0.1),
        )


def held_of(regions: int):
    """Ten steps a repetition time; delays to four repetition times."""
    rng = np.random.default_rng(0)
    logs = rng.normal(0.0, 0.1, (3, regions, regions)).astype(np.float32)
    with brainstate.environ.context(dt=DT):
        return brainmass.JansenRitTR(
            regions,
            delay=rng.integers(1, 5, (regions, regions)).astype(float),
            sc=rng.uniform(size=(regions, regions)).astype(np.float32),
            k=brainstate.nn.Param(jnp.asarray(5.0)),
            **dict(zip(("w_ll", "w_ff", "w_bb"), logs)),
            **dict.fromkeys(("g_l", "g_f", "g_b"), 1.0),
            tr=10 * DT,
        )


def driven(run, steps: int):
    """A repetition time is one step of the run."""
    return run.run(steps // 10 * DT, inputs=lambda i, t: jnp.sin(0.01 * i) * jnp.ones(run.model.varshape))["output"]


def activity(run, steps: int):
    return run.run(steps * DT, monitors=lambda m: m.node.x.value, sample_every=10)["output"]


def gradient(of):
    def slope(run, steps: int):
        weights = run.model.states(brainstate.ParamState)
        (slope,) = brainstate.transform.grad(lambda: jnp.mean(of(run, steps) ** 2), weights)().values()
        return u.get_magnitude(slope)

    return slope


# What is run, of what, how large, and over how many steps: brainmass keeps all that a gradient reads.
CASES = [
    *(("forward", eeg, model_of, lanes, STEPS) for lanes in (1, 1024)),
    *(("gradient in Ae", gradient(eeg), model_of, lanes, STEPS) for lanes in (1, 64)),
    ("network, diffusive", activity, functools.partial(network_of, "diffusive"), 76, STEPS),
    ("network, sigmoidal_jansen_rit", activity, functools.partial(network_of, "sigmoidal_jansen_rit"), 76, STEPS),
    ("JansenRitTR", driven, held_of, 76, STEPS),
    ("gradient in k, JansenRitTR", gradient(driven), held_of, 76, STEPS),
    ("gradient in k, diffusive", gradient(activity), functools.partial(network_of, "diffusive"), 76, STEPS // 10),
]


def compared(what: str, of, make, lanes: int, steps: int, repeats: int, compiled: bool) -> dict:
    model = make(lanes)
    both = {"brainmass": brainmass.Simulator(model, DT), "fused": bk.fuse(model, DT)}
    close(of(both["fused"], 1000), of(both["brainmass"], 1000), 1e-3)
    calls = {name: lambda run=run: of(run, steps) for name, run in both.items()}
    calls = {name: brainstate.transform.jit(f) for name, f in calls.items()} if compiled else calls
    seconds = timed(calls, repeats)
    ratio = seconds["brainmass"] / seconds["fused"]
    how = "compiled once" if compiled else "as called"
    print(f"{what}, {lanes:>5,} masses x {steps:,} steps, {how:<13}: {ratio:6.1f}x as fast", flush=True)
    return {"what": what, "how": how, "lanes": lanes, "steps": steps, "seconds": seconds, "ratio": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", default=str(RESULTS / "adapter.json"))
    options = parser.parse_args()
    results = [
        compared(*case, repeats=options.repeats, compiled=compiled) for case in CASES for compiled in (False, True)
    ]
    save(options.out, VERSIONS, results=results)


if __name__ == "__main__":
    main()
