"""Figures of results, fits, sweeps and benchmarks, in one style.

They import matplotlib when drawn, and do not change its backend.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import brainunit as u
import numpy as np

from . import files, frames
from .extras import needs
from .fitting.joint import Joint
from .fitting.targets import Connectivity, TimeSeries
from .recording import Reduction
from .spectra import PowerSpectrum, alpha_peak

if TYPE_CHECKING:
    from .bench import Measured, Point, Rival
    from .fitting.result import Fit
    from .result import Result
    from .sweep_results import Sweep

_TARGET, _START, _FIT, _FAINT = "#22262b", "#9aa4af", "#d1495b", "#e6e9ed"
_POWER = "log10 power"
#: Most panels that are readable on one page.
MAX_PANELS = 25
#: Most lanes of a result that are drawn.
MAX_LANES = 8
#: Decades of power that a spectrum shows below its highest point.
_DECADES = 8.0
#: What `result_figure` can draw.
KINDS = ("traces", "spectrum", "states")


def save(page, path) -> None:
    """Write a figure, whole or not at all; a name without an ending gets matplotlib's default."""
    path = Path(path)
    if not path.suffix:
        path = path.with_name(f"{path.name}.{needs('matplotlib').rcParams['savefig.format']}")
    known = page.canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        raise ValueError(f"'path' got {path}, but takes the name of a format of matplotlib: .{', .'.join(known)}")
    with files.replacing(path) as aside:
        page.savefig(aside)


def shown(page, path=None):
    """A figure, written to ``path`` if there is one."""
    if path is not None:
        save(page, path)
    return page


def figure(fit: Fit, *, which=None):
    """Target, start and fit, one panel a target: log power against frequency with the alpha peaks marked, series over
    time, matrices of connectivity beside each other, or for a user's function the errors over the steps.

    Parameters
    ----------
    fit : a `Fit`
    which : the targets to show, by number from 0; by default the first 25

    Returns
    -------
    matplotlib ``Figure``; write it with ``figure(fit).savefig(path)``

    Raises
    ------
    ImportError
        without matplotlib
    ValueError
        for a target that the fit does not have
    """
    count = fit.losses.shape[1]
    shown = list(range(min(count, MAX_PANELS)) if which is None else which)
    wrong = [i for i in shown if not 0 <= i < count]
    if wrong or not shown:
        raise ValueError(f"'which' got {which}, but takes numbers from 0 to {count - 1}")
    views = _views(fit)
    sizes = [_size(view, len(shown)) for view in views]
    page = empty_page(max(width for width, _ in sizes), sum(height for _, height in sizes))
    places: Any = [page]
    if len(views) > 1:
        places = page.subfigures(len(views), 1, height_ratios=[height for _, height in sizes])
    for place, view in zip(places, views, strict=True):
        (_draw_spectra if isinstance(view.target, PowerSpectrum) else _draw_others)(place, view, shown)
    return page


def _views(fit: Fit) -> list[Fit]:
    """A fit of joint targets as one of each."""
    if not isinstance(fit.target, Joint):
        return [fit]
    views = []
    for name, target in fit.target.targets.items():
        settings = fit.settings | {"record": fit.settings["record"][name]}
        found = {key: getattr(fit, key).targets[name] for key in ("prediction", "initial_prediction")}
        views.append(dataclasses.replace(fit, target=target, settings=settings, **found))
    return views


def _grid(panels: int) -> tuple[int, int]:
    """Rows and columns of panels."""
    columns = math.ceil(math.sqrt(panels))
    return math.ceil(panels / columns), columns


def _size(fit: Fit, panels: int) -> tuple[float, float]:
    """Width and height of the panels of so many targets."""
    if isinstance(fit.target, PowerSpectrum):
        rows, columns = _grid(panels)
        return (6.8, 4.4) if panels == 1 else (2.5 * columns + 0.6, 2.0 * rows + 0.9)
    return (8.4, 2.6 * panels + 0.4) if isinstance(fit.target, Connectivity) else (6.8, 1.9 * panels + 1.4)


def _draw_spectra(page, fit: Fit, shown: Sequence[int]) -> None:
    rows, columns = _grid(len(shown))
    axes = np.asarray(page.subplots(rows, columns, sharex=True, squeeze=False)).ravel()
    for ax, i in zip(axes, shown):
        _panel(ax, fit, i, alone=len(shown) == 1)
    for ax in axes[len(shown) :]:
        ax.set_axis_off()
    if len(shown) > 1:
        _share_labels(page, fit, axes[0])


def empty_page(width: float, height: float):
    """An empty figure."""
    needs("matplotlib.figure")
    from .page import Figure

    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def style(ax):
    ax.grid(color=_FAINT, lw=0.6)
    ax.spines[["top", "right"]].set_visible(False)


def _panel(ax, fit: Fit, i: int, *, alone: bool):
    width = 1.9 if alone else 1.3
    _curve(ax, fit.target, i, "target", color=_TARGET, lw=width)
    label = f"start, rms {fit.initial_rms[i]:.3f}" if alone else "start"
    _curve(ax, fit.initial_spectrum, i, label, color=_START, lw=width * 0.75, ls=(0, (4, 2)))
    _curve(ax, fit.spectrum, i, f"fit, rms {fit.rms[i]:.3f}" if alone else "fit", color=_FIT, lw=width)
    top = _mark_peak(ax, fit.target, i, _TARGET, filled=False)
    top = max(top, _mark_peak(ax, fit.spectrum, i, _FIT, filled=True))
    levels = [np.log10(s.power[i]) for s in (fit.target, fit.spectrum)]
    low, high = min(level.min() for level in levels), max(max(level.max() for level in levels), top)
    ax.set_ylim(low - 0.12 * (high - low), high + 0.14 * (high - low))
    ax.set_xlim(fit.target.freqs[0], fit.target.freqs[-1])
    style(ax)
    ax.set_axisbelow(True)
    ax.tick_params(length=2.5, labelsize=9 if alone else 7)
    if alone:
        _dress(ax, fit, i)
    else:
        ax.set_title(f"{i + 1}:  rms {fit.rms[i]:.2f}", fontsize=8, loc="left", pad=2)


def _draw_others(page, fit: Fit, shown: Sequence[int]) -> None:
    matrices = isinstance(fit.target, Connectivity)
    panels = page.subplots(len(shown), 3 if matrices else 1, squeeze=False)
    if matrices:
        trio = {"target": fit.target, "start": fit.initial_prediction, "fit": fit.prediction}
        for row, i in zip(panels, shown):
            for ax, (label, matrices_of) in zip(row, trio.items()):
                values = np.asarray(matrices_of.values)
                drawn = ax.imshow(values if values.ndim == 2 else values[i], vmin=-1, vmax=1, cmap="RdBu_r")
                ax.set_title(label if label != "fit" else f"fit, rms {fit.rms[i]:.3f}", fontsize=9)
                ax.tick_params(length=2.5, labelsize=7)
        page.colorbar(drawn, ax=panels, shrink=0.8, label="correlation")
    else:
        for ax, i in zip(panels[:, 0], shown):
            _over_time(ax, fit, i) if isinstance(fit.target, TimeSeries) else _over_steps(ax, fit, i)
            style(ax)
            ax.legend(frameon=False, fontsize=8, loc="upper right")
    page.suptitle(f"{fit.settings['model']} fitted to {fit.name}", fontsize=10, x=0.01, ha="left")


def _over_time(ax, fit: Fit, i: int):
    """The target, start and fit of one series; of a network, its first region or sensor that was measured."""
    step = fit.settings["dt"] * fit.settings["every"]
    unit = u.get_unit(fit.target.values)
    styles = {"target": {"color": _TARGET}, "start": {"color": _START, "ls": (0, (4, 2))}, "fit": {"color": _FIT}}
    measured = np.isfinite(np.asarray(u.get_magnitude(fit.target.values))[i])
    channel = None if measured.ndim == 1 else int(measured.any(0).argmax())
    for (label, style), series in zip(styles.items(), (fit.target, fit.initial_prediction, fit.prediction)):
        values = np.asarray(u.get_magnitude(series.values))[i]
        values = values if channel is None else values[:, channel]
        ts = fit.settings["transient"] + step * np.arange(1, len(values) + 1)
        ax.plot(ts, values, lw=1.4, label=label, **style)
    name, channels = fit.settings["record"], fit.target.channels
    name = name if channel is None or not channels else f"{name} at {channels[channel]}"
    label = name if unit.is_unitless else f"{name} ({unit})"
    ax.set(xlabel="time (s)", ylabel=label, title=f"{i + 1}:  rms {fit.rms[i]:.3g} of the target's own")
    ax.title.set_fontsize(9)


def steps_figure(fit: Fit):
    """The error over the steps: of one target each start, of several the best start of each.

    Returns
    -------
    matplotlib ``Figure``
    """
    page = empty_page(6.8, 3.0)
    ax = page.subplots()
    if len(fit.rms) == 1:
        _over_steps(ax, fit, 0)
        page.legend(frameon=False, fontsize=8, loc="outside upper right")
    else:
        ax.plot(np.take_along_axis(fit.losses, fit.best_start[None, :, None], 2)[..., 0], color=_FIT, lw=0.8, alpha=0.6)
        ax.set(xlabel="step", ylabel="error of the best start")
    ax.xaxis.get_major_locator().set_params(integer=True)  # pyright: ignore[reportCallIssue]
    style(ax)
    return page


def _over_steps(ax, fit: Fit, i: int):
    ax.plot(fit.losses[:, i], color=_START, lw=0.8)
    ax.plot(fit.losses[:, i, fit.best_start[i]], color=_FIT, lw=1.8, label=f"best start, {fit.rms[i]:.4g}")
    ax.set(xlabel="step", ylabel="error")


def _dress(ax, fit: Fit, i: int):
    wanted, fitted = (alpha_peak(s.freqs, s.power)[i] for s in (fit.target, fit.spectrum))
    ax.set(xlabel="frequency (Hz)", ylabel=_POWER)
    ax.legend(frameon=False, fontsize=9, loc="upper right")
    ax.set_title(f"{type(fit.model).__name__} fitted to {fit.target.name}", fontsize=11, loc="left")
    text = f"alpha peak {wanted:.1f} Hz, fitted {fitted:.1f} Hz"
    ax.text(0.985, 0.74, text, transform=ax.transAxes, ha="right", va="top", fontsize=8.5, color="#5b6570")


def _curve(ax, spectrum: PowerSpectrum, i: int, label: str, **style: Any):
    ax.plot(spectrum.freqs, np.log10(spectrum.power[i]), label=label, solid_capstyle="round", **style)


def _mark_peak(ax, spectrum: PowerSpectrum, i: int, color: str, *, filled: bool) -> float:
    """Draw a dot at the alpha peak, if there is one; returns the log power there."""
    peak = alpha_peak(spectrum.freqs, spectrum.power)[i]
    if np.isnan(peak):
        return -math.inf
    level = float(np.interp(peak, spectrum.freqs, np.log10(spectrum.power[i])))
    ax.plot(peak, level, "o", ms=5.5, color=color if filled else "white", mec="white" if filled else color, zorder=3)
    return level


def _share_labels(page, fit: Fit, first):
    page.supxlabel("frequency (Hz)", fontsize=9)
    page.supylabel(_POWER, fontsize=9)
    handles, labels = first.get_legend_handles_labels()
    page.legend(handles, labels, frameon=False, fontsize=9, ncols=3, loc="outside upper right")
    page.suptitle(f"{type(fit.model).__name__} fitted to {fit.target.name}", fontsize=10, x=0.01, ha="left")


def speed_figure(measured: Sequence[Measured], points: Sequence[Point], rivals: Sequence[Rival] = ()):
    """Mass-steps a second over the number of masses, and error over time for each scheme.

    Parameters
    ----------
    measured : of `bench.measure`; the forward runs without noise are drawn
    points : of `bench.work_precision`; brainmass's default, exp_euler at 0.1 ms, has a ring
    rivals : of `bench.against_brainmass`

    Returns
    -------
    matplotlib ``Figure``
    """
    page = empty_page(9.6, 4.2)
    speed, work = page.subplots(1, 2)
    forward = [m for m in measured if not m.case.gradient and not m.case.noisy]
    lanes = [m.case.lanes for m in forward]
    ran = ", ".join(dict.fromkeys(m.implementation for m in forward))
    speed.loglog(lanes, [m.rate for m in forward], "o-", color=_FIT, label=f"fused {forward[0].case.scheme} ({ran})")
    plain = [m.rate / m.ratio for m in forward]
    speed.loglog(lanes, plain, "o--", color=_START, label="plain lax.scan")
    for name in dict.fromkeys(r.name for r in rivals):
        runs = [r for r in rivals if r.name == name]
        speed.loglog([r.case.lanes for r in runs], [r.rate for r in runs], "o:", ms=4, label=f"brainmass: {name}")
    speed.set(xlabel="masses", ylabel="mass-steps a second", title="speed")
    for scheme in dict.fromkeys(p.scheme for p in points):
        runs = [p for p in points if p.scheme == scheme]
        work.loglog([p.seconds for p in runs], [p.rms for p in runs], "o-", ms=4, label=scheme)
    for p in points:
        if (p.scheme, p.dt_ms) == ("exp_euler", 0.1):
            work.plot(p.seconds, p.rms, "o", ms=12, mfc="none", mec=_TARGET, label="brainmass's setting")
    work.set(xlabel="seconds for one second of simulation", ylabel="rms error (mV)", title="error over time")
    for ax in (speed, work):
        style(ax)
        ax.legend(frameon=False, fontsize=8)
    return page


def sweep_figure(sweep: Sweep):
    """The records of a sweep with one value a mass: heat maps over two parameters, or curves over one.

    The minimum and the maximum, if both were recorded, are drawn as the amplitude, their difference. Points that
    diverged are blank, as is the peak frequency where the amplitude is next to zero.

    Returns
    -------
    matplotlib ``Figure``

    Raises
    ------
    ValueError
        for a grid of more than two parameters, or without a record of one value a mass
    """
    if reason := unfit_for_a_picture(sweep):
        raise ValueError(f"'sweep' has {reason}")
    shown = _maps(sweep)
    flat = len(sweep.axes) == 1
    columns = 1 if flat else min(3, len(shown))
    rows = math.ceil(len(shown) / columns)
    size = (6.4, 1.9 * rows + 0.6) if flat else (3.9 * columns + 0.4, 3.4 * rows + 0.3)
    page = empty_page(*size)
    panels = np.asarray(page.subplots(rows, columns, sharex=True, squeeze=False)).ravel()
    axes = [(frames.labelled(name, x), np.asarray(u.get_magnitude(x))) for name, x in sweep.axes.items()]
    for ax, (title, values) in zip(panels, shown.items()):
        values = np.asarray(u.get_magnitude(values))
        if flat:
            ax.plot(axes[0][1], values, color=_FIT, lw=1.6)
            ax.set_ylabel(title)
            style(ax)
        else:
            # The first parameter upwards, the second to the right, like rows and columns of the records.
            drawn = ax.pcolormesh(axes[1][1], axes[0][1], values, cmap="viridis", shading="nearest", rasterized=True)
            page.colorbar(drawn, ax=ax, label=title)
            ax.set_ylabel(axes[0][0])
        ax.tick_params(length=2.5, labelsize=8)
        if np.isnan(values).all():
            ax.text(0.5, 0.5, "NaN throughout", transform=ax.transAxes, ha="center", fontsize=9, color=_START)
    for ax in panels[: len(shown)][-columns:]:
        ax.set_xlabel(axes[-1][0])
    for ax in panels[len(shown) :]:
        ax.set_axis_off()
    title = f"{sweep.about['model']}, {sweep.about['masses']:,} masses of {sweep.about['duration']}"
    page.suptitle(title, fontsize=10, x=0.01, ha="left")
    return page


def unfit_for_a_picture(sweep: Sweep) -> str | None:
    """What a sweep has that `sweep_figure` cannot show, or ``None``."""
    if len(sweep.axes) > 2:
        return f"{len(sweep.axes)} parameters, and a picture shows one or two"
    if all(name in sweep.record_axes for name in sweep.records):
        return f"no record with one value a mass, only {', '.join(sweep.records)}"
    return None


def _maps(sweep: Sweep) -> dict[str, Any]:
    """Records with one value a mass, by their labels."""
    plain = {n: _blank(x, ~np.asarray(sweep.ok)) for n, x in sweep.records.items() if n not in sweep.record_axes}
    for name in [n.removesuffix("_maximum") for n in plain if n.endswith("_maximum")]:
        if f"{name}_minimum" in plain:
            amplitude = plain.pop(f"{name}_maximum") - plain.pop(f"{name}_minimum")
            plain[f"{name}_amplitude"] = amplitude
            if (peak := f"{name}_peak_frequency") in plain:
                height = np.asarray(u.get_magnitude(amplitude))
                plain[peak] = _blank(plain[peak], height < 0.01 * np.max(height, initial=0.0, where=height == height))
    return {_labelled(n, x): x for n, x in plain.items()}


def _blank(values, where):
    """Values with NaN in some places, which stay blank in a picture."""
    return np.where(where, np.nan, u.get_magnitude(values)) * u.get_unit(values)


def _labelled(name: str, value) -> str:
    return frames.labelled(name.replace("_", " "), value)


# Results ------------------------------------------------------------------------------------------------------------


def result_figure(result: Result, kind: str | None = None):
    """Traces over time, the spectrum of the first record, and its state space with the second; statistics.

    Parameters
    ----------
    result : of a run; of more than eight lanes eight are drawn, evenly spaced
    kind : one of `KINDS`, or ``None`` for all that was recorded

    Returns
    -------
    matplotlib ``Figure``

    Raises
    ------
    ValueError
        for another kind, or if nothing was recorded that it shows
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"'kind' got {kind!r}, but takes {', '.join(map(repr, KINDS))}, or None for all")
    over_time = [n for n in result if frames.is_over_time(result, n)]
    statistics = [n for n in result if n not in over_time and kind is None]
    left = [*(over_time if kind in (None, "traces") else []), *statistics][:MAX_PANELS]
    right: list[Any] = []
    if over_time and result.times.count >= 4 and kind in (None, "spectrum"):
        right.append(_spectra_of_lanes)
    alike = len(over_time) > 1 and len({np.shape(result[n]) for n in over_time[:2]}) == 1
    if alike and kind in (None, "states"):
        right.append(_state_space)
    if not left and not right:
        needed = "two records over time" if kind == "states" else "a record over time, of four or more for a spectrum"
        recorded = ", ".join(result) or "nothing"
        raise ValueError(f"'kind' got {kind!r}, which takes {needed}, but the run recorded {recorded}")
    lanes = _Lanes(result)
    widths = [*([2.2] if left else []), *([1.3] if right else [])]
    page = empty_page(max(3.0 * sum(widths), 5.4), max(1.5 * len(left), 2.1 * len(right), 2.6) + 0.9)
    sides = page.subfigures(1, len(widths), width_ratios=widths, squeeze=False)[0]
    for ax, name in zip(_column(sides[0], len(left)), left):
        _record(ax, result, name, lanes.of(name))
    for ax, draw in zip(_column(sides[-1], len(right)), right):
        draw(ax, result, over_time, lanes)
    for ax in page.axes:
        style(ax)
        ax.tick_params(length=2.5, labelsize=8)
    _name_lanes(page, result, lanes)
    return page


def _column(side, count: int):
    """Panels one above the other."""
    return side.subplots(count, 1, squeeze=False)[:, 0] if count else ()


class _Lanes:
    """The lanes that are drawn, their colours and their labels."""

    def __init__(self, result: Result, name: str | None = None):
        self.result, self.name = result, name
        of_each = {} if name is None else frames.record_axes(result, None)[name]
        first = dict([frames.first_axes(result)[name]]) if name in result.axes else {}
        axes = {n: x for n, x in of_each.items() if n not in first} or frames.lane_axes(result, None)
        shape = tuple(map(len, axes.values()))
        self.count, self.at = math.prod(shape), frames.time_axis(result)
        self.numbers = np.unique(np.linspace(0, max(self.count - 1, 0), min(self.count, MAX_LANES)).round().astype(int))
        places = np.unravel_index(self.numbers, shape) if shape else ()
        kind = next(iter(axes)) if len(axes) == 1 else "lane"
        labels = [[values[i] for i in place] for values, place in zip(axes.values(), places)]
        self.labels = [f"{kind} {', '.join(str(each[k]) for each in labels)}" for k in range(len(self.numbers))]
        colours = needs("matplotlib").colormaps["viridis"](np.linspace(0.05, 0.85, len(self.numbers)))
        self.colours = [_FIT] if self.count == 1 else list(colours)

    def of(self, name: str) -> _Lanes:
        """The lanes of a record, which are sensors if it is of these."""
        named = frames.record_axes(self.result, None)[name]
        return self if {*frames.lane_axes(self.result, None)} <= {*named} else _Lanes(self.result, name)

    def rows(self, x, has_axis: bool) -> np.ndarray:
        """The drawn lanes of a record, ``(lanes, K)``, or all of them, ``(lanes,)``."""
        x = np.asarray(u.get_magnitude(x))
        if not has_axis:
            return x.reshape(-1)
        x = np.moveaxis(x, self.at, 0)
        return x.reshape(len(x), -1)[:, self.numbers].T

    def draw(self, ax, xs, ys, **style: Any):
        for x, y, colour in zip(xs, ys, self.colours):
            ax.plot(x, y, color=colour, **{"lw": 1.1 if self.count > 1 else 1.4, **style})


def _record(ax, result: Result, name: str, lanes: _Lanes):
    """One record: over time, over its own axis, or one value a lane."""
    axis = result.axes.get(name)
    if name in result.statistics and isinstance(what := result.statistics[name][0], Reduction) and what.across:
        _matrix(ax, result, name)
        return
    values = lanes.rows(result[name], axis is not None)
    ax.set_ylabel(_labelled(name, result[name]), fontsize=9)
    if axis is None:
        ax.plot(np.arange(len(values)), values, "o", ms=3.5, color=_FIT)
        ax.set_xlabel("lane", fontsize=9)
        return
    label, xs = _axis_of(axis)
    if label.startswith("frequency"):
        values = _logarithmic(ax, values)
    marked = {} if frames.is_over_time(result, name) or len(xs) > 200 else {"marker": ".", "ms": 4}
    lanes.draw(ax, [xs] * len(values), values, **marked)
    ax.set_xlabel(label, fontsize=9)
    if lanes.name is not None and lanes.count > 1:
        ax.legend(ax.get_lines(), lanes.labels, frameon=False, fontsize=6, ncols=2)


def _matrix(ax, result: Result, name: str):
    """A matrix of pairs of regions, sensors or windows; of several networks, the first one's."""
    x, over = np.asarray(u.get_magnitude(result[name])), ""
    if np.iscomplexobj(x):
        x, over = np.abs(x).mean(frames.time_axis(result)), ", mean modulus over frequencies"
    first = x.reshape(-1, *x.shape[-2:])[0]
    drawn = ax.imshow(first, cmap="viridis", interpolation="nearest", zorder=3)
    ax.figure.colorbar(drawn, ax=ax).ax.tick_params(labelsize=8)
    more = over + ("" if x.ndim == 2 else ", of the first network")
    ax.set_title(_labelled(name, result[name]) + more, fontsize=9)
    axes = [*frames.record_axes(result, None)[name]]
    ax.set_ylabel(axes[-2], fontsize=9)
    ax.set_xlabel(axes[-2], fontsize=9)


def _logarithmic(ax, power: np.ndarray) -> np.ndarray:
    """Powers for a logarithmic axis, blank where they are none."""
    power = np.where(np.isfinite(power) & (power > 0), power, np.nan)
    if np.isfinite(power).any():
        top, least = float(np.nanmax(power)), float(np.nanmin(power))
        ax.set_yscale("log")
        ax.set_ylim(max(0.5 * least, top * 10.0**-_DECADES), 3.0 * top)
    return power


def _axis_of(axis) -> tuple[str, np.ndarray]:
    """The label and the values of a first axis; times from a second on are in seconds."""
    if u.get_unit(axis).dim == u.second.dim:
        seconds = np.asarray(axis.to_decimal(u.second))
        return ("time (s)", seconds) if seconds.size and seconds[-1] >= 1.0 else ("time (ms)", 1e3 * seconds)
    return _labelled("frequency" if u.get_unit(axis) == u.Hz else "axis", axis), np.asarray(u.get_magnitude(axis))


def _spectra_of_lanes(ax, result: Result, over_time: Sequence[str], lanes: _Lanes):
    """Welch's spectrum of the first record, up to where next to all power lies."""
    freqs, power = result.psd(over_time[0])
    lanes = lanes.of(over_time[0])
    freqs, rows = np.asarray(freqs.mantissa)[1:], lanes.rows(power, True)[:, 1:]
    rows = _logarithmic(ax, rows)
    if np.isfinite(rows).any():
        total = np.nancumsum(rows, axis=1)
        most = max(int(np.searchsorted(row, 0.999 * row[-1])) for row in total if row[-1] > 0)
        last = min(max(2 * most, 10), len(freqs) - 1)
        lanes.draw(ax, [freqs] * len(rows), rows)
        ax.set_xlim(0.0, freqs[last])
    ax.set_xlabel("frequency (Hz)", fontsize=9)
    ax.set_ylabel(_labelled(f"power of {over_time[0]}", power), fontsize=9)


def _state_space(ax, result: Result, over_time: Sequence[str], lanes: _Lanes):
    """The second record against the first."""
    first, second = over_time[:2]
    lanes = lanes.of(first)
    lanes.draw(ax, lanes.rows(result[first], True), lanes.rows(result[second], True), lw=0.8)
    ax.set_xlabel(_labelled(first, result[first]), fontsize=9)
    ax.set_ylabel(_labelled(second, result[second]), fontsize=9)


def _name_lanes(page, result: Result, lanes: _Lanes):
    """The title, and which colour is which lane."""
    drawn = f", {len(lanes.numbers)} of {lanes.count:,} lanes" if lanes.count > len(lanes.numbers) else ""
    page.suptitle(f"{', '.join(result)}{drawn}", fontsize=10, x=0.01, ha="left")
    if lanes.count > 1:
        shared = [ax for ax in page.axes if ax.get_legend() is None]
        lines = [ax.get_lines() for ax in shared if len(ax.get_lines()) == len(lanes.numbers)]
        if lines:
            page.legend(
                lines[0], lanes.labels, frameon=False, fontsize=8, ncols=min(len(lanes.labels), 8),
                loc="outside lower center",
            )  # fmt: skip
