"""Connectomes: weights and tract lengths between regions, from The Virtual Brain's files, tables and arrays."""

from __future__ import annotations

import bz2
import collections
import contextlib
import csv
import dataclasses
import importlib.util
import operator
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import brainunit as u
import numpy as np

from . import units
from .extras import needs

_INSTALL = "pip install 'brainmass-kernels[connectomes]'"
# The connectomes in the package tvb-data, used if it is not installed.
_PACKAGED = (66, 68, 76, 96, 192)
_TAKEN = "a zip or folder in The Virtual Brain's format, an npz or HDF5 of weights and lengths, or a table of weights"
# Endings of a table of one matrix.
_TABLES = (".csv", ".tsv", ".txt")
_HDF5 = b"\x89HDF\r\n\x1a\n"
_NO_NUMBERS = "is no row of numbers, with points as decimal marks and spaces, tabs, commas or semicolons in between"
# The names of each table, as a file or as an array in an npz.
_NAMES = {
    "weights": ("weights",),
    "lengths": ("tract_lengths", "lengths"),
    "centres": ("centres", "centers"),
    "labels": ("labels", "region_labels", "names in centres", "names in centers"),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Connectome:
    """Connections between regions; ``bk.Network(model, c.weights, distances=c.lengths, speed=...)`` takes them.

    Attributes
    ----------
    weights : ``(N, N)``; ``weights[i, j]`` is of the connection from region j to region i
    lengths : ``(N, N)``, of the tracts, in mm; ``None`` if they are unknown, as for a network without delays
    labels : of each region, if known
    centres : ``(N, 3)``, where each region is, in mm, or ``None``

    Raises
    ------
    ValueError : matrices that are not square, differ in size, or hold negative or infinite numbers; labels or centres
        of another number of regions
    """

    weights: np.ndarray
    lengths: Any = None
    labels: tuple[str, ...] = ()
    centres: Any = None

    def __post_init__(self):
        weights = np.asarray(self.weights, np.float64)
        if weights.ndim != 2 or weights.shape[0] != weights.shape[1]:
            raise ValueError(f"'weights' got shape {weights.shape}, but takes (N, N)")
        lengths = _lengths(self.lengths, weights.shape)
        if not np.isfinite(weights).all():
            raise ValueError("'weights' got NaN or infinite values, but takes finite numbers")
        object.__setattr__(self, "weights", weights)
        object.__setattr__(self, "lengths", lengths)
        object.__setattr__(self, "labels", _labels(self.labels, len(weights)))
        object.__setattr__(self, "centres", _centres(self.centres, len(weights)))

    @property
    def regions(self) -> int:
        """The number of regions."""
        return len(self.weights)

    def normalized(self, by: str = "max") -> Connectome:
        """The connectome with weights divided by the largest, or, by "rows", by the sum of each row."""
        if by not in ("max", "rows"):
            raise ValueError(f"'by' got '{by}', but takes 'max' or 'rows'")
        weights = self.weights * (1.0 - np.eye(self.regions))
        scale = weights.max() if by == "max" else weights.sum(axis=1, keepdims=True)
        return dataclasses.replace(self, weights=weights / np.where(scale > 0, scale, 1.0))

    def subset(self, which: Sequence) -> Connectome:
        """The connectome of some of the regions, each once.

        Parameters
        ----------
        which : their numbers or labels, in the order wanted, or a boolean for each region

        Raises
        ------
        ValueError : a region that is unknown, named twice or by a label of several; a mask of another length; fractions
        """
        chosen = self._chosen(which)
        grid = np.ix_(chosen, chosen)
        return Connectome(
            self.weights[grid],
            None if self.lengths is None else self.lengths[grid],
            tuple(self.labels[i] for i in chosen) if self.labels else (),
            None if self.centres is None else self.centres[chosen],
        )

    def _chosen(self, which) -> list[int]:
        """The numbers of the regions."""
        if isinstance(which, (str, bytes, set, frozenset)) or not isinstance(which, Iterable):
            raise ValueError(f"'which' got {which!r}, but takes a list of numbers or labels, or a mask")
        names = list(np.asarray(which) if hasattr(which, "dtype") else which)
        if names and all(isinstance(name, (bool, np.bool_)) for name in names):
            if len(names) != self.regions:
                raise ValueError(f"'which' got a mask of {len(names)}, but takes one of the {self.regions} regions")
            names = np.flatnonzero(names).tolist()
        if not names:
            raise ValueError("'which' got no region, but takes at least one")
        chosen = [self._number(name) for name in names]
        twice = [each for each, count in collections.Counter(chosen).items() if count > 1]
        if twice:
            names = ", ".join(self.labels[i] if self.labels else str(i) for i in twice)
            raise ValueError(f"'which' got some regions more than once ({names}), but takes each once")
        return chosen

    def _number(self, name) -> int:
        if isinstance(name, str):
            if name not in self.labels:
                raise ValueError(f"unknown region '{name}'. Known: {', '.join(self.labels) or 'none has a label'}")
            if self.labels.count(name) > 1:
                raise ValueError(f"'which' got '{name}', but {self.labels.count(name)} regions have this label")
            return self.labels.index(name)
        try:
            number = operator.index(name) if not isinstance(name, (bool, np.bool_)) else None
        except TypeError:
            number = None
        if number is None:
            raise ValueError(f"'which' got {name!r}, but takes whole numbers, labels, or a mask of all regions")
        if not -self.regions <= number < self.regions:
            raise ValueError(f"'which' got region {number}, but there are {self.regions}, from 0 to {self.regions - 1}")
        return number % self.regions

    def __repr__(self) -> str:
        count = np.count_nonzero(self.weights)
        tracts = "no lengths" if self.lengths is None else f"tracts to {float(self.lengths.mantissa.max()):.4g} mm"
        return f"Connectome({self.regions} regions, {count:,} connections, {tracts})"


def _lengths(lengths, shape: tuple[int, ...]):
    if lengths is None:
        return None
    plain = np.asarray(units.strip(lengths, u.mm, "lengths"), np.float64)
    if plain.shape != shape:
        raise ValueError(f"'lengths' got shape {plain.shape}, but takes {shape} as the weights have")
    if not (np.isfinite(plain).all() and (plain >= 0).all()):
        raise ValueError("'lengths' got negative or infinite values, but takes finite ones from 0 on")
    return u.Quantity(plain, unit=u.mm)


def _labels(labels, regions: int) -> tuple[str, ...]:
    if isinstance(labels, (str, bytes)):
        raise ValueError(f"'labels' got {labels!r}, but takes one name for each of the {regions} regions")
    if np.ndim(labels) > 1:
        raise ValueError(f"'labels' got shape {np.shape(labels)}, but takes ({regions},)")
    names = tuple(each.decode() if isinstance(each, bytes) else str(each) for each in labels)
    if names and len(names) != regions:
        raise ValueError(f"'labels' got {len(names)} names, but there are {regions} regions")
    return names


def _centres(centres, regions: int) -> np.ndarray | None:
    if centres is None:
        return None
    if isinstance(centres, u.Quantity):
        centres = units.strip(centres, u.mm, "centres")
    places = np.asarray(centres, np.float64)
    if places.shape != (regions, 3):
        raise ValueError(f"'centres' got shape {places.shape}, but takes ({regions}, 3)")
    if not np.isfinite(places).all():
        raise ValueError("'centres' got NaN or infinite values, but takes finite numbers")
    return places


def load_connectome(source, lengths=None) -> Connectome:
    """Read a connectome of the package ``tvb-data``, by its number of regions, or one in a file or in arrays.

    Parameters
    ----------
    source : one of these:

        - 66, 68, 76, 96 or 192, the regions of one in ``tvb-data``
        - a zip or folder in The Virtual Brain's format: text, ``weights.txt`` and ``tract_lengths.txt``, numbers with
          spaces, tabs, commas or semicolons in between; ``centres.txt``, in each line a region's label, which may have
          spaces, and three numbers; perhaps ``labels.txt``, a label a line. Each may be packed, as
          ``weights.txt.bz2``. All of them lie in one folder
        - an ``.npz``, or an HDF5 file (``.h5``, ``.hdf5``) such as The Virtual Brain's, of ``weights``, ``lengths`` in
          mm (or ``tract_lengths``) and perhaps ``labels`` (or ``region_labels``) and ``centres``
        - a ``.csv``, ``.tsv`` or ``.txt`` of the weights, one row a region, perhaps with the labels as its first row,
          its first column or both
        - an array of weights ``(N, N)``, a `pandas.DataFrame` of them with the labels as columns, or a dict of arrays
          with the names of an npz

    lengths : beside a table or an array of weights: another such table or array, in mm; ``None``, unknown

    Raises
    ------
    ImportError : ``tvb-data`` or h5py is needed and not installed
    ValueError : a number of regions that ``tvb-data`` lacks; a file that cannot be read, is of another kind, has
        several connectomes or tables that contradict each other, or what a `Connectome` refuses. The message names
        the file
    TypeError : lengths of another type

    References
    ----------
    Sanz-Leon et al. 2013, Frontiers in Neuroinformatics 7:10.
    """
    if isinstance(source, (int, np.integer)) and not isinstance(source, bool):
        source = _packaged(int(source))
    alone = _is_array(source) or (isinstance(source, (str, Path)) and Path(source).suffix.lower() in _TABLES)
    if lengths is not None and not alone:
        raise ValueError("'lengths' is for a table or an array of weights, but 'source' has its own")
    if alone:
        return _of_matrices(source, lengths)
    if isinstance(source, Mapping):
        tables = _gathered(_decoded({name: np.asarray(u.get_magnitude(x)) for name, x in source.items()}), "")
        return _of_tables(tables)
    if not isinstance(source, (str, Path)):
        raise ValueError(f"'source' got {source!r}, but takes a number of regions, {_TAKEN}, or arrays")
    path = _existing(source, "source")
    with _naming(path):
        read = _hdf5 if _head(path).startswith(_HDF5) else _arrays if path.suffix == ".npz" else _texts
        return _of_tables(read(path))


def _head(path: Path) -> bytes:
    """The first bytes of a file."""
    if path.is_dir():
        return b""
    with path.open("rb") as file:
        return file.read(512)


def _of_tables(tables: Mapping[str, Any]) -> Connectome:
    return Connectome(tables["weights"], tables["lengths"] * u.mm, tables.get("labels", ()), tables.get("centres"))


def _existing(source: str | Path, argument: str) -> Path:
    path = Path(source).expanduser()
    if not path.exists():
        raise ValueError(f"'{argument}' got {str(source)!r}, but there is no such file; by number tvb-data's are taken")
    return path


@contextlib.contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    """Raise an error of reading a file as a ValueError with its name."""
    try:
        yield
    except (OSError, EOFError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


# Matrices alone -----------------------------------------------------------------------------------------------------


def _is_array(source) -> bool:
    return hasattr(source, "__array__") or isinstance(source, (list, tuple, u.Quantity))


def _of_matrices(source, lengths) -> Connectome:
    """A connectome of one matrix, or of two, each a table or an array."""
    weights, labels = _labelled_matrix(source, "source")
    tracts, others = (None, ()) if lengths is None else _labelled_matrix(lengths, "lengths")
    if labels and others and labels != others:
        raise ValueError(f"'lengths' has other labels than the weights{_first_difference(labels, others)}")
    with _naming(source) if isinstance(source, (str, Path)) else contextlib.nullcontext():
        return Connectome(weights, None if tracts is None else u.Quantity(tracts, unit=u.mm), labels or others)


def _labelled_matrix(source, argument: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """A matrix and the labels of its regions, if it has any."""
    if isinstance(source, (str, Path)):
        path = _existing(source, argument)
        with _naming(path):
            return _table(path)
    if not _is_array(source):
        raise TypeError(f"'{argument}' got {type(source).__name__}, but takes a table or an array (N, N)")
    columns = getattr(source, "columns", ())
    labels = _names_in([str(c) for c in columns])
    if isinstance(source, u.Quantity):
        source = units.strip(source, u.mm if argument == "lengths" else units.UNITLESS, argument)
    return np.asarray(source, np.float64), labels


def _table(path: Path) -> tuple[np.ndarray, tuple[str, ...]]:
    """A square table of numbers, perhaps with labels as its first row, its first column or both."""
    if zipfile.is_zipfile(path) or _head(path).startswith(_HDF5):
        raise ValueError(f"it is no text: rename it to what it is; {_TAKEN} is taken")
    lines = _lines(path.read_bytes(), path.name)
    if not lines:
        raise ValueError("it holds no numbers")
    rows = [(number, line, _split(line)) for number, line in lines]
    head, side, first = [], [], rows[0][2]
    # The corner above the first column may be empty, or missing as R leaves it.
    short = len(rows) > 1 and len(first) == len(rows[1][2]) - 1
    corner = not _is_number(first[0]) and len(rows) == len(first)
    if short or corner or not all(map(_is_number, first[1:])) or (len(rows) == len(first) + 1 and _counts(first)):
        head, rows = first, rows[1:]
    column = [fields[0] for _, _, fields in rows]
    if not all(map(_is_number, column)) or (head and len(rows[0][2]) == len(rows) + 1 and _counts(column)):
        side, rows = column, [(number, line, fields[1:]) for number, line, fields in rows]
        head = head if short else head[1:]
    labels, others = _names_in(head), _names_in(side)
    if labels and others and labels != others:
        raise ValueError(f"its first row and its first column differ{_first_difference(labels, others)}")
    return _numbers(rows, path.name), labels or others


def _split(line: str) -> list[str]:
    separator = next((s for s in "\t;," if s in line), None)
    if separator is None:
        return line.split()
    return [field.strip() for field in next(csv.reader([line], delimiter=separator, skipinitialspace=True))]


def _is_number(field: str) -> bool:
    """Whether a field is no label; decimal commas are refused later, by the line."""
    return _NUMBER.fullmatch(field.replace(",", ".")) is not None


def _counts(labels: Sequence[str]) -> bool:
    """Whether labels only count the regions, from 0 or from 1."""
    return [*labels] in ([str(i) for i in range(first, len(labels) + first)] for first in (0, 1))


def _names_in(labels: Sequence[str]) -> tuple[str, ...]:
    """Labels, unless they only count."""
    return () if _counts(labels) else tuple(labels)


def _packaged(regions: int) -> Path:
    package = importlib.util.find_spec("tvb_data")
    known: dict[int, Path] = {n: Path() for n in _PACKAGED}
    missing = package is None or not package.submodule_search_locations
    if not missing:
        folder = Path(next(iter(package.submodule_search_locations))) / "connectivity"  # pyright: ignore
        stems = {path: re.fullmatch(r"connectivity_(\d+)", path.stem) for path in folder.glob("*.zip")}
        known = {int(match[1]): path for path, match in stems.items() if match}
    if regions not in known:
        raise ValueError(f"'source' got {regions}, but tvb-data has {', '.join(map(str, sorted(known)))} regions")
    if missing:
        raise ImportError(f"the connectome of {regions} regions is in the package tvb-data: {_INSTALL}")
    return known[regions]


# Files --------------------------------------------------------------------------------------------------------------


def _gathered(tables: Mapping[str, Any], suffix: str) -> dict[str, Any]:
    """Weights, lengths, labels and centres, from tables by the names of their files."""
    gathered = {}
    for what, names in _NAMES.items():
        present = [name for name in names if name in tables]
        for other in present[1:]:
            if not np.array_equal(tables[present[0]], tables[other]):
                where = _first_difference(tables[present[0]], tables[other]) if what == "labels" else ""
                raise ValueError(f"its {present[0]} and its {other} differ{where}")
        if present:
            gathered[what] = tables[present[0]]
        elif what in ("weights", "lengths"):
            raise ValueError(f"it has no {names[0]}{suffix}; it has {', '.join(sorted(tables)) or 'no table'}")
    return gathered


def _first_difference(names: Sequence[str], others: Sequence[str]) -> str:
    if len(names) != len(others):
        return f": {len(names)} and {len(others)} names"
    i = next(i for i, (a, b) in enumerate(zip(names, others)) if a != b)
    return f": region {i} is '{names[i]}' and '{others[i]}'"


def _arrays(path: Path) -> dict[str, Any]:
    """The tables of an npz."""
    if not zipfile.is_zipfile(path):
        raise ValueError("it is no npz, or one that was cut short")
    with np.load(path) as archive:
        known = [name for name in archive.files if any(name in names for names in _NAMES.values())]
        tables = {name: archive[name] for name in known}
    return _gathered(_decoded(tables), "")


def _decoded(tables: dict[str, Any]) -> dict[str, Any]:
    """The tables of arrays, with labels as text."""
    for name in _NAMES["labels"]:
        if name in tables:
            labels = np.atleast_1d(tables[name]).tolist()
            tables[name] = [each.decode() if isinstance(each, bytes) else str(each) for each in labels]
    return tables


def _hdf5(path: Path) -> dict[str, Any]:
    """The tables of an HDF5 file, in whatever group they lie."""
    h5py: Any = needs("h5py", "connectomes")
    tables: dict[str, Any] = {}

    def take(place: str, item) -> None:
        name = place.rpartition("/")[2]
        if isinstance(item, h5py.Dataset) and any(name in names for names in _NAMES.values()):
            if name in tables:
                raise ValueError(f"it has several tables named {name}")
            tables[name] = item[()]

    try:
        with h5py.File(path, "r") as file:
            file.visititems(take)
    except OSError as error:
        raise ValueError(f"it is an HDF5 file that cannot be read: {error}") from error
    return _gathered(_decoded(tables), "")


def _texts(path: Path) -> dict[str, Any]:
    """The tables of a zip or folder; some may be compressed again."""
    tables: dict[str, Any] = {}
    for name, read in sorted((_in_folder(path) if path.is_dir() else _in_zip(path)).items()):
        stem, _, kind = name.partition(".")
        if kind not in ("txt", "txt.bz2") or not any(stem in names for names in _NAMES.values()):
            continue
        if stem in tables:
            raise ValueError(f"it has {stem}.txt twice, as text and packed")
        lines = _lines(bz2.decompress(read()) if kind == "txt.bz2" else read(), name)
        if stem in _NAMES["centres"]:
            names, tables[stem] = _places(lines, name)
            tables |= {f"names in {stem}": names} if names else {}
        else:
            tables[stem] = [line for _, line in lines] if stem in _NAMES["labels"] else _matrix(lines, name)
    return _gathered({name: table for name, table in tables.items() if len(table)}, ".txt")


Files = dict[str, Callable[[], bytes]]


def _in_zip(path: Path) -> Files:
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{_kind(path)}, but {_TAKEN} is taken")

    def reader(name: str) -> Callable[[], bytes]:
        def read() -> bytes:
            with zipfile.ZipFile(path) as archive:
                return archive.read(name)

        return read

    folders: dict[str, Files] = collections.defaultdict(dict)
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            place = PurePosixPath(name)
            # macOS adds these to a zip.
            if "__MACOSX" in place.parts or place.name.startswith("._"):
                continue
            if place.name in folders[str(place.parent)]:
                raise ValueError(f"it has two files named {name}")
            folders[str(place.parent)][place.name] = reader(name)
    return _of_one(folders)


def _in_folder(path: Path) -> Files:
    def files(folder: Path) -> Files:
        return {file.name: file.read_bytes for file in folder.iterdir() if file.is_file()}

    here = files(path)
    if any(name.startswith("weights.") for name in here):
        return here
    inside = {folder.name: files(folder) for folder in sorted(path.iterdir()) if folder.is_dir()}
    return _of_one({".": here, **inside})


def _of_one(folders: Mapping[str, Files]) -> Files:
    """The files of the folder that has weights."""
    with_weights = [name for name, files in folders.items() if {"weights.txt", "weights.txt.bz2"} & files.keys()]
    if len(with_weights) > 1:
        raise ValueError(f"it has several connectomes, in {', '.join(sorted(with_weights))}, but one is taken")
    return folders[with_weights[0]] if with_weights else {}


def _kind(path: Path) -> str:
    """What a file that is not a zip seems to be."""
    head = _head(path)
    if head[:6] == b"MATLAB":
        return "it is a MATLAB file (bk.Connectome takes matrices that another package has read from it)"
    if head.startswith(b"PK"):
        return "it is a zip that was cut short"
    if head and b"\0" not in head:
        return f"it is a text file (a table of weights is taken if its name ends in {', '.join(_TABLES)})"
    return "it is of an unknown kind"


# Text ---------------------------------------------------------------------------------------------------------------

Lines = list[tuple[int, str]]


def _lines(data: bytes, name: str) -> Lines:
    """The lines that are neither empty nor comments, with their numbers."""
    wide = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        text = data.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not text in UTF-8 ({error})") from error
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1)]
    return [(number, line) for number, line in lines if line and not line.startswith("#")]


def _matrix(lines: Lines, name: str) -> np.ndarray:
    return _numbers([(number, line, _split_numbers(line)) for number, line in lines], name)


def _split_numbers(line: str) -> list[str]:
    return re.split(r"\s*;\s*" if ";" in line else r"\s*,\s*" if "," in line else r"\s+", line)


def _numbers(rows: list[tuple[int, str, list[str]]], name: str) -> np.ndarray:
    """The matrix of lines, each with its number, its text and its fields."""
    matrix = []
    for number, line, fields in rows:
        try:
            matrix.append([float(field) for field in fields])
        except ValueError:
            raise ValueError(f"{name}, line {number}: {line[:40]!r} {_NO_NUMBERS}") from None
        if len(matrix[-1]) != len(matrix[0]):
            raise ValueError(
                f"{name}, line {number} has {len(matrix[-1])} numbers, but the first row has {len(matrix[0])}"
            )
    return np.array(matrix, np.float64)


_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?|[-+]?(nan|inf)", re.IGNORECASE)


def _places(lines: Lines, name: str) -> tuple[list[str], np.ndarray]:
    """The label, if any, and the three numbers of each line."""
    split = [_fields(line, name, number) for number, line in lines]
    labelled = [bool(label) for label, _, _ in split]
    if any(labelled) and not all(labelled):
        raise ValueError(f"{name}, line {lines[labelled.index(False)][0]} has no label, but others have")
    if split and all(doubtful for _, _, doubtful in split):
        raise ValueError(
            f"{name}, line {lines[0][0]}: {lines[0][1][:60]!r} has more than three numbers, as all lines have, and "
            "which of them are the centre is not clear: put tabs between the label and the three numbers"
        )
    return [label for label, _, _ in split] if any(labelled) else [], np.array([place for _, place, _ in split])


def _fields(line: str, name: str, number: int) -> tuple[str, list[float], bool]:
    """The label and the centre in a line, and whether the label ends in a number that might belong to the centre.

    Words after the three numbers, as in tvb-data's 66 regions, are ignored.
    """
    for separator in ("\t",) if "\t" in line else (";", ",", None):
        fields = line.split(separator)
        marks = "".join("n" if _NUMBER.fullmatch(field.strip()) else "-" for field in fields)
        end = marks.rfind("nnn") + 3
        if end > 2:
            label = (separator or " ").join(fields[: end - 3]).strip().strip("\"'")
            return label, [float(each) for each in fields[end - 3 : end]], separator is None and "nnnn" in marks
    raise ValueError(f"{name}, line {number}: {line[:60]!r} is no label with three numbers behind it")
