"""What is told of an installation, as in a report of an error; and a page that shows a fit or a sweep."""

from __future__ import annotations

import base64
import collections
import datetime
import io
import math
import os
import platform
import re
import textwrap
from collections.abc import Mapping, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from . import dispatch, display, files, options, plots, routing, testing, units
from ._version import __version__
from .backends.numba import layout
from .codegen import kernel_cache
from .extras import needs
from .network import Network

if TYPE_CHECKING:
    from .fitting.result import Fit
    from .sweeps import Sweep

#: Packages that every installation has, then those of extras; another version of them may be why something fails.
_PACKAGES = ("jax", "jaxlib", "brainunit", "numpy", "llvmlite")
_OPTIONAL = (
    "brainmass", "brainstate", "braintools", "h5py", "jax-cuda12-plugin", "jax-cuda13-plugin", "jax-triton", "jinja2",
    "libtpu", "matplotlib", "mne", "optax", "pandas", "rich", "scipy", "triton", "tvb-data", "xarray", "zarr",
)  # fmt: skip
#: Variables that change what is computed, where, or how fast.
_VARIABLES = re.compile(r"JAX_|XLA_|LIBTPU_|CUDA_VISIBLE_DEVICES$|NUMBA_NUM_THREADS$|BRAINMASS_KERNELS_")
_NONE = "none"
#: Pixels of CSS in an inch.
_PIXELS = 96
#: Most targets of a fit that have a row each.
MAX_ROWS = 200
#: Columns of a terminal.
_WIDTH = 80


# The installation ---------------------------------------------------------------------------------------------------


def installation() -> dict[str, Any]:
    """Versions, devices, processors, implementations and the cache, ready for JSON; ``~`` is the user's home."""
    about = {
        "brainmass-kernels": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": _versions(_PACKAGES),
        "optional": _versions(_OPTIONAL),
        "devices": (devices := _devices()),
        "processors": _processors(),
        "cache": _cache(),
        "environment": {name: x for name, x in sorted(os.environ.items()) if _VARIABLES.match(name)},
        "implementations": _implementations(devices),
    }
    return _mapped(_tilde, about)


def _versions(packages) -> dict[str, str]:
    """The versions of those packages that are installed."""
    versions = {}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _devices() -> list[str]:
    """The kinds of device that JAX computes on, or what it says where it finds none."""
    try:
        devices = jax.devices()
    except Exception as error:
        # Plugins raise what they like, and a report is to tell it.
        return [f"{_NONE}: {' '.join((str(error) or repr(error)).split())}"]
    counts = collections.Counter(device.device_kind for device in devices)
    made_by = "" if devices[0].platform == "cpu" else f" ({' '.join(devices[0].client.platform_version.split())})"
    return [f"{count} x {kind} on {devices[0].platform}{made_by}" for kind, count in counts.items()]


def _processors() -> dict[str, Any]:
    about: dict[str, Any] = {"count": os.cpu_count(), "threads": layout.threads()}
    if find_spec("llvmlite"):
        from llvmlite.binding import get_host_cpu_name

        about["kind"] = get_host_cpu_name()
    return about


def _cache() -> dict[str, Any]:
    """Where compiled kernels and programs are kept, and how much lies there."""
    try:
        folder = kernel_cache.usual()
        sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    except OSError as error:
        return {"folder": None, "reason": str(error)}
    return {"folder": str(folder), "files": len(sizes), "bytes": sum(sizes)}


def _implementations(devices: list[str]) -> dict[str, dict[str, Any]]:
    """For each implementation whether it runs here, the chips that it is compiled for here, and the reasons if not."""
    if devices[0].startswith(_NONE):
        here = dict.fromkeys(options.catalogue()["implementations"], "JAX finds no device")
    else:
        here = dispatch.implementations()
    compilers = testing.compilers()
    about = {}
    for name, reason in here.items():
        chips = {chip: compilers[chip] for chip in testing.CHIPS.get(name, ())}
        able = [chip for chip, what in chips.items() if what == "compiles here"]
        unable = {chip: what for chip, what in chips.items() if chip not in able}
        about[name] = {"here": reason, "compiles_for": able, "does_not_compile_for": unable}
    return about


def _mapped(change, value) -> Any:
    """A document with every text of it changed."""
    if isinstance(value, dict):
        return {name: _mapped(change, x) for name, x in value.items()}
    if isinstance(value, list):
        return [_mapped(change, x) for x in value]
    return change(value) if isinstance(value, str) else value


def _tilde(text: str) -> str:
    """A text with ``~`` for the user's home."""
    home = os.path.expanduser("~")
    for folder in {home, os.path.realpath(home)}:
        if folder.strip(os.sep):
            text = re.sub(rf"(?<![\w./-]){re.escape(folder)}(?![\w.-])", "~", text)
    return text


def installation_text(about: dict[str, Any]) -> str:
    """What `installation` tells, as lines that fit a terminal."""
    cache, processors = about["cache"], about["processors"]
    kept = f"{cache['files']:,} files, {cache['bytes'] / 1e6:.1f} MB" if cache["folder"] else cache["reason"]
    kind = f" ({processors['kind']})" if "kind" in processors else ""
    rows = {
        "Python": f"{about['python']} on {about['system']}",
        "packages": _joined(about["packages"], " "),
        "optional": _joined(about["optional"], " ") or "none",
        "devices": "; ".join(about["devices"]),
        "processors": f"{processors['count']}{kind}, of which a run takes {processors['threads']}",
        "cache": ": ".join([*([cache["folder"]] if cache["folder"] else []), kept]),
        "environment": _joined(about["environment"], "=") or "nothing set",
    }
    lines = [f"brainmass-kernels {about['brainmass-kernels']}", *_table(rows), "", "implementations"]
    return "\n".join([*lines, *_table({name: _told(x) for name, x in about["implementations"].items()})])


def _joined(values: Mapping[str, str], between: str) -> str:
    return ", ".join(f"{name}{between}{value}" for name, value in values.items())


def _told(about: dict[str, Any]) -> str:
    """One implementation in a sentence."""
    here = about["here"]
    parts = [here if here == "runs here" else f"not here: {here}"]
    if about["compiles_for"]:
        parts.append(f"compiles for {', '.join(about['compiles_for'])}")
    chips = collections.defaultdict(list)
    for chip, reason in about["does_not_compile_for"].items():
        if reason != here:
            chips[reason].append(chip)
    parts += [f"no compiler for {', '.join(names)}: {reason}" for reason, names in chips.items()]
    return "; ".join(parts)


def _table(rows: dict[str, str]) -> list[str]:
    """Two columns, of which the second is wrapped."""
    width = max(map(len, rows)) + 4
    lines = []
    for name, text in rows.items():
        lines += textwrap.wrap(
            text, _WIDTH - 1, initial_indent=f"  {name:<{width - 2}}", subsequent_indent=" " * width,
            break_long_words=False, break_on_hyphens=False,
        )  # fmt: skip
    return lines


# Pages --------------------------------------------------------------------------------------------------------------


class Picture(NamedTuple):
    """A figure in a page.

    Attributes
    ----------
    caption : what it shows
    source : the figure itself, as a ``data:`` URL
    width : at which its letters have their size, in pixels of CSS
    """

    caption: str
    source: str
    width: int


class Section(NamedTuple):
    """A part of a page: sentences, figures, a table, code; any of them may be absent."""

    title: str
    notes: Sequence[str] = ()
    figures: Sequence[Picture] = ()
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    code: str = ""


class Page(NamedTuple):
    """A page: its title, a line below it, and its sections in order."""

    title: str
    subtitle: str
    sections: Sequence[Section]


def write_fit(fit: Fit, path: str | os.PathLike, command: str | None = None) -> None:
    """Write a fit as one page of HTML that needs nothing beside it; see `Fit.report`.

    Parameters
    ----------
    command : the command line that made it
    """
    _write(path, "fit", lambda: _fit_page(fit, command))


def write_sweep(sweep: Sweep, path: str | os.PathLike, command: str | None = None) -> None:
    """As `write_fit`, of a sweep; see `Sweep.report`."""
    _write(path, "sweep", lambda: _sweep_page(sweep, command))


def _write(path: str | os.PathLike, extra: str, make) -> None:
    """Write a page, whole or not at all; the name and the packages are checked before it is made."""
    options.check_page(path, "path")
    jinja2 = needs("jinja2", extra)
    templates = jinja2.FileSystemLoader(Path(__file__).with_name("data"))
    environment = jinja2.Environment(
        loader=templates, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    text = environment.get_template("report.html").render(page=make(), version=__version__)
    files.write_text(path, text)


def _picture(figure, caption: str) -> Picture:
    """A figure as SVG, in which lines and letters stay sharp at any size."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="svg")
    source = f"data:image/svg+xml;base64,{base64.b64encode(drawn.getvalue()).decode()}"
    return Picture(caption, source, round(figure.get_figwidth() * _PIXELS))


def _subtitle() -> str:
    now = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z").strip()
    return f"Written by brainmass-kernels {__version__} on {now}"


def _how(implementation: str, reason: str, seconds, versions: Mapping[str, str], command: str | None) -> list[Section]:
    """How something was computed, and what this page was written with."""
    about = installation()
    rows = [
        ("implementation", implementation),
        ("reason", reason),
        ("seconds", "" if seconds is None else f"{seconds:.1f}, compilation included"),
        ("computed with", _joined(versions, " ")),
        ("page written with", f"Python {about['python']}, {_joined(about['packages'], ' ')}"),
        ("devices", "; ".join(about["devices"])),
        ("processors", str(about["processors"]["count"])),
        ("system", about["system"]),
    ]
    ran = Section("How it ran", rows=[row for row in rows if row[1]])
    return [ran, *([Section("Command", code=command)] if command else [])]


def values_of(model, inputs: Mapping[str, Any], noise: Mapping[str, Any], but=()) -> dict[str, str]:
    """Parameters, inputs and noise intensities with their units, as texts, without some of them."""
    known, texts = routing.places(model, inputs), {}
    for name, (unit, value) in routing.quantities(model, inputs, noise).items():
        if name not in but:
            number = display.numbers(units.strip(value, unit, name, known[name].also))
            texts[name] = number if unit.is_unitless else f"{number} {unit}"
    return texts


# Of a fit -----------------------------------------------------------------------------------------------------------


def _fit_page(fit: Fit, command: str | None) -> Page:
    settings, count = fit.settings, len(fit.rms)
    errors, without = _errors(fit)
    _, measures = fit._rows()
    sections = [
        Section("Result", figures=_fit_pictures(fit), rows=measures),
        Section("Parameters", without, head=_HEAD, rows=_parameters(fit, errors)),
    ]
    if count > 1:
        sections.append(_targets(fit, errors))
    fixed = values_of(fit.model, fit.inputs, fit.noise, {f.name for f in fit.free})
    n, steps, starts = fit.losses.shape[1], len(fit.losses), fit.losses.shape[2]
    network = {"network": repr(fit.model)} if isinstance(fit.model, Network) else {}
    rows = {**network, "targets": str(n), "starts": str(starts), "steps taken": str(steps), **_settings(settings)}
    versions = {n.replace("_", "-"): x for n, x in settings.get("program", {}).items() if n in _LIBRARIES}
    sections += [
        Section("Values that were not fitted", head=("", "value"), rows=list(fixed.items())),
        Section("Settings", rows=list(rows.items())),
        *_how(fit.implementation, fit.reason, fit.seconds, versions, command),
    ]
    return Page(f"{settings['model']} fitted to {fit.name}", _subtitle(), sections)


_HEAD = ("", "fitted", "standard error", "bounds")
_LIBRARIES = ("brainmass_kernels", "jax")


def _errors(fit: Fit) -> tuple[dict[str, Any], list[str]]:
    """The standard errors of a fit, and a sentence about them."""
    try:
        # Where the curvature is none, the error is none either, and the page says so.
        with np.errstate(invalid="ignore"):
            errors = {n: np.asarray(units.strip(x, units.unit_of(x), n)) for n, x in fit.standard_errors().items()}
    except (TypeError, np.linalg.LinAlgError) as error:
        return {}, [f"There are no standard errors: {error}"]
    note = "Standard errors are those of the curvature at the fit, on the assumption that residuals are independent."
    if not all(np.isfinite(x).all() for x in errors.values()):
        note += " Where there is none, the target does not determine the parameter beside the others."
    return errors, [note]


def _fit_pictures(fit: Fit) -> list[Picture]:
    count, drawn = len(fit.rms), min(len(fit.rms), plots.MAX_PANELS)
    which = "" if count == drawn else f", the first {drawn} of {count} targets"
    pictures = [_picture(plots.figure(fit), f"Target, start and fit{which}")] if not callable(fit.target) else []
    if len(fit.losses):
        pictures.append(_picture(plots.steps_figure(fit), "Error of each step"))
    return pictures


def _numbers(values: np.ndarray, digits: int = 4) -> str:
    """One value, or the median and the range of several."""
    values = np.asarray(values).ravel()
    known = values[np.isfinite(values)]
    if not len(known):
        return "not determined"
    if len(values) == 1:
        return f"{values[0]:.{digits}g}"
    return f"{np.median(known):.{digits}g} ({known.min():.3g} to {known.max():.3g})"


def _fitted(fit: Fit) -> dict[str, np.ndarray]:
    """The parameters as plain numbers."""
    return {f.name: np.asarray(units.strip(fit.parameters[f.name], f.unit, f.name)) for f in fit.free}


def _parameters(fit: Fit, errors) -> list[tuple[str, ...]]:
    rows = []
    for f, value in zip(fit.free, _fitted(fit).values()):
        error = _numbers(errors[f.name], 2) if errors else ""
        rows.append((display.with_unit(f.name, f.unit), _numbers(value), error, f"{f.low:g} to {f.high:g}"))
    return rows


def _targets(fit: Fit, errors) -> Section:
    """A row for each target: its parameters with their errors."""
    values, count = _fitted(fit), len(fit.rms)
    head = ["target", *(display.with_unit(f.name, f.unit) for f in fit.free), "error"]
    rows = []
    for i in range(min(count, MAX_ROWS)):
        cells = [_with_error(x[i], errors[n][i] if errors else math.nan) for n, x in values.items()]
        rows.append([str(i + 1), *cells, f"{fit.rms[i]:.4g}"])
    more = [f"The first {MAX_ROWS} of {count:,}; Fit.to_dataframe() has all."] if count > MAX_ROWS else []
    return Section("Targets", more, head=head, rows=rows)


def _with_error(value, error) -> str:
    # Of a regional parameter both are of all regions.
    return _numbers(value) + (f" \N{PLUS-MINUS SIGN} {_numbers(error, 2)}" if np.isfinite(error).any() else "")


def _settings(settings: Mapping[str, Any]) -> dict[str, str]:
    """What a fit was asked for, under the names of the arguments of `fit`."""
    flat = {n: x for n, x in settings.items() if n not in ("program", "fixed", "ties", "model")}
    flat |= {n: x for n, x in settings["ties"].items() if x}
    return {name: _setting(name, value) for name, value in flat.items()}


def _setting(name: str, value) -> str:
    if value is None:
        return "by default"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name == "dt":
        return f"{1e3 * value:g} ms"
    if name in ("duration", "transient"):
        return f"{value:g} s"
    if name == "band":
        return f"{value[0]:g} to {value[1]:g} Hz"
    if name == "every":
        return f"{value} steps"
    if isinstance(value, (list, tuple)):
        return ", ".join(_setting("", x) for x in value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)


# Of a sweep ---------------------------------------------------------------------------------------------------------


def _sweep_page(sweep: Sweep, command: str | None) -> Page:
    about, ok = dict(sweep.about), np.asarray(sweep.ok)
    model, implementation, reason = (about.pop(name, "") for name in ("model", "implementation", "reason"))
    versions = {name.replace("_", "-"): x for name, x in about.pop("versions", {}).items()}
    fixed = about.pop("values", {})
    notes = [] if ok.all() else [f"{(~ok).sum():,} of {ok.size:,} points did not stay finite, and are blank."]
    pictures = []
    if unfit := plots.unfit_for_a_picture(sweep):
        notes.append(f"There is no figure, as the sweep has {unfit}.")
    else:
        pictures.append(_picture(plots.sweep_figure(sweep), "Statistics of each mass over the grid"))
    axes = [(n, *_ends(x), display.unit(x), f"{len(x):,}") for n, x in sweep.axes.items()]
    records = [
        (n, display.numbers(x), display.unit(x), " x ".join(map(str, x.shape))) for n, x in sweep.records.items()
    ]
    sections = [
        Section("Result", notes, pictures, ("record", "values", "unit", "shape"), records),
        Section("Grid", head=("", "from", "to", "unit", "points"), rows=axes),
        Section("Values that were not swept", head=("", "value"), rows=list(fixed.items())),
        Section("Settings", rows=[(n, _setting(n, x) if n == "every" else str(x)) for n, x in about.items()]),
        *_how(implementation, reason, sweep.seconds, versions, command),
    ]
    return Page(f"{model} over {' and '.join(sweep.axes)}", _subtitle(), [x for x in sections if x.rows or x.code])


def _ends(axis) -> tuple[str, str]:
    values = np.asarray(units.strip(axis, units.unit_of(axis), "axis"))
    return f"{values[0]:.4g}", f"{values[-1]:.4g}"
