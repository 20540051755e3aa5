"""What was published of Jansen and Rit's model, found by the simulator: ``python -m benchmarks.evidence``.

Alpha over the extrinsic drive, the bifurcations in it, and the waveforms over the number of synapses. The
bifurcations are found twice: from the Jacobian of the equations, and by sweeps of `simulate`, which is told no more
than where to start. Numbers go to ``benchmarks/results/evidence.json``, figures to ``docs/figures``; docs/evidence.md
shows both.

Grimbert and Faugeras 2006, Neural Computation 18:3052; Jansen and Rit 1995, Biological Cybernetics 73:357.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import brainmass_kernels as bk
from brainmass_kernels import bench
from brainmass_kernels.spectra import welch

RESULT = Path(__file__).parent / "results" / "evidence.json"
FIGURES = Path(__file__).parents[1] / "docs" / "figures"
MODEL = bk.JansenRit()
STATES = tuple(MODEL.states)
#: The step in ms, and the time between records in s.
DT, SAMPLING = 0.1, 5e-4
#: E_inp in Hz, in the order of the pyramidal potential along the branch of equilibria.
PUBLISHED = {"saddle-node": (113.58, -41.30), "Hopf": (-12.15, 89.83, 315.70)}
#: The E - I in mV over which the branch is searched, and how many equilibria are looked at at once.
SPAN, LANES = (1.5, 9.0), 33
#: The values of C, and the least and largest input in pulses a second, of Jansen and Rit's figure 3.
SYNAPSES, DRIVE = (68.0, 128.0, 135.0, 270.0, 675.0, 1350.0), (120.0, 320.0)


class Point(NamedTuple):
    """A bifurcation of the equilibria: its E_inp, and the frequency born at a Hopf point, both in Hz."""

    kind: str
    E_inp: float
    frequency: float | None = None


# From the equations -------------------------------------------------------------------------------------------------


def drift(state, E_inp):
    """The rate (6,) of a state (6,), by the model's own equations."""
    s = SimpleNamespace(**dict(zip(STATES, state, strict=True)))
    rates = MODEL.drift(s, parameters(), SimpleNamespace(M_inp=0.0, E_inp=E_inp, I_inp=0.0))
    return jnp.stack([rates[n] for n in STATES])


def equilibrium(eeg):
    """State (6,) and E_inp of the one equilibrium with this E - I.

    In E_inp there are up to three, in E - I one; so its branch has no fold. At rest each position is ``A / a`` times
    its drive.
    """
    p = parameters()
    gain = {b.position: getattr(p, b.A) / getattr(p, b.a) for b in MODEL.blocks}

    def drive(name, **positions):
        s = SimpleNamespace(**{"M": 0.0, "E": 0.0, "I": 0.0, **positions})
        return MODEL.drive(s, p, SimpleNamespace(M_inp=0.0, E_inp=0.0, I_inp=0.0))[name]

    M = gain["M"] * drive("M", E=eeg)
    I = gain["I"] * drive("I", M=M)
    E = eeg + I
    zero = jnp.zeros_like(eeg)
    return jnp.stack([M, E, I, zero, zero, zero]), E / gain["E"] - drive("E", M=M)


def parameters() -> SimpleNamespace:
    return SimpleNamespace(**MODEL.magnitudes())


@jax.jit
def equilibria(eeg):
    """State (6, n), E_inp (n,), its slope in E - I, and the Jacobian (n, 6, 6) along the branch."""
    state, E_inp = jax.vmap(equilibrium, out_axes=(1, 0))(eeg)
    slope = jax.vmap(jax.grad(lambda x: equilibrium(x)[1]))(eeg)
    return state, E_inp, slope, jax.vmap(jax.jacfwd(drift), (1, 0))(state, E_inp)


def leading(eeg) -> np.ndarray:
    """The eigenvalue (n,) with the largest real part, per second."""
    values = np.linalg.eigvals(np.asarray(equilibria(jnp.asarray(eeg))[3]))
    return np.take_along_axis(values, values.real.argmax(-1)[:, None], -1)[:, 0]


def growth_by_eigenvalues(eeg) -> tuple[np.ndarray, np.ndarray]:
    """Growth rate (1/s) and frequency (Hz) of a small oscillation about each equilibrium; NaN where it does not ring."""
    value = leading(eeg)
    rings = value.imag != 0
    return np.where(rings, value.real, np.nan), np.where(rings, abs(value.imag) / (2 * np.pi), np.nan)


def bifurcations_of_equations() -> list[Point]:
    """Saddle-nodes where E_inp turns along the branch, Hopf points where a pair of eigenvalues crosses zero."""
    with jax.enable_x64(True):
        return bifurcations(lambda eeg: np.asarray(equilibria(jnp.asarray(eeg))[1:3]), growth_by_eigenvalues, rounds=7)


def bifurcations(branch: Callable, growth: Callable, rounds: int) -> list[Point]:
    """Points of a branch, ``eeg -> (E_inp, slope)``, and of what grows there, ``eeg -> (rate, frequency)``."""
    folds = zeros(lambda eeg: branch(eeg)[1], rounds)
    births = zeros(lambda eeg: growth(eeg)[0], rounds)
    found = [Point("saddle-node", at(branch, 0, eeg)) for eeg in folds]
    return found + [Point("Hopf", at(branch, 0, eeg), at(growth, 1, eeg)) for eeg in births]


def zeros(f: Callable, rounds: int) -> list[float]:
    """Where ``f``, of ``LANES`` points at once, changes sign within ``SPAN``; NaN has no sign."""
    grid = np.linspace(*SPAN, LANES)
    brackets = _changes(grid, f(grid))
    for _ in range(rounds):
        grids = [np.linspace(a[0], b[0], LANES) for a, b in brackets]
        brackets = [change for grid in grids for change in _changes(grid, f(grid))]
    return [float((x0 * y1 - x1 * y0) / (y1 - y0)) for (x0, y0), (x1, y1) in brackets]


def _changes(x, y):
    return [((x[k], y[k]), (x[k + 1], y[k + 1])) for k in np.flatnonzero(y[:-1] * y[1:] < 0)]


def at(f: Callable, which: int, eeg: float) -> float:
    """One of the values of ``f`` at a point, by a parabola through ``LANES`` near ones."""
    grid = eeg + 1e-3 * np.linspace(-1, 1, LANES)
    return float(np.polynomial.Polynomial.fit(grid, f(grid)[which], 2)(eeg))


# From the simulator -------------------------------------------------------------------------------------------------


def simulate(E_inp, seconds, state=None, *, dt=DT, last=None, **arguments) -> bk.Result:
    """Masses (L,) at these drives, from states (6, L) or from rest; E - I of the ``last`` seconds if that is given."""
    initial = None if state is None else {n: x * MODEL.states[n] for n, x in zip(STATES, state, strict=True)}
    steps = round(1e3 * seconds / dt)
    if last is None:
        arguments["record"] = ()
    else:
        arguments |= {"every": round(1e3 * SAMPLING / dt), "transient": steps - round(1e3 * last / dt)}
    return bk.simulate(MODEL, steps, dt * u.ms, inputs={"E_inp": E_inp * u.Hz}, initial=initial, **arguments)


def final(run: bk.Result):
    """The last state (6, L) of a run."""
    return jnp.stack([u.get_magnitude(run.final[n]) for n in STATES])


def eeg_of(run: bk.Result) -> np.ndarray:
    return np.asarray(run["eeg"] / u.mV)


@functools.partial(jax.jit, static_argnames="dt")
def _rest_and_jacobian(z, eeg, dt):
    """How far a run of 10 ms ends from where it began, and its derivative, for (state, E_inp) in the rows of z (7, L)."""

    def moved(z):
        run = simulate(z[6], 0.01, z[:6], dt=dt, implementation="scan")
        return jnp.concatenate([final(run) - z[:6], (z[1] - z[2] - eeg)[None]])

    columns = [jax.jvp(moved, (z,), (jnp.zeros_like(z).at[k].set(1.0),))[1] for k in range(7)]
    return moved(z).T, jnp.moveaxis(jnp.stack(columns), 2, 0).swapaxes(1, 2)


def unmoved(eeg, dt=DT):
    """State (6, L), E_inp and its slope where a run stays in place, stable or not, by Newton on the run's derivative."""
    eeg = jnp.asarray(eeg)
    state, E_inp, *_ = equilibria(eeg)
    z = jnp.concatenate([state, E_inp[None]])
    for _ in range(20):
        rest, jacobian = _rest_and_jacobian(z, eeg, dt=dt)
        step = jnp.linalg.solve(jacobian, rest[..., None])[..., 0].T
        z = z - step
        if (abs(step) < 1e-9 * (1 + abs(z))).all():
            # With the E - I asked for raised by one, all else follows by the same matrix.
            along = jnp.linalg.solve(jacobian, jnp.zeros_like(rest).at[:, 6].set(1.0)[..., None])
            return z[:6], np.asarray(z[6]), np.asarray(along[:, 6, 0])
    raise ArithmeticError(f"no equilibrium of the simulated flow near E - I = {np.asarray(eeg)} mV")


def growth_in_runs(eeg, dt=DT, kick=1e-5, seconds=5.0) -> tuple[np.ndarray, np.ndarray]:
    """As `growth_by_eigenvalues`, from the peaks of runs that start ``kick`` mV beside the equilibria."""
    state, E_inp, _ = unmoved(eeg, dt)
    # The quick modes of a kick die out within half a second.
    run = simulate(E_inp, seconds, state.at[1].add(kick), dt=dt, last=seconds - 0.5)
    fits = [ringing(x) for x in (eeg_of(run) - eeg).T]
    return tuple(np.array(fits).T)


def ringing(x, least=1e-9, largest=1e-2) -> tuple[float, float]:
    """Growth rate and frequency of ``exp(rate t) cos(2 pi frequency t)``, by lines through its half-periods' peaks.

    Only peaks above the rounding and below where the wave is no longer small are taken; NaN for fewer than ten.
    """
    when, height = peaks(abs(x))
    keep = (height > least) & (height < largest)
    if keep.sum() < 10:
        return np.nan, np.nan
    when, height = when[keep] * SAMPLING, height[keep]
    rate = np.polyfit(when, np.log(height), 1)[0]
    return rate, np.polyfit(when, np.arange(len(when)), 1)[0] / 2


def peaks(x) -> tuple[np.ndarray, np.ndarray]:
    """Where, in samples, and how high the local maxima of x (K,) are, by the parabola through three points."""
    k = 1 + np.flatnonzero((x[1:-1] > x[:-2]) & (x[1:-1] >= x[2:]))
    below, here, above = x[k - 1], x[k], x[k + 1]
    shift = 0.5 * (below - above) / (below - 2 * here + above)
    return k + shift, here - 0.25 * (below - above) * shift


def bifurcations_of_simulator(dt=DT) -> list[Point]:
    """As `bifurcations_of_equations`, where runs stay in place, and where runs started beside that grow."""
    with jax.enable_x64(True):
        return bifurcations(lambda eeg: unmoved(eeg, dt)[1:], functools.partial(growth_in_runs, dt=dt), rounds=2)


def follow(state, low: float, high: float, kept: Callable, rounds: int = 3, seconds: float = 200.0) -> tuple[float, float]:
    """The drives between which a state (6,) at ``low`` is lost as the drive is raised.

    Each round runs ``LANES`` masses from where the last mass that kept its state ended, and narrows to the first that
    did not; ``kept`` tells them apart by the last five seconds (K, L) of E - I.
    """
    for _ in range(rounds):
        E_inp = np.linspace(low, high, LANES)
        start = jnp.broadcast_to(jnp.asarray(state)[:, None], (6, LANES))
        run = simulate(E_inp, seconds, start, last=5)
        lost = ~kept(eeg_of(run))
        first = int(lost.argmax())
        if first == 0:
            raise ValueError(f"the state is not lost between {low:g} and {high:g} Hz, or is lost at once")
        low, high, state = float(E_inp[first - 1]), float(E_inp[first]), final(run)[:, first - 1]
    return low, high


def silence_ends(**arguments) -> tuple[float, float]:
    """Where a mass that rests at a weak drive begins to spike: the saddle-node, met from below."""
    with jax.enable_x64(True):
        rest = final(simulate(np.array([100.0]), 50))[:, 0]
        return follow(rest, 100.0, 130.0, lambda x: np.ptp(x, axis=0) < 0.5, **arguments)


def spiking_ends(**arguments) -> tuple[float, float]:
    """Where slow spiking is lost to alpha as the drive is raised."""
    spiking = final(simulate(np.array([120.0]), 50))[:, 0]
    return follow(spiking, 120.0, 160.0, lambda x: np.ptp(x, axis=0) > 6.0, **arguments)


# Cycles and waveforms -----------------------------------------------------------------------------------------------


class Cycles(NamedTuple):
    """What runs (L,) settle to: the least and largest E - I in mV, the frequency in Hz (NaN at rest), the skewness."""

    E_inp: np.ndarray
    low: np.ndarray
    high: np.ndarray
    frequency: np.ndarray
    skewness: np.ndarray


def cycles(E_inp, state=None, settle: float = 60.0, seconds: float = 10.0) -> Cycles:
    """What masses at these drives do for some seconds after they settled, from states (6, L) or from rest."""
    x = eeg_of(simulate(E_inp, settle + seconds, state, last=seconds))
    return Cycles(np.asarray(E_inp), x.min(0), x.max(0), np.array([frequency(lane) for lane in x.T]), skewness(x))


def frequency(x) -> float:
    """Cycles a second between the first and the last time that x (K,) rises through its middle; NaN below 20 uV."""
    if np.ptp(x) < 0.02:
        return np.nan
    above = x - (x.min() + x.max()) / 2
    up = np.flatnonzero((above[:-1] < 0) & (above[1:] >= 0))
    when = up - above[up] / (above[up + 1] - above[up])
    return (len(when) - 1) / ((when[-1] - when[0]) * SAMPLING)


def skewness(x) -> np.ndarray:
    """Third standardised moment over time; above zero where a wave has peaks sharper than its troughs."""
    z = x - x.mean(0)
    return (z**3).mean(0) / (z**2).mean(0) ** 1.5


def alpha_cycles(E_inp) -> Cycles:
    """From beside the upper equilibrium, which leads to alpha wherever there is alpha."""
    eeg = jnp.linspace(5.5, 12.0, 500)
    state, drives, *_ = equilibria(eeg)
    start = jnp.stack([jnp.asarray(np.interp(E_inp, drives, row)) for row in state])
    return cycles(E_inp, start.at[1].add(0.1))


def spiking_cycles(E_inp) -> Cycles:
    """From a mass that spikes at 120 Hz."""
    start = final(simulate(np.full(len(E_inp), 120.0), 20))
    return cycles(E_inp, start)


class Waveforms(NamedTuple):
    """Under random input, for each C: E - I (K, R, 6) in mV, and what tells the waveforms apart."""

    x: np.ndarray
    peak: np.ndarray
    share: np.ndarray
    height: np.ndarray
    deviation: np.ndarray
    skewness: np.ndarray


def waveforms(realisations: int = 4, seconds: int = 32, seed: int = 0) -> Waveforms:
    """Masses with each C of `SYNAPSES`, whose input is drawn anew each millisecond, uniform in `DRIVE`.

    ``peak`` is the frequency (Hz) with the most power above 0.5 Hz, ``share`` the part of the power within 1 Hz of it.
    """
    per_ms = round(1 / DT)
    drawn = np.random.default_rng(seed).uniform(*DRIVE, (1000 * seconds, realisations, 1)).astype(np.float32)
    E_inp = np.broadcast_to(drawn.repeat(per_ms, 0), (len(drawn) * per_ms, realisations, len(SYNAPSES)))
    model = bk.JansenRit(C=np.array(SYNAPSES, np.float32))
    run = bk.simulate(
        model, len(E_inp), DT * u.ms, inputs={"E_inp": E_inp * u.Hz}, transient=2 * u.second, every=per_ms
    )  # fmt: skip
    x = eeg_of(run)
    freqs, power = welch(x, 1e-3, 4096)
    keep = (freqs > 0.5) & (freqs < 45.0)
    freqs, power = freqs[keep], np.asarray(power)[keep].mean(1)
    peak = freqs[power.argmax(0)]
    near = abs(freqs[:, None] - peak) <= 1.0
    share = (power * near).sum(0) / power.sum(0)
    return Waveforms(x, peak, share, np.ptp(x, axis=0).mean(0), x.std(0).mean(0), skewness(x).mean(0))


# Figures ------------------------------------------------------------------------------------------------------------

_ALPHA, _SPIKE, _STILL, _FAINT = "#1f6f8b", "#d1495b", "#22262b", "#e6e9ed"


def page(rows: int, height: float, **arguments):
    figure = Figure(figsize=(7.0, height), dpi=140, layout="constrained")
    axes = np.atleast_1d(figure.subplots(rows, 1, sharex=True, **arguments))
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(length=3)
        ax.grid(color=_FAINT, lw=0.7)
        ax.set_axisbelow(True)
    return figure, axes


def rhythm_figure(alpha: Cycles, spiking: Cycles) -> Figure:
    """Frequency and peak-to-trough height over the drive, of both rhythms."""
    figure, (top, bottom) = page(2, 4.6)
    for found, color, label in ((alpha, _ALPHA, "alpha"), (spiking, _SPIKE, "slow spikes")):
        moving = np.isfinite(found.frequency)
        height = np.where(moving, found.high - found.low, np.nan)
        top.plot(found.E_inp, found.frequency, color=color, lw=2, label=label)
        bottom.plot(found.E_inp, height, color=color, lw=2, label=label)
    top.axhspan(10.0, 11.2, color=_ALPHA, alpha=0.12, lw=0)
    top.text(342, 10.6, "10 to\n11.2 Hz", color=_ALPHA, va="center", fontsize=9)
    top.set(ylabel="frequency (Hz)", ylim=(0, 12.5))
    bottom.set(ylabel="peak to trough (mV)", xlabel="extrinsic drive E_inp (Hz)", ylim=(0, 11), xlim=(80, 370))
    top.legend(frameon=False, loc="center right")
    return figure


def diagram(found: list[Point], alpha: Cycles, spiking: Cycles) -> Figure:
    """Equilibria of the equations, extremes of the simulator's cycles, and the points found by the simulator."""
    figure, (ax,) = page(1, 4.6)
    eeg = np.linspace(-6.0, 10.5, 2000)
    E_inp, stable = np.asarray(equilibria(jnp.asarray(eeg))[1]), leading(eeg).real < 0
    ax.plot(E_inp, np.where(stable, eeg, np.nan), color=_STILL, lw=2.2, label="equilibrium, stable")
    ax.plot(E_inp, np.where(stable, np.nan, eeg), color=_STILL, lw=1.2, ls=(0, (4, 3)), label="unstable")
    for cycle, color, label in ((alpha, _ALPHA, "alpha"), (spiking, _SPIKE, "slow spikes")):
        moving = np.isfinite(cycle.frequency)
        for side, name in ((cycle.low, f"{label}, simulated extremes"), (cycle.high, None)):
            ax.plot(cycle.E_inp[moving], side[moving], ".", color=color, ms=4, label=name)
    for point in found:
        _mark(ax, point, float(np.interp(0.0, *_nearest(E_inp - point.E_inp, eeg, point))))
    ax.set(xlabel="extrinsic drive E_inp (Hz)", ylabel="E - I (mV)", xlim=(-75, 390), ylim=(-2.5, 12.8))
    ax.legend(frameon=False, fontsize=8.5, loc="upper right")
    return figure


def _nearest(distance, eeg, point: Point):
    """The piece of the branch, in order of E_inp, on which a point lies: all Hopf points are on the upper one."""
    if point.kind == "Hopf":
        upper = eeg > 5.5
        return distance[upper], eeg[upper]
    at_fold = np.argsort(abs(distance))[:1]
    return distance[at_fold], eeg[at_fold]


def _mark(ax, point: Point, eeg: float):
    hopf = point.kind == "Hopf"
    ax.plot(point.E_inp, eeg, "o" if hopf else "s", ms=7, mfc="white", mec=_STILL, mew=1.6, zorder=5)
    label = f"{'H' if hopf else 'SN'} {point.E_inp:.2f}"
    ax.annotate(label, (point.E_inp, eeg), (0, 9 if hopf else -14), textcoords="offset points", ha="center", fontsize=9)


def waveform_figure(found: Waveforms) -> Figure:
    """Three seconds of each C, in its own height."""
    figure, axes = page(len(SYNAPSES), 6.6)
    t = np.arange(3000) / 1000
    for i, (ax, C) in enumerate(zip(axes, SYNAPSES)):
        ax.plot(t, found.x[: len(t), 0, i], color=_SPIKE if found.height[i] > 20 else _ALPHA, lw=1.1)
        said = f"peak at {found.peak[i]:.1f} Hz, " if found.share[i] > 0.4 else "no peak, "
        ax.set_title(f"C = {C:g}", loc="left", fontsize=10, pad=3)
        ax.set_title(f"{said}{found.height[i]:.3g} mV, skewness {found.skewness[i]:.1f}", loc="right", fontsize=9, pad=3)
        ax.locator_params(axis="y", nbins=3)
    figure.supylabel("E - I (mV)", fontsize=10)
    axes[-1].set(xlabel="time (s)", xlim=(0, 3))
    return figure


# The command --------------------------------------------------------------------------------------------------------


def evidence() -> tuple[dict, dict[str, Figure]]:
    """All numbers, and the figures by name."""
    began = time.perf_counter()
    drives = np.arange(80.0, 340.5, 2.0)
    alpha = alpha_cycles(drives)
    # Spikes come and go within a fraction of a hertz, so they are swept finely there.
    spiking = spiking_cycles(np.unique(np.concatenate([np.arange(113.6, 114.6, 0.1), np.arange(114.5, 138.0, 0.5)])))
    published = cycles(np.arange(140.0, 311.0, 10.0))
    waves = waveforms()
    equations, simulator = bifurcations_of_equations(), bifurcations_of_simulator()
    with jax.enable_x64(True):
        figures = {"jansen_rit_bifurcations": diagram(simulator, alpha, spiking)}
    figures |= {"jansen_rit_rhythms": rhythm_figure(alpha, spiking), "jansen_rit_waveforms": waveform_figure(waves)}
    numbers = {
        "command": "python -m benchmarks.evidence",
        "published": PUBLISHED,
        "equations": [point._asdict() for point in equations],
        "simulator": [point._asdict() for point in simulator],
        "silence_ends_between_hz": silence_ends(),
        "spiking_ends_between_hz": spiking_ends(),
        "alpha": _rounded(published, ("E_inp", "frequency", "low", "high")),
        "waveforms": {"C": SYNAPSES, **_rounded(waves, waves._fields[1:])},
        "implementation": bk.explain(MODEL, 10000, DT * u.ms, inputs={"E_inp": drives * u.Hz}).implementation,
        "seconds": round(time.perf_counter() - began, 1),
        "machine": bench.machine(),
    }
    return numbers, figures


def _rounded(found, names) -> dict[str, list[float]]:
    return {name: np.round(np.asarray(getattr(found, name), float), 4).tolist() for name in names}


def table(numbers: dict) -> str:
    """Published, by the equations and by the simulator, in the words of docs/evidence.md."""
    lines = ["| | published | equations | simulator | frequency, equations | simulator |", "|---|---|---|---|---|---|"]
    published = [E_inp for values in numbers["published"].values() for E_inp in values]
    for known, exact, found in zip(published, numbers["equations"], numbers["simulator"], strict=True):
        born = [f"{p['frequency']:.4f} Hz" if p["frequency"] else "-" for p in (exact, found)]
        cells = (exact["kind"], f"{known:.2f} Hz", f"{exact['E_inp']:.4f}", f"{found['E_inp']:.4f}", *born)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def waveform_table(numbers: dict) -> str:
    found = numbers["waveforms"]
    lines = ["| C | peak | power within 1 Hz of it | peak to trough | skewness |", "|---|---|---|---|---|"]
    for C, peak, share, height, skew in zip(*(found[n] for n in ("C", "peak", "share", "height", "skewness"))):
        lines.append(f"| {C:g} | {peak:.1f} Hz | {100 * share:.0f}% | {height:.1f} mV | {skew:+.2f} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--figures", type=Path, default=FIGURES)
    options = parser.parse_args(argv)
    numbers, figures = evidence()
    options.figures.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(options.figures / f"{name}.png")
    options.out.write_text(json.dumps(numbers, indent=1) + "\n")
    print(table(numbers), waveform_table(numbers), sep="\n\n")
    print(f"\nsilence ends at {numbers['silence_ends_between_hz']} Hz, spiking at {numbers['spiking_ends_between_hz']} Hz")


if __name__ == "__main__":
    main()
