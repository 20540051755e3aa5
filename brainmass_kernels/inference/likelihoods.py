"""How likely data are, given what a run predicts: each a density of the data, one number for each lane.

A field of a likelihood is a number, or a prior: then it is inferred with the model's parameters.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np

from .. import units
from ..fitting.cross import CrossSpectrum, OfCrossSpectra, as_real
from ..fitting.dynamics import OfDynamics
from ..fitting.observed import MASK
from ..fitting.targets import (
    Comparison,
    Connectivity,
    OfConnectivity,
    OfSeries,
    OfSpectra,
    TimeSeries,
    plain,
    unchecked,
)
from ..spectra import PowerSpectrum
from .priors import Prior

POSITIVE, ANY = (0.0, math.inf), (-math.inf, math.inf)
#: Fisher's z of a correlation of 1 is infinite.
_MOST = 1 - 1e-6
_LOG_10 = math.log(10.0)


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """The density of data given a prediction. Each kind below is for one kind of target."""

    #: The kind of comparison, and of target in words.
    of: ClassVar[type[Comparison]] = Comparison
    data_of: ClassVar[str] = ""

    def data(self, comparison, number: int = 0) -> np.ndarray:
        """What is compared of one of the targets, in float64."""
        raise NotImplementedError

    def log_prob(self, comparison, prediction, data, values: dict[str, Any]):
        """The log density of the data in each lane, ``(B,)``.

        Parameters
        ----------
        prediction : ``(1, B, ...)``, as the comparison predicts
        data : as `data` gives it, in the precision of the run
        values : of the fields by name, plain numbers or ``(B,)``
        """
        raise NotImplementedError

    def expected(self, comparison, prediction, values: dict[str, Any]):
        """What the data are about in each lane, ``(B, ...)``, in the form of `data`."""
        raise NotImplementedError

    def noisy(self, key, comparison, expected, values: dict[str, Any]):
        """Data drawn about what is expected, one for each lane."""
        raise NotImplementedError

    def as_target(self, comparison, values: np.ndarray) -> Any:
        """Data of each lane as a target of so many."""
        raise NotImplementedError

    def places(self, comparison) -> dict[str, tuple[Any, tuple[float, float]]]:
        """The unit of each field and where it may be, by name."""
        raise NotImplementedError

    def resolved(self, comparison, name: str) -> Likelihood:
        """The same likelihood in plain numbers in the units of the data.

        Raises
        ------
        ValueError, TypeError : a number that is not where it may be, or a wrong unit, naming the field
        """
        fields = {}
        for field, (unit, (low, high)) in self.places(comparison).items():
            value = getattr(self, field)
            if value is None or isinstance(value, Prior):
                fields[field] = value and value.plain(unit, field)
                continue
            number = np.asarray(u.get_magnitude(value))
            what = f"'{field}' of {type(self).__name__} for {name}"
            if field in self.may_be_of_channels and number.ndim == 1:
                fields[field] = _of_channels(value, unit, comparison, what)
                continue
            if number.ndim or number.dtype.kind not in "fiu":
                raise TypeError(f"{what} got {value!r}, but takes a number or one of bk.priors")
            number = float(plain(value, unit, f"{type(self).__name__}.{field}"))
            if not (math.isfinite(number) and low < number < high) and not (number == 0 and field in self.may_be_zero):
                where = "a positive number" if (low, high) == POSITIVE else f"a number from {low:g} to {high:g}"
                raise ValueError(f"{what} got {value}, but takes {where}, or one of bk.priors")
            fields[field] = number
        return dataclasses.replace(self, **fields)

    may_be_zero: ClassVar[tuple[str, ...]] = ()
    may_be_of_channels: ClassVar[tuple[str, ...]] = ()


def _of_channels(value, unit, comparison, what: str) -> tuple[float, ...]:
    """Positive numbers, one for each region or sensor of a series."""
    numbers, shape = np.asarray(plain(value, unit, what), float), np.shape(comparison.target.values)[1:]
    if len(shape) < 2 or numbers.shape != shape[-1:]:
        takes = f"{shape[-1]} numbers, one for each channel" if len(shape) > 1 else "a number"
        raise ValueError(f"{what} got shape {numbers.shape}, but takes {takes}")
    if not (np.isfinite(numbers).all() and (numbers > 0).all()):
        raise ValueError(f"{what} got {value}, but takes positive numbers")
    return tuple(numbers.tolist())


@dataclasses.dataclass(frozen=True)
class Gaussian(Likelihood):
    """Independent or autocorrelated Gaussian noise in the samples of a `TimeSeries`.

    A sample is ``gain * prediction + offset + e_t``. The residuals ``e_t`` of each region or sensor have the standard
    deviation sigma; with rho they are a stationary process ``e_t = rho e_{t-1} + sigma sqrt(1 - rho**2) n_t``. Samples
    that the series says were not measured do not count, and after such a gap of g samples the correlation is rho**g.

    Attributes
    ----------
    sigma : standard deviation of a sample, in the unit of the record; a number, one for each channel, or a prior
    rho : correlation of successive residuals, between -1 and 1, a number or a prior; ``None``, independent
    gain : of the sensor, a plain number or a prior
    offset : in the unit of the record, a number or a prior
    """

    sigma: Any
    rho: Any = None
    gain: Any = 1.0
    offset: Any = 0.0

    of, data_of = OfSeries, "a TimeSeries"
    may_be_of_channels = ("sigma",)

    def places(self, comparison):
        unit = comparison.data_unit
        return {
            "sigma": (unit, POSITIVE),
            "rho": (u.UNITLESS, (-1.0, 1.0)),
            "gain": (u.UNITLESS, ANY),
            "offset": (unit, ANY),
        }

    def data(self, comparison, number=0):
        target = comparison.target
        if target.scale or target.offset:
            which = "scale" if target.scale else "offset"
            raise ValueError(
                f"'{which}' of {target.name} got True, which solves for it as a fit does; a posterior takes it as a "
                "parameter: leave it out, and give bk.likelihoods.Gaussian(sigma, gain=, offset=) priors"
            )
        values = np.asarray(plain(target.values, comparison.data_unit, "values"), float)[number]
        return values.reshape(len(values), -1)

    def expected(self, comparison, prediction, values):
        predicted = prediction[0].reshape(-1, *self.data(comparison).shape)
        return _column(values["gain"]) * predicted + _column(values["offset"])

    def noisy(self, key, comparison, expected, values):
        sigma, rho = (_column(values[name]) for name in ("sigma", "rho"))
        normals = jax.random.normal(key, expected.shape, expected.dtype)
        if rho is None:
            return expected + sigma * normals
        rho = jnp.broadcast_to(rho, (*expected.shape[:1], 1, 1))[:, 0]

        def later(former, new):
            former = rho * former + jnp.sqrt(1 - rho**2) * new
            return former, former

        over_time = jnp.moveaxis(normals, 1, 0)
        rest = jax.lax.scan(later, over_time[0], over_time[1:])[1]
        return expected + sigma * jnp.moveaxis(jnp.concatenate([over_time[:1], rest]), 0, 1)

    def as_target(self, comparison, values):
        shape = np.shape(comparison.target.values)[1:]
        series = units.attach(values.reshape(len(values), *shape), comparison.data_unit)
        return unchecked(TimeSeries, values=series, name="prediction")

    def log_prob(self, comparison, prediction, data, values):
        residuals = data[None] - self.expected(comparison, prediction, values)
        sigma, rho = (_column(values[name]) for name in ("sigma", "rho"))
        if comparison.target.missing == MASK:
            return _of_measured(residuals, ~jnp.isnan(data), sigma, rho)
        if rho is None:
            return _sum(_log_normal(residuals, sigma))
        first = _log_normal(residuals[:, :1], sigma)
        later = _log_normal(residuals[:, 1:] - rho * residuals[:, :-1], sigma * jnp.sqrt(1 - rho**2))
        return _sum(first) + _sum(later)


def _of_measured(residuals, measured, sigma, rho):
    """The log density of residuals ``(B, K, N)`` of which only the ``measured`` ``(K, N)`` count, ``(B,)``."""
    wide = jnp.broadcast_to(measured[None], residuals.shape)
    residuals = jnp.where(wide, residuals, 0.0)
    if rho is None:
        return _sum(jnp.where(wide, _log_normal(residuals, sigma), 0.0))
    at = jnp.broadcast_to(jnp.arange(len(measured), dtype=jnp.int32)[:, None], measured.shape)
    latest = jax.lax.cummax(jnp.where(measured, at, -1), 0)
    before = jnp.concatenate([jnp.full_like(latest[:1], -1), latest[:-1]])
    first = jnp.broadcast_to((before < 0)[None], residuals.shape)
    place = jnp.broadcast_to(jnp.maximum(before, 0)[None], residuals.shape)
    # Of a stationary process the correlation over g samples is rho**g, whatever lies between.
    gap = (at - jnp.maximum(before, 0)).astype(residuals.dtype)[None]
    correlation = jnp.where(first, 0.0, jnp.broadcast_to(rho ** jnp.maximum(gap, 1.0), residuals.shape))
    moved = residuals - correlation * jnp.take_along_axis(residuals, place, 1)
    density = _log_normal(moved, sigma * jnp.sqrt(1 - correlation**2))
    return _sum(jnp.where(wide, density, 0.0))


@dataclasses.dataclass(frozen=True)
class _OfPower(Likelihood):
    """Of a spectrum whose expected density is ``gain * P_model(f) + background * f**-exponent``, f in Hz."""

    of, data_of = OfSpectra, "a PowerSpectrum"
    may_be_zero = ("background",)

    def data(self, comparison, number=0):
        if len(comparison.target.freqs) < 1:
            raise ValueError(f"{comparison.name} has no frequency in 'band'")
        if comparison.target.linear:
            raise ValueError(
                f"'compare' of {comparison.name} got 'linear', which is how a fit compares powers; a posterior has its "
                "likelihood for that: leave it out"
            )
        return np.log(comparison.target.power[number])

    def places(self, comparison):
        fields = {f.name: (u.UNITLESS, POSITIVE) for f in dataclasses.fields(self)}
        return fields | {"exponent": (u.UNITLESS, ANY)}

    def expected(self, comparison, prediction, values):
        log_power = comparison.log_model(prediction, 1)[0] * _LOG_10
        log_power = log_power + jnp.log(_row(values["gain"]))
        if isinstance(values["background"], float) and values["background"] == 0:
            return log_power
        log_freqs = jnp.asarray(comparison.log_freqs * _LOG_10, log_power.dtype)[None]
        background = jnp.log(_row(values["background"])) - _row(values["exponent"]) * log_freqs
        return jnp.logaddexp(log_power, background)

    def as_target(self, comparison, values):
        return unchecked(PowerSpectrum, freqs=comparison.target.freqs, power=np.exp(values), name="prediction")


@dataclasses.dataclass(frozen=True)
class Whittle(_OfPower):
    """The likelihood of a Welch spectrum: at each frequency a gamma density about what is expected.

    The mean of L independent periodograms of a stationary process is ``S / L`` times a gamma variable of shape L, and
    frequencies are independent. S is ``gain * P_model(f) + background * f**-exponent``, f in Hz, in the unit of the
    target's power.

    Attributes
    ----------
    segments : L, a number or a prior, not always whole: under a Hann window, segments that overlap by half count for
        about 0.95 of their number. Its neighbouring frequencies have a correlation of 0.44 in power, and a spectrum at
        the resolution of its segments says half of what it seems to: take every second frequency, or L / 2
    gain : of the sensor, squared; a plain number or a prior
    background, exponent : of a power law beside the model, its density at 1 Hz and its slope; numbers or priors

    Whittle 1953, Arkiv för Matematik 2:423-434; Welch 1967, IEEE Transactions on Audio and Electroacoustics 15:70-73.
    """

    segments: Any
    gain: Any = 1.0
    background: Any = 0.0
    exponent: Any = 1.0

    def noisy(self, key, comparison, expected, values):
        shape = jnp.broadcast_to(jnp.asarray(_row(values["segments"]), expected.dtype), expected.shape)
        return expected + jnp.log(jax.random.gamma(key, shape, dtype=expected.dtype) / shape)

    def log_prob(self, comparison, prediction, data, values):
        shape = jnp.asarray(_row(values["segments"]), prediction.dtype)
        ratio = data[None] - self.expected(comparison, prediction, values)
        density = shape * (jnp.log(shape) + ratio - jnp.exp(ratio)) - jax.scipy.special.gammaln(shape) - data[None]
        return jnp.sum(density, -1)


@dataclasses.dataclass(frozen=True)
class StudentT(_OfPower):
    """A robust likelihood of a spectrum: residuals of log10 power with the tails of Student's t.

    A frequency that the model cannot explain, such as a line artefact, counts for little. The expected density is
    ``gain * P_model(f) + background * f**-exponent``, f in Hz, in the unit of the target's power.

    Attributes
    ----------
    sigma : the scale of the residuals in log10 power, a plain number or a prior
    degrees : of freedom, a number or a prior; many make it a Gaussian
    gain : of the sensor, squared; a plain number or a prior
    background, exponent : of a power law beside the model, its density at 1 Hz and its slope; numbers or priors
    """

    sigma: Any
    degrees: Any = 4.0
    gain: Any = 1.0
    background: Any = 0.0
    exponent: Any = 1.0

    def noisy(self, key, comparison, expected, values):
        sigma, degrees = (jnp.asarray(_row(values[name]), expected.dtype) for name in ("sigma", "degrees"))
        degrees = jnp.broadcast_to(degrees, expected.shape)
        return expected + _LOG_10 * sigma * jax.random.t(key, degrees, expected.shape, expected.dtype)

    def log_prob(self, comparison, prediction, data, values):
        residuals = (data[None] - self.expected(comparison, prediction, values)) / _LOG_10
        sigma, degrees = (jnp.asarray(_row(values[name]), residuals.dtype) for name in ("sigma", "degrees"))
        gammaln = jax.scipy.special.gammaln
        constant = gammaln((degrees + 1) / 2) - gammaln(degrees / 2) - 0.5 * jnp.log(degrees * math.pi) - jnp.log(sigma)
        density = constant - (degrees + 1) / 2 * jnp.log1p((residuals / sigma) ** 2 / degrees)
        return jnp.sum(density, -1)


@dataclasses.dataclass(frozen=True)
class FisherZ(Likelihood):
    """Gaussian noise in Fisher's z of each correlation of a `Connectivity`, ``z = arctanh(r)``, above the diagonal.

    Pairs count as independent, which those of one region are not: a posterior that looks too narrow is.

    Attributes
    ----------
    sigma : standard deviation of z, a plain number or a prior. Of n independent samples it is ``1 / sqrt(n - 3)``; of
        autocorrelated ones n is smaller than their number

    Fisher 1921, Metron 1:3-32.
    """

    sigma: Any

    of, data_of = OfConnectivity, "a Connectivity"

    def places(self, comparison):
        return {"sigma": (u.UNITLESS, POSITIVE)}

    def data(self, comparison, number=0):
        values = np.asarray(comparison.data, float)[number, 0]
        if (np.abs(values) > _MOST).any():
            raise ValueError(
                f"'values' of {comparison.name} got {values[np.abs(values).argmax()]:g} beside the diagonal, whose "
                "Fisher's z is infinite: leave out one of two regions that are the same"
            )
        return np.arctanh(values)

    def expected(self, comparison, prediction, values):
        return jnp.arctanh(jnp.clip(prediction[0], -_MOST, _MOST))

    def noisy(self, key, comparison, expected, values):
        return expected + _row(values["sigma"]) * jax.random.normal(key, expected.shape, expected.dtype)

    def as_target(self, comparison, values):
        regions = comparison.target.values.shape[-1]
        matrices = np.tile(np.eye(regions), (len(values), 1, 1))
        above = comparison.above
        matrices[:, above[0], above[1]] = matrices[:, above[1], above[0]] = np.tanh(values)
        return unchecked(Connectivity, values=matrices, name="prediction")

    def log_prob(self, comparison, prediction, data, values):
        predicted = self.expected(comparison, prediction, values)
        return jnp.sum(_log_normal(data[None] - predicted, _row(values["sigma"])), -1)


@dataclasses.dataclass(frozen=True)
class ComplexWishart(Likelihood):
    """The likelihood of Welch's cross-spectra: at each frequency a complex Wishart density about what is expected.

    The mean of L independent segments of N stationary processes is ``1 / L`` times a complex Wishart matrix of L
    degrees of freedom and the scale S, and frequencies are independent: `Whittle`'s density of one process. S is
    ``gain * S_model(f) + noise * I``, in the unit of the target's values, which are densities whatever its ``compare``.

    Attributes
    ----------
    segments : L, more than N - 1, a number or a prior, not always whole; how overlapping segments and neighbouring
        frequencies count is as in `Whittle`
    gain : of all sensors, squared; a plain number or a prior
    noise : the density of the noise that each sensor has for itself, the same at all frequencies; a plain number or a
        prior. Sensors that are more than the noises of the model need some

    Goodman 1963, Annals of Mathematical Statistics 34:152-177.
    """

    segments: Any
    gain: Any = 1.0
    noise: Any = 0.0

    of, data_of = OfCrossSpectra, "a CrossSpectrum"
    may_be_zero = ("noise",)

    def places(self, comparison):
        more = dict.fromkeys(("gain", "noise"), (u.UNITLESS, POSITIVE))
        return {"segments": (u.UNITLESS, (comparison.sensors - 1.0, math.inf)), **more}

    def data(self, comparison, number=0):
        values = comparison.target.values[number]
        least = np.linalg.eigvalsh(values)[:, 0] / np.trace(values, axis1=-2, axis2=-1).real
        if (least <= 1e-12).any():
            at = comparison.target.freqs[int(np.argmin(least))]
            raise ValueError(
                f"'values' of {comparison.name} is not positive definite at {at:g} Hz: it is of fewer segments than "
                "sensors, or a sensor is a sum of others"
            )
        return as_real(values, np).reshape(-1)

    def expected(self, comparison, prediction, values):
        density = prediction[0] * _row(values["gain"])
        own = np.broadcast_to(np.eye(comparison.sensors), (len(comparison.target.freqs), *[comparison.sensors] * 2))
        return density + _row(values["noise"]) * jnp.asarray(own.reshape(1, -1), density.dtype)

    def log_prob(self, comparison, prediction, data, values):
        size = comparison.sensors
        root = jnp.linalg.cholesky(comparison.matrices(self.expected(comparison, prediction, values), jnp))
        measured = jnp.broadcast_to(comparison.matrices(data, jnp)[None], root.shape)
        # tr(S^-1 D) with S = root root^H.
        inner = jax.scipy.linalg.solve_triangular(root, measured, lower=True)
        trace = jnp.einsum("bfii->bf", jax.scipy.linalg.solve_triangular(root, inner, lower=True, trans="C")).real
        of_data = jnp.linalg.slogdet(measured)[1]
        of_model = 2.0 * jnp.sum(jnp.log(jnp.einsum("bfii->bfi", root).real), -1)
        freedom, each = self._freedom(comparison, root, values)
        gammas = jnp.sum(jax.scipy.special.gammaln(each), -1) + 0.5 * size * (size - 1) * math.log(math.pi)
        density = size * freedom * jnp.log(freedom) - gammas + (freedom - size) * of_data - freedom * (of_model + trace)
        return jnp.sum(density, -1)

    def _freedom(self, comparison, root, values) -> tuple[Any, Any]:
        """L of each lane and frequency ``(B, F)``, and L, L - 1, ... of each column of a root ``(B, F, N)``."""
        kind, size = root.real.dtype, comparison.sensors
        freedom = jnp.broadcast_to(jnp.asarray(_row(values["segments"]), kind), root.shape[:2])
        return freedom, freedom[..., None] - jnp.arange(size, dtype=kind).reshape(1, 1, size)

    def noisy(self, key, comparison, expected, values):
        """By Bartlett's factor: gamma variables on its diagonal, complex normal ones below."""
        root = jnp.linalg.cholesky(comparison.matrices(expected, jnp))
        freedom, each = self._freedom(comparison, root, values)
        diagonal, *parts = jax.random.split(key, 3)
        chi = jnp.sqrt(jax.random.gamma(diagonal, each, dtype=expected.dtype))
        real, imaginary = (jax.random.normal(part, root.shape, expected.dtype) for part in parts)
        below, own = (
            jnp.broadcast_to(jnp.asarray(x, expected.dtype), root.shape)
            for x in (math.sqrt(0.5) * np.tril(np.ones(root.shape[-2:]), -1), np.eye(root.shape[-1]))
        )
        on = own * jnp.broadcast_to(chi[..., None], root.shape)
        factor = jax.lax.complex(on + below * real, below * imaginary)
        factor = jnp.einsum("bfij,bfjk->bfik", root, factor, precision="highest")
        drawn = jnp.einsum("bfij,bfkj->bfik", factor, factor.conj(), precision="highest")
        packed = as_real(drawn, jnp) / jnp.broadcast_to(freedom[..., None, None], root.shape)
        return packed.reshape(expected.shape)

    def as_target(self, comparison, values):
        return unchecked(
            CrossSpectrum, freqs=comparison.target.freqs, values=comparison.matrices(values, np), compare="density",
            lead_field=comparison.target.lead_field, name="prediction",
        )  # fmt: skip


def default(comparison) -> Likelihood:
    """The likelihood of a target that says how noisy it is itself.

    Raises
    ------
    ValueError, TypeError : a target that does not say
    """
    if isinstance(comparison, OfSeries):
        sigma = comparison.target.sigma
        if sigma is None:
            raise ValueError(
                f"'likelihood' is missing: {comparison.name} says no 'sigma'. Take bk.TimeSeries(values, sigma=...) or "
                "bk.likelihoods.Gaussian(sigma), where sigma is a number or a prior"
            )
        return Gaussian(plain(sigma, comparison.data_unit, "sigma") * comparison.data_unit)
    if isinstance(comparison, OfConnectivity):
        return FisherZ(comparison.sigma)
    if isinstance(comparison, OfSpectra):
        raise ValueError(
            f"'likelihood' is missing: of how many segments {comparison.name} is the mean is not in it. Take "
            "bk.likelihoods.Whittle(segments), or the robust bk.likelihoods.StudentT(sigma)"
        )
    if isinstance(comparison, OfCrossSpectra):
        raise ValueError(
            f"'likelihood' is missing: of how many segments {comparison.name} is the mean is not in it. Take "
            "bk.likelihoods.ComplexWishart(segments)"
        )
    raise _unknown(comparison)


def check(likelihood, comparison) -> Likelihood:
    """A likelihood of this kind of data.

    Raises
    ------
    TypeError : what is none, or of another kind of target
    """
    if isinstance(comparison, OfDynamics):
        raise _unknown(comparison)
    if not isinstance(likelihood, Likelihood):
        raise TypeError(
            f"'likelihood' got {likelihood!r} for {comparison.name}, but takes one of bk.likelihoods (Gaussian, "
            "Whittle, StudentT, FisherZ, ComplexWishart); a function of yours is the 'target', and returns log "
            "likelihoods"
        )
    if not isinstance(comparison, likelihood.of):
        raise TypeError(
            f"'likelihood' got {type(likelihood).__name__} for {comparison.name}, but that is of {likelihood.data_of}"
        )
    return likelihood


def _unknown(comparison) -> TypeError:
    return TypeError(
        f"'target' got {comparison.name}, of which no likelihood is known: take a function of a Result that returns "
        "the log likelihood of each lane"
    )


def _column(value) -> Any:
    """A number, one for each channel, or one for each lane, against ``(B, K, N)``."""
    if isinstance(value, tuple):
        return jnp.asarray(value, jnp.result_type(float))[None, None]
    return value if value is None or isinstance(value, float) else value[:, None, None]


def _row(value):
    """A number, or one for each lane, against ``(B, M)``."""
    return value if isinstance(value, float) else value[:, None]


def _sum(x):
    return jnp.sum(x, (1, 2))


def _log_normal(x, sigma):
    return -0.5 * (x / sigma) ** 2 - jnp.log(sigma) - 0.5 * math.log(2 * math.pi)
