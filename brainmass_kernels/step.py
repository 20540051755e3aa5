"""Model + scheme + noise + observer -> the one step."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .affine import Hoisted, hoist
from .models.base import Model
from .pointwise import Program, check_pointwise
from .schemes import SCHEMES, retreats


class StepSpec(NamedTuple):
    """Which step: everything that decides its text, and nothing of its data.

    Attributes
    ----------
    model : the model's class
    scheme : a name in `SCHEMES`
    constant, varying : the inputs that are held, and those with one value a step
    noisy : the inputs and states that white noise is added to
    record : observables and states to record
    dtype : of all arithmetic
    """

    model: type[Model]
    scheme: str
    constant: tuple[str, ...]
    varying: tuple[str, ...]
    noisy: tuple[str, ...]
    record: tuple[str, ...]
    dtype: Any

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(self.model.parameters())

    @property
    def hoisted(self) -> tuple[str, ...]:
        """Names of the arguments that do not change during a run."""
        return (*self.parameters, *self.constant, *(f"noise {n}" for n in self.noisy), "dt")


class Noisy:
    """A model with white noise on some of its states, during one step.

    Parameters
    ----------
    noise : for each noisy state, what is added to its rate where `Model.diffusion` is 1
    """

    def __init__(self, model: type[Model], noise: dict[str, Any]):
        self._model, self._noise = model, noise

    def __getattr__(self, name: str):
        return getattr(self._model, name)

    def push(self, s, p) -> dict[str, Any]:
        factors = self._model.diffusion(s, p)
        return {n: x * factors[n] if n in factors else x for n, x in self._noise.items()}


class Step:
    """The one step of a run, as programs over lanes.

    Attributes
    ----------
    setup : hoisted arguments -> coefficients, computed once before the loop
    advance : ``(*coefs, *state, *varying inputs, *normals) -> state``
    observe : ``(*coefs, *state) -> observables``
    retreat : ``(*coefs, *state, *varying inputs, *normals) -> state``, the state before a step from that after it;
        ``None`` unless it was asked for
    enter, exit : ``(hoisted, state) -> state``, to the scheme's coordinates and back
    """

    def __init__(self, spec: StepSpec, retreating: bool = False):
        self.spec = spec
        aval = jax.ShapeDtypeStruct((), spec.dtype)
        n_hoisted, n_state = len(spec.hoisted), len(spec.model.states)
        avals = [aval] * (n_hoisted + n_state + len(spec.varying) + len(spec.noisy))
        label = f"{spec.model.__name__} under '{spec.scheme}'"
        check_pointwise(self._advance, avals, f"the drift of {label}")
        check_pointwise(self._observe, avals[: n_hoisted + n_state], f"an observable of {label}")
        programs = [
            Program(self._advance, avals, f"step of {label}"),
            Program(self._observe, avals[: n_hoisted + n_state], f"observables of {label}"),
        ]
        if retreating:
            programs.append(Program(self._retreat, avals, f"step back of {label}"))
        self.parts: Hoisted = hoist(programs, n_hoisted, spec.dtype)
        self.setup = self.parts.setup
        self.advance, self.observe = self.parts.programs[:2]
        self.retreat = self.parts.programs[2] if retreating else None

    def _named(self, flat):
        """Flat arguments as (parameters, everything hoisted, state, rest)."""
        spec = self.spec
        values = dict(zip(spec.hoisted, flat))
        p = SimpleNamespace(**{n: values[n] for n in spec.parameters})
        n = len(spec.hoisted)
        state = dict(zip(spec.model.states, flat[n:]))
        return p, values, state, flat[n + len(state) :]

    def _advance(self, *flat):
        return self._moved(SCHEMES[self.spec.scheme].step, flat)

    def _retreat(self, *flat):
        return self._moved(SCHEMES[self.spec.scheme].retreat, flat)

    def _moved(self, move, flat):
        spec = self.spec
        p, values, state, rest = self._named(flat)
        inputs = {n: values[n] for n in spec.constant} | dict(zip(spec.varying, rest))
        noise = {
            n: values[f"noise {n}"] / jnp.sqrt(values["dt"]) * normal
            for n, normal in zip(spec.noisy, rest[len(spec.varying) :])
        }
        inputs |= {n: inputs[n] + x for n, x in noise.items() if n in inputs}
        on_states = {n: x for n, x in noise.items() if n not in inputs}
        model = Noisy(spec.model, on_states) if on_states else spec.model
        stepped = move(model, state, p, SimpleNamespace(**inputs), values["dt"])
        return [stepped[n] for n in spec.model.states]

    def _observe(self, *flat):
        p, values, state, _ = self._named(flat)
        scheme = SCHEMES[self.spec.scheme]
        state = scheme.exit(self.spec.model, state, p, values["dt"])
        seen = {**state, **self.spec.model.observe(SimpleNamespace(**state), p)}
        return [seen[n] for n in self.spec.record]

    @property
    def retreats(self) -> bool:
        """Whether its steps can be taken back."""
        return retreats(self.spec.model, self.spec.scheme, self.spec.noisy)

    def growth(self, hoisted):
        """The largest ``a dt`` of any block and lane: a step back multiplies rounding errors by its exponential."""
        values = dict(zip(self.spec.hoisted, hoisted))
        rates = [jnp.max(jnp.abs(values[b.a] * values["dt"])) for b in getattr(self.spec.model, "blocks", ())]
        return functools.reduce(jnp.maximum, rates)

    def enter(self, hoisted, state) -> tuple:
        return self._coordinates("enter", hoisted, state)

    def exit(self, hoisted, state) -> tuple:
        return self._coordinates("exit", hoisted, state)

    def _coordinates(self, way: str, hoisted, state) -> tuple:
        p, values, named, _ = self._named((*hoisted, *state))
        moved = getattr(SCHEMES[self.spec.scheme], way)(self.spec.model, named, p, values["dt"])
        return tuple(moved[n] for n in self.spec.model.states)


@functools.lru_cache(maxsize=256)
def build(spec: StepSpec, retreating: bool = False) -> Step:
    """The step of a specification, and its way back where one is asked for, built once."""
    return Step(spec, retreating)
