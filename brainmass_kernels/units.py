"""Quantity off at the door, on again at the door."""

from __future__ import annotations

import math
from typing import Any

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np

from ._jax import is_traced

UNITLESS: Any = u.UNITLESS


def unit_of(value) -> Any:
    """A value's unit, dimensionless where it has none."""
    return value.unit if isinstance(value, u.Quantity) else UNITLESS


def describe(value) -> str:
    """A value's unit, or its type, in words, for an error message."""
    if isinstance(value, u.Quantity):
        return name_of(value.unit)
    return f"a plain {type(value).__name__} (no unit)"


def name_of(unit) -> str:
    return "dimensionless" if unit.is_unitless else str(unit)


def parsed(text: str) -> Any:
    """The unit that brainunit prints as ``text``.

    Raises
    ------
    ValueError : it prints none so
    """
    return UNITLESS if text == str(UNITLESS) else u.parse_unit(text)


def reads(text: str, unit) -> bool:
    """Whether a text is what some brainunit prints of a unit."""
    if text == str(unit):
        return True
    try:
        return parsed(text) == unit
    except ValueError:
        return False


def strip(value, unit, name: str, also=None) -> Any:
    """The magnitude of ``value`` in ``unit``, as a float array or number.

    Parameters
    ----------
    value : Quantity, array or number
    unit : the unit that the argument takes; plain numbers are taken where it is dimensionless
    name : the argument's name, for errors
    also : a second unit that is read as if it were the first

    Raises
    ------
    ValueError : the wrong unit
    TypeError : not a real number
    """
    if also is not None and isinstance(value, u.Quantity) and u.have_same_dim(value, 1.0 * also):
        unit = also
    if isinstance(value, u.Quantity):
        if not u.have_same_dim(value, u.Quantity(1.0, unit=unit)):
            raise ValueError(f"'{name}' got {describe(value)}, but takes {name_of(unit)}")
        magnitude = value.to_decimal(unit)
    elif unit.is_unitless:
        magnitude = value
    else:
        raise ValueError(f"'{name}' got {describe(value)}, but takes {name_of(unit)}: multiply it by its unit")
    return real(magnitude, name)


def real(value, name: str) -> Any:
    """``value`` as floating point; complex, boolean and other kinds are refused, integers promoted."""
    if isinstance(value, (bool, np.bool_, complex)) or not isinstance(
        value, (int, float, np.generic, np.ndarray, jax.Array)
    ):
        if isinstance(value, (list, tuple)):
            return real(np.asarray(value), name)
        raise TypeError(f"'{name}' got {type(value).__name__}, but takes a real number or an array of them")
    if isinstance(value, (int, float)):
        return float(value)
    if jnp.issubdtype(value.dtype, jnp.floating):
        return value
    if jnp.issubdtype(value.dtype, jnp.integer):
        return jnp.asarray(value, jnp.result_type(float))
    raise TypeError(f"'{name}' got dtype {value.dtype}, but takes real numbers (integers are promoted)")


def attach(magnitude, unit):
    """``magnitude`` as a Quantity, or as it is where the unit is dimensionless."""
    return magnitude if unit.is_unitless else u.Quantity(magnitude, unit=unit)


def steps_of(value, dt, name: str) -> int:
    """A duration as a number of steps; both are a time, or ``value`` is a number of steps already.

    Raises
    ------
    ValueError : not a whole multiple of ``dt``, or not positive enough to be a duration
    """
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"'{name}' got bool, but takes a time or a whole number of steps")
    if isinstance(value, (int, np.integer)):
        return int(value)
    if not isinstance(value, u.Quantity):
        raise TypeError(f"'{name}' got {describe(value)}, but takes a time, as 2*u.second, or a number of steps")
    seconds = concrete(strip(value, u.second, name), name)
    count = seconds / dt
    if abs(count - round(count)) > 1e-4 * max(1.0, abs(count)) ** 0.5:
        near = round(count) * dt
        raise ValueError(
            f"'{name}' got {value}, which is {count:.6g} steps of dt = {dt * 1e3:g} ms; it takes a whole multiple "
            f"of dt, such as {near:g} s"
        )
    return round(count)


def positive_time(value, unit, name: str) -> float:
    """The magnitude of a time in ``unit``, known before tracing."""
    magnitude = concrete(strip(value, unit, name), name)
    if not (magnitude > 0 and math.isfinite(magnitude)):
        raise ValueError(f"'{name}' got {value}, but takes a positive time")
    return magnitude


def concrete(value, name: str) -> float:
    """A Python float from a scalar that must be known before tracing."""
    if is_traced(value):
        raise TypeError(f"'{name}' is traced by jit, vmap or grad, but takes a value known beforehand")
    array = np.asarray(value)
    if array.size != 1:
        raise ValueError(f"'{name}' got shape {array.shape}, but takes a single time")
    return float(array.reshape(()))
