"""What is done for one block of lanes, as source that Triton compiles: the state never leaves the registers.

In the source ``c`` are coefficients, ``x`` states, ``u`` inputs and ``z`` normals; ``g`` and ``y`` are the cotangents
of the wanted coefficients and of the state, ``s`` and ``w`` those of records and inputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import jax
import numpy as np

from ... import _jax, noise
from ...codegen.source import SourceBuilder
from ...codegen.writer import Writer
from ...pointwise import Literal, Program
from ...schedule import Body, SegmentGroup, checkpoint_levels, nested_segments, parity_in, segment_groups, segments_in
from ..base import Carry, Cotangents, Loop, Operands, Pullbacks, Wanted
from .layout import Layout
from .masses import Uncoupled
from .optable import TYPES, optable_of

# Instructions that one unrolled loop body may have: a multiprocessor's nearest instruction caches hold some 2,000.
_BODY = 1000
_UNROLL = 20
# What a normal counts as in it: two are drawn at a time, for two steps.
_DRAW = 36
# Values that an adjoint may keep in registers from a step to its pullback.
KEPT = 64


def unrolled(loop: Loop, vec: int) -> int:
    """Steps written out in one body; one of a network, whose lanes meet in each."""
    operations = 1 + len(loop.advance.jaxpr.jaxpr.eqns) + _DRAW * loop.n_normals
    return 1 if loop.coupling else max(1, min(_UNROLL, _BODY // (operations * vec)))


def unrolled_back(loop: Loop, pullbacks: Pullbacks) -> int:
    """Steps written out in one body, with their pullbacks."""
    operations = 1 + len(pullbacks.advance.jaxpr.jaxpr.eqns) + len(loop.advance.jaxpr.jaxpr.eqns)
    operations += _DRAW * loop.n_normals
    return 1 if loop.coupling else max(1, min(KEPT // loop.n_state, 2 * _BODY // operations))


class Kernel(SourceBuilder):
    """What both kernels are made of.

    Numbers that change with the length of a run are not in the text: the kernel reads them from ``plan``.

    Attributes
    ----------
    numbers : what ``plan`` holds
    functions : source of the functions that the kernel calls
    """

    kind: str
    coupling: Uncoupled

    def __init__(self, loop: Loop, layout: Layout, operands: Operands, inputs: Sequence[jax.Array], dtype):
        super().__init__(optable_of(loop), depth=1)
        self.loop, self.layout, self.operands, self.dtype = loop, layout, operands, np.dtype(dtype)
        self.functions = SourceBuilder(self.optable)
        self.numbers: list[int] = [layout.lanes]
        self.inputs_read = inputs
        self.coefs_in_lanes = [c.ndim == 1 for c in operands.coefs]
        # What arrives from other lanes in a forward run is not among the inputs that are read.
        self.inputs_in_lanes = [x.ndim == 2 for x in inputs] + [True] * (loop.n_inputs - len(inputs))
        self.n_observables = loop.n_observables if loop.schedule.count else 0
        self.coefs, self.state = self.names("c", loop.n_coefs), self.names("x", loop.n_state)
        self.loops = self.windows = 0
        # Steps are counted where something depends on their number.
        self.counted = bool(loop.n_inputs or loop.n_normals)
        # The number of the first step, which may come with the seeds; all lanes have come equally far.
        self.origin = " + origin" if operands.seeds is not None and len(operands.seeds) > 2 else ""
        # Then in two words, where numbers of steps need them.
        self.wide = operands.seeds is not None and noise.is_wide(operands.seeds)

    @property
    def text(self) -> str:
        """The kernel, and before it the functions that it calls."""
        arguments = ", ".join(["plan", *self.arguments, *self.results, "BLOCK: tl.constexpr"])
        numbers = [f"    p{k} = tl.load(plan + {k})" for k in range(1, len(self.numbers))]
        head = ["@kernel", f"def brainmass_kernels_triton_{self.kind}({arguments}):"]
        functions = [self.functions.text] if self.functions.text else []
        return "\n".join([*functions, *head, *numbers, super().text]) + "\n"

    # Writing ---------------------------------------------------------------------------------------------------------

    def number(self, value: int) -> str:
        """The name of a number that the kernel reads from its plan."""
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

    @contextmanager
    def device_function(self, name: str, arguments: Sequence[str]) -> Iterator[SourceBuilder]:
        self.functions.line("@device")
        with self.functions.block(f"def {name}({', '.join(arguments)}):"):
            yield self.functions
        self.functions.line("", "")

    def function(self, name: str, program: Program, arguments: Sequence[str], uniform: Sequence[bool]) -> list[bool]:
        """Write a program as a function of its arguments and of ``zero``, a block of zeros.

        Returns
        -------
        for each of its outputs whether it is 0 whatever the arguments are
        """
        writer = Writer(self.optable)
        results = writer.write(program, arguments)
        spread = program.depends([not each for each in uniform])
        cast = "" if all(a.dtype == self.dtype for a in program.out_avals) else f".to({TYPES[self.dtype.name]})"
        returned = [r if each else f"(zero + {r})" for r, each in zip(results, spread)]
        if returned:
            with self.device_function(name, [*arguments, "zero"]) as lines:
                lines.line(*writer.lines(results), f"return {', '.join(r + cast for r in returned)}")
        return [isinstance(v, Literal) and not np.any(v.val) for v in program.jaxpr.jaxpr.outvars]

    def step_functions(self) -> None:
        """Those of a step."""
        loop, n = self.loop, self.loop.n_coefs + self.loop.n_state
        uniform = [not x for x in self.coefs_in_lanes]
        arguments = self.step_arguments(self.state)
        self.uniform_step = [*uniform, *[False] * loop.n_state, *(not x for x in self.inputs_in_lanes)]
        self.uniform_step += [False] * loop.n_normals
        self.function("advance", loop.advance, arguments, self.uniform_step)
        if self.n_observables:
            self.function("observe", loop.observe, arguments[:n], self.uniform_step[:n])
        if loop.n_normals:
            self.draw_function(loop.n_normals)

    def step_arguments(self, state: Sequence[str], mark: str = "") -> list[str]:
        """Of a step from a state; ``mark`` tells the inputs and normals of one step from those of others."""
        inputs = self.names("u", self.loop.n_inputs, mark)
        return [*self.coefs, *state, *inputs, *self.names("z", self.loop.n_normals, mark)]

    def draw_function(self, count: int) -> None:
        """``draw``, the normals of two steps; compiled for NVIDIA its random words are made by assembly."""
        words = [jax.ShapeDtypeStruct((), "int32")] * 4
        if self.loop.interpret or _jax.is_amd():
            writer, arguments = Writer(self.optable), ["key0", "key1", "half", "stream"]
            results = writer.write(Program(noise.threefry, words, "random words"), arguments)
            with self.device_function("threefry", arguments) as lines:
                lines.line(*writer.lines(results), f"return {', '.join(results)}")
        box_muller = Program(noise.box_muller, words[:2], "white noise")
        self.function("box_muller", box_muller, ["word0", "word1"], [False] * 2)
        pairs = [(f"even{stream}", f"odd{stream}") for stream in range(count)]
        with self.device_function("draw", ["key0", "key1", "half", *["high"] * self.wide, "zero"]) as lines:
            for stream, (even, odd) in enumerate(pairs):
                second = f"(high << {noise.STREAM_BITS}) + {stream}" if self.wide else f"{stream}"
                lines.line(f"word0, word1 = threefry(key0, key1, half, {second})")
                lines.line(f"{even}, {odd} = box_muller(word0, word1, zero)")
            lines.line(f"return {', '.join(name for pair in pairs for name in pair)}")

    # Pieces of both kernels ------------------------------------------------------------------------------------------

    def take_operands(self, initial: Sequence[jax.Array] = ()) -> None:
        """The arguments that a step needs."""
        self.coef_arrays = self.take("coef", self.operands.coefs)
        self.initial = self.take("initial", initial)
        self.input_arrays = self.take("input", self.inputs_read)
        if self.loop.n_normals:
            self.take_one("seeds", self.operands.seeds)
        self.coupling.take()

    def head(self) -> None:
        self.line("block = tl.program_id(0)")
        self.line("wide = tl.load(plan).to(tl.int64)")
        self.coupling.place()
        self.line(f"zero = tl.full((BLOCK,), 0.0, {TYPES[self.dtype.name]})")
        for name, array, each in zip(self.coefs, self.coef_arrays, self.coefs_in_lanes):
            self.line(
                f"{name} = tl.load({array} + lane, mask=inside, other=0)" if each else f"{name} = tl.load({array})"
            )
        if self.loop.n_normals:
            self.line("key0 = tl.load(seeds + lane, mask=inside, other=0)")
            self.line("key1 = tl.load(seeds + wide + lane, mask=inside, other=0)")
        if self.origin:
            self.line("origin = tl.load(seeds + 2 * wide)")
        if self.wide:
            self.line("origin = origin.to(tl.uint32).to(tl.int64) + (tl.load(seeds + 3 * wide).to(tl.int64) << 32)")

    def read_inputs(self, step: str, mark: str) -> None:
        if any(self.inputs_in_lanes[: len(self.input_arrays)]):
            self.place(step)
        names = self.names("u", self.loop.n_inputs, mark)
        for name, array, each in zip(names, self.input_arrays, self.inputs_in_lanes):
            where = "place, mask=inside, other=0" if each else step
            self.line(f"{name} = tl.load({array} + {where})")

    def normals(self, first: str, parity: int | None) -> Callable[[int, str], None]:
        """Lines that draw the normals of steps in a row, the number of the first of which has a name.

        Returns
        -------
        ``(j, mark)``, which draws those of the step ``first + j``
        """
        count, known = self.loop.n_normals, None if self.origin else parity
        if not count:
            return lambda j, mark: None
        self.windows += 1
        number = self.windows
        self.line(f"at{number} = {first}{self.origin}" if self.wide else f"half{number} = ({first}{self.origin}) >> 1")
        if known is None:
            self.line(f"odd{number} = (({first}{self.origin}) & 1) == 1")

        def draw(k: int):
            names, counter = self.names(f"drawn{number}_{k}_", 2 * count), f"half{number} + {k}"
            if self.wide:
                at = f"(at{number} + {2 * k})"
                counter = f"{at}.to(tl.int32) >> 1, ({at} >> 32).to(tl.int32)"
            self.assign(names, f"draw(key0, key1, {counter}, zero)")
            return [*zip(names[::2], names[1::2])]

        row = noise.Normals(draw, lambda odd, even: f"tl.where(odd{number}, {odd}, {even})", known)

        def name(j: int, mark: str) -> None:
            for normal, value in zip(self.names("z", count, mark), row(j), strict=True):
                self.line(f"{normal} = {value}")

        return name

    def step(self, step: str, state: Sequence[str], following: Sequence[str], draw: Callable, mark: str = "") -> None:
        """One step from a state to the following; with ``mark``, what it reads and draws keeps names of its own."""
        self.read_inputs(step, mark)
        draw(mark)
        self.assign(following, f"advance({', '.join([*self.step_arguments(state, mark), 'zero'])})")

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
        self, groups: Sequence[SegmentGroup], save: Sequence[str], record: Callable | None, parity: int | None = 0
    ) -> None:
        """Run segments from the states in ``x``, the first at the step ``n``, saving from the row ``slot`` on.

        The parity is that of ``n``, where it is known.
        """
        for group in groups:
            self.run_group(group, save, record if group.recorded else None, parity)

    def run_group(self, group: SegmentGroup, save: Sequence[str], record: Callable | None, parity: int | None) -> None:
        form = Body.of(group, unrolled(self.loop, self.layout.vec), self.loop.n_normals > 0)
        known = parity_in(parity, group) if form.even else None

        def steps_of_body(count: int) -> None:
            draw = self.normals("n", known)
            for j in range(count):
                self.coupling.arrive(self.state)
                self.step("n", self.state, self.state, functools.partial(draw, j))
                if self.counted:
                    self.line("n += 1")
                if form.strides and (j + 1) % group.stride == 0 and record:
                    record()

        def stride(_) -> None:
            self.repeat_bodies(group.stride, form.steps, steps_of_body)
            if record:
                record()

        with self.repeat(group.segments):
            if save:
                self.store(save, self.state, "slot")
                self.line("slot += 1")
            if form.strides:
                self.repeat_bodies(group.strides * group.stride, form.steps, steps_of_body)
            else:
                self.repeat_bodies(group.strides, 1, stride)


class ForwardKernel(Kernel):
    """A forward run.

    Arguments: coefficients, state, inputs, seeds. Results: final state, records, saved states.
    """

    kind = "forward"

    def __init__(
        self, coupling: type[Uncoupled], loop: Loop, operands: Operands, initial: Carry, checkpoint_every: int | None
    ):
        (first, *_), schedule = initial.state, loop.schedule
        layout = Layout.of(loop, len(first), 4, operands.connections)
        super().__init__(loop, layout, operands, operands.inputs, first.dtype)
        self.groups = tuple(segment_groups(schedule, checkpoint_every or max(1, schedule.steps)))
        self.saving = bool(checkpoint_every)
        self.carry, self.coupling = initial, coupling(self)
        self.take_operands(initial.state)
        lanes, m = layout.lanes, loop.n_state
        self.final = self.give("final", [(lanes,)] * m)
        self.records = self.give("record", [(schedule.count, lanes)] * self.n_observables)
        self.saved = self.give("saved", [(segments_in(self.groups), lanes)] * m if self.saving else [])
        self.coupling.give()
        self.write()

    def write(self) -> None:
        self.step_functions()
        self.head()
        self.load(self.state, self.initial)
        for name in ["n"] * self.counted + ["slot"] * self.saving + ["records"] * bool(self.records):
            self.line(f"{name} = 0")
        self.coupling.begin()
        self.run(self.groups, self.saved, self.record if self.records else None)
        self.store(self.final, self.state)
        self.coupling.end()

    def record(self) -> None:
        names = self.names("obs", self.n_observables)
        self.assign(names, f"observe({', '.join([*self.coefs, *self.state, 'zero'])})")
        self.store(self.records, names, "records")
        self.line("records += 1")


class AdjointKernel(Kernel):
    """An adjoint run: segments are run again and walked back, the last first.

    Arguments: coefficients, inputs, seeds, saved states, cotangents of the final state and of records. Results:
    cotangents of the wanted coefficients, of the initial state and of the wanted inputs; and states within segments.
    """

    kind = "adjoint"

    def __init__(
        self, coupling: type[Uncoupled], loop: Loop, pullbacks: Pullbacks, wanted: Wanted, operands: Operands, saved,
        cotangents: Cotangents, checkpoint_every: int,
    ):  # fmt: skip
        # What arrived from other lanes is an input here, and so is its cotangent.
        states, arrived, self.first_history = saved
        first = cotangents.final.state[0]
        layout = Layout.of(loop, len(first), 1, operands.connections)
        super().__init__(loop, layout, operands, (*operands.inputs, *arrived), first.dtype)
        self.pullbacks, self.wanted, self.cotangents = pullbacks, wanted, cotangents
        self.groups, self.most = tuple(segment_groups(loop.schedule, checkpoint_every)), unrolled_back(loop, pullbacks)
        self.coupling = coupling(self)
        self.take_operands()
        self.saved = self.take("saved", states)
        self.ct_final = self.take("ct_final", cotangents.final.state)
        self.ct_records = self.take("ct_record", cotangents.records[: self.n_observables])
        self.give_cotangents(len(arrived))
        self.coupling.give()
        self.write()

    def give_cotangents(self, n_arrived: int) -> None:
        lanes, steps, m = self.layout.lanes, self.loop.schedule.steps, self.loop.n_state
        self.ct_coefs, self.ct_state = self.names("g", sum(self.wanted.coefs)), self.names("y", m)
        self.out_coefs = self.give("out_coef", [(lanes,)] * len(self.ct_coefs))
        self.out_state = self.give("out_state", [(lanes,)] * m)
        wanted = (*self.wanted.inputs, *[True] * n_arrived)
        self.wanted_in_lanes = [in_lanes for in_lanes, w in zip(self.inputs_in_lanes, wanted) if w]
        stored = self.wanted_in_lanes[: sum(self.wanted.inputs) + n_arrived * any(self.wanted.weights)]
        shapes = [(steps, lanes if in_lanes else self.layout.blocks) for in_lanes in stored]
        self.out_inputs = self.give("out_input", shapes)
        levels = checkpoint_levels(self.groups, self.most)
        self.levels = [self.give(f"level{k}_", [(slots, lanes)] * m) for k, slots in enumerate(levels)]

    def write(self) -> None:
        self.step_functions()
        self.pullback_functions()
        self.head()
        self.line("blocks = tl.num_programs(0).to(tl.int64)")
        for name in self.ct_coefs:
            self.line(f"{name} = zero")
        self.load(self.ct_state, self.ct_final)
        self.coupling.begin()
        self.reverse_groups(self.groups, "0", "0", self.saved, 0, 0)
        self.store(self.out_coefs, self.ct_coefs)
        self.store(self.out_state, self.ct_state)
        self.coupling.end()

    def pullback_functions(self) -> None:
        loop, n = self.loop, self.loop.n_coefs + self.loop.n_state
        arguments, uniform = [*self.step_arguments(self.state), *self.ct_state], [*self.uniform_step]
        self.zeros = self.function("advance_back", self.pullbacks.advance, arguments, uniform + [False] * loop.n_state)
        if self.n_observables:
            cotangents = self.names("s", self.n_observables)
            self.zeros_of_record = self.function(
                "observe_back", self.pullbacks.observe, [*arguments[:n], *cotangents],
                uniform[:n] + [False] * self.n_observables,
            )  # fmt: skip

    def reverse_groups(
        self, groups: Sequence[SegmentGroup], start: str, record: str, saved: Sequence[str], depth: int,
        parity: int | None,
    ) -> None:  # fmt: skip
        """Walk segments back, of which the first begins at step ``start`` of this parity, and with this record."""
        slot, records = segments_in(groups), sum(group.segments * group.records for group in groups)
        for group in reversed(groups):
            slot -= group.segments
            records -= group.segments * group.records
            with self.repeat(group.segments, backwards=True) as i:
                self.load(self.state, saved, f"{self.number(slot)} + {i}")
                first, k = f"first{depth}", f"k{depth}"
                self.line(f"{first} = {start} + {self.number(group.start)} + {i} * {self.number(group.length)}")
                self.line(f"{k} = {record} + {self.number(records)} + {i} * {self.number(group.records)}")
                known = parity_in(parity, group)
                if group.parts or group.length > self.most:
                    self.reverse_long(group, first, k, depth, known)
                else:
                    self.reverse_short(group, first, k, known)

    def reverse_long(self, group: SegmentGroup, first: str, k: str, depth: int, parity: int | None) -> None:
        """Run a segment to keep states within it, and walk its parts back."""
        levels, parts = self.levels[depth], nested_segments(group, self.most)
        # Threads may read what others wrote.
        self.line("tl.debug_barrier()")
        if self.counted:
            self.line(f"n = {first}")
        self.line("slot = 0")
        self.run(parts, levels, None, parity)
        self.line("tl.debug_barrier()")
        if group.parts and group.recorded:
            self.reverse_record(k, self.state)
        self.reverse_groups(parts, first, k, levels, depth + 1, parity)

    def reverse_short(self, group: SegmentGroup, first: str, k: str, parity: int | None) -> None:
        """Write a segment out, each of its steps and then the pullback of each."""
        m = self.loop.n_state
        states = [self.state, *(self.names("x", m, f"_{j}") for j in range(1, group.length + 1))]
        draw = self.normals(first, parity)
        for j in range(group.length):
            self.step(f"({first} + {j})", states[j], states[j + 1], functools.partial(draw, j), f"_{j}")
        for j in reversed(range(group.length)):
            if group.recorded and (j + 1) % group.stride == 0:
                self.reverse_record(f"({k} + {j // group.stride})", states[j + 1])
            self.reverse_step(f"({first} + {j})", states[j], f"_{j}")

    def reverse_step(self, step: str, state: Sequence[str], mark: str) -> None:
        """The pullback of a step taken from ``state``."""
        terms, cotangents = self.names("h", len(self.ct_coefs)), self.names("w", len(self.wanted_in_lanes))
        arguments = [*self.step_arguments(state, mark), *self.ct_state, "zero"]
        self.assign([*terms, *self.ct_state, *cotangents], f"advance_back({', '.join(arguments)})")
        self.add(self.ct_coefs, terms, self.zeros)
        if any(self.wanted_in_lanes):
            self.place(step)
        for array, name, in_lanes in zip(self.out_inputs, cotangents, self.wanted_in_lanes):
            if in_lanes:
                self.line(f"tl.store({array} + place, {name}, mask=inside)")
            else:
                self.line(f"tl.store({array} + {step} * blocks + block, total(tl.where(inside, {name}, 0.0)))")
        self.coupling.reverse(state, cotangents, step)

    def reverse_record(self, k: str, state: Sequence[str]) -> None:
        """The pullback of record ``k``, taken of ``state``."""
        if not self.ct_records:
            return
        cotangents = self.names("s", len(self.ct_records))
        self.load(cotangents, self.ct_records, k)
        self.add_call("observe_back", [*self.coefs, *state, *cotangents], self.zeros_of_record)

    def add_call(self, function: str, arguments: Sequence[str], zeros: Sequence[bool]) -> None:
        """Add what a pullback returns to the cotangents of coefficients and state."""
        both = [*self.ct_coefs, *self.ct_state]
        terms = self.names("h", len(both))
        self.assign(terms, f"{function}({', '.join([*arguments, 'zero'])})")
        self.add(both, terms, zeros)

    def add(self, names: Sequence[str], values: Sequence[str], zeros: Sequence[bool]) -> None:
        for name, value, zero in zip(names, values, zeros):
            if not zero:
                self.line(f"{name} += {value}")
