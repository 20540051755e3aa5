"""What is sent and what arrives, where a block of lanes is a network: lines that the kernels of `source` have besides.

What every region sent lies in rows of time. A forward run has a window of it, which moves on when it is full; one that
a gradient will follow keeps it all. The adjoint has the cotangents of all sums in such rows too, and runs the
connections backwards over them.

A region has a row of time for each quantity that it sends, and for each sum that arrives at it: those of the first
quantity for all regions, then those of the next. The connections of all terms are one list, from rows to rows.

Threads share a large network: each has some parts of its regions, in blocks of their own, and all have what was sent
and the lists of connections in common. They meet once a step, between sending and summing. Each sum is over the same
connections in the same order, whoever makes it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..base import Connections, of_depth, of_own_depths
from .language import PACK as TILE
from .layout import PLAN
from .masses import Uncoupled
from .network_runtime import LONG, WINDOW, columns_of
from .source import WORDS_END, AdjointKernel, ForwardKernel, Kernel

# Steps that the window of a forward run has at least, beyond the longest delay.
AHEAD = 1024


class _Coupled(Uncoupled):
    """Lines of both directions.

    Arguments: of each connection the row that it goes to, the one that it comes from, its delay, its weight; and
    the histories before a forward run with delays, or the weights as a matrix where there are none, and they are one.
    """

    # Areas of the scratch: the connections of each row, and sums of the steps of a tile.
    lists: tuple[str, ...]
    sums: tuple[str, ...]
    # And what is sent without delays, of this step and the last, where lines of several rows read it.
    row_of_all: str

    def __init__(self, kernel: Kernel):
        self.kernel, loop = kernel, kernel.loop
        assert loop.coupling is not None
        self.coupling = coupling = loop.coupling
        self.regions, self.depth, self.steps = coupling.regions, coupling.depth, loop.schedule.steps
        self.sources, self.totals = len(coupling.depths), coupling.totals
        self.send_program, self.terms = coupling.send, kernel.operands.connections
        self.lanes, self.size = kernel.layout.lanes, kernel.layout.itemsize
        self.join_terms()
        # Sums without delays are over a matrix where the weights are one, else over a list like those with delays.
        self.by_matrix = not self.depth and len(self.terms) == 1 and not self.terms[0].are_edges
        self.parts = kernel.layout.parts
        # Whether what is sent without delays lies in one row for all to read, and not in a row of the block's.
        self.joined = bool(self.parts) or len(self.terms) > 1
        self.networks = self.lanes // self.regions
        # Regions of a row of all of them.
        self.width = kernel.layout.block * (self.parts or 1)
        # All that a region sends in a run, and what is read of tiles beyond its end.
        self.stride = self.depth + self.steps + LONG
        self.sum = kernel.rows.add(*kernel.inputs[-self.totals :])

    def join_terms(self) -> None:
        """The connections of all terms as one list, sorted by the row they go to: rows, columns, delays, weights."""
        self.shared = all(term.weights.ndim == 2 for term in self.terms)
        self.alike = not any(term.own_delays for term in self.terms)
        networks = self.lanes // self.regions
        columns_of = []
        for term, connections in zip(self.coupling.terms, self.terms, strict=True):
            rows, columns = connections.edges
            weights, steps = connections.weights_of_edges, connections.steps_of_edges
            if not self.shared and weights.ndim == 1:
                weights = jnp.broadcast_to(weights[:, None], (*weights.shape, networks))
            if not self.alike and steps.ndim == 1:
                steps = jnp.broadcast_to(steps[:, None], (*steps.shape, networks))
            rows, columns = (x + k * self.regions if k else x for x, k in ((rows, term.total), (columns, term.source)))
            columns_of.append((rows, columns, steps, weights))
        self.ends = np.cumsum([0, *(len(rows) for rows, *_ in columns_of)])
        self.order, self.edges = None, int(self.ends[-1])
        if len(columns_of) == 1:
            (self.joint,) = columns_of
            return
        joint = [jnp.concatenate(parts) for parts in zip(*columns_of)]
        self.order = jnp.argsort(joint[0], stable=True)
        self.joint = tuple(x[self.order] for x in joint)

    def take_connections(self, history: tuple[jax.Array, ...]) -> None:
        """Take the connections, with the histories before a forward run; an adjoint takes the matrix to the sources."""
        kernel, (rows, columns, delays, weights) = self.kernel, self.joint
        kernel.take_one("rows", rows)
        kernel.take_one("columns", columns)
        kernel.take_one("delays", delays.T.reshape(-1))
        kernel.take_one("weights", weights.T.reshape(-1))
        if self.by_matrix:
            kernel.take_one("matrix", self.matrix(transposed=bool(history)).reshape(-1))
        elif history and self.depth:
            kernel.take_one("first_history", self.by_lane(history))

    def by_lane(self, history: tuple[jax.Array, ...]) -> jax.Array:
        """Histories, or their cotangents, the times of a lane in a row: of the first quantity, then of the next."""
        parts = [x.T.reshape(-1) for x in of_depth(history, self.depth)]
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts)

    def matrix(self, transposed: bool) -> jax.Array:
        """Weights to regions from regions, or transposed, padded to rows of a block; of each network, or of all."""
        weights = self.terms[0].weights
        matrix = jnp.moveaxis(weights[..., None] if weights.ndim == 2 else weights, -1, 0)
        matrix = jnp.swapaxes(matrix, 1, 2) if transposed else matrix
        return jnp.pad(matrix, ((0, 0), (0, 0), (0, self.width - self.regions)))

    @property
    def plan(self) -> dict[str, int]:
        return {"depth": self.depth, "edges": self.edges, "stride": self.stride, "shared": int(self.shared)}

    def shared_areas(self) -> dict[str, tuple[str, int]]:
        """The areas of a network, its lists first: bytes as the kernel computes them, and as they are."""
        areas = {}
        for area in self.lists:
            rows = self.rows_of(area)
            head = 32 * (rows + 1)
            size = (head + (8 + self.size) * self.edges + 63) // 64 * 64
            areas[area] = f"({head} + {8 + self.size} * edges + 63) // 64 * 64", size
        if self.joined:
            each = 2 * self.size * self.sent_rows
            areas[self.row_of_all] = f"{each} * width", each * self.width
        if self.in_time:
            size = WINDOW * self.columns * self.size
            areas["window"] = str(size), size
        return areas

    @property
    def in_time(self) -> bool:
        """Whether what is sent is written to rows of time."""
        raise NotImplementedError

    @property
    def columns(self) -> int:
        """Of a row of the window, which has what all regions write in a step."""
        return columns_of(self.sent_rows * self.regions)

    def rows_of(self, area: str) -> int:
        """The rows of a list: of all sums, or of all that is sent."""
        return self.regions * (self.totals if area == "list_to" else self.sources)

    @property
    def sent_rows(self) -> int:
        """How many numbers a lane writes for others to read."""
        return self.sources

    @property
    def areas_bytes(self) -> int:
        return sum(size for _, size in self.shared_areas().values())

    @property
    def sums_bytes(self) -> int:
        """Of the sums of a block."""
        return sum(self.counts_of_sums.values()) * self.bytes_of_sum

    @property
    def bytes_of_sum(self) -> int:
        lanes = self.kernel.layout.block if self.parts else self.regions
        return ((columns_of(lanes) + TILE) * TILE + lanes * LONG) * self.size

    @property
    def counts_of_sums(self) -> dict[str, int]:
        """How many sums of a region each area has."""
        return {name: self.totals if name == "sums" else self.sources for name in self.sums}

    @property
    def scratch_bytes(self) -> int:
        return self.sums_bytes + (0 if self.parts else self.areas_bytes)

    @property
    def common_bytes(self) -> int:
        return self.areas_bytes if self.parts else 0

    def history(self, results: Mapping[str, Any]) -> tuple[jax.Array, ...]:
        histories = results["history"].reshape(self.sources, self.lanes, self.depth)
        return of_own_depths([x.T for x in histories], self.coupling.depths)

    # Lines -----------------------------------------------------------------------------------------------------------

    def numbers(self) -> None:
        """What the lines read from the plan, and where the connections are."""
        kernel, argument = self.kernel, self.kernel.address
        kernel.line(f"regions = {self.regions}", f"width = {self.width}")
        for name in ("depth", "edges", "stride", "ct_stride", "shared"):
            kernel.line(f"{name} = plan[{PLAN.index(name)}]")
        kernel.addresses(["rows", "columns", "delays"])
        network = "0" if self.parts else "(0 if shared else number)"
        if not (self.alike or self.parts):
            kernel.line("delays += 4 * edges * number")
        kernel.line(f"weights = {argument('weights')} + {self.size} * edges * {network}")
        if self.by_matrix:
            kernel.line(f"matrix = {argument('matrix')} + {self.size} * regions * width * {network}")

    def areas(self, begin: str) -> None:
        """Addresses of the areas, from where they begin in the scratch, unless threads have them in common."""
        line = self.kernel.line
        line(f"at_end = {'job + JOB_BYTES' if self.parts else begin}")
        areas = [(name, size) for name, (size, _) in self.shared_areas().items()]
        if not self.parts:
            sizes = [(name, str(n * self.bytes_of_sum)) for name, n in self.counts_of_sums.items()]
            areas[len(self.lists) : len(self.lists)] = sizes
        for name, size in areas:
            line(f"{name} = at_end", f"at_end += {size}")

    def area_of_sums(self, name: str, k: int) -> str:
        """Where the ``k``-th sums of a block are."""
        if not self.parts:
            return f"{name} + {k * self.bytes_of_sum}" if k else name
        before = sum(n for other, n in self.counts_of_sums.items() if self.sums.index(other) < self.sums.index(name))
        at = (before + k) * self.bytes_of_sum
        return f"work + {WORDS_END} + segment * {self.kernel.step_bytes} + {at}"

    def own(self, area: str, stride: str, k: int = 0) -> str:
        """Where, in an area of all rows, the ``k``-th of the regions of this block are."""
        if not self.parts:
            return f"{area} + {self.size * k * self.regions} * {stride}" if k else area
        return (
            f"{area} + {self.size} * ({k * self.regions} + lane) * {stride}"
            if k
            else f"{area} + {self.size} * lane * {stride}"
        )

    def of_lane(self, array: str, k: int, lane: str = "lane") -> str:
        """Where, in an argument or result of `by_lane`, the times of a lane begin."""
        place = f"({k} * lanes + {lane})" if k else lane
        return f"{self.kernel.address(array)} + {self.size} * {place} * depth"

    def of_network(self, array: str, stride: str, rows: int) -> str:
        """Where, in an array of rows of all networks, those of this one begin."""
        network = "0" if self.parts else "lane"
        return f"{self.kernel.address(array)} + {self.size * rows} * {network} * {stride}"

    @property
    def count(self) -> str:
        """How many regions a block has."""
        return "valid" if self.parts else "regions"

    def span(self, k: int) -> tuple[str, str]:
        """The first of the ``k``-th rows of a block, and the end."""
        first, end = ("lane", "lane + valid") if self.parts else ("0", "regions")
        return (f"{k * self.regions} + {first}", f"{k * self.regions} + {end}") if k else (first, end)

    def alone(self, head: str = "if me == 0:"):
        """Lines that are for one thread."""
        return self.kernel.block(head) if self.parts else contextlib.nullcontext()

    def meet(self) -> None:
        if self.parts:
            self.kernel.line("times = meet(job, threads, times)")

    def sort(self, area: str, of: str, others: str, nearest: int, longest: int, stride: str, sign: int) -> None:
        """List the connections by the region they are ``of``."""
        ends, kinds = (of, others, "delays", "weights", "edges"), (nearest, longest)
        self.kernel.call("list_connections", area, *ends, self.rows_of(area), *kinds, stride, sign, self.columns)

    def sum_tile(
        self, area: str, source: str, sums: str, step: str, start: str, way: int = 1, tiles: str = str(LONG // TILE)
    ) -> None:
        """The sums of a tile over the connections of a list that are not near.

        Those whose delays are as long as `LONG` are summed for some ``tiles`` at the first of them.

        Parameters
        ----------
        step : counts steps, from where the tiles begin
        start : what the first step of the tile reads, or, where ``way`` is -1 and steps go back in time, the last
        """
        kernel, rows, last = self.kernel, self.rows_of(area), LONG // TILE - 1
        begin, tile = (start, start), f"{step} % {LONG} // {TILE}"
        if way < 0:
            begin, tile = (f"{start} - {LONG - 1}", f"{start} - {TILE - 1}"), f"{last} - {tile}"
        places = [(self.area_of_sums(sums, k), self.span(k)) for k in range(self.counts_of_sums[sums])]
        with kernel.block(f"if {step} % {LONG} == 0:"):
            for place, span in places:
                kernel.call("sum_long", area, rows, "edges", source, begin[0], place, tiles, *span)
        for place, span in places:
            kernel.call("sum_far", area, rows, "edges", source, begin[1], place, tile, *span)

    def sum_near(self, area: str, step: str, sums: str, phase: str, to: list[str]) -> None:
        """The sums of one step of the tile, with the connections of shorter delays, in rows."""
        for k, name in enumerate(to):
            tile, row = self.area_of_sums(sums, k), self.kernel.row(name)
            window = "window", step, self.columns
            self.kernel.call("sum_near", area, self.rows_of(area), "edges", *window, tile, phase, row, *self.span(k))

    def in_window(self, step: str, k: int = 0) -> str:
        """Where the row of a step has the ``k``-th numbers of the regions of this block."""
        lane = "lane" if self.parts else "0"
        return f"window + {self.size} * (({step} & {WINDOW - 1}) * {self.columns} + {k * self.regions} + {lane})"

    def write_to_window(self, rows: list[str], step: str) -> None:
        for k, name in enumerate(rows):
            self.kernel.call("to_window", self.in_window(step, k), self.kernel.row(name), self.count)

    def turn(self, count: int, step: str, way: int, area: str, stride: str, at: str, some: str = "") -> None:
        """Write a tile of steps, or ``some`` of its first, from the window to rows of time.

        ``step`` is the first of the tile, or, where steps go back in time, the last.
        """
        for k in range(count):
            target = f"{self.own(area, stride, k)} + {self.size} * ({at})"
            tile = self.in_window(step, k), way * self.columns, target, stride, self.count
            if some:
                self.kernel.call("turn_some", *tile, 0, some)
            else:
                self.kernel.call("turn", *tile)

    def send_now(self, rows: list[str], now: str) -> None:
        """Without delays: write rows of this block to where others read them."""
        if self.joined:
            for k, row in enumerate(rows):
                self.kernel.call("gather", f"{self.own(self.all_now(now), '1', k)}", self.kernel.row(row), self.count)

    def all_now(self, now: str) -> str:
        return f"{self.row_of_all} + {self.size * self.sent_rows} * width * ({now} & 1)"

    def sum_now(self, area: str, sources: list[str], now: str, to: list[str]) -> None:
        """The sums of a network without delays, over a matrix or a list, from rows to rows."""
        for k, name in enumerate(to):
            rows = self.all_now(now) if self.joined else self.kernel.row(sources[0]), self.kernel.row(name)
            if self.by_matrix:
                self.kernel.call("sum_now", self.own("matrix", "1"), "regions", "block", "width", *rows)
            else:
                self.kernel.call("sum_edges", area, self.rows_of(area), "edges", *rows, *self.span(k))


class ForwardCoupling(_Coupled):
    """What is sent and what arrives in a forward run.

    Results: the last history, and all that was sent where a gradient will follow.
    """

    kernel: ForwardKernel
    lists, sums, row_of_all = ("list_to",), ("sums",), "sent_by_all"

    def __init__(self, kernel: ForwardKernel):
        super().__init__(kernel)
        self.sent = kernel.rows.add(*kernel.names("sent", self.sources))
        self.saving = bool(kernel.segment)
        self.take_connections(kernel.initial.history)
        kernel.give_one("history", (self.sources * self.lanes * self.depth,))
        if self.saving:
            kernel.give_one("all_sent", (self.sources * self.lanes * self.stride,))
        else:
            self.stride = self.depth + max(AHEAD, self.depth // TILE * TILE)

    def shared_areas(self) -> dict[str, tuple[str, int]]:
        rows = self.sources * self.regions * self.size
        window = {} if self.saving else {"all_sent": (f"{rows} * stride", rows * self.stride)}
        return super().shared_areas() | window

    @property
    def in_time(self) -> bool:
        return bool(self.depth) or self.saving

    def saved(self, results: Mapping[str, Any]) -> jax.Array | None:
        return results.get("all_sent")

    def begin(self) -> None:
        kernel = self.kernel
        self.numbers()
        self.areas(f"work + {WORDS_END}")
        if self.saving:
            kernel.line(f"all_sent = {self.of_network('all_sent', 'stride', self.sources)}")
        with kernel.each_block():
            for name in self.sum:
                kernel.call("fill", kernel.row(name), "block")
        kernel.line("now, phase = depth, 0")
        if not self.by_matrix:
            with self.alone():
                self.sort("list_to", "rows", "columns", TILE, LONG, "stride" if self.depth else "1", -1)
        if self.depth:
            with kernel.each_block():
                for k in range(self.sources):
                    target = self.own("all_sent", "stride", k)
                    history = self.of_lane("first_history", k)
                    kernel.call("move", history, "depth", 0, target, "stride", 0, self.count, "depth")
                    kernel.call("remember", self.in_window("0", k), self.columns, history, "depth", self.count)
        self.meet()

    def depart(self) -> None:
        """Move the window if a tile would not fit in it."""
        if self.saving or not self.depth:
            return
        with self.kernel.block(f"if phase == 0 and now + {TILE} > stride:"):
            # Others may still read it.
            self.meet()
            with self.kernel.each_block():
                for k in range(self.sources):
                    self.move_history(k, self.own("all_sent", "stride", k), "stride")
            self.kernel.line("now = depth")

    def send(self) -> None:
        kernel = self.kernel
        with kernel.lanes() as lanes:
            lanes.store(self.sent, lanes.values(self.send_program, [*kernel.coefs, *kernel.state]))
        if self.in_time:
            self.write_to_window(self.sent, "n")
            with kernel.block(f"if phase == {TILE - 1}:"):
                self.turn(self.sources, "(n - phase)", 1, "all_sent", "stride", "now - phase")
        if not self.depth:
            self.send_now(self.sent, "n")

    def arrive(self) -> None:
        if not self.depth:
            self.sum_now("list_to", self.sent, "n", self.sum)
            return
        with self.kernel.block("if phase == 0:"):
            self.sum_tile("list_to", "all_sent", "sums", "n", "now")
        self.sum_near("list_to", "n", "sums", "phase", self.sum)

    def move_history(self, k: int, target: str, stride: str) -> None:
        """Copy what was sent of a quantity in the last steps, as many as the longest delay has."""
        source = self.own("all_sent", "stride", k)
        self.kernel.call("move", source, "stride", "now - depth", target, stride, 0, self.count, "depth")

    def leave(self) -> None:
        self.kernel.line("now += 1", f"phase = (phase + 1) % {TILE}")

    def end(self) -> None:
        with self.kernel.each_block():
            if self.in_time:
                with self.kernel.block("if phase > 0:"):
                    begin = "(steps - phase)", 1, "all_sent", "stride", "now - phase"
                    self.turn(self.sources, *begin, some="phase")
            for k in range(self.sources):
                self.move_history(k, self.of_lane("history", k), "depth")


class ReverseCoupling(_Coupled):
    """What is sent and what arrives, backwards.

    Arguments: the connections, all that was sent, and the cotangent of the last history. Results: the cotangent of the
    first history, and of the weights where they are wanted.
    """

    kernel: AdjointKernel
    lists, sums, row_of_all = ("list_to", "list_from"), ("sums", "ct_sums"), "ct_of_all"

    def __init__(self, kernel: AdjointKernel):
        super().__init__(kernel)
        assert kernel.pullbacks.send is not None
        self.ct_sent = kernel.rows.add(*kernel.names("ct_sent", self.sources))
        self.pullback = kernel.pullbacks.send
        self.of_send = kernel.tape.add(*kernel.names("s", self.pullback.n_kept))
        # Cotangents of all sums, the history before them, and what is read of tiles beyond the end.
        self.ct_stride = self.steps + self.depth + LONG
        self.take_connections(())
        kernel.take_one("all_sent", kernel.saved_by_coupling)
        kernel.take_one("ct_last", self.by_lane(kernel.cotangents.final.history))
        kernel.give_one("history", (self.sources * self.lanes * self.depth,))
        if any(kernel.wanted.weights):
            kernel.give_one("weights_of_edges", (self.networks * self.edges,))

    @property
    def plan(self) -> dict[str, int]:
        return super().plan | {"ct_stride": self.ct_stride}

    @property
    def in_time(self) -> bool:
        return True

    @property
    def sent_rows(self) -> int:
        return self.totals

    def shared_areas(self) -> dict[str, tuple[str, int]]:
        rows = self.totals * self.regions * self.size
        return super().shared_areas() | {"ct_arrived": (f"{rows} * ct_stride", rows * self.ct_stride)}

    def weights(self, results: Mapping[str, Any]) -> tuple[jax.Array | None, ...]:
        wanted = self.kernel.wanted.weights
        if not any(wanted):
            return (None,) * len(wanted)
        cotangents = results["weights_of_edges"].reshape(-1, self.edges).T
        if self.order is not None:
            cotangents = jnp.zeros_like(cotangents).at[self.order].set(cotangents, unique_indices=True)
        parts = zip(self.terms, self.ends[:-1], self.ends[1:], wanted, strict=True)
        return tuple(self.of_term(term, cotangents[a:b]) if w else None for term, a, b, w in parts)

    def of_term(self, connections: Connections, cotangents: jax.Array) -> jax.Array:
        """The cotangent of a term's weights, from those of its edges, ``(E, networks)``."""
        if connections.are_edges:
            return cotangents[None]
        rows, columns = connections.edges
        empty = jnp.zeros((self.regions, self.regions, self.networks), cotangents.dtype)
        return empty.at[rows, columns].set(cotangents, unique_indices=True, indices_are_sorted=True)

    def begin(self) -> None:
        kernel = self.kernel
        self.numbers()
        kernel.line(f"all_sent = {self.of_network('all_sent', 'stride', self.sources)}")
        for k in range(self.sources):
            kernel.line(f"ct_last{k} = {self.of_lane('ct_last', k, '0' if self.parts else 'lane')}")
        self.areas(f"work + {WORDS_END} + segment * {kernel.step_bytes}")
        with kernel.each_block():
            for k in range(self.totals):
                kernel.call("fill", self.own("ct_arrived", "ct_stride", k), f"{self.count} * ct_stride")
            for name in (*self.sum, *self.ct_sent):
                kernel.call("fill", kernel.row(name), "block")
        kernel.line("phase = 0")
        with self.alone():
            kernel.call("fill", "window", WINDOW * self.columns)
            # All that was sent is known: no connection is near.
            self.sort("list_to", "rows", "columns", 0, 0, "stride", -1)
        if not self.by_matrix:
            with self.alone("if me == threads - 1:"):
                self.sort("list_from", "columns", "rows", TILE, LONG, "ct_stride" if self.depth else "1", 1)
        self.meet()

    def replay(self) -> None:
        kernel = self.kernel
        with kernel.block(f"if j % {TILE} == 0:"):
            rest = f"min({LONG // TILE}, (length - j + {TILE - 1}) // {TILE})"
            self.sum_tile("list_to", "all_sent", "sums", "j", "depth + n", tiles=rest)
        # None is near.
        self.sum_near("list_to", "n", "sums", f"j % {TILE}", self.sum)
        with kernel.lanes() as lanes:
            lanes.store(self.of_send, lanes.values(self.pullback.keep, [*kernel.coefs, *kernel.state]))

    def send_back(self) -> None:
        kernel = self.kernel
        self.write_to_window(kernel.ct_arrived, "(steps - 1 - n)")
        with kernel.block(f"if phase == {TILE - 1}:"):
            self.turn(self.totals, "(steps - 1 - n)", -1, "ct_arrived", "ct_stride", "n")
        if not self.depth:
            self.send_now(kernel.ct_arrived, "n")

    def reverse(self) -> None:
        kernel = self.kernel
        if self.depth:
            self.sum_delayed()
        else:
            self.sum_now("list_from", kernel.ct_arrived, "n", self.ct_sent)
        with kernel.lanes() as lanes:
            known = [*kernel.coefs, *self.of_send, *self.ct_sent]
            lanes.add([*kernel.ct_coefs, *kernel.ct_state], lanes.values(self.pullback.back, known))

    def sum_delayed(self) -> None:
        """The cotangents of what is sent at step ``n``, from those of later sums and of the last history."""
        kernel = self.kernel
        with kernel.block("if phase == 0:"):
            self.sum_tile("list_from", "ct_arrived", "ct_sums", "(steps - 1 - n)", "n", way=-1)
        self.sum_near("list_from", "(steps - 1 - n)", "ct_sums", f"{TILE - 1} - phase", self.ct_sent)
        with kernel.block("if n >= steps - depth:"):
            for k, name in enumerate(self.ct_sent):
                final = self.own(f"ct_last{k}", "depth")
                kernel.call("add_final", kernel.row(name), final, "depth", "n - (steps - depth)", self.count)

    def leave_back(self) -> None:
        self.kernel.line(f"phase = (phase + 1) % {TILE}")

    def end(self) -> None:
        kernel, edges = self.kernel, ("rows", "columns", "delays")
        with kernel.each_block(), kernel.block("if phase > 0:"):
            self.turn(self.totals, "(steps - 1)", -1, "ct_arrived", "ct_stride", "0", some="phase")
        # A history is of the cotangents of all regions.
        self.meet()
        if self.depth:
            with kernel.each_block():
                for k in range(self.sources):
                    # Rows of time are numbered on from one quantity to the next.
                    back = f" - {self.size * k * self.regions} * depth" if k else ""
                    target = self.of_lane("history", k, "0" if self.parts else "lane") + back
                    past = (f"ct_last{k}{back}", "depth", "steps", "ct_arrived", "ct_stride")
                    kernel.call("to_history", target, *past, *edges, "weights", "edges", *self.span(k))
        if any(kernel.wanted.weights):
            network = "0" if self.parts else "number"
            target = f"{kernel.address('weights_of_edges')} + {self.size} * edges * {network}"
            both = ("all_sent", "stride", "depth", "ct_arrived", "ct_stride", "steps")
            with kernel.each_block():
                for first, end in map(self.span, range(self.totals)) if self.parts else [("", "")]:
                    # Edges are sorted by the row that they go to, as the list is.
                    some = (f"i64_at(list_to)[{first}]", f"i64_at(list_to)[{end}]") if self.parts else ("0", "edges")
                    kernel.call("to_weights", target, *both, *edges, *some)
