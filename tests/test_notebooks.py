"""The notebooks run from the first cell to the last, and are committed without outputs."""

import importlib.util
import pathlib

import pytest

FOLDER = pathlib.Path(__file__).parents[1] / "examples" / "notebooks"
NOTEBOOKS = {"fit_a_spectrum": (), "sweep_a_bifurcation": ("xarray",), "a_connectome": ("tvb_data",)}


def read(name: str):
    nbformat = pytest.importorskip("nbformat", reason="notebooks are read by nbformat, in the extra `test`")
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    return notebook


def test_each_is_listed():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(NOTEBOOKS)
    readme = (FOLDER.parent / "README.md").read_text()
    assert all(f"(notebooks/{name}.ipynb)" in readme for name in NOTEBOOKS)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_without_outputs(name):
    cells = [cell for cell in read(name).cells if cell.cell_type == "code"]
    assert cells
    assert not [cell.source for cell in cells if cell.outputs or cell.execution_count]


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_runs(name, tmp_path):
    client = pytest.importorskip("nbclient", reason="notebooks are run by nbclient, in the extra `test`")
    for package in ("ipykernel", "matplotlib", "optax", *NOTEBOOKS[name]):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    notebook = read(name)
    client.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [output.text for output in outputs if output.get("name") == "stderr"]
