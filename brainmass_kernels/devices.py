"""Runs over many devices: which share the lanes, and how they run their shares.

Lanes are independent, or networks are, so each device runs its share of the leading axis of the batch by itself. Where
the mesh and the place of the arguments are known when a run is traced, `over_devices` maps the whole run over the mesh.
Else XLA finds the place later, and splits each kernel by its rule (`lanewise`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ._jax import axes_along, devices_here, is_traced, meshless

if TYPE_CHECKING:
    from .run import Data, Run


class Split(NamedTuple):
    """How the leading axis of a batch lies on devices.

    Attributes
    ----------
    mesh : of JAX, with devices or without
    axes : the axes of the mesh that the lanes lie along; none if each device runs all lanes
    why : why each device runs all lanes, or ``""``
    """

    mesh: Any
    axes: tuple[str, ...] = ()
    why: str = ""

    @property
    def count(self) -> int:
        """Shares of the lanes."""
        return math.prod(self.mesh.shape[name] for name in self.axes)

    @property
    def local(self) -> int:
        """Devices of this process among them."""
        return devices_here(self.mesh.size)


def split_of(batch: tuple[int, ...], is_network: bool, data: Data, implementation: str) -> Split | None:
    """The split of a run whose mesh is known when it is traced; ``None`` on one device, or if XLA finds it later."""
    if 0 in batch:
        return None
    places = [place for place in (_place(x) for x in jax.tree.leaves(data)) if place is not None]
    if not places:
        return _of_context(batch, is_network) if implementation == "mosaic_tpu" else None
    mesh = places[0].mesh
    along = (axes_along(_place(x), at) for x, at in _leading(batch, data, is_network) if at is not None)
    axes = next(filter(None, along), ())
    if not axes:
        return Split(mesh, (), "no argument is split along the leading axis of the batch")
    return _checked(Split(mesh, axes), batch, is_network)


def _of_context(batch: tuple[int, ...], is_network: bool) -> Split | None:
    """Over all devices of the mesh that the user has set: of traced arrays JAX tells only later how they lie on it."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.manual_axes:
        return None
    return _checked(Split(mesh, mesh.axis_names), batch, is_network)


def _checked(split: Split, batch: tuple[int, ...], is_network: bool) -> Split:
    if len(batch) - is_network < 1:
        what = "a network's regions are not split" if is_network else "there is one lane"
        return Split(split.mesh, (), what)
    if batch[0] % split.count:
        what = f"{batch[0]} along the leading axis of the batch do not divide among {split.count} devices"
        return Split(split.mesh, (), what)
    return split


def _place(x) -> NamedSharding | None:
    """Where an array lies, if that is on a mesh of several devices and known.

    Of a traced array explicit axes are part of its type, those of one device too.
    """
    if not isinstance(x, jax.Array):
        return None
    place = jax.typeof(x).sharding if is_traced(x) else x.sharding
    if not isinstance(place, NamedSharding):
        return None
    # The axes of a traced array that are not explicit are XLA's to choose, or a shard_map's.
    known = _is_explicit(place.mesh) if is_traced(x) else place.mesh.size > 1
    return place if known else None


def _is_explicit(mesh) -> bool:
    return bool(mesh.axis_types) and all(kind == AxisType.Explicit for kind in mesh.axis_types)


def _leading(batch: tuple[int, ...], data: Data, is_network: bool) -> Iterator[tuple[Any, int | None]]:
    """Each array of a run, in the order of its leaves, and which of its axes is the leading one of the batch."""
    rank = len(batch)

    def at(x, before: int = 0, after: int = 0):
        has = np.ndim(x) == before + rank + after and np.shape(x)[before] == batch[0] > 1
        return x, (before if has else None)

    if not rank:
        yield from ((x, None) for x in jax.tree.leaves(data))
        return
    yield from map(at, (*data.hoisted, *data.state))
    yield from (at(x, 1) for x in data.varying)
    if data.key is not None:
        # Old-style keys have an axis of words.
        yield at(data.key, 0, int(not jnp.issubdtype(data.key.dtype, jax.dtypes.prng_key)))
    for term in data.connections:
        # The regions of a network are the last axis of the batch; a mass alone has an axis of one besides.
        yield at(term.weights, 0, 2 - is_network)
        yield at(term.steps, 0, term.rank_of_steps - is_network)
        yield term.edges, None
    yield from (at(x, 1) for x in (*data.history, data.seeds) if x is not None)
    yield from ((x, None) for x in data.arrays)


def describe(run: Run) -> str:
    """How devices share a run, in words; ``""`` for one device."""
    split = run.split
    if split is None:
        return ""
    if not split.axes:
        return f"each of {split.mesh.size} runs all lanes: {split.why}"
    lanes = f"{math.prod(run.share.batch):,} lanes each, along {', '.join(map(repr, split.axes))}"
    copies = split.mesh.size // split.count
    return f"{split.count} share the lanes, {lanes}" + (f"; {copies} run each share" if copies > 1 else "")


def over_devices(run: Run, data: Data, body: Callable[[Run, Data], Any]):
    """``body(run, data)`` where each device of the run's split has a share of the lanes.

    Parameters
    ----------
    run : with a split
    data : with seeds, for the whole batch
    body : ``(run, data) -> arrays (..., *batch)``
    """
    split, alone = run.split, run._replace(split=None)
    assert split is not None

    def spec(x, at: int | None):
        return PartitionSpec(*((split.axes or None) if axis == at else None for axis in range(np.ndim(x))))

    leaves, structure = jax.tree.flatten(data)
    specs = [spec(x, at) for x, at in _leading(run.batch, data, run.spec.is_network)]
    leaves = [_resharded(x, split.mesh, s) for x, s in zip(leaves, specs, strict=True)]

    def one_share(*leaves):
        return body(run.share, jax.tree.unflatten(structure, leaves))

    shapes = [jax.ShapeDtypeStruct(np.shape(x), x.dtype) for x in leaves]
    with meshless():
        like = jax.eval_shape(lambda *leaves: body(alone, jax.tree.unflatten(structure, leaves)), *shapes)
    out_specs = jax.tree.map(lambda x: spec(x, x.ndim - len(run.batch)), like)
    call = jax.shard_map(one_share, mesh=split.mesh, in_specs=tuple(specs), out_specs=out_specs, check_vma=False)
    return call(*leaves)


def _resharded(x, mesh, spec: PartitionSpec):
    x = jnp.asarray(x)
    return jax.reshard(x, NamedSharding(mesh, spec)) if _is_explicit(mesh) else x
