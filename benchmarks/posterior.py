"""A posterior of Jansen-Rit, ours against NumPyro and diffrax: ``python -m benchmarks.posterior``.

Four parameters from an evoked series of 2 s, a sample each 4 ms, uniform priors, 8 chains of NUTS. Ours is
`bk.log_density` under BlackJAX. NumPyro's NUTS runs on a `lax.scan` written by hand, with `jax.checkpoint` on segments
of about sqrt(steps). Both go from the same starts, with the step size and the dense mass matrix that BlackJAX's window
adaptation found, and each is one compiled program. Gradients are those of all chains, and diffrax's `Euler` with its
default adjoint has them too. All take the same Euler steps, and must have the same log likelihood and gradient at the
same points before anything is timed, in turn: only the ratios hold. diffrax is left out where it is not installed
(``pip install diffrax``).
"""

from __future__ import annotations

import argparse
import functools
import math
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import blackjax
import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jax import lax
from numpyro.diagnostics import effective_sample_size, split_gelman_rubin

import brainmass_kernels as bk

from .timing import RESULTS, close, save

CHAINS, SECONDS, RECORDS, SIGMA = 8, 2.0, 500, 0.5
BOUNDS = {"Ae": (2.6, 9.75), "Ai": (17.6, 40.0), "be": (60.0, 150.0), "C": (60.0, 200.0)}
TRUTH = {"Ae": 3.4, "Ai": 25.0, "be": 90.0, "C": 120.0}
UNITS = {"Ae": u.mV, "Ai": u.mV, "be": u.Hz, "C": u.UNITLESS}
VERSIONS = ("jax", "llvmlite", "blackjax", "numpyro", "diffrax")
GOAL, IN_A_ROW = 20.0, 8
OURS, HAND, DIFFRAX = "bk.log_density", "scan by hand", "diffrax"


# The problem --------------------------------------------------------------------------------------------------------


def drive(steps: int) -> np.ndarray:
    """Three pulses of 50 ms on a constant, in Hz."""
    t = np.arange(steps) * SECONDS / steps
    pulses = sum(np.where((t >= at) & (t < at + 0.05), 200.0, 0.0) for at in (0.1, 0.7, 1.3))
    return (60.0 + pulses).astype(np.float32)


def run_of(steps: int) -> dict:
    return {
        "duration": steps, "dt": SECONDS / steps * u.second, "inputs": {"E_inp": drive(steps) * u.Hz},
        "every": steps // RECORDS, "scheme": "euler",
    }  # fmt: skip


@functools.cache
def data(steps: int) -> np.ndarray:
    """The series in mV, with noise of the sensor."""
    model = bk.JansenRit(**{n: x if UNITS[n].is_unitless else x * UNITS[n] for n, x in TRUTH.items()})
    series = np.asarray(bk.simulate(model, **run_of(steps))["eeg"].mantissa)
    return series + np.random.default_rng(0).normal(0.0, SIGMA, series.shape).astype(np.float32)


def density_of(steps: int):
    free = {n: tuple(x if UNITS[n].is_unitless else x * UNITS[n] for x in bounds) for n, bounds in BOUNDS.items()}
    likelihood = bk.likelihoods.Gaussian(SIGMA * u.mV)
    series = bk.TimeSeries(data(steps) * u.mV)
    return bk.log_density(bk.JansenRit(), series, free, likelihood=likelihood, transient=None, **run_of(steps))


# By hand ------------------------------------------------------------------------------------------------------------


def drift(y, values, E_inp):
    """Jansen and Rit 1995, of one mass; `E_inp` in Hz."""
    Ae, Ai, be, C, bi = *(values[n] for n in ("Ae", "Ai", "be", "C")), 50.0
    M, E, I, Mv, Ev, Iv = y

    def rate(potential):
        return 5.0 * jax.nn.sigmoid(0.56 * (potential - 6.0))

    return (
        Mv,
        Ev,
        Iv,
        Ae * be * rate(E - I) - 2.0 * be * Mv - be**2 * M,
        Ae * be * (E_inp + 0.8 * C * rate(C * M)) - 2.0 * be * Ev - be**2 * E,
        Ai * bi * 0.25 * C * rate(0.25 * C * M) - 2.0 * bi * Iv - bi**2 * I,
    )


def by_hand(steps: int, values):
    """The series ``(K,)`` by a scan in segments of about sqrt(steps), which a gradient runs again."""
    dt, every = SECONDS / steps, steps // RECORDS
    each = next(n for n in range(max(1, math.isqrt(steps) // every), RECORDS + 1) if RECORDS % n == 0)
    rows = jnp.asarray(drive(steps)).reshape(RECORDS // each, each, every)

    def step(y, E_inp):
        return tuple(a + dt * b for a, b in zip(y, drift(y, values, E_inp), strict=True)), None

    def stride(y, row):
        y, _ = lax.scan(step, y, row)
        return y, y[1] - y[2]

    segment = jax.checkpoint(lambda y, rows: lax.scan(stride, y, rows))
    return lax.scan(segment, (jnp.float32(0.0),) * 6, rows)[1].reshape(RECORDS)


def by_diffrax(steps: int, values):
    """The series ``(K,)``; time is counted in steps, so that each step has its input."""
    import diffrax

    dt, rows = SECONDS / steps, jnp.asarray(drive(steps))

    def field(t, y, values):
        return tuple(dt * x for x in drift(y, values, rows[jnp.round(t).astype(int)]))

    ts = jnp.arange(1, RECORDS + 1, dtype=jnp.float32) * (steps // RECORDS)
    found = diffrax.diffeqsolve(
        diffrax.ODETerm(field), diffrax.Euler(), 0.0, float(steps), 1.0, (jnp.float32(0.0),) * 6, values,
        saveat=diffrax.SaveAt(ts=ts), max_steps=steps,
    )  # fmt: skip
    return found.ys[1] - found.ys[2]


def likelihood_of(series: Callable, steps: int):
    """The log likelihood of one chain's values."""
    wanted = jnp.asarray(data(steps))

    def log_likelihood(values):
        constant = RECORDS * math.log(SIGMA * math.sqrt(2 * math.pi))
        return -0.5 * jnp.sum(((series(steps, values) - wanted) / SIGMA) ** 2) - constant

    return log_likelihood


def peers() -> dict[str, Callable]:
    return {HAND: by_hand} | ({DIFFRAX: by_diffrax} if find_spec("diffrax") else {})


# The same density ---------------------------------------------------------------------------------------------------


def starts(density, spread: float = 0.1):
    """Positions of the chains near the truth."""
    rng = np.random.default_rng(1)
    z = density.to_position(TRUTH)
    return {n: jnp.asarray(x + spread * rng.normal(size=CHAINS), jnp.float32) for n, x in z.items()}


def plain(density, z):
    return {n: u.get_magnitude(x) for n, x in density.to_parameters(z).items()}


def agree(density, steps: int) -> dict[str, list[float]]:
    """The log likelihood of each at the same points, once those and the gradients agree."""
    z, found = starts(density), {}
    mine = jax.jit(jax.vmap(jax.value_and_grad(density.log_likelihood)))(z)
    for name, series in peers().items():
        one = likelihood_of(series, steps)
        theirs = jax.jit(jax.vmap(jax.value_and_grad(lambda z, one=one: one(plain(density, z)))))(z)
        close(theirs[0], mine[0], 1e-4)
        for n in BOUNDS:
            close(theirs[1][n], mine[1][n], 1e-3)
        found[name] = theirs[0]
    return {n: [round(float(x), 3) for x in each] for n, each in {OURS: mine[0], **found}.items()}


def in_a_row(function: Callable, z):
    """A call of several gradients of all chains, each at a position that the one before decides, as a sampler's."""

    def one(z, _):
        value, slopes = jax.vmap(jax.value_and_grad(function))(z)
        return jax.tree.map(lambda x, slope: x + 1e-9 * slope, z, slopes), value

    return functools.partial(jax.jit(lambda z: lax.scan(one, z, length=IN_A_ROW)), z)


class Seconds(NamedTuple):
    """The least of some rounds. A busy machine takes the processor away from what runs long: its time is the fairer."""

    wall: float
    processor: float


def clocked(calls: dict[str, Callable], rounds: int) -> dict[str, Seconds]:
    """All in turn, after a call of each."""
    found: dict[str, list[Seconds]] = {name: [] for name in calls}
    for call in calls.values():
        jax.block_until_ready(call())
    for _ in range(rounds):
        for name, call in calls.items():
            wall, processor = time.perf_counter(), time.process_time()
            jax.block_until_ready(call())
            found[name].append(Seconds(time.perf_counter() - wall, time.process_time() - processor))
    return {name: Seconds(*map(min, zip(*each, strict=True))) for name, each in found.items()}


def gradients(density, steps: int, repeats: int) -> dict[str, dict[str, float]]:
    """Seconds of the log density and gradient of 8 chains, and how many times ours that is."""
    z, values, rows = starts(density), plain(density, starts(density)), {}
    calls = {OURS: in_a_row(density, z)}
    calls |= {name: in_a_row(likelihood_of(series, steps), values) for name, series in peers().items()}
    seconds = clocked(calls, repeats)
    for name, each in seconds.items():
        rows[name] = {
            "seconds": each.wall / IN_A_ROW, "processor_seconds": each.processor / IN_A_ROW,
            "times_ours": each.wall / seconds[OURS].wall,
            "processor_times_ours": each.processor / seconds[OURS].processor,
        }  # fmt: skip
        print(
            f"  gradient of {CHAINS} chains, {name}: {1e3 * rows[name]['seconds']:.3g} ms, "
            f"{rows[name]['times_ours']:.3g}x; of the processor {rows[name]['processor_times_ours']:.3g}x",
            flush=True,
        )
    return rows


# Sampling -----------------------------------------------------------------------------------------------------------


class Tuned(NamedTuple):
    """What both samplers take: where chains begin, the step size, and the inverse mass matrix in the order of names."""

    z: dict[str, jax.Array]
    step_size: float
    inverse_mass: jax.Array


def tuned(density, steps: int) -> Tuned:
    """By window adaptation of each chain, of which the means are taken."""
    adapt = blackjax.window_adaptation(blackjax.nuts, density, is_mass_matrix_diagonal=False)

    def adapted(key, z):
        found, _ = adapt.run(key, z, num_steps=steps)
        return found.state.position, found.parameters["step_size"], found.parameters["inverse_mass_matrix"]

    keys = jax.random.split(jax.random.key(0), CHAINS)
    z, step_size, inverse_mass = jax.jit(jax.vmap(adapted))(keys, starts(density))
    return Tuned(z, float(step_size.mean()), inverse_mass.mean(0))


def ours(density, setting: Tuned, draws: int):
    """A function of a key that samples: positions ``(8, n)``, and the leapfrogs of each draw."""
    nuts = blackjax.nuts(density, step_size=setting.step_size, inverse_mass_matrix=setting.inverse_mass)

    @jax.jit
    @jax.vmap
    def chain(key, z):
        def one(state, key):
            state, info = nuts.step(key, state)
            return state, (state.position, info.num_integration_steps)

        return lax.scan(one, nuts.init(z), jax.random.split(key, draws))[1]

    return lambda seed: chain(jax.random.split(jax.random.key(seed), CHAINS), setting.z)


def of_numpyro(density, series: Callable, steps: int, setting: Tuned, draws: int):
    """The same by NumPyro's NUTS, of a series by hand."""
    one = likelihood_of(series, steps)
    kernel = numpyro.infer.NUTS(
        potential_fn=lambda z: -one(plain(density, z)) - density.log_prior(z), step_size=setting.step_size,
        inverse_mass_matrix=setting.inverse_mass, adapt_step_size=False, adapt_mass_matrix=False, dense_mass=True,
    )  # fmt: skip

    def start(seed: int):
        keys = jax.random.split(jax.random.PRNGKey(seed), CHAINS)
        each = [kernel.init(keys[i], 0, {n: x[i] for n, x in setting.z.items()}, (), {}) for i in range(CHAINS)]
        return jax.tree.map(lambda *x: jnp.stack(x), *each)

    @jax.jit
    @jax.vmap
    def chain(state):
        def one(state, _):
            state = kernel.sample(state, (), {})
            return state, (state.z, state.num_steps)

        return lax.scan(one, state, length=draws)[1]

    states = {seed: start(seed) for seed in (1, 2)}
    return lambda seed: chain(states[seed])


def measured(density, runs: dict[str, Callable], rounds: int) -> dict[str, dict]:
    """Effective samples a second of each, by turns; counts and draws are those of one more run, with another key."""
    seconds, found = clocked({n: functools.partial(sample, 1) for n, sample in runs.items()}, rounds), {}
    for name, sample in runs.items():
        z, leapfrogs = sample(2)
        values = {n: np.asarray(x) for n, x in plain(density, z).items()}
        ess = min(float(effective_sample_size(x)) for x in values.values())
        # Chains run together: each waits for the longest trajectory.
        together = int(np.asarray(leapfrogs).max(0).sum())
        found[name] = {
            "seconds": seconds[name].wall, "processor_seconds": seconds[name].processor, "ess": ess,
            "ess_per_second": ess / seconds[name].wall, "ess_per_processor_second": ess / seconds[name].processor,
            "gradients": together,
            "gradients_per_draw": together / len(leapfrogs[0]), "ess_per_gradient": ess / together,
            "milliseconds_per_gradient": 1e3 * seconds[name].processor / together,
            "r_hat": max(float(split_gelman_rubin(x)) for x in values.values()),
            "mean": {n: float(x.mean()) for n, x in values.items()},
            "sd": {n: float(x.std()) for n, x in values.items()},
        }  # fmt: skip
    for name, row in found.items():
        for what in ("ess_per_second", "ess_per_processor_second"):
            row[f"ours_times_{what}"] = found[OURS][what] / row[what]
        print(
            f"  {name}: {row['ess_per_second']:.3g} effective samples/s, of the processor "
            f"{row['ess_per_processor_second']:.3g} (ours {row['ours_times_ess_per_second']:.3g}x and "
            f"{row['ours_times_ess_per_processor_second']:.3g}x); {row['ess_per_gradient']:.3g} a gradient, "
            f"{row['gradients_per_draw']:.3g} gradients a draw, {row['milliseconds_per_gradient']:.3g} ms each, "
            f"R-hat {row['r_hat']:.4f}",
            flush=True,
        )
    return found


def case(steps: int, repeats: int, warmup: int, draws: int, rounds: int) -> dict:
    print(f"{steps:,} steps of {1e3 * SECONDS / steps:g} ms", flush=True)
    density = density_of(steps)
    result = {"steps": steps, "log_likelihood": agree(density, steps)}
    result["gradient"] = gradients(density, steps, repeats)
    if draws:
        setting = tuned(density, warmup)
        runs = {OURS: ours(density, setting, draws), HAND: of_numpyro(density, by_hand, steps, setting, draws)}
        result["sampling"] = measured(density, runs, rounds)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few draws, to see that it runs; nothing is written")
    parser.add_argument("--repeats", type=int, default=20, help="of a gradient")
    parser.add_argument("--draws", type=int, default=100, help="of each chain")
    parser.add_argument("--out", default=str(RESULTS / "posterior.json"))
    asked = parser.parse_args()
    if asked.quick:
        case(1000, 1, 100, 5, 1)
        return
    missing = {} if DIFFRAX in peers() else {"left_out": f"{DIFFRAX} is not installed: pip install diffrax"}
    results = [
        case(2000, asked.repeats, 500, asked.draws, 5),
        # A draw by hand takes seconds here: the gradients tell enough.
        case(20_000, max(1, asked.repeats // 5), 0, 0, 0),
    ]
    save(asked.out, VERSIONS, chains=CHAINS, draws=asked.draws, goal=GOAL, **missing, results=results)


if __name__ == "__main__":
    main()
