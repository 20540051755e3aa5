"""Connectomes: weights and tract lengths between regions, read from The Virtual Brain's files."""

from __future__ import annotations

import bz2
import dataclasses
import importlib.util
import re
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import brainunit as u
import numpy as np

from . import units

_INSTALL = "pip install 'brainmass-kernels[connectomes]'"


@dataclasses.dataclass(frozen=True, eq=False)
class Connectome:
    """Connections between regions; ``bk.Network(model, c.weights, distances=c.lengths, speed=...)`` takes them.

    Attributes
    ----------
    weights : ``(N, N)``; ``weights[i, j]`` is of the connection from region j to region i
    lengths : ``(N, N)``, of the tracts, in mm
    labels : of each region, if known
    centres : ``(N, 3)``, where each region is, in mm, or ``None``

    Raises
    ------
    ValueError : matrices that are not square, differ in size, or hold negative or infinite numbers
    """

    weights: np.ndarray
    lengths: Any
    labels: tuple[str, ...] = ()
    centres: Any = None

    def __post_init__(self):
        weights = np.asarray(self.weights, np.float64)
        lengths = np.asarray(units.strip(self.lengths, u.mm, "lengths"), np.float64)
        if weights.ndim != 2 or weights.shape[0] != weights.shape[1]:
            raise ValueError(f"'weights' got shape {weights.shape}, but takes (N, N)")
        if lengths.shape != weights.shape:
            raise ValueError(f"'lengths' got shape {lengths.shape}, but takes {weights.shape} as the weights have")
        if not np.isfinite(weights).all():
            raise ValueError("'weights' got NaN or infinite values, but takes finite numbers")
        if not (np.isfinite(lengths).all() and (lengths >= 0).all()):
            raise ValueError("'lengths' got negative or infinite values, but takes finite ones from 0 on")
        if self.labels and len(self.labels) != len(weights):
            raise ValueError(f"'labels' got {len(self.labels)} names, but there are {len(weights)} regions")
        object.__setattr__(self, "weights", weights)
        object.__setattr__(self, "lengths", u.Quantity(lengths, unit=u.mm))

    @property
    def regions(self) -> int:
        return len(self.weights)

    def normalized(self, by: str = "max") -> Connectome:
        """The same with weights over the largest of them, or, by "rows", over the sum of each region's own."""
        if by not in ("max", "rows"):
            raise ValueError(f"'by' got '{by}', but takes 'max' or 'rows'")
        weights = self.weights * (1.0 - np.eye(self.regions))
        scale = weights.max() if by == "max" else weights.sum(axis=1, keepdims=True)
        return dataclasses.replace(self, weights=weights / np.where(scale > 0, scale, 1.0))

    def subset(self, which: Sequence) -> Connectome:
        """Some of the regions, by number or label, in this order."""
        for name in which:
            if isinstance(name, str) and name not in self.labels:
                raise ValueError(f"unknown region '{name}'. Known: {', '.join(self.labels) or 'none has a label'}")
        chosen = [self.labels.index(name) if isinstance(name, str) else int(name) for name in which]
        grid = np.ix_(chosen, chosen)
        return Connectome(
            self.weights[grid],
            self.lengths[grid],
            tuple(self.labels[i] for i in chosen) if self.labels else (),
            None if self.centres is None else self.centres[chosen],
        )

    def __repr__(self) -> str:
        count, longest = np.count_nonzero(self.weights), float(self.lengths.mantissa.max())
        return f"Connectome({self.regions} regions, {count:,} connections, tracts to {longest:.4g} mm)"


def load_connectome(source: int | str | Path) -> Connectome:
    """A connectome that the package ``tvb-data`` has, by its number of regions, or one in a file.

    Parameters
    ----------
    source : 66, 68, 76, 96 or 192; or a zip or folder in The Virtual Brain's format (``weights.txt``,
        ``tract_lengths.txt``, ``centres.txt``), or an npz of ``weights``, ``lengths`` and perhaps ``labels``

    Raises
    ------
    ImportError : ``tvb-data`` is needed and not installed
    ValueError : a number or a file that it has not, or what a `Connectome` refuses

    References
    ----------
    Sanz-Leon et al. 2013, Frontiers in Neuroinformatics 7:10.
    """
    if isinstance(source, int):
        source = _packaged(source)
    path = Path(source)
    if not path.exists():
        raise ValueError(f"'source' got {str(source)!r}, but there is no such file; by number tvb-data's are taken")
    if path.suffix == ".npz":
        with np.load(path) as held:
            labels = tuple(map(str, held["labels"])) if "labels" in held else ()
            return Connectome(held["weights"], held["lengths"] * u.mm, labels)
    texts = dict(_texts(path))
    for name in ("weights", "tract_lengths"):
        if name not in texts:
            raise ValueError(f"{path} has no {name}.txt, but The Virtual Brain's format has")
    labels, centres = _centres(next((texts[n] for n in ("centres", "centers") if n in texts), ""))
    return Connectome(_matrix(texts["weights"]), _matrix(texts["tract_lengths"]) * u.mm, labels, centres)


def _packaged(regions: int) -> Path:
    found = importlib.util.find_spec("tvb_data")
    if found is None or not found.submodule_search_locations:
        raise ImportError(f"the connectome of {regions} regions is in the package tvb-data: {_INSTALL}")
    folder = Path(next(iter(found.submodule_search_locations))) / "connectivity"
    known = {int(m[1]): path for path in folder.glob("*.zip") if (m := re.fullmatch(r"connectivity_(\d+)", path.stem))}
    if regions not in known:
        raise ValueError(f"'source' got {regions}, but tvb-data has {', '.join(map(str, sorted(known)))} regions")
    return known[regions]


def _texts(path: Path) -> Iterator[tuple[str, str]]:
    """Name and contents of each text file, some of which are packed."""
    if path.is_dir():
        files = {file.name: file.read_bytes() for file in sorted(path.iterdir()) if file.is_file()}
    else:
        with zipfile.ZipFile(path) as archive:
            files = {Path(name).name: archive.read(name) for name in archive.namelist()}
    for name, held in files.items():
        stem, _, kind = name.partition(".")
        if kind in ("txt", "txt.bz2"):
            yield stem, (bz2.decompress(held) if kind == "txt.bz2" else held).decode()


def _matrix(text: str) -> np.ndarray:
    return np.array([line.split() for line in text.splitlines() if line.strip()], np.float64)


def _centres(text: str) -> tuple[tuple[str, ...], np.ndarray | None]:
    """Each line is a label and three numbers."""
    rows = [line.split() for line in text.splitlines() if line.strip()]
    if not rows:
        return (), None
    return tuple(row[0] for row in rows), np.array([row[1:4] for row in rows], np.float64)
