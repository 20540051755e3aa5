"""Records at rest: they differ by rounding errors alone, which are no signal."""

from __future__ import annotations

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np

#: The largest standard deviation of records at rest, in units of the last place of their mean: rounding, and the
#: remainder of a transient.
ROUNDING = 16


def at_rest(x):
    """Whether records ``(T, ...)`` do not vary beyond rounding: 16 units in the last place of their mean; ``(...)``."""
    x = _floating(x)
    with np.errstate(invalid="ignore"):
        # The mean of equal numbers has a rounding error, that of their differences has none.
        moved = x - x[:1]
        mean = moved.mean(0)
        return within(((moved - mean[None]) ** 2).mean(0), x[0] + mean)


def within(variance, mean):
    """Whether a variance, in the dtype of the mean, is no more than rounding; false if one is not finite."""
    return variance <= (ROUNDING * np.finfo(variance.dtype).eps * mean) ** 2


def centred(x):
    """Records ``(T, ...)`` less their mean, and 0 at rest (`at_rest`); differentiable."""
    x = _floating(x)
    moved = x - jax.lax.stop_gradient(x[:1])
    return jnp.where(at_rest(x)[None], 0.0, moved - jnp.mean(moved, axis=0, keepdims=True))


def _floating(x):
    """A plain floating-point array; a NumPy array keeps its precision."""
    x = u.get_magnitude(x)
    x = x if isinstance(x, jax.Array) else np.asarray(x)
    return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(float)
