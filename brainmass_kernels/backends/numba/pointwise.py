"""Pointwise programs around a loop, such as that of its coefficients, each as one compiled kernel.

XLA would compile an operation of theirs at a time, for seconds, and rounds it as what it is fused with asks for. Here a
lane has the same bits alone, in a batch, and in any other program.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import ad, batching, mlir

from ..._context import SHARES, setting
from ..._jax import Primitive, devices_here, mapped_devices, needs_devices, shaped_like
from ...lanewise import lanewise
from ...pointwise import Program, pullback
from . import call
from .layout import Layout
from .optable import NUMBA
from .source import BlockKernel


def evaluate(program: Program, arguments: Sequence[jax.Array], lanes: int, all_lanes: bool = False) -> list[jax.Array]:
    """A program of arguments that are each ``()``, the same for all lanes, or ``(lanes,)``; differentiable in reverse.

    Returns
    -------
    its outputs, likewise: ``()`` where an output depends on no argument that differs between lanes, unless
    ``all_lanes``
    """
    varies = program.depends([x.ndim == 1 for x in arguments])
    if all_lanes and not any(varies):
        return [jnp.broadcast_to(x, (lanes,)) for x in evaluate(program, arguments, lanes)]
    varies = [all_lanes or x for x in varies]
    outputs: dict[int, jax.Array] = {}
    for per_lane in (False, True):
        places = tuple(k for k, v in enumerate(varies) if v is per_lane)
        if places:
            part = Part.of(program, places)
            values = [x for x, flag in zip(arguments, part.used, strict=True) if flag]
            outputs |= zip(places, _apply.bind(*values, part=part, lanes=lanes if per_lane else None), strict=True)
    return [outputs[k] for k in range(len(varies))]


class Part(NamedTuple):
    """Some outputs of a program, and which of its arguments they need: only those are passed."""

    program: Program
    used: tuple[bool, ...]

    @classmethod
    @functools.lru_cache(maxsize=256)
    def of(cls, program: Program, places: tuple[int, ...]) -> Part:
        part = program.part(places)
        return cls(part, part.uses())

    def __call__(self, *arguments):
        """The outputs, by XLA."""
        values = iter(arguments)
        zeros = (np.zeros((), a.dtype) for a in self.program.in_avals)
        return self.program(*(next(values) if flag else zero for flag, zero in zip(self.used, zeros)))

    @property
    def avals(self) -> list[Any]:
        """Of what is passed."""
        return [a for a, flag in zip(self.program.in_avals, self.used) if flag]

    def moved_by(self, moving: Sequence[bool]) -> tuple[int, ...]:
        """The outputs that depend on these of the arguments."""
        flags = iter(moving)
        depends = self.program.depends([flag and next(flags) for flag in self.used])
        return tuple(k for k, moved in enumerate(depends) if moved)

    @functools.lru_cache(maxsize=256)  # noqa: B019
    def pullback(self, places: tuple[int, ...], moving: tuple[bool, ...]) -> Part:
        """``(arguments, cotangents of some outputs) -> cotangents of some arguments``."""
        some = Part(self.program.part(places), self.used)
        back = pullback(Program(some, self.avals, self.program.label), moving)
        return Part(back, (True,) * len(back.in_avals))


# In JAX --------------------------------------------------------------------------------------------------------------

# A program's own primitive, and that of its tangents, which are only ever transposed. A `jax.custom_vjp` would take all
# outputs as perturbed if one is, and the loop would return cotangents that nobody wants.
_apply, _push = Primitive("pointwise_kernel"), Primitive("tangents_of_pointwise_kernel")
_apply.multiple_results = _push.multiple_results = True


def _shaped(avals, lanes: int | None, like):
    shape = () if lanes is None else (lanes,)
    return [shaped_like(shape, a.dtype, like) for a in avals]


_apply.def_impl(lambda *values, part, lanes: _run(part, values, lanes))
_apply.def_abstract_eval(lambda *avals, part, lanes: _shaped(part.program.out_avals, lanes, avals))
_push.def_abstract_eval(
    lambda *avals, part, lanes, moving: _shaped(
        [part.program.out_avals[k] for k in part.moved_by(moving)], lanes, avals
    )
)
_lower_alone = mlir.lower_fun(lambda *values, part, lanes: _run(part, values, lanes), multiple_results=True)


def _lower(ctx, *values, **params):
    with setting(SHARES, devices_here(mapped_devices(ctx))):
        return _lower_alone(ctx, *values, **params)


mlir.register_lowering(_apply, _lower)
needs_devices(_apply)


def _jvp(primals, tangents, *, part: Part, lanes: int | None):
    outputs = _apply.bind(*primals, part=part, lanes=lanes)
    moving = tuple(type(t) is not ad.Zero for t in tangents)
    chosen = [t for t, moves in zip(tangents, moving) if moves]
    pushed = dict(zip(part.moved_by(moving), _push.bind(*primals, *chosen, part=part, lanes=lanes, moving=moving)))
    return outputs, [pushed.get(k, ad.Zero(jax.typeof(x))) for k, x in enumerate(outputs)]


def _transpose(cotangents, *values, part: Part, lanes: int | None, moving: tuple[bool, ...]):
    primals = values[: len(moving)]
    cotangents = [ad.instantiate_zeros(ct) for ct in cotangents]
    back = part.pullback(part.moved_by(moving), moving)
    by_lane = _apply.bind(*primals, *cotangents, part=back, lanes=lanes)
    uniform = [x.ndim == 0 for x, moves in zip(primals, moving) if moves]
    return [None] * len(primals) + [jnp.sum(ct) if one else ct for ct, one in zip(by_lane, uniform, strict=True)]


def _batched(primitive: Primitive):
    """The rule of vmap: more lanes of the same program, still one kernel."""

    def rule(values, axes, *, lanes: int | None, **params):
        (size,) = {x.shape[axis] for x, axis in zip(values, axes) if isinstance(axis, int)}
        width, shape = lanes or 1, (size,) if lanes is None else (size, lanes)

        def folded(x, axis):
            if not isinstance(axis, int):
                return x if x.ndim == 0 else jnp.broadcast_to(x, (size, width)).reshape(-1)
            return jnp.broadcast_to(jnp.moveaxis(x, axis, 0).reshape(size, -1), (size, width)).reshape(-1)

        if size == 0:
            known = primitive.abstract_eval(*map(jax.typeof, values), lanes=0, **params)[0]
            return [jnp.zeros(shape, a.dtype) for a in known], [0] * len(known)
        outputs = primitive.bind(*map(folded, values, axes), lanes=size * width, **params)
        return [x.reshape(shape) for x in outputs], [0] * len(outputs)

    return rule


ad.primitive_jvps[_apply] = _jvp
ad.primitive_transposes[_push] = _transpose
batching.primitive_batchers[_apply], batching.primitive_batchers[_push] = _batched(_apply), _batched(_push)


@functools.lru_cache(maxsize=512)
def lacks(program: Program) -> str | None:
    """Why a program is no kernel, or ``None``."""
    return NUMBA.lacks(program)


def _run(part: Part, arguments: Sequence[jax.Array], lanes: int | None) -> tuple[jax.Array, ...]:
    if lacks(part.program):
        # A pullback may take what no kernel has: XLA has it.
        return tuple(jnp.broadcast_to(x, () if lanes is None else (lanes,)) for x in part(*arguments))

    def call_kernel(arguments):
        here = next((x.shape[0] for x in arguments if x.ndim), lanes or 1)
        layout = Layout.of_lanes(here, part.program.out_avals[0].dtype)
        kernel = PointwiseKernel.of(part, tuple(x.ndim == 0 for x in arguments), layout)
        return call.run(kernel, arguments)["out"]

    if lanes is None:
        return tuple(x.reshape(()) for x in call_kernel(arguments))
    return lanewise(call_kernel, ("coefs",), lanes=lanes)(tuple(arguments))


class PointwiseKernel(BlockKernel):
    """One evaluation of a program. Arguments: its own. Results: its outputs.

    Parameters
    ----------
    uniform : for each argument, whether all lanes share it
    """

    kind = "pointwise"

    def __init__(self, part: Part, uniform: Sequence[bool], layout: Layout):
        super().__init__(NUMBA, layout)
        self.program, names = part.program, self.names("a", len(part.program.in_avals))
        taken = [name for name, flag in zip(names, part.used, strict=True) if flag]
        places = self.take("argument", [None] * len(taken))
        self.rows.add(*(name for name, one in zip(taken, uniform, strict=True) if not one))
        outputs = self.rows.add(*self.names("y", len(part.program.out_avals)))
        results = self.give("out", [(layout.lanes,)] * len(outputs))
        self.line("lanes = plan[0]")
        self.begin()
        self.read(taken, places, uniform)
        with self.lanes() as loop:
            loop.store(outputs, loop.values(self.program, names))
        self.gather(outputs, [self.address(name) for name in results])

    @classmethod
    @functools.lru_cache(maxsize=512)
    def of(cls, part: Part, uniform: tuple[bool, ...], layout: Layout) -> PointwiseKernel:
        """Written once: each program that contains it asks again."""
        return cls(part, uniform, layout)

    @property
    def operations(self) -> int:
        return self.layout.lanes * len(self.program.jaxpr.jaxpr.eqns)
