"""Grids over parameters: chunk by chunk in bounded memory, kept on disk, and gone on with when interrupted."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np

from . import dispatch, files, identity, routing, units
from ._version import __version__
from .arguments import PerLane, entries_of, prepare
from .extras import needs
from .interrupts import heard
from .models.base import Model, check_model, check_name
from .noise import check_key
from .recording import Maximum, Mean, Minimum, PeakFrequency, Reduction
from .run import Run
from .simulation import explain, simulate, times

#: Masses of one chunk: enough to fill the device, few enough that a chunk is soon done and fits.
CHUNK = {"cpu": 65_536}
CHUNK_ELSEWHERE = 1_048_576
#: Where the peak of power is looked for, in Hz.
PEAKS = np.arange(1.0, 40.5, 0.5)
_FORMAT = "brainmass_kernels sweep"
#: Among the records of a file, which points stayed finite.
_OK = "ok"
# Of the manifest of chunks; the first had no traced programs, so that what it was made of cannot be known.
_VERSION = 2
_SWEEP, _PARTS = "a sweep saved by this brainmass_kernels", "part of an interrupted sweep"
# Numbers that are copied at once for a checksum.
_SLAB = 2**20
# What one of the formats takes for a type or keeps for itself, and characters that one of them cannot write.
_RESERVED = frozenset("byte char short ushort int uint int64 uint64 float real double bool string".split())
_NAME = re.compile(r"(?!__)[^\W]([^/\\\x00-\x1f\x7f]*[^/\\\s\x00-\x1f\x7f])?")


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What a grid of runs recorded; ``sweep["eeg_mean"]`` is one record.

    Attributes
    ----------
    axes : the values of each swept parameter, ``(n,)``, in order
    records : by name, ``(*grid)``, or ``(M, *grid)`` with an axis of its own
    record_axes : that axis, such as the frequencies of a spectrum
    about : model, time step, implementation, versions
    ok : ``(*grid)``, which points stayed finite; the others' statistics are NaN. Of a file that an earlier version
        wrote, where all records are finite
    """

    axes: dict[str, Any]
    records: dict[str, Any]
    record_axes: dict[str, Any]
    about: dict[str, Any]
    ok: Any = None

    def __post_init__(self):
        if self.ok is None:
            finite = (np.isfinite(u.get_magnitude(x)) for x in self.records.values())
            kept = [x.all(tuple(range(x.ndim - len(self.axes)))) for x in finite]
            object.__setattr__(self, "ok", np.logical_and.reduce(kept) if kept else np.ones(self.shape, bool))

    @property
    def _saved(self) -> dict[str, Any]:
        """The records as a file has them, with `ok` among them."""
        return {**self.records, _OK: self.ok}

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

    def save(self, path: str | os.PathLike) -> None:
        """Write the grid with its units and coordinates, as ``.npz``, or through xarray as ``.nc`` or ``.zarr``.

        The file is written whole or not at all.

        Raises
        ------
        ValueError : another ending, or a record's name that a file cannot have
        """
        write, place = _writer(path, "path"), _place(path, "path")
        _check_names(self.axes, self.records, self.record_axes)
        with files.replacing(place, folder=_kind(path) == ".zarr") as aside:
            write(self, aside)

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
        kind = _kind(path, "path")
        with _damaged(path, _SWEEP, "take a copy of it, or run the sweep again"):
            found, checksum = _read_npz(path) if kind == ".npz" else _of_xarray(path, kind)
            if checksum not in (None, found._checksum()):
                raise ValueError("its checksum is that of other contents")
        return found

    def _checksum(self) -> str:
        """Of all that is saved, whatever the format."""
        return _checksum([self.axes, self._saved, self.record_axes], self.about)

    def to_xarray(self):
        """The grid as an ``xarray.Dataset``; units are attributes of its variables and coordinates.

        Raises
        ------
        ValueError : a record has the name of an axis
        """
        xarray = needs("xarray", "sweep")
        _check_names(self.axes, self.records, self.record_axes)
        variables, coords = {}, {}
        for name, axis in [*self.axes.items(), *((_axis_of(n), x) for n, x in self.record_axes.items())]:
            coords[name] = ((name,), np.asarray(u.get_magnitude(axis)), {"units": str(units.unit_of(axis))})
        for name, x in self._saved.items():
            dims = (*([_axis_of(name)] if name in self.record_axes else []), *self.axes)
            variables[name] = (dims, np.asarray(u.get_magnitude(x)), {"units": str(units.unit_of(x))})
        # Not every format keeps the order of its variables.
        told = {"about": self.about, "axes": list(self.axes), "records": list(self.records)}
        told[files.CHECKSUM] = self._checksum()
        return xarray.Dataset(variables, coords, {"format": _FORMAT, **{n: json.dumps(x) for n, x in told.items()}})

    def plot(self):
        """Heat maps (two parameters) or curves (one) of every record with one value a mass, as a matplotlib Figure."""
        from . import plots

        return plots.sweep_figure(self)


@heard
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
    """Run a model at every point of a grid, in chunks of masses; an interrupted sweep goes on where it was.

    Parameters
    ----------
    model : its parameters are numbers
    over : for each parameter, input, or noise intensity (``"noise.E_inp"``), its values ``(n,)`` with their unit
    duration, dt : as in `simulate`
    record : as in `simulate`, without trajectories where the grid is large; ``None``, of the model's first observable
        the mean, the least, the largest and the frequency of most power
    out : a file, ``.npz``, ``.nc`` or ``.zarr``; finished chunks lie in the folder ``<out>.parts`` beside it until the
        file is there and has been read back. A sweep goes on with them where its programs are those that wrote them
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
    check_key(key)
    grid = _Grid.of(model, over)
    size = min(grid.points, _chunk(chunk))
    record = _default(model) if record is None else record
    everything = {"duration": duration, "dt": dt, "record": record, **arguments}
    if _OK in {*dict(entries_of(model, record)), *grid.axes}:
        raise ValueError(f"'record' and 'over' take other names than {_OK!r}, which tells which points stayed finite")
    say = print if progress is True else progress or (lambda _: None)
    with contextlib.ExitStack() as held:
        parts = _NO_PARTS
        if out is not None:
            out = _place(out, "out")
            run, data = prepare(**_call(model, grid, np.arange(size), key, everything))
            _rehearse(out, model, grid, run)
            parts = held.enter_context(_parts(out, _identity(model, grid, run, data, size, key)))
        chunks, axes = _all_chunks(model, grid, size, key, everything, parts, say)
        joined = {n: _joined(n, [c[n] for c in chunks], grid) for n in chunks[0]}
        ok = joined.pop(_OK, None)
        result = Sweep(grid.axes, joined, axes, _about(model, grid, size, key, everything), ok)
        if out is not None:
            result.save(out)
            if Sweep.load(out)._checksum() != result._checksum():
                raise OSError(f"{out} is not what was written to it; its chunks are kept in {parts.folder}")
            parts.remove()
    return result


def _all_chunks(model: Model, grid: _Grid, size: int, key, everything: dict, parts: _Parts, say: Callable):
    """The records of every chunk, read where it was finished before, and their axes."""
    count = -(-grid.points // size)
    began, ran = time.perf_counter(), 0
    if parts.done(count):
        say(f"going on after {parts.done(count)} of {count} chunks")
    chunks, axes = [], {}
    for number in range(count):
        found = parts.read(number)
        if found is None:
            found = _run(model, grid, np.arange(number * size, (number + 1) * size), key, everything)
            parts.write(number, found)
            ran += 1
            left = (time.perf_counter() - began) / ran * sum(not parts.has(k) for k in range(number + 1, count))
            say(f"chunk {number + 1} of {count}: {size:,} masses, about {left:.0f} s left")
        chunks.append(found.records)
        axes = found.record_axes
    return chunks, axes


# The grid -----------------------------------------------------------------------------------------------------------


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
            check_name(name, known, "parameter or input")
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
        """The values at some places; beyond the last it is the last's."""
        index = np.unravel_index(np.minimum(places, self.points - 1), self.shape)
        dtype = jnp.result_type(float)
        return {
            name: units.attach(jnp.asarray(u.get_magnitude(x)[i], dtype), units.unit_of(x))
            for (name, x), i in zip(self.axes.items(), index, strict=True)
        }


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """What one chunk recorded: plain arrays with the masses last, with their units in `_Parts`."""

    records: dict[str, Any]
    record_axes: dict[str, Any]


def _call(model: Model, grid: _Grid, places: np.ndarray, key, everything: dict) -> dict[str, Any]:
    """What `simulate` is called with for some places."""
    values, arguments = grid.at(places), dict(everything)
    inputs, noise = arguments.pop("inputs", None) or {}, arguments.pop("noise", None) or {}
    swept, inputs, noise = routing.put(model, inputs, noise, values)
    inputs = {name: PerLane(x) if name in values else x for name, x in inputs.items()}
    keys = None if key is None else jax.vmap(lambda place: jax.random.fold_in(key, place))(jnp.asarray(places))
    return {**arguments, "model": swept, "inputs": inputs, "noise": noise, "key": keys}


def _run(model: Model, grid: _Grid, places: np.ndarray, key, everything: dict) -> _Chunk:
    found = simulate(**_call(model, grid, places, key, everything))
    # This wait can be interrupted; to copy what is not ready cannot.
    jax.block_until_ready(found.records)
    inside = int((places < grid.points).sum())
    records = {n: _on_host(x, (..., slice(inside))) for n, x in {**found.records, _OK: found._finite()}.items()}
    return _Chunk(records, {n: _on_host(x) for n, x in found.axes.items()})


def _on_host(x, index: Any = ...):
    return units.attach(np.asarray(u.get_magnitude(x))[index], units.unit_of(x))


def _joined(name: str, parts: list, grid: _Grid):
    whole = np.concatenate([u.get_magnitude(x) for x in parts], axis=-1)
    return units.attach(whole.reshape(*whole.shape[:-1], *grid.shape), units.unit_of(parts[0]))


def _default(model: Model) -> list[Reduction]:
    return [Mean(), Minimum(), Maximum(), PeakFrequency(PEAKS)]


def _chunk(given) -> int:
    if given is None:
        return CHUNK.get(dispatch.platform(), CHUNK_ELSEWHERE)
    if isinstance(given, bool) or not isinstance(given, (int, np.integer)) or given < 1:
        raise ValueError(f"'chunk' got {given!r}, but takes a number of masses, at least 1")
    return int(given)


def _about(model: Model, grid: _Grid, size: int, key, everything: dict) -> dict[str, Any]:
    plan = explain(**_call(model, grid, np.arange(size), key, everything))
    return {
        "model": type(model).__name__,
        "duration": str(everything["duration"]),
        "dt": str(everything["dt"]),
        "masses": grid.points,
        "implementation": plan.implementation,
        "versions": {"brainmass_kernels": __version__, "jax": metadata.version("jax")},
    }


# What a sweep is -----------------------------------------------------------------------------------------------------


def _identity(model: Model, grid: _Grid, run: Run, data, size: int, key) -> dict[str, str]:
    """What tells a sweep from others, by name."""
    swept = {n.replace(".", " ") for n in grid.axes}
    values = {n: x for n, x in identity.of_data(run, data).items() if n not in swept}
    told = {**identity.versions(), **identity.of_run(run), **values}
    told |= {"model": type(model).__qualname__, "implementation": run.implementation, "precision": run.precision}
    steps = run.schedule
    told |= {"duration": str(steps.steps), "transient": str(steps.lead), "every": str(steps.every)}
    told |= {"chunk": str(size), "over": ", ".join(grid.axes)}
    told |= {f"over {n}": f"{identity.of_array(u.get_magnitude(x))} {units.unit_of(x)}" for n, x in grid.axes.items()}
    if run.spec.noisy:
        typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        told["key"] = f"{key.dtype} {identity.of_array(jax.random.key_data(key) if typed else key)}"
    return told


def _check_names(axes: Mapping[str, Any], records, record_axes) -> None:
    """Raise ValueError where a record's name cannot stand in a file, whatever its format."""
    taken = {**dict.fromkeys(axes, "swept"), _OK: "that of which points stayed finite"}
    for name in (*records, *(_axis_of(n) for n in record_axes)):
        if name in taken:
            raise ValueError(
                f"'record' got the name {name!r}, which is {taken[name]} too: give record= a dict with another name"
            )
        if not isinstance(name, str) or not _NAME.fullmatch(name) or name in _RESERVED or len(name.encode()) > 200:
            raise ValueError(
                f"'record' got the name {name!r}, which a file cannot hold: it takes one that begins with a letter, a "
                "digit or '_', has no slash and does not end in a space, such as record={'alpha_power': ...}"
            )
        taken[name] = "another record's"


def _rehearse(out: Path, model: Model, grid: _Grid, run: Run) -> None:
    """Write and read one point of what a sweep will write: what cannot be is known before anything is run."""
    known = model.recordable()
    ts, records, record_axes = times(run, 1.0 * model.time_unit), {}, {}
    for name, what in run.entries:
        axis: Any = ts if isinstance(what, str) else what.axis(ts, run.sampling)  # pyright: ignore[reportArgumentType]
        unit = known[what] if isinstance(what, str) else what.unit(known[what.of])
        shape = (*(() if axis is None else (1,)), *(1 for _ in grid.axes))
        records[name] = units.attach(np.zeros(shape, run.spec.dtype), unit)
        if axis is not None:
            record_axes[name] = _on_host(axis, slice(1))
    _check_names(grid.axes, records, record_axes)
    small = Sweep({n: x[:1] for n, x in grid.axes.items()}, records, record_axes, {})
    trial = out.with_name(f".{out.stem[:48]}.trial.{os.urandom(4).hex()}{out.suffix}")
    try:
        small.save(trial)
        if Sweep.load(trial)._checksum() != small._checksum():
            raise ValueError("it reads otherwise than it was written")
    except (OSError, ImportError):
        raise
    except Exception as error:
        raise ValueError(f"'record' got {', '.join(records)}, which {out.name} cannot hold: {error}") from error
    finally:
        files.remove(trial)


# On disk ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Parts:
    """Finished chunks in a folder beside the result, each written whole or not at all; without a folder, nothing."""

    folder: Path | None = None
    sweep: str = ""

    def _path(self, number: int) -> Path:
        assert self.folder is not None
        return self.folder / f"chunk{number:06d}.npz"

    def has(self, number: int) -> bool:
        return self.folder is not None and self._path(number).exists()

    def done(self, count: int) -> int:
        return sum(map(self.has, range(count)))

    def read(self, number: int) -> _Chunk | None:
        if not self.has(number):
            return None
        path = self._path(number)
        with _damaged(path, _PARTS, f"delete {path}, and the same sweep runs that chunk again"):
            (records, axes), about, checksum = _unpacked(path)
            if about != self._about(number):
                raise ValueError("it is of another sweep")
            if checksum != _checksum([records, axes], about):
                raise ValueError("its checksum is that of other contents")
        return _Chunk(records, axes)

    def write(self, number: int, chunk: _Chunk) -> None:
        if self.folder is not None:
            with files.replacing(self._path(number)) as aside:
                _pack(aside, [chunk.records, chunk.record_axes], self._about(number))

    def _about(self, number: int) -> dict[str, Any]:
        return {"sweep": self.sweep, "chunk": number}

    def remove(self) -> None:
        """All at once: chunks without what they are of would be taken for another sweep's."""
        if self.folder is not None:
            gone = _gone(self.folder)
            files.remove(gone)
            os.replace(self.folder, gone)
            shutil.rmtree(gone)


_NO_PARTS = _Parts()


def _gone(folder: Path) -> Path:
    """What the folder of a finished sweep is named while it is removed."""
    return folder.with_name(f"{folder.name}.done")


@contextlib.contextmanager
def _parts(out: Path, told: Mapping[str, str]) -> Iterator[_Parts]:
    """The chunks of a sweep, for this run alone."""
    folder = Path(f"{out}.parts")
    files.remove(_gone(folder))
    with files.held(folder):
        name, remedy = folder / "sweep.json", f"delete {folder}, and the sweep begins anew"
        if not name.exists():
            if any(folder.glob("chunk*.npz")):
                raise ValueError(f"{folder} holds chunks, but no sweep.json that tells what they are of: delete it")
            files.write_document(name, {"format": _FORMAT, "version": _VERSION, "sweep": dict(told)})
        with _damaged(name, _PARTS, remedy):
            found = files.read_document(name)
            if found["format"] != _FORMAT:
                raise ValueError(f"its format is {found['format']!r}")
            theirs = found["sweep"] if found.get("version") == _VERSION else None
        if theirs is None:
            raise ValueError(f"{folder} holds chunks of another version of brainmass_kernels: {remedy}")
        if differing := identity.difference(theirs, told):
            raise ValueError(
                f"{folder} holds chunks of a sweep with other arguments: delete it, or give 'out' another name. "
                f"What differs: {differing}"
            )
        yield _Parts(folder, files.checksum(dict(told)))


@contextlib.contextmanager
def _damaged(path: Path, what: str, remedy: str) -> Iterator[None]:
    """Raise what goes wrong in reading a file as one ValueError with its name."""
    try:
        yield
    except (FileNotFoundError, PermissionError, ImportError):
        raise
    except Exception as error:
        raise files.damaged(path, what, error, remedy) from error


def _checksum(groups: Sequence[Mapping[str, Any]], about: dict) -> str:
    """Of quantities by name, whatever the dtype that a format keeps them in."""
    found = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for group in groups:
        for name, x in sorted(group.items()):
            array = np.ascontiguousarray(u.get_magnitude(x))
            found.update(f"|{name}|{units.unit_of(x)}|{array.dtype.kind}{array.shape}|".encode())
            flat = array.reshape(-1)
            for first in range(0, flat.size, _SLAB):
                found.update(_canonical(flat[first : first + _SLAB]).tobytes())
        found.update(f"||{list(groups[0])}".encode())
    return found.hexdigest()


def _canonical(array: np.ndarray) -> np.ndarray:
    """Numbers in one form, whatever the width and the order of bytes that a format gave them."""
    wide = {"f": "<f8", "c": "<c16", "b": "<i8", "i": "<i8", "u": "<u8"}.get(array.dtype.kind, array.dtype)
    array = array.astype(wide)
    # One NaN is as good as another.
    return np.where(np.isnan(array), np.nan, array) if array.dtype.kind in "fc" else array


def _pack(path: Path, groups: Sequence[Mapping[str, Any]], about: dict) -> None:
    """Write groups of quantities as one ``.npz``."""
    arrays = {f"{n}_{g}": np.asarray(u.get_magnitude(x)) for g, group in enumerate(groups) for n, x in group.items()}
    names = [{n: str(units.unit_of(x)) for n, x in group.items()} for group in groups]
    told = {"format": _FORMAT, "units": names, "about": about, files.CHECKSUM: _checksum(groups, about)}
    with open(path, "wb") as file:
        arrays["about"] = np.array(json.dumps(told))
        np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]


def _unpacked(path: Path) -> tuple[list[dict], dict, str | None]:
    """The groups, what they are about, and the checksum, which early files lack."""
    with open(path, "rb") as file, np.load(file) as held:
        told = json.loads(str(held["about"]))
        groups = [
            {n: units.attach(held[f"{n}_{g}"], units.parsed(unit)) for n, unit in group.items()}
            for g, group in enumerate(told["units"])
        ]
    return groups, told["about"], told.get(files.CHECKSUM)


def _kind(path: str | os.PathLike, argument: str = "out") -> str:
    kind = Path(path).suffix.lower()
    if kind not in (".npz", ".nc", ".zarr"):
        raise ValueError(f"'{argument}' got {os.fspath(path)}, but takes a name that ends in .npz, .nc or .zarr")
    return kind


def _place(path: str | os.PathLike, argument: str) -> Path:
    """The absolute path of a file that can be written there; a folder is replaced only where it is a Zarr store."""
    folder = _kind(path, argument) == ".zarr"
    whole = files.absolute(path, argument, folder)
    if folder and whole.is_dir() and not any((whole / n).exists() for n in ("zarr.json", ".zgroup", ".zattrs")):
        raise ValueError(f"'{argument}' got {os.fspath(path)}, which is a folder, and no Zarr store")
    return whole


def _writer(path: str | os.PathLike, argument: str = "out") -> Callable[[Sweep, Path], None]:
    """What writes a file of that name; whether it can is known before anything is run."""
    kind = _kind(path, argument)
    if kind == ".npz":
        return _write_npz
    needs("xarray", "sweep")
    if kind == ".zarr":
        needs("zarr", "sweep")
        return _write_zarr
    needs("scipy", "sweep")
    return lambda sweep, path: sweep.to_xarray().to_netcdf(path, engine="scipy")


def _write_npz(sweep: Sweep, path: Path) -> None:
    _pack(path, [sweep.axes, sweep._saved, sweep.record_axes], sweep.about)


def _write_zarr(sweep: Sweep, path: Path) -> None:
    sweep.to_xarray().to_zarr(path, mode="w", consolidated=False)


def _read_npz(path: Path) -> tuple[Sweep, str | None]:
    (axes, records, record_axes), about, checksum = _unpacked(path)
    ok = records.pop(_OK, None)
    return Sweep(axes, records, record_axes, about, ok), checksum


def _of_xarray(path: Path, kind: str) -> tuple[Sweep, str | None]:
    xarray = needs("xarray", "sweep")
    how = {"engine": "zarr", "consolidated": False} if kind == ".zarr" else {"engine": "scipy"}
    # Seconds and milliseconds are ours, and no dates.
    with xarray.open_dataset(path, decode_times=False, decode_timedelta=False, **how) as data:
        about, axes, records = (json.loads(data.attrs[n]) for n in ("about", "axes", "records"))
        checksum = json.loads(data.attrs.get(files.CHECKSUM, "null"))
        read = {
            n: units.attach(np.asarray(x.values), units.parsed(x.attrs["units"])) for n, x in data.variables.items()
        }
    record_axes = {n: read[_axis_of(n)] for n in records if _axis_of(n) in read}
    recorded = {n: read[n] for n in records}
    return Sweep({n: read[n] for n in axes}, recorded, record_axes, about, read.get(_OK)), checksum


def _axis_of(name: str) -> str:
    return f"{name}_axis"
