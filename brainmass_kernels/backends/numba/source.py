"""What is done for one block of lanes, as source that `language` compiles.

A run of one lane has numbers in place of rows, and no loop over lanes: LLVM keeps its state in registers.

In the source ``S`` is the scratch of a thread, a row a value: ``x`` the state, ``z`` normals of this step and ``later``
those of the next, ``c`` and ``u`` what differs between lanes of coefficients and inputs, ``ct_`` cotangents. ``K`` is
the tape, what is kept of a step until its pullback, and ``I`` the words that normals are drawn from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import jax
import numpy as np

from ... import noise
from ...codegen.source import SourceBuilder
from ...codegen.writer import OpTable, Writer
from ...pointwise import Program, specialized
from ..base import Carry, Cotangents, Loop, Operands, Pullbacks, SplitPullbacks, Wanted
from .lanes import Group, LaneLoop
from .layout import PLAN, STAGED, TOGETHER, Layout, Rows, operations
from .masses import Uncoupled
from .optable import NUMBA, NUMBA_FAST, of_uniform

# Stand in lines for where the rows end in the scratch, and the words behind them, until all rows are known.
_ROWS_END, WORDS_END = "<end of rows>", "<end of words>"


class BlockKernel(SourceBuilder):
    """What all kernels are made of: arguments, rows, and loops over the lanes of a block."""

    kind: str
    segment = 0
    coupling: Uncoupled

    def __init__(self, optable: OpTable, layout: Layout):
        super().__init__(optable)
        self.layout = layout
        self.rows, self.tape, self.words = (Rows(array, layout.block) for array in "SKI")

    @property
    def plan(self) -> dict[str, int]:
        """Numbers that a call passes to the kernel."""
        return {"lanes": self.layout.lanes, "blocks": self.layout.blocks}

    @property
    def operations(self) -> int:
        """About how many operations a call is."""
        raise NotImplementedError

    @property
    def row_bytes(self) -> int:
        return self.layout.block * self.layout.itemsize

    @property
    def words_end(self) -> int:
        """Bytes of the rows, and in a run of the words of normals."""
        return len(self.rows) * self.row_bytes

    @property
    def scratch_bytes(self) -> int:
        """Of a thread."""
        return self.words_end

    @property
    def common_bytes(self) -> int:
        """Of all threads, where they share a network."""
        return 0

    def begin(self) -> None:
        """The block's place, and its rows."""
        self.line(f"block = {self.layout.block}")
        if self.layout.alone:
            # So they are variables, wherever they are assigned.
            self.line(*(f"{name} = {self.layout.dtype}(0.0)" for name in self.rows.names))
        if not self.layout.parts:
            self.at_block()

    def at_block(self) -> None:
        layout = self.layout
        self.line(
            f"lane = {layout.span} * number",
            f"valid = min({layout.span}, lanes - lane)",
            f"place = {layout.itemsize} * lane",
            f"S = {layout.dtype}_at(work)",
        )

    @contextmanager
    def each_block(self) -> Iterator[None]:
        """Lines of the block, or, where threads share a network, of each part of it that this thread has."""
        if not self.layout.parts:
            yield
            return
        with self.block("for number in range(me, parts, threads):"):
            self.line("work = parts_at + number * scratch")
            self.at_block()
            yield

    def read(self, names: Sequence[str], arguments: Sequence[str], uniform: Sequence[bool]) -> None:
        """Read arguments that do not change, in scalars or rows."""
        for name, argument, one in zip(names, arguments, uniform, strict=True):
            if one:
                self.line(f"{name} = {self.cell(self.address(argument))}")
            else:
                with self.each_block():
                    self.spread([name], [self.address(argument)])

    @property
    def text(self) -> str:
        rows_end = len(self.rows) * self.row_bytes
        return super().text.replace(_ROWS_END, str(rows_end)).replace(WORDS_END, str(self.words_end))

    # Places ----------------------------------------------------------------------------------------------------------

    def address(self, name: str) -> str:
        """Of an argument or a result."""
        kind, names = ("argument", self.arguments) if name in self.arguments else ("result", self.results)
        return f"{kind}(frame, {list(names).index(name)})"

    def addresses(self, names: Sequence[str]) -> None:
        self.line(*(f"{name} = {self.address(name)}" for name in names))

    def row(self, name: str) -> str:
        """The address of a row."""
        return f"work + {self.layout.itemsize * self.rows.offset(name)}"

    def at(self, name: str) -> str:
        """Lane ``i`` of a row, of any array; the number of a lane that is alone."""
        if self.layout.alone and name in self.rows.names:
            return name
        return next(rows.at(name) for rows in (self.rows, self.tape, self.words) if name in rows.names)

    def place(self, name: str, row: str) -> None:
        """The block's place in a buffer of rows of lanes, in bytes."""
        self.line(f"{name} = {self.layout.itemsize} * ({row} * lanes + lane)")

    def cell(self, address: str) -> str:
        """The number at an address."""
        return f"{self.layout.dtype}_at({address})[0]"

    def call(self, function: str, *arguments: str | int) -> None:
        """Call a function of the runtime that there is for each dtype."""
        self.line(f"{function}_{self.layout.dtype}({', '.join(map(str, arguments))})")

    def spread(self, names: Sequence[str], buffers: Sequence[str], place: str = "place") -> None:
        """Read rows from buffers, at the block's place in bytes."""
        for name, buffer in zip(names, buffers, strict=True):
            if self.layout.alone:
                self.line(f"{name} = {self.cell(f'{buffer} + {place}')}")
                continue
            self.call("spread", self.row(name), f"{buffer} + {place}", "valid", "block")

    def gather(self, names: Sequence[str], buffers: Sequence[str], place: str = "place") -> None:
        """Write rows to buffers."""
        for name, buffer in zip(names, buffers, strict=True):
            if self.layout.alone:
                self.line(f"{self.cell(f'{buffer} + {place}')} = {name}")
                continue
            self.call("gather", f"{buffer} + {place}", self.row(name), "valid")

    # Loops over lanes ------------------------------------------------------------------------------------------------

    @contextmanager
    def lanes(self, staged: bool = True, of: Group | None = None) -> Iterator[LaneLoop]:
        """Compute values for all lanes of the block, or of a group, and store each in a row."""
        count = of.end - of.first if of and not self.layout.parts else self.layout.block
        loop = LaneLoop(self, staged and count >= STAGED, of)
        yield loop
        loop.finish()

    @contextmanager
    def each_lane(self, head: str) -> Iterator[None]:
        """Lines of each lane of a block, in a loop unless it is alone."""
        if self.layout.alone:
            yield
            return
        with self.block(head):
            yield

    def slow_row(self, number: int) -> str:
        """The row of an argument of a slow function, and then of its value."""
        name = f"slow{number}"
        if name not in self.rows.names:
            self.rows.add(name)
        return name


class Kernel(BlockKernel):
    """A run: its operands, the steps of a block of lanes, and their records."""

    def __init__(self, loop: Loop, layout: Layout, operands: Operands):
        super().__init__(NUMBA_FAST if loop.precision == "fast" else NUMBA, layout)
        self.loop, self.operands = loop, operands
        self.coefs, self.inputs = self.names("c", loop.n_coefs), self.names("u", loop.n_inputs)
        self.advance = self.by_group(loop.advance)
        self.state = self.rows.add(*self.names("x", loop.n_state))
        self.normals = self.rows.add(*self.names("z", loop.n_normals))
        self.later = self.rows.add(*self.names("later", loop.n_normals))
        self.words.add("key0", "key1")
        self.random = self.words.add(*self.names("word", 2 * loop.n_normals))
        self.uniform_coefs = [c.ndim == 0 for c in operands.coefs]
        self.uniform_inputs = [x.ndim == 1 for x in operands.inputs]
        for name, uniform in zip((*self.coefs, *self.inputs), (*self.uniform_coefs, *self.uniform_inputs)):
            if not uniform:
                self.rows.add(name)

    def by_group(self, program: Program) -> list[tuple[Group | None, Program]]:
        """A program of the coefficients and more, as the lanes of each group of models run it, or all lanes."""
        members = self.loop.coupling.members if self.loop.coupling else None
        if members is None:
            return [(None, program)]
        name, dtype = self.coefs[members.coef], np.dtype(f"float{8 * self.layout.itemsize}")
        every = []
        for k, (first, end) in enumerate(members.spans):
            span = first // TOGETHER * TOGETHER, -(-end // TOGETHER) * TOGETHER
            if not self.layout.parts:
                span = span[0], min(span[1], self.layout.block)
            inside = f"{name} == {Writer(self.optable).literal(k, dtype)}"
            every.append((Group(inside, *span), specialized(program, members.coef, k)))
        return every

    @property
    def plan(self) -> dict[str, int]:
        of = self.loop.schedule
        times = {"steps": of.steps, "lead": of.lead, "every": of.every, "count": of.count, "segment": self.segment}
        return super().plan | times | dict(self.coupling.plan)

    @property
    def operations(self) -> int:
        lanes = self.layout.lanes // (self.loop.coupling.regions if self.loop.coupling else 1)
        return lanes * self.loop.schedule.steps * operations(self.loop)

    def take_operands(self, stem: str, states: Sequence[jax.Array]) -> None:
        """What both kernels take; ``states`` are before the first step, or before each segment."""
        self.coef_arguments = self.take("coef", self.operands.coefs)
        self.state_arguments = self.take(stem, states)
        self.input_arguments = self.take("input", self.operands.inputs)
        if self.loop.n_normals:
            self.take_one("seeds", self.operands.seeds)

    @property
    def wide(self) -> bool:
        """Whether steps are numbered in two words."""
        return self.operands.seeds is not None and noise.is_wide(self.operands.seeds)

    @property
    def step_arguments(self) -> list[str]:
        return [*self.coefs, *self.state, *self.inputs, *self.normals]

    @property
    def words_end(self) -> int:
        return super().words_end + (len(self.words) * self.row_bytes if self.loop.n_normals else 0)

    @property
    def scratch_bytes(self) -> int:
        """Of a thread: rows, words, the tape of a segment, and what the coupling has."""
        return self.words_end + self.segment * self.step_bytes + self.coupling.scratch_bytes

    @property
    def step_bytes(self) -> int:
        """Of the tape of a step."""
        return len(self.tape) * self.row_bytes

    @property
    def common_bytes(self) -> int:
        return self.coupling.common_bytes

    # Lines of both directions ----------------------------------------------------------------------------------------

    def head(self) -> None:
        """The block's place, its rows and its coefficients."""
        self.line(f"{', '.join(PLAN[:6])} = {', '.join(f'plan[{k}]' for k in range(6))}")
        self.begin()
        self.read(self.coefs, self.coef_arguments, self.uniform_coefs)

    def read_seeds(self) -> None:
        """The two words of each lane, behind the rows."""
        if not self.loop.n_normals:
            return
        row, seeds = f"work + {_ROWS_END}", self.address("seeds")
        assert self.operands.seeds is not None
        # All lanes have come equally far.
        origin = f"i32_at({seeds} + 8 * lanes)[0]" if len(self.operands.seeds) > 2 else "i32(0)"
        if self.wide:
            high = f"i64(i32_at({seeds} + 12 * lanes)[0])"
            origin = f"i64(u32({origin})) + ({high} << 32)"
        self.line(f"origin = {origin}")
        with self.each_block():
            self.line(
                f"spread_i32({row}, {seeds} + 4 * lane, valid, block)",
                f"spread_i32({row} + 4 * block, {seeds} + 4 * (lanes + lane), valid, block)",
            )

    def at_block(self) -> None:
        super().at_block()
        if self.loop.n_normals:
            self.line(f"I = i32_at(work + {_ROWS_END})")

    def read_shared_inputs(self) -> None:
        """Of the inputs of step ``n`` those that are the same for all lanes, in scalars."""
        for name, argument, uniform in zip(self.inputs, self.input_arguments, self.uniform_inputs):
            if uniform:
                self.line(f"{name} = {self.cell(f'{argument} + {self.layout.itemsize} * n')}")

    def read_inputs(self) -> None:
        """The others, in rows."""
        if not all(self.uniform_inputs):
            self.place("place_u", "n")
        for name, argument, uniform in zip(self.inputs, self.input_arguments, self.uniform_inputs):
            if not uniform:
                self.spread([name], [argument], "place_u")

    def draw(self, first: str) -> None:
        """The normals of step ``n``, drawn for two steps at a time; ``first`` says whether none was drawn before."""
        count = self.loop.n_normals
        if not count:
            return
        counted = ["key0", "key1", "half", *["high"] * self.wide]

        def words(k0, k1, half, high=None):
            return sum(noise.random_words((k0, k1), half, count, high), ())

        def normals(*words):
            return sum((noise.box_muller(*both) for both in zip(words[::2], words[1::2])), ())

        word = jax.ShapeDtypeStruct((), "int32")
        to_words = Program(words, [word] * len(counted), "random words")
        to_normals = Program(normals, [word] * len(self.random), "white noise")
        self.line("counter = i32(n + origin)")
        with self.block(f"if {first} or counter & i32(1) == i32(0):"):
            self.line("half = i32(counter >> i32(1))")
            if self.wide:
                self.line("high = i32((n + origin) >> 32)")
            first_of_normals = self.loop.n_coefs + self.loop.n_state + self.loop.n_inputs
            for group, advance in self.advance:
                used = [u or group is None for u in advance.uses()[first_of_normals:]]
                drawn = [name for k, name in enumerate(self.random) if used[k // 2]]
                # Two loops: integers alone, whose instructions wait for each other, and then floats.
                with self.lanes(of=group) as lanes:
                    named = dict(zip(self.random, lanes.writer.write(to_words, counted), strict=True))
                    lanes.store_everywhere(drawn, [named[name] for name in drawn])
                # In a float64 run the rows do not hold float32.
                with self.lanes(self.layout.dtype == "f32", group) as lanes:
                    lanes.writer = Writer(of_uniform(self.optable))
                    values = lanes.values(to_normals, self.random)
                    names = [x for both in zip(self.normals, self.later) for x in both]
                    chosen = [k for k in range(len(names)) if used[k // 2]]
                    lanes.store_everywhere([names[k] for k in chosen], [values[k] for k in chosen])
        with self.block("if counter & i32(1) == i32(1):"), self.each_lane(f"for i in range({self.layout.block}):"):
            self.line(*(f"{self.at(z)} = {self.at(later)}" for z, later in zip(self.normals, self.later)))

    def next_record(self) -> None:
        self.line("records += 1", "due = due + every if records < count else 0")


class ForwardKernel(Kernel):
    """A forward run.

    Arguments: coefficients, state, inputs, seeds. Results: records, final state, saved states.
    """

    kind = "forward"

    def __init__(
        self, coupling: type[Uncoupled], loop: Loop, operands: Operands, initial: Carry, checkpoint_every: int | None
    ):
        state, count = initial.state, loop.schedule.count
        super().__init__(loop, Layout.of(loop, state[0].shape[0], state[0].dtype), operands)
        self.initial, self.segment = initial, checkpoint_every or 0
        self.observables = self.rows.add(*self.names("obs", loop.n_observables))
        self.take_operands("initial", state)
        lanes, segments = self.layout.lanes, -(-loop.schedule.steps // self.segment) if self.segment else 0
        self.records = self.give("record", [(count, lanes)] * loop.n_observables)
        self.final = self.give("final", [(lanes,)] * loop.n_state)
        self.saved = self.give("saved", [(segments, lanes)] * loop.n_state)
        self.coupling = coupling(self)
        self.write()

    def write(self) -> None:
        self.head()
        with self.each_block():
            self.spread(self.state, [self.address(name) for name in self.state_arguments])
        self.read_seeds()
        for names in (self.input_arguments, self.records, self.saved):
            self.addresses(names)
        self.line("records = 0", "due = lead + every if count > 0 else 0")
        self.line("segment_number = 0", "due_save = 0 if segment > 0 else -1")
        self.coupling.begin()
        with self.block("for n in range(steps):"):
            with self.block("if n == due_save:"):
                self.save()
            self.step()
            with self.block("if n + 1 == due:"):
                self.record()
            self.coupling.leave()
        self.coupling.end()
        with self.each_block():
            self.gather(self.state, [self.address(name) for name in self.final])

    def save(self) -> None:
        with self.each_block():
            self.place("place_s", "segment_number")
            self.gather(self.state, self.saved, "place_s")
        self.line("segment_number += 1", "due_save += segment")

    def step(self) -> None:
        self.read_shared_inputs()
        self.coupling.depart()
        with self.each_block():
            self.read_inputs()
            self.draw("n == 0")
            self.coupling.send()
        self.coupling.meet()
        with self.each_block():
            self.coupling.arrive()
            for group, advance in self.advance:
                with self.lanes(of=group) as lanes:
                    lanes.store(self.state, lanes.values(advance, self.step_arguments))

    def record(self) -> None:
        with self.each_block():
            with self.lanes() as lanes:
                lanes.store(self.observables, lanes.values(self.loop.observe, [*self.coefs, *self.state]))
            self.place("place_r", "records")
            self.gather(self.observables, self.records, "place_r")
        self.next_record()


class AdjointKernel(Kernel):
    """An adjoint run: each segment is run again, keeping what its pullbacks need, and walked back.

    Arguments: coefficients, saved states, inputs, seeds, cotangents of records and of the final state.
    Results: cotangents of the wanted coefficients, of the initial state, and of the wanted inputs.
    """

    kind = "adjoint"

    def __init__(
        self, coupling: type[Uncoupled], loop: Loop, pullbacks: Pullbacks, wanted: Wanted, operands: Operands, saved,
        cotangents: Cotangents, checkpoint_every: int,
    ):  # fmt: skip
        (first, *_), n_arriving = cotangents.final.state, loop.n_inputs - len(operands.inputs)
        # The cotangent of an input that all lanes share is summed over a block, and so in another order over parts.
        uniform = any(w and x.ndim == 1 for w, x in zip(wanted.inputs, operands.inputs))
        layout = Layout.of(loop, first.shape[0], first.dtype, checkpoint_every, sharable=not uniform)
        super().__init__(loop, layout, operands)
        self.wanted, self.cotangents, self.segment = wanted, cotangents, checkpoint_every
        # What arrives from other lanes is kept like the state; the other inputs are read again.
        self.pullbacks = SplitPullbacks.of(loop, pullbacks, kept_inputs=n_arriving)
        self.of_groups = [
            self.pullbacks.advance if group is None else SplitPullbacks.of_step(loop, program, n_arriving)
            for group, program in self.by_group(pullbacks.advance)
        ]
        # A lane is of one group: the groups share the tape.
        self.of_step = self.tape.add(*self.names("k", max(pullback.n_kept for pullback in self.of_groups)))
        self.of_record = self.tape.add(*self.names("v", self.pullbacks.observe.n_kept))
        self.ct_coefs = self.rows.add(*self.names("ct_c", sum(wanted.coefs)))
        self.ct_state = self.rows.add(*self.names("ct_x", loop.n_state))
        self.ct_observables = self.rows.add(*self.names("ct_obs", loop.n_observables))
        self.ct_inputs = self.rows.add(*self.names("ct_u", sum(wanted.inputs)))
        self.take_operands("saved", saved[0])
        self.ct_records = self.take("ct_record", cotangents.records)
        self.ct_final = self.take("ct_final", cotangents.final.state)
        self.give_cotangents()
        self.saved_by_coupling = saved[1]
        self.coupling = coupling(self)
        self.ct_arrived = self.rows.add(*self.names("ct_arrived", n_arriving))
        self.write()

    def give_cotangents(self) -> None:
        lanes, steps = self.layout.lanes, self.loop.schedule.steps
        self.wanted_uniform = [uniform for uniform, w in zip(self.uniform_inputs, self.wanted.inputs) if w]
        self.out_coefs = self.give("coefs", [(lanes,)] * len(self.ct_coefs))
        self.out_state = self.give("state", [(lanes,)] * self.loop.n_state)
        shapes = [(steps, self.layout.groups if uniform else lanes) for uniform in self.wanted_uniform]
        self.out_inputs = self.give("ct_input", shapes)

    def write(self) -> None:
        layout = self.layout
        self.head()
        if layout.span == layout.block:
            self.line(f"groups = (lanes + {layout.group - 1}) // {layout.group}")
        else:
            self.line(f"groups = plan[{PLAN.index('blocks')}]")
        with self.each_block():
            for name in self.ct_coefs if not layout.alone else ():
                self.call("clear", self.row(name), "block")
            self.spread(self.ct_state, [self.address(name) for name in self.ct_final])
        self.read_seeds()
        for names in (self.state_arguments, self.input_arguments, self.ct_records, self.out_inputs):
            self.addresses(names)
        self.coupling.begin()
        with self.block("for segment_number in range((steps + segment - 1) // segment - 1, -1, -1):"):
            self.line("start = segment_number * segment", "length = min(segment, steps - start)")
            self.line("records, due = 0, 0")
            with self.each_block():
                self.begin_segment()
                with self.block("for j in range(length):"):
                    self.replay_step()
            self.line("records -= 1", "due = lead + (records + 1) * every")
            with self.block("for j in range(length - 1, -1, -1):"):
                self.reverse_step()
        self.coupling.end()
        cotangents, results = [*self.ct_coefs, *self.ct_state], [*self.out_coefs, *self.out_state]
        with self.each_block():
            self.gather(cotangents, [self.address(name) for name in results])

    def begin_segment(self) -> None:
        self.place("place_s", "segment_number")
        self.spread(self.state, self.state_arguments, "place_s")
        self.line("records = max(0, start - lead) // every")
        self.line("due = lead + (records + 1) * every if records < count else 0")

    def begin_step(self) -> None:
        """Step ``n`` is the ``j``-th of its segment; ``K`` is its place on the tape."""
        tape = f"work + {WORDS_END} + {self.step_bytes} * j"
        self.line("n = start + j", f"K = {self.layout.dtype}_at({tape})")

    def replay_step(self) -> None:
        self.begin_step()
        self.read_shared_inputs()
        self.read_inputs()
        self.draw("j == 0")
        self.coupling.replay()
        for (group, advance), pullback in zip(self.advance, self.of_groups, strict=True):
            with self.lanes(of=group) as lanes:
                kept = self.of_step[: pullback.n_kept]
                lanes.store(kept, lanes.values(pullback.keep, self.step_arguments))
                lanes.store(self.state, lanes.values(advance, self.step_arguments))
        with self.block("if n + 1 == due:"):
            with self.lanes() as lanes:
                lanes.store(self.of_record, lanes.values(self.pullbacks.observe.keep, [*self.coefs, *self.state]))
            self.next_record()

    def reverse_step(self) -> None:
        with self.block("if records >= 0 and start + j + 1 == due:"):
            with self.each_block():
                self.begin_step()
                self.reverse_record()
            self.line("records -= 1", "due -= every")
        with self.each_block():
            self.begin_step()
            self.read_shared_inputs()
            self.read_inputs()
            for (group, _), pullback in zip(self.advance, self.of_groups, strict=True):
                with self.lanes(of=group) as lanes:
                    kept = self.of_step[: pullback.n_kept]
                    known = [*self.coefs, *self.inputs[: len(self.uniform_inputs)], *kept, *self.ct_state]
                    cotangents, n = lanes.values(pullback.back, known), len(self.ct_coefs)
                    lanes.add(self.ct_coefs, cotangents[:n])
                    lanes.store([*self.ct_state, *self.ct_inputs, *self.ct_arrived], cotangents[n:])
            self.coupling.send_back()
        self.coupling.meet()
        with self.each_block():
            if self.layout.parts:
                self.begin_step()
            self.coupling.reverse()
            self.write_inputs()
        self.coupling.leave_back()

    def reverse_record(self) -> None:
        self.place("place_r", "records")
        self.spread(self.ct_observables, self.ct_records, "place_r")
        with self.lanes() as lanes:
            known = [*self.coefs, *self.of_record, *self.ct_observables]
            lanes.add([*self.ct_coefs, *self.ct_state], lanes.values(self.pullbacks.observe.back, known))

    def write_inputs(self) -> None:
        """The cotangents of the inputs of step ``n``; of a uniform one the sums of equally many lanes."""
        layout = self.layout
        if layout.alone or not all(self.wanted_uniform):
            self.place("place_c", "n")
        for name, result, uniform in zip(self.ct_inputs, self.out_inputs, self.wanted_uniform):
            if uniform and not layout.alone:
                target = f"{result} + {layout.itemsize} * (n * groups + {layout.block // layout.group} * number)"
                self.call("totals", target, self.row(name), "valid", layout.group)
            else:
                self.gather([name], [result], "place_c")
