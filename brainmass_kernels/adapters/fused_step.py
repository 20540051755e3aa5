"""A step on arrays, however it was written, as a loop over lanes and what is computed around it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .. import jaxprs
from .._jax import Literal, is_traced
from ..equations import Key as KeyOf
from ..equations import key_of
from ..identity import text_of
from ..programs import on_clear
from .around import Values, narrowed, spread
from .classify import Arriving, ClassifiedStep, Key, Number
from .lower import cast, lower

#: Most steps that are kept; each holds its parameters.
_MOST = 32
_KEPT: OrderedDict[KeyOf, FusedStep] = OrderedDict()
_LOCK = threading.Lock()
on_clear(_KEPT.clear)


def fused_step(
    closed, arguments: Sequence[Any], states: dict[str, int], outputs: Sequence[int], label: str
) -> FusedStep:
    """`FusedStep`, or the one of an equal call: the same text with the same values, which it keeps.

    Nothing else decides what a `FusedStep` is. Not kept is a step whose values are traced, or whose text names a Python
    function and does not say what that does.
    """
    values = [x for x in jax.tree.leaves([*closed.consts, *arguments]) if not isinstance(x, str)]
    if any(map(is_traced, values)) or not _says_all(closed.jaxpr):
        return FusedStep(closed, arguments, states, outputs, label)
    kinds = [
        repr(a) if isinstance(a, Arriving) else type(a).__name__ if isinstance(a, (Number, Key)) else a
        for a in arguments
    ]
    names = [call.params.get("name") for _, calls in jaxprs.walk(closed.jaxpr) for call in calls]
    places = [str(getattr(x, "sharding", "")) for x in values]
    x64, promotion = jax.config.jax_enable_x64, jax.config.jax_numpy_dtype_promotion  # pyright: ignore
    text = text_of(closed), names, [*states.items()], [*outputs], label, x64, promotion
    key = key_of(text, closed.consts, kinds, places, str(jax.config.jax_default_device))  # pyright: ignore
    with _LOCK:
        if key in _KEPT:
            _KEPT.move_to_end(key)
            return _KEPT[key]
    step = FusedStep(closed, arguments, states, outputs, label)
    with _LOCK:
        _KEPT[key] = step
        while len(_KEPT) > _MOST:
            _KEPT.popitem(last=False)
    return step


def _says_all(jaxpr) -> bool:
    """Whether `text_of` says all that a jaxpr computes: a function, and an object without a text, it only names."""
    parameters = jax.tree.leaves([[*eqn.params.values()] for eqn, _ in jaxprs.walk(jaxpr)])
    bodies = [getattr(p, "jaxpr", p) for p in parameters]
    others = [p for p, body in zip(parameters, bodies) if not (isinstance(p, (str, int, float)) or _is_jaxpr(body))]
    unsaid = any(callable(p) or " at 0x" in repr(p) for p in others)
    return not unsaid and all(_says_all(body) for body in bodies if _is_jaxpr(body))


def _is_jaxpr(x) -> bool:
    return hasattr(x, "eqns")


class FusedStep:
    """One step on arrays, taken apart.

    Parameters
    ----------
    closed, arguments, states, outputs, label : as `ClassifiedStep` takes them

    Attributes
    ----------
    equations : the loop
    names : of the states
    extra : of what the loop carries to the end of a step in order to record it, as further states
    lanes : the shape of the batch of masses
    dtype : of all states

    Raises
    ------
    Unsupported : what cannot be done lane by lane, with the name of what stood in the way
    """

    def __init__(self, closed, arguments: Sequence[Any], states: dict[str, int], outputs: Sequence[int], label: str):
        self._step = ClassifiedStep(closed, arguments, states, outputs, label)
        self._values = Values(self._step)
        self._lowered = lower(self._step, self._values)
        self.equations, self.extra = self._lowered.equations, self._lowered.extra
        self.names, self.lanes, self.dtype = self._step.names, self._step.lanes, self._step.dtype
        self._constants: dict[str, Any] | None = None

    # Before the loop ------------------------------------------------------------------------------------------------

    def constant_values(self) -> dict[str, Any]:
        """What the loop reads and no step changes, by name; each broadcasts to the lanes."""
        if self._constants is None:
            constants = zip(self.equations.constants, self._lowered.constants, strict=True)
            self._constants = {n: spread(self._values.compact(v), axes, self.lanes, 0) for n, (v, axes) in constants}
        return self._constants

    def row_values(self, steps: int, key) -> dict[str, Any]:
        """What the loop reads at each of ``steps`` steps, each ``(steps, ...)`` and broadcasting to the lanes.

        Parameters
        ----------
        key : for the normals that several lanes share
        """
        if not self._lowered.rows:
            return {}
        wanted, shared = [v for v, _ in self._lowered.rows], self._step.shared_normals
        normals = [
            jax.random.normal(jax.random.fold_in(key, k), (steps, *v.aval.shape), v.aval.dtype)
            for k, v in enumerate(shared)
        ]

        def one(number, normals):
            return self._values.evaluated(wanted, {**dict(zip(shared, normals)), self._step.number: number})

        rows = zip(self.equations.rows, jax.vmap(one)(jnp.arange(steps), normals), self._lowered.rows, strict=True)
        return {n: spread(x, axes, self.lanes, 1) for n, x, (_, axes) in rows}

    # After it -------------------------------------------------------------------------------------------------------

    def final(self, values: dict[str, Any]) -> dict[str, Any]:
        """The states after the run, ``(*lanes)`` each, in their own shapes."""
        own = zip(self.names, self._step.before)
        return {n: narrowed(values[n], self._step.aligned(v), v.aval.shape, 0) for n, v in own}

    def needed(self) -> tuple[str, ...]:
        """The names of what the loop must record."""
        names = [r.name for r in self._lowered.records if not r.after]
        for v, record in zip(self._step.outputs, self._lowered.records, strict=True):
            names += [self.names[k] for k in self._states_of(v)] if record.after else []
        return tuple(dict.fromkeys(names))

    def outputs(self, records: dict[str, Any], numbers) -> list:
        """Each output ``(K, ...)`` in the shape that the step gave it.

        Parameters
        ----------
        records : what the loop recorded, each ``(K, *lanes)``
        numbers : of the recorded steps, ``(K,)``
        """
        outputs = []
        for v, record in zip(self._step.outputs, self._lowered.records, strict=True):
            if record.after:
                outputs.append(self._computed_after(v, records, numbers))
            else:
                outputs.append(cast(narrowed(records[record.name], record.axes, v.aval.shape, 1), v.aval.dtype))
        return outputs

    def _states_of(self, v) -> list[int]:
        """Which states after a step an output reads."""
        after = self._step.after
        eqns = self._step.needed_for([v], set(jaxprs.variables(after)))
        read = {*jaxprs.read_by(eqns), *jaxprs.variables([v])}
        return [k for k, n in enumerate(after) if not isinstance(n, Literal) and n in read]

    def _computed_after(self, v, records, numbers):
        """An output that mixes lanes, or that reads no state."""
        step, reads = self._step, self._states_of(v)
        before = [step.before[k] for k in reads]
        states = [
            narrowed(records[self.names[k]], step.aligned(old), old.aval.shape, 1) for k, old in zip(reads, before)
        ]

        def one(number, states):
            known = {**{step.after[k]: x for k, x in zip(reads, states)}, step.number: number}
            return jnp.asarray(self._values.evaluated([v], known)[0], v.aval.dtype)

        return jax.vmap(one)(numbers, states)
