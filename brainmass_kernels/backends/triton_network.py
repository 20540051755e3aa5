"""Networks on GPUs: a program is a network or some, a thread one region, and what arrives is summed in the same kernel.

The kernels are those of `triton`, with lines for what is sent and what arrives. What the regions sent lies in device
memory in a ring of times as long as the longest delay, which all threads write and, after a barrier, read. A forward
run that a gradient will follow keeps the sums, an input like others to the way back, where cotangents of the sums are
sent through the transposed connections over a ring of their own.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from ..schedule import checkpoint_levels, segment_groups, segments_in
from .base import Adjoint, Carry, Connections, Cotangents, Forward, Loop, Operands, Pullbacks, Wanted
from .triton import Layout, ReversePass, Text, Uncoupled, _call, _seeds

# Connections of a region that are read at once.
AT_ONCE = 8
# Partial sums of a region, each of every so many connections.
PARTIAL = 4
# Times in the ring beyond the longest delay: this one, and one that no slower thread still reads.
SPARE = 2


def forward(loop: Loop, operands: Operands, initial: Carry, checkpoint_every: int | None) -> Forward:
    (coefs, inputs, seeds, connections), (state, history) = operands, initial
    coupling, schedule = loop.coupling, loop.schedule
    assert coupling is not None
    assert connections is not None
    lanes, dtype, depth = state[0].shape[0], state[0].dtype, coupling.depth
    saving, batched = checkpoint_every is not None, connections.weights.ndim == 3
    layout = Layout.of_networks(lanes, coupling.regions, depth, not batched)
    parts = tuple(segment_groups(schedule, checkpoint_every or max(1, schedule.steps)))
    wiring = functools.partial(ForwardCoupling, batched=batched, saving=saving)
    text = Text(loop, coefs, inputs, seeds, dtype, layout, wiring)
    source = text.forward(parts, saving)
    shapes = [(lanes,)] * loop.n_state + [(schedule.count, lanes)] * text.n_seen
    shapes += [(segments_in(parts), lanes)] * loop.n_state if saving else []
    shapes += [(_ring_size(layout, depth),), *([(depth, lanes)] if depth else [])]
    shapes += [(schedule.steps, lanes)] if saving else []
    given = (*coefs, *state, *inputs, *_seeds(seeds), *_connections(connections, layout, depth, to_targets=True))
    given += (history,) if depth else ()
    out = iter(_call(source, loop, layout, given, [jax.ShapeDtypeStruct(s, dtype) for s in shapes]))
    final = tuple(next(out) for _ in range(loop.n_state))
    records = tuple(next(out) for _ in range(text.n_seen))
    if not text.n_seen:
        records = (jnp.zeros((0, lanes), dtype),) * loop.n_observables
    saved = tuple(next(out) for _ in range(loop.n_state)) if saving else ()
    next(out)
    last = next(out) if depth else history
    return Forward(records, Carry(final, last), (*saved, next(out), history) if saving else None)


def adjoint(
    loop: Loop, pullbacks: Pullbacks, wanted: Wanted, operands: Operands, saved, cotangents: Cotangents,
    checkpoint_every: int,
) -> Adjoint:  # fmt: skip
    (coefs, inputs, seeds, connections), (ct_final, ct_history) = operands, cotangents.final
    coupling, steps = loop.coupling, loop.schedule.steps
    assert coupling is not None
    assert connections is not None
    *saved, totals, history = saved
    lanes, dtype, depth = ct_final[0].shape[0], ct_final[0].dtype, coupling.depth
    batched = connections.weights.ndim == 3
    layout = Layout.of_networks(lanes, coupling.regions, depth, not batched)
    parts = tuple(segment_groups(loop.schedule, checkpoint_every))
    wiring = functools.partial(ReverseCoupling, batched=batched, pullbacks=pullbacks, of_weights=wanted.weights)
    text = Text(loop, coefs, (*inputs, totals), seeds, dtype, layout, wiring)
    source = text.adjoint(parts, pullbacks, wanted._replace(inputs=(*wanted.inputs, True)))
    in_lanes = [x.ndim == 2 for x, w in zip(inputs, wanted.inputs) if w]
    n = sum(wanted.coefs)
    shapes = [(lanes,)] * (n + loop.n_state)
    shapes += [(steps, lanes if each else layout.blocks) for each in in_lanes]
    shapes += [(steps, lanes)] if wanted.weights else []
    shapes += [(slots, lanes) for slots in checkpoint_levels(parts, text.most(pullbacks)) for _ in range(loop.n_state)]
    shapes += [(_ring_size(layout, depth),), *([(depth, lanes)] if depth else [])]
    shapes += [(steps, lanes)] if wanted.weights else []
    given = (*coefs, *inputs, totals, *_seeds(seeds), *_connections(connections, layout, depth, to_targets=False))
    given += (ct_history,) if depth else ()
    given += (*saved, *ct_final, *(cotangents.records if text.n_seen else ()))
    out = _call(source, loop, layout, given, [jax.ShapeDtypeStruct(s, dtype) for s in shapes])
    m = n + loop.n_state
    last = m + len(in_lanes)
    sent = out[-1] if wanted.weights else None
    of_history = out[-2 if wanted.weights else -1] if depth else ct_history
    of_weights = None if sent is None else _of_weights(connections, history, out[last], sent)
    return Adjoint(tuple(out[:n]), Carry(tuple(out[n:m]), of_history), tuple(out[m:last]), of_weights)


def _ring_size(layout: Layout, depth: int) -> int:
    return layout.blocks * layout.together * layout.regions * (depth + SPARE) * (2 if depth else 1)


def _connections(connections: Connections, layout: Layout, depth: int, to_targets: bool) -> tuple[jax.Array, ...]:
    """Weights, and where each connection reads, of a row all that are read at once: its sources, or its targets."""
    weights = connections.weights if connections.weights.ndim == 2 else jnp.moveaxis(connections.weights, -1, 0)
    weights = jnp.swapaxes(weights, -1, -2) if to_targets else weights
    if not depth:
        return (weights,)
    steps = connections.steps.T if to_targets else connections.steps
    each = 2 * (depth + SPARE)
    rows = each * jnp.arange(layout.regions, dtype=jnp.int32)[:, None]
    return weights, layout.together * (rows - steps.astype(jnp.int32))


def _of_weights(connections: Connections, history, ct_arrived, sent) -> jax.Array:
    """The cotangent of the weights, ``(N, N, networks)``, one source after the other."""
    (depth, steps), regions = (len(history), len(sent)), connections.steps.shape[0]
    ct = jnp.transpose(ct_arrived.reshape(steps, -1, regions), (2, 1, 0))
    all_sent = jnp.concatenate([history, sent]).reshape(depth + steps, -1, regions).T

    def of_source(each):
        sent, delays = each
        arrived = jax.vmap(lambda delay: lax.dynamic_slice_in_dim(sent, depth - delay, steps, 1))(delays)
        return jnp.sum(ct * arrived, axis=-1)

    return jnp.swapaxes(lax.map(of_source, (all_sent, connections.steps.T)), 0, 1)


class _Coupled(Uncoupled):
    """Lines that both directions have."""

    unroll = most = 1

    def __init__(self, text: Text, batched: bool):
        super().__init__(text)
        assert text.loop.coupling is not None
        self.regions, self.depth = text.loop.coupling.regions, text.loop.coupling.depth
        self.batched, self.together = batched, text.layout.together

    def take(self) -> None:
        self.text.arguments += ["weights", *(["reads"] if self.depth else [])]

    def place(self) -> None:
        text, regions = self.text, self.regions
        if self.together == 1:
            text.line("region, network = tl.arange(0, BLOCK), block")
            text.line(f"inside = region < {regions}")
        else:
            text.line(f"region = tl.arange(0, BLOCK) // {self.together}")
            text.line(f"mate = tl.arange(0, BLOCK) % {self.together}")
            text.line(f"network = block * {self.together} + mate")
            text.line(f"inside = (region < {regions}) & (network < {text.number(text.layout.lanes // regions)})")
        text.line(f"lane = network * {regions} + region")
        # Threads beyond the regions read what the last one reads, which takes no mask.
        text.line(f"column = tl.minimum(region, {regions - 1})")

    def ring(self, function: str) -> None:
        """Begin with an empty ring.

        With delays the times of a region lie together, for the threads that read a region read times near each other,
        and lie there twice, one ring apart, so that no reader has to come round to the beginning. Of networks that
        share a program the numbers of one time lie together.
        """
        text, regions, many = self.text, self.regions, self.together
        whole = regions // AT_ONCE * AT_ONCE
        text.functions += _sum_of_connections(function, regions, bool(self.depth), text.optable.fused, many)
        # Were the limit of its loop in the text, the compiler would write the loop out.
        self.function, self.times, self.whole = function, text.number(self.depth + SPARE), text.number(whole)
        if self.batched:
            text.line(f"weights += block.to(tl.int64) * {regions**2}")
        each = f"{self.times} * 2" if self.depth else SPARE
        text.line(f"ring += block.to(tl.int64) * ({each} * {regions * many})")
        text.line(f"mine = region * ({each})" if self.depth else "mine = region")
        if many > 1:
            text.line(f"mine = mine * {many} + mate")
        text.line("mine = ring + mine")
        text.line("turn = 0")

    def at(self, time: str) -> str:
        """The place of a time among those of a region."""
        return time if self.together == 1 else f"{time} * {self.together}"

    def fill(self, time: str, value: str) -> None:
        """Put what was sent before the first step, from the oldest on, into the ring."""
        self.text.line(f"tl.store(mine + {self.at(f'({time} + {SPARE})')}, {value}, mask=inside)")

    def exchange(self, value: str, total: str) -> None:
        """Send a value of each lane, and sum what arrives at each."""
        text = self.text
        text.line(f"now = {self.at('turn')}" if self.depth else f"now = turn * {self.regions * self.together}")
        text.line(f"tl.store(mine + now, {value}, mask=inside)")
        if self.depth:
            text.line(f"now += {self.at(self.times)}")
            text.line(f"tl.store(mine + now, {value}, mask=inside)")
        text.line("tl.debug_barrier()")
        reads = "reads, " if self.depth else ""
        here = "ring + now" if self.together == 1 else "ring + now + mate"
        text.line(f"{total} = {self.function}({here}, weights, {reads}column, {self.whole}, zero)")
        text.line(f"turn = tl.where(turn + 1 < {self.times}, turn + 1, 0)")


class ForwardCoupling(_Coupled):
    """What is sent and what arrives, forwards.

    Arguments: weights, and, with delays, where connections read, and the history. Results: the ring, the last history
    with delays, and all sums where they are saved.
    """

    def __init__(self, text: Text, batched: bool, saving: bool):
        super().__init__(text, batched)
        self.saving = saving
        self.sum = text.names("u", text.loop.n_inputs)[-1]

    def take(self) -> None:
        super().take()
        self.text.arguments += ["history"] if self.depth else []

    def give(self) -> None:
        self.text.arguments += ["ring", *(["past"] if self.depth else []), *(["totals"] if self.saving else [])]

    def begin(self) -> None:
        text, loop = self.text, self.text.loop
        assert loop.coupling is not None
        n = loop.n_coefs + loop.n_state
        given = [*text.coefs, *text.names("x", loop.n_state)]
        text.function("send", loop.coupling.send, given, text.uniform_step[:n])
        self.ring("arriving")
        if self.depth:
            with text.repeat(self.depth) as i:
                text.load(["sent"], ["history"], i)
                self.fill(i, "sent")

    def arrive(self, state: Sequence[str]) -> None:
        text = self.text
        text.assign(["sent"], f"send({', '.join([*text.coefs, *state, 'zero'])})")
        self.exchange("sent", self.sum)
        if self.saving:
            text.store(["totals"], [self.sum], "n")

    def end(self) -> None:
        text = self.text
        if self.depth:
            # Threads may read what others wrote.
            text.line("tl.debug_barrier()")
            with text.repeat(self.depth) as i:
                time = self.at(f"(turn + {i} + {SPARE})")
                text.line(f"sent = tl.load(mine + {time}, mask=inside, other=0)")
                text.store(["past"], ["sent"], i)


class ReverseCoupling(_Coupled):
    """What is sent and what arrives, backwards.

    Arguments: weights, and, with delays, where connections read, and the cotangent of the last history. Results: the
    ring, the cotangent of the first history with delays, and all that was sent where cotangents of weights are wanted.
    """

    def __init__(self, text: Text, batched: bool, pullbacks: Pullbacks, of_weights: bool):
        super().__init__(text, batched)
        self.pullbacks, self.of_weights = pullbacks, of_weights
        self.dropped = int(not of_weights)

    def take(self) -> None:
        super().take()
        self.text.arguments += ["ct_past"] if self.depth else []

    def give(self) -> None:
        self.text.arguments += [
            "ring",
            *(["ct_history"] if self.depth else []),
            *(["out_sent"] if self.of_weights else []),
        ]

    def begin(self) -> None:
        text, loop = self.text, self.text.loop
        assert loop.coupling is not None
        assert self.pullbacks.send is not None
        n = loop.n_coefs + loop.n_state
        given, uniform = [*text.coefs, *text.names("x", loop.n_state)], text.uniform_step[:n]
        self.zeros = text.function("send_back", self.pullbacks.send, [*given, "ct_sent"], [*uniform, False])
        if self.of_weights:
            text.function("send", loop.coupling.send, given, uniform)
        self.ring("returning")
        if self.depth:
            with text.repeat(self.depth) as i:
                self.fill(i, "zero")

    def back(self, back: ReversePass, state: Sequence[str], sent: Sequence[str], step: str) -> None:
        text = self.text
        self.exchange(sent[-1], "ct_sent")
        if self.depth:
            self.add_past(f"{step} - {text.number(text.loop.schedule.steps - self.depth)}")
        both = [*back.ct_coefs, *back.ct_state]
        moved, known = text.names("h", len(both)), ", ".join([*text.coefs, *state])
        text.assign(moved, f"send_back({known}, ct_sent, zero)")
        back.add(both, moved, self.zeros)
        if self.of_weights:
            text.assign(["sent"], f"send({known}, zero)")
            text.store(["out_sent"], ["sent"], step)

    def add_past(self, time: str) -> None:
        """Add the cotangent of the last history at one of its times, if it is one."""
        where = self.text.place(time)
        self.text.line(f"ct_sent += tl.load(ct_past + {where}, mask=inside & ({where} >= 0), other=0)")

    def end(self) -> None:
        """What was sent before the first step, the newest first."""
        text = self.text
        if self.depth:
            steps = text.number(text.loop.schedule.steps)
            with text.repeat(self.depth, backwards=True) as i:
                self.exchange("zero", "ct_sent")
                self.add_past(f"{i} - {steps}")
                text.store(["ct_history"], ["ct_sent"], i)


def _sum_of_connections(name: str, regions: int, delayed: bool, fused: str, together: int) -> list[str]:
    """A function that sums over all connections of a lane, in a fixed order, beginning with source or target 0."""
    whole = regions // AT_ONCE * AT_ONCE

    def some(first: str, count: int) -> list[str]:
        places = range(0, count * regions, regions)
        lines = [f"place = column + {first} * {regions}", "weight = weights + place"]
        lines += [f"w{k} = tl.load(weight + {place})" for k, place in enumerate(places)]
        lines += ["read = reads + place"] if delayed else [f"read = here + {first} * {together}"]
        if delayed:
            lines += [f"r{k} = tl.load(read + {place})" for k, place in enumerate(places)]
        lines += [f"s{k} = tl.load({f'here + r{k}' if delayed else f'read + {k * together}'})" for k in range(count)]
        sums = [f"sum{k % PARTIAL}" for k in range(count)]
        return lines + [f"{total} = {fused.format(f'w{k}', f's{k}', total)}" for k, total in enumerate(sums)]

    body = [f"sum{k} = zero" for k in range(PARTIAL)]
    if whole:
        body += [f"for j in range(0, whole, {AT_ONCE}):", *(f"    {line}" for line in some("j", AT_ONCE))]
    body += some("whole", regions - whole) if regions > whole else []
    sums = [f"sum{k}" for k in range(PARTIAL)]
    while len(sums) > 1:
        sums = [f"({a} + {b})" for a, b in zip(sums[::2], sums[1::2])]
    body += [f"return {sums[0]}"]
    arguments = ["here", "weights", *(["reads"] if delayed else []), "column", "whole", "zero"]
    return ["@device", f"def {name}({', '.join(arguments)}):", *(f"    {line}" for line in body), "", ""]
