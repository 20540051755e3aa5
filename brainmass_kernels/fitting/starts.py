"""Where a fit starts: values that are given, or the model's own and a Latin hypercube within the bounds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..notices import warn
from .problem import Free, Problem, away_from_bounds, measured, predict
from .targets import plain


def starts_from(problem: Problem, starts, screen: int, given: Mapping[str, Any], key) -> dict[str, jax.Array]:
    """z of every start of every target."""
    n, frees = problem.comparison.count, problem.frees
    if isinstance(starts, Mapping):
        return {f.name: _laid(problem, f.name, z) for f, z in zip(frees, _given_starts(problem, starts))}
    count = max(starts, math.ceil(screen / (n * starts)) * n * starts)
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel().tolist())
    # A Latin hypercube: each parameter takes every one of `count` equal slices once. The draws go by the order of the
    # names, so that the order in which a user lists them changes nothing.
    position = (
        rng.permuted(np.tile(np.arange(count), (len(frees), 1)), axis=1) + rng.random((len(frees), count))
    ) / count
    rows = away_from_bounds(position)[np.argsort(np.argsort([f.name for f in frees]))]
    rows[:, 0] = [_z_of_model(f, given[f.name]) for f in frees]
    for f in frees:
        if f.outside(given[f.name]):
            warn(
                f"'model' got {f.told(given[f.name])}: start 0 begins at the nearer bound; 'initial_rms' is the model's"
            )
    z = {f.name: jnp.asarray(row) for f, row in zip(frees, rows)}
    keep = None if count == starts else _nearest(problem, z, starts, key)
    spread = {name: jnp.broadcast_to(row, (n, starts)) if keep is None else row[keep] for name, row in z.items()}
    return {name: _laid(problem, name, x) for name, x in spread.items()}


def _nearest(problem: Problem, z, starts: int, key) -> np.ndarray:
    """Of candidates (m,), which ``starts`` each target is nearest to; the first candidate always stays."""
    n = problem.comparison.count
    blocks = {name: row.reshape(-1, n, starts) for name, row in z.items()}
    count = len(blocks[problem.frees[0].name])
    parts = [predict(problem, {name: b[i] for name, b in blocks.items()}, problem.keys(key)) for i in range(count)]
    found = jnp.stack(jax.block_until_ready(parts))
    found = found.reshape(1, -1, *found.shape[3:])
    error = np.array(problem.score(measured(problem, found, problem.comparison.data)[0]))
    error[:, 0] = -np.inf
    return np.argsort(error, axis=1, kind="stable")[:, :starts]


def _z_of_model(free: Free, value: float) -> float:
    """z of the model's own value; where that is outside the bounds, of a place at the nearer one."""
    if free.outside(value):
        return float(away_from_bounds(free.position(np.clip(value, free.low, free.high))))
    return float(free.z(value, "'model'"))


def first_place(problem: Problem, first, given: Mapping[str, float]) -> tuple[Problem, dict[str, jax.Array]]:
    """Where start 0 is measured: the model as it was given, though a bound moved its start; else ``first``."""

    def z_of(problem: Problem):
        shape = problem.comparison.count, 1
        row = {f.name: jnp.broadcast_to(jnp.asarray(_z_of_model(f, given[f.name])), shape) for f in problem.frees}
        return {name: _laid(problem, name, x) for name, x in row.items()}

    moved = any(f.outside(given[f.name]) for f in problem.frees)
    if not moved or not all(np.allclose(first[name], x) for name, x in z_of(problem).items()):
        return problem, first
    wider = (
        dataclasses.replace(f, low=min(f.low, given[f.name]), high=max(f.high, given[f.name])) for f in problem.frees
    )
    whole = dataclasses.replace(problem, frees=tuple(wider))
    return whole, z_of(whole)


def _laid(problem: Problem, name: str, z):
    """z (n, starts) as a leaf: one row where it is shared, an axis for regions where they have their own."""
    z = z[:1] if name in problem.pooling.shared else z
    return jnp.repeat(z[..., None], problem.regions or 1, -1) if name in problem.pooling.regional else z


def _given_starts(problem: Problem, starts) -> list[jax.Array]:
    names = [f.name for f in problem.frees]
    if set(starts) != set(names):
        raise ValueError(
            f"'starts' got {', '.join(map(str, starts)) or 'none'}, but takes values of {', '.join(names)}"
        )
    values = {f.name: np.atleast_1d(plain(starts[f.name], f.unit, f"starts: {f.name!r}")) for f in problem.frees}
    n = problem.comparison.count
    try:
        shape = np.broadcast_shapes(*(value.shape for value in values.values()), (n, 1))
    except ValueError:
        shape = ()
    if len(shape) != 2 or shape[0] != n:
        shapes = {name: value.shape for name, value in values.items()}
        raise ValueError(f"'starts' got shapes {shapes}, but takes (starts,) or ({n}, starts) of each")
    return [jnp.broadcast_to(jnp.asarray(f.z(values[f.name], "'starts'")), shape) for f in problem.frees]


def count_of(problem: Problem, starts, given, key) -> int:
    """How many starts there are, where they are given too."""
    if not isinstance(starts, Mapping):
        return int(starts)
    return starts_from(problem, starts, 0, given, key)[problem.frees[0].name].shape[1]
