"""One large network that threads share: ``python -m benchmarks.network_threads``.

Jansen-Rit, all regions connected with delays of 1 to 200 steps or a fifth of them, the mean of each region; forward,
and the gradient of the sum of its squares in the strength. One thread and two in turn, the least of the rounds. The
bits of both must be the same first.
"""

from __future__ import annotations

import functools
import os

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np

import brainmass_kernels as bk

from .timing import options, save, timed

STEPS, THREADS, GOAL = 5000, (1, 2), 1.7
SIZES = [(500, 1.0), (500, 0.2), (1000, 1.0), (1000, 0.2)]
VERSIONS = ("jax", "jaxlib", "llvmlite")


def prepared(regions: int, density: float, steps: int):
    """A run and a gradient, functions of the strength, not yet compiled."""
    rng = np.random.default_rng(0)
    connected = rng.random((regions, regions)) < density
    weights = (connected * rng.random((regions, regions)) / regions).astype(np.float32)
    delays = rng.integers(1, 201, (regions, regions)) * 0.1 * u.ms
    network = bk.Network(bk.JansenRit(), weights, source="eeg", target="E_inp", delays=delays, k=1 * u.Hz / u.mV)

    def run(k):
        about = {"inputs": {"E_inp": 120 * u.Hz}, "record": bk.Mean(), "implementation": "numba"}
        return bk.simulate(network.replace(k=k * u.Hz / u.mV), steps, 0.1 * u.ms, **about)["eeg_mean"].mantissa

    return {"forward": run, "gradient in k": jax.grad(lambda k: jnp.sum(run(k) ** 2))}


def compiled(function, threads: int):
    """With so many threads, which a program knows from when it is traced."""
    jax.clear_caches()
    before = os.environ.get("NUMBA_NUM_THREADS")
    os.environ["NUMBA_NUM_THREADS"] = str(threads)
    try:
        return jax.jit(lambda k: function(k)).lower(1.0).compile()
    finally:
        del os.environ["NUMBA_NUM_THREADS"]
        if before is not None:
            os.environ["NUMBA_NUM_THREADS"] = before


def compared(regions: int, density: float, steps: int, repeats: int) -> list[dict]:
    results = []
    for what, function in prepared(regions, density, steps).items():
        by_threads = {str(n): functools.partial(compiled(function, n), jnp.float32(50.0)) for n in THREADS}
        one, two = (np.asarray(run()) for run in by_threads.values())
        if one.tobytes() != two.tobytes():
            raise SystemExit(f"{what}, {regions} regions: bits depend on the number of threads")
        seconds = timed(by_threads, repeats, least=True)
        ratio = seconds["1"] / seconds["2"]
        print(f"{regions} regions, {density:.0%} connected, {what}: {ratio:.2f} times as fast on 2 threads", flush=True)
        results.append({
            "what": what, "regions": regions, "connected": density, "steps": steps, "goal": GOAL,
            "microseconds_a_step": {n: round(each / steps * 1e6, 2) for n, each in seconds.items()},
            "ratio": round(ratio, 2),
        })  # fmt: skip
    return results


def main() -> None:
    asked = options(__doc__, "network_threads", "one small network", 7)
    if asked.quick:
        compared(200, 1.0, 100, 1)
        return
    began = os.getloadavg()[0]
    results = [each for size in SIZES for each in compared(*size, STEPS, asked.repeats)]
    load = [round(x, 1) for x in (began, os.getloadavg()[0])]
    save(asked.out, VERSIONS, load_before_and_after=load, rounds=asked.repeats, results=results)


if __name__ == "__main__":
    main()
