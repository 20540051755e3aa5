"""Lead fields from ``.npz``, The Virtual Brain's projection matrices, and forward solutions of MNE."""

from __future__ import annotations

import bz2
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import brainunit as u
import numpy as np

from . import files, units
from .extras import needs


class LeadField(NamedTuple):
    """The gain ``(S, N)`` of regions at sensors, and the names of both; a Quantity, or plain numbers."""

    gain: Any
    sensors: tuple[str, ...]
    regions: tuple[str, ...]


#: Names of the arrays in a ``.npz``.
_NAMES = {
    "gain": ("gain", "leadfield", "lead_field", "matrix", "projection"),
    "sensors": ("sensors", "sensor_names", "ch_names", "channels"),
    "regions": ("regions", "region_labels", "labels"),
}
#: How gains of the sources of a region become its own.
COMBINE = ("mean", "sum")
#: Of MNE: what a channel is, what its numbers are in, and the unit of its gain for a dipole of 1 A m.
_KINDS = {"eeg": (2, 107, u.volt), "mag": (1, 112, u.tesla), "grad": (1, 201, u.tesla / u.meter)}
_AMPERE_METER = u.amp * u.meter


def of_npz(path: str | os.PathLike) -> LeadField:
    """The lead field in a ``.npz`` with arrays of these names: a gain, its sensors and its regions."""
    path = _existing(path, ".npz")
    with files.damaged(path, "a lead field", "write it anew"), open(path, "rb") as file:
        archive = np.load(file, allow_pickle=False)
        arrays = {name: archive[name] for name in archive.files}
    found = {}
    for what, names in _NAMES.items():
        key = next((key for name in names for key in arrays if key.lower() == name), None)
        if key is None:
            listed = ", ".join(f"{key} {x.shape}" for key, x in arrays.items()) or "nothing"
            raise ValueError(f"{path.name}: no array {names[0]!r} (or {', '.join(names[1:])}); it holds {listed}")
        found[what] = arrays[key]
    return LeadField(found["gain"], *(tuple(map(str, found[n].tolist())) for n in ("sensors", "regions")))


def of_tvb(gain, sensors, mapping, labels: Sequence[str], combine: str) -> LeadField:
    """The lead field of regions, from The Virtual Brain's of the vertices of a surface.

    Parameters
    ----------
    gain : ``.npy``, or ``.mat`` with ``ProjectionMatrix`` or of Brainstorm, or an array ``(S, V)``
    sensors : a text file of a name and a place a line, perhaps packed as ``.bz2``, or names
    mapping : a text file of the region's number of each vertex, or the numbers ``(V,)``; ``None``, if the gain has one
        column for each region
    labels : of the regions, in the order that the mapping counts
    """
    labels, matrix = tuple(map(str, labels)), _gain_of(gain)
    names = _sensor_names(sensors) if isinstance(sensors, (str, os.PathLike)) else tuple(map(str, sensors))
    if matrix.ndim != 2 or len(names) != len(matrix):
        raise ValueError(f"'gain' got shape {matrix.shape}, but takes (S, V) of the {len(names)} 'sensors'")
    if mapping is None:
        if matrix.shape[1] != len(labels):
            raise ValueError(
                f"'mapping' got None, but 'gain' has {matrix.shape[1]} columns, not one for each of the {len(labels)} "
                "labels: give the region of each vertex"
            )
        return LeadField(matrix, names, labels)
    if isinstance(mapping, (str, os.PathLike)):
        mapping = _read_text(_existing(mapping, ".txt", ".bz2")).split()
    places = np.asarray(mapping, float)
    numbers = places.astype(int)
    if places.shape != (matrix.shape[1],) or (places != numbers).any():
        raise ValueError(
            f"'mapping' got shape {places.shape}, but takes ({matrix.shape[1]},) whole numbers, one for each vertex"
        )
    if numbers.min() < 0 or numbers.max() >= len(labels):
        raise ValueError(
            f"'mapping' counts from {numbers.min()} to {numbers.max()}, but 'labels' has {len(labels)} names, 0 to "
            f"{len(labels) - 1}"
        )
    groups = {name: np.flatnonzero(numbers == k) for k, name in enumerate(labels)}
    return _of_sources(matrix, names, {name: each for name, each in groups.items() if len(each)}, combine)


def of_mne(fwd, labels, kind: str, dipole, combine: str) -> LeadField:
    """The lead field of labels, from a forward solution of MNE; see `Readout.from_mne`."""
    if not isinstance(fwd, Mapping):
        path = _existing(fwd, ".fif", ".gz", ".h5")
        fwd = needs("mne", "eeg").read_forward_solution(path, verbose="error")
    if kind not in _KINDS:
        raise ValueError(f"'kind' got {kind!r}, but takes {', '.join(map(repr, _KINDS))}")
    matrix, names = _along_normals(fwd), tuple(map(str, fwd["sol"]["row_names"]))
    rows = _channels(fwd, names, kind)
    groups = _label_groups(fwd, labels)
    empty = [name for name, each in groups.items() if not len(each)]
    found = _of_sources(
        matrix[rows], tuple(names[k] for k in rows), {n: x for n, x in groups.items() if n not in empty}, combine
    )
    if dipole is None:
        return found
    per = u.get_unit(dipole)
    gain = u.Quantity(found.gain * float(u.get_magnitude(dipole)), unit=_KINDS[kind][2] / _AMPERE_METER * per)
    return found._replace(gain=gain)


def _of_sources(matrix, sensors, groups: Mapping[str, np.ndarray], combine: str) -> LeadField:
    """Of regions, from the columns of the sources in each."""
    if combine not in COMBINE:
        raise ValueError(f"'combine' got {combine!r}, but takes {' or '.join(map(repr, COMBINE))}")
    columns = [getattr(matrix[:, each], combine)(1) for each in groups.values()]
    if not columns:
        raise ValueError("'labels' has no region with a source in the lead field")
    return LeadField(np.stack(columns, 1), sensors, tuple(groups))


# Files --------------------------------------------------------------------------------------------------------------


def _existing(path, *endings: str) -> Path:
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"'{path}' is no file")
    if path.suffix.lower() not in endings:
        raise ValueError(f"'{path.name}' does not end in {' or '.join(endings)}")
    return path


def _read_text(path: Path) -> str:
    packed = path.suffix.lower() == ".bz2"
    with files.damaged(path, "a table", "take a copy of it"):
        return (bz2.decompress(path.read_bytes()) if packed else path.read_bytes()).decode()


def _sensor_names(path) -> tuple[str, ...]:
    """The first word of each line."""
    path = _existing(path, ".txt", ".bz2")
    lines = [line.replace(",", " ").split() for line in _read_text(path).splitlines()]
    names = tuple(line[0] for line in lines if line)
    if not names or all(_is_number(name) for name in names):
        raise ValueError(f"{path.name}: its lines are to begin with the name of a sensor, and some places follow")
    return names


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _gain_of(gain) -> np.ndarray:
    if not isinstance(gain, (str, os.PathLike)):
        return np.asarray(units.real(gain, "gain"), float)
    path = _existing(gain, ".npy", ".mat")
    with files.damaged(path, "a lead field", "take a copy of it"):
        if path.suffix.lower() == ".npy":
            return np.load(path, allow_pickle=False).astype(float)
        arrays = needs("scipy.io").loadmat(path)
    if "ProjectionMatrix" in arrays:
        return np.asarray(arrays["ProjectionMatrix"], float)
    if "Gain" not in arrays or "GridOrient" not in arrays:
        listed = ", ".join(name for name in arrays if not name.startswith("__")) or "nothing"
        raise ValueError(
            f"{path.name}: takes 'ProjectionMatrix', or Brainstorm's 'Gain' and 'GridOrient'; it holds {listed}"
        )
    # Brainstorm has three gains a vertex, and the direction of its dipole.
    three = np.asarray(arrays["Gain"], float)
    normals = np.asarray(arrays["GridOrient"], float)
    return np.einsum("svk,vk->sv", three.reshape(len(three), -1, 3), normals)


# MNE ----------------------------------------------------------------------------------------------------------------


def _along_normals(fwd) -> np.ndarray:
    """Gains of dipoles along the normals of the surface, ``(S, V)``."""
    gain, fixed = np.asarray(fwd["sol"]["data"], float), int(fwd["source_ori"]) == 1
    sources = sum(len(each["vertno"]) for each in fwd["src"])
    if gain.shape[1] != sources * (1 if fixed else 3):
        raise ValueError(
            f"'fwd' has {gain.shape[1]} columns, but its {sources} sources give {sources * (1 if fixed else 3)}"
        )
    if fixed:
        return gain
    three = gain.reshape(len(gain), -1, 3)
    if fwd.get("surf_ori"):
        return three[..., 2]  # the last of each three is along the normal
    normals = np.concatenate([np.asarray(each["nn"], float)[np.asarray(each["vertno"])] for each in fwd["src"]])
    return np.einsum("svk,vk->sv", three, normals)


def _channels(fwd, names: Sequence[str], kind: str) -> list[int]:
    """The rows of the channels of a kind."""
    what, unit, _ = _KINDS[kind]
    channels = {str(each["ch_name"]): each for each in fwd["info"]["chs"]}
    if unknown := [name for name in names if name not in channels]:
        raise ValueError(f"'fwd' has no information on the channels {', '.join(unknown)}")
    rows = [k for k, n in enumerate(names) if (int(channels[n]["kind"]), int(channels[n]["unit"])) == (what, unit)]
    if not rows:
        raise ValueError(f"'kind' got {kind!r}, but 'fwd' has no such channel among {', '.join(names)}")
    return rows


def _label_groups(fwd, labels) -> dict[str, np.ndarray]:
    """The columns of each label's sources, by its name.

    A label is one of MNE, of a hemisphere, or in a dict ``name: (number of the source space, vertices)``.
    """
    if isinstance(labels, Mapping):
        each = [(str(name), int(space), vertices) for name, (space, vertices) in labels.items()]
    else:
        each = [(str(one.name), 0 if one.hemi == "lh" else 1, one.vertices) for one in labels]
    names = [name for name, _, _ in each]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"'labels' has several of the name {', '.join(twice)}")
    vertices = [np.asarray(space["vertno"]) for space in fwd["src"]]
    starts = np.cumsum([0, *map(len, vertices)])
    groups = {}
    for name, space, own in each:
        if not 0 <= space < len(vertices):
            raise ValueError(f"'labels' has {name} in source space {space}, but 'fwd' has {len(vertices)}")
        groups[name] = starts[space] + np.flatnonzero(np.isin(vertices[space], np.asarray(own)))
    return groups
