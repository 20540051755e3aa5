"""Fits of one evoked series against `brainmass.Fitter` and against optax on a scan; ``python -m benchmarks.fitting``.

All fit the same four parameters of Jansen-Rit from the same 64 starts to the same 20 s, at one step and scheme, all
starts as one batch. Times count from the call, compilation included, for no kernel is kept from an earlier run; what is
measured beside a fit is taken off. Each is told by how long it takes until the best start, and until half of them, are
within a given error.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time

import brainmass
import brainstate
import braintools
import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import brainmass_kernels as bk
from brainmass_kernels import spectra

from . import reference
from .timing import RESULTS, close, save

DT, STEPS, EVERY, LANES = 1.0 * u.ms, 20_000, 5, 64
BOUNDS = {"Ae": (2.6, 9.75), "Ai": (17.6, 40.0), "be": (60.0, 150.0), "C": (60.0, 200.0)}
TRUTH = {"Ae": 3.4, "Ai": 25.0, "be": 90.0, "C": 120.0}
UNITS = {"Ae": u.mV, "Ai": u.mV, "be": u.Hz, "C": u.UNITLESS}
#: rms error over the standard deviation of the target.
WITHIN = (0.1, 0.02)
RATE = 0.05
VERSIONS = ("jax", "llvmlite", "brainmass", "brainstate", "braintools", "optax")


def drive() -> np.ndarray:
    """Pulses of 50 ms on a constant, in Hz: a stimulus every 0.7 to 1.3 s, of several strengths."""
    rng, rate = np.random.default_rng(0), np.full(STEPS, 60.0, np.float32)
    at = np.cumsum(rng.integers(700, 1300, 40))
    for begin, height in zip(at[at < STEPS - 50], rng.uniform(50.0, 250.0, 40)):
        rate[begin : begin + 50] += height
    return rate


def starts() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {n: rng.uniform(low, high, LANES).astype(np.float32) for n, (low, high) in BOUNDS.items()}


def with_units(values) -> dict:
    return {n: x if UNITS[n].is_unitless else x * UNITS[n] for n, x in values.items()}


def target() -> np.ndarray:
    """``(K,)`` in mV."""
    model = bk.JansenRit(**with_units({n: np.float32(x) for n, x in TRUTH.items()}))
    run = bk.simulate(model, STEPS, DT, inputs={"E_inp": drive() * u.Hz}, every=EVERY, scheme="exp_euler")
    return np.asarray(run["eeg"].mantissa)


def relative(mse, series) -> np.ndarray:
    return np.sqrt(np.asarray(mse, float)) / series.std()


# The fits: each returns (seconds, rms error of each start) after each step ------------------------------------------


def ours(series, steps: int, optimiser=None) -> list:
    trace, began = [], time.perf_counter()

    def follow(report):
        trace.append((time.perf_counter() - began, report.rms[0]))

    bk.fit(
        bk.JansenRit(), bk.TimeSeries(series * u.mV), BOUNDS, inputs={"E_inp": drive() * u.Hz}, starts=starts(),
        duration=STEPS, dt=DT, every=EVERY, transient=None, realisations=1, scheme="exp_euler", steps=steps,
        optimiser=optimiser, patience=steps, progress=follow,
    )  # fmt: skip
    return trace


def simulated_by_hand(values):
    """``(K, lanes)``: the same steps in a nested scan."""
    rows = jnp.asarray(drive()).reshape(-1, EVERY)

    def stride(state, row):
        def step(s, x):
            return reference.step(s, values["Ae"], values["be"], values["C"], x, 1e-3, Ai=values["Ai"]), None

        state, _ = lax.scan(step, state, row)
        return state, state[1] - state[2]

    return lax.scan(stride, reference.start(LANES), rows)[1]


def by_hand(series, budget: float) -> list:
    """`jax.grad` of the scan, Adam of optax on logits between the bounds."""
    began, initial = time.perf_counter(), starts()
    z = {n: jax.scipy.special.logit((initial[n] - low) / (high - low)) for n, (low, high) in BOUNDS.items()}
    optimiser = optax.adam(RATE)
    state, trace, wanted = optimiser.init(z), [], jnp.asarray(series)[:, None]

    def loss(z):
        values = {n: low + (high - low) * jax.nn.sigmoid(z[n]) for n, (low, high) in BOUNDS.items()}
        mse = jnp.mean((simulated_by_hand(values) - wanted) ** 2, 0)
        return jnp.sum(mse), mse

    @jax.jit
    def advance(z, state):
        slopes, mse = jax.grad(loss, has_aux=True)(z)
        updates, state = optimiser.update(slopes, state)
        return optax.apply_updates(z, updates), state, mse

    while not trace or trace[-1][0] < budget:
        z, state, mse = advance(z, state)
        trace.append((time.perf_counter() - began, relative(mse, series)))
    return trace


def brainmass_model():
    params = {
        n: brainstate.nn.Param(x, t=brainstate.nn.SigmoidT(*(with_units({n: edge})[n] for edge in BOUNDS[n])))
        for n, x in with_units({n: jnp.asarray(x) for n, x in starts().items()}).items()
    }
    return brainmass.JansenRitStep(LANES, **params)


def brainmass_eeg(model):
    rows = jnp.asarray(drive())
    run = brainmass.Simulator(model, DT).run(STEPS * DT, inputs=lambda i, t: (0.0 * u.mV, rows[i] * u.Hz, 0.0 * u.mV))
    # Its sample_every takes the first step of each five, and ours the last.
    return (run["output"] / u.mV)[EVERY - 1 :: EVERY]


def of_brainmass(series, budget: float) -> list:
    """`brainmass.Fitter` with Adam, its starts as one batch; the error of each start is measured beside it."""
    wanted, model, trace, beside = jnp.asarray(series)[:, None], brainmass_model(), [], 0.0

    def loss(model):
        return jnp.sum(jnp.mean((brainmass_eeg(model) - wanted) ** 2, 0)), None

    @brainstate.transform.jit
    def each():
        return jnp.mean((brainmass_eeg(model) - wanted) ** 2, 0)

    each()
    began = time.perf_counter()

    def follow(info):
        nonlocal beside
        now = time.perf_counter()
        trace.append((now - began - beside, relative(each(), series)))
        beside += time.perf_counter() - now
        return trace[-1][0] > budget

    fitter = brainmass.Fitter(model, braintools.optim.Adam(lr=RATE), loss_fn=loss, callbacks=[follow])
    fitter.fit(n_steps=100_000)
    return trace


# The comparison -----------------------------------------------------------------------------------------------------


def agree(series) -> None:
    """All simulate the same from the starts, before anything is fitted."""
    model = bk.JansenRit(**with_units(starts()))
    run = bk.simulate(model, STEPS, DT, inputs={"E_inp": drive() * u.Hz}, every=EVERY, scheme="exp_euler")
    mine = run["eeg"].mantissa[:400]
    close(jax.jit(simulated_by_hand)({n: jnp.asarray(x) for n, x in starts().items()})[:400], mine, 1e-3)
    close(brainmass_eeg(brainmass_model())[:400], mine, 1e-3)


def until(trace, within: float, share: float) -> float | None:
    """Seconds until this share of the starts (0, the best one) has been within an error."""
    best = np.fmin.accumulate(np.stack([rms for _, rms in trace]), 0)
    reached = np.sum(best < within, 1) >= max(1, share * best.shape[1])
    return float(trace[int(reached.argmax())][0]) if reached.any() else None


def of_many_spectra(count: int, steps: int) -> None:
    """The time and the largest memory of one fit of many spectra, each from as many starts."""
    rng, meg = np.random.default_rng(0), spectra.resting_meg()
    power = meg.power[0] * 10 ** rng.normal(0.0, 0.1, (count, len(meg.freqs)))
    began = time.perf_counter()
    bk.fit(
        bk.JansenRit(), (meg.freqs, power), {"be": (60.0, 150.0), "bi": (30.0, 80.0), "C": (80.0, 300.0)},
        inputs={"E_inp": 220 * u.Hz}, noise={"E_inp": 2 * u.Hz * u.second**0.5}, starts=LANES, steps=steps,
    )  # fmt: skip
    seconds, peak = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{count} spectra x {LANES} starts: {steps} steps in {seconds:.0f} s, at most {peak:.2f} GiB in all")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=180.0, help="seconds for each of those compared with")
    parser.add_argument("--out", default=str(RESULTS / "fitting.json"))
    parser.add_argument("--spectra", type=int, help="instead, the time and memory of a fit of so many spectra")
    parser.add_argument("--steps", type=int, default=1, help="of that fit")
    options = parser.parse_args()
    if options.spectra:
        return of_many_spectra(options.spectra, options.steps)
    series = target()
    agree(series)
    fits = {
        "bk.fit, levenberg_marquardt": lambda: ours(series, 40, "levenberg_marquardt"),
        "bk.fit, Adam": lambda: ours(series, 200),
        "jax.grad of a scan, optax.adam": lambda: by_hand(series, options.budget),
        "brainmass.Fitter, Adam": lambda: of_brainmass(series, options.budget),
    }
    results = {}
    for name, fit in fits.items():
        with tempfile.TemporaryDirectory() as empty:
            os.environ["BRAINMASS_KERNELS_CACHE"] = empty
            trace = fit()
        best = np.fmin.accumulate(np.stack([rms for _, rms in trace]), 0)
        row = {
            "steps": len(trace),
            "seconds": trace[-1][0],
            "first step": trace[0][0],
            "best rms": float(np.nanmin(best[-1])),
            "median rms": float(np.nanmedian(best[-1])),
            **{f"best within {w}": until(trace, w, 0.0) for w in WITHIN},
            **{f"half within {w}": until(trace, w, 0.5) for w in WITHIN},
            "trace": [[round(t, 3), float(np.nanmin(b)), float(np.nanmedian(b))] for (t, _), b in zip(trace, best)],
        }
        results[name] = row
        said = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items() if k != "trace")
        print(f"{name:<32} {said}", flush=True)
    save(options.out, VERSIONS, **{"lanes": LANES, "steps of a run": STEPS, "truth": TRUTH, "results": results})


if __name__ == "__main__":
    main()
