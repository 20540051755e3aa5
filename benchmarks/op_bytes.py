"""Bytes that one step of `sigmoid_sys2nd` moves, by the compilers of v5e and H200: ``python -m benchmarks.op_bytes``.

A million elements, uniform parameters. What a kernel reads and writes of device memory is its arguments and results, so
the sum over all kernels of a compiled program is what it moves; less than each array once is not possible. Writes
``results/op_bytes.json`` and the table that `explain_step` reads. Needs the extra `ledger` and JAX 0.11.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import jax

import brainmass_kernels as bk
from brainmass_kernels.one_step import COUNTED, FORWARD, IN_ALL, IN_PARAMETERS, IN_STATE
from brainmass_kernels.testing import compile_for

from .timing import RESULTS, save

SIZE = COUNTED
TABLE = Path(bk.__file__).with_name("op_bytes.json")
PARAMETERS = {"A": 3.25, "a": 100.0, "vmax": 5.0, "v0": 6.0, "r": 0.56}
#: By what the gradient is taken in: positions of the state and the potential, and of the parameters.
GRADIENTS = {FORWARD: (), IN_STATE: (0, 1, 2), IN_PARAMETERS: (3, 4, 5, 6, 7), IN_ALL: tuple(range(8))}
CHIPS = {"v5e": "mosaic_tpu", "h200": "mosaic_gpu"}
_BYTES = {"f32": 4, "s32": 4, "u32": 4, "pred": 1, "f64": 8, "bf16": 2, "s64": 8, "u8": 1, "s8": 1, "token": 0}
_FREE = ("parameter", "bitcast", "tuple", "get-tuple-element", "constant", "after-all")


def program(implementation: str | None, wanted: tuple[int, ...]):
    """A step, and its gradient in some arguments for given cotangents."""

    def step(*values):
        x, v, potential, *rest = values
        return bk.sigmoid_sys2nd(
            x, v, potential, **dict(zip(PARAMETERS, rest)), dt=5e-4, implementation=implementation
        )  # fmt: skip

    def both(*values):
        *values, ct_x, ct_v = values
        chosen = [values[k] for k in wanted]

        def of_chosen(*some):
            replaced = dict(zip(wanted, some))
            return step(*(replaced.get(k, x) for k, x in enumerate(values)))

        out, back = jax.vjp(of_chosen, *chosen)
        return out, back((ct_x, ct_v))

    return both if wanted else step


def bytes_of(kind: str) -> int:
    """Of a type as HLO writes it, a tuple's parts together."""
    total = 0
    for name, shape in re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", kind):
        if name not in _BYTES:
            raise ValueError(f"the program has an array of {name}, whose size this count does not know")
        size = _BYTES[name]
        for n in filter(None, shape.split(",")):
            size *= int(n)
        total += size
    return total


def moved(text: str) -> int:
    """Bytes that the kernels of a compiled program read and write, from its HLO.

    Raises
    ------
    ValueError : it has a loop, whose kernels run an unknown number of times
    """
    entry = text[text.index("ENTRY ") :]
    sizes, total = {}, 0
    for line in entry[: entry.index("\n}")].splitlines()[1:]:
        match = re.match(r"\s*(?:ROOT )?%([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)(?:,|$)", line)
        if not match:
            continue
        name, kind, operation, operands = match.groups()
        sizes[name] = bytes_of(re.sub(r"\{[^}]*\}", "", kind))
        if operation == "while":
            raise ValueError("the program has a loop")
        if operation not in _FREE:
            total += sizes[name] + sum(sizes.get(x, 0) for x in re.findall(r"%([\w.-]+)", operands))
    return total


def counted(chip: str, implementation: str | None, wanted: tuple[int, ...]) -> float:
    """MB (of 2^20 bytes) that the program moves."""
    array, number = jax.ShapeDtypeStruct((SIZE,), "float32"), jax.ShapeDtypeStruct((), "float32")
    shapes = [array] * 3 + [number] * len(PARAMETERS) + [array] * (2 if wanted else 0)
    compiled = compile_for(chip, program(implementation, wanted), *shapes)
    return round(moved(compiled.executable.as_text()) / 2**20, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default=str(RESULTS / "op_bytes.json"))
    parser.add_argument("--chip", choices=CHIPS, help="print this chip's counts only")
    options = parser.parse_args()
    if chip := options.chip:
        print(json.dumps([
            {"chip": chip, "implementation": name or "jnp", "what": what, "MB": counted(chip, name, wanted)}
            for name in (None, CHIPS[chip]) for what, wanted in GRADIENTS.items()
        ]))  # fmt: skip
        return
    results = []
    for chip in CHIPS:  # each in a process of its own, as Mosaic asks
        command = [sys.executable, "-m", "benchmarks.op_bytes", "--chip", chip]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        results += json.loads(done.stdout.splitlines()[-1])
    for row in results:
        print(f"{row['chip']:<5} {row['implementation']:<11} {row['what']:<24} {row['MB']:>7.2f} MB")
    save(options.out, ("jax", "brainmass_kernels"), results=results)
    write_table(results)


def write_table(results: list[dict]) -> None:
    """The counts as the package has them, by chip, implementation and gradient."""
    table: dict[str, dict] = {}
    for row in results:
        name = {"jnp": "scan"}.get(row["implementation"], row["implementation"])
        table.setdefault(row["chip"], {}).setdefault(name, {})[row["what"]] = row["MB"]
    TABLE.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
