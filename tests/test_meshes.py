"""Under a mesh that a user has set, the same numbers as without, and nothing kept of it."""

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import brainmass_kernels as bk
from brainmass_kernels.pointwise import Program, pullback


@pytest.fixture(params=[AxisType.Explicit, AxisType.Auto], ids=["explicit", "auto"])
def mesh(request):
    return jax.make_mesh((2,), ("lanes",), axis_types=(request.param,))


@bk.model
class Relaxing(bk.Model):
    a: float = 0.5
    states = {"x": u.UNITLESS}
    inputs = {"push": 0.3}
    time_unit = u.ms

    @staticmethod
    def drift(s, p, i):
        return {"x": jnp.tanh(i.push - p.a * s.x)}


def gradient(name, a):
    """Through exponential Euler, which takes derivatives in its step, and noise."""

    def loss(a):
        result = bk.simulate(
            Relaxing(a=a), 3, 0.1 * u.ms, scheme="exp_euler", noise={"push": 0.1 * u.ms**0.5}, key=jax.random.key(3),
            record=["x"], implementation=name,
        )  # fmt: skip
        return jnp.mean(result["x"] ** 2)

    with bk.testing.interpret():
        return jax.jit(jax.value_and_grad(loss))(a)


@pytest.mark.parametrize("name", ["scan", "numba", "mosaic_tpu"])
def test_the_same_numbers_under_a_mesh(name):
    if name == "numba":
        pytest.importorskip("llvmlite")
    a = np.linspace(0.4, 0.6, 2, dtype="float32")
    bk.clear_caches()
    with jax.set_mesh(jax.make_mesh((2,), ("lanes",), axis_types=(AxisType.Explicit,))):
        found = gradient(name, a)
    # What was traced under the mesh is in the way of no call without it.
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(gradient(name, a)), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_program_knows_of_no_mesh(mesh):
    """`jnp.where` and `jnp.full_like` write shardings into what is traced under a mesh."""
    scalar = jax.ShapeDtypeStruct((), "float32")

    def made():
        return Program(lambda x: (jnp.where(x > 0, jnp.full_like(x, 2.0) * x, jnp.zeros_like(x)),), [scalar])

    want = made()
    with jax.set_mesh(mesh):
        found = made()
        back = pullback(found, [True])
    assert str(found.jaxpr) == str(want.jaxpr)
    assert str(back.jaxpr) == str(pullback(want, [True]).jaxpr)
    assert not any(eqn.primitive.name == "reshard" for eqn in back.jaxpr.jaxpr.eqns)


def test_a_model_of_brainmass_is_read_under_no_mesh():
    brainmass, brainstate = pytest.importorskip("brainmass"), pytest.importorskip("brainstate")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        with brainstate.environ.context(dt=0.1 * u.ms):
            model = brainmass.WongWangStep(2)
            brainstate.nn.init_all_states(model)
        mesh = jax.make_mesh((2,), ("lanes",), axis_types=(AxisType.Explicit,))
        with jax.set_mesh(mesh):
            fused = bk.fuse(model, 0.1 * u.ms, implementation="scan")
            assert not fused.fallback
            fused.run(1.0 * u.ms, inputs=lambda i, t: (0.3,))
