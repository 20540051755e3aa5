"""Time in a loop, exact however late: steps are counted in digits, and times are compared with that count.

A float32 holds no time to a step once there are more than 2^24 of them, so no time is stored or summed. A run with
stimuli carries the number of its step as digits to base 4,096, which float32 holds exactly, as states of the loop.
What stimuli need are two things: the time since a `moment`, whose distance in whole steps is a difference of integers;
and the phase of a `cycle`, the sum of the phases that each digit stands for, every one of them reduced to a cycle
before the loop. Both are pointwise, so every implementation has them, and a gradient replays them exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ._jax import is_traced, of_one_shape, values_here

# A product of two numbers below this is exact in float32.
BASE = 4096
# Steps that three digits count.
MOST_STEPS = BASE**3
# What fewer digits than this count is compared as one number.
_TOGETHER = 2
_HALF_EVEN = lax.RoundingMethod.TO_NEAREST_EVEN


def digits_of(steps: int) -> int:
    """How many digits count so many steps.

    Raises
    ------
    ValueError : more than three do
    """
    if steps > MOST_STEPS:
        raise ValueError(
            f"'duration' got {steps:,} steps, but a run with stimuli takes at most {MOST_STEPS:,}: several runs that "
            f"continue each other with initial=result.final take more"
        )
    return next(n for n in (1, 2, 3) if steps <= BASE**n)


def after(digits: Sequence[Any]) -> list:
    """The digits of the next step."""
    carry, moved = jnp.ones_like(digits[0]), []
    for k, digit in enumerate(digits):
        raised = digit + carry
        if k + 1 < len(digits):
            full = raised >= BASE
            raised, carry = jnp.where(full, 0.0, raised), jnp.where(full, 1.0, 0.0)
        moved.append(lax.stop_gradient(raised))
    return moved


def before(digits: Sequence[Any]) -> list:
    """The digits of the step before."""
    borrow, moved = jnp.ones_like(digits[0]), []
    for k, digit in enumerate(digits):
        lowered = digit - borrow
        if k + 1 < len(digits):
            short = lowered < 0.0
            lowered, borrow = jnp.where(short, BASE - 1.0, lowered), jnp.where(short, 1.0, 0.0)
        moved.append(lax.stop_gradient(lowered))
    return moved


# Before the loop ----------------------------------------------------------------------------------------------------


def labels(moments: Sequence[str], cycles: Sequence[str], digits: int) -> tuple[str, ...]:
    """The names of what `moment` and `cycle` give of these, in order."""
    of_moments = ("whole", *(["high"] if digits > _TOGETHER else []), "part")
    of_cycles = ("rate", "offset", *(f"{what} {k}" for k in range(digits) for what in ("phase", "rest")))
    pairs = [(name, of_moments) for name in moments] + [(name, of_cycles) for name in cycles]
    return tuple(f"{name} {part}" for name, parts in pairs for part in parts)


def together(*values) -> tuple:
    """Numbers and arrays of one shape and dtype: float64 on the host; with one that is traced or shared, its dtype."""
    away = [x for x in values if is_traced(x) or (isinstance(x, jax.Array) and len(x.sharding.device_set) > 1)]
    dtype = np.float64
    if away:
        with jax.numpy_dtype_promotion("standard"):
            dtype = jnp.result_type(*away)
    known = [any(x is y for y in away) for x in values]
    cast = (x.astype(dtype) if there else np.asarray(values_here(x), dtype) for x, there in zip(values, known))
    return of_one_shape(*cast)


def _of(x) -> Any:
    """The library of an array."""
    return jnp if isinstance(x, jax.Array) else np


def moment(name: str, time, dt: float, digits: int) -> dict[str, Any]:
    """A time as whole steps, and the part of a step that is left, by label."""
    steps = time / dt
    xp = _of(steps)
    whole = _constant(xp.round(steps))
    # Within rounding of a step it is that step: 0.7 ms is step 7 of 0.1 ms.
    part = steps - whole
    found = {"whole": whole, "part": part}
    if digits > _TOGETHER:
        size = float(BASE**_TOGETHER)
        high = xp.floor(whole / size)
        found |= {"whole": whole - high * size, "high": high}
    return {f"{name} {key}": x for key, x in found.items()}


def cycle(name: str, rate, offset, dt: float, digits: int, period: bool = False) -> dict[str, Any]:
    """What the phase of ``rate * t - offset`` is made of, by label.

    Parameters
    ----------
    rate : cycles a unit of time, or with ``period`` the time of a cycle
    offset : in cycles
    """
    each = 1.0 / rate if period else rate
    found = {"rate": each * dt, "offset": offset - _constant(_of(offset).round(offset))}
    for k in range(digits):
        found[f"phase {k}"], found[f"rest {k}"] = _phase(_constant(rate), dt * BASE**k, period)
    return {f"{name} {key}": x for key, x in found.items()}


def _constant(x):
    return lax.stop_gradient(x) if isinstance(x, jax.Array) else x


def _phase(rate, time: float, period: bool) -> tuple[Any, Any]:
    """The phase after a time, reduced: a multiple of 1/4,096 of a cycle, and the rest."""
    if rate.dtype == np.float64:
        xp = _of(rate)
        phase = time / rate if period else rate * time
        phase = phase - xp.round(phase)
        coarse = xp.round(phase * BASE) / BASE
        return coarse, phase - coarse
    # Float32, in twice its digits: products of halves are exact.
    rates = _reciprocal(rate) if period else _halves(rate)
    coarse, rest = jnp.zeros_like(rate), jnp.zeros_like(rate)
    for one in rates:
        for other in _thirds(time):
            product = one * np.float32(other)
            near = jnp.round(product * BASE) / BASE
            coarse, rest = coarse + (near - jnp.round(near)), rest + (product - near)
    return coarse - jnp.round(coarse), rest


def _halves(x) -> tuple[Any, Any]:
    """Float32 as the sum of two of 12 bits each."""
    bits = lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(-BASE)
    high = lax.bitcast_convert_type(bits, jnp.float32)
    return high, x - high


def _reciprocal(x) -> list:
    """``1 / x`` as a sum of numbers of 12 bits."""
    near = 1.0 / x
    left = jnp.ones_like(x)
    for a in _halves(near):
        for b in _halves(x):
            left = left - a * b
    return [*_halves(near), *_halves(left / x)]


def _thirds(x: float) -> list[float]:
    """A float64 as the sum of three numbers of 12 bits, to 36 bits."""
    parts = []
    for _ in range(3):
        mantissa, exponent = np.frexp(x)
        parts.append(float(np.ldexp(np.round(mantissa * BASE) / BASE, exponent)))
        x -= parts[-1]
    return parts


# In the loop --------------------------------------------------------------------------------------------------------


class InLoop:
    """The time of a stimulus at a stage of a step.

    Parameters
    ----------
    digits : of the number of the step
    values : what `moment` and `cycle` gave, by label
    dt : of a step, in the unit of time that ``since`` has
    stage : of the step, 0 its beginning and 1 its end
    """

    def __init__(self, digits: Sequence[Any], values: dict[str, Any], dt, stage: float):
        self._digits, self._values, self._dt, self._stage = digits, values, dt, stage

    def _whole(self, name: str):
        """Whole steps since a moment. The hoisting does not look into a constant, so no sum is rounded."""
        low, high = self._digits[:_TOGETHER], self._digits[_TOGETHER:]
        total = sum(digit * float(BASE**k) for k, digit in enumerate(low)) - self._values[f"{name} whole"]
        if high:
            total = total + float(BASE**_TOGETHER) * lax.stop_gradient(high[0] - self._values[f"{name} high"])
        return lax.stop_gradient(total)

    def steps(self, name: str, stage: float | None = None):
        """Steps since a moment, and parts of one."""
        stage = self._stage if stage is None else stage
        return self._whole(name) + (stage - self._values[f"{name} part"])

    def since(self, name: str):
        """The time since a moment."""
        return self._dt * self.steps(name)

    def passed(self, name: str):
        """Whether a moment has passed: from the step on that begins nearest to it."""
        return self.steps(name, 0.5) >= 0.0

    def started(self, name: str):
        """Whether a moment has passed at this stage; to a thousandth of a step, it counts as the beginning of one."""
        return self.steps(name) >= -1e-3

    def cycle(self, name: str, middle: bool = False):
        """Cycles from -1/2 to 1/2; with ``middle`` of the middle of the step."""
        rate, stage = self._values[f"{name} rate"], 0.5 if middle else self._stage
        number = lax.stop_gradient(sum(digit * float(BASE**k) for k, digit in enumerate(self._digits)))
        # 0 in value: the derivative with respect to the rate is the time.
        phase = number * (rate - lax.stop_gradient(rate)) + (rate * stage - self._values[f"{name} offset"])
        for k, digit in enumerate(self._digits):
            coarse, rest = (self._values[f"{name} {what} {k}"] for what in ("phase", "rest"))
            phase = phase + (_reduced(digit * coarse) + digit * rest)
        return phase - lax.stop_gradient(lax.round(phase, _HALF_EVEN))


def _reduced(phase):
    """A phase between -1/2 and 1/2, exactly, as a constant."""
    return lax.stop_gradient(phase - lax.round(phase, _HALF_EVEN))


class AtTimes:
    """The same at given times, away from a loop.

    Parameters
    ----------
    times : an array
    moments, cycles : times, and ``(rate, offset)``, by name
    """

    def __init__(self, times, moments: dict[str, Any], cycles: dict[str, tuple[Any, Any]]):
        self._times, self._moments, self._cycles = times, moments, cycles

    def since(self, name: str):
        return self._times - self._moments[name]

    def passed(self, name: str):
        return self.since(name) >= 0.0

    started = passed

    def cycle(self, name: str, middle: bool = False):
        rate, offset = self._cycles[name]
        phase = rate * self._times - offset
        return phase - np.round(phase)
