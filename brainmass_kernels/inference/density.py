"""The log density of parameters given data, on unconstrained positions: all chains are lanes of one run."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np

from .. import _context, dispatch, identity
from .._jax import is_traced
from ..fitting.joint import Joint, OfJoint
from ..fitting.problem import Problem
from ..fitting.saved import encode_target
from ..fitting.targets import Comparison, OfFunction, unchecked
from ..models.base import check_name
from ..simulation import explain, simulate
from ..units import strip
from .likelihoods import Likelihood
from .positions import Member, Position, broadcast
from .priors import Prior

#: Chains that an implementation is chosen for: `jax.vmap` shows one to whoever traces, and then runs all as lanes.
CHAINS = 8


class Part(NamedTuple):
    """The likelihood of one target; ``prefix`` is before the names of its inferred fields."""

    prefix: str
    likelihood: Likelihood


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["data", "keys"],
    meta_fields=["problem", "positions", "parts", "start"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class LogDensity:
    """The log density of unconstrained positions: ``density(z)``, made by `log_density`.

    z is a dict of real numbers by name, each with the same leading axes, or with axes that broadcast: chains, which run
    as lanes of one simulation. Under ``jax.vmap`` they fold into lanes too. It is a pytree, and ``jit``, ``grad`` and
    ``vmap`` go through it; a sampler takes it as it is. Of several targets, what each has a value of its own of has one
    more axis, the last, and lanes are chains and targets.

    Attributes
    ----------
    data : the numbers of each target, leaves of the tree: ``dataclasses.replace(density, data=...)`` is of other data
    keys : of the realisations, leaves too
    problem, positions, parts, start : how the density is computed
    """

    problem: Problem
    positions: tuple[Position, ...]
    parts: tuple[Part, ...]
    data: tuple[Any, ...]
    keys: Any
    start: tuple[float, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of z: the free ones, then those of the likelihood, as ``"likelihood.sigma"``."""
        return tuple(p.name for p in self.positions)

    @property
    def subjects(self) -> int:
        """How many targets there are."""
        return self.problem.comparison.count

    @property
    def size(self) -> int:
        """How many real numbers a position is."""
        return sum(math.prod(p.shape) for p in self.positions)

    def of_vectors(self, vectors) -> dict[str, Any]:
        """Positions by name, of vectors ``(..., size)``, in the order of the names and of the subjects."""
        found, first = {}, 0
        for p in self.positions:
            last = first + math.prod(p.shape)
            found[p.name] = vectors[..., first:last] if p.shape else vectors[..., first]
            first = last
        return found

    def to_vectors(self, z: Mapping[str, Any], shape: tuple[int, ...] = ()) -> np.ndarray:
        """The inverse of `of_vectors`, of positions whose leading axes broadcast to each other and to a shape."""
        own = {p.name: p.shape for p in self.positions}
        shape = np.broadcast_shapes(shape, *(np.shape(x)[: np.ndim(x) - len(own[name])] for name, x in z.items()))
        rows = [np.broadcast_to(np.asarray(z[p.name]), (*shape, *p.shape)) for p in self.positions]
        return np.concatenate([x if p.shape else x[..., None] for x, p in zip(rows, self.positions)], -1)

    @property
    def initial(self) -> dict[str, jax.Array]:
        """The position of the values in the arguments; of a likelihood's parameter, near the middle of its prior."""
        return {p.name: jnp.full(p.shape, z) if p.shape else jnp.asarray(z) for p, z in zip(self.positions, self.start)}

    def __call__(self, z: Mapping[str, Any]):
        """The log density of data and positions, in the shape of their axes: the posterior's up to a constant.

        A run that is not finite has the density 0, and its logarithm is -inf.

        Raises
        ------
        ValueError : a name that is unknown or missing
        """
        return _log_density(self, self._checked(z), choices())

    def log_prior(self, z: Mapping[str, Any]):
        """The log density of the priors at positions, with that of the change of variables; it needs no run."""
        return _log_prior(self, self._checked(z))

    def log_likelihood(self, z: Mapping[str, Any]):
        """The log density of the data at positions, as tempered samplers take it beside `log_prior`."""
        return _log_likelihood(self, self._checked(z), choices())

    def to_parameters(self, z: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters of positions, with their units; any shape.

        Of several targets those of each are the last axis. Of a group, ``"C.group"`` is the mean, as a value where the
        positions of the subjects have their mean, and ``"C.spread"`` the spread.
        """
        z = self._placed(self._checked(z))
        return {p.name: p.attached(jnp.asarray(z[p.name])) for p in self.positions}

    def to_position(self, parameters: Mapping[str, Any]) -> dict[str, jax.Array]:
        """The positions of parameters, the inverse of `to_parameters` to float precision.

        Raises
        ------
        ValueError : a name that is unknown or missing, a wrong unit, or a value outside the support
        """
        return self._positions_of(parameters, "parameters")

    def _positions_of(self, parameters: Mapping[str, Any], argument: str) -> dict[str, jax.Array]:
        """`to_position`, whose errors name this argument."""
        self._checked(parameters, argument)
        found = {}
        for p in self.positions:
            value = parameters[p.name]
            value = jnp.asarray(strip(value, p.unit, p.name) if isinstance(value, u.Quantity) else value, float)
            if not is_traced(value) and p.outside_support(value).any():
                raise ValueError(
                    f"'{argument}' got {p.name} = {np.asarray(value)}, outside of {p.low:g} to {p.high:g} {p.unit}"
                )
            found[p.name] = p.of_value(value)
        return self._placed(self._checked(found, argument), back=True)

    def _placed(self, z: Mapping[str, Any], back: bool = False) -> dict[str, Any]:
        """z with the positions of a group's values in place of their distances from its mean; ``back``, the inverse."""
        found, known = dict(z), {p.name: p for p in self.positions}
        for p in self.positions:
            if isinstance(p, Member):
                spread = known[p.spread_name].value(jnp.asarray(z[p.spread_name]))
                place = p.apart if back else p.placed
                found[p.name] = place(z[p.name], z[p.mean_name], spread)
        return found

    def sample_prior(self, key, shape: tuple[int, ...] = ()) -> dict[str, jax.Array]:
        """Positions drawn from the priors, each of this shape; what targets have of their own, with one more axis."""
        keys = jax.random.split(key, len(self.positions))
        return {p.name: p.sample(one, (*shape, *p.shape)) for p, one in zip(self.positions, keys)}

    def for_chains(self, chains: int) -> LogDensity:
        """The same density on the implementation that is the fastest for so many chains.

        Under ``jax.vmap`` a density sees one chain. By itself it runs on what is the fastest for 8, or for the chains
        that it sees if these are more. An implementation that was named stays.
        """
        problem = self.problem
        if problem.linear or problem.options["implementation"] is not None:
            return self
        lanes = {p.name: p.rows(jnp.zeros((chains, *p.shape))) for p in self._free}
        named = problem.options | {"implementation": problem.run(lanes, self.keys, explain).implementation}
        return dataclasses.replace(self, problem=dataclasses.replace(problem, options=named))

    def _checked(self, z, argument: str = "z") -> dict[str, Any]:
        if not isinstance(z, Mapping):
            raise TypeError(f"'{argument}' got {type(z).__name__}, but takes a dict by name: {', '.join(self.names)}")
        for name in z:
            check_name(name, dict.fromkeys(self.names), f"name in '{argument}'")
        if missing := [name for name in self.names if name not in z]:
            raise ValueError(f"'{argument}' has nothing for {missing[0]!r}, but takes a number for each of "
                             f"{', '.join(self.names)}")  # fmt: skip
        for p in self.positions:
            got = np.shape(u.get_magnitude(z[p.name]))
            if p.shape and got[-1:] != p.shape:
                raise ValueError(f"'{argument}' got shape {got} for {p.name!r}, of which each of {p.subjects} targets "
                                 f"has its own, but takes (..., {p.subjects})")  # fmt: skip
        return {name: z[name] for name in self.names}

    def identity(self, chains: int) -> dict[str, str]:
        """What tells this density from others, by name, ready for JSON; of programs of so many chains."""
        problem, plain = self.problem, self.problem.settings()
        fixed = {f"{name} of the model": json.dumps(x) for name, x in plain.pop("fixed").items()}
        settings = {name: json.dumps(x, default=str) for name, x in plain.items()}
        digests = {"data": "; ".join(map(identity.of_array, self.data))} if self.data else {}
        if not isinstance(problem.comparison, OfFunction):
            # Frequencies, lead fields and what else decides how predictions and data are compared.
            digests["target"] = identity.of_text(json.dumps(encode_target(problem.comparison.target)))
        told = {
            "free": str([(p.name, p.low, p.high, str(p.unit)) for p in self.positions]),
            "priors": str([p.prior for p in self.positions]),
            "likelihood": str([(part.prefix, part.likelihood) for part in self.parts]),
            "noise": identity.of_array(jax.random.key_data(self.keys)),
        }
        if self.subjects > 1:
            told["subjects"] = str([(p.name, type(p).__name__, p.subjects) for p in self.positions])
        return {**problem.digests(chains, self.keys), **fixed, **settings, **told, **digests}

    # Lanes ----------------------------------------------------------------------------------------------------------

    def _flat(self, z) -> tuple[dict[str, Any], tuple[int, ...]]:
        """Each position ``(B,)`` or ``(B, n)`` in the precision of runs, and the shape of the batch."""
        z = {name: jnp.asarray(x).astype(jnp.result_type(float)) for name, x in z.items()}
        own = {p.name: p.shape for p in self.positions}
        shape = np.broadcast_shapes(*(x.shape[: x.ndim - len(own[name])] for name, x in z.items()))
        flat = {name: broadcast(x, (*shape, *own[name])).reshape(-1, *own[name]) for name, x in z.items()}
        return flat, shape

    def _prior(self, z):
        return functools.reduce(jnp.add, [p.summed(p.log_prior(z[p.name])) for p in self.positions])

    @property
    def _free(self) -> tuple[Position, ...]:
        """The positions of what the model takes."""
        names = {f.name for f in self.problem.frees}
        return tuple(p for p in self.positions if p.name in names)

    def _lanes(self, z) -> dict[str, Any]:
        """Placed positions as a `Problem` takes them."""
        return {p.name: p.rows(z[p.name]) for p in self._free}

    def _likelihood(self, z):
        """``(B,)``; NaN where a run was not finite."""
        z = self._placed(z)
        lanes = self._lanes(z)
        # A trace under `jax.vmap` sees one chain of several.
        problem = self.for_chains(max(CHAINS, len(z[self.names[0]]))).problem
        if isinstance(problem.comparison, OfFunction):
            return _of_function(problem.comparison, problem.run(lanes, self.keys, simulate))
        prediction, every = problem.predict(lanes, self.keys), []
        for part, data, (comparison, own) in zip(self.parts, self.data, split(problem.comparison, prediction)):
            data, fields = data.astype(own.dtype), self._fields(part, z)
            if self.subjects == 1:
                every.append(part.likelihood.log_prob(comparison, own, data, fields))
                continue
            each = self._each_subject(functools.partial(part.likelihood.log_prob, comparison), own, fields, data)
            every.append(jnp.sum(each, 0))
        return functools.reduce(jnp.add, every)

    def _each_subject(self, function, prediction, fields: dict[str, Any], *data):
        """``function(prediction, *data, fields)`` as of one target, for each: the results ``(n, ...)``."""
        n, lanes = self.subjects, prediction.shape[1]
        inferred = {name: x for name, x in fields.items() if isinstance(x, jax.Array)}
        inferred = {k: x.T if x.ndim == 2 else jnp.broadcast_to(x[None], (n, lanes)) for k, x in inferred.items()}

        def one(prediction, inferred, *data):
            return function(prediction[None], *data, fields | inferred)

        return jax.vmap(one)(jnp.broadcast_to(prediction, (n, *prediction.shape[1:])), inferred, *data)

    def _fields(self, part: Part, z) -> dict[str, Any]:
        """The fields of a likelihood, those that are inferred at placed positions ``(B,)`` or ``(B, n)``."""
        values = {p.name: p.value(z[p.name]) for p in self.positions if p.name.startswith(part.prefix)}
        fields = {f.name: getattr(part.likelihood, f.name) for f in dataclasses.fields(part.likelihood)}
        return {n: values[part.prefix + n] if isinstance(x, Prior) else x for n, x in fields.items()}


def split(comparison: Comparison, prediction=None) -> list[tuple[Comparison, Any]]:
    """The comparison of each target and its prediction."""
    if not isinstance(comparison, OfJoint):
        return [(comparison, prediction)]
    if prediction is None:
        return [(part, None) for part in comparison.parts.values()]
    return [(part, x) for _, part, x in comparison.split(prediction)]


def _of_function(comparison: OfFunction, result):
    """The logarithm of the mean likelihood over realisations, by the user's function, ``(B,)``."""
    lanes = np.shape(next(iter(result.final.values())))[:3]
    returned = comparison.target(result)
    if not u.get_unit(returned).is_unitless:
        raise TypeError(f"'target' returned {u.get_unit(returned)}, but a log likelihood is a plain number")
    values = u.get_magnitude(returned)
    if np.shape(values) != lanes:
        raise TypeError(
            f"'target' returned shape {np.shape(values)}, but takes a log likelihood for each lane, {lanes}"
        )
    return jax.nn.logsumexp(values[0], axis=-1) - math.log(lanes[2])


def _finite(likelihood):
    return jnp.where(jnp.isnan(likelihood), -jnp.inf, likelihood)


def choices() -> tuple:
    """What chooses the implementation beside the arguments, which a compiled program keeps."""
    return dispatch.platform(), _context.INTERPRETED.get(), _context.ABSENT.get(), _context.TARGET.get()


@functools.partial(jax.jit, static_argnums=2)
def _log_density(density: LogDensity, z, where):
    z, shape = density._flat(z)
    return (_finite(density._likelihood(z)) + density._prior(z)).reshape(shape)


@jax.jit
def _log_prior(density: LogDensity, z):
    z, shape = density._flat(z)
    return density._prior(z).reshape(shape)


@functools.partial(jax.jit, static_argnums=2)
def _log_likelihood(density: LogDensity, z, where):
    z, shape = density._flat(z)
    return _finite(density._likelihood(z)).reshape(shape)


def raw_log_likelihood(density: LogDensity, z) -> float:
    """At a position without batch axes; NaN where the run was not finite."""
    return float(_raw(density, z, choices()))


@functools.partial(jax.jit, static_argnums=2)
def _raw(density: LogDensity, z, where):
    return density._likelihood(density._flat(z)[0])[0]


@functools.partial(jax.jit, static_argnums=2)
def _expected(density: LogDensity, z, where):
    """What each likelihood expects of its data at placed positions ``(B,)``; of several targets ``(n, B, ...)``."""
    problem, found = density.problem, []
    prediction = problem.predict(density._lanes(z), density.keys)
    for part, (own, x) in zip(density.parts, split(problem.comparison, prediction)):
        fields, expected = density._fields(part, z), functools.partial(part.likelihood.expected, own)
        one = density.subjects == 1
        found.append(expected(x, fields) if one else density._each_subject(expected, x, fields))
    return found


# Predictions --------------------------------------------------------------------------------------------------------


def predicted(density: LogDensity, z: Mapping[str, Any], key=None):
    """What positions ``(n,)`` predict of the data, as a target of n; with ``key``, with the noise of data.

    Of several targets, a list of these, one for each.
    """
    z = density._placed(density._flat(density._checked(z))[0])
    expected = _expected(density, z, choices())
    if density.subjects == 1:
        return _as_target(density, z, expected, key)
    found = []
    for number in range(density.subjects):
        own = {p.name: z[p.name][:, number] if p.shape else z[p.name] for p in density.positions}
        own_key = None if key is None else jax.random.fold_in(key, number)
        found.append(_as_target(density, own, [x[number] for x in expected], own_key))
    return found


def _as_target(density: LogDensity, z, expected, key):
    """What is expected ``(n, ...)`` of one target, as a target of n."""
    every, comparison = [], density.problem.comparison
    comparisons = [part for part, _ in split(comparison)]
    for k, (part, own, x) in enumerate(zip(density.parts, comparisons, expected)):
        fields = density._fields(part, z)
        if key is not None:
            x = part.likelihood.noisy(jax.random.fold_in(key, k), own, x, fields)
        every.append(part.likelihood.as_target(own, np.asarray(x, float)))
    if isinstance(comparison, OfJoint):
        return unchecked(Joint, targets=dict(zip(comparison.parts, every)), weights=comparison.target.weights)
    return every[0]


def columns(values: Mapping[str, Any], axes: int) -> dict[str, Any]:
    """Values whose first axes are so many; those with one more, of subjects, one by one: ``"C[0]"``, ``"C[1]"``..."""
    found = {}
    for name, x in values.items():
        if np.ndim(u.get_magnitude(x)) == axes:
            found[name] = x
        else:
            found |= {f"{name}[{number}]": x[..., number] for number in range(x.shape[-1])}
    return found
