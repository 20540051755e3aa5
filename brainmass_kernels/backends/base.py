"""What a backend is: a loop around the step, forward and adjoint."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from ..pointwise import Program, SplitPullback, pullback, pullback_after
from ..schedule import Schedule


class Term(NamedTuple):
    """Connections that carry one of the quantities that are sent to one of the sums.

    Attributes
    ----------
    source : which of the quantities that `Coupling.send` returns
    total : which of the sums
    delays : how many of the connections that count have each delay, from 0 on
    edges : how many connections there are, where they are `Connections` of edges; ``None`` of matrices
    own_weights : whether each network is known to have weights of its own; under vmap they may, and it is not known
    live : whether the delays are data, and not known; ``delays`` has their number alone then
    """

    source: int = 0
    total: int = 0
    delays: tuple[int, ...] = ()
    edges: int | None = None
    own_weights: bool = False
    live: bool = False

    @property
    def count(self) -> int:
        """Connections that count."""
        return sum(self.delays)


class Members(NamedTuple):
    """Which lanes of a network have which equations: those of group k, where one of the coefficients is k.

    Attributes
    ----------
    coef : which coefficient
    spans : of each group the first of its regions, and one after its last
    """

    coef: int
    spans: tuple[tuple[int, int], ...]


class Coupling(NamedTuple):
    """How the lanes of a loop are coupled: each ``regions`` lanes in a row are a network.

    At the beginning of a step each lane sends some numbers, and the step's last inputs are sums over the network of
    what was sent a whole number of steps ago, times the weight of the connection. A sum has one term or several.

    Attributes
    ----------
    regions : lanes of a network
    depths : steps of history of each quantity that is sent, its longest delay
    send : ``(*coefs, *state) -> quantities that a lane sends``
    terms : of the sums, in any order
    members : of a network of groups of models; a backend may leave them, as the step itself tells lanes apart
    """

    regions: int
    depths: tuple[int, ...]
    send: Program
    terms: tuple[Term, ...] = (Term(),)
    members: Members | None = None

    @property
    def depth(self) -> int:
        """The longest delay of all."""
        return max(self.depths)

    @property
    def totals(self) -> int:
        """How many sums arrive at a lane."""
        return 1 + max(term.total for term in self.terms)

    @property
    def count(self) -> int:
        """Connections that count, of all terms."""
        return sum(term.count for term in self.terms)


class Connections(NamedTuple):
    """The connections of networks: as matrices, or, where weights are sparse, as edges.

    Attributes
    ----------
    weights : ``(N, N)``, to a region (row) from a region, or ``(N, N, networks)``; of edges ``(1, E)`` or
        ``(1, E, networks)``
    steps : ``(N, N)`` int32, the delay of each, or ``(N, N, networks)``; of edges ``(E,)`` or ``(E, networks)``
    edges : ``(2, E)`` int32, rows and columns of the connections that count, sorted; in any order the others weigh 0
    """

    weights: jax.Array
    steps: jax.Array
    edges: jax.Array

    @property
    def are_edges(self) -> bool:
        return False

    @property
    def rank_of_steps(self) -> int:
        """The axes of the delays of one network."""
        return 1 if self.are_edges else 2

    @property
    def batches(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Before they are laid out for a kernel: the axes of networks of weights and of delays, which come first."""
        steps = self.steps.shape
        return self.weights.shape[:-2], steps[: len(steps) - self.rank_of_steps]

    @property
    def own_delays(self) -> bool:
        """Whether each network has delays of its own."""
        return self.steps.ndim > self.rank_of_steps

    @property
    def weights_of_edges(self) -> jax.Array:
        """``(E,)`` or ``(E, networks)``."""
        return self.weights[0] if self.are_edges else self.weights[self.edges[0], self.edges[1]]

    @property
    def steps_of_edges(self) -> jax.Array:
        """``(E,)`` or ``(E, networks)``."""
        return self.steps if self.are_edges else self.steps[self.edges[0], self.edges[1]]


class SparseConnections(Connections):
    """Connections of edges."""

    @property
    def are_edges(self) -> bool:
        return True


# Why a backend takes delays that are known.
LIVE = (
    "it compiles delays in, and these are data of the run; 'scan', and 'numba' on CPUs or 'triton' on GPUs, take them"
)
# Why a backend takes matrices of weights only.
SPARSE = "it takes weights as a matrix, and these are sparse; 'scan' and, on CPUs, 'numba' take them"


def of_depth(history: Sequence[jax.Array], depth: int) -> tuple[jax.Array, ...]:
    """Histories that are all as deep, ``(depth, L)``: nobody reads what is put before a shorter one."""
    return tuple(x if len(x) == depth else jnp.pad(x, ((depth - len(x), 0), (0, 0))) for x in history)


def of_own_depths(histories: Sequence[jax.Array], depths: tuple[int, ...]) -> tuple[jax.Array, ...]:
    """The inverse of `of_depth`."""
    return tuple(x[len(x) - depth :] for x, depth in zip(histories, depths, strict=True))


class Operands(NamedTuple):
    """What a loop reads and does not change.

    Attributes
    ----------
    coefs : coefficients, each ``()`` (uniform) or ``(L,)``
    inputs : inputs that vary, each ``(T,)`` (uniform) or ``(T, L)``
    seeds : ``(2, L)`` int32; ``(3, L)`` where the third row has the number of the first step, or ``(4, L)`` where the
        third and fourth have its low and high word; or ``None`` where the loop draws no normals
    connections : of each term of a network's `Coupling`
    """

    coefs: tuple
    inputs: tuple = ()
    seeds: jax.Array | None = None
    connections: tuple[Connections, ...] = ()


class Carry(NamedTuple):
    """What passes from one step to the next.

    Attributes
    ----------
    state : each ``(L,)``
    history : of each quantity that a network sends, ``(its depth, L)``, what was sent in the steps before, the oldest
        first
    """

    state: tuple
    history: tuple[jax.Array, ...] = ()


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
    inverse : ``(*coefs, *state, *inputs, *normals) -> state``, one step back; only for a backend that ``inverse_steps``
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
    inverse: Program | None = None
    coupling: Coupling | None = None

    @property
    def n_observables(self) -> int:
        return len(self.observe.out_avals)

    def read_coefs(self) -> tuple[bool, ...]:
        """For each coefficient, whether the way forth reads it, so that it can have a cotangent."""
        programs = [self.advance, self.observe, *([self.coupling.send] if self.coupling else [])]
        used = (program.uses()[: self.n_coefs] for program in programs)
        return tuple(any(reads) for reads in zip(*used, strict=True))


class Wanted(NamedTuple):
    """Which cotangents an adjoint must return: flags for the coefficients, the inputs, and the weights of each term.

    The sums of a coupling are no inputs here, though the step reads them as its last.
    """

    coefs: tuple[bool, ...]
    inputs: tuple[bool, ...]
    weights: tuple[bool, ...] = ()


class Pullbacks(NamedTuple):
    """The step's adjoint, as pointwise programs.

    Attributes
    ----------
    advance : ``(*coefs, *state, *inputs, *normals, *ct_state') -> (*ct_coefs, *ct_state, *ct_inputs)``,
        the pullback of one step; of the coefficients and inputs only the wanted ones
    observe : ``(*coefs, *state, *ct_observables) -> (*ct_coefs, *ct_state)``, likewise
    inverse : as ``advance``, but of the state after the step, and it returns the state before it as well, last;
        the adjoint then walks back by it and reruns nothing
    send : ``(*coefs, *state, *ct_sent) -> (*ct_coefs, *ct_state)``, of a network
    """

    advance: Program
    observe: Program
    inverse: Program | None = None
    send: Program | None = None

    @classmethod
    def of(cls, loop: Loop, wanted: Wanted) -> Pullbacks:
        """Those of a loop's programs for the wanted cotangents."""
        state = (True,) * loop.n_state
        inputs = (*wanted.inputs, *(True,) * (loop.coupling.totals if loop.coupling else 0))
        advance = pullback(loop.advance, (*wanted.coefs, *state, *inputs, *(False,) * loop.n_normals))
        place = slice(loop.n_coefs, loop.n_coefs + loop.n_state)
        return cls(
            advance,
            pullback(loop.observe, (*wanted.coefs, *state)),
            pullback_after(loop.inverse, advance, place) if loop.inverse else None,
            pullback(loop.coupling.send, (*wanted.coefs, *state)) if loop.coupling else None,
        )


class SplitPullbacks(NamedTuple):
    """Each pullback in two: what it needs of a step, which replay keeps, and what it makes of that on the way back."""

    advance: SplitPullback
    observe: SplitPullback
    send: SplitPullback | None = None

    @classmethod
    def of(cls, loop: Loop, pullbacks: Pullbacks, kept_inputs: int = 0) -> SplitPullbacks:
        """State and normals are kept, coefficients and inputs read again but for the last ``kept_inputs`` inputs."""
        send = cls.split(loop, pullbacks.send) if pullbacks.send else None
        return cls(cls.of_step(loop, pullbacks.advance, kept_inputs), cls.split(loop, pullbacks.observe), send)

    @classmethod
    def of_step(cls, loop: Loop, advance: Program, kept_inputs: int = 0) -> SplitPullback:
        """The pullback ``advance`` alone."""
        kept = [False] * (loop.n_inputs - kept_inputs) + [True] * (kept_inputs + loop.n_normals)
        return cls.split(loop, advance, kept)

    @staticmethod
    def split(loop: Loop, program: Program, rest: Sequence[bool] = ()) -> SplitPullback:
        """A pullback of coefficients, the state and the ``rest``, of which flags tell what is kept."""
        known = [False] * loop.n_coefs + [True] * loop.n_state + list(rest)
        cotangents = [False] * (len(program.in_avals) - len(known))
        return SplitPullback(program, [not x for x in known] + cotangents, known + cotangents)


class Forward(NamedTuple):
    """What a forward run returns.

    Attributes
    ----------
    records : one ``(K, L)`` array for each observable
    final : the carry after the last step
    saved : whatever the backend's own adjoint needs; ``None`` unless checkpoints were asked for
    """

    records: tuple[jax.Array, ...]
    final: Carry
    saved: Any = None


class Cotangents(NamedTuple):
    """Cotangents of what a forward run returns, shaped as it is."""

    records: tuple[jax.Array, ...]
    final: Carry


class Adjoint(NamedTuple):
    """What an adjoint run returns: cotangents of what a forward run takes.

    Attributes
    ----------
    coefs : one ``(L,)`` array for each wanted coefficient (not yet summed where it was uniform)
    initial : of the carry before the first step
    inputs : for each wanted input ``(T, L)``, or, of a uniform one, partial sums ``(T, P)``, any P
    weights : of each term of a network, where they are wanted ``(N, N, networks)``, of edges ``(1, E, networks)``;
        else ``None``
    """

    coefs: tuple[jax.Array, ...]
    initial: Carry
    inputs: tuple[jax.Array, ...]
    weights: tuple[jax.Array | None, ...] = ()


class Request(NamedTuple):
    """What a backend needs to know to say whether it can run."""

    loop: Loop
    lanes: int
    dtype: Any
    platform: str


def programs_of(loop: Loop) -> tuple[Program, ...]:
    """All that a kernel of this loop evaluates on its way forth, and on its way back but for the pullbacks."""
    maybe = (loop.inverse, loop.coupling.send if loop.coupling else None)
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


def not_here(platform: str, needed: str, interpreter: str = "Pallas") -> str | None:
    """Why a kernel for one platform cannot run on this one, or ``None``."""
    if platform == needed:
        return None
    return (
        f"this machine's platform is '{platform}', not '{needed}'; "
        f"`brainmass_kernels.testing.interpret()` runs it in {interpreter}'s interpreter"
    )


def no_records(loop: Loop, lanes: int, dtype: Any = "float32") -> tuple[jax.Array, ...]:
    """The records of a run that takes none."""
    return (jnp.zeros((0, lanes), dtype),) * loop.n_observables


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
    """A loop around the step, forward and adjoint."""

    name: str
    interpretable: bool  # whether `testing.interpret` can run it away from its device
    inverse_steps: bool  # whether its adjoint can walk back by inverse steps
    networks: bool  # whether it runs networks of coupled masses
    by_group: bool  # whether a region of a network of groups runs the equations of its own group alone
    masses_together: int  # most masses with delays of their own that it is given as one network, of edges if of several

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

    def pointwise(self, program: Program) -> Callable | None:
        """``(arguments, lanes, all_lanes) -> outputs``, a program around the loop as a kernel; ``None``, XLA has it."""
        ...

    def forward(self, loop: Loop, operands: Operands, initial: Carry, checkpoint_every: int | None = None) -> Forward:
        """Run the loop; with ``checkpoint_every``, also keep what the adjoint needs."""
        ...

    def adjoint(
        self, loop: Loop, pullbacks: Pullbacks, wanted: Wanted, operands: Operands, saved: Any, cotangents: Cotangents,
        checkpoint_every: int,
    ) -> Adjoint:  # fmt: skip
        """Walk back over a forward run that kept checkpoints."""
        ...
