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

    The states are the firing rate ``r`` (Hz) and the mean potential ``v``; they start at 0.025, the middle of the range
    that brainmass draws from. As there, the term ``2 v r`` of the rate is per ms, not per ``tau``; at the default the
    two are the same.

    Parameters
    ----------
    tau : time constant, ms
    eta : mean excitability
    delta : half width of the excitabilities, Hz
    J : recurrent weight

    Inputs are ``r_inp`` (Hz, per ms) and ``v_inp``.

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
    """Coombes and Byrne's mean field, with a conductance ``g = k pi r``; as in `brainmass.CoombesByrneStep`.

    The states are the rate ``r`` and the mean potential ``v``, dimensionless; time is in ms. They start at 0.1 and 0.

    Parameters
    ----------
    Delta : half width of the excitabilities
    eta : mean excitability
    k : conductance of a synapse
    v_syn : its reversal potential

    Inputs are ``r_inp`` and ``v_inp``, per ms.

    References
    ----------
    Coombes and Byrne 2019, Next generation neural mass models, in Nonlinear Dynamics in Computational Neuroscience,
    Springer; the synapse is in its steady state.
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
