"""The steps of a run, its records, and its segments between checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import NamedTuple

# Steps that a 32-bit counter counts, and steps of each part in which a longer run is taken.
COUNTED = 2**31 - 1
PART = 2**24


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The steps of a run, and after which of them the observables are recorded.

    Record ``k`` is taken at the end of step ``lead + (k + 1) * every`` (steps count from 1).

    Attributes
    ----------
    steps : in all
    lead : of the transient, before recording begins
    every : steps from one record to the next
    """

    steps: int
    lead: int = 0
    every: int = 1

    @property
    def count(self) -> int:
        """The number of records."""
        return max(0, self.steps - self.lead) // self.every


class SegmentGroup(NamedTuple):
    """Equal segments of a run: each has ``strides`` strides of ``stride`` steps, recorded after each stride or never.

    A stride longer than a segment is divided into ``parts``, and is the only one of its segment.
    """

    start: int
    segments: int
    strides: int
    stride: int
    recorded: bool
    parts: tuple[SegmentGroup, ...] = ()

    @property
    def length(self) -> int:
        return self.strides * self.stride

    @property
    def records(self) -> int:
        """Records of one segment."""
        return self.strides if self.recorded else 0


def segment_groups(schedule: Schedule, segment: int) -> Iterator[SegmentGroup]:
    """Cut a run into groups whose segments have at most ``segment`` steps: transient, recorded part, rest."""
    lead = min(schedule.lead, schedule.steps)
    yield from _unrecorded(0, lead, segment)
    count, every = schedule.count, schedule.every
    if every > segment and count:
        yield SegmentGroup(lead, count, 1, every, True, tuple(_unrecorded(0, every, segment)))
    else:
        each = max(1, segment // every)
        full = count // each
        if full:
            yield SegmentGroup(lead, full, each, every, True)
        if count % each:
            yield SegmentGroup(lead + full * each * every, 1, count % each, every, True)
    recorded = lead + count * every
    yield from _unrecorded(recorded, schedule.steps - recorded, segment)


def _unrecorded(start: int, steps: int, segment: int) -> Iterator[SegmentGroup]:
    full = steps // segment
    if full:
        yield SegmentGroup(start, full, 1, segment, False)
    if steps % segment:
        yield SegmentGroup(start + full * segment, 1, 1, steps % segment, False)


class Body(NamedTuple):
    """The loop body of a segment, in which several steps are unrolled.

    Attributes
    ----------
    strides : in one body; 0 if a stride takes several bodies
    steps : in one body; the remainder of a segment has a shorter one
    even : whether every body begins an even number of steps after the segment
    """

    strides: int
    steps: int
    even: bool

    @classmethod
    def of(cls, group: SegmentGroup, most: int, noisy: bool) -> Body:
        """At most ``most`` steps; if possible an even number of them where a step is ``noisy``."""
        stride = group.stride
        if stride <= most:
            several = min(most // stride, group.strides)
            several -= several % 2 if noisy and stride % 2 and 1 < several < group.strides else 0
            return cls(several, several * stride, several * stride % 2 == 0 or several == group.strides)
        size = even_share(stride, most, 2 if noisy else 1)
        return cls(0, size, size % 2 == 0 and (stride % 2 == 0 or group.strides == 1))


def even_share(n: int, most: int, unit: int = 1) -> int:
    """A divisor of ``n`` that is a multiple of ``unit`` and little less than ``most``; without one, about ``most``."""
    most = most - most % unit or most
    return next((d for d in range(most, most // 3, -1) if n % d == 0 and d % unit == 0), most)


def parity_in(parity: int | None, group: SegmentGroup) -> int | None:
    """The parity of the first step of each segment of a group, from that of the first group; ``None`` if unknown."""
    if parity is None or (group.segments > 1 and group.length % 2):
        return None
    return (parity + group.start) % 2


def segments_in(groups: Sequence[SegmentGroup]) -> int:
    return sum(group.segments for group in groups)


def nested_segments(group: SegmentGroup, most: int) -> tuple[SegmentGroup, ...]:
    """A segment that is too long to be reversed at once, in groups of at most ``most`` steps."""
    if group.parts:
        return group.parts
    every = group.stride if group.recorded else group.length + 1
    return tuple(segment_groups(Schedule(group.length, 0, every), most))


def checkpoint_levels(parts: Sequence[SegmentGroup], most: int) -> list[int]:
    """The number of states of each further level of checkpoints, from that within these groups on."""
    levels: list[int] = []
    for group in parts:
        if group.parts or group.length > most:
            inner = nested_segments(group, most)
            below = [segments_in(inner), *checkpoint_levels(inner, most)]
            levels = [max(pair) for pair in zip_longest(levels, below, fillvalue=0)]
    return levels
