"""The wheel and the source distribution: built, checked, complete, and at work in an environment of their own."""

import ast
import importlib.util
import json
import pathlib
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "brainmass_kernels"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BUILT = ("build", "hatchling", "twine")

needs_build = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in BUILT), reason="build, hatchling or twine not installed"
)


def data_files() -> set[str]:
    """Every file in the package that is no source, by its path from the folder that the package is in."""
    paths = (path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc"))
    return {path.relative_to(ROOT).as_posix() for path in paths}


def read_beside() -> set[str]:
    """The files and folders that a source reads beside itself, ``Path(__file__).with_name("...")``."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "Path(__file__).with_name":
                (name,) = node.args
                if isinstance(name, ast.Constant):
                    found.add(path.with_name(name.value).relative_to(ROOT).as_posix())
    return found


def test_what_is_read_beside_a_source_is_a_file_of_the_package():
    found = read_beside()
    assert {f"brainmass_kernels/{n}" for n in ("catalogue.json", "crossovers.json", "op_bytes.json", "data")} <= found
    data = data_files()
    assert {name for name in found if not any(file == name or file.startswith(f"{name}/") for file in data)} == set()
    assert {"brainmass_kernels/py.typed", "brainmass_kernels/__init__.pyi"} <= data


def extra(name: str, python: str) -> dict[str, str]:
    """The packages of an extra on a version of Python on Linux, each with the versions that it takes."""
    where = {**default_environment(), "python_version": python, "sys_platform": "linux", "extra": name}
    wanted = map(Requirement, PROJECT["optional-dependencies"][name])
    return {str(r).partition(";")[0]: str(r.specifier) for r in wanted if r.marker is None or r.marker.evaluate(where)}


def test_an_extra_asks_for_what_its_python_has():
    """JAX 0.11 and jax-triton 0.4 need Python 3.12."""
    assert list(extra("cuda", "3.11").values()) == [">=0.10.2"]
    assert list(extra("cuda", "3.12").values()) == list(extra("cuda", "3.14").values()) == [">=0.11"]
    assert "<3.7" in "".join(extra("triton", "3.11").values())
    assert "<3.7" not in "".join(extra("triton", "3.12").values())


def ran(*command, **options) -> str:
    """What a command prints; it fails with all that it printed."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, pathlib.Path]:
    """The wheel and the source distribution, by their endings; the wheel is built from the latter."""
    folder = tmp_path_factory.mktemp("dist")
    # What builds it is installed, so that nothing is downloaded.
    ran(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    files = {path.suffix: path for path in folder.iterdir()}
    assert set(files) == {".whl", ".gz"}
    return files


@pytest.mark.slow
@needs_build
def test_the_index_would_take_them(built):
    assert ran(sys.executable, "-m", "twine", "check", "--strict", *built.values()).count("PASSED") == 2


@pytest.mark.slow
@needs_build
def test_the_wheel_has_every_file_of_the_package_and_no_other(built):
    names = {name for name in zipfile.ZipFile(built[".whl"]).namelist() if ".dist-info/" not in name}
    sources = {path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*.py")}
    assert names == sources | data_files()


@pytest.mark.slow
@needs_build
def test_the_source_distribution_has_tests_and_docs_and_nothing_that_was_built(built):
    with tarfile.open(built[".gz"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for part in ("tests", "docs", "benchmarks"):
        sources = (path.relative_to(ROOT) for path in (ROOT / part).rglob("*.py"))
        assert {path.as_posix() for path in sources} <= names
    assert {"README.md", "LICENSE", "CHANGELOG.md", "pyproject.toml", "tests/slow.txt"} <= names
    assert not [name for name in names if name.endswith(".pyc") or name.startswith((".venv", "dist"))]


RUN = """
import json, pathlib, sys
import brainunit as u
import brainmass_kernels as bk

result = bk.simulate(bk.JansenRit(), 200 * u.ms, 1 * u.ms, inputs={"E_inp": 220 * u.Hz}, implementation="scan")
bk.explain(bk.JansenRit(), 200 * u.ms, 1 * u.ms)
grid = bk.sweep(bk.JansenRit(), {"C": [120.0, 150.0]}, 20 * u.ms, 1 * u.ms, implementation="scan")
grid.report("sweep.html")
eeg = result["eeg"].to_decimal(u.mV)
print(json.dumps({"file": bk.__file__, "values": len(eeg), "finite": bool(abs(eeg).max() < 100)}))
"""


@pytest.mark.slow
@needs_build
def test_the_wheel_works_in_an_environment_of_its_own(built, tmp_path):
    """Other packages come from the environment of the tests, so that nothing is downloaded."""
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    (site,) = {ran(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()}
    ran(python, "-m", "pip", "install", "--no-deps", "--no-index", built[".whl"])
    # Appended as folders, without the links of editable installs that lie in them.
    places = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    (pathlib.Path(site) / "others.pth").write_text("\n".join(places))
    clean = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    options = {"cwd": tmp_path, "env": clean}

    command = tmp_path / "env" / "bin" / "brainmass-kernels"
    assert ran(command, "--version", **options) == f"brainmass-kernels {PROJECT['version']}\n"
    about = json.loads(ran(command, "info", "--json", **options))
    assert about["implementations"]["scan"]["here"] == "runs here"
    told = json.loads(ran(python, "-c", RUN, **options).splitlines()[-1])
    assert told == {"file": str(pathlib.Path(site, "brainmass_kernels", "__init__.py")), "values": 200, "finite": True}
    assert (tmp_path / "sweep.html").stat().st_size > 10_000
