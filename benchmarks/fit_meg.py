"""Fit Jansen-Rit to the 25 resting MEG spectra in one call, and say how well.

    python -m benchmarks.fit_meg --data meg_resting_spectra.npz

The spectra are those published with the tutorials of Donoghue et al. 2020 (Nat Neurosci 23:1655), from one subject of
the Human Connectome Project. Every figure is measured on noise that the fit did not use, and beside it stands what a
power law alone reaches, since that part of the model is no neural mass. The result goes to
``benchmarks/results/fit_meg.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path

import brainunit as u
import jax
import numpy as np

import brainmass_kernels as bk
from brainmass_kernels import spectra
from brainmass_kernels.fitting.fit import fit
from brainmass_kernels.options import FREE

RESULT = Path(__file__).parent / "results" / "fit_meg.json"
#: What counts as reached.
WANTED = {"alpha_within_half_hz": 23, "median_rms": 0.15}


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="meg_resting_spectra.npz")
    parser.add_argument("--starts", type=int, default=4)
    parser.add_argument("--screen", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--realisations", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--implementation")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--figure", type=Path, help="draw the 25 fits here")
    options = parser.parse_args(argv)
    found = fit(
        bk.JansenRit(),
        spectra.load_spectrum(options.data),
        FREE,
        inputs={"E_inp": 220 * u.Hz},
        noise={"E_inp": 2 * u.Hz * u.second**0.5},
        key=jax.random.key(options.seed),
        progress=True,
        **{name: getattr(options, name) for name in ("starts", "screen", "steps", "realisations", "implementation")},
    )
    print(found)
    result = summary(found, options)
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    if options.figure:
        from brainmass_kernels import plots

        plots.figure(found).savefig(options.figure)
    print(json.dumps({name: result[name] for name in ("reached", "seconds", "steps")}, indent=1))
    return result


def summary(found, options) -> dict:
    wanted, reached = found.peaks
    near = int((abs(wanted - reached) <= 0.5).sum())
    median = float(np.median(found.rms))
    steps = len(found.losses)
    return {
        "wanted": WANTED,
        "reached": {
            "alpha_within_half_hz": near,
            "median_rms": round(median, 4),
            "worst_rms": round(float(found.rms.max()), 4),
            "median_rms_as_given": round(float(np.median(found.initial_rms)), 4),
            "median_rms_of_a_power_law_alone": round(float(np.median(power_law_rms(found.target))), 4),
            "all_met": near >= WANTED["alpha_within_half_hz"] and median <= WANTED["median_rms"],
        },
        "rms": found.rms.round(4).tolist(),
        "alpha_target_hz": wanted.round(2).tolist(),
        "alpha_fit_hz": reached.round(2).tolist(),
        "seconds": round(found.seconds, 1),
        "steps": steps,
        "lanes": len(found.target) * options.starts * options.realisations,
        "implementation": found.implementation,
        "options": {n: getattr(options, n) for n in ("starts", "screen", "steps", "realisations", "seed")},
        "bounds": {f.name: [f.low, f.high, str(f.unit)] for f in found.free},
        "machine": machine(),
    }


def power_law_rms(target: spectra.Spectrum) -> np.ndarray:
    """The error (n,) of the best straight line in log-log, with no neural mass at all."""
    log_freqs, log_power = np.log10(target.freqs), np.log10(target.power)
    line = np.polynomial.polynomial.polyfit(log_freqs, log_power.T, 1)
    return np.sqrt(((line[0][:, None] + line[1][:, None] * log_freqs - log_power) ** 2).mean(-1))


def machine() -> dict:
    return {
        "device": jax.devices()[0].device_kind,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "processor": platform.machine(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "brainmass_kernels": bk.__version__,
    }


if __name__ == "__main__":
    main()
