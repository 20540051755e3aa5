"""What is sent and what arrives, where a block of lanes is a network: lines that the kernels of `source` have besides.

What every region sent lies in rows of time. A forward run has a window of it, which moves on when it is full; one that
a gradient will follow keeps it all. The adjoint has the cotangents of all sums in such rows too, and runs the
connections backwards over them.

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

from .language import PACK as TILE
from .layout import PLAN
from .masses import Uncoupled
from .source import WORDS_END, AdjointKernel, ForwardKernel, Kernel

# Steps that the window of a forward run has at least, beyond the longest delay.
AHEAD = 1024


class _Coupled(Uncoupled):
    """Lines of both directions.

    Arguments: of each connection the region that it goes to, the one that it comes from, its delay, its weight; and
    the history before a forward run with delays, or the weights as a matrix where there are none, and they are one.
    """

    # Areas of the scratch: the connections of each region, and sums of the steps of a tile.
    lists: tuple[str, ...]
    sums: tuple[str, ...]
    # And what is sent without delays, of this step and the last, where threads share the network.
    row_of_all: str

    def __init__(self, kernel: Kernel):
        self.kernel, loop = kernel, kernel.loop
        assert loop.coupling is not None
        assert kernel.operands.connections is not None
        self.send_program, self.connections = loop.coupling.send, kernel.operands.connections
        self.regions, self.depth, self.steps = loop.coupling.regions, loop.coupling.depth, loop.schedule.steps
        self.lanes, self.edges = kernel.layout.lanes, self.connections.edges.shape[1]
        self.size = kernel.layout.itemsize
        # Sums without delays are over a matrix where the weights are one, else over a list like those with delays.
        self.by_matrix = not self.depth and not self.connections.are_edges
        self.parts = kernel.layout.parts
        self.networks = self.lanes // self.regions
        # Regions of a row of all of them.
        self.width = kernel.layout.block * (self.parts or 1)
        # All that a region sends in a run, and what is read of tiles beyond its end.
        self.stride = self.depth + self.steps + TILE
        (self.sum,) = kernel.rows.add(kernel.inputs[-1])

    def take_connections(self, history: jax.Array | None) -> None:
        """Take the connections, with the history before a forward run; an adjoint takes the matrix to the sources."""
        kernel, connections = self.kernel, self.connections
        rows, columns = connections.edges
        kernel.take_one("rows", rows)
        kernel.take_one("columns", columns)
        kernel.take_one("delays", connections.steps_of_edges)
        kernel.take_one("weights", connections.weights_of_edges.T.reshape(-1))
        if self.by_matrix:
            kernel.take_one("matrix", self.matrix(transposed=history is not None).reshape(-1))
        elif history is not None and self.depth:
            kernel.take_one("first_history", history.T.reshape(-1))

    def matrix(self, transposed: bool) -> jax.Array:
        """Weights to regions from regions, or transposed, padded to rows of a block; of each network, or of all."""
        weights = self.connections.weights
        matrix = jnp.moveaxis(weights[..., None] if weights.ndim == 2 else weights, -1, 0)
        matrix = jnp.swapaxes(matrix, 1, 2) if transposed else matrix
        return jnp.pad(matrix, ((0, 0), (0, 0), (0, self.width - self.regions)))

    @property
    def plan(self) -> dict[str, int]:
        shared = int(self.connections.weights.ndim == 2)
        return {"depth": self.depth, "edges": self.edges, "stride": self.stride, "shared": shared}

    def shared_areas(self) -> dict[str, tuple[str, int]]:
        """The areas of a network, its lists first: bytes as the kernel computes them, and as they are."""
        of_list = f"(8 * (3 * regions + 1) + {8 + self.size} * edges + 63) // 64 * 64"
        bytes_of_list = (8 * (3 * self.regions + 1) + (8 + self.size) * self.edges + 63) // 64 * 64
        areas = dict.fromkeys(self.lists, (of_list, bytes_of_list))
        if self.parts:
            areas[self.row_of_all] = f"{2 * self.size} * width", 2 * self.size * self.width
        return areas

    @property
    def areas_bytes(self) -> int:
        return sum(size for _, size in self.shared_areas().values())

    @property
    def sums_bytes(self) -> int:
        """Of the sums of a block."""
        lanes = self.kernel.layout.block if self.parts else self.regions
        return len(self.sums) * (lanes + 1) * TILE * self.size

    @property
    def scratch_bytes(self) -> int:
        return self.sums_bytes + (0 if self.parts else self.areas_bytes)

    @property
    def common_bytes(self) -> int:
        return self.areas_bytes if self.parts else 0

    def history(self, results: Mapping[str, Any]) -> jax.Array:
        return results["history"].reshape(self.lanes, self.depth).T

    # Lines -----------------------------------------------------------------------------------------------------------

    def numbers(self) -> None:
        """What the lines read from the plan, and where the connections are."""
        kernel, argument = self.kernel, self.kernel.address
        kernel.line(f"regions = {self.regions}", f"width = {self.width}")
        for name in ("depth", "edges", "stride", "ct_stride", "shared"):
            kernel.line(f"{name} = plan[{PLAN.index(name)}]")
        kernel.addresses(["rows", "columns", "delays"])
        network = "0" if self.parts else "(0 if shared else number)"
        kernel.line(f"weights = {argument('weights')} + {self.size} * edges * {network}")
        if self.by_matrix:
            kernel.line(f"matrix = {argument('matrix')} + {self.size} * regions * width * {network}")

    def areas(self, begin: str) -> None:
        """Addresses of the areas, from where they begin in the scratch, unless threads have them in common."""
        line, each = self.kernel.line, self.sums_bytes // len(self.sums)
        line(f"at_end = {'job + JOB_BYTES' if self.parts else begin}")
        areas = [(name, size) for name, (size, _) in self.shared_areas().items()]
        if not self.parts:
            areas[len(self.lists) : len(self.lists)] = [(name, str(each)) for name in self.sums]
        for name, size in areas:
            line(f"{name} = at_end", f"at_end += {size}")

    def area_of_sums(self, name: str) -> str:
        """Where the sums of a block are."""
        if not self.parts:
            return name
        each = self.sums_bytes // len(self.sums)
        return f"work + {WORDS_END} + segment * {self.kernel.step_bytes} + {each * self.sums.index(name)}"

    def own(self, area: str, stride: str) -> str:
        """Where, in an area of all regions, those of this block are."""
        return f"{area} + {self.size} * lane * {stride}" if self.parts else area

    @property
    def count(self) -> str:
        """How many regions a block has."""
        return "valid" if self.parts else "regions"

    @property
    def span(self) -> tuple[str, str]:
        """The first region of a block, and the end."""
        return ("lane", "lane + valid") if self.parts else ("0", "regions")

    def alone(self, head: str = "if me == 0:"):
        """Lines that are for one thread."""
        return self.kernel.block(head) if self.parts else contextlib.nullcontext()

    def meet(self) -> None:
        if self.parts:
            self.kernel.line("times = meet(job, threads, times)")

    def sort(self, area: str, of: str, others: str, nearest: int, stride: str, sign: int) -> None:
        """List the connections by the region they are ``of``."""
        self.kernel.call(
            "list_connections", area, of, others, "delays", "weights", "edges", "regions", nearest, stride, sign
        )

    def sum_far(self, area: str, source: str, start: str, sums: str) -> None:
        """The sums of a tile over the connections of a list whose delays are a tile or longer."""
        self.kernel.call("sum_far", area, "regions", "edges", source, start, self.area_of_sums(sums), *self.span)

    def sum_near(self, area: str, source: str, now: str, sums: str, phase: str, to: str) -> None:
        """The sums of one step of the tile, with the connections of shorter delays, in a row."""
        place, row = self.area_of_sums(sums), self.kernel.row(to)
        self.kernel.call("sum_near", area, "regions", "edges", source, now, place, phase, row, *self.span)

    def send_now(self, row: str, now: str) -> None:
        """Without delays: write a row of this block to where others read it."""
        if self.parts:
            self.kernel.call("gather", f"{self.own(self.all_now(now), '1')}", self.kernel.row(row), "valid")

    def all_now(self, now: str) -> str:
        return f"{self.row_of_all} + {self.size} * width * ({now} & 1)"

    def sum_now(self, area: str, source: str, now: str, to: str) -> None:
        """The sums of a network without delays, over a matrix or a list, from a row to a row."""
        rows = self.all_now(now) if self.parts else self.kernel.row(source), self.kernel.row(to)
        if self.by_matrix:
            self.kernel.call("sum_now", self.own("matrix", "1"), "regions", "block", "width", *rows)
        else:
            self.kernel.call("sum_edges", area, "regions", "edges", *rows, *self.span)


class ForwardCoupling(_Coupled):
    """What is sent and what arrives in a forward run.

    Results: the last history, and all that was sent where a gradient will follow.
    """

    kernel: ForwardKernel
    lists, sums, row_of_all = ("list_to",), ("sums",), "sent_by_all"

    def __init__(self, kernel: ForwardKernel):
        super().__init__(kernel)
        (self.sent,) = kernel.rows.add("sent0")
        self.saving = bool(kernel.segment)
        self.take_connections(kernel.initial.history)
        kernel.give_one("history", (self.lanes * self.depth,))
        if self.saving:
            kernel.give_one("all_sent", (self.lanes * self.stride,))
        else:
            self.stride = self.depth + max(AHEAD, self.depth // TILE * TILE)

    def shared_areas(self) -> dict[str, tuple[str, int]]:
        rows = self.regions * self.size
        window = {} if self.saving else {"all_sent": (f"{rows} * stride", rows * self.stride)}
        return super().shared_areas() | window

    def saved(self, results: Mapping[str, Any]) -> jax.Array | None:
        return results.get("all_sent")

    def begin(self) -> None:
        kernel = self.kernel
        self.numbers()
        self.areas(f"work + {WORDS_END}")
        if self.saving:
            network = "0" if self.parts else "lane"
            kernel.line(f"all_sent = {kernel.address('all_sent')} + {self.size} * {network} * stride")
        with kernel.each_block():
            kernel.call("fill", kernel.row(self.sum), "block")
        kernel.line("now, phase = depth, 0")
        if not self.by_matrix:
            with self.alone():
                self.sort("list_to", "rows", "columns", TILE, "stride" if self.depth else "1", -1)
        if self.depth:
            history = f"{kernel.address('first_history')} + {self.size} * lane * depth"
            target = self.own("all_sent", "stride")
            with kernel.each_block():
                kernel.call("move", history, "depth", 0, target, "stride", 0, self.count, "depth")
        self.meet()

    def depart(self) -> None:
        """Move the window if a tile would not fit in it."""
        if self.saving or not self.depth:
            return
        with self.kernel.block(f"if phase == 0 and now + {TILE} > stride:"):
            # Others may still read it.
            self.meet()
            with self.kernel.each_block():
                self.move_history(self.own("all_sent", "stride"), "stride")
            self.kernel.line("now = depth")

    def send(self) -> None:
        kernel = self.kernel
        with kernel.lanes() as lanes:
            lanes.store([self.sent], lanes.values(self.send_program, [*kernel.coefs, *kernel.state]))
        if self.depth or self.saving:
            kernel.call("scatter", kernel.row(self.sent), self.own("all_sent", "stride"), "stride", "now", self.count)
        if not self.depth:
            self.send_now(self.sent, "n")

    def arrive(self) -> None:
        if not self.depth:
            self.sum_now("list_to", self.sent, "n", self.sum)
            return
        with self.kernel.block("if phase == 0:"):
            self.sum_far("list_to", "all_sent", "now", "sums")
        self.sum_near("list_to", "all_sent", "now", "sums", "phase", self.sum)

    def move_history(self, target: str, stride: str) -> None:
        """Copy what was sent in the last steps, as many as the longest delay has."""
        source = self.own("all_sent", "stride")
        self.kernel.call("move", source, "stride", "now - depth", target, stride, 0, self.count, "depth")

    def leave(self) -> None:
        self.kernel.line("now += 1", f"phase = (phase + 1) % {TILE}")

    def end(self) -> None:
        with self.kernel.each_block():
            self.move_history(f"{self.kernel.address('history')} + {self.size} * lane * depth", "depth")


class ReverseCoupling(_Coupled):
    """What is sent and what arrives, backwards.

    Arguments: the connections, all that was sent, and the cotangent of the last history. Results: the cotangent of the
    first history, and of the weights where they are wanted.
    """

    kernel: AdjointKernel
    lists, sums, row_of_all = ("list_to", "list_from"), ("sums", "ct_sums"), "ct_of_all"

    def __init__(self, kernel: AdjointKernel):
        super().__init__(kernel)
        history = kernel.cotangents.final.history
        assert history is not None
        assert kernel.pullbacks.send is not None
        (self.ct_sent,) = kernel.rows.add("ct_sent0")
        self.pullback = kernel.pullbacks.send
        self.of_send = kernel.tape.add(*kernel.names("s", self.pullback.n_kept))
        # Cotangents of all sums, the history before them, and what is read of tiles beyond the end.
        self.ct_stride = self.steps + self.depth + TILE
        self.take_connections(None)
        kernel.take_one("all_sent", kernel.saved_by_coupling)
        kernel.take_one("ct_last", history.T.reshape(-1))
        kernel.give_one("history", (self.lanes * self.depth,))
        if kernel.wanted.weights:
            kernel.give_one("weights_of_edges", (self.networks * self.edges,))

    @property
    def plan(self) -> dict[str, int]:
        return super().plan | {"ct_stride": self.ct_stride}

    def shared_areas(self) -> dict[str, tuple[str, int]]:
        rows = self.regions * self.size
        return super().shared_areas() | {"ct_arrived": (f"{rows} * ct_stride", rows * self.ct_stride)}

    def weights(self, results: Mapping[str, Any]) -> jax.Array | None:
        if not self.kernel.wanted.weights:
            return None
        cotangents = results["weights_of_edges"].reshape(-1, self.edges)
        if self.connections.are_edges:
            return cotangents.T[None]
        rows, columns = self.connections.edges
        empty = jnp.zeros((self.regions, self.regions, len(cotangents)), cotangents.dtype)
        return empty.at[rows, columns].set(cotangents.T, unique_indices=True, indices_are_sorted=True)

    def begin(self) -> None:
        kernel, size = self.kernel, self.size
        self.numbers()
        network = "0" if self.parts else "lane"
        kernel.line(
            f"all_sent = {kernel.address('all_sent')} + {size} * {network} * stride",
            f"ct_last = {kernel.address('ct_last')} + {size} * {network} * depth",
        )
        self.areas(f"work + {WORDS_END} + segment * {kernel.step_bytes}")
        with kernel.each_block():
            kernel.call("fill", self.own("ct_arrived", "ct_stride"), f"{self.count} * ct_stride")
            kernel.call("fill", kernel.row(self.sum), "block")
            kernel.call("fill", kernel.row(self.ct_sent), "block")
        kernel.line("phase = 0")
        with self.alone():
            # All that was sent is known: no connection is near.
            self.sort("list_to", "rows", "columns", 0, "stride", -1)
        if not self.by_matrix:
            with self.alone("if me == threads - 1:"):
                self.sort("list_from", "columns", "rows", TILE, "ct_stride" if self.depth else "1", 1)
        self.meet()

    def replay(self) -> None:
        kernel = self.kernel
        with kernel.block(f"if j % {TILE} == 0:"):
            self.sum_far("list_to", "all_sent", "depth + n", "sums")
        self.sum_near("list_to", "all_sent", "depth + n", "sums", f"j % {TILE}", self.sum)
        with kernel.lanes() as lanes:
            lanes.store(self.of_send, lanes.values(self.pullback.keep, [*kernel.coefs, *kernel.state]))

    def send_back(self) -> None:
        kernel, target = self.kernel, self.own("ct_arrived", "ct_stride")
        kernel.call("scatter", kernel.row("ct_arrived0"), target, "ct_stride", "n", self.count)
        if not self.depth:
            self.send_now("ct_arrived0", "n")

    def reverse(self) -> None:
        kernel = self.kernel
        if self.depth:
            self.sum_delayed()
        else:
            self.sum_now("list_from", "ct_arrived0", "n", self.ct_sent)
        with kernel.lanes() as lanes:
            known = [*kernel.coefs, *self.of_send, self.ct_sent]
            lanes.add([*kernel.ct_coefs, *kernel.ct_state], lanes.values(self.pullback.back, known))

    def sum_delayed(self) -> None:
        """The cotangents of what is sent at step ``n``, from those of later sums and of the last history."""
        kernel = self.kernel
        with kernel.block("if phase == 0:"):
            self.sum_far("list_from", "ct_arrived", f"n - {TILE - 1}", "ct_sums")
        self.sum_near("list_from", "ct_arrived", "n", "ct_sums", f"{TILE - 1} - phase", self.ct_sent)
        with kernel.block("if n >= steps - depth:"):
            final = self.own("ct_last", "depth")
            kernel.call("add_final", kernel.row(self.ct_sent), final, "depth", "n - (steps - depth)", self.count)

    def leave_back(self) -> None:
        self.kernel.line(f"phase = (phase + 1) % {TILE}")

    def end(self) -> None:
        kernel, edges = self.kernel, ("rows", "columns", "delays")
        network, (first, end) = "0" if self.parts else "lane", self.span
        if self.depth:
            target = f"{kernel.address('history')} + {self.size} * {network} * depth"
            past = ("ct_last", "depth", "steps", "ct_arrived", "ct_stride")
            with kernel.each_block():
                kernel.call("to_history", target, *past, *edges, "weights", "edges", first, end)
        if kernel.wanted.weights:
            network = "0" if self.parts else "number"
            target = f"{kernel.address('weights_of_edges')} + {self.size} * edges * {network}"
            both = ("all_sent", "stride", "depth", "ct_arrived", "ct_stride", "steps")
            # Edges are sorted by the region that they go to, as the list is.
            some = (f"i64_at(list_to)[{first}]", f"i64_at(list_to)[{end}]") if self.parts else ("0", "edges")
            with kernel.each_block():
                kernel.call("to_weights", target, *both, *edges, *some)
