"""What Nsight Compute counts of the kernels of a program: whole sections, and where warps waited, by instruction."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SECTIONS = (
    "SpeedOfLight", "MemoryWorkloadAnalysis", "WarpStateStats", "InstructionStats", "ComputeWorkloadAnalysis",
    "Occupancy", "LaunchStats", "SourceCounters",
)  # fmt: skip
# Of hundreds, those that tell what binds a kernel.
KEPT = (
    "Duration", "Elapsed Cycles", "SM Active Cycles", "Issue Slots Busy", "Executed Instructions",
    "Registers Per Thread", "Achieved Occupancy", "DRAM Throughput", "L2 Cache Throughput", "L1/TEX Cache Throughput",
    "L1/TEX Hit Rate", "L2 Hit Rate", "Local Memory Spilling Requests", "Warp Cycles Per Issued Instruction",
    "Grid Size", "Block Size",
)  # fmt: skip
# A name, a unit where there is one, and a value, apart by two spaces or more.
_METRIC = re.compile(r"^ {4}(\S.*?) {2,}(?:(\S+) +)?([\d.,]+)$")
_KERNEL = re.compile(r"^ {2}(\w+) \(")


def of_program(program: str, folder: Path, seconds: float = 60.0) -> list[dict[str, Any]]:
    """Run Python text under Nsight Compute: an entry for each launch of one of our kernels.

    Raises
    ------
    RuntimeError : it counted nothing
    """
    with tempfile.TemporaryDirectory() as kept:
        report = Path(kept, "report.ncu-rep")
        sections = [x for name in SECTIONS for x in ("--section", name)]
        watch = ["ncu", "--clock-control", "none", "-o", str(report), "-k", "regex:brainmass_kernels", *sections]
        done = subprocess.run(
            [*watch, sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, timeout=seconds
        )
        if not report.exists():
            raise RuntimeError(f"ncu counted nothing: {(done.stdout + done.stderr)[-600:]}")
        read = ["ncu", "--import", str(report), "--page"]
        details = subprocess.run([*read, "details"], capture_output=True, text=True, check=True).stdout
        source = [*read, "source", "--csv", "--print-source", "sass"]
        return joined(details, subprocess.run(source, capture_output=True, text=True, check=True).stdout)


def joined(details: str, source: str) -> list[dict[str, Any]]:
    """What two pages of a report say of each launch."""
    return [{**a, **b} for a, b in zip(metrics(details), waits(source), strict=True)]


def metrics(details: str) -> list[dict[str, Any]]:
    """The metrics of each launch, of the page ``details`` as text."""
    launches: list[dict[str, Any]] = []
    for line in details.splitlines():
        if found := _KERNEL.match(line):
            launches.append({"kernel": found.group(1), "metrics": {}})
        elif launches and (found := _METRIC.match(line)) and found.group(1) in KEPT:
            name, unit, value = found.groups()
            launches[-1]["metrics"][f"{name} [{unit}]" if unit else name] = float(value.replace(",", ""))
    return launches


def waits(source: str) -> list[dict[str, Any]]:
    """Of each launch, of the page ``source`` as CSV: samples by why a warp waited, and by instruction.

    Of an instruction ``executed`` is how often warps issued it, and ``samples`` is its share of all samples.
    """
    launches = []
    for rows in launches_of(csv.reader(source.splitlines())):
        header, rows = rows[0], [dict(zip(rows[0], row)) for row in rows[1:] if len(row) == len(rows[0])]
        reasons = [name for name in header if name.startswith("stall_") and "(" not in name]
        why = {name.removeprefix("stall_"): sum(number(row[name]) for row in rows) for name in reasons}
        executed, samples = Counter(), Counter()
        for row in rows:
            executed[opcode(row["Source"])] += number(row["Instructions Executed"])
            samples[opcode(row["Source"])] += number(row["# Samples"])
        total = max(1, sum(samples.values()))
        often = [name for name, count in executed.most_common() if count >= 0.002 * sum(executed.values())]
        launches.append({
            "waits": {name: count for name, count in sorted(why.items(), key=lambda pair: -pair[1]) if count},
            "instructions": {n: {"executed": executed[n], "samples": round(samples[n] / total, 4)} for n in often},
        })  # fmt: skip
    return launches


def launches_of(rows) -> list[list[Sequence[str]]]:
    """The rows of each launch, the first of which is the header."""
    launches: list[list[Sequence[str]]] = []
    for row in rows:
        if row[:1] == ["Kernel Name"]:
            launches.append([])
        elif launches and row:
            launches[-1].append(row)
    return launches


def number(text: str) -> int:
    """A count; what was not counted is a dash or nothing."""
    return int(text) if text.isdigit() else 0


def opcode(instruction: str) -> str:
    """The name of an instruction, without the predicate before it."""
    return next(word for word in instruction.split() if not word.startswith("@"))
