"""What varies: records at rest differ by rounding alone, which no statistic should take for a signal."""

from __future__ import annotations

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np

#: How many units in its last place a record at rest may move.
ROUNDING = 32


def at_rest(x):
    """Whether records ``(T, ...)`` do not vary beyond rounding: 32 units in the last place of the first; ``(...)``."""
    x = _floating(x)
    with np.errstate(invalid="ignore"):
        return within(abs(x - x[:1]).max(0), x[0])


def within(reach, origin):
    """Whether a distance from ``origin``, of the same dtype, is no more than rounding; false of what is not finite."""
    return reach <= ROUNDING * np.finfo(reach.dtype).eps * abs(origin)


def centred(x):
    """Records ``(T, ...)`` less their mean, and 0 at rest (`at_rest`); differentiable."""
    x = _floating(x)
    # The mean of equal numbers is rounded, that of their differences is not.
    moved = x - jax.lax.stop_gradient(x[:1])
    return jnp.where(at_rest(x)[None], 0.0, moved - jnp.mean(moved, axis=0, keepdims=True))


def _floating(x):
    """A plain array of floating point: NumPy's stays what it is, with all its digits."""
    x = u.get_magnitude(x)
    x = x if isinstance(x, jax.Array) else np.asarray(x)
    return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(float)
