"""Forward and reverse passes of masses: a chunk's state stays in vector registers. They have no couplings to add.

`networks` extends what the host does here by what couplings add; its kernels are other ones, for the state of all
regions fills more than the registers.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ...pointwise import SplitPullback
from ..base import Adjoint, Carry, Cotangents, Forward, Loop, Operands, Pullbacks, SplitPullbacks, Wanted, no_records
from ..pallas import added, apply, fill, merged, parted, read, when, write
from .call import Call, arguments
from .layout import COLUMNS, Plan, ReverseMemory, plan_checkpoints, plan_run

# Vector registers, and how many a step takes besides those of what it carries.
_REGISTERS = 64
_TEMPORARIES = 24


def _observed(loop: Loop) -> int:
    return loop.n_observables if loop.schedule.count else 0


class Uncoupled:
    """What a coupling adds to a pass; masses have none."""

    def add_arguments(self, call: Call, operands: Operands) -> None:
        """What a step needs besides the state."""
        call.add_arguments(operands)

    def vmem(self, call: Call) -> int | None:
        """Bytes of VMEM to ask for, where they are more than the compiler grants anyway."""

    def begin(self, refs) -> None:
        """What a reverse pass does before its first chunk."""


@dataclasses.dataclass(frozen=True)
class ForwardPass(Uncoupled):
    """A forward run; ``saving`` the state before each chunk, for an adjoint."""

    loop: Loop
    plan: Plan
    saving: bool

    name = "brainmass_kernels_tpu_forward"

    @classmethod
    def of(cls, loop: Loop, operands: Operands, lanes: int, checkpoint_every: int | None) -> ForwardPass:
        if checkpoint_every is None:
            return cls(loop, plan_run(loop, operands.coefs, operands.inputs, lanes), False)
        plan = plan_checkpoints(loop, operands.coefs, operands.inputs, lanes, checkpoint_every)
        return cls(loop, plan, True)

    def run(self, operands: Operands, initial: Carry) -> Forward:
        call = Call(self.plan, backwards=False)
        self.add(call, operands, initial)
        return self.results(
            call.run(self.kernel, self.name, self.loop, self.loop.advance, vmem=self.vmem(call)), initial
        )

    def add(self, call: Call, operands: Operands, initial: Carry) -> None:
        """What the kernel reads and writes."""
        plan, time, n = self.plan, self.plan.time, self.loop.n_state
        records = time.record_blocks * time.strides, *plan.wide
        self.add_arguments(call, operands)
        call.add_operands("initial", [plan.lay(x) for x in initial.state], call.constant())
        call.add_results("state", n, plan.wide, call.constant())
        call.add_results("records", _observed(self.loop), records, call.moving(time.strides, time.record_block))
        if self.saving:
            call.add_results("saved", n, (time.chunks, *plan.wide), call.moving(1))

    def results(self, out, initial: Carry) -> Forward:
        plan, loop = self.plan, self.loop
        records = tuple(plan.unlay(x[: loop.schedule.count]) for x in out["records"])
        final = Carry(tuple(plan.unlay(x) for x in out["state"]))
        saved = tuple(plan.unlay(x) for x in out["saved"])
        return Forward(records or no_records(loop, plan.lanes), final, saved if self.saving else None)

    def kernel(self, refs, chunk):
        loop, plan = self.loop, self.plan
        start, first, last = plan.time.bounds(chunk)

        @pl.when(chunk == 0)
        def _():
            write(refs["state"], read(refs["initial"]))

        state = read(refs["state"])
        if refs["saved"]:
            write(refs["saved"], state, 0)
        coefs, inputs, normals = arguments(loop, plan, refs, start)

        def step(j, draw, state):
            return fill(apply(loop.advance, *coefs, *state, *inputs(j), *draw()), plan.tile)

        def record(k, on, state):
            @when(on)
            def _():
                if refs["records"]:
                    write(refs["records"], fill(apply(loop.observe, *coefs, *state), plan.tile), k)

            return state

        write(refs["state"], plan.time.walk(first, last, step, record, state, normals))


@dataclasses.dataclass(frozen=True)
class ReversePass(Uncoupled):
    """The adjoint of a forward run that saved the state before each chunk: each is run again, then walked back."""

    loop: Loop
    pullbacks: Pullbacks
    wanted: Wanted
    plan: Plan
    advance: SplitPullback
    observe: SplitPullback

    name = "brainmass_kernels_tpu_adjoint"

    @classmethod
    def of(
        cls, loop: Loop, pullbacks: Pullbacks, wanted: Wanted, coefs, inputs, lanes: int, checkpoint_every: int
    ) -> ReversePass:
        advance, observe, _ = SplitPullbacks.of(loop, pullbacks)
        # Values a lane that VMEM holds for each step; what passes in or out is there twice.
        a_record = 2 * loop.n_observables + observe.n_kept
        a_step = advance.n_kept + 2 * (loop.n_inputs + sum(wanted.inputs)) + a_record / loop.schedule.every
        memory = ReverseMemory(sum(wanted.coefs), a_step)
        plan = plan_checkpoints(loop, coefs, inputs, lanes, checkpoint_every, memory)
        return cls(loop, pullbacks, wanted, plan, advance, observe)

    @property
    def n_coefs(self) -> int:
        """How many cotangents of coefficients are wanted."""
        return sum(self.wanted.coefs)

    @property
    def in_lanes(self) -> tuple[bool, ...]:
        """For each wanted input, whether it differs from lane to lane."""
        return tuple(lane for lane, want in zip(self.plan.inputs_in_lanes, self.wanted.inputs) if want)

    @property
    def rows_per_pass(self) -> int:
        """Rows that go back together: as many as the registers hold, for what is carried and for the rest."""
        fit = max(1, _REGISTERS // (self.n_coefs + self.loop.n_state + _TEMPORARIES))
        return max(r for r in (8, 16, 24, 32) if r <= 8 * fit and self.plan.rows % r == 0)

    def run(self, operands: Operands, saved, cotangents: Cotangents) -> Adjoint:
        call = Call(self.plan, backwards=True)
        self.add(call, operands, saved, cotangents)
        programs = self.loop.advance, self.pullbacks.advance
        out = call.run(self.kernel, self.name, self.loop, *programs, vmem=self.vmem(call))
        return self.results(out, operands, saved, cotangents)

    def add(self, call: Call, operands: Operands, saved, cotangents: Cotangents) -> None:
        """What the kernel reads and writes."""
        loop, plan, time, observed = self.loop, self.plan, self.plan.time, _observed(self.loop)
        self.add_arguments(call, operands)
        call.add_operands("saved", [plan.lay(x) for x in saved[: loop.n_state]], call.moving(1))
        call.add_operands("ct_final", [plan.lay(x, "constant") for x in cotangents.final.state], call.constant())
        if observed:
            beyond = time.record_blocks * time.strides - loop.schedule.count
            cts = [jnp.pad(plan.lay(x, "constant"), [(0, beyond), (0, 0), (0, 0)]) for x in cotangents.records]
            call.add_operands("ct_records", cts, call.moving(time.strides, time.record_block))
        call.add_results("ct_state", loop.n_state, plan.wide, call.constant())
        call.add_results("ct_coefs", self.n_coefs, plan.wide, call.constant())
        streams, series = sum(self.in_lanes), len(self.in_lanes) - sum(self.in_lanes)
        call.add_results("ct_lane_inputs", streams, (time.positions, *plan.wide), call.moving(time.size))
        block = pl.BlockSpec((1, 1, 1, time.size), lambda b, c: (b, call.chunk(c), 0, 0))
        call.add_results("ct_uniform_inputs", series, (plan.blocks, time.chunks, 1, time.size), block)
        call.add_scratch("ct_series", series, (time.size, COLUMNS))
        call.add_scratch("residuals", self.advance.n_kept, (time.size, *plan.tile))
        call.add_scratch("record_residuals", self.observe.n_kept if observed else 0, (time.strides, *plan.tile))

    def results(self, out, operands: Operands, saved, cotangents: Cotangents) -> Adjoint:
        plan, time = self.plan, self.plan.time
        partial = [time.gather(x.reshape(plan.blocks, -1).T) for x in out["ct_uniform_inputs"]]
        streamed = [plan.unlay(time.gather(x)) for x in out["ct_lane_inputs"]]
        return Adjoint(
            tuple(plan.unlay(x) for x in out["ct_coefs"]),
            Carry(tuple(plan.unlay(x) for x in out["ct_state"])),
            merged(partial, streamed, self.in_lanes),
        )

    def kernel(self, refs, chunk):
        @pl.when(pl.program_id(1) == 0)
        def _():
            write(refs["ct_state"], read(refs["ct_final"]))
            write(refs["ct_coefs"], [jnp.zeros(self.plan.tile, jnp.float32)] * self.n_coefs)
            self.begin(refs)

        for ref in refs["ct_series"]:
            ref[...] = jnp.zeros(ref.shape, jnp.float32)
        self.replay(refs, chunk)
        self.pull(refs, chunk)
        sum_series(refs)

    def replay(self, refs, chunk):
        """Run the chunk again from its checkpoint, keeping what the pullbacks need of each step."""
        loop, time, tile = self.loop, self.plan.time, self.plan.tile
        start, first, last = time.bounds(chunk)
        coefs, inputs, normals = arguments(loop, self.plan, refs, start)

        def step(j, draw, state):
            drive = *inputs(j), *draw()
            write(refs["residuals"], fill(apply(self.advance.keep, *coefs, *state, *drive), tile), j)
            return fill(apply(loop.advance, *coefs, *state, *drive), tile)

        def record(k, on, state):
            @when(on)
            def _():
                if refs["record_residuals"]:
                    write(refs["record_residuals"], fill(apply(self.observe.keep, *coefs, *state), tile), k)

            return state

        time.walk(first, last, step, record, read(refs["saved"], 0), normals)

    def pull(self, refs, chunk):
        """Walk the chunk back, some rows after the others."""

        def one(i, carry):
            self.pull_rows(refs, chunk, pl.ds(pl.multiple_of(i * self.rows_per_pass, 8), self.rows_per_pass))
            return carry

        lax.fori_loop(jnp.int32(0), jnp.int32(self.plan.rows // self.rows_per_pass), one, ())

    def pull_rows(self, refs, chunk, rows):
        loop, time, n_coefs, tile = self.loop, self.plan.time, self.n_coefs, (rows.size, COLUMNS)
        start, first, last = time.bounds(chunk)
        coefs, inputs, _ = arguments(loop, self.plan, refs, start, rows)
        recorded = time.records(chunk)

        def step(j, _, carry):
            out = apply(self.advance.back, *coefs, *inputs(j), *read(refs["residuals"], j, rows), *carry[1])
            self.write_inputs(refs, j, rows, fill(out[n_coefs + loop.n_state :], tile))
            return added(carry[0], out[:n_coefs]), fill(out[n_coefs : n_coefs + loop.n_state], tile)

        def record(k, on, carry):
            def pull(carry):
                residuals = read(refs["record_residuals"], k, rows)
                cts = [jnp.where(recorded, ct, 0.0) for ct in read(refs["ct_records"], k, rows)]
                out = apply(self.observe.back, *coefs, *residuals, *cts)
                return added(carry[0], out[:n_coefs]), added(carry[1], out[n_coefs:])

            if not refs["ct_records"]:
                return carry
            return pull(carry) if on is True else lax.cond(on, pull, lambda carry: carry, carry)

        carry = read(refs["ct_coefs"], rows), read(refs["ct_state"], rows)
        ct_coefs, ct_state = time.walk(first, last, step, record, carry, backwards=True)
        write(refs["ct_coefs"], ct_coefs, rows)
        write(refs["ct_state"], ct_state, rows)

    def write_inputs(self, refs, j, rows, cts) -> None:
        """Cotangents of the wanted inputs at a step: of a uniform one the sum over the rows, in each column."""
        series, streams = parted(cts, self.in_lanes)
        for ref, ct in zip(refs["ct_series"], series):
            ref[pl.ds(j, 1)] += jnp.sum(ct, axis=0, keepdims=True)
        write(refs["ct_lane_inputs"], streams, j, rows)


def sum_series(refs) -> None:
    """Cotangents of uniform inputs, one for each step of a chunk, from what was summed in each of 128 columns."""
    for series, out in zip(refs["ct_series"], refs["ct_uniform_inputs"]):
        # The matrix unit adds the 128 columns up and turns the times into columns, in one.
        total = lax.dot_general(
            jnp.ones((8, COLUMNS), jnp.float32), series[...], (((1,), (1,)), ((), ())),
            precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32,
        )  # fmt: skip
        out[0, 0] = total[:1]
