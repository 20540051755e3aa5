"""FitzHugh and Nagumo's excitable unit."""

from __future__ import annotations

from typing import Any

import brainunit as u

from .base import Model, model


@model
class FitzHughNagumo(Model):
    """FitzHugh and Nagumo's unit with a general cubic, as in `brainmass.FitzHughNagumoStep`.

        V' = -alpha V^3 + beta V^2 + gamma V - w + V_inp
        w' = (V - delta - epsilon w) / tau + w_inp

    - States: the fast ``V`` and its recovery ``w``, dimensionless; both start at 0.025, the middle of the range that
      brainmass draws from.
    - Inputs: ``V_inp`` and ``w_inp``, per ms (as plain numbers).

    Parameters
    ----------
    alpha, beta, gamma : coefficients of the cubic, per ms (as plain numbers)
    delta, epsilon : offset and slope of the recovery, dimensionless
    tau : time constant of the recovery, ms

    References
    ----------
    Kostova, Ravindran and Schonbek 2004, International Journal of Bifurcation and Chaos 14:913-925.
    """

    alpha: Any = 3.0
    beta: Any = 4.0
    gamma: Any = -1.5
    delta: Any = 0.0
    epsilon: Any = 0.5
    tau: Any = 20.0 * u.ms

    states = {"V": u.UNITLESS, "w": u.UNITLESS}
    inputs = {"V_inp": 0.0, "w_inp": 0.0}
    time_unit = u.ms
    initial = {"V": 0.025, "w": 0.025}

    @staticmethod
    def drift(s, p, i):
        return {
            "V": -p.alpha * s.V**3 + p.beta * s.V**2 + p.gamma * s.V - s.w + i.V_inp,
            "w": (s.V - p.delta - p.epsilon * s.w) / p.tau + i.w_inp,
        }
