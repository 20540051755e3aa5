"""Runs the studies, and draws their figures: ``python -m examples.studies [name ...] [--out folder]``.

Without ``--out`` these are the figures of the documentation.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import matplotlib.pyplot as plt
from PIL import Image

from examples.gallery import DOCS, STYLE

from . import balance, control, evoked, figures, resting

STUDIES = {"evoked": evoked, "resting": resting, "balance": balance, "control": control}
FOLDER = DOCS / "figures" / "studies"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("studies", nargs="*", default=[*STUDIES], help=f"of {', '.join(STUDIES)}; by default all")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the figures")
    options = parser.parse_args(argv)
    if unknown := [name for name in options.studies if name not in STUDIES]:
        parser.error(f"there is no study {unknown[0]!r}, but {', '.join(STUDIES)}")
    plt.switch_backend("agg")
    for name in options.studies:
        began = time.perf_counter()
        path = options.out / f"{name}.png"
        with plt.rc_context(STYLE):
            getattr(figures, name)(STUDIES[name].study(), path)
        Image.open(path).quantize(128).save(path, optimize=True)
        print(f"{name} in {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
