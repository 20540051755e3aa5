"""Gradients that go back over a limited time: the same run, and the derivative of its parts."""

from __future__ import annotations

import brainunit as u
import jax
import jax.numpy as jnp
import needs
import numpy as np
import pytest

import brainmass_kernels as bk

DT, STEPS, HORIZON = 0.1 * u.ms, 50, 12
KEY = jax.random.key(1)
pytestmark = pytest.mark.usefixtures("x64")
rng = np.random.default_rng(0)
SIGNAL = rng.uniform(-0.2, 0.2, STEPS)


@pytest.fixture(params=["scan", pytest.param("numba", marks=needs.numba)])
def implementation(request):
    return request.param


@bk.model
class Lorenz(bk.Model):
    """Chaotic: two trajectories part by a factor e in about 1.1 units of time."""

    rho: float = 28.0

    states = {"x": u.UNITLESS, "y": u.UNITLESS, "z": u.UNITLESS}
    inputs = {"push": 0.0}
    initial = {"x": 1.0, "y": 1.0, "z": 20.0}
    time_unit = u.ms
    scheme = "heun"

    @staticmethod
    def drift(s, p, i):
        return {"x": 10.0 * (s.y - s.x) + i.push, "y": s.x * (p.rho - s.z) - s.y, "z": s.x * s.y - 8.0 / 3.0 * s.z}


def hopf(a, delayed: bool):
    model = bk.Hopf(a=a, w=0.3)
    if not delayed:
        return model
    weights = np.array([[0.0, 0.4, 0.1], [0.3, 0.0, 0.2], [0.1, 0.2, 0.0]])
    return bk.Network(model, weights, source="x", target="x_inp", k=0.5, delays=np.tile([7, 3, 5], (3, 1)) * DT)


def run(a, x, implementation, delayed=False, steps=STEPS, signal=SIGNAL, history=None, **options):
    initial = {"x": x, "y": 0.1} | ({"history": history} if history is not None else {})
    return bk.simulate(
        hopf(a, delayed), steps, DT, initial=initial, inputs={"y_inp": signal}, implementation=implementation,
        scheme="euler", **({"record": "x"} | options),
    )  # fmt: skip


def in_parts(a, x, implementation, delayed):
    """The sum of squares over runs that continue each other, each from numbers without a derivative."""
    total, state = 0.0, None
    for first in range(0, STEPS, HORIZON):
        steps = min(HORIZON, STEPS - first)
        options = {"signal": SIGNAL[first : first + steps], "steps": steps}
        if state is None:
            part = run(a, x, implementation, delayed, **options)
        else:
            options["history"] = state.get("history")
            initial = {n: v for n, v in state.items() if n != "history"}
            part = bk.simulate(
                hopf(a, delayed), steps, DT, initial=state if delayed else initial, inputs={"y_inp": options["signal"]},
                implementation=implementation, scheme="euler", record="x",
            )  # fmt: skip
        total += jnp.sum(part["x"] ** 2)
        state = jax.tree.map(jax.lax.stop_gradient, dict(part.final))
    return total


@pytest.mark.parametrize("delayed", [False, True], ids=["masses", "network"])
def test_the_gradient_is_that_of_runs_that_continue_each_other(implementation, delayed):
    a, x = jnp.asarray(0.2), jnp.linspace(-0.4, 0.5, 3)

    def whole(a, x, horizon=HORIZON):
        return jnp.sum(run(a, x, implementation, delayed, gradient_horizon=horizon)["x"] ** 2)

    found = jax.grad(whole, (0, 1))(a, x)
    expected = jax.grad(in_parts, (0, 1))(a, x, implementation, delayed)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10)
    unlimited = jax.grad(whole, (0, 1))(a, x, None)
    assert abs(unlimited[0] / found[0] - 1) > 0.05
    for ours, theirs in zip(jax.grad(whole, (0, 1))(a, x, STEPS * DT), unlimited, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_the_run_is_the_same_with_noise_and_statistics(implementation):
    options = {
        "noise": {"x_inp": 0.1 * u.ms**0.5}, "key": KEY, "every": 3, "transient": 7,
        "record": ["x", bk.Mean(), bk.Spectrum(np.array([100.0, 400.0]))],
    }  # fmt: skip
    whole, cut = (run(0.2, jnp.zeros(3), implementation, gradient_horizon=h, **options) for h in (None, 1.2 * u.ms))
    for name in whole:
        ours, theirs = u.get_magnitude(cut[name]), u.get_magnitude(whole[name])
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-14)
    for name in whole.final:
        np.testing.assert_allclose(cut.final[name], whole.final[name], rtol=1e-13, atol=1e-14)


def test_a_statistic_goes_back_as_far_as_its_records():
    """Blocks of records are no shorter than the horizon, and a gradient ends where one begins."""

    def loss(a, record, steps):
        result = run(a, jnp.zeros(2**17), "scan", steps=steps, signal=np.full(steps, 0.1), record=record, every=1,
                     gradient_horizon=40)  # fmt: skip
        return jnp.mean(next(iter(result.values())))

    own, stored = (jax.grad(loss)(jnp.asarray(0.2), record, 80) for record in (bk.Mean(of="x"), "x"))
    np.testing.assert_allclose(own, stored, rtol=1e-9)


def test_of_a_chaotic_run_the_gradient_explodes_and_is_cured():
    def loss(rho, horizon):
        result = bk.simulate(Lorenz(rho=rho), 3000, 0.01 * u.ms, record="z", gradient_horizon=horizon,
                             implementation="scan")  # fmt: skip
        return jnp.mean(result["z"][500:])

    rho = jnp.linspace(27.5, 28.5, 5)
    exploded, cured = (jax.vmap(jax.grad(loss), (0, None))(rho, horizon) for horizon in (None, 1 * u.ms))
    assert np.abs(exploded).max() > 1e6
    # The mean of z rises by about one with rho (Lea, Allen & Haine 2000).
    assert 0.2 < np.mean(cured) < 2.0
    assert np.abs(cured).max() < 10.0


def test_explain_says_so():
    assert ", over 12 steps at most" in str(bk.explain(bk.Hopf(), STEPS, DT, gradient_horizon=1.2 * u.ms))
    assert "steps at most" not in str(bk.explain(bk.Hopf(), STEPS, DT, gradient_horizon=STEPS))


@pytest.mark.parametrize(
    ("horizon", "says"), [(0, "at least one step"), (0.05 * u.ms, "gradient_horizon"), (-3, "gradient_horizon")]
)
def test_what_is_wrong_is_said(horizon, says):
    with pytest.raises(ValueError, match=says):
        run(0.2, jnp.zeros(3), "scan", gradient_horizon=horizon)


def test_derivatives_that_are_carried_forward_take_none():
    with pytest.raises(ValueError, match=r"'gradient_horizon' got .*carried forward"):
        bk.sensitivities(bk.Hopf(), STEPS, DT, wrt="a", gradient_horizon=HORIZON)
    series = bk.TimeSeries(np.sin(np.arange(STEPS)))
    options = {"duration": STEPS, "transient": None, "dt": DT, "every": 1, "steps": 1, "starts": 1, "realisations": 1}
    with pytest.raises(ValueError, match=r"'gradient_horizon' got .*optimiser of optax"):
        bk.fit(bk.Hopf(), series, {"a": (0.1, 0.4)}, gradient_horizon=HORIZON, optimiser="levenberg_marquardt",
               **options)  # fmt: skip


def test_a_fit_with_a_horizon():
    """It finds a rate of growth, and continues with the same horizon alone."""
    wanted = bk.simulate(bk.Hopf(a=0.3, w=0.3), STEPS, DT, inputs={"x_inp": 0.1}, record="x", scheme="euler")["x"]
    options = {
        "duration": STEPS, "transient": None, "dt": DT, "every": 1, "starts": 2, "realisations": 1, "scheme": "euler",
        "record": "x", "implementation": "scan", "gradient_horizon": 2 * u.ms, "inputs": {"x_inp": 0.1},
    }  # fmt: skip
    model = bk.Hopf(w=0.3)
    fit = bk.fit(model, bk.TimeSeries(wanted), {"a": (0.05, 0.6)}, steps=2, **options)
    assert fit.settings["gradient_horizon"] == pytest.approx(2e-3)
    longer = bk.fit(model, resume=fit, steps=2, **options)
    assert len(longer.losses) == 4
    with pytest.raises(ValueError, match="gradient_horizon"):
        bk.fit(model, resume=fit, steps=2, **(options | {"gradient_horizon": 1 * u.ms}))
