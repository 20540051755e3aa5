"""Results on disk: one ``.npz`` with units and a checksum."""

from __future__ import annotations

import dataclasses
import os
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import brainunit as u
import numpy as np

from . import connectivity, crossspectra, files, readout, recording, signals, units
from ._version import __version__
from .archives import digest_of, pack, unpack
from .hrf import HRF
from .recording import Reduction, Sampling
from .signals import Signal

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
    known = {"sampling": list(sampling)}
    if _class_of(type(what).__name__) is type(what):
        return known | _fields_of(what, name)
    axis = result.axes.get(name)
    values = None if axis is None else np.asarray(u.get_magnitude(axis), float).tolist()
    own = {"kind": type(what).__name__, "of": _of(what, name), "axis": values}
    return known | own | {"unit": _text_of(units.unit_of(axis), name)}


#: Where the classes of this package's statistics and signals are.
_MODULES = (recording, connectivity, crossspectra, signals, readout)


def _class_of(kind: str) -> type | None:
    """A class of this package's by its name."""
    return next((vars(module)[kind] for module in _MODULES if kind in vars(module)), None)


def _fields_of(what: Reduction | Signal, name: str) -> dict[str, Any]:
    fields = {n: _plain(x, name) for n, x in vars(what).items() if n != "of"}
    return {"kind": type(what).__name__, "of": _of(what, name), "fields": fields}


def _of(what: Reduction | Signal, name: str) -> str | dict[str, Any]:
    """What a statistic is of: a quantity's name, or a signal."""
    return what.of if isinstance(what.of, str) else _fields_of(what.of, name)


def _plain(value, name: str):
    """A field of a statistic; that of a level is a pair of a number and its unit."""
    if isinstance(value, HRF):
        return {"hrf": dataclasses.asdict(value)}
    if isinstance(value, tuple) and len(value) == 2 and not isinstance(value[1], (int, float, str)):
        return {"value": value[0], "unit": _text_of(value[1], name)}
    if isinstance(value, u.Unit):
        return {"value": None, "unit": _text_of(value, name)}
    return list(value) if isinstance(value, tuple) else value


def _decode(saved: dict[str, Any]) -> tuple[Reduction | Signal, Sampling]:
    sampling = Sampling(*saved["sampling"])
    if "fields" not in saved:
        values, of = None if saved["axis"] is None else tuple(saved["axis"]), _decoded_of(saved["of"])
        return Stored(saved["kind"], values, units.parsed(saved["unit"]), of=of), sampling
    return _made(saved), sampling


def _decoded_of(saved: str | dict[str, Any]) -> Any:
    return saved if isinstance(saved, str) else _made(saved)


def _made(saved: dict[str, Any]) -> Any:
    """A statistic or signal of the fields that the constructor made of its arguments."""
    kind = _class_of(saved["kind"])
    if kind is None:
        raise ValueError(f"it has a statistic {saved['kind']}, which this version lacks")
    what = object.__new__(kind)
    object.__setattr__(what, "of", _decoded_of(saved["of"]))
    for n, x in saved["fields"].items():
        object.__setattr__(what, n, _field(x))
    return what


def _field(x):
    if isinstance(x, dict) and "hrf" in x:
        return _with_seconds(x["hrf"])
    if isinstance(x, dict):
        unit = units.parsed(x["unit"])
        return unit if x["value"] is None else (x["value"], unit)
    return tuple(x) if isinstance(x, list) else x


def _with_seconds(fields: dict[str, Any]) -> HRF:
    in_seconds = {n: np.array(fields[n]) * u.second for n in ("scales", "length")}
    return HRF(fields["weights"], fields["shapes"], in_seconds["scales"], float(fields["length"]) * u.second)
