"""What a kernel has of how its lanes are coupled, where they are not: nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Uncoupled:
    """The coupling of lanes that are not coupled; those of `networks` write lines where this one writes none.

    Made with a kernel whose own arguments, results and rows are all named, to which it adds its own.

    Attributes
    ----------
    plan : numbers that the kernel reads from the plan of its call
    scratch_bytes : of the scratch, behind all rows
    common_bytes : of what threads that share a network have in common
    """

    plan: Mapping[str, int] = {}
    scratch_bytes = 0
    common_bytes = 0

    def __init__(self, kernel):
        self.kernel = kernel

    # Lines -----------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Before the first step."""

    def depart(self) -> None:
        """Before a step."""

    def send(self) -> None:
        """Of a block, before a step."""

    def meet(self) -> None:
        """Between what blocks write for others, and what they read of them."""

    def arrive(self) -> None:
        """Of a block, before a step, whose last input is what arrives."""

    def leave(self) -> None:
        """After a step."""

    def replay(self) -> None:
        """Of a block, before step ``j`` of a segment is run again."""

    def send_back(self) -> None:
        """Of a block, after the pullback of a step."""

    def reverse(self) -> None:
        """The same, when all have sent."""

    def leave_back(self) -> None:
        """After a step back."""

    def end(self) -> None:
        """After the last step."""

    # What a call returns ---------------------------------------------------------------------------------------------

    def saved(self, results: Mapping[str, Any]) -> Any:
        """What the adjoint needs besides states."""

    def history(self, results: Mapping[str, Any]) -> Any:
        """The last history, or the cotangent of the first."""
        return ()

    def weights(self, results: Mapping[str, Any]) -> Any:
        """The cotangents of the weights."""
        return ()
