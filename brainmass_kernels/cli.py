"""The command line: ``brainmass-kernels fit``, ``sample``, ``sweep``, ``bench``, ``implementations`` and ``info``."""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys

from . import _program, options
from ._version import __version__
from .errors import Unsupported
from .interrupts import Ending, ending
from .options import DEFAULTS, FREE, MODEL, OVER, SET

_EXPECTED = (ValueError, TypeError, OSError, ImportError, FloatingPointError, Unsupported)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 for an error of the user's.

    Without ``argv`` it reads the process's command line, and SIGINT and SIGTERM end the process with 130 and 143.
    """
    if argv is not None:
        return _run(argv)
    with ending("brainmass-kernels: interrupted") as end:
        status = _run(argv, end)
        if _program.OURS and not end.status:
            end.finish(status)
        return status


def _run(argv: list[str] | None, end: Ending | None = None) -> int:
    arguments = _parser().parse_args(argv)
    arguments.command = shlex.join(["brainmass-kernels", *(sys.argv[1:] if argv is None else argv)])
    try:
        arguments.check(arguments)
        # JAX is imported here, and takes seconds.
        return getattr(importlib.import_module(f"{__package__}.commands"), arguments.run)(arguments)
    except KeyboardInterrupt:
        # Otherwise `ending` prints it.
        if end is None:
            print("brainmass-kernels: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        # An interrupt in C++ may arrive as another error.
        if end and end.status:
            return end.status
        if not isinstance(error, _EXPECTED):
            raise
        print(f"brainmass-kernels: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="brainmass-kernels", description="Fused, differentiable neural masses.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_fit(commands)
    _add_sample(commands)
    _add_sweep(commands)
    _add_bench(commands)
    listing = commands.add_parser("implementations", help="which implementations run here, and why the others cannot")
    listing.set_defaults(check=lambda _: None, run="implementations")
    info = commands.add_parser("info", help="versions, devices, implementations and the cache, for a bug report")
    info.add_argument("--json", action="store_true", help="the same as JSON")
    info.set_defaults(check=lambda _: None, run="info")
    return parser


def _add_fit(commands):
    fit = commands.add_parser(
        "fit",
        help="fit a model's parameters to power spectra by gradients",
        description="Fit the parameters of a mass to one or many power spectra by gradients, all starts and all "
        "spectra in one simulation. Without a target: the spectrum of resting MEG.",
    )
    add = fit.add_argument
    bounds = ", ".join(f"{name}={low:g}:{high:g}" for name, (low, high) in FREE.items())
    values = ", ".join(f"{name}={value:g}" for name, value in SET.items())
    add("--model", help=f"one of `bk.list_models()` (default: {MODEL}, or that of the resumed fit)")
    add(
        "--target", metavar="FILE", help=".npz (freqs_hz, power), .csv, .tsv (freq, power, ...), or a recording as .edf"
    )
    add("--channel", metavar="NAME", action="append",
        help="of a recording or a table; repeat for more (default: all of EEG or MEG, all columns)")  # fmt: skip
    add("--encoding", metavar="NAME", help="of the texts in the target, such as latin1 (default: detected)")
    add("--free", metavar="NAME=LOW:HIGH", action="append",
        help="a free parameter, input or noise intensity (noise.E_inp) and its bounds; repeat for more "
             f"(default for {MODEL}: {bounds})")  # fmt: skip
    add("--set", metavar="NAME=VALUE", action="append", default=[],
        help=f"any other of these, at one value; repeat for more (default for {MODEL}: {values})")  # fmt: skip
    add("--record", metavar="NAME", help="the observable or state compared (default: the model's first)")
    add("--dt", type=float, help="milliseconds of a step (default: 1)")
    add("--band", metavar=("LOW", "HIGH"), nargs=2, type=float, help="compare the spectra here, Hz (default: 2 40)")
    add("--starts", type=int, help=f"starting points of each spectrum (default: {DEFAULTS['starts']})")
    add("--screen", type=int, default=1024, help="candidates that the starts are chosen from (default: %(default)s)")
    add("--steps", type=int, default=100, help="most optimiser steps (default: %(default)s)")
    add("--prune", type=int, default=0, metavar="STEPS", help="drop the worse half of the starts after every so many")
    add("--optimiser", choices=["adam", "levenberg_marquardt"], default="adam", help="(default: %(default)s)")
    add("--seed", type=int, help="of the noise and of the starting points (default: 0)")
    add("--realisations", type=int, help=f"runs averaged over for a spectrum (default: {DEFAULTS['realisations']})")
    add("--duration", type=float, help=f"seconds of each, one of them transient (default: {DEFAULTS['duration']:g})")
    add("--linear", action="store_true",
        help="spectra about stable fixed points, nothing is simulated: for weak noise; see docs/linear.md")  # fmt: skip
    add("--no-background", action="store_true", help="no power law beside the model's spectrum, only a scale")
    add("--implementation", help="the implementation to run on (default: the fastest that can)")
    add("--out", metavar="FILE", default="fit.png", help="the figure, .png, .pdf or .svg (default: %(default)s)")
    add("--json", metavar="FILE", default="fit.json", help="the result (default: %(default)s)")
    add("--report", metavar="FILE", help="also a page to read or send, .html, with standard errors")
    add("--resume", metavar="FILE", help="continue the fit saved in this JSON")
    add("--checkpoint", metavar="FILE", help="save the running fit here; the same command resumes an interrupted fit")
    add("--quiet", action="store_true", help="no progress bar")
    fit.set_defaults(check=_check_fit, run="fit")


def _check_fit(arguments):
    options.check_fit(arguments)
    if not arguments.quiet:
        # On stderr, as all progress: a fit takes some seconds until its first step.
        target = arguments.target or ("its target" if arguments.resume else "resting MEG")
        print(f"fitting {arguments.model} to {target} ...", file=sys.stderr, flush=True)


def _add_sample(commands):
    sample = commands.add_parser(
        "sample",
        help="draw from the posterior of a model's parameters, given a power spectrum",
        description="Draw from the posterior of the parameters of a mass given a power spectrum, about a stable fixed "
        "point (docs/linear.md), all chains in one run. Without a target: of a simulated evoked response, whose "
        "parameters are known.",
    )
    add = sample.add_argument
    bounds = ", ".join(f"{name}={low:g}:{high:g}" for name, (low, high) in options.SAMPLED.items())
    values = ", ".join(f"{name}={value:g}" for name, value in options.SAMPLE_SET.items())
    add("--model", help=f"one of `bk.list_models()` (default: {MODEL})")
    add("--target", metavar="FILE", help=".npz (freqs_hz, power), .csv, .tsv (freq, power, ...), or a recording")
    add("--channel", metavar="NAME", action="append", help="of a recording or a table")
    add("--encoding", metavar="NAME", help="of the texts in the target, such as latin1 (default: detected)")
    add("--segments", type=float, metavar="N", help="independent segments that the spectrum is the mean of; needed")
    add("--free", metavar="NAME=LOW:HIGH", action="append",
        help="a parameter, input or noise intensity and its bounds, between which it is uniform; repeat for more "
             f"(default for {MODEL}: {bounds})")  # fmt: skip
    add("--set", metavar="NAME=VALUE", action="append", default=[],
        help="any other of these, at one value; of a free one the value at which the model is tried first "
             f"(default for {MODEL}: {values})")  # fmt: skip
    add("--record", metavar="NAME", help="the observable or state compared (default: the model's first)")
    add("--band", metavar=("LOW", "HIGH"), nargs=2, type=float, help="compare the spectra here, Hz (default: 2 40)")
    add("--method", default="nuts", help="nuts, chees, mclmc or smc (default: %(default)s)")
    add("--chains", type=int, default=8, help="that run beside each other (default: %(default)s)")
    add("--draws", type=int, default=500, help="of each chain (default: %(default)s)")
    add("--warmup", type=int, default=300, help="iterations that adapt the sampler (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the draws (default: %(default)s)")
    add("--out", metavar="FILE", default="posterior.png", help="the figure, .png, .pdf or .svg (default: %(default)s)")
    add("--save", metavar="FILE", default="posterior.npz", help="the draws, .npz (default: %(default)s)")
    add("--checkpoint", metavar="FILE", help="save the running chains here; the same command resumes them")
    add("--quiet", action="store_true", help="no progress bar")
    sample.set_defaults(check=_check_sample, run="sample")


def _check_sample(arguments):
    options.check_sample(arguments)
    if not arguments.quiet:
        what = arguments.target or "a simulated evoked response"
        print(f"sampling the posterior given {what} ...", file=sys.stderr, flush=True)


def _add_sweep(commands):
    sweep = commands.add_parser(
        "sweep",
        help="run a grid over one or two parameters, and draw its rhythms",
        description="Run a model at every point of a grid over one or two parameters, inputs or noise intensities, in "
        "chunks that fit memory, and write the statistics of each mass and a picture of them. After an interrupt, the "
        "same command resumes after the last finished chunk.",
    )
    add = sweep.add_argument
    add("--model", default=MODEL, help="one of `bk.list_models()` (default: %(default)s)")
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
    add("--part", metavar="I/N",
        help="do the I-th of N parts, counted from 0 (a SLURM array: $SLURM_ARRAY_TASK_ID/N); workers share --out, and "
             "the last one writes it")  # fmt: skip
    add("--implementation", help="the implementation to run on (default: the fastest that can)")
    add("--out", metavar="FILE", default="sweep.npz", help="the grid, .npz, .nc or .zarr (default: %(default)s)")
    add("--picture", metavar="FILE", default="sweep.png", help="the figure, .png, .pdf or .svg (default: %(default)s)")
    add("--report", metavar="FILE", help="also a page to read or send, .html")
    add("--quiet", action="store_true", help="no progress")
    sweep.set_defaults(check=options.check_sweep, run="sweep")


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
    bench.set_defaults(check=options.check_bench, run="bench")


if __name__ == "__main__":
    sys.exit(main())
