"""The unit of a harmonic oscillator recurrent network."""

from __future__ import annotations

import math
from typing import Any

import brainunit as u
import jax.numpy as jnp

from .base import Model, model


@model
class HORN(Model):
    """A driven, damped harmonic oscillator, as in `brainmass.HORNStep`.

        x' = y
        y' = alpha tanh(x_inp + v x) - omega^2 x - 2 gamma y

    The scheme is symplectic Euler, of which a step of 1 ms is the step of the network.

    - States: the position ``x`` (dimensionless) and the velocity ``y`` (per ms, as a plain number).
    - Input: ``x_inp``, extrinsic plus recurrent, dimensionless.

    Parameters
    ----------
    alpha : excitability, dimensionless
    omega : natural angular frequency, per ms (as a plain number)
    gamma : damping, per ms (as a plain number)
    v : weight of the position in the unit's own input, dimensionless

    References
    ----------
    Effenberger, Carvalho, Dubinin and Singer 2025, PNAS 122:e2412830122.
    """

    alpha: Any = 0.04
    omega: Any = 2.0 * math.pi / 28.0
    gamma: Any = 0.01
    v: Any = 0.0

    states = {"x": u.UNITLESS, "y": u.UNITLESS}
    inputs = {"x_inp": 0.0}
    time_unit = u.ms
    scheme = "symplectic_euler"
    pairs = (("x", "y"),)

    @staticmethod
    def drift(s, p, i):
        drive = p.alpha * jnp.tanh(i.x_inp + p.v * s.x)
        return {"x": s.y, "y": drive - p.omega**2 * s.x - 2.0 * p.gamma * s.y}
