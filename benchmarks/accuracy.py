"""Root-mean-square error of each scheme on Jansen-Rit against float64 RK4; ``python -m benchmarks.accuracy``.

From rest at E_inp = 220 Hz for 2 s, compared every millisecond, all in float64, so that only the scheme errs.
"""

from __future__ import annotations

import brainunit as u
import jax
import numpy as np

import brainmass_kernels as bk

from .timing import RESULTS, save

STEPS_MS = (0.1, 0.5, 1.0)
ORDER = ("exp_euler", "euler", "symplectic_euler", "exact", "strang", "heun", "rk4")


def eeg(dt_ms: float, scheme: str) -> np.ndarray:
    """E - I at each millisecond."""
    every = round(1.0 / dt_ms)
    run = bk.simulate(
        bk.JansenRit(), 2000 * every, dt_ms * u.ms, inputs={"E_inp": 220.0 * u.Hz}, every=every, scheme=scheme
    )
    return np.asarray(run["eeg"] / u.mV)


def table() -> dict[str, dict]:
    """For each scheme, its operations a step and its error in mV at each dt."""
    reference = eeg(0.01, "rk4")
    rows = {}
    for scheme in ORDER:
        plan = bk.explain(bk.JansenRit(), 1000, 0.1 * u.ms, scheme=scheme)
        errors = {str(dt): float(np.sqrt(np.mean((eeg(dt, scheme) - reference) ** 2))) for dt in STEPS_MS}
        rows[scheme] = {"operations": plan.operations, "rms_mV": errors}
    return rows


def main() -> None:
    with jax.enable_x64(True):
        rows = table()
    print("| scheme | " + " | ".join(f"dt {dt:g} ms" for dt in STEPS_MS) + " | operations |\n|---" + "|---" * 4 + "|")
    for scheme, row in rows.items():
        print(f"| {scheme} | " + " | ".join(f"{e:.2g}" for e in row["rms_mV"].values()) + f" | {row['operations']} |")
    save(RESULTS / "accuracy.json", ("jax",), rows=rows)


if __name__ == "__main__":
    main()
