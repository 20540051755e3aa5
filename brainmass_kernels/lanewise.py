"""Functions of lanes as one operation of JAX's, which devices share by lanes.

XLA sees nothing of a kernel but its arguments: where they lie on many devices, it copies all of them to each device.
`lanewise` tells it that lanes are independent, so that each device runs the kernel on its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.interpreters import mlir
from jax.sharding import NamedSharding, PartitionSpec

from ._context import SHARES, setting
from ._jax import (
    Primitive,
    aligned,
    axes_along,
    devices_here,
    jaxpr_as_fun,
    lowered_devices,
    meshless,
    needs_devices,
    shaped_like,
)
from .backends.base import Carry, Cotangents
from .errors import Unsupported

# Dimensions of an argument of this kind that has one value for all lanes; others have a last axis of lanes or, for
# weights, of networks.
UNIFORM_NDIM = {"coefs": 0, "rows": 1, "weights": 2, "edges": 1}


class Lanes(NamedTuple):
    """Where a flat function has lanes.

    Attributes
    ----------
    arguments, results : for each, whether its last axis is the lanes; results without are sums over the lanes
    networks : how many parts of the lanes are independent
    """

    arguments: tuple[bool, ...]
    results: tuple[bool, ...]
    networks: int

    def divides(self, count: int) -> bool:
        """Whether so many devices have equal shares."""
        return count > 1 and self.networks % count == 0


def lanes_of(kinds, args) -> int:
    """The number of lanes: the length of the last axis of the first array that always has lanes."""
    for kind, arg in zip(kinds, args, strict=True):
        if kind == "lanes" and (leaves := jax.tree.leaves(arg)):
            return leaves[0].shape[-1]
        if isinstance(kind, Carry | Cotangents) and (lanes := lanes_of(kind, arg)):
            return lanes
    return 0


def _has_lanes(kind, arg) -> Iterator[bool]:
    """For each leaf of an argument, whether its last axis is the lanes; see `folded` for the kinds."""
    if arg is None:
        return
    if isinstance(kind, tuple):
        for part, value in zip(kind, arg, strict=True):
            yield from _has_lanes(part, value)
        return
    for leaf in jax.tree.leaves(arg):
        yield kind == "lanes" or (kind != "shared" and leaf.ndim > UNIFORM_NDIM[kind])


def lanewise(fun: Callable, kinds: tuple[Any, ...], regions: int = 1, lanes: int | None = None) -> Callable:
    """``fun`` as one operation, whose lanes may lie on many devices; it has no derivative.

    Parameters
    ----------
    fun : takes pytrees and returns a pytree of arrays whose last axis is the lanes, or, of length 1, their sum
    kinds : of each argument, as of `loop_vjp.folded`
    regions : lanes of a network; lanes of different networks are independent
    lanes : how many there are, if no argument says so
    """

    def call(*args):
        leaves, structure = jax.tree.flatten(args)

        def flat(*leaves):
            return tuple(jax.tree.leaves(fun(*jax.tree.unflatten(structure, leaves))))

        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves]
        with setting(SHARES, manual_shares()), meshless():
            jaxpr, like = jax.make_jaxpr(lambda *x: fun(*jax.tree.unflatten(structure, x)), return_shape=True)(*shapes)
        networks = (lanes or lanes_of(kinds, args)) // regions
        results = tuple(x.shape[-1] % max(1, networks) == 0 for x in jaxpr.out_avals)
        places = Lanes(tuple(_has_lanes(kinds, args)), results, networks)
        values = _lanewise.bind(*aligned(leaves), call=jaxpr, flat=flat, lanes=places)
        return jax.tree.unflatten(jax.tree.structure(like), values)

    return call


def manual_shares() -> int:
    """Devices of this process that run what is traced here at once: those along the axes that a `shard_map` maps."""
    mesh = jax.sharding.get_abstract_mesh()
    # What is traced as it is lowered sees no mesh; its rule has set how many there are.
    return max(SHARES.get(), devices_here(math.prod(mesh.shape[name] for name in mesh.manual_axes)))


# In JAX --------------------------------------------------------------------------------------------------------------

_lanewise = Primitive("lanewise")
_lanewise.multiple_results = True
_lanewise.def_impl(lambda *values, call, flat, lanes: jaxpr_as_fun(call)(*values))


@_lanewise.def_effectful_abstract_eval
def _shapes(*avals, call, flat, lanes):
    return [shaped_like(x.shape, x.dtype, avals) for x in call.out_avals], call.effects


def _lower(ctx, *values, call, flat, lanes: Lanes):
    devices = lowered_devices(ctx)
    if devices == 1:
        return mlir.core_call_lowering(ctx, *values, name="lanewise", call_jaxpr=call)
    if "tpu" in ctx.module_context.platforms:
        raise Unsupported(
            f"a program for {devices} TPUs calls a kernel on arrays of which JAX tells too late how they lie on the "
            "devices: call it under `jax.set_mesh(mesh)`, whose devices then share the lanes, or within `jax.shard_map`"
        )
    return mlir.lower_fun(_partitioned(flat, call.out_avals, lanes), multiple_results=True)(ctx, *values)


mlir.register_lowering(_lanewise, _lower)
needs_devices(_lanewise)


def _partitioned(flat: Callable, outputs, lanes: Lanes) -> Callable:
    """``flat`` with a rule by which XLA splits it over devices, once it knows how the arguments lie on them."""
    from jax.experimental.custom_partitioning import custom_partitioning

    def partition(mesh, arguments, results):
        axes = _axes_of_lanes(arguments, lanes)
        count = math.prod(mesh.shape[name] for name in axes)
        axes = axes if lanes.divides(count) else ()

        def place(x, has_lanes: bool):
            spec = [None] * (len(x.shape) - 1)
            return NamedSharding(mesh, PartitionSpec(*spec, axes) if has_lanes and axes else PartitionSpec())

        def share(*values):
            with setting(SHARES, devices_here(count)):
                results = flat(*values)
            if not axes:
                return results
            return tuple(x if h else jax.lax.psum(x, axes) for x, h in zip(results, lanes.results, strict=True))

        return (
            mesh, share, tuple(map(place, results, lanes.results)), tuple(map(place, arguments, lanes.arguments))
        )  # fmt: skip

    def shared(*values):
        call = custom_partitioning(flat)
        call.def_partition(partition=partition, sharding_rule=_sharding_rule(values, outputs, lanes))
        return call(*values)

    return shared


def _axes_of_lanes(arguments, lanes: Lanes) -> tuple[str, ...]:
    """The axes of the mesh that the lanes lie along."""
    along = (axes_along(x.sharding, len(x.shape) - 1) for x, flag in zip(arguments, lanes.arguments) if flag)
    return next(filter(None, along), ())


def _sharding_rule(arguments, results, lanes: Lanes):
    """Shardy's rule: networks are independent; all other axes are needed whole on each device."""
    from jax.experimental.custom_partitioning import ArrayMapping, CompoundFactor, SdyShardingRule

    # Names of the axes that are needed whole, and the sizes of the parts of axes.
    whole: list[str] = []
    parts: dict[str, Any] = {}

    def factors(count: int) -> list[str]:
        new = [f"axis{len(whole) + k}" for k in range(count)]
        whole.extend(new)
        return new

    def mapping(x, has_lanes: bool):
        outer = factors(len(x.shape) - has_lanes)
        if not has_lanes:
            return ArrayMapping(*outer)
        each = x.shape[-1] // lanes.networks
        if each == 1:
            return ArrayMapping(*outer, "networks")
        (inner,) = factors(1)
        parts.update({"networks": lanes.networks, inner: each})
        return ArrayMapping(*outer, CompoundFactor("networks", inner))

    operands = tuple(map(mapping, arguments, lanes.arguments))
    outputs = tuple(map(mapping, results, lanes.results))
    # A factor that is an axis of its own somewhere has that axis's size.
    alone = any("networks" in m for m in (*operands, *outputs))
    sizes = {name: size for name, size in parts.items() if name != "networks" or not alone}
    return SdyShardingRule(operands, outputs, need_replication_factors=tuple(whole), **sizes)
