"""Derivatives carried in the loop, against JAX's own forward mode through the plain scan."""

import functools

import brainunit as u
import jax
import jax.numpy as jnp
import needs
import numpy as np
import pytest

import brainmass_kernels as bk
from brainmass_kernels import testing

NAMES = ("C", "be", "E_inp", "noise.E_inp")
AT = {"C": 135.0, "be": 97.0, "E_inp": 220.0, "noise.E_inp": 2.0}


def arguments(x, steps=200, lanes=3, **more):
    spread = jnp.linspace(0.9, 1.1, lanes, dtype=jnp.result_type(float))
    wave = jnp.asarray(np.sin(np.arange(steps) / 20.0), jnp.result_type(float))
    return {
        "model": bk.JansenRit(C=x["C"] * spread, be=x["be"] * u.Hz),
        "duration": steps,
        "dt": 0.2 * u.ms,
        "inputs": {"E_inp": x["E_inp"] * u.Hz, "M_inp": 0.1 * wave * u.mV},
        "noise": {"E_inp": x["noise.E_inp"] * u.Hz * u.second**0.5},
        "key": jax.random.key(2),
        "transient": 20,
        "every": 4,
        "record": ("eeg", "Mv"),
        **more,
    }


def expected(**more):
    """Records and final states of the plain scan, differentiated by each lane's own value of each name."""

    def fun(x):
        res = bk.simulate(**arguments(x, implementation="scan", **more))
        return {n: u.get_magnitude(x) for n, x in {**res.records, **res.final}.items()}

    slopes = jax.jit(jax.jacfwd(fun))(AT)
    # C of each lane is a multiple of what is varied here.
    for slope in slopes.values():
        slope["C"] = slope["C"] / np.linspace(0.9, 1.1, slope["C"].shape[-1])[(None,) * (slope["C"].ndim - 1)]
    return slopes


def check(tolerance, names=NAMES, implementation=None, **more):
    run, slopes = bk.sensitivities(wrt=names, implementation=implementation, **arguments(AT, **more))
    plain = bk.simulate(implementation=implementation, **arguments(AT, **more))

    def assert_near(got, want):
        got, want = np.asarray(u.get_magnitude(got)), np.asarray(u.get_magnitude(want))
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * np.abs(want).max())

    for part, want in expected(**more).items():
        assert_near({**run.records, **run.final}[part], {**plain.records, **plain.final}[part])
        for name in names:
            assert_near({**slopes[name].records, **slopes[name].final}[part], want[name])


# Normals are float32, and agree to a few units in the last place across implementations.
@pytest.mark.parametrize(
    ("implementation", "scheme", "tolerance"),
    [
        pytest.param("scan", "strang", 1e-10, marks=pytest.mark.slow),
        pytest.param("numba", "strang", 1e-6, marks=pytest.mark.slow),
        pytest.param("numba", "exp_euler", 1e-6, marks=pytest.mark.slow),
        pytest.param("numba", "heun", 1e-6, marks=pytest.mark.slow),
    ],
)
def test_in_float64(x64, implementation, scheme, tolerance):
    check(tolerance, implementation=implementation, scheme=scheme)


@pytest.mark.slow
def test_in_float32():
    check(1e-4)


INTERPRETED = [
    "mosaic_tpu",
    pytest.param("triton", marks=needs.interpreter),
    pytest.param("mosaic_gpu", marks=needs.mosaic_gpu),
]


@pytest.mark.slow
@pytest.mark.parametrize("implementation", INTERPRETED)
def test_in_kernels_for_accelerators(implementation):
    with testing.interpret():
        check(1e-4, ("C", "noise.E_inp"), steps=24, implementation=implementation, transient=0)


@pytest.mark.slow
def test_reverse_over_forward(x64):
    """The gradient of a derivative, by the adjoint, against forward over forward."""

    def slope(be, implementation):
        more = arguments({**AT, "be": be}, implementation=implementation)
        return jnp.sum(bk.sensitivities(wrt="C", **more)[1]["C"]["eeg"].mantissa)

    got = jax.grad(functools.partial(slope, implementation="numba"))(AT["be"])

    def plain(be, C):
        more = arguments({**AT, "be": be, "C": C}, implementation="scan")
        return jnp.sum(bk.simulate(**more)["eeg"].mantissa / jnp.linspace(0.9, 1.1, 3)[None])

    want = jax.jvp(lambda be: jax.jvp(lambda C: plain(be, C), (AT["C"],), (1.0,))[1], (AT["be"],), (1.0,))[1]
    assert float(got) == pytest.approx(float(want), rel=1e-8)


def test_under_jit_and_vmap():
    def fun(C):
        return bk.sensitivities(bk.JansenRit(C=C), 40, 0.2 * u.ms, "be")[1]["be"]["eeg"].mantissa

    values = jnp.array([120.0, 150.0])
    mapped = jax.jit(jax.vmap(fun))(values)
    for got, C in zip(mapped, values):
        np.testing.assert_allclose(got, fun(C), rtol=1e-4, atol=1e-5)


def stimulated(x, **more):
    """Two stimuli on one input, and one that is computed from phases; of each lane its own onset."""
    spread = jnp.linspace(0.9, 1.1, 3, dtype=jnp.result_type(float))
    pulse = bk.Pulse(x["onset"] * spread * u.ms, 8 * u.ms, x["amplitude"] * u.Hz, edge=2 * u.ms)
    wave = bk.Sine(x["frequency"] * u.Hz, 20 * u.Hz)
    train = bk.PulseTrain(3 * u.ms, 4 * u.ms, x["period"] * u.ms, 0.3 * u.mV, edge=1 * u.ms)
    call = {
        "model": bk.JansenRit(), "duration": 200, "dt": 0.2 * u.ms, "record": "eeg",
        "inputs": {"E_inp": 120 * u.Hz + pulse + wave, "M_inp": train}, **more,
    }  # fmt: skip
    return call


STIMULI = {"onset": 12.0, "amplitude": 150.0, "frequency": 9.0, "period": 11.0}
OF_STIMULI = {
    "onset": "E_inp.0.onset", "amplitude": "E_inp.0.amplitude", "frequency": "E_inp.frequency", "period": "M_inp.period"
}  # fmt: skip


def check_stimuli(tolerance, names, implementation):
    _, slopes = bk.sensitivities(
        wrt=("be", *(OF_STIMULI[n] for n in names)), **stimulated(STIMULI, implementation=implementation)
    )

    def eeg(x):
        return bk.simulate(**stimulated(STIMULI | x, implementation="scan"))["eeg"].mantissa

    want = jax.jit(jax.jacfwd(eeg))({n: STIMULI[n] for n in names})
    for name in names:
        by = u.ms if name in ("onset", "period") else u.Hz
        found = np.asarray(slopes[OF_STIMULI[name]]["eeg"].to_decimal(u.mV / by))
        # The onset of each lane is a multiple of what is varied here.
        expected = np.asarray(want[name]) / (np.linspace(0.9, 1.1, 3) if name == "onset" else 1.0)
        scale = np.abs(expected).max()
        assert scale > 1e-6
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["numba", "scan"])
def test_by_parameters_of_stimuli(x64, implementation):
    check_stimuli(1e-8, tuple(STIMULI), implementation)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", INTERPRETED)
def test_by_parameters_of_stimuli_in_kernels_for_accelerators(implementation):
    with testing.interpret():
        check_stimuli(1e-4, ("onset", "frequency"), implementation)


def by_onset(onset):
    pulse = bk.Pulse(onset * u.ms, 5 * u.ms, 100 * u.Hz, edge=2 * u.ms)
    run, by = bk.sensitivities(bk.JansenRit(), 60, 0.2 * u.ms, "E_inp.onset", inputs={"E_inp": 120 * u.Hz + pulse})
    return run["eeg"].to_decimal(u.mV), by["E_inp.onset"]["eeg"].to_decimal(u.mV / u.ms)


def test_by_an_onset_against_finite_differences():
    (before, _), (_, slope), (after, _) = map(by_onset, (3.9, 4.0, 4.1))
    np.testing.assert_allclose(slope, (after - before) / 0.2, rtol=1e-2, atol=1e-2 * np.abs(slope).max())


@pytest.mark.slow
def test_a_sensitivity_by_an_onset_has_a_gradient():
    def total(onset):
        return jnp.sum(by_onset(onset)[1])

    assert float(jax.grad(total)(4.0)) == pytest.approx(float((total(4.02) - total(3.98)) / 0.04), rel=2e-2)


@pytest.mark.slow
def test_least_squares_by_parameters_of_a_stimulus():
    def inputs(onset, amplitude):
        return {"E_inp": 60 * u.Hz + bk.Pulse(onset * u.ms, 20 * u.ms, amplitude * u.Hz, edge=3 * u.ms)}

    data = bk.simulate(bk.JansenRit(), 200, 1 * u.ms, inputs=inputs(40.0, 200.0), every=5)["eeg"]
    free = {"E_inp.onset": (20 * u.ms, 60 * u.ms), "E_inp.amplitude": (100 * u.Hz, 300 * u.Hz)}
    call = {"duration": 200, "every": 5, "transient": None, "realisations": 1, "starts": 1, "steps": 12}
    found = bk.fit(
        bk.JansenRit(), bk.TimeSeries(data), free, inputs=inputs(35.0, 150.0), optimiser="levenberg_marquardt", **call
    )
    np.testing.assert_allclose(found.parameters["E_inp.onset"].to_decimal(u.ms), 40.0, rtol=1e-3)
    np.testing.assert_allclose(found.parameters["E_inp.amplitude"].to_decimal(u.Hz), 200.0, rtol=1e-3)
    assert all(np.isfinite(u.get_magnitude(x)).all() for x in found.standard_errors().values())


def test_a_hard_edge_has_no_sensitivity_in_its_times():
    inputs = {"E_inp": 120 * u.Hz + bk.Pulse(4 * u.ms, 5 * u.ms, 100 * u.Hz)}
    call = {"model": bk.JansenRit(), "duration": 60, "dt": 0.2 * u.ms, "inputs": inputs}
    with pytest.raises(TypeError, match=r"'E_inp: Pulse\.onset': this stimulus has a hard edge"):
        bk.sensitivities(wrt="E_inp.onset", **call)
    assert np.abs(bk.sensitivities(wrt="E_inp.amplitude", **call)[1]["E_inp.amplitude"]["eeg"].mantissa).max() > 0


def test_units():
    _, slopes = bk.sensitivities(bk.JansenRit(), 20, 0.2 * u.ms, ["Ae", "be"], record=["M", "Mv"])
    assert u.get_unit(slopes["be"]["Mv"]).has_same_dim(u.mV / u.second / u.Hz)
    assert u.get_unit(slopes["Ae"]["M"]).is_unitless


@pytest.mark.parametrize(
    ("wrt", "more", "says"),
    [
        ("bee", {}, "unknown parameter, held input or noise intensity 'bee'; did you mean 'be'?"),
        ((), {}, "'wrt' names no parameter"),
        ("M_inp", {}, "unknown parameter, held input or noise intensity 'M_inp'"),
        ("be", {"record": bk.Mean()}, "'record' got statistics"),
        ("E_inp.onset", {}, "unknown parameter, held input or noise intensity 'E_inp.onset'"),
    ],
)
def test_what_cannot_be_is_refused(wrt, more, says):
    with pytest.raises(ValueError, match=says.replace("?", r"\?")):
        bk.sensitivities(wrt=wrt, **arguments(AT, **more))
