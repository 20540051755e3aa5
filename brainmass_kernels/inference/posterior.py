"""`Posterior`: draws with units, what they say, how far they can be trusted, and what they predict."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import brainunit as u
import jax.numpy as jnp
import numpy as np

from .. import display, files, units
from ..archives import digest_of, pack, unpack
from ..errors import check_counts
from ..extras import needs
from ..fitting.targets import OfFunction
from ..models.base import check_name
from ..noise import check_key
from . import diagnostics
from .density import LogDensity, columns, predicted

#: Chains whose R-hat is larger do not agree: Vehtari et al. 2021.
MOST_R_HAT = 1.01
_FORM, _VERSION = "brainmass_kernels posterior", 1
_SAVED, _REMEDY = "a posterior saved by this brainmass_kernels", "take a copy of it, or sample again"
_QUANTILES = (0.05, 0.5, 0.95)
_STATISTICS = ("log_density", "acceptance", "divergent", "gradients")


class Row(NamedTuple):
    """What the draws of one parameter say; those with a unit have the parameter's.

    Attributes
    ----------
    mean, sd : of all draws
    low, median, high : quantiles 5%, 50% and 95%
    r_hat : how much wider all chains together are than each; above 1.01 they do not agree
    ess_bulk, ess_tail : independent draws that locate it, or give its quantiles 5% and 95%, as well
    """

    mean: Any
    sd: Any
    low: Any
    median: Any
    high: Any
    r_hat: float
    ess_bulk: float
    ess_tail: float


@dataclasses.dataclass(frozen=True)
class Summary(Mapping[str, Row]):
    """A mapping of names to `Row`; shown as a table, with ``notes`` on what is wrong with the draws."""

    title: str
    rows: dict[str, Row]
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Row:
        check_name(name, self.rows, "parameter")
        return self.rows[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        table = [self._head(), *self._cells()]
        widths = [max(map(len, column)) for column in zip(*table)]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in table]
        return "\n".join([self.title, "", *(f"  {line}" for line in lines), *self._notes()])

    def _repr_html_(self) -> str:
        return display.table(self.title, self._head(), self._cells(), " ".join(self.notes))

    def _head(self) -> tuple[str, ...]:
        return "", "mean", "sd", "5%", "50%", "95%", "R-hat", "ESS bulk", "ESS tail"

    def _cells(self) -> list[tuple[str, ...]]:
        cells = []
        for name, row in self.rows.items():
            values = [f"{float(u.get_magnitude(x)):.4g}" for x in row[:5]]
            counts = (f"{x:.0f}" for x in row[6:])
            cells.append((display.with_unit(name, units.unit_of(row.mean)), *values, f"{row.r_hat:.3f}", *counts))
        return cells

    def _notes(self) -> list[str]:
        return ["", *(f"  {note}" for note in self.notes)] if self.notes else []

    def to_dataframe(self):
        """A row for each parameter, whose unit is in its name."""
        pandas = needs("pandas", "sweep")
        rows = {
            display.with_unit(name, units.unit_of(row.mean)): [float(u.get_magnitude(x)) for x in row]
            for name, row in self.rows.items()
        }
        return pandas.DataFrame.from_dict(rows, orient="index", columns=list(Row._fields))


@dataclasses.dataclass(frozen=True, eq=False)
class Posterior(Mapping[str, Any]):
    """Draws from a posterior; ``posterior["C"]`` are those of one parameter, ``(chains, draws)`` with its unit.

    Of several targets, what each has a value of its own of is ``(chains, draws, n)``, and ``posterior["C[0]"]`` is that
    of the first.

    Attributes
    ----------
    draws : by name, those of the likelihood as ``"likelihood.sigma"``
    z : the same as unconstrained positions, by name
    log_density : of each position, ``(chains, draws)``
    acceptance : mean probability of acceptance in each draw; NaN where a method accepts all
    divergent : whether the integrator left the posterior, or a run was not finite
    gradients : that each draw took
    settings : method, warm-up, gradients in all
    seconds : wall time, compilation included; of a resumed run in all
    density : what was sampled; ``None`` of a loaded posterior, unless `load` is given it
    """

    draws: dict[str, Any]
    z: dict[str, np.ndarray]
    log_density: np.ndarray
    acceptance: np.ndarray
    divergent: np.ndarray
    gradients: np.ndarray
    settings: dict[str, Any]
    seconds: float = 0.0
    density: LogDensity | None = dataclasses.field(default=None, repr=False)

    @classmethod
    def of(cls, density: LogDensity, drawn: Mapping[str, np.ndarray], settings: dict[str, Any], seconds: float):
        """Of draws as samplers return them, ``(chains, draws, ...)``."""
        drawn = dict(drawn)
        z = density.of_vectors(np.asarray(drawn.pop("z")))
        parameters = density.to_parameters({name: jnp.asarray(x) for name, x in z.items()})
        draws = {name: units.attach(np.asarray(u.get_magnitude(x)), units.unit_of(x)) for name, x in parameters.items()}
        return cls._of(draws, z, drawn, settings, seconds, density)

    @classmethod
    def _of(cls, draws, z, statistics, settings, seconds, density=None) -> Posterior:
        log_density, acceptance, divergent, gradients = (np.asarray(statistics[name]) for name in _STATISTICS)
        return cls(draws, z, log_density, acceptance, divergent, gradients, settings, seconds, density)

    def __getitem__(self, name: str):
        if name in self.columns:
            return self.columns[name]
        check_name(name, self.draws, "parameter")
        return self.draws[name]

    @functools.cached_property
    def columns(self) -> dict[str, Any]:
        """Draws ``(chains, draws)`` of each parameter of each target, ``"C[0]"``, ``"C[1]"`` and so on."""
        return columns(self.draws, 2)

    def __iter__(self) -> Iterator[str]:
        return iter(self.draws)

    def __len__(self) -> int:
        return len(self.draws)

    @property
    def shape(self) -> tuple[int, int]:
        """Chains and draws."""
        return self.log_density.shape[0], self.log_density.shape[1]

    # Words and tables -----------------------------------------------------------------------------------------------

    def summary(self) -> Summary:
        """Mean, standard deviation, quantiles, R-hat and effective numbers of draws of each parameter, a table."""
        return self._summary

    @functools.cached_property
    def _summary(self) -> Summary:
        rows = {name: _row(x) for name, x in self.columns.items()}
        return Summary(self._title(), rows, tuple(self._notes(rows)))

    def _title(self) -> str:
        (chains, draws), settings = self.shape, self.settings
        said = f"{chains} chains of {draws} draws by {settings['method']}, after {settings['warmup']} of warm-up"
        if np.isfinite(self.acceptance).any():
            said += f"; acceptance {np.nanmean(self.acceptance):.2f}"
        rate = settings["gradients"] / max(self.seconds, 1e-9)
        lost = int(self.divergent.sum())
        return f"{said}; {lost} divergences; {self.seconds:.1f} s, {rate:,.0f} gradients/s"

    def _notes(self, rows: Mapping[str, Row]) -> Iterator[str]:
        unknown = [name for name, row in rows.items() if math.isnan(row.r_hat)]
        apart = {name: row.r_hat for name, row in rows.items() if row.r_hat > MOST_R_HAT}
        if unknown:
            yield (
                f"R-hat is not known of {', '.join(unknown)}: chains of {diagnostics.LEAST_DRAWS} draws or more, that "
                "vary, say whether they agree."
            )
        if apart:
            yield (
                f"R-hat is above {MOST_R_HAT} of {', '.join(apart)} (at most {max(apart.values()):.3f}): the chains do "
                "not agree yet, and these numbers are not the posterior's. Take more draws and a longer warm-up; if "
                "R-hat stays, the posterior has several modes: look at plot(), begin at a fit, or take method='smc'."
            )
        if lost := int(self.divergent.sum()):
            yield (
                f"{lost} of {self.divergent.size} draws diverged: parts of the posterior may be missing. Take "
                "target_acceptance nearer to 1, a smaller dt, or narrower priors."
            )

    def __repr__(self) -> str:
        return repr(self.summary())

    def _repr_html_(self) -> str:
        return self.summary()._repr_html_()

    # Other forms ----------------------------------------------------------------------------------------------------

    def to_arviz(self):
        """As ArviZ takes it: an ``InferenceData``, of ArviZ 1 a ``DataTree``; units are attributes of the variables.

        Raises
        ------
        ImportError : without arviz
        """
        arviz, xarray = needs("arviz", "bayes"), needs("xarray", "bayes")
        where = {"chain": np.arange(self.shape[0]), "draw": np.arange(self.shape[1])}

        def variable(x):
            values = np.asarray(u.get_magnitude(x))
            place = where if values.ndim == 2 else where | {"target": np.arange(values.shape[2])}
            return xarray.DataArray(values, place, list(place), attrs={"units": str(units.unit_of(x))})

        statistics = {
            "lp": self.log_density, "acceptance_rate": self.acceptance, "diverging": self.divergent,
            "n_steps": self.gradients,
        }  # fmt: skip
        groups = {
            "posterior": xarray.Dataset({name: variable(x) for name, x in self.draws.items()}),
            "sample_stats": xarray.Dataset({name: variable(x) for name, x in statistics.items()}),
        }
        kind = getattr(arviz, "InferenceData", xarray.DataTree)
        return xarray.DataTree.from_dict(groups) if issubclass(kind, xarray.DataTree) else kind(**groups)

    def predict(self, n: int = 100, *, key=None):
        """What n of the draws, evenly chosen, predict of the data, as a target of n.

        Parameters
        ----------
        n : of draws
        key : of `jax.random`, to add the noise that the likelihood expects in data; ``None``, predictions without it

        Returns
        -------
        a `PowerSpectrum`, `TimeSeries`, `Connectivity` or, of these, `Joint`, as the target is; of several targets a
        list of these, one for each

        Raises
        ------
        ValueError, TypeError : a loaded posterior without its density, or one of a function
        """
        check_counts(1, n=n)
        check_key(key)
        density = self._density("predict")
        if isinstance(density.problem.comparison, OfFunction):
            raise TypeError("a function of yours is what this posterior compares: run the model with its draws")
        return predicted(density, self._some(n), key)

    def _density(self, what: str) -> LogDensity:
        if self.density is None:
            raise ValueError(
                f"{what}() needs the density: Posterior.load(path, bk.log_density(...)) with its arguments"
            )
        return self.density

    def _some(self, n: int) -> dict[str, np.ndarray]:
        """The positions of n draws, evenly chosen of all chains."""
        every = np.linspace(0, self.log_density.size - 1, n).round().astype(int)
        return {name: x.swapaxes(0, 1).reshape(-1, *x.shape[2:])[every] for name, x in self.z.items()}

    def plot(self, path: str | os.PathLike | None = None):
        """Marginals, pairs and the band of predictions over the data, as a matplotlib ``Figure``.

        Parameters
        ----------
        path : a file to write as well

        Raises
        ------
        ImportError : without matplotlib
        """
        from .. import plots
        from .figure import posterior_figure

        return plots.shown(posterior_figure(self), path)

    # Files ----------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike) -> None:
        """Write the draws with their units as ``.npz``: whole or not at all, with a checksum.

        Raises
        ------
        ValueError : another ending, or nothing can be written there
        """
        if Path(path).suffix.lower() != ".npz":
            raise ValueError(f"'path' got {os.fspath(path)}, but takes a name that ends in .npz")
        place = files.absolute(path, "path")
        about = {"version": _VERSION, "settings": self.settings, "seconds": round(self.seconds, 3)}
        with files.replacing(place) as aside:
            pack(aside, self._groups(), about, _FORM)

    def _groups(self) -> list[dict[str, Any]]:
        return [dict(self.draws), dict(self.z), {name: getattr(self, name) for name in _STATISTICS}]

    @classmethod
    def load(cls, path: str | os.PathLike, density: LogDensity | None = None) -> Posterior:
        """Read what `save` wrote.

        Parameters
        ----------
        density : that was sampled, for `predict` and the band of `plot`; it is checked to be that

        Raises
        ------
        FileNotFoundError, ValueError
            there is no such file, it is not a saved posterior, or damaged, or the density is of another
        """
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"'path' got {path}, but there is no file of that name")
        with files.damaged(path, _SAVED, _REMEDY):
            groups, about, checksum = unpack(path, _FORM)
            if checksum != digest_of(groups, about):
                raise ValueError("its checksum is that of other contents")
            if about["version"] != _VERSION:
                raise ValueError(f"it has version {about['version']} of the format, and this reads {_VERSION}")
            draws, z, statistics = groups
            z = {name: np.asarray(x) for name, x in z.items()}
            posterior = cls._of(draws, z, statistics, about["settings"], about["seconds"])
        return posterior if density is None else posterior.of_density(density)

    def of_density(self, density: LogDensity) -> Posterior:
        """The same draws with what was sampled, if it has the same names, and the same parameters at the positions.

        Raises
        ------
        ValueError : another density
        """
        if density.names != tuple(self.draws):
            raise ValueError(
                f"'density' got one of {', '.join(density.names)}, but these draws are of {', '.join(self.draws)}"
            )
        for name, x in density.to_parameters({name: jnp.asarray(x) for name, x in self.z.items()}).items():
            ours = np.asarray(units.strip(self.draws[name], units.unit_of(x), name), float)
            if not np.allclose(ours, np.asarray(u.get_magnitude(x), float), rtol=1e-4):
                raise ValueError(f"'density' got one with another prior or other bounds of {name!r} than these draws'")
        return dataclasses.replace(self, density=density)


def _row(draws) -> Row:
    unit, x = units.unit_of(draws), np.asarray(u.get_magnitude(draws), float)
    values = (x.mean(), x.std(ddof=1) if x.size > 1 else math.nan, *np.quantile(x, _QUANTILES))
    mean, sd, low, median, high = (units.attach(np.asarray(value), unit) for value in values)
    counts = diagnostics.r_hat(x), diagnostics.ess_bulk(x), diagnostics.ess_tail(x)
    return Row(mean, sd, low, median, high, *counts)
