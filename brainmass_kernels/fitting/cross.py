"""Cross-spectra of regions or sensors as a target: coherence and phase, or complex densities."""

from __future__ import annotations

import dataclasses
from typing import Any

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np

from .. import spectra, units
from ..crossspectra import CrossSpectralDensity, coherency
from ..linear import linear_cross_spectrum
from ..readout import Readout
from ..spectra import PowerSpectrum
from .comparisons import LINEAR, Comparison, Target, segment_of
from .observed import addressable, unchecked
from .targets import recorded_network, recorded_regions

COHERENCY, DENSITY = "coherency", "density"


@dataclasses.dataclass(frozen=True, eq=False)
class CrossSpectrum(Target):
    """Complex cross-spectra of a network's regions, or of sensors, to fit.

    Attributes
    ----------
    freqs : ``(F,)`` increasing, positive; plain numbers are Hz
    values : ``(F, N, N)`` or ``(n, F, N, N)``, cross-spectral densities as `spectra.csd` gives them, Hermitian, in any
        unit
    compare : what a fit compares: "coherency", ``S_ij / sqrt(S_ii S_jj)``, which has coherence and phase, whatever the
        gains of the sensors; or "density", the densities themselves in units of their root mean square, with one gain
        for all that is solved for
    lead_field : ``(N, R)``, the gain of each of R regions at each of N sensors; ``None``, the values are of the regions
    sigma : standard deviation of the noise in a real or imaginary part, which weighs the data against priors
    name : for tables

    Raises
    ------
    ValueError : another shape, frequencies that do not increase, values that are not Hermitian or not finite, powers
        that are not positive, a lead field of another shape, another ``compare``

    Friston, Bastos, Litvak, Stephan, Fries and Moran 2012, NeuroImage 59:439-455.
    """

    freqs: Any
    values: Any
    compare: str = COHERENCY
    lead_field: Any = None
    sigma: float = 0.1
    name: str = "cross-spectrum"

    def __post_init__(self):
        freqs = np.asarray(spectra.in_hertz(self.freqs, "freqs"), float)
        values = np.asarray(u.get_magnitude(addressable(self.values)))
        if values.dtype.kind not in "fciu":
            raise TypeError(f"'values' of {self.name} got {values.dtype}, but takes an array of complex numbers")
        values = values[None].astype(complex) if values.ndim == 3 else values.astype(complex)
        regions = values.shape[-1]
        if values.ndim != 4 or values.shape[-2] != regions or regions < 2 or values.shape[1] != len(freqs):
            raise ValueError(
                f"'values' of {self.name} got shape {np.shape(self.values)} at {len(freqs)} frequencies, but takes "
                "(F, N, N) or (n, F, N, N) of two regions or more"
            )
        if not np.isfinite(values).all():
            raise ValueError(f"'values' of {self.name} got {np.sum(~np.isfinite(values))} values that are not finite")
        scale = np.abs(values).max((1, 2, 3), keepdims=True)
        if not (np.abs(values - np.conj(np.swapaxes(values, -1, -2))) <= 1e-4 * scale).all():
            raise ValueError(f"'values' of {self.name} is not Hermitian, as cross-spectra are: S_ji is S_ij conjugated")
        # Checks the frequencies and the powers.
        power = np.moveaxis(np.einsum("...ii->...i", values).real, -1, 1).reshape(-1, len(freqs))
        PowerSpectrum(freqs, power, self.name)
        if self.compare not in (COHERENCY, DENSITY):
            raise ValueError(f"'compare' of {self.name} got {self.compare!r}, but takes 'coherency' or 'density'")
        if not self.sigma > 0:
            raise ValueError(f"'sigma' of {self.name} got {self.sigma}, but takes a positive value")
        if self.lead_field is not None:
            lead = np.asarray(units.real(u.get_magnitude(self.lead_field), "lead_field"), float)
            if lead.ndim != 2 or len(lead) != regions:
                raise ValueError(
                    f"'lead_field' of {self.name} got shape {lead.shape}, but takes ({regions}, R), of the {regions} "
                    "sensors of 'values'"
                )
            object.__setattr__(self, "lead_field", lead)
        object.__setattr__(self, "freqs", freqs)
        object.__setattr__(self, "values", values)

    def band(self, low: float, high: float) -> CrossSpectrum:
        """The part from ``low`` to ``high`` Hz, both included."""
        kept = PowerSpectrum(self.freqs, np.ones(len(self.freqs)), self.name).band(low, high).freqs
        inside = np.isin(self.freqs, kept)
        return dataclasses.replace(self, freqs=self.freqs[inside], values=self.values[:, inside])

    def comparison(self, model, record, options, band, background):
        """How `fit` compares runs with it."""
        regions, samples, sampling = recorded_network(self, model, record, options)
        return OfCrossSpectra(self.band(*band), record, sampling, samples, regions, band)

    def linear_comparison(self, model, record, band, background):
        """With cross-spectra in closed form, as dynamic causal modelling of cross-spectra has them."""
        return OfLinearCrossSpectra(self.band(*band), record, recorded_regions(self, model, record), band)


class OfCrossSpectra(Comparison):
    """Welch's cross-spectra, as real and imaginary parts of pairs; of densities the nuisance is a gain.

    A prediction holds the real parts on and above the diagonal of each matrix, and the imaginary ones below it.
    """

    def __init__(
        self, target: CrossSpectrum, record: str, sampling: float, samples: int, regions: int | None, band
    ):  # fmt: skip
        sensors, lead = target.values.shape[-1], target.lead_field
        takes = sensors if lead is None else lead.shape[1]
        if regions != takes:
            what = "one mass" if regions is None else f"a network of {regions} regions"
            argument = "values" if lead is None else "lead_field"
            raise ValueError(f"'{argument}' of {target.name} has {takes} regions, but what is fitted is {what}")
        self.target, self.record, self.name = target, record, target.name
        self.count, self.sensors, self.sigma = len(target.values), sensors, float(target.sigma)
        self.samples, self.sampling = segment_of(target.freqs, samples, sampling) if self.simulated else 0, sampling
        wanted = coherency_of(target.values) if target.compare == COHERENCY else target.values
        #: The root mean square of the densities, which float32 could not hold squared.
        self.level = np.ones(self.count) if target.compare == COHERENCY else np.sqrt(
            np.mean(np.abs(target.values) ** 2, (1, 2, 3))
        )  # fmt: skip
        packed = as_real(wanted / self.level[:, None, None, None], np)
        self.data = packed.reshape(self.count, 1, -1)
        self.settings = {"record": record, "compared": target.compare, "sigma": self.sigma, "band": list(band)}

    def read(self):
        lead = None if self.target.lead_field is None else self.target.lead_field.tobytes()
        what = self.record, self.sampling, self.samples, self.target.compare, self.count, self.sigma
        return OfCrossSpectra, *what, self.target.freqs, lead

    @property
    def records(self):
        lead = self.target.lead_field
        of = self.record if lead is None else Readout(lead, of=self.record, **_silent(lead))
        band = self.target.freqs[0], self.target.freqs[-1]
        apart = 1.0 / (self.samples * self.sampling)
        # One frequency more on both sides, to interpolate between.
        band = max(0.0, band[0] - apart), band[1] + apart
        return CrossSpectralDensity(self.samples * self.sampling * u.second, band, of=of)

    @property
    def onto(self) -> np.ndarray:
        freqs = np.fft.rfftfreq(self.samples, self.sampling)
        low, high = self.records.band
        return spectra.interpolation(
            freqs[(freqs >= low * (1 - 1e-9)) & (freqs <= high * (1 + 1e-9))], self.target.freqs
        )

    @property
    def width(self):
        return len(self.target.freqs) * self.sensors**2

    def copies(self, realisations):
        return 4.5

    def predict(self, result):
        # (F, n, starts, R, N, N), of which the realisations are segments too.
        density = u.get_mantissa(result[self.record] if self.simulated else result).mean(3)
        packed = as_real(density, jnp)
        onto = jnp.asarray(self.onto, packed.dtype)
        packed = jnp.einsum("gf,fnsij->nsgij", onto, packed, precision="highest")
        return packed.reshape(*packed.shape[:2], -1)

    def matrices(self, prediction, xp):
        """The densities ``(..., F, N, N)`` of predictions ``(..., M)``, complex."""
        shape = (*prediction.shape[:-1], len(self.target.freqs), self.sensors, self.sensors)
        return as_complex(prediction.reshape(shape), xp)

    def residuals(self, prediction, data):
        wanted = data.astype(prediction.dtype)
        lanes = (max(len(wanted), len(prediction)), *prediction.shape[1:])
        if self.target.compare == COHERENCY:
            found = as_real(coherency(self.matrices(prediction, jnp)), jnp).reshape(prediction.shape)
            difference = jnp.broadcast_to(found, lanes) - jnp.broadcast_to(wanted, lanes)
            # The diagonal is 1 in both.
            return difference[..., self._beside], {}
        square = jnp.mean(prediction**2, -1, keepdims=True)
        size = jax.lax.stop_gradient(jnp.sqrt(jnp.where(square > 0, square, 1.0)))
        weights = jnp.asarray(np.sqrt(self._counts), prediction.dtype)
        weights = jnp.broadcast_to(weights, lanes)
        model = jnp.broadcast_to(prediction / jnp.broadcast_to(size, prediction.shape), lanes) * weights
        wanted = jnp.broadcast_to(wanted, lanes) * weights
        power = jnp.sum(model**2, -1, keepdims=True)
        gain = jnp.sum(model * wanted, -1, keepdims=True) / jnp.where(power > 0, power, 1.0)
        log_scale = jnp.log10(jnp.maximum(gain / jnp.broadcast_to(size, gain.shape), jnp.finfo(gain.dtype).tiny))
        return jnp.broadcast_to(gain, lanes) * model - wanted, {"log_scale": log_scale[..., 0]}

    @property
    def _counts(self) -> np.ndarray:
        """How often a packed number is in the matrices: those beside the diagonal twice."""
        each = 2.0 - np.eye(self.sensors)
        return np.broadcast_to(each, (len(self.target.freqs), *each.shape)).reshape(-1)

    @property
    def _beside(self) -> np.ndarray:
        return np.flatnonzero(self._counts > 1)

    def like_target(self, prediction, nuisances, lane) -> CrossSpectrum:
        density: Any = self.matrices(np.asarray(prediction, float)[lane][:, None], np)[:, 0]
        if self.target.compare == COHERENCY:
            values = coherency_of(density)
        else:
            values = density * 10 ** (np.asarray(nuisances["log_scale"], float)[lane])[:, None, None, None]
            values = values * self.level[:, None, None, None]
        fields = {name: getattr(self.target, name) for name in ("freqs", "compare", "lead_field", "sigma")}
        return unchecked(CrossSpectrum, values=values, **fields)

    def nuisances_in_units(self, nuisances):
        return {name: value + np.log10(self.level) for name, value in nuisances.items()}

    def same(self, other) -> bool:
        if not isinstance(other, CrossSpectrum) or other.values.shape != self.target.values.shape:
            return False
        leads = [None if x.lead_field is None else x.lead_field.tolist() for x in (self.target, other)]
        same_values = np.allclose(other.values, self.target.values, rtol=1e-12, atol=0)
        return leads[0] == leads[1] and np.allclose(other.freqs, self.target.freqs) and same_values


class OfLinearCrossSpectra(OfCrossSpectra):
    """The cross-spectra of linear systems, at the target's own frequencies; nothing is simulated."""

    simulated = False

    def __init__(self, target: CrossSpectrum, record: str, regions: int | None, band):
        super().__init__(target, record, 1.0, 0, regions, band)
        self.settings |= {"predict": LINEAR}

    def read(self):
        return OfLinearCrossSpectra, *super().read()

    @property
    def records(self):
        lead = self.target.lead_field
        return self.record if lead is None else Readout(lead, of=self.record, **_silent(lead))

    @property
    def onto(self) -> np.ndarray:
        return np.eye(len(self.target.freqs))

    def density(self, model, inputs, noise):
        return linear_cross_spectrum(model, self.target.freqs, inputs=inputs, noise=noise, of=self.records)


def coherency_of(density: np.ndarray) -> np.ndarray:
    """`coherency` in float64 on the host; of densities that are not positive, 0."""
    power = np.einsum("...ii->...i", density).real
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = np.where(power > 0, 1.0 / np.sqrt(power), 0.0)
    return density * scale[..., :, None] * scale[..., None, :]


def _silent(lead: np.ndarray) -> dict[str, Any]:
    return {"silent_sensors": np.flatnonzero((lead == 0).all(1)), "silent_regions": np.flatnonzero((lead == 0).all(0))}


def as_real(density, xp):
    """Hermitian matrices as real ones: real parts on and above the diagonal, imaginary parts of these below."""
    above = xp.asarray(np.triu(np.ones(density.shape[-2:], bool)))
    above = xp.broadcast_to(above, density.shape)
    return xp.where(above, density.real, -density.imag)


def as_complex(packed, xp):
    """The inverse of `as_real`."""
    upper = np.triu(np.ones(packed.shape[-2:]), 1)
    kept = {"dtype": packed.dtype}
    strict, low = (xp.broadcast_to(xp.asarray(x, **kept), packed.shape) for x in (upper, upper.T))
    diagonal = xp.broadcast_to(xp.asarray(np.eye(packed.shape[-1]), **kept), packed.shape)
    turned = xp.swapaxes(packed, -1, -2)
    real = packed * (strict + diagonal) + turned * low
    imaginary = turned * strict - packed * low
    return real + 1j * imaginary if xp is np else jax.lax.complex(real, imaginary)
