"""Conduction delays of connections: known before a run is compiled, or live, that is data of the run."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np

from . import sparsity, units
from ._jax import is_traced, of_one_shape, values_here

# Of conduction.
SPEED: Any = u.mm / u.ms
# A whole number of steps with a rounding error is not rounded up.
ROUNDING = 1e-5


@dataclasses.dataclass(frozen=True)
class Delays:
    """How long the connections of a coupling take.

    Attributes
    ----------
    seconds : ``(N, N)``, of sparse weights one for each stored value ``(E,)``; live ones may have a batch before
    lengths : in mm, instead of ``seconds``, where the speed of conduction is a constant of the coupling
    most : the longest in seconds, of live delays; ``None``, they are known before the run is compiled
    interpolate : whether what arrives is read linearly between two steps
    """

    seconds: Any = None
    lengths: np.ndarray | None = None
    most: float | None = None
    interpolate: bool = False

    @property
    def live(self) -> bool:
        """Whether they are data of the run, so that others compile nothing anew."""
        return self.most is not None

    def times(self, speed: Any) -> Any:
        """The delays in seconds; ``speed`` in mm/ms, which broadcasts to ``(*batch, N)``, where there are lengths."""
        if self.lengths is None:
            return self.seconds
        if np.ndim(speed) and np.ndim(self.lengths) == 2:
            speed = speed[..., :, None]
        lengths, speed = of_one_shape(self.lengths, speed)
        return lengths / speed * 1e-3

    def depth(self, dt: float) -> int:
        """Steps of the longest of live delays."""
        assert self.most is not None
        return max(int(self.interpolate), math.ceil(self.most / dt - ROUNDING))

    def text(self) -> str:
        """The longest delay, in words."""
        if self.most is not None:
            return f"delays to {1e3 * self.most:.4g} ms, live"
        return f"delays to {1e3 * self.seconds.max(initial=0.0):.4g} ms"


@dataclasses.dataclass(frozen=True)
class Reading:
    """A delay of each connection in whole steps, and the share of its weight that reads there; ``None``, all of it."""

    steps: Any
    share: Any = None


def readings(seconds: Any, delays: Delays, dt: float) -> list[Reading]:
    """What connections read: one step back in time each, or the two around it; ``dt`` in seconds."""
    if not delays.live:
        steps = seconds / dt
        if not delays.interpolate:
            return [Reading(np.ceil(steps - ROUNDING).clip(0).astype(np.int32))]
        before = np.floor(steps + ROUNDING)
        share = (steps - before).clip(0.0)
        both = [Reading(before.astype(np.int32), 1.0 - share)]
        return both if not share.any() else [*both, Reading(before.astype(np.int32) + (share > 0), share)]
    steps, depth = jnp.asarray(seconds) / dt, delays.depth(dt)
    steps = steps if delays.interpolate else _without_slope(steps)
    # Known values were checked; of traced ones those that no history holds give NaN.
    share = jnp.where((steps >= 0) & (steps <= depth + 1e-3), 1.0, jnp.nan).astype(steps.dtype)
    if not delays.interpolate:
        slack = ROUNDING + 4 * jnp.finfo(steps.dtype).eps * steps
        whole = jnp.ceil(steps - slack).clip(0, depth).astype(jnp.int32)
        return [Reading(whole, share)]
    before = jax.lax.stop_gradient(jnp.clip(jnp.floor(steps), 0, depth - 1))
    late, whole = steps - before, before.astype(jnp.int32)
    return [Reading(whole, (1.0 - late) * share), Reading(whole + 1, late * share)]


@jax.custom_jvp
def _without_slope(steps):
    return steps


@_without_slope.defjvp
def _(primals, tangents):
    raise TypeError(
        "delays are rounded to whole steps, so nothing has a gradient in delays, distances or the speed of conduction: "
        "with interpolate=True they are read between two steps, and it has"
    )


def delays_of(delays, distances, speed, weights, max_delay, interpolate: bool) -> tuple[Delays | None, Any]:
    """The delays of a coupling's arguments, and the speed where it stays a constant of the coupling.

    Raises
    ------
    ValueError, TypeError : arguments that miss or exclude each other; shapes, negative or infinite values; known
        delays beyond ``max_delay``; traced ones without it
    """
    if (distances is None) != (speed is None):
        missing = "speed" if speed is None else "distances"
        raise ValueError(f"'{missing}' is needed: 'distances' and 'speed' make the delays together")
    if delays is not None and distances is not None:
        raise ValueError("'delays' and 'distances' were both given, but each makes the delays: give one of them")
    most = None if max_delay is None else units.positive_time(max_delay, u.second, "max_delay")
    if delays is None and distances is None:
        for name, wrong in (("max_delay", most is not None), ("interpolate", interpolate)):
            if wrong:
                raise ValueError(f"'{name}' was given without 'delays', or 'distances' and 'speed'")
        return None, None
    rate: Any = None
    lengths: Any = None
    name = "delays"
    if delays is not None:
        seconds = _of_connections(delays, u.second, "delays", weights)
    else:
        name = "distances"
        lengths = _of_connections(_with_unit(distances, u.mm), u.mm, "distances", weights)
        rate = units.strip(wide(_with_unit(speed, SPEED)), SPEED, "speed")
        _check_speed(rate, speed)
        seconds = Delays(lengths=lengths).times(rate)
    shape = _shape_of(weights)
    traced, batched = is_traced(seconds), np.ndim(seconds) > len(shape)
    if traced and most is None:
        what = "speed" if rate is not None and is_traced(rate) else name
        raise TypeError(
            f"'{what}' is traced by jit, vmap or grad, so that the longest delay is not known beforehand: say it by "
            f"max_delay=, a time"
        )
    if np.ndim(seconds) == 0:
        seconds = np.full(shape, float(seconds)) if not traced else jnp.broadcast_to(seconds, shape)
    if np.shape(seconds)[-len(shape) :] != shape:
        regions = int(np.shape(weights)[-1])
        raise ValueError(
            f"'{name}' got shape {np.shape(seconds)}, but takes ({regions}, {regions}) as the weights have"
        )
    if name == "distances":
        off_diagonal = _off_diagonal(weights)
        seconds, ones = of_one_shape(seconds, off_diagonal)
        seconds = seconds * ones
        lengths = lengths if is_traced(lengths) else np.asarray(lengths, np.float64) * off_diagonal
    if not traced:
        seconds = np.asarray(values_here(seconds), np.float64)
        most = longest_of(seconds, name, most, batched)
    if most is None:
        # A copy that nobody writes to: compiled programs are kept by its values.
        seconds = np.array(seconds)
        seconds.flags.writeable = False
        return Delays(seconds, interpolate=interpolate), None
    if rate is None or is_traced(lengths) or np.ndim(lengths) != len(shape):
        return Delays(jnp.asarray(seconds), None, most, interpolate), None
    lengths.flags.writeable = False
    return Delays(None, lengths, most, interpolate), u.Quantity(rate, unit=SPEED)


@dataclasses.dataclass(frozen=True, eq=False)
class Known:
    """The part of delays that is known beforehand, compared by its values."""

    delays: Delays | None

    @property
    def _parts(self):
        if self.delays is None:
            return None
        arrays = sparsity.Static(self.delays.seconds), sparsity.Static(self.delays.lengths)
        return *arrays, self.delays.most, self.delays.interpolate

    def __eq__(self, other) -> bool:
        return isinstance(other, Known) and self._parts == other._parts

    def __hash__(self) -> int:
        return hash(self._parts)


def check_within(speed, delays: Delays | None) -> None:
    """Raise ValueError where a known speed makes delays beyond the longest."""
    rate = units.strip(wide(_with_unit(speed, SPEED)), SPEED, "speed")
    _check_speed(rate, speed)
    if delays is not None and not is_traced(rate):
        longest_of(np.asarray(values_here(delays.times(rate))), "speed", delays.most, False)


def longest_of(seconds: np.ndarray, name: str, most: float | None, batched: bool) -> float | None:
    """Check known delays; the longest where they are live."""
    if not (np.isfinite(seconds).all() and (seconds >= 0).all()):
        raise ValueError(f"'{name}' got negative or infinite values, but takes finite ones from 0 on")
    longest = float(seconds.max(initial=0.0))
    if most is not None and longest > most * (1 + 1e-6):
        raise ValueError(
            f"'{name}' got delays up to {1e3 * longest:.4g} ms, but takes at most max_delay, {1e3 * most:.4g} ms"
        )
    return longest if most is None and batched else most


def _check_speed(rate, speed) -> None:
    if is_traced(rate):
        return
    rate = values_here(rate)
    if not (np.isfinite(rate).all() and (rate > 0).all()):
        raise ValueError(f"'speed' got {speed}, but takes positive speeds")


def _shape_of(weights) -> tuple[int, ...]:
    """Of what each connection has one of."""
    regions = int(np.shape(weights)[-1])
    return (len(sparsity.indices_of(weights)),) if sparsity.is_sparse(weights) else (regions, regions)


def _of_connections(value, unit, name: str, weights):
    """A quantity of connections without its unit: of sparse weights one for each stored value."""
    if sparsity.is_sparse(weights):
        return sparsity.values_on(weights, value, unit, name, wide)
    if sparsity.is_sparse(value):
        raise TypeError(f"'{name}' got a sparse matrix, but takes an array, as the weights are one")
    return units.strip(wide(value), unit, name)


def _off_diagonal(weights) -> np.ndarray:
    """One for connections between two regions, zero for those from a region to itself."""
    if sparsity.is_sparse(weights):
        rows, columns = sparsity.indices_of(weights).T
        return (rows != columns).astype(np.float64)
    return 1.0 - np.eye(np.shape(weights)[-1])


def wide(value):
    """A quantity in float64; float32 as the shortest decimal number: 0.1, not 0.100000001."""
    if not isinstance(value, u.Quantity) or is_traced(value.mantissa):
        return value
    mantissa = np.asarray(value.mantissa)
    if mantissa.dtype == np.float32:
        mantissa = mantissa.astype(str).astype(np.float64)
    elif np.issubdtype(mantissa.dtype, np.integer):
        mantissa = mantissa.astype(np.float64)
    return u.Quantity(mantissa, unit=value.unit)


def _with_unit(value, unit):
    if isinstance(value, u.Quantity):
        return value
    return u.Quantity(value if is_traced(value) or sparsity.is_sparse(value) else np.asarray(value), unit=unit)
