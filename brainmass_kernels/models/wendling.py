"""Wendling's hippocampal mass: Jansen and Rit's column with slow and with fast inhibition."""

from __future__ import annotations

from typing import Any

import brainunit as u

from ..functional import sigmoid
from .base import Block, SecondOrderModel, model


@model
class Wendling(SecondOrderModel):
    """Wendling's mass with slow, dendritic and fast, somatic inhibition of the pyramidal cells.

        M'' = A a rate(E - I - F) - 2 a M' - a^2 M
        E'' = A a (E_inp + c2 C rate(c1 C M)) - 2 a E' - a^2 E
        I'' = B b c4 C rate(c3 C M) - 2 b I' - b^2 I
        F'' = G g c7 C rate(C (c5 M - c6 S)) - 2 g F' - g^2 F
        S'' = B b rate(c3 C M) - 2 b S' - b^2 S
        rate(v) = s_max / (1 + exp(r (v0 - v)))

    - States: the potentials ``M`` (pyramidal), ``E`` (excitatory), ``I`` (slow inhibition), ``F`` (fast inhibition)
      and ``S`` (slow inhibition of the fast interneurons) in mV, and their velocities ``Mv``, ``Ev``, ``Iv``, ``Fv``,
      ``Sv`` (mV/s).
    - Input: ``E_inp`` (Hz), with a standard deviation of 30 Hz in each sample of the paper.
    - Observable: ``eeg``, the pyramidal potential E - I - F (mV).

    With A = 5 mV and a mean input of 90 Hz, (B, G) in mV gives (50, 15) background activity, (40, 15) sporadic spikes,
    (25, 15) sustained spikes, (10, 15) activity like alpha, (5, 25) low-voltage fast activity and (15, 0) a nearly
    sinusoidal rhythm.

    Parameters
    ----------
    A, B, G : gain of excitation, slow and fast inhibition, mV
    a, b, g : rate constant of excitation, slow and fast inhibition, Hz
    C : number of synapses, dimensionless
    c1, c2, c3, c4, c5, c6, c7 : shares of the seven connections, dimensionless
    s_max, v0, r : largest rate (Hz), threshold (mV) and steepness (per mV, given as a plain number) of the sigmoid

    References
    ----------
    Wendling, Bartolomei, Bellanger and Chauvel 2002, European Journal of Neuroscience 15:1499-1508.
    """

    A: Any = 3.25 * u.mV
    B: Any = 22.0 * u.mV
    G: Any = 10.0 * u.mV
    a: Any = 100.0 * u.Hz
    b: Any = 50.0 * u.Hz
    g: Any = 500.0 * u.Hz
    C: Any = 135.0
    c1: Any = 1.0
    c2: Any = 0.8
    c3: Any = 0.25
    c4: Any = 0.25
    c5: Any = 0.3
    c6: Any = 0.1
    c7: Any = 0.8
    s_max: Any = 5.0 * u.Hz
    v0: Any = 6.0 * u.mV
    r: Any = 0.56

    states = {
        **dict.fromkeys(("M", "E", "I", "F", "S"), u.mV),
        **dict.fromkeys(("Mv", "Ev", "Iv", "Fv", "Sv"), u.mV / u.second),
    }
    inputs = {"E_inp": 90.0 * u.Hz}
    observables = {"eeg": u.mV}
    also = {"r": 1 / u.mV}
    blocks = (
        Block("M", "Mv", "A", "a"),
        Block("E", "Ev", "A", "a"),
        Block("I", "Iv", "B", "b"),
        Block("F", "Fv", "G", "g"),
        Block("S", "Sv", "B", "b"),
    )

    @staticmethod
    def drive(s, p, i):
        def rate(potential):
            return sigmoid(potential, p.s_max, p.v0, p.r)

        slow = rate(p.C * p.c3 * s.M)
        return {
            "M": rate(s.E - s.I - s.F),
            "E": i.E_inp + p.C * p.c2 * rate(p.C * p.c1 * s.M),
            "I": p.C * p.c4 * slow,
            "F": p.C * p.c7 * rate(p.C * (p.c5 * s.M - p.c6 * s.S)),
            "S": slow,
        }

    @staticmethod
    def observe(s, p):
        return {"eeg": s.E - s.I - s.F}
