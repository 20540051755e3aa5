"""The points of a sweep: the values of each, which are run together, and on which devices."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np

from . import identity, routing, units
from .models.base import Model, check_model
from .network import Network, parts_of

#: Whether the lanes of a chunk lie on all local devices.
SPLIT = True


@dataclasses.dataclass(frozen=True)
class Grid:
    """The points of a sweep, in C order over its axes.

    Attributes
    ----------
    axes : the values of each swept quantity, by its full name
    regions : ``(N,)`` of networks, ``()`` of single masses
    """

    axes: dict[str, Any]
    regions: tuple[int, ...] = ()

    @classmethod
    def of(cls, model: Model | Network, over: Mapping[str, Any], inputs: Mapping[str, Any] | None = None) -> Grid:
        network, mass = parts_of(model)
        check_model(mass, ", or a bk.Network of one")
        if not over:
            raise ValueError("'over' got nothing, but takes one or several parameters and their values")
        known, axes = routing.places(model, inputs), {}
        for name, values in over.items():
            routing.check(name, known, "parameter or input")
            unit = known[name].unit
            values = np.asarray(units.strip(values, unit, name, known[name].also), float)
            if values.ndim != 1 or not len(values):
                raise ValueError(f"'{name}' got values of shape {values.shape}, but takes one or several, (n,)")
            axes[name] = units.attach(values, unit)
        check_single(network, mass, over, "over")
        return cls(axes, (network.regions,) if network else ())

    @property
    def names(self) -> tuple[str, ...]:
        """Of the quantities that differ between points."""
        return tuple(self.axes)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(len(x) for x in self.axes.values())

    @property
    def points(self) -> int:
        return math.prod(self.shape)

    def at(self, places: np.ndarray) -> dict[str, Any]:
        """The values at some places: ``(n,)``, or ``(n, 1)`` for the regions of a network."""
        index, dtype = np.unravel_index(places, self.shape), jnp.result_type(float)
        lanes = (-1, *(1 for _ in self.regions))
        return {
            name: units.attach(jnp.asarray(u.get_magnitude(x)[i].reshape(lanes), dtype), units.unit_of(x))
            for (name, x), i in zip(self.axes.items(), index, strict=True)
        }

    def keys(self, key, places: np.ndarray):
        """A random key for each lane, which depends on its place in the grid and its region alone."""
        keys = jax.vmap(lambda place: jax.random.fold_in(key, place))(jnp.asarray(places))
        if not self.regions:
            return keys
        each = jax.vmap(jax.random.fold_in, (None, 0))
        return jax.vmap(each, (0, None))(keys, jnp.arange(self.regions[0]))

    def beside(self, places: np.ndarray) -> dict[str, Any]:
        """What is kept with the records of some places: nothing, as the axes tell the values."""
        return {}

    def identity(self) -> dict[str, str]:
        """What tells these points from others, by name."""
        values = {n: f"{identity.of_array(u.get_magnitude(x))} {units.unit_of(x)}" for n, x in self.axes.items()}
        return {"over": ", ".join(self.axes), **{f"over {n}": x for n, x in values.items()}}

    def about(self) -> dict[str, Any]:
        """What a file says of them beside the axes, ready for JSON."""
        return {}


def check_single(network: Network | None, mass: Model, over, argument: str) -> None:
    """Raise ValueError if the model is a batch already; each region of a network may have its value.

    Parameters
    ----------
    over : the names of what differs between points, given by the argument of the name ``argument``
    """
    for name, x in mass.magnitudes().items():
        if np.ndim(x) and name not in over and not (network and np.ndim(x) == 1):
            raise ValueError(f"'model' has {np.shape(x)} values of {name}: give them in {argument}={{'{name}': ...}}")
    if network is None:
        return
    for coupling in network.couplings:
        if np.ndim(coupling.weights) > 2:  # pyright: ignore[reportArgumentType]
            shape = np.shape(coupling.weights)
            raise ValueError(f"'model' has weights of shape {shape}, but a sweep takes one network")
    for name, x in network.parameters.items():
        if np.ndim(u.get_magnitude(x)) > 1 and routing.COUPLING + name not in over:
            full = routing.COUPLING + name
            raise ValueError(f"'model' has {np.shape(x)} values of {full}: give them in {argument}={{'{full}': ...}}")


@dataclasses.dataclass(frozen=True)
class Tiles:
    """An array in rectangles of one shape, but for those at its ends; they are numbered from 0, in C order.

    Attributes
    ----------
    shape, tile : of the array and of a rectangle
    """

    shape: tuple[int, ...]
    tile: tuple[int, ...]

    @classmethod
    def rectangles(cls, shape: tuple[int, ...], most: int) -> Tiles:
        """Of at most so many points: the last axes whole, as far as that goes."""
        tile: list[int] = []
        for n in reversed(shape):
            # Rectangles of nearly one size: those at the ends take as long as the others.
            tile.insert(0, -(-n // -(-n // most)))
            most = max(1, most // tile[0])
        return cls(shape, tuple(tile))

    @property
    def count(self) -> int:
        return math.prod(self._blocks)

    @property
    def size(self) -> int:
        """Points of a whole rectangle."""
        return math.prod(self.tile)

    @property
    def _blocks(self) -> tuple[int, ...]:
        return tuple(-(-n // t) for n, t in zip(self.shape, self.tile, strict=True))

    def block(self, number: int) -> tuple[int, ...]:
        """Where a rectangle is among the others."""
        return tuple(map(int, np.unravel_index(number, self._blocks)))

    def slices(self, number: int) -> tuple[slice, ...]:
        """Where a rectangle is in the array."""
        corner = zip(self.block(number), self.tile, self.shape, strict=True)
        return tuple(slice(b * t, min((b + 1) * t, n)) for b, t, n in corner)

    def places(self, number: int) -> np.ndarray:
        """The places of a rectangle's points in the flattened array."""
        index = np.ix_(*(np.arange(s.start, s.stop) for s in self.slices(number)))
        return np.ravel_multi_index(index, self.shape).ravel()


# Devices ------------------------------------------------------------------------------------------------------------


def devices_of_a_chunk() -> list[Any]:
    """The local devices over which the lanes of a chunk are split; one of them means that they are not."""
    if not SPLIT or jax.config.jax_default_device is not None:  # pyright: ignore[reportAttributeAccessIssue]
        return jax.local_devices()[:1]
    return jax.local_devices()


def split(arrays, devices: list[Any]):
    """Arrays, with or without units, with their leading axis split over devices, whose number divides it."""
    if len(devices) == 1:
        return arrays
    mesh = jax.sharding.Mesh(np.array(devices), ("lanes",))
    lanes = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("lanes"))
    return jax.device_put(arrays, lanes)


def padded(places: np.ndarray, count: int) -> np.ndarray:
    """So many places, of which those beyond the given ones repeat the last."""
    return np.concatenate([places, np.full(count - len(places), places[-1])])
