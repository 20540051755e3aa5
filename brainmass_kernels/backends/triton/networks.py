"""What is sent and what arrives, where a program is a network or some: lines that the kernels of `source` have besides.

A thread is one region. What the regions sent lies in device memory in a ring of times as long as the longest delay,
which all threads write and, after a barrier, read. A forward run that a gradient will follow keeps the sums, inputs
like others to the adjoint, where cotangents of the sums go through the transposed connections over rings of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ...codegen.source import SourceBuilder
from ..base import Connections, of_depth, of_own_depths
from .masses import Uncoupled
from .source import AdjointKernel, ForwardKernel, Kernel

# Connections of a region that are read at once.
AT_ONCE = 8
# Partial sums of a region, each of every so many connections.
PARTIAL = 4
# Times in the ring beyond the longest delay: this one, and one that no slower thread still reads.
SPARE = 2


class Way(NamedTuple):
    """What a term's connections carry: from one of the numbers that a lane exchanges to one of those that it gets."""

    sent: int
    got: int


class _Coupled(Uncoupled):
    """Lines of both directions.

    Arguments: of each term weights, and, with delays, where connections read. Results: a ring for each number that a
    lane exchanges.
    """

    ways: list[Way]

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

    def take_connections(self, to_targets: bool) -> None:
        """Of a row of connections all that are read at once: its sources, or its targets."""
        for k, connections in enumerate(self.connections):
            weights = connections.weights
            weights = jnp.moveaxis(weights, -1, 0) if weights.ndim == 3 else weights
            self.kernel.take_one(f"weights{k}", jnp.swapaxes(weights, -1, -2) if to_targets else weights)
            if self.depth:
                steps = connections.steps
                steps = jnp.moveaxis(steps, -1, 0) if connections.own_delays else steps
                steps = jnp.swapaxes(steps, -1, -2) if to_targets else steps
                rows = 2 * (self.depth + SPARE) * jnp.arange(self.regions, dtype=jnp.int32)[:, None]
                rows = jnp.broadcast_to(rows, steps.shape)
                self.kernel.take_one(f"reads{k}", self.together * (rows - steps.astype(jnp.int32)))

    def give(self) -> None:
        networks = self.kernel.layout.blocks * self.together
        times = (self.depth + SPARE) * (2 if self.depth else 1)
        for k in range(self.rings):
            self.kernel.give_one(f"ring{k}", (networks * self.regions * times,))

    # Lines -----------------------------------------------------------------------------------------------------------

    def place(self) -> None:
        line, regions = self.kernel.line, self.regions
        if self.together == 1:
            line("region, network = tl.arange(0, BLOCK), block")
            line(f"inside = region < {regions}")
        else:
            line(f"region = tl.arange(0, BLOCK) // {self.together}")
            line(f"mate = tl.arange(0, BLOCK) % {self.together}")
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
        whole = regions // AT_ONCE * AT_ONCE
        _sum_of_connections(kernel.functions, function, regions, bool(self.depth), many)
        # Were the limit of its loop in the text, the compiler would write the loop out.
        self.function, self.times, self.whole = function, kernel.number(self.depth + SPARE), kernel.number(whole)
        for k, connections in enumerate(self.connections):
            if connections.weights.ndim == 3:
                kernel.line(f"weights{k} += block.to(tl.int64) * {regions**2}")
            if self.depth and connections.own_delays:
                kernel.line(f"reads{k} += block.to(tl.int64) * {regions**2}")
        each = f"{self.times} * 2" if self.depth else SPARE
        kernel.line(f"mine = region * ({each})" if self.depth else "mine = region")
        if many > 1:
            kernel.line(f"mine = mine * {many} + mate")
        for k in range(self.rings):
            kernel.line(f"ring{k} += block.to(tl.int64) * ({each} * {regions * many})", f"mine{k} = ring{k} + mine")
        kernel.line("turn = 0")

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
        begun = set()
        for k, (sent, got) in enumerate(self.ways):
            reads = f"reads{k}, " if self.depth else ""
            here = f"ring{sent} + now" if self.together == 1 else f"ring{sent} + now + mate"
            to = "+=" if got in begun else "="
            line(f"{totals[got]} {to} {self.function}({here}, weights{k}, {reads}column, {self.whole}, zero)")
            begun.add(got)
        line(f"turn = tl.where(turn + 1 < {self.times}, turn + 1, 0)")

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


def _sum_of_connections(lines: SourceBuilder, name: str, regions: int, delayed: bool, together: int) -> None:
    """A function that sums over all connections of a lane, in a fixed order, beginning with source or target 0."""
    whole, fused = regions // AT_ONCE * AT_ONCE, lines.optable.fused

    def some(first: str, count: int) -> None:
        places = range(0, count * regions, regions)
        lines.line(f"place = column + {first} * {regions}", "weight = weights + place")
        lines.line(*(f"w{k} = tl.load(weight + {place})" for k, place in enumerate(places)))
        if delayed:
            lines.line("read = reads + place", *(f"r{k} = tl.load(read + {place})" for k, place in enumerate(places)))
            lines.line(*(f"s{k} = tl.load(here + r{k})" for k in range(count)))
        else:
            lines.line(f"read = here + {first} * {together}")
            lines.line(*(f"s{k} = tl.load(read + {k * together})" for k in range(count)))
        for k in range(count):
            total = f"sum{k % PARTIAL}"
            lines.line(f"{total} = {fused.format(f'w{k}', f's{k}', total)}")

    arguments = ["here", "weights", *(["reads"] if delayed else []), "column", "whole", "zero"]
    lines.line("@device")
    with lines.block(f"def {name}({', '.join(arguments)}):"):
        lines.line(*(f"sum{k} = zero" for k in range(PARTIAL)))
        if whole:
            with lines.block(f"for j in range(0, whole, {AT_ONCE}):"):
                some("j", AT_ONCE)
        if regions > whole:
            some("whole", regions - whole)
        sums = [f"sum{k}" for k in range(PARTIAL)]
        while len(sums) > 1:
            sums = [f"({a} + {b})" for a, b in zip(sums[::2], sums[1::2])]
        lines.line(f"return {sums[0]}")
    lines.line("", "")
