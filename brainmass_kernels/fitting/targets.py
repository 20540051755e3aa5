"""From a target to how runs are compared with it: power spectra, time series, connectivity, or a user's function."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import brainunit as u

from .. import spectra, units
from ..models.base import check_name
from ..network import parts_of
from ..spectra import PowerSpectrum
from . import sensors
from .comparisons import LINEAR as LINEAR
from .comparisons import SIMULATION as SIMULATION
from .comparisons import Comparison as Comparison
from .comparisons import OfConnectivity as OfConnectivity
from .comparisons import OfDensities as OfDensities
from .comparisons import OfFunction as OfFunction
from .comparisons import OfSeries as OfSeries
from .comparisons import OfSpectra as OfSpectra
from .comparisons import Target as Target
from .comparisons import not_linear
from .observed import Connectivity as Connectivity
from .observed import TimeSeries as TimeSeries
from .observed import addressable as addressable
from .observed import name_of as name_of
from .observed import on_host as on_host
from .observed import plain as plain
from .observed import unchecked as unchecked


def as_target(target) -> Any:
    """A `PowerSpectrum`, a `TimeSeries`, a `Connectivity` or a function."""
    if isinstance(target, PowerSpectrum | TimeSeries | Connectivity | Target) or callable(target):
        return target
    if isinstance(target, str | os.PathLike) or spectra.in_memory(target):
        return spectra.load_spectrum(target)
    if isinstance(target, tuple | list) and len(target) == 2:
        return PowerSpectrum(*target)
    raise TypeError(
        f"'target' got {type(target).__name__}, but takes a PowerSpectrum, the path of one or of a recording, an "
        "MNE Raw, Epochs or Spectrum, a pair (freqs, power), a TimeSeries, a Connectivity, a ConnectivityDynamics, a "
        "CrossSpectrum, a Joint of these, or a function of a Result"
    )


def compare(target, model, record, options, band, background, predict: str = SIMULATION) -> Comparison:
    """How runs of these options are compared with a target."""
    _, mass = parts_of(model)
    if predict == LINEAR:
        return linear_comparison(target, model, record, band, background)
    if isinstance(target, Target):
        return target.comparison(model, record, options, band, background)
    if callable(target):
        return OfFunction(target, record)
    if isinstance(target, TimeSeries):
        target, record = sensors.recorded(target, model, record)
    regions, samples, sampling = recorded_network(target, model, record, options)
    if isinstance(target, TimeSeries):
        unit, baseline = mass.recordable()[record], _baseline(target, samples, sampling)
        if target.of is None:
            return OfSeries(target, record, unit, samples, regions, None, baseline)
        readout, unit = sensors.of_quantity(target.of, record, unit)
        target = dataclasses.replace(target, of=readout)
        return OfSeries(target, record, unit, samples, readout.shape[0], readout, baseline)
    if isinstance(target, Connectivity):
        return OfConnectivity(target, record, sampling, regions)
    return OfSpectra(target.band(*band), record, sampling, samples, band, background, regions)


def linear_comparison(target, model, record, band, background) -> Comparison:
    """How linear systems are compared with a target."""
    if isinstance(target, Target):
        return target.linear_comparison(model, record, band, background)
    if not (isinstance(target, PowerSpectrum) and isinstance(record, str)):
        raise not_linear(target)
    regions = recorded_regions(target, model, record)
    return OfDensities(target.band(*band), record, band, background, regions)


def _baseline(target: TimeSeries, samples: int, sampling: float) -> int:
    """Records of a series' baseline."""
    if target.baseline is None:
        return 0
    count = round(units.positive_time(target.baseline, u.second, "baseline") / sampling)
    if not 0 < count < samples:
        raise ValueError(
            f"'baseline' of {target.name} got {target.baseline}, but takes a part of the {samples} records, "
            f"{sampling:g} s apart"
        )
    return count


def recorded_network(target, model, record, options) -> tuple[int | None, int, float]:
    """The regions of what is recorded, or ``None`` of one mass, the records of a run, and seconds between them."""
    regions = recorded_regions(target, model, record)
    seconds = units.concrete(units.strip(options["dt"], u.second, "dt"), "dt")
    steps = recorded_steps(options["duration"], seconds, options["transient"])
    return regions, steps // options["every"], seconds * options["every"]


def recorded_regions(target, model, record) -> int | None:
    """The regions of what is recorded, or ``None`` of one mass."""
    network, mass = parts_of(model)
    if not isinstance(record, str):
        raise TypeError(f"'record' got {record!r}, but {name_of(target)} takes one name")
    check_name(record, mass.recordable(), "record")
    return network.regions_of(record) if network else None


def recorded_steps(duration, seconds: float, transient) -> int:
    """Steps of a run after its transient."""
    return units.steps_of(duration, seconds, "duration") - (
        0 if transient is None else units.steps_of(transient, seconds, "transient")
    )
