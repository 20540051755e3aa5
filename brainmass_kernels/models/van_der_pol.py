"""Van der Pol's relaxation oscillator."""

from __future__ import annotations

from typing import Any

import brainunit as u

from .base import Model, model


@model
class VanDerPol(Model):
    """Van der Pol's oscillator in Lienard's coordinates, as in `brainmass.VanDerPolStep`.

        x' = mu (x - x^3 / 3 - y) + x_inp
        y' = x / mu + y_inp

    - States: ``x`` and ``y``, dimensionless; both start at 0.025, the middle of the range that brainmass draws from.
    - Inputs: ``x_inp`` and ``y_inp``, per ms (as plain numbers).

    Parameters
    ----------
    mu : nonlinearity, a plain number; the time of the equations is ms

    References
    ----------
    Van der Pol 1926, Philosophical Magazine 2:978-992.
    """

    mu: Any = 1.0

    states = {"x": u.UNITLESS, "y": u.UNITLESS}
    inputs = {"x_inp": 0.0, "y_inp": 0.0}
    time_unit = u.ms
    initial = {"x": 0.025, "y": 0.025}

    @staticmethod
    def drift(s, p, i):
        return {"x": p.mu * (s.x - s.x**3 / 3.0 - s.y) + i.x_inp, "y": s.x / p.mu + i.y_inp}
