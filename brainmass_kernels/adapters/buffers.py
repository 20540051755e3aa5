"""The delay buffers of a brainmass model, as histories of a network or of masses.

The newest entry of a buffer is a state of the traced step: after a step it equals what was written, but before the
first it need not. The entries before it are the history of the loop.
"""

from __future__ import annotations

from typing import Any

import brainunit as u
import jax
import jax.numpy as jnp

from ..errors import Unsupported

# The state of a traced step that is what each region last sent; further buffers have a number.
SENT = "last sent"


class DelayBuffer:
    """A delay buffer that couplings or masses read.

    Parameters
    ----------
    delay : a `brainstate.nn.Delay`
    item : what is delayed, in messages
    number : among the buffers of the model

    Attributes
    ----------
    readers : names of the couplings that read it
    name : of the newest entry, as a state of the traced step
    newest : that state
    entries : as before the run, the oldest first
    structure, unit : of an entry
    written : how often a traced step wrote to it

    Raises
    ------
    Unsupported : it is not written at each step
    """

    def __init__(self, delay, item: str, number: int):
        self.delay, self.item = delay, item
        self.name = f"{SENT} {number}" if number else SENT
        self.readers: list[str] = []
        self.written = 0
        if delay.update_every is not None:
            raise Unsupported(f"a delay of '{item}' cannot be fused: it is updated every {delay.update_every}")

    @property
    def label(self) -> str:
        return " and ".join(self.readers)

    def start(self, regions: int | None = None) -> None:
        """Read the buffer as it is before a run, of as many ``regions`` where these are coupled.

        Raises
        ------
        Unsupported : its entries are of another shape
        """
        import brainstate

        values, self.structure = jax.tree.flatten(self.delay.history.value)
        shapes = [x.shape[1:] for x in values]
        if regions is not None and shapes != [(regions,)]:
            raise Unsupported(
                f"{self.label} cannot be fused: its source '{self.item}' has the shape {', '.join(map(str, shapes))} "
                f"and not ({regions},). brainmass reads the delay of a batch by the wrong axis; vmap runs batches "
                f"of networks"
            )
        self._pointer = self.delay.write_ptr.value
        self.entries = jnp.roll(values[0], -self._pointer, axis=0)
        self.newest = brainstate.ShortTermState(self.structure.unflatten([self.entries[-1]]))
        self.unit = u.get_unit(self.newest.value)

    def write(self, *value) -> None:
        """In the traced step, in place of the delay's ``update``: its only entry is `newest`."""
        self.written += 1
        # A delay that belongs to a state is given nothing, and reads it.
        self.newest.value = self.delay.state.value if hasattr(self.delay, "state") else value[0]

    def check_written(self) -> None:
        if self.written != 1:
            raise Unsupported(
                f"{self.label} cannot be fused: a step writes '{self.item}' to its delay {self.written} times, in "
                f"place of once, as calling the regions does"
            )

    def before(self, depth: int) -> Any:
        """The ``depth`` entries before the newest."""
        return self.entries[-1 - depth : -1]

    def set(self, final: dict[str, Any], last: dict[str, Any], depth: int, steps: int) -> None:
        """Set the buffer to its entries after ``steps`` steps.

        Parameters
        ----------
        final : the last states, with the history, which has ``depth`` entries before the newest
        last : the newest entry after each of the last steps, by name, where the history does not have all
        """
        latest = last.get(self.name)
        if latest is None:
            latest = final[self.name][None]
            if depth:
                past = final["history"]
                latest = jnp.concatenate([past[self.name] if isinstance(past, dict) else past, latest])
        entries = jnp.concatenate([self.entries, latest])[-len(self.entries) :]
        pointer = (self._pointer + steps) % len(entries)
        self.delay.history.value = self.structure.unflatten([jnp.roll(entries, pointer, axis=0)])
        self.delay.write_ptr.value = pointer.astype(self._pointer.dtype)
