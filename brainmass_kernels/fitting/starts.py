"""Where a fit starts: at the user's values, or at the model's and at a Latin hypercube within the bounds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..notices import warn
from .division import Division
from .problem import Free, Problem, away_from_bounds, measured, predict
from .targets import plain


def starts_from(
    problem: Problem,
    starts,
    screen: int,
    initial: Mapping[str, Any],
    key,
    meanwhile: Callable[[], Any] | None = None,
    division: Division | None = None,
) -> dict[str, np.ndarray]:
    """z of every start of every target.

    Parameters
    ----------
    initial : the model's values
    meanwhile : called while candidates are simulated, where there are any to choose from
    division : how candidates are simulated; ``None``, all targets' at once
    """
    n, frees = problem.comparison.count, problem.frees
    if isinstance(starts, Mapping):
        return {f.name: _leaf(problem, f.name, z) for f, z in zip(frees, _z_of_starts(problem, starts))}
    count = max(starts, math.ceil(screen / (n * starts)) * n * starts)
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel().tolist())
    # A Latin hypercube: each parameter takes every one of `count` equal slices once. The draws follow the alphabetical
    # order of the names, so that the order in which a user lists them does not matter.
    position = (
        rng.permuted(np.tile(np.arange(count), (len(frees), 1)), axis=1) + rng.random((len(frees), count))
    ) / count
    rows = away_from_bounds(position)[np.argsort(np.argsort([f.name for f in frees]))]
    rows[:, 0] = [_z_of_model(f, initial[f.name]) for f in frees]
    for f in frees:
        if f.outside(initial[f.name]):
            value = f.outside_in_words(initial[f.name])
            warn(f"'model' got {value}: start 0 begins at the nearer bound; 'initial_rms' is the model's")
    # On the host: each shape of so small an array would be a program to compile.
    z = {f.name: row.astype(jnp.result_type(float)) for f, row in zip(frees, rows)}
    keep = None if count == starts else _nearest(problem, z, starts, key, meanwhile, division)
    spread = {name: np.broadcast_to(row, (n, starts)) if keep is None else row[keep] for name, row in z.items()}
    return {name: _leaf(problem, name, x) for name, x in spread.items()}


def like_starts(problem: Problem, starts: int) -> dict[str, np.ndarray]:
    """z in the shape of `starts_from`'s."""
    z = np.zeros((problem.comparison.count, starts), jnp.result_type(float))
    return {f.name: _leaf(problem, f.name, z) for f in problem.frees}


def _nearest(problem: Problem, z, starts: int, key, meanwhile, division: Division | None) -> np.ndarray:
    """The candidates of (m,) nearest to each target, as many as ``starts``; the first is always among them."""
    n = problem.comparison.count
    division = division or Division(n, n)
    keys, blocks = problem.keys(key), {name: row.reshape(-1, starts) for name, row in z.items()}
    # The candidates of a chunk are as many as its lanes in the steps: its program runs again in the report.
    whole = Division(len(blocks[problem.frees[0].name]), division.size, division.mesh)
    parts = []
    for rows in whole.chunks():
        part = division.call(predict, problem.apart, rows.of(blocks), keys)
        if meanwhile and not parts:
            meanwhile()
        parts.append(rows.without_repeats(jax.device_get(jax.block_until_ready(part))))
    prediction = np.concatenate(parts)
    # Each candidate is compared with every target, a block of as many as starts at a time.
    errors = []
    for rows in division.chunks():
        data = rows.of(problem.comparison.data)
        own = [measured(problem.apart, block[None], data)[0] for block in prediction]
        errors.append(rows.without_repeats(np.concatenate(jax.device_get(own), 1)))
    error = np.array(problem.score(np.concatenate(errors)))
    error[:, 0] = -np.inf
    return np.argsort(error, axis=1, kind="stable")[:, :starts]


def _z_of_model(free: Free, value: float) -> float:
    """z of the model's value, or of a place near a bound that it lies beyond."""
    if free.outside(value):
        return float(away_from_bounds(free.position(np.clip(value, free.low, free.high))))
    return float(free.z(value, "'model'"))


def first_place(problem: Problem, first, initial: Mapping[str, float]) -> tuple[Problem, dict[str, Any]]:
    """Where start 0 is measured: at the model's values, even if a bound moved its start; else at ``first``."""

    def z_of(problem: Problem):
        shape = problem.comparison.count, 1
        row = {f.name: np.full(shape, _z_of_model(f, initial[f.name]), jnp.result_type(float)) for f in problem.frees}
        return {name: _leaf(problem, name, x) for name, x in row.items()}

    moved = any(f.outside(initial[f.name]) for f in problem.frees)
    if not moved or not all(np.allclose(first[name], x) for name, x in z_of(problem).items()):
        return problem, first
    values = ((f, initial[f.name]) for f in problem.frees)
    frees = (dataclasses.replace(f, low=min(f.low, x), high=max(f.high, x)) for f, x in values)
    wider = dataclasses.replace(problem, frees=tuple(frees))
    return wider, z_of(wider)


def _leaf(problem: Problem, name: str, z):
    """z (n, starts) as a leaf: one row if it is shared, with an axis of regions if it is regional and has none yet."""
    z = z[:1] if name in problem.pooling.shared else z
    if z.ndim == 3:
        return z
    return np.repeat(z[..., None], problem.width(name), -1) if name in problem.pooling.regional else z


def _z_of_starts(problem: Problem, starts) -> list[np.ndarray]:
    names = [f.name for f in problem.frees]
    if set(starts) != set(names):
        raise ValueError(
            f"'starts' got {', '.join(map(str, starts)) or 'none'}, but takes values of {', '.join(names)}"
        )
    values = {f.name: np.atleast_1d(plain(starts[f.name], f.unit, f"starts: {f.name!r}")) for f in problem.frees}
    n, widths = problem.comparison.count, {name: problem.width(name) for name in problem.pooling.regional}
    of_regions = {name for name, x in values.items() if x.ndim == 3 and x.shape[2] == widths.get(name)}
    try:
        lanes = (x.shape[:2] if name in of_regions else x.shape for name, x in values.items())
        shape = np.broadcast_shapes(*lanes, (n, 1))
    except ValueError:
        shape = ()
    if len(shape) != 2 or shape[0] != n:
        shapes = {name: value.shape for name, value in values.items()}
        own = "".join(f", or ({n}, starts, {width}) of the regional {name}" for name, width in widths.items())
        raise ValueError(f"'starts' got shapes {shapes}, but takes (starts,) or ({n}, starts) of each{own}")
    dtype, every = jnp.result_type(float), []
    for f in problem.frees:
        z = f.z(values[f.name], "'starts'").astype(dtype)
        every.append(np.broadcast_to(z, (*shape, *z.shape[2:]) if f.name in of_regions else shape))
    return every


def count_of(problem: Problem, starts, initial, key) -> int:
    """The number of starts."""
    if not isinstance(starts, Mapping):
        return int(starts)
    return starts_from(problem, starts, 0, initial, key)[problem.frees[0].name].shape[1]
