"""The couplings of a brainmass model's regions, as those of a `Network`.

Each reads the state of each region some steps ago from a delay buffer, or now, weighs it and sums. The network's loop
computes the sums. The rest of a coupling is traced with the step, see `wires`; several couplings that read one buffer
share its history, see `buffers`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp

from ..coupling import Link, wiring
from ..errors import Unsupported
from ..models.base import Model
from ..network import Network
from .buffers import DelayBuffer
from .classify import Arriving
from .jansen_rit_tr import trs_of
from .wires import KINDS, Laplacian, Phases, SummedCoupling, Wire


class RegionCouplings:
    """All couplings of a model, between regions that are the last axis of its states.

    Parameters
    ----------
    model : a model of brainmass

    Attributes
    ----------
    regions : how many
    buffers : the delays that are read
    kinds : of each argument of the traced step that is a sum

    Raises
    ------
    Unsupported : a coupling that cannot be fused, by its name
    """

    def __init__(self, model):
        self._buffers: dict[int, DelayBuffer] = {}
        self.parts = [kind(node, name, self._buffer_of) for kind, node, name in _couplings(model)]
        self.wires: list[Wire] = [wire for part in self.parts for wire in part.wires]
        counts = {part.name: wire.regions for part in self.parts for wire in part.wires}
        if len({*counts.values()}) > 1:
            listed = ", ".join(f"{name} has {n}" for name, n in counts.items())
            raise Unsupported(f"the couplings of {type(model).__name__} are of different numbers of regions: {listed}")
        self.regions = next(iter(counts.values()), 0)
        self.buffers = [*self._buffers.values()]
        self.kinds = [Arriving(f"arriving {k}" if k else "arriving") for k in range(len(self.wires))]

    @classmethod
    def of(cls, model) -> RegionCouplings | None:
        """The couplings of a model, ``None`` where it has none."""
        found = cls(model)
        return found if found.parts else None

    def _buffer_of(self, delay, item: str, reader: str) -> DelayBuffer:
        if id(delay) not in self._buffers:
            self._buffers[id(delay)] = DelayBuffer(delay, item, len(self._buffers))
        self._buffers[id(delay)].readers.append(reader)
        return self._buffers[id(delay)]

    def start(self) -> None:
        """Read the delay buffers as they are before a run."""
        for buffer in self.buffers:
            buffer.start(self.regions)

    # In the traced step ---------------------------------------------------------------------------------------------

    def arriving(self) -> list[Any]:
        """A placeholder of each sum for tracing."""
        return [jnp.zeros_like(w.buffer.entries[-1] if w.buffer else w.source().value) for w in self.wires]

    def newest(self) -> dict[int, str]:
        """The name of each state that stands for the newest entry of a buffer, by its ``id``."""
        return {id(buffer.newest): buffer.name for buffer in self.buffers}

    @contextlib.contextmanager
    def traced(self, totals: Sequence[Any]) -> Iterator[None]:
        """A context in which couplings make their currents of ``totals``, and each buffer has its newest entry only."""
        for buffer in self.buffers:
            buffer.written = 0
        rest, methods = iter(totals), []
        for part in self.parts:
            if isinstance(part, Phases):
                part.start()
            methods.append((part.module, part.method, _receiver(part, [next(rest) for _ in part.wires])))
        methods += [(buffer.delay, "update", buffer.write) for buffer in self.buffers]
        for module, method, function in methods:
            vars(module)[method] = function
        try:
            yield
        finally:
            for module, method, _ in methods:
                del vars(module)[method]
        for buffer in self.buffers:
            buffer.check_written()

    # In the run -----------------------------------------------------------------------------------------------------

    def bind(self, names: dict[int, str], changed: Sequence[str]) -> None:
        """Name what is sent: ``names`` are those of the model's states, by their ``id``; those ``changed`` by a step.

        Raises
        ------
        Unsupported : a step does not change what is sent
        """
        for part in self.parts:
            for wire in part.wires:
                if not wire.buffer and names.get(id(wire.source())) not in changed:
                    raise Unsupported(f"{part.name} cannot be fused: a step does not change the states that it couples")
        several = len(self.wires) > 1
        self.links = tuple(
            Link(w.kind, w.buffer.name if w.buffer else names[id(w.source())], kind.name, f"sum{k}" if several else "")
            for k, (w, kind) in enumerate(zip(self.wires, self.kinds, strict=True))
        )

    def delays(self) -> list[float]:
        """The values of parameters of the traced model that are delays: none."""
        return []

    def network(self, model: Model) -> Network:
        """The network of a traced model; its unit of time is a step."""
        wired = zip(self.wires, self.links, strict=True)
        return Network(model, couplings=[w.coupling(link.source, link.target, link.name or None) for w, link in wired])

    def _sent(self) -> Iterator[tuple[str, DelayBuffer, int, Any]]:
        """Of each quantity that is read late: its name in a history, buffer, depth, and what is made of an entry."""
        quantities, reads = wiring(self.links)
        for k, quantity in enumerate(quantities):
            depth = max(w.depth for w, read in zip(self.wires, reads, strict=True) if k in read)
            wire, rule = self.wires[quantity.link], self.links[quantity.link].rule
            if depth and wire.buffer:
                yield quantity.label, wire.buffer, depth, None if rule.sends_source else rule.send

    def history(self) -> dict[str, Any]:
        """What was sent before the first step, where there are delays."""
        constants = {link.name or link.label: wire.constants for link, wire in zip(self.links, self.wires, strict=True)}
        before = {}
        for label, buffer, depth, send in self._sent():
            before[label] = buffer.before(depth)
            if send is not None:
                before[label] = send(before[label], SimpleNamespace(**constants[label]()))
        return {"history": before} if before else {}

    def _depth_of(self, buffer: DelayBuffer) -> int:
        """How many entries of a buffer before the newest are in a history as they are."""
        return max((depth for _, own, depth, send in self._sent() if own is buffer and send is None), default=0)

    def _in_tail(self) -> list[DelayBuffer]:
        """The buffers that have more entries than the network's histories."""
        return [buffer for buffer in self.buffers if len(buffer.entries) > self._depth_of(buffer) + 1]

    @property
    def tail(self) -> tuple[int, tuple[str, ...]]:
        """How many last steps must be recorded one by one, and what of them, so that all buffers are known after."""
        buffers = self._in_tail()
        return max((len(b.entries) for b in buffers), default=0), tuple(b.name for b in buffers)

    def write(self, final: dict[str, Any], last: dict[str, Any], steps: int) -> None:
        """Set the delay buffers to their entries after ``steps`` steps.

        Parameters
        ----------
        final : the last states, with the history
        last : what was recorded of the `tail`, by name
        """
        for buffer in self.buffers:
            buffer.set(final, last, self._depth_of(buffer), steps)


def _receiver(part, totals: list[Any]):
    def received(*arguments, **keywords):
        if any(wire.buffer and wire.buffer.written for wire in part.wires):
            raise Unsupported(f"{part.name} is read after the step of its regions: what is fused reads it before that")
        return part.received(totals, *arguments, **keywords)

    return received


def _couplings(model) -> Iterator[tuple[Any, Any, str]]:
    """Each module of a model that couples regions, with its class here and what it is called in messages."""
    import brainmass
    from brainmass.jansen_rit.connectivity import LaplacianConnectivity

    kinds = {getattr(brainmass, name): SummedCoupling for name in KINDS}
    # Subclasses that couple as these do.
    others = {LaplacianConnectivity: Laplacian, brainmass.KuramotoNetwork: Phases}
    held = {id(tr.conn) for tr in trs_of(model)}
    for path, node in model.nodes().items():
        name = f"{type(node).__name__} '{'.'.join(map(str, path))}'"
        if type(node) in kinds:
            yield kinds[type(node)], node, name
        for theirs, ours in others.items():
            same = isinstance(node, theirs) and getattr(type(node), ours.method) is getattr(theirs, ours.method)
            if same and id(node) not in held:
                yield ours, node, name
