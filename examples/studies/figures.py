"""The figures of the studies: each function draws what the ``study`` of its name found, into a file."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np

from . import control as control_study
from . import evoked as evoked_study
from . import resting as resting_study


def evoked(found, path) -> None:
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(9.6, 2.8), width_ratios=(3, 3, 4))
    middle.sharey(left)
    ms = 4.0 * np.arange(1, len(found["seen"]) + 1)
    for ax, name in ((left, "seen"), (middle, "shown")):
        ax.plot(ms, found[name][:, ::4], lw=0.8)
        ax.set(xlabel="time since the sound (ms)", ylabel="potential (uV)")
    left.set(title="recorded, every fourth sensor")
    middle.set(title="fitted")
    names = ("E_inp.amplitude", "E_inp.peak", "coupling.forward.k", "coupling.backward.k", "be")
    value, error, true = (
        np.hstack([np.ravel(x[name]) for name in names])
        for x in (found["found"], found["errors"], evoked_study.TRUTH)
    )  # fmt: skip
    what = [f"sound in {region}" for region in evoked_study.REGIONS] + [
        "latency, ms",
        "forward",
        "backward",
        "synapses",
    ]
    rows = np.arange(len(what))[::-1]
    right.errorbar((value - true) / error, rows, xerr=1.0, fmt="o", ms=4)
    right.axvline(0.0, color="k", lw=0.6)
    rounded = zip(what, value, error, true, strict=True)
    right.set_yticks(rows, [f"{name}: {x:.0f} ± {s:.1f} ({known:.0f})" for name, x, s, known in rounded])
    right.set(title="found ± standard error (truth)", xlabel="standard errors from the truth", xlim=(-4, 4))
    fig.savefig(path)


def resting(found, path) -> None:
    fig, (left, middle, cut, plane) = plt.subplots(1, 4, figsize=(9.6, 2.5))
    (fc, fcd), (fcs, fcds) = (resting_study.summary(*found[name]) for name in ("seen", "unseen"))
    for k, name in ((0, "wrong coupling"), (1, "fit")):
        left.plot(fc[0], fcs[k], ".", ms=1, alpha=0.5)
        middle.plot(fcds[k], resting_study.LEVELS, label=name)
    middle.plot(fcd[0], resting_study.LEVELS, ":", color="C4", lw=2, label="seen")
    left.axline((0, 0), slope=1, color="k", lw=0.6)
    middle.legend(frameon=False, loc="lower right", handlelength=1, fontsize=7)
    (coupling, noise), (true_coupling, true_noise) = found["axes"], resting_study.TRUTH.values()
    both = np.sqrt(np.mean(np.square(found["landscape"]), 0))
    row = np.argmin(np.abs(np.log(noise / true_noise)))
    for name, error in zip(("FC", "FCD", "both"), (*found["landscape"], both), strict=True):
        cut.plot(coupling, error[row], ".-", label=name)
    cut.axvline(true_coupling, color="k", lw=0.6)
    cut.legend(frameon=False)
    plane.contourf(coupling, noise, np.log10(both), 12, cmap="magma_r")
    plane.plot(*found["places"], "o", color="w", ms=2)
    plane.plot(*found["found"], "o", color="w", mfc="none")
    plane.plot(true_coupling, true_noise, "+", color="w", ms=10)
    left.set(xlabel="FC seen", ylabel="FC simulated")
    middle.set(xlabel="FCD", ylabel="share below", xlim=(0, 1))
    cut.set(xlabel="coupling (1/s)", ylabel="error at the true noise")
    plane.set(xlabel="coupling (1/s)", ylabel="noise (s$^{-1/2}$)", title="error of both")
    fig.savefig(path)


def balance(found, path) -> None:
    fig, (left, middle, line, right) = plt.subplots(1, 4, figsize=(9.6, 2.5))
    G, strength, course = found["G"], found["strength"], found["course"]
    k = np.argmin(np.abs(G - 1.0))
    left.semilogy(0.05 * np.arange(len(course)), course[:, k], lw=0.4)
    middle.plot(strength, found["before"][k], ".", label="fixed")
    middle.plot(strength, found["after"][k], ".", label="plastic")
    for each in {k // 4, k // 2, k}:
        line.plot(strength, found["known"][each], "-", color="k", lw=0.6)
        line.plot(strength, found["J"][each], ".", label=f"G = {G[each]:.1f}")
    for rates, color, label in ((course[100:200], "C0", "fixed"), (course[-400:], "C1", "plastic")):
        right.semilogy(G, rates.max((0, 2)), ".-", color=color, label=label)
        right.semilogy(G, rates.min((0, 2)), ".-", color=color)
    left.set(xlabel="time (s)", ylabel=f"rates at G = {G[k]:.1f} (Hz)", xlim=(0, 40))
    middle.set(xlabel="strength of a region's inputs", ylabel=f"rate at G = {G[k]:.1f} (Hz)")
    line.set(xlabel="strength of a region's inputs", ylabel="weight of inhibition")
    right.set(xlabel="coupling G", ylabel="extremes of rates (Hz)")
    for ax in (middle, line, right):
        ax.legend(frameon=False)
    fig.savefig(path)


def control(found, path) -> None:
    fig, (left, middle, plane, right) = plt.subplots(1, 4, figsize=(9.6, 2.5))
    left.plot(control_study.TIMES, found["course"], label=[f"{deadline:.0f} ms" for deadline in found["deadlines"]])
    middle.plot(control_study.TIMES, found["rE"])
    plane.plot(found["rE"], found["rI"])
    plane.scatter(*found["rest"].T, c=["k", "w", "k"], edgecolors="k", s=20, zorder=3)
    right.plot(found["deadlines"], found["pulses"], "s:", color="k", label="best pulse")
    right.plot(found["deadlines"], found["costs"], "o-", label="best course")
    left.legend(title="up by", frameon=False)
    right.legend(frameon=False)
    left.set(xlabel="time (ms)", ylabel="input", xlim=(0, 100))
    middle.set(xlabel="time (ms)", ylabel="excitatory rate", xlim=(0, 200))
    plane.set(xlabel="excitatory rate", ylabel="inhibitory rate")
    right.set(xlabel="deadline (ms)", ylabel="cost, mostly energy (ms)", ylim=(0, 20))
    fig.savefig(path)
