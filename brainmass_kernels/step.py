"""The step of a run, from a model, a scheme, noise and observables."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from . import timing, units
from .affine import Hoisted, hoist
from .authoring import check_methods
from .coupling import OWN_PAST, Link, wiring
from .equations import Key, key_of
from .models.base import Model
from .pointwise import Program, check_pointwise
from .programs import Programs
from .schemes import SCHEMES, Staged, invertible
from .stimuli import Form


@dataclasses.dataclass(frozen=True)
class StepSpec:
    """The specification of a step: all that decides its program, without data.

    Two specifications are equal if their equations are, even of different class objects (`equations`).

    Attributes
    ----------
    model : the model's class
    scheme : a name in `SCHEMES`
    constant, varying : constant inputs, and those with one value a step
    noisy : the inputs and states with white noise
    record : observables and states to record
    dtype : of all arithmetic
    links : how lanes are coupled: one for each coupling of a network, and for each of the model's delays inside a mass
    base_two : whether logistic functions are computed by powers of two rather than tanh
    stimuli : what is added to inputs as a function of time
    digits : how many count the steps, for stimuli (`timing`); 0 without
    equations : the key of all that the equations read, and of the settings of JAX that their tracing depends on
    """

    model: type[Model] = dataclasses.field(compare=False)
    scheme: str
    constant: tuple[str, ...]
    varying: tuple[str, ...]
    noisy: tuple[str, ...]
    record: tuple[str, ...]
    dtype: Any
    links: tuple[Link, ...] = ()
    base_two: bool = False
    stimuli: tuple[Form, ...] = dataclasses.field(default=(), compare=False)
    digits: int = 0
    equations: Key = dataclasses.field(init=False, repr=False)

    def __post_init__(self):
        kinds = tuple(link.rule for link in self.links)
        settings = jax.config.jax_enable_x64, jax.config.jax_numpy_dtype_promotion  # pyright: ignore
        read = (self.model, kinds, settings, *([self.stimuli] if self.stimuli else []))
        object.__setattr__(self, "equations", key_of(*read))

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(self.model.parameters())

    @property
    def coupled(self) -> tuple[str, ...]:
        """Full names of the couplings' constants."""
        return tuple(link.full(n) for link in self.links for n in link.parameters)

    @property
    def is_network(self) -> bool:
        """Whether lanes are coupled with each other, and not to their own past alone."""
        return any(link.kind is not OWN_PAST for link in self.links)

    @property
    def stimulating(self) -> tuple[str, ...]:
        """Full names of the stimuli's values."""
        return tuple(f"{form.name} {label}" for form in self.stimuli for label in form.labels(self.digits))

    @property
    def carried(self) -> tuple[str, ...]:
        """Names of what a step takes to the next: the states, and the digits that count the steps."""
        return (*self.model.states, *(f"step digit {k}" for k in range(self.digits)))

    @property
    def totals(self) -> int:
        """How many sums over regions a step reads."""
        return sum(map(len, wiring(self.links)[1]))

    @property
    def hoisted(self) -> tuple[str, ...]:
        """Labels of the arguments that do not change during a run, in order."""
        noise, coupling = (f"noise {n}" for n in self.noisy), (f"coupling {n}" for n in self.coupled)
        stimuli = (f"stimulus {n}" for n in self.stimulating)
        return (*self.parameters, *self.constant, *noise, *coupling, *stimuli, "dt")

    def unchanging(self, values: Sequence[Any]) -> Unchanging:
        """The arguments that do not change during a run, from the first of ``values``, by group and name."""
        rest = iter(values)
        groups = (self.parameters, self.constant, self.noisy, self.coupled, self.stimulating)
        parameters, inputs, noise, coupling, stimuli = ({n: next(rest) for n in names} for names in groups)
        return Unchanging(parameters, inputs, noise, coupling, stimuli, next(rest))

    @property
    def arriving(self) -> tuple[str, ...]:
        """Names of the arguments that change with each step, except normals; sums over regions are the last."""
        return (*self.varying, *(f"sum {k}" for k in range(self.totals)))


class Unchanging(NamedTuple):
    """What does not change during a run: parameters, constant inputs, noise, and values of couplings and stimuli."""

    parameters: dict[str, Any]
    inputs: dict[str, Any]
    noise: dict[str, Any]
    coupling: dict[str, Any]
    stimuli: dict[str, Any]
    dt: Any


class Noisy:
    """A model with white noise on some of its states, during one step.

    Parameters
    ----------
    noise : for each noisy state, the term of its rate that `Model.diffusion` multiplies
    """

    def __init__(self, model: type[Model], noise: dict[str, Any]):
        self._model, self._noise = model, noise

    def __getattr__(self, name: str):
        return getattr(self._model, name)

    def push(self, s, p) -> dict[str, Any]:
        factors = self._model.diffusion(s, p)
        return {n: x * factors[n] if n in factors else x for n, x in self._noise.items()}


class Step:
    """The step of a run, as programs over lanes.

    Attributes
    ----------
    written : the programs before hoisting: ``"advance"``, ``"observe"`` and in a network ``"send"``, of hoisted
        arguments instead of coefficients
    setup : hoisted arguments -> coefficients, computed once before the loop
    advance : ``(*coefs, *state, *inputs, *normals) -> state``, the inputs being `StepSpec.arriving`
    send : ``(*coefs, *state) -> quantities that a region sends``, ``None`` without a network
    observe : ``(*coefs, *state) -> observables``
    inverse : ``(*coefs, *state, *inputs, *normals) -> state``, the state before a step from that after it;
        ``None`` unless ``with_inverse``
    transforms : ``"enter"`` and ``"exit"``, ``(*hoisted, *state) -> state``, to the scheme's coordinates and back
    invertible : whether it has an inverse
    """

    def __init__(self, spec: StepSpec, with_inverse: bool = False):
        self.spec = spec
        self.factors = spec.model.time_factors()
        aval = jax.ShapeDtypeStruct((), spec.dtype)
        n_hoisted, n_state = len(spec.hoisted), len(spec.carried)
        avals = [aval] * (n_hoisted + n_state + len(spec.arriving) + len(spec.noisy))
        label = f"{spec.model.__name__} under '{spec.scheme}'"
        check_methods(spec.model, spec.scheme, avals, spec.noisy)
        for form in spec.stimuli:
            form.check(aval)
        check_pointwise(self._advance, avals, f"the drift of {label}")
        check_pointwise(self._observe, avals[: n_hoisted + n_state], f"an observable of {label}")
        programs = [
            Program(self._advance, avals, f"step of {label}"),
            Program(self._observe, avals[: n_hoisted + n_state], f"observables of {label}"),
        ]
        if with_inverse:
            programs.append(Program(self._inverse, avals, f"step back of {label}"))
        if spec.links:
            check_pointwise(self._send, avals[: n_hoisted + n_state], f"what is sent by {label}")
            programs.append(Program(self._send, avals[: n_hoisted + n_state], f"what is sent by {label}"))
        self.written = {"advance": programs[0], "observe": programs[1]} | ({"send": programs[-1]} if spec.links else {})
        self.parts: Hoisted = hoist(programs, n_hoisted, spec.dtype, spec.base_two)
        self.setup = self.parts.setup
        self.advance, self.observe = self.parts.programs[:2]
        self.inverse = self.parts.programs[2] if with_inverse else None
        self.send = self.parts.programs[-1] if spec.links else None
        # All of the model is read here, as its class may change later.
        place = avals[: n_hoisted + len(spec.model.states)]
        self.transforms = {
            name: Program(self._transform(name), place, f"{name} of {label}") for name in ("enter", "exit")
        }
        self._rates = tuple(b.a for b in getattr(spec.model, "blocks", ()))
        self.invertible = invertible(spec.model, spec.scheme, spec.noisy)

    def _named(self, flat):
        """Flat arguments as constants, parameters in the units of the equations, the state, and the rest."""
        spec = self.spec
        known, n = spec.unchanging(flat), len(spec.hoisted)
        p = SimpleNamespace(**units.inside(known.parameters, self.factors.parameters))
        state = dict(zip(spec.model.states, flat[n:]))
        return known, p, state, flat[n + len(state) :]

    def _advance(self, *flat):
        return self._stepped(SCHEMES[self.spec.scheme].step, flat)

    def _inverse(self, *flat):
        return self._stepped(SCHEMES[self.spec.scheme].inverse, flat, back=True)

    def _stepped(self, scheme_step, flat, back: bool = False):
        spec = self.spec
        known, p, state, rest = self._named(flat)
        clock, rest = rest[: spec.digits], rest[spec.digits :]
        moved = (timing.before if back else timing.after)(clock) if clock else []
        # A step back begins after the step.
        clock = moved if back else clock
        inputs = known.inputs | dict(zip(spec.varying, rest))
        totals = iter(rest[len(spec.varying) : len(spec.arriving)])
        sources = self._sources(known, p, state)
        for link, quantities in zip(spec.links, wiring(spec.links)[1]):
            arrived = tuple(next(totals) for _ in quantities)
            total = link.rule.received(arrived, sources[link.source], link.constants(known.coupling))
            inputs[link.target] = total if link.kind is OWN_PAST else inputs[link.target] + total
        normals = rest[len(spec.arriving) :]
        noise = {n: sigma / jnp.sqrt(known.dt) * z for (n, sigma), z in zip(known.noise.items(), normals)}
        inputs |= {n: inputs[n] + x for n, x in noise.items() if n in inputs}
        on_states = units.inside({n: x for n, x in noise.items() if n not in inputs}, self.factors.states)
        model = Noisy(spec.model, on_states) if on_states else spec.model
        stepped = scheme_step(model, state, p, self._arriving(known, clock, inputs), known.dt)
        return [*(stepped[n] for n in spec.model.states), *moved]

    def _arriving(self, known: Unchanging, clock, inputs: dict[str, Any]) -> SimpleNamespace:
        """The inputs of a step as the equations take them; with stimuli, those of each of its stages."""
        spec = self.spec
        if not spec.stimuli:
            return SimpleNamespace(**units.inside(inputs, self.factors.inputs))

        def at(stage: float) -> dict[str, Any]:
            found = dict(inputs)
            for form in spec.stimuli:
                values = {label: known.stimuli[f"{form.name} {label}"] for label in form.labels(spec.digits)}
                found[form.input] += form.value(values, clock, known.dt, spec.model.time_unit, stage)
            return units.inside(found, self.factors.inputs)

        return Staged(at)

    def _observe(self, *flat):
        known, p, state, _ = self._named(flat)
        observables = self._observables(known, p, state)
        return [observables[n] for n in self.spec.record]

    def _observables(self, known: Unchanging, p, state) -> dict[str, Any]:
        """Everything that can be recorded, in declared units."""
        state = SCHEMES[self.spec.scheme].exit(self.spec.model, state, p, known.dt)
        observed = self.spec.model.observe(SimpleNamespace(**state), p)
        return units.outside(state, self.factors.states) | units.outside(observed, self.factors.observables)

    def _send(self, *flat):
        known, p, state, _ = self._named(flat)
        sources, links = self._sources(known, p, state), self.spec.links
        sent = [link.rule.sent(sources[link.source], link.constants(known.coupling)) for link in links]
        return [sent[quantity.link][quantity.part] for quantity in wiring(links)[0]]

    def _sources(self, known: Unchanging, p, state) -> dict[str, Any]:
        """What regions send of, by name, in declared units."""
        return self._observables(known, p, state) if self.spec.links else {}

    def coefficient_of(self, parameter: str) -> int:
        """The number of the coefficient that is a parameter as it is."""
        jaxpr = self.setup.jaxpr.jaxpr
        return jaxpr.outvars.index(jaxpr.invars[self.spec.hoisted.index(parameter)])

    def growth(self, hoisted):
        """The largest ``a dt`` of any block and lane; an inverse step multiplies rounding errors by its exponential."""
        known = self.spec.unchanging(hoisted)
        values = units.inside(known.parameters, self.factors.parameters)
        rates = [jnp.max(jnp.abs(values[name] * known.dt)) for name in self._rates]
        return functools.reduce(jnp.maximum, rates)

    def enter(self, hoisted, state) -> tuple:
        return self.transforms["enter"](*hoisted, *state)

    def exit(self, hoisted, state) -> tuple:
        return self.transforms["exit"](*hoisted, *state)

    def _transform(self, name: str):
        """The scheme's "enter" or "exit", with states in declared units outside."""

        def transform(*flat):
            known, p, state, _ = self._named(flat)
            state = units.inside(state, self.factors.states) if name == "enter" else state
            state = getattr(SCHEMES[self.spec.scheme], name)(self.spec.model, state, p, known.dt)
            state = units.outside(state, self.factors.states) if name == "exit" else state
            return [state[n] for n in self.spec.model.states]

        return transform


class _Steps(Programs[Step]):
    def __call__(self, spec: StepSpec, with_inverse: bool = False) -> Step:
        """The step of a specification, built once."""
        return super().__call__(spec, with_inverse)


build = _Steps(Step, lambda spec, with_inverse: spec)
