"""The command line: ``brainmass-kernels fit``, ``sweep``, ``bench`` and ``implementations``."""

from __future__ import annotations

import argparse
import os
import sys
from importlib import metadata
from typing import Any

from .interrupts import Ending, ending

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
#: The grid that is swept unless --over is given.
OVER = ("E_inp=0:400:64", "C=60:240:64")
DEFAULTS = {"starts": 16, "seed": 0, "realisations": 8, "duration": 9.0, "band": (2.0, 40.0)}


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 for an error of the user's.

    Without ``argv`` it reads the process's command line, and SIGINT and SIGTERM end the process with 130 and 143.
    """
    if argv is not None:
        return _run(argv)
    with ending("brainmass-kernels: interrupted") as end:
        return _run(argv, end)


def _run(argv: list[str] | None, end: Ending | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        # Otherwise `ending` prints it.
        if end is None:
            print("brainmass-kernels: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        # An interrupt in C++ may arrive as another error.
        if end and end.status:
            return end.status
        if not isinstance(error, _expected()):
            raise
        print(f"brainmass-kernels: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _expected() -> tuple[type[Exception], ...]:
    from . import Unsupported

    return (ValueError, TypeError, OSError, ImportError, FloatingPointError, Unsupported)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="brainmass-kernels", description="Fused, differentiable neural masses.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {metadata.version('brainmass-kernels')}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_fit(commands)
    _add_sweep(commands)
    _add_bench(commands)
    listing = commands.add_parser("implementations", help="which implementations run here, and why the others cannot")
    listing.set_defaults(run=_implementations)
    return parser


def _add_fit(commands):
    fit = commands.add_parser(
        "fit",
        help="fit Jansen-Rit parameters to power spectra by gradients",
        description="Fit the parameters of a Jansen-Rit mass to one or many power spectra by gradients, all starts and "
        "all spectra in one simulation. Without a target: the spectrum of resting MEG.",
    )
    add = fit.add_argument
    bounds = ", ".join(f"{name}={low:g}:{high:g}" for name, (low, high) in FREE.items())
    add(
        "--target", metavar="FILE", help=".npz (freqs_hz, power), .csv, .tsv (freq, power, ...), or a recording as .edf"
    )
    add("--channel", metavar="NAME", action="append",
        help="of a recording or a table; repeat for more (default: all of EEG or MEG, all columns)")  # fmt: skip
    add("--encoding", metavar="NAME", help="of the texts in the target, such as latin1 (default: detected)")
    add("--free", metavar="NAME=LOW:HIGH", action="append",
        help="a free parameter, input or noise intensity (noise.E_inp) and its bounds; repeat for more "
             f"(default: {bounds})")  # fmt: skip
    add("--band", metavar=("LOW", "HIGH"), nargs=2, type=float, help="compare the spectra here, Hz (default: 2 40)")
    add("--starts", type=int, help=f"starting points of each spectrum (default: {DEFAULTS['starts']})")
    add("--screen", type=int, default=1024, help="candidates that the starts are chosen from (default: %(default)s)")
    add("--steps", type=int, default=100, help="most optimiser steps (default: %(default)s)")
    add("--prune", type=int, default=0, metavar="STEPS", help="drop the worse half of the starts after every so many")
    add("--optimiser", choices=["adam", "levenberg_marquardt"], default="adam", help="(default: %(default)s)")
    add("--seed", type=int, help="of the noise and of the starting points (default: 0)")
    add("--realisations", type=int, help=f"runs averaged over for a spectrum (default: {DEFAULTS['realisations']})")
    add("--duration", type=float, help=f"seconds of each, one of them transient (default: {DEFAULTS['duration']:g})")
    add("--no-background", action="store_true", help="no power law beside the model's spectrum, only a scale")
    add("--implementation", help="the implementation to run on (default: the fastest that can)")
    add("--out", metavar="FILE", default="fit.png", help="the figure, .png, .pdf or .svg (default: %(default)s)")
    add("--json", metavar="FILE", default="fit.json", help="the result (default: %(default)s)")
    add("--resume", metavar="FILE", help="continue the fit saved in this JSON")
    add("--checkpoint", metavar="FILE", help="save the running fit here; the same command resumes an interrupted fit")
    add("--quiet", action="store_true", help="no progress bar")
    fit.set_defaults(run=_fit)


def _add_sweep(commands):
    sweep = commands.add_parser(
        "sweep",
        help="run a grid over one or two parameters, and draw its rhythms",
        description="Run a model at every point of a grid over one or two parameters, inputs or noise intensities, in "
        "chunks that fit memory, and write the statistics of each mass and a picture of them. After an interrupt, the "
        "same command resumes after the last finished chunk.",
    )
    add = sweep.add_argument
    add("--model", default="JansenRit", help="one of `bk.list_models()` (default: %(default)s)")
    add("--over", metavar="NAME=LOW:HIGH:COUNT", action="append",
        help="a parameter, input or noise intensity (noise.E_inp) in its own unit; once or twice "
             f"(default: {' '.join(OVER)})")  # fmt: skip
    add("--set", metavar="NAME=VALUE", action="append", default=[], help="any other of these, at one value")
    add("--duration", type=float, default=6.0, help="seconds, with the transient (default: %(default)s)")
    add("--transient", type=float, default=2.0, help="seconds without records (default: %(default)s)")
    add("--dt", type=float, default=0.5, help="milliseconds of a step (default: %(default)s)")
    add("--every", type=int, default=10, help="steps from one record to the next (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    add("--chunk", type=int, help="masses run together (default: by device)")
    add("--implementation", help="the implementation to run on (default: the fastest that can)")
    add("--out", metavar="FILE", default="sweep.npz", help="the grid, .npz, .nc or .zarr (default: %(default)s)")
    add("--picture", metavar="FILE", default="sweep.png", help="the figure, .png, .pdf or .svg (default: %(default)s)")
    add("--quiet", action="store_true", help="no progress")
    sweep.set_defaults(run=_sweep)


def _sweep(arguments) -> int:
    _check_figure(arguments.picture, "picture")

    import brainunit as u
    import jax

    from . import models, plots, routing, sweep
    from .extras import needs
    from .models.base import check_name

    needs("matplotlib", "sweep")
    known = {entry.model.__name__: entry.model for entry in models.list_models()}
    check_name(arguments.model, known, "model")
    model = known[arguments.model]()
    over = dict(_grid(option, model) for option in arguments.over or OVER)
    if len(over) > 2:
        raise ValueError(f"'--over' got {len(over)} parameters, but takes one or two")
    values = dict(_value(option, model) for option in arguments.set)
    model, inputs, noise = routing.put(model, {}, {}, values)
    noisy = noise or any(n.startswith(routing.NOISE) for n in over)
    grid = sweep(
        model, over, arguments.duration * u.second, arguments.dt * u.ms, inputs=inputs, noise=noise,
        key=jax.random.key(arguments.seed) if noisy else None, transient=arguments.transient * u.second,
        every=arguments.every, out=arguments.out, chunk=arguments.chunk, implementation=arguments.implementation,
        progress=not arguments.quiet,
    )  # fmt: skip
    plots.save(grid.plot(), arguments.picture)
    print(f"{grid!r}\n  ran on {grid.about['implementation']}\n  wrote {arguments.out} and {arguments.picture}")
    return 0


def _unit_of(name: str, model):
    from .models.base import check_name
    from .routing import places

    known = places(model)
    check_name(name, known, "parameter or input")
    return known[name].unit


def _grid(option: str, model):
    import numpy as np

    from . import units

    form = "NAME=LOW:HIGH:COUNT, such as E_inp=0:400:256"
    name, (low, high, count) = _parsed(option, "--over", form, float, float, int)
    if count < 0:
        raise ValueError(f"'--over' got {option!r}, but takes {form}")
    return name, units.attach(np.linspace(low, high, count), _unit_of(name, model))


def _value(option: str, model):
    from . import units

    name, (value,) = _parsed(option, "--set", "NAME=VALUE, such as C=135", float)
    return name, units.attach(value, _unit_of(name, model))


def _parsed(option: str, argument: str, form: str, *kinds: type) -> tuple[str, list[Any]]:
    """The name of an option, and its numbers of these kinds."""
    name, _, numbers = option.partition("=")
    try:
        return name.strip(), [kind(x) for kind, x in zip(kinds, numbers.split(":"), strict=True)]
    except ValueError:
        raise ValueError(f"'{argument}' got {option!r}, but takes {form}") from None


def _add_bench(commands):
    bench = commands.add_parser(
        "bench",
        help="how fast this machine is, fused against a plain scan, and how accurate each scheme is for its time",
        description="Compare the fused simulation and its gradient with a plain lax.scan of the same equations, and "
        "with brainmass if it is installed, first in their results and then in their times on this machine; then the "
        "error of each scheme against its time.",
    )
    add = bench.add_argument
    add("--lanes", metavar="N", nargs="+", type=int, help="numbers of masses (default: by platform)")
    add("--steps", type=int, default=1000, help="steps of each run (default: %(default)s)")
    add("--precision", choices=("exact", "fast"), default="exact", help="as in simulate() (default: %(default)s)")
    add("--implementation", help="the implementation to time (default: the fastest that can run)")
    add("--out", metavar="FILE", default="bench.png", help="the figure, .png, .pdf or .svg (default: %(default)s)")
    add("--json", metavar="FILE", default="bench.json", help="the result (default: %(default)s)")
    bench.set_defaults(run=_bench)


def _bench(arguments) -> int:
    _check_figure(arguments.out, "out")
    _check_writable(arguments.json, "json")
    if arguments.steps < 10 or arguments.steps % 10:
        raise ValueError(f"'--steps' got {arguments.steps}, but takes a multiple of 10")

    import json

    from . import bench, files, plots
    from .dispatch import platform
    from .extras import needs

    needs("matplotlib")
    small, large = ((1, 64, 1024, 16_384), 1024) if platform() == "cpu" else ((128, 4096, 65_536, 1_048_576), 65_536)
    cases = [bench.Case(lanes, arguments.steps, precision=arguments.precision) for lanes in arguments.lanes or small]
    cases.append(bench.Case(large, arguments.steps, gradient=True, precision=arguments.precision))
    print(bench.HEADER)
    results = []
    for case in cases:
        results.append(bench.measure(case, arguments.implementation))
        print(bench.line(results[-1]), flush=True)
    rivals = _rivals(arguments)
    points = bench.work_precision(("exp_euler", "exact", "strang", "heun"))
    print(f"\n{'scheme':<12} {'dt':>8} {'rms error':>12} {'one second takes':>18}")
    for p in points:
        print(f"{p.scheme:<12} {p.dt_ms:>5g} ms {p.rms:>9.2g} mV {p.seconds * 1e3:>15.3g} ms")
    plots.save(plots.speed_figure(results, points, rivals), arguments.out)
    about = {**bench.machine(), "measured": [bench.record(result) for result in results]}
    about["brainmass"] = [bench.record(r) for r in rivals]
    files.write_text(arguments.json, json.dumps({**about, "work_precision": [p._asdict() for p in points]}, indent=1))
    print(f"\n  wrote {arguments.out} and {arguments.json}")
    return 0


def _rivals(arguments) -> list:
    """Measurements against brainmass, printed one by one; none if brainmass is not installed."""
    from importlib.util import find_spec

    from . import bench
    from .dispatch import platform

    if find_spec("brainmass") is None:
        print("\nagainst brainmass: not measured, as it is not installed: pip install 'brainmass-kernels[brainmass]'")
        return []
    print(f"\n{bench.RIVALS}")
    rivals = []
    for lanes in arguments.lanes or ((1, 64, 1024) if platform() == "cpu" else (128, 4096, 65_536)):
        case = bench.Case(lanes, arguments.steps, scheme="exp_euler", precision=arguments.precision)
        rivals += (results := bench.against_brainmass(case, arguments.implementation))
        print("\n".join(map(bench.rival_line, results)), flush=True)
    return rivals


def _implementations(_) -> int:
    from . import implementations

    reasons = implementations()
    width = max(map(len, reasons))
    print("\n".join(f"{name:<{width}}  {reason}" for name, reason in reasons.items()))
    return 0


def _fit(arguments) -> int:
    # Checked first, as it would otherwise fail only after the fit.
    _check_figure(arguments.out, "out")
    _check_writable(arguments.json, "json")

    import brainunit as u

    from . import plots
    from .extras import needs
    from .fitting.fit import fit
    from .fitting.result import Fit
    from .models import JansenRit

    needs("matplotlib")
    saved = Fit.load(arguments.resume) if arguments.resume else None
    result = fit(
        JansenRit(),
        _target(arguments, saved),
        _free(arguments.free) if arguments.free or not saved else None,
        inputs={"E_inp": 220.0 * u.Hz},
        noise={"E_inp": 2.0 * u.Hz * u.second**0.5},
        starts=_or(arguments.starts, None if saved else DEFAULTS["starts"]),
        screen=arguments.screen,
        steps=arguments.steps,
        prune=arguments.prune,
        optimiser=None if arguments.optimiser == "adam" else arguments.optimiser,
        checkpoint=arguments.checkpoint,
        progress=not arguments.quiet,
        resume=saved,
        implementation=arguments.implementation,
        **_settings(arguments, saved),
    )
    print(result)
    print(f"\n  ran on {result.implementation}: {result.reason}")
    result.save(arguments.json)
    plots.save(plots.figure(result), arguments.out)
    print(f"  wrote {arguments.out} and {arguments.json}")
    return 0


def _or(value, default):
    return default if value is None else value


def _settings(arguments, saved) -> dict:
    """Settings of `fit`: from the command line, else of the resumed fit, else the defaults."""
    import brainunit as u
    import jax
    import jax.numpy as jnp

    defaults = saved.settings if saved else DEFAULTS
    if arguments.seed is None and saved:
        key = jax.random.wrap_key_data(jnp.asarray(defaults["key"], jnp.uint32))
    else:
        key = jax.random.key(_or(arguments.seed, 0))
    return {
        "key": key,
        "band": _or(arguments.band, defaults["band"]),
        "realisations": _or(arguments.realisations, defaults["realisations"]),
        "duration": _or(arguments.duration, defaults["duration"]) * u.second,
        "background": not arguments.no_background and (saved is None or defaults["background"]),
    }


def _target(arguments, saved):
    import warnings

    from .spectra import load_spectrum, resting_meg

    if arguments.target:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            return load_spectrum(arguments.target, arguments.channel, arguments.encoding)
    if arguments.channel:
        raise ValueError(f"'--channel' got {arguments.channel[0]}, but there is no --target to read it from")
    if arguments.encoding:
        raise ValueError(f"'--encoding' got {arguments.encoding}, but there is no --target to read")
    return None if saved else resting_meg()


def _warn(message, *_):
    """Print a warning on one line, like an error."""
    print(f"brainmass-kernels: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _free(options: list[str] | None) -> dict[str, tuple[float, ...]]:
    form = "NAME=LOW:HIGH, such as be=50:180"
    named = (_parsed(option, "--free", form, float, float) for option in options or ())
    return {name: tuple(bounds) for name, bounds in named} or FREE


def _check_writable(path: str, option: str):
    from .files import absolute

    absolute(path, f"--{option}")


def _check_figure(path: str, option: str):
    _check_writable(path, option)
    if os.path.splitext(path)[1].lower() not in (".png", ".pdf", ".svg"):
        raise ValueError(f"'--{option}' got {path}, but takes a name that ends in .png, .pdf or .svg")


if __name__ == "__main__":
    sys.exit(main())
