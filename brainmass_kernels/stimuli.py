"""Stimuli: functions of time and parameters that are added to inputs, and computed within the loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np

from . import derivatives, timing, units
from ._jax import is_traced, values_here
from .models.base import refuse_nan
from .pointwise import check_pointwise

TIME, RATE, LEVEL, NUMBER = "a time", "a frequency", "a level", "a number"


class Parameter(NamedTuple):
    """What a parameter of a stimulus takes.

    Attributes
    ----------
    kind : `TIME`, `RATE`, `LEVEL`, which has the unit of the input, or `NUMBER`; or a unit
    above : a bound that it must be above
    """

    kind: Any
    above: float | None = None

    def unit(self, of_input, time_unit) -> Any:
        """The unit of the numbers that the stimulus is computed with."""
        known = {TIME: time_unit, RATE: time_unit**-1, LEVEL: of_input, NUMBER: units.UNITLESS}
        return known.get(self.kind, self.kind) if isinstance(self.kind, str) else self.kind


POSITIVE_TIME = Parameter(TIME, 0.0)


class Form(NamedTuple):
    """A stimulus without its values: what its program depends on.

    Attributes
    ----------
    input : what it is added to
    place : the position among the stimuli of that input
    kind : the class
    present : names of the parameters that it has
    moments, cycles : names of its times and phases, see `timing`
    """

    input: str
    place: int
    kind: type[Stimulus]
    present: tuple[str, ...]
    moments: tuple[str, ...]
    cycles: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.input}.{self.place}"

    def labels(self, digits: int) -> tuple[str, ...]:
        """The names of its values in a run."""
        return (*self.present, *timing.labels(self.moments, self.cycles, digits))

    def check(self, aval) -> None:
        """Raise unless a function of the user's mixes no lanes, and returns one number a lane."""
        function = getattr(self.kind, "function", None)
        if function is None:
            return
        names = [n for n in self.kind.takes if n not in ("onset", "amplitude")]

        def of_lanes(t, *own):
            return [jnp.asarray(function(t, **dict(zip(names, own))), t.dtype)]

        check_pointwise(of_lanes, [aval] * (1 + len(names)), f"the stimulus '{self.kind.__name__}'")

    def value(self, values: Mapping[str, Any], clock, dt, time_unit, stage: float) -> Any:
        """What it adds to its input at a stage of a step, in the input's unit.

        Parameters
        ----------
        values : by `labels`
        clock : the digits of the step's number
        dt, time_unit : of the model
        """
        p = SimpleNamespace(**{n: values.get(n) for n in self.kind.takes})
        dt = units.scaled(dt, _factor(time_unit, self.kind.time_unit))
        return p.amplitude * self.kind.course(timing.InLoop(clock, dict(values), dt, stage), p)


def _factor(time_unit, own) -> float:
    return 1.0 if own is None else float(time_unit.magnitude) / float(own.magnitude)


# Before 0.6 brainunit leaves a sum to its right operand only if that is a matrix of this class.
_Summand: Any = u.sparse.SparseMatrix if tuple(map(int, u.__version__.split(".")[:2])) < (0, 6) else object


class _OnlySums(_Summand):
    """What is added, and takes part in no other arithmetic."""

    def _refused(self, *_):
        raise TypeError("a stimulus takes '+' alone: give it another 'amplitude', a negative one to subtract it")

    __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __neg__ = _refused


class Stimulus(_OnlySums):
    """A function of time and parameters that is added to an input; see `Pulse` and `stimulus`.

    Attributes
    ----------
    takes : its parameters
    timed : names of those that make its times and phases
    time_unit : the unit of its times within it; ``None``, the model's
    """

    takes: ClassVar[Mapping[str, Parameter]]
    timed: ClassVar[tuple[str, ...]] = ("onset",)
    time_unit: ClassVar[Any] = None
    # Numpy leaves sums to `__radd__`.
    __array_ufunc__ = None

    def __init_subclass__(cls):
        jax.tree_util.register_pytree_node(cls, _flat, lambda _, values, cls=cls: made_of(cls, values))

    def __post_init__(self):
        for name, (kind, above) in self.takes.items():
            value, label = getattr(self, name), f"{type(self).__name__}.{name}"
            if value is None:
                if _default(type(self), name) is not None:
                    raise TypeError(f"'{label}' got None, but takes {kind}")
                continue
            if kind is LEVEL:
                magnitude = units.real(u.get_magnitude(value), label)
            else:
                magnitude = units.strip(value, Parameter(kind).unit(None, u.second), label)
            refuse_nan(magnitude, label, infinite=True)
            low = None if is_traced(magnitude) else np.min(values_here(magnitude), initial=np.inf)
            if above is not None and low is not None and not low > above and name != "edge":
                takes = "a positive time" if kind is TIME else f"more than {above:g}"
                raise ValueError(f"'{label}' got {value}, but takes {takes}")

    @staticmethod
    def moments(p: SimpleNamespace) -> dict[str, Any]:
        """The times that it is computed from, by name."""
        return {"onset": p.onset}

    @staticmethod
    def cycles(p: SimpleNamespace) -> dict[str, tuple[str, Any, bool]]:
        """Of each phase ``(parameter that is its rate, offset, whether that is a period)``, by name."""
        return {}

    @staticmethod
    def course(t, p: SimpleNamespace) -> Any:
        """Its course for an amplitude of 1, from a `timing.InLoop` and parameters."""
        raise NotImplementedError

    @property
    def is_hard(self) -> bool:
        """Whether it jumps, so that it has no derivative with respect to its times."""
        return False

    def __add__(self, other):
        return Drive(None, (self,)) + other

    def __radd__(self, other):
        return Drive(None, (self,)).__radd__(other)

    def values(self, times) -> Any:
        """Its values at some times, as a quantity.

        Parameters
        ----------
        times : Quantity, ``(T,)``; parameters that are no single numbers broadcast to the axes before
        """
        of_input = units.unit_of(self.amplitude)  # pyright: ignore
        own = type(self).time_unit or u.second
        p = SimpleNamespace(**numbers_of(self, type(self).__name__, of_input, own))
        for name, x in vars(p).items():
            vars(p)[name] = None if x is None else jnp.asarray(x)[..., None] if np.ndim(x) else x
        cycles = {}
        for name, (rate, offset, period) in self.cycles(p).items():
            each = getattr(p, rate)
            cycles[name] = 1.0 / each if period else each, offset
        at = timing.AtTimes(units.strip(times, own, "times"), self.moments(p), cycles)
        return units.attach(p.amplitude * self.course(at, p), of_input)


def _flat(stimulus: Stimulus):
    return tuple(getattr(stimulus, n) for n in stimulus.takes), None


def made_of(cls: type, values) -> Stimulus:
    """Without a check: JAX puts objects of its own in the place of values."""
    made = object.__new__(cls)
    for name, value in zip(cls.takes, values, strict=True):
        object.__setattr__(made, name, value)
    return made


def _default(cls: type, name: str) -> Any:
    return next(f.default for f in dataclasses.fields(cls) if f.name == name)


def numbers_of(stimulus: Stimulus, label: str, of_input, time_unit) -> dict[str, Any]:
    """Its parameters without units; ``None`` where it has none."""
    found = {}
    for name, parameter in stimulus.takes.items():
        value, unit = getattr(stimulus, name), parameter.unit(of_input, time_unit)
        if name == "edge" and is_zero(value):
            value = None
        if value is not None:
            value = units.strip(value, unit, f"{label}.{name}")
            if not isinstance(parameter.kind, str):
                value = units.scaled(value, units.time_factor(unit, time_unit, name))
        found[name] = value
    return found


def is_zero(edge) -> bool:
    """Whether an edge is 0, and so as hard as none."""
    if edge is None or is_traced(magnitude := u.get_magnitude(edge)):
        return False
    return not np.any(values_here(magnitude))


@jax.tree_util.register_pytree_node_class
class Drive(_OnlySums):
    """An input with stimuli: the sum of a constant, or of one value a step, and of some stimuli."""

    __array_ufunc__ = None

    def __init__(self, base, stimuli: tuple[Stimulus, ...]):
        self.base, self.stimuli = base, stimuli

    def tree_flatten(self):
        return (self.base, self.stimuli), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)

    def __add__(self, other):
        if isinstance(other, Stimulus):
            return Drive(self.base, (*self.stimuli, other))
        if isinstance(other, Drive):
            return Drive(self.base, (*self.stimuli, *other.stimuli))._plus(other.base)
        return self._plus(other)

    __radd__ = __add__

    def _plus(self, base) -> Drive:
        if base is None or (isinstance(base, int) and base == 0):
            return self
        return Drive(base if self.base is None else self.base + base, self.stimuli)

    def parameter(self, name: str) -> Any:
        """The value of one parameter, ``"0.onset"``."""
        place, _, parameter = name.partition(".")
        return getattr(self.stimuli[int(place)], parameter)

    def replace(self, name: str, value) -> Drive:
        """With another value of one parameter, ``"0.onset"``."""
        place, _, parameter = name.partition(".")
        stimuli = list(self.stimuli)
        one = stimuli[int(place)]
        stimuli[int(place)] = made_of(type(one), [value if n == parameter else getattr(one, n) for n in one.takes])
        return Drive(self.base, tuple(stimuli))

    def values(self, times) -> Any:
        """The sum at some times, as a quantity; the base is a constant."""
        values = [one.values(times) for one in self.stimuli]
        return sum(values[1:], values[0] if self.base is None else self.base + values[0])

    def __repr__(self) -> str:
        return " + ".join(map(repr, (*([] if self.base is None else [self.base]), *self.stimuli)))


def drives_of(inputs: Mapping[str, Any]) -> dict[str, Drive]:
    """The inputs that have stimuli.

    Raises
    ------
    TypeError : a class of stimuli in place of one of it
    """
    if not isinstance(inputs, Mapping):
        return {}  # which a run refuses
    for name, x in inputs.items():
        if isinstance(x, type) and issubclass(x, Stimulus):
            raise TypeError(f"'{name}' got the class {x.__name__}, but takes a stimulus of it: {x.__name__}(...)")
    found = {n: Drive(None, (x,)) if isinstance(x, Stimulus) else x for n, x in inputs.items()}
    return {n: x for n, x in found.items() if isinstance(x, Drive)}


def refuse(values: Mapping[str, Any], argument: str) -> None:
    """Raise TypeError where there are stimuli in an argument that takes none."""
    if drives := drives_of(values):
        raise TypeError(f"'{argument}' got a stimulus for {next(iter(drives))}, but stimuli are added to inputs")


def with_base(given, base):
    """An input with another constant, and the stimuli that it has."""
    drive = next(iter(drives_of({"": given}).values()), None)
    return base if drive is None else Drive(base, drive.stimuli)


def names_of(inputs: Mapping[str, Any]) -> dict[str, tuple[str, str, Parameter]]:
    """The input, the ``"place.parameter"`` and the `Parameter` of each of the stimuli's parameters, by its full name.

    ``"E_inp.onset"`` where one stimulus of the input has an onset; of several, ``"E_inp.0.onset"`` and so on.
    """
    found = {}
    for name, drive in drives_of(inputs).items():
        for place, one in enumerate(drive.stimuli):
            for parameter, takes in one.takes.items():
                if getattr(one, parameter) is None:
                    continue
                several = sum(getattr(other, parameter, None) is not None for other in drive.stimuli) > 1
                full = f"{name}.{place}.{parameter}" if several else f"{name}.{parameter}"
                found[full] = name, f"{place}.{parameter}", takes
    return found


def kinds_of(inputs: Mapping[str, Any]) -> dict[str, list]:
    """The names of kinds and parameters of the stimuli of each input, ready for JSON."""
    found = {}
    for name, drive in drives_of(inputs).items():
        present = [[n for n in one.takes if getattr(one, n) is not None] for one in drive.stimuli]
        found[name] = [[type(one).__name__, names] for one, names in zip(drive.stimuli, present, strict=True)]
    return found


class Stimuli(NamedTuple):
    """The stimuli of a run.

    Attributes
    ----------
    forms : what the program depends on
    numbers : of each the parameters without units, ``None`` where it has none
    """

    forms: tuple[Form, ...] = ()
    numbers: tuple[dict[str, Any], ...] = ()

    @classmethod
    def of(cls, drives: Mapping[str, Drive], units_of_inputs: Mapping[str, Any], time_unit, spread) -> Stimuli:
        """From the inputs that have stimuli; ``spread(input, value)`` gives one value to each region of a network."""
        forms, numbers = [], []
        for name, drive in drives.items():
            for place, one in enumerate(drive.stimuli):
                p = _checked(one, name, units_of_inputs[name], type(one).time_unit or time_unit)
                p = {n: x if x is None else spread(name, x) for n, x in p.items()}
                probe = SimpleNamespace(**{n: None if x is None else 1.0 for n, x in p.items()})
                present = tuple(n for n, x in p.items() if x is not None)
                moments, cycles = tuple(one.moments(probe)), tuple(one.cycles(probe))
                forms.append(Form(name, place, type(one), present, moments, cycles))
                numbers.append(p)
        return cls(tuple(forms), tuple(numbers))

    @property
    def named(self) -> dict[str, Any]:
        """All parameters by full name, for shapes and dtypes."""
        pairs = zip(self.forms, self.numbers, strict=True)
        return {f"{form.name}.{n}": p[n] for form, p in pairs for n in form.present}

    def data(self, dt: float, time_unit, digits: int) -> tuple:
        """The values of all forms, in the order of their labels; ``dt`` in the model's unit of time."""
        found = []
        for form, p in zip(self.forms, self.numbers, strict=True):
            step = dt * _factor(time_unit, form.kind.time_unit)
            timed = timing.together(*(p[n] for n in form.kind.timed if p[n] is not None))
            names = [n for n in form.kind.timed if p[n] is not None]
            q = SimpleNamespace(**{**p, **dict(zip(names, timed, strict=True))})
            values = {n: p[n] for n in form.present}
            for name, time in form.kind.moments(q).items():
                values |= timing.moment(name, time, step, digits)
            for name, (rate, offset, period) in form.kind.cycles(q).items():
                values |= timing.cycle(name, timing.together(p[rate])[0], offset, step, digits, period)
            found += [values[label] for label in form.labels(digits)]
        return tuple(found)


def _checked(stimulus: Stimulus, name: str, of_input, time_unit) -> dict[str, Any]:
    """Its numbers; those times of one that jumps are not to be differentiated."""
    kind, label = type(stimulus).__name__, f"{name}: {type(stimulus).__name__}"
    p = numbers_of(stimulus, label, of_input, time_unit)
    edge = p.get("edge")
    if edge is not None and not is_traced(edge) and not np.min(values_here(edge)) > 0.0:
        raise ValueError(f"'{label}.edge' got {stimulus.edge}, but takes positive times, or 0 for all: a hard edge")
    if not any(is_traced(p[n]) for n in stimulus.timed if p[n] is not None) or not stimulus.is_hard:
        return p
    how = f"give {kind} an `edge`" if "edge" in p else "let the function begin at 0, as t * exp(-t) does"
    for n in stimulus.timed:
        message = (
            f"a gradient in '{label}.{n}': this stimulus has a hard edge, and moving it changes nothing until it "
            f"reaches the next step. To differentiate it, {how}"
        )
        p[n] = derivatives.once(p[n], message)
    return p
