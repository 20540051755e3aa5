"""The descent of a fit: free parameters, the error as a function of them, and the steps that lower it.

The lanes of the one batch are (target, start, realisation). Lanes never mix, but for parameters that targets share, so
the gradient of the summed error is every lane's own, and one step moves all of them. A free quantity is a smooth map
of a free variable z, ``(targets, starts)``, with one target where all share it, and a last axis of regions where each
region of a network has its own. The noise is fixed during a fit: the same realisations for every lane.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np

from . import _context, dispatch, identity, units
from .arguments import PerLane
from .equations import Key, key_of
from .extras import needs
from .network import Network
from .notices import warn
from .sensitivity import sensitivities
from .simulate import explain, simulate
from .targets import Comparison, plain

#: Adam's step in z, where the width between the bounds is about 6.
LEARNING_RATE = 0.05
#: Folded into the key for the noise that only the final report uses.
_UNSEEN = 1_000_003
#: Repetitions of the fit's own length on which it is reported.
_CHECKS = 4
#: "noise.E_inp" is the intensity of the noise on the input E_inp, "coupling.k" the strength of a network's coupling.
NOISE, COUPLING = "noise.", "coupling."
#: Of an optimiser that is not one of optax.
LEVENBERG_MARQUARDT = "levenberg_marquardt"
#: Marquardt's damping at first, and its bounds.
_DAMPING, _DAMPINGS = 1e-2, (1e-6, 1e6)
#: The farthest that z goes, and the longest step of Levenberg and Marquardt.
_FAR, _STRIDE = 6.0, 1.5


@dataclasses.dataclass(frozen=True)
class Free:
    """A free quantity and its bounds, plain numbers in ``unit``.

    Between positive bounds the map from z is geometric, ``low (high / low)**s``, else linear, with
    ``s = 1 / (1 + exp(-z))``.
    """

    name: str
    low: float
    high: float
    unit: Any

    @property
    def geometric(self) -> bool:
        return self.low > 0

    def value(self, z):
        s = jax.nn.sigmoid(z)
        return self.low * (self.high / self.low) ** s if self.geometric else self.low + (self.high - self.low) * s

    def slope(self, z):
        """The derivative of `value`."""
        return jax.jvp(self.value, (z,), (jnp.ones_like(z),))[1]

    def position(self, value):
        """Where between the bounds a value lies, 0 to 1."""
        if self.geometric:
            return np.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def outside(self, value) -> np.ndarray:
        """Whether a value is outside the bounds; what float32 or a sigmoid makes of a bound is the bound."""
        value, slack = np.asarray(value, float), 1e-6 * max(abs(self.low), abs(self.high))
        return ~((value >= self.low - slack) & (value <= self.high + slack))

    def told(self, value: float) -> str:
        """What is said of a value outside the bounds."""
        unit = "" if self.unit is None or self.unit.is_unitless else f" {self.unit}"
        return f"{self.name} = {value:g}{unit}, outside of its bounds {self.low:g} to {self.high:g}{unit}"

    def z(self, value, argument: str) -> np.ndarray:
        """The free variable of a value, of which `value` makes it again to float precision.

        Raises
        ------
        ValueError : a value outside the bounds, which is another model than any that the fit could reach
        """
        value = np.asarray(value, float)
        outside = self.outside(value)
        if outside.any():
            raise ValueError(
                f"{argument} got {self.told(value[outside].flat[0])}: take wider bounds in 'free', or another start"
            )
        least = np.finfo(jnp.result_type(float)).eps
        return _logit(np.clip(self.position(np.clip(value, self.low, self.high)), least, 1 - least))


def _logit(position):
    return np.log(position / (1 - position))


def _away_from_bounds(position):
    """z of places that nobody asked for, where a gradient is not yet flat."""
    return _logit(np.clip(position, 0.01, 0.99))


class Pooling(NamedTuple):
    """What is known of the free quantities beside their bounds.

    Attributes
    ----------
    priors : (name, centre, width) of a Gaussian, plain numbers in the quantity's unit
    group : (name, width) of the targets about their own mean
    shared : names of one value for all targets
    regional : names of one value for each region of a network
    frozen : names that stay where they start
    """

    priors: tuple[tuple[str, float, float], ...] = ()
    group: tuple[tuple[str, float], ...] = ()
    shared: tuple[str, ...] = ()
    regional: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()

    @property
    def bind(self) -> bool:
        """Whether a start is one, for all targets together."""
        return bool(self.shared or self.group)


_FREE = Pooling()


def quantities(model, inputs, noise) -> dict[str, tuple[Any, Any]]:
    """The unit and the value of whatever can be free."""
    coupled = {}
    if isinstance(model, Network):
        unit_of = model.parameter_units()
        coupled = {COUPLING + name: (unit_of[name], value) for name, value in model.parameters.items()}
        model = model.model
    fields = {name: (unit, getattr(model, name)) for name, unit in model.parameter_units().items()}
    driven = {name: (units.unit_of(value), inputs.get(name, value)) for name, value in model.inputs.items()}
    shaken = {}
    for name, (unit, _) in driven.items():
        root = unit * u.second**0.5
        shaken[NOISE + name] = (root, noise.get(name, 0.0 * root))
    return fields | driven | shaken | coupled


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """What a fit minimises: from z to predictions and their errors."""

    model: Any
    inputs: dict[str, Any]
    noise: dict[str, Any]
    frees: tuple[Free, ...]
    comparison: Comparison
    realisations: int
    record: Any
    options: dict[str, Any]
    ties: Pooling = _FREE

    @property
    def regions(self) -> int | None:
        return self.model.regions if isinstance(self.model, Network) else None

    @property
    def mass(self) -> Any:
        """The model of one region, or of all."""
        return self.model.model if isinstance(self.model, Network) else self.model

    @functools.cached_property
    def identity(self) -> Key:
        """The key of all that compiled programs read: everything but the target's values, the starts and the key."""
        free = {f.name for f in self.frees}
        values = quantities(self.model, self.inputs, self.noise)
        fixed = {name: value for name, (_, value) in values.items() if name not in free}
        driven = {name: x for name, x in self.inputs.items() if name not in free}
        shaken = {name: x for name, x in self.noise.items() if NOISE + name not in free}
        network = None
        if isinstance(self.model, Network):
            network = self.model.link, self.model.delays, self.model.connections()
        return key_of(
            type(self.mass), network, fixed, driven, shaken, self.frees, self.ties, self.realisations, self.record,
            self.options, self.comparison.read(), jax.config.jax_enable_x64,  # pyright: ignore
            dispatch.platform(), _context.INTERPRETED.get(), _context.ABSENT.get(),
        )  # fmt: skip

    # Programs are compiled once for problems that differ in the target's values and the key only.
    def __hash__(self) -> int:
        return hash(self.identity)

    def __eq__(self, other) -> bool:
        return isinstance(other, Problem) and self.identity == other.identity

    def settings(self) -> dict[str, Any]:
        """Everything that a resumed fit must share, ready for JSON."""
        free = {f.name for f in self.frees}
        fixed = {
            name: fingerprint(units.strip(value, unit, name))
            for name, (unit, value) in quantities(self.model, self.inputs, self.noise).items()
            if name not in free
        }
        if isinstance(self.model, Network):
            delays = np.zeros(0) if self.model.delays is None else self.model.delays
            fixed |= {"link": list(self.model.link), "delays": fingerprint(delays)}
            fixed |= {"weights": fingerprint(self.model.connections())}
        ties = {"priors": self.ties.priors, "group": self.ties.group, "shared": self.ties.shared}
        ties |= {"regional": self.ties.regional}
        return {
            **{name: self.steps(name) * self.dt for name in ("duration", "transient")},
            "dt": self.dt,
            **{name: self.options[name] for name in ("every", "scheme")},
            "model": type(self.mass).__name__,
            "fixed": fixed,
            "realisations": self.realisations,
            "ties": json.loads(json.dumps(ties)),
            **self.comparison.settings,
        }

    @property
    def dt(self) -> float:
        return units.concrete(units.strip(self.options["dt"], u.second, "dt"), "dt")

    def steps(self, name: str) -> int:
        return 0 if self.options[name] is None else units.steps_of(self.options[name], self.dt, name)

    def put(self, values) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        """Model, inputs and noise with the free values put in."""
        fields, coupled, inputs, noise = {}, {}, dict(self.inputs), dict(self.noise)
        for f in self.frees:
            value = units.attach(values[f.name], f.unit)
            if f.name.startswith(NOISE):
                noise[f.name.removeprefix(NOISE)] = value
            elif f.name.startswith(COUPLING):
                coupled[f.name.removeprefix(COUPLING)] = value
            elif f.name in self.mass.inputs:
                inputs[f.name] = value
            else:
                fields[f.name] = value
        mass = dataclasses.replace(self.mass, **fields)
        if isinstance(self.model, Network):
            return self.model.replace(model=mass, **coupled), inputs, noise
        return mass, inputs, noise

    def run(self, z, keys, call, **more):
        """``call`` (simulate, explain or sensitivities) on the lanes (targets, starts, realisations)."""
        lanes = (*np.broadcast_shapes(*(x.shape[:2] for x in z.values())), self.realisations)
        values = {f.name: self._spread(f.value(z[f.name]), lanes) for f in self.frees}
        model, inputs, noise = self.put(values)
        inputs = {n: PerLane(x) if n in values else x for n, x in inputs.items()}
        keys = jnp.broadcast_to(keys, (*lanes, *keys.shape[1:])) if noise else None
        return call(model, inputs=inputs, noise=noise or None, key=keys, record=self.record, **self.options, **more)

    def _spread(self, values, lanes: tuple[int, ...]):
        """Values of z's shape for every lane, with an axis for regions where there are any."""
        own = values.shape[2:]
        values = jnp.broadcast_to(values[:, :, None], (*lanes, *own))
        return values[..., None] if self.regions and not own else values

    def plan(self, key):
        """Which implementation the simulations of this fit run on, and why; every argument is checked by it."""
        return self.run({f.name: jnp.zeros((self.comparison.count, 1)) for f in self.frees}, self.keys(key), explain)

    def program(self, starts: int, key) -> dict[str, str]:
        """What tells the programs of this fit from those of others, by name, ready for JSON."""
        z = {f.name: jnp.zeros((self.comparison.count, starts)) for f in self.frees}
        told = identity.versions() | self.run(z, self.keys(key), identity.of_call)
        if callable(self.comparison.target):
            seen = jax.eval_shape(lambda z, keys: self.run(z, keys, simulate), z, self.keys(key))
            told["target"] = identity.of_function(self.comparison.predict, seen)
        return told

    def predict(self, z, keys):
        return self.comparison.predict(self.run(z, keys, simulate))

    def linearised(self, z, keys, data):
        """Residuals (n, starts, M), and their derivatives by each z that is not frozen, (n, starts, P, M)."""
        moved = [f for f in self.frees if f.name not in self.ties.frozen]
        result, slopes = self.run(z, keys, sensitivities, wrt=[f.name for f in moved])
        unit_of = {part: {n: u.get_unit(x) for n, x in getattr(result, part).items()} for part in ("records", "final")}

        def of_plain(records, final):
            put = lambda part, values: {n: units.attach(x, unit_of[part][n]) for n, x in values.items()}  # noqa: E731
            seen = dataclasses.replace(result, records=put("records", records), final=put("final", final))
            return self.comparison.residuals(self.comparison.predict(seen), data)[0]

        bare = lambda found, like: {n: units.strip(found[n], u.get_unit(x), n) for n, x in like.items()}  # noqa: E731
        residuals, push = jax.linearize(of_plain, *(bare(p, p) for p in (result.records, result.final)))
        wide = lambda x, shape, unit: units.attach(jnp.broadcast_to(x, shape), unit)  # noqa: E731
        columns = []
        for f in moved:
            lanes = (*np.broadcast_shapes(*(x.shape for x in z.values())), self.realisations)
            by_z = self._spread(f.slope(z[f.name]), lanes)
            tangents = [
                bare({n: x * wide(by_z, x.shape, f.unit) for n, x in getattr(slopes[f.name], part).items()},
                     getattr(result, part))
                for part in ("records", "final")
            ]  # fmt: skip
            columns.append(push(*tangents))
        return residuals, jnp.stack(columns, 2)

    def penalties(self, z):
        """What priors and the group's spread say: name to a residual ``(n or 1, starts, ...)``, and its slope by z.

        The group's mean is solved for: at its best, with nothing known of it, it is the mean of the targets, and
        does not add to the slope.
        """
        frees = {f.name: f for f in self.frees}
        found = []
        for name, centre, width in self.ties.priors:
            found.append((name, (frees[name].value(z[name]) - centre) / width, frees[name].slope(z[name]) / width))
        for name, width in self.ties.group:
            value = frees[name].value(z[name])
            apart = value - jax.lax.stop_gradient(value.mean(0, keepdims=True))
            found.append((name, apart / width, frees[name].slope(z[name]) / width))
        return found

    def penalty(self, z, count: int):
        """The sum of squares of the penalties of each lane, as if each were one residual of ``count``."""
        lanes = np.broadcast_shapes(*(x.shape[:2] for x in z.values()))
        total = jnp.zeros(lanes)
        for name, residual, _ in self.penalties(z):
            square = residual**2 if residual.ndim == 2 else jnp.sum(residual**2, -1)
            # What all targets share is known once, not once for each of them.
            total = total + jnp.broadcast_to(square, lanes) / (lanes[0] if name in self.ties.shared else 1)
        return total * (self.comparison.sigma**2 / count)

    def score(self, error):
        """What decides for each lane: its own error, or where targets are tied that of all of them together."""
        return jnp.broadcast_to(error.mean(0, keepdims=True), error.shape) if self.ties.bind else error

    def keys(self, key, check: int | None = None):
        """One key a realisation, of a network one a region of each; with ``check``, of noise that no fit sees."""
        shape = (self.realisations,) if self.regions is None else (self.realisations, self.regions)
        return jax.random.split(key if check is None else jax.random.fold_in(key, _UNSEEN + check), shape)

    def unseen(self, z, key):
        """Predictions on noise that no fit sees, or the same again where there is none."""
        noisy = self.noise or any(f.name.startswith(NOISE) for f in self.frees)
        checks = range(_CHECKS) if noisy else [None]
        found = jax.block_until_ready([predict(self, z, self.keys(key, check)) for check in checks])
        return sum(found[1:], found[0]) / len(found)

    def nearest(self, z, starts: int, key) -> np.ndarray:
        """Of candidates (m,), which ``starts`` each target is nearest to; the first candidate always stays."""
        n = self.comparison.count
        blocks = {name: row.reshape(-1, n, starts) for name, row in z.items()}
        count = len(blocks[self.frees[0].name])
        parts = [predict(self, {name: b[i] for name, b in blocks.items()}, self.keys(key)) for i in range(count)]
        found = jnp.stack(jax.block_until_ready(parts))
        found = found.reshape(1, -1, *found.shape[3:])
        error = np.array(self.score(measured(self, found, self.comparison.data)[0]))
        error[:, 0] = -np.inf
        return np.argsort(error, axis=1, kind="stable")[:, :starts]


def fingerprint(value) -> Any:
    """An array as nested lists, or where it is long as what tells it from others."""
    array = np.asarray(value)
    if array.size <= 64:
        return array.tolist()
    return f"{array.shape} {hashlib.sha256(np.ascontiguousarray(array, float).tobytes()).hexdigest()[:16]}"


predict = jax.jit(Problem.predict, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def measured(problem: Problem, prediction, data):
    """The error of each lane, and what was solved for."""
    return problem.comparison.error(prediction, data)


# --- the steps ---


class State(NamedTuple):
    """What an optimiser carries and a saved fit keeps.

    Attributes
    ----------
    z : where the next step is taken, name to ``(n or 1, starts, ...)``
    moments : the optimiser's own
    best_z, best : the best place so far, and its error with what priors say, ``(n, starts)``
    first : where the first start of each target began
    alive : which of the starts these are, ``(n, starts)``
    """

    z: dict[str, jax.Array]
    moments: Any
    best_z: dict[str, jax.Array]
    best: jax.Array
    first: dict[str, jax.Array]
    alive: jax.Array


class Damped(NamedTuple):
    """What Levenberg and Marquardt carry: the damping, and the normal equations at the best place.

    Attributes
    ----------
    damping : ``(n, starts)``
    normal, slope : ``(n, starts, P, P)`` and ``(n, starts, P)``, means over the residuals
    """

    damping: jax.Array
    normal: jax.Array
    slope: jax.Array


def begin(problem: Problem, z, optimiser) -> State:
    n, starts = problem.comparison.count, z[problem.frees[0].name].shape[1]
    if optimiser == LEVENBERG_MARQUARDT:
        p = len(problem.frees) - len(problem.ties.frozen)
        full = functools.partial(jnp.full, dtype=z[problem.frees[0].name].dtype)
        moments = Damped(full((n, starts), _DAMPING), full((n, starts, p, p), 0.0), full((n, starts, p), 0.0))
    else:
        moments = optimiser.init(z)
    alive = jnp.broadcast_to(jnp.arange(starts), (n, starts))
    first = {name: x[:, :1] for name, x in z.items()}
    return State(z, moments, z, jnp.full((n, starts), jnp.inf), first, alive)


@functools.cache
def adam():
    optax: Any = needs("optax")
    return optax.adam(LEARNING_RATE, b2=0.99)


def optimiser_identity(problem: Problem, optimiser) -> str:
    """What tells the steps of an optimiser from those of others, their sizes included."""
    if optimiser == LEVENBERG_MARQUARDT:
        return LEVENBERG_MARQUARDT
    z = {f.name: jax.ShapeDtypeStruct((2, 3), jnp.result_type(float)) for f in problem.frees}
    with jax.numpy_dtype_promotion("standard"):
        return identity.of_function(optimiser.update, z, jax.eval_shape(optimiser.init, z), z)


def _flag(flags, like):
    """Flags of lanes as they choose between leaves of z."""
    flags = flags[: like.shape[0]]
    return jnp.broadcast_to(flags.reshape(*flags.shape, *(1,) * (like.ndim - 2)), like.shape)


def _chosen(flags, new, old):
    return {name: jnp.where(_flag(flags, x), x, old[name]) for name, x in new.items()}


@functools.partial(jax.jit, static_argnums=(0, 1))
def follow(problem: Problem, optimiser, state: State, keys, data, clip):
    """One step of every lane along its gradient, and the errors before it."""

    def objective(z):
        z = {name: jax.lax.stop_gradient(x) if name in problem.ties.frozen else x for name, x in z.items()}
        prediction = problem.predict(z, keys)
        error, _ = problem.comparison.error(prediction, data)
        count = math.prod(prediction.shape[2:])
        total = error + jnp.broadcast_to(problem.penalty(z, count).astype(error.dtype), error.shape)
        # Lanes do not mix: the gradient of the sum is each lane's own.
        return jnp.sum(total), (error, total)

    slopes, (error, total) = jax.grad(objective, has_aux=True)(state.z)
    better = problem.score(total) < problem.score(state.best)
    best_z = _chosen(better, state.z, state.best_z)
    # optax itself leans on promotion, which a user may have forbidden.
    with jax.numpy_dtype_promotion("standard"):
        updates, moments = optimiser.update(_clipped(slopes, clip), state.moments, state.z)
    z = {name: jnp.clip(value + updates[name], -_FAR, _FAR) for name, value in state.z.items()}
    # A lane whose simulation was not finite goes on from the best place it has been.
    z = _chosen(jnp.isfinite(problem.score(total)), z, best_z)
    return state._replace(z=z, moments=moments, best_z=best_z, best=jnp.where(better, total, state.best)), error


def _clipped(slopes, limit: float):
    """Each lane's gradient at most ``limit`` long, and nothing where it is not finite."""
    squares = [jnp.square(s) if s.ndim == 2 else jnp.sum(jnp.square(s), -1) for s in slopes.values()]
    length = jnp.sqrt(sum(squares[1:], squares[0]))
    usable = jnp.isfinite(length)
    shrink = jnp.where(usable, jnp.minimum(1.0, limit / jnp.maximum(length, 1e-30)), 0.0)
    found = {}
    for name, slope in slopes.items():
        least = shrink if len(slope) == len(shrink) else shrink.min(0, keepdims=True)
        least = jnp.broadcast_to(least.reshape(*least.shape, *(1,) * (slope.ndim - 2)), slope.shape)
        found[name] = jnp.where(least > 0, slope, 0.0) * least
    return found


@functools.partial(jax.jit, static_argnums=0)
def solve(problem: Problem, state: State, keys, data):
    """One step of Levenberg and Marquardt for every lane, and the errors before it.

    A place is kept where it is better than the best, with a third of the damping; otherwise the step is taken again
    from the best, shorter. Marquardt 1963, SIAM J. Appl. Math. 11:431.
    """
    error, total, normal, slope, _ = normal_equations(problem, state.z, keys, data)
    better = problem.score(total) < problem.score(state.best)
    kept = state.moments
    low, high = _DAMPINGS
    damping = jnp.clip(jnp.where(better, kept.damping / 3.0, kept.damping * 4.0), low, high)
    normal = jnp.where(better[..., None, None], normal, kept.normal)
    slope = jnp.where(better[..., None], slope, kept.slope)
    best_z = _chosen(better, state.z, state.best_z)
    step = _damped(problem, normal, slope, damping)
    z, p = dict(best_z), 0
    for f in problem.frees:
        if f.name in problem.ties.frozen:
            continue
        move = step[: len(z[f.name]), :, p]
        z[f.name] = jnp.clip(z[f.name] - jnp.clip(move, -_STRIDE, _STRIDE), -_FAR, _FAR)
        p += 1
    moments = Damped(damping, normal, slope)
    return state._replace(z=z, moments=moments, best_z=best_z, best=jnp.where(better, total, state.best)), error


class Normal(NamedTuple):
    """The normal equations of every lane, means over the ``count`` residuals.

    Attributes
    ----------
    error, total : ``(n, starts)``, of the data, and with what priors say
    normal, slope : ``(n, starts, P, P)`` and ``(n, starts, P)``, what priors say included
    """

    error: jax.Array
    total: jax.Array
    normal: jax.Array
    slope: jax.Array
    count: Any


def normal_equations(problem: Problem, z, keys, data) -> Normal:
    residuals, jacobian = problem.linearised(z, keys, data)
    count = residuals.shape[-1]
    error = jnp.mean(residuals**2, -1)
    error = jnp.where(jnp.isfinite(error), error, jnp.inf)
    normal = jnp.einsum("nspm,nsqm->nspq", jacobian, jacobian, precision="highest") / count
    slope = jnp.einsum("nspm,nsm->nsp", jacobian, residuals, precision="highest") / count
    moved = [f.name for f in problem.frees if f.name not in problem.ties.frozen]
    weight = problem.comparison.sigma**2 / count
    for name, apart, by_z in problem.penalties(z):
        if name not in moved:
            continue
        p, share = moved.index(name), len(error) if name in problem.ties.shared else 1
        normal = normal.at[:, :, p, p].add(jnp.broadcast_to(by_z**2 * weight / share, error.shape))
        slope = slope.at[:, :, p].add(jnp.broadcast_to(by_z * apart * weight / share, error.shape))
    finite = jnp.isfinite(slope).all(-1) & jnp.isfinite(error)
    total = jnp.where(finite, error + jnp.broadcast_to(problem.penalty(z, count), error.shape), jnp.inf)
    normal, slope = jnp.where(finite[..., None, None], normal, 0.0), jnp.where(finite[..., None], slope, 0.0)
    return Normal(error, total, normal, slope, count)


normal_equations_at = jax.jit(normal_equations, static_argnums=0)


def whole(problem: Problem, normal, slope):
    """The normal equations of each start with its targets' own and shared unknowns, and which unknown is whose.

    Returns
    -------
    normal, slope : ``(1, starts, D, D)`` and ``(1, starts, D)``
    place : ``(n, P)``, the unknown of each target and parameter
    """
    n, _, p, _ = normal.shape
    moved = [f.name for f in problem.frees if f.name not in problem.ties.frozen]
    shared = [i for i, name in enumerate(moved) if name in problem.ties.shared]
    own = [i for i in range(p) if i not in shared]
    place = np.zeros((n, p), int)
    place[:, own] = np.arange(n * len(own)).reshape(n, -1)
    place[:, shared] = n * len(own) + np.arange(len(shared))
    size = n * len(own) + len(shared)
    onto = jnp.asarray(np.eye(size)[place], normal.dtype)
    dense = jnp.einsum("nspq,npi,nqj->sij", normal, onto, onto, precision="highest")
    return dense[None], jnp.einsum("nsp,npi->si", slope, onto, precision="highest")[None], place


def _damped(problem: Problem, normal, slope, damping):
    """The solution of the damped normal equations, ``(n, starts, P)``."""
    place = None
    if problem.ties.shared:
        normal, slope, place = whole(problem, normal, slope)
        damping = damping[:1]
    diagonal = jnp.einsum("...ii->...i", normal)
    least = 1e-12 + 1e-6 * diagonal.max(-1, keepdims=True)
    added = damping[..., None] * jnp.maximum(diagonal, jnp.broadcast_to(least, diagonal.shape))
    eye = jnp.broadcast_to(jnp.eye(normal.shape[-1], dtype=normal.dtype), normal.shape)
    step = jnp.linalg.solve(normal + added[..., None] * eye, slope[..., None])[..., 0]
    step = jnp.where(jnp.isfinite(step), step, 0.0)
    return step if place is None else jnp.moveaxis(step[0][:, place], 1, 0)


# --- the descent ---


class Progress(NamedTuple):
    """What a ``progress`` callback is given after each step; it may return True to stop the fit."""

    step: int
    steps: int
    rms: np.ndarray  # (targets, starts), this step
    best: np.ndarray  # (targets,), lowest so far
    seconds: float = 0.0  # since the first step began

    @property
    def rate(self) -> float:
        """Steps a second."""
        return self.step / max(self.seconds, 1e-9)

    @property
    def left(self) -> float:
        """Seconds, if every step is taken."""
        return (self.steps - self.step) / self.rate


class Plan(NamedTuple):
    """How far to descend.

    Attributes
    ----------
    optimiser : of optax, or `LEVENBERG_MARQUARDT`
    steps : most of them
    clip : the largest norm of one lane's gradient
    patience, tolerance : stop when in this many steps no target's error has fallen by this fraction
    prune : after each so many steps, the worse half of the starts is left
    """

    optimiser: Any
    steps: int
    clip: float = 0.1
    patience: int = 40
    tolerance: float = 0.005
    prune: int = 0


def descend(problem: Problem, plan: Plan, state: State, history: list, key, begun: int = 0, show=None, keep=None):
    """Step until the steps are used up or no target gains; returns the state, and fills ``history``.

    Parameters
    ----------
    history : the errors of each step so far, ``(n, starts)``, NaN where a lane diverged or was left
    begun : the steps of the history that count as this descent's own
    show : a function of `Progress` that tells whether to stop
    keep : a function of the state and the history after each step
    """
    keys, began = problem.keys(key), time.perf_counter()
    starts = history[0].shape[1] if history else state.alive.shape[1]
    data = problem.comparison.data
    for step in range(len(history) - begun + 1, plan.steps + 1):
        if _settled(history[begun:], plan):
            break
        if plan.optimiser == LEVENBERG_MARQUARDT:
            state, error = solve(problem, state, keys, data)
        else:
            state, error = follow(problem, plan.optimiser, state, keys, data, plan.clip)
        # This wait can be interrupted; to compute with what is not ready cannot, where JAX does it at once.
        jax.block_until_ready(error)
        row = np.full((len(state.alive), starts), np.nan)
        np.put_along_axis(row, np.asarray(state.alive), problem.comparison.measure(error), 1)
        history.append(row)
        if plan.prune and step % plan.prune == 0:
            state = pruned(problem, state)
        if keep:
            keep(state, history)
        best = _lowest(history)[-1]
        if show and show(Progress(step, plan.steps, row, best, time.perf_counter() - began)):
            break
    return state


def _lowest(history) -> np.ndarray:
    """The lowest error of each target up to each step."""
    rows = np.stack(history)
    return np.fmin.accumulate(np.fmin.reduce(rows, -1), 0)


def _settled(history, plan: Plan) -> bool:
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
    kept = np.sort(order[:, : -(-starts // 2)], axis=1)

    def take(leaf):
        if np.ndim(leaf) < 2 or leaf.shape[1] != starts:
            return leaf
        index = kept[: leaf.shape[0]].reshape(leaf.shape[0], -1, *(1,) * (leaf.ndim - 2))
        return jnp.take_along_axis(leaf, jnp.asarray(index), 1)

    z, moments, best_z, best = (jax.tree.map(take, part) for part in state[:4])
    return State(z, moments, best_z, best, state.first, take(state.alive))


@contextlib.contextmanager
def shown(progress, steps: int):
    """A function that shows one `Progress` and tells whether to stop."""
    if not progress:
        yield None
    elif callable(progress):
        yield progress
    else:
        needs("rich")
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = [TextColumn("fitting"), BarColumn(), MofNCompleteColumn(), TextColumn("rms {task.fields[rms]}")]
        columns += [TextColumn("{task.fields[rate]} steps/s"), TimeElapsedColumn(), TextColumn("left")]
        with Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
            task = bar.add_task("fitting", total=steps, rms="...", rate="...")

            def show(report: Progress) -> bool:
                rms, rate = f"{np.median(report.best):.3f}", f"{report.rate:.3g}"
                bar.update(task, completed=report.step, rms=rms, rate=rate)
                return False

            yield show


def starts_from(problem: Problem, starts, screen: int, given: Mapping[str, Any], key) -> dict[str, jax.Array]:
    """z of every start of every target."""
    n, frees = problem.comparison.count, problem.frees
    if isinstance(starts, Mapping):
        return {f.name: _laid(problem, f.name, z) for f, z in zip(frees, _given_starts(problem, starts))}
    count = max(starts, math.ceil(screen / (n * starts)) * n * starts)
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel().tolist())
    # A Latin hypercube: each parameter takes every one of `count` equal slices once. The draws go by the order of the
    # names, so that the order in which a user lists them changes nothing.
    position = (
        rng.permuted(np.tile(np.arange(count), (len(frees), 1)), axis=1) + rng.random((len(frees), count))
    ) / count
    rows = _away_from_bounds(position)[np.argsort(np.argsort([f.name for f in frees]))]
    rows[:, 0] = [_z_of_model(f, given[f.name]) for f in frees]
    for f in frees:
        if f.outside(given[f.name]):
            warn(
                f"'model' got {f.told(given[f.name])}: start 0 begins at the nearer bound; 'initial_rms' is the model's"
            )
    z = {f.name: jnp.asarray(row) for f, row in zip(frees, rows)}
    keep = None if count == starts else problem.nearest(z, starts, key)
    spread = {name: jnp.broadcast_to(row, (n, starts)) if keep is None else row[keep] for name, row in z.items()}
    return {name: _laid(problem, name, x) for name, x in spread.items()}


def _z_of_model(free: Free, value: float) -> float:
    """z of the model's own value; where that is outside the bounds, of a place at the nearer one."""
    if free.outside(value):
        return float(_away_from_bounds(free.position(np.clip(value, free.low, free.high))))
    return float(free.z(value, "'model'"))


def initial(problem: Problem, first, given: Mapping[str, float]) -> tuple[Problem, dict[str, jax.Array]]:
    """Where start 0 is measured: the model as it was given, though a bound moved its start; else ``first``."""

    def z_of(problem: Problem):
        shape = problem.comparison.count, 1
        row = {f.name: jnp.broadcast_to(jnp.asarray(_z_of_model(f, given[f.name])), shape) for f in problem.frees}
        return {name: _laid(problem, name, x) for name, x in row.items()}

    moved = any(f.outside(given[f.name]) for f in problem.frees)
    if not moved or not all(np.allclose(first[name], x) for name, x in z_of(problem).items()):
        return problem, first
    wider = (
        dataclasses.replace(f, low=min(f.low, given[f.name]), high=max(f.high, given[f.name])) for f in problem.frees
    )
    whole = dataclasses.replace(problem, frees=tuple(wider))
    return whole, z_of(whole)


def _laid(problem: Problem, name: str, z):
    """z (n, starts) as a leaf: one row where it is shared, an axis for regions where they have their own."""
    z = z[:1] if name in problem.ties.shared else z
    return jnp.repeat(z[..., None], problem.regions or 1, -1) if name in problem.ties.regional else z


def _given_starts(problem: Problem, starts) -> list[jax.Array]:
    names = [f.name for f in problem.frees]
    if set(starts) != set(names):
        raise ValueError(
            f"'starts' got {', '.join(map(str, starts)) or 'none'}, but takes values of {', '.join(names)}"
        )
    values = {f.name: np.atleast_1d(plain(starts[f.name], f.unit, f"starts: {f.name!r}")) for f in problem.frees}
    n = problem.comparison.count
    try:
        shape = np.broadcast_shapes(*(value.shape for value in values.values()), (n, 1))
    except ValueError:
        shape = ()
    if len(shape) != 2 or shape[0] != n:
        shapes = {name: value.shape for name, value in values.items()}
        raise ValueError(f"'starts' got shapes {shapes}, but takes (starts,) or ({n}, starts) of each")
    return [jnp.broadcast_to(jnp.asarray(f.z(values[f.name], "'starts'")), shape) for f in problem.frees]
