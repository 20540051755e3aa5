"""The coupling of a brainmass model's regions, as that of a `Network`.

A coupling of brainmass reads the state of each region some steps ago from a delay buffer, weighs it and sums. The
network's loop computes that sum; the rest of a coupling is traced with the step, by `coupling.COUPLINGS`. The newest
entry of the buffer is a state of the traced step: after a step it equals the source, but before the first it need not.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np

from ..coupling import COUPLINGS
from ..errors import Unsupported
from ..models.base import Model
from ..network import Network
from .classify import Arriving

# The input of the loop that is what arrives from other lanes.
ARRIVING = "arriving"
# The state of a traced step that is what each region last sent.
SENT = "last sent"
# The kinds of `COUPLINGS`, by brainmass's classes. A Laplacian of brainmass is a matrix, coupled additively.
_KINDS = {
    "AdditiveCoupling": "additive",
    "DiffusiveCoupling": "diffusive",
    "SigmoidalCoupling": "sigmoidal",
    "HyperbolicTangentCoupling": "tanh",
    "SigmoidalJansenRitCoupling": "sigmoidal_jansen_rit",
}
# Those whose sum is of functions of the source, and those that take the sum as a plain number.
_SENDS_RATES = ("sigmoidal_jansen_rit",)
_TAKES_PLAIN = ("sigmoidal", "tanh")


class RegionCoupling:
    """The one coupling of a model, between regions that are the last axis of its states.

    Parameters
    ----------
    module : a coupling of brainmass
    name : what it is called in messages

    Attributes
    ----------
    kind : a name in `coupling.COUPLINGS`
    steps : ``(N, N)``, the delay of each connection, in steps
    entry : the state that stands for the newest entry of the delay buffer
    kinds : of the argument of the traced step that is the sum

    Raises
    ------
    Unsupported : the source is no delayed state of each region, one for each connection
    """

    def __init__(self, module, name: str):
        import brainstate

        self.module, self.name, self.kind = module, name, _KINDS[type(module).__name__]
        source = module.x
        if not isinstance(source, brainstate.nn.PrefetchDelayAt) or len(source.delay_time) != 2:
            raise Unsupported(
                f"{name} cannot be fused: its source is {type(source).__name__}, and what is fused is a state with the "
                f"delay and the region of each connection, such as node.prefetch_delay('x', (delays, regions))"
            )
        self.owner, self.item = source.module, source.item
        self.delay: Any = source.state_delay
        steps, regions = np.broadcast_arrays(*source.delay_info)
        size = math.isqrt(regions.size)
        columns = np.broadcast_to(np.arange(size), (size, size))
        if regions.size != size**2 or not np.array_equal(regions.reshape(size, size), columns):
            raise Unsupported(
                f"{name} cannot be fused: connection (i, j) must read region j, and its regions are {regions.tolist()}"
            )
        if self.delay.update_every is not None:
            raise Unsupported(f"{name} cannot be fused: its delay is updated every {self.delay.update_every}")
        self.steps, self.regions, self.depth = steps.reshape(size, size), size, int(steps.max())

    @classmethod
    def of(cls, model) -> RegionCoupling | None:
        """The coupling of a model, ``None`` where it has none."""
        import brainmass

        kinds = {getattr(brainmass, name) for name in _KINDS}
        couplings = {
            f"{type(node).__name__} '{'.'.join(map(str, path))}'": node
            for path, node in model.nodes().items()
            if type(node) in kinds
        }
        if len(couplings) > 1:
            listed = ", ".join(couplings)
            raise Unsupported(f"{type(model).__name__} has {len(couplings)} couplings, {listed}: one is fused")
        return next((cls(node, name) for name, node in couplings.items()), None)

    @property
    def source(self):
        return getattr(self.owner, self.item)

    def start(self) -> None:
        """Read the delay buffer as it is before a run."""
        import brainstate

        values, self._structure = jax.tree.flatten(self.delay.history.value)
        shapes = [x.shape[1:] for x in values]
        if shapes != [(self.regions,)]:
            raise Unsupported(
                f"{self.name} cannot be fused: its source '{self.item}' has the shape {', '.join(map(str, shapes))} "
                f"and not ({self.regions},). brainmass reads the delay of a batch by the wrong axis; vmap runs batches "
                f"of networks"
            )
        self._pointer = self.delay.write_ptr.value
        self._entries = jnp.roll(values[0], -self._pointer, axis=0)  # the oldest first
        self.entry = brainstate.ShortTermState(self._structure.unflatten([self._entries[-1]]))

    kinds = [Arriving(ARRIVING)]

    # In the traced step ---------------------------------------------------------------------------------------------

    def arriving(self) -> tuple:
        """A placeholder of the sum for tracing, ``(N,)``."""
        return (jnp.zeros_like(self._entries[-1]),)

    @property
    def newest(self) -> dict[int, str]:
        """The name of the state that is the newest entry, by its identity."""
        return {id(self.entry): SENT}

    @contextlib.contextmanager
    def traced(self, total) -> Iterator[None]:
        """A context in which the coupling makes its current from ``total``, and the delay's only entry is `entry`."""
        written = []

        def update(*_, **__):
            if written:
                raise Unsupported(
                    f"{self.name} is read after the step of its regions: what is fused reads it before that"
                )
            return self._received(total)

        def write(*_):
            written.append(True)
            self.entry.value = self.source.value

        objects = {self.module: update, self.delay: write}
        for module, function in objects.items():
            vars(module)["update"] = function
        try:
            yield
        finally:
            for module in objects:
                del vars(module)["update"]
        if len(written) != 1:
            raise Unsupported(
                f"{self.name} cannot be fused: a step writes '{self.item}' to its delay {len(written)} times, in place "
                f"of once, as calling the regions does"
            )

    def _received(self, total):
        """The current of each region."""
        weights = self.module.conn.value()
        unit = u.get_unit(weights) * (u.UNITLESS if self.kind in _SENDS_RATES else u.get_unit(self.source.value))
        total = u.maybe_decimal(u.Quantity(total, unit=unit))
        p = SimpleNamespace(**self._constants())
        own = None
        if self.kind == "diffusive":
            p.degree, own = u.math.sum(self._square(weights), axis=-1), self.module.y()
        return COUPLINGS[self.kind].receive(u.get_magnitude(total) if self.kind in _TAKES_PLAIN else total, own, p)

    def _constants(self) -> dict[str, Any]:
        return {name: getattr(self.module, name).value() for name in COUPLINGS[self.kind].parameters}

    def _square(self, weights):
        return u.math.reshape(weights, (self.regions, self.regions))

    # In the run -----------------------------------------------------------------------------------------------------

    def network(self, model: Model) -> Network:
        """The network of a traced model; its unit of time is a step."""
        own = {n: x for n, x in self._constants().items() if n != "k"} if self.kind in _SENDS_RATES else {}
        return Network(
            model,
            self._square(u.get_magnitude(self.module.conn.value())),
            delays=u.Quantity(self.steps.astype(float), unit=u.second),  # a step is a second
            coupling=self.kind if self.kind in _SENDS_RATES else "additive",
            source=SENT,
            target=ARRIVING,
            k=1.0,
            self_connection=True,  # a connection that does not count has weight 0 already
            **own,
        )

    def history(self) -> dict[str, Any]:
        """The entries that were sent before the first step, where there are delays."""
        if not self.depth:
            return {}
        late = self._entries[-1 - self.depth : -1]
        sends = self.kind in _SENDS_RATES
        return {"history": COUPLINGS[self.kind].send(late, SimpleNamespace(**self._constants())) if sends else late}

    def delays(self) -> list[float]:
        """The values of parameters of the traced model that are delays: none."""
        return []

    @property
    def recorded(self) -> tuple[str, ...]:
        """The states that are recorded in the last steps."""
        return (SENT,) if self.tail else ()

    @property
    def tail(self) -> int:
        """How many last steps must be recorded one by one, so that the delay buffer is known after them."""
        length = len(self._entries)
        in_history = 1 if self.kind in _SENDS_RATES else self.depth + 1
        return length if length > in_history else 0

    def write(self, final: dict[str, Any], last, steps: int) -> None:
        """Set the delay buffer to its entries after ``steps`` steps.

        Parameters
        ----------
        final : the last states, with the history
        last : the newest entry after each of the last `tail` steps by its name, where there are such
        """
        last = None if last is None else last[SENT]
        if last is None:
            last = final[SENT][None]
            last = jnp.concatenate([final["history"], last]) if self.depth else last
        entries = jnp.concatenate([self._entries, last])[-len(self._entries) :]
        pointer = (self._pointer + steps) % len(entries)
        self.delay.history.value = self._structure.unflatten([jnp.roll(entries, pointer, axis=0)])
        self.delay.write_ptr.value = pointer.astype(self._pointer.dtype)
