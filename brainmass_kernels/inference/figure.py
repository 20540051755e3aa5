"""The figure of a posterior: marginals and pairs in a triangle, and what the draws predict over the data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import brainunit as u
import jax
import numpy as np

from .. import display, plots, units
from ..fitting.cross import CrossSpectrum, coherency_of
from ..fitting.joint import Joint
from ..fitting.targets import OfFunction, TimeSeries
from ..spectra import PowerSpectrum
from .positions import Member

if TYPE_CHECKING:
    from .posterior import Posterior

_DATA, _DRAWS, _PRIOR = "#22262b", "#d1495b", "#9aa4af"
#: Most parameters whose pairs are readable on one page.
MOST = 8
#: Most dots of a pair, and draws whose predictions are the band.
_DOTS, _PREDICTIONS = 1500, 200
#: Most targets whose predictions are drawn.
_TARGETS = 4


def posterior_figure(posterior: Posterior):
    """Marginals on the diagonal with the prior in grey, pairs below, and the band of predictions beside.

    Returns
    -------
    matplotlib ``Figure``
    """
    names = list(posterior.columns)[:MOST]
    predictions = _predictions(posterior)
    side = 1.3 * len(names) + 1.2
    page = plots.empty_page(side + (4.6 if predictions else 0.0), max(side, 3.2))
    triangle: Any = page
    band: Any = None
    if predictions:
        triangle, band = page.subfigures(1, 2, width_ratios=[side, 4.6], squeeze=False)[0]
    _draw_triangle(triangle, posterior, names)
    if band is not None:
        for ax, band_of in zip(band.subplots(len(predictions), 1, squeeze=False)[:, 0], predictions):
            _draw_band(ax, posterior, band_of)
    (chains, draws), method = posterior.shape, posterior.settings["method"]
    page.suptitle(f"{chains} chains of {draws} draws by {method}", fontsize=9, x=0.01, ha="left")
    return page


# Marginals and pairs ------------------------------------------------------------------------------------------------


def _draw_triangle(page, posterior: Posterior, names: list[str]) -> None:
    axes = page.subplots(len(names), len(names), squeeze=False)
    values = {name: np.asarray(u.get_magnitude(posterior[name]), float) for name in names}
    every = np.linspace(0, next(iter(values.values())).size - 1, _DOTS).astype(int)
    for row, below in enumerate(names):
        for column, beside in enumerate(names):
            ax = axes[row, column]
            if column > row:
                ax.set_axis_off()
                continue
            if row == column:
                _marginal(ax, posterior, below, values[below])
            else:
                x, y = values[beside].ravel()[every], values[below].ravel()[every]
                ax.plot(x, y, ".", ms=1.2, alpha=0.4, color=_DRAWS, mew=0, rasterized=True)
            ax.set_xlim(*_limits(values[beside]))
            plots.style(ax)
            ax.tick_params(length=2.0, labelsize=6)
            ax.locator_params(nbins=3)
            _label(ax, posterior, names, row, column)


def _limits(values: np.ndarray) -> tuple[float, float]:
    """The same for all panels of a column."""
    margin = 0.04 * float(np.ptp(values)) or 1.0
    return float(values.min()) - margin, float(values.max()) + margin


def _label(ax, posterior: Posterior, names: list[str], row: int, column: int) -> None:
    if row == len(names) - 1:
        ax.set_xlabel(_with_unit(posterior, names[column]), fontsize=7)
    else:
        ax.set_xticklabels([])
    if row == column:
        ax.set_yticks([])
    elif column == 0:
        ax.set_ylabel(_with_unit(posterior, names[row]), fontsize=7)
    else:
        ax.set_yticklabels([])


def _with_unit(posterior: Posterior, name: str) -> str:
    return display.with_unit(name.removeprefix("likelihood."), units.unit_of(posterior[name]))


def _marginal(ax, posterior: Posterior, name: str, values: np.ndarray) -> None:
    """The histogram of each chain as a line, of all as an area, and the prior's density there."""
    edges = np.histogram_bin_edges(values, 24)
    ax.hist(values.ravel(), edges, density=True, color=_DRAWS, alpha=0.45)
    for chain in values:
        height, _ = np.histogram(chain, edges, density=True)
        ax.stairs(height, edges, color=_DRAWS, lw=0.3, alpha=0.6, baseline=None)
    if posterior.density is None:
        return
    at = (edges[1:] + edges[:-1]) / 2
    position = next(p for p in posterior.density.positions if p.name == name.partition("[")[0])
    if isinstance(position, Member):
        # Its prior depends on the group's mean and spread, whose own are drawn.
        return
    known = np.exp(np.asarray(position.prior.log_prob(at, position.low, position.high), float))
    ax.plot(at, known, color=_PRIOR, lw=1.2)


# Predictions --------------------------------------------------------------------------------------------------------


class Band(NamedTuple):
    """What draws predict of one target.

    Attributes
    ----------
    target : the data
    median : of the predictions
    edges : quantiles 5% and 95% of the predictions
    data : the same of data, with the noise that the likelihood expects
    number : of the target, 0 of one
    name : of the data, with the number where there are several
    """

    target: Any
    median: Any
    edges: Any
    data: Any
    number: int
    name: str


def _predictions(posterior: Posterior) -> list[Band]:
    density = posterior.density
    if density is None or isinstance(density.problem.comparison, OfFunction):
        return []
    both = [posterior.predict(_PREDICTIONS, key=key) for key in (None, jax.random.key(0))]
    several = density.subjects > 1
    bands = []
    for number, (plain, noisy) in enumerate(zip(*both) if several else [both]):
        if number == _TARGETS:
            break
        bands += _bands(density.problem.comparison.target, plain, noisy, number, several)
    return bands


def _bands(target, plain, noisy, number: int, several: bool) -> list[Band]:
    """Of one subject."""
    if isinstance(target, Joint):
        every = [(target.targets[name], plain.targets[name], noisy.targets[name]) for name in target.targets]
    else:
        every = [(target, plain, noisy)]
    bands = []
    for data, *both in every:
        low, median, high = _quantiles(both[0])
        least, _, most = _quantiles(both[1])
        name = f"{data.name} [{number}]" if several else data.name
        bands.append(Band(data, median, (low, high), (least, most), number, name))
    return bands


def _quantiles(many):
    return np.nanquantile(_shown(many), (0.05, 0.5, 0.95), 0)


def _shown(target) -> np.ndarray:
    """What is drawn of a target: of cross-spectra the coherence of the first two regions or sensors."""
    if isinstance(target, PowerSpectrum):
        return target.power
    if isinstance(target, CrossSpectrum):
        return np.abs(coherency_of(target.values)[..., 0, 1]) ** 2
    return np.asarray(u.get_magnitude(target.values), float)


def _draw_band(ax, posterior: Posterior, band: Band) -> None:
    target = band.target
    if isinstance(target, PowerSpectrum):
        x, labels = target.freqs, ("frequency (Hz)", "log10 power")
        values, *rest = (np.log10(y) for y in (target.power[band.number], band.median, *band.edges, *band.data))
        _over(ax, x, values, rest, band.name)
    elif isinstance(target, CrossSpectrum):
        labels = ("frequency (Hz)", "coherence of the first two")
        _over(ax, target.freqs, _shown(target)[band.number], [band.median, *band.edges, *band.data], band.name)
    elif isinstance(target, TimeSeries):
        x, labels = _times(posterior), ("time (s)", display.with_unit(target.name, units.unit_of(target.values)))
        values = np.asarray(u.get_magnitude(target.values))[band.number]
        # Of a network, its first region.
        first = [y if y.ndim == 1 else y[:, 0] for y in (values, band.median, *band.edges, *band.data)]
        _over(ax, x, first[0], first[1:], band.name)
    else:
        labels = (band.name, "predicted")
        _correlations(ax, band)
    ax.set_xlabel(labels[0], fontsize=8)
    ax.set_ylabel(labels[1], fontsize=8)
    plots.style(ax)
    ax.tick_params(length=2.0, labelsize=7)
    ax.legend(frameon=False, fontsize=7)


def _over(ax, x, values, lines, name: str) -> None:
    median, low, high, least, most = lines
    ax.fill_between(x, least, most, color=_DRAWS, alpha=0.15, lw=0, label="90% of new data")
    ax.fill_between(x, low, high, color=_DRAWS, alpha=0.45, lw=0, label="90% of predictions")
    ax.plot(x, median, color=_DRAWS, lw=1.0, label="their median")
    ax.plot(x, values, ".", color=_DATA, ms=3.0, mew=0, label=name)


def _times(posterior: Posterior) -> np.ndarray:
    problem = posterior.density.problem  # pyright: ignore[reportOptionalMemberAccess]
    count = np.shape(problem.comparison.target.values)[1]
    return problem.steps("transient") * problem.dt + problem.dt * problem.options["every"] * np.arange(1, count + 1)


def _correlations(ax, band: Band) -> None:
    """Each correlation against what is predicted of it."""
    values = np.asarray(band.target.values, float)
    above = np.triu_indices(values.shape[-1], 1)
    x, median = (values if values.ndim == 2 else values[band.number])[above], band.median[above]
    spread = np.abs(np.stack([median - band.edges[0][above], band.edges[1][above] - median]))
    ax.errorbar(x, median, spread, fmt=".", ms=3, lw=0.5, color=_DRAWS, label="90% of predictions")
    ax.plot([-1, 1], [-1, 1], color=_PRIOR, lw=0.8, label="equal")
    ax.set(xlim=(-1, 1), ylim=(-1, 1))
