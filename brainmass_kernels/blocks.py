"""Runs in blocks of records, which statistics reduce one after the other, or in parts with checkpoints in between."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ._jax import aligned
from .noise import StepNumber
from .recording import Reduction, Sampling
from .schedule import Schedule, SegmentGroup, segment_groups
from .signals import Chain, Signal, chain_of, root

#: A gradient stores the carry before each of at most so many blocks; of more, it reruns groups first.
STORED = 64


class _Entries(NamedTuple):
    """What a run records: names of stored quantities, and signals and statistics of the ``sources`` that it launches.

    ``arrays`` are the data of signals.
    """

    entries: Sequence[str | Reduction | Signal]
    sources: Sequence[str]
    sampling: Sampling
    arrays: Sequence[Any] = ()

    @property
    def chains(self) -> list[tuple[str, Chain]]:
        """The source of each entry that is no name, and what computes it."""
        return [(root(e), chain_of(e, self.sampling)) for e in self.entries if not isinstance(e, str)]

    def start(self, like) -> tuple:
        """The carry of each signal and statistic before the first record."""
        return tuple(chain.start(like) for _, chain in self.chains)

    def add(self, carries, records, first) -> tuple[tuple, list]:
        """The carries after a block of records, of which ``first`` came before, and what is stored of it."""
        by_name = dict(zip(self.sources, records, strict=True))
        pairs = zip(self.chains, carries, strict=True)
        found = [chain.add(carry, by_name[source], first, self.arrays) for (source, chain), carry in pairs]
        values = iter(found)
        stored = [by_name[entry] if isinstance(entry, str) else next(values)[1] for entry in self.entries]
        stored = [x for x, entry in zip(stored, self.entries) if not isinstance(entry, Reduction)]
        return tuple(carry for carry, _ in found), stored

    def finish(self, carries, blocks: Sequence[Sequence[Any]]) -> list:
        """The value of each entry, from the carries and what was stored of each block."""
        pairs = zip(self.chains, carries, strict=True)
        values = (chain.finish(carry) for (_, chain), carry in pairs if chain.last is not None)
        trajectories = map(jnp.concatenate, zip(*blocks, strict=True))
        return [next(values if isinstance(entry, Reduction) else trajectories) for entry in self.entries]


def run_in_blocks(
    schedule: Schedule, sampling: Sampling, entries: Sequence[str | Reduction | Signal], sources, launch: Callable,
    carry, rows, rerun: bool, arrays: Sequence[Any] = (),
):  # fmt: skip
    """Run all steps, reducing the records block by block.

    Parameters
    ----------
    schedule : of the whole run
    entries : names of quantities to be stored, signals, and statistics
    sources : names of the quantities that a launch records
    launch : ``(schedule, carry, rows, first) -> (records, carry)``, a run of some steps, of which the first has this
        `StepNumber`; or ``None``, 0
    carry : before the first step
    rows : of inputs, one a step, each ``(T, ...)``
    rerun : whether a gradient reruns blocks rather than stores what it needs of all of them
    arrays : the data of signals

    Returns
    -------
    the value of each of ``entries``, and the carry after the last step
    """
    recorder = _Entries(entries, sources, sampling, arrays)
    sums = aligned(recorder.start(carry.state[0]), carry)
    if sampling.block >= sampling.count:
        records, carry = launch(schedule, carry, rows, None)
        sums, stored = recorder.add(sums, records, 0)
        return recorder.finish(sums, [stored]), carry
    block, lead, every = sampling.block, schedule.lead, schedule.every
    whole, left = divmod(sampling.count, block)
    steps = block * every

    def stretch(carry, first: int, count: int, recorded: bool):
        """Some steps that are no whole block."""
        part = Schedule(count, 0 if recorded else count, every)
        return launch(part, carry, tuple(x[first : first + count] for x in rows), StepNumber.of(first))

    def one_block(carries, numbers_and_rows):
        (carry, sums), (number, first, rows) = carries, numbers_and_rows
        records, carry = launch(Schedule(steps, 0, every), carry, rows, first)
        sums, stored = recorder.add(sums, records, number * block)
        return (carry, sums), stored

    if lead:
        _, carry = stretch(carry, 0, lead, recorded=False)
    in_blocks = tuple(x[lead : lead + whole * steps].reshape(whole, steps, *x.shape[1:]) for x in rows)
    scan = _scan_with_reruns if rerun else lax.scan
    firsts = StepNumber.of(lead) + StepNumber.multiples(steps, whole)
    (carry, sums), stored = scan(one_block, (carry, sums), (jnp.arange(whole, dtype=jnp.int32), firsts, in_blocks))
    blocks = [[x.reshape(-1, *x.shape[2:]) for x in stored]]
    done = lead + whole * steps
    if left:
        records, carry = stretch(carry, done, left * every, recorded=True)
        sums, stored = recorder.add(sums, records, whole * block)
        blocks.append(stored)
        done += left * every
    if done < schedule.steps:
        _, carry = stretch(carry, done, schedule.steps - done, recorded=False)
    return recorder.finish(sums, blocks), carry


def run_in_parts(launch: Callable, most: int, rerun: bool, schedule: Schedule, carry, rows, first):
    """A launch in parts of at most ``most`` steps; a gradient stores the carries in between.

    Parameters
    ----------
    launch : as of `run_in_blocks`, in which it can take its place
    most : steps of a part
    rerun : whether a gradient reruns parts rather than stores what it needs of all of them
    schedule, carry, rows, first : of the launch
    """
    if schedule.steps <= most:
        return launch(schedule, carry, rows, first)
    scan = _scan_with_reruns if rerun else lax.scan

    def over(group: SegmentGroup, body: Callable, begin, carry, rows):
        """All segments of a group, one after the other: the carry after them, and the records of each."""
        size, count = group.length, group.segments
        in_segments = tuple(x[group.start :][: count * size].reshape(count, size, *x.shape[1:]) for x in rows)
        firsts = begin + StepNumber.of(group.start) + StepNumber.multiples(size, count)
        return scan(body, carry, (firsts, in_segments))

    def segment(schedule: Schedule, carry, first_and_rows):
        first, rows = first_and_rows
        records, carry = launch(schedule, carry, rows, first)
        return carry, records

    def long_stride(group: SegmentGroup, carry, first_and_rows):
        """Each part records its end, though only the record of the last one is used."""
        first, rows = first_and_rows
        records: tuple = ()
        for part in group.parts:
            body = functools.partial(segment, Schedule(part.length, 0, part.length))
            carry, records = over(part, body, first, carry, rows)
        return carry, tuple(record[-1] for record in records)

    begin, recorded, records = StepNumber.of(0) if first is None else first, [], ()
    for group in segment_groups(schedule, most):
        inner = Schedule(group.length, 0 if group.recorded else group.length, group.stride)
        body = functools.partial(*((long_stride, group) if group.parts else (segment, inner)))
        carry, records = over(group, body, begin, carry, rows)
        recorded += [records] if group.recorded else []
    merged = [[x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]) for x in group] for group in recorded or [records]]
    return tuple(jnp.concatenate(parts) for parts in zip(*merged)), carry


def _scan_with_reruns(body: Callable, carry, xs):
    """`lax.scan` whose gradient stores about the square root of so many carries, and reruns the rest."""
    body = jax.checkpoint(body, prevent_cse=False)
    count = len(jax.tree.leaves(xs)[0])
    if count <= STORED:
        return lax.scan(body, carry, xs)
    each = math.isqrt(count)
    grouped = count // each * each
    groups = jax.tree.map(lambda x: x[:grouped].reshape(-1, each, *x.shape[1:]), xs)
    group = jax.checkpoint(lambda carry, x: lax.scan(body, carry, x), prevent_cse=False)
    carry, ys = lax.scan(group, carry, groups)
    carry, rest = lax.scan(body, carry, jax.tree.map(lambda x: x[grouped:], xs))
    ys = jax.tree.map(lambda x, y: jnp.concatenate([x.reshape(-1, *x.shape[2:]), y]), ys, rest)
    return carry, ys
