"""What each value of a step on arrays depends on: nothing, constants of the run, the step's number, or its lane.

A simulation's step usually works on whole arrays of masses. Its jaxpr has four kinds of values: those that follow from
the text of the program, the constants of a run (parameters, and what follows from them), those that change with the
number of the step (inputs), and those that depend on the states. The last make up the loop, see `lower`. The others are
computed around it, by any JAX function, see `around`. A normal that is drawn for each lane becomes one of the loop's.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import jaxprs
from .._jax import Literal, meshless
from ..errors import Unsupported
from ..pointwise import ELEMENTWISE

# What `jax.random.normal` is called in a jaxpr.
_NORMAL = "_normal"


class Level(enum.IntEnum):
    """What a value depends on, at most."""

    STATIC = 0  # the program's text
    CONSTANT = 1  # parameters, and whatever else no step changes
    ROW = 2  # the number of the step
    LANE = 3  # the states, what arrives of other lanes or of the past, and normals drawn for each lane


class State(NamedTuple):
    """An argument that is a state, by its name."""

    name: str


class Number:
    """The argument that is the step's number."""


class Key:
    """An argument that is the key of a random generator."""


class Arriving(NamedTuple):
    """An argument that arrives: a sum of what other lanes sent, where these are coupled, or what a mass sent before.

    Attributes
    ----------
    name : of the input of the loop
    source : the state that a mass sent before, of a delay inside it
    """

    name: str
    source: str = ""


class _Draw(NamedTuple):
    """An argument that stands for a normal."""

    aval: Any


# One axis of the lanes for each axis of a value; None where its size is 1 or all lanes share it.
Axes = tuple[int | None, ...]


class ClassifiedStep:
    """One step on arrays, with what each of its values depends on.

    Parameters
    ----------
    closed : the step's jaxpr
    arguments : what each of its arguments is: a `State`, `Number`, `Key` or `Arriving`, or else its value
    states : for each state, the place of its next value among the outputs
    outputs : places of the outputs to be recorded
    label : whose step it is, an identifier

    Attributes
    ----------
    jaxpr : the step without calls and dead code, in which a normal is an argument
    level : the `Level` of each variable
    copies : for a variable that only copies a smaller one, that one, and where its axes are
    known : the values of constants and of arguments, by variable
    names, before, after : of each state, its name and its variables before and after the step
    outputs : what is recorded
    number, arriving, normals, shared_normals : the variables that are these; a normal is shared where it is not drawn
        for each lane
    arrivals : what each of those that arrive is
    lanes : the shape of the batch of masses
    dtype : of all states

    Raises
    ------
    Unsupported : the step draws numbers other than normals, or its states are no lanes of real numbers
    """

    def __init__(self, closed, arguments: Sequence[Any], states: dict[str, int], outputs: Sequence[int], label: str):
        self.label = label
        flat, draws = _flattened(closed, [*states.values(), *outputs])
        self.jaxpr = flat.jaxpr
        kinds = dict(zip(self.jaxpr.invars, [*closed.consts, *arguments, *draws], strict=True))
        _refuse_draws(closed, self.jaxpr, kinds, label)

        state_of = {kind.name: v for v, kind in kinds.items() if isinstance(kind, State)}
        self.names = tuple(states)
        self.before: list[Any] = [state_of[n] for n in self.names]
        self.after = self.jaxpr.outvars[: len(states)]
        self.outputs = self.jaxpr.outvars[len(states) :]
        self.dtype = self._checked_dtype()
        self.lanes = self._checked_lanes()

        self.known: dict[Any, Any] = dict(zip(self.jaxpr.constvars, flat.consts))
        self.level: dict[Any, Level] = dict.fromkeys(self.known, Level.CONSTANT)
        self.copies: dict[Any, tuple[Any, Axes]] = {}
        self.number: Any = None
        self.arriving: list[Any] = []
        self.arrivals: list[Arriving] = []
        self.normals: list[Any] = []
        self.shared_normals: list[Any] = []
        live = {*jaxprs.variables(self.jaxpr.outvars), *jaxprs.read_by(self.jaxpr.eqns)}
        for v, kind in kinds.items():
            self.level[v] = self._level_of_argument(v, kind, v in live)
        for eqn in self.jaxpr.eqns:
            level = self._level_of(eqn)
            self.level |= dict.fromkeys(eqn.outvars, level)
            if level < Level.LANE and eqn.primitive.name in MOVES:
                self._note_copy(eqn)

    # The states -----------------------------------------------------------------------------------------------------

    def _checked_dtype(self) -> np.dtype:
        for name, v in zip(self.names, self.before):
            if not jnp.issubdtype(v.aval.dtype, jnp.floating):
                raise Unsupported(f"state '{name}' of {self.label} is {v.aval.dtype}, and only real numbers are fused")
        by_dtype = {str(v.aval.dtype): name for name, v in zip(self.names, self.before)}
        if len(by_dtype) > 1:
            listed = ", ".join(f"'{n}' is {d}" for d, n in by_dtype.items())
            raise Unsupported(f"the states of {self.label} differ in dtype: {listed}")
        if not by_dtype:
            raise Unsupported(f"{self.label} has no state that its step changes")
        return np.dtype(next(iter(by_dtype)))

    def _checked_lanes(self) -> tuple[int, ...]:
        shapes = {name: v.aval.shape for name, v in zip(self.names, self.before)}
        try:
            lanes = np.broadcast_shapes(*shapes.values())
        except ValueError:
            listed = ", ".join(f"'{n}' {s}" for n, s in shapes.items())
            raise Unsupported(f"the states of {self.label} do not broadcast to one batch of lanes: {listed}") from None
        for name, before, after in zip(self.names, self.before, self.after):
            was, becomes = before.aval.str_short(), after.aval.str_short()
            if was != becomes:
                raise Unsupported(f"a step changes state '{name}' of {self.label} from {was} to {becomes}")
        return lanes

    def aligned(self, v) -> Axes:
        """The axes of a value whose axes are the last ones of the lanes, as arrays broadcast."""
        shape, n = v.aval.shape, len(self.lanes)
        at = [n - len(shape) + k for k in range(len(shape))]
        for k, size in zip(at, shape):
            if size > 1 and (k < 0 or self.lanes[k] != size):
                raise Unsupported(f"{self.label}: a value of shape {shape} is no value of lanes {self.lanes}")
        return tuple(k if size > 1 else None for k, size in zip(at, shape))

    # Levels ---------------------------------------------------------------------------------------------------------

    def _level_of_argument(self, v, kind, is_live: bool) -> Level:
        match kind:
            case State():
                return Level.LANE
            case Number():
                self.number = v
                return Level.ROW
            case Arriving():
                self.arriving.append(v)
                self.arrivals.append(kind)
                return Level.LANE
            case Key():
                return Level.CONSTANT
            case _Draw():
                return self._level_of_draw(v) if is_live else Level.CONSTANT
        self.known[v] = kind
        return Level.CONSTANT

    def _level_of_draw(self, v) -> Level:
        if v.aval.shape == self.lanes:
            self.normals.append(v)
            return Level.LANE
        # A draw that several lanes share belongs to none of them: it is made before the loop.
        self.shared_normals.append(v)
        return Level.ROW

    def _level_of(self, eqn) -> Level:
        level = max((self.level[v] for v in jaxprs.variables(eqn.invars)), default=Level.STATIC)
        if eqn.primitive.name == "optimization_barrier":
            return max(level, Level.CONSTANT)
        if level is Level.ROW and eqn.primitive.name in ELEMENTWISE:
            rows = [self.source(v)[0] for v in jaxprs.variables(eqn.invars) if self.level[v] is Level.ROW]
            # One value a step and lane takes memory: what makes more lanes of a row is left to the loop.
            return Level.ROW if eqn.outvars[0].aval.size <= max(v.aval.size for v in rows) else Level.LANE
        return level

    def source(self, v) -> tuple[Any, Axes]:
        """The smallest variable that a variable only copies, itself if there is none, and where the axes of it are."""
        return self.copies.get(v) or (v, tuple(range(v.aval.ndim)))

    def _note_copy(self, eqn) -> None:
        operand, out = eqn.invars[0], eqn.outvars[0]
        if isinstance(operand, Literal):
            return
        source, axes = self.source(operand)
        moved = moved_axes(eqn, tuple(range(operand.aval.ndim)))
        if moved is not None:
            to = {old: new for new, old in enumerate(moved) if old is not None}
            self.copies[out] = source, tuple(to.get(a) if a is not None else None for a in axes)

    # What needs what ------------------------------------------------------------------------------------------------

    def needed_for(self, outs, known: set) -> list:
        """The equations that make ``outs`` from the variables ``known`` and from arguments, in order."""
        return jaxprs.needed_for(outs, self.jaxpr.eqns, known)

    def follows_step(self, v, eqns) -> bool:
        """Whether equations make ``v`` from states after a step, the step's number and constants only."""
        results = {v for eqn in self.jaxpr.eqns for v in eqn.outvars}
        free = {self.number, *jaxprs.variables(self.after), *results}
        return all(o in free or self.level[o] <= Level.CONSTANT for o in jaxprs.read_by(eqns) | {v})


# Equations that only move axes --------------------------------------------------------------------------------------


def _by_permutation(eqn, axes: Axes) -> Axes:
    return tuple(axes[k] for k in eqn.params["permutation"])


def _by_broadcast(eqn, axes: Axes) -> Axes:
    to: list[Any] = [None] * eqn.outvars[0].aval.ndim
    for a, size, k in zip(axes, eqn.invars[0].aval.shape, eqn.params["broadcast_dimensions"]):
        to[k] = a if size > 1 else None
    return tuple(to)


def _by_sizes(eqn, axes: Axes) -> Axes | None:
    """The axes with a size stay in order, and those of size 1 come and go."""
    before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    if [n for n in before if n > 1] != [n for n in after if n > 1]:
        return None
    with_size = iter([a for a, n in zip(axes, before) if n > 1])
    return tuple(next(with_size) if n > 1 else None for n in after)


MOVES = {
    "broadcast_in_dim": _by_broadcast,
    "transpose": _by_permutation,
    "reshape": _by_sizes,
    "squeeze": _by_sizes,
    "expand_dims": _by_sizes,
}


def only_moves(eqn) -> bool:
    """Whether an equation changes the shape of its first operand only."""
    name = eqn.primitive.name
    # Transposition leaves sums over no axis behind.
    return name in MOVES or (name.startswith("reduce_") and eqn.params.get("axes") == ())


def moved_axes(eqn, axes: Axes) -> Axes | None:
    """Where the axes of an operand are in the result, None where one is new; None where they are mixed."""
    move = MOVES.get(eqn.primitive.name)
    return axes if move is None else move(eqn, axes)


# Flattening ---------------------------------------------------------------------------------------------------------


def _is_normal(eqn) -> bool:
    named = eqn.primitive.name in jaxprs.CALLS and eqn.params.get("name") == _NORMAL
    return named and any(jnp.issubdtype(v.aval.dtype, jax.dtypes.prng_key) for v in eqn.invars)


def _flattened(closed, outs: Sequence[int]) -> tuple[Any, list[_Draw]]:
    """A jaxpr without calls and dead code, whose last arguments are the normals that it drew, and these."""
    draws = [_Draw(eqn.outvars[0].aval) for eqn, _ in jaxprs.walk(closed.jaxpr, _is_normal) if _is_normal(eqn)]
    n_consts, n_draws = len(closed.jaxpr.constvars), len(draws)

    def fun(*flat):
        normals = iter(flat[len(flat) - n_draws :])

        def rule(eqn, operands):
            return [next(normals)] if _is_normal(eqn) else jaxprs.inline(eqn, operands, rule)

        results = jaxprs.evaluate(closed.jaxpr, flat[:n_consts], flat[n_consts : len(flat) - n_draws], rule)
        return [results[k] for k in outs]

    avals = [v.aval for v in (*closed.jaxpr.constvars, *closed.jaxpr.invars)] + [d.aval for d in draws]
    with meshless():
        traced = jax.make_jaxpr(fun)(*[jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals])
    return jaxprs.drop_dead(traced), draws


def _refuse_draws(closed, jaxpr, kinds: dict[Any, Any], label: str) -> None:
    """Where a key is still read, something else than a normal is drawn from it."""
    live = jaxprs.read_by(jaxpr.eqns)
    if any(isinstance(kind, Key) and v in live for v, kind in kinds.items()):
        names = ", ".join(dict.fromkeys(_draw_names(closed.jaxpr))) or "a function"
        raise Unsupported(f"{label} draws random numbers by {names} of jax.random, and only normals are fused")


def _draw_names(jaxpr) -> Iterator[str]:
    """The functions that draw random bits, other than normals."""
    for eqn, calls in jaxprs.walk(jaxpr, _is_normal):
        if eqn.primitive.name == "random_bits":
            names = ["bits", *(call.params["name"].strip("_") for call in calls if "name" in call.params)]
            yield f"'{names[-1]}'"
