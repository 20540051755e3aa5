"""The arguments of a run: each is checked and stripped of its unit here, and only here."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np

from . import _context, dispatch, signals, units
from ._jax import is_traced, is_whole, values_here
from .backends.base import Connections, Term
from .connections import connections_of, constants_of, histories_of
from .coupling import wiring
from .devices import split_of
from .equations import key_of
from .groups import Groups
from .models.base import Model, check_model, check_name, refuse_nan
from .network import Network, links_of, parts_of
from .noise import check_key, check_streams
from .notices import warn
from .recording import Reduction, Sampling
from .routing import noise_unit
from .run import Data, Run, inverse_holds, request_of
from .schedule import COUNTED, Schedule
from .schemes import NEEDS, SCHEMES
from .signals import Signal
from .step import StepSpec, build
from .stimuli import Drive, Stimuli, drives_of, refuse, with_base
from .timing import digits_of

# The longest step in units of a model's fastest time constant; a step longer than one gives a warning.
COARSEST = 1e4
# Counters of steps stay well within 64 bits.
MOST_STEPS = 2**53
# In shorter runs a batch often has as many lanes as there are steps.
SHORTEST = 10


class PerLane(NamedTuple):
    """An input with one value a lane, even if there are as many lanes as steps."""

    value: Any


class Values(NamedTuple):
    """The arrays of a run by name, without units.

    Attributes
    ----------
    parameters, constant, noise, coupling : what does not change during a run: parameters of the model, constant
        inputs, intensities of noise, constants of the coupling
    varying : inputs with one value a step
    state : the initial one
    key : of the noise
    connections : those of each term of the sums of a network, and of delays inside a mass
    history : of each quantity that a network sends, what was sent before the first step
    depths : of each such quantity, its longest delay in steps
    terms : of a network, without data
    by_lane : names of the constant inputs that are `PerLane`
    regions : of a network, else 0
    between : how many of the connections are couplings between regions; the others are delays inside a mass
    stimuli : of inputs
    """

    parameters: dict[str, Any]
    constant: dict[str, Any]
    noise: dict[str, Any]
    coupling: dict[str, Any]
    varying: dict[str, Any]
    state: dict[str, Any]
    key: Any
    connections: tuple[Connections, ...]
    history: tuple
    by_lane: set[str]
    depths: tuple[int, ...] = ()
    terms: tuple[Term, ...] = ()
    regions: int = 0
    between: int = 0
    stimuli: Stimuli = Stimuli()

    @classmethod
    def of(cls, model: Model | Network, parameters, inputs, initial, noise, key, steps: int, dt: float) -> Values:
        """From a call's arguments, the parameters without units; ``dt`` in seconds."""
        network, mass = parts_of(model)
        check_key(key)
        inputs, drives = _without_stimuli(mass, inputs)
        magnitudes, by_lane = _inputs(mass, inputs)
        spread = mass.spread if isinstance(mass, Groups) else lambda _, x: x
        unit_of = {n: units.unit_of(x) for n, x in mass.inputs.items()}
        stimuli = Stimuli.of(drives, unit_of, mass.time_unit, spread)
        connections, history, depths, terms, coupling = (), (), (), (), {}
        initial = _mapping(initial, "initial")
        if links_of(model):
            connections, terms, depths = connections_of(model, dt)
            history = histories_of(model, initial.pop("history", None), depths, dt)
            coupling = constants_of(network) if network else {}
        state = _initial(mass, initial)
        sigmas = _sigmas(mass, noise, key)
        if isinstance(mass, Groups):
            state = {n: mass.spread(n, x) for n, x in state.items()}
            sigmas = {n: mass.spread(n, x) for n, x in sigmas.items()}
            magnitudes = {n: x if np.shape(x) == (steps,) else mass.spread(n, x) for n, x in magnitudes.items()}
        constant = {n: x for n, x in magnitudes.items() if n in by_lane or not _varies(x, steps)}
        varying = {n: x for n, x in magnitudes.items() if n not in constant}
        regions = network.regions if network else 0
        between = sum(map(len, wiring(network.links)[1])) if network else 0
        return cls(
            parameters, constant, sigmas, coupling, varying, state, key, connections, history, by_lane, depths, terms,
            regions, sum(term.total < between for term in terms), stimuli,
        )  # fmt: skip

    def batch(self, steps: int) -> tuple[int, ...]:
        """The shape that all arrays broadcast to, time axes left out."""
        regions = (self.regions,) * bool(self.regions)
        networks = [(*each, *regions) for term in self.connections for each in term.batches]
        lanes = [*self.parameters.values(), *self.state.values(), *self.noise.values(), *self.coupling.values()]
        shapes = [*map(np.shape, lanes), _key_batch(self.key)]
        shapes += map(np.shape, self.stimuli.named.values())
        others = [*shapes, *networks]
        _check_lengths({n: x for n, x in self.constant.items() if n not in self.by_lane}, others, steps)
        shapes += [*map(np.shape, self.constant.values()), *(np.shape(x)[1:] for x in self.varying.values())]
        named = {**self.parameters, **self.constant, **self.varying, **self.state}
        named |= self.coupling | self.stimuli.named
        if regions:
            named["weights"] = jax.ShapeDtypeStruct(max(networks, key=len), np.float32)
        shapes += [*networks, *(np.shape(x)[1:] for x in self.history if x is not None)]
        return _batch(named, shapes, self.varying, steps, _key_batch(self.key))

    def dtype(self):
        """Of all arithmetic: the widest of the arrays."""
        groups = (self.parameters, self.constant, self.varying, self.state, self.noise, self.coupling)
        arrays = [x for group in groups for x in group.values()] + list(self.stimuli.named.values())
        # Those of delays inside a mass are this package's.
        arrays += [term.weights for term in self.connections[: self.between]]
        return _dtype([*arrays, *(x for x in self.history if x is not None)])

    def data(self, dt, time_unit, digits: int) -> Data:
        """In the order of `StepSpec.hoisted`; ``dt`` in the model's ``time_unit``."""
        groups = (self.parameters, self.constant, self.noise, self.coupling)
        stimuli = self.stimuli.data(float(dt), time_unit, digits)
        hoisted = (*(x for group in groups for x in group.values()), *stimuli, dt)
        key = self.key if self.noise else None
        state, varying = tuple(self.state.values()), tuple(self.varying.values())
        return Data(hoisted, state, varying, key, self.connections, self.history)


class Held(NamedTuple):
    """What a mass is held at where nothing is simulated: plain arrays by name.

    Attributes
    ----------
    parameters, inputs, noise : as `Values` has them
    state : where a search for a state at rest begins
    """

    parameters: dict[str, Any]
    inputs: dict[str, Any]
    noise: dict[str, Any]
    state: dict[str, Any]

    @classmethod
    def of(cls, mass: Model, inputs, initial, noise) -> Held:
        """From a call's arguments; of groups, each for all regions or for one."""
        initial = _mapping(initial, "initial")
        initial.pop("history", None)
        state = _initial(mass, initial)
        sigmas, magnitudes = _intensities(mass, _mapping(noise, "noise")), _inputs(mass, inputs)[0]
        groups = [magnitudes, sigmas, state]
        if isinstance(mass, Groups):
            groups = [{n: mass.spread(n, x) for n, x in values.items()} for values in groups]
        return cls(mass.magnitudes(), *groups)

    def batch(self, others: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """The shape that all broadcast to, with the shapes of other arrays by name."""
        labels = ("", "", "noise.", "initial ")
        named = {f"{label}{n}": x for label, group in zip(labels, self, strict=True) for n, x in group.items()}
        named |= {n: jax.ShapeDtypeStruct(shape, np.float32) for n, shape in others.items()}
        return _batch(named, [*map(np.shape, named.values())], {}, 0)

    def dtype(self, others: Iterable[Any] = ()):
        """Of all arithmetic: the widest of the arrays."""
        return _dtype([*(x for group in self for x in group.values()), *others])


def prepare(
    model, duration, dt, inputs=None, initial=None, noise=None, key=None, record=None, every=1, transient=None,
    scheme=None, checkpoint_every=None, precision="exact", implementation=None, gradient_horizon=None,
) -> tuple[Run, Data]:  # fmt: skip
    """Check every argument, and separate what decides the program from the data that it runs on."""
    network, mass = parts_of(model)
    check_model(mass, ", or a bk.Network of one")
    scheme = _scheme(mass, scheme)
    seconds = units.positive_time(dt, u.second, "dt")
    arrays: list[Any] = []
    entries = entries_of(mass, record, arrays)
    schedule = _schedule(duration, transient, every, seconds, bool(entries))
    horizon = _horizon(gradient_horizon, seconds, schedule)
    step_time = units.strip(dt, mass.time_unit, "dt")
    parameters = mass.magnitudes()
    _check_step(mass, scheme, parameters, float(step_time))
    values = Values.of(model, parameters, inputs, initial, noise, key, schedule.steps, seconds)
    check_streams(values.noise, schedule.steps)
    batch = values.batch(schedule.steps)
    if network and batch[-1] != network.regions:
        raise ValueError(
            f"the last axis of the batch {batch} is not the {network.regions} regions of the network: what is one for "
            f"each of several networks takes the shape (networks, 1)"
        )
    if precision not in ("exact", "fast"):
        raise ValueError(f"'precision' got {precision!r}, but takes 'exact' or 'fast'")
    dispatch.check_known(implementation)
    sources = dict.fromkeys(signals.root(what) for _, what in entries)
    digits = digits_of(schedule.steps) if values.stimuli.forms else 0
    spec = StepSpec(
        type(mass), scheme, tuple(values.constant), tuple(values.varying), tuple(values.noise), tuple(sources),
        np.dtype(values.dtype()), links_of(model), stimuli=values.stimuli.forms, digits=digits,
    )  # fmt: skip
    run = Run(
        spec,
        batch,
        schedule,
        _checkpoint_every(checkpoint_every, schedule.steps),
        implementation or "",
        native_autodiff=implementation == "scan",
        precision=precision,
        interpret=_context.INTERPRETED.get(),
        platform=dispatch.platform(),
        entries=entries,
        sampling=_sampling(entries, schedule, seconds, max(1, math.prod(batch)), values.regions, horizon),
        depths=values.depths,
        terms=values.terms,
        spans=mass.spans if isinstance(mass, Groups) else (),
        horizon=horizon,
        statistics=key_of(*(type(what) for _, what in entries if isinstance(what, Reduction))),
        arrays=tuple(tuple(np.shape(x)) for x in arrays),
    )
    data = values.data(step_time, mass.time_unit, digits)._replace(arrays=tuple(arrays))
    return _dispatched(run, data, implementation, checkpoint_every), data


def _dispatched(run: Run, data: Data, implementation: str | None, checkpoint_every: int | None) -> Run:
    """The run with its implementation, and all that depends on it."""
    name, _, _ = dispatch.choose(implementation, request_of(run))
    backend = dispatch.load(name)
    if backend.base_two(run.precision):
        run = run._replace(spec=dataclasses.replace(run.spec, base_two=True))
    # Interpreters wait for each other's devices.
    split = None if run.interpret else split_of(run.batch, run.spec.is_network, data, name)
    run = run._replace(implementation=name, split=split)
    run = run._replace(copied=backend.copied(request_of(run.share)))
    if data.connections and name == "scan":
        # `scan` is differentiated by JAX for networks: a checkpoint stores the history, a step all that arrives.
        checkpoint, step = len(data.state) + sum(run.depths), len(data.state) + run.arriving
        every = _checkpoint_every(checkpoint_every, run.schedule.steps, checkpoint / step)
        run = run._replace(native_autodiff=True, checkpoint_every=every)
    return run._replace(inverse_steps=_inverse_steps(run, data.hoisted))


def _scheme(model: Model, scheme: str | None) -> str:
    scheme = model.scheme if scheme is None else scheme
    check_name(scheme, SCHEMES, "scheme")
    needs = SCHEMES[scheme].needs
    if needs and not getattr(model, needs, ()):
        possible = [n for n, s in SCHEMES.items() if not s.needs or getattr(model, s.needs, ())]
        raise ValueError(
            f"scheme '{scheme}' needs a model {NEEDS[needs]}, and {type(model).__name__} is not; "
            f"it takes {', '.join(possible)}"
        )
    return scheme


def _schedule(duration, transient, every, seconds: float, recorded: bool) -> Schedule:
    steps = units.steps_of(duration, seconds, "duration")
    if steps < 1:
        raise ValueError(f"'duration' got {duration}, but takes at least one step")
    if steps > MOST_STEPS:
        raise ValueError(
            f"'duration' got {duration}, which is {steps:.3g} steps of dt = {seconds:g} s, but takes at most "
            f"{MOST_STEPS:.3g} steps"
        )
    lead = 0 if transient is None else units.steps_of(transient, seconds, "transient")
    if not 0 <= lead <= steps:
        raise ValueError(f"'transient' got {transient}, but takes a time from 0 to the duration ({steps} steps)")
    if isinstance(every, (bool, np.bool_)) or not isinstance(every, (int, np.integer)):
        raise TypeError(f"'every' got {every!r}, but takes a whole number of steps")
    if every < 1:
        raise ValueError(f"'every' got {every}, but takes at least 1")
    if recorded and lead < steps < lead + every:
        raise ValueError(
            f"'every' got {every}, but takes at most the {steps - lead} steps that are recorded: nothing would be"
        )
    return Schedule(steps, lead, int(every))


def _checkpoint_every(every, steps: int, ratio: float = 1.0) -> int:
    """Steps between checkpoints; a checkpoint takes ``ratio`` times the memory of a step."""
    if every is None:
        return min(steps, max(1, math.isqrt(math.ceil(steps * ratio))))
    if isinstance(every, bool) or not isinstance(every, (int, np.integer)) or every < 1:
        raise ValueError(f"'checkpoint_every' got {every!r}, but takes a positive number of steps")
    return min(int(every), steps)


def _inverse_steps(run: Run, hoisted) -> str:
    """Whether rounding stays small over the inverse steps of a segment; of traced rates, "asked" at run time."""
    if run.native_autodiff or not dispatch.load(run.implementation).inverse_steps or not build(run.spec).invertible:
        return ""
    growth = _rates(run.spec.model, run.spec.unchanging(hoisted).parameters), hoisted[-1]
    if not all(map(is_whole, jax.tree.leaves(growth))):
        return "asked"
    fastest = max(float(np.max(np.abs(rate), initial=0.0)) for rate in growth[0].values()) * float(growth[1])
    return "always" if inverse_holds(run, fastest) else ""


def _check_step(model: Model, scheme: str, parameters, dt: float) -> None:
    """Raise if a step is unstable or far too long; warn if it is longer than the model's fastest time constant."""
    rounding = float(jnp.finfo(jnp.result_type(float)).eps)
    if scheme == "given":
        return
    if not rounding**2 <= dt <= 1.0 / rounding:
        raise ValueError(
            f"'dt' got {dt:g} {model.time_unit}, but takes a time from {rounding**2:.2g} to {1 / rounding:.2g} "
            f"{model.time_unit}: any other step is lost in rounding"
        )
    limit = SCHEMES[scheme].limit
    rates = {n: x for n, x in _rates(type(model), _known(parameters)).items() if np.size(x)}
    for name, rate in rates.items():
        fastest = float(np.max(rate)) * dt
        if limit is not None and fastest >= limit:
            raise ValueError(
                f"'dt' got {dt:g} {model.time_unit}, at which '{scheme}' is unstable for {name} = "
                f"{np.max(values_here(parameters[name])):g}: it takes dt below {limit * dt / fastest:.4g} "
                f"{model.time_unit}. The schemes 'strang' and 'exact' are stable at any dt"
            )
    times = {n: 1.0 / float(np.max(rate)) for n, rate in rates.items() if np.max(rate) > 0.0}
    if not getattr(model, "blocks", ()):
        times = _times(model, _known(parameters))
    name = min(times, key=lambda n: times[n], default="")
    if not name or not dt > times[name] * (1.0 + 1e-6):
        return
    fastest = f"{'1 / ' * (name in rates)}{name} = {times[name]:.4g} {model.time_unit}"
    kind = type(model).__name__
    message = f"'dt' got {dt:g} {model.time_unit}, longer than the fastest time constant of {kind}, {fastest}"
    if name in rates and dt >= COARSEST * times[name]:
        raise ValueError(f"{message}, {COARSEST:g} times or more: nothing of the dynamics is left")
    warn(f"{message}: the steps miss what happens within it. Take a shorter dt, unless only slower changes matter")


def _known(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values that are not traced, as NumPy arrays: under jit, operations on JAX's arrays would be traced."""
    return {n: values_here(x) for n, x in values.items() if not is_traced(x)}


def _rates(model: type[Model], values: Mapping[str, Any]) -> dict[str, Any]:
    """The rate of each second-order block as the equations take it, by its parameter."""
    names = list(dict.fromkeys(b.a for b in getattr(model, "blocks", ())))
    unit_of = model.parameter_units() if names else {}
    return {n: units.scaled(values[n], model.time_factor(n, unit_of[n])) for n in names if n in values}


def _times(model: Model, parameters) -> dict[str, float]:
    """The shortest value of each parameter that is a time and no delay, in the model's unit of time."""
    shortest, delays = {}, {each.by for each in type(model).delayed.values()}
    for name, unit in model.parameter_units().items():
        x = parameters.get(name, ())
        if name not in delays and unit.dim == u.second.dim and np.size(x) and np.min(x) > 0.0:
            shortest[name] = float(np.min(x)) * units.time_factor(unit, model.time_unit, name)
    return shortest


def per_lane(inputs: Mapping[str, Any], names) -> dict[str, Any]:
    """The inputs, of which the constants of those with these ``names`` are `PerLane`."""
    drives = drives_of(inputs)
    bases = {n: drives[n].base if n in drives else x for n, x in inputs.items()}
    return {n: with_base(x, PerLane(bases[n])) if n in names else x for n, x in inputs.items()}


def _without_stimuli(model: Model, inputs) -> tuple[dict[str, Any], dict[str, Drive]]:
    """The inputs without their stimuli, and those that have some."""
    inputs = _mapping(inputs, "inputs")
    drives = drives_of(inputs)
    for name, drive in drives.items():
        check_name(name, model.inputs, "input")
        zero = units.attach(0.0, units.unit_of(model.inputs[name]))
        inputs[name] = zero if drive.base is None else drive.base
    return inputs, drives


def _inputs(model: Model, inputs) -> tuple[dict[str, Any], set[str]]:
    """The magnitude of each input, and which of them are `PerLane`."""
    inputs = _mapping(inputs, "inputs")
    for name in inputs:
        check_name(name, model.inputs, "input")
    by_lane = {n for n, x in inputs.items() if isinstance(x, PerLane)}
    values = {**model.inputs, **{n: x.value if n in by_lane else x for n, x in inputs.items()}}
    magnitudes = {n: units.strip(x, units.unit_of(model.inputs[n]), n) for n, x in values.items()}
    for n, x in magnitudes.items():
        refuse_nan(x, n)
    return magnitudes, by_lane


def _initial(model: Model, initial) -> dict[str, Any]:
    initial = _mapping(initial, "initial")
    for name in initial:
        check_name(name, model.states, "state")
    refuse(initial, "initial")
    start = {**model.initial, **initial}
    state = {n: units.strip(start[n], unit, n) if n in start else 0.0 for n, unit in model.states.items()}
    for n in initial:
        refuse_nan(state[n], n, infinite=True)
    return state


def _sigmas(model: Model, noise, key) -> dict[str, Any]:
    noise = _mapping(noise, "noise")
    refuse(noise, "noise")
    if noise and key is None:
        raise ValueError("'noise' needs 'key', a JAX random key such as jax.random.key(0)")
    return _intensities(model, noise)


def _intensities(model: Model, noise: Mapping[str, Any]) -> dict[str, Any]:
    """The intensities of noise as plain arrays, by name in alphabetical order."""
    sigmas = {}
    for name, sigma in noise.items():
        check_name(name, {**model.inputs, **model.states}, "input or state")
        unit = noise_unit(model, name)
        sigmas[name] = magnitude = units.strip(sigma, unit, f"noise[{name!r}]")
        refuse_nan(magnitude, f"noise[{name!r}]", infinite=True)
        if not is_traced(magnitude) and np.min(values_here(magnitude), initial=0.0) < 0.0:
            least = np.min(values_here(magnitude))
            raise ValueError(f"noise[{name!r}] got {least:g} {unit}, but takes an intensity from 0 on")
    return dict(sorted(sigmas.items()))


def _mapping(value, name: str) -> dict:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise TypeError(f"'{name}' got {type(value).__name__}, but takes a dict by name")
    return dict(value)


def entries_of(
    model: Model, record, arrays: list[Any] | None = None
) -> tuple[tuple[str, str | Reduction | Signal], ...]:
    """The quantity, the signal or the statistic that is recorded, by the result's name.

    The data of signals are appended to ``arrays``.
    """
    known, arrays = model.recordable(), [] if arrays is None else arrays
    lanes_of = model.lanes_of if isinstance(model, Groups) else lambda name: None
    if record is None:
        record = model.recorded() if isinstance(model, Groups) else tuple(model.observables) or tuple(model.states)
    record = (record,) if isinstance(record, (str, Reduction, Signal, type)) else record
    if not isinstance(record, Iterable):
        raise TypeError(f"'record' got {type(record).__name__}, but takes names, and statistics such as bk.Mean()")
    entries: dict[str, str | Reduction | Signal] = {}
    for name, what in record.items() if isinstance(record, Mapping) else [(None, what) for what in record]:
        if isinstance(what, type):
            raise TypeError(f"'record' got the class {what.__name__}, but takes one of it: bk.{what.__name__}(...)")
        if not isinstance(what, (str, Reduction, Signal)):
            raise TypeError(f"'record' got {type(what).__name__}, but takes names, and statistics such as bk.Mean()")
        if isinstance(what, str):
            check_name(what, known, "record")
        else:
            what = signals.bind(what, known, lanes_of, arrays)
        name = signals.name_of(what) if name is None else name
        if entries.setdefault(name, what) != what:
            raise ValueError(f"'record' has two results named '{name}': give a dict with a name for each")
    return tuple(entries.items())


def _horizon(gradient_horizon, seconds: float, schedule: Schedule) -> int:
    """Steps that a gradient goes back at most; 0 without a limit."""
    if gradient_horizon is None:
        return 0
    horizon = units.steps_of(gradient_horizon, seconds, "gradient_horizon")
    if horizon < 1:
        raise ValueError(
            f"'gradient_horizon' got {gradient_horizon}, but takes at least one step of dt = {seconds:g} s"
        )
    return horizon if horizon < schedule.steps else 0


def _sampling(entries, schedule: Schedule, seconds: float, lanes: int, regions: int, horizon: int) -> Sampling | None:
    computed = [what for _, what in entries if not isinstance(what, str)]
    if not computed:
        return None
    if schedule.count > COUNTED:
        fewer = -(-(schedule.steps - schedule.lead) // COUNTED)
        raise ValueError(
            f"'record' got a statistic of {schedule.count:,} records, but takes at most {COUNTED:,}: "
            f"every={fewer} or more gives so few, or several runs that continue each other with initial=result.final"
        )
    interval = schedule.every * seconds
    at_once = Sampling(schedule.count, interval, schedule.count, regions)
    multiple = math.lcm(*(signals.check(what, at_once) for what in computed))
    # A gradient ends where a block begins, too.
    return Sampling.of(schedule.count, interval, lanes, regions, multiple, horizon // schedule.every)


def _varies(x, steps: int) -> bool:
    """Whether an input has one value a step: its first axis is as long as the run."""
    return np.ndim(x) > 0 and np.shape(x)[0] == steps and steps > 1


def _check_lengths(constant, extents, steps: int) -> None:
    """Raise if an axis of a constant input is nearly as long as the run, unless other arguments have that axis too."""
    if steps < SHORTEST:
        return
    near = {n: [k for k, size in enumerate(np.shape(x)) if abs(size - steps) <= max(1, steps // 100)]
            for n, x in constant.items()}  # fmt: skip
    known = [*extents, *(np.shape(constant[n]) for n, axes in near.items() if not axes)]
    for name, axes in near.items():
        shape = np.shape(constant[name])
        for k in axes:
            back = k - len(shape)
            if not any(len(other) >= -back and other[back] == shape[k] for other in known):
                raise ValueError(
                    f"'{name}' got shape {shape}, but takes one value a step, ({steps},) or ({steps}, *batch), time "
                    f"first, or values that broadcast to the batch. If {shape[k]} lanes are meant, say so by another "
                    f"argument, such as a parameter of shape ({shape[k]},)"
                )


def _key_batch(key) -> tuple[int, ...]:
    """The batch shape of a key; the last axis of an old-style key is the key itself."""
    if key is None:
        return ()
    return key.shape if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key.shape[:-1]


def _batch(named, shapes, varying, steps: int, keys: tuple[int, ...] = ()) -> tuple[int, ...]:
    try:
        batch = np.broadcast_shapes(*shapes)
    except ValueError:
        sizes = {n: np.shape(x) for n, x in named.items() if np.shape(x)} | ({"key": keys} if keys else {})
        listed = ", ".join(f"{n} {s}{' (one value a step)' if n in varying else ''}" for n, s in sizes.items())
        raise ValueError(f"these shapes do not broadcast to one batch: {listed}") from None
    for name, x in varying.items():
        if np.ndim(x) == 1 and batch and batch[-1] == steps:
            raise ValueError(
                f"'{name}' got shape {np.shape(x)}, which could be one value a step or one a lane, since the batch is "
                f"{batch} and there are {steps} steps; give it as (steps, *batch), {(steps, *batch)}"
            )
    return batch


def _dtype(values):
    arrays = [x for x in values if hasattr(x, "dtype") and not getattr(x, "weak_type", False)]
    # The widest, whatever promotion mode a user has set: every value is cast to it.
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.result_type(*arrays) if arrays else jnp.result_type(float)
    return jnp.float32 if dtype in (jnp.float16, jnp.bfloat16) else jax.dtypes.canonicalize_dtype(dtype)
