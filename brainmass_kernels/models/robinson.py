"""Robinson's corticothalamic mass: cortex, reticular nucleus, relay nuclei; without and with the delay of its loop."""

from __future__ import annotations

from typing import Any

import brainunit as u

from ..functional import sigmoid
from .base import Model, model
from .delayed import Delayed


def _rates(s, p, phi_n, phi_e, V_s=None):
    """The rate of each state; ``phi_e`` is what the thalamus receives, ``V_s`` what the cortex does, if another."""

    def rate(potential):
        return sigmoid(potential, p.Q_max, p.theta, 1.0 / p.sigma)

    def dendrite(drive, V, Vt):
        return p.alpha * p.beta * (drive - V) - (p.alpha + p.beta) * Vt

    Q_e, Q_r, now = rate(s.V_e), rate(s.V_r), rate(s.V_s)
    onto_e = p.nu_ee * s.phi_e + p.nu_ei * Q_e + p.nu_es * (now if V_s is None else rate(V_s))
    onto_r = p.nu_re * phi_e + p.nu_rs * now
    onto_s = p.nu_se * phi_e + p.nu_sr * Q_r + p.nu_sn * phi_n
    return {
        "V_e": s.V_et,
        "V_r": s.V_rt,
        "V_s": s.V_st,
        "V_et": dendrite(onto_e, s.V_e, s.V_et),
        "V_rt": dendrite(onto_r, s.V_r, s.V_rt),
        "V_st": dendrite(onto_s, s.V_s, s.V_st),
        "phi_e": s.phi_et,
        "phi_et": p.gamma**2 * (Q_e - s.phi_e) - 2.0 * p.gamma * s.phi_et,
    }


@model
class Robinson(Model):
    """Robinson's corticothalamic (EIRS) model of one place, WITHOUT the delay between cortex and thalamus.

        V_e'' = alpha beta (nu_ee phi_e + nu_ei Q(V_e) + nu_es Q(V_s) - V_e) - (alpha + beta) V_e'
        V_r'' = alpha beta (nu_re phi_e + nu_rs Q(V_s) - V_r) - (alpha + beta) V_r'
        V_s'' = alpha beta (nu_se phi_e + nu_sr Q(V_r) + nu_sn phi_n - V_s) - (alpha + beta) V_s'
        phi_e'' = gamma^2 (Q(V_e) - phi_e) - 2 gamma phi_e'
        Q(V) = Q_max / (1 + exp((theta - V) / sigma))

    The published loop takes 85 ms around. This delay moves no fixed point, but it makes the alpha rhythm. Here it is
    zero, and there is no such resonance: `RobinsonCorticothalamic` has it.

    - States: the soma potentials ``V_e`` (excitatory; the inhibitory one is the same, as their connections are),
      ``V_r`` (reticular) and ``V_s`` (relay) in mV, the cortical field ``phi_e`` (Hz), and their velocities ``V_et``,
      ``V_rt``, ``V_st`` (mV/s) and ``phi_et`` (Hz/s).
    - Input: ``phi_n`` (Hz), from the senses.
    - Observable: ``phi_e`` (Hz).

    Parameters
    ----------
    alpha, beta : decay and rise rate of the dendritic filter, Hz
    gamma : damping of the field, Hz
    theta, sigma, Q_max : threshold and width (mV) and maximum (Hz) of the firing rate
    nu_ee, nu_ei, nu_es : strengths onto the cortex of excitatory, inhibitory and relay cells, mV s
    nu_re, nu_rs : strengths onto the reticular nucleus of cortex and relay nuclei, mV s
    nu_se, nu_sr, nu_sn : strengths onto the relay nuclei of cortex, reticular nucleus and ``phi_n``, mV s

    The defaults are the eyes-closed state.

    References
    ----------
    Robinson, Rennie and Rowe 2002, Physical Review E 65:041924.
    Abeysuriya, Rennie and Robinson 2015, Journal of Neuroscience Methods 253:55-69 (the eyes-closed parameters).
    """

    alpha: Any = 1000.0 / 12.0 * u.Hz
    beta: Any = 1000.0 / 1.3 * u.Hz
    gamma: Any = 116.0 * u.Hz
    theta: Any = 12.92 * u.mV
    sigma: Any = 3.8 * u.mV
    Q_max: Any = 340.0 * u.Hz
    nu_ee: Any = 1.5316368 * u.mV * u.second
    nu_ei: Any = -9.6390641 * u.mV * u.second
    nu_es: Any = 9.7322420 * u.mV * u.second
    nu_re: Any = 0.1428004 * u.mV * u.second
    nu_rs: Any = 0.0577027 * u.mV * u.second
    nu_se: Any = 1.1354746 * u.mV * u.second
    nu_sr: Any = -1.2216477 * u.mV * u.second
    nu_sn: Any = 8.2218638 * u.mV * u.second

    states = {
        **dict.fromkeys(("V_e", "V_r", "V_s"), u.mV),
        **dict.fromkeys(("V_et", "V_rt", "V_st"), u.mV / u.second),
        "phi_e": u.Hz,
        "phi_et": u.Hz / u.second,
    }
    inputs = {"phi_n": 1.0 * u.Hz}
    observables = {"phi_e": u.Hz}
    pairs = (("V_e", "V_et"), ("V_r", "V_rt"), ("V_s", "V_st"), ("phi_e", "phi_et"))

    @staticmethod
    def drift(s, p, i):
        return _rates(s, p, i.phi_n, s.phi_e)


@model
class RobinsonCorticothalamic(Robinson):
    """`Robinson` with the delay of the loop of cortex and thalamus, which makes the alpha rhythm.

        V_e'' = alpha beta (nu_ee phi_e + nu_ei Q(V_e) + nu_es Q(V_s_late) - V_e) - (alpha + beta) V_e'
        V_r'' = alpha beta (nu_re phi_e_late + nu_rs Q(V_s) - V_r) - (alpha + beta) V_r'
        V_s'' = alpha beta (nu_se phi_e_late + nu_sr Q(V_r) + nu_sn phi_n - V_s) - (alpha + beta) V_s'
        phi_e'' = gamma^2 (Q(V_e) - phi_e) - 2 gamma phi_e'
        Q(V) = Q_max / (1 + exp((theta - V) / sigma))

    ``phi_e_late`` and ``V_s_late`` are ``phi_e`` and ``V_s`` a time ``t0 / 2`` before: from cortex to thalamus, and
    back. At the defaults, the eyes-closed state, white noise on ``phi_n`` gives ``phi_e`` a spectrum with peaks at
    9.6 Hz (alpha) and 18.7 Hz (beta). Without the delay, as in `Robinson`, there are none.

    - States: the soma potentials ``V_e`` (excitatory; the inhibitory one is the same), ``V_r`` (reticular) and ``V_s``
      (relay) in mV, the cortical field ``phi_e`` (Hz), and their velocities ``V_et``, ``V_rt``, ``V_st`` (mV/s) and
      ``phi_et`` (Hz/s).
    - Input: ``phi_n`` (Hz), from the senses.
    - Observable: ``phi_e`` (Hz).

    The delays are read between two steps, so a fit may have ``t0`` free, up to 400 ms.

    Parameters
    ----------
    alpha, beta : decay and rise rate of the dendritic filter, Hz
    gamma : damping of the field, Hz
    theta, sigma, Q_max : threshold and width (mV) and maximum (Hz) of the firing rate
    nu_ee, nu_ei, nu_es : strengths onto the cortex of excitatory, inhibitory and relay cells, mV s
    nu_re, nu_rs : strengths onto the reticular nucleus of cortex and relay nuclei, mV s
    nu_se, nu_sr, nu_sn : strengths onto the relay nuclei of cortex, reticular nucleus and ``phi_n``, mV s
    t0 : the time around the loop, from cortex to thalamus and back, ms

    References
    ----------
    Robinson, Rennie and Rowe 2002, Physical Review E 65:041924.
    Robinson, Rennie, Rowe and O'Connor 2004, Human Brain Mapping 23:53-72 (the transfer function and its peaks).
    Abeysuriya, Rennie and Robinson 2015, Journal of Neuroscience Methods 253:55-69 (the eyes-closed parameters).
    """

    t0: Any = 85.0 * u.ms

    delayed = {
        "phi_e_late": Delayed("phi_e", by="t0", factor=0.5, interpolate=True, max_delay=200.0 * u.ms),
        "V_s_late": Delayed("V_s", by="t0", factor=0.5, interpolate=True, max_delay=200.0 * u.ms),
    }

    @staticmethod
    def drift(s, p, i):
        return _rates(s, p, i.phi_n, i.phi_e_late, i.V_s_late)
