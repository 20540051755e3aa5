"""Networks: masses coupled through a connectome, with conduction delays.

A network adds one sum a step to a batch of masses, linear in what the regions sent some steps ago. The rest of a
coupling is pointwise and belongs to the step: what a region sends, and how the sum enters its input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np

from . import display, sparsity, units
from ._jax import is_traced
from .functional import sigmoid
from .models.base import Model, arrays_of, check_model, check_name, floating, refuse_nan


class Kind(NamedTuple):
    """A coupling: ``send`` of each source, summed over the connectome, enters each target by ``receive``.

    Attributes
    ----------
    receive : ``(sum, source of the region, p) -> input``
    send : ``(source, p) -> summand``
    parameters : defaults by name; ``k``, the global strength, among them
    saturates : whether the sum enters as a plain number, so that ``k`` has the unit of the target
    """

    receive: Callable
    send: Callable = lambda x, p: x
    parameters: Mapping[str, float] = {"k": 1.0}
    saturates: bool = True


COUPLINGS: dict[str, Kind] = {
    "additive": Kind(lambda c, x, p: p.k * c + p.b, parameters={"k": 1.0, "b": 0.0}, saturates=False),
    "diffusive": Kind(lambda c, x, p: p.k * (c - p.degree * x), saturates=False),
    # The Laplacian of the weights, summed like "additive": its diagonal acts without delay.
    "laplacian": Kind(lambda c, x, p: p.k * (c - p.degree * x) + p.b, parameters={"k": 1.0, "b": 0.0}, saturates=False),
    "sigmoidal": Kind(
        lambda c, x, p: p.k * sigmoid(p.a * c + p.b, v0=p.midpoint, r=p.slope),
        parameters={"k": 1.0, "a": 1.0, "b": 0.0, "slope": 1.0, "midpoint": 0.0},
    ),
    "tanh": Kind(lambda c, x, p: p.k * jnp.tanh(p.scale * c), parameters={"k": 0.5, "scale": 2.0}),
    "sigmoidal_jansen_rit": Kind(
        lambda c, x, p: p.k * c,
        lambda x, p: p.cmin + sigmoid(x, p.cmax - p.cmin, p.midpoint, p.r),
        parameters={"k": 1.0, "cmin": 0.0, "cmax": 0.005, "midpoint": 6.0, "r": 0.56},
    ),
}
# Couplings that subtract the source of the region, times the sum of its weights.
_WITH_DEGREE = ("diffusive", "laplacian")


class Link(NamedTuple):
    """How the regions of a network are coupled, without data; it is part of a step's specification.

    Attributes
    ----------
    kind : a name in `COUPLINGS`
    source : the observable or state that is sent
    target : the input to which the coupling is added
    """

    kind: str
    source: str
    target: str

    @property
    def parameters(self) -> tuple[str, ...]:
        degree = ("degree",) if self.kind in _WITH_DEGREE else ()
        return (*COUPLINGS[self.kind].parameters, *degree)

    def sent(self, source, p: SimpleNamespace):
        return COUPLINGS[self.kind].send(source, p)

    def received(self, total, own, p: SimpleNamespace):
        """What is added to the target, from the sum and the source of the region."""
        return COUPLINGS[self.kind].receive(total, own, p)


class Network:
    """Regions of one model, coupled through a connectome; `simulate`, `explain` and `fit` take it as a model.

    The last axis is the regions: fields of the model, inputs, initial states and ``k`` broadcast to ``(*batch, N)``.
    A sweep over the strength on one connectome has ``k`` of shape ``(G, 1)``. In every scheme the coupling is constant
    during a step, at its value at the beginning.

    Parameters
    ----------
    model : of each region
    weights : ``(N, N)`` or ``(*batch, N, N)``; ``weights[i, j]`` is of the connection from region j to region i. Or
        sparse, a ``BCOO`` of `jax.experimental.sparse` or a matrix of `scipy.sparse`: memory and time are then by
        stored connection. Its pattern is known before tracing and the same for a batch; entries that share a place
        are connections side by side
    delays : ``(N, N)``, a time for each connection, rounded up to whole steps; ``None``, no delays. With sparse
        weights also of their pattern, or ``(E,)``, in the order of the values that they store (``tocoo().data``)
    distances, speed : instead of ``delays``, lengths ``(N, N)`` and the speed of conduction, whose quotient the delays
        are; plain numbers are millimetres and metres a second
    coupling : "additive" ``k sum_j w_ij x_j + b``; "diffusive" ``k sum_j w_ij (x_j - x_i)``; "laplacian", the same
        plus ``b``; "sigmoidal" ``k / (1 + exp(-slope (a sum_j w_ij x_j + b - midpoint)))``; "tanh"
        ``k tanh(scale sum_j w_ij x_j)``; "sigmoidal_jansen_rit"
        ``k sum_j w_ij (cmin + (cmax - cmin) / (1 + exp(r (midpoint - x_j))))``; ``x_j`` is delayed, ``x_i`` is not
    source : an observable or state of the model; ``None``, its first observable or state
    target : the input of the model to which the coupling is added; ``None``, its first
    k : strength, in the unit of the target over that of the source; in that of the target for the last three
    self_connection : whether the diagonal of ``weights`` counts
    **parameters : the other constants of the coupling; plain numbers, ``b`` of "additive" and "laplacian" in the unit
        of the target

    A run starts from a history, what each region sent before time 0: ``initial={"history": ...}``, one value, one for
    each region, ``(H, *batch, N)`` for the ``H`` steps of the longest delay with the oldest first, or a function of
    the (negative) time. By default it is what the initial state sends. ``result.final["history"]`` continues exactly.

    Raises
    ------
    ValueError, TypeError : a name, unit, shape or value, before anything is compiled

    References
    ----------
    Sanz-Leon et al. 2015, NeuroImage 111:385 (the couplings); the names are those of `brainmass.Network`.
    """

    def __init__(
        self, model: Model, weights, *, delays=None, distances=None, speed=None, coupling: str = "additive",
        source: str | None = None, target: str | None = None, k=None, self_connection: bool = False, **parameters,
    ):  # fmt: skip
        check_model(model)
        check_name(coupling, COUPLINGS, "coupling")
        kind = COUPLINGS[coupling]
        for name in parameters:
            check_name(name, [*kind.parameters], f"parameter of coupling '{coupling}'", TypeError)
        if not model.inputs:
            raise ValueError(f"{type(model).__name__} has no input that a coupling could be added to")
        source = next(iter(model.recordable())) if source is None else source
        target = next(iter(model.inputs)) if target is None else target
        check_name(source, model.recordable(), "source, which is an observable or state,")
        check_name(target, model.inputs, "target, which is an input,")
        self.model, self.link, self.self_connection = model, Link(coupling, source, target), bool(self_connection)
        self.weights = _weights(weights)
        self.delays = _delays(delays, distances, speed, self.weights)
        self.parameters = {**kind.parameters, **parameters, **({} if k is None else {"k": k})}
        offset = self.parameters.get("b")
        if isinstance(offset, (int, float)) and offset == 0:
            self.parameters["b"] = units.attach(0.0, self.parameter_units()["b"])
        if not self.strength_unit.is_unitless and k is None:
            raise ValueError(
                f"'k' is needed: it turns {source} into {target}, in {units.name_of(self.strength_unit)}, "
                f"such as k=1*{self.strength_unit}"
            )
        self.magnitudes()
        self.parameters = {name: floating(value) for name, value in self.parameters.items()}

    @property
    def regions(self) -> int:
        """The number of regions."""
        return int(np.shape(self.weights)[-1])

    @property
    def strength_unit(self):
        """The unit of ``k``."""
        target = units.unit_of(self.model.inputs[self.link.target])
        if COUPLINGS[self.link.kind].saturates:
            return target
        # The quotient of two units of one dimension is a plain number, but may contain a factor.
        source = self.model.recordable()[self.link.source]
        return units.UNITLESS if target == source else target / source

    @property
    def sent_unit(self):
        """The unit of what is sent, and of the history."""
        plain = self.link.kind == "sigmoidal_jansen_rit"
        return units.UNITLESS if plain else self.model.recordable()[self.link.source]

    def parameter_units(self) -> dict[str, Any]:
        """The unit of each parameter of the coupling."""
        unit_of = dict.fromkeys(self.parameters, units.UNITLESS) | {"k": self.strength_unit}
        if "b" in unit_of and not COUPLINGS[self.link.kind].saturates:
            unit_of["b"] = units.unit_of(self.model.inputs[self.link.target])
        return unit_of

    def magnitudes(self) -> dict[str, Any]:
        """The parameters of the coupling as plain arrays, by their names in `Link.parameters`."""
        values, unit_of = {}, self.parameter_units()
        for name in COUPLINGS[self.link.kind].parameters:
            values[name] = units.strip(self.parameters[name], unit_of[name], name)
            refuse_nan(values[name], name)
        if "degree" in self.link.parameters:
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

    def delay_steps(self, dt: float) -> np.ndarray:
        """Each delay in whole steps, rounded up, ``(N, N)``, of sparse weights ``(E,)``; ``dt`` in seconds."""
        shape = (self.regions, self.regions) if self.edges is None else self.edges.order.shape
        if self.delays is None:
            return np.zeros(shape, np.int32)
        delays = self.delays if self.edges is None else self.delays[self.edges.order]
        # A whole number with a rounding error is not rounded up.
        return np.ceil(delays / dt - 1e-5).clip(0).astype(np.int32)

    def _repr_html_(self) -> str:
        return display.network_table(self)

    def __repr__(self) -> str:
        delayed = "" if self.delays is None else f", delays to {1e3 * self.delays.max(initial=0.0):.4g} ms"
        kind, source, target = self.link
        # In a tree that was mapped, the weights may be anything.
        regions = f"{self.regions} regions" if getattr(self.weights, "shape", ()) else "regions"
        return f"Network({regions} of {type(self.model).__name__}, {source} -> {target}, {kind}{delayed})"

    def tree_flatten(self):
        weights, pattern = self.weights, (sparsity.Static(None), ())
        if sparsity.is_sparse(weights):
            pattern = sparsity.Static(sparsity.indices_of(weights)), weights.shape
            weights = weights.data
        static = self.link, self.self_connection, sparsity.Static(self.delays), pattern
        return (self.model, weights, self.parameters), static

    @classmethod
    def tree_unflatten(cls, static, children):
        self = object.__new__(cls)  # unchecked: leaves may be tracers, shapes or None
        self.link, self.self_connection, delays, (indices, shape) = static
        self.delays = delays.array
        self.model, self.weights, self.parameters = children
        if indices.array is not None:
            self.weights = sparsity.of(self.weights, indices.array, shape)
        return self

    def as_arrays(self) -> Network:
        """The network with weights, constants of the coupling and fields of the model as JAX arrays, units kept."""
        return arrays_of(self)

    def replace(self, **changes) -> Network:
        """The network with another ``model``, ``weights`` or parameter of the coupling.

        Of a network with sparse weights, ``weights`` may be the values alone, ``(E,)`` or ``(*batch, E)``.
        """
        known = {"model": self.model, "weights": self.weights, **self.parameters}
        for name in changes:
            check_name(name, known, "field of the network", TypeError)
        fields = {**known, **changes}
        fields["weights"] = self._in_pattern(fields["weights"])
        kind, source, target = self.link
        return Network(
            fields.pop("model"), fields.pop("weights"), coupling=kind, source=source, target=target,
            delays=None if self.delays is None else self.delays * u.second, self_connection=self.self_connection,
            **fields,
        )  # fmt: skip

    def _in_pattern(self, weights):
        """New weights, of which values alone get the pattern of the present ones; other patterns take no delays."""
        if self.edges is None or weights is self.weights:
            return weights
        indices, regions = sparsity.indices_of(self.weights), self.regions
        if sparsity.is_sparse(weights):
            others = sparsity.indices_of(sparsity.matrix(weights, units.UNITLESS, "weights"))
            if self.delays is not None and not np.array_equal(others, indices):
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


def _with_keys(network: Network):
    children, static = network.tree_flatten()
    keys = map(jax.tree_util.GetAttrKey, ("model", "weights", "parameters"))
    return tuple(zip(keys, children, strict=True)), static


jax.tree_util.register_pytree_with_keys(Network, _with_keys, Network.tree_unflatten, Network.tree_flatten)


def parts_of(model: Any) -> tuple[Network | None, Model]:
    """The network, or ``None`` for a model, and the model of each lane."""
    return (model, model.model) if isinstance(model, Network) else (None, model)


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


def _delays(delays, distances, speed, weights) -> np.ndarray | None:
    """In seconds, ``(N, N)``, of sparse weights one for each stored value ``(E,)``, or ``None``."""
    if (distances is None) != (speed is None):
        missing = "speed" if speed is None else "distances"
        raise ValueError(f"'{missing}' is needed: 'distances' and 'speed' make the delays together")
    if delays is not None and distances is not None:
        raise ValueError("'delays' and 'distances' were both given, but each makes the delays: give one of them")
    if distances is not None:
        lengths = _of_connections(_with_unit(distances, u.mm), u.mm, "distances", weights)
        rate = units.strip(_wide(_with_unit(speed, u.mm / u.ms)), u.mm / u.ms, "speed")
        if is_traced(rate) or np.ndim(rate) or not rate > 0:
            raise ValueError(f"'speed' got {speed}, but takes one positive speed, known before tracing")
        name, seconds = "distances", lengths / rate * 1e-3
    elif delays is not None:
        name, seconds = "delays", _of_connections(delays, u.second, "delays", weights)
    else:
        return None
    if is_traced(seconds):
        raise TypeError(f"'{name}' is traced by jit, vmap or grad, but a network's delays are known beforehand")
    seconds = np.asarray(seconds, np.float64)
    regions = int(np.shape(weights)[-1])
    shape = (len(sparsity.indices_of(weights)),) if sparsity.is_sparse(weights) else (regions, regions)
    if seconds.ndim == 0:
        seconds = np.full(shape, float(seconds))
    if seconds.shape != shape:
        raise ValueError(f"'{name}' got shape {seconds.shape}, but takes ({regions}, {regions}) as the weights have")
    if not (np.isfinite(seconds).all() and (seconds >= 0).all()):
        raise ValueError(f"'{name}' got negative or infinite values, but takes finite ones from 0 on")
    # A copy that nobody writes to: compiled programs are kept by its values.
    seconds = seconds * _off_diagonal(weights) if name == "distances" else seconds.copy()
    seconds.flags.writeable = False
    return seconds


def _of_connections(value, unit, name: str, weights):
    """A quantity of connections without its unit: of sparse weights one for each stored value."""
    if sparsity.is_sparse(weights):
        return sparsity.values_on(weights, value, unit, name, _wide)
    if sparsity.is_sparse(value):
        raise TypeError(f"'{name}' got a sparse matrix, but takes an array, as the weights are one")
    return units.strip(_wide(value), unit, name)


def _off_diagonal(weights) -> np.ndarray:
    """One for connections between two regions, zero for those from a region to itself."""
    if sparsity.is_sparse(weights):
        rows, columns = sparsity.indices_of(weights).T
        return (rows != columns).astype(np.float64)
    return 1.0 - np.eye(np.shape(weights)[-1])


def _wide(value):
    """A quantity in float64; float32 as the shortest decimal number: 0.1, not 0.100000001."""
    if not isinstance(value, u.Quantity) or is_traced(value.mantissa):
        return value
    mantissa = np.asarray(value.mantissa)
    if mantissa.dtype == np.float32:
        mantissa = mantissa.astype(str).astype(np.float64)
    elif np.issubdtype(mantissa.dtype, np.integer):
        mantissa = mantissa.astype(np.float64)
    return u.Quantity(mantissa, unit=value.unit)


def _with_unit(value, unit):
    if isinstance(value, u.Quantity):
        return value
    return u.Quantity(value if is_traced(value) or sparsity.is_sparse(value) else np.asarray(value), unit=unit)
