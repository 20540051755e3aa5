"""What is known of a parameter before the data: densities on their support, normalised within bounds."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, TypeVar

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np

from ..units import strip

#: Less mass than this within bounds is a mistake, and more than float32 can sample from.
LEAST_MASS = 1e-6

P = TypeVar("P", bound="Prior")


@dataclasses.dataclass(frozen=True)
class Prior:
    """The density of one parameter. Each kind below has its fields, in the parameter's unit or as plain numbers."""

    #: The fields that have the parameter's unit.
    dimensional: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            number = np.asarray(u.get_magnitude(value))
            if number.ndim or number.dtype.kind not in "fiu" or not np.isfinite(number):
                raise ValueError(f"'{field.name}' of {type(self).__name__} got {value}, but takes a finite number")
        self._check()

    def _check(self) -> None:
        raise NotImplementedError

    def _positive(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if not u.get_magnitude(value) > 0:
                raise ValueError(f"'{name}' of {type(self).__name__} got {value}, but takes a positive number")

    @property
    def unit(self) -> Any:
        """The unit of the parameter, as the fields have it."""
        every = (u.get_unit(getattr(self, name)) for name in self.dimensional)
        return next(every, u.UNITLESS)

    def plain(self: P, unit, name: str) -> P:
        """The same prior in plain numbers of ``unit``; fields without a unit are in it already.

        Raises
        ------
        ValueError : another dimension, naming the parameter
        """
        fields = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in self.dimensional:
                value = value if isinstance(value, u.Quantity) else u.Quantity(value, unit=unit)
                value = strip(value, unit, f"priors: {name}")
            fields[field.name] = float(value)
        return type(self)(**fields)

    @property
    def support(self) -> tuple[float, float]:
        """Where the density is positive, plain numbers in `unit`."""
        return -math.inf, math.inf

    def mass(self, low: float, high: float) -> float:
        """The probability of an interval within the support."""
        raise NotImplementedError

    def log_prob(self, value, low: float = -math.inf, high: float = math.inf):
        """The log density of values within an interval, per `unit`, normalised there.

        Parameters
        ----------
        value : with a unit, or plain numbers in `unit`; any shape
        low, high : plain numbers in `unit`
        """
        value = strip(value, self.unit, "value") if isinstance(value, u.Quantity) else value
        return self._log_density(value) - math.log(self.mass(*self.within(low, high)))

    def within(self, low: float, high: float) -> tuple[float, float]:
        """The part of an interval where the density is positive."""
        least, most = self.support
        return max(low, least), min(high, most)

    def _log_density(self, value):
        raise NotImplementedError

    def sample(self, key, shape: tuple[int, ...] = (), low: float = -math.inf, high: float = math.inf):
        """Draws within an interval, plain numbers in `unit`."""
        raise NotImplementedError

    def quantile(self, p, low: float = -math.inf, high: float = math.inf) -> np.ndarray:
        """The values below which these parts of the mass within an interval lie, plain float64 numbers in `unit`.

        Parameters
        ----------
        p : from 0 to 1, any shape
        low, high : plain numbers in `unit`
        """
        raise NotImplementedError

    #: What an unconstrained position is relative to: a value ``centre + scale * z`` or ``scale * exp(log_width * z)``.
    centre_of_z: ClassVar[float] = 0.0

    @property
    def scale_of_z(self) -> float:
        return 1.0

    @property
    def log_width_of_z(self) -> float:
        return 1.0


@dataclasses.dataclass(frozen=True)
class Normal(Prior):
    """A Gaussian.

    Attributes
    ----------
    centre, width : mean and standard deviation, in the parameter's unit
    """

    centre: Any
    width: Any

    dimensional = ("centre", "width")

    def _check(self):
        self._positive("width")

    @property
    def _numbers(self) -> tuple[float, float]:
        return _in(self.unit, self.centre), _in(self.unit, self.width)

    def mass(self, low, high):
        centre, width = self._numbers
        return _normal_mass((low - centre) / width, (high - centre) / width)

    def _log_density(self, value):
        centre, width = self._numbers
        return -0.5 * ((value - centre) / width) ** 2 - math.log(width * math.sqrt(2 * math.pi))

    def sample(self, key, shape=(), low=-math.inf, high=math.inf):
        centre, width = self._numbers
        return centre + width * _truncated(key, (low - centre) / width, (high - centre) / width, shape)

    def quantile(self, p, low=-math.inf, high=math.inf):
        centre, width = self._numbers
        return np.clip(centre + width * _normal_quantile(p, (low - centre) / width, (high - centre) / width), low, high)

    @property
    def centre_of_z(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._numbers[0]

    @property
    def scale_of_z(self):
        return self._numbers[1]


@dataclasses.dataclass(frozen=True)
class LogNormal(Prior):
    """A Gaussian of the logarithm.

    Attributes
    ----------
    median : in the parameter's unit
    width : standard deviation of the natural logarithm, a plain number; 0.1 is about 10%
    """

    median: Any
    width: float

    dimensional = ("median",)

    def _check(self):
        self._positive("median", "width")

    @property
    def support(self):
        return 0.0, math.inf

    def _standard(self, value: float) -> float:
        log = -math.inf if value <= 0 else math.log(value) if value < math.inf else math.inf
        return (log - math.log(self.scale_of_z)) / self.width

    def mass(self, low, high):
        return _normal_mass(self._standard(low), self._standard(high))

    def _log_density(self, value):
        log = jnp.log(value)
        return (
            -0.5 * ((log - math.log(self.scale_of_z)) / self.width) ** 2
            - log
            - math.log(self.width * math.sqrt(2 * math.pi))
        )

    def sample(self, key, shape=(), low=-math.inf, high=math.inf):
        z = _truncated(key, self._standard(low), self._standard(high), shape)
        return self.scale_of_z * jnp.exp(self.width * z)

    def quantile(self, p, low=-math.inf, high=math.inf):
        z = _normal_quantile(p, self._standard(low), self._standard(high))
        return np.clip(self.scale_of_z * np.exp(self.width * z), low, high)

    @property
    def scale_of_z(self):
        return float(u.get_magnitude(self.median))

    @property
    def log_width_of_z(self):
        return float(self.width)


@dataclasses.dataclass(frozen=True)
class HalfNormal(Prior):
    """The absolute value of a Gaussian about 0, for what is positive and may be small, as a standard deviation.

    Attributes
    ----------
    width : standard deviation of the Gaussian, in the parameter's unit
    """

    width: Any

    dimensional = ("width",)

    def _check(self):
        self._positive("width")

    @property
    def support(self):
        return 0.0, math.inf

    def mass(self, low, high):
        return 2 * _normal_mass(low / self.scale_of_z, high / self.scale_of_z)

    def _log_density(self, value):
        return -0.5 * (value / self.scale_of_z) ** 2 + math.log(2 / (self.scale_of_z * math.sqrt(2 * math.pi)))

    def sample(self, key, shape=(), low=-math.inf, high=math.inf):
        low, high = self.within(low, high)
        return self.scale_of_z * _truncated(key, low / self.scale_of_z, high / self.scale_of_z, shape)

    def quantile(self, p, low=-math.inf, high=math.inf):
        low, high = self.within(low, high)
        z = _normal_quantile(p, low / self.scale_of_z, high / self.scale_of_z)
        return np.clip(self.scale_of_z * z, low, high)

    @property
    def scale_of_z(self):
        return float(u.get_magnitude(self.width))


@dataclasses.dataclass(frozen=True)
class Uniform(Prior):
    """The same density everywhere between two values.

    Attributes
    ----------
    low, high : in the parameter's unit
    """

    low: Any
    high: Any

    dimensional = ("low", "high")

    def _check(self):
        low, high = self.support
        if not low < high:
            raise ValueError(f"Uniform got low = {self.low} and high = {self.high}, but takes low < high")

    @property
    def support(self):
        return _in(self.unit, self.low), _in(self.unit, self.high)

    def mass(self, low, high):
        least, most = self.support
        return (high - low) / (most - least)

    def _log_density(self, value):
        least, most = self.support
        inside = (value >= least) & (value <= most)
        return jnp.where(inside, -math.log(most - least), -jnp.inf)

    def sample(self, key, shape=(), low=-math.inf, high=math.inf):
        low, high = self.within(low, high)
        return jax.random.uniform(key, shape, minval=low, maxval=high)

    def quantile(self, p, low=-math.inf, high=math.inf):
        low, high = self.within(low, high)
        return np.clip(low + (high - low) * np.asarray(p, float), low, high)


@dataclasses.dataclass(frozen=True)
class Beta(Prior):
    """A beta density stretched over the bounds, which it needs; 1, 1 is uniform, 2, 2 a hill.

    Attributes
    ----------
    a, b : exponents, positive plain numbers; the mean is at ``a / (a + b)`` of the way from the lower bound
    """

    a: float
    b: float

    def _check(self):
        self._positive("a", "b")

    def mass(self, low, high):
        return 1.0

    def log_prob(self, value, low=-math.inf, high=math.inf):
        self._check_bounds(low, high)
        part = (value - low) / (high - low)
        return self.log_prob_of(jnp.log(part), jnp.log1p(-part)) - math.log(high - low)

    def log_prob_of(self, log_part, log_rest):
        """Of the logarithms of the relative position and of what is left to 1, which keep their digits at the ends."""
        constant = math.lgamma(self.a + self.b) - math.lgamma(self.a) - math.lgamma(self.b)
        return (self.a - 1) * log_part + (self.b - 1) * log_rest + constant

    def sample(self, key, shape=(), low=-math.inf, high=math.inf):
        self._check_bounds(low, high)
        return low + (high - low) * jax.random.beta(key, float(self.a), float(self.b), shape)

    def quantile(self, p, low=-math.inf, high=math.inf):
        from scipy.special import betaincinv

        self._check_bounds(low, high)
        return np.clip(low + (high - low) * betaincinv(self.a, self.b, np.asarray(p, float)), low, high)

    def _check_bounds(self, low: float, high: float) -> None:
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError(f"{self} got the bounds {low:g} and {high:g}, but takes finite ones")


def _in(unit, value) -> float:
    return float(strip(value, unit, "prior") if isinstance(value, u.Quantity) else value)


def _normal_mass(low: float, high: float) -> float:
    """The probability of a standard normal between two values, to full precision in the upper tail too."""
    if low > 0:
        low, high = -high, -low
    return 0.5 * (math.erfc(-high / math.sqrt(2)) - math.erfc(-low / math.sqrt(2)))


def _normal_quantile(p, low: float, high: float) -> np.ndarray:
    """Quantiles of a standard normal between two values, to full precision in the upper tail too."""
    from scipy.special import ndtr, ndtri

    p = np.asarray(p, float)
    if low > 0:
        return -_normal_quantile(1 - p, -high, -low)
    below, above = ndtr(low), ndtr(high)
    return ndtri(below + p * (above - below))


def _truncated(key, low: float, high: float, shape):
    return jax.random.truncated_normal(key, low, high, shape)


def as_prior(value, name: str) -> Prior:
    """A `Prior`, or the Gaussian of a pair (centre, width).

    Raises
    ------
    TypeError : anything else
    """
    if isinstance(value, Prior):
        return value
    if isinstance(value, tuple | list) and len(value) == 2:
        return Normal(*value)
    raise TypeError(
        f"'priors' got {value!r} for {name!r}, but takes one of bk.priors (Normal, LogNormal, Uniform, HalfNormal, "
        "Beta), or a pair (centre, width)"
    )
