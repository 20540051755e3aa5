"""The steps of a fit: an optax optimiser's along gradients, or Levenberg-Marquardt steps of least squares."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import display, identity, units
from ..errors import Unsupported
from ..extras import needs
from .division import Division
from .problem import Problem

#: Adam's step in z, where the width between the bounds is about 6.
LEARNING_RATE = 0.05
#: The name of the optimiser that is not in optax.
LEVENBERG_MARQUARDT = "levenberg_marquardt"
#: Marquardt's initial damping, and its bounds.
_DAMPING, _DAMPINGS = 1e-2, (1e-6, 1e6)
#: The largest z, and the longest Levenberg-Marquardt step.
_LARGEST_Z, _LONGEST_STEP = 6.0, 1.5


class State(NamedTuple):
    """What an optimiser carries from step to step, and a saved fit contains.

    Attributes
    ----------
    z : where the next step is taken, name to ``(n or 1, starts, ...)``
    moments : the optimiser's state
    best_z, best : the best z so far, and its error including priors, ``(n, starts)``
    first : the initial z of the first start of each target
    alive : the numbers of the starts that are left, ``(n, starts)``
    """

    z: dict[str, jax.Array]
    moments: Any
    best_z: dict[str, jax.Array]
    best: jax.Array
    first: dict[str, jax.Array]
    alive: jax.Array


class Damped(NamedTuple):
    """The state of Levenberg-Marquardt: the damping, and the normal equations at the best z.

    Attributes
    ----------
    damping : ``(n, starts)``
    normal, slope : ``(n, starts, P, P)`` and ``(n, starts, P)``, means over the residuals
    """

    damping: jax.Array
    normal: jax.Array
    slope: jax.Array


@functools.partial(jax.jit, static_argnums=(0, 2))
def begin(problem: Problem, z, optimiser) -> State:
    """The state before the first step."""
    n, starts = problem.comparison.count, z[problem.frees[0].name].shape[1]
    full = functools.partial(jnp.full, dtype=z[problem.frees[0].name].dtype)
    if optimiser == LEVENBERG_MARQUARDT:
        p = problem.unknowns[-1][1].stop if problem.moving else 0
        moments = Damped(full((n, starts), _DAMPING), full((n, starts, p, p), 0.0), full((n, starts, p), 0.0))
    else:
        moments = optimiser.init(z)
    alive = jnp.broadcast_to(jnp.arange(starts), (n, starts))
    first = {name: x[:, :1] for name, x in z.items()}
    return State(z, moments, z, full((n, starts), jnp.inf), first, alive)


@functools.cache
def adam():
    optax: Any = needs("optax")
    return optax.adam(LEARNING_RATE, b2=0.99)


def optimiser_of(problem: Problem, optimiser):
    if optimiser is None:
        return adam()
    if isinstance(optimiser, str) and optimiser == LEVENBERG_MARQUARDT:
        named = problem.options["implementation"]
        if not problem.carried and named not in (None, "scan"):
            raise Unsupported(
                f"'optimiser' got {optimiser!r} on '{named}', but the derivatives of networks, of delays inside a mass "
                "and of statistics are taken by JAX through 'scan': leave 'implementation' out, or take an optimiser "
                "of optax"
            )
        return optimiser
    if not hasattr(optimiser, "update"):
        got = f"str {optimiser!r}" if isinstance(optimiser, str) else type(optimiser).__name__
        raise TypeError(f"'optimiser' got {got}, but takes an optax optimiser or {LEVENBERG_MARQUARDT!r}")
    return optimiser


def default_optimiser(problem: Problem):
    """Least squares where derivatives are carried in the loop, else Adam."""
    return LEVENBERG_MARQUARDT if problem.carried else adam()


def optimiser_identity(problem: Problem, optimiser) -> str:
    """A digest of an optimiser's steps, their sizes included."""
    if optimiser == LEVENBERG_MARQUARDT:
        return LEVENBERG_MARQUARDT
    z = {f.name: jax.ShapeDtypeStruct((2, 3), jnp.result_type(float)) for f in problem.frees}
    with jax.numpy_dtype_promotion("standard"):
        return identity.of_function(optimiser.update, z, jax.eval_shape(optimiser.init, z), z)


def _for_leaf(lanes, like):
    """Values of lanes ``(n, starts)``, broadcast to a leaf of z."""
    return jnp.broadcast_to(lanes.reshape(*lanes.shape, *(1,) * (like.ndim - 2)), like.shape)


def _where(lanes, new, old):
    """z of some lanes from ``new``, of the others from ``old``."""
    return {name: jnp.where(_for_leaf(lanes[: len(x)], x), x, old[name]) for name, x in new.items()}


class Gradient(NamedTuple):
    """What a gradient step takes of every lane.

    Attributes
    ----------
    slopes : of ``total`` by each z, in its shape
    error, total : ``(n, starts)``, of the data, and including priors
    """

    slopes: dict[str, jax.Array]
    error: jax.Array
    total: jax.Array


@functools.partial(jax.jit, static_argnums=0)
def gradients_at(problem: Problem, z, keys, data) -> Gradient:
    """The gradient of every lane."""

    def objective(z):
        z = _frozen(problem, z)
        prediction = problem.predict(z, keys)
        error, _ = problem.error(prediction, data)
        count = math.prod(prediction.shape[2:])
        total = error + jnp.broadcast_to(problem.penalty(z, count).astype(error.dtype), error.shape)
        # Lanes do not mix, so the gradient of the sum contains that of each lane.
        return jnp.sum(total), (error, total)

    slopes, (error, total) = jax.grad(objective, has_aux=True)(z)
    return Gradient(slopes, error, total)


def _frozen(problem: Problem, z):
    return {name: jax.lax.stop_gradient(x) if name in problem.pooling.frozen else x for name, x in z.items()}


@functools.partial(jax.jit, static_argnums=0)
def pooled_gradient(problem: Problem, z, apart: Gradient) -> Gradient:
    """The gradient of every lane, from that of each target by itself: with priors, sums and the mean of the group."""
    shape, count = apart.error.shape, problem.comparison.width

    def objective(z):
        penalty = jnp.broadcast_to(problem.penalty(_frozen(problem, z), count).astype(apart.error.dtype), shape)
        return jnp.sum(penalty), penalty

    slopes, penalty = jax.grad(objective, has_aux=True)(z)
    for name, own in apart.slopes.items():
        slopes[name] = slopes[name] + (own.sum(0, keepdims=True) if name in problem.pooling.shared else own)
    return Gradient(slopes, apart.error, apart.error + penalty)


@functools.partial(jax.jit, static_argnums=(0, 1))
def gradient_step(problem: Problem, optimiser, state: State, gradient: Gradient, clip) -> State:
    """One step of every lane along its gradient."""
    slopes, _, total = gradient
    better = problem.score(total) < problem.score(state.best)
    best_z = _where(better, state.z, state.best_z)
    # optax needs dtype promotion, which a user may have forbidden.
    with jax.numpy_dtype_promotion("standard"):
        updates, moments = optimiser.update(_clipped(slopes, clip), state.moments, state.z)
    z = {name: jnp.clip(value + updates[name], -_LARGEST_Z, _LARGEST_Z) for name, value in state.z.items()}
    # A lane whose simulation was not finite continues from its best z.
    z = _where(jnp.isfinite(problem.score(total)), z, best_z)
    return state._replace(z=z, moments=moments, best_z=best_z, best=jnp.where(better, total, state.best))


def _clipped(slopes, limit: float):
    """The gradient of each lane, at most ``limit`` long, and zero where it is not finite."""
    squares = [jnp.square(s) if s.ndim == 2 else jnp.sum(jnp.square(s), -1) for s in slopes.values()]
    length = jnp.sqrt(sum(squares[1:], squares[0]))
    usable = jnp.isfinite(length)
    shrink = jnp.where(usable, jnp.minimum(1.0, limit / jnp.maximum(length, 1e-30)), 0.0)
    clipped = {}
    for name, slope in slopes.items():
        factor = _for_leaf(shrink if len(slope) == len(shrink) else shrink.min(0, keepdims=True), slope)
        clipped[name] = jnp.where(factor > 0, slope, 0.0) * factor
    return clipped


@functools.partial(jax.jit, static_argnums=0)
def lm_step(problem: Problem, state: State, equations: Normal) -> State:
    """One Levenberg-Marquardt step of every lane.

    A z that is better than the best replaces it, with a third of the damping; otherwise a shorter step is taken from
    the best z. Marquardt 1963, SIAM J. Appl. Math. 11:431.
    """
    _, total, normal, slope, _ = equations
    better = problem.score(total) < problem.score(state.best)
    before = state.moments
    low, high = _DAMPINGS
    damping = jnp.clip(jnp.where(better, before.damping / 3.0, before.damping * 4.0), low, high)
    normal = jnp.where(better[..., None, None], normal, before.normal)
    slope = jnp.where(better[..., None], slope, before.slope)
    best_z = _where(better, state.z, state.best_z)
    step = _damped_step(problem, normal, slope, damping)
    z = dict(best_z)
    for f, at in problem.unknowns:
        move = jnp.clip(step[: len(z[f.name]), :, at], -_LONGEST_STEP, _LONGEST_STEP).reshape(z[f.name].shape)
        z[f.name] = jnp.clip(z[f.name] - move, -_LARGEST_Z, _LARGEST_Z)
    moments = Damped(damping, normal, slope)
    return state._replace(z=z, moments=moments, best_z=best_z, best=jnp.where(better, total, state.best))


class Normal(NamedTuple):
    """The normal equations of every lane, means over its residuals.

    Attributes
    ----------
    error, total : ``(n, starts)``, of the data, and including priors
    normal, slope : ``(n, starts, P, P)`` and ``(n, starts, P)``, including priors
    count : ``(n, starts)``, the number of residuals
    """

    error: jax.Array
    total: jax.Array
    normal: jax.Array
    slope: jax.Array
    count: jax.Array


def normal_equations(problem: Problem, z, keys, data) -> Normal:
    residuals, jacobian = problem.linearised(z, keys, data)
    count = residuals.shape[-1]
    error, normal, slope = problem.each(_means, residuals, jacobian)
    error = jnp.where(jnp.isfinite(error), error, jnp.inf)
    return _with_penalties(problem, z, Normal(error, error, normal, slope, jnp.full(error.shape, count)), count)


def _with_penalties(problem: Problem, z, found: Normal, count: int) -> Normal:
    """The normal equations of ``count`` residuals, with the priors and the group."""
    error, total, normal, slope, counts = found
    places = {f.name: at for f, at in problem.unknowns}
    weight = problem.comparison.sigma**2 / count
    for name, residual, by_z in problem.penalties(z):
        if name not in places:
            continue
        p, share = np.arange(slope.shape[-1])[places[name]], len(error) if name in problem.pooling.shared else 1
        shape = (*error.shape, len(p))
        residual, by_z = (x if x.ndim == 3 else x[..., None] for x in (residual, by_z))
        normal = normal.at[:, :, p, p].add(jnp.broadcast_to(by_z**2 * weight / share, shape))
        slope = slope.at[:, :, p].add(jnp.broadcast_to(by_z * residual * weight / share, shape))
    finite = jnp.isfinite(slope).all(-1) & jnp.isfinite(total)
    total = jnp.where(finite, error + jnp.broadcast_to(problem.penalty(z, count), error.shape), jnp.inf)
    normal, slope = jnp.where(finite[..., None, None], normal, 0.0), jnp.where(finite[..., None], slope, 0.0)
    return Normal(error, total, normal, slope, counts)


pooled_normal_equations = jax.jit(_with_penalties, static_argnums=(0, 3))


def _means(residuals, jacobian):
    """Of the squared residuals, of the products of derivatives, and of those with the residuals."""
    count = residuals.shape[-1]
    normal = jnp.einsum("nspm,nsqm->nspq", jacobian, jacobian, precision="highest") / count
    slope = jnp.einsum("nspm,nsm->nsp", jacobian, residuals, precision="highest") / count
    return jnp.mean(residuals**2, -1), normal, slope


normal_equations_at = jax.jit(normal_equations, static_argnums=0)


def joint_normal_equations(problem: Problem, normal, slope):
    """The normal equations of each start, whose unknowns are those of each target and the shared ones.

    Returns
    -------
    normal, slope : ``(1, starts, D, D)`` and ``(1, starts, D)``
    place : ``(n, P)``, the unknown of each target and parameter
    """
    n, _, p, _ = normal.shape
    shared = [i for f, at in problem.unknowns if f.name in problem.pooling.shared for i in range(at.start, at.stop)]
    separate = [i for i in range(p) if i not in shared]
    place = np.zeros((n, p), int)
    place[:, separate] = np.arange(n * len(separate)).reshape(n, -1)
    place[:, shared] = n * len(separate) + np.arange(len(shared))
    size = n * len(separate) + len(shared)
    onto = jnp.asarray(np.eye(size)[place], normal.dtype)
    dense = jnp.einsum("nspq,npi,nqj->sij", normal, onto, onto, precision="highest")
    return dense[None], jnp.einsum("nsp,npi->si", slope, onto, precision="highest")[None], place


def _damped_step(problem: Problem, normal, slope, damping):
    """The solution of the damped normal equations, ``(n, starts, P)``."""
    place = None
    if problem.pooling.shared:
        normal, slope, place = joint_normal_equations(problem, normal, slope)
        damping = damping[:1]
    diagonal = jnp.einsum("...ii->...i", normal)
    least = 1e-12 + 1e-6 * diagonal.max(-1, keepdims=True)
    added = damping[..., None] * jnp.maximum(diagonal, jnp.broadcast_to(least, diagonal.shape))
    eye = jnp.broadcast_to(jnp.eye(normal.shape[-1], dtype=normal.dtype), normal.shape)
    step = jnp.linalg.solve(normal + added[..., None] * eye, slope[..., None])[..., 0]
    step = jnp.where(jnp.isfinite(step), step, 0.0)
    return step if place is None else jnp.moveaxis(step[0][:, place], 1, 0)


# The descent ----------------------------------------------------------------------------------------------------------


class Progress(NamedTuple):
    """The argument of a ``progress`` callback after each step; it may return True to stop the fit."""

    step: int
    steps: int
    rms: np.ndarray  # (targets, starts), this step
    best: np.ndarray  # (targets,), lowest so far
    seconds: float = 0.0  # since the first step began
    values: dict[str, Any] = {}  # the best so far, name to Quantity (targets,), or (targets, regions)

    @property
    def rate(self) -> float:
        """Steps a second."""
        return self.step / max(self.seconds, 1e-9)

    @property
    def left(self) -> float:
        """Seconds, if every step is taken."""
        return (self.steps - self.step) / self.rate


class Meanwhile(NamedTuple):
    """A fit's ``progress``, and what to begin once the first step is taken: from then on the kernels compute.

    Attributes
    ----------
    progress : as `fit` takes it
    begin : called once; it returns at once
    """

    progress: Any
    begin: Callable[[], Any]

    def beginning(self, show: Callable[[Any], Any] | None) -> Callable[[Any], Any]:
        """``show``, which may be ``None``, begun with the first step that it is told of."""
        waiting = [self.begin]

        def shown(report: Any) -> Any:
            while waiting:
                waiting.pop()()
            return show(report) if show else False

        return shown


class Plan(NamedTuple):
    """How far to descend.

    Attributes
    ----------
    optimiser : of optax, or `LEVENBERG_MARQUARDT`
    division : of the lanes
    steps : at most
    clip : the largest norm of one lane's gradient
    patience, tolerance : stop when in this many steps no target's error has fallen by this fraction
    prune : after every so many steps, the worse half of the starts is dropped
    """

    optimiser: Any
    division: Division
    steps: int
    clip: float = 0.1
    patience: int = 40
    tolerance: float = 0.005
    prune: int = 0

    @property
    def least_squares(self) -> bool:
        return self.optimiser == LEVENBERG_MARQUARDT


def descend(
    problem: Problem, plan: Plan, state: State, history: list, key, before: int = 0, show=None, save=None, part=None
):
    """Step until the steps are used up or no target's error falls; returns the state, and appends to ``history``.

    Parameters
    ----------
    history : the errors of each step so far, ``(n, starts)``, NaN where a lane diverged or was dropped
    before : steps of the history that do not count as steps of this descent
    show : a function of `Progress` that returns whether to stop
    save : a function of the state, the history and the part of a step, called after each chunk of targets
    part : of an interrupted step, what was evaluated of its first targets
    """
    keys, began = problem.keys(key), time.perf_counter()
    starts = history[0].shape[1] if history else state.alive.shape[1]
    for step in range(len(history) - before + 1, plan.steps + 1):
        if _has_settled(history[before:], plan):
            break
        keep = save and functools.partial(save, state, history)
        found, part = evaluated(problem, plan, state.z, keys, part, keep), None
        if plan.least_squares:
            state = lm_step(problem, state, found)
        else:
            state = gradient_step(problem, plan.optimiser, state, found, plan.clip)
        row = np.full((len(state.alive), starts), np.nan)
        np.put_along_axis(row, np.asarray(state.alive), problem.comparison.measure(found.error), 1)
        history.append(row)
        if plan.prune and step % plan.prune == 0:
            state = pruned(problem, state)
        if save:
            save(state, history)
        best = _lowest(history)[-1]
        seconds = time.perf_counter() - began
        if show and show(Progress(step, plan.steps, row, best, seconds, _best_values(problem, state))):
            break
    return state


def evaluated(problem: Problem, plan: Plan, z, keys, part=None, save=None) -> Any:
    """The `Gradient` or the `Normal` equations of all lanes, chunk by chunk.

    Parameters
    ----------
    part : that of the first targets, if they are done
    save : a function of such a part, called after each chunk but the last
    """
    function, apart = normal_equations_at if plan.least_squares else gradients_at, problem.apart
    each, parts = problem.spread(z), [] if part is None else [part]
    for rows in plan.division.chunks(0 if part is None else len(part.error)):
        found = plan.division.call(function, apart, rows.of(each), keys, rows.of(problem.comparison.data))
        # Waiting here can be interrupted; computing with what is not ready may not.
        parts.append(rows.without_repeats(jax.block_until_ready(found)))
        if len(parts) > 1:
            parts = [jax.tree.map(lambda *x: np.concatenate(x), *parts)]
        if save and rows.stop < plan.division.count:
            save(parts[0])
    if apart is problem:
        return parts[0]
    # Of all targets at once, so that sums over them do not depend on the chunks.
    if plan.least_squares:
        return pooled_normal_equations(problem, z, parts[0], int(np.max(parts[0].count)))
    return pooled_gradient(problem, z, parts[0])


def _best_values(problem: Problem, state: State) -> dict[str, Any]:
    """The values of the best start of each target so far. On the host: so small a program would be compiled anew."""
    score = np.asarray(problem.score(state.best))
    targets, best = np.arange(len(score)), score.argmin(1)
    values = {}
    for free in problem.frees:
        z = np.asarray(state.best_z[free.name], float)
        z = np.broadcast_to(z, (len(score), *z.shape[1:]))[targets, best]
        values[free.name] = units.attach(free.at(1.0 / (1.0 + np.exp(-z))), free.unit)
    return values


def trace(problem: Problem, plan: Plan, z, key) -> None:
    """Trace and lower the programs of `descend` from z of this shape, which then only compiles them."""
    rows = next(plan.division.chunks())
    function = normal_equations_at if plan.least_squares else gradients_at
    keys, data = problem.keys(key), rows.of(problem.comparison.data)
    plan.division.lower(function, problem.apart, rows.of(problem.spread(z)), keys, data)


def _lowest(history) -> np.ndarray:
    """The lowest error of each target up to each step."""
    rows = np.stack(history)
    return np.fmin.accumulate(np.fmin.reduce(rows, -1), 0)


def _has_settled(history, plan: Plan) -> bool:
    if len(history) <= plan.patience:
        return False
    lowest = _lowest(history)
    before, now = lowest[-1 - plan.patience], lowest[-1]
    return not np.any(now < before - plan.tolerance * np.abs(before))


def pruned(problem: Problem, state: State) -> State:
    """The better half of the starts of each target."""
    starts = state.alive.shape[1]
    if starts == 1:
        return state
    order = np.argsort(np.asarray(problem.score(state.best)), axis=1, kind="stable")
    better = np.sort(order[:, : -(-starts // 2)], axis=1)

    def take(leaf):
        if np.ndim(leaf) < 2 or leaf.shape[1] != starts:
            return leaf
        index = better[: leaf.shape[0]].reshape(leaf.shape[0], -1, *(1,) * (leaf.ndim - 2))
        return jnp.take_along_axis(leaf, jnp.asarray(index), 1)

    z, moments, best_z, best = (jax.tree.map(take, part) for part in state[:4])
    return State(z, moments, best_z, best, state.first, take(state.alive))


#: Columns of a terminal that has room for a bar beside the numbers.
_WIDE = 80


@contextlib.contextmanager
def shown(progress, bar: Callable[[], contextlib.AbstractContextManager[Callable]]) -> Iterator[Callable | None]:
    """A function that shows a report and returns whether to stop; ``None`` without ``progress``, and for True a bar."""
    if isinstance(progress, Meanwhile):
        with shown(progress.progress, bar) as show:
            yield progress.beginning(show)
    elif not progress:
        yield None
    elif callable(progress):
        yield progress
    else:
        with bar() as show:
            yield show


def progress_bar(progress, steps: int) -> contextlib.AbstractContextManager[Callable[[Progress], Any] | None]:
    """A function that shows one `Progress` and returns whether to stop; ``None`` without ``progress``."""
    return shown(progress, lambda: _bar(steps))


@contextlib.contextmanager
def _bar(steps: int) -> Iterator[Callable[[Progress], Any]]:
    needs("rich")
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    if console.is_jupyter:
        yield _notebook_line(steps)
        return
    columns: list[Any] = [
        TextColumn("{task.description}"),
        MofNCompleteColumn(),
        TextColumn("rms {task.fields[rms]}"),
    ]
    if console.width >= _WIDE:
        columns.insert(1, BarColumn())
        columns += [TextColumn("{task.fields[rate]} steps/s"), TimeElapsedColumn()]
    with Bar(*columns, TextColumn("left"), TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("compiling", total=steps, rms="...", rate="...")

        def show(report: Progress) -> bool:
            rms, rate = f"{np.median(report.best):.3f}", f"{report.rate:.3g}"
            bar.update(task, description="fitting", completed=report.step, rms=rms, rate=rate)
            return False

        yield show


def _notebook_line(steps: int):
    """As `progress_bar`, in a notebook: rich's bar there needs ipywidgets, and shows nothing without."""
    line = display.NotebookLine(steps)
    line(0, f"fitting: step 1 of {steps}, whose programs are compiled first")

    def show(report: Progress) -> bool:
        said = f"rms {np.median(report.best):.3f}, {report.rate:.3g} steps/s, {report.seconds:.0f} s"
        line(report.step, f"fitting: step {report.step} of {steps}, {said}, about {report.left:.0f} s left")
        return False

    return show
