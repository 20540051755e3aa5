"""Names of the quantities that can be set, swept or fitted, their units, and where their values go.

``"C"`` is a field of the model, ``"E_inp"`` an input, ``"noise.E_inp"`` the intensity of the noise on an input or a
state, ``"coupling.k"`` a constant of a network's coupling, ``"E_inp.onset"`` a parameter of the stimulus on an input.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from . import stimuli, units
from .groups import MEMBER, Groups
from .models.base import Model, check_name
from .network import Network, parts_of

NOISE, COUPLING = "noise.", "coupling."


class Place(NamedTuple):
    """Where a value goes.

    Attributes
    ----------
    kind : "parameters", "inputs", "noise", "coupling" or "stimuli"
    name : within its kind
    unit : of plain numbers
    also : a second unit, whose numbers are read as in ``unit``
    """

    kind: str
    name: str
    unit: Any
    also: Any = None


def places(model: Model | type[Model] | Network, inputs: Mapping | None = None) -> dict[str, Place]:
    """The place of each quantity of a model, its class or a network, by its full name; and of stimuli of ``inputs``."""
    network, mass = parts_of(model)
    known = {n: Place("parameters", n, unit, mass.also.get(n)) for n, unit in mass.parameter_units().items()}
    known |= {n: Place("inputs", n, units.unit_of(x)) for n, x in mass.inputs.items()}
    known |= {NOISE + n: Place("noise", n, noise_unit(mass, n)) for n in (*mass.inputs, *mass.states)}
    known = {n: place for n, place in known.items() if place.name not in _hidden(mass)}
    if network:
        known |= {COUPLING + n: Place("coupling", n, unit) for n, unit in network.parameter_units().items()}
    for full, (name, where, parameter) in stimuli.names_of(inputs or {}).items():
        if name in mass.inputs:
            unit = parameter.unit(units.unit_of(mass.inputs[name]), mass.time_unit)
            known[full] = Place("stimuli", f"{name} {where}", unit)
    return known


def _hidden(model: Model) -> tuple[str, ...]:
    """What a model of groups has for itself."""
    return (MEMBER, *model.joint) if isinstance(model, Groups) else ()


def check(name: str, known: Mapping[str, Any], what: str) -> None:
    """Raise ValueError unless a name is known; "k" is told that it is "coupling.k"."""
    if name not in known and f"{COUPLING}{name}" in known:
        raise ValueError(f"unknown {what} '{name}'; did you mean '{COUPLING}{name}'? It is of the network's coupling")
    check_name(name, known, what)


def noise_unit(model: Model | type[Model], name: str) -> Any:
    """The unit of the intensity of white noise on an input or a state, in the model's unit of time."""
    of_input = name in model.inputs
    unit = units.unit_of(model.inputs[name]) if of_input else model.states[name]
    root = model.time_unit ** (0.5 if of_input else -0.5)
    # A product with no unit would lose the name, ms^0.5.
    return root if unit.is_unitless else unit * root


def put(model: Model | Network, inputs: Mapping, noise: Mapping, values: Mapping[str, Any]) -> tuple[Any, dict, dict]:
    """Model, inputs and noise with these values, by their full names."""
    known = places(model, inputs)
    groups: dict[str, dict] = {
        "parameters": {}, "inputs": dict(inputs), "noise": dict(noise), "coupling": {}, "stimuli": {},
    }  # fmt: skip
    for name, value in values.items():
        kind, own = known[name].kind, known[name].name
        groups[kind][own] = stimuli.with_base(groups[kind].get(own), value) if kind == "inputs" else value
    for place, value in groups["stimuli"].items():
        own, _, where = place.partition(" ")
        groups["inputs"][own] = stimuli.drives_of(groups["inputs"])[own].replace(where, value)
    network, mass = parts_of(model)
    mass = mass.replace(**groups["parameters"])
    model = network.replace(model=mass, **groups["coupling"]) if network else mass
    return model, groups["inputs"], groups["noise"]


def quantities(model: Model | Network, inputs: Mapping, noise: Mapping) -> dict[str, tuple[Any, Any]]:
    """The unit and the value of each quantity, by its full name; noise on states only if ``noise`` has it."""
    mass, values = parts_of(model)[1], {}
    drives = stimuli.drives_of(inputs)
    for full, (kind, name, unit, _) in places(model, inputs).items():
        if kind == "parameters":
            values[full] = unit, getattr(mass, name)
        elif kind == "inputs":
            value = inputs.get(name, mass.inputs[name])
            if name in drives:
                value = units.attach(0.0, unit) if drives[name].base is None else drives[name].base
            values[full] = unit, value
        elif kind == "stimuli":
            own, _, where = name.partition(" ")
            values[full] = unit, drives[own].parameter(where)
        elif kind == "coupling":
            values[full] = unit, model.parameters[name]  # pyright: ignore[reportIndexIssue]
        elif name in noise or name in mass.inputs:
            values[full] = unit, noise.get(name, units.attach(0.0, unit))
    return values
