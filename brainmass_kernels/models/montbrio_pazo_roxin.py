"""Exact mean fields of quadratic integrate-and-fire neurons, with current and with conductance synapses."""

from __future__ import annotations

import math
from typing import Any

import brainunit as u

from .base import Model, model

# Of a rate in Hz times a time in ms.
_PER_KHZ = 1e-3


@model
class MontbrioPazoRoxin(Model):
    """Montbrio, Pazo and Roxin's mean field; names, units and defaults as in `brainmass.MontbrioPazoRoxinStep`.

        r' = delta / (pi tau) + 2 v r + r_inp
        v' = (v^2 + eta + v_inp + J n - (pi n)^2) / tau
        n = tau r / 1000

    The equations take numbers of Hz and of ms. As in brainmass, the term 2 v r is per ms, not per tau; at the default
    the two are the same.

    - States: the firing rate ``r`` (Hz) and the mean potential ``v`` (dimensionless); both start at 0.025, the middle
      of the range that brainmass draws from.
    - Inputs: ``r_inp`` (Hz, per ms) and ``v_inp`` (dimensionless).

    Parameters
    ----------
    tau : time constant, ms
    eta : mean excitability, dimensionless
    delta : half width of the excitabilities, Hz
    J : recurrent weight, dimensionless

    References
    ----------
    Montbrio, Pazo and Roxin 2015, Physical Review X 5:021028, equation 12.
    """

    tau: Any = 1.0 * u.ms
    eta: Any = -5.0
    delta: Any = 1.0 * u.Hz
    J: Any = 15.0

    states = {"r": u.Hz, "v": u.UNITLESS}
    inputs = {"r_inp": 0.0 * u.Hz, "v_inp": 0.0}
    time_unit = u.ms
    initial = {"r": 0.025 * u.Hz, "v": 0.025}
    as_declared = ("delta", "r", "r_inp")  # brainmass's equations take numbers of Hz beside a tau in ms

    @staticmethod
    def drift(s, p, i):
        spikes = _PER_KHZ * s.r * p.tau
        return {
            "r": p.delta / (math.pi * p.tau) + 2.0 * s.v * s.r + i.r_inp,
            "v": (s.v**2 + p.eta + i.v_inp + p.J * spikes - (math.pi * spikes) ** 2) / p.tau,
        }


@model
class CoombesByrne(Model):
    """Coombes and Byrne's mean field, with a conductance; as in `brainmass.CoombesByrneStep`.

        r' = Delta / pi + 2 v r - g r + r_inp
        v' = v^2 - (pi r)^2 + eta + (v_syn - v) g + v_inp
        g = k pi r

    - States: the rate ``r`` and the mean potential ``v``, dimensionless; they start at 0.1 and 0, and time is in ms.
    - Inputs: ``r_inp`` and ``v_inp``, per ms (as plain numbers).

    Parameters
    ----------
    Delta : half width of the excitabilities, dimensionless
    eta : mean excitability, dimensionless
    k : conductance of a synapse, dimensionless
    v_syn : reversal potential of the synapse, dimensionless

    References
    ----------
    Coombes and Byrne 2019, Next generation neural mass models, in Nonlinear Dynamics in Computational Neuroscience,
    Springer, pages 1-16; the synapse is in its steady state.
    """

    Delta: Any = 1.0
    eta: Any = 2.0
    k: Any = 1.0
    v_syn: Any = -4.0

    states = {"r": u.UNITLESS, "v": u.UNITLESS}
    inputs = {"r_inp": 0.0, "v_inp": 0.0}
    time_unit = u.ms
    initial = {"r": 0.1}

    @staticmethod
    def drift(s, p, i):
        g = p.k * math.pi * s.r
        return {
            "r": p.Delta / math.pi + 2.0 * s.v * s.r - g * s.r + i.r_inp,
            "v": s.v**2 - (math.pi * s.r) ** 2 + p.eta + (p.v_syn - s.v) * g + i.v_inp,
        }
