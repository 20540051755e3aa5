"""All fixed points of a model or a network, by Newton's method from many starts, and what happens near each."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np

from . import display, rest, units
from ._jax import is_traced
from .errors import check_counts
from .groups import Groups
from .models.base import Model, check_name
from .network import Network
from .programs import Programs
from .systems import Data, Prepared, System, observed_all, prepare

#: Starts of a mass, and of a network, whose Newton steps take longer.
_STARTS, _STARTS_OF_NETWORK = 256, 64
#: Most rounds of starts between and around the points that were found.
_ROUNDS = 4
#: Numbers in the matrices of the starts that run at once.
_AT_ONCE = 2**22
#: Two points are one if no state differs by more, relatively.
_SAME = {4: 2e-3, 8: 1e-6}
#: Members of the batch, and regions, that a table has a row for.
_ROWS = 20


@dataclasses.dataclass(frozen=True, eq=False)
class FixedPoints:
    """The fixed points of a model or a network, and their stability; ``print`` shows a table.

    The first axis of all is the points, P: of each member of the batch in the order of the first observable, with NaN
    after its last.

    Attributes
    ----------
    states : each state, Quantity ``(P, *batch)``; of a network the regions are the last axis
    observables : each observable, likewise
    eigenvalues : Quantity ``(P, *batch, E)``, complex, in 1/s, the rightmost first; of a network those of all its
        regions together, ``(P, *networks, E)``. With delays there are infinitely many: as many as states, the rightmost
    stable : ``(P, *batch)``, whether all of them have a negative real part; ``(P, *networks)`` of networks
    count : ``(*batch)``, how many points there are; ``(*networks)`` of networks
    model : the name of the model
    starts : from how many starts they were found
    """

    states: dict[str, Any]
    observables: dict[str, Any]
    eigenvalues: Any
    stable: np.ndarray
    count: np.ndarray
    model: str
    starts: int

    def __len__(self) -> int:
        return len(self.stable)

    def __getitem__(self, point: int) -> dict[str, Any]:
        """The states of one point, ``(*batch)`` each: ``initial=`` of `simulate` and `linear_spectrum`."""
        if not -len(self) <= point < len(self):
            raise IndexError(f"'point' got {point}, but there are {len(self)} fixed points")
        return {name: x[point] for name, x in self.states.items()}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[point] for point in range(len(self)))

    @property
    def rates(self) -> Any:
        """The real part of the rightmost eigenvalue, Quantity ``(P, *batch)`` in 1/s: below 0 how fast it is left."""
        return self.eigenvalues[..., 0].real

    @property
    def frequencies(self) -> Any:
        """The frequency of the rightmost eigenvalue, Quantity ``(P, *batch)`` in Hz; 0 where nothing turns."""
        return u.Quantity(np.abs(u.get_magnitude(self.eigenvalues)[..., 0].imag) / (2 * np.pi), unit=u.Hz)

    def __repr__(self) -> str:
        return f"FixedPoints({self._title()})"

    def __str__(self) -> str:
        head, rows = self._table()
        widths = [max(len(row[k]) for row in (head, *rows)) for k in range(len(head))]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in (head, *rows)]
        more = math.prod(self.stable.shape) - len(rows)
        return "\n".join([self._title(), *(lines if rows else []), *([f"... and {more:,} more"] if more > 0 else [])])

    def _repr_html_(self) -> str:
        return display.table(self._title(), *self._table())

    def _title(self) -> str:
        counts = self.count.ravel()
        if self.count.ndim == 0:
            number = int(self.count)
            many = f"{number or 'no'} fixed point{'s' if number != 1 else ''} of {self.model}"
            return f"{many}, {int(self.stable.sum())} stable" if number else f"{many} from {self.starts} starts"
        return f"{counts.min()} to {counts.max()} fixed points of {self.model} in {counts.size:,} members of a batch"

    def _table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        shown = {**self.observables, **self.states}
        batch = [f"batch {k}" for k in range(self.stable.ndim - 1)]
        names = [display.with_unit(name, units.unit_of(x)) for name, x in shown.items()]
        head = ("", *batch, *names, "", "rate (1/s)", "turning (Hz)")
        rows = []
        for place in np.ndindex(self.stable.shape[1:]):
            for point in range(int(self.count[place])):
                at = (point, *place)
                values = [display.numbers(np.asarray(u.get_magnitude(x))[at]) for x in shown.values()]
                rate, turning = (float(u.get_magnitude(x)[at]) for x in (self.rates, self.frequencies))
                word = "stable" if self.stable[at] else "unstable"
                rows.append((str(point), *map(str, place), *values, word, f"{rate:.4g}", f"{turning:.4g}"))
                if len(rows) == _ROWS:
                    return head, rows
        return head, rows


def fixed_points(
    model: Model | Network,
    *,
    inputs: Mapping[str, Any] | None = None,
    within: Mapping[str, tuple] | None = None,
    starts: int | None = None,
) -> FixedPoints:
    """The fixed points of a model or a network with constant inputs: where its drift is zero; and their stability.

    Newton's method runs from many starts: the model's initial state, states of all sizes, where the flow settles, and
    then states between and around the points that were found, until no new ones appear. Of a single mass these are all
    in practice, though nothing proves it; more ``starts`` find rarer ones. A network can have very many.

    Parameters
    ----------
    model : its fields broadcast to the batch; or a `Network`, whose regions are the last axis of the batch
    inputs : by name, constants that broadcast to the batch
    within : by state, the bounds (low, high) of what is looked for; ``None`` for a side without. Equations often have
        fixed points beyond what their states mean, such as negative rates
    starts : of each member of the batch; ``None``, 256, of a network 64

    Returns
    -------
    `FixedPoints`

    Raises
    ------
    ValueError, TypeError : an argument's name, unit, shape or value; traced arguments

    Notes
    -----
    In float32 states are good to about 1e-5 of their terms, and two points that differ by less than 0.2 % are one;
    ``jax.config.update("jax_enable_x64", True)`` gives 1e-10 and 1e-6. Near a fold, where two points meet, both are
    less exact. A continuum of fixed points, as of phases, is not found: there Newton's method has no step.

    The derivatives of a network with delays are those of its past too: their eigenvalues are computed by the method of
    Breda, Maset and Vermiglio 2005, SIAM J. Sci. Comput. 27:482.

    References
    ----------
    Grimbert and Faugeras 2006, Neural Computation 18:3052 (the fixed points of Jansen and Rit's model).
    """
    prepared = prepare(model, inputs, None, None, None)
    system, data, batch, _ = prepared
    if any(map(is_traced, jax.tree.leaves(data))):
        raise TypeError(
            "'model' or 'inputs' is traced by jit, vmap or grad, but how many fixed points there are must be known: "
            "bk.linear_spectrum is differentiable at one of them"
        )
    if starts is None:
        starts = _STARTS if system.regions == 1 else _STARTS_OF_NETWORK
    check_counts(1, starts=starts)
    bounds = _bounds(system, within)
    members = int(np.prod(batch[: len(batch) - isinstance(model, Network)], dtype=int))
    found = [_of_member(system, _member(system, data, k), starts, bounds) for k in range(members)]
    return _gathered(prepared, isinstance(model, Network), found, starts)


def _bounds(system: System, within) -> np.ndarray:
    """``(n, 2)``, infinite where there are none."""
    if within is not None and not isinstance(within, Mapping):
        raise TypeError(f"'within' got {type(within).__name__}, but takes a dict of state to (low, high)")
    bounds = np.tile([-np.inf, np.inf], (system.states, 1))
    for name, pair in (within or {}).items():
        check_name(name, system.model.states, "state in 'within'")
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise TypeError(f"'within' got {pair!r} for '{name}', but takes a pair (low, high)")
        k, unit = list(system.model.states).index(name), system.model.states[name]
        for side, value in enumerate(pair):
            if value is not None:
                bounds[k, side] = units.concrete(units.strip(value, unit, f"within: {name}"), f"within: {name}")
        if not bounds[k, 0] < bounds[k, 1]:
            raise ValueError(f"'within' got {pair} for '{name}', but takes low < high")
    return bounds


def _member(system: System, data: Data, k: int) -> Data:
    """The data of one member of the batch."""
    return jax.tree.map(
        lambda x, axis: x if axis is None else x[k], data, data.axes(system), is_leaf=lambda x: x is None
    )


# The search -----------------------------------------------------------------------------------------------------------


def _of_member(system: System, data: Data, starts: int, bounds: np.ndarray) -> Points:
    """The points of one member."""
    rng = np.random.default_rng(0)
    begin = np.asarray(data.start, float)
    first = _first_starts(rng, begin, starts, bounds)
    points = _distinct(system, _NEWTON(system)(data, _blocks(system, first)), bounds)
    for _ in range(_ROUNDS):
        before = len(points)
        more = _starts_around(rng, points, begin, starts, bounds)
        x, found, scale = _NEWTON(system)(data, _blocks(system, more))
        together = [np.asarray(y).reshape(-1, *np.shape(y)[2:]) for y in (x, found, scale)]
        flat = points.reshape(before, begin.size)
        together[0] = np.concatenate([flat, together[0]])
        together[1] = np.concatenate([np.ones(before, bool), together[1]])
        together[2] = np.concatenate([np.abs(flat), together[2]])
        points = _distinct(system, [y[None] for y in together], bounds)
        if len(points) <= before:
            break
    return _at_points(system, data, points)


def _blocks(system: System, starts: np.ndarray):
    """Starts ``(S, N, n)`` in blocks that run at once, ``(B, S / B, D)``; the last repeats its last start."""
    size = system.regions * system.states
    most = min(len(starts), max(1, _AT_ONCE // size**2))
    count = -(-len(starts) // most)
    padded = np.concatenate([starts, np.repeat(starts[-1:], count * most - len(starts), 0)])
    return padded.reshape(count, most, size).astype(system.dtype)


def _compiled(system: System):
    def brainmass_kernels_fixed_points(data: Data, starts):
        f = rest.flat_field(system, data)

        def block(starts):
            # A quarter begins where the flow from it settles.
            count = -(-len(starts) // 4)
            ends = jax.vmap(functools.partial(rest.flowed, f))(starts[:count])
            return jax.vmap(functools.partial(rest.newton, f))(jnp.concatenate([ends, starts[count:]]))

        return tuple(jax.lax.map(block, starts))

    return jax.jit(brainmass_kernels_fixed_points)


_NEWTON = Programs(_compiled, lambda system: system)


def _first_starts(rng, begin: np.ndarray, count: int, bounds: np.ndarray) -> np.ndarray:
    """The initial state, states near it, and states of all sizes, alike in all regions or not, ``(S, N, n)``."""
    regions, states = begin.shape
    size = 10 ** rng.uniform(-2, 2, (count, regions, states)) * rng.choice([-1.0, 1.0], (count, regions, states))
    alike = np.arange(count) % 2 == 1
    size[alike] = size[alike, :1]
    near = np.arange(count) % 3 == 2
    size[near] = begin * (1 + 0.3 * rng.standard_normal((near.sum(), regions, states))) + 0.05 * size[near]
    size[0] = begin
    return _into(rng, size, bounds)


def _starts_around(rng, points: np.ndarray, begin: np.ndarray, count: int, bounds: np.ndarray) -> np.ndarray:
    """States on the lines through two points each, and near them; without points, states of all sizes."""
    if not len(points):
        return _first_starts(rng, begin, count, bounds)
    one, other = (points[rng.integers(len(points), size=count)] for _ in range(2))
    along = rng.uniform(-1.0, 2.0, (count, 1, 1))
    width = np.ptp(points, axis=0).max(0) + 0.5 * np.abs(points).max((0, 1)) + 0.01
    scatter = 10 ** rng.uniform(-2, 0.5, (count, 1, 1)) * rng.standard_normal(one.shape)
    # Regions of a network may be at different points.
    mixed = points[rng.integers(len(points), size=(count, begin.shape[0])), np.arange(begin.shape[0])]
    mixes = (np.arange(count) % 2 == 1)[:, None, None]
    return _into(rng, np.where(mixes, mixed, one + along * (other - one)) + scatter * width, bounds)


def _into(rng, starts: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Starts beyond the bounds, moved between them."""
    low, high = bounds.T
    outside = (starts < low) | (starts > high)
    least = np.where(np.isfinite(low), low, np.where(np.isfinite(high), high - 1.0, 0.0))
    most = np.where(np.isfinite(high), high, least + 1.0)
    return np.where(outside, least + rng.random(starts.shape) * (most - least), starts)


def _distinct(system: System, roots, bounds: np.ndarray) -> np.ndarray:
    """The points ``(P, N, n)`` that were found, each once, from `rest.Root` ``(B, S, D)``."""
    x, scale = (np.asarray(y, np.float64).reshape(-1, np.shape(y)[-1]) for y in roots[::2])
    found = np.asarray(roots[1]).ravel()
    x, scale = x[found], scale[found]
    near = _SAME[system.dtype.itemsize]
    low, high = np.tile(bounds, (x.shape[1] // len(bounds), 1)).T
    slack = near * (scale + 1e-6)
    inside = ((x >= low - slack) & (x <= high + slack)).all(1)
    x, scale = x[inside], scale[inside]
    x[np.abs(x) <= rest.NOTHING * rest.tolerance(system.dtype)] = 0.0
    most = np.abs(x).max(0, initial=0.0)
    kept: list[int] = []
    for k in range(len(x)):
        size = scale[k] + 1e-3 * most + 1e-2 * rest.NOTHING
        if not (np.abs(x[k] - x[kept]) <= near * size).all(-1).any():
            kept.append(k)
    return x[kept].reshape(len(kept), x.shape[1] // len(bounds), len(bounds))


# At a point -----------------------------------------------------------------------------------------------------------


class Points(NamedTuple):
    """The fixed points of one member of a batch.

    Attributes
    ----------
    states : ``(P, N, n)``
    shown : each observable, ``(P, N)``
    rates : the eigenvalues, ``(P, E)``, in the model's unit of time
    """

    states: np.ndarray
    shown: dict[str, np.ndarray]
    rates: np.ndarray


def _compiled_at_points(system: System):
    def at(data: Data, x):
        return rest.generator(system, data, x), observed_all(system, data, x)

    return jax.jit(lambda data, points: jax.lax.map(functools.partial(at, data), points))


_AT_POINTS = Programs(_compiled_at_points, lambda system: system)


def _at_points(system: System, data: Data, points: np.ndarray) -> Points:
    """Observables and eigenvalues of points, which are put in order."""
    count = len(points)
    # A few numbers of points are compiled for, and not each.
    padded = np.concatenate([points, np.zeros((-count % 4 or 4 * (not count), *points.shape[1:]))])
    matrices, shown = _AT_POINTS(system)(data, padded.astype(system.dtype))
    shown = {name: np.asarray(x, np.float64)[:count] for name, x in shown.items()}
    rates = [_eigenvalues(system, matrix) for matrix in np.asarray(matrices, np.float64)[:count]]
    order = np.argsort(shown[next(iter(system.model.recordable()))].mean(-1), kind="stable")
    rates = np.array(rates, complex).reshape(count, _moving(system).sum())
    return Points(points[order], {name: x[order] for name, x in shown.items()}, rates[order])


def _moving(system: System) -> np.ndarray:
    """Which states move, ``(D,)``."""
    assert system.active.array is not None
    return system.active.array.ravel()


def _eigenvalues(system: System, matrix: np.ndarray) -> np.ndarray:
    """The rightmost first, as many as there are states that move."""
    moving = np.ones(len(matrix), bool)
    moving[: _moving(system).size] = _moving(system)
    values = np.linalg.eigvals(matrix[moving][:, moving])
    # Of a pair, the one with a positive frequency first.
    order = np.lexsort((-values.imag, -np.round(values.real, 9)))
    return values[order][: _moving(system).sum()]


def _gathered(prepared: Prepared, is_network: bool, found: list[Points], starts: int) -> FixedPoints:
    """The result, from the points of each member."""
    system, _, batch, mass = prepared
    members, known = batch[: len(batch) - is_network], system.model.recordable()
    most = max((len(each.states) for each in found), default=0)
    moving = int(_moving(system).sum())

    def together(parts, shape: tuple[int, ...], missing: Any = np.nan) -> np.ndarray:
        whole = np.full((most, len(found), *shape), missing)
        for k, part in enumerate(parts):
            whole[: len(part), k] = part
        return whole

    def quantity(name: str, parts):
        x = together(parts, (system.regions,)).reshape(most, *batch)
        lanes = mass.lanes_of(name) if isinstance(mass, Groups) else None
        return units.attach(x if lanes is None else x[..., lanes], known[name])

    rates = together([each.rates for each in found], (moving,), complex(np.nan)) / system.seconds
    states = {
        name: quantity(name, [each.states[..., k] for each in found]) for k, name in enumerate(system.model.states)
    }
    observables = {
        name: quantity(name, [each.shown[name] for each in found]) for name in system.model.observables
        if "+" not in name
    }  # fmt: skip
    return FixedPoints(
        states,
        observables,
        u.Quantity(rates.reshape(most, *members, moving), unit=u.second**-1),
        (rates.real < 0).all(-1).reshape(most, *members),
        np.array([len(each.states) for each in found], int).reshape(members),
        system.model.__name__,
        starts,
    )
