"""Passes of networks: regions in rows, networks in columns, the state of all regions in VMEM.

A block is 128 networks with all their regions, ``(regions padded to 8 or to a multiple of 16, 128)`` for each value; of
fewer networks the other columns idle.

A run that a gradient will follow keeps the sums that arrive. They are an input like others to the adjoint, whose replay
therefore knows no network; its way back sends the cotangents of the sums through the transposed connections, by the
same code on a clock that runs backwards.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ...errors import Unsupported
from ...pointwise import Program, SplitPullback
from ..base import (
    Adjoint,
    Carry,
    Connections,
    Cotangents,
    Coupling,
    Forward,
    Loop,
    Operands,
    Pullbacks,
    SplitPullbacks,
    Wanted,
)
from ..pallas import added, apply, fill, read, write
from .call import Call, arguments
from .connections import Form, Sums, add_connections
from .layout import BUDGET, COLUMNS, LONGEST, NetworkPlan, chunk_time, div, rem
from .masses import ForwardPass, ReversePass, Uncoupled

# Most VMEM that is asked for: of the 64 MiB of a core of v5p and tpu7x (v5e and v6e have 128, v4 has 16).
MOST = 52 * 2**20
# VMEM that streams get where what a network holds leaves less of the ordinary budget.
STREAMS = 6 * 2**20
# What spills, and what the compiler keeps for itself.
MARGIN = 3 * 2**20
# Rows that one body takes.
_ROWS_PER_PASS = 16


def too_large(loop: Loop, coupling: Coupling) -> str | None:
    """Why networks do not fit, whose regions are all in VMEM, or ``None`` if they do."""
    form, own = Form.of(coupling), coupling.only.own_weights
    # Where matrices fill the VMEM, a network that does without coefficients of its own may still fit.
    coefs = 0 if own else 3 * loop.n_coefs
    a_lane = 2 * (coefs + 5 * loop.n_state + 2 * loop.n_inputs + loop.n_observables)
    if (need := form.bytes(own) + 4 * form.rows * COLUMNS * a_lane) <= MOST:
        return None
    return (
        f"128 networks of {form.regions} regions that go back {form.depth} steps{', each with its own weights,' * own} "
        f"need {need:,} bytes of VMEM, and it asks for {MOST:,}: {'weights shared by all networks, ' * own}a longer "
        f"dt, a higher speed of conduction or fewer regions would fit; implementation 'scan' runs it"
    )


class Coupled(Uncoupled):
    """What passes of networks add to those of masses, both ways."""

    loop: Loop
    plan: NetworkPlan
    form: Form

    def add_arguments(self, call: Call, operands: Operands) -> None:
        super().add_arguments(call, operands)
        add_connections(call, self.plan, self.form, operands.connections[0])

    def vmem(self, call: Call) -> int | None:
        if (need := call.vmem()) > MOST:
            raise Unsupported(
                f"implementation 'mosaic_tpu' cannot run this: with weights of its own for each network, or so much to "
                f"keep for a gradient, 128 networks need {need:,} bytes of VMEM, and it asks for {MOST:,}; weights "
                f"shared by all networks, a longer dt or fewer regions would fit"
            )
        return need + MARGIN if need > BUDGET else None

    def sums(self, refs) -> Sums:
        # Forwards the regions that fill up are copies of the last one; backwards they get nothing.
        return Sums(self.form, refs, self.loop.precision, copies=isinstance(self, ForwardPass))

    def send_program(self) -> Program:
        assert self.loop.coupling is not None
        return self.loop.coupling.send

    def each(self, body: Callable) -> None:
        """``body(first, rows)`` for groups of regions; unrolled, so that neighbours overlap, where they are few."""
        rows = min(_ROWS_PER_PASS, self.form.rows)
        count = self.form.rows // rows
        if count <= 8 and not self.loop.interpret:
            for i in range(count):
                body(i * rows, pl.ds(i * rows, rows))
            return

        def one(i, carry):
            body(i * rows, pl.ds(pl.multiple_of(i * rows, 8), rows))
            return carry

        lax.fori_loop(jnp.int32(0), jnp.int32(count), one, ())


def _form(loop: Loop) -> Form:
    assert loop.coupling is not None
    return Form.of(loop.coupling)


def _plan(loop: Loop, form: Form, coefs, inputs, lanes: int, checkpoint_every: int | None) -> NetworkPlan:
    """Lay out a run. The chunks of one with checkpoints depend on the loop only, as in `plan_checkpoints`."""
    a_tile, constant = 4 * form.rows * COLUMNS, 2 * (3 * loop.n_coefs + 5 * loop.n_state + 2)
    if checkpoint_every is None:
        streams = sum(jnp.ndim(u) == 2 for u in inputs)
        a_step = 2 * (streams + loop.n_observables / loop.schedule.every)
    else:
        # Inputs and their cotangents; the sums, their cotangents, what was sent, the end's cotangents; residuals.
        a_step = 4 * loop.n_inputs + 2 * loop.n_observables / loop.schedule.every + 8
        a_step += loop.n_state + loop.n_normals + 4
    room = max(BUDGET - form.bytes(False) - constant * a_tile, STREAMS)
    most = int(min(LONGEST, room / (a_tile * a_step))) if a_step else LONGEST
    time = chunk_time(loop.schedule, max(1, most), checkpoint_every, unroll=1)
    return NetworkPlan.of_networks(form.regions, form.rows, coefs, inputs, lanes, time)


# Forward ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class NetworkForwardPass(Coupled, ForwardPass):
    """With ``saving``, also keeps the sums that arrive in each step, and the history before the run."""

    plan: NetworkPlan
    form: Form

    name = "brainmass_kernels_tpu_network_forward"

    @classmethod
    def of(cls, loop: Loop, operands: Operands, lanes: int, checkpoint_every: int | None) -> NetworkForwardPass:
        form = _form(loop)
        plan = _plan(loop, form, operands.coefs, operands.inputs, lanes, checkpoint_every)
        return cls(loop, plan, checkpoint_every is not None, form)

    def add(self, call: Call, operands: Operands, initial: Carry) -> None:
        super().add(call, operands, initial)
        plan, form, time = self.plan, self.form, self.plan.time
        if self.saving:
            call.add_results("arrived", 1, (time.positions, *plan.wide), call.moving(time.size))
        else:
            call.add_scratch("arrived", 1, (1, *plan.tile))
        if form.depth:
            outside = pl.BlockSpec(memory_space=pltpu.HBM)
            call.add_operands("history", [_stored(form, plan, initial.history[0])], outside)
            call.add_results("last", 1, (plan.blocks, form.store, COLUMNS), outside)
            call.add_scratch("semaphore", 1, pltpu.SemaphoreType.DMA)

    def results(self, out, initial: Carry) -> Forward:
        forward, form, last = super().results(out, initial), self.form, initial.history[0]
        if form.depth:
            last = _unstored(form, self.plan, out["last"][0], form.last(self.plan.time.steps))
        final, saved = Carry(forward.final.state, (last,)), None
        if self.saving:
            saved = *forward.saved, self.plan.unlay(out["arrived"][0]), initial.history[0]
        return Forward(forward.records, final, saved)

    def kernel(self, refs, chunk):
        form, time, block = self.form, self.plan.time, pl.program_id(0)
        start, first, last = time.bounds(chunk)
        sums = self.sums(refs)

        @pl.when(chunk == 0)
        def _():
            write(refs["state"], read(refs["initial"]))
            if form.depth:
                _copy(refs, refs["history"][0].at[block], refs["store"][0])

        if self.saving:
            write(refs["saved"], read(refs["state"]), 0)

        def body(j, carry):
            self.step(refs, sums, start, j)
            if refs["records"]:
                pl.when(rem(j + 1, time.stride) == 0)(lambda: self.record(refs, start, div(j, time.stride)))
            return carry

        lax.fori_loop(first, last, body, ())
        if form.depth:

            @pl.when(chunk == time.chunks - 1)
            def _():
                _copy(refs, refs["store"][0], refs["last"][0].at[block])

    def step(self, refs, sums: Sums, start, j) -> None:
        """All regions send, the sums arrive, all regions advance."""
        loop, n, (arrived,), place = self.loop, start + j, refs["arrived"], j if self.saving else 0
        sums.begin(n)

        def send(region, rows):
            coefs, _, _ = arguments(loop, self.plan, refs, start, rows)
            sums.send(
                n, region, fill(apply(self.send_program(), *coefs, *read(refs["state"], rows)), (rows.size, COLUMNS))[0]
            )

        self.each(send)
        sums.arrive(n, arrived.at[place])

        def advance(region, rows):
            coefs, inputs, normals = arguments(loop, self.plan, refs, start, rows)
            state = read(refs["state"], rows)
            stepped = apply(loop.advance, *coefs, *state, *inputs(j), arrived[place, rows], *normals(j)(0))
            write(refs["state"], fill(stepped, (rows.size, COLUMNS)), rows)

        self.each(advance)

    def record(self, refs, start, k) -> None:
        def observe(region, rows):
            coefs, _, _ = arguments(self.loop, self.plan, refs, start, rows)
            values = apply(self.loop.observe, *coefs, *read(refs["state"], rows))
            write(refs["records"], fill(values, (rows.size, COLUMNS)), k, rows)

        self.each(observe)


def _copy(refs, source, target) -> None:
    (semaphore,) = refs["semaphore"]
    copy = pltpu.make_async_copy(source, target, semaphore)
    copy.start()
    copy.wait()


def _stored(form: Form, plan: NetworkPlan, history):
    """A history, ``(depth, L)``, as the store has it before the first step, ``(blocks, store, 128)``."""
    x = plan.lay(history).reshape(form.depth, plan.blocks, form.rows, COLUMNS)
    x = jnp.pad(jnp.moveaxis(x, 0, 2), [(0, 0), (0, 0), (0, form.stride - form.depth), (0, 0)])
    return jnp.pad(x.reshape(plan.blocks, form.rows * form.stride, COLUMNS), [(0, 0), (0, form.slide), (0, 0)])


def _unstored(form: Form, plan: NetworkPlan, store, begin: int):
    """The inverse of `_stored`, of a store in which the history begins at a place."""
    x = store[:, begin : begin + form.rows * form.stride].reshape(plan.blocks, form.rows, form.stride, COLUMNS)
    x = jnp.moveaxis(x[:, :, : form.depth], 2, 0)
    return plan.unlay(x.reshape(form.depth, *plan.wide))


# Adjoint ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class NetworkReversePass(Coupled, ReversePass):
    """The adjoint of a forward run that kept the sums.

    Cotangents of weights and of the history are made from those of the sums by plain jnp: where nobody asks for them,
    the compiler leaves them out.
    """

    plan: NetworkPlan
    form: Form
    send: SplitPullback

    name = "brainmass_kernels_tpu_network_adjoint"

    @classmethod
    def of(
        cls, loop: Loop, pullbacks: Pullbacks, wanted: Wanted, coefs, inputs, lanes: int, checkpoint_every: int
    ) -> NetworkReversePass:
        form = _form(loop)
        plan = _plan(loop, form, coefs, inputs, lanes, checkpoint_every)
        # The sum, last of the inputs, is read again like the others.
        advance, observe, send = SplitPullbacks.of(loop, pullbacks)
        assert send is not None
        return cls(loop, pullbacks, wanted, plan, advance, observe, form, send)

    @property
    def ending(self) -> int:
        """The first chunk with a step that the last history has."""
        return self.plan.time.chunk_of(max(0, self.plan.time.steps - self.form.depth))

    def add(self, call: Call, operands: Operands, saved, cotangents: Cotangents) -> None:
        super().add(call, operands, saved, cotangents)
        plan, time, arrived = self.plan, self.plan.time, saved[self.loop.n_state]
        call.add_operands("arrived", [plan.lay(arrived)], call.moving(time.size))
        if self.form.depth:
            last = time.spread(plan.lay(_at_steps(cotangents.final.history[0], time.steps), "constant"))
            block = call.moving(time.size, lambda c: jnp.maximum(c - self.ending, 0))
            call.add_operands("ct_last", [last[self.ending * time.size :]], block)
        for name, count in (("ct_sums", 1), ("sent", int(self.wanted.weights[0]))):
            call.add_results(name, count, (time.positions, *plan.wide), call.moving(time.size))
        call.add_scratch("ct_sent", 1, plan.tile)
        call.add_scratch("send_residuals", self.send.n_kept, (time.size, *plan.tile))

    def results(self, out, operands: Operands, saved, cotangents: Cotangents) -> Adjoint:
        adjoint, history = super().results(out, operands, saved, cotangents), saved[-1]
        (connections,) = operands.connections
        plan, form, ct_weights = self.plan, self.form, None
        ct_sums = _by_region(form, plan.unlay(plan.time.gather(out["ct_sums"][0])))
        if self.wanted.weights[0]:
            sent = jnp.concatenate([history, plan.unlay(plan.time.gather(out["sent"][0]))])
            ct_weights = _of_weights(form, connections, _by_region(form, sent), ct_sums)
        ct_history = _of_history(form, connections, cotangents.final.history[0], ct_sums)
        return adjoint._replace(initial=Carry(adjoint.initial.state, (ct_history,)), weights=(ct_weights,))

    def begin(self, refs) -> None:
        self.sums(refs).clear()

    def replay(self, refs, chunk):
        self.each(lambda region, rows: self.replay_rows(refs, chunk, rows))

    def replay_rows(self, refs, chunk, rows):
        loop, time, tile = self.loop, self.plan.time, (rows.size, COLUMNS)
        start, first, last = time.bounds(chunk)
        coefs, inputs, normals = arguments(loop, self.plan, refs, start, rows)

        def keep(name, program, place, *args):
            write(refs[name], fill(apply(program, *coefs, *args), tile), place, rows)

        def step(j, state):
            drive = *inputs(j), *read(refs["arrived"], j, rows), *normals(j)(0)
            keep("residuals", self.advance.keep, j, *state, *drive)
            keep("send_residuals", self.send.keep, j, *state)
            if refs["sent"]:
                keep("sent", self.send_program(), j, *state)
            state = fill(apply(loop.advance, *coefs, *state, *drive), tile)
            if refs["record_residuals"]:

                @pl.when(rem(j + 1, time.stride) == 0)
                def _():
                    keep("record_residuals", self.observe.keep, div(j, time.stride), *state)

            return state

        lax.fori_loop(first, last, step, read(refs["saved"], 0, rows))

    def pull(self, refs, chunk):
        """Walk the chunk back, all regions a step at a time."""
        time, sums = self.plan.time, self.sums(refs)
        start, first, last = time.bounds(chunk)

        def body(i, carry):
            j = last - 1 - i
            if refs["ct_records"]:
                on = (rem(j + 1, time.stride) == 0) & time.records(chunk)
                pl.when(on)(lambda: self.pull_record(refs, start, div(j, time.stride)))
            self.pull_step(refs, chunk, sums, start, j)
            return carry

        lax.fori_loop(jnp.int32(0), last - first, body, ())

    def pull_step(self, refs, chunk, sums: Sums, start, j) -> None:
        loop, a, b = self.loop, self.n_coefs, self.n_coefs + self.loop.n_state
        since_end = jnp.int32(self.plan.time.steps - 1) - (start + j)
        sums.begin(since_end)

        def pull(region, rows):
            coefs, inputs, _ = arguments(loop, self.plan, refs, start, rows)
            drive = *inputs(j), *read(refs["arrived"], j, rows), *read(refs["residuals"], j, rows)
            out = apply(self.advance.back, *coefs, *drive, *read(refs["ct_state"], rows))
            write(refs["ct_coefs"], added(read(refs["ct_coefs"], rows), out[:a]), rows)
            write(refs["ct_state"], fill(out[a:b], (rows.size, COLUMNS)), rows)
            *ct_inputs, ct_sum = fill(out[b:], (rows.size, COLUMNS))
            self.write_inputs(refs, j, rows, ct_inputs)
            write(refs["ct_sums"], [ct_sum], j, rows)
            sums.send(since_end, region, ct_sum)

        self.each(pull)
        (ct_sent,) = refs["ct_sent"]
        sums.arrive(since_end, ct_sent)
        if refs["ct_last"]:

            @pl.when(chunk >= self.ending)
            def _():
                ct_sent[...] += refs["ct_last"][0][j]

        self.pull_state(
            refs, start, self.send,
            lambda rows: (*read(refs["send_residuals"], j, rows), *read(refs["ct_sent"], rows)),
        )  # fmt: skip

    def pull_record(self, refs, start, k) -> None:
        self.pull_state(
            refs, start, self.observe,
            lambda rows: (*read(refs["record_residuals"], k, rows), *read(refs["ct_records"], k, rows)),
        )  # fmt: skip

    def pull_state(self, refs, start, function: SplitPullback, values: Callable) -> None:
        """Add the cotangents of coefficients and state that a function of these makes of ``values(rows)``."""

        def pull(region, rows):
            coefs, _, _ = arguments(self.loop, self.plan, refs, start, rows)
            out = apply(function.back, *coefs, *values(rows))
            targets = *refs["ct_coefs"], *refs["ct_state"]
            write(targets, added(read(targets, rows), out), rows)

        self.each(pull)


def _at_steps(last, steps: int):
    """The cotangent of the last history at the steps of the run, ``(steps, L)``."""
    depth = len(last)
    return last[depth - steps :] if steps <= depth else jnp.pad(last, [(steps - depth, 0), (0, 0)])


def _by_region(form: Form, x):
    """``(T, L)`` as ``(N, T, networks)``."""
    return jnp.moveaxis(x.reshape(len(x), -1, form.regions), -1, 0)


def _of_weights(form: Form, connections: Connections, sent, ct_sums):
    """For each weight ``sum_t ct_sum_i(t) sent_j(t - d)``, ``(N, N, networks)``."""
    if not form.depth:
        return jnp.einsum("itb,jtb->ijb", ct_sums, sent, precision=lax.Precision.HIGHEST)
    rows, columns = connections.edges
    steps = ct_sums.shape[1]

    def one(edge):
        row, column, delay = edge
        arrived = lax.dynamic_slice_in_dim(sent[column], form.depth - delay, steps)
        return jnp.sum(ct_sums[row] * arrived, axis=0)

    cts = lax.map(one, (rows, columns, connections.steps[rows, columns]))
    empty = jnp.zeros((form.regions, form.regions, cts.shape[1]), cts.dtype)
    return empty.at[rows, columns].set(cts, unique_indices=True, indices_are_sorted=True)


def _of_history(form: Form, connections: Connections, ct_last, ct_sums):
    """For what was sent before the run: where it arrived, and what of it the last history still has; ``(depth, L)``."""
    depth, steps = form.depth, ct_sums.shape[1]
    if not depth:
        return jnp.zeros_like(ct_last)
    rows, columns = connections.edges
    # So that what was sent at place h of the history arrives at place h + delay.
    early = jnp.pad(ct_sums[:, :depth], [(0, 0), (depth, max(0, depth - steps)), (0, 0)])

    def one(cts, edge):
        row, column, delay, weight = edge
        return cts.at[column].add(weight * lax.dynamic_slice_in_dim(early[row], delay, depth)), None

    empty = jnp.zeros((form.regions, depth, early.shape[-1]), ct_sums.dtype)
    weights = connections.weights[rows, columns]
    weights = weights.reshape(len(weights), 1, -1)
    cts, _ = lax.scan(one, empty, (rows, columns, connections.steps[rows, columns], weights))
    cts = jnp.moveaxis(cts, 0, -1).reshape(depth, -1)
    return cts.at[steps:].add(ct_last[: depth - steps]) if depth > steps else cts
