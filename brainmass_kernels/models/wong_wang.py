"""Reductions of Wong and Wang's spiking network: two choices, and excitation with feedback inhibition."""

from __future__ import annotations

from typing import Any

import brainunit as u
import jax.numpy as jnp

from .base import Model, model


def _currents(s, p, i):
    stimulus = p.J_A_ext * p.mu_0
    return (
        p.J_N11 * s.S1 - p.J_N12 * s.S2 + stimulus * (1.0 + i.coherence) + p.I_0,
        p.J_N22 * s.S2 - p.J_N21 * s.S1 + stimulus * (1.0 - i.coherence) + p.I_0,
    )


@model
class WongWang(Model):
    """Wong and Wang's two populations that compete for a decision; as in `brainmass.WongWangStep`.

        S1' = -S1 / tau_S + (1 - S1) gamma a max(I1 - theta, 0)
        S2' = -S2 / tau_S + (1 - S2) gamma a max(I2 - theta, 0)
        I1 = J_N11 S1 - J_N12 S2 + J_A_ext mu_0 (1 + coherence) + I_0 + I1_inp
        I2 = J_N22 S2 - J_N21 S1 + J_A_ext mu_0 (1 - coherence) + I_0 + I2_inp

    - States: the NMDA gates ``S1`` and ``S2``, in [0, 1], which the equations do not leave. brainmass clips them there,
      and holds the rates while it steps the gates.
    - Inputs: ``coherence``, in [-1, 1], and the currents ``I1_inp`` and ``I2_inp`` (nA).

    Parameters
    ----------
    tau_S : time constant of the gates, s
    gamma : saturation of the gates, dimensionless
    a, theta : gain (Hz/nA) and threshold (nA) of the rectified-linear rate
    J_N11, J_N22 : weights of each population on itself, nA
    J_N12, J_N21 : weights of the second on the first, which subtracts, and the reverse, nA
    J_A_ext : weight of the stimulus, nA/Hz
    mu_0 : rate of the stimulus, Hz
    I_0 : background current, nA

    References
    ----------
    Wong and Wang 2006, Journal of Neuroscience 26:1314-1328 (the reduced two-variable model).
    """

    tau_S: Any = 0.1 * u.second
    gamma: Any = 0.641
    a: Any = 270.0 * (u.Hz / u.nA)
    theta: Any = 0.31 * u.nA
    J_N11: Any = 0.2609 * u.nA
    J_N22: Any = 0.2609 * u.nA
    J_N12: Any = 0.0497 * u.nA
    J_N21: Any = 0.0497 * u.nA
    J_A_ext: Any = 0.0002243 * (u.nA / u.Hz)
    mu_0: Any = 30.0 * u.Hz
    I_0: Any = 0.3255 * u.nA

    states = {"S1": u.UNITLESS, "S2": u.UNITLESS}
    inputs = {"coherence": 0.0, "I1_inp": 0.0 * u.nA, "I2_inp": 0.0 * u.nA}

    @staticmethod
    def drift(s, p, i):
        first, second = _currents(s, p, i)
        rate1 = p.a * jnp.maximum(first + i.I1_inp - p.theta, 0.0)
        rate2 = p.a * jnp.maximum(second + i.I2_inp - p.theta, 0.0)
        return {
            "S1": -s.S1 / p.tau_S + (1.0 - s.S1) * p.gamma * rate1,
            "S2": -s.S2 / p.tau_S + (1.0 - s.S2) * p.gamma * rate2,
        }


def _transfer(x, d):
    """``x / (1 - exp(-d x))``, which is ``1 / d`` at 0; ``1.7e-16 / d`` stands for all that is less."""
    z = d * x
    # By its series as far as the quotient cancels: at 0.001 its slope would have lost a tenth in float32.
    small = jnp.abs(z) < 0.1
    near = jnp.where(small, z, 0.0)
    # In float32 exp(-z) overflows below -88, and its square, which the derivative divides by, below -44.
    away = jnp.where(small, 1.0, jnp.where(z < -40.0, -40.0, z))
    return (
        jnp.where(small, 1.0 + near * (0.5 + near * (1.0 / 12 - near * near / 720)), away / (1.0 - jnp.exp(-away))) / d
    )


@model
class WongWangExcInh(Model):
    """Excitation with feedback inhibition after Wong and Wang, as in `brainmass.WongWangExcInhStep`.

        S_e' = -S_e / tau_e + (1 - S_e) gamma_e rate(a_e x_e - b_e, d_e)
        S_i' = -S_i / tau_i + gamma_i rate(a_i x_i - b_i, d_i)
        x_e = w_p J_N S_e - J_i S_i + W_e I_o + G J_N coupling + I_ext
        x_i = J_N S_e - S_i + W_i I_o + lamda G J_N coupling
        rate(x, d) = x / (1 - exp(-d x))

    - States: the gates ``S_e`` and ``S_i``, dimensionless; both start at 0.001.
    - Input: ``coupling``, the gates of other masses, summed.

    Parameters
    ----------
    a_e, b_e, d_e, a_i, b_i, d_i : gain, shift and curvature of the two rates
    gamma_e, gamma_i, tau_e, tau_i : kinetics (per ms) and time constants (ms) of the gates, as plain numbers
    w_p, J_N, J_i : recurrent excitation, NMDA weight, feedback inhibition
    W_e, W_i, I_o, I_ext : shares of the background current, that current, and one to the excitatory population only
    G, lamda : gain of ``coupling``, and the fraction of it that reaches the inhibitory population

    References
    ----------
    Deco, Ponce-Alvarez, Hagmann, Romani, Mantini and Corbetta 2014, Journal of Neuroscience 34:7886-7898.
    """

    a_e: Any = 310.0
    b_e: Any = 125.0
    d_e: Any = 0.160
    gamma_e: Any = 0.641 / 1000.0
    tau_e: Any = 100.0
    w_p: Any = 1.4
    W_e: Any = 1.0
    a_i: Any = 615.0
    b_i: Any = 177.0
    d_i: Any = 0.087
    gamma_i: Any = 1.0 / 1000.0
    tau_i: Any = 10.0
    W_i: Any = 0.7
    J_N: Any = 0.15
    J_i: Any = 1.0
    I_o: Any = 0.382
    I_ext: Any = 0.0
    G: Any = 2.0
    lamda: Any = 0.0

    states = {"S_e": u.UNITLESS, "S_i": u.UNITLESS}
    inputs = {"coupling": 0.0}
    time_unit = u.ms
    initial = {"S_e": 0.001, "S_i": 0.001}

    @staticmethod
    def drift(s, p, i):
        distant = p.G * p.J_N * i.coupling
        x_e = p.w_p * p.J_N * s.S_e - p.J_i * s.S_i + p.W_e * p.I_o + distant + p.I_ext
        x_i = p.J_N * s.S_e - s.S_i + p.W_i * p.I_o + p.lamda * distant
        return {
            "S_e": -s.S_e / p.tau_e + (1.0 - s.S_e) * p.gamma_e * _transfer(p.a_e * x_e - p.b_e, p.d_e),
            "S_i": -s.S_i / p.tau_i + p.gamma_i * _transfer(p.a_i * x_i - p.b_i, p.d_i),
        }
