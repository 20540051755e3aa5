"""The unit of a harmonic oscillator recurrent network."""

from __future__ import annotations

import math
from typing import Any

import brainunit as u
import jax.numpy as jnp

from .base import Model, model


@model
class HORN(Model):
    """A driven, damped harmonic oscillator, as in `brainmass.HORNStep`; time in ms, all else dimensionless.

    The states are the position ``x`` and the velocity ``y``. The scheme is symplectic Euler, of which a step of 1 ms is
    the step of the network.

    Parameters
    ----------
    alpha : excitability
    omega : natural angular frequency, per ms
    gamma : damping, per ms
    v : weight of the position in the unit's own input

    Input is ``x_inp``, inside the tanh: extrinsic plus recurrent.

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
