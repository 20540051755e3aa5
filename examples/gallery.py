"""Remakes the figures of the documentation, by the code that is shown beside them: ``python -m examples.gallery``.

Each page's code blocks run in order in one namespace, in the folder of the page's figures. Needs matplotlib, and
``tvb-data`` for the connectome: ``pip install 'brainmass-kernels[fit,sweep,connectomes]'``.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"
#: Pages with figures that their code writes.
PAGES = ("index.md", "gallery.md", "first_model.md", "stimuli.md")
FOLDER = DOCS / "figures" / "gallery"
STYLE = {
    "figure.dpi": 110,
    "savefig.dpi": 110,
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titlelocation": "left",
    "lines.linewidth": 1.2,
    "axes.prop_cycle": "cycler('color', ['#d1495b', '#22262b', '#3d7ea6', '#9aa4af', '#e0a030', '#4f9d69'])",
}


def blocks(page: str) -> list[str]:
    """The Python code of a page."""
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.S)


def figures(page: str) -> list[str]:
    """The names of the figures that a page shows and its code writes."""
    return re.findall(r"\]\(figures/gallery/([\w.]+)\)", (DOCS / page).read_text())


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def make(page: str, folder: Path) -> None:
    """Run a page's code; its figures are written into a folder, without a window."""
    import matplotlib.pyplot as plt

    plt.switch_backend("agg")
    namespace: dict = {}
    with plt.rc_context(STYLE), _inside(folder):
        for block in blocks(page):
            exec(compile(block, page, "exec"), namespace)
    plt.close("all")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pages", nargs="*", default=PAGES, help="by default all of them")
    for page in parser.parse_args(argv).pages:
        began = time.perf_counter()
        make(page, FOLDER)
        print(f"{page}: {', '.join(figures(page))} in {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
