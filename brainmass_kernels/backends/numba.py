"""The whole run as one compiled loop for CPUs: numba compiles source that is emitted for the step at hand.

Lanes are cut into blocks, whose states lie in rows of a scratch that stays in the first cache; each step is a loop or
two over the lanes of a block, which LLVM turns into SIMD. Threads take blocks until none is left. XLA calls the
compiled code itself, through its FFI. What a source compiled to is kept on disk (`kernel_cache`).
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import kernel_cache, noise
from ..emit import NUMBA, NUMBA_FAST, Writer, words
from ..pointwise import Program, SplitPullback
from .base import (
    Adjoint,
    Carry,
    Copied,
    Cotangents,
    Forward,
    Loop,
    Operands,
    Pullbacks,
    Request,
    Wanted,
    lacking,
    programs_of,
)

# Lanes of a block, at most: a few vectors, so that the loop over them hides the latency of each.
BLOCK = 64
# And at least, forward and back. LLVM unrolls shorter loops of few operations before it looks for SIMD.
NARROWEST = {"forward": 8, "adjoint": 16}
# A slow function has a loop of its own in blocks of this many lanes or more, for the same reason.
STAGED = 32
# Bytes of replayed states that a thread plans to hold: they should stay in its second cache.
REPLAY = 256 * 1024
# Work that is worth another thread, in operations: starting one costs some 20 us.
WORTH_A_THREAD = 1_000_000

_SHORT = {"float32": "f32", "float64": "f64"}
# What the one attribute of a call holds.
_PLAN = (
    "lanes", "steps", "lead", "every", "count", "segment", "blocks", "threads", "scratch",
    "depth", "edges", "stride", "apart", "shared",
)  # fmt: skip


class Numba:
    """Compiled source on the CPU."""

    name = "numba"
    interpretable = False
    inverse_steps = False
    networks = True
    same_lanes = True

    def base_two(self, precision: str) -> bool:
        """There is a tanh of one function."""
        return False

    def unavailable(self, platform: str) -> str | None:
        if platform != "cpu":
            return f"it compiles for CPUs, and JAX computes on {platform} here"
        if os.name != "posix":
            return "it starts POSIX threads, which this system has not"
        if not installed():
            return "numba is not installed: pip install 'brainmass-kernels[cpu]'"
        return None

    def unsupported(self, request: Request) -> str | None:
        if np.dtype(request.dtype).name not in _SHORT:
            return f"it takes float32 and float64, not {np.dtype(request.dtype)}"
        return lacking(NUMBA.lacks, *programs_of(request.loop))

    def copied(self, request: Request) -> Copied:
        """Nothing: it writes straight to what is returned."""
        return Copied()

    def forward(self, loop: Loop, operands: Operands, initial: Carry, checkpoint_every: int | None = None) -> Forward:
        if loop.coupling:
            from . import numba_network

            return numba_network.forward(loop, operands, initial, checkpoint_every)
        (coefs, inputs, seeds, _), state = operands, initial.state
        lanes, dtype = state[0].shape[0], state[0].dtype
        shape = Shape.of(coefs, inputs, seeds, lanes, dtype, loop, None)
        source = forward_source(loop, shape)
        segments = -(-loop.schedule.steps // checkpoint_every) if checkpoint_every else 0
        results = [
            *[(loop.schedule.count, lanes)] * loop.n_observables,
            *[(lanes,)] * loop.n_state,
            *[(segments, lanes)] * loop.n_state,
        ]
        scratch = source.rows * shape.block * dtype.itemsize
        given = (*coefs, *state, *inputs, *([] if seeds is None else [seeds]))
        out = iter(_call(source, loop, shape, lanes, scratch, checkpoint_every or 0, given, results))
        records = tuple(next(out) for _ in range(loop.n_observables))
        final = tuple(next(out) for _ in range(loop.n_state))
        return Forward(records, Carry(final), tuple(out) if checkpoint_every else None)

    def adjoint(
        self, loop: Loop, pullbacks: Pullbacks, wanted: Wanted, operands: Operands, saved, cotangents: Cotangents,
        checkpoint_every: int,
    ) -> Adjoint:  # fmt: skip
        if loop.coupling:
            from . import numba_network

            return numba_network.adjoint(loop, pullbacks, wanted, operands, saved, cotangents, checkpoint_every)
        (coefs, inputs, seeds, _), ct_final = operands, cotangents.final.state
        lanes, dtype = ct_final[0].shape[0], ct_final[0].dtype
        shape = Shape.of(coefs, inputs, seeds, lanes, dtype, loop, checkpoint_every)
        source = adjoint_source(loop, pullbacks, wanted, shape)
        partial = -(-lanes // NARROWEST["adjoint"])
        n_coefs = sum(wanted.coefs)
        results = [(lanes,)] * (n_coefs + loop.n_state) + [
            (loop.schedule.steps, partial if uniform else lanes)
            for uniform, w in zip(shape.uniform_inputs, wanted.inputs)
            if w
        ]
        scratch = (source.rows + checkpoint_every * source.kept) * shape.block * dtype.itemsize
        given = (*coefs, *saved, *inputs, *([] if seeds is None else [seeds]), *cotangents.records, *ct_final)
        out = _call(source, loop, shape, lanes, scratch, checkpoint_every, given, results)
        n = n_coefs + loop.n_state
        return Adjoint(tuple(out[:n_coefs]), Carry(tuple(out[n_coefs:n])), tuple(out[n:]))


@functools.lru_cache
def installed() -> bool:
    """Whether numba can be imported; it is not imported to find out."""
    return importlib.util.find_spec("numba") is not None


class Shape(NamedTuple):
    """What a source depends on besides the programs.

    Attributes
    ----------
    uniform_coefs, uniform_inputs : for each, whether it is one for all lanes
    dtype : "f32" or "f64"
    block : lanes of a block
    later : whether the number of the first step comes with the seeds
    """

    uniform_coefs: tuple[bool, ...]
    uniform_inputs: tuple[bool, ...]
    dtype: str
    block: int
    later: bool

    @classmethod
    def of(cls, coefs, inputs, seeds, lanes: int, dtype, loop: Loop, segment: int | None) -> Shape:
        """Of a forward run, or of an adjoint one by segments of so many steps."""
        block = narrowest = NARROWEST["adjoint" if segment else "forward"]
        # Every thread should have a block.
        share = -(-lanes // threads()) if lanes > STAGED else lanes
        while block < min(BLOCK, share):
            block *= 2
        if segment is not None:
            while block > narrowest and block * segment * (loop.n_state + 3) * dtype.itemsize > REPLAY:
                block //= 2
        return cls(
            tuple(c.ndim == 0 for c in coefs),
            tuple(x.ndim == 1 for x in inputs),
            _SHORT[np.dtype(dtype).name],
            block,
            seeds is not None and len(seeds) == 3,
        )

    @property
    def itemsize(self) -> int:
        return int(self.dtype[1:]) // 8


def threads() -> int:
    """How many threads a run may take: numba's own setting, which knows the process's share of the machine."""
    from numba.core import config

    return config.NUMBA_NUM_THREADS  # pyright: ignore[reportAttributeAccessIssue]


# Source -------------------------------------------------------------------------------------------------------------


class Source(NamedTuple):
    """An emitted kernel.

    Attributes
    ----------
    kind : "forward" or "adjoint"
    text : what is done for the block ``number`` of the call ``frame`` in the scratch ``work``
    results : how many results it has, the scratch left out
    rows : rows of its scratch, of the kernel's dtype
    kept : rows that it keeps of each step of a segment
    also : the name of a second module that it takes functions from
    """

    kind: str
    text: str
    results: int
    rows: int
    kept: int = 0
    also: str = ""


class Rows:
    """Names of the rows of a scratch, each of one block of lanes."""

    def __init__(self, array: str, block: int):
        self.array, self.block, self.names = array, block, []

    def add(self, stem: str, count: int) -> list[str]:
        names = [f"{stem}{k}" for k in range(count)]
        self.names += names
        return names

    def offset(self, name: str) -> int:
        return self.names.index(name) * self.block

    def at(self, name: str) -> str:
        return f"{self.array}[{self.offset(name)} + i]"


def _indented(lines: Iterable[str]) -> list[str]:
    return [f"    {line}" for line in lines]


class _Kernel:
    """What both kernels are made of: arguments, rows, and loops over the lanes of a block."""

    def __init__(self, loop: Loop, shape: Shape):
        self.loop, self.shape, self.block = loop, shape, shape.block
        self.span = self.block
        self.optable = NUMBA_FAST if loop.precision == "fast" else NUMBA
        self.rows = Rows("S", self.block)
        self.coefs = [f"c{k}" for k in range(loop.n_coefs)]
        self.state = self.rows.add("x", loop.n_state)
        self.inputs = [f"u{k}" for k in range(loop.n_inputs)]
        self.normals, self.later = self.rows.add("z", loop.n_normals), self.rows.add("later", loop.n_normals)
        for name, uniform in zip((*self.coefs, *self.inputs), (*shape.uniform_coefs, *shape.uniform_inputs)):
            if not uniform:
                self.rows.names.append(name)
        self.n_arguments = 0
        self.n_results = 0

    def take(self, count: int) -> list[int]:
        """The numbers of the next arguments."""
        self.n_arguments += count
        return list(range(self.n_arguments - count, self.n_arguments))

    def give(self, count: int) -> list[int]:
        """The numbers of the next results."""
        self.n_results += count
        return list(range(self.n_results - count, self.n_results))

    def spread(self, name: str, buffer: str, place: str = "place") -> str:
        """Read a row from a buffer, at the block's place in bytes."""
        return f"spread_{self.shape.dtype}(work + {self.offset(name)}, {buffer} + {place}, valid, block)"

    def gather(self, name: str, buffer: str, place: str = "place") -> str:
        return f"gather_{self.shape.dtype}({buffer} + {place}, work + {self.offset(name)}, valid)"

    def offset(self, name: str) -> int:
        """Of a row, in bytes."""
        return self.shape.itemsize * self.rows.offset(name)

    def place(self, name: str, row: str) -> str:
        """The block's place in a buffer of rows of lanes, in bytes."""
        return f"{name} = {self.shape.itemsize} * ({row} * lanes + lane)"

    def lane_loop(self, writer: Writer, stores: dict[str, str], rows: Sequence[Rows], staged: bool = True) -> list[str]:
        """Compute the values and store each at its place, for all lanes of the block.

        Slow functions have loops of their own: what they keep in registers leaves room for nothing else, and one that
        LLVM has no SIMD for does not keep the rest from it.
        """
        if not stores:
            return []
        lines, made, taken = [], {}, 0
        staged = staged and self.block >= STAGED
        for stage in writer.stages(list(stores.values())) if staged else []:
            calls = [call for group in stage.values() for call in group]
            places = {name: self.slow_row(taken + j) for j, (name, _) in enumerate(calls)}
            arguments = {self.rows.at(places[name]): argument for name, argument in calls}
            lines += self._one_loop(writer, arguments, rows, made)
            for function, group in stage.items():
                place = f"S[{self.rows.offset(places[group[0][0]])} + i]"
                lines += [f"for i in range({self.block * len(group)}):", f"    {place} = {function.format(place)}"]
            made |= places
            taken += len(calls)
        return lines + self._one_loop(writer, stores, rows, made)

    def _one_loop(
        self, writer: Writer, stores: dict[str, str], rows: Sequence[Rows], made: dict[str, str]
    ) -> list[str]:
        lines = writer.lines(list(stores.values()), made)
        used = words([*lines, *stores.values()])
        loads = [f"{name} = {group.at(name)}" for group in rows for name in group.names if name in used]
        loads += [f"{name} = {self.rows.at(row)}" for name, row in made.items() if name in used]
        body = [*loads, *lines, *(f"{place} = {value}" for place, value in stores.items())]
        return [f"for i in range({self.block}):", *_indented(body)]

    def slow_row(self, number: int) -> str:
        """The row of an argument of a slow function, and then of its value."""
        name = f"slow{number}"
        if name not in self.rows.names:
            self.rows.names.append(name)
        return name

    def writer(self) -> Writer:
        return Writer(self.optable)

    # Pieces ---------------------------------------------------------------------------------------------------------

    def head(self, coefs: list[int]) -> list[str]:
        """The block's place, its rows and its coefficients."""
        dtype = self.shape.dtype
        lines = [
            f"{', '.join(_PLAN[:6])} = {', '.join(f'plan[{k}]' for k in range(6))}",
            # A literal would make numba compile each function that takes it anew.
            f"block = i64({self.block})",
            f"lane = {self.span} * number",
            f"valid = min({self.span}, lanes - lane)",
            f"place = {self.shape.itemsize} * lane",
            f"S = {dtype}_at(work)",
        ]
        for name, k, uniform in zip(self.coefs, coefs, self.shape.uniform_coefs):
            lines.append(
                f"{name} = {dtype}_at(argument(frame, {k}))[0]"
                if uniform
                else self.spread(name, f"argument(frame, {k})")
            )
        return lines

    def seeds(self, k: int) -> list[str]:
        """Read the two words of each lane, which lie behind the rows."""
        row = f"work + {self.n_rows * self.block * self.shape.itemsize}"
        return [
            f"I = i32_at({row})",
            f"spread_i32({row}, argument(frame, {k}) + 4 * lane, valid, block)",
            f"spread_i32({row} + 4 * block, argument(frame, {k}) + 4 * (lanes + lane), valid, block)",
            # All lanes have come equally far.
            f"origin = i32_at(argument(frame, {k}) + 8 * lanes)[0]" if self.shape.later else "origin = i32(0)",
        ]

    @property
    def n_rows(self) -> int:
        return len(self.rows.names)

    @property
    def scratch_rows(self) -> int:
        """Rows of the kernel's dtype, those of the seeds included."""
        return self.n_rows + (2 if self.loop.n_normals else 0)

    def addresses(self, stem: str, numbers: list[int], of: str = "argument") -> list[str]:
        return [f"{stem}{j} = {of}(frame, {k})" for j, k in enumerate(numbers)]

    def read_inputs(self) -> list[str]:
        """The inputs of step ``n``, in scalars or rows."""
        dtype, size = self.shape.dtype, self.shape.itemsize
        lines = [self.place("place_u", "n")] if not all(self.shape.uniform_inputs) else []
        return lines + [
            f"{name} = {dtype}_at(input{k} + {size} * n)[0]" if uniform else self.spread(name, f"input{k}", "place_u")
            for k, (name, uniform) in enumerate(zip(self.inputs, self.shape.uniform_inputs))
        ]

    def draw(self, first: str) -> list[str]:
        """The normals of step ``n``, drawn for two steps at a time; ``first`` says whether none was drawn before."""
        if not self.loop.n_normals:
            return []
        word = jax.ShapeDtypeStruct((), "int32")
        program = Program(
            lambda k0, k1, half: sum(noise.pairs((k0, k1), half, self.loop.n_normals), ()), [word] * 3, "white noise"
        )
        writer = self.writer()
        drawn = writer.write(program, ["key0", "key1", "half"])
        seeds = Rows("I", self.block)
        seeds.add("key", 2)
        rows = [name for both in zip(self.normals, self.later) for name in both]
        stores = {self.rows.at(name): self.cast(value, np.dtype("float32")) for name, value in zip(rows, drawn)}
        # In a float64 run the rows do not hold float32.
        staged = self.shape.dtype == "f32"
        copies = [f"{self.rows.at(z)} = {self.rows.at(later)}" for z, later in zip(self.normals, self.later)]
        return [
            "counter = i32(n + origin)",
            f"if {first} or counter & i32(1) == i32(0):",
            "    half = i32(counter >> i32(1))",
            *_indented(self.lane_loop(writer, stores, [seeds], staged)),
            "if counter & i32(1) == i32(1):",
            f"    for i in range({self.block}):",
            *_indented(_indented(copies)),
        ]

    def cast(self, value: str, dtype) -> str:
        return value if _SHORT.get(np.dtype(dtype).name) == self.shape.dtype else f"{self.shape.dtype}({value})"

    def values(self, program: Program, written: Sequence[str]) -> list[str]:
        """Outputs in the kernel's dtype: one may be a constant of another."""
        return [self.cast(v, a.dtype) for v, a in zip(written, program.out_avals)]

    def arguments(self) -> list[str]:
        return [*self.coefs, *self.state, *self.inputs, *self.normals]

    def finished(self, kind: str, body: list[str], kept: int = 0, also: str = "") -> Source:
        return Source(kind, "\n".join(body), self.n_results, self.scratch_rows, kept, also)


class Uncoupled:
    """How the lanes of a block are coupled, here not at all; `numba_network` has the other ways.

    Lines for the beginning of a block, for each step, there and in replay, and for the end.
    """

    also = ""

    def begin(self) -> list[str]:
        return []

    def arrive(self) -> list[str]:
        """Before a step: what was sent arrives."""
        return []

    def replay(self) -> list[str]:
        """Before step ``j`` of a segment is run again."""
        return []

    def back(self) -> list[str]:
        """After a step was walked back."""
        return []

    def leave(self) -> list[str]:
        """After a step."""
        return []

    def end(self) -> list[str]:
        return []


def forward_source(
    loop: Loop, shape: Shape, wiring: Callable[[_Kernel], Uncoupled] = lambda kernel: Uncoupled()
) -> Source:
    """The kernel of a forward run.

    Arguments: coefficients, state, inputs, seeds. Results: records, final state, saved states.
    """
    k = _Kernel(loop, shape)
    seen = k.rows.add("seen", loop.n_observables)
    coefs, state, inputs = k.take(loop.n_coefs), k.take(loop.n_state), k.take(len(shape.uniform_inputs))
    seeds = k.take(1 if loop.n_normals else 0)
    records, final, saved = k.give(loop.n_observables), k.give(loop.n_state), k.give(loop.n_state)
    coupled = wiring(k)

    advance, observe = k.writer(), k.writer()
    stepped = k.values(loop.advance, advance.write(loop.advance, k.arguments()))
    observed = k.values(loop.observe, observe.write(loop.observe, [*k.coefs, *k.state]))
    step = [
        "if n == due_save:",
        *_indented([k.place("place_s", "segment_number")]),
        *_indented(k.gather(x, f"saved{j}", "place_s") for j, x in enumerate(k.state)),
        "    segment_number += 1",
        "    due_save += segment",
        *k.read_inputs(),
        *k.draw("n == 0"),
        *coupled.arrive(),
        *k.lane_loop(advance, {k.rows.at(x): v for x, v in zip(k.state, stepped)}, [k.rows]),
        "if n + 1 == due:",
        *_indented(k.lane_loop(observe, {k.rows.at(x): v for x, v in zip(seen, observed)}, [k.rows])),
        *_indented([k.place("place_r", "taken")]),
        *_indented(k.gather(x, f"record{j}", "place_r") for j, x in enumerate(seen)),
        "    taken += 1",
        "    due = due + every if taken < count else 0",
        *coupled.leave(),
    ]
    return k.finished(
        "forward",
        [
            *k.head(coefs),
            *(k.spread(x, f"argument(frame, {a})") for x, a in zip(k.state, state)),
            *(line for a in seeds for line in k.seeds(a)),
            *k.addresses("input", inputs),
            *k.addresses("record", records, "result"),
            *k.addresses("saved", saved, "result"),
            "taken = 0",
            "due = lead + every if count > 0 else 0",
            "segment_number = 0",
            "due_save = 0 if segment > 0 else -1",
            *coupled.begin(),
            "for n in range(steps):",
            *_indented(step),
            *coupled.end(),
            *(k.gather(x, f"result(frame, {r})") for x, r in zip(k.state, final)),
        ],
        also=coupled.also,
    )


def adjoint_source(
    loop: Loop,
    pullbacks: Pullbacks,
    wanted: Wanted,
    shape: Shape,
    wiring: Callable[[_Kernel, Rows], Uncoupled] = lambda kernel, kept: Uncoupled(),
) -> Source:
    """The kernel of an adjoint run: each segment is replayed, keeping what its pullbacks need, and walked back.

    Arguments: coefficients, saved states, inputs, seeds, cotangents of records and of the final state.
    Results: cotangents of the wanted coefficients, of the initial state, and of the wanted inputs.
    """
    k = _Kernel(loop, shape)
    n_wanted = sum(wanted.coefs)
    ct_coefs, ct_state = k.rows.add("ct_c", n_wanted), k.rows.add("ct_x", loop.n_state)
    ct_seen, ct_inputs = k.rows.add("ct_seen", loop.n_observables), k.rows.add("ct_u", sum(wanted.inputs))
    n_given = len(shape.uniform_inputs)
    coefs, saved, inputs = k.take(loop.n_coefs), k.take(loop.n_state), k.take(n_given)
    seeds = k.take(1 if loop.n_normals else 0)
    records, final = k.take(loop.n_observables), k.take(loop.n_state)
    out_coefs, out_state, out_inputs = k.give(n_wanted), k.give(loop.n_state), k.give(sum(wanted.inputs))

    n, m, p, z = loop.n_coefs, loop.n_state, loop.n_inputs, loop.n_normals
    # What arrives from other lanes is kept like the state; inputs that were given are read again.
    free = [True] * n + [False] * m + [True] * n_given + [False] * (p - n_given + z)
    known = [False] * n + [True] * m + [False] * n_given + [True] * (p - n_given + z)
    step = SplitPullback(pullbacks.advance, free + [False] * m, known + [False] * m)
    n_seen = loop.n_observables
    view = SplitPullback(
        pullbacks.observe, [True] * n + [False] * (m + n_seen), [False] * n + [True] * m + [False] * n_seen
    )
    kept = Rows("K", k.block)
    of_step, of_view = kept.add("k", step.n_kept), kept.add("v", view.n_kept)
    coupled = wiring(k, kept)
    ct_arrived = k.rows.add("ct_arrived", p - n_given)

    replay, after = k.writer(), k.writer()
    keep = k.values(step.keep, replay.write(step.keep, k.arguments()))
    stepped = k.values(loop.advance, replay.write(loop.advance, k.arguments()))
    keep_view = k.values(view.keep, after.write(view.keep, [*k.coefs, *k.state]))

    back, back_view = k.writer(), k.writer()
    pulled = k.values(step.back, back.write(step.back, [*k.coefs, *k.inputs[:n_given], *of_step, *ct_state]))
    pulled_view = k.values(view.back, back_view.write(view.back, [*k.coefs, *of_view, *ct_seen]))
    zero = replay.literal(0, np.dtype(f"float{8 * shape.itemsize}"))

    def added(writer: Writer, names, values) -> dict[str, str]:
        return {k.rows.at(x): f"{x} + {v}" for x, v in zip(names, values) if v != zero}

    both = [*ct_coefs, *ct_state]
    stores = added(back, ct_coefs, pulled) | {
        k.rows.at(x): v for x, v in zip([*ct_state, *ct_inputs, *ct_arrived], pulled[n_wanted:], strict=True)
    }
    slot = f"K = {shape.dtype}_at(slots + {shape.itemsize} * j * {len(kept.names) * k.block})"
    forth = [
        "n = start + j",
        slot,
        *k.read_inputs(),
        *k.draw("j == 0"),
        *coupled.replay(),
        *k.lane_loop(
            replay,
            {kept.at(x): v for x, v in zip(of_step, keep)} | {k.rows.at(x): v for x, v in zip(k.state, stepped)},
            [k.rows],
        ),
        "if n + 1 == due:",
        *_indented(k.lane_loop(after, {kept.at(x): v for x, v in zip(of_view, keep_view)}, [k.rows])),
        "    taken += 1",
        "    due = due + every if taken < count else 0",
    ]
    return_step = [
        "n = start + j",
        slot,
        "if taken >= 0 and n + 1 == due:",
        *_indented([k.place("place_r", "taken")]),
        *_indented(k.spread(x, f"ct_record{j}", "place_r") for j, x in enumerate(ct_seen)),
        *_indented(k.lane_loop(back_view, added(back_view, both, pulled_view), [k.rows, kept])),
        "    taken -= 1",
        "    due -= every",
        *k.read_inputs(),
        *k.lane_loop(back, stores, [k.rows, kept]),
        *coupled.back(),
    ]
    uniform = [u for u, w in zip(shape.uniform_inputs, wanted.inputs) if w]
    if not all(uniform):
        return_step.append(k.place("place_c", "n"))
    for j, (name, is_uniform) in enumerate(zip(ct_inputs, uniform)):
        # Sums of equally many lanes, whatever the block: its size depends on the number of threads.
        group = NARROWEST["adjoint"] if k.span == k.block else k.block
        target = f"ct_input{j} + {shape.itemsize} * (n * groups + {k.block // group} * number)"
        summed = f"totals_{shape.dtype}({target}, work + {k.offset(name)}, valid, {group})"
        return_step.append(summed if is_uniform else k.gather(name, f"ct_input{j}", "place_c"))

    segment = [
        "start = segment_number * segment",
        "length = min(segment, steps - start)",
        k.place("place_s", "segment_number"),
        *(k.spread(x, f"saved{j}", "place_s") for j, x in enumerate(k.state)),
        "taken = max(0, start - lead) // every",
        "due = lead + (taken + 1) * every if taken < count else 0",
        "for j in range(length):",
        *_indented(forth),
        "taken -= 1",
        "due = lead + (taken + 1) * every",
        "for j in range(length - 1, -1, -1):",
        *_indented(return_step),
    ]
    return k.finished(
        "adjoint",
        [
            *k.head(coefs),
            f"groups = (lanes + {NARROWEST['adjoint'] - 1}) // {NARROWEST['adjoint']}"
            if k.span == k.block
            else f"groups = plan[{_PLAN.index('blocks')}]",
            *(f"clear_{shape.dtype}(work + {k.offset(x)}, block)" for x in ct_coefs),
            *(k.spread(x, f"argument(frame, {a})") for x, a in zip(ct_state, final)),
            *(line for a in seeds for line in k.seeds(a)),
            f"slots = work + {k.scratch_rows * k.block * shape.itemsize}",
            *k.addresses("saved", saved),
            *k.addresses("input", inputs),
            *k.addresses("ct_record", records),
            *k.addresses("ct_input", out_inputs, "result"),
            *coupled.begin(),
            "for segment_number in range((steps + segment - 1) // segment - 1, -1, -1):",
            *_indented(segment),
            *coupled.end(),
            *(k.gather(x, f"result(frame, {r})") for x, r in zip(both, [*out_coefs, *out_state])),
        ],
        len(kept.names),
        coupled.also,
    )


# Compiling and calling ----------------------------------------------------------------------------------------------

_MODULE = '''"""Emitted by brainmass_kernels for a kernel of its numba backend; runtime {runtime}."""

import math

import numpy as np

from brainmass_kernels.backends.numba_runtime import *
{also}

def task(job):
    frame = i64_at(job)[2]
    plan = attribute(frame)
    work = job + JOB_BYTES + add_atomically(job + 8, 1) * plan[{scratch}]
    number = add_atomically(job, 1)
    while number < plan[{blocks}]:
{body}
        number = add_atomically(job, 1)
    return 0


run_here, task_address = call_of("{name}"), address_of("{name}")


def handler(frame):
    if not describe(frame):
        job = (result(frame, {results}) + 63) // 64 * 64
        started = start(job, frame, task_address(), attribute(frame)[{threads}])
        run_here(job)
        join(job, started)
    return 0


handler = entry("{name}", task, handler)
'''
_LOCK = threading.Lock()


def _call(
    source: Source,
    loop: Loop,
    shape: Shape,
    lanes: int,
    scratch: int,
    segment: int,
    given,
    results,
    each: int = 0,
    **more,
) -> Sequence[jax.Array]:
    """Call a kernel whose blocks have ``each`` lanes, those of the shape unless it is given, with ``more`` in its plan.

    ``scratch`` is the bytes that each thread has for itself.
    """
    from . import numba_runtime

    schedule = loop.schedule
    blocks = -(-lanes // (each or shape.block))
    operations = lanes * schedule.steps * len(loop.advance.jaxpr.jaxpr.eqns)
    count = max(1, min(threads(), blocks, operations // WORTH_A_THREAD, numba_runtime.MOST_THREADS))
    scratch = -(-scratch // 64) * 64
    plan = {
        "lanes": lanes, "steps": schedule.steps, "lead": schedule.lead, "every": schedule.every,
        "count": schedule.count, "segment": segment, "blocks": blocks, "threads": count, "scratch": scratch, **more,
    }  # fmt: skip
    kind = jnp.dtype(f"float{8 * shape.itemsize}")
    buffers = [jax.ShapeDtypeStruct(r, kind) for r in results]
    buffers.append(jax.ShapeDtypeStruct((numba_runtime.JOB_BYTES + count * scratch + 64,), jnp.uint8))
    call = jax.ffi.ffi_call(register(source), buffers)
    return call(*given, plan=np.array([plan.get(name, 0) for name in _PLAN], np.int64))[:-1]


def register(source: Source) -> str:
    """Compile a kernel, or load it, and tell XLA of it; the name under which XLA knows it."""
    with _LOCK:
        return _registered(source)


@functools.lru_cache(maxsize=1024)
def _registered(source: Source) -> str:
    from . import numba_runtime

    modules = [Path(numba_runtime.__file__), *([Path(__file__).with_name(f"{source.also}.py")] if source.also else [])]
    runtime = hashlib.sha256(b"".join(path.read_bytes() for path in modules)).hexdigest()[:16]
    parts = {
        "runtime": runtime,
        "body": "\n".join(_indented(_indented(source.text.splitlines()))),
        "results": source.results,
        "also": f"from {__package__}.{source.also} import *\n" if source.also else "",
        **{name: _PLAN.index(name) for name in ("scratch", "blocks", "threads")},
    }
    digest = hashlib.sha256(_MODULE.format(name="", **parts).encode()).hexdigest()[:24]
    name = f"brainmass_kernels_numba_{source.kind}_{digest}"
    module = kernel_cache.module(name, _MODULE.format(name=name, **parts))
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(module.handler.ctypes), platform="cpu")
    return name
