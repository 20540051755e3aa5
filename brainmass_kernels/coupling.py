"""Couplings: what the regions of a network send, through which connections, and how the sum enters their input.

The sum is linear, over what was sent some steps ago, and the kernels of networks make it. The rest of a coupling is
pointwise and belongs to the step.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np

from . import sparsity, units
from ._jax import is_traced
from .delays import SPEED, Known, Reading, check_within, delays_of, readings
from .equations import key_of
from .functional import sigmoid
from .groups import Places
from .models.base import Model, check_name, floating, refuse_nan


def _itself(x, p):
    return x


def _times_strength(total, x, p):
    return p.k * total


@dataclasses.dataclass(frozen=True, eq=False)
class CouplingKind:
    """How a quantity of the source regions becomes an input of the target: two pointwise functions around a sum.

    Each region sends ``send(x, p)``, of its source ``x``; what all regions send is summed over the connections, with
    the weights; and ``receive(sum, x, p)`` is added to the target, ``x`` being the source of the target region, without
    delay. Both are written like the methods of a `Model`, of plain numbers in declared units.

    Attributes
    ----------
    send : ``(x, p) -> number`` or a tuple of numbers, each of which is summed
    receive : ``(sum, x, p) -> number`` in the unit of the target; ``sum`` is a tuple where ``send`` returns one. By
        default ``p.k * sum``, as ``send`` is by default the source itself
    parameters : defaults by name, which ``p`` has. A quantity has its unit; a plain number is dimensionless, but ``k``,
        the strength, is in the unit of the target
    of_source : whether ``k``, and the offset ``b``, turn the unit of the source into that of the target
    with_degree : whether ``p.degree``, the sum of the weights to a region, is read

    Raises
    ------
    TypeError, ValueError : of what is no function or no number

    Examples
    --------
    >>> import brainmass_kernels as bk
    >>> squares = bk.CouplingKind(
    ...     send=lambda x, p: x**2, receive=lambda total, x, p: p.k * total / (1 + total), parameters={"k": 1.0}
    ... )
    """

    send: Callable = dataclasses.field(default_factory=lambda: _itself)
    receive: Callable = dataclasses.field(default_factory=lambda: _times_strength)
    parameters: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"k": 1.0})
    of_source: bool = False
    with_degree: bool = False

    def __post_init__(self):
        for name in ("send", "receive"):
            if not callable(getattr(self, name)):
                raise TypeError(f"'{name}' got {getattr(self, name)!r}, but takes a function")
        if not isinstance(self.parameters, Mapping):
            raise TypeError(f"'parameters' got {type(self.parameters).__name__}, but takes a dict of defaults by name")
        for name, value in self.parameters.items():
            if not str(name).isidentifier() or name == "degree":
                raise ValueError(f"'parameters' got the name {name!r}, but takes names such as 'k' (not 'degree')")
            if np.ndim(u.get_magnitude(value)) or not np.isreal(u.get_magnitude(value)):
                raise ValueError(f"'parameters' got {value!r} for '{name}', but takes one real number")

    @functools.cached_property
    def _key(self):
        flags = tuple(self.parameters), self.of_source, self.with_degree
        # The values of defaults are data, but their units decide the program.
        return key_of(self.send, self.receive, flags, tuple(str(units.unit_of(x)) for x in self.parameters.values()))

    def __eq__(self, other) -> bool:
        return isinstance(other, CouplingKind) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def sends_source(self) -> bool:
        """Whether the source itself is sent, and so is in its unit."""
        return self.send is _itself

    @functools.cached_property
    def sums(self) -> int | None:
        """How many numbers `send` returns, in a tuple; ``None`` of one without."""
        plain = SimpleNamespace(**{n: float(u.get_magnitude(x)) for n, x in self.parameters.items()})
        sent = jax.eval_shape(lambda x: self.send(x, plain), jax.ShapeDtypeStruct((), jnp.float32))
        return len(sent) if isinstance(sent, tuple) else None

    def sent(self, source, p: SimpleNamespace) -> tuple:
        """Each of the numbers that are sent."""
        sent = self.send(source, p)
        return (sent,) if self.sums is None else tuple(sent)

    def received(self, totals: tuple, own, p: SimpleNamespace):
        """What is added to the target, from the sums and the source of the region."""
        return self.receive(totals[0] if self.sums is None else totals, own, p)


COUPLINGS: dict[str, CouplingKind] = {
    "additive": CouplingKind(
        receive=lambda c, x, p: p.k * c + p.b, parameters={"k": 1.0, "b": 0.0}, of_source=True,
    ),
    "diffusive": CouplingKind(
        receive=lambda c, x, p: p.k * (c - p.degree * x), of_source=True, with_degree=True,
    ),
    # The Laplacian of the weights, summed like "additive": its diagonal acts without delay.
    "laplacian": CouplingKind(
        receive=lambda c, x, p: p.k * (c - p.degree * x) + p.b, parameters={"k": 1.0, "b": 0.0}, of_source=True,
        with_degree=True,
    ),
    "sigmoidal": CouplingKind(
        receive=lambda c, x, p: p.k * sigmoid(p.a * c + p.b, v0=p.midpoint, r=p.slope),
        parameters={"k": 1.0, "a": 1.0, "b": 0.0, "slope": 1.0, "midpoint": 0.0},
    ),
    "tanh": CouplingKind(receive=lambda c, x, p: p.k * jnp.tanh(p.scale * c), parameters={"k": 0.5, "scale": 2.0}),
    "sigmoidal_jansen_rit": CouplingKind(
        lambda x, p: p.cmin + sigmoid(x, p.cmax - p.cmin, p.midpoint, p.r),
        parameters={"k": 1.0, "cmin": 0.0, "cmax": 0.005, "midpoint": 6.0, "r": 0.56},
    ),
    # sin(x_j - x_i) by two sums.
    "kuramoto": CouplingKind(
        lambda x, p: (jnp.sin(x), jnp.cos(x)),
        lambda c, x, p: p.k * (c[0] * jnp.cos(x) - c[1] * jnp.sin(x)),
    ),
}  # fmt: skip


# What a mass reads of its own past: it is sent to itself, and read as it arrives.
OWN_PAST = CouplingKind(receive=lambda late, x, p: late, parameters={})


class Link(NamedTuple):
    """How the regions of a network are coupled, without data; it is part of a step's specification.

    Attributes
    ----------
    kind : a name in `COUPLINGS`, or a kind of the user's own
    source : the observable or state that is sent
    target : the input to which the coupling is added
    name : of the coupling, where a network has several
    """

    kind: str | CouplingKind
    source: str
    target: str
    name: str = ""

    @property
    def rule(self) -> CouplingKind:
        return COUPLINGS[self.kind] if isinstance(self.kind, str) else self.kind

    @property
    def label(self) -> str:
        """The kind in a word."""
        return self.kind if isinstance(self.kind, str) else "own kind"

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the constants that the functions of the kind read."""
        return (*self.rule.parameters, *(("degree",) if self.rule.with_degree else ()))

    def full(self, name: str) -> str:
        """The name of a constant among those of all couplings of the network."""
        return f"{self.name}.{name}" if self.name else name

    def constants(self, values: Mapping[str, Any]) -> SimpleNamespace:
        """This coupling's constants, from those of all by their full names."""
        return SimpleNamespace(**{n: values[self.full(n)] for n in self.parameters})


def links_of_past(model: type[Model]) -> tuple[Link, ...]:
    """How a mass is coupled to its own past: for each of its delayed quantities, the source and the name it reads."""
    return tuple(Link(OWN_PAST, each.of, name, name) for name, each in model.delayed.items())


class Quantity(NamedTuple):
    """One of the quantities that each region of a network sends.

    Attributes
    ----------
    link : the number of a link that sends it
    part : which of the numbers that the link sends
    label : its name in a history
    """

    link: int
    part: int
    label: str


@functools.lru_cache(maxsize=256)
def wiring(links: tuple[Link, ...]) -> tuple[tuple[Quantity, ...], tuple[tuple[int, ...], ...]]:
    """The quantities that are sent, and for each link those that it sums; links that send a source itself share it."""
    quantities: list[Quantity] = []
    reads: list[tuple[int, ...]] = []
    shared: dict[str, int] = {}
    for i, link in enumerate(links):
        if link.rule.sends_source and link.source in shared:
            reads.append((shared[link.source],))
            continue
        first, count = len(quantities), link.rule.sums
        name = link.source if link.rule.sends_source else link.name or link.label
        for part in range(count or 1):
            quantities.append(Quantity(i, part, name if count is None else f"{name}.{part}"))
        reads.append(tuple(range(first, len(quantities))))
        if link.rule.sends_source:
            shared[link.source] = first
    return tuple(quantities), tuple(reads)


class Coupling:
    """One coupling of a `Network`: connections, with their delays, and how what is sent enters an input.

    Parameters
    ----------
    weights : ``(N, N)`` or ``(*batch, N, N)``; ``weights[i, j]`` is of the connection from region j to region i. Or
        sparse, a ``BCOO`` of `jax.experimental.sparse` or a matrix of `scipy.sparse`
    kind : a name, as ``coupling`` of `Network`, or a `CouplingKind`
    source : an observable or state of the model; ``None``, its first observable or state. In a network of groups
        ``"cortex.eeg"``, which other regions do not send, or a dict of names by group
    target : the input of the model to which the coupling is added; ``None``, its first; by group likewise
    k : strength, in the unit of the target over that of the source, or, where the sum enters a plain number, in that of
        the target
    delays, distances, speed, max_delay, interpolate : as of `Network`
    self_connection : whether the diagonal of ``weights`` counts
    name : by which its constants are ``"coupling.<name>.k"``; ``None``, its kind, with a number where others have it
    **constants : the other constants of the kind; plain numbers, ``b`` of "additive" and "laplacian" in the unit of the
        target

    Raises
    ------
    ValueError, TypeError : a name, unit, shape or value; what depends on the model, when a `Network` takes it

    References
    ----------
    Sanz-Leon et al. 2015, NeuroImage 111:385.
    """

    def __init__(
        self, weights, *, kind: str | CouplingKind = "additive", source: str | Mapping[str, str] | None = None,
        target: str | Mapping[str, str] | None = None, k=None, delays=None, distances=None, speed=None, max_delay=None,
        interpolate: bool = False, self_connection: bool = False, name: str | None = None, **constants,
    ):  # fmt: skip
        if not isinstance(kind, CouplingKind):
            check_name(kind, COUPLINGS, "coupling")
        if name is not None and not (isinstance(name, str) and name.isidentifier()):
            raise ValueError(f"'name' got {name!r}, but takes a word such as 'thalamocortical'")
        # None until a network binds them.
        places = Places.of(source, "source"), Places.of(target, "target")
        self.link = Link(kind, *places, name or "")  # pyright: ignore[reportArgumentType]
        rule, label = self.link.rule, self.link.label
        for constant in constants:
            check_name(constant, [*rule.parameters], f"parameter of coupling '{label}'", TypeError)
        self.self_connection, self.has_strength = bool(self_connection), k is not None
        self.weights = _weights(weights)
        self.conduction, speed = delays_of(delays, distances, speed, self.weights, max_delay, bool(interpolate))
        self.parameters = {**rule.parameters, **constants, **({} if k is None else {"k": k})}
        if speed is not None:
            self.parameters["speed"] = speed

    def bound(self, model: Model, name: str) -> Coupling:
        """The coupling of this model, by its name in the network: everything is checked.

        Raises
        ------
        ValueError, TypeError : a source, target, constant, or unit
        """
        self, (kind, source, target, _) = copy.copy(self), self.link
        if not model.inputs:
            raise ValueError(f"{type(model).__name__} has no input that a coupling could be added to")
        source, target = (x.name if isinstance(x, Places) else x for x in (source, target))
        source = next(iter(model.recordable())) if source is None else source
        target = next(iter(model.inputs)) if target is None else target
        check_name(source, model.recordable(), "source, which is an observable or state,")
        check_name(target, model.inputs, "target, which is an input,")
        self.link = Link(kind, source, target, name)
        self.parameters = dict(self.parameters)
        unit_of = self.parameter_units(model)
        offset = self.parameters.get("b")
        if isinstance(offset, (int, float)) and offset == 0:
            self.parameters["b"] = units.attach(0.0, unit_of["b"])
        if isinstance(kind, str) and not unit_of["k"].is_unitless and not self.has_strength:
            raise ValueError(
                f"'{self.link.full('k')}' is needed: it turns {source} into {target}, in "
                f"{units.name_of(unit_of['k'])}, such as k=1*{unit_of['k']}"
            )
        if isinstance(kind, CouplingKind) and "k" in kind.parameters and not self.has_strength:
            # The default of a kind of the user's own is in the unit that it says, or the target's.
            self.parameters["k"] = units.attach(u.get_magnitude(kind.parameters["k"]), unit_of["k"])
        self.magnitudes(model)
        self.parameters = {name: floating(value) for name, value in self.parameters.items()}
        self.has_strength = True
        return self

    @property
    def regions(self) -> int:
        """The number of regions."""
        return int(np.shape(self.weights)[-1])

    def sent_unit(self, model: Model):
        """The unit of what is sent, and of the history."""
        return model.recordable()[self.link.source] if self.link.rule.sends_source else units.UNITLESS

    def parameter_units(self, model: Model) -> dict[str, Any]:
        """The unit of each constant, by its name in the coupling."""
        rule, target = self.link.rule, units.unit_of(model.inputs[self.link.target])
        unit_of = {n: units.unit_of(x) for n, x in rule.parameters.items()}
        if rule.of_source:
            # The quotient of two units of one dimension is a plain number, but may contain a factor.
            source = model.recordable()[self.link.source]
            unit_of["k"] = units.UNITLESS if target == source else target / source
            if "b" in unit_of:
                unit_of["b"] = target
        elif "k" in unit_of and unit_of["k"].is_unitless:
            unit_of["k"] = target
        return unit_of | ({"speed": SPEED} if "speed" in self.parameters else {})

    def magnitudes(self, model: Model) -> dict[str, Any]:
        """The constants as plain arrays, by their names in `Link.parameters`."""
        values = {}
        for name, unit in self.parameter_units(model).items():
            full = self.link.full(name)
            values[name] = units.strip(self.parameters[name], unit, full)
            refuse_nan(values[name], full)
        if self.link.rule.with_degree:
            values["degree"] = self._degree()
        return values

    @property
    def edges(self) -> sparsity.Edges | None:
        """The connections of sparse weights, sorted by row and column; ``None`` of a matrix."""
        if not sparsity.is_sparse(self.weights):
            return None
        return sparsity.edges_of(sparsity.indices_of(self.weights), self.regions, self.self_connection)

    def connections(self) -> Any:
        """The weights, ``(*batch, N, N)``, with a zero diagonal unless self-connections count.

        Of sparse ones ``(*batch, E)``, in the order of `edges`.
        """
        if self.edges is not None:
            return self.weights.data[..., self.edges.order]
        weights = self.weights if is_traced(self.weights) else np.asarray(self.weights)
        if self.self_connection:
            return weights
        return weights * np.broadcast_to(1.0 - np.eye(self.regions), np.shape(weights)).astype(weights.dtype)

    def _degree(self):
        if self.edges is not None:
            return sparsity.degrees(self.connections(), self.edges.ends, self.regions)
        return jnp.sum(self.connections(), axis=-1)  # pyright: ignore[reportArgumentType]

    @property
    def delays(self) -> Any:
        """In seconds, ``(N, N)``, of sparse weights one for each stored value ``(E,)``; ``None`` without."""
        if self.conduction is None:
            return None
        speed = self.parameters.get("speed")
        return self.conduction.times(None if speed is None else units.strip(speed, SPEED, "speed"))

    def readings(self, dt: float) -> list[Reading]:
        """The steps back that connections read, ``(*batch, N, N)`` or, in the order of `edges`, ``(*batch, E)``."""
        if self.conduction is None:
            return [Reading(np.zeros((self.regions,) * 2 if self.edges is None else self.edges.order.shape, np.int32))]
        delays = self.delays if self.edges is None else self.delays[..., self.edges.order]
        return readings(delays, self.conduction, dt)

    def delay_steps(self, dt: float) -> np.ndarray:
        """Each delay in whole steps, ``(N, N)``, of sparse weights ``(E,)``; ``dt`` in seconds.

        They are rounded up, and down where what arrives is read between two steps.
        """
        return self.readings(dt)[0].steps

    def __repr__(self) -> str:
        delayed = "" if self.conduction is None else f", {self.conduction.text()}"
        _, source, target, name = self.link
        name = f"{name}: " if name else ""
        return f"Coupling({name}{source or 'source'} -> {target or 'target'}, {self.link.label}{delayed})"

    def replaced(self, model: Model, weights, parameters: Mapping[str, Any]) -> Coupling:
        """The coupling with other weights and constants, of another model."""
        kind, source, target, name = self.link
        other = Coupling(
            self._in_pattern(weights), kind=kind, source=source, target=target, self_connection=self.self_connection,
            **{n: x for n, x in parameters.items() if n != "speed"},
        )  # fmt: skip
        other.conduction = self.conduction
        if "speed" in parameters:
            check_within(parameters["speed"], self.conduction)
            other.parameters["speed"] = parameters["speed"]
        return other.bound(model, name)

    def _in_pattern(self, weights):
        """New weights, of which values alone get the pattern of the present ones; other patterns take no delays."""
        if self.edges is None or weights is self.weights:
            return weights
        indices, regions = sparsity.indices_of(self.weights), self.regions
        if sparsity.is_sparse(weights):
            others = sparsity.indices_of(sparsity.matrix(weights, units.UNITLESS, "weights"))
            if self.conduction is not None and not np.array_equal(others, indices):
                raise ValueError(
                    "'weights' got another pattern than the network's delays are of, but takes the same, in the same "
                    "order: make a new Network with its delays"
                )
            return weights
        shape = np.shape(weights)
        if shape[-1:] == (len(indices),) and shape[-2:] != (regions, regions):
            values = units.strip(weights, units.UNITLESS, "weights")
            return sparsity.of(values, indices, (*shape[:-1], regions, regions))
        return weights

    def tree_flatten(self):
        weights, pattern = self.weights, (sparsity.Static(None), ())
        if sparsity.is_sparse(weights):
            pattern = sparsity.Static(sparsity.indices_of(weights)), weights.shape
            weights = weights.data
        conduction, seconds = self.conduction, ()
        if conduction is not None and conduction.live and conduction.lengths is None:
            conduction, seconds = dataclasses.replace(conduction, seconds=None), (conduction.seconds,)
        static = self.link, self.self_connection, self.has_strength, Known(conduction), pattern
        return (weights, self.parameters, *seconds), static

    @classmethod
    def tree_unflatten(cls, static, children) -> Coupling:
        self = object.__new__(cls)  # unchecked: leaves may be tracers, shapes or None
        self.link, self.self_connection, self.has_strength, known, (indices, shape) = static
        self.weights, self.parameters, *seconds = children
        self.conduction = known.delays
        if seconds and known.delays is not None:
            self.conduction = dataclasses.replace(known.delays, seconds=seconds[0])
        if indices.array is not None:
            self.weights = sparsity.of(self.weights, indices.array, shape)
        return self


CHILDREN = tuple(map(jax.tree_util.GetAttrKey, ("weights", "parameters", "delays")))


def _with_keys(coupling: Coupling):
    children, static = coupling.tree_flatten()
    return tuple(zip(CHILDREN, children)), static


jax.tree_util.register_pytree_with_keys(Coupling, _with_keys, Coupling.tree_unflatten, Coupling.tree_flatten)


def _weights(weights):
    if sparsity.is_sparse(weights):
        weights = sparsity.matrix(weights, units.UNITLESS, "weights")
        refuse_nan(weights.data, "weights")
        return weights
    weights = units.strip(weights, units.UNITLESS, "weights")
    shape = np.shape(weights)
    if len(shape) < 2 or shape[-1] != shape[-2]:
        raise ValueError(f"'weights' got shape {shape}, but takes (N, N) or (*batch, N, N)")
    refuse_nan(weights, "weights")
    return weights
