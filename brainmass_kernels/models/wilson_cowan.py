"""Wilson and Cowan's excitatory and inhibitory populations, and eight variants of them."""

from __future__ import annotations

from typing import Any

import brainunit as u
import jax.numpy as jnp

from ..functional import sigmoid
from .base import Model, model

# What the models share. The fields of a class come after those of the classes that it is made of, the last one first.


class _ExcitatoryInhibitory(Model):
    """The active fractions ``rE`` and ``rI`` of two populations, and an input to each; time in ms."""

    states = {"rE": u.UNITLESS, "rI": u.UNITLESS}
    inputs = {"rE_inp": 0.0, "rI_inp": 0.0}
    time_unit = u.ms


@model
class _Populations(_ExcitatoryInhibitory):
    """Time constants and responses of the two populations."""

    tau_E: Any = 1.0 * u.ms
    a_E: Any = 1.2
    theta_E: Any = 2.8
    tau_I: Any = 1.0 * u.ms
    a_I: Any = 1.0
    theta_I: Any = 4.0


@model
class _Weights(_ExcitatoryInhibitory):
    """Weights among the two populations."""

    wEE: Any = 12.0
    wIE: Any = 4.0
    wEI: Any = 13.0
    wII: Any = 11.0


@model
class _Refractory(_ExcitatoryInhibitory):
    """The refractory fraction."""

    r: Any = 1.0


@model
class _Divisive(_Refractory, _Weights, _Populations):
    """Inhibition that divides, by a divisor for each population."""

    wEE: Any = 6.0
    wIE: Any = 2.0
    wEI: Any = 6.5
    wII: Any = 5.5
    sigma_E: Any = 1.0
    sigma_I: Any = 1.0


def _response(x, a, theta):
    """The sigmoid that is 0 at 0."""
    return sigmoid(x, 1.0, theta, a) - sigmoid(0.0, 1.0, theta, a)


def _relax(rate, gain, response, tau):
    return (gain * response - rate) / tau


def _summed(s, p, i):
    """What reaches either population."""
    return p.wEE * s.rE - p.wIE * s.rI + i.rE_inp, p.wEI * s.rE - p.wII * s.rI + i.rI_inp


def _refractory_rates(s, p, onto_E, onto_I):
    return {
        "rE": _relax(s.rE, 1.0 - p.r * s.rE, _response(onto_E, p.a_E, p.theta_E), p.tau_E),
        "rI": _relax(s.rI, 1.0 - p.r * s.rI, _response(onto_I, p.a_I, p.theta_I), p.tau_I),
    }


# The models ---------------------------------------------------------------------------------------------------------


@model
class WilsonCowan(_Refractory, _Weights, _Populations):
    """Wilson and Cowan's two populations; names, units and defaults as in `brainmass.WilsonCowanStep`.

        tau_E rE' = (1 - r rE) S_E(wEE rE - wIE rI + rE_inp) - rE
        tau_I rI' = (1 - r rI) S_I(wEI rE - wII rI + rI_inp) - rI
        S_k(x) = 1 / (1 + exp(-a_k (x - theta_k))) - 1 / (1 + exp(a_k theta_k))    (k = E, I)

    - States: the active fractions ``rE`` and ``rI`` of the two populations, dimensionless.
    - Inputs: ``rE_inp`` and ``rI_inp``, dimensionless, inside the response.

    Parameters
    ----------
    tau_E, tau_I : time constants, ms
    a_E, a_I, theta_E, theta_I : steepness and threshold of the responses, dimensionless
    wEE, wIE : weights onto the excitatory population, of itself and of the inhibitory one, dimensionless
    wEI, wII : weights onto the inhibitory population, of the excitatory one and of itself, dimensionless
    r : refractory fraction, dimensionless

    References
    ----------
    Wilson and Cowan 1972, Biophysical Journal 12:1-24, equations 11 and 12.
    """

    @staticmethod
    def drift(s, p, i):
        return _refractory_rates(s, p, *_summed(s, p, i))


@model
class WilsonCowanNoSaturation(_Weights, _Populations):
    """`WilsonCowan` without refractoriness, as in `brainmass.WilsonCowanNoSaturationStep`.

        tau_E rE' = S_E(wEE rE - wIE rI + rE_inp) - rE
        tau_I rI' = S_I(wEI rE - wII rI + rI_inp) - rI

    - States: the active fractions ``rE`` and ``rI``, dimensionless.
    - Inputs: ``rE_inp`` and ``rI_inp``, dimensionless, inside the response (S as in `WilsonCowan`).

    Parameters
    ----------
    tau_E, a_E, theta_E, tau_I, a_I, theta_I, wEE, wIE, wEI, wII : as in `WilsonCowan`

    References
    ----------
    Wilson and Cowan 1972, Biophysical Journal 12:1-24, equations 11 and 12 with r = 0.
    """

    @staticmethod
    def drift(s, p, i):
        onto_E, onto_I = _summed(s, p, i)
        return {
            "rE": _relax(s.rE, 1.0, _response(onto_E, p.a_E, p.theta_E), p.tau_E),
            "rI": _relax(s.rI, 1.0, _response(onto_I, p.a_I, p.theta_I), p.tau_I),
        }


@model
class WilsonCowanSymmetric(_ExcitatoryInhibitory):
    """`WilsonCowan` with one time constant and one response, as in `brainmass.WilsonCowanSymmetricStep`.

        tau rE' = (1 - r rE) S(wEE rE - wIE rI + rE_inp) - rE
        tau rI' = (1 - r rI) S(wEI rE - wII rI + rI_inp) - rI
        S(x) = 1 / (1 + exp(-a (x - theta))) - 1 / (1 + exp(a theta))

    - States: the active fractions ``rE`` and ``rI``, dimensionless.
    - Inputs: ``rE_inp`` and ``rI_inp``, dimensionless, inside the response.

    Parameters
    ----------
    tau : time constant of both populations, ms
    a, theta : steepness and threshold of both responses, dimensionless
    wEE, wIE, wEI, wII, r : as in `WilsonCowan`

    References
    ----------
    Wilson and Cowan 1972, Biophysical Journal 12:1-24, equations 11 and 12.
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
        onto_E, onto_I = _summed(s, p, i)
        return {
            "rE": _relax(s.rE, 1.0 - p.r * s.rE, _response(onto_E, p.a, p.theta), p.tau),
            "rI": _relax(s.rI, 1.0 - p.r * s.rI, _response(onto_I, p.a, p.theta), p.tau),
        }


@model
class WilsonCowanSimplified(_Populations):
    """`WilsonCowan` with one excitatory and one inhibitory weight, as in `brainmass.WilsonCowanSimplifiedStep`.

        tau_E rE' = (1 - r rE) S_E(w_exc rE - w_inh rI + rE_inp) - rE
        tau_I rI' = (1 - r rI) S_I(w_exc rE - w_inh rI + rI_inp) - rI

    - States: the active fractions ``rE`` and ``rI``, dimensionless.
    - Inputs: ``rE_inp`` and ``rI_inp``, dimensionless, inside the response (S as in `WilsonCowan`).

    Parameters
    ----------
    w_exc, w_inh : weights of the excitatory and of the inhibitory population, onto both, dimensionless
    tau_E, a_E, theta_E, tau_I, a_I, theta_I, r : as in `WilsonCowan`

    References
    ----------
    Wilson and Cowan 1972, Biophysical Journal 12:1-24, equations 11 and 12.
    """

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

        tau_E rE' = (1 - r rE) max(wEE rE - wIE rI + rE_inp, 0) - rE
        tau_I rI' = (1 - r rI) max(wEI rE - wII rI + rI_inp, 0) - rI

    - States: the active fractions ``rE`` and ``rI``, dimensionless.
    - Inputs: ``rE_inp`` and ``rI_inp``, dimensionless, inside the rectifier.

    Parameters
    ----------
    tau_E, tau_I, wEE, wIE, wEI, wII, r : as in `WilsonCowan`

    References
    ----------
    Wilson and Cowan 1972, Biophysical Journal 12:1-24, equations 11 and 12.
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
        onto_E, onto_I = _summed(s, p, i)
        return {
            "rE": _relax(s.rE, 1.0 - p.r * s.rE, jnp.maximum(onto_E, 0.0), p.tau_E),
            "rI": _relax(s.rI, 1.0 - p.r * s.rI, jnp.maximum(onto_I, 0.0), p.tau_I),
        }


@model
class WilsonCowanDivisive(_Divisive):
    """`WilsonCowan` whose inhibition divides the response, as in `brainmass.WilsonCowanDivisiveStep`.

        tau_E rE' = (1 - r rE) S_E(wEE rE + rE_inp) / (sigma_E + wEI rI) - rE
        tau_I rI' = (1 - r rI) S_I(wIE rE + rI_inp) / (sigma_I + wII rI) - rI

    - States: the active fractions ``rE`` and ``rI``, dimensionless.
    - Inputs: ``rE_inp`` and ``rI_inp``, dimensionless, inside the response (S as in `WilsonCowan`).

    Parameters
    ----------
    wEE, wIE : weights of the excitatory population, onto itself and onto the inhibitory one, dimensionless
    wEI, wII : weights of the inhibitory population in the divisors of the two responses, dimensionless
    sigma_E, sigma_I : divisors at rest, dimensionless
    tau_E, a_E, theta_E, tau_I, a_I, theta_I, r : as in `WilsonCowan`

    References
    ----------
    Wilson and Cowan 1972, Biophysical Journal 12:1-24, equations 11 and 12.
    Carandini and Heeger 2012, Nature Reviews Neuroscience 13:51-62 (divisive normalisation).
    """

    @staticmethod
    def drift(s, p, i):
        gain_E = (1.0 - p.r * s.rE) / (p.sigma_E + p.wEI * s.rI)
        gain_I = (1.0 - p.r * s.rI) / (p.sigma_I + p.wII * s.rI)
        return {
            "rE": _relax(s.rE, gain_E, _response(p.wEE * s.rE + i.rE_inp, p.a_E, p.theta_E), p.tau_E),
            "rI": _relax(s.rI, gain_I, _response(p.wIE * s.rE + i.rI_inp, p.a_I, p.theta_I), p.tau_I),
        }


@model
class WilsonCowanDivisiveInput(_Divisive):
    """`WilsonCowan` whose inhibition divides the recurrent input, as in `brainmass.WilsonCowanDivisiveInputStep`.

        tau_E rE' = (1 - r rE) S_E(wEE rE / (sigma_E + wEI rI) + rE_inp) - rE
        tau_I rI' = (1 - r rI) S_I(wIE rE / (sigma_I + wII rI) + rI_inp) - rI

    - States: the active fractions ``rE`` and ``rI``, dimensionless.
    - Inputs: ``rE_inp`` and ``rI_inp``, dimensionless, inside the response (S as in `WilsonCowan`).

    Parameters
    ----------
    wEE, wIE, wEI, wII, sigma_E, sigma_I : as in `WilsonCowanDivisive`, where the divisors are those of the input
    tau_E, a_E, theta_E, tau_I, a_I, theta_I, r : as in `WilsonCowan`

    References
    ----------
    Wilson and Cowan 1972, Biophysical Journal 12:1-24, equations 11 and 12.
    Carandini and Heeger 2012, Nature Reviews Neuroscience 13:51-62 (divisive normalisation).
    """

    @staticmethod
    def drift(s, p, i):
        onto_E = p.wEE * s.rE / (p.sigma_E + p.wEI * s.rI) + i.rE_inp
        onto_I = p.wIE * s.rE / (p.sigma_I + p.wII * s.rI) + i.rI_inp
        return _refractory_rates(s, p, onto_E, onto_I)


@model
class WilsonCowanAdaptive(_Refractory, _Weights, _Populations):
    """`WilsonCowan` with an adaptation current in each population, as in `brainmass.WilsonCowanAdaptiveStep`.

        tau_E rE' = (1 - r rE) S_E(wEE rE - wEI rI + rE_inp - aE) - rE
        tau_I rI' = (1 - r rI) S_I(wIE rE - wII rI + rI_inp - aI) - rI
        tau_aE aE' = b_E rE - aE
        tau_aI aI' = b_I rI - aI

    - States: the active fractions ``rE`` and ``rI`` and the adaptation currents ``aE`` and ``aI``, dimensionless.
    - Inputs: ``rE_inp`` and ``rI_inp``, dimensionless, inside the response (S as in `WilsonCowan`).

    Parameters
    ----------
    wEE, wEI : weights onto the excitatory population, of itself and of the inhibitory one, dimensionless
    wIE, wII : weights onto the inhibitory population, of the excitatory one and of itself, dimensionless
    tau_aE, tau_aI : time constants of the adaptation, ms
    b_E, b_I : strengths of the adaptation, dimensionless
    tau_E, a_E, theta_E, tau_I, a_I, theta_I, r : as in `WilsonCowan`

    References
    ----------
    Wilson and Cowan 1972, Biophysical Journal 12:1-24, equations 11 and 12, with linear adaptation.
    """

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
            **_refractory_rates(s, p, onto_E, onto_I),
            "aE": _relax(s.aE, p.b_E, s.rE, p.tau_aE),
            "aI": _relax(s.aI, p.b_I, s.rI, p.tau_aI),
        }


@model
class WilsonCowanThreePopulation(_Populations):
    """`WilsonCowan` with a third, modulating population, as in `brainmass.WilsonCowanThreePopulationStep`.

        tau_E rE' = (1 - r rE) S_E(wEE rE - wEI rI + wEM rM + rE_inp) - rE
        tau_I rI' = (1 - r rI) S_I(wIE rE - wII rI + wIM rM + rI_inp) - rI
        tau_M rM' = (1 - r rM) S_M(wME rE - wMI rI + wMM rM + rM_inp) - rM
        S_k(x) = 1 / (1 + exp(-a_k (x - theta_k))) - 1 / (1 + exp(a_k theta_k))    (k = E, I, M)

    - States: the active fractions ``rE``, ``rI`` and ``rM``, dimensionless.
    - Inputs: ``rE_inp``, ``rI_inp`` and ``rM_inp``, dimensionless, inside the response.

    Parameters
    ----------
    wEE, wEI, wEM : weights onto the excitatory population, of E, I (which subtracts) and M, dimensionless
    wIE, wII, wIM : weights onto the inhibitory population, likewise
    wME, wMI, wMM : weights onto the modulating population, likewise
    tau_M, a_M, theta_M : time constant (ms), steepness and threshold of the modulating population
    tau_E, a_E, theta_E, tau_I, a_I, theta_I, r : as in `WilsonCowan`

    References
    ----------
    Wilson and Cowan 1972, Biophysical Journal 12:1-24, equations 11 and 12.
    """

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

    @staticmethod
    def drift(s, p, i):
        onto_E = p.wEE * s.rE - p.wEI * s.rI + p.wEM * s.rM + i.rE_inp
        onto_I = p.wIE * s.rE - p.wII * s.rI + p.wIM * s.rM + i.rI_inp
        onto_M = p.wME * s.rE - p.wMI * s.rI + p.wMM * s.rM + i.rM_inp
        return {
            **_refractory_rates(s, p, onto_E, onto_I),
            "rM": _relax(s.rM, 1.0 - p.r * s.rM, _response(onto_M, p.a_M, p.theta_M), p.tau_M),
        }
