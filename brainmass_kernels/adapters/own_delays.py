"""The delays inside the masses of a brainmass model, as those of a `Model`.

brainmass reads a state some steps ago from a delay buffer. While a step is traced, an input of the loop stands for what
is read, and a state for the newest entry of the buffer, see `buffers`. The loop's own history takes the place of the
other entries.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import Unsupported
from ..models.base import Model
from ..notices import warn
from .buffers import DelayBuffer
from .classify import Arriving


class Unwritten(Exception):
    """A step writes nothing to some of the buffers that it reads, so that what it reads never changes."""

    def __init__(self, buffers: list[_Buffer]):
        super().__init__(", ".join(buffer.item for buffer in buffers))
        self.buffers = buffers


class _Buffer(DelayBuffer):
    """A delay buffer that masses read.

    Attributes
    ----------
    steps : how many steps ago it is read, each once, in order
    """

    def __init__(self, delay, item: str, number: int):
        super().__init__(delay, item, number)
        self.steps: list[int] = []

    @property
    def depth(self) -> int:
        return max(self.steps)


class OwnDelays:
    """The delays of a model whose masses read their own past, each one time for all masses.

    Attributes
    ----------
    kinds : of each argument of the traced step that stands for what is read
    """

    def __init__(self, label: str, buffers: list[_Buffer]):
        self.label, self.buffers = label, buffers
        reads = [(buffer, steps) for buffer in buffers for steps in buffer.steps]
        self.kinds = [Arriving(f"late{k}", buffer.name) for k, (buffer, _) in enumerate(reads)]
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
            if id(delay) not in buffers:
                buffers[id(delay)] = _Buffer(delay, ".".join(map(str, (*path[:-1], node.item))), len(buffers))
            read, steps = buffers[id(delay)].steps, int(np.asarray(info[0]).reshape(()))
            if steps not in read:
                read.append(steps)
        return cls(type(model).__name__, list(buffers.values())) if buffers else None

    def without(self, buffers: list[_Buffer]) -> OwnDelays | None:
        """The same without some buffers, which no step writes to, with a warning."""
        warn(
            f"a step of {self.label} reads the delay of {' and '.join(repr(x.item) for x in buffers)}, and writes "
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

    def arriving(self) -> list[Any]:
        """Placeholders of what is read, for tracing."""
        return [jnp.zeros_like(buffer.entries[-1]) for buffer in self.buffers for _ in buffer.steps]

    def newest(self) -> dict[int, str]:
        """The name of each state that stands for the newest entry of a buffer, by its ``id``."""
        return {id(buffer.newest): buffer.name for buffer in self.buffers}

    @contextlib.contextmanager
    def traced(self, late: Sequence[Any]) -> Iterator[None]:
        """A context in which buffers are read from ``late``, and written to their newest entry alone."""
        rest = iter(late)
        for buffer in self.buffers:
            self._replace(buffer, dict(zip(buffer.steps, rest)))
        try:
            yield
        finally:
            for buffer in self.buffers:
                for name in ("retrieve_at_step", "update"):
                    del vars(buffer.delay)[name]
        if unwritten := [buffer for buffer in self.buffers if not buffer.written]:
            raise Unwritten(unwritten)

    def _replace(self, buffer: _Buffer, late: dict[int, Any]) -> None:
        buffer.written = 0

        def read(steps, *indices):
            if buffer.written:
                raise Unsupported(
                    f"a step of {self.label} reads the delay of '{buffer.item}' after its update: what is fused "
                    f"reads it before that"
                )
            known = None if indices or np.size(steps) != 1 else int(np.asarray(steps).reshape(()))
            if known not in late:
                raise Unsupported(f"a step of {self.label} reads the delay of '{buffer.item}' by an index")
            return buffer.structure.unflatten([late[known]])

        def write(*value):
            if buffer.written:
                raise Unsupported(f"a step of {self.label} writes twice to the delay of '{buffer.item}'")
            buffer.write(*value)

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
        late = {buffer.name: buffer.before(buffer.depth) for buffer in self.buffers if buffer.depth}
        return {"history": late} if late else {}

    @property
    def tail(self) -> tuple[int, tuple[str, ...]]:
        """How many last steps must be recorded one by one, and what of them, so that all buffers are known after."""
        longer = [buffer for buffer in self.buffers if len(buffer.entries) > buffer.depth + 1]
        return max((len(b.entries) for b in longer), default=0), tuple(b.name for b in longer)

    def write(self, final: dict[str, Any], last: dict[str, Any], steps: int) -> None:
        """Set the delay buffers to their entries after ``steps`` steps.

        Parameters
        ----------
        final : the last states, with the histories
        last : what was recorded of the `tail`, by name
        """
        for buffer in self.buffers:
            buffer.set(final, last, buffer.depth, steps)
