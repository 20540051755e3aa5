"""The whole run as one Triton kernel, for GPUs that Mosaic GPU does not reach: the state never leaves the registers.

The step is emitted as Triton source and called through `jax_triton`. Lanes are cut into blocks, one a program; programs
do not meet. The adjoint walks the checkpointed segments backwards: it runs each once more, keeping in device memory
the state before every few steps; those few are then written out, forth and back, with all their states in registers.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .. import _context, _jax, kernel_cache, noise
from ..emit import TRITON, TRITON_AMD, TRITON_FAST, OpTable, Writer
from ..pointwise import Literal, Program
from ..schedule import Body, SegmentGroup, checkpoint_levels, nested_segments, parity_in, segment_groups, segments_in
from . import triton_versions
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

WARP = 32
# Warps of one mass a thread that a multiprocessor should have before threads take more than one.
_FILLED = 16
# Instructions that one unrolled loop body may have: a multiprocessor's nearest instruction caches hold some 2,000.
_BODY = 1000
_UNROLL = 20
# What a normal counts as in it: two are drawn at a time, for two steps.
_DRAW = 36
# Values that an adjoint may keep in registers from the way forth to the way back.
KEPT = 64
# Regions of a network, at most: threads of a program.
REGIONS = 1024
_TYPES = {"float32": "tl.float32", "float64": "tl.float64"}


class Layout(NamedTuple):
    """How the lanes of a run lie on the GPU.

    Attributes
    ----------
    lanes : lanes of the run
    warps : of a program
    vec : masses a thread
    regions : lanes of a network, which has a program; 0 where lanes are apart
    together : networks that share a program
    """

    lanes: int
    warps: int
    vec: int
    regions: int = 0
    together: int = 1

    @property
    def width(self) -> int:
        """Lanes of one program."""
        return WARP * self.warps * self.vec

    @property
    def blocks(self) -> int:
        return -(-self.lanes // (self.regions * self.together or self.width))

    @classmethod
    def choose(cls, lanes: int, most: int, interpreted: bool = False) -> Layout:
        """All multiprocessors get lanes first, then enough warps, and only then a thread more masses than one.

        An interpreter takes as long for many lanes as for one.
        """
        if interpreted:
            return cls(lanes, 1, min(1024, 1 << max(5, (lanes - 1).bit_length())) // WARP)
        several = _jax.multiprocessors() * _FILLED * WARP
        wide = [v for v in (4, 2) if v <= most and lanes >= several * v]
        return cls(lanes, 4 if lanes >= several else 1, wide[0] if wide else 1)

    @classmethod
    def of_networks(cls, lanes: int, regions: int, depth: int = 0, alike: bool = True) -> Layout:
        """A region a thread, and two beyond half the threads that a program may have, which leaves them registers.

        Networks of the same weights share a program where they are many, for what they read then lies together: eight
        numbers fill what the memory hands out at once.
        """
        most = max(1, 4 * lanes // regions // (3 * _jax.multiprocessors()))
        counted = 2 * regions * (depth + 2)
        together = [n for n in (8, 4, 2) if n <= most and n * regions <= REGIONS and n * counted < 2**31]
        many = together[0] if alike and together else 1
        width = 1 << max(5, (many * regions - 1).bit_length())
        warps = min(width // WARP, 16)
        return cls(lanes, warps, width // (WARP * warps), regions, many)


class Triton:
    """The backend through `jax_triton`: see `base.Backend` for the protocol."""

    name = "triton"
    interpretable = True
    inverse_steps = False
    networks = True
    same_lanes = False

    def base_two(self, precision: str) -> bool:
        """Powers of two and reciprocals are what the hardware has, besides a rough tanh."""
        return precision == "exact" and not _jax.is_amd()

    def unavailable(self, platform: str) -> str | None:
        """Why nothing can run on this platform, or ``None``."""
        if platform != "gpu":
            return (
                f"this machine's platform is '{platform}', not 'gpu'; "
                f"`brainmass_kernels.testing.interpret()` runs it in Triton's interpreter"
            )
        if _context.TRITON_KERNELS.get() is not None:
            return None
        capability = _jax.compute_capability()
        if reason := triton_versions.unfit(capability):
            return reason
        if capability is not None and 0 < capability < 8.0:
            return f"it needs an NVIDIA GPU of compute capability 8.0 (Ampere) or newer, and this one has {capability}"
        return None

    def unsupported(self, request: Request) -> str | None:
        """Why the request cannot run, or ``None`` if it can."""
        if np.dtype(request.dtype).name not in _TYPES:
            return f"it takes float32 and float64, not {np.dtype(request.dtype)}"
        if request.loop.interpret and not all(map(importlib.util.find_spec, ("triton", "torch"))):
            return "Triton's interpreter needs triton and torch: pip install triton torch"
        coupling = request.loop.coupling
        if coupling and coupling.regions > REGIONS:
            return (
                f"a network is one block of threads, of up to {REGIONS:,} regions, and this one has "
                f"{coupling.regions:,}; implementation 'scan' runs it"
            )
        if coupling and 2 * coupling.regions * (coupling.depth + 2) >= 2**31:
            return (
                f"what {coupling.regions:,} regions sent in {coupling.depth:,} steps, the longest delay, is more than "
                f"32-bit integers count; implementation 'scan' runs it, or a longer dt"
            )
        return lacking(TRITON.lacks, *programs_of(request.loop))

    def copied(self, request: Request) -> Copied:
        """Nothing: it writes straight to what is returned."""
        return Copied()

    def forward(self, loop: Loop, operands: Operands, initial: Carry, checkpoint_every: int | None = None) -> Forward:
        """Run the loop; with ``checkpoint_every``, also keep the state before each segment."""
        if loop.coupling:
            from . import triton_network

            return triton_network.forward(loop, operands, initial, checkpoint_every)
        (coefs, inputs, seeds, _), state = operands, initial.state
        lanes, dtype = state[0].shape[0], state[0].dtype
        layout = Layout.choose(lanes, 4, bool(loop.interpret))
        parts = tuple(segment_groups(loop.schedule, checkpoint_every or max(1, loop.schedule.steps)))
        text = Text(loop, coefs, inputs, seeds, dtype, layout)
        source = text.forward(parts, bool(checkpoint_every))
        shapes = [(lanes,)] * loop.n_state + [(loop.schedule.count, lanes)] * text.n_seen
        shapes += [(segments_in(parts), lanes)] * loop.n_state if checkpoint_every else []
        given = (*coefs, *state, *inputs, *_seeds(seeds))
        out = iter(_call(source, loop, layout, given, [jax.ShapeDtypeStruct(s, dtype) for s in shapes]))
        final = tuple(next(out) for _ in range(loop.n_state))
        records = tuple(next(out) for _ in range(text.n_seen))
        if not text.n_seen:
            records = (jnp.zeros((0, lanes), dtype),) * loop.n_observables
        return Forward(records, Carry(final), tuple(out) if checkpoint_every else None)

    def adjoint(
        self, loop: Loop, pullbacks: Pullbacks, wanted: Wanted, operands: Operands, saved, cotangents: Cotangents,
        checkpoint_every: int,
    ) -> Adjoint:  # fmt: skip
        """Walk back over a forward run that kept checkpoints."""
        if loop.coupling:
            from . import triton_network

            return triton_network.adjoint(loop, pullbacks, wanted, operands, saved, cotangents, checkpoint_every)
        (coefs, inputs, seeds, _), ct_final = operands, cotangents.final.state
        lanes, dtype = ct_final[0].shape[0], ct_final[0].dtype
        layout = Layout.choose(lanes, 1, bool(loop.interpret))
        parts = tuple(segment_groups(loop.schedule, checkpoint_every))
        text = Text(loop, coefs, inputs, seeds, dtype, layout)
        source = text.adjoint(parts, pullbacks, wanted)
        in_lanes = [x.ndim == 2 for x, w in zip(inputs, wanted.inputs) if w]
        n, steps = sum(wanted.coefs), loop.schedule.steps
        shapes = [(lanes,)] * (n + loop.n_state)
        shapes += [(steps, lanes if each else layout.blocks) for each in in_lanes]
        shapes += [
            (slots, lanes) for slots in checkpoint_levels(parts, text.most(pullbacks)) for _ in range(loop.n_state)
        ]
        given = (*coefs, *inputs, *_seeds(seeds), *saved, *ct_final, *(cotangents.records if text.n_seen else ()))
        out = _call(source, loop, layout, given, [jax.ShapeDtypeStruct(s, dtype) for s in shapes])
        m = n + loop.n_state
        return Adjoint(tuple(out[:n]), Carry(tuple(out[n:m])), tuple(out[m : m + len(in_lanes)]))


def _seeds(seeds) -> tuple:
    return () if seeds is None else (seeds,)


def optable(loop: Loop) -> OpTable:
    if loop.precision == "fast" and not _jax.is_amd():
        return TRITON_FAST
    return TRITON_AMD if _jax.is_amd() else TRITON


# Source -------------------------------------------------------------------------------------------------------------


class Source(NamedTuple):
    """An emitted kernel.

    Attributes
    ----------
    kind : "forward" or "adjoint"
    text : of the kernel and the functions that it calls
    numbers : what its argument ``plan`` holds
    """

    kind: str
    text: str
    numbers: tuple[int, ...]


class Text:
    """A kernel's source under construction, line by line.

    Numbers that change with the length of a run are not in the text: the kernel reads them from ``plan``.
    """

    def __init__(
        self, loop: Loop, coefs, inputs, seeds, dtype, layout: Layout, wiring: Callable[[Text], Uncoupled] | None = None
    ):
        self.loop, self.layout = loop, layout
        self.dtype = np.dtype(dtype)
        self.optable = optable(loop)
        self.coefs_in_lanes = [c.ndim == 1 for c in coefs]
        # What arrives from other lanes is not among the inputs of a forward run.
        self.n_given = len(inputs)
        self.inputs_in_lanes = [x.ndim == 2 for x in inputs] + [True] * (loop.n_inputs - len(inputs))
        self.n_seen = loop.n_observables if loop.schedule.count else 0
        self.coefs = [f"c{k}" for k in range(loop.n_coefs)]
        self.arguments = ["plan"]
        self.numbers: list[int] = [layout.lanes]
        self.lines: list[str] = []
        self.depth = 1
        self.functions: list[str] = []
        self.loops = self.windows = 0
        # Steps are counted where something depends on their number.
        self.counted = bool(loop.n_inputs or loop.n_normals)
        # The number of the first step, which may come with the seeds; all lanes have come equally far.
        self.origin = " + origin" if seeds is not None and len(seeds) == 3 else ""
        self.coupled = (wiring or Uncoupled)(self)

    # Writing ---------------------------------------------------------------------------------------------------------

    def line(self, text: str) -> None:
        self.lines.append("    " * self.depth + text)

    @contextmanager
    def block(self, head: str) -> Iterator[None]:
        self.line(head)
        self.depth += 1
        yield
        self.depth -= 1

    def number(self, value: int) -> str:
        """The name of a number that the kernel is given."""
        self.numbers.append(value)
        return f"p{len(self.numbers) - 1}"

    @contextmanager
    def repeat(self, count: int, backwards: bool = False) -> Iterator[str]:
        """A loop over so many passes, and the name of its counter."""
        self.loops += 1
        name, limit = f"i{self.loops}", self.number(count)
        if backwards:
            with self.block(f"for back{name} in range({limit}):"):
                self.line(f"{name} = {limit} - 1 - back{name}")
                yield name
        else:
            with self.block(f"for {name} in range({limit}):"):
                yield name

    def take(self, stem: str, count: int) -> list[str]:
        """Arguments of the kernel."""
        names = [f"{stem}{k}" for k in range(count)]
        self.arguments += names
        return names

    def assign(self, names: Sequence[str], call: str) -> None:
        if names:
            self.line(f"{', '.join(names)} = {call}")

    def load(self, names: Sequence[str], arrays: Sequence[str], row: str | None = None) -> None:
        """Read these lanes of arrays, or of a row of each."""
        place = self.place(row) if names else ""
        for name, array in zip(names, arrays, strict=True):
            self.line(f"{name} = tl.load({array} + {place}, mask=inside, other=0)")

    def store(self, arrays: Sequence[str], names: Sequence[str], row: str | None = None) -> None:
        place = self.place(row) if names else ""
        for name, array in zip(names, arrays, strict=True):
            self.line(f"tl.store({array} + {place}, {name}, mask=inside)")

    def place(self, row: str | None) -> str:
        if row is None:
            return "lane"
        self.line(f"place = lane + ({row}) * wide")
        return "place"

    # Functions -------------------------------------------------------------------------------------------------------

    def function(self, name: str, program: Program, arguments: Sequence[str], uniform: Sequence[bool]) -> list[bool]:
        """Write a program as a function of its arguments and of ``zero``, a block of zeros.

        Returns
        -------
        for each of its outputs whether it is 0 whatever the arguments are
        """
        writer = Writer(self.optable)
        results = writer.write(program, arguments)
        spread = program.depends([not each for each in uniform])
        cast = "" if all(a.dtype == self.dtype for a in program.out_avals) else f".to({_TYPES[self.dtype.name]})"
        returned = [r if each else f"(zero + {r})" for r, each in zip(results, spread)]
        if returned:
            body = [*writer.lines(results), f"return {', '.join(r + cast for r in returned)}"]
            head = ["@device", f"def {name}({', '.join([*arguments, 'zero'])}):"]
            self.functions += [*head, *(f"    {line}" for line in body), "", ""]
        zeros = [isinstance(v, Literal) and not np.any(v.val) for v in program.jaxpr.jaxpr.outvars]
        return zeros

    def step_functions(self) -> None:
        """Those of the way forth."""
        loop = self.loop
        n, m, p, z = loop.n_coefs, loop.n_state, loop.n_inputs, loop.n_normals
        uniform = [not x for x in self.coefs_in_lanes]
        given = [*self.coefs, *self.names("x", m), *self.names("u", p), *self.names("z", z)]
        self.uniform_step = [*uniform, *[False] * m, *(not x for x in self.inputs_in_lanes), *[False] * z]
        self.function("advance", loop.advance, given, self.uniform_step)
        if self.n_seen:
            self.function("observe", loop.observe, given[: n + m], self.uniform_step[: n + m])
        if z:
            self.draw_function(z)

    def draw_function(self, count: int) -> None:
        """``draw``, the normals of two steps; compiled for NVIDIA its random words are made by assembly."""
        words = [jax.ShapeDtypeStruct((), "int32")] * 4
        if self.loop.interpret or _jax.is_amd():
            writer = Writer(self.optable)
            given = ["key0", "key1", "half", "stream"]
            made = writer.write(Program(noise.threefry, words, "random words"), given)
            body = [*writer.lines(made), f"return {', '.join(made)}"]
            self.functions += [
                "@device",
                f"def threefry({', '.join(given)}):",
                *(f"    {line}" for line in body),
                "",
                "",
            ]
        self.function(
            "box_muller", Program(noise.box_muller, words[:2], "white noise"), ["word0", "word1"], [False] * 2
        )
        body, drawn = [], []
        for stream in range(count):
            both = [f"even{stream}", f"odd{stream}"]
            body += [
                f"word0, word1 = threefry(key0, key1, half, {stream})",
                f"{', '.join(both)} = box_muller(word0, word1, zero)",
            ]
            drawn += both
        body += [f"return {', '.join(drawn)}"]
        self.functions += ["@device", "def draw(key0, key1, half, zero):", *(f"    {line}" for line in body), "", ""]

    @staticmethod
    def names(stem: str, count: int, mark: str = "") -> list[str]:
        return [f"{stem}{k}{mark}" for k in range(count)]

    # Pieces of both kernels ------------------------------------------------------------------------------------------

    def take_arguments(self, initial: int) -> None:
        """The arguments that a step needs, ``initial`` states among them."""
        self.coef_arrays = self.take("coef", self.loop.n_coefs)
        self.initial = self.take("initial", initial)
        self.input_arrays = self.take("input", self.n_given)
        if self.loop.n_normals:
            self.arguments.append("seeds")
        self.coupled.take()

    def head(self) -> None:
        self.line("block = tl.program_id(0)")
        self.line("wide = tl.load(plan).to(tl.int64)")
        self.coupled.place()
        self.line(f"zero = tl.full((BLOCK,), 0.0, {_TYPES[self.dtype.name]})")
        for name, array, each in zip(self.coefs, self.coef_arrays, self.coefs_in_lanes):
            self.line(
                f"{name} = tl.load({array} + lane, mask=inside, other=0)" if each else f"{name} = tl.load({array})"
            )
        if self.loop.n_normals:
            self.line("key0 = tl.load(seeds + lane, mask=inside, other=0)")
            self.line("key1 = tl.load(seeds + wide + lane, mask=inside, other=0)")
        if self.origin:
            self.line("origin = tl.load(seeds + 2 * wide)")

    def read_inputs(self, step: str, names: Sequence[str]) -> None:
        if any(self.inputs_in_lanes[: self.n_given]):
            self.place(step)
        for name, array, each in zip(names, self.input_arrays, self.inputs_in_lanes):
            where = "place, mask=inside, other=0" if each else step
            self.line(f"{name} = tl.load({array} + {where})")

    def step(self, step: str, given: Sequence[str], made: Sequence[str], draw: Callable, mark: str = "") -> None:
        """One step from the states ``given``; with ``mark``, what it read and drew keeps a name of its own.

        ``draw(names)`` gives the step's normals these names.
        """
        inputs = self.names("u", self.loop.n_inputs, mark)
        normals = self.names("z", self.loop.n_normals, mark)
        self.read_inputs(step, inputs)
        draw(normals)
        arguments = [*self.coefs, *given, *inputs, *normals, "zero"]
        self.assign(made, f"advance({', '.join(arguments)})")

    def repeat_bodies(self, count: int, size: int, body: Callable[[int], None]) -> None:
        """``body(size)`` as often as it fits, and once more for the rest."""
        whole, left = divmod(count, size)
        if whole > 1:
            with self.repeat(whole):
                body(size)
        elif whole:
            body(size)
        if left:
            body(left)

    def run(
        self, parts: Sequence[SegmentGroup], save: Sequence[str], record: Callable | None, parity: int | None = 0
    ) -> None:
        """Run pieces from the states in ``x``, the first at the step ``n``, saving from the row ``slot`` on.

        The parity is that of ``n``, where it is known.
        """
        state = self.names("x", self.loop.n_state)
        unroll = self.unrolled(self.loop.advance)
        for piece in parts:
            form = Body.of(piece, unroll, self.loop.n_normals > 0)
            known = parity_in(parity, piece) if form.even else None

            def body(steps, piece=piece, form=form, known=known):
                draw = normals(self, "n", known)
                for j in range(steps):
                    self.coupled.arrive(state)
                    self.step("n", state, state, functools.partial(draw, j))
                    if self.counted:
                        self.line("n += 1")
                    if form.strides and (j + 1) % piece.stride == 0 and piece.recorded and record:
                        record(state)

            def stride(_, piece=piece, form=form, body=body):
                self.repeat_bodies(piece.stride, form.steps, body)
                if piece.recorded and record:
                    record(state)

            with self.repeat(piece.segments):
                if save:
                    self.store(save, state, "slot")
                    self.line("slot += 1")
                if form.strides:
                    self.repeat_bodies(piece.strides * piece.stride, form.steps, body)
                else:
                    self.repeat_bodies(piece.strides, 1, stride)

    def unrolled(self, program: Program) -> int:
        """Steps of a program written out in one body."""
        operations = 1 + len(program.jaxpr.jaxpr.eqns) + _DRAW * self.loop.n_normals
        return max(1, min(self.coupled.unroll, _BODY // (operations * self.layout.vec)))

    def finished(self, kind: str) -> Source:
        arguments = ", ".join([*self.arguments, "BLOCK: tl.constexpr"])
        numbers = [f"    p{k} = tl.load(plan + {k})" for k in range(1, len(self.numbers))]
        text = [*self.functions, "@kernel", f"def brainmass_kernels_triton_{kind}({arguments}):", *numbers, *self.lines]
        return Source(kind, "\n".join(text) + "\n", tuple(self.numbers))

    # The kernels -----------------------------------------------------------------------------------------------------

    def forward(self, parts: Sequence[SegmentGroup], saving: bool) -> Source:
        m = self.loop.n_state
        state, seen = self.names("x", m), self.names("seen", self.n_seen)
        self.take_arguments(m)
        final, records = self.take("final", m), self.take("record", self.n_seen)
        saved = self.take("saved", m) if saving else []
        self.coupled.give()
        self.step_functions()
        self.head()
        self.load(state, self.initial)
        for name in ["n"] * self.counted + ["slot"] * saving + ["taken"] * bool(seen):
            self.line(f"{name} = 0")
        self.coupled.begin()

        def record(state):
            self.assign(seen, f"observe({', '.join([*self.coefs, *state, 'zero'])})")
            self.store(records, seen, "taken")
            self.line("taken += 1")

        self.run(parts, saved, record if seen else None)
        self.store(final, state)
        self.coupled.end()
        return self.finished("forward")

    def most(self, pullbacks: Pullbacks) -> int:
        """Steps that are written out forth and back."""
        operations = 1 + len(pullbacks.advance.jaxpr.jaxpr.eqns) + len(self.loop.advance.jaxpr.jaxpr.eqns)
        operations += _DRAW * self.loop.n_normals
        return max(1, min(KEPT // self.loop.n_state, 2 * _BODY // operations, self.coupled.most))

    def adjoint(self, parts: Sequence[SegmentGroup], pullbacks: Pullbacks, wanted: Wanted) -> Source:
        loop, most = self.loop, self.most(pullbacks)
        m, n_wanted = loop.n_state, sum(wanted.coefs)
        self.take_arguments(0)
        saved, ct_final = self.take("saved", m), self.take("ct_final", m)
        ct_records = self.take("ct_record", self.n_seen)
        out_coefs, out_state = self.take("out_coef", n_wanted), self.take("out_state", m)
        wanted_in_lanes = [x for x, w in zip(self.inputs_in_lanes, wanted.inputs) if w]
        out_inputs = self.take("out_input", len(wanted_in_lanes) - self.coupled.dropped)
        levels = [self.take(f"level{depth}_", m) for depth, _ in enumerate(checkpoint_levels(parts, most))]
        self.coupled.give()
        self.step_functions()
        back = ReversePass(self, pullbacks, wanted_in_lanes, n_wanted, most, levels, ct_records, out_inputs)
        self.head()
        self.line("blocks = tl.num_programs(0).to(tl.int64)")
        for name in back.ct_coefs:
            self.line(f"{name} = zero")
        self.load(back.ct_state, ct_final)
        self.coupled.begin()
        back.groups(parts, "0", "0", saved, 0, 0)
        self.store(out_coefs, back.ct_coefs)
        self.store(out_state, back.ct_state)
        self.coupled.end()
        return self.finished("adjoint")


def normals(text: Text, first: str, parity: int | None) -> Callable[[int, Sequence[str]], None]:
    """Lines that draw the normals of steps in a row, the number of the first of which has a name.

    Returns
    -------
    ``(j, names)``, which gives those of the step ``first + j`` these names
    """
    count, known = text.loop.n_normals, None if text.origin else parity
    if not count:
        return lambda j, names: None
    text.windows += 1
    number = text.windows
    text.line(f"half{number} = ({first}{text.origin}) >> 1")
    if known is None:
        text.line(f"odd{number} = (({first}{text.origin}) & 1) == 1")

    def draw(k: int):
        names = text.names(f"drawn{number}_{k}_", 2 * count)
        text.assign(names, f"draw(key0, key1, half{number} + {k}, zero)")
        return [*zip(names[::2], names[1::2])]

    row = noise.Normals(draw, lambda odd, even: f"tl.where(odd{number}, {odd}, {even})", known)

    def give(j: int, names: Sequence[str]) -> None:
        for name, value in zip(names, row(j), strict=True):
            text.line(f"{name} = {value}")

    return give


class Uncoupled:
    """How the lanes of a program are coupled, here not at all; `triton_network` has the other way.

    Its lines come at the beginning of a kernel, before each step forth and after each step back, and at the end.

    Attributes
    ----------
    unroll : steps that may be written out in one body
    most : steps that may be written out forth and back
    dropped : cotangents of inputs, the last, that are not stored
    """

    unroll, most, dropped = _UNROLL, KEPT, 0

    def __init__(self, text: Text):
        self.text = text

    def take(self) -> None:
        """Arguments after those that a step needs."""

    def give(self) -> None:
        """Results after all others."""

    def place(self) -> None:
        """Which lanes the program has."""
        self.text.line("lane = block * BLOCK + tl.arange(0, BLOCK)")
        self.text.line("inside = lane < tl.load(plan)")

    def begin(self) -> None:
        """Before the first step."""

    def arrive(self, state: Sequence[str]) -> None:
        """Before a step: what was sent arrives."""

    def back(self, back: ReversePass, state: Sequence[str], sent: Sequence[str], step: str) -> None:
        """After a step was walked back to ``state``; ``sent`` are the cotangents of its inputs."""

    def end(self) -> None:
        """After the last step."""


class ReversePass:
    """The way back; the cotangents of wanted coefficients and of the state are in ``g`` and ``y``."""

    def __init__(self, text: Text, pullbacks: Pullbacks, in_lanes, n_wanted, most, levels, ct_records, out_inputs):
        loop = text.loop
        n, m, p, z = loop.n_coefs, loop.n_state, loop.n_inputs, loop.n_normals
        self.text, self.most, self.in_lanes, self.levels = text, most, in_lanes, levels
        self.ct_records, self.out_inputs = ct_records, out_inputs
        self.ct_coefs, self.ct_state = text.names("g", n_wanted), text.names("y", m)
        given = [*text.coefs, *text.names("x", m), *text.names("u", p), *text.names("z", z), *self.ct_state]
        self.zeros = text.function("advance_back", pullbacks.advance, given, [*text.uniform_step, *[False] * m])
        if text.n_seen:
            given = [*text.coefs, *text.names("x", m), *text.names("s", text.n_seen)]
            uniform = [*text.uniform_step[: n + m], *[False] * text.n_seen]
            self.zeros_seen = text.function("observe_back", pullbacks.observe, given, uniform)
        self.depth = 0

    def groups(
        self,
        parts: Sequence[SegmentGroup],
        start: str,
        taken: str,
        saved: Sequence[str],
        depth: int,
        parity: int | None,
    ) -> None:
        """Walk pieces back, of which the first begins at step ``start``, of such parity, and with record ``taken``."""
        text = self.text
        slot, records = segments_in(parts), sum(p.segments * p.records for p in parts)
        for piece in reversed(parts):
            slot -= piece.segments
            records -= piece.segments * piece.records
            state = text.names("x", text.loop.n_state)
            with text.repeat(piece.segments, backwards=True) as i:
                text.load(state, saved, f"{text.number(slot)} + {i}")
                first, k = f"first{depth}", f"k{depth}"
                text.line(f"{first} = {start} + {text.number(piece.start)} + {i} * {text.number(piece.length)}")
                text.line(f"{k} = {taken} + {text.number(records)} + {i} * {text.number(piece.records)}")
                known = parity_in(parity, piece)
                if piece.parts or piece.length > self.most:
                    self.long(piece, first, k, depth, known)
                else:
                    self.short(piece, first, k, known)

    def long(self, piece: SegmentGroup, first: str, k: str, depth: int, parity: int | None) -> None:
        """Run a segment to keep states within it, and walk its parts back."""
        text, levels = self.text, self.levels[depth]
        parts = nested_segments(piece, self.most)
        # Threads may read what others wrote.
        text.line("tl.debug_barrier()")
        if text.counted:
            text.line(f"n = {first}")
        text.line("slot = 0")
        text.run(parts, levels, None, parity)
        text.line("tl.debug_barrier()")
        if piece.parts and piece.recorded:
            self.observed(k, text.names("x", text.loop.n_state))
        self.groups(parts, first, k, levels, depth + 1, parity)

    def short(self, piece: SegmentGroup, first: str, k: str, parity: int | None) -> None:
        """Write a segment out, forth and back."""
        text, m = self.text, self.text.loop.n_state
        states = [text.names("x", m), *(text.names("x", m, f"_{j}") for j in range(1, piece.length + 1))]
        draw = normals(text, first, parity)
        for j in range(piece.length):
            text.step(f"({first} + {j})", states[j], states[j + 1], functools.partial(draw, j), f"_{j}")
        for j in reversed(range(piece.length)):
            if piece.recorded and (j + 1) % piece.stride == 0:
                self.observed(f"({k} + {j // piece.stride})", states[j + 1])
            self.step(f"({first} + {j})", states[j], f"_{j}")

    def step(self, step: str, state: Sequence[str], mark: str) -> None:
        text, loop = self.text, self.text.loop
        given = [*text.coefs, *state, *text.names("u", loop.n_inputs, mark), *text.names("z", loop.n_normals, mark)]
        moved, n = text.names("h", len(self.ct_coefs)), len(self.ct_coefs)
        sent = text.names("w", len(self.in_lanes))
        call = f"advance_back({', '.join([*given, *self.ct_state, 'zero'])})"
        text.assign([*moved, *self.ct_state, *sent], call)
        self.add(self.ct_coefs, moved, self.zeros[:n])
        if any(self.in_lanes):
            text.place(step)
        for array, name, each in zip(self.out_inputs, sent, self.in_lanes):
            if each:
                text.line(f"tl.store({array} + place, {name}, mask=inside)")
            else:
                text.line(f"tl.store({array} + {step} * blocks + block, total(tl.where(inside, {name}, 0.0)))")
        text.coupled.back(self, state, sent, step)

    def observed(self, k: str, state: Sequence[str]) -> None:
        """The pullback of record ``k``, taken of ``state``."""
        text = self.text
        if not self.ct_records:
            return
        seen = text.names("s", len(self.ct_records))
        text.load(seen, self.ct_records, k)
        both = [*self.ct_coefs, *self.ct_state]
        moved = text.names("h", len(both))
        text.assign(moved, f"observe_back({', '.join([*text.coefs, *state, *seen, 'zero'])})")
        self.add(both, moved, self.zeros_seen)

    def add(self, names: Sequence[str], values: Sequence[str], zeros: Sequence[bool]) -> None:
        for name, value, zero in zip(names, values, zeros):
            if not zero:
                self.text.line(f"{name} += {value}")


# Compiling and calling ----------------------------------------------------------------------------------------------

_MODULE = '''"""Emitted by brainmass_kernels for a kernel of its triton backend; runtime {runtime}."""

from brainmass_kernels.backends.{runtime_name} import *


{text}'''


def _call(source: Source, loop: Loop, layout: Layout, given, shapes) -> Sequence[jax.Array]:
    plan = jnp.asarray(source.numbers, jnp.int32)
    kernel = compiled_kernel(source.kind, source.text, bool(loop.interpret))
    if loop.interpret:
        # A callback's thread may take float64 for float32: everything goes as words.
        run = functools.partial(_interpreted, kernel, layout, shapes, [x.dtype for x in (plan, *given)])
        words = [jax.ShapeDtypeStruct((s.size * s.dtype.itemsize // 4,), jnp.int32) for s in shapes]
        sent = [lax.bitcast_convert_type(x, jnp.int32) for x in (plan, *given)]
        sent = [x.reshape(*g.shape, -1) for x, g in zip(sent, (plan, *given))]
        made = jax.pure_callback(run, words, *sent)
        return [_as_numbers(x, s) for x, s in zip(made, shapes)]
    kernels = _context.TRITON_KERNELS.get()
    if kernels is not None:
        kernels.append((kernel, (plan, *given, *shapes), layout))
        return [jnp.zeros(s.shape, s.dtype) for s in shapes]
    return _jax.triton_call(
        kernel,
        (plan, *given),
        shapes,
        grid=(layout.blocks,),
        num_warps=layout.warps,
        constants={"BLOCK": layout.width},
        ptx_version=None if _jax.is_amd() else triton_versions.newest_ptx(),
    )


@functools.lru_cache(maxsize=256)
def compiled_kernel(kind: str, text: str, interpreted: bool):
    """The kernel of a source: for Triton's compiler, which compiles it at its first call, or its interpreter."""
    runtime_name = "triton_interpreted" if interpreted else "triton_runtime"
    runtime = hashlib.sha256(Path(__file__).with_name(f"{runtime_name}.py").read_bytes()).hexdigest()[:16]
    whole = _MODULE.format(runtime=runtime, runtime_name=runtime_name, text=text)
    name = f"brainmass_kernels_{runtime_name}_{kind}_{hashlib.sha256(whole.encode()).hexdigest()[:24]}"
    return getattr(kernel_cache.module(name, whole), f"brainmass_kernels_triton_{kind}")


def _as_numbers(words, shape):
    parts = words.reshape(*shape.shape, *(() if shape.dtype.itemsize == 4 else (2,)))
    return lax.bitcast_convert_type(parts, shape.dtype)


def _interpreted(kernel, layout: Layout, shapes, dtypes, *words) -> list[np.ndarray]:
    """In Triton's interpreter; what the kernel does not write is NaN."""
    torch: Any = importlib.import_module("torch")
    given = [torch.from_numpy(np.array(x).view(dtype)) for x, dtype in zip(words, dtypes)]
    out = [torch.from_numpy(np.full(s.shape, np.nan, s.dtype)) for s in shapes]
    kernel[(layout.blocks,)](*given, *out, BLOCK=layout.width)
    return [x.numpy().reshape(-1).view(np.int32) for x in out]
