"""David and Friston's area: Jansen and Rit's column, each population a mixture of a slow and a fast kinetics."""

from __future__ import annotations

from typing import Any

import brainunit as u

from ..functional import sigmoid
from .base import Block, SecondOrderModel, model


@model
class DavidFriston(SecondOrderModel):
    """David and Friston's mixture of two kinetic subpopulations; the spectrum moves with their weight ``w``.

    Each of the three populations of `JansenRit` has a slow (k = 1) and a fast (k = 2) part, which see the same rates:

        Mk'' = Aek bek rate(meg) - 2 bek Mk' - bek^2 Mk    (k = 1, 2)
        Ek'' = Aek bek (E_inp + a2 C rate(a1 C M)) - 2 bek Ek' - bek^2 Ek    (k = 1, 2)
        Ik'' = Aik bik a4 C rate(a3 C M) - 2 bik Ik' - bik^2 Ik    (k = 1, 2)
        M = w M1 + (1 - w) M2
        meg = w (E1 - I1) + (1 - w) (E2 - I2)
        rate(v) = s_max / (1 + exp(r (v0 - v)))

    - States: the potentials ``M1``, ``E1``, ``I1``, ``M2``, ``E2``, ``I2`` (mV), and their velocities ``Mv1``, ``Ev1``,
      ``Iv1``, ``Mv2``, ``Ev2``, ``Iv2`` (mV/s).
    - Input: ``E_inp`` (Hz), 220 with a standard deviation of 22 in each sample of the paper.
    - Observable: ``meg``, the mixed pyramidal potential (mV).

    Parameters
    ----------
    w : weight of the slow part, dimensionless: 1 oscillates at alpha frequency, 0 at gamma
    be1, bi1, be2, bi2 : rate constants, Hz: of time constants 10.8, 22, 4.6 and 2.9 ms
    Ae1, Ai1, Ae2, Ai2 : gains, mV: proportional to the rate constants, such that a response keeps its area
    C : number of synapses, dimensionless
    a1, a2, a3, a4 : shares of the four connections, dimensionless
    s_max, v0, r : largest rate (Hz), threshold (mV) and steepness (per mV, given as a plain number) of the sigmoid

    References
    ----------
    David and Friston 2003, NeuroImage 20:1743-1755.
    """

    w: Any = 0.8
    be1: Any = 1000.0 / 10.8 * u.Hz
    bi1: Any = 1000.0 / 22.0 * u.Hz
    be2: Any = 1000.0 / 4.6 * u.Hz
    bi2: Any = 1000.0 / 2.9 * u.Hz
    Ae1: Any = 32.5 / 10.8 * u.mV
    Ai1: Any = 440.0 / 22.0 * u.mV
    Ae2: Any = 32.5 / 4.6 * u.mV
    Ai2: Any = 440.0 / 2.9 * u.mV
    C: Any = 135.0
    a1: Any = 1.0
    a2: Any = 0.8
    a3: Any = 0.25
    a4: Any = 0.25
    s_max: Any = 5.0 * u.Hz
    v0: Any = 6.0 * u.mV
    r: Any = 0.56

    states = {
        **dict.fromkeys(("M1", "E1", "I1", "M2", "E2", "I2"), u.mV),
        **dict.fromkeys(("Mv1", "Ev1", "Iv1", "Mv2", "Ev2", "Iv2"), u.mV / u.second),
    }
    inputs = {"E_inp": 220.0 * u.Hz}
    observables = {"meg": u.mV}
    also = {"r": 1 / u.mV}
    blocks = tuple(
        Block(f"{x}{part}", f"{x}v{part}", f"A{of}{part}", f"b{of}{part}")
        for part in (1, 2)
        for x, of in (("M", "e"), ("E", "e"), ("I", "i"))
    )

    @classmethod
    def drive(cls, s, p, i):
        def rate(potential):
            return sigmoid(potential, p.s_max, p.v0, p.r)

        M = p.w * s.M1 + (1.0 - p.w) * s.M2
        drive = {
            "M": rate(cls.observe(s, p)["meg"]),
            "E": i.E_inp + p.C * p.a2 * rate(p.C * p.a1 * M),
            "I": p.C * p.a4 * rate(p.C * p.a3 * M),
        }
        return {f"{x}{part}": value for x, value in drive.items() for part in (1, 2)}

    @staticmethod
    def observe(s, p):
        return {"meg": p.w * (s.E1 - s.I1) + (1.0 - p.w) * (s.E2 - s.I2)}
