"""On numba a lane has the same bits whatever batch it is in, one of a single lane too; so has its gradient."""

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import brainmass_kernels as bk
from brainmass_kernels import units

pytest.importorskip("llvmlite")

SIZES = (1, 2, 3, 7, 8, 9, 64, 65)
rng = np.random.default_rng(4)


def drawn(model, lanes: int) -> dict:
    """Values of everything that a lane may have of its own."""

    def near(value):
        return jnp.asarray((u.get_mantissa(value) or 0.1) * rng.uniform(0.9, 1.1, lanes), jnp.float32)

    return {
        "fields": {n: near(x) for n, x in model.parameters().items()},
        "inputs": {n: near(x) for n, x in model.inputs.items()},
        "initial": {n: near(model.initial.get(n, 0.1)) for n in model.states},
    }


def run(model, theta, keys):
    """Everything that a noisy run returns, without units."""
    known = {"fields": model.parameter_units(), "initial": model.states}
    known["inputs"] = {n: units.unit_of(x) for n, x in model.inputs.items()}
    given = {kind: {n: units.attach(x, known[kind][n]) for n, x in some.items()} for kind, some in theta.items()}
    noisy = next(iter(model.states))
    result = bk.simulate(
        model(**given["fields"]), 30, 0.1 * u.ms, inputs=given["inputs"], initial=given["initial"], key=keys, every=10,
        noise={noisy: 0.01 * model.states[noisy] / model.time_unit**0.5}, implementation="numba",
    )  # fmt: skip
    return [u.get_magnitude(x) for x in (*result.records.values(), *result.final.values())]


def both(model, theta, keys):
    """A run and its gradient."""

    def loss(theta):
        out = run(model, theta, keys)
        return sum(jnp.sum(x**2) for x in out), out

    return jax.grad(loss, has_aux=True)(theta)


@pytest.mark.parametrize(
    ("model", "sizes"),
    [
        (bk.VanDerPol, (1, 7)),
        (bk.JansenRit, (1, 3)),
        pytest.param(bk.VanDerPol, SIZES, marks=pytest.mark.slow),
        pytest.param(bk.JansenRit, SIZES, marks=pytest.mark.slow),
        pytest.param(bk.Epileptor, (1, 3), marks=pytest.mark.slow),
        pytest.param(bk.CanonicalMicrocircuit, (1, 3), marks=pytest.mark.slow),
        pytest.param(bk.DavidFriston, (1, 3), marks=pytest.mark.slow),
    ],
)
def test_the_size_of_a_batch_changes_no_bit(model, sizes):
    theta, keys = drawn(model, max(SIZES)), jax.random.split(jax.random.key(0), max(SIZES))
    slopes, whole = both(model, theta, keys)
    for size in sizes:
        found, part = both(model, jax.tree.map(lambda x, size=size: x[:size], theta), keys[:size])
        for a, b in zip(part, whole, strict=True):
            np.testing.assert_array_equal(a, b[..., :size])
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(slopes), strict=True):
            np.testing.assert_array_equal(a, b[:size])


def test_nor_does_the_number_of_networks():
    weights = jnp.asarray(rng.uniform(0.1, 0.5, (3, 3)), jnp.float32)
    theta = {
        "a": jnp.asarray(rng.uniform(0.1, 0.5, (5, 1)), jnp.float32),
        "k": jnp.asarray(rng.uniform(0.1, 0.5, (5, 1)), jnp.float32),
        "x": jnp.asarray(rng.uniform(-0.5, 0.5, (5, 3)), jnp.float32),
    }

    def loss(theta):
        network = bk.Network(
            bk.Hopf(a=theta["a"], w=0.3), weights, delays=np.arange(9).reshape(3, 3) * 0.1 * u.ms, source="x",
            target="x_inp", k=theta["k"],
        )  # fmt: skip
        result = bk.simulate(network, 30, 0.1 * u.ms, initial={"x": theta["x"]}, implementation="numba")
        return jnp.sum(result["x"] ** 2), result["x"]

    gradient = jax.grad(loss, has_aux=True)
    of_all, whole = gradient(theta)
    of_one, part = gradient(jax.tree.map(lambda x: x[:1], theta))
    np.testing.assert_array_equal(part, whole[:, :1])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[:1]), of_one, of_all)
