"""Passes of networks: regions in rows, networks in columns, the state of all regions in VMEM.

A block is 128 networks with all their regions, ``(regions padded to 8 or to a multiple of 16, 128)`` for each value; of
fewer networks the other columns idle.

A run that a gradient will follow keeps the sums that arrive. They are an input like others to the adjoint, whose replay
therefore knows no network; its way back sends the cotangents of the sums through the transposed connections, by the
same code on a clock that runs backwards.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ...errors import Unsupported
from ...pointwise import SplitPullback
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
from .connections import Exchange, Store, Sums, add_exchange
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
    batched, rows = [term.own_weights for term in coupling.terms], Exchange.of(coupling, False).rows
    own = any(batched)
    # Where matrices fill the VMEM, a network that does without coefficients of its own may still fit.
    coefs = 0 if own else 3 * loop.n_coefs
    a_lane = 2 * (coefs + 5 * loop.n_state + 2 * loop.n_inputs + loop.n_observables)
    if (need := _bytes(coupling, batched) + 4 * rows * COLUMNS * a_lane) <= MOST:
        return None
    return (
        f"128 networks of {coupling.regions} regions that go back {coupling.depth} steps"
        f"{', each with its own weights,' * own} need {need:,} bytes of VMEM, and it asks for {MOST:,}: "
        f"{'weights shared by all networks, ' * own}a longer dt, a higher speed of conduction or fewer regions would "
        f"fit; implementation 'scan' runs it"
    )


def _bytes(coupling: Coupling, batched: Sequence[bool]) -> int:
    """VMEM of what is exchanged, forwards or backwards, whichever is more."""
    return max(Exchange.of(coupling, backwards).bytes(batched) for backwards in (False, True))


class Coupled(Uncoupled):
    """What passes of networks add to those of masses, both ways."""

    loop: Loop
    plan: NetworkPlan
    exchange: Exchange

    @property
    def coupling(self) -> Coupling:
        """The loop's, which has one."""
        assert self.loop.coupling is not None
        return self.loop.coupling

    def add_arguments(self, call: Call, operands: Operands) -> None:
        super().add_arguments(call, operands)
        add_exchange(call, self.plan, self.exchange, operands.connections)

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
        return Sums(self.exchange, refs, self.loop.precision, copies=isinstance(self, ForwardPass))

    def each(self, body: Callable) -> None:
        """``body(first, rows)`` for groups of regions; unrolled, so that neighbours overlap, where they are few."""
        rows = min(_ROWS_PER_PASS, self.plan.rows)
        count = self.plan.rows // rows
        if count <= 8 and not self.loop.interpret:
            for i in range(count):
                body(i * rows, pl.ds(i * rows, rows))
            return

        def one(i, carry):
            body(i * rows, pl.ds(pl.multiple_of(i * rows, 8), rows))
            return carry

        lax.fori_loop(jnp.int32(0), jnp.int32(count), one, ())


def _plan(loop: Loop, exchange: Exchange, coefs, inputs, lanes: int, checkpoint_every: int | None) -> NetworkPlan:
    """Lay out a run. The chunks of one with checkpoints depend on the loop only, as in `plan_checkpoints`."""
    coupling, rows = loop.coupling, exchange.rows
    assert coupling is not None
    a_tile, constant = 4 * rows * COLUMNS, 2 * (3 * loop.n_coefs + 5 * loop.n_state + 2)
    if checkpoint_every is None:
        streams = sum(jnp.ndim(u) == 2 for u in inputs)
        a_step = 2 * (streams + loop.n_observables / loop.schedule.every)
    else:
        # Inputs and their cotangents; the sums, their cotangents, what was sent, the end's cotangents; residuals.
        a_step = 4 * loop.n_inputs + 2 * loop.n_observables / loop.schedule.every
        a_step += 4 * coupling.totals + 4 * len(coupling.depths)
        a_step += loop.n_state + loop.n_normals + 4
    held = _bytes(coupling, [False] * len(coupling.terms))
    room = max(BUDGET - held - constant * a_tile, STREAMS)
    most = int(min(LONGEST, room / (a_tile * a_step))) if a_step else LONGEST
    time = chunk_time(loop.schedule, max(1, most), checkpoint_every, unroll=1)
    return NetworkPlan.of_networks(coupling.regions, rows, coefs, inputs, lanes, time)


# Forward ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class NetworkForwardPass(Coupled, ForwardPass):
    """With ``saving``, also keeps the sums that arrive in each step, and the histories before the run."""

    plan: NetworkPlan
    exchange: Exchange

    name = "brainmass_kernels_tpu_network_forward"

    @classmethod
    def of(cls, loop: Loop, operands: Operands, lanes: int, checkpoint_every: int | None) -> NetworkForwardPass:
        assert loop.coupling is not None
        exchange = Exchange.of(loop.coupling, backwards=False)
        plan = _plan(loop, exchange, operands.coefs, operands.inputs, lanes, checkpoint_every)
        return cls(loop, plan, checkpoint_every is not None, exchange)

    def add(self, call: Call, operands: Operands, initial: Carry) -> None:
        super().add(call, operands, initial)
        plan, time, totals = self.plan, self.plan.time, self.coupling.totals
        if self.saving:
            call.add_results("arrived", totals, (time.positions, *plan.wide), call.moving(time.size))
        else:
            call.add_scratch("arrived", totals, (1, *plan.tile))
        outside = pl.BlockSpec(memory_space=pltpu.HBM)
        for k in self.exchange.delayed:
            store = self.exchange.stores[k]
            call.add_operands("history", [_stored(store, plan, initial.history[k])], outside)
            call.add_results("last", 1, (plan.blocks, store.size, COLUMNS), outside)
        if self.exchange.delayed:
            call.add_scratch("semaphore", 1, pltpu.SemaphoreType.DMA)

    def results(self, out, initial: Carry) -> Forward:
        forward, plan, last = super().results(out, initial), self.plan, [*initial.history]
        for k, stored in zip(self.exchange.delayed, out["last"], strict=True):
            last[k] = _unstored(self.exchange.stores[k], plan, stored, plan.time.steps)
        final, saved = Carry(forward.final.state, tuple(last)), None
        if self.saving:
            saved = *forward.saved, *(plan.unlay(x) for x in out["arrived"]), *initial.history
        return Forward(forward.records, final, saved)

    def kernel(self, refs, chunk):
        time, block = self.plan.time, pl.program_id(0)
        start, first, last = time.bounds(chunk)
        sums = self.sums(refs)

        @pl.when(chunk == 0)
        def _():
            write(refs["state"], read(refs["initial"]))
            for k, history in zip(self.exchange.delayed, refs["history"], strict=True):
                _copy(refs, history.at[block], refs["store"][k])

        if self.saving:
            write(refs["saved"], read(refs["state"]), 0)

        def body(j, carry):
            self.step(refs, sums, start, j)
            if refs["records"]:
                pl.when(rem(j + 1, time.stride) == 0)(lambda: self.record(refs, start, div(j, time.stride)))
            return carry

        lax.fori_loop(first, last, body, ())
        if self.exchange.delayed:

            @pl.when(chunk == time.chunks - 1)
            def _():
                for k, history in zip(self.exchange.delayed, refs["last"], strict=True):
                    _copy(refs, refs["store"][k], history.at[block])

    def step(self, refs, sums: Sums, start, j) -> None:
        """All regions send, the sums arrive, all regions advance."""
        loop, n, arrived, place = self.loop, start + j, refs["arrived"], j if self.saving else 0
        sums.begin(n)

        def send(region, rows):
            coefs, _, _ = arguments(loop, self.plan, refs, start, rows)
            sent = apply(self.coupling.send, *coefs, *read(refs["state"], rows))
            sums.send(n, region, fill(sent, (rows.size, COLUMNS)))

        self.each(send)
        sums.arrive(n, [total.at[place] for total in arrived])

        def advance(region, rows):
            coefs, inputs, normals = arguments(loop, self.plan, refs, start, rows)
            state = read(refs["state"], rows)
            stepped = apply(loop.advance, *coefs, *state, *inputs(j), *read(arrived, place, rows), *normals(j)(0))
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


def _stored(store: Store, plan: NetworkPlan, history):
    """A history, ``(depth, L)``, as the store has it before the first step, ``(blocks, size, 128)``."""
    x = plan.lay(history).reshape(store.depth, plan.blocks, store.rows, COLUMNS)
    x = jnp.pad(jnp.moveaxis(x, 0, 2), [(0, 0), (0, 0), (0, store.stride - store.depth), (0, 0)])
    return jnp.pad(x.reshape(plan.blocks, store.rows * store.stride, COLUMNS), [(0, 0), (0, store.slide), (0, 0)])


def _unstored(store: Store, plan: NetworkPlan, stored, steps: int):
    """The history after so many steps, of what a store has then."""
    begin = store.last(steps)
    x = stored[:, begin : begin + store.rows * store.stride].reshape(plan.blocks, store.rows, store.stride, COLUMNS)
    x = jnp.moveaxis(x[:, :, : store.depth], 2, 0)
    return plan.unlay(x.reshape(store.depth, *plan.wide))


# Adjoint ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class NetworkReversePass(Coupled, ReversePass):
    """The adjoint of a forward run that kept the sums.

    Cotangents of weights and of the histories are made from those of the sums by plain jnp: where nobody asks for them,
    the compiler leaves them out.
    """

    plan: NetworkPlan
    exchange: Exchange
    send: SplitPullback

    name = "brainmass_kernels_tpu_network_adjoint"

    @classmethod
    def of(
        cls, loop: Loop, pullbacks: Pullbacks, wanted: Wanted, coefs, inputs, lanes: int, checkpoint_every: int
    ) -> NetworkReversePass:
        assert loop.coupling is not None
        exchange = Exchange.of(loop.coupling, backwards=True)
        plan = _plan(loop, exchange, coefs, inputs, lanes, checkpoint_every)
        # The sums, last of the inputs, are read again like the others.
        advance, observe, send = SplitPullbacks.of(loop, pullbacks)
        assert send is not None
        return cls(loop, pullbacks, wanted, plan, advance, observe, exchange, send)

    @property
    def delayed(self) -> list[int]:
        """Which of the quantities have a history."""
        return [number for number, depth in enumerate(self.coupling.depths) if depth]

    @property
    def endings(self) -> list[int]:
        """For each history the first chunk with a step that it has after the run."""
        time = self.plan.time
        return [time.chunk_of(max(0, time.steps - self.coupling.depths[k])) for k in self.delayed]

    def add(self, call: Call, operands: Operands, saved, cotangents: Cotangents) -> None:
        super().add(call, operands, saved, cotangents)
        plan, time, (arrived, _) = self.plan, self.plan.time, self.coupled(saved)
        totals, sources = self.coupling.totals, len(self.coupling.depths)
        call.add_operands("arrived", [plan.lay(x) for x in arrived], call.moving(time.size))
        for k, ending in zip(self.delayed, self.endings, strict=True):
            last = time.spread(plan.lay(_at_steps(cotangents.final.history[k], time.steps), "constant"))
            block = call.moving(time.size, lambda c, ending=ending: jnp.maximum(c - ending, 0))
            call.add_operands("ct_last", [last[ending * time.size :]], block)
        for name, count in (("ct_sums", totals), ("sent", sources if any(self.wanted.weights) else 0)):
            call.add_results(name, count, (time.positions, *plan.wide), call.moving(time.size))
        call.add_scratch("ct_sent", sources, plan.tile)
        call.add_scratch("send_residuals", self.send.n_kept, (time.size, *plan.tile))

    def coupled(self, saved) -> tuple[tuple, tuple]:
        """The sums that a forward run kept, and its first histories."""
        kept = saved[self.loop.n_state :]
        return kept[: self.coupling.totals], kept[self.coupling.totals :]

    def results(self, out, operands: Operands, saved, cotangents: Cotangents) -> Adjoint:
        adjoint, (_, histories) = super().results(out, operands, saved, cotangents), self.coupled(saved)
        coupling, plan = self.coupling, self.plan

        def by_region(x):
            return _by_region(coupling.regions, x)

        ct_sums = [by_region(plan.unlay(plan.time.gather(x))) for x in out["ct_sums"]]
        sent = [plan.unlay(plan.time.gather(x)) for x in out["sent"]]
        sent = [by_region(jnp.concatenate([history, x])) for history, x in zip(histories, sent)]
        terms = [*zip(coupling.terms, operands.connections, strict=True)]
        ct_weights = (
            _of_weights(connections, coupling.depths[term.source], sent[term.source], ct_sums[term.total])
            if wanted else None
            for (term, connections), wanted in zip(terms, self.wanted.weights, strict=True)
        )  # fmt: skip
        ct_histories = (
            _of_history(ct_last, [(one, ct_sums[term.total]) for term, one in terms if term.source == number])
            for number, ct_last in enumerate(cotangents.final.history)
        )
        initial = Carry(adjoint.initial.state, tuple(ct_histories))
        return adjoint._replace(initial=initial, weights=tuple(ct_weights))

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
                keep("sent", self.coupling.send, j, *state)
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
        totals, a, b = self.coupling.totals, self.n_coefs, self.n_coefs + self.loop.n_state
        since_end = jnp.int32(self.plan.time.steps - 1) - (start + j)
        sums.begin(since_end)

        def pull(region, rows):
            coefs, inputs, _ = arguments(self.loop, self.plan, refs, start, rows)
            drive = *inputs(j), *read(refs["arrived"], j, rows), *read(refs["residuals"], j, rows)
            out = apply(self.advance.back, *coefs, *drive, *read(refs["ct_state"], rows))
            write(refs["ct_coefs"], added(read(refs["ct_coefs"], rows), out[:a]), rows)
            write(refs["ct_state"], fill(out[a:b], (rows.size, COLUMNS)), rows)
            ct_inputs = fill(out[b:], (rows.size, COLUMNS))
            ct_sums = ct_inputs[-totals:]
            self.write_inputs(refs, j, rows, ct_inputs[:-totals])
            write(refs["ct_sums"], ct_sums, j, rows)
            sums.send(since_end, region, ct_sums)

        self.each(pull)
        sums.arrive(since_end, refs["ct_sent"])
        for k, ct_last, ending in zip(self.delayed, refs["ct_last"], self.endings, strict=True):

            @pl.when(chunk >= ending)
            def _(ct_sent=refs["ct_sent"][k], ct_last=ct_last):
                ct_sent[...] += ct_last[j]

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


def _by_region(regions: int, x):
    """``(T, L)`` as ``(N, T, networks)``."""
    return jnp.moveaxis(x.reshape(len(x), -1, regions), -1, 0)


def _of_weights(connections: Connections, depth: int, sent, ct_sums):
    """For each weight of a term ``sum_t ct_sum_i(t) sent_j(t - d)``, ``(N, N, networks)``."""
    if not depth:
        return jnp.einsum("itb,jtb->ijb", ct_sums, sent, precision=lax.Precision.HIGHEST)
    rows, columns = connections.edges
    regions, steps = ct_sums.shape[:2]

    def one(edge):
        row, column, delay = edge
        arrived = lax.dynamic_slice_in_dim(sent[column], depth - delay, steps)
        return jnp.sum(ct_sums[row] * arrived, axis=0)

    cts = lax.map(one, (rows, columns, connections.steps[rows, columns]))
    empty = jnp.zeros((regions, regions, cts.shape[1]), cts.dtype)
    return empty.at[rows, columns].set(cts, unique_indices=True, indices_are_sorted=True)


def _of_history(ct_last, terms: Sequence[tuple[Connections, jax.Array]]):
    """For what was sent before the run: where it arrived, and what of it the last history still has; ``(depth, L)``.

    Parameters
    ----------
    ct_last : of the last history of a quantity
    terms : the connections that carry it, and the cotangents of their sum
    """
    depth, (regions, steps, networks) = len(ct_last), terms[0][1].shape
    if not depth:
        return jnp.zeros_like(ct_last)
    cts = jnp.zeros((regions, depth, networks), ct_last.dtype)
    for connections, ct_sums in terms:
        cts = _with_history_of_term(cts, connections, ct_sums)
    cts = jnp.moveaxis(cts, 0, -1).reshape(depth, -1)
    return cts.at[steps:].add(ct_last[: depth - steps]) if depth > steps else cts


def _with_history_of_term(cts, connections: Connections, ct_sums):
    """Add where what was sent before the run arrived through the connections of a term to ``(N, depth, networks)``."""
    rows, columns = connections.edges
    depth, steps = cts.shape[1], ct_sums.shape[1]
    # So that what was sent at place h of the history arrives at place h + delay.
    early = jnp.pad(ct_sums[:, :depth], [(0, 0), (depth, max(0, depth - steps)), (0, 0)])

    def one(cts, edge):
        row, column, delay, weight = edge
        return cts.at[column].add(weight * lax.dynamic_slice_in_dim(early[row], delay, depth)), None

    weights = connections.weights[rows, columns]
    weights = weights.reshape(len(weights), 1, -1)
    return lax.scan(one, cts, (rows, columns, connections.steps[rows, columns], weights))[0]
