"""The canonical microcircuit of dynamic causal modelling: four populations of a cortical column."""

from __future__ import annotations

from typing import Any

import brainunit as u

from ..functional import sigmoid
from .base import Block, SecondOrderModel, model


@model
class CanonicalMicrocircuit(SecondOrderModel):
    """One source of dynamic causal modelling's canonical microcircuit; the defaults are SPM's priors.

        ss'' = H b_ss (ss_inp - g_ss_ss f(ss) - g_sp_ss f(sp) - g_ii_ss f(ii)) - 2 b_ss ss' - b_ss^2 ss
        sp'' = H b_sp (sp_inp + g_ss_sp f(ss) - g_sp_sp f(sp)) - 2 b_sp sp' - b_sp^2 sp
        ii'' = H b_ii (ii_inp + g_ss_ii f(ss) + g_dp_ii f(dp) - g_ii_ii f(ii)) - 2 b_ii ii' - b_ii^2 ii
        dp'' = H b_dp (dp_inp - g_ii_dp f(ii) - g_dp_dp f(dp)) - 2 b_dp dp' - b_dp^2 dp
        f(v) = 1 / (1 + exp(-r v)) - 1/2

    Delays within and between sources, and SPM's modulation of one connection by deep cells, are left out.

    - States: the potentials, as deviations from rest, of ``ss`` (spiny stellate cells), ``sp`` (superficial pyramidal
      cells), ``ii`` (inhibitory interneurons) and ``dp`` (deep pyramidal cells) in mV, and their velocities ``ssv``,
      ``spv``, ``iiv``, ``dpv`` (mV/s).
    - Inputs: ``ss_inp``, ``sp_inp``, ``ii_inp`` and ``dp_inp`` (Hz): forward ones reach ss and dp, backward ones sp and
      ii with a negative sign.

    Parameters
    ----------
    H : gain of every block, mV
    b_ss, b_sp, b_ii, b_dp : rate constants, Hz: of time constants 2, 2, 16 and 28 ms
    g_ss_ss, g_sp_ss, g_ii_ss, g_ii_ii, g_sp_sp, g_ii_dp, g_dp_dp : inhibitory connections, "from_to", Hz
    g_ss_ii, g_dp_ii, g_ss_sp : excitatory connections, "from_to", Hz
    r : steepness of the sigmoid (per mV, given as a plain number)

    References
    ----------
    Bastos, Usrey, Adams, Mangun, Fries and Friston 2012, Neuron 76:695-711.
    Moran, Pinotsis and Friston 2013, Frontiers in Computational Neuroscience 7:57; SPM12, ``spm_fx_cmc``.
    """

    H: Any = 1.0 * u.mV
    b_ss: Any = 500.0 * u.Hz
    b_sp: Any = 500.0 * u.Hz
    b_ii: Any = 62.5 * u.Hz
    b_dp: Any = 1000.0 / 28.0 * u.Hz
    g_ss_ss: Any = 800.0 * u.Hz
    g_sp_ss: Any = 800.0 * u.Hz
    g_ii_ss: Any = 1600.0 * u.Hz
    g_ii_ii: Any = 800.0 * u.Hz
    g_ss_ii: Any = 800.0 * u.Hz
    g_dp_ii: Any = 400.0 * u.Hz
    g_sp_sp: Any = 800.0 * u.Hz
    g_ss_sp: Any = 800.0 * u.Hz
    g_ii_dp: Any = 400.0 * u.Hz
    g_dp_dp: Any = 200.0 * u.Hz
    r: Any = 2.0 / 3.0

    states = {
        **dict.fromkeys(("ss", "sp", "ii", "dp"), u.mV),
        **dict.fromkeys(("ssv", "spv", "iiv", "dpv"), u.mV / u.second),
    }
    inputs = dict.fromkeys(("ss_inp", "sp_inp", "ii_inp", "dp_inp"), 0.0 * u.Hz)
    also = {"r": 1 / u.mV}
    blocks = tuple(Block(x, f"{x}v", "H", f"b_{x}") for x in ("ss", "sp", "ii", "dp"))

    @staticmethod
    def drive(s, p, i):
        def fired(potential):
            return sigmoid(potential, 1.0, 0.0, p.r) - 0.5

        ss, sp, ii, dp = fired(s.ss), fired(s.sp), fired(s.ii), fired(s.dp)
        return {
            "ss": i.ss_inp - p.g_ss_ss * ss - p.g_sp_ss * sp - p.g_ii_ss * ii,
            "sp": i.sp_inp + p.g_ss_sp * ss - p.g_sp_sp * sp,
            "ii": i.ii_inp + p.g_ss_ii * ss + p.g_dp_ii * dp - p.g_ii_ii * ii,
            "dp": i.dp_inp - p.g_ii_dp * ii - p.g_dp_dp * dp,
        }
