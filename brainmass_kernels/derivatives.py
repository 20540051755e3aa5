"""Identities that raise a clear error for derivatives that a fused run lacks.

A fused run is a `jax.custom_vjp`: it has one derivative, in reverse mode. Any other fails inside JAX, often long after
`simulate` has returned, with a message on custom_vjp functions or foreign calls. So the arguments of a run pass through
`in_reverse`, and the arguments of its forward pass through `once`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import ad, batching, mlir

from ._jax import Primitive, is_traced, set_linearisation


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Static:
    """A hashable value among the residuals of a `jax.custom_vjp`, which is no data."""

    value: Any


def in_reverse(tree: Any, message: str) -> Any:
    """The pytree; its tangents can be transposed, but computing them raises ``TypeError(message)``."""
    return _through(_in_reverse, tree, message)


def once(tree: Any, message: str) -> Any:
    """The pytree; differentiating it raises ``TypeError(message)``."""
    return _through(_once, tree, message)


def _through(primitive, tree, message: str):
    """Pass the traced floating-point leaves through one call, so that their tangents are known or unknown together."""
    leaves, structure = jax.tree.flatten(tree)
    places = [n for n, x in enumerate(leaves) if is_traced(x) and jnp.issubdtype(x.dtype, jnp.inexact)]
    if places:
        for n, x in zip(places, primitive.bind(*(leaves[n] for n in places), message=message), strict=True):
            leaves[n] = x
    return jax.tree.unflatten(structure, leaves)


def _refuse(*_, message: str, **__):
    raise TypeError(message)


def _identity(name: str) -> Primitive:
    primitive = Primitive(name)
    primitive.multiple_results = True
    primitive.def_abstract_eval(lambda *avals, message: avals)
    batching.primitive_batchers[primitive] = lambda args, axes, **params: (primitive.bind(*args, **params), axes)
    return primitive


_once, _in_reverse, _tangents = map(_identity, ("differentiable_once", "reverse_only", "tangents_of_reverse_only"))
for _primitive in (_once, _in_reverse):
    _primitive.def_impl(lambda *args, message: args)
    mlir.register_lowering(_primitive, lambda ctx, *args, message: args)

ad.primitive_jvps[_once] = lambda primals, tangents, *, message: _refuse(message=message)

# Reverse mode stages the tangents and then transposes them; it never computes them.
_tangents.def_impl(_refuse)
batching.primitive_batchers[_tangents] = lambda args, axes, *, message: _refuse(message=message)
mlir.register_lowering(_tangents, lambda ctx, *args, message: _refuse(message=message))
ad.primitive_jvps[_tangents] = lambda primals, tangents, *, message: _refuse(message=message)
ad.primitive_transposes[_tangents] = lambda cotangents, *tangents, message: list(cotangents)


def _push(nonzero, tangents, message):
    chosen = [t for t, flag in zip(tangents, nonzero, strict=True) if flag]
    pushed = iter(_tangents.bind(*chosen, message=message))
    return [next(pushed) if flag else t for t, flag in zip(tangents, nonzero, strict=True)]


def _jvp(primals, tangents, *, message: str):
    nonzero = [type(t) is not ad.Zero for t in tangents]
    return _in_reverse.bind(*primals, message=message), _push(nonzero, tangents, message)


def _linearise(reverse: bool, nonzero, *primals, message: str):
    """The rule of `jax.linearize`, which raises, and of `jax.vjp`."""
    if not reverse:
        _refuse(message=message)
    push = lambda _, *tangents: _push(nonzero, tangents, message)  # noqa: E731
    return _in_reverse.bind(*primals, message=message), list(nonzero), (), push


ad.primitive_jvps[_in_reverse] = _jvp
set_linearisation(_in_reverse, _linearise)
