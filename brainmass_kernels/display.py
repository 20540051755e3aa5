"""How a notebook shows results and models: small tables in HTML, and a line that is rewritten while a fit runs."""

from __future__ import annotations

import html
import time
from collections.abc import Iterable, Sequence
from typing import Any

import brainunit as u
import jax
import numpy as np

from . import units
from ._jax import is_traced
from .extras import needs

#: Most values that are looked through for their range.
_MOST = 2**22
#: Seconds between two versions of a line in a notebook.
_PAUSE = 0.2


def table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]], foot: str = "") -> str:
    """A table in HTML; every text is escaped."""

    def row(cells: Sequence[str], tag: str) -> str:
        return f"<tr>{''.join(_cell(cell, tag) for cell in cells)}</tr>"

    below = f'<caption style="caption-side: bottom; text-align: left">{html.escape(foot)}</caption>' if foot else ""
    return (
        f"<div><strong>{html.escape(title)}</strong><table>{below}<thead>{row(head, 'th')}</thead>"
        f"<tbody>{''.join(row(cells, 'td') for cells in rows)}</tbody></table></div>"
    )


def _cell(text: str, tag: str) -> str:
    return f'<{tag} style="text-align: left">{html.escape(str(text))}</{tag}>'


def unit(value) -> str:
    """A value's unit; nothing for a plain number."""
    of = units.unit_of(value)
    return "" if of.is_unitless else str(of)


def numbers(value) -> str:
    """A value in a few digits, or the range of several, without the unit."""
    x = u.get_magnitude(value)
    if is_traced(x):
        return "traced"
    if not isinstance(x, (int, float, np.generic, np.ndarray, jax.Array)):
        return type(x).__name__
    shape = np.shape(x)
    if not shape:
        return _digits(x)
    if not np.size(x) or np.size(x) > _MOST:
        return f"{np.size(x):,} values"
    x = np.asarray(x)
    if x.dtype == bool:
        return f"{x.sum():,} of {x.size:,} true"
    x = np.abs(x) if np.iscomplexobj(x) else x
    lost = np.isnan(x)
    if lost.all():
        return "NaN"
    beside = f", {lost.sum():,} NaN" if lost.any() else ""
    return f"{_digits(np.nanmin(x))} to {_digits(np.nanmax(x))}{beside}"


def _digits(x) -> str:
    return str(bool(x)) if np.asarray(x).dtype == bool else f"{float(x):.4g}"


# Models and networks ------------------------------------------------------------------------------------------------


def model_table(model: Any) -> str:
    """Of a `Model`: its parameters, and the names of its states, inputs and observables with their units."""
    return table(type(model).__name__, ("parameter", "value", "unit"), _parameters(model), _quantities(model))


def network_table(network: Any) -> str:
    """Of a `Network`: the constants of its coupling, and the parameters of its model."""
    rows = [(f"coupling.{n}", numbers(x), unit(x)) for n, x in network.parameters.items()]
    rows += _parameters(network.model)
    return table(repr(network), ("parameter", "value", "unit"), rows, _quantities(network.model))


def _parameters(model) -> list[tuple[str, str, str]]:
    values = {name: getattr(model, name) for name in model.parameter_units()}
    return [(name, numbers(x), unit(x)) for name, x in values.items()]


def _quantities(model) -> str:
    """The states, inputs and observables of a model in one line."""
    inputs = {name: units.unit_of(x) for name, x in model.inputs.items()}
    late = {name: model.recordable()[each.of] for name, each in model.delayed.items()}
    groups = {"states": model.states, "inputs": inputs, "delayed": late, "observables": model.observables}
    return "; ".join(f"{kind} {', '.join(map(with_unit, g, g.values()))}" for kind, g in groups.items() if g)


def with_unit(name: str, of) -> str:
    """A name with a unit, as in a table's head."""
    return name if of.is_unitless else f"{name} ({of})"


# Progress -----------------------------------------------------------------------------------------------------------


class NotebookLine:
    """A bar and a line of text in a notebook's output, rewritten in place; it needs no widgets.

    Parameters
    ----------
    total : steps of the whole
    """

    def __init__(self, total: int):
        self.total, self.shown = total, 0.0
        self.handle = None

    def __call__(self, done: int, text: str) -> None:
        """Show how far it is, at most five times a second and at the end."""
        now = time.perf_counter()
        if self.handle is not None and done < self.total and now - self.shown < _PAUSE:
            return
        self.shown = now
        bar = f'<progress value="{done}" max="{self.total}"></progress>'
        data = {"text/plain": text, "text/html": f"<div>{bar} <code>{html.escape(text)}</code></div>"}
        if self.handle is None:
            self.handle = needs("IPython.display").display(data, raw=True, display_id=True)
        else:
            self.handle.update(data, raw=True)
