"""Grids over parameters, run chunk by chunk in bounded memory; an interrupted sweep resumes."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np

from . import dispatch, display, files, identity, report, routing, sweep_files, units
from ._version import __version__
from .arguments import PerLane, entries_of, prepare
from .interrupts import interruptible
from .models.base import Model, check_model, check_name
from .noise import check_key
from .notices import warn
from .recording import Maximum, Mean, Minimum, PeakFrequency
from .run import Run
from .simulation import explain, simulate, times
from .sweep_files import OK, Chunk, Contents, Parts

#: Masses of one chunk: enough to fill the device, few enough that a chunk fits in memory and soon ends.
CHUNK = {"cpu": 65_536}
CHUNK_ELSEWHERE = 1_048_576
#: Frequencies among which the default statistics look for the peak of power, in Hz.
PEAKS = np.arange(1.0, 40.5, 0.5)


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What a grid of runs recorded; ``sweep["eeg_mean"]`` is one record.

    Attributes
    ----------
    axes : the values of each swept parameter, ``(n,)``, in order
    records : by name, ``(*grid)``, or ``(M, *grid)`` with a separate first axis
    record_axes : that axis, such as the frequencies of a spectrum
    about : model, time step, other settings and values, implementation and why, versions
    ok : ``(*grid)``, which points stayed finite; the statistics of the others are NaN. In files of earlier versions,
        where all records are finite
    seconds : wall time of the sweep, compilation included; ``None`` for one that was loaded
    """

    axes: dict[str, Any]
    records: dict[str, Any]
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
        values = {**self.axes, **self.records}
        rows = [(n, display.numbers(x), display.unit(x), str(tuple(x.shape))) for n, x in values.items()]
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
        """Read what `save` wrote.

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
            if checksum not in (None, sweep._contents().checksum()):
                raise ValueError("its checksum is that of other contents")
        return sweep

    def to_xarray(self):
        """The grid as an ``xarray.Dataset``; units are attributes of its variables and coordinates.

        Raises
        ------
        ValueError : a record has the name of an axis
        """
        sweep_files.check_names(self.axes, self.records, self.record_axes)
        return self._contents().dataset()

    def plot(self, path: str | os.PathLike | None = None):
        """Heat maps (two parameters) or curves (one) of every record with one value a mass, as a matplotlib ``Figure``.

        Parameters
        ----------
        path : a file to write as well

        Raises
        ------
        ValueError : more than two parameters, or no record with one value a mass
        ImportError : without matplotlib
        """
        from . import plots

        return plots.shown(plots.sweep_figure(self), path)

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
        report.write_sweep(self, path)


@interruptible
def sweep(
    model: Model,
    over: Mapping[str, Any],
    duration,
    dt,
    *,
    record=None,
    out: str | os.PathLike | None = None,
    chunk: int | None = None,
    key=None,
    progress: bool | Callable[[str], None] = False,
    **arguments,
) -> Sweep:
    """Run a model at every point of a grid, in chunks of masses; an interrupted sweep resumes.

    Parameters
    ----------
    model : its parameters are numbers
    over : for each parameter, input, or noise intensity (``"noise.E_inp"``), its values ``(n,)`` with their unit
    duration, dt : as in `simulate`
    record : as in `simulate`, without trajectories where the grid is large; ``None``, of the model's first observable
        the mean, the minimum, the maximum and the frequency of most power
    out : a file, ``.npz``, ``.nc`` or ``.zarr``. Finished chunks lie in the folder ``<out>.parts`` until the file has
        been written and read back; a later sweep with the same programs and arguments reads them instead of running
        them again
    chunk : masses run together; by device if not given
    key : a JAX random key; the noise of a point depends on the key and its place in the grid, not on the chunk
    progress : print a line a chunk, or a function that takes it
    **arguments : of `simulate`: ``inputs``, ``noise``, ``initial``, ``every``, ``transient``, ``scheme``, ...

    Returns
    -------
    Sweep

    Raises
    ------
    ValueError, TypeError : an argument's name, unit, shape or value, or a record's name that ``out`` cannot hold;
        chunks on disk that are damaged, of another sweep, or being written by another run
    """
    began = time.perf_counter()
    check_key(key)
    grid = _Grid.of(model, over)
    size = min(grid.points, _chunk_size(chunk))
    record = [Mean(), Minimum(), Maximum(), PeakFrequency(PEAKS)] if record is None else record
    if OK in {*dict(entries_of(model, record)), *grid.axes}:
        raise ValueError(f"'record' and 'over' take other names than {OK!r}, which tells which points stayed finite")
    job = _Job(model, grid, size, key, {"duration": duration, "dt": dt, "record": record, **arguments})
    say = print if progress is True else progress or (lambda _: None)
    if out is None:
        return _ended(job.result(Parts(), say), began)
    out = sweep_files.place(out, "out")
    run, data = prepare(**job.call(0))
    _rehearse(out, model, grid, run)
    with sweep_files.parts_of(out, job.identity(run, data)) as parts:
        result = job.result(parts, say)
        result.save(out)
        if Sweep.load(out)._contents().checksum() != result._contents().checksum():
            raise OSError(f"{out} is not what was written to it; its chunks are kept in {parts.folder}")
        parts.remove()
    return _ended(result, began)


def _ended(sweep: Sweep, began: float) -> Sweep:
    """The sweep with the seconds that it took, and a warning if points of it did not stay finite."""
    ok = np.asarray(sweep.ok)
    if not ok.all():
        warn(
            f"{(~ok).sum():,} of the {ok.size:,} points of this sweep did not stay finite (sweep.ok says which), and "
            "their statistics are NaN: take a shorter dt, another scheme, or values within the model's range"
        )
    return dataclasses.replace(sweep, seconds=time.perf_counter() - began)


def _chunk_size(chunk) -> int:
    if chunk is None:
        return CHUNK.get(dispatch.platform(), CHUNK_ELSEWHERE)
    if isinstance(chunk, bool) or not isinstance(chunk, (int, np.integer)) or chunk < 1:
        raise ValueError(f"'chunk' got {chunk!r}, but takes a number of masses, at least 1")
    return int(chunk)


@dataclasses.dataclass(frozen=True)
class _Grid:
    """The points of a sweep, in C order over its axes."""

    axes: dict[str, Any]

    @classmethod
    def of(cls, model: Model, over: Mapping[str, Any]) -> _Grid:
        check_model(model, "; a network is swept by giving arrays of shape (networks, 1) to simulate()")
        if not over:
            raise ValueError("'over' got nothing, but takes one or several parameters and their values")
        known, axes = routing.places(model), {}
        for name, values in over.items():
            routing.check(name, known, "parameter or input")
            unit = known[name].unit
            values = np.asarray(units.strip(values, unit, name, known[name].also), float)
            if values.ndim != 1 or not len(values):
                raise ValueError(f"'{name}' got values of shape {values.shape}, but takes one or several, (n,)")
            axes[name] = units.attach(values, unit)
        for name, x in model.magnitudes().items():
            if np.ndim(x) and name not in over:
                raise ValueError(f"'model' has {np.shape(x)} values of {name}: give them in over={{'{name}': ...}}")
        return cls(axes)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(len(x) for x in self.axes.values())

    @property
    def points(self) -> int:
        return math.prod(self.shape)

    def at(self, places: np.ndarray) -> dict[str, Any]:
        """The values at some places; beyond the last place, those of the last."""
        index = np.unravel_index(np.minimum(places, self.points - 1), self.shape)
        dtype = jnp.result_type(float)
        return {
            name: units.attach(jnp.asarray(u.get_magnitude(x)[i], dtype), units.unit_of(x))
            for (name, x), i in zip(self.axes.items(), index, strict=True)
        }


@dataclasses.dataclass(frozen=True)
class _Job:
    """A sweep to be run.

    Attributes
    ----------
    size : masses of a chunk
    arguments : of `simulate`, but for those that the grid and the key decide
    """

    model: Model
    grid: _Grid
    size: int
    key: Any
    arguments: dict[str, Any]

    def _places(self, number: int) -> np.ndarray:
        """The places in the grid of one chunk; those of the last may lie beyond it."""
        return np.arange(number * self.size, (number + 1) * self.size)

    def call(self, number: int) -> dict[str, Any]:
        """The arguments of `simulate` for one chunk."""
        places, arguments = self._places(number), dict(self.arguments)
        values = self.grid.at(places)
        inputs, noise = arguments.pop("inputs", None) or {}, arguments.pop("noise", None) or {}
        model, inputs, noise = routing.put(self.model, inputs, noise, values)
        inputs = {name: PerLane(x) if name in values else x for name, x in inputs.items()}
        keys = None
        if self.key is not None:
            keys = jax.vmap(lambda place: jax.random.fold_in(self.key, place))(jnp.asarray(places))
        return {**arguments, "model": model, "inputs": inputs, "noise": noise, "key": keys}

    def run(self, number: int) -> Chunk:
        result = simulate(**self.call(number))
        # Waiting here can be interrupted; copying what is not ready cannot.
        jax.block_until_ready(result.records)
        inside = int((self._places(number) < self.grid.points).sum())
        records = {n: _on_host(x, (..., slice(inside))) for n, x in {**result.records, OK: result._finite()}.items()}
        return Chunk(records, {n: _on_host(x) for n, x in result.axes.items()})

    def result(self, parts: Parts, say: Callable) -> Sweep:
        """The whole grid; chunks that are on disk are not run again."""
        chunks = self._chunks(parts, say)
        records = {n: _joined([c.records[n] for c in chunks], self.grid) for n in chunks[0].records}
        ok = records.pop(OK, None)
        return Sweep(self.grid.axes, records, chunks[-1].record_axes, self._about(), ok)

    def _chunks(self, parts: Parts, say: Callable) -> list[Chunk]:
        count = -(-self.grid.points // self.size)
        began, ran, chunks = time.perf_counter(), 0, []
        if done := sum(map(parts.has, range(count))):
            say(f"resuming after {done} of {count} chunks")
        for number in range(count):
            chunk = parts.read(number)
            if chunk is None:
                chunk = self.run(number)
                parts.write(number, chunk)
                ran += 1
                left = (time.perf_counter() - began) / ran * sum(not parts.has(k) for k in range(number + 1, count))
                say(f"chunk {number + 1} of {count}: {self.size:,} masses, about {left:.0f} s left")
            chunks.append(chunk)
        return chunks

    def _about(self) -> dict[str, Any]:
        plan, given = explain(**self.call(0)), self.arguments
        more = {name: str(given[name]) for name in ("transient", "every", "scheme") if given.get(name) is not None}
        return {
            "model": type(self.model).__name__,
            "duration": str(given["duration"]),
            "dt": str(given["dt"]),
            **more,
            "masses": self.grid.points,
            "values": report.values_of(self.model, given.get("inputs") or {}, given.get("noise") or {}, self.grid.axes),
            "implementation": plan.implementation,
            "reason": plan.reason,
            "versions": {"brainmass_kernels": __version__, "jax": metadata.version("jax")},
        }

    def identity(self, run: Run, data) -> dict[str, str]:
        """What tells this sweep from others, by name."""
        axes, steps = self.grid.axes, run.schedule
        swept = {n.replace(".", " ") for n in axes}
        values = {n: x for n, x in identity.of_data(run, data).items() if n not in swept}
        digests = {**identity.versions(), **identity.of_run(run), **values}
        digests |= {
            "model": type(self.model).__qualname__,
            "implementation": run.implementation,
            "precision": run.precision,
            "duration": str(steps.steps),
            "transient": str(steps.lead),
            "every": str(steps.every),
            "chunk": str(self.size),
            "over": ", ".join(axes),
        }
        digests |= {f"over {n}": f"{identity.of_array(u.get_magnitude(x))} {units.unit_of(x)}" for n, x in axes.items()}
        if run.spec.noisy:
            typed = jnp.issubdtype(self.key.dtype, jax.dtypes.prng_key)
            words = jax.random.key_data(self.key) if typed else self.key
            digests["key"] = f"{self.key.dtype} {identity.of_array(words)}"
        return digests


def _on_host(x, index: Any = ...):
    return units.attach(np.asarray(u.get_magnitude(x))[index], units.unit_of(x))


def _joined(pieces: list, grid: _Grid):
    """One record of the whole grid, from those of the chunks."""
    flat = np.concatenate([u.get_magnitude(x) for x in pieces], axis=-1)
    return units.attach(flat.reshape(*flat.shape[:-1], *grid.shape), units.unit_of(pieces[0]))


def _rehearse(out: Path, model: Model, grid: _Grid, run: Run) -> None:
    """Write and read one point, so that a file that cannot be written is known before anything is run."""
    known = model.recordable()
    ts, records, record_axes = times(run, 1.0 * model.time_unit), {}, {}
    for name, what in run.entries:
        axis: Any = ts if isinstance(what, str) else what.axis(ts, run.sampling)  # pyright: ignore[reportArgumentType]
        unit = known[what] if isinstance(what, str) else what.unit(known[what.of])
        shape = (*(() if axis is None else (1,)), *(1 for _ in grid.axes))
        records[name] = units.attach(np.zeros(shape, run.spec.dtype), unit)
        if axis is not None:
            record_axes[name] = _on_host(axis, slice(1))
    sweep_files.check_names(grid.axes, records, record_axes)
    point = Sweep({n: x[:1] for n, x in grid.axes.items()}, records, record_axes, {})
    trial = out.with_name(f".{out.stem[:48]}.trial.{os.urandom(4).hex()}{out.suffix}")
    try:
        point.save(trial)
        if Sweep.load(trial)._contents().checksum() != point._contents().checksum():
            raise ValueError("it reads otherwise than it was written")
    except (OSError, ImportError):
        raise
    except Exception as error:
        raise ValueError(f"'record' got {', '.join(records)}, which {out.name} cannot hold: {error}") from error
    finally:
        files.remove(trial)
