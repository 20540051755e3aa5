"""A brainmass model in, a fused run out: `brainmass.Simulator` with the whole time loop as one kernel.

The model's own `update` is traced once, with brainmass's inputs, monitors, parameters and noise. `FusedStep` takes the
trace apart, and `simulate` runs its loop. No equation of brainmass is written here. Where regions are coupled,
`couplings` replaces the coupling and its delay while the step is traced, and the loop is that of a network.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np

from .._jax import meshless
from ..dispatch import Plan, check_known
from ..errors import Unsupported
from ..simulation import explain, simulate
from ..units import UNITLESS, positive_time
from .classify import Key, Number, State
from .couplings import RegionCouplings
from .fused_step import fused_step
from .jansen_rit_tr import fused_between_trs, trs_of
from .own_delays import OwnDelays, Unwritten

VERSIONS = ("0.1.1",)
_INSTALL = "pip install 'brainmass-kernels[brainmass]'"


def fuse(
    model,
    dt=None,
    *,
    allow_fallback: bool = False,
    implementation: str | None = None,
    precision: str = "exact",
    checkpoint_every: int | None = None,
) -> Fused:
    """A brainmass model whose runs are fused: a drop-in for ``brainmass.Simulator(model, dt)``.

    Parameters
    ----------
    model : any brainmass model, or other `brainstate.nn.Module`, whose ``update`` treats each mass on its own, with
        delays inside it or without, or couples them by couplings of brainmass, as `brainmass.Network` and
        `brainmass.KuramotoNetwork` do
    dt : the time of a step; ``None`` for that of `brainstate.environ` at the time of a run
    allow_fallback : whether `brainmass.Simulator` runs what cannot be fused, in place of an error; `Fused.fallback`
        then has the reason
    implementation, precision, checkpoint_every : as in `simulate`

    Returns
    -------
    Fused

    Raises
    ------
    ImportError : brainmass is not installed, or in a version that is not supported
    TypeError : the model is no module of brainstate
    ValueError : 'dt' is no positive time, or a name is unknown
    Unsupported : a coupling of masses whose source is none that is fused; other obstacles are found when a run is
        traced
    """
    _brainmass()
    _refuse_others(model)
    check_known(implementation)
    if dt is not None:
        # brainmass has models of which time is a plain number.
        positive_time(dt, u.second if isinstance(dt, u.Quantity) else UNITLESS, "dt")
    if not allow_fallback:
        RegionCouplings.of(model)
    return Fused(model, dt, allow_fallback, implementation, precision, checkpoint_every)


class Fused:
    """Runs of one brainmass model, fused; made by `fuse`.

    Attributes
    ----------
    model, dt : as `fuse` took them
    fallback : why `brainmass.Simulator` ran, where it did; empty otherwise
    """

    def __init__(self, model, dt, allow_fallback, implementation, precision, checkpoint_every):
        self.model, self.dt, self.allow_fallback = model, dt, allow_fallback
        self.engine = {
            "implementation": implementation, "precision": precision, "checkpoint_every": checkpoint_every,
        }  # fmt: skip
        self.fallback = ""

    def run(
        self,
        duration,
        *,
        inputs=None,
        monitors=None,
        transient=None,
        sample_every=None,
        batch_size=None,
        init_states: bool = True,
        jit: bool = True,
    ) -> dict[str, Any]:
        """`brainmass.Simulator.run`, fused.

        Parameters
        ----------
        duration : a time
        inputs : ``None``, an array with one value a step, or ``f(i, t)``, whose results go to ``update``
        monitors : ``None`` for what ``update`` returns, names of states, a callable of the model, or a dict of these
        transient : a time or a number of steps that are not recorded
        sample_every : steps from one record to the next; the first is at the end of the first step recorded
        batch_size : of the states, where they are initialised
        init_states : whether to start anew, or from the model's states
        jit : for `brainmass.Simulator` where it must run; a fused run is always compiled

        Returns
        -------
        dict
            Each monitor by its name, or "output", ``(K, ...)`` with its unit, and ``"ts"``, the times at the end of
            the recorded steps. The model's states are left as after the last step.

        Raises
        ------
        ValueError : as `brainmass.Simulator` does
        Unsupported : a run that cannot be fused, with the name of what stood in the way
        """
        simulator = self._simulator_of(self.model)
        read = _Reading.of(simulator, duration, inputs, transient, sample_every)
        with _environment(dt=read.dt):
            if init_states:
                _initialise(self.model, batch_size)
            asked = {"inputs": inputs, "monitors": monitors, "transient": transient, "sample_every": sample_every}
            unfused = functools.partial(simulator.run, duration, **asked, init_states=False, jit=jit)
            self.fallback = ""
            try:
                if trs := trs_of(self.model):
                    with fused_between_trs(trs, lambda *asked: self._between_trs(*asked).result()):
                        return unfused()
                fused = _Run(simulator, read, monitors, self.engine)
            except Unsupported as reason:
                if not self.allow_fallback:
                    raise
                self.fallback = str(reason)
                return unfused()
            return fused.result()

    def explain(self, duration, *, inputs=None, monitors=None, transient=None, sample_every=None, batch_size=None):
        """What `run` with the same arguments would do, as `explain` says it; the model's states start anew.

        Returns
        -------
        Plan
        """
        simulator = self._simulator_of(self.model)
        read = _Reading.of(simulator, duration, inputs, transient, sample_every)
        with _environment(dt=read.dt):
            _initialise(self.model, batch_size)
            trs = trs_of(self.model)
            if not trs:
                return _Run(simulator, read, monitors, self.engine).plan()
            plans = []
            with fused_between_trs(trs, lambda *asked: plans.append(self._between_trs(*asked).plan())):
                self.model.update(*read.get_inputs(0, 0.0 * read.dt))
            _initialise(self.model, batch_size)
            return plans[0]

    def _simulator_of(self, model):
        _brainmass()
        from brainmass.simulator import Simulator

        return Simulator(model, self.dt)

    def _between_trs(self, tr, update: Callable, steps: int, inputs: Callable) -> _Run:
        simulator = self._simulator_of(tr)
        read = _Reading(simulator._resolve_dt(), steps, 0, 1, inputs)
        return _Run(simulator, read, {}, self.engine, update)

    def __repr__(self) -> str:
        return f"Fused({type(self.model).__name__}, dt={self.dt})"


class _Reading(NamedTuple):
    """The arguments of a run, as `brainmass.Simulator` reads them."""

    dt: Any
    steps: int
    lead: int
    every: int
    get_inputs: Callable

    @classmethod
    def of(cls, simulator, duration, inputs, transient, sample_every) -> _Reading:
        dt = simulator._resolve_dt()
        steps = simulator._resolve_steps(duration, dt)
        every = simulator._resolve_sample_every(sample_every)
        lead = simulator._resolve_transient(transient, dt, steps)
        return cls(dt, steps, lead, every, simulator._build_inputs(inputs, steps))

    def recorded(self) -> np.ndarray:
        """The numbers of the recorded steps, from 0."""
        return np.arange(self.steps)[self.lead :: self.every]

    def stages(self, tail: int = 0) -> Iterator[tuple[int, int, int, int]]:
        """(first step, steps, transient, every) of the runs that this one is made of.

        `simulate` records at the end of each stride, brainmass at the end of its first step. Where the transient is
        too short to make up for the difference, the steps to the first record are a run of their own. So are the last
        ``tail`` steps, each of which is recorded.
        """
        end = max(0, self.steps - tail)
        lead = self.lead + 1 - self.every
        first = min(self.lead + 1, end) if lead < 0 else 0
        if first:
            yield 0, first, min(self.lead, first), 1
        if end > first:
            lead, steps = max(lead, 0), end - first
            # brainmass records nothing of less than a stride.
            yield first, steps, lead if lead + self.every <= steps else steps, self.every
        if tail:
            yield end, self.steps - end, 0, 1


class _Run:
    """One run: the model's step, by default its ``update``, traced and taken apart."""

    def __init__(self, simulator, read: _Reading, monitors, engine: dict[str, Any], update: Callable | None = None):
        self.read, self.engine = read, engine
        # The sums of a step that is given are taken around it.
        self.coupling = _coupling_of(simulator.model) if update is None else None
        if self.coupling:
            self.coupling.start()
        update = simulator.model.update if update is None else update
        traced = functools.partial(_TracedStep, simulator.model, update, read, simulator._build_measure(monitors))
        try:
            self.traced = traced(self.coupling)
        except Unwritten as found:
            assert isinstance(self.coupling, OwnDelays)
            self.coupling = self.coupling.without(found.buffers)
            self.traced = traced(self.coupling, [buffer.delay for buffer in found.buffers])
        self.step = self.traced.step
        self.tail, self.sent = self.coupling.tail if self.coupling else (0, ())

    def result(self) -> dict[str, Any]:
        step, records, state, last = self.step, [], self._start(), {}
        for arguments in self._stages():
            run = simulate(**arguments, initial=state)
            state = run.final
            records.append({n: run[n] for n in step.needed()})
        if self.tail:
            last, first = {n: run[n] for n in self.sent}, self.read.steps - len(run.ts)
            wanted = self.read.recorded()
            wanted = wanted[wanted >= first] - first
            records[-1] = {n: x[wanted] for n, x in records[-1].items()}
        self.traced.write(step.final(state))
        if self.coupling:
            self.coupling.write(state, last, self.read.steps)
        numbers = jnp.asarray(self.read.recorded())
        outputs = self.traced.structure.unflatten(step.outputs(_joined(records, step.needed()), numbers))
        return {**outputs, "ts": ((np.arange(self.read.steps) + 1) * self.read.dt)[self.read.lead :: self.read.every]}

    def plan(self) -> Plan:
        longest = max(self._stages(), key=lambda arguments: arguments["duration"])
        return explain(**longest, initial=self._start())

    def _start(self) -> dict[str, Any]:
        step = self.step
        start = {n: jnp.broadcast_to(x, step.lanes) for n, x in self.traced.start.items()}
        start |= dict.fromkeys(step.extra, jnp.zeros(step.lanes, step.dtype))
        return start | (self.coupling.history() if self.coupling else {})

    def _stages(self) -> Iterator[dict[str, Any]]:
        """The arguments of `simulate`, without the initial state, of each stage."""
        step, equations = self.step, self.step.equations
        shared, key = _split_key(2) if self.traced.draws else (None, None)
        constants = {n: jnp.asarray(x, step.dtype) for n, x in step.constant_values().items()}
        rows = step.row_values(self.read.steps, shared)
        # Unflattened, since a parameter that is NaN is no error in brainmass's run, and so none here.
        delays = self.coupling.delays() if self.coupling else []
        model = jax.tree.unflatten(jax.tree.structure(equations.model()()), [*constants.values(), *delays])
        if self.coupling:
            model = self.coupling.network(model)
        record = dict.fromkeys((*step.needed(), *self.sent))
        for first, steps, lead, every in self.read.stages(self.tail):
            some = {n: jnp.asarray(x[first : first + steps], step.dtype) for n, x in rows.items()}
            yield {
                "model": model,
                "duration": steps,
                "dt": 1.0 * u.second,  # the step is complete: dt only scales a noise of 1 to one normal a step
                "inputs": some if steps > 1 else {n: x[0] for n, x in some.items()},
                "noise": dict.fromkeys(equations.normals, 1.0 * u.second**0.5),
                "key": None if key is None else jax.random.fold_in(key, first),
                "record": tuple(record),
                "transient": lead,
                "every": every,
                **self.engine,
            }


def _joined(records: list[dict[str, Any]], names) -> dict[str, Any]:
    return {n: jnp.concatenate([r[n] for r in records]) if len(records) > 1 else records[0][n] for n in names}


class _TracedStep:
    """One step of a model, traced through brainstate and taken apart.

    Attributes
    ----------
    step : the traced step
    start : the states that it changes, by name
    structure : of what is recorded
    draws : whether it draws random numbers
    """

    def __init__(
        self, model, update: Callable, read: _Reading, measure: Callable,
        coupling: RegionCouplings | OwnDelays | None, constant=(),
    ):  # fmt: skip
        def step(i, *arriving, opaque):
            t = i * read.dt
            coupled = coupling.traced(arriving) if coupling else contextlib.nullcontext()
            with _environment(i=i, t=t), coupled:
                returned = update(*jax.tree.map(opaque, read.get_inputs(i, t)))
            return measure(returned)

        arguments = (jnp.asarray(np.arange(1)[0]), *(coupling.arriving() if coupling else ()))
        function = _checked_trace(model, step, arguments, constant)
        out, after = function.get_out_shapes(*arguments)
        leaves, self.structure = jax.tree.flatten(out)
        names = _names(model) | (coupling.newest() if coupling else {})
        self._label = type(model).__name__
        self._written: list[tuple[Any, Any, list[str]]] = []
        self.start: dict[str, Any] = {}
        self.draws = False
        kinds: list[Any] = [Number(), *(coupling.kinds if coupling else [])]
        places: dict[str, int] = {}
        place = len(leaves)
        for state, new in zip(function.get_states(*arguments), after, strict=True):
            kinds += self._kinds(state, new, places, place, names.get(id(state), "a state outside of the model"))
            place += len(jax.tree.leaves(new))
        self.step = fused_step(function.get_jaxpr(*arguments), kinds, places, range(len(leaves)), self._label)
        if isinstance(coupling, RegionCouplings):
            self._check_regions(coupling)
            coupling.bind(names, self.step.names)

    def _check_regions(self, coupling: RegionCouplings) -> None:
        lanes, regions = self.step.lanes, coupling.regions
        if lanes[-1:] != (regions,) or (coupling.buffers and lanes != (regions,)):
            raise Unsupported(
                f"the states of {self._label} have the shape {lanes}, and those of regions that are coupled have "
                f"({regions},). vmap runs batches of networks"
            )

    def _kinds(self, state, new, places: dict[str, int], place: int, name: str) -> list[Any]:
        """What the arguments of one state are; where the step changes it, its ``places`` among the outputs too."""
        import brainstate

        values, structure = jax.tree.flatten(state.value)
        written = bool(jax.tree.leaves(new))
        if isinstance(state, brainstate.random.RandomState):
            self.draws |= written
            return [Key() for _ in values]
        if not written:
            return values
        if jax.tree.structure(new) != structure:
            raise Unsupported(
                f"a step of {self._label} changes the unit or the structure of '{name}', from "
                f"{structure} to {jax.tree.structure(new)}"
            )
        own = [name if len(values) == 1 else f"{name} {k}" for k in range(len(values))]
        self.start |= dict(zip(own, values))
        places |= dict(zip(own, range(place, place + len(own))))
        self._written.append((state, structure, own))
        return [State(n) for n in own]

    def write(self, final: dict[str, Any]) -> None:
        """Give the model the states after a run."""
        for state, structure, names in self._written:
            state.value = structure.unflatten([final[n] for n in names])


def _checked_trace(model, step: Callable, arguments, constant=()):
    """``step(*arguments, opaque=)`` as a traced function of brainstate, without side effects or delays.

    ``constant`` are delays that no step writes to.
    """
    before = _attributes(model)
    try:
        # What the user gives is no text of the program: other values must not compile it anew,
        function = _traced(functools.partial(step, opaque=_opaque), arguments)
    except jax.errors.ConcretizationTypeError:
        # unless the model's Python reads it.
        function = _traced(functools.partial(step, opaque=lambda x: x), arguments)
    _refuse_changes(model, before)
    _refuse_effects(function.get_jaxpr(*arguments), type(model).__name__)
    _refuse_delays(model, function.get_states(*arguments), constant)
    return function


def _traced(step: Callable, arguments):
    import brainstate

    with meshless():
        return brainstate.transform.StatefulFunction(step, return_only_write=True).make_jaxpr(*arguments)


def _opaque(x):
    return jax.lax.optimization_barrier(jnp.asarray(x)) if isinstance(x, (int, float, np.generic, np.ndarray)) else x


# What cannot be fused -----------------------------------------------------------------------------------------------


def _coupling_of(model) -> RegionCouplings | OwnDelays | None:
    """The couplings of a model's regions, or else the delays inside its masses."""
    return RegionCouplings.of(model) or OwnDelays.of(model)


def _refuse_others(model) -> None:
    import brainstate

    if not isinstance(model, brainstate.nn.Module):
        raise TypeError(f"'model' got {type(model).__name__}, but takes a model such as brainmass.JansenRitStep(1)")


def _refuse_delays(model, states, constant) -> None:
    import brainstate

    used = {id(state) for state in states}
    for path, node in model.nodes(brainstate.nn.Delay).items():
        if any(node is x for x in constant):
            continue
        if used.intersection(id(vars(node).get(name)) for name in ("history", "write_ptr")):
            raise Unsupported(
                f"{type(model).__name__} reads the delay '{'.'.join(map(str, path))}', and a fused step depends on the "
                f"states of the step before only"
            )


def _refuse_effects(closed, name: str) -> None:
    if closed.effects:
        raise Unsupported(
            f"a step of {name} has a side effect ({', '.join(sorted(map(str, closed.effects)))}), such as "
            f"jax.debug.print has, and a fused step has none"
        )


def _attributes(model) -> dict[tuple[str, str], Any]:
    """What a Python side effect of a step would change: the attributes of each module, and lengths of containers."""
    attributes = {}
    for path, node in model.nodes().items():
        if not type(node).__module__.startswith("brainstate."):
            for name, x in vars(node).items():
                value = len(x) if isinstance(x, (list, dict, set)) else x if isinstance(x, (int, float, str)) else None
                attributes[".".join(map(str, path)), name] = id(x), value
    return attributes


def _refuse_changes(model, before) -> None:
    after = _attributes(model)
    changed = [key for key in after if before.get(key) != after[key]]
    if changed:
        path, name = changed[0]
        owner = f"'{path}' of {type(model).__name__}" if path else type(model).__name__
        raise Unsupported(
            f"a step changes the attribute '{name}' of {owner}: a Python side effect, which happens once, when the "
            f"step is traced, and not at each step. Make it a brainstate.HiddenState"
        )


# brainmass and brainstate, imported when they are needed -------------------------------------------------------------


@functools.cache
def _brainmass():
    """brainmass, if a supported version of it is installed."""
    try:
        import brainmass
    except ImportError as error:
        if error.name != "brainmass":
            raise
        raise ImportError(f"fuse() takes models of brainmass, which is not installed: {_INSTALL}") from error
    if brainmass.__version__ not in VERSIONS:
        supported = ", ".join(VERSIONS)
        raise ImportError(f"fuse() supports brainmass {supported}, and this is {brainmass.__version__}: {_INSTALL}")
    return brainmass


def _environment(**values):
    import brainstate

    return brainstate.environ.context(**values)


def _initialise(model, batch_size) -> None:
    import brainstate

    brainstate.nn.init_all_states(model, *(() if batch_size is None else (batch_size,)))


def _split_key(count: int):
    """Keys of brainstate's default generator, which `brainstate.random.seed` seeds."""
    import brainstate

    return brainstate.random.split_key(count)


def _names(model) -> dict[int, str]:
    return {id(state): ".".join(map(str, path)) for path, state in model.states().items()}
