"""What is sent and what arrives, where a program is a network or some: lines that the kernels of `source` have besides.

A thread is one region. What the regions sent lies in device memory in a ring of times as long as the longest delay,
which all threads write and, after a barrier, read. Each region has a list of the connections that do not weigh 0; of
those with delays of some steps, the sums of as many steps are taken at once. A forward run that a gradient will follow
keeps the sums, inputs like others to the adjoint, where cotangents of the sums go through the transposed connections
over rings of their own.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ... import _jax
from ...codegen.source import SourceBuilder
from ..base import Connections, of_depth, of_own_depths
from .masses import Uncoupled
from .source import AdjointKernel, ForwardKernel, Kernel

# Connections of a region that are read at once.
AT_ONCE = 8
# Partial sums of a region, each of every so many connections.
PARTIAL = 4
# Steps whose sums are taken at once, of connections with no shorter delay; and connections that are then read at once.
FAR, FAR_AT_ONCE = 8, 1
# The same in forward runs of one term, whose longest delay has so many steps.
FAR_FORWARD, LONG = 16, 128
# Times in the ring beyond the longest delay: this one, and one that no slower thread still reads.
SPARE = 2


class Way(NamedTuple):
    """What a term's connections carry: from one of the numbers that a lane exchanges to one of those that it gets."""

    sent: int
    got: int


class Listed(NamedTuple):
    """The connections of each region of one kind, one after the other.

    Attributes
    ----------
    weights : ``(..., K, N)`` of each region (last axis) those of the kind, then zeros
    reads : where each reads what was sent, from the place of a region's row at this time on
    groups : so many times ``at_once`` are those of the region that has the most
    """

    weights: jax.Array
    reads: jax.Array
    groups: jax.Array

    @classmethod
    def of(cls, weights, reads, which, at_once: int) -> Listed:
        """Of matrices from or to a region (row); ``which`` are of the kind, and the others stand for an end."""
        beyond = [(0, 0)] * (which.ndim - 2) + [(0, -which.shape[-2] % at_once), (0, 0)]
        order = jnp.argsort(~which, axis=-2, stable=True)
        most = jnp.max(jnp.sum(which, axis=-2))
        # Where all are of the kind, what is padded comes after the last that counts: the end of a region's own.
        listed = [jnp.take_along_axis(x, order, axis=-2) for x in (weights, reads)]
        return cls(jnp.pad(listed[0], beyond), jnp.pad(listed[1], beyond, mode="edge"), (most + at_once - 1) // at_once)


class _Coupled(Uncoupled):
    """Lines of both directions.

    Arguments: of each term the lists of its connections, and their lengths. Results: a ring for each number that a lane
    exchanges, and the sums of steps ahead.
    """

    ways: list[Way]
    #: Steps whose sums are taken at once.
    ahead: int

    def __init__(self, kernel: Kernel):
        self.kernel, coupling = kernel, kernel.loop.coupling
        assert coupling is not None
        self.coupling, self.connections = coupling, kernel.operands.connections
        self.regions, self.depth, self.send = coupling.regions, coupling.depth, coupling.send
        self.sources = kernel.names("sent", len(coupling.depths))
        self.together, self.lanes, self.steps = kernel.layout.together, kernel.layout.lanes, kernel.loop.schedule.steps
        self.n_arguments = kernel.loop.n_coefs + kernel.loop.n_state

    @property
    def rings(self) -> int:
        """How many numbers a lane exchanges."""
        return 1 + max(way.sent for way in self.ways)

    @property
    def far(self) -> bool:
        """Whether a delay may be so long that the sums of several steps are taken at once."""
        return self.depth >= self.ahead

    def take_connections(self, to_targets: bool) -> None:
        """Of each region the list of its sources, or of its targets."""
        regions, many = self.regions, self.together
        each = 2 * (self.depth + SPARE) if self.depth else 1
        rows = many * each * jnp.arange(regions, dtype=jnp.int32)
        # Where a list has ended, a region reads from its own row, which makes nothing of another region NaN.
        counts, ends = [], {"near": rows, "far": rows - many * self.ahead}
        for k, connections in enumerate(self.connections):
            weights, steps = connections.weights, connections.steps.astype(jnp.int32)
            weights = jnp.moveaxis(weights, -1, 0) if weights.ndim == 3 else weights
            steps = jnp.moveaxis(steps, -1, 0) if connections.own_delays else steps
            shape = jnp.broadcast_shapes(weights.shape, steps.shape if self.depth else (regions, regions))
            weights, steps = jnp.broadcast_to(weights, shape), jnp.broadcast_to(steps if self.depth else 0, shape)
            if to_targets:
                weights, steps = jnp.swapaxes(weights, -1, -2), jnp.swapaxes(steps, -1, -2)
            # Else XLA would sort a connectome that it knows while it compiles.
            weights, reads = lax.optimization_barrier((weights, jnp.broadcast_to(rows[:, None], shape) - many * steps))
            far, counting = steps >= self.ahead, weights != 0
            which = {"far": counting & far, "near": counting & ~far if self.far else counting}
            for kind, at_once in self.kinds.items():
                own, end = which[kind], jnp.broadcast_to(ends[kind], shape)
                listed = Listed.of(jnp.where(own, weights, 0), jnp.where(own, reads, end), own, at_once)
                self.kernel.take_one(f"{kind}_weights{k}", listed.weights)
                self.kernel.take_one(f"{kind}_reads{k}", listed.reads)
                counts.append(listed.groups)
        self.kernel.take_one("counts", jnp.stack(counts).astype(jnp.int32))

    @property
    def kinds(self) -> dict[str, int]:
        """The lists of a term by name, and how many connections of each are read at once."""
        return {"far": FAR_AT_ONCE, "near": AT_ONCE} if self.far else {"near": AT_ONCE}

    def give(self) -> None:
        networks = self.kernel.layout.blocks * self.together
        times = (self.depth + SPARE) * (2 if self.depth else 1)
        for k in range(self.rings):
            self.kernel.give_one(f"ring{k}", (networks * self.regions * times,))
        for got in self.gets if self.far else ():
            self.kernel.give_one(f"ahead{got}", (self.ahead * self.kernel.layout.blocks * self.kernel.layout.width,))

    @property
    def gets(self) -> list[int]:
        """The numbers that a lane gets, in order."""
        return sorted({way.got for way in self.ways})

    # Lines -----------------------------------------------------------------------------------------------------------

    def place(self) -> None:
        line, regions = self.kernel.line, self.regions
        # Else the compiler, which sees places in a row, moves numbers between threads to store several at once.
        known = self.kernel.loop.interpret or _jax.is_amd()
        line(f"spot = {'tl.arange(0, BLOCK)' if known else 'scattered(tl.arange(0, BLOCK))'}")
        if self.together == 1:
            line("region, network = spot, block")
            line(f"inside = region < {regions}")
        else:
            line(f"region, mate = spot // {self.together}, spot % {self.together}")
            line(f"network = block * {self.together} + mate")
            line(f"inside = (region < {regions}) & (network < {self.kernel.number(self.lanes // regions)})")
        line(f"lane = network * {regions} + region")
        # Threads beyond the regions read what the last one reads, which takes no mask.
        line(f"column = tl.minimum(region, {regions - 1})")

    def begin_rings(self, function: str) -> None:
        """Begin with empty rings.

        With delays the times of a region lie together, for the threads that read a region read times near each other,
        and lie there twice, one ring apart, so that no reader has to come round to the beginning. Of networks that
        share a program the numbers of one time lie together.
        """
        kernel, regions, many = self.kernel, self.regions, self.together
        self.function, self.times = function, kernel.number(self.depth + SPARE)
        _sum_of_near(kernel.functions, f"{function}_near", regions)
        if self.far:
            _sums_of_far(kernel.functions, f"{function}_far", regions, many, self.ahead)
        counts = itertools.count()
        for k, connections in enumerate(self.connections):
            for kind, at_once in self.kinds.items():
                kernel.line(f"{kind}_count{k} = tl.load(counts + {next(counts)})")
                if connections.weights.ndim == 3 or (self.depth and connections.own_delays):
                    size = -(-regions // at_once) * at_once * regions
                    kernel.line(*(f"{kind}_{what}{k} += block.to(tl.int64) * {size}" for what in ("weights", "reads")))
        each = f"{self.times} * 2" if self.depth else SPARE
        kernel.line(f"mine = region * ({each})" if self.depth else "mine = region")
        if many > 1:
            kernel.line(f"mine = mine * {many} + mate")
        for k in range(self.rings):
            kernel.line(f"ring{k} += block.to(tl.int64) * ({each} * {regions * many})", f"mine{k} = ring{k} + mine")
        kernel.line("turn = 0")
        if self.far:
            self.width = kernel.number(kernel.layout.blocks * kernel.layout.width)
            kernel.line("phase = 0", "ahead = block.to(tl.int64) * BLOCK + spot")

    def at(self, time: str) -> str:
        """The place of a time among those of a region."""
        return time if self.together == 1 else f"{time} * {self.together}"

    def fill(self, time: str, values: Sequence[str]) -> None:
        """Put what was sent before the first step, from the oldest on, into the rings."""
        for k, value in enumerate(values):
            self.kernel.line(f"tl.store(mine{k} + {self.at(f'({time} + {SPARE})')}, {value}, mask=inside)")

    def exchange(self, values: Sequence[str], totals: Sequence[str]) -> None:
        """Send the values of each lane, and sum what arrives at each."""
        line = self.kernel.line
        line(f"now = {self.at('turn')}" if self.depth else f"now = turn * {self.regions * self.together}")
        for k, value in enumerate(values):
            line(f"tl.store(mine{k} + now, {value}, mask=inside)")
        if self.depth:
            line(f"now += {self.at(self.times)}")
            for k, value in enumerate(values):
                line(f"tl.store(mine{k} + now, {value}, mask=inside)")
        line("tl.debug_barrier()")
        here = "now" if self.together == 1 else "now + mate"
        if self.far:
            self.exchange_far(here, totals)
        begun = set(self.gets) if self.far else set()
        for k, (sent, got) in enumerate(self.ways):
            lists = f"near_weights{k}, near_reads{k}, column, near_count{k}"
            to = "+=" if got in begun else "="
            line(f"{totals[got]} {to} {self.function}_near(ring{sent} + {here}, {lists}, zero)")
            begun.add(got)
        line(f"turn = tl.where(turn + 1 < {self.times}, turn + 1, 0)")

    def exchange_far(self, here: str, totals: Sequence[str]) -> None:
        """Every `ahead` steps, the sums of as many over the far connections; then in each step its own."""
        kernel, line = self.kernel, self.kernel.line
        with kernel.block("if phase == 0:"):
            begun = set()
            for k, (sent, got) in enumerate(self.ways):
                sums = kernel.names(f"far{got}_", self.ahead)
                terms = kernel.names("term", self.ahead) if got in begun else sums
                lists = f"far_weights{k}, far_reads{k}, column, far_count{k}"
                kernel.assign(terms, f"{self.function}_far(ring{sent} + {here}, {lists}, zero)")
                if got in begun:
                    line(*(f"{a} += {b}" for a, b in zip(sums, terms)))
                begun.add(got)
            for got in self.gets:
                for step, name in enumerate(kernel.names(f"far{got}_", self.ahead)):
                    line(f"tl.store(ahead{got} + ahead + {step} * {self.width}, {name})")
            # Another thread may read what one wrote, for the compiler lays each access out for itself.
            line("tl.debug_barrier()")
        for got in self.gets:
            line(f"{totals[got]} = tl.load(ahead{got} + ahead + phase * {self.width})")
        line(f"phase = tl.where(phase + 1 < {self.ahead}, phase + 1, 0)")

    def send_function(self) -> None:
        kernel, n = self.kernel, self.n_arguments
        kernel.function("send", self.send, [*kernel.coefs, *kernel.state], kernel.uniform_step[:n])

    def call_send(self, state: Sequence[str]) -> None:
        self.kernel.assign(self.sources, f"send({', '.join([*self.kernel.coefs, *state, 'zero'])})")


class ForwardCoupling(_Coupled):
    """What is sent and what arrives in a forward run.

    Arguments besides: with delays the history. Results besides: with delays the last history, and the sums of all
    steps where a gradient will follow.
    """

    kernel: ForwardKernel

    def __init__(self, kernel: ForwardKernel):
        super().__init__(kernel)
        self.ways = [Way(term.source, term.total) for term in self.coupling.terms]
        self.ahead = FAR_FORWARD if self.depth >= LONG and len(self.ways) == 1 else FAR

    def take(self) -> None:
        self.take_connections(to_targets=True)
        if self.depth:
            self.histories = self.kernel.take("history", of_depth(self.kernel.carry.history, self.depth))

    def give(self) -> None:
        super().give()
        if self.depth:
            self.pasts = self.kernel.give("past", [(self.depth, self.lanes)] * self.rings)
        if self.kernel.saving:
            self.totals = self.kernel.give("totals", [(self.steps, self.lanes)] * self.coupling.totals)

    def saved(self, results: Mapping[str, Any]) -> tuple[tuple, Any]:
        return tuple(results["totals"]), self.kernel.carry.history

    def history(self, results: Mapping[str, Any]) -> Any:
        return of_own_depths(results["past"], self.coupling.depths) if self.depth else self.kernel.carry.history

    def begin(self) -> None:
        self.send_function()
        self.begin_rings("arriving")
        if self.depth:
            with self.kernel.repeat(self.depth) as i:
                self.kernel.load(self.sources, self.histories, i)
                self.fill(i, self.sources)

    def arrive(self, state: Sequence[str]) -> None:
        totals = self.kernel.names("u", self.kernel.loop.n_inputs)[-self.coupling.totals :]
        self.call_send(state)
        self.exchange(self.sources, totals)
        if self.kernel.saving:
            self.kernel.store(self.totals, totals, "n")

    def end(self) -> None:
        if not self.depth:
            return
        # Threads may read what others wrote.
        self.kernel.line("tl.debug_barrier()")
        with self.kernel.repeat(self.depth) as i:
            time = self.at(f"(turn + {i} + {SPARE})")
            for k, name in enumerate(self.sources):
                self.kernel.line(f"{name} = tl.load(mine{k} + {time}, mask=inside, other=0)")
            self.kernel.store(self.pasts, self.sources, i)


class ReverseCoupling(_Coupled):
    """What is sent and what arrives, backwards.

    Arguments besides: with delays the cotangent of the last history. Results besides: with delays that of the first,
    and all that was sent where the cotangents of weights are wanted.
    """

    kernel: AdjointKernel

    def __init__(self, kernel: AdjointKernel):
        super().__init__(kernel)
        self.ways = [Way(term.total, term.source) for term in self.coupling.terms]
        self.ahead = FAR
        self.ct_sources = kernel.names("ct_sent", len(self.coupling.depths))
        self.zeros_before = ["zero"] * self.rings

    def take(self) -> None:
        self.take_connections(to_targets=False)
        if self.depth:
            ct_last = of_depth(self.kernel.cotangents.final.history, self.depth)
            self.ct_pasts = self.kernel.take("ct_past", ct_last)

    def give(self) -> None:
        super().give()
        sources = len(self.coupling.depths)
        if self.depth:
            self.ct_histories = self.kernel.give("ct_history", [(self.depth, self.lanes)] * sources)
        if any(self.kernel.wanted.weights):
            self.out_sent = self.kernel.give("out_sent", [(self.steps, self.lanes)] * sources)

    def history(self, results: Mapping[str, Any]) -> Any:
        if not self.depth:
            return self.kernel.cotangents.final.history
        return of_own_depths(results["ct_history"], self.coupling.depths)

    def weights(self, results: Mapping[str, Any]) -> Any:
        """The cotangents of the weights, each ``(N, N, networks)``."""
        sums = results["out_input"][-self.coupling.totals :] if any(self.kernel.wanted.weights) else ()
        return tuple(
            self.of_term(results["out_sent"][term.source], term.source, sums[term.total], connections) if w else None
            for term, connections, w in zip(self.coupling.terms, self.connections, self.kernel.wanted.weights)
        )

    def of_term(self, sent, source: int, ct_sums, connections: Connections) -> jax.Array:
        """The cotangent of the weights of one term, ``(N, N, networks)``, one source after the other."""
        history, steps = self.kernel.first_history[source], self.steps
        depth = len(history)
        ct = jnp.transpose(ct_sums.reshape(steps, -1, self.regions), (2, 1, 0))
        all_sent = jnp.concatenate([history, sent]).reshape(depth + steps, -1, self.regions).T

        def of_source(each):
            sent, delays = each
            if connections.own_delays:
                one = jax.vmap(lambda x, delay: lax.dynamic_slice_in_dim(x, depth - delay, steps))
                arrived = jax.vmap(lambda by_network: one(sent, by_network))(delays)
            else:
                arrived = jax.vmap(lambda delay: lax.dynamic_slice_in_dim(sent, depth - delay, steps, 1))(delays)
            return jnp.sum(ct * arrived, axis=-1)

        return jnp.swapaxes(lax.map(of_source, (all_sent, jnp.swapaxes(connections.steps, 0, 1))), 0, 1)

    def begin(self) -> None:
        kernel, n = self.kernel, self.n_arguments
        assert kernel.pullbacks.send is not None
        arguments = [*kernel.coefs, *kernel.state, *self.ct_sources]
        uniform = [*kernel.uniform_step[:n], *[False] * len(self.ct_sources)]
        self.zeros = kernel.function("send_back", kernel.pullbacks.send, arguments, uniform)
        if any(kernel.wanted.weights):
            self.send_function()
        self.begin_rings("returning")
        if self.depth:
            with kernel.repeat(self.depth) as i:
                self.fill(i, self.zeros_before)

    def reverse(self, state: Sequence[str], cotangents: Sequence[str], step: str) -> None:
        kernel = self.kernel
        self.exchange(cotangents[-self.rings :], self.ct_sources)
        if self.depth:
            self.add_past(f"{step} - {kernel.number(self.steps - self.depth)}")
        kernel.add_call("send_back", [*kernel.coefs, *state, *self.ct_sources], self.zeros)
        if any(kernel.wanted.weights):
            self.call_send(state)
            kernel.store(self.out_sent, self.sources, step)

    def add_past(self, time: str) -> None:
        """Add the cotangent of the last history at one of its times, if it is one."""
        where = self.kernel.place(time)
        for name, past in zip(self.ct_sources, self.ct_pasts):
            self.kernel.line(f"{name} += tl.load({past} + {where}, mask=inside & ({where} >= 0), other=0)")

    def end(self) -> None:
        """What was sent before the first step, the newest first."""
        if not self.depth:
            return
        steps = self.kernel.number(self.steps)
        with self.kernel.repeat(self.depth, backwards=True) as i:
            self.exchange(self.zeros_before, self.ct_sources)
            self.add_past(f"{i} - {steps}")
            self.kernel.store(self.ct_histories, self.ct_sources, i)


def _sum_of_near(lines: SourceBuilder, name: str, regions: int) -> None:
    """A function that sums over a list of connections of each lane, in the order of the list."""
    lines.line("@device")
    with lines.block(f"def {name}(here, weights, reads, column, count, zero):"):
        lines.line(*(f"sum{k} = zero" for k in range(PARTIAL)))
        with lines.block("for j in range(count):"):
            _read_list(lines, regions, AT_ONCE)
            lines.line(*(f"s{k} = tl.load(here + r{k})" for k in range(AT_ONCE)))
            for k in range(AT_ONCE):
                total = f"sum{k % PARTIAL}"
                lines.line(f"{total} = {lines.optable.fused.format(f'w{k}', f's{k}', total)}")
        lines.line(f"return {_sum([f'sum{k}' for k in range(PARTIAL)])}")
    lines.line("", "")


def _sums_of_far(lines: SourceBuilder, name: str, regions: int, together: int, ahead: int) -> None:
    """As `_sum_of_near`, the sums of this step and the next ones: what they read was sent before this step."""
    lines.line("@device")
    with lines.block(f"def {name}(here, weights, reads, column, count, zero):"):
        lines.line(*(f"sum{k}_{step} = zero" for step in range(ahead) for k in range(FAR_AT_ONCE)))
        with lines.block("for j in range(count):"):
            _read_list(lines, regions, FAR_AT_ONCE)
            places = [(k, step) for k in range(FAR_AT_ONCE) for step in range(ahead)]
            lines.line(*(f"from{k} = here + r{k}" for k in range(FAR_AT_ONCE)))
            lines.line(*(f"s{k}_{step} = tl.load(from{k} + {step * together})" for k, step in places))
            for k, step in places:
                total = f"sum{k}_{step}"
                lines.line(f"{total} = {lines.optable.fused.format(f'w{k}', f's{k}_{step}', total)}")
        sums = [_sum([f"sum{k}_{step}" for k in range(FAR_AT_ONCE)]) for step in range(ahead)]
        lines.line(f"return {', '.join(sums)}")
    lines.line("", "")


def _read_list(lines: SourceBuilder, regions: int, count: int) -> None:
    """Weights and places of the next connections of each lane."""
    lines.line(f"place = column + j * {count * regions}", "weight = weights + place", "read = reads + place")
    lines.line(*(f"w{k} = tl.load(weight + {k * regions})" for k in range(count)))
    lines.line(*(f"r{k} = tl.load(read + {k * regions})" for k in range(count)))


def _sum(names: Sequence[str]) -> str:
    """Of a power of two of names, in pairs."""
    while len(names) > 1:
        names = [f"({a} + {b})" for a, b in zip(names[::2], names[1::2])]
    return names[0]
