"""A pointwise program over arrays as one Pallas kernel for TPUs or for Hopper: each array passes through once.

What is one number for all elements stays one: it is read as a scalar and spread within the kernel. The gradient is a
second kernel, which evaluates the program's pullback: it saves nothing but arguments, reads those that it needs, and
sums the cotangents of scalars over the elements of each block.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .. import derivatives
from .._jax import MOSAIC_GPU, NO_MOSAIC_GPU
from ..errors import Unsupported
from ..pointwise import RULES, Program, evaluate, pullback
from ..programs import on_clear
from . import mosaic_gpu
from .base import lacking
from .mosaic_gpu import THREADS, WARPS, Layout, plgpu
from .mosaic_tpu import optable
from .mosaic_tpu.call import interpreter
from .mosaic_tpu.layout import COLUMNS
from .pallas import apply, fill, merged, parted, read

# Rows of 128 elements in a block of a TPU: half a megabyte for each of ten arrays, twice.
_ROWS = 256


def call(program: Program, values: Sequence[jax.Array], implementation: str, interpret: str = "") -> tuple:
    """Evaluate a program on float32 numbers and arrays of one shape.

    Parameters
    ----------
    program : pointwise, of as many scalars
    implementation : "mosaic_tpu" or "mosaic_gpu"
    interpret : as in `base.Loop`

    Returns
    -------
    one array of the arrays' shape for each output

    Raises
    ------
    Unsupported : a primitive, or a gradient of one, that the kernel cannot hold
    """
    program = _spelled(program)
    lacks = optable.lacks if implementation == "mosaic_tpu" else mosaic_gpu.lacks
    reason = NO_MOSAIC_GPU if implementation == "mosaic_gpu" and not MOSAIC_GPU else lacking(lacks, program)
    if reason:
        raise Unsupported(f"implementation '{implementation}' cannot run this: {reason}")
    return _differentiable(program, implementation, interpret)(*values)


def _expm1(x, **_):
    """By tanh, to its relative accuracy near 0; Mosaic has no other on TPUs."""
    return jnp.tanh(0.5 * x) * (jnp.exp(x) + 1.0)


@functools.lru_cache(maxsize=64)
def _spelled(program: Program) -> Program:
    """The program without what the kernels lack; parameters are turned into coefficients within them."""
    rules = {**RULES, "expm1": _expm1}
    return Program(lambda *values: evaluate(program.jaxpr, *values, rules=rules), program.in_avals, program.label)


@functools.lru_cache(maxsize=64)
def _differentiable(program: Program, implementation: str, interpret: str):
    @jax.custom_vjp
    def run(*values):
        return _mapped(program, implementation, interpret, (), 0)(*values)

    once = (
        f"a second derivative (hessian, grad of grad) of sigmoid_sys2nd() on '{implementation}', which has the first "
        "only: leave implementation out, for jnp has every derivative"
    )

    def forward(*primals):
        values = derivatives.once(tuple(x.value for x in primals), once)
        return run(*values), (values, derivatives.Static(tuple(x.perturbed for x in primals)))

    def backward(residuals, cts):
        values, static = residuals
        wanted = static.value
        values, cts = derivatives.once((values, tuple(cts)), once)
        shape = jnp.broadcast_shapes(*map(jnp.shape, values))
        cts = [
            jnp.zeros(shape, jnp.float32) if isinstance(ct, jax.custom_derivatives.SymbolicZero) else ct for ct in cts
        ]
        back = _pullback(program, wanted)
        summed = tuple(not jnp.ndim(x) and bool(shape) for x, flag in zip(values, wanted) if flag)
        cts_wanted = iter(_mapped(back, implementation, interpret, summed, len(cts))(*values, *cts))
        return tuple(next(cts_wanted) if flag else None for flag in wanted)

    run.defvjp(forward, backward, symbolic_zeros=True)
    return run


@functools.lru_cache(maxsize=64)
def _pullback(program: Program, wanted: tuple[bool, ...]) -> Program:
    return pullback(program, wanted)


@functools.lru_cache(maxsize=128)
def _mapped(program: Program, implementation: str, interpret: str, summed: tuple[bool, ...], n_cts: int):
    """The program as one kernel; those of its outputs that are ``summed`` are summed over all elements.

    Its last ``n_cts`` arguments are cotangents. `vmap` makes one larger kernel of it, unless sums are to be taken: of
    those each element of the batch has its own.
    """
    kernel = {"mosaic_tpu": _on_tpu, "mosaic_gpu": _on_gpu}[implementation]
    flags = summed or (False,) * len(program.out_avals)

    @jax.custom_batching.custom_vmap
    def run(*values):
        return compiled(*values)

    @jax.jit
    def compiled(*values):
        shape = jnp.broadcast_shapes(*map(jnp.shape, values))
        if not math.prod(shape):
            return tuple(jnp.zeros(() if each else shape, jnp.float32) for each in flags)
        return tuple(kernel(program, values, flags, n_cts, interpret))

    @run.def_vmap
    def _(size, batched, *values):
        if any(flags):
            each = tuple(x if b else jnp.broadcast_to(x, (size, *jnp.shape(x))) for x, b in zip(values, batched))
            return lax.map(lambda x: run(*x), each), (True,) * len(flags)
        shape = jnp.broadcast_shapes(*(jnp.shape(x)[b:] for x, b in zip(values, batched)))

        def wide(x, batched):
            if batched:
                x = x.reshape(size, *(1,) * (len(shape) - jnp.ndim(x) + 1), *jnp.shape(x)[1:])
            return jnp.broadcast_to(x, (size, *shape)) if batched or jnp.ndim(x) else x

        return run(*map(wide, values, batched)), (True,) * len(flags)

    return run


for _kept in (_spelled, _differentiable, _pullback, _mapped):
    on_clear(_kept.cache_clear)


def _read(program: Program, values) -> tuple[jax.Array, list[jax.Array], list[bool]]:
    """The numbers, the flat arrays that the program reads, and for each of its arguments whether it is such an array.

    An array that it does not read becomes a number, 0.
    """
    in_arrays = [used and jnp.ndim(x) > 0 for x, used in zip(values, program.uses())]
    numbers, arrays = parted([x if each or not jnp.ndim(x) else 0.0 for x, each in zip(values, in_arrays)], in_arrays)
    return jnp.stack([jnp.float32(0.0), *map(jnp.float32, numbers)]), [x.reshape(-1) for x in arrays], in_arrays


def _on_tpu(program: Program, values, summed, n_cts: int, interpret: str):
    shape = jnp.broadcast_shapes(*map(jnp.shape, values))
    size, (numbers, arrays, in_arrays) = math.prod(shape), _read(program, values)
    rows = -(-size // COLUMNS)
    block = min(_ROWS, -(-rows // 8) * 8)
    grid = -(-rows // block)

    def kernel(scalars, *refs):
        ins, outs = refs[: len(arrays)], refs[len(arrays) :]
        spread = [jnp.full((1, COLUMNS), scalars[k], jnp.float32) for k in range(1, len(numbers))]
        results = fill(apply(program, *merged(spread, read(ins), in_arrays)), (block, COLUMNS))
        row, lane = (lax.broadcasted_iota(jnp.int32, (block, COLUMNS), axis) for axis in (0, 1))
        inside = (row + pl.program_id(0) * block) * COLUMNS + lane < size
        for ref, x, each in zip(outs, results, summed):
            ref[...] = jnp.sum(jnp.where(inside, x, 0.0).reshape(block // 8, 8, COLUMNS), axis=0) if each else x

    blocks = pl.BlockSpec((block, COLUMNS), lambda i: (i, 0))
    sums = pl.BlockSpec((8, COLUMNS), lambda i: (i, 0))
    results = pl.pallas_call(
        kernel,
        out_shape=[jax.ShapeDtypeStruct((8 * grid if each else rows, COLUMNS), jnp.float32) for each in summed],
        grid=(grid,),
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), *[blocks] * len(arrays)],
        out_specs=[sums if each else blocks for each in summed],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpreter() if interpret else False,
        name=f"brainmass_kernels_tpu_step{'_back' if n_cts else ''}",
    )(numbers, *(jnp.pad(x, (0, -size % COLUMNS), mode="edge").reshape(rows, COLUMNS) for x in arrays))
    return [jnp.sum(x) if each else x.reshape(-1)[:size].reshape(shape) for x, each in zip(results, summed)]


def _on_gpu(program: Program, values, summed, n_cts: int, interpret: str):
    shape = jnp.broadcast_shapes(*map(jnp.shape, values))
    size, (numbers, arrays, in_arrays) = math.prod(shape), _read(program, values)
    layout = Layout(size, 4 if size % (4 * THREADS) == 0 else 1)
    # Cotangents of elements that are not there are 0, so that these add nothing to a sum.
    modes = ["constant" if n >= len(values) - n_cts else "edge" for n, each in enumerate(in_arrays) if each]
    registers = plgpu.Layout.WG_STRIDED((layout.width,), vec_size=layout.vec)

    def kernel(scalars, *refs):
        ins, outs = refs[: len(arrays)], refs[len(arrays) :]
        block = lax.axis_index("block")
        place = pl.ds(block * layout.width, layout.width)

        def laid(values) -> list:
            return [plgpu.layout_cast(x, registers) for x in fill(values, (layout.width,))]

        spread = laid([scalars[k] for k in range(1, len(numbers))])
        loaded = [plgpu.load(ref.at[place], layout=registers, optimized=False) for ref in ins]
        results = laid(apply(program, *merged(spread, loaded, in_arrays)))
        for ref, x, each in zip(outs, results, summed):
            if each:
                mosaic_gpu.store_sums(ref.at[pl.ds(block * WARPS, WARPS)], x, registers, interpret)
            else:
                ref[place] = x

    kernel.__name__ = f"brainmass_kernels_gpu_step{'_back' if n_cts else ''}"
    sums = jax.ShapeDtypeStruct((layout.blocks * WARPS,), jnp.float32)
    results = plgpu.kernel(
        kernel,
        out_type=[sums if each else layout.array() for each in summed],
        grid=(layout.blocks,),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True, lowering_semantics=mosaic_gpu.lane_semantics()
        ),
        interpret=mosaic_gpu.interpreter(interpret) if interpret else None,
    )(numbers, *map(layout.lay, arrays, modes))
    return [jnp.sum(x) if each else layout.unlay(x).reshape(shape) for x, each in zip(results, summed)]
