"""Loops over the lanes of a block: of all of them, or of those whose equations are one model's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ...codegen.writer import Writer, words
from ...pointwise import Program
from .intrinsics import WIDTHS
from .layout import wide_vectors
from .optable import TYPES, has_simd

if TYPE_CHECKING:
    from .source import BlockKernel


class Group(NamedTuple):
    """The lanes of a network whose equations are those of one model, within whole vectors.

    Attributes
    ----------
    inside : what is true in a lane of the group, as source; ``""`` where all lanes are one
    first, end : regions of the network, from the first to before the end
    """

    inside: str
    first: int
    end: int


class LaneLoop:
    """A loop over the lanes of a block: what is stored of each.

    Slow functions have loops of their own where the loop is ``staged``: what they keep in registers leaves room for
    nothing else, and one that LLVM has no SIMD for does not keep the rest from it.
    """

    def __init__(self, kernel: BlockKernel, staged: bool, group: Group | None = None):
        self.kernel, self.staged, self.group = kernel, staged, group
        self.writer = Writer(kernel.optable)
        self.stores: dict[str, str] = {}

    def values(self, program: Program, arguments: Sequence[str]) -> list[str]:
        """Outputs of a program in the kernel's dtype: one may be a constant of another."""
        dtype, outputs = self.kernel.layout.dtype, self.writer.write(program, arguments)
        return [
            value if TYPES[aval.dtype.name] == dtype else f"{dtype}({value})"
            for value, aval in zip(outputs, program.out_avals)
        ]

    def store(self, names: Sequence[str], values: Sequence[str]) -> None:
        """Store values, in lanes of the loop's group alone."""
        if self.group is not None:
            pairs = [(name, value) for name, value in zip(names, values, strict=True) if name != value]
            inside, select = self.writer.define("inside", self.group.inside), self.writer.optable.select
            names = [name for name, _ in pairs]
            values = [self.writer.define("own", select.format(inside, value, name)) for name, value in pairs]
        self.store_everywhere(names, values)

    def store_everywhere(self, names: Sequence[str], values: Sequence[str]) -> None:
        self.stores |= {self.kernel.at(name): value for name, value in zip(names, values, strict=True)}

    def add(self, names: Sequence[str], values: Sequence[str]) -> None:
        """Add to what rows hold, but for values that are 0 in all lanes."""
        zero = self.writer.literal(0, np.dtype(f"float{8 * self.kernel.layout.itemsize}"))
        sums = [(name, f"{name} + {value}") for name, value in zip(names, values, strict=True) if value != zero]
        self.store([name for name, _ in sums], [total for _, total in sums])

    def finish(self) -> None:
        if not self.stores:
            return
        if self.kernel.layout.alone:
            self._finish_alone()
            return
        rows: dict[str, str] = {}
        stages = self.writer.stages(list(self.stores.values())) if self.staged else []
        if len(stages) == 1 and wide_vectors():
            # Calls that wait for others would make a lane wait for all of them one after the other.
            stages = [{function: calls for function, calls in stages[0].items() if not has_simd(function)}]
        for stage in filter(None, stages):
            rows |= self._stage(stage, rows)
        self._loop(self.stores, rows)

    def _finish_alone(self) -> None:
        """The same of a lane that is alone: calls of one function that wait for the same are one of several numbers."""
        writer, results = self.writer, list(self.stores.values())
        lines: list[str] = []
        known: list[str] = []

        def add(names: Sequence[str]) -> None:
            lines.extend(line for line in writer.lines(names, known) if line not in lines)

        for stage in writer.stages(results):
            for function, calls in stage.items():
                if len(calls) == 1 or not has_simd(function):
                    continue
                for first in range(0, len(calls), WIDTHS[-1]):
                    names, arguments = zip(*calls[first : first + WIDTHS[-1]])
                    add(arguments)
                    width = next(n for n in WIDTHS if n >= len(names))
                    several, joined = f"several_{names[0]}", f"together{width}({', '.join(arguments)})"
                    lines.append(f"{several} = {function.format(joined)}")
                    lines.extend(f"{name} = one_of({several}, {k})" for k, name in enumerate(names))
                    known += names
        add(results)
        kernel, used = self.kernel, words([*lines, *results])
        for rows in (kernel.tape, kernel.words):
            kernel.line(*(f"{name} = {kernel.at(name)}" for name in rows.names if name in used))
        kernel.line(*lines)
        # Numbers are assigned when nothing needs their old values any more.
        rows = kernel.rows.names
        kernel.line(*(f"{place if place not in rows else f'new_{place}'} = {x}" for place, x in self.stores.items()))
        kernel.line(*(f"{place} = new_{place}" for place in self.stores if place in rows))

    def _stage(self, stage: dict[str, list[tuple[str, str]]], rows: dict[str, str]) -> dict[str, str]:
        """Loops for some calls of slow functions; the row in which each call's value is then."""
        kernel = self.kernel
        calls = [call for group in stage.values() for call in group]
        places = {name: kernel.slow_row(len(rows) + j) for j, (name, _) in enumerate(calls)}
        self._loop({kernel.at(places[name]): argument for name, argument in calls}, rows)
        for function, group in stage.items():
            # Rows that follow each other are one for a function.
            place = kernel.at(places[group[0][0]])
            if self.group is None:
                with kernel.block(f"for i in range({kernel.layout.block * len(group)}):"):
                    kernel.line(f"{place} = {function.format(place)}")
                continue
            for name, _ in group:
                place = kernel.at(places[name])
                with kernel.block(self.head):
                    kernel.line(f"{place} = {function.format(place)}")
        return places

    @property
    def head(self) -> str:
        """Of a loop over the lanes."""
        block = self.kernel.layout.block
        if self.group is None:
            return f"for i in range({block}):"
        if self.kernel.layout.parts:
            return f"for i in range(max(0, {self.group.first} - lane), min({block}, {self.group.end} - lane)):"
        return f"for i in range({self.group.first}, {self.group.end}):"

    def _loop(self, stores: dict[str, str], rows: dict[str, str]) -> None:
        """One loop, in which the values that have ``rows`` are known."""
        kernel, lines = self.kernel, self.writer.lines(list(stores.values()), rows)
        used = words([*lines, *stores.values()])
        with kernel.block(self.head):
            for names in (kernel.rows.names, kernel.tape.names, kernel.words.names):
                kernel.line(*(f"{name} = {kernel.at(name)}" for name in names if name in used))
            kernel.line(*(f"{name} = {kernel.at(row)}" for name, row in rows.items() if name in used))
            kernel.line(*lines, *(f"{place} = {value}" for place, value in stores.items()))
