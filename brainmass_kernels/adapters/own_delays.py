"""The delays inside the masses of a brainmass model, as those of a `Model`.

brainmass reads a state some steps ago from a delay buffer. While a step is traced, an input of the loop stands for what
is read, and a state for the newest entry of the buffer: after a step it equals the source, but before the first it need
not. The loop's own history takes the place of the other entries.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import Unsupported
from ..models.base import Model
from ..notices import warn
from .classify import Arriving


class Unwritten(Exception):
    """A step writes nothing to some of the buffers that it reads, so that what it reads never changes."""

    def __init__(self, buffers: list[_Buffer]):
        super().__init__(", ".join(buffer.name for buffer in buffers))
        self.buffers = buffers


class _Buffer:
    """One delay buffer.

    Attributes
    ----------
    delay : of brainstate
    name : of the state that is delayed
    sent : the name of the state that is its newest entry
    steps : how many steps ago it is read, each once, in order
    """

    def __init__(self, delay, name: str, steps: list[int]):
        self.delay, self.name, self.steps, self.sent = delay, name, steps, f"last sent {name}"
        self.written = False

    @property
    def depth(self) -> int:
        return max(self.steps)

    def start(self) -> None:
        """Read the buffer as it is before a run."""
        import brainstate

        (values,), self.structure = jax.tree.flatten(self.delay.history.value)
        self.pointer = self.delay.write_ptr.value
        self.entries = jnp.roll(values, -self.pointer, axis=0)  # the oldest first
        self.newest = brainstate.ShortTermState(self.structure.unflatten([self.entries[-1]]))

    def write(self, last, steps: int) -> None:
        """Set the buffer to its entries after ``steps`` steps, of which ``last`` are the latest."""
        entries = jnp.concatenate([self.entries, last])[-len(self.entries) :]
        pointer = (self.pointer + steps) % len(entries)
        self.delay.history.value = self.structure.unflatten([jnp.roll(entries, pointer, axis=0)])
        self.delay.write_ptr.value = pointer.astype(self.pointer.dtype)


class OwnDelays:
    """The delays of a model whose masses read their own past, each one time for all masses.

    Attributes
    ----------
    kinds : of each argument of the traced step that stands for what is read
    regions : ``None``, as masses are not coupled
    """

    regions = None

    def __init__(self, label: str, buffers: list[_Buffer]):
        self.label, self.buffers = label, buffers
        reads = [(buffer, steps) for buffer in buffers for steps in buffer.steps]
        self.kinds = [Arriving(f"late{k}", buffer.sent) for k, (buffer, _) in enumerate(reads)]
        self.steps = [steps for _, steps in reads]

    @classmethod
    def of(cls, model) -> OwnDelays | None:
        """The delays of a model that can be fused; ``None`` where it has none, or where one reads by an index."""
        import brainstate

        buffers: dict[int, _Buffer] = {}
        for path, node in model.nodes(brainstate.nn.PrefetchDelayAt).items():
            if not node.delay_time:
                continue
            delay, info = node.state_delay, node.delay_info
            values = jax.tree.leaves(delay.target_info)
            if info is None or len(info) != 1 or np.size(info[0]) != 1 or len(values) != 1:
                return None
            if delay.update_every is not None or delay.take_aware_unit:
                return None
            name = ".".join(map(str, (*path[:-1], node.item)))
            buffer = buffers.setdefault(id(delay), _Buffer(delay, name, []))
            steps = int(np.asarray(info[0]).reshape(()))
            if steps not in buffer.steps:
                buffer.steps.append(steps)
        return cls(type(model).__name__, list(buffers.values())) if buffers else None

    def without(self, buffers: list[_Buffer]) -> OwnDelays | None:
        """The same without some buffers, which no step writes to, with a warning."""
        warn(
            f"a step of {self.label} reads the delay of {' and '.join(repr(x.name) for x in buffers)}, and writes "
            f"nothing to it, so that what is late stays as it began: brainmass.Simulator calls the model's update, and "
            f"only a call of the model itself writes its delays. Run a module whose update calls it"
        )
        others = [buffer for buffer in self.buffers if buffer not in buffers]
        return OwnDelays(self.label, others) if others else None

    def start(self) -> None:
        """Read the delay buffers as they are before a run."""
        for buffer in self.buffers:
            buffer.start()

    # In the traced step ---------------------------------------------------------------------------------------------

    def arriving(self) -> tuple:
        """Placeholders of what is read, for tracing."""
        return tuple(jnp.zeros_like(buffer.entries[-1]) for buffer in self.buffers for _ in buffer.steps)

    @property
    def newest(self) -> dict[int, str]:
        """The names of the states that are newest entries, by their identity."""
        return {id(buffer.newest): buffer.sent for buffer in self.buffers}

    @contextlib.contextmanager
    def traced(self, *late) -> Iterator[None]:
        """A context in which buffers are read from ``late``, and written to their newest entry alone."""
        late = iter(late)
        for buffer in self.buffers:
            self._replace(buffer, dict(zip(buffer.steps, late)))
        try:
            yield
        finally:
            for buffer in self.buffers:
                for name in ("retrieve_at_step", "update"):
                    del vars(buffer.delay)[name]
        if unwritten := [buffer for buffer in self.buffers if not buffer.written]:
            raise Unwritten(unwritten)

    def _replace(self, buffer: _Buffer, late: dict[int, Any]) -> None:
        buffer.written = False

        def read(steps, *indices):
            if buffer.written:
                raise Unsupported(
                    f"a step of {self.label} reads the delay of '{buffer.name}' after its update: what is fused "
                    f"reads it before that"
                )
            known = None if indices or np.size(steps) != 1 else int(np.asarray(steps).reshape(()))
            if known not in late:
                raise Unsupported(f"a step of {self.label} reads the delay of '{buffer.name}' by an index")
            return buffer.structure.unflatten([late[known]])

        def write(*_):
            if buffer.written:
                raise Unsupported(f"a step of {self.label} writes twice to the delay of '{buffer.name}'")
            buffer.written = True
            buffer.newest.value = buffer.delay.state.value

        vars(buffer.delay).update(retrieve_at_step=read, update=write)

    # In the run -----------------------------------------------------------------------------------------------------

    def delays(self) -> list[float]:
        """The values of the parameters that are delays; a step is a second."""
        return [float(steps) for steps in self.steps]

    def network(self, model: Model) -> Model:
        """The model itself, as masses are not coupled."""
        return model

    def history(self) -> dict[str, Any]:
        """The entries before the newest, of the buffers that are read later than at once."""
        late = {x.sent: x.entries[-1 - x.depth : -1] for x in self.buffers if x.depth}
        return {"history": late} if late else {}

    @property
    def recorded(self) -> tuple[str, ...]:
        """The states that are recorded in the last steps."""
        return tuple(buffer.sent for buffer in self.buffers) if self.tail else ()

    @property
    def tail(self) -> int:
        """How many last steps must be recorded one by one, so that the buffers are known after them."""
        return max((len(x.entries) for x in self.buffers if len(x.entries) > x.depth + 1), default=0)

    def write(self, final: dict[str, Any], last: dict[str, Any] | None, steps: int) -> None:
        """Set the buffers to their entries after ``steps`` steps.

        Parameters
        ----------
        final : the last states, with the histories
        last : the newest entries after each of the last `tail` steps, where there are such
        """
        histories = final.get("history", {})
        for buffer in self.buffers:
            if last is not None:
                entries = last[buffer.sent]
            else:
                entries = final[buffer.sent][None]
                if buffer.depth:
                    past = histories[buffer.sent] if isinstance(histories, dict) else histories
                    entries = jnp.concatenate([past, entries])
            buffer.write(entries, steps)
