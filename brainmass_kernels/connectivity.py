"""Statistics of all regions of a network together: covariance, functional connectivity, and its dynamics."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import rounding, units
from .recording import Reduction, Sampling

#: The most products of matrices that are written out one by one.
_WRITTEN = 32


def _outer(x, y):
    """The sum over records of products of regions, ``(n, *batch, C)`` twice to ``(*batch, C, C)``.

    The last axis of the batch has the networks.
    """
    batch, width = x.shape[1:-1], x.shape[-1]
    count = math.prod(batch)
    if batch[-1] != 1 or not 0 < count <= _WRITTEN:
        return jnp.einsum("t...i,t...j->...ij", x, y, precision=lax.Precision.HIGHEST)
    # Of one network, which no mesh splits: XLA for CPUs takes a batch of products an order of magnitude slower.
    pairs = (z.reshape(len(z), count, width) for z in (x, y))
    pairs = zip(*(jnp.moveaxis(z, 1, 0) for z in pairs), strict=True)
    each = [jnp.einsum("ti,tj->ij", one, other, precision=lax.Precision.HIGHEST) for one, other in pairs]
    return jnp.stack(each).reshape(*batch, width, width)


def _moments(x):
    """The mean of records ``(n, ..., C)``, and the sums of products of their distances from it."""
    mean = x.mean(0)
    moved = x - mean[None]
    # What the rounding of the mean leaves (Chan, Golub and LeVeque 1983, The American Statistician 37:242).
    left = moved.mean(0)
    return mean + left, _outer(moved, moved) - len(x) * left[..., :, None] * left[..., None, :]


def _correlations(products, count, mean):
    """Pearson's correlation from sums of products about the mean; 0 for a region at rest (`rounding.at_rest`)."""
    power = jnp.einsum("...ii->...i", products)
    moves = (power > 0) & ~rounding.within(power / count, mean)
    scale = jnp.where(moves, 1.0 / jnp.sqrt(jnp.where(moves, power, 1.0)), 0.0)
    return products * scale[..., :, None] * scale[..., None, :]


@dataclasses.dataclass(frozen=True)
class Covariance(Reduction):
    """The covariance of each pair of regions over the records, ``(*networks, N, N)``; ``N`` are sensors of a readout.

    The mean product of distances from the means, ``numpy.cov(x.T, bias=True)`` of the stored records. Records are
    merged block by block about the mean of each, so a large offset costs no digits.

    Raises
    ------
    ValueError : a model without a network, or of one region; fewer than two records
    """

    across = True

    def check(self, sampling):
        name = type(self).__name__
        if sampling.channels < 2:
            what = "a network of one region" if sampling.channels else "a model without a network"
            raise ValueError(
                f"'record' got {name} of {what}, but {name} is of the pairs of two regions or more: simulate a "
                "bk.Network"
            )
        if sampling.count < 2:
            raise ValueError(f"{name} needs two records or more, and this run has {sampling.count}")

    def unit(self, unit):
        return unit**2

    def size(self, sampling):
        return sampling.channels + 2

    def start(self, like, sampling):
        mean = like.reshape(-1, sampling.channels) * 0
        return mean[..., None] * mean[..., None, :], mean, mean

    def add(self, carry, x, first, sampling):
        products, mean, origin = carry
        x = x.reshape(len(x), *mean.shape)
        origin = lax.stop_gradient(jnp.where(first == 0, x[0], origin))
        block, own = _moments(x - origin[None])
        n = jnp.asarray(first, x.dtype)
        apart, share = block - mean, len(x) / (n + len(x))
        between = apart[..., :, None] * apart[..., None, :] * (n * share)
        return products + own + between, mean + apart * share, origin

    def finish(self, carry, sampling):
        return _rows(carry[0] / sampling.count)


@dataclasses.dataclass(frozen=True)
class Correlation(Covariance):
    """Functional connectivity: Pearson's correlation of each pair of regions, ``(*networks, N, N)``.

    ``numpy.corrcoef(x.T)`` of the stored records; 0 for a region at rest, whose records differ by rounding alone
    (`spectra.correlation`), its own diagonal included.

    Raises
    ------
    ValueError : a model without a network, or of one region; fewer than two records
    """

    def unit(self, unit):
        return units.UNITLESS

    def finish(self, carry, sampling):
        products, mean, origin = carry
        return _rows(_correlations(products, sampling.count, origin + mean))


def _rows(matrices):
    """Matrices ``(networks, C, C)`` as ``(C, networks * C)``, whose last axis a run's lanes could be."""
    return jnp.moveaxis(matrices, 0, 1).reshape(matrices.shape[-1], -1)


@dataclasses.dataclass(frozen=True)
class FCD(Reduction):
    """Functional connectivity dynamics: how alike the functional connectivity of two times is, ``(*networks, W, W)``.

    The correlation, over all pairs of regions, of the functional connectivity in one window with that in another.
    Window ``i`` holds the ``window`` of records from ``i step`` on, and no others; windows that the run ends in are
    left out. Memory grows with the windows, not with the records in them. A window in which a region rests has
    correlations of 0 for it; one in which all regions rest has an FCD of 0.

    Parameters
    ----------
    window, step : times, whole multiples of that between records

    Raises
    ------
    ValueError : other times, a window of fewer than two records, a run of fewer than two windows; a model without a
        network, or of fewer than three regions

    Hansen, Battaglia, Spiegler, Deco and Jirsa 2015, NeuroImage 105:525-535.
    """

    window: Any
    step: Any
    across = True

    def __post_init__(self):
        for name in ("window", "step"):
            object.__setattr__(self, name, units.positive_time(getattr(self, name), u.second, name))

    def check(self, sampling):
        if sampling.channels < 3:
            what = f"a network of {sampling.channels}" if sampling.channels else "a model without a network"
            raise ValueError(f"'record' got FCD of {what}, but FCD takes three regions or more: simulate a bk.Network")
        inside, step = (sampling.records_of(getattr(self, name), name) for name in ("window", "step"))
        if inside < 2:
            raise ValueError(f"'window' got {self.window:g} s, one record, but takes two or more")
        if self.windows(sampling) < 2:
            raise ValueError(
                f"'step' got {self.step:g} s, which leaves one window of {self.window:g} s in the "
                f"{sampling.count * sampling.interval:g} s recorded, but FCD takes two or more ({step} records a step)"
            )

    def unit(self, unit):
        return units.UNITLESS

    def _records(self, sampling: Sampling) -> tuple[int, int]:
        return round(self.window / sampling.interval), round(self.step / sampling.interval)

    def windows(self, sampling: Sampling) -> int:
        """How many windows a run has."""
        inside, step = self._records(sampling)
        return (sampling.count - inside) // step + 1

    def sides(self, ts, sampling):
        """The last time of each window."""
        inside, step = self._records(sampling)
        return "window", ts[inside - 1 :: step]

    def multiple(self, sampling):
        return self._records(sampling)[1]

    def _pieces(self, sampling: Sampling) -> tuple[int, ...]:
        """The records of each piece of a step; windows begin and end where pieces do."""
        inside, step = self._records(sampling)
        left = inside % step
        if inside < step:
            return (left,)  # the others are in no window
        return (left, step - left) if left else (step,)

    def _of_window(self, sampling: Sampling) -> np.ndarray:
        """The records of each piece of a window, one after the other."""
        inside, step = self._records(sampling)
        pieces = self._pieces(sampling)
        return np.array([*pieces * (inside // step), *([inside % step] if inside % step else [])])

    def _rows(self, sampling: Sampling) -> int:
        """The pieces of a run, in steps that are whole or not."""
        return -(-sampling.count // self._records(sampling)[1]) * len(self._pieces(sampling))

    def size(self, sampling):
        per_window = (sampling.channels + 1) // 2 + 1
        return (self._rows(sampling)) * (sampling.channels + 1) + self.windows(sampling) * per_window + 1

    def start(self, like, sampling):
        mean = like.reshape(-1, sampling.channels) * 0
        means = jnp.broadcast_to(mean, (self._rows(sampling), *mean.shape))
        return means[..., None] * means[..., None, :], means, mean

    def add(self, carry, x, first, sampling):
        products, means, origin = carry
        _, step = self._records(sampling)
        x = x.reshape(len(x), *origin.shape)
        origin = lax.stop_gradient(jnp.where(first == 0, x[0], origin))
        x = x - origin[None]
        edges, whole = np.cumsum([0, *self._pieces(sampling)]), len(x) // step
        each, left = len(edges) - 1, x[whole * step :]
        row = first // step * each
        if whole:
            steps = jnp.moveaxis(x[: whole * step].reshape(whole, step, *x.shape[1:]), 1, 0)
            pieces = [_moments(steps[begin:end]) for begin, end in itertools.pairwise(edges)]
            means, products = _put((means, products), _interleaved(pieces), row)
        if len(left) >= edges[1]:
            # Of the step that the run ends in, what may be the end of a window.
            means, products = _put(
                (means, products), _interleaved([_moments(left[: edges[1], None])]), row + whole * each
            )
        return products, means, origin

    def finish(self, carry, sampling):
        products, means, origin = carry
        counts, each, inside = self._of_window(sampling), len(self._pieces(sampling)), self._records(sampling)[0]
        above = np.triu_indices(sampling.channels, 1)

        @functools.partial(jax.checkpoint, prevent_cse=False)
        def connectivity(number):
            own = lax.dynamic_slice_in_dim(products, number * each, len(counts)).sum(0)
            centres = lax.dynamic_slice_in_dim(means, number * each, len(counts))
            weights = jnp.asarray(counts, means.dtype)
            mean = jnp.einsum("p,p...->...", weights / inside, centres, precision=lax.Precision.HIGHEST)
            apart = centres - mean[None]
            own = own + _outer(apart * weights[:, None, None], apart)
            return _correlations(own, inside, origin + mean)[..., above[0], above[1]]

        numbers = jnp.arange(self.windows(sampling), dtype=jnp.int32)
        return _rows(alike(jnp.moveaxis(lax.map(connectivity, numbers), 0, 1)))


def _put(arrays, values, row):
    """Arrays with the values from a row on."""
    return tuple(lax.dynamic_update_slice_in_dim(x, y, row, 0) for x, y in zip(arrays, values, strict=True))


def _interleaved(moments):
    """Moments of the first piece of each step, of the second, ...: as one list, in the order of time."""
    return tuple(jnp.stack(parts, 1).reshape(-1, *parts[0].shape[1:]) for parts in zip(*moments))


def alike(vectors):
    """The correlation of each pair of vectors, ``(..., W, P)`` to ``(..., W, W)``; 0 for a constant one."""
    _, products = _moments(jnp.moveaxis(vectors, -1, 0))
    return _correlations(products, vectors.shape[-1], vectors.mean(-1))


def fcd(x, dt, window, step):
    """Functional connectivity dynamics of a stored signal: what `FCD` computes within a run.

    Parameters
    ----------
    x : ``(T, ..., N)``, time first and regions last
    dt : the time from one sample to the next; a plain number is seconds
    window, step : times, whole multiples of ``dt``; plain numbers are seconds

    Returns
    -------
    ``(..., W, W)``, the correlation of the functional connectivities of two windows, differentiable

    Raises
    ------
    ValueError : times that are no whole multiples, fewer than two windows, fewer than three regions
    """
    x = jnp.asarray(u.get_magnitude(x))
    if x.ndim < 2:
        raise ValueError(f"'x' got shape {x.shape}, but takes (T, ..., N), time first and regions last")
    seconds = [value if isinstance(value, u.Quantity) else value * u.second for value in (dt, window, step)]
    interval = units.positive_time(seconds[0], u.second, "dt")
    what, sampling = FCD(*seconds[1:]), Sampling(len(x), interval, len(x), x.shape[-1])
    if sampling.channels < 3:
        raise ValueError(f"'x' got {sampling.channels} regions, but fcd takes three or more")
    what.check(sampling)
    flat = x.reshape(len(x), -1)
    found = what.finish(what.add(what.start(flat[0], sampling), flat, 0, sampling), sampling)
    windows = len(found)
    return jnp.moveaxis(found.reshape(windows, *x.shape[1:-1], windows), 0, -2)
