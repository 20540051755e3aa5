"""The whole run as one Pallas kernel for NVIDIA GPUs from Hopper on: the state never leaves the registers.

A program is one warpgroup, 128 threads, each with `vec` lanes; programs do not meet. What changes with time is read
from device memory a body of steps ahead, records and checkpoints are written straight to it. The adjoint walks the
checkpointed segments backwards: it runs each once more, keeping the state before every step in registers, and where a
segment is too long for that, keeps the state before every few steps in device memory and repeats those. No shared
memory: Mosaic calls it an array of no bytes, so that LLVM takes any two accesses of it for independent, and a loop's
stores were read as they had been before it (jax 0.11.2).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from .._jax import (
    MOSAIC_GPU,
    NO_MOSAIC_GPU,
    compute_capability,
    multiprocessors,
    reciprocal,
    store_warp_sums,
)
from ..noise import Normals, in_a_row
from ..pointwise import RULES, Program
from ..schedule import Body, SegmentGroup, checkpoint_levels, nested_segments, parity_in, segment_groups, segments_in
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
    no_records,
    not_here,
)
from .pallas import added, apply, fill, grouped, merged, parted, unsupported
from .pallas import lacks as lacks_of

plgpu: Any = importlib.import_module("jax.experimental.pallas.mosaic_gpu") if MOSAIC_GPU else None

THREADS, WARPS = 128, 4
# Programs that a multiprocessor should hold before threads take two lanes: 16 warps hide the latencies.
_FILLED = 4
# Operations that one unrolled loop body may have: a multiprocessor's nearest instruction caches hold some 2,000.
_BODY = 1500
_UNROLL = 20
# Values of inputs that a thread may hold for the body after the one that it is in.
_READ_AHEAD = 40
# What a normal counts as in it: two are drawn at a time, for two steps.
_DRAW = 36
# Values that an adjoint may keep in registers from a step to its pullback, and operations of the body that does.
KEPT, _BODY_BACK = 72, 2500

# Elementwise primitives that the kernel can hold (tests/test_mosaic_gpu.py holds this against the compiler).
SUPPORTED = RULES.keys() | frozenset(
    """
    abs add and atan2 bitcast_convert_type clamp convert_element_type cos div eq erf exp exp2 ge gt le log logistic lt
    max min mul ne neg not or pow rem round rsqrt select_n shift_left shift_right_arithmetic shift_right_logical sin
    sqrt sub tanh xor
    """.split()
)


def lacks(program: Program) -> str | None:
    """Why Mosaic cannot hold a program on GPUs, or ``None``."""
    return lacks_of(program, SUPPORTED, "GPUs")


class Layout(NamedTuple):
    """How the lanes of a run lie on the GPU.

    Attributes
    ----------
    lanes : lanes of the run
    vec : lanes a thread
    """

    lanes: int
    vec: int

    @property
    def width(self) -> int:
        """Lanes of one program."""
        return THREADS * self.vec

    @property
    def blocks(self) -> int:
        return -(-self.lanes // self.width)

    @classmethod
    def choose(cls, lanes: int, most: int) -> Layout:
        """One lane a thread: more were no faster on Hopper (benchmarks/results has the H100's times).

        Blackwell adds and multiplies in pairs: at most two, once every multiprocessor has its programs.
        """
        pairs = (compute_capability() or 0.0) >= 10.0 and lanes >= multiprocessors() * _FILLED * THREADS * 2
        return cls(lanes, 2 if pairs and most > 1 else 1)

    def lay(self, x, mode: str = "edge"):
        """``(..., L)`` with whole programs; lanes beyond L repeat the last, so that they stay finite."""
        beyond = self.blocks * self.width - self.lanes
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, beyond)], mode=mode) if beyond else x

    def unlay(self, x):
        return x[..., : self.lanes]

    def array(self, *shape: int):
        return jax.ShapeDtypeStruct((*shape, self.blocks * self.width), jnp.float32)


class _Call:
    """One kernel put together group by group; it gets the references of each group by its name."""

    def __init__(self, loop: Loop, layout: Layout):
        self.loop, self.layout = loop, layout
        self.operands: dict[str, list] = {}
        self.outs: dict[str, list] = {}

    def give_arguments(self, coefs, inputs, seeds):
        """The operands that a step needs besides the state."""
        self.coefs_in_lanes = [jnp.ndim(c) == 1 for c in coefs]
        uniform, per_lane = parted(coefs, self.coefs_in_lanes)
        self.operands["uniform_coefs"] = [jnp.stack(uniform)] if uniform else []
        self.operands["lane_coefs"] = [self.layout.lay(x) for x in per_lane]
        self.inputs_in_lanes = [jnp.ndim(x) == 2 for x in inputs]
        uniform, per_lane = parted(inputs, self.inputs_in_lanes)
        self.operands["uniform_inputs"] = uniform
        self.operands["lane_inputs"] = [self.layout.lay(x) for x in per_lane]
        self.operands["seeds"] = [] if seeds is None else [self.layout.lay(x) for x in seeds]

    def run(self, kernel: Callable, name: str) -> dict[str, list]:
        loop = self.loop
        names = _names(self.operands | self.outs)

        def body(*refs):
            kernel(_Lanes(self, grouped(names, refs)))

        body.__name__ = name
        outs = [x for values in self.outs.values() for x in values]
        results = plgpu.kernel(
            body,
            out_type=outs,
            grid=(self.layout.blocks,),
            grid_names=("block",),
            compiler_params=plgpu.CompilerParams(
                approx_math=loop.precision == "fast",
                unsafe_no_auto_barriers=True,
                lowering_semantics=lane_semantics(),
            ),
            interpret=interpreter(loop.interpret) if loop.interpret else None,
        )(*[x for values in self.operands.values() for x in values])
        return grouped(_names(self.outs), results)


def _names(groups: dict[str, list]) -> list[str]:
    return [name for name, values in groups.items() for _ in values]


def lane_semantics():
    """Mosaic's older way to lower: the newer one infers layouts, which takes minutes for a step with noise."""
    return importlib.import_module("jax.experimental.mosaic.gpu").LoweringSemantics.Lane


def interpreter(how: str):
    """How kernels are interpreted: what was never written is NaN, what is out of bounds raises."""
    return plgpu.InterpretGPUParams(
        detect_races=how == "races", out_of_bounds_reads="raise", uninitialized_memory="nan"
    )


class _Lanes:
    """The lanes of one program: their place in memory, and one step of them."""

    def __init__(self, call: _Call, refs):
        self.call, self.loop, self.layout, self.refs = call, call.loop, call.layout, refs
        layout = call.layout
        self.shape = (layout.width,)
        self.place = pl.ds(lax.axis_index("block") * layout.width, layout.width)
        uniform = [ref[i] for ref in refs["uniform_coefs"] for i in range(ref.shape[0])]
        self.coefs = merged(uniform, self.load(refs["lane_coefs"]), call.coefs_in_lanes)
        self.seeds = self.load(refs["seeds"])
        # No kernel is differentiated, and Mosaic has no stop_gradient.
        rules = {**RULES, "stop_gradient": lambda x, **_: x}
        self.rules = rules if self.loop.precision == "fast" else {**rules, "logistic2": self.logistic2}

    @property
    def registers(self):
        """How a value lies in the registers of the 128 threads."""
        return plgpu.Layout.WG_STRIDED(self.shape, vec_size=self.layout.vec)

    def logistic2(self, x, **_):
        """1 / (1 + 2^x) by the hardware's exp2 and reciprocal, within 3e-7."""
        if jnp.shape(x) != self.shape or self.loop.interpret:
            return RULES["logistic2"](x)
        made = plgpu.ShapeDtypeStruct(self.shape, jnp.float32, layout=self.registers)
        return plgpu.inline_mgpu(arg_types=(self.registers,), return_type=made)(
            lambda _, x: reciprocal(x.exp2(approx=True) + 1.0)
        )(x)

    def register(self, ref):
        return plgpu.load(ref, layout=self.registers, optimized=False)

    def fill(self, values) -> tuple:
        """Values of the lanes' shape: a program's output may be a constant, and a loop's carry may not."""
        return tuple(plgpu.layout_cast(x, self.registers) for x in fill(values, self.shape))

    def load(self, refs, *index) -> tuple:
        """These lanes of arrays in device memory."""
        return tuple(self.register(ref.at[(*index, self.place)]) for ref in refs)

    def store(self, refs, values, *index) -> None:
        for ref, value in zip(refs, values, strict=True):
            ref[(*index, self.place)] = value

    def store_sums(self, ref, value) -> None:
        """The sum of each warp's lanes."""
        store_sums(ref, value, self.registers, self.loop.interpret)

    def inputs(self, n) -> tuple:
        uniform = [ref[n] for ref in self.refs["uniform_inputs"]]
        return merged(uniform, self.load(self.refs["lane_inputs"], n), self.call.inputs_in_lanes)

    def normals(self, first, parity: int | None) -> Normals:
        return in_a_row(self.seeds, first, self.loop.n_normals, parity)

    def step(self, inputs, state, draws) -> tuple:
        return self.fill(self.apply(self.loop.advance, *self.coefs, *state, *inputs, *draws))

    def observe(self, state) -> tuple:
        return self.fill(self.apply(self.loop.observe, *self.coefs, *state))

    def apply(self, program: Program, *args) -> tuple:
        return apply(program, *args, rules=self.rules)

    def zeros(self, count: int) -> tuple:
        return self.fill([0.0] * count)


def store_sums(ref, value, layout, interpret: str) -> None:
    """The sum of each warp's lanes, of a value that lies so in the registers."""
    if interpret:
        ref[...] = jnp.sum(value.reshape(WARPS, -1), axis=1)
    else:
        plgpu.inline_mgpu(arg_types=(layout, plgpu.RefType()))(store_warp_sums)(value, ref)


# Time ---------------------------------------------------------------------------------------------------------------


class _Start(NamedTuple):
    """The number of a first step, and its parity where that is known."""

    step: Any = 0
    parity: int | None = 0

    def segment(self, group: SegmentGroup, i) -> _Start:
        """That of a group's segment ``i``, where the groups begin here."""
        return _Start(self.step + group.start + i * group.length, parity_in(self.parity, group))


def _repeat(count: int, size: int, body: Callable, carry, backwards: bool = False):
    """``carry = body(i, n, carry)`` for the ``n`` from ``i`` on: ``size`` at a time of ``count``, or from the last."""
    size = max(1, min(size, count))
    whole, left = divmod(count, size)

    def rest(carry):
        return body(jnp.int32(whole * size), left, carry) if left else carry

    def one(k, carry):
        return body((whole - 1 - k if backwards else k) * size, size, carry)

    carry = rest(carry) if backwards else carry
    if whole:
        carry = lax.fori_loop(jnp.int32(0), jnp.int32(whole), one, carry)
    return carry if backwards else rest(carry)


def _ahead(
    count: int, size: int, values: int, most: int, read: Callable, body: Callable, carry, backwards: bool = False
):
    """As `_repeat`, for ``body(i, n, inputs, carry)``: ``read(i, n)`` gives the inputs, while the body before runs.

    It gives ``values`` for each of the ``n``, and at most ``most`` are held.
    """
    size = max(1, min(size, count))
    whole = count // size
    if whole < 2 or not 0 < values * size <= most:
        return _repeat(count, size, lambda i, n, carry: body(i, n, read(i, n), carry), carry, backwards)

    def at(k):
        return (whole - 1 - k if backwards else k) * size

    def one(k, both):
        inputs, carry = both
        later = read(at(jnp.minimum(k + 1, whole - 1)), size)
        return later, body(at(k), size, inputs, carry)

    def rest(carry):
        start, left = jnp.int32(whole * size), count % size
        return body(start, left, read(start, left), carry) if left else carry

    carry = rest(carry) if backwards else carry
    _, carry = lax.fori_loop(jnp.int32(0), jnp.int32(whole), one, (read(at(jnp.int32(0)), size), carry))
    return carry if backwards else rest(carry)


def _segments(group: SegmentGroup, segment: Callable, carry, backwards: bool = False):
    """``carry = segment(i, carry)`` for each segment of a group."""
    return _repeat(group.segments, 1, lambda i, _, carry: segment(i, carry), carry, backwards)


def _steps(
    lanes: _Lanes, group: SegmentGroup, first: _Start, unroll: int, step: Callable, record: Callable | None, carry,
    backwards: bool = False,
):  # fmt: skip
    """Take the steps of one segment, which begins at ``first``, several written out in one body.

    ``step(j, inputs, draw, carry)`` takes the segment's step ``j``, whose normals are ``draw()``;
    ``record(m, carry)`` takes the record at the end of its stride ``m``.
    """
    stride, most = group.stride, _READ_AHEAD // lanes.layout.vec
    form = Body.of(group, unroll, lanes.loop.n_normals > 0)
    parity = first.parity if form.even else None

    def read(start, count):
        return [lanes.inputs(first.step + start + j) for j in range(count)]

    def body(m, begin, count, inputs, carry):
        """Steps from ``begin`` of stride ``m`` on; those of whole strides are followed by a record."""
        j0 = m * stride + begin
        normals = lanes.normals(first.step + j0, parity)
        for j in reversed(range(count)) if backwards else range(count):
            k, left = divmod(j + 1, stride)
            recorded = record if form.strides and left == 0 else None
            carry = recorded(m + (k - 1), carry) if recorded and backwards else carry
            carry = step(j0 + j, inputs[j], functools.partial(normals, j), carry)
            carry = recorded(m + (k - 1), carry) if recorded and not backwards else carry
        return carry

    if form.strides:
        return _ahead(
            group.strides, form.strides, stride * lanes.loop.n_inputs, most, lambda m, n: read(m * stride, n * stride),
            lambda m, n, inputs, carry: body(m, 0, n * stride, inputs, carry), carry, backwards,
        )  # fmt: skip

    def one_stride(m, _, carry):
        carry = record(m, carry) if record and backwards else carry
        carry = _ahead(
            stride, form.steps, lanes.loop.n_inputs, most, lambda j, n: read(m * stride + j, n),
            lambda j, n, inputs, carry: body(m, j, n, inputs, carry), carry, backwards,
        )  # fmt: skip
        return record(m, carry) if record and not backwards else carry

    return _repeat(group.strides, 1, one_stride, carry, backwards)


def unrolled(loop: Loop, layout: Layout, program: Program) -> int:
    """Steps of a program written out in one body. The interpreter gains nothing by it."""
    operations = len(program.jaxpr.jaxpr.eqns) + _DRAW * loop.n_normals
    return 1 if loop.interpret else max(1, min(_UNROLL, _BODY // (max(1, operations) * layout.vec)))


def _run_groups(
    lanes: _Lanes, groups: Sequence[SegmentGroup], start: _Start, state, record: Callable | None, save: Callable | None
):
    """Run groups of segments, the first of which begins at ``start``.

    ``record(k, state)`` is called at the end of each stride of a recorded group; ``save(slot, state)`` before each
    segment. Both count from 0 over all groups.
    """
    unroll = unrolled(lanes.loop, lanes.layout, lanes.loop.advance)
    for group, slot, taken in _numbered(groups):

        def segment(i, state, group=group, slot=slot, taken=taken):
            if save:
                save(slot + i, state)
            first, k = start.segment(group, i), taken + i * group.records

            def recorded(m, state):
                assert record is not None
                record(k + m, state)
                return state

            return _steps(
                lanes, group, first, unroll, lambda j, inputs, draw, state: lanes.step(inputs, state, draw()),
                recorded if group.recorded and record else None, state,
            )  # fmt: skip

        state = _segments(group, segment, state)
    return state


def _numbered(groups: Sequence[SegmentGroup]):
    """Each group, and how many segments and records the groups before it have."""
    slot = taken = 0
    for group in groups:
        yield group, slot, taken
        slot += group.segments
        taken += group.segments * group.records


# The kernels --------------------------------------------------------------------------------------------------------


class MosaicGPU:
    """The backend for Hopper and newer: see `base.Backend` for the protocol."""

    name = "mosaic_gpu"
    interpretable = True
    inverse_steps = True
    networks = False
    by_group = False
    masses_together = 1

    def base_two(self, precision: str) -> bool:
        """Powers of two and reciprocals are what the hardware has, besides a rough tanh."""
        return precision == "exact"

    def unavailable(self, platform: str) -> str | None:
        """Why nothing can run on this platform, or ``None``."""
        if not MOSAIC_GPU:
            return NO_MOSAIC_GPU
        if reason := not_here(platform, "gpu"):
            return reason
        capability = compute_capability()
        if capability is not None and capability < 9.0:
            return f"it needs an NVIDIA GPU of compute capability 9.0 (Hopper) or newer, and this one has {capability}"
        return None

    def unsupported(self, request: Request) -> str | None:
        """Why the request cannot run, or ``None`` if it can."""
        return unsupported(request, lacks) if MOSAIC_GPU else NO_MOSAIC_GPU

    def copied(self, request: Request) -> Copied:
        """Whole programs, cut to the lanes of the run."""
        layout = Layout.choose(request.lanes, most=2)
        whole = layout.blocks * layout.width
        return Copied(whole if whole > request.lanes else 0, layout.width)

    def pointwise(self, program) -> None:
        return None

    def forward(self, loop: Loop, operands: Operands, initial: Carry, checkpoint_every: int | None = None) -> Forward:
        """Run the loop; with ``checkpoint_every``, also keep the state before each segment."""
        (coefs, inputs, seeds, _), state = operands, initial.state
        layout = Layout.choose(state[0].shape[0], most=2)
        groups = tuple(segment_groups(loop.schedule, checkpoint_every or max(1, loop.schedule.steps)))
        obs = loop.n_observables if loop.schedule.count else 0
        call = _Call(loop, layout)
        call.give_arguments(coefs, inputs, seeds)
        call.operands["initial"] = [layout.lay(x) for x in state]
        call.outs["final"] = [layout.array()] * loop.n_state
        call.outs["records"] = [layout.array(loop.schedule.count)] * obs
        # A walk back by inverse steps begins each segment at its end.
        slots = segments_in(groups) + (loop.inverse is not None)
        call.outs["saved"] = [layout.array(slots)] * loop.n_state if checkpoint_every else []

        def kernel(lanes: _Lanes):
            refs = lanes.refs
            state = _run_groups(
                lanes, groups, _Start(), lanes.load(refs["initial"]),
                record=(lambda k, state: lanes.store(refs["records"], lanes.observe(state), k)) if obs else None,
                save=(lambda slot, state: lanes.store(refs["saved"], state, slot)) if checkpoint_every else None,
            )  # fmt: skip
            lanes.store(refs["final"], state)
            if checkpoint_every and loop.inverse is not None:
                lanes.store(refs["saved"], state, slots - 1)

        out = call.run(kernel, "brainmass_kernels_gpu_forward")
        records = tuple(layout.unlay(x) for x in out["records"]) or no_records(loop, layout.lanes)
        saved = tuple(layout.unlay(x) for x in out["saved"])
        final = Carry(tuple(layout.unlay(x) for x in out["final"]))
        return Forward(records, final, saved if checkpoint_every else None)

    def adjoint(
        self, loop: Loop, pullbacks: Pullbacks, wanted: Wanted, operands: Operands, saved, cotangents: Cotangents,
        checkpoint_every: int,
    ) -> Adjoint:  # fmt: skip
        """Walk back over a forward run that kept checkpoints."""
        (coefs, inputs, seeds, _), ct_final = operands, cotangents.final.state
        layout = Layout.choose(ct_final[0].shape[0], most=1)
        groups = tuple(segment_groups(loop.schedule, checkpoint_every))
        obs = loop.n_observables if loop.schedule.count else 0
        reverse = ReversePlan.of(loop, pullbacks, wanted)
        call = _Call(loop, layout)
        call.give_arguments(coefs, inputs, seeds)
        call.operands["saved"] = [layout.lay(x) for x in saved]
        call.operands["ct_final"] = [layout.lay(x, "constant") for x in ct_final]
        call.operands["ct_records"] = [layout.lay(x, "constant") for x in cotangents.records] if obs else []
        call.outs["ct_state"] = [layout.array()] * loop.n_state
        call.outs["ct_coefs"] = [layout.array()] * reverse.n_coefs
        steps, in_lanes = loop.schedule.steps, [x for x, w in zip(call.inputs_in_lanes, wanted.inputs) if w]
        call.outs["ct_lane_inputs"] = [layout.array(steps)] * sum(in_lanes)
        sums = jax.ShapeDtypeStruct((steps, layout.blocks * WARPS), jnp.float32)
        call.outs["ct_uniform_inputs"] = [sums] * (len(in_lanes) - sum(in_lanes))
        if pullbacks.inverse is None:
            levels = checkpoint_levels(groups, reverse.most)
            call.outs["inner_saved"] = [layout.array(slots) for slots in levels for _ in range(loop.n_state)]
        out = call.run(lambda lanes: ReversePass(reverse, lanes, in_lanes).run(groups), "brainmass_kernels_gpu_adjoint")
        return Adjoint(
            tuple(layout.unlay(x) for x in out["ct_coefs"]),
            Carry(tuple(layout.unlay(x) for x in out["ct_state"])),
            merged(out["ct_uniform_inputs"], [layout.unlay(x) for x in out["ct_lane_inputs"]], in_lanes),
        )


class ReversePlan(NamedTuple):
    """What an adjoint kernel is made of.

    Attributes
    ----------
    most : steps that are replayed and then reversed in one body, the states between in registers
    """

    pullbacks: Pullbacks
    n_coefs: int
    most: int

    @classmethod
    def of(cls, loop: Loop, pullbacks: Pullbacks, wanted: Wanted) -> ReversePlan:
        operations = 1 + len(pullbacks.advance.jaxpr.jaxpr.eqns) + len(loop.advance.jaxpr.jaxpr.eqns)
        operations += _DRAW * loop.n_normals
        most = max(1, min(KEPT // (loop.n_state + loop.n_normals), _BODY_BACK // operations))
        # A draw is of two steps.
        return cls(pullbacks, sum(wanted.coefs), most - most % 2 if loop.n_normals and most > 1 else most)


class ReversePass(NamedTuple):
    """The way back of one program's lanes; a carry is the cotangents of coefficients and state."""

    plan: ReversePlan
    lanes: _Lanes
    in_lanes: Sequence[bool]

    def run(self, groups: Sequence[SegmentGroup]) -> None:
        lanes, refs = self.lanes, self.lanes.refs
        carry = lanes.zeros(self.plan.n_coefs), lanes.load(refs["ct_final"])
        if self.plan.pullbacks.inverse is not None:
            carry = self.by_inverse_steps(self.plan.pullbacks.inverse, groups, carry)
        else:
            carry = self.by_replay(groups, _Start(), 0, refs["saved"], carry, 0)
        lanes.store(refs["ct_coefs"], carry[0])
        lanes.store(refs["ct_state"], carry[1])

    def walk(self, groups: Sequence[SegmentGroup], start: _Start, record, segment: Callable, carry):
        """Walk back groups, of which the first begins at ``start`` and with this record.

        ``segment(group, slot, first, k, carry)`` takes a segment that begins at ``first`` and with record ``k``.
        """
        for group, slot, taken in reversed([*_numbered(groups)]):

            def one(i, carry, group=group, slot=slot, taken=taken):
                k = record + taken + i * group.records
                return segment(group, slot + i, start.segment(group, i), k, carry)

            carry = _segments(group, one, carry, backwards=True)
        return carry

    def by_replay(self, groups: Sequence[SegmentGroup], start: _Start, record, saved, carry, depth: int):
        """Run each segment again from the state before it, of which ``saved`` has one for each slot."""

        def segment(group, slot, first, k, carry):
            state = self.lanes.load(saved, slot)
            if group.parts or group.length > self.plan.most:
                return self.long(group, first, k, state, carry, depth)
            return self.short(group, first, k, state, carry)

        return self.walk(groups, start, record, segment, carry)

    def long(self, group: SegmentGroup, first: _Start, k, state, carry, depth: int):
        """A segment too long for registers: run it to save states within it, and walk its parts back."""
        lanes, n, groups = self.lanes, self.lanes.loop.n_state, nested_segments(group, self.plan.most)
        saved = lanes.refs["inner_saved"][n * depth : n * (depth + 1)]
        state = _run_groups(lanes, groups, first, state, None, lambda slot, s: lanes.store(saved, s, slot))
        if group.parts and group.recorded:
            carry = self.observed(k, state, carry)
        return self.by_replay(groups, first, k, saved, carry, depth + 1)

    def short(self, group: SegmentGroup, first: _Start, k, state, carry):
        """A segment of a few steps, written out: each of them, and then the pullback of each."""
        lanes, steps = self.lanes, range(group.length)
        inputs, normals = [lanes.inputs(first.step + j) for j in steps], lanes.normals(first.step, first.parity)
        states, draws = [state], []
        for j in steps:
            draws.append(normals(j))
            states.append(lanes.step(inputs[j], states[-1], draws[-1]))
        for j in reversed(steps):
            m, left = divmod(j + 1, group.stride)
            if group.recorded and left == 0:
                carry = self.observed(k + (m - 1), states[j + 1], carry)
            out = lanes.apply(self.plan.pullbacks.advance, *lanes.coefs, *states[j], *inputs[j], *draws[j], *carry[1])
            carry = self.pulled(first.step + j, out, carry)
        return carry

    def pulled(self, n, out, carry):
        """The carry after the pullback of step ``n``, which made ``out``."""
        lanes = self.lanes
        ct_coefs, ct_state, ct_inputs = self.split(out)
        series, streams = parted(lanes.fill(ct_inputs), self.in_lanes)
        lanes.store(lanes.refs["ct_lane_inputs"], streams, n)
        for ref, ct in zip(lanes.refs["ct_uniform_inputs"], series):
            lanes.store_sums(ref.at[n, pl.ds(lax.axis_index("block") * WARPS, WARPS)], ct)
        return added(carry[0], ct_coefs), lanes.fill(ct_state)

    def by_inverse_steps(self, program: Program, groups: Sequence[SegmentGroup], carry):
        """Walk each segment back from the state at its end, which a checkpoint holds."""
        lanes, n = self.lanes, self.lanes.loop.n_state
        unroll = unrolled(lanes.loop, lanes.layout, program)

        def step(n_step, inputs, draw, carry):
            *carry, state = carry
            out = lanes.apply(program, *lanes.coefs, *state, *inputs, *draw(), *carry[1])
            return *self.pulled(n_step, out[:-n], carry), lanes.fill(out[-n:])

        def segment(group, slot, first, k, carry):
            def observed(m, carry):
                *carry, state = carry
                return *self.observed(k + m, state, carry), state

            state = lanes.load(lanes.refs["saved"], slot + 1)
            *carry, _ = _steps(
                lanes, group, first, unroll,
                lambda j, inputs, draw, carry: step(first.step + j, inputs, draw, carry),
                observed if group.recorded else None, (*carry, state), backwards=True,
            )  # fmt: skip
            return tuple(carry)

        return self.walk(groups, _Start(), 0, segment, carry)

    def observed(self, k, state, carry):
        """The pullback of record ``k``, taken of ``state``."""
        lanes, refs = self.lanes, self.lanes.refs
        if not refs["ct_records"]:
            return carry
        cts = lanes.load(refs["ct_records"], k)
        out = lanes.apply(self.plan.pullbacks.observe, *lanes.coefs, *state, *cts)
        ct_coefs, ct_state, _ = self.split(out)
        return added(carry[0], ct_coefs), added(carry[1], ct_state)

    def split(self, out: Sequence[Any]):
        """What a pullback returns: cotangents of coefficients, of the state, and of inputs."""
        a, b = self.plan.n_coefs, self.plan.n_coefs + self.lanes.loop.n_state
        return out[:a], out[a:b], out[b:]
