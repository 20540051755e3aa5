"""A model's equations as a key: two keys are equal only where everything that the equations read is equal.

Compiled programs are stored under such keys in place of classes and functions. So a model whose code, helper, default,
closure or global has changed gets a new program, though its class is the same object. A class that is defined again
with the same equations, as by a notebook cell that runs once more, gets the old program.
"""

from __future__ import annotations

import collections
import dataclasses
import dis
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

# Code that does not change while a process runs: its objects are known by identity, and not read.
_LIBRARIES = frozenset(
    """
    abc brainevent brainmass brainstate brainunit braintools builtins collections copy dataclasses
    enum functools itertools jax jaxlib math matplotlib numba numpy operator optax pandas random re saiunit scipy
    sympy torch triton types typing xarray
    """.split()
)
_HERE = __name__.partition(".")[0]
_MODEL = f"{_HERE}.models.base"
# Attributes that Python gives to every class, or that do not concern the equations.
_OF_EVERY_CLASS = frozenset(
    """
    __annotations__ __annotate_func__ __annotations_cache__ __dataclass_fields__ __dataclass_params__ __dict__ __doc__
    __firstlineno__ __init__ __match_args__ __module__ __parameters__ __replace__ __repr__ __static_attributes__
    __weakref__ __eq__ __hash__ __setattr__ __delattr__ __qualname__
    """.split()
)
# Attributes that Python gives to every named tuple.
_OF_NAMED_TUPLES = frozenset(["__new__", "__getnewargs__", "_asdict", "_make", "_replace"])
_PLAIN = frozenset([type(None), bool, int, str, bytes])
# Kinds that are read part by part, without any other test.
_PARTED = frozenset([types.FunctionType, types.ModuleType, staticmethod, dict, tuple, list, u.Quantity])
_DEEPEST = 4  # modules of modules
_LARGE = 256  # bytes of an array, above which a digest stands for it
# A class written in C, such as `int`, has more inside than its attributes, unless it is one of these or a heap type.
_SHOWN, _HEAP_TYPE = (object, types.SimpleNamespace), 1 << 9
_FIELD: Any = collections.namedtuple("_Pair", "x")
_SLOTS = (types.MemberDescriptorType, types.GetSetDescriptorType, type(_FIELD.x))


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
        return self._once(thing) if kind in _PARTED else self._other(kind, thing)

    def _other(self, kind: type, thing: Any) -> Hashable:
        if kind is float or isinstance(thing, (float, complex, np.generic)):
            return kind, np.asarray(thing).tobytes()  # tells -0.0 from 0.0, and NaN equals itself
        if isinstance(thing, u.Unit):
            return "unit", thing.dim, thing.scale, thing.name
        if is_traced(thing):
            return _Same(thing)
        if isinstance(thing, (np.ndarray, jax.Array)):
            return self._array(thing)
        return self._once(thing)

    def _once(self, thing: Any) -> Hashable:
        if id(thing) in self._begun:
            return "read before", self._begun[id(thing)][0]
        self._begun[id(thing)] = len(self._begun), thing
        return self._compound(thing)

    def _compound(self, thing: Any) -> Hashable:
        if isinstance(thing, types.FunctionType):
            return self._function(thing)
        if isinstance(thing, u.Quantity):
            return "quantity", self.read(thing.unit), self.read(thing.mantissa)
        if isinstance(thing, (staticmethod, classmethod)):
            return type(thing).__name__, self.read(thing.__func__)
        if isinstance(thing, Mapping):
            return self._container(thing), tuple([(self.read(k), self.read(x)) for k, x in thing.items()])
        if isinstance(thing, (tuple, list)):
            return self._container(thing), tuple(map(self.read, thing))
        if isinstance(thing, (set, frozenset)):
            return self._container(thing), frozenset(map(self.read, thing))
        if isinstance(thing, types.MethodType):
            return "method", self.read(thing.__func__), self.read(thing.__self__)
        if isinstance(thing, property):
            return "property", self.read(thing.fget)
        if isinstance(thing, functools.partial):
            return "partial", self.read(thing.func), self.read(thing.args), self.read(thing.keywords)
        if isinstance(thing, types.ModuleType):
            return "module", thing.__name__
        if isinstance(thing, type):
            return self._class(thing)
        return self._instance(thing)

    def _container(self, thing: Any) -> Hashable:
        """What a container is beside its content: a class of the user's may have methods and attributes."""
        kind = type(thing)
        if _is_known(kind.__module__) or _is_ours(kind.__module__):
            return kind.__qualname__
        return self._class(kind), self.read(_inside(thing))

    def _array(self, array) -> Hashable:
        if getattr(array, "dtype", None) is not None and jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
            array = jax.random.key_data(array)
        values = np.ascontiguousarray(array)
        if values.dtype.hasobject:
            return _Same(array)
        text = values.tobytes()
        content = text if len(text) <= _LARGE else hashlib.sha256(text).digest()
        return type(array).__name__, str(values.dtype), values.shape, bool(getattr(array, "weak_type", False)), content

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
        skipped = _OF_EVERY_CLASS | _OF_NAMED_TUPLES if "_fields" in vars(cls) else _OF_EVERY_CLASS
        return tuple((n, self.read(x)) for n, x in vars(cls).items() if n not in skipped)

    def _instance(self, thing: Any) -> Hashable:
        kind = type(thing)
        if isinstance(thing, (jax.custom_jvp, jax.custom_vjp)):  # the function and the rules of its derivative
            return kind.__qualname__, self.read(dict(vars(thing)))
        wrapped = getattr(thing, "__wrapped__", None)
        if isinstance(wrapped, (types.FunctionType, types.MethodType)):  # of jax.jit, functools.lru_cache and so on
            return kind.__qualname__, self.read(wrapped)
        if kind in _SLOTS:  # instances have the value
            return kind.__qualname__
        inside = _inside(thing)
        if not inside and not hasattr(thing, "__dict__"):
            return _Same(thing)
        is_whole = all(c in _SHOWN or c.__flags__ & _HEAP_TYPE for c in kind.__mro__)
        return self._class(kind), self.read(inside), None if is_whole else _Same(thing)


def _inside(thing: Any) -> dict[str, Any]:
    """The attributes of an instance, those in slots too."""
    slots = [slot for cls in type(thing).__mro__ for slot in _slots(cls) if hasattr(thing, slot)]
    return {**{slot: getattr(thing, slot) for slot in slots}, **getattr(thing, "__dict__", {})}


def _slots(cls: type) -> list[str]:
    return [name for name, x in vars(cls).items() if isinstance(x, types.MemberDescriptorType)]


def _outside(function: types.FunctionType) -> list[tuple[str, Any]]:
    """What a function's code reads beside its arguments, by name; of a module, the attributes that the code names."""
    outside = []
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            outside.append((name, cell.cell_contents))
        except ValueError:  # it is not filled yet
            outside.append((name, None))
    names, of_module = _names(function.__code__)
    # Not `__module__`, in which a decorator writes the module of what it decorates.
    module = function.__globals__.get("__name__")
    if not _is_known(module) and not _is_ours(module):
        outside += [(name, function.__globals__[name]) for name in of_module if name in function.__globals__]
    for path, x in outside:  # which grows
        if isinstance(x, types.ModuleType) and not _is_known(x.__name__) and path.count(".") < _DEEPEST:
            outside += [(f"{path}.{name}", vars(x)[name]) for name in names if name in vars(x)]
    return outside


def _is_known(module: str | None) -> bool:
    return (module or "").partition(".")[0] in _LIBRARIES


def _is_ours(module: str | None) -> bool:
    return (module or "").partition(".")[0] == _HERE


@functools.lru_cache(maxsize=4096)
def _names(code: types.CodeType) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names that code reads, also in functions inside it, in order: all of them, and those that are globals.

    The name of an attribute is no global: a global `v` does not concern an equation that reads `s.v`.
    """
    own = [x.argval for x in dis.get_instructions(code) if x.opcode in dis.hasname and not _is_attribute(x.opname)]
    inner = [_names(x) for x in code.co_consts if isinstance(x, types.CodeType)]
    names = {*code.co_names, *(n for all_of_it, _ in inner for n in all_of_it)}
    of_module = {*own, *(n for _, of_it in inner for n in of_it)}
    return tuple(sorted(names)), tuple(sorted(of_module))


def _is_attribute(operation: str) -> bool:
    return operation.endswith(("_ATTR", "_METHOD"))
