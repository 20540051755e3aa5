"""The loop as nested `lax.scan`, in plain jnp: any device, any dtype."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .. import noise
from .base import Adjoint, Copied, Forward, Loop, Piece, Pullbacks, Request, Wanted, Wires, pieces


class Scan:
    """The reference implementation, and the one that every device has."""

    name = "scan"
    interpretable = False
    retreats = False
    networks = True
    same_lanes = False

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

    def forward(self, loop: Loop, coefs, state, inputs, seeds, checkpoint_every: int | None = None) -> Forward:
        records: list = []
        saved: list = []
        for piece in pieces(loop.schedule, checkpoint_every or max(1, loop.schedule.steps)):
            state, kept, seen = _run_piece(loop, piece, coefs, state, inputs, seeds, checkpoint_every is not None)
            saved.append(kept)
            records += [seen] if piece.recorded else []
        return Forward(_joined(loop, records, state), state, tuple(saved) if checkpoint_every else None)

    def transparent(
        self, loop: Loop, coefs, state, inputs, seeds, checkpoint_every: int, wires: Wires | None = None
    ) -> Forward:
        """The same run as a scan that JAX differentiates itself, in forward mode and to any order.

        With ``wires`` the final state has the history after it.
        """
        if wires is not None:
            coefs, state = _Wired(coefs, wires), (*state, _unrolled(wires.history, loop))
        records = []
        for piece in pieces(loop.schedule, checkpoint_every):

            def segment(state, start, piece=piece):
                return _segment(loop, piece, coefs, state, inputs, seeds, start)

            state, seen = lax.scan(jax.checkpoint(segment), state, _starts(piece))
            records += [_merged(seen)] if piece.recorded else []
        if wires is not None:
            state = (*state[:-1], _rolled(state[-1], loop.schedule.steps))
        return Forward(_joined(loop, records, state), state)

    def adjoint(
        self, loop: Loop, pullbacks: Pullbacks, wanted: Wanted, coefs, saved, inputs, seeds, ct_records, ct_final,
        checkpoint_every: int,
    ) -> Adjoint:  # fmt: skip
        lanes, dtype = ct_final[0].shape, ct_final[0].dtype
        ct_coefs = tuple(jnp.zeros(lanes, dtype) for w in wanted.coefs if w)
        carry: tuple = (ct_coefs, tuple(ct_final))
        back = _Back(loop, pullbacks, wanted, coefs, inputs, seeds)
        ct_inputs: list = []
        first = loop.schedule.count
        for piece, kept in reversed(list(zip(pieces(loop.schedule, checkpoint_every), saved, strict=True))):
            seen: tuple = ()
            if piece.recorded:
                n = piece.segments * piece.strides
                first -= n
                seen = tuple(r[first : first + n].reshape(piece.segments, piece.strides, *lanes) for r in ct_records)
            carry, ct = back.piece(piece, kept, seen, carry)
            ct_inputs.insert(0, ct)
        joined = tuple(jnp.concatenate(parts) for parts in zip(*ct_inputs)) if ct_inputs else ()
        ct_coefs, ct_state = carry
        return Adjoint(ct_coefs, ct_state, joined)


def _joined(loop: Loop, records, state) -> tuple:
    if not records:
        return tuple(jnp.zeros((0, *state[0].shape), a.dtype) for a in loop.observe.out_avals)
    return records[0] if len(records) == 1 else tuple(jnp.concatenate(parts) for parts in zip(*records))


def _merged(seen):
    """(segments, strides, ...) as (records, ...)."""
    return tuple(x.reshape(-1, *x.shape[2:]) for x in seen)


def _rows(inputs, n):
    return tuple(lax.dynamic_index_in_dim(x, n, keepdims=False) for x in inputs)


def _normals(loop: Loop, seeds, n, dtype):
    made = noise.normals(seeds, n, loop.n_normals) if loop.n_normals else ()
    return tuple(x.astype(dtype) for x in made)


class _Wired(NamedTuple):
    """Coefficients of a loop whose lanes are coupled; the state then has a ring of what was sent after it."""

    coefs: tuple
    wires: Wires


def _unrolled(history, loop: Loop):
    """``(depth, L)`` as ``(depth, N, networks)``, so that what a connection reads lies together."""
    coupling = loop.coupling
    assert coupling is not None
    return jnp.swapaxes(history.reshape(coupling.depth, history.shape[1] // coupling.regions, coupling.regions), 1, 2)


def _rolled(ring, n):
    """A ring after ``n`` steps as a history, the oldest first."""
    depth = len(ring)
    return jnp.roll(jnp.swapaxes(ring, 1, 2).reshape(depth, ring.shape[1] * ring.shape[2]), -n % max(1, depth), axis=0)


def _coupled(loop: Loop, wired: _Wired, state, n):
    """The coupling's sum of each lane at step ``n``, and the ring after it."""
    *state, ring = state
    coupling, wires = loop.coupling, wired.wires
    assert coupling is not None
    (sent,) = coupling.send(*wired.coefs, *state)
    sent = jnp.broadcast_to(sent, state[0].shape).reshape(-1, coupling.regions).T
    weights = wires.weights
    if not coupling.depth:
        to = "ij,jb->ib" if weights.ndim == 2 else "ijb,jb->ib"
        return _flat(jnp.einsum(to, weights, sent, precision=lax.Precision.HIGHEST)), ring
    n = lax.convert_element_type(n, wires.steps.dtype)
    sources = jnp.broadcast_to(jnp.arange(coupling.regions), wires.steps.shape)
    late = ring[lax.rem(n - wires.steps + coupling.depth, np.int32(coupling.depth)), sources]
    arriving = jnp.where(wires.steps[..., None] == 0, sent[None], late)
    total = jnp.sum((weights if weights.ndim == 3 else weights[..., None]) * arriving, axis=1)
    return _flat(total), lax.dynamic_update_index_in_dim(ring, sent, lax.rem(n, np.int32(coupling.depth)), 0)


def _flat(x):
    """``(N, networks)`` as ``(L,)``."""
    return x.T.reshape(-1)


def _step(loop: Loop, coefs, state, inputs, seeds, n):
    if isinstance(coefs, _Wired):
        total, ring = _coupled(loop, coefs, state, n)
        state = state[:-1]
        row = (*_rows(inputs, n), total, *_normals(loop, seeds, n, state[0].dtype))
        stepped = loop.advance(*coefs.coefs, *state, *row)
        return (*(jnp.broadcast_to(x, s.shape) for x, s in zip(stepped, state)), ring)
    stepped = loop.advance(*coefs, *state, *_rows(inputs, n), *_normals(loop, seeds, n, state[0].dtype))
    return tuple(jnp.broadcast_to(x, s.shape) for x, s in zip(stepped, state))


def _observe(loop: Loop, coefs, state):
    if isinstance(coefs, _Wired):
        coefs, state = coefs.coefs, state[:-1]
    return tuple(jnp.broadcast_to(x, state[0].shape) for x in loop.observe(*coefs, *state))


def _segment(loop: Loop, piece: Piece, coefs, state, inputs, seeds, start):
    """One segment: the state after it, and what was recorded."""

    def stride(state, first):
        if piece.parts:
            for part in piece.parts:
                state = _part(loop, part, coefs, state, inputs, seeds, first)
        else:
            state, _ = lax.scan(
                lambda s, k: (_step(loop, coefs, s, inputs, seeds, first + k), None), state, jnp.arange(piece.stride)
            )
        return state, _observe(loop, coefs, state) if piece.recorded else ()

    return lax.scan(stride, state, start + piece.stride * jnp.arange(piece.strides))


def _part(loop: Loop, part: Piece, coefs, state, inputs, seeds, first):
    """One part of a long stride; each of its segments is a checkpoint where JAX differentiates the loop itself."""

    @jax.checkpoint
    def segment(state, start):
        return _segment(loop, part, coefs, state, inputs, seeds, start)[0], None

    return lax.scan(segment, state, _starts(part, first))[0]


def _run_piece(loop: Loop, piece: Piece, coefs, state, inputs, seeds, save: bool, offset=0):
    """All segments of a piece: the state after it, the states before its segments if asked, its records."""

    def segment(state, start):
        after, seen = _segment(loop, piece, coefs, state, inputs, seeds, start)
        return after, (state if save else (), seen)

    after, (kept, seen) = lax.scan(segment, state, _starts(piece, offset))
    return after, kept, _merged(seen)


def _starts(piece: Piece, offset=0):
    return offset + piece.start + piece.length * jnp.arange(piece.segments)


class _Back(NamedTuple):
    """The walk back: everything that stays the same over the whole of it."""

    loop: Loop
    pullbacks: Pullbacks
    wanted: Wanted
    coefs: tuple
    inputs: tuple
    seeds: jax.Array | None

    def piece(self, piece: Piece, kept, seen, carry, offset=0):
        """All segments of a piece, the last first; also the cotangents of the inputs, ``(steps, P)``."""
        walk = self.long_stride if piece.parts else self.segment
        xs = (kept, _starts(piece, offset), seen)
        carry, ct_inputs = lax.scan(lambda c, x: walk(piece, c, *x), carry, xs, reverse=True)
        return carry, tuple(x.reshape(piece.segments * piece.length, x.shape[-1]) for x in ct_inputs)

    def segment(self, piece: Piece, carry, state, start, seen):
        states, after = self._replay(piece, state, start)

        def stride(carry, x):
            first, states, after, seen = x
            if piece.recorded:
                carry = self._observed(carry, after, seen)
            steps = first + jnp.arange(piece.stride)
            return lax.scan(lambda c, y: self.step(c, *y), carry, (steps, states), reverse=True)

        firsts = start + piece.stride * jnp.arange(piece.strides)
        return lax.scan(stride, carry, (firsts, states, after, seen), reverse=True)

    def long_stride(self, piece: Piece, carry, state, start, seen):
        """A stride of several segments: run it once more to keep the state before each."""
        loop, kept = self.loop, []
        for part in piece.parts:
            state, states, _ = _run_piece(loop, part, self.coefs, state, self.inputs, self.seeds, True, start)
            kept.append(states)
        carry = self._observed(carry, state, tuple(x[0] for x in seen))
        ct_inputs = []
        for part, states in reversed(list(zip(piece.parts, kept))):
            carry, ct = self.piece(part, states, (), carry, offset=start)
            ct_inputs.insert(0, ct)
        return carry, tuple(jnp.concatenate(parts) for parts in zip(*ct_inputs))

    def _replay(self, piece: Piece, state, start):
        """The state before each step, ``(strides, stride, L)``, and after each stride, ``(strides, L)``."""

        def step(state, n):
            return _step(self.loop, self.coefs, state, self.inputs, self.seeds, n), state

        def stride(state, first):
            state, before = lax.scan(step, state, first + jnp.arange(piece.stride))
            return state, (before, state if piece.recorded else ())

        _, kept = lax.scan(stride, state, start + piece.stride * jnp.arange(piece.strides))
        return kept

    def step(self, carry, n, state):
        """The pullback of one step. XLA drops the normals where no cotangent needs them."""
        ct_coefs, ct_state = carry
        known = (*self.coefs, *state, *_rows(self.inputs, n), *_normals(self.loop, self.seeds, n, state[0].dtype))
        out = iter(self.pullbacks.advance(*known, *ct_state))
        ct_coefs = tuple(c + next(out) for c in ct_coefs)
        ct_state = tuple(jnp.broadcast_to(next(out), s.shape) for s in ct_state)
        lanes = ct_state[0].shape
        wanted = [x for x, w in zip(self.inputs, self.wanted.inputs) if w]
        return (ct_coefs, ct_state), tuple(_of_input(jnp.broadcast_to(next(out), lanes), x) for x in wanted)

    def _observed(self, carry, state, ct_observables):
        ct_coefs, ct_state = carry
        out = iter(self.pullbacks.observe(*self.coefs, *state, *ct_observables))
        ct_coefs = tuple(c + next(out) for c in ct_coefs)
        return ct_coefs, tuple(c + next(out) for c in ct_state)


def _of_input(cotangent, x):
    """The cotangent of one row of an input; of a uniform one, already summed over lanes."""
    return cotangent if x.ndim == 2 else jnp.sum(cotangent, keepdims=True)
