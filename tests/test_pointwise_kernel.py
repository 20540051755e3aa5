"""Programs around a loop as kernels on the CPU: the numbers of XLA, its gradients, and vmap."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("llvmlite")
from brainmass_kernels.backends.numba import pointwise
from brainmass_kernels.backends.numba.pointwise import evaluate
from brainmass_kernels.pointwise import Program

FLOAT = jax.ShapeDtypeStruct((), "float32")
PROGRAM = Program(lambda a, b, c: (a * jnp.exp(-b), jnp.tanh(a) / b, a + b * c, c * c, jnp.sin(c)), [FLOAT] * 3)
LANES = 5
C = jnp.linspace(0.5, 1.5, LANES)


def by_kernel(a, b, c):
    return evaluate(PROGRAM, (a, b, c), LANES)


def by_jax(a, b, c):
    return PROGRAM(a, b, c)


def total(outputs):
    return sum(jnp.sum((k + 1.0) * x**2) for k, x in enumerate(outputs))


def test_an_output_is_per_lane_where_an_argument_of_its_own_is():
    outputs = by_kernel(jnp.float32(0.3), jnp.float32(1.2), C)
    assert [x.shape for x in outputs] == [(), (), (LANES,), (LANES,), (LANES,)]
    for got, wanted in zip(outputs, by_jax(jnp.float32(0.3), jnp.float32(1.2), C), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-6)


@pytest.mark.parametrize("jitted", [False, True])
def test_gradients_are_those_of_jax(jitted):
    """Of a value that all lanes share, the sum over the lanes."""
    arguments = jnp.float32(0.3), jnp.float32(1.2), C
    slope = jax.grad(lambda f, *args: total(f(*args)), argnums=(1, 2, 3)) if not jitted else None
    slope = slope or jax.jit(jax.grad(lambda f, *args: total(f(*args)), argnums=(1, 2, 3)), static_argnums=0)
    with jax.numpy_rank_promotion("allow"):
        wanted = slope(by_jax, *arguments)
    for got, want in zip(slope(by_kernel, *arguments), wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-6)


def test_no_cotangent_is_computed_that_nobody_wants():
    """A gradient by c leaves the outputs of a and b alone, so a loop need not make cotangents of them."""

    def loss(c):
        outputs = evaluate(PROGRAM, (jnp.float32(0.3), jnp.float32(1.2), c), LANES)
        return perturbed(tuple(outputs))

    seen = []

    @jax.custom_vjp
    def perturbed(outputs):
        return total(outputs)

    def forward(outputs):
        seen.append([x.perturbed for x in outputs])
        return total([x.value for x in outputs]), [x.value for x in outputs]

    perturbed.defvjp(forward, lambda outputs, ct: (tuple(jnp.ones_like(x) * ct for x in outputs),), symbolic_zeros=True)
    jax.grad(loss)(C)
    assert seen == [[False, False, True, True, True]]


@pytest.mark.parametrize("axes", [(0, None, None), (None, None, 0), (0, None, 0), (None, 1, None), (0, 0, 1)])
def test_vmap_makes_more_lanes(axes):
    rng = np.random.default_rng(1)

    def drawn(axis, *shape):
        shape = list(shape)
        if axis is not None:
            shape.insert(min(axis, len(shape)), 3)
        return jnp.asarray(rng.uniform(0.5, 1.5, shape), jnp.float32)

    axes = tuple(min(axis, 0) if axis is not None and k < 2 else axis for k, axis in enumerate(axes))
    a, b, c = drawn(axes[0]), drawn(axes[1]), drawn(axes[2], LANES)
    value_and_slope = jax.vmap(jax.value_and_grad(lambda *x: total(by_kernel(*x)), argnums=(0, 1, 2)), axes)
    value, slopes = value_and_slope(a, b, c)
    for k in range(3):
        one = [x if axis is None else jnp.take(x, k, axis) for x, axis in zip((a, b, c), axes)]
        wanted, want = jax.value_and_grad(lambda *x: total(by_kernel(*x)), argnums=(0, 1, 2))(*one)
        np.testing.assert_allclose(value[k], wanted, rtol=1e-6)
        for got, slope in zip(slopes, want, strict=True):
            np.testing.assert_allclose(got[k], slope, rtol=2e-6)


def test_vmap_over_nothing():
    empty = jax.vmap(lambda a: by_kernel(a, jnp.float32(1.0), C))(jnp.zeros(0, jnp.float32))
    assert [x.shape for x in empty] == [(0,), (0,), (0, LANES), (0, LANES), (0, LANES)]


def test_a_pullback_without_a_kernel_is_xlas(monkeypatch):
    """What a kernel lacks is computed by XLA: these are coefficients, not the loop."""
    whole = [np.asarray(x) for x in by_kernel(jnp.float32(0.3), jnp.float32(1.2), C)]
    monkeypatch.setattr(pointwise, "PointwiseKernel", None)
    monkeypatch.setattr(pointwise, "lacks", lambda program: "everything")
    for got, want in zip(by_kernel(jnp.float32(0.3), jnp.float32(1.2), C), whole, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)
