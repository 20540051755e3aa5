"""The work that every peer does: its sizes, parameters and loss, in numbers alone, so that each environment imports it.

Jansen-Rit from rest at steps of 0.1 ms in float32, the eeg of every 10th step recorded. Each mass has an `Ae`, a `be`
and a `C` of its own.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

DT = 1e-4  # seconds
EVERY = 10
DRIVE = 220.0  # Hz
NOISE = 2.0  # Hz s^0.5, on the drive
#: Strengths of networks: the largest, in Hz/mV.
STRONGEST = 0.5
REGIONS = 76
#: What all masses share, in mV, Hz and 1/mV.
SHARED = {"Ai": 22.0, "bi": 50.0, "s_max": 5.0, "v0": 6.0, "r": 0.56, "a1": 1.0, "a2": 0.8, "a3": 0.25, "a4": 0.25}
#: Of one mass: what a network's regions have.
ONE = {"Ae": 3.25, "be": 100.0, "C": 135.0}
#: The band of a spectrum that is fitted ends here, in Hz.
HIGHEST = 100.0


class Work(NamedTuple):
    """One call of a case.

    Attributes
    ----------
    lanes : masses, or networks of ``REGIONS`` regions
    connectome : a file with ``weights`` and ``delays`` (whole steps), of a network
    """

    case: str
    lanes: int
    steps: int
    connectome: str | None = None

    @property
    def records(self) -> int:
        return self.steps // EVERY

    @property
    def masses(self) -> int:
        return self.lanes * (REGIONS if self.case == "network" else 1)

    @property
    def segment(self) -> int:
        """Records in a segment of Welch's method; they overlap by half."""
        return self.records // 4


ABOUT = {
    "forward": "records of every mass",
    "gradient": "gradient of mean eeg^2 in the C of each mass",
    "noise": "the same as forward with white noise on the drive of each mass",
    "network": "records of networks of 76 regions, each connection with its delay, a strength for each network",
    "fit": "value and gradient, in Ae, be and C of each mass, of how far its Welch spectrum is from another",
}
FULL = {
    "forward": Work("forward", 16_384, 2_000),
    "gradient": Work("gradient", 1_024, 10_000),
    "noise": Work("noise", 4_096, 2_000),
    "network": Work("network", 16, 2_000),
    "fit": Work("fit", 64, 10_000),
}
QUICK = {
    "forward": Work("forward", 128, 200),
    "gradient": Work("gradient", 128, 200),
    "noise": Work("noise", 1_024, 200),
    "network": Work("network", 2, 200),
    "fit": Work("fit", 4, 1_000),
}
#: (case, peer): how many times as fast this package should be.
GOALS = {
    ("forward", "scan"): 3.8,
    ("forward", "tvboptim"): 8.0,
    ("gradient", "scan"): 8.0,
    ("gradient", "tvboptim"): 15.0,
    ("noise", "vbjax"): 8.0,
}


def parameters(lanes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ae in mV, be in Hz and C of each mass."""
    spread = np.linspace(0.0, 1.0, lanes, dtype=np.float32)
    return 3.0 + 0.5 * spread, 95.0 + 10.0 * spread, 130.0 + 10.0 * spread


def strengths(networks: int) -> np.ndarray:
    """Of each network, in Hz/mV."""
    return np.linspace(0.0, STRONGEST, networks, dtype=np.float32)


def connectome(work: Work) -> tuple[np.ndarray, np.ndarray]:
    """Weights ``(regions, regions)``, row i what region i receives, and delays in steps, an int32 each."""
    if work.connectome is None:
        raise ValueError("'connectome' got None, but takes a file of the case network")
    with np.load(work.connectome) as held:
        return held["weights"], held["delays"]


def band(work: Work) -> np.ndarray:
    """Which bins of a spectrum are fitted, in order."""
    freqs = np.fft.rfftfreq(work.segment, DT * EVERY)
    return np.flatnonzero((freqs > 0.0) & (freqs <= HIGHEST))


def wanted(work: Work) -> np.ndarray:
    """The fitted spectrum in log10 mV^2/Hz, one value a bin of the band: a slope and a peak at 10 Hz."""
    freqs = np.fft.rfftfreq(work.segment, DT * EVERY)[band(work)]
    return (0.5 - 1.5 * np.log10(freqs) + np.exp(-(((freqs - 10.0) / 3.0) ** 2))).astype(np.float32)


def spectral_loss(eeg, work: Work, xp=np):
    """The mean square over the band of log10 power less what is wanted, summed over masses.

    Parameters
    ----------
    eeg : (records, lanes) in mV
    xp : `numpy`, or `jax.numpy` to differentiate it
    """
    segment, half, hann = work.segment, work.segment - work.segment // 2, _hann(work.segment)
    stacked = xp.stack([eeg[first : first + segment] for first in range(0, work.records - segment + 1, half)])
    window = xp.asarray(hann[:, None], eeg.dtype)
    spectrum = xp.fft.rfft((stacked - stacked.mean(1, keepdims=True)) * window, axis=1)[:, band(work)]
    power = 2.0 * DT * EVERY / float(np.sum(hann**2)) * (spectrum.real**2 + spectrum.imag**2).mean(0)
    away = xp.log10(power) - xp.asarray(wanted(work)[:, None], eeg.dtype)
    return xp.sum(xp.mean(away**2, 0))


def _hann(count: int) -> np.ndarray:
    return 0.5 - 0.5 * np.cos(2.0 * np.pi * np.arange(count) / count)
