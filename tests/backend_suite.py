"""The suite that every implementation inherits, and the float64 reference that it is held against.

The reference is Jansen-Rit and the seven schemes written out in plain numpy, apart from the package; its gradient is
`jax.grad` through a plain `lax.scan` of the same lines. Only the noise is drawn from the package (tests/test_noise.py
holds that against a Threefry of its own).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import brainmass_kernels as bk
from brainmass_kernels import noise

STATES = ("M", "E", "I", "Mv", "Ev", "Iv")
PARAMETER_UNITS = {"Ae": u.mV, "Ai": u.mV, "be": u.Hz, "bi": u.Hz, "C": u.UNITLESS, "s_max": u.Hz, "v0": u.mV}
INPUT_UNITS = {"M_inp": u.mV, "E_inp": u.Hz, "I_inp": u.mV}
STATE_UNITS = {**dict.fromkeys(STATES[:3], u.mV), **dict.fromkeys(STATES[3:], u.mV / u.second)}
DEFAULTS = {"Ae": 3.25, "Ai": 22.0, "be": 100.0, "bi": 50.0, "C": 135.0, "s_max": 5.0, "v0": 6.0}
NOISE_UNIT = u.Hz * u.second**0.5
KEY_SEED = 7


# The reference ------------------------------------------------------------------------------------------------------


def drives(lib, s, p, i):
    """Drive, gain and rate constant of the three blocks."""
    M, E, I = s[:3]

    def rate(potential):
        return p["s_max"] / (1.0 + lib.exp(0.56 * (p["v0"] - potential)))

    return (
        (rate(E - I + i["M_inp"]), p["Ae"], p["be"]),
        (i["E_inp"] + 0.8 * p["C"] * rate(p["C"] * M), p["Ae"], p["be"]),
        (0.25 * p["C"] * rate(0.25 * p["C"] * M + i["I_inp"]), p["Ai"], p["bi"]),
    )


def rates(lib, s, p, i):
    return s[3:] + tuple(
        A * a * drive - 2 * a * v - a * a * x for x, v, (drive, A, a) in zip(s[:3], s[3:], drives(lib, s, p, i))
    )


def moved(s, by, h):
    return tuple(x + h * k for x, k in zip(s, by))


def flow(lib, s, centres, p, h):
    """The critically damped oscillation of every block around its centre, in closed form."""
    positions, velocities = [], []
    for x, v, centre, a in zip(s[:3], s[3:], centres, (p["be"], p["be"], p["bi"])):
        decay, y = lib.exp(-a * h), x - centre
        positions.append(centre + decay * ((1 + a * h) * y + h * v))
        velocities.append(decay * ((1 - a * h) * v - a * a * h * y))
    return (*positions, *velocities)


def euler(lib, s, p, i, h):
    return moved(s, rates(lib, s, p, i), h)


def exp_euler(lib, s, p, i, h):
    k = rates(lib, s, p, i)
    grown = [v + lib.expm1(-2 * a * h) / (-2 * a) * r for v, r, a in zip(s[3:], k[3:], (p["be"], p["be"], p["bi"]))]
    return (*moved(s[:3], k[:3], h), *grown)


def symplectic_euler(lib, s, p, i, h):
    velocities = moved(s[3:], rates(lib, s, p, i)[3:], h)
    return (*moved(s[:3], velocities, h), *velocities)


def exact(lib, s, p, i, h):
    return flow(lib, s, [A / a * drive for drive, A, a in drives(lib, s, p, i)], p, h)


def strang(lib, s, p, i, h):
    half = flow(lib, s, (0.0, 0.0, 0.0), p, h / 2)
    kicks = [A * a * drive for drive, A, a in drives(lib, half, p, i)]
    return flow(lib, (*half[:3], *moved(half[3:], kicks, h)), (0.0, 0.0, 0.0), p, h / 2)


def heun(lib, s, p, i, h):
    k1 = rates(lib, s, p, i)
    k2 = rates(lib, moved(s, k1, h), p, i)
    return tuple(x + h / 2 * (a + b) for x, a, b in zip(s, k1, k2))


def rk4(lib, s, p, i, h):
    k1 = rates(lib, s, p, i)
    k2 = rates(lib, moved(s, k1, h / 2), p, i)
    k3 = rates(lib, moved(s, k2, h / 2), p, i)
    k4 = rates(lib, moved(s, k3, h), p, i)
    return tuple(x + h / 6 * (a + 2 * b + 2 * c + d) for x, a, b, c, d in zip(s, k1, k2, k3, k4))


REFERENCE_SCHEMES = {f.__name__: f for f in (euler, exp_euler, symplectic_euler, exact, strang, heun, rk4)}


def reference(lib, case: Case, theta):
    """Records and final states of a case in float64, by name; ``lib`` is numpy, or jax.numpy for gradients."""
    step, h, zeros = REFERENCE_SCHEMES[case.scheme], case.dt, np.zeros(case.lanes)
    p = {**DEFAULTS, **theta["parameters"]}
    rows = {"M_inp": 0.0, "E_inp": 0.0, "I_inp": 0.0, **theta["inputs"]}
    rows = {n: _each_step(lib, x, case) for n, x in rows.items()}
    if case.noisy:
        rows["E_inp"] = rows["E_inp"] + theta["sigma"] / np.sqrt(h) * case.normals()
    state = tuple(lib.asarray(theta["initial"].get(n, 0.0)) + zeros for n in STATES)
    if lib is np:
        seen = []
        for n in range(case.steps):
            state = step(np, state, p, {name: x[n] for name, x in rows.items()}, h)
            seen.append(state)
        seen = tuple(np.array(x) for x in zip(*seen))
    else:

        def body(s, i):
            s = step(jnp, s, p, i, h)
            return s, s

        state, seen = lax.scan(body, state, rows)
    taken = case.lead + case.every * np.arange(1, case.count + 1) - 1
    seen = {"eeg": (seen[1] - seen[2])[taken], **{n: x[taken] for n, x in zip(STATES, seen)}}
    return seen, dict(zip(STATES, state))


def _each_step(lib, x, case: Case):
    x = lib.asarray(x)
    if case.kind == "rows" and x.shape == (case.steps,):
        x = x[:, None]
    return lib.broadcast_to(x, (case.steps, case.lanes))


# The cases ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """One run: how big, on which schedule, and how its extrinsic drive is given.

    ``kind`` is "constant" (one value a lane), "rows" (one a step) or "lane rows" (one a step and lane).
    """

    lanes: int = 8
    steps: int = 40
    lead: int = 0
    every: int = 1
    checkpoint: int | None = None
    scheme: str = "strang"
    kind: str = "constant"
    noisy: bool = False
    dt: float = 5e-4

    @property
    def count(self) -> int:
        return (self.steps - self.lead) // self.every

    @property
    def key(self):
        return jax.random.key(KEY_SEED)

    def normals(self) -> np.ndarray:
        return drawn_normals(self.lanes, self.steps)

    def theta(self) -> dict:
        """Everything differentiable, as float64 numbers that float32 holds exactly."""
        rng = np.random.default_rng([self.lanes, self.steps, len(self.kind)])
        shape = {"constant": (self.lanes,), "rows": (self.steps,), "lane rows": (self.steps, self.lanes)}[self.kind]
        L = self.lanes
        theta = {
            "parameters": {
                "Ae": rng.uniform(2.8, 4.0, L), "be": rng.uniform(80.0, 120.0, L), "Ai": rng.uniform(18.0, 24.0, L),
                "bi": 50.0, "C": 135.0, "s_max": 5.0, "v0": 6.0,
            },
            "inputs": {"M_inp": rng.uniform(-1.0, 1.0, L), "E_inp": rng.uniform(120.0, 240.0, shape), "I_inp": 0.5},
            "initial": {
                "M": rng.uniform(0.0, 0.2, L), "E": rng.uniform(0.0, 20.0, L), "I": rng.uniform(0.0, 10.0, L),
                "Mv": rng.uniform(-5.0, 5.0, L), "Ev": rng.uniform(-200.0, 200.0, L), "Iv": 30.0,
            },
            "sigma": 2.5,
        }  # fmt: skip
        if not self.noisy:
            del theta["sigma"]
        return jax.tree.map(lambda x: np.float64(np.float32(x)), theta)

    def weights(self) -> dict:
        """Of the loss: on every record and every final state."""
        rng = np.random.default_rng(3)
        drawn = {"eeg": rng.uniform(0.5, 1.5, (self.count, self.lanes)) / max(1, self.count)}
        for n in STATES:
            drawn[n] = rng.uniform(0.5, 1.5, self.lanes) / (1.0 if n in STATES[:3] else 100.0)
        return jax.tree.map(lambda x: np.float64(np.float32(x)), drawn)


@functools.lru_cache
def drawn_normals(lanes: int, steps: int) -> np.ndarray:
    """The package's own normals ``(steps, lanes)`` of the key of every case."""
    with jax.ensure_compile_time_eval(), jax.enable_x64(False):
        seeds = jax.jit(noise.lane_seeds, static_argnums=1)(jax.random.key(KEY_SEED), (lanes,))
        made = jax.jit(jax.vmap(lambda n: noise.normals(seeds, n, 1)[0]))(jnp.arange(steps, dtype=jnp.int32))
        return np.asarray(made, np.float64)


def weighed(weights, records, final):
    return jnp.sum(weights["eeg"] * records["eeg"]) + sum(jnp.sum(weights[n] * final[n]) for n in STATES)


@functools.lru_cache
def expected(case: Case):
    """Records and final states of the reference."""
    return reference(np, case, case.theta())


@functools.lru_cache
def expected_gradient(case: Case):
    """Gradient of the weighed reference, by JAX through a plain scan in float64."""
    if case.noisy:
        case.normals()  # outside of the trace
    with jax.enable_x64(True):
        loss = jax.jit(jax.grad(lambda theta: weighed(case.weights(), *reference(jnp, case, theta))))
        return jax.tree.map(np.asarray, loss(case.theta()))


def off(got, want) -> float:
    """Distance relative to the norm of what is wanted."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, f"shape {got.shape}, wanted {want.shape}"
    size = np.linalg.norm(want)
    return float(np.linalg.norm(got - want) / (size if size else 1.0))


def assert_close(got, want, tolerance: float):
    """Hold every leaf to the tolerance, and name the leaves that miss it."""
    errors = jax.tree_util.tree_map_with_path(
        lambda path, g, w: (jax.tree_util.keystr(path), off(g, w)), dict(got), dict(want)
    )
    missed = [e for e in jax.tree.leaves(errors, is_leaf=lambda x: isinstance(x, tuple)) if not e[1] <= tolerance]
    assert not missed, f"relative errors above {tolerance}: {missed}"


def magnitudes(quantities) -> dict:
    """Records or final states as plain arrays."""
    return {n: x / {"eeg": u.mV, **STATE_UNITS}[n] for n, x in quantities.items()}


def count(operation: str, text: str) -> int:
    """How many of an operation there are in a compiled program."""
    return len(re.findall(rf"\b{operation}\(", text))


# The suite ----------------------------------------------------------------------------------------------------------

SCHEDULES = {
    "checkpoint does not divide T": Case(steps=17, checkpoint=5),
    "transient and every do not divide T": Case(steps=23, lead=3, every=4, checkpoint=7),
    "every beyond the checkpoint": Case(steps=31, lead=7, every=9, checkpoint=4),
    "all transient": Case(steps=12, lead=12, checkpoint=4),
    "one record": Case(steps=16, every=16, checkpoint=4),
    "one step": Case(steps=1),
    "a checkpoint each step": Case(steps=9, every=2, checkpoint=1),
    "a checkpoint beyond T": Case(steps=9, every=2, checkpoint=50),
}
QUICK = {"transient and every do not divide T", "every beyond the checkpoint", "all transient"}
INPUTS = {kind: Case(steps=30, lead=4, every=3, checkpoint=7, kind=kind) for kind in ("constant", "rows", "lane rows")}


def slow_but(quick, every) -> list:
    """Parameters of which all but the quick ones are marked slow: compiling takes seconds each."""
    return [x if x in quick else pytest.param(x, marks=pytest.mark.slow) for x in every]


class BackendSuite:
    """What an implementation keeps.

    Attributes
    ----------
    implementation : the name asked for, or ``None``
    runs : the implementation that must then run
    native_autodiff : whether JAX differentiates it itself, in forward mode too
    float64 : whether it takes float64
    context : in which everything runs, such as `bk.testing.interpret`
    loop : what a time loop is in XLA's text
    accuracy : the case of the contract on accuracy
    batches : edges of the number of lanes
    long : tests that are marked slow, as they take long here
    bounded : two lengths of run between which the memory of a gradient may not grow like time; ``None`` where buffers
        are those of an interpreter or of a device
    """

    implementation: str | None = None
    runs: str
    native_autodiff = False
    float64 = True
    context = staticmethod(contextlib.nullcontext)
    loop = "while"
    accuracy = Case(steps=1000, every=10, lanes=8)
    batches = (1, 127, 129, 1000)
    long: tuple[str, ...] = ()
    bounded: tuple[int, int] | None = (1000, 16000)

    @pytest.fixture(autouse=True)
    def _context(self):
        with self.context():
            yield

    # How to run a case ----------------------------------------------------------------------------------------------

    def arguments(self, case: Case, theta) -> dict:
        parameters = {n: u.Quantity(x, unit=PARAMETER_UNITS[n]) for n, x in theta["parameters"].items()}
        more = {"noise": {"E_inp": theta["sigma"] * NOISE_UNIT}, "key": case.key} if case.noisy else {}
        return {
            "model": bk.JansenRit(**{n: x.mantissa if n == "C" else x for n, x in parameters.items()}),
            "duration": case.steps,
            "dt": case.dt * u.second,
            "inputs": {n: x * INPUT_UNITS[n] for n, x in theta["inputs"].items()},
            "initial": {n: x * STATE_UNITS[n] for n, x in theta["initial"].items()},
            "every": case.every,
            "transient": case.lead,
            "scheme": case.scheme,
            "checkpoint_every": case.checkpoint,
            "implementation": self.implementation,
            **more,
        }

    def simulate(self, case: Case, theta, **more):
        return bk.simulate(**{**self.arguments(case, theta), **more})

    def loss(self, case: Case, theta, **more):
        res = self.simulate(case, theta, **more)
        weights = jax.tree.map(lambda x: jnp.asarray(x, res["eeg"].dtype), case.weights())
        return weighed(weights, magnitudes(res.records), magnitudes(res.final))

    def single(self, case: Case):
        return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), case.theta())

    def check(self, case: Case, state=1e-5, gradient=1e-4):
        def loss(theta):
            res = self.simulate(case, theta)
            weights = jax.tree.map(lambda x: jnp.asarray(x, res["eeg"].dtype), case.weights())
            return weighed(weights, magnitudes(res.records), magnitudes(res.final)), res

        grad, res = jax.jit(jax.grad(loss, has_aux=True))(self.single(case))
        records, final = expected(case)
        assert res["eeg"].dtype == jnp.float32
        assert_close({"eeg": res["eeg"] / u.mV}, {"eeg": records["eeg"]}, state)
        assert_close(magnitudes(res.final), final, state)
        assert_close(grad, expected_gradient(case), gradient)

    # Which one runs -------------------------------------------------------------------------------------------------

    def test_that_it_runs(self):
        plan = bk.explain(**self.arguments(Case(), self.single(Case())))
        assert plan.implementation == self.runs
        assert self.runs in str(plan)

    # Forward and gradient -------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("scheme", slow_but({"strang", "exp_euler"}, REFERENCE_SCHEMES))
    def test_accuracy_of_the_state(self, scheme):
        """The contract: every state, over the run, by its norm."""
        # 0.1 ms keeps every scheme stable, and is where rounding gathers most.
        case = dataclasses.replace(self.accuracy, scheme=scheme, dt=1e-4)
        res = self.simulate(case, self.single(case), record=("eeg", *STATES))
        assert_close(magnitudes(res.records), expected(case)[0], 1e-5)

    @pytest.mark.parametrize("scheme", slow_but({"strang"}, ["strang", "exp_euler", "heun"]))
    def test_accuracy_of_the_gradient(self, scheme):
        case = dataclasses.replace(self.accuracy, scheme=scheme, dt=1e-4)
        grad = jax.jit(jax.grad(functools.partial(self.loss, case)))(self.single(case))
        assert_close(grad, expected_gradient(case), 1e-4)

    @pytest.mark.where(lambda suite: suite.float64)
    def test_float64(self, x64):
        case = dataclasses.replace(self.accuracy, steps=200)
        res = self.simulate(case, case.theta())
        records, final = expected(case)
        assert res["eeg"].dtype == jnp.float64
        assert_close({"eeg": res["eeg"] / u.mV, **magnitudes(res.final)}, {"eeg": records["eeg"], **final}, 1e-11)
        grad = jax.jit(jax.grad(functools.partial(self.loss, case)))(case.theta())
        assert_close(grad, expected_gradient(case), 1e-10)

    # Edges ----------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("at", slow_but({0, 2}, range(4)))
    def test_batches(self, at):
        self.check(Case(lanes=self.batches[at], steps=19, lead=2, every=3, checkpoint=5))

    @pytest.mark.parametrize("name", slow_but(QUICK, SCHEDULES))
    def test_schedules(self, name):
        self.check(SCHEDULES[name])

    @pytest.mark.parametrize("kind", slow_but({"rows", "lane rows"}, INPUTS))
    def test_inputs(self, kind):
        self.check(INPUTS[kind])

    @pytest.mark.parametrize("kind", slow_but({"lane rows"}, ["constant", "lane rows"]))
    def test_noise(self, kind):
        self.check(dataclasses.replace(INPUTS[kind], noisy=True))

    def test_batch_of_two_axes(self):
        """A (2, 4) batch by broadcasting is the flat batch of 8, in C order."""
        case = INPUTS["lane rows"]
        theta = self.single(case)
        flat = self.simulate(case, theta)
        folded = jax.tree.map(lambda x: x.reshape(*x.shape[:-1], 2, 4) if x.ndim else x, theta)
        res = self.simulate(case, folded)
        assert res["eeg"].shape == (case.count, 2, 4)
        assert res.final["Iv"].shape == (2, 4)
        np.testing.assert_array_equal(res["eeg"].mantissa.reshape(case.count, 8), flat["eeg"].mantissa)

    def test_broadcasting(self):
        """Parameters (2, 1) with inputs (T, 4) make a batch of (2, 4), and each gradient has its argument's shape."""
        case = Case(steps=12, checkpoint=4)
        Ae, rows = jnp.asarray([[3.0], [3.5]]), jnp.linspace(100.0, 240.0, 48).reshape(12, 4)

        def loss(Ae, rows):
            res = bk.simulate(
                bk.JansenRit(Ae=Ae * u.mV), case.steps, 1e-3 * u.second,
                inputs={"E_inp": rows * u.Hz}, implementation=self.implementation,
            )  # fmt: skip
            assert res["eeg"].shape == (12, 2, 4)
            return jnp.sum(res["eeg"].mantissa ** 2)

        def alone(Ae, rows):
            return sum(loss_of_one(Ae[i, 0], rows[:, j]) for i in range(2) for j in range(4))

        def loss_of_one(Ae, row):
            p = {**DEFAULTS, "Ae": Ae}
            _, seen = lax.scan(
                lambda s, e: (lambda s: (s, s[1] - s[2]))(
                    strang(jnp, s, p, {"M_inp": 0.0, "E_inp": e, "I_inp": 0.0}, 1e-3)
                ),
                (jnp.zeros(()),) * 6,
                row,
            )
            return jnp.sum(seen**2)

        got = jax.jit(jax.grad(loss, (0, 1)))(Ae, rows)
        with jax.enable_x64(True):
            want = jax.jit(jax.grad(alone, (0, 1)))(np.float64(Ae), np.float64(rows))
        for g, w in zip(got, want):
            assert off(g, w) < 1e-4

    # Units ----------------------------------------------------------------------------------------------------------

    def test_units(self):
        case = Case(steps=20, lead=4, every=5)
        theta = self.single(case)
        res = self.simulate(case, theta)
        assert res["eeg"].unit == u.mV
        assert {n: x.unit for n, x in res.final.items()} == STATE_UNITS
        np.testing.assert_allclose(np.asarray(res.ts / u.second), (4 + 5 * np.arange(1, 4)) * case.dt, rtol=1e-6)
        volts = self.arguments(case, theta)
        volts["model"] = dataclasses.replace(
            volts["model"], Ae=theta["parameters"]["Ae"] / 1000 * u.volt, be=theta["parameters"]["be"] / 1000 / u.ms
        )
        volts["inputs"] |= {"E_inp": theta["inputs"]["E_inp"] / 1000 * u.kHz}
        volts |= {"dt": case.dt * 1e6 * u.us, "duration": case.steps * case.dt * u.second}
        assert off(bk.simulate(**volts)["eeg"] / u.mV, res["eeg"] / u.mV) < 1e-5

    # Noise ----------------------------------------------------------------------------------------------------------

    def test_noise_is_the_reference_noise(self):
        """The normals reach the drive of every step: with all else zero, E is the noise through its own block."""
        case = Case(lanes=5, steps=25, noisy=True, scheme="euler", dt=1e-3)
        zero = {"parameters": {"C": 0.0}, "inputs": {"E_inp": np.zeros(5)}, "initial": {}, "sigma": 2.0}
        res = self.simulate(case, jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), zero), record=("E",))
        E, Ev, normals, seen = np.zeros(5), np.zeros(5), case.normals(), np.asarray(res["E"].mantissa)
        for n in range(25):
            drive = 2.0 / np.sqrt(1e-3) * normals[n]
            E, Ev = E + 1e-3 * Ev, Ev + 1e-3 * (325.0 * drive - 200.0 * Ev - 1e4 * E)
            assert off(seen[n], E) < 1e-5

    def test_noise_does_not_know_the_batch(self):
        """Lanes that have a key each draw the same in any batch, bit for bit."""
        case = dataclasses.replace(Case(lanes=7, steps=20), noisy=True)
        theta, keys = self.single(case), jax.random.split(jax.random.key(1), 7)
        whole = self.simulate(case, theta, key=keys)["eeg"].mantissa
        for part in (slice(0, 1), slice(1, 4), slice(4, 7)):
            cut = jax.tree.map(lambda x, part=part: x[part] if x.ndim else x, theta)
            some = self.simulate(case, cut, key=keys[part])["eeg"].mantissa
            np.testing.assert_array_equal(some, whole[:, part])

    def test_noise_does_not_know_the_schedule(self):
        case = dataclasses.replace(Case(steps=24), noisy=True)
        theta = self.single(case)
        often = self.simulate(case, theta)["eeg"].mantissa
        seldom = self.simulate(dataclasses.replace(case, lead=4, every=5, checkpoint=3), theta)["eeg"].mantissa
        np.testing.assert_array_equal(seldom, often[8::5])

    def test_noise_of_two_inputs(self):
        """Each noisy input has a stream of its own, whatever the order of the names."""
        case = Case(steps=20)
        theta = self.single(case)
        sigmas = {"M_inp": 0.1 * u.mV * u.second**0.5, "E_inp": 2.0 * NOISE_UNIT, "I_inp": 0.2 * u.mV * u.second**0.5}
        runs = [
            self.simulate(case, theta, noise=dict(items), key=case.key)["eeg"].mantissa
            for items in (sigmas.items(), reversed(sigmas.items()))
        ]
        np.testing.assert_array_equal(*runs)
        single = self.simulate(case, theta, noise={"E_inp": sigmas["E_inp"]}, key=case.key)["eeg"].mantissa
        assert off(single, runs[0]) > 1e-4

    # Transformations ------------------------------------------------------------------------------------------------

    def _of_lane(self, case: Case):
        """A function of scalars (Ae, E_inp), and lanes of both."""
        base = self.single(case)
        one = jax.tree.map(lambda x: x[..., 0] if x.ndim else x, base)

        def loss(Ae, E_inp):
            theta = {**one, "parameters": {**one["parameters"], "Ae": Ae}, "inputs": {**one["inputs"], "E_inp": E_inp}}
            res = self.simulate(case, theta)
            return jnp.mean(res["eeg"].mantissa ** 2) + res.final["M"].mantissa

        return loss, base["parameters"]["Ae"], base["inputs"]["E_inp"]

    def test_jit(self):
        loss, Ae, E = self._of_lane(Case(steps=30, checkpoint=7))
        want = jax.value_and_grad(loss, (0, 1))(Ae[0], E[0])
        got = jax.jit(jax.value_and_grad(loss, (0, 1)))(Ae[0], E[0])
        jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=2e-6), got, want)

    def test_vmap(self):
        """vmap, nested vmap, vmap(grad) and grad(vmap) agree with one lane at a time."""
        loss, Ae, E = self._of_lane(Case(steps=30, lanes=6, checkpoint=7))
        one = jax.jit(jax.value_and_grad(loss, (0, 1)))
        alone, grads = zip(*[one(a, e) for a, e in zip(Ae, E)])
        grads = [np.stack(g) for g in zip(*grads)]
        np.testing.assert_allclose(jax.jit(jax.vmap(loss))(Ae, E), np.stack(alone), rtol=5e-6)
        nested = jax.jit(jax.vmap(jax.vmap(loss)))(Ae.reshape(2, 3), E.reshape(2, 3))
        np.testing.assert_allclose(nested.reshape(6), np.stack(alone), rtol=5e-6)
        for got in (
            jax.vmap(jax.grad(loss, (0, 1))),
            jax.grad(lambda a, e: jnp.sum(jax.vmap(loss)(a, e)), (0, 1)),
            jax.grad(lambda a, e: jnp.sum(jax.vmap(jax.vmap(loss))(a.reshape(2, 3), e.reshape(2, 3))), (0, 1)),
        ):
            for g, w in zip(jax.jit(got)(Ae, E), grads):
                assert off(g, w) < 2e-5
        outer = jax.jit(jax.vmap(jax.vmap(jax.grad(loss), (0, None)), (None, 0)))(Ae, E[:2])
        np.testing.assert_allclose([outer[0, 0], outer[1, 1]], grads[0][:2], rtol=2e-5)

    @pytest.mark.slow
    def test_vmap_over_rows_and_keys(self):
        """One value a step, and a key each: mapped from outside they are what a batch of them is."""
        case = dataclasses.replace(INPUTS["lane rows"], noisy=True)
        theta, keys = self.single(case), jax.random.split(jax.random.key(5), case.lanes)
        batch = self.simulate(case, theta, key=keys)["eeg"].mantissa

        def one(theta, key):
            return self.simulate(case, theta, key=key)["eeg"].mantissa

        axes = jax.tree.map(lambda x: x.ndim - 1 if x.ndim else None, theta)
        np.testing.assert_allclose(jax.vmap(one, (axes, 0), 1)(theta, keys), batch, rtol=2e-5, atol=1e-5)

    @pytest.mark.slow
    def test_vmap_of_a_gradient_by_a_shared_row(self):
        """An input shared by all lanes of a vmap(grad) has a gradient for each."""
        case = dataclasses.replace(Case(steps=14, lanes=3, checkpoint=4), kind="rows")
        theta = self.single(case)

        def loss(Ae, row):
            cut = {**theta, "parameters": {**theta["parameters"], "Ae": Ae}, "inputs": {"E_inp": row}}
            return self.loss(case, cut)

        many = jnp.stack([theta["parameters"]["Ae"], theta["parameters"]["Ae"] + 0.5])
        got = jax.jit(jax.vmap(jax.grad(loss, 1), (0, None)))(many, theta["inputs"]["E_inp"])
        alone = jax.jit(jax.grad(loss, 1))
        want = np.stack([alone(a, theta["inputs"]["E_inp"]) for a in many])
        assert got.shape == (2, 14)
        assert off(got, want) < 1e-5

    def test_vmap_is_one_kernel(self):
        """Mapping adds lanes to the loops that are there, and no loop."""
        loss, Ae, E = self._of_lane(Case(steps=50, every=5, checkpoint=10))
        for fun in (loss, jax.grad(loss)):
            plain = jax.jit(fun).lower(Ae[0], E[0]).compile().as_text()
            mapped = jax.jit(jax.vmap(fun)).lower(Ae, E).compile().as_text()
            assert count(self.loop, mapped) == count(self.loop, plain) > 0

    def test_two_devices(self):
        """Lanes spread over two devices compute what they compute on one."""
        case = Case(lanes=8, steps=20, checkpoint=4)
        theta = self.single(case)
        mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:2]), ("lanes",))
        spread = jax.tree.map(
            lambda x: (
                jax.device_put(
                    x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("lanes" if x.ndim else None))
                )
                if x.ndim
                else x
            ),
            theta,
        )
        fun = jax.jit(jax.value_and_grad(functools.partial(self.loss, case)))
        (value, grad), (value2, grad2) = fun(theta), fun(spread)
        np.testing.assert_allclose(value2, value, rtol=1e-6)
        assert_close(grad2, grad, 1e-6)

    @pytest.mark.slow
    def test_gradient_by_the_model(self):
        """A model with its units is a pytree: its gradient is one, too."""
        model = bk.JansenRit(Ae=jnp.asarray([3.0, 3.5]) * u.mV)

        def loss(model):
            res = bk.simulate(model, 20, 1 * u.ms, inputs={"E_inp": 200.0 * u.Hz}, implementation=self.implementation)
            return jnp.sum(res["eeg"].mantissa)

        grad = jax.jit(jax.grad(loss))(model)
        assert isinstance(grad, bk.JansenRit)
        assert grad.Ae.mantissa.shape == (2,)
        step = 1e-2
        raised = dataclasses.replace(model, Ae=(model.Ae.mantissa + step) * u.mV)
        lowered = dataclasses.replace(model, Ae=(model.Ae.mantissa - step) * u.mV)
        slope = (loss(raised) - loss(lowered)) / (2 * step)
        np.testing.assert_allclose(jnp.sum(grad.Ae.mantissa), slope, rtol=1e-3)

    @pytest.mark.where(lambda suite: not suite.native_autodiff)
    def test_forward_mode_is_refused(self):
        theta = self.single(case := Case(steps=20, checkpoint=6))
        with pytest.raises(TypeError, match=r'implementation="scan"'):
            jax.jvp(functools.partial(self.loss, case), (theta,), (theta,))

    @pytest.mark.where(lambda suite: suite.native_autodiff)
    def test_forward_mode(self):
        case = Case(steps=20, checkpoint=6)
        theta = self.single(case)
        tangent = jax.tree.map(jnp.ones_like, theta)
        fun = functools.partial(self.loss, case)
        _, slope = jax.jit(lambda theta, tangent: jax.jvp(fun, (theta,), (tangent,)))(theta, tangent)
        want = sum(np.sum(x) for x in jax.tree.leaves(expected_gradient(case)))
        np.testing.assert_allclose(slope, want, rtol=1e-4)

    @pytest.mark.slow
    @pytest.mark.where(lambda suite: suite.native_autodiff and suite.float64)
    def test_second_order(self, x64):
        loss, Ae, E = self._of_lane(Case(steps=20, checkpoint=6))
        Ae, E = np.float64(Ae[0]), np.float64(E[0])
        hessian = jax.jit(jax.hessian(loss, (0, 1)))(Ae, E)
        h, slope = 1e-4, jax.jit(jax.grad(loss, (0, 1)))
        up, down = (slope(Ae + s, E) for s in (h, -h))
        np.testing.assert_allclose(hessian[0], [(a - b) / (2 * h) for a, b in zip(up, down)], rtol=1e-6)

    # What a run returns ---------------------------------------------------------------------------------------------

    def test_records(self):
        case = Case(steps=12, every=3)
        res = self.simulate(case, self.single(case), record=("E", "eeg", "I", "Mv"))
        assert list(res) == ["E", "eeg", "I", "Mv"]
        np.testing.assert_allclose(res["eeg"].mantissa, res["E"].mantissa - res["I"].mantissa, atol=1e-5)
        for n in ("E", "I", "Mv"):
            np.testing.assert_allclose(res[n].mantissa[-1], res.final[n].mantissa, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("scheme", slow_but({"strang"}, ["strang", "exp_euler"]))
    def test_resume(self, scheme):
        """Two runs through ``res.final`` are one run, to rounding."""
        whole = dataclasses.replace(self.accuracy, steps=100, scheme=scheme)
        half = dataclasses.replace(whole, steps=50)
        theta = self.single(whole)
        one = self.simulate(whole, theta)
        first = self.simulate(half, theta)
        second = self.simulate(half, theta, initial=first.final)
        assert off(np.concatenate([first["eeg"].mantissa, second["eeg"].mantissa]), one["eeg"].mantissa) < 3e-6
        assert_close(magnitudes(second.final), magnitudes(one.final), 3e-6)

    def test_lanes_do_not_meet(self):
        """A lane that diverges to NaN says so and disturbs no other, not even in the gradient."""
        case = Case(lanes=5, steps=60, scheme="euler", checkpoint=9)
        theta = self.single(case)
        sick = {**theta, "initial": {**theta["initial"], "E": theta["initial"]["E"].at[2].set(3e38)}}
        res = self.simulate(case, sick)
        np.testing.assert_array_equal(res.ok, [True, True, False, True, True])
        others = np.asarray([0, 1, 3, 4])
        well = self.simulate(case, theta)
        np.testing.assert_array_equal(res["eeg"].mantissa[:, others], well["eeg"].mantissa[:, others])
        per_lane = jax.jit(jax.grad(functools.partial(self.loss, case)))
        np.testing.assert_array_equal(
            per_lane(sick)["parameters"]["Ae"][others], per_lane(theta)["parameters"]["Ae"][others]
        )

    def test_deterministic(self):
        case = dataclasses.replace(Case(lanes=129, steps=20), noisy=True)
        theta = self.single(case)
        fun = jax.jit(jax.value_and_grad(functools.partial(self.loss, case)))
        jax.tree.map(np.testing.assert_array_equal, fun(theta), fun(theta))

    @pytest.mark.slow
    def test_replay_is_exact(self):
        """How a run is cut into checkpointed segments changes its gradient by the rounding of another program only."""
        case = dataclasses.replace(Case(steps=24), noisy=True)
        with jax.enable_x64(self.float64):
            theta = case.theta() if self.float64 else self.single(case)
            first, *others = [
                jax.jit(jax.grad(functools.partial(self.loss, dataclasses.replace(case, checkpoint=c))))(theta)
                for c in (1, 5, 24)
            ]
        for other in others:
            assert_close(other, first, 1e-12 if self.float64 else 1e-6)

    @pytest.mark.where(lambda suite: suite.bounded)
    def test_memory_of_a_gradient(self):
        """It grows like the root of the time, and `explain` knows it."""

        def temporary(steps):
            case = Case(lanes=256, steps=steps, every=steps)
            fun = jax.jit(jax.grad(functools.partial(self.loss, case)))
            made = fun.lower(self.single(case)).compile().memory_analysis()
            plan = bk.explain(**self.arguments(case, self.single(case)))
            return made.temp_size_in_bytes, plan.bytes_gradient

        (short, _), (long, planned) = map(temporary, self.bounded)
        growth = self.bounded[1] / self.bounded[0]
        assert long / short < 1.5 * growth**0.5
        if not self.native_autodiff:  # JAX also keeps what is between the states of one segment
            assert long < 1.5 * planned
