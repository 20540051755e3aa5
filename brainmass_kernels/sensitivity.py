"""Forward sensitivities: derivatives by a few parameters, carried in the loop, in one pass and without a trajectory."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from . import derivatives, dispatch, units
from .arguments import prepare
from .backends.base import Carry, Loop, Operands, Request
from .interrupts import interruptible
from .loop_vjp import differentiable
from .models.base import Model, check_name
from .pointwise import Program, pushforward
from .programs import Programs
from .result import Result
from .routing import NOISE, places
from .run import Data, Run, countable, in_lanes, in_rows, lane_seeds, no_lanes, only_once, seeds_from, shared
from .schedule import Schedule
from .simulation import clock, lane_names
from .step import StepSpec, build
from .stimuli import names_of

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
    wrt : names of parameters, of constant inputs, or of noise intensities (``"noise.E_inp"``)

    Returns
    -------
    the result of `simulate`, and for each name a `Result` whose records ``(K, *batch)`` and final states are the
    derivatives, in the record's unit over the parameter's

    Raises
    ------
    ValueError, TypeError : an argument's name, unit, shape, dtype or value, before anything is compiled
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
    unit_of = _units(model, run.spec)
    of_stimuli = names_of(arguments.get("inputs") or {})
    for name in names:
        if name in of_stimuli:
            raise ValueError(
                f"'wrt' got '{name}', which is of a stimulus: take jax.grad of simulate(), or in a fit an optimiser "
                f"other than least squares"
            )
        check_name(name, unit_of, "parameter, held input or noise intensity")
    indices = tuple(list(unit_of).index(n) for n in names)
    request = Request(_loop(run, indices)[0], max(1, math.prod(run.batch)), run.spec.dtype, run.platform)
    chosen = dispatch.choose(arguments.get("implementation"), request)[0]
    spec = dataclasses.replace(run.spec, base_two=dispatch.load(chosen).base_two(run.precision))
    run = run._replace(spec=spec, inverse_steps="", native_autodiff=False, implementation=chosen)
    compute = _run if math.prod(run.batch) else no_lanes(_run)
    records, final, pushed = compute(run, indices, derivatives.in_reverse(data, _ONLY_REVERSE))
    known, when = model.recordable(), clock(run, dt)
    entries = [(n, what) for n, what in run.entries if isinstance(what, str)]
    place = {what: k for k, what in enumerate(run.spec.record)}

    def result(records, final, per) -> Result:
        return Result(
            when,
            {n: units.attach(records[place[what]], known[what] / per) for n, what in entries},
            {n: units.attach(x, known[n] / per) for n, x in zip(model.states, final, strict=True)},
            lanes=lane_names(run, False),
            recordable=tuple(known),
        )

    slopes = {n: result(d_records, d_final, unit_of[n]) for n, (d_records, d_final) in zip(names, pushed, strict=True)}
    return result(records, final, units.UNITLESS), slopes


def _units(model: Model, spec: StepSpec) -> dict[str, Any]:
    """The unit of each hoisted argument except the time step, in their order."""
    known, noisy = places(model), (f"{NOISE}{n}" for n in spec.noisy)
    return {n: known[n].unit for n in (*spec.parameters, *spec.constant, *noisy)}


def _build_loop(run: Run, indices: tuple[int, ...]) -> tuple[Loop, tuple[tuple[bool, ...], ...]]:
    """The loop with a tangent of the state for each direction, and which coefficients have one in each."""
    step, spec = build(run.spec), run.spec
    n_coefs, n_state, n_directions = len(step.setup.out_avals), len(spec.carried), len(indices)
    live = tuple(tuple(step.setup.depends([i == k for i in range(len(spec.hoisted))])) for k in indices)
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


_loop = Programs(_build_loop, lambda run, indices: run.spec)


def _run(run: Run, indices: tuple[int, ...], data: Data):
    return _RUNS(run, indices)(data)


def _compiled(run: Run, indices: tuple[int, ...]):
    def brainmass_kernels_sensitivities(data: Data):
        return _execute(run, indices, data)

    return jax.jit(brainmass_kernels_sensitivities)


_RUNS = Programs(_compiled, lambda run, indices: run.spec)


def _execute(run: Run, indices: tuple[int, ...], data: Data):
    """Records, final states, and for each direction the derivatives of both, without units."""
    return shared(run, data, functools.partial(_execute_share, indices))


def _execute_share(indices: tuple[int, ...], run: Run, data: Data):
    loop, live = _loop(run, indices)
    step, dtype, lanes = build(run.spec), run.spec.dtype, math.prod(run.batch)
    hoisted = [in_lanes(x, run.batch, dtype) for x in data.hoisted]
    start = [jnp.broadcast_to(in_lanes(x, run.batch, dtype), (lanes,)) for x in data.state]
    directions = [[jnp.ones_like(x) if i == k else jnp.zeros_like(x) for i, x in enumerate(hoisted)] for k in indices]

    def initial(hoisted):
        state = step.enter(hoisted, start)
        clock = (jnp.zeros((lanes,), dtype),) * run.spec.digits
        return tuple(step.setup(*hoisted)), (*(jnp.broadcast_to(x, (lanes,)) for x in state), *clock)

    (coefs, state), slopes, tangents = initial(hoisted), [], []
    for direction, flags in zip(directions, live, strict=True):
        d_coefs, d_state = jax.jvp(initial, (hoisted,), (direction,))[1]
        slopes += [d for d, flag in zip(d_coefs, flags, strict=True) if flag]
        tangents += d_state
    varying = tuple(in_rows(x, run.batch, dtype) for x in data.varying)
    operands = Operands((*coefs, *slopes), (), lane_seeds(run, data))

    def launch(schedule: Schedule, carry: Carry, rows, first):
        part, every = dataclasses.replace(loop, schedule=schedule), min(run.checkpoint_every, schedule.steps)
        of_part = operands._replace(inputs=rows, seeds=seeds_from(run, operands.seeds, first))
        return differentiable(run.implementation, every, part, only_once(run))(of_part, carry, None)

    records, final = countable(run, launch)(run.schedule, Carry((*state, *tangents)), varying, None)

    def shaped(values):
        return [jnp.broadcast_to(x, (*x.shape[:-1], lanes)).reshape(*x.shape[:-1], *run.batch) for x in values]

    n, m, pushed = len(run.spec.record), len(state), []
    n_state = m - run.spec.digits
    last = final.state[:n_state]
    for p, direction in enumerate(directions, start=1):
        d_last = jax.jvp(step.exit, (hoisted, last), (direction, final.state[m * p : m * p + n_state]))[1]
        pushed.append((shaped(records[n * p : n * (p + 1)]), shaped(d_last)))
    return shaped(records[:n]), shaped(step.exit(hoisted, last)), pushed
