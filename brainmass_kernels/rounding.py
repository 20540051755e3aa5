"""What varies: records at rest differ by rounding alone, which no statistic should take for a signal."""

from __future__ import annotations

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np

#: Standard deviation of records at rest at most, in units of the last place of their mean: rounding, and what is left
#: of a transient that has nearly gone.
ROUNDING = 16


def at_rest(x):
    """Whether records ``(T, ...)`` do not vary beyond rounding: 16 units in the last place of their mean; ``(...)``."""
    x = _floating(x)
    with np.errstate(invalid="ignore"):
        # The mean of equal numbers is rounded, that of their differences is not.
        moved = x - x[:1]
        mean = moved.mean(0)
        return within(((moved - mean[None]) ** 2).mean(0), x[0] + mean)


def within(variance, mean):
    """Whether a variance, of the same dtype as the mean, is no more than rounding; false of what is not finite."""
    return variance <= (ROUNDING * np.finfo(variance.dtype).eps * mean) ** 2


def centred(x):
    """Records ``(T, ...)`` less their mean, and 0 at rest (`at_rest`); differentiable."""
    x = _floating(x)
    moved = x - jax.lax.stop_gradient(x[:1])
    return jnp.where(at_rest(x)[None], 0.0, moved - jnp.mean(moved, axis=0, keepdims=True))


def _floating(x):
    """A plain array of floating point: NumPy's stays what it is, with all its digits."""
    x = u.get_magnitude(x)
    x = x if isinstance(x, jax.Array) else np.asarray(x)
    return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(float)
