"""Networks: masses coupled through connectomes, with conduction delays.

A network adds sums to a step of a batch of masses, each linear in what the regions sent some steps ago. The rest of a
coupling is pointwise and belongs to the step: what a region sends, and how the sum enters its input.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from . import display, sparsity
from .coupling import CHILDREN, Coupling, CouplingKind, Link, links_of_past, wiring
from .groups import Groups, Places, union
from .models.base import Model, arrays_of, check_model, check_name


class Network:
    """Regions of one model, coupled through a connectome; `simulate`, `explain` and `fit` take it as a model.

    The last axis is the regions: fields of the model, inputs, initial states and ``k`` broadcast to ``(*batch, N)``.
    A sweep over the strength on one connectome has ``k`` of shape ``(G, 1)``. In every scheme the coupling is constant
    during a step, at its value at the beginning.

    With ``couplings`` the regions are coupled in several ways: each `Coupling` has its own weights, delays, kind,
    source and target. Without, the other arguments describe the only one.

    Parameters
    ----------
    model : of each region; or a dict of groups of regions, each ``(model, regions)``, the regions as their number or
        their indices. What is of a group is ``"cortex.eeg"`` then: records, parameters, inputs, noise, initial states,
        with the regions of the group as their last axis
    weights : ``(N, N)`` or ``(*batch, N, N)``; ``weights[i, j]`` is of the connection from region j to region i. Or
        sparse, a ``BCOO`` of `jax.experimental.sparse` or a matrix of `scipy.sparse`: memory and time are then by
        stored connection. Its pattern is known before tracing and the same for a batch; entries that share a place
        are connections side by side
    delays : ``(N, N)``, a time for each connection, rounded up to whole steps; ``None``, no delays. With sparse
        weights also of their pattern, or ``(E,)``, in the order of the values that they store (``tocoo().data``).
        ``(*batch, N, N)`` where each network has its own
    distances, speed : instead of ``delays``, lengths ``(N, N)`` and the speed of conduction, whose quotient the delays
        are; plain numbers are millimetres and metres a second. A sweep over the speed has a ``speed`` of shape
        ``(G, 1)``, as of ``k``: the last axis is the regions that the connections go to
    max_delay : the longest delay that there may be, a time. It makes the delays data of the run, so that other ones
        compile nothing anew, and is needed where they are traced by jit, vmap or grad; ``speed`` is a constant of the
        coupling then, which fits and sweeps can vary. A traced delay beyond it, or a negative one, gives NaN
    interpolate : read what arrives linearly between two steps instead of rounding the delays, which also gives
        gradients in delays, distances and speed
    coupling : "additive" ``k sum_j w_ij x_j + b``; "diffusive" ``k sum_j w_ij (x_j - x_i)``; "laplacian", the same
        plus ``b``; "sigmoidal" ``k / (1 + exp(-slope (a sum_j w_ij x_j + b - midpoint)))``; "tanh"
        ``k tanh(scale sum_j w_ij x_j)``; "sigmoidal_jansen_rit"
        ``k sum_j w_ij (cmin + (cmax - cmin) / (1 + exp(r (midpoint - x_j))))``; "kuramoto"
        ``k sum_j w_ij sin(x_j - x_i)``; ``x_j`` is delayed, ``x_i`` is not. Or a `CouplingKind`
    source : an observable or state of the model; ``None``, its first observable or state
    target : the input of the model to which the coupling is added; ``None``, its first
    k : strength, in the unit of the target over that of the source for the first three kinds, else in that of the
        target
    self_connection : whether the diagonal of ``weights`` counts
    couplings : a list of `Coupling`, or a dict of them by name, instead of all the arguments before. Their constants
        are ``"coupling.<name>.k"`` in fits and sweeps
    **parameters : the other constants of the coupling; plain numbers, ``b`` of "additive" and "laplacian" in the unit
        of the target

    A run starts from a history, what each region sent before time 0: ``initial={"history": ...}``, one value, one for
    each region, ``(H, *batch, N)`` for the ``H`` steps of the longest delay with the oldest first, or a function of
    the (negative) time. By default it is what the initial state sends. ``result.final["history"]`` continues exactly.
    Where several quantities are sent, it is a dict of them: a source that is sent as it is by its name, what a kind
    makes of it by the name of the coupling, with ``.0``, ``.1`` where these are two.

    Raises
    ------
    ValueError, TypeError : a name, unit, shape or value, before anything is compiled

    References
    ----------
    Sanz-Leon et al. 2015, NeuroImage 111:385 (the couplings); the names are those of `brainmass.Network`.
    """

    def __init__(
        self, model: Model | Mapping[str, tuple], weights=None, *, delays=None, distances=None, speed=None,
        max_delay=None, interpolate: bool = False, coupling: str | CouplingKind = "additive",
        source: str | Mapping[str, str] | None = None, target: str | Mapping[str, str] | None = None, k=None,
        self_connection: bool = False,
        couplings: Sequence[Coupling] | Mapping[str, Coupling] | None = None, **parameters,
    ):  # fmt: skip
        if couplings is None:
            if weights is None:
                raise ValueError("'weights' is needed, or 'couplings', a list of bk.Coupling")
            one = Coupling(
                weights, kind=coupling, source=source, target=target, k=k, delays=delays, distances=distances,
                speed=speed, max_delay=max_delay, interpolate=interpolate, self_connection=self_connection,
                **parameters,
            )  # fmt: skip
            couplings = [one]
        else:
            others = {
                "weights": weights, "delays": delays, "distances": distances, "speed": speed, "max_delay": max_delay,
                "interpolate": interpolate or None, "coupling": None if coupling == "additive" else coupling,
                "source": source, "target": target, "k": k, "self_connection": self_connection or None, **parameters,
            }  # fmt: skip
            if wrong := [name for name, x in others.items() if x is not None]:
                raise TypeError(f"'{wrong[0]}' was given beside 'couplings', each of which has its own")
        self.model = grouped(model, _listed(couplings)) if isinstance(model, Mapping) else model
        check_model(self.model, ", or a dict of groups of regions")
        model = self.model
        self.couplings: tuple[Coupling, ...] = tuple(
            each.bound(model, name) for name, each in _named(couplings).items()
        )
        counts = {each.link.name: each.regions for each in self.couplings}
        if len({*counts.values()}) > 1:
            raise ValueError(f"'couplings' got weights of different numbers of regions: {counts}")
        if isinstance(model, Groups) and model.regions != self.regions:
            raise ValueError(f"'weights' has {self.regions} regions, but the groups have {model.regions}")

    # The couplings ---------------------------------------------------------------------------------------------------

    @property
    def regions(self) -> int:
        """The number of regions."""
        return self.couplings[0].regions

    def regions_of(self, name: str) -> int:
        """The number of regions that a quantity is of: all, or those of its group."""
        lanes = self.model.lanes_of(name) if isinstance(self.model, Groups) else None
        return self.regions if lanes is None else len(lanes)

    @property
    def links(self) -> tuple[Link, ...]:
        """Of each coupling, how it couples, without data."""
        return tuple(each.link for each in self.couplings)

    @property
    def only(self) -> Coupling:
        """The coupling of a network that has one.

        Raises
        ------
        ValueError : if it has several
        """
        one, *others = self.couplings
        if others:
            names = ", ".join(repr(each.link.name) for each in self.couplings)
            raise ValueError(f"the network has several couplings ({names}): ask one of network.couplings")
        return one

    @property
    def weights(self):
        """Of the only coupling."""
        return self.only.weights

    @property
    def delays(self) -> np.ndarray | None:
        """Of the only coupling, in seconds."""
        return self.only.delays

    @property
    def self_connection(self) -> bool:
        """Whether the diagonal of the weights counts, of the only coupling."""
        return self.only.self_connection

    @property
    def link(self) -> Link:
        """How the only coupling couples, without data."""
        return self.only.link

    @property
    def edges(self) -> sparsity.Edges | None:
        """The connections of sparse weights of the only coupling; ``None`` of a matrix."""
        return self.only.edges

    @property
    def strength_unit(self):
        """The unit of ``k``, of the only coupling."""
        return self.only.parameter_units(self.model)["k"]

    @property
    def sent_unit(self):
        """The unit of what is sent, and of the history, of the only coupling."""
        return self.only.sent_unit(self.model)

    def connections(self) -> Any:
        """The weights of the only coupling, ``(*batch, N, N)``, of sparse ones ``(*batch, E)``."""
        return self.only.connections()

    @property
    def parameters(self) -> dict[str, Any]:
        """The constants of the couplings; where there are several, by ``"<name of the coupling>.<constant>"``."""
        if len(self.couplings) == 1 and not self.couplings[0].link.name:
            return self.couplings[0].parameters
        return {each.link.full(n): x for each in self.couplings for n, x in each.parameters.items()}

    def delay_steps(self, dt: float) -> np.ndarray:
        """Each delay of the only coupling in whole steps, rounded up, ``(N, N)``; ``dt`` in seconds."""
        return self.only.delay_steps(dt)

    def sent(self) -> dict[str, Any]:
        """The quantities that the regions send, by their names in a history, with their units."""
        return sent_of(self)

    def parameter_units(self) -> dict[str, Any]:
        """The unit of each constant of the couplings."""
        return {
            each.link.full(n): unit for each in self.couplings for n, unit in each.parameter_units(self.model).items()
        }

    def magnitudes(self) -> dict[str, Any]:
        """The constants of the couplings as plain arrays, by their full names."""
        return {each.link.full(n): x for each in self.couplings for n, x in each.magnitudes(self.model).items()}

    def _repr_html_(self) -> str:
        return display.network_table(self)

    def __repr__(self) -> str:
        # In a tree that was mapped, the weights may be anything.
        regions = f"{self.regions} regions" if getattr(self.couplings[0].weights, "shape", ()) else "regions"
        ways = ", ".join(repr(each)[len("Coupling(") : -1] for each in self.couplings)
        return f"Network({regions} of {type(self.model).__name__}, {ways})"

    # As a pytree -----------------------------------------------------------------------------------------------------

    def tree_flatten(self):
        if len(self.couplings) == 1:
            children, static = self.couplings[0].tree_flatten()
            return (self.model, *children), static
        return (self.model, self.couplings), None

    @classmethod
    def tree_unflatten(cls, static, children) -> Network:
        self = object.__new__(cls)
        self.model, *rest = children
        self.couplings = rest[0] if static is None else (Coupling.tree_unflatten(static, rest),)
        return self

    def as_arrays(self) -> Network:
        """The network with weights, constants of the couplings and fields of the model as JAX arrays, units kept."""
        return arrays_of(self)

    def replace(self, **changes) -> Network:
        """The network with another ``model``, ``weights`` or constant of the coupling.

        Of a network with several couplings, the names are ``"<name>.weights"`` and ``"<name>.k"``, which a dict can
        give: ``network.replace(**{"cortical.k": 2.0})``. Of a coupling with sparse weights, the weights may be the
        values alone, ``(E,)`` or ``(*batch, E)``.
        """
        known = {"model": self.model}
        for each in self.couplings:
            known |= {each.link.full("weights"): each.weights}
            known |= {each.link.full(n): x for n, x in each.parameters.items()}
        for name in changes:
            check_name(name, known, "field of the network", TypeError)
        fields, other = {**known, **changes}, object.__new__(Network)
        other.model = fields["model"]
        check_model(other.model)
        other.couplings = tuple(
            each.replaced(
                other.model, fields[each.link.full("weights")], {n: fields[each.link.full(n)] for n in each.parameters}
            )
            for each in self.couplings
        )
        return other


def _named(couplings) -> dict[str, Coupling]:
    """Each coupling by its name in the network; the only one needs none."""
    if isinstance(couplings, Mapping):
        named = [(str(name), each) for name, each in couplings.items()]
    elif isinstance(couplings, Sequence):
        named = [(getattr(getattr(each, "link", None), "name", ""), each) for each in couplings]
    else:
        raise TypeError(f"'couplings' got {type(couplings).__name__}, but takes a list or dict of bk.Coupling")
    if not named:
        raise ValueError("'couplings' is empty, but takes at least one bk.Coupling")
    for name, each in named:
        if not isinstance(each, Coupling):
            raise TypeError(f"'couplings' got {type(each).__name__}, but takes bk.Coupling")
        if name and not name.isidentifier():
            raise ValueError(f"'couplings' got the name {name!r}, but takes words such as 'thalamocortical'")
    if len(named) > 1:
        kinds = [each.link.label.replace(" ", "_") for _, each in named]
        named = [(name or _numbered(i, kinds, named), each) for i, (name, each) in enumerate(named)]
    twice = [name for name, count in collections.Counter(name for name, _ in named).items() if count > 1]
    if twice:
        raise ValueError(f"'couplings' has two of the name '{twice[0]}': give each its own, bk.Coupling(..., name=...)")
    return dict(named)


def _listed(couplings) -> list[Coupling]:
    every = couplings.values() if isinstance(couplings, Mapping) else couplings
    return [each for each in every if isinstance(each, Coupling)]


def grouped(groups: Mapping, couplings: Sequence[Coupling]) -> Groups:
    """The model of groups of regions, with what the couplings read and drive in each."""

    def places(value) -> Places | None:
        if not isinstance(value, str):
            return value
        group, dot, name = value.partition(".")
        return Places(((group, name),)) if dot and group in groups else None

    for each in couplings:
        for what, value in (("source", each.link.source), ("target", each.link.target)):
            if value is None:
                raise ValueError(
                    f"'{what}' is needed in a network of groups, such as {what}='{next(iter(groups))}.name'"
                )
    sources = [places(each.link.source) for each in couplings]
    targets = [each.link.target for each in couplings]
    return union(groups, [x for x in sources if x], [x for x in targets if isinstance(x, Places)])


def _numbered(i: int, kinds: Sequence[str], named: Sequence[tuple[str, Coupling]]) -> str:
    """The kind of a coupling, with its number among those of its kind that have no name."""
    alike = [k for k, kind in enumerate(kinds) if kind == kinds[i] and not named[k][0]]
    return kinds[i] if len(alike) == 1 else f"{kinds[i]}_{alike.index(i)}"


def _with_keys(network: Network):
    children, static = network.tree_flatten()
    names = ("model", "couplings") if static is None else None
    keys = map(jax.tree_util.GetAttrKey, names) if names else (jax.tree_util.GetAttrKey("model"), *CHILDREN)
    return tuple(zip(keys, children)), static


jax.tree_util.register_pytree_with_keys(Network, _with_keys, Network.tree_unflatten, Network.tree_flatten)


def parts_of(model: Any) -> tuple[Network | None, Model]:
    """The network, or ``None`` for a model, and the model of each lane."""
    return (model, model.model) if isinstance(model, Network) else (None, model)


def links_of(model: Network | Model) -> tuple[Link, ...]:
    """How the lanes of a run are coupled, without data: by the couplings of a network, and each to its own past."""
    network, mass = parts_of(model)
    return (*(network.links if network else ()), *links_of_past(type(mass)))


def sent_of(model: Network | Model) -> dict[str, Any]:
    """The quantities that are sent, by their names in a history, with their units."""
    network, mass = parts_of(model)
    couplings, links = network.couplings if network else (), links_of(model)
    unit_of = [each.sent_unit(mass) for each in couplings]
    unit_of += [mass.recordable()[link.source] for link in links[len(couplings) :]]
    return {quantity.label: unit_of[quantity.link] for quantity in wiring(links)[0]}
