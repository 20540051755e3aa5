"""A model or a network as a system of differential equations: its field, and the field's derivatives at a point.

What is said of one region is a function of numbers; `jax.vmap` takes it to all regions. The only thing that mixes
regions are the sums over connections, which are linear, so that the derivatives of a network are those of its regions
and the weights. A single mass is a network of one region.

Everything here has states in declared units and time in the model's unit. A mass is rarely alone: arrays are of one
member of a batch, with regions as their first axis ``(N, ...)``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np

from . import units
from ._jax import is_traced
from .arguments import Held
from .authoring import check_methods
from .coupling import Link, wiring
from .equations import Key, key_of
from .groups import Groups
from .models.base import Model, check_model, check_name
from .network import Network, parts_of
from .sparsity import Static


@dataclasses.dataclass(frozen=True)
class Path:
    """Connections without data, that carry quantities to sums.

    Attributes
    ----------
    reads : the quantities, in the order of the sums
    ends : of sparse weights, rows and columns of the values ``(2, E)``; ``None`` of a matrix
    own : the parameter that is the delay of a mass's own past, and what of it that is in the model's unit of time; then
        there are no weights
    delayed : whether what arrives was sent earlier
    batched : whether weights and delays are of each member of the batch
    """

    reads: tuple[int, ...]
    ends: Static | None = None
    own: tuple[str, float] | None = None
    delayed: bool = False
    batched: tuple[bool, bool] = (False, False)


@dataclasses.dataclass(frozen=True)
class System:
    """All that decides the programs of a system, without data.

    Attributes
    ----------
    model : the model's class
    links : how the regions are coupled
    paths : of each link, and of each delay inside a mass, its connections
    inputs, noisy, of : names of the inputs, of those and of states with noise, and of the observable
    regions : their number
    active : ``(N, n)``, which states move: those of a region's own group
    dtype : of all arithmetic
    equations : the key of all that the equations read
    """

    model: type[Model] = dataclasses.field(compare=False)
    links: tuple[Link, ...]
    paths: tuple[Path, ...]
    noisy: tuple[str, ...]
    of: str
    regions: int
    active: Static
    dtype: Any
    equations: Key = dataclasses.field(init=False, repr=False)

    def __post_init__(self):
        kinds = tuple(link.rule for link in self.links)
        settings = jax.config.jax_enable_x64, jax.config.jax_numpy_dtype_promotion  # pyright: ignore
        object.__setattr__(self, "equations", key_of(self.model, kinds, settings))

    @property
    def states(self) -> int:
        return len(self.model.states)

    @property
    def past(self) -> Mapping[str, Any]:
        """The delays inside a mass, by the name under which its equations read them."""
        return self.model.delayed

    @property
    def quantities(self) -> int:
        """How many numbers each region sends."""
        return len(wiring(self.links)[0]) + len(self.past)

    @property
    def sums(self) -> int:
        """How many sums arrive at each region."""
        return sum(len(path.reads) for path in self.paths)

    @property
    def delayed(self) -> bool:
        return any(path.delayed for path in self.paths)

    @functools.cached_property
    def factors(self):
        return self.model.time_factors()

    @functools.cached_property
    def seconds(self) -> float:
        """Of the model's unit of time."""
        return float(u.Quantity(1.0, unit=self.model.time_unit).to_decimal(u.second))


class Data(NamedTuple):
    """The arrays of a system, of a batch or of one member of it.

    Attributes
    ----------
    regional : parameters, inputs, intensities of noise and constants of couplings by name, each ``(L, N)``
    start : where a search begins, ``(L, N, n)``
    connections : of each path weights and delays, as `System.paths` says with a batch ``(L, ...)`` or without; delays
        are in the model's unit of time
    """

    regional: tuple[dict[str, Any], ...]
    start: Any
    connections: tuple[tuple[Any, Any], ...]

    def axes(self, system: System) -> Data:
        """The axis of the batch in each array, for `jax.vmap`."""
        batched = tuple(tuple(0 if flag else None for flag in path.batched) for path in system.paths)
        return Data(jax.tree.map(lambda _: 0, self.regional), 0, batched)  # pyright: ignore


class Prepared(NamedTuple):
    """A system, its data, and the shape of the batch, in which the regions of a network are the last axis."""

    system: System
    data: Data
    batch: tuple[int, ...]
    mass: Model

    @property
    def lanes(self) -> np.ndarray | None:
        """The regions that the observable is of, of a network of groups."""
        return self.mass.lanes_of(self.system.of) if isinstance(self.mass, Groups) else None


# From arguments -------------------------------------------------------------------------------------------------------


def prepare(model: Model | Network, inputs, initial, noise, of: str | None) -> Prepared:
    """Check the arguments, and separate what decides the programs from the data.

    Raises
    ------
    ValueError, TypeError : an argument's name, unit, shape or value, or a model that has a step but no drift
    """
    network, mass = parts_of(model)
    check_model(mass, ", or a bk.Network of one")
    if mass.scheme == "given":
        raise TypeError(f"'model' got {type(mass).__name__}, which gives its step, but takes a model that has a drift")
    of = next(iter(mass.recordable())) if of is None else of
    if not isinstance(of, str):
        raise TypeError(f"'of' got {type(of).__name__}, but takes the name of an observable or state")
    check_name(of, mass.recordable(), "observable or state in 'of'")
    held = Held.of(mass, inputs, initial, noise)
    couplings = network.couplings if network else ()
    found = [*map(_connections, couplings)]
    constants = network.magnitudes() if network else {}
    shapes = {f"coupling.{n}": np.shape(x) for n, x in constants.items()}
    if network:
        for coupling, (weights, delays) in zip(couplings, found):
            rank = 2 if coupling.edges is None else 1
            for what, x in (("weights", weights), ("delays", delays)):
                if np.ndim(x) >= rank:
                    shapes[coupling.link.full(what)] = (*np.shape(x)[:-rank], network.regions)
    batch = held.batch(shapes)
    if network and batch[-1:] != (network.regions,):
        raise ValueError(f"the last axis of the batch {batch} is not the {network.regions} regions of the network")
    dtype = held.dtype([*constants.values(), *(weights for weights, _ in found)])
    regions, count = (network.regions if network else 1), np.prod(batch[:-1] if network else batch, dtype=int)
    scale = float(u.Quantity(1.0, unit=u.second).to_decimal(mass.time_unit))
    paths, connections = _paths(mass, network, found, batch, count, dtype, scale)
    links = network.links if network else ()
    system = System(type(mass), links, paths, tuple(held.noise), of, regions, _active(mass, regions), np.dtype(dtype))
    check_methods(system.model, mass.scheme, [jax.ShapeDtypeStruct((), dtype)], system.noisy)

    def lanes_of(x):
        # What is known is spread on the host: each small operation would be a program to compile.
        xp = jnp if is_traced(x) else np
        return xp.broadcast_to(xp.asarray(x, dtype), batch).reshape(count, regions)

    needed = {link.full(n) for link in links for n in link.parameters}
    groups = (held.parameters, held.inputs, held.noise, {n: x for n, x in constants.items() if n in needed})
    regional = tuple({n: lanes_of(x) for n, x in group.items()} for group in groups)
    states = [lanes_of(held.state[n]) for n in mass.states]
    start = (jnp if any(map(is_traced, states)) else np).stack(states, -1)
    return Prepared(system, Data(regional, start, connections), batch, mass)


def _connections(coupling) -> tuple[Any, Any]:
    """Weights, and delays in seconds or ``None``, of a coupling; of sparse ones in the order of its edges."""
    delays = coupling.delays
    if delays is not None and coupling.edges is not None:
        delays = delays[..., coupling.edges.order]
    return coupling.connections(), delays


def _paths(mass, network, found, batch, count: int, dtype, scale: float):
    """The paths of all links and of a mass's own past, and their data with delays in the model's unit of time."""
    paths, connections, links = [], [], network.links if network else ()
    for coupling, reads, (weights, delays) in zip(network.couplings if network else (), wiring(links)[1], found):
        edges = coupling.edges
        rank, flags, arrays = (2 if edges is None else 1), [], []
        for x, factor in ((weights, 1.0), (delays, scale)):
            xp = jnp if is_traced(x) else np
            x = np.zeros((), dtype) if x is None else xp.asarray(x, dtype) * np.asarray(factor, dtype)
            flags.append(np.ndim(x) > rank)
            if flags[-1]:
                own = x.shape[-rank:]
                x = xp.broadcast_to(x, (*batch[:-1], *own)).reshape(count, *own)
            arrays.append(x)
        ends = None if edges is None else Static(edges.ends)
        delayed = delays is not None and not _all_zero(delays)
        paths.append(Path(reads, ends, None, delayed, (flags[0], flags[1])))
        connections.append(tuple(arrays))
    first = len(wiring(links)[0])
    for k, past in enumerate(mass.delayed.values()):
        factor = float(past.factor) * mass.time_factors().parameters.get(past.by, 1.0)
        paths.append(Path((first + k,), None, (past.by, factor), True))
        connections.append((np.zeros((), dtype), np.zeros((), dtype)))
    return tuple(paths), tuple(connections)


def _all_zero(x) -> bool:
    return not is_traced(x) and not np.any(np.asarray(x))


def _active(mass: Model, regions: int) -> Static:
    active = np.ones((regions, len(mass.states)), bool)
    if isinstance(mass, Groups):
        for k, name in enumerate(mass.states):
            lanes = mass.lanes_of(name)
            if lanes is not None:
                active[:, k] = np.isin(np.arange(regions), lanes)
    return Static(active)


# One region -----------------------------------------------------------------------------------------------------------


def _known(system: System, regional, x):
    """The parameters and the state as the equations take them, and all that can be recorded, in declared units."""
    p = SimpleNamespace(**units.inside(regional[0], system.factors.parameters))
    state = dict(zip(system.model.states, x))
    s = SimpleNamespace(**units.inside(state, system.factors.states))
    return p, s, {**state, **units.outside(system.model.observe(s, p), system.factors.observables)}


def rates(system: System, regional, x, totals, push):
    """The time derivative of a region's states ``(n,)``.

    Parameters
    ----------
    regional : `Data.regional` of one region, numbers
    x : states, ``(n,)``
    totals : sums that arrive, ``(T,)``
    push : what noise of intensity 1 is at this moment, ``(m,)``
    """
    _, inputs, sigmas, constants = regional
    p, s, known = _known(system, regional, x)
    inputs, late, arriving = dict(inputs), {}, iter(totals)
    for link, path in zip(system.links, system.paths):
        arrived = tuple(next(arriving) for _ in path.reads)
        inputs[link.target] = inputs[link.target] + link.rule.received(
            arrived, known[link.source], link.constants(constants)
        )
    shown = {**system.factors.states, **system.factors.observables}
    for name, past in system.past.items():
        late[name] = units.scaled(next(arriving), shown.get(past.of, 1.0))
    noise = {n: sigma * z for (n, sigma), z in zip(sigmas.items(), push)}
    inputs = {n: x + noise[n] if n in noise else x for n, x in inputs.items()}
    given = SimpleNamespace(**units.inside(inputs, system.factors.inputs), **late)
    drift = dict(system.model.drift(s, p, given))
    on_states = units.inside({n: x for n, x in noise.items() if n not in inputs}, system.factors.states)
    if on_states:
        factors = system.model.diffusion(s, p)
        for n, x in on_states.items():
            drift[n] = drift[n] + (x * factors[n] if n in factors else x)
    drift = units.outside(drift, system.factors.states)
    return jnp.stack([jnp.asarray(drift[n], system.dtype) for n in system.model.states])


def sent(system: System, regional, x):
    """What a region sends, ``(Q,)``."""
    _, _, known = _known(system, regional, x)
    quantities = [
        link.rule.sent(known[link.source], link.constants(regional[3]))[quantity.part]
        for quantity in wiring(system.links)[0]
        for link in (system.links[quantity.link],)
    ]
    quantities += [known[past.of] for past in system.past.values()]
    return _stacked(quantities, system.dtype)


def observed(system: System, regional, x):
    """The observable of a region, a number."""
    return jnp.asarray(_known(system, regional, x)[2][system.of], system.dtype)


def of_one_region(system: System, data: Data) -> tuple[Any, tuple[Any, ...]]:
    """A function of all that a region computes, and shapes of its arguments: what tells two systems apart."""

    def everything(regional, x, totals, push):
        known = sent(system, regional, x), observed(system, regional, x)
        return rates(system, regional, x, totals, push), *known

    number = jax.ShapeDtypeStruct((), system.dtype)
    sizes = system.states, system.sums, len(system.noisy)
    vectors = (jax.ShapeDtypeStruct((n,), system.dtype) for n in sizes)
    return everything, (jax.tree.map(lambda _: number, data.regional), *vectors)


def observed_all(system: System, data: Data, x) -> dict[str, Any]:
    """All that can be recorded of all regions at the states ``(N, n)``, each ``(N,)``."""

    def of_region(regional, x):
        known = _known(system, regional, x)[2]
        return {n: jnp.asarray(known[n], system.dtype) for n in system.model.recordable()}

    return jax.vmap(of_region)(data.regional, x)


def _stacked(values, dtype):
    return jnp.stack([jnp.asarray(x, dtype) for x in values]) if values else jnp.zeros((0,), dtype)


# All regions ----------------------------------------------------------------------------------------------------------


def delays_of(path: Path, data: Data, delays):
    """The delays of a path, ``(N, N)``, of sparse weights ``(E,)``, of a mass's own past ``(N,)``; in model time."""
    if path.own is None:
        return delays
    by, factor = path.own
    return data.regional[0][by] * jnp.asarray(factor, delays.dtype)


def spread(path: Path, regions: int, weights, shares):
    """Weights times shares, one for each connection or for all, as a matrix ``(..., N, N)`` from column to row."""
    if path.own is not None:
        return shares[..., None] * jnp.broadcast_to(jnp.eye(regions, dtype=shares.dtype), (*shares.shape, regions))
    values = weights.astype(shares.dtype) * shares if not shares.ndim else _product(weights, shares)
    if path.ends is None:
        return values
    assert path.ends.array is not None
    rows, columns = path.ends.array
    return jnp.zeros((*values.shape[:-1], regions, regions), values.dtype).at[..., rows, columns].add(values)


def _product(weights, shares):
    return jnp.broadcast_to(weights.astype(shares.dtype), shares.shape) * shares


def matrices(system: System, data: Data, share) -> list[Any]:
    """Of each path, its weights times ``share(delays)`` as matrices ``(..., N, N)``; ``share`` is 1 without delays."""
    found = []
    for path, (weights, delays) in zip(system.paths, data.connections):
        known = delays_of(path, data, delays)
        shares = share(known) if path.delayed else jnp.ones(jnp.shape(known) if path.own else (), system.dtype)
        found.append(spread(path, system.regions, weights, shares))
    return found


def arrived(system: System, data: Data, quantities):
    """The sums ``(N, T)`` of quantities ``(N, Q)`` that are constant in time."""
    sums = []
    for path, weights in zip(system.paths, matrices(system, data, lambda d: jnp.ones(jnp.shape(d), system.dtype))):
        sums += [jnp.matmul(weights, quantities[:, q], precision="highest") for q in path.reads]
    return jnp.stack(sums, -1) if sums else jnp.zeros((system.regions, 0), system.dtype)


def field(system: System, data: Data, x):
    """The time derivative of all states ``(N, n)`` at constant ones; those that do not move relax to the start."""
    each = jax.vmap(functools.partial(sent, system))(data.regional, x)
    silence = jnp.zeros((system.regions, len(system.noisy)), system.dtype)
    change = jax.vmap(functools.partial(rates, system))(data.regional, x, arrived(system, data, each), silence)
    return jnp.where(jnp.asarray(system.active.array), change, data.start - x)


class Linear(NamedTuple):
    """The derivatives of each region at a point.

    Attributes
    ----------
    own : ``(N, n, n)``, of its rates by its states
    sums : ``(N, n, T)``, of its rates by the sums that arrive
    noise : ``(N, n, m)``, of its rates by noise of intensity 1
    sent : ``(N, Q, n)``, of what it sends
    observed : ``(N, n)``, of its observable
    """

    own: Any
    sums: Any
    noise: Any
    sent: Any
    observed: Any


def linearised(system: System, data: Data, x) -> Linear:
    """The derivatives of each region at the states ``x``, ``(N, n)``."""
    each = jax.vmap(functools.partial(sent, system))(data.regional, x)
    totals = arrived(system, data, each)

    def of_region(regional, x, totals):
        silence = jnp.zeros((len(system.noisy),), system.dtype)
        change = functools.partial(rates, system, regional)
        own, sums, noise = jax.jacfwd(change, (0, 1, 2))(x, totals, silence)
        of_states = jax.jacfwd(functools.partial(sent, system, regional))(x)
        return Linear(own, sums, noise, of_states, jax.jacfwd(functools.partial(observed, system, regional))(x))

    found = jax.vmap(of_region)(data.regional, x, totals)
    active = jnp.asarray(system.active.array)[..., None]
    eye = jnp.broadcast_to(jnp.eye(system.states, dtype=system.dtype), found.own.shape)
    rest = {name: jnp.where(active, getattr(found, name), 0.0) for name in ("sums", "noise")}
    return found._replace(own=jnp.where(active, found.own, -eye), **rest)
