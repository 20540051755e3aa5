"""simulate(): from a model with units to a run on some backend, and its gradient."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import derivatives, dispatch, memory, noise, recording, testing, units
from ._jax import is_traced
from .backends.base import Backend, Copied, Coupling, Loop, Pullbacks, Request, Schedule, Wanted, Wires, pieces
from .backends.scan import Scan
from .equations import Key, key_of
from .interrupts import heard
from .models.base import Model, check_model, check_name, refuse_nan
from .network import Network
from .noise import check_key
from .notices import warn
from .pointwise import pullback, pullback_after
from .programs import Programs
from .recording import Reduction, Sampling
from .schemes import NEEDS, SCHEMES
from .step import Step, StepSpec, build

# Inverse steps multiply rounding errors by exp(a dt) each: how far they may go, in `a dt`, to stay within contract 1.
REACH = 2.0
# How many of a model's fastest time constants a step may last: a warning tells of more than one.
COARSEST = 1e4
# Counters of steps stay well within 64 bits.
MOST_STEPS = 2**53
# In a run of fewer steps a batch may well have as many lanes.
SHORTEST = 10


class Run(NamedTuple):
    """Everything about a run that is not data; the key under which it is compiled."""

    spec: StepSpec
    batch: tuple[int, ...]
    schedule: Schedule
    checkpoint_every: int
    implementation: str
    transparent: bool
    precision: str
    interpret: str
    platform: str
    entries: tuple[tuple[str, str | Reduction], ...]  # by the result's name, what is recorded
    sampling: Sampling | None  # the records, where a statistic is made of them
    depth: int = 0  # steps of a network's longest delay
    delays: tuple[int, ...] = ()  # how many of a network's connections have each delay, from 0 to depth
    statistics: Key | None = None  # of the code of the statistics among the entries
    copied: Copied = Copied()  # what the kernel's records are copied from
    retreat: str = ""  # whether the adjoint walks back by inverse steps: "always", "asked" at run time, or never


class Data(NamedTuple):
    """The arrays of a run, without units, each with its own part of the batch shape."""

    hoisted: tuple
    state: tuple
    varying: tuple
    key: Any
    wires: Wires | None = None  # of a network; its history may be missing, or broadcast to ``(depth, *batch)``


class PerLane(NamedTuple):
    """An input with one value a lane, as its caller knows, however many lanes and steps there are."""

    value: Any


@dataclasses.dataclass(frozen=True)
class Times:
    """When the records of a run were taken: steps and the time of one apart, so that no time is rounded to float32.

    Attributes
    ----------
    lead : steps before the first stretch that is recorded
    every : steps from one record to the next
    count : how many records there are
    dt : the time of a step
    unit : its unit
    """

    lead: int
    every: int
    count: int
    dt: float
    unit: Any

    @property
    def values(self):
        """``(K,)``, a Quantity of NumPy's float64."""
        return u.Quantity((self.lead + self.every * np.arange(1, self.count + 1)) * self.dt, unit=self.unit)


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Result:
    """What a run returns; ``result["eeg"]`` is a record.

    Attributes
    ----------
    times : when the records were taken, as steps and the time of one; `ts` are their values
    records : each recorded quantity, ``(K, *batch)``, and each statistic, ``(*batch)`` or ``(M, *batch)``
    final : the state after the last step, each ``(*batch)``; give it to ``initial=`` to go on. Of a network with
        delays it has the ``history`` too, ``(H, *batch)``
    statistics : of each record that is one, what it is and what it was made of
    """

    times: Times
    records: dict[str, Any]
    final: dict[str, Any]
    statistics: Mapping[str, tuple[Reduction, Sampling]] = dataclasses.field(default_factory=dict)

    @property
    def ts(self):
        """``(K,)``, the time at the end of each recorded step; NumPy's float64, under ``jit`` and ``vmap`` too."""
        return self.times.values

    @property
    def axes(self) -> dict[str, Any]:
        """What the first axis of a record is: `ts`, the frequencies of a spectrum, the times of averages."""
        ts = self.ts
        found = {n: self.statistics[n][0].axis(ts, self.statistics[n][1]) if n in self.statistics else ts
                 for n in self.records}  # fmt: skip
        return {n: axis for n, axis in found.items() if axis is not None}

    def __getitem__(self, name: str):
        check_name(name, self.records, "record")
        self._look()
        return self.records[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.records)

    @property
    def ok(self):
        """For each lane, whether the run stayed finite. Computed when asked, from the final state."""
        self._look()
        return self._finite()

    def _finite(self):
        finite = [jnp.isfinite(u.get_magnitude(x)) for name, x in self.final.items() if name != "history"]
        return functools.reduce(jnp.logical_and, finite)

    def _look(self) -> None:
        """Warn, the first time that the numbers are there to be looked at, of lanes that did not stay finite."""
        final = [u.get_magnitude(x) for name, x in self.final.items() if name != "history"]
        if "_looked" in vars(self) or not all(map(_at_hand, final)):
            return
        object.__setattr__(self, "_looked", True)
        lost = ~functools.reduce(np.logical_and, map(np.isfinite, jax.device_get(final)), np.True_)
        if lost.any():
            which = "this run" if lost.size == 1 else f"{np.sum(lost):,} of the {lost.size:,} lanes of this run"
            warn(
                f"{which} did not stay finite{'' if lost.size == 1 else ' (result.ok says which)'}: take a shorter dt, "
                f"another scheme, or parameters, inputs and a start within the model's range"
            )

    def __repr__(self) -> str:
        self._look()
        shapes = ", ".join(f"{n} {tuple(x.shape)}" for n, x in self.records.items())
        return f"Result({shapes or 'no records'}; {len(self.final)} final states)"

    def tree_flatten(self):
        return (self.records, self.final), (self.times, tuple(self.statistics.items()))

    @classmethod
    def tree_unflatten(cls, static, children):
        (times, statistics), (records, final) = static, children
        return cls(times, records, final, dict(statistics))


def _at_hand(x) -> bool:
    """Whether an array can be looked at without waiting for it."""
    if isinstance(x, jax.Array) and not is_traced(x):
        return not x.is_deleted() and x.is_fully_addressable and x.is_ready()  # pyright: ignore[reportAttributeAccessIssue]
    return isinstance(x, np.ndarray)


@heard
def simulate(
    model: Model | Network,
    duration,
    dt,
    *,
    inputs: Mapping[str, Any] | None = None,
    initial: Mapping[str, Any] | None = None,
    noise: Mapping[str, Any] | None = None,
    key=None,
    record=None,
    every: int = 1,
    transient=None,
    scheme: str | None = None,
    checkpoint_every: int | None = None,
    precision: str = "exact",
    implementation: str | None = None,
) -> Result:
    """Simulate a batch of masses, all steps in one compiled loop, differentiably.

    Parameters
    ----------
    model : its fields broadcast to the batch; or a `Network` of one, the last axis of whose batch is the regions
    duration : a time, a whole multiple of ``dt``, or a number of steps
    dt : the time of a step
    inputs : by name: a constant that broadcasts to the batch, or one value a step, ``(T,)`` or ``(T, *batch)``
    initial : by state name, or ``result.final`` of an earlier run; the model's own otherwise, or zero
    noise : by name, the intensity of white noise: on an input, in its unit times sqrt(time), or on a state, in its
        unit over sqrt(time), there multiplied with `Model.diffusion`. Ito's integral, or with "heun" and "rk4"
        Stratonovich's
    key : a JAX random key, or one for each lane; needed with ``noise``
    record : names of observables and states, and statistics of them that no trajectory is stored for, such as
        ``bk.Mean()``, ``bk.Spectrum(freqs)`` or ``bk.Average(tr)``; or a dict of these by the names of the results.
        ``None``, the model's observables
    every : steps from one record to the next
    transient : a time or a number of steps, during which nothing is recorded
    scheme : a name in `schemes.SCHEMES`; ``None``, the model's own
    checkpoint_every : steps between the checkpoints of a gradient; ``None``, about the square root of their number
    precision : ``"exact"``, or ``"fast"`` for the hardware's approximate functions
    implementation : ``None`` chooses; see `explain`

    Returns
    -------
    Result

    Raises
    ------
    ValueError, TypeError : an argument's name, unit, shape, dtype or value, before anything is compiled
    Unsupported : the named implementation cannot run this
    """
    run, data = _prepare(**locals())
    memory.check(run)
    guarded = data if run.transparent else derivatives.in_reverse(data, _only_reverse(run))
    records, final = (_run if math.prod(run.batch) else no_lanes(_run))(run, guarded)
    network, model = _parts(model)
    known = model.recordable()
    found, statistics = {}, {}
    if not run.sampling:  # a loop records each quantity once, whatever it is called
        seen: dict[Any, Any] = dict(zip(run.spec.record, records, strict=True))
        records = [seen[what] for _, what in run.entries]
    for (name, what), x in zip(run.entries, records, strict=True):
        if isinstance(what, str):
            found[name] = units.attach(x, known[what])
        elif run.sampling:
            found[name], statistics[name] = units.attach(x, what.unit(known[what.of])), (what, run.sampling)
    last = {n: units.attach(x, known[n]) for n, x in zip(model.states, final)}
    if network and run.depth:
        last["history"] = units.attach(final[-1], network.sent_unit)
    return Result(clock(run, dt), found, last, statistics)


def clock(run: Run, dt) -> Times:
    """When a run records."""
    lead, every, count = run.schedule.lead, run.schedule.every, run.schedule.count
    return Times(lead, every, count, units.concrete(u.get_magnitude(dt), "dt"), dt.unit)


def _only_reverse(run: Run) -> str:
    return (
        f"forward-mode differentiation (jvp, jacfwd, linearize, hessian) of simulate() on '{run.implementation}': "
        'ask for implementation="scan", which JAX differentiates in every mode; grad and vjp work on all'
    )


def _only_once(run: Run) -> str:
    return (
        f"a second derivative (hessian, grad of grad) of a run on '{run.implementation}', which has the first only: "
        'ask simulate() for implementation="scan", which JAX differentiates as often as wanted'
    )


def times(run: Run, dt):
    """The time at the end of each recorded step, ``(K,)``."""
    return clock(run, dt).values


def explain(model: Model | Network, duration, dt, **arguments) -> dispatch.Plan:
    """What `simulate` with the same arguments would do, and why; nothing is run."""
    run, _ = _prepare(model=model, duration=duration, dt=dt, **arguments)
    request = _request(run)
    asked = arguments.get("implementation")
    name, reason, passed_over = dispatch.choose(asked, request)
    step = build(run.spec)
    return dispatch.Plan(
        implementation=name,
        reason=reason,
        passed_over=passed_over,
        lanes=request.lanes,
        steps=run.schedule.steps,
        records=run.schedule.count,
        checkpoint_every=run.checkpoint_every,
        operations=step.parts.operations[0],
        coefficients=len(step.setup.out_avals),
        bytes_recorded=memory.recorded(run),
        bytes_gradient=memory.gradient(run),
        bytes_copied=memory.copied(run),
        lane_block=run.copied.block,
        retreat=run.retreat,
        block=run.sampling.block if run.sampling else 0,
    )


# Reading the arguments ----------------------------------------------------------------------------------------------


def _prepare(
    model, duration, dt, inputs=None, initial=None, noise=None, key=None, record=None, every=1, transient=None,
    scheme=None, checkpoint_every=None, precision="exact", implementation=None,
) -> tuple[Run, Data]:  # fmt: skip
    """Check every argument, and separate what decides the program from the data it runs on."""
    network, model = _parts(model)
    scheme = _scheme(model, scheme)
    seconds = units.positive_time(dt, u.second, "dt")
    entries = _entries(model, record)
    schedule = _schedule(duration, transient, every, seconds, bool(entries))
    parameters = model.magnitudes()
    _check_step(model, scheme, parameters, float(units.strip(dt, model.time_unit, "dt")))
    check_key(key)
    given, by_lane = _inputs(model, inputs)
    wires, initial, links = None, _mapping(initial, "initial"), {}
    if network:
        wires = _wires(network, initial.pop("history", None), seconds)
        links = network.magnitudes()
    state = _initial(model, initial)
    sigmas = _sigmas(model, noise, key)
    held = {n: x for n, x in given.items() if n in by_lane or not _varies(x, schedule.steps)}
    varying = {n: x for n, x in given.items() if n not in held}
    extents = [*parameters.values(), *state.values(), *sigmas.values(), *links.values()]
    extents = [np.shape(x) for x in extents] + [_key_batch(key)]
    extents += [np.shape(wires.weights)[:-1]] if wires else []
    _check_lengths({n: x for n, x in held.items() if n not in by_lane}, extents, schedule.steps)
    shapes = [np.shape(x) for x in (*parameters.values(), *held.values(), *state.values(), *sigmas.values())]
    shapes += [np.shape(x)[1:] for x in varying.values()] + [_key_batch(key)]
    values = [*parameters.values(), *given.values(), *state.values(), *sigmas.values()]
    named = {**parameters, **given, **state}
    if wires:
        named |= {**links, "weights": wires.weights[..., 0]}
        shapes += [np.shape(x) for x in (*links.values(), wires.weights[..., 0])]
        shapes += [] if wires.history is None else [np.shape(wires.history)[1:]]
        values += [*links.values(), wires.weights, *([] if wires.history is None else [wires.history])]
    batch = _batch(named, shapes, varying, schedule.steps)
    if network and batch[-1] != network.regions:
        raise ValueError(
            f"the last axis of the batch {batch} is not the {network.regions} regions of the network: what is one for "
            f"each of several networks takes the shape (networks, 1)"
        )
    dtype = _dtype(values)
    if precision not in ("exact", "fast"):
        raise ValueError(f"'precision' got {precision!r}, but takes 'exact' or 'fast'")
    sources = dict.fromkeys(what if isinstance(what, str) else what.of for _, what in entries)
    spec = StepSpec(
        type(model), scheme, tuple(held), tuple(varying), tuple(sigmas), tuple(sources), np.dtype(dtype),
        network.link if network else None,
    )  # fmt: skip
    every_c = _checkpoint_every(checkpoint_every, schedule.steps)
    dispatch.check_known(implementation)
    run = Run(
        spec,
        batch,
        schedule,
        every_c,
        implementation or "",
        transparent=implementation == "scan",
        precision=precision,
        interpret=testing.interpreting(),
        platform=dispatch.platform(),
        entries=entries,
        sampling=_sampling(entries, schedule, seconds, max(1, math.prod(batch))),
        depth=int(wires.steps.max()) if wires else 0,
        delays=_counted(wires) if wires else (),
        statistics=key_of(*(type(what) for _, what in entries if isinstance(what, Reduction))),
    )
    name, _, _ = dispatch.choose(implementation, _request(run))
    backend = dispatch.load(name)
    if backend.base_two(precision):
        run = run._replace(spec=dataclasses.replace(spec, base_two=True))
    run = run._replace(implementation=name, copied=backend.copied(_request(run)))
    if wires and name == "scan":
        # This loop has no adjoint of its own for networks; a checkpoint has the history, a step all that arrives.
        kept, each = len(state) + run.depth, len(state) + batch[-1]
        every_c = _checkpoint_every(checkpoint_every, schedule.steps, kept / each)
        run = run._replace(transparent=True, checkpoint_every=every_c)
    time = units.strip(dt, model.time_unit, "dt")
    hoisted = (*parameters.values(), *held.values(), *sigmas.values(), *links.values(), time)
    run = run._replace(retreat=_retreat(run, hoisted))
    return run, Data(hoisted, tuple(state.values()), tuple(varying.values()), key if sigmas else None, wires)


def _parts(model) -> tuple[Network | None, Model]:
    """The network, if it is one, and the model of each lane."""
    if isinstance(model, Network):
        return model, model.model
    check_model(model, ", or a bk.Network of one")
    return None, model


def _wires(network: Network, history: Any, dt: float) -> Wires:
    """The connections of a network, their delays in steps."""
    steps, weights = network.delay_steps(dt), network.connections()
    known = not is_traced(weights)
    counts = np.any(np.asarray(weights) != 0.0, axis=tuple(range(np.ndim(weights) - 2))) if known else None
    ends = np.argwhere(np.ones(steps.shape, bool) if counts is None else counts).T.astype(np.int32)
    depth = int(steps.max())
    if history is not None and not depth:
        raise ValueError("'history' was given, but this network has no delays")
    if callable(history):
        history = history(u.Quantity(np.arange(-depth, 0) * dt, unit=u.second))
        history = history[:, None] if np.ndim(history) == 1 else history
    if history is not None:
        history = units.strip(history, network.sent_unit, "history")
        refuse_nan(history, "history")
        if np.ndim(history) < 2:
            history = jnp.broadcast_to(history, (depth, *(np.shape(history) or (1,))))
        if np.shape(history)[0] != depth:
            raise ValueError(
                f"'history' got shape {np.shape(history)}, but takes one value, one for each region, or "
                f"({depth}, *batch, {network.regions}): the longest delay is {depth} steps"
            )
    return Wires(weights, steps, history, ends)  # pyright: ignore[reportArgumentType]


def _counted(wires: Wires) -> tuple[int, ...]:
    """How many of the connections that count have each delay."""
    delays = np.asarray(wires.steps)[tuple(np.asarray(wires.ends))]
    return tuple(np.bincount(delays, minlength=int(np.max(wires.steps)) + 1).tolist())


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


def _checkpoint_every(given, steps: int, ratio: float = 1.0) -> int:
    """Steps between checkpoints, each of which takes ``ratio`` times as much as a step in between."""
    if given is None:
        return min(steps, max(1, math.isqrt(math.ceil(steps * ratio))))
    if isinstance(given, bool) or not isinstance(given, (int, np.integer)) or given < 1:
        raise ValueError(f"'checkpoint_every' got {given!r}, but takes a positive number of steps")
    return min(int(given), steps)


def _retreat(run: Run, hoisted) -> str:
    """Whether rounding stays small over the inverse steps of a segment; where rates are traced, to be asked."""
    if run.transparent or not dispatch.load(run.implementation).retreats or not build(run.spec).retreats:
        return ""
    growth = _rates(run.spec.model, dict(zip(run.spec.hoisted, hoisted))), hoisted[-1]
    if any(is_traced(x) for x in jax.tree.leaves(growth)):
        return "asked"
    fastest = max(float(np.max(np.abs(rate), initial=0.0)) for rate in growth[0].values()) * float(growth[1])
    return "always" if fastest * _longest(run) <= REACH else ""


def _longest(run: Run) -> int:
    """Steps of the longest segment between two checkpoints."""
    return max((piece.length for piece in pieces(run.schedule, run.checkpoint_every)), default=0)


def _check_step(model: Model, scheme: str, parameters, dt: float) -> None:
    """A step is refused where it cannot be meant, and warned of where it steps over the model's fastest change."""
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
                f"{np.max(parameters[name]):g}: it takes dt below {limit * dt / fastest:.4g} {model.time_unit}. The "
                f"schemes 'strang' and 'exact' are stable at any dt"
            )
    times = {n: 1.0 / float(np.max(rate)) for n, rate in rates.items() if np.max(rate) > 0.0}
    if not getattr(model, "blocks", ()):
        times = _times(model, _known(parameters))
    name = min(times, key=lambda n: times[n], default="")
    if not name or not dt > times[name] * (1.0 + 1e-6):
        return
    fastest = f"{'1 / ' * (name in rates)}{name} = {times[name]:.4g} {model.time_unit}"
    kind = type(model).__name__
    said = f"'dt' got {dt:g} {model.time_unit}, longer than the fastest time constant of {kind}, {fastest}"
    if name in rates and dt >= COARSEST * times[name]:
        raise ValueError(f"{said}, {COARSEST:g} times or more: nothing of the dynamics is left")
    warn(f"{said}: the steps miss what happens within it. Take a shorter dt, unless only slower changes matter")


def _known(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values that are known before tracing, as NumPy's: under jit, JAX would trace what is made of its own."""
    return {n: np.asarray(x) for n, x in values.items() if not is_traced(x)}


def _rates(model: type[Model], values: Mapping[str, Any]) -> dict[str, Any]:
    """The rate of each second-order block as the equations take it, by its parameter."""
    names = list(dict.fromkeys(b.a for b in getattr(model, "blocks", ())))
    unit_of = model.parameter_units() if names else {}
    return {n: units.scaled(values[n], model.time_factor(n, unit_of[n])) for n in names if n in values}


def _times(model: Model, parameters) -> dict[str, float]:
    """The shortest of each parameter that is a time, in the model's unit of time."""
    found = {}
    for name, unit in model.parameter_units().items():
        x = parameters.get(name, ())
        if unit.dim == u.second.dim and np.size(x) and np.min(x) > 0.0:
            found[name] = float(np.min(x)) * units.time_factor(unit, model.time_unit, name)
    return found


def _inputs(model: Model, inputs) -> tuple[dict[str, Any], set[str]]:
    """The magnitude of each input, and which of them are `PerLane`."""
    told = _mapping(inputs, "inputs")
    for name in told:
        check_name(name, model.inputs, "input")
    by_lane = {n for n, x in told.items() if isinstance(x, PerLane)}
    given = {**model.inputs, **{n: x.value if n in by_lane else x for n, x in told.items()}}
    stripped = {n: units.strip(x, units.unit_of(model.inputs[n]), n) for n, x in given.items()}
    for n, x in stripped.items():
        refuse_nan(x, n)
    return stripped, by_lane


def _initial(model: Model, initial) -> dict[str, Any]:
    given = _mapping(initial, "initial")
    for name in given:
        check_name(name, model.states, "state")
    start = {**model.initial, **given}
    found = {n: units.strip(start[n], unit, n) if n in start else 0.0 for n, unit in model.states.items()}
    for n in given:
        refuse_nan(found[n], n, infinite=True)
    return found


def _sigmas(model: Model, intensity, key) -> dict[str, Any]:
    given = _mapping(intensity, "noise")
    if given and key is None:
        raise ValueError("'noise' needs 'key', a JAX random key such as jax.random.key(0)")
    found = {}
    for name, sigma in given.items():
        check_name(name, {**model.inputs, **model.states}, "input or state")
        if name in model.inputs:
            unit = units.unit_of(model.inputs[name]) * model.time_unit**0.5
        else:
            unit = model.states[name] / model.time_unit**0.5
        found[name] = magnitude = units.strip(sigma, unit, f"noise[{name!r}]")
        refuse_nan(magnitude, f"noise[{name!r}]", infinite=True)
        if not is_traced(magnitude) and np.any(np.asarray(magnitude) < 0.0):
            raise ValueError(f"noise[{name!r}] got {np.min(magnitude):g} {unit}, but takes an intensity from 0 on")
    return dict(sorted(found.items()))


def _mapping(value, name: str) -> dict:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise TypeError(f"'{name}' got {type(value).__name__}, but takes a dict by name")
    return dict(value)


def _entries(model: Model, record) -> tuple[tuple[str, str | Reduction], ...]:
    """By the result's name, the quantity or the statistic that is recorded."""
    known = model.recordable()
    if record is None:
        record = tuple(model.observables) or tuple(model.states)
    asked = (record,) if isinstance(record, (str, Reduction, type)) else record
    if not isinstance(asked, Iterable):
        raise TypeError(f"'record' got {type(asked).__name__}, but takes names, and statistics such as bk.Mean()")
    named = asked.items() if isinstance(asked, Mapping) else [(None, what) for what in asked]
    entries: dict[str, str | Reduction] = {}
    for name, what in named:
        if isinstance(what, type):
            raise TypeError(f"'record' got the class {what.__name__}, but takes one of it: bk.{what.__name__}(...)")
        if not isinstance(what, (str, Reduction)):
            raise TypeError(f"'record' got {type(what).__name__}, but takes names, and statistics such as bk.Mean()")
        of = what if isinstance(what, str) else what.of or next(iter(known))
        check_name(of, known, "record")
        if isinstance(what, Reduction):
            what, of = what.bound(of, known[of]), f"{of}_{what.suffix}"
        name = of if name is None else name
        if entries.setdefault(name, what) != what:
            raise ValueError(f"'record' has two results named '{name}': give a dict with a name for each")
    return tuple(entries.items())


def _sampling(entries, schedule: Schedule, seconds: float, lanes: int) -> Sampling | None:
    reductions = [what for _, what in entries if isinstance(what, Reduction)]
    if not reductions:
        return None
    sampling = Sampling.of(schedule.count, schedule.every * seconds, lanes)
    for reduction in reductions:
        reduction.check(sampling)
    return sampling


def _varies(x, steps: int) -> bool:
    """An input whose leading axis is the number of steps has one value a step."""
    return np.ndim(x) > 0 and np.shape(x)[0] == steps and steps > 1


def _check_lengths(held, extents, steps: int) -> None:
    """Refuse an input that is held though an axis is nearly as long as the run, unless others have that axis too."""
    if steps < SHORTEST:
        return
    near = {n: [k for k, size in enumerate(np.shape(x)) if abs(size - steps) <= max(1, steps // 100)]
            for n, x in held.items()}  # fmt: skip
    known = [*extents, *(np.shape(held[n]) for n, axes in near.items() if not axes)]
    for name, axes in near.items():
        shape = np.shape(held[name])
        for k in axes:
            back = k - len(shape)
            if not any(len(other) >= -back and other[back] == shape[k] for other in known):
                raise ValueError(
                    f"'{name}' got shape {shape}, but takes one value a step, ({steps},) or ({steps}, *batch), time "
                    f"first, or values that broadcast to the batch. If {shape[k]} lanes are meant, say so by another "
                    f"argument, such as a parameter of shape ({shape[k]},)"
                )


def _key_batch(key) -> tuple[int, ...]:
    """The batch shape of a key: of old-style keys the last axis is the key itself."""
    if key is None:
        return ()
    return key.shape if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key.shape[:-1]


def _batch(named, shapes, varying, steps: int) -> tuple[int, ...]:
    try:
        batch = np.broadcast_shapes(*shapes)
    except ValueError:
        found = {n: np.shape(x) for n, x in named.items() if np.shape(x)}
        listed = ", ".join(f"{n} {s}{' (one value a step)' if n in varying else ''}" for n, s in found.items())
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
    # The widest, whatever promotion mode a user has set: every value is cast to it below.
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.result_type(*arrays) if arrays else jnp.result_type(float)
    return jnp.float32 if dtype in (jnp.float16, jnp.bfloat16) else jax.dtypes.canonicalize_dtype(dtype)


# Running ------------------------------------------------------------------------------------------------------------


def loop_of(run: Run) -> tuple[Step, Loop]:
    """The step of a run, and its loop without data."""
    step, spec = build(run.spec, bool(run.retreat)), run.spec
    loop = Loop(
        step.advance, step.observe, len(step.setup.out_avals), len(spec.model.states), len(spec.arriving),
        len(spec.noisy), run.schedule, run.precision, run.interpret, step.retreat,
        Coupling(run.batch[-1], run.depth, step.send, run.delays) if step.send else None,
    )  # fmt: skip
    return step, loop


def _request(run: Run) -> Request:
    return Request(loop_of(run)[1], max(1, math.prod(run.batch)), run.spec.dtype, run.platform)


def no_lanes(of):
    """``of(run, ..., data)`` for a batch of no lanes: empty arrays of the right shapes, and nothing is run."""

    def empty(run: Run, *rest):
        *static, data = rest
        batch = tuple(n or 1 for n in run.batch)
        one = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(tuple(n or 1 for n in np.shape(x)), jax.dtypes.result_type(x)), data
        )
        like = jax.eval_shape(functools.partial(of, run._replace(batch=batch), *static), one)
        return jax.tree.map(lambda x: jnp.zeros((*x.shape[: x.ndim - len(batch)], *run.batch), x.dtype), like)

    return empty


def _run(run: Run, data: Data):
    return _RUNS(run)(data)


def _compiled(run: Run):
    def brainmass_kernels_run(data: Data):
        return _execute(run, data)

    return jax.jit(brainmass_kernels_run)


_RUNS = Programs(_compiled, lambda run: run.spec)


def _execute(run: Run, data: Data):
    """Records ``(K, *batch)`` and final states ``(*batch)``, without units."""
    step, _ = loop_of(run)
    dtype, lanes = run.spec.dtype, math.prod(run.batch)
    exact = dispatch.load(run.implementation).same_lanes
    hoisted = [_lanes(x, run.batch, dtype, of_one=exact) for x in data.hoisted]
    given = [jnp.broadcast_to(_lanes(x, run.batch, dtype), (lanes,)) for x in data.state]
    around = _as_in_a_batch if exact and lanes == 1 and any(x.ndim for x in hoisted) else lambda fun, *args: fun(*args)
    state, coefs = around(lambda hoisted, state: (step.enter(hoisted, state), step.setup(*hoisted)), hoisted, given)
    state = tuple(jnp.broadcast_to(x, (lanes,)) for x in state)
    # A backend takes a coefficient of a single lane as one for all.
    coefs = [x.reshape(()) if lanes == 1 else x for x in coefs]
    varying = tuple(_rows(x, run.batch, dtype) for x in data.varying)
    seeds = None if data.key is None else noise.lane_seeds(data.key, run.batch).reshape(2, lanes)
    near = step.growth(hoisted) * _longest(run) <= REACH if run.retreat == "asked" else None
    wires = data.wires and _laid(data.wires, run, step, coefs, state)
    if wires:
        state = (*state, wires.history)

    def launch(schedule, state, rows, first):
        """Some of the steps, from the ``first`` on."""
        part = run._replace(schedule=schedule, checkpoint_every=min(run.checkpoint_every, schedule.steps))
        loop, since = loop_of(part)[1], seeds
        if seeds is not None and first is not None:
            since = jnp.concatenate([seeds, jnp.full((1, lanes), first, jnp.int32)])
        since_wires = None
        if wires:
            state, since_wires = state[:-1], wires._replace(history=state[-1])
        if run.transparent:
            return Scan().transparent(loop, coefs, state, rows, since, part.checkpoint_every, since_wires)[:2]
        return _differentiable(part, loop)(tuple(coefs), state, rows, since, since_wires, near)

    # Pallas's interpreters have effects, which JAX runs no second time.
    again = not run.interpret
    if wires and not run.transparent:
        launch = functools.partial(recording.cut, launch, memory.block(run), again)
    if run.sampling is None:
        records, final = launch(run.schedule, state, varying, None)
    else:
        what = [what for _, what in run.entries]
        records, final = recording.run(run.schedule, run.sampling, what, run.spec.record, launch, state, varying, again)
    n = len(run.spec.model.states)
    final = (*around(step.exit, hoisted, final[:n]), *final[n:])
    if run.sampling is not None:
        finite = functools.reduce(jnp.logical_and, map(jnp.isfinite, final[:n]))
        records = [x if isinstance(what, str) else _where(finite, x) for (_, what), x in zip(run.entries, records)]
    return [[x.reshape(*x.shape[:-1], *run.batch) for x in group] for group in (records, final)]


def _where(finite, x):
    """A statistic ``(L,)`` or ``(M, L)`` of the lanes that stayed finite; NaN of the others, whose records ended."""
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return x
    return jnp.where(jnp.broadcast_to(finite, x.shape), x, jnp.nan)


def _laid(wires: Wires, run: Run, step: Step, coefs, state) -> Wires:
    """The connections as backends take them; a history that was not given is what the first state sends."""
    dtype, lanes, regions = run.spec.dtype, math.prod(run.batch), run.batch[-1]
    weights = jnp.asarray(wires.weights, dtype)
    if weights.size == regions**2:
        weights = weights.reshape(regions, regions)
    else:
        weights = jnp.broadcast_to(weights, (*run.batch, regions)).reshape(-1, regions, regions)
        weights = jnp.moveaxis(weights, 0, -1)
    if wires.history is None:
        assert step.send is not None
        (sent,) = step.send(*coefs, *state)
        history = jnp.broadcast_to(sent, (run.depth, lanes))
    else:
        history = _rows(wires.history, run.batch, dtype)
        history = jnp.broadcast_to(history if history.ndim == 2 else history[:, None], (run.depth, lanes))
    return Wires(weights, jnp.asarray(wires.steps), history, jnp.asarray(wires.ends))


def _lanes(x, batch, dtype, of_one: bool = False):
    """A value as ``()`` where it is one for all lanes, else as ``(L,)``.

    ``of_one`` lanes too where the value has an axis of the batch whose length happens to be one.
    """
    x = jnp.asarray(x, dtype)
    own = x.size > 1 or (of_one and any(n == b == 1 for n, b in zip(x.shape[::-1], batch[::-1])))
    return jnp.broadcast_to(x, batch).reshape(-1) if own else x.reshape(())


def _as_in_a_batch(fun, hoisted, state):
    """``fun(hoisted, state)`` of a single lane with the bits that it has of several.

    XLA folds the constants of a product of single numbers, and not those of several; and it rounds otherwise where it
    fuses in another way. So the lane is computed twice, in a branch, with whose inside XLA fuses nothing around it.
    """

    def pair(x):
        return jnp.concatenate([x, lax.stop_gradient(x)]) if x.ndim else x

    def never(*args):
        return jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan, x.dtype), jax.eval_shape(fun, *args))

    # The time step is the last. XLA cannot know that it is positive.
    found = lax.cond(jnp.all(hoisted[-1] > 0), fun, never, [pair(x) for x in hoisted], [pair(x) for x in state])
    return jax.tree.map(lambda x: x[:1] if x.ndim else x, found)


def _rows(x, batch, dtype):
    """One value a step as ``(T,)`` where it is one for all lanes, else as ``(T, L)``."""
    x = jnp.asarray(x, dtype)
    if x.size == x.shape[0]:
        return x.reshape(-1)
    # Shapes broadcast from the right, but the time axis stays in front.
    x = x.reshape(x.shape[0], *(1,) * (len(batch) + 1 - x.ndim), *x.shape[1:])
    return jnp.broadcast_to(x, (x.shape[0], *batch)).reshape(x.shape[0], -1)


_ARGUMENTS = ("coefs", "lanes", "rows", "lanes", Wires("weights", "shared", "lanes", "shared"))  # pyright: ignore


def _differentiable(run: Run, loop: Loop):
    """The loop on ``(coefs, state, inputs, seeds, wires, near)`` with its adjoint as its gradient.

    ``wires`` are ``None`` but for a network, whose history then follows the final state; ``near`` says whether to walk
    back by inverse steps, where that is asked at run time.
    """
    backend, every = dispatch.load(run.implementation), run.checkpoint_every

    @jax.custom_vjp
    def call(coefs, state, inputs, seeds, wires, near):
        run = folded(lambda *args: _forward(backend, loop, None, *args)[:2], _ARGUMENTS)
        return run(coefs, state, inputs, seeds, wires)

    def forward(coefs, state, inputs, seeds, wires, near):
        perturbed = (c.perturbed and read for c, read in zip(coefs, loop.read_coefs(), strict=True))
        wanted = Wanted(
            tuple(perturbed), tuple(x.perturbed for x in inputs), wires is not None and wires.weights.perturbed
        )
        given = jax.tree.map(
            lambda x: x.value, (coefs, state, inputs, seeds, wires, near), is_leaf=lambda x: hasattr(x, "perturbed")
        )
        coefs, state, inputs, seeds, wires, near = derivatives.once(given, _only_once(run))
        kept = folded(lambda *args: tuple(_forward(backend, loop, every, *args)), _ARGUMENTS)
        records, final, saved = kept(coefs, state, inputs, seeds, wires)
        return (records, final), (coefs, inputs, seeds, wires, near, saved, derivatives.Static(wanted))

    def backward(residuals, cotangents):
        coefs, inputs, seeds, wires, near, saved, static = residuals
        wanted = static.value
        cotangents = jax.tree.map(_instantiated, cotangents, is_leaf=_is_zero)
        ct_records, ct_final = derivatives.once(cotangents, _only_once(run))
        pullbacks = _pullbacks(loop, wanted)

        def walk(near, coefs, saved, inputs, seeds, wires, ct_records, ct_final):
            given = (wanted, coefs, saved, inputs, seeds, ct_records, ct_final, every)

            def by(pullbacks):
                return tuple(backend.adjoint(loop, pullbacks, *given, *(() if wires is None else (wires,))))

            if near is None:
                return by(pullbacks)
            return lax.cond(jnp.all(near), lambda: by(pullbacks), lambda: by(pullbacks._replace(retreat=None)))

        kinds = ("coefs", "coefs", "lanes", "rows", "lanes", _ARGUMENTS[-1], "lanes", "lanes")
        walk = folded(walk, kinds, expand=wanted.inputs)
        ct_coefs, ct_state, ct_inputs, ct_wires = walk(near, coefs, saved, inputs, seeds, wires, ct_records, ct_final)
        if wires is not None:
            ct_weights, ct_history = ct_wires
            if ct_weights is not None and wires.weights.ndim == 2:
                ct_weights = jnp.sum(ct_weights, axis=-1)
            ct_wires = Wires(ct_weights, None, ct_history, None)  # pyright: ignore[reportArgumentType]
        return (
            _placed(wanted.coefs, [_summed(c, x) for c, x in zip(ct_coefs, _chosen(coefs, wanted.coefs))]),
            ct_state,
            _placed(wanted.inputs, [_summed_rows(c, x) for c, x in zip(ct_inputs, _chosen(inputs, wanted.inputs))]),
            None,
            ct_wires,
            None,
        )

    call.defvjp(forward, backward, symbolic_zeros=True)
    return call


def _forward(backend: Backend, loop: Loop, checkpoint_every: int | None, coefs, state, inputs, seeds, wires):
    coupled = () if wires is None else (wires,)
    return backend.forward(loop, coefs, state, inputs, seeds, checkpoint_every, *coupled)


def _pullbacks(loop: Loop, wanted: Wanted) -> Pullbacks:
    state = (True,) * loop.n_state
    inputs = (*wanted.inputs, *((True,) if loop.coupling else ()))
    advance = pullback(loop.advance, (*wanted.coefs, *state, *inputs, *(False,) * loop.n_normals))
    place = slice(loop.n_coefs, loop.n_coefs + loop.n_state)
    return Pullbacks(
        advance,
        pullback(loop.observe, (*wanted.coefs, *state)),
        pullback_after(loop.retreat, advance, place) if loop.retreat else None,
        pullback(loop.coupling.send, (*wanted.coefs, *state)) if loop.coupling else None,
    )


def _is_zero(x) -> bool:
    return isinstance(x, jax.custom_derivatives.SymbolicZero)


def _instantiated(x):
    return jnp.zeros(x.shape, x.dtype) if _is_zero(x) else x


def _chosen(values, flags):
    return [x for x, flag in zip(values, flags) if flag]


def _placed(flags, values):
    values = iter(values)
    return tuple(next(values) if flag else None for flag in flags)


def _summed(cotangent, coefficient):
    return cotangent if coefficient.ndim else jnp.sum(cotangent)


def _summed_rows(cotangent, rows):
    return cotangent if rows.ndim == 2 else jnp.sum(cotangent, axis=1)


# vmap ---------------------------------------------------------------------------------------------------------------


# How the unmapped arguments of a loop look: uniform or with a last axis of lanes, or, of weights, of networks.
_UNIFORM_NDIM = {"coefs": 0, "rows": 1, "weights": 2}


def folded(fun, kinds: tuple[Any, ...], expand: tuple[bool, ...] = ()):
    """``fun``, whose vmap folds the mapped axis into its lanes: still one kernel.

    Parameters
    ----------
    fun : takes pytrees and returns a pytree of arrays whose last axis is the lanes, or has something of each in turn
    kinds : of each argument, or of the parts of one: ``"coefs"``, each ``()`` or ``(L,)``; ``"rows"``, each ``(T,)`` or
        ``(T, L)``; ``"weights"``, ``(N, N)`` or ``(N, N, networks)``; ``"shared"``, the same for all; ``"lanes"``,
        whose last axis is always the lanes (the first array of the first such argument tells how many there are)
    expand : for each of the rows, whether a uniform one must be given to each lane, as its cotangent is wanted
    """
    mapped = jax.custom_batching.custom_vmap(fun)

    @mapped.def_vmap
    def fold(size, batched, *args):
        if size == 0:
            each = jax.tree.map(lambda x, f: jax.ShapeDtypeStruct(x.shape[int(f) :], x.dtype), args, tuple(batched))
            like = jax.eval_shape(fun, *each)
            return jax.tree.map(lambda x: jnp.zeros((0, *x.shape), x.dtype), like), jax.tree.map(lambda _: True, like)
        first = kinds.index("lanes")
        lanes = jax.tree.leaves(args[first])[0].shape[-1]

        def one(kind, x, is_batched, wanted=False):
            uniform = x.ndim - is_batched == _UNIFORM_NDIM.get(kind, -1)
            if kind == "shared" or (uniform and not is_batched and not wanted):
                return x
            x = x if is_batched else jnp.broadcast_to(x, (size, *x.shape))
            if uniform:
                x = jnp.broadcast_to(x[..., None], (*x.shape, lanes // x.shape[-1] if kind == "weights" else lanes))
            return jnp.moveaxis(x, 0, -2).reshape(*x.shape[1:-1], size * x.shape[-1])

        new = []
        for kind, arg, flags in zip(kinds, args, batched, strict=True):
            if kind == "rows":
                wanted = expand or (False,) * len(arg)
                new.append(tuple(one(kind, x, f, w) for x, f, w in zip(arg, flags, wanted, strict=True)))
            elif isinstance(kind, tuple):
                new.append(arg and type(arg)(*map(one, kind, arg, flags)))
            else:
                new.append(jax.tree.map(lambda x, f, kind=kind: one(kind, x, f), arg, flags))
        out = folded(fun, kinds, expand)(*new)
        out = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(*x.shape[:-1], size, x.shape[-1] // size), -2, 0), out)
        return out, jax.tree.map(lambda _: True, out)

    return mapped
