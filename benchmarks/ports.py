"""What binds a step on `numba`, by LLVM's model of a processor: ``python -m benchmarks.ports``.

Kernels of Jansen-Rit by exponential Euler, float32, are compiled for a processor, which need not be this one, and
``llvm-mca`` (of LLVM 16 or newer, from ``$LLVM_MCA`` or the path) gives the cycles of each of their loops that has
SIMD. It knows ports and latencies, and no cache. Nothing is run or written.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import jax
import llvmlite.binding as llvm

from brainmass_kernels.backends.numba import call, machine

from .cpu import parameters
from .native import ours

LANES, STEPS = 512, 4000
#: What of an instruction's name is counted as what.
KINDS = {
    "fma": r"vfn?m", "division": r"v?div", "product": r"v?mul", "sum": r"v?(add|sub)ps",
    "bound": r"v?(min|max)ps", "move": r"v?mov|v?p?broadcast",
}  # fmt: skip


def assemblies(lanes: int, steps: int, processor: str) -> dict[str, str]:
    """The assembly of the forward and the adjoint kernel for a processor."""
    this, found = machine.Machine(), {}
    triple = llvm.Target.from_triple(this.triple)
    if processor:
        this.processor, this.features = processor, ""
        this.target = triple.create_target_machine(cpu=processor, features="", opt=machine.LEVEL, reloc="static")

    def registered(kind: str, text: str) -> str:
        if kind in ("forward", "adjoint"):
            found[kind] = this.target.emit_assembly(this._optimised(call._assembly(kind, text)))
        return kind

    with mock.patch.object(machine, "machine", return_value=this), mock.patch.object(call, "_registered", registered):
        _, slope = ours(steps)
        slope.trace(*parameters(lanes)).lower()
    return found


def loops(assembly: str) -> Iterator[list[str]]:
    """The instructions of each stretch without a label or a jump that is mostly SIMD."""
    stretch: list[str] = []
    for line in [*assembly.splitlines(), "end:"]:
        text = line.strip()
        if line.startswith("\t") and not text.startswith((".", "#")):
            stretch.append(text)
        if re.match(r"\.?\w+.*:", line) or text.startswith("j"):
            simd = [x for x in stretch if re.match(r"v\w+p[sd]\b", x)]
            if any("vfm" in x for x in simd) and len(simd) > 12 and not any("call" in x for x in stretch):
                yield stretch
            stretch = []


def cycles(stretch: list[str], processor: str, command: str) -> float:
    """Of one time through, by LLVM's model."""
    times = 100
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "loop.s"
        path.write_text("\n".join(stretch) + "\n")
        arguments = [command, f"-mcpu={processor}", f"-iterations={times}", str(path)]
        said = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"Total Cycles:\s+(\d+)", said)[1]) / times  # pyright: ignore[reportOptionalSubscript]


def counts(stretch: list[str]) -> dict[str, int]:
    """How many instructions of each kind, and how many read or write memory."""
    found: Counter[str] = Counter()
    for text in stretch:
        name = text.split()[0]
        found[next((kind for kind, pattern in KINDS.items() if re.match(pattern, name)), "other")] += 1
        found["memory"] += "(" in text
    return dict(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processor", default="", help="as LLVM names it, such as znver3 (default: this machine's)")
    options = parser.parse_args()
    command = os.environ.get("LLVM_MCA") or shutil.which("llvm-mca")
    if command is None:
        raise SystemExit("llvm-mca is not there: install LLVM's tools, or set $LLVM_MCA")
    jax.config.update("jax_platforms", "cpu")
    processor = options.processor or llvm.get_host_cpu_name()
    for kind, text in assemblies(LANES, STEPS, options.processor).items():
        for stretch in loops(text):
            width = max({"x": 4, "y": 8, "z": 16}[w] for w in re.findall(r"%([xyz])mm", " ".join(stretch)))
            print(
                f"{kind}: {cycles(stretch, processor, command):.1f} cycles, {width} lanes a vector, {counts(stretch)}"
            )


if __name__ == "__main__":
    main()
