"""The reference utilities of neural-mass modelling: sigmoid, second-order dynamics, bounds, sequences."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Mapping
from typing import Any

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import units
from ._jax import is_traced

_DEFAULT_BOUND = 500.0


class SequenceTypeError(TypeError, ValueError):
    """Items or a mode of the wrong type; also a ValueError, which callers of `brainmass.process_sequence` expect."""


def sigmoid(x, vmax=1.0, v0=0.0, r=1.0):
    """Firing rate of a potential, ``vmax / (1 + exp(r (v0 - x)))``; of ``x`` alone, the logistic function.

    Parameters
    ----------
    x : potential, any shape; all arguments broadcast
    vmax : largest rate, in any unit
    v0 : threshold, in the unit of ``x``; the default 0 is taken in that unit
    r : steepness, in 1 / the unit of ``x``

    Returns
    -------
    In the unit of ``vmax``

    Raises
    ------
    ValueError : a unit that does not fit
    TypeError : complex or boolean values

    References
    ----------
    Jansen and Rit 1995, Biological Cybernetics 73:357, equation 4.
    """
    unit = _unit(x)
    potential = units.real(_magnitude(x), "x")
    threshold = 0.0 if _is_plain_zero(v0) else units.strip(v0, unit, "v0")
    steepness = units.strip(r, unit**-1, "r")
    largest = units.real(_magnitude(vmax), "vmax")
    return units.attach(largest * lax.logistic(steepness * (potential - threshold)), _unit(vmax))


def sys2nd(*args, **named):
    """Second-order dynamics: ``sys2nd(A, a, u, x, v)``, or ``sys2nd(v, acc)``.

    With five arguments, the acceleration ``A a u - 2 a v - a^2 x``, which is ``dv/dt``. With two, the pair ``(v, acc)``
    that is ``(dx/dt, dv/dt)`` of a second-order equation written as a first-order system.

    Parameters
    ----------
    A : gain, such that ``A u`` is a velocity of ``x``
    a : rate constant, 1/time
    u : drive
    x, v : position, and velocity in the unit of ``x a``
    acc : acceleration

    Returns
    -------
    In the unit of ``x a^2``; or the pair as given

    Raises
    ------
    ValueError : a unit that does not fit
    TypeError : complex or boolean values, or neither two nor five arguments

    References
    ----------
    Jansen and Rit 1995, Biological Cybernetics 73:357, equations 1-3.
    """
    pair = len(args) + len(named) == 2
    given = _bound_arguments(("v", "acc") if pair else ("A", "a", "u", "x", "v"), args, named)
    if pair:
        return _checked(given["v"], "v"), _checked(given["acc"], "acc")
    unit, rate = _unit(given["x"]), _unit(given["a"])
    a, x = (units.real(_magnitude(given[n]), n) for n in ("a", "x"))
    v = units.strip(given["v"], unit * rate, "v")
    A, drive = (units.real(_magnitude(given[n]), n) for n in ("A", "u"))
    forcing: Any = _unit(given["A"]) * _unit(given["u"])
    scale = units.strip(u.Quantity(1.0, unit=forcing), unit * rate, "A * u")
    forced = A * a * drive if scale == 1.0 else scale * A * a * drive
    return units.attach(forced - 2.0 * a * v - a * a * x, unit * rate**2)


def bounded_input(x, bound=_DEFAULT_BOUND, *, lower=None, upper=None):
    """``bound tanh(x / bound)``; or, with ``lower`` or ``upper``, ``x`` clipped to ``[lower, upper]``.

    Parameters
    ----------
    x : any shape; all arguments broadcast
    bound : largest magnitude, positive, in the unit of ``x``; the default 500 is taken in that unit
    lower, upper : in the unit of ``x``, or infinite; one that is left out is infinite

    Returns
    -------
    In the unit of ``x``

    Raises
    ------
    ValueError : a unit that does not fit, ``lower`` above ``upper``, ``bound`` beside them or not positive
    TypeError : complex or boolean values
    """
    unit = _unit(x)
    value = units.real(_magnitude(x), "x")
    if lower is None and upper is None:
        limit = bound if bound is _DEFAULT_BOUND else units.strip(bound, unit, "bound")
        if not is_traced(limit) and not np.all(np.asarray(limit) > 0):
            raise ValueError(f"'bound' got {bound}, but takes a positive value")
        return units.attach(limit * jnp.tanh(value / limit), unit)
    if bound is not _DEFAULT_BOUND:
        raise ValueError(
            f"'bound' got {bound} beside 'lower' or 'upper': give the one for tanh, or the others for a clip"
        )
    low, high = _limit(lower, -np.inf, unit, "lower"), _limit(upper, np.inf, unit, "upper")
    if not (is_traced(low) or is_traced(high)) and np.any(np.asarray(low) > np.asarray(high)):
        raise ValueError(f"'lower' got {lower}, above 'upper', which got {upper}")
    return units.attach(jnp.minimum(jnp.maximum(value, low), high), unit)


def process_sequence(data, mode: str | Callable | Any = "stack", *, dim: int = 0):
    """Stack a sequence of items and reduce it, or run a model over one: ``process_sequence(model, inputs)``.

    Parameters
    ----------
    data : a list or tuple of items that match in type and structure (arrays, numbers, Quantities, and dicts, tuples and
        lists of them); or an array or dict whose leaves are stacked already; or a model with an ``update`` method
    mode : ``"stack"``, ``"first"``, ``"last"``, ``"avg"`` or ``"mean"``, ``"max"``, ``"min"``, or a function of each
        stacked leaf; with a model, its inputs, of which ``update`` is given one row of the leading axis after the other
    dim : the axis of the sequence in each leaf

    Returns
    -------
    The structure of one item, with the new axis or reduced along it; with a model, the stacked outputs. Numbers, and
    arrays of integers, become floating point.

    Raises
    ------
    ValueError : no data, an unknown mode, or items whose shapes or units differ
    SequenceTypeError : items of different types or structure, or a mode that is neither (a TypeError and a ValueError)
    """
    if callable(getattr(data, "update", None)) and not isinstance(data, Mapping):
        return _run_model(data, mode, dim)
    reduce = _reduction(mode, dim)
    if isinstance(data, (list, tuple)):
        if not data:
            raise ValueError("'data' got an empty sequence, but takes at least one item")
        data = _stacked(list(data), dim, "data")
    else:
        data = _map(lambda leaf: _sequence_leaf(leaf, dim), data)
    return _map(reduce, data)


def _bound_arguments(names: tuple[str, ...], args: tuple, named: dict[str, Any]) -> dict[str, Any]:
    given = dict(zip(names, args))
    if len(args) + len(named) != len(names) or set(given) | set(named) != set(names):
        got = f"{len(args)} by position" + (f" and {', '.join(named)} by name" if named else "")
        raise TypeError(f"sys2nd got {got}, but takes (A, a, u, x, v) or (v, acc)")
    return given | named


def _unit(value) -> Any:
    return value.unit if isinstance(value, u.Quantity) else units.UNITLESS


def _magnitude(value):
    return value.mantissa if isinstance(value, u.Quantity) else value


def _checked(value, name: str):
    """``value`` itself, once it is known to be real."""
    return units.attach(units.real(_magnitude(value), name), _unit(value))


def _is_plain_zero(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == 0


def _limit(value, default: float, unit, name: str):
    if value is None or (isinstance(value, float) and np.isinf(value)):
        return default if value is None else value
    return units.strip(value, unit, name)


# Sequences ----------------------------------------------------------------------------------------------------------

_REDUCTIONS: dict[str, Callable] = {
    "stack": lambda x, dim: x,
    "first": lambda x, dim: _take(x, 0, dim),
    "last": lambda x, dim: _take(x, -1, dim),
    "avg": lambda x, dim: x.mean(axis=dim),
    "mean": lambda x, dim: x.mean(axis=dim),
    "max": lambda x, dim: x.max(axis=dim),
    "min": lambda x, dim: x.min(axis=dim),
}


def _take(x, index: int, dim: int):
    return x[(slice(None),) * (dim % x.ndim) + (index,)]


def _reduction(mode, dim: int) -> Callable:
    if isinstance(mode, str):
        if mode not in _REDUCTIONS:
            raise ValueError(f"'mode' got {mode!r}, but takes {', '.join(map(repr, _REDUCTIONS))}, or a function")
        return lambda leaf: _REDUCTIONS[mode](leaf, dim)
    if callable(mode):
        return mode
    raise SequenceTypeError(f"'mode' got {type(mode).__name__}, but takes a string or a function")


def _is_leaf(x) -> bool:
    return isinstance(x, u.Quantity) or not isinstance(x, (Mapping, list, tuple))


def _map(fun: Callable, tree):
    return jax.tree.map(fun, tree, is_leaf=_is_leaf)


def _sequence_leaf(leaf, dim: int):
    leaf = _leaf(leaf, "data")
    if leaf.ndim == 0 or leaf.shape[dim] == 0:
        raise ValueError(f"'data' got a leaf of shape {leaf.shape}, but takes at least one item along axis {dim}")
    return leaf


def _leaf(value, name: str):
    return units.attach(jnp.asarray(units.real(_magnitude(value), name)), _unit(value))


def _kind(item):
    """What must match among items: containers by type, everything else as an array, with or without a unit."""
    if isinstance(item, u.Quantity):
        return u.Quantity
    return type(item) if isinstance(item, (Mapping, list, tuple)) else "array"


def _stacked(items: list, dim: int, name: str):
    """Items as one item whose leaves have a new axis, recursively."""
    first = items[0]
    for item in items[1:]:
        if _kind(item) != _kind(first):
            raise SequenceTypeError(
                f"'{name}' mixes {type(first).__name__} and {type(item).__name__}, but takes items of one type"
            )
    if isinstance(first, Mapping):
        for item in items[1:]:
            if set(item) != set(first):
                raise SequenceTypeError(f"'{name}' mixes dicts with keys {sorted(first)} and {sorted(item)}")
        return {key: _stacked([item[key] for item in items], dim, f"{name}[{key!r}]") for key in first}
    if isinstance(first, (list, tuple)):
        if len({len(item) for item in items}) > 1:
            raise SequenceTypeError(f"'{name}' mixes lengths {sorted({len(item) for item in items})}")
        parts = [_stacked(list(part), dim, f"{name}[{k}]") for k, part in enumerate(zip(*items))]
        return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
    unit = _unit(first)
    leaves = [jnp.asarray(units.strip(item, unit, name)) for item in items]
    if len({leaf.shape for leaf in leaves}) > 1:
        raise ValueError(
            f"'{name}' mixes shapes {sorted({leaf.shape for leaf in leaves})}, but takes items of one shape"
        )
    return units.attach(jnp.stack(leaves, axis=dim), unit)


def _run_model(model, inputs, dim: int):
    """The stacked outputs of ``model.update`` over the leading axis of the inputs."""
    if isinstance(inputs, str) or callable(inputs):
        raise SequenceTypeError(
            f"process_sequence(model, inputs): 'inputs' got {inputs!r}, but takes an array or a pytree"
        )
    leaves = jax.tree.leaves(inputs, is_leaf=_is_leaf)
    lengths = {jnp.shape(_magnitude(leaf))[:1] for leaf in leaves}
    if len(lengths) != 1 or () in lengths or (0,) in lengths:
        raise ValueError(
            f"'inputs' got leading axes {sorted(lengths)}, but takes one leading axis of at least one step"
        )
    brainstate = sys.modules.get("brainstate")
    if brainstate is not None and isinstance(model, brainstate.nn.Module):
        # A mutable model: brainstate compiles the loop and carries its states.
        return brainstate.transform.for_loop(model.update, inputs)
    steps = range(next(iter(lengths))[0])
    rows = (_map(operator.itemgetter(k), inputs) for k in steps)
    return process_sequence([model.update(row) for row in rows], "stack", dim=dim)
