"""What a sweep returns: its records with their units and axes, saved and drawn; or what a part of one has done."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import brainunit as u
import numpy as np

from . import display, files, report, sweep_files, units
from .models.base import check_name
from .sweep_files import OK, Contents, Stored


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What a grid of runs recorded; ``sweep["eeg_mean"]`` is one record.

    Attributes
    ----------
    axes : the values of each swept parameter, ``(n,)``, in order
    records : by name, ``(*grid)``, or ``(M, *grid)`` with a separate first axis; of networks, with the regions as the
        last. Those of a ``.zarr`` that a sweep wrote stay there, and each is read whenever it is asked for
    record_axes : that axis, such as the frequencies of a spectrum
    about : model, time step, other settings and values, implementation and why, versions, a digest of programs and
        values
    ok : ``(*grid)``, which points stayed finite; the statistics of the others are NaN. Of a network, whether all
        regions did. In files of earlier versions, where all records are finite
    seconds : wall time of the sweep, compilation included; ``None`` for one that was loaded
    """

    axes: dict[str, Any]
    records: dict[str, Any] | Stored
    record_axes: dict[str, Any]
    about: dict[str, Any]
    ok: Any = None
    seconds: float | None = None

    def __post_init__(self):
        if self.ok is None:
            finite = (np.isfinite(u.get_magnitude(x)) for x in self.records.values())
            points = [x.all(tuple(range(x.ndim - len(self.axes)))) for x in finite]
            object.__setattr__(self, "ok", np.logical_and.reduce(points) if points else np.ones(self.shape, bool))

    def _contents(self) -> Contents:
        """As a file has it, with `ok` among the records."""
        return Contents(self.axes, {**self.records, OK: self.ok}, self.record_axes, self.about)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the grid."""
        return tuple(len(x) for x in self.axes.values())

    def __getitem__(self, name: str):
        check_name(name, self.records, "record")
        return self.records[name]

    def __repr__(self) -> str:
        grid = " x ".join(f"{len(x)} {name}" for name, x in self.axes.items())
        diverged = int((~np.asarray(self.ok)).sum())
        return f"Sweep({grid}: {', '.join(self.records)}{f'; {diverged} points diverged' if diverged else ''})"

    def _repr_html_(self) -> str:
        stored = self.records if isinstance(self.records, Stored) else None
        values = self.axes if stored else {**self.axes, **self.records}
        rows = [(n, display.numbers(x), display.unit(x), str(tuple(x.shape))) for n, x in values.items()]
        if stored:
            rows += [(n, "in the file", *map(str, stored.unit_and_shape(n))) for n in stored]
        ok = np.asarray(self.ok)
        foot = "" if ok.all() else f"{(~ok).sum():,} of {ok.size:,} points did not stay finite"
        return display.table(f"Sweep over {', '.join(self.axes)}", ("", "values", "unit", "shape"), rows, foot)

    def save(self, path: str | os.PathLike) -> None:
        """Write the grid with its units and coordinates, as ``.npz``, or through xarray as ``.nc`` or ``.zarr``.

        The file is written whole or not at all.

        Raises
        ------
        ValueError : another ending, or a record's name that a file cannot have
        """
        sweep_files.write(path, self._contents())

    @classmethod
    def load(cls, path: str | os.PathLike) -> Sweep:
        """Read what `save` or a sweep wrote.

        Of a ``.zarr`` that a sweep wrote only the axes and ``ok`` are read at once. Its records are read when they are
        asked for, and ``to_xarray()`` reads no more than what is selected of it.

        Raises
        ------
        FileNotFoundError, ValueError : there is no such file, or it is not a saved sweep, or damaged
        """
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"'path' got {path}, but there is no file of that name")
        sweep_files.kind_of(path, "path")
        remedy = "take a copy of it, or run the sweep again"
        with files.damaged(path, "a sweep saved by this brainmass_kernels", remedy):
            (axes, records, record_axes, about), checksum = sweep_files.read(path)
            ok = records.pop(OK, None)
            sweep = cls(axes, records, record_axes, about, ok)
            if checksum is not None and checksum != sweep._contents().checksum():
                raise ValueError("its checksum is that of other contents")
        return sweep

    def to_xarray(self):
        """The grid as an ``xarray.Dataset``; units are attributes of its variables and coordinates.

        Raises
        ------
        ValueError : a record has the name of an axis
        """
        sweep_files.check_names(self.axes, self.records, self.record_axes)
        if isinstance(self.records, Stored):
            return sweep_files.opened(self.records.path)
        return self._contents().dataset()

    def plot(self, path: str | os.PathLike | None = None):
        """Heat maps (two parameters) or curves (one) of every record with one value a mass, as a matplotlib ``Figure``.

        Parameters
        ----------
        path : a file to write as well

        Of networks it shows the means over the regions.

        Raises
        ------
        ValueError : more than two parameters, or no record with one value a mass
        ImportError : without matplotlib
        """
        from . import plots

        return plots.shown(plots.sweep_figure(self._pictured()), path)

    def report(self, path: str | os.PathLike) -> None:
        """Write one page of HTML that needs nothing beside it, to read, print or send.

        It has the figure, the grid, the records with their units, the values that were not swept, the settings, the
        versions, and how the sweep ran.

        Parameters
        ----------
        path : of the page, a name that ends in .html

        Raises
        ------
        ValueError : another ending, or nothing can be written there
        ImportError : without jinja2 or matplotlib
        """
        report.write_sweep(self._pictured(), path)

    def _pictured(self) -> Sweep:
        """Without the regions of networks, and without what no picture shows."""
        plain = {n: self.records[n] for n in self.records if n not in self.record_axes}
        if not plain:
            return self
        grid = len(self.axes)
        if any(x.ndim > grid for x in plain.values()):
            over = {n: tuple(range(grid, x.ndim)) for n, x in plain.items()}
            plain = {n: units.attach(u.get_magnitude(x).mean(over[n]), units.unit_of(x)) for n, x in plain.items()}
            return dataclasses.replace(self, records=plain, about={**self.about, "shown": "means over the regions"})
        return dataclasses.replace(self, records=plain) if isinstance(self.records, Stored) else self


@dataclasses.dataclass(frozen=True)
class SweepPart:
    """What a worker of a sweep returns while chunks of other parts are missing; ``str()`` says how many.

    Attributes
    ----------
    out : the file that the last worker writes
    part : ``(i, n)``, counted from 0
    done, chunks : how many chunks are there, and how many the sweep has
    """

    out: Path
    part: tuple[int, int]
    done: int
    chunks: int

    def __str__(self) -> str:
        i, n = self.part
        return (
            f"part {i} of 0 to {n - 1} is done; {self.done:,} of {self.chunks:,} chunks of {self.out.name} are there, "
            "and whoever does the last of the others writes it"
        )

    def __getitem__(self, name: str):
        raise ValueError(f"{name!r} is not there yet: {self}")
