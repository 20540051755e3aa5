"""Fitting a model's parameters by gradients or least squares, every start and every target in one simulation.

A target is one or many power spectra, time series, matrices of functional connectivity, or a function of one's own
(`targets`); the steps are those of an optimiser of optax, or Levenberg and Marquardt's on derivatives that are carried
in the loop (`descent`). Everything a `Fit` reports at the end is measured again on noise that it has not seen.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np

from . import descent, files, identity, models, spectra, targets, units
from .descent import COUPLING, LEVENBERG_MARQUARDT, NOISE, Free, Plan, Pooling, Problem, Progress, State, quantities
from .extras import needs
from .interrupts import heard
from .models.base import Model, check_model, check_name
from .network import Network
from .noise import check_key
from .notices import warn
from .spectra import Spectrum

_FORMAT = ("brainmass_kernels.Fit", 2)
_EVERY = 5
_UNDER_WAY = "brainmass_kernels.Fit under way"
_STARTS = 16
_SAVED, _CHECKPOINT = "a fit saved by this brainmass_kernels", "a checkpoint of a fit"


class Profile(NamedTuple):
    """The lowest error along one parameter, all others fitted again at each of its values.

    Attributes
    ----------
    name : of the parameter
    values : Quantity ``(points,)``
    rms : ``(n, points)``
    """

    name: str
    values: Any
    rms: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Fit:
    """What `fit` found. Arrays lead with the targets, n; a lane is one (target, start).

    Attributes
    ----------
    parameters : name to Quantity ``(n,)``, the best start of each target; ``(n, N)`` of what each region has its own
    model, inputs, noise : what was fitted, with those values put in: `simulate` takes them as they are
    rms, initial_rms : ``(n,)`` error of the fit and of start 0 (the model as it was given, unless starts were given),
        on noise the optimiser has not seen: rms of log10 power over the band, of samples in standard deviations, of
        correlations; of a function of one's own what it returned, or the mean square of its residuals
    losses : ``(steps, n, starts)`` the same error step by step, on the noise of the fit; NaN where a lane diverged or
        was left
    best_start : ``(n,)`` which start was the best
    prediction, initial_prediction : as the target, of the fit and of start 0, with what was solved for put in
    nuisance : name to ``(n,)``, what was solved for: of spectra log10 of the scale and of the background, and its
        exponent chi; of series the scale and the offset
    target : what was fitted; of spectra those within the band
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
    prediction: Any
    initial_prediction: Any
    nuisance: dict[str, np.ndarray]
    target: Any
    free: tuple[Free, ...]
    settings: dict[str, Any]
    state: dict[str, Any] = dataclasses.field(repr=False)
    implementation: str = ""
    reason: str = ""
    seconds: float = 0.0
    problem: Problem | None = dataclasses.field(default=None, repr=False)

    @property
    def name(self) -> str:
        """Of the target."""
        return targets.name_of(self.target)

    @property
    def spectrum(self) -> Spectrum:
        """The fitted spectra, nuisances included."""
        return self._spectral("spectrum", self.prediction)

    @property
    def initial_spectrum(self) -> Spectrum:
        """The spectrum of the first start, before it was fitted."""
        return self._spectral("initial_spectrum", self.initial_prediction)

    def _spectral(self, name: str, prediction) -> Spectrum:
        if not isinstance(prediction, Spectrum):
            raise TypeError(f"'{name}' is of fits to spectra, but this one is to {self.name}: see 'prediction'")
        return prediction

    @property
    def peaks(self) -> tuple[np.ndarray, np.ndarray]:
        """Alpha peak of the target and of the fit, Hz (n,) each."""
        return tuple(spectra.alpha_peak(s.freqs, s.power) for s in (self.target, self.spectrum))  # type: ignore

    def __str__(self) -> str:
        n, steps, starts = self.losses.shape[1], len(self.losses), self.losses.shape[2]
        spectral = isinstance(self.target, Spectrum)
        what = f"spectr{'a' if n > 1 else 'um'}" if spectral else f"target{'s' if n > 1 else ''}"
        lines = [
            f"{self.settings['model']} fitted to {self.name}: {n} {what}, {starts} starts, {steps} steps, "
            f"{self.seconds:.1f} s on {self.implementation}",
            "",
            _row("", "fitted", "bounds"),
        ]
        for free in self.free:
            value = np.asarray(units.strip(self.parameters[free.name], free.unit, free.name))
            lines.append(_row(free.name, _spread(value.ravel(), free.unit), f"{free.low:g} to {free.high:g}"))
        error = "rms error, log10 power" if spectral else "error"
        lines += ["", _row(error, _spread(self.rms), f"as given {_spread(self.initial_rms)}")]
        if spectral:
            target, fitted = self.peaks
            lines.append(_row("alpha peak", _spread(fitted, "Hz"), f"target {_spread(target, 'Hz')}"))
        if self.settings.get("background"):
            lines.append(_row("background 1/f^chi", _spread(self.nuisance["chi"]), ""))
        lines += [_row(name, _spread(x), "") for name, x in self.nuisance.items() if not spectral]
        return "\n".join(line.rstrip() for line in lines)

    # --- what follows from a fit ---

    def standard_errors(self) -> dict[str, Any]:
        """The standard error of each parameter, Quantity ``(n,)``, from the curvature at the fit.

        ``s**2 inv(J'J)`` with the Jacobian J of the residuals, carried in the loop, and their variance s**2; what was
        solved for follows, and priors count as data. It takes residuals for independent: of spectra whose segments
        overlap, or of samples closer than the noise's memory, the errors are larger.

        Raises
        ------
        TypeError : of networks, and of functions that return no residuals
        """
        problem = self._again()
        found = descent.normal_equations_at(problem, self._best(), problem.keys(self._key()), problem.comparison.data)
        normal, place = found.normal, None
        if problem.ties.shared:
            normal, _, place = descent.whole(problem, normal, found.slope)
        unknown = np.shape(normal)[-1]
        count = int(found.count) * (len(found.error) if place is not None else 1)
        error = np.asarray(found.error, float)[:, 0]
        error = error.mean(keepdims=True) if place is not None else error
        variance = error * count / max(count - unknown, 1) / int(found.count)
        inverse = np.linalg.pinv(np.asarray(normal, float)[:, 0], hermitian=True)
        z_error = np.sqrt(variance[:, None] * np.einsum("nii->ni", inverse))
        z_error = z_error[0][place] if place is not None else z_error
        z, result = self._best(), {}
        for p, free in enumerate(self.free):
            slope = np.broadcast_to(np.asarray(free.slope(z[free.name]))[:, 0], len(z_error))
            result[free.name] = units.attach(np.abs(slope) * z_error[:, p], free.unit)
        return result

    @heard
    def profile(self, name: str, values: Any = 11, *, steps: int = 20) -> Profile:
        """The lowest error at each of some values of one parameter, all others fitted again from the fit.

        A valley that stays low over a wide range is of a parameter that the target does not determine.

        Parameters
        ----------
        name : of a free parameter that is not each region's own
        values : the values, or how many between the bounds
        steps : most optimiser steps
        """
        problem = self._again()
        frees = {f.name: f for f in self.free}
        check_name(name, frees, "free parameter")
        if name in problem.ties.regional:
            raise ValueError(f"'name' got {name!r}, which each region has its own of: a profile is along one value")
        free = frees[name]
        if isinstance(values, int):
            position = np.linspace(0.02, 0.98, values)
            values = np.asarray(free.value(jnp.asarray(np.log(position / (1 - position)))))
        else:
            values = np.atleast_1d(np.asarray(targets.plain(values, free.unit, "values"), float))
        z = {f: jnp.repeat(x, len(values), 1) for f, x in self._best().items()}
        along = jnp.asarray(free.z(values, "'values'"), z[name].dtype)
        z[name] = jnp.broadcast_to(along, z[name].shape)
        problem = dataclasses.replace(problem, ties=problem.ties._replace(frozen=(name,)))
        if len(frees) == 1:
            error = descent.measured(
                problem, descent.predict(problem, z, problem.keys(self._key())), problem.comparison.data
            )[0]
        else:
            plan = Plan(_default_optimiser(problem), steps, patience=steps)
            state = descent.begin(problem, z, plan.optimiser)
            error = descent.descend(problem, plan, state, [], self._key()).best
        return Profile(name, units.attach(values, free.unit), problem.comparison.measure(error))

    def places(self) -> dict[str, Any]:
        """The best place of each start, name to Quantity ``(n, starts)``, in the order of their number."""
        found = {}
        for free in self.free:
            value = np.asarray(free.value(jnp.asarray(self.state["best_z"][free.name])))
            if value.ndim > 2:
                raise ValueError(f"'starts' got a fit in which each region has its own {free.name}")
            shape = (len(self.best_start), value.shape[1])
            found[free.name] = units.attach(np.broadcast_to(value, shape), free.unit)
        return found

    def plot(self, path: str | os.PathLike | None = None):
        """Target, start and fit as a matplotlib ``Figure``, written to ``path`` where one is given."""
        from . import plots

        page = plots.figure(self)
        if path is not None:
            plots.save(page, path)
        return page

    def to_dataframe(self):
        """A row for each target: parameters with their units in the columns' names, errors, nuisances."""
        pandas = needs("pandas")
        columns: dict[str, Any] = {}
        for free in self.free:
            value = np.asarray(units.strip(self.parameters[free.name], free.unit, free.name))
            label = free.name if free.unit.is_unitless else f"{free.name} ({free.unit})"
            named = {label: value} if value.ndim == 1 else {f"{label} of {i}": x for i, x in enumerate(value.T)}
            columns |= named
        columns |= {"rms": self.rms, "initial_rms": self.initial_rms, "best_start": self.best_start, **self.nuisance}
        if isinstance(self.target, Spectrum):
            columns |= dict(zip(("target_peak (Hz)", "fitted_peak (Hz)"), self.peaks))
        return pandas.DataFrame(columns)

    def _key(self):
        return jax.random.wrap_key_data(jnp.asarray(self.settings["key"], jnp.uint32))

    def _best(self) -> dict[str, jax.Array]:
        """z of the best start of each target, one start a target."""
        alive, best = np.asarray(self.state["alive"], int), self.best_start
        at = np.argmax(alive == best[:, None], 1)
        rows = {name: np.asarray(x) for name, x in self.state["best_z"].items()}
        return {name: jnp.asarray(x[np.arange(len(x)), at[: len(x)]][:, None]) for name, x in rows.items()}

    def _again(self) -> Problem:
        """The problem that was fitted."""
        if self.problem is not None:
            return self.problem
        if callable(self.target):
            raise TypeError("'target' was a function, which a saved fit does not hold: go on with it by resume=")
        held = self.settings
        options = {name: held[name] * u.second for name in ("duration", "dt", "transient")}
        options |= {"every": held["every"], "scheme": held["scheme"], "implementation": None}
        ties = _ties_of(held["ties"])
        record = held["record"]
        comparison = compare(self.target, self.model, record, options, held.get("band"), held.get("background"))
        given = self.model, self.inputs, self.noise
        problem = Problem(*given, self.free, comparison, held["realisations"], record, options, ties)
        theirs, ours = held.get("program", {}), problem.program(1, self._key())
        # In another precision every program is another.
        if theirs.get("dtype") == ours["dtype"]:
            _compare_programs(theirs, ours, "model")
        return problem

    # --- files ---

    def save(self, path: str | os.PathLike) -> None:
        """Write the fit, and what `fit` needs to go on with it, as JSON: whole or not at all, with a checksum."""
        files.write_document(path, _encode(self))

    @classmethod
    def load(cls, path: str | os.PathLike, model=None) -> Fit:
        """Read what `save` wrote.

        Parameters
        ----------
        path : of the file
        model : any instance of the model's class where it is not one of this package; of a network, itself

        Raises
        ------
        FileNotFoundError, ValueError
            where there is no such file, it is not a saved fit, or damaged, or the model is not that of the fit
        """
        saved = _read(path, "resume", _SAVED, "take a copy of it, or fit again")
        with _damaged(path, _SAVED, "take a copy of it, or fit again"):
            form = (saved["format"], saved["version"])
            if form != _FORMAT:
                raise KeyError(f"{form} is not {_FORMAT}")
            name, linked, values = saved["settings"]["model"], "link" in saved["settings"]["fixed"], saved["values"]
        kind = _kind_of(name, linked, values, model)
        with _damaged(path, _SAVED, "take a copy of it, or fit again"):
            return _decode(saved, kind, model if isinstance(model, Network) else None)


def _row(name: str, value: str, note: str) -> str:
    return f"  {name:<24}{value:<36}{note}"


def _spread(values, unit="") -> str:
    """One value, or the median and the range of several."""
    unit = "" if str(unit) in ("", "1") else f" {unit}"
    if len(values) == 1:
        return f"{values[0]:.4g}{unit}"
    return f"{np.median(values):.4g} ({np.min(values):.3g} to {np.max(values):.3g}){unit}"


@heard
def fit(
    model,
    target=None,
    free: Mapping[str, tuple] | None = None,
    *,
    inputs: Mapping[str, Any] | None = None,
    noise: Mapping[str, Any] | None = None,
    priors: Mapping[str, tuple] | None = None,
    shared: Sequence[str] = (),
    group: Mapping[str, Any] | None = None,
    regional: Sequence[str] = (),
    starts: int | Mapping[str, Any] | Fit | None = None,
    screen: int = 0,
    prune: int = 0,
    steps: int = 100,
    key=None,
    duration=9 * u.second,
    dt=1 * u.ms,
    every: int | None = None,
    transient=1 * u.second,
    realisations: int = 4,
    band: tuple[float, float] = (2.0, 40.0),
    background: bool = True,
    optimiser=None,
    clip: float = 0.1,
    patience: int | None = None,
    tolerance: float = 0.005,
    record: Any = None,
    scheme: str | None = None,
    implementation: str | None = None,
    progress: bool | Callable[[Progress], Any] = False,
    resume: str | os.PathLike | Fit | None = None,
    checkpoint: str | os.PathLike | None = None,
) -> Fit:
    """Fit free parameters to one or many targets, from many starts at once.

    Of a `Spectrum` the error is the mean squared difference of log10 power between the target and
    ``scale * P_model(f) + background * f**-chi``, whose three nuisances are solved for at every step
    (`spectra.log_error`). The model's spectrum is Welch's at the resolution of the target, over ``realisations``
    runs of ``duration`` each, their transients left out. A `TimeSeries` is compared sample by sample with the mean
    of the realisations, as an evoked response is; a `Connectivity` with the correlations between regions of a network.

    Parameters
    ----------
    model : a model with scalar fields, or a `Network` of one; its values are start 0, which begins at the nearer bound
        of one that lies outside, with a warning
    target : `Spectrum`, the path of what `spectra.load_spectrum` reads, an MNE ``Raw`` or ``Epochs``, or a pair
        (freqs, power), n spectra in all; a `TimeSeries` or a `Connectivity`; or a function of a `Result` whose lanes
        are ``(1, starts, realisations)``, which returns the error of each lane, or residuals
        ``(M, 1, starts, realisations)``
    free : name to (low, high). A name is a field of the model, an input (``"E_inp"``), the intensity of the noise on
        an input (``"noise.E_inp"``), or a constant of a network's coupling (``"coupling.k"``). Plain bounds are in the
        unit of the value they replace
    inputs, noise : as `simulate` takes them; whatever is free is to have a value here, its start 0
    priors : name to (centre, width), a Gaussian's: each counts as one more residual, ``(value - centre) / width``,
        beside those of the data in units of their ``sigma`` (of log10 power 0.1)
    shared : names that have one value for all targets; the others are each target's own
    group : name to width: the targets' values lie about their own mean, which is free, with this standard deviation
    regional : names of which each region of a network has its own
    starts : how many (the model's own values, then a Latin hypercube within the bounds), 16 or those of the resumed
        fit unless given; or the starts themselves, name to values (starts,) or (n, starts), or a `Fit` of the same
        free names, whose starts' best places they are: a few steps of least squares end what gradients began
    screen : simulate at least this many candidates first, and start each target from those nearest to it
    prune : after each so many steps leave the worse half of the starts; 0, never
    steps : most optimiser steps
    key : of `jax.random`; fixes the noise and the starts
    duration, dt, transient, scheme, implementation : as `simulate` takes them
    every : steps from one record to the next; ``None``, 5, or of a `TimeSeries` as many as give its samples, or those
        of a resumed fit
    record : what is compared, a name of an observable or state; ``None``, the model's first observable, or its first
        state where it has none, or what a resumed fit recorded. Of a function whatever `simulate` takes
    realisations : runs with different noise that one prediction is averaged over
    band : Hz, where spectra are compared
    background : whether a power law is added to spectra; without it only the scale is free
    optimiser : any of `optax`; Adam at 0.05, with b2 = 0.99, unless given; or "levenberg_marquardt", whose steps are of
        least squares and many fewer, with each target's few parameters carried in the loop; not of networks
    clip : the largest norm of one lane's gradient
    patience, tolerance : stop when in this many steps (40, of least squares 8) no target's error has fallen by this
        fraction
    progress : True for a bar on stderr, or a function of `Progress`; it stops the fit by returning True
    resume : a `Fit` or the path of a saved one, to go on with for ``steps`` more steps; target, free bounds and the
        number of starts are then its own unless given, and everything given must agree with it: the equations of
        the model, what a function computes and what is recorded as well
    checkpoint : a file that is written as the fit goes; where there is one of this same fit it goes on from there,
        to the result that it would have had

    Returns
    -------
    `Fit`

    Raises
    ------
    ValueError, TypeError
        naming the argument, for an unknown name, bounds that are not increasing, a start outside of them, a unit that
        does not fit, a target that cannot be used, a resumed fit or a checkpoint that is of another fit, or damaged
    ImportError
        without the packages of ``pip install 'brainmass-kernels[fit]'``
    """
    needs("optax")
    began = time.perf_counter()
    if not isinstance(model, Network):
        check_model(model, ", or a bk.Network of one")
    check_key(key)
    checkpoint = None if checkpoint is None else files.absolute(checkpoint, "checkpoint")
    saved = resume if resume is None or isinstance(resume, Fit) else Fit.load(resume, model)
    target = saved.target if target is None and saved else targets.as_target(target)
    if free is None and saved:
        free = {f.name: (f.low, f.high) for f in saved.free}
    inputs, noise = dict(inputs or {}), dict(noise or {})
    frees, given = _resolve_free(model, inputs, noise, free)
    if record is None:
        record = _recorded(model, saved)
    if every is None:
        every = saved.settings["every"] if saved else _every(target, duration, dt, transient)
    for name, value in {"steps": steps, "every": every, "realisations": realisations}.items():
        _check_count(name, value, 1)
    for name, value in {"screen": screen, "prune": prune}.items():
        _check_count(name, value, 0)
    placed: Any = starts.places() if isinstance(starts, Fit) else starts
    if placed is None:
        placed = saved.losses.shape[2] if saved else _STARTS
    if not isinstance(placed, Mapping):
        _check_count("starts", placed, 1)
    if not (math.isfinite(clip) and clip > 0):
        raise ValueError(f"'clip' got {clip}, but takes a positive number")
    key = jax.random.key(0) if key is None else key
    options = {
        "duration": duration, "dt": dt, "every": every, "transient": transient, "scheme": scheme,
        "implementation": implementation,
    }  # fmt: skip
    comparison = compare(target, model, record, options, _as_band(band), bool(background))
    problem = Problem(
        model, inputs, noise, frees, comparison, realisations, record, options,
        _ties(model, frees, priors, shared, group, regional),
    )  # fmt: skip
    optimiser = _optimiser(problem, optimiser)
    patience = (8 if optimiser == LEVENBERG_MARQUARDT else 40) if patience is None else patience
    _check_count("patience", patience, 1)
    count = _count(problem, placed, given, key)
    settings = problem.settings() | {"key": np.asarray(jax.random.key_data(key)).tolist()}
    plan = problem.plan(key)
    settings["program"] = problem.program(count, key)
    call = None if checkpoint is None else _call(problem, optimiser, placed, screen, clip, prune)
    history, begun = [], 0
    under_way = _under_way(checkpoint, settings, frees, comparison, call)
    if under_way:
        state, history = _restore(problem, under_way["state"], optimiser), [*_array(under_way["losses"])]
    elif saved:
        _check_same(saved.settings, saved.free, saved.target, settings, frees, comparison, "resume")
        _check_starts(saved.losses.shape[2], count, "resume")
        state, history, begun = _restore(problem, saved.state, optimiser), [*saved.losses], len(saved.losses)
    else:
        z = descent.starts_from(problem, placed, screen, given, key)
        state = descent.begin(problem, z, optimiser)
    keep = None if checkpoint is None else _keeper(checkpoint, settings, frees, comparison, call)
    path = Plan(optimiser, steps, clip, patience, tolerance, prune)
    with descent.shown(progress, steps) as show:
        state = descent.descend(problem, path, state, history, key, begun, show, keep)
    return _report(problem, state, history, key, settings, plan, began, given)


# --- arguments ---


def compare(target, model, record, options, band, background) -> targets.Comparison:
    """How runs of these options are compared with a target."""
    network = model if isinstance(model, Network) else None
    mass: Any = network.model if network else model
    regions = network.regions if network else None
    if callable(target):
        return targets.OfFunction(target)
    if not isinstance(record, str):
        raise TypeError(f"'record' got {record!r}, but a target that is not a function takes one name")
    check_name(record, mass.recordable(), "record")
    seconds = units.concrete(units.strip(options["dt"], u.second, "dt"), "dt")
    steps, sampling = _recorded_steps(options["duration"], seconds, options["transient"]), seconds * options["every"]
    samples = steps // options["every"]
    if isinstance(target, targets.TimeSeries):
        return targets.OfSeries(target, record, mass.recordable()[record], samples, regions)
    if isinstance(target, targets.Connectivity):
        return targets.OfConnectivity(target, record, sampling, regions)
    if network:
        raise TypeError("'target' got spectra, but a network takes a TimeSeries, a Connectivity or a function")
    return targets.OfSpectra(target.band(*band), record, sampling, samples, band, background)


def _recorded_steps(duration, seconds: float, transient) -> int:
    """Steps of a run after its transient."""
    return units.steps_of(duration, seconds, "duration") - (
        0 if transient is None else units.steps_of(transient, seconds, "transient")
    )


def _every(target, duration, dt, transient) -> int:
    """Steps between records unless they are given: those that make the samples of a series, where these are whole."""
    if not isinstance(target, targets.TimeSeries):
        return _EVERY
    shape = np.shape(u.get_magnitude(target.values))
    steps = _recorded_steps(duration, units.concrete(units.strip(dt, u.second, "dt"), "dt"), transient)
    # (K,), (n, K), (n, K, N), or of a network (K, N).
    possible = dict.fromkeys((shape[0],) if len(shape) == 1 else shape[-2:] if len(shape) == 2 else shape[1:2])
    if steps // _EVERY in possible:
        return _EVERY
    return next((steps // count for count in possible if count <= steps and steps % count == 0), _EVERY)


def _recorded(model, saved: Fit | None) -> str:
    """What is compared unless another record is named."""
    mass: Any = model.model if isinstance(model, Network) else model
    held = saved.settings.get("record") if saved else None
    return held or next(iter(mass.recordable()))


def _ties(model, frees, priors, shared, group, regional) -> Pooling:
    known = {f.name: f for f in frees}

    def names(given, argument: str) -> tuple[str, ...]:
        given = (given,) if isinstance(given, str) else tuple(given)
        for name in given:
            check_name(name, known, f"free name in '{argument}'")
        return given

    def width(name, value, argument: str) -> float:
        found = float(targets.plain(value, known[name].unit, f"{argument}: {name}"))
        if not (math.isfinite(found) and found > 0):
            raise ValueError(f"'{argument}' got the width {found:g} for {name!r}, but takes a positive one")
        return found

    priors, group = dict(priors or {}), dict(group or {})
    names(tuple(priors), "priors")
    names(tuple(group), "group")
    shared, regional = names(shared, "shared"), names(regional, "regional")
    if both := set(shared) & set(group):
        raise ValueError(f"'group' got {', '.join(both)}, which 'shared' has too: one value has no spread")
    if regional and not isinstance(model, Network):
        raise ValueError(f"'regional' got {', '.join(regional)}, but one mass has no regions: it is for a bk.Network")
    if wrong := [name for name in regional if name.startswith(COUPLING)]:
        raise ValueError(f"'regional' got {wrong[0]}, which is of the whole network")
    found = []
    for name, pair in priors.items():
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise TypeError(f"'priors' got {pair!r} for {name!r}, but takes a pair (centre, width)")
        centre = float(targets.plain(pair[0], known[name].unit, f"priors: {name}"))
        found.append((name, centre, width(name, pair[1], "priors")))
    return Pooling(tuple(found), tuple((n, width(n, w, "group")) for n, w in group.items()), shared, regional)


def _ties_of(saved: Mapping[str, Any]) -> Pooling:
    priors, group = (tuple(map(tuple, saved[name])) for name in ("priors", "group"))
    return Pooling(priors, group, tuple(saved["shared"]), tuple(saved["regional"]))


def _default_optimiser(problem: Problem):
    """Least squares where they can be, else Adam."""
    try:
        return _optimiser(problem, LEVENBERG_MARQUARDT)
    except TypeError:
        return descent.adam()


def _optimiser(problem: Problem, optimiser):
    if optimiser is None:
        return descent.adam()
    if isinstance(optimiser, str) and optimiser == LEVENBERG_MARQUARDT:
        if problem.regions is not None:
            raise TypeError(
                f"'optimiser' got {optimiser!r}, but a network has no derivatives carried in the loop: leave it out, "
                "or take one of optax"
            )
        if isinstance(problem.comparison, targets.OfFunction) and not isinstance(problem.record, str | list | tuple):
            raise TypeError(f"'optimiser' got {optimiser!r}, which takes records that are names, not statistics")
        return optimiser
    if not hasattr(optimiser, "update"):
        got = f"str {optimiser!r}" if isinstance(optimiser, str) else type(optimiser).__name__
        raise TypeError(f"'optimiser' got {got}, but takes an optax optimiser or {LEVENBERG_MARQUARDT!r}")
    return optimiser


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
    known = quantities(model, inputs, noise)
    for name in free:
        check_name(name, known, "name in 'free'")
    frees = tuple(Free(name, *_bounds(name, bounds, known[name][0]), known[name][0]) for name, bounds in free.items())
    return frees, {f.name: _scalar(known[f.name][1], f.unit, f.name) for f in frees}


def _scalar(value, unit, name: str) -> float:
    magnitude = np.asarray(units.strip(value, unit, name))
    if magnitude.ndim:
        raise ValueError(f"'{name}' got shape {magnitude.shape}, but to be free takes a scalar; give `starts` for more")
    return float(magnitude)


def _bounds(name, bounds, unit) -> tuple[float, float]:
    if not isinstance(bounds, tuple | list) or len(bounds) != 2:
        raise TypeError(f"'free' got {bounds!r} for {name!r}, but takes a pair (low, high)")
    low, high = (float(targets.plain(bound, unit, f"free: {name}")) for bound in bounds)
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"'free' got {low:g} and {high:g} for {name!r}, but takes finite bounds, low < high")
    if name.startswith(NOISE) and low < 0:
        raise ValueError(f"'free' got {low:g} for {name!r}, but a noise intensity is not negative")
    return low, high


# --- the result ---


def _report(problem: Problem, state: State, history, key, settings, plan, began, given) -> Fit:
    """Measure every lane's best again on unseen noise, and choose the best start of each target by that."""
    comparison = problem.comparison
    begun, first_z = descent.initial(problem, state.first, given)
    found, first = problem.unseen(state.best_z, key), begun.unseen(first_z, key)
    error, solved = descent.measured(problem, found, comparison.data)
    first_error, first_solved = descent.measured(problem, first, comparison.data)
    score = np.asarray(problem.score(error))
    best = score.argmin(1)
    if not np.isfinite(score.min(1)).all():
        which = int(np.argmax(~np.isfinite(score.min(1))))
        what = "spectrum" if isinstance(comparison.target, Spectrum) else "target"
        raise FloatingPointError(
            f"no start of {what} {which + 1} gave a finite simulation; take a smaller dt or bounds"
        )
    rows = np.arange(len(best))
    lane, zeroth = (rows, best), (rows, 0 * best)
    values = {}
    for f in problem.frees:
        value = np.asarray(f.value(state.best_z[f.name]))
        values[f.name] = np.broadcast_to(value, (len(best), *value.shape[1:]))[lane]
    laid = {n: x[:, None] if problem.regions and x.ndim == 1 else x for n, x in values.items()}
    model, inputs, noise = problem.put(laid)
    whole = {name: np.asarray(value) for name, value in solved.items()}
    solved = {name: value[lane] for name, value in whole.items()}
    return Fit(
        parameters={f.name: units.attach(values[f.name], f.unit) for f in problem.frees},
        model=model,
        inputs=inputs,
        noise=noise,
        rms=comparison.measure(error)[lane],
        initial_rms=comparison.measure(first_error)[:, 0],
        losses=np.stack(history),
        best_start=np.take_along_axis(np.asarray(state.alive), best[:, None], 1)[:, 0],
        prediction=comparison.shown(found, whole, lane),
        initial_prediction=comparison.shown(first, first_solved, zeroth),
        nuisance=comparison.solved_in_units(solved),
        target=comparison.target,
        free=problem.frees,
        settings=settings,
        state=_plain_state(state),
        implementation=plan.implementation,
        reason=plan.reason,
        seconds=time.perf_counter() - began,
        problem=problem,
    )


# --- saving and resuming ---


def _plain_state(state: State) -> dict[str, Any]:
    arrays = lambda tree: {name: np.asarray(value) for name, value in tree.items()}  # noqa: E731
    return {
        **{name: arrays(getattr(state, name)) for name in ("z", "best_z", "first")},
        **{name: np.asarray(getattr(state, name)) for name in ("best", "alive")},
        "moments": [np.asarray(leaf) for leaf in jax.tree.leaves(state.moments)],
    }


def _restore(problem: Problem, saved: Mapping[str, Any], optimiser) -> State:
    put = lambda tree: {name: jnp.asarray(value) for name, value in tree.items()}  # noqa: E731
    z = put(saved["z"])
    dtype = jnp.result_type(float)
    fresh, treedef = jax.tree.flatten(descent.begin(problem, z, optimiser).moments)
    if [np.shape(leaf) for leaf in fresh] != [np.shape(leaf) for leaf in saved["moments"]]:
        raise ValueError("'optimiser' is another than the one that the resumed fit was made with")
    moments = [jnp.asarray(value, like.dtype) for value, like in zip(saved["moments"], fresh)]
    best, alive = jnp.asarray(saved["best"], dtype), jnp.asarray(saved["alive"], int)
    return State(z, treedef.unflatten(moments), put(saved["best_z"]), best, put(saved["first"]), alive)


def _count(problem: Problem, starts, given, key) -> int:
    """How many starts there are, where they are given too."""
    if not isinstance(starts, Mapping):
        return int(starts)
    return descent.starts_from(problem, starts, 0, given, key)[problem.frees[0].name].shape[1]


def _call(problem: Problem, optimiser, starts, screen: int, clip: float, prune: int) -> dict[str, Any]:
    """What decides the way of a fit beside its settings, ready for JSON: a checkpoint goes on along the same way."""
    told: dict[str, Any] = {"screen": int(screen), "clip": float(clip), "prune": int(prune)}
    if isinstance(starts, Mapping):
        values = {f.name: targets.plain(starts[f.name], f.unit, f"starts: {f.name!r}") for f in problem.frees}
        told["starts"] = {name: descent.fingerprint(x) for name, x in values.items()}
    else:
        told["starts"] = int(starts)
    return told | {"optimiser": descent.optimiser_identity(problem, optimiser)}


def _check_same(held, held_free, held_target, settings, frees, comparison, argument: str):
    """Refuse to go on with a fit of something else."""
    known = _compare_programs(held.get("program"), settings["program"], argument)
    ours = settings | {"free": [(f.name, f.low, f.high) for f in frees]}
    theirs = held | {"free": [(f.name, f.low, f.high) for f in held_free]}
    # Functions are told apart by what they compute, by their names only where that is not known.
    for name in [n for n in ours if n != "program" and not (known and n == "function")]:
        if name not in theirs:
            raise ValueError(f"'{argument}' got a fit to another target")
        if ours[name] != theirs[name]:
            raise ValueError(f"'{argument}' got a fit with {name} = {theirs[name]}, but this call has {ours[name]}")
    if not callable(comparison.target) and not comparison.same(held_target):
        raise ValueError(f"'{argument}' got a fit to another target")


def _compare_programs(theirs: Mapping[str, str] | None, ours: Mapping[str, str], argument: str) -> bool:
    """Whether two fits are known to compute the same; ValueError where they do not, a warning where none can tell."""
    if theirs is None:
        why = "was saved by an earlier version, which kept no trace of the programs"
    else:
        versions = identity.versions()
        programs = ({n: x for n, x in held.items() if n not in versions} for held in (theirs, ours))
        differing = identity.difference(*programs)
        if not differing:
            return True
        other = [f"{n} {theirs.get(n)}, not {ours[n]}" for n in versions if theirs.get(n) != ours[n]]
        if not other:
            raise ValueError(f"'{argument}' got another fit. What differs: {differing}")
        why = f"was made with {', '.join(other)}, which traces other programs ({differing})"
    warn(f"'{argument}' got a fit that {why}: whether the model's equations are the same is not known", UserWarning)
    return False


def _check_starts(held: int, given: int, argument: str):
    if held != given:
        raise ValueError(f"'{argument}' got a fit with starts = {held}, but this call has {given}")


def _keeper(path, settings, frees, comparison, call) -> Callable[[State, list], None]:
    """What writes the state of a fit under way, not more often than takes a tenth of the time."""
    about = {"format": _UNDER_WAY, "settings": settings, "call": call, "free": _encode_free(frees)}
    about["target"] = _encode_target(comparison.target)
    last, took = 0.0, 0.0

    def keep(state: State, history: list):
        nonlocal last, took
        if time.perf_counter() - last < 10.0 * took:
            return
        began = time.perf_counter()
        document = about | {"state": _encode_state(_plain_state(state)), "losses": listed(np.stack(history))}
        files.write_document(path, document)
        last = time.perf_counter()
        took = last - began

    return keep


def _under_way(path, settings, frees, comparison, call):
    """What was written of this same fit, where there is such a file."""
    if path is None or not os.path.exists(path):
        return None
    remedy = "delete it, and the fit begins anew"
    saved = _read(path, "checkpoint", _CHECKPOINT, remedy)
    if saved.get("format") != _UNDER_WAY:
        raise ValueError(f"'checkpoint' got {os.path.basename(os.fspath(path))}, which is no checkpoint of a fit")
    with _damaged(path, _CHECKPOINT, remedy):
        free = [Free(f["name"], f["low"], f["high"], None) for f in saved["free"]]
        target = _decode_target(saved["target"]) if saved["target"]["kind"] != "function" else comparison.target
        state, losses, held = _decode_state(saved["state"]), saved["losses"], dict(saved["settings"])
        found = {"state": state, "losses": losses}
        theirs = saved.get("call", {"starts": len(losses[0][0])} if isinstance(call["starts"], int) else {})
    _check_same(held, free, target, settings, frees, comparison, "checkpoint")
    for name, value in theirs.items():
        if value != call[name]:
            raise ValueError(f"'checkpoint' got a fit with {name} = {value}, but this call has {call[name]}")
    return found


def _read(path, argument: str, what: str, remedy: str) -> dict[str, Any]:
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"'{argument}' got {path}, but there is no file of that name")
    with _damaged(path, what, remedy):
        return files.read_document(path)


@contextlib.contextmanager
def _damaged(path, what: str, remedy: str):
    """Raise what is wrong in a document as one ValueError with the file's name."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, RecursionError) as error:
        raise files.damaged(path, what, error, remedy) from error


def _encode(fit: Fit) -> dict[str, Any]:
    known = quantities(fit.model, fit.inputs, fit.noise)
    values = {
        name: {"value": listed(units.strip(v, unit, name)), "unit": str(unit)} for name, (unit, v) in known.items()
    }
    fitted = {
        f.name: {"value": listed(units.strip(fit.parameters[f.name], f.unit, f.name)), "unit": str(f.unit)}
        for f in fit.free
    }
    return {
        "format": _FORMAT[0],
        "version": _FORMAT[1],
        "parameters": fitted,
        "rms": listed(fit.rms),
        "initial_rms": listed(fit.initial_rms),
        "implementation": fit.implementation,
        "reason": fit.reason,
        "seconds": round(fit.seconds, 3),
        "free": _encode_free(fit.free),
        "settings": fit.settings,
        "values": {name: value for name, value in values.items() if _is_given(fit, name)},
        "best_start": listed(fit.best_start),
        "nuisance": {name: listed(value) for name, value in fit.nuisance.items()},
        **{name: _encode_target(getattr(fit, name)) for name in ("target", "prediction", "initial_prediction")},
        "losses": listed(np.round(fit.losses, 6)),
        "state": _encode_state(fit.state),
    }


def _encode_free(frees):
    return [{"name": f.name, "low": f.low, "high": f.high} for f in frees]


def _encode_state(state):
    return {
        name: [listed(leaf) for leaf in part]
        if isinstance(part, list)
        else {key: listed(leaf) for key, leaf in part.items()}
        if isinstance(part, dict)
        else listed(part)
        for name, part in state.items()
    }


def _decode_state(state):
    return {
        **{key: {k: np.array(v) for k, v in state[key].items()} for key in ("z", "best_z", "first")},
        "best": _array(state["best"], np.inf),
        "alive": np.array(state["alive"], int),
        "moments": [np.array(leaf) for leaf in state["moments"]],
    }


def _is_given(fit: Fit, name: str) -> bool:
    mass = fit.model.model if isinstance(fit.model, Network) else fit.model
    if name.startswith(NOISE):
        return name.removeprefix(NOISE) in fit.noise
    return name in fit.inputs or name not in mass.inputs


def _encode_target(target) -> dict[str, Any]:
    """A target or a prediction."""
    if isinstance(target, Spectrum):
        powers = listed(np.log10(target.power))
        return {"kind": "spectra", "name": target.name, "freqs_hz": listed(target.freqs), "log10_power": powers}
    if isinstance(target, targets.TimeSeries):
        held = {name: getattr(target, name) for name in ("scale", "offset", "name")}
        sigma = None if target.sigma is None else listed(u.get_magnitude(target.sigma))
        return {"kind": "series", **held, "values": listed(u.get_magnitude(target.values)), "sigma": sigma,
                "unit": str(u.get_unit(target.values))}  # fmt: skip
    if isinstance(target, targets.Connectivity):
        band = None if target.band is None else [float(spectra.in_hertz(edge, "band")) for edge in target.band]
        return {"kind": "connectivity", "name": target.name, "values": listed(target.values), "band": band,
                "sigma": target.sigma}  # fmt: skip
    if callable(target):
        return {"kind": "function", "name": targets.name_of(target)}
    return {"kind": "values", "values": listed(target)}


def _decode_target(saved, unit=None, shown: bool = False) -> Any:
    """What `_encode_target` made: a target, or where it is ``shown`` a prediction, which need not be one."""
    kind = saved["kind"]
    if kind == "spectra":
        return Spectrum(saved["freqs_hz"], 10 ** np.array(saved["log10_power"]), saved["name"])
    if kind == "series":
        unit = units.UNITLESS if unit is None else unit
        values, sigma = units.attach(_array(saved["values"]), unit), saved["sigma"]
        if shown:
            return targets.unchecked(targets.TimeSeries, values)
        sigma = None if sigma is None else units.attach(np.array(sigma), unit)
        return targets.TimeSeries(values, sigma, saved["scale"], saved["offset"], saved["name"])
    if kind == "connectivity":
        band = None if saved["band"] is None else tuple(saved["band"])
        if shown:
            return targets.unchecked(targets.Connectivity, _array(saved["values"]), band=band, sigma=saved["sigma"])
        return targets.Connectivity(np.array(saved["values"]), band, saved["sigma"], saved["name"])
    if kind == "function":
        return _Absent(saved["name"])
    return np.array(saved["values"])


class _Absent(NamedTuple):
    """The function that a saved fit was to, of which only the name was kept."""

    name: str

    def __call__(self, result):
        raise TypeError(f"'target' was the function {self.name}, which a saved fit does not hold")


def listed(array):
    """Nested lists, with None for what JSON has no number for."""
    array = np.asarray(array)
    if array.ndim:
        return [listed(row) for row in array]
    return None if not np.isfinite(array) else array.item()


def _array(nested, missing=np.nan) -> np.ndarray:
    return np.nan_to_num(np.array(nested, float), nan=missing, posinf=np.inf, neginf=-np.inf)


def _kind_of(name: str, linked: bool, values: Mapping[str, Any], model) -> type[Model]:
    """The class of the model of a saved fit.

    Parameters
    ----------
    name : of that class
    linked : whether the fit is of a network
    values : by name, what the fit has of the model, with units
    model : what `Fit.load` was given
    """
    network = model if isinstance(model, Network) else None
    given = network.model if network else model
    kind: Any = type(given) if type(given).__name__ == name else getattr(models, name, None)
    got = f"'model' got {type(model).__name__}"
    if kind is None:
        raise ValueError(f"{got}, but the saved fit is of {name}; give a {name}")
    if linked and network is None:
        raise ValueError(f"{got}, but the saved fit is of a network of {name}; give that")
    known = quantities(network or kind(), {}, {})
    if beyond := [n for n in values if n not in known]:
        raise ValueError(f"{got}, but the saved fit is of a {name} that has {', '.join(beyond)}; give that")
    for n, held in values.items():
        if not units.reads(held["unit"], known[n][0]):
            raise ValueError(f"{got}, whose {n} is in {known[n][0]}, but the saved fit has it in {held['unit']}")
    return kind


def _decode(saved: dict[str, Any], kind: type[Model], network: Network | None) -> Fit:
    fields, inputs, noise, coupled = {}, {}, {}, {}
    for key, (unit, _) in quantities(network or kind(), {}, {}).items():
        if key not in saved["values"]:
            continue
        value = units.attach(np.array(saved["values"][key]["value"]), unit)
        into = noise if key.startswith(NOISE) else coupled if key.startswith(COUPLING) else fields
        into = inputs if key in kind.inputs else into
        into[key.removeprefix(NOISE).removeprefix(COUPLING)] = value
    fitted = network.replace(model=kind(**fields), **coupled) if network else kind(**fields)
    unit_of = {name: unit for name, (unit, _) in quantities(fitted, inputs, noise).items()}
    mass, record = kind(**fields), saved["settings"].get("record")
    unit = None
    if saved["target"]["kind"] == "series":
        known, text = mass.recordable()[record], saved["target"]["unit"]
        unit = known if units.reads(text, known) else units.parsed(text)
    return Fit(
        parameters={n: units.attach(np.array(x["value"]), unit_of[n]) for n, x in saved["parameters"].items()},
        model=fitted,
        inputs=inputs,
        noise=noise,
        losses=_array(saved["losses"]),
        best_start=np.array(saved["best_start"]),
        nuisance={key: _array(value, -np.inf) for key, value in saved["nuisance"].items()},
        free=tuple(Free(f["name"], f["low"], f["high"], unit_of[f["name"]]) for f in saved["free"]),
        state=_decode_state(saved["state"]),
        **{key: _array(saved[key]) for key in ("rms", "initial_rms")},
        target=_decode_target(saved["target"], unit),
        **{key: _decode_target(saved[key], unit, shown=True) for key in ("prediction", "initial_prediction")},
        **{key: saved[key] for key in ("settings", "implementation", "reason", "seconds")},
    )
