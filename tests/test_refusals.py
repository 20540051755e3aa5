"""What a kernel, or its way back, could not hold is refused before anything is launched."""

import brainunit as u
import jax
import jax.numpy as jnp
import needs
import numpy as np
import pytest
from jax import lax
from jax.interpreters import ad

import brainmass_kernels as bk
from brainmass_kernels import dispatch, pointwise
from brainmass_kernels.backends.base import Loop, Request, lacking
from brainmass_kernels.backends.numba.optable import NUMBA
from brainmass_kernels.backends.triton.optable import TRITON
from brainmass_kernels.pointwise import Program, pullback
from brainmass_kernels.schedule import Schedule

FLOAT = jax.ShapeDtypeStruct((), "float32")
MOSAIC = ["mosaic_tpu", pytest.param("mosaic_gpu", marks=needs.mosaic_gpu)]


def program(step) -> Program:
    return Program(lambda x: (step(x),), [FLOAT], "step of a test")


def reason(name: str, step) -> str | None:
    """Why a backend refuses a step of one state."""
    loop = Loop(program(step), program(lambda x: x), 0, 1, 0, 0, Schedule(3))
    return dispatch.load(name).unsupported(Request(loop, 2, jnp.dtype("float32"), "cpu"))


def erf_with(slope):
    """A rule for erf with another derivative."""
    return pointwise._differentiable(lax.erf, slope)


@pytest.mark.parametrize("name", MOSAIC)
def test_mosaic_reads_the_way_back(name, monkeypatch):
    assert reason(name, lax.erf) is None
    monkeypatch.setitem(pointwise._DIFFERENTIABLE, "erf", erf_with(lambda x, y, tangent: tangent * jnp.cosh(x)))
    assert reason(name, lambda x: lax.erf(2.0 * x)).startswith("in its gradient, Mosaic has no 'cosh'")


@pytest.mark.parametrize("name", MOSAIC)
def test_an_accuracy_is_refused_with_its_line(name, monkeypatch):
    def accurate(x):
        return lax.exp(x, accuracy=lax.AccuracyMode.HIGHEST)

    found = reason(name, accurate)
    assert "no 'exp' of a given accuracy" in found
    assert "test_refusals.py" in found
    monkeypatch.setitem(pointwise._DIFFERENTIABLE, "erf", erf_with(lambda x, y, t: t * accurate(x)))
    assert reason(name, lambda x: lax.erf(3.0 * x)).startswith("in its gradient, Mosaic has no 'exp' of")


@pytest.mark.parametrize("name", MOSAIC)
def test_a_primitive_is_refused_with_its_line(name):
    assert "'atan'" in (found := reason(name, jnp.arctan))
    assert "test_refusals.py" in found


@pytest.mark.parametrize("optable", [NUMBA, TRITON], ids=lambda s: s.name)
def test_what_has_no_derivative_is_a_reason_and_no_crash(optable, monkeypatch):
    # As in JAX before 0.12.
    monkeypatch.delitem(ad.primitive_jvps, lax.nextafter_p, raising=False)
    found = lacking(optable.lacks, program(lambda x: lax.nextafter(x, jnp.ones_like(x))))
    assert found.startswith("the step of a test has no gradient")
    assert "nextafter" in found


@pytest.mark.parametrize("function", [lax.erf, lax.erfc])
def test_derivatives_of_the_error_functions_are_our_own(function, monkeypatch):
    x = jnp.linspace(-4.0, 4.0, 33, dtype=jnp.float32)
    want = jax.vmap(jax.grad(function))(x)

    def other(primals, tangents, **params):
        raise AssertionError("this is JAX's derivative")

    monkeypatch.setitem(ad.primitive_jvps, getattr(lax, f"{function.__name__}_p"), other)
    back = pullback(program(function), [True])
    assert {e.primitive.name for e in back.jaxpr.jaxpr.eqns} <= {"mul", "neg", "exp"}
    np.testing.assert_allclose(back(x, jnp.ones_like(x))[0], want, rtol=1e-6, atol=1e-12)


@bk.model
class Gaussian(bk.Model):
    """A rate by the error function."""

    gain: float = 1.5
    states = {"x": u.UNITLESS}
    inputs = {"push": 0.3}
    time_unit = u.ms

    @staticmethod
    def drift(s, p, i):
        return {"x": lax.erf(p.gain * s.x + i.push) - s.x}


def loss(gain, name):
    result = bk.simulate(Gaussian(gain=gain), 6, 0.5 * u.ms, scheme="heun", record=["x"], implementation=name)
    return jnp.mean(result["x"] ** 2)


def test_a_gradient_through_the_error_function():
    gain = jnp.linspace(0.5, 2.0, 3, dtype=jnp.float32)
    want = jax.grad(loss)(gain, "scan")
    with bk.testing.interpret():
        got = jax.grad(loss)(gain, "mosaic_tpu")
    np.testing.assert_allclose(got, want, rtol=1e-5)
