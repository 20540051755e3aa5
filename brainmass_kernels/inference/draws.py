"""The points of a bank of simulations: draws from priors by scrambled Sobol points, each known by its number alone."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import brainunit as u
import jax.numpy as jnp
import numpy as np

from .. import grids, identity, routing, units
from ..fitting.fit import bounds_of
from ..grids import Grid
from ..models.base import Model, check_model
from ..network import Network, parts_of
from . import likelihoods
from .log_density import OR_NONE
from .positions import Position
from .priors import Uniform, as_prior

#: The axis of a bank's file.
DRAW = "draw"
#: Bits of a Sobol point.
_BITS = 30
MOST = 2**_BITS


@dataclasses.dataclass(frozen=True)
class Draws(Grid):
    """Draws from priors, in place of a grid's points.

    Attributes
    ----------
    axes : `DRAW` alone, the numbers of the draws
    priors : of each parameter
    seed : scrambles the Sobol points
    notes : what a file says beside the priors and the seed
    """

    priors: tuple[Position, ...] = ()
    seed: int = 0
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(p.name for p in self.priors)

    def values(self, places: np.ndarray) -> dict[str, np.ndarray]:
        """Plain numbers ``(n,)`` at some places, in float64: a prior's quantiles at a coordinate of the points."""
        points = sobol(len(self.priors), self.seed, int(places.min()), int(places.max()) + 1)[places - places.min()]
        return {p.name: p.prior.quantile(x, p.low, p.high) for p, x in zip(self.priors, points.T, strict=True)}

    def at(self, places):
        lanes = (-1, *(1 for _ in self.regions))
        values, dtype = self.values(places), jnp.result_type(float)
        return {p.name: units.attach(jnp.asarray(values[p.name].reshape(lanes), dtype), p.unit) for p in self.priors}

    def beside(self, places):
        """The parameters as they are simulated, rounded to the precision of a run."""
        return {name: x.reshape(-1) for name, x in self.at(places).items()}

    def identity(self):
        first = self.values(np.arange(min(self.points, 8)))
        priors = {f"prior {p.name}": _text(p) for p in self.priors}
        return {
            "n": str(self.points),
            "seed": str(self.seed),
            "priors": ", ".join(self.names),
            **priors,
            "draws": identity.of_array(np.stack(list(first.values()))),
        }

    def about(self):
        priors = {p.name: _text(p) for p in self.priors}
        return {"n": self.points, "seed": self.seed, "priors": priors, **self.notes}


def draws_of(model: Model | Network, priors, free, inputs, n: int, seed: int) -> Draws:
    """The draws of a model's parameters.

    Raises
    ------
    ValueError, TypeError : naming the argument: an unknown name, a prior without a unit or beyond its bounds
    """
    network, mass = parts_of(model)
    check_model(mass, ", or a bk.Network of one")
    for what, argument in (("priors", priors), ("free", free)):
        if not isinstance(argument, Mapping):
            raise TypeError(f"'{what}' got {type(argument).__name__}, but takes a dict by the parameter's name")
    names = list(dict.fromkeys([*free, *priors]))
    if not names:
        raise ValueError("'priors' got nothing, but takes one of bk.priors for each parameter that is drawn")
    known, positions = routing.places(model, inputs), []
    for name in names:
        routing.check(name, known, "parameter in 'priors' or 'free'")
        positions.append(_position(name, known[name].unit, priors, free))
    grids.check_single(network, mass, names, "priors")
    regions = (network.regions,) if network else ()
    return Draws({DRAW: np.arange(n, dtype=float)}, regions, tuple(positions), seed)


def _position(name: str, unit, priors: Mapping[str, Any], free: Mapping[str, Any]) -> Position:
    bounds = None if free.get(name) is None else bounds_of(name, free[name], unit, OR_NONE)
    if name not in priors and bounds is None:
        raise ValueError(f"'priors' has nothing for {name!r}, which has no bounds in 'free': it takes one of these")
    prior = as_prior(priors[name], name) if name in priors else Uniform(*(x * unit for x in bounds or ()))
    bare = [x for x in prior.dimensional if not isinstance(getattr(prior, x), u.Quantity)]
    if bare and not unit.is_unitless:
        raise ValueError(
            f"'priors' got {prior} for {name!r}, whose {' and '.join(bare)} have no unit, but takes "
            f"{unit}, such as {getattr(prior, bare[0])} * u.{unit}"
        )
    natural = likelihoods.POSITIVE if name.startswith(routing.NOISE) else likelihoods.ANY
    return Position.of(name, prior, unit, bounds, natural, "'priors'")


def _text(p: Position) -> str:
    """A prior in words, with its unit and where it is cut off."""
    unit = "" if p.unit.is_unitless else f" {p.unit}"
    return f"{p.prior} from {p.low:g} to {p.high:g}{unit}"


def sobol(dimensions: int, seed: int, start: int, stop: int) -> np.ndarray:
    """Scrambled Sobol points ``start`` to ``stop``, ``(n, dimensions)``, strictly between 0 and 1.

    A point depends on the seed and its number, not on the others asked for. The scrambling is that of Matoušek 1998,
    Journal of Complexity 14:527-556.
    """
    from scipy.stats import qmc

    # The argument's name depends on scipy's version.
    name = "rng" if "rng" in inspect.signature(qmc.Sobol).parameters else "seed"
    scrambled: dict[str, Any] = {name: np.random.default_rng(seed)}
    points = qmc.Sobol(dimensions, scramble=True, bits=_BITS, **scrambled)
    if start:
        points.fast_forward(start)
    # The first alone: scipy warns of first parts that are no power of 2, though the whole sequence is what counts.
    parts = [points.random(1), points.random(stop - start - 1)] if stop - start > 1 else [points.random(1)]
    # In the middle of the cell that a point stands for.
    return np.concatenate(parts) + 0.5 / MOST
