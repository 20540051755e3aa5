"""How the connections of a network are summed: products by delay, lists for tiles of steps, and single ones.

What the regions sent lies in VMEM, of each region its times one after the other, so that several steps of one region
are one load wherever they begin. That store slides: each step is one row further, over the oldest row of the region
behind it, and every few hundred steps all of it is moved back.

The sum has two parts. Connections of few distinct delays are products of matrices, one for each delay. Where there are
many, those of a tile of steps or more read only what was sent before the tile begins: their sums are made for the whole
tile, with one multiply-add of the times of one region for each connection. No gather is in either.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..base import Connections, Coupling
from .call import Call
from .layout import COLUMNS, NetworkPlan, rem, round_up

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
        rows = 8 if regions <= 8 else round_up(regions, 16)
        possible = [steps for steps in _BODY if steps <= depth]
        chosen = [steps for n in range(len(possible) + 1) for steps in itertools.combinations(possible, n)]
        _, tiles, products, singles = min(_cost(coupling, steps, rows) for steps in chosen)
        stride = round_up(depth + 1, 8) if depth else 1
        slide = round_up(max(stride, 64), 64) if depth else 1
        return cls(regions, rows, depth, stride, slide, tiles, products, singles)

    @property
    def store(self) -> int:
        """Rows of the store."""
        return self.rows * self.stride + (self.slide if self.depth else 0)

    def place(self, n):
        """Where step ``n`` is, in the times of each region."""
        return self.depth + rem(n, self.slide) if self.depth else jnp.int32(0)

    def last(self, steps: int) -> int:
        """Where the history after a run begins."""
        return (steps - 1) % self.slide + 1

    def bytes(self, batched: bool) -> int:
        """VMEM of the store, the sums of a tile, the lists and the matrices."""
        matrix = self.regions * self.rows * COLUMNS if batched else self.rows * round_up(self.rows, COLUMNS)
        lists = sum(tile.slots + self.rows * tile.steps for tile in self.tiles)
        return 4 * ((self.store + lists + round_up(self.singles, 8)) * COLUMNS + len(self.products) * matrix)


def _cost(coupling: Coupling, steps: tuple[int, ...], rows: int):
    """With tiles of these steps: bundles a step, the tiles, delays that products are for, single connections."""
    delays, regions = coupling.only.delays, coupling.regions
    tiles, cost = [], 0.0
    for size, below in zip(steps, (*steps[1:], len(delays))):
        count = sum(delays[size:below])
        tiles.append(Tile(size, below, round_up(count + regions * (TOGETHER - 1), TOGETHER)))
        # Half of a list's last body is empty.
        cost += (count / TOGETHER + regions / 2) * _BODY[size] / size
    near = {delay: count for delay, count in enumerate(delays[: (*steps, len(delays))[0]]) if count}
    a_product = _PRODUCT * rows / 16
    products = tuple(delay for delay, count in near.items() if count * _SINGLE > a_product)
    singles = sum(count for delay, count in near.items() if delay not in products)
    return cost + len(products) * a_product + singles * _SINGLE, tuple(tiles), products, singles


# Operands -----------------------------------------------------------------------------------------------------------


def add_connections(call: Call, plan: NetworkPlan, form: Form, connections: Connections) -> None:
    """The connections as a kernel takes them: matrices by delay, and lists by region.

    Backwards they go from targets to sources, and regions that fill up get nothing; forwards they get what the last
    region gets, as they are its copies.
    """
    backwards, batched, once = call.backwards, connections.weights.ndim == 3, pl.Buffered(1)

    def add_list(name: str, numbers, weights):
        call.add_operands(name, numbers, pl.BlockSpec(memory_space=pltpu.SMEM))
        if batched:
            columns = plan.lay_networks(weights)
        else:
            columns = jnp.broadcast_to(weights[:, None], (len(weights), COLUMNS))
        block = pl.BlockSpec((len(weights), COLUMNS), lambda b, c: (0, b if batched else 0), pipeline_mode=once)
        call.add_operands(f"{name}_weights", [columns], block)

    if form.products:
        matrices = _matrices(form, connections, backwards)
        if batched:
            matrices = plan.lay_networks(jnp.swapaxes(matrices, 1, 2))
            shape = len(form.products), form.regions, form.rows, COLUMNS
            block = pl.BlockSpec(shape, lambda b, c: (0, 0, 0, b), pipeline_mode=once)
        else:
            matrices = jnp.pad(matrices, [(0, 0), (0, 0), (0, form.rows - form.regions)])
            block = pl.BlockSpec(matrices.shape, lambda b, c: (0, 0, 0), pipeline_mode=once)
        call.add_operands("matrices", [matrices], block)
    if form.singles:
        *numbers, weights = _singles(form, connections, backwards)
        add_list("singles", numbers, weights)
    for tile in form.tiles:
        *numbers, weights = _lists(form, tile, connections, backwards)
        add_list("lists", numbers, weights)
        call.add_scratch("tile_sums", 1, (form.rows * tile.steps, COLUMNS))
    call.add_scratch("store", 1, (form.store, COLUMNS))


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
    listed = ((delays >= tile.steps) & (delays < tile.below)).astype(jnp.int32)
    counts = jnp.zeros(form.regions, jnp.int32).at[to].add(listed)
    bodies = lax.div(counts + jnp.int32(TOGETHER - 1), jnp.int32(TOGETHER))
    ends = jnp.cumsum(bodies, dtype=jnp.int32)
    begins, before = ends - bodies, jnp.cumsum(counts, dtype=jnp.int32) - counts
    rank = jnp.cumsum(listed, dtype=jnp.int32) - 1 - before[to]
    slot = jnp.where(listed == 1, begins[to] * TOGETHER + rank, tile.slots)
    # What fills up reads what is there in any case.
    offsets = jnp.full(tile.slots, -tile.steps, jnp.int32).at[slot].set(of * form.stride - delays, mode="drop")
    weights = jnp.zeros((tile.slots, *weights.shape[1:]), jnp.float32).at[slot].set(weights, mode="drop")
    mode, beyond = "constant" if backwards else "edge", (0, form.rows - form.regions)
    return jnp.concatenate([jnp.pad(x, beyond, mode=mode) for x in (begins, ends)]), offsets, weights


# Within a kernel ----------------------------------------------------------------------------------------------------


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


class Sums:
    """What is sent and what arrives, within a kernel; ``n`` counts steps from 0 on the clock of the kernel."""

    def __init__(self, form: Form, refs, precision: str, copies: bool):
        """``copies``, whether the regions that fill up get what the last one gets."""
        self.form, self.refs, self.copies = form, refs, copies
        self.dot = _fast_dot if precision == "fast" else _exact_dot
        (self.store,) = refs["store"]
        spans, offsets = refs["lists"][::2], refs["lists"][1::2]
        self.tiles = [*zip(form.tiles, refs["tile_sums"], spans, offsets, refs["lists_weights"], strict=True)]

    def begin(self, n) -> None:
        """Before a step sends: move the store back, and make the sums of a tile, where it is time."""
        form = self.form
        if form.depth:
            pl.when((n > 0) & (rem(n, form.slide) == 0))(self._move)
        for tile, *refs in self.tiles:
            pl.when(rem(n, tile.steps) == 0)(functools.partial(self._sum_tile, form.place(n), tile, *refs))

    def send(self, n, first, values) -> None:
        """Store what some regions send, from the ``first`` on."""
        form, count = self.form, values.shape[0]
        at = form.place(n) + first * form.stride
        self.store[self._regions(at, count)] = values

    def arrive(self, n, target) -> None:
        """Write the sums that arrive at a step, ``(rows, 128)``."""
        form, now = self.form, self.form.place(n)
        total = jnp.zeros((form.rows, COLUMNS), jnp.float32)
        for tile, sums, *_ in self.tiles:
            total = total + sums[pl.ds(rem(n, tile.steps), form.rows, stride=tile.steps)]
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

        nothing = jnp.zeros((form.rows, COLUMNS), jnp.float32)
        return lax.fori_loop(jnp.int32(0), jnp.int32(form.regions), source, nothing)

    def _add_singles(self, now, target) -> None:
        (targets, offsets), (weights,), form = self.refs["singles"], self.refs["singles_weights"], self.form

        def one(e, carry):
            target[pl.ds(targets[e], 1)] += weights[pl.ds(e, 1)] * self.store[pl.ds(now + offsets[e], 1)]
            return carry

        lax.fori_loop(jnp.int32(0), jnp.int32(form.singles), one, ())
        more = form.rows - form.regions
        if self.copies and more:
            target[form.regions :] = jnp.broadcast_to(target[form.regions - 1 : form.regions], (more, COLUMNS))

    def _regions(self, at, count: int):
        stride = self.form.stride
        return pl.ds(at, count, stride=stride) if stride > 1 else pl.ds(at, count)

    def _sum_tile(self, now, tile: Tile, sums, spans, offsets, weights) -> None:
        """Add up what each connection of a tile carries in all its steps."""

        def region(i, carry):
            def body(g, total):
                for e in range(TOGETHER):
                    sent = self.store[pl.ds(now + offsets[g * TOGETHER + e], tile.steps)]
                    total = total + sent * weights[pl.ds(g * TOGETHER + e, 1)]
                return total

            nothing = jnp.zeros((tile.steps, COLUMNS), jnp.float32)
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
            zeros = jnp.zeros((at_once, COLUMNS), jnp.float32)
            self.store[pl.ds(pl.multiple_of(i * at_once, 8), at_once)] = zeros
            return carry

        lax.fori_loop(jnp.int32(0), jnp.int32(form.store // at_once), some, ())
