"""Statistics of the records, computed block by block without storing the trajectory.

A kernel runs until a block of records is full; plain jnp then reduces the block. So a statistic costs a kernel neither
registers nor a separate gradient, a spectrum is a matrix product, and memory does not grow with time. A long block is
reduced part by part, so that no table (of phases, or of which record belongs to which mean) is as long as the run.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import rounding, units

#: Most values of one observable in a block, and its fewest and most records.
BLOCK = 2**24
FEWEST, LONGEST = 32, 2**20
#: Most values in the table of one statistic, which covers at least `FEWEST` records.
TABLE = 2**19
#: Most places in a run whose phase factors are in one table. Those of more are products of tables of its digits, to the
#: base `DIGITS`, so that no table grows with time.
PLACES = 2**12
DIGITS = 2**9


class Sampling(NamedTuple):
    """The records that a statistic is computed from.

    Attributes
    ----------
    count : number of records
    interval : seconds from one to the next
    block : records of a block; the last block may have fewer
    channels : lanes that belong together, the regions of a network or its sensors; 0 without a network
    """

    count: int
    interval: float
    block: int
    channels: int = 0

    @classmethod
    def of(
        cls, count: int, interval: float, lanes: int, channels: int = 0, multiple: int = 1, least: int = 0
    ) -> Sampling:
        """In equal blocks, if a divisor of the count is near; or in blocks of a multiple of some records.

        A block has as many lanes' records as fit in the caches, and ``least`` records if there are so many.
        """
        most = max(FEWEST, min(LONGEST, BLOCK // max(1, lanes)))
        even = -(-count // -(-count // most)) if count else 1
        even = min(max(even, least), max(1, count))
        if multiple > 1:
            return cls(count, interval, min(count, -(-even // multiple) * multiple), channels)
        divisors = (b for b in range(even, even + even // 2 + 1) if count % b == 0)
        return cls(count, interval, next(divisors, even), channels)

    def records_of(self, time: float, name: str) -> int:
        """The records of a time in seconds, of the argument of this name.

        Raises
        ------
        ValueError : no whole multiple of the time between records, or longer than the recording
        """
        times = time / self.interval
        if round(times) < 1 or abs(times - round(times)) > 1e-6 * times:
            raise ValueError(
                f"'{name}' got {time:g} s, but takes a whole multiple of the time between records, {self.interval:g} s"
            )
        if round(times) > self.count:
            raise ValueError(f"'{name}' got {time:g} s, longer than the {self.count * self.interval:g} s recorded")
        return round(times)


@dataclasses.dataclass(frozen=True)
class Observation:
    """What is made of the records of a run as they come, a statistic or a signal."""

    of: Any = dataclasses.field(default="", kw_only=True)

    @property
    def suffix(self) -> str:
        """The ending of the result's name, after the quantity's."""
        return type(self).__name__.lower()

    def check(self, sampling: Sampling) -> None:
        """Raise ValueError if the records of a run cannot give it."""
        if sampling.count < 1:
            raise ValueError(f"{type(self).__name__} needs a record, but the transient leaves none")

    def unit(self, unit) -> Any:
        """Its unit, from the quantity's."""
        return unit

    def bound(self, of, unit) -> Any:
        """The same of a quantity that has this unit."""
        bound = copy.copy(self)
        object.__setattr__(bound, "of", of)
        return bound

    def shared(self, sampling: Sampling) -> int:
        """Values that all lanes share, such as tables."""
        return 0


@dataclasses.dataclass(frozen=True)
class Reduction(Observation):
    """A statistic of all records of one quantity, updated with each block of records.

    Parameters
    ----------
    of : the observable or state, or a signal made of one (`bk.Readout`, `bk.Convolved`, `bk.Average`); the model's
        first observable by default
    """

    #: Whether the statistic is of all regions of a network together.
    across: ClassVar[bool] = False

    def size(self, sampling: Sampling) -> int:
        """Values a lane in the carry."""
        return 1

    def multiple(self, sampling: Sampling) -> int:
        """The records that each block but the last must be a multiple of."""
        return 1

    def axis(self, ts, sampling: Sampling) -> Any:
        """The result's first axis, from the times of the records; ``None`` for one value a lane."""
        return None

    def sides(self, ts, sampling: Sampling) -> tuple[str, Any] | None:
        """Of a matrix, the name and the values of its axes; ``None`` where they are the regions."""
        return None

    def start(self, like, sampling: Sampling) -> Any:
        """The carry before the first record; ``like`` has a value of each lane, ``(L,)``."""
        raise NotImplementedError

    def add(self, carry, x, first, sampling: Sampling) -> Any:
        """The carry after the records ``x`` ``(n, L)``; ``first`` records came before."""
        raise NotImplementedError

    def finish(self, carry, sampling: Sampling) -> Any:
        """The result, ``(L,)`` or ``(M, L)``; of a statistic `across` networks ``(M, networks * M)``."""
        raise NotImplementedError


def in_parts(add: Callable, carry, x, first, most: int):
    """The carry after the records ``x``, at most ``most`` of them added at once; a gradient reruns each part.

    Parameters
    ----------
    add : ``(carry, x, first) -> carry``
    carry, x, first : as in `Reduction.add`
    """
    if len(x) <= most:
        return add(carry, x, first)
    whole = len(x) // most

    def add_part(carry, part):
        return add(carry, *part), None

    parts = x[: whole * most].reshape(whole, most, *x.shape[1:])
    firsts = first + most * jnp.arange(whole, dtype=jnp.int32)
    carry, _ = lax.scan(jax.checkpoint(add_part, prevent_cse=False), carry, (parts, firsts))
    return add(carry, x[whole * most :], first + whole * most) if len(x) % most else carry


@dataclasses.dataclass(frozen=True)
class Mean(Reduction):
    """The mean of the records, one value a lane."""

    def start(self, like, sampling):
        return jnp.zeros_like(like), jnp.zeros_like(like)

    def add(self, carry, x, first, sampling):
        """Chan, Golub and LeVeque 1983, The American Statistician 37:242: merge two means and sums of squares."""
        mean, squares = carry
        n, k = jnp.asarray(first, x.dtype), x.shape[0]
        block = x.mean(0)
        difference, share = block - mean, k / (n + k)
        return mean + difference * share, squares + ((x - block[None]) ** 2).sum(0) + difference**2 * (n * share)

    def finish(self, carry, sampling):
        return carry[0]


@dataclasses.dataclass(frozen=True)
class Variance(Mean):
    """The variance of the records (their mean squared distance from their mean), one value a lane."""

    def unit(self, unit):
        return unit**2

    def finish(self, carry, sampling):
        return carry[1] / sampling.count


@dataclasses.dataclass(frozen=True)
class Minimum(Reduction):
    """The least of the records, one value a lane."""

    def start(self, like, sampling):
        return jnp.full_like(like, jnp.inf)

    def add(self, carry, x, first, sampling):
        return jnp.minimum(carry, x.min(0))

    def finish(self, carry, sampling):
        return carry


@dataclasses.dataclass(frozen=True)
class Maximum(Reduction):
    """The largest of the records, one value a lane."""

    def start(self, like, sampling):
        return jnp.full_like(like, -jnp.inf)

    def add(self, carry, x, first, sampling):
        return jnp.maximum(carry, x.max(0))

    def finish(self, carry, sampling):
        return carry


@dataclasses.dataclass(frozen=True)
class Average(Reduction):
    """Means over consecutive intervals of length ``tr``, as of a scanner; an incomplete last interval is dropped.

    Other statistics may be of them: ``bk.Correlation(of=bk.Average(tr, of="bold"))``.

    Parameters
    ----------
    tr : a time, a whole multiple of that between records

    Raises
    ------
    ValueError : of another length, or longer than the recording
    """

    tr: Any

    def __post_init__(self):
        object.__setattr__(self, "tr", units.concrete(units.strip(self.tr, u.second, "tr"), "tr"))

    def check(self, sampling):
        super().check(sampling)
        sampling.records_of(self.tr, "tr")

    def per(self, sampling: Sampling) -> int:
        """Records of one mean."""
        return round(self.tr / sampling.interval)

    def size(self, sampling):
        return sampling.count // self.per(sampling)

    def shared(self, sampling):
        part = self._part(sampling)
        return part * self._rows(part, sampling)

    def axis(self, ts, sampling):
        per = self.per(sampling)
        return ts[per - 1 :: per]

    def start(self, like, sampling):
        # A part may begin late in the last mean; all its rows must fit after that.
        rows = -(-sampling.count // self.per(sampling)) + self._rows(self._part(sampling), sampling)
        return jnp.zeros((rows, *like.shape), like.dtype)

    def _part(self, sampling: Sampling) -> int:
        """Records that are summed at once; the matrix from records to means grows as their square."""
        return min(sampling.block, max(FEWEST, math.isqrt(TABLE * self.per(sampling))))

    def _rows(self, n: int, sampling: Sampling) -> int:
        """How many means ``n`` consecutive records can belong to."""
        return -(-n // self.per(sampling)) + 1

    def add(self, carry, x, first, sampling):
        return in_parts(functools.partial(self._add, sampling=sampling), carry, x, first, self._part(sampling))

    def _add(self, carry, x, first, sampling: Sampling):
        per, rows = self.per(sampling), self._rows(len(x), sampling)
        row = first // per
        row_of = (first + jnp.arange(len(x), dtype=jnp.int32)) // per - row
        belongs = row_of[None] == jnp.arange(rows, dtype=jnp.int32)[:, None]
        sums = jnp.dot(belongs.astype(x.dtype) / per, x, precision=lax.Precision.HIGHEST)
        before = lax.dynamic_slice_in_dim(carry, row, rows)
        return lax.dynamic_update_slice_in_dim(carry, before + sums, row, 0)

    def finish(self, carry, sampling):
        return carry[: self.size(sampling)]


@dataclasses.dataclass(frozen=True)
class Spectrum(Reduction):
    """Power spectral density at chosen frequencies: the tapered periodogram of the records less their mean.

    At whole multiples of one over the recorded time it equals `scipy.signal.periodogram` of the stored records; other
    frequencies are possible too.

    Parameters
    ----------
    freqs : ``(F,)`` frequencies, up to half the sampling rate; plain numbers are Hz
    taper : "hann" or "boxcar"

    Raises
    ------
    ValueError : frequencies that are negative, or above half the sampling rate; another taper
    """

    freqs: Any
    taper: str = dataclasses.field(default="hann", kw_only=True)

    def __post_init__(self):
        freqs = self.freqs if isinstance(self.freqs, u.Quantity) else np.asarray(self.freqs, float) * u.Hz
        freqs = np.atleast_1d(np.asarray(units.strip(freqs, u.Hz, "freqs"), float))
        if freqs.ndim != 1 or not len(freqs) or not (np.isfinite(freqs).all() and (freqs >= 0).all()):
            raise ValueError(
                f"'freqs' got {self.freqs}, but takes one or several frequencies (F,), none of them negative"
            )
        if self.taper not in ("hann", "boxcar"):
            raise ValueError(f"'taper' got {self.taper!r}, but takes 'hann' or 'boxcar'")
        # A tuple is hashable, as the key of a compiled run must be.
        object.__setattr__(self, "freqs", tuple(freqs.tolist()))

    def check(self, sampling):
        if sampling.count < 2:
            raise ValueError(f"{type(self).__name__} needs two records or more, and this run has {sampling.count}")
        nyquist = 0.5 / sampling.interval
        if max(self.freqs) > nyquist * (1 + 1e-9):
            raise ValueError(
                f"'freqs' got {max(self.freqs):g} Hz, but takes at most {nyquist:g} Hz, half the rate of the records: "
                "record more often (every=)"
            )

    def unit(self, unit):
        return unit**2 / u.Hz

    def size(self, sampling):
        return 2 * len(self.freqs) + 2

    def shared(self, sampling):
        part, whole = self._part(sampling), sampling.count if sampling.count <= TABLE else 0
        # The phase factors of a part, those with the taper, those where parts begin, and the taper.
        places = sum(map(len, self._places(sampling)))
        return 2 * (len(self.freqs) + 1) * (2 * part + places) + whole

    def axis(self, ts, sampling):
        return np.array(self.freqs) * u.Hz

    def _part(self, sampling: Sampling) -> int:
        """Records that are summed at once, so that the tables of phase factors stay small."""
        return min(sampling.block, max(FEWEST, TABLE // (2 * len(self.freqs))))

    def _places(self, sampling: Sampling) -> list[np.ndarray]:
        """The first record of every part of every block; of many, what each digit of such a number may stand for."""
        count, block, part = sampling.count, sampling.block, self._part(sampling)
        if -(-count // block) * -(-block // part) <= PLACES:
            return [(np.arange(0, count, block)[:, None] + np.arange(0, block, part)).ravel()]
        units = [DIGITS**k for k in range(math.ceil(math.log(count, DIGITS) + 1)) if DIGITS**k < count]
        return [unit * np.arange(min(DIGITS, -(-count // unit))) for unit in units]

    def _phases_at(self, first, sampling: Sampling, dtype) -> tuple[jax.Array, jax.Array]:
        """`_phases` at the record ``first``, at which a part begins, each ``(F + 1,)``."""
        block, part, places = sampling.block, self._part(sampling), self._places(sampling)
        if len(places) == 1:
            row = first // block * -(-block // part) + first % block // part
            cos, sin = (table[row] for table in self._phases(places[0], sampling, dtype))
            return cos, sin
        cos, sin = jnp.ones((), dtype), jnp.zeros((), dtype)
        for k, place in enumerate(places):
            c, s = (table[first // DIGITS**k % DIGITS] for table in self._phases(place, sampling, dtype))
            cos, sin = cos * c - sin * s, sin * c + cos * s
        return cos, sin

    def _phases(self, k, sampling: Sampling, dtype) -> tuple[jax.Array, jax.Array]:
        """Cosines and sines of ``2 pi f t`` at records ``k``, and of the taper's half period, ``(len(k), F + 1)``.

        Phases are computed in float64 when the run is built, whatever the precision of the run.
        """
        cycles = np.array([*self.freqs, 0.5 / (sampling.count * sampling.interval)]) * sampling.interval
        phase = 2 * np.pi * np.mod(np.outer(k, cycles), 1.0)
        return jnp.asarray(np.cos(phase), dtype), jnp.asarray(np.sin(phase), dtype)

    def start(self, like, sampling):
        sums = jnp.zeros((2, len(self.freqs), *like.shape), like.dtype)
        return sums, jnp.zeros_like(like), jnp.zeros_like(like)

    def add(self, carry, x, first, sampling):
        return in_parts(functools.partial(self._add, sampling=sampling), carry, x, first, self._part(sampling))

    def _add(self, carry, x, first, sampling: Sampling):
        sums, mean, origin = carry
        # Any constant may be subtracted, as `finish` subtracts the mean; a near one keeps the rounding small.
        origin = lax.stop_gradient(jnp.where(first == 0, x[0], origin))
        x = x - origin[None]
        cos, sin = self._phases(np.arange(len(x)), sampling, x.dtype)
        cos0, sin0 = self._phases_at(first, sampling, x.dtype)
        factors = jnp.stack([cos[:, :-1], -sin[:, :-1]])
        if self.taper == "hann" and sampling.count <= TABLE:
            whole = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(sampling.count) / sampling.count)
            taper = lax.dynamic_slice_in_dim(jnp.asarray(whole, x.dtype), first, len(x))
            factors = factors * taper[None, :, None]
        elif self.taper == "hann":
            # Hann's window as a squared sine, which loses no digits where the window is small.
            factors = factors * ((sin0[-1] * cos[:, -1] + cos0[-1] * sin[:, -1]) ** 2)[None, :, None]
        real, imag = jnp.einsum("ckf,kl->cfl", factors, x, precision=lax.Precision.HIGHEST)
        cos0, sin0 = cos0[:-1, None], sin0[:-1, None]
        sums = sums + jnp.stack([cos0 * real + sin0 * imag, cos0 * imag - sin0 * real])
        return sums, mean + x.sum(0) / sampling.count, origin

    def _sums_of_ones(self, sampling: Sampling) -> np.ndarray:
        """The sums for records that are all 1, ``(2, F)``."""
        cycles, count = np.array(self.freqs) * sampling.interval, sampling.count
        total = _geometric(cycles, count)
        if self.taper == "hann":
            sides = _geometric(cycles - 1 / count, count) + _geometric(cycles + 1 / count, count)
            total = 0.5 * total - 0.25 * sides
        return np.stack([np.real(total), np.imag(total)])

    def finish(self, carry, sampling):
        sums, mean, _ = carry
        of_ones = jnp.asarray(self._sums_of_ones(sampling), mean.dtype)
        real, imag = sums - of_ones[..., None] * mean[None, None]
        nyquist = 0.5 / sampling.interval
        sides = [1.0 if f == 0 or math.isclose(f, nyquist) else 2.0 for f in self.freqs]
        # The sum of the squared weights; two weights of Hann's are 0 and 1.
        squares = sampling.count if self.taper == "boxcar" else 0.375 * sampling.count if sampling.count > 2 else 1.0
        scale = np.array(sides) * sampling.interval / squares
        return jnp.asarray(scale, mean.dtype)[:, None] * (real**2 + imag**2)


def _geometric(cycles: np.ndarray, count: int) -> np.ndarray:
    """The sum of ``exp(-2 pi i cycles k)`` over ``k < count``."""
    cycles = cycles - np.round(cycles)
    half_turns = lambda x: np.pi * (x - 2 * np.round(x / 2))  # noqa: E731
    below = np.sin(np.pi * cycles)
    ratio = np.sin(half_turns(cycles * count)) / np.where(below == 0, 1.0, below)
    return np.exp(-1j * half_turns(cycles * (count - 1))) * np.where(below == 0, count, ratio)


@dataclasses.dataclass(frozen=True)
class PeakFrequency(Spectrum):
    """The frequency with the greatest power among ``freqs``, one value a lane.

    A parabola through the logarithms of the power there and on both sides refines it, which makes it differentiable;
    the first and the last of ``freqs`` are not refined. NaN for a mass at rest, whose records differ by rounding
    alone (`rounding.at_rest`).

    Raises
    ------
    ValueError : fewer than three frequencies, or frequencies that do not increase
    """

    @property
    def suffix(self) -> str:
        return "peak_frequency"

    def check(self, sampling):
        super().check(sampling)
        if len(self.freqs) < 3 or (np.diff(self.freqs) <= 0).any():
            raise ValueError(f"'freqs' got {len(self.freqs)} frequencies, but takes three or more that increase")

    def unit(self, unit):
        return u.Hz

    def size(self, sampling):
        return super().size(sampling) + 2

    def axis(self, ts, sampling):
        return None

    def start(self, like, sampling):
        return super().start(like, sampling), Mean().start(like, sampling)

    def add(self, carry, x, first, sampling):
        sums, moments = carry
        sums = super().add(sums, x, first, sampling)
        moved = lax.stop_gradient(x - sums[-1][None])
        return sums, Mean().add(moments, moved, first, sampling)

    def finish(self, carry, sampling):
        sums, (mean, squares) = carry
        power = super().finish(sums, sampling)
        peaked = jnp.isfinite(power).all(0) & ~rounding.within(squares / sampling.count, sums[-1] + mean)
        freqs = jnp.asarray(self.freqs, power.dtype)
        top = jnp.argmax(power, axis=0)
        middle = jnp.clip(top, 1, len(freqs) - 2)
        x0, x1, x2 = (freqs[middle + j] for j in (-1, 0, 1))
        tiny = jnp.finfo(power.dtype).tiny
        heights = jnp.log(jnp.maximum(power, tiny))
        y0, y1, y2 = (jnp.take_along_axis(heights, middle[None] + j, 0)[0] for j in (-1, 0, 1))
        left, right = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
        bend = (right - left) / (x2 - x0)
        inside = (top == middle) & (bend < 0)
        vertex = 0.5 * (x0 + x1) - left / (2 * jnp.where(inside, bend, -1.0))
        return jnp.where(peaked, jnp.where(inside, vertex, freqs[top]), jnp.nan)


@dataclasses.dataclass(frozen=True)
class Crossings(Reduction):
    """How often a second the records rise through a level, one value a lane; not differentiable.

    Parameters
    ----------
    level : in the quantity's unit, one for all lanes

    Raises
    ------
    ValueError : a level in another unit, fewer than two records
    TypeError : when a gradient is taken through it
    """

    level: Any

    @property
    def suffix(self) -> str:
        return "crossing_rate"

    def __post_init__(self):
        unit = units.unit_of(self.level)
        level = units.concrete(units.strip(self.level, unit, "level"), "level")
        object.__setattr__(self, "level", (level, unit))

    def check(self, sampling):
        if sampling.count < 2:
            raise ValueError(f"Crossings needs two records or more, and this run has {sampling.count}")

    def bound(self, of, unit):
        bound = super().bound(of, unit)
        level = units.strip(units.attach(*self.level), unit, "level")
        object.__setattr__(bound, "level", (float(level), unit))
        return bound

    def unit(self, unit):
        return u.Hz

    def start(self, like, sampling):
        return jnp.full_like(like, jnp.inf), jnp.zeros_like(like)

    def add(self, carry, x, first, sampling):
        last, count = carry
        before = jnp.concatenate([last[None], x[:-1]])
        level = self.level[0]
        rises = ((before < level) & (x >= level)).sum(0).astype(x.dtype)
        # A comparison with NaN is false: a diverged lane would have no crossings.
        return x[-1], count + jnp.where(jnp.isfinite(x).all(0), rises, jnp.nan)

    def finish(self, carry, sampling):
        last, count = carry
        return _without_derivative(count / ((sampling.count - 1) * sampling.interval), last)


@jax.custom_vjp
def _without_derivative(value, follows):
    """``value``; a gradient through it, by anything that ``follows`` depends on, raises."""
    return value


def _forward(value, follows):
    return value.value, (value.value, follows.value)


def _backward(residuals, cotangent):
    if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        return tuple(map(jnp.zeros_like, residuals))
    raise TypeError(
        "a gradient was asked for through bk.Crossings, which counts and has no derivative: "
        "bk.PeakFrequency and bk.Spectrum have one"
    )


_without_derivative.defvjp(_forward, _backward, symbolic_zeros=True)
