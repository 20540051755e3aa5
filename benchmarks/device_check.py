"""Is it right on this device, and how fast: ``python -m benchmarks.device_check``; it ends within 8 minutes.

First the numeric suites, compiled for the device, then the forward run and the gradient timed against `lax.scan` of the
same step on the same device; where a GPU has two implementations, the second takes the first cases too. It prints as
it goes; what fails is reported and does not stop the rest. The result is ``benchmarks/results/<device>-<date>.json``.
Without an accelerator it says so and times what runs on the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax

import brainmass_kernels as bk
from brainmass_kernels import bench, dispatch

from .cases import NETWORKS, device_cases

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
LEDGER = Path(__file__).parent / "ledger.json"
# Cases that a second implementation is timed on.
SECOND = 6


def numeric_suite(seconds: float) -> dict:
    """The suites of tests/test_device.py in other processes, so that a crash there ends nothing here."""
    workers = str(max(1, min(8, (os.cpu_count() or 2) // 2)))
    command = [sys.executable, "-m", "pytest", "-q", "tests/test_device.py", "-m", "not slow", "-p", "no:cacheprovider"]
    try:
        import xdist  # noqa: F401

        command += ["-n", workers]
    except ImportError:
        print("  pytest-xdist is not installed: one test at a time")
    # Each process would otherwise take most of the device's memory for itself.
    env = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    if jax.default_backend() != "cpu":
        env["JAX_PLATFORMS"] = ""  # tests/conftest.py would otherwise choose the CPU
    try:
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=seconds, check=False)
        output, status = done.stdout, done.returncode
    except subprocess.TimeoutExpired as late:
        output, status = (late.stdout or b"").decode(errors="replace"), "out of time"
    print("\n".join(output.splitlines()[-40:]), flush=True)
    return {"status": status, "summary": output.splitlines()[-1:] if output else [], "tail": output[-4000:]}


class Known(NamedTuple):
    """A device as JAX names it, and where the ledger has it.

    Attributes
    ----------
    mosaic, triton : the ledger's chip for `mosaic_gpu` and for `triton`
    speed : multiprocessors times boost clock, relative to the card that the ledger counts for
    """

    mosaic: str | None
    triton: str | None
    speed: float = 1.0


# The H100 is the H200 with other memory: on the SXM board the same multiprocessors at the same clock.
_H200 = 132 * 1.98
CHIPS = {
    "NVIDIA H100 80GB HBM3": Known("h200", "sm_90"), "NVIDIA H100 NVL": Known("h200", "sm_90", 132 * 1.785 / _H200),
    "NVIDIA H100 PCIe": Known("h200", "sm_90", 114 * 1.755 / _H200), "NVIDIA H200": Known("h200", "sm_90"),
    "NVIDIA B200": Known("b200", None), "NVIDIA A100-SXM4-40GB": Known(None, "sm_80"),
    "NVIDIA A100-SXM4-80GB": Known(None, "sm_80"), "NVIDIA L40S": Known(None, "sm_89"),
}  # fmt: skip


def ceiling(case: bench.Case, implementation: str, device: str) -> float | None:
    """Mass-steps a second that the ledger's instruction counts allow, where it has them."""
    known = CHIPS.get(device, Known(None, None))
    chip = {"mosaic_gpu": known.mosaic, "triton": known.triton}.get(implementation)
    wanted = {
        "chip": chip, "kernel": "forward", "scheme": case.scheme, "precision": case.precision,
        "arguments": "noise" if case.noisy else "plain",
    }  # fmt: skip
    rows = [r for r in json.loads(LEDGER.read_text())["rows"] if "ceiling" in r]
    forward = [known.speed * r["ceiling"] for r in rows if wanted.items() <= r.items()]
    if not case.gradient or not forward:
        return max(forward, default=None)
    ways = [{**wanted, "kernel": way} for way in ("gradient", "retreat")]
    back = [known.speed * r["ceiling"] for r in rows for way in ways if way.items() <= r.items()]
    return 1 / (1 / max(forward) + 1 / max(back)) if back else None


def compile_all(cases, implementation, until: float) -> dict:
    """Compile every function, several at a time, as long as there is time."""
    made: dict = {}

    def build(case, which):
        if time.monotonic() < until:
            function = bench.fused(case, implementation) if which == "ours" else bench.reference(case)
            made[case, which] = bench.compiled(function, case.lanes)

    with ThreadPoolExecutor(max(1, min(8, (os.cpu_count() or 2) // 2))) as pool:
        jobs = {(case, which): pool.submit(build, case, which) for case in cases for which in ("ours", "theirs")}
    for key, job in jobs.items():
        if error := job.exception():
            made[key] = error
    return made


def check(cases, implementation, compile_seconds: float, deadline: float) -> tuple[list, list]:
    """Rows of what was measured, and what failed or was not reached."""
    device, rows, failed = jax.devices()[0].device_kind, [], []
    began = time.monotonic()
    made = compile_all(cases, implementation, min(began + compile_seconds, deadline))
    print(f"compiled {len(made)} of {2 * len(cases)} functions in {time.monotonic() - began:.0f} s", flush=True)
    print(f"{bench.HEADER}, share of the ceiling")
    for case in cases:
        functions = [made.get((case, which)) for which in ("ours", "theirs")]
        if time.monotonic() > deadline or None in functions:
            failed.append({"case": str(case), "error": "not reached in time"})
            continue
        try:
            for error in functions:
                if isinstance(error, Exception):
                    raise error
            found = bench.measure(case, implementation, 0.3, *functions)
        except Exception as error:  # reported, counted in the exit status, and the next case is tried
            failed.append({"case": str(case), "error": traceback.format_exc()[-2000:]})
            print(f"{case!s:<44} FAILED: {str(error).splitlines()[0][:200]}", flush=True)
            continue
        most = ceiling(case, found.implementation, device)
        share = found.rate / most if most else None
        rows.append({**bench.record(found), "share_of_ceiling": share})
        print(bench.line(found) + (f", {share:.0%}" if share else ""), flush=True)
    return rows, failed


def check_networks(deadline: float) -> tuple[list, list]:
    """Networks against a scan written by hand, as `check` does it for masses."""
    from . import networks

    rows, failed = [], []
    for regions, share, batch, steps, gradient in NETWORKS:
        case = f"{'gradient' if gradient else 'forward'}, {batch:,} networks of {regions} regions x {steps:,}"
        if time.monotonic() > deadline:
            failed.append({"case": case, "error": "not reached in time"})
            continue
        try:
            of = networks.gradient if gradient else None
            rows.append(networks.compared(regions, share, batch, steps, steps // 40 * 10, 2, of=of))
        except (Exception, SystemExit) as error:  # reported, and the next case is tried
            failed.append({"case": case, "error": traceback.format_exc()[-2000:]})
            print(f"{case:<44} FAILED: {str(error).splitlines()[0][:200]}", flush=True)
    return rows, failed


def second(platform: str) -> list[str]:
    """What runs on this accelerator besides the one that is chosen."""
    able = [n for n in ("mosaic_tpu", "mosaic_gpu", "triton") if not dispatch.load(n).unavailable(platform)]
    return able[1:]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="end within these (default: %(default)s)")
    parser.add_argument("--first", type=int, metavar="N", help="only the N most telling cases")
    parser.add_argument("--no-tests", action="store_true", help="time only")
    parser.add_argument("--implementation", help="time this one (default: the fastest that can run)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of the result (default: %(default)s)")
    options = parser.parse_args(argv)
    began = time.monotonic()
    deadline = began + 60 * options.minutes - 10
    about = {"command": "python -m benchmarks.device_check", **bench.machine(), "implementations": bk.implementations()}
    print(json.dumps(about, indent=1), flush=True)
    suite = None
    if about["platform"] == "cpu":
        print("no accelerator here: the CPU implementations are timed, and no device suite is run", flush=True)
    elif not options.no_tests:
        suite = numeric_suite(0.4 * 60 * options.minutes)
    cases = device_cases(about["platform"])[: options.first]
    others = [] if options.implementation else second(about["platform"])
    rows, failed = check(cases, options.implementation, 0.25 * 60 * options.minutes, deadline - 90 * len(others))
    for name in others:
        print(f"{name}, which also runs here")
        for known, more in zip((rows, failed), check(cases[:SECOND], name, 60, deadline)):
            known += more
    connected, missed = check_networks(deadline)
    failed += missed
    name = f"{about['device'].lower().replace(' ', '-')}-{about['date']}.json"
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / name
    text = {**about, "suite": suite, "rows": rows, "networks": connected, "failed": failed}
    path.write_text(json.dumps(text, indent=1) + "\n")
    print(f"wrote {path.name} after {time.monotonic() - began:.0f} s; {len(failed)} cases failed or were not reached")
    return int(bool(failed) or bool(suite and suite["status"] != 0))


if __name__ == "__main__":
    sys.exit(main())
