"""Jansen and Rit's cortical column: pyramidal cells between an excitatory and an inhibitory loop."""

from __future__ import annotations

from typing import Any

import brainunit as u

from ..functional import sigmoid
from .base import Block, SecondOrderModel, model


@model
class JansenRit(SecondOrderModel):
    """Jansen and Rit's cortical column; names, units and defaults as in `brainmass.JansenRitStep`.

        M'' = Ae be rate(E - I + M_inp) - 2 be M' - be^2 M
        E'' = Ae be (E_inp + a2 C rate(a1 C M)) - 2 be E' - be^2 E
        I'' = Ai bi a4 C rate(a3 C M + I_inp) - 2 bi I' - bi^2 I
        rate(v) = s_max / (1 + exp(r (v0 - v)))

    - States: the potentials ``M`` (pyramidal), ``E`` and ``I`` (mV), their velocities ``Mv``, ``Ev``, ``Iv`` (mV/s).
    - Inputs: ``M_inp`` (mV), ``E_inp`` (Hz, the extrinsic drive) and ``I_inp`` (mV).
    - Observable: ``eeg``, the pyramidal potential E - I (mV).

    Parameters
    ----------
    Ae, Ai : excitatory and inhibitory gain, mV
    be, bi : excitatory and inhibitory rate constant, Hz
    C : number of synapses, dimensionless
    a1, a2, a3, a4 : shares of the four connections, dimensionless
    s_max, v0, r : largest rate (Hz), threshold (mV) and steepness (per mV, given as a plain number) of the sigmoid

    References
    ----------
    Jansen and Rit 1995, Biological Cybernetics 73:357-366, equations 1-6 and table 1.
    """

    Ae: Any = 3.25 * u.mV
    Ai: Any = 22.0 * u.mV
    be: Any = 100.0 * u.Hz
    bi: Any = 50.0 * u.Hz
    C: Any = 135.0
    a1: Any = 1.0
    a2: Any = 0.8
    a3: Any = 0.25
    a4: Any = 0.25
    s_max: Any = 5.0 * u.Hz
    v0: Any = 6.0 * u.mV
    r: Any = 0.56

    states = {**dict.fromkeys(("M", "E", "I"), u.mV), **dict.fromkeys(("Mv", "Ev", "Iv"), u.mV / u.second)}
    inputs = {"M_inp": 0.0 * u.mV, "E_inp": 0.0 * u.Hz, "I_inp": 0.0 * u.mV}
    observables = {"eeg": u.mV}
    also = {"r": 1 / u.mV}
    blocks = (Block("M", "Mv", "Ae", "be"), Block("E", "Ev", "Ae", "be"), Block("I", "Iv", "Ai", "bi"))

    @staticmethod
    def drive(s, p, i):
        def rate(potential):
            return sigmoid(potential, p.s_max, p.v0, p.r)

        return {
            "M": rate(s.E - s.I + i.M_inp),
            "E": i.E_inp + p.C * p.a2 * rate(p.C * p.a1 * s.M),
            "I": p.C * p.a4 * rate(p.C * p.a3 * s.M + i.I_inp),
        }

    @staticmethod
    def observe(s, p):
        return {"eeg": s.E - s.I}
