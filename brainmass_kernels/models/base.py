"""What a model is: parameters with units, states, inputs, observables, and its equations in jnp."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple, dataclass_transform

import brainunit as u
import jax
import numpy as np

from .. import functional, units
from .._jax import is_traced


class Block(NamedTuple):
    """A second-order block: ``x'' = A a u - 2 a x' - a^2 x``, by the names of its states and parameters."""

    position: str
    velocity: str
    A: str
    a: str


class Model:
    """A neural mass model; subclass it under the `model` decorator.

    Inside a model's methods everything is a plain array: parameters, states and inputs in the units declared here, and
    time in ``time_unit``. Any field may be an array: the fields, inputs and initial states broadcast to the batch.

    Attributes
    ----------
    states : unit of each state, in order
    inputs : default of each input
    observables : unit of each observable, the first is recorded by default
    time_unit : the time of the drift
    scheme : used where `simulate` is given none
    initial : where a state starts unless `simulate` is told; zero where not named
    pairs : (position, velocity) of the states whose rate is another state, for scheme "symplectic_euler"
    also : a second unit that a field takes, read as if it were the first
    """

    states: ClassVar[Mapping[str, Any]]
    inputs: ClassVar[Mapping[str, Any]] = {}
    observables: ClassVar[Mapping[str, Any]] = {}
    time_unit: ClassVar[Any] = u.second
    scheme: ClassVar[str] = "heun"
    initial: ClassVar[Mapping[str, Any]] = {}
    pairs: ClassVar[tuple[tuple[str, str], ...]] = ()
    also: ClassVar[Mapping[str, Any]] = {}

    @staticmethod
    def drift(s: SimpleNamespace, p: SimpleNamespace, i: SimpleNamespace) -> dict[str, Any]:
        """The time derivative of each state, from states ``s``, parameters ``p`` and inputs ``i``."""
        raise NotImplementedError

    @staticmethod
    def observe(s: SimpleNamespace, p: SimpleNamespace) -> dict[str, Any]:
        """Each observable."""
        return {}

    @staticmethod
    def diffusion(s: SimpleNamespace, p: SimpleNamespace) -> dict[str, Any]:
        """What the intensity of the white noise on a state is multiplied with, by its name; 1 where not named."""
        return {}

    @classmethod
    def parameters(cls) -> dict[str, Any]:
        """The default of each parameter."""
        return {
            f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
            for f in dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]
        }

    @classmethod
    def parameter_units(cls) -> dict[str, Any]:
        """The unit of each parameter."""
        return {name: units.unit_of(default) for name, default in cls.parameters().items()}

    @classmethod
    def recordable(cls) -> dict[str, Any]:
        """The unit of everything that can be recorded: observables, then states."""
        return {**cls.observables, **cls.states}

    def __post_init__(self):
        for name, unit in self.parameter_units().items():
            magnitude = units.strip(getattr(self, name), unit, name, self.also.get(name))
            refuse_nan(magnitude, name)

    def magnitudes(self) -> dict[str, Any]:
        """The parameters as plain arrays in their units."""
        return {
            name: units.strip(getattr(self, name), unit, name, self.also.get(name))
            for name, unit in self.parameter_units().items()
        }


def remade(make: Callable, base: type[Model], *arguments) -> Callable:
    """What pickles a model whose class ``make(base, *arguments)`` made: the class has no place to be found at."""

    def reduce(self: Model):
        return _blank, (_recipe(type(self)),), dict(vars(self))

    reduce.recipe = make, base, arguments
    return reduce


def _recipe(cls: type[Model]):
    """How a class was made, from classes that can be imported; of another the class itself."""
    how = getattr(cls.__dict__.get("__reduce__"), "recipe", None)
    if how is None:
        return cls
    make, base, arguments = how
    return make, _recipe(base), arguments


def _blank(recipe) -> Model:
    """A model without values, which unpickling puts in."""
    return object.__new__(_class_of(recipe))


def _class_of(recipe) -> type[Model]:
    if isinstance(recipe, type):
        return recipe
    make, base, arguments = recipe
    return make(_class_of(base), *arguments)


class SecondOrderModel(Model):
    """A model made of second-order blocks; give ``blocks`` and ``drive``, and the drift follows by `sys2nd`."""

    blocks: ClassVar[tuple[Block, ...]] = ()
    scheme: ClassVar[str] = "strang"

    def __init_subclass__(cls, **more):
        super().__init_subclass__(**more)
        cls.pairs = tuple((b.position, b.velocity) for b in cls.blocks)

    @staticmethod
    def drive(s: SimpleNamespace, p: SimpleNamespace, i: SimpleNamespace) -> dict[str, Any]:
        """The drive ``u`` of each block by the name of its position; it depends on positions only."""
        raise NotImplementedError

    @classmethod
    def drift(cls, s, p, i):
        drive = cls.drive(s, p, i)
        rates = {}
        for b in cls.blocks:
            x, v, A, a = getattr(s, b.position), getattr(s, b.velocity), getattr(p, b.A), getattr(p, b.a)
            rates[b.position], rates[b.velocity] = v, functional.sys2nd(A, a, drive[b.position], x, v)
        return rates


@dataclass_transform(kw_only_default=True, frozen_default=True)
def model(cls):
    """Make a model of a class: a frozen dataclass whose fields are keyword arguments, and a pytree."""
    for name in inspect.get_annotations(cls):
        default = cls.__dict__.get(name)
        if isinstance(default, u.Quantity):  # unhashable, which a dataclass takes for mutable
            setattr(cls, name, dataclasses.field(default_factory=lambda default=default: default))
    cls = dataclasses.dataclass(frozen=True, kw_only=True, eq=False)(cls)
    names = [f.name for f in dataclasses.fields(cls)]

    def flatten(self):
        return [(jax.tree_util.GetAttrKey(n), getattr(self, n)) for n in names], None

    def unflatten(_, values):
        self = object.__new__(cls)  # unchecked: leaves may be tracers, shapes or None
        for n, v in zip(names, values):
            object.__setattr__(self, n, v)
        return self

    jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)
    make = cls.__init__

    @functools.wraps(make)
    def init(self, **fields):
        for name in fields:
            check_name(name, names, "parameter", TypeError)
        make(self, **fields)

    cls.__init__ = init
    return cls


def refuse_nan(magnitude, name: str) -> None:
    if not is_traced(magnitude) and np.isnan(magnitude).any():
        lanes = np.argwhere(np.isnan(np.atleast_1d(magnitude)))
        raise ValueError(f"'{name}' got NaN (first at {tuple(map(int, lanes[0]))}), but takes finite numbers")


def check_name(name: str, known, what: str, error: type[Exception] = ValueError) -> None:
    """Raise ``error``, with the closest known name, unless ``name`` is one of ``known``."""
    if name not in known:
        close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.4)
        hint = f"; did you mean '{close[0]}'?" if close else "."
        raise error(f"unknown {what} '{name}'{hint} Known: {', '.join(known)}")
