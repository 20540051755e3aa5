"""The pages' code runs, each page in its own namespace; every page is in the navigation, each name in the API."""

import pathlib
import re

import jax
import pytest

import brainmass_kernels as bk

ROOT = pathlib.Path(__file__).parents[1]
# Those of docs/models.md run in tests/test_models_page.py.
PAGES = sorted(p.name for p in (ROOT / "docs").glob("*.md") if "```python" in p.read_text() and p.name != "models.md")
SLOW = {"brainmass.md", "fitting.md", "gradients.md", "networks.md"}


@pytest.mark.parametrize("page", [pytest.param(p, marks=[pytest.mark.slow] * (p in SLOW)) for p in PAGES])
def test_code_runs(page, tmp_path, monkeypatch):
    """With the promotion that users have, where the other tests have the strict one."""
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.S):
            exec(compile(block, page, "exec"), namespace)


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    assert not {p.name for p in (ROOT / "docs").glob("*.md") if f": {p.name}" not in navigation}


def test_every_public_name_but_models_is_in_the_api():
    listed = set(re.findall(r"::: brainmass_kernels\.(\w+)", (ROOT / "docs" / "api.md").read_text()))
    models = {entry.model.__name__ for entry in bk.list_models()}
    ours = {n for n, x in vars(bk).items() if str(getattr(x, "__module__", "")).startswith("brainmass_kernels")}
    assert {n for n in ours if not n.startswith("_")} - models - listed <= {"NotPointwise"}
