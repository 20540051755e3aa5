"""Sensors: what EEG, MEG or electrodes within the brain show of a network's regions, by a lead field.

A `Readout` is data, its matrix a part of the arrays of a run; `Sensors` is what is left of it in the key of a compiled
run. It is applied to each block of records outside of the kernel, so no signal of all regions is stored for it.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import leadfields, units
from ._jax import is_traced
from .leadfields import LeadField
from .signals import Signal


@dataclasses.dataclass(frozen=True)
class Sensors(Signal):
    """A `Readout` in a run.

    Parameters
    ----------
    matrix : the place of its matrix among the arrays of the run
    shape : ``(S, N)``
    names : of the sensors
    result_unit : of the signal
    """

    matrix: Any = None
    shape: tuple[int, int] = (0, 0)
    names: tuple[str, ...] = ()
    result_unit: Any = None
    regional = True

    @property
    def suffix(self) -> str:
        return "readout"

    def check(self, sampling):
        super().check(sampling)
        if not sampling.channels:
            raise ValueError("'record' got a Readout of a model without a network, but it takes regions: a bk.Network")
        if sampling.channels != self.shape[1]:
            raise ValueError(
                f"'matrix' got shape {self.shape}, of {self.shape[1]} regions, but the network has "
                f"{sampling.channels}: Readout.matched(labels) puts its regions into the network's order"
            )

    def unit(self, unit):
        return self.result_unit

    def width(self, sampling):
        return self.shape[0]

    def channels(self):
        return "sensor", np.array(self.names) if self.names else np.arange(self.shape[0])

    def next(self, carry, x, first, sampling, data):
        regions = x.reshape(len(x), -1, sampling.channels)
        seen = jnp.einsum("tai,si->tas", regions, data[self.matrix], precision=lax.Precision.HIGHEST)
        return carry, seen.reshape(len(x), -1)


@dataclasses.dataclass(frozen=True, eq=False)
class Readout(Signal):
    """What sensors show of a network: a lead field times the regions' activity, ``(K, *networks, S)``.

    A record over time, and what statistics may be of: ``bk.Covariance(of=readout)``, ``bk.Spectrum(freqs,
    of=readout)``. It is computed block by block, so nothing of size (records, regions) is stored, and has a gradient in
    the matrix too, which may be traced.

    Parameters
    ----------
    matrix : ``(S, N)``, the gain of each region at each sensor; plain numbers, or with a unit
    of : the observable or state of each region; the model's first observable by default
    unit : of the result. ``None``: the unit of the matrix times that of the quantity. A matrix of plain numbers gives
        the result in this unit, one with a unit is converted
    sensors, regions : their names, one for each row and each column
    silent_sensors, silent_regions : those that have no gain at all, by name or number, such as a reference electrode
        or the thalamus. A row or column of zeros that is not named here is refused

    Raises
    ------
    ValueError : another shape, names that are missing or doubled, a gain that is not finite, a sensor or region without
        a gain that is not named, a unit that the result cannot have
    """

    matrix: Any
    unit: Any = dataclasses.field(default=None, kw_only=True)  # pyright: ignore[reportIncompatibleMethodOverride]
    sensors: Any = dataclasses.field(default=(), kw_only=True)
    regions: Any = dataclasses.field(default=(), kw_only=True)
    silent_sensors: Any = dataclasses.field(default=(), kw_only=True)
    silent_regions: Any = dataclasses.field(default=(), kw_only=True)

    def __post_init__(self):
        matrix = units.real(u.get_magnitude(self.matrix), "matrix")
        if np.ndim(matrix) != 2 or 0 in np.shape(matrix):
            raise ValueError(f"'matrix' got shape {np.shape(matrix)}, but takes (S, N), sensors by regions")
        if self.unit is not None and not isinstance(self.unit, u.Unit):
            raise TypeError(f"'unit' got {type(self.unit).__name__}, but takes a unit, such as u.uvolt")
        put = functools.partial(object.__setattr__, self)
        put("matrix", units.attach(matrix, units.unit_of(self.matrix)))
        for axis, kind in enumerate(("sensors", "regions")):
            put(kind, _names(getattr(self, kind), np.shape(matrix)[axis], kind))
            put(f"silent_{kind}", self._numbers(getattr(self, f"silent_{kind}"), kind, f"silent_{kind}"))
        if not is_traced(matrix):
            self._check_gains(np.asarray(matrix))

    @property
    def shape(self) -> tuple[int, int]:
        """Sensors and regions."""
        return tuple(np.shape(u.get_magnitude(self.matrix)))

    def __repr__(self) -> str:
        of = self.of or "the first observable"
        return f"Readout({self.shape[0]} sensors of {self.shape[1]} regions, of {of})"

    def _label(self, kind: str, number: int) -> str:
        names = getattr(self, kind)
        return f"'{names[number]}'" if names else f"number {number}"

    def _numbers(self, which, kind: str, argument: str) -> tuple[int, ...]:
        """The numbers of sensors or regions that are named, or numbered."""
        which = (which,) if isinstance(which, (str, int)) else tuple(which)
        names, size = getattr(self, kind), self.shape[kind == "regions"]
        found = []
        for each in which:
            if isinstance(each, str):
                if each not in names:
                    known = ", ".join(names) or "none has a name"
                    raise ValueError(f"'{argument}' got '{each}', which is none of the {kind}: {known}")
                found.append(names.index(each))
            elif isinstance(each, (int, np.integer)) and -size <= each < size:
                found.append(int(each) % size)
            else:
                raise ValueError(f"'{argument}' got {each!r}, but takes names, or numbers of the {size} {kind}")
        return tuple(found)

    def _check_gains(self, matrix: np.ndarray) -> None:
        for axis, kind in enumerate(("sensors", "regions")):
            others, silent = 1 - axis, set(getattr(self, f"silent_{kind}"))
            if broken := np.flatnonzero(~np.isfinite(matrix).all(others)).tolist():
                named = ", ".join(self._label(kind, k) for k in broken)
                raise ValueError(f"'matrix' has gains that are not finite, of the {kind} {named}")
            zero = set(np.flatnonzero((matrix == 0).all(others)).tolist())
            if missing := sorted(zero - silent):
                named = ", ".join(self._label(kind, k) for k in missing)
                what = "a reference electrode" if kind == "sensors" else "a subcortical region"
                raise ValueError(
                    f"'matrix' has zeros alone for the {kind} {named}. Of {what} say so by silent_{kind}=; else the "
                    "lead field is not theirs"
                )
            if heard := sorted(silent - zero):
                named = ", ".join(self._label(kind, k) for k in heard)
                raise ValueError(f"'silent_{kind}' got {named}, but 'matrix' has gains for them")

    def bound(self, of, unit):
        gain = units.unit_of(self.matrix)
        matrix, result = u.get_magnitude(self.matrix), units.UNITLESS * gain * unit
        if self.unit is not None:
            if not gain.is_unitless:
                if not u.have_same_dim(1.0 * result, 1.0 * self.unit):
                    raise ValueError(
                        f"'unit' got {self.unit}, but a matrix in {gain} of a quantity in {unit} gives {result}"
                    )
                matrix = units.scaled(matrix, float((1.0 * result).to_decimal(self.unit)))
            result = self.unit
        matrix = matrix if isinstance(matrix, jax.Array) else np.asarray(matrix)
        return Sensors(of=of, matrix=matrix, shape=self.shape, names=self.sensors, result_unit=result)

    # Other matrices of the same sensors -----------------------------------------------------------------------------

    def _changed(self, matrix, **names) -> Readout:
        """With another matrix, whose rows and columns of zeros are what was made of this one."""
        silent: dict[str, Any] = {}
        if not is_traced(matrix):
            zero = np.asarray(matrix) == 0
            silent = {f"silent_{n}": np.flatnonzero(zero.all(k)) for n, k in (("sensors", 1), ("regions", 0))}
        named = {"sensors": self.sensors, "regions": self.regions, **names}
        return Readout(units.attach(matrix, units.unit_of(self.matrix)), of=self.of, unit=self.unit, **named, **silent)

    def average_reference(self) -> Readout:
        """Against the mean of all sensors, a reference electrode included."""
        matrix = u.get_magnitude(self.matrix)
        found = matrix - matrix.mean(0)[None]
        return self._changed(found)

    def reference(self, sensor: str | int) -> Readout:
        """Against one sensor, which is left out.

        Raises
        ------
        ValueError : an unknown sensor
        """
        (at,) = self._numbers(sensor, "sensors", "sensor")
        matrix = u.get_magnitude(self.matrix)
        others = [k for k in range(self.shape[0]) if k != at]
        found = matrix[np.array(others)] - matrix[at][None]
        return self._changed(found, **self._rows(others))

    def _rows(self, which: Sequence[int]) -> dict[str, tuple[str, ...]]:
        return {"sensors": tuple(self.sensors[k] for k in which)} if self.sensors else {}

    def pick(self, sensors: Sequence[str | int]) -> Readout:
        """Some of the sensors, in this order.

        Raises
        ------
        ValueError : an unknown sensor
        """
        which = self._numbers(sensors, "sensors", "sensors")
        found = u.get_magnitude(self.matrix)[np.array(which, int)]
        return self._changed(found, **self._rows(which))

    def bipolar(self, pairs: Sequence[tuple[str | int, str | int]] | None = None) -> Readout:
        """Differences of two sensors, named "A1-A2".

        Parameters
        ----------
        pairs : ``(first, second)``, of which the second is subtracted; ``None``, neighbouring contacts of each shaft,
            whose names end in consecutive numbers, such as A'1 and A'2

        Raises
        ------
        ValueError : an unknown sensor, no pairs, or names without shafts
        """
        if pairs is None:
            pairs = _neighbours(self.sensors)
        each = [self._numbers(tuple(pair), "sensors", "pairs") for pair in pairs]
        if not each or any(len(pair) != 2 for pair in each):
            raise ValueError(f"'pairs' got {pairs!r}, but takes pairs of sensors")
        first, second = np.array(each).T
        matrix = u.get_magnitude(self.matrix)
        names = self.sensors or tuple(map(str, range(self.shape[0])))
        found = matrix[first] - matrix[second]
        labels = tuple(f"{names[a]}-{names[b]}" for a, b in each)
        return self._changed(found, sensors=labels)

    def matched(self, labels: Sequence[str], *, missing: str = "error", extra: str = "error") -> Readout:
        """With the regions of a network, in its order, by name.

        Parameters
        ----------
        labels : the names of the network's regions, such as ``connectome.labels``
        missing : of regions that the lead field lacks, such as subcortical ones: "error", or "zero" for no gain
        extra : of regions that the network lacks: "error", or "drop"

        Raises
        ------
        ValueError : regions without names, a name twice; missing or extra regions, all of them named
        """
        for name, value, takes in (("missing", missing, ("error", "zero")), ("extra", extra, ("error", "drop"))):
            if value not in takes:
                raise ValueError(f"'{name}' got {value!r}, but takes {' or '.join(map(repr, takes))}")
        if not self.regions:
            raise ValueError("'labels' are matched by name, but the regions of this Readout have none: give regions=")
        labels = _names(labels, len(labels), "labels")
        absent = [name for name in labels if name not in self.regions]
        if absent and missing == "error":
            raise ValueError(
                f"'labels' has regions without a gain: {', '.join(absent)}. Subcortical ones have none: say so by "
                f"missing='zero'; the lead field has {', '.join(self.regions)}"
            )
        left = [name for name in self.regions if name not in labels]
        if left and extra == "error":
            raise ValueError(
                f"'labels' lacks regions of the lead field: {', '.join(left)}; extra='drop' leaves them out"
            )
        matrix = u.get_magnitude(self.matrix)
        columns = np.array([0 if name in absent else self.regions.index(name) for name in labels], int)
        found = matrix[:, columns] * np.array([name not in absent for name in labels], matrix.dtype)[None]
        return self._changed(found, regions=labels)

    # Files ----------------------------------------------------------------------------------------------------------

    @classmethod
    def _of(cls, field: LeadField, labels, missing: str, extra: str, fields: dict[str, Any]) -> Readout:
        found = cls(field.gain, sensors=field.sensors, regions=field.regions, **fields)
        return found.matched(labels, missing=missing, extra=extra)

    @classmethod
    def from_npz(
        cls, path, labels: Sequence[str], *, missing: str = "error", extra: str = "error", **fields
    ) -> Readout:
        """From a ``.npz`` with ``gain`` ``(S, N)``, the names of its ``sensors`` ``(S,)`` and its ``regions`` ``(N,)``.

        Parameters
        ----------
        path : of the file
        labels, missing, extra : as of `matched`
        **fields : of `Readout`

        Raises
        ------
        FileNotFoundError, ValueError : there is no such file, it lacks one of these, or what `matched` refuses
        """
        return cls._of(leadfields.of_npz(path), labels, missing, extra, fields)

    @classmethod
    def from_tvb(
        cls, gain, sensors, mapping, labels: Sequence[str], *, combine: str = "sum", missing: str = "error", **fields
    ) -> Readout:
        """From The Virtual Brain's gains of a surface, its sensors, and the region of each vertex, as in ``tvb-data``.

        Parameters
        ----------
        gain : ``projection_eeg_65_surface_16k.npy`` and the like; a ``.mat`` with ``ProjectionMatrix``, or of
            Brainstorm with ``Gain`` and ``GridOrient``; or an array ``(S, V)``
        sensors : ``eeg_brainstorm_65.txt`` and the like, which begin each line with a name, or names
        mapping : ``regionMapping_16k_76.txt`` and the like, or the numbers ``(V,)``; ``None``, if the gain has one
            column for each region
        labels : of the regions, in the order that the mapping counts: those of the connectome that it belongs to
        combine : "sum", as The Virtual Brain takes it: each vertex has the region's activity; or "mean": it is shared
            by the vertices
        missing : of regions without a vertex, such as subcortical ones: "error", or "zero" for no gain
        **fields : of `Readout`

        Raises
        ------
        FileNotFoundError, ValueError : there is no such file, or sizes, numbers or names that do not belong together
        """
        return cls._of(leadfields.of_tvb(gain, sensors, mapping, labels, combine), labels, missing, "error", fields)

    @classmethod
    def from_mne(
        cls, fwd, labels, *, kind: str = "eeg", dipole=None, combine: str = "mean", missing: str = "error", **fields
    ) -> Readout:
        """From a forward solution of MNE and the labels of a parcellation, one for each region, in the network's order.

        Gains are of dipoles along the normals of the surface, whatever the orientation of the solution.

        Parameters
        ----------
        fwd : `mne.Forward`, a dict like it, or the path of one
        labels : `mne.Label` of each region, or a dict ``name: (number of the source space, vertices)``
        kind : of the channels, "eeg", "mag" or "grad"; the others are left out
        dipole : the dipole moment of a region for one of the quantity, such as ``1e-8 * u.amp * u.meter / u.mV``;
            ``None``: the gain is taken as plain numbers, V, T or T / m for 1 A m
        combine : "mean": the region's moment is shared by its sources; or "sum": each has it
        missing : of labels without a source, such as subcortical ones: "error", or "zero" for no gain
        **fields : of `Readout`

        Raises
        ------
        ValueError : no channel of that kind, labels of one name, a label without a source (all are named), or another
            number of columns than the sources have
        ImportError : for a path, without ``pip install 'brainmass-kernels[eeg]'``
        """
        names = list(labels) if isinstance(labels, Mapping) else [label.name for label in labels]
        return cls._of(leadfields.of_mne(fwd, labels, kind, dipole, combine), names, missing, "error", fields)


def _names(names, size: int, kind: str) -> tuple[str, ...]:
    """One name each, or none at all."""
    if isinstance(names, (str, bytes)):
        raise ValueError(f"'{kind}' got {names!r}, but takes {size} names")
    names = tuple(map(str, names))
    if names and len(names) != size:
        raise ValueError(f"'{kind}' got {len(names)} names, but 'matrix' has {size}")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"'{kind}' has {', '.join(twice)} more than once, so nothing is matched by name")
    return names


def _neighbours(sensors: Sequence[str]) -> list[tuple[str, str]]:
    """Neighbouring contacts of each shaft, whose names are letters and a number."""
    contacts = [re.fullmatch(r"(.*\D)0*(\d+)", name) for name in sensors]
    if not sensors or not all(contacts):
        bad = next((name for name, found in zip(sensors, contacts) if not found), "none")
        raise ValueError(
            f"'pairs' got None, which takes names of a shaft and a number, such as A1 and A2, but there is {bad}: give "
            "pairs of sensors"
        )
    by_place = {(c[1], int(c[2])): name for c, name in zip(contacts, sensors) if c}
    pairs = [(name, by_place[shaft, n + 1]) for (shaft, n), name in by_place.items() if (shaft, n + 1) in by_place]
    if not pairs:
        raise ValueError("'pairs' got None, but no two sensors are neighbours on a shaft, such as A1 and A2")
    return pairs
