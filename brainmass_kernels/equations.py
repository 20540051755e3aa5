"""What a model's equations are, as a key: two keys are equal only where everything that the equations read is equal.

Compiled programs are kept under such keys in place of classes and functions. So a model whose code, helper, default,
closure or global has changed gets a new program, though its class is the same object, and a class that was made again
with the same equations, as by a notebook cell that runs once more, gets the old one.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import types
import weakref
from collections.abc import Hashable, Mapping
from typing import Any

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np

from ._jax import is_traced

# Code that is taken not to change while a process runs: it is known by its name, and not read.
_LIBRARIES = frozenset(
    """
    abc brainevent brainmass brainstate brainunit braintools builtins collections copy dataclasses
    enum functools itertools jax jaxlib math matplotlib numba numpy operator optax pandas random re saiunit scipy
    sympy torch triton types typing xarray
    """.split()
)
_HERE = __name__.partition(".")[0]
_MODEL = f"{_HERE}.models.base"
# Made by Python for every class, or of no concern to the equations.
_OF_EVERY_CLASS = frozenset(
    """
    __annotations__ __annotate_func__ __annotations_cache__ __dataclass_fields__ __dataclass_params__ __dict__ __doc__
    __firstlineno__ __init__ __match_args__ __module__ __parameters__ __replace__ __repr__ __static_attributes__
    __weakref__ __eq__ __hash__ __setattr__ __delattr__ __qualname__
    """.split()
)
_PLAIN = frozenset([type(None), bool, int, str, bytes])
_DEEPEST = 4  # modules of modules
_LARGE = 256  # bytes of an array, above which a digest stands for it


class Key:
    """A value to compare and to hash; the hash is computed once, and equal keys are one object while they are in use.

    Parameters
    ----------
    value : hashable
    """

    __slots__ = ("__weakref__", "_hash", "value")

    def __init__(self, value: Hashable):
        self.value, self._hash = value, hash(value)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other) -> bool:
        if self is other:
            return True
        return isinstance(other, Key) and self._hash == other._hash and self.value == other.value

    def __repr__(self) -> str:
        return f"Key({self._hash:x})"


_IN_USE: weakref.WeakValueDictionary[Key, Key] = weakref.WeakValueDictionary()


def key_of(*things: Any) -> Key:
    """The key of functions, classes of models and plain values.

    A function is its code, its defaults, and whatever its closure and its globals name: numbers, arrays, containers and
    other functions, those of other modules too, by their present values. Functions of installed libraries are known by
    identity, and so is an object whose inside Python does not show.
    """
    key = Key(_Reader().read(things))
    return _IN_USE.setdefault(key, key)


@dataclasses.dataclass(frozen=True, eq=False)
class _Same:
    """An object that is known by identity."""

    thing: Any

    def __hash__(self) -> int:
        return id(self.thing)

    def __eq__(self, other) -> bool:
        return isinstance(other, _Same) and self.thing is other.thing


class _Reader:
    """Reads things into hashable values; what refers to itself is read once."""

    def __init__(self):
        self._begun: dict[int, tuple[int, Any]] = {}  # by id: the number, and the thing itself, lest the id serve again

    def read(self, thing: Any) -> Hashable:
        kind = type(thing)
        if kind in _PLAIN:
            return kind, thing
        if kind is types.CodeType:
            return thing
        if kind is float or isinstance(thing, (float, complex, np.generic)):
            return kind, np.asarray(thing).tobytes()  # tells -0.0 from 0.0, and NaN equals itself
        if isinstance(thing, u.Unit):
            return "unit", thing.dim, thing.scale, thing.name
        if is_traced(thing):
            return _Same(thing)
        if isinstance(thing, (np.ndarray, jax.Array)):
            return self._array(thing)
        if id(thing) in self._begun:
            return "read before", self._begun[id(thing)][0]
        self._begun[id(thing)] = len(self._begun), thing
        return self._compound(thing)

    def _compound(self, thing: Any) -> Hashable:
        if isinstance(thing, types.FunctionType):
            return self._function(thing)
        if isinstance(thing, u.Quantity):
            return "quantity", self.read(thing.unit), self.read(thing.mantissa)
        if isinstance(thing, Mapping):
            return type(thing).__name__, tuple([(self.read(k), self.read(x)) for k, x in thing.items()])
        if isinstance(thing, (tuple, list)):
            return type(thing).__qualname__, tuple(map(self.read, thing))
        if isinstance(thing, (set, frozenset)):
            return type(thing).__name__, frozenset(map(self.read, thing))
        if isinstance(thing, types.MethodType):
            return "method", self.read(thing.__func__), self.read(thing.__self__)
        if isinstance(thing, (staticmethod, classmethod)):
            return type(thing).__name__, self.read(thing.__func__)
        if isinstance(thing, property):
            return "property", self.read(thing.fget)
        if isinstance(thing, functools.partial):
            return "partial", self.read(thing.func), self.read(thing.args), self.read(thing.keywords)
        if isinstance(thing, types.ModuleType):
            return "module", thing.__name__
        if isinstance(thing, type):
            return self._class(thing)
        return self._instance(thing)

    def _array(self, array) -> Hashable:
        if getattr(array, "dtype", None) is not None and jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
            array = jax.random.key_data(array)
        values = np.ascontiguousarray(array)
        if values.dtype.hasobject:
            return _Same(array)
        text = values.tobytes()
        told = text if len(text) <= _LARGE else hashlib.sha256(text).digest()
        return type(array).__name__, str(values.dtype), values.shape, bool(getattr(array, "weak_type", False)), told

    def _function(self, function: types.FunctionType) -> Hashable:
        if _is_known(function.__module__):
            return _Same(function)
        parts = function.__code__, self.read(function.__defaults__), self.read(function.__kwdefaults__)
        return (*parts, *((path, self.read(x)) for path, x in _outside(function)))

    def _class(self, cls: type) -> Hashable:
        if _is_known(cls.__module__):
            return _Same(cls)
        fields: Any = getattr(cls, "__dataclass_fields__", {})
        defaults = [(n, self.read(f.default), self.read(f.default_factory)) for n, f in fields.items()]
        return cls.__qualname__, tuple(defaults), tuple(map(self._ancestor, cls.__mro__[:-1]))

    def _ancestor(self, cls: type) -> Hashable:
        return _Same(cls) if _is_known(cls.__module__) or cls.__module__ == _MODEL else self._attributes(cls)

    def _attributes(self, cls: type) -> Hashable:
        return tuple((n, self.read(x)) for n, x in vars(cls).items() if n not in _OF_EVERY_CLASS)

    def _instance(self, thing: Any) -> Hashable:
        inside = getattr(thing, "__wrapped__", None)
        if isinstance(inside, (types.FunctionType, types.MethodType)):  # of jax.jit, functools.lru_cache and so on
            return type(thing).__qualname__, self.read(inside)
        if type(thing).__module__ == "builtins" or not hasattr(thing, "__dict__"):
            return _Same(thing)
        return self._class(type(thing)), self.read(dict(vars(thing)))


def _outside(function: types.FunctionType) -> list[tuple[str, Any]]:
    """What a function's code reads beside its arguments, by name, and of modules what it names of them."""
    names = sorted(_names(function.__code__))
    found = []
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            found.append((name, cell.cell_contents))
        except ValueError:  # it is not filled yet
            found.append((name, None))
    if (function.__module__ or "").partition(".")[0] != _HERE:
        found += [(name, function.__globals__[name]) for name in names if name in function.__globals__]
    for path, x in found:  # grows
        if isinstance(x, types.ModuleType) and not _is_known(x.__name__) and path.count(".") < _DEEPEST:
            found += [(f"{path}.{name}", vars(x)[name]) for name in names if name in vars(x)]
    return found


def _is_known(module: str | None) -> bool:
    return (module or "").partition(".")[0] in _LIBRARIES


@functools.lru_cache(maxsize=4096)
def _names(code: types.CodeType) -> frozenset[str]:
    """The names that code reads of its module or as attributes, those of functions inside it too."""
    inner = (_names(x) for x in code.co_consts if isinstance(x, types.CodeType))
    return frozenset(code.co_names).union(*inner)
