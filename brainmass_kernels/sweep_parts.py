"""The finished chunks of a sweep: in memory, as files beside the result, or as regions of one Zarr store.

Chunks in files are shared: any process on any machine that reads the folder may add to them. Each is written whole or
not at all, and never changes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import brainunit as u
import numpy as np

from . import files, identity, sweep_files, units
from .archives import digest_of, pack, unpack
from .extras import needs
from .grids import Grid, Tiles
from .sweep_files import OK

# Of the manifest of chunks; version 1 has no digests of the traced programs, and cannot be compared.
_VERSION = 2
_FORMAT = "brainmass_kernels sweep"
_PART = "part of an interrupted sweep"


class Chunk(NamedTuple):
    """What one chunk recorded: quantities of plain arrays with the points last, or before the regions of a network."""

    records: dict[str, Any]
    record_axes: dict[str, Any]


class InMemory(dict[int, Chunk]):
    """Chunks of a sweep that is not written."""

    def has(self, number: int) -> bool:
        return number in self

    def read(self, number: int) -> Chunk:
        return self[number]

    def write(self, number: int, chunk: Chunk) -> None:
        self[number] = chunk


@dataclasses.dataclass(frozen=True)
class Parts:
    """Chunks in files of a folder beside the result.

    Attributes
    ----------
    folder : of the chunks
    sweep : a digest of the sweep that they are part of
    """

    folder: Path
    sweep: str

    def _path(self, number: int) -> Path:
        return self.folder / f"chunk{number:06d}.npz"

    def has(self, number: int) -> bool:
        return self._path(number).exists()

    def read(self, number: int) -> Chunk:
        """A finished chunk.

        Raises
        ------
        FileNotFoundError, ValueError : there is none, or it is damaged
        """
        path = self._path(number)
        with files.damaged(path, _PART, f"delete {path}, and the same sweep runs that chunk again"):
            groups, about, checksum = unpack(path, _FORMAT)
            if about != self._about(number):
                raise ValueError("it is of another sweep")
            if checksum != digest_of(groups, about):
                raise ValueError("its checksum is that of other contents")
            return Chunk(*groups)

    def write(self, number: int, chunk: Chunk) -> None:
        with files.replacing(self._path(number)) as aside:
            pack(aside, chunk, self._about(number), _FORMAT)

    def _about(self, number: int) -> dict[str, Any]:
        return {"sweep": self.sweep, "chunk": number}

    def remove(self) -> None:
        """Remove the folder in one step: chunks without their manifest would look like another sweep's."""
        condemned = _condemned(self.folder)
        files.remove(condemned)
        try:
            os.replace(self.folder, condemned)
            files.remove(condemned)
        except OSError as error:
            # Another worker has moved it away, or still has a file of it open on a network's file system, where an
            # open file keeps its folder; the next call removes that.
            if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY):
                raise


@dataclasses.dataclass(frozen=True)
class Regions(Parts):
    """Chunks in one Zarr store, which becomes the result: a chunk of the sweep is a chunk of each Zarr array.

    Nobody holds more than a chunk in memory, and no two chunks share a file. A mark tells that a chunk is whole.

    Attributes
    ----------
    grid, tiles : of the sweep
    about : what the result says of itself
    """

    grid: Grid
    tiles: Tiles
    about: dict[str, Any]

    @property
    def store(self) -> Path:
        return self.folder / "store.zarr"

    def _path(self, number: int) -> Path:
        return self.folder / f"chunk{number:06d}.json"

    def has(self, number: int) -> bool:
        # Once the store has become the result, the marks tell nothing.
        return self.store.exists() and super().has(number)

    def write(self, number: int, chunk: Chunk) -> None:
        if not self.store.exists():
            self._create(chunk)
        group, block = needs("zarr", "sweep").open_group(self.store, mode="r+"), self.tiles.block(number)
        slices = self.tiles.slices(number)
        extent = tuple(s.stop - s.start for s in slices)
        for name, x in chunk.records.items():
            array = group[name].with_config({"write_empty_chunks": True})
            head, tail = self._around(name, chunk)
            where = (*(slice(None) for _ in head), *slices, *(slice(None) for _ in tail))
            values = np.asarray(u.get_magnitude(x)).reshape(*head, *extent, *tail)
            array[where] = values
            files.flush(self.store.joinpath(name, "c", *map(str, (*(0 for _ in head), *block, *(0 for _ in tail)))))
            if array[where].tobytes() != values.tobytes():
                raise OSError(f"{self.store / name} is not what was written to it")
        files.write_document(self._path(number), self._about(number))

    def _around(self, name: str, chunk: Chunk) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The lengths of a record's axes before and after those of the grid."""
        shape, at = np.shape(u.get_magnitude(chunk.records[name])), int(name in chunk.record_axes)
        return shape[:at], shape[at + 1 :]

    def _create(self, chunk: Chunk) -> None:
        """An empty store of the whole grid's shape; of those that workers make at once, the first stays."""
        aside = files.beside(self.store)
        try:
            self._write_empty(aside, chunk)
            os.rename(aside, self.store)
        except OSError:
            if not self.store.exists():
                raise
        finally:
            files.remove(aside)

    def _write_empty(self, path: Path, chunk: Chunk) -> None:
        zarr = needs("zarr", "sweep")
        # The second codec adds a checksum to each chunk.
        codecs = [zarr.codecs.ZstdCodec(level=3), zarr.codecs.Crc32cCodec()]
        names = [n for n in chunk.records if n != OK]
        texts = {"about": self.about, "axes": list(self.grid.axes), "records": names, "tile": list(self.tiles.tile)}
        attributes = {"format": _FORMAT, **{n: json.dumps(x) for n, x in texts.items()}}
        group = zarr.open_group(path, mode="w", zarr_format=3, attributes=attributes)
        coordinates = {**self.grid.axes, **{sweep_files.axis_of(n): x for n, x in chunk.record_axes.items()}}
        for name, x in coordinates.items():
            values, attributes = np.asarray(u.get_magnitude(x)), {"units": str(units.unit_of(x))}
            array = group.create_array(
                name, shape=values.shape, chunks=values.shape, dtype=values.dtype, compressors=codecs,
                dimension_names=[name], attributes=attributes, config={"write_empty_chunks": True},
            )  # fmt: skip
            array[...] = values
        for name, x in chunk.records.items():
            (head, tail), dtype = self._around(name, chunk), np.asarray(u.get_magnitude(x)).dtype
            group.create_array(
                name, shape=(*head, *self.grid.shape, *tail), chunks=(*head, *self.tiles.tile, *tail), dtype=dtype,
                compressors=codecs,
                dimension_names=sweep_files.dims_of(name, self.grid.axes, head, tail, math.prod(self.grid.regions)),
                attributes={"units": str(units.unit_of(x))}, fill_value=np.nan if dtype.kind == "f" else 0,
            )  # fmt: skip


def _condemned(folder: Path) -> Path:
    """The name of a finished sweep's folder while it is removed."""
    return folder.with_name(f"{folder.name}.done")


# The folder ---------------------------------------------------------------------------------------------------------


def folder_of(out: Path) -> Path:
    """The folder of a result's chunks; that of a Zarr store lies on the store's own disk, as it becomes the result."""
    return Path(f"{os.path.realpath(out) if out.suffix.lower() == '.zarr' else out}.parts")


@contextlib.contextmanager
def locked(out: Path, sweep: Mapping[str, str], part: tuple[int, int] | None = None) -> Iterator[Path]:
    """The folder of a sweep's chunks, for this run alone, or shared with those that do other parts.

    Parameters
    ----------
    out : the file of the result
    sweep : what tells it from other sweeps, by name
    part : which part of how many

    Raises
    ------
    ValueError : the folder is in use, damaged, or of another sweep
    """
    folder = folder_of(out)
    files.remove(_condemned(folder))
    with files.exclusive(folder, part and f"part{part[0]}of{part[1]}"):
        _check_manifest(folder, dict(sweep))
        yield folder


def chunk_in(out: Path) -> int | None:
    """The size of the chunks that an earlier run or another worker has begun."""
    folder = folder_of(out)
    sweep = _manifest(folder) if folder.exists() else None
    return int(sweep["chunk"]) if sweep and "chunk" in sweep else None


def _manifest(folder: Path) -> dict[str, str] | None:
    """What the chunks in a folder are part of; ``None`` if nobody has written it."""
    path, remedy = folder / "sweep.json", f"delete {folder}, and the sweep begins anew"
    with files.damaged(path, _PART, remedy):
        try:
            manifest = files.read_document(path)
        except FileNotFoundError:
            return None
        if manifest["format"] != _FORMAT:
            raise ValueError(f"its format is {manifest['format']!r}")
        sweep = manifest["sweep"] if manifest.get("version") == _VERSION else None
    if sweep is None:
        raise ValueError(f"{folder} holds chunks of another version of brainmass_kernels: {remedy}")
    return sweep


def _check_manifest(folder: Path, sweep: dict[str, str]) -> None:
    """Write what the chunks in a folder are part of, or compare it with what another run wrote."""
    orphans = any(folder.glob("chunk*"))
    other = _manifest(folder)
    if other is None:
        # A worker writes the manifest before its first chunk.
        if orphans:
            raise ValueError(f"{folder} holds chunks, but no sweep.json that tells what they are of: delete it")
        # Workers that begin at once write the same; the last stays.
        files.write_document(folder / "sweep.json", {"format": _FORMAT, "version": _VERSION, "sweep": sweep})
        other = _manifest(folder)
    if difference := identity.difference(other or {}, sweep):
        raise ValueError(
            f"{folder} holds chunks of a sweep with other arguments: delete it, or give 'out' another name. "
            f"What differs: {difference}"
        )
