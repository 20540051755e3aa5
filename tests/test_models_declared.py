"""Names, order, defaults and units of what every model declares: scripts, saved fits and pickles rely on them.

The names alone are in the package too, where the command line reads them without importing a model. After a change
that is meant, write both files anew: ``python tests/test_models_declared.py``.
"""

import json
import pathlib

import brainunit as u
import numpy as np
import pytest

import brainmass_kernels as bk
from brainmass_kernels import dispatch, options, routing, units

FILE = pathlib.Path(__file__).with_name("models_declared.json")


def shown(values) -> str:
    """Of each value its name, number and unit, in order."""
    of = {n: f"{np.asarray(u.get_mantissa(x)).item()!r} {units.name_of(units.unit_of(x))}" for n, x in values.items()}
    return ", ".join(f"{n} {text}" for n, text in of.items())


def declared(cls: type[bk.Model]) -> dict[str, str]:
    return {
        "parameters": shown(cls.parameters()),
        "states": shown({n: 1.0 * unit for n, unit in cls.states.items()}),
        "inputs": shown(cls.inputs),
        "observables": shown({n: 1.0 * unit for n, unit in cls.observables.items()}),
        "initial": shown(cls.initial),
        "time": f"{units.name_of(cls.time_unit)}, {cls.scheme}",
    }


MODELS = {entry.name: declared(entry.model) for entry in bk.list_models()}


CATALOGUE = pathlib.Path(bk.__file__).with_name("catalogue.json")
NAMES = {
    "implementations": list(dispatch.implementations()),
    "models": {
        entry.name: {kind: list(getattr(entry.model, kind)) for kind in ("inputs", "states")}
        | {"parameters": list(entry.model.parameters())}
        for entry in bk.list_models()
    },
}


def test_the_catalogue_has_every_name():
    assert json.loads(CATALOGUE.read_text()) == NAMES


@pytest.mark.parametrize("name", MODELS)
def test_what_the_command_line_takes_is_what_a_model_has(name):
    assert set(options._quantities(name)) == set(routing.places(getattr(bk.models, name)))


def test_every_model_is_in_the_file():
    assert list(json.loads(FILE.read_text())) == list(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_declares_what_it_did(name):
    assert MODELS[name] == json.loads(FILE.read_text())[name]


if __name__ == "__main__":
    FILE.write_text(json.dumps(MODELS, indent=1) + "\n")
    CATALOGUE.write_text(json.dumps(NAMES) + "\n")
