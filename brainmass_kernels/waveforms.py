"""The library's stimuli, and those of the user's own."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np

from . import units
from ._jax import is_traced, values_here
from .stimuli import LEVEL, NUMBER, POSITIVE_TIME, RATE, TIME, Drive, Parameter, Stimulus, is_zero, made_of, numbers_of


@dataclasses.dataclass(frozen=True, eq=False)
class Pulse(Stimulus):
    """A pulse: ``amplitude`` from ``onset`` on, for ``width``.

    With an ``edge`` it rises and falls as logistic functions ``1 / (1 + exp(-t / edge))`` about the onset and the end,
    from 10 to 90 percent in 4.4 edges, and is differentiable in all its parameters. Without, both edges are hard and
    fall on the step that begins nearest to them.

    Parameters
    ----------
    onset, width : times, counted from the beginning of the run
    amplitude : in the unit of the input
    edge : a time; ``None`` or 0, a hard edge
    """

    onset: Any
    width: Any
    amplitude: Any
    edge: Any = None

    takes = {
        "onset": Parameter(TIME), "width": POSITIVE_TIME, "amplitude": Parameter(LEVEL), "edge": POSITIVE_TIME,
    }  # fmt: skip
    timed = ("onset", "width")

    @staticmethod
    def moments(p):
        return {"onset": p.onset, "end": p.onset + p.width}

    @staticmethod
    def course(t, p):
        if p.edge is None:
            return jnp.where(t.passed("onset"), jnp.where(t.passed("end"), 0.0, 1.0), 0.0)
        return jax.nn.sigmoid(t.since("onset") / p.edge) - jax.nn.sigmoid(t.since("end") / p.edge)

    @property
    def is_hard(self) -> bool:
        return self.edge is None or is_zero(self.edge)


@dataclasses.dataclass(frozen=True, eq=False)
class PulseTrain(Stimulus):
    """Pulses of ``width``, the first at ``onset``, the next a ``period`` later, and so on.

    Parameters
    ----------
    onset, width, period : times; the width is shorter than the period
    amplitude : in the unit of the input
    count : number of pulses; ``None``, to the end of the run
    edge : as of `Pulse`; it should be short beside the width and the time between pulses
    """

    onset: Any
    width: Any
    period: Any
    amplitude: Any
    count: Any = None
    edge: Any = None

    takes = {
        "onset": Parameter(TIME), "width": POSITIVE_TIME, "period": POSITIVE_TIME, "amplitude": Parameter(LEVEL),
        "count": Parameter(NUMBER, 0.0), "edge": POSITIVE_TIME,
    }  # fmt: skip
    timed = ("onset", "width", "period", "count")

    def __post_init__(self):
        super().__post_init__()
        width, period = (units.strip(x, u.second, "width") for x in (self.width, self.period))
        if is_traced(width) or is_traced(period):
            return
        if np.any(values_here(width) >= values_here(period)):
            raise ValueError(
                f"'PulseTrain.width' got {self.width}, but takes less than the period, {self.period}: pulses would meet"
            )

    @staticmethod
    def moments(p):
        # Half a period about the middle of a pulse is its own.
        first = p.onset + (p.width - p.period) / 2.0
        return {"first": first} | ({} if p.count is None else {"last": first + p.count * p.period})

    @staticmethod
    def cycles(p):
        return {"pulse": ("period", (p.onset + p.width / 2.0) / p.period, True)}

    @staticmethod
    def course(t, p):
        if p.edge is None:
            value = jnp.where(jnp.abs(t.cycle("pulse", middle=True)) * p.period < p.width / 2.0, 1.0, 0.0)
        else:
            time = t.cycle("pulse") * p.period
            rise, fall = (time + p.width / 2.0) / p.edge, (time - p.width / 2.0) / p.edge
            value = jax.nn.sigmoid(rise) - jax.nn.sigmoid(fall)
        value = jnp.where(t.passed("first"), value, 0.0)
        return value if p.count is None else jnp.where(t.passed("last"), 0.0, value)

    @property
    def is_hard(self) -> bool:
        return self.edge is None or is_zero(self.edge)


@dataclasses.dataclass(frozen=True, eq=False)
class Sine(Stimulus):
    """A sine wave, ``amplitude * sin(2 pi frequency (t - onset) + phase)``, from the beginning of the run to its end.

    Parameters
    ----------
    frequency : of cycles
    amplitude : in the unit of the input
    phase : in radians
    onset : the time at which the wave has that phase
    """

    frequency: Any
    amplitude: Any
    phase: Any = 0.0
    onset: Any = dataclasses.field(default_factory=lambda: 0.0 * u.second)

    takes = {
        "frequency": Parameter(RATE), "amplitude": Parameter(LEVEL), "phase": Parameter(NUMBER),
        "onset": Parameter(TIME),
    }  # fmt: skip
    timed = ("frequency", "phase", "onset")

    @staticmethod
    def moments(p):
        return {}

    @staticmethod
    def cycles(p):
        return {"wave": ("frequency", p.frequency * p.onset - p.phase / (2.0 * math.pi), False)}

    @staticmethod
    def course(t, p):
        return jnp.sin(2.0 * math.pi * t.cycle("wave"))


@dataclasses.dataclass(frozen=True, eq=False)
class Ramp(Stimulus):
    """A ramp: 0 before ``onset``, then a straight line to ``amplitude``, which it reaches after ``width`` and keeps.

    Parameters
    ----------
    onset, width : times
    amplitude : in the unit of the input
    """

    onset: Any
    width: Any
    amplitude: Any

    takes = {"onset": Parameter(TIME), "width": POSITIVE_TIME, "amplitude": Parameter(LEVEL)}

    @staticmethod
    def course(t, p):
        return jnp.minimum(jnp.maximum(t.since("onset") / p.width, 0.0), 1.0)


@dataclasses.dataclass(frozen=True, eq=False)
class GammaBump(Stimulus):
    """A bump with the course of a gamma density, the input of models of evoked responses.

    From ``onset`` on it is ``amplitude * (x exp(1 - x))^(shape - 1)`` of ``x = (t - onset) / peak``: 0 at the onset and
    largest, ``amplitude``, a time ``peak`` later. As a density its shape is ``shape`` and its rate
    ``(shape - 1) / peak``.

    Parameters
    ----------
    onset, peak : times; the peak is counted from the onset
    amplitude : in the unit of the input
    order : the shape of the gamma density, above 1; from 2 on the bump is differentiable in its onset

    References
    ----------
    David, O., et al. (2006). Dynamic causal modeling of evoked responses in EEG and MEG. NeuroImage, 30, 1255-1272.
    """

    onset: Any
    peak: Any
    amplitude: Any
    order: Any = 3.0

    takes = {
        "onset": Parameter(TIME), "peak": POSITIVE_TIME, "amplitude": Parameter(LEVEL), "order": Parameter(NUMBER, 1.0),
    }  # fmt: skip

    @staticmethod
    def course(t, p):
        x = t.since("onset") / p.peak
        begun = x > 0.0
        safe = jnp.where(begun, x, 1.0)
        return jnp.where(begun, jnp.exp((p.order - 1.0) * (jnp.log(safe) + 1.0 - safe)), 0.0)


def of_kinds(kinds: Mapping[str, list]) -> dict[str, Drive]:
    """Inputs with stimuli of these kinds, all of whose parameters are 0.

    Raises
    ------
    ValueError : a kind of the user's own
    """
    library: Any = {cls.__name__: cls for cls in (Pulse, PulseTrain, Sine, Ramp, GammaBump)}
    if unknown := [kind for each in kinds.values() for kind, _ in each if kind not in library]:
        raise ValueError(
            f"a saved fit holds the library's stimuli, {', '.join(library)}, but '{unknown[0]}' is a function of your "
            f"own: keep fit.parameters, and fit.inputs by your own code"
        )

    def zero(kind: str, present: list[str]) -> Stimulus:
        return made_of(library[kind], [0.0 if n in present else None for n in library[kind].takes])

    return {name: Drive(None, tuple(zero(*one) for one in each)) for name, each in kinds.items()}


# Stimuli of the user's own ------------------------------------------------------------------------------------------


def stimulus(function: Callable | None = None, *, time_unit=u.ms, causal: bool = True) -> Any:
    """Make a kind of stimulus of a function of time and parameters.

    The function gives the course for an amplitude of 1. Its first argument is the time since the onset, the others have
    defaults with units. All are plain numbers within it, one a lane, with every time in ``time_unit``. As the equations
    of a model, it is written in ``jnp`` and pointwise, and it is traced and checked when it is first run.

    Parameters
    ----------
    function : ``(t, **parameters) -> course``
    time_unit : of ``t`` and of all times among the parameters
    causal : whether the stimulus is 0 before the onset; else the function is asked for negative times as well

    Returns
    -------
    a class whose instances are stimuli: ``kind(onset=, amplitude=, **parameters)``

    Raises
    ------
    TypeError, ValueError : a signature that is no such one
    """
    if function is None:
        return lambda function: stimulus(function, time_unit=time_unit, causal=causal)
    if not callable(function):
        raise TypeError(f"'stimulus' got {type(function).__name__}, but takes a function of time and parameters")
    if not isinstance(time_unit, u.Unit) or time_unit.dim != u.second.dim:
        raise TypeError(f"'time_unit' got {time_unit!r}, but takes a unit of time, such as u.ms")
    name = getattr(function, "__name__", "stimulus")
    arguments = list(inspect.signature(function).parameters.values())
    if not arguments:
        raise TypeError(f"the stimulus '{name}' takes no argument, but needs the time as its first")
    takes = {"onset": Parameter(TIME), "amplitude": Parameter(LEVEL)}
    fields: list[Any] = [("onset", Any), ("amplitude", Any)]
    for one in arguments[1:]:
        if one.name in takes:
            raise ValueError(f"the stimulus '{name}' has a parameter '{one.name}', which every stimulus has by itself")
        if one.default is one.empty:
            raise TypeError(f"the stimulus '{name}' has no default of '{one.name}': it takes one, with its unit")
        unit = units.unit_of(one.default)
        takes[one.name] = Parameter(unit)
        fields.append((one.name, Any, dataclasses.field(default_factory=lambda x=one.default: x)))

    def course(t, p):
        own = {n: getattr(p, n) for n in takes if n not in ("onset", "amplitude")}
        time = t.since("onset")
        if not causal:
            return function(time, **own)
        return jnp.where(t.started("onset"), function(jnp.maximum(time, 0.0), **own), 0.0)

    def begins_with_a_jump(self) -> bool:
        if not causal:
            return False
        with jax.ensure_compile_time_eval():
            numbers = made_of(type(self), [0.0 * time_unit, 1.0, *(_default_of(self, n) for n in list(takes)[2:])])
            own = numbers_of(numbers, name, units.UNITLESS, time_unit)
            own = {n: jnp.asarray(x) for n, x in own.items() if n not in ("onset", "amplitude")}
            return bool(jnp.any(jnp.abs(function(jnp.zeros(()), **own)) > 1e-6))

    space = {
        "takes": takes, "time_unit": time_unit, "course": staticmethod(course), "is_hard": property(begins_with_a_jump),
        "function": staticmethod(function), "__doc__": function.__doc__, "__module__": function.__module__,
    }  # fmt: skip
    return dataclasses.make_dataclass(name, fields, bases=(Stimulus,), namespace=space, frozen=True, eq=False)


def _default_of(one: Stimulus, name: str) -> Any:
    return next(f.default_factory() for f in dataclasses.fields(one) if f.name == name)  # pyright: ignore
