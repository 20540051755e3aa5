"""Functional connectivity dynamics as a target: how its values are distributed."""

from __future__ import annotations

import dataclasses
from typing import Any

import brainunit as u
import jax.numpy as jnp
import numpy as np

from .. import units
from ..connectivity import FCD
from ..distributions import pairs
from .targets import Comparison, Target, addressable, recorded_network, unchecked

# Where distributions are compared.
LEVELS = np.linspace(0.0, 1.0, 101)


@dataclasses.dataclass(frozen=True, eq=False)
class ConnectivityDynamics(Target):
    """Functional connectivity dynamics of a network to fit, by the distribution of its values.

    The times of two recordings at rest do not correspond, so their matrices are not compared entry by entry. The
    residuals are the differences of 101 quantiles, from the least value to the largest; their rms is the
    2-Wasserstein distance of the two distributions. `spectra.ks_distance` of a fit has no gradient and is no target.

    Attributes
    ----------
    values : ``(W, W)`` or ``(n, W, W)``, as `spectra.fcd` or `FCD` gives it; the diagonal does not count
    window, step : times, of the simulation's `FCD`: those of the data
    sigma : standard deviation of the noise in a quantile, which weighs the data against priors
    name : for tables

    Raises
    ------
    ValueError : another shape, values beyond -1 and 1 or not finite

    Hansen, Battaglia, Spiegler, Deco and Jirsa 2015, NeuroImage 105:525-535.
    """

    values: Any
    window: Any
    step: Any
    sigma: float = 0.1
    name: str = "connectivity dynamics"

    def __post_init__(self):
        object.__setattr__(self, "values", addressable(self.values))
        values, _ = np.asarray(u.get_magnitude(self.values), float), self.seconds
        if values.ndim not in (2, 3) or values.shape[-1] != values.shape[-2] or values.shape[-1] < 3:
            raise ValueError(
                f"'values' of {self.name} got shape {values.shape}, but takes (W, W) or (n, W, W) of three windows or "
                "more"
            )
        each = np.asarray(pairs(values))
        if not (np.abs(each) <= 1.0 + 1e-6).all():
            raise ValueError(f"'values' of {self.name} got {each.min():g} to {each.max():g}, but takes correlations")

    @property
    def seconds(self) -> tuple[float, float]:
        """The window and the step."""
        times = (("window", self.window), ("step", self.step))
        window, step = (units.positive_time(x, u.second, name) for name, x in times)
        return window, step

    def comparison(self, model, record, options, band, background):
        """How `fit` compares runs with it."""
        regions, _, _ = recorded_network(self, model, record, options)
        return OfDynamics(self, record, regions)


class OfDynamics(Comparison):
    """Quantiles of functional connectivity dynamics."""

    def __init__(self, target: ConnectivityDynamics, record: str, regions: int | None):
        values = np.asarray(u.get_magnitude(target.values), float)
        values = values[None] if values.ndim == 2 else values
        if regions is None:
            raise ValueError(f"'target' got {target.name}, but what is fitted is one mass: it takes a bk.Network")
        self.target, self.record, self.name = target, record, target.name
        self.count, self.sigma = len(values), float(target.sigma)
        self.data = np.moveaxis(np.quantile(np.asarray(pairs(values)), LEVELS, axis=-1), 0, -1)[:, None]
        self.windows = target.seconds
        self.settings = {"record": record, "windows": list(self.windows), "sigma": self.sigma}

    def axis_of(self, record):
        return 0

    @property
    def records(self):
        window, step = self.windows
        return FCD(window * u.second, step * u.second, of=self.record)

    @property
    def width(self):
        return len(LEVELS)

    def read(self):
        return OfDynamics, self.record, self.windows, self.count, self.sigma

    def copies(self, realisations):
        return 3.0

    def predict(self, result):
        # (n, starts, R, W, W): the values of all realisations together.
        values = pairs(u.get_mantissa(result[self.record]))
        values = values.reshape(*values.shape[:2], -1)
        return jnp.moveaxis(jnp.quantile(values, jnp.asarray(LEVELS, values.dtype), axis=-1), 0, -1)

    def residuals(self, prediction, data):
        return prediction - data.astype(prediction.dtype), {}

    def like_target(self, prediction, nuisances, lane) -> ConnectivityDynamics:
        """Of its values the quantiles."""
        window, step = self.target.window, self.target.step
        quantiles = np.asarray(prediction, float)[lane]
        return unchecked(ConnectivityDynamics, values=quantiles, window=window, step=step, sigma=self.sigma)

    def same(self, other) -> bool:
        return isinstance(other, ConnectivityDynamics) and np.array_equal(
            np.asarray(u.get_magnitude(other.values)), np.asarray(u.get_magnitude(self.target.values))
        )
