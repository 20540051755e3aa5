"""Imports go downward only, and importing the package imports nothing heavy."""

import ast
import os
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "brainmass_kernels"


def name_of(path: pathlib.Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(p): p for p in PACKAGE.rglob("*.py") if p.read_text().strip()}


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


def circle(graph: dict[str, set[str]]) -> list[str]:
    """A circle of imports, from a module back to itself, or nothing."""
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name not in done:
            for other in sorted(graph.get(name, ())):
                if found := walk(other, [*path, name]):
                    return found
            done.add(name)
        return []

    return next(filter(None, (walk(name, []) for name in sorted(graph))), [])


def test_no_circle_of_imports():
    assert not circle({name: imported(name, path) - {name} for name, path in MODULES.items() if name})


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


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


@pytest.mark.slow
def test_every_line_of_the_list_of_slow_tests_is_a_test():
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--collect-only",
        "-q",
        "-p",
        "no:cacheprovider",
        str(pathlib.Path(__file__).parent),
    ]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    known = {line.rpartition("tests/")[2] for line in found}
    listed = pathlib.Path(__file__).with_name("slow.txt").read_text().splitlines()
    assert set(listed) <= known
    assert listed == sorted(set(listed))


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
