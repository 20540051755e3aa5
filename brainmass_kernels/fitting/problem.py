"""What a fit minimises: the error as a function of free parameters, and what is known of these.

The lanes of the one batch are (target, start, realisation). Lanes do not mix, except through shared parameters. So the
gradient of the summed error contains the gradient of each lane, and one step moves all of them. A free quantity is a
smooth map of a free variable z, ``(targets, starts)``: the first axis is 1 where all targets share it, and a last axis
of regions follows where each region has a value. The noise is fixed during a fit: the same realisations for every lane.
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

from .. import _context, dispatch, identity, routing, sparsity, stimuli, systems, units
from .._jax import is_traced
from ..arguments import per_lane
from ..coupling import Coupling
from ..dispatch import Plan
from ..equations import Key, key_of
from ..groups import Groups
from ..linear import numbers
from ..models.base import Model
from ..network import Network, parts_of
from ..sensitivity import sensitivities
from ..simulation import explain, simulate
from .targets import LINEAR, Comparison

#: Folded into the key for the noise that only the final report uses.
_UNSEEN = 1_000_003
#: Simulations with such noise, each with the realisations of the fit.
_CHECKS = 4
#: Derivatives that are computed at once where they are not carried in the loop.
DIRECTIONS = 8


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
        return self.at(jax.nn.sigmoid(z))

    def at(self, s):
        """The value at a relative position, the inverse of `position`."""
        return self.low * (self.high / self.low) ** s if self.geometric else self.low + (self.high - self.low) * s

    def slope(self, z):
        """The derivative of `value`."""
        return jax.jvp(self.value, (z,), (jnp.ones_like(z),))[1]

    def position(self, value):
        """The relative position of a value between the bounds, 0 to 1."""
        if self.geometric:
            return np.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def outside(self, value) -> np.ndarray:
        """Whether a value is outside the bounds, but for rounding in float32 or in a sigmoid."""
        value, slack = np.asarray(value, float), 1e-6 * max(abs(self.low), abs(self.high))
        return ~((value >= self.low - slack) & (value <= self.high + slack))

    def outside_in_words(self, value: float) -> str:
        """A value outside the bounds, for a message."""
        unit = "" if self.unit is None or self.unit.is_unitless else f" {self.unit}"
        return f"{self.name} = {value:g}{unit}, outside of its bounds {self.low:g} to {self.high:g}{unit}"

    def z(self, value, argument: str) -> np.ndarray:
        """The free variable of a value, the inverse of `value` to float precision.

        Raises
        ------
        ValueError : a value outside the bounds
        """
        value = np.asarray(value, float)
        outside = self.outside(value)
        if outside.any():
            raise ValueError(
                f"{argument} got {self.outside_in_words(value[outside].flat[0])}: take wider bounds in 'free', or "
                "another start"
            )
        least = np.finfo(jnp.result_type(float)).eps
        return logit(np.clip(self.position(np.clip(value, self.low, self.high)), least, 1 - least))


def logit(position):
    return np.log(position / (1 - position))


def away_from_bounds(position):
    """z of a position that may be moved inwards, where gradients are not flat."""
    return logit(np.clip(position, 0.01, 0.99))


class Pooling(NamedTuple):
    """What is known of the free quantities beside their bounds.

    Attributes
    ----------
    priors : (name, centre, width) of a Gaussian, plain numbers in the quantity's unit
    group : (name, width) of the targets' values about their mean
    shared : names with one value for all targets
    regional : names with a value for each region of a network
    frozen : names that keep their starting values
    """

    priors: tuple[tuple[str, float, float], ...] = ()
    group: tuple[tuple[str, float], ...] = ()
    shared: tuple[str, ...] = ()
    regional: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()

    @classmethod
    def of_saved(cls, saved: Mapping[str, Any]) -> Pooling:
        """From the settings of a saved fit."""
        priors, group = (tuple(map(tuple, saved[name])) for name in ("priors", "group"))
        return cls(priors, group, tuple(saved["shared"]), tuple(saved["regional"]))

    @property
    def bind(self) -> bool:
        """Whether targets share a start, because their parameters depend on each other."""
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

    def width(self, name: str) -> int:
        """The values of what is regional: one for each region that it is of, in a network of groups for each of its."""
        return self.model.regions_of(name.removeprefix(routing.NOISE)) if isinstance(self.model, Network) else 1

    @property
    def mass(self) -> Any:
        """The model of each lane."""
        return parts_of(self.model)[1]

    @functools.cached_property
    def identity(self) -> Key:
        """The key of everything that compiled programs depend on: all but the target's values, starts and key."""
        free = {f.name for f in self.frees}
        values = routing.quantities(self.model, self.inputs, self.noise)
        fixed = {name: value for name, (_, value) in values.items() if name not in free}
        drives = stimuli.drives_of(self.inputs)
        inputs = {name: x for name, x in self.inputs.items() if name not in free or name in drives}
        if drives:
            moving = [name for name in free if name in (*drives, *stimuli.names_of(drives))]
            inputs = routing.put(self.model, inputs, {}, dict.fromkeys(moving, 0.0))[1]
        noise = {name: x for name, x in self.noise.items() if routing.NOISE + name not in free}
        network = None
        if isinstance(self.model, Network):
            network = tuple((c.link, _conduction(c), c.connections(), c.edges) for c in self.model.couplings)
            network += tuple(_groups(self.mass).items())
        return key_of(
            type(self.mass), network, fixed, inputs, noise, self.frees, self.pooling, self.realisations, self.record,
            self.options, self.comparison.read(), jax.config.jax_enable_x64,  # pyright: ignore
            dispatch.platform(), _context.INTERPRETED.get(), _context.ABSENT.get(),
        )  # fmt: skip

    # Problems that differ only in the target's values and the key share their compiled programs.
    def __hash__(self) -> int:
        return hash(self.identity)

    def __eq__(self, other) -> bool:
        return isinstance(other, Problem) and self.identity == other.identity

    def settings(self) -> dict[str, Any]:
        """Everything that a resumed fit must have in common with this one, ready for JSON."""
        free = {f.name for f in self.frees}
        fixed = {
            name: fingerprint(units.strip(value, unit, name))
            for name, (unit, value) in routing.quantities(self.model, self.inputs, self.noise).items()
            if name not in free
        }
        kinds = stimuli.kinds_of(self.inputs)
        fixed |= {"stimuli": kinds} if kinds else {}
        if isinstance(self.model, Network):
            groups = _groups(self.mass)
            fixed |= {"groups": {name: lanes.tolist() for name, lanes in groups.items()}} if groups else {}
            for coupling in self.model.couplings:
                fixed |= {coupling.link.full(name): x for name, x in _of_coupling(coupling).items()}
        pooling = {name: x for name, x in self.pooling._asdict().items() if name != "frozen"}
        return {
            **{name: self.steps(name) * self.dt for name in ("duration", "transient")},
            "dt": self.dt,
            **{name: self.options[name] for name in ("every", "scheme")},
            **(
                {"gradient_horizon": self.steps("gradient_horizon") * self.dt}
                if "gradient_horizon" in self.options
                else {}
            ),
            "model": type(self.mass).__name__,
            "fixed": fixed,
            "realisations": self.realisations,
            "ties": json.loads(json.dumps(pooling)),
            **self.comparison.settings,
        }

    @functools.cached_property
    def apart(self) -> Problem:
        """The same with each target by itself, where targets share a start but not every value.

        What is known of several targets together is added to what is found of each (`steps.evaluated`).
        """
        shared = all(f.name in self.pooling.shared for f in self.frees)
        if not self.pooling.bind or shared or self.comparison.count == 1:
            return self
        return dataclasses.replace(
            self, pooling=NO_POOLING._replace(regional=self.pooling.regional, frozen=self.pooling.frozen)
        )

    def spread(self, z) -> dict[str, Any]:
        """z as `apart` takes it: a row for each target of what they share."""
        if self.apart is self:
            return z
        n = self.comparison.count
        return {name: np.broadcast_to(np.asarray(x), (n, *x.shape[1:])) for name, x in z.items()}

    @property
    def dt(self) -> float:
        return units.concrete(units.strip(self.options["dt"], u.second, "dt"), "dt")

    def steps(self, name: str) -> int:
        return 0 if self.options[name] is None else units.steps_of(self.options[name], self.dt, name)

    @property
    def linear(self) -> bool:
        """Whether spectra are those of linear systems, and nothing is simulated."""
        return not self.comparison.simulated

    def put(self, values) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        """Model, inputs and noise with the free values."""
        values = {f.name: units.attach(values[f.name], f.unit) for f in self.frees}
        return routing.put(self.model, self.inputs, self.noise, values)

    def run(self, z, keys, call, **more):
        """``call`` (simulate, explain or sensitivities) on the lanes (targets, starts, realisations).

        ``more`` are further arguments, or take the place of the fit's.
        """
        lanes = (*lanes_of(z), self.realisations)
        values = {f.name: self._spread(f.value(z[f.name]), lanes) for f in self.frees}
        model, inputs, noise = self.put(values)
        inputs = per_lane(inputs, values)
        keys = jnp.broadcast_to(keys, (*lanes, *keys.shape[1:])) if noise else None
        options = self.options | more
        return call(model, inputs=inputs, noise=noise or None, key=keys, record=self.record, **options)

    def _spread(self, values, lanes: tuple[int, ...]):
        """Values of z's shape for every lane, with an axis of regions in a network."""
        regions = values.shape[2:]

        def spread(values, targets: int = 1):
            return jnp.broadcast_to(values[:, :, None], (targets, *lanes[1:], *regions))

        # A gradient sums over the realisations.
        summed = self.one_by_one and is_traced(values)
        values = self.each(spread, values) if summed else spread(values, lanes[0])
        return values[..., None] if self.regions and not regions else values

    def plan(self, key):
        """Which implementation the simulations run on, and why; this checks every argument."""
        if self.linear:
            return self._linear_plan(key)
        return self.run({f.name: jnp.zeros((self.comparison.count, 1)) for f in self.frees}, self.keys(key), explain)

    def program(self, starts: int, key) -> dict[str, str]:
        """What tells the programs of this fit from those of others, by name, ready for JSON."""
        return self.digests(starts, self.keys(key))

    def digests(self, starts: int, keys) -> dict[str, str]:
        """`program`, for keys of the realisations."""
        z = {f.name: jnp.zeros((self.comparison.count, starts)) for f in self.frees}
        if self.linear:
            return identity.versions() | self.run(z, keys, self._linear_digests)
        digests = identity.versions() | self.run(z, keys, identity.of_call)
        if callable(self.comparison.target):
            result = jax.eval_shape(lambda z, keys: self.run(z, keys, simulate), z, keys)
            digests["target"] = identity.of_function(self.comparison.predict, result)
        return digests

    def _linear_plan(self, key) -> Plan:
        """A plan that says that nothing is simulated, with the memory of the linear systems."""
        z = {f.name: jnp.zeros((self.comparison.count, 1)) for f in self.frees}
        like = jax.eval_shape(self.predict, z, self.keys(key))
        lanes, frequencies = self.comparison.count, [len(part.target.freqs) for part in self.comparison.parts_apart]
        systems_of = self.run(z, self.keys(key), self._prepared)
        each = sum(count * numbers(prepared.system) for count, prepared in zip(frequencies, systems_of, strict=True))
        size = 2 * like.dtype.itemsize * lanes * each
        why = "predict='linear': spectra about fixed points, nothing is simulated"
        return Plan(LINEAR, why, {}, lanes, 0, sum(frequencies), 0, 0, 0, size, size)

    def _prepared(self, model, *, inputs, noise, **_) -> tuple[systems.Prepared, ...]:
        parts = self.comparison.parts_apart
        return tuple(systems.prepare(model, inputs, None, noise, part.record) for part in parts)

    def _linear_digests(self, model, **arguments) -> dict[str, str]:
        """What tells the linear systems of this fit from those of others."""
        every = self._prepared(model, **arguments)
        found = []
        for prepared in every:
            names = ", ".join(name for group in prepared.data.regional for name in group)
            everything, avals = systems.of_one_region(prepared.system, prepared.data)
            found.append(f"{identity.of_function(everything, *avals)} of {names}")
        return {"dtype": str(every[0].system.dtype), "equations": "; ".join(found)}

    def _density(self, model, *, inputs, noise, **_):
        """What is predicted from, of what `run` gives a simulation."""
        return self.comparison.density(model, inputs, noise)

    def predict(self, z, keys, **more):
        """The prediction of every lane, ``(n or 1, starts, ...)``; ``more`` as of `run`."""
        if self.linear:
            return self.comparison.predict(self.run(z, keys, self._density, **more))
        return self.predicted(self.run(z, keys, simulate, **more))

    def predicted(self, result):
        """The prediction of a run, target by target where that keeps the bits."""
        if not self.one_by_one:
            return self.comparison.predict(result)
        names = [self.record] if isinstance(self.record, str) else list(self.record)
        axes = [self.comparison.axis_of(name) for name in names]
        unit_of = {name: u.get_unit(result[name]) for name in names}

        def one(*records):
            every = zip(names, axes, records, strict=True)
            return self.comparison.predict(
                {n: units.attach(jnp.moveaxis(x, 0, axis), unit_of[n]) for n, axis, x in every}
            )

        return self.each(one, *(jnp.moveaxis(u.get_mantissa(result[n]), axis, 0) for n, axis in zip(names, axes)))

    def error(self, prediction, data):
        """The error of each lane, and the nuisances."""
        return self.each(self.comparison.error, prediction, data)

    @property
    def one_by_one(self) -> bool:
        """Whether targets are compared one after another: XLA sums in another order for another number of targets.

        So a target's fit has the same bits whichever others run with it. On a GPU each would be a kernel of its own.
        """
        return self.comparison.count > 1 and not self.pooling.bind and dispatch.platform() == "cpu"

    def each(self, function, *arrays):
        """``function`` of arrays ``(n or 1, ...)`` whose results are ``(n, ...)``."""
        if not self.one_by_one:
            return function(*arrays)
        leaves, structure = jax.tree.flatten(arrays)
        n = max(map(len, leaves))
        many = [len(x) == n for x in leaves]

        def one(rows):
            rows = iter(rows)
            row = structure.unflatten([next(rows)[None] if split else x for x, split in zip(leaves, many)])
            return jax.tree.map(lambda x: x[0], function(*row))

        rows = [jnp.asarray(x) for x, split in zip(leaves, many) if split]
        # XLA takes a loop of one turn apart, and fuses its operations with others.
        rows = [jnp.concatenate([x, x]) for x in rows] if n == 1 else rows
        return jax.tree.map(lambda x: x[:n], jax.lax.map(one, rows))

    @property
    def moving(self) -> list[Free]:
        """The free quantities that are not frozen."""
        return [f for f in self.frees if f.name not in self.pooling.frozen]

    @property
    def unknowns(self) -> list[tuple[Free, slice]]:
        """The free quantities that are not frozen, and the places of their values among the unknowns of a lane."""
        found, first = [], 0
        for f in self.moving:
            width = self.width(f.name) if f.name in self.pooling.regional else 1
            found.append((f, slice(first, first + width)))
            first += width
        return found

    @property
    def carried(self) -> bool:
        """Whether derivatives by parameters are carried in the loop of every implementation (`sensitivities`)."""
        record = list(self.record.values()) if isinstance(self.record, Mapping) else self.record
        names = [record] if record is None or isinstance(record, str) else record
        of_names = isinstance(names, list | tuple) and all(x is None or isinstance(x, str) for x in names)
        return self.regions is None and (self.linear or (not self.mass.delayed and of_names))

    def linearised(self, z, keys, data):
        """Residuals (n, starts, M), and their derivatives by the P unknowns of a lane, (n, starts, P, M)."""
        if not self.carried:
            return self._linearised_forward(z, keys, data)
        if self.linear:
            return self._linearised_densities(z, keys, data)
        result, slopes = self.run(z, keys, sensitivities, wrt=[f.name for f in self.moving])

        def residuals_of(records, final):
            records, final = _with_units(records, result.records), _with_units(final, result.final)
            prediction = self.predicted(dataclasses.replace(result, records=records, final=final))
            return self.each(lambda *x: self.comparison.residuals(*x)[0], prediction, data)

        outputs = (_magnitudes(x, x) for x in (result.records, result.final))
        residuals, push = jax.linearize(residuals_of, *outputs)
        lanes, columns = (*lanes_of(z), self.realisations), []
        for f in self.moving:
            slope, by_z = slopes[f.name], self._spread(f.slope(z[f.name]), lanes)
            records = _magnitudes(_by_z(slope.records, by_z, f.unit), result.records)
            columns.append(push(records, _magnitudes(_by_z(slope.final, by_z, f.unit), result.final)))
        return residuals, jnp.stack(columns, 2)

    def _linearised_forward(self, z, keys, data):
        """By JAX's forward mode, of runs through `scan`, some directions at once."""

        def residuals_of(z):
            prediction = self.predict(z, keys, implementation="scan")
            return self.each(lambda *x: self.comparison.residuals(*x)[0], prediction, data)

        def pushed(number):
            along = {}
            for name, x in z.items():
                places = [jnp.arange(at.start, at.stop, dtype=jnp.int32) for f, at in self.unknowns if f.name == name]
                one = (places[0] == number).astype(x.dtype) if places else jnp.zeros((1,), x.dtype)
                along[name] = jnp.broadcast_to(one if x.ndim == 3 else one[0], x.shape)
            return jax.jvp(residuals_of, (z,), (along,))

        count = self.unknowns[-1][1].stop
        # Lanes do not mix: one direction has the derivatives of all.
        residuals, columns = jax.lax.map(pushed, jnp.arange(count, dtype=jnp.int32), batch_size=min(count, DIRECTIONS))
        return residuals[0], jnp.moveaxis(columns, 0, 2)

    def _linearised_densities(self, z, keys, data):
        def residuals_of(z):
            return self.each(lambda *x: self.comparison.residuals(*x)[0], self.predict(z, keys), data)

        residuals, push = jax.linearize(residuals_of, z)
        still = jax.tree.map(jnp.zeros_like, z)
        # Lanes do not mix: one direction has the derivatives of all.
        columns = [push(still | {f.name: jnp.ones_like(z[f.name])}) for f in self.moving]
        return residuals, jnp.stack(columns, 2)

    def penalties(self, z):
        """Of each prior and group the name, the residual ``(n or 1, starts, ...)`` and its slope by z.

        The group's mean is solved for: its best value is the mean of the targets, and it does not add to the slope.
        """
        frees = {f.name: f for f in self.frees}
        penalties = []
        for name, centre, width in self.pooling.priors:
            penalties.append((name, (frees[name].value(z[name]) - centre) / width, frees[name].slope(z[name]) / width))
        for name, width in self.pooling.group:
            value = frees[name].value(z[name])
            deviation = value - jax.lax.stop_gradient(value.mean(0, keepdims=True))
            penalties.append((name, deviation / width, frees[name].slope(z[name]) / width))
        return penalties

    def penalty(self, z, count: int):
        """The sum of squares of the penalties of each lane, weighed as residuals of which there are ``count``."""
        lanes = lanes_of(z)
        total = jnp.zeros(lanes)
        for name, residual, _ in self.penalties(z):
            square = residual**2 if residual.ndim == 2 else jnp.sum(residual**2, -1)
            # A shared quantity has one penalty, not one for each target.
            total = total + jnp.broadcast_to(square, lanes) / (lanes[0] if name in self.pooling.shared else 1)
        return total * (self.comparison.sigma**2 / count)

    def score(self, error):
        """What a lane is judged by: its error, or the mean over the targets if they share a start."""
        return jnp.broadcast_to(error.mean(0, keepdims=True), error.shape) if self.pooling.bind else error

    def keys(self, key, check: int | None = None):
        """A key for each realisation, and each region of a network; with ``check``, of noise that only reports use."""
        shape = (self.realisations,) if self.regions is None else (self.realisations, self.regions)
        return jax.random.split(key if check is None else jax.random.fold_in(key, _UNSEEN + check), shape)

    def unseen(self, z, key, call=None):
        """The mean prediction on noise that the steps did not use; without noise, the prediction.

        Parameters
        ----------
        call : ``(predict, problem, z, keys) -> prediction``; ``None``, on one device
        """
        call = call or (lambda function, *arguments: function(*arguments))
        noisy = self.noise or any(f.name.startswith(routing.NOISE) for f in self.frees)
        checks = range(_CHECKS) if noisy and not self.linear else [None]
        predictions = jax.block_until_ready([call(predict, self, z, self.keys(key, check)) for check in checks])
        return sum(predictions[1:], predictions[0]) / len(predictions)


def fingerprint(value) -> Any:
    """An array as nested lists, or a long one as its shape and a digest."""
    array = np.asarray(value)
    if array.size <= 64:
        return array.tolist()
    return f"{array.shape} {hashlib.sha256(np.ascontiguousarray(array, float).tobytes()).hexdigest()[:16]}"


def _groups(mass: Model) -> dict[str, np.ndarray]:
    """The regions of each group, of a model of groups."""
    return {name: group.lanes for name, group in mass.groups.items()} if isinstance(mass, Groups) else {}


def _conduction(coupling: Coupling) -> tuple:
    delays = coupling.conduction
    return () if delays is None else (delays.seconds, delays.lengths, delays.most, delays.interpolate)


def _of_coupling(coupling: Coupling) -> dict[str, Any]:
    """What a resumed fit must have in common of a coupling's connections, ready for JSON."""
    link = coupling.link
    kind = [link.kind] if isinstance(link.kind, str) else ["own kind", *link.kind.parameters]
    seconds, lengths, *how = _conduction(coupling) or (np.zeros(0), None)
    delays = lengths if seconds is None else seconds
    fixed: dict[str, Any] = {"link": [*kind, link.source, link.target], "delays": fingerprint(delays)}
    fixed["weights"] = fingerprint(coupling.connections())
    if any(how):
        fixed["conduction"] = how
    if coupling.edges is not None:
        # In the order of the delays, that of the stored values.
        fixed["edges"] = fingerprint(sparsity.indices_of(coupling.weights))
    return fixed


def lanes_of(z) -> tuple[int, ...]:
    """The targets and starts of a free variable."""
    return np.broadcast_shapes(*(x.shape[:2] for x in z.values()))


def _magnitudes(quantities, like) -> dict[str, Any]:
    """Plain arrays in the units of ``like``."""
    return {n: units.strip(quantities[n], u.get_unit(x), n) for n, x in like.items()}


def _with_units(magnitudes, like) -> dict[str, Any]:
    return {n: units.attach(x, u.get_unit(like[n])) for n, x in magnitudes.items()}


def _by_z(slopes, by_z, unit) -> dict[str, Any]:
    """Derivatives by z, from those by a free quantity in ``unit`` and its derivative ``by_z``."""
    return {n: x * units.attach(jnp.broadcast_to(by_z, x.shape), unit) for n, x in slopes.items()}


predict = jax.jit(Problem.predict, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def free_values(problem: Problem, z) -> dict[str, jax.Array]:
    """The free quantities in their units, by name."""
    return {f.name: f.value(z[f.name]) for f in problem.frees}


@functools.partial(jax.jit, static_argnums=0)
def measured(problem: Problem, prediction, data):
    """The error of each lane, and the nuisances."""
    return problem.error(prediction, data)
