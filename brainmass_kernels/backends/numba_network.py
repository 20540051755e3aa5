"""Networks on the CPU: a block of lanes is a network, and threads take networks until none is left.

The kernels are those of `numba`, with lines for what is sent and what arrives. What every region sent lies in rows of
time. A forward run has a window of it, which is moved when it is full; one that a gradient will follow keeps it all.
The adjoint has the cotangents of all sums in such rows too, and runs the connections backwards over them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp

from ..pointwise import SplitPullback
from .base import Adjoint, Carry, Connections, Cotangents, Forward, Loop, Operands, Pullbacks, Wanted
from .numba import _PLAN, NARROWEST, Rows, Shape, Uncoupled, _call, _indented, _Kernel, adjoint_source, forward_source

if TYPE_CHECKING:
    import jax

# As in the runtime, which imports numba.
TILE = 16
# Steps that the window of a forward run has at least, beyond the longest delay.
AHEAD = 1024


def forward(loop: Loop, operands: Operands, initial: Carry, checkpoint_every: int | None) -> Forward:
    (coefs, inputs, seeds, connections), state = operands, initial.state
    coupling, steps = loop.coupling, loop.schedule.steps
    assert coupling is not None
    assert connections is not None
    lanes, dtype, regions = state[0].shape[0], state[0].dtype, coupling.regions
    shape = _shape(coefs, inputs, seeds, dtype, regions, "forward")
    keep = checkpoint_every is not None
    source = forward_source(loop, shape, lambda kernel: ForwardCoupling(kernel, keep))
    segments = -(-steps // checkpoint_every) if checkpoint_every else 0
    depth, edges = coupling.depth, connections.edges.shape[1]
    stride = _stride(depth, steps) if keep else depth + max(AHEAD, depth // TILE * TILE)
    results = [
        *[(loop.schedule.count, lanes)] * loop.n_observables,
        *[(lanes,)] * loop.n_state,
        *[(segments, lanes)] * loop.n_state,
        (lanes * depth,),
        *([(lanes * stride,)] if keep else []),
    ]
    size = dtype.itemsize
    scratch = source.rows * shape.block * size + _list_bytes(regions, edges, size) + (regions + 1) * TILE * size
    scratch += 0 if keep else regions * stride * size
    wired = _Arguments(connections, shape.block, depth)
    given = (*coefs, *state, *inputs, *([] if seeds is None else [seeds]), *wired.arguments(initial.history))
    out = iter(
        _call(
            source, loop, shape, lanes, scratch, checkpoint_every or 0, given, results, regions,
            depth=depth, edges=edges, stride=stride, shared=wired.shared,
        )
    )  # fmt: skip
    records = tuple(next(out) for _ in range(loop.n_observables))
    final = tuple(next(out) for _ in range(loop.n_state))
    saved = tuple(next(out) for _ in range(loop.n_state))
    history = next(out).reshape(lanes, depth).T
    return Forward(records, Carry(final, history), (*saved, next(out)) if keep else None)


def adjoint(
    loop: Loop, pullbacks: Pullbacks, wanted: Wanted, operands: Operands, saved, cotangents: Cotangents,
    checkpoint_every: int,
) -> Adjoint:  # fmt: skip
    (coefs, inputs, seeds, connections), (ct_final, ct_history) = operands, cotangents.final
    coupling, steps = loop.coupling, loop.schedule.steps
    assert coupling is not None
    assert connections is not None
    assert ct_history is not None
    lanes, dtype, regions = ct_final[0].shape[0], ct_final[0].dtype, coupling.regions
    shape = _shape(coefs, inputs, seeds, dtype, regions, "adjoint")
    source = adjoint_source(
        loop, pullbacks, wanted, shape, lambda kernel, kept: ReverseCoupling(kernel, kept, pullbacks, wanted)
    )
    depth, edges, networks = coupling.depth, connections.edges.shape[1], lanes // regions
    n_coefs = sum(wanted.coefs)
    results = [(lanes,)] * (n_coefs + loop.n_state) + [
        (steps, networks if uniform else lanes) for uniform, w in zip(shape.uniform_inputs, wanted.inputs) if w
    ]
    results += [(lanes * depth,), *([(networks * edges,)] if wanted.weights else [])]
    stride, apart, size = _stride(depth, steps), steps + depth + TILE, dtype.itemsize
    scratch = (source.rows + checkpoint_every * source.kept) * shape.block * size
    scratch += 2 * _list_bytes(regions, edges, size) + 2 * (regions + 1) * TILE * size + regions * apart * size
    wired = _Arguments(connections, shape.block, depth)
    given = (*coefs, *saved[:-1], *inputs, *([] if seeds is None else [seeds]), *cotangents.records, *ct_final)
    given += (*wired.arguments(None), saved[-1], ct_history.T.reshape(-1))
    out = _call(
        source, loop, shape, lanes, scratch, checkpoint_every, given, results, regions,
        depth=depth, edges=edges, stride=stride, apart=apart, shared=wired.shared,
    )  # fmt: skip
    n = n_coefs + loop.n_state
    m = n + sum(wanted.inputs)
    of_history = out[m].reshape(lanes, depth).T
    of_weights = wired.scattered(out[m + 1].reshape(networks, edges), regions) if wanted.weights else None
    initial = Carry(tuple(out[n_coefs:n]), of_history)
    return Adjoint(tuple(out[:n_coefs]), initial, tuple(out[n:m]), of_weights)


def _shape(coefs, inputs, seeds, dtype, regions: int, kind: str) -> Shape:
    narrowest = NARROWEST[kind]
    return Shape(
        tuple(c.ndim == 0 for c in coefs),
        tuple(x.ndim == 1 for x in inputs),
        f"f{8 * dtype.itemsize}",
        -(-regions // narrowest) * narrowest,
        seeds is not None and len(seeds) == 3,
    )


def _stride(depth: int, steps: int) -> int:
    """Of all that a region sends in a run, what is read of tiles beyond its end included."""
    return depth + steps + TILE


def _list_bytes(regions: int, edges: int, size: int) -> int:
    return (8 * (3 * regions + 1) + (8 + size) * edges + 63) // 64 * 64


class _Arguments:
    """The connections as the kernels take them."""

    def __init__(self, connections: Connections, block: int, depth: int):
        self.rows, self.columns = connections.edges
        self.delays = connections.steps[self.rows, self.columns]
        self.dense = connections.weights
        self.shared = int(connections.weights.ndim == 2)
        self.block, self.depth = block, depth

    def arguments(self, history: jax.Array | None) -> tuple[jax.Array, ...]:
        """Rows, columns, delays, weights, and the history or the matrix of a network without delays.

        A forward run has a history, ``(0, L)`` without delays; an adjoint none, and takes the matrix to the sources.
        """
        edges = self.dense[self.rows, self.columns].T
        matrix = self.dense[..., None] if self.shared else self.dense
        matrix = jnp.moveaxis(matrix, -1, 0)
        matrix = matrix if history is None else jnp.swapaxes(matrix, 1, 2)
        matrix = jnp.pad(matrix, ((0, 0), (0, 0), (0, self.block - matrix.shape[-1])))
        last = matrix if history is None or not self.depth else history.T
        return self.rows, self.columns, self.delays, edges.reshape(-1), last.reshape(-1)

    def scattered(self, cotangents, regions: int):
        """Of each connection's weight, ``(networks, E)``, as ``(N, N, networks)``."""
        empty = jnp.zeros((regions, regions, len(cotangents)), cotangents.dtype)
        return empty.at[self.rows, self.columns].set(cotangents.T, unique_indices=True, indices_are_sorted=True)


class _Coupled(Uncoupled):
    """Lines that both directions have."""

    also = "numba_network_runtime"

    def __init__(self, kernel: _Kernel):
        k, coupling = kernel, kernel.loop.coupling
        assert coupling is not None
        self.k, self.coupling, self.kind, self.size = k, coupling, k.shape.dtype, k.shape.itemsize
        k.span = coupling.regions
        self.sum = k.inputs[-1]
        k.rows.names.append(self.sum)

    def row(self, name: str) -> str:
        return f"work + {self.k.offset(name)}"

    def call(self, function: str, *arguments) -> str:
        return f"{function}_{self.kind}({', '.join(map(str, arguments))})"

    def constants(self) -> list[str]:
        plan = [f"{name} = plan[{_PLAN.index(name)}]" for name in ("depth", "edges", "stride", "apart", "shared")]
        return [f"regions = i64({self.coupling.regions})", *plan]

    def wire(self, area: str, of: str, others: str, nearest: int, stride: str, sign: int) -> str:
        ends = (of, others, "delays", "weights", "edges", "regions")
        return self.call("wire", area, *ends, nearest, stride, sign)

    def sums(self, kind: str, area: str, source: str, *rest) -> str:
        """Sums of what ``source`` has over the connections that a list has."""
        return self.call(kind, area, "regions", "edges", source, *rest)

    def wires(self, first: int) -> list[str]:
        return [
            *(f"{name} = argument(frame, {first + k})" for k, name in enumerate(("rows", "columns", "delays"))),
            f"weights = argument(frame, {first + 3}) + (0 if shared else {self.size} * edges * number)",
            f"matrix = argument(frame, {first + 4}) + (0 if shared else {self.size} * regions * block * number)",
        ]

    def areas(self, begin: str, *names: str) -> list[str]:
        """Addresses of parts of the scratch: lists, then sums."""
        lists = f"(8 * (3 * regions + 1) + {8 + self.size} * edges + 63) // 64 * 64"
        lines = [f"list_bytes = {lists}", f"sum_bytes = (regions + 1) * {TILE * self.size}", f"at_end = {begin}"]
        for name in names:
            lines += [f"{name} = at_end", f"at_end += {'list_bytes' if 'list' in name else 'sum_bytes'}"]
        return lines


class ForwardCoupling(_Coupled):
    """What is sent and what arrives, forwards.

    Arguments: ends and delays of connections, weights, history or matrix. Results: the last history, and all that was
    sent where it is ``kept``.
    """

    def __init__(self, kernel: _Kernel, kept: bool):
        super().__init__(kernel)
        k = kernel
        self.kept, (self.sent,) = kept, k.rows.add("sent", 1)
        self.first = k.take(5)[0]
        self.history, self.all = k.give(1)[0], k.give(1)[0] if kept else None

    def begin(self) -> list[str]:
        k, size = self.k, self.size
        place = f"result(frame, {self.all}) + {size} * lane * stride" if self.kept else "at_end"
        lines = [
            *self.constants(),
            *self.wires(self.first),
            *self.areas(f"work + {k.scratch_rows * k.block * size}", "list_to", "sums"),
            f"all_sent = {place}",
            *([f"at_end += {size} * regions * stride"] if not self.kept else []),
            self.call("fill", self.row(self.sum), "block"),
            "now, phase = depth, 0",
        ]
        if self.coupling.depth:
            given = f"argument(frame, {self.first + 4}) + {size} * lane * depth"
            lines += [
                self.call(
                    "wire", "list_to", "rows", "columns", "delays", "weights", "edges", "regions", TILE, "stride", -1
                ),
                self.call("move", given, "depth", 0, "all_sent", "stride", 0, "regions", "depth"),
            ]
        return lines

    def arrive(self) -> list[str]:
        k, writer = self.k, self.k.writer()
        sent = k.values(self.coupling.send, writer.write(self.coupling.send, [*k.coefs, *k.state]))
        lines = k.lane_loop(writer, {k.rows.at(self.sent): sent[0]}, [k.rows])
        scatter = self.call("scatter", self.row(self.sent), "all_sent", "stride", "now", "regions")
        if not self.coupling.depth:
            lines += [scatter] if self.kept else []
            return [*lines, self.call("sum_now", "matrix", "regions", "block", self.row(self.sent), self.row(self.sum))]
        shift = [
            f"if now + {TILE} > stride:",
            "    "
            + self.call("move", "all_sent", "stride", "now - depth", "all_sent", "stride", 0, "regions", "depth"),
            "    now = depth",
        ]
        return [
            *lines,
            "if phase == 0:",
            *([] if self.kept else _indented(shift)),
            "    " + self.sums("sum_far", "list_to", "all_sent", "now", "sums"),
            scatter,
            self.call(
                "sum_near", "list_to", "regions", "edges", "all_sent", "now", "sums", "phase", self.row(self.sum)
            ),
        ]

    def leave(self) -> list[str]:
        return ["now += 1", f"phase = (phase + 1) % {TILE}"]

    def end(self) -> list[str]:
        target = f"result(frame, {self.history}) + {self.size} * lane * depth"
        return [self.call("move", "all_sent", "stride", "now - depth", target, "depth", 0, "regions", "depth")]


class ReverseCoupling(_Coupled):
    """What is sent and what arrives, backwards.

    Arguments: as of `ForwardCoupling`, then all that was sent, and the cotangent of the last history. Results: the
    cotangent of the first history, and of the weights where they are wanted.
    """

    def __init__(self, kernel: _Kernel, kept: Rows, pullbacks: Pullbacks, wanted: Wanted):
        super().__init__(kernel)
        k, loop, n = kernel, kernel.loop, kernel.loop.n_coefs
        assert pullbacks.send is not None
        (self.ct_sent,) = k.rows.add("ct_sent", 1)
        self.first = k.take(7)[0]
        self.history, self.weights = k.give(1)[0], k.give(1)[0] if wanted.weights else None
        m = loop.n_state
        self.split = SplitPullback(pullbacks.send, [True] * n + [False] * (m + 1), [False] * n + [True] * m + [False])
        self.kept, self.of_send = kept, kept.add("s", self.split.n_kept)
        self.cotangents = [f"ct_c{j}" for j in range(sum(wanted.coefs))] + [f"ct_x{j}" for j in range(m)]

    def begin(self) -> list[str]:
        k, size = self.k, self.size
        kept = f"steps_kept = segment * {len(self.kept.names) * k.block * size}"
        lines = [
            *self.constants(),
            *self.wires(self.first),
            f"all_sent = argument(frame, {self.first + 5}) + {size} * lane * stride",
            f"ct_last = argument(frame, {self.first + 6}) + {size} * lane * depth",
            kept,
            *self.areas("slots + steps_kept", "list_to", "list_from", "sums", "ct_sums"),
            "ct_arrived = at_end",
            self.call("fill", "ct_arrived", "regions * apart"),
            self.call("fill", self.row(self.sum), "block"),
            self.call("fill", self.row(self.ct_sent), "block"),
            # All that was sent is known: no connection is near.
            self.wire("list_to", "rows", "columns", 0, "stride", -1),
            "phase = 0",
        ]
        if self.coupling.depth:
            lines.append(self.wire("list_from", "columns", "rows", TILE, "apart", 1))
        return lines

    def replay(self) -> list[str]:
        k, writer = self.k, self.k.writer()
        kept = k.values(self.split.keep, writer.write(self.split.keep, [*k.coefs, *k.state]))
        return [
            f"if j % {TILE} == 0:",
            "    " + self.sums("sum_far", "list_to", "all_sent", "depth + n", "sums"),
            self.call(
                "sum_near", "list_to", "regions", "edges", "all_sent", "depth + n", "sums", f"j % {TILE}",
                self.row(self.sum),
            ),
            *k.lane_loop(writer, {self.kept.at(x): v for x, v in zip(self.of_send, kept)}, [k.rows]),
        ]  # fmt: skip

    def back(self) -> list[str]:
        k, writer = self.k, self.k.writer()
        pulled = k.values(self.split.back, writer.write(self.split.back, [*k.coefs, *self.of_send, self.ct_sent]))
        zero = writer.literal(0, jnp.dtype(f"float{8 * self.size}"))
        stores = {k.rows.at(x): f"{x} + {v}" for x, v in zip(self.cotangents, pulled) if v != zero}
        to = self.row(self.ct_sent)
        lines = [self.call("scatter", self.row("ct_arrived0"), "ct_arrived", "apart", "n", "regions")]
        if self.coupling.depth:
            lines += [
                "if phase == 0:",
                "    " + self.sums("sum_far", "list_from", "ct_arrived", f"n - {TILE - 1}", "ct_sums"),
                self.call(
                    "sum_near", "list_from", "regions", "edges", "ct_arrived", "n", "ct_sums", f"{TILE - 1} - phase", to
                ),
                f"phase = (phase + 1) % {TILE}",
                "if n >= steps - depth:",
                "    " + self.call("add_final", to, "ct_last", "depth", "n - (steps - depth)", "regions"),
            ]
        else:
            lines.append(self.call("sum_now", "matrix", "regions", "block", self.row("ct_arrived0"), to))
        return [*lines, *k.lane_loop(writer, stores, [k.rows, self.kept])]

    def end(self) -> list[str]:
        size, wires = self.size, ("rows", "columns", "delays")
        target = f"result(frame, {self.history}) + {size} * lane * depth"
        lines = []
        if self.coupling.depth:
            lines.append(
                self.call(
                    "to_history", target, "ct_last", "depth", "steps", "ct_arrived", "apart", *wires, "weights",
                    "edges", "regions",
                )
            )  # fmt: skip
        if self.weights is not None:
            target = f"result(frame, {self.weights}) + {size} * edges * number"
            lines.append(
                self.call(
                    "to_weights", target, "all_sent", "stride", "depth", "ct_arrived", "apart", "steps", *wires, "edges"
                )
            )
        return lines
