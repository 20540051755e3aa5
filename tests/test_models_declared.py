"""Names, order, defaults and units of what every model declares: scripts, saved fits and pickles rely on them.

After a change that is meant, write the file anew: ``python tests/test_models_declared.py``.
"""

import json
import pathlib

import brainunit as u
import numpy as np
import pytest

import brainmass_kernels as bk
from brainmass_kernels import units

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


def test_every_model_is_in_the_file():
    assert list(json.loads(FILE.read_text())) == list(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_declares_what_it_did(name):
    assert MODELS[name] == json.loads(FILE.read_text())[name]


if __name__ == "__main__":
    FILE.write_text(json.dumps(MODELS, indent=1) + "\n")
