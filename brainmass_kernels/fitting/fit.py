"""Fitting a model's parameters by gradients or least squares, every start and every target in one simulation.

A target is one or many power spectra, time series, matrices of functional connectivity, or a user's function
(`targets`). The steps are an optax optimiser's, or Levenberg-Marquardt steps with derivatives carried in the loop
(`steps`). A `Fit` reports errors on noise that the steps did not use.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import brainunit as u
import jax
import numpy as np

from .. import files, routing, spectra, units
from ..errors import check_counts
from ..extras import needs
from ..interrupts import interruptible
from ..models.base import check_model, check_name
from ..network import Network, parts_of
from ..noise import check_key
from ..notices import warn
from ..spectra import PowerSpectrum
from . import saved, targets
from .division import Division, divide, over_devices
from .joint import Joint
from .problem import Free, Pooling, Problem, free_values, measured
from .result import Fit
from .starts import count_of, first_place, like_starts, starts_from
from .steps import LEVENBERG_MARQUARDT, Plan, Progress, State, begin, descend, optimiser_of, progress_bar, trace

_EVERY = 5
_STARTS = 16


@interruptible
@over_devices
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
    targets_at_once: int | None = None,
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
    gradient_horizon=None,
    progress: bool | Callable[[Progress], Any] = False,
    resume: str | os.PathLike | Fit | None = None,
    checkpoint: str | os.PathLike | None = None,
    predict: str | None = None,
) -> Fit:
    """Fit free parameters to one or many targets, from many starts at once.

    The error of a `PowerSpectrum` is the mean squared difference of log10 power between the target and
    ``scale * P_model(f) + background * f**-chi``, whose three nuisances are solved for at every step
    (`spectra.log_error`); with ``compare="linear"`` that of power. The model's spectrum is Welch's at the resolution of
    the target, over ``realisations`` runs of ``duration`` each, without their transients. A `TimeSeries` is compared
    sample by sample with the mean of the realisations, as an evoked response is; a `Connectivity` with the correlations
    between regions of a network.

    Parameters
    ----------
    model : a model with scalar fields, or a `Network` of one. Its values are start 0; one outside the bounds begins at
        the nearer bound, with a warning
    target : `PowerSpectrum`, the path of what `spectra.load_spectrum` reads, an MNE ``Raw``, ``Epochs`` or
        ``Spectrum``, or a pair (freqs, power), n spectra in all, of a network the mean over its regions; a
        `TimeSeries`, a `Connectivity`, a `ConnectivityDynamics` or a `CrossSpectrum`; several as a `Joint`; or a
        function of a `Result` whose lanes are ``(1, starts, realisations)`` that returns the error of each lane, or
        residuals ``(M, 1, starts, realisations)``
    free : name to (low, high). A name is a field of the model, an input (``"E_inp"``), the intensity of the noise on
        an input (``"noise.E_inp"``), or a constant of a network's coupling (``"coupling.k"``). Plain bounds are in the
        unit of the value they replace
    inputs, noise : as `simulate` takes them; a free input or intensity needs a value here, its start 0
    priors : name to (centre, width) of a Gaussian; each adds a residual, ``(value - centre) / width``, to those of the
        data in units of their ``sigma`` (0.1 for log10 power)
    shared : names with one value for all targets; the others have a value for each target
    group : name to width; the targets' values lie about their mean, which is free, with this standard deviation
    regional : names with a value for each region of a network
    starts : the number of starts (the model's values, then a Latin hypercube within the bounds), by default 16 or as
        in the resumed fit; or the starts, name to values (starts,) or (n, starts), of a regional one also
        (n, starts, N); or a `Fit` of the same free names, to start at the best values of its starts, as a few steps of
        least squares after gradients; ``fit.places(1)`` are those of its best start
    screen : simulate at least this many candidates first, and start each target from those nearest to it
    prune : drop the worse half of the starts after every so many steps; 0, never
    targets_at_once : targets that run at once, in chunks one after another, which bounds the memory; ``None``, all,
        or as many as take 1 GiB, on accelerators a quarter of theirs. The result is the same
    steps : most optimiser steps
    key : of `jax.random`; fixes the noise and the starts
    duration, dt, transient, scheme, implementation, gradient_horizon : as `simulate` takes them
    every : steps from one record to the next; ``None``, 5, or as many as give the samples of a `TimeSeries`, or those
        of a resumed fit
    record : the observable or state that is compared; ``None``, the model's first observable, or its first state if it
        has none, or as in a resumed fit. For a `TimeSeries` at sensors their `Readout`. For a `Joint` a dict by its
        names, or one for all; for a function, whatever `simulate` takes
    realisations : runs with different noise over which a prediction is averaged
    band : Hz, where spectra are compared
    background : whether a power law is added to spectra; without it only the scale is free
    optimiser : any of `optax`, by default Adam at 0.05 with b2 = 0.99; or "levenberg_marquardt", which needs many fewer
        steps and carries the derivatives by each target's parameters in the loop; those of networks, of delays inside
        a mass and of statistics are taken by JAX through ``scan``
    clip : the largest norm of one lane's gradient
    patience, tolerance : stop when no target's error has fallen by this fraction in this many steps (40, or 8 of
        least squares)
    progress : True for a bar on stderr, or a line in a notebook; or a function of what a step has come to (``step``,
        ``rms`` of each start, ``best``, ``seconds``, and the best ``values`` so far by name), which stops the fit by
        returning True
    resume : a `Fit` or the path of a saved one, to continue for ``steps`` more steps. Target, free bounds and the
        number of starts are then those of that fit by default; all arguments, the model's equations, and what a
        function computes must agree with it
    checkpoint : a file that is written during the fit. A fit with the same arguments resumes from it, with the
        result of an uninterrupted fit
    predict : "simulation"; or "linear", the spectrum about a stable fixed point in closed form (`linear_spectrum`), or
        of a network the cross-spectra (`linear_cross_spectrum`), or a `Joint` of these: without noise in the fit.
        Realisations, times and implementation count for nothing then. Starts without a stable fixed point have no
        error, and stay. By default as in a resumed fit. ``starts=`` of another fit takes its places to a fit by
        simulation

    Returns
    -------
    `Fit`

    Raises
    ------
    ValueError, TypeError
        naming the argument, for an unknown name, bounds that do not increase, a start outside them, a wrong unit,
        an unusable target, a resumed fit or a checkpoint that is of another fit or damaged
    ImportError
        without the packages of ``pip install 'brainmass-kernels[fit]'``
    """
    needs("optax")
    began = time.perf_counter()
    check_model(parts_of(model)[1], ", or a bk.Network of one")
    check_key(key)
    key = jax.random.key(0) if key is None else key
    checkpoint = None if checkpoint is None else files.absolute(checkpoint, "checkpoint")
    former = resume if resume is None or isinstance(resume, Fit) else Fit.load(resume, model)
    target = former.target if target is None and former else targets.as_target(target)
    if free is None and former:
        free = {f.name: (f.low, f.high) for f in former.free}
    model = targets.on_host(model)
    inputs, noise = dict(targets.on_host(inputs or {})), dict(targets.on_host(noise or {}))
    frees, initial = _resolve_free(model, inputs, noise, free)
    record = default_record(model, former) if record is None else record
    if every is None:
        every = former.settings["every"] if former else default_every(model, target, duration, dt, transient)
    check_counts(1, steps=steps, every=every, realisations=realisations)
    check_counts(0, screen=screen, prune=prune)
    if not (math.isfinite(clip) and clip > 0):
        raise ValueError(f"'clip' got {clip}, but takes a positive number")
    starts = _starts(starts, former)
    options = {
        "duration": duration, "dt": dt, "every": every, "transient": transient, "scheme": scheme,
        "implementation": implementation,
    }  # fmt: skip
    options |= {} if gradient_horizon is None else {"gradient_horizon": gradient_horizon}
    predict = _predicted(predict, former)
    comparison = targets.compare(target, model, record, options, as_band(band), bool(background), predict)
    realisations = 1 if predict == targets.LINEAR else realisations
    pooling = _pooling(model, frees, priors, shared, group, regional)
    problem = Problem(model, inputs, noise, frees, comparison, realisations, comparison.recorded, options, pooling)
    optimiser = optimiser_of(problem, optimiser)
    if optimiser == LEVENBERG_MARQUARDT and gradient_horizon is not None:
        raise ValueError(
            f"'gradient_horizon' got {gradient_horizon}, but 'levenberg_marquardt' carries its derivatives forward, "
            "over the whole run: take an optimiser of optax"
        )
    plan = problem.plan(key)
    if optimiser == LEVENBERG_MARQUARDT and not (problem.carried or problem.linear):
        plan = dataclasses.replace(plan, reason=f"{plan.reason}; derivatives by JAX's forward mode through 'scan'")
    patience = (8 if optimiser == LEVENBERG_MARQUARDT else 40) if patience is None else patience
    check_counts(1, patience=patience)
    count = count_of(problem, starts, initial, key)
    division = divide(problem, plan, count, optimiser == LEVENBERG_MARQUARDT, targets_at_once)
    settings = problem.settings() | {"key": np.asarray(jax.random.key_data(key)).tolist()}
    settings["program"] = problem.program(count, key)
    several = division.spans_processes
    file = saved.Checkpoint.of(checkpoint, problem, settings, optimiser, starts, screen, clip, prune, several)
    done, (state, history, part) = 0, file.read() if file else (None, [], None)
    if state is None and former:
        former.check_same(problem, settings, count)
        state, history, done = saved.restore(problem, former.state, optimiser), [*former.losses], len(former.losses)
    descent = Plan(optimiser, division, steps, clip, patience, tolerance, prune)
    with progress_bar(progress, steps) as show:
        if state is None:
            tracing = functools.partial(trace, problem, descent, like_starts(problem, count), key)
            state = begin(problem, starts_from(problem, starts, screen, initial, key, tracing, division), optimiser)
        state = descend(problem, descent, state, history, key, done, show, file and file.write, part)
    result = _report(problem, state, history, key, settings, plan, began, initial, division)
    _say_if_nothing_improved(result)
    return result


# Arguments ----------------------------------------------------------------------------------------------------------


def _starts(starts, former: Fit | None) -> int | Mapping[str, Any]:
    """The number of starts, or their values."""
    if starts is None:
        return former.losses.shape[2] if former else _STARTS
    starts = starts.places() if isinstance(starts, Fit) else starts
    if not isinstance(starts, Mapping):
        check_counts(1, starts=starts)
    return starts


def default_every(model, target, duration, dt, transient) -> int:
    """The default steps between records: those that give the samples of a series, if these are whole steps apart."""
    if isinstance(target, Joint):
        every = (default_every(model, each, duration, dt, transient) for each in target.targets.values())
        return next(
            (n for n, each in zip(every, target.targets.values()) if isinstance(each, targets.TimeSeries)), _EVERY
        )
    if not isinstance(target, targets.TimeSeries):
        return _EVERY
    values = np.asarray(u.get_magnitude(target.values))
    steps = targets.recorded_steps(duration, units.concrete(units.strip(dt, u.second, "dt"), "dt"), transient)
    # Shapes are (K,) or (n, K), of a network (K, N) or (n, K, N).
    axis = -2 if parts_of(model)[0] and values.ndim > 1 else -1
    samples = int(values.shape[axis])
    if samples == steps // _EVERY or samples > steps or steps % samples:
        return _EVERY
    return steps // samples


def default_record(model, former: Fit | None) -> str:
    """The default record that is compared."""
    record = former.settings.get("record") if former else None
    return record or next(iter(parts_of(model)[1].recordable()))


def _predicted(predict, former: Fit | None) -> str:
    """What predicts spectra."""
    known = targets.SIMULATION, targets.LINEAR
    if predict is None:
        return former.settings.get("predict", targets.SIMULATION) if former else targets.SIMULATION
    if predict not in known:
        raise ValueError(f"'predict' got {predict!r}, but takes 'simulation' or 'linear'")
    return predict


def _pooling(model, frees, priors, shared, group, regional) -> Pooling:
    known = {f.name: f for f in frees}

    def names_in(names, argument: str) -> tuple[str, ...]:
        names = (names,) if isinstance(names, str) else tuple(names)
        for name in names:
            check_name(name, known, f"free name in '{argument}'")
        return names

    def width_of(name, value, argument: str) -> float:
        width = float(targets.plain(value, known[name].unit, f"{argument}: {name}"))
        if not (math.isfinite(width) and width > 0):
            raise ValueError(f"'{argument}' got the width {width:g} for {name!r}, but takes a positive one")
        return width

    priors, group = dict(priors or {}), dict(group or {})
    names_in(tuple(priors), "priors")
    names_in(tuple(group), "group")
    shared, regional = names_in(shared, "shared"), names_in(regional, "regional")
    if both := set(shared) & set(group):
        raise ValueError(f"'group' got {', '.join(both)}, which 'shared' has too: one value has no spread")
    if regional and not isinstance(model, Network):
        raise ValueError(f"'regional' got {', '.join(regional)}, but one mass has no regions: it is for a bk.Network")
    if wrong := [name for name in regional if name.startswith(routing.COUPLING)]:
        raise ValueError(f"'regional' got {wrong[0]}, which is of the whole network")
    gaussians = []
    for name, pair in priors.items():
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise TypeError(f"'priors' got {pair!r} for {name!r}, but takes a pair (centre, width)")
        centre = float(targets.plain(pair[0], known[name].unit, f"priors: {name}"))
        gaussians.append((name, centre, width_of(name, pair[1], "priors")))
    groups = tuple((name, width_of(name, width, "group")) for name, width in group.items())
    return Pooling(tuple(gaussians), groups, shared, regional)


def as_band(band) -> tuple[float, float]:
    try:
        low, high = (float(spectra.in_hertz(edge, "band")) for edge in band)
    except (TypeError, ValueError) as error:
        raise TypeError(f"'band' got {band!r}, but takes two frequencies (low, high) in Hz") from error
    if not 0 < low < high:
        raise ValueError(f"'band' got {low:g} and {high:g} Hz, but takes 0 < low < high")
    return low, high


def _resolve_free(model, inputs, noise, free) -> tuple[tuple[Free, ...], dict[str, float]]:
    """The free quantities with bounds in their units, and the values they have in the arguments."""
    known, values = known_free(model, inputs, noise, free)
    unit_of = {name: known[name].unit for name in free}
    frees = tuple(Free(name, *bounds_of(name, bounds, unit_of[name]), unit_of[name]) for name, bounds in free.items())
    return frees, {f.name: scalar_of(values[f.name][1] if f.name in values else 0.0 * f.unit, f) for f in frees}


def known_free(model, inputs, noise, free, takes: str = "(low, high)") -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The places of all quantities and the values that these have, if the names in ``free`` are some of them."""
    if not isinstance(free, Mapping):
        raise TypeError(f"'free' got {type(free).__name__}, but takes a dict of name to {takes}")
    if not free:
        raise ValueError(f"'free' names no parameter, but takes at least one as name to {takes}")
    known, values = routing.places(model, inputs), routing.quantities(model, inputs, noise)
    for name in free:
        routing.check(name, known, "name in 'free'")
    return known, values


def scalar_of(value, free: Free) -> float:
    magnitude = np.asarray(units.strip(value, free.unit, free.name))
    if magnitude.ndim:
        raise ValueError(
            f"'{free.name}' got shape {magnitude.shape}, but to be free takes a scalar; give `starts` for more"
        )
    return float(magnitude)


def bounds_of(name, bounds, unit, or_none: tuple[str, str] = ("", "")) -> tuple[float, float]:
    """Plain bounds of a quantity; ``or_none`` is what errors add where there may be none."""
    if not isinstance(bounds, tuple | list) or len(bounds) != 2:
        raise TypeError(f"'free' got {bounds!r} for {name!r}, but takes a pair (low, high){or_none[0]}")
    low, high = (float(targets.plain(bound, unit, f"free: {name}")) for bound in bounds)
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(
            f"'free' got {low:g} and {high:g} for {name!r}, but takes finite bounds, low < high{or_none[1]}"
        )
    if name.startswith(routing.NOISE) and low < 0:
        raise ValueError(f"'free' got {low:g} for {name!r}, but a noise intensity is not negative")
    return low, high


def _report(problem: Problem, state: State, history, key, settings, plan, began, initial, division) -> Fit:
    """Measure the best of every lane on other noise, and choose the best start of each target by that."""
    comparison = problem.comparison
    first_problem, first_z = first_place(problem, state.first, initial)
    if first_problem is problem:
        # As many lanes as there are starts: the program is compiled already. On the host, so is the rest.
        first_z = {name: np.repeat(np.asarray(z), state.alive.shape[1], 1) for name, z in first_z.items()}
    fitted = _measured(problem, state.best_z, key, division)
    first = _measured(first_problem, first_z, key, division, start=0)
    best = _best_starts(problem, fitted.error)
    rows = np.arange(len(best))
    lane, only = (rows, best), (rows, 0 * best)
    values = jax.device_get(free_values(problem, state.best_z))
    values = {n: np.broadcast_to(x, (len(best), *x.shape[1:]))[lane] for n, x in values.items()}
    in_regions = {n: x[:, None] if problem.regions and x.ndim == 1 else x for n, x in values.items()}
    model, inputs, noise = problem.put(in_regions)
    nuisances = {name: value[only] for name, value in fitted.nuisances.items()}
    return Fit(
        parameters={f.name: units.attach(values[f.name], f.unit) for f in problem.frees},
        model=model,
        inputs=inputs,
        noise=noise,
        rms=comparison.measure(fitted.error)[lane],
        initial_rms=comparison.measure(first.error)[:, 0],
        losses=np.stack(history),
        best_start=np.take_along_axis(np.asarray(state.alive), best[:, None], 1)[:, 0],
        prediction=comparison.like_target(fitted.prediction, fitted.nuisances, only),
        initial_prediction=comparison.like_target(first.prediction, first.nuisances, only),
        nuisance=comparison.nuisances_in_units(nuisances),
        target=comparison.target,
        free=problem.frees,
        settings=settings,
        state=saved.plain_state(state),
        implementation=plan.implementation,
        reason=plan.reason,
        seconds=time.perf_counter() - began,
        problem=problem,
    )


class _Measured(NamedTuple):
    """On noise that the steps did not use: ``(n, starts)`` errors, and of one start of each target ``(n, 1, ...)``."""

    error: np.ndarray
    prediction: np.ndarray
    nuisances: dict[str, np.ndarray]


def _measured(problem: Problem, z, key, division: Division, start: int | None = None) -> _Measured:
    """Every lane measured; what is large, of the best start of each target or of a ``start``."""
    apart, each, parts = problem.apart, problem.spread(z), []
    for rows in division.chunks():
        prediction = apart.unseen(rows.of(each), key, division.call)
        error, nuisances = measured(apart, prediction, rows.of(problem.comparison.data))
        part = rows.without_repeats(jax.device_get((error, prediction, nuisances)))
        # Targets that share a start are judged together.
        parts.append(part if problem.pooling.bind else _of_best(problem, start, *part))
    whole = jax.tree.map(lambda *x: np.concatenate(x), *parts)
    return _of_best(problem, start, *whole) if problem.pooling.bind else whole


def _of_best(problem: Problem, start: int | None, error, prediction, nuisances) -> _Measured:
    best = np.asarray(problem.score(error)).argmin(1) if start is None else np.full(len(error), start)
    lane = np.arange(len(best)), best

    def chosen(x):
        return np.broadcast_to(x, (*error.shape, *x.shape[2:]))[lane][:, None]

    return _Measured(np.asarray(error), *jax.tree.map(chosen, (prediction, nuisances)))


def _say_if_nothing_improved(fit: Fit) -> None:
    """Warn where no target is nearer than at the start, on noise that the steps did not use."""
    tried = fit.losses.shape[0] * fit.losses.shape[2] > 1
    if not tried or np.any(fit.rms < fit.initial_rms) or not np.isfinite(fit.initial_rms).all():
        return
    warn(
        f"nothing improved on the start: the error is {np.median(fit.rms):.4g}, and was "
        f"{np.median(fit.initial_rms):.4g} at start 0. Take more steps or starts, screen=, wider bounds in 'free', or "
        "other free names",
        UserWarning,
    )


def _best_starts(problem: Problem, error) -> np.ndarray:
    """The best start of each target, ``(n,)``."""
    score = np.asarray(problem.score(error))
    lowest = score.min(1)
    if not np.isfinite(lowest).all():
        number = int(np.argmax(~np.isfinite(lowest))) + 1
        what = "spectrum" if isinstance(problem.comparison.target, PowerSpectrum) else "target"
        raise FloatingPointError(f"no start of {what} {number} gave a finite simulation; take a smaller dt or bounds")
    return score.argmin(1)
