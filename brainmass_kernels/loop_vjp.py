"""A backend's loop with its adjoint as its gradient, and with `vmap` folded into its lanes: still one kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from . import derivatives, dispatch
from .backends.base import Backend, Carry, Connections, Cotangents, Loop, Operands, Pullbacks, Wanted
from .lanewise import UNIFORM_NDIM, lanes_of, lanewise

# The kind of each part of what a loop carries; see `folded`.
CARRY = Carry("lanes", "lanes")  # pyright: ignore


def operand_kinds(loop: Loop) -> Operands:
    """The kind of each operand of a loop."""
    terms = loop.coupling.terms if loop.coupling else ()
    kinds: Any = (Connections("weights", "weights" if t.edges is None else "edges", "shared") for t in terms)  # pyright: ignore
    return Operands("coefs", "rows", "lanes", tuple(kinds))  # pyright: ignore


def differentiable(
    implementation: str, checkpoint_every: int, loop: Loop, only_once: str, check: Callable[[], None] = lambda: None
):
    """The loop as a function ``(operands, initial, near) -> (records, final)``.

    Parameters
    ----------
    implementation : the backend's name
    checkpoint_every : steps between checkpoints of a gradient
    loop : Loop
    only_once : the message of the error that a second derivative raises
    check : called when a gradient is traced

    ``near`` says at run time whether the adjoint takes inverse steps; ``None`` if that is known before.
    """
    backend = dispatch.load(implementation)
    regions, kinds_of_operands = loop.coupling.regions if loop.coupling else 1, operand_kinds(loop)

    def as_lanes(fun, kinds):
        # Interpreters and `scan` are operations of XLA's own, which it can split.
        return fun if loop.interpret or implementation == "scan" else lanewise(fun, kinds, regions)

    @jax.custom_vjp
    def call(operands: Operands, initial: Carry, near):
        def run(operands, initial):
            return tuple(backend.forward(loop, operands, initial)[:2])

        kinds = (kinds_of_operands, CARRY)
        return folded(as_lanes(run, kinds), kinds, (), regions)(operands, initial)

    def forward(operands, initial, near):
        check()
        wanted = _wanted(loop, operands)
        values = jax.tree.map(lambda x: x.value, (operands, initial, near), is_leaf=lambda x: hasattr(x, "perturbed"))
        operands, initial, near = derivatives.once(values, only_once)

        def run(operands, initial):
            return tuple(backend.forward(loop, operands, initial, checkpoint_every))

        kinds = (kinds_of_operands, CARRY)
        records, final, saved = folded(as_lanes(run, kinds), kinds, (), regions)(operands, initial)
        return (records, final), (operands, near, saved, derivatives.Static(wanted))

    def backward(residuals, cotangents):
        operands, near, saved, static = residuals
        wanted = static.value
        cotangents = jax.tree.map(_instantiated, cotangents, is_leaf=_is_zero)
        cotangents = derivatives.once(Cotangents(*cotangents), only_once)
        adjoint = _adjoint(backend, loop, wanted, checkpoint_every, as_lanes)
        kinds = ("coefs", kinds_of_operands, "lanes", Cotangents("lanes", CARRY))  # pyright: ignore
        lane_cotangents = folded(adjoint, kinds, wanted.inputs, regions)(near, operands, saved, cotangents)
        return _cotangents(operands, wanted, lane_cotangents), lane_cotangents.initial, None

    call.defvjp(forward, backward, symbolic_zeros=True)
    return call


def _wanted(loop: Loop, operands: Operands) -> Wanted:
    """Which cotangents are wanted; the arguments are those of a custom_vjp's forward pass, with ``perturbed``."""
    coefs = (c.perturbed and read for c, read in zip(operands.coefs, loop.read_coefs(), strict=True))
    weights = tuple(term.weights.perturbed for term in operands.connections)  # pyright: ignore
    return Wanted(tuple(coefs), tuple(x.perturbed for x in operands.inputs), weights)


def _adjoint(backend: Backend, loop: Loop, wanted: Wanted, checkpoint_every: int, as_lanes):
    pullbacks = Pullbacks.of(loop, wanted)

    def run(near, operands, saved, cotangents):
        def apply(pullbacks):
            adjoint = backend.adjoint(loop, pullbacks, wanted, operands, saved, cotangents, checkpoint_every)
            uniform = [x.ndim == 1 for x in _chosen(operands.inputs, wanted.inputs)]
            sums = (jnp.sum(x, -1, keepdims=True) if one else x for x, one in zip(adjoint.inputs, uniform, strict=True))
            return adjoint._replace(inputs=tuple(sums))

        if near is None:
            return apply(pullbacks)
        return lax.cond(near, lambda: apply(pullbacks), lambda: apply(pullbacks._replace(inverse=None)))

    kinds = ("shared", operand_kinds(loop), "lanes", Cotangents("lanes", CARRY))  # pyright: ignore
    by_lanes = as_lanes(run, kinds)

    def adjoint(near, operands, saved, cotangents):
        # All lanes take the same way, wherever they lie.
        return by_lanes(None if near is None else jnp.all(near), operands, saved, cotangents)

    return adjoint


def _cotangents(operands: Operands, wanted: Wanted, by_lane) -> Operands:
    """The cotangents of the operands: those of a uniform one are summed over the lanes."""
    connections = tuple(map(_cotangent_of_term, operands.connections, by_lane.weights))
    coefs = zip(by_lane.coefs, _chosen(operands.coefs, wanted.coefs))
    coefs = [cotangent if c.ndim else jnp.sum(cotangent) for cotangent, c in coefs]
    inputs = zip(by_lane.inputs, _chosen(operands.inputs, wanted.inputs))
    # Of a uniform one it is a sum already, but under vmap, which has made it one for each lane.
    inputs = [cotangent if x.ndim == 2 else jnp.sum(cotangent, axis=1) for cotangent, x in inputs]
    return Operands(_placed(wanted.coefs, coefs), _placed(wanted.inputs, inputs), None, connections)


def _cotangent_of_term(connections: Connections, weights) -> Connections:
    if weights is not None and connections.weights.ndim == 2:
        weights = jnp.sum(weights, axis=-1)
    return connections._replace(weights=weights, steps=None, edges=None)


def _is_zero(x) -> bool:
    return isinstance(x, jax.custom_derivatives.SymbolicZero)


def _instantiated(x):
    return jnp.zeros(x.shape, x.dtype) if _is_zero(x) else x


def _chosen(values, flags):
    return [x for x, flag in zip(values, flags) if flag]


def _placed(flags, values):
    values = iter(values)
    return tuple(next(values) if flag else None for flag in flags)


# vmap ---------------------------------------------------------------------------------------------------------------


def folded(fun, kinds: tuple[Any, ...], expand: tuple[bool, ...] = (), regions: int = 1):
    """``fun``, whose vmap folds the mapped axis into its lanes.

    Parameters
    ----------
    fun : takes pytrees and returns a pytree of arrays whose last axis is the lanes
    kinds : of each argument, or in a tuple of its type, of its parts: ``"coefs"``, each ``()`` or ``(L,)``;
        ``"rows"``, each ``(T,)`` or ``(T, L)``; ``"weights"``, as of `Connections`, of two axes, or three with the
        networks; ``"edges"``, of one, or two; ``"shared"``, the same for all; ``"lanes"``, whose last axis is always
        the lanes
    expand : for each of the rows, whether a uniform one is expanded to each lane, as its cotangent is wanted
    regions : lanes of a network
    """
    mapped = jax.custom_batching.custom_vmap(fun)

    @mapped.def_vmap
    def fold(size, batched, *args):
        if size == 0:
            return _fold_nothing(fun, batched, args)
        to_lanes = _Folding(size, lanes_of(kinds, args), expand, regions)
        args = [to_lanes(kind, arg, flags) for kind, arg, flags in zip(kinds, args, batched, strict=True)]
        out = folded(fun, kinds, expand, regions)(*args)
        out = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(*x.shape[:-1], size, x.shape[-1] // size), -2, 0), out)
        return out, jax.tree.map(lambda _: True, out)

    return mapped


def _fold_nothing(fun, batched, args):
    """A mapped axis of length 0: empty arrays of the right shapes."""
    each = jax.tree.map(lambda x, f: jax.ShapeDtypeStruct(x.shape[int(f) :], x.dtype), args, tuple(batched))
    like = jax.eval_shape(fun, *each)
    return jax.tree.map(lambda x: jnp.zeros((0, *x.shape), x.dtype), like), jax.tree.map(lambda _: True, like)


class _Folding:
    """Turns arguments into those of a loop of ``size`` times as many lanes."""

    def __init__(self, size: int, lanes: int, expand: tuple[bool, ...], regions: int):
        self.size, self.lanes, self.expand, self.networks = size, lanes, expand, lanes // regions

    def __call__(self, kind, arg, flags):
        if arg is None:
            return None
        if isinstance(kind, tuple):
            parts = map(self, kind, arg, flags)
            return tuple(parts) if type(arg) is tuple else type(arg)(*parts)
        if kind == "rows":
            wanted = self.expand or (False,) * len(arg)
            return tuple(self._one(kind, x, f, w) for x, f, w in zip(arg, flags, wanted, strict=True))
        return jax.tree.map(lambda x, f: self._one(kind, x, f), arg, flags)

    def _one(self, kind: str, x, batched: bool, wanted: bool = False):
        uniform = x.ndim - batched == UNIFORM_NDIM.get(kind, -1)
        if kind == "shared" or (uniform and not batched and not wanted):
            return x
        x = x if batched else jnp.broadcast_to(x, (self.size, *x.shape))
        if uniform:
            width = self.networks if kind in ("weights", "edges") else self.lanes
            x = jnp.broadcast_to(x[..., None], (*x.shape, width))
        return jnp.moveaxis(x, 0, -2).reshape(*x.shape[1:-1], self.size * x.shape[-1])
