"""Docstrings of the models: the equations shown are those of the drift, and every name has its line."""

import inspect
import math
import re
import zlib
from types import SimpleNamespace

import numpy as np
import pytest

import brainmass_kernels as bk
from brainmass_kernels.models.delayed import names_read

MODELS = {entry.name: entry.model for entry in bk.list_models()}
KNOWN = {"exp": math.exp, "tanh": math.tanh, "pi": math.pi, "max": max, "min": min}

each = pytest.mark.parametrize("name", MODELS)


def text_of(cls: type[bk.Model]) -> str:
    return inspect.getdoc(cls) or ""


def equations(cls: type[bk.Model]) -> list[tuple[str, str]]:
    """The two sides of each equation: the indented lines, each written out for every k that it names."""
    lines = "\n".join(re.findall(r"^    (.*)", text_of(cls).partition("Parameters\n---")[0], re.M))
    found = []
    for line in re.sub(r"\n {2,}", " ", lines).splitlines():
        line, _, values = line.partition("(k = ")
        for k in values.rstrip(")").split(", ") if values else [None]:
            left, right = (line if k is None else re.sub(r"k\b", k, line)).split(" = ")
            found.append((left.strip(), right.strip()))
    return found


def as_python(text: str, velocities: dict[str, str]) -> str:
    """An expression of a docstring: a blank multiplies, a name right before a parenthesis is a function."""
    value, otherwise = re.fullmatch(r"(.*) where (.*), otherwise (.*)", text), ""
    if value:
        text, condition, otherwise = value.groups()
        otherwise = f" if {condition} else {as_python(otherwise, velocities)}"
    text = re.sub(r"(\w+)'", lambda m: velocities[m[1]], text).replace("^", "**")
    return re.sub(r"(?<=[\w)]) (?=[\w(])", " * ", text) + otherwise


class Names(dict):
    """Values by name; what is defined by an equation is computed when it is read."""

    def __init__(self, values, definitions, velocities):
        super().__init__(values)
        self.definitions, self.velocities = definitions, velocities

    def __missing__(self, name: str):
        arguments, text = self.definitions[name]
        code = compile(as_python(text, self.velocities), name, "eval")
        if arguments is None:
            return eval(code, {}, self)
        return lambda *values: eval(code, {}, Names({**self, **dict(zip(arguments, values))}, *self.rest()))

    def rest(self):
        return self.definitions, self.velocities


@each
def test_the_equations_shown_are_those_of_the_drift(name, x64):
    cls, rng = MODELS[name], np.random.default_rng(zlib.crc32(name.encode()))
    s, p, i = ({n: float(x) for n, x in zip(names, rng.uniform(0.2, 1.5, len(names)))} for names in
               (cls.states, cls.parameters(), names_read(cls)))  # fmt: skip
    velocities, definitions, rates = dict(cls.pairs), {}, {}
    shared = equations(bk.WilsonCowan) if "`WilsonCowan`" in text_of(cls) else []
    for left, right in [*(e for e in shared if "'" not in e[0]), *equations(cls)]:
        if "'" in left:
            rates[left] = right
        else:
            function, _, arguments = left.partition("(")
            definitions[function] = arguments.rstrip(")").split(", ") if arguments else None, right
    shown = {}
    names = Names({**KNOWN, **s, **p, **i}, definitions, velocities)
    for left, right in rates.items():
        factor, _, state = left.rpartition(" ")
        state, order = state.rstrip("'"), state.count("'")
        rate = eval(as_python(right, velocities), {}, names) / (names[factor] if factor else 1.0)
        shown |= {state: rate} if order == 1 else {state: s[velocities[state]], velocities[state]: rate}
    drift = cls.drift(*(SimpleNamespace(**{n: np.float64(x) for n, x in group.items()}) for group in (s, p, i)))
    assert set(shown) == set(drift) == set(cls.states)
    for n, rate in drift.items():
        assert shown[n] == pytest.approx(float(rate), rel=1e-9), n


@each
def test_every_name_has_its_place(name):
    cls = MODELS[name]
    text = text_of(cls)
    assert re.search(r"^- States?: ", text, re.M)
    described = text[text.index("- State") :]
    assert {*cls.states, *cls.inputs, *cls.observables} <= set(re.findall(r"``(\w+)``", described))
    _, _, listed = text.partition("Parameters\n----------\n")
    heads = re.findall(r"^([\w, ]+) :", listed.partition("\n\n")[0], re.M)
    assert sorted(n for head in heads for n in head.split(", ")) == sorted(cls.parameters())
    _, _, references = text.partition("References\n----------\n")
    assert re.search(r"\d{4}, .*?\d+:\w+|pages \d+", references.replace("\n", " "))
