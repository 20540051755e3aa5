"""The connections of a run: those of a network's couplings, and of each mass to its own past; and their histories."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np

from . import units
from ._jax import is_traced, is_whole, of_one_shape, values_here
from .backends.base import Connections, SparseConnections, Term
from .coupling import Coupling, wiring
from .delays import Delays, longest_of, readings, wide
from .groups import Groups
from .models.base import Model, check_name, refuse_nan
from .models.delayed import Delayed
from .network import Network, links_of, parts_of, sent_of


class _Way(NamedTuple):
    """The connections of one coupling, or of one delay inside a mass.

    Attributes
    ----------
    connections : for each step back that they read
    live : whether their delays are data of the run
    depth : the longest, in steps
    """

    connections: list[Connections]
    live: bool
    depth: int


def connections_of(
    model: Network | Model, dt: float
) -> tuple[tuple[Connections, ...], tuple[Term, ...], tuple[int, ...]]:
    """The connections of each term of the sums, the terms, and the longest delay of each quantity in steps.

    ``dt`` is in seconds.
    """
    network, mass = parts_of(model)
    ways = [_of_coupling(each, dt) for each in (network.couplings if network else ())]
    ways += [_of_past(each, mass, network, dt) for each in type(mass).delayed.values()]
    quantities, reads = wiring(links_of(model))
    connections, terms, total = [], [], 0
    depths = [0] * len(quantities)
    for way, numbers in zip(ways, reads, strict=True):
        forms = [_term(one, way.live) for one in way.connections]
        for number in numbers:
            connections += way.connections
            terms += [form._replace(source=number, total=total) for form in forms]
            depths[number] = max(depths[number], way.depth)
            total += 1
    return tuple(connections), tuple(terms), tuple(depths)


def _term(connections: Connections, live: bool) -> Term:
    """The term of these connections, of the first quantity and sum."""
    count = connections.edges.shape[1]
    own_weights = math.prod(np.shape(connections.weights)[:-2]) > 1
    edges = count if connections.are_edges else None
    return Term(0, 0, (count,) if live else delay_counts(connections), edges, own_weights, live)


def depth_of(connections: Connections) -> int:
    """The longest delay, in steps."""
    return int(np.max(connections.steps, initial=0))


def delay_counts(connections: Connections) -> tuple[int, ...]:
    """The number of nonzero connections for each delay."""
    return tuple(np.bincount(connections.steps_of_edges, minlength=depth_of(connections) + 1).tolist())


def constants_of(network: Network) -> dict[str, Any]:
    """The couplings' constants as plain arrays, in the order of `StepSpec.coupled`."""
    known = network.magnitudes()
    return {full: known[full] for link in network.links for full in map(link.full, link.parameters)}


# Between regions -----------------------------------------------------------------------------------------------------


def _of_coupling(coupling: Coupling, dt: float) -> _Way:
    """The connections of a coupling, their delays in steps; ``dt`` in seconds."""
    delays, found = coupling.conduction, _connections(coupling, dt)
    live = delays is not None and delays.live
    return _Way(found, live, delays.depth(dt) if delays is not None and live else max(map(depth_of, found)))


def _connections(coupling: Coupling, dt: float) -> list[Connections]:
    weights: Any = coupling.connections()
    found = []
    for reading in coupling.readings(dt):
        shares = weights
        if reading.share is not None:
            shares, share = of_one_shape(weights, reading.share)
            shares = shares * share.astype(jax.dtypes.canonicalize_dtype(weights.dtype))
        if coupling.edges is not None:
            found.append(SparseConnections(shares[..., None, :], reading.steps, coupling.edges.ends))  # pyright: ignore
            continue
        nonzero = np.ones((coupling.regions,) * 2, bool)
        # The edges of live delays are those of the weights, whatever the share.
        known = weights if is_traced(shares) or (coupling.conduction and coupling.conduction.live) else shares
        if not is_traced(known):
            nonzero = np.any(np.asarray(known) != 0.0, axis=tuple(range(np.ndim(known) - 2)))
        found.append(Connections(shares, reading.steps, np.argwhere(nonzero).T.astype(np.int32)))  # pyright: ignore
    return found


# Inside a mass -------------------------------------------------------------------------------------------------------


def _of_past(delayed: Delayed, mass: Model, network: Network | None, dt: float) -> _Way:
    """The connections of each lane with its own past; ``dt`` in seconds.

    Of a mass alone it is the one connection of a network of one region. Of a network they are the diagonal.
    """
    seconds, delays = _seconds(delayed, mass, network)
    lanes = np.arange(network.regions if network else 1)
    own = mass.lanes_of(delayed.of) if isinstance(mass, Groups) else None
    own = lanes if own is None else np.sort(own)
    sparse = network is not None and all(each.edges is not None for each in network.couplings)
    ends = np.stack([own, own]).astype(np.int32)
    # The last axis of a network's delays is the regions.
    if network is None:
        seconds = seconds[..., None, None]
    else:
        seconds = _broadcast(seconds, (network.regions,))
        seconds = seconds[..., own] if sparse else _broadcast(seconds[..., None], (network.regions,) * 2)
    weights = np.ones(len(own)) if sparse else np.diag(np.isin(lanes, own).astype(np.float64))
    found = []
    for reading in readings(seconds, delays, dt):
        shares: Any = weights
        if reading.share is not None:
            shares, share = of_one_shape(weights, reading.share)
            shares = shares * share
        kind, shares = (SparseConnections, shares[..., None, :]) if sparse else (Connections, shares)
        found.append(kind(shares, reading.steps, ends))  # pyright: ignore
    depth = delays.depth(dt) if delays.live else max(map(depth_of, found))
    return _Way(found, delays.live, depth)


def _broadcast(x, shape: tuple[int, ...]):
    shape = np.broadcast_shapes(np.shape(x), shape)
    return jnp.broadcast_to(x, shape) if isinstance(x, jax.Array) else np.broadcast_to(x, shape)


def _seconds(delayed: Delayed, mass: Model, network: Network | None) -> tuple[Any, Delays]:
    """A delay inside a mass in seconds, as its parameter is shaped, or ``()`` where it is one number; and its kind."""
    name, most = delayed.by, delayed.most
    seconds = units.strip(wide(getattr(mass, name)), u.second, name) * delayed.factor
    seconds = mass.spread(name, seconds) if isinstance(mass, Groups) else seconds
    if is_traced(seconds) or not is_whole(seconds):
        if most is None:
            what = "is traced by jit, vmap or grad" if is_traced(seconds) else "is spread over processes"
            raise TypeError(
                f"'{name}' {what}, so that the longest delay is not known beforehand: say it in the model, "
                f"bk.Delayed({delayed.of!r}, by={name!r}, max_delay=...), a time"
            )
        return jnp.asarray(seconds), Delays(most=most, interpolate=delayed.interpolate)
    seconds = np.asarray(values_here(seconds), np.float64)
    longest = longest_of(seconds, name, most, True)
    if seconds.size and np.all(seconds == seconds.flat[0]):
        return np.asarray(seconds.flat[0]), Delays(interpolate=delayed.interpolate)
    if network and seconds.ndim == 1:
        return seconds, Delays(interpolate=delayed.interpolate)
    return seconds, Delays(most=longest, interpolate=delayed.interpolate)


# What was sent before ------------------------------------------------------------------------------------------------


def histories_of(model: Network | Model, given: Any, depths: tuple[int, ...], dt: float) -> tuple:
    """What was sent before the first step, of each quantity ``(its depth, *batch)``; ``None`` by default."""
    unit_of = sent_of(model)
    if given is None:
        return (None,) * len(depths)
    if not isinstance(given, Mapping):
        if len(depths) > 1:
            names = ", ".join(map(repr, unit_of))
            raise TypeError(
                f"'history' got {type(given).__name__}, but takes a dict, as several quantities are sent: {names}"
            )
        given = dict.fromkeys(unit_of, given)
    for name in given:
        check_name(name, unit_of, "quantity in 'history'")
    regions = parts_of(model)[0]
    regions = None if regions is None else regions.regions
    found = [
        _history(regions, given.get(name), unit, name if len(depths) > 1 else "history", depth, dt)
        for (name, unit), depth in zip(unit_of.items(), depths, strict=True)
    ]
    return tuple(found)


def _history(regions: int | None, history: Any, unit, name: str, depth: int, dt: float):
    """What was sent before the first step, ``(depth, *batch)``; ``None`` by default, of masses without regions."""
    if history is None:
        return None
    if not depth:
        raise ValueError(f"'{name}' was given, but this {'model' if regions is None else 'network'} has no delays")
    if callable(history):
        history = history(u.Quantity(np.arange(-depth, 0) * dt, unit=u.second))
        history = history[:, None] if np.ndim(history) == 1 and regions is not None else history
    if history is None:
        return None
    history = units.strip(history, unit, name)
    refuse_nan(history, name)
    if np.ndim(history) < (1 if regions is None else 2):
        history = jnp.broadcast_to(history, (depth, *(np.shape(history) or (1,) * (regions is not None))))
    if np.shape(history)[0] != depth:
        takes = "one value, one for each region, or" if regions is not None else "one value or"
        tail = "" if regions is None else f", {regions}"
        raise ValueError(
            f"'{name}' got shape {np.shape(history)}, but takes {takes} ({depth}, *batch{tail}): the longest delay is "
            f"{depth} steps"
        )
    return history
