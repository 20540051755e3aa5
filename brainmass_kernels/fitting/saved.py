"""Fits as JSON: finished ones, and checkpoints of running ones."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from .. import files, identity, models, routing, spectra, stimuli, units
from ..models.base import Model
from ..network import Network, parts_of
from ..notices import warn
from ..spectra import PowerSpectrum
from ..waveforms import of_kinds
from . import sensors, targets
from .cross import CrossSpectrum
from .dynamics import ConnectivityDynamics
from .joint import Joint
from .problem import Free, Problem, fingerprint
from .steps import Gradient, Normal, State, begin, optimiser_identity

_FORMAT = ("brainmass_kernels.Fit", 2)
_UNDER_WAY = "brainmass_kernels.Fit under way"
_SAVED, _CHECKPOINT = "a fit saved by this brainmass_kernels", "a checkpoint of a fit"
#: Seconds between two checkpoints for each that one takes to write.
_APART = 10.0
_REMEDY = "take a copy of it, or fit again"


def plain_state(state: State) -> dict[str, Any]:
    return jax.tree.map(np.asarray, state._replace(moments=jax.tree.leaves(state.moments))._asdict())


def restore(problem: Problem, saved: Mapping[str, Any], optimiser) -> State:
    put = lambda tree: {name: jnp.asarray(value) for name, value in tree.items()}  # noqa: E731
    z = put(saved["z"])
    dtype = jnp.result_type(float)
    fresh, treedef = jax.tree.flatten(begin(problem, z, optimiser).moments)
    if [np.shape(leaf) for leaf in fresh] != [np.shape(leaf) for leaf in saved["moments"]]:
        raise ValueError(
            "'optimiser' is another than the one that the resumed fit was made with, whose state it cannot continue: "
            "give the fit as starts=, and it begins at the best values of that fit"
        )
    moments = [jnp.asarray(value, like.dtype) for value, like in zip(saved["moments"], fresh)]
    best, alive = jnp.asarray(saved["best"], dtype), jnp.asarray(saved["alive"], int)
    return State(z, treedef.unflatten(moments), put(saved["best_z"]), best, put(saved["first"]), alive)


def check_same(saved, saved_free, saved_target, settings, problem: Problem, argument: str) -> None:
    """Raise ValueError unless a saved fit, by its settings, free quantities and target, is the present one."""
    if saved.get("predict") != settings.get("predict"):
        said = [each.get("predict", targets.SIMULATION) for each in (saved, settings)]
        raise ValueError(f"'{argument}' got a fit with predict = {said[0]!r}, but this call has {said[1]!r}")
    same_programs = compare_programs(saved.get("program"), settings["program"], argument)
    ours = settings | {"free": [(f.name, f.low, f.high) for f in problem.frees]}
    theirs = saved | {"free": [(f.name, f.low, f.high) for f in saved_free]}
    # Functions are compared by what they compute, by name only if that is not known.
    for name in [n for n in ours if n != "program" and not (same_programs and n == "function")]:
        if name not in theirs:
            raise ValueError(f"'{argument}' got a fit to another target")
        if ours[name] != theirs[name]:
            raise ValueError(f"'{argument}' got a fit with {name} = {theirs[name]}, but this call has {ours[name]}")
    if not callable(problem.comparison.target) and not problem.comparison.same(saved_target):
        raise ValueError(f"'{argument}' got a fit to another target")


def compare_programs(theirs: Mapping[str, str] | None, ours: Mapping[str, str], argument: str) -> bool:
    """Whether two fits are known to compute the same; ValueError if they do not, a warning if it is not known."""
    if theirs is None:
        why = "was saved by an earlier version, which kept no trace of the programs"
    else:
        versions = identity.versions()
        programs = ({n: x for n, x in digests.items() if n not in versions} for digests in (theirs, ours))
        differing = identity.difference(*programs)
        if not differing:
            return True
        other = [f"{n} {theirs.get(n)}, not {ours[n]}" for n in versions if theirs.get(n) != ours[n]]
        if not other:
            raise ValueError(f"'{argument}' got another fit. What differs: {differing}")
        why = f"was made with {', '.join(other)}, which traces other programs ({differing})"
    warn(f"'{argument}' got a fit that {why}: whether the model's equations are the same is not known", UserWarning)
    return False


class Checkpoint:
    """The file of a running fit, from which the same fit resumes.

    Parameters
    ----------
    path : of the file
    problem, settings, optimiser : of the fit
    shared : whether several processes share the fit: the first writes the file, and all read it
    call : the other arguments that decide its steps, ready for JSON
    """

    def __init__(self, path: str, problem: Problem, settings: dict[str, Any], optimiser, call: dict[str, Any], shared):
        self.path, self.problem, self.settings, self.optimiser, self.call = path, problem, settings, optimiser, call
        self.shared = shared
        self._written, self._seconds = 0.0, 0.0

    @classmethod
    def of(
        cls, path, problem: Problem, settings, optimiser, starts, screen: int, clip: float, prune: int, shared=False
    ):
        """``None`` without a path."""
        if path is None:
            return None
        call: dict[str, Any] = {"screen": int(screen), "clip": float(clip), "prune": int(prune)}
        if isinstance(starts, Mapping):
            values = {f.name: targets.plain(starts[f.name], f.unit, f"starts: {f.name!r}") for f in problem.frees}
            call["starts"] = {name: fingerprint(x) for name, x in values.items()}
        else:
            call["starts"] = int(starts)
        call["optimiser"] = optimiser_identity(problem, optimiser)
        return cls(path, problem, settings, optimiser, call, shared)

    def write(self, state: State, history: list, part: Gradient | Normal | None = None) -> None:
        """Write the state of the fit, in at most a tenth of the time.

        Parameters
        ----------
        part : of the step that follows, what was evaluated of its first targets
        """
        if self.shared and jax.process_index() > 0:
            return
        if time.perf_counter() - self._written < _APART * self._seconds:
            return
        began = time.perf_counter()
        about = {"format": _UNDER_WAY, "settings": self.settings, "call": self.call}
        about |= {"free": _encode_free(self.problem.frees), "target": encode_target(self.problem.comparison.target)}
        about |= {"state": jax.tree.map(listed, plain_state(state)), "losses": [listed(row) for row in history]}
        about |= {} if part is None else {"part": jax.tree.map(listed, part._asdict())}
        files.write_document(self.path, about)
        self._written = time.perf_counter()
        self._seconds = self._written - began

    def read(self) -> tuple[State | None, list, Gradient | Normal | None]:
        """The state, the history and the part of the file; ``None`` and no history if there is no file."""
        state, history, part = self._read() if os.path.exists(self.path) else (None, [], None)
        if self.shared:
            read = process_allgather(np.array([len(history), 0 if part is None else len(part.error)]))
            if (read != read[0]).any():
                raise ValueError(
                    f"'checkpoint' got {self.path}, of which the processes of this fit read {read[:, 0].tolist()} "
                    "steps, but takes one file that all of them see"
                )
        return state, history, part

    def _read(self) -> tuple[State, list, Gradient | Normal | None]:
        remedy, comparison = "delete it, and the fit begins anew", self.problem.comparison
        saved = _read(self.path, "checkpoint", _CHECKPOINT, remedy)
        if saved.get("format") != _UNDER_WAY:
            name = os.path.basename(os.fspath(self.path))
            raise ValueError(f"'checkpoint' got {name}, which is no checkpoint of a fit")
        with files.damaged(self.path, _CHECKPOINT, remedy):
            free = [Free(f["name"], f["low"], f["high"], None) for f in saved["free"]]
            target = _decode_target(saved["target"]) if saved["target"]["kind"] != "function" else comparison.target
            state, losses, settings = _decode_state(saved["state"]), saved["losses"], dict(saved["settings"])
            part = _decode_part(saved.get("part"))
            # Files of earlier versions have no "call".
            call = saved.get("call", {})
            if not call and isinstance(self.call["starts"], int):
                call = {"starts": len(losses[0][0])}
        check_same(settings, free, target, self.settings, self.problem, "checkpoint")
        for name, value in call.items():
            if value != self.call[name]:
                raise ValueError(f"'checkpoint' got a fit with {name} = {value}, but this call has {self.call[name]}")
        return restore(self.problem, state, self.optimiser), [*array(losses)], part


def _read(path, argument: str, what: str, remedy: str) -> dict[str, Any]:
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"'{argument}' got {path}, but there is no file of that name")
    with files.damaged(path, what, remedy):
        return files.read_document(path)


def load(path, model) -> dict[str, Any]:
    """The fields of a saved `Fit`; see `Fit.load`."""
    saved = _read(path, "resume", _SAVED, _REMEDY)
    with files.damaged(path, _SAVED, _REMEDY):
        form = (saved["format"], saved["version"])
        if form != _FORMAT:
            raise KeyError(f"{form} is not {_FORMAT}")
        name, fixed, values = saved["settings"]["model"], saved["settings"]["fixed"], saved["values"]
        is_network = any(name.rpartition(".")[2] == "link" for name in fixed)
        drives = of_kinds(saved.get("stimuli", {}))
    kind = _kind_of(name, is_network, values, model, drives)
    with files.damaged(path, _SAVED, _REMEDY):
        return decode(saved, kind, parts_of(model)[0])


def encode(fit) -> dict[str, Any]:
    def quantity(name: str, value, unit):
        return {"value": listed(units.strip(value, unit, name)), "unit": str(unit)}

    known = routing.quantities(fit.model, fit.inputs, fit.noise)
    kinds = stimuli.kinds_of(fit.inputs)
    of_kinds(kinds)  # which refuses those that a file cannot hold
    return {
        "format": _FORMAT[0],
        "version": _FORMAT[1],
        "parameters": {f.name: quantity(f.name, fit.parameters[f.name], f.unit) for f in fit.free},
        "rms": listed(fit.rms),
        "initial_rms": listed(fit.initial_rms),
        "implementation": fit.implementation,
        "reason": fit.reason,
        "seconds": round(fit.seconds, 3),
        "free": _encode_free(fit.free),
        "settings": fit.settings,
        "values": {name: quantity(name, x, unit) for name, (unit, x) in known.items() if _has_value(fit, name)},
        **({"stimuli": kinds} if kinds else {}),
        "best_start": listed(fit.best_start),
        "nuisance": {name: listed(value) for name, value in fit.nuisance.items()},
        **{name: encode_target(getattr(fit, name)) for name in ("target", "prediction", "initial_prediction")},
        "losses": listed(np.round(fit.losses, 6)),
        "state": jax.tree.map(listed, fit.state),
    }


def _encode_free(frees):
    return [{"name": f.name, "low": f.low, "high": f.high} for f in frees]


def _decode_state(state):
    return {
        **{key: {k: np.array(v) for k, v in state[key].items()} for key in ("z", "best_z", "first")},
        "best": array(state["best"], np.inf),
        "alive": np.array(state["alive"], int),
        "moments": [np.array(leaf) for leaf in state["moments"]],
    }


def _decode_part(saved) -> Gradient | Normal | None:
    """What was evaluated of an interrupted step."""
    if saved is None:
        return None
    dtype = jnp.result_type(float)

    def values(name: str, x):
        return array(x, np.inf if name in ("error", "total") else np.nan).astype(dtype)

    part: Any = {
        name: {of: values(name, y) for of, y in x.items()} if isinstance(x, dict) else values(name, x)
        for name, x in saved.items()
    }
    return Normal(**part) if "normal" in part else Gradient(**part)


def _has_value(fit, name: str) -> bool:
    """Whether a file has this quantity: inputs and intensities of noise only if the fit has them."""
    if name.startswith(routing.NOISE):
        return name.removeprefix(routing.NOISE) in fit.noise
    return name in fit.inputs or name not in parts_of(fit.model)[1].inputs


def encode_target(target) -> dict[str, Any]:
    """A target or a prediction."""
    if isinstance(target, PowerSpectrum):
        powers = listed(np.log10(target.power))
        how = {"compare": target.compare} if target.linear else {}
        return {"kind": "spectra", "name": target.name, "freqs_hz": listed(target.freqs), "log10_power": powers, **how}
    if isinstance(target, targets.TimeSeries):
        fields = {name: getattr(target, name) for name in ("scale", "offset", "name")}
        sigma = None if target.sigma is None else listed(u.get_magnitude(target.sigma))
        more = {"channels": list(target.channels), "of": sensors.encode(target.of), "missing": target.missing}
        before = target.baseline
        more["baseline_s"] = None if before is None else units.positive_time(before, u.second, "baseline")
        return {"kind": "series", **fields, "values": listed(u.get_magnitude(target.values)), "sigma": sigma,
                "unit": str(u.get_unit(target.values)), **more}  # fmt: skip
    if isinstance(target, targets.Connectivity):
        band = None if target.band is None else [float(spectra.in_hertz(edge, "band")) for edge in target.band]
        return {"kind": "connectivity", "name": target.name, "values": listed(target.values), "band": band,
                "sigma": target.sigma}  # fmt: skip
    if isinstance(target, ConnectivityDynamics):
        return {"kind": "dynamics", "name": target.name, "values": listed(target.values), "times_s": [*target.seconds],
                "sigma": target.sigma}  # fmt: skip
    if isinstance(target, CrossSpectrum):
        parts = {"real": listed(target.values.real), "imaginary": listed(target.values.imag)}
        lead = None if target.lead_field is None else listed(target.lead_field)
        return {"kind": "cross-spectra", "name": target.name, "freqs_hz": listed(target.freqs), **parts,
                "compare": target.compare, "lead_field": lead, "sigma": target.sigma}  # fmt: skip
    if isinstance(target, Joint):
        every = {name: encode_target(each) for name, each in target.targets.items()}
        return {"kind": "joint", "name": target.name, "targets": every, "weights": target.weights}
    if callable(target):
        return {"kind": "function", "name": targets.name_of(target)}
    return {"kind": "values", "values": listed(target)}


def _decode_target(saved, unit=None, checked: bool = True) -> Any:
    """The inverse of `encode_target`; a prediction is not ``checked`` as a target is."""
    kind = saved["kind"]
    if kind == "spectra":
        freqs, power = np.array(saved["freqs_hz"]), 10 ** np.array(saved["log10_power"])
        fields = {"name": saved["name"], "compare": saved.get("compare", "log")}
        if not checked:
            return targets.unchecked(PowerSpectrum, freqs=freqs, power=power, **fields)
        return PowerSpectrum(freqs, power, **fields)
    if kind == "series":
        unit = units.UNITLESS if unit is None else unit
        values, sigma = units.attach(array(saved["values"]), unit), saved["sigma"]
        # Files of earlier versions have none of these.
        channels, missing = tuple(saved.get("channels", ())), saved.get("missing", "error")
        if not checked:
            return targets.unchecked(targets.TimeSeries, values=values, channels=channels)
        sigma = None if sigma is None else units.attach(np.array(sigma), unit)
        more = {"channels": channels, "of": sensors.decode(saved.get("of")), "missing": missing}
        before = saved.get("baseline_s")
        more["baseline"] = None if before is None else before * u.second
        return targets.TimeSeries(values, sigma, saved["scale"], saved["offset"], saved["name"], **more)
    if kind == "connectivity":
        band = None if saved["band"] is None else tuple(saved["band"])
        if not checked:
            return targets.unchecked(
                targets.Connectivity, values=array(saved["values"]), band=band, sigma=saved["sigma"]
            )
        return targets.Connectivity(np.array(saved["values"]), band, saved["sigma"], saved["name"])
    if kind == "dynamics":
        window, step = (x * u.second for x in saved["times_s"])
        if not checked:
            fields = {"window": window, "step": step, "sigma": saved["sigma"]}
            return targets.unchecked(ConnectivityDynamics, values=array(saved["values"]), **fields)
        return ConnectivityDynamics(np.array(saved["values"]), window, step, saved["sigma"], saved["name"])
    if kind == "cross-spectra":
        fields = {"freqs": np.array(saved["freqs_hz"]), "values": array(saved["real"]) + 1j * array(saved["imaginary"])}
        lead = None if saved["lead_field"] is None else np.array(saved["lead_field"])
        fields |= {"compare": saved["compare"], "lead_field": lead, "sigma": saved["sigma"]}
        return CrossSpectrum(**fields, name=saved["name"]) if checked else targets.unchecked(CrossSpectrum, **fields)
    if kind == "joint":
        unit = unit or {}
        every = {name: _decode_target(each, unit.get(name), checked) for name, each in saved["targets"].items()}
        if not checked:
            return targets.unchecked(Joint, targets=every, weights=saved["weights"])
        return Joint(every, saved["weights"], saved["name"])
    if kind == "function":
        return _Absent(saved["name"])
    return np.array(saved["values"])


class _Absent(NamedTuple):
    """The function to which a saved fit was; the file has its name alone."""

    name: str

    def __call__(self, result):
        raise TypeError(f"'target' was the function {self.name}, which a saved fit does not hold")


def listed(array):
    """Nested lists; None stands for numbers that JSON lacks."""
    array = np.asarray(array)
    if np.isfinite(array).all():
        return array.tolist()
    if array.ndim:
        return [listed(row) for row in array]
    return None if not np.isfinite(array) else array.item()


def array(nested, missing=np.nan) -> np.ndarray:
    return np.nan_to_num(np.array(nested, float), nan=missing, posinf=np.inf, neginf=-np.inf)


def _kind_of(name: str, is_network: bool, values: Mapping[str, Any], model, drives) -> type[Model]:
    """The class of the model of a saved fit.

    Parameters
    ----------
    name : of that class
    is_network : whether the fit is of a network
    values : the fit's values of the model by name, with units
    model : the argument of `Fit.load`
    drives : its inputs that have stimuli
    """
    network, mass = parts_of(model)
    kind: Any = type(mass) if type(mass).__name__ == name else getattr(models, name, None)
    got = f"'model' got {type(model).__name__}"
    if kind is None:
        raise ValueError(f"{got}, but the saved fit is of {name}; give a {name}")
    if is_network and network is None:
        raise ValueError(f"{got}, but the saved fit is of a network of {name}; give that")
    known = routing.places(network or kind, drives)
    if unknown := [n for n in values if n not in known]:
        raise ValueError(f"{got}, but the saved fit is of a {name} that has {', '.join(unknown)}; give that")
    for n, x in values.items():
        if _factor(x["unit"], known[n]) is None:
            raise ValueError(f"{got}, whose {n} is in {known[n].unit}, but the saved fit has it in {x['unit']}")
    return kind


def _factor(text: str, place: routing.Place) -> float | None:
    """The factor from a saved unit to a place's unit; ``None`` if they do not match.

    Earlier versions saved intensities of noise per root of a second, whatever the model's unit of time.
    """
    if units.reads(text, place.unit):
        return 1.0
    if place.kind != "noise":
        return None
    try:
        unit = units.parsed(text)
    except ValueError:
        return None
    return float(u.Quantity(1.0, unit=unit).to_decimal(place.unit)) if unit.dim == place.unit.dim else None


def decode(saved: dict[str, Any], kind: type[Model], network: Network | None) -> dict[str, Any]:
    empty: Any = network.replace(model=kind()) if network else kind()
    drives = of_kinds(saved.get("stimuli", {}))
    places = routing.places(empty, drives)
    factors = {n: _factor(x["unit"], places[n]) for n, x in {**saved["values"], **saved["parameters"]}.items()}

    def quantity(name: str, value):
        value = np.array(value)
        return units.attach(value if factors[name] == 1.0 else value * factors[name], places[name].unit)

    values = {n: quantity(n, x["value"]) for n, x in saved["values"].items()}
    fitted, inputs, noise = routing.put(empty, drives, {}, values)
    fixed = saved["settings"]["fixed"]
    for n in fixed:
        if factors.get(n, 1.0) != 1.0 and not isinstance(fixed[n], str):
            fixed[n] = (np.array(fixed[n]) * factors[n]).tolist()
    free = [(f["name"], f["low"], f["high"], factors[f["name"]]) for f in saved["free"]]
    mass = parts_of(fitted)[1]
    record = saved["settings"].get("record")

    def unit_of(target, record):
        if target["kind"] == "joint":
            return {name: unit_of(each, record[name]) for name, each in target["targets"].items()}
        if target["kind"] != "series":
            return None
        known, text = mass.recordable()[record], target["unit"]
        return known if units.reads(text, known) else units.parsed(text)

    unit = unit_of(saved["target"], record)
    return dict(
        parameters={n: quantity(n, x["value"]) for n, x in saved["parameters"].items()},
        model=fitted,
        inputs=inputs,
        noise=noise,
        losses=array(saved["losses"]),
        best_start=np.array(saved["best_start"]),
        nuisance={key: array(value, -np.inf) for key, value in saved["nuisance"].items()},
        free=tuple(Free(n, low * by, high * by, places[n].unit) for n, low, high, by in free),
        state=_decode_state(saved["state"]),
        **{key: array(saved[key]) for key in ("rms", "initial_rms")},
        target=_decode_target(saved["target"], unit),
        **{key: _decode_target(saved[key], unit, checked=False) for key in ("prediction", "initial_prediction")},
        **{key: saved[key] for key in ("settings", "implementation", "reason", "seconds")},
    )
