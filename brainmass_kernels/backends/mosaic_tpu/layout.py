"""How a run lies on a TPU: lanes in blocks of ``(rows, 128)``, time in chunks."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from ..._jax import tensor_cores
from ...schedule import Schedule, even_share
from ..base import Loop

# Elements of a row of a vector register.
COLUMNS = 128
# VMEM that a kernel plans to use: of the 16 MiB that the compiler grants on every chip, what spills leave over.
BUDGET = 13 * 2**20
# Steps unrolled into one body, so that independent operations of neighbouring steps overlap.
UNROLL = 20
# Longer chunks would only hide a smaller share of the 0.35 us that a grid step costs.
LONGEST = 1024
# One step of a block of so many rows, in bundles, forward and back (benchmarks/ledger.py counts them): with one
# vector register a value, most wait for each other.
FORWARD_BUNDLES = {8: 22.0, 16: 28.0, 24: 40.0, 32: 52.0}
ADJOINT_BUNDLES = {8: 40.0, 16: 63.0, 24: 87.0, 32: 115.0}


def div(n, by: int):
    """``n // by`` of a traced number from 0 on; a bare ``by`` would be 64 bits wide where these are enabled."""
    return lax.div(n, jnp.int32(by))


def rem(n, by: int):
    return lax.rem(n, jnp.int32(by))


def round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def _downward(first, last, body, carry):
    """``lax.fori_loop`` from ``last - 1`` down to ``first``."""
    return lax.fori_loop(jnp.int32(0), last - first, lambda i, c: body(last - 1 - i, c), carry)


# Time ---------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TimeChunks:
    """Time cut into chunks of one size, whose ends meet the records.

    What the schedule leaves of a chunk is filled up with phantom steps, which no kernel takes. Here are 12 steps in
    chunks of 3, the first 3 steps a transient, then a record (R) after each 5; p, f and b are phantom steps::

        group    |       0       |       1       |       2       |
        chunk    |   0   |   1   |   2   |   3   |   4   |   5   |
        step     | p f f | 0 1 2 | p 3 4 | 5 6 7 | p 8 9 |10 11 b|
        record                                 R

    ``pad`` of them (p) begin each group, so that the steps between two records fill whole chunks; ``front`` (f) more
    are before the first step, so that the transient ends where a group does; the rest (b) is behind the last step.

    Attributes
    ----------
    steps, lead : as in `Schedule`
    stride : steps from one place where a record may be taken to the next, within a chunk
    strides : strides in a chunk
    parts : chunks of a group: 1 unless the steps between two records are too many for one chunk
    group : steps in a group, its ``pad`` left out
    body : steps unrolled; a multiple of ``stride`` if that is short, else ``stride`` is walked in bodies
    """

    steps: int
    lead: int
    stride: int
    strides: int
    parts: int
    group: int
    body: int

    @property
    def size(self) -> int:
        """Steps of a chunk."""
        return self.stride * self.strides

    @property
    def pad(self) -> int:
        return self.parts * self.size - self.group

    @property
    def front(self) -> int:
        return -self.lead % self.group

    @property
    def groups(self) -> int:
        return -(-(self.front + self.steps) // self.group)

    @property
    def chunks(self) -> int:
        return self.groups * self.parts

    @property
    def positions(self) -> int:
        """Steps of all chunks, phantom ones included."""
        return self.chunks * self.size

    @property
    def lead_groups(self) -> int:
        return (self.front + self.lead) // self.group

    @property
    def record_blocks(self) -> int:
        return max(1, self.groups - self.lead_groups)

    @property
    def parity(self) -> int | None:
        """That of the number of the first step of any chunk, if all have the same; phantom steps have numbers too."""
        return None if self.group % 2 or self.size % 2 else (self.pad + self.front) % 2

    def chunk_of(self, step: int) -> int:
        group, within = divmod(step + self.front, self.group)
        return group * self.parts + (within + self.pad) // self.size

    def bounds(self, chunk):
        """The step number at the chunk's start, and the chunk's first real position and the one after its last."""
        part = rem(chunk, self.parts)
        start = div(chunk, self.parts) * self.group + part * self.size - self.pad - self.front
        first = jnp.clip(jnp.maximum(self.pad - part * self.size, -start), 0, self.size)
        return start, first, jnp.maximum(jnp.clip(self.steps - start, 0, self.size), first)

    def record_block(self, chunk):
        return jnp.maximum(div(chunk, self.parts) - self.lead_groups, 0)

    def records(self, chunk):
        """Whether records are taken in a chunk."""
        last = rem(chunk, self.parts) == self.parts - 1
        return last & (div(chunk, self.parts) >= self.lead_groups)

    def spread(self, x):
        """``(steps, ...)`` with the phantom steps added, zero, ``(positions, ...)``."""
        behind = self.groups * self.group - self.front - self.steps
        rest = [(0, 0)] * (x.ndim - 1)
        x = jnp.pad(x, [(self.front, behind), *rest])
        if self.pad:
            x = x.reshape(self.groups, self.group, *x.shape[1:])
            x = jnp.pad(x, [(0, 0), (self.pad, 0), *rest])
            x = x.reshape(self.positions, *x.shape[2:])
        return x

    def gather(self, x):
        """``(positions, ...)`` without the phantom steps, ``(steps, ...)``."""
        if self.pad:
            x = x.reshape(self.groups, self.parts * self.size, *x.shape[1:])[:, self.pad :]
            x = x.reshape(self.groups * self.group, *x.shape[2:])
        return x[self.front : self.front + self.steps]

    def walk(
        self, first, last, step: Callable, record: Callable, carry, normals: Callable | None = None,
        backwards: bool = False,
    ):  # fmt: skip
        """Take the steps ``first <= position < last`` of a chunk, or walk back from the last to the first.

        Parameters
        ----------
        step : ``(position, draw, carry) -> carry``; the normals of the step are ``draw()``
        record : ``(k, on, carry) -> carry`` takes the chunk's record ``k``, if ``on``: after the step that it follows,
            or backwards before that step
        normals : ``(position, parity) -> Normals`` of the steps from there on; by default nothing is drawn
        """
        return _StepLoop(self, normals or _no_normals, step, record, backwards).run(first, last, carry)


def _no_normals(position, parity=None) -> Callable[[int], tuple]:
    return lambda j: ()


class _StepLoop(NamedTuple):
    """What `TimeChunks.walk` does with its arguments."""

    time: TimeChunks
    normals: Callable
    step: Callable
    record: Callable
    backwards: bool

    def run(self, first, last, carry):
        size, stride = self.time.body, self.time.stride
        if size < stride:
            return self.spans(
                [(self.long_stride(first, last), div(first, stride), div(last + stride - 1, stride))], carry
            )
        begin, end = div(first + size - 1, size), div(last, size)
        parity = self.time.parity if size % 2 == 0 else None
        bodies = functools.partial(self.body, parity, lambda i: i * size, lambda i: i * (size // stride))
        spans = [
            (self.recorded_step, first, jnp.minimum(begin * size, last)),
            (bodies, begin, end),
            (self.recorded_step, jnp.maximum(begin, end) * size, last),
        ]
        return self.spans(spans, carry)

    def spans(self, spans, carry):
        """``carry = body(i, carry)`` for the numbers of each ``(body, begin, end)``."""
        for body, begin, end in reversed(spans) if self.backwards else spans:
            carry = (_downward if self.backwards else lax.fori_loop)(begin, end, body, carry)
        return carry

    def ordered(self, step, record, carry):
        return step(record(carry)) if self.backwards else record(step(carry))

    def single_step(self, j, carry):
        return self.step(j, functools.partial(self.normals(j), 0), carry)

    def recorded_step(self, j, carry):
        def record(carry):
            k = jnp.maximum(div(j + 1, self.time.stride) - 1, 0)
            return self.record(k, rem(j + 1, self.time.stride) == 0, carry)

        return self.ordered(functools.partial(self.single_step, j), record, carry)

    def body(self, parity, start, records, i, carry):
        """Body ``i`` of several steps, from ``start(i)`` on, and its records from ``records(i)`` on."""
        draws = self.normals(start(i), parity)
        for j in reversed(range(self.time.body)) if self.backwards else range(self.time.body):
            k, left = divmod(j + 1, self.time.stride)

            def step(carry, j=j):
                return self.step(start(i) + j, functools.partial(draws, j), carry)

            def record(carry, k=k, left=left):
                return carry if left else self.record(records(i) + k - 1, True, carry)

            carry = self.ordered(step, record, carry)
        return carry

    def long_stride(self, first, last):
        """A stride of several bodies, which begins at its first real step, as a function of its number."""
        time = self.time
        even = not any(n % 2 for n in (time.pad, time.front, time.stride, time.body))

        def stride(s, carry):
            a, b = jnp.maximum(first, s * time.stride), jnp.minimum(last, (s + 1) * time.stride)
            bodies = div(b - a, time.body)
            body = functools.partial(self.body, time.parity if even else None, lambda i: a + i * time.body, None)
            spans = [(body, jnp.int32(0), bodies), (self.single_step, a + bodies * time.body, b)]
            steps = functools.partial(self.spans, spans)
            return self.ordered(steps, lambda carry: self.record(s, b == (s + 1) * time.stride, carry), carry)

        return stride


def chunk_time(
    schedule: Schedule, most: int, wish: int | None = None, unroll: int = UNROLL, noisy: bool = False
) -> TimeChunks:
    """Cut time into chunks of at most ``most`` steps, of about ``wish`` steps if that is given.

    Bodies of a ``noisy`` step are even where they can be.
    """
    wish = min(wish or most, most)
    every, lead = schedule.every, schedule.lead
    if schedule.count == 0:
        every, lead = round_up(min(wish, schedule.steps), unroll), 0
        return TimeChunks(schedule.steps, lead, every, 1, 1, every, min(unroll, every))
    if every > most:
        parts = -(-every // wish)
        size = round_up(-(-every // parts), unroll)
        return TimeChunks(schedule.steps, lead, size, 1, -(-every // size), every, unroll)
    if every > unroll:
        unit, body = every, even_share(every, unroll, 2 if noisy else 1)
    else:
        unit = body = every * max(1, unroll // every)
    # Even shares: a last chunk with a few steps costs as much to start as a full one.
    total = (-lead % unit) + schedule.steps
    count = -(-total // max(unit, min(round_up(wish, unit), most // unit * unit)))
    strides = round_up(-(-total // count), unit) // every
    return TimeChunks(schedule.steps, lead, every, strides, 1, every * strides, body)


def _unroll(loop: Loop) -> tuple[int, bool]:
    """Steps of a body, and whether they are better even: two steps' normals are drawn at a time.

    The interpreter gains nothing by unrolled steps, and compiles each of them slowly.
    """
    return 2 if loop.interpret else UNROLL, loop.n_normals > 0


# Lanes --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a run is laid out on the chip.

    Attributes
    ----------
    lanes : lanes of the run
    rows : rows of a block, each of 128 lanes
    blocks : how many blocks
    time : TimeChunks
    coefs_in_lanes, inputs_in_lanes : for each coefficient and input, whether it differs from lane to lane
    """

    lanes: int
    rows: int
    blocks: int
    time: TimeChunks
    coefs_in_lanes: tuple[bool, ...]
    inputs_in_lanes: tuple[bool, ...]

    @classmethod
    def of(cls, coefs, inputs, lanes: int, rows: int, time: TimeChunks) -> Plan:
        return cls(lanes, rows, -(-lanes // (rows * COLUMNS)), time, *in_lanes(coefs, inputs))

    @property
    def tile(self) -> tuple[int, int]:
        """Shape of a value of all lanes of a block."""
        return self.rows, COLUMNS

    @property
    def wide(self) -> tuple[int, int]:
        """Shape of a value of all blocks."""
        return self.blocks * self.rows, COLUMNS

    def lay(self, x, mode: str = "edge"):
        """``(..., L)`` as ``(..., *wide)``; lanes beyond L repeat the last, so that they stay finite."""
        beyond = self.blocks * self.rows * COLUMNS - x.shape[-1]
        if beyond:
            x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, beyond)], mode=mode)
        return x.reshape(*x.shape[:-1], *self.wide)

    def unlay(self, x):
        """The inverse of `lay`."""
        return x.reshape(*x.shape[:-2], -1)[..., : self.lanes]


@dataclasses.dataclass(frozen=True)
class NetworkPlan(Plan):
    """A `Plan` whose blocks are 128 networks, a row for each region."""

    regions: int = 1

    @classmethod
    def of_networks(cls, regions: int, rows: int, coefs, inputs, lanes: int, time: TimeChunks) -> NetworkPlan:
        return cls(lanes, rows, -(-lanes // (regions * COLUMNS)), time, *in_lanes(coefs, inputs), regions)

    def lay(self, x, mode: str = "edge"):
        """``(..., L)`` as ``(..., *wide)``; what fills up repeats the last region and network."""
        front, networks = x.shape[:-1], x.shape[-1] // self.regions
        x = x.reshape(*front, networks, self.regions)
        more = [(0, self.blocks * COLUMNS - networks), (0, self.rows - self.regions)]
        x = jnp.pad(x, [(0, 0)] * len(front) + more, mode=mode)
        x = jnp.swapaxes(x.reshape(*front, self.blocks, COLUMNS, self.rows), -1, -2)
        return x.reshape(*front, *self.wide)

    def unlay(self, x):
        front = x.shape[:-2]
        x = jnp.swapaxes(x.reshape(*front, self.blocks, self.rows, COLUMNS), -1, -2)
        x = x[..., : self.regions].reshape(*front, self.blocks * COLUMNS * self.regions)
        return x[..., : self.lanes]

    def lay_networks(self, x):
        """``(..., networks)`` as ``(..., blocks * 128)``."""
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, self.blocks * COLUMNS - x.shape[-1])], mode="edge")


def in_lanes(coefs, inputs) -> tuple[tuple[bool, ...], tuple[bool, ...]]:
    """For each coefficient and each input, whether it differs from lane to lane."""
    return tuple(jnp.ndim(c) == 1 for c in coefs), tuple(jnp.ndim(u) == 2 for u in inputs)


def block_rows(lanes: int, cost: dict[int, float], fits: Callable[[int], bool]) -> int:
    """Rows a block that take the least time of those that fit; all cores of a device take blocks."""
    eights, cores = -(-lanes // (8 * COLUMNS)), tensor_cores()

    def duration(rows: int) -> float:
        blocks = -(-eights * 8 // rows)
        return -(-blocks // cores) * cost[rows]

    return min((rows for rows in cost if rows == 8 or fits(rows)), key=lambda rows: (duration(rows), rows))


def plan_run(loop: Loop, coefs, inputs, lanes: int) -> Plan:
    """Lay out a run without checkpoints."""
    streams = sum(jnp.ndim(u) == 2 for u in inputs)
    constant = 2 * (len(coefs) + 2 * loop.n_state + 2)
    a_step = 2 * (streams + loop.n_observables / loop.schedule.every)

    def most(rows):
        return min(LONGEST, int((BUDGET / (4 * rows * COLUMNS) - constant) / (a_step or 1)))

    rows = block_rows(lanes, FORWARD_BUNDLES, lambda rows: most(rows) >= min(64, loop.schedule.steps))
    return Plan.of(coefs, inputs, lanes, rows, chunk_time(loop.schedule, max(most(rows), 1), None, *_unroll(loop)))


class ReverseMemory(NamedTuple):
    """Values a lane that a reverse pass has in VMEM: cotangents of coefficients, and all for each step of a chunk."""

    coefs: int
    a_step: float


def plan_checkpoints(
    loop: Loop, coefs, inputs, lanes: int, checkpoint_every: int, memory: ReverseMemory | None = None
) -> Plan:
    """Lay out a run with checkpoints, or the reverse pass over one, with its ``memory``.

    The chunks depend on the loop only: under `jax.vmap` the two may have other lanes, and other arguments in lanes.
    """
    constant = 2 * (2 * loop.n_coefs + 5 * loop.n_state + 2)
    a_step = 2 * loop.n_inputs + 2 * loop.n_observables / loop.schedule.every
    # A guess at what the pullbacks, which a forward run does not know, need of a step.
    guess = a_step + 2 * loop.n_inputs + loop.n_state + loop.n_normals + 2
    most = (BUDGET / (4 * 8 * COLUMNS) - constant) / guess
    time = chunk_time(loop.schedule, max(1, min(LONGEST, int(most))), checkpoint_every, *_unroll(loop))
    cost = FORWARD_BUNDLES
    if memory:
        cost, constant = ADJOINT_BUNDLES, 2 * (loop.n_coefs + memory.coefs + 4 * loop.n_state + 2)
        a_step = memory.a_step
    rows = block_rows(lanes, cost, lambda rows: 4 * rows * COLUMNS * (constant + time.size * a_step) <= BUDGET)
    return Plan.of(coefs, inputs, lanes, rows, time)


def least_bytes(loop: Loop) -> int:
    """VMEM of the smallest block."""
    return 4 * 8 * COLUMNS * 2 * (2 * loop.n_coefs + 5 * loop.n_state + 2 * loop.n_inputs + loop.n_observables)
