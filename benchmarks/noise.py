"""What noise costs on `numba`: ``python -m benchmarks.noise``.

Jansen-Rit with white noise on its input beside the same run without, in turns, 4,096 masses of 2,000 steps; writes
``results/noise.json``.
"""

from __future__ import annotations

import argparse
import statistics

from brainmass_kernels import bench
from brainmass_kernels.bench import Case

from .timing import RESULTS, save

ROUNDS = 9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="of a round (default: %(default)s)")
    parser.add_argument("--out", default=str(RESULTS / "noise.json"))
    options = parser.parse_args()
    cases = {"quiet": Case(4096, 2000), "noisy": Case(4096, 2000, noisy=True)}
    functions = {name: bench.compiled(bench.fused(case, "numba"), case.lanes) for name, case in cases.items()}
    rounds = [bench.timed(functions, 4096, options.seconds) for _ in range(ROUNDS)]
    ratios = [each["noisy"] / each["quiet"] for each in rounds]
    seconds = {name: statistics.median(each[name] for each in rounds) for name in cases}
    print(
        f"a noisy run takes {statistics.median(ratios):.2f} times a quiet one ({min(ratios):.2f} to {max(ratios):.2f})"
    )
    save(
        options.out,
        ("jax", "llvmlite", "brainmass_kernels"),
        seconds=seconds,
        ratio=statistics.median(ratios),
        ratios=ratios,
    )


if __name__ == "__main__":
    main()
