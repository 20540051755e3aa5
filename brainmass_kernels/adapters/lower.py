"""The loop of a classified step, as programs of one lane: each operation is checked to be elementwise over the lanes.

A program of the loop reads static values, constants of the run, rows of inputs, and values of its own. Its arguments
are, in this order, constants, states, rows, normals, and what arrives of other lanes or of a mass's own past.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple, NoReturn

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np

from .. import jaxprs
from .._jax import Literal, eqn_source
from ..errors import Unsupported
from ..identity import text_of
from ..models.base import Model, model
from ..models.delayed import Delayed
from ..pointwise import ELEMENTWISE, RULES, Program, evaluate_equation
from ..units import UNITLESS
from .around import Values
from .classify import Arriving, Axes, ClassifiedStep, Level, moved_axes, only_moves


class Record(NamedTuple):
    """Where an output comes from: recorded by ``name`` with these axes, or made of recorded states after the run."""

    name: str
    axes: Axes
    after: bool = False


_AFTER = Record("", (), after=True)


@dataclasses.dataclass(frozen=True)
class Equations:
    """The loop's programs. Those of equal text are equal, so that one model is made of them and compiled once.

    Attributes
    ----------
    label : whose step it is
    states, constants, rows, normals, observables : the names of each
    arriving : what arrives of other lanes, or of a mass's own past
    text : what the programs say
    advance : ``(*constants, *states, *rows, *normals, *arriving) -> states``
    observe : ``(*constants, *states) -> observables``
    """

    label: str
    states: tuple[str, ...]
    constants: tuple[str, ...]
    rows: tuple[str, ...]
    normals: tuple[str, ...]
    arriving: tuple[Arriving, ...]
    observables: tuple[str, ...]
    text: tuple[str, ...]
    advance: Program = dataclasses.field(compare=False)
    observe: Program = dataclasses.field(compare=False)

    @functools.lru_cache(maxsize=256)  # noqa: B019 a few kilobytes each
    def model(self) -> type[Model]:
        """A model whose scheme is "given"."""
        constants, states = self.constants, self.states
        late = {x.name: x for x in self.arriving if x.source}
        inputs = (*self.rows, *self.normals, *(x.name for x in self.arriving if not x.source))
        rest = (*self.rows, *self.normals, *(x.name for x in self.arriving))
        observables = self.observables
        # A method of a dict is known by identity to the keys of compiled runs, which would read programs for 10 ms at
        # each run. It says enough: equal equations have this one model.
        program = {"advance": self.advance, "observe": self.observe}.__getitem__

        def step(s: SimpleNamespace, p: SimpleNamespace, i: SimpleNamespace) -> dict[str, Any]:
            flat = [vars(p)[n] for n in constants] + [vars(s)[n] for n in states] + [vars(i)[n] for n in rest]
            return dict(zip(states, program("advance")(*flat), strict=True))

        def observe(s: SimpleNamespace, p: SimpleNamespace) -> dict[str, Any]:
            flat = [vars(p)[n] for n in constants] + [vars(s)[n] for n in states]
            return dict(zip(observables, program("observe")(*flat), strict=True))

        delays = {f"delay_{name}": 0.0 * u.second for name in late}
        body = {
            "__annotations__": dict.fromkeys((*constants, *delays), Any),
            **dict.fromkeys(constants, 0.0),
            **delays,
            "states": dict.fromkeys(states, UNITLESS),
            "inputs": dict.fromkeys(inputs, 0.0),
            "delayed": {name: Delayed(x.source, by=f"delay_{name}") for name, x in late.items()},
            "observables": dict.fromkeys(self.observables, UNITLESS),
            "scheme": "given",
            "step": staticmethod(step),
            "observe": staticmethod(observe),
        }
        return model(type(self.label, (Model,), body))


class LoweredStep(NamedTuple):
    """The loop of a step, and what it takes and gives.

    Attributes
    ----------
    constants, rows : the variable of each constant and of each row that the loop reads, with its axes
    extra : names of what the loop carries to the end of a step in order to record it, as further states
    records : where each output comes from
    """

    equations: Equations
    constants: tuple[tuple[Any, Axes], ...]
    rows: tuple[tuple[Any, Axes], ...]
    extra: tuple[str, ...]
    records: tuple[Record, ...]


def lower(step: ClassifiedStep, values: Values) -> LoweredStep:
    """The loop of a step.

    Raises
    ------
    Unsupported : an operation that mixes lanes, with its name and line
    """
    return _Lowering(step, values).lowered()


class _Ref(NamedTuple):
    """Where the loop finds a value.

    Attributes
    ----------
    kind : "static", "constant", "row" or "lane"
    at : the value if it is static, its place among constants or rows, or the variable of the loop
    """

    kind: str
    at: Any
    dtype: Any


# An operation of the loop, and where its operands are.
_Operation = tuple[Any, list[_Ref]]


class _Lowering:
    """The programs as far as they are written.

    Attributes
    ----------
    axes : of each value of the loop
    constants, rows : places of the values that are read, by variable and axes
    advance, observe : the operations of the two programs
    extra, observables : names of the outputs that the first carries, and of those that the second makes
    """

    def __init__(self, step: ClassifiedStep, values: Values):
        self.step, self.values = step, values
        self.from_outside = [*step.normals, *step.arriving]
        self.axes: dict[Any, Axes] = {v: step.aligned(v) for v in (*step.before, *self.from_outside)}
        self.constants: dict[tuple[Any, Axes], int] = {}
        self.rows: dict[tuple[Any, Axes], int] = {}
        self.advance: list[_Operation] = []
        self.observe: list[_Operation] = []
        self.extra: dict[Any, str] = {}
        self.observables: dict[Any, str] = {}

    def lowered(self) -> LoweredStep:
        step = self.step
        self.advance += self.operations(step.needed_for(step.after, set(step.before)))
        following = [self.ref(v, self.axes_of_next(v, old)) for old, v in zip(step.before, step.after)]
        records = tuple(self.record(k, v) for k, v in enumerate(step.outputs))
        following += [self.ref(v, self.axes_of(v)) for v in self.extra]
        observed = [self.ref(v, self.axes[v]) for v in self.observables]
        extra = tuple(self.extra.values())
        equations = self.equations(following, observed, (*step.names, *extra))
        return LoweredStep(equations, tuple(self.constants), tuple(self.rows), extra, records)

    def axes_of(self, v) -> Axes:
        return self.axes.get(v) or self.step.aligned(v)

    def axes_of_next(self, v, old) -> Axes:
        """The axes of a next state, which must be those of the state before."""
        step, own = self.step, self.axes[old]
        is_lane = not isinstance(v, Literal) and step.level[v] is Level.LANE
        if is_lane and any(a is not None and a != b for a, b in zip(self.axes[v], own, strict=True)):
            name = step.names[step.before.index(old)]
            raise Unsupported(f"a step of {step.label} makes state '{name}' of other lanes")
        return own

    # Outputs --------------------------------------------------------------------------------------------------------

    def record(self, k: int, v) -> Record:
        """Where an output comes from; the operations that make it are added to the programs."""
        step = self.step
        if isinstance(v, Literal):
            return _AFTER
        if v in jaxprs.variables(step.after):
            return Record(step.names[step.after.index(v)], step.aligned(v))
        eqns = step.needed_for([v], set(jaxprs.variables(step.after)))
        if not step.follows_step(v, eqns):
            return self.carried(k, v)
        if step.level[v] < Level.LANE or any(step.level[o] is Level.ROW for o in jaxprs.read_by(eqns)):
            return _AFTER
        return self.observed(k, v, eqns)

    def carried(self, k: int, v) -> Record:
        """What depends on more than the states after a step is carried to the end of it as a state of its own."""
        done = {id(eqn) for eqn, _ in self.advance}
        eqns = self.step.needed_for([v], set(self.step.before))
        self.advance += self.operations([eqn for eqn in eqns if id(eqn) not in done])
        return Record(self.extra.setdefault(v, f"output {k}"), self.axes_of(v))

    def observed(self, k: int, v, eqns) -> Record:
        """What follows from the states after a step is an observable."""
        self.axes |= {n: self.step.aligned(n) for n in jaxprs.variables(self.step.after)}
        try:
            operations = self.operations(eqns)
        except Unsupported:  # it mixes lanes, as may be done of what is recorded
            return _AFTER
        done = {id(eqn) for eqn, _ in self.observe}
        self.observe += [(eqn, refs) for eqn, refs in operations if id(eqn) not in done]
        return Record(self.observables.setdefault(v, f"output {k}"), self.axes[v])

    # Operations -----------------------------------------------------------------------------------------------------

    def operations(self, eqns) -> list[_Operation]:
        """The equations of the loop among these, each checked to be elementwise."""
        operations = []
        for eqn in eqns:
            if self.step.level[eqn.outvars[0]] is Level.LANE:
                axes = self.axes[eqn.outvars[0]] = self.axes_of_result(eqn)
                moved = [axes if v.aval.ndim == len(axes) else (None,) * v.aval.ndim for v in eqn.invars]
                operations.append((eqn, [self.ref(v, a) for v, a in zip(eqn.invars, moved)]))
        return operations

    def axes_of_result(self, eqn) -> Axes:
        name = eqn.primitive.name
        if name in ELEMENTWISE or name in _RULES:
            if jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.complexfloating):
                self.refuse(eqn, "makes complex numbers")
            return self.joint_axes(eqn)
        moved = moved_axes(eqn, self.axes[eqn.invars[0]]) if only_moves(eqn) else None
        return self.refuse(eqn, "is not elementwise") if moved is None else moved

    def joint_axes(self, eqn) -> Axes:
        """The axes of an elementwise equation's result."""
        axes: list[int | None] = [None] * eqn.outvars[0].aval.ndim
        operands = [v for v in jaxprs.variables(eqn.invars) if v.aval.ndim == len(axes)]
        for v in operands:
            if self.step.level[v] is Level.LANE:
                for k, a in enumerate(self.axes[v]):
                    if a is not None and axes[k] not in (None, a):
                        self.refuse(eqn, "sets lanes against other lanes")
                    axes[k] = a if a is not None else axes[k]
        for v in operands:
            if self.step.level[v] < Level.LANE:
                self.name_free_axes(eqn, v, axes)
        used = [a for a in axes if a is not None]
        if len(used) > len(set(used)):
            self.refuse(eqn, "sets lanes against other lanes")
        return tuple(axes)

    def name_free_axes(self, eqn, v, axes: list) -> None:
        """Where a constant varies along an axis that no state has named, it is the lanes' own axis there."""
        lanes = self.step.lanes
        source, to = self.step.source(v)
        for k, size in zip(to, source.aval.shape):
            if size > 1 and k is not None and axes[k] is None:
                at = len(lanes) - len(axes) + k
                if at < 0 or lanes[at] != size:
                    self.refuse(eqn, f"has a value of shape {v.aval.shape} where the lanes are {lanes}")
                axes[k] = at

    def refuse(self, eqn, what: str) -> NoReturn:
        source = eqn_source(eqn)
        where = f" ({source})" if source else ""
        raise Unsupported(
            f"{self.step.label}: '{eqn.primitive.name}'{where} {what}. What is fused must be pointwise: each "
            f"mass depends on its own states only, not on those of other masses, and on no delay"
        )

    def ref(self, v, axes: Axes) -> _Ref:
        """Where the loop finds a value that has these axes."""
        dtype = v.aval.dtype
        if isinstance(v, Literal):
            return _Ref("static", np.asarray(v.val, dtype), dtype)
        level = self.step.level[v]
        if level is Level.LANE:
            return _Ref("lane", v, dtype)
        source, to = self.step.source(v)
        if level is Level.STATIC and np.size(self.values.compact(source)) == 1:
            return _Ref("static", np.asarray(self.values.compact(source)).reshape(()), dtype)
        key = source, tuple(axes[k] if k is not None and n > 1 else None for k, n in zip(to, source.aval.shape))
        kind, places = ("row", self.rows) if level is Level.ROW else ("constant", self.constants)
        return _Ref(kind, places.setdefault(key, len(places)), dtype)

    # Programs -------------------------------------------------------------------------------------------------------

    def equations(self, following: list[_Ref], observed: list[_Ref], states: tuple[str, ...]) -> Equations:
        step, label, n_constants = self.step, self.step.label, len(self.constants)
        n_first = n_constants + len(states)
        places = {v: k for k, v in enumerate(step.before, n_constants)}
        places |= {v: k for k, v in enumerate(self.from_outside, n_first + len(self.rows))}
        after = {v: k for k, v in enumerate(step.after, n_constants) if not isinstance(v, Literal)}
        scalar = jax.ShapeDtypeStruct((), step.dtype)
        n_all = n_first + len(self.rows) + len(self.from_outside)
        advance = _flat(self.advance, following, places, n_first, step.dtype)
        observe = _flat(self.observe, observed, after, n_first, step.dtype)
        programs = (
            Program(advance, [scalar] * n_all, f"step of {label}"),
            Program(observe, [scalar] * n_first, f"records of {label}"),
        )
        constants, rows, normals = (
            tuple(f"{kind}{k}" for k in range(count))
            for kind, count in (("constant", n_constants), ("input", len(self.rows)), ("normal", len(step.normals)))
        )
        return Equations(
            label, states, constants, rows, normals, tuple(step.arrivals), tuple(self.observables.values()),
            tuple(text_of(program.jaxpr) for program in programs), *programs,
        )  # fmt: skip


def _flat(operations: list[_Operation], outs: Sequence[_Ref], places: dict, n_first: int, dtype) -> Callable:
    """A function of flat arguments that runs operations; ``places`` are those of its variables among the arguments."""

    def fun(*flat):
        values = {v: flat[k] for v, k in places.items()}

        def read(ref: _Ref):
            if ref.kind == "static":
                return ref.at
            if ref.kind == "lane":
                return values[ref.at]
            return cast(flat[ref.at if ref.kind == "constant" else n_first + ref.at], ref.dtype)

        for eqn, refs in operations:
            operands = [read(r) for r in refs]
            values[eqn.outvars[0]] = operands[0] if only_moves(eqn) else evaluate_equation(eqn, operands, _RULES)
        return [jnp.asarray(read(r), dtype) for r in outs]

    return fun


def cast(x, dtype):
    """An array as one of another dtype; truth values are what is not 0."""
    if x.dtype == dtype:
        return x
    return x != 0 if jnp.issubdtype(dtype, jnp.bool_) else x.astype(dtype)


def _exprel(z):
    """(exp(z) - 1) / z of primitives that every backend has, to the last digits of float64, its slope included."""
    small = jnp.abs(z) < 0.03
    near, far = jnp.where(small, z, jnp.zeros_like(z)), jnp.where(small, jnp.ones_like(z), z)
    series = jnp.ones_like(z)
    for n in range(8, 1, -1):
        series = 1.0 + series * near / n
    return jnp.where(small, series, jnp.tanh(0.5 * far) * (jnp.exp(far) + 1.0) / far)


_RULES = {**RULES, "exprel": lambda z, **_: _exprel(z)}
