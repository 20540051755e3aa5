"""A model: parameters with units, states, inputs, observables, and its equations in jnp."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import itertools
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple, Self, TypeVar, dataclass_transform

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np

from .. import display, functional, units
from .._jax import is_traced, values_here
from ..equations import Key, key_of
from ..errors import check_name as check_name
from ..errors import meant as meant
from ..programs import on_clear
from .delayed import Delayed, check_delayed


class Block(NamedTuple):
    """A second-order block: ``x'' = A a u - 2 a x' - a^2 x``, by the names of its states and parameters."""

    position: str
    velocity: str
    A: str
    a: str


class TimeFactors(NamedTuple):
    """By name, the factor of a magnitude inside a model, where it is not 1."""

    parameters: dict[str, float]
    inputs: dict[str, float]
    states: dict[str, float]
    observables: dict[str, float]


class Model:
    """A neural mass model; subclass it under the `model` decorator.

    Inside a model's methods everything is a plain array: parameters, states and inputs in the units declared here, but
    with every time in ``time_unit``. With ``time_unit = u.ms``, a field of 20 Hz is 0.02 there, one of 2 mV/s is 0.002.
    So the same equations give the same run whatever unit of time a field is declared in. Any field may be an array: the
    fields, inputs and initial states broadcast to the batch.

    Attributes
    ----------
    states : unit of each state, in order
    inputs : default of each input
    observables : unit of each observable, the first is recorded by default
    time_unit : the time of the drift, and of all units in it
    scheme : the default of `simulate`
    initial : where a state starts unless `simulate` takes another value; zero where not named
    pairs : (position, velocity) of the states whose rate is another state, for scheme "symplectic_euler"
    also : by the name of a field, a second unit that it takes, read as if it were the first
    as_declared : names of fields, inputs, states and observables whose numbers the equations take in the very unit that
        is declared, whatever time it holds
    delayed : by the name under which the drift reads them, ``i.<name>``, observables and states of some time ago
    """

    states: ClassVar[Mapping[str, Any]]
    inputs: ClassVar[Mapping[str, Any]] = {}
    observables: ClassVar[Mapping[str, Any]] = {}
    time_unit: ClassVar[Any] = u.second
    scheme: ClassVar[str] = "heun"
    initial: ClassVar[Mapping[str, Any]] = {}
    pairs: ClassVar[tuple[tuple[str, str], ...]] = ()
    also: ClassVar[Mapping[str, Any]] = {}
    as_declared: ClassVar[tuple[str, ...]] = ()
    delayed: ClassVar[Mapping[str, Delayed]] = {}

    def __new__(cls, *_, **__):
        if "__dataclass_fields__" not in vars(cls):
            raise TypeError(f"{cls.__name__} has no decorator: write @bk.model above `class {cls.__name__}`")
        return super().__new__(cls)

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
        """The factor of the intensity of the white noise on each state, by its name; 1 where not named."""
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

    @classmethod
    def time_factors(cls) -> TimeFactors:
        """The factors that turn numbers in the declared units into those that the equations take."""

        def factors(unit_of: Mapping[str, Any]) -> dict[str, float]:
            every = {n: cls.time_factor(n, unit) for n, unit in unit_of.items()}
            return {n: factor for n, factor in every.items() if factor != 1.0}

        inputs = {n: units.unit_of(x) for n, x in cls.inputs.items()}
        known = TimeFactors(*map(factors, (cls.parameter_units(), inputs, cls.states, cls.observables)))
        # What is delayed is read as it is without the delay.
        now = {**known.states, **known.observables}
        late = {n: now[each.of] for n, each in cls.delayed.items() if each.of in now}
        return known._replace(inputs=known.inputs | late)

    @classmethod
    def time_factor(cls, name: str, unit) -> float:
        """The factor of one name, which has this unit."""
        return 1.0 if name in cls.as_declared else units.time_factor(unit, cls.time_unit, name)

    def __post_init__(self):
        for name, unit in self.parameter_units().items():
            value = getattr(self, name)
            refuse_nan(units.strip(value, unit, name, self.also.get(name)), name)
            object.__setattr__(self, name, floating(value))

    def _repr_html_(self) -> str:
        return display.model_table(self)

    def magnitudes(self) -> dict[str, Any]:
        """The parameters as plain arrays in their units, as declared."""
        return {
            name: units.strip(getattr(self, name), unit, name, self.also.get(name))
            for name, unit in self.parameter_units().items()
        }

    def replace(self, **fields) -> Self:
        """The model with other values of these fields, checked as those of a new one.

        Raises
        ------
        TypeError : an unknown field
        ValueError : a wrong unit, or NaN
        """
        return type(self)(**{name: getattr(self, name) for name in self.parameters()} | fields)

    def as_arrays(self) -> Self:
        """The model with every field a JAX array, units kept; what was one number has the type of the arrays.

        `jax.grad` and optax take Python numbers too; equinox's filters leave them out, and the carry of `jax.lax.scan`
        keeps its type only if it is arrays from the start.
        """
        return arrays_of(self)


def floating(value):
    """A number or an array, checked before, as floating point, with its unit: JAX does not differentiate integers."""
    if isinstance(value, u.Quantity):
        mantissa = floating(value.mantissa)
        return value if mantissa is value.mantissa else u.Quantity(mantissa, unit=value.unit)
    if isinstance(value, int):
        return float(value)
    value = np.asarray(value) if isinstance(value, (list, tuple)) else value
    if isinstance(value, float) or not jnp.issubdtype(value.dtype, jnp.integer):
        return value
    return value.astype(jnp.result_type(float)) if isinstance(value, jax.Array) else np.asarray(value, np.float64)


Tree = TypeVar("Tree")


def arrays_of(tree: Tree) -> Tree:
    """The pytree with JAX arrays as leaves; numbers get the widest type of its arrays, by default JAX's own."""
    leaves, structure = jax.tree.flatten(tree)
    loose = [isinstance(x, float) or getattr(x, "weak_type", False) for x in leaves]
    arrays = [x for x, free in zip(leaves, loose) if not free]
    with jax.numpy_dtype_promotion("standard"):
        widest = jnp.result_type(*arrays) if arrays else jnp.result_type(float)
    kinds = [jax.dtypes.canonicalize_dtype(widest if free else x.dtype) for x, free in zip(leaves, loose)]
    return jax.tree.unflatten(structure, [jnp.asarray(x, kind) for x, kind in zip(leaves, kinds)])


def derived(make: Callable) -> Callable:
    """``make(base, *arguments)``, a class derived from a model's, cached for as long as the base does not change."""

    @functools.lru_cache(maxsize=64)
    def cached(base: type[Model], _: Key, *arguments) -> type[Model]:
        return make(base, *arguments)

    on_clear(cached.cache_clear)
    return functools.wraps(make)(lambda base, *arguments: cached(base, key_of(base), *arguments))


def remade(make: Callable, base: type[Model], *arguments) -> Callable:
    """The ``__reduce__`` of models of a class that ``make(base, *arguments)`` built: pickle cannot find it by name."""

    def reduce(self: Model):
        return _blank, (_recipe(type(self)),), dict(vars(self))

    reduce.recipe = make, base, arguments
    return reduce


def _recipe(cls: type[Model]):
    """How a derived class is built from classes that can be imported; an importable class itself."""
    how = getattr(cls.__dict__.get("__reduce__"), "recipe", None)
    if how is None:
        return cls
    make, base, arguments = how
    return make, _recipe(base), arguments


def _blank(recipe) -> Model:
    """A model without values, which unpickling fills in."""
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
    """Turn a class into a model: a frozen dataclass whose fields are keyword arguments, and a pytree.

    Raises
    ------
    TypeError, ValueError : what is wrong in the class, such as an attribute without annotation, by its name
    """
    _check_fields(cls)
    for name in inspect.get_annotations(cls):
        default = cls.__dict__.get(name)
        if isinstance(default, u.Quantity):  # unhashable, which a dataclass takes for mutable
            setattr(cls, name, dataclasses.field(default_factory=lambda default=default: default))
    cls = dataclasses.dataclass(frozen=True, kw_only=True, eq=False)(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    _check_declared(cls)

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


# What a class declares, checked when it is decorated -----------------------------------------------------------------


def _check_fields(cls) -> None:
    """A class's own declarations: annotations where they belong, and defaults that are one number each."""
    if not (isinstance(cls, type) and issubclass(cls, Model)):
        raise TypeError(f"@bk.model got {getattr(cls, '__name__', cls)!r}, but takes a subclass of bk.Model")
    annotated, title = inspect.get_annotations(cls), cls.__name__
    for name, kind in annotated.items():
        constant = "ClassVar" in str(kind)
        if not constant and (hasattr(Model, name) or name in ("states", "blocks", "drive", "step")):
            raise TypeError(f"{title}.{name} has an annotation, which makes it a parameter: write `{name} = ...`")
        default = cls.__dict__.get(name)
        if not constant and (isinstance(default, (list, dict, set)) or np.ndim(u.get_magnitude(default)) > 0):
            raise ValueError(
                f"the default of {title}.{name} got {type(u.get_magnitude(default)).__name__}, but takes one number, "
                f"with its unit; several are given to the model when it is made: {title}({name}=...)"
            )
    for base in cls.__mro__[1:]:
        fields = [n for n, kind in inspect.get_annotations(base).items() if "ClassVar" not in str(kind)]
        if fields and issubclass(base, Model) and "__dataclass_fields__" not in vars(base):
            above = base.__name__
            raise TypeError(f"{above}.{fields[0]} is no parameter of {title}: write @bk.model above `class {above}`")
    for name, value in vars(cls).items():
        number = isinstance(value, (int, float, np.generic, np.ndarray, jax.Array, u.Quantity))
        if number and not (name in annotated or name.startswith("_") or hasattr(Model, name)):
            raise TypeError(
                f"{title}.{name} has no annotation, so it is no parameter: write `{name}: Any = {_shown(value)}`, or "
                f"`{name}: ClassVar = ...` for a constant"
            )


def _shown(value) -> str:
    text = str(u.get_magnitude(value)) if np.ndim(u.get_magnitude(value)) == 0 else "..."
    unit = units.unit_of(value)
    return text if unit.is_unitless else f"{text} * u.{unit}"


def _check_declared(cls: type[Model]) -> None:
    """The declarations of a class, its own and inherited ones, against each other."""
    title, parameters = cls.__name__, cls.parameters()
    if not isinstance(getattr(cls, "states", None), Mapping) or not cls.states:
        near = difflib.get_close_matches("states", [n for n in vars(cls) if n != "states"], n=1)
        hint = f"; is '{near[0]}' meant?" if near else ""
        raise TypeError(f"{title}.states is a dict of the unit of each state, such as {{'x': u.mV}}{hint}")
    for kind in ("states", "observables"):
        for name, unit in _named(cls, kind).items():
            if not isinstance(unit, u.Unit):
                raise TypeError(
                    f"{title}.{kind}[{name!r}] got {type(unit).__name__}, but takes a unit, such as u.mV or u.UNITLESS"
                )
    for name, default in _named(cls, "inputs").items():
        if isinstance(default, u.Unit):
            raise TypeError(f"{title}.inputs[{name!r}] got a unit, but takes a default: 0.0 * u.{default}")
        refuse_nan(units.strip(default, units.unit_of(default), f"{title}.inputs[{name!r}]"), f"inputs[{name!r}]")
    if not isinstance(cls.time_unit, u.Unit) or cls.time_unit.dim != u.second.dim:
        raise TypeError(f"{title}.time_unit got {cls.time_unit!r}, but takes a unit of time, such as u.ms")
    check_delayed(cls, parameters)
    _check_names(cls, parameters)
    for name, value in _named(cls, "initial").items():
        check_name(name, cls.states, f"state in {title}.initial")
        units.strip(value, cls.states[name], f"{title}.initial[{name!r}]")
    for name, second in _named(cls, "also").items():
        check_name(name, parameters, f"parameter in {title}.also")
        first, unit = units.unit_of(parameters[name]), units.unit_of(1.0 * second)
        if name not in cls.as_declared and _factor(cls, first, name) != _factor(cls, unit, name):
            raise ValueError(
                f"{title}.also[{name!r}] is in {units.name_of(unit)}, read as if it were {units.name_of(first)}, but "
                f"the time of the one is not that of the other in {cls.time_unit}: give both with one unit of time"
            )
    cls.time_factors()


def _factor(cls: type[Model], unit, name: str) -> float:
    return units.time_factor(unit, cls.time_unit, name)


def _named(cls: type[Model], kind: str) -> Mapping[str, Any]:
    declared = getattr(cls, kind)
    if not isinstance(declared, Mapping):
        raise TypeError(f"{cls.__name__}.{kind} got {type(declared).__name__}, but takes a dict by name")
    return declared


def _check_names(cls: type[Model], parameters) -> None:
    """Each name means one thing, and every name that is referred to exists."""
    title, known = cls.__name__, {"a parameter": parameters, "an input": cls.inputs, "a state": cls.states}
    known["a delayed quantity"] = cls.delayed
    for (one, first), (other, second) in itertools.combinations(known.items(), 2):
        for name in first:
            if name in second:
                raise ValueError(f"{title} has '{name}' as {one} and as {other}: give one of them another name")
    for kind, names in known.items():
        if "dt" in names:
            raise ValueError(f"{title} has 'dt' as {kind}, but that is the time step: give it another name")
    for name in cls.as_declared:
        check_name(name, [*parameters, *cls.inputs, *cls.recordable()], f"name in {title}.as_declared")
    for pair in cls.pairs:
        for name in pair:
            check_name(name, cls.states, f"state in {title}.pairs")
    for block in getattr(cls, "blocks", ()):
        for name in (block.position, block.velocity):
            check_name(name, cls.states, f"state in {title}.blocks")
        for name in (block.A, block.a):
            check_name(name, parameters, f"parameter in {title}.blocks")


def check_model(model, takes: str = "") -> None:
    """Refuse what is no model; ``takes`` says what else the argument can be.

    Raises
    ------
    TypeError : something else, or a class in place of a model of it
    """
    if isinstance(model, Model):
        return
    if isinstance(model, type):
        raise TypeError(f"'model' got the class {model.__name__}, but takes a model of it: {model.__name__}()")
    raise TypeError(f"'model' got {type(model).__name__}, but takes a model such as bk.JansenRit(){takes}")


def refuse_nan(magnitude, name: str, infinite: bool = False) -> None:
    """Raise ``ValueError`` where a value known before tracing has NaN, or infinity where that is refused too."""
    if is_traced(magnitude):
        return
    magnitude = values_here(magnitude)
    wrong = np.atleast_1d(~np.isfinite(magnitude) if infinite else np.isnan(magnitude))
    if wrong.any():
        place = tuple(map(int, np.argwhere(wrong)[0]))
        got = "NaN" if np.isnan(np.atleast_1d(magnitude)[place]) else "infinity"
        raise ValueError(f"'{name}' got {got} (first at {place}), but takes finite numbers")
