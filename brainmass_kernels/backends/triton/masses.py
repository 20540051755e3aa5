"""What a kernel has of how its lanes are coupled, where they are not: only which lanes a program has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class Uncoupled:
    """The coupling of lanes that are not coupled; those of `networks` write lines where this one writes none."""

    def __init__(self, kernel):
        self.kernel = kernel

    def take(self) -> None:
        """Arguments after those that a step needs."""

    def give(self) -> None:
        """Results after all others."""

    # Lines -----------------------------------------------------------------------------------------------------------

    def place(self) -> None:
        """Which lanes the program has."""
        self.kernel.line("lane = block * BLOCK + tl.arange(0, BLOCK)", "inside = lane < tl.load(plan)")

    def begin(self) -> None:
        """Before the first step."""

    def arrive(self, state: Sequence[str]) -> None:
        """Before a step, whose last input is what arrives."""

    def reverse(self, state: Sequence[str], cotangents: Sequence[str], step: str) -> None:
        """After the pullback of a step taken from ``state``, which made the cotangents of its inputs."""

    def end(self) -> None:
        """After the last step."""

    # What a call returns ---------------------------------------------------------------------------------------------

    def saved(self, results: Mapping[str, Any]) -> tuple[tuple, Any]:
        """What the adjoint needs besides states: inputs of the steps, and the history."""
        return (), None

    def history(self, results: Mapping[str, Any]) -> Any:
        """The last history, or the cotangent of the first."""
        return ()

    def weights(self, results: Mapping[str, Any]) -> Any:
        """The cotangents of the weights."""
        return ()
