"""The whole run as one Pallas kernel for TPUs: the state stays in vector registers for a chunk of steps.

Lanes are cut into blocks of ``(rows, 128)``, time into chunks. The grid walks the chunks of a block in order
(backwards in the adjoint) and the blocks in any order; the state passes from one chunk to the next in VMEM.
A chunk is also what lies between two checkpoints.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .._jax import tensor_cores
from ..noise import in_a_row
from ..pointwise import ELEMENTWISE, RULES, Program, SplitPullback
from ..schedule import Schedule, even_share
from .base import (
    Adjoint,
    Carry,
    Copied,
    Cotangents,
    Forward,
    Loop,
    Operands,
    Pullbacks,
    Request,
    Wanted,
    lacking,
    programs_of,
)
from .pallas import (
    added,
    apply,
    fill,
    grouped,
    lacks,
    merged,
    operations,
    parted,
    read,
    when,
    write,
)

LANES = 128
# VMEM that a kernel plans to use: of the 16 MiB that the compiler grants on every chip, what spills leave over.
BUDGET = 13 * 2**20
# Steps unrolled into one body, so that independent operations of neighbouring steps overlap.
UNROLL = 20
# Longer chunks would only hide a smaller share of the 0.35 us that a grid step costs.
LONGEST = 1024
# One step of a block of so many rows, in bundles, forward and back (benchmarks/ledger.py counts them): with one
# vector register a value, most wait for each other.
_FORWARD = {8: 22.0, 16: 28.0, 24: 40.0, 32: 52.0}
_ADJOINT = {8: 40.0, 16: 63.0, 24: 87.0, 32: 115.0}
_REGISTERS = 64
# What a step keeps alive besides what it carries.
_TEMPORARIES = 24

# Elementwise primitives that Mosaic has no rule for (tests/test_mosaic_tpu.py holds this against the compiler).
LACKING = frozenset(
    ["acos", "acosh", "asin", "asinh", "atan", "atanh", "cbrt", "cosh", "erfc", "expm1", "reduce_precision", "sinh"]
)
_SUPPORTED = (ELEMENTWISE - LACKING) | RULES.keys()


def _lacks(program: Program) -> str | None:
    return lacks(program, _SUPPORTED, "TPUs")


@dataclasses.dataclass(frozen=True)
class TimeChunks:
    """Time cut into chunks whose ends meet the records.

    Steps are counted with phantom ones, which are skipped: some in front, so that the transient ends where a
    chunk does; some behind; and some before each record's steps where these fill several chunks.

    Attributes
    ----------
    steps, lead : as in `Schedule`
    stride : steps from one place where a record may be taken to the next, within a chunk
    strides : strides in a chunk
    parts : chunks from one record to the next, 1 unless these are too many steps for one chunk
    group : steps in ``parts`` chunks, phantom ones left out
    body : steps unrolled; a multiple of ``stride`` if that is short, else ``stride`` is walked in bodies
    """

    steps: int
    lead: int
    stride: int
    strides: int
    parts: int
    group: int
    body: int

    @property
    def size(self) -> int:
        return self.stride * self.strides

    @property
    def pad(self) -> int:
        return self.parts * self.size - self.group

    @property
    def front(self) -> int:
        return -self.lead % self.group

    @property
    def groups(self) -> int:
        return -(-(self.front + self.steps) // self.group)

    @property
    def chunks(self) -> int:
        return self.groups * self.parts

    @property
    def lead_groups(self) -> int:
        return (self.front + self.lead) // self.group

    @property
    def record_blocks(self) -> int:
        return max(1, self.groups - self.lead_groups)

    def bounds(self, chunk):
        """The step number at the chunk's start, and the chunk's first real position and the one after its last."""
        part = _rem(chunk, self.parts)
        start = _div(chunk, self.parts) * self.group + part * self.size - self.pad - self.front
        first = jnp.clip(jnp.maximum(self.pad - part * self.size, -start), 0, self.size)
        return start, first, jnp.maximum(jnp.clip(self.steps - start, 0, self.size), first)

    def record_block(self, chunk):
        return jnp.maximum(_div(chunk, self.parts) - self.lead_groups, 0)

    def records(self, chunk):
        """Whether records are taken in a chunk."""
        last = _rem(chunk, self.parts) == self.parts - 1
        return last & (_div(chunk, self.parts) >= self.lead_groups)

    def spread(self, x):
        """``(steps, ...)`` with the phantom steps added, zero, ``(chunks * size, ...)``."""
        behind = self.groups * self.group - self.front - self.steps
        rest = [(0, 0)] * (x.ndim - 1)
        x = jnp.pad(x, [(self.front, behind), *rest])
        if self.pad:
            x = x.reshape(self.groups, self.group, *x.shape[1:])
            x = jnp.pad(x, [(0, 0), (self.pad, 0), *rest])
            x = x.reshape(self.chunks * self.size, *x.shape[2:])
        return x

    def gather(self, x):
        """``(chunks * size, ...)`` without the phantom steps, ``(steps, ...)``."""
        if self.pad:
            x = x.reshape(self.groups, self.parts * self.size, *x.shape[1:])[:, self.pad :]
            x = x.reshape(self.groups * self.group, *x.shape[2:])
        return x[self.front : self.front + self.steps]

    @property
    def parity(self) -> int | None:
        """That of the number of the first step of any chunk, if all have the same; phantom steps have numbers too."""
        return None if self.group % 2 or self.size % 2 else (self.pad + self.front) % 2

    def walk(self, first, last, normals: Callable, step: Callable, record: Callable, carry):
        """Take the steps ``first <= position < last`` of a chunk.

        ``normals(position, parity)`` gives the `Normals` of steps from there on; ``step(position, draw, carry)`` takes
        one step, whose normals are ``draw()``; ``record(k, on, carry)`` takes the chunk's record ``k``, if ``on``.
        """
        if self.body < self.stride:
            return self._walk_long(first, last, normals, step, record, carry)
        parity = self.parity if self.body % 2 == 0 else None

        def one(j, carry):
            carry = step(j, functools.partial(normals(j), 0), carry)
            k = jnp.maximum(_div(j + 1, self.stride) - 1, 0)
            return record(k, _rem(j + 1, self.stride) == 0, carry)

        def body(i, carry):
            drawn = normals(i * self.body, parity)
            for j in range(self.body):
                carry = step(i * self.body + j, functools.partial(drawn, j), carry)
                k, left = divmod(j + 1, self.stride)
                if left == 0:
                    carry = record(i * (self.body // self.stride) + k - 1, True, carry)
            return carry

        begin, end = _div(first + self.body - 1, self.body), _div(last, self.body)
        carry = lax.fori_loop(first, jnp.minimum(begin * self.body, last), one, carry)
        carry = lax.fori_loop(begin, end, body, carry)
        return lax.fori_loop(jnp.maximum(begin, end) * self.body, last, one, carry)

    def _walk_long(self, first, last, normals, step, record, carry):
        # A stride begins at its first real step.
        even = not any(n % 2 for n in (self.pad, self.front, self.stride, self.body))
        parity = self.parity if even else None

        def one(j, carry):
            return step(j, functools.partial(normals(j), 0), carry)

        def stride(s, carry):
            a, b = jnp.maximum(first, s * self.stride), jnp.minimum(last, (s + 1) * self.stride)
            bodies = _div(b - a, self.body)

            def body(i, carry):
                drawn = normals(a + i * self.body, parity)
                for j in range(self.body):
                    carry = step(a + i * self.body + j, functools.partial(drawn, j), carry)
                return carry

            carry = lax.fori_loop(jnp.int32(0), bodies, body, carry)
            carry = lax.fori_loop(a + bodies * self.body, b, one, carry)
            return record(s, b == (s + 1) * self.stride, carry)

        begin, end = _div(first, self.stride), _div(last + self.stride - 1, self.stride)
        return lax.fori_loop(begin, end, stride, carry)

    def walk_back(self, first, last, step: Callable, record: Callable, carry):
        """As `walk`, from the last step to the first; a record comes before the step that it followed."""
        if self.body < self.stride:
            return self._walk_back_long(first, last, step, record, carry)

        def one(j, carry):
            k = jnp.maximum(_div(j + 1, self.stride) - 1, 0)
            return step(j, record(k, _rem(j + 1, self.stride) == 0, carry))

        def body(i, carry):
            for j in reversed(range(self.body)):
                k, left = divmod(j + 1, self.stride)
                if left == 0:
                    carry = record(i * (self.body // self.stride) + k - 1, True, carry)
                carry = step(i * self.body + j, carry)
            return carry

        begin, end = _div(first + self.body - 1, self.body), _div(last, self.body)
        carry = _downward(jnp.maximum(begin, end) * self.body, last, one, carry)
        carry = _downward(begin, end, body, carry)
        return _downward(first, jnp.minimum(begin * self.body, last), one, carry)

    def _walk_back_long(self, first, last, step, record, carry):
        def stride(s, carry):
            a, b = jnp.maximum(first, s * self.stride), jnp.minimum(last, (s + 1) * self.stride)
            bodies = _div(b - a, self.body)

            def body(i, carry):
                for j in reversed(range(self.body)):
                    carry = step(a + i * self.body + j, carry)
                return carry

            carry = record(s, b == (s + 1) * self.stride, carry)
            carry = _downward(a + bodies * self.body, b, step, carry)
            return _downward(0, bodies, body, carry)

        return _downward(_div(first, self.stride), _div(last + self.stride - 1, self.stride), stride, carry)


def _div(n, by: int):
    """``n // by`` of a traced number from 0 on; a bare ``by`` would be 64 bits wide where these are enabled."""
    return lax.div(n, jnp.int32(by))


def _rem(n, by: int):
    return lax.rem(n, jnp.int32(by))


def _downward(first, last, body, carry):
    """``lax.fori_loop`` from ``last - 1`` down to ``first``."""
    return lax.fori_loop(jnp.int32(0), last - first, lambda i, c: body(last - 1 - i, c), carry)


def chunk_time(
    schedule: Schedule, most: int, wish: int | None = None, unroll: int = UNROLL, noisy: bool = False
) -> TimeChunks:
    """Cut time into chunks of at most ``most`` steps, of about ``wish`` steps if that is given.

    Bodies of a ``noisy`` step are even where they can be.
    """
    wish = min(wish or most, most)
    every, lead = schedule.every, schedule.lead
    if schedule.count == 0:
        every, lead = _up(min(wish, schedule.steps), unroll), 0
        return TimeChunks(schedule.steps, lead, every, 1, 1, every, min(unroll, every))
    if every > most:
        parts = -(-every // wish)
        size = _up(-(-every // parts), unroll)
        return TimeChunks(schedule.steps, lead, size, 1, -(-every // size), every, unroll)
    if every > unroll:
        unit, body = every, even_share(every, unroll, 2 if noisy else 1)
    else:
        unit = body = every * max(1, unroll // every)
    # Even shares: a last chunk with a few steps costs as much to start as a full one.
    total = (-lead % unit) + schedule.steps
    count = -(-total // max(unit, min(_up(wish, unit), most // unit * unit)))
    strides = _up(-(-total // count), unit) // every
    return TimeChunks(schedule.steps, lead, every, strides, 1, every * strides, body)


def _up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def _unroll(loop: Loop) -> tuple[int, bool]:
    """Steps of a body, and whether they are better even: two steps' normals are drawn at a time.

    The interpreter gains nothing by unrolled steps, and compiles each of them slowly.
    """
    return 2 if loop.interpret else UNROLL, loop.n_normals > 0


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a run is laid out on the chip.

    Attributes
    ----------
    lanes : lanes of the run
    rows : rows of 128 lanes in a block
    blocks : how many blocks
    cut : TimeChunks
    coefs_in_lanes, inputs_in_lanes : for each coefficient and input, whether it differs from lane to lane
    """

    lanes: int
    rows: int
    blocks: int
    cut: TimeChunks
    coefs_in_lanes: tuple[bool, ...]
    inputs_in_lanes: tuple[bool, ...]

    @classmethod
    def of(cls, coefs, inputs, lanes: int, rows: int, cut: TimeChunks) -> Plan:
        in_lanes = tuple(jnp.ndim(c) == 1 for c in coefs), tuple(jnp.ndim(u) == 2 for u in inputs)
        return cls(lanes, rows, -(-lanes // (rows * LANES)), cut, *in_lanes)

    @property
    def tile(self) -> tuple[int, int]:
        return self.rows, LANES

    def lay(self, x, mode: str = "edge"):
        """``(..., L)`` as ``(..., blocks * rows, 128)``; lanes beyond L repeat the last, so that they stay finite."""
        width = self.blocks * self.rows * LANES
        if x.shape[-1] < width:
            x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])], mode=mode)
        return x.reshape(*x.shape[:-1], self.blocks * self.rows, LANES)

    def unlay(self, x):
        """The inverse of `lay`."""
        return x.reshape(*x.shape[:-2], -1)[..., : self.lanes]


def block_rows(lanes: int, cost: dict[int, float], fits: Callable[[int], bool]) -> int:
    """Rows a block that take the least time of those that fit; all cores of a device take blocks."""
    eights, cores = -(-lanes // (8 * LANES)), tensor_cores()

    def time(rows: int) -> float:
        blocks = -(-eights * 8 // rows)
        return -(-blocks // cores) * cost[rows]

    return min((rows for rows in cost if rows == 8 or fits(rows)), key=lambda rows: (time(rows), rows))


def plan_run(loop: Loop, coefs, inputs, lanes: int) -> Plan:
    """Lay out a run without checkpoints."""
    streams = sum(jnp.ndim(u) == 2 for u in inputs)
    still = 2 * (len(coefs) + 2 * loop.n_state + 2)
    a_step = 2 * (streams + loop.n_observables / loop.schedule.every)

    def most(rows):
        return min(LONGEST, int((BUDGET / (4 * rows * LANES) - still) / (a_step or 1)))

    rows = block_rows(lanes, _FORWARD, lambda rows: most(rows) >= min(64, loop.schedule.steps))
    return Plan.of(coefs, inputs, lanes, rows, chunk_time(loop.schedule, max(most(rows), 1), None, *_unroll(loop)))


class Held(NamedTuple):
    """What a way back holds in VMEM: cotangents of coefficients, and values a lane for each step of a chunk."""

    coefs: int
    a_step: float


def plan_checkpoints(loop: Loop, coefs, inputs, lanes: int, checkpoint_every: int, back: Held | None = None) -> Plan:
    """Lay out a run with checkpoints, or the way back over one.

    The chunks depend on the loop only: under `jax.vmap` the two may have other lanes, and other arguments in lanes.
    """
    still = 2 * (2 * loop.n_coefs + 5 * loop.n_state + 2)
    a_step = 2 * loop.n_inputs + 2 * loop.n_observables / loop.schedule.every
    # A guess at what the pullbacks, which a forward run does not know, need of a step.
    most = (BUDGET / (4 * 8 * LANES) - still) / (a_step + 2 * loop.n_inputs + loop.n_state + loop.n_normals + 2)
    cut = chunk_time(loop.schedule, max(1, min(LONGEST, int(most))), checkpoint_every, *_unroll(loop))
    cost = _FORWARD
    if back:
        cost, still, a_step = _ADJOINT, 2 * (loop.n_coefs + back.coefs + 4 * loop.n_state + 2), back.a_step
    rows = block_rows(lanes, cost, lambda rows: 4 * rows * LANES * (still + cut.size * a_step) <= BUDGET)
    return Plan.of(coefs, inputs, lanes, rows, cut)


class _Call:
    """One pallas_call put together group by group; the kernel gets the references of each group by its name.

    Arrays are not stacked into one operand: that would copy them first.
    """

    def __init__(self, plan: Plan, backwards: bool):
        self.plan, self.backwards = plan, backwards
        self.held = 0
        self.groups: dict[str, list[tuple[str, int]]] = {"in": [], "out": [], "scratch": []}
        self.operands, self.in_specs, self.out_specs, self.outs, self.scratch = [], [], [], [], []

    def chunk(self, c):
        return self.plan.cut.chunks - 1 - c if self.backwards else c

    def give(self, name: str, operands, spec):
        self.groups["in"].append((name, len(operands)))
        self.operands += operands
        self.in_specs += [spec] * len(operands)

    def take(self, name: str, count: int, shape, spec):
        self.groups["out"].append((name, count))
        self.outs += [jax.ShapeDtypeStruct(shape, jnp.float32)] * count
        self.out_specs += [spec] * count

    def hold(self, name: str, count: int, shape):
        self.groups["scratch"].append((name, count))
        self.scratch += [pltpu.VMEM(shape, jnp.float32)] * count
        self.held += count * _tiled_bytes(shape)

    def hold_semaphore(self):
        self.groups["scratch"].append(("semaphore", 1))
        self.scratch.append(pltpu.SemaphoreType.DMA)

    def vmem(self) -> int:
        """Bytes of VMEM of what passes in and out, mostly there twice, and of what is held."""
        total = self.held
        for spec in (*self.in_specs, *self.out_specs):
            if spec.block_shape is not None and spec.memory_space is None:
                total += _tiled_bytes(spec.block_shape) * (2 if spec.pipeline_mode is None else 1)
        return total

    def still(self):
        """A value a lane that stays for the whole run."""
        return pl.BlockSpec(self.plan.tile, lambda b, c: (b, 0))

    def moving(self, size: int, index: Callable):
        """A value a lane at ``size`` times; ``index`` gives a chunk's block of times."""
        return pl.BlockSpec((size, *self.plan.tile), lambda b, c: (index(self.chunk(c)), b, 0))

    def give_arguments(self, coefs, inputs, seeds):
        """The operands that a step needs besides the state."""
        plan, cut = self.plan, self.plan.cut
        uniform, per_lane = parted(coefs, plan.coefs_in_lanes)
        if uniform:
            self.give("uniform_coefs", [jnp.stack(uniform)], pl.BlockSpec(memory_space=pltpu.SMEM))
        self.give("lane_coefs", [plan.lay(x) for x in per_lane], self.still())
        uniform, per_lane = parted(inputs, plan.inputs_in_lanes)
        series = [cut.spread(x).reshape(cut.chunks, 1, cut.size) for x in uniform]
        block = pl.BlockSpec((1, 1, cut.size), lambda b, c: (self.chunk(c), 0, 0), memory_space=pltpu.SMEM)
        self.give("uniform_inputs", series, block)
        self.give("lane_inputs", [cut.spread(plan.lay(x)) for x in per_lane], self.moving(cut.size, lambda c: c))
        if seeds is not None:
            self.give("seeds", [plan.lay(x) for x in seeds], self.still())

    def run(
        self, kernel: Callable, name: str, loop: Loop, operations: int, transcendentals: int, vmem: int | None = None
    ) -> dict[str, Any]:
        """Call it, with more VMEM than the compiler grants anyway if asked for."""
        plan, groups = self.plan, self.groups["in"] + self.groups["out"] + self.groups["scratch"]
        work = plan.cut.steps * plan.lanes
        moved = sum(x.size * x.dtype.itemsize for x in (*self.operands, *self.outs))
        out = pl.pallas_call(
            lambda *refs: kernel(grouped(groups, refs), self.chunk(pl.program_id(1))),
            out_shape=self.outs,
            grid=(plan.blocks, plan.cut.chunks),
            in_specs=self.in_specs,
            out_specs=self.out_specs,
            scratch_shapes=self.scratch,
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem),
            cost_estimate=pl.CostEstimate(
                flops=operations * work, transcendentals=transcendentals * work, bytes_accessed=moved
            ),
            interpret=interpreter() if loop.interpret else False,
            name=name,
        )(*self.operands)
        return grouped(self.groups["out"], out)


def _tiled_bytes(shape) -> int:
    *front, rows, columns = (1, *shape)
    return 4 * math.prod(front) * _up(rows, 8) * _up(columns, LANES)


def interpreter():
    """How kernels are interpreted: what was never written is NaN, what is out of bounds raises."""
    return pltpu.InterpretParams(out_of_bounds_reads="raise", uninitialized_memory="nan")


def _arguments(loop: Loop, plan: Plan, refs, start, tile, rows=slice(None)):
    """The coefficients, and functions of the position that give the inputs and the `Normals`, of the given rows."""

    def splat(scalar):
        return jnp.full(tile, scalar, jnp.float32)

    flags = plan.coefs_in_lanes
    uniform = [splat(ref[i]) for ref in refs["uniform_coefs"] for i in range(ref.shape[0])]
    coefs = merged(uniform, read(refs["lane_coefs"], rows), flags)

    def inputs(j):
        uniform = [splat(ref[0, 0, j]) for ref in refs["uniform_inputs"]]
        return merged(uniform, read(refs["lane_inputs"], j, rows), plan.inputs_in_lanes)

    def normals(j, parity=None):
        return in_a_row(read(refs["seeds"], rows), start + j, loop.n_normals, parity)

    return coefs, inputs, normals


def _network():
    """The kernels of networks, which are made with what is here."""
    from . import mosaic_tpu_network

    return mosaic_tpu_network


class MosaicTPU:
    """The TPU backend: see `base.Backend` for the protocol."""

    name = "mosaic_tpu"
    interpretable = True
    inverse_steps = False
    networks = True
    same_lanes = False

    def base_two(self, precision: str) -> bool:
        """The hardware has its own tanh."""
        return False

    def unavailable(self, platform: str) -> str | None:
        """Why nothing can run on this platform, or ``None``."""
        if platform != "tpu":
            return (
                f"this machine's platform is '{platform}', not 'tpu'; "
                f"`brainmass_kernels.testing.interpret()` runs it in Pallas's interpreter"
            )
        return None

    def unsupported(self, request: Request) -> str | None:
        """Why the request cannot run, or ``None`` if it can."""
        loop = request.loop
        if jnp.dtype(request.dtype) != jnp.float32:
            return f"it computes in float32 only, not in {jnp.dtype(request.dtype).name}"
        if reason := lacking(_lacks, *programs_of(loop)):
            return reason
        if loop.coupling:
            return _network().unsupported(loop)
        need = 4 * 8 * LANES * 2 * (2 * loop.n_coefs + 5 * loop.n_state + 2 * loop.n_inputs + loop.n_observables)
        if need > BUDGET:
            return f"a block of 1,024 lanes needs {need:,} bytes of VMEM, and it plans for {BUDGET:,}"
        return None

    def copied(self, request: Request) -> Copied:
        """Blocks of (rows, 128) lanes, whose layout is another than that of a row of lanes."""
        coupling = request.loop.coupling
        if coupling:
            networks = request.lanes // coupling.regions
            return Copied(-(-networks // LANES) * LANES * -(-coupling.regions // 8) * 8)
        return Copied(-(-request.lanes // (8 * LANES)) * 8 * LANES)

    def forward(self, loop: Loop, operands: Operands, initial: Carry, checkpoint_every: int | None = None) -> Forward:
        """Run the loop; with ``checkpoint_every``, also keep the state before each chunk."""
        if loop.coupling:
            return _network().forward(loop, operands, initial, checkpoint_every)
        (coefs, inputs, seeds, _), state = operands, initial.state
        lanes = state[0].shape[0]
        if checkpoint_every is None:
            plan = plan_run(loop, coefs, inputs, lanes)
        else:
            plan = plan_checkpoints(loop, coefs, inputs, lanes, checkpoint_every)
        cut, n, obs = plan.cut, loop.n_state, loop.n_observables if loop.schedule.count else 0
        wide = (plan.blocks * plan.rows, LANES)
        call = _Call(plan, backwards=False)
        call.give_arguments(coefs, inputs, seeds)
        call.give("initial", [plan.lay(x) for x in state], call.still())
        call.take("state", n, wide, call.still())
        call.take("records", obs, (cut.record_blocks * cut.strides, *wide), call.moving(cut.strides, cut.record_block))
        if checkpoint_every is not None:
            call.take("saved", n, (cut.chunks, *wide), call.moving(1, lambda c: c))
        out = call.run(
            lambda refs, chunk: _forward_kernel(loop, plan, refs, chunk),
            "brainmass_kernels_tpu_forward", loop, *operations(loop.advance),
        )  # fmt: skip
        records = tuple(plan.unlay(x[: loop.schedule.count]) for x in out["records"])
        if not obs:
            records = (jnp.zeros((0, plan.lanes), jnp.float32),) * loop.n_observables
        final = tuple(plan.unlay(x) for x in out["state"])
        saved = tuple(plan.unlay(x) for x in out["saved"])
        return Forward(records, Carry(final), saved if checkpoint_every is not None else None)

    def adjoint(
        self, loop: Loop, pullbacks: Pullbacks, wanted: Wanted, operands: Operands, saved, cotangents: Cotangents,
        checkpoint_every: int,
    ) -> Adjoint:  # fmt: skip
        """Walk back over a forward run that kept checkpoints."""
        if loop.coupling:
            return _network().adjoint(loop, pullbacks, wanted, operands, saved, cotangents, checkpoint_every)
        (coefs, inputs, seeds, _), ct_final = operands, cotangents.final.state
        lanes = ct_final[0].shape[0]
        way = ReversePass.of(loop, pullbacks, wanted, coefs, inputs, lanes, checkpoint_every)
        plan = way.plan
        cut, n, obs = plan.cut, loop.n_state, loop.n_observables if loop.schedule.count else 0
        wide = (plan.blocks * plan.rows, LANES)
        call = _Call(plan, backwards=True)
        call.give_arguments(coefs, inputs, seeds)
        call.give("saved", [plan.lay(x) for x in saved], call.moving(1, lambda c: c))
        call.give("ct_final", [plan.lay(x, "constant") for x in ct_final], call.still())
        if obs:
            beyond = cut.record_blocks * cut.strides - loop.schedule.count
            cts = [jnp.pad(plan.lay(x, "constant"), [(0, beyond), (0, 0), (0, 0)]) for x in cotangents.records]
            call.give("ct_records", cts, call.moving(cut.strides, cut.record_block))
        call.take("ct_state", n, wide, call.still())
        call.take("ct_coefs", way.n_coefs, wide, call.still())
        streams, series = sum(way.in_lanes), len(way.in_lanes) - sum(way.in_lanes)
        call.take("ct_lane_inputs", streams, (cut.chunks * cut.size, *wide), call.moving(cut.size, lambda c: c))
        block = pl.BlockSpec((1, 1, 1, cut.size), lambda b, c: (b, call.chunk(c), 0, 0))
        call.take("ct_uniform_inputs", series, (plan.blocks, cut.chunks, 1, cut.size), block)
        call.hold("ct_series", series, (cut.size, LANES))
        call.hold("kept", way.advance.n_kept, (cut.size, *plan.tile))
        call.hold("kept_records", way.observe.n_kept if obs else 0, (cut.strides, *plan.tile))
        out = call.run(way.kernel, "brainmass_kernels_tpu_adjoint", loop, *operations(loop.advance, pullbacks.advance))
        partial = [cut.gather(x.reshape(plan.blocks, -1).T) for x in out["ct_uniform_inputs"]]
        streamed = [plan.unlay(cut.gather(x)) for x in out["ct_lane_inputs"]]
        return Adjoint(
            tuple(plan.unlay(x) for x in out["ct_coefs"]),
            Carry(tuple(plan.unlay(x) for x in out["ct_state"])),
            merged(partial, streamed, way.in_lanes),
        )


def sum_series(refs) -> None:
    """Cotangents of uniform inputs, one for each step of a chunk, from what was summed in each of 128 lanes."""
    for series, out in zip(refs["ct_series"], refs["ct_uniform_inputs"]):
        # The matrix unit adds the 128 lanes up and turns the times into lanes, in one.
        total = lax.dot_general(
            jnp.ones((8, LANES), jnp.float32), series[...], (((1,), (1,)), ((), ())),
            precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32,
        )  # fmt: skip
        out[0, 0] = total[:1]


def _forward_kernel(loop: Loop, plan: Plan, refs, chunk):
    start, first, last = plan.cut.bounds(chunk)

    @pl.when(chunk == 0)
    def _():
        write(refs["state"], read(refs["initial"]))

    state = read(refs["state"])
    if refs["saved"]:
        write(refs["saved"], state, 0)
    coefs, inputs, normals = _arguments(loop, plan, refs, start, plan.tile)

    def step(j, draw, state):
        return fill(apply(loop.advance, *coefs, *state, *inputs(j), *draw()), plan.tile)

    def record(k, on, state):
        @when(on)
        def _():
            if refs["records"]:
                write(refs["records"], fill(apply(loop.observe, *coefs, *state), plan.tile), k)

        return state

    write(refs["state"], plan.cut.walk(first, last, normals, step, record, state))


@dataclasses.dataclass(frozen=True)
class ReversePass:
    """What an adjoint kernel is made of."""

    loop: Loop
    wanted: Wanted
    advance: SplitPullback
    observe: SplitPullback
    plan: Plan

    @classmethod
    def of(
        cls, loop: Loop, pullbacks: Pullbacks, wanted: Wanted, coefs, inputs, lanes: int, checkpoint_every: int
    ) -> ReversePass:
        n, m = loop.n_coefs, loop.n_state
        free = [True] * n + [False] * m + [True] * loop.n_inputs + [False] * (loop.n_normals + m)
        known = [False] * n + [True] * m + [False] * loop.n_inputs + [True] * loop.n_normals + [False] * m
        advance = SplitPullback(pullbacks.advance, free, known)
        cts = [False] * loop.n_observables
        observe = SplitPullback(pullbacks.observe, [True] * n + [False] * m + cts, [False] * n + [True] * m + cts)
        # Values a lane that VMEM holds for each step; what passes in or out is there twice.
        a_record = 2 * loop.n_observables + observe.n_kept
        a_step = advance.n_kept + 2 * (loop.n_inputs + sum(wanted.inputs)) + a_record / loop.schedule.every
        back = Held(sum(wanted.coefs), a_step)
        return cls(loop, wanted, advance, observe, plan_checkpoints(loop, coefs, inputs, lanes, checkpoint_every, back))

    @property
    def n_coefs(self) -> int:
        return sum(self.wanted.coefs)

    @property
    def in_lanes(self) -> tuple[bool, ...]:
        """Of each wanted input, whether it differs from lane to lane."""
        return tuple(lane for lane, want in zip(self.plan.inputs_in_lanes, self.wanted.inputs) if want)

    @property
    def rows_per_pass(self) -> int:
        """Rows that go back together: as many as the registers hold, for what is carried and for the rest."""
        fit = max(1, _REGISTERS // (self.n_coefs + self.loop.n_state + _TEMPORARIES))
        return max(r for r in (8, 16, 24, 32) if r <= 8 * fit and self.plan.rows % r == 0)

    def kernel(self, refs, chunk):
        @pl.when(pl.program_id(1) == 0)
        def _():
            write(refs["ct_state"], read(refs["ct_final"]))
            write(refs["ct_coefs"], [jnp.zeros(self.plan.tile, jnp.float32)] * self.n_coefs)

        for ref in refs["ct_series"]:
            ref[...] = jnp.zeros(ref.shape, jnp.float32)
        self.replay(refs, chunk)

        def turn(i, carry):
            self.go_back(refs, chunk, pl.ds(pl.multiple_of(i * self.rows_per_pass, 8), self.rows_per_pass))
            return carry

        lax.fori_loop(jnp.int32(0), jnp.int32(self.plan.rows // self.rows_per_pass), turn, ())
        sum_series(refs)

    def replay(self, refs, chunk):
        """Run the chunk again from its checkpoint, keeping what the pullbacks need of each step."""
        loop, cut, tile = self.loop, self.plan.cut, self.plan.tile
        start, first, last = cut.bounds(chunk)
        coefs, inputs, normals = _arguments(loop, self.plan, refs, start, tile)

        def step(j, draw, state):
            given, drawn = inputs(j), draw()
            kept = apply(self.advance.keep, *coefs, *state, *given, *drawn)
            write(refs["kept"], fill(kept, tile), j)
            return fill(apply(loop.advance, *coefs, *state, *given, *drawn), tile)

        def record(k, on, state):
            @when(on)
            def _():
                if refs["kept_records"]:
                    write(refs["kept_records"], fill(apply(self.observe.keep, *coefs, *state), tile), k)

            return state

        cut.walk(first, last, normals, step, record, read(refs["saved"], 0))

    def go_back(self, refs, chunk, rows):
        """Walk some rows of the chunk back."""
        loop, cut, n_coefs = self.loop, self.plan.cut, self.n_coefs
        tile = (self.rows_per_pass, LANES)
        start, first, last = cut.bounds(chunk)
        coefs, inputs, _ = _arguments(loop, self.plan, refs, start, tile, rows)
        recorded = cut.records(chunk)

        def step(j, carry):
            out = apply(self.advance.back, *coefs, *inputs(j), *read(refs["kept"], j, rows), *carry[1])
            ct_inputs = fill(out[n_coefs + loop.n_state :], tile)
            series, streams = parted(ct_inputs, self.in_lanes)
            for ref, ct in zip(refs["ct_series"], series):
                ref[pl.ds(j, 1)] += jnp.sum(ct, axis=0, keepdims=True)
            write(refs["ct_lane_inputs"], streams, j, rows)
            return added(carry[0], out[:n_coefs]), fill(out[n_coefs : n_coefs + loop.n_state], tile)

        def record(k, on, carry):
            def pull(carry):
                kept = read(refs["kept_records"], k, rows)
                cts = [jnp.where(recorded, ct, 0.0) for ct in read(refs["ct_records"], k, rows)]
                out = apply(self.observe.back, *coefs, *kept, *cts)
                return added(carry[0], out[:n_coefs]), added(carry[1], out[n_coefs:])

            if not refs["ct_records"]:
                return carry
            return pull(carry) if on is True else lax.cond(on, pull, lambda carry: carry, carry)

        carry = read(refs["ct_coefs"], rows), read(refs["ct_state"], rows)
        ct_coefs, ct_state = cut.walk_back(first, last, step, record, carry)
        write(refs["ct_coefs"], ct_coefs, rows)
        write(refs["ct_state"], ct_state, rows)
