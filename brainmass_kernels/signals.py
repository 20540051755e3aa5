"""Signals made of records as they come: regions of a group, sensors, means, convolutions; and statistics of these.

A statistic is of an observable or state, or of a signal, which may be of a signal itself. `Chain` runs the signals of
one entry of ``record=`` and its statistic, block by block, so no signal is stored that was not asked for.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import recording
from .hrf import HRF
from .models.base import check_name
from .recording import Average, Observation, Reduction, Sampling


@dataclasses.dataclass(frozen=True)
class Signal(Observation):
    """A quantity over time that is made of the records of another, block by block.

    Parameters
    ----------
    of : the observable or state, or another signal; the model's first observable by default
    """

    #: Whether each value is made of records before its own too.
    remembers: ClassVar[bool] = False
    #: Whether its lanes are others than those of the records.
    regional: ClassVar[bool] = False

    def per(self, sampling: Sampling) -> int:
        """Records of one value."""
        return 1

    def width(self, sampling: Sampling) -> int:
        """The channels of its values."""
        return sampling.channels

    def channels(self) -> tuple[str, Any] | None:
        """The name and the values of the axis of its channels; ``None`` where they are those of the records."""
        return None

    def after(self, sampling: Sampling) -> Sampling:
        """When the signal's values are."""
        per = self.per(sampling)
        count, interval, block, _ = sampling
        return Sampling(count // per, interval * per, max(1, block // per), self.width(sampling))

    def size(self, sampling: Sampling) -> int:
        """Values a lane in the carry."""
        return 0

    def start(self, like, sampling: Sampling) -> Any:
        """The carry before the first record; ``like`` has a value of each lane, ``(L,)``."""
        return ()

    def next(self, carry, x, first, sampling: Sampling, data) -> tuple[Any, Any]:
        """The carry after the records ``x`` ``(n, L)``, of which ``first`` came before, and the values in them.

        ``data`` are the arrays of all signals of the run.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Group(Signal):
    """The regions of one group of a network.

    Parameters
    ----------
    lanes : their numbers
    """

    lanes: tuple[int, ...] = ()
    regional = True

    def width(self, sampling):
        return len(self.lanes)

    def next(self, carry, x, first, sampling, data):
        each = x.reshape(len(x), -1, sampling.channels)[..., np.array(self.lanes)]
        return carry, each.reshape(len(x), -1)


@dataclasses.dataclass(frozen=True)
class Means(Signal):
    """Means over consecutive times ``tr``, in seconds: `bk.Average` as what a statistic is of."""

    tr: float = 0.0
    remembers = True

    @property
    def suffix(self) -> str:
        return "average"

    def check(self, sampling):
        super().check(sampling)
        sampling.records_of(self.tr, "tr")

    def per(self, sampling):
        return sampling.records_of(self.tr, "tr")

    def next(self, carry, x, first, sampling, data):
        per = self.per(sampling)
        each = x[: len(x) // per * per].reshape(-1, per, x.shape[-1])
        # The mean of equal numbers has a rounding error, that of their differences has none.
        origin = each[:, 0]
        return carry, origin + (each - origin[:, None]).mean(1)


@dataclasses.dataclass(frozen=True)
class Convolved(Signal):
    """The records convolved with a kernel, as blood oxygenation follows activity: ``sum_j h(j Dt) x(t - j Dt) Dt``.

    It equals ``numpy.convolve(x, taps)[:K]`` of the stored records, ``(K, *batch)``, or with ``tr`` every so many of
    its values, the last of each ``tr``. Statistics may be of it: ``bk.Correlation(of=bk.Convolved(bk.HRF.canonical(),
    tr=2 * u.second))`` is the functional connectivity of fMRI, and stores no trajectory. A gradient is through the
    records; for one in the kernel's constants see `with_bold`.

    Parameters
    ----------
    kernel : an `HRF`, or the weights of the records, the newest first, ``(M,)``
    tr : the time from one value to the next, a whole multiple of that between records; ``None``, each record has one
    before : what the records before the first one are taken for: "zero", or "first", for as the first one

    Raises
    ------
    ValueError : a kernel that is shorter than the time between records; weights that are none; another ``tr``
    TypeError : something else for a kernel
    """

    kernel: Any
    tr: Any = dataclasses.field(default=None, kw_only=True)
    before: str = dataclasses.field(default="zero", kw_only=True)
    remembers = True

    def __post_init__(self):
        if not isinstance(self.kernel, HRF):
            object.__setattr__(self, "kernel", _weights(self.kernel))
        if self.before not in ("zero", "first"):
            raise ValueError(f"'before' got {self.before!r}, but takes 'zero' or 'first'")
        object.__setattr__(self, "tr", None if self.tr is None else Average(self.tr).tr)

    def check(self, sampling):
        super().check(sampling)
        self.per(sampling)
        self.taps(sampling)

    def per(self, sampling):
        return 1 if self.tr is None else sampling.records_of(self.tr, "tr")

    def taps(self, sampling: Sampling) -> np.ndarray:
        """The weights of the records, the newest first, ``(M,)``."""
        return self.kernel.taps(sampling.interval) if isinstance(self.kernel, HRF) else np.array(self.kernel)

    def _open(self, sampling: Sampling) -> int:
        """Values that records of the past go on contributing to."""
        return (len(self.taps(sampling)) - 1) // self.per(sampling)

    def _part(self, sampling: Sampling) -> int:
        """Records that are added at once, a whole number of values, so that the table of weights stays small."""
        per, ahead = self.per(sampling), self._open(sampling)
        most = recording.TABLE // per
        values = (math.isqrt(ahead**2 + 4 * most) - ahead) // 2
        return per * max(1, min(values, sampling.block // per))

    def size(self, sampling):
        return self._open(sampling) + 1

    def shared(self, sampling):
        part = self._part(sampling)
        return part * (part // self.per(sampling) + self._open(sampling))

    def start(self, like, sampling):
        return jnp.zeros((self._open(sampling), *like.shape), like.dtype), jnp.zeros_like(like)

    def _table(self, count: int, sampling: Sampling) -> np.ndarray:
        """From ``count`` records to the values in them and to those that are still open."""
        per, taps = self.per(sampling), self.taps(sampling)
        ends = per * np.arange(count // per + self._open(sampling)) + per - 1
        back = ends[:, None] - np.arange(count)
        return np.where((back >= 0) & (back < len(taps)), taps[np.clip(back, 0, len(taps) - 1)], 0.0)

    def next(self, carry, x, first, sampling, data):
        pending, origin = carry
        first_record = jnp.where(first == 0, x[0], origin)
        # What is subtracted is added again in `_of_origin`: a near one keeps the rounding of sums small.
        origin = lax.stop_gradient(first_record) if self.before == "zero" else first_record
        per, part = self.per(sampling), self._part(sampling)

        def add(pending, x):
            table = jnp.asarray(self._table(len(x), sampling), x.dtype)
            new = jnp.einsum("jk,kl->jl", table, x, precision=lax.Precision.HIGHEST)
            at = len(x) // per
            total = new.at[: len(pending)].add(pending)
            return total[at:], total[:at]

        pending, values = _in_parts(add, pending, x - origin[None], part)
        return (pending, origin), values + self._of_origin(origin, first // per, len(values), sampling)

    def _of_origin(self, origin, number, count: int, sampling: Sampling):
        """What a signal that is the origin throughout gives, from the value of this number on, ``(count, L)``."""
        per, total = self.per(sampling), np.cumsum(self.taps(sampling))
        last = len(total) - 1
        if self.before == "first":
            return jnp.broadcast_to(jnp.asarray(total[last], origin.dtype) * origin, (count, *origin.shape))
        ends = np.minimum(per * np.arange(self._open(sampling) + 2) + per - 1, last)
        row = jnp.minimum(number + jnp.arange(count, dtype=jnp.int32), len(ends) - 1)
        return jnp.asarray(total[ends], origin.dtype)[row][:, None] * origin[None]


def _weights(kernel) -> tuple[float, ...]:
    try:
        weights = np.asarray(kernel, float)
    except (TypeError, ValueError):
        weights = None
    if weights is None or not weights.ndim or hasattr(kernel, "unit"):
        raise TypeError(f"'kernel' got {type(kernel).__name__}, but takes a bk.HRF, or weights of the records (M,)")
    if weights.ndim != 1 or not len(weights) or not np.isfinite(weights).all():
        raise ValueError(f"'kernel' got weights of shape {weights.shape}, but takes (M,) finite ones, the newest first")
    return tuple(weights.tolist())


def _in_parts(add: Callable, carry, x, most: int):
    """``add(carry, x) -> carry, values`` of at most ``most`` records at once; a gradient reruns each part."""
    if len(x) <= most:
        return add(carry, x)
    whole = len(x) // most
    parts = x[: whole * most].reshape(whole, most, *x.shape[1:])
    carry, values = lax.scan(jax.checkpoint(add, prevent_cse=False), carry, parts)
    values = values.reshape(-1, *values.shape[2:])
    if len(x) % most:
        carry, rest = add(carry, x[whole * most :])
        values = jnp.concatenate([values, rest])
    return carry, values


# Of what an entry of `record=` is -----------------------------------------------------------------------------------


def bind(what: Reduction | Signal, known: Mapping[str, Any], group_of: Callable, arrays: list) -> Reduction | Signal:
    """An entry with the quantities that it is of, found by name.

    Parameters
    ----------
    what : as the user made it
    known : the unit of each quantity
    group_of : of a quantity's name, the regions that it is of, or ``None`` for all
    arrays : of the signals, to which theirs are appended
    """
    return _bind(what, known, group_of if _is_regional(what) else lambda name: None, arrays)[0]


def _bind(what, known, group_of, arrays):
    of = what.of
    if isinstance(of, Average):
        of = Means(of=of.of, tr=of.tr)
    if isinstance(of, Signal):
        of, unit = _bind(of, known, group_of, arrays)
    elif isinstance(of, str):
        of = of or next(iter(known))
        check_name(of, known, "record")
        unit, lanes = known[of], group_of(of)
        of = of if lanes is None else Group(of=of, lanes=tuple(map(int, lanes)))
    else:
        raise TypeError(
            f"'of' of {type(what).__name__} got {type(of).__name__}, but takes a name, or a signal: bk.Readout(...), "
            "bk.Convolved(...) or bk.Average(...)"
        )
    bound = what.bound(of, unit)
    if isinstance(array := getattr(bound, "matrix", None), (np.ndarray, jax.Array)):
        # Arrays are data, and an entry is part of the key of a compiled run.
        place = next((n for n, other in enumerate(arrays) if other is array), len(arrays))
        arrays += [array] if place == len(arrays) else []
        object.__setattr__(bound, "matrix", place)
    return bound, bound.unit(unit)


def _is_regional(what) -> bool:
    """Whether an entry is of the regions of its group alone from the start, and not one value for each lane."""
    return isinstance(what, Signal) or what.across or not isinstance(what.of, str)


def root(what) -> str:
    """The observable or state that an entry is made of."""
    return what if isinstance(what, str) else root(what.of)


def name_of(what) -> str:
    """The name of an entry's result by default."""
    if isinstance(what, str):
        return what
    return name_of(what.of) if isinstance(what, Group) else f"{name_of(what.of)}_{what.suffix}"


def unit_of(what, known: Mapping[str, Any]) -> Any:
    """The unit of an entry, from those of observables and states."""
    return known[what] if isinstance(what, str) else what.unit(unit_of(what.of, known))


def is_over_time(what) -> bool:
    """Whether an entry has a value for each record, as a trajectory has."""
    return isinstance(what, str) or (isinstance(what, Signal) and not what.remembers and is_over_time(what.of))


def chain_of(what: Reduction | Signal, sampling: Sampling) -> Chain:
    """What computes a bound entry from the records of a run."""
    signals, last = [], what if isinstance(what, Reduction) else None
    node = what.of if isinstance(what, Reduction) else what
    while not isinstance(node, str):
        signals.insert(0, node)
        node = node.of
    samplings = [sampling]
    for signal in signals:
        samplings.append(signal.after(samplings[-1]))
    return Chain(tuple(signals), last, tuple(samplings))


def check(what: Reduction | Signal, sampling: Sampling) -> int:
    """The records that blocks must be a multiple of for an entry; raises ValueError if a run cannot give it."""
    if isinstance(what.of, str):
        per = 1
    else:
        per = check(what.of, sampling)
        sampling = chain_of(what.of, sampling).sampling
    what.check(sampling)
    return per * (what.per(sampling) if isinstance(what, Signal) else what.multiple(sampling))


def axis_of(what: Reduction | Signal, ts, sampling: Sampling) -> Any:
    """The first axis of an entry's result, from the times of the records; ``None`` without one."""
    chain = chain_of(what, sampling)
    for signal, before in zip(chain.signals, chain.samplings):
        per = signal.per(before)
        ts = ts[per - 1 :: per] if per > 1 else ts
    return ts if chain.last is None else chain.last.axis(ts, chain.sampling)


def axes_of_channels(what: Reduction | Signal, ts, sampling: Sampling, region: tuple[str, Any]) -> list | None:
    """The names and values of the axes that an entry has in place of the regions; ``None`` where it has these.

    ``region`` has the name and the values of the regions.
    """
    chain, axis = chain_of(what, sampling), region
    for signal in chain.signals:
        axis = signal.channels() or axis
    if chain.last is None or not chain.last.across:
        return None if axis is region else [axis]
    axis = (
        chain.last.sides(axis_of(what.of, ts, sampling) if isinstance(what.of, Signal) else ts, chain.sampling) or axis
    )
    return [axis, (f"{axis[0]}_2", axis[1])]


class Chain(NamedTuple):
    """The signals that an entry is made of, one after the other, and its statistic.

    Attributes
    ----------
    signals : from the records on
    last : the statistic, or ``None`` where the last signal is recorded itself
    samplings : of the records, and after each signal
    """

    signals: tuple[Signal, ...]
    last: Reduction | None
    samplings: tuple[Sampling, ...]

    @property
    def sampling(self) -> Sampling:
        """Of what the statistic is of."""
        return self.samplings[-1]

    @property
    def regional(self) -> bool:
        """Whether the lanes of a result are not those of the run, one by one."""
        return (self.last is not None and self.last.across) or any(signal.regional for signal in self.signals)

    def values(self, lanes: int) -> int:
        """Values in carries, tables and results, of so many lanes of the run."""
        total = 0
        for signal, sampling in zip(self.signals, self.samplings):
            total += signal.size(sampling) * self._width(lanes, sampling) + signal.shared(sampling)
        width = self._width(lanes, self.sampling)
        # The values of a block, of the signal that the statistic is of.
        total += min(self.sampling.block, self.sampling.count) * width if self.signals else 0
        if self.last is None:
            return total + self.sampling.count * width
        return total + self.last.size(self.sampling) * width + self.last.shared(self.sampling)

    def _width(self, lanes: int, sampling: Sampling) -> int:
        return lanes // max(1, self.samplings[0].channels) * max(1, sampling.channels)

    def start(self, like) -> tuple:
        """The carries before the first record; ``like`` has a value of each lane, ``(L,)``."""
        carries, lanes = [], like.shape[0]
        for signal, sampling in zip(self.signals, self.samplings):
            carries.append(signal.start(self._like(like, lanes, sampling), sampling))
        if self.last is not None:
            carries.append(self.last.start(self._like(like, lanes, self.sampling), self.sampling))
        return tuple(carries)

    def _like(self, like, lanes: int, sampling: Sampling):
        width = self._width(lanes, sampling)
        return like if width == lanes else jnp.zeros_like(like, shape=(width,))

    def add(self, carries, x, first, arrays) -> tuple[tuple, Any]:
        """The carries after the records ``x``, of which ``first`` came before; and the last signal's values in them."""
        carries, done = list(carries), []
        for signal, sampling in zip(self.signals, self.samplings):
            carry, x = signal.next(carries.pop(0), x, first, sampling, arrays)
            done.append(carry)
            first = first // signal.per(sampling) if signal.per(sampling) > 1 else first
            if not len(x):  # too few records for a value
                return (*done, *carries), self._none(x, sampling)
        if self.last is None:
            return tuple(done), x
        return (*done, self.last.add(carries[0], x, first, self.sampling)), ()

    def _none(self, x, sampling: Sampling):
        """No values of the last signal, which may have another width than that before it."""
        width = x.shape[1] // max(1, sampling.channels) * max(1, self.sampling.channels)
        return jnp.zeros((0, width), x.dtype)

    def finish(self, carries) -> Any:
        """The statistic, from the carries after the last record."""
        assert self.last is not None
        return self.last.finish(carries[-1], self.sampling)
