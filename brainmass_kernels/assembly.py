"""Kernels compiled by NVIDIA's assembler: registers, spills, and the instructions of each loop."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

# Instructions of Blackwell that work on two numbers.
PAIRED = ("FADD2", "FMUL2", "FFMA2")
# Instructions by kind; the rest is addresses, moves and control.
KINDS = {
    "fp32": ("FADD", "FMUL", "FFMA", *PAIRED, "FSEL", "FSETP", "FMNMX", "FSET", "FCHK", "FSWZADD"),
    "special": ("MUFU",),
    "load": ("LDG", "LDS", "LDL", "LD", "LDC"),
    "store": ("STG", "STS", "STL", "ST"),
    "barrier": ("BAR", "WARPSYNC", "MEMBAR", "DEPBAR", "SYNCS"),
}


class SassLoop(NamedTuple):
    """One loop of a kernel, without its inner loops.

    Attributes
    ----------
    first, last : numbers of its first and last instruction
    inner : number of inner loops
    instructions : number of each operation, such as ``{"FFMA": 180, "MUFU.TANH": 30}``
    """

    first: int
    last: int
    inner: int
    instructions: Counter

    @property
    def total(self) -> int:
        return sum(n for name, n in self.instructions.items() if name != "NOP")

    @property
    def pairs(self) -> int:
        """Instructions that work on two float32 numbers."""
        return sum(self.instructions[name] for name in PAIRED)

    def kinds(self) -> dict[str, int]:
        """Instructions by kind; "other" is integer arithmetic, moves and control."""
        counts = dict.fromkeys((*KINDS, "other"), 0)
        kind_of = {name: kind for kind, names in KINDS.items() for name in names}
        for name, n in self.instructions.items():
            if name != "NOP":
                counts[kind_of.get(name.split(".")[0], "other")] += n
        return counts


class Kernel(NamedTuple):
    """One compiled kernel.

    Attributes
    ----------
    registers : of a thread
    spill_bytes : stored and loaded by a thread because registers ran out
    shared_bytes : shared memory of a block
    loops : in program order
    ptx : what was assembled
    arguments : of Mosaic GPU, for each parameter in PTX the number of the array, counted over operands and results;
        they come in the order in which the kernel uses them
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    loops: tuple[SassLoop, ...]
    ptx: str = ""
    arguments: tuple[int, ...] = ()


def sass_loops(text: str) -> tuple[SassLoop, ...]:
    """The loops of a disassembly, each from the target of a backward branch to the branch."""
    labels: dict[str, int] = {}
    code: list[tuple[str, str]] = []
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label.group(1)] = len(code)
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)([^;]*);", line):
            code.append((instruction.group(1), instruction.group(2)))
    spans: dict[int, int] = {}
    for at, (name, operands) in enumerate(code):
        target = re.search(r"`\((\.L_\w+)\)", operands)
        # Branches to themselves fill up the end of a program.
        if name.startswith("BRA") and target and labels.get(target.group(1), at) < at:
            start = labels[target.group(1)]
            spans[start] = max(at, spans.get(start, 0))
    loops = []
    for first, last in sorted(spans.items()):
        inner = [(a, b) for a, b in spans.items() if (a, b) != (first, last) and first <= a and b <= last]
        names = [code[i][0] for i in range(first, last + 1) if not any(a <= i <= b for a, b in inner)]
        count = Counter(name if name.startswith("MUFU") else name.split(".")[0] for name in names)
        loops.append(SassLoop(first, last, len(inner), count))
    return tuple(loops)


def launch_arguments(passes: str) -> tuple[int, ...]:
    """`Kernel.arguments`, from Mosaic GPU's log of its passes, the last of which show the host's code."""
    at = passes.rindex("gpu.launch_func <")
    host = passes[passes.rindex("func.func @", 0, at) : passes.index("\n", at)]
    places = {name: int(n) for name, n in re.findall(r"(%\w+) = llvm\.getelementptr %\w+\[(\d+)\]", host)}
    arrays = {name: places.get(place, 0) for name, place in re.findall(r"(%\w+) = llvm\.load (%\w+) ", host)}
    (passed,) = re.findall(r"gpu\.launch_func <.* args\((.*?)\)", host)
    return tuple(arrays[name] for name in re.findall(r"(%\w+) :", passed))


def tool(name: str) -> str | None:
    """The path of a program of the CUDA toolchain: in Triton's wheel, or on the PATH."""
    triton = find_spec("triton")
    for folder in triton.submodule_search_locations or () if triton else ():
        path = Path(folder, "backends", "nvidia", "bin", name)
        if path.exists():
            return str(path)
    return shutil.which(name)


def assemble(ptx: str, architecture: str) -> Kernel:
    """Assemble one kernel's PTX, and read the result.

    Raises
    ------
    FileNotFoundError : no ptxas or nvdisasm; Triton's wheel has both
    RuntimeError : ptxas refuses
    """
    # Triton's wheel has a second, newer ptxas. PTX names the version that it needs.
    candidates = [path for name in ("ptxas-blackwell", "ptxas") if (path := tool(name))]
    disassembler = tool("nvdisasm")
    if not candidates or not disassembler:
        raise FileNotFoundError("reading a kernel's instructions needs ptxas and nvdisasm: pip install triton")
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        command = [candidates[0], f"-arch={architecture}", "-v", str(source), "-o", str(binary)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"ptxas for {architecture}: {done.stderr.strip()}")
        sass = subprocess.run([disassembler, "-c", str(binary)], capture_output=True, text=True, check=True).stdout
    registers = int(_number(r"Used (\d+) registers", done.stderr))
    spills = sum(_number(rf"(\d+) bytes spill {what}", done.stderr) for what in ("stores", "loads"))
    return Kernel(registers, spills, _number(r"(\d+) bytes smem", done.stderr), sass_loops(sass), ptx)


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    return int(match.group(1)) if match else 0
