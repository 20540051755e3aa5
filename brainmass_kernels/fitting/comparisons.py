"""How runs are compared with data.

A comparison turns a run into a prediction, and a prediction into residuals; an error is their mean square. It solves
for nuisances, such as the sensor's gain and the background, so that derivatives go through the residuals alone.
Lanes are ``(targets, starts)``, with the realisations of the noise as a third axis of a run.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import brainunit as u
import jax.numpy as jnp
import numpy as np

from .. import spectra, units
from ..connectivity import Correlation
from ..linear import linear_spectrum
from ..readout import Readout
from ..recording import Observation
from ..rounding import at_rest
from ..spectra import PowerSpectrum
from . import sensors
from .observed import Connectivity, TimeSeries, name_of, plain, plain_array, unchecked

#: The values of ``predict`` of a fit: runs, or linear systems about fixed points.
SIMULATION, LINEAR = "simulation", "linear"


class Target:
    """A target that says itself how runs are compared with it."""

    def comparison(self, model, record, options, band, background) -> Comparison:
        """As `compare` takes and returns."""
        raise NotImplementedError

    def linear_comparison(self, model, record, band, background) -> Comparison:
        """That with linear systems in place of runs; a `TypeError`, there is none."""
        raise not_linear(self)


def not_linear(target) -> TypeError:
    return TypeError(
        f"'predict' got 'linear' of {name_of(target)}, but predicts power spectra, cross-spectra of a network, and a "
        "Joint of these: leave it out"
    )


class Comparison:
    """How runs are compared with a target; ``data`` is traced, all else decides the program.

    Attributes
    ----------
    target : the user's
    count : number of targets, n
    name : for tables
    data : arrays ``(n, 1, ...)``
    sigma : of a residual, which weighs the data against priors
    record : the name of what is compared in a result; of a function, whatever `simulate` takes
    settings : what a resumed fit must have in common with this one, ready for JSON
    absent : of each target, the residuals that are 0 because nothing was measured; ``(n,)``, or 0
    simulated : whether predictions are of runs; else `density` is what is predicted from
    """

    target: Any
    count: int
    name: str
    data: Any
    sigma: float = 1.0
    record: Any
    settings: dict[str, Any]
    absent: Any = 0
    simulated: bool = True

    @property
    def parts_apart(self) -> tuple[Comparison, ...]:
        """Those of which each has data of its own: itself, or those of a joint target."""
        return (self,)

    def density(self, model, inputs, noise) -> Any:
        """Of linear systems about fixed points, in place of a result, at the target's own frequencies."""
        raise NotImplementedError

    def axis_of(self, record: str) -> int:
        """The axis of the targets in what is recorded under this name: after that of time, or the first of a matrix."""
        return 1

    @property
    def records(self) -> Any:
        """What is recorded under that name: itself, a statistic, or sensors."""
        return self.record

    @property
    def recorded(self) -> Any:
        """What a run records for it, as `simulate` takes it."""
        return {self.record: self.records} if isinstance(self.records, Observation) else self.records

    @property
    def width(self) -> int:
        """Numbers of a prediction."""
        raise NotImplementedError

    def read(self) -> tuple:
        """What the programs depend on beside ``data``; see `equations.key_of`."""
        raise NotImplementedError

    def predict(self, result: Any):
        """The prediction ``(n or 1, starts, ...)`` of a run with lanes ``(n or 1, starts, realisations)``.

        Parameters
        ----------
        result : a `Result`, or its records by name for what is not a function
        """
        raise NotImplementedError

    def residuals(self, prediction, data) -> tuple[Any, dict[str, Any]]:
        """Residuals ``(n, starts, M)``, and the nuisances by name, each ``(n, starts)``."""
        raise NotImplementedError

    def error(self, prediction, data) -> tuple[Any, dict[str, Any]]:
        """The mean square of the residuals, infinite where a run was not finite, and the nuisances."""
        residuals, nuisances = self.residuals(prediction, data)
        error = jnp.mean(residuals**2, -1)
        return jnp.where(jnp.isfinite(error), error, jnp.inf), nuisances

    def filled(self, data) -> Any:
        """``(n, 1, 1)``, times which the rms of all residuals is that of the measured ones; ``None``, all are."""
        return None

    def copies(self, realisations: int) -> float:
        """The memory of predictions, residuals and their gradient, the records included, in records; measured."""
        return 6.0

    def measure(self, error) -> np.ndarray:
        """An error as it is reported; NaN where a run was not finite."""
        error = np.asarray(error, float)
        finite = np.isfinite(error)
        return np.where(finite, np.sqrt(np.where(finite, error, 0.0)), np.nan)

    def like_target(self, prediction, nuisances, lane) -> Any:
        """The predictions of some lanes, in the form and the unit of the target."""
        raise NotImplementedError

    def nuisances_in_units(self, nuisances) -> dict[str, Any]:
        return nuisances

    def same(self, other: Any) -> bool:
        """Whether another target has the same data."""
        raise NotImplementedError


def segment_of(freqs, samples: int, sampling: float) -> int:
    """Records of a segment that give the model's spectrum the resolution of the target's.

    Parameters
    ----------
    samples : records of a run
    sampling : seconds from one to the next
    """
    window = float(np.clip(1 / np.median(np.diff(freqs)), 1.0, 4.0))
    if samples * sampling < window:
        raise ValueError(
            f"'duration' leaves {samples * sampling:g} s after the transient, but the target's resolution takes "
            f"{window:.3g} s at least"
        )
    return round(window / sampling)


class OfSpectra(Comparison):
    """Welch's spectra in log10 power, or in power; the nuisances are a gain and a background."""

    sigma = 0.1

    def __init__(
        self, target: PowerSpectrum, record: str, sampling: float, samples: int, band, background: bool,
        regions: int | None = None,
    ):  # fmt: skip
        self.target, self.record, self.sampling, self.samples, self.regions = target, record, sampling, samples, regions
        self.background, self.count, self.name = background, len(target), target.name
        self.settings = {"band": list(band), "background": background, "record": record}
        self.settings |= {"compare": target.compare} if target.linear else {}
        # float32 cannot hold 1e-23 squared: the mean level is subtracted here and added to the scale at the end.
        self.level = np.log10(target.power).mean(-1)
        self.data = (np.log10(target.power) - self.level[:, None])[:, None]

    def read(self):
        linear = ["linear"] if self.target.linear else []
        freqs = self.target.freqs
        return OfSpectra, self.record, self.sampling, self.samples, freqs, self.background, self.count, *linear

    @functools.cached_property
    def nperseg(self) -> int:
        """Samples of a segment that give the model's spectrum the resolution of the target's."""
        return segment_of(self.target.freqs, self.samples, self.sampling)

    @functools.cached_property
    def onto(self) -> np.ndarray:
        return spectra.interpolation(np.fft.rfftfreq(self.nperseg, self.sampling), self.target.freqs)

    @property
    def width(self):
        return self.nperseg // 2 + 1

    @property
    def log_freqs(self) -> np.ndarray:
        return np.log10(self.target.freqs)

    @property
    def how(self) -> dict[str, bool]:
        return {"background": self.background, "linear": self.target.linear}

    def predict(self, result):
        signal = u.get_mantissa(result[self.record])
        power: Any = spectra.welch(signal, self.sampling, self.nperseg)[1]
        # A free gain would scale the spectrum of rounding errors to any height.
        power = jnp.where(at_rest(signal)[None], 0.0, power)
        # Over realisations, and of a network over regions.
        return jnp.moveaxis(power.mean(tuple(range(3, power.ndim))), 0, -1)

    def log_model(self, prediction, count: int):
        """log10 of a density at the target's frequencies, for each of ``count`` targets."""
        log_model = jnp.log10(jnp.maximum(prediction, 1e-30)) @ jnp.asarray(self.onto.T, prediction.dtype)
        return jnp.broadcast_to(log_model, (count, *log_model.shape[1:]))

    def residuals(self, prediction, data):
        log_model = self.log_model(prediction, len(data))
        residuals, nuisance = spectra.log_residuals(log_model, data, self.log_freqs, **self.how)
        return residuals, nuisance._asdict()

    def error(self, prediction, data):
        log_model = self.log_model(prediction, len(data))
        error, nuisance = spectra.log_error(log_model, data, self.log_freqs, **self.how)
        return jnp.where(jnp.isfinite(error), error, jnp.inf), nuisance._asdict()

    def like_target(self, prediction, nuisances, lane) -> PowerSpectrum:
        log_model = np.log10(np.maximum(np.asarray(prediction, float), 1e-30)) @ self.onto.T
        log_model = np.broadcast_to(log_model, (self.count, *log_model.shape[1:]))[lane]
        nuisance = spectra.Nuisance(**{name: np.asarray(x, float)[lane] for name, x in nuisances.items()})
        log_power = spectra.observed_log_power(log_model, self.log_freqs, nuisance) + self.level[:, None]
        # A start without a finite spectrum is shown as next to no power, at each frequency the same.
        power = np.where(np.isfinite(log_power), 10**log_power, 1e-300)
        return unchecked(PowerSpectrum, freqs=self.target.freqs, power=power, compare=self.target.compare)

    def nuisances_in_units(self, nuisances):
        return {name: value if name == "chi" else value + self.level for name, value in nuisances.items()}

    def same(self, other) -> bool:
        if not isinstance(other, PowerSpectrum) or other.power.shape != self.target.power.shape:
            return False
        target = self.target
        if other.compare != target.compare:
            return False
        return np.allclose(other.freqs, target.freqs) and np.allclose(np.log(other.power), np.log(target.power))


class OfDensities(OfSpectra):
    """The densities of linear systems in log10 power, at the target's own frequencies; nothing is simulated."""

    simulated = False

    def __init__(self, target: PowerSpectrum, record: str, band, background: bool, regions: int | None = None):
        super().__init__(target, record, 1.0, 0, band, background, regions)
        self.settings |= {"predict": LINEAR}

    def density(self, model, inputs, noise):
        return linear_spectrum(model, self.target.freqs, inputs=inputs, noise=noise, of=self.record)

    @property
    def onto(self) -> np.ndarray:  # pyright: ignore[reportIncompatibleVariableOverride]
        return np.eye(len(self.target.freqs))

    @property
    def width(self):
        return len(self.target.freqs)

    def read(self):
        return OfDensities, *super().read()

    def predict(self, result):
        """Of densities ``(F, n or 1, starts, 1)``, or ``(..., 1, N)`` of a network, the mean over its regions."""
        power = u.get_mantissa(result)
        return jnp.moveaxis(power.mean(tuple(range(3, power.ndim))), 0, -1)


class OfSeries(Comparison):
    """Samples, in standard deviations of the target.

    Samples whose channels have noise of their own are weighted by it, and those that were not measured by 0. The
    weights of a target have a mean square of 1 over the measured samples of its channels.
    """

    def __init__(
        self, target: TimeSeries, record: str, unit, samples: int, regions: int | None,
        readout: Readout | None = None, baseline: int = 0,
    ):  # fmt: skip
        """``regions`` are the channels, those of the ``readout`` if there is one; ``baseline`` has so many samples."""
        self.record, self.unit, self.name, self.readout = record, unit, target.name, readout
        free = target.scale and isinstance(target.values, u.Quantity)
        self.data_unit = target.values.unit if free else unit
        values = np.asarray(plain(target.values, self.data_unit, "values"), float)
        shape = (samples,) if regions is None else (samples, regions)
        if values.ndim == len(shape):
            values = values[None]
        if values.shape[1:] != shape:
            sensors = "" if readout is None else f" at {regions} sensors"
            raise ValueError(
                f"'values' of {target.name} got shape {values.shape}, but this run records {shape}{sensors}: n targets "
                f"take {('n', *shape)}".replace("'n'", "n")
            )
        self.baseline = baseline
        values = self._from_baseline(values)
        self.target = dataclasses.replace(target, values=units.attach(values, self.data_unit))
        self.count, flat = len(values), values.reshape(len(values), 1, -1)
        self._check_varies(plain_array(target.values).reshape(len(values), -1))
        sigmas = None if target.sigma is None else np.asarray(plain(target.sigma, self.data_unit, "sigma"), float)
        weights = _weights(values, sigmas)
        if weights is None:
            self.spread = flat.std(-1, keepdims=True)
            self.data = (flat / self.spread, self.spread)
        else:
            flat, measured = np.where(np.isnan(flat), 0.0, flat) * weights, weights > 0
            count = measured.sum(-1, keepdims=True)
            mean = flat.sum(-1, keepdims=True) / count
            self.spread = np.sqrt(np.sum(measured * (flat - mean) ** 2, -1, keepdims=True) / count)
            self.data = (flat / self.spread, self.spread, weights)
            self.absent = flat.shape[-1] - count[:, 0, 0]
        sigma = 0.1 if sigmas is None else _together(sigmas) / self.spread.mean()
        self.sigma = float(sigma)
        self.settings = {"record": record, "scale": target.scale, "offset": target.offset, "sigma": self.sigma}
        if sigmas is not None and sigmas.ndim:
            self.settings["sigma of channels"] = sigmas.tolist()
        self.settings |= {"baseline": baseline} if baseline else {}

    def _from_baseline(self, values: np.ndarray) -> np.ndarray:
        """Values ``(n, K, ...)`` less the mean of each channel's baseline, which must have been measured.

        Channels of which nothing was measured may lack it.
        """
        if not self.baseline:
            return values
        measured = np.isfinite(values)
        partly = measured.any(1) & ~measured[:, : self.baseline].all(1)
        if partly.any():
            raise ValueError(
                f"'baseline' of {self.name} is {self.baseline} samples, of which some were not measured in a channel "
                "that has others: take a shorter one, or NaN for all of the channel"
            )
        return values - values[:, : self.baseline].mean(1, keepdims=True)

    def _check_varies(self, values: np.ndarray) -> None:
        """Raise ValueError of a target whose measured values ``(n, M)`` are none, or differ by rounding alone."""
        measured = np.isfinite(values)
        if not measured.any(1).all():
            number = int(np.argmin(measured.any(1))) + 1
            raise ValueError(f"'values' of {self.name} has NaN alone in target {number}: nothing was measured")
        first = np.take_along_axis(values, measured.argmax(1)[:, None], 1)
        constant = at_rest(np.where(measured, values, first).T)
        if constant.any():
            raise ValueError(
                f"'values' of {self.name} does not vary by more than rounding in target {int(constant.argmax()) + 1}"
            )

    def read(self):
        nuisances = self.target.scale, self.target.offset
        more = [*(["weighted"] if len(self.data) > 2 else []), *([self.baseline] if self.baseline else [])]
        return OfSeries, self.record, self.unit, self.data_unit, self.count, self.sigma, nuisances, *more

    @property
    def records(self):
        return self.record if self.readout is None else self.readout

    @property
    def width(self):
        return self.data[0].shape[-1]

    def copies(self, realisations):
        # The mean over realisations is as long as a record.
        return 2.5 + 8.5 / realisations

    def filled(self, data):
        if not np.any(self.absent):
            return None
        return jnp.sqrt(data[0].shape[-1] / jnp.sum(data[2] > 0, -1, keepdims=True))

    def measure(self, error):
        if np.any(self.absent):
            error = np.asarray(error, float) * (self.width / (self.width - self.absent))[:, None]
        return super().measure(error)

    def predict(self, result):
        # (K, n, starts, R) or (K, n, starts, R, N) to (n, starts, K) or (n, starts, K * N)
        signal = u.get_mantissa(result[self.record]).mean(3)
        if self.baseline:
            moved = signal - signal[: self.baseline].mean(0)[None]
            # What differs by rounding alone could not be told from a signal once its mean is 0.
            signal = jnp.where(at_rest(signal)[None], 0.0, moved)
        signal = jnp.moveaxis(signal, 0, 2)
        return signal.reshape(*signal.shape[:2], -1)

    def residuals(self, prediction, data):
        data, spread, *weights = (x.astype(prediction.dtype) for x in data)
        lanes = (max(len(data), len(prediction)), *prediction.shape[1:])
        model = jnp.broadcast_to(prediction, lanes) / jnp.broadcast_to(spread, lanes)
        resting = at_rest(jnp.moveaxis(model, -1, 0)) if self.target.offset else None
        weights = jnp.broadcast_to(weights[0], lanes) if weights else None
        model = model if weights is None else model * weights
        data, nuisances = jnp.broadcast_to(data, lanes), {}
        means = 0.0 * model[..., :1], 0.0 * data[..., :1]
        if self.target.offset:
            means = _level(model, weights), _level(data, weights)
        moved = (jnp.broadcast_to(mean, lanes) * (1.0 if weights is None else weights) for mean in means)
        signal, wanted = (x - mean for x, mean in zip((model, data), moved))
        if resting is not None:
            # A model at rest has rounding errors alone, which a free gain would fit.
            signal = jnp.where(resting[..., None], 0.0, signal)
        scale = jnp.ones_like(signal[..., :1])
        if self.target.scale:
            power = jnp.sum(signal**2, -1, keepdims=True)
            scale = jnp.sum(signal * wanted, -1, keepdims=True) / jnp.where(power > 0, power, 1.0)
            nuisances["scale"] = scale[..., 0]
        if self.target.offset:
            spread = jnp.broadcast_to(spread, means[0].shape)
            nuisances["offset"] = ((means[1] - scale * means[0]) * spread)[..., 0]
        return jnp.broadcast_to(scale, lanes) * signal - wanted, nuisances

    def like_target(self, prediction, nuisances, lane) -> TimeSeries:
        values = np.asarray(prediction, float)[lane]
        columns = {name: np.asarray(x, float)[lane][:, None] for name, x in nuisances.items()}
        values = values * columns["scale"] if "scale" in columns else values
        values = values + columns["offset"] if "offset" in columns else values
        values = values.reshape(len(values), *np.shape(self.target.values)[1:])
        return unchecked(TimeSeries, values=units.attach(values, self.data_unit), channels=self.target.channels)

    def same(self, other) -> bool:
        if not isinstance(other, TimeSeries) or not sensors.same(other.of, self.target.of):
            return False
        ours = np.asarray(u.get_magnitude(self.target.values))
        theirs = np.asarray(plain(other.values, self.data_unit, "values"), float)
        if theirs.size != ours.size or other.channels != self.target.channels:
            return False
        theirs = theirs.reshape(ours.shape)
        if not self.baseline:
            return np.array_equal(ours, theirs, equal_nan=True)
        # Taking a mean again moves values by rounding.
        slack = 1e-9 * self.spread.min()
        return np.allclose(ours, self._from_baseline(theirs), rtol=0.0, atol=slack, equal_nan=True)


def _together(sigmas: np.ndarray) -> float:
    """One standard deviation for all channels: that of their mean precision."""
    return float(sigmas) if sigmas.ndim == 0 else float(np.mean(1.0 / sigmas**2) ** -0.5)


def _weights(values: np.ndarray, sigmas: np.ndarray | None) -> np.ndarray | None:
    """``(n, 1, M)`` of the samples ``(n, ...)``, 0 of those that were not measured; ``None``, all count the same."""
    measured = np.isfinite(values)
    if measured.all() and (sigmas is None or sigmas.ndim == 0):
        return None
    weights = 1.0 if sigmas is None else _together(sigmas) / sigmas
    return (measured * weights).reshape(len(values), 1, -1)


def _level(x, weights):
    """The constant in samples whose weighted residuals are ``x``."""
    if weights is None:
        return jnp.mean(x, -1, keepdims=True)
    return jnp.sum(weights * x, -1, keepdims=True) / jnp.sum(weights**2, -1, keepdims=True)


class OfConnectivity(Comparison):
    """Correlations between regions, above the diagonal."""

    def __init__(self, target: Connectivity, record: str, sampling: float, regions: int | None):
        values = np.atleast_3d(np.asarray(target.values, float).T).T
        if regions != values.shape[-1]:
            what = "one mass" if regions is None else f"a network of {regions} regions"
            raise ValueError(f"'values' of {target.name} has {values.shape[-1]} regions, but what is fitted is {what}")
        self.target, self.record, self.sampling = target, record, sampling
        self.count, self.name, self.sigma = len(values), target.name, float(target.sigma)
        self.above = np.triu_indices(values.shape[-1], 1)
        self.data = values[:, None, *self.above]
        band = None if target.band is None else [float(spectra.in_hertz(edge, "band")) for edge in target.band]
        self.band = band
        self.settings = {"record": record, "amplitudes of": band, "sigma": self.sigma}

    def read(self):
        return OfConnectivity, self.record, self.sampling, self.band, self.count, self.sigma

    def axis_of(self, record):
        return 0 if self.band is None else 1

    @property
    def records(self):
        # Correlated in the loop: no record is stored.
        return Correlation(of=self.record) if self.band is None else self.record

    @property
    def width(self):
        return len(self.above[0])

    def copies(self, realisations):
        return 4.5 if self.band is None else 9.0

    def predict(self, result):
        recorded = u.get_mantissa(result[self.record])
        if self.band is not None:
            recorded = spectra.correlation(spectra.envelope(recorded, self.sampling, self.band))
        return recorded.mean(2)[:, :, *self.above]

    def residuals(self, prediction, data):
        return prediction - data.astype(prediction.dtype), {}

    def like_target(self, prediction, nuisances, lane) -> Connectivity:
        chosen = np.asarray(prediction, float)[lane]
        regions = np.shape(self.target.values)[-1]
        values = np.broadcast_to(np.eye(regions), (len(chosen), regions, regions)).copy()
        values[:, *self.above] = chosen
        values[:, *self.above[::-1]] = chosen
        return unchecked(Connectivity, values=np.clip(values, -1.0, 1.0), band=self.target.band, sigma=self.sigma)

    def same(self, other) -> bool:
        return isinstance(other, Connectivity) and np.array_equal(
            np.atleast_3d(np.asarray(other.values).T), np.atleast_3d(np.asarray(self.target.values).T)
        )


class OfFunction(Comparison):
    """A user's function of a `Result` whose lanes are ``(1, starts, realisations)``.

    It returns the error of each lane, which is averaged over realisations, or residuals with one more axis in front.
    """

    count = 1

    def __init__(self, target: Callable, record):
        self.target, self.record, self.name = target, record, name_of(target)
        self.settings, self.data = {"function": self.name}, ()

    def read(self):
        return OfFunction, self.target

    def predict(self, result):
        lanes = np.shape(next(iter(result.final.values())))[:3]
        returned = self.target(result)
        unit = u.get_unit(returned)
        if not unit.is_unitless:
            raise TypeError(f"'target' returned {unit}, but an error is a plain number: divide it by a scale")
        values = u.get_magnitude(returned)
        if np.shape(values) != lanes and np.shape(values)[1:] != lanes:
            raise TypeError(
                f"'target' returned shape {np.shape(values)}, but takes an error for each lane, {lanes}, or residuals, "
                f"(M, {', '.join(map(str, lanes))})"
            )
        if np.ndim(values) == 3:
            return values.mean(-1)
        return jnp.moveaxis(values, 0, -1).reshape(*lanes[:2], -1)

    def residuals(self, prediction, data):
        if prediction.ndim == 2:
            raise TypeError(
                "'target' returns an error, but this takes its residuals: return them, (M, *lanes), or use an "
                "optimiser of optax"
            )
        return prediction, {}

    def error(self, prediction, data):
        if prediction.ndim == 3:
            return super().error(prediction, data)
        return jnp.where(jnp.isfinite(prediction), prediction, jnp.inf), {}

    def measure(self, error):
        error = np.asarray(error, float)
        return np.where(np.isfinite(error), error, np.nan)

    def like_target(self, prediction, nuisances, lane):
        return np.asarray(prediction)[lane]

    def same(self, other) -> bool:
        return other is self.target or name_of(other) == self.name
