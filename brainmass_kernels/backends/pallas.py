"""What the Pallas kernels share: programs on values in registers, and groups of references."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable

import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from .._jax import eqn_source
from ..pointwise import RULES, TRANSCENDENTAL, Program, evaluate
from .base import Request, lacking, programs_of


def lacks(program: Program, supported: Collection[str], where: str) -> str | None:
    """Why Mosaic cannot hold a program, or ``None``.

    Parameters
    ----------
    supported : names of the primitives that it has
    where : the kind of device, for the message
    """
    if any(jnp.ndim(c) for c in program.jaxpr.consts):
        return f"the {program.label} holds a constant array; give it as a parameter of the model"
    for eqn in program.jaxpr.jaxpr.eqns:
        name = eqn.primitive.name
        if name not in supported:
            return f"Mosaic has no '{name}' on {where} ({eqn_source(eqn)})"
        if eqn.params.get("accuracy") is not None and name not in RULES:
            return f"Mosaic has no '{name}' of a given accuracy on {where} ({eqn_source(eqn)})"
    return None


def unsupported(request: Request, lacks: Callable[[Program], str | None]) -> str | None:
    """Why a kernel cannot run a loop without networks, or ``None``; ``lacks`` says why it cannot hold a program."""
    if jnp.dtype(request.dtype) != jnp.float32:
        return f"it computes in float32 only, not in {jnp.dtype(request.dtype).name}"
    return lacking(lacks, *programs_of(request.loop))


def parted(values, flags) -> tuple[list, list]:
    """The values whose flag is off, and those whose flag is on."""
    return [v for v, f in zip(values, flags) if not f], [v for v, f in zip(values, flags) if f]


def merged(off, on, flags) -> tuple:
    """The inverse of `parted`."""
    off, on = iter(off), iter(on)
    return tuple(next(on) if f else next(off) for f in flags)


def apply(program: Program, *args, rules=None) -> tuple:
    """Evaluate a program within a kernel, some primitives by rules of its own."""
    # A captured scalar would otherwise be an operand that the kernel does not have.
    return evaluate(program.jaxpr.replace(consts=[np.asarray(c) for c in program.jaxpr.consts]), *args, rules=rules)


def fill(values, tile) -> tuple:
    """Values of the block's shape: a program's output may be a constant."""
    return tuple(jnp.broadcast_to(jnp.asarray(x, jnp.float32), tile) for x in values)


def added(a, b) -> tuple:
    return tuple(x if isinstance(y, np.generic | np.ndarray | float) and y == 0 else x + y for x, y in zip(a, b))


def read(refs, *index) -> tuple:
    return tuple(ref[index or ...] for ref in refs)


def write(refs, values, *index) -> None:
    for ref, value in zip(refs, values, strict=True):
        ref[index or ...] = value


def operations(*programs: Program) -> tuple[int, int]:
    """How many operations of any kind and how many transcendental ones a step takes."""
    names = [eqn.primitive.name for p in programs for eqn in p.jaxpr.jaxpr.eqns]
    return len(names), sum(name in TRANSCENDENTAL for name in names)


def grouped(names: Iterable[str], values: Iterable) -> dict[str, list]:
    """Values by the name of their group; an absent group is empty."""
    groups = defaultdict(list)
    for name, value in zip(names, values, strict=True):
        groups[name].append(value)
    return groups


def when(on):
    return pl.when(on) if on is not True else lambda f: f()
