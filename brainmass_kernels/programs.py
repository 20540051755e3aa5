"""A bounded cache of values that are made once for each specification of a step: steps and compiled runs."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import jax

Value = TypeVar("Value")
_CLEAR: list[Callable[[], Any]] = []


class Programs(Generic[Value]):
    """A cached function of hashable arguments; the values least recently used are dropped.

    A class that is edited and defined again, or that a factory defines with ever new constants, is a new generation of
    its name. Only some generations of each name stay in the cache, so that a long session does not fill its memory.

    Parameters
    ----------
    make : ``(*arguments) -> value``
    spec_of : ``(*arguments) -> StepSpec``
    most : values in the cache
    generations : different equations under one class name whose values are cached
    """

    def __init__(self, make: Callable[..., Value], spec_of: Callable[..., Any], most: int = 256, generations: int = 16):
        self._make, self._spec_of, self._most, self._generations = make, spec_of, most, generations
        self._values: OrderedDict[tuple, Value] = OrderedDict()
        self._lock = threading.RLock()
        on_clear(self.cache_clear)

    def __call__(self, *arguments) -> Value:
        with self._lock:
            if arguments in self._values:
                self._values.move_to_end(arguments)
                return self._values[arguments]
        value = self._make(*arguments)
        with self._lock:
            value = self._values.setdefault(arguments, value)
            self._evict(self._spec_of(*arguments).model.__qualname__)
        return value

    def values(self) -> list[Value]:
        return list(self._values.values())

    def cache_clear(self) -> None:
        with self._lock:
            self._values.clear()

    def _evict(self, name: str) -> None:
        specs = {arguments: self._spec_of(*arguments) for arguments in self._values}
        of_name = {a: spec.equations for a, spec in specs.items() if spec.model.__qualname__ == name}
        # Generations by their last use.
        by_use = list(dict.fromkeys(reversed(of_name.values())))
        old = set(by_use[self._generations :])
        for arguments, equations in of_name.items():
            if equations in old:
                del self._values[arguments]
        while len(self._values) > self._most:
            self._values.popitem(last=False)


def on_clear(clear: Callable[[], Any]) -> None:
    """Make `clear_caches` call this."""
    _CLEAR.append(clear)


def clear_caches() -> None:
    """Clear the compiled runs, steps and derived models of this process, and JAX's compiled programs.

    The next call of `simulate`, `fit` or `sweep` builds its program anew. Changes of a model's code, closures, globals
    and helpers are noticed without it; it is for changes that Python does not show, such as of a value in an extension
    module. Kernels on disk stay: their names are digests of their source.
    """
    for clear in _CLEAR:
        clear()
    jax.clear_caches()
