"""Data to fit: time series and functional connectivity, with how much noise is in them.

What a user makes; `comparisons` says how runs are compared with it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import brainunit as u
import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from .. import units
from ..readout import Readout
from ..rounding import at_rest

#: What is done with values that are NaN.
ERROR, MASK = "error", "mask"


@dataclasses.dataclass(frozen=True, eq=False)
class TimeSeries:
    """Recordings to fit sample by sample, such as evoked responses, of a mass, of regions or at sensors.

    Attributes
    ----------
    values : ``(K,)`` or ``(n, K)``, of a network ``(K, N)`` or ``(n, K, N)``: n targets of the K samples that a run
        records after its transient, in N channels, which are the regions or the sensors of ``of``. Plain numbers are
        in the unit of the record
    sigma : standard deviation of the noise in a sample, in the unit of the values, which weighs the data against
        priors; by default a tenth of the values' standard deviation. ``(N,)``, of each channel: then residuals count
        by it
    scale, offset : whether to solve for a gain and a constant of each target, as of an uncalibrated sensor
    name : for tables
    channels : the names of the N channels. At sensors that have names too they are matched by these, in any order, and
        sensors that are not among them are left out
    of : the `Readout` whose sensors the channels are, the same as ``record=`` of the fit; ``None``, there is none, or
        ``record=`` says which
    missing : of values that are NaN: "error", or "mask", they were not measured and do not count, such as those of a
        bad channel
    baseline : a time from the first record on, before a stimulus, whose mean is taken from each channel, both of the
        values and of the runs

    The error of a fit is relative to the standard deviation of the values: 1 explains nothing.

    Raises
    ------
    ValueError, TypeError : values that are not finite, with their channels; values that vary by rounding alone; a sigma
        that is not positive, or one of some channels; names that are doubled, or as many as there are no channels; a
        baseline that is no positive time
    """

    values: Any
    sigma: Any = None
    scale: bool = False
    offset: bool = False
    name: str = "time series"
    channels: Any = dataclasses.field(default=(), kw_only=True)
    of: Any = dataclasses.field(default=None, kw_only=True)
    missing: str = dataclasses.field(default=ERROR, kw_only=True)
    baseline: Any = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self):
        object.__setattr__(self, "values", addressable(self.values))
        values = _numbers(self.values, self.name)
        if self.missing not in (ERROR, MASK):
            raise ValueError(f"'missing' of {self.name} got {self.missing!r}, but takes 'error' or 'mask'")
        if self.of is not None and not isinstance(self.of, Readout):
            raise TypeError(f"'of' of {self.name} got {type(self.of).__name__}, but takes a Readout")
        object.__setattr__(self, "channels", self._channels(np.shape(values)))
        self._check_finite(values)
        plain = plain_array(self.values)[np.isfinite(values)]
        if values.ndim not in (1, 2, 3) or plain.size < 2 or at_rest(plain):
            spread = np.ptp(plain) if plain.size else 0.0
            raise ValueError(f"'values' of {self.name} got shape {values.shape} over a range of {spread:g}, but takes "
                             "(K,) or (n, K) values that vary by more than rounding")  # fmt: skip
        self._check_sigma(values.shape)
        if self.baseline is not None:
            units.positive_time(self.baseline, u.second, "baseline")

    def _channels(self, shape: tuple[int, ...]) -> tuple[str, ...]:
        """The names of the last axis."""
        if isinstance(self.channels, str | bytes):
            raise TypeError(f"'channels' of {self.name} got {self.channels!r}, but takes a name for each channel")
        names = tuple(map(str, () if self.channels is None else self.channels))
        if names and (len(shape) < 2 or shape[-1] != len(names)):
            raise ValueError(f"'channels' of {self.name} got {len(names)} names, but 'values' has shape {shape}, whose "
                             "last axis is the channels")  # fmt: skip
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"'channels' of {self.name} has {', '.join(twice)} more than once, so nothing is matched "
                             "by name")  # fmt: skip
        return names

    def _check_finite(self, values: np.ndarray) -> None:
        wrong = ~np.isfinite(values) if self.missing == ERROR else np.isinf(values)
        if not wrong.any():
            return
        where = ""
        if self.channels:
            which = np.flatnonzero(wrong.any(tuple(range(wrong.ndim - 1))))
            where = f", of {', '.join(self.channels[k] for k in which)}"
        remedy = "" if np.isinf(values).any() else "; missing='mask' says that NaN were not measured"
        raise ValueError(f"'values' of {self.name} got {np.sum(wrong)} values that are not finite{where}{remedy}")

    def _check_sigma(self, shape: tuple[int, ...]) -> None:
        if self.sigma is None:
            return
        sigma = np.asarray(u.get_magnitude(self.sigma), float)
        if not (np.isfinite(sigma).all() and np.min(sigma) > 0):
            raise ValueError(f"'sigma' of {self.name} got {self.sigma}, but takes a positive value")
        if sigma.ndim and (len(shape) < 2 or sigma.shape != shape[-1:]):
            raise ValueError(f"'sigma' of {self.name} got shape {sigma.shape}, but takes one number, or one for each "
                             f"channel, the last axis of 'values', which has shape {shape}")  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Connectivity:
    """Functional connectivity of a network to fit: correlations of its regions over time.

    Attributes
    ----------
    values : ``(N, N)`` or ``(n, N, N)``, symmetric; the diagonal does not count, and becomes 1 where it is not finite
    band : of the oscillation whose amplitudes are correlated (`spectra.envelope`), plain numbers are Hz; ``None``, the
        records are correlated, as for BOLD
    sigma : standard deviation of the noise in a correlation, which weighs the data against priors
    name : for tables

    Raises
    ------
    ValueError : another shape, values beyond -1 and 1, or not finite beside the diagonal
    """

    values: Any
    band: tuple[Any, Any] | None = None
    sigma: float = 0.1
    name: str = "functional connectivity"

    def __post_init__(self):
        object.__setattr__(self, "values", addressable(self.values))
        values = np.array(_numbers(self.values, self.name))
        if values.ndim not in (2, 3) or values.shape[-1] != values.shape[-2] or values.shape[-1] < 2:
            raise ValueError(f"'values' of {self.name} got shape {values.shape}, but takes (N, N) or (n, N, N) "
                             "correlations")  # fmt: skip
        masked = np.eye(values.shape[-1], dtype=bool) & ~np.isfinite(values)
        if masked.any():
            # A masked diagonal, or Fisher's z of 1.
            values[masked] = 1.0
            object.__setattr__(self, "values", values)
        if not np.isfinite(values).all():
            at = tuple(map(int, np.argwhere(~np.isfinite(values))[0]))
            raise ValueError(
                f"'values' of {self.name} got {values[at]:g} at {at}, {np.sum(~np.isfinite(values))} such beside the "
                "diagonal in all, but takes correlations that are finite"
            )
        if not (np.abs(values) <= 1.0 + 1e-6).all():
            raise ValueError(
                f"'values' of {self.name} got shape {values.shape} from {values.min():g} to {values.max():g}, but "
                "takes (N, N) or (n, N, N) correlations"
            )
        if not np.allclose(values, np.swapaxes(values, -1, -2), atol=1e-4):
            raise ValueError(f"'values' of {self.name} is not symmetric, as correlations are")


def unchecked(kind: type, **fields):
    """A prediction in the form of its target, unchecked: it may be at rest or have diverged."""
    defaults = {f.name: f.default for f in dataclasses.fields(kind)}
    prediction = object.__new__(kind)
    for name, value in (defaults | {"name": "fit"} | fields).items():
        object.__setattr__(prediction, name, value)
    return prediction


def on_host(tree) -> Any:
    """Arrays that lie on several devices as NumPy arrays; others stay."""
    tree = addressable(tree)
    spread = any(map(_on_several, jax.tree.leaves(tree)))
    return jax.tree.map(lambda x: np.asarray(x) if _on_several(x) else x, tree) if spread else tree


def _on_several(x) -> bool:
    return isinstance(x, jax.Array) and len(x.sharding.device_set) > 1


def addressable(tree) -> Any:
    """Arrays that several processes share as NumPy arrays, gathered; others stay. Every process has to call this."""
    shared = [isinstance(x, jax.Array) and not x.is_fully_addressable for x in jax.tree.leaves(tree)]
    if not any(shared):
        return tree
    leaves = zip(jax.tree.leaves(tree), shared)
    leaves = [process_allgather(x, tiled=True) if gathered else x for x, gathered in leaves]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def _numbers(values, of: str) -> np.ndarray:
    """Without a unit, in float64."""
    try:
        return np.asarray(u.get_magnitude(values), float)
    except (TypeError, ValueError) as error:
        raise TypeError(f"'values' of {of} got {type(values).__name__}, but takes an array of real numbers") from error


def plain_array(values) -> np.ndarray:
    """Without a unit, in the precision of the argument."""
    return np.asarray(u.get_magnitude(values))


def name_of(target) -> str:
    return getattr(target, "name", None) or getattr(target, "__name__", type(target).__name__)


def plain(value, unit, name: str):
    """A magnitude in ``unit``; a plain number is in it already."""
    return units.strip(value if isinstance(value, u.Quantity) else u.Quantity(value, unit=unit), unit, name)
