"""`log_density`: its arguments, read and checked once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np

from .. import routing
from ..errors import check_counts
from ..fitting import targets
from ..fitting.fit import as_band, bounds_of, default_every, default_record, known_free, scalar_of
from ..fitting.joint import Joint
from ..fitting.problem import NO_POOLING, Problem
from ..fitting.targets import LINEAR, SIMULATION, OfFunction
from ..models.base import check_model
from ..network import parts_of
from ..noise import check_key
from . import likelihoods
from .density import LogDensity, Part, columns, raw_log_likelihood, split
from .pooling import Ties
from .positions import Position
from .priors import Prior, Uniform, as_prior

# Where a prior may have a support of its own.
OR_NONE = (", or None", ", or None, for the support of its prior")

_REALISATIONS = 4
_LIKELIHOOD = "likelihood."


def log_density(
    model,
    target,
    free: Mapping[str, Any],
    *,
    priors: Mapping[str, Any] | None = None,
    likelihood: Any = None,
    inputs: Mapping[str, Any] | None = None,
    noise: Mapping[str, Any] | None = None,
    key=None,
    duration=9 * u.second,
    dt=1 * u.ms,
    every: int | None = None,
    transient=1 * u.second,
    realisations: int | None = None,
    record: Any = None,
    band: tuple[float, float] = (2.0, 40.0),
    scheme: str | None = None,
    implementation: str | None = None,
    gradient_horizon=None,
    predict: str = SIMULATION,
    shared: Sequence[str] = (),
    group: Mapping[str, Prior | None] | Sequence[str] = (),
) -> LogDensity:
    """The log posterior density of parameters given data, up to a constant, for a sampler of your choice.

    ``density(z)`` is a function of unconstrained positions, a dict of real numbers by name. It is differentiable, and
    any number of chains is one simulation forward and one backward. NumPyro (``numpyro.factor``) and BlackJAX take it
    as it is.

    Parameters
    ----------
    model : a model with scalar fields, or a `Network` of one. Its values are where the density is tried first
    target : a `PowerSpectrum`, `TimeSeries` or `Connectivity`, or a `Joint` of these, of one or of n subjects; or a
        function of a `Result` whose lanes are ``(1, chains, realisations)`` that returns the log likelihood of each
    free : name to (low, high), as in `fit`; or to ``None``, without bounds: the support of its prior
    priors : name to one of `bk.priors`, or to a pair (centre, width) of a Gaussian; within bounds it is cut off and
        normalised. By default uniform between the bounds
    likelihood : one of `bk.likelihoods`, of a `Joint` a dict by its names. ``None``: of a series and of connectivity
        Gaussian, with the ``sigma`` of the target. A field of a likelihood that is a prior is one more name of z,
        ``"likelihood.sigma"``, or ``"likelihood.eeg.sigma"`` of a joint target
    inputs, noise : as `simulate` takes them; a free input or intensity needs a value here
    key : of `jax.random`; fixes the noise, the same for all positions. Needed where there is noise
    duration, dt, transient, scheme, implementation, gradient_horizon : as `simulate` takes them
    every, record, band : as `fit` takes them
    realisations : runs with different noise, whose prediction is averaged; the likelihoods that a function returns are
        averaged themselves. ``None``, 4 with noise and else 1
    predict : "simulation"; or "linear", the power spectrum about a stable fixed point in closed form, as in `fit`
    shared : names of z with one value for all of n targets; the others have a value for each, a last axis of z
    group : names whose n values lie about a mean with a spread that are inferred too, ``"C.group"`` and ``"C.spread"``;
        or a dict of these to the prior of the spread. Positions are normal about that of the mean: without bounds the
        spread is in the unit of the parameter, or of the logarithm of what is positive; between bounds it is of the
        logit, a plain number. ``None``: half-normal, as wide as the prior of the parameter, 1 between bounds. The mean
        has the prior of the parameter

    Returns
    -------
    `LogDensity`

    Raises
    ------
    ValueError, TypeError
        naming the argument: an unknown name, a prior that does not cover the bounds, a likelihood of another kind of
        target or with a sigma that is not positive, a group of one target, noise without a key
    FloatingPointError
        a likelihood that is NaN at the values in the arguments, with these
    """
    check_model(parts_of(model)[1], ", or a bk.Network of one")
    check_key(key)
    ties = Ties.of(shared, group)
    target = targets.as_target(target)
    model = targets.on_host(model)
    inputs, noise = dict(targets.on_host(inputs or {})), dict(targets.on_host(noise or {}))
    positions, initial = _free_positions(model, inputs, noise, free, priors)
    record = default_record(model, None) if record is None else record
    every = default_every(model, target, duration, dt, transient) if every is None else every
    if predict not in (SIMULATION, LINEAR):
        raise ValueError(f"'predict' got {predict!r}, but takes 'simulation' or 'linear'")
    noisy = predict == SIMULATION and bool(noise or any(p.name.startswith(routing.NOISE) for p in positions))
    if noisy and key is None:
        raise ValueError("'key' is missing, but this model has noise: take key=jax.random.key(0)")
    realisations = (_REALISATIONS if noisy else 1) if realisations is None else realisations
    check_counts(1, every=every, realisations=realisations)
    realisations = 1 if predict == LINEAR else realisations
    options = {
        "duration": duration, "dt": dt, "every": every, "transient": transient, "scheme": scheme,
        "implementation": implementation,
    }  # fmt: skip
    options |= {} if gradient_horizon is None else {"gradient_horizon": gradient_horizon}
    comparison = targets.compare(target, model, record, options, as_band(band), False, predict)
    parts, data, own = _parts(comparison, likelihood)
    ties.check([p.name for p in (*positions, *own)], comparison.count, comparison.name)
    starts = zip((*positions, *own), _starting(positions, initial) + (0.0,) * len(own))
    pooled = [pair for p, z in starts for pair in ties.positions(p, z, comparison.count)]
    placed, start = tuple(p for p, _ in pooled), tuple(z for _, z in pooled)
    frees = tuple(p for p in placed if p.name in free)
    pooling = NO_POOLING if comparison.count == 1 else ties.as_fit
    problem = Problem(model, inputs, noise, frees, comparison, realisations, comparison.recorded, options, pooling)
    keys = problem.keys(jax.random.key(0) if key is None else key)
    density = LogDensity(problem, placed, parts, data, keys, start)
    _try(density)
    return density


def _free_positions(model, inputs, noise, free, priors) -> tuple[tuple[Position, ...], dict[str, float]]:
    """The positions of the free quantities, and the values that they have in the arguments."""
    known, values = known_free(model, inputs, noise, free, "(low, high) or None")
    priors = dict(priors or {})
    for name in priors:
        routing.check(name, dict.fromkeys(free), "free name in 'priors'")
    positions, initial = [], {}
    for name, bounds in free.items():
        unit = known[name].unit
        bounds = None if bounds is None else bounds_of(name, bounds, unit, OR_NONE)
        if name not in priors and bounds is None:
            raise ValueError(f"'priors' has nothing for {name!r}, which has no bounds in 'free': it takes one of these")
        prior = as_prior(priors[name], name) if name in priors else Uniform(*(x * unit for x in bounds or ()))
        natural = likelihoods.POSITIVE if name.startswith(routing.NOISE) else likelihoods.ANY
        positions.append(Position.of(name, prior, unit, bounds, natural, "'priors'"))
        value = values[name][1] if name in values else 0.0 * unit
        initial[name] = scalar_of(value, positions[-1])
    return tuple(positions), initial


def _parts(comparison, likelihood) -> tuple[tuple[Part, ...], tuple[Any, ...], tuple[Position, ...]]:
    """The likelihood of each target, its data, and the positions of the parameters that are inferred."""
    if isinstance(comparison, OfFunction):
        if likelihood is not None:
            raise TypeError(f"'likelihood' got {likelihood!r}, but the function {comparison.name} returns it itself")
        return (), (), ()
    every = _by_name(comparison, likelihood)
    parts, data, own = [], [], []
    for (name, chosen), (each, _) in zip(every, split(comparison)):
        chosen = likelihoods.default(each) if chosen is None else likelihoods.check(chosen, each)
        chosen = chosen.resolved(each, each.name)
        prefix = f"{_LIKELIHOOD}{name}." if name else _LIKELIHOOD
        parts.append(Part(prefix, chosen))
        numbers = [chosen.data(each, number) for number in range(1, each.count)]
        values = np.stack([chosen.data(each), *numbers]) if numbers else chosen.data(each)
        data.append(jnp.asarray(values, jnp.result_type(float)))
        for field, (unit, natural) in chosen.places(each).items():
            prior = getattr(chosen, field)
            if isinstance(prior, Prior):
                bounds = natural if np.isfinite(natural).all() and not np.isfinite(prior.support).all() else None
                bounds = bounds and prior.within(*bounds)
                what = f"'{field}' of {type(chosen).__name__}"
                own.append(Position.of(prefix + field, prior, unit, bounds, natural, what))
    return tuple(parts), tuple(data), tuple(own)


def _by_name(comparison, likelihood) -> list[tuple[str, Any]]:
    """The likelihood of each target by its name, which one alone has not."""
    if not isinstance(comparison.target, Joint):
        return [("", likelihood)]
    names = list(comparison.parts)
    if likelihood is not None and not isinstance(likelihood, Mapping):
        raise TypeError(f"'likelihood' got {likelihood!r}, but of a Joint takes a dict by name: {', '.join(names)}")
    for name in likelihood or {}:
        routing.check(name, dict.fromkeys(names), "target in 'likelihood'")
    if any(weight != 1 for weight in comparison.weights):
        raise ValueError(f"'weights' of {comparison.name} got {comparison.target.weights}, but likelihoods have none: "
                         "how noisy a target is says its sigma")  # fmt: skip
    return [(name, (likelihood or {}).get(name)) for name in names]


def _starting(positions, initial) -> tuple[float, ...]:
    """The positions of the values in the arguments, of those outside the support the middle, z = 0."""
    start = []
    for p in positions:
        value = np.asarray(initial[p.name], float)
        start.append(0.0 if np.any(p.outside_support(value)) else float(p.of_value(value)))
    return tuple(start)


def _try(density: LogDensity) -> None:
    """Raise FloatingPointError if the likelihood is NaN where the chains may start."""
    likelihood = raw_log_likelihood(density, density.initial)
    if np.isnan(likelihood):
        parameters = density.to_parameters(density.initial)
        at = ", ".join(f"{name} = {value:.4g}" for name, value in columns(parameters, 0).items())
        function = isinstance(density.problem.comparison, OfFunction)
        why = f"{density.problem.comparison.name} returned it" if function else "the simulation there is not finite"
        if density.problem.linear:
            raise FloatingPointError(
                f"the log likelihood is NaN at the start, {at}: no stable fixed point was found there. Take others of "
                "these values in the arguments"
            )
        raise FloatingPointError(f"the log likelihood is NaN at the start, {at}: {why}. Take a smaller dt, or others "
                                 "of these values in the arguments")  # fmt: skip
