"""Utilities of neural-mass modelling: sigmoid, second-order dynamics, bounds, sequences."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, overload

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import units
from ._jax import is_traced

_DEFAULT_BOUND = 500.0


class SequenceTypeError(TypeError, ValueError):
    """Items or a mode of the wrong type; also a ValueError, as `brainmass.process_sequence` raises."""


def sigmoid(x, vmax=1.0, v0=0.0, r=1.0):
    """Firing rate of a potential, ``vmax / (1 + exp(r (v0 - x)))``; of ``x`` alone, the logistic function.

    Parameters
    ----------
    x : potential, any shape; all arguments broadcast
    vmax : largest rate, in any unit
    v0 : threshold, in the unit of ``x``; or 0, which is the same in every unit
    r : steepness, in 1 / the unit of ``x``

    Returns
    -------
    In the unit of ``vmax``. Floating-point dtypes stay, integers become the default one

    Raises
    ------
    ValueError : a unit or a shape that does not fit
    TypeError : complex or boolean values

    References
    ----------
    Jansen and Rit 1995, Biological Cybernetics 73:357, equation 4.
    """
    potential, unit = _split(x, "x")
    largest, rate = _split(vmax, "vmax")
    threshold, steepness = _in_unit(v0, unit, "v0"), units.strip(r, unit**-1, "r")
    _check_shapes(x=potential, vmax=largest, v0=threshold, r=steepness)
    return units.attach(largest * lax.logistic(steepness * (potential - threshold)), rate)


@overload
def sys2nd(A, a, u, x, v) -> Any: ...
@overload
def sys2nd(v, acc) -> tuple[Any, Any]: ...
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
    acc : acceleration, in the unit of ``v`` per time, or of ``v`` where time is a plain number

    Returns
    -------
    In the unit of ``x a^2``; or the pair. Floating-point dtypes stay, integers become the default one

    Raises
    ------
    ValueError : a unit or a shape that does not fit
    TypeError : complex or boolean values, or neither two nor five arguments

    References
    ----------
    Jansen and Rit 1995, Biological Cybernetics 73:357, equations 1-3.
    """
    if len(args) + len(named) == 2:
        return _first_order(**_by_name(("v", "acc"), args, named))
    return _acceleration(**_by_name(("A", "a", "u", "x", "v"), args, named))


def bounded_input(x, bound=_DEFAULT_BOUND, *, lower=None, upper=None):
    """``bound tanh(x / bound)``; or, with ``lower`` or ``upper``, ``x`` clipped to ``[lower, upper]``.

    Parameters
    ----------
    x : any shape; all arguments broadcast
    bound : largest magnitude, positive and finite, in the unit of ``x``; by default 500 of that unit
    lower, upper : in the unit of ``x``, or 0 or infinite, which are the same in every unit; by default infinite

    Returns
    -------
    In the unit of ``x``. Floating-point dtypes stay, integers become the default one

    Raises
    ------
    ValueError : a unit or a shape that does not fit, ``lower`` above ``upper``, ``bound`` with these or not positive
    TypeError : complex or boolean values
    """
    value, unit = _split(x, "x")
    if lower is None and upper is None:
        limit: Any = bound if bound is _DEFAULT_BOUND else units.strip(bound, unit, "bound")
        check_bound(limit, bound)
        _check_shapes(x=value, bound=limit)
        return units.attach(limit * jnp.tanh(value / limit), unit)
    if bound is not _DEFAULT_BOUND:
        raise ValueError(
            f"'bound' got {bound} beside 'lower' or 'upper': give the one for tanh, or the others for a clip"
        )
    low = -np.inf if lower is None else _in_unit(lower, unit, "lower")
    high = np.inf if upper is None else _in_unit(upper, unit, "upper")
    _check_shapes(x=value, lower=low, upper=high)
    if not (is_traced(low) or is_traced(high)) and not np.all(np.asarray(low) <= np.asarray(high)):
        raise ValueError(f"'lower' got {lower}, but takes at most 'upper', which got {upper}")
    value = value if lower is None else jnp.maximum(value, low)
    return units.attach(value if upper is None else jnp.minimum(value, high), unit)


def process_sequence(data, mode: Any = "stack", *, dim: int = 0, inputs=None):
    """Stack a sequence of items and reduce it, or run a model over one: ``process_sequence(model, inputs)``.

    Parameters
    ----------
    data : a list or tuple of items that match in type and structure (arrays, numbers, Quantities, and dicts, tuples and
        lists of them); or an array or pytree with stacked leaves; or a model with an ``update`` method
    mode : ``"stack"``, ``"first"``, ``"last"``, ``"avg"`` or ``"mean"``, ``"max"``, ``"min"``, or a function of each
        stacked leaf; with a model, its inputs
    dim : the axis of the sequence in each leaf; with a model, 0
    inputs : with a model, a sequence like ``data``, whose items go to ``update`` one after the other: in brainstate's
        loop for a model of brainstate, else in a Python loop, as the state may be any attribute

    Returns
    -------
    The structure of one item, with the new axis or reduced along it; with a model, the stacked outputs. Floating-point
    dtypes stay, within JAX's precision; integers become the default one, in every mode

    Raises
    ------
    ValueError : no data, an unknown mode or axis
    SequenceTypeError : values that are not real, items that differ in type, structure, shape or unit, or a mode that
        is neither a string nor a function (a TypeError and a ValueError)
    """
    if not _is_model(data):
        if inputs is not None:
            raise SequenceTypeError(f"'inputs' go with a model that has 'update', but 'data' got {type(data).__name__}")
        reduce = _reduction(mode, dim)
        return jax.tree.map(reduce, _stacked(data, dim, "data"), is_leaf=_is_quantity)
    has_mode = not (isinstance(mode, str) and mode == "stack")
    if dim != 0 or (inputs is not None and has_mode):
        raise SequenceTypeError("'mode' and 'dim' do not go with a model and its 'inputs': reduce what comes back")
    return _run(data, mode if inputs is None else inputs)


# Arguments ----------------------------------------------------------------------------------------------------------


def _acceleration(A, a, u, x, v):
    a, rate = _rate(a)
    x, unit = _split(x, "x")
    v = units.strip(v, unit * rate, "v")
    A, gain = _split(A, "A")
    drive, of_drive = _split(u, "u")
    _check_shapes(A=A, a=a, u=drive, x=x, v=v)
    scale = units.strip(_one(gain * of_drive), unit * rate, "A * u")
    forced = A * a * drive if scale == 1.0 else scale * A * a * drive
    return units.attach(forced - 2.0 * a * v - a * a * x, unit * rate**2)


def _rate(a):
    magnitude, unit = _split(a, "a")
    if not unit.is_unitless:
        units.strip(_one(unit), u.hertz, "a")
    return magnitude, unit


def _first_order(v, acc):
    velocity, unit = _split(v, "v")
    acceleration, per_time = _split(acc, "acc")
    if not per_time.has_same_dim(unit):
        units.strip(_one(per_time), unit / u.second, "acc")
    _check_shapes(v=velocity, acc=acceleration)
    return units.attach(velocity, unit), units.attach(acceleration, per_time)


def _by_name(names: tuple[str, ...], args: tuple, named: dict[str, Any]) -> dict[str, Any]:
    by_position = dict(zip(names, args))
    if len(args) + len(named) != len(names) or set(by_position) | set(named) != set(names):
        got = f"{len(args)} by position" + (f" and {', '.join(named)} by name" if named else "")
        raise TypeError(f"sys2nd got {got}, but takes (A, a, u, x, v) or (v, acc)")
    return by_position | named


def _one(unit):
    return u.Quantity(1.0, unit=unit)


def _split(value, name: str) -> tuple[Any, Any]:
    """The magnitude, as floating point, and the unit; a unit such as mV/V goes into the magnitude."""
    if not _is_quantity(value):
        return units.real(value, name), units.UNITLESS
    unit = units.UNITLESS if value.unit.has_same_dim(units.UNITLESS) else value.unit
    return units.strip(value, unit, name), unit


def check_bound(magnitude, bound) -> None:
    """Raise unless it is positive and finite, or traced: an infinite bound would be inf * 0."""
    if not is_traced(magnitude) and not np.all((np.asarray(magnitude) > 0) & np.isfinite(magnitude)):
        raise ValueError(f"'bound' got {bound}, but takes a positive finite value")


def _in_unit(value, unit, name: str) -> Any:
    """The magnitude in ``unit``; plain 0 and infinity are the same in every unit."""
    plain = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if plain and value in (0, np.inf, -np.inf):
        return float(value)
    return units.strip(value, unit, name)


def _check_shapes(**arrays) -> None:
    """Raise ValueError at the first argument that does not broadcast against those before it."""
    shape = ()
    for name, array in arrays.items():
        try:
            shape = np.broadcast_shapes(shape, np.shape(array))
        except ValueError:
            message = f"'{name}' got shape {np.shape(array)}, but takes one that broadcasts against {shape}"
            raise ValueError(f"{message}, the shape of the other arguments") from None


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


def _is_quantity(x) -> bool:
    return isinstance(x, u.Quantity)


def _is_model(x) -> bool:
    # Dicts and JAX's tracers have an 'update' too.
    data = isinstance(x, (Mapping, jax.Array, np.ndarray, u.Quantity))
    return not data and callable(getattr(x, "update", None))


def _stacked(data, dim: int, name: str):
    """A sequence of items, or a stacked pytree, as a pytree whose leaves have the axis ``dim``."""
    return _stack(data, dim, name) if _is_list(data) else _as_stacked(data, dim, name)


def _is_list(data) -> bool:
    """Whether data is a list of items; a namedtuple is one item."""
    return isinstance(data, (list, tuple)) and not hasattr(data, "_fields")


def _as_stacked(data, dim: int, name: str):
    paths, structure = jax.tree_util.tree_flatten_with_path(data, is_leaf=_is_quantity)
    leaves = [_leaf(leaf, units.unit_of(leaf), name + jax.tree_util.keystr(path)) for path, leaf in paths]
    _check_length([_axis_length(leaf.shape, dim, name) for leaf in leaves], name)
    quantities = [units.attach(leaf, units.unit_of(x)) for leaf, (_, x) in zip(leaves, paths)]
    return jax.tree.unflatten(structure, quantities)


def _stack(items: Sequence, dim: int, name: str):
    """Items as one item whose leaves have a new axis."""
    _check_length([len(items)], name)
    paths, structure = jax.tree_util.tree_flatten_with_path(items[0], is_leaf=_is_quantity)
    if not paths:
        raise ValueError(f"'{name}' got items such as {items[0]!r}, but takes items that hold at least one array")
    rows = []
    for k, item in enumerate(items):
        row, other = jax.tree.flatten(item, is_leaf=_is_quantity)
        if other != structure:
            raise SequenceTypeError(f"'{name}' mixes structures: item {k} is {_show(other)}, item 0 {_show(structure)}")
        rows.append(row)
    columns = (_stack_leaves(column, dim, name, path) for column, (path, _) in zip(zip(*rows), paths))
    return jax.tree.unflatten(structure, columns)


def _show(structure) -> str:
    """A structure with an asterisk for each array."""
    return str(structure).removeprefix("PyTreeDef(").removesuffix(")")


def _stack_leaves(values: Sequence, dim: int, name: str, path):
    unit, suffix = units.unit_of(values[0]), jax.tree_util.keystr(path)
    leaves = [_leaf(value, unit, f"{name}[{k}]{suffix}") for k, value in enumerate(values)]
    shapes = list(dict.fromkeys(leaf.shape for leaf in leaves))
    if len(shapes) > 1:
        raise SequenceTypeError(f"'{name}' mixes shapes {shapes}, but takes items of one shape")
    _axis_length((*shapes[0], len(leaves)), dim, name)
    return units.attach(jnp.stack(leaves, axis=dim), unit)


def _leaf(value, unit, name: str):
    try:
        return jnp.asarray(units.strip(value, unit, name))
    except (TypeError, ValueError) as error:
        raise SequenceTypeError(str(error)) from None


def _axis_length(shape: tuple[int, ...], dim: int, name: str) -> int:
    if not shape:
        raise ValueError(f"'{name}' got a single value, but takes at least one item along an axis")
    if not -len(shape) <= dim < len(shape):
        raise ValueError(f"'dim' got {dim}, but '{name}' has {len(shape)} axes when stacked")
    return shape[dim]


def _check_length(lengths: Sequence[int], name: str) -> int:
    """The one length of a sequence."""
    different = sorted(set(lengths))
    if len(different) != 1 or different == [0]:
        got = f"lengths {different}" if len(different) > 1 else "an empty sequence"
        raise ValueError(f"'{name}' got {got}, but takes one length, of at least one item")
    return different[0]


def _run(model, inputs):
    """The stacked outputs of ``model.update`` over the leading axis of the inputs."""
    if isinstance(inputs, str) or callable(inputs):
        raise SequenceTypeError(f"'inputs' got {inputs!r}, but takes the model's inputs: an array, pytree or list")
    if _is_list(inputs):
        inputs = _stack(inputs, 0, "inputs")
    shapes = [np.shape(u.get_magnitude(leaf)) for leaf in jax.tree.leaves(inputs, is_leaf=_is_quantity)]
    steps = _check_length([_axis_length(shape, 0, "inputs") for shape in shapes], "inputs")
    brainstate = sys.modules.get("brainstate")
    if brainstate is not None and isinstance(model, brainstate.nn.Module):
        # Only brainstate knows the states; its loop is compiled and carries them.
        return _as_stacked(brainstate.transform.for_loop(model.update, inputs), 0, "the output of update")
    rows = [jax.tree.map(operator.itemgetter(k), inputs, is_leaf=_is_quantity) for k in range(steps)]
    return _stack([model.update(row) for row in rows], 0, "the output of update")
