"""Lorenz's convection, a chaotic node for tests of networks and of integration."""

from __future__ import annotations

from typing import Any

import brainunit as u

from .base import Model, model


@model
class Lorenz(Model):
    """Lorenz's three equations, as in `brainmass.LorenzStep`.

        x' = sigma (y - x) + x_inp
        y' = x (rho - z) - y
        z' = x y - beta z

    - States: ``x``, ``y`` and ``z``, dimensionless; all start at 1, and their time is ms.
    - Input: ``x_inp``, per ms (as a plain number).

    Parameters
    ----------
    sigma, rho, beta : Prandtl number, Rayleigh number, shape of the convection cell; dimensionless

    References
    ----------
    Lorenz 1963, Journal of the Atmospheric Sciences 20:130-141, equations 25-27.
    """

    sigma: Any = 10.0
    rho: Any = 28.0
    beta: Any = 8.0 / 3.0

    states = {"x": u.UNITLESS, "y": u.UNITLESS, "z": u.UNITLESS}
    inputs = {"x_inp": 0.0}
    time_unit = u.ms
    initial = {"x": 1.0, "y": 1.0, "z": 1.0}

    @staticmethod
    def drift(s, p, i):
        return {
            "x": p.sigma * (s.y - s.x) + i.x_inp,
            "y": s.x * (p.rho - s.z) - s.y,
            "z": s.x * s.y - p.beta * s.z,
        }
