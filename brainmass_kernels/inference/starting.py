"""Where chains begin: at a fit's starts, at the user's values, or at draws from the prior."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np

from .. import units
from ..fitting.problem import Free
from ..fitting.result import Fit
from ..models.base import check_name
from .density import LogDensity, columns
from .positions import Member
from .running import promoted

#: Draws from the prior for each chain, of which some may not run.
_SPARE = 4


def begin_at(density: LogDensity, start, chains: int, screen: int, key) -> np.ndarray:
    """The positions of chains, ``(chains, d)``.

    Raises
    ------
    ValueError, TypeError : a start that is none, naming it
    FloatingPointError : too few places whose density is finite, with one that has none
    """
    if start is None:
        return _of_prior(density, chains, screen, key)
    if isinstance(start, Fit):
        start = _of_fit(density, start, chains)
    if not isinstance(start, Mapping):
        raise TypeError(f"'start' got {type(start).__name__}, but takes a Fit, a dict by name, or None, for the prior")
    for name in start:
        check_name(name, dict.fromkeys(density.names), "name in 'start'")
    known = {name: value for name, value in density.to_parameters(density.initial).items() if name not in start}
    own = {p.name: p.shape for p in density.positions}
    start = {name: _for_each(x, own[name]) for name, x in start.items()}
    z = density._positions_of({**known, **start}, "start")
    for name, x in z.items():
        shape = x.shape[: x.ndim - len(own[name])]
        if shape not in ((), (chains,)):
            raise ValueError(f"'start' got shape {x.shape} for {name!r}, but takes a value, or {chains}, one a chain")
    z = {name: x if x.ndim > len(own[name]) else x[None] for name, x in z.items()}
    rows = density.to_vectors(z, (chains,))
    lost = ~np.isfinite(_densities(density, rows))
    if lost.any():
        raise FloatingPointError(f"{_lost(density, rows[lost][0])}, where a chain begins. Take others in 'start'")
    return rows


def _for_each(value, shape: tuple[int, ...]):
    """A value as that of each target, where these have their own."""
    return value * np.ones(shape) if shape and np.ndim(u.get_magnitude(value)) == 0 else value


def _of_prior(density: LogDensity, chains: int, screen: int, key) -> np.ndarray:
    """Draws from the prior that have a density; of ``screen``, those with the highest."""
    z = density.sample_prior(key, (max(screen, _SPARE * chains),))
    rows = density.to_vectors(z)
    found = _densities(density, rows)
    finite = np.flatnonzero(np.isfinite(found))
    if len(finite) < chains:
        raise FloatingPointError(
            f"{len(rows) - len(finite)} of {len(rows)} draws from the prior have no density, so {chains} chains cannot "
            f"begin: {_lost(density, rows[~np.isfinite(found)][0])}. Take narrower priors, a smaller dt, or 'start'"
        )
    best = finite[np.argsort(-found[finite], kind="stable")] if screen else finite
    return rows[best[:chains]]


def _of_fit(density: LogDensity, fit: Fit, chains: int) -> dict[str, Any]:
    """The best starts of a fit, again and again where there are fewer."""
    free = {f.name: f for f in fit.free}
    for name in free:
        check_name(name, dict.fromkeys(density.names), "free name of the fit in 'start'")
    fitted, subjects = len(fit.best_start), density.subjects
    if fitted != subjects:
        raise ValueError(f"'start' got a fit to {fitted} targets, but this posterior is of {subjects}")
    chosen = np.stack([_order(best, chains) for best in np.asarray(fit.state["best"], float)], 1)
    known, found = {p.name: p for p in density.positions}, {}
    for name, value in fit.places().items():
        own = value[np.arange(subjects), chosen]
        inside, p = _inside(known[name], free[name], own), known[name]
        middle = units.attach(np.median(np.asarray(u.get_magnitude(inside)), 1), p.unit)
        found[name] = inside if p.shape else middle
        if isinstance(p, Member):
            found[p.mean_name] = middle
    return found


def _order(best: np.ndarray, chains: int) -> np.ndarray:
    """The numbers of starts, the best first, again and again."""
    order = np.argsort(np.where(np.isfinite(best), best, np.inf), kind="stable")
    return np.resize(order[: max(1, int(np.isfinite(best).sum()))], chains)


def _inside(position: Any, free: Free, value):
    """Values of a fit, at the nearest place within the bounds of the prior."""
    unit = position.unit
    plain = np.asarray(value / unit if not unit.is_unitless else value, float)
    if not position.bounded:
        return plain * unit
    margin = 1e-3 * (position.high - position.low)
    return np.clip(plain, position.low + margin, position.high - margin) * unit


@promoted
def _densities(density: LogDensity, rows: np.ndarray) -> np.ndarray:
    """The log density of positions ``(n, d)``, all in one run."""
    return np.asarray(density(density.of_vectors(jnp.asarray(rows))), float)


def _lost(density: LogDensity, row: np.ndarray) -> str:
    """A position without a density, in words."""
    values = columns(density.to_parameters(density.of_vectors(jnp.asarray(row))), 0)
    at = ", ".join(f"{name} = {jax.device_get(value):.4g}" for name, value in values.items())
    return f"the log density is not finite at {at}"
