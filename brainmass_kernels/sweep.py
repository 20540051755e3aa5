"""Grids over parameters: chunk by chunk in bounded memory, kept on disk, and gone on with when interrupted."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import shutil
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np

from . import dispatch, units
from .extras import needs
from .interrupts import heard
from .models.base import Model, check_name
from .recording import Maximum, Mean, Minimum, PeakFrequency, Reduction
from .simulate import explain, simulate

#: Masses of one chunk: enough to fill the device, few enough that a chunk is soon done and fits.
CHUNK = {"cpu": 65_536}
CHUNK_ELSEWHERE = 1_048_576
#: Where the peak of power is looked for, in Hz.
PEAKS = np.arange(1.0, 40.5, 0.5)
_FORMAT = "brainmass_kernels sweep"


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What a grid of runs recorded; ``sweep["eeg_mean"]`` is one record.

    Attributes
    ----------
    axes : the values of each swept parameter, ``(n,)``, in order
    records : by name, ``(*grid)``, or ``(M, *grid)`` with an axis of its own
    record_axes : that axis, such as the frequencies of a spectrum
    about : model, time step, implementation, versions
    """

    axes: dict[str, Any]
    records: dict[str, Any]
    record_axes: dict[str, Any]
    about: dict[str, Any]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the grid."""
        return tuple(len(x) for x in self.axes.values())

    def __getitem__(self, name: str):
        check_name(name, self.records, "record")
        return self.records[name]

    def __repr__(self) -> str:
        grid = " x ".join(f"{len(x)} {name}" for name, x in self.axes.items())
        return f"Sweep({grid}: {', '.join(self.records)})"

    def save(self, path: str | os.PathLike) -> None:
        """Write the grid with its units and coordinates, as ``.npz``, or through xarray as ``.nc`` or ``.zarr``."""
        write = _writer(path)
        aside = Path(f"{os.fspath(path)}.new")
        write(self, aside)
        _replace(aside, Path(path))

    @classmethod
    def load(cls, path: str | os.PathLike) -> Sweep:
        """Read what `save` wrote.

        Raises
        ------
        FileNotFoundError, ValueError : there is no such file, or it is not a saved sweep
        """
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"'path' got {path}, but there is no file of that name")
        kind = _kind(path)
        try:
            return _read_npz(path) if kind == ".npz" else _of_xarray(path, kind)
        except (KeyError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path.name}: not a sweep saved by this brainmass_kernels ({error!r})") from error

    def to_xarray(self):
        """The grid as an ``xarray.Dataset``; units are attributes of its variables and coordinates."""
        xarray = needs("xarray", "sweep")
        variables, coords = {}, {}
        for name, axis in [*self.axes.items(), *((_axis_of(n), x) for n, x in self.record_axes.items())]:
            coords[name] = ((name,), np.asarray(u.get_magnitude(axis)), {"units": str(units.unit_of(axis))})
        for name, x in self.records.items():
            dims = (*([_axis_of(name)] if name in self.record_axes else []), *self.axes)
            variables[name] = (dims, np.asarray(u.get_magnitude(x)), {"units": str(units.unit_of(x))})
        # Not every format keeps the order of its variables.
        told = {"about": self.about, "axes": list(self.axes), "records": list(self.records)}
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
    out : a file, ``.npz``, ``.nc`` or ``.zarr``; finished chunks lie in a folder beside it until all are there
    chunk : masses run together; by device if not given
    key : a JAX random key; the noise of a point depends on the key and its place in the grid, not on the chunk
    progress : print a line a chunk, or a function that takes it
    **arguments : of `simulate`: ``inputs``, ``noise``, ``initial``, ``every``, ``transient``, ``scheme``, ...

    Returns
    -------
    Sweep

    Raises
    ------
    ValueError, TypeError : an argument's name, unit, shape or value; chunks on disk that are of another sweep
    """
    grid = _Grid.of(model, over)
    size = min(grid.points, _chunk(chunk))
    record = _default(model) if record is None else record
    everything = {"duration": duration, "dt": dt, "record": record, **arguments}
    parts = _Parts.of(out, _digest(model, over, everything, size, key))
    say = print if progress is True else progress or (lambda _: None)
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
    joined = {n: _joined(n, [c[n] for c in chunks], grid) for n in chunks[0]}
    result = Sweep(grid.axes, joined, axes, _about(model, grid, size, key, everything))
    if out is not None:
        result.save(out)
        parts.remove()
    return result


def sweepable(model: type[Model]) -> dict[str, Any]:
    """The unit of everything that can be swept: parameters, inputs, and the noise on these."""
    inputs = {n: units.unit_of(x) for n, x in model.inputs.items()}
    noise = {f"noise.{n}": unit * model.time_unit**0.5 for n, unit in inputs.items()}
    return {**model.parameter_units(), **inputs, **noise}


# The grid -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Grid:
    """The points of a sweep, in C order over its axes."""

    axes: dict[str, Any]

    @classmethod
    def of(cls, model: Model, over: Mapping[str, Any]) -> _Grid:
        if not isinstance(model, Model):
            raise TypeError(
                f"'model' got {type(model).__name__}, but takes a model such as bk.JansenRit(); a network is swept by "
                f"giving arrays of shape (networks, 1) to simulate()"
            )
        if not over:
            raise ValueError("'over' got nothing, but takes one or several parameters and their values")
        known, axes = sweepable(type(model)), {}
        for name, values in over.items():
            check_name(name, known, "parameter or input")
            unit = known[name]
            values = np.asarray(units.strip(values, unit, name, getattr(model, "also", {}).get(name)), float)
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
    values = grid.at(places)
    arguments = dict(everything)
    inputs, noise = dict(arguments.pop("inputs", None) or {}), dict(arguments.pop("noise", None) or {})
    parameters = {}
    for name, x in values.items():
        kind, _, of = name.rpartition(".")
        if kind == "noise":
            noise[of] = x
        elif name in model.inputs:
            inputs[name] = x
        else:
            parameters[name] = x
    keys = None if key is None else jax.vmap(lambda place: jax.random.fold_in(key, place))(jnp.asarray(places))
    swept = dataclasses.replace(model, **parameters)  # pyright: ignore[reportArgumentType]
    return {**arguments, "model": swept, "inputs": inputs, "noise": noise, "key": keys}


def _run(model: Model, grid: _Grid, places: np.ndarray, key, everything: dict) -> _Chunk:
    found = simulate(**_call(model, grid, places, key, everything))
    # This wait can be interrupted; to copy what is not ready cannot.
    jax.block_until_ready(found.records)
    inside = int((places < grid.points).sum())
    records = {n: _on_host(x, (..., slice(inside))) for n, x in found.records.items()}
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
    from . import __version__

    plan = explain(**_call(model, grid, np.arange(size), key, everything))
    return {
        "model": type(model).__name__,
        "duration": str(everything["duration"]),
        "dt": str(everything["dt"]),
        "masses": grid.points,
        "implementation": plan.implementation,
        "versions": {"brainmass_kernels": __version__, "jax": metadata.version("jax")},
    }


# On disk ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Parts:
    """Finished chunks in a folder beside the result, each written whole or not at all; without a folder, nothing."""

    folder: Path | None

    @classmethod
    def of(cls, out, digest: str) -> _Parts:
        if out is None:
            return cls(None)
        _writer(out)
        folder = Path(f"{os.fspath(out)}.parts")
        if not folder.parent.is_dir():
            raise ValueError(f"'out' got {out}, but there is no folder {folder.parent}")
        folder.mkdir(exist_ok=True)
        name = folder / "sweep.json"
        if not name.exists():
            _write_text(name, json.dumps({"format": _FORMAT, "digest": digest}))
        if json.loads(name.read_text())["digest"] != digest:
            raise ValueError(
                f"{folder} holds chunks of a sweep with other arguments: delete it, or give 'out' another name"
            )
        return cls(folder)

    def _path(self, number: int) -> Path:
        assert self.folder is not None
        return self.folder / f"chunk{number:06d}.npz"

    def has(self, number: int) -> bool:
        return self.folder is not None and self._path(number).exists()

    def done(self, count: int) -> int:
        return sum(map(self.has, range(count)))

    def read(self, number: int) -> _Chunk | None:
        return _Chunk(*_unpacked(self._path(number))[0]) if self.has(number) else None

    def write(self, number: int, chunk: _Chunk) -> None:
        if self.folder is not None:
            aside = self.folder / "new.npz"
            _pack(aside, [chunk.records, chunk.record_axes], {})
            os.replace(aside, self._path(number))

    def remove(self) -> None:
        if self.folder is not None:
            shutil.rmtree(self.folder)


def _digest(model: Model, over, everything: dict, size: int, key) -> str:
    """What tells sweeps apart, in a few letters."""
    from . import __version__

    data = jax.random.key_data(key) if key is not None and jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key
    leaves, tree = jax.tree.flatten([dict(over), model, everything, data])
    told = hashlib.sha256(f"{__version__} {type(model).__qualname__} {tree} {size}".encode())
    for leaf in leaves:
        array = np.asarray(leaf) if isinstance(leaf, (int, float, np.generic, np.ndarray, jax.Array)) else None
        told.update(repr(leaf).encode() if array is None else f"{array.dtype}{array.shape}".encode() + array.tobytes())
    return told.hexdigest()[:24]


def _pack(path: Path, groups: Sequence[Mapping[str, Any]], about: dict) -> None:
    """Write groups of quantities as one ``.npz``."""
    arrays = {f"{n}_{g}": np.asarray(u.get_magnitude(x)) for g, group in enumerate(groups) for n, x in group.items()}
    names = [{n: str(units.unit_of(x)) for n, x in group.items()} for group in groups]
    with open(path, "wb") as file:
        arrays["about"] = np.array(json.dumps({"format": _FORMAT, "units": names, "about": about}))
        np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]


def _unpacked(path: Path) -> tuple[list[dict], dict]:
    with np.load(path) as held:
        told = json.loads(str(held["about"]))
        groups = [
            {n: _quantity(held[f"{n}_{g}"], unit) for n, unit in group.items()} for g, group in enumerate(told["units"])
        ]
    return groups, told["about"]


def _quantity(magnitude, unit: str):
    return units.attach(magnitude, units.UNITLESS if unit == str(units.UNITLESS) else u.parse_unit(unit))


def _write_text(path: Path, text: str) -> None:
    aside = path.with_suffix(".new")
    aside.write_text(text)
    os.replace(aside, path)


def _replace(aside: Path, path: Path) -> None:
    """Put a file, or a folder, in another's place."""
    if path.is_dir():
        shutil.rmtree(path)
    os.replace(aside, path)


def _kind(path: str | os.PathLike) -> str:
    kind = Path(path).suffix.lower()
    if kind not in (".npz", ".nc", ".zarr"):
        raise ValueError(f"'out' got {os.fspath(path)}, but takes a name that ends in .npz, .nc or .zarr")
    return kind


def _writer(path: str | os.PathLike) -> Callable[[Sweep, Path], None]:
    """What writes a file of that name; whether it can is known before anything is run."""
    kind = _kind(path)
    if kind == ".npz":
        return _write_npz
    needs("xarray", "sweep")
    if kind == ".zarr":
        needs("zarr", "sweep")
        return lambda sweep, path: sweep.to_xarray().to_zarr(path, mode="w", consolidated=False)
    needs("scipy", "sweep")
    return lambda sweep, path: sweep.to_xarray().to_netcdf(path, engine="scipy")


def _write_npz(sweep: Sweep, path: Path) -> None:
    _pack(path, [sweep.axes, sweep.records, sweep.record_axes], sweep.about)


def _read_npz(path: Path) -> Sweep:
    (axes, records, record_axes), about = _unpacked(path)
    return Sweep(axes, records, record_axes, about)


def _of_xarray(path: Path, kind: str) -> Sweep:
    xarray = needs("xarray", "sweep")
    how = {"engine": "zarr", "consolidated": False} if kind == ".zarr" else {"engine": "scipy"}
    with xarray.open_dataset(path, **how) as data:
        about, axes, records = (json.loads(data.attrs[n]) for n in ("about", "axes", "records"))
        read = {n: _quantity(np.asarray(x.values), x.attrs["units"]) for n, x in data.variables.items()}
    record_axes = {n: read[_axis_of(n)] for n in records if _axis_of(n) in read}
    return Sweep({n: read[n] for n in axes}, {n: read[n] for n in records}, record_axes, about)


def _axis_of(name: str) -> str:
    return f"{name}_axis"
