"""Sparse weights of a network: one value for each connection, and never a matrix of all pairs of regions."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import brainunit as u
import jax
import numpy as np
from jax.experimental import sparse

from . import units
from ._jax import is_traced


@dataclasses.dataclass(frozen=True)
class Static:
    """An array in the static part of a pytree, compared by its values."""

    array: np.ndarray | None

    def __eq__(self, other) -> bool:
        if not isinstance(other, Static) or (self.array is None) != (other.array is None):
            return False
        return self.array is other.array or np.array_equal(self.array, other.array)  # pyright: ignore[reportArgumentType]

    def __hash__(self) -> int:
        return hash(None if self.array is None else self.array.tobytes())


class Edges(NamedTuple):
    """The connections that a sparse matrix stores, by row and then column.

    Attributes
    ----------
    ends : ``(2, E)`` int32, the region that each goes to (row), and the one that it comes from (column)
    order : ``(E,)``, the place of each among the values that the matrix stores
    """

    ends: np.ndarray
    order: np.ndarray


def is_sparse(value: Any) -> bool:
    """Whether a value, or what a quantity is of, is a sparse matrix of JAX (BCOO) or SciPy."""
    value = value.mantissa if isinstance(value, u.Quantity) else value
    # Who gives a matrix of SciPy has imported it.
    scipy = sys.modules.get("scipy.sparse")
    return isinstance(value, sparse.BCOO) or (scipy is not None and scipy.issparse(value))


def matrix(value: Any, unit, name: str, widen: Callable = lambda quantity: quantity) -> sparse.BCOO:
    """A sparse matrix without its unit, as a BCOO of one pattern, whose indices are NumPy's.

    ``widen`` takes the stored values, with their unit, to those that are converted.

    Raises
    ------
    ValueError, TypeError : an argument that is not square, or whose pattern is traced or differs within a batch
    """
    plain = value.mantissa if isinstance(value, u.Quantity) else value
    if isinstance(plain, sparse.BCOO):
        data, indices, shape = plain.data, _pattern(plain, name), plain.shape
    else:
        coo = plain.tocoo()
        data, shape = coo.data, coo.shape
        indices = np.stack(coo.coords, axis=-1).astype(np.int32)
    if len(shape) < 2 or shape[-1] != shape[-2]:
        raise ValueError(f"'{name}' got a sparse matrix of shape {shape}, but takes (N, N) or (*batch, N, N)")
    data = widen(u.Quantity(data, unit=value.unit)) if isinstance(value, u.Quantity) else data
    return of(units.strip(data, unit, name), indices, shape)


def of(values, indices: np.ndarray, shape: tuple[int, ...]) -> sparse.BCOO:
    """A BCOO of values ``(*batch, E)``, which may be anything, and indices ``(E, 2)`` that stay NumPy's."""
    indices = indices.reshape(*(1,) * (len(shape) - 2), *indices.shape)
    flags = {"shape": shape, "indices_sorted": False, "unique_indices": False}
    return sparse.BCOO.tree_unflatten(flags, (values, indices))


def indices_of(weights: sparse.BCOO) -> np.ndarray:
    """Of a BCOO that `matrix` made: rows and columns, ``(E, 2)``."""
    indices = np.asarray(weights.indices)
    return indices.reshape(indices.shape[-2:])


def edges_of(indices: np.ndarray, regions: int, self_connection: bool) -> Edges:
    """The connections of a pattern ``(E, 2)``: padding is left out, and the diagonal unless it counts."""
    return _sorted(Static(indices), regions, self_connection)


@functools.lru_cache(maxsize=8)
def _sorted(indices: Static, regions: int, self_connection: bool) -> Edges:
    assert indices.array is not None
    rows, columns = indices.array.T
    inside = (rows < regions) & (columns < regions)
    places = np.flatnonzero(inside if self_connection else inside & (rows != columns))
    order = places[np.lexsort((columns[places], rows[places]))].astype(np.int32)
    return Edges(np.ascontiguousarray(indices.array[order].T, np.int32), order)


def values_on(weights: sparse.BCOO, value: Any, unit, name: str, widen: Callable):
    """A quantity of each connection that the weights store, without its unit, ``(E,)``.

    Parameters
    ----------
    value : a number, one for each stored value, a matrix ``(N, N)``, or a sparse one of the same pattern, in any order
    widen : of a quantity of numbers, as of `matrix`
    """
    indices, regions = indices_of(weights), weights.shape[-1]
    if is_sparse(value):
        other = matrix(value, unit, name, widen)
        if other.shape != (regions, regions):
            raise ValueError(f"'{name}' got shape {other.shape}, but takes ({regions}, {regions}) as the weights have")
        return other.data[_places(indices, indices_of(other), regions, name)]
    values = units.strip(widen(value), unit, name)
    if np.shape(values) == (regions, regions):
        inside = np.minimum(indices, regions - 1)
        return values[inside[:, 0], inside[:, 1]]
    if np.shape(values) not in ((), (len(indices),)):
        raise ValueError(
            f"'{name}' got shape {np.shape(values)}, but takes ({len(indices)},), one for each value that the weights "
            f"store, a sparse matrix of the same pattern, or one for all"
        )
    return values if np.ndim(values) == 0 else values[: len(indices)]


def _places(indices: np.ndarray, others: np.ndarray, regions: int, name: str) -> np.ndarray:
    """The place among ``others`` of each of ``indices``."""
    if np.array_equal(indices, others):
        return np.arange(len(indices))
    wanted, known = (each[:, 0].astype(np.int64) * (regions + 1) + each[:, 1] for each in (indices, others))
    order = np.argsort(known, kind="stable")
    found = np.searchsorted(known[order], wanted)
    same = len(wanted) == len(known) and np.array_equal(np.sort(wanted), known[order])
    if not same or len(np.unique(known)) < len(known):
        missing = np.setxor1d(wanted, known)
        first = "" if not len(missing) else f"; {divmod(int(missing[0]), regions + 1)} is in one of them only"
        raise ValueError(f"'{name}' got another pattern than the weights have, but takes the same{first}")
    return order[found]


def _pattern(matrix: sparse.BCOO, name: str) -> np.ndarray:
    """The indices ``(E, 2)`` of a BCOO."""
    if is_traced(matrix.indices):
        raise TypeError(
            f"'{name}' got a BCOO whose indices are traced by jit, vmap or grad, but a network's connections are known "
            f"beforehand: give the values alone to network.replace(weights=...)"
        )
    if matrix.n_dense or matrix.n_sparse != 2:
        raise ValueError(
            f"'{name}' got a BCOO of {matrix.n_sparse} sparse and {matrix.n_dense} dense dimensions, but takes the "
            f"last two sparse, and dimensions of a batch before them (n_batch)"
        )
    indices = np.asarray(matrix.indices, np.int32)
    every = indices.reshape(-1, *indices.shape[-2:])
    if len(every) > 1 and (every != every[0]).any():
        raise ValueError(f"'{name}' got a BCOO whose connections differ within the batch, but takes the same for all")
    return every[0] if len(every) else np.zeros((0, 2), np.int32)


def degrees(values, ends: np.ndarray, regions: int) -> jax.Array:
    """The sum of the weights to each region, ``(*batch, N)``, from values ``(*batch, E)``."""
    zero = jax.numpy.zeros((*np.shape(values)[:-1], regions), values.dtype)
    return zero.at[..., ends[0]].add(values, indices_are_sorted=True)
