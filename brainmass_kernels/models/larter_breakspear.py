"""Larter and Breakspear's mass with voltage-gated conductances."""

from __future__ import annotations

from typing import Any

import brainunit as u
import jax.numpy as jnp

from .base import Model, model


def _open(x, threshold, width):
    return 0.5 * (1.0 + jnp.tanh((x - threshold) / width))


@model
class LarterBreakspear(Model):
    """Larter and Breakspear's mass; names and defaults as in `brainmass.LarterBreakspearStep`.

        V' = t_scale (ane Iext - aie Z Q_Z - (gCa + rNMDA c) m(V, TCa, d_Ca) (V - VCa)
                      - (gNa m(V, TNa, d_Na) + c) (V - VNa) - gK W (V - VK) - gL (V - VL))
        W' = t_scale phi (m(V, TK, d_K) - W) / tau_K
        Z' = t_scale b (ani Iext + aei V Q_V)
        c = aee ((1 - C) Q_V + C V_inp)
        Q_V = QV_max m(V, VT, d_V)
        Q_Z = QZ_max m(Z, ZT, d_Z)
        m(x, T, d) = (1 + tanh((x - T) / d)) / 2

    - States: the pyramidal potential ``V``, the open fraction ``W`` of potassium channels and the inhibitory activity
      ``Z``, dimensionless; the time of the equations is ms.
    - Input: ``V_inp``, the mean firing rate of distant masses, dimensionless.

    The default is chaotic; ``d_V`` below 0.55 is not.

    Parameters
    ----------
    gCa, gK, gL, gNa : conductances of calcium, potassium, leak and sodium; dimensionless, like all others
    VCa, VK, VL, VNa : their reversal potentials
    TCa, TK, TNa, d_Ca, d_K, d_Na : thresholds and widths of the channels
    phi, tau_K : rate and time constant of the potassium channels
    aee, aei, aie, ane, ani : weights E to E, E to I, I to E, and of the current onto E and I
    b : rate of the inhibitory activity
    C : share of ``V_inp`` in the excitation, the rest being local
    Iext, rNMDA : current from below the cortex, NMDA over AMPA receptors
    VT, d_V, ZT, d_Z, QV_max, QZ_max : threshold, width and maximum of the two firing rates
    t_scale : scale of time

    References
    ----------
    Breakspear, Terry and Friston 2003, Network 14:703-732.
    """

    gCa: Any = 1.1
    gK: Any = 2.0
    gL: Any = 0.5
    gNa: Any = 6.7
    TCa: Any = -0.01
    TK: Any = 0.0
    TNa: Any = 0.3
    d_Ca: Any = 0.15
    d_K: Any = 0.3
    d_Na: Any = 0.15
    VCa: Any = 1.0
    VK: Any = -0.7
    VL: Any = -0.5
    VNa: Any = 0.53
    phi: Any = 0.7
    tau_K: Any = 1.0
    aee: Any = 0.4
    aei: Any = 2.0
    aie: Any = 2.0
    ane: Any = 1.0
    ani: Any = 0.4
    b: Any = 0.1
    C: Any = 0.1
    Iext: Any = 0.3
    rNMDA: Any = 0.25
    VT: Any = 0.0
    d_V: Any = 0.65
    ZT: Any = 0.0
    d_Z: Any = 0.7
    QV_max: Any = 1.0
    QZ_max: Any = 1.0
    t_scale: Any = 1.0

    states = {"V": u.UNITLESS, "W": u.UNITLESS, "Z": u.UNITLESS}
    inputs = {"V_inp": 0.0}
    time_unit = u.ms

    @staticmethod
    def drift(s, p, i):
        QV = p.QV_max * _open(s.V, p.VT, p.d_V)
        QZ = p.QZ_max * _open(s.Z, p.ZT, p.d_Z)
        excitation = p.aee * ((1.0 - p.C) * QV + p.C * i.V_inp)
        calcium = (p.gCa + p.rNMDA * excitation) * _open(s.V, p.TCa, p.d_Ca) * (s.V - p.VCa)
        sodium = (p.gNa * _open(s.V, p.TNa, p.d_Na) + excitation) * (s.V - p.VNa)
        potassium, leak = p.gK * s.W * (s.V - p.VK), p.gL * (s.V - p.VL)
        synapses = p.ane * p.Iext - p.aie * s.Z * QZ
        return {
            "V": p.t_scale * (synapses - calcium - sodium - potassium - leak),
            "W": p.t_scale * p.phi * (_open(s.V, p.TK, p.d_K) - s.W) / p.tau_K,
            "Z": p.t_scale * p.b * (p.ani * p.Iext + p.aei * s.V * QV),
        }
