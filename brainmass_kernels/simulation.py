"""`simulate`: from a model with units to a run on a backend, and its result."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np

from . import derivatives, dispatch, memory, units
from ._jax import is_traced
from .arguments import prepare
from .interrupts import interruptible
from .models.base import Model, check_name
from .network import Network, parts_of
from .notices import warn
from .recording import Reduction, Sampling
from .run import Run, execute, no_lanes, only_reverse, request_of
from .step import build


@dataclasses.dataclass(frozen=True)
class Times:
    """When the records of a run were taken, as steps and the time of a step, so that no time is rounded to float32.

    Attributes
    ----------
    lead : steps of the transient
    every : steps from one record to the next
    count : number of records
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
    """The result of a run; ``result["eeg"]`` is a record.

    Attributes
    ----------
    times : when the records were taken, as steps and the time of a step; `ts` has their values
    records : each recorded quantity, ``(K, *batch)``, and each statistic, ``(*batch)`` or ``(M, *batch)``
    final : the state after the last step, each ``(*batch)``; ``initial=result.final`` continues the run. For a network
        with delays it includes the ``history``, ``(H, *batch)``
    statistics : for each record that is one, the statistic and its records
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
        """The first axis of each record: `ts`, the frequencies of a spectrum, the times of averages."""
        ts = self.ts
        axes = {n: self.statistics[n][0].axis(ts, self.statistics[n][1]) if n in self.statistics else ts
                 for n in self.records}  # fmt: skip
        return {n: axis for n, axis in axes.items() if axis is not None}

    def __getitem__(self, name: str):
        check_name(name, self.records, "record")
        self._warn_once()
        return self.records[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.records)

    @property
    def ok(self):
        """Whether the run of each lane stayed finite, ``(*batch)``; computed from the final state on access."""
        self._warn_once()
        return self._finite()

    def _finite(self):
        finite = [jnp.isfinite(u.get_magnitude(x)) for name, x in self.final.items() if name != "history"]
        return functools.reduce(jnp.logical_and, finite)

    def _warn_once(self) -> None:
        """Warn of lanes that did not stay finite, once the numbers are available."""
        final = [u.get_magnitude(x) for name, x in self.final.items() if name != "history"]
        if "_checked" in vars(self) or not all(map(_is_available, final)):
            return
        object.__setattr__(self, "_checked", True)
        lost = ~functools.reduce(np.logical_and, map(np.isfinite, jax.device_get(final)), np.True_)
        if lost.any():
            which = "this run" if lost.size == 1 else f"{np.sum(lost):,} of the {lost.size:,} lanes of this run"
            warn(
                f"{which} did not stay finite{'' if lost.size == 1 else ' (result.ok says which)'}: take a shorter dt, "
                f"another scheme, or parameters, inputs and a start within the model's range"
            )

    def __repr__(self) -> str:
        self._warn_once()
        shapes = ", ".join(f"{n} {tuple(x.shape)}" for n, x in self.records.items())
        return f"Result({shapes or 'no records'}; {len(self.final)} final states)"

    def tree_flatten(self):
        return (self.records, self.final), (self.times, tuple(self.statistics.items()))

    @classmethod
    def tree_unflatten(cls, static, children):
        (times, statistics), (records, final) = static, children
        return cls(times, records, final, dict(statistics))


def _is_available(x) -> bool:
    """Whether an array can be read without waiting for it."""
    if isinstance(x, jax.Array) and not is_traced(x):
        return not x.is_deleted() and x.is_fully_addressable and x.is_ready()  # pyright: ignore[reportAttributeAccessIssue]
    return isinstance(x, np.ndarray)


@interruptible
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
    model : its fields broadcast to the batch; or a `Network`, whose regions are the last axis of the batch
    duration : a time, a whole multiple of ``dt``, or a number of steps
    dt : the time of a step
    inputs : by name: a constant that broadcasts to the batch, or one value a step, ``(T,)`` or ``(T, *batch)``
    initial : by state name, or ``result.final`` of an earlier run; by default the model's initial state, or zero
    noise : by name, the intensity of white noise: on an input, in its unit times sqrt(time), or on a state, in its
        unit over sqrt(time), where `Model.diffusion` multiplies it. Ito, except "heun" and "rk4": Stratonovich
    key : a JAX random key, or one for each lane; needed with ``noise``
    record : names of observables and states, and statistics, computed without storing the trajectory, such as
        ``bk.Mean()``, ``bk.Spectrum(freqs)`` or ``bk.Average(tr)``; or a dict of these by the names of the results.
        ``None``, the model's observables
    every : steps from one record to the next
    transient : a time or a number of steps at the beginning, without records
    scheme : a name in `schemes.SCHEMES`; ``None``, the model's own
    checkpoint_every : steps between the checkpoints of a gradient; ``None``, about the square root of all steps
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
    run, data = prepare(
        model, duration, dt, inputs, initial, noise, key, record, every, transient, scheme, checkpoint_every, precision,
        implementation,
    )  # fmt: skip
    memory.check(run)
    guarded = data if run.native_autodiff else derivatives.in_reverse(data, only_reverse(run))
    records, final = (execute if math.prod(run.batch) else no_lanes(execute))(run, guarded)
    network, mass = parts_of(model)
    known = mass.recordable()
    values, statistics = {}, {}
    if not run.sampling:  # a loop records each quantity once, under however many names
        by_source: dict[Any, Any] = dict(zip(run.spec.record, records, strict=True))
        records = [by_source[what] for _, what in run.entries]
    for (name, what), x in zip(run.entries, records, strict=True):
        if isinstance(what, str):
            values[name] = units.attach(x, known[what])
        elif run.sampling:
            values[name], statistics[name] = units.attach(x, what.unit(known[what.of])), (what, run.sampling)
    last = {n: units.attach(x, known[n]) for n, x in zip(mass.states, final)}
    if network and run.depth:
        last["history"] = units.attach(final[-1], network.sent_unit)
    return Result(clock(run, dt), values, last, statistics)


def clock(run: Run, dt) -> Times:
    """When a run records."""
    lead, every, count = run.schedule.lead, run.schedule.every, run.schedule.count
    return Times(lead, every, count, units.concrete(u.get_magnitude(dt), "dt"), dt.unit)


def times(run: Run, dt):
    """The time at the end of each recorded step, ``(K,)``."""
    return clock(run, dt).values


def explain(model: Model | Network, duration, dt, **arguments) -> dispatch.Plan:
    """What `simulate` would do with these arguments, and why; nothing is run."""
    run, _ = prepare(model=model, duration=duration, dt=dt, **arguments)
    request = request_of(run)
    name, reason, passed_over = dispatch.choose(arguments.get("implementation"), request)
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
        inverse_steps=run.inverse_steps,
        block=run.sampling.block if run.sampling else 0,
    )
