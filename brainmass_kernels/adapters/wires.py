"""Each class of brainmass that couples regions, as weighted sums of what they sent and what it makes of the sums.

A network's loop computes the sums; what a class makes of them is traced with the step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np

from ..coupling import COUPLINGS, Coupling, CouplingKind
from ..errors import Unsupported
from .buffers import DelayBuffer

# The kinds of `COUPLINGS`, by brainmass's classes. A Laplacian of brainmass is a matrix, coupled additively.
KINDS = {
    "AdditiveCoupling": "additive",
    "DiffusiveCoupling": "diffusive",
    "SigmoidalCoupling": "sigmoidal",
    "HyperbolicTangentCoupling": "tanh",
    "SigmoidalJansenRitCoupling": "sigmoidal_jansen_rit",
}
# Those whose sum is of functions of the source, and those that take the sum as a plain number.
_SENDS_RATES = ("sigmoidal_jansen_rit",)
_TAKES_PLAIN = ("sigmoidal", "tanh")
# The sum over j of w_ij sin(x_j - x_i - alpha_j), by two sums. brainmass subtracts a lag of several numbers from x_j.
_PHASES = CouplingKind(
    lambda x, p: (jnp.sin(x - p.alpha), jnp.cos(x - p.alpha)),
    lambda c, x, p: c[0] * jnp.cos(x) - c[1] * jnp.sin(x),
    {"alpha": 0.0},
)
# Finds, or makes, the buffer of a delay, for a reader of this name.
Buffers = Callable[[Any, str, str], DelayBuffer]


class Wire(NamedTuple):
    """One sum over the connections of regions.

    Attributes
    ----------
    regions : how many
    weights : gives them, ``(N, N)``, at the time of a run
    source : the buffer that is read, or a function that gives the state that is sent without delay
    steps : ``(N, N)``, the delay of each connection, in steps; ``None`` without
    kind : of the network's coupling; the sum is all of what that receives
    constants : gives those of the kind, by name
    """

    regions: int
    weights: Callable[[], Any]
    source: Any
    steps: np.ndarray | None = None
    kind: str | CouplingKind = "additive"
    constants: Callable[[], dict[str, Any]] = dict

    @property
    def buffer(self) -> DelayBuffer | None:
        return self.source if isinstance(self.source, DelayBuffer) else None

    @property
    def depth(self) -> int:
        return 0 if self.steps is None else int(self.steps.max())

    def coupling(self, source: str, target: str, name: str | None) -> Coupling:
        """The coupling of a network whose unit of time is a step."""
        return Coupling(
            u.get_magnitude(self.weights()),
            kind=self.kind,
            source=source,
            target=target,
            # A step is a second.
            delays=None if self.steps is None else u.Quantity(self.steps.astype(float), unit=u.second),
            self_connection=True,  # a connection that does not count has weight 0 already
            name=name,
            **(self.constants() if self.kind is _PHASES else {"k": 1.0, **self.constants()}),
        )


class SummedCoupling:
    """One of brainmass's coupling classes.

    Parameters
    ----------
    module : the coupling
    name : what it is called in messages
    buffers : gives the buffer of a delay

    Raises
    ------
    Unsupported : the source is no delayed state of each region, one for each connection
    """

    method = "update"

    def __init__(self, module, name: str, buffers: Buffers):
        self.module, self.name, self.kind = module, name, KINDS[type(module).__name__]
        buffer, steps = _read_from(module.x, name, buffers)
        sends = self.kind if self.kind in _SENDS_RATES else "additive"
        self.wires = (Wire(len(steps), self._weights, buffer, steps, sends, self._sent_constants),)

    def received(self, totals, *_, **__):
        """The current of each region."""
        (wire,), (total,) = self.wires, totals
        sent = u.UNITLESS if self.kind in _SENDS_RATES else wire.source.unit
        total = u.maybe_decimal(u.Quantity(total, unit=u.get_unit(self.module.conn.value()) * sent))
        p, own = SimpleNamespace(**self._constants()), None
        if self.kind == "diffusive":
            p.degree, own = u.math.sum(self._weights(), axis=-1), self.module.y()
        return COUPLINGS[self.kind].receive(u.get_magnitude(total) if self.kind in _TAKES_PLAIN else total, own, p)

    def _weights(self):
        n = self.wires[0].regions
        return u.math.reshape(self.module.conn.value(), (n, n))

    def _constants(self) -> dict[str, Any]:
        return {name: getattr(self.module, name).value() for name in COUPLINGS[self.kind].parameters}

    def _sent_constants(self) -> dict[str, Any]:
        return {n: x for n, x in self._constants().items() if n != "k"} if self.kind in _SENDS_RATES else {}


class Laplacian:
    """`brainmass.jansen_rit.LaplacianConnectivity`: lateral, forward and backward sums of one delayed state."""

    method = "update_tr"

    def __init__(self, module, name: str, buffers: Buffers):
        self.module, self.name = module, name
        buffer, steps = _read_from(module.delayed_x, name, buffers)
        weights = (module.w_ll, module.w_ff, module.w_bb)
        self.wires = tuple(Wire(len(steps), lambda w=w: w.value()[0], buffer, steps) for w in weights)

    def received(self, totals, *_, **__):
        """What arrives at pyramidal cells, excitatory and inhibitory interneurons."""
        lateral, forward, back = totals
        return (
            self.module.g_l.value() * lateral, self.module.g_f.value() * forward, -self.module.g_b.value() * back
        )  # fmt: skip


class Phases:
    """`brainmass.KuramotoNetwork`: sines of differences of phases, without delays."""

    method = "_pairwise_coupling"

    def __init__(self, module, name: str, _: Buffers):
        self.module, self.name = module, name
        self._of_class = module._pairwise_coupling
        n = module.varshape[-1]
        self.wires = (Wire(n, self._weights, self._theta, None, _PHASES, lambda: {"alpha": module.alpha.value()}),)

    def _theta(self):
        return self.module.theta

    def _weights(self):
        n = self.module.varshape[-1]
        weights = jnp.ones((n, n)) if self.module.conn is None else u.math.reshape(self.module.conn, (n, n))
        return weights * (1.0 - np.eye(n)) if self.module.exclude_self else weights

    def start(self) -> None:
        """At the beginning of a traced step."""
        self._before = self.module.theta.value

    def received(self, totals, theta):
        if theta is not self._before:
            raise Unsupported(
                f"{self.name} is read after the step of its regions, or of other phases than theirs: what is fused "
                f"reads those before the step"
            )
        jax.eval_shape(self._of_class, theta)  # its errors
        total = u.maybe_decimal(u.Quantity(totals[0], unit=u.get_unit(self._weights())))
        scale = self.module.K.value()
        return scale * (total / theta.shape[-1] if self.module.normalize_by_n else total)


def _read_from(source, name: str, buffers: Buffers) -> tuple[DelayBuffer, np.ndarray]:
    """The buffer that a source reads, and the delay of each connection, in steps."""
    import brainstate

    delay, item, info = None, "", None
    if isinstance(source, brainstate.nn.PrefetchDelayAt) and source.delay_time:
        delay, item, info = source.state_delay, source.item, source.delay_info
    elif isinstance(source, brainstate.nn.DelayAccess):
        delay, item, info = source.delay, source._delay_entry, source.delay_info
    if not isinstance(info, tuple) or len(info) != 2:
        raise Unsupported(
            f"{name} cannot be fused: its source is {type(source).__name__}, and what is fused is a state with the "
            f"delay and the region of each connection, such as node.prefetch_delay('x', (delays, regions))"
        )
    steps, regions = np.broadcast_arrays(*info)
    size = math.isqrt(regions.size)
    columns = np.broadcast_to(np.arange(size), (size, size))
    if regions.size != size**2 or not np.array_equal(regions.reshape(size, size), columns):
        raise Unsupported(
            f"{name} cannot be fused: connection (i, j) must read region j, and its regions are {regions.tolist()}"
        )
    return buffers(delay, item, name), steps.reshape(size, size)
