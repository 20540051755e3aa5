"""Values of a step that are computed around the loop: before it constants and rows, after it outputs that mix lanes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from .. import jaxprs
from .._jax import Literal
from ..pointwise import ELEMENTWISE, evaluate_equation
from .classify import Axes, ClassifiedStep, Level


class Values:
    """Values of a classified step; each constant is computed once."""

    def __init__(self, step: ClassifiedStep):
        self.step = step
        self._known: dict[Any, Any] = dict(step.known)

    def compact(self, v):
        """A constant, of size 1 along the axes that it is only copied along."""
        if isinstance(v, Literal):
            return v.val
        for eqn in self.step.needed_for([v], set(self._known)):
            if self.step.level[eqn.outvars[0]] is Level.STATIC:
                with jax.ensure_compile_time_eval():
                    self._make(eqn)
            else:
                self._make(eqn)
        return self._known[v]

    def _make(self, eqn) -> None:
        name = eqn.primitive.name
        if name == "broadcast_in_dim":
            x, shape = jnp.asarray(self.compact(eqn.invars[0])), [1] * eqn.outvars[0].aval.ndim
            for k, size in zip(eqn.params["broadcast_dimensions"], x.shape):
                shape[k] = size
            self._known[eqn.outvars[0]] = x.reshape(shape)
        elif name in ELEMENTWISE or name == "exprel":
            self._known[eqn.outvars[0]] = evaluate_equation(eqn, [self.compact(v) for v in eqn.invars], {})
        else:
            self._known |= zip(eqn.outvars, jaxprs.bind(eqn, [self.full(v) for v in eqn.invars]))

    def full(self, v):
        """A constant in its own shape."""
        x = self.compact(v)
        return x if isinstance(v, Literal) or jnp.shape(x) == v.aval.shape else jnp.broadcast_to(x, v.aval.shape)

    def evaluated(self, wanted, known: dict) -> list:
        """What follows from the values ``known``, by variable, and from constants."""
        eqns = self.step.needed_for(wanted, {*known, *self._known})
        read = jaxprs.read_by(eqns) | set(jaxprs.variables(wanted))
        env = {v: self.full(v) for v in read if self.step.level[v] <= Level.CONSTANT} | known
        jaxprs.compute([eqn for eqn in eqns if env.keys().isdisjoint(eqn.outvars)], env)
        return [jaxprs.value_of(v, env) for v in wanted]


def spread(x, axes: Axes, lanes: tuple[int, ...], lead: int):
    """An array with an axis for each of the lanes, after the first ``lead``; a scalar where all lanes share it."""
    x = jnp.asarray(x)
    axes = tuple(a if size > 1 else None for a, size in zip(axes, x.shape[lead:], strict=True))
    order = sorted((a, k) for k, a in enumerate(axes) if a is not None)
    rest = [k + lead for k, a in enumerate(axes) if a is None]
    x = jnp.transpose(x, [*range(lead), *[k + lead for _, k in order], *rest])
    shape = [1] * len(lanes)
    for a, _ in order:
        shape[a] = lanes[a]
    return x.reshape(*x.shape[:lead], *(shape if order or lead else ()))


def narrowed(x, axes: Axes, shape: tuple[int, ...], lead: int):
    """From an array with all lanes after ``lead`` axes, the one of ``shape`` whose axes are among the lanes."""
    n = x.ndim - lead
    x = x[(slice(None),) * lead + tuple(slice(None) if k in axes else slice(0, 1) for k in range(n))]
    order = [a for a in axes if a is not None]
    x = jnp.transpose(x, [*range(lead), *[a + lead for a in order], *[k + lead for k in range(n) if k not in order]])
    sizes = [size if a is not None else 1 for a, size in zip(axes, shape)]
    x = x.reshape(*x.shape[:lead], *sizes)
    return jnp.broadcast_to(x, (*x.shape[:lead], *shape))
