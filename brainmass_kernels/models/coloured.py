"""Coloured noise: an Ornstein-Uhlenbeck process as one more state of a model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from .. import units
from .base import Model, SecondOrderModel, check_model, check_name, derived, model, remade


def coloured(model: Model, name: str, tau: Any) -> Model:
    """The same model with an Ornstein-Uhlenbeck process added to one of its inputs.

    The process is a state, ``<name>_noise``, in the unit of the input: ``dx = -x / tau dt + sigma dW``, with
    ``noise={"<name>_noise": sigma}`` in its unit over sqrt(time). At rest its standard deviation is
    ``sigma sqrt(tau / 2)``. It can be recorded, started anywhere, and differentiated, in ``tau_<name>`` too.

    Parameters
    ----------
    model : any model
    name : name of the input
    tau : correlation time, in any unit of time; an array broadcasts to the batch

    Raises
    ------
    ValueError : an unknown input, or a unit that is no unit of time

    References
    ----------
    Uhlenbeck and Ornstein 1930, Physical Review 36:823-841.
    """
    check_model(model)
    check_name(name, model.inputs, "input")
    cls = _coloured(type(model), name)
    fields = {field: getattr(model, field) for field in type(model).parameters()}
    return cls(**fields, **{f"tau_{name}": tau})


@derived
def _coloured(base: type[Model], name: str) -> type[Model]:
    """The class of the model with noise, one for each model and input."""
    state, constant = f"{name}_noise", f"tau_{name}"

    def moved(s, i):
        return SimpleNamespace(**{**vars(i), name: getattr(i, name) + getattr(s, state)})

    def process(s, p):
        return {state: -getattr(s, state) / getattr(p, constant)}

    if issubclass(base, SecondOrderModel):
        equations = {
            "drive": staticmethod(lambda s, p, i: base.drive(s, p, moved(s, i))),
            # `SecondOrderModel.drift` takes the drive from the class that calls it.
            "drift": classmethod(lambda cls, s, p, i: {**base.drift.__func__(cls, s, p, i), **process(s, p)}),
        }
    else:
        equations = {"drift": staticmethod(lambda s, p, i: {**base.drift(s, p, moved(s, i)), **process(s, p)})}
    body = {
        "__annotations__": {constant: Any},
        "__doc__": f"`{base.__name__}` with Ornstein-Uhlenbeck noise on its input ``{name}``.",
        "__module__": base.__module__.partition(".")[0],
        "__reduce__": remade(_coloured, base, name),
        constant: 10.0 * base.time_unit,
        "states": {**base.states, state: units.unit_of(base.inputs[name])},
        "as_declared": (*base.as_declared, *([state] if name in base.as_declared else [])),
        **equations,
    }
    return model(type(base.__name__, (base,), body))
