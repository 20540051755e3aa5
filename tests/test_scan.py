"""The reference implementation: as it is asked for by name, and with the adjoint that it has otherwise."""

import dataclasses
import functools

import jax
import pytest
from backend_suite import INPUTS, BackendSuite, assert_close, expected_gradient, magnitudes


class TestScanAdjoint(BackendSuite):
    """As the fallback: with its own adjoint."""

    implementation = None
    runs = "scan"


@pytest.mark.slow
class TestScan(BackendSuite):
    """By name: transparent to JAX."""

    implementation = "scan"
    runs = "scan"
    transparent = True


def test_both_ways_agree():
    """The loop that JAX differentiates itself and the explicit adjoint: one trajectory, one gradient; and a jvp."""
    case = dataclasses.replace(INPUTS["lane rows"], noisy=True)
    by_name, adjoint = TestScan(), TestScanAdjoint()
    theta = by_name.single(case)
    for record in ("records", "final"):
        a, b = (magnitudes(getattr(s.simulate(case, theta), record)) for s in (by_name, adjoint))
        assert_close(a, b, 1e-6)
    grads = [jax.jit(jax.grad(functools.partial(s.loss, case)))(theta) for s in (by_name, adjoint)]
    assert_close(*grads, 1e-5)
    fun = functools.partial(by_name.loss, case)
    tangent = jax.tree.map(jax.numpy.ones_like, theta)
    slope = jax.jit(lambda x, t: jax.jvp(fun, (x,), (t,))[1])(theta, tangent)
    assert float(slope) == pytest.approx(sum(x.sum() for x in jax.tree.leaves(expected_gradient(case))), rel=1e-4)
