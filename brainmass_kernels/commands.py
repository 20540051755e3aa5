"""What the commands do, once their arguments are read and checked by `cli`, which does without JAX."""

from __future__ import annotations

from . import _startup as _startup

# isort: split
import functools
import importlib
import json
import sys
import threading
import warnings
from contextlib import suppress
from importlib.util import find_spec
from typing import Any

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np

from . import files, models, options, plots, routing, units
from ._jax import programs_kept
from .codegen import kernel_cache
from .dispatch import implementations as reasons_of
from .dispatch import platform
from .fitting.fit import fit as run_fit
from .fitting.result import Fit
from .fitting.steps import Meanwhile
from .spectra import load_spectrum, resting_meg

# What only some commands take is imported by these.


def _with_programs_kept(command):
    """A command that compiles nothing that an earlier one has compiled."""

    @functools.wraps(command)
    def wrapper(arguments) -> int:
        with programs_kept(kernel_cache.programs()):
            return command(arguments)

    return wrapper


@_with_programs_kept
def fit(arguments) -> int:
    saved = Fit.load(arguments.resume) if arguments.resume else None
    model, inputs, noise = set_values(getattr(models, arguments.model)(), arguments.set)
    result = run_fit(
        model,
        _target(arguments, saved),
        arguments.free,
        inputs=inputs,
        noise=noise,
        starts=_or(arguments.starts, None if saved else options.DEFAULTS["starts"]),
        screen=arguments.screen,
        steps=arguments.steps,
        prune=arguments.prune,
        optimiser=None if arguments.optimiser == "adam" else arguments.optimiser,
        checkpoint=arguments.checkpoint,
        progress=Meanwhile(not arguments.quiet, _import_drawing),
        resume=saved,
        implementation=arguments.implementation,
        # A resumed fit keeps its own.
        predict="linear" if arguments.linear else None,
        **_settings(arguments, saved),
    )
    print(result)
    print(f"\n  ran on {result.implementation}: {result.reason}")
    result.save(arguments.json)
    plots.save(plots.figure(result), arguments.out)
    if arguments.report:
        from . import report

        if not arguments.quiet:
            print("standard errors and the report ...", file=sys.stderr, flush=True)
        report.write_fit(result, arguments.report, arguments.command)
    print(f"  wrote {_listed(arguments.out, arguments.json, arguments.report)}")
    return 0


@_with_programs_kept
def sample(arguments) -> int:
    from .inference import examples
    from .inference.sample import sample as run_sample

    if arguments.target:
        model, inputs, noise = set_values(getattr(models, arguments.model)(), arguments.set)
        target, chosen = _target(arguments, None), (arguments.record, tuple(arguments.band))
        assert target is not None
        density = examples.spectral(model, target, arguments.free, arguments.segments, inputs, noise, *chosen)
    else:
        density = examples.evoked()
    with warnings.catch_warnings():
        # What is wrong with the draws is in the table.
        warnings.simplefilter("ignore", UserWarning)
        posterior = run_sample(
            density, method=arguments.method, chains=arguments.chains, draws=arguments.draws,
            warmup=arguments.warmup, screen=1024, key=jax.random.key(arguments.seed),
            checkpoint=arguments.checkpoint, progress=Meanwhile(not arguments.quiet, _import_drawing),
        )  # fmt: skip
    print(posterior)
    if not arguments.target:
        known = ", ".join(f"{name} = {value:g}" for name, value in examples.KNOWN.items())
        print(f"\n  the data were simulated with {known}")
    posterior.save(arguments.save)
    plots.save(posterior.plot(), arguments.out)
    print(f"  wrote {_listed(arguments.out, arguments.save)}")
    return 0


def _import_drawing() -> None:
    """Import in a thread what draws the figure, which takes most of a second."""

    def run() -> None:
        # What cannot be imported is told where it is needed.
        with suppress(ImportError):
            importlib.import_module(f"{__package__}.page")
            importlib.import_module("matplotlib.backends.backend_agg")

    threading.Thread(target=run, daemon=True).start()


def _listed(*names: str | None) -> str:
    """The names of the files that were written, in words."""
    *first, last = [name for name in names if name]
    return f"{', '.join(first)} and {last}"


def _or(value, default):
    return default if value is None else value


def _settings(arguments, saved) -> dict:
    """Settings of a fit: from the command line, else of the resumed fit, else the defaults."""
    defaults = saved.settings if saved else options.DEFAULTS
    if arguments.seed is None and saved:
        key = jax.random.wrap_key_data(jnp.asarray(defaults["key"], jnp.uint32))
    else:
        key = jax.random.key(_or(arguments.seed, 0))
    return {
        "key": key,
        "record": _or(arguments.record, defaults["record"]),
        "dt": (defaults["dt"] if arguments.dt is None else arguments.dt / 1e3) * u.second,
        "band": _or(arguments.band, defaults["band"]),
        "realisations": _or(arguments.realisations, defaults["realisations"]),
        "duration": _or(arguments.duration, defaults["duration"]) * u.second,
        "background": not arguments.no_background and (saved is None or defaults["background"]),
    }


def _target(arguments, saved):
    if not arguments.target:
        return None if saved else resting_meg()
    with warnings.catch_warnings():
        warnings.showwarning = _warn
        return load_spectrum(arguments.target, arguments.channel, arguments.encoding)


def _warn(message, *_):
    """Print a warning on one line, like an error."""
    print(f"brainmass-kernels: warning: {' '.join(str(message).split())}", file=sys.stderr)


def set_values(model, values: dict[str, float]) -> tuple[Any, dict, dict]:
    """A model with these values, and its inputs and noise; plain numbers in the unit of each."""
    known = routing.places(model)
    return routing.put(model, {}, {}, {name: units.attach(value, known[name].unit) for name, value in values.items()})


@_with_programs_kept
def sweep(arguments) -> int:
    from . import report
    from .sweep_results import SweepPart
    from .sweeps import sweep as run_sweep

    model, inputs, noise = set_values(getattr(models, arguments.model)(), arguments.set)
    known = routing.places(model)
    over = {name: units.attach(np.linspace(*grid), known[name].unit) for name, grid in arguments.over.items()}
    noisy = noise or any(n.startswith(routing.NOISE) for n in over)
    grid = run_sweep(
        model, over, arguments.duration * u.second, arguments.dt * u.ms, inputs=inputs, noise=noise,
        key=jax.random.key(arguments.seed) if noisy else None, transient=arguments.transient * u.second,
        every=arguments.every, out=arguments.out, chunk=arguments.chunk, implementation=arguments.implementation,
        progress=not arguments.quiet, part=arguments.part,
    )  # fmt: skip
    if isinstance(grid, SweepPart):
        print(grid)
        return 0
    plots.save(grid.plot(), arguments.picture)
    if arguments.report:
        report.write_sweep(grid, arguments.report, arguments.command)
    wrote = _listed(arguments.out, arguments.picture, arguments.report)
    print(f"{grid!r}\n  ran on {grid.about['implementation']}\n  wrote {wrote}")
    return 0


def bench(arguments) -> int:
    from . import bench as benchmark

    small, large = ((1, 64, 1024, 16_384), 1024) if platform() == "cpu" else ((128, 4096, 65_536, 1_048_576), 65_536)
    cases = [
        benchmark.Case(lanes, arguments.steps, precision=arguments.precision) for lanes in arguments.lanes or small
    ]
    cases.append(benchmark.Case(large, arguments.steps, gradient=True, precision=arguments.precision))
    print(benchmark.HEADER)
    results = []
    for case in cases:
        results.append(benchmark.measure(case, arguments.implementation))
        print(benchmark.line(results[-1]), flush=True)
    rivals = rivals_of(arguments)
    points = benchmark.work_precision(("exp_euler", "exact", "strang", "heun"))
    print(f"\n{'scheme':<12} {'dt':>8} {'rms error':>12} {'one second takes':>18}")
    for p in points:
        print(f"{p.scheme:<12} {p.dt_ms:>5g} ms {p.rms:>9.2g} mV {p.seconds * 1e3:>15.3g} ms")
    plots.save(plots.speed_figure(results, points, rivals), arguments.out)
    about = {**benchmark.machine(), "measured": [benchmark.record(result) for result in results]}
    about["brainmass"] = [benchmark.record(r) for r in rivals]
    files.write_text(arguments.json, json.dumps({**about, "work_precision": [p._asdict() for p in points]}, indent=1))
    print(f"\n  wrote {arguments.out} and {arguments.json}")
    return 0


def rivals_of(arguments) -> list:
    """Measurements against brainmass, printed one by one; none if brainmass is not installed."""
    if find_spec("brainmass") is None:
        print("\nagainst brainmass: not measured, as it is not installed: pip install 'brainmass-kernels[brainmass]'")
        return []
    from . import bench as benchmark

    print(f"\n{benchmark.RIVALS}")
    rivals = []
    for lanes in arguments.lanes or ((1, 64, 1024) if platform() == "cpu" else (128, 4096, 65_536)):
        case = benchmark.Case(lanes, arguments.steps, scheme="exp_euler", precision=arguments.precision)
        rivals += (results := benchmark.against_brainmass(case, arguments.implementation))
        print("\n".join(map(benchmark.rival_line, results)), flush=True)
    return rivals


def implementations(_) -> int:
    reasons = reasons_of()
    width = max(map(len, reasons))
    print("\n".join(f"{name:<{width}}  {reason}" for name, reason in reasons.items()))
    return 0


def info(arguments) -> int:
    from . import report

    about = report.installation()
    print(json.dumps(about, indent=1) if arguments.json else report.installation_text(about))
    return 0
