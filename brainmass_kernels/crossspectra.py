"""Cross-spectra of a network's regions or sensors: how strongly, and with which delay, two oscillate together."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import brainunit as u
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import units
from .recording import TABLE, Reduction, Sampling, in_parts


@dataclasses.dataclass(frozen=True)
class CrossSpectralDensity(Reduction):
    """The cross-spectral density of each pair of regions, ``(F, *networks, N, N)``, complex; ``N`` are sensors of a
    readout.

    Welch's estimate: Hann window, half overlap, the mean removed from each segment. Entry ``i, j`` at each frequency is
    ``scipy.signal.csd(x_i, x_j, nperseg=...)`` of the stored records; the diagonal are the power spectra
    (`spectra.welch`). ``spectra.coherency`` has coherence and phase. Memory does not grow with the records.

    Parameters
    ----------
    segment : a time, whose inverse is the resolution
    band : ``(low, high)``, both included; plain numbers are Hz. ``None``, from 0 to half the rate of the records

    Raises
    ------
    ValueError : a segment of fewer than 4 records or longer than the run; a band without a frequency; a model without a
        network, or of one region

    Welch 1967, IEEE Trans. Audio Electroacoust. 15:70.
    """

    segment: Any
    band: Any = None
    across = True

    @property
    def suffix(self) -> str:
        return "cross_spectrum"

    def __post_init__(self):
        object.__setattr__(self, "segment", units.positive_time(self.segment, u.second, "segment"))
        if self.band is None:
            return
        try:
            low, high = (
                float(u.Quantity(x).to_decimal(u.Hz)) if isinstance(x, u.Quantity) else float(x) for x in self.band
            )
        except (TypeError, ValueError) as error:
            raise TypeError(f"'band' got {self.band!r}, but takes two frequencies (low, high) in Hz") from error
        if not 0 <= low <= high:
            raise ValueError(f"'band' got {low:g} to {high:g} Hz, but takes 0 <= low <= high")
        object.__setattr__(self, "band", (low, high))

    def check(self, sampling):
        if sampling.channels < 2:
            what = "a network of one region" if sampling.channels else "a model without a network"
            raise ValueError(
                f"'record' got CrossSpectralDensity of {what}, but it is of the pairs of two regions or more: simulate "
                "a bk.Network"
            )
        if (samples := sampling.records_of(self.segment, "segment")) < 4:
            raise ValueError(f"'segment' got {self.segment:g} s, {samples} records, but takes 4 or more")
        if not len(self._kept(sampling)):
            every = np.fft.rfftfreq(samples, sampling.interval)
            raise ValueError(
                f"'band' got {self.band[0]:g} to {self.band[1]:g} Hz, which has none of the frequencies of the "
                f"segments, {every[1]:g} Hz apart up to {every[-1]:g} Hz"
            )

    def unit(self, unit):
        return unit**2 / u.Hz

    def _samples(self, sampling: Sampling) -> tuple[int, int]:
        """The records of a segment, and from one to the next."""
        samples = round(self.segment / sampling.interval)
        return samples, samples - samples // 2

    def _kept(self, sampling: Sampling) -> np.ndarray:
        """Which frequencies of a segment."""
        freqs = np.fft.rfftfreq(self._samples(sampling)[0], sampling.interval)
        low, high = self.band or (0.0, np.inf)
        return np.flatnonzero((freqs >= low * (1 - 1e-9)) & (freqs <= high * (1 + 1e-9)))

    def axis(self, ts, sampling):
        return np.fft.rfftfreq(self._samples(sampling)[0], sampling.interval)[self._kept(sampling)] * u.Hz

    def multiple(self, sampling):
        return self._samples(sampling)[1]

    def size(self, sampling):
        samples, hop = self._samples(sampling)
        # The sums, complex, their result, and the segments that are transformed at once.
        return 4 * len(self._kept(sampling)) * sampling.channels + hop + 4 * samples

    def start(self, like, sampling):
        mean = like.reshape(-1, sampling.channels) * 0
        products = mean[..., :, None] * mean[..., None, :]
        sums = jnp.broadcast_to(products, (len(self._kept(sampling)), *products.shape))
        return lax.complex(sums, sums), jnp.broadcast_to(like * 0, (self._samples(sampling)[1], *like.shape))

    def add(self, carry, x, first, sampling):
        samples, hop = self._samples(sampling)
        together = max(1, TABLE // max(1, samples * x.shape[1]))
        return in_parts(functools.partial(self._add, sampling=sampling), carry, x, first, together * hop)

    def _add(self, carry, x, first, sampling: Sampling):
        """The segments that end in these records; they begin up to a step before."""
        (sums, before), (samples, hop) = carry, self._samples(sampling)
        every = jnp.concatenate([before, x])
        begins = np.arange(0, len(every) - samples + 1, hop)
        if len(begins):
            networks = sums.shape[1]
            segments = jnp.moveaxis(every[begins[:, None] + np.arange(samples)], 1, -1)
            segments = (segments - segments.mean(-1, keepdims=True)) * jnp.broadcast_to(
                jnp.asarray(_window(samples), x.dtype), segments.shape
            )
            transformed = jnp.fft.rfft(segments)[..., self._kept(sampling)]
            # Before the first record there is nothing.
            counts = (jnp.asarray(first, jnp.int32) > 0) | (begins > 0)
            transformed = jnp.where(counts[:, None, None], transformed, jnp.zeros_like(transformed))
            each = transformed.reshape(len(begins), networks, sampling.channels, -1)
            conjugated, exact = jnp.conj(each), lax.Precision.HIGHEST
            sums = sums + jnp.einsum("snif,snjf->fnij", conjugated, each, precision=exact)
        return sums, every[-hop:]

    def finish(self, carry, sampling):
        sums, (samples, hop) = carry[0], self._samples(sampling)
        segments = (sampling.count - samples) // hop + 1
        sides = np.full(samples // 2 + 1, 2.0)
        sides[0] = 1.0
        sides[-1] = 1.0 if samples % 2 == 0 else 2.0
        scale = sides[self._kept(sampling)] * sampling.interval / np.sum(_window(samples) ** 2) / segments
        density = sums * jnp.asarray(scale, sums.real.dtype).astype(sums.dtype)[:, None, None, None]
        return jnp.moveaxis(density, 2, 0).reshape(sampling.channels, len(sums), -1)


def _window(samples: int) -> np.ndarray:
    """Hann's, periodic as that of scipy."""
    return np.hanning(samples + 1)[:-1]


def csd(x, dt, nperseg: int):
    """Cross-spectral densities of a stored signal: what `CrossSpectralDensity` computes within a run.

    Parameters
    ----------
    x : ``(T, ..., N)``, time first and regions last, or a Quantity of it
    dt : the time from one sample to the next; a plain number is seconds
    nperseg : samples a segment

    Returns
    -------
    freqs : ``(nperseg // 2 + 1,)`` Hz
    density : ``(nperseg // 2 + 1, ..., N, N)``, complex, unit of ``x`` squared per Hz where ``x`` has a unit

    Raises
    ------
    ValueError : fewer than two regions, a segment of fewer than 4 samples or longer than the signal
    """
    unit, values = u.get_unit(x), jnp.asarray(u.get_magnitude(x))
    if values.ndim < 2 or values.shape[-1] < 2:
        raise ValueError(
            f"'x' got shape {values.shape}, but takes (T, ..., N), time first, and two regions or more last"
        )
    if not 4 <= nperseg <= len(values):
        raise ValueError(f"'nperseg' got {nperseg}, but takes 4 to the {len(values)} samples of 'x'")
    interval = units.positive_time(dt if isinstance(dt, u.Quantity) else dt * u.second, u.second, "dt")
    what = CrossSpectralDensity(nperseg * interval * u.second)
    sampling = Sampling(len(values), interval, len(values), values.shape[-1])
    flat = values.reshape(len(values), -1)
    found = what.finish(what.add(what.start(flat[0], sampling), flat, 0, sampling), sampling)
    density = jnp.moveaxis(found.reshape(*found.shape[:2], *values.shape[1:]), 0, -2)
    freqs = np.fft.rfftfreq(nperseg, interval)
    return freqs, density if unit.is_unitless else u.Quantity(density, unit=unit**2 / u.Hz)


def coherency(density):
    """The complex coherency of cross-spectral densities ``(..., N, N)``: their modulus squared is the coherence.

    ``S_ij / sqrt(S_ii S_jj)``, 0 where a region has no power. Its angle is the phase by which region j leads region i;
    no gain of a sensor changes it. Differentiable.
    """
    density = jnp.asarray(u.get_magnitude(density))
    power = jnp.einsum("...ii->...i", density).real
    scale = jnp.where(power > 0, 1.0 / jnp.sqrt(jnp.where(power > 0, power, 1.0)), 0.0).astype(density.dtype)
    return density * scale[..., :, None] * scale[..., None, :]
