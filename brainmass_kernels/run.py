"""Runs and their execution: coefficients before the loop, the loop in blocks, coordinates after it."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import dispatch, memory, noise
from ._jax import aligned, is_traced
from .backends.base import (
    Carry,
    Connections,
    Copied,
    Coupling,
    Loop,
    Members,
    Operands,
    Request,
    SparseConnections,
    Term,
)
from .backends.scan import Scan
from .blocks import run_in_blocks, run_in_parts
from .devices import Split, over_devices
from .equations import Key
from .groups import MEMBER
from .loop_vjp import differentiable
from .noise import StepNumber
from .pointwise import Program
from .programs import Programs
from .recording import Reduction, Sampling
from .schedule import COUNTED, PART, Schedule, segment_groups
from .signals import Signal, chain_of, is_over_time
from .step import Step, StepSpec, build

# Each inverse step multiplies rounding errors by exp(a dt). The largest sum of `a dt` over a segment.
MAX_INVERSE_GROWTH = 2.0


class Run(NamedTuple):
    """Everything about a run that is not data; the key of its compiled program."""

    spec: StepSpec
    batch: tuple[int, ...]
    schedule: Schedule
    checkpoint_every: int
    implementation: str
    native_autodiff: bool
    precision: str
    interpret: str
    platform: str
    entries: tuple[tuple[str, str | Reduction | Signal], ...]  # what is recorded, after the result's name
    sampling: Sampling | None  # of the records, if there are signals or statistics
    depths: tuple[int, ...] = ()  # steps of history of each quantity that the regions of a network send
    terms: tuple[Term, ...] = ()  # of the sums of a network
    spans: tuple[tuple[int, int], ...] = ()  # of each group of models of a network, its first region and its end
    horizon: int = 0  # steps that a gradient goes back at most, or 0
    statistics: Key | None = None  # of the code of the statistics among the entries
    copied: Copied = Copied()  # what the kernel's records are copied from
    inverse_steps: str = ""  # whether the adjoint takes inverse steps: "always", "asked" at run time, or ""
    split: Split | None = None  # over devices, if that is known before it is compiled
    axes: tuple[str, ...] = ()  # of the mesh, of a share of a run
    arrays: tuple[tuple[int, ...], ...] = ()  # the shapes of the arrays of signals

    @property
    def share(self) -> Run:
        """The run of one device, of its share of the lanes."""
        if self.split is None:
            return self
        batch = (self.batch[0] // self.split.count, *self.batch[1:]) if self.split.axes else self.batch
        return self._replace(batch=batch, split=None, axes=self.split.axes)

    @property
    def depth(self) -> int:
        """Steps of a network's longest delay."""
        return max(self.depths, default=0)

    @property
    def arriving(self) -> int:
        """About how many connections a region of a network has, as one that is differentiated by JAX stores."""
        regions = self.regions
        return sum(regions if t.edges is None else -(-t.edges // max(1, regions)) for t in self.terms)

    @property
    def regions(self) -> int:
        """Lanes that a backend takes as a network: of masses with delays of their own, some that it runs together."""
        if self.spec.is_network:
            return self.batch[-1]
        most = dispatch.load(self.implementation).masses_together if self.implementation else 1
        lanes = max(1, math.prod(self.batch))
        return max(count for count in range(1, most + 1) if lanes % count == 0)

    @property
    def networks(self) -> tuple[int, ...]:
        """The shape of a batch of such networks."""
        return self.batch[:-1] if self.spec.is_network else self.batch


class Data(NamedTuple):
    """The arrays of a run, without units; each broadcasts to the batch."""

    hoisted: tuple
    state: tuple
    varying: tuple
    key: Any
    # Of each term of a network, with weights ``(*batch, N, N)``; of masses alone, ``(*batch, 1, 1)``.
    connections: tuple[Connections, ...] = ()
    # Of each quantity that a network sends, broadcasts to ``(depth, *batch)``; ``None``, what the first state sends.
    history: tuple = ()
    seeds: Any = None  # ``(2, *batch)``, which takes the place of the key
    arrays: tuple = ()  # of the signals that are recorded, such as the matrices of readouts


def inverse_holds(run: Run, growth):
    """Whether rounding stays small over the inverse steps of a segment; ``growth`` is the largest ``a dt``."""
    return growth * longest(run) <= MAX_INVERSE_GROWTH


def longest(run: Run) -> int:
    """Steps of the longest segment between two checkpoints."""
    return max((group.length for group in segment_groups(run.schedule, run.checkpoint_every)), default=0)


def loop_of(run: Run) -> tuple[Step, Loop]:
    """The step of a run, and its loop without data."""
    step, spec = build(run.spec, bool(run.inverse_steps)), run.spec
    coupling = None
    if step.send:
        members = Members(step.coefficient_of(MEMBER), run.spans) if run.spans else None
        coupling = Coupling(run.regions, run.depths, step.send, terms_of(run), members)
    loop = Loop(
        step.advance, step.observe, len(step.setup.out_avals), len(spec.carried), len(spec.arriving),
        len(spec.noisy), run.schedule, run.precision, run.interpret, step.inverse,
        coupling,
    )  # fmt: skip
    return step, loop


def terms_of(run: Run) -> tuple[Term, ...]:
    """The terms of the sums; of masses that are run together each has a connection of its own."""
    count = run.regions
    if run.spec.is_network or count == 1:
        return run.terms
    return tuple(x._replace(edges=count, delays=tuple(count * n for n in x.delays)) for x in run.terms)


def request_of(run: Run) -> Request:
    return Request(loop_of(run)[1], max(1, math.prod(run.batch)), run.spec.dtype, run.platform)


def no_lanes(fun):
    """``fun(run, ..., data)`` for a batch of no lanes: empty arrays of the right shapes; nothing is run."""

    def empty(run: Run, *rest):
        *static, data = rest
        batch = tuple(n or 1 for n in run.batch)
        one = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(tuple(n or 1 for n in np.shape(x)), jax.dtypes.result_type(x)), data
        )
        like = jax.eval_shape(functools.partial(fun, run._replace(batch=batch), *static), one)

        def empty_like(x):
            at = x.ndim - len(batch)
            lanes = (n if size else 0 for n, size in zip(x.shape[at:], run.batch, strict=True))
            return jnp.zeros((*x.shape[:at], *lanes), x.dtype)

        return jax.tree.map(empty_like, like)

    return empty


def execute(run: Run, data: Data):
    """Records and final states of a run, without units, by its compiled program."""
    if data.connections and any(map(is_traced, jax.tree.leaves(data))):
        # In a program of the user's what is known before is a constant, which XLA would compute with as it compiles.
        data = data._replace(connections=lax.optimization_barrier(data.connections))
    return RUNS(run)(data)


def _compiled(run: Run):
    def brainmass_kernels_run(data: Data):
        return _execute(run, data)

    return jax.jit(brainmass_kernels_run)


RUNS = Programs(_compiled, lambda run: run.spec)


def _execute(run: Run, data: Data):
    """Records ``(K, *batch)`` and final states ``(*batch)``, without units; a network has its histories too."""
    return shared(run, data, _execute_share)


def shared(run: Run, data: Data, body):
    """``body(run, data) -> arrays (..., *batch)``, of which each device of a split run computes its share."""
    if data.key is not None:
        # Before the lanes are split: a seed has the number of its lane in it.
        data = data._replace(key=None, seeds=noise.lane_seeds(data.key, run.batch))
    return body(run, aligned(data)) if run.split is None else over_devices(run, data, body)


def _execute_share(run: Run, data: Data):
    step, loop = loop_of(run)
    hoisted = [in_lanes(x, run.batch, run.spec.dtype) for x in data.hoisted]
    initial = [in_lanes(x, run.batch, run.spec.dtype) for x in data.state]
    coefs = tuple(_around(run, step.setup, hoisted))
    state = _around(run, step.transforms["enter"], [*hoisted, *initial], all_lanes=True)
    # The steps are counted from the first one on.
    carry = Carry((*state, *(jnp.zeros_like(state[0]) for _ in range(run.spec.digits))))
    connections = tuple(_connections(term, run) for term in data.connections)
    if connections:
        carry = carry._replace(history=_history(data.history, run, loop, coefs, carry.state))
    near = _all_lanes(run, inverse_holds(run, step.growth(hoisted))) if run.inverse_steps == "asked" else None
    launch = _launcher(run, Operands(coefs, (), lane_seeds(run, data), connections), near)
    rows = tuple(in_rows(x, run.batch, run.spec.dtype) for x in data.varying)
    # Pallas's interpreters have effects, which JAX does not rerun.
    rerun = not run.interpret
    if connections and not run.native_autodiff:
        launch = functools.partial(run_in_parts, launch, memory.block(run), rerun)
    else:
        launch = countable(run, launch)
    if run.horizon:
        launch = functools.partial(run_in_parts, forgetful(launch), run.horizon, False)
    if run.sampling is None:
        records, final = launch(run.schedule, carry, rows, None)
    else:
        entries = [what for _, what in run.entries]
        blocks = (run.schedule, run.sampling, entries, run.spec.record, launch)
        arrays = tuple(jnp.asarray(x, run.spec.dtype) for x in data.arrays)
        records, final = run_in_blocks(*blocks, carry, rows, rerun, arrays)
    last = final.state[: len(state)]
    state = _around(run, step.transforms["exit"], [*hoisted, *last], all_lanes=True)
    if run.sampling is not None:
        finite = functools.reduce(jnp.logical_and, map(jnp.isfinite, state))
        records = [_where_finite(run, what, finite, x) for (_, what), x in zip(run.entries, records)]
    last = (*state, *final.history)
    return [[x.reshape(*x.shape[:-1], *_lanes_of(run, x)) for x in group] for group in (records, last)]


def _lanes_of(run: Run, x) -> tuple[int, ...]:
    """What the last axis of a record is: the batch, in which a network may have other channels than its regions."""
    if not run.spec.is_network:
        return run.batch
    networks = run.batch[:-1]
    return *networks, x.shape[-1] // math.prod(networks)


def _where_finite(run: Run, what: str | Reduction | Signal, finite, x):
    """A record, NaN throughout for lanes that did not stay finite, unless it is a trajectory."""
    if is_over_time(what):
        return x
    assert run.sampling is not None
    assert not isinstance(what, str)
    if chain_of(what, run.sampling).regional:
        whole = finite.reshape(-1, run.batch[-1]).all(1)
        finite = jnp.repeat(whole, x.shape[-1] // len(whole), total_repeat_length=x.shape[-1])
    return _where(finite, x)


def _launcher(run: Run, operands: Operands, near):
    """``(schedule, carry, rows, first) -> (records, carry)``, which runs some steps, from the ``first`` on."""

    def launch(schedule: Schedule, carry: Carry, rows, first: StepNumber | None):
        part = run._replace(schedule=schedule, checkpoint_every=min(run.checkpoint_every, schedule.steps))
        loop, seeds = loop_of(part)[1], seeds_from(run, operands.seeds, first)
        part_operands = operands._replace(inputs=rows, seeds=seeds)
        if run.native_autodiff:
            return Scan().native_autodiff(loop, part_operands, carry, part.checkpoint_every)[:2]
        check = functools.partial(memory.check_gradient, run)
        loop = differentiable(run.implementation, part.checkpoint_every, loop, only_once(run), check)
        return loop(part_operands, carry, near)

    return launch


def seeds_from(run: Run, seeds, first: StepNumber | None):
    """Seeds for steps from the ``first`` on; ``None`` is the first of all."""
    if seeds is None or first is None:
        return seeds
    return noise.numbered(seeds, first, wide=run.schedule.steps > COUNTED)


def forgetful(launch):
    """A launch that no gradient goes back beyond, but for the first of a run."""

    def forget(schedule: Schedule, carry: Carry, rows, first: StepNumber | None):
        if first is not None:
            first_of_all = (first.low | first.high) == 0
            carry = jax.tree.map(lambda x: jnp.where(first_of_all, x, lax.stop_gradient(x)), carry)
        return launch(schedule, carry, rows, first)

    return forget


def countable(run: Run, launch):
    """A launch whose steps kernels count in 32 bits: those of a longer run are taken in parts."""
    return launch if run.schedule.steps <= COUNTED else functools.partial(run_in_parts, launch, PART, False)


def _connections(connections: Connections, run: Run) -> Connections:
    """The connections in the form that backends take."""
    weights, steps = jnp.asarray(connections.weights, run.spec.dtype), jnp.asarray(connections.steps)

    def by_network(x, rank: int):
        each = x.shape[-rank:]
        if math.prod(x.shape[:-rank]) == 1:
            return x.reshape(each)
        return jnp.moveaxis(jnp.broadcast_to(x, (*run.networks, *each)).reshape(-1, *each), 0, -1)

    if not run.spec.is_network and run.regions > 1:
        return _together(weights, steps, run)
    weights, steps = by_network(weights, 2), by_network(steps, connections.rank_of_steps)
    return connections._replace(weights=weights, steps=steps, edges=jnp.asarray(connections.edges))


def _together(weights, steps, run: Run) -> Connections:
    """The connections of masses to their own past, ``(*batch, 1, 1)``, where some masses are a network each."""
    count = run.regions

    def of_some(x):
        if x.size == 1:
            return jnp.broadcast_to(x.reshape(1), (count,))
        return jnp.broadcast_to(x[..., 0, 0], run.batch).reshape(-1, count).T

    own = jnp.arange(count, dtype=jnp.int32)
    return SparseConnections(of_some(weights)[None], of_some(steps), jnp.stack([own, own]))


def _history(history, run: Run, loop: Loop, coefs, state) -> tuple:
    """What was sent before the first step, each ``(depth, L)``; by default what the first state sends."""
    assert loop.coupling is not None
    before, by_default = [], loop.coupling.send(*coefs, *state)
    for own, sent, depth in zip(history, by_default, run.depths, strict=True):
        if own is not None:
            own = in_rows(own, run.batch, run.spec.dtype)
            sent = own if own.ndim == 2 else own[:, None]
        before.append(jnp.broadcast_to(sent, (depth, math.prod(run.batch))))
    return tuple(before)


def lane_seeds(run: Run, data: Data):
    """``(2, L)``, or ``None`` without a key."""
    return None if data.seeds is None else data.seeds.reshape(2, math.prod(run.batch))


def _all_lanes(run: Run, holds):
    """What holds for all lanes; for those of all devices, if each has a share of them."""
    if not run.axes:
        return holds
    return lax.pmin(jnp.all(holds).astype(jnp.int32), run.axes).astype(bool)


def _around(run: Run, program: Program, arguments, all_lanes: bool = False):
    """A program around the loop, of arguments that are each ``()`` or ``(L,)``; outputs likewise, or all ``(L,)``."""
    lanes = math.prod(run.batch)
    if kernel := dispatch.load(run.implementation).pointwise(program):
        return kernel(arguments, lanes, all_lanes)
    outputs = program(*arguments)
    return [jnp.broadcast_to(x, (lanes,)) for x in outputs] if all_lanes else outputs


def _where(finite, x):
    """A statistic ``(L,)`` or ``(M, L)``, NaN for lanes that did not stay finite."""
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return x
    return jnp.where(jnp.broadcast_to(finite, x.shape), x, jnp.nan)


def only_reverse(run: Run) -> str:
    return (
        f"forward-mode differentiation (jvp, jacfwd, linearize, hessian) of simulate() on '{run.implementation}': "
        'ask for implementation="scan", which JAX differentiates in every mode; grad and vjp work on all'
    )


def only_once(run: Run) -> str:
    return (
        f"a second derivative (hessian, grad of grad) of a run on '{run.implementation}', which has the first only: "
        'ask simulate() for implementation="scan", which JAX differentiates as often as wanted'
    )


def in_lanes(x, batch, dtype):
    """A value as ``()`` if all lanes share it, else as ``(L,)``."""
    x = jnp.asarray(x, dtype)
    return jnp.broadcast_to(x, batch).reshape(-1) if x.size > 1 else x.reshape(())


def in_rows(x, batch, dtype):
    """One value a step as ``(T,)`` if all lanes share it, else as ``(T, L)``."""
    x = jnp.asarray(x, dtype)
    if x.size == x.shape[0]:
        return x.reshape(-1)
    # Shapes broadcast from the right; the time axis stays in front.
    x = x.reshape(x.shape[0], *(1,) * (len(batch) + 1 - x.ndim), *x.shape[1:])
    return jnp.broadcast_to(x, (x.shape[0], *batch)).reshape(x.shape[0], -1)
