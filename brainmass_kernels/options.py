"""The options of the command line, read and checked before anything is imported that takes long."""

from __future__ import annotations

import functools
import json
import math
import os
from pathlib import Path
from typing import Any

from . import files
from .errors import check_counts, check_implementation, check_name
from .extras import check_installed

#: What is fitted unless --free is given: bounds in the declared units, around the values of Jansen & Rit 1995.
FREE = {
    "Ae": (2.0, 8.0),
    "Ai": (10.0, 60.0),
    "be": (40.0, 200.0),
    "bi": (20.0, 100.0),
    "C": (60.0, 400.0),
    "E_inp": (20.0, 800.0),
    "noise.E_inp": (0.3, 40.0),
}
#: Inputs and noise of Jansen-Rit in a fit unless --set is given.
SET = {"E_inp": 220.0, "noise.E_inp": 2.0}
#: The grid that is swept unless --over is given.
OVER = ("E_inp=0:400:64", "C=60:240:64")
#: What is sampled of a spectrum unless --free is given, and the values at which it is tried, with a stable fixed point.
SAMPLED = {name: FREE[name] for name in ("be", "bi", "C")}
SAMPLE_SET = {**SET, "C": 120.0}
#: Of `sample`.
METHODS = ("nuts", "chees", "mclmc", "smc")
DEFAULTS = {"starts": 16, "realisations": 8, "duration": 9.0, "dt": 1e-3, "band": (2.0, 40.0), "record": None}
#: The model that these defaults are for.
MODEL = "JansenRit"


def check_fit(arguments) -> None:
    """Read and check the options of ``fit``; the texts of names and numbers are replaced by these.

    Raises
    ------
    ValueError : an option's value; the message names the option
    ImportError : a package of the extra [fit] is not installed
    """
    check_figure(arguments.out, "out")
    check_writable(arguments.json, "json")
    _check_report(arguments.report, "fit")
    for name in ("target", "resume"):
        path = getattr(arguments, name)
        if path and not os.path.isfile(path):
            raise FileNotFoundError(f"'{name}' got {path}, but there is no file of that name")
    arguments.model = arguments.model or (_model_in(arguments.resume) if arguments.resume else MODEL)
    known = _quantities(arguments.model)
    default = arguments.model == MODEL
    bounds = _by_name("--free", (_bounds(text, known) for text in arguments.free or ()))
    if not (bounds or default or arguments.resume):
        raise ValueError(f"'--free' got nothing, but takes what is free of {arguments.model}: {', '.join(known)}")
    arguments.free = bounds or (None if arguments.resume else FREE)
    arguments.set = (SET if default else {}) | _values(arguments.set, known)
    _check_counts(1, arguments, "starts", "steps", "realisations")
    _check_counts(0, arguments, "screen", "prune")
    if arguments.band and not 0 < arguments.band[0] < arguments.band[1]:
        low, high = arguments.band
        raise ValueError(f"'band' got {low:g} and {high:g} Hz, but takes 0 < low < high")
    for name in ("channel", "encoding"):
        if getattr(arguments, name) and not arguments.target:
            got = arguments.channel[0] if name == "channel" else arguments.encoding
            raise ValueError(f"'--{name}' got {got}, but there is no --target to read it from")
    _check_implementation(arguments.implementation)
    _check_installed("fit", "optax", "matplotlib", *(() if arguments.quiet else ("rich",)))


def check_sample(arguments) -> None:
    """As `check_fit`, of ``sample``."""
    check_figure(arguments.out, "out")
    check_writable(arguments.save, "save")
    if Path(arguments.save).suffix.lower() != ".npz":
        raise ValueError(f"'--save' got {arguments.save}, but takes a name that ends in .npz")
    check_name(arguments.method, METHODS, "method in '--method'")
    _check_counts(2, arguments, "chains")
    _check_counts(1, arguments, "draws", "warmup")
    if arguments.target is None:
        for name in ("model", "free", "set", "record", "band", "segments", "channel", "encoding"):
            if getattr(arguments, name):
                raise ValueError(f"'--{name}' got {getattr(arguments, name)}, but there is no --target: the built-in "
                                 "example, an evoked response, has its own")  # fmt: skip
    else:
        _check_sampled(arguments)
    _check_installed("bayes", "blackjax", "matplotlib", *(() if arguments.quiet else ("rich",)))


def _check_sampled(arguments) -> None:
    """The options of a spectrum that is sampled."""
    if not os.path.isfile(arguments.target):
        raise FileNotFoundError(f"'target' got {arguments.target}, but there is no file of that name")
    if arguments.segments is None:
        raise ValueError(
            "'--segments' is missing: of how many independent segments the spectrum is the mean, which says how sure "
            "it is; segments that overlap by half count for about 0.95 of their number"
        )
    if not (math.isfinite(arguments.segments) and arguments.segments > 0):
        raise ValueError(f"'--segments' got {arguments.segments:g}, but takes a positive number")
    arguments.model = arguments.model or MODEL
    known, default = _quantities(arguments.model), arguments.model == MODEL
    bounds = _by_name("--free", (_bounds(text, known) for text in arguments.free or ()))
    if not (bounds or default):
        raise ValueError(f"'--free' got nothing, but takes what is free of {arguments.model}: {', '.join(known)}")
    arguments.free = bounds or SAMPLED
    arguments.set = (SAMPLE_SET if default else {}) | _values(arguments.set, known)
    arguments.band = arguments.band or DEFAULTS["band"]
    if not 0 < arguments.band[0] < arguments.band[1]:
        low, high = arguments.band
        raise ValueError(f"'band' got {low:g} and {high:g} Hz, but takes 0 < low < high")


def check_sweep(arguments) -> None:
    """As `check_fit`, of ``sweep``."""
    check_figure(arguments.picture, "picture")
    _check_report(arguments.report, "sweep")
    known = _quantities(arguments.model)
    arguments.over = _by_name("--over", (_grid(text, known) for text in arguments.over or OVER))
    if len(arguments.over) > 2:
        raise ValueError(f"'--over' got {len(arguments.over)} parameters, but takes one or two")
    arguments.set = _values(arguments.set, known)
    _check_counts(1, arguments, "every", "chunk")
    arguments.part = None if arguments.part is None else _part(arguments.part)
    _check_implementation(arguments.implementation)
    _check_installed("sweep", "matplotlib")


def check_bench(arguments) -> None:
    """As `check_fit`, of ``bench``."""
    check_figure(arguments.out, "out")
    check_writable(arguments.json, "json")
    if arguments.steps < 10 or arguments.steps % 10:
        raise ValueError(f"'--steps' got {arguments.steps}, but takes a multiple of 10")
    _check_implementation(arguments.implementation)
    _check_installed("fit", "matplotlib")


def check_writable(path: str, option: str) -> None:
    files.absolute(path, f"--{option}")


def check_figure(path: str, option: str) -> None:
    check_writable(path, option)
    if os.path.splitext(path)[1].lower() not in (".png", ".pdf", ".svg"):
        raise ValueError(f"'--{option}' got {path}, but takes a name that ends in .png, .pdf or .svg")


def check_page(path: str | os.PathLike, argument: str) -> None:
    """Raise ValueError unless a page of HTML can be written there."""
    files.absolute(path, argument)
    if os.path.splitext(path)[1].lower() != ".html":
        raise ValueError(f"'{argument}' got {os.fspath(path)}, but takes a name that ends in .html")


def _check_report(path: str | None, extra: str) -> None:
    if path is not None:
        check_page(path, "--report")
        _check_installed(extra, "jinja2")


# Names and numbers ----------------------------------------------------------------------------------------------------


@functools.cache
def catalogue() -> dict[str, Any]:
    """Names: of the implementations, and for each model of its parameters, inputs and states."""
    return json.loads(Path(__file__).with_name("catalogue.json").read_text())


def _quantities(model: str) -> list[str]:
    """Names of what can be set, swept or fitted of a model."""
    models = catalogue()["models"]
    check_name(model, models, "model")
    names = models[model]
    noisy = [f"noise.{name}" for name in (*names["inputs"], *names["states"])]
    return [*names["parameters"], *names["inputs"], *noisy]


def _model_in(path: str) -> str:
    """The name of a saved fit's model; a file that holds none is refused when it is loaded."""
    try:
        name = json.loads(Path(path).read_bytes())["settings"]["model"]
    except (ValueError, KeyError, TypeError):
        return MODEL
    return name if name in catalogue()["models"] else MODEL


def _bounds(text: str, known) -> tuple[str, tuple[float, float]]:
    name, (low, high) = _named(text, "--free", "NAME=LOW:HIGH, such as be=50:180", known, float, float)
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"'--free' got {low:g} and {high:g} for {name!r}, but takes finite bounds, low < high")
    return name, (low, high)


def _grid(text: str, known) -> tuple[str, tuple[float, float, int]]:
    form = "NAME=LOW:HIGH:COUNT, such as E_inp=0:400:256"
    name, (low, high, count) = _named(text, "--over", form, known, float, float, int)
    if count < 0:
        raise ValueError(f"'--over' got {text!r}, but takes {form}")
    return name, (low, high, count)


def _part(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        raise ValueError(f"'--part' got {text}, but takes I/N with 0 <= I < N, counted from 0, such as 0/4")
    return int(part), int(parts)


def _values(texts: list[str], known) -> dict[str, float]:
    values = (_named(text, "--set", "NAME=VALUE, such as C=135", known, float) for text in texts)
    return _by_name("--set", ((name, value) for name, (value,) in values))


def _named(text: str, option: str, form: str, known, *kinds: type) -> tuple[str, list[Any]]:
    """The name in an option's text, and its numbers of these kinds."""
    name, _, numbers = text.partition("=")
    try:
        values = [kind(x) for kind, x in zip(kinds, numbers.split(":"), strict=True)]
    except ValueError:
        raise ValueError(f"'{option}' got {text!r}, but takes {form}") from None
    check_name(name.strip(), known, "parameter or input")
    return name.strip(), values


def _by_name(option: str, pairs) -> dict[str, Any]:
    values = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"'{option}' got {name} twice")
        values[name] = value
    return values


def _check_counts(least: int, arguments, *names: str) -> None:
    """Of those that were given."""
    values = {name: getattr(arguments, name) for name in names}
    check_counts(least, **{name: value for name, value in values.items() if value is not None})


def _check_implementation(name: str | None) -> None:
    check_implementation(name, catalogue()["implementations"])


def _check_installed(extra: str, *packages: str) -> None:
    for package in packages:
        check_installed(package, extra)
