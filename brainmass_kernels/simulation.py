"""`simulate`: from a model with units to a run on a backend and its result."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import brainunit as u
import jax
import jax.numpy as jnp

from . import derivatives, devices, dispatch, memory, signals, units
from ._jax import is_traced
from .arguments import prepare
from .groups import Groups
from .interrupts import interruptible
from .models.base import Model
from .network import Network, parts_of, sent_of
from .pointwise import specialized
from .recording import Reduction
from .result import Result, Times
from .run import Run, execute, loop_of, no_lanes, only_reverse, request_of
from .step import build


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
    gradient_horizon=None,
) -> Result:
    """Simulate a batch of masses, all steps in one compiled loop, differentiably.

    Parameters
    ----------
    model : its fields broadcast to the batch; or a `Network`, whose regions are the last axis of the batch
    duration : a time, a whole multiple of ``dt``, or a number of steps
    dt : the time of a step
    inputs : by name: a constant that broadcasts to the batch, or one value a step, ``(T,)`` or ``(T, *batch)``; plus
        any number of stimuli, such as ``120 * u.Hz + bk.Pulse(...)``
    initial : by state name, or ``result.final`` of an earlier run; by default the model's initial state, or zero
    noise : by name, the intensity of white noise: on an input, in its unit times sqrt(time), or on a state, in its
        unit over sqrt(time), where `Model.diffusion` multiplies it. Ito, except "heun" and "rk4": Stratonovich
    key : a JAX random key, or one for each lane; needed with ``noise``
    record : names of observables and states, and statistics, computed without storing the trajectory, such as
        ``bk.Mean()``, ``bk.Spectrum(freqs)`` or ``bk.Correlation()``; signals, such as ``bk.Readout(matrix)`` or
        ``bk.Convolved(kernel)``; or a dict of these by the names of the results. ``None``, the model's observables
    every : steps from one record to the next
    transient : a time or a number of steps at the beginning, without records
    scheme : a name in `schemes.SCHEMES`; ``None``, the model's own
    checkpoint_every : steps between the checkpoints of a gradient; ``None``, about the square root of all steps
    precision : ``"exact"``, or ``"fast"`` for the hardware's approximate functions
    implementation : ``None`` chooses; see `explain`
    gradient_horizon : a time or a number of steps over which a gradient goes back at most: the run is cut into parts
        of that length, and what one part makes of the state before it has no derivative, as suits chaotic runs. The
        run has the same numbers. ``None``, no limit

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
        implementation, gradient_horizon,
    )  # fmt: skip
    memory.check(run, any(map(is_traced, jax.tree.leaves(data))))
    guarded = data if run.native_autodiff else derivatives.in_reverse(data, only_reverse(run))
    records, final = (execute if math.prod(run.batch) else no_lanes(execute))(run, guarded)
    network, mass = parts_of(model)
    known = mass.recordable()
    values, statistics = {}, {}
    if not run.sampling:  # a loop records each quantity once, under however many names
        by_source: dict[Any, Any] = dict(zip(run.spec.record, records, strict=True))
        records = [by_source[what] for _, what in run.entries]
    lanes_of = mass.lanes_of if isinstance(mass, Groups) else lambda name: None
    for (name, what), x in zip(run.entries, records, strict=True):
        of = what if isinstance(what, str) else what.of
        x = _of_lanes(x, lanes_of(of)) if isinstance(of, str) else x
        if isinstance(what, Reduction) and what.across:
            x = jnp.moveaxis(x, 0, -2)  # a matrix of each network
        values[name] = units.attach(x, signals.unit_of(what, known))
        if run.sampling and not isinstance(what, str):
            statistics[name] = what, run.sampling
    last: dict[str, Any] = {n: units.attach(x, known[n]) for n, x in zip(mass.states, final)}
    last = {n: _of_lanes(x, lanes_of(n)) for n, x in last.items()}
    if run.depth:
        pasts = zip(sent_of(model).items(), final[len(mass.states) :], strict=True)
        histories = {name: units.attach(x, unit) for (name, unit), x in pasts if len(x)}
        last["history"] = histories if len(run.depths) > 1 else next(iter(histories.values()))
    return Result(clock(run, dt), values, last, statistics, lane_names(run, network is not None), tuple(known))


def _of_lanes(x, lanes):
    """The regions of a group, along the last axis."""
    return x if lanes is None else x[..., lanes]


def lane_names(run: Run, is_network: bool) -> tuple[str, ...]:
    """The names of the axes of the batch."""
    count = len(run.batch) - is_network
    lanes = ("lane",) if count == 1 else tuple(f"lane_{i}" for i in range(count))
    return (*lanes, "region") if is_network else lanes


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
        bytes_recorded=memory.recorded(run.share),
        bytes_gradient=memory.gradient(run.share),
        bytes_copied=memory.copied(run.share),
        lane_block=run.copied.block,
        inverse_steps=run.inverse_steps,
        block=run.sampling.block if run.sampling else 0,
        horizon=run.horizon,
        groups=_groups(run, dispatch.load(name).by_group),
        devices=devices.describe(run),
    )


def _groups(run: Run, apart: bool) -> str:
    """Whose equations a region of a network of groups runs."""
    loop = loop_of(run)[1]
    members = loop.coupling.members if loop.coupling else None
    if members is None:
        return ""
    if not apart:
        return "a region runs the equations of all groups"
    counts = [len(specialized(loop.advance, members.coef, k).jaxpr.jaxpr.eqns) for k in range(len(members.spans))]
    return f"a region runs the equations of its own group alone, of {', '.join(map(str, counts))} operations"
