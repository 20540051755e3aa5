"""What is sent and what arrives, where a program is a network or some: lines that the kernels of `source` have besides.

A thread is one region. What the regions sent lies in device memory in a ring of times as long as the longest delay,
which all threads write and, after a barrier, read. A forward run that a gradient will follow keeps the sums, an input
like others to the adjoint, where cotangents of the sums go through the transposed connections over a ring of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ...codegen.source import SourceBuilder
from .masses import Uncoupled
from .source import AdjointKernel, ForwardKernel, Kernel

# Connections of a region that are read at once.
AT_ONCE = 8
# Partial sums of a region, each of every so many connections.
PARTIAL = 4
# Times in the ring beyond the longest delay: this one, and one that no slower thread still reads.
SPARE = 2


class _Coupled(Uncoupled):
    """Lines of both directions.

    Arguments: weights, and, with delays, where connections read. Results: the ring.
    """

    def __init__(self, kernel: Kernel):
        self.kernel, coupling, connections = kernel, kernel.loop.coupling, kernel.operands.connections
        assert coupling is not None
        assert connections is not None
        self.regions, self.depth, self.send = coupling.regions, coupling.depth, coupling.send
        self.connections, self.batched = connections, connections.weights.ndim == 3
        self.together, self.lanes, self.steps = kernel.layout.together, kernel.layout.lanes, kernel.loop.schedule.steps
        self.n_arguments = kernel.loop.n_coefs + kernel.loop.n_state

    def take_connections(self, to_targets: bool) -> None:
        """Of a row of connections all that are read at once: its sources, or its targets."""
        weights = self.connections.weights
        weights = jnp.moveaxis(weights, -1, 0) if self.batched else weights
        self.kernel.take_one("weights", jnp.swapaxes(weights, -1, -2) if to_targets else weights)
        if self.depth:
            steps = self.connections.steps.T if to_targets else self.connections.steps
            rows = 2 * (self.depth + SPARE) * jnp.arange(self.regions, dtype=jnp.int32)[:, None]
            self.kernel.take_one("reads", self.together * (rows - steps.astype(jnp.int32)))

    def give(self) -> None:
        networks = self.kernel.layout.blocks * self.together
        times = (self.depth + SPARE) * (2 if self.depth else 1)
        self.kernel.give_one("ring", (networks * self.regions * times,))

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

    def begin_ring(self, function: str) -> None:
        """Begin with an empty ring.

        With delays the times of a region lie together, for the threads that read a region read times near each other,
        and lie there twice, one ring apart, so that no reader has to come round to the beginning. Of networks that
        share a program the numbers of one time lie together.
        """
        kernel, regions, many = self.kernel, self.regions, self.together
        whole = regions // AT_ONCE * AT_ONCE
        _sum_of_connections(kernel.functions, function, regions, bool(self.depth), many)
        # Were the limit of its loop in the text, the compiler would write the loop out.
        self.function, self.times, self.whole = function, kernel.number(self.depth + SPARE), kernel.number(whole)
        if self.batched:
            kernel.line(f"weights += block.to(tl.int64) * {regions**2}")
        each = f"{self.times} * 2" if self.depth else SPARE
        kernel.line(f"ring += block.to(tl.int64) * ({each} * {regions * many})")
        kernel.line(f"mine = region * ({each})" if self.depth else "mine = region")
        if many > 1:
            kernel.line(f"mine = mine * {many} + mate")
        kernel.line("mine = ring + mine", "turn = 0")

    def at(self, time: str) -> str:
        """The place of a time among those of a region."""
        return time if self.together == 1 else f"{time} * {self.together}"

    def fill(self, time: str, value: str) -> None:
        """Put what was sent before the first step, from the oldest on, into the ring."""
        self.kernel.line(f"tl.store(mine + {self.at(f'({time} + {SPARE})')}, {value}, mask=inside)")

    def exchange(self, value: str, total: str) -> None:
        """Send a value of each lane, and sum what arrives at each."""
        line = self.kernel.line
        line(f"now = {self.at('turn')}" if self.depth else f"now = turn * {self.regions * self.together}")
        line(f"tl.store(mine + now, {value}, mask=inside)")
        if self.depth:
            line(f"now += {self.at(self.times)}")
            line(f"tl.store(mine + now, {value}, mask=inside)")
        line("tl.debug_barrier()")
        reads = "reads, " if self.depth else ""
        here = "ring + now" if self.together == 1 else "ring + now + mate"
        line(f"{total} = {self.function}({here}, weights, {reads}column, {self.whole}, zero)")
        line(f"turn = tl.where(turn + 1 < {self.times}, turn + 1, 0)")

    def send_function(self) -> None:
        kernel, n = self.kernel, self.n_arguments
        kernel.function("send", self.send, [*kernel.coefs, *kernel.state], kernel.uniform_step[:n])

    def call_send(self, state: Sequence[str]) -> None:
        self.kernel.line(f"sent = send({', '.join([*self.kernel.coefs, *state, 'zero'])})")


class ForwardCoupling(_Coupled):
    """What is sent and what arrives in a forward run.

    Arguments besides: with delays the history. Results besides: with delays the last history, and the sums of all
    steps where a gradient will follow.
    """

    kernel: ForwardKernel

    def take(self) -> None:
        self.take_connections(to_targets=True)
        if self.depth:
            self.kernel.take_one("history", self.kernel.carry.history)

    def give(self) -> None:
        super().give()
        if self.depth:
            self.kernel.give_one("past", (self.depth, self.lanes))
        if self.kernel.saving:
            self.kernel.give_one("totals", (self.steps, self.lanes))

    def saved(self, results: Mapping[str, Any]) -> tuple[tuple, Any]:
        return (results["totals"],), self.kernel.carry.history

    def history(self, results: Mapping[str, Any]) -> Any:
        return results["past"] if self.depth else self.kernel.carry.history

    def begin(self) -> None:
        self.send_function()
        self.begin_ring("arriving")
        if self.depth:
            with self.kernel.repeat(self.depth) as i:
                self.kernel.load(["sent"], ["history"], i)
                self.fill(i, "sent")

    def arrive(self, state: Sequence[str]) -> None:
        total = self.kernel.names("u", self.kernel.loop.n_inputs)[-1]
        self.call_send(state)
        self.exchange("sent", total)
        if self.kernel.saving:
            self.kernel.store(["totals"], [total], "n")

    def end(self) -> None:
        if not self.depth:
            return
        # Threads may read what others wrote.
        self.kernel.line("tl.debug_barrier()")
        with self.kernel.repeat(self.depth) as i:
            time = self.at(f"(turn + {i} + {SPARE})")
            self.kernel.line(f"sent = tl.load(mine + {time}, mask=inside, other=0)")
            self.kernel.store(["past"], ["sent"], i)


class ReverseCoupling(_Coupled):
    """What is sent and what arrives, backwards.

    Arguments besides: with delays the cotangent of the last history. Results besides: with delays that of the first,
    and all that was sent where the cotangents of weights are wanted.
    """

    kernel: AdjointKernel

    def take(self) -> None:
        self.take_connections(to_targets=False)
        if self.depth:
            self.kernel.take_one("ct_past", self.kernel.cotangents.final.history)

    def give(self) -> None:
        super().give()
        if self.depth:
            self.kernel.give_one("ct_history", (self.depth, self.lanes))
        if self.kernel.wanted.weights:
            self.kernel.give_one("out_sent", (self.steps, self.lanes))

    def history(self, results: Mapping[str, Any]) -> Any:
        return results["ct_history"] if self.depth else self.kernel.cotangents.final.history

    def weights(self, results: Mapping[str, Any]) -> jax.Array | None:
        """The cotangent of the weights, ``(N, N, networks)``, one source after the other."""
        if not self.kernel.wanted.weights:
            return None
        steps, depth = self.steps, self.depth
        ct = jnp.transpose(results["out_input"][-1].reshape(steps, -1, self.regions), (2, 1, 0))
        all_sent = jnp.concatenate([self.kernel.first_history, results["out_sent"]])
        all_sent = all_sent.reshape(depth + steps, -1, self.regions).T

        def of_source(each):
            sent, delays = each
            arrived = jax.vmap(lambda delay: lax.dynamic_slice_in_dim(sent, depth - delay, steps, 1))(delays)
            return jnp.sum(ct * arrived, axis=-1)

        return jnp.swapaxes(lax.map(of_source, (all_sent, self.connections.steps.T)), 0, 1)

    def begin(self) -> None:
        kernel, n = self.kernel, self.n_arguments
        assert kernel.pullbacks.send is not None
        arguments = [*kernel.coefs, *kernel.state, "ct_sent"]
        self.zeros = kernel.function("send_back", kernel.pullbacks.send, arguments, [*kernel.uniform_step[:n], False])
        if kernel.wanted.weights:
            self.send_function()
        self.begin_ring("returning")
        if self.depth:
            with kernel.repeat(self.depth) as i:
                self.fill(i, "zero")

    def reverse(self, state: Sequence[str], cotangents: Sequence[str], step: str) -> None:
        kernel = self.kernel
        self.exchange(cotangents[-1], "ct_sent")
        if self.depth:
            self.add_past(f"{step} - {kernel.number(self.steps - self.depth)}")
        kernel.add_call("send_back", [*kernel.coefs, *state, "ct_sent"], self.zeros)
        if kernel.wanted.weights:
            self.call_send(state)
            kernel.store(["out_sent"], ["sent"], step)

    def add_past(self, time: str) -> None:
        """Add the cotangent of the last history at one of its times, if it is one."""
        where = self.kernel.place(time)
        self.kernel.line(f"ct_sent += tl.load(ct_past + {where}, mask=inside & ({where} >= 0), other=0)")

    def end(self) -> None:
        """What was sent before the first step, the newest first."""
        if not self.depth:
            return
        steps = self.kernel.number(self.steps)
        with self.kernel.repeat(self.depth, backwards=True) as i:
            self.exchange("zero", "ct_sent")
            self.add_past(f"{i} - {steps}")
            self.kernel.store(["ct_history"], ["ct_sent"], i)


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
