"""White noise on states: against closed forms, and the orders of the schemes."""

from typing import Any

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backend_suite import slow_but

import brainmass_kernels as bk
from brainmass_kernels import noise
from brainmass_kernels.step import StepSpec, build


@bk.model
class Decay(bk.Model):
    """dx = -x / tau dt + sigma dW."""

    tau: Any = 20.0 * u.ms
    states = {"x": u.mV}
    inputs = {"push": 0.0 * u.mV / u.ms}
    time_unit = u.ms

    @staticmethod
    def drift(s, p, i):
        return {"x": -s.x / p.tau + i.push}


@bk.model
class Growth(bk.Model):
    """dx = rate x dt + x dW, times the intensity: geometric Brownian motion."""

    rate: Any = 1.0 * u.Hz
    states = {"x": u.UNITLESS}
    inputs = {}

    @staticmethod
    def drift(s, p, i):
        return {"x": p.rate * s.x}

    @staticmethod
    def diffusion(s, p):
        return {"x": s.x}


def normals(key, lanes: int, steps: int):
    """The normals that a run of one noisy state draws, (steps, lanes)."""
    seeds = noise.lane_seeds(key, (lanes,))
    drawn = jax.jit(jax.vmap(lambda n: noise.normals(seeds, n, 1)[0]))(jnp.arange(steps, dtype=jnp.int32))
    return np.asarray(drawn, np.float64)


KEY = jax.random.key(3)


@pytest.mark.parametrize("scheme", ["euler", "exp_euler", "heun"])
def test_stationary_variance_is_the_closed_form(scheme):
    sigma, tau = 0.7, 20.0
    run = bk.simulate(
        Decay(), 4000, 0.5 * u.ms, noise={"x": sigma * u.mV / u.ms**0.5}, key=KEY, transient=1000, every=20,
        initial={"x": np.zeros(64, np.float32) * u.mV}, scheme=scheme,
    )  # fmt: skip
    wanted = sigma**2 * tau / 2
    # 64 lanes of 75 independent times each: a standard error of 2%.
    assert float(jnp.var(run["x"] / u.mV)) == pytest.approx(wanted, rel=0.08)
    assert abs(float(jnp.mean(run["x"] / u.mV))) < 0.1 * wanted**0.5


@pytest.mark.parametrize("intensity", [0.3 * u.mV / u.ms**0.5, 0.3 * np.sqrt(1000.0) * u.mV / u.second**0.5])
def test_intensity_has_the_units_of_the_state_over_the_root_of_time(intensity):
    """Euler and Maruyama's step, written out."""
    run = bk.simulate(
        Decay(), 5, 0.5 * u.ms, noise={"x": intensity}, key=KEY, initial={"x": np.full(3, 2.0, np.float32) * u.mV},
        scheme="euler",
    )  # fmt: skip
    x, seen = np.full(3, 2.0), np.asarray(run["x"] / u.mV)
    for n, z in enumerate(normals(KEY, 3, 5)):
        x = x - 0.5 * x / 20.0 + 0.3 * np.sqrt(0.5) * z
        np.testing.assert_allclose(seen[n], x, rtol=2e-6)
    with pytest.raises(ValueError, match=r"noise\['x'\]"):
        bk.simulate(Decay(), 5, 0.5 * u.ms, noise={"x": 1.0 * u.mV}, key=KEY)


def strong_error(scheme: str, coarse: int, stratonovich: bool) -> float:
    """Mean distance at 1 s of geometric Brownian motion from its solution of the same path."""
    lanes, sigma, h = 1000, 0.5, 1.0 / coarse
    with jax.enable_x64(True):
        run = bk.simulate(
            Growth(), coarse, h * u.second, noise={"x": sigma / u.second**0.5}, key=KEY,
            initial={"x": np.ones(lanes)}, scheme=scheme,
        )  # fmt: skip
        got = np.asarray(run.final["x"])
    path = np.sqrt(h) * normals(KEY, lanes, coarse).sum(axis=0)
    rate = 1.0 if stratonovich else 1.0 - sigma**2 / 2
    return float(np.mean(np.abs(got - np.exp(rate + sigma * path))))


@pytest.mark.parametrize(
    ("scheme", "stratonovich", "order"),
    [pytest.param("euler", False, 0.5, marks=pytest.mark.slow), ("exp_euler", False, 0.5), ("heun", True, 1.0)],
)
def test_strong_order_and_the_integral_it_converges_to(scheme, stratonovich, order):
    coarse, fine = (strong_error(scheme, steps, stratonovich) for steps in (16, 256))
    measured = np.log2(coarse / fine) / 4
    assert measured == pytest.approx(order, abs=0.2)
    # Not the other integral, from which its distance does not shrink.
    assert strong_error(scheme, 256, not stratonovich) > 5 * fine


@pytest.mark.parametrize("scheme", ["euler", "exp_euler", "heun"])
def test_weak_order_is_one(scheme):
    """The mean of geometric Brownian motion, each step's noise summed out by its own two moments."""
    sigma = 0.5
    wanted = np.exp(1.0 + (sigma**2 / 2 if scheme == "heun" else 0.0))

    def mean(steps: int) -> float:
        # A step multiplies by a polynomial of the normal: its mean is by Gauss and Hermite, exactly.
        nodes, weights = np.polynomial.hermite_e.hermegauss(8)
        h = 1.0 / steps
        with jax.enable_x64(True):
            step = build(StepSpec(Growth, scheme, (), (), ("x",), ("x",), np.dtype("float64")))
            coefs = step.setup(*map(jnp.asarray, (1.0, sigma, h)))
            (moved,) = step.advance(*coefs, jnp.ones(8), jnp.asarray(nodes))
        return float(np.sum(np.asarray(moved) * weights) / np.sum(weights)) ** steps

    errors = [abs(mean(steps) - wanted) for steps in (16, 64)]
    assert scheme == "exp_euler" or np.log2(errors[0] / errors[1]) / 2 == pytest.approx(1.0, abs=0.25)
    assert errors[1] < 0.05 * wanted


@pytest.mark.parametrize(
    ("scheme", "implementation"),
    [
        ("heun", "scan"),
        ("strang", "numba"),
        *(
            pytest.param(*both, marks=pytest.mark.slow)
            for both in [("strang", "scan"), ("exp_euler", "scan"), ("heun", "numba"), ("exp_euler", "numba")]
        ),
    ],
)
def test_a_path_is_differentiated_with_its_noise(scheme, implementation):
    """In the intensity, against finite differences of the same path in float64."""
    pytest.importorskip("llvmlite")
    velocity = u.mV / u.second**1.5

    def power(sigma):
        run = bk.simulate(
            bk.JansenRit(), 100, 0.5 * u.ms, noise={"Ev": sigma * velocity, "E_inp": 2.0 * u.Hz * u.second**0.5},
            inputs={"E_inp": 220.0 * u.Hz}, key=KEY, initial={"M": np.linspace(0.0, 0.1, 3) * u.mV}, scheme=scheme,
            implementation=implementation,
        )  # fmt: skip
        return jnp.mean((run["eeg"] / u.mV) ** 2)

    with jax.enable_x64(True):
        sigma = np.float64(3000.0)
        slope = jax.grad(power)(sigma)
        assert float(slope) == pytest.approx(float(power(sigma + 1.0) - power(sigma - 1.0)) / 2, rel=1e-5)
        assert float(power(sigma)) != pytest.approx(float(power(np.float64(0.0))), rel=1e-3)


def test_strang_kicks_with_the_noise_of_a_velocity():
    """Half flow, kick and noise, half flow, written out by the scheme without noise."""
    key, h = KEY, 5e-4
    z = normals(key, 1, 1)[0, 0]

    def one(noise, initial):
        given = {"noise": noise, "key": key} if noise else {}
        return bk.simulate(
            bk.JansenRit(), 1, 0.5 * u.ms, initial=initial, inputs={"E_inp": 220.0 * u.Hz}, **given
        ).final

    with jax.enable_x64(True):
        start = {"E": np.array([1.0]) * u.mV}
        plain, noisy = one({}, start), one({"Ev": 100.0 * u.mV / u.second**1.5}, start)
        decay = np.exp(-100.0 * h / 2)
        added = 100.0 * np.sqrt(h) * z
        # The half flow of what was added to the velocity: x = t v exp(-a t), v (1 - a t) exp(-a t).
        assert float((noisy["E"] - plain["E"])[0] / u.mV) == pytest.approx(added * h / 2 * decay, rel=1e-6)
        moved = float((noisy["Ev"] - plain["Ev"])[0] / (u.mV / u.second))
        assert moved == pytest.approx(added * (1 - 100.0 * h / 2) * decay, rel=1e-6)


# Coloured noise ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [Decay(), pytest.param(bk.JansenRit(), marks=pytest.mark.slow)])
def test_coloured_noise_has_its_variance_and_correlation(base):
    """sigma^2 tau / 2 exp(-t / tau), whatever the model that it drives."""
    name = next(n for n in ("push", "E_inp") if n in base.inputs)
    unit = base.inputs[name].unit
    model, sigma, tau, apart = bk.coloured(base, name, 20.0 * u.ms), 3.0, 20.0, 10.0
    state = f"{name}_noise"
    run = bk.simulate(
        model, 6000, 0.5 * u.ms, noise={state: sigma * unit / u.ms**0.5}, key=KEY, transient=200, every=20,
        initial={state: np.zeros(64, np.float32) * unit}, record=(state,),
    )  # fmt: skip
    x = np.asarray(run[state] / unit)
    assert np.var(x) == pytest.approx(sigma**2 * tau / 2, rel=0.08)
    assert np.mean(x[1:] * x[:-1]) / np.var(x) == pytest.approx(np.exp(-apart / tau), abs=0.05)


@pytest.mark.parametrize(
    "scheme", slow_but({"strang", "heun"}, ["strang", "exact", "exp_euler", "symplectic_euler", "heun"])
)
def test_coloured_noise_drives_its_input(scheme):
    """Held for so long that it does not decay, it is a constant on the input."""
    model = bk.coloured(bk.JansenRit(), "E_inp", 1e9 * u.second)
    given = {"inputs": {"E_inp": 200.0 * u.Hz}, "initial": {"E_inp_noise": 20.0 * u.Hz}, "scheme": scheme}
    run = bk.simulate(model, 200, 0.1 * u.ms, **given)
    plain = bk.simulate(bk.JansenRit(), 200, 0.1 * u.ms, inputs={"E_inp": 220.0 * u.Hz}, scheme=scheme)
    np.testing.assert_allclose(run["eeg"] / u.mV, plain["eeg"] / u.mV, rtol=2e-5, atol=2e-5)
    assert float(run.final["E_inp_noise"] / u.Hz) == pytest.approx(20.0, rel=1e-6)


@pytest.mark.slow
def test_two_inputs_take_coloured_noise_and_gradients_reach_its_time_constant():
    def power(tau):
        model = bk.coloured(bk.coloured(bk.JansenRit(), "E_inp", tau * u.ms), "M_inp", 5.0 * u.ms)
        run = bk.simulate(
            model, 100, 0.5 * u.ms, key=KEY, initial={"E_inp_noise": 40.0 * u.Hz},
            noise={"E_inp_noise": 300.0 * u.Hz / u.second**0.5, "M_inp_noise": 5.0 * u.mV / u.second**0.5},
        )  # fmt: skip
        assert list(run.final) == [*bk.JansenRit.states, "E_inp_noise", "M_inp_noise"]
        return jnp.mean((run["eeg"] / u.mV) ** 2)

    with jax.enable_x64(True):
        slope = float(jax.grad(power)(np.float64(10.0)))
        wanted = float(power(np.float64(10.001)) - power(np.float64(9.999))) / 0.002
    assert slope == pytest.approx(wanted, rel=1e-5)
    with pytest.raises(ValueError, match="unknown input 'E_in'; did you mean 'E_inp'"):
        bk.coloured(bk.JansenRit(), "E_in", 1.0 * u.ms)
    with pytest.raises(ValueError, match="tau_E_inp"):
        bk.coloured(bk.JansenRit(), "E_inp", 1.0 * u.mV)
    assert "JansenRit" in [entry.name for entry in bk.list_models()]
    assert len({entry.name for entry in bk.list_models()}) == len(bk.list_models())


def test_an_unknown_name_is_told():
    with pytest.raises(ValueError, match="unknown input or state 'Exx'"):
        bk.simulate(bk.JansenRit(), 5, 0.5 * u.ms, noise={"Exx": 1.0}, key=KEY)
