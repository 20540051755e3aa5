"""Fitting a model's parameters to power spectra by gradients, every start and every target in one simulation.

The lanes of the one batch are (target, start, realisation). Lanes never mix, so the gradient of the summed error
is every lane's own, and one optimiser step moves all of them. A bounded parameter is a smooth map of a free
variable z; the noise is fixed during a fit (the same realisations for every lane), and everything a `Fit`
reports at the end is measured again on noise that the optimiser has not seen.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np

from . import models, spectra, units
from .models.base import Model, check_name
from .network import Network
from .simulate import explain, simulate
from .spectra import Spectrum

#: Adam's step in z, where the width between the bounds is about 6.
LEARNING_RATE = 0.05
#: Folded into the key for the noise that only the final report uses.
_UNSEEN = 1_000_003
#: Repetitions of the fit's own length on which it is reported.
_CHECKS = 4
#: "noise.E_inp" is the intensity of the noise on the input E_inp.
_NOISE = "noise."
_FORMAT = ("brainmass_kernels.Fit", 1)


@dataclasses.dataclass(frozen=True)
class Free:
    """A free quantity and its bounds, plain numbers in ``unit``.

    Between positive bounds the map from z is geometric, ``low (high / low)**s``, else linear, with
    ``s = 1 / (1 + exp(-z))``.
    """

    name: str
    low: float
    high: float
    unit: Any

    @property
    def geometric(self) -> bool:
        return self.low > 0

    def value(self, z):
        s = jax.nn.sigmoid(z)
        return self.low * (self.high / self.low) ** s if self.geometric else self.low + (self.high - self.low) * s

    def position(self, value):
        """Where between the bounds a value lies, 0 to 1; values outside are moved inside."""
        value = np.clip(value, self.low, self.high)
        if self.geometric:
            return np.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def _to_z(position):
    position = np.clip(position, 0.01, 0.99)
    return np.log(position / (1 - position))


class Progress(NamedTuple):
    """What a ``progress`` callback is given after each step; it may return True to stop the fit."""

    step: int
    steps: int
    rms: np.ndarray  # (targets, starts), this step
    best: np.ndarray  # (targets,), lowest so far


@dataclasses.dataclass(frozen=True, eq=False)
class Fit:
    """What `fit` found. Arrays lead with the targets, n; a lane is one (target, start).

    Attributes
    ----------
    parameters : name to Quantity (n,), the best start of each target
    model, inputs, noise : what was fitted, with those values put in: `simulate` takes them as they are
    rms, initial_rms : (n,) rms error of log10 power over the band, of the fit and of start 0 (the model as it
        was given, unless starts were given), on noise the optimiser has not seen
    losses : (steps, n, starts) the same error step by step, on the noise of the fit; NaN where a lane diverged
    best_start : (n,) which start was the best
    spectrum, initial_spectrum : `Spectrum` (n, F), nuisances included
    nuisance : name to (n,): log10 of the scale and of the background, and its exponent chi
    target : `Spectrum` within the band
    implementation, reason : which backend ran, and why
    seconds : wall time of the fit, compilation included
    """

    parameters: dict[str, Any]
    model: Any
    inputs: dict[str, Any]
    noise: dict[str, Any]
    rms: np.ndarray
    initial_rms: np.ndarray
    losses: np.ndarray
    best_start: np.ndarray
    spectrum: Spectrum
    initial_spectrum: Spectrum
    nuisance: dict[str, np.ndarray]
    target: Spectrum
    free: tuple[Free, ...]
    settings: dict[str, Any]
    state: dict[str, Any] = dataclasses.field(repr=False)
    implementation: str = ""
    reason: str = ""
    seconds: float = 0.0

    @property
    def peaks(self) -> tuple[np.ndarray, np.ndarray]:
        """Alpha peak of the target and of the fit, Hz (n,) each."""
        return tuple(spectra.alpha_peak(s.freqs, s.power) for s in (self.target, self.spectrum))  # type: ignore

    def __str__(self) -> str:
        n, steps = len(self.target), len(self.losses)
        lines = [
            f"{type(self.model).__name__} fitted to {self.target.name}: {n} spectr{'a' if n > 1 else 'um'}, "
            f"{self.losses.shape[2]} starts, {steps} steps, {self.seconds:.1f} s on {self.implementation}",
            "",
            _row("", "fitted", "bounds"),
        ]
        for free in self.free:
            value = np.asarray(units.strip(self.parameters[free.name], free.unit, free.name))
            lines.append(_row(free.name, _spread(value, free.unit), f"{free.low:g} to {free.high:g}"))
        target, fitted = self.peaks
        lines += [
            "",
            _row("rms error, log10 power", _spread(self.rms), f"as given {_spread(self.initial_rms)}"),
            _row("alpha peak", _spread(fitted, "Hz"), f"target {_spread(target, 'Hz')}"),
        ]
        if self.settings["background"]:
            lines.append(_row("background 1/f^chi", _spread(self.nuisance["chi"]), ""))
        return "\n".join(line.rstrip() for line in lines)

    def save(self, path: str | os.PathLike) -> None:
        """Write the fit, and what `fit` needs to go on with it, as JSON."""
        with open(path, "w") as file:
            json.dump(_encode(self), file, allow_nan=False)
            file.write("\n")

    @classmethod
    def load(cls, path: str | os.PathLike, model=None) -> Fit:
        """Read what `save` wrote; ``model`` is any instance of the model's class where it is not one of this package.

        Raises
        ------
        FileNotFoundError, ValueError
            where there is no such file, or it is not a saved fit
        """
        path = os.fspath(path)
        if not os.path.isfile(path):
            raise FileNotFoundError(f"'resume' got {path}, but there is no file of that name")
        try:
            with open(path) as file:
                saved = json.load(file)
            form = (saved["format"], saved["version"])
            if form != _FORMAT:
                raise KeyError(f"{form} is not {_FORMAT}")
            return _decode(saved, model)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{os.path.basename(path)}: not a fit saved by this brainmass_kernels ({error!r})"
            ) from error


def _row(name: str, value: str, note: str) -> str:
    return f"  {name:<24}{value:<36}{note}"


def _spread(values, unit="") -> str:
    """One value, or the median and the range of several."""
    unit = "" if str(unit) in ("", "1") else f" {unit}"
    if len(values) == 1:
        return f"{values[0]:.4g}{unit}"
    return f"{np.median(values):.4g} ({np.min(values):.3g} to {np.max(values):.3g}){unit}"


def fit(
    model,
    target=None,
    free: Mapping[str, tuple] | None = None,
    *,
    inputs: Mapping[str, Any] | None = None,
    noise: Mapping[str, Any] | None = None,
    starts: int | Mapping[str, Any] = 16,
    screen: int = 0,
    steps: int = 100,
    key=None,
    duration=9 * u.second,
    dt=1 * u.ms,
    every: int = 5,
    transient=1 * u.second,
    realisations: int = 4,
    band: tuple[float, float] = (2.0, 40.0),
    background: bool = True,
    optimiser=None,
    clip: float = 0.1,
    patience: int = 40,
    tolerance: float = 0.005,
    record: str = "eeg",
    scheme: str | None = None,
    implementation: str | None = None,
    progress: bool | Callable[[Progress], Any] = False,
    resume: str | os.PathLike | Fit | None = None,
) -> Fit:
    """Fit free parameters to one or many power spectra, by gradients from many starts at once.

    The error of a lane is the mean squared difference of log10 power between the target and
    ``scale * P_model(f) + background * f**-chi``, whose three nuisances are solved for at every step
    (`spectra.log_error`). The model's spectrum is Welch's at the resolution of the target, over ``realisations``
    runs of ``duration`` each, their transients left out.

    Parameters
    ----------
    model : a model with scalar fields; its values are start 0
    target : `Spectrum`, the path of a ``.npz`` or ``.csv`` file, or a pair (freqs, power), n spectra in all
    free : name to (low, high). A name is a field of the model, an input (``"E_inp"``), or the intensity of the
        noise on an input (``"noise.E_inp"``). Plain bounds are in the unit of the value they replace
    inputs, noise : as `simulate` takes them; whatever is free is to have a value here, its start 0
    starts : how many (the model's own values, then a Latin hypercube within the bounds), or the starts
        themselves, name to values (starts,) or (n, starts)
    screen : simulate at least this many candidates first, and start each target from those nearest to it
    steps : most optimiser steps
    key : of `jax.random`; fixes the noise and the starts
    duration, dt, every, transient, record, scheme, implementation : as `simulate` takes them
    realisations : runs with different noise that one spectrum is averaged over
    band : Hz, where the spectra are compared
    background : whether a power law is added; without it only the scale is free
    optimiser : any of `optax`; Adam at 0.05, with b2 = 0.99, unless given
    clip : the largest norm of one lane's gradient
    patience, tolerance : stop when in this many steps no target's error has fallen by this fraction
    progress : True for a bar on stderr, or a function of `Progress`; it stops the fit by returning True
    resume : a `Fit` or the path of a saved one, to go on with for ``steps`` more steps; target and free bounds
        are then its own unless given, and everything given must agree with it

    Returns
    -------
    `Fit`

    Raises
    ------
    ValueError, TypeError
        naming the argument, for an unknown name, bounds that are not increasing, a unit that does not fit, a
        target that cannot be used, or a resumed fit that was another
    ImportError
        without the packages of ``pip install 'brainmass-kernels[fit]'``
    """
    needs("optax")
    begin = time.perf_counter()
    if not isinstance(model, Model):
        network = " A network's own loss takes jax.grad of simulate() and optax, as in examples/whole_brain.py."
        raise TypeError(
            f"'model' got {type(model).__name__}, but takes a model such as bk.JansenRit()."
            + (network if isinstance(model, Network) else "")
        )
    saved = resume if resume is None or isinstance(resume, Fit) else Fit.load(resume, model)
    target = saved.target if target is None and saved else _as_spectrum(target).band(*_as_band(band))
    if free is None and saved:
        free = {f.name: (f.low, f.high) for f in saved.free}
    inputs, noise = dict(inputs or {}), dict(noise or {})
    frees, given = _resolve_free(model, inputs, noise, free)
    counts = {"steps": steps, "every": every, "realisations": realisations, "patience": patience}
    for name, value in counts.items():
        _check_count(name, value, 1)
    _check_count("screen", screen, 0)
    if not (math.isfinite(clip) and clip > 0):
        raise ValueError(f"'clip' got {clip}, but takes a positive number")
    key = jax.random.key(0) if key is None else key
    if optimiser is not None and not hasattr(optimiser, "update"):
        raise TypeError(f"'optimiser' got {type(optimiser).__name__}, but takes an optax optimiser")
    optimiser = optimiser or _adam()

    problem = _Problem(
        model=model,
        inputs=inputs,
        noise=noise,
        frees=frees,
        target=target,
        band=_as_band(band),
        background=bool(background),
        realisations=realisations,
        record=record,
        options={
            "duration": duration,
            "dt": dt,
            "every": every,
            "transient": transient,
            "scheme": scheme,
            "implementation": implementation,
        },
    )
    settings = problem.settings() | {"key": np.asarray(jax.random.key_data(key)).tolist()}
    plan = problem.plan(key)
    if saved:
        _check_same(saved, settings, frees, target)
        state = _restore(saved.state, optimiser)
    else:
        z = _starts(problem, starts, screen, given, key)
        state = _State(z, optimiser.init(z), z, jnp.full_like(z[frees[0].name], jnp.inf), z)
    history = [] if saved is None else list(saved.losses)
    state = _descend(problem, state, history, optimiser, key, steps, clip, patience, tolerance, progress)
    return _report(problem, state, history, key, settings, plan, begin)


def needs(package: str, extra: str = "fit"):
    """Import a package of an extra."""
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f"this needs {package}, which is not installed: pip install 'brainmass-kernels[{extra}]'"
        ) from error


# --- arguments ---


def _as_spectrum(target) -> Spectrum:
    if isinstance(target, Spectrum):
        return target
    if isinstance(target, str | os.PathLike):
        return spectra.load_spectrum(target)
    if isinstance(target, tuple | list) and len(target) == 2:
        return Spectrum(*target)
    raise TypeError(
        f"'target' got {type(target).__name__}, but takes a Spectrum, the path of a .npz or .csv file, or a pair "
        "(freqs, power)"
    )


def _as_band(band) -> tuple[float, float]:
    try:
        low, high = (float(spectra.in_hertz(edge, "band")) for edge in band)
    except (TypeError, ValueError) as error:
        raise TypeError(f"'band' got {band!r}, but takes two frequencies (low, high) in Hz") from error
    if not 0 < low < high:
        raise ValueError(f"'band' got {low:g} and {high:g} Hz, but takes 0 < low < high")
    return low, high


def _check_count(name: str, value, least: int):
    if not isinstance(value, int | np.integer) or isinstance(value, bool):
        raise TypeError(f"'{name}' got {value!r}, but takes a whole number")
    if value < least:
        raise ValueError(f"'{name}' got {value}, but takes at least {least}")


def _resolve_free(model, inputs, noise, free) -> tuple[tuple[Free, ...], dict[str, float]]:
    """The free quantities with bounds in their units, and the values they have in the arguments."""
    if not isinstance(free, Mapping):
        raise TypeError(f"'free' got {type(free).__name__}, but takes a dict of name to (low, high)")
    if not free:
        raise ValueError("'free' names no parameter, but takes at least one as name to (low, high)")
    known = _quantities(model, inputs, noise)
    for name in free:
        check_name(name, known, "name in 'free'")
    frees = tuple(Free(name, *_bounds(name, bounds, known[name][0]), known[name][0]) for name, bounds in free.items())
    return frees, {f.name: _scalar(known[f.name][1], f.unit, f.name) for f in frees}


def _quantities(model, inputs, noise) -> dict[str, tuple[Any, Any]]:
    """The unit and the value of whatever can be free."""
    fields = {name: (unit, getattr(model, name)) for name, unit in model.parameter_units().items()}
    driven = {name: (units.unit_of(value), inputs.get(name, value)) for name, value in model.inputs.items()}
    shaken = {}
    for name, (unit, _) in driven.items():
        root = unit * u.second**0.5
        shaken[_NOISE + name] = (root, noise.get(name, 0.0 * root))
    return fields | driven | shaken


def _scalar(value, unit, name: str) -> float:
    magnitude = np.asarray(units.strip(value, unit, name))
    if magnitude.ndim:
        raise ValueError(f"'{name}' got shape {magnitude.shape}, but to be free takes a scalar; give `starts` for more")
    return float(magnitude)


def _bounds(name, bounds, unit) -> tuple[float, float]:
    if not isinstance(bounds, tuple | list) or len(bounds) != 2:
        raise TypeError(f"'free' got {bounds!r} for {name!r}, but takes a pair (low, high)")
    low, high = (float(_plain(bound, unit, f"free: {name}")) for bound in bounds)
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"'free' got {low:g} and {high:g} for {name!r}, but takes finite bounds, low < high")
    if name.startswith(_NOISE) and low < 0:
        raise ValueError(f"'free' got {low:g} for {name!r}, but a noise intensity is not negative")
    return low, high


def _plain(value, unit, name: str):
    """A magnitude in ``unit``; a plain number is in it already."""
    return units.strip(value if isinstance(value, u.Quantity) else u.Quantity(value, unit=unit), unit, name)


def _starts(problem: _Problem, starts, screen: int, given, key) -> dict[str, jax.Array]:
    """z of every start of every target, name to (n, starts)."""
    n, frees = len(problem.target), problem.frees
    if isinstance(starts, Mapping):
        return _given_starts(problem, starts)
    _check_count("starts", starts, 1)
    count = max(starts, math.ceil(screen / (n * starts)) * n * starts)
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel().tolist())
    # A Latin hypercube: each parameter takes every one of `count` equal slices once.
    position = (
        rng.permuted(np.tile(np.arange(count), (len(frees), 1)), axis=1) + rng.random((len(frees), count))
    ) / count
    position[:, 0] = [float(f.position(given[f.name])) for f in frees]
    z = {f.name: jnp.asarray(_to_z(row)) for f, row in zip(frees, position)}
    if count == starts:
        return {name: jnp.broadcast_to(row, (n, starts)) for name, row in z.items()}
    keep = problem.nearest(z, starts, key)
    return {name: row[keep] for name, row in z.items()}


def _given_starts(problem: _Problem, starts) -> dict[str, jax.Array]:
    names = [f.name for f in problem.frees]
    if set(starts) != set(names):
        raise ValueError(
            f"'starts' got {', '.join(map(str, starts)) or 'none'}, but takes values of {', '.join(names)}"
        )
    values = {f.name: np.atleast_1d(_plain(starts[f.name], f.unit, f"starts: {f.name!r}")) for f in problem.frees}
    try:
        shape = np.broadcast_shapes(*(value.shape for value in values.values()), (len(problem.target), 1))
    except ValueError:
        shape = ()
    if len(shape) != 2 or shape[0] != len(problem.target):
        shapes = {name: value.shape for name, value in values.items()}
        raise ValueError(
            f"'starts' got shapes {shapes}, but takes (starts,) or ({len(problem.target)}, starts) of each"
        )
    return {f.name: jnp.broadcast_to(jnp.asarray(_to_z(f.position(values[f.name]))), shape) for f in problem.frees}


# --- the objective ---


@dataclasses.dataclass(frozen=True, eq=False)
class _Problem:
    """What a fit minimises: from z (n, starts) to log spectra and their errors."""

    model: Any
    inputs: dict[str, Any]
    noise: dict[str, Any]
    frees: tuple[Free, ...]
    target: Spectrum
    band: tuple[float, float]
    background: bool
    realisations: int
    record: str
    options: dict[str, Any]

    @property
    def dt(self) -> float:
        return units.concrete(units.strip(self.options["dt"], u.second, "dt"), "dt")

    @property
    def sampling(self) -> float:
        return self.dt * self.options["every"]

    @functools.cached_property
    def nperseg(self) -> int:
        """Samples of a segment that give the model's spectrum the resolution of the target's."""
        window = float(np.clip(1 / np.median(np.diff(self.target.freqs)), 1.0, 4.0))
        samples = (self.steps("duration") - self.steps("transient")) // self.options["every"]
        if samples * self.sampling < window:
            raise ValueError(
                f"'duration' leaves {samples * self.sampling:g} s after the transient, but the target's resolution "
                f"takes {window:.3g} s at least"
            )
        return round(window / self.sampling)

    @functools.cached_property
    def onto(self) -> np.ndarray:
        return spectra.interpolation(np.fft.rfftfreq(self.nperseg, self.sampling), self.target.freqs)

    @property
    def log_freqs(self) -> np.ndarray:
        return np.log10(self.target.freqs)

    @property
    def level(self) -> np.ndarray:
        """Mean log10 power of each target (n,): float32 does not hold 1e-23 squared, and the scale brings it back."""
        return np.log10(self.target.power).mean(-1)

    @property
    def log_target(self) -> np.ndarray:
        return (np.log10(self.target.power) - self.level[:, None])[:, None]

    @functools.cached_property
    def identity(self) -> tuple:
        held = self.settings() | {"free": [(f.name, f.low, f.high, str(f.unit)) for f in self.frees]}
        held |= {"implementation": self.options["implementation"], "grid": self.target.freqs.tolist()}
        return type(self.model), json.dumps(held)

    # Programs are compiled once for problems that differ in the target's powers and the key only.
    def __hash__(self) -> int:
        return hash(self.identity)

    def __eq__(self, other) -> bool:
        return isinstance(other, _Problem) and self.identity == other.identity

    def settings(self) -> dict[str, Any]:
        """Everything that a resumed fit must share, ready for JSON."""
        fixed = {
            name: np.asarray(units.strip(value, unit, name)).tolist()
            for name, (unit, value) in _quantities(self.model, self.inputs, self.noise).items()
            if name not in {f.name for f in self.frees}
        }
        return {
            "duration": self.steps("duration") * self.dt,
            "dt": self.dt,
            "every": self.options["every"],
            "transient": self.steps("transient") * self.dt,
            "scheme": self.options["scheme"],
            "model": type(self.model).__name__,
            "fixed": fixed,
            "realisations": self.realisations,
            "band": list(self.band),
            "background": self.background,
            "record": self.record,
        }

    def steps(self, name: str) -> int:
        return 0 if self.options[name] is None else units.steps_of(self.options[name], self.dt, name)

    def arguments(self, z) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        """Model, inputs and noise with the free values put in; every array of z has the batch shape."""
        return self.put({f.name: f.value(z[f.name]) for f in self.frees})

    def put(self, values) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        fields, inputs, noise = {}, dict(self.inputs), dict(self.noise)
        for f in self.frees:
            value = units.attach(values[f.name], f.unit)
            if f.name.startswith(_NOISE):
                noise[f.name.removeprefix(_NOISE)] = value
            elif f.name in self.model.inputs:
                inputs[f.name] = value
            else:
                fields[f.name] = value
        return dataclasses.replace(self.model, **fields), inputs, noise

    def run(self, z, keys, call):
        """``call`` (simulate or explain) on the lanes (*lanes of z, realisations)."""
        lanes = (*z[self.frees[0].name].shape, self.realisations)
        z = {name: jnp.broadcast_to(value[..., None], lanes) for name, value in z.items()}
        model, inputs, noise = self.arguments(z)
        keys = jnp.broadcast_to(keys, lanes) if noise else None
        return call(model, inputs=inputs, noise=noise or None, key=keys, record=self.record, **self.options)

    def plan(self, key):
        """Which implementation the simulations of this fit run on, and why; every argument is checked by it."""
        return self.run({f.name: jnp.zeros((len(self.target), 1)) for f in self.frees}, self.keys(key), explain)

    def power(self, z, keys):
        """Welch's density of the record (*lanes, frequencies), averaged over the realisations."""
        signal = u.get_mantissa(self.run(z, keys, simulate)[self.record])
        power: Any = spectra.welch(signal, self.sampling, self.nperseg)[1]
        return jnp.moveaxis(power.mean(-1), 0, -1)

    def log_model(self, power):
        """log10 of a density at the target's frequencies."""
        return jnp.log10(jnp.maximum(power, 1e-30)) @ jnp.asarray(self.onto.T, power.dtype)

    def error(self, power, log_target):
        """Squared error and nuisances of each lane; infinite where the simulation was not finite."""
        log_model = self.log_model(power)
        log_model = jnp.broadcast_to(log_model, (len(log_target), *log_model.shape[1:]))
        error, nuisance = spectra.log_error(log_model, log_target, self.log_freqs, background=self.background)
        return jnp.where(jnp.isfinite(error), error, jnp.inf), nuisance

    def keys(self, key, check: int | None = None):
        """One key a realisation; with ``check``, of noise that no fit sees."""
        return jax.random.split(key if check is None else jax.random.fold_in(key, _UNSEEN + check), self.realisations)

    def nearest(self, z, starts: int, key) -> np.ndarray:
        """Of candidates (m,), which ``starts`` each target is nearest to; the first candidate always stays."""
        n = len(self.target)
        blocks = {name: row.reshape(-1, n, starts) for name, row in z.items()}
        parts = [
            _power(self, {name: block[i] for name, block in blocks.items()}, self.keys(key))
            for i in range(len(blocks[self.frees[0].name]))
        ]
        power = jnp.stack(parts).reshape(1, -1, parts[0].shape[-1])
        error = np.array(_error(self, power, self.log_target)[0])
        error[:, 0] = -1.0
        return np.argsort(error, axis=1, kind="stable")[:, :starts]


# --- the descent ---


class _State(NamedTuple):
    """What the optimiser carries and a saved fit keeps; each leaf (n, starts)."""

    z: dict[str, jax.Array]
    moments: Any
    best_z: dict[str, jax.Array]
    best: jax.Array
    first: dict[str, jax.Array]


_power = jax.jit(_Problem.power, static_argnums=0)
_error = jax.jit(_Problem.error, static_argnums=0)


@functools.cache
def _adam():
    optax: Any = needs("optax")
    return optax.adam(LEARNING_RATE, b2=0.99)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _advance(problem: _Problem, optimiser, state: _State, keys, log_target, clip):
    """One step of every lane, and the errors before it."""

    def objective(z):
        error, _ = problem.error(problem.power(z, keys), log_target)
        # Lanes do not mix: the gradient of the sum is each lane's own.
        return jnp.sum(error), error

    slopes, error = jax.grad(objective, has_aux=True)(state.z)
    better = error < state.best
    best_z = jax.tree.map(lambda new, old: jnp.where(better, new, old), state.z, state.best_z)
    # optax itself leans on promotion, which a user may have forbidden.
    with jax.numpy_dtype_promotion("standard"):
        updates, moments = optimiser.update(_clipped(slopes, clip), state.moments, state.z)
    z = {name: value + updates[name] for name, value in state.z.items()}
    # A lane whose simulation was not finite goes on from the best place it has been.
    z = jax.tree.map(lambda new, old: jnp.where(jnp.isfinite(error), jnp.clip(new, -6.0, 6.0), old), z, best_z)
    return _State(z, moments, best_z, jnp.minimum(error, state.best), state.first), error


def _descend(problem: _Problem, state, history, optimiser, key, steps, clip, patience, tolerance, progress):
    """Step until the steps are used up or no target gains; returns the state, and fills ``history``."""
    keys = problem.keys(key)
    gains = []
    with _shown(progress, steps) as show:
        for step in range(1, steps + 1):
            state, error = _advance(problem, optimiser, state, keys, problem.log_target, clip)
            history.append(_rms(error))
            best = _rms(state.best.min(1))
            gains.append(best)
            if show(Progress(step, steps, history[-1], best)):
                break
            if step > patience and not np.any(best < gains[-1 - patience] * (1 - tolerance)):
                break
    return state


def _rms(error) -> np.ndarray:
    error = np.asarray(error, float)
    return np.where(np.isfinite(error), np.sqrt(np.where(np.isfinite(error), error, 0.0)), np.nan)


def _clipped(slopes, limit: float):
    """Each lane's gradient at most ``limit`` long, and nothing where it is not finite."""
    length = jnp.sqrt(sum(jnp.square(slope) for slope in slopes.values()))
    usable = jnp.isfinite(length)
    shrink = jnp.where(usable, jnp.minimum(1.0, limit / jnp.maximum(length, 1e-30)), 0.0)
    return {name: jnp.where(usable, slope, 0.0) * shrink for name, slope in slopes.items()}


@contextlib.contextmanager
def _shown(progress, steps: int):
    """A function that shows one `Progress` and tells whether to stop."""
    if not progress:
        yield lambda report: False
    elif callable(progress):
        yield progress
    else:
        needs("rich")
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = [TextColumn("fitting"), BarColumn(), MofNCompleteColumn(), TextColumn("rms {task.fields[rms]}")]
        columns += [TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()]
        with Bar(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("fitting", total=steps, rms="...")

            def show(report: Progress) -> bool:
                bar.update(task, completed=report.step, rms=f"{np.median(report.best):.3f}")
                return False

            yield show


# --- the result ---


def _report(problem: _Problem, state, history, key, settings, plan, began) -> Fit:
    """Measure every lane's best again on unseen noise, and choose the best start of each target by that."""
    power, first_power = (_unseen_power(problem, z, key) for z in (state.best_z, state.first))
    error, nuisance = _error(problem, power, problem.log_target)
    best = np.asarray(error).argmin(1)
    if not np.isfinite(np.asarray(error).min(1)).all():
        which = int(np.argmax(~np.isfinite(np.asarray(error).min(1))))
        raise FloatingPointError(
            f"no start of spectrum {which + 1} gave a finite simulation; take a smaller dt or bounds"
        )
    lane = (np.arange(len(best)), best)
    values = {f.name: np.asarray(f.value(state.best_z[f.name])[lane]) for f in problem.frees}
    model, inputs, noise = problem.put(values)
    first_error, first_nuisance = _error(problem, first_power, problem.log_target)
    chosen = {name: np.asarray(value)[lane] for name, value in nuisance._asdict().items()}
    return Fit(
        parameters={f.name: units.attach(values[f.name], f.unit) for f in problem.frees},
        model=model,
        inputs=inputs,
        noise=noise,
        rms=_rms(error)[lane],
        initial_rms=_rms(first_error)[:, 0],
        losses=np.stack(history),
        best_start=best,
        spectrum=_observed(problem, power, nuisance, lane, "fit"),
        initial_spectrum=_observed(problem, first_power, first_nuisance, (lane[0], 0 * best), "start"),
        nuisance={name: value if name == "chi" else value + problem.level for name, value in chosen.items()},
        target=problem.target,
        free=problem.frees,
        settings=settings,
        state=_plain_state(state),
        implementation=plan.implementation,
        reason=plan.reason,
        seconds=time.perf_counter() - began,
    )


def _unseen_power(problem: _Problem, z, key):
    return sum(_power(problem, z, problem.keys(key, check)) for check in range(_CHECKS)) / _CHECKS


def _observed(problem: _Problem, power, nuisance, lane, name: str) -> Spectrum:
    log_power = spectra.observed_log_power(problem.log_model(power), problem.log_freqs, nuisance)
    log_power = np.asarray(log_power, float)[lane] + problem.level[:, None]
    # An unsuccessful start may have no spectrum at all; it is shown as nothing.
    return Spectrum(problem.target.freqs, np.where(np.isfinite(log_power), 10**log_power, 1e-300), name)


# --- saving and resuming ---


def _plain_state(state: _State) -> dict[str, Any]:
    moments = [np.asarray(leaf) for leaf in jax.tree.leaves(state.moments)]
    return {
        **{k: {n: np.asarray(v) for n, v in getattr(state, k).items()} for k in ("z", "best_z", "first")},
        "best": np.asarray(state.best),
        "moments": moments,
    }


def _restore(saved: dict[str, Any], optimiser) -> _State:
    put = lambda tree: {name: jnp.asarray(value) for name, value in tree.items()}  # noqa: E731
    z = put(saved["z"])
    fresh, treedef = jax.tree.flatten(optimiser.init(z))
    if [np.shape(leaf) for leaf in fresh] != [np.shape(leaf) for leaf in saved["moments"]]:
        raise ValueError("'optimiser' is another than the one that the resumed fit was made with")
    moments = [jnp.asarray(value, like.dtype) for value, like in zip(saved["moments"], fresh)]
    return _State(z, treedef.unflatten(moments), put(saved["best_z"]), jnp.asarray(saved["best"]), put(saved["first"]))


def _check_same(saved: Fit, settings, frees, target: Spectrum):
    """Refuse to resume a fit of something else."""
    ours = settings | {"free": [(f.name, f.low, f.high) for f in frees]}
    theirs = saved.settings | {"free": [(f.name, f.low, f.high) for f in saved.free]}
    for name in ours:
        if ours[name] != theirs[name]:
            raise ValueError(f"'resume' got a fit with {name} = {theirs[name]}, but this call has {ours[name]}")
    same = saved.target.power.shape == target.power.shape and np.allclose(saved.target.freqs, target.freqs)
    if not same or not np.allclose(np.log(saved.target.power), np.log(target.power)):
        raise ValueError("'resume' got a fit to another target")


def _encode(fit: Fit) -> dict[str, Any]:
    known = _quantities(fit.model, fit.inputs, fit.noise)
    values = {
        name: {"value": _listed(units.strip(v, unit, name)), "unit": str(unit)} for name, (unit, v) in known.items()
    }
    return {
        "format": _FORMAT[0],
        "version": _FORMAT[1],
        "parameters": {f.name: values[f.name] for f in fit.free},
        "rms": _listed(fit.rms),
        "initial_rms": _listed(fit.initial_rms),
        "implementation": fit.implementation,
        "reason": fit.reason,
        "seconds": round(fit.seconds, 3),
        "free": [{"name": f.name, "low": f.low, "high": f.high} for f in fit.free],
        "settings": fit.settings,
        "values": {name: value for name, value in values.items() if _is_given(fit, name)},
        "best_start": _listed(fit.best_start),
        "nuisance": {name: _listed(value) for name, value in fit.nuisance.items()},
        **{name: _encode_spectrum(getattr(fit, name)) for name in ("target", "spectrum", "initial_spectrum")},
        "losses": _listed(np.round(fit.losses, 6)),
        "state": {
            name: [_listed(leaf) for leaf in tree]
            if isinstance(tree, list)
            else {key: _listed(leaf) for key, leaf in tree.items()}
            if isinstance(tree, dict)
            else _listed(tree)
            for name, tree in fit.state.items()
        },
    }


def _is_given(fit: Fit, name: str) -> bool:
    if name.startswith(_NOISE):
        return name.removeprefix(_NOISE) in fit.noise
    return name in fit.inputs or name not in fit.model.inputs


def _encode_spectrum(spectrum: Spectrum) -> dict[str, Any]:
    return {
        "name": spectrum.name,
        "freqs_hz": _listed(spectrum.freqs),
        "log10_power": _listed(np.log10(spectrum.power)),
    }


def _listed(array):
    """Nested lists, with None for what JSON has no number for."""
    array = np.asarray(array)
    if array.ndim:
        return [_listed(row) for row in array]
    return None if not np.isfinite(array) else array.item()


def _array(nested, missing=np.nan) -> np.ndarray:
    return np.nan_to_num(np.array(nested, float), nan=missing, posinf=np.inf, neginf=-np.inf)


def _decode(saved: dict[str, Any], model) -> Fit:
    name = saved["settings"]["model"]
    kind = type(model) if type(model).__name__ == name else getattr(models, name, None)
    if kind is None:
        raise ValueError(f"'model' got {type(model).__name__}, but the saved fit is of {name}; give a {name}")
    fields, inputs, noise = {}, {}, {}
    for key, (unit, _) in _quantities(kind(), {}, {}).items():
        if key not in saved["values"]:
            continue
        value = units.attach(np.array(saved["values"][key]["value"]), unit)
        into = noise if key.startswith(_NOISE) else inputs if key in kind.inputs else fields
        into[key.removeprefix(_NOISE)] = value
    fitted = kind(**fields)
    known = _quantities(fitted, inputs, noise)
    state = saved["state"]
    return Fit(
        parameters={free["name"]: known[free["name"]][1] for free in saved["free"]},
        model=fitted,
        inputs=inputs,
        noise=noise,
        losses=_array(saved["losses"]),
        best_start=np.array(saved["best_start"]),
        nuisance={key: _array(value, -np.inf) for key, value in saved["nuisance"].items()},
        free=tuple(Free(f["name"], f["low"], f["high"], known[f["name"]][0]) for f in saved["free"]),
        state={
            **{key: {k: np.array(v) for k, v in state[key].items()} for key in ("z", "best_z", "first")},
            "best": _array(state["best"], np.inf),
            "moments": [np.array(leaf) for leaf in state["moments"]],
        },
        **{key: _array(saved[key]) for key in ("rms", "initial_rms")},
        **{key: _decode_spectrum(saved[key]) for key in ("target", "spectrum", "initial_spectrum")},
        **{key: saved[key] for key in ("settings", "implementation", "reason", "seconds")},
    )


def _decode_spectrum(saved) -> Spectrum:
    return Spectrum(saved["freqs_hz"], 10 ** np.array(saved["log10_power"]), saved["name"])
