"""docs/coming_from.md: its translations give the equations of the packages, and its names are in them.

A package that is not installed is skipped. Each needs an environment of its own, or a folder on the path:
``PYTHONPATH=.:FOLDER python -m pytest tests/test_coming_from.py``, where ``pip install --target FOLDER`` put it.
"""

import importlib
import importlib.util
import pathlib
import re

import brainunit as u
import numpy as np
import pytest

import brainmass_kernels as bk

PAGE = (pathlib.Path(__file__).parents[1] / "docs" / "coming_from.md").read_text()
SEEDED = np.random.default_rng(20)


def table(title: str) -> list[list[str]]:
    """The rows of the table whose header begins with these columns."""
    rows = PAGE[PAGE.index(title) :].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


MODELS = {
    here: {"tvboptim": names[0], "tvb": names[1], "states": dict(zip(there.split(), ours.split()))}
    for (here,), names, (there,), (ours,) in (
        map(quoted, row) for row in table("| here | tvboptim, The Virtual Brain | states")
    )
}
NEUROLIB = {
    here: (name, dict(zip(there.split(), ours.split())))
    for (here,), (name,), (there,), (ours,) in (
        map(quoted, row) for row in table("| here | neurolib | states")
    )
}  # fmt: skip


@pytest.fixture(scope="module")
def page():
    """What the page's code defines."""
    namespace: dict = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.S):
        if "bk.simulate" not in block:
            exec(compile(block, "docs/coming_from.md", "exec"), namespace)
    assert set(namespace["translations"]) == set(MODELS)
    assert set(namespace["from_neurolib"]) == set(NEUROLIB)
    return namespace


def needed(package: str):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


def unit_there(unit):
    """The unit of a state in a package that counts in mV and ms."""
    return {u.mV: u.mV, u.mV / u.second: u.mV / u.ms, u.Hz: 1 / u.ms}.get(unit, u.UNITLESS)


def slopes_here(model, inputs, states: dict) -> dict:
    """The derivative of each state, per ms, by a very short step of Euler's."""
    dt, units = 1e-4 * u.ms, {name: unit_there(unit) for name, unit in model.states.items()}
    start = {name: values * units[name] for name, values in states.items()}
    run = bk.simulate(
        model, 1, dt, inputs=inputs, initial=start, scheme="euler", implementation="scan", record=list(start)
    )
    moved = {name: u.get_magnitude((run.final[name] - start[name]) / units[name]) for name in start}
    return {name: np.asarray(each) / 1e-4 for name, each in moved.items()}


def test_slopes_here_are_derivatives(x64):
    s = {"x": np.array([0.5, -2.0])}
    np.testing.assert_allclose(slopes_here(bk.Linear(gamma=-3.0), {}, s)["x"], -3.0 * s["x"], rtol=1e-9)


@pytest.mark.usefixtures("x64")
class TestDerivatives:
    """At the defaults of the package, changed by a few per cent, in five random states."""

    @pytest.mark.parametrize("here", MODELS)
    def test_tvboptim(self, page, here):
        needed("tvboptim")
        from tvboptim.experimental.network_dynamics.core.bunch import Bunch
        from tvboptim.experimental.network_dynamics.dynamics import tvb

        kind = getattr(tvb, MODELS[here]["tvboptim"])
        numbers = changed(here, dict(kind.DEFAULT_PARAMS))
        states = random_states(MODELS[here]["states"])
        sources = Bunch(**{name: np.zeros((n, 5)) for name, n in kind.COUPLING_INPUTS.items()})
        stacked = np.stack([states[name] for name in kind.STATE_NAMES])
        found = kind().dynamics(0.0, stacked, Bunch(**numbers), sources, Bunch(stimulus=np.zeros((1, 5))))
        found = found[0] if isinstance(found, tuple) else found
        check_slopes(page, here, numbers, states, dict(zip(kind.STATE_NAMES, np.asarray(found))))

    @pytest.mark.parametrize("here", MODELS)
    def test_the_virtual_brain(self, page, here):
        needed("tvb.simulator") if importlib.util.find_spec("tvb") else needed("tvb")
        from tvb.simulator.models import ModelsEnum

        kind = {each.get_class().__name__: each.get_class() for each in ModelsEnum}[MODELS[here]["tvb"]]
        model = kind()
        numbers = {
            name: float(value[0])
            for name in kind.declarative_attrs
            if isinstance(value := getattr(model, name), np.ndarray) and value.dtype in (float, bool)
        }
        numbers = changed(here, numbers)
        for name, value in numbers.items():
            setattr(model, name, np.array([value], getattr(model, name).dtype))
        model.configure()
        states = random_states(MODELS[here]["states"])
        stacked = np.stack([states[name] for name in model.state_variables])[..., None]
        sources = np.zeros((model.cvar.size, 5, 1))
        found = np.asarray(model.dfun(stacked, sources, 0.0))[..., 0]
        check_slopes(page, here, numbers, states, dict(zip(model.state_variables, found)))


def changed(here: str, numbers: dict) -> dict:
    """Every parameter moved a little, so that no two are equal; where a translation has conditions, they hold."""
    fixed = {
        "WilsonCowan": {"k_e": 1.0, "k_i": 1.0, "c_e": 1.0, "c_i": 1.0, "r_e": 0.9, "r_i": 0.9, "shift_sigmoid": 1.0},
        "MontbrioPazoRoxin": {"tau": 1.0},
        "Epileptor": {"s": 4.0, "modification": 0.0},
    }.get(here, {})
    return {
        name: fixed.get(name, float(value) * SEEDED.uniform(0.95, 1.05) + SEEDED.uniform(0.0, 0.01) * (value == 0))
        for name, value in numbers.items()
        if isinstance(value, int | float)
    }


def random_states(names: dict) -> dict:
    return {name: SEEDED.uniform(0.05, 0.8, 5) for name in names}


def check_slopes(page, here: str, numbers: dict, states: dict, found: dict):
    names = MODELS[here]["states"]
    model, inputs = page["translations"][here](numbers)
    want = slopes_here(model, inputs, {names[name]: values for name, values in states.items()})
    for name, ours in names.items():
        np.testing.assert_allclose(found[name], want[ours], rtol=1e-6, atol=1e-7, err_msg=f"{here}, {name}")


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("here", NEUROLIB)
def test_a_run_of_neurolib(page, here):
    needed("neurolib")
    (module, kind), names = NEUROLIB[here][0].split("."), NEUROLIB[here][1]
    theirs = getattr(importlib.import_module(f"neurolib.models.{module}"), kind)()
    theirs.params["duration"] = 5.0
    start = {ours: float(theirs.params[f"{there}s_init"][0, 0]) for there, ours in names.items()}
    theirs.run()
    model, inputs = page["from_neurolib"][here](theirs.params)
    run = bk.simulate(
        model, 50, 0.1 * u.ms, inputs=inputs, initial=start, scheme="euler", implementation="scan", record=list(start)
    )
    for there, ours in names.items():
        np.testing.assert_allclose(getattr(theirs, there)[0, -49:], run[ours][1:], rtol=1e-8)


@pytest.mark.parametrize("package", ["tvboptim", "tvb", "neurolib"])
def test_names_are_in_the_package(package):
    needed("tvb.simulator" if package == "tvb" and importlib.util.find_spec("tvb") else package)
    column = {"tvboptim": 1, "tvb": 2, "neurolib": 3}[package]
    cells = [row[column] for row in table("| here | tvboptim | The Virtual Brain | neurolib |")]
    written = [name for cell in cells for name in quoted(cell)]
    written = [re.sub(r"^nd\.", "tvboptim.experimental.network_dynamics.", name) for name in written]
    names = {name for name in written if name.startswith(f"{package}.")}
    assert names
    for name in names:
        module, _, last = name.rpartition(".")
        # Read, not imported: neurolib's optimisers need a package that needs an older NumPy.
        source = pathlib.Path(importlib.util.find_spec(module).origin).read_text()
        assert re.search(rf"\b{last}\b", source), name


def test_names_are_here():
    for row in table("| here | tvboptim | The Virtual Brain | neurolib |"):
        for name in re.findall(r"bk\.(\w+)", row[0]):
            assert hasattr(bk, name)
    assert all(issubclass(getattr(bk, name), bk.Model) for name in {*MODELS, *NEUROLIB})
