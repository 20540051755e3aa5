"""A million masses by 10,000 steps in bounded memory: ``python -m benchmarks.sweep``.

Jansen-Rit over E_inp and C, 1,024 values of each, recording mean, extremes and peak frequency; writes what it took and
the process's peak of memory to ``benchmarks/results/sweep.json``.
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

RESULT = RESULTS / "sweep.json"
OVER = {"E_inp": np.linspace(0.0, 400.0, 1024) * u.Hz, "C": np.linspace(60.0, 240.0, 1024)}
STEPS, DT = 10_000, 0.5


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args(argv)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        grid = bk.sweep(
            bk.JansenRit(), OVER, options.steps, DT * u.ms, transient=options.steps // 5, every=10,
            out=Path(folder) / "grid.npz", progress=True,
        )  # fmt: skip
    seconds = time.perf_counter() - began
    peak = bench.peak_memory()
    numbers = {
        "command": "python -m benchmarks.sweep",
        "masses": grid.about["masses"],
        "steps": options.steps,
        "implementation": grid.about["implementation"],
        "seconds": round(seconds, 1),
        "mass_steps_per_second": float(f"{grid.about['masses'] * options.steps / seconds:.3g}"),
        "peak_bytes": peak,
        "machine": bench.machine(),
    }
    options.out.write_text(json.dumps(numbers, indent=1) + "\n")
    print(f"{seconds:.1f} s, {numbers['mass_steps_per_second']:.3g} mass-steps/s, peak {peak / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
