"""Forward sensitivities: derivatives by a few parameters, carried in the loop, in one pass and without a trajectory."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from . import derivatives, dispatch, jaxprs, routing, stimuli, units
from ._jax import Literal, jaxpr_as_fun
from .arguments import prepare
from .backends.base import Carry, Loop, Operands, Request
from .interrupts import interruptible
from .loop_vjp import differentiable
from .models.base import Model, check_name
from .pointwise import Program, pushforward
from .programs import Programs
from .result import Result
from .routing import NOISE
from .run import Data, Run, countable, in_lanes, in_rows, lane_seeds, no_lanes, only_once, seeds_from, shared
from .schedule import Schedule
from .simulation import clock, lane_names
from .step import StepSpec, build
from .stimuli import Stimuli

_ONLY_REVERSE = (
    "forward-mode differentiation (jvp, jacfwd, linearize, hessian) of sensitivities(), which reverse mode "
    'differentiates: for second derivatives in other ways take simulate() with implementation="scan"'
)


@interruptible
def sensitivities(
    model: Model, duration, dt, wrt: str | Sequence[str], **arguments
) -> tuple[Result, dict[str, Result]]:
    """Simulate, and carry the derivatives by some parameters in the loop, those of each lane by its value.

    The derivatives are further states of the loop: exact, on every implementation, in memory that does not grow with
    time. For a few parameters and many records, as in least squares, this gives the Jacobian in one pass; for many
    parameters and one loss `jax.grad` is cheaper. The result can be differentiated in reverse.

    Parameters
    ----------
    model, duration, dt, **arguments : as `simulate` takes them, except statistics in ``record``
    wrt : names of parameters, of constant inputs, of noise intensities (``"noise.E_inp"``), or of parameters of
        stimuli (``"E_inp.onset"``)

    Returns
    -------
    the result of `simulate`, and for each name a `Result` whose records ``(K, *batch)`` and final states are the
    derivatives, in the record's unit over the parameter's

    Raises
    ------
    ValueError, TypeError : an argument's name, unit, shape, dtype or value, before anything is compiled; a time of a
        stimulus with a hard edge
    Unsupported : the named implementation cannot run this
    """
    run, data = prepare(model=model, duration=duration, dt=dt, **arguments)
    if run.spec.links and not run.spec.is_network:
        raise TypeError(
            "'model' got a model with delays inside a mass, whose derivatives are not carried in the loop: "
            'differentiate simulate() of it, by jax.grad, or by jax.jacfwd with implementation="scan"'
        )
    if run.spec.links:
        raise TypeError(
            "'model' got a Network, but takes a model: differentiate simulate() of a network, by jax.grad, or by "
            'jax.jacfwd with implementation="scan"'
        )
    if run.sampling is not None:
        raise ValueError("'record' got statistics, but sensitivities are of names: take jax.grad of a statistic")
    if arguments.get("gradient_horizon") is not None:
        raise ValueError(
            f"'gradient_horizon' got {arguments['gradient_horizon']}, but sensitivities are carried forward, over the "
            "whole run: take jax.grad of simulate()"
        )
    names = (wrt,) if isinstance(wrt, str) else tuple(wrt)
    if not names:
        raise ValueError("'wrt' names no parameter, but takes at least one")
    inputs = arguments.get("inputs") or {}
    known = routing.places(model, inputs)
    unit_of = {name: known[name].unit for name in (*_hoisted(run.spec), *stimuli.names_of(inputs))}
    for name in names:
        check_name(name, unit_of, "parameter, held input or noise intensity")
    directions, tangents = [], []
    for name in names:
        direction, moved = _direction(name, model, run, data, inputs, known)
        directions.append(direction)
        tangents += moved
    data, directions = data._replace(hoisted=(*data.hoisted, *tangents)), tuple(directions)
    request = Request(_loop(run, directions)[0], max(1, math.prod(run.batch)), run.spec.dtype, run.platform)
    chosen = dispatch.choose(arguments.get("implementation"), request)[0]
    spec = dataclasses.replace(run.spec, base_two=dispatch.load(chosen).base_two(run.precision))
    run = run._replace(spec=spec, inverse_steps="", native_autodiff=False, implementation=chosen)
    compute = _run if math.prod(run.batch) else no_lanes(_run)
    records, final, pushed = compute(run, directions, derivatives.in_reverse(data, _ONLY_REVERSE))
    recordable, when = model.recordable(), clock(run, dt)
    entries = [(n, what) for n, what in run.entries if isinstance(what, str)]
    place = {what: k for k, what in enumerate(run.spec.record)}

    def result(records, final, per) -> Result:
        return Result(
            when,
            {n: units.attach(records[place[what]], recordable[what] / per) for n, what in entries},
            {n: units.attach(x, recordable[n] / per) for n, x in zip(model.states, final, strict=True)},
            lanes=lane_names(run, False),
            recordable=tuple(recordable),
        )

    slopes = {n: result(d_records, d_final, unit_of[n]) for n, (d_records, d_final) in zip(names, pushed, strict=True)}
    return result(records, final, units.UNITLESS), slopes


class Direction(NamedTuple):
    """Which of the hoisted arguments a parameter moves.

    Attributes
    ----------
    places : their places, of which each moves by as much as the parameter, one for one
    given : whether their derivatives are among the data, after the hoisted arguments
    """

    places: tuple[int, ...]
    given: bool = False


def _hoisted(spec: StepSpec) -> dict[str, int]:
    """The place of each parameter, constant input and noise intensity among the hoisted arguments, by full name."""
    noisy = (f"{NOISE}{n}" for n in spec.noisy)
    return {n: place for place, n in enumerate((*spec.parameters, *spec.constant, *noisy))}


def _direction(name: str, model: Model, run: Run, data: Data, inputs, known) -> tuple[Direction, list[Any]]:
    """The direction of a parameter, and of a stimulus' the derivatives of what a run is given in its place."""
    places = _hoisted(run.spec)
    if name in places:
        return Direction((places[name],)), []
    unit, dtype = known[name].unit, run.spec.dtype
    of_inputs = {n: units.unit_of(x) for n, x in model.inputs.items()}

    def given(value):
        moved = routing.put(model, inputs, {}, {name: units.attach(value, unit)})[1]
        drives = stimuli.drives_of(moved)
        one_region = Stimuli.of(drives, of_inputs, model.time_unit, lambda _, x: x)
        return one_region.data(float(data.hoisted[-1]), model.time_unit, run.spec.digits)

    value = jnp.asarray(units.strip(routing.quantities(model, inputs, {})[name][1], unit, name), dtype)
    slope = jax.make_jaxpr(lambda by: [jnp.asarray(x, dtype) for x in jax.jvp(given, (value,), (by,))[1]])
    closed = slope(jnp.ones_like(value))
    reached = jaxprs.depending_on(closed.jaxpr.invars, closed.jaxpr.eqns)
    moving = [not isinstance(v, Literal) and v in reached for v in closed.jaxpr.outvars]
    slopes = jaxpr_as_fun(closed)(jnp.ones_like(value))
    first = run.spec.hoisted.index(f"stimulus {run.spec.stimulating[0]}")
    pairs = [(first + k, x) for k, (x, moves) in enumerate(zip(slopes, moving, strict=True)) if moves]
    return Direction(tuple(place for place, _ in pairs), given=True), [x for _, x in pairs]


def _build_loop(run: Run, directions: tuple[Direction, ...]) -> tuple[Loop, tuple[tuple[bool, ...], ...]]:
    """The loop with a tangent of the state for each direction, and which coefficients have one in each."""
    step, spec = build(run.spec), run.spec
    n_coefs, n_state, n_directions = len(step.setup.out_avals), len(spec.carried), len(directions)
    moved = ([i in one.places for i in range(len(spec.hoisted))] for one in directions)
    live = tuple(tuple(step.setup.depends(flags)) for flags in moved)
    constant = (False,) * (len(spec.varying) + len(spec.noisy))
    advance = pushforward(step.advance, [(*flags, *(True,) * n_state, *constant) for flags in live])
    observe = pushforward(step.observe, [(*flags, *(True,) * n_state) for flags in live])
    n_live = sum(map(sum, live))

    def by_direction(program: Program):
        """From a loop's order, coefficients and then states, to the program's, direction by direction."""

        def fun(*flat):
            args = iter(flat)
            coefs, slopes, state, pushed = (
                [next(args) for _ in range(count)] for count in (n_coefs, n_live, n_state, n_state * n_directions)
            )
            rest, slopes, pushed = list(args), iter(slopes), iter(pushed)
            counts = [(sum(flags), n_state) for flags in live]
            tangents = [next(part) for pair in counts for part, n in zip((slopes, pushed), pair) for _ in range(n)]
            return program(*coefs, *state, *rest, *tangents)

        return Program(fun, program.in_avals, program.label)

    loop = Loop(
        by_direction(advance), by_direction(observe), n_coefs + n_live, n_state * (1 + n_directions), len(spec.varying),
        len(spec.noisy), run.schedule, run.precision, run.interpret,
    )  # fmt: skip
    return loop, live


_loop = Programs(_build_loop, lambda run, directions: run.spec)


def _run(run: Run, directions: tuple[Direction, ...], data: Data):
    return _RUNS(run, directions)(data)


def _compiled(run: Run, directions: tuple[Direction, ...]):
    def brainmass_kernels_sensitivities(data: Data):
        return _execute(run, directions, data)

    return jax.jit(brainmass_kernels_sensitivities)


_RUNS = Programs(_compiled, lambda run, directions: run.spec)


def _execute(run: Run, directions: tuple[Direction, ...], data: Data):
    """Records, final states, and for each direction the derivatives of both, without units."""
    return shared(run, data, functools.partial(_execute_share, directions))


def _execute_share(directions: tuple[Direction, ...], run: Run, data: Data):
    loop, live = _loop(run, directions)
    step, dtype, lanes = build(run.spec), run.spec.dtype, math.prod(run.batch)
    every = [in_lanes(x, run.batch, dtype) for x in data.hoisted]
    hoisted, given = every[: len(run.spec.hoisted)], iter(every[len(run.spec.hoisted) :])
    start = [jnp.broadcast_to(in_lanes(x, run.batch, dtype), (lanes,)) for x in data.state]
    tangents_of = []
    for one in directions:
        moved = {i: next(given) if one.given else jnp.ones_like(hoisted[i]) for i in one.places}
        tangents_of.append([moved[i] if i in moved else jnp.zeros_like(x) for i, x in enumerate(hoisted)])

    def initial(hoisted):
        state = step.enter(hoisted, start)
        clock = (jnp.zeros((lanes,), dtype),) * run.spec.digits
        return tuple(step.setup(*hoisted)), (*(jnp.broadcast_to(x, (lanes,)) for x in state), *clock)

    (coefs, state), slopes, tangents = initial(hoisted), [], []
    for direction, flags in zip(tangents_of, live, strict=True):
        d_coefs, d_state = jax.jvp(initial, (hoisted,), (direction,))[1]
        slopes += [d for d, flag in zip(d_coefs, flags, strict=True) if flag]
        tangents += d_state
    varying = tuple(in_rows(x, run.batch, dtype) for x in data.varying)
    operands = Operands((*coefs, *slopes), (), lane_seeds(run, data))

    def launch(schedule: Schedule, carry: Carry, rows, first):
        part, most = dataclasses.replace(loop, schedule=schedule), min(run.checkpoint_every, schedule.steps)
        of_part = operands._replace(inputs=rows, seeds=seeds_from(run, operands.seeds, first))
        return differentiable(run.implementation, most, part, only_once(run))(of_part, carry, None)

    records, final = countable(run, launch)(run.schedule, Carry((*state, *tangents)), varying, None)

    def shaped(values):
        return [jnp.broadcast_to(x, (*x.shape[:-1], lanes)).reshape(*x.shape[:-1], *run.batch) for x in values]

    n, m, pushed = len(run.spec.record), len(state), []
    n_state = m - run.spec.digits
    last = final.state[:n_state]
    for p, direction in enumerate(tangents_of, start=1):
        d_last = jax.jvp(step.exit, (hoisted, last), (direction, final.state[m * p : m * p + n_state]))[1]
        pushed.append((shaped(records[n * p : n * (p + 1)]), shaped(d_last)))
    return shaped(records[:n]), shaped(step.exit(hoisted, last)), pushed
