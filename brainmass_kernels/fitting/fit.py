"""Fitting a model's parameters by gradients or least squares, every start and every target in one simulation.

A target is one or many power spectra, time series, matrices of functional connectivity, or a function of one's own
(`targets`); the steps are those of an optimiser of optax, or Levenberg and Marquardt's on derivatives that are carried
in the loop (`steps`). Everything a `Fit` reports at the end is measured again on noise that it has not seen.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import brainunit as u
import jax
import numpy as np

from .. import files, routing, spectra, units
from ..extras import needs
from ..interrupts import heard
from ..models.base import check_model, check_name
from ..network import Network
from ..noise import check_key
from ..spectra import Spectrum
from . import saved, targets
from .problem import Free, Pooling, Problem, measured
from .result import Fit
from .starts import count_of, first_place, starts_from
from .steps import LEVENBERG_MARQUARDT, Plan, Progress, State, begin, descend, optimiser_of, shown

_EVERY = 5
_STARTS = 16


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
    key = jax.random.key(0) if key is None else key
    checkpoint = None if checkpoint is None else files.absolute(checkpoint, "checkpoint")
    former = resume if resume is None or isinstance(resume, Fit) else Fit.load(resume, model)
    target = former.target if target is None and former else targets.as_target(target)
    if free is None and former:
        free = {f.name: (f.low, f.high) for f in former.free}
    inputs, noise = dict(inputs or {}), dict(noise or {})
    frees, given = _resolve_free(model, inputs, noise, free)
    record = _recorded(model, former) if record is None else record
    if every is None:
        every = former.settings["every"] if former else _every(target, duration, dt, transient)
    _check_counts(1, steps=steps, every=every, realisations=realisations)
    _check_counts(0, screen=screen, prune=prune)
    if not (math.isfinite(clip) and clip > 0):
        raise ValueError(f"'clip' got {clip}, but takes a positive number")
    starts = _starts(starts, former)
    options = {
        "duration": duration, "dt": dt, "every": every, "transient": transient, "scheme": scheme,
        "implementation": implementation,
    }  # fmt: skip
    comparison = targets.compare(target, model, record, options, _as_band(band), bool(background))
    pooling = _pooling(model, frees, priors, shared, group, regional)
    problem = Problem(model, inputs, noise, frees, comparison, realisations, record, options, pooling)
    optimiser = optimiser_of(problem, optimiser)
    patience = (8 if optimiser == LEVENBERG_MARQUARDT else 40) if patience is None else patience
    _check_counts(1, patience=patience)
    count = count_of(problem, starts, given, key)
    plan = problem.plan(key)
    settings = problem.settings() | {"key": np.asarray(jax.random.key_data(key)).tolist()}
    settings["program"] = problem.program(count, key)
    file = saved.Checkpoint.of(checkpoint, problem, settings, optimiser, starts, screen, clip, prune)
    begun, (state, history) = 0, file.read() if file else (None, [])
    if state is None and former:
        former.check_same(problem, settings, count)
        state, history, begun = saved.restore(problem, former.state, optimiser), [*former.losses], len(former.losses)
    elif state is None:
        state = begin(problem, starts_from(problem, starts, screen, given, key), optimiser)
    way = Plan(optimiser, steps, clip, patience, tolerance, prune)
    with shown(progress, steps) as show:
        state = descend(problem, way, state, history, key, begun, show, file and file.write)
    return _report(problem, state, history, key, settings, plan, began, given)


# Arguments ----------------------------------------------------------------------------------------------------------


def _starts(starts, former: Fit | None) -> int | Mapping[str, Any]:
    """How many starts, or where they are."""
    if starts is None:
        return former.losses.shape[2] if former else _STARTS
    places = starts.places() if isinstance(starts, Fit) else starts
    if not isinstance(places, Mapping):
        _check_counts(1, starts=places)
    return places


def _every(target, duration, dt, transient) -> int:
    """Steps between records unless they are given: those that make the samples of a series, where these are whole."""
    if not isinstance(target, targets.TimeSeries):
        return _EVERY
    shape = np.shape(u.get_magnitude(target.values))
    steps = targets.recorded_steps(duration, units.concrete(units.strip(dt, u.second, "dt"), "dt"), transient)
    # (K,), (n, K), (n, K, N), or of a network (K, N).
    possible = dict.fromkeys((shape[0],) if len(shape) == 1 else shape[-2:] if len(shape) == 2 else shape[1:2])
    if steps // _EVERY in possible:
        return _EVERY
    return next((steps // count for count in possible if count <= steps and steps % count == 0), _EVERY)


def _recorded(model, former: Fit | None) -> str:
    """What is compared unless another record is named."""
    mass: Any = model.model if isinstance(model, Network) else model
    held = former.settings.get("record") if former else None
    return held or next(iter(mass.recordable()))


def _pooling(model, frees, priors, shared, group, regional) -> Pooling:
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
    if wrong := [name for name in regional if name.startswith(routing.COUPLING)]:
        raise ValueError(f"'regional' got {wrong[0]}, which is of the whole network")
    found = []
    for name, pair in priors.items():
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise TypeError(f"'priors' got {pair!r} for {name!r}, but takes a pair (centre, width)")
        centre = float(targets.plain(pair[0], known[name].unit, f"priors: {name}"))
        found.append((name, centre, width(name, pair[1], "priors")))
    return Pooling(tuple(found), tuple((n, width(n, w, "group")) for n, w in group.items()), shared, regional)


def _as_band(band) -> tuple[float, float]:
    try:
        low, high = (float(spectra.in_hertz(edge, "band")) for edge in band)
    except (TypeError, ValueError) as error:
        raise TypeError(f"'band' got {band!r}, but takes two frequencies (low, high) in Hz") from error
    if not 0 < low < high:
        raise ValueError(f"'band' got {low:g} and {high:g} Hz, but takes 0 < low < high")
    return low, high


def _check_counts(least: int, **counts) -> None:
    for name, value in counts.items():
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
    known, values = routing.places(model), routing.quantities(model, inputs, noise)
    for name in free:
        check_name(name, known, "name in 'free'")
    unit_of = {name: known[name].unit for name in free}
    frees = tuple(Free(name, *_bounds(name, bounds, unit_of[name]), unit_of[name]) for name, bounds in free.items())
    return frees, {f.name: _scalar(values[f.name][1] if f.name in values else 0.0 * f.unit, f) for f in frees}


def _scalar(value, free: Free) -> float:
    magnitude = np.asarray(units.strip(value, free.unit, free.name))
    if magnitude.ndim:
        raise ValueError(
            f"'{free.name}' got shape {magnitude.shape}, but to be free takes a scalar; give `starts` for more"
        )
    return float(magnitude)


def _bounds(name, bounds, unit) -> tuple[float, float]:
    if not isinstance(bounds, tuple | list) or len(bounds) != 2:
        raise TypeError(f"'free' got {bounds!r} for {name!r}, but takes a pair (low, high)")
    low, high = (float(targets.plain(bound, unit, f"free: {name}")) for bound in bounds)
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"'free' got {low:g} and {high:g} for {name!r}, but takes finite bounds, low < high")
    if name.startswith(routing.NOISE) and low < 0:
        raise ValueError(f"'free' got {low:g} for {name!r}, but a noise intensity is not negative")
    return low, high


def _report(problem: Problem, state: State, history, key, settings, plan, began, given) -> Fit:
    """Measure every lane's best again on unseen noise, and choose the best start of each target by that."""
    comparison = problem.comparison
    begun, first_z = first_place(problem, state.first, given)
    found, first = problem.unseen(state.best_z, key), begun.unseen(first_z, key)
    error, solved = measured(problem, found, comparison.data)
    first_error, first_solved = measured(problem, first, comparison.data)
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
        state=saved.plain_state(state),
        implementation=plan.implementation,
        reason=plan.reason,
        seconds=time.perf_counter() - began,
        problem=problem,
    )
