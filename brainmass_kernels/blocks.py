"""Runs cut into blocks of records, which statistics reduce in turn, or into parts with checkpoints in between."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from .recording import Reduction, Sampling
from .schedule import Schedule, SegmentGroup, segment_groups

#: Blocks that a gradient may keep the carry before; of more, groups are run again first.
KEPT = 64


def run_in_blocks(
    schedule: Schedule, sampling: Sampling, what: Sequence[str | Reduction], sources, launch: Callable, carry, rows,
    again: bool,
):  # fmt: skip
    """Run all steps, reducing the records block by block.

    Parameters
    ----------
    schedule : of the whole run
    what : names of quantities to be stored, and statistics
    sources : names of the quantities that a launch records
    launch : ``(schedule, carry, rows, first step or None) -> (records, carry)``, a run of some steps
    carry : what the first step begins with
    rows : of inputs, one a step, each ``(T, ...)``
    again : whether a gradient runs blocks again, or keeps what it needs of them all

    Returns
    -------
    for each of ``what`` its value, and the carry after the last step
    """
    block, lead, every = sampling.block, schedule.lead, schedule.every
    reductions = [r for r in what if isinstance(r, Reduction)]
    stored: list[list] = [[] for r in what if not isinstance(r, Reduction)]
    held = tuple(r.start(carry.state[0], sampling) for r in reductions)

    def take(held, records, first):
        seen = dict(zip(sources, records, strict=True))
        held = tuple(r.add(h, seen[r.of], first, sampling) for r, h in zip(reductions, held, strict=True))
        return held, [seen[name] for name in what if not isinstance(name, Reduction)]

    def keep(records):
        for parts, x in zip(stored, records, strict=True):
            parts.append(x)

    if block >= sampling.count:
        records, carry = launch(schedule, carry, rows, None)
        held, kept = take(held, records, 0)
        keep(kept)
    else:

        def between(first, count, recorded):
            part = Schedule(count, 0 if recorded else count, every)
            return launch(part, carry, tuple(x[first : first + count] for x in rows), first)

        def one(carry, x):
            (carry, held), (number, rows) = carry, x
            records, carry = launch(Schedule(steps, 0, every), carry, rows, lead + number * steps)
            held, kept = take(held, records, number * block)
            return (carry, held), kept

        whole, left = divmod(sampling.count, block)
        steps = block * every
        if lead:
            _, carry = between(0, lead, recorded=False)
        cut = tuple(x[lead : lead + whole * steps].reshape(whole, steps, *x.shape[1:]) for x in rows)
        repeated = _repeated if again else lax.scan
        (carry, held), kept = repeated(one, (carry, held), (jnp.arange(whole, dtype=jnp.int32), cut))
        keep(x.reshape(-1, *x.shape[2:]) for x in kept)
        done = lead + whole * steps
        if left:
            records, carry = between(done, left * every, recorded=True)
            held, kept = take(held, records, whole * block)
            keep(kept)
            done += left * every
        if done < schedule.steps:
            _, carry = between(done, schedule.steps - done, recorded=False)
    finished = (r.finish(h, sampling) for r, h in zip(reductions, held, strict=True))
    trajectories = (jnp.concatenate(parts) for parts in stored)
    return [next(finished if isinstance(r, Reduction) else trajectories) for r in what], carry


def run_in_parts(launch: Callable, most: int, again: bool, schedule: Schedule, carry, rows, first):
    """A launch in parts of at most ``most`` steps, of which a gradient keeps the carries in between.

    Parameters
    ----------
    launch : as of `run_in_blocks`, in which it can take its place
    most : steps of a part
    again : whether a gradient runs parts again, or keeps what it needs of them all
    schedule, carry, rows, first : of the launch
    """
    if schedule.steps <= most:
        return launch(schedule, carry, rows, first)
    repeated = _repeated if again else lax.scan

    def over(piece: SegmentGroup, body: Callable, begin, carry, rows):
        """All segments of a piece, one after the other: the carry after them, and what each recorded."""
        size, count = piece.length, piece.segments
        given = tuple(x[piece.start :][: count * size].reshape(count, size, *x.shape[1:]) for x in rows)
        firsts = begin + piece.start + size * jnp.arange(count, dtype=jnp.int32)
        return repeated(body, carry, (firsts, given))

    def segment(schedule: Schedule, carry, x):
        records, carry = launch(schedule, carry, x[1], x[0])
        return carry, records

    def long_stride(piece: SegmentGroup, carry, x):
        """Each part is recorded at its end, the others than the last for nothing."""
        seen: tuple = ()
        for part in piece.parts:
            body = functools.partial(segment, Schedule(part.length, 0, part.length))
            carry, seen = over(part, body, x[0], carry, x[1])
        return carry, tuple(record[-1] for record in seen)

    begin, records, seen = jnp.int32(0 if first is None else first), [], ()
    for piece in segment_groups(schedule, most):
        within = Schedule(piece.length, 0 if piece.recorded else piece.length, piece.stride)
        body = functools.partial(*((long_stride, piece) if piece.parts else (segment, within)))
        carry, seen = over(piece, body, begin, carry, rows)
        records += [seen] if piece.recorded else []
    merged = [[x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]) for x in group] for group in records or [seen]]
    return tuple(jnp.concatenate(parts) for parts in zip(*merged)), carry


def _repeated(body: Callable, carry, xs):
    """`lax.scan` whose gradient keeps about the square root of so many carries, and runs the rest again."""
    body = jax.checkpoint(body, prevent_cse=False)
    count = len(jax.tree.leaves(xs)[0])
    if count <= KEPT:
        return lax.scan(body, carry, xs)
    each = math.isqrt(count)
    grouped = count // each * each
    groups = jax.tree.map(lambda x: x[:grouped].reshape(-1, each, *x.shape[1:]), xs)
    group = jax.checkpoint(lambda carry, x: lax.scan(body, carry, x), prevent_cse=False)
    carry, made = lax.scan(group, carry, groups)
    carry, rest = lax.scan(body, carry, jax.tree.map(lambda x: x[grouped:], xs))
    made = jax.tree.map(lambda x, y: jnp.concatenate([x.reshape(-1, *x.shape[2:]), y]), made, rest)
    return carry, made
