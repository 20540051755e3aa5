"""Wilson and Cowan's excitatory and inhibitory populations, and eight variants of them."""

from __future__ import annotations

from typing import Any

import brainunit as u
import jax.numpy as jnp

from ..functional import sigmoid
from .base import Model, model


class _ExcitatoryInhibitory(Model):
    """The rates ``rE`` and ``rI`` of two populations, and an input to each; time in ms."""

    states = {"rE": u.UNITLESS, "rI": u.UNITLESS}
    inputs = {"rE_inp": 0.0, "rI_inp": 0.0}
    time_unit = u.ms


def _response(x, a, theta):
    """The sigmoid that is 0 at 0."""
    return sigmoid(x, 1.0, theta, a) - sigmoid(0.0, 1.0, theta, a)


def _relax(rate, gain, response, tau):
    return (gain * response - rate) / tau


@model
class WilsonCowan(_ExcitatoryInhibitory):
    """Wilson and Cowan's two populations; names, units and defaults as in `brainmass.WilsonCowanStep`.

    The states ``rE`` and ``rI`` are the active fractions of either population.

    Parameters
    ----------
    tau_E, tau_I : time constants, ms
    a_E, a_I, theta_E, theta_I : steepness and threshold of the response
    wEE, wIE : weights onto the excitatory population, of itself and of the inhibitory one
    wEI, wII : weights onto the inhibitory population, of the excitatory one and of itself
    r : refractory fraction

    Inputs are ``rE_inp`` and ``rI_inp``, inside the response.

    References
    ----------
    Wilson and Cowan 1972, Biophysical Journal 12:1, equations 11 and 12.
    """

    tau_E: Any = 1.0 * u.ms
    a_E: Any = 1.2
    theta_E: Any = 2.8
    tau_I: Any = 1.0 * u.ms
    a_I: Any = 1.0
    theta_I: Any = 4.0
    wEE: Any = 12.0
    wIE: Any = 4.0
    wEI: Any = 13.0
    wII: Any = 11.0
    r: Any = 1.0

    @staticmethod
    def drift(s, p, i):
        onto_E = p.wEE * s.rE - p.wIE * s.rI + i.rE_inp
        onto_I = p.wEI * s.rE - p.wII * s.rI + i.rI_inp
        return {
            "rE": _relax(s.rE, 1.0 - p.r * s.rE, _response(onto_E, p.a_E, p.theta_E), p.tau_E),
            "rI": _relax(s.rI, 1.0 - p.r * s.rI, _response(onto_I, p.a_I, p.theta_I), p.tau_I),
        }


@model
class WilsonCowanNoSaturation(_ExcitatoryInhibitory):
    """`WilsonCowan` without refractoriness, as in `brainmass.WilsonCowanNoSaturationStep`.

    Parameters and inputs are those of `WilsonCowan`, less ``r``.

    References
    ----------
    Wilson and Cowan 1972, Biophysical Journal 12:1, equations 11 and 12 with r = 0.
    """

    tau_E: Any = 1.0 * u.ms
    a_E: Any = 1.2
    theta_E: Any = 2.8
    tau_I: Any = 1.0 * u.ms
    a_I: Any = 1.0
    theta_I: Any = 4.0
    wEE: Any = 12.0
    wIE: Any = 4.0
    wEI: Any = 13.0
    wII: Any = 11.0

    @staticmethod
    def drift(s, p, i):
        onto_E = p.wEE * s.rE - p.wIE * s.rI + i.rE_inp
        onto_I = p.wEI * s.rE - p.wII * s.rI + i.rI_inp
        return {
            "rE": _relax(s.rE, 1.0, _response(onto_E, p.a_E, p.theta_E), p.tau_E),
            "rI": _relax(s.rI, 1.0, _response(onto_I, p.a_I, p.theta_I), p.tau_I),
        }


@model
class WilsonCowanSymmetric(_ExcitatoryInhibitory):
    """`WilsonCowan` with one time constant and one response, as in `brainmass.WilsonCowanSymmetricStep`.

    Parameters
    ----------
    tau : time constant of both populations, ms
    a, theta : steepness and threshold of both responses
    wEE, wIE, wEI, wII, r : as in `WilsonCowan`

    References
    ----------
    Wilson and Cowan 1972, Biophysical Journal 12:1, equations 11 and 12.
    """

    tau: Any = 1.0 * u.ms
    a: Any = 1.1
    theta: Any = 3.4
    wEE: Any = 12.0
    wIE: Any = 4.0
    wEI: Any = 13.0
    wII: Any = 11.0
    r: Any = 1.0

    @staticmethod
    def drift(s, p, i):
        onto_E = p.wEE * s.rE - p.wIE * s.rI + i.rE_inp
        onto_I = p.wEI * s.rE - p.wII * s.rI + i.rI_inp
        return {
            "rE": _relax(s.rE, 1.0 - p.r * s.rE, _response(onto_E, p.a, p.theta), p.tau),
            "rI": _relax(s.rI, 1.0 - p.r * s.rI, _response(onto_I, p.a, p.theta), p.tau),
        }


@model
class WilsonCowanSimplified(_ExcitatoryInhibitory):
    """`WilsonCowan` with one excitatory and one inhibitory weight, as in `brainmass.WilsonCowanSimplifiedStep`.

    Parameters
    ----------
    w_exc, w_inh : weights of the excitatory and of the inhibitory population, onto both
    tau_E, a_E, theta_E, tau_I, a_I, theta_I, r : as in `WilsonCowan`

    References
    ----------
    Wilson and Cowan 1972, Biophysical Journal 12:1, equations 11 and 12.
    """

    tau_E: Any = 1.0 * u.ms
    a_E: Any = 1.2
    theta_E: Any = 2.8
    tau_I: Any = 1.0 * u.ms
    a_I: Any = 1.0
    theta_I: Any = 4.0
    w_exc: Any = 8.0
    w_inh: Any = 12.0
    r: Any = 1.0

    @staticmethod
    def drift(s, p, i):
        shared = p.w_exc * s.rE - p.w_inh * s.rI
        return {
            "rE": _relax(s.rE, 1.0 - p.r * s.rE, _response(shared + i.rE_inp, p.a_E, p.theta_E), p.tau_E),
            "rI": _relax(s.rI, 1.0 - p.r * s.rI, _response(shared + i.rI_inp, p.a_I, p.theta_I), p.tau_I),
        }


@model
class WilsonCowanLinear(_ExcitatoryInhibitory):
    """`WilsonCowan` with a rectifier for its response, as in `brainmass.WilsonCowanLinearStep`.

    Parameters
    ----------
    tau_E, tau_I, wEE, wIE, wEI, wII, r : as in `WilsonCowan`

    References
    ----------
    Wilson and Cowan 1972, Biophysical Journal 12:1, equations 11 and 12.
    """

    tau_E: Any = 1.0 * u.ms
    tau_I: Any = 1.0 * u.ms
    wEE: Any = 0.8
    wIE: Any = 0.3
    wEI: Any = 1.0
    wII: Any = 0.85
    r: Any = 1.0

    @staticmethod
    def drift(s, p, i):
        onto_E = p.wEE * s.rE - p.wIE * s.rI + i.rE_inp
        onto_I = p.wEI * s.rE - p.wII * s.rI + i.rI_inp
        return {
            "rE": _relax(s.rE, 1.0 - p.r * s.rE, jnp.maximum(onto_E, 0.0), p.tau_E),
            "rI": _relax(s.rI, 1.0 - p.r * s.rI, jnp.maximum(onto_I, 0.0), p.tau_I),
        }


@model
class WilsonCowanDivisive(_ExcitatoryInhibitory):
    """`WilsonCowan` whose inhibition divides the response, as in `brainmass.WilsonCowanDivisiveStep`.

    Parameters
    ----------
    wEE, wIE : weights of the excitatory population, onto itself and onto the inhibitory one
    wEI, wII : weights of the inhibitory population in the divisor, of the excitatory response and of its own
    sigma_E, sigma_I : divisors at rest
    tau_E, a_E, theta_E, tau_I, a_I, theta_I, r : as in `WilsonCowan`

    References
    ----------
    Wilson and Cowan 1972, Biophysical Journal 12:1, equations 11 and 12.
    Carandini and Heeger 2012, Nature Reviews Neuroscience 13:51 (divisive normalisation).
    """

    tau_E: Any = 1.0 * u.ms
    a_E: Any = 1.2
    theta_E: Any = 2.8
    tau_I: Any = 1.0 * u.ms
    a_I: Any = 1.0
    theta_I: Any = 4.0
    wEE: Any = 6.0
    wIE: Any = 2.0
    wEI: Any = 6.5
    wII: Any = 5.5
    r: Any = 1.0
    sigma_E: Any = 1.0
    sigma_I: Any = 1.0

    @staticmethod
    def drift(s, p, i):
        gain_E = (1.0 - p.r * s.rE) / (p.sigma_E + p.wEI * s.rI)
        gain_I = (1.0 - p.r * s.rI) / (p.sigma_I + p.wII * s.rI)
        return {
            "rE": _relax(s.rE, gain_E, _response(p.wEE * s.rE + i.rE_inp, p.a_E, p.theta_E), p.tau_E),
            "rI": _relax(s.rI, gain_I, _response(p.wIE * s.rE + i.rI_inp, p.a_I, p.theta_I), p.tau_I),
        }


@model
class WilsonCowanDivisiveInput(_ExcitatoryInhibitory):
    """`WilsonCowan` whose inhibition divides the recurrent input, as in `brainmass.WilsonCowanDivisiveInputStep`.

    Parameters and inputs are those of `WilsonCowanDivisive`.

    References
    ----------
    Wilson and Cowan 1972, Biophysical Journal 12:1, equations 11 and 12.
    Carandini and Heeger 2012, Nature Reviews Neuroscience 13:51 (divisive normalisation).
    """

    tau_E: Any = 1.0 * u.ms
    a_E: Any = 1.2
    theta_E: Any = 2.8
    tau_I: Any = 1.0 * u.ms
    a_I: Any = 1.0
    theta_I: Any = 4.0
    wEE: Any = 6.0
    wIE: Any = 2.0
    wEI: Any = 6.5
    wII: Any = 5.5
    r: Any = 1.0
    sigma_E: Any = 1.0
    sigma_I: Any = 1.0

    @staticmethod
    def drift(s, p, i):
        onto_E = p.wEE * s.rE / (p.sigma_E + p.wEI * s.rI) + i.rE_inp
        onto_I = p.wIE * s.rE / (p.sigma_I + p.wII * s.rI) + i.rI_inp
        return {
            "rE": _relax(s.rE, 1.0 - p.r * s.rE, _response(onto_E, p.a_E, p.theta_E), p.tau_E),
            "rI": _relax(s.rI, 1.0 - p.r * s.rI, _response(onto_I, p.a_I, p.theta_I), p.tau_I),
        }


@model
class WilsonCowanAdaptive(_ExcitatoryInhibitory):
    """`WilsonCowan` with an adaptation current in each population, as in `brainmass.WilsonCowanAdaptiveStep`.

    The states ``aE`` and ``aI`` are the currents.

    Parameters
    ----------
    wEE, wEI : weights onto the excitatory population, of itself and of the inhibitory one
    wIE, wII : weights onto the inhibitory population, of the excitatory one and of itself
    tau_aE, tau_aI : time constants of the adaptation, ms
    b_E, b_I : its strengths
    tau_E, a_E, theta_E, tau_I, a_I, theta_I, r : as in `WilsonCowan`

    References
    ----------
    Wilson and Cowan 1972, Biophysical Journal 12:1, equations 11 and 12, with linear adaptation.
    """

    tau_E: Any = 1.0 * u.ms
    a_E: Any = 1.2
    theta_E: Any = 2.8
    tau_I: Any = 1.0 * u.ms
    a_I: Any = 1.0
    theta_I: Any = 4.0
    wEE: Any = 12.0
    wIE: Any = 4.0
    wEI: Any = 13.0
    wII: Any = 11.0
    r: Any = 1.0
    tau_aE: Any = 100.0 * u.ms
    tau_aI: Any = 80.0 * u.ms
    b_E: Any = 0.1
    b_I: Any = 0.08

    states = dict.fromkeys(("rE", "rI", "aE", "aI"), u.UNITLESS)

    @staticmethod
    def drift(s, p, i):
        onto_E = p.wEE * s.rE - p.wEI * s.rI + i.rE_inp - s.aE
        onto_I = p.wIE * s.rE - p.wII * s.rI + i.rI_inp - s.aI
        return {
            "rE": _relax(s.rE, 1.0 - p.r * s.rE, _response(onto_E, p.a_E, p.theta_E), p.tau_E),
            "rI": _relax(s.rI, 1.0 - p.r * s.rI, _response(onto_I, p.a_I, p.theta_I), p.tau_I),
            "aE": _relax(s.aE, p.b_E, s.rE, p.tau_aE),
            "aI": _relax(s.aI, p.b_I, s.rI, p.tau_aI),
        }


@model
class WilsonCowanThreePopulation(Model):
    """`WilsonCowan` with a third, modulating population, as in `brainmass.WilsonCowanThreePopulationStep`.

    The states ``rE``, ``rI`` and ``rM`` are the active fractions.

    Parameters
    ----------
    wEE, wEI, wEM : weights onto the excitatory population, of E, I (which subtracts) and M
    wIE, wII, wIM : weights onto the inhibitory population, likewise
    wME, wMI, wMM : weights onto the modulating population, likewise
    tau_M, a_M, theta_M : its time constant (ms), steepness and threshold
    tau_E, a_E, theta_E, tau_I, a_I, theta_I, r : as in `WilsonCowan`

    Inputs are ``rE_inp``, ``rI_inp`` and ``rM_inp``.

    References
    ----------
    Wilson and Cowan 1972, Biophysical Journal 12:1, equations 11 and 12.
    """

    tau_E: Any = 1.0 * u.ms
    a_E: Any = 1.2
    theta_E: Any = 2.8
    tau_I: Any = 1.0 * u.ms
    a_I: Any = 1.0
    theta_I: Any = 4.0
    tau_M: Any = 2.0 * u.ms
    a_M: Any = 1.0
    theta_M: Any = 3.5
    wEE: Any = 12.0
    wIE: Any = 4.0
    wEI: Any = 13.0
    wII: Any = 11.0
    wME: Any = 8.0
    wMI: Any = 6.0
    wEM: Any = 4.0
    wIM: Any = 2.0
    wMM: Any = 2.0
    r: Any = 1.0

    states = dict.fromkeys(("rE", "rI", "rM"), u.UNITLESS)
    inputs = {"rE_inp": 0.0, "rI_inp": 0.0, "rM_inp": 0.0}
    time_unit = u.ms

    @staticmethod
    def drift(s, p, i):
        onto_E = p.wEE * s.rE - p.wEI * s.rI + p.wEM * s.rM + i.rE_inp
        onto_I = p.wIE * s.rE - p.wII * s.rI + p.wIM * s.rM + i.rI_inp
        onto_M = p.wME * s.rE - p.wMI * s.rI + p.wMM * s.rM + i.rM_inp
        return {
            "rE": _relax(s.rE, 1.0 - p.r * s.rE, _response(onto_E, p.a_E, p.theta_E), p.tau_E),
            "rI": _relax(s.rI, 1.0 - p.r * s.rI, _response(onto_I, p.a_I, p.theta_I), p.tau_I),
            "rM": _relax(s.rM, 1.0 - p.r * s.rM, _response(onto_M, p.a_M, p.theta_M), p.tau_M),
        }
