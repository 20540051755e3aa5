"""The Epileptor: two fast subsystems that a slow permittivity carries into seizures and out of them."""

from __future__ import annotations

from typing import Any

import brainunit as u
import jax.numpy as jnp

from ..functional import sigmoid
from .base import Model, model


@model
class Epileptor(Model):
    """Jirsa's Epileptor; names, defaults and starting point as in `brainmass.EpileptorStep`.

        x1' = tt (y1 - z + Iext + Kvf x1_inp + f x1)
        y1' = tt (c - d x1^2 - y1)
        z'  = tt r (h - z + Ks x1_inp)
        x2' = tt (x2 - x2^3 - y2 + Iext2 + bb g - 0.3 (z - 3.5) + Kf x2_inp)
        y2' = tt (aa max(x2 + 0.25, 0) - y2) / tau
        g'  = -0.01 tt (g - 0.1 x1)
        f = b x1 - a x1^2 where x1 < 0, otherwise slope - x2 + 0.6 (z - 4)^2
        h = (1 - modification) (4 (x1 - x0) - 0.1 min(z, 0)^7) + modification (x0 + 3 / (1 + exp(-10 (x1 + 0.5))))

    - States: ``x1``, ``y1`` (fast discharges), ``z`` (permittivity), ``x2``, ``y2`` (spikes and waves) and ``g``
      (``x1`` low-passed), dimensionless; the time of the equations is ms.
    - Inputs: ``x1_inp`` and ``x2_inp``, dimensionless.
    - Observable: ``lfp`` = x2 - x1, dimensionless.

    Parameters
    ----------
    a, b, slope : of the nonlinearity of ``x1``, below and above 0
    c, d : of ``y1``
    r : rate of the permittivity, per ms (as a plain number, like the others); a seizure takes about ``1 / r`` ms
    x0 : epileptogenicity
    Iext, Iext2 : currents into ``x1`` and ``x2``
    tau, aa, bb : time constant (ms) and slope of ``y2``, weight of ``g``
    Kvf, Kf, Ks : gains of ``x1_inp`` in ``x1``, of ``x2_inp`` in ``x2`` and of ``x1_inp`` in ``z``
    tt : scale of time
    modification : 0 for the linear influence of ``x1`` on ``z``, 1 for the sigmoidal one

    References
    ----------
    Jirsa, Stacey, Quilichini, Ivanov and Bernard 2014, Brain 137:2210-2230.
    Proix, Bartolomei, Chauvel, Bernard and Jirsa 2014, Journal of Neuroscience 34:15009-15021 (the linear influence).
    """

    a: Any = 1.0
    b: Any = 3.0
    c: Any = 1.0
    d: Any = 5.0
    r: Any = 0.00035
    x0: Any = -1.6
    Iext: Any = 3.1
    slope: Any = 0.0
    Iext2: Any = 0.45
    tau: Any = 10.0
    aa: Any = 6.0
    bb: Any = 2.0
    Kvf: Any = 0.0
    Kf: Any = 0.0
    Ks: Any = 0.0
    tt: Any = 1.0
    modification: Any = 0.0

    states = dict.fromkeys(("x1", "y1", "z", "x2", "y2", "g"), u.UNITLESS)
    inputs = {"x1_inp": 0.0, "x2_inp": 0.0}
    observables = {"lfp": u.UNITLESS}
    time_unit = u.ms
    initial = {"x1": -1.5, "y1": -10.0, "z": 3.5, "x2": -1.0}

    @staticmethod
    def drift(s, p, i):
        cubic = jnp.where(s.x1 < 0.0, p.b * s.x1 - p.a * s.x1**2, p.slope - s.x2 + 0.6 * (s.z - 4.0) ** 2)
        # The power has a safe argument where it is not taken: it overflows long before z does.
        linear = 4.0 * (s.x1 - p.x0) + jnp.where(s.z < 0.0, -0.1 * jnp.where(s.z < 0.0, s.z, 0.0) ** 7, 0.0)
        sigmoidal = p.x0 + sigmoid(s.x1, 3.0, -0.5, 10.0)
        towards = p.modification * sigmoidal + (1.0 - p.modification) * linear
        onto_y2 = jnp.where(s.x2 < -0.25, 0.0, p.aa * (s.x2 + 0.25))
        onto_x2 = p.Iext2 + p.bb * s.g - 0.3 * (s.z - 3.5) + p.Kf * i.x2_inp
        rates = {
            "x1": s.y1 - s.z + p.Iext + p.Kvf * i.x1_inp + cubic * s.x1,
            "y1": p.c - p.d * s.x1**2 - s.y1,
            "z": p.r * (towards - s.z + p.Ks * i.x1_inp),
            "x2": s.x2 - s.x2**3 - s.y2 + onto_x2,
            "y2": (onto_y2 - s.y2) / p.tau,
            "g": -0.01 * (s.g - 0.1 * s.x1),
        }
        return {n: p.tt * rate for n, rate in rates.items()}

    @staticmethod
    def observe(s, p):
        return {"lfp": s.x2 - s.x1}
