"""How far chains are: a bar, a line in a notebook, or a function of the user's."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from .. import display
from ..extras import needs
from ..fitting.steps import shown

_WIDE = 110


class SampleProgress(NamedTuple):
    """The argument of a ``progress`` callback of `sample` after each chunk; it may return True to stop there.

    Attributes
    ----------
    step, steps : iterations so far and in all, those of the warm-up included; of ``"smc"`` stages, and ``steps`` is 0,
        as their number is not known before
    warmup : how many of these are the warm-up
    acceptance : mean over the chunk; NaN where a method accepts all
    divergences : of draws so far
    gradients : computed by all chains in this call
    seconds : of this call's iterations, the compilation of their program included
    temperature : of ``"smc"``, the lowest power of the likelihood that a chain is at; else 1
    """

    step: int
    steps: int
    warmup: int
    acceptance: float
    divergences: int
    gradients: int
    seconds: float
    temperature: float = 1.0

    @property
    def rate(self) -> float:
        """Gradients a second, of all chains."""
        return self.gradients / max(self.seconds, 1e-9)

    @property
    def left(self) -> float:
        """Seconds, at the rate so far; NaN if the number of steps is not known."""
        return (self.steps - self.step) * self.seconds / max(self.step, 1) if self.steps else math.nan

    @property
    def phase(self) -> str:
        return "warm-up" if self.step < self.warmup else "tempering" if not self.steps else "sampling"

    def __str__(self) -> str:
        said = [] if math.isnan(self.acceptance) else [f"acceptance {self.acceptance:.2f}"]
        said += [] if self.steps else [f"temperature {self.temperature:.2g}"]
        return ", ".join([*said, f"{self.divergences} divergences", f"{self.rate:,.3g} gradients/s"])


def progress_bar(
    progress: Any, steps: int
) -> contextlib.AbstractContextManager[Callable[[SampleProgress], Any] | None]:
    """A function that shows one `SampleProgress` and returns whether to stop; ``None`` without ``progress``."""
    return shown(progress, lambda: _bar(steps))


@contextlib.contextmanager
def _bar(steps: int) -> Iterator[Callable[[SampleProgress], Any]]:
    needs("rich", "bayes")
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if console.is_jupyter:
        yield _notebook_line(steps)
        return
    columns: list[Any] = [TextColumn("{task.description}"), MofNCompleteColumn(), TextColumn("{task.fields[said]}")]
    if console.width >= _WIDE:
        columns.insert(1, BarColumn(24))
        columns.append(TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("compiling", total=steps or None, said="")

        def show(report: SampleProgress) -> bool:
            bar.update(task, description=report.phase, completed=report.step, said=str(report))
            return False

        yield show


def _notebook_line(steps: int):
    line = display.NotebookLine(steps or 1)
    line(0, "sampling: the program is compiled first")

    def show(report: SampleProgress) -> bool:
        left = "" if math.isnan(report.left) else f", about {report.left:.0f} s left"
        line(report.step, f"{report.phase}: {report.step} of {report.steps or '?'}, {report}{left}")
        return False

    return show
