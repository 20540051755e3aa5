"""One part of `benchmarks.device_check`, in a process of its own: ``python -m benchmarks.device_parts NAME --out DIR``.

A part is a list of items, each of which becomes a line of ``device_check.jsonl``, on disk before the next begins. An
item that fails is reported and the next is tried; a CUDA error stays in a process, so after one the process ends, and
`device_check` starts another at the next item.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

import brainmass_kernels as bk
from brainmass_kernels import bench, dispatch

from . import cases, checks, counters, networks
from .chips import ceiling, expected
from .parts import LINES, LOST, SEPARATOR, note
from .timing import versions

ROOT = Path(__file__).parent.parent
ACCELERATORS = ("mosaic_tpu", "mosaic_gpu", "triton")
IN_FLOAT64 = ("triton", "numba", "scan")
# Words of an error after which nothing more runs in a process.
POISONED = ("CUDA_ERROR", "ILLEGAL_ADDRESS", "illegal memory access", "misaligned address", "device-side assert")
# Steps of a scan that a speed is compared with: what a step takes does not depend on their number.
SCANNED = 1000


ASKED_OF_THE_DRIVER = ("--query-gpu=name,driver_version,clocks.max.sm,memory.total",)


class Part:
    """What a part knows of its surroundings, and how it reports.

    Attributes
    ----------
    name : such as "forward-triton"
    implementation : that it is about
    until : when it should have ended, of `time.monotonic`
    skip : items that an earlier process of this part has begun
    dry : tiny sizes
    first : of the timed cases, at most so many
    """

    def __init__(self, name: str, out: Path, seconds: float, skip: int, dry: bool, first: int | None):
        self.name, self.out, self.skip, self.dry, self.first = name, out, skip, dry, first
        self.until = time.monotonic() + seconds
        self.implementation = name.partition(SEPARATOR)[2]

    def note(self, **row) -> None:
        note(self.out / LINES, part=self.name, **row)

    def each(self, items: dict[str, Any], run: Callable[[Any], dict[str, Any]], kind: str) -> None:
        """``run`` of each item in turn: a line when it begins, and one of what it gave."""
        names = list(items)
        for at, name in list(enumerate(names))[self.skip :]:
            if time.monotonic() > self.until:
                self.note(not_reached=names[at:])
                return
            self.note(began=name, at=at)
            began = time.monotonic()
            try:
                row = run(items[name])
            except (Exception, SystemExit) as error:  # reported, counted in the exit status, and the next is tried
                row = {"ok": False, "error": described(error), "where": traceback.format_exc()[-2000:]}
            took = round(time.monotonic() - began, 2)
            self.note(**{kind: name}, implementation=self.implementation, **row, took=took)
            print(name, "took", took, "s", "" if row["ok"] else f"FAILED {row.get('error', row)}", flush=True)
            if any(word in row.get("error", "") for word in POISONED):
                sys.exit(LOST)


def described(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error)[:600]}"


def machine(part: Part) -> None:
    """Versions, the device, and what runs on it, in order of preference."""
    about, able = bench.machine(), bk.implementations()
    runs = [name for name, why in able.items() if why == "runs here"]
    on_device = [name for name in runs if name in ACCELERATORS]
    connected = [name for name in runs if dispatch.load(name).networks]
    about["versions"] |= versions(("triton", "jax-cuda13-plugin", "libtpu", "brainunit"))
    about |= {"implementations": able, "driver": asked("nvidia-smi", *ASKED_OF_THE_DRIVER, "--format=csv,noheader")}
    part.note(about=about, able=on_device or runs[:1], connected=connected)


def asked(*command: str) -> str | None:
    """What a command prints, ``None`` where it is not installed."""
    if not shutil.which(command[0]):
        return None
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


# Correctness --------------------------------------------------------------------------------------------------------


# Of log10 power, to which the example of the README is fitted on every implementation.
FITTED = 0.065


def use(part: Part) -> None:
    """What a user runs first: README's example prints what README says, and its fit ends as well as on a CPU."""
    readme = (ROOT / "README.md").read_text()
    ((code, printed),) = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", readme, re.S)
    fit = "from brainmass_kernels.cli import main; main(['fit', '--quiet', '--out', 'fit.png', '--json', 'fit.json'])"
    items = {"README's example": code, "brainmass-kernels fit": fit}
    part.each(dict([*items.items()][: 1 if part.dry else 2]), lambda each: used(each, printed), "check")


def used(code: str, printed: str) -> dict[str, Any]:
    """Run it in a process of its own; it holds if it prints this, or leaves a fit that is as near as it should be."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True
        )  # fmt: skip
        fit = Path(folder, "fit.json")
        rms = json.loads(fit.read_text())["rms"][0] if fit.exists() else None
    ok = done.returncode == 0 and (done.stdout == printed if rms is None else rms <= FITTED)
    wrong = done.stderr[-2000:] if done.returncode else f"it printed {done.stdout[-300:]!r}"
    return {"ok": ok, "rms": rms, "printed": done.stdout[-2000:], **({} if ok else {"error": wrong})}


def tiny(check):
    """A check as a dry run has it."""
    if isinstance(check, cases.NetworkCheck):
        return check._replace(regions=min(check.regions, 5), steps=20, networks=2, longest=min(check.longest, 4))
    return check._replace(lanes=min(check.lanes, 5), steps=60, every=min(check.every, 10))


def chosen(part: Part, listed: list, few: int = 1) -> dict[str, Any]:
    """The checks that an implementation takes, by name; of a dry run a few, in tiny."""
    able = [c for c in listed if getattr(c, "dtype", "float32") == "float32" or part.implementation in IN_FLOAT64]
    return {check.name: tiny(check) for check in able[:few]} if part.dry else {check.name: check for check in able}


def check_forward(part: Part) -> None:
    check_masses(part, chosen(part, cases.FORWARD_CHECKS))


def check_gradient(part: Part) -> None:
    # The first two are one program.
    check_masses(part, chosen(part, cases.GRADIENT_CHECKS, few=2))


def check_models(part: Part) -> None:
    check_masses(part, chosen(part, cases.MODEL_CHECKS))


def check_masses(part: Part, listed: dict[str, cases.Check]) -> None:
    part.each(listed, lambda check: checks.run(check, part.implementation), "check")


def check_networks(part: Part) -> None:
    listed = chosen(part, cases.NETWORK_CHECKS)
    part.each(listed, lambda check: checks.run_network(check, part.implementation), "check")


def check_large(part: Part) -> None:
    """More records than 32 bits count, then a run of a million steps."""
    records, steps = ((64, 40), 400) if part.dry else (cases.MANY_RECORDS, cases.MANY_STEPS)
    items = {
        f"{records[0]:,} masses x {records[1]:,} records": lambda: checks.run_many_records(
            *records, part.implementation
        ),
        f"{steps:,} steps": lambda: checks.run_many_steps(steps, part.implementation),
    }
    part.each(items, lambda run: run(), "check")


# Speed --------------------------------------------------------------------------------------------------------------


def timed_cases(part: Part) -> list[bench.Case]:
    if part.dry:
        return [bench.Case(4, 2000), bench.Case(4, 1000, gradient=True)][: part.first]
    platform = jax.default_backend()
    first = next(name for name, why in bk.implementations().items() if why == "runs here")
    listed = cases.device_cases(platform) if part.implementation == first else cases.second_cases(platform)
    return listed[: part.first]


def scanned(case: bench.Case) -> bench.Case:
    """What `lax.scan` runs beside a case: a tenth of 10,000 steps; it has one precision."""
    return case._replace(steps=min(case.steps, max(SCANNED, case.steps // 10)), precision="exact")


@functools.lru_cache
def compiled_scan(case: bench.Case):
    return bench.compiled(bench.reference(case), case.lanes)


def speed(part: Part) -> None:
    """Forward runs and gradients, each compared before it is timed; several are compiled at a time."""
    listed, workers = timed_cases(part), max(1, min(8, (os.cpu_count() or 2) // 2))
    with ThreadPoolExecutor(workers) as pool:
        ours = {case: pool.submit(compiled_case, case, part) for case in listed[part.skip : part.skip + workers]}
        theirs = {scanned(case): pool.submit(compiled_scan, scanned(case)) for case in ours}
        for job in (*ours.values(), *theirs.values()):
            job.exception()

        def run(case: bench.Case) -> dict[str, Any]:
            ready = ours.pop(case, None)
            function = ready.result() if ready else compiled_case(case, part)
            return measured(case, part.implementation, function, 0.02 if part.dry else 0.3)

        part.each({str(case): case for case in listed}, run, "case")


def compiled_case(case: bench.Case, part: Part):
    return bench.compiled(bench.fused(case, part.implementation), case.lanes)


def measured(case: bench.Case, implementation: str, ours, seconds: float) -> dict[str, Any]:
    """A row as `benchmarks.crossovers` reads it, beside what the ledger lets expect."""
    scan, device = scanned(case), jax.devices()[0].device_kind
    result = bench.measure(case, implementation, seconds, ours, compiled_scan(scan), scan.steps)
    most, likely = (f(case, implementation, device) for f in (ceiling, expected))
    row = {**bench.record(result), "reference_steps": scan.steps, "expected": likely}
    row["share_of_ceiling"] = result.rate / most if most else None
    row["share_of_expected"] = result.rate / likely if likely else None
    print(bench.line(result), flush=True)
    return {"ok": True, "row": {name: x for name, x in row.items() if not is_nan(x)}}


def is_nan(x) -> bool:
    return isinstance(x, float) and math.isnan(x)


def network_speed(part: Part) -> None:
    """Networks against `scan` and a scan written by hand."""
    listed = [(5, 1.0, 2, 40, False), (5, 1.0, 2, 40, True)] if part.dry else cases.NETWORKS

    def run(size):
        regions, share, batch, steps, gradient = size
        of = networks.gradient if gradient else None
        return {"ok": True, "row": networks.compared(regions, share, batch, steps, steps // 40 * 10, 2, of=of)}

    what = {False: "forward", True: "gradient"}
    part.each({f"{what[s[-1]]}, {s[2]:,} networks of {s[0]} regions x {s[3]:,}": s for s in listed}, run, "network")


# The tests, and the profiler ----------------------------------------------------------------------------------------


def suite(part: Part) -> None:
    """The suites of tests/test_device.py, on the device."""
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "tests/test_device.py", "-m", "not slow"]
    command += ["-p", "no:cacheprovider"]
    if part.dry:
        command += ["--collect-only", "-qq"]
    else:
        # A test that waits for the device uses no core, and each process holds some memory of the device.
        command += ["-n", str(max(1, min(8, (os.cpu_count() or 2) // 2)))]

    def run(_):
        # What has run by then is known where time runs out.
        log = part.out / "suite.log"
        with open(log, "w") as file:
            done = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        lines = log.read_text().splitlines()
        more = {} if done.returncode == 0 else {"error": "\n".join(lines[-60:])}
        return {"ok": done.returncode == 0, "summary": lines[-1:], **more}

    part.each({"tests/test_device.py": None}, run, "check")


MASSES_PROGRAM = """
import jax
from brainmass_kernels import bench
case = bench.{case!r}
run = bench.compiled(bench.fused(case, {implementation!r}), case.lanes)
jax.block_until_ready(run(*bench.arguments(case.lanes)))
"""
NETWORKS_PROGRAM = """
import functools, jax
from benchmarks import networks
run = functools.partial(networks.fused, implementation={implementation!r})
run = functools.partial(networks.gradient, run) if {gradient} else run
weights, lengths = networks.connectome({regions}, {share})
jax.block_until_ready(jax.jit(functools.partial(run, weights, lengths, {steps}))(networks.strengths({batch})))
"""


def profile(part: Part) -> None:
    """Counters of the kernels of masses and networks by Nsight Compute, where it is installed."""
    programs = {
        str(case): MASSES_PROGRAM.format(case=case, implementation=part.implementation) for case in cases.PROFILED
    }
    for regions, share, batch, steps, gradient in cases.PROFILED_NETWORKS:
        if dispatch.load(part.implementation).networks:
            name = f"{'gradient' if gradient else 'forward'}, {batch:,} networks of {regions} regions x {steps:,}"
            programs[name] = NETWORKS_PROGRAM.format(
                regions=regions, share=share, batch=batch, steps=steps, gradient=gradient,
                implementation=part.implementation,
            )  # fmt: skip

    def run(program: str) -> dict[str, Any]:
        if part.dry or not shutil.which("ncu"):
            return {"ok": True, "launches": None, "reason": "a dry run" if part.dry else "ncu is not installed"}
        return {"ok": True, "launches": counters.of_program(program, ROOT)}

    part.each(programs, run, "profile")


KINDS: dict[str, Callable[[Part], None]] = {
    "machine": machine,
    "use": use,
    "forward": check_forward,
    "gradient": check_gradient,
    "models": check_models,
    "networks": check_networks,
    "large": check_large,
    "speed": speed,
    "network_speed": network_speed,
    "suite": suite,
    "profile": profile,
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help=f"one of {', '.join(KINDS)}; then '-' and the implementation")
    parser.add_argument("--out", type=Path, required=True, help="the folder of the lines")
    parser.add_argument("--seconds", type=float, default=480.0, help="begin nothing more after these")
    parser.add_argument("--skip", type=int, default=0, help="begin with this item")
    parser.add_argument("--first", type=int, help="at most so many of the timed cases")
    parser.add_argument("--dry", action="store_true", help="tiny sizes")
    options = parser.parse_args(argv)
    part = Part(options.name, options.out, options.seconds, options.skip, options.dry, options.first)
    KINDS[options.name.partition(SEPARATOR)[0]](part)


if __name__ == "__main__":
    main()
