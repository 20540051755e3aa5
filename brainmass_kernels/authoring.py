"""What the methods of a model return, checked once before a step is built: each mistake is one sentence."""

from __future__ import annotations

import contextlib
import inspect
import sysconfig
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np

from .models.base import Model, SecondOrderModel, meant
from .models.delayed import names_read
from .pointwise import PROBE_LANES, NotPointwise, check_pointwise

_ELSEWHERE = (str(Path(__file__).parent), sysconfig.get_paths()["purelib"], sysconfig.get_paths()["stdlib"])


class Method(NamedTuple):
    """A method of a model, and what it returns.

    Attributes
    ----------
    name : of the method
    title : for errors of lanes
    item : what one value in its dict is, in words
    names : which values it returns
    optional : of these, what may be left out
    """

    name: str
    title: str
    item: str
    names: tuple[str, ...]
    optional: tuple[str, ...] = ()

    @property
    def takes(self) -> str:
        return "sp" if self.name in ("observe", "diffusion") else "spi"


def check_methods(model: type[Model], scheme: str, avals: Sequence[jax.ShapeDtypeStruct], noisy: Sequence[str]) -> None:
    """Call each method that a step under ``scheme`` needs, on traced numbers of ``avals``.

    Raises
    ------
    ValueError, TypeError : a method reads an unknown name, returns a missing or unknown one, or uses a unit, a NumPy
        function or Python's ``if``; the message names model, method, name and line
    NotPointwise : a method mixes lanes
    """
    dtype = avals[0].dtype
    for method in _methods(model, scheme, noisy):
        names = [tuple(model.states), tuple(model.parameters()), names_read(model)][: len(method.takes)]
        probes = [jax.ShapeDtypeStruct((), dtype)] * sum(map(len, names))
        label = f"{method.title} of {model.__name__} under '{scheme}'"
        returned = _order(model, method, names, probes)
        check_pointwise(_caller(model, method, names, returned), probes, label, [f"'{n}'" for n in returned])


def _methods(model: type[Model], scheme: str, noisy: Sequence[str]) -> list[Method]:
    """The methods that the scheme calls, which model authors write."""
    states, methods = tuple(model.states), []
    if scheme == "given":
        methods.append(Method("step", "the step", "value", states))
    else:
        blocks = tuple(b.position for b in getattr(model, "blocks", ()))
        if issubclass(model, SecondOrderModel):
            methods.append(Method("drive", "the drive", "drive", blocks))
        methods.append(Method("drift", "the drift", "rate", states))
    if any(n in states for n in noisy):
        methods.append(Method("diffusion", "the diffusion", "factor", states, states))
    # An observable may be a state as it is.
    return [*methods, Method("observe", "an observable", "number", tuple(model.observables), states)]


def _caller(model: type[Model], method: Method, names, returned: Sequence[str]) -> Callable:
    """The method of flat arguments, its values in the order of ``returned``."""

    def call(*flat):
        values = _called(model, method, names, flat)
        return [jnp.asarray(values[n], flat[0].dtype if np.ndim(values[n]) == 0 else None) for n in returned]

    return call


def _order(model: type[Model], method: Method, names, probes) -> list[str]:
    """The names that it returns, checked, in the declared order."""
    returned: list[str] = []

    def call(*flat):
        values = _called(model, method, names, flat)
        returned.extend(n for n in method.names if n in values)
        return ()

    try:
        jax.eval_shape(call, *(jax.ShapeDtypeStruct((PROBE_LANES,), a.dtype) for a in probes))
    except _UNCLEAR as error:
        # With single numbers, JAX's message is clearer.
        with contextlib.suppress(*_UNCLEAR):
            jax.eval_shape(call, *probes)
        raise error from error.__cause__
    return returned


def _called(model: type[Model], method: Method, names, flat) -> dict[str, Any]:
    where = f"{model.__name__}.{method.name}"
    flat, spaces = iter(flat), []
    kinds = {"s": names[0], "p": names[1], "i": names[2] if len(names) > 2 else names_read(model)}
    for letter, group in zip(method.takes, names):
        spaces.append(Names(letter, where, kinds, model, {n: next(flat) for n in group}))
    function = getattr(model, method.name, None)
    if function is None or function in (Model.drift, SecondOrderModel.drive):
        raise TypeError(f"{model.__name__} has no method {method.name}({', '.join(method.takes)})")
    _check_signature(where, function, method.takes)
    with _explained(where):
        values = function(*spaces)
    _check_returned(where, method, values)
    return values


def _check_signature(where: str, function: Callable, takes: str) -> None:
    try:
        signature = inspect.signature(function)
        signature.bind(*takes)
    except TypeError:
        raise TypeError(
            f"{where} takes {signature}, but is called as {where.split('.')[-1]}({', '.join(takes)}): write it as a "
            f"@staticmethod of {', '.join(takes)}"
        ) from None


def _check_returned(where: str, method: Method, values) -> None:
    if not isinstance(values, dict):
        got = "None: has it a `return`?" if values is None else f"{type(values).__name__}, but returns a dict"
        raise TypeError(f"{where} returned {got} (by name, a {method.item} for each {_thing(method)})")
    for name in values:
        if name not in method.names:
            known = ", ".join(method.names) or "none"
            raise ValueError(
                f"{where} returned {name!r}, but {name!r} is no {_thing(method)}{meant(name, method.names)} "
                f"Known: {known}"
            )
    missing = [n for n in method.names if n not in values and n not in method.optional]
    if missing:
        raise ValueError(
            f"{where} returned no '{missing[0]}': it returns a {method.item} for each of {', '.join(method.names)}"
        )
    for name, x in values.items():
        if isinstance(x, u.Quantity):
            raise ValueError(
                f"{where} returned '{name}' with the unit {x.unit}, but {_PLAIN}: leave units out of the equations"
            )
        if isinstance(x, np.ndarray | jax.Array | np.generic):
            kind = x.dtype
        elif isinstance(x, int | float) and not isinstance(x, bool):
            continue
        else:
            got = "None" if x is None else type(x).__name__
            raise TypeError(f"{where} returned {got} for '{name}', but returns a real number a lane")
        if not (jnp.issubdtype(kind, jnp.floating) or jnp.issubdtype(kind, jnp.integer)):
            raise TypeError(f"{where} returned '{name}' of dtype {kind}, but returns real numbers")


def _thing(method: Method) -> str:
    return {"drive": "position of a block", "observe": "observable"}.get(method.name, "state")


_PLAIN = "inside a model all values are plain numbers, in the units declared and with times in `time_unit`"


class Unknown(AttributeError):
    """A method reads a name that the model does not declare."""


class UnclearType(TypeError):
    """An error of JAX, NumPy or Python in an equation, in their words."""


class UnclearValue(ValueError):
    """The same for a value."""


_UNCLEAR = (UnclearType, UnclearValue)


class Names(SimpleNamespace):
    """States, parameters or inputs, as a method reads them by attribute."""

    __slots__ = ("_about",)

    def __init__(self, letter: str, where: str, kinds: dict[str, Any], model: type[Model], values: dict[str, Any]):
        super().__init__(**values)
        object.__setattr__(self, "_about", (letter, where, kinds, model))

    def __getattr__(self, name: str):
        if name.startswith("__") or name == "_about":
            raise AttributeError(name)
        letter, where, kinds, model = self._about
        words = {"s": "state", "p": "parameter", "i": "input"}
        for other, known in kinds.items():
            if name in known:
                raise Unknown(f"{where} reads {letter}.{name}, but '{name}' is a {words[other]}: {other}.{name}")
        known = kinds[letter]
        hint = f"{meant(name, known)} Known: {', '.join(known) or 'none'}"
        if letter == "p" and hasattr(model, name) and not hasattr(Model, name):
            hint = f": {model.__name__}.{name} has no annotation. Write `{name}: Any = ...`"
        raise Unknown(f"{where} reads {letter}.{name}, but {model.__name__} has no {words[letter]} '{name}'{hint}")


@contextlib.contextmanager
def _explained(where: str):
    """A context that explains errors of what must not be in an equation."""
    try:
        yield
    except Unknown as error:
        raise ValueError(f"{error}{_line(error)}") from error
    except jax.errors.TracerBoolConversionError as error:
        raise TypeError(
            f"{where} decides by a number that is not known yet{_line(error)}: in place of Python's if, and, or, not, "
            f"min and max take jnp.where, jnp.logical_and, jnp.minimum and so on"
        ) from error
    except (jax.errors.TracerArrayConversionError, jax.errors.ConcretizationTypeError) as error:
        raise TypeError(
            f"{where} calls a function of NumPy, of math or of Python that needs a known number{_line(error)}: take "
            f"the one of jax.numpy, jnp.exp in place of np.exp"
        ) from error
    except (u.UnitMismatchError, u.DimensionMismatchError) as error:
        raise ValueError(f"{where} computes with a unit{_line(error)}, but {_PLAIN}") from error
    except NotPointwise:
        raise
    except (TypeError, ValueError) as error:
        kind = UnclearType if isinstance(error, TypeError) else UnclearValue
        raise kind(f"{where} cannot be computed with one value a lane{_line(error)}: {error}") from error
    except Exception as error:
        error.add_note(f"raised in {where}{_line(error)}")
        raise


def _line(error: BaseException) -> str:
    """The line of the author's code that an error came from."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not f.filename.startswith(_ELSEWHERE) and "site-packages" not in f.filename]
    return f" ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else ""
