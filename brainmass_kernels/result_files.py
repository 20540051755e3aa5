"""Results on disk: one ``.npz`` with units and a checksum."""

from __future__ import annotations

import dataclasses
import os
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import brainunit as u
import numpy as np

from . import files, recording, units
from ._version import __version__
from .archives import digest_of, pack, unpack
from .recording import Reduction, Sampling

if TYPE_CHECKING:
    from .result import Result

_FORMAT = "brainmass_kernels result"
_SAVED, _REMEDY = "a result saved by this brainmass_kernels", "take a copy of it, or run the simulation again"
_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Stored(Reduction):
    """A statistic of the user's own in a result that was read from a file: its name and its axis, no way to compute it.

    Attributes
    ----------
    name : of its class
    values : of its axis, or ``None``
    axis_unit : of these
    """

    name: str = ""
    values: tuple[float, ...] | None = None
    axis_unit: Any = None

    def axis(self, ts, sampling):
        return None if self.values is None else units.attach(np.array(self.values), self.axis_unit)


def write(path: str | os.PathLike, result: Result) -> None:
    """Write a result, whole or not at all."""
    _check_ending(path)
    place = files.absolute(path, "path")
    groups = [dict(result.records), dict(result.final)]
    for name, x in [*groups[0].items(), *groups[1].items()]:
        _text_of(units.unit_of(x), name)
    when = dataclasses.asdict(result.times) | {"unit": _text_of(result.times.unit, "times")}
    about = {
        "version": _VERSION,
        "times": when,
        "statistics": {n: _encode(n, result) for n in result.statistics},
        "lanes": result.lanes,
        "recordable": result.recordable,
        "versions": {"brainmass_kernels": __version__, "jax": metadata.version("jax")},
    }
    with files.replacing(place) as aside:
        pack(aside, groups, about, _FORMAT)


def read(path: str | os.PathLike) -> dict[str, Any]:
    """The fields of a saved `Result`; its times as the fields of `Times`."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"'path' got {path}, but there is no file of that name")
    with files.damaged(path, _SAVED, _REMEDY):
        (records, final), about, checksum = unpack(path, _FORMAT)
        if checksum != digest_of([records, final], about):
            raise ValueError("its checksum is that of other contents")
        if about["version"] != _VERSION:
            raise ValueError(f"it has version {about['version']} of the format, and this reads {_VERSION}")
        times = about["times"]
        lanes = about["lanes"]
        return {
            "records": records,
            "final": final,
            "times": times | {"unit": units.parsed(times["unit"])},
            "statistics": {n: _decode(x) for n, x in about["statistics"].items()},
            "lanes": None if lanes is None else tuple(lanes),
            "recordable": tuple(about["recordable"]),
        }


def _check_ending(path) -> None:
    if Path(path).suffix.lower() != ".npz":
        raise ValueError(f"'path' got {os.fspath(path)}, but takes a name that ends in .npz")


def _text_of(unit, name: str) -> str:
    """A unit as text that reads as the same unit."""
    text = str(unit)
    try:
        same = units.parsed(text) == unit
    except ValueError:
        same = False
    if not same:
        raise ValueError(f"'{name}' is in {text}, a unit that a file cannot hold: convert it to another")
    return text


def _encode(name: str, result: Result) -> dict[str, Any]:
    """A statistic, ready for JSON: its fields if it is one of this package, else its axis."""
    what, sampling = result.statistics[name]
    kind = type(what)
    known: dict[str, Any] = {"kind": kind.__name__, "of": what.of, "sampling": list(sampling)}
    if getattr(recording, kind.__name__, None) is kind:
        fields = {n: x for n, x in vars(what).items() if n != "of"}
        return known | {"fields": {n: _plain(x, name) for n, x in fields.items()}}
    axis = result.axes.get(name)
    values = None if axis is None else np.asarray(u.get_magnitude(axis), float).tolist()
    return known | {"axis": values, "unit": _text_of(units.unit_of(axis), name)}


def _plain(value, name: str):
    """A field of a statistic; that of a level is a pair of a number and its unit."""
    if isinstance(value, tuple) and len(value) == 2 and not isinstance(value[1], (int, float)):
        return {"value": value[0], "unit": _text_of(value[1], name)}
    return list(value) if isinstance(value, tuple) else value


def _decode(saved: dict[str, Any]) -> tuple[Reduction, Sampling]:
    sampling = Sampling(*saved["sampling"])
    if "fields" not in saved:
        values = None if saved["axis"] is None else tuple(saved["axis"])
        return Stored(saved["kind"], values, units.parsed(saved["unit"]), of=saved["of"]), sampling
    # The fields are those that the constructor made of its arguments.
    what = object.__new__(getattr(recording, saved["kind"]))
    for n, x in {"of": saved["of"], **saved["fields"]}.items():
        if isinstance(x, dict):
            x = (x["value"], units.parsed(x["unit"]))
        object.__setattr__(what, n, tuple(x) if isinstance(x, list) else x)
    return what, sampling
