"""Jansen-Rit under exponential Euler, written by hand with `lax.scan` as a careful user would: what we compare with."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax

DT = 1e-4


def start(lanes: int):
    return (jnp.zeros(lanes, jnp.float32),) * 6


def step(state, Ae, be, C, E_inp, dt: float = DT, M_inp=0.0, Ai=22.0, bi=50.0):
    """One step; velocities by exponential Euler, positions by Euler, all from the old state."""
    M, E, I, Mv, Ev, Iv = state

    def rate(potential):
        return 5.0 * jax.nn.sigmoid(0.56 * (potential - 6.0))

    def velocity(v, a, forcing):
        decay = jnp.expm1(-2.0 * a * dt) / (-2.0 * a)
        return v + decay * (forcing - 2.0 * a * v)

    return (
        M + dt * Mv,
        E + dt * Ev,
        I + dt * Iv,
        velocity(Mv, be, Ae * be * rate(E - I + M_inp) - be**2 * M),
        velocity(Ev, be, Ae * be * (E_inp + 0.8 * C * rate(C * M)) - be**2 * E),
        velocity(Iv, bi, Ai * bi * (0.25 * C * rate(0.25 * C * M)) - bi**2 * I),
    )


def forward(Ae, be, C, E_inp, steps: int, every: int):
    """The record of E - I, nested so that only every so many steps are stored."""

    def stride(state, _):
        state = lax.fori_loop(0, every, lambda _, s: step(s, Ae, be, C, E_inp), state)
        return state, state[1] - state[2]

    return lax.scan(stride, start(Ae.shape[0]), length=steps // every)[1]


def plain_loss(Ae, be, C, E_inp, steps: int, every: int):
    """mean eeg^2 through a scan that JAX differentiates as it is."""

    def stride(state, _):
        state, _ = lax.scan(lambda s, _: (step(s, Ae, be, C, E_inp), None), state, length=every)
        return state, state[1] - state[2]

    return jnp.mean(lax.scan(stride, start(Ae.shape[0]), length=steps // every)[1] ** 2)


def checkpointed_loss(Ae, be, C, E_inp, steps: int, every: int):
    """The same with `jax.checkpoint` on segments of about sqrt(steps)."""
    each = max(1, math.isqrt(steps) // every)

    def stride(state, _):
        state, _ = lax.scan(lambda s, _: (step(s, Ae, be, C, E_inp), None), state, length=every)
        return state, state[1] - state[2]

    @jax.checkpoint
    def segment(state, _):
        return lax.scan(stride, state, length=each)

    return jnp.mean(lax.scan(segment, start(Ae.shape[0]), length=steps // every // each)[1] ** 2)
