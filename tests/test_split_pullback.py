"""A pullback in two halves: what is kept between them, and that they make the whole."""

import jax
import jax.numpy as jnp
import numpy as np

from brainmass_kernels.pointwise import Program, SplitPullback, pullback

FLOAT = jax.ShapeDtypeStruct((), "float32")


def test_only_floats_are_kept():
    """A kernel keeps them in arrays of its dtype, so that a comparison is made again from what it compares."""

    def step(a, x):
        return (jnp.where(jnp.tanh(a * x) < jnp.sin(x), jnp.exp(x), x * x * a),)

    back = pullback(Program(step, [FLOAT, FLOAT]), [True, True])
    split = SplitPullback(back, [True, False, False], [False, True, False])
    assert {a.dtype.name for a in split.keep.out_avals} == {"float32"}
    x = jnp.linspace(-2.0, 2.0, 9, dtype=jnp.float32)
    a, ct = jnp.float32(0.7), jnp.ones_like(x)
    for got, want in zip(split.back(a, *split.keep(a, x), ct), back(a, x, ct), strict=True):
        np.testing.assert_array_equal(got, want)
