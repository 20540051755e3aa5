"""Integration schemes: one step of a model, each written as the state plus an increment.

A scheme may carry the state in other coordinates: ``enter`` transforms it before the first step, ``exit`` transforms
it back. Strang's scheme carries the state half a flow ahead, so that the half flows of successive steps become one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp

State = dict


class Staged(SimpleNamespace):
    """Inputs that change within a step: those of its beginning, and by a call those of a stage from 0 to 1."""

    def __init__(self, at: Callable[[float], dict]):
        super().__init__(**at(0.0))
        self.__dict__[_AT] = at

    def __call__(self, stage: float) -> SimpleNamespace:
        return SimpleNamespace(**self.__dict__[_AT](stage))


# No name of an input.
_AT = "inputs at a stage"


def at_stage(i, stage: float):
    """The inputs at a stage of a step; others than stimuli are held within it."""
    return i(stage) if isinstance(i, Staged) else i


class Scheme(NamedTuple):
    """One step of size ``h`` of a model, from states, parameters and inputs.

    Attributes
    ----------
    step : ``(model, state, p, i, h) -> state``
    order : of convergence
    limit : largest ``a h`` at which a second-order block with rate ``a`` is stable; ``None``, any
    needs : the attribute that a model must have, a key of `NEEDS`; empty, none
    enter, exit : ``(model, state, p, h) -> state``, to the coordinates of ``step`` and back
    inverse : as ``step``, the state before a step from the state after it, if a closed form is known
    """

    step: Callable
    order: int
    limit: float | None
    needs: str = ""
    enter: Callable = lambda model, s, p, h: s
    exit: Callable = lambda model, s, p, h: s
    inverse: Callable | None = None


def _drift(model, s: State, p, i) -> State:
    """The rate of each state, white noise on it included."""
    rates, push = model.drift(SimpleNamespace(**s), p, i), _push(model, s, p)
    return {n: rate + push[n] if n in push else rate for n, rate in rates.items()}


def _push(model, s: State, p) -> State:
    """The contribution of white noise on states to their rates, from `step.Noisy`."""
    return model.push(SimpleNamespace(**s), p) if hasattr(model, "push") else {}


def _shifted(s: State, rates: State, h) -> State:
    return {n: s[n] + h * rates[n] for n in s}


def _euler(model, s, p, i, h):
    return _shifted(s, _drift(model, s, p, i), h)


def _heun(model, s, p, i, h):
    k1 = _drift(model, s, p, i)
    k2 = _drift(model, _shifted(s, k1, h), p, at_stage(i, 1.0))
    return {n: s[n] + 0.5 * h * (k1[n] + k2[n]) for n in s}


def _rk4(model, s, p, i, h):
    k1 = _drift(model, s, p, i)
    middle, end = at_stage(i, 0.5), at_stage(i, 1.0)
    k2 = _drift(model, _shifted(s, k1, 0.5 * h), p, middle)
    k3 = _drift(model, _shifted(s, k2, 0.5 * h), p, middle)
    k4 = _drift(model, _shifted(s, k3, h), p, end)
    return {n: s[n] + h / 6.0 * (k1[n] + 2.0 * k2[n] + 2.0 * k3[n] + k4[n]) for n in s}


def _exp_euler(model, s, p, i, h):
    """Exponential Euler with the diagonal of the Jacobian, state by state, like brainmass."""
    return _relaxed(model, s, p, i, h, list(s))


def _relaxed(model, s, p, i, h, names) -> State:
    """These states by exponential Euler."""
    stepped, push = {}, _push(model, s, p)

    def rate_of(n, x):
        return model.drift(SimpleNamespace(**{**s, n: x}), p, i)[n]

    for n in names:
        # The slope is that of the drift alone; with that of the noise the integral would not be Ito's.
        rate, slope = jax.jvp(lambda x, n=n: rate_of(n, x), (s[n],), (jnp.ones_like(s[n]),))
        stepped[n] = s[n] + h * _phi(h * slope) * (rate + push[n] if n in push else rate)
    return stepped


def _between(model, moved: State, s: State, p, i, h) -> State:
    """``moved`` plus the noise on states of blocks, and the states outside blocks by exponential Euler."""
    others = [n for n in s if not any(n in (b.position, b.velocity) for b in model.blocks)]
    pushed = {n: moved[n] + h * rate for n, rate in _push(model, s, p).items() if n not in others}
    return {**moved, **pushed, **_relaxed(model, s, p, i, h, others)}


def _phi(z):
    """(exp(z) - 1) / z, 1 at 0."""
    small = jnp.abs(z) < 1e-4
    away = jnp.where(small, 1.0, z)
    # exp(z) - 1 by primitives that every backend has.
    return jnp.where(small, 1.0 + 0.5 * z, jnp.tanh(0.5 * away) * (jnp.exp(away) + 1.0) / away)


def _symplectic_euler(model, s, p, i, h):
    """Velocities first, then the positions with the new velocities."""
    rates = _drift(model, s, p, i)
    stepped = _shifted(s, rates, h)
    for position, velocity in model.pairs:
        stepped[position] = s[position] + h * stepped[velocity]
    return stepped


def _flow(model, s, p, h, equilibrium: State | None = None):
    """The closed-form flow over ``h`` of every block around its equilibrium (0 without a drive)."""
    stepped = dict(s)
    for b in model.blocks:
        a, x, v = getattr(p, b.a), s[b.position], s[b.velocity]
        y = x if equilibrium is None else x - equilibrium[b.position]
        z = a * h
        decay = jnp.exp(-z)
        stepped[b.position] = x + (_position_loss(z) * y + h * decay * v)
        stepped[b.velocity] = v + ((jnp.expm1(-z) - z * decay) * v - a * z * decay * y)
    return stepped


def _position_loss(z):
    """(1 + z) exp(-z) - 1, about -z^2/2 for small z: by its series there, to avoid cancellation."""
    small = jnp.abs(z) < 0.5
    near = jnp.where(small, z, 0.0)
    series = 0.0
    for n in range(15, 1, -1):
        series = series * near + (-1) ** (n - 1) * (n - 1) / math.factorial(n)
    far = jnp.where(small, 1.0, z)
    return jnp.where(small, series * near * near, jnp.expm1(-far) + far * jnp.exp(-far))


def _exact(model, s, p, i, h):
    i = at_stage(i, 0.5)
    drive = model.drive(SimpleNamespace(**s), p, i)
    equilibrium = {b.position: getattr(p, b.A) / getattr(p, b.a) * drive[b.position] for b in model.blocks}
    return _between(model, _flow(model, s, p, h, equilibrium), s, p, i, h)


def _kick(model, s, p, i, h):
    # Half a flow before it and half a flow after: a kick is in the middle of its step.
    i = at_stage(i, 0.5)
    drive = model.drive(SimpleNamespace(**s), p, i)
    kicked = {
        b.velocity: s[b.velocity] + h * (getattr(p, b.A) * getattr(p, b.a) * drive[b.position]) for b in model.blocks
    }
    return _between(model, {**s, **kicked}, s, p, i, h)


def _strang(model, s, p, i, h):
    return _flow(model, _kick(model, s, p, i, h), p, h)


def _strang_inverse(model, s, p, i, h):
    """A kick depends on positions, which it does not change. Rounding errors grow by exp(a h)."""
    return _kick(model, _flow(model, s, p, -h), p, i, -h)


def invertible(model, scheme: str, noisy: Sequence[str]) -> bool:
    """Whether steps of a model have an inverse: only those of blocks without noise on a state."""
    in_blocks = {n for b in getattr(model, "blocks", ()) for n in (b.position, b.velocity)}
    return SCHEMES[scheme].inverse is not None and in_blocks == set(model.states) and not in_blocks & set(noisy)


# Attributes of a model that some schemes need, in words.
NEEDS = {
    "blocks": "made of second-order blocks",
    "pairs": "made of positions and velocities",
    "step": "with a `step` of its own",
}

# Stability of the double pole at -a, z = a h: |1 - z| < 1 for euler, and so on; of symplectic Euler, by its trace.
SCHEMES: dict[str, Scheme] = {
    "euler": Scheme(_euler, 1, 2.0),
    "exp_euler": Scheme(_exp_euler, 1, 2.0),
    "symplectic_euler": Scheme(_symplectic_euler, 1, 2.0 * (math.sqrt(2.0) - 1.0), "pairs"),
    "exact": Scheme(_exact, 1, None, "blocks"),
    "strang": Scheme(
        _strang,
        2,
        None,
        "blocks",
        enter=lambda model, s, p, h: _flow(model, s, p, 0.5 * h),
        exit=lambda model, s, p, h: _flow(model, s, p, -0.5 * h),
        inverse=_strang_inverse,
    ),
    "heun": Scheme(_heun, 2, 2.0),
    "rk4": Scheme(_rk4, 4, 2.785293563405282),
    # A model that is already discrete: `step(s, p, i)` is the state after one step, whatever `h`.
    "given": Scheme(lambda model, s, p, i, h: model.step(SimpleNamespace(**s), p, i), 0, None, "step"),
}
