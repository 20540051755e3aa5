"""A result as an xarray Dataset or a pandas DataFrame: the axes of its records, named, with their coordinates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import brainunit as u
import numpy as np

from . import display, signals, units
from .extras import needs
from .models.base import check_name

if TYPE_CHECKING:
    from .result import Result

#: A name and the values along an axis; of lanes without labels, their number.
Axes = dict[str, Any]


def labelled(name: str, value) -> str:
    """A name with the unit of its values, as in a table's head."""
    return display.with_unit(name, units.unit_of(value))


# Axes ---------------------------------------------------------------------------------------------------------------


def groups(result: Result) -> tuple[str, ...]:
    """The groups of a network's regions, of different models, if there are any."""
    if not result.lanes or result.lanes[-1] != "region":
        return ()
    return tuple(dict.fromkeys(n.rpartition(".")[0] for n in result.final if "." in n))


def check_one_group(result: Result) -> None:
    """Raise ValueError where the records have regions of several groups."""
    if several := groups(result):
        raise ValueError(
            f"the regions are of groups ({', '.join(several)}), each with regions of its own: take one of them first, "
            f"as result.of({several[0]!r})"
        )


def lane_shape(result: Result) -> tuple[int, ...]:
    """Of the lanes, those that ``vmap`` mapped over first."""
    final = [np.shape(u.get_magnitude(x)) for name, x in result.final.items() if name != "history"]
    return final[0] if final else ()


def time_axis(result: Result) -> int:
    """The place of the first axis of a record, after those that ``vmap`` mapped over."""
    return 0 if result.lanes is None else len(lane_shape(result)) - len(result.lanes)


def lane_axes(result: Result, lanes: Sequence[str] | Mapping[str, Any] | None) -> Axes:
    """The axes of the lanes, with the user's names and coordinates."""
    check_one_group(result)
    shape = lane_shape(result)
    if lanes is None:
        named = tuple(f"lane_{i}" for i in range(len(shape))) if result.lanes is None else result.lanes
        mapped = len(shape) - len(named)
        names = (*(("mapped",) if mapped == 1 else tuple(f"mapped_{i}" for i in range(mapped))), *named)
        return {name: np.arange(size) for name, size in zip(names, shape, strict=True)}
    names = (lanes,) if isinstance(lanes, str) else tuple(lanes)
    if len(names) != len(shape) or len(set(names)) != len(names):
        raise ValueError(f"'lanes' got {', '.join(map(str, names)) or 'no name'}, but takes {len(shape)} names, of the "
                         f"axes of {shape}")  # fmt: skip
    axes = {}
    for name, size in zip(names, shape, strict=True):
        values = lanes[name] if isinstance(lanes, Mapping) else np.arange(size)
        plain = np.asarray(u.get_magnitude(values))
        if plain.shape != (size,):
            raise ValueError(f"'lanes' got {name} of shape {plain.shape}, but takes ({size},)")
        axes[name] = units.attach(plain, units.unit_of(values))
    return axes


def first_axes(result: Result) -> dict[str, tuple[str, Any]]:
    """The name and the values of each record's first axis; records with one value a lane are left out.

    Records that share their times or their frequencies share an axis.
    """
    known: Axes = {}
    named = {}
    # The times of the trajectories come first, so that they are "time" whatever the order of the records.
    axes = result.axes
    for name in sorted(axes, key=lambda n: not is_over_time(result, n)):
        values = axes[name]
        kind = _kind(values)
        shares = kind not in known or _same(known[kind], values)
        dimension = kind if shares and kind != "axis" else f"{name}_{kind}"
        known[dimension] = values
        named[name] = dimension, values
    return named


def is_over_time(result: Result, name: str) -> bool:
    """Whether a record has a value for each time of the result."""
    return name not in result.statistics or signals.is_over_time(result.statistics[name][0])


def record_axes(result: Result, lanes) -> dict[str, Axes]:
    """The axes of each record, in their order; records that share their sensors or windows share an axis."""
    batch, firsts, at = lane_axes(result, lanes), first_axes(result), time_axis(result)
    known, found = {}, {}
    for name in result.records:
        axes = list(batch.items())
        for place, (kind, values) in enumerate(_of_channels(result, name, axes) or []):
            axes = axes[: len(batch) - 1 + place]
            shares = kind not in known or _same(known[kind], values)
            dimension = kind if shares else f"{name}_{kind}"
            known[dimension] = values
            axes.append((dimension, values))
        if name in firsts:
            axes.insert(at, firsts[name])
        found[name] = dict(axes)
    return found


def _of_channels(result: Result, name: str, axes: list):
    """The axes in place of the regions, if there are any."""
    if name not in result.statistics or not axes:
        return None
    what, sampling = result.statistics[name]
    return signals.axes_of_channels(what, result.ts, sampling, axes[-1])


def _kind(values) -> str:
    dimension = units.unit_of(values).dim
    return {u.second.dim: "time", u.Hz.dim: "frequency"}.get(dimension, "axis")


def _same(one, other) -> bool:
    return units.unit_of(one) == units.unit_of(other) and np.array_equal(u.get_magnitude(one), u.get_magnitude(other))


def on_host(x) -> np.ndarray:
    return np.asarray(u.get_magnitude(x))


# Tables -------------------------------------------------------------------------------------------------------------


def dataset(result: Result, lanes):
    """See `Result.to_xarray`."""
    xarray = needs("xarray", "sweep")
    batch, firsts, each = lane_axes(result, lanes), first_axes(result), record_axes(result, lanes)
    axes = {**dict(firsts.values()), **batch}
    axes |= {n: values for own in each.values() for n, values in own.items() if n not in axes}
    if taken := [name for name in axes if name in result.records or (name in batch and name in dict(firsts.values()))]:
        raise ValueError(f"'lanes' and the records share the name {taken[0]!r}: give record= a dict with another name")
    coords = {n: ((n,), on_host(x), {"units": str(units.unit_of(x))} if _has_unit(x) else {}) for n, x in axes.items()}
    variables = {}
    for name in result:
        variables[name] = (list(each[name]), on_host(result[name]), {"units": str(units.unit_of(result[name]))})
    return xarray.Dataset(variables, coords)


def _has_unit(values) -> bool:
    """Whether coordinates are quantities rather than numbers or labels of lanes."""
    return isinstance(values, u.Quantity)


def dataframe(result: Result, names, long: bool, lanes):
    """See `Result.to_dataframe`."""
    pandas = needs("pandas", "sweep")
    names = list(result) if names is None else [names] if isinstance(names, str) else list(names)
    for name in names:
        check_name(name, result.records, "record")
    firsts, of_each = first_axes(result), record_axes(result, lanes)
    if len({tuple(of_each[n]) for n in names}) != 1:
        batch = lane_axes(result, lanes)
        own = {n: [axis for axis in of_each[n] if axis not in batch] for n in names}
        each = ", ".join(f"{n} by {' and '.join(own[n]) or 'lane'}" for n in names)
        raise ValueError(f"'names' got records of several axes ({each}), but takes those of one: name them")
    first = firsts.get(names[0])
    batch = {n: x for n, x in of_each[names[0]].items() if first is None or n != first[0]}
    axes = {**({} if first is None else {first[0]: first[1]}), **batch}
    columns = {labelled(n, result[n]): _time_first(result, on_host(result[n]), first is not None) for n in names}
    if first is None or long:
        return _long(pandas, axes, columns, long)
    index = pandas.Index(on_host(first[1]), name=labelled(*first))
    if not batch:
        return pandas.DataFrame(columns, index=index)
    labels = [[*columns], *map(on_host, batch.values())]
    head = pandas.MultiIndex.from_product(labels, names=["record", *(labelled(n, x) for n, x in batch.items())])
    values = np.concatenate([x.reshape(len(index), -1) for x in columns.values()], axis=1)
    return pandas.DataFrame(values, index=index, columns=head)


def _time_first(result: Result, x: np.ndarray, has_axis: bool) -> np.ndarray:
    return np.moveaxis(x, time_axis(result), 0) if has_axis else x


def _long(pandas, axes: Axes, columns: dict[str, np.ndarray], long: bool):
    """A row for each value; the axes are the index, or of ``long`` columns."""
    flat = {name: x.reshape(-1) for name, x in columns.items()}
    if not axes:
        return pandas.DataFrame(flat)
    labels = [on_host(x) for x in axes.values()]
    names = [labelled(n, x) for n, x in axes.items()]
    single = len(axes) == 1
    index = pandas.Index(labels[0], name=names[0]) if single else pandas.MultiIndex.from_product(labels, names=names)
    table = pandas.DataFrame(flat, index=index)
    return table.reset_index() if long else table
