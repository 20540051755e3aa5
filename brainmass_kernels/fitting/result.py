"""What a fit returns, and what follows from it: standard errors, profiles, figures, tables, its file."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np

from .. import files, spectra, units
from ..extras import needs
from ..interrupts import heard
from ..models.base import check_name
from ..spectra import Spectrum
from . import saved, targets
from .problem import Free, Pooling, Problem, measured, predict
from .steps import Plan, begin, default_optimiser, descend, joint_normal_equations, normal_equations_at


class Profile(NamedTuple):
    """The lowest error along one parameter, all others fitted again at each of its values.

    Attributes
    ----------
    name : of the parameter
    values : Quantity ``(points,)``
    rms : ``(n, points)``
    """

    name: str
    values: Any
    rms: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Fit:
    """What `fit` found. Arrays lead with the targets, n; a lane is one (target, start).

    Attributes
    ----------
    parameters : name to Quantity ``(n,)``, the best start of each target; ``(n, N)`` of what each region has its own
    model, inputs, noise : what was fitted, with those values put in: `simulate` takes them as they are
    rms, initial_rms : ``(n,)`` error of the fit and of start 0 (the model as it was given, unless starts were given),
        on noise the optimiser has not seen: rms of log10 power over the band, of samples in standard deviations, of
        correlations; of a function of one's own what it returned, or the mean square of its residuals
    losses : ``(steps, n, starts)`` the same error step by step, on the noise of the fit; NaN where a lane diverged or
        was left
    best_start : ``(n,)`` which start was the best
    prediction, initial_prediction : as the target, of the fit and of start 0, with what was solved for put in
    nuisance : name to ``(n,)``, what was solved for: of spectra log10 of the scale and of the background, and its
        exponent chi; of series the scale and the offset
    target : what was fitted; of spectra those within the band
    implementation, reason : which backend ran, and why
    seconds : wall time of the fit, compilation included
    """

    parameters: dict[str, Any]
    model: Any
    inputs: dict[str, Any]
    noise: dict[str, Any]
    rms: np.ndarray
    initial_rms: np.ndarray
    losses: np.ndarray
    best_start: np.ndarray
    prediction: Any
    initial_prediction: Any
    nuisance: dict[str, np.ndarray]
    target: Any
    free: tuple[Free, ...]
    settings: dict[str, Any]
    state: dict[str, Any] = dataclasses.field(repr=False)
    implementation: str = ""
    reason: str = ""
    seconds: float = 0.0
    problem: Problem | None = dataclasses.field(default=None, repr=False)

    @property
    def name(self) -> str:
        """Of the target."""
        return targets.name_of(self.target)

    @property
    def spectrum(self) -> Spectrum:
        """The fitted spectra, nuisances included."""
        return self._spectral("spectrum", self.prediction)

    @property
    def initial_spectrum(self) -> Spectrum:
        """The spectrum of the first start, before it was fitted."""
        return self._spectral("initial_spectrum", self.initial_prediction)

    def _spectral(self, name: str, prediction) -> Spectrum:
        if not isinstance(prediction, Spectrum):
            raise TypeError(f"'{name}' is of fits to spectra, but this one is to {self.name}: see 'prediction'")
        return prediction

    @property
    def peaks(self) -> tuple[np.ndarray, np.ndarray]:
        """Alpha peak of the target and of the fit, Hz (n,) each."""
        return tuple(spectra.alpha_peak(s.freqs, s.power) for s in (self.target, self.spectrum))  # type: ignore

    def __str__(self) -> str:
        n, steps, starts = self.losses.shape[1], len(self.losses), self.losses.shape[2]
        spectral = isinstance(self.target, Spectrum)
        what = f"spectr{'a' if n > 1 else 'um'}" if spectral else f"target{'s' if n > 1 else ''}"
        lines = [
            f"{self.settings['model']} fitted to {self.name}: {n} {what}, {starts} starts, {steps} steps, "
            f"{self.seconds:.1f} s on {self.implementation}",
            "",
            _row("", "fitted", "bounds"),
        ]
        for free in self.free:
            value = np.asarray(units.strip(self.parameters[free.name], free.unit, free.name))
            lines.append(_row(free.name, _spread(value.ravel(), free.unit), f"{free.low:g} to {free.high:g}"))
        error = "rms error, log10 power" if spectral else "error"
        lines += ["", _row(error, _spread(self.rms), f"as given {_spread(self.initial_rms)}")]
        if spectral:
            target, fitted = self.peaks
            lines.append(_row("alpha peak", _spread(fitted, "Hz"), f"target {_spread(target, 'Hz')}"))
        if self.settings.get("background"):
            lines.append(_row("background 1/f^chi", _spread(self.nuisance["chi"]), ""))
        lines += [_row(name, _spread(x), "") for name, x in self.nuisance.items() if not spectral]
        return "\n".join(line.rstrip() for line in lines)

    # --- what follows from a fit ---

    def standard_errors(self) -> dict[str, Any]:
        """The standard error of each parameter, Quantity ``(n,)``, from the curvature at the fit.

        ``s**2 inv(J'J)`` with the Jacobian J of the residuals, carried in the loop, and their variance s**2; what was
        solved for follows, and priors count as data. It takes residuals for independent: of spectra whose segments
        overlap, or of samples closer than the noise's memory, the errors are larger.

        Raises
        ------
        TypeError : of networks, and of functions that return no residuals
        """
        problem = self._again()
        found = normal_equations_at(problem, self._best(), problem.keys(self._key()), problem.comparison.data)
        normal, place = found.normal, None
        if problem.pooling.shared:
            normal, _, place = joint_normal_equations(problem, normal, found.slope)
        unknown = np.shape(normal)[-1]
        count = int(found.count) * (len(found.error) if place is not None else 1)
        error = np.asarray(found.error, float)[:, 0]
        error = error.mean(keepdims=True) if place is not None else error
        variance = error * count / max(count - unknown, 1) / int(found.count)
        inverse = np.linalg.pinv(np.asarray(normal, float)[:, 0], hermitian=True)
        z_error = np.sqrt(variance[:, None] * np.einsum("nii->ni", inverse))
        z_error = z_error[0][place] if place is not None else z_error
        z, result = self._best(), {}
        for p, free in enumerate(self.free):
            slope = np.broadcast_to(np.asarray(free.slope(z[free.name]))[:, 0], len(z_error))
            result[free.name] = units.attach(np.abs(slope) * z_error[:, p], free.unit)
        return result

    @heard
    def profile(self, name: str, values: Any = 11, *, steps: int = 20) -> Profile:
        """The lowest error at each of some values of one parameter, all others fitted again from the fit.

        A valley that stays low over a wide range is of a parameter that the target does not determine.

        Parameters
        ----------
        name : of a free parameter that is not each region's own
        values : the values, or how many between the bounds
        steps : most optimiser steps
        """
        problem = self._again()
        frees = {f.name: f for f in self.free}
        check_name(name, frees, "free parameter")
        if name in problem.pooling.regional:
            raise ValueError(f"'name' got {name!r}, which each region has its own of: a profile is along one value")
        free = frees[name]
        if isinstance(values, int):
            position = np.linspace(0.02, 0.98, values)
            values = np.asarray(free.value(jnp.asarray(np.log(position / (1 - position)))))
        else:
            values = np.atleast_1d(np.asarray(targets.plain(values, free.unit, "values"), float))
        z = {f: jnp.repeat(x, len(values), 1) for f, x in self._best().items()}
        along = jnp.asarray(free.z(values, "'values'"), z[name].dtype)
        z[name] = jnp.broadcast_to(along, z[name].shape)
        problem = dataclasses.replace(problem, pooling=problem.pooling._replace(frozen=(name,)))
        if len(frees) == 1:
            error = measured(problem, predict(problem, z, problem.keys(self._key())), problem.comparison.data)[0]
        else:
            plan = Plan(default_optimiser(problem), steps, patience=steps)
            state = begin(problem, z, plan.optimiser)
            error = descend(problem, plan, state, [], self._key()).best
        return Profile(name, units.attach(values, free.unit), problem.comparison.measure(error))

    def places(self) -> dict[str, Any]:
        """The best place of each start, name to Quantity ``(n, starts)``, in the order of their number."""
        found = {}
        for free in self.free:
            value = np.asarray(free.value(jnp.asarray(self.state["best_z"][free.name])))
            if value.ndim > 2:
                raise ValueError(f"'starts' got a fit in which each region has its own {free.name}")
            shape = (len(self.best_start), value.shape[1])
            found[free.name] = units.attach(np.broadcast_to(value, shape), free.unit)
        return found

    def plot(self, path: str | os.PathLike | None = None):
        """Target, start and fit as a matplotlib ``Figure``, written to ``path`` where one is given."""
        from .. import plots

        page = plots.figure(self)
        if path is not None:
            plots.save(page, path)
        return page

    def to_dataframe(self):
        """A row for each target: parameters with their units in the columns' names, errors, nuisances."""
        pandas = needs("pandas")
        columns: dict[str, Any] = {}
        for free in self.free:
            value = np.asarray(units.strip(self.parameters[free.name], free.unit, free.name))
            label = free.name if free.unit.is_unitless else f"{free.name} ({free.unit})"
            named = {label: value} if value.ndim == 1 else {f"{label} of {i}": x for i, x in enumerate(value.T)}
            columns |= named
        columns |= {"rms": self.rms, "initial_rms": self.initial_rms, "best_start": self.best_start, **self.nuisance}
        if isinstance(self.target, Spectrum):
            columns |= dict(zip(("target_peak (Hz)", "fitted_peak (Hz)"), self.peaks))
        return pandas.DataFrame(columns)

    def _key(self):
        return jax.random.wrap_key_data(jnp.asarray(self.settings["key"], jnp.uint32))

    def _best(self) -> dict[str, jax.Array]:
        """z of the best start of each target, one start a target."""
        alive, best = np.asarray(self.state["alive"], int), self.best_start
        at = np.argmax(alive == best[:, None], 1)
        rows = {name: np.asarray(x) for name, x in self.state["best_z"].items()}
        return {name: jnp.asarray(x[np.arange(len(x)), at[: len(x)]][:, None]) for name, x in rows.items()}

    def _again(self) -> Problem:
        """The problem that was fitted."""
        if self.problem is not None:
            return self.problem
        if callable(self.target):
            raise TypeError("'target' was a function, which a saved fit does not hold: go on with it by resume=")
        held = self.settings
        options = {name: held[name] * u.second for name in ("duration", "dt", "transient")}
        options |= {"every": held["every"], "scheme": held["scheme"], "implementation": None}
        pooling = Pooling.of_saved(held["ties"])
        record = held["record"]
        comparison = targets.compare(self.target, self.model, record, options, held.get("band"), held.get("background"))
        given = self.model, self.inputs, self.noise
        problem = Problem(*given, self.free, comparison, held["realisations"], record, options, pooling)
        theirs, ours = held.get("program", {}), problem.program(1, self._key())
        # In another precision every program is another.
        if theirs.get("dtype") == ours["dtype"]:
            saved.compare_programs(theirs, ours, "model")
        return problem

    # --- files ---

    def save(self, path: str | os.PathLike) -> None:
        """Write the fit, and what `fit` needs to go on with it, as JSON: whole or not at all, with a checksum."""
        files.write_document(path, saved.encode(self))

    @classmethod
    def load(cls, path: str | os.PathLike, model=None) -> Fit:
        """Read what `save` wrote.

        Parameters
        ----------
        path : of the file
        model : any instance of the model's class where it is not one of this package; of a network, itself

        Raises
        ------
        FileNotFoundError, ValueError
            where there is no such file, it is not a saved fit, or damaged, or the model is not that of the fit
        """
        return cls(**saved.load(path, model))

    def check_same(self, problem: Problem, settings: Mapping[str, Any], starts: int) -> None:
        """Raise ValueError unless a problem is that of this fit, which is resumed with so many starts."""
        saved.check_same(self.settings, self.free, self.target, settings, problem, "resume")
        if (held := self.losses.shape[2]) != starts:
            raise ValueError(f"'resume' got a fit with starts = {held}, but this call has {starts}")


def _row(name: str, value: str, note: str) -> str:
    return f"  {name:<24}{value:<36}{note}"


def _spread(values, unit="") -> str:
    """One value, or the median and the range of several."""
    unit = "" if str(unit) in ("", "1") else f" {unit}"
    if len(values) == 1:
        return f"{values[0]:.4g}{unit}"
    return f"{np.median(values):.4g} ({np.min(values):.3g} to {np.max(values):.3g}){unit}"
