"""A brainmass model in, a fused run out: `brainmass.Simulator` with the whole time loop as one kernel.

The model's own `update` is traced once, with brainmass's inputs, monitors, parameters and noise; `lanes` takes the
trace apart, and `simulate` runs its loop. No equation of brainmass is written here. Where regions are coupled,
`couplings` stands in for the coupling and its delay while the step is traced, and the loop is that of a network.
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
from ..simulate import explain, simulate
from ..units import UNITLESS, positive_time
from .couplings import SENT, Wiring
from .jansen_rit_tr import fused_between_trs, trs_of
from .lanes import Arriving, Key, Number, Parts, State

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
    model : any brainmass model, or other `brainstate.nn.Module`, whose ``update`` treats each mass on its own, or
        couples them by one coupling of brainmass, as `brainmass.Network` does
    dt : the time of a step; ``None``, that of `brainstate.environ` at the time of a run
    allow_fallback : run what cannot be fused by `brainmass.Simulator`, in place of raising; `Fused.fallback` then
        has the reason
    implementation, precision, checkpoint_every : as in `simulate`

    Returns
    -------
    Fused

    Raises
    ------
    ImportError : brainmass is not installed, or in a version that this was not made for
    TypeError : the model is no module of brainstate
    ValueError : 'dt' is no positive time, or a name is unknown
    Unsupported : a coupling of masses that is neither that of a `Network` nor that of a `JansenRitTR`; other obstacles
        are found when a run is traced
    """
    _brainmass()
    _refuse_others(model)
    check_known(implementation)
    if dt is not None:
        # brainmass has models of which time is a plain number.
        positive_time(dt, u.second if isinstance(dt, u.Quantity) else UNITLESS, "dt")
    if not allow_fallback:
        trs_of(model)
        Wiring.of(model)
    return Fused(model, dt, allow_fallback, implementation, precision, checkpoint_every)


class Fused:
    """Runs of one brainmass model, fused; made by `fuse`.

    Attributes
    ----------
    model, dt : as given
    fallback : why runs are brainmass's own, where they are; empty otherwise
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
            theirs = functools.partial(simulator.run, duration, **asked, init_states=False, jit=jit)
            self.fallback = ""
            try:
                if trs := trs_of(self.model):
                    with fused_between_trs(trs, lambda *asked: self._between_trs(*asked).result()):
                        return theirs()
                fused = _Run(simulator, read, monitors, self.engine)
            except Unsupported as reason:
                if not self.allow_fallback:
                    raise
                self.fallback = str(reason)
                return theirs()
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

        `simulate` records at the end of each stride, brainmass at the end of its first step: where the transient is
        shorter than that makes a difference of, the first record has a run of its own. So have the last ``tail``
        steps, each of which is recorded.
        """
        end = max(0, self.steps - tail)
        lead = self.lead + 1 - self.every
        first = min(self.lead + 1, end) if lead < 0 else 0
        if first:
            yield 0, first, min(self.lead, first), 1
        if end > first:
            lead, steps = max(lead, 0), end - first
            # Less than a stride is recorded as brainmass has it, not at all.
            yield first, steps, lead if lead + self.every <= steps else steps, self.every
        if tail:
            yield end, self.steps - end, 0, 1


class _Run:
    """One run: the model's step, which is its ``update`` if no other is given, traced and taken apart."""

    def __init__(self, simulator, read: _Reading, monitors, engine: dict[str, Any], update: Callable | None = None):
        self.read, self.engine, self.wiring = read, engine, Wiring.of(simulator.model)
        if self.wiring:
            self.wiring.start()
        update = simulator.model.update if update is None else update
        self.traced = _Traced(simulator.model, update, read, simulator._build_measure(monitors), self.wiring)
        self.parts = self.traced.parts
        self.tail = self.wiring.tail if self.wiring else 0

    def result(self) -> dict[str, Any]:
        parts, records, state, last = self.parts, [], self._start(), None
        for arguments in self._stages():
            done = simulate(**arguments, initial=state)
            state = done.final
            records.append({n: done[n] for n in parts.needed()})
        if self.tail:
            last, end = done[SENT], self.read.steps - len(done.ts)
            kept = self.read.recorded()
            kept = kept[kept >= end] - end
            records[-1] = {n: x[kept] for n, x in records[-1].items()}
        self.traced.write(parts.final(state))
        if self.wiring:
            self.wiring.write(state, last, self.read.steps)
        numbers = jnp.asarray(self.read.recorded())
        found = self.traced.structure.unflatten(parts.outputs(_joined(records, parts.needed()), numbers))
        return {**found, "ts": ((np.arange(self.read.steps) + 1) * self.read.dt)[self.read.lead :: self.read.every]}

    def plan(self) -> Plan:
        longest = max(self._stages(), key=lambda arguments: arguments["duration"])
        return explain(**longest, initial=self._start())

    def _start(self) -> dict[str, Any]:
        parts = self.parts
        given = {n: jnp.broadcast_to(x, parts.lanes) for n, x in self.traced.start.items()}
        given |= dict.fromkeys(parts.extra, jnp.zeros(parts.lanes, parts.dtype))
        return given | (self.wiring.history() if self.wiring else {})

    def _stages(self) -> Iterator[dict[str, Any]]:
        """The arguments of `simulate`, without the initial state, of each stage."""
        parts, equations = self.parts, self.parts.equations
        shared, key = _split_key(2) if self.traced.draws else (None, None)
        held = {n: jnp.asarray(x, parts.dtype) for n, x in parts.held_values().items()}
        rows = parts.row_values(self.read.steps, shared)
        # Unflattened, as what is not a number in brainmass's run is none here either, and no error.
        model = jax.tree.unflatten(jax.tree.structure(equations.model()()), list(held.values()))
        if self.wiring:
            model = self.wiring.network(model)
        record = dict.fromkeys((*parts.needed(), *((SENT,) if self.tail else ())))
        for first, steps, lead, every in self.read.stages(self.tail):
            some = {n: jnp.asarray(x[first : first + steps], parts.dtype) for n, x in rows.items()}
            yield {
                "model": model,
                "duration": steps,
                "dt": 1.0 * u.second,  # a step is given: this is only what a noise of 1 is one normal a step for
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


class _Traced:
    """One step of a model, traced through brainstate and taken apart.

    Attributes
    ----------
    parts : the step
    start : the states that it changes, by name
    structure : of what is recorded
    draws : whether it draws random numbers
    """

    def __init__(self, model, update: Callable, read: _Reading, measure: Callable, wiring: Wiring | None):
        import brainstate

        def step(i, *total, opaque):
            t = i * read.dt
            coupled = wiring.traced(*total) if wiring else contextlib.nullcontext()
            with brainstate.environ.context(i=i, t=t), coupled:
                returned = update(*jax.tree.map(opaque, read.get_inputs(i, t)))
            return measure(returned)

        given = (jnp.asarray(np.arange(1)[0]), *((wiring.arriving(),) if wiring else ()))
        before = _attributes(model)
        try:
            # What the user gives is no text of the program: other values must not compile it anew,
            function = _traced(functools.partial(step, opaque=_opaque), given)
        except jax.errors.ConcretizationTypeError:
            # unless the model's Python reads it.
            function = _traced(functools.partial(step, opaque=lambda x: x), given)
        _refuse_changes(model, before)
        closed, states = function.get_jaxpr(*given), function.get_states(*given)
        _refuse_effects(closed, type(model).__name__)
        _refuse_delays(model, states)
        out, after = function.get_out_shapes(*given)
        leaves, self.structure = jax.tree.flatten(out)

        names = _names(model) | ({id(wiring.newest): SENT} if wiring else {})
        self._written: list[tuple[Any, Any, list[str]]] = []
        self.start: dict[str, Any] = {}
        self.draws = False
        arguments: list[Any] = [Number(), *([Arriving()] if wiring else [])]
        places: dict[str, int] = {}
        place = len(leaves)
        for state, new in zip(states, after, strict=True):
            values, structure = jax.tree.flatten(state.value)
            written = jax.tree.leaves(new)
            if isinstance(state, brainstate.random.RandomState):
                self.draws |= bool(written)
                arguments += [Key() for _ in values]
            elif written:
                name = names.get(id(state), "a state outside of the model")
                if jax.tree.structure(new) != structure:
                    raise Unsupported(
                        f"a step of {type(model).__name__} changes the unit or the structure of '{name}', from "
                        f"{structure} to {jax.tree.structure(new)}"
                    )
                own = [name if len(values) == 1 else f"{name} {k}" for k in range(len(values))]
                arguments += map(State, own)
                self.start |= dict(zip(own, values))
                places |= dict(zip(own, range(place, place + len(own))))
                self._written.append((state, structure, own))
            else:
                arguments += values
            place += len(written)
        self.parts = Parts(closed, arguments, places, range(len(leaves)), type(model).__name__)
        if wiring and self.parts.lanes != (wiring.regions,):
            raise Unsupported(
                f"the states of {type(model).__name__} have the shape {self.parts.lanes}, and those of regions that "
                f"are coupled have ({wiring.regions},). vmap runs batches of networks"
            )

    def write(self, final: dict[str, Any]) -> None:
        """Give the model the states after a run."""
        for state, structure, names in self._written:
            state.value = structure.unflatten([final[n] for n in names])


def _traced(step: Callable, given):
    import brainstate

    with meshless():
        return brainstate.transform.StatefulFunction(step, return_only_write=True).make_jaxpr(*given)


def _opaque(x):
    return jax.lax.optimization_barrier(jnp.asarray(x)) if isinstance(x, (int, float, np.generic, np.ndarray)) else x


# What cannot be fused -----------------------------------------------------------------------------------------------


def _refuse_others(model) -> None:
    import brainstate

    if not isinstance(model, brainstate.nn.Module):
        raise TypeError(f"'model' got {type(model).__name__}, but takes a model such as brainmass.JansenRitStep(1)")


def _refuse_delays(model, states) -> None:
    import brainstate

    used = {id(state) for state in states}
    for path, node in model.nodes(brainstate.nn.Delay).items():
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
    found = {}
    for path, node in model.nodes().items():
        if not type(node).__module__.startswith("brainstate."):
            for name, x in vars(node).items():
                held = len(x) if isinstance(x, (list, dict, set)) else x if isinstance(x, (int, float, str)) else None
                found[".".join(map(str, path)), name] = id(x), held
    return found


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
    """brainmass, where it is installed in a version that this was made for."""
    try:
        import brainmass
    except ImportError as error:
        if error.name != "brainmass":
            raise
        raise ImportError(f"fuse() takes models of brainmass, which is not installed: {_INSTALL}") from error
    if brainmass.__version__ not in VERSIONS:
        made_for = ", ".join(VERSIONS)
        raise ImportError(f"fuse() was made for brainmass {made_for}, and {brainmass.__version__} is here: {_INSTALL}")
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
