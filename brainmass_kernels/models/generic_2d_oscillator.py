"""A planar oscillator with polynomial nullclines, of which many two-dimensional models are special cases."""

from __future__ import annotations

from typing import Any

import brainunit as u

from .base import Model, model


@model
class Generic2dOscillator(Model):
    """The Virtual Brain's planar oscillator; names and defaults as in `brainmass.Generic2dOscillatorStep`.

        V' = d tau (-f V^3 + e V^2 + g V + alpha W + gamma (I + V_inp))
        W' = (d / tau) (a + b V + c V^2 - beta W)

    - States: the fast ``V`` and the slow ``W``, dimensionless; the time of the equations is ms.
    - Input: ``V_inp``, dimensionless.

    Parameters
    ----------
    a, b, c, beta : the nullcline of ``W``, dimensionless
    e, f, g, alpha : the nullcline of ``V``, dimensionless
    I, gamma : a constant current, and the gain of it and of ``V_inp``, dimensionless
    d, tau : rate of both (per ms, as a plain number), and how much faster ``V`` is

    References
    ----------
    Sanz-Leon, Knock, Spiegler and Jirsa 2015, NeuroImage 111:385-430.
    """

    a: Any = -2.0
    b: Any = -10.0
    c: Any = 0.0
    d: Any = 0.02
    e: Any = 3.0
    f: Any = 1.0
    g: Any = 0.0
    alpha: Any = 1.0
    beta: Any = 1.0
    gamma: Any = 1.0
    I: Any = 0.0
    tau: Any = 1.0

    states = {"V": u.UNITLESS, "W": u.UNITLESS}
    inputs = {"V_inp": 0.0}
    time_unit = u.ms

    @staticmethod
    def drift(s, p, i):
        cubic = -p.f * s.V**3 + p.e * s.V**2 + p.g * s.V
        return {
            "V": p.d * p.tau * (cubic + p.alpha * s.W + p.gamma * (p.I + i.V_inp)),
            "W": p.d / p.tau * (p.a + p.b * s.V + p.c * s.V**2 - p.beta * s.W),
        }
