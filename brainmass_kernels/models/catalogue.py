"""The models of the library, as a table."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import NamedTuple

from .base import Model

_WIDEST = 32


class Entry(NamedTuple):
    """One model of the library.

    Attributes
    ----------
    model : its class; ``name`` is the name of that
    states, inputs, observables : their names
    scheme : the default of `simulate`
    paper : authors and year of its first reference
    """

    name: str
    model: type[Model]
    states: tuple[str, ...]
    inputs: tuple[str, ...]
    observables: tuple[str, ...]
    scheme: str
    paper: str


class Catalogue(tuple[Entry, ...]):
    """Entries by name; ``str()`` is a table."""

    def __str__(self) -> str:
        rows = [("model", "states", "inputs", "observables", "scheme", "paper")]
        rows += [
            (e.name, " ".join(e.states), " ".join(e.inputs), " ".join(e.observables), e.scheme, e.paper) for e in self
        ]
        cells = [[textwrap.wrap(text, _WIDEST) or [""] for text in row] for row in rows]
        widths = [max(len(line) for cell in column for line in cell) for column in zip(*cells)]
        return "\n".join(line for row in cells for line in _lines(row, widths))

    __repr__ = __str__


def _lines(cells: list[list[str]], widths: list[int]) -> Iterator[str]:
    for n in range(max(map(len, cells))):
        texts = (cell[n] if n < len(cell) else "" for cell in cells)
        yield "  ".join(f"{text:<{width}}" for text, width in zip(texts, widths)).rstrip()


def list_models() -> Catalogue:
    """The models of the library, by name; print it for a table of states, inputs, observables, schemes and papers."""
    models = sorted(set(_library(Model)), key=lambda cls: cls.__name__.lower())
    return Catalogue(
        Entry(cls.__name__, cls, tuple(cls.states), tuple(cls.inputs), tuple(cls.observables), cls.scheme, _paper(cls))
        for cls in models
    )


def _library(cls: type[Model]) -> Iterator[type[Model]]:
    """The models among the subclasses in this folder, without classes that only hold what several of them share."""
    for sub in cls.__subclasses__():
        is_model = "__dataclass_fields__" in vars(sub) and not sub.__name__.startswith("_")
        if is_model and sub.__module__.startswith(f"{__package__}."):
            yield sub
        yield from _library(sub)


def _paper(cls: type[Model]) -> str:
    """Authors and year of the first reference."""
    _, _, references = (inspect.getdoc(cls) or "").partition("References\n----------\n")
    reference = re.match(r"(.+?) (\d{4})\b", references.replace("\n", " "))
    if reference is None:
        return ""
    authors = re.split(", | and ", reference[1])
    return f"{' and '.join(authors) if len(authors) < 3 else f'{authors[0]} et al.'} {reference[2]}"
