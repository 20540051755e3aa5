"""Several targets of one run: a spectrum and functional connectivity, or EEG and BOLD."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from ..models.base import check_name
from . import targets
from .targets import LINEAR, Comparison, Target, unchecked


@dataclasses.dataclass(frozen=True, eq=False)
class Joint(Target):
    """Several targets that one run is compared with.

    Attributes
    ----------
    targets : by a name of your own, each what `fit` takes alone but for a function; of as many spectra, series or
        matrices
    weights : of the names, positive; 1 where it has none
    name : for tables

    The error is ``sqrt(sum(w_i e_i**2) / sum(w_i))``, where ``e_i`` is the rms of the residuals of target i over its
    sigma: 0.1 in log10 power, and `TimeSeries.sigma`, `Connectivity.sigma` and so on. So an error of 1 is as far as
    the noise.

    Raises
    ------
    ValueError, TypeError : fewer than two targets; one that is none; weights that are not positive, or of other names
    """

    targets: Mapping[str, Any]
    weights: Mapping[str, float] | None = None
    name: str = "joint targets"

    def __post_init__(self):
        if not isinstance(self.targets, Mapping):
            raise TypeError(f"'targets' of {self.name} got {type(self.targets).__name__}, but takes a dict by name")
        if len(self.targets) < 2:
            raise ValueError(f"'targets' of {self.name} got {len(self.targets)}, but takes two or more")
        parts = {}
        for name, target in self.targets.items():
            if not isinstance(name, str):
                raise TypeError(f"'targets' of {self.name} got the name {name!r}, but takes words")
            if isinstance(target, Joint) or callable(target):
                what = "a Joint" if isinstance(target, Joint) else "a function"
                raise TypeError(f"the target {name!r} of {self.name} got {what}, but takes what has data of its own: "
                                "a PowerSpectrum, a TimeSeries, a Connectivity or a CrossSpectrum")  # fmt: skip
            parts[name] = targets.as_target(target)
        weights = dict(self.weights or {})
        for name, weight in weights.items():
            check_name(name, parts, f"target in 'weights' of {self.name}")
            if not (np.ndim(weight) == 0 and math.isfinite(weight) and weight > 0):
                raise ValueError(f"'weights' of {self.name} got {weight} for {name!r}, but takes a positive number")
        object.__setattr__(self, "targets", parts)
        object.__setattr__(self, "weights", {name: float(weights.get(name, 1.0)) for name in parts})

    def comparison(self, model, record, options, band, background):
        """How `fit` compares runs with it."""
        return self._compared(
            record, lambda each, own: targets.compare(each, model, own, options, band, background)
        )  # fmt: skip

    def linear_comparison(self, model, record, band, background):
        """With linear systems, of which each target has its own densities."""
        return self._compared(
            record, lambda each, own: targets.linear_comparison(each, model, own, band, background)
        )  # fmt: skip

    def _compared(self, record, compare) -> OfJoint:
        records = record if isinstance(record, Mapping) else dict.fromkeys(self.targets, record)
        for name in records:
            check_name(name, self.targets, "target in 'record'")
        if missing := [name for name in self.targets if name not in records]:
            raise ValueError(f"'record' names nothing for {missing[0]!r}, but takes what each target is compared with")
        return OfJoint(self, {name: compare(each, records[name]) for name, each in self.targets.items()})


class OfJoint(Comparison):
    """The comparisons of several targets, whose predictions and residuals follow each other."""

    def __init__(self, target: Joint, parts: Mapping[str, Comparison]):
        counts = {name: part.count for name, part in parts.items()}
        if len(set(counts.values())) > 1:
            got = ", ".join(f"{count} of {name!r}" for name, count in counts.items())
            raise ValueError(f"'targets' of {target.name} got {got}, but takes as many of each")
        self.parts, self.name, self.count = dict(parts), target.name, next(iter(counts.values()))
        self.target = dataclasses.replace(target, targets={name: part.target for name, part in parts.items()})
        self.data = tuple(part.data for part in parts.values())
        self.weights = [self.target.weights[name] for name in parts]  # pyright: ignore[reportOptionalSubscript]
        self.record = {name: part.settings["record"] for name, part in parts.items()}
        self.absent = sum(part.absent for part in parts.values())
        self.simulated = all(part.simulated for part in parts.values())
        self.settings = {
            "joint": {name: part.settings for name, part in parts.items()},
            "weights": dict(self.target.weights or {}),
            "record": self.record,
            **({} if self.simulated else {"predict": LINEAR}),
        }

    @property
    def parts_apart(self):
        return tuple(self.parts.values())

    def density(self, model, inputs, noise):
        return {name: part.density(model, inputs, noise) for name, part in self.parts.items()}

    @property
    def records(self):
        return {name: part.records for name, part in self.parts.items()}

    def axis_of(self, record):
        return self.parts[record].axis_of(record)

    def read(self):
        return OfJoint, tuple((name, part.read()) for name, part in self.parts.items()), tuple(self.weights)

    @property
    def width(self):
        return sum(part.width for part in self.parts.values())

    def copies(self, realisations):
        return max(part.copies(realisations) for part in self.parts.values())

    def predict(self, result):
        own = {
            name: {part.record: result[name]} if self.simulated else result[name] for name, part in self.parts.items()
        }
        every = [part.predict(own[name]) for name, part in self.parts.items()]
        return jnp.concatenate([x.reshape(*x.shape[:2], -1) for x in every], -1)

    def split(self, prediction) -> list[tuple[str, Comparison, Any]]:
        """The name, the comparison and the prediction of each target."""
        ends = np.cumsum([part.width for part in self.parts.values()])
        parts = (np if isinstance(prediction, np.ndarray) else jnp).split(prediction, ends[:-1], -1)
        return [(name, part, x) for (name, part), x in zip(self.parts.items(), parts, strict=True)]

    def residuals(self, prediction, data):
        residuals, nuisances = [], {}
        for (name, part, x), own, weight in zip(self.split(prediction), data, self.weights, strict=True):
            found, solved = part.residuals(x, own)
            filled = part.filled(own)
            if filled is not None:
                found = found * jnp.broadcast_to(filled.astype(found.dtype), found.shape)
            residuals.append(found * (math.sqrt(weight / found.shape[-1]) / part.sigma))
            nuisances |= {f"{name}.{n}": value for n, value in solved.items()}
        every = jnp.concatenate(residuals, -1)
        return every * math.sqrt(every.shape[-1] / sum(self.weights)), nuisances

    def like_target(self, prediction, nuisances, lane) -> Joint:
        every = {}
        for name, part, x in self.split(np.asarray(prediction)):
            every[name] = part.like_target(x, _own(nuisances, name), lane)
        return unchecked(Joint, targets=every, weights=self.target.weights)

    def nuisances_in_units(self, nuisances):
        found = {}
        for name, part in self.parts.items():
            own = part.nuisances_in_units(_own(nuisances, name))
            found |= {f"{name}.{n}": value for n, value in own.items()}
        return found

    def same(self, other):
        return (
            isinstance(other, Joint)
            and list(other.targets) == list(self.parts)
            and other.weights == self.target.weights
            and all(part.same(other.targets[name]) for name, part in self.parts.items())
        )


def _own(nuisances: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Those of one target, by their own names."""
    pairs = ((full.rpartition("."), value) for full, value in nuisances.items())
    return {own: value for (target, _, own), value in pairs if target == name}
