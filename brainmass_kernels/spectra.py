"""Power spectra: Welch's estimate, targets to fit, and the distance between two spectra.

A recorded spectrum is modelled as ``scale * P(f) + background * f**-chi``: the neural mass gives the shape
``P``, the sensor's gain is unknown, and the aperiodic activity of everything else adds a power law. The three
nuisances are solved for at every evaluation (`solve_nuisance`), so that parameters explain only what no gain or
power law does. At that inner optimum the derivative of the error by the nuisances is zero, so the gradient through
``P`` alone is the full gradient (variable projection: Golub & Pereyra 1973, SIAM J. Numer. Anal. 10:413).
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np

from . import eeg, tables
from .connectivity import fcd as fcd
from .crossspectra import coherency as coherency
from .crossspectra import csd as csd
from .distributions import ks_distance as ks_distance
from .distributions import pairs as pairs
from .distributions import wasserstein as wasserstein
from .eeg import RECORDINGS
from .rounding import at_rest, centred
from .tables import MIN_POINTS

_POWER_NAMES = ("power", "psd", "spectr", "pxx")


@dataclasses.dataclass(frozen=True, eq=False)
class PowerSpectrum:
    """One or several power spectra on one frequency grid.

    Parameters
    ----------
    freqs : (F,) increasing, positive; plain numbers are Hz
    power : (F,) or (n, F) positive densities in any unit (the scale is a nuisance of the fit)
    name : for tables and figures
    compare : what a fit compares: "log", log10 of the power, in which each decade counts as much; or "linear", the
        power in its standard deviations over the band, in which peaks count most, and an error of 1 explains nothing

    Raises
    ------
    ValueError
        for another shape, unsorted frequencies, fewer than 8 points, a power that is not positive or finite, another
        ``compare``, and a power to be compared linearly that does not vary
    """

    freqs: Any
    power: Any
    name: str = "spectrum"
    compare: str = dataclasses.field(default="log", kw_only=True)

    def __post_init__(self):
        freqs = np.asarray(in_hertz(self.freqs, "freqs"), float)
        power = np.asarray(u.get_mantissa(self.power), float)
        power = power[None] if power.ndim == 1 else power
        _check(freqs, power, self.name)
        if self.compare not in ("log", "linear"):
            raise ValueError(f"'compare' of {self.name} got {self.compare!r}, but takes 'log' or 'linear'")
        if self.linear and (flat := at_rest(power.T)).any():
            at = int(np.argmax(flat)) + 1
            raise ValueError(f"{self.name}: power to be compared linearly is to vary, but spectrum {at} is flat")
        object.__setattr__(self, "freqs", freqs)
        object.__setattr__(self, "power", power)

    def __len__(self) -> int:
        return len(self.power)

    @property
    def linear(self) -> bool:
        """Whether powers are compared, and not their logarithms."""
        return self.compare == "linear"

    def band(self, low: float, high: float) -> PowerSpectrum:
        """The part from ``low`` to ``high`` Hz, both included."""
        inside = (self.freqs >= low) & (self.freqs <= high)
        if inside.sum() < MIN_POINTS:
            raise ValueError(
                f"'band' leaves {self.name} {inside.sum()} frequencies from {low:g} to {high:g} Hz, but takes at least "
                f"{MIN_POINTS}; it covers {self.freqs[0]:g} to {self.freqs[-1]:g} Hz in {len(self.freqs)} points"
            )
        return dataclasses.replace(self, freqs=self.freqs[inside], power=self.power[:, inside])


#: The earlier name.
Spectrum = PowerSpectrum


def in_hertz(value, name: str):
    """The magnitude in Hz of a frequency; plain numbers are Hz. ``name`` is the argument's, for errors."""
    if not isinstance(value, u.Quantity):
        return value
    try:
        return value.to_decimal(u.Hz)
    except Exception as error:
        raise TypeError(f"'{name}' got {u.get_unit(value)}, but takes a frequency (Hz)") from error


def _check(freqs, power, name: str):
    if freqs.ndim != 1 or power.ndim != 2 or power.shape[1] != len(freqs):
        raise ValueError(
            f"{name}: takes freqs (F,) and power (F,) or (n, F), got freqs {freqs.shape} and power {power.shape}"
        )
    if not len(power):
        raise ValueError(f"{name}: power holds no spectrum, its shape is {power.shape}")
    if len(freqs) < MIN_POINTS:
        raise ValueError(f"{name}: {len(freqs)} frequencies are too few, at least {MIN_POINTS} are needed")
    if not np.isfinite(freqs).all() or not (np.diff(freqs) > 0).all():
        at = int(np.argmax(~(np.diff(freqs) > 0)))
        raise ValueError(
            f"{name}: frequencies are to increase, but {freqs[at + 1]:g} Hz follows {freqs[at]:g} Hz at point {at + 2}"
        )
    if freqs[0] <= 0:
        raise ValueError(f"{name}: frequencies are to be positive, got {freqs[0]:g} Hz")
    bad = np.argwhere(~(np.isfinite(power) & (power > 0)))
    if len(bad):
        row, column = bad[0]
        hint = "; is it already a logarithm? give the power itself" if (power < 0).mean() > 0.5 else ""
        raise ValueError(
            f"{name}: powers are to be positive and finite, got {power[row, column]:g} at {freqs[column]:g} Hz "
            f"of spectrum {row + 1} ({len(bad)} such in all){hint}"
        )


def resting_meg() -> PowerSpectrum:
    """The spectrum of resting human MEG: a 1/f background, an alpha peak at 9.8 Hz and a beta bump at 19 Hz.

    The parametric form of Donoghue et al. 2020 (Nat Neurosci 23:1655) fitted to the mean of 25 cortical spectra
    of one subject of the Human Connectome Project, as published with their `specparam` tutorials; 2 to 45 Hz.
    """
    f = np.arange(2.0, 45.01, 0.5)
    alpha = 1.044 * np.exp(-((f - 9.755) ** 2) / (2 * 1.432**2))
    beta = 0.313 * np.exp(-((f - 19.249) ** 2) / (2 * 4.938**2))
    return PowerSpectrum(f, 10 ** (-0.382 - 0.82 * np.log10(f) + alpha + beta), "resting MEG (built in)")


#: Seconds of a segment of a recording, whose inverse is the resolution.
_SEGMENT = 2.0
#: Segments whose spectra are estimated at once; fewer are padded with zeros, so that one shape is compiled.
_BLOCK = 1024
#: Endings of text files of columns.
_TABLES = (".csv", ".tsv")


def load_spectrum(
    path: str | os.PathLike | Any, channel: str | Sequence[str] | None = None, encoding: str | None = None
) -> PowerSpectrum:
    """Read one or several spectra on one grid from a file, or compute them from a recording.

    A ``.npz`` holds one array of frequencies in Hz (``freqs_hz``, ``freqs``, ``f``, ...) and one of powers
    ((F,), (n, F) or (F, n); ``power...``, ``psd...``, or whichever other array fits).

    A ``.csv`` or ``.tsv`` holds a column of frequencies, named ``freq``, ``Frequency (Hz)`` or the like, and powers in
    the other columns, or in those named by ``channel``. Its separator (comma, semicolon, tab, bar or space), decimal
    mark and encoding are detected; row numbers in a column without a name, or named as an index, are left out. Without
    names the first column is the frequency, unless it holds whole numbers, which could be row numbers.

    A recording (``.edf``, ``.bdf``, ``.gdf``, ``.fif``, ``.vhdr``, ``.set``, of continuous data or epochs) is read
    through MNE; an MNE ``Raw`` or ``Epochs`` is read like its file, and a ``Spectrum`` (``raw.compute_psd()``) is taken
    as it is. Each channel gives Welch's spectrum over windows of
    2 s. No window crosses a joint, a gap, the end of an epoch, or a stretch annotated as bad or edge. By default all
    channels of EEG, MEG and electrodes within the brain are read, except those that are marked as bad, flat, or, by
    their type, name or unit, of eyes, muscles, heart, breath or devices.

    Points at 0 Hz are left out.

    Parameters
    ----------
    path : of the file, or an MNE ``Raw``, ``Epochs`` or ``Spectrum`` in memory
    channel : the name of a channel of a recording, or of a column of a table, or several; by default all
    encoding : of the texts in a table, ``.edf``, ``.bdf`` or ``.set``, such as ``"latin1"``; by default detected

    Warns
    -----
    UserWarning
        naming what is left out: channels that are not EEG, marked as bad or flat, pieces shorter than a window, values
        that are not numbers

    Raises
    ------
    FileNotFoundError
        there is no such file
    ValueError
        naming the file, for anything that `PowerSpectrum` refuses, ambiguous arrays or columns, an unknown or
        unreadable channel, and a file of which nothing is left
    TypeError
        neither a path nor a recording
    ImportError
        for a recording, without ``pip install 'brainmass-kernels[eeg]'``
    """
    if in_memory(path):
        if encoding is not None:
            raise ValueError(f"'encoding' got {encoding!r}, but 'target' is read already")
        if eeg.is_recording(path):
            return _of_recording(eeg.read(path, channel))
        channels, freqs, power = eeg.read_spectrum(path, channel)
        return _without_zero(freqs, power, "spectrum", channels)
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"'target' got {type(path).__name__}, but takes a path, or an MNE Raw or Epochs or a Spectrum")
    path = os.fspath(path)
    name = os.path.basename(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"'target' got {path}, but there is no file of that name")
    kind = eeg.kind_of(path)
    if kind in RECORDINGS:
        return _of_recording(eeg.read(path, channel, encoding))
    if kind in _TABLES:
        freqs, power, channels = tables.read(path, channel, encoding)
        return _without_zero(freqs, power, name, channels)
    if kind != ".npz":
        raise ValueError(f"'target' got {name}, which is not one of {', '.join(('.npz', *_TABLES, *RECORDINGS))}")
    for argument, value in (("channel", channel), ("encoding", encoding)):
        if value is not None:
            raise ValueError(f"'{argument}' got {value!r}, but {name} is a spectrum and no recording")
    return _without_zero(*_read_npz(path, name), name)


def in_memory(source) -> bool:
    """Whether an object of MNE is one that `load_spectrum` takes."""
    return eeg.is_recording(source) or eeg.is_spectrum(source)


def _without_zero(freqs, power, name: str, channels: Sequence[str] = ()) -> PowerSpectrum:
    keep = freqs != 0
    return PowerSpectrum(freqs[keep], power[:, keep], f"{name}, {channels[0]}" if len(channels) == 1 else name)


def _of_recording(recording: eeg.Pieces) -> PowerSpectrum:
    """Welch's spectra of a recording, in square microvolts (of MEG, femtotesla) a Hz."""
    channels, units, windows = eeg.windows(recording, _SEGMENT)
    powers = []
    for unit, of_channel in zip(units, windows):
        total = 0.0
        for part in np.split(of_channel, range(_BLOCK, len(of_channel), _BLOCK)):
            # float32 loses signals that are small beside their mean, and squares of very large or small numbers.
            part = part - part.mean(-1, keepdims=True)
            size = np.sqrt(np.mean(part**2)) or 1.0
            block = np.zeros((part.shape[-1], _BLOCK), np.float32)
            block[:, : len(part)] = part.T / size
            freqs, power = welch(block, 1 / recording.rate, len(block))
            total = total + np.asarray(power, float).sum(-1) * size**2
        powers.append(total / len(of_channel) * unit**2)
    return _without_zero(freqs, np.stack(powers), recording.name, channels)


def _read_npz(path: str, name: str):
    try:
        with np.load(path) as archive:
            arrays = {key: archive[key] for key in archive.files}
    except MemoryError:
        raise
    except Exception as error:
        raise ValueError(f"{path}: cannot be read as .npz ({type(error).__name__}: {error})") from error
    listed = ", ".join(f"{key} {value.shape}" for key, value in arrays.items()) or "nothing"
    freq_key = next((key for name in tables.FREQ_NAMES for key in arrays if key.lower() == name), None)
    if freq_key is None:
        raise ValueError(f"{name}: no array of frequencies (one of {', '.join(tables.FREQ_NAMES)}); it holds {listed}")
    freqs = arrays.pop(freq_key)
    if freqs.ndim != 1 or not np.issubdtype(freqs.dtype, np.number):
        raise ValueError(f"{name}: {freq_key} is to be numbers of shape (F,), got {freqs.dtype} {freqs.shape}")
    fitting = {
        key: value
        for key, value in arrays.items()
        if value.ndim in (1, 2) and len(freqs) in value.shape and np.issubdtype(value.dtype, np.floating)
    }
    named = [key for key in fitting if key.lower().startswith(_POWER_NAMES)] or list(fitting)
    if len(named) != 1:
        problem = "no array of powers" if not named else f"several arrays could be the power ({', '.join(named)})"
        raise ValueError(f"{name}: {problem} of shape (n, {len(freqs)}); name one 'power'. It holds {listed}")
    power = fitting[named[0]]
    power = np.atleast_2d(power) if power.shape[-1] == len(freqs) else power.T
    return freqs.astype(float), power.astype(float)


def welch(x, dt, nperseg: int):
    """Power spectral density by Welch's method: Hann window, half overlap, mean removed from each segment.

    Parameters
    ----------
    x : (K, *batch) array or Quantity, time first
    dt : sampling interval; a plain number is seconds
    nperseg : samples a segment; the resolution is ``1 / (nperseg * dt)``

    Returns
    -------
    freqs : (nperseg // 2 + 1,) Hz
    power : (nperseg // 2 + 1, *batch) one-sided density, unit of ``x`` squared per Hz where ``x`` has a unit

    Raises
    ------
    ValueError
        if ``x`` is shorter than one segment, or a segment than 4 samples

    Welch 1967, IEEE Trans. Audio Electroacoust. 15:70; equal to ``scipy.signal.welch``.
    """
    unit = x.unit if isinstance(x, u.Quantity) else None
    values = jnp.asarray(u.get_mantissa(x))
    seconds = float(dt.to_decimal(u.second)) if isinstance(dt, u.Quantity) else float(dt)
    if not 4 <= nperseg <= values.shape[0]:
        raise ValueError(f"'nperseg' got {nperseg}, but takes 4 to the {values.shape[0]} samples of 'x'")
    # numpy's hanning is symmetric; without its last sample it is the periodic window of scipy.
    window = np.hanning(nperseg + 1)[:-1].astype(values.dtype)
    starts = np.arange(0, values.shape[0] - nperseg + 1, nperseg - nperseg // 2)
    segments = jnp.moveaxis(values[starts[:, None] + np.arange(nperseg)], 1, -1)
    segments = (segments - segments.mean(-1, keepdims=True)) * _like(window, segments)
    spectrum = jnp.fft.rfft(segments)
    sides = np.full(nperseg // 2 + 1, 2.0, values.dtype)
    sides[0] = 1.0
    if nperseg % 2 == 0:
        sides[-1] = 1.0
    density = (spectrum.real**2 + spectrum.imag**2).mean(0)
    power = jnp.moveaxis(density * _like(sides * seconds / np.sum(window**2), density), -1, 0)
    freqs = np.fft.rfftfreq(nperseg, seconds)
    return freqs, power if unit is None else power * (unit**2 / u.Hz)


def interpolation(source: np.ndarray, onto: np.ndarray) -> np.ndarray:
    """The matrix (len(onto), len(source)) of linear interpolation between two frequency grids."""
    if onto[0] < source[0] or onto[-1] > source[-1]:
        raise ValueError(
            f"'target' has frequencies from {onto[0]:g} to {onto[-1]:g} Hz, but what is simulated has "
            f"{source[0]:g} to {source[-1]:g} Hz; narrow 'band', or take a smaller 'every'"
        )
    return np.stack([np.interp(onto, source, row) for row in np.eye(len(source))], axis=1)


class Nuisance(NamedTuple):
    """What turns a model's spectrum into an observed one, each of the lane shape; powers as log10."""

    log_scale: Any
    log_background: Any
    chi: Any


#: The lowest background of the solver, in decades below the mean target: next to none.
_NO_BACKGROUND = -4.0
_CHI = (0.0, 3.0)


def observed_log_power(log_model, log_freqs, nuisance: Nuisance):
    """log10 of ``scale * P(f) + background * f**-chi``; ``log_model`` is log10 P, (*lanes, F), of JAX or of NumPy."""
    neural = log_model + nuisance.log_scale[..., None]
    on_host = isinstance(log_model, np.ndarray)
    slope = nuisance.chi[..., None] * (log_freqs if on_host else _like(log_freqs, log_model))
    background = nuisance.log_background[..., None] - slope
    return (np if on_host else jnp).logaddexp(neural * _LN10, background * _LN10) / _LN10


_LN10 = float(np.log(10.0))


def _like(values, lanes):
    """``values`` (F,) for every lane, as ``lanes`` (*lanes, F)."""
    return jnp.broadcast_to(jnp.asarray(values, lanes.dtype), lanes.shape)


def _differences(total, log_target, linear: bool):
    """Residuals of log10 powers, or of powers in standard deviations of the target, and their slope by ``total``."""
    if not linear:
        return total - log_target, jnp.ones_like(total)
    target, power = 10**log_target, 10**total
    spread = jnp.broadcast_to(jnp.std(target, -1, keepdims=True), target.shape)
    return (power - target) / spread, _LN10 * power / spread


def solve_nuisance(
    log_model, log_target, log_freqs, *, background: bool = True, iterations: int | None = None, linear: bool = False
) -> Nuisance:
    """The nuisances that bring a model's spectrum closest to the target's, lane by lane.

    Levenberg-Marquardt on (log scale, log background, chi), from equal shares of the power. Without a background
    the best scale is the mean difference of the logarithms, or the regression of the powers. Chi stays between 0 and 3.

    Parameters
    ----------
    log_model : (*lanes, F) log10 powers
    log_target : the same, or what broadcasts to it
    log_freqs : (F,) log10 of Hz
    iterations : at most; ``None``, 20, or 40 of powers
    linear : whether powers are close where their difference is small, and not that of their logarithms
    """
    log_target, log_freqs = _like(log_target, log_model), _like(log_freqs, log_model)
    level = jnp.mean(log_target - log_model, -1)
    if not background:
        if linear:
            # About their means, which float32 has room for.
            model = log_model + _like(level[..., None], log_model)
            level = level + _log_sum(model + log_target) - _log_sum(2 * model)
        return Nuisance(level, jnp.full_like(level, -jnp.inf), jnp.ones_like(level))
    floor = jnp.mean(log_target, -1) + _NO_BACKGROUND

    def error(theta):
        return jnp.sum(_differences(observed_log_power(log_model, log_freqs, theta), log_target, linear)[0] ** 2, -1)

    def iteration(_, carry):
        theta, best, damping = carry
        total = observed_log_power(log_model, log_freqs, theta)
        differences, by_total = _differences(total, log_target, linear)
        share = 10 ** (log_model + theta.log_scale[..., None] - total)
        jacobian = jnp.stack([share, 1 - share, -(1 - share) * log_freqs], -1)
        jacobian = jacobian * by_total[..., None] if linear else jacobian
        normal = jnp.einsum("...fi,...fj->...ij", jacobian, jacobian)
        normal = normal + damping[..., None, None] * _like(jnp.eye(3), normal)
        slope = jnp.einsum("...fi,...f->...i", jacobian, differences)
        trial = Nuisance(*jnp.moveaxis(jnp.stack(theta, -1) - _solve_symmetric(normal, slope), -1, 0))
        trial = trial._replace(log_background=jnp.maximum(trial.log_background, floor), chi=jnp.clip(trial.chi, *_CHI))
        trial_error = error(trial)
        better = trial_error < best
        theta = Nuisance(*(jnp.where(better, new, old) for new, old in zip(trial, theta)))
        damping = jnp.clip(jnp.where(better, damping / 5, damping * 5), 1e-6 if linear else 1e-3, 1e4)
        return theta, jnp.where(better, trial_error, best), damping

    half = _log_sum(log_target) + math.log10(0.5)
    one = jnp.ones_like(level)
    theta = Nuisance(half - _log_sum(log_model), half - _log_sum(-log_freqs), one)
    most = iterations or (40 if linear else 20)
    return jax.lax.fori_loop(0, most, iteration, (theta, error(theta), one))[0]


def _log_sum(log_power):
    return jax.nn.logsumexp(log_power * _LN10, axis=-1) / _LN10


def _solve_symmetric(matrix, right):
    """Solve 3 by 3 symmetric systems by Cramer's rule, (*lanes, 3, 3) and (*lanes, 3)."""
    a, b, c = matrix[..., 0, :], matrix[..., 1, :], matrix[..., 2, :]
    bc, ca, ab = jnp.cross(b, c), jnp.cross(c, a), jnp.cross(a, b)
    determinant = jnp.sum(a * bc, -1, keepdims=True)
    return (right[..., :1] * bc + right[..., 1:2] * ca + right[..., 2:] * ab) / determinant


def log_error(
    log_model, log_target, log_freqs, *, background: bool = True, iterations: int | None = None, linear: bool = False
):
    """Mean squared error of log10 power at the best nuisances, and these; differentiable in ``log_model``.

    Returns
    -------
    error : (*lanes,) mean over frequencies of the squared difference of log10 powers; with ``linear`` of powers, in
        standard deviations of the target over the frequencies
    nuisance : `Nuisance` of (*lanes,), without derivative
    """
    log_target = _like(log_target, log_model)
    fixed = jax.lax.stop_gradient(log_model)
    options = {"background": background, "iterations": iterations, "linear": linear}
    nuisance = jax.lax.stop_gradient(solve_nuisance(fixed, log_target, log_freqs, **options))
    total = observed_log_power(log_model, log_freqs, nuisance)
    return jnp.mean(_differences(total, log_target, linear)[0] ** 2, -1), nuisance


def log_residuals(log_model, log_target, log_freqs, *, background: bool = True, linear: bool = False):
    """Differences of log10 power (with ``linear`` of power) at the best nuisances, and these; for Gauss-Newton steps.

    The derivative of the residuals takes into account that the nuisances change: it is projected off the directions
    that they explain (Kaufman 1975, BIT 15:49). A nuisance at its bound does not change.

    Returns
    -------
    residuals : (*lanes, F)
    nuisance : `Nuisance` of (*lanes,), without derivative
    """
    log_target = _like(log_target, log_model)
    fixed = jax.lax.stop_gradient(log_model)
    solved = solve_nuisance(fixed, log_target, log_freqs, background=background, linear=linear)
    nuisance = jax.lax.stop_gradient(solved)
    total = observed_log_power(log_model, log_freqs, nuisance)
    residuals, by_total = _differences(total, log_target, linear)
    total = jax.lax.stop_gradient(total if linear else residuals + log_target)
    share = 10 ** (fixed + nuisance.log_scale[..., None] - total)
    columns = [share]
    if background:
        moves = nuisance.log_background > jnp.mean(log_target, -1) + _NO_BACKGROUND
        bends = moves & (nuisance.chi > _CHI[0]) & (nuisance.chi < _CHI[1])
        columns += [jnp.where(moves[..., None], 1 - share, 0.0)]
        columns += [jnp.where(bends[..., None], -(1 - share) * _like(log_freqs, share), 0.0)]
    directions = jnp.stack(columns, -1)
    directions = directions * jax.lax.stop_gradient(by_total)[..., None] if linear else directions
    normal = jnp.einsum("...fi,...fj->...ij", directions, directions)
    normal = normal + _like(1e-6 * jnp.eye(len(columns)), normal)
    change = residuals - jax.lax.stop_gradient(residuals)
    along = jnp.linalg.solve(normal, jnp.einsum("...fi,...f->...i", directions, change)[..., None])[..., 0]
    explained = jnp.einsum("...fi,...i->...f", directions, along)
    return jax.lax.stop_gradient(residuals) + change - explained, nuisance


def aperiodic(freqs, log_power, beside=((6.5, 13.5), (15.0, 25.0))):
    """The straight line in log-log through a spectrum without the bands ``beside``, where it has peaks, (..., F)."""
    log_freqs = np.log10(freqs)
    outside = ~np.any([(freqs > low) & (freqs < high) for low, high in beside], axis=0)
    outside = outside if outside.sum() > 3 else np.ones_like(outside)
    design = np.stack([np.ones(outside.sum()), log_freqs[outside]], -1)
    line, *_ = np.linalg.lstsq(design, np.moveaxis(np.atleast_2d(log_power)[:, outside], -1, 0), rcond=None)
    return (np.stack([np.ones(len(freqs)), log_freqs], -1) @ line).T.reshape(np.shape(log_power))


#: Variation of a spectrum by rounding, in decades.
_FLAT = 1e-6


def alpha_peak(freqs, power, band=(7.0, 13.0)):
    """Frequency in Hz of the highest point of each spectrum above its aperiodic line within ``band``.

    The flattened log spectrum is smoothed over three points and the maximum refined by a parabola, so that the peak
    of a noisy spectrum does not jump between neighbouring points. NaN without a peak: for a spectrum that is flat
    in the band, has no frequency in it, or has powers that are not positive and finite.
    """
    freqs, rows = np.asarray(freqs, float), np.atleast_2d(np.asarray(power, float))
    usable = np.all(np.isfinite(rows) & (rows > 0), axis=-1)
    log_power = np.log10(np.where(usable[:, None], rows, 1.0))
    flat = log_power - aperiodic(freqs, log_power)
    smooth = flat.copy()
    smooth[:, 1:-1] = (flat[:, :-2] + 2 * flat[:, 1:-1] + flat[:, 2:]) / 4
    inside = (freqs >= band[0]) & (freqs <= band[1])
    rises = np.ptp(smooth[:, inside], axis=-1) > _FLAT if inside.any() else np.zeros(len(smooth), bool)
    at = np.clip(np.where(inside, smooth, -np.inf).argmax(-1), 1, len(freqs) - 2)
    lane = np.arange(len(smooth))
    below, here, above = smooth[lane, at - 1], smooth[lane, at], smooth[lane, at + 1]
    bend = below - 2 * here + above
    shift = np.where(bend < 0, 0.5 * (below - above) / np.where(bend < 0, bend, 1.0), 0.0)
    step = (freqs[at + 1] - freqs[at - 1]) / 2
    peak = freqs[at] + np.clip(shift, -0.5, 0.5) * step
    return np.where(usable & rises, peak, np.nan).reshape(np.shape(power)[:-1])


def envelope(x, dt, band):
    """Amplitude of the oscillation in a band: the modulus of the band-pass filtered analytic signal.

    Parameters
    ----------
    x : ``(T, ...)``, time first
    dt : the time from one sample to the next
    band : ``(low, high)``, with cosine flanks of a quarter of its width; plain numbers are Hz

    Returns
    -------
    ``(T, ...)``, in the unit of ``x``, next to 0 for a record at rest (`at_rest`). The transform is periodic, which
    distorts both ends

    Raises
    ------
    ValueError : a band that does not rise from above 0 to below half the sampling rate
    """
    unit, x = u.get_unit(x), u.get_magnitude(x)
    seconds = float(dt.to_decimal(u.second)) if isinstance(dt, u.Quantity) else float(dt)
    low, high = (float(in_hertz(edge, "band")) for edge in band)
    if not 0.0 < low < high < 0.5 / seconds:
        raise ValueError(f"'band' got {low:g} to {high:g} Hz, but takes rising ones from 0 to {0.5 / seconds:g} Hz")
    freqs, flank = np.fft.fftfreq(len(x), seconds), (high - low) / 4.0
    inside = np.clip(np.minimum(freqs - low, high - freqs) / flank + 0.5, 0.0, 1.0)
    # The analytic signal has positive frequencies twice and no negative ones.
    gain = (2.0 * np.sin(0.5 * np.pi * inside) ** 2).astype(x.dtype).reshape(-1, *(1,) * (x.ndim - 1))
    # A constant is subtracted first, and added at the gain of 0 Hz: its rounding would look like an oscillation.
    origin = x[:1]
    moved = jnp.where(at_rest(x)[None], 0.0, x - origin)
    transform = jnp.fft.fft(moved, axis=0)
    analytic = jnp.fft.ifft(transform * jnp.broadcast_to(gain, x.shape).astype(transform.dtype), axis=0)
    # A smooth modulus, whose derivative is finite where the signal vanishes.
    real = analytic.real + jnp.broadcast_to(gain[:1] * origin, x.shape)
    modulus = jnp.sqrt(real**2 + analytic.imag**2 + jnp.finfo(x.dtype).tiny)
    return modulus if unit.is_unitless else u.Quantity(modulus, unit=unit)


def correlation(x):
    """Functional connectivity: Pearson's correlation over time of each pair of regions.

    Parameters
    ----------
    x : ``(T, ..., N)``, time first and regions last

    Returns
    -------
    ``(..., N, N)``; 0 for a region at rest (`at_rest`), its own diagonal included, differentiable
    """
    x = jnp.asarray(centred(x))
    covariance = jnp.einsum("t...i,t...j->...ij", x, x, precision="highest")
    power = jnp.einsum("...ii->...i", covariance)
    scale = jnp.where(power > 0, 1.0 / jnp.sqrt(jnp.where(power > 0, power, 1.0)), 0.0).astype(x.dtype)
    return covariance * scale[..., :, None] * scale[..., None, :]
