"""The reference implementation: as it is asked for by name, and with the adjoint that it has otherwise."""

import functools

import jax
import numpy as np
import pytest
from backend_suite import INPUTS, BackendSuite, assert_close, magnitudes

import brainmass_kernels as bk


class TestScanAdjoint(BackendSuite):
    """As the fallback, where numba is not installed: with its own adjoint."""

    implementation = None
    runs = "scan"
    context = staticmethod(functools.partial(bk.testing.without, "numba"))
    # Beside what is its own, what every implementation has of `simulate` is held by the others each time.
    long = (
        "test_noise[lane rows]", "test_batches[0]", "test_two_devices", "test_float64", "test_vmap", "test_units",
        "test_records", "test_resume[strang]", "test_jit", "test_batch_of_two_axes", "test_schedules[all transient]",
        "test_noise_does_not_know_the_batch", "test_lanes_do_not_meet", "test_accuracy_of_the_state[exp_euler]",
    )  # fmt: skip


@pytest.mark.slow
class TestScan(BackendSuite):
    """By name, as JAX differentiates it: what a gradient has no part in is of the same segments as above."""

    implementation = "scan"
    runs = "scan"
    native_autodiff = True
    held_elsewhere = (
        "test_accuracy_of_the_state", "test_batches", "test_batch_of_two_axes", "test_units", "test_records",
        "test_noise_is_the_reference_noise", "test_noise_does_not_know_the_batch", "test_noise_of_two_inputs",
        "test_noise_does_not_know_the_schedule", "test_resume",
    )  # fmt: skip


@pytest.mark.slow
def test_both_ways_agree(x64):
    """The loop that JAX differentiates itself and the explicit adjoint: one trajectory, one gradient; and a jvp."""
    case, by_name, adjoint = INPUTS["lane rows"], TestScan(), TestScanAdjoint()
    theta = case.theta()
    with adjoint.context():
        assert bk.explain(**adjoint.arguments(case, theta)).implementation == "scan"
        for part in ("records", "final"):
            a, b = (magnitudes(getattr(s.simulate(case, theta), part)) for s in (by_name, adjoint))
            assert_close(a, b, 1e-12)
        grads = [jax.jit(jax.grad(functools.partial(s.loss, case)))(theta) for s in (by_name, adjoint)]
    assert_close(*grads, 1e-11)
    fun = functools.partial(by_name.loss, case)
    tangent = jax.tree.map(np.ones_like, theta)
    slope = jax.jit(lambda x, t: jax.jvp(fun, (x,), (t,))[1])(theta, tangent)
    total = sum(float(x.sum()) for x in jax.tree.leaves(grads[0]))
    assert float(slope) == pytest.approx(total, rel=1e-10)
