"""Sweeps on disk: a grid as ``.npz``, NetCDF or Zarr."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import brainunit as u
import numpy as np

from . import files, units
from .archives import digest_of, pack, unpack
from .extras import needs

_FORMAT = "brainmass_kernels sweep"
#: The record of which points stayed finite.
OK = "ok"
#: The last axis of a record of networks.
REGION = "region"
_WHAT, _REMEDY = "a sweep saved by this brainmass_kernels", "take a copy of it, or run the sweep again"
# Names of types or attributes in one of the formats, and characters that one of them cannot write.
_RESERVED = frozenset("byte char short ushort int uint int64 uint64 float real double bool string".split())
_NAME = re.compile(r"(?!__)[^\W]([^/\\\x00-\x1f\x7f]*[^/\\\s\x00-\x1f\x7f])?")


class Contents(NamedTuple):
    """What the file of a sweep holds, quantities by name; `OK` is one of the records.

    Attributes
    ----------
    axes, records, record_axes, about : as of `Sweep`
    """

    axes: dict[str, Any]
    records: dict[str, Any] | Stored
    record_axes: dict[str, Any]
    about: dict[str, Any]

    def checksum(self) -> str:
        """The same in every format."""
        return digest_of(self[:3], self.about)

    def dataset(self):
        """An ``xarray.Dataset``; units are attributes of its variables and coordinates."""
        xarray = needs("xarray", "sweep")
        variables, coords = {}, {}
        for name, axis in [*self.axes.items(), *((axis_of(n), x) for n, x in self.record_axes.items())]:
            coords[name] = ((name,), np.asarray(u.get_magnitude(axis)), {"units": str(units.unit_of(axis))})
        for name, x in self.records.items():
            variables[name] = (self._dims(name), np.asarray(u.get_magnitude(x)), {"units": str(units.unit_of(x))})
        # Not every format keeps the order of its variables.
        names = [n for n in self.records if n != OK]
        attributes = {"about": self.about, "axes": list(self.axes), "records": names, files.CHECKSUM: self.checksum()}
        texts = {n: json.dumps(x) for n, x in attributes.items()}
        return xarray.Dataset(variables, coords, {"format": _FORMAT, **texts})

    def _dims(self, name: str) -> list[str]:
        head = [None] * (name in self.record_axes)
        tail = np.shape(u.get_magnitude(self.records[name]))[len(head) + len(self.axes) :]
        return dims_of(name, self.axes, head, tail, self._regions())

    def _regions(self) -> int | None:
        """The size of the axis `REGION`: the largest last axis of a record that is no matrix."""
        heads = {n: (n in self.record_axes) + len(self.axes) for n in self.records}
        tails = (np.shape(u.get_magnitude(x))[heads[n] :] for n, x in self.records.items())
        return max((tail[0] for tail in tails if len(tail) == 1), default=None)


def dims_of(name: str, axes, head: Sequence, tail: Sequence[int], regions: int | None) -> list[str]:
    """The names of a record's axes; ``head`` has an element, and ``tail`` the size, of each that is not the grid's."""
    own = f"{name}_{REGION}"
    shared = len(tail) == 1 and tail[0] == regions
    sides = [REGION] if shared else [own, f"{own}_2"][: len(tail)]
    return [*(axis_of(name) for _ in head), *axes, *sides]


def axis_of(name: str) -> str:
    """The name of a record's first axis in a file."""
    return f"{name}_axis"


def check_names(axes: Mapping[str, Any], records, record_axes) -> None:
    """Raise ValueError if one of the formats cannot hold a record's name."""
    taken = {**dict.fromkeys(axes, "swept"), OK: "that of which points stayed finite"}
    for name in (*records, *map(axis_of, record_axes)):
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


# The grid -----------------------------------------------------------------------------------------------------------


def place(path: str | os.PathLike, argument: str) -> Path:
    """The absolute path of a file that can be written there; only a folder that is a Zarr store is replaced."""
    folder = kind_of(path, argument) == ".zarr"
    absolute = files.absolute(path, argument, folder)
    if folder and absolute.is_dir() and not any((absolute / n).exists() for n in ("zarr.json", ".zgroup", ".zattrs")):
        raise ValueError(f"'{argument}' got {os.fspath(path)}, which is a folder, and no Zarr store")
    return absolute


def write(path: str | os.PathLike, contents: Contents) -> None:
    """Write a file of the kind that its name says, whole or not at all."""
    write_contents, target = _writer(path), place(path, "path")
    check_names(contents.axes, [n for n in contents.records if n != OK], contents.record_axes)
    kind = kind_of(path, "path")
    complex_ones = [n for n, x in contents.records.items() if np.iscomplexobj(u.get_magnitude(x))]
    if kind == ".nc" and complex_ones:
        name = os.path.basename(os.fspath(path))
        raise ValueError(
            f"'path' got {name}, but a .nc holds no complex numbers, as of {complex_ones[0]}: take .npz or .zarr"
        )
    with files.replacing(target, folder=kind == ".zarr") as aside:
        write_contents(contents, aside)


def _writer(path: str | os.PathLike) -> Callable[[Contents, Path], Any]:
    """What writes a file of that name; it imports the packages for it at once."""
    kind = kind_of(path, "path")
    if kind == ".npz":
        return lambda contents, aside: pack(aside, contents[:3], contents.about, _FORMAT)
    for package in ("xarray", "zarr" if kind == ".zarr" else "scipy"):
        needs(package, "sweep")
    if kind == ".zarr":
        return lambda contents, aside: contents.dataset().to_zarr(aside, mode="w", consolidated=False)
    return lambda contents, aside: contents.dataset().to_netcdf(aside, engine="scipy")


def read(path: Path) -> tuple[Contents, str | None]:
    """The contents of a file, and the checksum in it.

    Early files lack one. So does a store that a sweep wrote chunk by chunk: it has a checksum for each chunk, its
    records are `Stored`, and each is read when it is asked for.
    """
    kind = kind_of(path, "path")
    if kind == ".npz":
        (axes, records, record_axes), about, checksum = unpack(path, _FORMAT)
        return Contents(axes, records, record_axes, about), checksum
    with opened(path) as data:
        about, axes, records = (json.loads(data.attrs[n]) for n in ("about", "axes", "records"))
        checksum = json.loads(data.attrs.get(files.CHECKSUM, "null"))
        names, lazy = [*records, *([OK] if OK in data.variables else [])], "tile" in data.attrs
        wanted = [n for n in data.variables if not lazy or n not in records]
        values = {
            n: units.attach(np.asarray(data.variables[n].values), units.parsed(data.variables[n].attrs["units"]))
            for n in wanted
        }
    record_axes = {n: values[axis_of(n)] for n in records if axis_of(n) in values}
    kept = {n: values[n] for n in names if n in values}
    if lazy:
        kept = Stored(path, tuple(records), kept)
        kept.check()
    return Contents({n: values[n] for n in axes}, kept, record_axes, about), checksum


def opened(path: Path):
    """A file as xarray opens it: nothing is read before it is asked for."""
    options = {"engine": "zarr", "consolidated": False} if kind_of(path, "path") == ".zarr" else {"engine": "scipy"}
    # With decoding, xarray would turn seconds and milliseconds into dates.
    return needs("xarray", "sweep").open_dataset(path, decode_times=False, decode_timedelta=False, **options)


def digest_in(path: Path) -> str | None:
    """The digest of the sweep that a file says it holds; ``None`` of anything else, damaged files included."""
    try:
        with files.damaged(path, _WHAT, _REMEDY):
            if kind_of(path, "path") == ".npz":
                with open(path, "rb") as file, np.load(file) as archive:
                    return json.loads(str(archive["about"]))["about"].get("digest")
            with opened(path) as data:
                return json.loads(data.attrs["about"]).get("digest")
    except (FileNotFoundError, ValueError):
        return None


class Stored(Mapping[str, Any]):
    """The records in a Zarr store, by name; each is read anew whenever it is asked for, and none is kept.

    Parameters
    ----------
    path : of the store
    names : of the records
    beside : what has been read already, by name
    """

    def __init__(self, path: Path, names: tuple[str, ...], beside: Mapping[str, Any]):
        self.path, self._names, self._beside = Path(os.path.abspath(path)), names, dict(beside)

    def __iter__(self) -> Iterator[str]:
        return iter((*self._names, *self._beside))

    def __len__(self) -> int:
        return len(self._names) + len(self._beside)

    def __contains__(self, name) -> bool:
        return name in self._names or name in self._beside

    def __getitem__(self, name: str):
        if name in self._beside:
            return self._beside[name]
        if name not in self._names:
            raise KeyError(name)
        with files.damaged(self.path, _WHAT, _REMEDY):
            array = self._array(name)
            return units.attach(np.asarray(array[...]), units.parsed(array.attrs["units"]))

    def __repr__(self) -> str:
        return f"Stored({', '.join(self)} in {self.path.name})"

    def pop(self, name: str, default=None):
        """Take out what has been read already."""
        return self._beside.pop(name, default)

    def unit_and_shape(self, name: str) -> tuple[Any, tuple[int, ...]]:
        """Of a record that is not read; "" for a plain number."""
        array = self._array(name)
        unit = units.parsed(array.attrs["units"])
        return "" if unit.is_unitless else unit, array.shape

    def check(self) -> None:
        """Raise ValueError if a chunk is missing; Zarr would fill it in."""
        for name in self._names:
            array = self._array(name)
            if array.nchunks_initialized != array.nchunks:
                missing = array.nchunks - array.nchunks_initialized
                raise ValueError(f"{missing:,} of the {array.nchunks:,} chunks of {name} are missing")

    def _array(self, name: str):
        return needs("zarr", "sweep").open_array(self.path / name, mode="r")


def kind_of(path: str | os.PathLike, argument: str) -> str:
    """The ending of a file's name, which decides its format."""
    kind = Path(path).suffix.lower()
    if kind not in (".npz", ".nc", ".zarr"):
        raise ValueError(f"'{argument}' got {os.fspath(path)}, but takes a name that ends in .npz, .nc or .zarr")
    return kind
