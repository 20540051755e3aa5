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
    """

    plan: Mapping[str, int] = {}
    scratch_bytes = 0

    def __init__(self, kernel):
        self.kernel = kernel

    # Lines -----------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Before the first step."""

    def arrive(self) -> None:
        """Before a step, whose last input is what arrives."""

    def leave(self) -> None:
        """After a step."""

    def replay(self) -> None:
        """Before step ``j`` of a segment is run again."""

    def reverse(self) -> None:
        """After the pullback of a step."""

    def end(self) -> None:
        """After the last step."""

    # What a call returns ---------------------------------------------------------------------------------------------

    def saved(self, results: Mapping[str, Any]) -> Any:
        """What the adjoint needs besides states."""

    def history(self, results: Mapping[str, Any]) -> Any:
        """The last history, or the cotangent of the first."""

    def weights(self, results: Mapping[str, Any]) -> Any:
        """The cotangent of the weights."""
