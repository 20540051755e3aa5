"""Kernels of the haemodynamic response: what blood oxygenation does after a short pulse of activity."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import brainunit as u
import numpy as np

from . import units


@dataclasses.dataclass(frozen=True)
class HRF:
    """A haemodynamic response: a sum of gamma densities of time.

    ``h(t) = sum_k w_k t^(n_k - 1) exp(-t / s_k) / (s_k^n_k Gamma(n_k))`` with weights w, shapes n and scales s.

    Parameters
    ----------
    weights : ``(G,)``, the integral over time of each density's part; a negative one is an undershoot
    shapes : ``(G,)``, from 1 on; a whole one is the response of so many low-passes in a row
    scales : ``(G,)`` times, or one for all
    length : the time after which the kernel is cut off; ``None``, 32 s

    Raises
    ------
    ValueError : lists of unequal lengths, a shape below 1, a scale or a length that is not positive, a wrong unit
    """

    weights: Any
    shapes: Any
    scales: Any
    length: Any = None

    def __post_init__(self):
        weights, shapes = (np.atleast_1d(np.asarray(x, float)) for x in (self.weights, self.shapes))
        scales = np.atleast_1d(np.asarray(units.strip(self.scales, u.second, "scales"), float))
        scales = np.broadcast_to(scales, shapes.shape) if scales.shape == (1,) else scales
        if weights.ndim != 1 or not len(weights) or not weights.shape == shapes.shape == scales.shape:
            raise ValueError(
                f"'weights', 'shapes' and 'scales' got {weights.shape}, {shapes.shape} and {scales.shape}, but take "
                "one value for each gamma density"
            )
        if not np.isfinite(weights).all():
            raise ValueError(f"'weights' got {weights}, but takes finite numbers")
        if not (np.isfinite(shapes) & (shapes >= 1.0)).all():
            raise ValueError(f"'shapes' got {shapes}, but takes numbers from 1 on")
        if not (np.isfinite(scales) & (scales > 0.0)).all():
            raise ValueError(f"'scales' got {scales} s, but takes positive times")
        # Tuples are hashable, as the key of a compiled run must be.
        for name, values in (("weights", weights), ("shapes", shapes), ("scales", scales)):
            object.__setattr__(self, name, tuple(values.tolist()))
        length = 32.0 * u.second if self.length is None else self.length
        object.__setattr__(self, "length", units.positive_time(length, u.second, "length"))

    @classmethod
    def canonical(cls, length: Any = None) -> HRF:
        """The double gamma of SPM: a peak after 5 s (shape 6), and a sixth of it less as undershoot (shape 16).

        Its integral is 1, so that a lasting activity gives a signal of its own size.

        Friston et al. 1998, NeuroImage 7:30-40.
        """
        return cls((1.2, -0.2), (6.0, 16.0), 1.0 * u.second, length)

    @classmethod
    def gamma(cls, shape: float = 3.0, scale: Any = 1.08 * u.second, length: Any = None) -> HRF:
        """One gamma density, without an undershoot.

        Boynton, Engel, Glover and Heeger 1996, Journal of Neuroscience 16:4207-4221, whose 3 and 1.08 s are the
        defaults; their pure delay is left out.
        """
        return cls(1.0, shape, scale, length)

    @classmethod
    def mixture(
        cls, weights: Any = (1.0, -0.4), shapes: Any = (6.0, 13.0), scales: Any = 1.0 * u.second,
        length: Any = None,
    ) -> HRF:  # fmt: skip
        """Several gamma densities; by default the two of The Virtual Brain's ``MixtureOfGammas``."""
        return cls(weights, shapes, scales, length)

    def __call__(self, t) -> np.ndarray:
        """The kernel at times, in 1/s; 0 before the pulse and from ``length`` on.

        Parameters
        ----------
        t : times; plain numbers are seconds
        """
        t = np.asarray(t.to_decimal(u.second) if isinstance(t, u.Quantity) else t, float)
        inside = (t >= 0.0) & (t < self.length)
        total = np.zeros_like(t)
        for weight, shape, scale in zip(self.weights, self.shapes, self.scales):
            with np.errstate(divide="ignore"):
                log = np.log(np.where(inside, t, 1.0) / scale)
            power = 0.0 if shape == 1.0 else (shape - 1.0) * log
            total = total + weight * np.exp(power - np.where(inside, t, 0.0) / scale - math.lgamma(shape)) / scale
        return np.where(inside, total, 0.0)

    def taps(self, interval: float) -> np.ndarray:
        """What each record counts, the newest first: the kernel at whole multiples of ``interval`` seconds, times it.

        Raises
        ------
        ValueError : a kernel shorter than the time between records
        """
        count = math.ceil(self.length / interval - 1e-9)
        if self.length < interval * (1 - 1e-9):
            raise ValueError(
                f"'kernel' got one of {self.length:g} s, shorter than the time between records, {interval:g} s: record "
                "more often (every=)"
            )
        return self(interval * np.arange(count)) * interval
