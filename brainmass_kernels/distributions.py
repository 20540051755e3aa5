"""How far two distributions of numbers are apart, such as those of functional connectivities in time."""

from __future__ import annotations

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np

from . import units


def pairs(matrix):
    """The values of a symmetric matrix above its diagonal, each pair once: ``(..., N, N)`` to ``(..., N (N - 1) / 2)``.

    Raises
    ------
    ValueError : no square matrix, or one of fewer than two rows
    """
    shape = np.shape(u.get_magnitude(matrix))
    if len(shape) < 2 or shape[-1] != shape[-2] or shape[-1] < 2:
        raise ValueError(f"'matrix' got shape {shape}, but takes (..., N, N) of two rows or more")
    above = np.triu_indices(shape[-1], 1)
    return matrix[..., above[0], above[1]]


def ks_distance(a, b):
    """The Kolmogorov-Smirnov distance of two sets of numbers: the largest difference of their distribution functions.

    Of matrices, such as two FCDs, take the values of each pair first: ``ks_distance(pairs(fcd), pairs(other))``.

    Parameters
    ----------
    a, b : ``(..., n)`` and ``(..., m)``, whose leading axes broadcast; of one unit

    Returns
    -------
    ``(...)``, from 0 to 1; NaN where a number is

    Raises
    ------
    ValueError : no numbers, units that differ, axes that do not broadcast
    TypeError : when a gradient is asked for, which a count has none of: `wasserstein` has one

    Equal to the statistic of ``scipy.stats.ks_2samp``.
    """
    values, apart, _ = _compared(_counted(a), _counted(b))
    # Equal numbers are passed together.
    last = jnp.concatenate([values[..., 1:] != values[..., :-1], jnp.ones_like(values[..., :1], bool)], -1)
    distance = jnp.max(jnp.where(last, jnp.abs(apart), 0.0), axis=-1)
    return jnp.where(jnp.isnan(values).any(-1), jnp.nan, distance)


def wasserstein(a, b):
    """The earth mover's distance of two sets of numbers: the area between their distribution functions.

    Of matrices, such as two FCDs, take the values of each pair first: ``wasserstein(pairs(fcd), pairs(other))``.

    Parameters
    ----------
    a, b : ``(..., n)`` and ``(..., m)``, whose leading axes broadcast; of one unit

    Returns
    -------
    ``(...)``, in the unit of the numbers, differentiable in both; NaN where a number is

    Raises
    ------
    ValueError : no numbers, units that differ, axes that do not broadcast

    Equal to ``scipy.stats.wasserstein_distance``.
    """
    values, apart, unit = _compared(a, b)
    area = jnp.sum(jnp.diff(values, axis=-1) * jnp.abs(apart[..., :-1]), axis=-1)
    return area if unit.is_unitless else u.Quantity(area, unit=unit)


def _compared(a, b):
    """All numbers in rising order, and the difference of the two distribution functions from each to the next."""
    a, b, unit = _of_one_unit(a, b)
    n, m = a.shape[-1], b.shape[-1]
    try:
        batch = np.broadcast_shapes(a.shape[:-1], b.shape[:-1])
    except ValueError:
        raise ValueError(
            f"'a' and 'b' got shapes {a.shape} and {b.shape}, whose leading axes do not broadcast"
        ) from None
    both = jnp.concatenate([jnp.broadcast_to(a, (*batch, n)), jnp.broadcast_to(b, (*batch, m))], -1)
    order = jnp.argsort(both, axis=-1)
    of_a = jnp.cumsum(order < n, axis=-1)
    of_b = jnp.broadcast_to(jnp.arange(1, n + m + 1, dtype=of_a.dtype), of_a.shape) - of_a
    apart = of_a.astype(both.dtype) / n - of_b.astype(both.dtype) / m
    return jnp.take_along_axis(both, order, -1), apart, unit


def _of_one_unit(a, b):
    unit = u.get_unit(a)
    values = [jnp.asarray(units.strip(u.math.asarray(x), unit, name)) for name, x in zip("ab", (a, b))]
    for name, x in zip("ab", values):
        if not x.ndim or not x.shape[-1]:
            raise ValueError(f"'{name}' got shape {x.shape}, but takes numbers (..., n)")
    # The widest, whatever promotion mode a user has set.
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.result_type(*values, jnp.float32)
    return values[0].astype(dtype), values[1].astype(dtype), unit


@jax.custom_jvp
def _counted(x):
    """The numbers, of which only an order is used."""
    return x


@_counted.defjvp
def _no_gradient(primals, tangents):
    raise TypeError(
        "a gradient was asked for through spectra.ks_distance, which counts and has no derivative: "
        "spectra.wasserstein has one"
    )
