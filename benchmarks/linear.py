"""A linear spectrum beside that of simulations: ``python -m benchmarks.linear``.

Jansen-Rit at 60 Hz with weak noise, 16 masses, 2 to 40 Hz, float32. A simulation is that of a fit by default: four
realisations of 9 s in steps of 1 ms, Welch's spectra of windows of 2 s. A gradient is of the mean log power in each
mass's ``be``. All run in turn, and the least of the rounds is kept: only the ratios hold. The sampling error of the
simulations is measured, and from it how many of them a density that is good to 1 % would take.
"""

from __future__ import annotations

import functools

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np

import brainmass_kernels as bk

from .networks import first_that_runs
from .timing import options, save, timed

MASSES, REALISATIONS, EVERY = 16, 4, 5
FREQS = np.arange(2.0, 40.1, 0.5)
DRIVE = 60.0 * u.Hz
NOISE = {"E_inp": 2.0 * u.Hz * u.second**0.5}
VERSIONS = ("jax", "llvmlite")


def linear(be):
    return bk.linear_spectrum(bk.JansenRit(be=be * u.Hz), FREQS, inputs={"E_inp": DRIVE}, noise=NOISE).mantissa


def simulated(be, seed: int = 0, seconds: int = 9, implementation: str | None = None):
    """Means over realisations, ``(F, masses)``."""
    be = jnp.broadcast_to(be[:, None], (len(be), REALISATIONS))
    run = bk.simulate(
        bk.JansenRit(be=be * u.Hz), seconds * u.second, 1.0 * u.ms, inputs={"E_inp": DRIVE}, noise=NOISE,
        key=jax.random.key(seed), every=EVERY, transient=1.0 * u.second, implementation=implementation,
    )  # fmt: skip
    freqs, power = run.psd(segment=2.0 * u.second)
    places = np.searchsorted(np.asarray(freqs.mantissa), FREQS - 1e-6)
    return power.mantissa[places].mean(-1)


def slope(of, be):
    return jax.grad(lambda be: jnp.mean(jnp.log(of(be))))(be)


def main() -> None:
    asked = options(__doc__, "linear", "short runs", 9)
    seconds, be = (2 if asked.quick else 9), jnp.linspace(85.0, 115.0, MASSES, dtype=jnp.float32)
    fastest = first_that_runs()
    run = functools.partial(simulated, seconds=max(seconds, 4))
    expected = np.asarray(linear(be))
    error = np.asarray(run(be, implementation=fastest)) / expected - 1
    spread, off = float(error.std()), float(error.mean())
    if not abs(off) < 4 * spread / np.sqrt(error.size / 2):
        raise SystemExit(f"the spectra disagree by {off:.2g} on average: no speed is reported")
    ways = {"linear": linear, "simulated": functools.partial(run, implementation=fastest)}
    ways |= {"simulated by scan": functools.partial(run, implementation="scan")}
    results = []
    for what, make in (("spectrum", lambda of: of), ("gradient", lambda of: functools.partial(slope, of))):
        calls = {name: functools.partial(jax.jit(make(of)), be) for name, of in ways.items()}
        took = timed(calls, 1 if asked.quick else asked.repeats, least=True)
        for name in ("simulated", "simulated by scan"):
            ratio, as_good = took[name] / took["linear"], (spread / 0.01) ** 2
            print(f"{what}, {name}: {ratio:.3g} times linear, and {ratio * as_good:.3g} times where good to 1 %")
            results.append({"what": what, "beside": name, "ratio": float(f"{ratio:.3g}"),
                            "ratio at 1 %": float(f"{ratio * as_good:.3g}"),
                            "linear_ms": float(f"{1e3 * took['linear']:.3g}")})  # fmt: skip
    if asked.quick:
        return
    save(asked.out, VERSIONS, implementation=fastest, masses=MASSES, sampling_error=round(spread, 3), results=results)


if __name__ == "__main__":
    main()
