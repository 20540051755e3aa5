"""What the command line samples: an evoked response whose parameters are known, or a spectrum of the user's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import brainunit as u
import numpy as np

from .. import routing, units
from ..fitting.targets import LINEAR, TimeSeries
from ..linear import linear_spectrum
from ..models import JansenRit
from ..simulation import simulate
from ..spectra import PowerSpectrum
from . import likelihoods, priors
from .density import LogDensity
from .log_density import log_density

#: Of the example's data: C, be in Hz, and the standard deviation of its noise in mV.
KNOWN = {"C": 150.0, "be": 110.0, "likelihood.sigma": 0.2}
_WIDTH = 3.0


def evoked() -> LogDensity:
    """Of a simulated evoked response of Jansen-Rit: a pulse of 20 ms on a steady input, and noise in the sensor."""
    pulse = np.zeros(400)
    pulse[50:70] = 200.0
    run: dict[str, Any] = {"inputs": {"E_inp": (100 + pulse) * u.Hz}, "every": 5}
    true = JansenRit(C=KNOWN["C"], be=KNOWN["be"] * u.Hz)
    eeg = simulate(true, 0.4 * u.second, 1 * u.ms, **run)["eeg"]
    noise = np.random.default_rng(0).normal(0.0, KNOWN["likelihood.sigma"], eeg.shape)
    return log_density(
        JansenRit(),
        TimeSeries(eeg + noise * u.mV, name="evoked response"),
        {"C": (80.0, 250.0), "be": None},
        priors={"be": priors.LogNormal(100 * u.Hz, 0.2)},
        likelihood=likelihoods.Gaussian(sigma=priors.HalfNormal(1 * u.mV)),
        duration=0.4 * u.second,
        dt=1 * u.ms,
        transient=0 * u.second,
        **run,
    )


def spectral(
    model,
    target: PowerSpectrum,
    free: Mapping[str, tuple[float, float]],
    segments: float,
    inputs: Mapping[str, Any],
    noise: Mapping[str, Any],
    record: str | None,
    band: tuple[float, float],
) -> LogDensity:
    """Of a spectrum about a stable fixed point, by Whittle's likelihood.

    The sensor's gain and the background have priors so wide that they hardly count, of a factor of 20 about the level
    of the data.

    Parameters
    ----------
    segments : independent ones that the spectrum is the mean of

    Raises
    ------
    ValueError : the values of the arguments have no stable fixed point
    """
    if len(target) > 1:
        raise ValueError(f"'target' got {len(target)} spectra, but a posterior is of one: name one channel")
    record = next(iter(model.recordable())) if record is None else record
    density = linear_spectrum(model, target.freqs * u.Hz, inputs=inputs, noise=noise, of=record)
    inside = (target.freqs >= band[0]) & (target.freqs <= band[1])
    levels = (float(np.mean(np.log(x[inside]))) for x in (target.power[0], np.asarray(u.get_magnitude(density))))
    of_data, of_model = levels
    likelihood = likelihoods.Whittle(
        segments,
        gain=priors.LogNormal(math.exp(of_data - of_model), _WIDTH),
        background=priors.LogNormal(math.exp(of_data), _WIDTH),
        exponent=priors.Normal(1.0, 0.5),
    )
    known = routing.places(model, inputs)
    bounds = {name: tuple(units.attach(x, known[name].unit) for x in pair) for name, pair in free.items()}
    return log_density(
        model, target, bounds, likelihood=likelihood, inputs=inputs, noise=noise, record=record, band=band,
        predict=LINEAR,
    )  # fmt: skip
