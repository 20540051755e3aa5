"""A million masses by 100,000 steps, with a spectrum of each, in bounded memory: ``python -m benchmarks.long_sweep``.

Jansen-Rit over E_inp and C, 1,000 values of each, recording mean, extremes and the power at 1 to 40 Hz, into one
Zarr store. The result is opened without being read: its spectra are looked at point by point. What it took, and the
process's peak of memory, go to ``benchmarks/results/long_sweep.json``. ``--steps 1000`` is a trial of a hundredth.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import brainunit as u
import numpy as np

import brainmass_kernels as bk
from brainmass_kernels import bench

from .timing import RESULTS

RESULT = RESULTS / "long_sweep.json"
OVER = {"E_inp": np.linspace(0.0, 400.0, 1000) * u.Hz, "C": np.linspace(60.0, 240.0, 1000)}
FREQS = np.arange(1.0, 41.0)
STEPS, DT, EVERY = 100_000, 0.5, 10
#: Where the model is known to oscillate in the alpha band.
ALPHA = {"E_inp": 220.0, "C": 135.0}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "grid.zarr"
        began = time.perf_counter()
        grid = bk.sweep(
            bk.JansenRit(), OVER, options.steps, DT * u.ms, transient=options.steps // 5, every=EVERY, out=store,
            record=[bk.Mean(), bk.Minimum(), bk.Maximum(), bk.Spectrum(FREQS)], progress=True,
        )  # fmt: skip
        seconds = time.perf_counter() - began
        assert isinstance(grid, bk.Sweep)
        peak, at = bench.peak_memory(), grid.to_xarray().sel(ALPHA, method="nearest")
        power = at["eeg_spectrum"].values
        size = sum(p.stat().st_size for p in store.rglob("*") if p.is_file())
    numbers = {
        "command": "python -m benchmarks.long_sweep" + (f" --steps {options.steps}" if options.steps != STEPS else ""),
        "masses": grid.about["masses"],
        "steps": options.steps,
        "records": options.steps * 4 // 5 // EVERY,
        "frequencies": len(FREQS),
        "implementation": grid.about["implementation"],
        "seconds": round(seconds, 1),
        "mass_steps_per_second": float(f"{grid.about['masses'] * options.steps / seconds:.3g}"),
        "peak_bytes": peak,
        "store_bytes": size,
        "finite": int(np.asarray(grid.ok).sum()),
        "peak_frequency_hz": float(FREQS[np.argmax(power)]),
        "machine": bench.machine(),
    }
    options.out.write_text(json.dumps(numbers, indent=1) + "\n")
    print(f"{seconds:.1f} s, {numbers['mass_steps_per_second']:.3g} mass-steps/s, peak {peak / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
