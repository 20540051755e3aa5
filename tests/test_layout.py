"""Imports go downward only, and importing the package imports nothing heavy."""

import ast
import functools
import importlib
import json
import os
import pathlib
import subprocess
import sys
import types

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "brainmass_kernels"


ROOT = PACKAGE.name


def name_of(path: pathlib.Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(p): p for p in PACKAGE.rglob("*.py")}


class Imports(ast.NodeVisitor):
    """What a module of this package imports of it, in functions too; what only a type checker reads does not count."""

    def __init__(self, name: str, package: str, text: str, modules):
        self.name, self.package, self.modules = name, package, modules
        self.found: set[str] = set()
        self.visit(ast.parse(text))

    def visit_If(self, node):
        checked = ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for inner in node.orelse if checked else ast.iter_child_nodes(node):
            self.visit(inner)

    def visit_Import(self, node):
        for alias in node.names:
            self.add(alias.name)

    def visit_ImportFrom(self, node):
        base = self.package.split(".")[: len(self.package.split(".")) - node.level + 1] if node.level else []
        origin = ".".join([*base, *([node.module] if node.module else [])])
        for alias in node.names:
            inner = f"{origin}.{alias.name}"
            self.add(inner if inner in self.modules else origin)

    def add(self, name: str):
        # A package runs before the modules in it, but hands them nothing.
        if name in self.modules and name != self.name:
            self.found.add(name)


def imported(name: str, path: pathlib.Path) -> set[str]:
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    return Imports(name, package, path.read_text(), MODULES).found


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The sets of modules each of which leads to all others of its set, by Tarjan's walk."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    path: list[str] = []
    found = []

    def walk(name: str) -> None:
        index[name] = low[name] = len(index)
        path.append(name)
        for other in sorted(graph.get(name, ())):
            if other not in index:
                walk(other)
            if other in path:
                low[name] = min(low[name], low[other])
        if low[name] == index[name]:
            cut = path.index(name)
            if len(path) > cut + 1:
                found.append(sorted(path[cut:]))
            del path[cut:]

    for name in sorted(graph):
        if name not in index:
            walk(name)
    return found


def test_no_circle_of_imports():
    assert circles({name: imported(name, path) for name, path in MODULES.items()}) == []


def test_a_circle_is_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a", "b"}}) == [["b", "c"]]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    assert circles({"a": {"b"}, "b": {"a", "c"}, "c": {"d"}, "d": {"c"}}) == [["c", "d"], ["a", "b"]]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("from . import b", {"p.a.b"}),
        ("from .b import name", {"p.a.b"}),
        ("from .. import c", {"p.c"}),
        ("from .. import name", {"p"}),
        ("import p.c as c", {"p.c"}),
        ("from p.a import b", {"p.a.b"}),
        ("def f():\n    from ..c import name", {"p.c"}),
        ("class C:\n    def f(self):\n        if self:\n            import p.c", {"p.c"}),
        ("try:\n    import os\nexcept ImportError:\n    from p import c", {"p.c"}),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .. import c", set()),
        ("import os\nfrom .here import name", set()),
    ],
)
def test_an_import_is_found_wherever_it_stands(line, found):
    assert Imports("p.a.here", "p.a", line, {"p", "p.a", "p.a.here", "p.a.b", "p.c"}).found == found


def test_no_module_is_shadowed_by_a_function_of_its_name():
    """Else ``import package.name`` would give the module, and ``package.name`` the function."""
    for name in MODULES:
        package, _, last = name.rpartition(".")
        if package:
            held = getattr(importlib.import_module(package), last, None)
            assert held is None or isinstance(held, types.ModuleType), name


def test_only_one_file_asks_for_the_version_of_jax():
    asking = {name for name, path in MODULES.items() if "jax.__version__" in path.read_text()}
    assert asking <= {f"{ROOT}._jax"}
    assert {n for n, p in MODULES.items() if "jax._src" in p.read_text()} == {f"{ROOT}._jax"}


@pytest.fixture(scope="module")
def imports() -> list[dict]:
    """What an import of the package loads, and its processor time beside that of JAX and brainunit; three times."""
    program = (
        "import json, sys, time\nstart = time.process_time()\nimport jax, brainunit\nbefore = set(sys.modules)\n"
        "between = time.process_time()\nimport brainmass_kernels as bk\n"
        "[getattr(bk, name) for name in bk.__all__]\n"
        "told = {'share': (time.process_time() - between) / (between - start)}\n"
        "print(json.dumps({**told, 'loaded': sorted(set(sys.modules) - before)}))"
    )
    run = functools.partial(subprocess.run, [sys.executable, "-c", program], capture_output=True, text=True, check=True)
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}
    return [json.loads(run(env=env).stdout) for _ in range(3)]


def test_importing_adds_nothing_heavy_to_jax_and_brainunit(imports):
    """brainunit itself loads matplotlib where it is installed; nothing here may load more."""
    heavy = {
        "matplotlib", "optax", "brainmass", "brainstate", "rich", "scipy", "libtpu", "numba", "llvmlite", "triton",
        "torch", "jax_triton",
    }  # fmt: skip
    assert f"{ROOT}.simulation" in imports[0]["loaded"]
    assert not heavy & set(imports[0]["loaded"])


def test_importing_alone_imports_nothing_that_takes_long():
    """The command line reads its arguments, and refuses them, before JAX is there."""
    program = "import brainmass_kernels, sys; print({'jax', 'numpy', 'brainunit'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout.strip() == "set()"


def test_every_public_name_is_there():
    package = importlib.import_module(ROOT)
    assert {"simulate", "fit", "sweep", "JansenRit", "testing"} <= set(package.__all__)
    assert [name for name in package.__all__ if not hasattr(package, name)] == []
    assert set(package.__all__) <= set(dir(package))
    with pytest.raises(AttributeError, match="simulated"):
        package.simulated  # noqa: B018


def test_importing_is_quick(imports):
    """Beside JAX and brainunit, once bytecode is kept; a machine that is busy slows both."""
    assert min(told["share"] for told in imports) < 0.4


@pytest.mark.slow
def test_every_line_of_the_list_of_slow_tests_is_a_test():
    options = "--collect-only", "-q", "-p", "no:cacheprovider"
    command = [sys.executable, "-m", "pytest", *options, str(pathlib.Path(__file__).parent)]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    known = {line.rpartition("tests/")[2] for line in found}
    listed = pathlib.Path(__file__).with_name("slow.txt").read_text().splitlines()
    assert set(listed) <= known
    assert listed == sorted(set(listed))
