"""The models that brainmass has too: its class of the same name is the oracle, at parameters that are no defaults."""

import zlib

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import brainmass_kernels as bk

brainmass, brainstate = pytest.importorskip("brainmass"), pytest.importorskip("brainstate")

LANES, STEPS, DT = 3, 400, 0.05

# Inputs, in the order of `update`.
CASES = {
    "CoombesByrne": {"r_inp": 0.1, "v_inp": 0.3},
    "Epileptor": {"x1_inp": 0.3, "x2_inp": -0.2},
    "FitzHughNagumo": {"V_inp": 0.4, "w_inp": 0.01},
    "Generic2dOscillator": {"V_inp": 1.5},
    "HORN": {"x_inp": 0.7},
    "Hopf": {"x_inp": 0.05, "y_inp": -0.02},
    "LarterBreakspear": {"V_inp": 0.2},
    "Linear": {"x_inp": 0.3},
    "Lorenz": {"x_inp": 0.5},
    "MontbrioPazoRoxin": {"r_inp": 0.2 * u.Hz, "v_inp": 4.0},
    "StuartLandau": {"x_inp": 0.05, "y_inp": -0.02},
    "VanDerPol": {"x_inp": 0.05, "y_inp": -0.02},
    "WilsonCowan": {"rE_inp": 1.2, "rI_inp": 0.4},
    "WilsonCowanAdaptive": {"rE_inp": 1.2, "rI_inp": 0.4},
    "WilsonCowanDivisive": {"rE_inp": 1.2, "rI_inp": 0.4},
    "WilsonCowanDivisiveInput": {"rE_inp": 1.2, "rI_inp": 0.4},
    "WilsonCowanLinear": {"rE_inp": 0.5, "rI_inp": 0.1},
    "WilsonCowanNoSaturation": {"rE_inp": 1.2, "rI_inp": 0.4},
    "WilsonCowanSimplified": {"rE_inp": 1.2, "rI_inp": 0.4},
    "WilsonCowanSymmetric": {"rE_inp": 1.2, "rI_inp": 0.4},
    "WilsonCowanThreePopulation": {"rE_inp": 1.2, "rI_inp": 0.4, "rM_inp": 0.2},
    "WongWangExcInh": {"coupling": 0.3},
}


def theirs(name: str):
    return getattr(brainmass, f"{name}Step")


def drawn(name: str):
    """Parameters within 5% of the defaults (or of 0.02 where these are 0), and initial states."""
    cls, rng = getattr(bk, name), np.random.default_rng(zlib.crc32(name.encode()))

    def near(value):
        size = u.get_mantissa(value)
        return u.Quantity((size or 0.4) * rng.uniform(0.95, 1.05, LANES), unit=u.get_unit(value))

    parameters = {n: near(x) for n, x in cls.parameters().items()}
    initial = {n: cls.initial.get(n, 0.1 * unit) for n, unit in cls.states.items()}
    initial = {n: near(x) for n, x in initial.items()}
    return ({n: x if not x.unit.is_unitless else x.mantissa for n, x in some.items()} for some in (parameters, initial))


def run_theirs(name: str, parameters, initial, drive, steps=STEPS, dt=DT):
    """Each state of brainmass's class after each step ``(steps, LANES)``."""
    with brainstate.environ.context(dt=dt * u.ms, precision=64):
        model = theirs(name)(LANES, **parameters)
        brainstate.nn.init_all_states(model)
        for n, x in initial.items():
            getattr(model, n).value = x

        def step(_):
            model.update(*drive.values())
            return {n: getattr(model, n).value for n in initial}

        return brainstate.transform.for_loop(step, jnp.arange(steps))


@pytest.mark.parametrize("name", sorted(CASES))
def test_trajectory_is_brainmass(name, x64):
    parameters, initial = drawn(name)
    dt = 0.01 if name == "Lorenz" else DT  # which is stiffer, and chaotic
    expected = run_theirs(name, parameters, initial, CASES[name], dt=dt)
    cls = getattr(bk, name)
    got = bk.simulate(
        cls(**parameters), STEPS, dt * u.ms, inputs=CASES[name], initial=initial, record=tuple(cls.states),
        scheme="symplectic_euler" if cls.pairs else "exp_euler", implementation="scan",
    )  # fmt: skip
    for n in cls.states:
        want = np.asarray(u.get_mantissa(expected[n]))
        assert want.dtype == np.float64
        assert np.ptp(want, axis=0).min() > 1e-4 * np.abs(want).max(), f"{n} does not move"
        off = np.abs(u.get_mantissa(got[n]) - want).max()
        assert off < 1e-8 * np.abs(want).max(), n


@pytest.mark.parametrize("name", [*sorted(CASES), "WongWang"])
def test_names_units_and_defaults_are_brainmass(name):
    with brainstate.environ.context(dt=DT * u.ms):
        model, ours = theirs(name)(1), getattr(bk, name)
        brainstate.nn.init_all_states(model)
    named = {n for n, x in vars(model).items() if isinstance(x, brainstate.nn.Param)}
    assert named == set(ours.parameters())
    for n, value in ours.parameters().items():
        assert u.math.allclose(getattr(model, n).value(), value), n
    assert set(ours.states) == {n for n, x in vars(model).items() if isinstance(x, brainstate.HiddenState)}
    for n, unit in ours.states.items():
        value = getattr(model, n).value
        assert u.have_same_dim(value, 1.0 * unit), n
        start = u.get_mantissa(ours.initial.get(n, 0.0))
        np.testing.assert_allclose(u.get_mantissa(value), start, rtol=1e-6, atol=0.026, err_msg=n)


def test_every_model_of_brainmass_is_here_or_left_out_on_purpose():
    """Left out: delays, networks, and ThresholdLinear, whose step clips states that its equations do not bound."""
    left_out = {"KuramotoNetwork", "HORNSeqLayer", "HORNSeqNetwork", "ThresholdLinearStep", "WilsonCowanDelayedStep"}
    known = {m.name for m in brainmass.list_models()} | {n for n in dir(brainmass) if n.startswith("WilsonCowan")}
    known = {n for n in known if not n.endswith("Base")} - left_out
    assert known == {f"{name}Step" for name in (*CASES, "WongWang", "JansenRit")}


def test_wong_wang_converges_to_brainmass(x64):
    """Whose step holds the firing rates: first order, so its limit is extrapolated from two steps."""
    parameters, initial = drawn("WongWang")
    drive = {"coherence": 0.2}
    coarse, fine = (
        run_theirs("WongWang", parameters, initial, drive, steps=n, dt=300.0 / n) for n in (3000, 6000)
    )  # fmt: skip
    got = bk.simulate(
        bk.WongWang(**parameters), 300 * u.ms, 0.1 * u.ms, inputs=drive, initial=initial, scheme="rk4",
        implementation="scan",
    )  # fmt: skip
    for n in ("S1", "S2"):
        limit = 2.0 * fine[n][1::2] - coarse[n]
        off = np.abs(got[n] - limit).max()
        assert off < 1e-6
        assert off < 1e-2 * np.abs(fine[n][1::2] - coarse[n]).max()


def test_the_transfer_of_wong_wang_passes_through_zero(x64):
    """Where the numerator and the denominator of the rate vanish, value and slope are those of the limit."""
    from brainmass_kernels.models.wong_wang import _transfer

    x = np.linspace(-0.1, 0.1, 201)
    with np.errstate(invalid="ignore"):
        want = np.where(np.abs(x) < 1e-12, 1 / 0.16, x / -np.expm1(-0.16 * x))
    np.testing.assert_allclose(_transfer(jnp.asarray(x), 0.16), want, rtol=1e-10)
    slope = jax.vmap(jax.grad(lambda y: _transfer(y, 0.16)))(jnp.asarray(x))
    np.testing.assert_allclose(slope, np.gradient(want, x), rtol=1e-3)
