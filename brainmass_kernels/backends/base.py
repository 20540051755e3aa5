"""What a backend is: a loop around the step, forward and adjoint."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple, Protocol

import jax

from ..pointwise import Program, pullback


class Unsupported(NotImplementedError):
    """A named implementation cannot run this request; the message says why and what would serve."""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Which steps are taken and after which of them the observables are recorded.

    Record ``k`` is taken at the end of step ``lead + (k + 1) * every`` (steps count from 1).

    Attributes
    ----------
    steps : number of steps in all
    lead : steps before recording begins (the transient)
    every : steps from one record to the next
    """

    steps: int
    lead: int = 0
    every: int = 1

    @property
    def count(self) -> int:
        """How many records there are."""
        return max(0, self.steps - self.lead) // self.every


class Piece(NamedTuple):
    """Equal segments of a run: each ``strides`` strides of ``stride`` steps, recorded after each stride or not at all.

    A stride longer than a segment has ``parts``, pieces of its own, and is then the only one of its segment.
    """

    start: int
    segments: int
    strides: int
    stride: int
    recorded: bool
    parts: tuple[Piece, ...] = ()

    @property
    def length(self) -> int:
        return self.strides * self.stride

    @property
    def records(self) -> int:
        """Records of one segment."""
        return self.strides if self.recorded else 0


def pieces(schedule: Schedule, segment: int) -> Iterator[Piece]:
    """Cut a run into pieces whose segments have at most ``segment`` steps: transient, recorded part, rest."""
    lead = min(schedule.lead, schedule.steps)
    yield from _unrecorded(0, lead, segment)
    count, every = schedule.count, schedule.every
    if every > segment and count:
        yield Piece(lead, count, 1, every, True, tuple(_unrecorded(0, every, segment)))
    else:
        each = max(1, segment // every)
        full = count // each
        if full:
            yield Piece(lead, full, each, every, True)
        if count % each:
            yield Piece(lead + full * each * every, 1, count % each, every, True)
    recorded = lead + count * every
    yield from _unrecorded(recorded, schedule.steps - recorded, segment)


def _unrecorded(start: int, steps: int, segment: int) -> Iterator[Piece]:
    full = steps // segment
    if full:
        yield Piece(start, full, 1, segment, False)
    if steps % segment:
        yield Piece(start + full * segment, 1, 1, steps % segment, False)


class Body(NamedTuple):
    """How the steps of a segment are written out.

    Attributes
    ----------
    strides : strides in one body; 0 where a stride takes several bodies
    steps : steps in one body; what is left over has a shorter one
    even : whether every body begins an even number of steps after the segment
    """

    strides: int
    steps: int
    even: bool

    @classmethod
    def of(cls, piece: Piece, most: int, noisy: bool) -> Body:
        """At most ``most`` steps; of an even number, if it can be, where a step is ``noisy``."""
        stride = piece.stride
        if stride <= most:
            several = min(most // stride, piece.strides)
            several -= several % 2 if noisy and stride % 2 and 1 < several < piece.strides else 0
            return cls(several, several * stride, several * stride % 2 == 0 or several == piece.strides)
        size = even_share(stride, most, 2 if noisy else 1)
        return cls(0, size, size % 2 == 0 and (stride % 2 == 0 or piece.strides == 1))


def even_share(n: int, most: int, unit: int = 1) -> int:
    """A divisor of ``n`` near ``most`` if there is one, so that nothing is left over; a multiple of ``unit``."""
    most = most - most % unit or most
    return next((d for d in range(most, most // 3, -1) if n % d == 0 and d % unit == 0), most)


def parity_in(parity: int | None, piece: Piece) -> int | None:
    """That of the first step of each segment of a piece where it is known, given that of where the pieces begin."""
    if parity is None or (piece.segments > 1 and piece.length % 2):
        return None
    return (parity + piece.start) % 2


def segments_in(parts: Sequence[Piece]) -> int:
    return sum(piece.segments for piece in parts)


def within(piece: Piece, most: int) -> tuple[Piece, ...]:
    """A segment that is too long to be walked back at once, in pieces of at most ``most`` steps."""
    if piece.parts:
        return piece.parts
    every = piece.stride if piece.recorded else piece.length + 1
    return tuple(pieces(Schedule(piece.length, 0, every), most))


def depths(parts: Sequence[Piece], most: int) -> list[int]:
    """How many states each further level of checkpoints has, the first being that within these pieces."""
    found: list[int] = []
    for piece in parts:
        if piece.parts or piece.length > most:
            inner = within(piece, most)
            below = [segments_in(inner), *depths(inner, most)]
            found = [max(pair) for pair in zip_longest(found, below, fillvalue=0)]
    return found


class Coupling(NamedTuple):
    """How the lanes of a loop are coupled: each ``regions`` lanes in a row are a network.

    At the beginning of a step each lane sends a number, and the step's last input is a sum over the network of what
    was sent a whole number of steps ago, from 0 to ``depth``, times the weight of the connection.

    Attributes
    ----------
    regions : lanes of a network
    depth : steps of history, the longest delay
    send : ``(*coefs, *state) -> what a lane sends``
    delays : how many of the connections that count have each delay, from 0 to ``depth``
    """

    regions: int
    depth: int
    send: Program
    delays: tuple[int, ...] = ()


class Wires(NamedTuple):
    """The connections of networks.

    Attributes
    ----------
    weights : ``(N, N)``, to a region (row) from a region, or ``(N, N, networks)``
    steps : ``(N, N)`` int32, the delay of each
    history : ``(depth, L)``, what was sent before the first step, the oldest first
    ends : ``(2, E)`` int32, rows and columns of the connections that count, sorted; in any order the others weigh 0
    """

    weights: jax.Array
    steps: jax.Array
    history: jax.Array
    ends: jax.Array


@dataclasses.dataclass(frozen=True)
class Loop:
    """One time loop, without its data: the step's programs and the schedule.

    All programs are pointwise: they take and return arrays of any one lane shape, and mix no lanes.

    Attributes
    ----------
    advance : ``(*coefs, *state, *inputs, *normals) -> state``, one step
    observe : ``(*coefs, *state) -> observables``
    n_coefs, n_state, n_inputs, n_normals : how many of each there are
    schedule : Schedule
    precision : ``"exact"`` or ``"fast"`` (the hardware's approximate functions are welcome)
    interpret : "plain" or "races" to run an accelerator kernel in its interpreter, which may look for races; or ""
    retreat : ``(*coefs, *state, *inputs, *normals) -> state``, one step back; only for a backend that ``retreats``
    coupling : how lanes are coupled, or ``None``; only for a backend that has ``networks``
    """

    advance: Program
    observe: Program
    n_coefs: int
    n_state: int
    n_inputs: int
    n_normals: int
    schedule: Schedule
    precision: str = "exact"
    interpret: str = ""
    retreat: Program | None = None
    coupling: Coupling | None = None

    @property
    def n_observables(self) -> int:
        return len(self.observe.out_avals)

    def read_coefs(self) -> tuple[bool, ...]:
        """For each coefficient, whether the way forth reads it, so that it can have a cotangent."""
        programs = [self.advance, self.observe, *([self.coupling.send] if self.coupling else [])]
        used = (program.uses()[: self.n_coefs] for program in programs)
        return tuple(any(reads) for reads in zip(*used, strict=True))

    def split(self, args: Sequence[Any]) -> tuple[tuple, tuple, tuple, tuple]:
        """Cut ``(*coefs, *state, *inputs, *normals)`` into its four parts."""
        a, b, c = self.n_coefs, self.n_coefs + self.n_state, self.n_coefs + self.n_state + self.n_inputs
        return tuple(args[:a]), tuple(args[a:b]), tuple(args[b:c]), tuple(args[c:])


class Wanted(NamedTuple):
    """Which cotangents an adjoint must return: a flag for each coefficient and each input, and for a network's weights.

    The sum of a coupling is no input here, though the step reads it as its last.
    """

    coefs: tuple[bool, ...]
    inputs: tuple[bool, ...]
    weights: bool = False


class Pullbacks(NamedTuple):
    """The step's adjoint, as pointwise programs.

    Attributes
    ----------
    advance : ``(*coefs, *state, *inputs, *normals, *ct_state') -> (*ct_coefs, *ct_state, *ct_inputs)``,
        the pullback of one step; of the coefficients and inputs only the wanted ones
    observe : ``(*coefs, *state, *ct_observables) -> (*ct_coefs, *ct_state)``, likewise
    retreat : as ``advance``, but of the state after the step, and it returns the state before it as well, last;
        the adjoint then walks back by it and reruns nothing
    send : ``(*coefs, *state, ct_sent) -> (*ct_coefs, *ct_state)``, of a network
    """

    advance: Program
    observe: Program
    retreat: Program | None = None
    send: Program | None = None


class Forward(NamedTuple):
    """What a forward run returns.

    Attributes
    ----------
    records : one ``(K, L)`` array for each observable
    final : one ``(L,)`` array for each state; of a network, then the history, ``(depth, L)``
    saved : whatever the backend's own adjoint needs; ``None`` unless checkpoints were asked for
    """

    records: tuple[jax.Array, ...]
    final: tuple[jax.Array, ...]
    saved: Any = None


class Adjoint(NamedTuple):
    """What an adjoint run returns.

    Attributes
    ----------
    coefs : one ``(L,)`` array for each wanted coefficient (not yet summed where it was uniform)
    state : one ``(L,)`` array for each state, the cotangent of the initial state
    inputs : for each wanted input ``(T, L)``, or, of a uniform one, partial sums ``(T, P)``, any P
    wires : of a network, cotangents of the weights, ``(N, N, networks)`` or ``None``, and of the history
    """

    coefs: tuple[jax.Array, ...]
    state: tuple[jax.Array, ...]
    inputs: tuple[jax.Array, ...]
    wires: tuple[Any, ...] | None = None


class Request(NamedTuple):
    """What a backend needs to know to say whether it can run."""

    loop: Loop
    lanes: int
    dtype: Any
    platform: str


def programs_of(loop: Loop) -> tuple[Program, ...]:
    """All that a kernel of this loop evaluates on its way forth, and on its way back but for the pullbacks."""
    maybe = (loop.retreat, loop.coupling.send if loop.coupling else None)
    return (loop.advance, loop.observe, *(program for program in maybe if program))


@functools.lru_cache(maxsize=256)
def lacking(lacks: Callable[[Program], str | None], *programs: Program) -> str | None:
    """Why a backend cannot run these programs or their pullbacks, or ``None``.

    A run whose gradient could not be taken is refused as a whole, before it is launched.

    Parameters
    ----------
    lacks : of one program, the reason or ``None``
    """
    for program in programs:
        if reason := lacks(program):
            return reason
    for program in programs:
        try:
            back = pullback(program, [a.dtype.kind == "f" for a in program.in_avals])
        except NotImplementedError as error:
            return f"the {program.label} has no gradient: {error}"
        if reason := lacks(back):
            return f"in its gradient, {reason}"
    return None


class Copied(NamedTuple):
    """What a kernel writes before it becomes the arrays that a run returns, where these are other memory.

    Attributes
    ----------
    lanes : of the kernel's own arrays; 0 where it writes straight to those that are returned
    block : of a multiple of so many lanes there is no copy; 0 where no number of lanes avoids it
    """

    lanes: int = 0
    block: int = 0


class Backend(Protocol):
    """A loop around the step, forward and adjoint.

    ``coefs`` are ``()`` (uniform) or ``(L,)``; ``state`` are ``(L,)``; ``inputs`` are ``(T,)`` (uniform) or
    ``(T, L)``; ``seeds`` is a ``(2, L)`` int32 array, or ``None`` where the loop draws no normals. A backend that has
    ``networks`` takes their `Wires` as one more argument, last.
    """

    name: str
    interpretable: bool  # whether `testing.interpret` can run it away from its device
    retreats: bool  # whether its adjoint can walk back by inverse steps
    networks: bool  # whether it runs networks of coupled masses
    same_lanes: bool  # whether a lane has the same bits alone and in a batch; what surrounds the loop is then built so

    def base_two(self, precision: str) -> bool:
        """Whether a logistic function is cheaper made of powers of two than of tanh."""
        ...

    def unavailable(self, platform: str) -> str | None:
        """Why nothing can run on this platform ("cpu", "gpu", "tpu"), or ``None``."""
        ...

    def unsupported(self, request: Request) -> str | None:
        """Why the request cannot run, wherever it is, or ``None`` if it can."""
        ...

    def copied(self, request: Request) -> Copied:
        """What is copied of the records."""
        ...

    def forward(self, loop: Loop, coefs, state, inputs, seeds, checkpoint_every: int | None = None) -> Forward:
        """Run the loop; with ``checkpoint_every``, also keep what the adjoint needs."""
        ...

    def adjoint(
        self,
        loop: Loop,
        pullbacks: Pullbacks,
        wanted: Wanted,
        coefs,
        saved,
        inputs,
        seeds,
        ct_records,
        ct_final,
        checkpoint_every: int,
    ) -> Adjoint:
        """Walk back over a forward run that kept checkpoints."""
        ...
