"""What is made once for each specification of a step and kept: steps and compiled runs. How much is kept is bounded."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import jax

Value = TypeVar("Value")
_CLEARED: list[Callable[[], Any]] = []


class Programs(Generic[Value]):
    """A function of hashable arguments whose values are kept; those that were not used for the longest are forgotten.

    A class that is edited and made again, or that a factory makes with ever other constants, is a new generation of
    its name; of each name only some generations are kept, so that a long session does not fill its memory.

    Parameters
    ----------
    make : ``(*arguments) -> value``
    spec_of : ``(*arguments) -> StepSpec``
    most : values that are kept in all
    generations : different equations under one name of a class, of which values are kept
    """

    def __init__(self, make: Callable[..., Value], spec_of: Callable[..., Any], most: int = 256, generations: int = 16):
        self._make, self._spec_of, self._most, self._generations = make, spec_of, most, generations
        self._kept: OrderedDict[tuple, Value] = OrderedDict()
        self._lock = threading.RLock()
        on_clear(self.cache_clear)

    def __call__(self, *arguments) -> Value:
        with self._lock:
            if arguments in self._kept:
                self._kept.move_to_end(arguments)
                return self._kept[arguments]
        value = self._make(*arguments)
        with self._lock:
            value = self._kept.setdefault(arguments, value)
            self._forget(self._spec_of(*arguments).model.__qualname__)
        return value

    def values(self) -> list[Value]:
        return list(self._kept.values())

    def cache_clear(self) -> None:
        with self._lock:
            self._kept.clear()

    def _forget(self, name: str) -> None:
        specs = {arguments: self._spec_of(*arguments) for arguments in self._kept}
        of_name = {a: spec.equations for a, spec in specs.items() if spec.model.__qualname__ == name}
        # Each generation by its last use.
        by_use = list(dict.fromkeys(reversed(of_name.values())))
        old = set(by_use[self._generations :])
        for arguments, equations in of_name.items():
            if equations in old:
                del self._kept[arguments]
        while len(self._kept) > self._most:
            self._kept.popitem(last=False)


def on_clear(forget: Callable[[], Any]) -> None:
    """Have `clear_caches` call this."""
    _CLEARED.append(forget)


def clear_caches() -> None:
    """Forget every compiled run, step and derived model that this process keeps, and what JAX compiled.

    The next call of `simulate`, `fit` or `sweep` builds its program anew. Changes of a model's code, closures, globals
    and helpers are noticed without it; it is for what Python does not show, such as a value that an extension module
    holds. Kernels on disk stay: their names are digests of their source.
    """
    for forget in _CLEARED:
        forget()
    jax.clear_caches()
