"""A step on arrays, however it was written, taken apart into what each lane does and what is done around the loop.

A simulation's step usually works on whole arrays of masses. Its jaxpr has four kinds of values: those that follow from
its text alone, those held during a run (parameters, and all that is made of them), those that change with the step's
number only (inputs), and those that depend on the states. The last are the loop; each must be elementwise, over axes
that are those of the states. Held values and rows are computed before the loop, by any JAX function. A normal that is
drawn for each lane becomes one of the loop's own.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from .._jax import Literal, at_source, call_body, drop_dead, eqn_source, meshless
from ..errors import Unsupported
from ..models.base import Model, model
from ..pointwise import CALLS, ELEMENTWISE, RULES, Program, evaluate_equation
from ..units import UNITLESS

# What `jax.random.normal` is called in a jaxpr.
_NORMAL = "_normal"
# The input of the loop that is what arrives from other lanes.
ARRIVING = "arriving"
_MOVES = frozenset(["broadcast_in_dim", "reshape", "squeeze", "expand_dims", "transpose"])


class Level(enum.IntEnum):
    """What a value depends on, at most."""

    TEXT = 0  # the program's text
    HELD = 1  # parameters, and what else no step changes
    ROW = 2  # the number of the step
    LANE = 3  # the states, what arrives from other lanes, and normals drawn for each


class State(NamedTuple):
    """An argument that is a state, by its name."""

    name: str


class Number:
    """The argument that is the step's number."""


class Key:
    """An argument that is the key of a random generator."""


class Arriving:
    """The argument that is what arrives from other lanes, where these are coupled."""


# One axis of the lanes for each axis of a value; None where its size is 1 or all lanes share it.
Axes = tuple[int | None, ...]


class Ref(NamedTuple):
    """Where the loop finds a value: literal, held, row, or made in the loop."""

    kind: str
    at: Any
    dtype: Any


class Record(NamedTuple):
    """How one output is had: recorded by name with these axes, or made of recorded states after the run."""

    name: str
    axes: Axes
    after: bool = False


@dataclasses.dataclass(frozen=True)
class Equations:
    """The loop's programs; equal where their texts are, so that one model is made of them and compiled once.

    Attributes
    ----------
    label : whose step it is
    states, held, rows, normals, arriving, observables : the names of each
    text : what the programs say
    advance : ``(*held, *states, *rows, *normals, *arriving) -> states``
    observe : ``(*held, *states) -> observables``
    """

    label: str
    states: tuple[str, ...]
    held: tuple[str, ...]
    rows: tuple[str, ...]
    normals: tuple[str, ...]
    arriving: tuple[str, ...]
    observables: tuple[str, ...]
    text: tuple
    advance: Program = dataclasses.field(compare=False)
    observe: Program = dataclasses.field(compare=False)

    @functools.lru_cache(maxsize=256)  # noqa: B019 a few kilobytes each
    def model(self) -> type[Model]:
        """A model whose scheme is "given"."""
        held, states, rest = self.held, self.states, (*self.rows, *self.normals, *self.arriving)

        def step(s: SimpleNamespace, p: SimpleNamespace, i: SimpleNamespace) -> dict[str, Any]:
            flat = [vars(p)[n] for n in held] + [vars(s)[n] for n in states] + [vars(i)[n] for n in rest]
            return dict(zip(states, self.advance(*flat), strict=True))

        def observe(s: SimpleNamespace, p: SimpleNamespace) -> dict[str, Any]:
            flat = [vars(p)[n] for n in held] + [vars(s)[n] for n in states]
            return dict(zip(self.observables, self.observe(*flat), strict=True))

        body = {
            "__annotations__": dict.fromkeys(held, Any),
            **dict.fromkeys(held, 0.0),
            "states": dict.fromkeys(states, UNITLESS),
            "inputs": dict.fromkeys(rest, 0.0),
            "observables": dict.fromkeys(self.observables, UNITLESS),
            "scheme": "given",
            "step": staticmethod(step),
            "observe": staticmethod(observe),
        }
        return model(type(self.label, (Model,), body))


class Parts:
    """One step on arrays, taken apart.

    Parameters
    ----------
    closed : the step's jaxpr
    arguments : what each of its arguments is: a `State`, `Number`, `Key` or `Arriving`, or else its value
    states : for each state, the place of its next value among the outputs
    outputs : places of the outputs to be recorded
    label : whose step it is, an identifier

    Attributes
    ----------
    equations : the loop
    names : of the states
    extra : of what the loop carries to the end of a step in order to record it, as further states
    lanes : the shape of the batch of masses
    dtype : of all states

    Raises
    ------
    Unsupported : what cannot be done lane by lane, with the name of what stood in the way
    """

    def __init__(self, closed, arguments: Sequence[Any], states: dict[str, int], outputs: Sequence[int], label: str):
        self.label = label
        jaxpr, draws = _flattened(closed, [*states.values(), *outputs])
        self._jaxpr = jaxpr.jaxpr
        given = [*closed.consts, *arguments, *draws]
        self._values: dict[Any, Any] = dict(zip(self._jaxpr.constvars, jaxpr.consts))
        self._made_by = {v for eqn in self._jaxpr.eqns for v in eqn.outvars}
        self._refuse_draws(closed, given)

        named = {a.name: v for a, v in zip(given, self._jaxpr.invars) if isinstance(a, State)}
        self.names = tuple(states)
        self._old: list[Any] = [named[n] for n in self.names]
        self._new = self._jaxpr.outvars[: len(states)]
        self._ends = {v for v in self._new if not isinstance(v, Literal)}
        self._outputs = self._jaxpr.outvars[len(states) :]
        self.dtype = self._checked_dtype()
        self.lanes = self._checked_lanes()

        self._axes: dict[Any, Axes] = {v: self._aligned(v) for v in self._old}
        self._held: dict[tuple[Any, Axes], int] = {}
        self._rows: dict[tuple[Any, Axes], int] = {}
        self._level: dict[Any, Level] = dict.fromkeys(self._values, Level.HELD)
        self._source: dict[Any, tuple[Any, tuple[int | None, ...]]] = {}
        self._number: Any = None
        self._normals, self._drawn, self._arriving = [], [], []
        self._place(given)
        self._equations()

    # Arguments ------------------------------------------------------------------------------------------------------

    def _place(self, given) -> None:
        """Say what each argument is, and then each value that is made of them."""
        live = self._read_by(self._jaxpr.eqns) | {v for v in self._jaxpr.outvars if not isinstance(v, Literal)}
        for v, a in zip(self._jaxpr.invars, given, strict=True):
            self._level[v] = Level.LANE if isinstance(a, State) else Level.HELD
            if isinstance(a, Number):
                self._number, self._level[v] = v, Level.ROW
            elif isinstance(a, _Draw) and v in live:
                # A draw that several lanes share cannot be theirs: it is made before the loop.
                own = v.aval.shape == self.lanes
                self._level[v] = Level.LANE if own else Level.ROW
                (self._normals if own else self._drawn).append(v)
                self._axes |= {v: self._aligned(v)} if own else {}
            elif isinstance(a, Arriving):
                self._level[v] = Level.LANE
                self._arriving.append(v)
                self._axes |= {v: self._aligned(v)}
            elif not isinstance(a, (State, Key, _Draw)):
                self._values[v] = a
        for eqn in self._jaxpr.eqns:
            level = self._level_of(eqn)
            self._level |= dict.fromkeys(eqn.outvars, level)
            if eqn.primitive.name in _MOVES and level < Level.LANE:
                self._trace_back(eqn)

    def _level_of(self, eqn) -> Level:
        found = [self._level[v] for v in eqn.invars if not isinstance(v, Literal)]
        level = max(found, default=Level.TEXT)
        if eqn.primitive.name == "optimization_barrier":
            return max(level, Level.HELD)
        if level is Level.ROW and eqn.primitive.name in ELEMENTWISE:
            sizes = [self._size(v) for v in eqn.invars if self._level.get(_key(v)) is Level.ROW]
            # One value a step and lane takes memory: what makes more lanes of a row is left to the loop.
            return Level.ROW if eqn.outvars[0].aval.size <= max(sizes) else Level.LANE
        return level

    def _size(self, v) -> int:
        source, _ = self._source.get(_key(v), (v, ()))
        return source.aval.size

    def _trace_back(self, eqn) -> None:
        """Note of which smaller value this one is a copy, and where the axes of that one have gone."""
        operand, out = eqn.invars[0], eqn.outvars[0]
        if isinstance(operand, Literal):
            return
        source, axes = self._source.get(operand, (operand, tuple(range(operand.aval.ndim))))
        moved = _moved(eqn, tuple(range(operand.aval.ndim)))
        if moved is not None:
            to = {old: new for new, old in enumerate(moved) if old is not None}
            self._source[out] = source, tuple(to.get(a) if a is not None else None for a in axes)

    @staticmethod
    def _read_by(eqns) -> set:
        return {v for eqn in eqns for v in eqn.invars if not isinstance(v, Literal)}

    def _refuse_draws(self, closed, given) -> None:
        live = self._read_by(self._jaxpr.eqns)
        if any(isinstance(a, Key) and v in live for v, a in zip(self._jaxpr.invars, given, strict=True)):
            names = ", ".join(dict.fromkeys(_draw_names(closed.jaxpr, ""))) or "a function"
            raise Unsupported(f"{self.label} draws random numbers by {names} of jax.random, and only normals are fused")

    def _checked_dtype(self) -> np.dtype:
        for name, v in zip(self.names, self._old):
            if not jnp.issubdtype(v.aval.dtype, jnp.floating):
                raise Unsupported(f"state '{name}' of {self.label} is {v.aval.dtype}, and only real numbers are fused")
        found = {str(v.aval.dtype): name for name, v in zip(self.names, self._old)}
        if len(found) > 1:
            listed = ", ".join(f"'{n}' is {d}" for d, n in found.items())
            raise Unsupported(f"the states of {self.label} differ in dtype: {listed}")
        if not found:
            raise Unsupported(f"{self.label} has no state that its step changes")
        return np.dtype(next(iter(found)))

    def _checked_lanes(self) -> tuple[int, ...]:
        shapes = {name: v.aval.shape for name, v in zip(self.names, self._old)}
        try:
            lanes = np.broadcast_shapes(*shapes.values())
        except ValueError:
            listed = ", ".join(f"'{n}' {s}" for n, s in shapes.items())
            raise Unsupported(f"the states of {self.label} do not broadcast to one batch of lanes: {listed}") from None
        for name, old, new in zip(self.names, self._old, self._new):
            before, after = old.aval.str_short(), new.aval.str_short()
            if before != after:
                raise Unsupported(f"a step changes state '{name}' of {self.label} from {before} to {after}")
        return lanes

    # The loop -------------------------------------------------------------------------------------------------------

    def _aligned(self, v, what: str = "") -> Axes:
        """Axes from the right, as arrays broadcast."""
        shape, n = v.aval.shape, len(self.lanes)
        at = [n - len(shape) + k for k in range(len(shape))]
        for k, size in zip(at, shape):
            if size > 1 and (k < 0 or self.lanes[k] != size):
                raise Unsupported(f"{self.label}: a value of shape {shape}{what} is no value of lanes {self.lanes}")
        return tuple(k if size > 1 else None for k, size in zip(at, shape))

    def _lower(self, eqns, lowered: list) -> None:
        """Add equations to a program of the loop, each checked to be elementwise."""
        for eqn in eqns:
            if self._level[eqn.outvars[0]] is not Level.LANE:
                continue
            axes = self._axes_after(eqn)
            self._axes[eqn.outvars[0]] = axes
            lowered.append((eqn, [self._ref(v, self._of_operand(v, axes)) for v in eqn.invars]))

    def _axes_after(self, eqn) -> Axes:
        """The axes of an equation's result."""
        name = eqn.primitive.name
        if name in ELEMENTWISE or name in _EVALUATED:
            if jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.complexfloating):
                self._refuse(eqn, "makes complex numbers")
            return self._joint(eqn)
        moved = _moved(eqn, self._axes[eqn.invars[0]]) if _only_moves(eqn) else None
        return self._refuse(eqn, "is not elementwise") if moved is None else moved

    def _of_operand(self, v, axes: Axes) -> Axes:
        return axes if np.ndim(v.aval) == len(axes) else (None,) * np.ndim(v.aval)

    def _joint(self, eqn) -> Axes:
        """The axes of an elementwise equation's result."""
        shape = eqn.outvars[0].aval.shape
        axes: list[int | None] = [None] * len(shape)
        for v in eqn.invars:
            if not isinstance(v, Literal) and self._level[v] is Level.LANE and v.aval.ndim == len(shape):
                for k, a in enumerate(self._axes[v]):
                    if a is not None and axes[k] not in (None, a):
                        self._refuse(eqn, "sets lanes against other lanes")
                    axes[k] = a if a is not None else axes[k]
        for v in eqn.invars:
            if not isinstance(v, Literal) and self._level[v] < Level.LANE and v.aval.ndim == len(shape):
                self._name_free(eqn, v, axes)
        used = [a for a in axes if a is not None]
        if len(used) > len(set(used)):
            self._refuse(eqn, "sets lanes against other lanes")
        return tuple(axes)

    def _name_free(self, eqn, v, axes: list) -> None:
        """Where a held value varies along an axis that no state has named, it is the lanes' own axis there."""
        source, to = self._source.get(v, (v, tuple(range(v.aval.ndim))))
        for k, size in zip(to, source.aval.shape):
            if size > 1 and k is not None and axes[k] is None:
                at = len(self.lanes) - len(axes) + k
                if at < 0 or self.lanes[at] != size:
                    self._refuse(eqn, f"has a value of shape {v.aval.shape} where the lanes are {self.lanes}")
                axes[k] = at

    def _refuse(self, eqn, what: str) -> NoReturn:
        source = eqn_source(eqn)
        where = f" ({source})" if source else ""
        raise Unsupported(
            f"{self.label}: '{eqn.primitive.name}'{where} {what}. What is fused must be pointwise: each "
            f"mass depends on its own states only, not on those of other masses, and on no delay"
        )

    def _ref(self, v, axes: Axes) -> Ref:
        """Where the loop finds a value that has these axes."""
        dtype = v.aval.dtype
        if isinstance(v, Literal):
            return Ref("text", np.asarray(v.val, dtype), dtype)
        level = self._level[v]
        if level is Level.LANE:
            return Ref("lane", v, dtype)
        source, to = self._source.get(v, (v, tuple(range(v.aval.ndim))))
        if level is Level.TEXT and np.size(self._compact(source)) == 1:
            return Ref("text", np.asarray(self._compact(source)).reshape(()), dtype)
        key = source, tuple(axes[k] if k is not None and n > 1 else None for k, n in zip(to, source.aval.shape))
        kept = self._rows if level is Level.ROW else self._held
        return Ref("row" if level is Level.ROW else "held", kept.setdefault(key, len(kept)), dtype)

    def _equations(self) -> None:
        """The loop's programs, and how each output is had."""
        advance: list = []
        self._lower(self._between(self._new, set(self._old)), advance)
        after = [self._ref(v, self._to_lanes(v, old)) for old, v in zip(self._old, self._new)]

        self.records: list[Record] = []
        extra: dict[Any, str] = {}
        observe, observables = [], {}
        for k, v in enumerate(self._outputs):
            self.records.append(self._record(k, v, advance, extra, observe, observables))
        # What depends on more than the states after a step is carried to the end of it as a state of its own.
        after += [self._ref(v, self._axes.get(v) or self._aligned(v)) for v in extra]
        seen = [self._ref(v, self._axes[v]) for v in observables]

        self.held = tuple(f"held{k}" for k in range(len(self._held)))
        self.rows = tuple(f"input{k}" for k in range(len(self._rows)))
        normals = tuple(f"normal{k}" for k in range(len(self._normals)))
        states = (*self.names, *extra.values())
        self.extra = tuple(extra.values())
        scalar = jax.ShapeDtypeStruct((), self.dtype)
        own = [*self._normals, *self._arriving]
        n_first, n_all = len(self.held) + len(states), len(self.held) + len(states) + len(self.rows) + len(own)
        place = {v: k for k, v in enumerate(self._old, len(self.held))}
        places = place | {v: k for k, v in enumerate(own, n_first + len(self.rows))}
        place_new = {v: k for k, v in enumerate(self._new, len(self.held)) if not isinstance(v, Literal)}
        programs = (
            Program(self._program(advance, after, places, n_first), [scalar] * n_all, f"step of {self.label}"),
            Program(self._program(observe, seen, place_new, n_first), [scalar] * n_first, f"records of {self.label}"),
        )
        self.equations = Equations(
            self.label, states, self.held, self.rows, normals, (ARRIVING,) * len(self._arriving),
            tuple(observables.values()), tuple(map(_text, programs)), *programs,
        )  # fmt: skip

    def _to_lanes(self, v, old) -> Axes:
        """The axes of a next state, which must be those of the state before."""
        own = self._axes[old]
        made = own if isinstance(v, Literal) or self._level[v] is not Level.LANE else self._axes[v]
        if any(a is not None and a != b for a, b in zip(made, own, strict=True)):
            raise Unsupported(f"a step of {self.label} makes state '{self.names[self._old.index(old)]}' of other lanes")
        return own

    def _record(self, k: int, v, advance: list, extra: dict, observe: list, observables: dict) -> Record:
        """How an output is had; what it takes is added to the programs."""
        if isinstance(v, Literal):
            return _AFTER
        if v in self._ends:
            return Record(self.names[self._new.index(v)], self._aligned(v))
        eqns = self._between([v], self._ends)
        if not self._follows(v, eqns):
            done = {id(eqn) for eqn, _ in advance}
            eqns = [eqn for eqn in self._between([v], set(self._old)) if id(eqn) not in done]
            self._lower(eqns, advance)
            return Record(extra.setdefault(v, f"output {k}"), self._axes.get(v) or self._aligned(v))
        if self._level[v] < Level.LANE or any(self._level[o] is Level.ROW for o in self._read_by(eqns)):
            return _AFTER
        self._axes |= {n: self._aligned(n) for n in self._ends}
        try:
            self._lower(eqns, part := [])
        except Unsupported:  # lanes are mixed, which is no matter once they are recorded
            return _AFTER
        observe += [step for step in part if all(step[0] is not other for other, _ in observe)]
        return Record(observables.setdefault(v, f"output {k}"), self._axes[v])

    def _follows(self, v, eqns) -> bool:
        """Whether an output is made of the states after a step, the step's number and held values only."""
        free = {*self._ends, self._number, *self._made_by}
        return all(o in free or self._level[o] <= Level.HELD for o in self._read_by(eqns) | {v})

    def _between(self, outs, stop: set) -> list:
        """The equations that make ``outs`` of the values in ``stop`` and of arguments, in order."""
        wanted = {v for v in outs if not isinstance(v, Literal)} - stop
        found = []
        for eqn in reversed(self._jaxpr.eqns):
            if wanted.intersection(eqn.outvars):
                found.append(eqn)
                wanted |= {v for v in eqn.invars if not isinstance(v, Literal)} - stop
        return found[::-1]

    def _program(self, lowered, outs: Sequence[Ref], places: dict, n_first: int) -> Callable:
        """A function of flat arguments that runs lowered equations."""

        def fun(*flat):
            made = {v: flat[k] for v, k in places.items()}

            def read(ref: Ref):
                if ref.kind in ("text", "lane"):
                    return ref.at if ref.kind == "text" else made[ref.at]
                x = flat[ref.at if ref.kind == "held" else n_first + ref.at]
                return x if x.dtype == ref.dtype else _cast(x, ref.dtype)

            for eqn, refs in lowered:
                operands = [read(r) for r in refs]
                moves = _only_moves(eqn)
                made[eqn.outvars[0]] = operands[0] if moves else evaluate_equation(eqn, operands, _EVALUATED)
            return [jnp.asarray(read(r), self.dtype) for r in outs]

        return fun

    # Around the loop ------------------------------------------------------------------------------------------------

    def _compact(self, v):
        """A value that no step changes, of size 1 along the axes that it is only copied along."""
        if isinstance(v, Literal):
            return v.val
        for eqn in self._between([v], set(self._values)):
            if self._level[eqn.outvars[0]] is Level.TEXT:
                with jax.ensure_compile_time_eval():
                    self._make(eqn)
            else:
                self._make(eqn)
        return self._values[v]

    def _make(self, eqn) -> None:
        name = eqn.primitive.name
        if name == "broadcast_in_dim":
            x, shape = jnp.asarray(self._compact(eqn.invars[0])), [1] * eqn.outvars[0].aval.ndim
            for k, size in zip(eqn.params["broadcast_dimensions"], x.shape):
                shape[k] = size
            self._values[eqn.outvars[0]] = x.reshape(shape)
        elif name in ELEMENTWISE or name == "exprel":
            operands = [self._compact(v) for v in eqn.invars]
            self._values[eqn.outvars[0]] = evaluate_equation(eqn, operands, {})
        else:
            _bind(eqn, values := {v: self._full(v) for v in self._read_by([eqn])})
            self._values |= {v: values[v] for v in eqn.outvars}

    def _full(self, v):
        """A value that no step changes."""
        x = self._compact(v)
        return x if isinstance(v, Literal) or jnp.shape(x) == v.aval.shape else jnp.broadcast_to(x, v.aval.shape)

    def held_values(self) -> dict[str, Any]:
        """What the loop reads and no step changes, by name; each broadcasts to the lanes."""
        return {n: self._spread(self._compact(v), a, 0) for n, (v, a) in zip(self.held, self._held)}

    def row_values(self, steps: int, key) -> dict[str, Any]:
        """What the loop reads at each of ``steps`` steps, each ``(steps, ...)`` and broadcasting to the lanes.

        Parameters
        ----------
        key : for the draws that several lanes share
        """
        if not self._rows:
            return {}
        wanted = [v for v, _ in self._rows]
        drawn = [
            jax.random.normal(jax.random.fold_in(key, k), (steps, *v.aval.shape), v.aval.dtype)
            for k, v in enumerate(self._drawn)
        ]

        def one(number, drawn):
            given = {**dict(zip(self._drawn, drawn)), self._number: number}
            return self._evaluated(wanted, given)

        rows = jax.vmap(one)(jnp.arange(steps), drawn)
        return {n: self._spread(x, a, 1) for n, x, (_, a) in zip(self.rows, rows, self._rows)}

    def _evaluated(self, wanted, given: dict) -> list:
        """Values made of those given and of held ones."""
        eqns = self._between(wanted, {*given, *self._values})
        read = self._read_by(eqns) | {v for v in wanted if not isinstance(v, Literal)}
        env = {v: self._full(v) for v in read if self._level[v] <= Level.HELD} | given
        for eqn in eqns:
            if not any(v in env for v in eqn.outvars):
                _bind(eqn, env)
        return [v.val if isinstance(v, Literal) else env[v] for v in wanted]

    def _spread(self, x, axes: Axes, lead: int):
        """An array with an axis for each of the lanes, after the first ``lead``; a scalar where all lanes share it."""
        x = jnp.asarray(x)
        axes = tuple(a if size > 1 else None for a, size in zip(axes, x.shape[lead:], strict=True))
        order = sorted((a, k) for k, a in enumerate(axes) if a is not None)
        rest = [k + lead for k, a in enumerate(axes) if a is None]
        x = jnp.transpose(x, [*range(lead), *[k + lead for _, k in order], *rest])
        shape = [1] * len(self.lanes)
        for a, _ in order:
            shape[a] = self.lanes[a]
        return x.reshape(*x.shape[:lead], *(shape if order or lead else ()))

    def outputs(self, records: dict[str, Any], numbers) -> list:
        """Each output ``(K, ...)`` in the shape that the step gave it.

        Parameters
        ----------
        records : what the loop recorded, each ``(K, *lanes)``
        numbers : of the recorded steps, ``(K,)``
        """
        found = []
        for v, record in zip(self._outputs, self.records, strict=True):
            if record.after:
                found.append(self._afterwards(v, records, numbers))
            else:
                found.append(_cast(_narrowed(records[record.name], record.axes, v.aval.shape, 1), v.aval.dtype))
        return found

    def needed(self) -> tuple[str, ...]:
        """The names of what the loop must record."""
        names = [r.name for r in self.records if not r.after]
        for v, record in zip(self._outputs, self.records, strict=True):
            names += [self.names[k] for k in self._reads(v)] if record.after else []
        return tuple(dict.fromkeys(names))

    def _reads(self, v) -> list[int]:
        """Which of the states after a step an output is made of."""
        read = self._read_by(self._between([v], self._ends)) | ({v} if not isinstance(v, Literal) else set())
        return [k for k, n in enumerate(self._new) if not isinstance(n, Literal) and n in read]

    def _afterwards(self, v, records, numbers):
        """An output for which lanes are mixed, or no state is read."""
        reads = self._reads(v)
        olds = [self._old[k] for k in reads]
        states = [
            _narrowed(records[self.names[k]], self._aligned(old), old.aval.shape, 1) for k, old in zip(reads, olds)
        ]

        def one(number, states):
            given = {**{self._new[k]: x for k, x in zip(reads, states)}, self._number: number}
            return jnp.asarray(self._evaluated([v], given)[0], v.aval.dtype)

        return jax.vmap(one)(numbers, states)

    def final(self, values: dict[str, Any]) -> dict[str, Any]:
        """The states after the run, ``(*lanes)`` each, in their own shapes."""
        own = zip(self.names, self._old)
        return {n: _narrowed(values[n], self._aligned(v), v.aval.shape, 0) for n, v in own}


class _Draw(NamedTuple):
    """An argument that stands for a normal."""

    aval: Any


_AFTER = Record("", (), after=True)


def _key(v):
    return None if isinstance(v, Literal) else v


def _bind(eqn, env: dict) -> None:
    operands = [v.val if isinstance(v, Literal) else env[v] for v in eqn.invars]
    outs = eqn.primitive.bind(*operands, **eqn.params)
    env.update(zip(eqn.outvars, outs if eqn.primitive.multiple_results else [outs]))


def _cast(x, dtype):
    return x != 0 if jnp.issubdtype(dtype, jnp.bool_) else x.astype(dtype)


def _only_moves(eqn) -> bool:
    """Whether an equation changes the shape of its first operand only."""
    name = eqn.primitive.name
    # Transposition leaves sums over no axis behind.
    return name in _MOVES or (name.startswith("reduce_") and eqn.params.get("axes") == ())


def _moved(eqn, axes: tuple) -> tuple | None:
    """Where the axes of an operand are in the result, None where one is new; None where they are mixed."""
    name, before, after = eqn.primitive.name, eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    if name.startswith("reduce_"):
        return axes
    if name == "transpose":
        return tuple(axes[k] for k in eqn.params["permutation"])
    if name == "broadcast_in_dim":
        to: list[Any] = [None] * len(after)
        for a, size, k in zip(axes, before, eqn.params["broadcast_dimensions"]):
            to[k] = a if size > 1 else None
        return tuple(to)
    if [n for n in before if n > 1] != [n for n in after if n > 1]:
        return None
    kept = iter([a for a, n in zip(axes, before) if n > 1])
    return tuple(next(kept) if n > 1 else None for n in after)


def _narrowed(x, axes: Axes, shape: tuple[int, ...], lead: int):
    """From an array with all lanes after ``lead`` axes, the one of ``shape`` whose axes are among the lanes."""
    n = x.ndim - lead
    x = x[(slice(None),) * lead + tuple(slice(None) if k in axes else slice(0, 1) for k in range(n))]
    order = [a for a in axes if a is not None]
    x = jnp.transpose(x, [*range(lead), *[a + lead for a in order], *[k + lead for k in range(n) if k not in order]])
    sizes = [size if a is not None else 1 for a, size in zip(axes, shape)]
    x = x.reshape(*x.shape[:lead], *sizes)
    return jnp.broadcast_to(x, (*x.shape[:lead], *shape))


def _exprel(z):
    """(exp(z) - 1) / z of primitives that every backend has, to the last digits of float64, its slope included."""
    small = jnp.abs(z) < 0.03
    near, far = jnp.where(small, z, jnp.zeros_like(z)), jnp.where(small, jnp.ones_like(z), z)
    series = jnp.ones_like(z)
    for n in range(8, 1, -1):
        series = 1.0 + series * near / n
    return jnp.where(small, series, jnp.tanh(0.5 * far) * (jnp.exp(far) + 1.0) / far)


_EVALUATED = {**RULES, "exprel": lambda z, **_: _exprel(z)}


# Flattening ---------------------------------------------------------------------------------------------------------


def _is_normal(eqn) -> bool:
    named = eqn.primitive.name in CALLS and eqn.params.get("name") == _NORMAL
    return named and any(jnp.issubdtype(v.aval.dtype, jax.dtypes.prng_key) for v in eqn.invars)


def _draws(jaxpr) -> Iterator[_Draw]:
    for eqn in jaxpr.eqns:
        if _is_normal(eqn):
            yield _Draw(eqn.outvars[0].aval)
        elif eqn.primitive.name in CALLS:
            yield from _draws(call_body(eqn)[0])


def _draw_names(jaxpr, name: str) -> Iterator[str]:
    """The functions that draw random bits, other than normals."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "random_bits":
            yield f"'{name.strip('_') or 'bits'}'"
        elif eqn.primitive.name in CALLS and not _is_normal(eqn):
            yield from _draw_names(call_body(eqn)[0], eqn.params.get("name", name))


def _flattened(closed, outs: Sequence[int]):
    """A jaxpr without calls and dead code, whose last arguments are the normals that it drew, and these."""
    draws = list(_draws(closed.jaxpr))

    def fun(*flat):
        normals = iter(flat[len(flat) - len(draws) :])

        def walk(jaxpr, consts, args):
            env = {**dict(zip(jaxpr.constvars, consts)), **dict(zip(jaxpr.invars, args))}
            for eqn in jaxpr.eqns:
                operands = [v.val if isinstance(v, Literal) else env[v] for v in eqn.invars]
                if _is_normal(eqn):
                    made = [next(normals)]
                elif eqn.primitive.name in CALLS:
                    made = walk(*call_body(eqn), operands)
                else:
                    with at_source(eqn):
                        made = eqn.primitive.bind(*operands, **eqn.params)
                    made = made if eqn.primitive.multiple_results else [made]
                env.update(zip(eqn.outvars, made))
            return [v.val if isinstance(v, Literal) else env[v] for v in jaxpr.outvars]

        n = len(closed.jaxpr.constvars)
        found = walk(closed.jaxpr, flat[:n], flat[n : n + len(closed.jaxpr.invars)])
        return [found[k] for k in outs]

    avals = [v.aval for v in (*closed.jaxpr.constvars, *closed.jaxpr.invars)] + [d.aval for d in draws]
    with meshless():
        made = jax.make_jaxpr(fun)(*[jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals])
    return drop_dead(made), draws


def _text(program: Program) -> tuple:
    """What a program says, for comparison."""
    jaxpr = program.jaxpr.jaxpr
    number = {v: k for k, v in enumerate(jaxpr.invars)}

    def of(v):
        return (str(v.aval), np.asarray(v.val).tobytes()) if isinstance(v, Literal) else number[v]

    lines = []
    for eqn in jaxpr.eqns:
        lines.append((eqn.primitive.name, str(sorted(eqn.params.items(), key=str)), tuple(map(of, eqn.invars))))
        number[eqn.outvars[0]] = len(number)
    return (*lines, tuple(map(of, jaxpr.outvars)), str(program.in_avals))
