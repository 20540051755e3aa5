"""Wendling's hippocampal mass: Jansen and Rit's column with slow and with fast inhibition."""

from __future__ import annotations

from typing import Any

import brainunit as u

from ..functional import sigmoid
from .base import Block, SecondOrderModel, model


@model
class Wendling(SecondOrderModel):
    """Wendling's mass with slow, dendritic and fast, somatic inhibition of the pyramidal cells.

    Five second-order blocks: ``M`` (pyramidal), ``E`` (excitatory), ``I`` (slow inhibition), ``F`` (fast inhibition),
    ``S`` (slow inhibition of the fast interneurons), and their velocities ``Mv`` .. ``Sv``. The pyramidal potential is
    ``E - I - F``, recorded as ``eeg``.

    With A = 5 mV and a mean input of 90 Hz, (B, G) in mV gives (50, 15) background activity, (40, 15) sporadic spikes,
    (25, 15) sustained spikes, (10, 15) activity like alpha, (5, 25) low-voltage fast activity and (15, 0) a nearly
    sinusoidal rhythm.

    Parameters
    ----------
    A, B, G : gain of excitation, slow and fast inhibition, mV
    a, b, g : their rate constants, Hz
    C : number of synapses, with the shares ``c1`` .. ``c7`` of the seven connections
    s_max, v0, r : largest rate (Hz), threshold (mV) and steepness (per mV, given as a plain number) of the sigmoid

    Input is ``E_inp`` (Hz), with a standard deviation of 30 Hz in each sample of the paper.

    References
    ----------
    Wendling, Bartolomei, Bellanger and Chauvel 2002, European Journal of Neuroscience 15:1499.
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
