"""What a fit minimises: free parameters, what is known of them, and the error as a function of them.

The lanes of the one batch are (target, start, realisation). Lanes never mix, but for parameters that targets share, so
the gradient of the summed error is every lane's own, and one step moves all of them. A free quantity is a smooth map
of a free variable z, ``(targets, starts)``, with one target where all share it, and a last axis of regions where each
region of a network has its own. The noise is fixed during a fit: the same realisations for every lane.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np

from .. import _context, dispatch, identity, routing, units
from ..arguments import PerLane
from ..equations import Key, key_of
from ..network import Network
from ..sensitivity import sensitivities
from ..simulation import explain, simulate
from .targets import Comparison

#: Folded into the key for the noise that only the final report uses.
_UNSEEN = 1_000_003
#: Repetitions of the fit's own length on which it is reported.
_CHECKS = 4


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
        return logit(np.clip(self.position(np.clip(value, self.low, self.high)), least, 1 - least))


def logit(position):
    return np.log(position / (1 - position))


def away_from_bounds(position):
    """z of places that nobody asked for, where a gradient is not yet flat."""
    return logit(np.clip(position, 0.01, 0.99))


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

    @classmethod
    def of_saved(cls, saved: Mapping[str, Any]) -> Pooling:
        """What a saved fit holds of it."""
        priors, group = (tuple(map(tuple, saved[name])) for name in ("priors", "group"))
        return cls(priors, group, tuple(saved["shared"]), tuple(saved["regional"]))

    @property
    def bind(self) -> bool:
        """Whether a start is one, for all targets together."""
        return bool(self.shared or self.group)


NO_POOLING = Pooling()


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
    pooling: Pooling = NO_POOLING

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
        values = routing.quantities(self.model, self.inputs, self.noise)
        fixed = {name: value for name, (_, value) in values.items() if name not in free}
        driven = {name: x for name, x in self.inputs.items() if name not in free}
        shaken = {name: x for name, x in self.noise.items() if routing.NOISE + name not in free}
        network = None
        if isinstance(self.model, Network):
            network = self.model.link, self.model.delays, self.model.connections()
        return key_of(
            type(self.mass), network, fixed, driven, shaken, self.frees, self.pooling, self.realisations, self.record,
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
            for name, (unit, value) in routing.quantities(self.model, self.inputs, self.noise).items()
            if name not in free
        }
        if isinstance(self.model, Network):
            delays = np.zeros(0) if self.model.delays is None else self.model.delays
            fixed |= {"link": list(self.model.link), "delays": fingerprint(delays)}
            fixed |= {"weights": fingerprint(self.model.connections())}
        pooling = {"priors": self.pooling.priors, "group": self.pooling.group, "shared": self.pooling.shared}
        pooling |= {"regional": self.pooling.regional}
        return {
            **{name: self.steps(name) * self.dt for name in ("duration", "transient")},
            "dt": self.dt,
            **{name: self.options[name] for name in ("every", "scheme")},
            "model": type(self.mass).__name__,
            "fixed": fixed,
            "realisations": self.realisations,
            "ties": json.loads(json.dumps(pooling)),
            **self.comparison.settings,
        }

    @property
    def dt(self) -> float:
        return units.concrete(units.strip(self.options["dt"], u.second, "dt"), "dt")

    def steps(self, name: str) -> int:
        return 0 if self.options[name] is None else units.steps_of(self.options[name], self.dt, name)

    def put(self, values) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        """Model, inputs and noise with the free values put in."""
        values = {f.name: units.attach(values[f.name], f.unit) for f in self.frees}
        return routing.put(self.model, self.inputs, self.noise, values)

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
        moved = [f for f in self.frees if f.name not in self.pooling.frozen]
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
        for name, centre, width in self.pooling.priors:
            found.append((name, (frees[name].value(z[name]) - centre) / width, frees[name].slope(z[name]) / width))
        for name, width in self.pooling.group:
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
            total = total + jnp.broadcast_to(square, lanes) / (lanes[0] if name in self.pooling.shared else 1)
        return total * (self.comparison.sigma**2 / count)

    def score(self, error):
        """What decides for each lane: its own error, or where targets are tied that of all of them together."""
        return jnp.broadcast_to(error.mean(0, keepdims=True), error.shape) if self.pooling.bind else error

    def keys(self, key, check: int | None = None):
        """One key a realisation, of a network one a region of each; with ``check``, of noise that no fit sees."""
        shape = (self.realisations,) if self.regions is None else (self.realisations, self.regions)
        return jax.random.split(key if check is None else jax.random.fold_in(key, _UNSEEN + check), shape)

    def unseen(self, z, key):
        """Predictions on noise that no fit sees, or the same again where there is none."""
        noisy = self.noise or any(f.name.startswith(routing.NOISE) for f in self.frees)
        checks = range(_CHECKS) if noisy else [None]
        found = jax.block_until_ready([predict(self, z, self.keys(key, check)) for check in checks])
        return sum(found[1:], found[0]) / len(found)


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
