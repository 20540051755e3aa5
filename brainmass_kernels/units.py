"""Units: read off arguments, checked, and attached to results."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np

from ._jax import is_traced

UNITLESS: Any = u.UNITLESS


def unit_of(value) -> Any:
    """A value's unit; dimensionless for a plain number."""
    return value.unit if isinstance(value, u.Quantity) else UNITLESS


def describe(value) -> str:
    """A value's unit, or its type, in words, for an error message."""
    if isinstance(value, u.Quantity):
        return name_of(value.unit)
    return f"a plain {type(value).__name__} (no unit)"


def name_of(unit) -> str:
    return "dimensionless" if unit.is_unitless else str(unit)


def time_factor(unit, time_unit, name: str) -> float:
    """The factor that turns a magnitude in ``unit`` into one whose time is counted in ``time_unit``.

    Only times in the unit's name count: mV/ms has one, a volt has none, although its dimension does. So 2 mV/ms
    are 2,000 mV/s, and 20 Hz are 0.02/ms.

    Parameters
    ----------
    unit : any
    time_unit : a unit of time
    name : of the quantity, for errors

    Raises
    ------
    ValueError : a computed unit that lost the names of its factors
    """
    power = _power_of_time(unit)
    times = _times_in(unit, time_unit, name) if power is None else [(unit, power)]
    # A unit in ``time_unit`` gives exactly 1.
    return math.prod((_magnitude(part) / _magnitude(time_unit) ** power) for part, power in times)


def _power_of_time(unit) -> float | None:
    """The power of time that a unit is, such as -1 for Hz; ``None`` if it has other dimensions."""
    power = float(unit.dim.get_dimension("s"))
    return power if unit.dim == u.second.dim**power else None  # pyright: ignore[reportOperatorIssue]


def _times_in(unit, time_unit, name: str) -> list[tuple[Any, float]]:
    """The factors of a unit that are times, and the power of time of each."""
    parts = _parts(unit)
    if parts is None:
        # A named unit, or the reciprocal of one, has no time in its name. Else brainunit prints SI base units.
        plain = unit if _has_name(unit) else unit**-1
        if unit.dim.get_dimension("s") == 0 or (_has_name(plain) and (plain is unit or not _folds_time(plain))):
            return []
        raise ValueError(
            f"'{name}' is in {name_of(unit)}, from which the time cannot be read that is to be converted to the "
            f"model's time_unit, {name_of(time_unit)}: write it as a product of named units, such as u.mV / u.ms"
        )
    powers = [(part**exponent, _power_of_time(part) or 0.0, exponent) for part, exponent in parts]
    return [(part, power * exponent) for part, power, exponent in powers if power]


def _parts(unit) -> list[tuple[Any, float]] | None:
    """The named factors of a unit and their powers; ``None`` if they are unknown."""
    if hasattr(unit, "_display_parts"):  # brainunit before 0.6, which prints some products by one name
        parts = unit._display_parts
        return parts if parts is None else [(getattr(u, long), float(power)) for long, _, power in parts]
    above, _, below = str(unit).partition(" / ")
    factors = [(m, sign) for text, sign in ((above, 1.0), (below, -1.0)) for m in _FACTOR.finditer(text)]
    if _has_name(unit) or "kg" in {m[1] for m, _ in factors}:  # SI base units: the names were lost
        return None
    return [(parsed(m[1]), sign * float(m[2] or 1.0)) for m, sign in factors]


#: A symbol and its power, as brainunit prints them: mV, s^-2, s^0.5.
_FACTOR = re.compile(r"([^\W\d_]+)(?:\^(-?[\d.]+))?")


def _has_name(unit) -> bool:
    return not re.search(r"[ */^]", str(unit))


def _folds_time(unit) -> bool:
    """Whether the name may stand for a product with a time, as uWb does for mV ms."""
    return any(unit.dim == folded.dim for folded in (u.weber, u.coulomb, u.joule, u.katal))


def _magnitude(unit) -> float:
    return float(unit.magnitude)


def scaled(x, factor: float):
    """``x`` times a factor; a factor below 1 divides by its inverse, so that 10 ms have the bits of 0.01 s."""
    if factor == 1.0:
        return x
    return x * factor if factor > 1.0 else x / (1.0 / factor)


def inside(values: Mapping[str, Any], factors: Mapping[str, float]) -> dict[str, Any]:
    """From declared units to those of a model's equations, by name; see `Model.time_factors`."""
    return {n: scaled(x, factors[n]) if n in factors else x for n, x in values.items()}


def outside(values: Mapping[str, Any], factors: Mapping[str, float]) -> dict[str, Any]:
    """The inverse of `inside`."""
    return {n: scaled(x, 1.0 / factors[n]) if n in factors else x for n, x in values.items()}


def parsed(text: str) -> Any:
    """The unit that brainunit prints as ``text``.

    Raises
    ------
    ValueError : it prints none like that
    """
    return UNITLESS if text == str(UNITLESS) else u.parse_unit(text)


def lasting(unit) -> str:
    """The text of a unit that is the same after it was written and read, which brainunit may print otherwise."""
    texts = [str(unit)]
    while (again := str(parsed(texts[-1]))) not in texts:
        texts.append(again)
    # The last of them, or of those that follow each other in a circle the first in order.
    return min(texts[texts.index(again) :])


def reads(text: str, unit) -> bool:
    """Whether a text is a unit as some version of brainunit prints it."""
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
    unit : of the argument; plain numbers are allowed if it is dimensionless
    name : the argument's, for errors
    also : a second unit, whose numbers are read as in ``unit``

    Raises
    ------
    ValueError : the wrong unit
    TypeError : not a real number
    """
    if isinstance(value, (list, tuple)) and any(isinstance(x, u.Quantity) for x in value):
        raise TypeError(
            f"'{name}' got a {type(value).__name__} of quantities, but takes one quantity of several numbers, such as "
            f"[1.0, 2.0] * u.{unit.dispname if _has_name(unit) and not unit.is_unitless else 'ms'}; "
            f"u.math.stack makes one of several"
        )
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
    """``value`` as floating point; integers are promoted, other types raise TypeError."""
    if isinstance(value, (bool, np.bool_, complex)) or not isinstance(
        value, (int, float, np.generic, np.ndarray, jax.Array)
    ):
        if isinstance(value, (list, tuple)):
            return real(_array(value, name), name)
        raise TypeError(f"'{name}' got {type(value).__name__}, but takes a real number or an array of them")
    if isinstance(value, (int, float)):
        return float(value)
    if jnp.issubdtype(value.dtype, jnp.floating):
        return value
    if jnp.issubdtype(value.dtype, jnp.integer):
        return jnp.asarray(value, jnp.result_type(float))
    raise TypeError(f"'{name}' got dtype {value.dtype}, but takes real numbers (integers are promoted)")


def _array(values, name: str) -> np.ndarray:
    try:
        return np.asarray(values)
    except ValueError as error:
        raise ValueError(f"'{name}' got lists of unequal lengths, but takes an array: {error}") from error


def attach(magnitude, unit):
    """``magnitude`` as a Quantity, or unchanged if the unit is dimensionless."""
    return magnitude if unit.is_unitless else u.Quantity(magnitude, unit=unit)


def steps_of(value, dt, name: str) -> int:
    """The number of steps of a duration, which is a time or a number of steps; ``dt`` is in seconds.

    Raises
    ------
    ValueError : not a whole multiple of ``dt``, not finite, or too many steps to count
    """
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"'{name}' got bool, but takes a time or a whole number of steps")
    if isinstance(value, (int, np.integer)):
        return int(value)
    if not isinstance(value, u.Quantity):
        raise TypeError(f"'{name}' got {describe(value)}, but takes a time, as 2*u.second, or a number of steps")
    seconds = concrete(strip(value, u.second, name), name)
    count = seconds / dt
    if not math.isfinite(count):
        raise ValueError(f"'{name}' got {value}, but takes a finite time")
    if abs(count - round(count)) > 1e-4 * max(1.0, abs(count)) ** 0.5:
        near = round(count) * dt
        raise ValueError(
            f"'{name}' got {value}, which is {count:.6g} steps of dt = {dt * 1e3:g} ms; it takes a whole multiple "
            f"of dt, such as {near:g} s"
        )
    return round(count)


def positive_time(value, unit, name: str) -> float:
    """The magnitude in ``unit`` of a time that is not traced."""
    magnitude = concrete(strip(value, unit, name), name)
    if not (magnitude > 0 and math.isfinite(magnitude)):
        raise ValueError(f"'{name}' got {value}, but takes a positive time")
    return magnitude


def concrete(value, name: str) -> float:
    """A Python float of a scalar that must not be traced."""
    if is_traced(value):
        raise TypeError(f"'{name}' is traced by jit, vmap or grad, but takes a value known beforehand")
    array = np.asarray(value)
    if array.size != 1:
        raise ValueError(f"'{name}' got shape {array.shape}, but takes a single time")
    return float(array.reshape(()))
