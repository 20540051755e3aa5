"""The pages with figures: their code makes the figures that are committed, of the same size and nearly the same."""

import importlib.util
import re

import jax
import numpy as np
import pytest

from examples import gallery

LARGEST = 120_000  # bytes of a figure


@pytest.mark.parametrize("page", gallery.PAGES)
def test_shown_figures_are_there_and_small(page):
    names = gallery.figures(page)
    assert names == re.findall(r'"(\w+\.png)"', "".join(gallery.blocks(page)))
    assert all((gallery.FOLDER / name).stat().st_size < LARGEST for name in names)


def test_no_figure_is_left_over():
    shown = {name for page in gallery.PAGES for name in gallery.figures(page)}
    assert {path.name for path in gallery.FOLDER.iterdir()} == shown


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("page", gallery.PAGES)
def test_the_code_makes_the_figures(page, tmp_path):
    """Nearly: fonts and colours differ between versions of matplotlib, and a chaotic run between processors."""
    image = pytest.importorskip("matplotlib.image", reason="figures are in the extra `fit`")
    if page == "gallery.md" and importlib.util.find_spec("tvb_data") is None:
        pytest.skip("tvb-data is not installed")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        gallery.make(page, tmp_path)
    for name in gallery.figures(page):
        made, kept = image.imread(tmp_path / name), image.imread(gallery.FOLDER / name)
        assert made.shape == kept.shape, name
        assert np.abs(made - kept).mean() < 0.05, name
        assert kept.std() > 0.02, name  # not an empty page
