"""Imports go downward only, and importing the package imports nothing heavy."""

import ast
import os
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "brainmass_kernels"
# From the bottom up; a module may import from its own line and from those above it.
LAYERS = [
    ["_jax", "assembly", "extras", "programs"],
    ["equations"],
    ["units", "noise", "pointwise"],
    ["functional", "affine", "backends.base", "backends.pallas", "connectome"],
    ["recording"],
    ["models.base"],
    ["models.*"],
    ["models"],
    [
        "emit",
        "backends.numba_runtime",
        "backends.triton_runtime",
        "backends.triton_interpreted",
        "backends.triton_versions",
    ],
    ["backends.numba_network_runtime"],
    ["schemes", "backends.numba", "backends.scan", "backends.mosaic_tpu", "backends.mosaic_gpu"],
    ["network"],
    ["backends.mosaic_tpu_network"],
    ["step"],
    ["backends.numba_network"],
    ["testing"],
    ["backends.triton"],
    ["backends.triton_network"],
    ["dispatch"],
    ["memory"],
    ["simulate"],
    ["tables"],
    ["eeg"],
    ["fused", "spectra", "bench", "sensitivity", "adapters.lanes"],
    ["adapters.couplings", "adapters.jansen_rit_tr", "targets"],
    ["adapters.brainmass", "descent"],
    ["fit"],
    ["sweep"],
    ["plots"],
    ["cli"],
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer if name != "models.*"}


def name_of(path: pathlib.Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(p): p for p in PACKAGE.rglob("*.py") if p.read_text().strip()}
RANK |= {name: LAYERS.index(["models.*"]) for name in MODULES if name.startswith("models.") and name not in RANK}


def imported(name: str, path: pathlib.Path) -> set[str]:
    """Modules of this package that a module imports when it is itself imported, not inside its functions."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            full = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{full}.{alias.name}".lstrip(".")
                found.add(inner if inner in MODULES else full)
    return found - {""}


def test_every_module_has_its_place():
    assert set(MODULES) - {""} - {"backends", "adapters"} == set(RANK)


@pytest.mark.parametrize("name", sorted(set(MODULES) & set(RANK)))
def test_imports_go_downward(name):
    upward = {other for other in imported(name, MODULES[name]) if RANK.get(other, -1) > RANK[name]}
    assert not upward


def test_only_one_file_asks_for_the_version_of_jax():
    asking = {name for name, path in MODULES.items() if "jax.__version__" in path.read_text()}
    assert asking <= {"_jax", "cli"}
    assert not {n for n, p in MODULES.items() if "jax._src" in p.read_text()} - {"_jax"}


def test_importing_adds_nothing_heavy_to_jax_and_brainunit():
    """brainunit itself loads matplotlib where it is installed; nothing here may load more."""
    program = (
        "import sys, jax, brainunit\nbefore = set(sys.modules)\nimport brainmass_kernels\n"
        "heavy = {'matplotlib', 'optax', 'brainmass', 'brainstate', 'rich', 'scipy', 'libtpu', 'numba', 'llvmlite',"
        "'triton', 'torch', 'jax_triton'}\n"
        "print(sorted(heavy & (set(sys.modules) - before)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_importing_is_quick(tmp_path):
    """Seconds of processor time beyond JAX and brainunit (more than a second themselves), once bytecode is kept."""
    program = (
        "import time, jax, brainunit\nbefore = time.process_time()\nimport brainmass_kernels\n"
        "print(time.process_time() - before)"
    )
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(tmp_path)}
    command = [sys.executable, "-c", program]
    runs = [subprocess.run(command, env=env, capture_output=True, text=True, check=True) for _ in range(3)]
    assert min(float(done.stdout) for done in runs[1:]) < 0.3
