"""Unconstrained positions: the smooth map from a real number to a parameter, and the prior there."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np

from ..fitting.problem import Free
from .priors import LEAST_MASS, Beta, Prior


@dataclasses.dataclass(frozen=True)
class Position(Free):
    """A parameter as a function of a real number z, with its prior.

    Between finite bounds the map is that of `Free`. Without them it is ``scale * exp(width * z)`` for what is positive,
    and ``centre + width * z`` for what may be any number, in the numbers of the prior: z has a spread near 1.

    Attributes
    ----------
    low, high : of the support, plain numbers in ``unit``; infinite without bounds
    prior : in plain numbers of ``unit``
    subjects : targets that each have a value of their own, the last axis of z; ``None``, one value
    """

    prior: Prior
    subjects: int | None = None

    @classmethod
    def of(cls, name: str, prior: Prior, unit, bounds, natural: tuple[float, float], argument: str) -> Position:
        """A parameter within its bounds, or else within the support of its prior.

        Raises
        ------
        ValueError : a prior that does not cover the bounds, or that needs bounds and has none
        """
        prior = prior.plain(unit, name)
        low, high = prior.within(*natural) if bounds is None else bounds
        least, most = prior.support
        what = f"{argument} got {prior} for {name!r}"
        if not low < high:
            raise ValueError(f"{what}, which is nowhere between {natural[0]:g} and {natural[1]:g}, where it may be")
        if isinstance(prior, Beta) and not math.isfinite(high - low):
            raise ValueError(f"{what}, which takes bounds: give them in 'free', as (low, high)")
        if low < least or high > most:
            raise ValueError(
                f"{what}, which is 0 beyond {least:g} to {most:g} and does not cover the bounds {low:g} to {high:g}: "
                "take narrower bounds in 'free', or None, for the prior's own support"
            )
        if prior.mass(low, high) < LEAST_MASS:
            raise ValueError(
                f"{what}, of whose mass the bounds {low:g} to {high:g} have {prior.mass(low, high):.2g}: take bounds "
                "in 'free' that cover it, or None, for the prior's own support"
            )
        return cls(name, float(low), float(high), unit, prior)

    @property
    def bounded(self) -> bool:
        return math.isfinite(self.low) and math.isfinite(self.high)

    @property
    def positive(self) -> bool:
        return self.low == 0 and math.isinf(self.high)

    def value(self, z):
        if self.bounded:
            return super().value(z)
        if self.positive:
            return self.prior.scale_of_z * jnp.exp(self.prior.log_width_of_z * z)
        return self.prior.centre_of_z + self.prior.scale_of_z * z

    def log_slope(self, z):
        """The logarithm of the derivative of `value`."""
        if self.bounded:
            inner = jax.nn.log_sigmoid(z) + jax.nn.log_sigmoid(-z)
            if self.geometric:
                return jnp.log(self.value(z)) + math.log(math.log(self.high / self.low)) + inner
            return math.log(self.high - self.low) + inner
        if self.positive:
            return self.prior.log_width_of_z * z + math.log(self.prior.scale_of_z * self.prior.log_width_of_z)
        return jnp.full_like(z, math.log(self.prior.scale_of_z))

    def log_prior(self, z):
        """The log density of z: that of the value, and of the change of variables."""
        if isinstance(self.prior, Beta):
            density = self.prior.log_prob_of(*self._log_parts(z)) - math.log(self.high - self.low)
        else:
            # Rounding may put a value beside the bounds, where it is still a value of z.
            density = self.prior.log_prob(jnp.clip(self.value(z), *self.prior.support), self.low, self.high)
        return density + self.log_slope(z)

    def _log_parts(self, z):
        """The logarithms of the position between the bounds, and of what is left to 1."""
        if not self.geometric:
            return jax.nn.log_sigmoid(z), jax.nn.log_sigmoid(-z)
        ratio = math.log(self.high / self.low)
        whole = math.log(math.expm1(ratio))
        part = jnp.log(jnp.expm1(ratio * jax.nn.sigmoid(z))) - whole
        return part, jnp.log(-jnp.expm1(-ratio * jax.nn.sigmoid(-z))) + ratio - whole

    def of_value(self, value):
        """z of values, plain numbers in ``unit``; those at the bounds are moved inwards by rounding."""
        if self.bounded:
            if self.geometric:
                part = jnp.log(value / self.low) / math.log(self.high / self.low)
            else:
                part = (value - self.low) / (self.high - self.low)
            least = float(jnp.finfo(jnp.result_type(float)).eps)
            part = jnp.clip(part, least, 1 - least)
            return jnp.log(part) - jnp.log1p(-part)
        if self.positive:
            return jnp.log(value / self.prior.scale_of_z) / self.prior.log_width_of_z
        return (value - self.prior.centre_of_z) / self.prior.scale_of_z

    def rows(self, z):
        """z ``(B,)`` or ``(B, subjects)`` as a `Problem` takes it: ``(1, B)`` or ``(subjects, B)``."""
        return z[None] if self.subjects is None else z.T

    def summed(self, log_density):
        """The sum over subjects."""
        return log_density if self.subjects is None else jnp.sum(log_density, -1)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one position."""
        return () if self.subjects is None else (self.subjects,)

    @property
    def spread(self) -> tuple[float, Any]:
        """What a spread of 1 in z is, and its unit.

        Without bounds that is a width in ``unit``, or of the logarithm where the parameter is positive; between bounds
        a number of the logit.
        """
        if self.bounded:
            return 1.0, u.UNITLESS
        return (self.prior.log_width_of_z, u.UNITLESS) if self.positive else (self.prior.scale_of_z, self.unit)

    def sample(self, key, shape: tuple[int, ...]):
        """z of draws from the prior."""
        return self.of_value(self.prior.sample(key, shape, self.low, self.high))

    def attached(self, z):
        """The parameter with its unit."""
        value = self.value(z)
        return value if self.unit.is_unitless else u.Quantity(value, unit=self.unit)

    def outside_support(self, value):
        """Whether a value has no position, but for rounding at a bound."""
        if self.bounded:
            return self.outside(value)
        return ~(jnp.isfinite(value) & (value > self.low))


@dataclasses.dataclass(frozen=True)
class Member(Position):
    """A parameter of each subject of a group, whose z is how many spreads a subject lies from the group's mean.

    So z is a standard normal whatever the spread is (the non-centred form), which samplers follow where few data say
    how large that is. `placed` is the position of the value.
    """

    @property
    def mean_name(self) -> str:
        return f"{self.name}.group"

    @property
    def spread_name(self) -> str:
        return f"{self.name}.spread"

    def placed(self, z, mean, spread):
        """The positions ``(..., n)`` of subjects, of the position ``(...)`` of the mean and the value of the spread."""
        z, mean, spread = self._alike(z, mean, spread)
        return mean + spread / self.spread[0] * z

    def apart(self, placed, mean, spread):
        """z, the inverse of `placed`."""
        placed, mean, spread = self._alike(placed, mean, spread)
        return (placed - mean) / spread * self.spread[0]

    def _alike(self, own, mean, spread):
        own, mean, spread = (jnp.asarray(x) for x in (own, mean, spread))
        shape = np.broadcast_shapes(own.shape[:-1], mean.shape, spread.shape)
        whole = (*shape, *self.shape)
        mean, spread = (jnp.broadcast_to(broadcast(x, shape)[..., None], whole) for x in (mean, spread))
        return broadcast(own, whole), mean, spread

    def log_prior(self, z):
        return -0.5 * z**2 - 0.5 * math.log(2 * math.pi)

    def sample(self, key, shape):
        return jax.random.normal(key, shape)


def broadcast(x, shape: tuple[int, ...]):
    """Also where JAX is told not to promote ranks."""
    return jnp.broadcast_to(x.reshape((1,) * (len(shape) - x.ndim) + x.shape), shape)
