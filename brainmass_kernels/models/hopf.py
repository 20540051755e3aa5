"""The normal form of a Hopf bifurcation, with its cubic coefficient and without (Stuart and Landau's)."""

from __future__ import annotations

from typing import Any

import brainunit as u

from .base import Model, model


class _Planar(Model):
    """Two dimensionless states ``x`` and ``y`` with an input each; time in ms."""

    states = {"x": u.UNITLESS, "y": u.UNITLESS}
    inputs = {"x_inp": 0.0, "y_inp": 0.0}
    time_unit = u.ms


def _rotation(s, growth, w, i):
    return {"x": growth * s.x - w * s.y + i.x_inp, "y": growth * s.y + w * s.x + i.y_inp}


@model
class Hopf(_Planar):
    """Supercritical Hopf normal form, as in `brainmass.HopfStep`.

        x' = (a - beta (x^2 + y^2)) x - w y + x_inp
        y' = (a - beta (x^2 + y^2)) y + w x + y_inp

    - States: ``x`` and ``y``, dimensionless; above ``a = 0`` they circle at radius ``sqrt(a / beta)``. They start at
      rest, which is a fixed point: give ``initial=`` or noise.
    - Inputs: ``x_inp`` and ``y_inp``, per ms (as plain numbers).

    Parameters
    ----------
    a : distance from the bifurcation, per ms (as a plain number, like the others)
    w : angular frequency, per ms
    beta : cubic coefficient, per ms

    References
    ----------
    Deco, Kringelbach, Jirsa and Ritter 2017, Scientific Reports 7:3095.
    """

    a: Any = 0.25
    w: Any = 0.2
    beta: Any = 1.0

    @staticmethod
    def drift(s, p, i):
        return _rotation(s, p.a - p.beta * (s.x**2 + s.y**2), p.w, i)


@model
class StuartLandau(_Planar):
    """Stuart and Landau's oscillator, as in `brainmass.StuartLandauStep`.

        x' = (a - x^2 - y^2) x - w y + x_inp
        y' = (a - x^2 - y^2) y + w x + y_inp

    - States: ``x`` and ``y``, dimensionless; both start at 0.025, the middle of the range that brainmass draws from.
    - Inputs: ``x_inp`` and ``y_inp``, per ms (as plain numbers).

    Parameters
    ----------
    a : distance from the bifurcation, per ms (as a plain number)
    w : angular frequency, per ms (as a plain number)

    References
    ----------
    Stuart 1960, Journal of Fluid Mechanics 9:353-370; in real numbers.
    """

    a: Any = 0.25
    w: Any = 0.2

    initial = {"x": 0.025, "y": 0.025}

    @staticmethod
    def drift(s, p, i):
        return _rotation(s, p.a - (s.x**2 + s.y**2), p.w, i)
