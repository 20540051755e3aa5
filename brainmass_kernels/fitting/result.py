"""The result of a fit: parameters, standard errors, profiles, figures, tables, its file."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np

from .. import display, files, spectra, units
from ..errors import check_counts
from ..extras import needs
from ..interrupts import interruptible
from ..models.base import check_name
from ..spectra import PowerSpectrum
from . import saved, targets
from .division import divide, over_devices
from .problem import Free, Pooling, Problem, logit, measured, predict
from .steps import LEVENBERG_MARQUARDT, Plan, begin, default_optimiser, descend, evaluated, joint_normal_equations


class Profile(NamedTuple):
    """The lowest error along one parameter, with all others refitted at each of its values.

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
    """The result of `fit`. The first axis of arrays is the targets, n; a lane is one (target, start).

    Attributes
    ----------
    parameters : name to Quantity ``(n,)``, of the best start of each target; ``(n, N)`` for regional parameters
    model, inputs, noise : with those values, as arguments of `simulate`
    rms, initial_rms : ``(n,)`` error of the fit and of start 0 (the model's values, unless starts were given), on noise
        that the steps did not use: rms of log10 power over the band, of power or samples in standard deviations, or of
        correlations; of a user's function what it returns, or the mean square of its residuals
    losses : ``(steps, n, starts)`` the same error step by step, on the noise of the fit; NaN where a lane diverged or
        was dropped
    best_start : ``(n,)`` the number of the best start
    prediction, initial_prediction : of the fit and of start 0, in the form of the target, nuisances included
    nuisance : name to ``(n,)``: of spectra log10 of the scale and of the background, and its exponent chi; of series
        the scale and the offset
    target : the user's; spectra are cut to the band
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
    def spectrum(self) -> PowerSpectrum:
        """The fitted spectra, nuisances included."""
        return self._spectral("spectrum", self.prediction)

    @property
    def initial_spectrum(self) -> PowerSpectrum:
        """The spectra of start 0."""
        return self._spectral("initial_spectrum", self.initial_prediction)

    def _spectral(self, name: str, prediction) -> PowerSpectrum:
        if not isinstance(prediction, PowerSpectrum):
            raise TypeError(f"'{name}' is of fits to spectra, but this one is to {self.name}: see 'prediction'")
        return prediction

    @property
    def peaks(self) -> tuple[np.ndarray, np.ndarray]:
        """Alpha peaks of the target and of the fit, Hz (n,) each."""
        return tuple(spectra.alpha_peak(s.freqs, s.power) for s in (self.target, self.spectrum))  # type: ignore

    def __str__(self) -> str:
        lines = [self._title(), "", _row("", "fitted", "bounds")]
        parameters, measures = self._rows()
        lines += [_row(*row) for row in parameters] + [""] + [_row(*row) for row in measures]
        return "\n".join(line.rstrip() for line in lines)

    def __repr__(self) -> str:
        n, (steps, _, starts) = len(self.rms), self.losses.shape
        names = ", ".join(f.name for f in self.free)
        return (
            f"Fit({names} of {self.settings['model']} to {self.name}{f' ({n})' if n > 1 else ''}: rms "
            f"{_spread(self.rms)}, as given {_spread(self.initial_rms)}; {starts} starts, {steps} steps)"
        )

    def _repr_html_(self) -> str:
        parameters, measures = self._rows()
        return display.table(self._title(), ("", "fitted", "bounds"), [*parameters, *measures])

    def _title(self) -> str:
        n, steps, starts = self.losses.shape[1], len(self.losses), self.losses.shape[2]
        many = "spectra" if n > 1 else "spectrum"
        what = many if isinstance(self.target, PowerSpectrum) else f"target{'s' if n > 1 else ''}"
        return (
            f"{self.settings['model']} fitted to {self.name}: {n} {what}, {starts} starts, {steps} steps, "
            f"{self.seconds:.1f} s on {self.implementation}"
        )

    def _rows(self) -> tuple[list[tuple[str, str, str]], list[tuple[str, str, str]]]:
        """The parameters, each with its value and bounds; and the errors and nuisances, each with a note."""
        parameters = []
        for free in self.free:
            value = np.asarray(units.strip(self.parameters[free.name], free.unit, free.name))
            parameters.append((free.name, _spread(value.ravel(), free.unit), f"{free.low:g} to {free.high:g}"))
        spectral = isinstance(self.target, PowerSpectrum)
        error = f"rms error, {'power' if self.target.linear else 'log10 power'}" if spectral else "error"
        measures = [(error, _spread(self.rms), f"as given {_spread(self.initial_rms)}")]
        if spectral:
            target, fitted = self.peaks
            measures.append(("alpha peak", _spread(fitted, "Hz"), f"target {_spread(target, 'Hz')}"))
        if self.settings.get("background"):
            measures.append(("background 1/f^chi", _spread(self.nuisance["chi"]), ""))
        measures += [(name, _spread(x), "") for name, x in self.nuisance.items() if not spectral]
        if len(self.losses) and (lost := int(np.isnan(self.losses).all(0).sum())):
            lanes = math.prod(self.losses.shape[1:])
            measures.append(("starts that diverged", f"{lost} of {lanes}", "take a smaller dt or narrower bounds"))
        return parameters, measures

    @over_devices
    def standard_errors(self) -> dict[str, Any]:
        """The standard error of each parameter, Quantity ``(n,)`` or of a regional one ``(n, N)``, from the curvature.

        ``s**2 inv(J'J)`` with the Jacobian J of the residuals, and their variance s**2. The derivatives are carried in
        the loop; those of networks, of delays inside a mass and of statistics are taken by JAX through ``scan``,
        whatever the fit ran on. Nuisances are solved for again as the parameters change, and priors count as data.
        Residuals are assumed independent: of spectra whose segments overlap, of samples closer than the noise's
        memory, or of correlations that share a region, the true errors are larger.

        Raises
        ------
        TypeError : for functions that return no residuals
        """
        problem, z = self._problem(), self._best()
        at_best = evaluated(problem, _plan(problem, self._key(), LEVENBERG_MARQUARDT, 1), z, problem.keys(self._key()))
        normal, place = at_best.normal, None
        residuals = count = int(np.max(at_best.count))
        error, measured = np.asarray(at_best.error, float)[:, 0], count - problem.comparison.absent
        if problem.pooling.shared:
            normal, _, place = joint_normal_equations(problem, normal, at_best.slope)
            measured = np.sum(np.broadcast_to(measured, error.shape))
            error, count = error.mean(keepdims=True), count * len(error)
        variance = error * count / np.maximum(measured - np.shape(normal)[-1], 1) / residuals
        inverse = np.linalg.pinv(np.asarray(normal, float)[:, 0], hermitian=True)
        z_error = np.sqrt(variance[:, None] * np.einsum("nii->ni", inverse))
        z_error = z_error if place is None else z_error[0][place]
        errors = {}
        for free, at in problem.unknowns:
            slope = np.asarray(free.slope(z[free.name]))[:, 0]
            error = z_error[:, at] if slope.ndim == 2 else z_error[:, at.start]
            errors[free.name] = units.attach(np.abs(np.broadcast_to(slope, error.shape)) * error, free.unit)
        return errors

    @interruptible
    @over_devices
    def profile(self, name: str, values: Any = 11, *, steps: int = 20) -> Profile:
        """The lowest error at each of some values of one parameter, with all others refitted from the fit.

        The error stays low over a wide range if the target does not determine the parameter.

        Parameters
        ----------
        name : of a free parameter that is not regional
        values : the values, or how many between the bounds
        steps : most optimiser steps

        Raises
        ------
        ValueError : an unknown or regional name, or values outside the bounds
        """
        problem = self._problem()
        frees = {f.name: f for f in self.free}
        check_name(name, frees, "free parameter")
        if name in problem.pooling.regional:
            raise ValueError(f"'name' got {name!r}, which each region has its own of: a profile is along one value")
        values = _profile_values(frees[name], values)
        z = {f: jnp.repeat(x, len(values), 1) for f, x in self._best().items()}
        along = jnp.asarray(frees[name].z(values, "'values'"), z[name].dtype)
        z[name] = jnp.broadcast_to(along, z[name].shape)
        problem = dataclasses.replace(problem, pooling=problem.pooling._replace(frozen=(name,)))
        error = _lowest_error(problem, z, self._key(), steps)
        return Profile(name, units.attach(values, frees[name].unit), problem.comparison.measure(error))

    def places(self, count: int | None = None) -> dict[str, Any]:
        """The best values of each start, name to Quantity ``(n, starts)`` or of a regional one ``(n, starts, N)``.

        They are what another fit's ``starts=`` takes: ``starts=fit.places(3)`` goes on from the three best.

        Parameters
        ----------
        count : so many of the best starts of each target, the best first; ``None``, all in the order of their number

        Raises
        ------
        ValueError : more than there are
        """
        best, n = np.asarray(self.state["best"], float), len(self.best_start)
        order = np.broadcast_to(np.arange(best.shape[1]), best.shape)
        if count is not None:
            check_counts(1, count=count)
            if count > best.shape[1]:
                raise ValueError(f"'count' got {count}, but the fit has {best.shape[1]} starts")
            if Pooling.of_saved(self.settings["ties"]).bind:
                # Targets that depend on each other have a start together.
                best = np.broadcast_to(best.mean(0), best.shape)
            order = np.argsort(best, 1, kind="stable")[:, :count]
        places = {}
        for free in self.free:
            value = np.asarray(free.value(jnp.asarray(self.state["best_z"][free.name])))
            value = np.broadcast_to(value, (n, *value.shape[1:]))
            places[free.name] = units.attach(value[np.arange(n)[:, None], order], free.unit)
        return places

    def plot(self, path: str | os.PathLike | None = None):
        """Target, start and fit as a matplotlib ``Figure``, also written to ``path`` if there is one."""
        from .. import plots

        return plots.shown(plots.figure(self), path)

    def report(self, path: str | os.PathLike) -> None:
        """Write one page of HTML that needs nothing beside it, to read, print or send.

        It has the figures, the parameters with units, bounds and standard errors, the other values, the settings, the
        versions, and how the fit ran. `standard_errors` are computed for it, where they can be.

        Parameters
        ----------
        path : of the page, a name that ends in .html

        Raises
        ------
        ValueError : another ending, or nothing can be written there
        ImportError : without jinja2 or matplotlib
        """
        from .. import report

        report.write_fit(self, path)

    def to_dataframe(self):
        """A row for each target: parameters with their units in the columns' names, errors, nuisances."""
        pandas = needs("pandas", "sweep")
        columns: dict[str, Any] = {}
        for free in self.free:
            value = np.asarray(units.strip(self.parameters[free.name], free.unit, free.name))
            label = free.name if free.unit.is_unitless else f"{free.name} ({free.unit})"
            columns |= {label: value} if value.ndim == 1 else {f"{label} of {i}": x for i, x in enumerate(value.T)}
        columns |= {"rms": self.rms, "initial_rms": self.initial_rms, "best_start": self.best_start, **self.nuisance}
        if isinstance(self.target, PowerSpectrum):
            columns |= dict(zip(("target_peak (Hz)", "fitted_peak (Hz)"), self.peaks))
        return pandas.DataFrame(columns)

    def _key(self):
        return jax.random.wrap_key_data(jnp.asarray(self.settings["key"], jnp.uint32))

    def _best(self) -> dict[str, jax.Array]:
        """z of the best start of each target, ``(n or 1, 1, ...)``."""
        alive, best = np.asarray(self.state["alive"], int), self.best_start
        at = np.argmax(alive == best[:, None], 1)
        rows = {name: np.asarray(x) for name, x in self.state["best_z"].items()}
        return {name: jnp.asarray(x[np.arange(len(x)), at[: len(x)]][:, None]) for name, x in rows.items()}

    def _problem(self) -> Problem:
        """The problem that was fitted; of a loaded fit it is built anew."""
        if self.problem is not None:
            return self.problem
        if callable(self.target):
            raise TypeError("'target' was a function, which a saved fit does not hold: continue it by resume=")
        fields = self.settings
        options = {name: fields[name] * u.second for name in ("duration", "dt", "transient")}
        options |= {"every": fields["every"], "scheme": fields["scheme"], "implementation": None}
        record, band, background = fields["record"], fields.get("band"), fields.get("background")
        if "joint" in fields:
            every = fields["joint"].values()
            band, background = (next((x[n] for x in every if n in x), None) for n in ("band", "background"))
        if "gradient_horizon" in fields:
            options["gradient_horizon"] = fields["gradient_horizon"] * u.second
        predict = fields.get("predict", targets.SIMULATION)
        comparison = targets.compare(self.target, self.model, record, options, band, background, predict)
        problem = Problem(
            self.model, self.inputs, self.noise, self.free,
            comparison, fields["realisations"], comparison.recorded, options, Pooling.of_saved(fields["ties"]),
        )  # fmt: skip
        theirs, ours = fields.get("program", {}), problem.program(self.losses.shape[2], self._key())
        # In another precision every program is another.
        if theirs.get("dtype") == ours["dtype"]:
            saved.compare_programs(theirs, ours, "model")
        return problem

    # --- files ---

    def save(self, path: str | os.PathLike) -> None:
        """Write the fit, and what `fit` needs to resume it, as JSON: whole or not at all, with a checksum."""
        files.write_document(path, saved.encode(self))

    @classmethod
    def load(cls, path: str | os.PathLike, model=None) -> Fit:
        """Read what `save` wrote.

        Parameters
        ----------
        path : of the file
        model : an instance of the model's class, if it is not of this package; for a fit of a network, the network

        Raises
        ------
        FileNotFoundError, ValueError
            there is no such file, it is not a saved fit, or damaged, or the model is not that of the fit
        """
        return cls(**saved.load(path, model))

    def check_same(self, problem: Problem, settings: Mapping[str, Any], starts: int) -> None:
        """Raise ValueError unless this fit has the same problem and as many starts."""
        saved.check_same(self.settings, self.free, self.target, settings, problem, "resume")
        if (count := self.losses.shape[2]) != starts:
            raise ValueError(f"'resume' got a fit with starts = {count}, but this call has {starts}")


def _profile_values(free: Free, values) -> np.ndarray:
    """The values of a profile as plain numbers; of a number, so many between the bounds."""
    if isinstance(values, int):
        return np.asarray(free.value(jnp.asarray(logit(np.linspace(0.02, 0.98, values)))))
    return np.atleast_1d(np.asarray(targets.plain(values, free.unit, "values"), float))


def _lowest_error(problem: Problem, z, key, steps: int):
    """The error of each lane after it has been fitted again from ``z``."""
    if not problem.moving:
        return measured(problem, predict(problem, z, problem.keys(key)), problem.comparison.data)[0]
    plan = _plan(problem, key, default_optimiser(problem), z[problem.frees[0].name].shape[1], steps)
    return descend(problem, plan, begin(problem, z, plan.optimiser), [], key).best


def _plan(problem: Problem, key, optimiser, starts: int, steps: int = 1) -> Plan:
    """All steps, of so many starts."""
    division = divide(problem, problem.plan(key), starts, optimiser == LEVENBERG_MARQUARDT)
    return Plan(optimiser, division, steps, patience=steps)


def _row(name: str, value: str, note: str) -> str:
    return f"  {name:<23} {value:<35} {note}"


def _spread(values, unit="") -> str:
    """One value, or the median and the range of several that differ."""
    unit = "" if str(unit) in ("", "1") else f" {unit}"
    if np.all(values == values[0]):
        return f"{values[0]:.4g}{unit}"
    return f"{np.median(values):.4g} ({np.min(values):.3g} to {np.max(values):.3g}){unit}"
