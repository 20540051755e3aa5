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
    ],
)
def test_what_cannot_be_is_refused(wrt, more, says):
    with pytest.raises(ValueError, match=says.replace("?", r"\?")):
        bk.sensitivities(wrt=wrt, **arguments(AT, **more))
