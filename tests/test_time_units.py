"""A model gives one run in whatever units of time it is declared, and its users see the units that were declared."""

from typing import Any

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import brainmass_kernels as bk
from brainmass_kernels import units
from brainmass_kernels.models.base import Model


def leaky(time, of_tau, of_gain):
    """A rate that relaxes: a field, an input, a state and an observable hold a time, and the drift is per ``time``."""

    @bk.model
    class Leaky(bk.Model):
        tau: Any = 1.0 * of_tau
        gain: Any = 1.0 * of_gain

        states = {"r": u.Hz, "w": u.UNITLESS}
        inputs = {"drive": 50.0 * u.Hz}
        observables = {"flux": of_gain}
        time_unit = time
        initial = {"r": 5.0 * u.Hz}

        @staticmethod
        def drift(s, p, i):
            return {"r": (i.drive - s.r) / p.tau, "w": s.r - s.w / p.tau}

        @staticmethod
        def observe(s, p):
            return {"flux": p.gain * s.w}

    return Leaky


FIELDS = {"tau": 20.0 * u.ms, "gain": 3.0 * u.mV / u.ms}
DECLARED = {
    "seconds": leaky(u.second, u.second, u.mV / u.second),
    "ms fields": leaky(u.second, u.ms, u.mV / u.ms),
    "time_unit ms": leaky(u.ms, u.second, u.mV / u.ms),
    "all ms": leaky(u.ms, u.ms, u.mV / u.ms),
}


def run(model, **arguments):
    given = {"implementation": "scan", "record": ("flux", "r", "w"), "every": 10, **arguments}
    return bk.simulate(model, 100 * u.ms, 0.5 * u.ms, **given)


def numbers(result):
    return [*(np.asarray(result[n] / unit) for n, unit in (("flux", u.mV / u.second), ("r", u.Hz), ("w", u.UNITLESS)))]


@pytest.mark.parametrize(
    "arguments",
    [
        {"inputs": {"drive": np.linspace(0.0, 80.0, 200) * u.Hz}},
        {"initial": {"r": 0.02 * u.kHz}},
        {"noise": {"drive": 3.0 * u.Hz * u.second**0.5}, "key": jax.random.key(1)},
        {"noise": {"r": 40.0 * u.Hz / u.second**0.5}, "key": jax.random.key(1), "scheme": "euler"},
    ],
    ids=["a drive of each step", "initial", "noise on an input", "noise on a state"],
)
def test_the_same_run_in_any_unit_of_time(arguments):
    want = numbers(run(DECLARED["seconds"](**FIELDS), **arguments))
    assert np.ptp(want[1]) > 1.0
    for name, cls in DECLARED.items():
        for got, expected in zip(numbers(run(cls(**FIELDS), **arguments)), want, strict=True):
            np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-5, err_msg=name)


def test_ms_fields_have_the_bits_of_seconds():
    for got, want in zip(*(numbers(run(DECLARED[n](**FIELDS))) for n in ("ms fields", "seconds")), strict=True):
        np.testing.assert_allclose(got, want, rtol=3e-7)


def test_what_is_read_back_has_the_units_declared():
    model = DECLARED["time_unit ms"](**FIELDS)
    assert model.parameter_units() == {"tau": u.second, "gain": u.mV / u.ms}
    np.testing.assert_allclose([model.magnitudes()["tau"], model.magnitudes()["gain"]], [0.02, 3.0])
    result = run(model)
    assert (result["r"].unit, result["flux"].unit, result.final["r"].unit) == (u.Hz, u.mV / u.ms, u.Hz)
    again = run(model, initial=result.final)
    whole = bk.simulate(model, 200 * u.ms, 0.5 * u.ms, implementation="scan", record="r", every=10)
    np.testing.assert_allclose(again["r"] / u.Hz, whole["r"][20:] / u.Hz, rtol=1e-6)


def test_gradients_and_sensitivities_are_by_the_units_declared():
    cls = DECLARED["time_unit ms"]

    def of_tau(tau):
        return jnp.sum(run(cls(tau=tau * u.second), record="r")["r"] / u.Hz)

    eps = 1e-4
    slope = (of_tau(0.02 + eps) - of_tau(0.02 - eps)) / (2 * eps)
    np.testing.assert_allclose(jax.grad(of_tau)(0.02), slope, rtol=1e-2)
    _, by = bk.sensitivities(cls(**FIELDS), 100 * u.ms, 0.5 * u.ms, "tau", record="r", every=10, implementation="scan")
    assert u.have_same_dim(by["tau"]["r"], u.Hz / u.second)
    np.testing.assert_allclose(jnp.sum(by["tau"]["r"] / (u.Hz / u.second)), slope, rtol=1e-2)


def blocks(time, rate):
    @bk.model
    class Blocks(bk.SecondOrderModel):
        A: Any = 3.25 * u.mV
        a: Any = 1.0 * rate

        states = {"E": u.mV, "Ev": u.mV / u.second}
        inputs = {"drive": 200.0 * u.Hz}
        time_unit = time
        blocks = (bk.Block("E", "Ev", "A", "a"),)

        @staticmethod
        def drive(s, p, i):
            return {"E": i.drive - 0.02 * p.a * s.E}

    return Blocks(a=100.0 * u.Hz)


@pytest.mark.parametrize("scheme", ["strang", "exact", "heun"])
def test_second_order_blocks_in_any_unit_of_time(scheme):
    models = [blocks(u.second, u.Hz), blocks(u.ms, u.Hz), blocks(u.second, u.kHz)]
    found = [
        bk.simulate(
            m, 200, 0.2 * u.ms, scheme=scheme, record=("E", "Ev"), implementation="scan",
            initial={"E": 1.0 * u.mV, "Ev": 0.1 * u.mV / u.ms},
        )
        for m in models
    ]  # fmt: skip
    for got in found[1:]:
        np.testing.assert_allclose(got["E"] / u.mV, found[0]["E"] / u.mV, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(
            got["Ev"] / (u.mV / u.second), found[0]["Ev"] / (u.mV / u.second), rtol=1e-4, atol=1e-3
        )
    with pytest.raises(
        ValueError, match=r"'dt' got 25 ms, at which 'heun' is unstable for a = 100: it takes dt below 20"
    ):
        bk.simulate(models[1], 10, 25 * u.ms, scheme="heun")


def test_an_adjoint_in_any_unit_of_time():
    def of(model):
        def loss(A):
            run = bk.simulate(type(model)(A=A * u.mV), 64, 0.2 * u.ms, record="E", implementation="numba")
            return jnp.sum(run["E"] / u.mV)

        return jax.grad(loss)(3.0)

    np.testing.assert_allclose(of(blocks(u.ms, u.Hz)), of(blocks(u.second, u.Hz)), rtol=1e-5)


@pytest.mark.parametrize("time", [u.second, u.ms])
def test_a_network_couples_in_the_units_declared(time):
    weights = np.array([[0.0, 1.0], [1.0, 0.0]])
    cls = leaky(time, u.ms, u.mV / u.ms)
    network = bk.Network(cls(**FIELDS), weights, source="r", target="drive", k=0.5, delays=2 * u.ms)
    start = {"r": np.array([5.0, 20.0]) * u.Hz}
    got = bk.simulate(network, 100, 0.5 * u.ms, record="r", initial=start, implementation="scan")
    want = bk.simulate(
        bk.Network(DECLARED["seconds"](**FIELDS), weights, source="r", target="drive", k=0.5, delays=2 * u.ms),
        100, 0.5 * u.ms, record="r", initial=start, implementation="scan",
    )  # fmt: skip
    np.testing.assert_allclose(got["r"] / u.Hz, want["r"] / u.Hz, rtol=1e-5)
    assert got.final["history"].unit == u.Hz
    np.testing.assert_allclose(got.final["history"] / u.Hz, want.final["history"] / u.Hz, rtol=1e-5)


def test_coloured_noise_and_blood_follow_the_model():
    for make in (lambda m: bk.coloured(m, "drive", 10 * u.ms), lambda m: bk.with_bold(m, "r", rest=40 * u.Hz)):
        found = [run(make(DECLARED[n](**FIELDS))).final for n in ("seconds", "time_unit ms")]
        for name, x in found[0].items():
            np.testing.assert_allclose(u.get_magnitude(found[1][name]), u.get_magnitude(x), rtol=1e-5, err_msg=name)


def test_a_fit_and_a_sweep_show_the_units_declared():
    cls = DECLARED["time_unit ms"]
    found = bk.sweep(
        cls(**FIELDS), {"tau": [10.0, 20.0] * u.ms}, 100, 0.5 * u.ms, record=bk.Mean(of="r"), implementation="scan"
    )
    assert found.axes["tau"].unit == u.second
    want = [np.mean(run(cls(tau=t * u.ms), record="r", every=1)["r"][:100] / u.Hz) for t in (10.0, 20.0)]
    np.testing.assert_allclose(found["r_mean"] / u.Hz, want, rtol=1e-5)


FACTORS = [
    (u.ms, u.second, 1e-3), (u.second, u.ms, 1e3), (u.Hz, u.ms, 1e-3), (u.kHz, u.ms, 1.0), (u.minute, u.second, 60.0),
    (u.mV / u.ms, u.second, 1e3), (u.nA * u.Hz, u.ms, 1e-3), (u.mV * u.second, u.ms, 1e3), (u.mV, u.ms, 1.0),
    (u.mV / u.second**2, u.ms, 1e-6), (u.Hz / u.nA, u.ms, 1e-3), (u.UNITLESS / u.mV, u.ms, 1.0), (u.siemens, u.ms, 1.0),
    (u.UNITLESS, u.ms, 1.0), (u.mm / u.ms, u.second, 1e3), (u.mV * u.ms**0.5, u.second, 1e-3**0.5),
]  # fmt: skip


@pytest.mark.parametrize(("unit", "time", "factor"), FACTORS, ids=[f"{x} in {t}" for x, t, _ in FACTORS])
def test_the_time_that_a_unit_names(unit, time, factor):
    assert units.time_factor(unit, time, "g") == pytest.approx(factor, rel=1e-12)
    if factor == 1.0:
        assert units.time_factor(unit, time, "g") == 1.0


def test_a_unit_whose_time_cannot_be_told_is_refused():
    """brainunit 0.5 loses the names of this one; since 0.6 it keeps them, and the time is converted."""
    unit = u.UNITLESS / (u.mV / u.ms)
    if str(unit) == "ms / mV":
        assert units.time_factor(unit, u.second, "gain") == pytest.approx(1e-3)
        return
    with pytest.raises(ValueError, match=r"'gain' is in .* model's time_unit, s: write it as a product of named units"):
        leaky(u.second, u.ms, unit).time_factors()


def test_as_declared_leaves_the_numbers_alone():
    @bk.model
    class Own(bk.Model):
        rate: Any = 2.0 * u.Hz
        states = {"x": u.UNITLESS}
        time_unit = u.ms

    converted, alone = Own, bk.model(type("Own", (Own,), {"as_declared": ("rate",)}))
    assert converted.time_factors().parameters == {"rate": 1e-3}
    assert not any(alone.time_factors())


def test_also_is_in_the_same_unit_of_time():
    body = {"__annotations__": {"r": Any}, "r": 1.0, "states": {"x": u.UNITLESS}, "time_unit": u.ms}
    with pytest.raises(ValueError, match=r"also\['r'\] is in Hz, read as if it were dimensionless, but the time"):
        bk.model(type("Own", (bk.Model,), {**body, "also": {"r": u.Hz}}))
    bk.model(type("Own", (bk.Model,), {**body, "also": {"r": u.UNITLESS / u.ms}}))


def test_the_models_of_the_library_are_converted_nowhere():
    public = [getattr(bk, name) for name in bk.__all__]
    models = [x for x in public if isinstance(x, type) and issubclass(x, Model) and hasattr(x, "states")]
    assert len(models) > 25
    for cls in models:
        # A delay inside a mass is a time that no equation reads.
        delays = {delayed.by for delayed in cls.delayed.values()}
        assert not {name for factors in cls.time_factors() for name in factors} - delays, cls.__name__
        for name, default in cls.parameters().items():
            assert cls().magnitudes()[name] == u.get_magnitude(default)
