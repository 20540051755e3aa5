"""A `pallas_call` put together group by group, and what all kernels read."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ...noise import in_a_row
from ...pointwise import Program
from ..base import Loop, Operands
from ..pallas import grouped, merged, operations, parted, read
from .layout import COLUMNS, Plan, round_up


class Call:
    """The operands, results and scratch of a kernel, which gets the references of each group by its name.

    Arrays are not stacked into one operand: that would copy them first.
    """

    def __init__(self, plan: Plan, backwards: bool):
        self.plan, self.backwards = plan, backwards
        self.names: dict[str, list[str]] = {"operand": [], "result": [], "scratch": []}
        self.operands, self.operand_specs, self.results, self.result_specs, self.scratch = [], [], [], [], []

    def add_operands(self, name: str, arrays: Sequence[jax.Array], spec):
        self.names["operand"] += [name] * len(arrays)
        self.operands += arrays
        self.operand_specs += [spec] * len(arrays)

    def add_results(self, name: str, count: int, shape, spec):
        self.names["result"] += [name] * count
        self.results += [jax.ShapeDtypeStruct(shape, jnp.float32)] * count
        self.result_specs += [spec] * count

    def add_scratch(self, name: str, count: int, shape):
        """Arrays in VMEM; the shape may be a type of memory."""
        memory = pltpu.VMEM(shape, jnp.float32) if isinstance(shape, tuple) else shape
        self.names["scratch"] += [name] * count
        self.scratch += [memory] * count

    def chunk(self, c):
        return self.plan.time.chunks - 1 - c if self.backwards else c

    def constant(self):
        """The block of a value a lane that stays for the whole run."""
        return pl.BlockSpec(self.plan.tile, lambda b, c: (b, 0))

    def moving(self, size: int, index: Callable = lambda c: c):
        """The block of a value a lane at ``size`` times; ``index`` gives a chunk's block of times."""
        return pl.BlockSpec((size, *self.plan.tile), lambda b, c: (index(self.chunk(c)), b, 0))

    def add_arguments(self, operands: Operands):
        """The coefficients, inputs and seeds of a step."""
        plan, time = self.plan, self.plan.time
        uniform, per_lane = parted(operands.coefs, plan.coefs_in_lanes)
        if uniform:
            self.add_operands("uniform_coefs", [jnp.stack(uniform)], pl.BlockSpec(memory_space=pltpu.SMEM))
        self.add_operands("lane_coefs", [plan.lay(x) for x in per_lane], self.constant())
        uniform, per_lane = parted(operands.inputs, plan.inputs_in_lanes)
        series = [time.spread(x).reshape(time.chunks, 1, time.size) for x in uniform]
        block = pl.BlockSpec((1, 1, time.size), lambda b, c: (self.chunk(c), 0, 0), memory_space=pltpu.SMEM)
        self.add_operands("uniform_inputs", series, block)
        self.add_operands("lane_inputs", [time.spread(plan.lay(x)) for x in per_lane], self.moving(time.size))
        if operands.seeds is not None:
            self.add_operands("seeds", [plan.lay(x) for x in operands.seeds], self.constant())

    def vmem(self) -> int:
        """Bytes of VMEM of the scratch, and of operands and results, which mostly are there twice."""
        total = sum(_tiled_bytes(x.shape) for x in self.scratch if hasattr(x, "shape"))
        for spec in (*self.operand_specs, *self.result_specs):
            if spec.block_shape is not None and spec.memory_space is None:
                total += _tiled_bytes(spec.block_shape) * (2 if spec.pipeline_mode is None else 1)
        return total

    def run(
        self, kernel: Callable, name: str, loop: Loop, *programs: Program, vmem: int | None = None
    ) -> dict[str, list[Any]]:
        """The results of ``kernel(refs, chunk)``, by name.

        Parameters
        ----------
        programs : what a step evaluates, for the compiler's estimate of costs
        vmem : bytes to ask for, where they are more than the compiler grants anyway
        """
        plan, names = self.plan, [name for part in self.names.values() for name in part]
        work, (all_operations, transcendentals) = plan.time.steps * plan.lanes, operations(*programs)
        moved = sum(x.size * x.dtype.itemsize for x in (*self.operands, *self.results))
        out = pl.pallas_call(
            lambda *refs: kernel(grouped(names, refs), self.chunk(pl.program_id(1))),
            out_shape=self.results,
            grid=(plan.blocks, plan.time.chunks),
            in_specs=self.operand_specs,
            out_specs=self.result_specs,
            scratch_shapes=self.scratch,
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem),
            cost_estimate=pl.CostEstimate(
                flops=all_operations * work, transcendentals=transcendentals * work, bytes_accessed=moved
            ),
            interpret=interpreter() if loop.interpret else False,
            name=name,
        )(*self.operands)
        return grouped(self.names["result"], out)


def _tiled_bytes(shape) -> int:
    *front, rows, columns = (1, *shape)
    return 4 * math.prod(front) * round_up(rows, 8) * round_up(columns, COLUMNS)


def interpreter():
    """How kernels are interpreted: what was never written is NaN, what is out of bounds raises."""
    return pltpu.InterpretParams(out_of_bounds_reads="raise", uninitialized_memory="nan")


def arguments(loop: Loop, plan: Plan, refs, start, rows=None):
    """The coefficients, and functions of the position that give inputs and `Normals`, of some rows or of all."""
    tile, rows = (plan.rows if rows is None else rows.size, COLUMNS), slice(None) if rows is None else rows

    def splat(scalar):
        return jnp.full(tile, scalar, jnp.float32)

    uniform = [splat(ref[i]) for ref in refs["uniform_coefs"] for i in range(ref.shape[0])]
    coefs = merged(uniform, read(refs["lane_coefs"], rows), plan.coefs_in_lanes)

    def inputs(j):
        uniform = [splat(ref[0, 0, j]) for ref in refs["uniform_inputs"]]
        return merged(uniform, read(refs["lane_inputs"], j, rows), plan.inputs_in_lanes)

    def normals(j, parity=None):
        return in_a_row(read(refs["seeds"], rows), start + j, loop.n_normals, parity)

    return coefs, inputs, normals
