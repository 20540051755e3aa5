"""Networks on TPUs: regions in sublanes, networks in lanes.

A block is 128 networks with all their regions, ``(regions padded to 8 or to a multiple of 16, 128)`` for each value; of
fewer networks the other lanes idle. What the regions sent lies in VMEM, of each region its times one after the other,
so that several steps of one region are one load wherever they begin. That store slides: each step is one row further,
over the oldest row of the region behind it, and every few hundred steps all of it is moved back.

The sum has two parts. Connections of few distinct delays are products of matrices, one for each delay. Where there are
many, those of a tile of steps or more read only what was sent before the tile begins: their sums are made
for the whole tile, of each connection one multiply-add of the times of one region. No gather is in either.

A run that a gradient will follow keeps the sums. They are an input like others to the adjoint, whose replay therefore
knows no network; its way back sends the cotangents of the sums through the transposed connections, by the same code on
a clock that runs backwards.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..errors import Unsupported
from ..pointwise import SplitPullback
from .base import Adjoint, Carry, Connections, Cotangents, Coupling, Forward, Loop, Operands, Pullbacks, Wanted
from .mosaic_tpu import BUDGET, LANES, LONGEST, Plan, TimeChunks, _arguments, _Call, _div, _rem, chunk_time, sum_series
from .pallas import added, apply, fill, merged, operations, parted, read, write

# Most VMEM that is asked for: of the 64 MiB of a core of v5p and tpu7x (v5e and v6e have 128, v4 has 16).
MOST = 52 * 2**20
# VMEM that streams get where what a network holds leaves less of the ordinary budget.
STREAMS = 6 * 2**20
# What spills, and what the compiler keeps for itself.
MARGIN = 3 * 2**20
# Connections of a region that are summed in one body; lists are filled up to a multiple with ones of weight 0.
TOGETHER = 16
# Bundles a step on v5e, from the compiled schedule: of a product, for each 16 rows of regions; of a connection by
# itself; and of a body of connections summed for a tile, by the steps of the tile.
_PRODUCT = 30.0
_SINGLE = 8.0
_BODY = {8: 40.0, 16: 40.0, 32: 46.0}


class Tile(NamedTuple):
    """Connections whose sums are made for some steps together.

    Attributes
    ----------
    steps : how many, a power of two from 8 on
    below : their delays are at least ``steps``, and below this
    slots : length of their list, filled up
    """

    steps: int
    below: int
    slots: int


class Form(NamedTuple):
    """How the connections of a network are summed, and where what was sent lies: all static.

    The value that region ``j`` sent at step ``n`` is in row ``j * stride + place(n)`` of the store.

    Attributes
    ----------
    regions, rows : regions, and with those that fill up the vector registers
    depth : steps of the longest delay
    stride : rows of the store from one region to the next
    slide : steps after which the store is moved back
    tiles : connections that are summed for several steps together
    products : delays of which a matrix has all other connections
    singles : how many connections are left, each by itself
    """

    regions: int
    rows: int
    depth: int
    stride: int
    slide: int
    tiles: tuple[Tile, ...]
    products: tuple[int, ...]
    singles: int

    @classmethod
    def of(cls, coupling: Coupling) -> Form:
        regions, depth = coupling.regions, coupling.depth
        rows = 8 if regions <= 8 else _up(regions, 16)
        possible = [steps for steps in _BODY if steps <= depth]
        chosen = [steps for n in range(len(possible) + 1) for steps in itertools.combinations(possible, n)]
        _, tiles, products, singles = min(_way(coupling, steps, rows) for steps in chosen)
        stride = _up(depth + 1, 8) if depth else 1
        slide = _up(max(stride, 64), 64) if depth else 1
        return cls(regions, rows, depth, stride, slide, tiles, products, singles)

    @property
    def store(self) -> int:
        """Rows of the store."""
        return self.rows * self.stride + (self.slide if self.depth else 0)

    def place(self, n):
        """Where step ``n`` is, in the times of each region."""
        return self.depth + _rem(n, self.slide) if self.depth else jnp.int32(0)

    def last(self, steps: int) -> int:
        """Where the history after a run begins."""
        return (steps - 1) % self.slide + 1

    def bytes(self, batched: bool) -> int:
        """VMEM of the store, the sums of a tile, the lists and the matrices."""
        matrix = self.regions * self.rows * LANES if batched else self.rows * _up(self.rows, LANES)
        lists = sum(tile.slots + self.rows * tile.steps for tile in self.tiles)
        return 4 * ((self.store + lists + _up(self.singles, 8)) * LANES + len(self.products) * matrix)


def _up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def _way(coupling: Coupling, steps: tuple[int, ...], rows: int):
    """With tiles of these steps: bundles a step, the tiles, delays that products are for, single connections."""
    delays, regions = coupling.delays, coupling.regions
    tiles, cost = [], 0.0
    for size, below in zip(steps, (*steps[1:], len(delays))):
        count = sum(delays[size:below])
        tiles.append(Tile(size, below, _up(count + regions * (TOGETHER - 1), TOGETHER)))
        # Half of a list's last body is empty.
        cost += (count / TOGETHER + regions / 2) * _BODY[size] / size
    near = {delay: count for delay, count in enumerate(delays[: (*steps, len(delays))[0]]) if count}
    a_product = _PRODUCT * rows / 16
    products = tuple(delay for delay, count in near.items() if count * _SINGLE > a_product)
    singles = sum(count for delay, count in near.items() if delay not in products)
    return cost + len(products) * a_product + singles * _SINGLE, tuple(tiles), products, singles


@dataclasses.dataclass(frozen=True)
class Layout(Plan):
    """A `Plan` whose blocks are 128 networks, a row for each region."""

    regions: int = 1

    @classmethod
    def network(cls, form: Form, coefs, inputs, lanes: int, cut: TimeChunks) -> Layout:
        in_lanes = tuple(jnp.ndim(c) == 1 for c in coefs), tuple(jnp.ndim(u) == 2 for u in inputs)
        return cls(lanes, form.rows, -(-lanes // (form.regions * LANES)), cut, *in_lanes, form.regions)

    def lay(self, x, mode: str = "edge"):
        """``(..., L)`` as ``(..., blocks * rows, 128)``; what fills up repeats the last region and network."""
        front, networks = x.shape[:-1], x.shape[-1] // self.regions
        x = x.reshape(*front, networks, self.regions)
        more = [(0, self.blocks * LANES - networks), (0, self.rows - self.regions)]
        x = jnp.pad(x, [(0, 0)] * len(front) + more, mode=mode)
        x = jnp.swapaxes(x.reshape(*front, self.blocks, LANES, self.rows), -1, -2)
        return x.reshape(*front, self.blocks * self.rows, LANES)

    def unlay(self, x):
        """The inverse of `lay`."""
        front = x.shape[:-2]
        x = jnp.swapaxes(x.reshape(*front, self.blocks, self.rows, LANES), -1, -2)
        x = x[..., : self.regions].reshape(*front, self.blocks * LANES * self.regions)
        return x[..., : self.lanes]

    def lay_networks(self, x):
        """``(..., networks)`` as ``(..., blocks * 128)``."""
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, self.blocks * LANES - x.shape[-1])], mode="edge")


def need(loop: Loop) -> int:
    """Bytes of VMEM that a network needs at the least, with one set of weights for all."""
    form = Form.of(_coupling(loop))
    a_lane = 2 * (3 * loop.n_coefs + 5 * loop.n_state + 2 * loop.n_inputs + loop.n_observables)
    return form.bytes(False) + 4 * form.rows * LANES * a_lane


def unsupported(loop: Loop) -> str | None:
    """Why a network cannot run, or ``None`` if it can."""
    if (bytes_needed := need(loop)) <= MOST:
        return None
    regions, depth = _coupling(loop)[:2]
    return (
        f"128 networks of {regions} regions that go back {depth} steps need {bytes_needed:,} bytes of VMEM, and it "
        f"asks for {MOST:,}: a longer dt, a higher speed of conduction or fewer regions would fit"
    )


def _coupling(loop: Loop) -> Coupling:
    assert loop.coupling is not None
    return loop.coupling


# Planning -----------------------------------------------------------------------------------------------------------


def _plan(loop: Loop, form: Form, coefs, inputs, lanes: int, checkpoint_every: int | None) -> Layout:
    """Lay out a run. The chunks of one with checkpoints depend on the loop only, as those of `mosaic_tpu` do."""
    a_tile, still = 4 * form.rows * LANES, 2 * (3 * loop.n_coefs + 5 * loop.n_state + 2)
    if checkpoint_every is None:
        streams = sum(jnp.ndim(u) == 2 for u in inputs)
        a_step = 2 * (streams + loop.n_observables / loop.schedule.every)
    else:
        # Inputs and their cotangents; the sums, their cotangents, what was sent, the end's cotangents; what is kept.
        a_step = 4 * loop.n_inputs + 2 * loop.n_observables / loop.schedule.every + 8
        a_step += loop.n_state + loop.n_normals + 4
    room = max(BUDGET - form.bytes(False) - still * a_tile, STREAMS)
    most = int(min(LONGEST, room / (a_tile * a_step))) if a_step else LONGEST
    cut = chunk_time(loop.schedule, max(1, most), checkpoint_every, unroll=1)
    return Layout.network(form, coefs, inputs, lanes, cut)


# Connections --------------------------------------------------------------------------------------------------------


def _give_connections(call: _Call, plan: Layout, form: Form, connections: Connections, backwards: bool) -> None:
    """The connections as a kernel takes them: matrices by delay, and lists by region.

    Backwards they go from targets to sources, and regions that fill up get nothing; forwards they get what the last
    region gets, as they are its copies.
    """
    batched = connections.weights.ndim == 3
    still = pl.Buffered(1)

    def in_lanes(weights):
        return plan.lay_networks(weights) if batched else jnp.broadcast_to(weights[:, None], (len(weights), LANES))

    def by_connection(name: str, weights):
        block = pl.BlockSpec((len(weights), LANES), lambda b, c: (0, b if batched else 0), pipeline_mode=still)
        call.give(name, [in_lanes(weights)], block)

    if form.products:
        matrices = _matrices(form, connections, backwards)
        if batched:
            matrices = plan.lay_networks(jnp.swapaxes(matrices, 1, 2))
            shape = len(form.products), form.regions, form.rows, LANES
            block = pl.BlockSpec(shape, lambda b, c: (0, 0, 0, b), pipeline_mode=still)
        else:
            matrices = jnp.pad(matrices, [(0, 0), (0, 0), (0, form.rows - form.regions)])
            block = pl.BlockSpec(matrices.shape, lambda b, c: (0, 0, 0), pipeline_mode=still)
        call.give("matrices", [matrices], block)
    if form.singles:
        targets, offsets, weights = _singles(form, connections, backwards)
        call.give("singles", [targets, offsets], pl.BlockSpec(memory_space=pltpu.SMEM))
        by_connection("single_weights", weights)
    for tile in form.tiles:
        spans, offsets, weights = _lists(form, tile, connections, backwards)
        call.give(f"list_{tile.steps}", [spans, offsets], pl.BlockSpec(memory_space=pltpu.SMEM))
        by_connection(f"weights_{tile.steps}", weights)
        call.hold(f"sums_{tile.steps}", 1, (form.rows * tile.steps, LANES))
    call.hold("store", 1, (form.store, LANES))


def _matrices(form: Form, connections: Connections, backwards: bool):
    """A matrix of each delay that has one, ``(products, rows, N)`` or ``(products, rows, N, networks)``."""
    one = connections.weights[None]
    delays = jnp.asarray(form.products, jnp.int32).reshape(-1, *(1,) * connections.weights.ndim)
    steps = connections.steps.reshape(1, *connections.steps.shape, *(1,) * (connections.weights.ndim - 2))
    matrices = jnp.where(steps == delays, one, jnp.zeros_like(one))
    matrices = jnp.swapaxes(matrices, 1, 2) if backwards else matrices
    fill_up = [(0, 0), (0, form.rows - form.regions)] + [(0, 0)] * (connections.weights.ndim - 1)
    return jnp.pad(matrices, fill_up, mode="constant" if backwards else "edge")


def _singles(form: Form, connections: Connections, backwards: bool):
    """Of each single connection the target, where it reads, less the place of the present, and the weight."""
    to, of = connections.edges[::-1] if backwards else connections.edges
    delays = connections.steps[tuple(connections.edges)]
    alone = np.ones(form.depth + 1, bool)
    alone[list(form.products)] = False
    alone[form.tiles[0].steps if form.tiles else form.depth + 1 :] = False
    (which,) = jnp.nonzero(jnp.asarray(alone)[delays], size=form.singles)
    to, of = to[which], of[which]
    return to, of * form.stride - delays[which], connections.weights[tuple(connections.edges)][which]


def _lists(form: Form, tile: Tile, connections: Connections, backwards: bool):
    """The connections of a tile, by the region they are summed for.

    Returns where the list of each region begins and ends, in bodies, ``(2 * rows,)``; where each connection reads, less
    the place of the present, ``(slots,)``; and their weights, ``(slots,)`` or ``(slots, networks)``.
    """
    to, of = connections.edges[::-1] if backwards else connections.edges
    order = jnp.argsort(to, stable=True)
    to, of, weights = to[order], of[order], connections.weights[tuple(connections.edges)][order]
    delays = connections.steps[tuple(connections.edges)][order]
    there = ((delays >= tile.steps) & (delays < tile.below)).astype(jnp.int32)
    counts = jnp.zeros(form.regions, jnp.int32).at[to].add(there)
    bodies = lax.div(counts + jnp.int32(TOGETHER - 1), jnp.int32(TOGETHER))
    ends = jnp.cumsum(bodies, dtype=jnp.int32)
    begins, before = ends - bodies, jnp.cumsum(counts, dtype=jnp.int32) - counts
    rank = jnp.cumsum(there, dtype=jnp.int32) - 1 - before[to]
    slot = jnp.where(there == 1, begins[to] * TOGETHER + rank, tile.slots)
    # What fills up reads what is there in any case.
    offsets = jnp.full(tile.slots, -tile.steps, jnp.int32).at[slot].set(of * form.stride - delays, mode="drop")
    listed = jnp.zeros((tile.slots, *weights.shape[1:]), jnp.float32).at[slot].set(weights, mode="drop")
    if backwards:
        spans = [jnp.pad(x, (0, form.rows - form.regions)) for x in (begins, ends)]
    else:
        spans = [jnp.pad(x, (0, form.rows - form.regions), mode="edge") for x in (begins, ends)]
    return jnp.concatenate(spans), offsets, listed


def _exact_dot(a, b):
    return jnp.dot(a, b, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _fast_dot(a, b):
    """Of halves in bfloat16, without the product of the lower ones: half as many passes as the exact one takes."""

    def halves(x):
        upper = x.astype(jnp.bfloat16)
        return upper, (x - upper.astype(jnp.float32)).astype(jnp.bfloat16)

    def dot(a, b):
        return jnp.dot(a, b, preferred_element_type=jnp.float32)

    (a, less_a), (b, less_b) = halves(a), halves(b)
    return dot(a, b) + (dot(a, less_b) + dot(less_a, b))


class _Sums:
    """What is sent and what arrives, within a kernel; ``n`` counts steps from 0 on the clock of the kernel."""

    def __init__(self, form: Form, refs, precision: str, copies: bool):
        """``copies``, whether the regions that fill up get what the last one gets."""
        self.form, self.refs, self.copies = form, refs, copies
        self.dot = _fast_dot if precision == "fast" else _exact_dot
        (self.store,) = refs["store"]

    def begin(self, n) -> None:
        """Before a step sends: move the store back, and make the sums of a tile, where it is time."""
        form = self.form
        if form.depth:
            pl.when((n > 0) & (_rem(n, form.slide) == 0))(self._move)
        for tile in form.tiles:
            pl.when(_rem(n, tile.steps) == 0)(functools.partial(self._sum_tile, tile, form.place(n)))

    def send(self, n, first, values) -> None:
        """Store what some regions send, from the ``first`` on."""
        form, count = self.form, values.shape[0]
        at = form.place(n) + first * form.stride
        self.store[self._regions(at, count)] = values

    def arrive(self, n, target) -> None:
        """Write the sums that arrive at a step, ``(rows, 128)``."""
        form, now = self.form, self.form.place(n)
        total = jnp.zeros((form.rows, LANES), jnp.float32)
        for tile in form.tiles:
            (sums,) = self.refs[f"sums_{tile.steps}"]
            total = total + sums[pl.ds(_rem(n, tile.steps), form.rows, stride=tile.steps)]
        for k, delay in enumerate(form.products):
            total = total + self._product(k, now - delay)
        target[...] = total
        if form.singles:
            self._add_singles(now, target)

    def _product(self, k: int, at):
        form, (matrices,) = self.form, self.refs["matrices"]
        if len(matrices.shape) == 3:
            sent = self.store[self._regions(at, form.rows)]
            return self.dot(matrices[k], sent)

        def source(j, total):
            return total + matrices[k, j] * self.store[pl.ds(at + j * form.stride, 1)]

        nothing = jnp.zeros((form.rows, LANES), jnp.float32)
        return lax.fori_loop(jnp.int32(0), jnp.int32(form.regions), source, nothing)

    def _add_singles(self, now, target) -> None:
        (targets, offsets), (weights,), form = self.refs["singles"], self.refs["single_weights"], self.form

        def one(e, carry):
            target[pl.ds(targets[e], 1)] += weights[pl.ds(e, 1)] * self.store[pl.ds(now + offsets[e], 1)]
            return carry

        lax.fori_loop(jnp.int32(0), jnp.int32(form.singles), one, ())
        more = form.rows - form.regions
        if self.copies and more:
            target[form.regions :] = jnp.broadcast_to(target[form.regions - 1 : form.regions], (more, LANES))

    def _regions(self, at, count: int):
        stride = self.form.stride
        return pl.ds(at, count, stride=stride) if stride > 1 else pl.ds(at, count)

    def _sum_tile(self, tile: Tile, now) -> None:
        """Of each connection of a tile, what all its steps read."""
        names = ("list", "weights", "sums")
        (spans, offsets), (weights,), (sums,) = (self.refs[f"{name}_{tile.steps}"] for name in names)

        def region(i, carry):
            def body(g, total):
                for e in range(TOGETHER):
                    sent = self.store[pl.ds(now + offsets[g * TOGETHER + e], tile.steps)]
                    total = total + sent * weights[pl.ds(g * TOGETHER + e, 1)]
                return total

            nothing = jnp.zeros((tile.steps, LANES), jnp.float32)
            total = lax.fori_loop(spans[i], spans[self.form.rows + i], body, nothing)
            sums[pl.ds(pl.multiple_of(i * tile.steps, 8), tile.steps)] = total
            return carry

        lax.fori_loop(jnp.int32(0), jnp.int32(self.form.rows), region, ())

    def _move(self) -> None:
        form, at_once = self.form, 64

        def some(i, carry):
            to = pl.multiple_of(i * at_once, at_once)
            self.store[pl.ds(to, at_once)] = self.store[pl.ds(to + form.slide, at_once)]
            return carry

        lax.fori_loop(jnp.int32(0), jnp.int32(form.rows * form.stride // at_once), some, ())

    def clear(self) -> None:
        """Nothing was sent before the first step."""
        form, at_once = self.form, 64 if self.form.depth else self.form.rows

        def some(i, carry):
            zeros = jnp.zeros((at_once, LANES), jnp.float32)
            self.store[pl.ds(pl.multiple_of(i * at_once, 8), at_once)] = zeros
            return carry

        lax.fori_loop(jnp.int32(0), jnp.int32(form.store // at_once), some, ())


def _each(form: Form, loop: Loop, most: int, body: Callable) -> None:
    """``body(first, rows)`` for groups of regions; unrolled, so that neighbours overlap, where they are few."""
    turn = min(most, form.rows)
    count = form.rows // turn
    if count <= 8 and not loop.interpret:
        for i in range(count):
            body(i * turn, pl.ds(i * turn, turn))
        return

    def one(i, carry):
        body(i * turn, pl.ds(pl.multiple_of(i * turn, 8), turn))
        return carry

    lax.fori_loop(jnp.int32(0), jnp.int32(count), one, ())


def _copy(refs, source, target) -> None:
    (semaphore,) = refs["semaphore"]
    copy = pltpu.make_async_copy(source, target, semaphore)
    copy.start()
    copy.wait()


# Forward ------------------------------------------------------------------------------------------------------------


def forward(loop: Loop, operands: Operands, initial: Carry, checkpoint_every: int | None) -> Forward:
    """Run networks; with ``checkpoint_every``, also keep the state before each chunk and the sums of all steps."""
    (coefs, inputs, seeds, connections), (state, history) = operands, initial
    assert connections is not None
    assert history is not None
    form, lanes = Form.of(_coupling(loop)), state[0].shape[0]
    plan = _plan(loop, form, coefs, inputs, lanes, checkpoint_every)
    cut, n, obs = plan.cut, loop.n_state, loop.n_observables if loop.schedule.count else 0
    wide, keep = (plan.blocks * plan.rows, LANES), checkpoint_every is not None
    call = _Call(plan, backwards=False)
    call.give_arguments(coefs, inputs, seeds)
    _give_connections(call, plan, form, connections, backwards=False)
    call.give("initial", [plan.lay(x) for x in state], call.still())
    call.take("state", n, wide, call.still())
    call.take("records", obs, (cut.record_blocks * cut.strides, *wide), call.moving(cut.strides, cut.record_block))
    if keep:
        call.take("saved", n, (cut.chunks, *wide), call.moving(1, lambda c: c))
        call.take("sums_kept", 1, (cut.chunks * cut.size, *wide), call.moving(cut.size, lambda c: c))
    else:
        call.hold("sums_kept", 1, (1, *plan.tile))
    if form.depth:
        apart = pl.BlockSpec(memory_space=pltpu.HBM)
        call.give("history", [_stored(form, plan, history)], apart)
        call.take("last", 1, (plan.blocks, form.store, LANES), apart)
        call.hold_semaphore()
    out = call.run(
        lambda refs, chunk: _forward_kernel(loop, plan, form, keep, refs, chunk),
        "brainmass_kernels_tpu_network_forward", loop, *operations(loop.advance), vmem=_vmem(call),
    )  # fmt: skip
    records = tuple(plan.unlay(x[: loop.schedule.count]) for x in out["records"])
    if not obs:
        records = (jnp.zeros((0, plan.lanes), jnp.float32),) * loop.n_observables
    final = tuple(plan.unlay(x) for x in out["state"])
    saved = tuple(plan.unlay(x) for x in (*out["saved"], *out["sums_kept"]))
    last = _unstored(form, plan, out["last"][0], form.last(cut.steps)) if form.depth else history
    return Forward(records, Carry(final, last), (*saved, history) if keep else None)


def _stored(form: Form, plan: Layout, history):
    """A history, ``(depth, L)``, as the store has it before the first step, ``(blocks, store, 128)``."""
    x = plan.lay(history).reshape(form.depth, plan.blocks, form.rows, LANES)
    x = jnp.pad(jnp.moveaxis(x, 0, 2), [(0, 0), (0, 0), (0, form.stride - form.depth), (0, 0)])
    return jnp.pad(x.reshape(plan.blocks, form.rows * form.stride, LANES), [(0, 0), (0, form.slide), (0, 0)])


def _unstored(form: Form, plan: Layout, store, begin: int):
    """The inverse of `_stored`, of a store in which the history begins at a place."""
    x = store[:, begin : begin + form.rows * form.stride].reshape(plan.blocks, form.rows, form.stride, LANES)
    x = jnp.moveaxis(x[:, :, : form.depth], 2, 0)
    return plan.unlay(x.reshape(form.depth, plan.blocks * form.rows, LANES))


def _vmem(call: _Call) -> int | None:
    """The VMEM to ask for, where it is more than the compiler grants anyway."""
    bytes_needed = call.vmem()
    if bytes_needed > MOST:
        raise Unsupported(
            f"implementation 'mosaic_tpu' cannot run this: with weights of its own for each network, or so much to "
            f"keep for a gradient, 128 networks need {bytes_needed:,} bytes of VMEM, and it asks for {MOST:,}; weights "
            f"shared by all networks, a longer dt or fewer regions would fit"
        )
    return bytes_needed + MARGIN if bytes_needed > BUDGET else None


def _forward_kernel(loop: Loop, plan: Layout, form: Form, keep: bool, refs, chunk):
    cut, block = plan.cut, pl.program_id(0)
    start, first, last = cut.bounds(chunk)
    sums, send = _Sums(form, refs, loop.precision, copies=True), _coupling(loop).send
    (arrived,) = refs["sums_kept"]

    @pl.when(chunk == 0)
    def _():
        write(refs["state"], read(refs["initial"]))
        if form.depth:
            _copy(refs, refs["history"][0].at[block], refs["store"][0])

    if keep:
        write(refs["saved"], read(refs["state"]), 0)

    def of(region, rows):
        tile = (rows.size, LANES)
        return *_arguments(loop, plan, refs, start, tile, rows), tile

    def step(j):
        n = start + j
        sums.begin(n)

        def sending(region, rows):
            coefs, _, _, tile = of(region, rows)
            (sent,) = fill(apply(send, *coefs, *read(refs["state"], rows)), tile)
            sums.send(n, region, sent)

        _each(form, loop, 16, sending)
        place = j if keep else 0
        sums.arrive(n, arrived.at[place])

        def advancing(region, rows):
            coefs, inputs, normals, tile = of(region, rows)
            state = read(refs["state"], rows)
            stepped = apply(loop.advance, *coefs, *state, *inputs(j), arrived[place, rows], *normals(j)(0))
            write(refs["state"], fill(stepped, tile), rows)

        _each(form, loop, 16, advancing)

    def record(k):
        def observing(region, rows):
            coefs, _, _, tile = of(region, rows)
            write(refs["records"], fill(apply(loop.observe, *coefs, *read(refs["state"], rows)), tile), k, rows)

        _each(form, loop, 16, observing)

    def body(j, carry):
        step(j)
        if refs["records"]:
            pl.when(_rem(j + 1, cut.stride) == 0)(lambda: record(_div(j, cut.stride)))
        return carry

    lax.fori_loop(first, last, body, ())
    if form.depth:

        @pl.when(chunk == cut.chunks - 1)
        def _():
            _copy(refs, refs["store"][0], refs["last"][0].at[block])


# Adjoint ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Back:
    """What an adjoint kernel is made of."""

    loop: Loop
    form: Form
    wanted: Wanted
    advance: SplitPullback
    observe: SplitPullback
    send: SplitPullback
    plan: Layout

    @classmethod
    def of(
        cls, loop: Loop, pullbacks: Pullbacks, wanted: Wanted, coefs, inputs, lanes: int, checkpoint_every: int
    ) -> _Back:
        assert pullbacks.send is not None
        n, m = loop.n_coefs, loop.n_state
        # The sum, last of the inputs, is a stream like others.
        free = [True] * n + [False] * m + [True] * loop.n_inputs + [False] * (loop.n_normals + m)
        known = [False] * n + [True] * m + [False] * loop.n_inputs + [True] * loop.n_normals + [False] * m
        advance = SplitPullback(pullbacks.advance, free, known)

        def of_state(program, cotangents: int):
            after = [False] * cotangents
            return SplitPullback(program, [True] * n + [False] * m + after, [False] * n + [True] * m + after)

        observe, send = of_state(pullbacks.observe, loop.n_observables), of_state(pullbacks.send, 1)
        form = Form.of(_coupling(loop))
        plan = _plan(loop, form, coefs, inputs, lanes, checkpoint_every)
        return cls(loop, form, wanted, advance, observe, send, plan)

    @property
    def n_coefs(self) -> int:
        return sum(self.wanted.coefs)

    @property
    def in_lanes(self) -> tuple[bool, ...]:
        """Of each wanted input, whether it differs from lane to lane."""
        return tuple(lane for lane, want in zip(self.plan.inputs_in_lanes, self.wanted.inputs) if want)

    @property
    def ending(self) -> int:
        """The first chunk with a step that the last history has."""
        cut = self.plan.cut
        first = max(0, cut.steps - self.form.depth) + cut.front
        return first // cut.group * cut.parts + (first % cut.group + cut.pad) // cut.size

    def kernel(self, refs, chunk):
        sums = _Sums(self.form, refs, self.loop.precision, copies=False)

        @pl.when(pl.program_id(1) == 0)
        def _():
            write(refs["ct_state"], read(refs["ct_final"]))
            write(refs["ct_coefs"], [jnp.zeros(self.plan.tile, jnp.float32)] * self.n_coefs)
            sums.clear()

        for ref in refs["ct_series"]:
            ref[...] = jnp.zeros(ref.shape, jnp.float32)
        _each(self.form, self.loop, 16, lambda region, rows: self.replay(refs, chunk, rows))
        self.go_back(refs, chunk, sums)
        sum_series(refs)

    def replay(self, refs, chunk, rows):
        """Run the chunk again for some regions, keeping what the pullbacks need of each step."""
        loop, cut, tile = self.loop, self.plan.cut, (rows.size, LANES)
        start, first, last = cut.bounds(chunk)
        coefs, inputs, normals = _arguments(loop, self.plan, refs, start, tile, rows)

        def step(j, state):
            given = (*inputs(j), *read(refs["sums_kept"], j, rows), *normals(j)(0))
            write(refs["kept"], fill(apply(self.advance.keep, *coefs, *state, *given), tile), j, rows)
            write(refs["kept_send"], fill(apply(self.send.keep, *coefs, *state), tile), j, rows)
            if refs["sent"]:
                write(refs["sent"], fill(apply(_coupling(loop).send, *coefs, *state), tile), j, rows)
            state = fill(apply(loop.advance, *coefs, *state, *given), tile)
            if refs["kept_records"]:

                @pl.when(_rem(j + 1, cut.stride) == 0)
                def _():
                    kept = fill(apply(self.observe.keep, *coefs, *state), tile)
                    write(refs["kept_records"], kept, _div(j, cut.stride), rows)

            return state

        lax.fori_loop(first, last, step, read(refs["saved"], 0, rows))

    def go_back(self, refs, chunk, sums: _Sums):
        """Walk the chunk back, all regions a step at a time."""
        loop, cut = self.loop, self.plan.cut
        start, first, last = cut.bounds(chunk)

        def of(rows):
            tile = (rows.size, LANES)
            return *_arguments(loop, self.plan, refs, start, tile, rows)[:2], tile

        def add(refs, out, rows):
            cts = added((*read(refs["ct_coefs"], rows), *read(refs["ct_state"], rows)), out)
            write((*refs["ct_coefs"], *refs["ct_state"]), cts, rows)

        def observed(k):
            def pull(region, rows):
                coefs, _, _ = of(rows)
                kept = read(refs["kept_records"], k, rows)
                add(refs, apply(self.observe.back, *coefs, *kept, *read(refs["ct_records"], k, rows)), rows)

            _each(self.form, loop, 16, pull)

        def step(j):
            n = start + j
            since_end = jnp.int32(cut.steps - 1) - n
            sums.begin(since_end)

            def pull(region, rows):
                coefs, inputs, tile = of(rows)
                given = (*inputs(j), *read(refs["sums_kept"], j, rows), *read(refs["kept"], j, rows))
                out = apply(self.advance.back, *coefs, *given, *read(refs["ct_state"], rows))
                a, b = self.n_coefs, self.n_coefs + loop.n_state
                write(refs["ct_coefs"], added(read(refs["ct_coefs"], rows), out[:a]), rows)
                write(refs["ct_state"], fill(out[a:b], tile), rows)
                *ct_inputs, ct_sum = fill(out[b:], tile)
                series, streams = parted(ct_inputs, self.in_lanes)
                for ref, ct in zip(refs["ct_series"], series):
                    ref[pl.ds(j, 1)] += jnp.sum(ct, axis=0, keepdims=True)
                write(refs["ct_lane_inputs"], streams, j, rows)
                write(refs["ct_sums"], [ct_sum], j, rows)
                sums.send(since_end, region, ct_sum)

            _each(self.form, loop, 16, pull)
            (ct_sent,) = refs["ct_sent"]
            sums.arrive(since_end, ct_sent)
            if refs["ct_last"]:

                @pl.when(chunk >= self.ending)
                def _():
                    ct_sent[...] += refs["ct_last"][0][j]

            def pull_sent(region, rows):
                coefs, _, _ = of(rows)
                kept = read(refs["kept_send"], j, rows)
                add(refs, apply(self.send.back, *coefs, *kept, ct_sent[rows]), rows)

            _each(self.form, loop, 16, pull_sent)

        def body(i, carry):
            j = last - 1 - i
            if refs["ct_records"]:
                on = (_rem(j + 1, cut.stride) == 0) & cut.records(chunk)
                pl.when(on)(lambda: observed(_div(j, cut.stride)))
            step(j)
            return carry

        lax.fori_loop(jnp.int32(0), last - first, body, ())


def adjoint(
    loop: Loop, pullbacks: Pullbacks, wanted: Wanted, operands: Operands, saved, cotangents: Cotangents,
    checkpoint_every: int,
) -> Adjoint:  # fmt: skip
    """Walk back over a forward run that kept the sums.

    Cotangents of weights and of the history are made from those of the sums by plain jnp: where nobody asks for them,
    the compiler leaves them out.
    """
    (coefs, inputs, seeds, connections), (ct_final, ct_history) = operands, cotangents.final
    assert connections is not None
    *saved, sums_kept, history = saved
    back = _Back.of(loop, pullbacks, wanted, coefs, inputs, ct_final[0].shape[0], checkpoint_every)
    plan, form = back.plan, back.form
    cut, n, obs = plan.cut, loop.n_state, loop.n_observables if loop.schedule.count else 0
    wide = (plan.blocks * plan.rows, LANES)
    steps_wide, each_step = (cut.chunks * cut.size, *wide), lambda c: c
    call = _Call(plan, backwards=True)
    call.give_arguments(coefs, inputs, seeds)
    _give_connections(call, plan, form, connections, backwards=True)
    call.give("saved", [plan.lay(x) for x in saved], call.moving(1, each_step))
    call.give("sums_kept", [plan.lay(sums_kept)], call.moving(cut.size, each_step))
    call.give("ct_final", [plan.lay(x, "constant") for x in ct_final], call.still())
    if form.depth:
        spread = cut.spread(plan.lay(_at_steps(ct_history, cut.steps), "constant"))[back.ending * cut.size :]
        call.give("ct_last", [spread], call.moving(cut.size, lambda c: jnp.maximum(c - back.ending, 0)))
    if obs:
        beyond = cut.record_blocks * cut.strides - loop.schedule.count
        cts = [jnp.pad(plan.lay(x, "constant"), [(0, beyond), (0, 0), (0, 0)]) for x in cotangents.records]
        call.give("ct_records", cts, call.moving(cut.strides, cut.record_block))
    call.take("ct_state", n, wide, call.still())
    call.take("ct_coefs", back.n_coefs, wide, call.still())
    streams, series = sum(back.in_lanes), len(back.in_lanes) - sum(back.in_lanes)
    call.take("ct_lane_inputs", streams, steps_wide, call.moving(cut.size, each_step))
    block = pl.BlockSpec((1, 1, 1, cut.size), lambda b, c: (b, call.chunk(c), 0, 0))
    call.take("ct_uniform_inputs", series, (plan.blocks, cut.chunks, 1, cut.size), block)
    call.take("ct_sums", 1, steps_wide, call.moving(cut.size, each_step))
    call.take("sent", int(wanted.weights), steps_wide, call.moving(cut.size, each_step))
    call.hold("ct_series", series, (cut.size, LANES))
    call.hold("ct_sent", 1, plan.tile)
    call.hold("kept", back.advance.n_kept, (cut.size, *plan.tile))
    call.hold("kept_send", back.send.n_kept, (cut.size, *plan.tile))
    call.hold("kept_records", back.observe.n_kept if obs else 0, (cut.strides, *plan.tile))
    out = call.run(
        back.kernel, "brainmass_kernels_tpu_network_adjoint", loop, *operations(loop.advance, pullbacks.advance),
        vmem=_vmem(call),
    )  # fmt: skip
    partial = [cut.gather(x.reshape(plan.blocks, -1).T) for x in out["ct_uniform_inputs"]]
    streamed = [plan.unlay(cut.gather(x)) for x in out["ct_lane_inputs"]]
    ct_sums = _by_region(form, plan.unlay(cut.gather(out["ct_sums"][0])))
    of_weights = None
    if wanted.weights:
        sent = plan.unlay(cut.gather(out["sent"][0]))
        of_weights = _of_weights(connections, _by_region(form, jnp.concatenate([history, sent])), ct_sums, form)
    return Adjoint(
        tuple(plan.unlay(x) for x in out["ct_coefs"]),
        Carry(tuple(plan.unlay(x) for x in out["ct_state"]), _of_history(form, connections, ct_history, ct_sums)),
        merged(partial, streamed, back.in_lanes),
        of_weights,
    )


def _at_steps(last, steps: int):
    """The cotangent of the last history at the steps of the run, ``(steps, L)``."""
    depth = len(last)
    return last[depth - steps :] if steps <= depth else jnp.pad(last, [(steps - depth, 0), (0, 0)])


def _by_region(form: Form, x):
    """``(T, L)`` as ``(N, T, networks)``."""
    return jnp.moveaxis(x.reshape(len(x), -1, form.regions), -1, 0)


def _of_weights(connections: Connections, sent, ct_sums, form: Form):
    """Of each weight ``sum_t ct_sum_i(t) sent_j(t - d)``, ``(N, N, networks)``."""
    if not form.depth:
        return jnp.einsum("itb,jtb->ijb", ct_sums, sent, precision=lax.Precision.HIGHEST)
    rows, columns = connections.edges
    steps = ct_sums.shape[1]

    def one(end):
        row, column, delay = end
        arrived = lax.dynamic_slice_in_dim(sent[column], form.depth - delay, steps)
        return jnp.sum(ct_sums[row] * arrived, axis=0)

    found = lax.map(one, (rows, columns, connections.steps[rows, columns]))
    empty = jnp.zeros((form.regions, form.regions, found.shape[1]), found.dtype)
    return empty.at[rows, columns].set(found, unique_indices=True, indices_are_sorted=True)


def _of_history(form: Form, connections: Connections, ct_last, ct_sums):
    """Of what was sent before the run: where it arrived, and what of it the last history still has; ``(depth, L)``."""
    depth, steps = form.depth, ct_sums.shape[1]
    if not depth:
        return jnp.zeros_like(ct_last)
    rows, columns = connections.edges
    # So that what was sent at place h of the history arrives at place h + delay.
    early = jnp.pad(ct_sums[:, :depth], [(0, 0), (depth, max(0, depth - steps)), (0, 0)])

    def one(found, end):
        row, column, delay, weight = end
        return found.at[column].add(weight * lax.dynamic_slice_in_dim(early[row], delay, depth)), None

    empty = jnp.zeros((form.regions, depth, early.shape[-1]), ct_sums.dtype)
    weights = connections.weights[rows, columns]
    weights = weights.reshape(len(weights), 1, -1)
    found, _ = lax.scan(one, empty, (rows, columns, connections.steps[rows, columns], weights))
    found = jnp.moveaxis(found, 0, -1).reshape(depth, -1)
    return found.at[steps:].add(ct_last[: depth - steps]) if depth > steps else found
