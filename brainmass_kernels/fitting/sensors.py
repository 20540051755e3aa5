"""Time series at sensors: the `Readout` that a target is of, and its JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import brainunit as u
import numpy as np

from .. import units
from ..models.base import check_name
from ..network import parts_of
from ..readout import Readout
from .observed import TimeSeries


def recorded(target: TimeSeries, model, record) -> tuple[TimeSeries, Any]:
    """A series with the `Readout` that it is of, if there is one, and the name of what is recorded.

    Parameters
    ----------
    record : as `fit` takes it: a name, a `Readout`, or a dict of one of these

    Raises
    ------
    TypeError, ValueError : two different readouts, a model without regions, or channels that no sensor is called
    """
    if isinstance(record, Mapping) and len(record) == 1:
        record = next(iter(record.values()))
    if isinstance(record, Readout):
        if target.of is not None and not same(target.of, record):
            raise ValueError(f"'record' got {record!r}, but {target.name} is of another, {target.of!r}: leave one out")
        target = dataclasses.replace(target, of=record)
    if target.of is None:
        return target, record
    network, mass = parts_of(model)
    if network is None:
        raise ValueError(f"'target' got {target.name} of {target.of!r}, but what is fitted is one mass: it takes a "
                         "bk.Network")  # fmt: skip
    first = next(iter(mass.recordable()))
    name = target.of.of or (record if isinstance(record, str) else first)
    if not isinstance(name, str):
        raise TypeError(f"'record' got {target.of!r} of {name!r}, but a target takes one of an observable or a state")
    check_name(name, mass.recordable(), "record")
    if isinstance(record, str) and record not in (name, first):
        raise ValueError(f"'record' got {record!r}, but {target.name} is of a Readout of {name!r}: leave one out")
    if (regions := network.regions_of(name)) != target.of.shape[1]:
        raise ValueError(
            f"'matrix' of the Readout got shape {target.of.shape}, of {target.of.shape[1]} regions, but the network "
            f"has {regions}: Readout.matched(labels) puts its regions into the network's order"
        )
    return dataclasses.replace(target, of=_in_order(target)), name


def _in_order(target: TimeSeries) -> Readout:
    """The sensors that the channels are, in their order."""
    known = target.of.sensors
    if not (target.channels and known):
        return target.of
    if unknown := [name for name in target.channels if name not in known]:
        raise ValueError(
            f"'channels' of {target.name} has {', '.join(unknown)}, which no sensor of the Readout is called: "
            f"{', '.join(known)}"
        )
    return target.of if target.channels == known else target.of.pick(target.channels)


def of_quantity(readout: Readout, name: str, unit) -> tuple[Readout, Any]:
    """The same of a quantity of this name and unit, and the unit of its result."""
    readout = dataclasses.replace(readout, of=name)
    return readout, readout.bound(name, unit).result_unit


def same(one: Readout | None, other: Readout | None) -> bool:
    """Whether two show the same of the same regions."""
    if one is None or other is None:
        return one is other
    matrices = [np.asarray(u.get_magnitude(x.matrix)) for x in (one, other)]
    if matrices[0].shape != matrices[1].shape or not np.allclose(*matrices, rtol=1e-6, atol=0.0):
        return False
    return _about(one) == _about(other)


def _about(readout: Readout) -> dict[str, Any]:
    """All but the matrix, ready for JSON."""
    return {
        "of": readout.of, "unit": None if readout.unit is None else str(readout.unit),
        "gain": str(units.unit_of(readout.matrix)), "sensors": list(readout.sensors), "regions": list(readout.regions),
    }  # fmt: skip


def encode(readout: Readout | None) -> dict[str, Any] | None:
    """A `Readout` ready for JSON."""
    if readout is None:
        return None
    return {"matrix": np.asarray(u.get_magnitude(readout.matrix)).tolist(), **_about(readout)}


def decode(saved: Mapping[str, Any] | None) -> Readout | None:
    """The inverse of `encode`."""
    if saved is None:
        return None
    matrix, unit = np.array(saved["matrix"]), saved["unit"]
    silent = {f"silent_{n}": np.flatnonzero((matrix == 0).all(k)) for n, k in (("sensors", 1), ("regions", 0))}
    return Readout(
        units.attach(matrix, units.parsed(saved["gain"])), of=saved["of"], sensors=saved["sensors"],
        regions=saved["regions"], unit=None if unit is None else units.parsed(unit), **silent,
    )  # fmt: skip
