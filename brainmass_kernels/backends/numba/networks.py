"""What is sent and what arrives, where a block of lanes is a network: lines that the kernels of `source` have besides.

What every region sent lies in rows of time. A forward run has a window of it, which moves on when it is full; one that
a gradient will follow keeps it all. The adjoint has the cotangents of all sums in such rows too, and runs the
connections backwards over them.
"""

from __future__ import annotations

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

    def __init__(self, kernel: Kernel):
        self.kernel, loop = kernel, kernel.loop
        assert loop.coupling is not None
        assert kernel.operands.connections is not None
        self.send, self.connections = loop.coupling.send, kernel.operands.connections
        self.regions, self.depth, self.steps = loop.coupling.regions, loop.coupling.depth, loop.schedule.steps
        self.lanes, self.edges = kernel.layout.lanes, self.connections.edges.shape[1]
        self.size = kernel.layout.itemsize
        # Sums without delays are over a matrix where the weights are one, else over a list like those with delays.
        self.by_matrix = not self.depth and not self.connections.are_edges
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
        return jnp.pad(matrix, ((0, 0), (0, 0), (0, self.kernel.layout.block - self.regions)))

    @property
    def plan(self) -> dict[str, int]:
        shared = int(self.connections.weights.ndim == 2)
        return {"depth": self.depth, "edges": self.edges, "stride": self.stride, "shared": shared}

    @property
    def scratch_bytes(self) -> int:
        of_list = (8 * (3 * self.regions + 1) + (8 + self.size) * self.edges + 63) // 64 * 64
        return len(self.lists) * of_list + len(self.sums) * (self.regions + 1) * TILE * self.size

    def history(self, results: Mapping[str, Any]) -> jax.Array:
        return results["history"].reshape(self.lanes, self.depth).T

    # Lines -----------------------------------------------------------------------------------------------------------

    def numbers(self) -> None:
        """What the lines read from the plan, and where the connections are."""
        kernel, argument = self.kernel, self.kernel.address
        kernel.line(f"regions = {self.regions}")
        for name in ("depth", "edges", "stride", "ct_stride", "shared"):
            kernel.line(f"{name} = plan[{PLAN.index(name)}]")
        kernel.addresses(["rows", "columns", "delays"])
        kernel.line(f"weights = {argument('weights')} + (0 if shared else {self.size} * edges * number)")
        if self.by_matrix:
            matrix = f"{argument('matrix')} + (0 if shared else {self.size} * regions * block * number)"
            kernel.line(f"matrix = {matrix}")

    def areas(self, begin: str) -> None:
        """Addresses of the lists and the sums in the scratch."""
        line = self.kernel.line
        line(f"list_bytes = (8 * (3 * regions + 1) + {8 + self.size} * edges + 63) // 64 * 64")
        line(f"sum_bytes = (regions + 1) * {TILE * self.size}", f"at_end = {begin}")
        for names, size in ((self.lists, "list_bytes"), (self.sums, "sum_bytes")):
            for name in names:
                line(f"{name} = at_end", f"at_end += {size}")

    def sort(self, area: str, of: str, others: str, nearest: int, stride: str, sign: int) -> None:
        """List the connections by the region they are ``of``."""
        self.kernel.call(
            "list_connections", area, of, others, "delays", "weights", "edges", "regions", nearest, stride, sign
        )

    def sum_far(self, area: str, source: str, start: str, sums: str) -> None:
        """The sums of a tile over the connections of a list whose delays are a tile or longer."""
        self.kernel.call("sum_far", area, "regions", "edges", source, start, sums)

    def sum_near(self, area: str, source: str, now: str, sums: str, phase: str, to: str) -> None:
        """The sums of one step of the tile, with the connections of shorter delays, in a row."""
        self.kernel.call("sum_near", area, "regions", "edges", source, now, sums, phase, self.kernel.row(to))

    def sum_now(self, area: str, source: str, to: str) -> None:
        """The sums of a network without delays, over a matrix or a list, from a row to a row."""
        rows = self.kernel.row(source), self.kernel.row(to)
        if self.by_matrix:
            self.kernel.call("sum_now", "matrix", "regions", "block", *rows)
        else:
            self.kernel.call("sum_edges", area, "regions", "edges", *rows)


class ForwardCoupling(_Coupled):
    """What is sent and what arrives in a forward run.

    Results: the last history, and all that was sent where a gradient will follow.
    """

    kernel: ForwardKernel
    lists, sums = ("list_to",), ("sums",)

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

    @property
    def scratch_bytes(self) -> int:
        return super().scratch_bytes + (0 if self.saving else self.regions * self.stride * self.size)

    def saved(self, results: Mapping[str, Any]) -> jax.Array | None:
        return results.get("all_sent")

    def begin(self) -> None:
        kernel = self.kernel
        self.numbers()
        self.areas(f"work + {WORDS_END}")
        if self.saving:
            kernel.line(f"all_sent = {kernel.address('all_sent')} + {self.size} * lane * stride")
        else:
            kernel.line("all_sent = at_end", f"at_end += {self.size} * regions * stride")
        kernel.call("fill", kernel.row(self.sum), "block")
        kernel.line("now, phase = depth, 0")
        if self.depth:
            self.sort("list_to", "rows", "columns", TILE, "stride", -1)
            history = f"{kernel.address('first_history')} + {self.size} * lane * depth"
            kernel.call("move", history, "depth", 0, "all_sent", "stride", 0, "regions", "depth")
        elif not self.by_matrix:
            self.sort("list_to", "rows", "columns", TILE, 1, -1)

    def arrive(self) -> None:
        kernel = self.kernel
        with kernel.lanes() as lanes:
            lanes.store([self.sent], lanes.values(self.send, [*kernel.coefs, *kernel.state]))
        if not self.depth:
            if self.saving:
                self.scatter()
            self.sum_now("list_to", self.sent, self.sum)
            return
        with kernel.block("if phase == 0:"):
            if not self.saving:
                self.move_window()
            self.sum_far("list_to", "all_sent", "now", "sums")
        self.scatter()
        self.sum_near("list_to", "all_sent", "now", "sums", "phase", self.sum)

    def scatter(self) -> None:
        self.kernel.call("scatter", self.kernel.row(self.sent), "all_sent", "stride", "now", "regions")

    def move_window(self) -> None:
        with self.kernel.block(f"if now + {TILE} > stride:"):
            self.move_history("all_sent", "stride")
            self.kernel.line("now = depth")

    def move_history(self, target: str, stride: str) -> None:
        """Copy what was sent in the last steps, as many as the longest delay has."""
        self.kernel.call("move", "all_sent", "stride", "now - depth", target, stride, 0, "regions", "depth")

    def leave(self) -> None:
        self.kernel.line("now += 1", f"phase = (phase + 1) % {TILE}")

    def end(self) -> None:
        self.move_history(f"{self.kernel.address('history')} + {self.size} * lane * depth", "depth")


class ReverseCoupling(_Coupled):
    """What is sent and what arrives, backwards.

    Arguments: the connections, all that was sent, and the cotangent of the last history. Results: the cotangent of the
    first history, and of the weights where they are wanted.
    """

    kernel: AdjointKernel
    lists, sums = ("list_to", "list_from"), ("sums", "ct_sums")

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
            kernel.give_one("weights_of_edges", (kernel.layout.blocks * self.edges,))

    @property
    def plan(self) -> dict[str, int]:
        return super().plan | {"ct_stride": self.ct_stride}

    @property
    def scratch_bytes(self) -> int:
        return super().scratch_bytes + self.regions * self.ct_stride * self.size

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
        kernel.line(
            f"all_sent = {kernel.address('all_sent')} + {size} * lane * stride",
            f"ct_last = {kernel.address('ct_last')} + {size} * lane * depth",
            f"tape_bytes = segment * {kernel.tape_numbers * size}",
        )
        self.areas("slots + tape_bytes")
        kernel.line("ct_arrived = at_end")
        kernel.call("fill", "ct_arrived", "regions * ct_stride")
        kernel.call("fill", kernel.row(self.sum), "block")
        kernel.call("fill", kernel.row(self.ct_sent), "block")
        # All that was sent is known: no connection is near.
        self.sort("list_to", "rows", "columns", 0, "stride", -1)
        kernel.line("phase = 0")
        if self.depth:
            self.sort("list_from", "columns", "rows", TILE, "ct_stride", 1)
        elif not self.by_matrix:
            self.sort("list_from", "columns", "rows", TILE, 1, 1)

    def replay(self) -> None:
        kernel = self.kernel
        with kernel.block(f"if j % {TILE} == 0:"):
            self.sum_far("list_to", "all_sent", "depth + n", "sums")
        self.sum_near("list_to", "all_sent", "depth + n", "sums", f"j % {TILE}", self.sum)
        with kernel.lanes() as lanes:
            lanes.store(self.of_send, lanes.values(self.pullback.keep, [*kernel.coefs, *kernel.state]))

    def reverse(self) -> None:
        kernel = self.kernel
        kernel.call("scatter", kernel.row("ct_arrived0"), "ct_arrived", "ct_stride", "n", "regions")
        if self.depth:
            self.sum_delayed()
        else:
            self.sum_now("list_from", "ct_arrived0", self.ct_sent)
        with kernel.lanes() as lanes:
            known = [*kernel.coefs, *self.of_send, self.ct_sent]
            lanes.add([*kernel.ct_coefs, *kernel.ct_state], lanes.values(self.pullback.back, known))

    def sum_delayed(self) -> None:
        """The cotangents of what is sent at step ``n``, from those of later sums and of the last history."""
        kernel = self.kernel
        with kernel.block("if phase == 0:"):
            self.sum_far("list_from", "ct_arrived", f"n - {TILE - 1}", "ct_sums")
        self.sum_near("list_from", "ct_arrived", "n", "ct_sums", f"{TILE - 1} - phase", self.ct_sent)
        kernel.line(f"phase = (phase + 1) % {TILE}")
        with kernel.block("if n >= steps - depth:"):
            kernel.call("add_final", kernel.row(self.ct_sent), "ct_last", "depth", "n - (steps - depth)", "regions")

    def end(self) -> None:
        kernel, edges = self.kernel, ("rows", "columns", "delays")
        if self.depth:
            target = f"{kernel.address('history')} + {self.size} * lane * depth"
            past = ("ct_last", "depth", "steps", "ct_arrived", "ct_stride")
            kernel.call("to_history", target, *past, *edges, "weights", "edges", "regions")
        if kernel.wanted.weights:
            target = f"{kernel.address('weights_of_edges')} + {self.size} * edges * number"
            both = ("all_sent", "stride", "depth", "ct_arrived", "ct_stride", "steps")
            kernel.call("to_weights", target, *both, *edges, "edges")
