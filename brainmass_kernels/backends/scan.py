"""The loop as nested `lax.scan`, in plain jnp: any device, any dtype."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .. import noise
from .._jax import aligned
from ..schedule import SegmentGroup, segment_groups
from .base import (
    Adjoint,
    Carry,
    Connections,
    Copied,
    Cotangents,
    Coupling,
    Forward,
    Loop,
    Operands,
    Pullbacks,
    Request,
    Wanted,
)  # fmt: skip


class Scan:
    """The reference implementation, and the one that every device has."""

    name = "scan"
    interpretable = False
    inverse_steps = False
    networks = True
    by_group = False
    masses_together = 1

    def base_two(self, precision: str) -> bool:
        """XLA has a tanh."""
        return False

    def unavailable(self, platform: str) -> str | None:
        return None

    def unsupported(self, request: Request) -> str | None:
        return None

    def copied(self, request: Request) -> Copied:
        """Nothing: it writes straight to what is returned."""
        return Copied()

    def pointwise(self, program) -> None:
        return None

    def forward(self, loop: Loop, operands: Operands, initial: Carry, checkpoint_every: int | None = None) -> Forward:
        carry, records, saved = initial, [], []
        for group in segment_groups(loop.schedule, checkpoint_every or max(1, loop.schedule.steps)):
            carry, kept, seen = _run_group(loop, group, operands, carry, checkpoint_every is not None)
            saved.append(kept)
            records += [seen] if group.recorded else []
        return Forward(_joined(loop, records, carry), carry, tuple(saved) if checkpoint_every else None)

    def native_autodiff(self, loop: Loop, operands: Operands, initial: Carry, checkpoint_every: int) -> Forward:
        """The same run as a scan that JAX differentiates itself, in forward mode and to any order."""
        records, carry = [], initial
        if loop.coupling:
            carry = Carry(initial.state, tuple(_ring(x, loop.coupling.regions) for x in initial.history))
        for group in segment_groups(loop.schedule, checkpoint_every):

            def segment(carry, start, group=group):
                return _segment(loop, group, operands, carry, start)

            carry, seen = lax.scan(jax.checkpoint(segment), carry, _starts(group))
            records += [_merged(seen)] if group.recorded else []
        history = tuple(_unrolled(ring, loop.schedule.steps) for ring in carry.history)
        carry = carry._replace(history=history)
        return Forward(_joined(loop, records, carry), carry)

    def adjoint(
        self, loop: Loop, pullbacks: Pullbacks, wanted: Wanted, operands: Operands, saved, cotangents: Cotangents,
        checkpoint_every: int,
    ) -> Adjoint:  # fmt: skip
        ct_state = cotangents.final.state
        lanes, dtype = ct_state[0].shape, ct_state[0].dtype
        ct_coefs = aligned(tuple(jnp.zeros(lanes, dtype) for w in wanted.coefs if w), ct_state)
        carry: tuple = (ct_coefs, tuple(ct_state))
        back = ReversePass(loop, pullbacks, wanted, operands)
        ct_inputs: list = []
        first = loop.schedule.count
        for group, kept in reversed(list(zip(segment_groups(loop.schedule, checkpoint_every), saved, strict=True))):
            seen: tuple = ()
            if group.recorded:
                n = group.segments * group.strides
                first -= n
                shape = (group.segments, group.strides, *lanes)
                seen = tuple(r[first : first + n].reshape(shape) for r in cotangents.records)
            carry, ct = back.group(group, kept, seen, carry)
            ct_inputs.insert(0, ct)
        joined = tuple(jnp.concatenate(parts) for parts in zip(*ct_inputs)) if ct_inputs else ()
        return Adjoint(carry[0], Carry(carry[1]), joined)


def _joined(loop: Loop, records, carry: Carry) -> tuple:
    if not records:
        return tuple(jnp.zeros((0, *carry.state[0].shape), a.dtype) for a in loop.observe.out_avals)
    return records[0] if len(records) == 1 else tuple(jnp.concatenate(parts) for parts in zip(*records))


def _merged(seen):
    """(segments, strides, ...) as (records, ...)."""
    return tuple(x.reshape(-1, *x.shape[2:]) for x in seen)


def _rows(inputs, n):
    return tuple(lax.dynamic_index_in_dim(x, n, keepdims=False) for x in inputs)


def _normals(loop: Loop, seeds, n, dtype):
    made = noise.normals(seeds, n, loop.n_normals) if loop.n_normals else ()
    return tuple(x.astype(dtype) for x in made)


def _ring(history, regions: int):
    """``(depth, L)`` as ``(depth, N, networks)``, so that what a connection reads lies together."""
    return jnp.swapaxes(history.reshape(len(history), history.shape[1] // regions, regions), 1, 2)


def _unrolled(ring, n: int):
    """A ring after ``n`` steps as a history, the oldest first."""
    depth = len(ring)
    return jnp.roll(jnp.swapaxes(ring, 1, 2).reshape(depth, ring.shape[1] * ring.shape[2]), -n % max(1, depth), axis=0)


def _coupled(coupling: Coupling, operands: Operands, carry: Carry, n):
    """The sums that arrive at each lane at step ``n``, and the rings after it."""
    state, rings = carry
    sent = coupling.send(*operands.coefs, *state)
    sent = [jnp.broadcast_to(x, state[0].shape).reshape(-1, coupling.regions).T for x in sent]
    totals: list[Any] = [None] * coupling.totals
    for term, connections in zip(coupling.terms, operands.connections, strict=True):
        total = _term(connections, sent[term.source], rings[term.source], n)
        before = totals[term.total]
        totals[term.total] = total if before is None else before + total
    rings = tuple(_sent_to(ring, x, n) for ring, x in zip(rings, sent, strict=True))
    return tuple(x.T.reshape(-1) for x in totals), rings


def _sent_to(ring, sent, n):
    """The ring after what was sent at step ``n``."""
    if not len(ring):
        return ring
    return lax.dynamic_update_index_in_dim(ring, sent, lax.rem(n.astype(np.int32), np.int32(len(ring))), 0)


def _term(connections: Connections, sent, ring, n):
    """What one term adds to its sum, ``(N, networks)``."""
    weights, depth = connections.weights, np.int32(len(ring))
    if connections.are_edges:
        return _over_edges(connections, sent, ring, n)
    if not depth:
        to = "ij,jb->ib" if weights.ndim == 2 else "ijb,jb->ib"
        return jnp.einsum(to, weights, sent, precision=lax.Precision.HIGHEST)
    n, steps = lax.convert_element_type(n, connections.steps.dtype), connections.steps
    sources = jnp.broadcast_to(jnp.arange(len(sent)), steps.shape[:2])
    at = lax.rem(n - steps + depth, depth)
    if connections.own_delays:
        late = ring[at, sources[..., None], jnp.arange(steps.shape[-1])]
    else:
        late, steps = ring[at, sources], steps[..., None]
    arriving = jnp.where(steps == 0, sent[None], late)
    return jnp.sum((weights if weights.ndim == 3 else weights[..., None]) * arriving, axis=1)


def _over_edges(connections: Connections, sent, ring, n):
    """The same of sparse weights: a sum over edges, which are sorted by the region that they go to."""
    weights, (rows, columns) = connections.weights[0], connections.edges
    arriving = sent[columns]
    if len(ring):
        depth, n = np.int32(len(ring)), lax.convert_element_type(n, connections.steps.dtype)
        at, steps = lax.rem(n - connections.steps + depth, depth), connections.steps
        if connections.own_delays:
            late = ring[at, columns[:, None], jnp.arange(steps.shape[-1])]
        else:
            late, steps = ring[at, columns], steps[:, None]
        arriving = jnp.where(steps == 0, arriving, late)
    summands = (weights if weights.ndim == 2 else weights[:, None]) * arriving
    return jax.ops.segment_sum(summands, rows, len(sent), indices_are_sorted=True)


def _step(loop: Loop, operands: Operands, carry: Carry, n) -> Carry:
    (state, history), arriving = carry, ()
    if loop.coupling:
        arriving, history = _coupled(loop.coupling, operands, carry, n)
    row = (*_rows(operands.inputs, n), *arriving, *_normals(loop, operands.seeds, n, state[0].dtype))
    stepped = loop.advance(*operands.coefs, *state, *row)
    return aligned(Carry(tuple(jnp.broadcast_to(x, s.shape) for x, s in zip(stepped, state)), history), carry)


def _observe(loop: Loop, operands: Operands, state):
    return tuple(jnp.broadcast_to(x, state[0].shape) for x in loop.observe(*operands.coefs, *state))


def _segment(loop: Loop, group: SegmentGroup, operands: Operands, carry: Carry, start):
    """One segment: the carry after it, and what was recorded."""

    def stride(carry, first):
        if group.parts:
            for part in group.parts:
                carry = _part(loop, part, operands, carry, first)
        else:
            steps = jnp.arange(group.stride)
            carry, _ = lax.scan(lambda c, k: (_step(loop, operands, c, first + k), None), carry, steps)
        return carry, _observe(loop, operands, carry.state) if group.recorded else ()

    return lax.scan(stride, carry, start + group.stride * jnp.arange(group.strides))


def _part(loop: Loop, part: SegmentGroup, operands: Operands, carry: Carry, first):
    """One part of a long stride; each of its segments is a checkpoint where JAX differentiates the loop itself."""

    @jax.checkpoint
    def segment(carry, start):
        return _segment(loop, part, operands, carry, start)[0], None

    return lax.scan(segment, carry, _starts(part, first))[0]


def _run_group(loop: Loop, group: SegmentGroup, operands: Operands, carry: Carry, save: bool, offset=0):
    """All segments of a group: the carry after it, the carries before its segments if asked, its records."""

    def segment(carry, start):
        after, seen = _segment(loop, group, operands, carry, start)
        return after, (carry if save else (), seen)

    after, (kept, seen) = lax.scan(segment, carry, _starts(group, offset))
    return after, kept, _merged(seen)


def _starts(group: SegmentGroup, offset=0):
    return offset + group.start + group.length * jnp.arange(group.segments)


class ReversePass(NamedTuple):
    """The walk back: everything that stays the same over the whole of it.

    What passes from step to step are ``cts``, the cotangents of the wanted coefficients and of the state.
    """

    loop: Loop
    pullbacks: Pullbacks
    wanted: Wanted
    operands: Operands

    def group(self, group: SegmentGroup, kept, seen, cts, offset=0):
        """All segments of a group, the last first; also the cotangents of the inputs, ``(steps, P)``."""
        walk = self.long_stride if group.parts else self.segment
        xs = (kept, _starts(group, offset), seen)
        cts, ct_inputs = lax.scan(lambda c, x: walk(group, c, *x), cts, xs, reverse=True)
        return cts, tuple(x.reshape(group.segments * group.length, x.shape[-1]) for x in ct_inputs)

    def segment(self, group: SegmentGroup, cts, carry: Carry, start, seen):
        before, after = self._replay(group, carry, start)

        def stride(cts, x):
            first, before, after, seen = x
            if group.recorded:
                cts = self._observed(cts, after, seen)
            steps = first + jnp.arange(group.stride)
            return lax.scan(lambda c, y: self.step(c, *y), cts, (steps, before), reverse=True)

        firsts = start + group.stride * jnp.arange(group.strides)
        return lax.scan(stride, cts, (firsts, before, after, seen), reverse=True)

    def long_stride(self, group: SegmentGroup, cts, carry: Carry, start, seen):
        """A stride of several segments: run it once more to keep the carry before each."""
        kept = []
        for part in group.parts:
            carry, carries, _ = _run_group(self.loop, part, self.operands, carry, True, start)
            kept.append(carries)
        cts = self._observed(cts, carry, tuple(x[0] for x in seen))
        ct_inputs = []
        for part, carries in reversed(list(zip(group.parts, kept))):
            cts, ct = self.group(part, carries, (), cts, offset=start)
            ct_inputs.insert(0, ct)
        return cts, tuple(jnp.concatenate(parts) for parts in zip(*ct_inputs))

    def _replay(self, group: SegmentGroup, carry: Carry, start):
        """The carry before each step, ``(strides, stride, L)``, and after each stride, ``(strides, L)``."""

        def step(carry, n):
            return _step(self.loop, self.operands, carry, n), carry

        def stride(carry, first):
            carry, before = lax.scan(step, carry, first + jnp.arange(group.stride))
            return carry, (before, carry if group.recorded else ())

        _, kept = lax.scan(stride, carry, start + group.stride * jnp.arange(group.strides))
        return kept

    def step(self, cts, n, carry: Carry):
        """The pullback of one step. XLA drops the normals where no cotangent needs them."""
        (ct_coefs, ct_state), (coefs, inputs, seeds, _), state = cts, self.operands, carry.state
        known = (*coefs, *state, *_rows(inputs, n), *_normals(self.loop, seeds, n, state[0].dtype))
        out = iter(self.pullbacks.advance(*known, *ct_state))
        ct_coefs = tuple(c + next(out) for c in ct_coefs)
        ct_state = tuple(jnp.broadcast_to(next(out), s.shape) for s in ct_state)
        lanes = ct_state[0].shape
        wanted = [x for x, w in zip(inputs, self.wanted.inputs) if w]
        return (ct_coefs, ct_state), tuple(_of_input(jnp.broadcast_to(next(out), lanes), x) for x in wanted)

    def _observed(self, cts, carry: Carry, ct_observables):
        ct_coefs, ct_state = cts
        out = iter(self.pullbacks.observe(*self.operands.coefs, *carry.state, *ct_observables))
        ct_coefs = tuple(c + next(out) for c in ct_coefs)
        return ct_coefs, tuple(c + next(out) for c in ct_state)


def _of_input(cotangent, x):
    """The cotangent of one row of an input; of a uniform one, already summed over lanes."""
    return cotangent if x.ndim == 2 else jnp.sum(cotangent, keepdims=True)
