"""Banks of simulations: draws from priors and the statistics of their runs, for inference without a likelihood."""

from __future__ import annotations

import dataclasses
import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import brainunit as u
import numpy as np

from .. import sweeps, units
from ..arguments import entries_of
from ..connectivity import FCD, Correlation, Covariance
from ..errors import check_counts
from ..interrupts import interruptible
from ..models.base import Model
from ..network import Network, parts_of
from ..notices import warn
from ..sweep_files import Stored
from ..sweep_results import Sweep, SweepPart
from .draws import DRAW, MOST, draws_of

# In what a file says of itself: whether each pair of a symmetric matrix is a column, and each row with itself.
_PAIRS = "pairs"


@dataclasses.dataclass(frozen=True)
class SimulationBank:
    """Draws from priors and the statistics of their runs, made by `simulation_bank`.

    Attributes
    ----------
    runs : the bank as a `Sweep` over the numbers of its draws
    """

    runs: Sweep

    def __post_init__(self):
        if _PAIRS not in self.runs.about:
            raise ValueError("it is a sweep over a grid, and no bank of draws from priors")

    @property
    def n(self) -> int:
        """The number of draws."""
        return self.runs.shape[0]

    @property
    def about(self) -> dict[str, Any]:
        """Model, priors, seed, settings, versions, and how it ran."""
        return self.runs.about

    @property
    def ok(self) -> np.ndarray:
        """``(n,)``, which draws stayed finite; the statistics of the others are NaN."""
        return np.asarray(self.runs.ok)

    @property
    def parameters(self) -> Mapping[str, Any]:
        """The values of each parameter, ``(n,)``, with their units. Those in a ``.zarr`` are read when asked for."""
        return _DrawsFirst(self.runs, tuple(self.about["priors"]))

    @property
    def statistics(self) -> Mapping[str, Any]:
        """Each statistic, ``(n, ...)``, with its unit: then its own axis, such as frequencies, then regions.

        Those in a ``.zarr`` are read when asked for.
        """
        return _DrawsFirst(self.runs, tuple(n for n in self.runs.records if n not in self.about["priors"]))

    @property
    def statistic_axes(self) -> dict[str, Any]:
        """The values of a statistic's own axis, by name, such as the frequencies of a spectrum."""
        return self.runs.record_axes

    @property
    def columns(self) -> tuple[list[str], list[str]]:
        """The names of the columns of both matrices of `arrays`, such as ``"eeg_spectrum[10 Hz]"``."""
        return list(self.parameters), [n for name in self.statistics for n in self._columns(name)]

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """The draws that stayed finite as matrices for a neural estimator.

        Returns
        -------
        Parameters ``(m, parameters)`` in the units of their priors, and statistics ``(m, columns)``, in float32. Their
        columns are those of `columns`; of a symmetric matrix each pair of regions is one. Draws that are not `ok` are
        left out. So are draws with a statistic that is NaN though the run is finite, with a warning that names it

        Raises
        ------
        ValueError : no draw is left
        """
        keep, x = self.ok.copy(), []
        for name, values in self.statistics.items():
            flat = self._flat(name, np.asarray(u.get_magnitude(values), np.float32))
            without = ~np.isfinite(flat).all(1) & self.ok
            if without.any():
                warn(f"{without.sum():,} of {self.n:,} draws are left out, as {name} of their finite runs is not")
            keep &= ~without
            x.append(flat)
        if not keep.any():
            raise ValueError(f"none of the {self.n:,} draws of this bank has finite statistics")
        theta = [np.asarray(u.get_magnitude(values), np.float32) for values in self.parameters.values()]
        return np.stack(theta, 1)[keep], np.concatenate(x, 1)[keep]

    def _flat(self, name: str, values: np.ndarray) -> np.ndarray:
        """The columns of one statistic, ``(n, columns)``."""
        if name in self.about[_PAIRS]:
            return values[:, *np.triu_indices(values.shape[-1], self.about[_PAIRS][name])]
        return values.reshape(len(values), -1)

    def _columns(self, name: str) -> list[str]:
        shape, axes = _shape(self.runs, name)[1:], []
        if name in self.about[_PAIRS]:
            pairs = zip(*np.triu_indices(shape[-1], self.about[_PAIRS][name]), strict=True)
            return [f"{name}[{i}, {j}]" for i, j in pairs]
        if name in self.statistic_axes:
            axis = self.statistic_axes[name]
            unit = "" if units.unit_of(axis).is_unitless else f" {units.unit_of(axis)}"
            axes.append([f"{x:g}{unit}" for x in np.asarray(u.get_magnitude(axis))])
        axes += [map(str, range(size)) for size in shape[len(axes) :]]
        return [f"{name}[{', '.join(place)}]" if place else name for place in itertools.product(*axes)]

    def save(self, path: str | os.PathLike) -> None:
        """Write it as ``.npz``, ``.nc`` or ``.zarr``, whole or not at all."""
        self.runs.save(path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> SimulationBank:
        """Read a bank; of a ``.zarr`` that `simulation_bank` wrote, what is asked for, when it is.

        Raises
        ------
        FileNotFoundError, ValueError : there is no such file, or it is no bank, or damaged
        """
        runs = Sweep.load(path)
        try:
            return cls(runs)
        except ValueError as error:
            raise ValueError(f"'path' got {os.fspath(path)}, but {error}") from None

    def to_xarray(self):
        """The bank as an ``xarray.Dataset`` over its draws."""
        return self.runs.to_xarray()

    def __repr__(self) -> str:
        bad = int((~self.ok).sum())
        names = f"{', '.join(self.parameters)} -> {', '.join(self.statistics)}"
        return f"SimulationBank({self.n:,} draws: {names}{f'; {bad:,} did not stay finite' if bad else ''})"


@dataclasses.dataclass(frozen=True)
class _DrawsFirst(Mapping[str, Any]):
    """Some records of a bank, with the draws as their first axis."""

    runs: Sweep
    names: tuple[str, ...]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, name: str):
        if name not in self.names:
            raise KeyError(name)
        x = self.runs[name]
        if name not in self.runs.record_axes:
            return x
        return units.attach(np.moveaxis(np.asarray(u.get_magnitude(x)), 1, 0), units.unit_of(x))

    def __repr__(self) -> str:
        return f"{{{', '.join(f'{name}: {_shape(self.runs, name)}' for name in self.names)}}}"


def _shape(runs: Sweep, name: str) -> tuple[int, ...]:
    """Of a record with the draws first; nothing is read."""
    records = runs.records
    shape = records.unit_and_shape(name)[1] if isinstance(records, Stored) else np.shape(u.get_magnitude(records[name]))
    return (shape[1], shape[0], *shape[2:]) if name in runs.record_axes else tuple(shape)


@interruptible
def simulation_bank(
    model: Model | Network,
    priors: Mapping[str, Any],
    statistics,
    *,
    n: int,
    duration,
    dt,
    out: str | os.PathLike | None = None,
    free: Mapping[str, Any] | None = None,
    seed: int = 0,
    key=None,
    chunk: int | None = None,
    progress: bool | Callable[[str], None] = False,
    part: tuple[int, int] | None = None,
    client=None,
    **arguments,
) -> SimulationBank | SweepPart:
    """Simulate draws from priors and keep their statistics, for simulation-based inference; in bounded memory.

    The draws are quantiles of the priors at scrambled Sobol points, which cover them more evenly than random numbers
    do. A killed call goes on where it was, and gives the same bank, bit for bit on one kind of machine.

    Parameters
    ----------
    model : its parameters are numbers; or a `Network`, each draw of which has one value of a parameter for all regions
    priors : parameter, input, noise intensity (``"noise.E_inp"``), constant of a coupling (``"coupling.k"``) or of a
        stimulus (``"E_inp.onset"``) to one of `bk.priors`, with units
    statistics : what is kept of each run, as ``record`` of `simulate`: ``[bk.Spectrum(freqs), bk.Variance()]``,
        ``bk.Correlation()``, or short series, as ``"eeg"``
    n : the number of draws; a power of 2 makes the most of Sobol points
    duration, dt : as in `simulate`
    out : a file, ``.npz``, ``.nc`` or ``.zarr``; into a ``.zarr`` chunks are written one by one, so that no more than
        a chunk is in memory. A file of the same bank is read and nothing is run
    free : name to (low, high), where a prior is cut off and normalised; without a prior a parameter is uniform there
    seed : scrambles the Sobol points
    key : a JAX random key, for noise. Draw ``i`` has the noise of ``jax.random.fold_in(key, i)``, and region ``j`` of a
        network that of ``j`` folded into this: noise of its own, whatever the chunks
    chunk, progress, part, client : as in `sweep`; those who do parts share ``out``
    **arguments : of `simulate`: ``inputs``, ``noise``, ``initial``, ``every``, ``transient``, ``scheme``, ...

    Returns
    -------
    `SimulationBank`; or a `SweepPart`, which says how many chunks are there, while other parts are missing

    Raises
    ------
    ValueError, TypeError : naming the argument: ``n`` below 1, an unknown parameter or statistic, a prior without its
        unit, an ending of ``out`` that is none of the three, an ``out`` that holds something else

    Sobol 1967, USSR Computational Mathematics and Mathematical Physics 7:86-112. Cranmer, Brehmer and Louppe 2020,
    PNAS 117:30055-30062.
    """
    began = time.perf_counter()
    check_counts(1, n=n)
    check_counts(0, seed=seed)
    if n > MOST:
        raise ValueError(f"'n' got {n:,}, but takes at most {MOST:,}, the Sobol points that there are")
    draws = draws_of(model, priors, free or {}, arguments.get("inputs"), int(n), int(seed))
    entries = _entries(model, statistics)
    sweeps.check_names(draws, entries, "'statistics' and 'priors' take")
    for name, what in (*((name, "a parameter") for name in draws.names), (DRAW, "the axis of the draws")):
        if name in entries:
            raise ValueError(f"'statistics' got the name {name!r} of {what}: give a dict with another name")
    if "record" in arguments:
        raise TypeError("'record' is not an argument of simulation_bank: it is called 'statistics'")
    draws = dataclasses.replace(draws, notes={_PAIRS: _pairs(entries)})
    found = sweeps.at_points(
        model, draws, {"duration": duration, "dt": dt, "record": statistics, **arguments}, out=out, chunk=chunk,
        key=key, progress=progress, part=part, client=client, replace=False,
    )  # fmt: skip
    if isinstance(found, SweepPart):
        return found
    bank = SimulationBank(dataclasses.replace(found, seconds=time.perf_counter() - began))
    if bad := int((~bank.ok).sum()):
        warn(
            f"{bad:,} of {n:,} draws did not stay finite (bank.ok says which): bank.arrays() leaves them out. Take a "
            "shorter dt, another scheme, or narrower priors"
        )
    return bank


def _entries(model: Model | Network, statistics) -> dict[str, Any]:
    """What is recorded, by name."""
    if statistics is None:
        raise TypeError("'statistics' got None, but takes names, and statistics such as bk.Spectrum(freqs)")
    try:
        return dict(entries_of(parts_of(model)[1], statistics))
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("'record'", "'statistics'")) from None


def _pairs(entries: Mapping[str, Any]) -> dict[str, int]:
    """The symmetric matrices, and where their columns begin: 1 beside a diagonal that says nothing, 0 with it."""
    return {n: int(isinstance(x, (Correlation, FCD))) for n, x in entries.items() if isinstance(x, (Covariance, FCD))}
