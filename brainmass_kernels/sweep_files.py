"""Sweeps on disk: a grid as ``.npz``, NetCDF or Zarr, and the chunks of a sweep that has not ended."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import brainunit as u
import numpy as np

from . import files, identity, units
from .archives import digest_of, pack, unpack
from .extras import needs

_FORMAT = "brainmass_kernels sweep"
#: The record of which points stayed finite.
OK = "ok"
# Of the manifest of chunks; version 1 has no digests of the traced programs, and cannot be compared.
_VERSION = 2
_PART = "part of an interrupted sweep"
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
    records: dict[str, Any]
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
            dims = (*([axis_of(name)] if name in self.record_axes else []), *self.axes)
            variables[name] = (dims, np.asarray(u.get_magnitude(x)), {"units": str(units.unit_of(x))})
        # Not every format keeps the order of its variables.
        names = [n for n in self.records if n != OK]
        attributes = {"about": self.about, "axes": list(self.axes), "records": names, files.CHECKSUM: self.checksum()}
        texts = {n: json.dumps(x) for n, x in attributes.items()}
        return xarray.Dataset(variables, coords, {"format": _FORMAT, **texts})


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
    with files.replacing(target, folder=kind_of(path, "path") == ".zarr") as aside:
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
    """The contents of a file, and the checksum in it, which early files lack."""
    kind = kind_of(path, "path")
    if kind == ".npz":
        (axes, records, record_axes), about, checksum = unpack(path, _FORMAT)
        return Contents(axes, records, record_axes, about), checksum
    xarray = needs("xarray", "sweep")
    options = {"engine": "zarr", "consolidated": False} if kind == ".zarr" else {"engine": "scipy"}
    # Without decoding, xarray would turn seconds and milliseconds into dates.
    with xarray.open_dataset(path, decode_times=False, decode_timedelta=False, **options) as data:
        about, axes, records = (json.loads(data.attrs[n]) for n in ("about", "axes", "records"))
        checksum = json.loads(data.attrs.get(files.CHECKSUM, "null"))
        values = {
            n: units.attach(np.asarray(x.values), units.parsed(x.attrs["units"])) for n, x in data.variables.items()
        }
    record_axes = {n: values[axis_of(n)] for n in records if axis_of(n) in values}
    names = [*records, *([OK] if OK in values else [])]
    return Contents({n: values[n] for n in axes}, {n: values[n] for n in names}, record_axes, about), checksum


def kind_of(path: str | os.PathLike, argument: str) -> str:
    """The ending of a file's name, which decides its format."""
    kind = Path(path).suffix.lower()
    if kind not in (".npz", ".nc", ".zarr"):
        raise ValueError(f"'{argument}' got {os.fspath(path)}, but takes a name that ends in .npz, .nc or .zarr")
    return kind


# Chunks -------------------------------------------------------------------------------------------------------------


class Chunk(NamedTuple):
    """What one chunk recorded: quantities of plain arrays with the masses last."""

    records: dict[str, Any]
    record_axes: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Parts:
    """Finished chunks in a folder beside the result, each written whole or not at all; without a folder, nothing.

    Attributes
    ----------
    folder : of the chunks
    sweep : a digest of the sweep that they are part of
    """

    folder: Path | None = None
    sweep: str = ""

    def _path(self, number: int) -> Path:
        assert self.folder is not None
        return self.folder / f"chunk{number:06d}.npz"

    def has(self, number: int) -> bool:
        return self.folder is not None and self._path(number).exists()

    def read(self, number: int) -> Chunk | None:
        """A finished chunk; ``None`` if it is still to be run."""
        if not self.has(number):
            return None
        path = self._path(number)
        with files.damaged(path, _PART, f"delete {path}, and the same sweep runs that chunk again"):
            groups, about, checksum = unpack(path, _FORMAT)
            if about != self._about(number):
                raise ValueError("it is of another sweep")
            if checksum != digest_of(groups, about):
                raise ValueError("its checksum is that of other contents")
            return Chunk(*groups)

    def write(self, number: int, chunk: Chunk) -> None:
        if self.folder is not None:
            with files.replacing(self._path(number)) as aside:
                pack(aside, chunk, self._about(number), _FORMAT)

    def _about(self, number: int) -> dict[str, Any]:
        return {"sweep": self.sweep, "chunk": number}

    def remove(self) -> None:
        """Remove the folder in one step: chunks without their manifest would look like another sweep's."""
        if self.folder is not None:
            condemned = _condemned(self.folder)
            files.remove(condemned)
            os.replace(self.folder, condemned)
            shutil.rmtree(condemned)


def _condemned(folder: Path) -> Path:
    """The name of a finished sweep's folder while it is removed."""
    return folder.with_name(f"{folder.name}.done")


@contextlib.contextmanager
def parts_of(out: Path, sweep: Mapping[str, str]) -> Iterator[Parts]:
    """The chunks of a sweep, for this run alone.

    Parameters
    ----------
    out : the file of the result
    sweep : what tells it from other sweeps, by name

    Raises
    ------
    ValueError : the folder is in use, damaged, or of another sweep
    """
    folder = Path(f"{out}.parts")
    files.remove(_condemned(folder))
    with files.exclusive(folder):
        _check_manifest(folder, dict(sweep))
        yield Parts(folder, files.checksum(dict(sweep)))


def _check_manifest(folder: Path, sweep: dict[str, str]) -> None:
    """Write what the chunks in a folder are part of, or compare it with what an earlier run wrote."""
    path, remedy = folder / "sweep.json", f"delete {folder}, and the sweep begins anew"
    if not path.exists():
        if any(folder.glob("chunk*.npz")):
            raise ValueError(f"{folder} holds chunks, but no sweep.json that tells what they are of: delete it")
        files.write_document(path, {"format": _FORMAT, "version": _VERSION, "sweep": sweep})
    with files.damaged(path, _PART, remedy):
        manifest = files.read_document(path)
        if manifest["format"] != _FORMAT:
            raise ValueError(f"its format is {manifest['format']!r}")
        other = manifest["sweep"] if manifest.get("version") == _VERSION else None
    if other is None:
        raise ValueError(f"{folder} holds chunks of another version of brainmass_kernels: {remedy}")
    if difference := identity.difference(other, sweep):
        raise ValueError(
            f"{folder} holds chunks of a sweep with other arguments: delete it, or give 'out' another name. "
            f"What differs: {difference}"
        )
