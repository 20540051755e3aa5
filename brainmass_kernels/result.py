"""The result of a run: its records, statistics and final state, and what is made of them."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np

from . import display, frames, result_files, signals, spectra, units
from ._jax import is_traced
from .models.base import check_name
from .notices import warn
from .recording import Reduction, Sampling

#: Seconds of a segment of `Result.psd`, whose inverse is the resolution.
SEGMENT = 2.0
#: The least records of such a segment, as for a scanner's slow ones.
FEWEST = 32


class UnknownRecord(ValueError, KeyError):
    """A name that a result lacks: a KeyError, as mappings raise, that prints its message as it is."""

    __str__ = Exception.__str__


@dataclasses.dataclass(frozen=True)
class Times:
    """When the records of a run were taken, as steps and the time of a step, so that no time is rounded to float32.

    Attributes
    ----------
    lead : steps of the transient
    every : steps from one record to the next
    count : number of records
    dt : the time of a step
    unit : its unit
    """

    lead: int
    every: int
    count: int
    dt: float
    unit: Any

    @property
    def values(self):
        """``(K,)``, a Quantity of NumPy's float64."""
        return u.Quantity((self.lead + self.every * np.arange(1, self.count + 1)) * self.dt, unit=self.unit)

    @property
    def interval(self):
        """The time from one record to the next."""
        return u.Quantity(self.every * self.dt, unit=self.unit)


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Result(Mapping[str, Any]):
    """The result of a run: a mapping from the names of its records to their values, such as ``result["eeg"]``.

    Attributes
    ----------
    times : when the records were taken, as steps and the time of a step; `ts` has their values
    records : each recorded quantity, ``(K, *batch)``, and each statistic, ``(*batch)`` or ``(M, *batch)``; of sensors
        and of pairs of regions, with these in place of the regions: ``(K, *networks, S)``, ``(*networks, N, N)``
    final : the state after the last step, each ``(*batch)``; ``initial=result.final`` continues the run. For a network
        with delays it includes the ``history``, ``(H, *batch)``
    statistics : for each record that is a statistic or a signal, that and the records it is made of
    lanes : the names of the axes of the batch, for tables: "lane", or "lane_0" and so on, and "region" for the last of
        a network
    recordable : the names of all that the run could have recorded
    """

    times: Times
    records: dict[str, Any]
    final: dict[str, Any]
    statistics: Mapping[str, tuple[Reduction, Sampling]] = dataclasses.field(default_factory=dict)
    lanes: tuple[str, ...] | None = None
    recordable: tuple[str, ...] = ()

    @property
    def ts(self):
        """``(K,)``, the time at the end of each recorded step; NumPy's float64, under ``jit`` and ``vmap`` too."""
        return self.times.values

    @property
    def axes(self) -> dict[str, Any]:
        """The first axis of each record: `ts`, the frequencies of a spectrum, the times of averages."""
        ts = self.ts
        axes = {n: signals.axis_of(self.statistics[n][0], ts, self.statistics[n][1]) if n in self.statistics else ts
                 for n in self.records}  # fmt: skip
        return {n: axis for n, axis in axes.items() if axis is not None}

    def __getitem__(self, name: str):
        if name not in self.records and name in self.recordable:
            both = ", ".join(repr(n) for n in (*(n for n in self.records if n in self.recordable), name))
            raise UnknownRecord(
                f"'{name}' was not recorded, only {', '.join(self.records) or 'nothing'}: simulate takes "
                f"record={name!r}, or record=[{both}]"
            )
        check_name(name, self.records, "record", UnknownRecord)
        self._warn_once()
        return self.records[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.records)

    def __contains__(self, name: object) -> bool:
        return name in self.records

    def __len__(self) -> int:
        return len(self.records)

    def __bool__(self) -> bool:
        return True

    def of(self, group: str) -> Result:
        """What is of one group of a network's regions, by the names of its model: ``result.of("cortex")["eeg"]``.

        A table or a picture is of one group. Records that `simulate` was told other names for are left out.

        Raises
        ------
        ValueError : an unknown group, or a result without groups
        """
        if not (known := frames.groups(self)):
            raise ValueError(f"'group' got {group!r}, but this result has no groups: it is of one model")
        check_name(group, known, "group")

        def own(values: Mapping[str, Any]) -> dict[str, Any]:
            return {n.removeprefix(f"{group}."): x for n, x in values.items() if n.startswith(f"{group}.")}

        recordable = tuple(own(dict.fromkeys(self.recordable)))
        return Result(self.times, own(self.records), own(self.final), own(self.statistics), self.lanes, recordable)

    @property
    def ok(self):
        """Whether the run of each lane stayed finite, ``(*batch)``; computed from the final state on access.

        The regions of a network of groups are in the order of the groups.
        """
        self._warn_once()
        return self._finite()

    def _finite(self):
        return _all_finite({n: jnp.isfinite(u.get_magnitude(x)) for n, x in self.final.items() if n != "history"}, jnp)

    def _warn_once(self) -> None:
        """Warn of lanes that did not stay finite, once the numbers are available."""
        final = {name: u.get_magnitude(x) for name, x in self.final.items() if name != "history"}
        if "_checked" in vars(self) or not all(map(_is_available, final.values())):
            return
        object.__setattr__(self, "_checked", True)
        lost = ~_all_finite({name: np.isfinite(x) for name, x in jax.device_get(final).items()}, np)
        if lost.any():
            which = "this run" if lost.size == 1 else f"{np.sum(lost):,} of the {lost.size:,} lanes of this run"
            warn(
                f"{which} did not stay finite{'' if lost.size == 1 else ' (result.ok says which)'}: take a shorter dt, "
                f"another scheme, or parameters, inputs and a start within the model's range"
            )

    def __repr__(self) -> str:
        self._warn_once()
        shapes = ", ".join(f"{n} {tuple(x.shape)}" for n, x in self.records.items())
        return f"Result({shapes or 'no records'}; {len(self.final)} final states)"

    def _repr_html_(self) -> str:
        self._warn_once()
        axes, rows = self.axes, []
        for name, x in self.records.items():
            first = f"{display.numbers(axes[name])} {display.unit(axes[name])}" if name in axes else ""
            ready = _is_available(u.get_magnitude(x))
            rows.append((name, display.numbers(x) if ready else "", display.unit(x), str(tuple(x.shape)), first))
        title = f"Result: {self.times.count:,} records, {len(self.final)} final states"
        return display.table(title, ("record", "values", "unit", "shape", "first axis"), rows)

    # --- what is made of it ---

    def _trajectory(self, name: str | None = None) -> str:
        """The name of a record over time; of ``None``, the first. Raises ValueError if there is none."""
        over_time = [n for n in self.records if frames.is_over_time(self, n)]
        if name is None and over_time:
            return over_time[0]
        if name is not None and (name not in self.records or name in over_time):
            self[name]  # an unknown one raises
            return name
        got = "no record over time" if name is None else f"{name!r}, which is a statistic"
        raise ValueError(
            f"'name' got {got}, but takes a record over time ({', '.join(over_time) or 'there is none'}): name the "
            "quantity in record="
        )

    def psd(self, name: str | None = None, segment=None):
        """The power spectral density of a record by Welch's method (`spectra.welch`): Hann window, half overlap.

        Parameters
        ----------
        name : of a record over time; ``None``, the first
        segment : a time, whose inverse is the resolution; ``None``, 2 s or 32 records, or all of a shorter run

        Returns
        -------
        freqs : Quantity ``(F,)``, in Hz, from 0 to half the rate of the records
        power : ``(F, *batch)``, the record's unit squared per Hz; differentiable

        Raises
        ------
        ValueError : a statistic, fewer than four records, or a segment that is longer than the recording
        """
        name = self._trajectory(name)
        interval = float(self.times.interval.to_decimal(u.second))
        count = self.times.count
        if count < 4:
            raise ValueError(
                f"'{name}' got {count} records, but psd takes 4 or more: run longer, or with a smaller every"
            )
        if segment is None:
            samples = min(max(round(SEGMENT / interval), FEWEST), count)
        else:
            samples = round(units.positive_time(segment, u.second, "segment") / interval)
        if not 4 <= samples <= count:
            raise ValueError(
                f"'segment' got {segment}, but takes {4 * interval:g} s to {count * interval:g} s, from four records "
                "to all of them"
            )
        at = frames.time_axis(self)
        x, unit = jnp.asarray(u.get_mantissa(self[name])), units.unit_of(self[name])
        power: Any
        freqs, power = spectra.welch(jnp.moveaxis(x, at, 0), interval, samples)
        return u.Quantity(freqs, unit=u.Hz), u.Quantity(jnp.moveaxis(power, 0, at), unit=unit**2 / u.Hz)

    def to_xarray(self, lanes: Sequence[str] | Mapping[str, Any] | None = None):
        """The records as an ``xarray.Dataset``; units are attributes of its variables and coordinates.

        The dimensions are ``time``, ``frequency`` for spectra, and the axes of the batch: ``lane`` (``lane_0``,
        ``lane_1``, ... of several), and ``region`` for the last of a network. Readouts have ``sensor`` in its place,
        with their names. Matrices have ``region`` and ``region_2``, ``sensor`` and ``sensor_2``, or ``window`` and
        ``window_2``, with the last time of each window.

        Parameters
        ----------
        lanes : other names of the axes of the batch, or name to coordinates: ``{"C": values}`` or
            ``{"region": connectome.labels}``

        Raises
        ------
        ValueError : another number of names or of coordinates than the batch has
        ImportError : without ``pip install 'brainmass-kernels[sweep]'``
        """
        return frames.dataset(self, lanes)

    def to_dataframe(self, names: str | Sequence[str] | None = None, *, long: bool = False, lanes=None):
        """Records as a ``pandas.DataFrame``: times as the index, a column for each record and lane, units in its name.

        Parameters
        ----------
        names : of the records, which share their first axis; ``None``, all. Of spectra the index is the frequency; of
            statistics with one value a lane it is the lanes, one column each
        long : a row for each time and lane instead, with a column for the time and for each axis of the batch
        lanes : as `to_xarray` takes them

        Raises
        ------
        ValueError : an unknown name, records of several first axes
        ImportError : without ``pip install 'brainmass-kernels[sweep]'``
        """
        return frames.dataframe(self, names, long, lanes)

    def plot(self, path: str | os.PathLike | None = None, *, kind: str | None = None):
        """Traces, their spectrum, and the state space of the first two records, as a matplotlib ``Figure``.

        Statistics are drawn over their own axis, or over the lanes. Eight lanes are drawn if there are more.

        Parameters
        ----------
        path : a file to write as well
        kind : "traces", "spectrum" or "states", to draw that alone

        Raises
        ------
        ValueError : another kind, or nothing of that kind was recorded
        ImportError : without matplotlib
        """
        from . import plots

        return plots.shown(plots.result_figure(self, kind), path)

    # --- files ---

    def save(self, path: str | os.PathLike) -> None:
        """Write the result with its units as one ``.npz``: whole or not at all, with a checksum.

        Raises
        ------
        ValueError : another ending, or a unit that cannot be read back
        """
        result_files.write(path, self)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Result:
        """Read what `save` wrote, bit for bit, as arrays of NumPy.

        Raises
        ------
        FileNotFoundError, ValueError : there is no such file, or it is not a saved result, or damaged
        """
        fields = result_files.read(path)
        return cls(**{**fields, "times": Times(**fields["times"])})

    # --- pytree ---

    def tree_flatten(self):
        static = (self.times, tuple(self.statistics.items()), self.lanes, self.recordable)
        return (self.records, self.final), static

    @classmethod
    def tree_unflatten(cls, static, children):
        (times, statistics, lanes, recordable), (records, final) = static, children
        return cls(times, records, final, dict(statistics), lanes, recordable)


def _all_finite(finite: dict[str, Any], xp) -> Any:
    """Whether all states of a lane are; states of groups have the regions of their group."""
    groups: dict[str, list] = {}
    for name, x in finite.items():
        groups.setdefault(name.rpartition(".")[0], []).append(x)
    every = [functools.reduce(xp.logical_and, states) for states in groups.values()]
    return every[0] if len(every) == 1 else xp.concatenate(every, axis=-1) if every else np.True_


def _is_available(x) -> bool:
    """Whether an array can be read without waiting for it."""
    if isinstance(x, jax.Array) and not is_traced(x):
        return not x.is_deleted() and x.is_fully_addressable and x.is_ready()  # pyright: ignore[reportAttributeAccessIssue]
    return isinstance(x, np.ndarray)
