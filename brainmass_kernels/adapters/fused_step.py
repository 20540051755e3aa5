"""A step on arrays, however it was written, as a loop over lanes and what is computed around it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .. import jaxprs
from .._jax import Literal
from .around import Values, narrowed, spread
from .classify import ClassifiedStep
from .lower import cast, lower


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

    # Before the loop ------------------------------------------------------------------------------------------------

    def constant_values(self) -> dict[str, Any]:
        """What the loop reads and no step changes, by name; each broadcasts to the lanes."""
        constants = zip(self.equations.constants, self._lowered.constants, strict=True)
        return {n: spread(self._values.compact(v), axes, self.lanes, 0) for n, (v, axes) in constants}

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
