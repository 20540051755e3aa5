"""How a fit's lanes are divided: into chunks of targets, one after another, and each chunk over devices.

Lanes do not mix, so what a step computes for some targets is what it computes for them among all; of targets that share
values, each is computed by itself, and they are put together after the last chunk. Memory is that of one chunk. Only
what is small, such as errors and slopes, is read back, and every process then takes the same step with it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .. import grids, memory
from .._context import setting
from ..dispatch import Plan
from ..errors import check_counts
from .problem import Problem, lanes_of

#: Bytes that a step may take on a CPU: more lanes at once are no faster.
_ON_CPU = 2**30
#: The share of the memory that a step may take.
_SHARE = 4
#: Memory of a run and of each of its derivatives that are carried in the loop, in that of a gradient's comparison.
_CARRIED = 0.6
#: The name of the axis of a fit's mesh.
_AXIS = "lanes"
#: The devices of the user's mesh, during a call of `over_devices`.
_MESH: ContextVar[Mesh | None] = ContextVar("brainmass_kernels_mesh", default=None)


class Division(NamedTuple):
    """The targets that run at once, and the devices that share them.

    Attributes
    ----------
    count : targets
    size : targets of a chunk
    mesh : of the devices, with one axis; ``None`` for one device
    """

    count: int
    size: int
    mesh: Mesh | None = None

    @property
    def spans_processes(self) -> bool:
        return self.mesh is not None and len({d.process_index for d in self.mesh.devices.flat}) > 1

    def chunks(self, begin: int = 0) -> Iterator[Rows]:
        """The targets of each chunk, from ``begin`` on."""
        for start in range(begin, self.count, self.size):
            yield Rows(start, min(start + self.size, self.count), self.size)

    def call(self, function, problem: Problem, z: Mapping[str, Any], keys, *data) -> Any:
        """``function(problem, z, keys, *data)``, of arrays ``(n, starts, ...)``, on all devices."""
        if self.mesh is None:
            return function(problem, z, keys, *data)
        n, starts = lanes_of(z)
        found = jax.block_until_ready(_over_devices(function, *self._arguments(problem, z, keys, data)))
        return jax.tree.map(lambda x: np.asarray(x)[:n, :starts], found)

    def lower(self, function, problem: Problem, z: Mapping[str, Any], keys, *data) -> None:
        """Trace and lower what `call` would run, which it then only compiles."""
        if self.mesh is None:
            function.lower(problem, z, keys, *data)
        else:
            _over_devices.lower(function, *self._arguments(problem, z, keys, data))

    def _arguments(self, problem: Problem, z, keys, data) -> tuple:
        mesh = self.mesh
        assert mesh is not None
        n, starts = lanes_of(z)
        axis, share = _axis_of(n, starts, mesh.size, problem.pooling.bind)
        lengthened = functools.partial(_lengthened, axis=axis, count=share * mesh.size)
        z = jax.tree.map(lambda x: self._placed(lengthened(x), axis), dict(z))
        # The data are (n, 1, ...): of all starts.
        data = jax.tree.map(lambda x: self._placed(x if axis else lengthened(x), None if axis else 0), data)
        kind = str(jax.random.key_impl(keys)) if jnp.issubdtype(keys.dtype, jax.dtypes.prng_key) else None
        words = self._placed(keys if kind is None else jax.random.key_data(keys), None)
        return problem, mesh, axis, self.spans_processes, kind, z, words, data

    def _placed(self, x, axis: int | None) -> jax.Array:
        """An array that every process has, with one of its axes along all devices."""
        assert self.mesh is not None
        x = np.asarray(x).astype(jnp.result_type(x), copy=False)
        place = NamedSharding(self.mesh, _spec(axis))
        return jax.make_array_from_callback(x.shape, place, lambda index: x[index])


class Rows(NamedTuple):
    """The targets of a chunk; the last chunk repeats its last target to have the size of the others."""

    start: int
    stop: int
    size: int

    def of(self, tree):
        """These rows of arrays ``(n, ...)``; one row that all targets share stays."""
        rows = np.minimum(np.arange(self.start, self.start + self.size), self.stop - 1)

        def taken(x):
            everything = len(x) == 1 or (self.start == 0 and len(x) == self.size)
            return x if everything else np.asarray(x)[rows]

        return jax.tree.map(taken, tree)

    def without_repeats(self, tree):
        count = self.stop - self.start
        return tree if count == self.size else jax.tree.map(lambda x: x[:count], tree)


def _spec(axis: int | None) -> PartitionSpec:
    return PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, _AXIS)


def _axis_of(n: int, starts: int, devices: int, bound: bool) -> tuple[int, int]:
    """The axis of the lanes that devices share, with the fewer repeated lanes, and the share of each.

    Targets that depend on each other stay together.
    """
    by_target, by_start = -(-n // devices), -(-starts // devices)
    return (1, by_start) if bound or by_start * n < by_target * starts else (0, by_target)


def _lengthened(x, axis: int, count: int) -> np.ndarray:
    """An array whose last entry along an axis is repeated."""
    x = np.asarray(x)
    return np.take(x, np.minimum(np.arange(count), x.shape[axis] - 1), axis)


@functools.partial(jax.jit, static_argnums=tuple(range(6)))
def _over_devices(
    function, problem: Problem, mesh: Mesh, axis: int, everywhere: bool, kind: str | None, z, words, data
):
    """``function(problem, z, keys, *data)`` where each device has some of the lanes; ``everywhere``, all get all."""

    def one_share(z, words, data):
        return function(problem, z, words if kind is None else jax.random.wrap_key_data(words, impl=kind), *data)

    along, whole = _spec(axis), PartitionSpec()
    call = jax.shard_map(
        one_share, mesh=mesh, in_specs=(along, whole, whole if axis else along), out_specs=along, check_vma=False
    )
    found = call(z, words, data)
    return jax.lax.with_sharding_constraint(found, NamedSharding(mesh, whole)) if everywhere else found


# The choice ---------------------------------------------------------------------------------------------------------


def divide(
    problem: Problem, plan: Plan, starts: int, least_squares: bool, targets_at_once: int | None = None
) -> Division:
    """The division of a fit, over the user's mesh or all devices of this process.

    Parameters
    ----------
    plan : of one start of each target
    least_squares : whether derivatives are carried in the loop
    targets_at_once : ``None``, as many as fit the memory

    Raises
    ------
    ValueError : chunks of targets that share every value, and so one run
    """
    n, one_run = problem.comparison.count, problem.pooling.bind and problem.apart is problem
    mesh = _MESH.get() or _local_mesh(max(n, starts))
    if targets_at_once is not None:
        check_counts(1, targets_at_once=targets_at_once)
        if one_run and targets_at_once < n:
            raise ValueError(
                f"'targets_at_once' got {targets_at_once}, but all free values are shared: one run is compared with "
                f"all {n} targets, whose number takes next to no memory; leave it out"
            )
        return Division(n, min(targets_at_once, n), mesh)
    if one_run:
        return Division(n, n, mesh)
    most = max(1, int(_room(mesh) // (a_lane(problem, plan, least_squares) * starts * problem.realisations)))
    return Division(n, _even(n, most, 1 if mesh is None else mesh.size), mesh)


def a_lane(problem: Problem, plan: Plan, least_squares: bool) -> float:
    """Bytes of one lane in a step: records, what a gradient stores, and what the comparison makes of the records.

    Parameters
    ----------
    plan : of one start of each target
    least_squares : whether derivatives are carried in the loop
    """
    lanes = problem.comparison.count * problem.realisations
    compared = problem.comparison.copies(problem.realisations) * plan.bytes_recorded / lanes
    if least_squares:
        return _CARRIED * (1 + len(problem.moving)) * compared
    return compared + (plan.bytes_copied + plan.bytes_gradient) / lanes


def _even(n: int, most: int, devices: int) -> int:
    """The size of equal chunks of at most so many targets, a multiple of the devices where that is as many."""
    if n <= most:
        return n
    size = -(-n // -(-n // most))
    return size if size < devices else min(-(-size // devices), max(most // devices, 1)) * devices


def _room(mesh: Mesh | None) -> int:
    """Bytes that a step may take on all devices together; those of a CPU share its memory."""
    available = memory.available()
    if jax.default_backend() == "cpu":
        return _ON_CPU if available is None else min(_ON_CPU, available // _SHARE)
    return (16 * _ON_CPU if available is None else available) // _SHARE * (1 if mesh is None else mesh.size)


def _local_mesh(most: int) -> Mesh | None:
    """Of the devices of this process, no more than there are lanes to share."""
    devices = grids.devices_of_a_chunk()[:most]
    return _mesh(devices) if len(devices) > 1 else None


def _mesh(devices) -> Mesh:
    return Mesh(np.array(devices).reshape(-1), (_AXIS,))


def over_devices(function: Callable) -> Callable:
    """Make a function of a `Problem`'s parts run its lanes on the user's mesh: that which is set, or has an argument.

    Within the function no mesh is set: arrays that are not split stay on one device.
    """

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        now = jax.sharding.get_mesh()
        arrays = ((x, getattr(x, "values", None), getattr(x, "power", None)) for x in (*args, *kwargs.values()))
        places = [now, *(getattr(getattr(x, "sharding", None), "mesh", None) for x in jax.tree.leaves([*arrays]))]
        several = (place for place in places if isinstance(place, Mesh) and not place.empty and place.size > 1)
        mesh = next((_mesh(place.devices) for place in several), None)
        with setting(_MESH, mesh), contextlib.nullcontext() if now.empty else jax.set_mesh(None):
            return function(*args, **kwargs)

    return wrapper
