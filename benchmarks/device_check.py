"""Is it right on this device, and how fast: ``python -m benchmarks.device_check [--quick]``.

``--quick`` takes under 3 minutes: every kind of kernel against a float64 scan on the CPU, by every implementation that
runs on the accelerator. Without it, in under 8 minutes, it then times forward runs, gradients and networks beside a
`lax.scan` of the same step and beside what the ledger's counts let expect, and runs more than 2^32 records and a
million steps.

Each part is a process of its own with a time limit, so that a CUDA error or a crash ends that part alone; it is started
again at its next item. Every result is a line of ``device_check.jsonl``, on disk at once; in the end all are in
``<device>-<date>.json``, which `benchmarks.crossovers` reads. ``--dry`` runs the same on the CPU in tiny sizes.

The parts are use (README's example and first command), forward, gradient, models, networks, speed, large and
network_speed; and, only when asked for by ``--only``, suite (tests/test_device.py) and profile (Nsight Compute).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from .parts import LINES, LOGS, LOST, SEPARATOR, note, read

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
MINUTES = {"quick": 3.0, "full": 8.0}
# Seconds kept for writing the result, and the least that a part is worth starting with.
RESERVE, LEAST = 8.0, 12.0
# How often a part is started again after a crash.
RESTARTS = 3


class Planned(NamedTuple):
    """A part that is to run.

    Attributes
    ----------
    name : its kind, and after a separator its implementation
    seconds : that it may take
    """

    name: str
    seconds: float

    @property
    def kind(self) -> str:
        return self.name.partition(SEPARATOR)[0]


# Seconds that each kind may take. Those of correctness run side by side, the others have the device to themselves.
CORRECT = {"use": 120.0, "forward": 150.0, "gradient": 150.0, "models": 150.0, "networks": 150.0}
ALONE = {"speed": 120.0, "large": 60.0, "network_speed": 70.0, "suite": 400.0, "profile": 120.0}
# Of the second and further implementations, which are timed on fewer cases.
SECOND = 60.0
# Parts that no run has unless asked for.
ASKED = ("suite", "profile")


def planned(able: list[str], connected: list[str], quick: bool, accelerator: bool) -> list[list[Planned]]:
    """The parts of a check: first those that run side by side, then the others in order."""
    correct = [
        Planned(f"{kind}{SEPARATOR}{name}", seconds)
        for name in able
        for kind, seconds in CORRECT.items()
        if kind != "use" and (kind != "networks" or name in connected)
    ]
    correct.append(Planned("use", CORRECT["use"]))
    alone = []
    for kind, seconds in ALONE.items() if not quick else ():
        if kind in ("network_speed", "suite"):
            alone.append(Planned(kind, seconds))
        else:
            limits = [seconds, *[min(SECOND, seconds)] * (len(able) - 1)]
            alone += [Planned(f"{kind}{SEPARATOR}{name}", limit) for name, limit in zip(able, limits)]
    if not accelerator:
        alone = [part for part in alone if part.kind not in ("large", "suite", "profile")]
    return [correct, alone]


def wanted(stages: list[list[Planned]], only: list[str]) -> list[list[Planned]]:
    """Those that were asked for, by name or kind; without a wish, all but `ASKED`.

    Raises
    ------
    SystemExit : a name that no part has
    """
    known = {x for stage in stages for part in stage for x in (part.name, part.kind)}
    if unknown := [name for name in only if name not in known]:
        raise SystemExit(f"'--only' got {', '.join(unknown)}, but takes some of {', '.join(sorted(known))}")
    if only:
        return [[part for part in stage if {part.name, part.kind} & set(only)] for stage in stages]
    return [[part for part in stage if part.kind not in ASKED] for stage in stages]


# Processes ----------------------------------------------------------------------------------------------------------


class Check(NamedTuple):
    """A run of this script.

    Attributes
    ----------
    until : when all has ended, of `time.monotonic`
    cache : a folder in which one part finds what another has compiled
    """

    out: Path
    until: float
    dry: bool
    first: int | None
    cache: str

    def environment(self) -> dict[str, str]:
        # Each process would otherwise take most of the device's memory for itself.
        more = {"PYTHONUNBUFFERED": "1", "TF_CPP_MIN_LOG_LEVEL": "1", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        if self.dry:
            return {**os.environ, **more, "JAX_PLATFORMS": "cpu"}
        cache = {"JAX_COMPILATION_CACHE_DIR": self.cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5"}
        # The references run on the CPU beside the accelerator, whichever of the two was asked for.
        platforms = {} if os.environ.get("JAX_PLATFORMS") == "cpu" else {"JAX_PLATFORMS": ""}
        return {**os.environ, **more, **cache, **platforms}

    def command(self, part: Planned, seconds: float, skip: int) -> list[str]:
        command = [sys.executable, "-m", "benchmarks.device_parts", part.name, "--out", str(self.out)]
        command += ["--seconds", f"{seconds:.0f}", "--skip", str(skip)]
        command += [] if self.first is None else ["--first", str(self.first)]
        return command + ["--dry"] * self.dry

    def run(self, part: Planned) -> None:
        """A part, and again from its next item on where its process crashed."""
        # How long the CPU takes says nothing.
        end, skip = self.until if self.dry else min(time.monotonic() + part.seconds, self.until), 0
        for _ in range(1 + RESTARTS):
            left = end - time.monotonic()
            if left < LEAST and not self.dry:
                note(self.out / LINES, part=part.name, exit="not reached")
                return
            status = self.once(part, left, skip)
            begun = [row["at"] for row in read(self.out / LINES) if row.get("part") == part.name and "began" in row]
            if status in (0, "out of time") or max(begun, default=-1) < skip:
                return
            skip = max(begun) + 1

    def once(self, part: Planned, seconds: float, skip: int) -> int | str:
        """One process of a part: its exit status, or "out of time"."""
        began = time.monotonic()
        with tempfile.TemporaryFile() as log:
            # What it starts is of its group, and ends with it: workers that live on would disturb what is timed next.
            process = subprocess.Popen(
                self.command(part, seconds - 5.0, skip), cwd=ROOT, env=self.environment(), stdout=log,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            try:
                status: int | str = process.wait(seconds)
            except subprocess.TimeoutExpired:
                status = "out of time"
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            log.seek(0)
            text = log.read().decode(errors="replace")
        with open(self.out / LOGS, "a") as file:
            file.write(f"==== {part.name} from {skip}: {status}\n{text[-200_000:]}\n")
        row = {"took": round(time.monotonic() - began, 1), "tail": [] if status == 0 else text.splitlines()[-12:]}
        note(self.out / LINES, part=part.name, exit=status, skip=skip, **row)
        return status


# The result ---------------------------------------------------------------------------------------------------------


# The keys by which lines name what was run.
ITEMS = ("check", "case", "network", "profile")


def of_kind(rows: list[dict], kind: str) -> list[dict]:
    return [row for row in rows if kind in row]


def failures(rows: list[dict]) -> list[dict[str, Any]]:
    """Items that went wrong, items that a process ended in, and parts that ended otherwise than by themselves."""
    failed = [row for row in rows if row.get("ok") is False]
    ended = {(row["part"], row[kind]) for kind in ITEMS for row in of_kind(rows, kind)}
    lost = [row for row in rows if "began" in row and (row["part"], row["began"]) not in ended]
    failed += [{"part": row["part"], "item": row["began"], "error": "its process ended"} for row in lost]
    crashed = [row for row in of_kind(rows, "exit") if row["exit"] not in (0, LOST, "not reached")]
    failed += [{"part": row["part"], "error": f"ended with {row['exit']}", "tail": row["tail"]} for row in crashed]
    return failed


def not_reached(rows: list[dict]) -> list[str]:
    """What there was no time for."""
    items = [f"{row['part']}: {name}" for row in of_kind(rows, "not_reached") for name in row["not_reached"]]
    return items + [row["part"] for row in rows if row.get("exit") == "not reached"]


def result(about: dict, rows: list[dict], mode: str) -> dict[str, Any]:
    """Everything that was found, as `benchmarks.crossovers` reads it."""
    return {
        **about, "command": "python -m benchmarks.device_check", "mode": mode,
        "rows": [row["row"] for row in of_kind(rows, "case") if row["ok"]],
        "networks": [row["row"] for row in of_kind(rows, "network") if row["ok"]],
        "checks": of_kind(rows, "check"), "profiles": of_kind(rows, "profile"), "failed": failures(rows),
        "not_reached": not_reached(rows), "parts": of_kind(rows, "exit"),
    }  # fmt: skip


def save(results: dict[str, Any], out: Path) -> Path:
    """``<device>-<date>.json``, with the mode in its name where it is not the full check."""
    mode = "" if results["mode"] == "full" else f"-{results['mode']}"
    path = out / f"{results['device'].lower().replace(' ', '-')}-{results['date']}{mode}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    return path


TIMED = f"{'case':<44} {'mass-steps/s':>12} {'expected':>9} {'of it':>6} {'of most':>7} {'x scan':>7}  implementation"


def timed_line(row: dict) -> str:
    """A row under `TIMED`."""
    likely, part, most = row["expected"], row["share_of_expected"], row["share_of_ceiling"]
    cells = [
        f"{likely:>9.3g}" if likely else f"{'-':>9}",
        f"{part:>6.0%}" if part else f"{'-':>6}",
        f"{most:>7.0%}" if most else f"{'-':>7}",
    ]
    return (
        f"{row['case']:<44} {row['mass_steps_per_s']:>12.3g} {' '.join(cells)} "
        f"{row['reference_seconds'] / row['seconds']:>7.1f}  {row['implementation']}"
    )


def table(results: dict[str, Any]) -> Iterable[str]:
    """What is printed in the end."""
    good = [row for row in results["checks"] if row["ok"]]
    yield f"\n{len(good)} of {len(results['checks'])} checks hold"
    if results["rows"]:
        yield TIMED
    yield from map(timed_line, results["rows"])
    for row in results["networks"]:
        ratios = ", ".join(f"{ratio:g}x {name}" for name, ratio in row["ratios"].items())
        size = f"{row['batch']:,} networks of {row['regions']} regions"
        yield f"{row['what']}, {size}: {row['mass_steps_per_second']['fused']:.3g} mass-steps/s, {ratios}"
    for row in results["failed"]:
        item = next((row[kind] for kind in (*ITEMS, "item") if kind in row), "")
        why = row.get("error") or f"off by {row.get('off')} in {row.get('worst')}, and may be by {row.get('bound')}"
        yield f"FAILED {row['part']} {item}: {why[:300]}"
    if results["not_reached"]:
        yield f"no time was left for {len(results['not_reached'])}: {'; '.join(results['not_reached'])[:1000]}"


# The whole ----------------------------------------------------------------------------------------------------------


def chosen_out(folder: Path | None) -> Path:
    return folder or Path(os.environ.get("OUT") or RESULTS)


def survey(check: Check) -> dict[str, Any]:
    """The device, and what runs on it.

    Raises
    ------
    SystemExit : not even JAX starts
    """
    check.once(Planned("machine", 120.0), 120.0, 0)
    rows = of_kind(read(check.out / LINES), "about")
    if not rows:
        raise SystemExit(f"this machine could not be looked at; {LOGS} in {check.out} says why")
    return rows[0]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="correctness alone, under 3 minutes")
    parser.add_argument("--minutes", type=float, help="end within these (default: 3 for --quick, else 8)")
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help="parts, such as speed or forward-triton")
    parser.add_argument("--implementation", help="this one alone (default: all that run on the device)")
    parser.add_argument("--first", type=int, metavar="N", help="of the timed cases only the N most telling")
    parser.add_argument("--dry", action="store_true", help="on the CPU, in tiny sizes: is the script whole?")
    parser.add_argument("--out", type=Path, help="the folder of the results (default: $OUT, or benchmarks/results)")
    options = parser.parse_args(argv)
    mode, out = "quick" if options.quick else "full", chosen_out(options.out)
    until = time.monotonic() + 60 * (options.minutes or MINUTES[mode]) - RESERVE
    out.mkdir(parents=True, exist_ok=True)
    for name in (LINES, LOGS):
        (out / name).unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as cache:
        check = Check(out, until, options.dry, options.first, cache)
        machine = survey(check)
        about = machine["about"]
        print(json.dumps(about, indent=1), flush=True)
        accelerator = about["platform"] != "cpu" or options.dry
        if not accelerator:
            print("no accelerator here: what runs on the CPU is checked and timed", flush=True)
        able = [options.implementation] if options.implementation else machine["able"]
        stages = planned(able, machine["connected"], options.quick, accelerator)
        correct, alone = wanted(stages, options.only)
        with ThreadPoolExecutor(max(1, len(correct))) as pool:
            list(pool.map(check.run, correct))
        for part in alone:
            check.run(part)
    results = result(about, read(out / LINES), "dry" if options.dry else mode)
    print("\n".join(table(results)))
    print(f"wrote {save(results, out).name}; what was printed is in {LOGS}")
    unchecked = [name for name in results["not_reached"] if name.partition(SEPARATOR)[0] in CORRECT]
    return int(bool(results["failed"] or unchecked))


if __name__ == "__main__":
    sys.exit(main())
