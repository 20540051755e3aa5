"""A linear node, the baseline of a network."""

from __future__ import annotations

from typing import Any

import brainunit as u

from .base import Model, model


@model
class Linear(Model):
    """One state that decays, as in `brainmass.LinearStep`.

        x' = gamma x + x_inp

    - State: ``x``, dimensionless; it starts at 0.01.
    - Input: ``x_inp``, per ms (as a plain number).

    Parameters
    ----------
    gamma : rate, per ms (as a plain number); negative in a stable node

    References
    ----------
    Sanz-Leon, Knock, Spiegler and Jirsa 2015, NeuroImage 111:385-430.
    """

    gamma: Any = -10.0

    states = {"x": u.UNITLESS}
    inputs = {"x_inp": 0.0}
    time_unit = u.ms
    initial = {"x": 0.01}

    @staticmethod
    def drift(s, p, i):
        return {"x": p.gamma * s.x + i.x_inp}
