"""A kernel's source under construction, line by line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .writer import OpTable


class SourceBuilder:
    """Lines of source, and what the kernel that they make takes and returns.

    Attributes
    ----------
    arguments : the array of each argument, by name, in order
    results : the shape of each result, by name, in order
    """

    def __init__(self, optable: OpTable, depth: int = 0):
        self.optable = optable
        self.arguments: dict[str, Any] = {}
        self.results: dict[str, tuple[int, ...]] = {}
        self._lines: list[str] = []
        self._depth = depth
        self._groups: dict[str, list[str]] = {}

    def line(self, *lines: str) -> None:
        self._lines += ["    " * self._depth + line for line in lines]

    @contextmanager
    def block(self, head: str) -> Iterator[None]:
        """Lines that belong to a head, such as that of a loop."""
        self.line(head)
        self._depth += 1
        yield
        self._depth -= 1

    @property
    def text(self) -> str:
        return "\n".join(self._lines)

    @staticmethod
    def names(stem: str, count: int, mark: str = "") -> list[str]:
        return [f"{stem}{k}{mark}" for k in range(count)]

    # What a kernel takes and returns ---------------------------------------------------------------------------------

    def take(self, stem: str, arrays: Sequence[Any]) -> list[str]:
        """Take these arrays as the next arguments, and name them."""
        names = self.names(stem, len(arrays))
        self.arguments |= zip(names, arrays)
        return names

    def take_one(self, name: str, array: Any) -> str:
        self.arguments[name] = array
        return name

    def give(self, stem: str, shapes: Sequence[tuple[int, ...]]) -> list[str]:
        """Return arrays of these shapes as the next results, and name them."""
        self._groups[stem] = names = self.names(stem, len(shapes))
        self.results |= zip(names, shapes)
        return names

    def give_one(self, name: str, shape: tuple[int, ...]) -> str:
        self.results[name] = shape
        return name

    def named(self, arrays: Sequence[Any]) -> dict[str, Any]:
        """What a call of the kernel returned, by name; a tuple of arrays by the stem of their names."""
        by_name = dict(zip(self.results, arrays, strict=True))
        return by_name | {stem: tuple(by_name[name] for name in names) for stem, names in self._groups.items()}
