"""States at rest: where a flow settles, by implicit steps and Newton's, and whether what is near stays near.

The derivative of a fixed point by parameters is the implicit function theorem's, of any order.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .systems import Data, System, delays_of, field, linearised, matrices

#: Implicit steps of the flow, each so many times as long as the one before it, and Newton's steps after these.
_STEPS, _GROWTH, _NEWTON = 40, 2.0, 4
#: Shares of a Newton step that are tried.
_SHARES = (1.0, 0.5, 0.2, 0.04)
#: The largest Newton step of a state at rest, relative to what rounding can make of its terms.
_TOLERANCE = {4: 3e-5, 8: 1e-10}
#: What counts as no state at all, in its declared unit.
NOTHING = 1e-2
#: Nodes in time of what was sent, over the longest delay.
NODES = 20
#: Squarings that tell growth from decay: what grows by one in 2^32 a step is told.
_SQUARINGS = 32


def tolerance(dtype) -> float:
    return _TOLERANCE[np.dtype(dtype).itemsize]


class Root(NamedTuple):
    """A solution of ``field(x) = 0``.

    Attributes
    ----------
    x : ``(D,)``, all states of all regions
    found : whether it is one
    scale : ``(D,)``, the size of what each state is made of, to compare differences with
    """

    x: Any
    found: Any
    scale: Any


def flat_field(system: System, data: Data):
    """The field of flat states ``(D,)``."""
    shape = (system.regions, system.states)
    return lambda x: field(system, data, x.reshape(shape)).ravel()


def settled(system: System, data: Data) -> Root:
    """Where the flow from ``data.start`` comes to rest."""
    f = flat_field(system, data)
    return judged(f, flowed(f, data.start.ravel()))


def flowed(f, x):
    """The state after implicit Euler steps of growing length, the last of which are Newton's.

    The first steps are short beside the fastest rate, so that the flow is followed; the last, infinite.
    """
    eye = jnp.eye(len(x), dtype=x.dtype)

    def step(k, carry):
        x, rate = carry
        slope = jax.jacfwd(f)(x)
        fastest = jnp.sqrt(jnp.max(jnp.abs(jnp.matmul(slope, slope, precision="highest"))))
        fastest = jnp.where((fastest > 0) & jnp.isfinite(fastest), fastest, 1.0)
        rate = jnp.where(k == 0, 10.0 * fastest, rate / _GROWTH)
        moved = x + jnp.linalg.solve(jnp.where(k < _STEPS, rate, 0.0) * eye - slope, f(x))
        return jnp.where(jnp.isfinite(moved).all(), moved, x), rate

    return lax.fori_loop(0, _STEPS + _NEWTON, step, (x, jnp.zeros((), x.dtype)))[0]


def newton(f, x, steps: int = 40) -> Root:
    """Newton's iteration with steps that are shortened where they lead away, in the norm of the next step.

    Deuflhard 2004, "Newton methods for nonlinear problems", section 3.3 (the natural monotonicity test).
    """

    def size(change, x):
        norm = jnp.max(jnp.abs(change) / (jnp.abs(x) + NOTHING))
        return jnp.where(jnp.isnan(norm), jnp.inf, norm)

    def step(carry):
        k, x, _ = carry
        inverse = jnp.linalg.inv(jax.jacfwd(f)(x))
        change = -jnp.matmul(inverse, f(x), precision="highest")
        tried = x[None] + jnp.asarray(_SHARES, x.dtype)[:, None] * change[None]
        after = jnp.einsum("ij,kj->ki", inverse, jax.vmap(f)(tried), precision="highest")
        sizes = jax.vmap(size, (0, None))(after, x)
        # The longest step that gets nearer, or the one that gets nearest.
        nearer = sizes < size(change, x)
        best = jnp.where(nearer.any(), jnp.argmax(nearer), jnp.argmin(sizes))
        return k + 1, tried[best], size(change, x)

    def goes_on(carry):
        k, _, last = carry
        return (k < steps) & (last > 1e-3 * tolerance(x.dtype))

    x = lax.while_loop(goes_on, step, (0, x, jnp.asarray(jnp.inf, x.dtype)))[1]
    return judged(f, x)


def judged(f, x) -> Root:
    """Whether a state is at rest: a Newton step from it is small beside what rounding makes of its terms.

    Skeel 1979, J. ACM 26:494 (the condition of each component).
    """
    jacobian = jax.jacfwd(f)(x)
    inverse = jnp.linalg.inv(jacobian)
    change = jnp.matmul(inverse, f(x), precision="highest")
    terms = jnp.matmul(jnp.abs(jacobian), jnp.abs(x), precision="highest")
    scale = jnp.matmul(jnp.abs(inverse), terms, precision="highest")
    small = jnp.abs(change) <= tolerance(x.dtype) * (scale + NOTHING)
    return Root(x, small.all() & jnp.isfinite(x).all(), scale)


def fixed_point(system: System, data: Data) -> tuple[Any, Any]:
    """The state at rest ``(N, n)``, differentiable in the data, and whether there is one; else the start."""
    x, found = _rest(system, data)
    return x.reshape(system.regions, system.states), found > 0


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _rest(system: System, data: Data):
    root = settled(system, data)
    return jnp.where(root.found, root.x, data.start.ravel()), root.found.astype(system.dtype)


@_rest.defjvp
def _(system: System, primals, tangents):
    (data,), (change,) = primals, tangents
    x, found = _rest(system, data)
    slope = jax.jacfwd(flat_field(system, data))(x)
    pushed = jax.jvp(lambda data: flat_field(system, data)(x), (data,), (change,))[1]
    moved = jnp.where(found > 0, -jnp.linalg.solve(slope, pushed), 0.0)
    return (x, found), (moved, jnp.zeros_like(found))


# What is near a state at rest -----------------------------------------------------------------------------------------


def generator(system: System, data: Data, x):
    """The matrix of the linear system near ``x``, whose eigenvalues are its rates; delays make it larger.

    With delays, the states are followed by what each region sent at the nodes of a Chebyshev polynomial in time: the
    pseudospectral method of Breda, Maset and Vermiglio 2005 (SIAM J. Sci. Comput. 27:482). The rightmost eigenvalues
    are exact to rounding where nothing oscillates much faster than once in a third of the longest delay.
    """
    near, n, count = linearised(system, data, x), system.regions, system.states
    own = jnp.einsum("iab,ij->iajb", near.own, jnp.eye(n, dtype=system.dtype), precision="highest")
    if not system.delayed:
        own = own + sum(_from_states(near, w, path, first) for w, path, first in _each(system, data, _undelayed))
        return own.reshape(n * count, n * count)
    longest = _longest(system, data)
    places = (np.cos(np.pi * np.arange(NODES + 1) / NODES) - 1) / 2
    past = jnp.zeros((n, count, NODES, n, system.quantities), system.dtype)
    for weights, path, first in _each(system, data, lambda d: _interpolation(d / longest)):
        # Paths without a delay read the present alone.
        now, before = (weights[0], weights[1:]) if weights.ndim == 3 else (weights, None)
        own = own + _from_states(near, now, path, first)
        if before is not None:
            for t, q in enumerate(path.reads, first):
                past = past.at[..., q].add(jnp.einsum("ia,kij->iakj", near.sums[..., t], before, precision="highest"))
    slope = jnp.asarray(_differentiation(places), system.dtype) / longest
    eye = jnp.eye(n * system.quantities, dtype=system.dtype)
    sends = jnp.einsum("k,iqa,ij->kiqja", slope[1:, 0], near.sent, jnp.eye(n, dtype=system.dtype))
    size, more = n * count, NODES * n * system.quantities
    return jnp.block(
        [
            [own.reshape(size, size), past.reshape(size, more)],
            [sends.reshape(more, size), jnp.kron(slope[1:, 1:], eye)],
        ]
    )


def _undelayed(delays):
    return jnp.ones_like(delays)


def _each(system: System, data: Data, share):
    """Of each path the weights times a share of its delays, the path, and the number of its first sum."""
    first = 0
    for weights, path in zip(matrices(system, data, share), system.paths):
        yield weights, path, first
        first += len(path.reads)


def _from_states(near, weights, path, first: int):
    """What arrives by a path from the present states, ``(N, n, N, n)``."""
    return sum(
        jnp.einsum("ia,ij,jb->iajb", near.sums[..., t], weights, near.sent[:, q], precision="highest")
        for t, q in enumerate(path.reads, first)
    )


def _longest(system: System, data: Data):
    """The longest delay, in the model's unit of time; 1 where all are zero."""
    known = [
        jnp.max(delays_of(path, data, delays), initial=0.0)
        for path, (_, delays) in zip(system.paths, data.connections)
        if path.delayed
    ]
    longest = functools.reduce(jnp.maximum, known)
    return jnp.where(longest > 0, longest, 1.0)


def _interpolation(late):
    """The weight of each node in a value of so long ago, ``(K + 1, ...)``; the time of the longest delay is 1."""
    angles = np.pi * np.arange(NODES + 1) / NODES
    at_nodes = np.cos(np.outer(np.arange(NODES + 1), angles))
    inverse = jnp.asarray(np.linalg.inv(at_nodes), late.dtype)
    angle = jnp.arccos(jnp.clip(1.0 - 2.0 * late, -1.0, 1.0))
    orders = jnp.arange(NODES + 1, dtype=late.dtype).reshape(-1, *(1,) * late.ndim)
    shape = (NODES + 1, *late.shape)
    chebyshev = jnp.cos(jnp.broadcast_to(orders, shape) * jnp.broadcast_to(angle[None], shape))
    return jnp.tensordot(inverse, chebyshev, 1, precision="highest")


def _differentiation(places: np.ndarray) -> np.ndarray:
    """The matrix of differentiation at the nodes (Trefethen 2000, Spectral Methods in MATLAB, chapter 6)."""
    last = len(places) - 1
    ends = np.where((np.arange(last + 1) == 0) | (np.arange(last + 1) == last), 2.0, 1.0)
    weights = ends * (-1.0) ** np.arange(last + 1)
    apart = places[:, None] - places[None] + np.eye(last + 1)
    matrix = np.outer(weights, 1.0 / weights) / apart
    return matrix - np.diag(matrix.sum(1))


def is_stable(matrix):
    """Whether all eigenvalues of a real matrix have a negative real part, without computing them.

    Cayley's transform takes the left half plane into the unit circle; the powers of its result, by squaring, vanish
    or do not. So it runs on every device, in batches.
    """
    size = len(matrix)
    eye = jnp.eye(size, dtype=matrix.dtype)
    # Near the geometric mean of the eigenvalues.
    scale = jnp.exp(jnp.linalg.slogdet(matrix)[1] / size)
    scale = jnp.where((scale > 0) & jnp.isfinite(scale), scale, 1.0)
    power = jnp.linalg.solve(scale * eye - matrix, scale * eye + matrix)

    def norm(x):
        return jnp.sqrt(jnp.sum(jnp.square(x)))

    def square(carry):
        k, power, log_norm = carry
        size = norm(power)
        power = power / jnp.where(size > 0, size, 1.0)
        return k + 1, jnp.matmul(power, power, precision="highest"), 2.0 * (log_norm + jnp.log(size))

    def undecided(carry):
        k, power, log_norm = carry
        known = log_norm + jnp.log(norm(power))
        largest = log_norm + jnp.log(jnp.abs(jnp.trace(power)) / size)
        return (k < _SQUARINGS) & (known >= 0) & (largest <= 0)

    _, power, log_norm = lax.while_loop(undecided, square, (0, power, jnp.zeros((), matrix.dtype)))
    return log_norm + jnp.log(norm(power)) < 0
