"""Models made of other models: with coloured noise on an input, and with the blood oxygenation that activity causes."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import brainunit as u
import jax.numpy as jnp

from .. import units
from ..hrf import HRF
from .base import Model, SecondOrderModel, check_model, check_name, derived, model, remade

_FIELDS = {
    "bold_gain": None,
    "bold_rest": None,
    "bold_kappa": 0.65 * u.Hz,
    "bold_gamma": 0.41 * u.Hz,
    "bold_tau": 0.98 * u.second,
    "bold_alpha": 0.32,
    "bold_rho": 0.34,
    "bold_V0": 0.02,
}
_STATES = ("bold_s", "bold_f", "bold_v", "bold_q")


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


def with_bold(
    model: Model, source: str | None = None, gain: Any = None, rest: Any = None, *, kernel: HRF | str | None = None,
    **constants,
) -> Model:  # fmt: skip
    """The same model with the blood oxygenation that its activity causes, computed in the same loop.

    Of the balloon, the default, the vasodilatory signal s, inflow f, volume v and deoxyhaemoglobin q follow
    ``z = gain (source - rest)``:

        ds/dt = z - kappa s - gamma (f - 1)            tau dv/dt = f - v^(1/alpha)
        df/dt = s                                      tau dq/dt = f (1 - (1 - rho)^(1/f)) / rho - q v^(1/alpha - 1)
        bold = V0 (7 rho (1 - q) + 2 (1 - q / v) + (2 rho - 0.2) (1 - v))

    ``bold`` is one more observable, a fraction of the signal at rest. Take its means over a scanner's repetition time
    by ``record=bk.Average(tr, of="bold")``. The blood is slow: its states need a minute to settle.

    Of a kernel, ``bold`` is z convolved with it, by low-passes in a row: a gamma density of shape n is the response of
    n of them. It is not cut off at the kernel's ``length``. Its scales and weights are parameters of the model, with
    gradients. `Convolved` takes any kernel, and adds no states.

    Parameters
    ----------
    model : any model
    source : the observable or state that drives the blood; ``None`` for the model's first observable
    gain : in 1/s over the unit of the source, per second if there is none; of a kernel, without the 1/s
    rest : the source's value at which the blood is at rest, in the source's unit; ``None`` for 0
    kernel : "balloon", or an `HRF` whose shapes are whole; ``None``, the balloon
    **constants : of the balloon, ``kappa`` (0.65 Hz), ``gamma`` (0.41 Hz), ``tau`` (0.98 s), ``alpha`` (0.32),
        ``rho`` (0.34) and ``V0`` (0.02)

    Returns
    -------
    a model with the fields ``bold_gain``, ``bold_rest``, ``bold_kappa`` and so on, and the states ``bold_s``,
    ``bold_f``, ``bold_v``, ``bold_q``; of a kernel with the fields ``bold_gain``, ``bold_rest``, ``bold_scale_1``,
    ``bold_weight_1`` and so on, of each of its densities, and the states ``bold_1_1``, ``bold_1_2`` and so on, of each
    scale

    Raises
    ------
    ValueError : an unknown source, a wrong unit, another kernel, or one whose shapes are not whole
    TypeError : an unknown constant, and any of a kernel

    References
    ----------
    Friston, Harrison and Penny 2003, NeuroImage 19:1273-1302.
    """
    check_model(model)
    source = next(iter(model.recordable())) if source is None else source
    check_name(source, model.recordable(), "observable or state")
    make = functools.partial(_bold, type(model), source)
    if isinstance(kernel, HRF):
        make = functools.partial(_convolved, type(model), source, *_whole(kernel))
    elif kernel not in (None, "balloon"):
        raise ValueError(f"'kernel' got {kernel!r}, but takes 'balloon', a bk.HRF, or None for the balloon")
    for name in constants:
        if isinstance(kernel, HRF):
            raise TypeError(f"'{name}' is a constant of the balloon, but 'kernel' got a bk.HRF, which has its own")
        check_name(f"bold_{name}", _FIELDS, "constant", TypeError)
    own = {"bold_gain": gain, "bold_rest": rest, **{f"bold_{name}": x for name, x in constants.items()}}
    fields = {field: getattr(model, field) for field in type(model).parameters()}
    return make()(**fields, **{name: x for name, x in own.items() if x is not None})


def _whole(kernel: HRF) -> tuple[tuple[float, ...], tuple[int, ...], tuple[float, ...]]:
    """The weights, shapes and scales of a kernel; raises ValueError if a shape is not whole."""
    shapes = tuple(round(shape) for shape in kernel.shapes)
    if shapes != tuple(kernel.shapes):
        raise ValueError(
            f"'kernel' got shapes {kernel.shapes}, but with_bold takes whole ones, numbers of low-passes in a row: "
            "record bk.Convolved(kernel), which takes any"
        )
    return tuple(kernel.weights), shapes, tuple(kernel.scales)


@derived
def _bold(base: type[Model], source: str) -> type[Model]:
    """The class of the model with blood, one for each model and source."""
    unit = base.recordable()[source]
    second = float(u.Quantity(1.0, unit=u.second).to_decimal(base.time_unit))  # the constants count seconds

    known = base.time_factors()
    back = 1.0 / known.observables.get(source, known.states.get(source, 1.0))

    def blood(s, p):
        active = units.scaled({**vars(s), **base.observe(s, p)}[source], back)
        f, v, q = s.bold_f, s.bold_v, s.bold_q
        volume = jnp.exp(jnp.log(v) / p.bold_alpha)
        # Without inflow all oxygen is extracted: exp(.. / f) is 0, but its slope would be 0 times infinity.
        dry = jnp.abs(f) < 1e-15
        extraction = jnp.where(dry, 1.0, 1.0 - jnp.exp(jnp.log(1.0 - p.bold_rho) / jnp.where(dry, 1.0, f)))
        rates = {
            "bold_s": p.bold_gain * (active - p.bold_rest) - p.bold_kappa * s.bold_s - p.bold_gamma * (f - 1.0),
            "bold_f": s.bold_s,
            "bold_v": (f - volume) / p.bold_tau,
            "bold_q": (f * extraction / p.bold_rho - q * volume / v) / p.bold_tau,
        }
        return {name: rate / second for name, rate in rates.items()}

    def signal(s, p):
        rho, v, q = p.bold_rho, s.bold_v, s.bold_q
        return p.bold_V0 * (7.0 * rho * (1.0 - q) + 2.0 * (1.0 - q / v) + (2.0 * rho - 0.2) * (1.0 - v))

    defaults = {
        **_FIELDS,
        "bold_gain": units.attach(1.0, units.UNITLESS / u.second / unit),
        "bold_rest": units.attach(0.0, unit),
    }
    body = {
        "__doc__": f"`{base.__name__}` with the blood oxygenation that ``{source}`` causes.",
        "__reduce__": remade(_bold, base, source),
        "states": {**base.states, "bold_s": units.UNITLESS / u.second, **dict.fromkeys(_STATES[1:], units.UNITLESS)},
        # The constants and the signal count seconds, whatever the model's time is.
        "as_declared": (*base.as_declared, *defaults, "bold_s"),
        "initial": {**base.initial, **dict.fromkeys(_STATES[1:], 1.0)},
    }
    return _with_signal(base, defaults, blood, signal, body)


@derived
def _convolved(
    base: type[Model], source: str, weights: tuple[float, ...], shapes: tuple[int, ...], scales: tuple[float, ...]
) -> type[Model]:
    """The class of the model with low-passes, one for each model, source and kernel."""
    unit = base.recordable()[source]
    second = float(u.Quantity(1.0, unit=u.second).to_decimal(base.time_unit))
    known = base.time_factors()
    back = 1.0 / known.observables.get(source, known.states.get(source, 1.0))
    # Densities that have a scale in common share its low-passes, and its parameter.
    rows = {scale: number for number, scale in enumerate(dict.fromkeys(scales), 1)}
    longest = {scale: max(n for n, other in zip(shapes, scales) if other == scale) for scale in rows}
    states = [f"bold_{row}_{n}" for scale, row in rows.items() for n in range(1, longest[scale] + 1)]

    def low_passes(s, p):
        active = units.scaled({**vars(s), **base.observe(s, p)}[source], back)
        rates = {}
        for scale, row in rows.items():
            above = p.bold_gain * (active - p.bold_rest)
            for n in range(1, longest[scale] + 1):
                here = getattr(s, f"bold_{row}_{n}")
                rates[f"bold_{row}_{n}"] = (above - here) / (getattr(p, f"bold_scale_{row}") * second)
                above = here
        return rates

    def signal(s, p):
        parts = enumerate(zip(shapes, scales), 1)
        return sum(getattr(p, f"bold_weight_{k}") * getattr(s, f"bold_{rows[scale]}_{n}") for k, (n, scale) in parts)

    defaults = {
        "bold_gain": units.attach(1.0, units.UNITLESS / unit),
        "bold_rest": units.attach(0.0, unit),
        **{f"bold_scale_{row}": scale * u.second for scale, row in rows.items()},
        **{f"bold_weight_{k}": weight for k, weight in enumerate(weights, 1)},
    }
    body = {
        "__doc__": f"`{base.__name__}` with ``{source}`` convolved with a haemodynamic response.",
        "__reduce__": remade(_convolved, base, source, weights, shapes, scales),
        "states": {**base.states, **dict.fromkeys(states, units.UNITLESS)},
        "as_declared": (*base.as_declared, *defaults),
    }
    return _with_signal(base, defaults, low_passes, signal, body)


def _with_signal(base: type[Model], defaults: dict[str, Any], rates, signal, body: dict[str, Any]) -> type[Model]:
    """The class of a model with more states, from their rates and the observable ``bold``."""
    if issubclass(base, SecondOrderModel):
        # `SecondOrderModel.drift` takes the drive from the class that calls it.
        drift = classmethod(lambda cls, s, p, i: {**base.drift.__func__(cls, s, p, i), **rates(s, p)})
    else:
        drift = staticmethod(lambda s, p, i: {**base.drift(s, p, i), **rates(s, p)})
    common = {
        "__annotations__": dict.fromkeys(defaults, Any),
        "__module__": base.__module__.partition(".")[0],
        **defaults,
        "observables": {**base.observables, "bold": units.UNITLESS},
        "drift": drift,
        "observe": staticmethod(lambda s, p: {**base.observe(s, p), "bold": signal(s, p)}),
        "diffusion": staticmethod(lambda s, p: base.diffusion(s, p)),
    }
    return model(type(base.__name__, (base,), {**common, **body}))
